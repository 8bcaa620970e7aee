"""The comparison with onnxruntime on a small network: figures and what counts as a tie."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from quantforge.vision.checkpoint import save_vision
from quantforge.vision.testing import EfficientNetLike, described, quantized, traced

pytest.importorskip("onnxruntime")
PATH = Path(__file__).resolve().parents[2] / "scripts" / "compare_onnx.py"
_spec = importlib.util.spec_from_file_location("compare_onnx", PATH)
assert _spec is not None
assert _spec.loader is not None
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


def test_a_shallow_network_is_within_one_step_of_onnxruntime(tmp_path, capsys):
    network = described(traced(EfficientNetLike(((3, 1, 1, 16, 1), (5, 2, 6, 24, 2)))))
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    save_vision(quantized(network, x), tmp_path / "out")
    np.save(tmp_path / "x.npy", x.numpy())
    arguments = [str(tmp_path / "out"), "--pictures", str(tmp_path / "x.npy")]
    script.main([*arguments, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == ["simulation", *(f"onnxruntime, {level}" for level in script.LEVELS)]
    for name, row in found.items():
        assert row["pictures"] == 8
        assert row["same"] + row["ties"] + row["other"] == 8
        if not name.endswith("default"):
            assert row["largest_in_steps"] <= 1.0
            assert row["other"] == 0
    assert capsys.readouterr().out.count("of 8 predictions the same") == 4


def test_a_tie_is_one_within_twice_the_largest_difference():
    ours = torch.tensor([[0.0, 255.0, 254.5], [0.0, 100.0, 50.0]])
    theirs = ours + torch.tensor([[0.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    row = script.compared(ours, theirs)
    assert row["largest_in_steps"] == 1.0
    assert (row["same"], row["ties"], row["other"]) == (1, 1, 0)
    far = torch.tensor([[0.0, 255.0, 254.5], [60.0, 50.0, 50.0]])
    row = script.compared(torch.tensor([[0.0, 255.0, 0.0], [0.0, 255.0, 0.0]]), far)
    assert row["same"] + row["ties"] + row["other"] == 2
