"""What to do about a cluster's jobs: a pure function of one snapshot, whose reasons are the log lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from outlast.config import Config
from outlast.model import JobState, Lease, LeaseView, SchedulerJob, SchedulerNode

# A node counts as dead only when this many cycles in a row found it silent: one lost packet proves nothing.
_SILENT_CYCLES = 2
# Seconds for which the lease of an ended job is left alone: its manager may still be shipping.
_LEASE_KEPT = 60.0
# Seconds until a thing that the scheduler refused is asked for again.
_REFUSED_FOR = 10.0


class Run(NamedTuple):
    """One run of one job: an action is never taken twice for the same run."""

    job_id: str
    epoch: int


@dataclass(frozen=True)
class Probe:
    """Whether a node answered a TCP connect, and for how many cycles in a row it was so."""

    answered: bool
    times: int


@dataclass(frozen=True)
class Done:
    """An action taken, or a remark made, about a run at *time* (Unix time, the watcher's clock)."""

    time: float
    event: str
    run: Run
    node: str = ""
    refused: bool = False


@dataclass(frozen=True)
class Snapshot:
    """All that one decision rests on, taken within one cycle; nothing in it is older news.

    *leases* were read before *jobs*: a job is never judged by a scheduler's view older than its lease.
    *probes* holds only nodes that were asked in this cycle and of which the answer is certain.
    """

    now: float  # Unix time, the watcher's clock; compared only with the times of *done*
    leases: tuple[LeaseView, ...]
    jobs: tuple[SchedulerJob, ...]
    nodes: tuple[SchedulerNode, ...]
    probes: Mapping[str, Probe]
    done: tuple[Done, ...]


@dataclass(frozen=True)
class MarkDown:
    """Tell the scheduler that *node* is dead; it requeues the jobs that ran there."""

    event: ClassVar[str] = "node-marked-down"
    node: str
    runs: tuple[Run, ...]
    reason: str


@dataclass(frozen=True)
class Requeue:
    """Have the scheduler run a lost job again."""

    event: ClassVar[str] = "requeued"
    job: SchedulerJob
    reason: str
    node: ClassVar[str] = ""

    @property
    def runs(self) -> tuple[Run, ...]:
        """The run that was lost."""
        return (Run(self.job.job_id, self.job.epoch),)


@dataclass(frozen=True)
class Exclude:
    """Keep a pending job away from the node that it was lost on."""

    event: ClassVar[str] = "node-excluded"
    job: SchedulerJob
    node: str
    reason: str

    @property
    def runs(self) -> tuple[Run, ...]:
        """The run that is to start."""
        return (Run(self.job.job_id, self.job.epoch),)


@dataclass(frozen=True)
class Readmit:
    """Let a job that is still pending have the node again that `Exclude` kept it away from."""

    event: ClassVar[str] = "node-readmitted"
    job: SchedulerJob
    node: str
    reason: str

    @property
    def runs(self) -> tuple[Run, ...]:
        """The run that is to start."""
        return (Run(self.job.job_id, self.job.epoch),)


@dataclass(frozen=True)
class DropLease:
    """Take away a lease that nobody will renew again."""

    event: ClassVar[str] = "lease-dropped"
    lease: Lease
    reason: str

    @property
    def node(self) -> str:
        """The node that held the lease."""
        return self.lease.node

    @property
    def runs(self) -> tuple[Run, ...]:
        """The run that held the lease."""
        return (Run(self.lease.job.job_id, self.lease.epoch),)


@dataclass(frozen=True)
class Leave:
    """Do nothing. Where *tell* names an event, the job's owner is told once for this run."""

    run: Run
    reason: str
    tell: str = ""


Action = MarkDown | Requeue | Exclude | Readmit | DropLease
Decision = Action | Leave


def decide(snapshot: Snapshot, config: Config) -> tuple[Decision, ...]:
    """What to do about every job that has a lease. Pure: all that it needs is in its arguments.

    Returns:
        One decision for each lease, but only one `MarkDown` for each node, with all the runs lost there.
    """
    jobs = {job.job_id: job for job in snapshot.jobs}
    decisions = []
    for view in snapshot.leases:
        job = jobs.get(view.lease.job.job_id)
        if job is None:
            decision = _ended(view, "the scheduler does not know the job any more")
        elif job.state in (JobState.DONE, JobState.FAILED):
            decision = _ended(view, f"the job is {job.raw_state}")
        elif job.state is JobState.LOST:
            decision = _lost(view, job, config)
        elif job.state is JobState.PENDING:
            decision = _pending(view, job, snapshot, config)
        else:
            decision = _running(view, job, snapshot, config)
        decisions.append(_unless_done(decision, snapshot))
    return tuple(_one_for_each_node(decisions))


def suspects(
    leases: Iterable[LeaseView], jobs: Iterable[SchedulerJob], nodes: Iterable[SchedulerNode], config: Config
) -> tuple[SchedulerNode, ...]:
    """Return the nodes that have to be asked whether they live, before `decide` can tell.

    They are asked before a lease has run out, so that nothing is left to wait for when it has.
    """
    known = {job.job_id: job for job in jobs}
    names = set()
    for view in leases:
        job = known.get(view.lease.job.job_id)
        if (
            job is not None
            and job.state is JobState.RUNNING
            and _is_run_of(view, job)
            and is_late(view, config)
        ):
            names.add(view.lease.node)
    return tuple(node for node in nodes if node.name in names and node.up)


def is_late(view: LeaseView, config: Config) -> bool:
    """Whether a lease should have been renewed by now, though it may not have run out yet."""
    return view.age > (config.lease.renew + config.lease.ttl) / 2


def _is_run_of(view: LeaseView, job: SchedulerJob) -> bool:
    """Whether the lease is of this very run, on a node that the scheduler gave it."""
    return view.lease.epoch == job.epoch and view.lease.node in job.nodes


def _running(view: LeaseView, job: SchedulerJob, snapshot: Snapshot, config: Config) -> Decision:
    lease, run = view.lease, Run(job.job_id, job.epoch)
    if lease.epoch != job.epoch:
        return Leave(run, f"the lease is of run {lease.epoch}; run {job.epoch} has none yet")
    if lease.node not in job.nodes:
        return Leave(run, f"the lease is from {lease.node}, where the scheduler does not run the job")
    if view.age <= config.lease.ttl:
        return Leave(run, f"the lease runs {config.lease.ttl - view.age:.0f} s more")
    node = next((node for node in snapshot.nodes if node.name == lease.node), None)
    if node is None:
        return Leave(run, f"the scheduler knows no node {lease.node}")
    if not node.up:
        return Leave(run, f"{node.name} is down already, and the scheduler requeues its jobs")
    probe = snapshot.probes.get(node.name)
    if probe is None:
        return Leave(run, f"it is not known whether {node.name} lives")
    if probe.answered:
        # One answer may come in the very cycle in which the store is back and every lease still looks old.
        return Leave(
            run, "manager silent, node alive", "manager-silent" if probe.times >= _SILENT_CYCLES else ""
        )
    if probe.times < _SILENT_CYCLES:
        return Leave(run, f"{node.name} did not answer once; it is asked again")
    reason = (
        f"no lease was renewed there for {view.age:.0f} s, "
        f"and there is no answer from {node.address} port {node.port} in {_SILENT_CYCLES} tries"
    )
    if not config.watcher.mark_down:
        return Leave(run, f"{reason}; left to the scheduler, as [watcher] mark_down is false", "node-silent")
    return MarkDown(node.name, (run,), reason)


def _lost(view: LeaseView, job: SchedulerJob, config: Config) -> Decision:
    run = Run(job.job_id, job.epoch)
    if view.age <= config.lease.ttl:
        # The node may be cut off from the scheduler rather than dead; two copies of a job must never write.
        return Leave(run, f"the lease runs {config.lease.ttl - view.age:.0f} s more")
    if not job.requeueable:
        return Leave(
            run, f"the job is {job.raw_state}, and may not be requeued (--no-requeue)", "not-requeueable"
        )
    return Requeue(job, f"the job is {job.raw_state} by no fault of its own, and its lease has run out")


def _pending(view: LeaseView, job: SchedulerJob, snapshot: Snapshot, config: Config) -> Decision:
    run, node = Run(job.job_id, job.epoch), view.lease.node
    excluded = _excluded_by_us(job.job_id, snapshot.done)
    for name, since in excluded.items():
        if name in job.excluded and snapshot.now - since >= config.watcher.exclude:
            return Readmit(job, name, f"the job was kept away from {name} for {config.watcher.exclude} s")
    if view.lease.epoch >= job.epoch:
        return Leave(run, "the lease is not of an earlier run")
    if view.age >= config.watcher.exclude or not _was_lost_on(node, view.lease, snapshot):
        return Leave(run, "the job waits for a node")
    if node in excluded or node in job.excluded:
        return Leave(run, f"the job waits for a node other than {node}")
    if node in job.required:
        return Leave(run, f"the job asks for {node} by name, so it waits for that node", "pinned")
    return Exclude(job, node, f"the job was lost on {node} {view.age:.0f} s ago")


def _was_lost_on(node: str, lease: Lease, snapshot: Snapshot) -> bool:
    """Whether it was the node that ended this lease's run, and not a person who had the job requeued."""
    run = Run(lease.job.job_id, lease.epoch)
    return any(done.event == MarkDown.event and done.run == run for done in snapshot.done) or any(
        known.name == node and not (known.up and known.responding) for known in snapshot.nodes
    )


def _excluded_by_us(job_id: str, done: Iterable[Done]) -> dict[str, float]:
    """Return since when a job is kept away from which nodes by the watcher; what a person set is not here."""
    nodes: dict[str, float] = {}
    for one in sorted(done, key=lambda one: one.time):
        if one.run.job_id == job_id and not one.refused:
            if one.event == Exclude.event:
                nodes[one.node] = one.time
            elif one.event == Readmit.event:
                nodes.pop(one.node, None)
    return nodes


def _ended(view: LeaseView, why: str) -> Decision:
    run = Run(view.lease.job.job_id, view.lease.epoch)
    if view.age <= _LEASE_KEPT:
        return Leave(run, f"{why}; its manager may still be at work")
    return DropLease(view.lease, f"{why}, and the lease was last renewed {view.age:.0f} s ago")


def _unless_done(decision: Decision, snapshot: Snapshot) -> Decision:
    """What was done, or said, for a run is not done or said again; what was refused is, after a while."""
    if isinstance(decision, Leave):
        told = any(one.event == decision.tell and one.run == decision.run for one in snapshot.done)
        return Leave(decision.run, decision.reason) if told else decision
    for one in reversed(snapshot.done):
        if one.event != decision.event or one.node != decision.node or one.run != decision.runs[0]:
            continue
        ago = snapshot.now - one.time
        if not one.refused:
            return Leave(one.run, f"{one.event} {ago:.0f} s ago")
        if ago < _REFUSED_FOR:
            return Leave(one.run, f"refused {ago:.0f} s ago; asked again later")
    return decision


def _one_for_each_node(decisions: Iterable[Decision]) -> Iterable[Decision]:
    marks: dict[str, MarkDown] = {}
    for decision in decisions:
        if not isinstance(decision, MarkDown):
            yield decision
        elif decision.node in marks:
            first = marks[decision.node]
            marks[decision.node] = MarkDown(first.node, first.runs + decision.runs, first.reason)
        else:
            marks[decision.node] = decision
    yield from marks.values()
