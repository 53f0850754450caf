"""What is for people to read: sizes, and at a terminal, nowhere else, color and progress."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

# What is said of a job's state, by the first word of it, in any scheduler's language.
_STATES = {
    "RUNNING": "32", "R": "32", "PENDING": "33", "Q": "33", "HELD": "33", "COMPLETED": "34", "DONE": "34",
    "NODE_FAIL": "31", "FAILED": "31", "LOST": "31", "TIMEOUT": "31", "OUT_OF_MEMORY": "31",
}  # fmt: skip
_FAILED = ("failed", "lost", "refused", "unreachable", "killed", "fenced", "node-marked-down", "not-")
_GOOD = ("checkpoint", "restored", "pages-arrived")
_VERDICTS = {"FAIL": "31", "WARN": "33", "ok": "32", "OK": "32"}

Advance = Callable[[float], None]


def colored(stream: TextIO | None = None) -> bool:
    """Whether *stream*, else standard output, is a terminal whose user wants color (https://no-color.org)."""
    return (
        (stream or sys.stdout).isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM") not in (None, "dumb")
    )


def paint(text: str, code: str) -> str:
    """Return *text* in the color of the ANSI *code*, where standard output shows colors."""
    return f"\x1b[{code}m{text}\x1b[0m" if code and colored() else text


def state(text: str) -> str:
    """Return a job's state in its color."""
    return paint(text, _STATES.get(text.strip().replace("+", " ").replace("(", " ").split(" ")[0], ""))


def event(word: str) -> str:
    """Return an event's word in its color; *word* may be padded."""
    bare = word.strip()
    if any(part in bare for part in _FAILED):
        return paint(word, "31")
    return paint(word, "32" if bare in _GOOD else "")


def verdict(word: str) -> str:
    """Return doctor's verdict in its color; *word* may be padded."""
    return paint(word, _VERDICTS.get(word.strip(), ""))


@contextlib.contextmanager
def progress(what: str, total: float | None = None, *, bytes_: bool = False) -> Iterator[Advance]:
    """Show on standard error how far *what* has come, as long as the block runs.

    Gives a function of how much is done. Where standard error is no terminal, or rich is not installed,
    nothing is shown.

    Args:
        what: in a few words.
        total: how much there is; None where that is not known.
        bytes_: whether it is counted in bytes.
    """
    if not colored(sys.stderr):
        yield _nothing
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )
    except ImportError:
        yield _nothing
        return
    count: list[ProgressColumn] = [DownloadColumn() if bytes_ else MofNCompleteColumn()] if total else []
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), *count, TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda done: shown.update(task, completed=done)


@contextlib.contextmanager
def steps() -> Iterator[Callable[[str, int, int], None]]:
    """Show on standard error how far one thing after another has come, as long as the block runs.

    Gives a function of what it is, how much of it is done, and of how much; shown is as by `progress`.
    """
    with contextlib.ExitStack() as shown:
        what = ""
        advance: Advance = _nothing

        def draw(name: str, done: int, total: int) -> None:
            nonlocal what, advance
            if name != what:
                shown.close()
                what, advance = name, shown.enter_context(progress(name, total or None))
            advance(done)

        yield draw


def _nothing(done: float) -> None:
    """Show nothing of what is *done*."""


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
