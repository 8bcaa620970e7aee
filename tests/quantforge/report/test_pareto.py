"""The frontier's figure and page show the numbers of the report."""

import math
import xml.etree.ElementTree as ElementTree

import pytest

from quantforge.outcomes import FrontierPoint, ParetoReport
from quantforge.report.pareto import pareto_drawing, pareto_figure, pareto_page, predicted
from quantforge.report.pareto_image import pareto_image
from quantforge.results import CurvePoint, Quality
from quantforge.types import BitPlan, QuantSpec


def quality(kl, error=0.01):
    return Quality(
        text="", windows=2, window_length=8, perplexity=20.0 + kl, reference_perplexity=20.0,
        kl=kl, kl_stderr=error, top1=0.9, window_kl=(kl, kl), window_nll=(3.0, 3.0),
    )  # fmt: skip


def point(bits, loss, kl=None):
    plan = BitPlan(
        assignment={"a": QuantSpec(3)}, budget=f"{bits}bit", stored_bits=bits, code_bits=bits,
        predicted_loss=loss, solver="dynamic-program",
    )  # fmt: skip
    return FrontierPoint(
        plan=plan, predicted_error=0.1 * loss, checkpoint_bytes=int(1e6 * bits),
        quality=None if kl is None else quality(kl),
    )  # fmt: skip


@pytest.fixture
def report():
    curve = {"uniform 2b-pc": (2.1, 0.9), "uniform 3b-pc": (3.1, 0.2), "uniform 4b-pc": (4.1, 0.05)}
    return ParetoReport(
        model="a <model>", source="folder & file",
        points=(point(2.0, 0.8, 0.85), point(3.0, 0.15), point(4.0, 0.03, 0.04), point(16.0, 0.0)),
        uniform=tuple(
            CurvePoint(name=n, stored_bits=b, quality=quality(kl)) for n, (b, kl) in curve.items()
        ),
        reference_bytes=16_000_000, calibration="<text>", settings={}, warnings=("mind & this",),
    )  # fmt: skip


def test_marks_are_where_the_numbers_say(report):
    root = ElementTree.fromstring(pareto_figure(report))

    def of(kind):
        return [g for g in root.iter("g") if g.get("class") == kind]

    places = []
    for kind, x, y in (
        ("predicted", "cx", "cy"), ("uniform", "cx", "cy"), ("plan", "data-cx", "data-cy"),
    ):  # fmt: skip
        for mark in of(kind):
            shape = next(e for e in mark if e.tag in ("circle", "polygon"))
            values = float(mark.get("data-bits")), math.log(float(mark.get("data-kl")))
            places.append((*values, float(shape.get(x)), float(shape.get(y))))
    # a loss of 0 has no place on a logarithmic scale
    assert [len(of(kind)) for kind in ("predicted", "uniform", "plan")] == [3, 3, 2]
    (b0, k0, x0, y0), (b1, k1, x1, y1) = places[0], places[2]
    for bits, log_kl, x, y in places:
        assert x == pytest.approx(x0 + (bits - b0) * (x1 - x0) / (b1 - b0), abs=0.02)
        assert y == pytest.approx(y0 + (log_kl - k0) * (y1 - y0) / (k1 - k0), abs=0.02)
    assert x1 > x0
    assert y1 > y0  # smaller losses lie lower
    lines = {p.get("class"): p.get("points").split() for p in root.iter("polyline")}
    assert {name: len(points) for name, points in lines.items()} == {"hull": 3, "frontier": 3}
    assert lines["frontier"][0] == f"{x0:.2f},{y0:.2f}"


def test_the_drawing_stands_alone_and_follows_the_theme(report):
    text = pareto_drawing(report)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    style = root.find("{http://www.w3.org/2000/svg}style").text
    assert "prefers-color-scheme: dark" in style
    assert "svg .frontier" in style
    drawn = {"predicted": 3, "uniform": 3, "plan": 2}
    groups = [g.get("class") for g in root.iter("{http://www.w3.org/2000/svg}g")]
    assert {kind: groups.count(kind) for kind in drawn} == drawn


def test_the_page_lists_every_plan_and_escapes_what_it_is_told(report):
    text = pareto_page(report)
    for expected in (
        "a &lt;model&gt;: quality at every size", "folder &amp; file", "&lt;text&gt;",
        "mind &amp; this", "<td class=\"number\">2.000</td>", "2.0\u00a0MB",
        "0.850\u00a0±\u00a00.010", "16.0\u00a0MB in 16 bits",
    ):  # fmt: skip
        assert expected in text
    assert text.count("<tr>") == 1 + len(report.points)
    assert predicted(report.points[0]) == "0.800\u00a0±\u00a00.080"


def test_the_bitmap_holds_the_marks_in_their_colours(report):
    from io import BytesIO

    from matplotlib.image import imread

    image = imread(BytesIO(pareto_image(report)))[..., :3]
    assert image.shape == (615, 1230, 3)

    def share(colour):
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4))
        return float((abs(image - (red, green, blue)).max(axis=-1) < 0.02).mean())

    assert share("b9480e") > 5e-4  # the plans
    assert share("55606e") > 5e-4  # uniform networks
    assert share("ffffff") > 0.8
    assert pareto_image(report) == pareto_image(report)


def test_nothing_to_draw_is_no_error():
    empty = ParetoReport(
        model="m", source="s", points=(point(16.0, 0.0),), uniform=(), reference_bytes=1,
        calibration="", settings={},
    )  # fmt: skip
    assert pareto_figure(empty) == ""
    ElementTree.fromstring(pareto_drawing(empty))
    assert "16.000" in pareto_page(empty)
    assert pareto_image(empty).startswith(b"\x89PNG")
