"""The Hessian of a causal language model's token loss, by its products with vectors.

H v is the derivative of the gradient along v, by differentiating twice (Pearlmutter 1994): one
product costs about two gradients, whatever the number of weights. The loss is the mean cross
entropy over all predicted tokens, in nats a token, against one of three kinds of labels:

    true      the tokens that follow: the Hessian of the loss the network was trained on. It is
              indefinite away from a minimum.
    sampled   one token drawn from the network at every position, once, so that the operator is one
              fixed matrix. Its expectation is the Fisher information.
    expected  the network's own distribution. The gradient vanishes and the Hessian *is* the Fisher
              information, which equals the Gauss-Newton matrix and the curvature of the KL
              divergence from the float network: positive semi-definite, and without the noise of
              drawn labels. So ½ Dᵀ H D is a KL in nats a token, the unit of all sensitivities.

An encoder's output is one direction a sequence (`models.pooled`); with expected labels its loss is
half the squared distance from where the direction is, whose Hessian is the same in this sense too.

Products run in float32 with plain attention, since fused kernels have no second derivative. Only
`autograd.grad` is used: `backward` with `create_graph` would leave gradients on the parameters that
hold their whole graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantforge.capture import plain_attention
from quantforge.errors import InputError, UsageError
from quantforge.methods.curvature.operator import Matvec, draw_probe
from quantforge.methods.curvature.trace import BlockTraces
from quantforge.models import Model
from quantforge.models.pooled import direction, mean_over_tokens
from quantforge.numerics import draw_categorical
from quantforge.progress import Monitor
from quantforge.types import LayerInfo

Labels = Literal["true", "sampled", "expected"]
UNPREDICTED = -100  # the label of a position that predicts nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class LossHessian:
    """The Hessian over the weights of some layers, as an operator on flat vectors.

    A vector holds the layers' weights one behind the other, each row by row. Nothing of the model
    is changed: not its weights, gradients, `requires_grad` or attention.

    Attributes:
        model: the float network.
        layers: whose weights the vectors are about.
        batches: token batches [batch, length] int64.
        labels: a batch's labels [batch, length] int64 each; None for the network's own
            distribution.
        monitor: asked between batches whether to stop.
    """

    model: Model
    layers: tuple[LayerInfo, ...]
    batches: tuple[Tensor, ...]
    labels: tuple[Tensor, ...] | None
    monitor: Monitor = field(default_factory=Monitor)

    @classmethod
    def of(
        cls,
        model: Model,
        tokens: Tensor,
        *,
        layers: Sequence[LayerInfo] | None = None,
        labels: Labels = "expected",
        batch_size: int = 1,
        generator: torch.Generator | None = None,
        monitor: Monitor | None = None,
    ) -> LossHessian:
        """Prepare the operator; draws labels where they are drawn.

        Args:
            model: the float network.
            tokens: [sequences, length] int64.
            layers: whose weights; by default all planned ones.
            labels: what the loss compares with (see the module's header).
            batch_size: sequences a pass; a pass holds the graphs of both derivatives.
            generator: draws sampled labels; of the network's device.
            monitor: asked between batches whether to stop.

        Raises:
            InputError: a layer's weight is in 16 bits, or there are no tokens.
        """
        batches = tuple(torch.split(tokens.to(model.device), batch_size))
        return cls(
            model=model,
            layers=tuple(model.layers if layers is None else layers),
            batches=batches,
            labels=_labels(model, batches, labels, generator),
            monitor=monitor or Monitor(),
        )

    @property
    def sizes(self) -> list[int]:
        """Weights of each layer."""
        return [layer.numel for layer in self.layers]

    @property
    def dimension(self) -> int:
        """Entries of a vector."""
        return sum(self.sizes)

    def of_layers(self, layers: Sequence[LayerInfo]) -> LossHessian:
        """The diagonal block of these layers, with the same labels; cheaper than the whole."""
        return replace(self, layers=tuple(layers))

    def product(self, vector: Tensor) -> Tensor:
        """H v, [dimension] in the weights' dtype, averaged over all predicted tokens."""
        total = torch.zeros_like(vector)
        with _differentiable(self.model, self.layers) as weights:
            directions = [
                part.view_as(weight)
                for part, weight in zip(torch.split(vector, self.sizes), weights, strict=True)
            ]
            for index in range(len(self.batches)):
                self.monitor.check("curvature")
                gradients = torch.autograd.grad(self._loss(index), weights, create_graph=True)
                _add(total, torch.autograd.grad(gradients, weights, grad_outputs=directions))
        return total

    @contextmanager
    def layer_blocks(self) -> Iterator[list[Matvec]]:
        """Products with each layer's diagonal block, in the body, from graphs that are kept.

        The loss and its gradient are formed once for all of them, so that a product costs only the
        second derivative, and only of what lies between the layer and the loss. Memory holds the
        graphs of all batches at once.
        """
        with _differentiable(self.model, self.layers) as weights:
            gradients = []
            for index in range(len(self.batches)):
                self.monitor.check("curvature")
                gradients.append(torch.autograd.grad(self._loss(index), weights, create_graph=True))

            def product(layer: int, vector: Tensor) -> Tensor:
                self.monitor.check("curvature")
                direction, total = vector.view_as(weights[layer]), torch.zeros_like(vector)
                for one in gradients:
                    (part,) = torch.autograd.grad(
                        one[layer], weights[layer], grad_outputs=direction, retain_graph=True
                    )
                    total += part.flatten()
                return total

            yield [partial(product, layer) for layer in range(len(weights))]

    def gradient(self) -> Tensor:
        """[dimension] gradient of the loss in the weights' dtype."""
        with _differentiable(self.model, self.layers) as weights:
            total = torch.zeros(self.dimension, dtype=weights[0].dtype, device=weights[0].device)
            for index in range(len(self.batches)):
                self.monitor.check("curvature")
                _add(total, torch.autograd.grad(self._loss(index), weights))
        return total

    def _loss(self, index: int) -> Tensor:
        """One batch's share of the mean loss a token."""
        labels = None if self.labels is None else self.labels[index]
        losses = _token_losses(self.model, self.batches[index], labels)
        return losses.sum() / self._predicted()

    def _predicted(self) -> int:
        """Tokens that are predicted in all batches together."""
        if self.labels is None:
            return sum(batch.numel() for batch in self.batches)
        return sum(int((labels != UNPREDICTED).sum()) for labels in self.labels)


def activation_traces(
    model: Model,
    names: Sequence[str],
    tokens: Tensor,
    *,
    generator: torch.Generator,
    labels: Labels = "expected",
    batch_size: int = 1,
    probes: int = 1,
    monitor: Monitor | None = None,
) -> BlockTraces:
    """The trace of the loss Hessian over what each named layer reads (HAWQ-V2's activations).

    The Hessian over a batch of activations has no entries between sequences, so one probe of the
    whole batch tensor gives every sequence's trace; their spread holds the error of the probes and
    of the text. All layers are probed at once: what one activation adds to the derivative along
    another's probe has mean 0, as between the blocks of weights. Where several layers read one
    tensor, its trace is over all that they make of it, and one of them should be named.

    Args:
        model: the float network.
        names: module paths of layers.
        tokens: [sequences, length] int64, two sequences at least.
        generator: draws probes and sampled labels; of the network's device.
        labels: as in `LossHessian.of`.
        batch_size: sequences a pass.
        probes: for each sequence; their values are averaged.
        monitor: progress and cancellation.

    Returns:
        Samples [sequences, layers]: trace over the layer's input [length, in] of one sequence's
        mean loss a token, in nats / (unit of the input)². For the mean trace divide by length · in.
    """
    if len(tokens) < 2 or probes < 1:
        raise UsageError("traces of activations need two sequences and one probe at least")
    batches = torch.split(tokens.to(model.device), batch_size)
    targets = _labels(model, batches, labels, generator)
    samples = []
    for index, batch in enumerate(batches):
        target = None if targets is None else targets[index]
        with _differentiable(model, ()), _kept_inputs(model, names) as seen:
            losses = _token_losses(model, batch, target)
            predicted = losses.shape[1] if target is None else (target[0] != UNPREDICTED).sum()
            inputs = [seen[name] for name in names]
            gradients = torch.autograd.grad(losses.sum() / predicted, inputs, create_graph=True)
            total = torch.zeros(len(batch), len(names), dtype=torch.float64)
            for _ in range(probes):
                total += _activation_sample(gradients, inputs, generator)
            samples.append(total / probes)
            seen.clear()
        if monitor is not None:
            monitor.step("activation curvature", index + 1, len(batches))
    return BlockTraces(samples=torch.cat(samples), products=probes * len(batches))


def _activation_sample(
    gradients: Sequence[Tensor], inputs: Sequence[Tensor], generator: torch.Generator
) -> Tensor:
    """[batch, layers] float64 vᵀ H v of every sequence and layer for one probe; keeps the graph."""
    directions = [
        draw_probe(one.numel(), generator, dtype=one.dtype).view_as(one) for one in inputs
    ]
    products = torch.autograd.grad(gradients, inputs, grad_outputs=directions, retain_graph=True)
    columns = [
        (one * other).flatten(1).sum(1, dtype=torch.float64).cpu()
        for one, other in zip(directions, products, strict=True)
    ]
    return torch.stack(columns, 1)


def _token_losses(model: Model, batch: Tensor, labels: Tensor | None) -> Tensor:
    """[batch, length] loss of every position in nats; 0 where nothing is predicted.

    Args:
        model: the network; an encoder's loss of a sequence stands at each of its positions.
        batch: [batch, length] tokens.
        labels: [batch, length]; None for the network's own distribution, held fixed.
    """
    module = model.module
    if model.architecture.encodes:
        pooled = direction(mean_over_tokens(module(input_ids=batch).last_hidden_state))
        losses = 0.5 * (pooled - pooled.detach()).square().sum(-1)
        return losses.unsqueeze(1).expand(batch.shape)
    logits: Tensor = module(input_ids=batch, use_cache=False).logits
    log_probability = torch.log_softmax(logits, -1)
    if labels is None:
        return -(log_probability.detach().exp() * log_probability).sum(-1)
    chosen = log_probability.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels == UNPREDICTED, 0.0, -chosen)


@torch.no_grad()
def _labels(
    model: Model, batches: Sequence[Tensor], kind: Labels, generator: torch.Generator | None
) -> tuple[Tensor, ...] | None:
    """Labels of every batch; None for the network's own distribution.

    Raises:
        InputError: there are no tokens, or none that follow another.
        UsageError: sampled labels without a generator, or an encoder, which has no labels.
    """
    if not batches or not batches[0].numel():
        raise InputError("no calibration tokens: curvature needs at least one sequence")
    if kind == "expected":
        return None
    if model.architecture.encodes:
        raise UsageError(
            f"{type(model.module).__name__} is an encoder, which predicts no tokens: the only "
            "labels of its curvature are 'expected'"
        )
    if kind == "true":
        if batches[0].shape[1] < 2:
            raise InputError("sequences of one token predict nothing: give longer ones")
        return tuple(
            nn.functional.pad(batch[:, 1:], (0, 1), value=UNPREDICTED) for batch in batches
        )
    if generator is None:
        raise UsageError("sampled labels need a generator")
    drawn = []
    with plain_attention(model.module):
        for batch in batches:
            logits = model.module(input_ids=batch, use_cache=False).logits
            probability = torch.softmax(logits.flatten(0, 1), -1)
            drawn.append(draw_categorical(probability, generator).view_as(batch))
    return tuple(drawn)


def _add(total: Tensor, parts: Sequence[Tensor]) -> None:
    """Add the weights' tensors to the flat vector of all of them."""
    sizes = [part.numel() for part in parts]
    for place, part in zip(torch.split(total, sizes), parts, strict=True):
        place.add_(part.flatten())


@contextmanager
def _differentiable(model: Model, layers: Sequence[LayerInfo]) -> Iterator[list[nn.Parameter]]:
    """The layers' weights, alone in asking for gradients, in a network that has two derivatives.

    Raises:
        InputError: a weight is in 16 bits.
    """
    module = model.module
    weights: list[nn.Parameter] = []
    for layer in layers:
        linear: Any = module.get_submodule(layer.name)
        if linear.weight.dtype not in (torch.float32, torch.float64):
            kind = str(linear.weight.dtype).removeprefix("torch.")
            raise InputError(
                f"{layer.name} is in {kind}: curvature needs float32; load the model in float32"
            )
        weights.append(linear.weight)
    needs = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        module.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with plain_attention(module), torch.enable_grad():
            yield weights
    finally:
        for parameter, needed in needs:
            parameter.requires_grad_(needed)


@contextmanager
def _kept_inputs(model: Model, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the named modules read in the next pass, connected to the loss; filled by the pass."""
    seen: dict[str, Tensor] = {}
    handles = []

    def watch(name: str) -> None:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        handles.append(model.module.get_submodule(name).register_forward_pre_hook(keep))

    # With every weight frozen the graph has to begin somewhere.
    embedding = model.module.get_submodule(model.architecture.embedding)
    try:
        handles.append(
            embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())
        )
        for name in names:
            watch(name)
        yield seen
    finally:
        for handle in handles:
            handle.remove()
