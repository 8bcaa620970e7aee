"""What cannot go together is refused in one line before anything is measured."""

import pytest
import torch

from quantforge.errors import InputError, ResourceError, UsageError
from quantforge.testing import tiny_convolutional
from quantforge.vision import requirements
from quantforge.vision.entry import compile_network
from quantforge.vision.recipe import VisionSearchConfig
from quantforge.vision.requirements import require_candidates, require_room

FAST = {"reconstruction.steps": 0, "calibration.held_out": 4, "calibration.batch": 8}


def pictures(count=12):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Small(torch.nn.Module):
    """Two layers, both of them edges."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3, stride=2)
        self.head = torch.nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


def test_layers_without_a_width_are_named():
    network = tiny_convolutional()
    with pytest.raises(UsageError, match=r"no group size of 64 divides rows of \d+ weights of"):
        require_candidates(network, VisionSearchConfig(group_sizes=(64,)))
    with pytest.raises(UsageError, match=r"give a width per channel, e\.g\. 8b-pc"):
        require_candidates(network, VisionSearchConfig(edges="8b-g32"))
    require_candidates(network, VisionSearchConfig(edges="8b-pc"))


def test_a_network_of_edges_alone_has_nothing_to_plan():
    with pytest.raises(UsageError, match="fixes all layers of Small: set it to plan"):
        compile_network(
            Small(), pictures(), budget="4bit", settings={**FAST, "search.edges": "8b-pc"}
        )


def test_a_layer_too_large_for_memory_is_refused(monkeypatch):
    network = tiny_convolutional()
    need = max(22 * 4 * getattr(network.layer(x.name), "groups", 1) * x.in_features**2
               for x in network.layers)  # fmt: skip
    monkeypatch.setattr(requirements, "available_bytes", lambda: need)
    require_room(network)
    monkeypatch.setattr(requirements, "available_bytes", lambda: need - 1)
    with pytest.raises(ResourceError, match="GB are left; run it where there is more"):
        require_room(network)


@pytest.mark.parametrize("sensitivity", ["fisher", "hawq", "measured"])
def test_activations_can_stay_float(sensitivity):
    made, report = compile_network(
        Small(), pictures(), budget="4.5bit",
        settings={**FAST, "activations.bits": [], "search.sensitivity": sensitivity,
                  "search.bits": [3, 8]},
    )  # fmt: skip
    assert made.grids == {}
    assert report.stored_bits <= 4.5
    assert {one.activation_bits for one in report.layers} == {None}


def test_one_picture_cannot_judge_what_it_teaches():
    with pytest.raises(InputError, match=r"set reconstruction\.steps=0"):
        compile_network(
            Small(), pictures(5), budget="8.8bit", settings={**FAST, "reconstruction.steps": 5}
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((pictures().numpy(), torch.zeros(3, dtype=torch.int64)), r"whole numbers \[12\]"),
        ((pictures(), torch.zeros(12, 4)), "labels are whole numbers"),
        ((pictures(),), "a pair of pictures and labels"),
        (["a", "b"], "a pair of pictures and labels"),
        (pictures().to(torch.uint8), "pictures must be floats"),
        (pictures() / 0.0, "not finite"),
    ],
)  # fmt: skip
def test_pictures_in_memory_have_one_form(given, message, tmp_path):
    from quantforge.vision.entry import quantize

    with pytest.raises((UsageError, InputError), match=message):
        quantize(
            Small(), budget="8.8bit", calibration=given, output=tmp_path / "out", settings=FAST
        )
    assert not (tmp_path / "out").exists()


def test_labels_are_classes():
    with pytest.raises(InputError, match="labels are 9 to 9, the network has 4 classes, 0 to 3"):
        compile_network(
            Small(), pictures(), budget="8.8bit", labels=torch.full((12,), 9), settings=FAST
        )
