r"""Writes what ggml's types make of a network's linears, for `weights:` rows of `bench_quality.py`.

    python scripts/peers/ggml_weights.py MODEL --calibration valid.txt --library FOLDER \
        --types Q2_K IQ3_XXS --output peers

FOLDER holds libggml-base of llama.cpp, whose own encoder quantizes; the `gguf` package decodes. The
importance matrix is what llama.cpp's `imatrix` gathers: the mean square of every input channel over
the calibration tokens. A block of these types is 256 weights of a row. Where a row is no multiple
of that, as few rows as need be are joined into one, and their importances with them: no llama.cpp
loads such a file, it only shows what the type can hold. Prints the stored bits of each type.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Mapping, Sequence
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quantforge.load.text import CalibrationConfig, calibration_set
from quantforge.loading import load_source
from quantforge.models import Model
from quantforge.progress import Monitor
from quantforge.recipe import compose, resolve_target

BLOCK = 256


@torch.no_grad()
def importances(model: Model, tokens: Tensor) -> dict[str, Tensor]:
    """Layer → [in] mean square of its input channels over [sequences, length] tokens."""
    sums: dict[str, Tensor] = {}
    handles = []
    for layer in model.layers:

        def add(_: nn.Module, inputs: tuple[Tensor, ...], name: str = layer.name) -> None:
            squares = inputs[0].flatten(0, -2).double().square().sum(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        handles.append(model.module.get_submodule(layer.name).register_forward_pre_hook(add))
    body: Any = model.module
    for sequence in tokens:
        body(input_ids=sequence[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: total / tokens.numel() for name, total in sums.items()}


def through(library: ctypes.CDLL, kind: Any, weight: Tensor, importance: Tensor) -> Tensor:
    """[out, in] float32 as the type holds it.

    Raises:
        SystemExit: no number of its rows makes whole blocks.
    """
    from gguf.quants import dequantize, quant_shape_to_byte_shape

    out_features, in_features = weight.shape
    joined = BLOCK // gcd(BLOCK, in_features)
    if out_features % joined:
        raise SystemExit(f"{out_features} rows of {in_features} are no whole blocks of {BLOCK}")
    rows = weight.float().reshape(out_features // joined, joined * in_features).contiguous()
    wide = importance.float().repeat(joined).contiguous()
    shape = quant_shape_to_byte_shape(tuple(rows.shape), kind)
    packed = np.zeros(shape, dtype=np.uint8)
    library.ggml_quantize_init(int(kind))
    written = library.ggml_quantize_chunk(
        int(kind),
        ctypes.c_void_p(rows.data_ptr()),
        packed.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0),
        ctypes.c_int64(rows.shape[0]),
        ctypes.c_int64(rows.shape[1]),
        ctypes.c_void_p(wide.data_ptr()),
    )
    if written != packed.nbytes:
        raise SystemExit(f"ggml wrote {written} bytes of {kind.name}, expected {packed.nbytes}")
    return torch.from_numpy(dequantize(packed, kind)).reshape(out_features, in_features)


def bits_of(kind: Any) -> float:
    """Stored bits a weight of a type."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return 8 * size / block


def written(
    library: ctypes.CDLL, kind: Any, model: Model, importance: Mapping[str, Tensor], folder: Path
) -> Path:
    """Write all linears of a network in a type's values; return the file."""
    weights = {}
    for layer in model.layers:
        linear: Any = model.module.get_submodule(layer.name)
        weights[layer.name] = through(
            library, kind, linear.weight.detach(), importance[layer.name]
        ).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"ggml_{kind.name}.safetensors"
    save_file(weights, path)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Write one file a type."""
    from gguf import GGMLQuantizationType

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("model", help="as everywhere")
    parser.add_argument("--calibration", required=True, help="text; its first windows are taken")
    parser.add_argument("--library", type=Path, required=True, help="folder of libggml-base.so")
    parser.add_argument("--types", nargs="+", required=True, help="e.g. Q2_K IQ3_XXS")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(argv)
    library = ctypes.CDLL(str(options.library / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    recipe = compose(resolve_target(options.model))
    model = load_source(recipe, "cpu", trust_remote_code=False, monitor=Monitor())
    text = CalibrationConfig(source=options.calibration)
    calibration = calibration_set(text, model, seed=0, monitor=Monitor(), fresh=False)
    tokens = torch.cat([calibration.fitting, calibration.held_out])
    importance = importances(model, tokens)
    for name in options.types:
        kind = GGMLQuantizationType[name]
        path = written(library, kind, model, importance, options.output)
        print(f"{path}: {bits_of(kind):g} stored bits, imatrix of {tokens.numel()} tokens")


if __name__ == "__main__":
    main()
