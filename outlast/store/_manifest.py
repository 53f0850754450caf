"""A checkpoint's manifest: which files it has, and where their bytes are (docs/store-format.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from outlast.errors import CorruptCheckpoint
from outlast.model import Checkpoint, CheckpointId, JobKey

VERSION = 0  # unstable until 1: no version reads another
LARGEST_FRAME = 1 << 20  # bytes; holes may be larger, as they take no memory

RAW, ZLIB, HOLE = "raw", "zlib", "hole"

_DIGEST_KEY = b',"sha256":"'
_TAIL = len(_DIGEST_KEY) + 64 + len(b'"}\n')


@dataclass(frozen=True)
class Frame:
    """*length* bytes of a file: at *offset* in the data file, in *stored* bytes; or all zeros, a hole."""

    codec: str
    length: int
    offset: int = 0
    stored: int = 0
    sha256: str = ""  # of the stored bytes, so that they are checked before they are unpacked


@dataclass(frozen=True)
class File:
    """One file of a checkpoint; *path* is relative, with "/" between its parts."""

    path: str
    mode: int  # the permission bits of st_mode
    size: int
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class Manifest:
    """All that a checkpoint is, but for the bytes of its files."""

    job: JobKey
    id: CheckpointId
    created: float
    data_size: int  # bytes of the data file
    files: tuple[File, ...]
    meta: Mapping[str, Any]

    def checkpoint(self) -> Checkpoint:
        """Return what callers of the store see of it."""
        return Checkpoint(
            id=self.id,
            created=self.created,
            stored_bytes=self.data_size,
            image_bytes=sum(file.size for file in self.files),
            meta=self.meta,
        )

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) in the data file of every frame with bytes there, in the files' order."""
        for file in self.files:
            for frame in file.frames:
                if frame.codec != HOLE:
                    yield frame.offset, frame.stored


def encode(manifest: Manifest) -> bytes:
    """Return the manifest file: one line of JSON whose last member is the SHA-256 of all before it."""
    body = json.dumps(
        {
            "outlast": "checkpoint",
            "version": VERSION,
            "job": str(manifest.job),
            "epoch": manifest.id.epoch,
            "seq": manifest.id.seq,
            "created": manifest.created,
            "data_size": manifest.data_size,
            "meta": dict(manifest.meta),
            "files": [
                {
                    "path": file.path,
                    "mode": file.mode,
                    "size": file.size,
                    "frames": [_frame_values(frame) for frame in file.frames],
                }
                for file in manifest.files
            ],
        },
        separators=(",", ":"),
        allow_nan=False,
    ).encode()[:-1]
    return body + _DIGEST_KEY + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def decode(data: bytes, job: JobKey, id: CheckpointId) -> Manifest:
    """Return what the manifest file of *job*'s checkpoint *id* says, every value checked.

    Raises:
        CorruptCheckpoint: it is torn or garbled, of another checkpoint or version, or it names a path
            outside of the checkpoint.
    """
    name = f"{job}: manifest of {id.name(job.job_id)}"
    body, tail = data[:-_TAIL], data[-_TAIL:]
    if tail != _DIGEST_KEY + hashlib.sha256(body).hexdigest().encode() + b'"}\n':
        raise CorruptCheckpoint(f"{name}: does not match its own digest", hint="use an older checkpoint")
    try:
        value = json.loads(data)
        if value["version"] != VERSION:
            raise CorruptCheckpoint(
                f"{name}: has version {value['version']}, and this Outlast reads {VERSION}",
                hint="use the Outlast that wrote it",
            )
        if (value["outlast"], value["job"]) != ("checkpoint", str(job)) or (value["epoch"], value["seq"]) != (
            id.epoch,
            id.seq,
        ):
            raise ValueError("belongs to another checkpoint")
        data_size = _count(value["data_size"])
        meta = value["meta"]
        if not isinstance(meta, dict):
            raise TypeError("meta is no object")
        files = tuple(_file(each, data_size) for each in value["files"])
        return Manifest(job, id, float(value["created"]), data_size, files, meta)
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise CorruptCheckpoint(f"{name}: {error}", hint="use an older checkpoint") from error


def _frame_values(frame: Frame) -> list[str | int]:
    if frame.codec == HOLE:
        return [HOLE, frame.length]
    return [frame.codec, frame.length, frame.offset, frame.stored, frame.sha256]


def _file(value: Mapping[str, Any], data_size: int) -> File:
    path, mode, size = value["path"], _count(value["mode"]), _count(value["size"])
    if not isinstance(path, str) or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"{path!r} is no path inside of a checkpoint")
    frames = tuple(_frame(each, data_size) for each in value["frames"])
    if sum(frame.length for frame in frames) != size:
        raise ValueError(f"the frames of {path!r} do not add up to its size")
    return File(path, mode & 0o777, size, frames)


def _frame(value: list[Any], data_size: int) -> Frame:
    codec, length = value[0], _count(value[1])
    if codec == HOLE and length > 0:
        return Frame(HOLE, length)
    _, _, offset, stored, sha256 = value
    frame = Frame(codec, length, _count(offset), _count(stored), sha256)
    if codec not in (RAW, ZLIB) or not 0 < length <= LARGEST_FRAME or not 0 < frame.stored <= LARGEST_FRAME:
        raise ValueError(f"{value!r} is no frame")
    if codec == RAW and frame.stored != length:
        raise ValueError(f"{value!r} is no raw frame")
    if frame.offset + frame.stored > data_size:
        raise ValueError(f"{value!r} lies beyond the data")
    return frame


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
