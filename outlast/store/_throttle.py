"""The bandwidth that uploads of one node may take: all its managers share it, pack by pack."""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from outlast.store._backend import Backend

# Where the node's managers write down until when the line is taken.
LEDGER = Path("/run/outlast/bandwidth")
# What is sent at once; after it, others have their turn.
_SHARE = 1 << 18


class Throttled:
    """A `Backend` whose `create` sends so many bytes a second at most, together with all others of its ledger."""

    def __init__(
        self,
        backend: Backend,
        rate: int,
        ledger: Path = LEDGER,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """*rate* is in bytes a second; *ledger* is a file that all who share it write to."""
        self._backend = backend
        self._rate = rate
        self._ledger = ledger
        self._clock = clock
        self._sleep = sleep

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the backend has
        return getattr(self._backend, name)

    def create(self, name: str, chunks: Iterable[bytes]) -> int:
        """See `Backend.create`."""
        return self._backend.create(name, self._paced(chunks))

    def _paced(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            for start in range(0, len(chunk), _SHARE):
                part = chunk[start : start + _SHARE]
                self._sleep(self._book(len(part)))
                yield part

    def _book(self, size: int) -> float:
        """Take the line for *size* bytes after all that was booked before; return in how many seconds it is free."""
        self._ledger.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(self._ledger, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            now = self._clock()
            data = os.pread(fd, 8, 0)
            free = struct.unpack("=d", data)[0] if len(data) == 8 else now
            # A time far ahead is of before the machine's last start, where the clock begins anew.
            begin = now if not now <= free <= now + 3600 else free
            os.pwrite(fd, struct.pack("=d", begin + size / self._rate), 0)
            return float(max(0.0, begin - now))
        finally:
            os.close(fd)
