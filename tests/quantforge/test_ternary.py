"""Ternary networks through the whole pipeline: trained, written in our format, read, refused."""

import json

import pytest
import torch

import quantforge
from quantforge.errors import InputError, UsageError
from quantforge.export.servers import server_support
from quantforge.recipe import Target, compose, load_recipe
from quantforge.testing import save_tiny_checkpoint
from quantforge.types import QuantSpec

LENGTH = 32
SETTINGS = {
    "calibration.sequences": 24,
    "calibration.sequence_length": LENGTH,
    "evaluate.curve_windows": 3,  # all of the held-out ones
    "evaluate.tokens": 2,
    "search.group_sizes": [32],
    "training.minutes": 0,
    "training.tokens": 8 * 4 * LENGTH,
    "training.batch": 4,
    "training.evaluate_every": 8 * 4 * LENGTH,
    "training.weight_rate": 0.02,
}
BITNET = {
    "search.group_sizes": [0], "quantize.grid": "absmean", "training.quantizer": "absmean"
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("source"), blocks=1, steps=40)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """(Folder, report): the smaller of both ways, with one scale a matrix."""
    folder = tmp_path_factory.mktemp("ternary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTFORGE_CACHE", str(folder / "cache"))
        report = quantforge.quantize(
            "ternary", calibration="pydoc", output=folder / "out",
            settings={"model": str(source), **SETTINGS, **BITNET},
        )  # fmt: skip
    return folder / "out", report


def test_it_is_trained_and_reported_as_stored(made):
    folder, report = made
    points = report.training.points
    assert report.training.kept
    assert points[report.training.best].kl < 0.6 * points[0].kl
    assert report.quality.kl == pytest.approx(points[report.training.best].kl, rel=0.02)
    specs = {layer.spec for layer in report.layers}
    assert specs == {"ternary-pt"}
    assert report.plan.stored_bits == report.sizes.stored_bits
    assert report.sizes.code_bits == pytest.approx(1.6)
    assert any("stock loaders refuse the folder" in text for text in report.warnings)
    files = [file for file in folder.iterdir() if file.suffix == ".safetensors"]
    assert sum(file.stat().st_size for file in files) == report.sizes.checkpoint_bytes
    assert "in quantforge's own format" in (folder / "README.md").read_text()


def test_it_loads_packed_and_computes_what_is_stored(made):
    folder, _ = made
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert block["format"] == "quantforge-levels"
    model = quantforge.load(folder)
    layers = {name: m for name, m in model.named_modules() if name.endswith("_proj")}
    from quantforge.format.checkpoint import read_quantized

    stored = dict(read_quantized(folder))
    assert set(stored) == set(layers)
    for name, weight in stored.items():
        x = torch.randn(3, weight.codes.shape[1], generator=torch.Generator().manual_seed(0))
        assert torch.allclose(layers[name](x), x @ weight.dequantize().T, atol=1e-4)
        values = weight.dequantize().unique()
        assert len(values) <= 3


def test_others_refuse_it(made, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, _ = made
    with pytest.raises(ValueError, match="quantforge-ternary"):
        AutoModelForCausalLM.from_pretrained(folder)
    quantforge.use_in_transformers()
    try:
        with pytest.raises(ValueError, match="quantforge-ternary"):
            AutoModelForCausalLM.from_pretrained(folder)
    finally:
        quantforge.use_in_transformers(enabled=False)
    for server in ("transformers", "vllm", "llama.cpp"):
        problems = quantforge.check(folder, server=server).problems
        assert any("reads no ternary grids" in text for text in problems)
    for layout, suffix in (("gptq", ""), ("gguf", ".gguf")):
        with pytest.raises(InputError, match="no other layout is written of ternary weights"):
            quantforge.convert(folder, output=tmp_path / f"out{suffix}", layout=layout)
    described = quantforge.inspect(folder)
    assert described is not None


def test_programs_are_told_apart_in_a_plan(made):
    _, report = made
    from quantforge.types import LayerInfo

    layer = LayerInfo(
        name="model.layers.0.mlp.up_proj", out_features=64, in_features=64, block=0, stage=0,
        fused_group="a",
    )  # fmt: skip
    for text in ("ternary-pt", "balanced-g32"):
        rows = server_support([layer], {layer.name: QuantSpec.parse(text)})
        assert [row.name for row in rows if row.loads] == ["quantforge.load"]
    assert report.plan.solver == "given"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"search.group_sizes": [0]}, "one scale a matrix (group size 0) needs grid ternary"),
        ({"search.grid": "ternary"}, "needs solver uniform and one of group_sizes"),
        ({"search.grid": "ternary", "search.bits": [3]}, "bits does nothing with grid ternary"),
        ({"quantize.grid": "absmean"}, "absmean is of ternary grids: add search.grid=ternary"),
        (
            {"training.tokens": 9, "training.start": "float", "training.quantizer": "absmean"},
            "add search.grid=ternary and quantize.grid=absmean",
        ),
        ({"training.tokens": 9, "training.quantizer": "absmean"}, "needs start=float"),
        ({"training.tokens": 9, "training.teacher_top_k": 4, "training.hidden_term": 1.0},
         "leave teacher_top_k at 0"),
        ({"embeddings.group_sizes": [0]}, "group_size must be positive or -1"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_one_line(settings, said):
    with pytest.raises(UsageError) as raised:
        compose(Target(name="x", model="y"), settings=settings)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "settings", "said"),
    [
        ("ternary-pc", {}, "is ternary-pc, but search.grid is uniform"),
        ("3b-pc", {"search.grid": "ternary", "search.group_sizes": [-1]}, "search.grid is ternary"),
        ("balanced-pt", {"search.grid": "balanced", "search.group_sizes": [-1]}, "needs search.gr"),
    ],
)
def test_a_plan_of_another_grid_is_refused_before_the_work(source, spec, settings, said):
    layers = {
        f"model.layers.0.{name}_proj": spec
        for name in (
            "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up",
            "mlp.down",
        )
    }  # fmt: skip
    with pytest.raises(InputError) as raised:
        quantforge.plan(
            source, plan=layers, calibration="pydoc",
            settings={"search.solver": "uniform", **settings},
        )  # fmt: skip
    assert said in str(raised.value)


def test_the_recipe_is_whole_and_one_scale_a_matrix_has_no_rows_of_its_own():
    assert load_recipe("ternary").search.settled == QuantSpec.parse("ternary-g64")
    one = {"search.grid": "ternary", "search.solver": "uniform", "search.group_sizes": [0]}
    with pytest.raises(UsageError, match=r"needs quantize\.method=rtn"):
        compose(Target(name="x", model="y"), settings=one)
