"""What a store needs of the place where it keeps its files, be that a directory or an SFTP server."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

# Every file begins its life under a name with this ending, beside its final place.
UNFINISHED = ".tmp"


@dataclass(frozen=True)
class Entry:
    """A file or directory, as a listing shows it. *mtime*: seconds, by the clock of the store's machine."""

    name: str
    size: int
    mtime: float
    is_directory: bool


# By name: what is in each directory, and the content of each file, None where there is none.
Seen: TypeAlias = tuple[dict[str, list[Entry]], dict[str, bytes | None]]


class Backend(Protocol):
    """A tree of files below one directory. tests/store/test_backends.py holds each one to this contract.

    Names are relative, with "/" between their parts; the caller has checked them. Directories appear as
    they are needed, below a top directory that must exist. Not shared between threads.

    Every call may raise StoreUnavailable (no answer: the same call may work later; whether it took
    effect is then unknown) and StoreRefused (the answer was no, and would be again).
    """

    mtime_step: float  # seconds: how coarse the times of this backend are

    def create(self, name: str, chunks: Iterable[bytes]) -> int:
        """Keep *chunks*, one after the other, as the new file *name*; return its size in bytes.

        Whole or not at all, and on the server's disk before it returns. The name is a compare-and-set: of
        two that create it one wins. What *chunks* itself raises goes through, and nothing is kept.

        Raises:
            FileExistsError: there is such a file; it is untouched.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Make *data* the whole content of the file *name*, there before or not; readers see old or new."""

    def append(self, name: str, data: bytes) -> None:
        """Add *data* at the end of the file *name*. A crash may leave a part of it."""

    def read(self, name: str) -> bytes:
        """Return the file's content, at most `LARGEST_READ` bytes. Raises FileNotFoundError."""

    def read_ranges(self, name: str, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """Yield for each (offset, length) its bytes, in order; fetches ahead within a fixed bound of memory.

        Raises:
            FileNotFoundError: no such file.
            EOFError: a range goes beyond the file's end.
        """

    def read_each(self, wanted: Sequence[tuple[str, int, int]]) -> Generator[bytes, None, None]:
        """Yield for each (name, offset, length) its bytes, in order: small parts of many files.

        In as few round trips as for one file, for every hundred. Raises as `read_ranges` does.
        """

    def entry(self, name: str) -> Entry | None:
        """Return how the file or directory *name* stands now, or None where there is none."""

    def list(self, directory: str) -> list[Entry]:
        """Return what is in *directory*, sorted by name; unfinished files too. Empty if it is not there."""

    def look(self, directories: Sequence[str], files: Sequence[str]) -> Seen:
        """Return by name what `list` and `read` would, None for a file that is not there; all in two round trips.

        What is too large for that may be left out, and what is refused.
        """

    def remove(self, name: str) -> bool:
        """Remove the file *name*; True if it was there. Of two that remove it, one gets True."""

    def remove_directory(self, name: str) -> bool:
        """Remove the directory *name* if it is empty; True if it is gone by this call."""

    def rename(self, directory: str, to: str) -> bool:
        """Give *directory* the free name *to*; True if it was there."""

    def touch(self, name: str, *, create: bool) -> bool:
        """Add a byte to the file, and so set its mtime by the clock of the store's machine; False if it is not there.

        One round trip from the second time on. With *create*, an absent file is made, empty.
        """

    def clock(self) -> float:
        """Return the time by the clock that stamps mtimes, in seconds, rounded down to `mtime_step`."""

    def free(self) -> int | None:
        """Return how many bytes there is room for, or None where the server cannot say."""

    def close(self) -> None:
        """Let go of connections and files; the next call opens them again."""


LARGEST_READ = 256 << 20


def unfinished_name(name: str) -> str:
    """Return a name of nobody else's for *name* while it is being written, in the same directory."""
    return f"{name}.{uuid.uuid4().hex[:12]}{UNFINISHED}"
