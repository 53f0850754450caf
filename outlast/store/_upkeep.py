"""What keeps a store in order over the years: pins, figures, and the removal of jobs that are long over."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from outlast.errors import OutlastError
from outlast.model import CheckpointId, JobKey
from outlast.store._backend import UNFINISHED, Backend, Entry

_PIN = re.compile(r"(0|[1-9][0-9]*)-(0|[1-9][0-9]*)")
_TRASHED = re.compile(r".+\.(?P<time>[0-9]+)\.[0-9a-f]{12}")


# Called with how much has been done, and of how much.
Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class Usage:
    """What a job's files take on the server, in bytes, and how long ago, in seconds, one of them changed."""

    stored_bytes: int
    idle: float


@dataclass(frozen=True)
class Pruned:
    """What `Upkeep.prune` did: directories put into the trash, and directories removed from it for good."""

    trashed: tuple[str, ...]
    removed: tuple[str, ...]


class Upkeep:
    """What a store does for its administrator; `Store` documents it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def pins(self, job: JobKey) -> frozenset[CheckpointId]:
        """See `Store.pins`."""
        matches = (_PIN.fullmatch(entry.name) for entry in self._backend.list(f"{_job(job)}/pins"))
        return frozenset(CheckpointId(int(match[1]), int(match[2])) for match in matches if match)

    def pin(self, job: JobKey, id: CheckpointId) -> None:
        """See `Store.pin`."""
        self._backend.touch(f"{_job(job)}/pins/{id.epoch}-{id.seq}", create=True)

    def unpin(self, job: JobKey, id: CheckpointId) -> bool:
        """See `Store.unpin`."""
        gone = self._backend.remove(f"{_job(job)}/pins/{id.epoch}-{id.seq}")
        self._backend.remove_directory(f"{_job(job)}/pins")
        return gone

    def usage(self, directory: str) -> Usage:
        """Return what the files below *directory*, such as `jobs/CLUSTER/JOB`, take."""
        now = self._backend.clock()
        files = [entry for _, entry in self._files(directory)]
        idle = min((now - entry.mtime for entry in files), default=math.inf)
        return Usage(sum(entry.size for entry in files), max(0.0, idle))

    def prune(
        self,
        cluster: str,
        held: Callable[[], Iterable[JobKey]],
        kept: Callable[[JobKey], bool] = lambda _: False,
        *,
        ended: float,
        lost: float,
        grace: float,
        progress: Progress = lambda *_: None,
    ) -> Pruned:
        """See `Store.prune`. *held* tells which jobs have a lease now, *kept* what else keeps a job."""
        now = self._backend.clock()
        trashed = []
        entries = self._backend.list(f"jobs/{cluster}")
        for number, entry in enumerate(entries):
            progress(number, len(entries))
            name = f"jobs/{cluster}/{entry.name}"
            # Asked last and each time: a job may begin to go on at any moment.
            if not entry.is_directory or not self._is_over(cluster, entry.name, ended, lost):
                continue
            if kept(JobKey(cluster, entry.name)) or JobKey(cluster, entry.name) in held():
                continue
            trashed += self._put_away(name, now)
        for entry in self._backend.list(f"retired/{cluster}"):
            if entry.is_directory and self.usage(f"retired/{cluster}/{entry.name}").idle > ended:
                trashed += self._put_away(f"retired/{cluster}/{entry.name}", now)
        removed = []
        for entry in self._backend.list(f"trash/{cluster}"):
            match = _TRASHED.fullmatch(entry.name)
            if match is not None and now - int(match["time"]) > grace:
                self._remove(f"trash/{cluster}/{entry.name}")
                removed.append(f"trash/{cluster}/{entry.name}")
        for entry in self._backend.list(""):
            # Left where a connection broke while the store's marker was made, or its clock was asked for.
            if entry.name.endswith(UNFINISHED) and now - entry.mtime > grace and not entry.is_directory:
                self._backend.remove(entry.name)
        progress(len(entries), len(entries))
        return Pruned(tuple(trashed), tuple(removed))

    def _is_over(self, cluster: str, job_id: str, ended: float, lost: float) -> bool:
        try:
            job = JobKey(cluster, job_id)
        except OutlastError:
            return False  # not made by a store, so nothing that it may remove
        if self.pins(job):
            return False
        has_ended = self._backend.entry(f"{_job(job)}/records/ended.json") is not None
        return self.usage(_job(job)).idle > (ended if has_ended else lost)

    def _put_away(self, name: str, now: float) -> list[str]:
        cluster, _, rest = name.partition("/")[2].partition("/")
        to = f"trash/{cluster}/{rest}.{int(now)}.{uuid.uuid4().hex[:12]}"
        return [name] if self._backend.rename(name, to) else []

    def _remove(self, directory: str) -> None:
        for name, _ in list(self._files(directory)):
            self._backend.remove(name)
        for name in sorted(self._directories(directory), reverse=True):
            self._backend.remove_directory(name)

    def _files(self, directory: str) -> Iterator[tuple[str, Entry]]:
        for entry in self._backend.list(directory):
            if entry.is_directory:
                yield from self._files(f"{directory}/{entry.name}")
            else:
                yield f"{directory}/{entry.name}", entry

    def _directories(self, directory: str) -> Iterator[str]:
        yield directory
        for entry in self._backend.list(directory):
            if entry.is_directory:
                yield from self._directories(f"{directory}/{entry.name}")


def _job(job: JobKey) -> str:
    return f"jobs/{job.cluster}/{job.job_id}"
