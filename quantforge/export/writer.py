"""Writes a checkpoint as its tensors arrive, one tensor in memory at a time.

The folder gets sharded safetensors with an index, config.json with the quantization block,
generation_config.json and quantforge.json. The same tensors in the same order give the same bytes.
The caller gives a staging folder and moves it to its final name after `finish` and
`verify_checkpoint`; nothing here overwrites a file.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from quantforge.errors import ResourceError, UsageError
from quantforge.files import write_json
from quantforge.format import compressed
from quantforge.format.checkpoint import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from quantforge.format.container import DTYPE_NAMES, ContainerWriter, tensor_digest
from quantforge.format.manifest import Manifest, StoredTensor, tool_versions, write_manifest
from quantforge.format.sizes import size_report
from quantforge.results import SizeReport
from quantforge.types import BitPlan, QuantizedWeight, QuantSpec

GENERATION_CONFIG_NAME = "generation_config.json"
SHARD_BYTES = 5_000_000_000
# Of the source's config: replaced below, the old spelling of `dtype`, and a path of its machine.
_DROPPED_KEYS = ("quantization_config", "torch_dtype", "_name_or_path")


class CheckpointWriter:
    """Streams one checkpoint to disk.

    Use as a context manager, so that an error closes and removes unfinished files:

        with CheckpointWriter(staging, model_config=config, plan=plan, ignore=ignore) as writer:
            writer.add_tensor("model.embed_tokens.weight", embedding)
            writer.add_layer("model.layers.0.self_attn.q_proj", quantized)
            sizes = writer.finish()

    Args:
        folder: staging folder; made if missing, must hold no checkpoint.
        model_config: config of the float model, as JSON, with `architectures` and `model_type`.
        plan: what will be stored how; layers it keeps come through `add_tensor`.
        ignore: names of the linears outside the plan, e.g. ["lm_head"].
        generation_config: contents of generation_config.json; None writes none.
        seed: of the run, for the manifest.
        versions: tool → version, for the manifest; None asks the installed packages.
        shard_bytes: a shard is closed before it grows beyond this.
        dtype: of every kept floating tensor, and what config.json says; 16 bits wide.
        head: path of the output projection; its weight is not stored where the config ties it.
        stock_readable: refuse what transformers with compressed-tensors cannot load.

    Raises:
        UsageError: the plan asks for something stock tools cannot load, and that was not allowed.
        ValueError: arguments that contradict each other.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model_config: Mapping[str, Any],
        plan: BitPlan,
        ignore: Collection[str],
        generation_config: Mapping[str, Any] | None = None,
        seed: int = 0,
        versions: Mapping[str, str] | None = None,
        shard_bytes: int = SHARD_BYTES,
        dtype: torch.dtype = torch.bfloat16,
        head: str = "lm_head",
        stock_readable: bool = True,
    ) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"a checkpoint is written in bfloat16 or float16, got {dtype}")
        self.folder = Path(folder)
        self._model_config = dict(model_config)
        self._generation_config = generation_config
        self._plan = plan
        self._specs = {name: spec for name, spec in plan.assignment.items() if spec is not None}
        self._ignore = set(ignore) | (set(plan.assignment) - set(self._specs))
        self._seed = seed
        self._versions = dict(tool_versions() if versions is None else versions)
        self._shard_bytes = shard_bytes
        self._dtype = dtype
        self._stock_readable = stock_readable
        tied = bool(self._model_config.get("tie_word_embeddings"))
        self._tied_weight = f"{head}.weight" if tied else None
        self._tied_digest: str | None = None
        self._embedding_quantized = False
        self._stored: dict[str, StoredTensor] = {}
        self._written: set[str] = set()
        self._shards: list[tuple[Path, list[str]]] = []
        self._container: ContainerWriter | None = None
        self._finished = False
        self._check_arguments()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_NAME, SINGLE_NAME, INDEX_NAME):
            if (self.folder / name).exists():
                raise ValueError(f"{self.folder} already holds {name}; give an empty folder")

    def _check_arguments(self) -> None:
        if not self._model_config.get("architectures") or not self._model_config.get("model_type"):
            raise ValueError(
                "model_config names no architectures or no model_type; no one loads it"
            )
        both = sorted(self._ignore & set(self._specs))
        if both:
            raise ValueError(f"{both[0]} is both quantized and ignored")
        levels = [name for name, spec in self._specs.items() if spec.grid != "uniform"]
        if levels and self._stock_readable:
            raise UsageError(
                f"{levels[0]} is {self._specs[levels[0]]}, which only quantforge loads; use a "
                "uniform grid, or allow a checkpoint of our own format"
            )
        asymmetric = [name for name, spec in self._specs.items() if not spec.symmetric]
        if asymmetric and self._stock_readable:
            raise UsageError(
                f"{asymmetric[0]} is asymmetric, which transformers with compressed-tensors cannot "
                "load; use symmetric specs, or allow a checkpoint that only quantforge loads"
            )

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._container is not None:
            self._container.__exit__(kind or InterruptedError, error, traceback)
            self._container = None
        if not self._finished:
            for path, _ in self._shards:
                path.unlink(missing_ok=True)

    def add_layer(
        self,
        name: str,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        kind: Literal["linear", "embedding"] = "linear",
    ) -> None:
        """Store a quantized layer.

        Args:
            name: module path, in the plan with the spec of `weight`.
            weight: its codes and scales.
            bias: [out], stored in the checkpoint's dtype, or None.
            kind: what the module is.

        Raises:
            UsageError: an embedding, which stock tools cannot load, and that was not allowed.
            ValueError: the layer is not what the plan says, or was already stored.
        """
        planned: QuantSpec | None = self._specs.get(name)
        if planned != weight.spec:
            raise ValueError(f"{name} is {weight.spec}, the plan says {planned or 'kept'}")
        if kind == "embedding" and self._stock_readable:
            raise UsageError(
                f"{name} is a quantized embedding, which transformers with compressed-tensors "
                "cannot load; keep it, or allow a checkpoint that only quantforge loads"
            )
        for suffix, tensor in compressed.to_tensors(weight).items():
            self._store(f"{name}.{suffix}", tensor)
        if bias is not None:
            self.add_tensor(f"{name}.bias", bias)
        self._written.add(name)
        self._embedding_quantized |= kind == "embedding"

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Store a kept tensor; floating ones in the checkpoint's dtype, others as they are.

        The weight of a tied head is compared with what is stored, and not stored again.

        Raises:
            ValueError: the name is taken or belongs to a quantized layer, or the tensor has values
                that the checkpoint's dtype cannot hold.
        """
        if name.removesuffix(".weight") in self._specs:
            raise ValueError(f"{name} belongs to a layer that the plan quantizes")
        kept = tensor.detach()
        if kept.is_floating_point():
            kept = kept.to(self._dtype)
            if not bool(torch.isfinite(kept).all()):
                raise ValueError(f"{name} has values that are not finite in {self._dtype}")
        if name == self._tied_weight:
            self._tied_digest = tensor_digest(kept)
            return
        self._store(name, kept)

    def finish(self) -> SizeReport:
        """Close the shards, write the configuration and the manifest, count the sizes.

        Raises:
            ValueError: a planned layer never arrived, or a tied head differs from the embedding.
        """
        missing = [name for name in self._specs if name not in self._written]
        missing += [
            name
            for name in self._plan.assignment
            if name not in self._specs and f"{name}.weight" not in self._stored
        ]
        if missing:
            raise ValueError(f"{len(missing)} planned layers never arrived, first {missing[0]}")
        self._check_tied_head()
        self._close_shard()
        self._name_shards()
        config = {k: v for k, v in self._model_config.items() if k not in _DROPPED_KEYS}
        config["dtype"] = str(self._dtype).removeprefix("torch.")
        config["quantization_config"] = compressed.quantization_config(self._specs, self._ignore)
        write_json(self.folder / CONFIG_NAME, config)
        if self._generation_config is not None:
            write_json(self.folder / GENERATION_CONFIG_NAME, dict(self._generation_config))
        manifest = Manifest(
            plan=self._plan,
            seed=self._seed,
            versions=self._versions,
            stock_readable=self._stock_readable,
            tensors=self._stored,
        )
        write_manifest(self.folder, manifest)
        sizes = size_report(self.folder)
        self._finished = True
        return sizes

    def _store(self, name: str, tensor: Tensor) -> None:
        if name in self._stored:
            raise ValueError(f"tensor {name!r} was already stored")
        if self._container is not None:
            full = self._container.size_bytes + tensor.nbytes > self._shard_bytes
            if full and self._container.size_bytes:
                self._close_shard()
        with disk_errors(self.folder):
            if self._container is None:
                path = self.folder / f".shard-{len(self._shards) + 1:05d}.partial"
                self._container = ContainerWriter(path)
                self._shards.append((path, []))
            digest = self._container.add(name, tensor)
        self._shards[-1][1].append(name)
        self._stored[name] = StoredTensor(
            dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape), sha256=digest
        )

    def _close_shard(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            with disk_errors(self.folder):
                container.__exit__(None, None, None)

    def _name_shards(self) -> None:
        """Give the shards their final names, now that their number is known; write the index."""
        if len(self._shards) == 1:
            path, names = self._shards[0]
            self._shards[0] = (path.rename(self.folder / SINGLE_NAME), names)
            return
        weight_map = {}
        for number, (path, names) in enumerate(self._shards, start=1):
            file = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            self._shards[number - 1] = (path.rename(self.folder / file), names)
            weight_map.update(dict.fromkeys(names, file))
        total = sum(
            torch.Size(tensor.shape).numel() * _ITEM_SIZE[tensor.dtype]
            for tensor in self._stored.values()
        )
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self.folder / INDEX_NAME, index)

    def _check_tied_head(self) -> None:
        """A head the config ties must equal a stored tensor, or loading would change it.

        Tied to a quantized embedding it becomes that, as the plan wants.
        """
        if self._tied_digest is None or self._embedding_quantized:
            return
        if all(tensor.sha256 != self._tied_digest for tensor in self._stored.values()):
            raise ValueError(
                f"config.json ties {self._tied_weight}, but no stored tensor equals it; "
                "set tie_word_embeddings to false"
            )


_ITEM_SIZE = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A full disk while `folder` is written is a `ResourceError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"no space left to write {folder}; free some and resume") from error
        raise
