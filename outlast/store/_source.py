"""What a checkpoint is made of, as its writer sees it: pages of files, with their holes, and of memories."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from outlast.errors import OutlastError
from outlast.store._pages import PAGE, Spaces

_log = logging.getLogger(__name__)

_CHUNK_PAGES = 1024  # 4 MiB are read and hashed at a time


class Memory(Protocol):
    """The pages of one of CRIU's `pages-N.img`, which need not exist as a file.

    *runs*: (space, vaddr, pages) in the file's order; a space tells one address space from another.
    """

    @property
    def name(self) -> str:
        """The path of the file that it stands for, such as "pages-1.img"."""

    @property
    def runs(self) -> Sequence[tuple[int, int, int]]:
        """Which pages there are, in the file's order."""

    def readinto(self, space: int, vaddr: int, buffer: memoryview) -> None:
        """Fill *buffer* with whole pages from *vaddr* on, all within one run. Raises OSError."""


def memory_chunks(memory: Memory, spaces: Spaces) -> Iterator[tuple[memoryview, int]]:
    """Yield the memory's pages in buffers of their own; neighboring small runs share one."""
    at, done = 0, 0  # the run, and how many of its pages are read
    while at < len(spaces):
        buffer = memoryview(bytearray(_CHUNK_PAGES * PAGE))
        filled = 0
        while filled < _CHUNK_PAGES and at < len(spaces):
            space, vaddr, pages = (int(value) for value in spaces[at])
            count = min(pages - done, _CHUNK_PAGES - filled)
            memory.readinto(space, vaddr + done * PAGE, buffer[filled * PAGE : (filled + count) * PAGE])
            filled, done = filled + count, done + count
            if done == pages:
                at, done = at + 1, 0
        yield buffer[: filled * PAGE], filled


def file_chunks(file: int, size: int) -> Iterator[tuple[memoryview | None, int]]:
    """Yield the pages of an open file; None stands for a hole. The last page is filled up with zeros."""
    position = 0
    while position < size:
        try:
            start = os.lseek(file, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            start = size  # no more data up to the end
        start = min(
            start - start % PAGE if start < size else -(-size // PAGE) * PAGE, -(-size // PAGE) * PAGE
        )
        if start > position:
            yield None, (start - position) // PAGE
            position = start
            continue
        end = min(os.lseek(file, position, os.SEEK_HOLE), size)
        while position < end:
            count = min(_CHUNK_PAGES, -(-(end - position) // PAGE))
            buffer = memoryview(bytearray(count * PAGE))
            _read_at(file, buffer[: min(count * PAGE, size - position)], position)
            yield buffer, count
            position += count * PAGE


def _read_at(file: int, buffer: memoryview, position: int) -> None:
    while buffer:
        count = os.preadv(file, [buffer], position)
        if count == 0:
            raise OSError(errno.EIO, "the file has become shorter")
        buffer, position = buffer[count:], position + count


def regular_files(source: Path) -> Iterator[Path]:
    """Yield them, always in the same order; sockets, links and the like are no part of a checkpoint."""

    def fail(error: OSError) -> None:
        raise OutlastError(f"{error.filename}: {error.strerror}") from error

    for directory, subdirectories, names in os.walk(source, onerror=fail):
        subdirectories.sort()
        for path in (Path(directory, name) for name in sorted(names)):
            if stat.S_ISREG(path.lstat().st_mode):
                yield path
            else:
                _log.warning("%s: not a regular file; left out", path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)
