"""The pieces of a decoder layer with their gradients written out: fewer passes over memory, and little kept for later.

All states are flat, `[T, …]`: rows exist only inside `row_attention`. Each piece keeps its input and recomputes what is
cheap (the normalised input, the activation). Formulas are checked against autograd in tests/distill/training/fast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..packing import Layout
from .attention import attend, attend_back
from .fused import multiply, on_gpu
from .linears import Linears


def normed_linears(x: Tensor, linears: Linears, *, norm: Tensor, eps: float) -> Tensor:
    """Return linears(rms_norm(x)) `[T, O]` of x `[T, H]`; norm `[H]` is the frozen weight."""
    y: Tensor = _NormedLinears.apply(x, norm, eps, linears, *linears.parameters)  # type: ignore[no-untyped-call]
    return y


def linear_onto(residual: Tensor, x: Tensor, linears: Linears) -> Tensor:
    """Return residual + linears(x) `[T, H]` of x `[T, I]`."""
    y: Tensor = _LinearOnto.apply(residual, x, linears, *linears.parameters)  # type: ignore[no-untyped-call]
    return y


def gated_mlp_onto(x: Tensor, *, norm: Tensor, eps: float, gate_up: Linears, down: Linears) -> Tensor:
    """Return x + down(silu(gate) * up) `[T, H]`, where gate_up(rms_norm(x)) gives both, gate first."""
    parameters = (*gate_up.parameters, *down.parameters)
    y: Tensor = _GatedMLPOnto.apply(x, norm, eps, gate_up, down, *parameters)  # type: ignore[no-untyped-call]
    return y


def row_attention(
    qkv: Tensor, layout: Layout, *, cos_sin: tuple[Tensor, Tensor] | None, heads: tuple[int, int], scale: float
) -> Tensor:
    """Return causal attention within each row, flat `[T, n_heads * d]`; qkv is `[T, (n_heads + 2 n_kv_heads) * d]`.

    cos_sin: `[L, d]` each, which rotate queries and keys by their place in the row (rotate-half convention).
    heads: (n_heads, n_kv_heads).
    """
    kind = qkv.device.type
    if torch.is_autocast_enabled(kind):  # it would cast the products inside, but not their hand-written gradients
        qkv = qkv.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        y: Tensor = _RowAttention.apply(qkv, layout, cos_sin, heads, scale)  # type: ignore[no-untyped-call]
    return y


@on_gpu
def rms_norm(x: Tensor, weight: Tensor, *, eps: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (the normalised x `[T, H]` times weight `[H]`, 1 / rms `[T, 1]` in fp32); the former in `out` if given."""
    # the norm sums the squares in fp32 without a copy of x in fp32
    r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    r = r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return multiply(x.float(), r, torch.empty_like(x) if out is None else out).mul_(weight), r


@on_gpu
def rms_norm_backward(dy: Tensor, x: Tensor, *, weight: Tensor, r: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return the gradient of x `[T, H]`, with the residual's gradient added if given."""
    g, wide = (dy * weight).float(), x.float()  # in fp32 from here: a product of two formats is slow
    # d/dx_i = r g_i - x_i r^3 mean(g x): the second term is the part along x, which the norm takes out
    along = (g * wide).sum(-1, keepdim=True).mul_(r**3).div_(-x.shape[-1])  # [T, 1]
    dx = g.mul_(r).addcmul_(wide, along)
    return (dx if residual is None else dx.add_(residual)).to(x.dtype)


class _NormedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, linears: Linears, *parameters: Tensor) -> Tensor:
        buffer = linears.buffer(x)
        _, r = rms_norm(x, norm, eps=eps, out=buffer[:, : x.shape[1]])
        y, inner = linears.forward(buffer)
        ctx.save_for_backward(x, norm, r, inner)
        ctx.linears = linears
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        x, norm, r, inner = ctx.saved_tensors
        buffer = ctx.linears.grad_buffer(x)
        buffer[:, : upstream[0].shape[1]] = upstream[0]
        dx, gradients = ctx.linears.backward(buffer, _normed(x, norm, r), inner, ctx.needs_input_grad[0])
        dx = dx if dx is None else rms_norm_backward(dx, x, weight=norm, r=r)
        return (dx, None, None, None, *gradients)


class _LinearOnto(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, linears: Linears, *parameters: Tensor) -> Tensor:
        buffer = linears.buffer(x)
        buffer[:, : x.shape[1]] = x
        y, inner = linears.forward(buffer, residual)
        ctx.save_for_backward(x, inner)
        ctx.linears = linears
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        x, inner = ctx.saved_tensors
        buffer = ctx.linears.grad_buffer(x)
        buffer[:, : upstream[0].shape[1]] = upstream[0]
        dx, gradients = ctx.linears.backward(buffer, x, inner, ctx.needs_input_grad[1])
        return (upstream[0], dx, None, *gradients)


class _GatedMLPOnto(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, gate_up: Linears, down: Linears, *parameters: Tensor
    ) -> Tensor:
        buffer = gate_up.buffer(x)
        _, r = rms_norm(x, norm, eps=eps, out=buffer[:, : x.shape[1]])
        both, inner = gate_up.forward(buffer)  # [T, 2 I]
        gate, up = both.chunk(2, dim=-1)
        buffer = down.buffer(x)
        gated(gate, up, buffer[:, : gate.shape[1]])
        y, inner_down = down.forward(buffer, x)
        ctx.save_for_backward(x, norm, r, both, inner, inner_down)
        ctx.linears = (gate_up, down)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        x, norm, r, both, inner, inner_down = ctx.saved_tensors
        gate_up, down = ctx.linears
        dy = upstream[0]
        gate, up = both.chunk(2, dim=-1)
        hidden, silu = gated(gate, up)
        buffer = down.grad_buffer(x)
        buffer[:, : dy.shape[1]] = dy
        d_hidden, down_gradients = down.backward(buffer, hidden, inner_down)
        assert d_hidden is not None
        buffer = gate_up.grad_buffer(x)
        d_gate, d_up = buffer[:, : both.shape[1]].chunk(2, dim=-1)
        gated_backward(d_hidden, gate, up=up, silu=silu, d_gate=d_gate, d_up=d_up)
        dx, gradients = gate_up.backward(buffer, _normed(x, norm, r), inner, ctx.needs_input_grad[0])
        if dx is not None:
            dx = rms_norm_backward(dx, x, weight=norm, r=r, residual=dy)
        return (dx, None, None, None, None, *gradients, *down_gradients)


@on_gpu
def gated(gate: Tensor, up: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (silu(gate) * up `[T, I]`, in `out` if given, and silu(gate))."""
    silu = F.silu(gate)
    return multiply(silu, up, torch.empty_like(silu) if out is None else out), silu


@on_gpu
def gated_backward(d_hidden: Tensor, gate: Tensor, *, up: Tensor, silu: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """Write the gradients of gate and up, all `[T, I]`; d_hidden, that of their product, is overwritten."""
    multiply(d_hidden, silu, d_up)
    torch.ops.aten.silu_backward.grad_input(d_hidden.mul_(up), gate, grad_input=d_gate)


@on_gpu
def _normed(x: Tensor, norm: Tensor, r: Tensor) -> Tensor:
    return multiply(x.float(), r, torch.empty_like(x)).mul_(norm)


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        layout: Layout,
        cos_sin: tuple[Tensor, Tensor] | None,
        heads: tuple[int, int],
        scale: float,
    ) -> Tensor:
        n, length = layout.gather.shape
        n_heads, n_kv_heads = heads
        rows = qkv.index_select(0, layout.gather.flatten()).view(n, length, n_heads + 2 * n_kv_heads, -1)
        if cos_sin:
            rotate(rows[:, :, : n_heads + n_kv_heads], *cos_sin)
        out, kept = attend(rows, n_kv_heads, scale=scale, needs_gradient=ctx.needs_input_grad[0])
        ctx.kept, ctx.cos_sin, ctx.layout, ctx.n_rotated = kept, cos_sin, layout, n_heads + n_kv_heads
        return out.index_select(0, layout.scatter)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        n, length = ctx.layout.gather.shape
        d_out = upstream[0].new_zeros(n * length, upstream[0].shape[1]).index_copy_(0, ctx.layout.scatter, upstream[0])
        d_rows = attend_back(d_out, ctx.kept)  # [n, L, heads, d]
        if ctx.cos_sin:  # a rotation's gradient is the rotation back
            cos, sin = ctx.cos_sin
            rotate(d_rows[:, :, : ctx.n_rotated], cos, -sin)
        ctx.kept = None
        return (ctx.layout.sum_back(d_rows.view(n * length, -1)), None, None, None, None)


@on_gpu
def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate heads `[n, L, h, d]` in place by the angles of cos and sin `[L, d]`, whose halves are equal."""
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    c, s = cos[:, None, :half], sin[:, None, :half]
    rotated = (first * c).addcmul_(second, s, value=-1)  # apart: the second half still needs the first
    second.mul_(c).addcmul_(first, s)
    first.copy_(rotated)
