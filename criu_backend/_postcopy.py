"""Post-copy: a restored job runs at once, and its pages follow, those first that it asks for.

CRIU's lazy-pages daemon asks a page server for pages, by CRIU's own protocol; the page server is here, and
reads them from wherever the checkpoint is. Source of the protocol: criu 4.2, criu/page-xfer.c.
"""

from __future__ import annotations

import bisect
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from criu_backend._memory import Run, RunIndex, space_of
from criu_backend._pagemap import LAZY, PAGE, PRESENT, read_pagemap, write_pagemap

# Command, pages, virtual address, number of the address space; CRIU 4.2 has made the second one wider.
_REQUEST = struct.Struct("<I4xQQQ")
_OLD_REQUEST = struct.Struct("<IIQQ")
_GET, _ADD, _FLUSH, _CLOSE = 7, 6, 0x1023, 0x1024
_DONE = struct.pack("<i", 0)
_MOST_PAGES = 256  # in one answer: 1 MiB
# Of what could follow, so much is restored at once, and no run of pages that is longer than the second.
_EAGER_PAGES = 1024
_SMALL_PAGES = 256
_AT_ONCE = 150  # runs: what holds them fits into a store's cache

# Reads whole pages of an address space from a virtual address on, all in one run of the image.
Read = Callable[[int, int, int], bytes]
# For each pages file: (space, vaddr, pages) in its order.
Runs = Mapping[str, Sequence[Run]]


class PageServer:
    """Gives CRIU's lazy-pages daemon its pages. *read* is called in a thread of its own.

    *read* must not give up lightly: when it raises, the daemon fails, and the capsule ends with it.
    """

    def __init__(self, runs: Runs, read: Read, criu_version: str, link: socket.socket) -> None:
        """Serve at *link*, until its other end is closed.

        Args:
            criu_version: of the CRIU that will ask, as it prints it.
        """
        major, minor = (int(number) for number in criu_version.split(".")[:2])
        self._request = _REQUEST if (major, minor) >= (4, 2) else _OLD_REQUEST
        self._read = read
        self._runs = sorted((space, vaddr, pages) for some in runs.values() for space, vaddr, pages in some)
        self._socket = link
        self._over = threading.Event()
        self.error: Exception | None = None
        self.complete = False  # the daemon has said that it needs no more
        self.pages = 0
        threading.Thread(target=self._serve, name="pages", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Wait at most *seconds* for the last page to be given, or a failure; return whether it is over."""
        return self._over.wait(seconds)

    def _serve(self) -> None:
        try:
            while (request := self._receive(self._request.size)) is not None:
                command, count, vaddr, space = self._request.unpack(request)
                command &= 0xFFFF
                if command == _GET:
                    self._give(space, vaddr, count)
                elif command in (_FLUSH, _CLOSE):
                    self._socket.sendall(_DONE)
                    self.complete = command == _CLOSE
                else:
                    raise OSError(f"CRIU asks for {command:#x}, which no page server knows")
        except Exception as error:  # noqa: BLE001 - told to whoever waits, in another thread
            self.error = error
        finally:
            self._over.set()
            self._socket.close()

    def _give(self, space: int, vaddr: int, count: int) -> None:
        at = bisect.bisect_right(self._runs, (space, vaddr, 1 << 62)) - 1
        found, start, pages = self._runs[at] if at >= 0 else (-1, 0, 0)
        left = pages - (vaddr - start) // PAGE
        if found != space or left <= 0:
            raise OSError(f"CRIU asks for a page at {vaddr:#x} of process {space}, which is not in the image")
        count = min(count, left, _MOST_PAGES)
        data = self._read(space, vaddr, count)
        self._socket.sendall(self._request.pack(_ADD | PRESENT << 16, count, vaddr, space))
        self._socket.sendall(data)
        self.pages += count

    def _receive(self, count: int) -> bytes | None:
        data = b""
        while len(data) < count:
            some = self._socket.recv(count - len(data))
            if not some:
                return None
            data += some
        return data


def write_eager_pages(
    images: Path,
    runs: Runs,
    read: Read,
    announce: Callable[[Sequence[Run]], object] = lambda _: None,
) -> int:
    """Make the pages files of *runs* in *images*, holes but for the pages that CRIU restores at once.

    Those are what cannot follow, and what any job needs first: see `first_wanted`. The page maps are changed to
    say so. *announce* is called with what *read* is about to be asked for (space, vaddr, pages), some at a time:
    fetched together, they take one round trip. Returns how many pages those are. Raises what *read* raises.
    """
    for name, some in runs.items():
        with (images / name).open("xb") as file:
            file.truncate(sum(pages for _, _, pages in some) * PAGE)
    indices = {name: RunIndex(some) for name, some in runs.items()}
    maps = {image: read_pagemap(image) for image in images.glob("pagemap-*.img")}
    soon = first_wanted(
        [
            (space_of(image), entry.vaddr, entry.pages)
            for image, pagemap in maps.items()
            for entry in pagemap.entries
            if entry.flags & PRESENT and entry.flags & LAZY
        ],
        _EAGER_PAGES,
    )
    wanted: list[tuple[str, int, int, int]] = []
    for image, pagemap in maps.items():
        space, name = space_of(image), f"pages-{pagemap.pages_id}.img"
        entries = [
            replace(entry, flags=entry.flags & ~LAZY) if (space, entry.vaddr, entry.pages) in soon else entry
            for entry in pagemap.entries
        ]
        if entries != list(pagemap.entries):
            write_pagemap(image, pagemap, entries)
        for entry in entries:
            if not entry.flags & PRESENT or entry.flags & LAZY:
                continue
            for first in range(0, entry.pages, _MOST_PAGES):
                part = min(_MOST_PAGES, entry.pages - first)
                wanted.append((name, space, entry.vaddr + first * PAGE, part))
    with contextlib.ExitStack() as closing:
        files = {name: closing.enter_context((images / name).open("r+b")) for name in runs}
        for first in range(0, len(wanted), _AT_ONCE):
            batch = wanted[first : first + _AT_ONCE]
            announce([(space, vaddr, pages) for _, space, vaddr, pages in batch])
            for name, space, vaddr, pages in batch:
                files[name].seek(indices[name].offset(space, vaddr, pages * PAGE))
                files[name].write(read(space, vaddr, pages))
    return sum(pages for _, _, _, pages in wanted)


def first_wanted(runs: Iterable[Run], limit: int) -> set[Run]:
    """Return the smallest of *runs*, *limit* pages of them: stacks, libraries' data, thread-local storage, heaps.

    Any job soon touches those, and a page that is asked for when it is touched costs as much as a hundred that come
    together.
    """
    found: set[Run] = set()
    for run in sorted(runs, key=lambda run: run[2]):
        if run[2] > min(limit, _SMALL_PAGES):
            break
        limit -= run[2]
        found.add(run)
    return found
