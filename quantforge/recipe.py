"""Recipes: the stages' own configurations put together, and where the values come from.

A recipe is a YAML file under `recipes/` (or anywhere) whose sections are the stages' `Config`
classes; defaults live only there. What a run uses is composed from five layers, later ones win:

    defaults < effort preset < recipe file < settings (`--set key=value`) < named options

Each layer is plain data; they are merged first and validated once, strictly: an unknown key, a
wrong type or a value out of range is one line that names the key by its path.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ValidationError, model_validator

from quantforge import strict_yaml
from quantforge.calibrate.config import CalibrateConfig
from quantforge.config import Config
from quantforge.errors import InputError, UsageError
from quantforge.evaluate.config import EvaluateConfig
from quantforge.export.config import ExportConfig
from quantforge.load.source import PackagedModel
from quantforge.load.text import CalibrationConfig
from quantforge.quantize.config import QuantizeConfig
from quantforge.search.budget import Budget
from quantforge.search.config import EmbeddingsConfig, SearchConfig
from quantforge.train.config import TrainingConfig
from quantforge.types import PER_TENSOR

_PACKAGE = Path(__file__).resolve().parent
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SUFFIXES = (".yaml", ".yml")

Form = TypeVar("Form", bound=Config)
EFFORTS: tuple[str, ...] = ("fast", "balanced", "best")


# What an effort changes, below the recipe.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {
        "calibration": {"sequences": 48},
        "calibrate": {"gradient_sequences": 16},
        "quantize": {"sequential": False, "tuning": {"steps": 8}},
    },
    "balanced": {"quantize": {"rounding": {"steps": 50}}},
    "best": {
        "calibration": {"sequences": 512, "fewer": True},
        "search": {"refine": 3},
        "quantize": {"rounding": {"steps": 200}, "tuning": {"steps": 60}},
    },
}


class Recipe(Config):
    """One run's configuration, all of it.

    Attributes:
        schema_version: version of the file's form.
        description: one line for people.
        architecture: registered architecture; None takes it from the model's class.
        model: a checkpoint that a package carries, or a folder, .gguf file or hub id.
        budget: what may be spent ("3bit", "120MB", "kl:0.05", see `search.budget`); not needed
            where `search` leaves nothing to choose, or a plan is given.
        device: what latency is about: a built-in device (`quantforge/devices.yaml`) or a .json that
            `quantforge profile` wrote.
        calibration: which text is read.
        calibrate: how sensitivities are estimated.
        search: which plans are considered.
        embeddings: what becomes of the token embedding and the head.
        quantize: how weights become codes.
        training: recovery by training, after that.
        export: how the checkpoint is written.
        evaluate: how quality is measured.
    """

    schema_version: Literal[1] = 1
    description: str = ""
    architecture: str | None = None
    model: PackagedModel | str | None = None
    budget: str | None = None
    device: str | None = None
    calibration: CalibrationConfig = CalibrationConfig()
    calibrate: CalibrateConfig = CalibrateConfig()
    search: SearchConfig = SearchConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    training: TrainingConfig = TrainingConfig()
    export: ExportConfig = ExportConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _predicted_or_refused(self) -> Self:
        """What goes by predicted losses needs a search."""
        if self.quantize.rounding.share < 1.0 and self.search.settled is not None:
            raise ValueError(
                "quantize.rounding.share needs a plan that was searched: it goes by predicted "
                "losses; leave it at 1"
            )
        return self

    @model_validator(mode="after")
    def _grids_fit_or_refused(self) -> Self:
        """What is of ternary grids alone, and what would give rows a scale of their own."""
        grid, quantize = self.search.grid, self.quantize
        if quantize.grid == "absmean" and grid != "ternary":
            raise ValueError("quantize.grid absmean is of ternary grids: add search.grid=ternary")
        if self.training.quantizer == "absmean" and quantize.grid != "absmean":
            raise ValueError(
                "training.quantizer absmean trains ternary weights at their mean |w|: add "
                "search.grid=ternary and quantize.grid=absmean"
            )
        if PER_TENSOR in self.search.group_sizes and (
            quantize.method != "rtn" or quantize.rounding.steps or quantize.tuning.steps
        ):
            raise ValueError(
                "one scale a matrix (search.group_sizes=[0]) needs quantize.method=rtn, "
                "quantize.rounding.steps=0 and quantize.tuning.steps=0: those fit rows one by one"
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the first argument of a command means.

    Attributes:
        name: short name for titles and the default output folder.
        recipe: path of the recipe file, None where the argument is a model itself.
        model: folder, .gguf file or hub id, None where the recipe names the model.
    """

    name: str
    recipe: Path | None = None
    model: str | None = None

    def output(self, budget: str | None = None) -> Path:
        """Where a checkpoint of this budget goes unless the user says: "./llama-3bit".

        Without a budget: "./gptq-w4g128-quantized".
        """
        suffix = "quantized" if budget is None else _file_name(budget)
        return Path(f"{_file_name(self.name)}-{suffix}")


def _file_name(text: str) -> str:
    """`text` as part of a folder's name: "vram:24GB@32k" → "vram-24GB-32k"."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.") or "model"


def recipe_root() -> Path:
    """The folder of the shipped recipes: inside an installed wheel, else beside a checkout.

    Raises:
        InputError: the package was installed without its recipes.
    """
    for root in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes"):
        if any(root.glob("*/*.yaml")):
            return root
    raise InputError(f"no recipes beside {_PACKAGE}: reinstall the package")


def known_recipes() -> dict[str, Path]:
    """Qualified name ("llm/llama") → file of every shipped recipe, sorted by name."""
    root = recipe_root()
    found = (p for p in root.rglob("*") if p.suffix in _SUFFIXES)
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(found)}


def find_recipe(name: str, known: Mapping[str, Path] | None = None) -> Path | None:
    """The recipe called `name`, short ("llama") or qualified ("llm/llama"); None if there is none.

    Raises:
        UsageError: the short name belongs to several recipes.
    """
    known = known_recipes() if known is None else known
    if name in known:
        return known[name]
    matches = [full for full in known if full.rpartition("/")[2] == name]
    if len(matches) > 1:
        raise UsageError(f"recipe {name!r} is ambiguous: say one of {', '.join(matches)}")
    return known[matches[0]] if matches else None


def resolve_target(model: str | Path) -> Target:
    """Read a command's first argument: YAML file, recipe, folder or .gguf, hub id, in this order.

    Raises:
        InputError: it is spelled as a file or folder that does not exist.
        UsageError: it is none of these, or an ambiguous recipe name.
    """
    text = os.path.expanduser(os.fspath(model))  # noqa: PTH111 - a trailing slash has a meaning
    path = Path(text)
    if path.suffix in _SUFFIXES:
        if not path.is_file():
            raise InputError(f"recipe file {text} does not exist")
        return Target(name=path.stem, recipe=path)
    recipe = find_recipe(text)
    if recipe is not None:
        return Target(name=recipe.stem, recipe=recipe)
    if path.is_dir():
        return Target(name=path.resolve().name or "model", model=text)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{text} is a file but neither .gguf nor .yaml; give its folder")
        return Target(name=path.stem, model=text)
    if path.suffix == ".gguf" or text.startswith((".", "/", "~")) or text.endswith("/"):
        raise InputError(f"{text} does not exist")
    if _HUB_ID.fullmatch(text):
        return Target(name=path.name, model=text)
    shorts = sorted({name.rpartition("/")[2] for name in known_recipes()})
    raise UsageError(
        f"{text!r} is no recipe, folder, .gguf file or hub id (owner/name); "
        f"recipes: {', '.join(shorts)}{_suggest(text, shorts)}"
    )


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe of that name or file, with every default filled in.

    Raises:
        InputError: the file cannot be read.
        UsageError: there is no such recipe, or it holds an unknown key or a bad value.
    """
    target = resolve_target(name_or_path)
    if target.recipe is None:
        raise UsageError(f"{name_or_path} is a model, not a recipe")
    return compose(target, effort="balanced")


def compose(
    target: Target, *, effort: str = "balanced", settings: Mapping[str, Any] | None = None
) -> Recipe:
    """The effective recipe of a run; its `model` is always set unless nothing names one.

    Args:
        target: what `resolve_target` made of the first argument.
        effort: name of a preset.
        settings: dotted key → value, e.g. {"search.solver": "uniform"}; values may be nested
            mappings. Named options that are recipe keys go here too and are set last.

    Raises:
        InputError: the recipe file cannot be read.
        UsageError: an unknown effort or key, a bad value, or a model given twice.
    """
    return compose_as(Recipe, _preset, target, effort=effort, settings=settings)


def compose_as(
    form: type[Form],
    preset: Callable[[str, Mapping[str, Any]], Mapping[str, Any]],
    target: Target,
    *,
    effort: str,
    settings: Mapping[str, Any] | None,
) -> Form:
    """`compose` for any form of recipe.

    Args:
        form: class of the recipe.
        preset: what an effort changes below what is asked for.
        target: as for `compose`, like the others.
        effort: name of a preset.
        settings: over all else.
    """
    if effort not in PRESETS:
        close = _suggest(effort, PRESETS)
        raise UsageError(f"unknown effort {effort!r}; known: {', '.join(PRESETS)}{close}")
    written = strict_yaml.read_mapping(target.recipe) if target.recipe else {}
    if target.recipe:
        # a fault of the file is reported with its name
        _validate(form, _merge(preset(effort, written), written), str(target.recipe))
    changes = _nested(settings or {})
    if target.model is not None:
        if changes.get("model") not in (None, target.model):
            raise UsageError(f"the model is given twice: {target.model} and {changes['model']}")
        changes = {**changes, "model": target.model}
    asked = _merge(written, changes)
    return _validate(form, _merge(preset(effort, asked), asked), "settings")


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """`key=value` options as dotted key → value; values are YAML scalars or flow lists.

    Raises:
        UsageError: no `=`, an empty key, a key given twice, or a value that is not YAML.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise UsageError(f"--set {pair}: expected key=value, e.g. search.solver=uniform")
        if key in settings:
            raise UsageError(f"--set {key} is given twice")
        settings[key] = strict_yaml.parse_value(value, f"--set {key}")
    return settings


def setting_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key that `--set` takes, in the order of the sections."""
    keys = []
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is not None and name != "model":
            keys += setting_keys(section, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        tree: Any = os.fspath(value) if isinstance(value, os.PathLike) else value
        for part in reversed(key.split(".")):
            tree = {part: tree}
        result = _merge(result, tree)
    return result


def _preset(effort: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an effort changes below what is asked for.

    Refinement is left out where there is nothing to refine: with one grid for all layers, and under
    targets of quality, whose plans are measured as they are; learned rounding where blocks are not
    quantized one after the other; more text where the network would have to make it itself, which
    takes longer than all else.
    """
    preset, budget = PRESETS[effort], asked.get("budget")

    def value(section: str, key: str) -> object:
        found = asked.get(section)
        return found.get(key) if isinstance(found, Mapping) else None

    targets = isinstance(budget, str) and Budget.parse(budget).targets
    if targets or value("search", "solver") == "uniform":
        preset = _without(preset, "search", "refine")
    if effort == "best" and value("calibration", "source") in (None, "default", "self", "mix"):
        preset = {key: keys for key, keys in preset.items() if key != "calibration"}
    if value("quantize", "sequential") is False:
        preset = _without(preset, "quantize", "rounding")
    return preset


def _without(preset: Mapping[str, Any], section: str, key: str) -> Mapping[str, Any]:
    return {**preset, section: {k: v for k, v in preset.get(section, {}).items() if k != key}}


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`, section by section; anything but a section is replaced whole."""
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _validate(form: type[Form], values: Mapping[str, Any], where: str) -> Form:
    """Strict validation through JSON: `True` is no int, "3" no number, a list may be a tuple."""
    try:
        return form.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UsageError(f"{where}: {_one_line(form, error)}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: {error}") from None


def _one_line(form: type[BaseModel], error: ValidationError) -> str:
    """The problem that matters most, named by its key path."""
    # Of a union (a packaged model or text) the member that got furthest is what was meant, and a
    # misspelt key explains the missing one beside it.
    problem = max(
        error.errors(include_url=False),
        key=lambda p: (len(p["loc"]), p["type"] == "extra_forbidden"),
    )
    path = ""
    model: type[BaseModel] | None = form
    for part in problem["loc"]:
        field = model.model_fields.get(str(part)) if model is not None else None
        if isinstance(part, int):
            path += f"[{part}]"
        elif field is not None:
            path = f"{path}.{part}".lstrip(".")
            model = _section(field.annotation)
        elif model is not None and problem["type"] == "extra_forbidden" and part != model.__name__:
            return _unknown_key(form, path, part, model)
    message = str(problem["msg"]).removeprefix("Value error, ")
    text = f"{path}: {message[:1].lower()}{message[1:]}"
    if problem["type"] != "value_error":  # our own validators say what they got
        text += f", got {problem['input']!r:.60}"
    choices = re.findall(r"'([^']*)'", str(problem.get("ctx", {}).get("expected", "")))
    return text + _suggest(str(problem["input"]), choices)


def _unknown_key(form: type[BaseModel], parent: str, key: str, model: type[BaseModel]) -> str:
    """Says that a section has no such key, and which one may be meant."""
    prefix = f"{parent}." if parent else ""
    elsewhere = [full for full in setting_keys(form) if full.rpartition(".")[2] == key]
    close = difflib.get_close_matches(key, model.model_fields, n=1)
    meant = [prefix + close[0]] if close else elsewhere[:1]
    hint = f"did you mean {meant[0]!r}?" if meant else f"known: {', '.join(model.model_fields)}"
    return f"unknown key {prefix + key!r}; {hint}"


def _section(annotation: Any) -> type[BaseModel] | None:
    """The `Config` class inside an annotation, if there is one."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _suggest(text: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(text, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
