"""Observe, decide, act: one cycle of the watcher, whose truth lies in the store and at the scheduler."""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections.abc import Mapping
from typing import Any

from outlast.config import Config
from outlast.model import JobKey, JobState, LeaseView, SchedulerJob, SchedulerNode
from outlast.scheduler import Scheduler, SchedulerRefused
from outlast.store import Store
from outlast.watcher.decisions import (
    Action,
    Decision,
    Done,
    DropLease,
    Exclude,
    Leave,
    MarkDown,
    Readmit,
    Requeue,
    Run,
    Snapshot,
    decide,
    is_late,
    suspects,
)
from outlast.watcher.probe import Prober

log = logging.getLogger(__name__)

STREAM = "watcher"

# Seconds until the scheduler is looked at again where nothing gives cause to: a lease that has not run out
# says that its job runs, and a query for all jobs each second would be a load on the scheduler.
_LOOK_SECONDS = 5.0


class Wake:
    """Ends a wait from another thread or from a signal handler, where a lock could deadlock."""

    def __init__(self) -> None:
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self) -> None:
        """End the wait under way, or else the next one."""
        os.eventfd_write(self._event, 1)

    def wait(self, seconds: float) -> bool:
        """Return True as soon as it was set, False after *seconds*."""
        if not select.select([self._event], [], [], max(0.0, seconds))[0]:
            return False
        os.eventfd_read(self._event)
        return True


class Loop:
    """The watcher's memory between two cycles; losing it costs a repeated look, never a repeated action."""

    def __init__(self, config: Config, scheduler: Scheduler, store: Store) -> None:
        self._config = config
        self._scheduler = scheduler
        self._store = store
        self._prober = Prober(config.watcher.cycle)
        self._done: list[Done] = []
        self._recalled: set[str] = set()
        self._unsaid: list[tuple[JobKey, Mapping[str, Any]]] = []
        self._settled: frozenset[Run] = frozenset()
        self._looked = -_LOOK_SECONDS
        self.leases: tuple[LeaseView, ...] = ()

    def cycle(self, *, look: bool = False) -> tuple[Decision, ...]:
        """Look once, decide, and act. *look*: ask the scheduler even where no lease gives cause to.

        Raises:
            OutlastError: the store or the scheduler did not answer, or in an unknown way. Then nothing was
                decided, and what was seen of silent nodes is forgotten.
        """
        try:
            self.leases = tuple(self._store.leases(self._config.cluster))
            self._say()
            if not self.leases or not (look or self._cause_to_look()):
                self._prober.forget()
                return ()
            snapshot = self._observe()
            decisions = decide(snapshot, self._config)
            if self._recall(snapshot, decisions):
                decisions = decide(self._with_done(snapshot), self._config)
        except BaseException:
            self._prober.forget()
            raise
        for decision in decisions:
            if isinstance(decision, Leave):
                log.debug("job %s: %s", decision.run.job_id, decision.reason)
                if decision.tell:
                    self._record(decision.tell, (decision.run,), decision.reason)
            else:
                self._act(decision)
        self._settle(snapshot, decisions)
        self._say()
        return decisions

    def _cause_to_look(self) -> bool:
        if time.monotonic() - self._looked >= _LOOK_SECONDS:
            return True
        return any(
            is_late(view, self._config) and Run(view.lease.job.job_id, view.lease.epoch) not in self._settled
            for view in self.leases
        )

    def _observe(self) -> Snapshot:
        jobs, nodes = self._look()
        asked = suspects(self.leases, jobs, nodes, self._config)
        probes = self._prober.ask(asked)
        if asked:
            # A silent node took a second, in which a job may have been requeued or a lease renewed.
            self.leases = tuple(self._store.leases(self._config.cluster))
            jobs, nodes = self._look()
        self._forget_gone(jobs)
        return Snapshot(time.time(), self.leases, jobs, nodes, probes, tuple(self._done))

    def _look(self) -> tuple[tuple[SchedulerJob, ...], tuple[SchedulerNode, ...]]:
        jobs, nodes = self._scheduler.jobs(), self._scheduler.nodes()
        self._looked = time.monotonic()
        return jobs, nodes

    def _with_done(self, old: Snapshot) -> Snapshot:
        return Snapshot(old.now, old.leases, old.jobs, old.nodes, old.probes, tuple(self._done))

    def _forget_gone(self, jobs: tuple[SchedulerJob, ...]) -> None:
        known = {job.job_id for job in jobs} | {view.lease.job.job_id for view in self.leases}
        self._done = [one for one in self._done if one.run.job_id in known]
        self._recalled &= known

    def _settle(self, snapshot: Snapshot, decisions: tuple[Decision, ...]) -> None:
        """Remember which leases that ran out need no look in every cycle: nothing is to be done for them."""
        busy = {run.job_id for one in decisions if not isinstance(one, Leave) for run in one.runs}
        busy |= {job.job_id for job in snapshot.jobs if job.state is JobState.RUNNING}
        out = (view.lease for view in snapshot.leases if view.age > self._config.lease.ttl)
        runs = (Run(lease.job.job_id, lease.epoch) for lease in out)
        self._settled = frozenset(run for run in runs if run.job_id not in busy)

    def _recall(self, snapshot: Snapshot, decisions: tuple[Decision, ...]) -> bool:
        """Read from the store what an earlier watcher did for jobs about which something is to be done."""
        wanted = {run.job_id for one in decisions if not isinstance(one, Leave) for run in one.runs}
        wanted |= {one.run.job_id for one in decisions if isinstance(one, Leave) and one.tell}
        with_lease = {view.lease.job.job_id for view in snapshot.leases}
        # Without its log nobody can tell whether a node was excluded by the watcher or by a person.
        wanted |= {
            job.job_id for job in snapshot.jobs if job.excluded and job.state is JobState.PENDING
        } & with_lease
        found = []
        for job_id in sorted(wanted - self._recalled):
            for event in self._store.events(JobKey(self._config.cluster, job_id)):
                if event.get("by") == STREAM:
                    run = Run(job_id, event["epoch"])
                    found.append(Done(event["time"], event["event"], run, event["target"], event["refused"]))
            self._recalled.add(job_id)
        self._done = found + self._done
        return bool(found)

    def _act(self, decision: Action) -> None:
        """Do one thing; each of them may be done twice without harm."""
        try:
            match decision:
                case MarkDown():
                    self._scheduler.mark_down(decision.node, f"outlast: {decision.reason}")
                case Requeue():
                    self._scheduler.requeue(decision.job.handle)
                case Exclude():
                    nodes = {*decision.job.excluded, decision.node}
                    self._scheduler.exclude(decision.job.handle, sorted(nodes))
                case Readmit():
                    nodes = {*decision.job.excluded} - {decision.node}
                    self._scheduler.exclude(decision.job.handle, sorted(nodes))
                case DropLease():
                    self._store.drop_lease(decision.lease)
        except SchedulerRefused as error:
            self._record(decision.event, decision.runs, f"refused: {error}", decision.node, refused=True)
        else:
            self._record(decision.event, decision.runs, decision.reason, decision.node)

    def _record(
        self, event: str, runs: tuple[Run, ...], reason: str, target: str = "", *, refused: bool = False
    ) -> None:
        now = time.time()
        for run in runs:
            seen = any(
                (one.event, one.run, one.node, one.refused) == (event, run, target, True)
                for one in self._done
            )
            self._done.append(Done(now, event, run, target, refused))
            if refused and seen:
                continue
            text = f"{target}: {reason}" if target else reason
            log.log(logging.WARNING if refused else logging.INFO, "job %s: %s: %s", run.job_id, event, text)
            entry = {
                "time": now,
                "node": socket.gethostname().split(".")[0],
                "event": event,
                "text": text,
                "by": STREAM,
                "epoch": run.epoch,
                "target": target,
                "refused": refused,
            }
            self._unsaid.append((JobKey(self._config.cluster, run.job_id), entry))

    def _say(self) -> None:
        """Append to the jobs' logs what is not yet there; what the store does not take now waits."""
        while self._unsaid:
            job, entry = self._unsaid[0]
            self._store.append_events(job, STREAM, [entry])
            del self._unsaid[0]


def _done(job_id: str, event: Mapping[str, Any]) -> Done:
    """Turn an entry of a job's log, as `Loop` writes it, back into what it tells of."""
    run = Run(job_id, event["epoch"])
    return Done(event["time"], event["event"], run, event["target"], event["refused"])
