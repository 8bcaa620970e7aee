"""The comparison with onnxruntime on a small network: figures and what counts as a tie."""

import json

import compare_onnx
import numpy as np
import pytest
import torch

from quantforge.vision.checkpoint import save_vision
from quantforge.vision.efficientnet_lite import STAGES
from quantforge.vision.testing import efficientnet, quantized

pytest.importorskip("onnxruntime")


def test_a_shallow_network_is_within_one_step_of_onnxruntime(tmp_path, capsys):
    network = efficientnet(stages=STAGES[:2])
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    save_vision(quantized(network, x), tmp_path / "out")
    np.save(tmp_path / "x.npy", x.numpy())
    arguments = [str(tmp_path / "out"), "--pictures", str(tmp_path / "x.npy")]
    compare_onnx.main([*arguments, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == [
        "simulation",
        *(f"onnxruntime, {level}" for level in compare_onnx.LEVELS),
    ]
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
    row = compare_onnx.compared(ours, theirs)
    assert row["largest_in_steps"] == 1.0
    assert (row["same"], row["ties"], row["other"]) == (1, 1, 0)
    far = torch.tensor([[0.0, 255.0, 0.0], [60.0, 50.0, 0.0]])
    row = compare_onnx.compared(torch.tensor([[0.0, 255.0, 0.0], [0.0, 255.0, 0.0]]), far)
    assert row["largest_in_steps"] == 205.0
    assert (row["same"], row["ties"], row["other"]) == (1, 1, 0)
    near = torch.tensor([[0.0, 255.0, 0.0], [0.0, 9.0, 0.0]])
    row = compare_onnx.compared(near, near[:, [1, 0, 2]])
    assert (row["same"], row["ties"], row["other"]) == (0, 2, 0)
