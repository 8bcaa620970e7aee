"""This project as a contestant: "rtn", "gptq", "gptaq", "foem" or "learned". See `task`.

Settings are recipe keys. "learned" is learned rounding of 50 steps a block, started from the
compensated weights; the gradients that weight its loss are part of what is timed. Where something
is chosen on held-out tokens, every eighth sequence of the token file is held out; otherwise all of
them are fitted on, as a peer does. Scales are not tuned afterwards, and nothing is read from or
written to the cache of measurements.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

from task import Answer, Task, keep_stdout, parse, read_tokens

if TYPE_CHECKING:
    from quantforge.models import Model
    from quantforge.recipe import Recipe
    from quantforge.types import BitPlan, CalibrationSet

SEED = 0
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"quantize.method": "rtn"},
    "gptq": {"quantize.method": "gptq"},
    "gptaq": {"quantize.method": "gptaq"},
    "foem": {"quantize.method": "foem"},
    "learned": {"quantize.method": "gptq", "quantize.rounding.steps": 50},
}


def main() -> None:
    """Quantize and answer."""
    task, reply, answer = parse(), keep_stdout(), Answer()
    import torch

    torch.set_num_threads(task.threads)
    from quantforge.load.huggingface import load_model
    from quantforge.load.source import resolve_source
    from quantforge.progress import Monitor
    from quantforge.quantize.sequential import quantize_sequentially

    model = load_model(resolve_source(task.model))
    recipe = configuration(task)
    if recipe.quantize.needs_output_grams or recipe.quantize.weighs_tokens:
        raise SystemExit("output grams and weighted tokens are not made here")
    calibration = tokens_for(recipe, task)
    plan = uniform(model, task)
    with answer.timed():
        weights = channel_weights(model, calibration, recipe)
        finished = quantize_sequentially(
            model,
            plan,
            calibration,
            dict.fromkeys(plan.assignment),
            recipe.quantize,
            channel_weights=weights,
            generator=torch.Generator().manual_seed(SEED),
            monitor=Monitor(),
        )
        made = {one.layer.name: one.weight for one in finished if one.weight is not None}
    answer.versions = {"torch": importlib.metadata.version("torch")}
    fitted, held_out = len(calibration.fitting), len(calibration.held_out)
    answer.notes.append(f"{fitted} sequences fitted on, {held_out} held out")
    answer.send(reply, {n: weight.dequantize() for n, weight in made.items()}, task.output)


def configuration(task: Task) -> Recipe:
    """The recipe of the method."""
    from quantforge.recipe import compose, resolve_target

    alone = {"quantize.output_feedback": False, "quantize.rounding.steps": 0}  # as published
    settings = {"quantize.batch_size": task.batch, **alone, **METHODS[task.method], **task.settings}
    return compose(resolve_target(task.model), settings=settings)


def tokens_for(recipe: Recipe, task: Task) -> CalibrationSet:
    """All sequences for fitting, unless something is chosen on held-out ones."""
    from quantforge.load.batches import from_batches, make_set

    tokens = read_tokens(task.tokens)
    if recipe.quantize.needs_held_out:
        return from_batches(tokens, held_out_share=recipe.calibration.held_out_share)
    return make_set(tokens, tokens[:0], "the token file")


def uniform(model: Model, task: Task) -> BitPlan:
    """The same grid for every layer."""
    from quantforge.search.allocate import average_bits
    from quantforge.types import BitPlan, QuantSpec

    spec = QuantSpec(task.bits, task.group_size, task.symmetric)
    assignment = dict.fromkeys((layer.name for layer in model.layers), spec)
    stored, code = average_bits(model.layers, assignment)
    return BitPlan(
        assignment=assignment,
        budget=f"uniform {spec}",
        stored_bits=stored,
        code_bits=code,
        predicted_loss=0.0,
        solver="uniform",
    )


def channel_weights(model: Model, calibration: CalibrationSet, recipe: Recipe) -> list[Any]:
    """Per block, how much the loss depends on its output's channels; ones where nobody asks."""
    import torch

    from quantforge.calibrate.fisher import gradient_statistics
    from quantforge.calibrate.token_loss import sampled_labels
    from quantforge.progress import Monitor

    if recipe.quantize.rounding.steps == 0:
        embedding: Any = model.module.get_submodule(model.architecture.embedding)
        blocks = model.architecture.block_names(model.module)
        return [torch.ones(int(embedding.embedding_dim)) for _ in blocks]
    found = gradient_statistics(
        model,
        calibration.fitting[: recipe.calibrate.gradient_sequences],
        batch_size=recipe.calibrate.gradient_batch,
        precision=recipe.calibrate.precision,
        head_gradient=sampled_labels(torch.Generator().manual_seed(SEED)),
        monitor=Monitor(),
    )
    return list(found.channels)


if __name__ == "__main__":
    main()
