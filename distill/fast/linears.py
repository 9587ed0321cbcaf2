"""Linear maps of one input as one product, frozen, with their LoRA adapters.

q, k and v read the same input, and so do gate and up: their weights stand in one matrix `[O, I]`, of which the modules'
own weights become views, so no memory is added. peft's modules stay the owners of the adapters' parameters, in fp32;
here stand copies in the weights' format, the A side by side and the B on a block diagonal, cast anew in every pass (a
fused optimizer's step shows in no version counter).
The backward pass computes no gradient of a frozen weight.
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
    outputs: slice  # of the O
    ranks: slice  # of the R


class Linears:
    """n linear modules of one input, `nn.Linear` or peft's around one; O outputs in all, R ranks in all."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        bases: list[Any] = [getattr(module, "base_layer", module) for module in modules]
        self.weight = torch.cat([base.weight.detach() for base in bases])  # [O, I]
        self.bias = _joint_bias(bases)
        self.adapters: list[_Adapter] = []
        start = n_ranks = 0
        for module, base in zip(modules, bases, strict=True):
            outputs = slice(start, start + base.out_features)
            base.weight.data = self.weight[outputs]
            start = outputs.stop
            if base is not module:
                a, b, scale = adapter_of(module)
                self.adapters.append(_Adapter(a, b, scale, outputs, slice(n_ranks, n_ranks + a.shape[0])))
                n_ranks += a.shape[0]
        self._a = self.weight.new_zeros(n_ranks, self.weight.shape[1])  # [R, I]
        self._b = self.weight.new_zeros(start, n_ranks)  # [O, R]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return what learns, as `backward` orders its gradients."""
        return [parameter for adapter in self.adapters for parameter in (adapter.a, adapter.b)]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return (y `[T, O]`, the adapters' inner states `[T, R]`) of x `[T, I]`; residual `[T, O]` is added."""
        if residual is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            y = torch.addmm(residual, x, self.weight.T)
            y = y if self.bias is None else y.add_(self.bias)
        if not self.adapters:
            return y, None
        self._refresh()
        inner = F.linear(x, self._a)
        return y.addmm_(inner, self._b.T), inner

    def backward(
        self, dy: Tensor, x: Tensor, inner: Tensor | None, with_input: bool = True
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return (the gradient of x `[T, I]`, the adapters' gradients in fp32)."""
        dx = dy @ self.weight if with_input else None
        if inner is None:
            return dx, []
        d_inner = dy @ self._b  # [T, R], scaled
        d_a = d_inner.T @ x  # [R, I]
        gradients = []
        for adapter in self.adapters:
            d_b = dy[:, adapter.outputs].T @ inner[:, adapter.ranks]
            gradients += [d_a[adapter.ranks].float(), d_b.float().mul_(adapter.scale)]
        return (None if dx is None else dx.addmm_(d_inner, self._a)), gradients

    def _refresh(self) -> None:
        for adapter in self.adapters:
            self._a[adapter.ranks].copy_(adapter.a.detach())
            self._b[adapter.outputs, adapter.ranks].copy_(adapter.b.detach() * adapter.scale)


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
