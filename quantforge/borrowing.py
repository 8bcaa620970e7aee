"""A caller's network in memory, lent to a run: worked on in float32, given back in its own dtypes.

Networks are usually loaded in bfloat16 or float16. Every value of either is a float32 value, so a
run sees the same network; what it leaves in it is rounded to the network's own dtype at the end, as
loading the written checkpoint in that dtype does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """While active, half-precision parameters and buffers are float32; gradients are set aside.

    The tensors stay the same objects, so references to them, and ties between them, hold.
    """
    tensors = _tensors(module)
    own = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype in HALF}
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]

    def give_back() -> None:
        for name, dtype in own.items():
            tensors[name].data = tensors[name].data.to(dtype)
        for parameter, gradient in gradients:
            parameter.grad = gradient

    try:
        for parameter, _ in gradients:
            parameter.grad = None
        for name in own:
            tensors[name].data = tensors[name].data.float()
        yield
    finally:
        try:
            give_back()
        finally:
            give_back()  # changes nothing unless an interrupt hit the first


@contextmanager
def restored_on_error(module: nn.Module) -> Iterator[None]:
    """Give the network its mode back after the body, and its weights too if that fails."""
    tensors = _tensors(module)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    training = {name for name, part in module.named_modules() if part.training}
    finished = False
    try:
        yield
        finished = True
    finally:
        if not finished:
            with torch.no_grad():
                for name, tensor in tensors.items():
                    tensor.copy_(before[name])
        for name, part in module.named_modules():
            part.training = name in training


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
