"""What the workloads share: arguments, numbered progress lines, random numbers, checksum.

workload.c is the same in C and must stay so, bit for bit. Standard library only: these run on any node.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MAX_STEPS = 1_000_000_000
_MAX_PACE = 86400.0


class CheckFailedError(Exception):
    """A step did not pass its own check."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A program's own word on itself: its names, defaults and limits."""

    name: str
    size_name: str
    step_name: str
    steps_name: str
    size: int
    sizes: range
    steps: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: its number from 1, the checksum so far, and whether to spoil its result before the check."""

    number: int
    checksum: int
    spoil: bool


@dataclasses.dataclass(frozen=True)
class _Options:
    """The command line. The *_at* steps are 0 where they were not asked for; pace is in seconds."""

    size: int
    steps: int
    pace: float
    fail_at: int
    fail_code: int
    signal_at: int
    signal_number: int
    spoil_at: int


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}\n")


def _whole_number(text: str, numbers: range) -> int:
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) not in numbers:
        raise argparse.ArgumentTypeError(
            f"{text}: must be a whole number, {numbers[0]} to {numbers[-1]}",
        )
    return int(text)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", text) or float(text) > _MAX_PACE:
        raise argparse.ArgumentTypeError(f"{text}: must be seconds, such as 0.5, at most a day")
    return float(text)


def _signal_number(text: str) -> int:
    name = "SIG" + text.removeprefix("SIG")
    if name in signal.Signals.__members__:
        return signal.Signals[name]
    if not text[:1].isdigit():
        raise argparse.ArgumentTypeError(f"{text}: no such signal; write TERM, SIGTERM or 15")
    return _whole_number(text, range(1, signal.NSIG))


def _parse(workload: Workload) -> _Options:
    step = workload.step_name
    parser = _Parser(
        prog=workload.name,
        allow_abbrev=False,
        epilog="exit codes: 0 right result, 1 a check failed, 2 wrong arguments",
    )
    parser.add_argument(
        "size",
        metavar=workload.size_name,
        nargs="?",
        type=lambda text: _whole_number(text, workload.sizes),
        default=workload.size,
        help=f"{workload.sizes[0]} to {workload.sizes[-1]}, {workload.size} unless given",
    )
    parser.add_argument(
        "steps",
        metavar=workload.steps_name,
        nargs="?",
        type=lambda text: _whole_number(text, range(1, _MAX_STEPS + 1)),
        default=workload.steps,
        help=f"how many {step}s, {workload.steps} unless given",
    )
    parser.add_argument(
        "--pace", type=_seconds, default=0.0, metavar="SECONDS", help=f"sleep between two {step}s"
    )
    parser.add_argument(
        "--fail-at", nargs=2, metavar=("STEP", "CODE"), help=f"exit with CODE after the line of this {step}"
    )
    parser.add_argument(
        "--signal-at",
        nargs=2,
        metavar=("STEP", "SIG"),
        help=f"die by the signal (TERM, 15) after the line of this {step}",
    )
    parser.add_argument(
        "--spoil-at", metavar="STEP", help=f"spoil the result of this {step}, so that its check must fail"
    )
    given = parser.parse_args()
    # Only now, since the options may stand before the number of steps that bounds them.
    steps = range(1, given.steps + 1)
    try:
        return _Options(
            size=given.size,
            steps=given.steps,
            pace=given.pace,
            fail_at=_whole_number(given.fail_at[0], steps) if given.fail_at else 0,
            fail_code=_whole_number(given.fail_at[1], range(256)) if given.fail_at else 0,
            signal_at=_whole_number(given.signal_at[0], steps) if given.signal_at else 0,
            signal_number=_signal_number(given.signal_at[1]) if given.signal_at else 0,
            spoil_at=_whole_number(given.spoil_at, steps) if given.spoil_at else 0,
        )
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))


def _say(workload: Workload, line: str) -> None:
    """Write the line in one piece, so that nobody reads half of it."""
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except OSError as error:
        sys.stderr.write(f"{workload.name}: standard output: {error.strerror}\n")
        os._exit(1)  # a common exit would try to write the same line again


def _die_by_signal(workload: Workload, number: int) -> NoReturn:
    # The caller may have left it ignored or blocked. SIGKILL refuses to be reset, and needs it not.
    with contextlib.suppress(OSError, ValueError):
        signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(ValueError):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    sys.exit(f"{workload.name}: signal {number}: did not end the program")


def run(workload: Workload, prepare: Callable[[int], Callable[[Step], int]]) -> NoReturn:
    """Run the workload that the command line asks for, and end the program with its exit code.

    Args:
        prepare: called once with the size; returns what computes a step and gives the checksum after it,
            or raises CheckFailedError.
    """
    options = _parse(workload)
    compute = prepare(options.size)
    checksum = start(options.size)
    for number in range(1, options.steps + 1):
        try:
            checksum = compute(Step(number, checksum, number == options.spoil_at))
        except CheckFailedError as error:
            sys.exit(f"{workload.name}: {workload.step_name} {number}: check failed: {error}")
        _say(workload, f"{workload.step_name} {number} of {options.steps} checksum {checksum:016x}")
        if number == options.fail_at:
            sys.exit(options.fail_code)
        if number == options.signal_at:
            _die_by_signal(workload, options.signal_number)
        if options.pace and number < options.steps:
            time.sleep(options.pace)
    _say(workload, f"result {checksum:016x} ok")
    sys.exit(0)


def _mix(z: int) -> int:
    """Scramble 64 bits: the finalizer of SplitMix64.

    Source:
        Steele, Lea, Flood: Fast splittable pseudorandom number generators (OOPSLA 2014), with the constants
        of Vigna's public domain splitmix64.c.
    """
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def start(size: int) -> int:
    """Return the checksum before the first step."""
    return _mix(size)


def seed(checksum: int, step: int, stream: int) -> int:
    """Return a seed for one stream (0 to 3) of a step's random numbers: it depends on every result so far."""
    return _mix(checksum ^ _mix(step << 2 | stream))


def draw(seed: int, index: int) -> int:
    """Return the number with this index in the stream that begins with *seed*: 64 bits (SplitMix64)."""
    return _mix((seed + (index + 1) * _GOLDEN) & _MASK)


def fold(checksum: int, words: Iterable[int]) -> int:
    """Fold 64-bit words into the checksum. Their order counts."""
    for word in words:
        product = ((checksum ^ word) * _GOLDEN) & _MASK
        # Rotated, else high bits would never reach low ones.
        checksum = (product << 29 | product >> 35) & _MASK
    return checksum


def fold_doubles(checksum: int, values: Iterable[float]) -> int:
    """Fold the bits of doubles into the checksum, in order."""
    packed = [*values]
    return fold(checksum, struct.unpack(f"={len(packed)}Q", struct.pack(f"={len(packed)}d", *packed)))
