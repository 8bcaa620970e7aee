"""YAML as recipes use it: plain data, read safely, with nothing surprising.

A subclass of PyYAML's safe loader: no object construction. On top of that a key given twice and an
alias are errors (no silent overrides, no expansion bombs), and scalars follow the YAML 1.2 core
schema, so `1e-3` is a number, `no` is text and dates are text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from quantforge.errors import InputError, UsageError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 20

_RESOLVERS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
        "-+.0123456789",
    ),
)


class _StrictLoader(yaml.SafeLoader):
    """Safe loader that refuses duplicate keys, aliases and deep nesting."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own class attribute
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise self._refuse("aliases (*name) are not allowed")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._refuse(f"nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _refuse(self, problem: str) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=self.get_mark())

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be plain text", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # decimal always: no octal 010, no 1_000, no 1:30


class _StrictDumper(yaml.SafeDumper):
    """Safe dumper that also quotes text which only the strict loader would take for a number."""


for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_StrictLoader, _StrictDumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _load(text: str, where: str) -> Any:
    loader: _StrictLoader | None = None
    try:
        loader = _StrictLoader(
            text
        )  # reads as far as the first characters that YAML does not allow
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark is not None else where
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "bad YAML"
        raise UsageError(f"{place}: {problem}") from None
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{where}: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping at the top of a YAML file.

    Raises:
        InputError: the file is missing, unreadable, over 64 KiB or not UTF-8.
        UsageError: it is not strict YAML, or its top is not a mapping with text keys.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    if len(content) > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES // 1024} KiB, not a recipe")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    value = _load(text, str(path))
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected `key: value` lines, found {_kind(value)}")
    for key in value:
        if not isinstance(key, str):
            raise UsageError(f"{path}: key {key!r} must be text")
    return value


def parse_value(text: str, where: str) -> Any:
    """The value of one `key=value` option: a scalar, or a flow list such as `[2, 3, 4]`.

    One that begins with a star is text, a pattern such as `*.png`: there is nothing that an alias
    could stand for.

    Raises:
        UsageError: `text` is not strict YAML.
    """
    if text.startswith("*"):
        return text
    return _load(text, where)


def dump(value: Any) -> str:
    """YAML text that `read_mapping` reads back to an equal value."""
    return yaml.dump(value, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=100)


def _kind(value: Any) -> str:
    return {type(None): "nothing", list: "a list", str: "text"}.get(type(value), "a single value")
