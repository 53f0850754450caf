"""Observe, decide, act: one cycle of the watcher, whose truth lies in the store and at the scheduler."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import select
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from outlast.config import Config
from outlast.model import JobKey, JobState, Lease, LeaseView, SchedulerJob, SchedulerNode
from outlast.scheduler import Scheduler, SchedulerRefused
from outlast.store import Store
from outlast.watcher.actions import (
    Action,
    Decision,
    DropLease,
    Evacuate,
    Exclude,
    Hasten,
    Hold,
    Leave,
    MarkDown,
    Past,
    Readmit,
    Requeue,
    Resume,
    Run,
    Snapshot,
)
from outlast.watcher.crashes import past_of, resume
from outlast.watcher.decisions import decide, is_late, suspects
from outlast.watcher.hearing import Hearing
from outlast.watcher.notes import Notes
from outlast.watcher.probe import Prober

log = logging.getLogger(__name__)

T = TypeVar("T")

# How much the scheduler is asked at once, and for how long in one cycle: slurmctld holds its locks meanwhile.
_NODES_AT_ONCE = 512
_JOBS_AT_ONCE = 256
_ACT_SECONDS = 1.0
# How many crashed jobs are looked up in the store in one cycle.
_PASTS_AT_ONCE = 20

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

    def __init__(
        self,
        config: Config,
        scheduler: Scheduler,
        store: Store,
        *,
        may_act: Callable[[], bool] = lambda: True,
    ) -> None:
        """*may_act* is asked before each command to the scheduler: whether no other watcher has taken over."""
        self._may_act = may_act
        self._config = config
        self._scheduler = scheduler
        self._store = store
        # Each question takes up to half a second already, so two in a row are two.
        self._prober = Prober(0.0)
        self._hearing = Hearing()
        self._fences: dict[Lease, float] = {}  # until when they stand (time.monotonic())
        self.notes = Notes(store, config.cluster)
        self._settled: frozenset[Run] = frozenset()
        self._pasts: dict[Run, Past] = {}
        self._nodes = 0  # of the cluster
        self._looked = -_LOOK_SECONDS
        self.leases: tuple[LeaseView, ...] = ()

    def cycle(self, *, look: bool = False, again: bool = False) -> tuple[Decision, ...]:
        """Look once, decide, and act. *look*: ask the scheduler even where no lease gives cause to.

        Raises:
            OutlastError: the store or the scheduler did not answer, or in an unknown way. Then nothing was
                decided, and what was seen of silent nodes is forgotten.
        """
        try:
            self._listen()
            self._lift_fences()
            self.notes.say()
            if not self.leases or not (look or self._cause_to_look()):
                self._prober.forget()
                return ()
            snapshot = self._observe()
            decisions = decide(snapshot, self._config)
            if self._recall(snapshot, decisions):
                decisions = decide(self._with_done(snapshot), self._config)
        except BaseException:
            self._prober.forget()
            self._hearing.forget()
            raise
        for decision in decisions:
            if isinstance(decision, Leave):
                log.debug("job %s: %s", decision.run.job_id, decision.reason)
                if decision.tell:
                    self.notes.record(decision.tell, (decision.run,), decision.reason)
        self._act(decisions)
        self._settle(snapshot, decisions)
        self.notes.say()
        if any(isinstance(decision, MarkDown) for decision in decisions) and not again:
            # The jobs are pending now, and would wait for the next cycle to be sent elsewhere.
            return decisions + self.cycle(look=True, again=True)
        return decisions

    def stand_by(self) -> None:
        """Only listen: another watcher acts. When it does no more, nothing has to be heard anew."""
        try:
            self._listen()
        except BaseException:
            self._hearing.forget()
            raise
        finally:
            self._prober.forget()
        self._fences.clear()

    def _listen(self) -> None:
        self.leases = tuple(self._store.leases(self._config.cluster))
        self._hearing.hear(self.leases, time.monotonic())

    def _cause_to_look(self) -> bool:
        if time.monotonic() - self._looked >= _LOOK_SECONDS or self._fences:
            return True
        return any(
            (view.lease.has_ended or is_late(view.lease, self._hearing.quiet, self._config))
            and Run(view.lease.job.job_id, view.lease.epoch) not in self._settled
            for view in self.leases
        )

    def _observe(self) -> Snapshot:
        jobs, nodes = self._look()
        asked = suspects(self.leases, jobs, nodes, self._hearing.quiet, self._config)
        probes = self._prober.ask(asked)
        if asked:
            # A silent node took a while, in which a job may have been requeued or a lease renewed.
            self._listen()
            jobs, nodes = self._look()
        self._forget_gone(jobs)
        return Snapshot(
            time.time(),
            self.leases,
            jobs,
            nodes,
            probes,
            tuple(self.notes.done),
            dict(self._hearing.quiet),
            self._look_up_crashes(jobs),
        )

    def _look_up_crashes(self, jobs: tuple[SchedulerJob, ...]) -> Mapping[Run, Past]:
        """Return what the store knows of each job whose newest run crashed, read once for each."""
        failed = {job.job_id: job.epoch for job in jobs if job.state is JobState.FAILED}
        ended = [view.lease for view in self.leases if view.lease.has_ended]
        crashed = {Run(one.job.job_id, one.epoch) for one in ended if failed.get(one.job.job_id) == one.epoch}
        self._pasts = {run: past for run, past in self._pasts.items() if run in crashed}
        for run in sorted(crashed - {*self._pasts})[:_PASTS_AT_ONCE]:
            self._pasts[run] = past_of(self._store, JobKey(self._config.cluster, run.job_id))
        return dict(self._pasts)

    def _look(self) -> tuple[tuple[SchedulerJob, ...], tuple[SchedulerNode, ...]]:
        jobs, nodes = self._scheduler.jobs(), self._scheduler.nodes()
        if not self._nodes and nodes:
            self._nodes = len(nodes)
            self.notes.tell_site("watching", "", self._nodes)
        self._nodes = len(nodes) or self._nodes
        self._looked = time.monotonic()
        return jobs, nodes

    def _with_done(self, old: Snapshot) -> Snapshot:
        return dataclasses.replace(old, done=tuple(self.notes.done))

    def _forget_gone(self, jobs: tuple[SchedulerJob, ...]) -> None:
        known = {job.job_id for job in jobs} | {view.lease.job.job_id for view in self.leases}
        self.notes.forget_all_but(known)

    def _settle(self, snapshot: Snapshot, decisions: tuple[Decision, ...]) -> None:
        """Remember which leases that ran out need no look in every cycle: nothing is to be done for them."""
        busy = {run.job_id for one in decisions if not isinstance(one, Leave) for run in one.runs}
        busy |= {job.job_id for job in snapshot.jobs if job.state is JobState.RUNNING}
        out = (view.lease for view in snapshot.leases if view.age > self._config.lease.ttl)
        runs = (Run(lease.job.job_id, lease.epoch) for lease in out)
        self._settled = frozenset(run for run in runs if run.job_id not in busy)

    def _recall(self, snapshot: Snapshot, decisions: tuple[Decision, ...]) -> bool:
        """Read from the store what an earlier watcher did for jobs about which something is to be done."""
        # Marking a node down twice does no harm, and there may be thousands of jobs to be asked after.
        once = Requeue | Resume | Hold | DropLease
        wanted = {run.job_id for one in decisions if isinstance(one, once) for run in one.runs}
        wanted |= {one.run.job_id for one in decisions if isinstance(one, Leave) and one.tell}
        marked = {one.run.job_id for one in snapshot.done if one.event == MarkDown.event}
        wanted |= {view.lease.job.job_id for view in snapshot.leases if view.lease.is_fence} - marked
        with_lease = {view.lease.job.job_id for view in snapshot.leases}
        # Without its log nobody can tell whether a node was excluded by the watcher or by a person.
        wanted |= {
            job.job_id
            for job in snapshot.jobs
            if (job.excluded or job.required) and job.state is JobState.PENDING
        } & with_lease
        return self.notes.recall(wanted)

    def _act(self, decisions: tuple[Decision, ...]) -> None:
        """Do what was decided, all of a kind at once; each thing may be done twice without harm.

        What would be more than the scheduler should be asked in one cycle is left to the next, in which it is
        decided again.
        """
        marks = [one for one in decisions if isinstance(one, MarkDown)]
        for some in _batches(marks, _NODES_AT_ONCE):
            why = some[0].reason if len(some) == 1 else f"no heartbeat from {len(some)} nodes, and no answer"
            self._do(some, lambda some=some, why=why: self._mark_down(some, why))  # type: ignore[misc]
        if marks:
            self._put_up_fences(marks)
            for mark in marks:
                self.notes.tell_site("node-lost", mark.node, self._nodes)
        moves: dict[tuple[str, ...], list[Exclude | Hasten | Readmit]] = {}
        for one in decisions:
            if isinstance(one, Exclude | Hasten | Readmit):
                later = isinstance(one, Readmit) or (isinstance(one, Exclude) and one.wait > 0)
                kind = ("later",) if later else ("now",)
                moves.setdefault((*kind, *_kept_from(one)), []).append(one)
        calls = [(key, some) for key, all in moves.items() for some in _batches(all, _JOBS_AT_ONCE)]
        for one in decisions:
            if isinstance(one, Exclude) and one.unbind:
                self._do([], lambda one=one: self._scheduler.require(one.job.handle, ""))  # type: ignore[misc]
        until = time.monotonic() + _ACT_SECONDS
        for (when, *nodes), moved in calls:
            if time.monotonic() > until:
                break
            handles = [one.job.handle for one in moved]
            exclude = functools.partial(self._scheduler.exclude, handles, nodes, at_once=when == "now")
            self._do(moved, exclude)
            for one in moved:
                if isinstance(one, Exclude) and one.wait:
                    self._do([], functools.partial(self._scheduler.delay, one.job.handle, one.wait))
        for one in [one for one in decisions if isinstance(one, Requeue | Resume | Hold)]:
            if time.monotonic() > until:
                break
            self._do([one], functools.partial(self._run_again, one))
            if isinstance(one, Resume) and one.away:
                # For the next run; it is let have the node again in time, like one that was lost there.
                then = (Run(one.job.job_id, one.job.epoch + 1),)
                self.notes.record(Exclude.event, then, "the job crashed there", one.away)
        for one in decisions:
            if isinstance(one, Evacuate):
                job = JobKey(self._config.cluster, one.job.job_id)
                request = {"op": "leave", "why": one.reason}
                self._do([one], functools.partial(self._store.post_request, job, request))
            if isinstance(one, DropLease):
                self._do([one], lambda one=one: self._store.drop_lease(one.lease))  # type: ignore[misc]

    def _do(self, decisions: Sequence[Action], act: Callable[[], object]) -> None:
        if not self._may_act():
            log.warning("too long was taken to decide: another watcher may act by now, so nothing is done")
            return
        try:
            act()
        except SchedulerRefused as error:
            for one in decisions:
                self.notes.record(one.event, one.runs, f"refused: {error}", one.node, refused=True)
        else:
            for one in decisions:
                self.notes.record(one.event, one.runs, one.reason, one.node)

    def _run_again(self, one: Requeue | Resume | Hold) -> None:
        handle = one.job.handle
        if isinstance(one, Resume):
            resume(self._store, self._scheduler, JobKey(self._config.cluster, one.job.job_id), one)
        elif isinstance(one, Requeue):
            self._scheduler.requeue(handle)
        elif one.job.state is JobState.PENDING:
            self._scheduler.hold(handle)
        else:
            self._scheduler.requeue_hold(handle)

    def _mark_down(self, marks: Sequence[MarkDown], why: str) -> None:
        self._scheduler.mark_down([one.node for one in marks], f"outlast: {why}")

    def _put_up_fences(self, marks: Sequence[MarkDown]) -> None:
        """Let the next runs of lost jobs begin when those that were lost must have been stopped.

        A run that the scheduler still has go on may have its word for it, so it gets no fence: the run after it
        waits for itself.
        """
        jobs = {job.job_id: job for job in self._scheduler.jobs()}
        lost = {run for one in marks for run in one.runs}
        until = time.monotonic() + self._config.lease.ttl
        for view in self.leases:
            lease = view.lease
            job = jobs.get(lease.job.job_id)
            if Run(lease.job.job_id, lease.epoch) in lost and job is not None and job.epoch > lease.epoch:
                self._store.renew_lease(lease.fence())
                self._store.drop_lease(lease)
                self._fences[lease.fence()] = until

    def _lift_fences(self) -> None:
        for fence in [fence for fence, until in self._fences.items() if time.monotonic() >= until]:
            self._store.renew_lease(fence.lifted())
            self._store.drop_lease(fence)
            del self._fences[fence]


def _batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _kept_from(one: Exclude | Hasten | Readmit) -> list[str]:
    match one:
        case Exclude():
            return sorted({*one.nodes, one.node})
        case Hasten():
            return sorted(one.job.excluded)
        case Readmit():
            return sorted({*one.job.excluded} - {one.node})
