"""Waiting with a bound, and what wait statuses mean."""

from __future__ import annotations

import select
import signal
import time
from collections.abc import Callable


def eventually(true: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    """Wait until *true* returns something true."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)


def lives(pidfd: int) -> bool:
    """Whether the process of *pidfd* has not ended yet."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


def killed_by(number: signal.Signals) -> int:
    """The wait status of a process that signal *number* ended, without a core dump."""
    return int(number)


def exit_code(number: int) -> int:
    """The wait status of a process that ended by itself with *number*."""
    return number << 8
