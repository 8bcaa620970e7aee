"""Zero-shot tasks through lm-eval: its own by name, and local .jsonl files.

lm-eval scores the likelihoods that a network gives to answers; what is added here is the network as
it stands in memory (packed, on any device), files of one's own, scores question by question, so
that two networks are compared on the same questions, and errors in one line.

A line of a file is a question with choices or a text with its continuation:

    {"query": "...", "choices": ["...", "..."], "gold": 1}
    {"context": "...", "continuation": "..."}

For the first an answer is right if it is the likeliest ("acc"), or the likeliest by character
("acc_norm", which long answers do not lose); for the second if every token of the continuation is
the likeliest one ("acc"). Both are lm-eval's definitions, and so is the blank between the parts.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantforge.errors import CancelledError, InputError, UsageError
from quantforge.evaluate.windows import standard_error
from quantforge.files import parse_json
from quantforge.progress import Monitor
from quantforge.results import TaskDifference, TaskScore
from quantforge.silence import quiet

_CHOICE_KEYS = frozenset({"query", "choices", "gold"})
_CONTINUATION_KEYS = frozenset({"context", "continuation"})
_SUFFIX = ".jsonl"
_MISSING = (
    "zero-shot tasks need lm-eval, which is not installed: pip install 'lm-eval>=0.4.9' "
    "(the extra 'tasks')"
)


def run_tasks(
    module: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int = 0,
    batch_size: int = 1,
    seed: int = 0,
    monitor: Monitor,
) -> tuple[TaskScore, ...]:
    """Score a causal network on tasks.

    Args:
        module: a transformers network, packed or not, on its device.
        tokenizer: its own.
        tasks: names that lm-eval knows, or .jsonl files of the form above.
        limit: questions of every task, from the first on; None takes all.
        shots: solved examples before every question; local files have none.
        batch_size: sequences a forward pass.
        seed: of the choice of examples.
        monitor: told of every forward pass; asked to stop between them.

    Returns:
        One score for each metric of each task; a group's members one by one.

    Raises:
        InputError: a file is missing or malformed, a name is unknown, or its data cannot be read.
        UsageError: lm-eval is not installed, or examples are asked of a local file.
    """
    configured = require_tasks(tasks, shots)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # lm-eval wants a token before empty contexts, and looks for it in all others.
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    prefix = 0 if named == (None, None) else None
    with _silent(), _watched(module, monitor):
        try:
            network = HFLM(
                pretrained=module,
                tokenizer=tokenizer,
                batch_size=batch_size,
                prefix_token_id=prefix,
            )
            found: Any = simple_evaluate(
                model=network,
                tasks=configured,
                num_fewshot=shots,  # 0 too: some tasks have examples by default
                limit=limit,
                bootstrap_iters=0,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (CancelledError, MemoryError):
            raise
        except Exception as error:  # downloads, data sets and task definitions of other people
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(f"lm-eval cannot run {', '.join(tasks)}: {said}") from error
    return tuple(_scores(found))


def require_tasks(tasks: Sequence[str], shots: int) -> list[str | dict[str, Any]]:
    """The tasks as lm-eval takes them: names as they are, local files as definitions.

    Raises:
        InputError: a file is missing or malformed, or two have one name.
        UsageError: lm-eval is not installed, or examples are asked of a local file.
    """
    if find_spec("lm_eval") is None:
        raise UsageError(_MISSING)
    files = [name for name in tasks if name.endswith(_SUFFIX)]
    if files and shots:
        raise UsageError(f"{files[0]} has no solved examples: leave --shots at 0 for local files")
    names = Counter(name.removesuffix(_SUFFIX).rpartition("/")[2] for name in tasks)
    for name, times in names.items():
        if times > 1:
            raise InputError(f"{times} tasks are called {name}: rename a file or give it once")
    return [local_task(Path(name)) if name in files else name for name in tasks]


def local_task(path: Path) -> dict[str, Any]:
    """lm-eval's definition of the task that a .jsonl file holds.

    Raises:
        InputError: the file is missing, empty, or a line is of another form than the first.
    """
    questions = list(_read(path))
    choices = questions[0].keys() >= _CHOICE_KEYS
    for number, question in enumerate(questions, 1):
        problem = _choice_problem(question) if choices else _continuation_problem(question)
        if problem:
            raise InputError(f"{path}, line {number}: {problem}")
    shared = {
        "task": path.stem,
        "custom_dataset": lambda **_: _data_set(questions),
        "test_split": "test",
    }
    if choices:
        return shared | {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [_averaged("acc"), _averaged("acc_norm")],
        }
    return shared | {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",  # of choices lm-eval adds the blank itself
        "metric_list": [_averaged("acc")],
    }


def compared(first: Sequence[TaskScore], second: Sequence[TaskScore]) -> tuple[TaskDifference, ...]:
    """Differences of two networks' scores, question by question, first minus second."""
    others = {(score.task, score.metric): score for score in second}
    differences = []
    for score in first:
        other = others[score.task, score.metric]
        gaps = [a - b for a, b in zip(score.answers, other.answers, strict=True)]
        difference = TaskDifference(
            task=score.task,
            metric=score.metric,
            value=score.value - other.value,
            stderr=_error_of(gaps),
        )
        differences.append(difference)
    return tuple(differences)


def _averaged(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _data_set(questions: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(questions)}


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a file as objects, at least one."""
    if not path.is_file():
        raise InputError(f"the task {path} is not a file")
    read = 0
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = parse_json(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(question, dict):
            raise InputError(f"{path}, line {number}: not an object")
        read += 1
        yield question
    if not read:
        raise InputError(f"{path} has no questions")


def _choice_problem(question: Mapping[str, Any]) -> str:
    """What is wrong with a question with choices; empty if nothing is."""
    query, choices, gold = (question.get(key) for key in ("query", "choices", "gold"))
    if not isinstance(query, str) or not query.strip():
        return '"query" is not a text'
    if not isinstance(choices, list) or len(choices) < 2:
        return '"choices" is not a list of two or more'
    if not all(isinstance(one, str) and one.strip() for one in choices):
        return '"choices" has one that is not a text'
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        return f'"gold" is not one of 0 to {len(choices) - 1}'
    return ""


def _continuation_problem(question: Mapping[str, Any]) -> str:
    """What is wrong with a text and its continuation; empty if nothing is."""
    if not question.keys() >= _CONTINUATION_KEYS:
        return 'it has neither "query", "choices" and "gold" nor "context" and "continuation"'
    for key in sorted(_CONTINUATION_KEYS):
        if not isinstance(question[key], str) or not question[key].strip():
            return f'"{key}" is not a text'
    return ""


def _scores(found: Mapping[str, Any]) -> Iterator[TaskScore]:
    """What lm-eval measured, without the means of its groups."""
    for task, metrics in found["results"].items():
        samples = found["samples"].get(task)
        if samples is None:
            continue
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            raw = [one.get(metric) for one in samples if one.get("filter", chosen) == chosen]
            plain = all(isinstance(one, int | float) for one in raw)
            answers = tuple(float(one) for one in raw) if plain else ()
            yield TaskScore(
                task=task,
                metric=metric if chosen == "none" else key,
                value=float(value),
                stderr=_error_of(answers),
                questions=len(raw),
                answers=answers,
            )


def _error_of(answers: Sequence[float]) -> float:
    """Standard error of a mean of answers; not a number where there are none."""
    return standard_error(torch.tensor(answers, dtype=torch.float64)) if answers else math.nan


@contextmanager
def _watched(module: nn.Module, monitor: Monitor) -> Iterator[None]:
    """Report every forward pass, and stop before one if so asked."""
    passes = 0

    def before(*_: Any) -> None:
        nonlocal passes
        passes += 1
        monitor.step("tasks", passes, 0)

    handle = module.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _silent() -> Iterator[None]:
    """Keep lm-eval and what it calls from writing to the terminal."""
    logger = logging.getLogger("lm_eval")
    level, disabled = logger.level, logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with quiet(), redirect_stderr(StringIO()):  # progress bars without a switch
            yield
    finally:
        logging.disable(disabled)
        logger.setLevel(level)
