"""The page as a browser reads it."""

from __future__ import annotations

import dataclasses
import html.parser

import pytest

from quantforge.report.html import render
from quantforge.results import RefinementRound, TrainingOutcome, TrainingPoint

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Tables by id, text, and a check that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.table = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = dict(attrs)["id"]
            self.tables[self.table] = []
        if tag == "tr":
            self.tables[self.table].append([])
        if tag in ("td", "th"):
            self.tables[self.table][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[self.table][-1][-1] += data


@pytest.fixture(scope="module")
def page(report):
    return Page(render(report))


def test_needs_nothing_but_itself(report):
    text = render(report)
    assert not {tag for tag, _ in Page(text).tags} & {"script", "link", "img", "iframe", "object"}
    for forbidden in ("http:", "https:", "url(", "@import", "@font-face", "src="):
        assert forbidden not in text


def test_same_report_same_bytes(report, build):
    text = render(report)
    assert text == render(build())
    assert text == render(build(timings={"quantize": 99.0}, output="elsewhere"))
    assert text == render(build(settings=dict(reversed(report.settings.items()))))
    assert text != render(build(hull_kl=0.5))


def test_headline_numbers(page, report):
    quality = report.quality
    for text in (
        "SmolLM2-135M-Instruct, quantized to a budget of 3bit",
        f"{quality.kl:.4f}",
        f"±\u00a0{quality.kl_stderr:.4f}, one standard error (6 windows)",
        f"{quality.perplexity:.2f}",
        "float 12.34 (+33.6\u00a0%)",
        "2.998",
        "96.5\u00a0MB",
        "2.79 times smaller than 269.0\u00a0MB",
        f"{100 * quality.top1:.1f}\u00a0%",
    ):
        assert text in page.text, text


def test_layer_table_has_every_layer_in_order(page, report):
    heads, *rows = page.tables["layers"]
    assert heads[:4] == ["layer", "spec", "predicted loss", "weight error"]
    assert [(r[0], r[1]) for r in rows] == [(layer.name, layer.spec) for layer in report.layers]
    for row, layer in zip(rows, report.layers, strict=True):
        values = (
            layer.predicted_loss, layer.weight_error, layer.output_error,
            layer.rtn_output_error, layer.damping,
        )  # fmt: skip
        assert [float(cell) for cell in row[2:7]] == pytest.approx(values, rel=5.1e-3)
    notes = {row[0]: row[7] for row in rows if row[7]}
    assert notes == {
        "model.layers.2.mlp.up_proj": "3 dead inputs",
        "model.layers.4.self_attn.v_proj": "damping raised to 0.1",
    }


def test_types_add_up_to_the_whole(page, report):
    _, *rows = page.tables["by-kind"]
    assert sum(int(row[1]) for row in rows) == 210
    shares = [float(row[5].removesuffix("\u00a0%")) for row in rows]
    assert sum(shares) == pytest.approx(100, abs=0.4)
    v_proj = next(row for row in rows if row[0] == "self_attn.v_proj")
    bits = [int(x.spec[0]) for x in report.layers if x.name.endswith("v_proj")]
    assert float(v_proj[2]) == pytest.approx(sum(bits) / 30, abs=0.005)
    down = next(row for row in rows if row[0] == "mlp.down_proj")
    assert down[3].endswith("to 16")


def test_sizes_settings_versions(page, report):
    sizes = dict(page.tables["sizes"][1:])
    assert sizes["checkpoint"] == "96,512,344 bytes"
    assert sizes["planned weights"] == "106,168,320"
    assert dict(page.tables["settings"][1:]) == {
        "search.bits": "[2, 3, 4]", "search.solver": "dynamic-program", "seed": "0",
    }  # fmt: skip
    assert page.tables["versions"][1:] == sorted([k, v] for k, v in report.versions.items())


def test_warnings_are_on_top(report, build):
    text = render(report)
    assert text.index("needed ten times the damping") < text.index('class="tiles"')
    assert 'class="warnings"' not in render(build(warnings=()))


def test_everything_is_escaped(build):
    evil = '</td><script>alert("x")</script>&amp;\'"><img src=x>'
    layers = build().layers
    broken = dataclasses.replace(layers[0], name=f"model.layers.0.{evil}", note=evil, spec="3b-g64")
    generation = dataclasses.replace(build().generations[0], prompt=evil, quantized=evil)
    report = build(
        model=evil,
        source=evil,
        layers=(broken, *layers[1:]),
        generations=(generation,),
        calibration=evil,
        settings={evil: evil},
        versions={evil: evil},
        warnings=(evil,),
        plan=dataclasses.replace(build().plan, budget=evil, solver=evil),
        quality=dataclasses.replace(build().quality, text=evil),
        curve=tuple(dataclasses.replace(p, name=f"uniform {evil}") for p in build().curve),
        cheapest_uniform=(evil, 1.0),
    )
    page = Page(render(report))
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert page.tables["generations"][1] == [evil, generation.reference, evil]
    assert page.tables["settings"][1] == [evil, evil]
    assert page.tables["layers"][1][0] == f"model.layers.0.{evil}"


def test_a_report_with_little_in_it(build):
    page = Page(render(build(layers=(), curve=(), generations=(), settings={}, hull_kl=None)))
    assert page.tables["layers"][1:] == []
    assert "generations" not in page.tables


def test_destroyed_network_is_shown_as_such(build):
    quality = dataclasses.replace(
        build().quality, perplexity=float("inf"), kl_stderr=float("inf"), kl=11.2
    )
    text = Page(render(build(quality=quality))).text
    assert "infinite" in text
    assert "±\u00a0unknown" in text


def test_a_refined_plan_says_what_was_measured_around_it(report):
    one = RefinementRound(plans=21, layers=4, before=0.25, after=0.24, stderr=0.002)
    plan = dataclasses.replace(report.plan, solver="refined")
    text = Page(render(dataclasses.replace(report, plan=plan, refinement=(one,)))).text
    assert "A search that measured the plans around its own chose a width" in text
    assert "21 plans around the one that was found" in text
    assert "4 layers changed, held-out KL 0.250 to 0.240, a difference of" in text


@pytest.mark.parametrize("kept", [True, False])
def test_training_says_what_it_did(report, kept):
    points = tuple(
        TrainingPoint(step=step, loss=None, kl=kl, soft_kl=kl - 0.01)
        for step, kl in ((0, 0.5), (20, 0.3))
    )
    outcome = TrainingOutcome(tokens=40_960, steps=20, points=points, best=1, kept=kept)
    text = Page(render(dataclasses.replace(report, training=outcome))).text
    assert "Training: 40,960 tokens in 20 steps." in text
    assert ("The best state, after step 20, was taken" in text) == kept
    assert ("The untrained weights were kept" in text) != kept
    assert "held-out KL 0.500 to 0.300" in text
