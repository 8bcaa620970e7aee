"""One process's share of the work, where `accelerate launch` or torchrun started several.

Every process runs the same program on the same inputs. Where work falls into parts that do not ask
for each other (windows, batches, candidates of layers) each process does its own, and what came of
them is exchanged; everything else all of them do alike. One process is the case of one.

The bytes of a result do not depend on how many there are: parts that are put side by side are the
same whoever made them, and floating-point sums over batches are made in `LANES` runs of batches,
which are added in one order, whoever made each. Training end to end alone adds its gradients up as
they come (`Share.add_up`), so there processes equal one to rounding.

Whatever is exchanged is announced first, by a few bytes of every process that also say whether it
failed. So an error of one of them, or an interrupt, ends all at their next exchange, and none waits
for what never comes. A process that is killed closes its connections, which ends the others too.
"""

from __future__ import annotations

import atexit
import json
import socket
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from quantforge.errors import ElsewhereError, UsageError, explained, is_out_of_memory
from quantforge.launcher import is_alone

Item = TypeVar("Item")
Sums = TypeVar("Sums", bound="Summed")

# Runs of batches, whose sums are added in order: as many processes can share them.
LANES = 4
# What a process says before an exchange: status, size of what it gives, length of a message, it.
_ANNOUNCEMENT = 1024
_FORM = struct.Struct("<qqq")
# Bytes from which a tensor goes by itself.
_LARGE = 1 << 16
# So long a process may wait for another one: for a download, or a run that makes what it needs.
_PATIENCE = timedelta(hours=6)
_LOST = (
    "another process of this run was lost: its own message, or the launcher's, says why; the same "
    "command goes on from what is finished"
)


@dataclass(frozen=True, slots=True)
class Message:
    """What one process gives the others.

    Attributes:
        tensors: by name.
        facts: JSON values by name.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Summed(Protocol):
    """What is summed over batches."""

    def sums(self) -> list[Tensor]:
        """Everything that adds up, in an order that does not change."""

    def replace_sums(self, sums: Sequence[Tensor]) -> None:
        """Take sums in place of one's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which process this is of how many.

    Attributes:
        rank: of this process.
        count: of all.
        here: how many of them share this machine's memory and disk, this one included.
        device: where they exchange tensors.
    """

    rank: int = 0
    count: int = 1
    here: int = 1
    device: torch.device | str = "cpu"

    @classmethod
    def of_this_process(cls, device: torch.device) -> Share:
        """As the launcher says; joins the others on the first call.

        Accelerate keeps one state for all that a process does, so a process that nobody launched
        beside others does not ask for it.
        """
        if is_alone():
            return cls(device=device)
        from accelerate import PartialState

        if not torch.distributed.is_initialized():
            atexit.register(_leave)  # its threads do not outlive the interpreter
        state = PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)
        share = cls(rank=state.process_index, count=state.num_processes, device=device)
        said = share.exchange(facts={"host": socket.gethostname()})
        hosts = [one.facts["host"] for one in said]
        return replace(share, here=hosts.count(hosts[share.rank]))

    @property
    def main(self) -> bool:
        """Whether this process writes what all of them know."""
        return self.rank == 0

    def part(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of what all have the same of."""
        return items[self.rank :: self.count]

    def span(self, costs: Sequence[float]) -> tuple[int, int]:
        """This process's run of items in a row, the first and the one after the last.

        Runs of all processes have about the same cost.
        """
        total, before, owners = sum(costs) or 1.0, 0.0, []
        for cost in costs:
            owners.append(int((before + cost / 2) * self.count / total))
            before += cost
        return bisect_left(owners, self.rank), bisect_left(owners, self.rank + 1)

    def lanes(self, count: int) -> list[tuple[int, range]]:
        """This process's runs of so many batches, with their numbers; none is empty.

        There are `LANES` of them, or as many as a smaller power of two where batches are few.
        """
        lanes = LANES
        while lanes > count:
            lanes //= 2
        edges = [lane * count // max(lanes, 1) for lane in range(lanes + 1)]
        sharing = min(self.count, lanes)
        return [
            (lane, range(first, last))
            for lane, (first, last) in enumerate(pairwise(edges))
            if lane * sharing // lanes == self.rank
        ]

    def batches(self, count: int) -> list[int]:
        """This process's of so many batches: those in its lanes."""
        return [index for _, run in self.lanes(count) for index in run]

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its sum over the processes, in place."""
        if self.count == 1:
            return
        with _unbroken():
            self._announce()
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def exchange(
        self, tensors: Mapping[str, Tensor] | None = None, facts: Mapping[str, Any] | None = None
    ) -> list[Message]:
        """What every process gives, in the order of ranks; each gives what it likes.

        Tensors of the others are on the CPU.

        Raises:
            ElsewhereError: another process failed, or is gone.
        """
        mine = Message(tensors or {}, facts or {})
        if self.count == 1:
            return [mine]
        large = {n: t.detach() for n, t in mine.tensors.items() if t.nbytes >= _LARGE}
        small = {n: t for n, t in mine.tensors.items() if n not in large}
        nothing = torch.empty(0, dtype=torch.uint8, device=self.device)
        given = nothing
        if mine.tensors or mine.facts:
            shapes = {n: [str(t.dtype), *t.shape] for n, t in large.items()}
            facts = {"facts": dict(mine.facts), "large": shapes}
            given = _encoded(Message(small, facts)).to(self.device)
        found = []
        with _unbroken():
            for rank, size in enumerate(self._announce(len(given))):
                own = rank == self.rank
                buffer = given if own else given.new_empty(size)
                if size:
                    torch.distributed.broadcast(buffer, src=rank)
                    if own:
                        self._send(large.values())
                found.append(mine if own else self._received(buffer, rank) if size else Message())
        return found

    def _send(self, tensors: Iterable[Tensor]) -> None:
        """Give large tensors as they are, without copies of their bytes."""
        for tensor in tensors:
            flat = tensor.to(self.device).contiguous().flatten().view(torch.uint8)
            torch.distributed.broadcast(flat, src=self.rank)

    def _received(self, buffer: Tensor, rank: int) -> Message:
        """What another process gives: small tensors and facts in the buffer, large ones follow."""
        small = _decoded(buffer)
        found = dict(small.tensors)
        for name, (dtype, *shape) in small.facts["large"].items():
            kind = getattr(torch, dtype.removeprefix("torch."))
            made = torch.empty(shape, dtype=kind, device=self.device)
            torch.distributed.broadcast(made.flatten().view(torch.uint8), src=rank)
            found[name] = made.cpu()
        return Message(found, small.facts["facts"])

    def joined(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of all processes, each of which has others."""
        return {
            name: one for given in self.exchange(tensors) for name, one in given.tensors.items()
        }

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            self._announce()

    def agree(self, value: float) -> float:
        """The first process's value."""
        return float(self.exchange(facts={"value": value})[0].facts["value"])

    def require_equal(self, key: str, what: str) -> None:
        """Refuse processes that do not work on the same.

        Args:
            key: fingerprint of it.
            what: it is, for the message.

        Raises:
            UsageError: the first process has another one than this.
        """
        keys = [message.facts["key"] for message in self.exchange(facts={"key": key})]
        other = next((rank for rank, one in enumerate(keys) if one != keys[0]), None)
        if other is not None:
            raise UsageError(
                f"process {other} of this run has another {what} than process 0: start the same "
                "command on machines of one kind, with the same number of threads"
            )

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The first process is through the body before the others begin: it fills a cache."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    @contextmanager
    def together(self) -> Iterator[None]:
        """All processes are in the body, or none: an error of one ends it for the others.

        Raises:
            ElsewhereError: another process failed, or is gone.
        """
        try:
            yield
            self.wait()  # who is done hears of who is not
        except ElsewhereError:
            raise
        except (Exception, KeyboardInterrupt) as error:
            if self.count > 1:
                self._tell(error)
            raise

    def _tell(self, error: BaseException) -> None:
        """Let the others know of an error; they are at an exchange, or will be."""
        try:
            code, text = explained(error)
            self._announce(status=1 + code, text=text)
        except ElsewhereError:
            return  # they failed too, or are gone

    def _announce(self, size: int = 0, *, status: int = 0, text: str = "") -> list[int]:
        """Say what comes, hear of the others: sizes of what each gives.

        Raises:
            ElsewhereError: one of them failed, or is gone.
        """
        said = text.encode()[: _ANNOUNCEMENT - _FORM.size]
        packed = (_FORM.pack(status, size, len(said)) + said).ljust(_ANNOUNCEMENT, b"\0")
        mine = torch.frombuffer(bytearray(packed), dtype=torch.uint8).to(self.device)
        all_said = [torch.empty_like(mine) for _ in range(self.count)]
        with _unbroken():
            torch.distributed.all_gather(all_said, mine)
        heard = [bytes(one.cpu().numpy()) for one in all_said]
        sizes = []
        for rank, one in enumerate(heard):
            failed, amount, length = _FORM.unpack_from(one)
            if failed and rank != self.rank:
                words = one[_FORM.size : _FORM.size + length].decode(errors="ignore")
                raise ElsewhereError(words, exit_code=failed - 1)
            sizes.append(amount)
        return sizes


ALONE = Share()


class Tally:
    """Sums over lanes, added one to the other in their order, whoever made each of them.

    The process that has the first lanes adds them as they come, so that it holds two sums at most.
    """

    def __init__(self, share: Share) -> None:
        self._share = share
        self._added = 0  # lanes that are in the sums of lane 0
        self._known: dict[int, list[Tensor]] = {}

    def put(self, lane: int, sums: Sequence[Tensor]) -> None:
        """Take the sums of a lane, which are changed."""
        if lane and lane == self._added:
            _add(self._known[0], sums)
        else:
            self._known[lane] = list(sums)
        self._added += lane == self._added

    def total(self) -> list[Tensor]:
        """The sums of all lanes, once every process has put its own."""
        given = {
            f"{lane}.{index}": one
            for lane, sums in self._known.items()
            for index, one in enumerate(sums)
        }
        for rank, message in enumerate(self._share.exchange(given)):
            if rank == self._share.rank:
                continue
            for name, one in sorted(message.tensors.items(), key=lambda x: _place(x[0])):
                sums = self._known.setdefault(_place(name)[0], [])
                sums.append(one.to(self._share.device))
        whole = self._known.pop(0)
        for _, sums in sorted(self._known.items()):
            _add(whole, sums)
        return whole


def _add(sums: Sequence[Tensor], more: Sequence[Tensor]) -> None:
    for one, other in zip(sums, more, strict=True):
        one.add_(other.to(one.device))


def _place(name: str) -> tuple[int, int]:
    """Lane and place of "3.12"."""
    lane, _, index = name.partition(".")
    return int(lane), int(index)


def summed(
    share: Share,
    count: int,
    fresh: Callable[[], Mapping[str, Sums]],
    visit: Callable[[Mapping[str, Sums], int], None],
) -> Mapping[str, Sums]:
    """What batches add up to, of all processes.

    Args:
        share: of the batches.
        count: how many batches.
        fresh: makes empty sums.
        visit: adds a batch, by its place, to sums.
    """
    if not count:
        return fresh()
    tally, made = Tally(share), None
    for lane, run in share.lanes(count):
        made = fresh()
        for index in run:
            visit(made, index)
        tally.put(lane, [one for name in made for one in made[name].sums()])
    whole = fresh() if made is None else made
    left = tally.total()
    for one in whole.values():
        size = len(one.sums())
        one.replace_sums(left[:size])
        del left[:size]
    return whole


@contextmanager
def _unbroken() -> Iterator[None]:
    """An exchange that breaks off in the body is over for all processes.

    Raises:
        ElsewhereError: another one is gone.
    """
    try:
        yield
    except ElsewhereError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        _leave()  # or the others would wait for the rest
        if isinstance(error, RuntimeError | ValueError) and not is_out_of_memory(error):
            raise ElsewhereError(_LOST, gone=True) from error
        raise


def _leave() -> None:
    """Close the connections to the other processes, if there are any."""
    with suppress(RuntimeError, ValueError, AssertionError):
        torch.distributed.destroy_process_group()


def _encoded(message: Message) -> Tensor:
    """[bytes] uint8."""
    from safetensors.torch import save

    kept = {name: one.detach().cpu().contiguous() for name, one in message.tensors.items()}
    return torch.frombuffer(
        bytearray(save(kept, metadata={"facts": json.dumps(dict(message.facts))})),
        dtype=torch.uint8,
    )


def _decoded(buffer: Tensor) -> Message:
    """Inverse of `_encoded`."""
    from safetensors.torch import load

    data = buffer.cpu().numpy().tobytes()
    (length,) = struct.unpack_from("<Q", data)
    about = json.loads(data[8 : 8 + length])["__metadata__"]
    return Message(load(data), json.loads(about["facts"]))
