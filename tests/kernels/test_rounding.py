"""Learned rounding's two passes in C++ equal their definition in torch."""

from __future__ import annotations

import pytest
import torch
from quantforge_kernels.rounding import Latents


def made(bits: int, groups: int, width: int, *, shared: bool, seed: int = 0) -> Latents:
    generator = torch.Generator().manual_seed(seed)
    top = (1 << bits) - 1
    latent = torch.rand(7, groups * width, generator=generator) * (top + 3) - 1.5
    latent[0, :4] = torch.tensor([-0.5, top + 0.5, 0.5, 1.5])  # edges of the grid, and ties
    scale = torch.randn(7, groups, generator=generator)
    centre = torch.tensor(2.0**bits / 2)
    if not shared:
        centre = torch.randint(0, top + 1, (7, groups), generator=generator).float()
    return Latents.start(latent, scale, centre, top)


def copied(one: Latents) -> Latents:
    return Latents(
        latent=one.latent.clone(), scale=one.scale.clone(), centre=one.centre, top=one.top,
        latent_mean=one.latent_mean.clone(), scale_mean=one.scale_mean.clone(),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("bits", "groups", "width"), [(2, 3, 32), (3, 1, 37), (4, 5, 16), (8, 5, 1)]
)
def test_native_equals_the_definition(bits, groups, width, shared, dtype):
    one = made(bits, groups, width, shared=shared)
    other = copied(one)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        expected = other.weight(dtype, native_code=False)
        assert torch.equal(one.weight(dtype), expected)
        gradient = torch.randn(expected.shape, generator=generator).to(dtype)
        sizes = {"latent_step": 0.3 / (step + 1), "scale_step": 0.01, "take": 0.25 if step else 1.0}
        one.step(gradient, keep=0.75 if step else 0.0, **sizes)
        other.step(gradient, keep=0.75 if step else 0.0, native_code=False, **sizes)
        # sums over a group have another order: nothing else differs
        assert torch.allclose(one.scale_mean, other.scale_mean, rtol=1e-4, atol=1e-4)
        assert torch.allclose(one.latent_mean, other.latent_mean, rtol=1e-5, atol=1e-6)
        for name in ("latent", "scale"):
            assert torch.allclose(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5)
        one, other = other, copied(other)  # signs of what is nearly zero must not add up
    assert not torch.equal(one.latent, made(bits, groups, width, shared=shared).latent)


def test_the_number_of_threads_changes_no_bit():
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            one = made(3, 4, 33, shared=False)
            for seed in range(3):
                gradient = torch.randn(7, 132, generator=torch.Generator().manual_seed(seed))
                one.step(gradient, latent_step=0.1, scale_step=0.01, keep=0.5, take=0.5)
            results.append((one.weight(torch.bfloat16), one.latent, one.scale))
        finally:
            torch.set_num_threads(before)
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_a_means_first_step_takes_the_gradient_alone_and_zero_stays():
    one = made(3, 2, 8, shared=True)
    one.latent_mean.fill_(9.0)
    before = one.latent.clone()
    gradient = torch.zeros(7, 16)
    gradient[1, 3] = 2.0
    one.step(gradient, latent_step=0.25, scale_step=0.0, keep=0.0, take=1.0)
    moved = (one.latent != before).nonzero().tolist()
    inside = -0.5 < before[1, 3] < 7.5
    assert moved == ([[1, 3]] if inside else [])
    assert inside  # of the drawn latents; else the test shows nothing
    expected = before[1, 3] - 0.25 * one.scale[1, 0].sign()
    assert one.latent[1, 3] == pytest.approx(float(expected))


def test_shapes_that_do_not_fit_are_refused():
    latent, scale = torch.zeros(4, 6), torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"latents \(4, 6\) have no scales \(4, 4\)"):
        Latents.start(latent, scale, torch.tensor(4.0), 7)
    with pytest.raises(ValueError, match=r"centres \(4, 1\) are not one a scale \(4, 3\)"):
        Latents.start(latent, torch.ones(4, 3), torch.ones(4, 1), 7)
