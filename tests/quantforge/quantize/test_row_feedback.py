"""Layers whose rows answer for each other and that read what quantized layers give them."""

import pytest
import torch

from quantforge.quantize.config import QuantizeConfig
from quantforge.quantize.layer import Outputs, Stage, quantize_layer
from quantforge.quantize.streams import StageMoments
from quantforge.types import QuantSpec

OUT, IN, TOKENS = 96, 64, 1500


def problem(seed):
    """A weight, inputs of the float and the quantized network, and an output gram."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    mix = normal(IN, IN) * torch.logspace(0, -1, IN) / IN**0.5 + 0.3 * torch.eye(IN)
    native = normal(2 * TOKENS, IN) @ mix.T
    noise = native @ (0.5 * normal(IN, IN) / IN**0.5) + normal(2 * TOKENS, IN) * native.std()
    gradients = normal(400, OUT) + 2.0 * normal(400, 3) @ normal(3, OUT)
    weight = normal(OUT, IN) / IN**0.5
    return weight, native, native + 0.3 * noise, gradients.T @ gradients / 400


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(
    ("method", "row_aim", "gains"),
    [
        ("gptaq", "target", True), ("qep", "target", True), ("qronos", "target", True),
        ("qep", "weight", False), ("qronos", "weight", False),
    ],
)  # fmt: skip
def test_feedback_between_rows_gains_on_fresh_tokens_beside_every_answer_to_mismatch(
    method, row_aim, gains, refit
):
    """Weighted output error of one layer against the same method on rows alone, mean over seeds.

    Counted from the weight, errors hold the answer to the mismatch too: then qep and qronos lose.
    """
    config, ratios = QuantizeConfig(method=method, refit=refit, row_aim=row_aim), []
    for seed in range(3):
        weight, native, quantized, gram = problem(seed)
        before, behind = native[:TOKENS], quantized[:TOKENS]
        moments = StageMoments(
            gram=behind.T @ behind / TOKENS, cross=(before - behind).T @ behind / TOKENS
        )
        errors = []
        for outputs in (Outputs(), Outputs.of([gram], 1.0)):
            made = quantize_layer(weight, Stage(moments, None), QuantSpec(3, 32), config, outputs)
            decoded = made.quantized.dequantize()
            missed = quantized[TOKENS:] @ decoded.T - native[TOKENS:] @ weight.T
            errors.append(float(((missed @ gram) * missed).sum()))
        ratios.append(errors[1] / errors[0])
    mean = sum(ratios) / 3
    assert mean < 0.98 if gains else mean > 1.0, ratios
