"""A finished folder from the command line: measured, listed, checked, written as ONNX."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from quantforge import pipeline
from quantforge.cli.app import application
from quantforge.cli.outcome import run
from quantforge.errors import InputError, UsageError
from quantforge.progress import Monitor
from quantforge.recipe import resolve_target
from quantforge.vision.checkpoint import load_network, load_vision
from quantforge.vision.finished import is_vision_folder
from quantforge.vision.pictures import load_pictures
from quantforge.vision.recipe import compose
from quantforge.vision.sources import open_source

FAST = {"calibration.count": 16, "calibration.held_out": 8, "reconstruction.steps": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small classifier of transformers."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=6
    )
    network = transformers.ResNetForImageClassification(config).train()
    for _ in range(4):
        network(pixel_values=torch.randn(16, 3, 32, 32))
    path = tmp_path_factory.mktemp("model") / "tiny-resnet"
    network.eval().save_pretrained(path)
    said = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32},
            "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2}  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(said), encoding="utf-8")
    return path


def pixels(path, seed, count=32):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 36, 36, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=generator.integers(0, 6, count))
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return pixels(tmp_path_factory.mktemp("pictures") / "test.npz", 1)


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """The classifier in about 4.5 and 8.5 bits."""
    root = tmp_path_factory.mktemp("made")
    seen = pixels(root / "calibration.npz", 0)
    for bits in ("4", "8"):
        pipeline.quantize(
            model, budget=f"{bits}.5bit", calibration=seen, output=root / bits,
            settings={**FAST, "search.bits": [int(bits)], "search.solver": "uniform"},
        )  # fmt: skip
    return root


@pytest.fixture
def command(capfd):
    def call(*arguments):
        code = run(application(), [str(one) for one in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def test_eval_measures_the_packed_network_against_the_one_it_names(
    command, model, folders, pictures
):
    code, out, err = command(
        "eval", folders / "4", "--pictures", pictures, "--against", folders / "8", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    target = resolve_target(model)
    float_network = open_source(compose(target), target, monitor=Monitor()).network
    given = load_pictures(pictures, float_network.preprocessing)
    with torch.no_grad():
        theirs = float_network.graph(given.inputs)
    for key, bits in (("quality", "4"), ("against_quality", "8")):
        quality, ours = found[key], load_vision(folders / bits)(given.inputs)
        kl = nn.functional.kl_div(
            ours.double().log_softmax(-1), theirs.double().log_softmax(-1),
            log_target=True, reduction="none",
        ).sum(-1)  # fmt: skip
        assert quality["kl"] == pytest.approx(float(kl.mean()), rel=1e-5)
        assert quality["kl_stderr"] == pytest.approx(float(kl.std() / 32**0.5), rel=1e-5)
        same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
        assert quality["agreement"] == float(same)
        right = (ours.argmax(-1) == given.labels).double().mean()
        assert quality["accuracy"] == float(right)
        assert quality["count"] == 32
    assert found["quality"]["kl"] > 4 * found["against_quality"]["kl"]
    gap = found["quality"]["kl"] - found["against_quality"]["kl"]
    assert found["difference"]["kl"] == pytest.approx(gap)
    assert found["reference"] == f"Hugging Face folder {model}"
    assert found["weight_bytes"] == (folders / "4" / "model.safetensors").stat().st_size
    assert found["warnings"] == []


def test_eval_says_it_in_a_table_too(command, model, folders, pictures):
    code, out, _ = command(
        "eval", folders / "4", "--pictures", pictures, "--count", "8", "--reference", model
    )
    assert code == 0
    lines = [line.split("  ")[0] for line in out.splitlines()]
    assert lines == [
        "model", "reference", "weights", "measured on", "KL to the float model",
        "same class as float", "accuracy", "warning: only 8 pictures: figures are uncertain",
    ]  # fmt: skip
    assert "8 pictures of" in out


def test_eval_makes_pictures_where_none_are_given_and_doubts_those_it_knows(
    command, model, folders, tmp_path
):
    settings = {"calibration.source": str(folders / "calibration.npz")}
    report = pipeline.evaluate(folders / "4", count=2)
    assert "statistics" in report.quality.pictures
    assert report.quality.accuracy is None
    seen = pipeline.evaluate(folders / "4", pictures=settings["calibration.source"])
    assert any("was calibrated on" in one for one in seen.warnings)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "note": 1}))
    changed = pipeline.evaluate(
        folders / "4", reference=other, count=16, pictures=folders / "calibration.npz"
    )
    assert any("is not the network that" in one for one in changed.warnings)


def test_a_network_in_memory_is_its_own_reference(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()  # fmt: skip
    x = torch.randn(24, 1, 12, 12)
    pipeline.quantize(
        module, budget="10bit", calibration=x, output=tmp_path / "out",
        settings={**FAST, "search.bits": [8]},
    )  # fmt: skip
    np.save(tmp_path / "x.npy", x.numpy())
    with pytest.raises(InputError, match="made from a network in memory; give --reference"):
        pipeline.evaluate(tmp_path / "out", pictures=tmp_path / "x.npy")
    report = pipeline.evaluate(tmp_path / "out", pictures=tmp_path / "x.npy", reference=module)
    assert 0 <= report.quality.kl < 1e-3
    assert report.warnings == ()
    (tmp_path / "out" / "recipe.yaml").unlink()
    with pytest.raises(InputError, match="does not say which model it came from"):
        pipeline.evaluate(tmp_path / "out", pictures=tmp_path / "x.npy")


def test_inspect_lists_every_layer_and_its_bytes_add_up(command, folders):
    code, out, err = command("inspect", folders / "4", "--json")
    assert code == 0, err
    found = json.loads(out)
    network = load_network(folders / "4")
    assert [one["name"] for one in found["layers"]] == [one.name for one in network.network.layers]
    data = sum(one["size_bytes"] for one in found["layers"])
    file = (folders / "4" / "model.safetensors").read_bytes()
    assert data == len(file) - 8 - int.from_bytes(file[:8], "little")  # all but the header
    by_name = {one["name"]: one for one in found["layers"]}
    for info in network.network.layers:
        row, spec = by_name[info.name], network.weights[info.name].spec
        assert (row["bits"], row["group"]) == (4, info.in_features)
        assert row["activation_bits"] == 8
        words = -(-4 * info.in_features // 32)
        assert row["size_bytes"] == info.out_features * (4 * words + 2 + 4)
        stored = spec.stored_bits(info.out_features, info.in_features)
        assert row["stored_bits"] == stored / info.numel
    plan = json.loads((folders / "4" / "plan.json").read_text())
    assert found["stored_bits"] == pytest.approx(plan["stored_bits"])
    assert found["code_bits"] == 4.0
    assert found["budget"] == "4.5bit"
    code, out, _ = command("inspect", folders / "4")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    head = rows.index(["layer", "kind", "bits", "group", "input", "bits", "weights", "stored",
                       "bits", "bytes"])  # fmt: skip
    assert len(rows) - head - 2 == len(found["layers"])
    assert rows[-1] == ["all", f"{sum(i.numel for i in network.network.layers):,}", f"{data:,}"]


def test_check_reads_every_tensor_and_says_what_it_covers(command, folders, tmp_path):
    code, out, _ = command("check", folders / "8")
    assert code == 0
    assert "every tensor's presence, shape, type and hash" in out
    assert "no server's rules" in out
    found = json.loads(command("check", folders / "8", "--json")[1])
    network = load_network(folders / "8")
    assert (found["quantized"], found["kept"]) == (len(network.weights), 0)
    assert found["tensors"] == 3 * len(network.weights)  # codes, scale and bias
    bad = tmp_path / "bad"
    shutil.copytree(folders / "8", bad)
    blob = bytearray((bad / "model.safetensors").read_bytes())
    blob[-1] ^= 1
    (bad / "model.safetensors").write_bytes(blob)
    code, out, err = command("check", bad)
    assert (code, err) == (3, "")
    assert "does not have its hash" in " ".join(out.split())
    (bad / "quantforge.json").unlink()
    code, out, _ = command("check", bad)
    assert code == 3
    assert "quantforge.json" in out


REFUSED = {
    "eval with a text": (("eval", "{}", "--text", "t.txt"), "measured on --pictures: leave --text"),
    "eval of windows": (("eval", "{}", "--windows", "3"), "leave --windows out"),
    "eval of tokens": (("eval", "{}", "--precision", "bfloat16"), "leave --precision out"),
    "a server": (("check", "{}", "--server", "vllm"), "leave --server out"),
    "gguf": (("convert", "{}", "--layout", "gguf", "-o", "x.gguf"), "give --layout onnx"),
    "no .onnx": (("convert", "{}", "-o", "x"), "is no .onnx file"),
    "text": (("generate", "{}", "Hello"), "continues no text"),
    "tasks": (("tasks", "{}", "a.jsonl"), "answers no tasks"),
    "bench": (("bench", "{}"), "bench does not time"),
    "a text model": (("eval", "{}", "--reference", "llama"), "is no convolutional network"),
    "other channels": (("eval", "{}", "--pictures", "nowhere.npz"), "nowhere.npz"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_of_language_models_is_one_line(case, command, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, words = REFUSED[case]
    code, out, err = command(*(one.replace("{}", str(folders / "4")) for one in arguments))
    assert code in (2, 3)
    assert out == ""
    assert words in err
    assert [line.partition(":")[0] for line in err.splitlines() if line[0] != "["] == ["error"]
    assert list(tmp_path.iterdir()) == []


def test_options_of_pictures_are_refused_for_other_folders(tmp_path):
    with pytest.raises(UsageError, match="leave --pictures out"):
        pipeline.evaluate(tmp_path, pictures="x")
    with pytest.raises(UsageError, match="ONNX is written of those alone"):
        pipeline.convert(tmp_path, output="x.onnx", layout="onnx")
    assert not is_vision_folder(tmp_path)


def test_convert_writes_an_onnx_file_as_a_whole_or_not_at_all(
    command, folders, tmp_path, monkeypatch
):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    code, out, err = command("convert", folders / "4", "-o", path)
    assert code == 0, err
    assert f"file    {path}" in out
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    x = torch.randn(4, 3, 32, 32)
    theirs = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    ours = load_vision(folders / "4")(x)
    assert float((ours - theirs).abs().max()) <= float(ours.max() - ours.min()) / 255
    code, _, err = command("convert", folders / "4", "-o", path)
    assert code == 2
    assert "--force" in err
    before = path.read_bytes()
    assert command("convert", folders / "4", "-o", path, "--layout", "onnx", "--force")[0] == 0
    assert path.read_bytes() == before
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    code, _, err = command("convert", folders / "4", "-o", tmp_path / "other.onnx")
    assert code == 5
    assert "install the extra `onnx`" in err
    assert [one.name for one in tmp_path.iterdir()] == ["net.onnx"]
