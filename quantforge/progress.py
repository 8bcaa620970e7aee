"""How a long call reports where it is and how it is stopped, without printing anything."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from quantforge.errors import CancelledError


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressEvent:
    """One step of one stage.

    Attributes:
        stage: what is running, as a user would call it ("calibrate", "search", "quantize").
        done: finished steps of this stage.
        total: all steps of this stage; 0 where the number is unknown.
        message: what the step was about, e.g. the layer's name; may be empty.
    """

    stage: str
    done: int
    total: int
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Monitor:
    """Carries a caller's progress callback and cancel event through the stages.

    Attributes:
        progress: called after every step; None reports nothing.
        cancel: once set, the next `step` or `check` raises `CancelledError`.
    """

    progress: Callable[[ProgressEvent], None] | None = None
    cancel: threading.Event | None = None

    def step(self, stage: str, done: int, total: int, message: str = "") -> None:
        """Report one finished step; raise `CancelledError` if the caller asked to stop."""
        self.check(stage, f" ({done} of {total})")
        if self.progress is not None:
            event = ProgressEvent(stage=stage, done=done, total=total, message=message)
            self.progress(event)

    def part(self, stage: str, before: int, total: int) -> Monitor:
        """For one of several calls that are a single stage to whoever watches.

        Args:
            stage: its name, in place of what the call reports.
            before: steps of the calls before this one.
            total: steps of all of them.
        """

        def report(event: ProgressEvent) -> None:
            if self.progress is not None:
                done = before + event.done
                self.progress(replace(event, stage=stage, done=done, total=total))

        return Monitor(progress=report, cancel=self.cancel)

    def check(self, stage: str, where: str = "") -> None:
        """Raise `CancelledError` if the caller asked to stop; report nothing."""
        if self.cancel is not None and self.cancel.is_set():
            raise CancelledError(f"cancelled during {stage}{where}")


def resumed(what: str, done: int, total: int) -> str:
    """What a stage says that goes on after `done` of `total`: "resumed at block 17 of 30"."""
    if done == total:
        return f"resumed after {what} {total} of {total}"
    return f"resumed at {what} {done + 1} of {total}"
