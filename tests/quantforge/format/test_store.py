"""The scratch store gives back every candidate bit for bit, with and without zero-points."""

import pytest
import torch

from quantforge.errors import InputError
from quantforge.format.store import CandidateStore
from quantforge.testing import random_weight
from quantforge.types import QuantSpec

SPECS = [QuantSpec(b, g, s) for b in (2, 3, 8) for g in (16, -1) for s in (True, False)]


def test_every_candidate_comes_back(tmp_path):
    store = CandidateStore(tmp_path / "candidates")
    weights = {spec: random_weight(7, 48, spec, seed=index) for index, spec in enumerate(SPECS)}
    store.put("a.b", weights)
    for spec, weight in weights.items():
        found = store.get("a.b", spec)
        assert found.spec == spec
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.scale, weight.scale)
        assert (found.zero is None) == spec.symmetric
        assert spec.symmetric or torch.equal(found.zero, weight.zero)
        assert torch.equal(found.dequantize(), weight.dequantize())


def test_what_is_not_there_is_one_line_that_says_what_to_do(tmp_path):
    store = CandidateStore(tmp_path)
    store.put("a", {QuantSpec(2, 16): random_weight(4, 32, QuantSpec(2, 16))})
    for layer, spec in (("a", QuantSpec(2, 16, symmetric=False)), ("b", QuantSpec(2, 16))):
        with pytest.raises(InputError, match="--fresh"):
            store.get(layer, spec)
