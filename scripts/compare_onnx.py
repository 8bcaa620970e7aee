"""A convolutional network's folder through its ONNX file: onnxruntime beside our runtime.

    quantforge quantize efficientnet-lite0 --budget 4bit --activations 8 -o out
    pip download --no-deps foolbox==3.3.4
    python scripts/compare_onnx.py out --pictures foolbox-*.whl --match '*imagenet_*'

Both run the same pictures. A step is the range of our logits over 255; a prediction that differs is
a tie where our two best logits are nearer to each other than twice the largest difference. "As the
graph says" has the fusion of QDQ nodes switched off, once without any optimisation and once with
all others; "default" lets onnxruntime put its integer operators in their place.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantforge.vision.checkpoint import load_network
from quantforge.vision.network import Simulation
from quantforge.vision.onnx_export import export_onnx
from quantforge.vision.pictures import load_pictures
from quantforge.vision.runtime import VisionRuntime

LEVELS = ("as the graph says, unoptimised", "as the graph says", "default")


def run_onnx(path: Path, pictures: Tensor, level: str) -> Tensor:
    """Logits of onnxruntime on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    plain = level == LEVELS[0]
    options.graph_optimization_level = levels.ORT_DISABLE_ALL if plain else levels.ORT_ENABLE_ALL
    if level != "default":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.from_numpy(session.run(None, {name: pictures.numpy()})[0])


def compared(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """How far two networks' logits are apart, in steps, and whose predictions differ."""
    step = float(ours.max() - ours.min()) / 255
    gaps = (theirs - ours).abs()
    largest = float(gaps.max())
    best = ours.topk(2).values
    differs = theirs.argmax(1) != ours.argmax(1)
    tied = (best[:, 0] - best[:, 1]) <= 2 * largest
    return {
        "largest_in_steps": largest / step,
        "mean_in_steps": float(gaps.mean()) / step,
        "pictures": len(ours),
        "same": int((~differs).sum()),
        "ties": int((differs & tied).sum()),
        "other": int((differs & ~tied).sum()),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", required=True)
    parser.add_argument("--match", default="*")
    parser.add_argument("--count", type=int, default=None)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    network = load_network(options.folder)
    pictures = load_pictures(
        options.pictures, network.network.preprocessing, channels=network.network.channels,
        count=options.count, match=options.match,
    ).inputs  # fmt: skip
    ours = VisionRuntime(network)(pictures)
    with torch.no_grad():
        found = {"simulation": compared(ours, Simulation(network).run(pictures))}
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(network, Path(folder) / "network.onnx")
        for level in LEVELS:
            found[f"onnxruntime, {level}"] = compared(ours, run_onnx(path, pictures, level))
    for name, row in found.items():
        print(
            f"{name}: at most {row['largest_in_steps']:.3f} steps (mean "
            f"{row['mean_in_steps']:.3f}), {row['same']} of {row['pictures']} predictions the "
            f"same, {row['ties']} ties, {row['other']} others"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
