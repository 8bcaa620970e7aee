"""What one step does, by hand: rates, clipping, decay, the loss's gradient, Sophia's curvature."""

import math

import pytest
import torch

from quantforge.journal import Journal
from quantforge.methods.sophia import Sophia
from quantforge.parallel import Share
from quantforge.progress import Monitor
from quantforge.train.config import TrainingConfig
from quantforge.train.loop import objective_of, train
from quantforge.train.optimizers import parameter_groups, update_curvature
from quantforge.train.quantizers import HARD, Hardness
from quantforge.train.schedule import Schedules

LENGTH, BATCH = 32, 4  # of the sequences of `case`, and of a step
STEP = BATCH * LENGTH


def settings(**changes):
    return TrainingConfig(
        **{"tokens": 3 * STEP, "evaluate_every": 3 * STEP, "batch": BATCH, "precision": "float32"}
        | changes
    )


@pytest.mark.parametrize("relative", [True, False])
def test_three_steps_are_adamws_of_clipped_gradients_at_the_schedules_rates(
    case, tmp_path, relative
):
    clip, decay, betas = 0.02, 0.3, (0.8, 0.9)
    config = settings(
        clip=clip, weight_decay=decay, betas=betas, warm_up=0.5, decay=0.5, floor=0.1,
        weight_rate=0.03 if relative else 0.002, relative_rate=relative, scale_rate=0.01,
        norm_rate=0.003,
    )  # fmt: skip
    norms = [norm.detach().clone() for norm in case.norms]
    journal = Journal(tmp_path)
    train(case.task(), config, seed=7, monitor=Monitor(), journal=journal)
    entry = journal.read("training")
    case.restore_norms()

    generator = torch.Generator().manual_seed(7)
    order = torch.randperm(len(case.tokens), generator=generator).tolist()
    half_cosine = 0.5 - 0.5 * math.cos(math.pi / 3)
    rates = [1 / 3, 1.0, 0.1 + 0.9 * half_cosine]  # in the middles of three steps
    with objective_of(case.task(), config, Share()) as objective:
        parameter_groups(objective.layers, objective.norms, config)
        schedules = Schedules(objective.layers, config, {})
        base, decays = [], []
        for layer in objective.layers.values():
            unit = layer.step_size if relative else 1.0
            base += [config.weight_rate * unit, 0.01]
            decays += [decay / unit, 0.0]
        base += [0.003] * len(norms)
        decays += [0.0] * len(norms)
        means = [torch.zeros_like(p) for p in objective.parameters]
        squares = [torch.zeros_like(p) for p in objective.parameters]
        for step, rate in enumerate(rates):
            chosen = [order.pop() for _ in range(BATCH)]
            objective.gradient(chosen, schedules.hardness((step + 0.5) / 3))
            gradients = [g.clone() for _, g in objective.gradients()]
            objective.clear()
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
            assert norm > 1.5 * clip
            with torch.no_grad():
                for index, parameter in enumerate(objective.parameters):
                    gradient = gradients[index] * (clip / norm)
                    means[index].mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
                    squares[index].mul_(betas[1]).add_(gradient.square(), alpha=1 - betas[1])
                    mean = means[index] / (1 - betas[0] ** (step + 1))
                    square = squares[index] / (1 - betas[1] ** (step + 1))
                    parameter.mul_(1 - rate * base[index] * decays[index])
                    parameter.sub_(rate * base[index] * mean / (square.sqrt() + 1e-8))
        for index, parameter in enumerate(objective.parameters):
            off = (entry.tensors[f"parameter.{index}"] - parameter.detach()).abs()
            # clipping has another epsilon, and AdamW another order of its sums
            assert float(off.max()) < 0.02 * rates[0] * base[index]
            assert float(off.mean()) < 1e-3 * rates[0] * base[index]


@pytest.mark.parametrize("changes", [{"hidden_term": 1.0}, {"cross_entropy": 0.4}])
def test_the_gradient_is_that_of_the_loss(case, changes):
    config = settings(at_once=2, **changes)
    hardness = dict.fromkeys(case.weights, Hardness(temperature=0.5))
    sequences, distance = list(range(6)), 1e-3
    with objective_of(case.task(), config, Share()) as objective:
        parameters = objective.parameters
        objective.gradient(sequences, hardness)
        gradients = [g.clone() for _, g in objective.gradients()]
        size = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        losses = []
        for sign in (1.0, -2.0):  # there, and from there to the other side
            objective.clear()
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.add_(gradient, alpha=sign * distance / size)
            losses.append(objective.gradient(sequences, hardness))
    # scales enter rounded to 16 bits, with the gradient as if they did not
    assert (losses[0] - losses[1]) / (2 * distance) == pytest.approx(size, rel=0.02)


class Quadratic:
    """An objective with second derivatives on a diagonal, as far as curvature looks at it."""

    def __init__(self, config, parameters, diagonals):
        self.config, self.parameters, self.diagonals = config, parameters, diagonals
        self.tokens = torch.zeros(9, 5)
        self.model = type("Model", (), {"device": torch.device("cpu")})()
        self.seeds = []

    def gradient(self, sequences, hardness, targets=None):
        if targets is not None:
            self.seeds.append([targets([one]).generator.initial_seed() for one in sequences])
        for parameter, diagonal in zip(self.parameters, self.diagonals, strict=True):
            parameter.grad = diagonal * parameter.detach()

    def gradients(self):
        return [(p, p.grad) for p in self.parameters]

    def clear(self):
        for parameter in self.parameters:
            parameter.grad = None


def curved(curvature, seeds=(0,)):
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(30, generator=generator) for _ in range(2)]
    parameters = [torch.nn.Parameter(start.clone()) for start in starts]
    diagonals = [torch.randn(30, generator=generator) for _ in range(2)]
    config = settings(optimizer="sophia", curvature=curvature)
    optimizer = Sophia(
        [{"params": [p], "size": size} for p, size in zip(parameters, (0.02, 1.0), strict=True)]
    )
    objective = Quadratic(config, parameters, diagonals)
    for seed in seeds:
        update_curvature(optimizer, objective, [3, 4], {}, seed)
    for parameter, start in zip(parameters, starts, strict=True):
        assert torch.equal(parameter.detach(), start)
        assert parameter.grad is None
    states = [optimizer.state[parameter]["curvature"] for parameter in parameters]
    return states, diagonals, starts, objective


def test_hutchinsons_differences_are_exact_on_a_diagonal_whatever_a_parameters_size():
    states, diagonals, _, _ = curved("hutchinson")
    for state, diagonal in zip(states, diagonals, strict=True):
        assert torch.allclose(state, 0.01 * diagonal, rtol=2e-3, atol=1e-5)


def test_bartletts_estimate_counts_the_tokens_and_draws_anew_every_time():
    states, diagonals, starts, objective = curved("bartlett", seeds=(0, 10))
    for state, diagonal, start in zip(states, diagonals, starts, strict=True):
        expected = 2 * 5 * (diagonal * start).square()  # two sequences of five tokens
        assert torch.allclose(state, (1 - 0.99**2) * expected, rtol=1e-4, atol=1e-7)
    seeds = [one for drawn in objective.seeds for one in drawn]
    assert len(set(seeds)) == 4


def test_every_estimate_of_a_run_has_a_seed_of_its_own(case, monkeypatch):
    seeds = []
    monkeypatch.setattr(
        "quantforge.train.loop.update_curvature", lambda *given: seeds.append(given[-1])
    )
    config = settings(tokens=5 * STEP, optimizer="sophia", curvature_every=2)
    train(case.task(), config, seed=3, monitor=Monitor())
    assert seeds == [3, 5, 7]


def test_norms_are_measured_and_kept_in_16_bits(case):
    train(case.task(), settings(norm_rate=0.003, weight_rate=0.03), seed=0, monitor=Monitor())
    start = [p for p in case.float.module.parameters() if p.ndim == 1]
    assert any(not torch.equal(a, b) for a, b in zip(case.norms, start, strict=True))
    assert all(torch.equal(norm, norm.bfloat16().float()) for norm in case.norms)


def test_soft_weights_of_either_width_are_measured_in_either_width(case):
    """`evaluate.precision` need not be training's: the used weight goes with what enters."""
    for precision, autocast in (("bfloat16", False), ("float32", True)):
        config = settings(precision=precision)
        with objective_of(case.task(), config, Share()) as objective:
            with torch.no_grad():
                objective.prepare(dict.fromkeys(case.weights, HARD))
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    used = case.model.module(case.tokens[:2]).logits
                objective.release()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    stored = case.model.module(case.tokens[:2]).logits
            assert torch.allclose(used, stored, atol=0.05)
