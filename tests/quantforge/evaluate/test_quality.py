"""Quality against a brute-force float64 definition, token by token."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from quantforge.errors import CancelledError, InputError
from quantforge.evaluate import scoring
from quantforge.evaluate.quality import ReferenceOutputs, measure, paired
from quantforge.models import LLAMA
from quantforge.progress import Monitor, ProgressEvent
from quantforge.testing import markov_tokens, tiny_llama


def noisy(module: nn.Module, scale: float = 0.01, *, seed: int = 1) -> nn.Module:
    """A copy whose block weights carry noise."""
    changed = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in LLAMA.layers(changed):
            weight = changed.get_submodule(layer.name).weight
            weight += scale * torch.randn(weight.shape, generator=generator)
    return changed


@torch.no_grad()
def brute_force(reference, module, windows) -> dict[str, list]:
    """The definition in float64, one window, one token and one vocabulary entry at a time."""
    reference, module = copy.deepcopy(reference).double(), copy.deepcopy(module).double()
    found: dict[str, list] = {"kl": [], "nll": [], "reference_nll": [], "top1": []}
    for window in windows:
        p_logits = reference(input_ids=window[None]).logits[0]
        q_logits = module(input_ids=window[None]).logits[0]
        rows: dict[str, list] = {name: [] for name in found}
        for position in range(len(window) - 1):
            p = [math.exp(v) for v in p_logits[position].tolist()]
            q = [math.exp(v) for v in q_logits[position].tolist()]
            p = [v / math.fsum(p) for v in p]
            q = [v / math.fsum(q) for v in q]
            following = int(window[position + 1])
            kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            rows["kl"].append(kl)
            rows["nll"].append(-math.log(q[following]))
            rows["reference_nll"].append(-math.log(p[following]))
            rows["top1"].append(p.index(max(p)) == q.index(max(q)))
        for name, values in rows.items():
            found[name].append(sum(values) / len(values))
    return found


@pytest.fixture(scope="module")
def model():
    module = tiny_llama(seed=3)
    with torch.no_grad():  # spread the logits: an untrained model is almost uniform
        module.get_submodule("model.norm").weight.mul_(12)
    return module


@pytest.fixture(scope="module")
def windows():
    return markov_tokens(5, 24, seed=7)


@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_definition(tied, windows):
    module = tiny_llama(seed=3, tied=tied)
    with torch.no_grad():
        module.get_submodule("model.norm").weight.mul_(12)
    changed = noisy(module)
    reference = ReferenceOutputs.collect(module, LLAMA, windows, batch=2)
    found = measure(changed, LLAMA, windows, reference, text="markov")
    expected = brute_force(module, changed, windows)

    kl = torch.tensor(expected["kl"], dtype=torch.float64)
    assert kl.mean() > 0.05  # the noise matters, so that the comparison means something
    assert found.window_kl == pytest.approx(expected["kl"], abs=1e-6)
    assert found.window_nll == pytest.approx(expected["nll"], abs=1e-6)
    assert found.kl == pytest.approx(float(kl.mean()), abs=1e-6)
    assert found.kl_stderr == pytest.approx(float(kl.std()) / math.sqrt(5), abs=1e-6)
    assert found.top1 == pytest.approx(sum(expected["top1"]) / 5, abs=1e-9)
    assert 0.1 < found.top1 < 0.99
    assert math.log(found.perplexity) == pytest.approx(sum(expected["nll"]) / 5, abs=1e-6)
    assert math.log(found.reference_perplexity) == pytest.approx(
        sum(expected["reference_nll"]) / 5, abs=1e-6
    )
    assert (found.windows, found.window_length, found.text) == (5, 24, "markov")


def test_float_model_against_itself_is_exactly_zero(model, windows):
    reference = ReferenceOutputs.collect(model, LLAMA, windows, batch=2)
    found = measure(model, LLAMA, windows, reference, text="markov")
    assert found.kl == 0.0
    assert found.kl_stderr == 0.0
    assert found.top1 == 1.0
    assert found.perplexity == found.reference_perplexity


def test_token_chunks_do_not_change_the_result(model, windows, monkeypatch):
    changed = noisy(model)
    reference = ReferenceOutputs.collect(model, LLAMA, windows)
    whole = measure(changed, LLAMA, windows, reference, text="")
    monkeypatch.setattr(scoring, "TOKEN_CHUNK", 7)
    chunked = measure(changed, LLAMA, windows, reference, text="")
    assert chunked.window_kl == pytest.approx(whole.window_kl, abs=1e-6)
    assert chunked.top1 == whole.top1


def test_never_holds_more_logits_than_a_chunk(model, windows, monkeypatch):
    monkeypatch.setattr(scoring, "TOKEN_CHUNK", 16)
    sizes = []
    original = scoring.LinearHead.__call__

    def spy(self, hidden):
        made = original(self, hidden)
        sizes.append(len(made))
        return made

    monkeypatch.setattr(scoring.LinearHead, "__call__", spy)
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    reference = ReferenceOutputs.collect(model, LLAMA, windows)
    calls.clear()  # the check of the head's place looks at a few tokens
    measure(model, LLAMA, windows, reference, text="")
    handle.remove()
    assert calls == []  # the network's own head never runs over a window
    assert max(sizes) <= 16
    assert sum(sizes) == 2 * 5 * 23  # each token once when collected, once when measured


def test_bfloat16_is_near_and_its_own_zero(model, windows):
    changed = noisy(model)
    exact = ReferenceOutputs.collect(model, LLAMA, windows)
    expected = measure(changed, LLAMA, windows, exact, text="")
    rounded = measure(changed, LLAMA, windows, exact, text="", precision="bfloat16")
    assert rounded.kl != expected.kl
    assert rounded.kl == pytest.approx(expected.kl, rel=0.05)
    itself = ReferenceOutputs.collect(model, LLAMA, windows, precision="bfloat16")
    assert measure(model, LLAMA, windows, itself, text="", precision="bfloat16").kl == 0.0


def test_bfloat16_storage_halves_the_memory_and_stays_near(model, windows):
    changed = noisy(model)
    full = ReferenceOutputs.collect(model, LLAMA, windows)
    half = ReferenceOutputs.collect(model, LLAMA, windows, storage=torch.bfloat16)
    assert half.hidden.nbytes * 2 == full.hidden.nbytes
    a = measure(changed, LLAMA, windows, full, text="")
    b = measure(changed, LLAMA, windows, half, text="")
    assert b.kl == pytest.approx(a.kl, rel=0.05)


def test_a_quantized_head_is_the_models_own(windows):
    module = tiny_llama(seed=3, tied=False)
    with torch.no_grad():
        module.get_submodule("model.norm").weight.mul_(12)
    reference = ReferenceOutputs.collect(module, LLAMA, windows)
    changed = copy.deepcopy(module)
    changed.lm_head = nn.Sequential(changed.lm_head)  # any module that gives logits
    with torch.no_grad():
        changed.lm_head[0].weight.mul_(1.1)
    found = measure(changed, LLAMA, windows, reference, text="")
    plain = copy.deepcopy(module)
    with torch.no_grad():
        plain.lm_head.weight.mul_(1.1)
    expected = brute_force(module, plain, windows)
    assert found.window_kl == pytest.approx(expected["kl"], abs=1e-6)
    assert found.kl > 1e-3


def test_both_ways_of_scoring_agree(model, windows):
    changed = noisy(model)
    reference = ReferenceOutputs.collect(model, LLAMA, windows)
    shared = measure(changed, LLAMA, windows, reference, text="")
    changed.lm_head = nn.Sequential(changed.lm_head)  # equal, but not known to be
    separate = measure(changed, LLAMA, windows, reference, text="")
    assert shared.window_kl == pytest.approx(separate.window_kl, abs=1e-6)
    assert shared.window_nll == pytest.approx(separate.window_nll, abs=1e-6)
    assert shared.top1 == separate.top1


def test_head_changed_in_place(windows):
    module = tiny_llama(seed=3, tied=False)
    shared = ReferenceOutputs.collect(module, LLAMA, windows)
    kept = ReferenceOutputs.collect(module, LLAMA, windows, keep_head_copy=True)
    assert measure(module, LLAMA, windows, shared, text="").kl == 0.0
    with torch.no_grad():
        module.lm_head.weight.mul_(3.0)
    assert measure(module, LLAMA, windows, kept, text="").kl > 1e-3
    with pytest.raises(InputError, match="keep_head_copy=True"):
        measure(module, LLAMA, windows, shared, text="")


def test_head_bias(windows):
    module = tiny_llama(seed=3, tied=False)
    with torch.no_grad():
        module.get_submodule("model.norm").weight.mul_(12)
    module.lm_head.bias = nn.Parameter(torch.linspace(-2, 2, 96))
    changed = noisy(module)
    reference = ReferenceOutputs.collect(module, LLAMA, windows)
    found = measure(changed, LLAMA, windows, reference, text="")
    expected = brute_force(module, changed, windows)
    assert found.window_kl == pytest.approx(expected["kl"], abs=1e-6)
    assert found.window_nll == pytest.approx(expected["nll"], abs=1e-6)


def test_first_windows_of_a_reference(model, windows):
    changed = noisy(model)
    reference = ReferenceOutputs.collect(model, LLAMA, windows, batch=2)
    whole = measure(changed, LLAMA, windows, reference, text="")
    part = measure(changed, LLAMA, windows[:2], reference, text="")
    assert part.window_kl == whole.window_kl[:2]


def test_one_window_takes_its_error_over_tokens(model, windows):
    reference = ReferenceOutputs.collect(model, LLAMA, windows[:1])
    found = measure(noisy(model), LLAMA, windows[:1], reference, text="")
    assert 0 < found.kl_stderr < math.inf
    assert paired(found, found).kl_stderr == math.inf
    assert not paired(found, found).lower


def test_paired_difference(model, windows):
    reference = ReferenceOutputs.collect(model, LLAMA, windows)
    good = measure(noisy(model, 0.005), LLAMA, windows, reference, text="")
    bad = measure(noisy(model, 0.03), LLAMA, windows, reference, text="")
    difference = paired(good, bad)
    values = torch.tensor(
        [a - b for a, b in zip(good.window_kl, bad.window_kl, strict=True)], dtype=torch.float64
    )
    assert difference.kl == pytest.approx(good.kl - bad.kl, abs=1e-12)
    assert difference.kl_stderr == pytest.approx(float(values.std()) / math.sqrt(5), rel=1e-12)
    assert difference.nll == pytest.approx(
        math.log(good.perplexity) - math.log(bad.perplexity), abs=1e-12
    )
    assert difference.lower
    assert not paired(bad, good).lower
    assert paired(good, good).kl_stderr == 0.0
    with pytest.raises(InputError, match="cannot pair 5 windows of 24 tokens with 2 of 24"):
        paired(good, measure(model, LLAMA, windows[:2], reference, text=""))


def test_a_destroyed_network_is_reported_not_hidden(model, windows):
    reference = ReferenceOutputs.collect(model, LLAMA, windows)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_submodule("model.norm").weight.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        measure(broken, LLAMA, windows, reference, text="")


def test_input_errors(model, windows):
    reference = ReferenceOutputs.collect(model, LLAMA, windows)
    with pytest.raises(InputError, match="not those the reference was collected on"):
        measure(model, LLAMA, windows.flip(0), reference, text="")
    with pytest.raises(InputError, match="vocabulary of 96"):
        ReferenceOutputs.collect(model, LLAMA, windows + 50)
    with pytest.raises(InputError, match="length >= 2"):
        ReferenceOutputs.collect(model, LLAMA, windows[:, :1])


def test_a_network_that_caps_its_logits_is_refused(model, windows):
    capped = copy.deepcopy(model)
    inner = capped.forward

    def forward(**inputs):
        output = inner(**inputs)
        output.logits = 2 * torch.tanh(output.logits / 2)
        return output

    capped.forward = forward
    with pytest.raises(InputError, match="does not say what else is done to them"):
        ReferenceOutputs.collect(capped, LLAMA, windows)


def test_progress_and_cancel(model, windows):
    import threading

    events: list[ProgressEvent] = []
    monitor = Monitor(progress=events.append, cancel=threading.Event())
    reference = ReferenceOutputs.collect(model, LLAMA, windows, batch=2, monitor=monitor)
    assert [(e.stage, e.done, e.total) for e in events] == [
        ("reference", 2, 5), ("reference", 4, 5), ("reference", 5, 5),
    ]  # fmt: skip
    monitor.cancel.set()
    with pytest.raises(CancelledError):
        measure(model, LLAMA, windows, reference, text="", monitor=monitor)
    assert not model.get_submodule("model.norm")._forward_hooks  # the hook is gone again
