"""Quantized embeddings and heads through real runs: planned, fixed, kept, and read again."""

import json
import re

import pytest
import torch
import yaml

import quantforge
from quantforge.errors import InputError, UsageError
from quantforge.format.checkpoint import open_checkpoint
from quantforge.testing import save_tiny_checkpoint
from quantforge.types import QuantSpec

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(scope="module")
def sources(checkpoint, tmp_path_factory):
    """The tiny network with its head tied, and one whose head is its own."""
    folder = tmp_path_factory.mktemp("source") / "untied"
    return {True: checkpoint, False: save_tiny_checkpoint(folder, tied=False, blocks=2)}


@pytest.fixture(scope="module")
def call(sources, text, small):
    """Calls a function on one of the checkpoints, with the options of small runs."""
    pairs = (option.partition("=") for option in small if "=" in option)
    settings = {key: yaml.safe_load(value) for key, _, value in pairs}
    settings["quantize.tuning.steps"] = 2

    def run(function, tied=True, include=None, changes=(), **options):
        chosen = {**settings, **dict(changes)}
        if include is not None:
            chosen["embeddings.include"] = include
        return function(sources[tied], calibration=text, settings=chosen, **options)

    return run


def bytes_on_disk(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def logits(module, seed=0):
    tokens = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return module(input_ids=tokens).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_budget_in_bytes_below_the_kept_embeddings_is_met(call, tied, tmp_path):
    floor = call(quantforge.plan, tied, "keep", budget="vram:10MB@1").reachable[0]
    kept = call(quantforge.plan, tied, "keep", budget=f"{floor + 0.001:.3f}bit")
    limit = int(0.85 * kept.sizes.checkpoint_bytes)
    budget = f"{limit / 1000}kB"
    planned = call(quantforge.plan, tied, budget=budget)
    report = call(quantforge.quantize, tied, budget=budget, output=tmp_path / "out")
    names = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    assert [name for name in report.plan.assignment if "layers" not in name] == names
    assert any(report.plan.assignment[name] is not None for name in names)
    assert 0.9 * limit < bytes_on_disk(tmp_path / "out") <= limit
    assert report.sizes.checkpoint_bytes == bytes_on_disk(tmp_path / "out")
    if report.plan.assignment == planned.plan.assignment:
        assert planned.sizes == report.sizes
    assert not {s.name: s.loads for s in planned.servers}["SGLang"]
    assert any("quantforge.load reads the checkpoint" in w for w in report.warnings)


@pytest.mark.parametrize("tied", [True, False])
def test_the_network_in_memory_and_the_packed_one_give_the_same_logits(
    call, sources, text, tied, tmp_path
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(sources[tied])
    before = logits(module)
    tokenizer = AutoTokenizer.from_pretrained(sources[tied])
    report = quantforge.quantize(
        module, budget="3.5bit", calibration=text, tokenizer=tokenizer, output=tmp_path / "out",
        settings={
            "calibration.sequences": 24, "calibration.sequence_length": 64,
            "search.group_sizes": [32, -1], "search.bits": [3, 4], "evaluate.curve_windows": 2,
            "search.refine": 0,
            "quantize.tuning.steps": 2, "embeddings.include": "4bit",
        },
    )  # fmt: skip
    loaded = quantforge.load(tmp_path / "out")
    assert torch.allclose(logits(loaded), logits(module), atol=2e-5, rtol=1e-5)
    assert (logits(module) - before).abs().max() > 0.01
    weight = module.model.embed_tokens.weight.detach()
    assert len(weight[0].unique()) <= 16  # 64 columns are one row of 4-bit codes
    assert (module.lm_head.weight.data_ptr() == weight.data_ptr()) == tied
    specs = open_checkpoint(tmp_path / "out").specs()
    wanted = {EMBEDDING: QuantSpec(4)} if tied else dict.fromkeys((EMBEDDING, HEAD), QuantSpec(4))
    assert {name: spec for name, spec in specs.items() if "layers" not in name} == wanted
    assert report.plan.stored_bits <= 3.5  # the fixed matrix is not counted
    assert report.plan.fixed == ((EMBEDDING,) if tied else (EMBEDDING, HEAD))
    assert report.sizes.stored_bits == pytest.approx(report.plan.stored_bits, abs=0.01)


def test_a_fixed_embedding_goes_with_any_plan_and_back_in_with_its_file(call, tmp_path):
    fixed = call(quantforge.plan, include="8b-g32", budget="3bit", output=tmp_path / "plan")
    kept = call(quantforge.plan, budget="3bit")
    assert fixed.plan.assignment == kept.plan.assignment | {EMBEDDING: QuantSpec(8, 32)}
    assert fixed.plan.stored_bits == kept.plan.stored_bits
    saved = 256 * (16 * 64 - 8 * 64 - 2 * 16) // 8
    headers = kept.sizes.checkpoint_bytes - fixed.sizes.checkpoint_bytes - saved
    assert -400 < headers < 0  # two tensors and a shape more
    assert fixed.layers[-1].spec == "8b-g32"
    loss = fixed.layers[-1].predicted_loss
    assert fixed.plan.predicted_loss == pytest.approx(kept.plan.predicted_loss + loss)
    document = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert document["fixed"] == [EMBEDDING]
    back = call(quantforge.plan, plan=tmp_path / "plan" / "plan.json")
    assert back.plan.assignment == fixed.plan.assignment
    assert back.sizes == fixed.sizes
    with pytest.raises(UsageError, match=r"the plan says what model\.embed_tokens gets"):
        call(quantforge.plan, include="4bit", plan=tmp_path / "plan" / "plan.json")
    counted = {name: spec for name, spec in document.items() if name != "fixed"}
    assert call(quantforge.plan, plan=counted).plan.stored_bits > fixed.plan.stored_bits


def test_embeddings_without_a_search(call, tmp_path):
    """One grid for all layers: what is fixed needs no sensitivities; planning needs a search."""
    uniform = {
        "search.solver": "uniform", "search.bits": [4], "search.group_sizes": [32],
    }  # fmt: skip
    with pytest.raises(UsageError, match="give embeddings a spec"):
        call(quantforge.plan, include="plan", changes=uniform)
    planned = call(quantforge.plan, include="6bit", changes=uniform)
    report = call(quantforge.quantize, include="6bit", changes=uniform, output=tmp_path / "out")
    assert planned.sizes == report.sizes
    assert report.sizes.checkpoint_bytes == bytes_on_disk(tmp_path / "out")
    assert report.sizes.stored_bits == 4.5
    row = report.layers[-1]
    assert (row.name, row.spec) == (EMBEDDING, "6b-pc")
    assert 0 < row.output_error < 0.01
    kept = call(quantforge.plan, changes=uniform, budget="1x")  # no search: nothing is planned
    assert EMBEDDING not in kept.plan.assignment


def test_planned_embeddings_count_and_get_what_pays(call):
    """With as much room as anything needs they are wide; the frontier has them too."""
    tight = call(quantforge.plan, include="plan", budget="3.5bit")
    wide = call(quantforge.plan, include="plan", budget="9bit")
    specs = [one.plan.assignment[EMBEDDING] for one in (tight, wide)]
    assert specs[0].bits < (16 if specs[1] is None else specs[1].bits)
    assert (
        tight.sizes.planned_weights - 256 * 64
        == call(quantforge.plan, budget="3bit").sizes.planned_weights
    )
    frontier = call(quantforge.pareto, include="plan", points=5)
    assert all(EMBEDDING in point.plan.assignment for point in frontier.points)
    uniform = call(
        quantforge.plan, include="plan", budget="4.5bit", changes={"search.solver": "uniform"}
    )
    inside = {spec for name, spec in uniform.plan.assignment.items() if name != EMBEDDING}
    assert len(inside) == 1
    assert uniform.plan.stored_bits <= 4.5


def test_what_is_wrong_with_a_spec_is_one_line(call):
    with pytest.raises(UsageError, match=r"embeddings.include: '3 bits' is none of keep, plan"):
        call(quantforge.plan, include="3 bits", budget="3bit")
    with pytest.raises(UsageError, match=r"embeddings\.include"):
        call(quantforge.plan, include="9bit", budget="3bit")
    with pytest.raises(InputError, match=r"embed_tokens: 4b-g48 does not divide rows of 64"):
        call(quantforge.plan, include="4b-g48", budget="3bit")


def test_commands_show_load_measure_and_run_it(run, small, checkpoint, text, tmp_path):
    done = run(
        "quantize", checkpoint, "--budget", "3bit", "--include-embeddings", "8bit",
        "--calibration", text, "-o", "out", *small, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "model.embed_tokens is 8b-pc: quantforge.load reads the checkpoint" in done.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    assert "its token embedding is quantized" in card
    assert "`model.embed_tokens` is 8b-pc: budgets in bits do not count it." in card
    assert re.search(r"embedding, head +model.embed_tokens 8b-pc", done.stdout)
    assert "model.embed_tokens" in (tmp_path / "out" / "report.html").read_text()
    manifest = json.loads((tmp_path / "out" / "quantforge.json").read_text())
    assert manifest["stock_readable"] is False
    shown = quantforge.inspect(tmp_path / "out")
    assert [x.spec for x in shown.layers if x.name == EMBEDDING] == ["8b-pc"]
    assert EMBEDDING not in shown.kept
    measured = quantforge.evaluate(
        tmp_path / "out", reference=checkpoint, text=text, windows=2, window_length=64
    )
    assert 0 < measured.quality.kl < 1
    assert len("".join(quantforge.generate(tmp_path / "out", "The", tokens=3))) == 3


def test_stock_transformers_loads_a_quantized_head_of_its_own(call, tmp_path):
    from transformers import AutoModelForCausalLM

    names = call(quantforge.plan, False, budget="3bit").plan.assignment
    plan = {**dict.fromkeys(names, "3b-g32"), EMBEDDING: "kept", HEAD: "6b-pc"}
    planned = call(quantforge.plan, False, plan=plan)
    report = call(quantforge.quantize, False, plan=plan, output=tmp_path / "out")
    assert planned.sizes == report.sizes
    assert report.sizes.checkpoint_bytes == bytes_on_disk(tmp_path / "out")
    assert not any("quantforge.load" in warning for warning in report.warnings)
    assert json.loads((tmp_path / "out" / "quantforge.json").read_text())["stock_readable"] is True
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours = logits(quantforge.load(tmp_path / "out"))
    torch.testing.assert_close(ours, logits(stock), rtol=0, atol=1e-4)
    assert len(stock.lm_head.weight[0].unique()) <= 64
