"""The training benchmark on a tiny network: both ways in turns, and variants from one start."""

import json

import bench_training
import pytest
import torch

from quantforge.testing import save_tiny_checkpoint

SETTINGS = {
    "calibration.sequences": 20,
    "calibration.sequence_length": 32,
    "search.bits": [2, 3],
    "search.group_sizes": [32, -1],
    "evaluate.curve_bits": [2],
    "evaluate.curve_windows": 2,
    "evaluate.tokens": 2,
    "quantize.rounding.steps": 0,
    "quantize.tuning.steps": 2,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    model = save_tiny_checkpoint(folder / "model", blocks=1, steps=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTFORGE_CACHE", str(folder / "cache"))
        bench_training.main(
            [
                str(model), "--calibration", "pydoc", "--text", "held-out", "--budget", "2.5bit",
                "--settings", json.dumps(SETTINGS), "--rounds", "1", "--steps", "1",
                "--speed-spec", "3b-g32", "--tokens", "512", "--only",
                "--training", '{"batch": 2, "evaluate_every": 256}',
                "--variant", "soft", '{"weight_rate": 0.005}',
                "--variant", "rounded", '{"quantizer": "straight-through", "weight_rate": 0.005}',
                "--journal", str(folder / "journal"), "--json", str(folder / "found.json"),
            ]
        )  # fmt: skip
    return json.loads((folder / "found.json").read_text())


def test_both_ways_took_their_turns(found):
    turns = found["speed"]["turns"]
    assert [len(turns[way]) for way in ("float", "trained")] == [1, 1]
    assert all(turn["wall"] > 0 and turn["processor"] > 0 for way in turns.values() for turn in way)
    ratio = turns["trained"][0]["wall"] / turns["float"][0]["wall"]
    assert found["speed"]["ratios"]["wall"] == pytest.approx(ratio)


def test_variants_start_alike_and_train_on_as_much(found):
    variants = found["variants"]
    assert list(variants) == ["tuning only", "soft", "rounded"]
    assert variants["tuning only"]["training"] is None
    base = variants["tuning only"]["held_out"]["window_kl"][:2]
    start = torch.tensor(base).mean()
    for name in ("soft", "rounded"):
        training = variants[name]["training"]
        assert (training["tokens"], training["steps"]) == (512, 8)
        # but for the norms, which training measures in 16 bits
        assert training["points"][0]["kl"] == pytest.approx(float(start), rel=0.02)
        assert variants[name]["seconds"]["train"] > 0
    soft, rounded = (variants[name]["training"]["points"][1] for name in ("soft", "rounded"))
    assert soft["kl"] != rounded["kl"]
