"""Writing a checkpoint: find the pages that the store has not got, and put them into packs."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from outlast.errors import CorruptCheckpoint, OutlastError
from outlast.store._codec import Chooser
from outlast.store._keys import SALT, Keyring
from outlast.store._manifest import Item, Manifest, Pack
from outlast.store._pack import MAGIC, Trailer, encode_trailer, seal
from outlast.store._pages import (
    FRAME_PAGES,
    PAGE,
    UNKNOWN,
    ZERO,
    Hashes,
    Numbers,
    PageTable,
    Spaces,
    are_zero,
    hash_pages,
    joined,
    pages_in_frames,
    runs_of,
)
from outlast.store._source import Memory, file_chunks, memory_chunks, opened, regular_files

_WORKERS = 2
_AHEAD = 24  # frames in memory between hashing and sending: 6 MiB
PACK_SIZE = 64 << 20  # bytes, at which a pack is full: what an interrupted upload ships again at most
# The packs that a writer knows hold so many times at most what the newest checkpoint needs of them. Beyond it, the
# sparsest are not referred to again, so that they can go with the older checkpoints: what is still needed of
# them is shipped once more. docs/adr/0007 has what other numbers cost.
_MOST_HELD = 3.0
# Of small packs, of which less is needed than a 32nd of a full one and a 1024th of the checkpoint, there are so
# many at most; beyond it what is needed of the smallest is shipped again, as one.
_MOST_SMALL = 200


class Known:
    """What a writer knows of the packs that its job has in the store.

    *frames* has the columns of `Manifest.frames`; a place is (index in it) * FRAME_PAGES + place in it.
    """

    def __init__(self) -> None:
        self.packs: list[Pack] = []
        self.frames: Numbers = np.empty((0, 5), np.int64)
        self.table = PageTable()

    def add_pack(self, pack: Pack, trailer: Trailer) -> None:
        """Learn of a finished pack."""
        count = len(trailer.offsets)
        rows = np.stack(
            [
                np.full(count, len(self.packs)),
                np.arange(count),
                trailer.offsets,
                trailer.lengths,
                trailer.pages,
            ],
            axis=1,
        )
        # The k-th page of a pack lies in the frame that the pages before it have filled.
        frame_of = np.repeat(np.arange(count), trailer.pages)
        first_of = np.repeat(np.cumsum(trailer.pages) - trailer.pages, trailer.pages)
        within = np.arange(len(frame_of)) - first_of
        self.table.add(trailer.hashes, (len(self.frames) + frame_of) * FRAME_PAGES + within)
        self.frames = np.concatenate([self.frames, rows])
        self.packs.append(pack)

    def drop_sparse(self, live: Numbers) -> None:
        """Forget packs of which too little is in *live*: the newest checkpoint's pages in each frame.

        Afterwards what is left, and what of the rest must be shipped again, is at most _MOST_HELD times what the
        checkpoint needs, where a frame's bytes are needed in the proportion of its pages. Of each pack that goes
        for that, less than one _MOST_HELDth is needed: so little of all that is shipped is shipped again.
        """
        if not len(self.frames):
            return
        count = len(self.packs)
        numbers, lengths = self.frames[:, 0], self.frames[:, 3]
        live_pages = np.bincount(numbers, live, count)
        needed = np.bincount(numbers, lengths * live / self.frames[:, 4], count)
        idle = np.bincount(numbers, lengths, count) - needed
        keep = live_pages > 0
        # What is needed of a pack that goes comes back with the next checkpoint; what is idle does not.
        excess = idle[keep].sum() - (_MOST_HELD - 1) * needed.sum()
        sparsest = np.flatnonzero(keep)
        sparsest = sparsest[np.argsort(needed[sparsest] / (needed + idle)[sparsest], kind="stable")]
        before = np.cumsum(idle[sparsest]) - idle[sparsest]
        keep[sparsest[before < excess]] = False
        small = np.flatnonzero(keep & (live_pages < min(PACK_SIZE // (32 * PAGE), live_pages.sum() / 1024)))
        if len(small) > _MOST_SMALL:
            keep[small[np.argsort(live_pages[small], kind="stable")][: len(small) // 2]] = False
        wanted = keep[numbers]
        self.table.keep(wanted)
        self.frames = self.frames[wanted]
        self.frames[:, 0] = (np.cumsum(keep) - 1)[self.frames[:, 0]]
        self.packs = [pack for pack, kept in zip(self.packs, keep, strict=True) if kept]


class Gatherer:
    """Goes once through all pages of a checkpoint; gives those that are new, frame by frame."""

    def __init__(self, known: Known, source: Path, memories: Iterable[Memory]) -> None:
        self._known = known
        self._first_frame = len(known.frames)
        self._new = 0  # pages that were new so far
        self._stream = self._pages(source, memories)
        self.items: list[tuple[str, int, int, Spaces, Numbers]] = []  # path, mode, size, spaces, runs
        self.exhausted = False
        self._buffered: list[tuple[memoryview, Hashes]] = []
        self._buffered_pages = 0

    def frames(self) -> Iterator[tuple[bytes, Hashes]]:
        """Yield the next frames of new pages, of FRAME_PAGES each but for the very last."""
        while self.more():
            yield self._cut(min(FRAME_PAGES, self._buffered_pages))

    def more(self) -> bool:
        """Look on until there is a whole frame, or all has been seen; return whether there is any frame."""
        while self._buffered_pages < FRAME_PAGES and not self.exhausted:
            try:
                next(self._stream)
            except StopIteration:
                self.exhausted = True
        return self._buffered_pages > 0

    @property
    def drained(self) -> bool:
        """Whether there is nothing left to come."""
        return self.exhausted and not self._buffered_pages

    def _cut(self, pages: int) -> tuple[bytes, Hashes]:
        parts: list[memoryview] = []
        hashes: list[Hashes] = []
        wanted = pages
        while wanted:
            data, some = self._buffered[0]
            count = min(wanted, len(some))
            parts.append(data[: count * PAGE])
            hashes.append(some[:count])
            if count == len(some):
                self._buffered.pop(0)
            else:
                self._buffered[0] = (data[count * PAGE :], some[count:])
            wanted -= count
        self._buffered_pages -= pages
        return b"".join(parts), np.concatenate(hashes)

    def _pages(self, source: Path, memories: Iterable[Memory]) -> Generator[None, None, None]:
        """Look at every page, and put those that are new into the buffer."""
        for path in regular_files(source):
            try:
                with opened(path) as file:
                    info = os.fstat(file)
                    runs: list[Numbers] = []
                    for buffer, count in file_chunks(file, info.st_size):
                        runs.append(self._look(buffer, count))
                        yield
            except OSError as error:
                raise OutlastError(f"{path}: {error.strerror}") from error
            name = path.relative_to(source).as_posix()
            spaces = np.empty((0, 3), np.uint64)
            self._finish(name, stat.S_IMODE(info.st_mode), info.st_size, spaces, runs)
        for memory in memories:
            spaces = np.array(memory.runs, np.uint64).reshape(-1, 3)
            runs = []
            try:
                for buffer, count in memory_chunks(memory, spaces):
                    runs.append(self._look(buffer, count))
                    yield
            except OSError as error:
                raise OutlastError(f"the job's memory ({memory.name}): {error.strerror}") from error
            self._finish(memory.name, 0o600, int(spaces[:, 2].sum()) * PAGE, spaces, runs)

    def _finish(self, name: str, mode: int, size: int, spaces: Spaces, runs: list[Numbers]) -> None:
        all_runs = joined(np.concatenate([np.empty((0, 2), np.int64), *runs]))
        self.items.append((name, mode, size, spaces, all_runs))

    def _look(self, buffer: memoryview | None, count: int) -> Numbers:
        """Return where *count* pages lie, as runs; they are all zeros where there is no *buffer*."""
        if buffer is None:
            return np.array([[ZERO, count]], np.int64)
        hashes = hash_pages(buffer)
        places = self._known.table.find(hashes)
        places[are_zero(hashes)] = ZERO
        new = places == UNKNOWN
        if new.any():
            pages = np.frombuffer(buffer, np.uint8).reshape(-1, PAGE)[new]
            count = len(pages)
            # New pages are numbered as they come; frame for frame they will lie in that order.
            places[new] = self._first_frame * FRAME_PAGES + self._new + np.arange(count)
            self._new += count
            self._buffered.append((memoryview(pages.reshape(-1)), hashes[new]))
            self._buffered_pages += count
        return runs_of(places)


class PackWriter:
    """Makes one pack of a gatherer's frames, as a stream of bytes."""

    def __init__(self, name: str, gatherer: Gatherer, cipher: AESGCM, salt: bytes, keyring: Keyring) -> None:
        self._name = name
        self._gatherer = gatherer
        self._cipher = cipher
        self._salt = salt
        self._key_id = keyring.newest
        self._trailer: Trailer | None = None
        self._size = 0

    def stream(self) -> Generator[bytes, None, None]:
        """Yield the pack; it ends when it is full or there is nothing more to store."""
        head = MAGIC + self._salt + bytes.fromhex(self._key_id)
        yield head
        size = len(head)
        offsets, lengths, pages, hashes = [], [], [], []
        with ThreadPoolExecutor(_WORKERS, "pack") as pool:
            jobs = ((plain, some) for plain, some in self._gatherer.frames())
            for stored, some in _sealed(pool, self._cipher, jobs):
                offsets.append(size)
                lengths.append(len(stored))
                pages.append(len(some))
                hashes.append(some)
                size += len(stored)
                yield stored
                if size >= PACK_SIZE:
                    # What is under way beyond this goes into this pack too: see _sealed().
                    jobs.close()
        self._trailer = Trailer(
            np.array(offsets, np.int64),
            np.array(lengths, np.int64),
            np.array(pages, np.int64),
            _joined(hashes),
        )
        tail = encode_trailer(self._cipher, size, self._trailer)
        self._size = size + len(tail)
        yield tail

    def finish(self, known: Known) -> None:
        """The pack has been stored: have *known* refer to it from now on."""
        assert self._trailer is not None  # noqa: S101 - stream() has ended
        pack = Pack(self._name, self._salt, self._key_id, self._size)
        known.add_pack(pack, self._trailer)


def new_salt() -> bytes:
    """Return a salt that no other pack has."""
    return os.urandom(SALT)


def finish_items(
    gatherer: Gatherer, known: Known
) -> tuple[tuple[Item, ...], Numbers, tuple[Pack, ...], Numbers, int]:
    """Return what the manifest says of a checkpoint whose packs are all stored.

    Returns:
        Its items, its frames (columns as in `Manifest.frames`) and packs, how many of its pages are in each
        frame of *known*, and the bytes of its files.
    """
    everything = np.concatenate([np.empty((0, 2), np.int64), *(runs for *_, runs in gatherer.items)])
    live = pages_in_frames(everything, len(known.frames))
    used = live > 0
    renumbered = np.cumsum(used) - 1
    rows = known.frames[used]
    pack_numbers, rows[:, 0] = np.unique(rows[:, 0], return_inverse=True)
    packs = tuple(known.packs[number] for number in pack_numbers)
    items = []
    for path, mode, size, spaces, runs in gatherer.items:
        moved = runs.copy()
        there = runs[:, 0] != ZERO
        starts = runs[there, 0]
        moved[there, 0] = renumbered[starts // FRAME_PAGES] * FRAME_PAGES + starts % FRAME_PAGES
        items.append(Item(path, mode, size, spaces, joined(moved)))
    return tuple(items), rows, packs, live, sum(size for _, _, size, _, _ in gatherer.items)


def known_from(manifest: Manifest, trailers: Iterable[Trailer]) -> Known:
    """Return what a writer needs to go on after *manifest*, another writer's, whose packs have *trailers*."""
    known = Known()
    counts = [0]
    for pack, trailer in zip(manifest.packs, trailers, strict=True):
        known.add_pack(pack, trailer)
        counts.append(len(trailer.offsets))
    known.table.settle()
    # The same frames, as this writer numbers them: by pack, and by number in the pack.
    starts = np.cumsum(counts)
    renumbered = starts[manifest.frames[:, 0]] + manifest.frames[:, 1]
    if (manifest.frames != known.frames.take(renumbered, axis=0, mode="clip")).any():
        raise CorruptCheckpoint(f"{manifest.job}: a pack and the manifest tell of different frames")
    live = np.zeros(len(known.frames), np.int64)
    runs = np.concatenate([np.empty((0, 2), np.int64), *(item.runs for item in manifest.items)])
    live[renumbered] = pages_in_frames(runs, len(manifest.frames))
    known.drop_sparse(live)
    return known


def _sealed(
    pool: ThreadPoolExecutor, cipher: AESGCM, jobs: Iterable[tuple[bytes, Hashes]]
) -> Iterator[tuple[bytes, Hashes]]:
    """Yield each frame of *jobs* sealed, in order, while the next are under way."""
    under_way: deque[tuple[Future[bytes], Hashes]] = deque()
    chooser = Chooser()
    try:
        for number, (plain, hashes) in enumerate(jobs):
            if len(under_way) >= _AHEAD:
                future, some = under_way.popleft()
                yield future.result(), some
            under_way.append((pool.submit(seal, cipher, number, plain, None, chooser), hashes))
        while under_way:
            future, some = under_way.popleft()
            yield future.result(), some
    finally:
        for future, _ in under_way:
            future.cancel()


def _joined(hashes: list[Hashes]) -> Hashes:
    return np.concatenate([np.empty((0, 2), np.uint64), *hashes])
