"""Small files and directories looked at all together, in two round trips, for whoever reads them one by one."""

from __future__ import annotations

import contextlib
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from outlast.store import _wire
from outlast.store._backend import Backend, Entry, Seen
from outlast.store._wire import Attributes, Request, Status, Wire

# Bytes of a file, and hundreds of names of a directory: what has more of them is read in its turn.
_LARGEST = 32 << 10
_HUNDREDS = 4
# What changes nothing.
_READING = frozenset({"read_ranges", "read_each", "entry", "clock", "look", "mtime_step"})


class Foresight:
    """A `Backend` that for a while gives what it saw when that began, so that it need not ask again."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._seen: Seen = ({}, {})

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the backend has
        if name not in _READING:
            self._seen = ({}, {})
        return getattr(self._backend, name)

    @contextlib.contextmanager
    def foreseeing(self, directories: Sequence[str], files: Sequence[str]) -> Iterator[None]:
        """Look at all of these now; within this, each is read once as it was, unless something is changed here."""
        self._seen = self._backend.look(directories, files)
        try:
            yield
        finally:
            self._seen = ({}, {})

    def read(self, name: str) -> bytes:
        """See `Backend.read`."""
        if name not in self._seen[1]:
            return self._backend.read(name)
        data = self._seen[1].pop(name)
        if data is None:
            raise FileNotFoundError(f"reading {name}: no such file")
        return data

    def list(self, directory: str) -> list[Entry]:
        """See `Backend.list`."""
        found = self._seen[0].pop(directory, None)
        return self._backend.list(directory) if found is None else found


def look(wire: Wire, path: Callable[[str], str], directories: Sequence[str], files: Sequence[str]) -> Seen:
    """See `Backend.look`; *path* makes names the server's. What cannot be had in two round trips is left out."""
    opening = [(_wire.OPENDIR, _wire.text(path(name))) for name in directories]
    reading = struct.pack(">II", _wire.FOR_READING, 0)
    opening += [(_wire.OPEN, _wire.text(path(name)) + reading) for name in files]
    listed: dict[str, list[Entry]] = {}
    read: dict[str, bytes | None] = {}
    handles: list[tuple[str, bool, bytes]] = []
    with contextlib.closing(wire.pipeline(opening)) as replies:
        for number, reply in enumerate(replies):
            is_directory = number < len(directories)
            name = directories[number] if is_directory else files[number - len(directories)]
            try:
                handles.append((name, is_directory, _wire.block(_wire.handle_of(*reply))))
            except Status as status:
                if status.code == _wire.NO_SUCH_FILE:
                    listed.update({name: []} if is_directory else {})
                    read.update({} if is_directory else {name: None})
    requests = [request for _, is_directory, handle in handles for request in _asked(handle, is_directory)]
    with contextlib.closing(wire.pipeline(requests)) as replies:
        for name, is_directory, _ in handles:
            if is_directory:
                answers = [_wire.names_of(*next(replies)) for _ in range(_HUNDREDS)]
                if answers[-1] is None:  # that was the end
                    listed[name] = sorted(
                        (entry_of(*found) for some in answers for found in some or ()),
                        key=lambda entry: entry.name,
                    )
            else:
                size = _wire.attributes(*next(replies)).size
                data = bytes(_wire.data_of(*next(replies)))
                if len(data) == size:
                    read[name] = data
            _wire.check(*next(replies))
    return listed, read


def _asked(handle: bytes, is_directory: bool) -> list[Request]:
    if is_directory:
        return [*[(_wire.READDIR, handle)] * _HUNDREDS, (_wire.CLOSE, handle)]
    return [
        (_wire.FSTAT, handle),
        (_wire.READ, handle + struct.pack(">QI", 0, _LARGEST)),
        (_wire.CLOSE, handle),
    ]


def entry_of(name: str, found: Attributes) -> Entry:
    """Return what a server tells of the file *name* as a listing shows it."""
    return Entry(name, found.size, float(found.mtime), stat.S_ISDIR(found.mode))
