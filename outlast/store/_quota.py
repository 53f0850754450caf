"""How much a job, and all jobs of a user together, may have in one store."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from outlast.errors import StoreRefused, StoreUnavailable
from outlast.model import JobKey
from outlast.store._backend import Backend

_NOTE = re.compile(r"(?P<job>.+)\.(?P<bytes>[0-9]+)")


@dataclass(frozen=True)
class Quota:
    """Bytes that a job, and a user, may have; 0 for any number."""

    job: int = 0
    user: int = 0


class Room:
    """What a job may still add to a store. Users' sums stand in the names of empty files: one listing."""

    def __init__(self, backend: Backend, quota: Quota) -> None:
        self._backend = backend
        self._quota = quota
        self._owners: dict[JobKey, int] = {}

    def within(self, job: JobKey, owner: object, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Yield *chunks* for as long as there is room for them.

        Args:
            owner: the user id; anything else is nobody's, and only the job's own quota counts.

        Raises:
            StoreRefused: what is left is less than they are.
        """
        if self._quota == Quota():
            yield from chunks
            return
        used = self._used(job)
        by_job = self._quota.job - used if self._quota.job else math.inf
        by_user = math.inf
        if self._quota.user and isinstance(owner, int):
            notes = self._notes(job.cluster, owner)
            others = sum(size for name, size in notes if name != job.job_id)
            by_user = self._quota.user - used - others
        for chunk in chunks:
            by_job -= len(chunk)
            by_user -= len(chunk)
            if by_job < 0:
                raise StoreRefused(
                    f"job {job.job_id}: its quota of {self._quota.job} bytes in the store is used up",
                    hint="raise quota under [store], lower keep under [checkpoint], or unpin checkpoints",
                )
            if by_user < 0:
                raise StoreRefused(
                    f"job {job.job_id}: the quota of user {owner}, {self._quota.user} bytes in the store for "
                    "all jobs together, is used up",
                    hint="'outlast store stats' shows which jobs have most; forget or unpin checkpoints of "
                    "theirs, or raise user_quota under [store]",
                )
            yield chunk

    def note(self, job: JobKey, owner: object = None) -> None:
        """Write down what *job* has now, for the other jobs of its owner; without *owner*, of the one known."""
        if not self._quota.user:
            return
        if isinstance(owner, int):
            self._owners[job] = owner
        uid = self._owners.get(job)
        if uid is None:
            return
        # What has been stored is stored, whatever becomes of the note; the next one is right again.
        with contextlib.suppress(StoreUnavailable, StoreRefused):
            mine = f"{job.job_id}.{self._used(job)}"
            with contextlib.suppress(FileExistsError):
                self._backend.create(f"usage/{job.cluster}/{uid}/{mine}", [])
            for name, size in self._notes(job.cluster, uid):
                if name == job.job_id and f"{name}.{size}" != mine:
                    self._backend.remove(f"usage/{job.cluster}/{uid}/{name}.{size}")

    def tidy(self, cluster: str) -> None:
        """Remove the notes of jobs that are no longer there."""
        there = {entry.name for entry in self._backend.list(f"jobs/{cluster}")}
        for owner in self._backend.list(f"usage/{cluster}"):
            for entry in self._backend.list(f"usage/{cluster}/{owner.name}"):
                match = _NOTE.fullmatch(entry.name)
                if match is not None and match["job"] not in there:
                    self._backend.remove(f"usage/{cluster}/{owner.name}/{entry.name}")

    def _used(self, job: JobKey) -> int:
        return sum(
            entry.size
            for kind in ("packs", "ckpt")
            for entry in self._backend.list(f"jobs/{job.cluster}/{job.job_id}/{kind}")
        )

    def _notes(self, cluster: str, owner: int) -> list[tuple[str, int]]:
        found = (_NOTE.fullmatch(entry.name) for entry in self._backend.list(f"usage/{cluster}/{owner}"))
        return [(match["job"], int(match["bytes"])) for match in found if match is not None]
