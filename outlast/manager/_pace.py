"""Bounds for what shipping a checkpoint takes of the node's processors."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from outlast.store import Memory

# A sleep is cut here: a heartbeat that had to wait for a processor must not make up for it in one go.
_LONGEST_SLEEP = 1.0


class _Paced:
    """A memory whose reader is held back while this process has computed for more than its share."""

    def __init__(self, memory: Memory, hold_back: Callable[[], None]) -> None:
        self._memory = memory
        self._hold_back = hold_back

    @property
    def name(self) -> str:
        return self._memory.name

    @property
    def runs(self) -> Sequence[tuple[int, int, int]]:
        return self._memory.runs

    def readinto(self, space: int, vaddr: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        self._hold_back()
        self._memory.readinto(space, vaddr, buffer)


def paced(
    memories: Sequence[Memory],
    share: float,
    *,
    hurry: Callable[[], bool],
    wall: Callable[[], float] = time.monotonic,
    cpu: Callable[[], float] = time.process_time,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Memory]:
    """Return *memories* that are read no faster than this process may compute: *share* of one core, on average.

    All its threads count, so what hashes, compresses and encrypts the pages as well, from this call on; the SSH
    client is a process of its own and does not. 0 is no bound, and while *hurry* says so there is none.
    """
    if not share:
        return list(memories)
    began, had = wall(), cpu()

    def hold_back() -> None:
        ahead = (cpu() - had) / share - (wall() - began)
        if ahead > 0 and not hurry():
            sleep(min(ahead, _LONGEST_SLEEP))

    return [_Paced(memory, hold_back) for memory in memories]


@contextlib.contextmanager
def beside(pids: Iterable[int]) -> Iterator[None]:
    """Have this thread, and those that it starts, run where no thread of the processes *pids* runs now.

    Shipping has more threads than a node may have processors that nobody needs; if they may run anywhere, they take
    turns with the job although one is idle. Where the job runs on all processors, so may they.
    """
    allowed = os.sched_getaffinity(0)
    left = set(allowed)
    for processor in _processors_of(pids):
        left.discard(processor)
        if not left:
            left = allowed
            break
    with contextlib.suppress(OSError):  # may be forbidden, or the processors taken away just now
        os.sched_setaffinity(0, left)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, allowed)


def _processors_of(pids: Iterable[int]) -> Iterator[int]:
    """Yield the processors that threads of *pids* run on, or wait for. Source: proc_pid_stat(5), fields 3 and 39."""
    for pid in pids:
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                fields = (task / "stat").read_text().rpartition(")")[2].split()
                if fields[0] == "R":
                    yield int(fields[36])
        except OSError:
            continue  # it has ended
