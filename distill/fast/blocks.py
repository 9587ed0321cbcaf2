"""The pieces of a decoder layer with their gradients written out: fewer passes over memory, and little kept for later.

All states are flat, `[T, …]`: rows exist only inside `row_attention`. Each piece keeps its input and recomputes what is
cheap (the normalised input, the activation). Formulas are checked against autograd in tests/distill/test_fast.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..packing import Layout
from .linears import Linears


def normed_linears(x: Tensor, norm: Tensor, eps: float, linears: Linears) -> Tensor:
    """Return linears(rms_norm(x)) `[T, O]` of x `[T, H]`; norm `[H]` is the frozen weight."""
    y: Tensor = _NormedLinears.apply(x, norm, eps, linears, *linears.parameters)  # type: ignore[no-untyped-call]
    return y


def linear_onto(residual: Tensor, x: Tensor, linears: Linears) -> Tensor:
    """Return residual + linears(x) `[T, H]` of x `[T, I]`."""
    y: Tensor = _LinearOnto.apply(residual, x, linears, *linears.parameters)  # type: ignore[no-untyped-call]
    return y


def gated_mlp_onto(x: Tensor, norm: Tensor, eps: float, gate_up: Linears, down: Linears) -> Tensor:
    """Return x + down(silu(gate) * up) `[T, H]`, where gate_up(rms_norm(x)) gives both, gate first."""
    parameters = (*gate_up.parameters, *down.parameters)
    y: Tensor = _GatedMLPOnto.apply(x, norm, eps, gate_up, down, *parameters)  # type: ignore[no-untyped-call]
    return y


def row_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, layout: Layout, n_heads: int, n_kv_heads: int, scale: float
) -> Tensor:
    """Return causal attention within each row, flat `[T, n_heads * d]`; qkv is `[T, (n_heads + 2 n_kv_heads) * d]`.

    cos and sin `[L, d]` turn queries and keys by their place in the row (rotate-half convention).
    """
    heads = (n_heads, n_kv_heads)
    y: Tensor = _RowAttention.apply(qkv, cos, sin, layout, heads, scale)  # type: ignore[no-untyped-call]
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (the normalised x times weight, 1 / rms `[T, 1]` in fp32)."""
    r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    r = r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * r).to(x.dtype).mul_(weight), r


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, r: Tensor) -> Tensor:
    """Return the gradient of x `[T, H]`."""
    g = dy * weight
    along = torch.linalg.vecdot(g.float(), x.float()).unsqueeze(-1)  # [T, 1]
    return torch.addcmul((g * r), x.float(), along.mul_(r**3).div_(-x.shape[-1])).to(x.dtype)


class _NormedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, linears: Linears, *parameters: Tensor) -> Tensor:
        normed, r = rms_norm(x, norm, eps)
        y, inner = linears.forward(normed)
        ctx.save_for_backward(x, norm, r, inner)
        ctx.linears = linears
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        x, norm, r, inner = ctx.saved_tensors
        normed = (x * r).to(x.dtype).mul_(norm)
        dx, gradients = ctx.linears.backward(upstream[0], normed, inner, ctx.needs_input_grad[0])
        dx = dx if dx is None else rms_norm_backward(dx, x, norm, r)
        return (dx, None, None, None, *gradients)


class _LinearOnto(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, linears: Linears, *parameters: Tensor) -> Tensor:
        y, inner = linears.forward(x, residual)
        ctx.save_for_backward(x, inner)
        ctx.linears = linears
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        x, inner = ctx.saved_tensors
        dx, gradients = ctx.linears.backward(upstream[0], x, inner, ctx.needs_input_grad[1])
        return (upstream[0], dx, None, *gradients)


class _GatedMLPOnto(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float, gate_up: Linears, down: Linears, *parameters: Tensor
    ) -> Tensor:
        normed, r = rms_norm(x, norm, eps)
        both, inner = gate_up.forward(normed)  # [T, 2 I]
        gate, up = both.chunk(2, dim=-1)
        y, inner_down = down.forward(F.silu(gate).mul_(up), x)
        ctx.save_for_backward(x, norm, r, both, inner, inner_down)
        ctx.linears = (gate_up, down)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        x, norm, r, both, inner, inner_down = ctx.saved_tensors
        gate_up, down = ctx.linears
        dy = upstream[0]
        gate, up = both.chunk(2, dim=-1)
        silu = F.silu(gate)
        hidden = silu * up  # [T, I]
        d_hidden, down_gradients = down.backward(dy, hidden, inner_down)
        d_both = torch.empty_like(both)
        d_gate, d_up = d_both.chunk(2, dim=-1)
        torch.mul(d_hidden, silu, out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_hidden.mul_(up), gate, grad_input=d_gate)
        normed = (x * r).to(x.dtype).mul_(norm)
        dx, gradients = gate_up.backward(d_both, normed, inner, ctx.needs_input_grad[0])
        if dx is not None:
            dx = rms_norm_backward(dx, x, norm, r).add_(dy)
        return (dx, None, None, None, None, *gradients, *down_gradients)


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, layout: Layout, heads: tuple[int, int], scale: float
    ) -> Tensor:
        n, length = layout.gather.shape
        n_heads, n_kv_heads = heads
        rows = qkv.index_select(0, layout.gather.flatten()).view(n, length, n_heads + 2 * n_kv_heads, -1)
        rotate(rows[:, :, : n_heads + n_kv_heads], cos, sin)
        q, k, v = (part.transpose(1, 2) for part in rows.split([n_heads, n_kv_heads, n_kv_heads], dim=2))
        leaves = [part.detach().requires_grad_(ctx.needs_input_grad[0]) for part in (q, k, v)]
        with torch.enable_grad():
            out = F.scaled_dot_product_attention(
                leaves[0], leaves[1], leaves[2], is_causal=True, scale=scale, enable_gqa=n_heads != n_kv_heads
            )  # [n, heads, L, d]
        ctx.inner, ctx.turn, ctx.layout, ctx.heads = (leaves, out), (cos, sin), layout, heads
        flat = out.detach().transpose(1, 2).reshape(n * length, -1)
        return flat.index_select(0, layout.scatter)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        leaves, out = ctx.inner
        n_heads, n_kv_heads = ctx.heads
        n, _, length, d = out.shape
        d_out = upstream[0].new_zeros(n * length, n_heads * d).index_copy_(0, ctx.layout.scatter, upstream[0])
        d_parts = torch.autograd.grad(out, leaves, d_out.view(n, length, n_heads, d).transpose(1, 2))
        d_rows = torch.cat([part.transpose(1, 2) for part in d_parts], dim=2)  # [n, L, heads, d]
        rotate(d_rows[:, :, : n_heads + n_kv_heads], ctx.turn[0], -ctx.turn[1])
        ctx.inner = None
        return (ctx.layout.sum_back(d_rows.view(n * length, -1)), None, None, None, None, None)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn heads `[n, L, h, d]` in place by the angles of cos and sin `[L, d]`, whose halves are equal."""
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    c, s = cos[:, None, :half], sin[:, None, :half]
    turned = (first * c).addcmul_(second, s, value=-1)
    second.mul_(c).addcmul_(first, s)
    first.copy_(turned)
