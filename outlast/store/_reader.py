"""Reading a checkpoint: all its files, or single pages of its memories."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from outlast.errors import CorruptCheckpoint, OutlastError, StoreUnavailable, UsageError
from outlast.model import JobKey
from outlast.store._backend import Backend
from outlast.store._keys import Keyring
from outlast.store._manifest import Item, Manifest, pack_purpose
from outlast.store._pack import unseal
from outlast.store._pages import FRAME_PAGES, PAGE, ZERO, Numbers, Spaces

_WORKERS = 2
_REQUEST = 1 << 20  # bytes: neighboring frames are fetched together up to this
_REQUEST_FRAMES = 8  # and up to these, which unpack to 2 MiB
_AHEAD = 12  # requests in memory: 12 MiB stored, or 24 MiB unpacked
_OPEN_FILES = 200
_CACHED = 192  # frames that `Stored` keeps unpacked: 48 MiB
# Whoever reads on where a read ended is given more at once each time, in pages: from 256 KiB to 8 MiB. A page
# asked for out of order, as by a fault, waits for no other.
_LEAST_AHEAD = 64
_MOST_AHEAD = 2048
_STREAMS = 16  # readers that are told apart


def pack_path(job: JobKey, name: str) -> str:
    """Return where the pack *name* of *job* is in the tree."""
    return f"jobs/{job.cluster}/{job.job_id}/packs/{name}.pack"


class Frames:
    """The frames of one manifest: where they are, and their contents."""

    def __init__(self, backend: Backend, manifest: Manifest, keyring: Keyring) -> None:
        self._backend = backend
        self._manifest = manifest
        self._ciphers: list[AESGCM] = [
            keyring.cipher(pack.key_id, pack.salt, pack_purpose(manifest.job, pack.name))
            for pack in manifest.packs
        ]

    def read(self, wanted: Numbers) -> Iterator[tuple[int, bytes]]:
        """Yield (index, content) of the frames *wanted*, each once; fetched ahead, in bounded memory."""
        rows = self._manifest.frames[wanted]
        order = np.lexsort((rows[:, 2], rows[:, 0]))
        with ThreadPoolExecutor(_WORKERS, "unpack") as pool:
            under_way: deque[Future[list[tuple[int, bytes]]]] = deque()
            try:
                for pack in np.unique(rows[:, 0]):
                    mine = wanted[order][rows[order, 0] == pack]
                    groups = list(self._groups(mine))
                    ranges = [
                        (self._offset(group[0]), self._end(group[-1]) - self._offset(group[0]))
                        for group in groups
                    ]
                    for group, data in zip(groups, self._stored(int(pack), ranges), strict=True):
                        if len(under_way) >= _AHEAD:
                            yield from under_way.popleft().result()
                        under_way.append(pool.submit(self._unseal_all, group, data))
                while under_way:
                    yield from under_way.popleft().result()
            finally:
                for future in under_way:
                    future.cancel()

    def _groups(self, indices: Numbers) -> Iterator[list[int]]:
        """Cut *indices*, sorted by their place in one pack, into what is fetched by one request each."""
        group: list[int] = []
        for index in map(int, indices):
            if group and (
                self._offset(index) != self._end(group[-1])
                or self._end(index) - self._offset(group[0]) > _REQUEST
                or len(group) == _REQUEST_FRAMES
            ):
                yield group
                group = []
            group.append(index)
        if group:
            yield group

    def _offset(self, index: int) -> int:
        return int(self._manifest.frames[index, 2])

    def _end(self, index: int) -> int:
        return int(self._manifest.frames[index, 2] + self._manifest.frames[index, 3])

    def _stored(self, pack: int, ranges: list[tuple[int, int]]) -> Iterator[bytes]:
        name = self._manifest.packs[pack].name
        what = f"{self._manifest.job}: pack {name}"
        try:
            yield from self._backend.read_ranges(pack_path(self._manifest.job, name), ranges)
        except FileNotFoundError:
            raise CorruptCheckpoint(f"{what}: missing", hint="use an older checkpoint") from None
        except EOFError as error:
            raise CorruptCheckpoint(f"{what}: torn: {error}", hint="use an older checkpoint") from error

    def _unseal_all(self, group: list[int], data: bytes) -> list[tuple[int, bytes]]:
        view = memoryview(data)
        start = self._offset(group[0])
        found = []
        for index in group:
            pack, number, offset, length, pages = map(int, self._manifest.frames[index])
            what = f"{self._manifest.job}: frame {number} of pack {self._manifest.packs[pack].name}"
            stored = view[offset - start : offset - start + length]
            plain = unseal(self._ciphers[pack], number, stored, largest=FRAME_PAGES * PAGE, what=what)
            if len(plain) != pages * PAGE:
                raise CorruptCheckpoint(f"{what}: has {len(plain)} bytes, not {pages} pages")
            found.append((index, plain))
        return found


def write_files(frames: Frames, items: tuple[Item, ...], into: Path) -> None:
    """Write *items* below the empty directory *into*, every frame of them verified.

    Raises:
        CorruptCheckpoint: stored bytes are not what was published.
        OutlastError: *into* cannot be written.
    """
    targets = [_targets(number, item) for number, item in enumerate(items)]
    # (frame, place in it, count, file, page of the file), sorted by frame.
    pieces = np.concatenate([np.empty((0, 5), np.int64), *targets])
    del targets
    pieces = pieces[np.argsort(pieces[:, 0], kind="stable")]
    wanted, starts = np.unique(pieces[:, 0], return_index=True)
    ends = np.append(starts[1:], len(pieces))
    try:
        for item in items:
            _create(into / item.path, item.size)
        with _Outputs(into, items) as outputs:
            for frame, plain in frames.read(wanted):
                at = int(np.searchsorted(wanted, frame))
                view = memoryview(plain)
                for _, place, count, number, page in pieces[starts[at] : ends[at]].tolist():
                    data = view[place * PAGE : (place + count) * PAGE]
                    if len(data) != count * PAGE:
                        raise CorruptCheckpoint(f"{items[number].path}: a run goes beyond its frame")
                    # The file's last page is filled up with zeros, which are no part of the file.
                    _write_at(outputs.file(number), data[: items[number].size - page * PAGE], page * PAGE)
        for item in items:
            (into / item.path).chmod(item.mode)
    except OSError as error:
        raise OutlastError(
            f"{error.filename or into}: {error.strerror}", hint="look at free space on this node"
        ) from error


class _Outputs:
    """The files that are being written; only the latest of them are open, as there may be thousands."""

    def __init__(self, into: Path, items: tuple[Item, ...]) -> None:
        self._into = into
        self._items = items
        self._open: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> _Outputs:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            os.close(file)

    def file(self, number: int) -> int:
        """Return a descriptor of the file of item *number*."""
        if number not in self._open:
            if len(self._open) == _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            path = self._into / self._items[number].path
            self._open[number] = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._open.move_to_end(number)
        return self._open[number]


class Stored:
    """An open checkpoint, for single pages. Any thread may read; the store behind it serves no other."""

    def __init__(self, frames: Frames, manifest: Manifest) -> None:
        self._frames = frames
        self._manifest = manifest
        self._memories = {item.path: item for item in manifest.items if len(item.spaces)}
        # In which memories pages of an address space are: a tree of processes has as many memories.
        self._of_space: dict[int, list[str]] = {}
        for path, item in self._memories.items():
            for space in np.unique(item.spaces[:, 0]).tolist():
                self._of_space.setdefault(space, []).append(path)
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        # How far to fetch ahead for one who goes on at (memory, page).
        self._streams: OrderedDict[tuple[str, int], int] = OrderedDict()
        # For each memory: where in the file each of its runs begins, in pages.
        self._starts = {
            path: (np.cumsum(item.spaces[:, 2]) - item.spaces[:, 2]).astype(np.int64)
            for path, item in self._memories.items()
        }
        self._places = {
            path: np.cumsum(item.runs[:, 1]) - item.runs[:, 1] for path, item in self._memories.items()
        }

    @property
    def memories(self) -> dict[str, Spaces]:
        """For each memory its runs: space, virtual address, pages; in the file's order."""
        return {path: item.spaces for path, item in self._memories.items()}

    def fetch_files(self, into: Path) -> None:
        """Make the directory *into* (0700) with all files but the memories. Raises as `Store.fetch` does."""
        into.mkdir(mode=0o700)
        items = tuple(item for item in self._manifest.items if not len(item.spaces))
        with self._lock:
            write_files(self._frames, items, into)

    def read(self, space: int, vaddr: int, pages: int) -> bytes:
        """Return *pages* pages of address space *space* from *vaddr* on, all within one run.

        Raises:
            UsageError: the checkpoint has no such pages.
            CorruptCheckpoint, StoreUnavailable: as everywhere.
        """
        path, page = self._place(space, vaddr, pages)
        return self._read_pages(path, self._memories[path], page, pages)

    def load(self, ranges: Iterable[tuple[int, int, int]]) -> None:
        """Fetch all of *ranges*, each as `read` takes it, in one go, to be read soon. Raises as `read` does."""
        with self._lock:
            frames: set[int] = set()
            for space, vaddr, pages in ranges:
                path, page = self._place(space, vaddr, pages)
                found = self._pieces(path, self._memories[path], page, pages)
                frames |= {frame for frame, _, _ in found if frame != ZERO}
            if len(frames) <= _CACHED:
                self._fetch(frames, ())

    def _place(self, space: int, vaddr: int, pages: int) -> tuple[str, int]:
        """Return in which memory, and from which of its pages on, these are."""
        for path in self._of_space.get(space, ()):
            spaces = self._memories[path].spaces
            hit = np.flatnonzero(
                (spaces[:, 0] == space)
                & (spaces[:, 1] <= vaddr)
                & (spaces[:, 1] + spaces[:, 2] * PAGE >= vaddr + pages * PAGE)
            )
            if len(hit):
                return path, int(self._starts[path][hit[0]]) + (vaddr - int(spaces[hit[0], 1])) // PAGE
        raise UsageError(f"no {pages} pages at {vaddr:#x} of address space {space} in this checkpoint")

    def _read_pages(self, path: str, item: Item, page: int, pages: int) -> bytes:
        with self._lock:
            pieces = self._pieces(path, item, page, pages)
            ahead = self._streams.pop((path, page), 0)
            frames = {frame for frame, _, _ in pieces if frame != ZERO}
            self._fetch(frames, self._pieces(path, item, page + pages, ahead))
            self._streams[path, page + pages] = min(max(2 * ahead, _LEAST_AHEAD), _MOST_AHEAD)
            if len(self._streams) > _STREAMS:
                self._streams.popitem(last=False)
            parts: list[bytes | memoryview] = []
            for frame, first, some in pieces:
                if frame == ZERO:
                    parts.append(bytes(some * PAGE))
                    continue
                self._cache.move_to_end(frame)
                data = memoryview(self._cache[frame])[first * PAGE :][: some * PAGE]
                if len(data) != some * PAGE:
                    raise CorruptCheckpoint(f"{path}: a run goes beyond its frame")
                parts.append(data)
            return b"".join(parts)

    def _pieces(self, path: str, item: Item, page: int, pages: int) -> list[tuple[int, int, int]]:
        """Cut pages of a memory at the bounds of frames: frame (or ZERO), first page in it, count."""
        found = []
        while pages > 0 and page * PAGE < item.size:
            run = int(np.searchsorted(self._places[path], page, "right")) - 1
            start, count = map(int, item.runs[run])
            skip = page - int(self._places[path][run])
            some = min(pages, count - skip)
            if start == ZERO:
                found.append((ZERO, 0, some))
            else:
                frame, first = divmod(start + skip, FRAME_PAGES)
                some = min(some, FRAME_PAGES - first)
                found.append((frame, first, some))
            page, pages = page + some, pages - some
        return found

    def _fetch(self, frames: Set[int], ahead: Iterable[tuple[int, int, int]]) -> None:
        """Have *frames* in the cache; if any of them is missing fetch those of *ahead* with them."""
        missing = {frame for frame in frames if frame not in self._cache}
        if not missing:
            return
        missing |= {frame for frame, _, _ in ahead if frame != ZERO and frame not in self._cache}
        for found, plain in self._frames.read(np.array(sorted(missing))):
            self._cache[found] = plain
        if not frames <= self._cache.keys():
            raise StoreUnavailable("a frame did not arrive")
        for frame in frames:
            self._cache.move_to_end(frame)
        while len(self._cache) > max(_CACHED, len(frames)):
            self._cache.popitem(last=False)


def _targets(number: int, item: Item) -> Numbers:
    """Return for each piece of *item*'s runs: frame, place in it, count, *number*, page of the file."""
    starts, counts = item.runs.T
    pages = np.cumsum(counts) - counts
    there = starts != ZERO
    starts, counts, pages = starts[there], counts[there], pages[there]
    if not len(starts):
        return np.empty((0, 5), np.int64)
    # A run is cut where a frame ends.
    pieces = (starts + counts - 1) // FRAME_PAGES - starts // FRAME_PAGES + 1
    run = np.repeat(np.arange(len(starts)), pieces)
    nth = np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    frame = starts[run] // FRAME_PAGES + nth
    first = np.maximum(starts[run], frame * FRAME_PAGES)
    last = np.minimum(starts[run] + counts[run], (frame + 1) * FRAME_PAGES)
    return np.stack(
        [
            frame,
            first % FRAME_PAGES,
            last - first,
            np.full(len(run), number),
            pages[run] + first - starts[run],
        ],
        axis=1,
    )


def _create(path: Path, size: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(path, flags, 0o600)
    except (FileExistsError, NotADirectoryError) as error:
        raise CorruptCheckpoint(f"{path.name}: is in the manifest twice") from error
    try:
        os.truncate(file, size)
    finally:
        os.close(file)


def _write_at(file: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(file, data, position)
        data, position = data[count:], position + count
