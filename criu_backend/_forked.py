"""The second half of a forked dump: CRIU's images, which lack what the twins hold, are made whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from criu_backend._images import ImageError, entries
from criu_backend._memory import FileMemory, Memory, Run, RunIndex, space_of
from criu_backend._pagemap import LAZY, PAGE, PRESENT, Entry, read_pagemap, write_pagemap
from criu_backend._twins import Twin

# Source: linux/mman.h, and criu/include/image.h, VMA_AREA_*.
_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_LOCKED, _MAP_HUGETLB = 0x02, 0x20, 0x2000, 0x40000
_AREA_VSYSCALL, _AREA_VDSO, _AREA_VVAR = 1 << 2, 1 << 3, 1 << 12

Range = tuple[int, int]


class TwinMemory:
    """The pages of one process: those that CRIU wrote while it stood still, and those in its twin.

    A run never holds both kinds.
    """

    def __init__(self, name: str, runs: Sequence[Run], twin: Twin, written: FileMemory | None) -> None:
        self.name = name
        self.runs = runs
        self._twin = twin
        self._written = written
        self._index = RunIndex(runs)
        self._written_index = RunIndex(written.runs if written is not None else ())

    def readinto(self, space: int, vaddr: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        self._index.offset(space, vaddr, len(buffer))
        if self._written is not None and self._written_index.holds(space, vaddr):
            self._written.readinto(space, vaddr, buffer)
        else:
            self._twin.readinto(vaddr, buffer)


def complete(images: Path, written: Sequence[FileMemory], twins: Sequence[Twin]) -> list[Memory]:
    """Make the page maps in *images* those of a plain dump, and return all memory of the tree.

    Args:
        written: the pages files that CRIU wrote.
        twins: those of the processes in *images*; a process may have none.

    Raises:
        ImageError: the images are not what they should be, or a page is neither in them nor in a twin.
        OSError: a twin has ended.
    """
    by_name = {memory.name: memory for memory in written}
    made: dict[str, Memory] = {}
    threads = {process["pid"]: process["threads"] for process in entries(images / "pstree.img")}
    for twin in twins:
        image = images / f"pagemap-{twin.pid}.img"
        old = read_pagemap(image)
        name = f"pages-{old.pages_id}.img"
        present = [entry for entry in old.entries if entry.flags & PRESENT]
        missing = [(e.vaddr, e.vaddr + e.pages * PAGE) for e in old.entries if not e.flags & PRESENT]
        held = list(_without(twin.pages(), [(e.vaddr, e.vaddr + e.pages * PAGE) for e in present]))
        if any(True for _ in _without(missing, held)):
            raise ImageError(f"{image.name}: pages are missing that the twin does not hold")
        lazy, stacks = _lazy_ranges(images, twin.pid), _stack_pages(images, threads[twin.pid])
        found = sorted([*present, *_entries(held, lazy, stacks)], key=lambda entry: entry.vaddr)
        write_pagemap(image, old, found)
        space = space_of(image)
        runs = [(space, entry.vaddr, entry.pages) for entry in found]
        made[name] = TwinMemory(name, runs, twin, by_name.get(name))
    return [*made.values(), *(memory for memory in written if memory.name not in made)]


def _without(ranges: Iterable[Range], cut: Sequence[Range]) -> Iterator[Range]:
    """Yield the parts of *ranges* that are in none of *cut*; both are in order and without overlap."""
    at = 0
    for start, end in ranges:
        while at < len(cut) and cut[at][1] <= start:
            at += 1
        i = at
        while start < end and i < len(cut) and cut[i][0] < end:
            if cut[i][0] > start:
                yield start, cut[i][0]
            start = max(start, cut[i][1])
            i += 1
        if start < end:
            yield start, end


def _within(ranges: Sequence[Range], kept: Sequence[Range]) -> Iterator[Range]:
    """Yield the parts of *ranges* that are in *kept*; both are in order and without overlap."""
    at = 0
    for start, end in ranges:
        while at < len(kept) and kept[at][1] <= start:
            at += 1
        i = at
        while i < len(kept) and kept[i][0] < end:
            yield max(start, kept[i][0]), min(end, kept[i][1])
            i += 1


def _entries(held: Sequence[Range], lazy: Sequence[Range], stacks: Sequence[Range]) -> Iterator[Entry]:
    """Yield page map entries for the ranges *held*, with those flagged LAZY that CRIU would flag so."""
    late = list(_without(_within(held, lazy), stacks))
    for start, end in late:
        yield Entry(start, (end - start) // PAGE, PRESENT | LAZY)
    for start, end in _without(held, late):
        yield Entry(start, (end - start) // PAGE, PRESENT)


def _lazy_ranges(images: Path, pid: int) -> list[Range]:
    """Return the memory that a restore may fetch late. Source: criu/include/vma.h, vma_entry_can_be_lazy."""
    found = []
    for vma in entries(images / f"mm-{pid}.img")[0]["vmas"]:
        flags, status = _number(vma["flags"]), _number(vma["status"])
        if (
            flags & _MAP_ANONYMOUS
            and flags & _MAP_PRIVATE
            and not flags & (_MAP_LOCKED | _MAP_HUGETLB)
            and not status & (_AREA_VDSO | _AREA_VVAR | _AREA_VSYSCALL)
        ):
            found.append((_number(vma["start"]), _number(vma["end"])))
    return found


def _stack_pages(images: Path, threads: Sequence[int]) -> list[Range]:
    """Return the pages that the stack pointers of *threads* are in, in order."""
    found = set()
    for thread in threads:
        core = entries(images / f"core-{thread}.img")[0]
        page = _number(core["thread_info"]["gpregs"]["sp"]) & -PAGE
        found.add((page, page + PAGE))
    return sorted(found)


def _number(value: int | str) -> int:
    """Pycriu writes some numbers as text, in hexadecimal or as names of flags."""
    return value if isinstance(value, int) else int(value, 0)
