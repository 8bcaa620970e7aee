"""Tuning is kept where it lowers what is measured, and leaves no trace where it does not."""

import copy
import math

import pytest
import torch

from quantforge.load.huggingface import from_module
from quantforge.quantize.sequential import put_weight
from quantforge.quantize.tune import kept_if_better
from quantforge.testing import random_weight, tiny_llama
from quantforge.types import QuantSpec


@pytest.mark.parametrize("after", [0.5, 1.0, 1.5, math.nan])
def test_tuning_is_undone_unless_it_lowers_what_is_measured(after):
    model = from_module(tiny_llama(blocks=1))
    spec = QuantSpec(3, 32)
    made = [
        {
            layer.name: random_weight(layer.out_features, layer.in_features, spec, seed=seed)
            for layer in model.layers
        }
        for seed in (0, 1)
    ]
    for name, weight in made[0].items():
        put_weight(model, name, weight.dequantize())
    before = copy.deepcopy(model.module.state_dict())
    norm = model.module.get_submodule(model.architecture.final_norm).weight
    seen = []

    def tune():
        with torch.no_grad():
            norm.add_(1 / 3)
        return made[1]

    def measure():
        linear = model.module.get_submodule(model.layers[0].name).weight
        seen.append((linear.detach().clone(), norm.detach().clone()))
        return (1.0, after)[len(seen) - 1]

    kept = kept_if_better(model, made[0], tune, measure)
    first, name = model.layers[0].name, f"{model.layers[0].name}.weight"
    assert torch.equal(seen[0][0], before[name])
    # what is judged is what the checkpoint would hold: tuned codes and norms of 16 bits
    assert torch.equal(seen[1][0], made[1][first].dequantize())
    assert torch.equal(seen[1][1], seen[1][1].bfloat16().float())
    if after < 1.0:
        assert kept is made[1]
        assert torch.equal(norm, seen[1][1])
        return
    assert kept is made[0]
    for key, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, before[key]), key
