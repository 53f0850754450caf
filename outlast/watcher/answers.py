"""What the watcher's control socket answers: the state of jobs, from store and scheduler, to their owners."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from outlast.config import Config
from outlast.control import Peer
from outlast.errors import UsageError
from outlast.model import Checkpoint, JobKey, JobState, LeaseView, SchedulerJob
from outlast.policy import parse_choice
from outlast.scheduler import Scheduler, SchedulerUnavailable
from outlast.store import Store, open_store
from outlast.watcher.actions import BOUND, POLICY
from outlast.watcher.notes import STREAM

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
            case "show":
                return self._show(peer, request)
            case "events":
                return self._events(peer, request)
            case "checkpoint":
                return self._checkpoint(peer, request)
            case "migrate" | "hold":
                return self._leave(peer, request)
            case "release":
                return self._release(peer, request)
            case "restart":
                return self._restart(peer, request)
            case "policy":
                return self._policy(peer, request)
            case "drain":
                return self._drain(peer, request)
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
            checkpoints = store.whereabouts(job)
        return {"checkpoints": [_checkpoint_row(job.job_id, one) for one in checkpoints]}

    def _show(self, peer: Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
        name = request.get("checkpoint")
        with self._store() as store:
            job = self._job_of(peer, request, store)
            found = [one for one in store.checkpoints(job) if one.id.name(job.job_id) == name]
            if not found:
                raise UsageError(
                    f"{name}: no such checkpoint in the store",
                    hint=f"'outlast list {job.job_id}' shows which there are",
                )
            (one,) = found
            events = store.events(job)
            pinned = one.id in store.pins(job)
        restored = [
            {"time": event["time"], "node": event["node"]}
            for event in events
            if event["event"] == "restored" and event.get("checkpoint") == name
        ]
        facts = {key: one.meta.get(key) for key in ("mode", "criu")}
        row = {**_checkpoint_row(job.job_id, one), **facts, "pinned": pinned, "restored": restored}
        return {"checkpoint": row}

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

    def _leave(self, peer: Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Have a running job saved and queued again: to go on elsewhere, or to be held."""
        operation, to = request["op"], request.get("to")
        with self._store() as store:
            job = self._job_of(peer, request, store)
            known = self._running(job)
            bound = {event["target"] for event in store.events(job) if event["event"] == BOUND}
            if operation == "migrate" and to is None and not bound.issuperset(known.required):
                raise UsageError(
                    f"job {job.job_id}: asks for {', '.join(known.required)} by name",
                    hint="name a node with --to, or submit it without --nodelist",
                )
            if to is not None:
                if operation != "migrate" or to not in {node.name for node in self._scheduler.nodes()}:
                    raise UsageError(f"{to}: the scheduler knows no such node")
                if to in known.nodes:
                    raise UsageError(f"job {job.job_id}: runs on {to} already")
            where = self._scheduler.leave(known.handle, hold=operation == "hold", to=to)
            to = where or to
            if to is not None:
                _record(store, job, BOUND, known.epoch, to, f"{to}: user {peer.uid} has the job run there")
            if where is not None:
                return {}
            return {"request": store.post_request(job, {"op": operation, "uid": peer.uid, "to": to})}

    def _release(self, peer: Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
        with self._store() as store:
            job = self._job_of(peer, request, store)
            known = self._scheduled(job)
            if known.state is not JobState.PENDING:
                raise UsageError(f"job {job.job_id}: is {known.raw_state}; only a held job can be released")
            self._scheduler.release(known.handle)
            _record(store, job, "released", known.epoch, "", f"user {peer.uid} had the job released")
        return {}

    def _restart(self, peer: Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Have a job run again from a checkpoint of its past: the newest, or the one that was asked for."""
        name = request.get("checkpoint")
        with self._store() as store:
            job = self._job_of(peer, request, store)
            known = self._scheduled(job)
            checkpoints = {one.id.name(job.job_id): one.id for one in store.checkpoints(job)}
            if not checkpoints or (name is not None and name not in checkpoints):
                raise UsageError(
                    f"{name or f'job {job.job_id}'}: no such checkpoint in the store",
                    hint=f"'outlast list {job.job_id}' shows which there are",
                )
            chosen = checkpoints[name] if name is not None else max(checkpoints.values())
            # Read by the manager that runs the job, or else by the next one.
            store.post_request(
                job, {"op": "restart", "uid": peer.uid, "checkpoint": [chosen.epoch, chosen.seq]}
            )
            chosen_name = chosen.name(job.job_id)
            _record(
                store, job, "restarted", known.epoch, "", f"user {peer.uid} had it go on from {chosen_name}"
            )
            if known.state not in (JobState.PENDING, JobState.RUNNING):
                self._scheduler.requeue(known.handle)
        return {"checkpoint": chosen_name}

    def _policy(self, peer: Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Change of which ends a job is run again."""
        text = str(request.get("text", ""))
        parse_choice(text)
        with self._store() as store:
            job = self._job_of(peer, request, store)
            _record(store, job, POLICY, 0, text, f"user {peer.uid} chose {text or 'what the site has'}")
        return {}

    def _drain(self, peer: Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Let nothing more start on a node, and have all jobs that are checkpointed there go elsewhere."""
        node = request.get("node")
        if not _is_operator(peer):
            raise UsageError("only an operator may drain a node")
        if node not in {one.name for one in self._scheduler.nodes()}:
            raise UsageError(f"{node}: the scheduler knows no such node")
        self._scheduler.drain(str(node), "outlast: drained")
        moved = []
        with self._store() as store:
            # Not those of the last cycle: a job that has just started there is to leave as well.
            for view in store.leases(self._config.cluster):
                if view.lease.node == node:
                    store.post_request(view.lease.job, {"op": "migrate", "uid": peer.uid, "to": None})
                    moved.append(view.lease.job.job_id)
        return {"jobs": moved}

    def _scheduled(self, job: JobKey) -> SchedulerJob:
        known = {one.job_id: one for one in self._scheduler.jobs()}.get(job.job_id)
        if known is None:
            raise UsageError(f"job {job.job_id}: the scheduler does not know it any more")
        return known

    def _running(self, job: JobKey) -> SchedulerJob:
        known = self._scheduled(job)
        if known.state is not JobState.RUNNING:
            raise UsageError(f"job {job.job_id}: is {known.raw_state}, so there is nothing to be moved")
        if not known.requeueable:
            raise UsageError(
                f"job {job.job_id}: may not be requeued (--no-requeue)",
                hint=f"allow it: scontrol update JobId={job.job_id} Requeue=1",
            )
        return known

    def _interval(self, peer: Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Pass on what the scheduler's hook was told of a running job's interval."""
        if not (_is_operator(peer) or peer.uid in self._scheduler_users()):
            raise UsageError("only the scheduler may change the interval of a job")
        with self._store() as store:
            job = self._job_of(Peer(peer.pid, 0, 0), request, store)
            return {
                "request": store.post_request(job, {"op": "interval", "seconds": int(request["seconds"])})
            }

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


def _record(store: Store, job: JobKey, event: str, epoch: int, target: str, text: str) -> None:
    """Add to a job's log what the watcher did for somebody, in the form in which its loop reads it again."""
    entry = {
        "time": time.time(),
        "node": socket.gethostname().split(".")[0],
        "event": event,
        "text": text,
        "by": STREAM,
        "epoch": epoch,
        "target": target,
        "refused": False,
    }
    store.append_events(job, f"{STREAM}-requests", [entry])


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
        "interval": checkpoints[0].meta.get("interval") if checkpoints else None,
        "auto": bool(checkpoints[0].meta.get("auto")) if checkpoints else False,
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
        "where": list(checkpoint.where),
        "durable": checkpoint.durable,
    }
