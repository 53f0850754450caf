"""A job's memory as the engine hands it to a store, made up, with a way to change pages of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PAGE = 4096


class MadeUpMemory:
    """Pages under (space, virtual address), each of a kind that a store treats differently."""

    def __init__(self, name: str, runs: Sequence[tuple[int, int, int]], seed: int) -> None:
        self.name = name
        self.runs = list(runs)
        self.gone_after = 1 << 40  # pages that can be read before the memory is gone
        self.data = np.zeros((sum(pages for *_, pages in runs), PAGE), np.uint8)
        self.change(range(len(self.data)), seed)

    def change(self, pages: Sequence[int], seed: int) -> None:
        """Write to *pages*: most at random, some all zeros, some that compress, some alike."""
        random = np.random.default_rng(seed)
        for page in pages:
            kind = random.integers(8)
            if kind < 4:
                self.data[page] = np.frombuffer(random.bytes(PAGE), np.uint8)
            elif kind == 4:
                self.data[page] = 0
            elif kind == 5:
                self.data[page] = random.integers(256)
            else:
                self.data[page] = np.frombuffer(b"%016d" % random.integers(3) * (PAGE // 16), np.uint8)

    def content(self) -> bytes:
        return self.data.tobytes()

    def readinto(self, space: int, vaddr: int, buffer: memoryview) -> None:
        first = 0
        for its_space, start, pages in self.runs:
            if its_space == space and start <= vaddr < start + pages * PAGE:
                page = first + (vaddr - start) // PAGE
                count = len(buffer) // PAGE
                assert count * PAGE == len(buffer)
                assert page + count <= first + pages
                buffer[:] = self.data[page : page + count].tobytes()
                self.gone_after -= count
                if self.gone_after < 0:
                    raise OSError(5, "the memory is gone")
                return
            first += pages
        raise OSError(14, "no such pages")


def make_runs(sizes: Sequence[int], space: int = 1000) -> list[tuple[int, int, int]]:
    """Return runs of *sizes* pages with gaps between them, every third in another space."""
    vaddr, runs = 0x400000, []
    for number, pages in enumerate(sizes):
        runs.append((space + number % 3 // 2 + (1 << 63 if number % 5 == 4 else 0), vaddr, pages))
        vaddr += (pages + 1 + number) * PAGE
    return runs
