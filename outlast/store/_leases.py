"""Leases: files whose names say who holds them.

Their sizes are the count of their renewals, and their mtimes say since when they are silent.
"""

from __future__ import annotations

import re

from outlast.errors import LeaseLost, OutlastError, UsageError
from outlast.model import JobKey, Lease, LeaseView
from outlast.store._backend import Backend

# JOB@EPOCH@NODE@UID: one listing tells all about every lease of a cluster.
_NAME = re.compile(
    r"(?P<job>[^@]+)@(?P<epoch>0|[1-9][0-9]*)@(?P<node>[A-Za-z0-9_.:-]+)@(?P<uid>0|[1-9][0-9]*)"
)


class Leases:
    """What a store does with leases; `Store` documents it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._holding: set[Lease] = set()
        # What the names of the last listing say: a watcher reads thousands of the same in each cycle.
        self._read: dict[tuple[str, str], Lease | None] = {}

    def renew(self, lease: Lease) -> None:
        """See `Store.renew_lease`."""
        name = _name(lease)
        if lease in self._holding and self._backend.touch(name, create=False):
            return
        if lease.is_fence:
            # Nobody holds it, so there is nothing to be lost by others' leases.
            self._backend.touch(name, create=True)
            return
        taken_away = lease in self._holding
        self._holding.discard(lease)
        # First the own file, then the look at others': of two that do so at the same time, at least one
        # sees the other.
        self._backend.touch(name, create=True)
        others = [other for other in self._of(lease.job) if other != lease]
        for other in others:
            if other.epoch > lease.epoch or (other.epoch == lease.epoch and taken_away):
                self._backend.remove(name)
                raise LeaseLost(
                    f"job {lease.job}: the lease of run {lease.epoch} on {lease.node} is over: "
                    f"run {other.epoch} on {other.node} has one",
                    hint="this run must not write checkpoints any more",
                )
        for other in others:
            self._backend.remove(_name(other))
        self._holding.add(lease)

    def views(self, cluster: str) -> list[LeaseView]:
        """See `Store.leases`."""
        now = self._backend.clock()  # before the listing, so that no age comes out too large
        newest: dict[JobKey, LeaseView] = {}
        before, self._read = self._read, {}
        for entry in self._backend.list(f"leases/{cluster}"):
            key = (cluster, entry.name)
            lease = self._read[key] = before[key] if key in before else _lease(*key)
            if lease is None:
                continue
            age = max(0.0, now - entry.mtime - self._backend.mtime_step)
            found = newest.get(lease.job)
            if found is None or _rank(lease, age) > _rank(found.lease, found.age):
                newest[lease.job] = LeaseView(lease, age, entry.size)
        return sorted(newest.values(), key=lambda view: view.lease.job)

    def drop(self, lease: Lease) -> None:
        """See `Store.drop_lease`."""
        self._holding.discard(lease)
        self._backend.remove(_name(lease))

    def drop_all(self, job: JobKey) -> None:
        """Remove every lease of *job*, whoever holds it."""
        for lease in self._of(job):
            self.drop(lease)

    def _of(self, job: JobKey) -> list[Lease]:
        found = (_lease(job.cluster, entry.name) for entry in self._backend.list(f"leases/{job.cluster}"))
        return [lease for lease in found if lease is not None and lease.job == job]


def _rank(lease: Lease, age: float) -> tuple[int, bool, float]:
    """What makes one lease of a job count rather than another; a run that holds one hides the fence before it."""
    return lease.epoch, not lease.is_fence, -age


def _name(lease: Lease) -> str:
    base = f"{lease.job.job_id}@{lease.epoch}@{lease.node}@{lease.uid}"
    if not _NAME.fullmatch(base):
        raise UsageError(f"{base!r}: not a lease: no epoch or uid may be negative, and a node is a host name")
    return f"leases/{lease.job.cluster}/{base}"


def _lease(cluster: str, name: str) -> Lease | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    try:
        job = JobKey(cluster, match["job"])
    except OutlastError:
        return None
    return Lease(job, int(match["epoch"]), match["node"], int(match["uid"]))
