"""Quantization-aware distillation, short: the weights learn to say under their types what they said without.

The forward pass sees every weight as ggml's own quantizer leaves it, with the types and the importance of the export;
the gradient goes straight through to the full-precision weights. The teacher is the unquantized student: its most
probable tokens at every position of its own replies, computed once. What comes out is a checkpoint whose quantization
is exactly the blocks that the last forward pass saw.

Quantizing a model takes seconds, so the change that it makes is kept for `refresh` steps: forward = weight + change,
which is the quantized weight at the refresh and moves with the weight until the next.

Source: straight-through estimation as in Bengio et al. (arXiv 1308.3432); the loss is forward KL over the teacher's top
tokens with one bucket for the rest. Vectors (norms, biases) stay F32 in the file and learn too.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType as Type

from ..errors import ArtifactError, ModelError
from ..localrun.progress import Progress, no_progress
from .calibration import Text
from .convert import Importance, Types
from .quantizer import Quantizer
from .rows import origins

if TYPE_CHECKING:
    import torch

_LARGE = 256  # hidden size: smaller models lose digits and gain nothing


@dataclass(frozen=True)
class HealSettings:
    """How to heal. `lr` is the peak of a rate that rises over a tenth of the steps and then falls to nothing."""

    steps: int = 100
    lr: float = 5e-5
    batch_tokens: int = 1_024
    refresh: int = 8
    top_k: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """A text with the teacher's words: top tokens `[T, k]`, their log-probabilities, and that of all others `[T]`."""

    tokens: tuple[int, ...]
    n_prompt: int
    top: torch.Tensor
    logprobs: torch.Tensor
    rest: torch.Tensor


def heal(
    student_dir: Path,
    out: Path,
    types: Types,
    importance: Importance,
    texts: Sequence[Text],
    settings: HealSettings = HealSettings(),
    *,
    on_progress: Progress = no_progress,
    n_threads: int = 1,
) -> dict[str, Any]:
    """Train a checkpoint under its types and write the result, in float32, beside its place and renamed.

    Returns what it came to: steps, seconds, the loss over the first and the last tenth, the share of sampled rows whose
    blocks stay the same when what they hold is quantized once more, and how many tensors the forward pass did not see
    quantized because the file holds them in another arrangement.

    Raises:
        ModelError: torch is missing, or transformers cannot load the checkpoint.
        ArtifactError: the disk is full.
    """
    try:
        import torch
    except ImportError as error:
        raise ModelError("healing needs torch", "pip install 'deepdistill[teach]'") from error
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _load(student_dir, device)
    rows = list(_teach(model, texts, settings.top_k, device, on_progress))
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}
    wanted = {name for name, type_ in types.items() if type_ != Type.F32}
    found = origins(student_dir, wanted, shapes)
    quantizer = Quantizer(model, found, types, importance, n_threads)
    losses = _train(model, quantizer, rows, settings, device, on_progress)
    stable = quantizer.stability()
    _save(model, student_dir, out)
    tenth = max(1, len(losses) // 10)
    return {
        "steps": len(losses),
        "seconds": round(time.monotonic() - started, 1),
        "loss_before": float(f"{np.mean(losses[:tenth]):.4g}"),
        "loss_after": float(f"{np.mean(losses[-tenth:]):.4g}"),
        "requantized_same": float(f"{stable:.4g}"),
        "tensors_not_seen": len(wanted) - len(found),
    }


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the parameters, each once, and the buffers that a checkpoint keeps, such as DeepSeek's routing bias."""
    kept = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: one for name, one in model.named_buffers() if name in kept}


def _load(folder: Path, device: torch.device) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # On a processor the backward pass of the fused attention is slower than plain products for texts of this length.
    attention = "sdpa" if device.type == "cuda" else "eager"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, attn_implementation=attention
        )
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"transformers cannot load {folder}: {first}") from error
    model.config.use_cache = False
    return model.to(device).eval()  # no dropout: the teacher has none either


def _replies(
    model: Any, tokens: torch.Tensor, wanted: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Return the log-probabilities `[wanted, V]` after the wanted positions of tokens `[B, T]`."""
    import torch
    from torch.func import functional_call

    class Replies(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> torch.Tensor:
            hidden = self.model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
            logits: torch.Tensor = self.model.get_output_embeddings()(hidden[wanted])
            return logits

    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=_has_bf16(tokens.device, model)):
        given = {f"model.{name}": weight for name, weight in (weights or {}).items()}
        logits = functional_call(Replies(), given, ())
    return torch.log_softmax(logits.float(), dim=-1)


def _has_bf16(device: torch.device, model: Any) -> bool:
    """Say whether bf16 products are native there, and the model large enough to gain by them."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    is_native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(is_native) and model.config.hidden_size >= _LARGE


def _teach(model: Any, texts: Sequence[Text], top_k: int, device: torch.device, on_progress: Progress) -> Iterator[Row]:
    """Yield every text with what the unquantized model says at each position of its reply."""
    import torch

    k = min(top_k, model.config.vocab_size - 1)
    for i, text in enumerate(texts):
        tokens = torch.tensor([text.tokens], device=device)
        wanted = torch.zeros_like(tokens, dtype=torch.bool)
        wanted[0, max(text.n_prompt - 1, 0) : -1] = True
        with torch.no_grad():
            logprobs = _replies(model, tokens, wanted)
            best, top = logprobs.topk(k)
            rest = torch.log1p(-best.exp().sum(-1).clamp(max=1 - 1e-6))
        yield Row(text.tokens, text.n_prompt, top.int().cpu(), best.cpu(), rest.cpu())
        on_progress("the teacher reads", i + 1, len(texts), "")


def divergence(logprobs: torch.Tensor, top: torch.Tensor, best: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Return the mean forward KL of log-probabilities `[T, V]` from the teacher's top `[T, k]` and the bucket `[T]`."""
    import torch

    ours = logprobs.gather(1, top.long())
    others = torch.log1p(-ours.exp().sum(-1).clamp(max=1 - 1e-6))
    kl = (best.exp() * (best - ours)).sum(-1) + rest.exp() * (rest - others)
    return kl.mean()


def _train(
    model: Any,
    quantizer: Quantizer,
    rows: Sequence[Row],
    settings: HealSettings,
    device: torch.device,
    on_progress: Progress,
) -> list[float]:
    import torch

    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    batches = _batches(rows, settings)
    losses: list[float] = []
    changes: dict[str, torch.Tensor] = {}
    started = time.monotonic()
    for step in range(settings.steps):
        done = step / settings.steps
        rate = min(1.0, (step + 1) / max(1, settings.steps // 10)) * (1 - done)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate
        if step % settings.refresh == 0:
            changes = quantizer.changes()
        seen = {name: parameters[name] + changes[name] for name in quantizer.names}
        batch = next(batches)
        tokens, wanted = _collate(batch, device)
        logprobs = _replies(model, tokens, wanted, seen)
        teacher = [torch.cat([getattr(row, part) for row in batch]).to(device) for part in ("top", "logprobs", "rest")]
        loss = divergence(logprobs, *teacher)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        per_step = (time.monotonic() - started) / (step + 1)
        on_progress("healing", step + 1, settings.steps, f"KL {losses[-1]:.4f}, {per_step:.1f} s a step")
    return losses


def _batches(rows: Sequence[Row], settings: HealSettings) -> Iterator[list[Row]]:
    """Yield batches of about so many tokens, of rows of similar length, again and again in another order."""
    rng = random.Random(settings.seed)
    while True:
        ordered = sorted(rng.sample(list(rows), len(rows)), key=lambda row: len(row.tokens))
        batches, batch = list[list[Row]](), list[Row]()
        for row in ordered:
            if batch and (len(batch) + 1) * len(row.tokens) > settings.batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(row)
        batches.append(batch)
        rng.shuffle(batches)
        yield from batches


def _collate(batch: Sequence[Row], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right; a causal model never looks there, so there is no mask. Both are `[B, T]`."""
    import torch

    width = max(len(row.tokens) for row in batch)
    tokens = torch.zeros((len(batch), width), dtype=torch.long)
    wanted = torch.zeros((len(batch), width), dtype=torch.bool)
    for i, row in enumerate(batch):
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        wanted[i, max(row.n_prompt - 1, 0) : len(row.tokens) - 1] = True
    return tokens.to(device), wanted.to(device)


def _save(model: Any, student_dir: Path, out: Path) -> None:
    """Write the weights in float32 under the checkpoint's own names, and everything else as it was."""
    from safetensors.torch import save_file

    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for path in student_dir.iterdir():
            if path.is_file() and path.suffix not in (".safetensors", ".bin") and "index.json" not in path.name:
                shutil.copy(path, temporary / path.name)
        weights = {name: p.detach().float().cpu().contiguous() for name, p in _tensors(model).items()}
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
        config = {name: value for name, value in config.items() if name != "torch_dtype"} | {"dtype": "float32"}
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(temporary, out)
    except OSError as error:
        raise ArtifactError(f"cannot write {out}: {error.strerror or error}", "free some disk space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
