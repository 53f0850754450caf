"""Twins: the copy-on-write copies of a job's processes that a forked dump leaves behind, until they are read.

native/twin makes them. Each is a child of the capsule's init, parked, and ends by itself when the counter in
its memory has not been counted up for a minute: so none outlives its reader for long.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from criu_backend._capsule import Capsule, _children, _inner_pid
from criu_backend._memory import RunIndex, read_exactly
from criu_backend._pagemap import PAGE

_NAME = "outlast-twin"  # native/twin/code.S
_BEAT_SECONDS = 5.0
_END_SECONDS = 1.0

# Source: linux/fs.h, PAGEMAP_SCAN and struct pm_scan_arg.
_PAGEMAP_SCAN = 0xC0606610
_SCAN = struct.Struct("<12Q")
_WALK_END = struct.Struct("<Q")
_WALK_END_AT = 32
_REGIONS = 4096
_IS_FILE, _IS_PRESENT, _IS_SWAPPED, _IS_PFNZERO = 4, 8, 16, 32
_IS_GUARD = 256
_TASK_SIZE = 0x7FFFFFFFF000  # x86-64 with page tables of four levels: what CRIU looks at


class Twin:
    """The twin of the process that the images call *pid*; *here* is its own PID as this process sees it."""

    def __init__(self, pid: int, here: int, beat: int, copy_seconds: float) -> None:
        self.pid = pid
        self.here = here
        self.copy_seconds = copy_seconds
        self._beat_at = beat
        self._beats = 0
        self._ranges: list[tuple[int, int]] | None = None
        self._taken: tuple[RunIndex, memoryview] | None = None
        self._smaps: str | None = None
        self._guards: bool | None = None
        self._pidfd = os.pidfd_open(here)
        try:
            self._mem = os.open(f"/proc/{here}/mem", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            os.close(self._pidfd)
            raise

    def readinto(self, vaddr: int, buffer: memoryview) -> None:
        """Fill *buffer* from the twin's memory at *vaddr*. Raises OSError when the twin has ended."""
        if (taken := self._taken) is not None:
            index, memory = taken
            at = index.offset(self.pid, vaddr, len(buffer))
            buffer[:] = memory[at : at + len(buffer)]
        else:
            read_exactly(self._mem, buffer, vaddr)

    def pages(self) -> list[tuple[int, int]]:
        """Return (start, end) of all the private memory that the twin holds, in order of address.

        As CRIU has it: what is in memory or swapped out, and neither a file's own page nor the zero page.
        """
        if self._ranges is None:
            pagemap = os.open(f"/proc/{self.here}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            try:
                areas = private_mappings(self.here)
                self._ranges = [found for start, end in areas for found in _scan(pagemap, start, end)]
            finally:
                os.close(pagemap)
        return self._ranges

    def size(self) -> int:
        """Return how much private memory the twin holds, in bytes."""
        return sum(end - start for start, end in self.pages())

    def take(self, memory: memoryview) -> None:
        """Read all that is known of it, its memory into *memory* of that size, and end it.

        What its process writes to from now on is not copied any more. Raises OSError when the twin has ended before.
        """
        index = RunIndex([(self.pid, start, (end - start) // PAGE) for start, end in self.pages()])
        self._taken = index, memory  # from here on it is forgotten by a give_up() in another thread
        at = 0
        for start, end in self.pages():
            read_exactly(self._mem, memory[at : at + end - start], start)
            at += end - start
        self._smaps, self._guards = self.smaps(), self.has_guards()
        # It frees its memory itself, 3 ms for 54 MB, and not where it last ran, which is where its process does.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(self.here, os.sched_getaffinity(0))
        self.kill()

    def await_end(self) -> bool:
        """Wait until the process is gone, which has been killed; return whether it is."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(_END_SECONDS * 1000))

    def smaps(self) -> str:
        """Return its mappings and their flags: proc_pid_smaps(5)."""
        return self._smaps if self._smaps is not None else Path(f"/proc/{self.here}/smaps").read_text()

    def has_guards(self) -> bool:
        """Return whether some of its memory is guarded (MADV_GUARD_INSTALL)."""
        if self._guards is not None:
            return self._guards
        pagemap = os.open(f"/proc/{self.here}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return any(True for _ in _scan(pagemap, 0, _TASK_SIZE, guards=True))
        finally:
            os.close(pagemap)

    def beat(self) -> None:
        """Keep the twin alive for another minute. Raises OSError when it has ended."""
        self._beats += 1
        os.pwrite(self._mem, struct.pack("<Q", self._beats), self._beat_at)

    def kill(self) -> None:
        """End the process; what was not taken of its memory cannot be read any more."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def give_up(self) -> None:
        """The job needs the memory: end the process, and forget what was taken."""
        self._taken = None
        self.kill()

    def end(self) -> None:
        """End the twin; what it held is gone."""
        self.give_up()
        os.close(self._pidfd)
        os.close(self._mem)


class Keeper:
    """Keeps *twins* alive until it is closed, and ends them then, or as soon as *must_end* says so."""

    def __init__(self, twins: Sequence[Twin], must_end: Callable[[], bool], seconds: float = 0.1) -> None:
        self._twins = list(twins)
        self._must_end = must_end
        self._seconds = seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="twins", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the twins."""
        self._closed.set()
        self._thread.join()
        for twin in self._twins:
            twin.end()
        self._twins.clear()

    def _run(self) -> None:
        left = _BEAT_SECONDS
        while not self._closed.wait(self._seconds):
            left -= self._seconds
            if self._must_end():
                for twin in self._twins:
                    twin.give_up()
                return
            if left <= 0:
                left = _BEAT_SECONDS
                for twin in self._twins:
                    with contextlib.suppress(OSError):
                        twin.beat()


def read_twins(capsule: Capsule, images: Path) -> tuple[list[Twin], list[int], float]:
    """Return the twins that a dump left, the PIDs of processes without one, and the seconds of the pause.

    Args:
        capsule: that of the tree.
        images: what was dumped into; PIDs are those in it.

    Raises:
        OSError: a twin has ended already.
    """
    here = {_inner_pid(pid): pid for pid in _children(capsule.init_pid)}
    found: list[Twin] = []
    without = []
    pause = 0.0
    try:
        for line in (images / "twins").read_text().splitlines():
            if " " not in line:
                pause = int(line) / 1e6
                continue
            pid, twin, beat, usecs = line.split()
            if twin == "0":
                without.append(int(pid))
            elif int(twin) not in here:
                raise ProcessLookupError(f"the twin of process {pid} has ended")
            else:
                found.append(Twin(int(pid), here[int(twin)], int(beat, 16), int(usecs) / 1e6))
    except BaseException:
        for one in found:
            one.end()
        raise
    return found, without, pause


def end_twins(capsule: Capsule) -> int:
    """End every twin in *capsule*, whoever left it; return how many there were."""
    count = 0
    for pid in _children(capsule.init_pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().rstrip("\n") == _NAME:
                os.kill(pid, signal.SIGKILL)
                count += 1
    return count


def private_mappings(pid: int) -> list[tuple[int, int]]:
    """Return (start, end) of the private mappings of process *pid* but for the kernel's own, in order.

    Source: proc_pid_maps(5).
    """
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, access, _, _, _, *rest = line.split(None, 5)
        name = rest[0] if rest else ""
        if access[3] == "p" and not name.startswith(("[vdso]", "[vvar", "[vsyscall]")):
            start, _, end = addresses.partition("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def _scan(pagemap: int, start: int, end: int, *, guards: bool = False) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the pages between *start* and *end*, or of the guard regions."""
    regions = (ctypes.c_uint64 * (3 * _REGIONS))()
    inverted = _IS_PFNZERO | _IS_FILE
    present = _IS_PRESENT | _IS_SWAPPED
    question = (0, _IS_GUARD, 0, _IS_GUARD) if guards else (inverted, inverted, present, present | _IS_GUARD)
    at = start
    while at < end:
        argument = bytearray(
            _SCAN.pack(
                *(_SCAN.size, 0, at, end, 0, ctypes.addressof(regions), _REGIONS, 0),
                *question,
            )
        )
        try:
            count = fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)
        except OSError as error:
            if error.errno != errno.EINVAL or not question[3] & _IS_GUARD:
                raise
            # Linux before 6.15 knows of no guard regions, or tells nobody, and so not CRIU either.
            if guards:
                return
            question = (*question[:3], present)
            continue
        for i in range(count):
            if guards or not regions[3 * i + 2] & _IS_GUARD:
                yield regions[3 * i], regions[3 * i + 1]
        (at,) = _WALK_END.unpack_from(argument, _WALK_END_AT)
