"""A job whose stages are called by hand, without the plan having been measured before."""

import copy

import pytest
import torch

from quantforge.delivery import round_kept_tensors
from quantforge.opening import configure, open_job
from quantforge.search.allocate import search
from quantforge.search.budget import Budget
from quantforge.testing import markov_tokens, tiny_llama, train
from quantforge.types import BitPlan


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


def test_the_reference_shares_the_head_until_the_network_s_own_is_rounded(monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTFORGE_CACHE", str(tmp_path))
    module = train(tiny_llama(blocks=1), steps=20)
    batches = [markov_tokens(4, 48, seed=seed) for seed in range(4)]
    job = open_job(module, configure(module), calibration=batches)
    weight = module.lm_head.weight
    before = weight.detach().clone()
    assert (
        job.reference.head.weight.data_ptr() == weight.data_ptr()
    )  # no second vocabulary in memory
    kept = dict.fromkeys(layer.name for layer in job.model.layers)
    plan = BitPlan(
        assignment=kept, budget="", stored_bits=16, code_bits=16, predicted_loss=None, solver=""
    )
    round_kept_tensors(job, plan)
    assert torch.equal(weight, before.bfloat16().float())
    assert not torch.equal(weight, before)
    assert torch.equal(job.reference.head.weight, before)
    assert 0 < job.measure_held_out().kl < 1e-3  # against the float head
