"""What the manager, the watcher and the command line see of a store."""

from __future__ import annotations

import json
import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from outlast.errors import ConfigError, UsageError
from outlast.model import Checkpoint, CheckpointId, JobKey, Lease, LeaseView
from outlast.store import _records
from outlast.store._backend import Backend
from outlast.store._checkpoints import Checkpoints
from outlast.store._format import Marked
from outlast.store._keys import Keyring
from outlast.store._leases import Leases
from outlast.store._reader import Stored
from outlast.store._source import Memory
from outlast.store._upkeep import Pruned, Upkeep, Usage

_log = logging.getLogger(__name__)

_SMALL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")


class Store:
    """The checkpoints, records, events, requests and leases of jobs, kept as docs/store-format.md says.

    Not shared between threads: each opens its own. Every method may raise StoreUnavailable (no answer;
    the next call connects anew) and StoreRefused (the store said no, and would again). After a
    StoreUnavailable it is unknown whether the call took effect.
    """

    def __init__(self, backend: Backend, keyring: Keyring | ConfigError, quota: int = 0) -> None:
        """*keyring*: the data keys, or why there are none here: checkpoints can then only be listed.

        *quota*: bytes that a job may have here, 0 for any number.
        """
        backend = self._backend = cast(Backend, Marked(backend))
        self._keyring = keyring
        self._checkpoints = Checkpoints(backend, keyring, quota)
        self._upkeep = Upkeep(backend)
        self._leases = Leases(backend)
        self._appending: set[str] = set()  # event streams whose last line is surely whole
        self._taken: dict[JobKey, list[Mapping[str, Any]]] = {}  # requests read, and not yet returned

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, if there is one."""
        self._backend.close()

    def require_key(self) -> None:
        """Raise ConfigError where there is no data key: checkpoints can then only be listed."""
        if not isinstance(self._keyring, Keyring):
            raise self._keyring

    # --- checkpoints ------------------------------------------------------------------------------

    def publish(
        self,
        job: JobKey,
        id: CheckpointId,
        source: Path,
        meta: Mapping[str, Any],
        memories: Sequence[Memory] = (),
    ) -> Checkpoint:
        """Store every regular file below the directory *source*, and *memories*, as checkpoint *id* of *job*.

        Pages that the job's earlier checkpoints have are not stored again, and zero pages never are. The
        manifest goes last: afterwards the checkpoint is there and complete, or not there at all; it is on the
        server's disk. Memory stays below some 80 MiB, plus 24 bytes for each page of the job.

        Args:
            meta: JSON values, given back by `checkpoints`. What says nothing of the job's work (see
                `_manifest.PUBLIC`) can be read without the key.
            memories: files that need not exist; none of them is below *source*.

        Raises:
            StoreRefused: there is such a checkpoint, or the store has no room.
            StoreUnavailable: calling it again goes on where it broke off: finished packs are used.
            OutlastError: *source* or a memory cannot be read.
        """
        return self._checkpoints.publish(job, id, source, meta, memories)

    def checkpoints(self, job: JobKey) -> list[Checkpoint]:
        """Return the complete checkpoints of *job*, newest first.

        Complete: the manifest is what was published, as far as the key is here to tell, and its packs are
        there and as long as they should be. Others are left out, and logged. Pages are verified by `fetch`.
        """
        return self._checkpoints.complete(job)

    def fetch(self, job: JobKey, id: CheckpointId, into: Path) -> None:
        """Make the directory *into*, mode 0700, with all files of the checkpoint *id*, every byte verified.

        *into* appears at once and complete, by a rename within its parent directory, which must exist.

        Raises:
            UsageError: there is no such checkpoint, or *into* exists.
            CorruptCheckpoint: stored bytes are not what was published; go on with an older checkpoint.
            OutlastError: *into* cannot be written.
        """
        self._checkpoints.fetch(job, id, into)

    def open(self, job: JobKey, id: CheckpointId) -> Stored:
        """Return checkpoint *id* for the reading of single pages. Raises UsageError, CorruptCheckpoint.

        While it is read, this store serves nothing else.
        """
        return self._checkpoints.open(job, id)

    def published(self, job: JobKey) -> list[CheckpointId]:
        """Return the ids of all checkpoints of *job* that have a manifest, good or not, newest first."""
        return self._checkpoints.published(job)

    def verify(self, job: JobKey, id: CheckpointId, *, read_data: bool = True) -> int:
        """Verify checkpoint *id*: with *read_data* every stored page, else its manifest and its packs' sizes.

        Returns how many pages were read. Raises CorruptCheckpoint, or UsageError where there is none.
        """
        return self._checkpoints.verify(job, id, read_data=read_data)

    def forget(
        self,
        job: JobKey,
        keep: int,
        also: Callable[[Sequence[Checkpoint]], Iterable[CheckpointId]] = lambda _: (),
    ) -> int:
        """Remove all but the newest *keep* (at least 1) complete checkpoints and those that are pinned.

        A checkpoint goes manifest first, so that none is ever seen without its pages. Leftovers of writing
        that broke off go too, unless they are newer than the newest complete checkpoint: those may be
        under way. Returns how many checkpoints went.

        Args:
            also: chooses further checkpoints to keep, out of those that there are, newest first.

        Raises:
            ConfigError: a key is missing, without which nobody can tell which checkpoints are good.
        """
        if keep < 1:
            raise UsageError(f"keep = {keep}: the newest checkpoint is always kept")

        def kept(found: Sequence[Checkpoint]) -> Iterator[CheckpointId]:
            yield from (checkpoint.id for checkpoint in found[:keep])
            yield from self.pins(job)
            yield from also(found)

        return self._checkpoints.forget(job, kept)

    # --- upkeep -----------------------------------------------------------------------------------

    def pins(self, job: JobKey) -> frozenset[CheckpointId]:
        """Return which checkpoints of *job* are pinned: `forget` and `prune` leave them."""
        return self._upkeep.pins(job)

    def pin(self, job: JobKey, id: CheckpointId) -> None:
        """Keep checkpoint *id* until it is unpinned. Raises UsageError where there is no such checkpoint."""
        if id not in [checkpoint.id for checkpoint in self.checkpoints(job)]:
            raise UsageError(f"{id.name(job.job_id)}: no such checkpoint")
        self._upkeep.pin(job, id)

    def unpin(self, job: JobKey, id: CheckpointId) -> bool:
        """Take the pin off checkpoint *id*; True if there was one."""
        return self._upkeep.unpin(job, id)

    def usage(self, job: JobKey) -> Usage:
        """Return what all files of *job* take on the server, and since when none of them changed."""
        return self._upkeep.usage(_job(job))

    def prune(self, cluster: str, *, ended: float, lost: float, grace: float) -> Pruned:
        """Put the jobs of *cluster* that are over into the trash, and remove what has been there for long.

        Over: without a lease, without a pin, and nothing of it changed for *ended* seconds, or for *lost*
        seconds where the store does not know that it ended. What was retired goes after *ended* seconds.
        From the trash, which is not looked into by anybody else, things go for good after *grace* seconds;
        until then a rename brings them back. Nobody is kept waiting, and nothing locked.
        """

        def held() -> list[JobKey]:
            return [view.lease.job for view in self.leases(cluster)]

        return self._upkeep.prune(cluster, held, ended=ended, lost=lost, grace=grace)

    # --- records ----------------------------------------------------------------------------------

    def put_record(self, job: JobKey, name: str, value: Mapping[str, Any]) -> None:
        """Make *value* (JSON values) the record *name* of *job*; readers see the old or the new one.

        What is not in `_records.PUBLIC` is encrypted. Raises ConfigError where there is no key.
        """
        if not isinstance(self._keyring, Keyring):
            raise self._keyring
        self._backend.replace(_record_name(job, name), _records.encode(job, name, value, self._keyring))

    def get_record(self, job: JobKey, name: str) -> Mapping[str, Any] | None:
        """Return the record *name* of *job*, or None where there is none; without a key, its public part.

        Raises:
            CorruptCheckpoint: it is not what was stored there.
            KeyMissing: this node does not have the key that it is encrypted with.
        """
        try:
            data = self._backend.read(_record_name(job, name))
        except FileNotFoundError:
            return None
        return _records.decode(data, job, name, self._keyring)

    def retire(self, job: JobKey) -> bool:
        """Put what is stored under *job*'s name out of the way, and drop its leases; True if there was any.

        For a scheduler that uses a job's id again. All is kept, as retired/<cluster>/<id>.<random>.
        """
        self._leases.drop_all(job)
        self._checkpoints.forget_writer(job)
        self._appending.clear()
        return self._backend.rename(_job(job), f"retired/{job.cluster}/{job.job_id}.{uuid.uuid4().hex[:12]}")

    def jobs(self, cluster: str) -> list[JobKey]:
        """Return every job of *cluster* of which anything is stored, sorted."""
        found = []
        for entry in self._backend.list(f"jobs/{_small(cluster)}"):
            if entry.is_directory and _SMALL_NAME.fullmatch(entry.name):
                found.append(JobKey(cluster, entry.name))
        return sorted(found)

    # --- events -----------------------------------------------------------------------------------

    def append_events(self, job: JobKey, stream: str, events: Sequence[Mapping[str, Any]]) -> None:
        """Add *events* (JSON values, with a "time": seconds, Unix time) to the log of *job*.

        Each stream has one writer at a time. Repeat the call after StoreUnavailable: an event that is
        stored twice is read once.
        """
        if not events:
            return
        name = f"{_job(job)}/events/{_small(stream)}.jsonl"
        # Somebody may have been cut off in the middle of a line; an empty line is nobody's event.
        start = b"" if name in self._appending else b"\n"
        self._appending.discard(name)
        self._backend.append(name, start + b"".join(map(_line, events)))
        self._appending.add(name)

    def events(self, job: JobKey) -> list[Mapping[str, Any]]:
        """Return the events of all streams of *job*, in the order of their "time", without torn lines."""
        found: list[Mapping[str, Any]] = []
        for entry in self._backend.list(f"{_job(job)}/events"):
            if not entry.name.endswith(".jsonl"):
                continue
            try:
                lines = self._backend.read(f"{_job(job)}/events/{entry.name}").split(b"\n")
            except FileNotFoundError:
                continue  # retired since the listing
            values = (_object(line) for line in dict.fromkeys(lines[:-1]))
            found += [value for value in values if value is not None]
        return sorted(found, key=_time)

    # --- requests ---------------------------------------------------------------------------------

    def post_request(self, job: JobKey, request: Mapping[str, Any]) -> str:
        """Leave *request* (JSON values) for the manager of *job*, and return the request's id."""
        id = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self._backend.create(f"{_job(job)}/requests/{id}.json", [_line({**request, "id": id})])
        return id

    def take_requests(self, job: JobKey) -> list[Mapping[str, Any]]:
        """Remove the requests to *job* and return them, oldest first (by the clocks of those who posted).

        Each is returned once, to one taker, with its "id". One round trip when there is none: the
        directory exists only while there are requests.
        """
        taken = self._taken.setdefault(job, [])
        directory = f"{_job(job)}/requests"
        entries = self._backend.list(directory)
        for entry in entries:
            if entry.is_directory or not entry.name.endswith(".json"):
                continue
            try:
                value = _object(self._backend.read(f"{directory}/{entry.name}"))
            except FileNotFoundError:
                continue
            if self._backend.remove(f"{directory}/{entry.name}") and value is not None:
                taken.append(value)
        if entries:
            self._backend.remove_directory(directory)
        return self._taken.pop(job)

    # --- leases -----------------------------------------------------------------------------------

    def renew_lease(self, lease: Lease) -> None:
        """Tell everybody that *lease* is held; creates it the first time. One round trip from then on.

        What is guaranteed: once the run of a higher epoch has renewed its lease, the next renewal of a lower
        one is refused, and so is every later one. Of two runs of the same epoch on different nodes (which
        no scheduler should start) the later takes the lease from the earlier.

        What is not: between the two renewals both runs believe that they hold the lease. So a run that
        cannot renew must stop by its own clock before the lease's time is over, counted from the start of
        its last successful renewal; and a new run starts only after that time. Nothing on the server
        stops a run that goes on regardless from storing checkpoints; those of a lower epoch are never
        newer than those of a higher one, so they are not restored.

        Raises:
            StoreRefused: the lease is lost to another run, for good; or the store refuses to write.
        """
        self._leases.renew(lease)

    def leases(self, cluster: str) -> list[LeaseView]:
        """Return for every job of *cluster* that has one the lease of the highest epoch.

        *age*, in seconds, is never more than the time since the lease was last renewed, and less than
        it by 2 s at most (SFTP; 0.02 s in a directory) and the round trip. It is told by the clock of
        the store's machine alone. Two listings and a write, however many leases there are.
        """
        return self._leases.views(_small(cluster))

    def drop_lease(self, lease: Lease) -> None:
        """Give up *lease*, if it is still there; those of other runs of the job stay."""
        self._leases.drop(lease)


def _job(job: JobKey) -> str:
    return f"jobs/{job.cluster}/{job.job_id}"


def _record_name(job: JobKey, name: str) -> str:
    return f"{_job(job)}/records/{_small(name)}.json"


def _small(name: str) -> str:
    if not _SMALL_NAME.fullmatch(name):
        raise UsageError(f"{name!r}: not a name of a cluster, a record or a stream")
    return name


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(value), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _object(data: bytes) -> Mapping[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _time(event: Mapping[str, Any]) -> float:
    time = event.get("time")
    return float(time) if isinstance(time, int | float) and math.isfinite(time) else 0.0
