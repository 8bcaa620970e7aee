"""Layers of a block in several processes while their rounding is learned."""

from itertools import combinations_with_replacement, pairwise

import pytest

from quantforge.quantize.refine import layer_runs

LLAMA = [576 * 576, 192 * 576, 192 * 576, 576 * 576, 1536 * 576, 1536 * 576, 1536 * 576]


def cost(sizes, first, last):
    """Gradients of a run of layers, and the way back through all behind its first."""
    return sum(sizes[first:last]) + sum(sizes[first + 1 :]) if first < last else 0


@pytest.mark.parametrize("sizes", [LLAMA, [5], [1, 1, 1, 1], [9, 1, 1, 1, 20, 3]])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_dearest_process_is_as_cheap_as_can_be(sizes, count):
    runs = layer_runs(sizes, count)
    assert len(runs) == count
    assert runs[0][0] == 0
    assert runs[-1][1] == len(sizes)
    assert all(one[1] == other[0] for one, other in pairwise(runs))
    edges = combinations_with_replacement(range(len(sizes) + 1), count - 1)
    least = min(
        max(cost(sizes, *run) for run in pairwise([0, *inner, len(sizes)])) for inner in edges
    )
    assert max(cost(sizes, *run) for run in runs) == least


def test_two_processes_learn_attention_and_the_rest_of_a_llama_block():
    assert layer_runs(LLAMA, 2) == [(0, 4), (4, 7)]
