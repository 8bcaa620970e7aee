"""Mixtures of experts: matrices in one tensor, as linears of their own.

transformers keeps the experts of a layer in two parameters, [experts, 2 · inner, hidden] and
[experts, hidden, inner]. A plan is about matrices, so the module that holds them is replaced by one
with a gate, an up and a down projection for every expert, named as checkpoints on the hub name
Qwen's. The router is no part of it and stays in 16 bits. An expert that all tokens share (Qwen 2)
has linears already, which are layers as any other; what weighs it is one row, and stays too.

While a network is worked on, every expert runs on whole sequences in which the tokens that are not
its own are zero, and a shared one on the sequences as they are. So their layers read [batch,
length, in] as all others do, and hardly anything has to know of experts: a zero adds nothing to a
gram, gradients there are zero because the router's share is, and every sum over a sequence stays
what it is. The price is that the feed-forward halves take as many times the work as there are
experts for each that a token has. A finished network runs each expert on its own tokens alone.

Routing is uneven, so some experts may see few calibration tokens. With fewer than `LEAST_TOKENS`
a gram says more about those tokens than about the expert, and error compensation would fit the
weights to them. The gram of such a stage is replaced by the identity, of the same mean: then
compensation does nothing, and weights are rounded to a grid that fits the weights alone. A blend
with the mean gram of all experts would be an alternative for what reads the hidden states, but not
for the down projections, whose inputs are other features in every expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.scratch import IN_MEMORY, Scratch

# Calibration tokens that an expert must have seen for its gram to be used.
LEAST_TOKENS = 128
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
# Modules of transformers that hold experts as described above, of networks known here.
EXPERT_CLASSES = ("Qwen3MoeExperts", "Qwen2MoeExperts", "MixtralExperts")
# Of the module that holds them, the name of an expert that all tokens share.
SHARED = "shared_expert"


class SplitExperts(nn.Module):
    """Experts as modules "0", "1", ..; called as the module in whose place it stands.

    Args:
        experts: number of them.
        hidden: features of the hidden states.
        inner: features between an expert's layers.
        activation: of the gate.
        whole: run every expert on whole sequences; the parent's input has to be seen by `note`.
    """

    def __init__(
        self, experts: int, hidden: int, inner: int, activation: nn.Module, *, whole: bool
    ) -> None:
        super().__init__()
        self.num_experts, self.act_fn, self.whole = experts, activation, whole
        self.lengths = torch.Size([1, -1])
        for number in range(experts):
            expert = nn.Module()
            for name, columns, rows in (
                (GATE, hidden, inner), (UP, hidden, inner), (DOWN, inner, hidden)
            ):  # fmt: skip
                expert.add_module(name, nn.Linear(columns, rows, bias=False, device="meta"))
            self.add_module(str(number), expert)

    def _expert(self, number: int, states: Tensor) -> Tensor:
        expert: Any = self.get_submodule(str(number))
        inner = self.act_fn(expert.gate_proj(states)) * expert.up_proj(states)
        result: Tensor = expert.down_proj(inner)
        return result

    def forward(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """What the experts of every token make of it, weighted.

        Args:
            hidden: [tokens, hidden].
            chosen: [tokens, few] numbers of experts.
            shares: [tokens, few] their weights.

        Returns:
            [tokens, hidden].
        """
        if self.whole:
            return self._on_sequences(hidden, chosen, shares)
        total = torch.zeros_like(hidden)
        for number in range(self.num_experts):
            token, place = torch.where(chosen == number)
            if len(token):
                made = self._expert(number, hidden[token]) * shares[token, place, None]
                total.index_add_(0, token, made.to(total.dtype))
        return total

    def _on_sequences(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """The same, every expert on [batch, length, hidden] with zeros for other tokens."""
        shape = (*self.lengths, hidden.shape[1])
        share = torch.zeros(len(hidden), self.num_experts, dtype=shares.dtype, device=hidden.device)
        share = share.scatter(1, chosen, shares)
        own = torch.zeros_like(share, dtype=torch.bool).scatter(1, chosen, True)
        total = torch.zeros_like(hidden)
        for number in range(self.num_experts):
            states = torch.where(own[:, number, None], hidden, 0.0).view(shape)
            made = self._expert(number, states).view(hidden.shape) * share[:, number, None]
            total = total + made.to(total.dtype)
        return total


def note(block: Any, args: tuple[Tensor, ...]) -> None:
    """Hook before the module that has router and experts: the sequences that it gets."""
    block.experts.lengths = args[0].shape[:-1]
    shared = getattr(block, SHARED, None)
    if shared is not None:
        shared.lengths = block.experts.lengths


def as_sequences(shared: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Hook before a shared expert, which is called with [tokens, hidden]: the sequences."""
    return (args[0].view(*shared.lengths, args[0].shape[-1]),)


def as_tokens(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Hook behind it: [tokens, hidden] again."""
    return output.flatten(0, -2)


def split_experts(
    module: nn.Module, *, whole: bool, scratch: Scratch = IN_MEMORY
) -> dict[str, nn.Module]:
    """Give every expert linears of its own, in place.

    Args:
        module: the network.
        whole: as of `SplitExperts`.
        scratch: where weights go.

    Returns:
        Path → the module that was there, whose weights were moved and take no memory now.
    """
    found = {
        name: one for name, one in module.named_modules() if type(one).__name__ in EXPERT_CLASSES
    }
    for name, one in found.items():
        module.set_submodule(name, _split(one, whole, scratch))
        parent = module.get_submodule(name.rpartition(".")[0])
        parent.register_forward_pre_hook(note)
        shared = getattr(parent, SHARED, None)
        if shared is not None and whole:
            shared.register_forward_pre_hook(as_sequences)
            shared.register_forward_hook(as_tokens)
    return found


def _split(original: Any, whole: bool, scratch: Scratch) -> SplitExperts:
    both, down = original.gate_up_proj, original.down_proj
    count, hidden, inner = down.shape
    made = SplitExperts(count, hidden, inner, original.act_fn, whole=whole)
    for number in range(count):
        gate, up = both.data[number].chunk(2)
        for name, weight in ((GATE, gate), (UP, up), (DOWN, down.data[number])):
            linear: Any = made.get_submodule(f"{number}.{name}")
            linear.weight = nn.Parameter(scratch.copy(weight), requires_grad=both.requires_grad)
    made.train(original.training)
    for parameter in (both, down):
        parameter.data = parameter.data.new_empty(0)
    return made


@contextmanager
def experts_split(module: nn.Module) -> Iterator[None]:
    """`split_experts` inside; after it the modules of before, with what the linears hold."""
    originals = split_experts(module, whole=True)
    try:
        yield
    finally:
        for name, original in originals.items():
            _join(module, name, original)


def _join(module: nn.Module, name: str, original: Any) -> None:
    split: Any = module.get_submodule(name)
    weights = {
        part: [
            split.get_submodule(f"{number}.{part}").weight.data
            for number in range(split.num_experts)
        ]
        for part in (GATE, UP, DOWN)
    }
    pairs = zip(weights[GATE], weights[UP], strict=True)
    original.gate_up_proj.data = torch.stack([torch.cat(pair) for pair in pairs])
    original.down_proj.data = torch.stack(weights[DOWN])
    module.set_submodule(name, original)
    parent = module.get_submodule(name.rpartition(".")[0])
    for one in (parent, getattr(parent, SHARED, None)):
        if one is not None:
            _without_hooks(one)


def _without_hooks(module: Any) -> None:
    """Take away what `split_experts` hung on a module."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [k for k, hook in hooks.items() if hook in (note, as_sequences, as_tokens)]:
            del hooks[key]
    module.__dict__.pop("lengths", None)


def routers(module: nn.Module) -> list[str]:
    """Paths of the modules that choose experts; servers look for them among kept layers."""
    found = [name for name, one in module.named_modules() if isinstance(one, SplitExperts)]
    return [f"{name.rpartition('.')[0]}.gate" for name in found]


def reached(inputs: Tensor) -> int:
    """Tokens among an expert's inputs [..., in] that are its own."""
    return int(inputs.any(-1).sum())


def without_correlations(gram: Tensor) -> Tensor:
    """The identity of the same mean as a gram [in, in]; the identity itself where that is zero."""
    mean = float(gram.diagonal().mean())
    return torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (mean or 1.0)
