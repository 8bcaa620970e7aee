"""The figure of training: the numbers of the file, at the tokens they were measured at."""

import json

import draw_training
import pytest

POINTS = [
    {"step": 0, "loss": None, "kl": 4.0, "soft_kl": 0.0},
    {"step": 3, "loss": 1.0, "kl": 2.0, "soft_kl": 1.5},
    {"step": 6, "loss": 0.9, "kl": 2.5, "soft_kl": 2.5},
]
HARD = [{**point, "soft_kl": point["kl"]} for point in POINTS[:2]]
FOUND = {
    "variants": {
        "tuning only": {"training": None},
        "Hestia": {"training": {"tokens": 600, "steps": 6, "best": 1, "points": POINTS}},
        "BitNet b1.58": {"training": {"tokens": 300, "steps": 3, "best": 1, "points": HARD}},
    }
}


def test_lines_are_the_measurements():
    figure = draw_training.drawing(draw_training.curves(FOUND), "a title")
    axes = figure.axes[0]
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert lines == [
        ([0.0, 300.0, 600.0], [4.0, 2.0, 2.5]),
        ([300.0, 600.0], [1.5, 2.5]),  # a KL of 0 has no place on the axis
        ([300.0], [2.0]),
        ([0.0, 300.0], [4.0, 2.0]),
        ([300.0], [2.0]),
    ]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Hestia", "BitNet b1.58"]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_same_numbers_are_the_same_file(tmp_path, suffix):
    numbers = tmp_path / "found.json"
    numbers.write_text(json.dumps(FOUND))
    files = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for file in files:
        draw_training.main([str(numbers), str(file), "--title", "SmolLM2"])
    assert files[0].read_bytes() == files[1].read_bytes()
    if suffix == "svg":
        assert "BitNet b1.58" in files[0].read_text()


def test_what_cannot_be_drawn_is_said(tmp_path):
    numbers = tmp_path / "found.json"
    numbers.write_text(json.dumps({"variants": {"tuning only": {"training": None}}}))
    with pytest.raises(SystemExit, match="no trained variant"):
        draw_training.main([str(numbers), str(tmp_path / "a.svg")])
    with pytest.raises(SystemExit, match=r"neither \.svg nor \.png"):
        draw_training.main([str(numbers), str(tmp_path / "a.pdf")])
