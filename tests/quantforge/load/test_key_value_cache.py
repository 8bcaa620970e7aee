"""Reserved memory holds what transformers' own cache holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from quantforge.load.key_value_cache import ReservedLayer, reserved_cache
from quantforge.models.cache import cache_arguments, cache_of
from quantforge.testing import tiny_llama


@torch.no_grad()
def test_a_reserved_cache_gives_the_logits_of_a_growing_one():
    network = tiny_llama().eval()
    pieces = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(0)).split(
        [4, 1, 1, 3], dim=1
    )
    growing, reserved = DynamicCache(config=network.config), reserved_cache(network.config, 9)
    storage = set()
    for piece in pieces:
        expected = network(input_ids=piece, **cache_arguments(network, growing)).logits
        found = network(input_ids=piece, **cache_arguments(network, reserved)).logits
        assert torch.equal(found, expected)
        storage.add(reserved.layers[0].keys.data_ptr())
    assert len(storage) == 1  # one tensor served every length
    for one, other in zip(reserved.layers, growing.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


def test_a_full_cache_refuses_more():
    layer = ReservedLayer(4)
    states = torch.zeros(1, 1, 3, 2)
    layer.update(states, states)
    with pytest.raises(ValueError, match="for 4 tokens cannot take 6"):
        layer.update(states, states)
    assert layer.get_seq_length() == 3


def test_layers_with_a_sliding_window_keep_their_own_memory():
    from transformers import Gemma2Config

    config = Gemma2Config(num_hidden_layers=2, sliding_window=8)
    kinds = [type(layer) is ReservedLayer for layer in reserved_cache(config, 16).layers]
    assert sorted(kinds) == [False, True]


@torch.no_grad()
def test_the_cache_goes_by_the_name_that_a_network_knows(recwarn):
    network, tokens = tiny_llama().eval(), torch.randint(0, 64, (1, 5))
    whole = network(input_ids=tokens).logits
    first = network(input_ids=tokens[:, :3], **cache_arguments(network, None))
    last = network(input_ids=tokens[:, 3:], **cache_arguments(network, cache_of(first))).logits
    assert torch.allclose(last, whole[:, 3:], atol=1e-5)
    assert not [one for one in recwarn if "past_key_values" in str(one.message)]

    class Older(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None, use_cache=None):
            raise NotImplementedError

    assert cache_arguments(Older(), 1) == {"past_key_values": 1, "use_cache": True}
    assert cache_of(SimpleNamespace(past_key_values=2)) == 2
