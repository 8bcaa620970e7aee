"""A run without a search: no curve, no predicted losses, and nothing that speaks of them."""

import dataclasses

import pytest

from quantforge.report.card import model_card
from quantforge.report.figures import layers_figure
from quantforge.report.html import render
from quantforge.types import QuantSpec


@pytest.fixture
def settled(report, build):
    layers = tuple(
        dataclasses.replace(layer, spec="4b-g64", predicted_loss=None) for layer in report.layers
    )
    plan = dataclasses.replace(
        report.plan, assignment={layer.name: QuantSpec(4, 64) for layer in layers},
        budget="4.25bit", predicted_loss=None, solver="given",
    )  # fmt: skip
    return build(layers=layers, plan=plan, curve=(), hull_kl=None, cheapest_uniform=None)


def test_the_page_says_why_there_is_no_comparison(settled, report):
    page = render(settled).partition("</style>")[2]
    assert "There was nothing to search" in page
    assert "quantized to a budget of 4.25bit" in page
    for word in ("hull", "uniform networks", "<svg", "redicted loss (", "share of loss", "nan<"):
        assert word not in page, word
    heads = page[page.index('id="layers"') :].partition("</tr>")[0]
    assert "predicted loss" not in heads
    assert heads.count("<th>") + heads.count("<th ") == 7
    assert render(report).count("<svg") == 2  # what a searched report has


def test_the_card_names_the_one_grid(settled, report):
    card = model_card(settled)
    assert "\nQuantization of SmolLM2-135M-Instruct" in card
    assert (
        "made with quantforge with 4b-g64 for all layers. `report.html` shows every layer;" in card
    )
    assert "mixed-precision" not in card
    assert "- mixed-precision\n" in model_card(report)
    assert "and the comparison with uniform networks" in model_card(report)


def test_layers_without_an_estimate_can_be_drawn(settled):
    figure = layers_figure(settled.layers)
    assert "4b-g64, predicted loss not estimated<" in figure
