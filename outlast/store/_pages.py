"""Pages by their content: which of them the store has already, and where."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

PAGE = 4096  # bytes, on every machine that writes or reads a store

Numbers: TypeAlias = NDArray[np.int64]
Spaces: TypeAlias = NDArray[np.uint64]  # of shape (runs, 3): space, virtual address, pages
Hashes: TypeAlias = NDArray[np.uint64]  # of shape (pages, 2): a 128-bit hash in two halves

# Where a page lies: frame * FRAME_PAGES + place in it. Zero pages lie nowhere.
FRAME_PAGES = 64
ZERO = -1
UNKNOWN = -2

_hash = xxhash.xxh3_128_digest
_ZERO_HASH = np.frombuffer(_hash(bytes(PAGE)), np.uint64)


def hash_pages(data: memoryview) -> Hashes:
    """Return the XXH3-128 of each whole page of *data*."""
    digests = b"".join([_hash(data[start : start + PAGE]) for start in range(0, len(data), PAGE)])
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def are_zero(hashes: Hashes) -> NDArray[np.bool_]:
    """Tell for each page whether it is all zeros."""
    zero: NDArray[np.bool_] = (hashes == _ZERO_HASH).all(axis=1)
    return zero


class PageTable:
    """Where the store has which page: 24 bytes a page."""

    def __init__(self) -> None:
        self._hashes: Hashes = np.empty((0, 2), np.uint64)  # sorted by their first half
        self._places: Numbers = np.empty(0, np.int64)
        self._fresh: list[tuple[Hashes, Numbers]] = []

    def __len__(self) -> int:
        return len(self._places) + sum(len(places) for _, places in self._fresh)

    def add(self, hashes: Hashes, places: Numbers) -> None:
        """Learn that pages with *hashes* lie at *places*; `find` knows them after `settle`."""
        self._fresh.append((hashes, places))

    def settle(self) -> None:
        """Sort in what has been added."""
        if not self._fresh:
            return
        hashes = np.concatenate([self._hashes, *(fresh for fresh, _ in self._fresh)])
        places = np.concatenate([self._places, *(fresh for _, fresh in self._fresh)])
        self._fresh.clear()
        order = np.argsort(hashes[:, 0], kind="stable")
        self._hashes, self._places = hashes[order], places[order]

    def find(self, hashes: Hashes) -> Numbers:
        """Return for each of *hashes* where that page lies, or UNKNOWN."""
        if not len(self._places):
            return np.full(len(hashes), UNKNOWN, np.int64)
        at = np.searchsorted(self._hashes[:, 0], hashes[:, 0])
        at[at == len(self._places)] = 0
        # Two pages with the same first half are one in 2^64: the second is then stored again.
        same = (self._hashes[at] == hashes).all(axis=1)
        return np.where(same, self._places[at], UNKNOWN)

    def keep(self, wanted: NDArray[np.bool_]) -> None:
        """Forget each page whose frame is not *wanted* (one truth value a frame); number anew the rest."""
        self.settle()
        frames = self._places // FRAME_PAGES
        kept = wanted[frames]
        numbers = np.cumsum(wanted) - 1
        self._hashes = self._hashes[kept]
        self._places = numbers[frames[kept]] * FRAME_PAGES + self._places[kept] % FRAME_PAGES


def runs_of(places: Numbers) -> Numbers:
    """Return *places* as runs, of shape (runs, 2): a first place and a count; ZERO counts as one place."""
    return joined(np.stack([places, np.ones_like(places)], axis=1))


def joined(runs: Numbers) -> Numbers:
    """Return *runs* with those made one that follow each other without a gap."""
    if not len(runs):
        return runs
    starts, counts = runs.T
    stored = (starts[1:] == starts[:-1] + counts[:-1]) & (starts[:-1] != ZERO) & (starts[1:] != ZERO)
    zeros = (starts[1:] == ZERO) & (starts[:-1] == ZERO)
    firsts = np.flatnonzero(np.concatenate([[True], ~(stored | zeros)]))
    return np.stack([starts[firsts], np.add.reduceat(counts, firsts)], axis=1)


def pages_in_frames(runs: Numbers, frames: int) -> Numbers:
    """Return for each of *frames* frames how many pages *runs* have in it."""
    starts, counts = runs[runs[:, 0] != ZERO].T
    first, last = starts // FRAME_PAGES, (starts + counts - 1) // FRAME_PAGES
    # Every frame that a run touches in full, and then less what it has not at both ends.
    steps = np.zeros(frames + 1, np.int64)
    np.add.at(steps, first, FRAME_PAGES)
    np.add.at(steps, last + 1, -FRAME_PAGES)
    pages = np.cumsum(steps[:frames])
    np.subtract.at(pages, first, starts % FRAME_PAGES)
    np.subtract.at(pages, last, FRAME_PAGES - 1 - (starts + counts - 1) % FRAME_PAGES)
    return pages
