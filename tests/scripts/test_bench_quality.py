"""The quality benchmark on a tiny network: every kind of row runs and changes what it should."""

import json

import bench_quality
import pytest
import torch

from quantforge.testing import save_tiny_checkpoint

SMALL = {
    "calibration.sequences": 16,
    "calibration.sequence_length": 32,
    "search.bits": [3],
    "search.group_sizes": [32],
    "evaluate.curve_windows": 2,
    "evaluate.tokens": 2,
    "quantize.tuning.steps": 8,
}


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """Runs rows on a tiny checkpoint; returns them by name."""
    folder = tmp_path_factory.mktemp("bench")
    model = save_tiny_checkpoint(folder / "model", blocks=2)
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (4096,), generator=generator)
    text, numbers = folder / "text.txt", folder / "rows.json"
    text.write_text("".join(map(chr, letters.tolist())), encoding="utf-8")

    @torch.no_grad()
    def run(*rows):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QUANTFORGE_CACHE", str(folder / "cache"))
            bench_quality.main(
                [
                    str(model), "--calibration", str(text), "--text", str(text), "--windows", "2",
                    "--window-length", "32", "--precision", "float32", "--settings",
                    json.dumps(SMALL), "--json", str(numbers), "--rows", *rows,
                ]
            )  # fmt: skip
        found = {row["name"]: row for row in json.loads(numbers.read_text())}
        assert list(found) == list(rows)
        kl = {name: row["qualities"][str(text)]["kl"] for name, row in found.items()}
        return kl, {name: row["stored_bits"] for name, row in found.items()}

    return run


def test_asymmetric_rows_are_compensated_and_tuned(measure):
    names = ["rtn:3b-g32", "rtn:3b-g32-asym", "gptq:3b-g32-asym", "tuned:3b-g32-asym"]
    kl, bits = measure(*names)
    assert [bits[name] for name in names] == pytest.approx([3.5, 3.59375, 3.59375, 3.59375])
    assert all(value > 0 for value in kl.values())
    assert kl["gptq:3b-g32-asym"] < 0.7 * kl["rtn:3b-g32-asym"] < 0.7 * kl["rtn:3b-g32"]
    # tuning is undone where held-out tokens do not gain: then it is the row before it
    assert kl["tuned:3b-g32-asym"] < 0.7 * kl["rtn:3b-g32-asym"]


def test_options_change_the_network_and_not_its_size(measure):
    names = [
        "gptq:2b-g32", "gptq+magr:2b-g32", "gptq+awq:2b-g32", "rtn+magr+awq+diagonal:2b-g32-asym"
    ]  # fmt: skip
    kl, bits = measure(*names)
    assert [bits[name] for name in names] == pytest.approx([2.5, 2.5, 2.5, 2.5625])
    assert len(set(kl.values())) == len(names)
    assert all(0 < value < 2 for value in kl.values())
