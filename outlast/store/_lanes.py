"""More connections to a server far away, where one waits for windows, whatever the line could carry."""

from __future__ import annotations

import contextlib
import logging
import math
import struct
import threading
from collections.abc import Callable, Sequence

from outlast.errors import OutlastError
from outlast.store import _wire
from outlast.store._wire import Link, Lost, Status, Wire

_log = logging.getLogger(__name__)

# Either side of OpenSSH takes this many bytes of a session ahead: CHAN_SES_WINDOW_DEFAULT in its channels.h.
WINDOW = 2 << 20
_WANTED = 400e6  # bytes a second
_MOST = 4  # connections, the first one included
_WORTH = 4 << 20  # bytes in one file: with less there is nothing to gain


def connections(round_trip: float, window: int = WINDOW) -> int:
    """Return how many connections a long transfer is worth at a round trip of so many seconds.

    *window*: the bytes that the receiving side takes ahead.
    """
    return max(1, min(_MOST, math.ceil(_WANTED * round_trip / window)))


class Helpers:
    """Connections beside the first one; made while a long transfer goes on, and ended after a short one."""

    def __init__(self, connect: Callable[[], tuple[Link, Wire]]) -> None:
        """*connect* makes one. A thread calls it time after time: sshd limits how many begin at once."""
        self._connect = connect
        self._lock = threading.Lock()
        self._made: list[tuple[Link, Wire]] = []
        self._thread: threading.Thread | None = None
        self._closed = False

    def wires(self, count: int) -> list[Wire]:
        """Return those sessions that are ready of *count*; begins to make them, the first time."""
        if self._thread is None and count:
            self._thread = threading.Thread(target=self._make, args=(count,), name="lanes", daemon=True)
            self._thread.start()
        with self._lock:
            return [wire for _, wire in self._made[:count] if not wire.lost]

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            self._closed = True
            made, self._made = self._made, []
        for link, _ in made:
            link.close()

    def _make(self, count: int) -> None:
        for _ in range(count):
            try:
                link, wire = self._connect()
            except (OutlastError, Lost, Status, struct.error) as error:
                _log.info("no more connections than there are: %s", error)
                return
            with self._lock:
                if not self._closed:
                    self._made.append((link, wire))
                    continue
            link.close()
            return


class Shared:
    """One file that several sessions work at; see `Wire.write` and `Wire.read`. A context manager."""

    def __init__(self, helpers: Helpers, count: int, path: str, flags: int) -> None:
        """*count* of *helpers* are to work at the file *path*, which the first session has open already."""
        self._helpers = helpers
        self._count = count
        self._request = (_wire.OPEN, _wire.text(path) + struct.pack(">II", flags, 0))
        self._lanes: dict[Wire, bytes] = {}
        self._seen: set[Wire] = set()
        self._moved = 0

    def __enter__(self) -> Shared:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Lost):
            return  # the caller ends all of the connections
        left = [(wire, (_wire.CLOSE, _wire.block(handle))) for wire, handle in self._lanes.items()]
        with contextlib.closing(_wire.pipeline(one for one in left if not one[0].lost)) as replies:
            for reply in replies:
                _wire.check(*reply)

    @property
    def was_short(self) -> bool:
        """Whether so little was moved that helpers are not worth keeping."""
        return self._moved < _WORTH

    def more(self, moved: int) -> Sequence[tuple[Wire, bytes]]:
        """Return the sessions that help, and their handles of the file."""
        self._moved = moved
        if moved < _WORTH:
            return ()
        new = [wire for wire in self._helpers.wires(self._count) if wire not in self._seen]
        if new:
            self._seen.update(new)
            with contextlib.closing(_wire.pipeline((wire, self._request) for wire in new)) as replies:
                for wire, reply in zip(new, replies, strict=True):
                    with contextlib.suppress(Status):  # one that may not open the file is of no help
                        self._lanes[wire] = _wire.handle_of(*reply)
        return list(self._lanes.items())
