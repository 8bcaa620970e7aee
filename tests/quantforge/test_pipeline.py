"""Promises of the Python calls about networks in memory, cancellation and the cache."""

import copy
import json
import threading

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quantforge
from quantforge.errors import CancelledError, InputError, ResourceError, UsageError
from quantforge.testing import markov_tokens, save_tiny_checkpoint, tiny_llama, train

SETTINGS = {
    "search.group_sizes": [32, -1],
    "search.bits": [2, 3],
    "evaluate.curve_windows": 2,
    "search.refine": 0,
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
@pytest.mark.parametrize("awq", [False, True])
def test_a_cancelled_run_gives_a_network_in_memory_its_weights_back(call, stage, dtype, awq):
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
            module, budget="3bit", calibration=batches(), progress=progress, cancel=cancel,
            settings=SETTINGS | {"quantize.awq": awq},
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


def test_what_was_folded_is_what_is_written(tmp_path):
    module, folder = train(tiny_llama(blocks=2)), tmp_path / "out"
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    settings = SETTINGS | {
        "quantize.awq": True, "quantize.magr": 1e-4, "quantize.rounding.steps": 2,
    }  # fmt: skip
    quantforge.quantize(
        module, budget="3bit", calibration=batches(), settings=settings, output=folder
    )
    assert json.loads((folder / "quantforge.json").read_text())["stock_readable"] is True
    norms = [n for n in before if n.endswith("layernorm.weight")]
    ratios = torch.cat([before[n] / module.get_parameter(n).detach() for n in norms])
    assert (ratios - 1.0).abs().max() > 0.05  # more than tuning moves them
    loaded, tokens = quantforge.load(folder), markov_tokens(2, 24, seed=50)
    with torch.no_grad():
        found, expected = (m(input_ids=tokens).logits for m in (loaded, module))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    for name in norms:
        assert torch.equal(loaded.get_parameter(name), module.get_parameter(name))


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


def stock_weights(folder):
    """Every tensor of a checkpoint by name, quantized ones decoded by compressed-tensors alone."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        arguments = QuantizationArgs(**{k: v for k, v in group["weights"].items() if v is not None})
        scheme = QuantizationScheme(targets=["x"], weights=arguments)
        for layer in group["targets"]:
            names = [name for name in tensors if name.startswith(f"{layer}.weight_")]
            state = {name.rpartition(".")[2]: tensors.pop(name) for name in names}
            state["weight_scale"] = state["weight_scale"].float()
            tensors[f"{layer}.weight"] = PackedQuantizationCompressor.decompress(state, scheme)[
                "weight"
            ]
    return {name: tensor.float() for name, tensor in tensors.items()}


def test_asymmetric_layers_are_searched_written_loaded_and_announced(checkpoint, tmp_path):
    """Groups of 32 at 2 bits cost 2.5 stored bits, 2.5625 with zero-points: the budget has room."""
    folder = tmp_path / "out"
    changes = {"search.asymmetric": True, "search.bits": [2], "search.group_sizes": [32]}
    calibration = {
        "calibration.source": "pydoc",
        "calibration.sequences": 16,
        "calibration.sequence_length": 32,
    }
    report = quantforge.quantize(
        checkpoint, budget="2.57bit", settings=SETTINGS | changes | calibration, output=folder
    )
    asymmetric = [n for n, spec in report.plan.assignment.items() if not spec.symmetric]
    assert len(asymmetric) >= len(report.plan.assignment) // 2
    assert report.sizes.stored_bits == pytest.approx(report.plan.stored_bits)
    assert 2.5 < report.plan.stored_bits <= 2.5625
    assert [w for w in report.warnings if f"{len(asymmetric)} layers are asymmetric" in w]
    assert json.loads((folder / "quantforge.json").read_text())["stock_readable"] is False
    groups = [set(), set()]
    for name, spec in report.plan.assignment.items():
        groups[spec.symmetric].add(name.replace("gate_proj", "up_proj"))
    assert not groups[0] & groups[1]  # fused layers share the kind too
    # The packed network against a stock one that holds what compressed-tensors decodes.
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    stock.load_state_dict(stock_weights(folder), strict=False)
    tokens = torch.arange(60).view(2, 30)
    with torch.no_grad():
        found, expected = (m(input_ids=tokens).logits for m in (quantforge.load(folder), stock))
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


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
