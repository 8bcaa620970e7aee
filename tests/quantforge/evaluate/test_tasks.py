"""Scores of tasks against likelihoods computed by hand, and what is wrong with a file."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from quantforge.errors import CancelledError, InputError, UsageError
from quantforge.evaluate.tasks import compared, local_task, require_tasks, run_tasks
from quantforge.evaluation import evaluate_tasks
from quantforge.load.huggingface import load_model
from quantforge.load.source import resolve_source
from quantforge.progress import Monitor
from quantforge.testing import save_tiny_checkpoint

CHOICES = [
    {"query": "Which one", "choices": ["this", "that other thing"], "gold": 0},
    {"query": "A longer question about", "choices": ["b", "ccc", "dddddd"], "gold": 2},
    {"query": "x", "choices": ["yy yy", "z"], "gold": 1},
    {"query": "Again", "choices": ["q", "rr"], "gold": 1},
    {"query": "The last", "choices": ["word", "of", "all"], "gold": 1},
]
CONTINUATIONS = [{"context": f"text {i}", "continuation": "e"} for i in range(4)]


def write(path: Path, lines) -> str:
    text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), steps=20)


@pytest.fixture(scope="module")
def tiny(folder):
    model = load_model(resolve_source(folder))
    return model.module, model.tokenizer


def likelihood(tiny, context: str, answer: str) -> tuple[float, bool]:
    """Logarithm of the answer's probability behind the context, and whether it is the likeliest."""
    module, tokenizer = tiny
    before, whole = (tokenizer(text)["input_ids"] for text in (context, context + " " + answer))
    answered = len(whole) - len(before)
    with torch.no_grad():
        logits = module(torch.tensor([whole])).logits[0, -answered - 1 : -1].double()
    tokens = torch.tensor(whole[-answered:])
    chosen = logits.log_softmax(-1)[range(answered), tokens]
    return float(chosen.sum()), bool((logits.argmax(-1) == tokens).all())


def test_choices_are_scored_by_likelihood_and_by_likelihood_a_character(tiny, tmp_path) -> None:
    file = write(tmp_path / "questions.jsonl", CHOICES)
    passes = []
    scores = run_tasks(*tiny, [file], monitor=Monitor(progress=passes.append))
    plain, normed = [], []
    for one in CHOICES:
        found = [likelihood(tiny, one["query"], choice)[0] for choice in one["choices"]]
        long = [value / len(text) for value, text in zip(found, one["choices"], strict=True)]
        plain.append(float(max(range(len(found)), key=found.__getitem__) == one["gold"]))
        normed.append(float(max(range(len(long)), key=long.__getitem__) == one["gold"]))
    assert [(s.task, s.metric, s.answers) for s in scores] == [
        ("questions", "acc", tuple(plain)),
        ("questions", "acc_norm", tuple(normed)),
    ]
    assert plain != normed  # else this test would not see the one in place of the other
    for score, answers in zip(scores, (plain, normed), strict=True):
        mean = sum(answers) / 5
        assert score.value == pytest.approx(mean)
        spread = sum((answer - mean) ** 2 for answer in answers) / 4
        assert score.stderr == pytest.approx(math.sqrt(spread / 5))
        assert score.questions == 5
    assert [event.stage for event in passes] == ["tasks"] * len(passes)
    assert len(passes) >= 5


def test_continuations_count_where_every_token_is_the_likeliest(tiny, tmp_path) -> None:
    module, tokenizer = tiny
    questions = [dict(one) for one in CONTINUATIONS]
    with torch.no_grad():  # the network's own answer to two of them, as far as it is a text
        for one in questions[:2]:
            ids = tokenizer(one["context"] + " ")["input_ids"]
            best = module(torch.tensor([ids])).logits[0, -1].argsort(descending=True)
            one["continuation"] = next(
                text for text in map(tokenizer.decode, best) if text.isalpha() and text.isascii()
            )
    file = write(tmp_path / "texts.jsonl", questions)
    (score,) = run_tasks(*tiny, [file], monitor=Monitor())
    expected = [likelihood(tiny, q["context"], q["continuation"])[1] for q in questions]
    assert score.answers == tuple(map(float, expected))
    (first,) = run_tasks(*tiny, [file], limit=1, monitor=Monitor())
    assert first.answers == score.answers[:1]
    assert math.isinf(first.stderr)


def test_two_networks_are_compared_question_by_question(folder, tmp_path) -> None:
    other = save_tiny_checkpoint(tmp_path / "other", steps=0, seed=5)
    file = write(tmp_path / "questions.jsonl", CHOICES)
    report = evaluate_tasks(folder, [file], against=other)
    assert [one.task for one in report.scores] == ["questions", "questions"]
    for first, second, gap in zip(
        report.scores, report.against_scores, report.differences, strict=True
    ):
        differences = [a - b for a, b in zip(first.answers, second.answers, strict=True)]
        assert gap.value == pytest.approx(sum(differences) / 5)
        spread = sum((one - gap.value) ** 2 for one in differences) / 4
        assert gap.stderr == pytest.approx(math.sqrt(spread / 5))
    same = compared(report.scores, report.scores)
    assert [(one.value, one.stderr) for one in same] == [(0.0, 0.0)] * 2


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "has no questions"),
        (["{"], "line 1: not JSON"),
        (["[1]"], "line 1: not an object"),
        ([{"text": "a"}], 'line 1: it has neither "query"'),
        ([CHOICES[0], {"query": "a"}], 'line 2: "choices" is not a list'),
        ([CHOICES[0] | {"query": " "}], '"query" is not a text'),
        ([CHOICES[0] | {"choices": ["a", 1]}], '"choices" has one that is not a text'),
        ([CHOICES[0] | {"gold": 2}], '"gold" is not one of 0 to 1'),
        ([CHOICES[0] | {"gold": True}], '"gold" is not one of 0 to 1'),
        ([CONTINUATIONS[0] | {"continuation": ""}], '"continuation" is not a text'),
    ],
)
def test_a_malformed_file_ends_in_one_line(tmp_path, lines, said) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines))
    with pytest.raises(InputError) as caught:
        local_task(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_cannot_be_run_is_said_before_a_network_is_loaded(tmp_path, monkeypatch) -> None:
    file = write(tmp_path / "questions.jsonl", CHOICES)
    for tasks, shots, error, said in (
        ([], 0, UsageError, "no task is named"),
        ([str(tmp_path / "nobody.jsonl")], 0, InputError, "is not a file"),
        ([file], 3, UsageError, "leave --shots at 0"),
        ([file, "questions"], 0, InputError, "2 tasks are called questions"),
    ):
        with pytest.raises(error, match=said):
            evaluate_tasks(tmp_path / "no-network", tasks, shots=shots)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match="pip install 'lm-eval"):
        require_tasks([file], 0)


@pytest.mark.parametrize("shots", [0, 3])
def test_a_task_gets_as_many_examples_as_are_asked_for_and_none_by_default(
    tiny, monkeypatch, shots
) -> None:
    given = {}

    def evaluate(**options):
        given.update(options)
        return {"results": {}, "samples": {}}

    monkeypatch.setattr("lm_eval.simple_evaluate", evaluate)
    assert run_tasks(*tiny, ["gsm8k"], shots=shots, monitor=Monitor()) == ()
    assert given["num_fewshot"] == shots  # None would be the task's own number, five of gsm8k


def test_an_unknown_task_is_one_line_and_a_cancelled_run_leaves_no_hook(tiny, tmp_path) -> None:
    with pytest.raises(InputError, match=r"^lm-eval cannot run no_such_task: [^\n]+$"):
        run_tasks(*tiny, ["no_such_task"], monitor=Monitor())

    class Set:
        def is_set(self) -> bool:
            return True

    file = write(tmp_path / "questions.jsonl", CHOICES)
    with pytest.raises(CancelledError):
        run_tasks(*tiny, [file], monitor=Monitor(cancel=Set()))
    assert not tiny[0]._forward_pre_hooks
