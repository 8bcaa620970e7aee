import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from quantforge import recipe as recipes
from quantforge import strict_yaml
from quantforge.errors import InputError, UsageError
from quantforge.quantize.config import QuantizeConfig, RoundingConfig
from quantforge.recipe import Recipe, Target, compose, load_recipe, parse_settings, resolve_target


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def message(call: object, *args: object, **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        call(*args, **options)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what the first argument means ---------------------------------------------------------------


def test_first_argument_resolves_in_the_stated_order(here: Path) -> None:
    shipped = recipes.known_recipes()["llm/llama"]
    (here / "llama").mkdir()
    (here / "net.yaml").mkdir()  # a folder is no recipe file
    mine = write(here / "mine.yaml", "{}\n")
    gguf = write(here / "x.Q4.gguf", "")

    assert resolve_target("llama") == Target(name="llama", recipe=shipped)
    assert resolve_target("llm/llama") == Target(name="llama", recipe=shipped)
    assert resolve_target("./llama") == Target(name="llama", model="./llama")
    assert resolve_target("mine.yaml") == Target(name="mine", recipe=Path("mine.yaml"))
    assert resolve_target(mine) == Target(name="mine", recipe=mine)
    assert resolve_target(gguf) == Target(name="x.Q4", model=str(gguf))
    assert resolve_target("owner/some-model") == Target(name="some-model", model="owner/some-model")
    with pytest.raises(InputError, match=r"net\.yaml does not exist"):
        resolve_target("net.yaml")


@pytest.mark.parametrize("text", ["./absent", "../absent/x", "/absent/x", "absent.gguf", "absent/"])
def test_a_path_that_is_not_there_is_no_hub_id(here: Path, text: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        resolve_target(text)


def test_a_file_of_another_kind_is_an_input_error(here: Path) -> None:
    write(here / "model.bin", "")
    with pytest.raises(InputError, match=r"neither \.gguf nor \.yaml"):
        resolve_target("model.bin")


def test_an_unknown_name_lists_the_recipes_and_suggests(here: Path) -> None:
    text = message(resolve_target, "lama")
    assert "recipes: awq-w4g128, " in text
    assert ", llama, " in text
    assert text.endswith("did you mean 'llama'?")
    assert "did you mean" not in message(resolve_target, "zzzz")


def test_a_short_name_of_two_recipes_is_ambiguous() -> None:
    known = {"cnn/net": Path("a"), "llm/net": Path("b"), "llm/other": Path("c")}
    assert message(recipes.find_recipe, "net", known).endswith("say one of cnn/net, llm/net")
    assert recipes.find_recipe("cnn/net", known) == Path("a")
    assert recipes.find_recipe("other", known) == Path("c")
    assert recipes.find_recipe("absent", known) is None


# --- precedence ----------------------------------------------------------------------------------

LAYERS = ("preset", "recipe", "settings")
SOLVERS = {"preset": [2, 3], "recipe": [3, 4], "settings": [4, 5]}


@pytest.mark.parametrize(
    "present",
    [c for n in range(4) for c in itertools.combinations(LAYERS, n)],
    ids=lambda present: "+".join(present) or "none",
)
def test_later_layers_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: tuple[str, ...]
) -> None:
    preset = {"search": {"bits": SOLVERS["preset"]}} if "preset" in present else {}
    monkeypatch.setattr(recipes, "PRESETS", {"fast": preset})
    bits = f"{{search: {{bits: {SOLVERS['recipe']}}}}}\n" if "recipe" in present else "{}\n"
    target = resolve_target(write(tmp_path / "r.yaml", bits))
    settings = {"search.bits": SOLVERS["settings"]} if "settings" in present else None

    got = compose(target, effort="fast", settings=settings).search.bits

    expected = SOLVERS[present[-1]] if present else Recipe().search.bits
    assert list(got) == list(expected)


def test_layers_mix_key_by_key(tmp_path: Path) -> None:
    target = resolve_target(
        write(tmp_path / "r.yaml", "{calibration: {sequences: 7}, model: a/b}\n")
    )
    recipe = compose(target, settings={"calibration.sequence_length": 9, "calibration.source": "s"})
    assert recipe.model == "a/b"
    assert recipe.calibration.sequences == 7
    assert recipe.calibration.sequence_length == 9
    assert recipe.calibration.source == "s"
    assert recipe.calibration.split == Recipe().calibration.split


def test_a_recipes_model_can_be_replaced_or_adjusted() -> None:
    target = resolve_target("llama")
    assert compose(target, settings={"model": "./folder"}).model == "./folder"
    adjusted = compose(target, settings={"model.version": "0.1.3"}).model
    shipped = compose(target).model
    assert adjusted == shipped.model_copy(update={"version": "0.1.3"})


def test_a_model_given_twice_is_an_error() -> None:
    target = Target(name="x", model="./x")
    assert compose(target).model == "./x"
    assert "given twice: ./x and ./y" in message(compose, target, settings={"model": "./y"})


def test_a_path_in_the_home_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "net").mkdir()
    assert resolve_target("~/net").model == str(tmp_path / "net")
    with pytest.raises(InputError, match="does not exist"):
        resolve_target("~/other")


def test_balanced_is_the_defaults_and_learned_rounding() -> None:
    learned = QuantizeConfig(rounding=RoundingConfig(steps=50))
    assert compose(Target(name="x")) == Recipe(quantize=learned)
    assert set(recipes.PRESETS) == set(recipes.EFFORTS)
    for effort in recipes.EFFORTS:
        compose(Target(name="x"), effort=effort)
    assert message(compose, Target(name="x"), effort="fst").endswith("did you mean 'fast'?")


# --- strictness ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"search.solvr": 1}, "unknown key 'search.solvr'; did you mean 'search.solver'?"),
        ({"serach.solver": 1}, "unknown key 'serach'; did you mean 'search'?"),
        ({"solver": "uniform"}, "unknown key 'solver'; did you mean 'search.solver'?"),
        ({"zzzz": 1}, "unknown key 'zzzz'; known: schema_version, description, architecture"),
        ({"search.solver": "unifrm"}, "got 'unifrm'; did you mean 'uniform'?"),
        ({"search.bits": [2, "3"]}, "search.bits[1]: input should be a valid integer, got '3'"),
        ({"search.bits": [2, True]}, "search.bits[1]: input should be a valid integer, got True"),
        ({"search.bits": [9]}, "search.bits[0]: input should be less than or equal to 8, got 9"),
        ({"search": 3}, "search: input should be an object, got 3"),
        (
            {"search.group_sizes": [64, -2]},
            "search.group_sizes[1]: group_size must be positive or -1",
        ),
        ({"quantize.damping": float("nan")}, "quantize.damping[0]: input should be"),
        ({"schema_version": 2}, "schema_version: input should be 1, got 2"),
        ({"model": {"pakage": "x"}}, "unknown key 'model.pakage'; did you mean 'model.package'?"),
        ({"model": {"package": "x"}}, "model.version: field required"),
        ({"search.bits": object()}, "not JSON serializable"),
    ],
)
def test_a_bad_setting_is_named_by_its_path(settings: dict[str, object], expected: str) -> None:
    text = message(compose, Target(name="x"), settings=settings)
    assert expected in text
    assert text.count(", got ") <= 1


def test_a_fault_of_the_file_is_reported_with_its_name(tmp_path: Path) -> None:
    target = resolve_target(write(tmp_path / "r.yaml", "search: {solvr: 1}\n"))
    assert message(compose, target).startswith(f"{tmp_path / 'r.yaml'}: unknown key 'search.solvr'")


def test_remote_code_cannot_be_switched_on_by_a_recipe(tmp_path: Path) -> None:
    target = resolve_target(write(tmp_path / "r.yaml", "trust_remote_code: true\n"))
    assert "unknown key 'trust_remote_code'" in message(compose, target)


def test_settings_are_parsed_as_yaml() -> None:
    parsed = parse_settings(["a.b=1e-3", "c=[2, 3]", "d=x=y", "e=", "f = 4"])
    assert parsed == {"a.b": 0.001, "c": [2, 3], "d": "x=y", "e": None, "f": 4}


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (["abc"], "--set abc: expected key=value"),
        (["=1"], "expected key=value"),
        (["a..b=1"], "expected key=value"),
        (["a=1", "a=2"], "--set a is given twice"),
        (["a=[1"], "--set a, line 1"),
    ],
)
def test_a_malformed_setting_is_refused(pairs: list[str], expected: str) -> None:
    assert expected in message(parse_settings, pairs)


def test_every_listed_key_can_be_set() -> None:
    plain = json.loads(Recipe().model_dump_json())
    for key in recipes.setting_keys():
        value = plain
        for part in key.split("."):
            value = value[part]
        compose(Target(name="x"), settings={key: value})


# --- files ---------------------------------------------------------------------------------------


def test_a_recipe_round_trips_through_yaml(tmp_path: Path) -> None:
    target = resolve_target("llama")
    recipe = compose(target, effort="fast", settings={"calibrate.damping": 1e-5})
    text = strict_yaml.dump(recipe.model_dump(mode="json"))
    again = recipes.load_recipe(write(tmp_path / "again.yaml", text))
    assert again == recipe
    assert again.calibrate.damping == 1e-5


def test_load_recipe_refuses_a_model(here: Path) -> None:
    (here / "folder").mkdir()
    assert "is a model, not a recipe" in message(recipes.load_recipe, "folder")


def test_recipes_are_found_in_a_wheel_before_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "quantforge"
    checkout = write(tmp_path / "recipes" / "llm" / "a.yaml", "{}\n")
    monkeypatch.setattr(recipes, "_PACKAGE", package)
    assert recipes.known_recipes() == {"llm/a": checkout}
    (package / "recipes" / "llm").mkdir(parents=True)  # what an uninstall leaves behind
    assert recipes.recipe_root() == tmp_path / "recipes"
    installed = write(package / "recipes" / "llm" / "b.yaml", "{}\n")
    assert recipes.known_recipes() == {"llm/b": installed}
    installed.unlink()
    checkout.unlink()
    with pytest.raises(InputError, match="no recipes beside"):
        recipes.recipe_root()


def test_one_coefficient_stands_for_a_list_of_one():
    target = resolve_target("llama")
    settings = {"quantize.method": "qep", "quantize.mismatch": [0, 0.5], "quantize.damping": 0.1}
    recipe = compose(target, settings=settings).quantize
    assert (recipe.mismatch, recipe.pull, recipe.damping) == ((0.0, 0.5), (), (0.1,))
    with pytest.raises(UsageError, match=r"quantize\.mismatch\[1\]: input should be less than"):
        compose(target, settings={"quantize.method": "qep", "quantize.mismatch": [0, 1.5]})
    with pytest.raises(UsageError, match="mismatch does nothing with gptq; use gptaq or qep"):
        compose(target, settings={"quantize.method": "gptq", "quantize.mismatch": 0.5})


def test_an_option_that_would_do_nothing_is_refused():
    for key, value in (
        ("method", "rtn"), ("grid", "mse"), ("damping", 0.1), ("rounding.steps", 9), ("awq", True),
        ("magr", 1e-4), ("refit", True),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=r"does nothing without quantize\.sequential"):
            compose(Target(name="x", model="y"), effort="fast", settings={f"quantize.{key}": value})
        compose(Target(name="x", model="y"), settings={f"quantize.{key}": value})
    for key, value in (("pull", 0.1), ("refit", True), ("mismatch", 0.5)):
        settings = {f"quantize.{key}": value, "quantize.method": "rtn"}
        with pytest.raises(UsageError, match=f"{key} does nothing with rtn"):
            compose(Target(name="x", model="y"), settings=settings)


@pytest.mark.parametrize(
    ("quantize", "said"),
    [
        ({"pull_form": "B"}, "pull_form does nothing without a pull"),
        ({"method": "foem", "pull": 0.0, "pull_form": "A"}, "pull_form does nothing"),
        ({"method": "foem", "pull": 0.01, "pull_form": "A"}, "pull 0.01 in form A diverges"),
        (
            {"rounding.steps": 0, "rounding.latent_step": 0.1},
            "rounding.latent_step does nothing with rounding.steps=0",
        ),
        (
            {"rounding.steps": 0, "rounding.share": 0.5},
            "rounding.share does nothing with rounding.steps=0",
        ),
        (
            {"clip": True, "grid": "minmax"},
            "clip needs a grid that is fitted to the clipped weight",
        ),
        (
            {"clip": True, "method": "rtn"},
            "clip does nothing with grid diagonal, which is searched; use minmax",
        ),
        ({"rounding.patience": 3}, "patience=3 does nothing: 50 steps are measured 3 times"),
        ({"method": "rtn", "order": "groups"}, "order does nothing with rtn; use gptq"),
        ({"tuning.steps": 0, "tuning.batch": 2}, "tuning.batch does nothing with tuning.steps=0"),
        ({"rounding.steps": 5, "rounding.batch": 8}, "rounding.batch=8 is more than batch_size=4"),
        ({"method": "rtn", "output_damping": 0.1}, "output_damping does nothing without feedback"),
        ({"output_feedback": False, "output_damping": 0.1}, "output_damping does nothing"),
        ({"output_feedback": False, "row_aim": "target"}, "row_aim does nothing"),
        ({"method": "rtn", "token_weighting": 0.3}, "token_weighting does nothing with rtn"),
        ({"method": "rtn", "damping": [0.1, 0.2]}, "rtn does not choose between dampings"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    quantize: dict[str, object], said: str
) -> None:
    settings = {f"quantize.{key}": value for key, value in quantize.items()}
    with pytest.raises(UsageError, match=re.escape(said)):
        compose(Target(name="x", model="y"), settings=settings)


def test_a_recipe_file_may_refine_what_the_effort_switches_on(tmp_path: Path) -> None:
    written = write(tmp_path / "r.yaml", "quantize: {rounding: {patience: 2}}\n")
    assert compose(resolve_target(written)).quantize.rounding.patience == 2
    with pytest.raises(UsageError, match=r"r\.yaml: quantize: rounding\.patience does nothing"):
        compose(resolve_target(written), effort="fast")


def test_a_share_of_the_blocks_needs_a_search() -> None:
    settings = {"quantize.rounding.share": 0.5}
    assert compose(Target(name="x", model="y"), settings=settings).quantize.rounding.share == 0.5
    with pytest.raises(UsageError, match=r"rounding\.share needs a plan that was searched"):
        compose(resolve_target("uniform-w3g64"), settings=settings | {"model": "./m"})


def test_a_published_pull_is_that_of_its_form() -> None:
    from quantforge.quantize.layer import choices

    for form, pull in (("A", 3e-4), ("B", 0.1), ("C", 0.1)):
        settings = {"quantize.method": "foem", "quantize.pull_form": form}
        (found,) = choices(compose(Target(name="x", model="y"), settings=settings).quantize, 64)
        assert (found.feedback.pull, found.feedback.pull_form) == (pull, form)
    (found,) = choices(compose(Target(name="x", model="y")).quantize, 64)
    assert found.feedback.pull == 0.0


# What a paper's recipe asks for: method, grid, and the tokens it is fitted on.
PAPERS = {
    "awq-w4g128": ("rtn", "4b-g128", 128 * 512),
    "foem-w3g128": ("foem", "3b-g128", 128 * 2048),
    "gptaq-w3g128": ("gptaq", "3b-g128", 128 * 2048),
    "gptq-w3": ("gptq", "3b-pc", 128 * 2048),
    "gptq-w3g128": ("gptq", "3b-g128", 128 * 2048),
    "gptq-w4g128": ("gptq", "4b-g128", 128 * 2048),
    "magr-w2": ("gptq", "2b-pc", 128 * 2048),
    "qep-w3g128": ("qep", "3b-g128", 128 * 2048),
    "rtn-w4g128": ("rtn", "4b-g128", 28 * 512),
}


@pytest.mark.parametrize("effort", recipes.EFFORTS)
@pytest.mark.parametrize("name", PAPERS)
def test_a_paper_s_recipe_is_that_paper_s_setting_at_any_effort(name: str, effort: str) -> None:
    from quantforge.load.batches import split_rows

    recipe = compose(resolve_target(name), effort=effort, settings={"model": "./m"})
    method, spec, tokens = PAPERS[name]
    quantize, calibration = recipe.quantize, recipe.calibration
    assert (quantize.method, str(recipe.search.settled)) == (method, spec)
    assert quantize.sequential
    assert not quantize.needs_output_grams
    assert quantize.tuning.steps == quantize.rounding.steps == 0
    assert (quantize.grid, quantize.damping) == ("minmax", (0.01,))
    assert quantize.awq == quantize.clip == name.startswith("awq")
    assert quantize.magr == (1e-3 if name.startswith("magr") else 0.0)
    rows = torch.arange(calibration.sequences).unsqueeze(1)
    fitting, _ = split_rows(rows, calibration.held_out_share)
    assert len(fitting) * calibration.sequence_length == tokens
    assert load_recipe(name).model is None
    only = compose(resolve_target(name), settings={"search.asymmetric": "only"})
    assert str(only.search.settled) == f"{spec}-asym"


def test_every_shipped_recipe_is_listed_with_its_paper() -> None:
    page = (recipes.recipe_root() / "README.md").read_text(encoding="utf-8")
    for name in (n for n in recipes.known_recipes() if n.startswith("llm/")):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        papers = re.findall(r"arXiv \d{4}\.\d{5}", load_recipe(name).description)
        assert all(paper in row for paper in papers)
        assert papers or name.partition("/")[2] in ("llama", "rtn-w4g128", "uniform-w3g64")


def test_the_best_effort_refines_where_there_is_something_to_refine(tmp_path: Path) -> None:
    target = Target(name="x", model="y")
    best = compose(target, effort="best", settings={"budget": "3bit"})
    assert (best.search.refine, compose(target).search.refine) == (3, 0)
    assert best.quantize.rounding.steps > 0
    assert best.quantize.tuning.steps > compose(target).quantize.tuning.steps
    for settings in (
        {"budget": "kl:0.1"}, {"budget": "120MB, ppl:+2%"}, {"search.solver": "uniform"},
        {"search.refine": 0},
    ):  # fmt: skip
        assert compose(target, effort="best", settings=settings).search.refine == 0
    asked = {"search.refine": 1, "budget": "kl:0.1"}  # refused later, in a line that names both
    assert compose(target, effort="best", settings=asked).search.refine == 1
    one_pass = compose(target, effort="best", settings={"quantize.sequential": False})
    assert one_pass.quantize.rounding.steps == 0
    one_pass = compose(target, settings={"quantize.sequential": False})
    assert (one_pass.quantize.rounding.steps, compose(target).quantize.rounding.steps) == (0, 50)
    recipe = resolve_target(write(tmp_path / "r.yaml", "search:\n  solver: uniform\n"))
    assert compose(recipe, effort="best").search.refine == 0


def test_the_best_effort_reads_more_text_where_there_is_one() -> None:
    target = Target(name="x", model="y")
    for source, sequences in (("a.txt", 512), ("pydoc", 512), ("self", None), ("mix", None)):
        asked = {"calibration.source": source}
        assert compose(target, effort="best", settings=asked).calibration.sequences == sequences
    assert compose(target, effort="best").calibration.sequences is None
    asked = {"calibration.source": "a.txt", "calibration.sequences": 64}
    assert compose(target, effort="best", settings=asked).calibration.sequences == 64
    assert compose(target, effort="fast").calibration.sequences == 48


def test_a_budget_in_a_recipe_can_be_replaced(tmp_path: Path) -> None:
    target = resolve_target(write(tmp_path / "r.yaml", "budget: 3bit\n"))
    assert compose(target).budget == "3bit"
    assert compose(target, settings={"budget": "4bit"}).budget == "4bit"


def test_an_output_is_named_by_what_a_folder_may_be_called(here: Path) -> None:
    assert Target(name="Some.Model").output("3.25bpw") == Path("Some.Model-3.25bpw")
    assert Target(name="a b/c").output(" vram:24GB@32k") == Path("a-b-c-vram-24GB-32k")
    assert Target(name="gptq-w4g128").output() == Path("gptq-w4g128-quantized")
    assert Target(name="../..").output("3bit") == Path("model-3bit")
