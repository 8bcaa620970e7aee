from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantforge import strict_yaml
from quantforge.errors import InputError, UsageError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),  # YAML 1.1 would say text
        ("0.5", 0.5),
        ("-7", -7),
        ("010", 10),  # YAML 1.1 would say 8
        ("1:30", "1:30"),  # YAML 1.1 would say 90
        ("no", "no"),  # YAML 1.1 would say False
        ("true", True),
        ("2026-01-01", "2026-01-01"),  # YAML 1.1 would say a date
        ("0.1.2", "0.1.2"),
        ("3bit", "3bit"),
        ("", None),
        ("[2, 3, -1]", [2, 3, -1]),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    parsed = strict_yaml.parse_value(text, "x")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' is given twice"),
        ("a: {b: 1, b: 2}\n", "line 1: key 'b' is given twice"),
        ("a: &x [1]\nb: *x\n", "line 2: aliases"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("a: " + "[" * 30 + "]" * 30, "nested more than 20 deep"),
        ("? [1, 2]\n: 3\n", "a key must be plain text"),
        ("1: 2\n", "key 1 must be text"),
        ("- 1\n", "found a list"),
        ("", "found nothing"),
        ("a: [1\n", "line 2"),
    ],
)
def test_anything_surprising_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        strict_yaml.read_mapping(path)
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: " + b"x" * (strict_yaml.MAX_BYTES - 3))
    assert len(strict_yaml.read_mapping(path)["a"]) == strict_yaml.MAX_BYTES - 3
    path.write_bytes(b"a: " + b"x" * (strict_yaml.MAX_BYTES - 2))
    with pytest.raises(InputError, match="larger than 64 KiB"):
        strict_yaml.read_mapping(path)


def test_bytes_that_are_no_text_are_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 3\)"):
        strict_yaml.read_mapping(path)
    with pytest.raises(InputError, match="No such file"):
        strict_yaml.read_mapping(tmp_path / "absent.yaml")


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="ascii", categories=("L", "N", "P", "Zs")), max_size=12)
    | st.sampled_from(["1e-3", "no", "null", "~", "010", "1:30", "2026-01-01", "-", "+1"])
)


@given(st.dictionaries(st.text("abc", min_size=1), scalars | st.lists(scalars, max_size=3)))
def test_what_is_dumped_reads_back_equal(value: dict[str, object]) -> None:
    text = strict_yaml.dump(value)
    assert strict_yaml.parse_value(text, "x") == value


def test_a_pattern_of_names_is_text():
    assert strict_yaml.parse_value("*.png", "x") == "*.png"
    assert strict_yaml.parse_value("*", "x") == "*"
