"""Walking block by block: what blocks are given back, and which networks are refused."""

from functools import partial

import pytest
import torch

from quantforge.capture import BlockWalk, recomputed
from quantforge.errors import InputError
from quantforge.models import LLAMA
from quantforge.testing import markov_tokens, tiny_llama


def test_a_forward_of_the_block_s_own_is_used_and_left_in_its_place():
    module = tiny_llama(blocks=2)
    block, other = module.model.layers
    plain = type(block).forward
    own = block.forward = partial(plain, block)
    tokens = markov_tokens(2, 12)
    walk = BlockWalk(module, LLAMA, tokens, precision="float32")
    with recomputed(walk.blocks, 1):
        assert block.forward is not own
    assert block.forward is own
    assert "forward" not in other.__dict__
    for one in walk.blocks:
        walk.advance(one)
    with torch.no_grad():
        expected = module.model(tokens)[0]
        assert torch.allclose(module.model.norm(walk.hidden[0]), expected, atol=1e-5)


def test_blocks_that_do_not_run_in_their_order_are_refused():
    module = tiny_llama(blocks=3)
    run = type(module.model).forward

    def backwards(self, *args, **kwargs):
        kept, self.layers = self.layers, torch.nn.ModuleList(reversed(self.layers))
        try:
            return run(self, *args, **kwargs)
        finally:
            self.layers = kept

    module.model.forward = partial(backwards, module.model)
    with pytest.raises(InputError, match="block 2 of LlamaForCausalLM runs as number 0"):
        BlockWalk(module, LLAMA, markov_tokens(1, 8))
    assert all("forward" not in block.__dict__ for block in module.model.layers)
