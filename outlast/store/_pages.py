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

_PART_BITS = 3
_PARTS = 1 << _PART_BITS
_FEW = 1 << 16  # pages

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
    """Where the store has which page: 24 bytes a page.

    It is kept in parts, by the first bits of the hash, so that sorting takes little memory besides.
    """

    def __init__(self) -> None:
        self._parts = [_Part() for _ in range(_PARTS)]
        self._fresh: list[tuple[Hashes, Numbers]] = []
        self._fresh_pages = 0

    def __len__(self) -> int:
        return self._fresh_pages + sum(len(part.places) for part in self._parts)

    def add(self, hashes: Hashes, places: Numbers) -> None:
        """Learn that pages with *hashes* lie at *places*; `find` knows them after `settle` at the latest."""
        self._fresh.append((hashes, places))
        self._fresh_pages += len(places)
        if self._fresh_pages > max(_FEW, len(self) // 4):
            self.settle()

    def settle(self) -> None:
        """Sort in what has been added."""
        if not self._fresh:
            return
        hashes = np.concatenate([fresh for fresh, _ in self._fresh])
        places = np.concatenate([fresh for _, fresh in self._fresh])
        self._fresh.clear()
        self._fresh_pages = 0
        for part, mine in zip(self._parts, _split(hashes), strict=True):
            part.add(hashes[mine], places[mine])

    def find(self, hashes: Hashes) -> Numbers:
        """Return for each of *hashes* where that page lies, or UNKNOWN."""
        found = np.full(len(hashes), UNKNOWN, np.int64)
        for part, mine in zip(self._parts, _split(hashes), strict=True):
            if len(mine) and len(part.places):
                found[mine] = part.find(hashes[mine])
        return found

    def keep(self, wanted: NDArray[np.bool_]) -> None:
        """Forget each page whose frame is not *wanted* (one truth value a frame); number anew the rest."""
        self.settle()
        numbers = np.cumsum(wanted) - 1
        for part in self._parts:
            frames = part.places // FRAME_PAGES
            kept = wanted[frames]
            part.hashes = part.hashes[kept]
            part.places = numbers[frames[kept]] * FRAME_PAGES + part.places[kept] % FRAME_PAGES


class _Part:
    """Pages whose hashes begin alike, sorted by the first half of the hash."""

    def __init__(self) -> None:
        self.hashes: Hashes = np.empty((0, 2), np.uint64)
        self.places: Numbers = np.empty(0, np.int64)

    def add(self, hashes: Hashes, places: Numbers) -> None:
        hashes = np.concatenate([self.hashes, hashes])
        order = np.argsort(hashes[:, 0], kind="stable")
        self.hashes = hashes[order]
        self.places = np.concatenate([self.places, places])[order]

    def find(self, hashes: Hashes) -> Numbers:
        at = np.searchsorted(self.hashes[:, 0], hashes[:, 0])
        at[at == len(self.places)] = 0
        # Two pages with the same first half are one in 2^64: the second is then stored again.
        same = (self.hashes[at] == hashes).all(axis=1)
        return np.where(same, self.places[at], UNKNOWN)


def _split(hashes: Hashes) -> list[NDArray[np.int64]]:
    """Return for each part which of *hashes* belong to it."""
    parts = hashes[:, 0] >> np.uint64(64 - _PART_BITS)
    order = np.argsort(parts, kind="stable")
    return np.split(order, np.searchsorted(parts[order], np.arange(1, _PARTS)))


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
