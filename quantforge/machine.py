"""What of the machine decides a result's bits."""

from __future__ import annotations

import platform

import torch


def machine_traits() -> tuple[str, ...]:
    """What beside inputs and seed decides the bytes: threads, instruction set, torch."""
    return (
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        str(torch.get_num_threads()),
        torch.__version__,
    )
