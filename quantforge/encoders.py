"""What encoders and decoders cannot be asked, refused before the work.

An encoder predicts no tokens: it has no KL divergence, no perplexity and no next tokens to be
trained on; a decoder has no pooled output.
"""

from __future__ import annotations

from quantforge.errors import UsageError
from quantforge.models import Model
from quantforge.recipe import Recipe
from quantforge.search.budget import Budget

# Kinds of targets by whether the network is an encoder.
_TARGETS = {True: ("cosine",), False: ("kl", "ppl")}


def require_answerable(model: Model, recipe: Recipe, limit: Budget | None) -> None:
    """Refuse a recipe or budget that asks for what the network does not have.

    Args:
        model: the network.
        recipe: effective configuration.
        limit: the budget; None where there is none.

    Raises:
        UsageError: it does; the message says what to ask for instead.
    """
    encodes, kind = model.architecture.encodes, type(model.module).__name__
    for target in () if limit is None else limit.targets:
        if target.kind not in _TARGETS[encodes]:
            other = "no classifier" if target.kind == "acc" else "no encoder"
            what = "an encoder, which predicts no tokens" if encodes else other
            instead = "cosine:0.99" if encodes else "kl:0.05 or ppl:+2%"
            raise UsageError(f"{target.text}: {kind} is {what}; give {instead}, or a size")
    if limit is not None and limit.operations:
        raise UsageError(
            f"{limit.text}: bit operations are of convolutional networks, and {kind} is none; give "
            "a latency"
        )
    if not encodes:
        return
    if limit is not None and any(one.kind == "vram" for one in limit.sizes):
        raise UsageError(
            f"{limit.text}: {kind} is an encoder and keeps no keys and values; give bytes, "
            "e.g. 20MB"
        )
    training = recipe.training
    refused = {
        "calibrate.estimator=empirical-fisher": recipe.calibrate.estimator == "empirical-fisher",
        "training.cross_entropy": training.cross_entropy > 0,
        "training.teacher_top_k": training.teacher_top_k > 0,
        "training.optimizer=sophia": training.on and training.optimizer == "sophia",
    }
    for name, asked in refused.items():
        if asked:
            raise UsageError(
                f"{name} is about next tokens, and {kind} is an encoder, which predicts none; "
                "leave it out"
            )
