"""A job's checkpoints in a store: publish, list, read, forget (docs/store-format.md)."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import secrets
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outlast.errors import (
    ConfigError,
    CorruptCheckpoint,
    OutlastError,
    StoreRefused,
    StoreUnavailable,
    UsageError,
)
from outlast.model import Checkpoint, CheckpointId, JobKey
from outlast.store._backend import Backend, Entry
from outlast.store._keys import KeyMissing, Keyring
from outlast.store._manifest import Header, Manifest, Pack, decode, decode_header, encode, pack_purpose
from outlast.store._pack import FOOTER, Trailer, decode_trailer, trailer_range
from outlast.store._pages import PAGE
from outlast.store._quota import Quota, Room
from outlast.store._reader import Frames, Stored, pack_path, write_files
from outlast.store._source import Memory
from outlast.store._writer import Gatherer, Known, PackWriter, finish_items, known_from, new_salt

_log = logging.getLogger(__name__)

_MANIFEST = re.compile(r"(?P<epoch>0|[1-9][0-9]*)-(?P<seq>0|[1-9][0-9]*)\.ck(?P<rest>\.[0-9a-f]+\.tmp)?")
_PACK = re.compile(
    r"(?P<epoch>0|[1-9][0-9]*)-(?P<seq>0|[1-9][0-9]*)-[0-9]+-[0-9a-f]{12}\.pack(\.[0-9a-f]+\.tmp)?"
)
_JOBS_KNOWN = 1000  # jobs whose manifests' headers are remembered


class Checkpoints:
    """The checkpoints of all jobs; without a key they can only be listed."""

    def __init__(self, backend: Backend, keyring: Keyring | ConfigError, quota: Quota) -> None:
        """*keyring*: the keys, or why there are none here; then only listing works."""
        self._backend = backend
        self.room = Room(backend, quota)
        self._keys = keyring
        self._headers: dict[JobKey, dict[Entry, Header]] = {}
        self._writing: tuple[JobKey, Known] | None = None  # a store writes one job's checkpoints at a time

    def publish(
        self,
        job: JobKey,
        id: CheckpointId,
        source: Path,
        meta: Mapping[str, Any],
        memories: Sequence[Memory] = (),
    ) -> Checkpoint:
        """See `Store.publish`."""
        if self._backend.entry(_manifest_path(job, id)) is not None:
            raise _taken(job, id)
        inherited = self._writing is None or self._writing[0] != job
        known = self._known(job)
        gatherer = Gatherer(known, source, memories)
        owner = meta.get("uid")
        before = len(known.packs)
        shipped = 0
        try:
            while not gatherer.drained:
                shipped += self._publish_pack(job, id, gatherer, known, owner)
            items, frames, packs, live, total = finish_items(gatherer, known)
            if inherited:
                self._assert_there(job, packs)
            manifest = Manifest(job, id, time.time(), shipped, total, packs, frames, items, meta)
            data = encode(manifest, self._keyring)
            self._backend.create(_manifest_path(job, id), self.room.within(job, owner, [data]))
        except FileExistsError:
            self._take_back(job, known.packs[before:])
            raise _taken(job, id) from None
        except StoreRefused:
            # There is no room, and what this attempt has stored takes it from others.
            self._take_back(job, known.packs[before:])
            raise
        finally:
            # What has been stored stays of use, whatever became of the rest.
            known.table.settle()
        known.drop_sparse(live)
        self.room.note(job, owner)
        return Checkpoint(id, manifest.created, shipped + len(data), total, meta)

    def _assert_there(self, job: JobKey, packs: Iterable[Pack]) -> None:
        """Refuse to refer to a pack that went away since the newest manifest was read: see `forget`.

        Only a run that was to be over could have taken it, and only from another run's first checkpoint.
        """
        there = {entry.name for entry in self._backend.list(_directory(job, "packs"))}
        for pack in packs:
            if f"{pack.name}.pack" not in there:
                self._writing = None
                raise StoreUnavailable(f"{job}: pack {pack.name} was removed meanwhile by another run")

    def _take_back(self, job: JobKey, packs: Sequence[Pack]) -> None:
        """Remove *packs*, which no manifest names; what cannot be removed now, `forget` finds."""
        self._writing = None
        with contextlib.suppress(StoreUnavailable, StoreRefused):
            for pack in packs:
                self._backend.remove(pack_path(job, pack.name))

    def _publish_pack(
        self, job: JobKey, id: CheckpointId, gatherer: Gatherer, known: Known, owner: object
    ) -> int:
        """Store the next pack of what *gatherer* finds; return its size, 0 if nothing more was new."""
        if not gatherer.more():
            return 0
        number = len(known.packs)
        name = f"{id.epoch}-{id.seq}-{number}-{secrets.token_hex(6)}"
        salt = new_salt()
        keyring = self._keyring
        writer = PackWriter(
            name, gatherer, keyring.cipher(keyring.newest, salt, pack_purpose(job, name)), salt, keyring
        )
        with contextlib.closing(writer.stream()) as chunks:
            size = self._backend.create(pack_path(job, name), self.room.within(job, owner, chunks))
        writer.finish(known)
        return size

    def _known(self, job: JobKey) -> Known:
        """Return what is known of *job*'s packs; the first time it is read from the newest checkpoint."""
        if self._writing is not None and self._writing[0] == job:
            return self._writing[1]
        known = Known()
        for checkpoint in self.complete(job):
            try:
                manifest = self.manifest(job, checkpoint.id)
                with contextlib.closing(self._trailers(job, manifest)) as trailers:
                    known = known_from(manifest, trailers)
                break
            except (CorruptCheckpoint, FileNotFoundError) as error:
                _log.warning("pages of an older checkpoint are shipped again: %s", error)
        self._writing = (job, known)
        return known

    def _trailers(self, job: JobKey, manifest: Manifest) -> Generator[Trailer, None, None]:
        """Yield the trailers of all packs of *manifest*: two looks at all of them, not at one after the other."""
        packs = manifest.packs
        names = [f"{job}: pack {pack.name}" for pack in packs]
        paths = [pack_path(job, pack.name) for pack in packs]
        ends = [(path, pack.size - FOOTER, FOOTER) for path, pack in zip(paths, packs, strict=True)]
        try:
            with contextlib.closing(self._backend.read_each(ends)) as footers:
                places = [
                    (path, *trailer_range(footer, pack.size, what))
                    for path, pack, what, footer in zip(paths, packs, names, footers, strict=True)
                ]
            with contextlib.closing(self._backend.read_each(places)) as trailers:
                for pack, what, stored in zip(packs, names, trailers, strict=True):
                    cipher = self._keyring.cipher(pack.key_id, pack.salt, pack_purpose(job, pack.name))
                    yield decode_trailer(cipher, stored, what)
        except EOFError as error:
            raise CorruptCheckpoint(f"{job}: a pack is torn: {error}") from error

    def complete(self, job: JobKey) -> list[Checkpoint]:
        """See `Store.checkpoints`."""
        return [header.checkpoint() for header in self._list(job)]

    def _list(self, job: JobKey, *, strict: bool = False) -> list[Header]:
        """Return the headers of the complete checkpoints of *job*, newest first.

        Raises:
            KeyMissing: there are some that this node has not the key of, and either none is complete (who
                took that for a job without checkpoints would begin it again), or it is to be *strict*.
        """
        entries = [entry for entry in self._backend.list(_directory(job, "ckpt")) if not entry.is_directory]
        if not entries:
            return []
        sizes = {entry.name: entry.size for entry in self._backend.list(_directory(job, "packs"))}
        known = self._headers.get(job, {})
        found: dict[Entry, Header] = {}
        missing: KeyMissing | None = None
        for entry in entries:
            match = _MANIFEST.fullmatch(entry.name)
            if match is None or match["rest"]:
                continue
            id = CheckpointId(int(match["epoch"]), int(match["seq"]))
            try:
                header = known.get(entry) or self._header(job, id)
                self._check_packs(job, id, header, sizes)
            except FileNotFoundError:
                continue  # forgotten since the listing
            except KeyMissing as error:
                _log.warning("left out: %s: %s", id.name(job.job_id), error)
                missing = error
                continue
            except CorruptCheckpoint as error:
                _log.warning("left out: %s", error)
                continue
            found[entry] = header
        if missing is not None and (strict or not found):
            raise missing
        if len(self._headers) >= _JOBS_KNOWN:
            self._headers.clear()
        self._headers[job] = found
        return sorted(found.values(), key=lambda header: header.id, reverse=True)

    def _check_packs(self, job: JobKey, id: CheckpointId, header: Header, sizes: Mapping[str, int]) -> None:
        for name, size in header.packs.items():
            if sizes.get(f"{name}.pack") != size:
                if self._writing is not None and self._writing[0] == job:
                    self._writing = None  # it may know of this pack; it must not refer to it once more
                raise CorruptCheckpoint(f"{id.name(job.job_id)}: pack {name}: missing or torn")

    def _header(self, job: JobKey, id: CheckpointId) -> Header:
        """Return a manifest's header; with a key, only if all of the manifest is what was published."""
        data = self._backend.read(_manifest_path(job, id))
        header = decode_header(data, job, id)
        if not isinstance(self._keys, Keyring):
            return header
        manifest = decode(data, job, id, self._keys)
        return dataclasses.replace(header, meta=manifest.meta)

    def manifest(self, job: JobKey, id: CheckpointId) -> Manifest:
        """Return the manifest of checkpoint *id*. Raises FileNotFoundError, CorruptCheckpoint."""
        return decode(self._backend.read(_manifest_path(job, id)), job, id, self._keyring)

    def fetch(self, job: JobKey, id: CheckpointId, into: Path) -> None:
        """See `Store.fetch`."""
        if into.exists() or into.is_symlink():
            raise UsageError(f"{into}: exists", hint="name a directory that does not exist yet")
        manifest = self._open(job, id)
        partial = into.with_name(f".{into.name}.{uuid.uuid4().hex[:12]}")
        try:
            partial.mkdir(mode=0o700)
        except OSError as error:
            raise OutlastError(f"{partial}: {error.strerror}") from error
        try:
            write_files(Frames(self._backend, manifest, self._keyring), manifest.items, partial)
            partial.rename(into)
        except OSError as error:
            raise OutlastError(f"{into}: {error.strerror}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def open(self, job: JobKey, id: CheckpointId) -> Stored:
        """See `Store.open`."""
        manifest = self._open(job, id)
        return Stored(Frames(self._backend, manifest, self._keyring), manifest)

    def published(self, job: JobKey) -> list[CheckpointId]:
        """See `Store.published`."""
        matches = (_MANIFEST.fullmatch(entry.name) for entry in self._backend.list(_directory(job, "ckpt")))
        found = (CheckpointId(int(m["epoch"]), int(m["seq"])) for m in matches if m and not m["rest"])
        return sorted(found, reverse=True)

    def verify(
        self, job: JobKey, id: CheckpointId, *, read_data: bool, progress: Callable[[int, int], None]
    ) -> int:
        """See `Store.verify`."""
        manifest = self._open(job, id)
        sizes = {entry.name: entry.size for entry in self._backend.list(_directory(job, "packs"))}
        for pack in manifest.packs:
            if sizes.get(f"{pack.name}.pack") != pack.size:
                raise CorruptCheckpoint(f"{id.name(job.job_id)}: pack {pack.name}: missing or torn")
        if not read_data:
            return 0
        frames = Frames(self._backend, manifest, self._keyring)
        pages = 0
        for number, (_, plain) in enumerate(frames.read(np.arange(len(manifest.frames)))):
            progress(number, len(manifest.frames))
            pages += len(plain) // PAGE
        progress(len(manifest.frames), len(manifest.frames))
        return pages

    def _open(self, job: JobKey, id: CheckpointId) -> Manifest:
        try:
            return self.manifest(job, id)
        except FileNotFoundError:
            raise UsageError(f"{id.name(job.job_id)}: no such checkpoint") from None

    def forget(self, job: JobKey, keep: Callable[[Sequence[Checkpoint]], Iterable[CheckpointId]]) -> int:
        """Remove the complete checkpoints of *job* but the newest and those that *keep* chooses.

        Manifests go first, then what no manifest needs and no writer of this store means to use. Whatever
        belongs to a later run, or to a checkpoint newer than the newest complete one, stays: it may be under
        way. Returns how many checkpoints went.
        """
        if not isinstance(self._keys, Keyring):
            raise self._keys  # a forged manifest could pass for the newest
        headers = self._list(job, strict=True)
        if not headers:
            return 0
        newest = headers[0].id
        kept = {newest, *keep([header.checkpoint() for header in headers])}
        count = 0
        for entry in self._backend.list(_directory(job, "ckpt")):
            match = _MANIFEST.fullmatch(entry.name)
            if match is None:
                continue
            id = CheckpointId(int(match["epoch"]), int(match["seq"]))
            if id > newest or (id in kept and not match["rest"]):
                continue
            gone = self._backend.remove(f"{_directory(job, 'ckpt')}/{entry.name}")
            count += gone and any(header.id == id for header in headers)
        self._headers.pop(job, None)
        needed = {name for header in headers if header.id in kept for name in header.packs}
        if self._writing is not None and self._writing[0] == job:
            needed |= {pack.name for pack in self._writing[1].packs}
        for entry in self._backend.list(_directory(job, "packs")):
            match = _PACK.fullmatch(entry.name)
            if match is None or entry.name.removesuffix(".pack") in needed:
                continue
            if CheckpointId(int(match["epoch"]), int(match["seq"])) <= newest:
                self._backend.remove(f"{_directory(job, 'packs')}/{entry.name}")
        self.room.note(job)
        return count

    def forget_writer(self, job: JobKey) -> None:
        """Forget what is known of *job*: what is stored under its name is now another's."""
        self._headers.pop(job, None)
        if self._writing is not None and self._writing[0] == job:
            self._writing = None

    @property
    def _keyring(self) -> Keyring:
        if not isinstance(self._keys, Keyring):
            raise self._keys
        return self._keys


def _directory(job: JobKey, kind: str) -> str:
    return f"jobs/{job.cluster}/{job.job_id}/{kind}"


def _manifest_path(job: JobKey, id: CheckpointId) -> str:
    return f"{_directory(job, 'ckpt')}/{id.epoch}-{id.seq}.ck"


def _taken(job: JobKey, id: CheckpointId) -> StoreRefused:
    return StoreRefused(f"{job}: checkpoint {id.name(job.job_id)} exists", hint="use the next number")
