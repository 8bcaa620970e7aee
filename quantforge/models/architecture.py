"""What a network looks like, as data: where its blocks are and which layers read one input.

A new architecture is one `Architecture(...)`; no stage changes for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantforge.errors import InputError
from quantforge.models.head import NO_ENTRIES, Head, LogitEntries, LogitForm
from quantforge.models.pooled import PooledOutput
from quantforge.parallel import ALONE, Share
from quantforge.registry import Registry
from quantforge.scratch import IN_MEMORY, Scratch
from quantforge.types import LayerInfo

Output = Head | PooledOutput
"""What becomes of a network's last hidden states: logits, or one direction a sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Module paths of a decoder, or of an encoder, which has no head.

    Attributes:
        name: short name, e.g. "llama".
        classes: model classes (their `__name__`) that have this shape.
        blocks: path of the list of decoder blocks.
        stages: layers of a block in forward order; members of one stage read the same input.
        fused: layers that servers fuse into one matrix and that must share a spec.
        folds: (path of a norm or linear, stage): each channel that the layers of the stage read is
            linear in the same channel of the module's output, and nothing else reads that. So a
            channel may be divided in the module and multiplied in those layers, and the network
            stays the same, provided that the module has as many channels as they read (with
            grouped-query attention values have fewer than the output projection).
        embedding: path of the token embedding.
        final_norm: path of the norm between the last block and the head; empty where the last
            block's output is the last.
        head: path of the output projection; empty for an encoder, which is measured by the mean of
            its last hidden states.
        pooler: of an encoder, path of what else it makes of those, if anything.
        tuples: blocks return tuples, and who calls them takes the first entry.
        rotary: path of the module that gives cosines and sines of positions, where the block is
            Llama's: norms before both halves, rotated queries and keys, a gated feed-forward, its
            four stages in this order. Empty for any other block.
        experts: path of the module in a block that holds experts; in stages, a member with "*" for
            an expert's number stands for all of them. Its experts share a spec.
        logits: entries of the configuration that say what becomes of the head's output.
    """

    name: str
    classes: tuple[str, ...]
    blocks: str
    stages: tuple[tuple[str, ...], ...]
    fused: tuple[tuple[str, ...], ...]
    embedding: str
    final_norm: str
    head: str
    folds: tuple[tuple[str, int], ...] = ()
    rotary: str = ""
    experts: str = ""
    logits: LogitEntries = NO_ENTRIES
    pooler: str = ""
    tuples: bool = False

    @property
    def encodes(self) -> bool:
        """Whether it is an encoder."""
        return not self.head

    @property
    def measure(self) -> str:
        """What losses of such a network are, see `results.METRICS`."""
        return "cosine" if self.encodes else "kl"

    def body(self, module: nn.Module) -> nn.Module:
        """What takes token ids and gives last hidden states."""
        return module.get_submodule("" if self.encodes else self.blocks.rpartition(".")[0])

    def behind(self, module: nn.Module) -> nn.Module | None:
        """What reads the last hidden states: the head, or an encoder's pooler if it has one."""
        path = self.head or self.pooler
        found: nn.Module | None = dict(module.named_modules()).get(path) if path else None
        return found

    def final_states(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """What the output is made of, [..., hidden], from the last block's output."""
        if not self.final_norm:
            return hidden
        states: Tensor = module.get_submodule(self.final_norm)(hidden)
        return states

    def output(self, module: nn.Module) -> Output:
        """What is made of the last hidden states, and measured.

        Raises:
            InputError: there is a head, and it is no linear.
        """
        return PooledOutput() if self.encodes else self.output_head(module)

    def logit_form(self, module: nn.Module) -> LogitForm:
        """What `module` makes of its head's output."""
        return self.logits.form(module.config)

    def output_head(self, module: nn.Module) -> Head:
        """The head of `module`, which shares its tensors.

        Raises:
            InputError: it is no linear.
        """
        linear = module.get_submodule(self.head)
        if not isinstance(linear, nn.Linear):
            kind = type(linear).__name__
            raise InputError(f"{self.head} is a {kind}, expected a float Linear")
        return Head(
            weight=linear.weight.detach(),
            bias=None if linear.bias is None else linear.bias.detach(),
            form=self.logit_form(module),
        )

    def of_network(self, module: nn.Module) -> Architecture:
        """The same with the stages of all experts of `module` written out, expert by expert.

        Raises:
            InputError: a block has no experts where they should be.
        """
        if not self.experts:
            return self
        counts = set()
        for block in self.block_list(module):
            holder = dict(block.named_modules()).get(self.experts)
            counts.add(getattr(holder, "num_experts", None))
        count = counts.pop()
        if counts or count is None:
            raise InputError(
                f"the blocks of {type(module).__name__} do not all have the same number of experts "
                f"at {self.experts}; mixtures with dense blocks are not supported"
            )
        own = [stage for stage in self.stages if self.of_expert(stage[0])]
        written = [
            tuple(member.replace("*", str(number)) for member in stage)
            for number in range(count)
            for stage in own
        ]
        return replace(self, stages=(*(s for s in self.stages if s not in own), *written))

    def of_expert(self, member: str) -> bool:
        """Whether a layer of a block is an expert's."""
        return bool(self.experts) and member.startswith(f"{self.experts}.")

    def block_list(self, module: nn.Module) -> nn.ModuleList:
        """The decoder blocks of `module`."""
        blocks = module.get_submodule(self.blocks)
        if not isinstance(blocks, nn.ModuleList):
            raise InputError(f"{self.blocks} is a {type(blocks).__name__}, expected a ModuleList")
        return blocks

    def block_names(self, module: nn.Module) -> list[str]:
        """Module path of every block, in forward order."""
        return [f"{self.blocks}.{index}" for index in range(len(self.block_list(module)))]

    def layers(self, module: nn.Module) -> tuple[LayerInfo, ...]:
        """Every linear of every block, in forward order.

        Raises:
            InputError: a layer named by the architecture is missing or is not a linear.
        """
        found = []
        for index, block in enumerate(self.block_list(module)):
            for stage, members in enumerate(self.stages):
                for member in members:
                    name = f"{self.blocks}.{index}.{member}"
                    linear = block.get_submodule(member)
                    if not isinstance(linear, nn.Linear):
                        kind = type(linear).__name__
                        raise InputError(f"{name} is a {kind}, expected a float Linear")
                    group = next((g for g in self.fused if member in g), (member,))
                    shared = self.experts if self.of_expert(member) else "+".join(group)
                    info = LayerInfo(
                        name=name,
                        out_features=linear.out_features,
                        in_features=linear.in_features,
                        block=index,
                        stage=stage,
                        fused_group=f"{self.blocks}.{index}.{shared}",
                    )
                    found.append(info)
        return tuple(found)

    def tied(self, module: nn.Module) -> bool:
        """Whether a head is the embedding's matrix."""
        config: Any = module.config
        return not self.encodes and bool(config.tie_word_embeddings)

    def vocabulary(self, module: nn.Module) -> tuple[LayerInfo, ...]:
        """The token embedding and the head, [vocabulary, hidden]; one matrix where they are tied.

        An encoder has the embedding alone.

        An embedding that does more than look rows up (Gemma's multiplies them) is left out, and so
        is a head that is the same matrix: nothing executes them quantized.

        Raises:
            InputError: one of them is of another kind than an embedding and a linear.
        """
        expected: list[tuple[str, type[nn.Embedding | nn.Linear]]]
        expected = [(self.embedding, nn.Embedding)]
        expected += [] if self.encodes else [(self.head, nn.Linear)]
        for name, kind in expected:
            part = module.get_submodule(name)
            if not isinstance(part, kind):
                found = type(part).__name__
                raise InputError(f"{name} is a {found}, expected a float {kind.__name__}")
        tied = self.tied(module)
        kinds: list[tuple[str, Literal["linear", "embedding", "tied"]]]
        kinds = [(self.embedding, "tied" if tied else "embedding")]
        if type(module.get_submodule(self.embedding)) is not nn.Embedding:
            kinds = []
        if not self.encodes and not tied:
            kinds.append((self.head, "linear"))
        matrices: dict[str, Any] = {name: module.get_submodule(name).weight for name, _ in kinds}
        return tuple(
            LayerInfo(
                name=name,
                kind=kind,
                out_features=matrices[name].shape[0],
                in_features=matrices[name].shape[1],
                block=-1,
                stage=0,
                fused_group=name,
            )
            for name, kind in kinds
        )


ARCHITECTURES: Registry[Architecture] = Registry("architecture")


def encoder_classes() -> tuple[str, ...]:
    """Names of the model classes of registered encoders."""
    return tuple(name for one in ARCHITECTURES.values() if one.encodes for name in one.classes)


def architecture_of(module: nn.Module) -> Architecture:
    """The architecture whose classes include the module's.

    Raises:
        InputError: no registered architecture has this class.
    """
    name = type(module).__name__
    for architecture in ARCHITECTURES.values():
        if name in architecture.classes:
            return architecture.of_network(module)
    known = ", ".join(c for a in ARCHITECTURES.values() for c in a.classes)
    raise InputError(f"{name} is not a known architecture; known model classes: {known}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        kind: "folder", "gguf", "hub" or "memory".
        location: path or hub id; empty in memory.
        name: short name used for output folders and titles.
        fingerprint: SHA-256 over what makes the model (configuration and weights).
        description: one line for the user: which checkpoint this is.
    """

    kind: str
    location: str
    name: str
    fingerprint: str
    description: str

    @property
    def path(self) -> Path:
        """The local path of a folder or GGUF source."""
        return Path(self.location)


@dataclass(slots=True, kw_only=True)
class Model:
    """A loaded float network. The one mutable thing; the pipeline owns it.

    Attributes:
        module: the network, in evaluation mode, float32 unless asked otherwise.
        architecture: its shape as data.
        layers: every layer the plan covers, in forward order.
        source: where it came from.
        tokenizer: its tokenizer, or None in memory.
        share: of the work on it, where several processes do that together.
        scratch: where its weights are, and what else grows with its depth.
    """

    module: nn.Module
    architecture: Architecture
    layers: tuple[LayerInfo, ...]
    source: ModelSource
    tokenizer: Any = field(default=None)
    share: Share = ALONE
    scratch: Scratch = IN_MEMORY

    @property
    def device(self) -> torch.device:
        """Where the network is, and where what it works with has to be."""
        return next(self.module.parameters()).device
