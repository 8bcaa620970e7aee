"""Sophia: identity 25, curvature estimates, its clip, and state that survives a reload."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from quantforge.methods.sophia import Sophia, bartlett_estimate, hutchinson_estimate


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(curvature, gradient, **settings):
    """How one step from zero moves a parameter, without weight decay."""
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = Sophia([parameter], **{"lr": 0.01, "weight_decay": 0.0, **settings})
    # taken in whole: the running mean keeps 99 % of its zero
    optimizer.update_curvature({parameter: 100.0 * curvature})
    parameter.grad = gradient.clone()
    optimizer.step()
    return parameter.detach()


def test_identity_25_with_a_large_rho_nothing_moves_where_there_is_curvature():
    gradient, curvature = drawn(50), drawn(50, seed=1).abs() + 0.1
    curvature[0] = 0.0
    move = moved(curvature, gradient, rho=1e12)
    assert float(move[1:].abs().max()) < 1e-12
    assert float(move[0]) == pytest.approx(-0.01 * float(gradient[0].sign()))


def test_identity_25_without_curvature_steps_are_signs_of_the_momentum():
    gradient = drawn(50)
    gradient[3] = 0.0
    move = moved(torch.zeros(50), gradient)
    assert torch.equal(move, -0.01 * gradient.sign())
    negative = moved(-drawn(50, seed=1).abs(), gradient)
    assert torch.equal(negative, -0.01 * gradient.sign())


def test_identity_25_no_coordinate_moves_by_more_than_the_learning_rate():
    parameter = torch.nn.Parameter(drawn(200))
    optimizer = Sophia([parameter], lr=0.02, weight_decay=0.0)
    largest = 0.0
    for seed in range(30):
        before = parameter.detach().clone()
        optimizer.update_curvature({parameter: 10.0 ** drawn(200, seed=seed)})
        parameter.grad = 10.0 * drawn(200, seed=seed + 100)
        optimizer.step()
        largest = max(largest, float((parameter.detach() - before).abs().max()))
    assert largest == pytest.approx(0.02, rel=1e-5)


def test_steps_are_those_of_the_formula():
    parameter = torch.nn.Parameter(drawn(20))
    settings = {"lr": 0.03, "betas": (0.9, 0.8), "rho": 0.5, "weight_decay": 0.2}
    optimizer = Sophia([parameter], **settings)
    theta = parameter.detach().double()
    mean, curvature = torch.zeros(20).double(), torch.zeros(20).double()
    for step in range(12):
        gradient, estimate = drawn(20, seed=step), drawn(20, seed=step + 50)
        if step % 3 == 0:
            optimizer.update_curvature({parameter: estimate})
            curvature = 0.8 * curvature + 0.2 * estimate
        parameter.grad = gradient
        optimizer.step()
        mean = 0.9 * mean + 0.1 * gradient
        ratio = mean.abs() / (0.5 * curvature.clamp_min(0) + 1e-15)
        theta = theta * (1 - 0.03 * 0.2) - 0.03 * mean.sign() * ratio.clamp(max=1)
    assert torch.allclose(parameter.detach().double(), theta, rtol=1e-5, atol=1e-6)


def test_a_quadratic_shrinks_at_one_rate_whatever_its_curvature():
    curvature = torch.logspace(-3, 3, 13)
    parameter = torch.nn.Parameter(torch.ones(13))
    optimizer = Sophia([parameter], lr=0.05, betas=(0.5, 0.0), rho=1.0, weight_decay=0.0)
    probe = torch.ones(13)
    for _ in range(200):
        optimizer.zero_grad()
        (0.5 * curvature * parameter.square()).sum().backward()
        optimizer.update_curvature({parameter: hutchinson_estimate(probe, curvature * probe)})
        optimizer.step()
    end = parameter.detach()
    assert float(end.abs().max()) < 1e-3  # a condition number of a million
    assert torch.allclose(end, end[0].expand(13), rtol=1e-3)
    # gradient descent with the largest stable step has hardly moved the flattest coordinate
    assert (1 - 1e-3 / 1e3) ** 200 > 0.999


def test_bartletts_estimate_is_right_on_the_average_over_drawn_labels():
    logits = drawn(2, 3).double()  # two tokens, three classes; the parameter is a common bias
    chance = torch.softmax(logits, -1)
    expected = torch.zeros(3).double()
    for labels in itertools.product(range(3), repeat=2):
        likelihood = chance[0, labels[0]] * chance[1, labels[1]]
        slope = (chance - torch.eye(3).double()[list(labels)]).mean(0)
        expected += likelihood * bartlett_estimate(slope, 2).double()
    diagonal = (chance - chance.square()).mean(0)
    assert torch.allclose(expected, diagonal, rtol=1e-6)


def test_hutchinsons_estimate_is_exact_on_a_diagonal_and_right_on_the_average():
    matrix = drawn(6, 6)
    matrix = matrix + matrix.T
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)))
    mean = torch.stack([hutchinson_estimate(u, matrix @ u) for u in signs]).mean(0)
    assert torch.allclose(mean, matrix.diagonal(), atol=1e-5)
    diagonal = torch.diag(matrix.diagonal())
    assert torch.allclose(hutchinson_estimate(signs[5], diagonal @ signs[5]), matrix.diagonal())


def test_clip_statistics_count_newton_steps():
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = Sophia([parameter], betas=(0.0, 0.0), rho=0.5)
    assert optimizer.clip_statistics().share == 0.0
    optimizer.update_curvature({parameter: torch.tensor([10.0, 1.0, 0.0, -3.0])})
    parameter.grad = torch.ones(4)
    optimizer.step()
    found = optimizer.clip_statistics()
    assert (found.unclipped, found.total, found.share) == (1, 4, 0.25)


def test_groups_have_their_own_settings_and_others_do_not_move():
    first, second, idle = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = Sophia(
        [{"params": [first], "lr": 0.1}, {"params": [second, idle], "weight_decay": 0.0}], lr=0.01
    )
    for one in (first, second):
        one.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(first.detach(), torch.full((3,), (1 - 0.1 * 0.1) - 0.1))
    assert torch.allclose(second.detach(), torch.full((3,), 0.99))
    assert torch.equal(idle.detach(), torch.ones(3))


def test_state_is_float32_and_a_resumed_run_has_the_same_bits():
    start = drawn(40).bfloat16()

    def stepped(optimizer, parameter, seeds):
        for seed in seeds:
            optimizer.update_curvature({parameter: drawn(40, seed=seed).square()})
            parameter.grad = drawn(40, seed=seed + 50).bfloat16()
            optimizer.step()

    whole = torch.nn.Parameter(start.clone())
    straight = Sophia([whole], lr=0.05)
    stepped(straight, whole, range(8))

    half = torch.nn.Parameter(start.clone())
    before = Sophia([half], lr=0.05)
    stepped(before, half, range(4))
    saved = copy.deepcopy(before.state_dict())
    again = torch.nn.Parameter(half.detach().clone())
    after = Sophia([again], lr=0.05)
    after.load_state_dict(saved)
    assert {one.dtype for one in after.state[again].values()} == {torch.float32}
    stepped(after, again, range(4, 8))
    assert torch.equal(again, whole)
    for name, value in straight.state[whole].items():
        assert torch.equal(after.state[again][name], value)


def test_a_closure_is_run_with_gradients():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = Sophia([parameter], lr=0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == 2.0
    assert parameter.detach().tolist() == pytest.approx([0.9, 0.9])


def test_what_makes_no_sense_is_refused():
    parameter = torch.nn.Parameter(torch.ones(3))
    for wrong in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"rho": -0.1}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match="must"):
            Sophia([parameter], **wrong)
    optimizer = Sophia([parameter])
    for key, estimate in ((torch.ones(3), torch.ones(3)), (parameter, torch.ones(2))):
        with pytest.raises(ValueError, match="no parameter of this optimizer"):
            optimizer.update_curvature({key: estimate})


def test_settings_of_groups_are_checked_like_the_others():
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    for wrong in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"rho": float("nan")}):
        with pytest.raises(ValueError, match="must"):
            Sophia([{"params": [first], **wrong}])
        optimizer = Sophia([first])
        with pytest.raises(ValueError, match="must"):
            optimizer.add_param_group({"params": [second], **wrong})
        assert len(optimizer.param_groups) == 1
        optimizer.add_param_group({"params": [second], "lr": 0.5})
        assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 0.5]


def test_no_estimate_is_taken_where_one_is_wrong():
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = Sophia([first, second])
    optimizer.update_curvature({first: torch.ones(3)})
    before = optimizer.state[first]["curvature"].clone()
    with pytest.raises(ValueError, match="no parameter of this optimizer"):
        optimizer.update_curvature({first: torch.ones(3), second: torch.ones(2)})
    assert torch.equal(optimizer.state[first]["curvature"], before)
    assert second not in optimizer.state
