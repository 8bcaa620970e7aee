"""The optimizers of a training run, their groups of parameters, and Sophia's curvature.

Every layer's weight is a group of its own, because its rate is in steps of its own grid; scales
and norms are one each. Rates follow one schedule (`schedules.LearningRateSchedule`).

Sophia's curvature comes from Gauss–Newton–Bartlett (labels drawn from the network) or from
Hutchinson's estimate. The latter needs products with the loss's second derivatives, and soft grids
are differentiated once: they are differences of two gradients instead, a little way along random
signs, each parameter by that share of its own size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.methods.head_loss import Sampled
from quantforge.methods.sophia import Sophia, bartlett_estimate, hutchinson_estimate
from quantforge.train.config import TrainingConfig
from quantforge.train.layer import TrainedLinear
from quantforge.train.objective import Objective
from quantforge.train.quantizers import Hardness

Groups = list[dict[str, Any]]

DISTANCE = 0.01  # of Hutchinson's differences, relative to a parameter's own size
PRIME = 1_000_003  # keeps the seeds of steps and sequences apart


def parameter_groups(
    layers: Mapping[str, TrainedLinear], norms: Sequence[nn.Parameter], config: TrainingConfig
) -> Groups:
    """Groups with their rate at its highest, "base"; where that is 0 parameters are fixed instead.

    "size" is what is large for a parameter of the group: Hutchinson's differences are a share of
    it.
    """
    groups: Groups = []
    for layer in layers.values():
        unit = layer.step_size
        scale = unit if config.relative_rate else 1.0
        # The optimizers multiply the decay by the rate, which here is in steps of the grid.
        rate, decay = config.weight_rate * scale, config.weight_decay / scale
        groups.append({"params": [layer.weight], "base": rate, "weight_decay": decay, "size": unit})
    changes = [layer.change for layer in layers.values() if layer.quantizer.learns_scales]
    groups.append({"params": changes, "base": config.scale_rate, "weight_decay": 0.0, "size": 1.0})
    groups.append(
        {"params": list(norms), "base": config.norm_rate, "weight_decay": 0.0, "size": 1.0}
    )
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(group["base"] > 0.0)
    return [group for group in groups if group["base"] > 0.0 and group["params"]]


def _adamw(groups: Groups, config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=config.betas or (0.9, 0.95), fused=True)


def _sophia(groups: Groups, config: TrainingConfig) -> torch.optim.Optimizer:
    return Sophia(groups, betas=config.betas or (0.965, 0.99), rho=config.rho)


OPTIMIZERS: Mapping[str, Callable[[Groups, TrainingConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sophia": _sophia,
}


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group `factor` times its highest rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor


def update_curvature(
    optimizer: Sophia,
    objective: Objective,
    sequences: Sequence[int],
    hardness: Mapping[str, Hardness],
    seed: int,
) -> None:
    """Give Sophia a new estimate of the curvature; no gradients are left.

    Args:
        optimizer: of the objective's parameters.
        objective: the loss.
        sequences: to estimate on.
        hardness: layer name → between float and integer.
        seed: of labels or signs; another one for every estimate.
    """
    objective.clear()
    if objective.config.curvature == "bartlett":
        device = objective.model.device

        def drawn(chunk: Sequence[int]) -> Sampled:
            generator = torch.Generator(device)
            return Sampled(generator.manual_seed(seed * PRIME + chunk[0]))

        objective.gradient(sequences, hardness, drawn)
        count = len(sequences) * objective.tokens.shape[1]
        estimates: dict[Tensor, Tensor] = {
            p: bartlett_estimate(g, count) for p, g in objective.gradients()
        }
    else:
        estimates = _hutchinson(optimizer, objective, sequences, hardness, seed)
    optimizer.update_curvature(estimates)
    objective.clear()


def _hutchinson(
    optimizer: Sophia,
    objective: Objective,
    sequences: Sequence[int],
    hardness: Mapping[str, Hardness],
    seed: int,
) -> dict[Tensor, Tensor]:
    """Parameter → u ⊙ (H u), with H u a difference of gradients."""
    generator = torch.Generator().manual_seed(seed)
    steps: dict[nn.Parameter, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            signs = torch.randint(2, parameter.shape, generator=generator).mul_(2).sub_(1)
            steps[parameter] = signs.to(parameter) * (DISTANCE * group["size"])
    start = {parameter: parameter.detach().clone() for parameter in steps}
    ends: list[dict[Tensor, Tensor]] = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for parameter, step in steps.items():
                parameter.copy_(torch.add(start[parameter], step, alpha=sign))
        objective.gradient(sequences, hardness)
        ends.append({p: gradient.clone() for p, gradient in objective.gradients()})
        objective.clear()
    with torch.no_grad():
        for parameter, value in start.items():
            parameter.copy_(value)
    return {
        parameter: hutchinson_estimate(
            step.reciprocal(), (ends[0][parameter] - ends[1][parameter]) / 2
        )
        for parameter, step in steps.items()
    }
