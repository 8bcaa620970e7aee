"""The named options of `quantize` and `plan` in the words of a convolutional network's recipe.

Options are named once for all networks. What is a key of another name here is given that name, and
what means nothing for pictures is refused in one line that says what to do instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantforge.errors import UsageError
from quantforge.launcher import is_alone

ESTIMATOR = "calibrate.estimator"
SENSITIVITY = "search.sensitivity"
# HAWQ's eigenvalues are not estimated here, its later average of traces is.
ESTIMATORS: Mapping[str, str] = {
    "fisher": "fisher", "hawq": "hawq", "hawq-v2": "hawq", "measured": "measured",
}  # fmt: skip
# Key that an option sets → the option, and what to do.
REFUSED: Mapping[str, tuple[str, str]] = {
    "search.server": ("--server", "no server's rules are about convolutional networks: leave it "
                      "out; quantforge convert writes ONNX"),
    "search.tensor_parallel": ("--tp", "no server divides convolutional networks: leave it out"),
    "embeddings.include": ("--include-embeddings", "convolutional networks have no token "
                           "embedding: leave it out; --set search.edges=8b-pc is for the first "
                           "and the last layer"),
    "device": ("--latency-device", "layers of convolutional networks are timed on this machine: "
               "leave it out"),
    "training.minutes": ("--train-minutes", "convolutional networks are trained for so many steps: "
                         "give --set training.steps=500 instead"),
}  # fmt: skip


def vision_settings(
    settings: Mapping[str, Any] | None,
    *,
    plan: object = None,
    device: str = "cpu",
    fresh: bool = False,
    language: bool = False,
) -> dict[str, Any]:
    """The settings of a call that is about a convolutional network, under this recipe's keys.

    Args:
        settings: recipe keys as the options gave them.
        plan: the user's own.
        device: to compute on.
        fresh: whether earlier runs are to be left alone.
        language: whether the call has what only language models take: a tokenizer, or leave to run
            a model's own code.

    Raises:
        UsageError: it asks for what is of language models.
    """
    if plan is not None:
        raise UsageError("a plan of one's own is for language models: give a budget instead")
    if device != "cpu":
        raise UsageError(f"convolutional networks are compiled on the cpu: leave {device} out")
    if language:
        raise UsageError(
            "convolutional networks have no tokenizer and run no code of their own: leave "
            "tokenizer and --trust-remote-code out"
        )
    if fresh:
        raise UsageError(
            "convolutional networks keep nothing between runs, so that every run starts over: "
            "leave --fresh out"
        )
    if not is_alone():
        raise UsageError(
            "convolutional networks are compiled in one process: start it without a launcher"
        )
    made = dict(settings or {})
    for key, (option, reason) in REFUSED.items():
        if key in made:
            raise UsageError(f"{option} ({key}): {reason}")
    if ESTIMATOR in made:
        made[SENSITIVITY] = _sensitivity(str(made.pop(ESTIMATOR)))
    return made


def _sensitivity(estimator: str) -> str:
    if estimator not in ESTIMATORS:
        raise UsageError(
            f"--sensitivity {estimator} is for language models: give fisher, hawq (HAWQ-V2's "
            "traces) or measured"
        )
    return ESTIMATORS[estimator]
