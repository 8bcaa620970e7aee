"""The fused attention inside networks: same numbers as the stock one, and gone afterwards."""

import pytest
import torch
from quantforge_kernels.attention import available
from torch import nn

from quantforge import attention
from quantforge.attention import FUSED, STOCK, fused_attention
from quantforge.capture import BlockWalk, compute_in, plain_attention, recomputed
from quantforge.load.huggingface import from_module
from quantforge.testing import markov_tokens, tiny_llama, train

with_kernel = pytest.mark.skipif(
    not available(), reason="the fused kernel needs AVX-512 with bfloat16"
)


@pytest.fixture(scope="module")
def network():
    """Head size 16, four query heads on two key heads."""
    return train(tiny_llama(blocks=2))


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the queries that the kernel was run on."""
    seen = []

    def counted(query, *rest):
        seen.append(tuple(query.shape))
        return original(query, *rest)

    original = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", counted)
    return seen


def block_gradients(block, hidden, kwargs, *, fused):
    """A block's output in bfloat16 products, and the gradients of its input and parameters."""
    start = hidden.clone().requires_grad_()
    slope = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    cpu = torch.device("cpu")
    # A module without configuration in place of the block: autocast alone.
    with compute_in("bfloat16", block if fused else nn.Identity(), cpu):
        output = block(start, **kwargs)
    parameters = list(block.parameters())
    return [output.detach(), *torch.autograd.grad(output, [start, *parameters], slope)]


@with_kernel
def test_a_block_gives_what_it_gives_with_stock_attention(network, calls):
    model = from_module(network)
    walk = BlockWalk(model.module, model.architecture, markov_tokens(3, 40), batch_size=3)
    assert calls == []  # the states before the first block need no attention
    block, hidden = walk.blocks[0], walk.hidden[0]
    kwargs = walk.arguments(block)[0]
    stock = block_gradients(block, hidden, kwargs, fused=False)
    assert calls == []
    fused = block_gradients(block, hidden, kwargs, fused=True)
    assert calls == [(3, 4, 40, 16)]
    with plain_attention(network), torch.enable_grad():
        start = hidden.clone().requires_grad_()
        slope = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        output = block(start, **kwargs)
        exact = [output.detach(), *torch.autograd.grad(output, [start, *block.parameters()], slope)]
    for ours, theirs, right in zip(fused, stock, exact, strict=True):
        size = float(right.norm())
        # Both are rounded to bfloat16 throughout; ours must not be further away.
        assert float((ours - theirs).norm()) <= 0.02 * size
        assert float((ours - right).norm()) <= 1.1 * float((theirs - right).norm()) + 1e-4 * size


@with_kernel
def test_a_walk_runs_the_kernel_in_bfloat16_only(network, calls):
    model = from_module(network)
    for precision, expected in (("float32", []), ("bfloat16", [(2, 4, 30, 16)])):
        walk = BlockWalk(
            model.module, model.architecture, markov_tokens(2, 30), precision=precision
        )
        walk.advance(walk.blocks[0])
        assert calls == expected


@with_kernel
def test_a_whole_network_gets_no_mask_and_the_kernel(network, calls):
    tokens = markov_tokens(2, 30)
    with torch.no_grad(), compute_in("bfloat16", network, torch.device("cpu")):
        fused = network(input_ids=tokens, use_cache=False).logits
        assert len(calls) == 2
        stocked = len(calls)
        with plain_attention(network):
            plain = network(input_ids=tokens, use_cache=False).logits
        assert len(calls) == stocked
        padded = torch.ones_like(tokens)
        padded[0, :4] = 0
        network(input_ids=tokens, attention_mask=padded, use_cache=False)
        assert len(calls) == stocked  # a mask that is not the causal one: torch's own
    difference = (fused - plain).float().norm() / plain.float().norm()
    assert float(difference) < 0.02


@with_kernel
def test_the_network_is_as_before_also_after_an_exception(network):
    config = network.config
    assert config._attn_implementation == STOCK
    with fused_attention(network):
        assert config._attn_implementation == FUSED
        with fused_attention(network.model.layers[0]):
            assert config._attn_implementation == FUSED
        assert config._attn_implementation == FUSED
    assert config._attn_implementation == STOCK
    with (
        pytest.raises(KeyError, match="within"),
        compute_in("bfloat16", network, torch.device("cpu")),
    ):
        raise KeyError("within")
    assert config._attn_implementation == STOCK
    assert not torch.is_autocast_enabled("cpu")


@with_kernel
def test_blocks_run_again_use_the_same_attention(network, calls):
    """The second pass is after the context: with another attention checkpointing would fail."""
    tokens, cpu = markov_tokens(1, 30), torch.device("cpu")
    found = []
    for every in (0, 1):
        network.zero_grad()
        with recomputed(network.model.layers, every):
            with compute_in("bfloat16", network.model, cpu):
                hidden = network.model(input_ids=tokens, use_cache=False).last_hidden_state
            hidden.float().square().sum().backward()
        found.append([one.grad.clone() for one in network.model.parameters()])
    assert len(calls) == 2 + 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert network.config._attn_implementation == STOCK
    network.zero_grad()


@with_kernel
@pytest.mark.parametrize(
    "asked",
    [
        {"attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()},
        {"dropout": 0.5},
        {"is_causal": False},
        {"sliding_window": 4},
        {"position_bias": torch.zeros(1, 2, 8, 8)},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_the_kernel_does_not_compute_goes_to_the_stock_attention(asked, calls):
    query, key, value = torch.randn(3, 1, 2, 8, 16).bfloat16()
    asked = {"attention_mask": None, **asked}
    torch.manual_seed(0)
    found, _ = attention._attention(nn.Module(), query, key, value, **asked)
    assert calls == []
    asked.pop("sliding_window", None)
    causal = asked.pop("is_causal", True) and asked["attention_mask"] is None
    mask, bias = asked["attention_mask"], asked.get("position_bias")
    if bias is not None:
        mask, causal = bias.bfloat16().masked_fill(~torch.ones(8, 8).tril().bool(), -1e30), False
    torch.manual_seed(0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, dropout_p=asked.get("dropout", 0.0)
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_float32_outside_autocast_stays_float32(calls):
    query, key, value = torch.randn(3, 1, 2, 8, 16)
    found, _ = attention._attention(nn.Module(), query, key, value, None)
    assert calls == []
    assert found.dtype == torch.float32


def test_other_modules_are_left_alone():
    module = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    module[1].config = {"_attn_implementation_internal": STOCK}
    with fused_attention(module), compute_in("bfloat16", module, torch.device("cpu")):
        assert module[0](torch.ones(1, 2)).dtype == torch.bfloat16
    assert module[1].config == {"_attn_implementation_internal": STOCK}
