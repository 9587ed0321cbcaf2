"""Frozen linear maps of the same input, with their LoRA adapters, as one matrix product.

q, k and v have the same input, and so have gate and up: their weights are joined in one matrix. The adapters are in the
same matrix, so that a layer with LoRA costs little more than one without:

    joint `[O + R, I + R]` = | W  B |    y  = [x, x A^T] @ [W, B]^T
                             | A  . |    dx = [dy, dy B] @ [W; A]

W holds the weights of the n modules, A the R rows of all their adapters, B their scaled columns, each in its module's
rows. The modules' weights become views of the joint matrix, so no memory is added. peft's modules keep the adapters'
parameters in fp32; they are copied into the matrix before every pass, since no version counter shows a fused
optimizer's step. The backward pass computes no gradient of a frozen weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class _Adapter:
    a: nn.Parameter  # [r, I]
    b: nn.Parameter  # [o, r]
    scale: float
    outputs: slice  # its module's among the O
    ranks: slice  # its own among the R
    a_place: Tensor  # [r, I], the view of the joint matrix that holds a
    b_place: Tensor  # [o, r], likewise scale * b


class Linears:
    """n linear modules of the same input, each an `nn.Linear` or peft's LoRA around one; O outputs and R ranks in all.

    Call `refresh` before each pass. The views of the joint matrix that a pass needs are made once: on a GPU, a small
    model's layer takes as long as its calls, not its arithmetic.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        bases: list[Any] = [getattr(module, "base_layer", module) for module in modules]
        pairs = [None if base is module else adapter_of(module) for module, base in zip(modules, bases, strict=True)]
        self.n_inputs, self.n_outputs = bases[0].in_features, sum(base.out_features for base in bases)
        self.n_ranks = sum(pair[0].shape[0] for pair in pairs if pair)
        joint = bases[0].weight.new_zeros(self.n_outputs + self.n_ranks, self.n_inputs + self.n_ranks)
        self._weight, self._a = joint[: self.n_outputs], joint[self.n_outputs :, : self.n_inputs]  # [O, I + R], [R, I]
        self._b, self._back = self._weight[:, self.n_inputs :], joint[:, : self.n_inputs]  # [O, R], [O + R, I]
        self._weight_t = self._weight.T
        self._bias = _joint_bias(bases)
        self.adapters: list[_Adapter] = []
        start = rank = 0
        for base, pair in zip(bases, pairs, strict=True):
            outputs = slice(start, start + base.out_features)
            self._weight[outputs, : self.n_inputs] = base.weight.detach()
            base.weight.data = self._weight[outputs, : self.n_inputs]
            start = outputs.stop
            if pair:
                ranks = slice(rank, rank + pair[0].shape[0])
                places = self._a[ranks], self._b[outputs, ranks]
                self.adapters.append(_Adapter(*pair, outputs, ranks, *places))
                rank = ranks.stop

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that learn, in the order of `backward`'s gradients."""
        return [parameter for adapter in self.adapters for parameter in (adapter.a, adapter.b)]

    def buffer(self, like: Tensor) -> Tensor:
        """Return an uninitialised `[T, I + R]`, whose first I columns the caller fills with the input."""
        return _empty(like, self.n_inputs, self.n_ranks)

    def grad_buffer(self, like: Tensor) -> Tensor:
        """Return an uninitialised `[T, O + R]`, whose first O columns the caller fills with the gradient of y."""
        return _empty(like, self.n_outputs, self.n_ranks)

    def forward(self, buffer: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return (y `[T, O]`, x A^T `[T, R]` for `backward`) of a filled `buffer`; residual `[T, O]` is added to y."""
        inner = None
        if self.adapters:
            inner = F.linear(buffer[:, : self.n_inputs], self._a)
            buffer[:, self.n_inputs :] = inner
        if residual is None:
            return F.linear(buffer, self._weight, self._bias), inner
        y = torch.addmm(residual, buffer, self._weight_t)
        return (y if self._bias is None else y.add_(self._bias)), inner

    def backward(
        self, buffer: Tensor, x: Tensor, inner: Tensor | None, with_input: bool = True
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return (the gradient of x `[T, I]`, the adapters' gradients in fp32) of a filled `grad_buffer`."""
        gradients: list[Tensor] = []
        if inner is not None:
            dy, d_inner = buffer[:, : self.n_outputs], buffer[:, self.n_outputs :]
            d_inner.copy_(dy @ self._b)  # [T, R]
            d_a = (d_inner.T @ x).float()  # [R, I]
            d_b = dy.T @ inner  # [O, R]: each adapter's gradient is a block of it
            for adapter in self.adapters:
                gradient = d_b[adapter.outputs, adapter.ranks].float()
                gradients += [d_a[adapter.ranks], gradient if adapter.scale == 1.0 else gradient.mul_(adapter.scale)]
        return (buffer @ self._back if with_input else None), gradients


def _empty(like: Tensor, n: int, n_ranks: int) -> Tensor:
    """Return an uninitialised `[T, n + n_ranks]` whose first n columns may be a factor of a product."""
    buffer = like.new_empty(like.shape[0], n + n_ranks)
    # If n is no multiple of 32, oneDNN's bf16 kernels (AMX) read a few values past the end of each row and multiply
    # them by zero. The memory there must not hold NaN or infinity by chance.
    if n % 32 and like.device.type == "cpu":
        buffer[:, n:] = 0
    return buffer


@torch.no_grad()
def refresh(adapters: Sequence[_Adapter]) -> None:
    """Copy the adapters' present values into their joint matrices."""
    if not adapters:
        return
    scaled = torch._foreach_mul([adapter.b for adapter in adapters], [adapter.scale for adapter in adapters])
    torch._foreach_copy_([adapter.a_place for adapter in adapters], [adapter.a for adapter in adapters])
    torch._foreach_copy_([adapter.b_place for adapter in adapters], scaled)


def adapter_of(module: Any) -> tuple[nn.Parameter, nn.Parameter, float]:
    """Return (A, B, scale) of a peft module's only adapter."""
    (name,) = module.active_adapters
    return module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name])


def is_plain(module: nn.Module) -> bool:
    """Say whether a module is a frozen `nn.Linear` or plain LoRA around one: no dropout, no DoRA, no quantized base."""
    base = getattr(module, "base_layer", module)
    if type(base) is not nn.Linear or base.weight.requires_grad:
        return False
    if base is module:
        return True
    lora: Any = module
    (name, *more) = lora.active_adapters
    is_lora = type(lora).__module__ == "peft.tuners.lora.layer" and type(lora).__name__ == "Linear"
    has_variant = bool(getattr(lora, "lora_variant", {})) or lora.disable_adapters or lora.merged
    is_simple = isinstance(lora.lora_dropout[name], nn.Identity) and lora.lora_B[name].bias is None
    return is_lora and not more and not has_variant and is_simple


def _joint_bias(bases: Sequence[Any]) -> Tensor | None:
    if all(base.bias is None for base in bases):
        return None
    each = [base.weight.new_zeros(base.out_features) if base.bias is None else base.bias.detach() for base in bases]
    return torch.cat(each)
