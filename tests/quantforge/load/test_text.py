import json

import pytest
import torch
from pydantic import ValidationError

from quantforge.errors import InputError
from quantforge.load import documents as documents_module
from quantforge.load import text as text_module
from quantforge.load.documents import documents, joined
from quantforge.load.huggingface import from_module
from quantforge.load.text import (
    CalibrationConfig,
    calibration_set,
    describe_windows,
    evaluation_windows,
)
from quantforge.testing import tiny_llama

PLAIN = "".join(f"Sentence number {index} says something.\n" for index in range(200))


def config(source, **values):
    return CalibrationConfig(
        source=str(source), **{"sequences": 16, "sequence_length": 32} | values
    )


def all_rows(found):
    """Rows in the order of the text, for a share of 1/8."""
    fitting, held_out = found.fitting, found.held_out
    groups = zip(fitting.split(7), held_out.split(1), strict=True)
    return torch.cat([torch.cat(group) for group in groups])


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(source, tokenizer=None, **options):
    return [document.text for document in documents(str(source), tokenizer=tokenizer, **options)]


def test_plain_text_is_the_first_tokens_of_the_file(tmp_path, model):
    file = tmp_path / "a.txt"
    file.write_text(PLAIN)
    found = calibration_set(config(file), model, seed=0)
    expected = torch.tensor(model.tokenizer(PLAIN)["input_ids"])[: 16 * 32].view(16, 32)
    assert torch.equal(all_rows(found), expected)
    assert torch.equal(found.held_out, expected[7::8])
    assert found.description == (
        "a.txt, one text, no BOS (the tokenizer adds none): "
        "14 fitting and 2 held-out sequences of 32 tokens"
    )
    again = calibration_set(config(file), model, seed=1)
    assert again.fingerprint == found.fingerprint


def test_long_text_is_read_only_as_far_as_needed(tmp_path, model, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("é" + PLAIN)
    whole = torch.tensor(model.tokenizer("é" + PLAIN)["input_ids"])
    monkeypatch.setattr(text_module, "FIRST_READ", 64)
    monkeypatch.setattr(text_module, "CHARACTERS_A_TOKEN", 1)
    stream = text_module._plain_stream(file, model.tokenizer, 512)
    assert 512 + text_module.MARGIN_TOKENS <= len(stream) < len(whole) / 4
    assert torch.equal(stream[:512], whole[:512])
    assert torch.equal(text_module._plain_stream(file, model.tokenizer, 10**6), whole)


def test_a_short_text_gives_fewer_sequences_where_that_is_allowed(tmp_path, model):
    path = tmp_path / "short.txt"
    path.write_text("abcdefg " * 12, encoding="utf-8")
    settings = {"source": str(path), "sequences": 40, "sequence_length": 10}
    with pytest.raises(InputError, match="ask for at most"):
        calibration_set(CalibrationConfig(**settings), model, seed=0)
    data = calibration_set(CalibrationConfig(**settings, fewer=True), model, seed=0)
    whole = calibration_set(
        CalibrationConfig(**settings | {"sequences": len(data.fitting) + len(data.held_out)}),
        model, seed=0,
    )  # fmt: skip
    assert torch.equal(data.fitting, whole.fitting)
    assert f"{len(data.fitting)} fitting and {len(data.held_out)} held-out" in data.description
    assert 2 <= len(data.fitting) + len(data.held_out) < 40
    with pytest.raises(InputError, match="or shorter ones"):
        path.write_text("abc", encoding="utf-8")
        calibration_set(CalibrationConfig(**settings, fewer=True), model, seed=0)


def test_special_tokens_the_tokenizer_adds_are_kept_and_described(tmp_path, model):
    from tokenizers.processors import TemplateProcessing

    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="! $A", special_tokens=[("!", 0)]
    )
    file = write_lines(tmp_path / "a.jsonl", [{"text": "abc" * 30}] * 10)
    found = calibration_set(config(file), model, seed=0)
    stream = all_rows(found).flatten()
    assert (stream.view(-1)[::91] == 0).all()
    assert int((stream == 0).sum()) == 6
    assert "special tokens as the tokenizer adds them to every document (!)" in found.description


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "one", "id": 3}, "one"),
        ({"content": "two"}, "two"),
        ({"context": "It was", "continuation": "late"}, "It was late"),
        ({"context": "It was ", "continuation": "late"}, "It was late"),
        ({"prompt": "Why?", "response": "So."}, "Why?\nSo."),
        ({"messages": [{"role": "user", "content": "Hi"}], "prompt": "no"}, "Hi"),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, "Hi"),
    ],
)
def test_text_columns(tmp_path, suffix, row, expected):
    file = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write_lines(file, [row])
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    assert texts(file) == [expected]


def test_joined_adds_a_space_only_where_none_is():
    assert joined("a", "b") == "a b"
    assert joined("a\n", "b") == "a\nb"
    assert joined("a", " b") == "a b"
    assert joined("", "b") == "b"


def test_chat_template_rules(tmp_path, chat_tokenizer):
    chat = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
    turns = {"prompt": "Why?", "response": "So."}
    file = write_lines(tmp_path / "a.jsonl", [chat, {"text": "plain"}, turns])
    formatted = "<user>Hi</user><assistant>Yo</assistant>"
    assert texts(file, chat_tokenizer) == [formatted, "plain", "Why?\nSo."]
    assert texts(file, chat_tokenizer, chat_template="never") == ["Hi\nYo", "plain", "Why?\nSo."]
    assert texts(file, chat_tokenizer, chat_template="always") == [
        formatted,
        "<user>plain</user>",
        "<user>Why?</user><assistant>So.</assistant>",
    ]
    with pytest.raises(InputError, match="no chat template"):
        texts(file, None, chat_template="always")


def test_templated_documents_get_no_second_bos(tmp_path, model, chat_tokenizer):
    from tokenizers.processors import TemplateProcessing

    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="! $A", special_tokens=[("!", 0)]
    )
    rows = [{"messages": [{"role": "user", "content": "word " * 20}]}] * 10
    found = calibration_set(config(write_lines(tmp_path / "a.jsonl", rows)), model, seed=0)
    assert int((all_rows(found) == 0).sum()) == 0
    assert "10 of the documents through the chat template" in found.description


def test_template_that_refuses_names_the_row(tmp_path, chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    rows = [{"text": "a"}, {"messages": [{"role": "user", "content": "Hi"}]}]
    file = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError, match=r"a\.jsonl row 2 .*roles must alternate"):
        texts(file, chat_tokenizer)


def test_named_column(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"text": "no", "body": "yes"}])
    assert texts(file, column="body") == ["yes"]
    with pytest.raises(InputError, match="no column 'story'; columns: text, body"):
        texts(file, column="story")
    file = write_lines(tmp_path / "b.jsonl", [{"body": 3}])
    with pytest.raises(InputError, match="neither text nor messages"):
        texts(file, column="body")
    with pytest.raises(InputError, match=r"columns: body: name one with calibration\.column"):
        texts(file)


def test_unreadable_files(tmp_path, model):
    def refused(name, content, words):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words) as caught:
            calibration_set(config(tmp_path / name), model, seed=0)
        assert "\n" not in str(caught.value)

    refused("a.txt", b"  \n", "holds no text")
    refused("b.txt", b"\xff\xfe\x00", "not UTF-8")
    refused("c.txt", b"short", "holds 5 tokens, 16 sequences of 32 need 512.*or shorter ones")
    refused("d.jsonl", b'{"text": "a"}\n{"text": \n', "row 2 is not JSON")
    refused("e.jsonl", b"[1]\n", "row 1 is not a JSON object")
    refused("f.jsonl", b'{"text": " "}\n', "holds no text")
    refused("g.jsonl", b"", "holds no text")
    refused("h.parquet", b"PAR1 not really", "parquet")
    refused("i.csv", b"a,b", "unknown format")
    for missing in ("nowhere.txt", "nowhere.jsonl", "a/b.parquet", "nowhere"):
        with pytest.raises(InputError, match="no text"):
            calibration_set(config(missing), model, seed=0)


def test_hub_rows_are_streamed_and_an_unreachable_hub_is_one_line(monkeypatch):
    import datasets
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(InputError, match="organisation/data here") as caught:
        texts("organisation/data")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: "")
    asked = []

    def load(name, **options):
        asked.append((name, options))
        return iter([{"text": "first"}, {"text": "second"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts("organisation/data", split="validation") == ["first", "second"]
    assert asked == [("organisation/data", {"split": "validation", "streaming": True})]


def test_only_as_many_rows_are_read_as_tokens_are_needed(tmp_path, model, monkeypatch):
    rows = [{"text": "x" * 16}] * 300
    read = []
    original = documents_module._content
    monkeypatch.setattr(documents_module, "_content", lambda *a: read.append(1) or original(*a))
    calibration_set(config(write_lines(tmp_path / "a.jsonl", rows)), model, seed=0)
    assert len(read) == 64


def test_model_without_tokenizer_and_too_long_sequences(tmp_path, model):
    file = tmp_path / "a.txt"
    file.write_text(PLAIN)
    with pytest.raises(InputError, match="no tokenizer"):
        calibration_set(config(file), from_module(tiny_llama()), seed=0)
    with pytest.raises(InputError, match="exceed the model's context of 256"):
        calibration_set(config(file, sequence_length=257, sequences=2), model, seed=0)
    foreign = from_module(tiny_llama(vocabulary=64), tokenizer=model.tokenizer)
    with pytest.raises(InputError, match="vocabulary has 64"):
        calibration_set(config(file), foreign, seed=0)


def test_config_is_strict():
    for wrong in (
        {"sequence": 3},
        {"sequences": 1},
        {"held_out_share": 0.0},
        {"chat_template": "x"},
    ):
        with pytest.raises(ValidationError):
            CalibrationConfig(**wrong)


def test_evaluation_windows(tmp_path, model):
    file = tmp_path / "a.txt"
    file.write_text(PLAIN)
    found = evaluation_windows(str(file), model.tokenizer, windows=3, length=50)
    expected = torch.tensor(model.tokenizer(PLAIN)["input_ids"])[:150].view(3, 50)
    assert torch.equal(found, expected)
    assert describe_windows(str(file), model.tokenizer, found) == (
        "a.txt, first 3 windows of 50 tokens, no BOS (the tokenizer adds none)"
    )
    rows = [
        {"context": "He went", "continuation": "home"},
        {"context": "She", "continuation": "ran"},
    ]
    lines = write_lines(tmp_path / "b.jsonl", rows)
    found = evaluation_windows(str(lines), model.tokenizer, windows=1, length=19)
    assert model.tokenizer.decode(found[0]) == "He went homeShe ran"
    with pytest.raises(InputError, match="19 tokens, 2 windows of 19 need 38"):
        evaluation_windows(str(lines), model.tokenizer, windows=2, length=19)
    with pytest.raises(InputError, match="no tokenizer"):
        evaluation_windows(str(file), None, windows=1, length=8)
    with pytest.raises(InputError, match="0 windows"):
        evaluation_windows(str(file), model.tokenizer, windows=0, length=8)


def test_evaluation_on_the_manual_reads_what_calibration_does_not(model):
    found = evaluation_windows("pydoc", model.tokenizer, windows=2, length=50)
    assert found.shape == (2, 50)
    calibrated = calibration_set(config("pydoc"), model, seed=0)
    assert not set(map(tuple, found.tolist())) & set(map(tuple, all_rows(calibrated).tolist()))
    assert describe_windows("pydoc", model.tokenizer, found).startswith("the manual of Python ")
