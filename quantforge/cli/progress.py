"""Progress on stderr: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from quantforge.cli.text import duration, one_line

if TYPE_CHECKING:
    from quantforge.progress import ProgressEvent

INTERVAL_S = 15.0

Report = Callable[["ProgressEvent"], None]


@contextmanager
def progress(stream: TextIO | None = None) -> Iterator[Report]:
    """Yield the callback that a pipeline call reports to; what it shows is gone afterwards."""
    stream = stream or sys.stderr
    if stream.isatty():
        with _live_bars(stream) as report:
            yield report
    else:
        yield ProgressLines(stream)


class ProgressLines:
    """Plain lines: at the start and the end of a stage, and every `interval_s` between.

    A line holds the time since the command began, the stage, how far it is, and the time left in
    it, extrapolated from its own pace:

        [2:05] quantize: 12 of 30 (40 %), 3:08 left, model.layers.12
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._interval_s, self._clock = stream, interval_s, clock
        self._began = self._stage_began = self._shown = clock()
        self._stage = ""
        self._first = 0

    def __call__(self, event: ProgressEvent) -> None:
        """Print a line for `event` if it is time for one."""
        now = self._clock()
        finished = 0 < event.total <= event.done
        begins = event.stage != self._stage
        if begins:
            self._stage, self._stage_began, self._first = event.stage, now, event.done
        if begins or finished or now - self._shown >= self._interval_s:
            self._shown = now
            print(self._line(event, now), file=self._stream, flush=True)

    def _line(self, event: ProgressEvent, now: float) -> str:
        parts = [f"[{duration(now - self._began)}] {event.stage}: {event.done}"]
        if event.total:
            parts[0] += f" of {event.total} ({100 * event.done // event.total} %)"
        steps = event.done - self._first  # steps that this stage was seen to take
        if steps > 0 and event.done < event.total:
            pace = (now - self._stage_began) / steps
            parts.append(f"{duration(pace * (event.total - event.done))} left")
        if event.message:
            parts.append(one_line(event.message))
        return ", ".join(parts)


@contextmanager
def _live_bars(stream: TextIO) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[message]}", markup=False),
    )
    console = Console(file=stream, markup=False, highlight=False)
    with Progress(*columns, console=console, redirect_stdout=False) as bars:
        tasks: dict[str, TaskID] = {}

        def report(event: ProgressEvent) -> None:
            if event.stage not in tasks:
                for earlier in tasks.values():
                    bars.stop_task(earlier)
                tasks[event.stage] = bars.add_task(event.stage, total=None, message="")
            bars.update(
                tasks[event.stage],
                completed=event.done,
                total=event.total or None,
                message=one_line(event.message)[:48],
            )

        yield report
