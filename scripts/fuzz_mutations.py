"""How inputs are broken: by their structure, where the mutation knows it, and byte by byte.

Every mutation takes a whole file as bytes and a `random.Random`, and returns the broken file; the
generator alone decides, so that a seed names an input.
"""

from __future__ import annotations

import io
import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

import yaml

Mutation = Callable[[bytes, random.Random], bytes]

ESCAPES = (
    "../../../etc/passwd", "/etc/passwd", "..", ".", "", "../outside/secret.safetensors",
    "..\\..\\x", "sub/../../outside/secret.safetensors", "model.bin", "pytorch_model.bin", "~/x",
    "file:///etc/passwd", "organisation/name", "//server/share", "C:\\x", "a\x00b",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63,
    2**64, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip
TEXTS = (
    *ESCAPES, "x", "null", "true", "16", "nan", "1e999", "\ud800", "\u202e", "\n", "a\nb",
    "\x1b[2J", "A" * 100_000, "{{", "{% for i in range(10**9) %}x{% endfor %}", "{{ 1/0 }}",
    "re:.*", "Linear",
    "evil--evil.Model", "float8", "bfloat16", "3b-g64", "kept", "2b-g0", "99999999999b-pc",
    "(a+)+$", "[", "é" * 50,
)  # fmt: skip
# What an integer field of a binary file is set to.
WIDE = (0, 1, 2, 3, 5, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
DEEP = 100_000


def hostile(generator: random.Random) -> Any:
    """A JSON value that few readers expect."""
    pools: tuple[Any, ...] = (NUMBERS, TEXTS, (None, True, False), ([], {}, [[]], [{}], {"": None}))
    return generator.choice(generator.choice(pools))


def mutate_bytes(data: bytes, generator: random.Random) -> bytes:
    """Flip, cut, insert, zero, repeat or replace bytes."""
    size = len(data)
    start = generator.randrange(size + 1)
    length = generator.choice((1, 1, 2, 8, 64, max(size // 4, 1)))
    head, piece, tail = data[:start], data[start : start + length], data[start + length :]
    flipped = bytes(byte ^ (1 << generator.randrange(8)) for byte in piece)
    noise = generator.randbytes(length)
    end = generator.choice((b"\0", b"\n", b"}", data, noise))
    other = generator.choice((b"", b"\0" * 64, b"\xff\xfe", b"PK\x03\x04", b"\x80\x04."))
    return generator.choice(
        (
            head + flipped + tail, head + flipped + tail, head, head + noise + piece + tail,
            head + bytes(len(piece)) + tail, head + tail, data + end, other,
            head + piece * 3 + tail,
        )
    )  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict | list):
            keys = list(one) if isinstance(one, dict) else range(len(one))
            found += [(one, key) for key in keys]
            waiting += [one[key] for key in keys]
    return found


def mutate_value(document: Any, generator: random.Random) -> Any:
    """One change somewhere in a JSON value, which is changed in place where it can be."""
    found = places(document)
    if not found or generator.random() < 0.02:
        return hostile(generator)
    container, key = generator.choice(found)
    old = container[key]
    match generator.randrange(8):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[str(generator.choice((f"{key}x", *TEXTS[:20])))] = container.pop(key)
        case 2 if isinstance(old, int | float) and not isinstance(old, bool):
            container[key] = generator.choice((old + 1, old - 1, -old, old * 2, old // 2, str(old)))
        case 3:
            container[key] = generator.choice(([old], {"x": old}, [old, old], str(old)[:99]))
        case 4:
            other, place = generator.choice(found)
            container[key] = json.loads(
                json.dumps(
                    other.get(place)
                    if isinstance(other, dict)
                    else other[place % len(other)]
                    if other
                    else None
                )
            )
        case 5 if isinstance(container, list):
            container.append(old)
        case 6 if isinstance(old, list) and old:
            old[generator.randrange(len(old))] = hostile(generator)
        case _:
            container[key] = hostile(generator)
    return document


def _json_text(document: Any, generator: random.Random) -> bytes:
    """A JSON value as text, one in three times with a fault that only text has."""
    text = json.dumps(document, ensure_ascii=generator.random() < 0.8)
    plain = text.encode("utf-8", "surrogatepass")
    if generator.random() > 1 / 3:
        return plain
    twice = json.dumps(dict(list(document.items())[:1]))[1:-1] if isinstance(document, dict) else ""
    return generator.choice(
        (
            b"\xef\xbb\xbf" + plain,
            text.encode("utf-16", "surrogatepass"),
            plain.replace(b":", b":" + b"[" * DEEP, 1),
            plain.replace(b":", b":" + b'{"a":' * DEEP, 1),
            b"[" * DEEP + b"]" * DEEP,
            b"{" + twice.encode("utf-8", "surrogatepass") + b"," + plain[1:],
            plain.replace(b"1", b"9" * 10_000, 1),
            plain.replace(b",", b",,", 1),
            b"/* x */" + plain,
            plain.replace(b'"', b'"\xff', 1),
        )
    )


def mutate_json(data: bytes, generator: random.Random) -> bytes:
    """A JSON file with up to three changes of its values, or of its bytes."""
    if generator.random() < 0.15:
        return mutate_bytes(data, generator)
    document = json.loads(data)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        document = mutate_value(document, generator)
    return _json_text(document, generator)


def mutate_lines(data: bytes, generator: random.Random) -> bytes:
    """A file of JSON lines, one of them broken."""
    if generator.random() < 0.15:
        return mutate_bytes(data, generator)
    lines = data.splitlines()
    place = generator.randrange(len(lines))
    lines[place] = mutate_json(lines[place], generator)
    return b"\n".join(lines)


def mutate_text(data: bytes, generator: random.Random) -> bytes:
    """A text with bytes that are no UTF-8, no text, or far too few."""
    match generator.randrange(6):
        case 0:
            return generator.choice((b"", b" \n\t", b"\xef\xbb\xbf", b"\0" * 10_000, b"a"))
        case 1:
            return data.decode().encode(generator.choice(("utf-16", "utf-32", "utf-7")))
        case 2:
            return generator.randbytes(5_000)
        case 3:
            return "\ud800".encode("utf-8", "surrogatepass") + data
    return mutate_bytes(data, generator)


def mutate_container(data: bytes, generator: random.Random) -> bytes:
    """A safetensors file whose header does not fit its data, its length or the format."""
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    entry = header[generator.choice(names)]
    match generator.randrange(12):
        case 0:
            return struct.pack("<Q", generator.choice((*WIDE, size + 8, size - 1))) + data[8:]
        case 1:
            entry["data_offsets"] = [generator.choice(NUMBERS), generator.choice(NUMBERS)]
        case 2:
            entry["data_offsets"] = header[generator.choice(names)]["data_offsets"]
        case 3:
            entry["shape"] = generator.choice(
                ([2**32, 2**32], [2**62, 4], [0], [-1, -1], [], [0, 2**63], [1] * 5_000,
                 entry["shape"][::-1], [*entry["shape"], 1])
            )  # fmt: skip
        case 4:
            entry["dtype"] = generator.choice(
                ("F64", "F32", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "C64", "X", "f32", 7)
            )
        case 5:
            header["__metadata__"] = hostile(generator)
        case 6:
            rest = generator.choice((rest + b"\0" * 8, rest[:-1], rest[: len(rest) // 2], b""))
        case 7:
            name = generator.choice(names)
            header[str(generator.choice(TEXTS))] = header.pop(name)
        case 8:
            header.pop(generator.choice(names))
        case 9:
            return mutate_bytes(data, generator)
        case 10:
            rest = generator.choice((b"\xff" * len(rest), b"\0" * len(rest)))
        case _:
            text = mutate_json(data[8 : 8 + size], generator)
            return struct.pack("<Q", len(text)) + text + rest
    text = _json_text(header, generator)
    return struct.pack("<Q", len(text)) + text + rest


_GGUF_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


class _GgufWalker:
    """Where the numbers and texts of a valid GGUF file stand."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 8
        self.numbers: list[tuple[int, int]] = [(4, 4)]  # (offset, bytes)
        self.texts: list[tuple[int, int]] = []
        tensors, pairs = self._number(8), self._number(8)
        for _ in range(pairs):
            self._text()
            self._value(self._number(4))
        for _ in range(tensors):
            self._text()
            for _ in range(self._number(4)):
                self._number(8)
            self._number(4)
            self._number(8)

    def _number(self, width: int) -> int:
        self.numbers.append((self.position, width))
        self.position += width
        return int.from_bytes(self.data[self.position - width : self.position], "little")

    def _text(self) -> None:
        length = self._number(8)
        self.texts.append((self.position, length))
        self.position += length

    def _value(self, kind: int) -> None:
        if kind == _GGUF_STRING:
            self._text()
        elif kind == _GGUF_ARRAY:
            item, count = self._number(4), self._number(8)
            for _ in range(count):
                self._value(item)
        else:
            self._number(_GGUF_SCALARS[kind])


def mutate_gguf(data: bytes, generator: random.Random) -> bytes:
    """A GGUF file with wrong counts, lengths, types, dimensions, offsets, names or bytes."""
    walker = _GgufWalker(data)
    changed = bytearray(data)
    match generator.randrange(8):
        case 0:
            return mutate_bytes(data, generator)
        case 1:
            return data[: generator.randrange(walker.position)]
        case 2:  # an array of arrays of arrays ... in the place of the first value
            start = walker.texts[0][0] + walker.texts[0][1]
            nested = struct.pack("<IQ", _GGUF_ARRAY, 1) * generator.choice((2, 50, 5_000))
            return data[:start] + struct.pack("<I", _GGUF_ARRAY) + nested + data[start + 4 :]
        case 3:
            start, length = generator.choice(walker.texts)
            changed[start : start + length] = generator.randbytes(length)
            return bytes(changed)
    head = [place for place in walker.numbers if place[0] < 24]
    few = generator.random() < 0.2
    # arrays of a vocabulary are most of the numbers: half of the choices leave them out
    sparse = walker.numbers if generator.random() < 0.5 else walker.numbers[-60:]
    for _ in range(generator.choice((1, 1, 2))):
        start, width = generator.choice(head if few else sparse)
        value = generator.choice((*WIDE, generator.getrandbits(8 * width)))
        changed[start : start + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(changed)


BOMB = "\n".join(
    ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
)
YAML_LINES = (
    BOMB, "x: !!python/object/apply:os.system ['touch {marker}']", "x: !!python/name:os.system",
    "x: !!binary aGVsbG8=", "x: !!set {a, b}", "<<: {budget: 3bit}", "budget: 3bit\nbudget: 4bit",
    "\tbudget: 3bit", "? [a, b]\n: 1", "--- \nbudget: 2bit", "%YAML 9.9\n---", "x: *unknown",
    "x: &a [*a]", "'unclosed: 1", "x: {a: [b}", "x: " + "[" * 5_000, "x: " + "9" * 5_000, "@: 1",
    "x: " + "{a: " * 500, "null: 1", "1: 1", "x: 1e999", "x: .nan", "x: !!float nan", "- a", "\x00",
    "x: " + "A" * 70_000, "search: {bits: [2.5]}", "search: null", "budget: [3bit]", "{}", "...",
    "schema_version: 2", "model: ../../etc/passwd", "model: {package: ../x, version: 1}",
)  # fmt: skip


def mutate_yaml(data: bytes, generator: random.Random) -> bytes:
    """A recipe with broken values, hostile lines or broken bytes."""
    choice = generator.random()
    if choice < 0.2:
        return mutate_bytes(data, generator)
    if choice < 0.5:
        line = generator.choice(YAML_LINES).encode()
        return generator.choice((data + b"\n" + line, line + b"\n" + data, line))
    document = yaml.safe_load(data)
    for _ in range(generator.choice((1, 1, 2))):
        document = mutate_value(document, generator)
    # JSON is YAML, and unlike a dumper it writes whatever it is given.
    if generator.random() < 0.5:
        return _json_text(document, generator)
    return str(yaml.safe_dump(document, allow_unicode=True)).encode("utf-8", "surrogatepass")


def mutate_parquet(data: bytes, generator: random.Random) -> bytes:
    """A parquet file with columns of other types, no rows, or broken bytes."""
    import pyarrow
    import pyarrow.parquet

    if generator.random() < 0.6:
        return mutate_bytes(data, generator)
    columns: Any = generator.choice(
        (
            {"text": pyarrow.array([b"\xff\xfe", b"a"], pyarrow.binary())},
            {"text": pyarrow.array([None, None], pyarrow.string())},
            {"text": pyarrow.array([], pyarrow.string())},
            {"text": pyarrow.array([1, 2])},
            {"text": pyarrow.array([{"a": 1}, {"a": 2}])},
            {"messages": pyarrow.array([[{"role": "user"}], None])},
            {"messages": pyarrow.array([[{"role": "user", "content": None}], []])},
            {"text": pyarrow.array([["a"], ["b"]])},
            {"text": pyarrow.array(["a", "b"]).dictionary_encode()},
            {"text": pyarrow.array([10**17, -(10**17)], pyarrow.timestamp("ms"))},
            {"content": pyarrow.array(["word " * 500] * 40)},
            {"prompt": pyarrow.array(["a"] * 9), "response": pyarrow.array([None] * 9)},
        )
    )
    if generator.random() < 0.3:  # text that is no UTF-8
        wrong = pyarrow.array([b"\xff\xfe" * 9], pyarrow.binary()).view(pyarrow.string())
        columns = {"text": wrong}
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()
