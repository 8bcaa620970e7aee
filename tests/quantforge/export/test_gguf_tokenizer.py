"""A tokenizer in GGUF cuts and joins text as the folder's does, under llama.cpp's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGUFReader, TokenType
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import quantforge
from quantforge.errors import InputError, UsageError
from quantforge.export.gguf_tokenizer import read_tokenizer
from quantforge.planning import require_split
from quantforge.search.config import SearchConfig
from quantforge.testing import tiny_llama, write_quantized
from quantforge.types import QuantSpec

TEXT = "The quick brown fox jumps over 13 lazy dogs; the dogs don't mind it. Größe: 7\n" * 4
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)


def split(pattern):
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([cut, byte_level(False)])


def tokenizer_folder(folder: Path, *, rules=None, begin=False, ignore_merges=False) -> Path:
    """A folder with a byte-level tokenizer of 300 tokens, two of them special, and one added."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = rules or byte_level()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=299,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens(["[extra]"])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "bos_token": special[0], "eos_token": special[1], "chat_template": TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


def test_a_file_gives_back_the_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    module = tiny_llama(vocabulary=304)
    names = [name for name, _ in module.named_modules() if name.endswith("_proj")]
    write_quantized(tmp_path, module, dict.fromkeys(names, QuantSpec(4, 32)))
    tokenizer_folder(tmp_path)
    report = quantforge.convert(tmp_path, output=tmp_path / "out.gguf", layout="gguf")
    assert report.warnings == ()
    fields = GGUFReader(tmp_path / "out.gguf").fields
    stored = {name: field.contents() for name, field in fields.items() if "tokenizer" in name}
    assert stored["tokenizer.ggml.model"] == "gpt2"
    assert stored["tokenizer.ggml.pre"] == "gpt-2"
    assert stored["tokenizer.ggml.bos_token_id"] == 0
    assert stored["tokenizer.ggml.eos_token_id"] == 1
    assert stored["tokenizer.ggml.add_bos_token"] is False
    assert stored["tokenizer.chat_template"] == TEMPLATE
    tokens, kinds = stored["tokenizer.ggml.tokens"], stored["tokenizer.ggml.token_type"]
    assert tokens[:2] == ["<|im_start|>", "<|im_end|>"]
    assert tokens[299:] == ["[extra]", "[PAD300]", "[PAD301]", "[PAD302]", "[PAD303]"]
    assert kinds[:3] == [TokenType.CONTROL, TokenType.CONTROL, TokenType.NORMAL]
    assert kinds[299:] == [TokenType.USER_DEFINED, *[TokenType.UNUSED] * 4]
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    text = f"<|im_start|>{TEXT}<|im_end|> quick"
    ids = ours.encode(text).ids
    assert len(ids) < len(text) / 1.5  # merges are there
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("rules", "whole", "name"),
    [
        (byte_level(), False, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()]), False, "smollm"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(False), byte_level()]), False, "default"),
        (split(LETTERS + r"\p{N}" + REST), False, "qwen2"),
        (split(LETTERS + r"\p{N}{1,3}" + REST), True, "llama-bpe"),
        (split(LETTERS + r"\p{N}{1,3}" + REST), False, "default"),
        (split(LETTERS + r"\p{N}" + REST), True, "default"),
        (split(r"\w+|\s+"), False, "default"),
    ],
)
def test_rules_have_llama_cpps_name_or_a_warning(rules, whole, name, tmp_path):
    folder = tokenizer_folder(tmp_path, rules=rules, ignore_merges=whole)
    found = read_tokenizer(folder, 300)
    assert found.rules == name
    assert len(found.warnings) == (name == "default")


@pytest.mark.parametrize(
    ("normalizer", "known"),
    [
        (normalizers.NFC(), True),
        (normalizers.Sequence([normalizers.NFC()]), True),
        (normalizers.Sequence([]), True),
        (normalizers.Lowercase(), False),
        (normalizers.NFKC(), False),
        (normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]), False),
    ],
)
def test_a_normalizer_that_llama_cpp_has_not_is_a_warning(normalizer, known, tmp_path):
    file = tokenizer_folder(tmp_path, rules=split(LETTERS + r"\p{N}" + REST)) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.normalizer = normalizer
    tokenizer.save(str(file))
    found = read_tokenizer(tmp_path, 300)
    assert found.rules == ("qwen2" if known else "default")
    assert len(found.warnings) == (not known)


def test_added_tokens_that_look_special_are_control_tokens(tmp_path):
    folder = tokenizer_folder(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    control = ["<|a|>", "<\uff5cb\uff5c>", "<pad>", "<mask>", "<2mass>", "[@BOS@]", "<unused7>"]
    plain = ["<|a>", "<\uff5cb|>", "<padding>", "<unused", "[BOS]"]
    tokenizer.add_tokens([*control, *plain])
    tokenizer.save(str(folder / "tokenizer.json"))
    found = read_tokenizer(folder, 312)
    assert found.tokens[300:] == (*control, *plain)
    assert set(found.kinds[300:307]) == {TokenType.CONTROL}
    assert set(found.kinds[307:]) == {TokenType.USER_DEFINED}


def test_no_end_of_text_is_a_warning_that_names_what_llama_cpp_takes(tmp_path):
    folder = tokenizer_folder(tmp_path)
    assert read_tokenizer(folder, 300).warnings == ()
    (folder / "tokenizer_config.json").write_text("{}")
    found = read_tokenizer(folder, 300)
    assert len(found.warnings) == 1
    assert f"takes the token 11, {found.tokens[11]!r};" in found.warnings[0]


def test_texts_that_begin_with_a_token(tmp_path):
    for begin in (True, False):
        found = read_tokenizer(tokenizer_folder(tmp_path / str(begin), begin=begin), 300)
        assert found.special.add_special_token == {"bos": begin, "eos": False}


def test_check_reads_a_folders_tokenizer(tmp_path):
    module = tiny_llama(vocabulary=304, blocks=1)
    write_quantized(tmp_path, module, {"model.layers.0.mlp.up_proj": QuantSpec(4, 32)})
    file = tokenizer_folder(tmp_path) / "tokenizer.json"
    assert quantforge.check(tmp_path, server="llama.cpp").problems == ()
    described = json.loads(file.read_text())
    file.write_text(json.dumps({**described, "pre_tokenizer": {"type": "Metaspace"}}))
    (problem,) = quantforge.check(tmp_path, server="llama.cpp").problems
    assert "another tokenizer (BPE) than byte-level" in problem
    assert quantforge.check(tmp_path, server="transformers").problems == ()


def test_other_tokenizers_are_refused(tmp_path):
    folder = tokenizer_folder(tmp_path / "good")
    with pytest.raises(InputError, match="has a token 299, the embedding of the checkpoint 299"):
        read_tokenizer(folder, 299)
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    file.write_text(json.dumps({**described, "pre_tokenizer": {"type": "Metaspace"}}))
    with pytest.raises(InputError, match=r"another tokenizer \(BPE\) than byte-level"):
        read_tokenizer(folder, 300)
    # plan and check read a folder's tokenizer too
    known = {**tiny_llama(vocabulary=304).config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    with pytest.raises(UsageError, match=r"llama.cpp would not load any plan: .*another tokenizer"):
        require_split(known, SearchConfig(server="llama.cpp"), folder)
    require_split(known, SearchConfig(server="llama.cpp"), tmp_path)
    require_split(known, SearchConfig(server="vllm"), folder)
    file.write_text(json.dumps({**described, "model": {"type": "WordPiece"}}))
    with pytest.raises(InputError, match=r"another tokenizer \(WordPiece\) than"):
        read_tokenizer(folder, 300)
    file.write_text(json.dumps({**described, "model": {"type": "BPE", "vocab": 3}}))
    with pytest.raises(InputError, match="cannot be read"):
        read_tokenizer(folder, 300)
