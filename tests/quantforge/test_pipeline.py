"""Promises of the Python calls about networks in memory, cancellation and the cache."""

import copy
import threading

import pytest
import torch
from safetensors.torch import load_file

import quantforge
from quantforge.errors import CancelledError, InputError, ResourceError, UsageError
from quantforge.testing import markov_tokens, save_tiny_checkpoint, tiny_llama, train

SETTINGS = {
    "search.group_sizes": [32, -1],
    "search.bits": [2, 3],
    "evaluate.curve_windows": 2,
    "quantize.tuning.steps": 2,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny")


def batches():
    return [markov_tokens(2, 24, seed=seed) for seed in range(8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("call", "stage"),
    [
        (quantforge.plan, "measure uniform networks"),
        (quantforge.quantize, "quantize"),
        (quantforge.quantize, "tune scales"),
    ],
)
def test_a_cancelled_run_gives_a_network_in_memory_its_weights_back(call, stage, dtype):
    module = tiny_llama(blocks=2).to(dtype)
    norm = module.model.norm.weight
    norm.grad = torch.ones_like(norm)
    module.train(True)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    cancel = threading.Event()
    seen = []

    def progress(event):
        seen.append(event.stage)
        if event.stage == stage:
            cancel.set()

    with pytest.raises(CancelledError):
        call(
            module, budget="3bit", calibration=batches(), settings=SETTINGS, progress=progress,
            cancel=cancel,
        )  # fmt: skip
    assert stage in seen
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    assert torch.equal(norm.grad, torch.ones_like(norm))
    assert module.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_gives_what_its_float32_copy_gives(dtype, tmp_path):
    half = train(tiny_llama(blocks=2), steps=30).to(dtype)
    pointers = {name: id(parameter) for name, parameter in half.named_parameters()}
    copied = copy.deepcopy(half).float()
    reports, tensors = [], []
    for number, module in enumerate((half, copied)):
        folder = tmp_path / str(number)
        reports.append(
            quantforge.quantize(
                module, budget="2.6bit", calibration=batches(), settings=SETTINGS, output=folder
            )
        )
        tensors.append(load_file(folder / "model.safetensors"))
    assert dict(reports[0].plan.assignment) == dict(reports[1].plan.assignment)
    assert len(set(reports[0].plan.assignment.values())) > 1
    assert reports[0].quality == reports[1].quality
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[1][name], tensor) for name, tensor in tensors[0].items())
    expected = copied.state_dict()
    for name, tensor in half.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].to(dtype))
    assert {name: id(parameter) for name, parameter in half.named_parameters()} == pointers
    packed = quantforge.load(tmp_path / "0").get_submodule("model.layers.0.mlp.up_proj")
    own = half.get_submodule("model.layers.0.mlp.up_proj").weight
    with torch.no_grad():
        assert torch.equal(packed(torch.eye(64)).T.to(dtype), own)


def test_a_source_on_disk_gets_the_output_folder_of_the_command_line(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    settings = SETTINGS | {"calibration.sequences": 8, "calibration.sequence_length": 32}
    report = quantforge.quantize(checkpoint, budget="3.0 bit", settings=settings)
    assert report.output == "tiny-3.0-bit"
    assert (tmp_path / "tiny-3.0-bit" / "quantforge.json").is_file()


@pytest.mark.parametrize("file", ["uniform.json", "traces.safetensors", "candidates"])
def test_a_damaged_cache_is_one_line_that_says_what_to_do(cache, file):
    module = tiny_llama(blocks=1)
    budget = {"budget": "3bit", "calibration": batches(), "settings": SETTINGS}
    quantforge.plan(module, **budget)
    (folder,) = (cache / "measurements").iterdir()
    damaged = [folder / file] if (folder / file).is_file() else list((folder / file).iterdir())
    for path in damaged:
        path.write_bytes(b"[")
    with pytest.raises(InputError, match="--fresh"):
        quantforge.quantize(module, **budget)


def test_layers_that_no_group_size_divides_are_kept(tmp_path):
    settings = SETTINGS | {"search.group_sizes": [64]}  # divides rows of 128, and rows of 64 not
    report = quantforge.quantize(
        tiny_llama(blocks=1), budget="14bit", calibration=batches(), settings=settings,
        output=tmp_path / "out",
    )  # fmt: skip
    quantized = {name for name, spec in report.plan.assignment.items() if spec is not None}
    assert quantized == {"model.layers.0.mlp.down_proj"}
    assert 0 < report.quality.kl < 1


def test_device_and_architecture_are_checked(checkpoint):
    with pytest.raises(UsageError, match="unknown device 'nowhere'"):
        quantforge.plan(checkpoint, budget="3bit", device="nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match="cuda"):
            quantforge.plan(checkpoint, budget="3bit", device="cuda")
    with pytest.raises(UsageError, match="unknown architecture 'lama'"):
        quantforge.plan(checkpoint, budget="3bit", settings={"architecture": "lama"})


def test_a_prompt_needs_a_tokenizer(tmp_path):
    folder = tmp_path / "out"
    quantforge.quantize(
        tiny_llama(blocks=1), budget="3bit", calibration=batches(), settings=SETTINGS, output=folder
    )
    with pytest.raises(InputError, match="no tokenizer"):
        next(quantforge.generate(folder, "hello"))


def test_evaluate_needs_no_text_and_no_reference_and_runs_anywhere(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(checkpoint.parent)
    settings = SETTINGS | {"calibration.sequences": 16, "calibration.sequence_length": 32}
    quantforge.quantize("./tiny", budget="3bit", settings=settings, output=tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    report = quantforge.evaluate("out", windows=2, window_length=32)
    assert "last 2 windows" in report.quality.text
    assert report.quality.kl > 0
    with pytest.raises(InputError, match="context"):
        quantforge.evaluate("out", windows=1, window_length=100_000)
    (tmp_path / "out" / "run.json").write_text("{}")
    with pytest.raises(InputError, match="--reference"):
        quantforge.evaluate("out", windows=2, window_length=32)
