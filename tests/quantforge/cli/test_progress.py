import io
import os
import pty
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from quantforge.cli.progress import ProgressLines, progress
from quantforge.progress import ProgressEvent


def event(stage: str, done: int, total: int, message: str = "") -> ProgressEvent:
    return ProgressEvent(stage=stage, done=done, total=total, message=message)


def lines(steps: list[tuple[float, ProgressEvent]], interval_s: float = 15.0) -> list[str]:
    now = 0.0
    stream = io.StringIO()
    show = ProgressLines(stream, interval_s=interval_s, clock=lambda: now)
    for moment, step in steps:
        now = moment
        show(step)
    return stream.getvalue().splitlines()


def test_a_stage_shows_its_start_its_end_and_every_interval() -> None:
    steps = [(float(t), event("quantize", t, 40)) for t in range(41)]
    assert lines(steps) == [
        "[0:00] quantize: 0 of 40 (0 %)",
        "[0:15] quantize: 15 of 40 (37 %), 0:25 left",
        "[0:30] quantize: 30 of 40 (75 %), 0:10 left",
        "[0:40] quantize: 40 of 40 (100 %)",
    ]


def test_time_left_uses_only_steps_that_were_seen() -> None:
    # Resumed at 90 of 100: ten steps remain, and one step took two seconds.
    steps = [(0.0, event("a", 90, 100)), (2.0, event("a", 91, 100)), (20.0, event("a", 95, 100))]
    assert lines(steps)[-1] == "[0:20] a: 95 of 100 (95 %), 0:20 left"


def test_a_new_stage_shows_at_once_and_its_pace_is_its_own() -> None:
    steps = [
        (0.0, event("a", 1, 2)),
        (100.0, event("b", 0, 4, "x\ny")),
        (116.0, event("b", 2, 4)),
        (3700.0, event("c", 5, 0)),
    ]
    assert lines(steps) == [
        "[0:00] a: 1 of 2 (50 %)",
        "[1:40] b: 0 of 4 (0 %), x y",
        "[1:56] b: 2 of 4 (50 %), 0:16 left",
        "[1:01:40] c: 5",
    ]


def written(master: int) -> str:
    """Everything a pseudo-terminal received, once its other end is closed."""
    pieces = []
    with suppress(OSError), open(master, "rb", buffering=0) as stream:  # Linux ends it with EIO
        while piece := stream.read(1 << 16):
            pieces.append(piece)
    return b"".join(pieces).decode()


def test_a_terminal_gets_live_bars_with_elapsed_and_remaining_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    master, slave = pty.openpty()
    with ThreadPoolExecutor(1) as reader:  # read while it is written: the buffer is small
        shown = reader.submit(written, master)
        with os.fdopen(slave, "w") as terminal, progress(terminal) as report:
            report(event("calibrate", 3, 12, "layer [bold]7"))
            report(event("quantize", 1, 30))
    for part in ("calibrate", "3/12", "layer [bold]7", "quantize", "1/30", "0:00:00", "-:--:--"):
        assert part in shown.result()
