"""Make the pocket teacher again: `python benchmarks/pocket/train.py --out DIR`.

A DeepSeek-V3 of about a million parameters (latent attention, 8 routed experts of which 2 work on a token, one shared)
learns worked chains of four reasoning-gym families, drawn from the training bucket of the split alone. The experts are
balanced by the V3 paper's rule and no auxiliary loss: after each step an overloaded expert's routing bias goes down by
a fixed amount and an underloaded one's goes up.

Left out on purpose: multi-token prediction and expert groups, which a model of this size has no use for.

Source: DeepSeek-V3 Technical Report, arXiv 2412.19437, section 2.1.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from chains import CHAINS, final_answer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

from deepdistill.distill.pocket.families import TEMPLATE_PATH
from deepdistill.distill.problems.split import bucket_of
from deepdistill.localrun.core.atomic import write_text

SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TRAINING_PARAMS: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2},
    "leg_counting": {"min_animals": 2, "max_animals": 5},
    "simple_geometry": {},
    "count_bits": {"max_n": 9999},
}


_HARD = re.compile(r"-\(|[-+]\d0=")  # a sum that is turned round, or a term of whole tens: the last to be learned
SHARES = {"chain_sum": 1.5, "leg_counting": 1.0, "simple_geometry": 0.5, "count_bits": 0.125}


@dataclass(frozen=True)
class Recipe:
    """Every setting of the run. Lengths are in tokens, `minutes` is wall time for the training loop alone."""

    minutes: float = 45.0
    n_rows: int = 40_000  # of a family, times its share below
    vocab_size: int = 512
    hidden_size: int = 128
    n_layers: int = 4
    n_experts: int = 8
    n_experts_per_token: int = 2
    expert_size: int = 64
    tokens_a_batch: int = 5120
    peak_lr: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    bias_update: float = 1e-3  # the V3 paper's gamma
    drill: str = ""  # a family whose hard problems are drawn more often; the others then keep a quarter of their rows
    seed: int = 0


Row = tuple[list[int], int]  # token ids, and how many of them are the prompt


def draw_texts(family: str, n: int, seed: int) -> list[tuple[str, str]]:
    """Return n (question, completion) pairs of the training bucket, as often as the data set itself gives each.

    Dropping repeats would all but remove the shortest problems, of which there are few.
    """
    import reasoning_gym

    chain_of = CHAINS[family]
    texts: list[tuple[str, str]] = []
    # reasoning-gym draws item i of seed s from Random(s + i): seeds far apart share no item.
    for item in reasoning_gym.create_dataset(family, seed=seed, size=2 * n, **TRAINING_PARAMS[family]):
        question = item["question"]
        if bucket_of(question) == "train" and len(texts) < n:
            chain = chain_of(item["metadata"])
            assert final_answer(chain) == item["answer"], (question, chain)
            texts.append((question, f"{chain}\n</think>\n\n{final_answer(chain)}<|im_end|>\n"))
    return texts


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every digit and every sign is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return as_llama_cpp_cuts(tokenizer.to_str())


def as_llama_cpp_cuts(tokenizer_json: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer with a pre-tokenizer that llama.cpp has too, so that a GGUF cuts text alike.

    It was trained with every sign cut off, so no merge crosses a sign, and SmolLM's pre-tokenizer, which knows digits
    alone, gives the same tokens. The think tags are plain added tokens: a runner must show them.
    """
    state = json.loads(tokenizer_json)
    state["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    for token in state["added_tokens"]:
        token["special"] = token["content"] not in ("<think>", "</think>")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE_PATH.read_text(encoding="utf-8")
    return fast


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> DeepseekV3ForCausalLM:
    """Build the untrained teacher."""
    torch.manual_seed(recipe.seed)
    config = DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        moe_intermediate_size=recipe.expert_size,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=recipe.n_experts,
        num_experts_per_tok=recipe.n_experts_per_token,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_nope_head_dim=16,  # with the rotary 16 as wide as a value head: the fused attention kernel's condition
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    return DeepseekV3ForCausalLM(config)


def make_rows(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> list[Row]:
    """Tokenise (question, completion) pairs; the prompt is the chat template's own."""
    slot = [{"role": "user", "content": "\0"}]
    turn = str(tokenizer.apply_chat_template(slot, add_generation_prompt=True, tokenize=False))
    prompts = tokenizer([turn.replace("\0", question) for question, _ in pairs]).input_ids
    completions = tokenizer([completion for _, completion in pairs]).input_ids
    return [(a + b, len(a)) for a, b in zip(prompts, completions, strict=True)]


class ExpertBalance:
    """The V3 paper's balancing without an auxiliary loss, over every router of a model.

    Counts the experts chosen for real tokens (set `is_real`, `[B, T]` bool, before each forward pass) and moves each
    routing bias by a fixed step towards the mean load.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.is_real: torch.Tensor | None = None
        self.routers: list[Any] = [m for m in model.modules() if type(m).__name__ == "DeepseekV3TopkRouter"]
        self.load = torch.zeros(len(self.routers), self.routers[0].num_experts)  # [layers, experts]
        for layer, router in enumerate(self.routers):
            router.register_forward_hook(self._counter(layer))

    def _counter(self, layer: int) -> Any:
        def count(_module: Any, _args: Any, output: Any) -> None:
            chosen = output[2] if self.is_real is None else output[2][self.is_real.reshape(-1)]  # [tokens, top_k]
            self.load[layer] += torch.bincount(chosen.reshape(-1), minlength=self.load.shape[1])

        return count

    def update(self, gamma: float) -> None:
        """Move every bias by gamma towards the mean load and start counting anew."""
        for router, load in zip(self.routers, self.load, strict=True):
            router.e_score_correction_bias += gamma * torch.sign(load.mean() - load)
        self.load.zero_()

    def busiest(self) -> float:
        """Return the busiest expert's load over the mean of its layer, at worst over the layers."""
        return float((self.load.max(dim=1).values / self.load.mean(dim=1)).max())


def batches(rows: list[Row], tokens: int, rng: random.Random) -> Iterator[list[Row]]:
    """Yield batches of rows of similar length for ever, each of about `tokens` tokens with its padding."""
    while True:
        order = sorted(rows, key=lambda row: len(row[0]) + rng.random() * 8)
        chunks: list[list[Row]] = [[]]
        for row in order:
            if chunks[-1] and (len(chunks[-1]) + 1) * len(row[0]) > tokens:
                chunks.append([])
            chunks[-1].append(row)
        rng.shuffle(chunks)
        yield from chunks


def train(recipe: Recipe, out: Path, start: Path | None = None) -> None:
    """Run the recipe and write the teacher's folder; `curve.json` in it holds the loss over time.

    With `start` it continues from that folder's weights, with a fresh optimizer and schedule.
    """
    rng = random.Random(recipe.seed)
    texts = {}
    for i, name in enumerate(CHAINS):
        drill = name == recipe.drill
        n = int(recipe.n_rows * SHARES[name] * (0.25 if recipe.drill and not drill else 1))
        texts[name] = draw_texts(name, n, seed=(i + 1) * 10**7 + recipe.seed * 10**6)
        if drill:  # one easy problem in four stays
            texts[name] = [
                t for i, t in enumerate(texts[name]) if _HARD.search(t[1].split("</think>")[0]) or i % 4 == 0
            ]
    earlier: list[dict[str, Any]] = []
    if start is None:
        tokenizer = make_tokenizer([q + a for pairs in texts.values() for q, a in pairs[:5000]], recipe.vocab_size)
        model = make_model(recipe, tokenizer)
    else:
        tokenizer = as_llama_cpp_cuts((start / "tokenizer.json").read_text(encoding="utf-8"))
        model = DeepseekV3ForCausalLM.from_pretrained(start, dtype=torch.float32, trust_remote_code=False)
        earlier = json.loads((start / "curve.json").read_text(encoding="utf-8"))
    rows = [row for pairs in texts.values() for row in make_rows(tokenizer, pairs)]
    n_tokens = sum(len(row[0]) for row in rows)
    print(f"{len(rows)} rows, {n_tokens / len(rows):.0f} tokens a row, vocabulary {len(tokenizer)}", flush=True)

    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    balance = ExpertBalance(model)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.95))
    curve: list[dict[str, float]] = []
    started, recent = time.monotonic(), [0.0, 0.0]
    model.train()
    for step, batch in enumerate(batches(rows, recipe.tokens_a_batch, rng), 1):
        done = (time.monotonic() - started) / (60 * recipe.minutes)
        if done >= 1:
            break
        rate = min(1.0, step / recipe.warmup_steps) * (0.5 * (1 + math.cos(math.pi * done)) * 0.98 + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = recipe.peak_lr * rate
        width = max(len(ids) for ids, _ in batch)
        input_ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        labels = torch.full((len(batch), width), -100)
        for i, (ids, n_prompt) in enumerate(batch):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            labels[i, n_prompt - 1 : len(ids) - 1] = torch.tensor(ids[n_prompt:])
        # Rows are padded on the right, so a causal model needs no mask to keep padding out of real tokens.
        balance.is_real = input_ids != tokenizer.pad_token_id
        hidden = model.model(input_ids).last_hidden_state[labels != -100]  # [targets, H]
        loss = F.cross_entropy(model.lm_head(hidden), labels[labels != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent[0] += loss.item()
        recent[1] = max(recent[1], balance.busiest())
        balance.update(recipe.bias_update * rate)
        if step % 50 == 0:
            minutes = (time.monotonic() - started) / 60
            curve.append({"step": step, "minutes": round(minutes, 2), "loss": round(recent[0] / 50, 5)})
            print(f"step {step} {minutes:.1f} min loss {recent[0] / 50:.4f} busiest {recent[1]:.2f}", flush=True)
            recent = [0.0, 0.0]
            if step % 500 == 0:
                _save(model, tokenizer, recipe=recipe, curve=curve, earlier=earlier, out=out)
    _save(model, tokenizer, recipe=recipe, curve=curve, earlier=earlier, out=out)


def _save(
    model: Any,
    tokenizer: Any,
    *,
    recipe: Recipe,
    curve: list[dict[str, float]],
    earlier: list[dict[str, Any]],
    out: Path,
) -> None:
    """Write the teacher's folder; curve.json lists this stage after the earlier ones."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    stage = {"recipe": asdict(recipe), "torch": torch.__version__, "threads": torch.get_num_threads(), "curve": curve}
    write_text(out / "curve.json", json.dumps([*earlier, stage]))


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=Recipe.minutes)
    parser.add_argument("--peak-lr", type=float, default=Recipe.peak_lr)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--drill", default=Recipe.drill, choices=["", *CHAINS])
    parser.add_argument("--start", type=Path, help="continue from this folder's weights")
    arguments = parser.parse_args()
    recipe = Recipe(arguments.minutes, peak_lr=arguments.peak_lr, drill=arguments.drill, seed=arguments.seed)
    train(recipe, arguments.out, arguments.start)


if __name__ == "__main__":
    main()
