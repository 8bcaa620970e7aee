from __future__ import annotations

import math

import pytest

from quantforge.report.numbers import (
    against_uniform,
    lower_hull,
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


def test_lower_hull_against_all_pairs():
    points = [(2.0, 1.8), (2.2, 1.3), (2.5, 1.1), (3.0, -0.3), (3.0, 0.2), (3.5, -0.4), (4.2, -2.0)]
    hull = lower_hull(points)

    def lowest_chord(x):
        """The hull's height by brute force: the lowest chord between any two points."""
        return min(
            a[1] if a[0] == b[0] else a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0])
            for a in points
            for b in points
            if min(a[0], b[0]) <= x <= max(a[0], b[0])
        )

    assert hull == [p for p in sorted(points) if p[1] <= lowest_chord(p[0]) + 1e-12]
    assert hull == [(2.0, 1.8), (2.2, 1.3), (3.0, -0.3), (4.2, -2.0)]


def test_comparison_with_uniform(report, build):
    kl = report.curve[-1].quality.kl
    first, second = against_uniform(report)
    assert f"{100 * (1 - kl / 0.735):.1f}\u00a0% lower" in first
    assert f"{100 * (1 - kl / 0.71):.1f}\u00a0% lower" in second
    assert "higher" in against_uniform(build(hull_kl=0.1, cheapest_uniform=None))[0]
    assert against_uniform(build(curve=())) == []
