"""A linear for every matrix: what is quantized is never a part of a larger or a turned tensor.

Some classes of transformers have no linear where a plan has a layer: GPT-2's are stored transposed
(`transposed`), experts are stacked in one tensor (`experts`). Networks get linears there when they
are loaded, and networks in memory for as long as they are worked on. Checkpoints hold the linears,
and `quantforge.load` reads them. Stock transformers makes none: of such checkpoints 5.24 gives
GPT-2 random weights, and decodes all experts of a network with one spec, the first in the file, so
that mixed widths load as wrong weights without a word (both were tried). So they count as not
readable there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from quantforge.models.experts import experts_split, split_experts
from quantforge.models.transposed import straighten, straightened
from quantforge.scratch import IN_MEMORY, Scratch

# Classes that lack linears, and why stock transformers loads no packed weights there.
WITHOUT_LINEARS = {
    "GPT2LMHeadModel": "its linears are stored transposed (Conv1D)",
    "Qwen3MoeForCausalLM": "its experts are stacked in one tensor",
    "Qwen2MoeForCausalLM": "its experts are stacked in one tensor",
    "MixtralForCausalLM": "its experts are stacked in one tensor",
}


def give_linears(module: nn.Module, *, whole: bool = True, scratch: Scratch = IN_MEMORY) -> None:
    """Put linears where the class of `module` has none, in place.

    Args:
        module: the network; nothing changes where it has them.
        whole: experts run on whole sequences, as calibration needs it (`experts`).
        scratch: where weights go.
    """
    straighten(module, scratch)
    split_experts(module, whole=whole, scratch=scratch)


@contextmanager
def with_linears(module: nn.Module) -> Iterator[None]:
    """`give_linears` inside; after it the class's own modules, with what the linears hold."""
    with straightened(module), experts_split(module):
        yield
