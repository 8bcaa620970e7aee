"""A saved network comes back to the bit, and a malformed one ends in one line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quantforge.errors import InputError, UsageError
from quantforge.types import QuantSpec
from quantforge.vision.checkpoint import load_network, load_vision, save_vision
from quantforge.vision.graph_file import ALLOWED
from quantforge.vision.network import Simulation, VisionNetwork
from quantforge.vision.runtime import VisionRuntime
from quantforge.vision.testing import described, quantized, traced

aten = torch.ops.aten


class Net(nn.Module):
    """Every kind of layer, and arguments of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.block = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 8, 1))
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = aten.clamp.default(self.stem(x), 0.0, float("inf"))
        x = aten.gelu.default(self.up(self.block(x)), approximate="tanh")
        first, second = aten.chunk.default(x, 2, 1)[0], aten.chunk.default(x, 2, 1)[1]
        x = aten.cat.default([first, second], 1)
        return self.head(aten.flatten.using_ints(aten.mean.dim(x, [2, 3], True), 1))


def pictures() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def made(text: str = "4b-pc", **options: Any) -> Any:
    network = described(traced(Net()), 16)
    return quantized(network, pictures(), spec=QuantSpec.parse(text), **options)


def test_every_width_comes_back_to_the_bit(tmp_path: Path) -> None:
    x = pictures()
    for text in ("2b-pc", "3b-g4-asym", "8b-pc-asym", "5b-pc"):
        network = made(text, keep=("head",))
        save_vision(network, tmp_path / text)
        again = load_network(tmp_path / text)
        assert torch.equal(load_vision(tmp_path / text)(x), VisionRuntime(network)(x))
        with torch.no_grad():
            assert torch.equal(Simulation(again).run(x), Simulation(network).run(x))
        for name, weight in network.weights.items():
            other = again.weights[name]
            assert torch.equal(weight.codes, other.codes)
            assert torch.equal(weight.scale, other.scale)
            assert weight.spec == other.spec
        assert again.grids == network.grids
        for name in ("layers", "reads", "sites", "blocks", "preprocessing", "channels", "name"):
            assert getattr(again.network, name) == getattr(network.network, name), name


def test_the_same_network_gives_the_same_bytes_and_the_codes_their_bits(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_vision(made(), tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    sizes = {}
    for bits in (2, 8):
        save_vision(made(f"{bits}b-pc"), tmp_path / str(bits))
        sizes[bits] = (tmp_path / str(bits) / "model.safetensors").stat().st_size
    rows = [(12, 27), (12, 9), (8, 12), (6, 32), (5, 6)]
    words = {b: sum(4 * out * -(-cols * b // 32) for out, cols in rows) for b in (2, 8)}
    assert abs((sizes[8] - sizes[2]) - (words[8] - words[2])) <= 16
    with pytest.raises(UsageError, match="exists"):
        save_vision(made(), tmp_path / "a")


def test_nothing_is_left_of_a_network_that_cannot_be_saved(tmp_path: Path) -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return aten.mean.dim(aten.rand_like.default(self.one(x)), [2, 3])

    network = quantized(described(traced(Random()), 8), pictures())
    with pytest.raises(UsageError, match=r"calls aten\.rand_like\.default, which is not saved"):
        save_vision(network, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"])
def test_every_filter_that_a_folder_of_transformers_may_name_comes_back(
    name: str, tmp_path: Path
) -> None:
    network = made()
    preprocessing = dataclasses.replace(network.network.preprocessing, interpolation=name)
    inner = dataclasses.replace(network.network, preprocessing=preprocessing)
    save_vision(dataclasses.replace(network, network=inner), tmp_path / "out")
    assert load_network(tmp_path / "out").network.preprocessing == preprocessing


class Twice(nn.Module):
    """One layer that is called twice, and constants of the kinds that buffers have."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 4)
        self.register_buffer("flags", torch.tensor([[True, False, True]]))
        self.register_buffer("small", torch.tensor([[3, -1, 2]], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(aten.relu.default(self.one(x)))
        x = aten.mean.dim(x, [2, 3])
        return self.head(aten.mul.Tensor(aten.add.Tensor(x, self.small), self.flags))


def test_a_layer_called_twice_and_constants_of_every_kind_come_back(tmp_path: Path) -> None:
    network, x = quantized(twice(), pictures()), pictures()
    assert len(network.weights) == 2
    size = save_vision(network, tmp_path / "out")
    names = {*load_file(tmp_path / "out" / "model.safetensors")}
    assert names == {"flags", "small"} | {
        f"{layer}.{part}" for layer in ("one", "head") for part in ("codes", "scale", "bias")
    }
    assert size == (tmp_path / "out" / "model.safetensors").stat().st_size
    with torch.no_grad():
        expected = Simulation(network).run(x)
        assert torch.equal(Simulation(load_network(tmp_path / "out")).run(x), expected)
    assert torch.allclose(load_vision(tmp_path / "out")(x), expected, atol=0.02)


def twice() -> VisionNetwork:
    """Each layer once, though it is called twice."""
    network = described(traced(Twice()), 16)
    assert [info.name for info in network.layers] == ["one", "one", "head"]
    return dataclasses.replace(network, layers=network.layers[1:])


def test_what_would_not_be_read_is_not_delivered(tmp_path: Path) -> None:
    network = made()
    wrong = dataclasses.replace(
        network.network.preprocessing, interpolation="sinc"
    )  # none of Pillow's
    inner = dataclasses.replace(network.network, preprocessing=wrong)
    broken = dataclasses.replace(network, network=inner)
    with pytest.raises(UsageError, match=r"cannot be saved.*graph\.json is damaged") as caught:
        save_vision(broken, tmp_path / "out")
    assert str(tmp_path) not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_every_allowed_operator_computes_and_nothing_else() -> None:
    for name in ALLOWED:
        short, _, overload = name.partition(".")
        found = getattr(getattr(torch.ops.aten, short, None), overload, None)
        if found is not None:
            returns = str(found._schema).rpartition("->")[2]
            assert "Tensor" in returns or name == "sym_size.int", name
    banned = (
        "rand",
        "load",
        "save",
        "empty",
        "full",
        "zeros",
        "ones",
        "arange",
        "set_",
        "item",
        "file",
    )
    assert not [name for name in ALLOWED if any(word in name for word in banned)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "network"
    save_vision(made(), folder)
    return folder


def changed(saved: Path, folder: Path, text: bytes) -> Path:
    """A copy with another graph.json, whose hash the manifest says."""
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    (folder / "graph.json").write_bytes(text)
    manifest = json.loads((folder / "quantforge.json").read_bytes())
    manifest["files"]["graph.json"] = hashlib.sha256(text).hexdigest()
    (folder / "quantforge.json").write_text(json.dumps(manifest))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_vision(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


EDITS: dict[str, tuple[list[Any], Any, str]] = {
    "an operator": (["nodes", 2, "target"], "rand_like.default", "none of the operators allowed"),
    "a way out": (["nodes", 2, "target"], "__class__.__base__", "none of the operators allowed"),
    "code in a name": (["nodes", 2, "name"], "x = print('hi')", "no name of a node"),
    "a dunder": (["nodes", 1, "target"], "__class__", "which the file does not hold"),
    "a later node": (["nodes", 2, "args", 0], {"node": "head"}, "which is none"),
    "a huge number": (["nodes", 2, "args", 1], 10**30, "which is none"),
    "a huge layer": (["layers", 0, "out"], 1 << 40, "not a whole number"),
    "a huge padding": (["layers", 0, "padding"], [60000, 60000], "numbers for one picture"),
    "no groups": (["layers", 0, "groups"], 0, "not a whole number"),
    "another shape": (["layers", 4, "in"], 7, "does not run"),
    "another width": (["layers", 4, "spec"], "3b-pc", None),
    "a wrong spec": (["layers", 4, "spec"], "9b-pc", "bits must be"),
    "a strange scale": (["grids", "x", "scale"], 0.0, "the scale 0.0"),
    "a zero beyond": (["grids", "x", "zero"], 256, "no whole number"),
    "a missing site": (["sites"], [], "belongs to no site"),
    "no output": (["nodes"], [], "2 to"),
    "huge pictures": (["preprocessing", "size"], [10**9, 10**9], "no whole number"),
    "tiny pictures": (["preprocessing", "size"], [1, 1], None),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_a_graph_may_not_say(edit: str, saved: Path, tmp_path: Path) -> None:
    path, value, word = EDITS[edit]
    text = json.loads((saved / "graph.json").read_bytes())
    held = text
    for key in path[:-1]:
        held = held[key]
    held[path[-1]] = value
    folder = changed(saved, tmp_path / "changed", json.dumps(text).encode())
    if word is not None:
        assert word in refused(folder)
    else:
        survives(folder)


def survives(folder: Path) -> bool:
    """Whether it loads; anything but an InputError of one line fails the test."""
    try:
        load_network(folder)
    except InputError as error:
        assert "\n" not in str(error)
        return False
    return True


def test_three_hundred_damaged_folders(saved: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    original = (saved / "graph.json").read_bytes()
    leaves: list[tuple[Any, Any]] = []

    def walk(held: Any) -> None:
        for key in held if isinstance(held, dict) else range(len(held)):
            leaves.append((held, key))
            if isinstance(held[key], dict | list):
                walk(held[key])

    values = [None, True, -1, 0, 1 << 62, 1.5, float("inf"), "", "x", "a.b", [], {}, [[[[[[]]]]]],
              {"node": "x"}, {"dtype": "float64"}, "aten", "\n", "é" * 2000]  # fmt: skip
    loaded = 0
    for _ in range(220):
        text = json.loads(original)
        leaves.clear()
        walk(text)
        held, key = rng.choice(leaves)
        if rng.random() < 0.2:
            del held[key]
        else:
            held[key] = rng.choice(values)
        loaded += survives(changed(saved, tmp_path / "one", json.dumps(text).encode()))
    assert loaded < 110
    for file in ("graph.json", "model.safetensors", "quantforge.json"):
        good = (saved / file).read_bytes()
        for _ in range(27):
            shutil.copytree(saved, tmp_path / "one", dirs_exist_ok=True)
            damaged = bytearray(good)
            if rng.random() < 0.3:
                damaged = damaged[: rng.randrange(len(good))]
            else:
                damaged[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
            (tmp_path / "one" / file).write_bytes(bytes(damaged))
            okay = survives(tmp_path / "one")
            assert not okay or file == "quantforge.json"  # versions of tools may say anything
    for file in ("graph.json", "model.safetensors", "quantforge.json"):
        shutil.rmtree(tmp_path / "one")
        shutil.copytree(saved, tmp_path / "one")
        (tmp_path / "one" / file).unlink()
        assert file in refused(tmp_path / "one")
