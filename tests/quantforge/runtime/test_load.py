"""Loading packed: the logits of stock transformers, the memory of the file, strictness."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quantforge.errors import InputError, ResourceError, UsageError
from quantforge.runtime.linear import QuantEmbedding, QuantLinear
from quantforge.runtime.load import load
from quantforge.testing import tiny_llama, write_quantized
from quantforge.types import QuantizedWeight, QuantSpec

IDS = (torch.arange(48) * 7 % 96).view(2, 24)
# Every width with every kind of grouping somewhere; 200 columns fill no whole number of words.
CYCLE = [
    QuantSpec(2, 64), QuantSpec(3, 32), QuantSpec(4), QuantSpec(5, 64), QuantSpec(6, 32),
    QuantSpec(8, 64), QuantSpec(3), QuantSpec(2, 32), QuantSpec(3, 64), QuantSpec(4, 32),
    QuantSpec(5, 32), QuantSpec(6), QuantSpec(8), QuantSpec(5), QuantSpec(2), QuantSpec(4, 64),
    QuantSpec(5), QuantSpec(6, 64), QuantSpec(8, 32), None, QuantSpec(6),
]  # fmt: skip

STOCK = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
folder, out = sys.argv[1:]
ids = (torch.arange(48) * 7 % 96).view(2, 24)
logits = {}
for name in ("float32", "bfloat16"):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, name))
    with torch.no_grad():
        logits[name] = model(input_ids=ids).logits.float()
        logits[name + "_new"] = model.generate(ids, max_new_tokens=8, do_sample=False)[:, 24:]
assert not [name for name in sys.modules if name.startswith("quantforge")]
save_file({name: tensor.contiguous() for name, tensor in logits.items()}, out)
"""

Written = tuple[Path, dict[str, QuantizedWeight], Any]


def linears(module: nn.Module) -> list[str]:
    found = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    return [name for name in found if name != "lm_head"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A float module, its checkpoint and the weights in it."""
    module = tiny_llama(hidden=128, intermediate=200, blocks=3)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()  # kept tensors: stored exactly
    names = linears(module)
    assert len(names) == len(CYCLE)
    plan = dict(zip(names, CYCLE, strict=True))
    folder = tmp_path_factory.mktemp("mixed")
    weights = write_quantized(folder, module, plan, shard_bytes=60_000)
    assert {w.spec.bits for w in weights.values()} == {2, 3, 4, 5, 6, 8}
    assert all(bool((w.scale < 0).any()) for w in weights.values())
    return folder, weights, module


@pytest.fixture(scope="module")
def stock(mixed: Written, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Logits of transformers with compressed-tensors, in a process that knows no quantforge."""
    folder = tmp_path_factory.mktemp("stock")
    script, out = folder / "stock.py", folder / "logits.safetensors"
    script.write_text(STOCK)
    command = [sys.executable, str(script), str(mixed[0]), str(out)]
    done = subprocess.run(
        command, env={"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return load_file(out)


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = module(input_ids=IDS).logits
    return result


def test_logits_equal_stock_transformers(mixed: Written, stock: dict[str, torch.Tensor]) -> None:
    module = load(mixed[0])
    ours = logits(module)
    assert ours.std() > 0.01
    # The same float32 weights (measured: no difference); the order of sums may differ elsewhere.
    assert (ours - stock["float32"]).abs().max() <= 1e-5


def test_logits_equal_the_dense_module(mixed: Written) -> None:
    folder, weights, module = mixed
    dense = tiny_llama(hidden=128, intermediate=200, blocks=3)
    dense.load_state_dict(module.state_dict())
    for name, weight in weights.items():
        dense.get_submodule(name).weight.data = weight.dequantize()
    assert (logits(load(folder)) - logits(dense)).abs().max() <= 1e-5


def test_bfloat16_equals_stock_transformers(mixed: Written, stock: dict[str, torch.Tensor]) -> None:
    module = load(mixed[0], dtype=None)  # config.json says bfloat16
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert module.model.rotary_emb.inv_freq.dtype == torch.float32
    ours = logits(module)
    assert ours.dtype == torch.bfloat16
    # Measured: no difference; one unit in the last place of the largest logit is allowed.
    assert (ours.float() - stock["bfloat16"]).abs().max() <= 2**-8 * stock["bfloat16"].abs().max()


def test_generates_what_stock_generates(mixed: Written, stock: dict[str, torch.Tensor]) -> None:
    module: Any = load(mixed[0])
    assert not module.training
    with torch.no_grad():
        new = module.generate(IDS, max_new_tokens=8, do_sample=False)[:, 24:]
    assert torch.equal(new, stock["float32_new"])


def resident_bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_memory_is_that_of_the_file(tmp_path: Path) -> None:
    module = tiny_llama(hidden=256, intermediate=512, blocks=4)
    write_quantized(tmp_path, module, dict.fromkeys(linears(module), QuantSpec(3, 64)))
    loaded = load(tmp_path, dtype=torch.bfloat16)
    file = (tmp_path / "model.safetensors").stat().st_size
    dense = sum(p.numel() for p in module.parameters()) * 2
    # The file has a header of about 100 bytes a tensor; memory has the rotary frequencies.
    assert file - 20_000 < resident_bytes(loaded) < file
    assert resident_bytes(loaded) < 0.25 * dense
    # In float32 only the kept tensors grow.
    kept = sum(p.numel() for p in loaded.parameters())
    assert resident_bytes(load(tmp_path)) == resident_bytes(loaded) + 2 * kept


def test_everything_is_materialised(mixed: Written) -> None:
    folder, _, module = mixed
    loaded: Any = load(folder)
    assert {t.device.type for t in [*loaded.parameters(), *loaded.buffers()]} == {"cpu"}
    assert torch.equal(loaded.model.rotary_emb.inv_freq, module.model.rotary_emb.inv_freq)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert not any(p.requires_grad for p in loaded.parameters())
    assert sum(isinstance(m, QuantLinear) for m in loaded.modules()) == 20
    assert not hasattr(loaded.config, "quantization_config")


def test_own_formats_load_too(tmp_path: Path) -> None:
    """Asymmetric layers, a quantized embedding and the head tied to it."""
    module = tiny_llama(blocks=1)
    plan: dict[str, QuantSpec | None] = dict.fromkeys(
        linears(module), QuantSpec(3, 32, symmetric=False)
    )
    plan["model.embed_tokens"] = QuantSpec(4, 32)
    weights = write_quantized(tmp_path, module, plan, stock_readable=False)
    loaded: Any = load(tmp_path)
    assert isinstance(loaded.model.embed_tokens, QuantEmbedding)
    assert isinstance(loaded.lm_head, QuantLinear)
    packed = loaded.model.embed_tokens.weight_packed
    assert loaded.lm_head.weight_packed.data_ptr() == packed.data_ptr()
    for name, weight in weights.items():
        module.get_submodule(name).weight.data = weight.dequantize()
    module.tie_weights()
    for name in ("model.norm", "model.layers.0.input_layernorm"):
        assert torch.equal(module.get_submodule(name).weight, loaded.get_submodule(name).weight)
    assert (logits(loaded) - logits(module)).abs().max() <= 1e-5
    assert loaded.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 27)


def test_a_quantized_head_of_its_own_and_biases(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, attention_bias=True, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    module = LlamaForCausalLM(config).train(False)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
        parameter.data = parameter.data.to(torch.bfloat16).float()
    plan = {**dict.fromkeys(linears(module), QuantSpec(4, 32)), "lm_head": QuantSpec(8)}
    weights = write_quantized(tmp_path, module, plan, ignore=[])
    loaded: Any = load(tmp_path)
    assert isinstance(loaded.lm_head, QuantLinear)
    assert loaded.model.layers[0].self_attn.q_proj.bias is not None
    for name, weight in weights.items():
        module.get_submodule(name).weight.data = weight.dequantize()
    assert (logits(loaded) - logits(module)).abs().max() <= 1e-5


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_quantized(folder, tiny_llama(blocks=1), {Q_PROJ: QuantSpec(3, 32)})
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")),
            "lacks 1 tensors of the model, first model.norm.weight",
        ),
        (
            lambda f: rewrite(f, lambda t: t.pop("model.embed_tokens.weight")),
            "lacks . tensors of the model, first model.embed_tokens.weight",
        ),
        (
            lambda f: rewrite(f, lambda t: t.pop(f"{Q_PROJ}.weight_scale")),
            "needs the tensors weight_packed, weight_scale, weight_shape",
        ),
        (
            lambda f: rewrite(f, lambda t: t.update(stranger=torch.zeros(2))),
            "holds stranger, which the model does not have",
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({"model.rotary_emb.inv_freq": torch.zeros(8)})),
            "holds model.rotary_emb.inv_freq, which the model does not have",
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({f"{Q_PROJ}.weight": torch.zeros(64, 64)})),
            "q_proj.weight, which the model does not have",
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.zeros(65)})),
            r"model.norm.weight has shape \(65,\), expected \(64,\)",
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({"lm_head.weight": torch.zeros(96, 64)})),
            "stores lm_head.weight, which config.json ties",
        ),
        (lambda f: reconfigure(f, hidden_size=96), "96 columns|is stored as|has shape"),
        (lambda f: reconfigure(f, model_type="martian"), "no model_type 'martian'"),
        (lambda f: reconfigure(f, architectures=["Martian"]), "no model class 'Martian'"),
        (lambda f: reconfigure(f, architectures=["AutoConfig"]), "no model class 'AutoConfig'"),
        (lambda f: reconfigure(f, quantization_config=None), "has no quantization_config"),
        (lambda f: reconfigure(f, num_attention_heads="x"), "must be a positive integer, got 'x'"),
        (lambda f: reconfigure(f, hidden_act="martian"), "config.json makes no"),
        (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json is"),
    ],
)
def test_damage_is_one_line(
    small: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_bad_requests(small: Path) -> None:
    with pytest.raises(UsageError, match="3b-g32: unknown backend 'abacus'; known: auto"):
        load(small, backend="abacus")
    with pytest.raises(UsageError, match="unknown device 'toaster'"):
        load(small, device="toaster")
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match="this torch sees no GPU"):
            load(small, device="cuda")
