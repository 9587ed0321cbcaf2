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

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from gguf import GGMLQuantizationType as Type

from ...errors import ArtifactError, ModelError
from ...localrun.core.reporter import Progress, no_progress
from ..convert.origins import origins
from ..convert.writer import Importance, Types
from ..measure.texts import Text
from .fake_quantize import Quantizer

if TYPE_CHECKING:
    import torch

_RECORD = "healing.json"  # in the healed folder: what it was made from, and what it came to
_LARGE = 256  # hidden size: smaller models lose digits and gain nothing
_WIDTH = 16  # batches are a multiple as wide: oneDNN compiles a product for each shape

Item = TypeVar("Item", Text, "Row")


@dataclass(frozen=True)
class HealSettings:
    """How to heal. `lr` is the peak of a rate that rises over a tenth of the steps and then falls to nothing."""

    steps: int = 100
    lr: float = 5e-5
    batch_tokens: int = 1_024
    refresh: int = 8
    top_k: int = 128
    seed: int = 0
    save_every_s: float = 120.0


Divergence = Callable[..., Any]
"""Of states `[N, H]`, projection `[V, H]` and the teacher's top ids and log-probabilities `[N, k]`: the mean KL."""


@dataclass(frozen=True)
class Row:
    """A text, and what the teacher says at its T reply positions: top tokens and their log-probabilities `[T, k]`."""

    tokens: tuple[int, ...]
    n_prompt: int
    top: torch.Tensor
    logprobs: torch.Tensor


def heal(
    student_dir: Path,
    out: Path,
    types: Types,
    importance: Importance,
    texts: Sequence[Text],
    divergence: Divergence,
    settings: HealSettings = HealSettings(),
    *,
    on_progress: Progress = no_progress,
    n_threads: int = 1,
) -> dict[str, Any]:
    """Train a checkpoint under its types and write the result, in float32, beside its place and renamed.

    What was done is kept beside `out` every few minutes, and the same call goes on from there to the same weights. Once
    all is done, the same call finds it.

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
    key = _key(student_dir, types, importance, texts, settings)
    try:
        known = json.loads((out / _RECORD).read_text(encoding="utf-8"))
        if known["key"] == key:
            return dict(known["report"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing yet
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _load(student_dir, device)
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}
    wanted = {name for name, type_ in types.items() if type_ != Type.F32}
    found = origins(student_dir, wanted, shapes)
    quantizer = Quantizer(model, found, types, importance, n_threads)
    rows = _teach(model, texts, settings, device, on_progress)
    healing = _Healing(model, quantizer, rows, divergence, settings, device)
    healing.run(out.with_name(f".{out.name}.partial.pt"), key, on_progress)
    tenth = max(1, len(healing.losses) // 10)
    report = {
        "steps": len(healing.losses),
        "seconds": round(healing.seconds, 1),
        "loss_before": float(f"{np.mean(healing.losses[:tenth]):.4g}"),
        "loss_after": float(f"{np.mean(healing.losses[-tenth:]):.4g}"),
        "requantized_same": float(f"{quantizer.stability():.4g}"),
        "tensors_not_seen": len(wanted) - len(found),
    }
    _save(model, student_dir, out, {"key": key, "report": report})
    out.with_name(f".{out.name}.partial.pt").unlink(missing_ok=True)
    return report


def _key(student_dir: Path, types: Types, importance: Importance, texts: Sequence[Text], settings: HealSettings) -> str:
    """Return what tells one healing from another."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in student_dir.glob("*.safetensors")]
    weights = sorted((name, hashlib.sha256(one.tobytes()).hexdigest()) for name, one in importance.items())
    known = (sorted(files), sorted((name, int(type_)) for name, type_ in types.items()), weights, texts, settings)
    return hashlib.sha256(repr(known).encode()).hexdigest()


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


def _states(
    model: Any, tokens: torch.Tensor, wanted: torch.Tensor, weights: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return the states `[wanted, H]` from which the tokens after the wanted positions of `[B, T]` are predicted."""
    import torch
    from torch.func import functional_call

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> torch.Tensor:
            hidden: torch.Tensor = self.model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
            return hidden[wanted]

    states: torch.Tensor = functional_call(Decoder(), {f"model.{name}": one for name, one in weights.items()}, ())
    return states


def _has_bf16(device: torch.device, model: Any) -> bool:
    """Say whether bf16 products are native there, and the model large enough to gain by them."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    is_native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(is_native) and model.config.hidden_size >= _LARGE


def _teach(
    model: Any, texts: Sequence[Text], settings: HealSettings, device: torch.device, on_progress: Progress
) -> list[Row]:
    """Return every text with what the unquantized model says at each position of its reply, its logits in fp32."""
    import torch

    k = min(settings.top_k, model.config.vocab_size - 1)
    rows: list[Row] = []
    for batch in _cut(sorted(texts, key=lambda text: len(text.tokens)), settings.batch_tokens):
        tokens, wanted = _collate(batch, device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=_has_bf16(device, model)):
            states = _states(model, tokens, wanted, {}).split([int(n) for n in wanted.sum(1)])
        for text, of_text in zip(batch, states, strict=True):
            with torch.no_grad():
                logits = model.get_output_embeddings()(of_text.float())
                best, top = torch.log_softmax(logits, dim=-1).topk(k)
            rows.append(Row(text.tokens, text.n_prompt, top.int().cpu(), best.cpu()))
        on_progress("the teacher reads", len(rows), len(texts), "")
    return rows


class _Healing:
    """A student under way: weights in fp32, which the forward pass sees as they are under their types."""

    def __init__(
        self,
        model: Any,
        quantizer: Quantizer,
        rows: Sequence[Row],
        divergence: Divergence,
        settings: HealSettings,
        device: torch.device,
    ) -> None:
        import torch

        self.model, self.quantizer, self.rows, self.divergence = model, quantizer, rows, divergence
        self.settings, self.device = settings, device
        self.parameters = dict(model.named_parameters())
        head = model.get_output_embeddings().weight
        self.head = next(name for name, parameter in self.parameters.items() if parameter is head)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.losses: list[float] = []
        self.seconds = 0.0
        # The residual stream stays in fp32, though the embedding that it begins with is seen in bf16.
        model.get_input_embeddings().register_forward_hook(lambda *given: given[2].float())

    def run(self, path: Path, key: str, on_progress: Progress) -> None:
        """Train to the end, from what `path` keeps if that is of the same healing."""
        self._resume(path, key)
        changes: dict[str, torch.Tensor] = {}
        batches = islice(_batches(self.rows, self.settings), len(self.losses), None)
        started, before, saved = time.monotonic(), self.seconds, time.monotonic()
        for step in range(len(self.losses), self.settings.steps):
            if step % self.settings.refresh == 0:
                if time.monotonic() - saved > self.settings.save_every_s:
                    self._keep(path, key)
                    saved = time.monotonic()
                changes = self.quantizer.changes()
            self._step(step, next(batches), changes)
            self.seconds = before + time.monotonic() - started
            note = f"KL {self.losses[-1]:.4f}, {self.seconds / (step + 1):.1f} s a step"
            on_progress("healing", step + 1, self.settings.steps, note)

    def _step(self, step: int, batch: Sequence[Row], changes: Mapping[str, torch.Tensor]) -> None:
        import torch

        done = step / self.settings.steps
        rate = min(1.0, (step + 1) / max(1, self.settings.steps // 10)) * (1 - done)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * rate
        in_bf16 = _has_bf16(self.device, self.model)
        seen: dict[str, torch.Tensor] = {}
        for name, change in changes.items():
            weight = self.parameters[name].detach() + change
            seen[name] = (weight.bfloat16() if in_bf16 and weight.ndim == 2 else weight).requires_grad_()
        tokens, wanted = _collate(batch, self.device)
        top, logprobs = (
            torch.cat([getattr(row, part) for row in batch]).to(self.device) for part in ("top", "logprobs")
        )
        projection = seen.get(self.head, self.parameters[self.head])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bf16):
            states = _states(self.model, tokens, wanted, seen)
            loss = self.divergence(states, projection, top, logprobs)
        loss.backward()
        for name, weight in seen.items():  # straight through
            assert weight.grad is not None
            self.parameters[name].grad = weight.grad.float()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))

    def _keep(self, path: Path, key: str) -> None:
        """Write down how far it is; a refresh comes next, so nothing else is needed to go on exactly."""
        import torch

        state = {"key": key, "losses": self.losses, "seconds": self.seconds, "optimizer": self.optimizer.state_dict()}
        state["weights"] = {name: parameter.detach() for name, parameter in self.parameters.items()}
        temporary = path.with_name(f"{path.name}.new")
        try:
            torch.save(state, temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError of a full disk
            temporary.unlink(missing_ok=True)
            raise ArtifactError(f"cannot keep what was healed in {path}: {error}", "free some disk space") from error

    def _resume(self, path: Path, key: str) -> None:
        import torch

        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["key"] != key:
            return
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = state["losses"], state["seconds"]


def _batches(rows: Sequence[Row], settings: HealSettings) -> Iterator[list[Row]]:
    """Yield batches of about so many tokens, of rows of similar length, again and again in another order."""
    rng = random.Random(settings.seed)
    while True:
        shuffled = sorted(rng.sample(list(rows), len(rows)), key=lambda row: len(row.tokens))
        batches = _cut(shuffled, settings.batch_tokens)
        rng.shuffle(batches)
        yield from batches


def _cut(ordered: Sequence[Item], batch_tokens: int) -> list[list[Item]]:
    """Return texts, the shortest first, as batches of at most so many tokens with their padding."""
    batches: list[list[Item]] = [[]]
    for one in ordered:
        if batches[-1] and (len(batches[-1]) + 1) * _width(one) > batch_tokens:
            batches.append([])
        batches[-1].append(one)
    return batches


def _width(text: Text | Row) -> int:
    return -(-len(text.tokens) // _WIDTH) * _WIDTH


def _collate(batch: Sequence[Text | Row], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right; a causal model never looks there, so there is no mask. Both are `[B, T]`."""
    import torch

    width = max(_width(row) for row in batch)
    tokens = torch.zeros((len(batch), width), dtype=torch.long)
    wanted = torch.zeros((len(batch), width), dtype=torch.bool)
    for i, row in enumerate(batch):
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        wanted[i, max(row.n_prompt - 1, 0) : len(row.tokens) - 1] = True
    return tokens.to(device), wanted.to(device)


def _save(model: Any, student_dir: Path, out: Path, record: Mapping[str, Any]) -> None:
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
        (temporary / _RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(temporary, out)
    except OSError as error:
        raise ArtifactError(f"cannot write {out}: {error.strerror or error}", "free some disk space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
