"""The training loop of healing: the forward pass sees the weights under their types, the step goes to fp32 weights."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ArtifactError
from ...localrun.core.atomic import replacing_file
from ...localrun.core.reporter import Reporter
from ...localrun.core.text import first_line
from ..recipe import HealRecipe
from .fake_quantize import Quantizer
from .model import states_of, uses_bf16
from .teacher import TaughtText, collate, cut

if TYPE_CHECKING:
    import torch

Divergence = Callable[..., Any]
"""Returns the mean KL of states `[N, H]`, a projection `[V, H]`, and the teacher's top ids and log-probabilities
`[N, k]`."""


class Healing:
    """A student being healed."""

    def __init__(
        self,
        quantizer: Quantizer,
        texts: Sequence[TaughtText],
        *,
        divergence: Divergence,
        settings: HealRecipe,
        device: torch.device,
    ) -> None:
        """Take the student under its types, and the texts to learn from."""
        import torch

        self._quantizer, self._texts, self._divergence = quantizer, texts, divergence
        self._settings, self._device, self._model = settings, device, quantizer.model
        self._parameters = dict(self._model.named_parameters())
        head = self._model.get_output_embeddings().weight
        self._head = next(name for name, parameter in self._parameters.items() if parameter is head)
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.losses: list[float] = []
        self.seconds = 0.0
        # The residual stream stays in fp32, even if the embedding that it starts from is in bf16.
        self._model.get_input_embeddings().register_forward_hook(lambda *given: given[2].float())

    def run(self, state_path: Path, key: str, report: Reporter) -> None:
        """Train to the end, resuming from `state_path` if it holds a state with the same key.

        Raises:
            ArtifactError: `code` "write-failed", or "checkpoint-broken": the state is none that `run` wrote.
        """
        self._resume(state_path, key)
        settings = self._settings
        changes: dict[str, torch.Tensor] = {}
        batches = islice(_batches(self._texts, settings), len(self.losses), None)
        started, before, saved = time.monotonic(), self.seconds, time.monotonic()
        for step in range(len(self.losses), settings.steps):
            if step % settings.refresh == 0:
                # The changes are computed next, so the weights and the optimizer are all that a resume needs.
                if time.monotonic() - saved > settings.save_every_s:
                    self._save(state_path, key)
                    saved = time.monotonic()
                changes = self._quantizer.changes()
            self._step(step, next(batches), changes)
            self.seconds = before + time.monotonic() - started
            note = f"KL {self.losses[-1]:.4f}, {self.seconds / (step + 1):.1f} s a step"
            report.progress("healing", step + 1, total=settings.steps, note=note)

    def _step(self, step: int, batch: Sequence[TaughtText], changes: Mapping[str, torch.Tensor]) -> None:
        import torch

        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.lr * _rate(step, self._settings.steps)
        in_bf16 = uses_bf16(self._model, self._device)
        quantized: dict[str, torch.Tensor] = {}
        for name, change in changes.items():
            weight = self._parameters[name].detach() + change
            quantized[name] = (weight.bfloat16() if in_bf16 and weight.ndim == 2 else weight).requires_grad_()
        tokens, wanted = collate(batch, self._device)
        top = torch.cat([text.top for text in batch]).to(self._device)
        logprobs = torch.cat([text.logprobs for text in batch]).to(self._device)
        projection = quantized.get(self._head, self._parameters[self._head])
        with torch.autocast(self._device.type, torch.bfloat16, enabled=in_bf16):
            states = states_of(self._model, tokens, wanted=wanted, weights=quantized)
            loss = self._divergence(states, projection, top, logprobs)
        loss.backward()
        for name, weight in quantized.items():  # straight through: the gradient at the quantized weight
            assert weight.grad is not None
            self._parameters[name].grad = weight.grad.float()
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))

    def _save(self, path: Path, key: str) -> None:
        import torch

        state = {"key": key, "losses": self.losses, "seconds": self.seconds, "optimizer": self._optimizer.state_dict()}
        state["weights"] = {name: parameter.detach() for name, parameter in self._parameters.items()}
        with replacing_file(path) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # what torch's writer raises if the disk is full
                raise OSError(str(error)) from error

    def _resume(self, path: Path, key: str) -> None:
        import torch

        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self._device, weights_only=True)
            is_ours = state["key"] == key
        except Exception as error:  # whatever is in the file: it may come from anybody
            message = f"cannot read {path}: {first_line(error)}"
            raise ArtifactError(message, "delete it: healing then begins anew", code="checkpoint-broken") from error
        if not is_ours:
            return
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state["weights"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self.losses, self.seconds = state["losses"], state["seconds"]


def _rate(step: int, n_steps: int) -> float:
    """Return the share of the peak learning rate: it rises over the first tenth and falls to 0 at the end."""
    return min(1.0, (step + 1) / max(1, n_steps // 10)) * (1 - step / n_steps)


def _batches(texts: Sequence[TaughtText], settings: HealRecipe) -> Iterator[list[TaughtText]]:
    """Yield batches of about `batch_tokens`, of texts of similar length, endlessly, in a new order each epoch."""
    rng = random.Random(settings.seed)
    while True:
        shuffled = sorted(rng.sample(list(texts), len(texts)), key=lambda text: len(text.tokens))
        batches = cut(shuffled, settings.batch_tokens)
        rng.shuffle(batches)
        yield from batches
