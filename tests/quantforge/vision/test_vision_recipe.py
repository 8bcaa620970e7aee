import pytest

from quantforge.errors import UsageError
from quantforge.recipe import Recipe, known_recipes, resolve_target, setting_keys
from quantforge.vision.recipe import VisionRecipe, any_recipe, compose


@pytest.mark.parametrize("name", sorted(known_recipes()))
def test_every_shipped_recipe_is_of_its_kind(name):
    made = any_recipe(name)
    assert isinstance(made, VisionRecipe if name.startswith("cnn/") else Recipe)
    assert made.description


def test_efforts_and_settings_are_put_together():
    target = resolve_target("efficientnet-lite0")
    fast = compose(target, effort="fast", settings={"activations.bits": [4, 8]})
    assert fast.reconstruction.steps == 0
    assert fast.activations.bits == (4, 8)
    assert fast.network == "efficientnet-lite0"
    best = compose(target, effort="best", settings={"reconstruction.steps": 7})
    assert best.reconstruction.steps == 7
    assert best.calibration.count > fast.calibration.count


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reconstruction.stepz": 3}, "did you mean 'reconstruction.steps'"),
        ({"search.edges": "8bit"}, "not a spec"),
        ({"activations.bits": [4, 8], "search.solver": "uniform"}, "one width of activations"),
        ({"training.minutes": 3}, "training.minutes"),
    ],
)
def test_wrong_settings_are_one_line(settings, said):
    with pytest.raises(UsageError, match=said) as raised:
        compose(resolve_target("efficientnet-lite0"), settings=settings)
    assert "\n" not in str(raised.value)


def test_keys_are_those_of_the_sections():
    keys = setting_keys(VisionRecipe)
    assert {"calibration.source", "activations.method", "training.quantizer"} <= set(keys)
