"""What `quantize` will take in time and memory, before it is started.

Time is counted in multiply-adds and divided by the rate at which this machine runs this network's
own forward pass, measured on one held-out sequence. With N planned weights, a head of H weights and
T fitting tokens, `quantize` makes

- T·N for every pass over the fitting tokens: one that looks at a block's inputs (one a stage with
  `true_sequential`), one that leaves the block, one more where the float network walks along;
- T·in² a stage for its gram, and again for the cross moment to the float network;
- in³ a stage to factor the gram, out·in² a layer to feed errors along rows, and out²·in from row to
  row where that is on;
- 4·(N + H) a tuned token: forward, again for the activations that were not kept, and backward twice
  as much; the same 4·N a step of learned rounding, N a held-out token that it is measured on;
- 4·(N + H) a token that is trained on, and as many minutes as are given; 4·N of each block by
  itself, and two passes over all tokens for what enters and leaves it;
- N + 2·H a token that is measured;
- 3·N + 2·H a token whose gradient is taken, where nothing was searched (else they are there).

The search over scales, serial loops of compensation and the disk are not counted, so the time is a
lower bound, unless `rounding.patience` ends blocks early: 22 s were estimated where a network of 6
blocks (10 M planned weights, 8,000 fitting tokens, two cores, no learned rounding) took 36 s, and
0.76 GB where it took 0.84 GB.

Memory is what the process holds now and what the largest stage adds: hidden states of the streams
and of the float network, integers of all layers, and the larger of one block's grams, factors and
latents or of tuning's copy of the head, logits of a chunk and kept activations; training adds float
weights, gradients and the optimizer's means to these. Where the network is in scratch files, what
is in these is no memory: float weights and integers drop out, and with them all that grows with
depth but what training holds, and what tuning keeps: the scales' own training (20 bytes a scale)
and what enters every block.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from quantforge.calibrate.fisher import LARGEST_OUTPUT_BLOCK
from quantforge.capture import compute_in
from quantforge.errors import ResourceError
from quantforge.memory import anonymous_bytes, available_bytes, peak_bytes, resident_bytes
from quantforge.methods.head_loss import HEAD_CHUNK
from quantforge.models import Head, Model
from quantforge.outcomes import WorkEstimate
from quantforge.quantize.config import CROSS_METHODS
from quantforge.recipe import Recipe
from quantforge.types import CalibrationSet, LayerInfo

_TRAINED = 16  # bytes a weight: float weight, its gradient and two running means
_MEASURED_WINDOWS = 3  # the plan, and before and after tuning, on `curve_windows` each
_LEARNED = 12  # bytes a weight: latents, mean gradients, the weight and its gradient in 16 bits
_SQUARES = 6  # of one stage: gram and cross moment twice (a lane, and those before), factor, work


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The numbers that the work depends on.

    Attributes:
        layers: the planned layers.
        head: weights of the head; 0 where there is none.
        hidden: features of the residual stream.
        fitting: fitting tokens.
        held_out: held-out tokens.
        curve: held-out tokens of `evaluate.curve_windows`.
        length: tokens a sequence.
        in_files: float weights and integers are in scratch files.
    """

    layers: tuple[LayerInfo, ...]
    head: int
    hidden: int
    fitting: int
    held_out: int
    curve: int
    length: int
    in_files: bool = False

    @classmethod
    def of(cls, model: Model, calibration: CalibrationSet, recipe: Recipe) -> Shape:
        """Of a loaded network and its calibration text."""
        embedding: Any = model.module.get_submodule(model.architecture.embedding)
        output = model.architecture.output(model.module)
        held_out = calibration.held_out
        return cls(
            layers=model.layers,
            head=output.weight.numel() if isinstance(output, Head) else 0,
            hidden=int(embedding.embedding_dim),
            fitting=calibration.fitting.numel(),
            held_out=held_out.numel(),
            curve=held_out[: recipe.evaluate.curve_windows].numel(),
            length=calibration.fitting.shape[1],
            in_files=model.scratch.on_disk,
        )

    @property
    def weights(self) -> int:
        """Planned weights."""
        return sum(layer.numel for layer in self.layers)

    @property
    def stages(self) -> list[list[LayerInfo]]:
        """Layers that read the same input."""
        found: dict[tuple[int, int], list[LayerInfo]] = {}
        for layer in self.layers:
            found.setdefault((layer.block, layer.stage), []).append(layer)
        return list(found.values())


def multiply_adds(shape: Shape, recipe: Recipe) -> int:
    """Multiply-adds of `quantize` after the search, as the module's header counts them."""
    options = recipe.quantize
    total = 0
    if options.sequential:
        floats = int(options.needs_float_stream)
        looks = 1
        if options.true_sequential:
            looks = max(len({x.stage for x in shape.layers if x.block == 0}), 1)
        total += shape.fitting * shape.weights * (looks + 1 + floats)
        for members in shape.stages:
            columns = members[0].in_features
            rows = sum(layer.out_features for layer in members)
            moments = 1 + int(options.method in CROSS_METHODS)
            total += shape.fitting * columns**2 * moments + columns**3
            if options.method != "rtn":
                total += rows * columns**2
            if options.needs_output_grams:
                total += sum(layer.out_features**2 for layer in members) * columns
    rounding, rounded = options.rounding, 0
    if rounding.steps:  # the start is measured too
        checks = 1 + -(-rounding.steps // rounding.check_every)
        trained = rounding.steps * rounding.batch * shape.length
        rounded = int(rounding.share * (trained + checks * shape.held_out / 4))
    tuned = options.tuning.steps * options.tuning.batch * shape.length
    training = recipe.training
    tuned += training.tokens
    if training.block_steps:
        rounded += training.block_steps * training.batch * shape.length
        total += 2 * (shape.fitting + shape.held_out) * shape.weights
    total += 4 * (rounded * shape.weights + tuned * (shape.weights + shape.head))
    scored = _MEASURED_WINDOWS * shape.curve + 2 * shape.held_out
    if training.tokens:  # at the start, on the way, and before and after
        scored += 2 * (2 + -(-training.tokens // training.evaluate_every)) * shape.curve
    return total + scored * (shape.weights + 2 * shape.head)


def states_bytes(
    shape: Shape, recipe: Recipe, *, gradients: bool = True, hidden: bool = True
) -> int:
    """Disk that calibration takes at its peak beside the candidates' integers.

    Args:
        shape: of network and text.
        recipe: effective configuration.
        gradients: there is a backward pass: what enters every block on the way to it, the gradients
            noted for a resumed run, and the output grams and tokens' squares that it leaves.
        hidden: what enters the head is kept.
    """
    options = recipe.calibrate
    head = 2 * shape.fitting * shape.hidden if hidden else 0
    if not gradients:
        return head
    size = 2 if options.precision == "bfloat16" else 4
    tokens = min(options.gradient_sequences * shape.length, shape.fitting)
    blocks = len({layer.block for layer in shape.layers})
    entrances = (blocks * size + 4) * tokens * shape.hidden
    grams = 0
    if recipe.quantize.needs_output_grams:
        grams = 2 * sum(
            layer.out_features * min(layer.out_features, LARGEST_OUTPUT_BLOCK)
            for layer in shape.layers
        )
    if recipe.quantize.weighs_tokens:
        grams += 2 * len(shape.layers) * shape.fitting
    return entrances + grams + head


def gradient_adds(shape: Shape, recipe: Recipe) -> int:
    """Multiply-adds of the backward passes: to every block's entrance, and there and back again."""
    tokens = shape.fitting
    if not recipe.quantize.weighs_tokens:
        tokens = min(recipe.calibrate.gradient_sequences * shape.length, shape.fitting)
    return tokens * (3 * shape.weights + 2 * shape.head)


def added_bytes(shape: Shape, recipe: Recipe) -> int:
    """Memory that the largest stage of `quantize` takes beside the float network."""
    options = recipe.quantize
    held = 0 if shape.in_files else shape.weights  # of which a byte or four each are kept
    streams = block = 0
    if options.sequential:
        walking = shape.fitting + (shape.held_out if options.needs_held_out else 0)
        streams = 4 * walking * shape.hidden * (1 + int(options.needs_float_stream))
        squares = max(layer.in_features**2 for layer in shape.layers)
        if options.needs_output_grams:
            squares += max(layer.out_features**2 for layer in shape.layers)
        block = 4 * _SQUARES * squares
        if options.rounding.steps:
            block += _LEARNED * sum(x.numel for x in shape.layers if x.block == 0)
    training = recipe.training
    after = options.tuning.steps > 0 or training.on
    taught = 2 * shape.fitting * shape.hidden if after else 0
    tuning = 0
    if after:
        blocks = len({layer.block for layer in shape.layers})
        inside = sum(x.in_features + x.out_features for x in shape.layers if x.block == 0)
        kept = 4 * shape.length * (shape.hidden * blocks + inside)
        vocabulary = shape.head // shape.hidden
        tuning = 2 * shape.head + 3 * 4 * HEAD_CHUNK * vocabulary + kept
    if training.needs_originals:
        streams += 4 * held
    if training.on:  # beside what is in the place of the network's own weights
        size = 2 if training.precision == "bfloat16" else 4
        tuning += (_TRAINED + 2 * size) * shape.weights - 4 * held
    if training.block_steps:
        entering = 2 * 4 * (shape.fitting + shape.held_out) * shape.hidden
        own = (_TRAINED + 4) * sum(x.numel for x in shape.layers if x.block == 0)
        tuning = max(tuning, entering + own + 4 * held)
    return held + taught + max(streams + block, tuning)


@torch.no_grad()
def forward_rate(model: Model, calibration: CalibrationSet, recipe: Recipe) -> float:
    """Multiply-adds a second of the network's blocks on one held-out sequence, the faster of two.

    A pass before them warms caches and compiled products up.
    """
    body = model.architecture.body(model.module)
    tokens = calibration.held_out[:1].to(model.device)
    fastest = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        with compute_in(recipe.quantize.precision, body, model.device):
            body(input_ids=tokens, use_cache=False)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        fastest = min(fastest, time.perf_counter() - began)
    return tokens.numel() * sum(layer.numel for layer in model.layers) / fastest


def estimate(
    model: Model, calibration: CalibrationSet, recipe: Recipe, *, gradients: bool = False
) -> WorkEstimate:
    """Time and memory of `quantize` for any plan: they hardly depend on which.

    Args:
        model: the network.
        calibration: its text.
        recipe: effective configuration.
        gradients: they are still to be taken, because nothing was searched.
    """
    shape = Shape.of(model, calibration, recipe)
    work = multiply_adds(shape, recipe)
    if gradients:
        work += gradient_adds(shape, recipe)
    rate = forward_rate(model, calibration, recipe)
    if shape.in_files:
        memory = (anonymous_bytes() or 0) + added_bytes(shape, recipe)
    else:
        memory = max((resident_bytes() or 0) + added_bytes(shape, recipe), peak_bytes() or 0)
    return WorkEstimate(
        multiply_adds=work,
        rate=rate,
        seconds=work / rate + 60.0 * recipe.training.minutes,
        memory_bytes=memory * model.share.here,
    )


def require_memory(model: Model, calibration: CalibrationSet, recipe: Recipe) -> None:
    """Refuse to quantize where memory cannot hold the largest stage, before hours are spent on it.

    Args:
        model: the network, loaded.
        calibration: its text.
        recipe: effective configuration.

    Raises:
        ResourceError: there is too little memory left.
    """
    if model.device.type != "cpu":  # most of it is the device's own
        return
    wanted = added_bytes(Shape.of(model, calibration, recipe), recipe)
    left = available_bytes(model.share.here)
    if left is None or wanted <= left:
        return
    remedies = ["set calibration.sequences lower"]
    if recipe.training.on or recipe.training.block_steps:
        remedies.append("leave training out")
    elif recipe.quantize.rounding.steps:
        remedies.append("set quantize.rounding.steps=0")
    each = ""
    if model.share.here > 1:
        remedies.append("start fewer processes on this machine")
        each = f" in each of {model.share.here} processes"
    raise ResourceError(
        f"quantizing takes at least {wanted / 1e9:.2f} GB of memory beside the network{each}, of "
        f"which {left / 1e9:.2f} GB are left: {' or '.join(remedies)}"
    )
