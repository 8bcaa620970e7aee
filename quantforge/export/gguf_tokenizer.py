"""A folder's tokenizer as GGUF metadata: byte-level BPE, which llama.cpp calls "gpt2".

llama.cpp has the rules by which text is cut before it is merged in its source, under names.
tokenizer.json has the rules themselves, so the name has to be found: as llama.cpp's own converter
does, by what the tokenizer makes of a text with many kinds of characters, and where it knows no
such tokenizer, by the rules as written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantforge.errors import InputError
from quantforge.foreign import malformed
from quantforge.format.checkpoint import read_json

TOKENIZER_NAME = "tokenizer.json"
# Of llama.cpp's convert_hf_to_gguf.py (MIT): SHA-256 of the tokens, printed as a list, that a
# tokenizer makes of this text, for tokenizers of the architectures that are written here.
_PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天\uff5e ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL"
)
_KNOWN = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "0fe1cf6eda062318a1af7270f3331a85c539a01778ff948e24388e949c5282f4": "gpt-2",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
}
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Rules as tokenizer.json writes them: regular expressions, "digits", "gpt-2".
_RULES = {
    ("gpt-2",): "gpt-2",
    ("digits", "gpt-2"): "smollm",
    (_LETTERS + r"\p{N}" + _REST,): "qwen2",
    (_LETTERS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
}
# llama.cpp's does_token_look_special: added tokens that are control tokens whatever a folder says.
_CONTROL = frozenset({"<pad>", "<mask>", "<2mass>", "[@BOS@]"})
_CONTROL_ENDS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
# What llama.cpp takes to end a text where a file names nothing.
_ASSUMED_END = 11
# Of these llama.cpp takes a piece that is a token whole, without merging it.
_WHOLE_PIECES = frozenset({"llama-bpe", "falcon3", "tekken"})


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTokenizer:
    """A tokenizer as GGUF stores it.

    Attributes:
        tokens: every token, [PADn] where there is none.
        kinds: `gguf.TokenType` of each.
        rules: llama.cpp's name of how text is cut.
        special: merges, ids of special tokens and the chat template, `gguf.SpecialVocab`; None for
            a folder without a tokenizer.
        warnings: one line each.
    """

    tokens: tuple[str, ...] = ()
    kinds: tuple[int, ...] = ()
    rules: str = ""
    special: Any = None
    warnings: tuple[str, ...] = field(default=())

    def add_to(self, writer: Any) -> None:
        """Hand it to a `gguf.GGUFWriter`."""
        if self.special is None:
            writer.add_tokenizer_model("none")
            return
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.rules)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        self.special.add_to_gguf(writer, quiet=True)


def read_tokenizer(folder: Path, size: int) -> GgufTokenizer:
    """The tokenizer of a checkpoint.

    Args:
        folder: with tokenizer.json; without it the file takes and gives numbers of tokens only.
        size: rows of the embedding.

    Raises:
        InputError: it is no byte-level BPE, cannot be read, or has more tokens than the embedding.
    """
    file = folder / TOKENIZER_NAME
    if not file.is_file():
        return GgufTokenizer(warnings=(f"{folder} has no {TOKENIZER_NAME}: no text without one",))
    described = read_json(file)
    _refuse_other_kinds(file, described)
    from gguf import SpecialVocab
    from tokenizers import Tokenizer

    with malformed(f"the tokenizer in {file} cannot be read"):
        tokenizer = Tokenizer.from_file(str(file))
        special = SpecialVocab(folder, load_merges=True, n_vocab=size)
        tokens, kinds = _tokens(file, tokenizer, size)
        _say_what_is_added(tokenizer, special)
        rules, warnings = _rules(tokenizer, described)
    return GgufTokenizer(
        tokens=tokens,
        kinds=kinds,
        rules=rules,
        special=special,
        warnings=(*warnings, *_unnamed_end(tokens, special)),
    )


def _refuse_other_kinds(file: Path, described: dict[str, Any]) -> None:
    model = described.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "BPE" or "ByteLevel" not in json.dumps(described.get("pre_tokenizer")):
        raise InputError(
            f"{file} holds another tokenizer ({kind}) than byte-level BPE, which alone is written "
            "as GGUF"
        )


def _tokens(file: Path, tokenizer: Any, size: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Every token up to `size` and its kind."""
    from gguf import TokenType

    names = {number: token for token, number in tokenizer.get_vocab().items()}
    if names and max(names) >= size:
        raise InputError(
            f"{file} has a token {max(names)}, the embedding of the checkpoint {size} rows"
        )
    added = tokenizer.get_added_tokens_decoder()
    tokens, kinds = [], []
    for number in range(size):
        token, kind = names.get(number, f"[PAD{number}]"), int(TokenType.NORMAL)
        if number not in names:
            kind = int(TokenType.UNUSED)
        elif number in added:
            if not added[number].normalized:  # as llama.cpp meets it in a text
                encoded = tokenizer.encode(token, add_special_tokens=False).ids
                token = tokenizer.decode(encoded, skip_special_tokens=False)
            control = added[number].special or _looks_special(token)
            kind = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
        tokens.append(token)
        kinds.append(kind)
    return tuple(tokens), tuple(kinds)


def _looks_special(token: str) -> bool:
    """Whether llama.cpp takes an added token for a control token."""
    return token in _CONTROL or any(
        token.startswith(start) and token.endswith(end) for start, end in _CONTROL_ENDS
    )


def _say_what_is_added(tokenizer: Any, special: Any) -> None:
    """Whether texts begin or end with a special token, from what the tokenizer does."""
    found, plain = (tokenizer.encode("a", add_special_tokens=flag).ids for flag in (True, False))
    first, last = found[: len(found) - len(plain)], found[len(plain) :]
    ids = special.special_token_ids
    special.add_special_token = {
        "bos": bool(first) and first[0] == ids.get("bos"),
        "eos": bool(last) and last[-1] == ids.get("eos"),
    }


def _rules(tokenizer: Any, described: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """llama.cpp's name of how a tokenizer cuts text, and a warning where it has none."""
    ids = tokenizer.encode(_PROBE).ids
    known = _KNOWN.get(hashlib.sha256(str(ids).encode()).hexdigest())
    if known is not None:
        return known, ()
    found = _RULES.get(_written_rules(described["pre_tokenizer"]))
    whole = bool(described["model"].get("ignore_merges"))
    plain = _leaves_text(described.get("normalizer"))
    if found is not None and plain and whole == (found in _WHOLE_PIECES):
        return found, ()
    return "default", ("llama.cpp has no name for this tokenizer: texts may be cut otherwise",)


def _leaves_text(part: dict[str, Any] | None) -> bool:
    """Whether a normalizer does no more than compose characters (NFC); llama.cpp has none."""
    if part is None or part.get("type") == "NFC":
        return True
    return part.get("type") == "Sequence" and all(map(_leaves_text, part["normalizers"]))


def _unnamed_end(tokens: Sequence[str], special: Any) -> tuple[str, ...]:
    """A warning where no token is known to end a text."""
    if "eos" in special.special_token_ids:
        return ()
    found = repr(tokens[_ASSUMED_END]) if len(tokens) > _ASSUMED_END else "which is not there"
    return (
        "the tokenizer names no token that ends a text: llama.cpp takes the token "
        f"{_ASSUMED_END}, {found}; name it in tokenizer_config.json",
    )


def _written_rules(part: dict[str, Any]) -> tuple[str, ...]:
    """The rules of a pre-tokenizer in the order they cut."""
    kind = part.get("type")
    if kind == "Sequence":
        return tuple(rule for one in part["pretokenizers"] for rule in _written_rules(one))
    if kind == "Digits" and part.get("individual_digits"):
        return ("digits",)
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return tuple(part["pattern"].values())
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return ("gpt-2",) if part.get("use_regex", True) else ()
    return (str(kind),)
