"""The batched decoder against `model.generate` one prompt at a time, and every way a model folder can be wrong."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from train import make_tokenizer
from transformers.cache_utils import DynamicCache

from deepdistill.distill.planning.kv_cache import kv_numbers
from deepdistill.distill.teachers import Request, open_teacher
from deepdistill.distill.teachers.huggingface import loading
from deepdistill.distill.teachers.huggingface import scoring as scoring_passes
from deepdistill.distill.teachers.huggingface import teacher as transformers_model
from deepdistill.distill.teachers.huggingface.loading import device_map_for, weights_hash
from deepdistill.distill.teachers.huggingface.paged import PagedDecoder, can_page
from deepdistill.distill.teachers.huggingface.sampling import choose, draw_uniforms
from deepdistill.distill.teachers.huggingface.teacher import TransformersTeacher
from deepdistill.errors import ModelError, UsageError
from deepdistill.localrun.core.generation import Message, Sampling

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 96}
MODELS: dict[str, Callable[[int], Any]] = {
    "llama": lambda v: transformers.LlamaConfig(vocab_size=v, num_hidden_layers=2, num_key_value_heads=2, **SMALL),
    "deepseek_v3": lambda v: transformers.DeepseekV3Config(
        vocab_size=v,
        num_hidden_layers=2,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=12,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=8,
        **SMALL,
    ),
    # Its cache forgets columns by itself, so that rows cannot be cut out and put in.
    "sliding": lambda v: transformers.MistralConfig(
        vocab_size=v, num_hidden_layers=2, num_key_value_heads=2, sliding_window=16, **SMALL
    ),
}


def write_model(folder: Path, kind: str) -> Path:
    """Write a model with random weights, with end-of-turn tokens that make its answers end at different lengths."""
    tokenizer = make_tokenizer(["State the final answer: 12 + 30 = 42, twelve woodlouses and 8 tigers"] * 3, 300)
    torch.manual_seed(0)
    config = MODELS[kind](len(tokenizer))
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, None, tokenizer.eos_token_id
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1.0)
    model.generation_config.eos_token_id = -1
    model.generation_config.pad_token_id = 0
    model.eval()
    answers = []
    for request in ask(8) + ask(8, seed=1, shared=""):
        turns = list(request.messages)
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt").input_ids
        answers.append(model.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :].tolist())
    early = {token for answer in answers for token in answer[:2]}
    ends = {tokenizer.eos_token_id}
    for i, answer in enumerate(answers):
        ends |= set([token for token in answer[1 + i :] if token not in early][:1])
    model.generation_config.eos_token_id = sorted(ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from a second thread, and on a busy machine wait for it."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_model(tmp_path_factory.mktemp(kind), kind) for kind in MODELS}


@pytest.fixture(scope="module", params=list(MODELS))
def teacher(request: pytest.FixtureRequest, folders: dict[str, Path]) -> TransformersTeacher:
    return TransformersTeacher(folders[request.param], device="cpu", batch_size=4)


@pytest.fixture
def llama(folders: dict[str, Path]) -> TransformersTeacher:
    return TransformersTeacher(folders["llama"], device="cpu", batch_size=4)


def ask(n: int, seed: int = 0, shared: str = "State the final answer: ") -> list[Request]:
    """Return conversations of very different lengths."""
    rng = random.Random(seed)
    questions = [shared + " + ".join(str(rng.randint(0, 99)) for _ in range(rng.randint(1, 9))) for _ in range(n)]
    return [Request([{"role": "user", "content": q}], seed + i) for i, q in enumerate(questions)]


def generated_alone(teacher: TransformersTeacher, messages: list[Message], max_tokens: int) -> tuple[int, ...]:
    ids = teacher.tokenizer(teacher.render(messages), add_special_tokens=False, return_tensors="pt").input_ids
    output = teacher.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
    )
    return tuple(output[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("shared", ["State the final answer: ", ""])
def test_greedy_equals_generate_one_prompt_at_a_time(teacher: TransformersTeacher, shared: str) -> None:
    conversations = ask(11, shared=shared)
    answers = dict(teacher.generate(conversations, Sampling(max_tokens=24)))
    assert sorted(answers) == list(range(11))
    lengths = set()
    for i, request in enumerate(conversations):
        messages = list(request.messages)
        expected = generated_alone(teacher, messages, 24)
        assert answers[i].token_ids == expected
        assert answers[i].completion_tokens == len(expected)
        assert answers[i].prompt_tokens == len(teacher.tokenizer(teacher.render(messages)).input_ids)
        assert answers[i].finish_reason == ("stop" if expected[-1] in teacher.eos_ids else "length")
        lengths.add(len(expected))
    assert len(lengths) > 3, "rows must end at different steps, or nothing was refilled"


def test_requests_are_drawn_in_windows_and_need_no_end(teacher: TransformersTeacher) -> None:
    conversations = ask(30)
    n_drawn = 0

    def endless() -> Iterator[Request]:
        nonlocal n_drawn
        for request in itertools.cycle(conversations):
            n_drawn += 1
            yield request

    answers = teacher.generate(endless(), Sampling(max_tokens=12))
    done = {}
    for n_done, (index, completion) in enumerate(itertools.islice(answers, 24)):
        assert n_drawn <= n_done + 4 * teacher.n_parallel
        done[index] = completion
    answers.close()  # type: ignore[attr-defined]
    for index, completion in done.items():
        assert completion.token_ids == generated_alone(teacher, list(conversations[index % 30].messages), 12)


def test_a_later_prompt_need_not_begin_as_the_first_did(llama: TransformersTeacher) -> None:
    conversations = [*ask(9), *ask(9, seed=1, shared="and "), *ask(9)]
    answers = dict(llama.generate(iter(conversations), Sampling(max_tokens=16)))
    for i, request in enumerate(conversations):
        assert answers[i].token_ids == generated_alone(llama, list(request.messages), 16)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_top_logprobs_are_those_of_one_pass_over_the_text(teacher: TransformersTeacher, temperature: float) -> None:
    """At any temperature: they are the model's, not the sampler's."""
    conversations, sampling = ask(11), Sampling(temperature, top_k=3, max_tokens=24)
    answers = dict(teacher.generate(conversations, sampling, top_logprobs=6))
    for i, request in enumerate(conversations):
        made, top = answers[i].token_ids, answers[i].logprobs
        assert made is not None
        assert top is not None
        assert top.ids.dtype == np.int32
        assert top.ids.shape == top.values.shape == (len(made), 6)
        prompt = teacher.tokenizer(teacher.render(request.messages), add_special_tokens=False).input_ids
        with torch.inference_mode():
            logits = teacher.model(torch.tensor([[*prompt, *made]])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits.float(), -1).numpy()
        np.testing.assert_allclose(top.values, -np.sort(-expected)[:, :6], atol=1e-4)
        np.testing.assert_allclose(top.values, np.take_along_axis(expected, top.ids, 1), atol=1e-4)
    plain = dict(teacher.generate(conversations, sampling))
    assert all(plain[i].logprobs is None and plain[i].token_ids == answers[i].token_ids for i in range(11))


def test_many_given_texts_are_scored_as_each_alone(
    teacher: TransformersTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["12 + 30 = 42, twelve", "7", "4, 5 and 6 and so on, up to nine or ten or more", "", "<think>5</think>"]
    made = [(ask(1)[0].messages, teacher.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    made.append(([{"role": "user", "content": "A longer question, of which more stands before the answer."}], [9, 8]))
    monkeypatch.setattr(transformers_model, "_SCORED_TOKENS", sum(len(answer) for _, answer in made))
    for most in (1, 100, 10_000):
        monkeypatch.setitem(scoring_passes._TOKENS, "cpu", most)
        scored = dict(teacher.score_many(made, top_logprobs=5))
        assert sorted(scored) == list(range(len(made)))
        for i, (messages, answer) in enumerate(made):
            alone = teacher.score(messages, answer, top_logprobs=5)
            np.testing.assert_allclose(scored[i].values, alone.values, atol=1e-4)
            assert scored[i].ids.shape == alone.ids.shape == (len(answer), 5)


def test_a_given_text_is_scored_in_passes_of_any_size(
    teacher: TransformersTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages, text = ask(1)[0].messages, "12 + 30 = 42, twelve"
    made = teacher.tokenizer(text, add_special_tokens=False).input_ids
    prompt = teacher.tokenizer(teacher.render(messages), add_special_tokens=False).input_ids
    with torch.inference_mode():
        logits = teacher.model(torch.tensor([[*prompt, *made]])).logits[0, len(prompt) - 1 : -1]
    everything = torch.log_softmax(logits.float(), -1)
    ids, values = (part.clone() for part in everything.topk(5)[::-1])
    for i, token in enumerate(made):  # the answer's own token is among them, in the last place if need be
        if token not in ids[i]:
            ids[i, -1], values[i, -1] = token, everything[i, token]
    assert bool((values[:, -1] < everything.topk(5).values[:, -1]).any())
    for n in (1024, 1, 3, len(prompt) - 1, len(prompt), len(prompt) + 1):
        monkeypatch.setattr(transformers_model, "_SCORED_TOKENS", n)
        for answer in (text, made):
            scored = teacher.score(messages, answer, top_logprobs=5)
            np.testing.assert_allclose(scored.values, values.numpy(), atol=1e-4)
            assert (scored.ids == ids.numpy()).mean() > 0.9
            assert all(token in row for token, row in zip(made, scored.ids, strict=True))
    with pytest.raises(ModelError, match="context"):
        teacher.score(messages, made * 20, top_logprobs=5)


@pytest.fixture
def paged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the paged cache on the CPU too, with pages so small that rows hold several and that it runs full."""
    monkeypatch.setattr(transformers_model, "PagedDecoder", partial(PagedDecoder, n_pages=12, page_size=16))


@pytest.mark.usefixtures("paged")
@pytest.mark.parametrize("kind", ["llama", "sliding"])
def test_the_paged_cache_answers_as_generate_does(folders: dict[str, Path], kind: str) -> None:
    teacher = TransformersTeacher(folders[kind], device="cpu", batch_size=4)
    teacher._pages, notes = True, list[str]()
    teacher.on_note = notes.append
    conversations = [*ask(9), Request([{"role": "user", "content": "12 " * 200}])]
    answers = dict(teacher.generate(iter(conversations), Sampling(max_tokens=16)))
    assert teacher._pages, notes
    assert answers[9].finish_reason == "error"
    for i in range(9):
        assert answers[i].token_ids == generated_alone(teacher, list(conversations[i].messages), 16)
        assert answers[i].finish_reason == ("stop" if answers[i].token_ids[-1] in teacher.eos_ids else "length")


@pytest.mark.usefixtures("paged")
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 5, "min_p": 0.1}])
def test_the_paged_cache_samples_with_each_rows_own_seed(llama: TransformersTeacher, filters: dict[str, Any]) -> None:
    sampling = Sampling(temperature=1.0, max_tokens=12, **filters)
    expected = dict(llama.generate(ask(9), sampling))
    llama._pages = True
    answers = dict(llama.generate(ask(9), sampling))
    assert llama._pages
    assert [answers[i].token_ids for i in range(9)] == [expected[i].token_ids for i in range(9)]


@pytest.mark.usefixtures("paged")
def test_what_the_paged_cache_refuses_is_batched_here_with_one_note(folders: dict[str, Path]) -> None:
    teacher = TransformersTeacher(folders["deepseek_v3"], device="cpu", batch_size=4)
    assert not can_page(teacher.model)
    teacher._pages, notes = True, list[str]()
    teacher.on_note = notes.append
    for _ in range(2):
        answers = dict(teacher.generate(ask(11), Sampling(max_tokens=8)))
        for i, request in enumerate(ask(11)):
            assert answers[i].token_ids == generated_alone(teacher, list(request.messages), 8)
    assert len(notes) == 1
    assert "\n" not in notes[0]


def test_samples_depend_on_seed_and_index_but_not_on_the_batch(llama: TransformersTeacher) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.95, max_tokens=12)

    def sample(batch_size: int, seed: int) -> list[Any]:
        llama.n_parallel = batch_size
        answers = dict(llama.generate([replace(r, seed=seed + i) for i, r in enumerate(ask(9))], sampling))
        return [answers[i].token_ids for i in range(9)]

    alone = sample(1, 7)
    assert alone == sample(4, 7) == sample(9, 7)
    assert alone != sample(4, 8)
    same = [Request(ask(1)[0].messages, seed) for seed in range(6)]
    assert len({answer.token_ids for _, answer in llama.generate(same, sampling)}) > 1


@pytest.mark.parametrize("kind", MODELS)
def test_a_prompt_is_computed_once_for_all_its_answers(folders: dict[str, Path], kind: str) -> None:
    teacher = TransformersTeacher(folders[kind], device="cpu", batch_size=6)
    sampling = Sampling(temperature=1.0, max_tokens=12)
    requests = [Request(ask(2)[i % 2].messages, seed=i) for i in range(6)]
    alone = [next(iter(teacher.generate([request], sampling)))[1].token_ids for request in requests]
    prefilled: list[int] = []
    hook = teacher.model.register_forward_pre_hook(
        lambda _, args, given: prefilled.append(given["input_ids"].shape[0] * (given["input_ids"].shape[1] > 1)),
        with_kwargs=True,
    )
    answers = dict(teacher.generate(requests, sampling))
    hook.remove()
    assert [answers[i].token_ids for i in range(6)] == alone
    assert len(set(alone)) > 2
    # what all prompts begin with, then the rest of both; a cache that cannot be cut by row takes all six
    assert [n for n in prefilled if n] == ([6] if kind == "sliding" else [1, 2])


def test_a_step_looks_at_the_latents_themselves(folders: dict[str, Path]) -> None:
    """Multi-head latent attention: only the prompt's latents are expanded to keys and values, once."""
    teacher = TransformersTeacher(folders["deepseek_v3"], device="cpu", batch_size=4)
    attention = teacher.model.model.layers[1].self_attn
    if not hasattr(attention, "expand_kv"):
        pytest.skip("this transformers keeps whole keys and values")
    conversations, widths = ask(4), list[int]()
    expected = [generated_alone(teacher, list(request.messages), 12) for request in conversations]
    hook = attention.kv_b_proj.register_forward_hook(lambda _, args, output: widths.append(output.shape[-2]))
    answers = dict(teacher.generate(conversations, Sampling(max_tokens=12)))
    assert [answers[i].token_ids for i in range(4)] == expected
    assert len(widths) == 2  # the shared words, then the rest
    assert teacher.model.config._attn_implementation == "sdpa"

    # a wrapped projection may not be what its weight says
    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner(x)

    attention.kv_b_proj = Wrapped(attention.kv_b_proj)
    widths.clear()
    answers = dict(teacher.generate(conversations, Sampling(max_tokens=12)))
    assert [answers[i].token_ids for i in range(4)] == expected
    assert len(widths) > 2
    hook.remove()


def test_closing_the_iterator_stops_and_the_teacher_answers_again(llama: TransformersTeacher) -> None:
    answers = llama.generate(ask(9), Sampling(max_tokens=24))
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert len(list(llama.generate(ask(9), Sampling(max_tokens=24)))) == 9
    assert list(llama.generate([], Sampling())) == []


def test_the_context_bounds_prompt_and_answer(llama: TransformersTeacher) -> None:
    long = [{"role": "user", "content": "12 " * 200}]
    answers = dict(llama.generate([Request(long), *ask(2)], Sampling(max_tokens=500)))
    assert answers[0].finish_reason == "error"
    assert "context of 96" in (answers[0].error or "")
    for i in (1, 2):
        assert answers[i].prompt_tokens + answers[i].completion_tokens <= 96


def test_thinking_is_told_from_the_answer(llama: TransformersTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "12+30=42\n</think>\n\n42<|im_end|>"
    wanted = llama.tokenizer(text, add_special_tokens=False).input_ids
    monkeypatch.setattr(llama, "eos_ids", frozenset([wanted[-1]]))
    monkeypatch.setattr(llama, "model", Parrot(llama.model, wanted))
    ((_, answer),) = llama.generate(ask(1), Sampling(max_tokens=64))
    assert (answer.reasoning_content, answer.content, answer.closed) == ("12+30=42", "42", True)
    close = llama.tokenizer.convert_tokens_to_ids("</think>")
    assert answer.reasoning_tokens == wanted.index(close) + 1
    assert (answer.completion_tokens, answer.finish_reason) == (len(wanted), "stop")
    ((_, cut),) = llama.generate(ask(1), Sampling(max_tokens=4))
    assert (cut.content, cut.closed, cut.finish_reason, cut.reasoning_tokens) == ("", False, "length", 4)


class Parrot(torch.nn.Module):
    """A model that says what it was told, whatever it is asked."""

    def __init__(self, model: Any, tokens: list[int]) -> None:
        super().__init__()
        self.config, self.device, self.tokens, self.n = model.config, model.device, tokens, 0

    def forward(self, input_ids: torch.Tensor, past_key_values: Any, **_: Any) -> Any:
        rows, width = input_ids.shape
        states = torch.zeros(rows, 1, width, 1)
        for i in range(len(past_key_values.layers)):
            past_key_values.update(states, states, i)
        self.n = 0 if width > 1 else self.n + 1
        logits = torch.nn.functional.one_hot(torch.tensor([[self.tokens[self.n]]] * rows), self.config.vocab_size)
        return type("Output", (), {"logits": logits.float()})


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(0.1, 2.0),
    st.sampled_from([0, 1, 5, 100]),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 0.5]),
)
def test_choose_against_a_naive_loop(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    rng = np.random.default_rng(seed)
    logits, uniforms = rng.normal(0, 2, (4, 50)), rng.random(4)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    chosen = choose(torch.tensor(logits), sampling, torch.tensor(uniforms))
    for row, u, token in zip(logits, uniforms, chosen.tolist(), strict=True):
        kept = naive_filter(row, temperature, top_k, top_p, min_p)
        in_order = sorted(kept, key=lambda t: -kept[t]) if top_k or top_p < 1 or min_p else sorted(kept)
        total, passed, expected = sum(kept.values()), 0.0, in_order[-1]
        for candidate in in_order:
            passed += kept[candidate] / total
            if passed > u:
                expected = candidate
                break
        assert token == expected or abs(passed - u) < 1e-5
        assert token in kept


def naive_filter(row: Any, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """Return the tokens that the filters leave, with their probabilities."""
    exponents = np.exp((row - row.max()) / temperature)
    probabilities = exponents / exponents.sum()
    order = [int(t) for t in np.argsort(-probabilities)]
    order = order[:top_k] if top_k else order
    mass, kept, passed = sum(probabilities[t] for t in order), [], 0.0
    for token in order:
        if passed >= top_p * mass - 1e-9 and kept:
            break
        kept.append(token)
        passed += probabilities[token]
    return {t: float(probabilities[t]) for t in kept if probabilities[t] >= min_p * probabilities[order[0]] - 1e-9}


def test_choose_draws_from_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(20_000, 4)
    uniforms = draw_uniforms(Sampling(temperature=1.0), 3, 20_000)
    for sampling in (Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.99)):
        shares = torch.bincount(choose(logits, sampling, uniforms), minlength=4) / 20_000
        assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015)


def test_choose_finds_the_token_in_a_large_vocabulary_as_plain_cumulative_sums_do() -> None:
    rng = np.random.default_rng(5)
    logits = torch.tensor(rng.normal(0, 3, 1000))
    logits[rng.random(1000) < 0.5] = -torch.inf
    logits[768:] = -torch.inf  # so the last of the blocks holds nothing
    uniforms = torch.tensor([0.0, *np.sort(rng.random(3000)), 1 - 1e-16], dtype=torch.float64)
    chosen = choose(logits.expand(len(uniforms), -1), Sampling(temperature=1.0), uniforms)
    cumulative = torch.softmax(logits, -1).cumsum(-1)
    below = torch.cat([torch.zeros(1), cumulative])[chosen]
    assert (below <= uniforms + 1e-6).all()
    assert (cumulative[chosen] > uniforms - 1e-6).all()
    assert torch.isfinite(logits[chosen]).all(), "what cannot be said is never chosen"


def test_a_wide_nucleus_is_not_cut_short() -> None:
    """Where the head that is sorted first holds less than top-p, the whole vocabulary counts."""
    logits, sampling = torch.zeros(1, 5000), Sampling(temperature=1.0, top_p=0.9)
    seen = {int(choose(logits, sampling, torch.tensor([u], dtype=torch.float64))) for u in np.linspace(0, 0.999, 3000)}
    assert len(seen) > 2500


def broken(source: Path, target: Path, name: str, content: bytes | None) -> Path:
    """Copy a model folder with one file replaced, or removed."""
    shutil.copytree(source, target)
    (target / name).unlink()
    if content is not None:
        (target / name).write_bytes(content)
    return target


def test_bad_folders_give_one_line_and_a_hint(folders: dict[str, Path], tmp_path: Path) -> None:
    llama = folders["llama"]
    config = json.loads((llama / "config.json").read_text())
    unknown = json.dumps(config | {"model_type": "warp_drive", "architectures": ["WarpDriveForCausalLM"]}).encode()
    deeper = json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}).encode()
    weights = (llama / "model.safetensors").read_bytes()
    cases = [
        ("config.json", None, "no config.json"),
        ("tokenizer.json", None, "no tokenizer"),
        ("tokenizer.json", b"{", "cannot load the tokenizer"),
        ("model.safetensors", None, "no weights"),
        ("model.safetensors", weights[: len(weights) // 2], "corrupt"),
        ("model.safetensors", b"", "corrupt"),
        ("config.json", unknown, "does not know the architecture"),
        ("config.json", b"{", "cannot load"),
        ("config.json", deeper, "lacks 9 of its weights"),
    ]
    for i, (name, content, expected) in enumerate(cases):
        folder = broken(llama, tmp_path / str(i), name, content)
        with pytest.raises(ModelError) as caught:
            open_teacher(str(folder), device="cpu")
        assert expected in caught.value.message, (name, content and content[:20], caught.value.message)
        assert "\n" not in caught.value.message


def test_a_model_without_chat_template(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = broken(folders["llama"], tmp_path / "plain", "chat_template.jinja", None)
    with open_teacher(str(folder), device="cpu") as teacher, pytest.raises(ModelError, match="no chat template"):
        list(teacher.generate(ask(1), Sampling()))


@pytest.mark.parametrize("spec", ["no/such/folder", "pockett", "ftp://host/v1", ""])
def test_unknown_specs(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_teacher(spec)
    assert "pocket" in caught.value.hint


def test_what_is_not_there() -> None:
    with pytest.raises(ModelError, match="no GGUF file"):
        open_teacher("none.gguf")
    with pytest.raises(ModelError, match="not in the local cache"):
        open_teacher("hf:deepdistill-tests/none", offline=True)
    with pytest.raises(UsageError, match="offline"):
        open_teacher("https://example.org/v1", offline=True)


def test_weights_go_on_one_gpu_or_over_all_and_never_half_on_the_cpu() -> None:
    gib = 2**30
    assert device_map_for(10 * gib, {0: 20 * gib, 1: 70 * gib}) == {"": 1}
    assert device_map_for(10 * gib, {3: 20 * gib}) == {"": 3}
    assert device_map_for(100 * gib, {0: 70 * gib, 1: 70 * gib}) == "auto"
    for n_bytes, free in ((100 * gib, {0: 70 * gib}), (140 * gib, {0: 70 * gib, 1: 70 * gib})):
        with pytest.raises(ModelError, match="GiB"):
            device_map_for(n_bytes, free)


def test_weights_are_loaded_straight_into_their_place(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, with the CPU in the GPU's place: the size is known before the weights are read."""
    sizes = []

    def place(n_bytes: int, free: dict[int, int]) -> dict[str, str]:
        sizes.append((n_bytes, free))
        return {"": "cpu"}

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (index + 5, 99))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(loading, "device_map_for", place)
    model = loading.load_model(folders["deepseek_v3"], torch.device("cuda"))
    plain = loading.load_model(folders["deepseek_v3"], torch.device("cpu"))
    assert sizes == [(4 * plain.num_parameters(), {0: 5, 1: 6})]
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    loading.load_model(folders["llama"], torch.device("cuda:1"))
    assert sizes[1][1] == {1: 6}


def test_options_that_cannot_be(folders: dict[str, Path]) -> None:
    for options in ({"batch_size": 0}, {"device": "abacus"}):
        with pytest.raises(UsageError):
            TransformersTeacher(folders["llama"], **options)  # type: ignore[arg-type]


def test_the_revision_is_that_of_the_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders["llama"], tmp_path / "copy")
    assert weights_hash(copy) == weights_hash(folders["llama"])
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert weights_hash(copy) != weights_hash(folders["llama"])


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_the_cache_of_a_token_is_reckoned_as_large_as_it_is(folders: dict[str, Path], kind: str) -> None:
    model = TransformersTeacher(folders[kind], device="cpu").model
    cache: Any = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert kv_numbers(model.config.to_dict())[0] == held // 3
