"""What the watcher's control socket answers: the state of jobs, from store and scheduler, to their owners."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from outlast.config import Config
from outlast.control import Peer
from outlast.errors import UsageError
from outlast.model import Checkpoint, JobKey, JobState, LeaseView, SchedulerJob
from outlast.scheduler import Scheduler, SchedulerUnavailable
from outlast.store import Store, open_store

# Connections to the store that are kept open between requests.
_IDLE_STORES = 4
# Seconds for which an answer of the scheduler or a list of checkpoints is good enough for people.
_FRESH = 2.0


class Desk:
    """Answers requests, each in a thread of its own with a store to itself."""

    def __init__(
        self,
        config: Config,
        scheduler: Scheduler,
        *,
        leases: Callable[[], tuple[LeaseView, ...]],
        wake: Callable[[], None],
    ) -> None:
        """*leases* gives those of the watcher's last cycle; *wake* has it look again at once."""
        self._config = config
        self._scheduler = scheduler
        self._leases = leases
        self._wake = wake
        self._lock = threading.Lock()  # held for moments only, never while anybody is asked
        self._asking = threading.Lock()  # one query of the scheduler answers all who wait for it
        self._idle: list[Store] = []
        self._jobs: tuple[float, tuple[SchedulerJob, ...]] = (float("-inf"), ())
        self._lists: dict[JobKey, tuple[float, list[Checkpoint]]] = {}
        self._operators: frozenset[int] | None = None

    def handle(self, peer: Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answer one request as `outlast.control.Handler`. Raises UsageError where it asks too much."""
        match request.get("op"):
            case "status":
                return self._status(peer)
            case "list":
                return self._list(peer, request)
            case "events":
                return self._events(peer, request)
            case "checkpoint":
                return self._checkpoint(peer, request)
            case "interval":
                return self._interval(peer, request)
            case "ended":
                return self._ended(peer)
        raise UsageError(f"{request.get('op')!r}: the watcher knows no such request")

    def close(self) -> None:
        """Close the connections to the store that no request is using."""
        with self._lock:
            idle, self._idle = self._idle, []
        for store in idle:
            store.close()

    def _status(self, peer: Peer) -> Mapping[str, Any]:
        ages = {view.lease.job.job_id: view.age for view in self._leases()}
        jobs = [job for job in self._known_jobs() if _may(peer, job.uid)]
        rows = []
        with self._store() as store:
            stored = {key.job_id for key in store.jobs(self._config.cluster)}
            for job in jobs:
                if job.job_id in stored:
                    checkpoints = self._checkpoints(store, JobKey(self._config.cluster, job.job_id))
                    rows.append(_status_row(job, checkpoints, ages.get(job.job_id)))
        return {"jobs": rows}

    def _list(self, peer: Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
        with self._store() as store:
            job = self._job_of(peer, request, store)
            checkpoints = store.checkpoints(job)
        return {"checkpoints": [_checkpoint_row(job.job_id, one) for one in checkpoints]}

    def _events(self, peer: Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
        with self._store() as store:
            return {"events": [dict(event) for event in store.events(self._job_of(peer, request, store))]}

    def _checkpoint(self, peer: Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
        with self._store() as store:
            job = self._job_of(peer, request, store)
            # The request goes by way of the store, so it needs no scheduler: where that is away, post it.
            with contextlib.suppress(SchedulerUnavailable):
                known = {one.job_id: one for one in self._known_jobs()}.get(job.job_id)
                if known is None or known.state is not JobState.RUNNING:
                    # It may have started since; nobody is refused for an answer that is not of now.
                    known = {one.job_id: one for one in self._known_jobs(0.0)}.get(job.job_id)
                if known is None or known.state is not JobState.RUNNING:
                    state = known.raw_state if known else "gone"
                    raise UsageError(f"job {job.job_id}: is {state}; only a running job can be checkpointed")
            return {"request": store.post_request(job, {"op": "checkpoint", "uid": peer.uid})}

    def _interval(self, peer: Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Pass on what the scheduler's hook was told of a running job's interval."""
        if not (_is_operator(peer) or peer.uid in self._scheduler_users()):
            raise UsageError("only the scheduler may change the interval of a job")
        with self._store() as store:
            job = self._job_of(Peer(peer.pid, 0, 0), request, store)
            return {"request": store.post_request(job, {"op": "interval", "seconds": int(request["seconds"])})}

    def _ended(self, peer: Peer) -> Mapping[str, Any]:
        if not (_is_operator(peer) or peer.uid in self._scheduler_users()):
            raise UsageError("only the scheduler may report that a job has ended")
        self._wake()
        return {}

    def _scheduler_users(self) -> frozenset[int]:
        """The scheduler's own users: slurmctld starts its hooks as SlurmUser, which is seldom root."""
        if self._operators is None:
            self._operators = self._scheduler.users()
        return self._operators

    def _job_of(self, peer: Peer, request: Mapping[str, Any], store: Store) -> JobKey:
        job_id = request.get("job")
        if not isinstance(job_id, str):
            raise UsageError("the request names no job")
        job = JobKey(self._config.cluster, job_id)
        start = store.get_record(job, "start")
        # Who is not the owner learns not even whether there is such a job.
        if start is None or not _may(peer, start.get("uid")):
            raise UsageError(
                f"job {job_id}: no such job of yours", hint="'outlast status' shows which there are"
            )
        return job

    def _known_jobs(self, oldest: float = _FRESH) -> tuple[SchedulerJob, ...]:
        """The scheduler's jobs as they were at most *oldest* seconds ago."""
        with self._asking:
            asked, jobs = self._jobs
            if time.monotonic() - asked > oldest:
                jobs = self._scheduler.jobs()
                self._jobs = (time.monotonic(), jobs)
            return jobs

    def _checkpoints(self, store: Store, job: JobKey) -> list[Checkpoint]:
        asked, checkpoints = self._lists.get(job, (float("-inf"), []))
        if time.monotonic() - asked > _FRESH:
            checkpoints = store.checkpoints(job)
            now = time.monotonic()
            with self._lock:
                self._lists = {key: one for key, one in self._lists.items() if now - one[0] <= _FRESH}
                self._lists[job] = (now, checkpoints)
        return checkpoints

    @contextlib.contextmanager
    def _store(self) -> Iterator[Store]:
        """A store that no other thread uses meanwhile; connections are kept for the next request."""
        with self._lock:
            store = self._idle.pop() if self._idle else None
        if store is None:
            store = open_store(self._config.store)
        try:
            yield store
        finally:
            with self._lock:
                if keep := len(self._idle) < _IDLE_STORES:
                    self._idle.append(store)
            if not keep:
                store.close()


def _is_operator(peer: Peer) -> bool:
    return peer.uid in (0, os.geteuid())


def _may(peer: Peer, owner: object) -> bool:
    return _is_operator(peer) or peer.uid == owner


def _status_row(
    job: SchedulerJob, checkpoints: list[Checkpoint], lease_age: float | None
) -> Mapping[str, Any]:
    newest = _checkpoint_row(job.job_id, checkpoints[0]) if checkpoints else None
    return {
        "job_id": job.job_id,
        "name": job.name,
        "state": job.raw_state,
        "nodes": list(job.nodes),
        "epoch": job.epoch,
        "uid": job.uid,
        "checkpoints": len(checkpoints),
        "newest": newest,
        "lease_age": lease_age,
    }


def _checkpoint_row(job_id: str, checkpoint: Checkpoint) -> Mapping[str, Any]:
    return {
        "name": checkpoint.id.name(job_id),
        "epoch": checkpoint.id.epoch,
        "seq": checkpoint.id.seq,
        "created": checkpoint.created,
        "node": checkpoint.meta.get("node"),
        "image_bytes": checkpoint.image_bytes,
        "stored_bytes": checkpoint.stored_bytes,
        "pause_ms": checkpoint.meta.get("pause_ms"),
    }
