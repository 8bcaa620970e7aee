"""A mixed-precision quantization compiler.

    import quantforge

    report = quantforge.quantize("llama", budget="3bit", output="out")
    model = quantforge.load("out")

The functions below are imported on first use: `import quantforge` imports neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantforge.pipeline import (
        bench,
        check,
        convert,
        curvature,
        evaluate,
        evaluate_tasks,
        generate,
        inspect,
        load,
        pareto,
        plan,
        profile,
        quantize,
        use_in_transformers,
    )

__all__ = [
    "__version__",
    "bench",
    "check",
    "convert",
    "curvature",
    "evaluate",
    "evaluate_tasks",
    "generate",
    "inspect",
    "load",
    "pareto",
    "plan",
    "profile",
    "quantize",
    "use_in_transformers",
]

_DISTRIBUTION = "quantforge-compiler"

# Three functions share their name with a stage's package. Importing a submodule binds its name in
# this module, which would replace the function; a package that is imported already is not bound
# again. So these three, whose `__init__` is a docstring, are imported and unbound here.
for _stage in ("evaluate", "load", "quantize"):
    importlib.import_module(f"{__name__}.{_stage}")
    del globals()[_stage]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version(_DISTRIBUTION)
        except PackageNotFoundError:
            return "0 (not installed)"
    if name in __all__:
        value = getattr(importlib.import_module("quantforge.pipeline"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
