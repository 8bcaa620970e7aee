"""The hull against brute force, and read where its value is known."""

import math

import pytest

from quantforge.hull import lower_hull, read_hull


def test_against_all_pairs():
    logs = [(2.0, 1.8), (2.2, 1.3), (2.5, 1.1), (3.0, -0.3), (3.0, 0.2), (3.5, -0.4), (4.2, -2.0)]
    hull = [(bits, math.log(kl)) for bits, kl in lower_hull((b, math.exp(v)) for b, v in logs)]

    def lowest_chord(x):
        """The hull's height by brute force: the lowest chord between any two points."""
        return min(
            a[1] if a[0] == b[0] else a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0])
            for a in logs
            for b in logs
            if min(a[0], b[0]) <= x <= max(a[0], b[0])
        )

    expected = [p for p in sorted(logs) if p[1] <= lowest_chord(p[0]) + 1e-12]
    assert expected == [(2.0, 1.8), (2.2, 1.3), (3.0, -0.3), (4.2, -2.0)]
    assert [corner[0] for corner in hull] == [corner[0] for corner in expected]
    assert [corner[1] for corner in hull] == pytest.approx([corner[1] for corner in expected])


def test_points_above_it_drop_out_and_it_is_read_log_linearly():
    points = [(2.0, math.exp(1.0)), (3.0, math.exp(0.5)), (4.0, math.exp(-2.0)), (2.5, 50.0)]
    assert lower_hull(points) == [points[0], points[2]]
    assert read_hull(points, 3.0) == pytest.approx(math.exp(-0.5))
    assert read_hull(points, 1.9) is None
    assert read_hull(points, 4.1) is None


def test_of_points_with_equal_bits_the_lower_one_counts():
    points = [(2.0, math.exp(1.0)), (2.0, math.exp(3.0)), (3.0, math.exp(-1.0))]
    assert read_hull(points, 2.5) == pytest.approx(1.0)
    assert read_hull(points[:2], 2.0) == pytest.approx(math.e)  # a hull of one point
    assert read_hull(points[:2], 2.1) is None


@pytest.mark.parametrize("kl", [0.0, -1e-9, 1e-17, math.inf, math.nan])
def test_what_has_no_logarithm_worth_reading_changes_nothing(kl):
    points = [(2.0, 1.0), (4.0, 0.01)]
    assert lower_hull([*points, (3.0, kl), (8.0, kl)]) == points
    assert read_hull([*points, (8.0, kl)], 3.0) == pytest.approx(0.1)
    assert read_hull([(2.0, kl)], 2.0) is None
