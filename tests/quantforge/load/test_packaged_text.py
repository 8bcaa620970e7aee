import sys
import threading

import pytest
import torch

from quantforge.capture import plain_attention
from quantforge.errors import CancelledError, InputError
from quantforge.load import packaged_text, text
from quantforge.load.huggingface import from_module
from quantforge.load.packaged_text import (
    PIECE_LENGTH,
    pydoc_text,
    remembered_tokens,
    sampled_tokens,
)
from quantforge.load.text import DEFAULT_TEXT, CalibrationConfig, calibration_set
from quantforge.memory import anonymous_bytes, trim_heap
from quantforge.progress import Monitor
from quantforge.scratch import IN_MEMORY, Scratch
from quantforge.testing import markov_tokens, tiny_llama, train

SMALL = {"sequences": 16, "sequence_length": 32}


@pytest.fixture(scope="module")
def learned():
    return from_module(train(tiny_llama(), steps=80))


def test_pydoc_text_is_long_and_starts_with_its_first_topic():
    text = pydoc_text()
    assert len(text) > 400_000
    assert text.startswith('The "assert" statement')
    assert pydoc_text() == text


def test_sampling_is_reproducible_and_follows_the_seed(model):
    first = sampled_tokens(model, 400, seed=1, monitor=Monitor())
    assert first.shape == (400,)
    assert first.dtype == torch.int64
    assert torch.equal(first, sampled_tokens(model, 400, seed=1, monitor=Monitor()))
    assert not torch.equal(first, sampled_tokens(model, 400, seed=2, monitor=Monitor()))


def test_a_prompt_gives_the_logits_of_a_plain_pass_and_the_head_sees_one_position(learned):
    """A head that is given many positions and keeps one is copied for every row of the batch."""
    tokens = markov_tokens(3, 12)
    with torch.no_grad():
        expected = learned.module(tokens).logits
    seen = []
    head = learned.module.get_submodule(learned.architecture.head)
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with plain_attention(learned.module):
        step, cache = packaged_text._step_function(learned), packaged_text._new_cache(learned, 16)
        found = [
            step(tokens[:, :8], cache),
            step(tokens[:, 8:9], cache),
            step(tokens[:, 9:], cache),
        ]
    handle.remove()
    assert seen == [1, 1, 1]
    for logits, position in zip(found, (7, 8, 11), strict=True):
        torch.testing.assert_close(logits, expected[:, position], rtol=0, atol=0.1)  # bfloat16
    assert expected.std() > 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_networks_copy_and_cache_are_in_scratch_files(tmp_path):
    """The same tokens, and less memory than the rounded weights and the cache take."""
    model = from_module(tiny_llama(hidden=256, intermediate=1024, blocks=8, vocabulary=64))
    weights = 2 * sum(one.numel() for one in model.module.parameters())
    rows, taken = [], []
    for scratch in (IN_MEMORY, Scratch(tmp_path)):
        model.scratch = scratch
        held: list[int] = []

        def look(_event, held=held):
            trim_heap()
            held.append(anonymous_bytes())

        trim_heap()
        before = anonymous_bytes()
        rows.append(sampled_tokens(model, 300, seed=0, monitor=Monitor(progress=look)))
        taken.append(max(held) - before)
    assert torch.equal(rows[0], rows[1])
    assert taken[1] < 0.5 * weights
    assert taken[1] < taken[0] - (
        0.7 * weights if packaged_text._fast_bfloat16(model.device) else 0
    )
    assert list(tmp_path.iterdir()) == []


def test_sampling_leaves_the_model_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    chosen = model.module.config._attn_implementation
    sampled_tokens(model, 200, seed=0, monitor=Monitor())
    assert model.module.config._attn_implementation == chosen
    assert all(torch.equal(before[n], t) for n, t in model.module.state_dict().items())
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}


def test_sampled_text_has_the_likelihood_of_the_model_itself(learned):
    """Samples at temperature 1 have, on average, the model's own entropy as their loss."""
    tokens = sampled_tokens(learned, 64 * PIECE_LENGTH, seed=0, monitor=Monitor())
    rows = tokens.view(-1, PIECE_LENGTH)
    with torch.no_grad():
        scores = learned.module(rows).logits[:, :-1].log_softmax(-1)
    entropy = -(scores.exp() * scores).sum(-1)
    loss = -scores.gather(-1, rows[:, 1:, None]).squeeze(-1)
    error = (loss - entropy).std() / loss.numel() ** 0.5
    assert abs((loss - entropy).mean()) < 5 * error + 0.02  # 0.02: bfloat16 against float32
    uniform = torch.randint(96, rows.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        noise = learned.module(input_ids=uniform, labels=uniform).loss
        chain = markov_tokens(64, PIECE_LENGTH, seed=77)
        real = learned.module(input_ids=chain, labels=chain).loss
    assert loss.mean() < noise - 1.0
    assert abs(loss.mean() - real) < 0.5


def test_low_temperature_is_greedy(learned):
    tokens = sampled_tokens(learned, 4 * PIECE_LENGTH, seed=0, monitor=Monitor(), temperature=1e-4)
    rows = tokens.view(-1, PIECE_LENGTH)
    with torch.no_grad():
        best = learned.module(rows).logits[:, :-1].argmax(-1)
    assert (best == rows[:, 1:]).float().mean() > 0.97  # the rest are ties in bfloat16


def test_chat_half_comes_after_the_template_opening(model, chat_tokenizer, monkeypatch):
    seen = []
    original = packaged_text._sample

    def record(given, prompts, *rest):
        seen.extend(prompts)
        return original(given, prompts, *rest)

    monkeypatch.setattr(packaged_text, "_sample", record)
    tokens = sampled_tokens(model, 5 * PIECE_LENGTH - 3, seed=0, monitor=Monitor())
    opening = chat_tokenizer("<user>", add_special_tokens=False)["input_ids"]
    assert seen == [[], [], [], opening, opening]
    assert len(tokens) == 5 * PIECE_LENGTH - 3


def test_special_tokens_never_open_a_text(model):
    model.tokenizer.add_special_tokens({"eos_token": "a"})
    special = model.tokenizer.convert_tokens_to_ids("a")
    assert special not in packaged_text._ordinary_tokens(model).tolist()


def test_cancel_and_progress(model):
    events = []
    sampled_tokens(model, 2 * PIECE_LENGTH, seed=0, monitor=Monitor(progress=events.append))
    assert len(events) == PIECE_LENGTH - 1
    assert {event.total for event in events} == {PIECE_LENGTH}
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        sampled_tokens(model, 256, seed=0, monitor=Monitor(cancel=cancel))


def test_a_sampled_text_is_kept_and_a_damaged_one_is_sampled_again(model, tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))
    count, expected = 2 * PIECE_LENGTH, sampled_tokens(model, 256, seed=3, monitor=Monitor())

    def remembered(seed):
        events = []
        monitor = Monitor(progress=events.append)
        return remembered_tokens(model, count, seed=seed, monitor=monitor), bool(events)

    first, again, other = remembered(3), remembered(3), remembered(4)
    assert (first[1], again[1], other[1]) == (True, False, True)
    assert torch.equal(first[0], expected)
    assert torch.equal(again[0], expected)
    assert not torch.equal(other[0], expected)
    events = []
    remembered_tokens(model, count, seed=3, monitor=Monitor(progress=events.append), fresh=True)
    assert events
    (_, path) = sorted((tmp_path / "sampled").iterdir(), key=lambda one: one.stat().st_mtime)
    path.write_bytes(b"damaged")
    found, sampled = remembered(3)
    assert sampled
    assert torch.equal(found, expected)
    monkeypatch.setenv("QUANTFORGE_CACHE", "/proc/nowhere")  # cannot be written
    assert torch.equal(remembered(3)[0], expected)


@pytest.mark.parametrize("changed", ["chat_template", "machine"])
def test_a_kept_text_is_for_what_it_was_sampled_with(
    model, chat_tokenizer, tmp_path, monkeypatch, changed
):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))
    made = []

    def sample(_, count, **__):
        made.append(torch.full((count,), len(made)))
        return made[-1]

    monkeypatch.setattr(packaged_text, "sampled_tokens", sample)

    def kept():
        return int(remembered_tokens(model, 5, seed=0, monitor=Monitor())[0])

    assert [kept(), kept()] == [0, 0]
    if changed == "chat_template":
        chat_tokenizer.chat_template = "{% for m in messages %}<other>{{ m.content }}{% endfor %}"
    else:
        monkeypatch.setattr(packaged_text, "machine_traits", lambda: ("another",))
    assert [kept(), kept()] == [1, 1]


def test_how_much_is_read_depends_on_what_it_costs(model, monkeypatch):
    monkeypatch.setattr(text, "SAMPLED_SEQUENCES", 4)
    monkeypatch.setattr(text, "DEFAULT_SEQUENCES", 6)
    counts = {
        source: sum(map(len, (found.fitting, found.held_out)))
        for source in ("pydoc", "self", "default")
        for found in [
            calibration_set(CalibrationConfig(source=source, sequence_length=8), model, seed=0)
        ]
    }
    assert counts == {"pydoc": 6, "self": 4, "default": 4}


def test_packaged_sources(model):
    found = {
        source: calibration_set(CalibrationConfig(source=source, **SMALL), model, seed=0)
        for source in ("pydoc", "self", "mix", "default")
    }
    for name, item in found.items():
        assert item.fitting.shape == (14, 32), name
        assert item.held_out.shape == (2, 32), name
    assert found["default"].fingerprint == found[DEFAULT_TEXT].fingerprint
    assert "pydoc_data.topics" in found["pydoc"].description
    assert "sampled from the model" in found["self"].description
    manual = torch.tensor(model.tokenizer(pydoc_text())["input_ids"])[: 8 * 32].view(8, 32)
    assert torch.equal(found["mix"].held_out[0], manual[7])
    assert torch.equal(found["mix"].fitting[:7], manual[:7])
    sampled = sampled_tokens(model, 8 * 32, seed=0, monitor=Monitor()).view(8, 32)
    assert torch.equal(found["mix"].held_out[1], sampled[7])
    with pytest.raises(InputError, match="at least 4 sequences"):
        config = CalibrationConfig(source="mix", sequences=3, sequence_length=8)
        calibration_set(config, model, seed=0)


def test_self_needs_no_tokenizer(learned):
    config = CalibrationConfig(source="self", **SMALL)
    found = calibration_set(config, learned, seed=0)
    assert int(found.fitting.max()) < 96
    with pytest.raises(InputError, match="no tokenizer"):
        calibration_set(CalibrationConfig(source="pydoc", **SMALL), learned, seed=0)
