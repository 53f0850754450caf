"""What shipping may take of a node's processors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from outlast.manager._pace import beside, paced


class Node:
    """Clocks of a node, and a memory each reading of which is followed by a second's work."""

    name = "pages-1.img"
    runs: Sequence[tuple[int, int, int]] = [(1, 0x1000, 1)]

    def __init__(self) -> None:
        self.wall = self.cpu = 100.0
        self.read = 0

    def readinto(self, space: int, vaddr: int, buffer: memoryview) -> None:
        self.read += 1
        self.wall += 1
        self.cpu += 1

    def sleep(self, seconds: float) -> None:
        self.wall += seconds

    def seconds_for(self, reads: int, share: float, *, hurry: bool = False) -> float:
        """How long it takes to read so often."""
        begin = self.wall
        (memory,) = paced(
            [self],
            share,
            hurry=lambda: hurry,
            wall=lambda: self.wall,
            cpu=lambda: self.cpu,
            sleep=self.sleep,
        )
        assert (memory.name, memory.runs) == (self.name, self.runs)
        for _ in range(reads):
            memory.readinto(1, 0x1000, memoryview(bytearray(4096)))
        assert self.read == reads
        return self.wall - begin


def test_shipping_takes_no_more_than_its_share_of_a_core() -> None:
    assert 18 <= Node().seconds_for(10, 0.5) <= 20


def test_without_a_share_nothing_is_held_back() -> None:
    assert Node().seconds_for(10, 0) == 10


def test_what_somebody_waits_for_is_not_held_back() -> None:
    assert Node().seconds_for(10, 0.5, hurry=True) == 10


@pytest.fixture
def compute() -> Iterator[Callable[[int], int]]:
    """Starts a process that computes on a processor; returns its PID."""
    started = []

    def start(processor: int) -> int:
        code = "print(end='.', flush=True)\nwhile True: pass"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        started.append(process)
        os.sched_setaffinity(process.pid, {processor})
        assert process.stdout is not None
        assert process.stdout.read(1) == b"."
        return process.pid

    yield start
    for process in started:
        process.kill()
        process.communicate()


def processors(pids: Sequence[int]) -> tuple[set[int], set[int]]:
    """Where this thread, and one that it starts, may run beside the processes *pids*."""
    found: list[set[int]] = []
    with beside(pids):
        worker = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
        worker.start()
        worker.join()
        return os.sched_getaffinity(0), found[0]


def test_shipping_leaves_the_processors_alone_that_the_job_computes_on(compute: Callable[[int], int]) -> None:
    everywhere = os.sched_getaffinity(0)
    if len(everywhere) < 2:
        pytest.skip("one processor")
    for processor in sorted(everywhere)[:2]:
        left = everywhere - {processor}
        assert processors([compute(processor)]) == (left, left)
        assert os.sched_getaffinity(0) == everywhere


def test_beside_a_job_on_all_processors_shipping_may_run_on_all(compute: Callable[[int], int]) -> None:
    everywhere = os.sched_getaffinity(0)
    assert processors([compute(one) for one in everywhere]) == (everywhere, everywhere)


def test_job_that_waits_or_has_ended_keeps_shipping_from_no_processor() -> None:
    everywhere = os.sched_getaffinity(0)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b".")
        assert process.stdout.read(1) == b"."
        until = time.monotonic() + 30
        while " S " not in Path(f"/proc/{process.pid}/stat").read_text() and time.monotonic() < until:
            time.sleep(0.01)
        waiting = processors([process.pid])
    assert waiting == (everywhere, everywhere)
    assert processors([process.pid]) == (everywhere, everywhere)
