"""What the manager, the watcher and the command line see of a store."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from outlast.errors import CorruptCheckpoint, OutlastError, StoreRefused, StoreUnavailable, UsageError
from outlast.model import Checkpoint, CheckpointId, JobKey, Lease, LeaseView
from outlast.store._backend import UNFINISHED, Backend, Entry
from outlast.store._frames import pack, unpack
from outlast.store._leases import Leases
from outlast.store._manifest import File, Manifest, decode, encode

_log = logging.getLogger(__name__)

# Both kinds of file of a checkpoint, and what is left of one whose writing broke off.
_CHECKPOINT_FILE = re.compile(
    r"(?P<epoch>0|[1-9][0-9]*)-(?P<seq>0|[1-9][0-9]*)\.(json|bin)(\.[0-9a-f]+\.tmp)?"
)
_JOBS_KNOWN = 1000  # jobs whose manifests are remembered
_SMALL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")


class Store:
    """The checkpoints, records, events, requests and leases of jobs, kept as docs/store-format.md says.

    Not shared between threads: each opens its own. Every method may raise StoreUnavailable (no answer;
    the next call connects anew) and StoreRefused (the store said no, and would again). After a
    StoreUnavailable it is unknown whether the call took effect.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._leases = Leases(backend)
        self._known: dict[JobKey, dict[Entry, Checkpoint]] = {}  # manifests that need no second reading
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

    # --- checkpoints ------------------------------------------------------------------------------

    def publish(self, job: JobKey, id: CheckpointId, source: Path, meta: Mapping[str, Any]) -> Checkpoint:
        """Store every regular file below the directory *source* as the checkpoint *id* of *job*.

        The manifest goes last: afterwards the checkpoint is there and complete, or not there at all. It is
        on the server's disk. Memory stays within some 60 MiB, plus 300 bytes for each MiB of the image.

        Args:
            meta: JSON values, given back by `checkpoints`.

        Raises:
            StoreRefused: there is such a checkpoint, or a part of one, or the store has no room.
            StoreUnavailable: try again with the next number: this one may be taken by what was sent.
            OutlastError: *source* cannot be read.
        """
        data, manifest = _data_name(job, id), _manifest_name(job, id)
        if self._backend.entry(manifest) is not None or self._backend.entry(data) is not None:
            raise self._taken_id(job, id)
        files: list[File] = []
        try:
            with contextlib.closing(pack(source, files)) as chunks:
                size = self._backend.create(data, chunks)
        except FileExistsError:
            raise self._taken_id(job, id) from None
        complete = Manifest(job, id, time.time(), size, tuple(files), meta)
        try:
            self._backend.create(manifest, [encode(complete)])
        except FileExistsError:
            self._try(lambda: self._backend.remove(data))
            raise self._taken_id(job, id) from None
        except StoreUnavailable:
            raise  # the manifest may be in its place, and then it needs the data
        except BaseException:
            self._try(lambda: self._backend.remove(data))
            raise
        return complete.checkpoint()

    def checkpoints(self, job: JobKey) -> list[Checkpoint]:
        """Return the complete checkpoints of *job*, newest first.

        Complete: the manifest verifies and the data file has the size that it says. Others are left out,
        and logged. The bytes of the data are verified by `fetch`.
        """
        entries = [entry for entry in self._backend.list(f"{_job(job)}/ckpt") if not entry.is_directory]
        if not entries:
            return []
        sizes = {entry.name: entry.size for entry in self._backend.list(f"{_job(job)}/data")}
        known = self._known.get(job, {})
        found: dict[Entry, Checkpoint] = {}
        for entry in entries:
            id = _file_id(entry.name)
            if id is None or entry.name.endswith(UNFINISHED):
                continue
            try:
                checkpoint = known.get(entry) or self._manifest(job, id).checkpoint()
                if sizes.get(f"{id.epoch}-{id.seq}.bin") != checkpoint.stored_bytes:
                    raise CorruptCheckpoint(f"{job}: data of {id.name(job.job_id)}: missing or torn")
            except FileNotFoundError:
                continue  # forgotten since the listing
            except CorruptCheckpoint as error:
                _log.warning("left out: %s", error)
                continue
            found[entry] = checkpoint
        if len(self._known) >= _JOBS_KNOWN:
            self._known.clear()
        self._known[job] = found
        return sorted(found.values(), key=lambda checkpoint: checkpoint.id, reverse=True)

    def fetch(self, job: JobKey, id: CheckpointId, into: Path) -> None:
        """Make the directory *into*, mode 0700, with all files of the checkpoint *id*, every byte verified.

        *into* appears at once and complete, by a rename within its parent directory, which must exist.

        Raises:
            UsageError: there is no such checkpoint, or *into* exists.
            CorruptCheckpoint: stored bytes are not what was published; go on with an older checkpoint.
            OutlastError: *into* cannot be written.
        """
        if into.exists() or into.is_symlink():
            raise UsageError(f"{into}: exists", hint="name a directory that does not exist yet")
        try:
            manifest = self._manifest(job, id)
        except FileNotFoundError:
            raise UsageError(f"{id.name(job.job_id)}: no such checkpoint") from None
        partial = into.with_name(f".{into.name}.{uuid.uuid4().hex[:12]}")
        try:
            partial.mkdir(mode=0o700)
        except OSError as error:
            raise OutlastError(f"{partial}: {error.strerror}") from error
        try:
            unpack(manifest, self._stored(manifest), partial)
            partial.rename(into)
        except OSError as error:
            raise OutlastError(f"{into}: {error.strerror}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def forget(self, job: JobKey, keep: int) -> int:
        """Remove all but the newest *keep* (at least 1) complete checkpoints; return how many went.

        A checkpoint goes manifest first, so that none is ever seen without its data. What is older than the
        newest complete one and is not complete itself goes too: leftovers of writing that broke off. What is
        newer stays: it may be under way.
        """
        if keep < 1:
            raise UsageError(f"keep = {keep}: the newest checkpoint is always kept")
        complete = [checkpoint.id for checkpoint in self.checkpoints(job)]
        kept = complete[:keep]
        if not kept:
            return 0
        count = 0
        for directory in ("ckpt", "data"):
            for entry in self._backend.list(f"{_job(job)}/{directory}"):
                id = _file_id(entry.name)
                if id is None or id > kept[0] or (id in kept and not entry.name.endswith(UNFINISHED)):
                    continue
                gone = self._backend.remove(f"{_job(job)}/{directory}/{entry.name}")
                count += gone and directory == "ckpt" and id in complete
        return count

    # --- records ----------------------------------------------------------------------------------

    def put_record(self, job: JobKey, name: str, value: Mapping[str, Any]) -> None:
        """Make *value* (JSON values) the record *name* of *job*; readers see the old or the new one."""
        self._backend.replace(_record_name(job, name), _line(value))

    def get_record(self, job: JobKey, name: str) -> Mapping[str, Any] | None:
        """Return the record *name* of *job*, or None where there is none.

        Raises:
            CorruptCheckpoint: what is stored there is no record.
        """
        try:
            data = self._backend.read(_record_name(job, name))
        except FileNotFoundError:
            return None
        value = _object(data)
        if value is None:
            raise CorruptCheckpoint(f"{_record_name(job, name)}: no JSON object")
        return value

    def retire(self, job: JobKey) -> bool:
        """Put what is stored under *job*'s name out of the way, and drop its leases; True if there was any.

        For a scheduler that uses a job's id again. All is kept, as retired/<cluster>/<id>.<random>.
        """
        self._leases.drop_all(job)
        self._known.pop(job, None)
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

    # ----------------------------------------------------------------------------------------------

    def _manifest(self, job: JobKey, id: CheckpointId) -> Manifest:
        return decode(self._backend.read(_manifest_name(job, id)), job, id)

    def _stored(self, manifest: Manifest) -> Iterator[bytes]:
        name = manifest.id.name(manifest.job.job_id)
        entry = self._backend.entry(_data_name(manifest.job, manifest.id))
        if entry is not None and entry.size != manifest.data_size:
            raise CorruptCheckpoint(f"{manifest.job}: data of {name}: torn")
        try:
            yield from self._backend.read_ranges(_data_name(manifest.job, manifest.id), manifest.ranges())
        except FileNotFoundError:
            raise CorruptCheckpoint(f"{manifest.job}: data of {name}: missing") from None
        except EOFError as error:
            raise CorruptCheckpoint(f"{manifest.job}: data of {name}: torn: {error}") from error

    @staticmethod
    def _taken_id(job: JobKey, id: CheckpointId) -> StoreRefused:
        return StoreRefused(
            f"{job}: checkpoint {id.name(job.job_id)} exists, or a part of it", hint="use the next number"
        )

    @staticmethod
    def _try(tidy: Callable[[], object]) -> None:
        """Tidy up after an error; that this fails too must not hide it, and forget() comes by later."""
        try:
            tidy()
        except OutlastError as error:
            _log.debug("left behind: %s", error)


def _job(job: JobKey) -> str:
    return f"jobs/{job.cluster}/{job.job_id}"


def _manifest_name(job: JobKey, id: CheckpointId) -> str:
    return f"{_job(job)}/ckpt/{id.epoch}-{id.seq}.json"


def _data_name(job: JobKey, id: CheckpointId) -> str:
    return f"{_job(job)}/data/{id.epoch}-{id.seq}.bin"


def _record_name(job: JobKey, name: str) -> str:
    return f"{_job(job)}/records/{_small(name)}.json"


def _file_id(name: str) -> CheckpointId | None:
    match = _CHECKPOINT_FILE.fullmatch(name)
    return CheckpointId(int(match["epoch"]), int(match["seq"])) if match else None


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
