"""Parameters and an optimizer's state as named tensors, for an entry of a journal, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def training_tensors(
    parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Everything that the next step of an optimizer depends on beside the gradients.

    Args:
        parameters: everything that is trained.
        optimizer: of these.
    """
    tensors = {f"parameter.{index}": one.detach() for index, one in enumerate(parameters)}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    return tensors


@torch.no_grad()
def restore_training(
    tensors: Mapping[str, Tensor], parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Put back what `training_tensors` took; other entries of `tensors` are passed over."""
    for index, parameter in enumerate(parameters):
        parameter.copy_(tensors[f"parameter.{index}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            position, _, field = rest.partition(".")
            state.setdefault(int(position), {})[field] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
