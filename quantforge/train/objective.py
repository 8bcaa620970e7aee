"""The loss on some sequences and its gradient: the network with its stand-ins, there and back.

No graph reaches over the head: its gradient is written down (`methods.head_loss`), so that logits
exist for a few tokens at a time. The loss is a mean over the tokens of all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantforge.capture import compute_in, product_dtype
from quantforge.methods.head_loss import Mixed, Target, following_tokens, head_gradient
from quantforge.models import Model, Output, PooledOutput
from quantforge.parallel import Share
from quantforge.train.config import TrainingConfig
from quantforge.train.layer import TrainedLinear
from quantforge.train.quantizers import Hardness
from quantforge.train.teacher import Teacher

# Sequences that are run together to what their tokens are pulled towards.
Targets = Callable[[Sequence[int]], Target]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is trained, on what.

    Attributes:
        model: the network, with stand-ins in it.
        layers: name → stand-in.
        norms: the network's own parameters that are trained.
        output: the network's, which is not trained, with products in their dtype.
        tokens: [sequences, length] int64.
        teacher: gives what they are pulled towards.
        config: the loss, its precision and how many sequences run at once.
        share: of the sequences.
    """

    model: Model
    layers: Mapping[str, TrainedLinear]
    norms: Sequence[nn.Parameter]
    output: Output
    tokens: Tensor
    teacher: Teacher
    config: TrainingConfig
    share: Share

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that asks for a gradient, in an order that does not change."""
        own = [p for layer in self.layers.values() for p in layer.trained]
        return [p for p in (*own, *self.norms) if p.requires_grad]

    def toward_teacher(self, sequences: Sequence[int]) -> Target:
        """The target that is trained towards."""
        device, share = self.model.device, self.config.cross_entropy
        target = self.teacher.target(sequences, device)
        if share == 0.0:
            return target
        following = following_tokens(self.tokens[list(sequences)]).to(device)
        return Mixed(teacher=target, following=following, share=share)

    def gradient(
        self,
        sequences: Sequence[int],
        hardness: Mapping[str, Hardness],
        targets: Targets | None = None,
    ) -> float:
        """The mean loss of a token of some sequences; its gradient is added to the parameters'.

        Args:
            sequences: of all processes; each runs its share.
            hardness: layer name → between float and integer.
            targets: in place of the teacher, and without the term in the hidden states.
        """
        choose = targets or self.toward_teacher
        self.prepare(hardness)
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        mine, count = self.share.part(sequences), len(sequences) * self.tokens.shape[1]
        for first in range(0, len(mine), self.config.at_once):
            chunk = mine[first : first + self.config.at_once]
            hidden = self._hidden(chunk)
            flat = hidden.detach().flatten(0, 1)
            if isinstance(self.output, PooledOutput):
                loss, gradient = self._toward_pooled(hidden.detach(), chunk)
            else:
                loss, gradient = head_gradient(flat, self.output, choose(chunk))
            if targets is None and self.config.hidden_term:
                loss = loss + self._add_hidden_term(flat, chunk, gradient)
            total += loss
            share = (gradient / count).view_as(hidden).to(hidden.dtype)
            torch.autograd.backward(hidden, share)
        for layer in self.layers.values():
            layer.collect()
        for parameter in self.parameters:
            if parameter.grad is None:  # a share of no sequences
                parameter.grad = torch.zeros_like(parameter)
        self.share.add_up(gradient for _, gradient in self.gradients())
        self.share.add_up([total])
        return float(total) / count

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every parameter with its gradient, where it has one."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                yield parameter, parameter.grad

    def clear(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def prepare(self, hardness: Mapping[str, Hardness]) -> None:
        """Form the weights of all layers."""
        dtype = product_dtype(self.config.precision)
        for name, layer in self.layers.items():
            layer.prepare(hardness[name], dtype)

    def release(self) -> None:
        """Let all layers be what is stored."""
        for layer in self.layers.values():
            layer.release()

    def _hidden(self, sequences: Sequence[int]) -> Tensor:
        """[sequences, length, hidden] what enters the head, with its graph."""
        architecture = self.model.architecture
        body = architecture.body(self.model.module)
        tokens = self.tokens[list(sequences)].to(self.model.device)
        with torch.enable_grad(), compute_in(self.config.precision, body, self.model.device):
            output = body(input_ids=tokens, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states

    def _toward_pooled(self, hidden: Tensor, sequences: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Σ_t (1 - cosine) of an encoder's sequences, and its gradient [tokens, hidden]."""
        wanted = self.teacher.states(sequences, self.model.device)
        if wanted is None:
            raise ValueError("this teacher has no hidden states, which an encoder is trained on")
        losses, gradient = PooledOutput().toward(hidden, wanted.view_as(hidden))
        return losses.sum(), gradient.float().flatten(0, 1)

    def _add_hidden_term(
        self, states: Tensor, sequences: Sequence[int], gradient: Tensor
    ) -> Tensor:
        """Add the gradient of the relative squared error of `states`; its sum over tokens."""
        wanted = self.teacher.states(sequences, self.model.device)
        if wanted is None:
            raise ValueError("this teacher has no hidden states: set hidden_term to 0")
        difference = states.float() - wanted.float()
        factor = self.config.hidden_term / float(wanted.float().square().sum(-1).mean())
        gradient.add_(difference, alpha=2.0 * factor)
        return factor * difference.square().sum(dtype=torch.float64)
