"""The shape of a decoder that nobody described: found by looking at it and by running it once.

The blocks are the list of equal modules that is as long as the configuration says, or the one with
the most weights. One pass over four tokens, with hooks, then tells which linears of a block read
the same tensor and in what order, and which module makes what the head reads. At the end what the
head gives is formed anew from the last block's output, through that module and the head alone, and
known numbers in the place of the head's output show what the network makes of that. It may scale
and cap it as its configuration says in an entry known here; a network that does more is refused,
because every measurement rests on this.

What cannot be known by looking is left out or taken with care: linears that a block runs more than
once, or not at all, or on other shapes than [batch, length, in] stay as they are; layers that read
one tensor share a spec, since servers may fuse them; nothing is folded into norms. A network most
of whose weights would be left out (experts in one tensor), or that looks ahead (encoders), is
refused: what follows would be wrong about it, or pointless.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.errors import InputError
from quantforge.models.architecture import ARCHITECTURES, Architecture, architecture_of
from quantforge.models.head import LogitEntries
from quantforge.models.transposed import StraightLinear

TOKENS = 4
# Of the matrices of the blocks, so much has to be layers that can be planned.
LEAST_COVERED = 0.8
# What is tried as `LogitEntries`, by field.
LOGIT_ENTRIES = {
    "multiplier": ("logit_scale", "output_multiplier", "logits_scaling"),
    "divisor": ("logits_scaling",),
    "cap": ("final_logit_softcapping", "logits_soft_cap"),
}
# So large that no cap in use leaves it as it is.
LARGEST_LOGIT = 60.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """What was found.

    Attributes:
        architecture: the shape.
        left_out: linears of the blocks that it does not cover, as paths inside a block.
    """

    architecture: Architecture
    left_out: tuple[str, ...]


def block_list_path(module: nn.Module) -> str:
    """Path of the list of blocks.

    Raises:
        InputError: there is none.
    """
    depth = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    best, most = "", 0
    for path, child in module.named_modules():
        if not isinstance(child, nn.ModuleList) or len(child) != (depth or len(child)):
            continue
        kinds = {type(block) for block in child}
        weights = sum(p.numel() for p in child.parameters())
        if len(kinds) == 1 and any(_is_linear(m) for m in child.modules()) and weights > most:
            best, most = path, weights
    if not best:
        raise InputError(
            f"{type(module).__name__} has no list of equal blocks with linear layers that is as "
            "long as its configuration says"
        )
    return best


def discover(module: nn.Module) -> Discovery:
    """Find the shape of a decoder, with one pass over a few tokens.

    Args:
        module: a transformers causal language model with its weights, in evaluation mode.

    Raises:
        InputError: it is no decoder whose blocks run one after the other, its logits are not what
            its head makes of a norm of the last block's output, or little of it can be planned.
    """
    path = block_list_path(module)
    embedding, head = _ends(module)
    _check_body(module, path)
    with _watched(module, path, head) as seen:
        logits = _run(module, 0)
    _check_causal(module, logits)
    layers = _layers(module, path, seen)
    final = _final_norm(module, path, seen)
    _check_head(module, seen, final, head)
    stages: dict[tuple[Any, ...], list[str]] = {}
    for name, key in layers:
        stages.setdefault(key, []).append(name)
    if not stages:
        raise InputError(f"no linear layer of {path}.0 runs once on [batch, length, features]")
    members = {name for names in stages.values() for name in names}
    blocks: Any = module.get_submodule(path)
    _check_coverage(module, blocks[0], members)
    linears = [name for name, child in blocks[0].named_modules() if _is_linear(child)]
    grouped = tuple(tuple(names) for names in stages.values())
    return Discovery(
        architecture=Architecture(
            name=type(module).__name__,
            classes=(type(module).__name__,),
            blocks=path,
            stages=grouped,
            fused=tuple(names for names in grouped if len(names) > 1),
            embedding=embedding,
            final_norm=final,
            head=head,
            logits=_logit_entries(module, head),
        ),
        left_out=tuple(name for name in linears if name not in members),
    )


def _is_linear(module: nn.Module) -> bool:
    """A plain linear or a packed one; not one with a forward pass of its own (FalconLinear)."""
    if isinstance(module, nn.Linear):
        return type(module) in (nn.Linear, StraightLinear)
    return isinstance(getattr(module, "in_features", None), int) and not list(module.children())


def _ends(module: Any) -> tuple[str, str]:
    """Paths of the token embedding and the head."""
    paths = {child: path for path, child in module.named_modules()}
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    if embedding is None or head is None:
        raise InputError(f"{type(module).__name__} has no token embedding or no head")
    return paths[embedding], paths[head]


@dataclass(slots=True)
class _Seen:
    """What hooks saw in a pass; tensors are kept so that their addresses stay theirs.

    Attributes:
        reads_of: (block, member, input) of every linear that ran inside a block.
        made: (path, output) of every module outside the blocks, in the order in which they ended.
        last: output of the last block.
        head_input: what the head read.
    """

    reads_of: list[tuple[int, str, Tensor]]
    made: list[tuple[str, Tensor]]
    last: Tensor | None = None
    head_input: Tensor | None = None

    def reads(self, block: int, member: str) -> Any:
        """Hook before a linear."""
        return lambda _, args: self.reads_of.append((block, member, args[0]))

    def makes(self, name: str) -> Any:
        """Hook behind a module outside the blocks."""

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.made.append((name, output))

        return keep

    def at_last(self, _: nn.Module, __: Any, output: Any) -> None:
        """Hook behind the last block."""
        self.last = output if isinstance(output, Tensor) else output[0]

    def at_head(self, _: nn.Module, args: Any) -> None:
        """Hook before the head."""
        self.head_input = args[0]


@contextmanager
def _watched(module: nn.Module, path: str, head: str) -> Iterator[_Seen]:
    """Hooks on the blocks' linears, on everything beside the blocks, and on the head."""
    seen, handles = _Seen([], []), []
    blocks: Any = module.get_submodule(path)
    try:
        for index, block in enumerate(blocks):
            for member, child in block.named_modules():
                if _is_linear(child):
                    handles.append(child.register_forward_pre_hook(seen.reads(index, member)))
        for name, child in module.named_modules():
            around = f"{path}.".startswith(f"{name}.") or not name
            if not around and name != head and not name.startswith(f"{path}."):
                handles.append(child.register_forward_hook(seen.makes(name)))
        handles.append(blocks[-1].register_forward_hook(seen.at_last))
        handles.append(module.get_submodule(head).register_forward_pre_hook(seen.at_head))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _check_coverage(module: nn.Module, block: nn.Module, members: set[str]) -> None:
    """Refuse a network most of whose blocks' matrices are no layers that can be planned."""
    whole = sum(p.numel() for p in block.parameters() if p.dim() > 1)
    layers: list[Any] = [block.get_submodule(name) for name in members]
    planned = sum(layer.in_features * layer.out_features for layer in layers)
    if planned < LEAST_COVERED * whole:
        raise InputError(
            f"only {planned / whole:.0%} of the weights of a block of {type(module).__name__} are "
            "linear layers that run once on [batch, length, features]"
        )


def _check_body(module: nn.Module, path: str) -> None:
    """Refuse a body that does not take token ids."""
    body = module.get_submodule(path.rpartition(".")[0])
    if "input_ids" not in inspect.signature(body.forward).parameters:
        raise InputError(f"{type(body).__name__}, which runs the blocks, takes no token ids")


def _check_causal(module: nn.Module, logits: Tensor) -> None:
    """Refuse a network in which a token changes what comes before it."""
    other = _run(module, 1)
    earlier = (logits[:, :-1].float() - other[:, :-1].float()).abs().max()
    if float(earlier) > 1e-4 * float(logits.float().abs().max()):
        raise InputError(f"{type(module).__name__} looks ahead: it is no decoder")


@torch.no_grad()
def _run(module: Any, change: int) -> Tensor:
    """Logits [1, TOKENS, vocabulary] of a few tokens, the last of them changed by so much."""
    tokens = torch.arange(TOKENS, device=next(module.parameters()).device)[None]
    tokens[0, -1] += change
    try:
        logits: Tensor = module(input_ids=tokens, use_cache=False).logits
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"{type(module).__name__} does not run on token ids alone: {said}"
        ) from None
    return logits


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What two views of one tensor share."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _layers(module: nn.Module, path: str, seen: _Seen) -> list[tuple[str, tuple[Any, ...]]]:
    """(member, what it reads) of the linears that every block runs once, in forward order.

    Raises:
        InputError: blocks differ.
    """
    blocks: Any = module.get_submodule(path)
    by_block: list[list[tuple[str, Tensor]]] = [[] for _ in blocks]
    for block, member, states in seen.reads_of:
        by_block[block].append((member, states))
    orders = [_usable(found) for found in by_block]
    for index, order in enumerate(orders):
        if [_groups(order), [n for n, _ in order]] != [
            _groups(orders[0]), [n for n, _ in orders[0]]
        ]:  # fmt: skip
            raise InputError(f"{path}.{index} does not run as {path}.0 does")
    return [(member, _place(states)) for member, states in orders[0]]


def _usable(found: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The linears that ran once, over batches of sequences."""
    names = [member for member, _ in found]
    return [
        (member, states)
        for member, states in found
        if names.count(member) == 1 and states.dim() == 3 and states.shape[:2] == (1, TOKENS)
    ]


def _groups(order: Sequence[tuple[str, Tensor]]) -> list[int]:
    """Which of the tensors read so far each layer reads."""
    places = [_place(states) for _, states in order]
    return [places.index(place) for place in places]


def _final_norm(module: nn.Module, path: str, seen: _Seen) -> str:
    """Path of the module whose output the head reads.

    Raises:
        InputError: no module makes it as it is.
    """
    if seen.head_input is not None:
        wanted = _place(seen.head_input)
        for name, output in reversed(seen.made):
            if _place(output) == wanted:
                return name
    raise InputError(
        f"the head of {type(module).__name__} does not read what a module behind {path} makes"
    )


@torch.no_grad()
def _check_head(module: nn.Module, seen: _Seen, final: str, head: str) -> None:
    """Refuse a network whose head reads more than its last norm of the last block's output."""
    norm, projection = module.get_submodule(final), module.get_submodule(head)
    try:
        formed = projection(norm(seen.last)).float()
    except (RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"{final} does not read the last block's output: {said}") from None
    if not _equal(formed, projection(seen.head_input)):
        raise InputError(
            f"what {head} of {type(module).__name__} reads is not what {final} makes of the last "
            "block's output"
        )


def _logit_entries(module: nn.Module, head: str) -> LogitEntries:
    """Where the configuration says what the network makes of its head's output.

    Raises:
        InputError: no entries of its configuration say so.
    """
    given = torch.linspace(-LARGEST_LOGIT, LARGEST_LOGIT, TOKENS)
    hook = module.get_submodule(head).register_forward_hook(
        lambda _, __, output: given.to(output).view(1, TOKENS, 1).expand(output.shape).clone()
    )
    try:
        logits = _run(module, 0)
    finally:
        hook.remove()
    config = getattr(module, "config", None)
    choices = [
        ["", *(name for name in names if isinstance(getattr(config, name, None), int | float))]
        for names in LOGIT_ENTRIES.values()
    ]
    for chosen in product(*choices):
        entries = LogitEntries(**dict(zip(LOGIT_ENTRIES, chosen, strict=True)))
        try:
            form = entries.form(config)
        except InputError:  # a number that is none
            continue
        formed = form.form_(given.view(1, TOKENS, 1).expand(logits.shape).clone())
        if _equal(formed.to(logits.device), logits):
            return entries
    raise InputError(
        f"the logits of {type(module).__name__} are not what {head} gives: they are scaled, capped "
        "or made of more, in a way that its configuration does not name as known networks do"
    )


def _equal(found: Tensor, expected: Tensor) -> bool:
    """Equal but for the order of operations; a cap changes small numbers by little, but by more."""
    largest = float(expected.float().abs().max())
    return found.shape == expected.shape and (
        float((found.float() - expected.float()).abs().max()) <= 1e-6 * largest
    )


def shape_of(module: nn.Module) -> Architecture:
    """The registered architecture of a network, or what `discover` finds, which is said.

    Raises:
        InputError: it is not registered and nothing was found.
    """
    name = type(module).__name__
    if any(name in entry.classes for entry in ARCHITECTURES.values()):
        return architecture_of(module)
    try:
        found = discover(module)
    except InputError as error:
        raise InputError(
            f"{name} is not a known architecture, and looking for its blocks failed: {error}"
        ) from None
    shape = found.architecture
    blocks = len(shape.block_list(module))
    stages = " | ".join(", ".join(members) for members in shape.stages)
    kept = f"; left in 16 bits: {', '.join(found.left_out)}" if found.left_out else ""
    logger.warning(
        "%s is not a known architecture: %d blocks were found at %s, each with %s%s",
        name, blocks, shape.blocks, stages, kept,
    )  # fmt: skip
    return shape
