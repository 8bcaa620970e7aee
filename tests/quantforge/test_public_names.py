import subprocess
import sys
import types

import pytest

import quantforge

FUNCTIONS = ("evaluate", "generate", "inspect", "load", "plan", "profile", "quantize")


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("quantforge.pipeline")
    for name in FUNCTIONS:
        setattr(module, name, lambda name=name: name)
    monkeypatch.setitem(sys.modules, "quantforge.pipeline", module)
    monkeypatch.setattr(quantforge, "pipeline", module, raising=False)
    for name in FUNCTIONS:
        monkeypatch.delitem(vars(quantforge), name, raising=False)
    return module


def test_functions_are_not_hidden_by_the_stages_of_the_same_name(
    pipeline: types.ModuleType,
) -> None:
    import quantforge.quantize.config  # binds submodules, but not over the functions

    for name in FUNCTIONS:
        assert getattr(quantforge, name)() == name
        assert name in dir(quantforge)
    for name in FUNCTIONS:  # the kept value must not reach another test
        vars(quantforge).pop(name, None)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = quantforge.quantise  # type: ignore[attr-defined]


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "torch", "transformers", "numpy", "pydantic", "typer"
    code = f"import sys, quantforge; print([m for m in {heavy!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
