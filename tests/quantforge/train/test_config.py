"""Settings that would do nothing, or do not go together, are refused in one line that says why."""

import re

import pytest

from quantforge.errors import UsageError
from quantforge.recipe import Target, compose
from quantforge.train.config import TrainingConfig
from quantforge.train.optimizers import OPTIMIZERS
from quantforge.train.quantizers import QUANTIZERS


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokens": 10, "minutes": 2}, "tokens=10 and minutes=2: give one of them"),
        ({"batch": 4}, "batch does nothing without training.tokens or minutes"),
        ({"tokens": 1, "quantizer": "hesita"}, "did you mean 'hestia'?"),
        ({"tokens": 1, "quantizer": "lsq", "alpha": 0.5}, "alpha does nothing with the quantizer"),
        ({"tokens": 1, "kappa": 2}, "kappa does nothing without an alpha"),
        ({"tokens": 1, "rho": 0.1}, "rho does nothing with the optimizer adamw"),
        ({"tokens": 1, "warm_up": 0.6, "decay": 0.5}, "are more than all of training"),
        ({"tokens": 1, "betas": [0.9, 1.0]}, "betas must be at least 0 and below 1"),
        ({"tokens": 1, "at_once": 9}, "at_once=9 is more than batch=8"),
        (
            {"tokens": 1, "weight_rate": 0, "scale_rate": 0, "norm_rate": 0},
            "are all 0: nothing is trained",
        ),
        ({"block_steps": 5, "recompute": 2}, "recompute does nothing without training.tokens"),
        ({"block_steps": 5, "optimizer": "sophia"}, "block_steps needs the optimizer adamw"),
        ({"tokens": -1}, "training.tokens: input should be greater than or equal to 0"),
        ({"token": 1}, "unknown key 'training.token'; did you mean 'training.tokens'?"),
    ],
)
def test_wrong_settings_are_one_clear_line(settings, said):
    keys = {f"training.{key}": value for key, value in settings.items()}
    with pytest.raises(UsageError, match=re.escape(said)) as raised:
        compose(Target(name="x", model="y"), settings=keys)
    assert "\n" not in str(raised.value)


def test_names_are_those_of_the_registries():
    fields = TrainingConfig.model_fields
    assert set(fields["quantizer"].annotation.__args__) == set(QUANTIZERS)
    assert set(fields["optimizer"].annotation.__args__) == set(OPTIMIZERS)
    assert not TrainingConfig().on
    assert TrainingConfig(minutes=0.5).on
