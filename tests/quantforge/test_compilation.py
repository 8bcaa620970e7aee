"""A job whose stages are called by hand, without the plan having been measured before."""

import copy

import pytest

from quantforge.opening import configure, open_job
from quantforge.search.allocate import search
from quantforge.search.budget import Budget
from quantforge.testing import markov_tokens, tiny_llama, train


def test_tuning_is_judged_against_the_float_network_whatever_was_called_before(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))
    trained = train(tiny_llama(blocks=2))
    qualities = {}
    for steps in (0, 24):
        settings = {
            "search.bits": [2, 3],
            "search.group_sizes": [32, -1],
            "quantize.tuning.steps": steps,
        }
        if steps:
            settings["quantize.tuning.scale_step"] = 0.01
        module = copy.deepcopy(trained)
        recipe = configure(module, settings=settings)
        batches = [markov_tokens(4, 48, seed=seed) for seed in range(16)]
        job = open_job(module, recipe, calibration=batches)
        # the second time from the cache: runs no network
        with job.measure(fresh=False) as measured:
            plan = search(measured.sensitivity, Budget.parse("2.6bit"), job.recipe.search)
            for _ in job.quantize(plan, measured):
                pass
        assert job.notes == []
        qualities[steps] = job.measure_held_out()
    assert qualities[0].kl > 1e-3
    assert qualities[24].kl < 0.95 * qualities[0].kl
    assert qualities[24].reference_perplexity == pytest.approx(qualities[0].reference_perplexity)
