"""A lent network comes back with its dtypes, ties, gradients and, after an error, its values."""

import pytest
import torch
from torch import nn

from quantforge.borrowing import in_float32, restored_on_error


@pytest.fixture
def module():
    made = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
    made[3].weight = made[0].weight  # a tied head
    made[1].to(torch.bfloat16)
    made[0].to(torch.float16)
    return made


def dtypes(module):
    return {name: tensor.dtype for name, tensor in module.state_dict().items()}


def test_everything_is_float32_inside_and_as_before_after(module):
    before, values = dtypes(module), {n: t.clone() for n, t in module.state_dict().items()}
    gradient = torch.ones_like(module[1].weight)
    module[1].weight.grad = gradient
    with in_float32(module):
        inside = dtypes(module)
        counter = inside.pop("2.num_batches_tracked")
        assert (set(inside.values()), counter) == ({torch.float32}, torch.int64)
        assert module[3].weight is module[0].weight
        assert module[1].weight.grad is None
        assert all(torch.equal(t, values[n].to(t.dtype)) for n, t in module.state_dict().items())
        module[1].weight.data.fill_(1 + 2**-12)
    assert dtypes(module) == before
    assert module[1].weight.grad is gradient
    assert torch.equal(module[1].weight, torch.ones(4, 4, dtype=torch.bfloat16))


def test_an_interrupt_while_giving_back_does_not_leave_half_of_it(module, monkeypatch):
    before, values = dtypes(module), {n: t.clone() for n, t in module.state_dict().items()}
    convert, calls = torch.Tensor.to, []

    def interrupted(tensor, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return convert(tensor, *arguments)

    with pytest.raises(KeyboardInterrupt), restored_on_error(module), in_float32(module):
        module[1].weight.data.zero_()
        module.train(False)
        monkeypatch.setattr(torch.Tensor, "to", interrupted)
    monkeypatch.undo()
    assert len(calls) > 2
    assert dtypes(module) == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in module.state_dict().items())
    assert module.training
