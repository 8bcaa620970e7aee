"""Losses at the head against autograd through the whole vocabulary."""

import pytest
import torch

from quantforge.methods.head_loss import (
    FullTeacher,
    Mixed,
    Sampled,
    TopTeacher,
    distillation_gradient,
    following_tokens,
    head_gradient,
)
from quantforge.models.head import Head

TOKENS, HIDDEN, VOCABULARY = 150, 8, 20  # more than one chunk


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    head = Head(weight=normal(VOCABULARY, HIDDEN), bias=normal(VOCABULARY))
    other = Head(weight=normal(VOCABULARY, HIDDEN), bias=None)
    return normal(TOKENS, HIDDEN).requires_grad_(), normal(TOKENS, HIDDEN), head, other


def log_chances(hidden, head):
    logits = hidden @ head.weight.T
    return (logits if head.bias is None else logits + head.bias).log_softmax(-1)


def divergence(p, q):
    return (p.exp() * (p - q)).sum(-1)


def compare(found, student, loss):
    loss.backward()
    assert float(found[0]) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert torch.allclose(found[1], student.grad, atol=1e-5)


def test_the_divergence_from_a_teacher_with_its_own_head(given):
    student, hidden, head, other = given
    found = head_gradient(student.detach(), head, FullTeacher(hidden=hidden, head=other))
    compare(
        found, student, divergence(log_chances(hidden, other), log_chances(student, head)).sum()
    )
    same = head_gradient(hidden, head, FullTeacher(hidden=hidden, head=head))
    assert float(same[0]) == pytest.approx(0.0, abs=1e-4)
    assert same[1].abs().max() < 1e-5


def test_it_is_what_tuning_takes(given):
    student, hidden, head, other = given
    plain = Head(weight=head.weight)
    found = head_gradient(student.detach(), plain, FullTeacher(hidden=hidden, head=other))[1]
    tuning = distillation_gradient(student.detach(), hidden, plain, other)
    assert torch.allclose(found, tuning, atol=1e-5)


@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
def test_the_likeliest_tokens_and_the_rest(given, k):
    student, hidden, head, other = given
    p, q = log_chances(hidden, other), log_chances(student, head)
    top = p.exp().topk(k)
    found = head_gradient(
        student.detach(), head, TopTeacher(tokens=top.indices, chances=top.values)
    )
    full = divergence(p, q).sum()
    if k == VOCABULARY:
        compare(found, student, full)
        return
    rest = torch.ones_like(p).scatter(1, top.indices, 0.0)
    left_p, left_q = ((one.exp() * rest).sum(-1) for one in (p, q))
    inside = (top.values * (top.values.log() - q.gather(1, top.indices))).sum(-1)
    compare(found, student, (inside + left_p * (left_p / left_q).log()).sum())
    assert float(found[0]) < float(full)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixed_with_the_text(given, share):
    student, hidden, head, other = given
    text = torch.randint(VOCABULARY, (3, 50), generator=torch.Generator().manual_seed(1))
    following = following_tokens(text)
    assert following.view(3, 50)[:, :-1].equal(text[:, 1:])
    assert following.view(3, 50)[:, -1].eq(-1).all()
    teacher = FullTeacher(hidden=hidden, head=other)
    mixed = Mixed(teacher=teacher, following=following, share=share)
    q = log_chances(student, head)
    entropy = -q.gather(1, following.clamp_min(0).unsqueeze(1)).squeeze(1)
    weight = share * (following >= 0)  # the last of a sequence has the teacher alone
    losses = (1 - weight) * divergence(log_chances(hidden, other), q) + weight * entropy
    compare(head_gradient(student.detach(), head, mixed), student, losses.sum())


def test_drawn_labels_have_no_mean_gradient_and_the_variance_of_the_softmax():
    """E (q − e_y) = 0 and E (q − e_y)² = q − q², the diagonal of the softmax's curvature."""
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(40_000, 4)
    sampled = Sampled(torch.Generator().manual_seed(0))
    losses, residual = sampled.residual(slice(0, len(logits)), logits)
    q = logits[0].softmax(-1)
    assert residual.mean(0).abs().max() < 0.01
    assert torch.allclose(residual.square().mean(0), q - q * q, atol=0.01)
    assert float(losses.mean()) == pytest.approx(float(-(q * q.log()).sum()), abs=0.02)
