"""Rules of the programs that load checkpoints."""

import pytest

from quantforge.export.servers import server_support
from quantforge.types import LayerInfo, QuantSpec

LAYERS = tuple(
    LayerInfo(
        name=name, out_features=32, in_features=64, block=0, stage=0, fused_group=group
    )
    for name, group in (("q", "qk"), ("k", "qk"), ("o", "o"))
)  # fmt: skip
ALL = ("quantforge", "transformers", "NVIDIA", "CPU", "ROCm", "SGLang")


@pytest.mark.parametrize(
    ("specs", "loading"),
    [
        (("4b-g32", "4b-g32", "4b-pc"), ALL),
        (("4b-g32", "4b-g32", "8b-pc"), ("quantforge", "transformers", "NVIDIA", "ROCm", "SGLang")),
        (("3b-g32", "3b-g32", "4b-pc"), ("quantforge", "transformers", "NVIDIA")),
        (("7b-g32", "7b-g32", "4b-pc"), ("quantforge", "NVIDIA")),
        (("4b-g32-asym", "4b-g32-asym", "4b-pc"), tuple(n for n in ALL if n != "transformers")),
        (("4b-g32", "4b-pc", "4b-pc"), ("quantforge", "transformers")),
        (("4b-g32", "kept", "4b-pc"), ("quantforge", "transformers")),
        (("kept", "kept", "4b-pc"), ALL),
    ],
)
def test_who_loads_what(specs, loading):
    assignment = {
        layer.name: None if spec == "kept" else QuantSpec.parse(spec)
        for layer, spec in zip(LAYERS, specs, strict=True)
    }
    found = server_support(LAYERS, assignment)
    assert len(found) == len(ALL)
    for one, key in zip(found, ALL, strict=True):
        assert key in one.name
        assert one.loads == (key in loading), one
        assert one.why


def test_the_reason_names_what_is_in_the_way():
    mixed = {"q": QuantSpec(3), "k": QuantSpec(3), "o": QuantSpec(5)}
    reasons = [one.why for one in server_support(LAYERS, mixed) if not one.loads]
    assert reasons == [
        "loads 4 bits, the plan has 3, 5",
        "loads 4, 8 bits, the plan has 3, 5",
        "loads 4, 8 bits, the plan has 3, 5",
    ]
    split = {"q": QuantSpec(4), "k": QuantSpec(4, 32), "o": QuantSpec(4)}
    assert "qk: its members are fused" in server_support(LAYERS, split)[2].why


@pytest.mark.parametrize(
    ("kind", "loading"),
    [("tied", ALL[:1]), ("embedding", ("quantforge", "NVIDIA")), ("linear", ALL[:3])],
)
def test_who_loads_what_is_outside_the_blocks(kind, loading):
    outside = LayerInfo(
        name="e", kind=kind, out_features=32, in_features=64, block=-1, stage=0, fused_group="e"
    )
    plan = dict.fromkeys((*(layer.name for layer in LAYERS), "e"), QuantSpec(4, 32))
    for one, key in zip(server_support((*LAYERS, outside), plan), ALL, strict=True):
        assert one.loads == (key in loading), one
    for one in server_support((*LAYERS, outside), {**plan, "e": None}):
        assert one.loads, one
