"""Marks are where the numbers say."""

from __future__ import annotations

import dataclasses
import math
import xml.etree.ElementTree as ElementTree

import pytest

from quantforge.hull import lower_hull
from quantforge.report.figures import Axes, curve_figure, layers_figure


def marks(svg, style):
    return [g for g in ElementTree.fromstring(svg).iter("g") if g.get("class") == style]


def affine(values, places):
    """Slope and offset through the first and last pair, after checking all pairs lie on it."""
    slope = (places[-1] - places[0]) / (values[-1] - values[0])
    for value, found in zip(values, places, strict=True):
        assert found == pytest.approx(places[0] + slope * (value - values[0]), abs=0.02)
    return slope


def test_points_lie_at_their_bits_and_log_kl(report):
    svg = curve_figure(report)
    circles = marks(svg, "uniform")
    expected = {p.name: p for p in report.curve if p.name != "plan"}
    assert [c.get("data-name") for c in circles] == list(expected)
    found = []
    for mark in circles:
        point = expected[mark.get("data-name")]
        assert float(mark.get("data-bits")) == point.stored_bits
        assert float(mark.get("data-kl")) == point.quality.kl
        circle = mark.find("circle")
        x, y = float(circle.get("cx")), float(circle.get("cy"))
        found.append((point.stored_bits, math.log(point.quality.kl), x, y))
    for mark, bits, kl in (
        (marks(svg, "plan")[0], 2.998, report.curve[-1].quality.kl),
        (marks(svg, "final")[0], report.sizes.stored_bits, report.quality.kl),
    ):
        polygon = mark.find("polygon")
        found.append(
            (bits, math.log(kl), float(polygon.get("data-cx")), float(polygon.get("data-cy")))
        )
    found.sort()
    assert affine([f[0] for f in found], [f[2] for f in found]) > 0
    assert affine([f[1] for f in found], [f[3] for f in found]) < 0


def test_hull_line_goes_through_the_hull(report):
    root = ElementTree.fromstring(curve_figure(report))
    corners = [p.split(",") for p in root.find("polyline").get("points").split()]
    uniform = [(p.stored_bits, p.quality.kl) for p in report.curve if p.name != "plan"]
    hull = lower_hull(uniform)
    assert len(corners) == len(hull) < len(uniform)
    circles = {
        float(g.get("data-bits")): (g.find("circle").get("cx"), g.find("circle").get("cy"))
        for g in root.iter("g") if g.get("class") == "uniform"
    }  # fmt: skip
    assert [tuple(c) for c in corners] == [circles[bits] for bits, _ in hull]


def test_everything_is_inside_the_figure(report):
    root = ElementTree.fromstring(curve_figure(report))
    width, height = (float(v) for v in root.get("viewBox").split()[2:])
    for element in root.iter():
        for key in ("x", "x1", "x2", "cx"):
            assert 0 <= float(element.get(key, 0)) <= width
        for key in ("y", "y1", "y2", "cy"):
            assert 0 <= float(element.get(key, 0)) <= height


def test_ticks_are_labelled_with_their_value():
    axes = Axes.around([2.03, 5.25], [6.0, 0.02])
    assert axes.bits_ticks() == [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]
    assert axes.kl_ticks() == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5])
    middle = math.sqrt(0.1 * 1.0)
    assert axes.y(middle) == pytest.approx((axes.y(0.1) + axes.y(1.0)) / 2)


@pytest.mark.parametrize("kl", [0.0, -3e-9, 1e-17])
def test_a_kl_that_is_only_rounding_lies_on_the_edge_and_stretches_nothing(report, build, kl):
    def places(svg):
        return {g.get("data-name"): g.find("circle").get("cy") for g in marks(svg, "uniform")}

    lossless = dataclasses.replace(
        report.curve[0], name="uniform 8b-pc", stored_bits=5.0,
        quality=dataclasses.replace(report.quality, kl=kl, kl_stderr=1e-9),
    )  # fmt: skip
    without = curve_figure(report)
    svg = curve_figure(build(curve=(*report.curve, lossless)))
    found = places(svg)
    assert float(found.pop("uniform 8b-pc")) == Axes(bits=(2, 5), kl=(1, 2)).bottom
    assert found == places(without)
    line = ElementTree.fromstring(svg).find("polyline").get("points")
    assert line == ElementTree.fromstring(without).find("polyline").get("points")


@pytest.mark.parametrize("kl", [0.0, -3e-9, 1e-17, math.inf, math.nan])
def test_without_a_measurable_kl_there_is_no_figure(report, build, kl):
    quality = dataclasses.replace(report.quality, kl=kl)
    only = dataclasses.replace(report.curve[0], quality=quality)
    assert curve_figure(build(curve=(only,), quality=quality)) == ""


def test_the_finished_network_may_be_lossless(report, build):
    quality = dataclasses.replace(report.quality, kl=-1e-9, kl_stderr=0.0)
    (mark,) = marks(curve_figure(build(quality=quality)), "final")
    assert float(mark.find("polygon").get("data-cy")) == Axes(bits=(2, 5), kl=(1, 2)).bottom


@pytest.mark.parametrize("kl", [math.inf, math.nan])
def test_a_kl_that_is_not_finite_is_left_out(report, build, kl):
    broken = dataclasses.replace(
        report.curve[0], quality=dataclasses.replace(report.quality, kl=kl)
    )
    assert len(marks(curve_figure(build(curve=(broken, *report.curve[1:]))), "uniform")) == 9


def test_one_cell_a_layer_with_its_bits(report):
    root = ElementTree.fromstring(layers_figure(report.layers))
    cells = [g for g in root.iter("g") if g.get("class") == "cell"]
    assert [c.get("data-layer") for c in cells] == [layer.name for layer in report.layers]
    for cell, layer in zip(cells, report.layers, strict=True):
        bits = "16" if layer.spec == "kept" else layer.spec.split("b")[0]
        assert cell.get("data-bits") == bits == cell.find("text").text
        assert cell.find("rect").get("class") == f"b{bits}"
    columns = {c.get("data-layer").split(".")[2]: c.find("rect").get("x") for c in cells}
    rows = {c.get("data-layer").split(".", 3)[3]: c.find("rect").get("y") for c in cells}
    assert len(set(columns.values())) == 30
    assert len(set(rows.values())) == 7
    for cell in cells:
        _, _, block, kind = cell.get("data-layer").split(".", 3)
        assert (cell.find("rect").get("x"), cell.find("rect").get("y")) == (
            columns[block], rows[kind],
        )  # fmt: skip


def test_bars_are_as_long_as_the_loss(report):
    root = ElementTree.fromstring(layers_figure(report.layers))
    for key, attribute, index in (("data-block", "height", 2), ("data-kind", "width", 3)):
        bars = [r for r in root.iter("rect") if r.get(key)]
        losses = {
            bar.get(key): math.fsum(
                layer.predicted_loss
                for layer in report.layers
                if layer.name.split(".", 3)[index] == bar.get(key)
            )
            for bar in bars
        }
        largest = max(float(bar.get(attribute)) for bar in bars)
        for bar in bars:
            loss = losses[bar.get(key)]
            assert float(bar.get("data-loss")) == pytest.approx(loss, rel=1e-9)
            expected = largest * loss / max(losses.values())
            assert float(bar.get(attribute)) == pytest.approx(expected, abs=0.011)


def test_many_blocks_have_no_room_for_digits():
    from quantforge.results import LayerReport

    layers = [
        LayerReport(
            name=f"blocks.{i}.fc", spec="3b-g64", predicted_loss=1e-4, weight_error=0.1,
            output_error=0.1, rtn_output_error=0.2, damping=0.01, dead_columns=0,
        )
        for i in range(126)
    ]  # fmt: skip
    root = ElementTree.fromstring(layers_figure(layers))
    cells = [g for g in root.iter("g") if g.get("class") == "cell"]
    assert len(cells) == 126
    assert all(cell.find("text") is None for cell in cells)
    assert layers_figure([dataclasses.replace(layers[0], name="head")]) == ""
