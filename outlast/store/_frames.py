"""Files into frames and back: cut, compressed, digested, in bounded memory whatever their size."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import logging
import os
import stat
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from outlast.errors import CorruptCheckpoint, OutlastError
from outlast.store._manifest import HOLE, RAW, ZLIB, File, Frame, Manifest

_log = logging.getLogger(__name__)

# 255 pages: below the format's 1 MiB, and four full requests of an OpenSSH server.
_FRAME = 255 * 4096
_ZEROS = bytes(_FRAME)
_SAMPLE = 4096  # bytes at three places of a frame that tell whether compressing it is worth the time
_WORTH = 0.95  # of its size: what a frame must come down to

_WORKERS = 2  # zlib and hashlib run beside each other; more would take the job's own cores
_AHEAD = 8  # frames that are in memory between reading and sending

_Packed = tuple[str, int, bytes, str]  # codec, length, stored bytes, their SHA-256
T = TypeVar("T")


def pack(source: Path, files: list[File]) -> Generator[bytes, None, None]:
    """Yield the data file of a checkpoint of all regular files below *source*; append each to *files*.

    *files* is whole when the generator ends. Holes and zeros take no bytes in the data file.

    Raises:
        OutlastError: a file of the directory cannot be read.
    """
    offset = 0
    with ThreadPoolExecutor(_WORKERS, "pack") as pool:
        for path in _regular_files(source):
            frames: list[Frame] = []
            try:
                with _opened(path) as file:
                    mode = stat.S_IMODE(os.fstat(file).st_mode)
                    for codec, length, stored, digest in _ahead(pool, _pieces(file)):
                        if codec == HOLE and frames and frames[-1].codec == HOLE:
                            frames[-1] = Frame(HOLE, frames[-1].length + length)
                            continue
                        frames.append(Frame(codec, length, offset if stored else 0, len(stored), digest))
                        offset += len(stored)
                        if stored:
                            yield stored
            except OSError as error:
                raise OutlastError(f"{path}: {error.strerror}") from error
            size = sum(frame.length for frame in frames)
            files.append(File(path.relative_to(source).as_posix(), mode, size, tuple(frames)))


def unpack(manifest: Manifest, stored: Iterator[bytes], into: Path) -> None:
    """Write the files of *manifest* below the empty directory *into*; *stored* yields its ranges().

    Raises:
        CorruptCheckpoint: a frame does not have its digest, or does not unpack to its length.
        OutlastError: *into* cannot be written.
    """
    with ThreadPoolExecutor(_WORKERS, "unpack") as pool:
        for entry in manifest.files:
            path = into / entry.path
            try:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                file = os.open(
                    path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
                )
            except (FileExistsError, NotADirectoryError) as error:
                raise CorruptCheckpoint(f"{entry.path}: is in the manifest twice") from error
            except OSError as error:
                raise _cannot_write(path, error) from error
            try:
                os.truncate(file, entry.size)
                position = 0
                jobs = (_unpacking(frame, stored) for frame in entry.frames)
                for frame, data in zip(entry.frames, _ahead(pool, jobs), strict=True):
                    _write_at(file, data, position)
                    position += frame.length
                os.fchmod(file, entry.mode)
            except OSError as error:
                raise _cannot_write(path, error) from error
            finally:
                os.close(file)


def _ahead(pool: ThreadPoolExecutor, jobs: Iterator[Callable[[], T]]) -> Iterator[T]:
    """Yield the results of *jobs* in order, while the next few are under way."""
    under_way: deque[Future[T]] = deque()
    try:
        for job in jobs:
            if len(under_way) >= _AHEAD:
                yield under_way.popleft().result()
            under_way.append(pool.submit(job))
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


def _regular_files(source: Path) -> Iterator[Path]:
    """Yield them, always in the same order; sockets, links and the like are left out, and logged."""

    def fail(error: OSError) -> None:
        raise OutlastError(f"{error.filename}: {error.strerror}") from error

    for directory, subdirectories, names in os.walk(source, onerror=fail):
        subdirectories.sort()
        for path in (Path(directory, name) for name in sorted(names)):
            if stat.S_ISREG(path.lstat().st_mode):
                yield path
            else:
                _log.warning("%s: not a regular file, left out of the checkpoint", path)


def _pieces(file: int) -> Iterator[Callable[[], _Packed]]:
    """Cut an open file; each piece, when called, packs itself."""
    position = 0
    while True:
        try:
            start = os.lseek(file, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            start = os.lseek(file, 0, os.SEEK_END)  # no more data up to the end
            if start > position:
                yield functools.partial(_hole, start - position)
            return
        if start > position:
            yield functools.partial(_hole, start - position)
        end = os.lseek(file, start, os.SEEK_HOLE)
        for position in range(start, end, _FRAME):
            yield functools.partial(_pack, os.pread(file, min(_FRAME, end - position), position))
        position = end


def _hole(length: int) -> _Packed:
    return HOLE, length, b"", ""


def _pack(data: bytes) -> _Packed:
    if data == _ZEROS[: len(data)]:
        return _hole(len(data))
    middle = len(data) // 2
    sample = data[:_SAMPLE] + data[middle : middle + _SAMPLE] + data[-_SAMPLE:]
    codec, stored = RAW, data
    if len(zlib.compress(sample, 1)) < _WORTH * len(sample):
        packed = zlib.compress(data, 1)
        if len(packed) < _WORTH * len(data):
            codec, stored = ZLIB, packed
    return codec, len(data), stored, hashlib.sha256(stored).hexdigest()


def _unpacking(frame: Frame, stored: Iterator[bytes]) -> Callable[[], bytes]:
    return functools.partial(_unpack, frame, b"" if frame.codec == HOLE else next(stored))


def _unpack(frame: Frame, stored: bytes) -> bytes:
    """Return the frame's bytes; none for a hole, which the file has already."""
    if frame.codec == HOLE:
        return b""
    if hashlib.sha256(stored).hexdigest() != frame.sha256:
        raise CorruptCheckpoint(
            f"data at {frame.offset}: does not match its digest in the manifest",
            hint="use an older checkpoint",
        )
    if frame.codec == RAW:
        return stored
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(stored, frame.length)
        whole = unpacker.eof or not unpacker.decompress(unpacker.unconsumed_tail, 1)
    except zlib.error as error:
        raise CorruptCheckpoint(f"data at {frame.offset}: {error}") from error
    if len(data) != frame.length or not whole:
        raise CorruptCheckpoint(f"data at {frame.offset}: does not unpack to {frame.length} bytes")
    return data


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)


def _write_at(file: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, position)
        view, position = view[count:], position + count


def _cannot_write(path: Path, error: OSError) -> OutlastError:
    return OutlastError(f"{path}: {error.strerror}", hint="look at free space and permissions on this node")
