"""Networks on loan: weights decoded one at a time, and everything as it was afterwards."""

import pytest
import torch

from quantforge.assembling import StoredWeights, changed_weights
from quantforge.format.store import CandidateStore
from quantforge.load.huggingface import from_module
from quantforge.methods.rtn import minmax_grid, round_to_nearest
from quantforge.testing import tiny_llama
from quantforge.types import BitPlan, QuantSpec

SPEC = QuantSpec(3, 32)


@pytest.fixture
def model():
    return from_module(tiny_llama(blocks=1))


@torch.no_grad()
def test_weights_are_decoded_when_asked_for_and_the_network_gets_its_own_back(
    model, tmp_path, monkeypatch
):
    store = CandidateStore(tmp_path)
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    layers = {layer.name: model.module.get_submodule(layer.name) for layer in model.layers}
    for name, layer in layers.items():
        scale, zero = minmax_grid(layer.weight, SPEC)
        store.put(name, {SPEC: round_to_nearest(layer.weight, scale, SPEC, zero)})
    kept = model.layers[0].name
    assignment = {name: None if name == kept else SPEC for name in layers}
    plan = BitPlan(
        assignment=assignment, budget="3bit", stored_bits=3, code_bits=3, predicted_loss=0,
        solver="file",
    )  # fmt: skip
    read = []
    get = CandidateStore.get
    monkeypatch.setattr(
        CandidateStore, "get", lambda self, name, spec: read.append(name) or get(self, name, spec)
    )
    weights = StoredWeights(plan, store)
    assert (len(weights), list(weights), read) == (len(layers), list(layers), [])
    with pytest.raises(RuntimeError, match="stop"), changed_weights(model) as loan:
        for index, (name, weight) in enumerate(weights.items()):
            assert len(read) == index + (name != kept) - (index > 0)
            loan.put({name: weight})
            if name == kept:
                assert torch.equal(layers[name].weight, before[f"{name}.weight"])
            else:
                assert torch.equal(layers[name].weight, get(store, name, SPEC).dequantize())
        raise RuntimeError("stop")
    after = dict(model.module.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
