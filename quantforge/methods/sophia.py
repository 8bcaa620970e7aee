"""Sophia: steps of a clipped diagonal Newton method (Liu et al., arXiv 2305.14342).

    m ← β₁ m + (1 − β₁) g             every step
    h ← β₂ h + (1 − β₂) ĥ             every k steps, from an estimate ĥ of the Hessian's diagonal
    θ ← θ (1 − lr · decay)
    θ ← θ − lr · clamp( m / (ρ max(h, 0) + 1e-15), −1, 1 )

Where the curvature is small or negative a coordinate moves by lr in the direction of m's sign;
no coordinate moves by more. Estimates come from the caller, who knows the loss:

- Gauss–Newton–Bartlett: labels are drawn from the model's own softmax, ĝ is the gradient of the
  mean loss over B tokens with them, and ĥ = B ĝ² (`bartlett_estimate`);
- Hutchinson: ĥ = u ⊙ (H u) with random signs u (`hutchinson_estimate`).

What differs from the published code: it stores ĝ² and multiplies by B in the step, which is the
same only as long as B never changes; here B is in the estimate. It has one class for each
estimator, of which only Hutchinson's cuts negative curvature at 0; here both do, as in the paper.
Its states have the parameters' dtype; here they are float32, whatever that is. Parameters in
bfloat16 lose steps smaller than their own rounding: keep float32 ones.

The running curvature h is of further use: Σ h (w − Q(w))² / 2 is what quantizing loses by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOOR = 1e-15  # of the divisor, as published


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipStatistics:
    """How many coordinates the last state of the optimizer would move by their Newton step.

    Attributes:
        unclipped: coordinates with |m| below ρ h.
        total: coordinates with a state.
    """

    unclipped: int
    total: int

    @property
    def share(self) -> float:
        """Unclipped of all; between 0.1 and 0.5 is healthy, and ρ too small or large otherwise."""
        return self.unclipped / self.total if self.total else 0.0


class Sophia(torch.optim.Optimizer):
    """The optimizer; its state is `mean` and `curvature`, float32, one each a coordinate."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        *,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
    ) -> None:
        """Take parameters, or groups of them with their own settings.

        Args:
            params: what to optimize.
            lr: learning rate: no coordinate moves by more in a step.
            betas: how much of the past the running means of gradient and curvature keep.
            rho: larger clips less.
            weight_decay: decoupled, relative to `lr`.

        Raises:
            ValueError: a setting is outside its range.
        """
        defaults = {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay}
        _require_settings(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take more parameters.

        Args:
            param_group: "params", and settings of their own.

        Raises:
            ValueError: a setting is outside its range.
        """
        _require_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient.

        Args:
            closure: computes the loss anew, with gradients.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            keep, _ = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._state(parameter)
                state["mean"].lerp_(parameter.grad.float(), 1.0 - keep)
                bound = state["curvature"].clamp_min(0.0).mul_(group["rho"]).add_(FLOOR)
                move = (state["mean"] / bound).clamp_(-1.0, 1.0)
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.add_(move.to(parameter.dtype), alpha=-group["lr"])
        return loss

    @torch.no_grad()
    def update_curvature(self, estimates: Mapping[Tensor, Tensor]) -> None:
        """Take new estimates of the Hessian's diagonal into the running mean.

        Args:
            estimates: parameter → estimate of its shape. Parameters left out keep what they have.

        Raises:
            ValueError: a tensor is no parameter of this optimizer, or shapes differ; then no
                estimate is taken.
        """
        keep = {one: group["betas"][1] for group in self.param_groups for one in group["params"]}
        for parameter, estimate in estimates.items():
            if parameter not in keep or parameter.shape != estimate.shape:
                raise ValueError(
                    f"no parameter of this optimizer has the shape of an estimate for"
                    f" {tuple(parameter.shape)}: {tuple(estimate.shape)}"
                )
        for parameter, estimate in estimates.items():
            running = self._state(parameter)["curvature"]
            # not cut at 0 here: that would lift the mean of noisy estimates
            running.lerp_(estimate.float(), 1.0 - keep[parameter])

    def clip_statistics(self) -> ClipStatistics:
        """How many coordinates are clipped in the present state."""
        unclipped = total = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter)
                if state:
                    bound = state["curvature"] * group["rho"]
                    unclipped += int((state["mean"].abs() < bound).sum())
                    total += parameter.numel()
        return ClipStatistics(unclipped=unclipped, total=total)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state back; float32 as it was, where torch would give it the parameters' dtype.

        Args:
            state_dict: of `state_dict`.
        """
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [one for group in self.param_groups for one in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            if name in state_dict["state"]:
                self.state[parameter] = {
                    key: value.to(parameter.device, torch.float32, copy=True)
                    for key, value in state_dict["state"][name].items()
                }

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Running means of a parameter, zero at first."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            for name in ("mean", "curvature"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        return state


def _require_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of a group that are outside their ranges.

    Raises:
        ValueError: one is.
    """
    lr, betas, rho, decay = (settings[key] for key in ("lr", "betas", "rho", "weight_decay"))
    if not lr >= 0.0:
        raise ValueError(f"lr must not be negative, got {lr}")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers 0..1, 1 excluded, got {betas}")
    if not rho >= 0.0 or not decay >= 0.0:
        raise ValueError(f"rho and weight_decay must not be negative: {rho}, {decay}")


def bartlett_estimate(gradient: Tensor, tokens: int) -> Tensor:
    """B ĝ²: the Gauss–Newton–Bartlett estimate of the Hessian's diagonal.

    Args:
        gradient: of the mean loss over the tokens, with labels drawn from the model's softmax.
        tokens: B.
    """
    return gradient.float().square().mul_(tokens)


def hutchinson_estimate(probe: Tensor, product: Tensor) -> Tensor:
    """Hutchinson's estimate u ⊙ (H u) of the Hessian's diagonal; may be negative.

    Args:
        probe: u, of independent random signs.
        product: H u.
    """
    return probe.float() * product.float()
