"""A store on an SFTP server."""

from __future__ import annotations

import contextlib
import stat
import struct
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from outlast.errors import StoreRefused, StoreUnavailable
from outlast.store import _wire
from outlast.store._backend import LARGEST_READ, Entry, Seen, unfinished_name
from outlast.store._foresight import entry_of, look
from outlast.store._lanes import WINDOW, Helpers, Shared, connections
from outlast.store._sftp import Server, SshLink
from outlast.store._wire import Link, Lost, Status, Wire

# statvfs@openssh.com: f_bavail is the fifth of eleven numbers, f_frsize the second.
_STATVFS = struct.Struct(">11Q")
_AT_ONCE = 100  # files: a server may have so many open for one session, and more is no faster
_NO_SPACE = 1 << 20  # bytes: with less than this left, a failed write is a full disk


class SftpBackend:
    """See `Backend`. One connection, made by the first call, and again by the first one after it broke.

    A new file is written under an unfinished name and published with SFTP's plain RENAME, which OpenSSH
    carries out as link() and unlink(): it fails where the new name exists, so it is the compare-and-set.
    """

    mtime_step = 1.0  # version 3 of SFTP knows whole seconds only

    def __init__(self, server: Server, root: str, connect: Callable[[Server], Link] = SshLink) -> None:
        self.server = server
        self.root = root
        self._connect = connect
        self._link: Link | None = None
        self._wire_: Wire | None = None
        self._held: dict[str, bytes] = {}  # names that touch() has open, and their handles
        self._clock: bytes | None = None
        self._helpers: Helpers | None = None
        self._round_trip = 0.0  # seconds

    def create(self, name: str, chunks: Iterable[bytes]) -> int:
        """See `Backend.create`."""
        temporary = unfinished_name(name)
        with self._session(f"writing {name}") as wire:
            try:
                size = self._write(wire, temporary, chunks)
                self._publish(wire, temporary, name)
            except BaseException:
                self._discard(wire, temporary)
                raise
            return size

    def replace(self, name: str, data: bytes) -> None:
        """See `Backend.replace`. A server without posix-rename has neither file for a moment."""
        temporary = unfinished_name(name)
        with self._session(f"writing {name}") as wire:
            try:
                self._write(wire, temporary, [data])
                if b"posix-rename@openssh.com" in wire.extensions:
                    names = ("posix-rename@openssh.com", self._path(temporary), self._path(name))
                    _wire.check(*wire.call(_wire.EXTENDED, b"".join(map(_wire.text, names))))
                else:
                    self._remove(wire, name)
                    self._publish(wire, temporary, name)
            except BaseException:
                self._discard(wire, temporary)
                raise

    def append(self, name: str, data: bytes) -> None:
        """See `Backend.append`."""
        with self._session(f"appending to {name}") as wire:
            handle = self._open(wire, name, _wire.FOR_WRITING | _wire.CREATING | _wire.APPENDING)
            try:
                wire.write(handle, [data])
            finally:
                if not wire.lost:
                    wire.close(handle)

    def read(self, name: str) -> bytes:
        """See `Backend.read`."""
        with self._session(f"reading {name}") as wire:
            handle = wire.open(self._path(name), _wire.FOR_READING)
            try:
                size = _wire.attributes(*wire.call(_wire.FSTAT, _wire.block(handle))).size
                if size > LARGEST_READ:
                    raise StoreRefused(f"reading {name}: {size} bytes is more than any file of this kind has")
                return b"".join(wire.read(handle, [(0, size)]))
            except EOFError as error:
                raise StoreUnavailable(f"{name}: changed while it was being read") from error
            finally:
                if not wire.lost:
                    wire.close(handle)

    def read_ranges(self, name: str, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """See `Backend.read_ranges`."""
        with self._session(f"reading {name}") as wire:
            handle = wire.open(self._path(name), _wire.FOR_READING)
            try:
                with self._shared(name, _wire.FOR_READING) as shared:
                    yield from wire.read(handle, ranges, shared.more)
            finally:
                if not wire.lost:
                    wire.close(handle)

    def read_each(self, wanted: Sequence[tuple[str, int, int]]) -> Generator[bytes, None, None]:
        """See `Backend.read_each`."""
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            with self._session(f"reading {some[0][0]} and others") as wire:
                yield from wire.read_each(
                    [(self._path(name), offset, length) for name, offset, length in some]
                )

    def entry(self, name: str) -> Entry | None:
        """See `Backend.entry`."""
        try:
            with self._session(f"looking at {name}") as wire:
                return entry_of(name.rpartition("/")[2], wire.lstat(self._path(name)))
        except FileNotFoundError:
            return None

    def list(self, directory: str) -> list[Entry]:
        """See `Backend.list`."""
        try:
            with self._session(f"listing {directory}") as wire:
                entries = [entry_of(name, found) for name, found in wire.list(self._path(directory))]
        except FileNotFoundError:
            return []
        return sorted(entries, key=lambda entry: entry.name)

    def look(self, directories: Sequence[str], files: Sequence[str]) -> Seen:
        """See `Backend.look`."""
        with self._session("looking around") as wire:
            return look(wire, self._path, directories, files)

    def remove(self, name: str) -> bool:
        """See `Backend.remove`."""
        with self._session(f"removing {name}") as wire:
            handle = self._held.pop(name, None)
            if handle is not None:
                wire.close(handle)
            return self._remove(wire, name)

    def remove_directory(self, name: str) -> bool:
        """See `Backend.remove_directory`."""
        with self._session(f"removing {name}") as wire:
            try:
                _wire.check(*wire.call(_wire.RMDIR, _wire.text(self._path(name))))
            except Status as status:
                # Version 3 has no word for "not empty", and by now it may be empty.
                if status.code in (_wire.NO_SUCH_FILE, _wire.FAILURE):
                    return False
                raise
            return True

    def rename(self, directory: str, to: str) -> bool:
        """See `Backend.rename`."""
        if self.entry(directory) is None:
            return False
        with self._session(f"renaming {directory}") as wire:
            self._make_directories(wire, to.rpartition("/")[0])
            _wire.check(
                *wire.call(_wire.RENAME, _wire.text(self._path(directory)) + _wire.text(self._path(to)))
            )
        return True

    def touch(self, name: str, *, create: bool) -> bool:
        """See `Backend.touch`. The file stays open: a byte added stamps it with the server's time."""
        try:
            with self._session(f"touching {name}") as wire:
                if name not in self._held:
                    if create:
                        handle = self._open(wire, name, _wire.FOR_WRITING | _wire.CREATING | _wire.APPENDING)
                    else:
                        handle = wire.open(self._path(name), _wire.FOR_WRITING | _wire.APPENDING)
                    self._held[name] = handle
                if self._is_stamped(wire, name):
                    return True
                wire.close(self._held.pop(name))
        except FileNotFoundError:
            return False
        return self.touch(name, create=True) if create else False

    def clock(self) -> float:
        """See `Backend.clock`."""
        with self._session("asking for the time") as wire:
            if self._clock is None:
                name = unfinished_name("clock")
                self._clock = self._open(wire, name, _wire.FOR_WRITING | _wire.CREATING | _wire.EXCLUSIVE)
                self._remove(wire, name)  # it lives on as long as it is open, and leaves nothing behind
            handle = _wire.block(self._clock)
            stamp = (_wire.WRITE, handle + _ONE_BYTE)
            with contextlib.closing(wire.pipeline([stamp, (_wire.FSTAT, handle)])) as replies:
                _wire.check(*next(replies))
                return float(_wire.attributes(*next(replies)).mtime)

    def free(self) -> int | None:
        """See `Backend.free`."""
        with self._session("asking for free space"):
            return self._free()

    def close(self) -> None:
        """See `Backend.close`."""
        self._held.clear()
        self._clock = None
        self._wire_ = None
        if self._helpers is not None:
            self._helpers.close()
            self._helpers = None
        if self._link is not None:
            self._link.close()
            self._link = None

    def _is_stamped(self, wire: Wire, name: str) -> bool:
        """Stamp the file that *name* has open; False if it no longer has that name. One round trip."""
        requests = [
            (_wire.WRITE, _wire.block(self._held[name]) + _ONE_BYTE),
            (_wire.LSTAT, _wire.text(self._path(name))),
        ]
        with contextlib.closing(wire.pipeline(requests)) as replies:
            _wire.check(*next(replies))
            try:
                _wire.attributes(*next(replies))
            except Status as status:
                if status.code == _wire.NO_SUCH_FILE:
                    return False
                raise
        return True

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _open(self, wire: Wire, name: str, flags: int) -> bytes:
        """Open *name* for writing; makes directories that are missing."""
        for _ in range(9):  # somebody may remove an empty directory between the two steps
            try:
                return wire.open(self._path(name), flags)
            except Status as status:
                if status.code != _wire.NO_SUCH_FILE:
                    raise
                self._make_directories(wire, name.rpartition("/")[0])
        raise StoreUnavailable(f"{self.server}: {name}: its directory goes away as often as it is made")

    def _write(self, wire: Wire, name: str, chunks: Iterable[bytes]) -> int:
        """Write the new file *name* whole; return its size."""
        handle = self._open(wire, name, _wire.FOR_WRITING | _wire.CREATING | _wire.EXCLUSIVE)
        try:
            with self._shared(name, _wire.FOR_WRITING) as shared:
                return wire.write(handle, chunks, shared.more)
        except Status as status:
            # Turned into words here, before the caller removes the file and there is room again.
            raise self._refused(f"writing {name}", status) from status
        finally:
            if not wire.lost:
                wire.close(handle)

    @contextlib.contextmanager
    def _shared(self, name: str, flags: int) -> Iterator[Shared]:
        """Let other connections help with a long transfer, if the server is far away."""
        if self._helpers is None:
            self._helpers = Helpers(self._connected)
        reading = flags == _wire.FOR_READING
        window = SshLink.window if reading and isinstance(self._link, SshLink) else WINDOW
        count = connections(self._round_trip, window) - 1
        with Shared(self._helpers, count, self._path(name), flags) as shared:
            yield shared
        if shared.was_short:  # as the last file of a checkpoint is; the server is to have them for others
            self._helpers.close()
            self._helpers = None

    def _make_directories(self, wire: Wire, directory: str) -> None:
        parts = directory.split("/") if directory else []
        attributes = struct.pack(">II", 0x4, 0o700)  # permissions: an image holds a job's memory
        for count in range(1, len(parts) + 1):
            path = self._path("/".join(parts[:count]))
            try:
                _wire.check(*wire.call(_wire.MKDIR, _wire.text(path) + attributes))
            except Status as status:
                if status.code == _wire.NO_SUCH_FILE:
                    raise self._no_root() from status
                # Version 3 has no word for "is there already".
                if not stat.S_ISDIR(_mode(wire, path)):
                    raise

    def _publish(self, wire: Wire, temporary: str, name: str) -> None:
        """Give the finished file its name. Raises FileExistsError where that is taken."""
        try:
            _wire.check(
                *wire.call(_wire.RENAME, _wire.text(self._path(temporary)) + _wire.text(self._path(name)))
            )
        except Status as status:
            if status.code == _wire.FAILURE and _mode(wire, self._path(name)):
                raise FileExistsError(f"{name}: exists") from status
            if status.code == _wire.NO_SUCH_FILE:
                raise StoreRefused(f"{name}: somebody removed it while it was being written") from status
            raise

    def _remove(self, wire: Wire, name: str) -> bool:
        try:
            _wire.check(*wire.call(_wire.REMOVE, _wire.text(self._path(name))))
        except Status as status:
            if status.code == _wire.NO_SUCH_FILE:
                return False
            raise
        return True

    def _discard(self, wire: Wire, name: str) -> None:
        """Remove an unfinished file after an error, if that can be done; else forget() finds it later."""
        if not wire.lost:
            with contextlib.suppress(Status, Lost):
                self._remove(wire, name)

    def _wire(self) -> Wire:
        """Return a session that works; connects if there is none."""
        if self._wire_ is None or self._wire_.lost or self._link is None or not self._link.is_open():
            self.close()
            self._link, wire = self._connected()
            begin = time.monotonic()
            if not stat.S_ISDIR(_mode(wire, self.root + "/.")):
                self.close()
                raise self._no_root()
            self._round_trip = time.monotonic() - begin
            if connections(self._round_trip) > 1:  # far away, or only busy?
                begin = time.monotonic()
                wire.lstat(self.root + "/.")
                self._round_trip = min(self._round_trip, time.monotonic() - begin)
            self._wire_ = wire
        return self._wire_

    def _connected(self) -> tuple[Link, Wire]:
        link = self._connect(self.server)
        try:
            return link, Wire(link)
        except BaseException:
            link.close()
            raise

    def _no_root(self) -> StoreRefused:
        return StoreRefused(
            f"{self.server}: {self.root or '/'}: no such directory, as {self.server.user} sees it",
            hint="create it there, or correct the url of the [store]",
        )

    @contextlib.contextmanager
    def _session(self, doing: str) -> Iterator[Wire]:
        """Give the session; turn what goes wrong in it into errors that tell who can put it right."""
        try:
            yield self._wire()
        except (Lost, struct.error) as error:
            self.close()
            raise StoreUnavailable(f"{self.server}: {doing}: {error}") from error
        except StoreUnavailable:
            self.close()
            raise
        except Status as status:
            if status.code == _wire.NO_SUCH_FILE:
                raise FileNotFoundError(f"{doing}: no such file") from status
            if status.code == _wire.CONNECTION_LOST:
                self.close()
                raise StoreUnavailable(f"{self.server}: {doing}: {status}") from status
            raise self._refused(doing, status) from status

    def _refused(self, doing: str, status: Status) -> StoreRefused:
        if status.code == _wire.PERMISSION_DENIED:
            return StoreRefused(
                f"{self.server}: {doing}: permission denied",
                hint=f"{self.root or '/'} there must be writable for {self.server.user}",
            )
        # OpenSSH has one answer, "Failure", for a full disk and all that version 3 has no code for.
        free = self._free()
        if free is not None and free < _NO_SPACE:
            return StoreRefused(
                f"{self.server}: {doing}: no space, {free} bytes left", hint="make room on the server"
            )
        return StoreRefused(
            f"{self.server}: {doing}: the server says {str(status)!r}",
            hint="look at quota, limits and read-only file systems there, and into its log",
        )

    def _free(self) -> int | None:
        """Return the bytes that are left on the server, or None where it cannot say."""
        wire = self._wire_
        if wire is None or wire.lost or b"statvfs@openssh.com" not in wire.extensions:
            return None
        with contextlib.suppress(Status, Lost, struct.error):
            numbers = _STATVFS.unpack_from(wire.extended("statvfs@openssh.com", self.root + "/."))
            return int(numbers[1] * numbers[4])
        return None


_ONE_BYTE = struct.pack(">QI", 0, 1) + b"\n"  # the rest of a WRITE of one byte at a file's start


def _mode(wire: Wire, path: str) -> int:
    """Return the st_mode of *path*; 0 where there is none."""
    with contextlib.suppress(Status):
        return wire.lstat(path).mode
    return 0
