"""Block-wise training: nearer to the float blocks, never further, and going on after a break."""

import pytest
import torch

from quantforge.journal import NO_JOURNAL, Journal
from quantforge.progress import Monitor
from quantforge.train.blockwise import BlockwiseTask, train_blocks
from quantforge.train.config import TrainingConfig


def run(case, monitor=None, journal=NO_JOURNAL, **settings):
    given = {"block_steps": 20, "batch": 4, "precision": "float32", "weight_rate": 0.03}
    task = BlockwiseTask(
        model=case.model,
        weights=case.weights,
        originals={name: case.original(name) for name in case.weights},
        fitting=case.tokens[:-4],
        held_out=case.tokens[-4:],
        channel_weights=[torch.ones(32)] * 2,
    )
    config = TrainingConfig(**given | settings)
    return train_blocks(task, config, seed=0, monitor=monitor or Monitor(), journal=journal)


@pytest.mark.parametrize("quantizer", ["straight-through", "hestia"])
def test_blocks_come_nearer_and_the_network_holds_them(case, quantizer):
    before = case.kl()
    kinds = {name: type(one) for name, one in case.model.module.named_modules()}
    made = run(case, quantizer=quantizer)
    assert set(made) == set(case.weights)
    assert case.kl() < 0.8 * before
    for name, weight in made.items():
        layer = case.model.module.get_submodule(name)
        assert torch.equal(layer.weight, weight.dequantize())
        assert weight.spec == case.weights[name].spec
    assert {name: type(one) for name, one in case.model.module.named_modules()} == kinds
    assert all(p.grad is None and p.requires_grad for p in case.model.module.parameters())


def test_the_start_is_kept_where_nothing_nearer_comes(case):
    made = run(case, weight_rate=50.0, scale_rate=1.0, clip=0.0, block_steps=5)
    for name, weight in made.items():
        assert torch.equal(weight.codes, case.weights[name].codes)
        assert torch.equal(weight.scale, case.weights[name].scale)


def test_the_start_is_kept_where_training_starts_from_worse(case):
    """From the float weights a block starts at their rounding, which may be the worse one."""
    case.weights = run(case)
    made = run(case, start="float", weight_rate=1e-6, scale_rate=0.0, block_steps=2)
    for name, weight in made.items():
        assert torch.equal(weight.codes, case.weights[name].codes)


def test_a_broken_run_goes_on_to_the_same_bits(case, tmp_path):
    whole = run(case, block_steps=6)
    case.put(case.weights)

    class StopError(Exception):
        pass

    def stop(event):
        raise StopError

    with pytest.raises(StopError):
        run(case, Monitor(progress=stop), Journal(tmp_path), block_steps=6)
    case.put(case.weights)
    steps = []
    again = run(case, Monitor(progress=steps.append), Journal(tmp_path), block_steps=6)
    assert [step.done for step in steps] == [1, 2]
    for name, weight in whole.items():
        assert torch.equal(again[name].codes, weight.codes)
        assert torch.equal(again[name].scale, weight.scale)
    assert (tmp_path / "training-block-00000.safetensors").is_file()
