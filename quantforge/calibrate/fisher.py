"""Second moments of output gradients: the output side of the Fisher information.

For a layer y = W x the increase of the token loss caused by a weight error D is, to second order
and averaged over tokens, ½ E[(gᵀ D x)²], where g is the gradient of the log-likelihood of a label
sampled from the network itself (so that the expectation is the Fisher information, which equals
the curvature of the KL divergence). Taking outputs as uncorrelated and g as independent of x:

    ½ Σ_o E[g_o²] · d_o gram d_oᵀ        d_o: row o of D

so one first-order pass a batch serves every layer and every candidate. Units are nats a token.
Gradients are of the sum over tokens, so an error's effect on later tokens counts in full.

Where outputs are not taken as uncorrelated, all of G = E[g gᵀ] is wanted, the output gram, whose
diagonal these are: error feedback between rows rests on it (`methods.output_feedback`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.capture import Precision, compute_in, product_dtype, recomputed
from quantforge.models import Model
from quantforge.numerics import GramAccumulator
from quantforge.progress import Monitor

HEAD_CHUNK = 512
# Rows beyond this do not answer for each other: an output gram has that many squared entries.
LARGEST_OUTPUT_BLOCK = 4096


def sampled_label_gradient(hidden: Tensor, head: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of Σ_t −log p(y_t) with y_t ~ p, with respect to the head's input.

    Args:
        hidden: [tokens, hidden] input of the head.
        head: [vocabulary, hidden] weight of the head.
        generator: draws the labels; of the device of `hidden`.

    Returns:
        [tokens, hidden] (p − onehot(y)) · head, in the dtype of `hidden`.
    """
    pieces = []
    for chunk in torch.split(hidden, HEAD_CHUNK):
        probability = torch.softmax((chunk @ head.T).float(), -1)
        label = torch.multinomial(probability, 1, generator=generator)
        one = torch.ones_like(label, dtype=probability.dtype)
        residual = probability.scatter_add_(1, label, -one)
        pieces.append(residual.to(head.dtype) @ head)
    return torch.cat(pieces).to(hidden.dtype)


class _Squares:
    """Accumulates g² of gradients [..., out]."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.total = torch.zeros(features, device=device)

    def add(self, gradient: Tensor, _: torch.dtype) -> None:
        """Add a batch of gradients."""
        self.total.add_(gradient.float().flatten(0, -2).square().sum(0))


def _accumulate_into(total: _Squares | OutputGram, dtype: torch.dtype) -> Any:
    def on_gradient(gradient: Tensor) -> None:
        total.add(gradient.detach(), dtype)

    def on_output(_: nn.Module, __: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        states.register_hook(on_gradient)

    return on_output


class OutputGram:
    """Accumulates G of one layer, or its diagonal blocks where the layer has very many rows.

    Attributes:
        blocks: accumulators of consecutive rows, each of at most `LARGEST_OUTPUT_BLOCK`.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        count = -(-features // LARGEST_OUTPUT_BLOCK)
        sizes = [len(part) for part in torch.arange(features).tensor_split(count)]
        self.blocks = [GramAccumulator(size, device) for size in sizes]

    def add(self, gradient: Tensor, dtype: torch.dtype) -> None:
        """Add gradients [..., out], rounded to `dtype`."""
        sizes = [len(block.total) for block in self.blocks]
        for block, part in zip(self.blocks, torch.split(gradient, sizes, -1), strict=True):
            block.add(part, dtype)

    def squares(self) -> Tensor:
        """[out] E[g²] a token."""
        return torch.cat([block.total.diagonal() / block.tokens for block in self.blocks])

    def mean(self) -> list[Tensor]:
        """The blocks of G, [rows, rows] float32 each."""
        return [block.mean() for block in self.blocks]


def output_gradient_moments(
    model: Model,
    features: Mapping[str, int],
    tokens: Tensor,
    *,
    batch_size: int,
    precision: Precision,
    generator: torch.Generator,
    monitor: Monitor,
    coupled: Collection[str] = (),
    recompute: int = 0,
) -> tuple[dict[str, Tensor], dict[str, OutputGram]]:
    """Moments of the gradients at the named modules' outputs, with labels drawn from the model.

    Args:
        model: the float network; its parameters are frozen while this runs.
        features: module path → size of its output's last axis.
        tokens: [sequences, length] int64.
        batch_size: sequences a pass.
        precision: of the matrix products.
        generator: draws the labels; of the network's device.
        monitor: progress and cancellation.
        coupled: the modules whose whole output gram is wanted.
        recompute: every so many-th block runs again in the backward pass; 0 keeps all activations.

    Returns:
        module path → [features] float32 E[g²] over all tokens, on the network's device, in
        (nats / output unit)² a token; and module path → output gram of the coupled ones.
    """
    module, architecture = model.module, model.architecture
    sums: dict[str, _Squares | OutputGram] = {
        name: (OutputGram if name in coupled else _Squares)(size, model.device)
        for name, size in features.items()
    }
    projection: Any = module.get_submodule(architecture.head)
    head: Tensor = projection.weight.detach()
    if precision == "bfloat16":
        head = head.bfloat16()
    seen: dict[str, Tensor] = {}
    body = module.get_submodule(architecture.blocks.rpartition(".")[0])
    batches = torch.split(tokens, batch_size)
    with ExitStack() as stack:
        stack.enter_context(_frozen(module))
        stack.enter_context(recomputed(architecture.block_list(module), recompute))

        def watch(name: str, hook: Any) -> None:
            stack.callback(module.get_submodule(name).register_forward_hook(hook).remove)

        for name, total in sums.items():
            watch(name, _accumulate_into(total, product_dtype(precision)))
        watch(architecture.embedding, lambda _, __, output: output.requires_grad_())
        watch(architecture.final_norm, lambda _, __, output: seen.update(hidden=output))
        for index, batch in enumerate(batches):
            with torch.enable_grad(), compute_in(precision, head.device):
                body(input_ids=batch.to(head.device), use_cache=False)
            _back_from_samples(seen.pop("hidden"), head, generator)
            monitor.step("gradients", index + 1, len(batches))
    grams = {name: total for name, total in sums.items() if isinstance(total, OutputGram)}
    squares = {
        name: total.squares() if isinstance(total, OutputGram) else total.total / tokens.numel()
        for name, total in sums.items()
    }
    return squares, grams


def _back_from_samples(hidden: Tensor, head: Tensor, generator: torch.Generator) -> None:
    """Run backwards from the head's input [batch, length, hidden], with labels drawn there."""
    with torch.no_grad():
        flat = hidden.detach().flatten(0, 1).to(head.dtype)
        gradient = sampled_label_gradient(flat, head, generator)
    torch.autograd.backward(hidden, gradient.view_as(hidden).to(hidden.dtype))


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of `module` asks for a gradient inside; all as before after."""
    needs = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(needs[name])
