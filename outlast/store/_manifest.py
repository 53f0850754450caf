"""A checkpoint's manifest: which files it has, and where their pages lie (docs/store-format.md)."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from outlast.errors import CorruptCheckpoint
from outlast.model import Checkpoint, CheckpointId, JobKey
from outlast.store._keys import SALT, Keyring
from outlast.store._pack import seal, unseal
from outlast.store._pages import FRAME_PAGES, PAGE, Numbers, Spaces

VERSION = 1
LARGEST_BODY = 1 << 30  # bytes, unpacked: some 90 million runs

# What the header tells without a key: enough to list checkpoints, nothing of what the job does.
PUBLIC = ("node", "epoch", "seq", "time", "uid", "pause_ms", "criu", "mode", "interval", "auto")

_SIZES = struct.Struct("<QQQQ")  # bytes of JSON; spaces, runs, frames
_PACK_NAME = re.compile(r"[0-9]+-[0-9]+-[0-9]+-[0-9a-f]{12}")


@dataclass(frozen=True)
class Pack:
    """A pack that a checkpoint needs: its name, the salt and id of its key, its size in bytes."""

    name: str
    salt: bytes
    key_id: str
    size: int


@dataclass(frozen=True)
class Item:
    """One file of a checkpoint. *path* is relative, with "/" between its parts.

    *spaces*: for a memory, of shape (n, 3): which address space, from which virtual address on, how many
    pages, in the order of the file; for any other file of shape (0, 3). *runs*, of shape (n, 2): where the
    file's pages lie, first place and count; a place is (index in `Manifest.frames`) * FRAME_PAGES + the
    page's place in that frame.
    """

    path: str
    mode: int
    size: int
    spaces: Spaces
    runs: Numbers


@dataclass(frozen=True)
class Manifest:
    """All that a checkpoint is, but for the bytes of its pages.

    *frames*, of shape (n, 5): index of the pack, the frame's number in it, offset, stored length, pages.
    """

    job: JobKey
    id: CheckpointId
    created: float
    stored_bytes: int  # that this checkpoint added to the store, without the manifest
    image_bytes: int
    packs: tuple[Pack, ...]
    frames: Numbers
    items: tuple[Item, ...]
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Header:
    """What a manifest says to those who have no key: nothing of it is proven without one."""

    id: CheckpointId
    created: float
    stored_bytes: int
    image_bytes: int
    packs: Mapping[str, int]  # name: size
    meta: Mapping[str, Any]
    size: int  # of the manifest itself, in bytes
    key_id: str

    def checkpoint(self) -> Checkpoint:
        """Return what callers of the store see of it."""
        return Checkpoint(self.id, self.created, self.stored_bytes + self.size, self.image_bytes, self.meta)


def purpose(job: JobKey, id: CheckpointId) -> str:
    """Return what a manifest's key is for: no other manifest, of whatever job, can be put in its place."""
    return f"outlast manifest 1\n{job}\n{id.epoch}-{id.seq}"


def pack_purpose(job: JobKey, name: str) -> str:
    """Return what a pack's key is for."""
    return f"outlast pack 1\n{job}\n{name}"


def encode(manifest: Manifest, keyring: Keyring) -> bytes:
    """Return the manifest file: a line of JSON for everybody, then the rest, sealed together with it."""
    salt = os.urandom(SALT)
    values = {
        "outlast": "checkpoint",
        "version": VERSION,
        "job": str(manifest.job),
        "epoch": manifest.id.epoch,
        "seq": manifest.id.seq,
        "created": manifest.created,
        "stored_bytes": manifest.stored_bytes,
        "image_bytes": manifest.image_bytes,
        "packs": {pack.name: pack.size for pack in manifest.packs},
        "meta": {key: manifest.meta[key] for key in PUBLIC if key in manifest.meta},
        "key": keyring.newest,
        "salt": salt.hex(),
    }
    header = json.dumps(values, separators=(",", ":")).encode() + b"\n"
    inner = {
        "meta": {key: value for key, value in manifest.meta.items() if key not in PUBLIC},
        "packs": [[pack.name, pack.salt.hex(), pack.key_id, pack.size] for pack in manifest.packs],
        "items": [
            [item.path, item.mode, item.size, len(item.spaces), len(item.runs)] for item in manifest.items
        ],
    }
    text = json.dumps(inner, separators=(",", ":")).encode()
    spaces = np.concatenate([np.empty((0, 3), np.uint64), *(item.spaces for item in manifest.items)])
    runs = np.concatenate([np.empty((0, 2), np.int64), *(item.runs for item in manifest.items)])
    body = b"".join(
        (
            _SIZES.pack(len(text), len(spaces), len(runs), len(manifest.frames)),
            text,
            # By columns: numbers of a kind stand together, and pack to a fraction.
            np.ascontiguousarray(spaces.T).astype("<u8").tobytes(),
            np.ascontiguousarray(runs.T).astype("<i8").tobytes(),
            np.ascontiguousarray(manifest.frames.T).astype("<i8").tobytes(),
        )
    )
    cipher = keyring.cipher(keyring.newest, salt, purpose(manifest.job, manifest.id))
    return header + seal(cipher, 0, body, header)


def decode_header(data: bytes, job: JobKey, id: CheckpointId) -> Header:
    """Return what the manifest file *data* says to everybody.

    Raises:
        CorruptCheckpoint: it is no manifest of checkpoint *id* of *job* of this version.
    """
    return _header(data, job, id)[1]


def decode(data: bytes, job: JobKey, id: CheckpointId, keyring: Keyring) -> Manifest:
    """Return the manifest of checkpoint *id* of *job*, every value of it checked.

    Raises:
        CorruptCheckpoint: *data* is not what was published under that name.
        KeyMissing: it is encrypted with a key that is not in *keyring*.
    """
    what = f"{job}: manifest of {id.name(job.job_id)}"
    line, header = _header(data, job, id)
    values = json.loads(line)
    try:
        salt = bytes.fromhex(values["salt"])
    except (KeyError, TypeError, ValueError):
        raise CorruptCheckpoint(f"{what}: names no salt") from None
    cipher = keyring.cipher(header.key_id, salt, purpose(job, id))
    body = unseal(cipher, 0, data[len(line) :], largest=LARGEST_BODY, what=what, header=line)
    # From here on the bytes are those that a holder of the key wrote. What it wrote must make sense all
    # the same: a fault of it must not become one of this node.
    try:
        return _body(body, job, header)
    except (KeyError, TypeError, ValueError, IndexError, struct.error) as error:
        raise CorruptCheckpoint(f"{what}: makes no sense: {error}") from error


def _header(data: bytes, job: JobKey, id: CheckpointId) -> tuple[bytes, Header]:
    what = f"{job}: manifest of {id.name(job.job_id)}"
    end = data.find(b"\n") + 1
    try:
        values = json.loads(data[:end])
        if values["outlast"] != "checkpoint":
            raise ValueError("no checkpoint")
        if values["version"] != VERSION:
            raise CorruptCheckpoint(
                f"{what}: is of version {values['version']}, and this Outlast reads {VERSION}"
            )
        if (values["job"], values["epoch"], values["seq"]) != (str(job), id.epoch, id.seq):
            raise CorruptCheckpoint(f"{what}: is that of {values['job']}, {values['epoch']}-{values['seq']}")
        packs = {str(name): int(size) for name, size in values["packs"].items()}
        if not all(map(_PACK_NAME.fullmatch, packs)):
            raise ValueError("a pack has no pack's name")
        header = Header(
            id,
            float(values["created"]),
            int(values["stored_bytes"]),
            int(values["image_bytes"]),
            packs,
            dict(values["meta"]),
            len(data),
            str(values["key"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{what}: no manifest: {error}") from None
    return data[:end], header


def _body(body: bytes, job: JobKey, header: Header) -> Manifest:
    length, n_spaces, n_runs, n_frames = _SIZES.unpack_from(body)
    position = _SIZES.size + length
    if len(body) != position + 8 * (3 * n_spaces + 2 * n_runs + 5 * n_frames):
        raise ValueError("its parts have not the length that it says")
    inner = json.loads(body[_SIZES.size : position])
    spaces = _columns(body, position, n_spaces, 3).astype(np.uint64)
    runs = _columns(body, position + 24 * n_spaces, n_runs, 2)
    frames = _columns(body, position + 24 * n_spaces + 16 * n_runs, n_frames, 5)
    packs = tuple(
        Pack(str(name), bytes.fromhex(salt), str(key), int(size)) for name, salt, key, size in inner["packs"]
    )
    if {pack.name: pack.size for pack in packs} != header.packs:
        raise ValueError("its two lists of packs differ")
    _check_frames(frames, packs)
    items = []
    at_space = at_run = 0
    for path, mode, size, count, run_count in inner["items"]:
        item = Item(
            _path(path),
            int(mode) & 0o777,
            int(size),
            spaces[at_space : at_space + count],
            runs[at_run : at_run + run_count],
        )
        at_space, at_run = at_space + count, at_run + run_count
        _check_item(item, frames)
        items.append(item)
    if (at_space, at_run) != (n_spaces, n_runs) or len({item.path for item in items}) != len(items):
        raise ValueError("its files do not add up")
    meta = {**header.meta, **inner["meta"]}
    return Manifest(
        job,
        header.id,
        header.created,
        header.stored_bytes,
        header.image_bytes,
        packs,
        frames,
        tuple(items),
        meta,
    )


def _check_frames(frames: Numbers, packs: tuple[Pack, ...]) -> None:
    if not len(frames):
        return
    pack, number, offset, length, pages = frames.T
    sizes = np.array([one.size for one in packs], np.int64)
    if (frames < 0).any() or pack.max() >= len(packs) or number.max() >= 1 << 32:
        raise ValueError("a frame lies nowhere")
    if (offset + length > sizes[pack]).any() or pages.max() > FRAME_PAGES or length.min() < 1:
        raise ValueError("a frame goes beyond its pack")


def _check_item(item: Item, frames: Numbers) -> None:
    if item.size < 0 or (item.runs[:, 1] < 1).any():
        raise ValueError(f"{item.path}: a run of nothing")
    if int(item.runs[:, 1].sum()) != -(-item.size // PAGE):
        raise ValueError(f"{item.path}: its pages are not as many as its size says")
    if (item.spaces[:, 2] >= 1 << 40).any():
        raise ValueError(f"{item.path}: more pages than there can be")
    if len(item.spaces) and int(item.spaces[:, 2].sum()) * PAGE != item.size:
        raise ValueError(f"{item.path}: its address spaces are not as large as it is")
    starts, counts = item.runs.T
    stored = starts >= 0
    if (starts < -1).any() or (starts[stored] + counts[stored] > len(frames) * FRAME_PAGES).any():
        raise ValueError(f"{item.path}: a run lies nowhere")


def _path(value: object) -> str:
    """Return *value*, if it is the path of a file below a directory, whatever that directory is."""
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("a path is no path")
    if any(part in ("", ".", "..") for part in value.split("/")):
        raise ValueError(f"the path {value!r} leads elsewhere")
    return value


def _columns(data: bytes, position: int, rows: int, width: int) -> Numbers:
    flat = np.frombuffer(data, "<i8", rows * width, position).astype(np.int64)
    return np.ascontiguousarray(flat.reshape(width, rows).T)
