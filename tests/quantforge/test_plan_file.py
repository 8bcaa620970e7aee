"""A plan that was edited by hand is read back, or refused with the line at fault."""

import json

import pytest

from quantforge.cli.render import json_document
from quantforge.errors import InputError
from quantforge.files import canonical_json
from quantforge.format.manifest import plan_to_dict
from quantforge.plan_file import read_assignment
from quantforge.testing import plan_of
from quantforge.types import LayerInfo, QuantSpec

LAYERS = tuple(
    LayerInfo(
        name=f"blocks.{block}.{name}", out_features=32, in_features=192, block=block, stage=0,
        fused_group=f"{block}.{group}",
    )
    for block in range(2)
    for name, group in (("q", "qk"), ("k", "qk"), ("o", "o"))
)  # fmt: skip
GOOD = {
    "blocks.0.q": QuantSpec(3, 64), "blocks.0.k": QuantSpec(3, 64), "blocks.0.o": None,
    "blocks.1.q": QuantSpec(2), "blocks.1.k": QuantSpec(2),
    "blocks.1.o": QuantSpec(4, 96, symmetric=False),
}  # fmt: skip


def read(plan, *, independent=False):
    return read_assignment(plan, LAYERS, independent=independent)


def written(path, changes=(), drop=()):
    """A plan.json with some specs changed by hand."""
    document = plan_to_dict(plan_of(GOOD))
    document["assignment"] |= dict(changes)
    for name in drop:
        del document["assignment"][name]
    path.write_text(canonical_json(document))
    return path


def test_every_form_of_a_plan_is_read(tmp_path):
    path = written(tmp_path / "plan.json")
    report = {"plan": plan_of(GOOD), "layers": []}
    (tmp_path / "printed.json").write_text(json_document("plan", report))  # null where kept
    texts = {name: "kept" if spec is None else str(spec) for name, spec in GOOD.items()}
    for plan in (
        path, str(path), tmp_path / "printed.json", json.loads(path.read_text()), plan_of(GOOD),
        GOOD, texts,
    ):  # fmt: skip
        found = read(plan)
        assert found == GOOD
        assert list(found) == [layer.name for layer in LAYERS]


@pytest.mark.parametrize(
    ("name", "spec", "says"),
    [
        ("blocks.1.o", "3b", "blocks.1.o: not a spec: '3b'"),
        ("blocks.1.o", "9b-pc", "blocks.1.o: bits must be one of"),
        ("blocks.1.o", 3, "blocks.1.o: not a spec: '3'"),
        ("blocks.1.o", "4b-g128", "4b-g128 does not divide rows of 192; .* or 4b-pc"),
        ("blocks.1.k", "3b-pc", "blocks.1.q is 2b-pc, but blocks.1.k is 3b-pc: servers fuse them"),
        ("blocks.1.k", "kept", "blocks.1.q is 2b-pc, but blocks.1.k is kept: servers fuse them"),
        ("blocks.7.o", "3b-pc", "the model has no layer 'blocks.7.o'; did you mean blocks"),
        ("zzz", "3b-pc", "the model has no layer 'zzz'; its first is blocks.0.q"),
    ],
)
def test_a_fault_is_named_with_its_line(tmp_path, name, spec, says):
    path = written(tmp_path / "plan.json", {name: spec})
    with pytest.raises(InputError, match=says) as caught:
        read(path)
    text = str(caught.value)
    assert "\n" not in text
    number = int(text.partition("line ")[2].partition(":")[0])
    line = path.read_text().splitlines()[number - 1].strip()
    # of two fused layers the second is named, whichever was edited
    assert line.startswith((f'"{name}":', '"blocks.1.q":'))


def test_fused_layers_may_differ_where_that_is_asked_for(tmp_path):
    path = written(tmp_path / "plan.json", {"blocks.1.k": "3b-pc"})
    assert read(path, independent=True)["blocks.1.k"] == QuantSpec(3)


def test_a_layer_that_is_left_out_is_a_fault(tmp_path):
    path = written(tmp_path / "plan.json", drop=["blocks.0.o"])
    with pytest.raises(InputError, match=r"says nothing about blocks.0.o; write 'kept'"):
        read(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "it is no JSON object"),
        ("{}", "holds no plan"),
        ('{"assignment": 3}', "must map layer names to specs"),
        ('{"assignment": {}, "bits": 3}', "unknown key 'bits'"),
        ('{"assignment": {"a": "3b-pc", "a": "2b-pc"}}', "has 'a' twice"),
        ('{"budget": "3bit", "stored_bits": 3.0}', "holds no plan"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, text, says):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        read(path)
    with pytest.raises(InputError, match="cannot read the plan"):
        read(tmp_path / "nowhere.json")
