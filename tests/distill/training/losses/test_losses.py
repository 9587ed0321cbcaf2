"""Each loss against its formula written out over the whole vocabulary, its gradient against autograd's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deepdistill.distill.training.losses import (
    LOSSES,
    Head,
    Segment,
    Targets,
    projected_kl,
    projected_loss,
    token_scores,
)

N, H, V, K = 23, 16, 101, 5


def _targets(generator: torch.Generator, k: int = K) -> Targets:
    teacher = torch.log_softmax(2 * torch.randn(N, V, generator=generator), -1)
    top_logprobs, top_ids = teacher.topk(k)
    top_ids[0, -1] = -1  # a server gave fewer there
    return Targets(
        ids=torch.randint(V, (N,), generator=generator),
        weights=torch.rand(N, generator=generator),
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        advantages=torch.randn(N, generator=generator),
        old_logprobs=torch.log(torch.rand(N, generator=generator) / 20),
    )


def _buckets(logits: Tensor, targets: Targets, i: int) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's probabilities of target i's buckets, one by one."""
    assert targets.top_ids is not None
    assert targets.top_logprobs is not None
    q = torch.softmax(logits[i], -1)
    at = [int(token) for token in targets.top_ids[i] if token >= 0]
    p = [
        float(value.exp())
        for token, value in zip(targets.top_ids[i], targets.top_logprobs[i], strict=True)
        if token >= 0
    ]
    tail = [j for j in range(V) if j not in at]
    return torch.stack([*(q[j] for j in at), q[tail].sum()]), torch.tensor([*p, 1 - sum(p)])


def _naive_cross_entropy(logits: Tensor, targets: Targets) -> Tensor:
    return F.cross_entropy(logits, targets.ids, reduction="none")


def _naive_forward_kl(logits: Tensor, targets: Targets) -> Tensor:
    pairs = [_buckets(logits, targets, i) for i in range(N)]
    return torch.stack([sum(p * (p.log() - q.log())) for q, p in pairs])


def _naive_reverse_kl(logits: Tensor, targets: Targets) -> Tensor:
    pairs = [_buckets(logits, targets, i) for i in range(N)]
    return torch.stack([sum(q * (q.log() - p.clamp(min=1e-4).log())) for q, p in pairs])


def _naive_policy_gradient(logits: Tensor, targets: Targets) -> Tensor:
    assert targets.advantages is not None
    assert targets.old_logprobs is not None
    ratio = torch.exp(torch.log_softmax(logits, -1)[torch.arange(N), targets.ids] - targets.old_logprobs)
    return -torch.minimum(ratio * targets.advantages, ratio.clamp(0.8, 1.2) * targets.advantages)


def _naive_unlikelihood(logits: Tensor, targets: Targets) -> Tensor:
    return -torch.log(1 - torch.softmax(logits, -1)[torch.arange(N), targets.ids])


NAIVE: dict[str, Callable[[Tensor, Targets], Tensor]] = {
    "cross_entropy": _naive_cross_entropy,
    "forward_kl": _naive_forward_kl,
    "reverse_kl": _naive_reverse_kl,
    "policy_gradient": _naive_policy_gradient,
    "unlikelihood": _naive_unlikelihood,
}


def test_every_loss_has_a_naive_version() -> None:
    assert set(NAIVE) == set(LOSSES)


@pytest.mark.parametrize("name", sorted(NAIVE))
@pytest.mark.parametrize("with_head", ["plain", "bias, scale and cap"])
def test_a_loss_and_its_gradients_equal_the_naive_ones(name: str, with_head: str) -> None:
    generator = torch.Generator().manual_seed(3)
    targets = _targets(generator)
    hidden = torch.randn(N, H, generator=generator, requires_grad=True)
    projection = torch.randn(V, H, generator=generator, requires_grad=True)
    bias = torch.randn(V, generator=generator, requires_grad=True)
    plain = with_head == "plain"
    softcap, scale = (None, 1.0) if plain else (3.0, 0.5)
    leaves = [hidden, projection] if plain else [hidden, projection, bias]
    logits = hidden @ projection.T if plain else (hidden @ projection.T + bias) * scale
    logits = logits if plain else 3.0 * torch.tanh(logits / 3.0)
    expected = (NAIVE[name](logits, targets) * targets.weights).sum()
    wanted = torch.autograd.grad(expected, leaves)
    loss = projected_loss(
        hidden,
        Head(projection, None if plain else bias, softcap, scale),
        targets=targets,
        segments=[Segment(0, N, ((name, 1.0),))],
        losses=LOSSES,
        chunk_bytes=4 * V * 16,  # two chunks
    )
    found = torch.autograd.grad(3 * loss, leaves)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, 3 * theirs, rtol=1e-4, atol=1e-5)


def test_rows_of_several_losses_add_up_each_with_its_share() -> None:
    generator = torch.Generator().manual_seed(5)
    targets = _targets(generator)
    hidden = torch.randn(N, H, generator=generator, requires_grad=True)
    projection = torch.randn(V, H, generator=generator)
    segments = [Segment(0, 9, (("cross_entropy", 0.25), ("forward_kl", 0.75))), Segment(9, N, (("unlikelihood", 2.0),))]
    logits = hidden @ projection.T
    each = {name: naive(logits, targets) * targets.weights for name, naive in NAIVE.items()}
    expected = 0.25 * each["cross_entropy"][:9].sum() + 0.75 * each["forward_kl"][:9].sum()
    expected = expected + 2 * each["unlikelihood"][9:].sum()
    (wanted,) = torch.autograd.grad(expected, hidden)
    loss = projected_loss(hidden, Head(projection), targets=targets, segments=segments, losses=LOSSES)
    (found,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_with_every_token_known_the_bucketed_kls_are_the_full_ones() -> None:
    generator = torch.Generator().manual_seed(7)
    teacher = torch.log_softmax(torch.randn(N, V, generator=generator), -1)
    logits = torch.randn(N, V, generator=generator)
    everything = torch.arange(V).expand(N, V)
    targets = Targets(everything[:, 0], torch.ones(N), top_ids=everything, top_logprobs=teacher)
    student = torch.log_softmax(logits, -1)
    forward = (teacher.exp() * (teacher - student)).sum(-1)
    reverse = (student.exp() * (student - teacher)).sum(-1)
    torch.testing.assert_close(LOSSES["forward_kl"](logits.clone(), targets)[0], forward, rtol=1e-4, atol=1e-5)
    floor_free = teacher.exp().min() > 1e-4
    assert floor_free
    torch.testing.assert_close(LOSSES["reverse_kl"](logits.clone(), targets)[0], reverse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(NAIVE))
def test_no_target_at_all_is_a_loss_of_zero_with_a_gradient_of_zero(name: str) -> None:
    hidden = torch.randn(4, H, requires_grad=True)
    none = Targets(ids=torch.zeros(0, dtype=torch.long), weights=torch.zeros(0))
    loss = projected_loss(
        hidden[:0], Head(torch.randn(V, H)), targets=none, segments=[Segment(0, 0, ((name, 1.0),))], losses=LOSSES
    )
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("name", sorted(NAIVE))
def test_targets_that_count_nothing_cost_nothing(name: str) -> None:
    generator = torch.Generator().manual_seed(9)
    targets = _targets(generator)
    targets.weights.zero_()
    hidden = torch.randn(N, H, requires_grad=True)
    loss = projected_loss(
        hidden, Head(torch.randn(V, H)), targets=targets, segments=[Segment(0, N, ((name, 1.0),))], losses=LOSSES
    )
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_an_advantage_without_the_old_logprobs_is_signed_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(11)
    known = _targets(generator)
    logits = torch.randn(N, V, generator=generator)
    fresh = Targets(known.ids, known.weights, advantages=known.advantages)
    unsampled = Targets(
        known.ids, known.weights, advantages=known.advantages, old_logprobs=torch.full((N,), float("nan"))
    )
    loss, gradient = LOSSES["policy_gradient"](logits.clone(), fresh)
    other, other_gradient = LOSSES["policy_gradient"](logits.clone(), unsampled)
    plain, plain_gradient = LOSSES["cross_entropy"](logits.clone(), known)
    assert known.advantages is not None
    torch.testing.assert_close(loss, plain * known.advantages)
    torch.testing.assert_close(gradient, plain_gradient * known.advantages[:, None])
    torch.testing.assert_close(other, -known.advantages)  # a ratio of one
    torch.testing.assert_close(other_gradient, gradient)


def test_token_scores_are_the_log_softmax_and_its_best() -> None:
    generator = torch.Generator().manual_seed(13)
    hidden, projection = torch.randn(N, H, generator=generator), torch.randn(V, H, generator=generator)
    ids = torch.randint(V, (N,), generator=generator)
    ids[:5] = (hidden @ projection.T).argmax(-1)[:5]
    logprobs, is_best = token_scores(hidden, Head(projection), ids)
    naive = torch.log_softmax(hidden @ projection.T, -1)
    torch.testing.assert_close(logprobs, naive[torch.arange(N), ids])
    assert is_best.tolist() == (naive.argmax(-1) == ids).tolist()
    assert is_best.any()


def test_the_mean_kl_of_states_is_that_of_their_logits() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, H, generator=generator).requires_grad_()
    projection = torch.randn(V, H, generator=generator).requires_grad_()
    teacher = torch.log_softmax(torch.randn(N, V, generator=generator), -1)
    top_logprobs, top_ids = teacher.topk(V)
    found = projected_kl(hidden, projection, top_ids, top_logprobs)
    gradients = torch.autograd.grad(found, (hidden, projection))
    wanted = F.kl_div(F.log_softmax(hidden @ projection.T, -1), teacher, log_target=True, reduction="batchmean")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for mine, plain in zip(gradients, torch.autograd.grad(wanted, (hidden, projection)), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-5)


def test_token_scores_scale_and_cap_as_the_model_does() -> None:
    generator = torch.Generator().manual_seed(4)
    hidden, projection = torch.randn(7, 16, generator=generator), torch.randn(60, 16, generator=generator)
    ids = torch.arange(7)
    logprobs, _ = token_scores(hidden, Head(projection, softcap=3.0, scale=0.125), ids)
    wanted = (3 * torch.tanh(0.125 * hidden @ projection.T / 3)).log_softmax(-1)
    assert torch.allclose(logprobs, wanted[torch.arange(7), ids], atol=1e-5)
