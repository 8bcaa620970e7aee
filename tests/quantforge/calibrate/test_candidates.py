"""Candidates: what is predicted for one is computed here from its integers and the inputs."""

import pytest
import torch

from quantforge.calibrate.candidates import measure_layer
from quantforge.calibrate.config import CalibrateConfig
from quantforge.calibrate.sensitivity import factored_losses
from quantforge.format.store import weight_from
from quantforge.numerics import factorize
from quantforge.types import LayerInfo, QuantSpec

SPECS = [QuantSpec(b, g, s) for b in (2, 4) for g in (16, 20, -1) for s in (True, False)]


def test_predictions_are_those_of_the_integers_and_zero_points_pay_for_a_mean():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    weight = 1.5 + torch.randn(8, 48, generator=generator)
    moments = torch.rand(8, generator=generator) + 0.1
    gram = inputs.T @ inputs / 300
    layer = LayerInfo(name="a", out_features=8, in_features=48, block=0, stage=0, fused_group="a")
    found, tensors = measure_layer(layer, weight, gram, factorize(gram), SPECS, CalibrateConfig())
    losses, errors = factored_losses(found.rows, moments).tolist(), found.relative.tolist()
    fitting = [spec for spec in SPECS if spec.group_size != 20]  # 20 does not divide 48
    assert {name.partition(".")[0] for name in tensors} == {str(spec) for spec in fitting}
    for spec, loss, error in zip(SPECS, losses, errors, strict=True):
        if spec not in fitting:
            assert (loss, error) == (torch.inf, torch.inf)
            continue
        quantized = weight_from(tensors.__getitem__, str(spec), spec, 48, "cpu")
        missed = (inputs @ (quantized.dequantize() - weight).T).double().square().mean(0)
        reference = (inputs @ weight.T).double().square().mean(0)
        assert loss == pytest.approx(0.5 * float((moments * missed).sum()), rel=1e-3)
        assert error == pytest.approx(float(missed.sum() / reference.sum()), rel=1e-3)
    by_spec = dict(zip(SPECS, losses, strict=True))
    for bits in (2, 4):
        with_zero, without = (by_spec[QuantSpec(bits, 16, s)] for s in (False, True))
        assert with_zero < 0.7 * without
