"""Answers where no watcher runs: of jobs without a scheduler, from the store and this machine's managers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outlast import control
from outlast.config import Config
from outlast.control import Peer
from outlast.errors import OutlastError
from outlast.manager import RUNTIME
from outlast.model import JobKey, JobState, SchedulerJob, SchedulerNode
from outlast.scheduler import SchedulerRefused
from outlast.store import Store, open_store
from outlast.watcher.answers import Desk


class NoScheduler:
    """The jobs of a machine without a scheduler, as its managers and the store know them; see `Scheduler`."""

    def __init__(self, config: Config, runtime: Path = RUNTIME) -> None:
        self._config = config
        self._runtime = runtime

    def jobs(self) -> tuple[SchedulerJob, ...]:
        """Return every job that the store knows of, running or not."""
        with open_store(self._config.store) as store:
            found = (self._job(store, key) for key in store.jobs(self._config.cluster))
            return tuple(job for job in found if job is not None)

    def _job(self, store: Store, key: JobKey) -> SchedulerJob | None:
        start = store.get_record(key, "start")
        if start is None:
            return None
        epoch = int(start["epoch"])
        ended = store.get_record(key, "ended")
        state, raw = JobState.LOST, "LOST"
        if ended is not None:
            state = JobState.DONE if ended["status"] == 0 else JobState.FAILED
            raw = "DONE" if ended["status"] == 0 else f"FAILED({ended['status']})"
        with contextlib.suppress(OutlastError):
            answer = control.call(self._runtime / key.job_id / "manager.sock", {"op": "status"}, timeout=5)
            if answer["running"]:
                state, raw, epoch = JobState.RUNNING, "RUNNING", int(answer["epoch"])
        return SchedulerJob(
            job_id=key.job_id,
            state=state,
            raw_state=raw,
            epoch=epoch,
            nodes=(str(start["node"]),),
            uid=int(start["uid"]),
            name=Path(str(start["argv"][0])).name
            if "argv" in start
            else "?",  # encrypted, for root on a node
        )

    def nodes(self) -> tuple[SchedulerNode, ...]:
        """Return nothing: there are no nodes without a scheduler."""
        return ()

    def requeue(self, handle: str) -> None:
        """Refuse."""
        raise SchedulerRefused(f"job {handle}: there is no scheduler to run it again")

    def requeue_hold(self, handle: str) -> None:
        """Refuse."""
        raise SchedulerRefused(f"job {handle}: there is no scheduler to run it again")

    def hold(self, handle: str) -> None:
        """Refuse."""
        raise SchedulerRefused(f"job {handle}: there is no scheduler to hold it")

    def delay(self, handle: str, seconds: float) -> None:
        """Refuse."""
        raise SchedulerRefused(f"job {handle}: there is no scheduler to put it off for {seconds:.0f} s")

    def mark_down(self, nodes: Sequence[str], reason: str) -> None:
        """Refuse."""
        raise SchedulerRefused(f"node {', '.join(nodes)}: there is no scheduler to mark it down ({reason})")

    def exclude(self, handles: Sequence[str], nodes: Sequence[str], *, at_once: bool = False) -> None:
        """Refuse."""
        raise SchedulerRefused(f"job {', '.join(handles)}: no scheduler keeps it off {', '.join(nodes)}")

    def require(self, handle: str, node: str) -> None:
        """Refuse."""
        raise SchedulerRefused(f"job {handle}: there is no scheduler to start it on {node}")

    def leave(self, handle: str, *, hold: bool, to: str | None) -> str | None:
        """Return None: whatever can be done its manager does."""
        return None

    def release(self, handle: str) -> None:
        """Refuse."""
        raise SchedulerRefused(f"job {handle}: there is no scheduler that holds it")

    def drain(self, node: str, reason: str) -> None:
        """Refuse."""
        raise SchedulerRefused(f"node {node}: there is no scheduler to drain it ({reason})")

    def users(self) -> frozenset[int]:
        """Return nobody."""
        return frozenset()


def answer(config: Config, peer: Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Answer what the watcher would be asked, as `outlast.watcher.answers.Desk` does."""
    desk = Desk(config, NoScheduler(config), leases=lambda: (), wake=lambda: None)
    try:
        return desk.handle(peer, request)
    finally:
        desk.close()
