"""The memory of a checkpoint: what stands for CRIU's pages files, wherever the pages are."""

from __future__ import annotations

import bisect
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from criu_backend._pagemap import PAGE, PRESENT, read_pagemap

_PAGEMAP = re.compile(r"pagemap-(?P<shared>shmem-)?(?P<number>[0-9]+)\.img")
# Address spaces of processes are told apart by PID, shared memory by its number with this bit set.
_SHARED = 1 << 63

Run = tuple[int, int, int]


class Memory(Protocol):
    """The pages of one file `pages-K.img`, which need not exist as a file.

    *name* is that file's; *runs* are its pages in its order: (space, vaddr, pages), where *space* tells
    address spaces apart, *vaddr* is a multiple of the page size, 4096 bytes, and *pages* is at least 1.
    """

    name: str
    runs: Sequence[Run]

    def readinto(self, space: int, vaddr: int, buffer: memoryview) -> None:
        """Fill *buffer*, whole pages inside one run. Raises OSError where the pages are gone."""


class FileMemory:
    """The pages of a file that CRIU wrote."""

    def __init__(self, name: str, file: Path, runs: Sequence[Run]) -> None:
        self.name = name
        self.runs = runs
        self._file = file
        self._fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        self._index = RunIndex(runs)

    def readinto(self, space: int, vaddr: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        read_exactly(self._fd, buffer, self._index.offset(space, vaddr, len(buffer)))

    def close(self) -> None:
        """Remove the file."""
        os.close(self._fd)
        self._file.unlink(missing_ok=True)


class RunIndex:
    """Finds where in its file a page is."""

    def __init__(self, runs: Sequence[Run]) -> None:
        offset = 0
        found = []
        for space, vaddr, pages in runs:
            found.append((space, vaddr, pages, offset))
            offset += pages * PAGE
        self.size = offset  # of the file, in bytes
        self._runs = sorted(found)

    def holds(self, space: int, vaddr: int) -> bool:
        """Return whether the page at *vaddr* is in the file."""
        at = bisect.bisect_right(self._runs, (space, vaddr, 1 << 64, 0)) - 1
        return at >= 0 and self._runs[at][0] == space and vaddr < self._runs[at][1] + self._runs[at][2] * PAGE

    def offset(self, space: int, vaddr: int, length: int) -> int:
        """Return the offset, in bytes, of the page at *vaddr*; *length* bytes from there are in one run.

        Raises:
            OSError: they are not.
        """
        at = bisect.bisect_right(self._runs, (space, vaddr, 1 << 64, 0)) - 1
        if at >= 0:
            its_space, start, pages, offset = self._runs[at]
            if its_space == space and vaddr + length <= start + pages * PAGE:
                return offset + (vaddr - start)
        raise OSError(f"no page at {vaddr:#x} of address space {space}")


def space_of(pagemap: Path) -> int:
    """Return the number that tells the address space of the image *pagemap* apart from all others."""
    match = _PAGEMAP.fullmatch(pagemap.name)
    if match is None:
        raise ValueError(pagemap.name)
    return int(match["number"]) | (_SHARED if match["shared"] else 0)


def take_pages(images: Path, aside: Path) -> list[FileMemory]:
    """Move every pages file out of the directory *images* into *aside*, which is made, and describe it.

    Raises:
        ImageError: a page map cannot be read.
    """
    runs: dict[int, list[Run]] = {}
    for image in sorted(path for path in images.iterdir() if _PAGEMAP.fullmatch(path.name)):
        pagemap = read_pagemap(image)
        space = space_of(image)
        found = runs.setdefault(pagemap.pages_id, [])
        found += [(space, entry.vaddr, entry.pages) for entry in pagemap.entries if entry.flags & PRESENT]
    aside.mkdir(mode=0o700)
    memories = []
    for number, its_runs in sorted(runs.items()):
        name = f"pages-{number}.img"
        file = images / name
        if file.exists():
            file.rename(aside / name)
            memories.append(FileMemory(name, aside / name, its_runs))
    return memories


def put_back(memories: Sequence[Memory], images: Path) -> None:
    """Write the pages files that *memories* stand for into *images*, as a restore wants them."""
    buffer = memoryview(bytearray(1 << 20))
    for memory in memories:
        with (images / memory.name).open("xb") as file:
            for space, vaddr, pages in memory.runs:
                left = pages * PAGE
                while left:
                    part = buffer[: min(left, len(buffer))]
                    memory.readinto(space, vaddr, part)
                    file.write(part)
                    vaddr += len(part)
                    left -= len(part)


def read_exactly(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill *buffer* from *offset* of *fd*. Raises OSError where there is less."""
    while buffer:
        count = os.preadv(fd, [buffer], offset)
        if count == 0:
            raise OSError(f"the pages at {offset:#x} are gone")
        offset += count
        buffer = buffer[count:]
