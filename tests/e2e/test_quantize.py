"""The main job through the command line: what is written, that it loads, that it repeats."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import quantforge
from quantforge.testing import markov_tokens, save_tiny_checkpoint, tiny_llama, train

STOCK = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokens = torch.arange(60).view(2, 30)
with torch.no_grad():
    save_file({"logits": model(tokens).logits}, sys.argv[2])
assert "quantforge" not in sys.modules
"""


def hashes(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "run.json"
    }


def stored_bits(folder):
    """Average stored bits from the files alone, without any code of ours."""
    bits = weights = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                if name.endswith(("weight_packed", "weight_scale")):
                    bits += tensor.numel() * tensor.element_size() * 8
                if name.endswith("weight_shape"):
                    weights += int(tensor[0] * tensor[1])
    return bits / weights


def test_what_is_written(compiled):
    folder, report = compiled
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json", "model.safetensors", "quantforge.json", "plan.json", "sensitivity.json",
        "report.html", "README.md", "run.json", "recipe.yaml", "tokenizer.json",
    } <= names  # fmt: skip
    assert not list(folder.parent.glob(".*partial"))
    assert stored_bits(folder) <= 3.3
    assert stored_bits(folder) == pytest.approx(report["plan"]["stored_bits"])
    widths = {spec.partition("b")[0] for spec in report["plan"]["assignment"].values()}
    assert len(widths) >= 2
    assert 0 < report["quality"]["kl"] < 0.5
    assert report["generations"][0]["prompt"] == "The capital of France is"


def test_stock_transformers_gives_the_same_logits(compiled, tmp_path):
    folder, _ = compiled
    target = tmp_path / "logits.safetensors"
    command = [sys.executable, "-c", STOCK, str(folder), str(target)]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    expected = load_file(target)["logits"]
    module = quantforge.load(folder)
    with torch.no_grad():
        found = module(torch.arange(60).view(2, 30)).logits
    assert float((found - expected).abs().max()) < 1e-4


def test_the_same_seed_gives_the_same_bytes(run, small, compiled, checkpoint, text):
    folder, _ = compiled
    done = run(
        "quantize", checkpoint, "--budget", "3.3bit", "--calibration", text, "-o", "again",
        "--fresh", *small, cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = hashes(folder.parent / "again")
    assert again == hashes(folder)


def test_another_budget_reuses_the_measurement(run, small, compiled, checkpoint, text):
    folder, _ = compiled
    done = run(
        "plan", checkpoint, "--budget", "4bit", "--calibration", text, "--json",
        *small, cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "gradients" not in done.stderr
    plan = json.loads(done.stdout)
    assert 3.3 < plan["plan"]["stored_bits"] <= 4.0


def test_plan_does_not_write_into_a_checkpoint(run, small, compiled, checkpoint, text):
    folder, _ = compiled
    before = hashes(folder)
    done = run(
        "plan", checkpoint, "--budget", "4bit", "--calibration", text, "-o", "out", "--force",
        *small, cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == 2
    assert "holds a checkpoint" in done.stderr
    assert hashes(folder) == before


def test_eval_and_generate_and_inspect_read_the_folder(run, small, compiled, checkpoint, text):
    folder, report = compiled
    done = run(
        "eval", "out", "--reference", checkpoint, "--text", text, "--windows", 4,
        "--window-length", 64, "--against", "out", "--json", cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 0 < result["quality"]["kl"] < 0.5
    assert result["difference"]["kl"] == 0.0
    done = run("inspect", "out", "--json", cwd=folder.parent)
    assert json.loads(done.stdout)["sizes"] == report["sizes"]
    done = run("generate", "out", "hello", "--tokens", 5, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 1


def test_a_published_setting_is_one_command(run, tmp_path):
    """As recipes/README.md has it; the model is small, the text what comes with Python."""
    model = save_tiny_checkpoint(tmp_path / "model", blocks=1, hidden=256, intermediate=256)
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = 2048
    (model / "config.json").write_text(json.dumps(config))
    short = ("--set", "calibration.sequences=8", "--set", "evaluate.tokens=2")
    command = ("quantize", "gptq-w4g128", "--model", "model", "-o", "out", *short)
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for stage in ("gradients", "candidates", "measure uniform", "tune"):
        assert stage not in done.stderr
    assert "4.125 stored bits a weight (4.000 of them codes)" in done.stdout
    assert "7 fitting and 1 held-out sequences of 2048 tokens" in done.stdout
    assert stored_bits(tmp_path / "out") == 4.125
    done = run("plan", "gptq-w4g128", "--model", "model", *short, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["plan"]["predicted_loss"] is None


def test_a_network_in_memory_with_batches():
    module = train(tiny_llama(blocks=2))
    batches = [{"input_ids": markov_tokens(4, 48, seed=seed)} for seed in range(12)]
    before = module.model.layers[0].mlp.up_proj.weight.detach().clone()
    seen = []
    report = quantforge.quantize(
        module, budget="3.5bit", calibration=batches, progress=seen.append,
        settings={"search.group_sizes": [32, -1], "evaluate.precision": "float32"},
    )  # fmt: skip
    assert report.plan.stored_bits <= 3.5
    assert 0 < report.quality.kl < 0.3
    assert report.output == ""
    assert {event.stage for event in seen} >= {"gradients", "candidates", "quantize"}
    after = module.model.layers[0].mlp.up_proj.weight.detach()
    assert 0 < float((after - before).norm() / before.norm()) < 0.5
