from __future__ import annotations

import math

import pytest

from quantforge.report.numbers import (
    against_uniform,
    percent,
    place,
    significant,
    size,
    with_error,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (0.412345, "0.412"), (12.345, "12.3"), (123456.0, "123,000"), (9.999, "10.00"),
        (0.00123456, "0.00123"), (1.234e-7, "1.23e-07"), (5.4e9, "5.40e+09"),
        (math.inf, "infinite"), (math.nan, "not measured"), (-0.0123, "-0.0123"),
    ],
)  # fmt: skip
def test_significant(value, text):
    assert significant(value) == text


def test_units():
    assert with_error(0.29187, 0.00523) == "0.2919\u00a0±\u00a00.0052"
    assert with_error(0.3, math.inf) == "0.300"
    assert percent(0.12345) == "12.3\u00a0%"
    assert [size(n) for n in (999, 96_512_344, 2 * 10**9)] == [
        "999 bytes", "96.5\u00a0MB", "2.0\u00a0GB",
    ]  # fmt: skip


def test_place():
    assert (place("model.layers.12.mlp.up_proj").block, place("a.b").block) == (12, None)
    assert place("model.layers.12.mlp.experts.3.w1").kind == "mlp.experts.3.w1"
    assert place("layers.0.fc").kind == "fc"
    assert place("lm_head").kind == "lm_head"


def test_comparison_with_uniform(report, build):
    kl = report.curve[-1].quality.kl
    first, second = against_uniform(report)
    assert f"{100 * (1 - kl / 0.735):.1f}\u00a0% lower" in first
    assert f"{100 * (1 - kl / 0.71):.1f}\u00a0% lower" in second
    assert "higher" in against_uniform(build(hull_kl=0.1, cheapest_uniform=None))[0]
    assert against_uniform(build(curve=())) == []
