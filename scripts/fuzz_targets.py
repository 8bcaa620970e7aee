"""The inputs that are broken, and what reads them.

A kind is one file of a valid tiny artefact, a mutation and the public entries that read it. Beside
every broken file lie the baits: a pickle and a Python module that leave a mark when they are
opened, and a file outside the folder that names with `..` lead to.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_mutations as mutations

import quantforge
from quantforge.errors import InputError
from quantforge.files import write_json
from quantforge.format.manifest import plan_to_dict
from quantforge.latency import ProfileReport, TimedLayer, latency_model, write_table
from quantforge.load.huggingface import load_model, load_tokenizer
from quantforge.load.source import resolve_source
from quantforge.load.text import (
    CalibrationConfig,
    bos_rule,
    calibration_set,
    evaluation_windows,
)
from quantforge.models import Model
from quantforge.opening import limit_of, open_job
from quantforge.plan_file import read_assignment, read_fixed
from quantforge.recipe import Recipe, load_recipe
from quantforge.testing import markov_tokens, plan_of, save_tiny_checkpoint, write_quantized
from quantforge.types import QuantSpec

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again. " * 20
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
RECIPE = """\
schema_version: 1
description: "broken on purpose"
architecture: llama
model: {package: some-package, version: 1.2.3, file: "*.gguf", wheel_sha256: "%s",
  description: tiny, licence: MIT}
budget: 3bit
device: a100
calibration: {source: pydoc, sequences: 16, sequence_length: 64, held_out_share: 0.25}
calibrate: {damping: 0.01}
search: {solver: uniform, bits: [3], group_sizes: [64], refine: 0, server: vllm}
embeddings: {}
quantize: {method: gptq, damping: [0.01], tuning: {steps: 3}}
export: {shard_bytes: 1000000}
evaluate: {curve_windows: 2}
""" % ("0" * 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """Valid artefacts, made once.

    Attributes:
        root: holds `valid/<artefact>` and every case.
        model: the tiny network with its tokenizer.
    """

    root: Path
    model: Model

    @classmethod
    def open(cls, root: Path) -> Workshop:
        """Make every artefact under `root`."""
        valid = root / "valid"
        plain = save_tiny_checkpoint(valid / "float", blocks=1, steps=0)
        settings = plain / "tokenizer_config.json"
        known = json.loads(settings.read_bytes())
        settings.write_text(json.dumps({**known, "chat_template": TEMPLATE}), encoding="utf-8")
        _with_baits(plain, root)
        _with_baits(save_tiny_checkpoint(valid / "shards", blocks=1, steps=0, shards=3), root)
        model = load_model(resolve_source(plain))
        assignment: dict[str, Any] = {layer.name: QuantSpec(4, 32) for layer in model.layers}
        for name, shard_bytes in (("packed", 1 << 30), ("packed-shards", 20_000)):
            folder = valid / name
            write_quantized(folder, model.module, assignment, shard_bytes=shard_bytes)
            shutil.copyfile(plain / "tokenizer.json", folder / "tokenizer.json")
            write_json(folder / "run.json", {"source": {"location": str(plain)}})
            _with_baits(folder, root)
        _write_gguf(valid / "gguf" / "model.gguf", model)
        _write_texts(valid / "texts")
        (valid / "recipe").mkdir()
        (valid / "recipe" / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        (valid / "plan").mkdir()
        write_json(valid / "plan" / "plan.json", plan_to_dict(plan_of(assignment)))
        _write_profile(valid / "profile" / "profile.json")
        return cls(root=root, model=model)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One broken input.

    Attributes:
        workshop: what is valid.
        file: the broken file, in a copy of its artefact's folder.
        output: where a conversion may write.
    """

    workshop: Workshop
    file: Path
    output: Path

    @property
    def folder(self) -> Path:
        """The broken artefact's folder."""
        return self.file.parent


Entry = Callable[[Case], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Inputs of one kind.

    Attributes:
        artefact: folder of the valid artefact.
        file: which of its files is broken.
        mutate: how.
        entries: who reads it; each is called, whatever became of the others.
    """

    artefact: str
    file: str
    mutate: mutations.Mutation
    entries: tuple[Entry, ...]


def _with_baits(folder: Path, root: Path) -> None:
    """Lay a pickle, which runs a command when it is opened, and a module into a folder."""
    mark = root / "ran"
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    (folder / "model.bin").write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n", encoding="utf-8")


def _write_gguf(path: Path, model: Model) -> None:
    from gguf import GGUFWriter

    parts = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    network: Any = model.module
    path.parent.mkdir()
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(256)
    vocabulary = sorted(model.tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(token for token, _ in vocabulary[:-1]), "ab"])  # what is merged
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges(["a b"])
    tensors = {"token_embd": network.model.embed_tokens, "output_norm": network.model.norm}
    block = network.model.layers[0]
    tensors |= {f"blk.0.{name}": block.get_submodule(part) for name, part in parts.items()}
    for name, part in tensors.items():
        writer.add_tensor(f"{name}.weight", part.weight.detach().numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_texts(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    chat = [{"role": "user", "content": TEXT[:150]}, {"from": "gpt", "value": TEXT[:150]}]
    rows: list[Mapping[str, Any]] = [
        {"text": TEXT[:400]}, {"messages": chat}, {"context": TEXT[:200], "continuation": "yes"},
        {"prompt": TEXT[:200], "response": TEXT[:200]},
    ]  # fmt: skip
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    table = pyarrow.table({"text": [TEXT[:100]] * 20, "number": list(range(20))})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")


def _write_profile(path: Path) -> None:
    times = {"median": 1e-4, "p20": 9e-5, "p80": 2e-4}
    rows = tuple(
        TimedLayer(out_features=64, in_features=64, spec=spec, **times)
        for spec in ("3b-pc", "kept")
    )
    report = ProfileReport(
        model="tiny", output=str(path), machine=("x",), backend="reference", dtype="float32",
        batch=1, threads=1, repeats=3, rows=rows,
    )  # fmt: skip
    write_table(report, path)


def _mutate_config(data: bytes, generator: random.Random) -> bytes:
    """A configuration that is broken, or that names code of its own or sizes without sense."""
    document = json.loads(data)
    match generator.randrange(5):
        case 0:
            document["auto_map"] = {
                "AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model",
                "AutoTokenizer": ["evil.Tokenizer", "evil.Fast"],
            }  # fmt: skip
            document[generator.choice(("model_type", "tokenizer_class", "x"))] = "evil"
        case 1:
            sizes = [key for key, value in document.items() if type(value) is int]
            for key in generator.sample(sizes, min(len(sizes), generator.choice((1, 2)))):
                document[key] = generator.choice(mutations.NUMBERS)
        case _:
            return mutations.mutate_json(data, generator)
    return json.dumps(document).encode()


def _float(case: Case) -> None:
    load_model(resolve_source(case.folder))


def _gguf(case: Case) -> None:
    load_model(resolve_source(case.file))


def _inspect(case: Case) -> None:
    quantforge.inspect(case.folder)


def _check(case: Case) -> None:
    quantforge.check(case.folder, tensor_parallel=2)


def _load(case: Case) -> None:
    quantforge.load(case.folder, dtype=None, backend="reference")


def _convert(case: Case) -> None:
    quantforge.convert(case.folder, output=case.output)


def _convert_gguf(case: Case) -> None:
    quantforge.convert(case.folder, output=case.output.with_suffix(".gguf"), layout="gguf")
    case.output.with_suffix(".gguf").unlink()


def _check_gguf(case: Case) -> None:
    quantforge.check(case.folder, server="llama.cpp")


def _source(case: Case) -> None:
    """Only as far as the float model that the folder says it was made from."""
    try:
        quantforge.evaluate(case.folder, text=case.folder / "none.txt", windows=1, window_length=8)
    except InputError as error:
        if "no text file" not in str(error):
            raise


def _tokenizer(case: Case) -> None:
    tokenizer = load_tokenizer(case.folder)
    if tokenizer is None:
        raise InputError("no tokenizer")
    texts = case.workshop.root / "valid" / "texts"
    bos_rule(tokenizer)
    for name in ("text.txt", "rows.jsonl"):
        evaluation_windows(str(texts / name), tokenizer, windows=2, length=16)


def _calibration(case: Case) -> None:
    config = CalibrationConfig(source=str(case.file), sequences=4, sequence_length=16, fewer=True)
    calibration_set(config, case.workshop.model, seed=0)


def _recipe(case: Case) -> None:
    limit_of(load_recipe(case.file), None, None)


def _plan(case: Case) -> None:
    """What `plan` and `quantize` do with a plan before anything is measured."""
    model, recipe = case.workshop.model, Recipe(budget="3bit")
    batches = [markov_tokens(2, 8, vocabulary=256, seed=seed) for seed in range(2)]
    open_job(model.module, recipe, plan=case.file, calibration=batches)


def _plan_layers(case: Case) -> None:
    read_assignment(case.file, case.workshop.model.layers, independent=True)
    read_fixed(case.file)


def _profile(case: Case) -> None:
    latency_model(str(case.file), None)


_PACKED: tuple[Entry, ...] = (_inspect, _check, _load, _convert)
_TO_GGUF: tuple[Entry, ...] = (_check_gguf, _convert_gguf)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
KINDS: Mapping[str, Kind] = {
    name: Kind(artefact=artefact, file=file, mutate=mutate, entries=entries)
    for name, artefact, file, mutate, entries in (
        ("float-weights", "float", _WEIGHTS, mutations.mutate_container, (_float,)),
        ("float-config", "float", "config.json", _mutate_config, (_float,)),
        ("float-index", "shards", _INDEX, mutations.mutate_json, (_float,)),
        ("generation", "float", "generation_config.json", mutations.mutate_json, (_float,)),
        ("tokenizer", "float", "tokenizer.json", mutations.mutate_json, (_tokenizer,)),
        ("tokenizer-config", "float", "tokenizer_config.json", _mutate_config, (_tokenizer,)),
        ("gguf", "gguf", "model.gguf", mutations.mutate_gguf, (_gguf,)),
        ("packed-weights", "packed", _WEIGHTS, mutations.mutate_container, _PACKED),
        ("packed-config", "packed", "config.json", _mutate_config, _PACKED),
        ("packed-index", "packed-shards", _INDEX, mutations.mutate_json, _PACKED),
        ("packed-generation", "packed", "generation_config.json", mutations.mutate_json, (_load,)),
        ("manifest", "packed", "quantforge.json", mutations.mutate_json, _PACKED),
        ("run", "packed", "run.json", mutations.mutate_json, (_source,)),
        ("recipe", "recipe", "recipe.yaml", mutations.mutate_yaml, (_recipe,)),
        ("plan", "plan", "plan.json", mutations.mutate_json, (_plan_layers, _plan)),
        ("profile", "profile", "profile.json", mutations.mutate_json, (_profile,)),
        ("text", "texts", "text.txt", mutations.mutate_text, (_calibration,)),
        ("lines", "texts", "rows.jsonl", mutations.mutate_lines, (_calibration,)),
        ("parquet", "texts", "rows.parquet", mutations.mutate_parquet, (_calibration,)),
        ("gguf-weights", "packed", _WEIGHTS, mutations.mutate_container, _TO_GGUF),
        ("gguf-config", "packed", "config.json", _mutate_config, _TO_GGUF),
        ("gguf-tokenizer", "packed", "tokenizer.json", mutations.mutate_json, _TO_GGUF),
    )
}


def make_case(workshop: Workshop, seed: int, *, broken: bool = True) -> tuple[str, Case]:
    """The input of a seed and the name of its kind; the seed alone decides both.

    Args:
        workshop: what is valid.
        seed: of the mutation.
        broken: False leaves the input as it was.
    """
    name = list(KINDS)[seed % len(KINDS)]
    kind = KINDS[name]
    room = workshop.root / "cases" / str(seed)
    folder = room / "input"
    shutil.copytree(workshop.root / "valid" / kind.artefact, folder)
    secret = room / "outside" / "secret.safetensors"
    secret.parent.mkdir()
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    secret.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    file = folder / kind.file
    if broken:
        file.write_bytes(kind.mutate(file.read_bytes(), random.Random(seed)))
    return name, Case(workshop=workshop, file=file, output=room / "output")
