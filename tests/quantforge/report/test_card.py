from __future__ import annotations

import dataclasses

import yaml

from quantforge.report.card import model_card, stock_obstacle


def front_matter(card):
    _, block, _ = card.split("---\n", 2)
    return yaml.safe_load(block)


def test_front_matter_is_data(report, build):
    assert front_matter(model_card(report)) == {
        "base_model": "SmolLM2-135M-Instruct",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["quantforge", "compressed-tensors", "mixed-precision", "quantized"],
    }
    odd = 'a: "b"\n---\n# c'
    assert front_matter(model_card(build(model=odd)))["base_model"] == odd


def test_table_holds_the_numbers(report):
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in model_card(report).splitlines()
        if line.startswith("|")
    ]
    table = {row[0]: row[1:] for row in rows}
    quality = report.quality
    assert table["perplexity"] == ["12.34", f"{quality.perplexity:.2f}"]
    assert table["KL from float, nats a token"][1] == (
        f"{quality.kl:.4f}\u00a0±\u00a0{quality.kl_stderr:.4f}"
    )
    assert table["stored bits per planned weight"] == ["16", "2.998"]
    assert table["safetensors files"] == ["269.0\u00a0MB", "96.5\u00a0MB"]
    assert {len(row) for row in rows} == {3}


def test_says_how_to_load_and_never_the_wrong_package(report):
    card = model_card(report)
    assert "pip install compressed-tensors" in card
    assert 'AutoModelForCausalLM.from_pretrained(folder, dtype="auto")' in card
    assert 'quantforge.load("path/to/this/folder")' in card
    assert "pip install quantforge" not in card
    assert "pydoc: 112 sequences of 512 tokens" in card
    assert report.output not in card
    assert card == model_card(dataclasses.replace(report, output="elsewhere", timings={}))


def test_does_not_promise_what_stock_transformers_cannot(report):
    assert stock_obstacle(report) is None
    asymmetric = dataclasses.replace(report.layers[1], spec="4b-g64-asym")
    embedding = dataclasses.replace(report.layers[1], name="model.embed_tokens", spec="8b-g64")
    for layer, reason in ((asymmetric, "asymmetric weights"), (embedding, "token embedding")):
        card = model_card(dataclasses.replace(report, layers=(layer, *report.layers)))
        assert reason in card
        assert "AutoModelForCausalLM" not in card
        assert "quantforge.load" in card


def test_text_cannot_break_the_markdown(report):
    card = model_card(dataclasses.replace(report, source="<b>x</b> | [y](z)\n# head"))
    assert "<b>" not in card.replace("\\<", "")
    assert "\n# head" not in card
