"""The job's guard: a process that stops the job when this manager has not said in time that it may run."""

from __future__ import annotations

import errno
import logging
import os
import struct
import subprocess
import threading
import time
from pathlib import Path

from criu_backend import Capsule
from outlast.errors import OutlastError

log = logging.getLogger(__name__)

PROGRAM = Path("/usr/libexec/outlast/outlast-guard")

_READY_SECONDS = 2.0
_FOREVER = 2**62  # nanoseconds


def boottime() -> float:
    """Return the clock that leases are measured with: it goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Guard:
    """The manager's end of one guard; see criu_backend/native/guard.c."""

    def __init__(self, directory: Path, capsule: Capsule, peer: int, program: Path = PROGRAM) -> None:
        """Prepare for *capsule*, whose state is in *directory* and whose stand-in is the process *peer*, or 0."""
        self._directory = directory
        self._capsule = capsule
        self._peer = peer
        self._program = program
        self._lock = threading.Lock()  # two threads that find no guard would start two

    def allow(self, until: float | None) -> None:
        """Let the job run until *until* (`boottime`), or with None for as long as it likes.

        A guard that an earlier manager of the job started is used on; one that is not there is started.

        Raises:
            OutlastError: there is no guard, and none could be started.
        """
        stamp = _FOREVER if until is None else max(1, int(until * 1e9))
        with self._lock:
            if not self._feed(stamp) and self._capsule.alive:
                self._start()
                if not self._feed(stamp) and self._capsule.alive:
                    raise OutlastError(f"{self._program}: ended at once; its log is the manager's")

    @property
    def frozen(self) -> bool:
        """Whether the job stands still."""
        return is_frozen(self._directory)

    def _feed(self, stamp: int) -> bool:
        try:
            fifo = os.open(self._directory / "guard", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENXIO):  # none yet; none any more
                return False
            raise OutlastError(f"{self._directory}/guard: {error.strerror}") from None
        try:
            os.write(fifo, struct.pack("=q", stamp))
        except BlockingIOError:
            log.warning("the guard does not read")
        finally:
            os.close(fifo)
        return True

    def _start(self) -> None:
        (self._directory / "guard").unlink(missing_ok=True)
        facts = (self._capsule.init_pid, self._capsule.init_start, self._peer)
        try:
            # Whatever ends or stops the manager must not reach it.
            subprocess.Popen(
                [self._program, *map(str, facts), self._directory],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd="/",
                env={},
                start_new_session=True,
            )
        except OSError as error:
            raise OutlastError(f"{self._program}: {error.strerror}") from None
        deadline = time.monotonic() + _READY_SECONDS
        while not (self._directory / "guard").exists() and time.monotonic() < deadline:
            time.sleep(0.01)


def is_frozen(directory: Path) -> bool:
    """Whether the job whose state is in *directory* stands still, since its lease could not be renewed."""
    return (directory / "frozen").exists()
