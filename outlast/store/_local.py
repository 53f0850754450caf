"""A store in a directory of this machine, or on a file system that is mounted here."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path

from outlast.errors import StoreRefused, StoreUnavailable
from outlast.store._backend import LARGEST_READ, Entry, Seen, unfinished_name

# The file system's server is away (NFS with "soft", FUSE); all other errors would come again.
_PASSING = frozenset(
    {
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENOTCONN,
        errno.ECONNABORTED,
        errno.ESTALE,
        errno.EAGAIN,
        errno.EINTR,
    }
)


class LocalBackend:
    """See `Backend`. A mounted file system that hangs makes the calls hang: there is no timeout here."""

    mtime_step = 0.01  # the kernel stamps files at its tick: 100 Hz at the slowest

    def __init__(self, root: Path) -> None:
        self._root = root
        self._clock = -1

    def create(self, name: str, chunks: Iterable[bytes]) -> int:
        """See `Backend.create`."""
        temporary = unfinished_name(name)
        with self._errors(f"writing {name}"):
            file = self._open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            size = 0
            for chunk in chunks:  # outside of _errors(): what it raises is not this store's
                with self._errors(f"writing {name}"):
                    _write(file, chunk)
                size += len(chunk)
            with self._errors(f"writing {name}"):
                os.fsync(file)
            try:
                with self._errors(f"writing {name}"):
                    # Unlike a rename, a link never takes the place of a file that is there.
                    self._path(name).hardlink_to(self._path(temporary))
            except FileNotFoundError as error:
                raise StoreRefused(f"{name}: somebody removed it while it was being written") from error
            return size
        finally:
            os.close(file)
            with self._errors(f"writing {name}"):
                self._path(temporary).unlink(missing_ok=True)
                _sync_directory(self._path(name).parent)

    def replace(self, name: str, data: bytes) -> None:
        """See `Backend.replace`."""
        temporary = unfinished_name(name)
        with self._errors(f"writing {name}"):
            file = self._open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                _write(file, data)
                os.fsync(file)
                self._path(temporary).rename(self._path(name))
            except OSError:
                self._path(temporary).unlink(missing_ok=True)
                raise
            finally:
                os.close(file)
            _sync_directory(self._path(name).parent)

    def append(self, name: str, data: bytes) -> None:
        """See `Backend.append`."""
        with self._errors(f"appending to {name}"):
            file = self._open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            try:
                _write(file, data)
                os.fsync(file)
            finally:
                os.close(file)

    def read(self, name: str) -> bytes:
        """See `Backend.read`."""
        with self._errors(f"reading {name}"), self._path(name).open("rb") as file:
            data = file.read(LARGEST_READ + 1)
        if len(data) > LARGEST_READ:
            raise StoreRefused(
                f"reading {name}: larger than {LARGEST_READ} bytes, which no file of this kind is"
            )
        return data

    def read_ranges(self, name: str, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """See `Backend.read_ranges`."""
        with self._errors(f"reading {name}"):
            file = self._path(name).open("rb", buffering=0)
        with file:
            for offset, length in ranges:
                with self._errors(f"reading {name}"):
                    data = os.pread(file.fileno(), length, offset)
                if len(data) < length:
                    raise EOFError(f"{name}: ends before byte {offset + length}")
                yield data

    def read_each(self, wanted: Sequence[tuple[str, int, int]]) -> Generator[bytes, None, None]:
        """See `Backend.read_each`."""
        for name, offset, length in wanted:
            yield from self.read_ranges(name, [(offset, length)])

    def entry(self, name: str) -> Entry | None:
        """See `Backend.entry`."""
        try:
            with self._errors(f"looking at {name}"):
                return _entry(self._path(name))
        except FileNotFoundError:
            return None

    def list(self, directory: str) -> list[Entry]:
        """See `Backend.list`."""
        entries = []
        try:
            with self._errors(f"listing {directory}"):
                for path in self._path(directory).iterdir():
                    with contextlib.suppress(FileNotFoundError):  # it went away since the listing began
                        entries.append(_entry(path))
        except FileNotFoundError:
            return []
        return sorted(entries, key=lambda entry: entry.name)

    def look(self, directories: Sequence[str], files: Sequence[str]) -> Seen:
        """See `Backend.look`."""
        read: dict[str, bytes | None] = {}
        for name in files:
            try:
                read[name] = self.read(name)
            except FileNotFoundError:
                read[name] = None
        return {name: self.list(name) for name in directories}, read

    def remove(self, name: str) -> bool:
        """See `Backend.remove`."""
        try:
            with self._errors(f"removing {name}"):
                self._path(name).unlink()
        except FileNotFoundError:
            return False
        return True

    def remove_directory(self, name: str) -> bool:
        """See `Backend.remove_directory`."""
        try:
            with self._errors(f"removing {name}"):
                self._path(name).rmdir()
        except FileNotFoundError:
            return False
        except StoreRefused as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        return True

    def rename(self, directory: str, to: str) -> bool:
        """See `Backend.rename`."""
        with self._errors(f"renaming {directory}"):
            self._make_directories(self._path(to).parent)
            try:
                self._path(directory).rename(self._path(to))
            except FileNotFoundError:
                return False
            _sync_directory(self._path(to).parent)
            _sync_directory(self._path(directory).parent)
        return True

    def touch(self, name: str, *, create: bool) -> bool:
        """See `Backend.touch`."""
        try:
            with self._errors(f"touching {name}"):
                flags = os.O_WRONLY | os.O_APPEND
                if create:
                    file = self._open(name, flags | os.O_CREAT)
                else:
                    file = os.open(self._path(name), flags | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    os.write(file, b"\n")
                finally:
                    os.close(file)
        except FileNotFoundError:
            return False
        return True

    def clock(self) -> float:
        """See `Backend.clock`."""
        with self._errors("asking for the time"):
            if self._clock < 0:
                name = unfinished_name("clock")
                self._clock = self._open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                self._path(name).unlink()
            os.pwrite(self._clock, b"\n", 0)
            return os.fstat(self._clock).st_mtime

    def free(self) -> int | None:
        """See `Backend.free`."""
        with self._errors("asking for free space"):
            return shutil.disk_usage(self._root).free

    def close(self) -> None:
        """See `Backend.close`."""
        if self._clock >= 0:
            os.close(self._clock)
            self._clock = -1

    def _path(self, name: str) -> Path:
        return self._root / name

    def _open(self, name: str, flags: int) -> int:
        """Open *name* for its owner alone: an image holds a job's memory. Makes missing directories."""
        path = self._path(name)
        for _ in range(9):  # somebody may remove an empty directory between the two steps
            with contextlib.suppress(FileNotFoundError):
                return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            self._make_directories(path.parent)
        raise StoreUnavailable(f"{path.parent}: goes away as often as it is made")

    def _make_directories(self, directory: Path) -> None:
        for path in reversed([directory, *directory.parents]):
            if path.is_relative_to(self._root) and path != self._root:
                with contextlib.suppress(FileExistsError):
                    path.mkdir(mode=0o700)
                    _sync_directory(path.parent)

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Tell apart what is worth another try; that a file is there, or not, is the caller's to judge."""
        try:
            yield
        except FileExistsError:
            raise
        except OSError as error:
            if not self._root.is_dir():
                # Else an unmounted store would look like an empty one, and a job would start afresh.
                raise StoreRefused(
                    f"{self._root}: no such directory", hint="mount the store or create the directory"
                ) from error
            if isinstance(error, FileNotFoundError):
                raise
            if error.errno in _PASSING:
                raise StoreUnavailable(f"{doing} in {self._root}: {error.strerror}") from error
            raise StoreRefused(
                f"{doing} in {self._root}: {error.strerror}", hint="look at free space and permissions there"
            ) from error


def _entry(path: Path) -> Entry:
    status = path.lstat()
    return Entry(path.name, status.st_size, status.st_mtime, stat.S_ISDIR(status.st_mode))


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _sync_directory(directory: Path) -> None:
    try:
        file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # somebody has already taken out again what was put in
    try:
        os.fsync(file)
    finally:
        os.close(file)
