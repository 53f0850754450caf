"""What to do about a cluster's jobs: a pure function of one snapshot, whose reasons are the log lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from outlast.config import Config
from outlast.model import JobState, Lease, LeaseView, SchedulerJob, SchedulerNode
from outlast.watcher import restarts
from outlast.watcher.actions import (
    BOUND,
    Decision,
    Done,
    DropLease,
    Evacuate,
    Exclude,
    Hasten,
    Hold,
    Leave,
    MarkDown,
    Readmit,
    Requeue,
    Run,
    Snapshot,
)

# A node counts as dead only when this many cycles in a row found it silent: one lost packet proves nothing.
_SILENT_CYCLES = 2
# Where so many nodes at least, and more than half of those with jobs, fall silent within one look, it is likelier
# that the watcher is cut off than that all of them died: they are believed to be dead only after so many times
# the usual silence.
_MANY_NODES = 3
_MANY_TIMES = 5.0
# Where a node was started anew its managers are waited for so many times the lease's length: the machine may run on,
# and nothing but its daemons have been upgraded, slurmd and the managers alike.
_RESTARTED_TIMES = 2
# A manager whose lease has had no beat for so many renewals is asked after.
_MISSED_BEATS = 2
# Seconds for which the lease of an ended job is left alone: its manager may still be shipping.
_LEASE_KEPT = 60.0
# Slurm sets the delay of a requeued job anew when its epilog has ended, so it may have to be ended twice.
_WORTH_HASTENING = 1.0
_HASTENED_FOR = 1.0
# Lost nodes of a job within a day that are no cause to put its next run off.
_LOSSES_FREE = 2
# Seconds until a thing that the scheduler refused is asked for again.
_REFUSED_FOR = 10.0


def decide(snapshot: Snapshot, config: Config) -> tuple[Decision, ...]:
    """What to do about every job that has a lease. Pure: all that it needs is in its arguments.

    Returns:
        One decision for each lease, but only one `MarkDown` for each node, with all the runs lost there.
    """
    jobs = {job.job_id: job for job in snapshot.jobs}
    decisions: list[Decision] = []
    decision: Decision
    for view in snapshot.leases:
        job = jobs.get(view.lease.job.job_id)
        if view.lease.has_ended and job is not None and job.state is not JobState.PENDING:
            decision = _crashed(view, job, snapshot, config)
        elif view.lease.is_fence and (job is None or job.state is not JobState.PENDING):
            decision = _fence(view)
        elif job is None:
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
    return tuple(_unless_too_many(_one_for_each_node(decisions), snapshot, config))


def suspects(
    leases: Iterable[LeaseView],
    jobs: Iterable[SchedulerJob],
    nodes: Iterable[SchedulerNode],
    quiet: Mapping[Lease, float],
    config: Config,
) -> tuple[SchedulerNode, ...]:
    """Return the nodes that have to be asked whether they live, before `decide` can tell.

    They are asked before they have been silent for long enough, so that nothing is left to wait for then.
    """
    known = {job.job_id: job for job in jobs}
    late: dict[str, bool] = {}
    for view in leases:
        job = known.get(view.lease.job.job_id)
        if job is not None and job.state is JobState.RUNNING and _is_run_of(view, job):
            late.setdefault(view.lease.node, True)
            late[view.lease.node] &= is_late(view.lease, quiet, config)
    return tuple(node for node in nodes if late.get(node.name) and node.up)


def is_late(lease: Lease, quiet: Mapping[Lease, float], config: Config) -> bool:
    """Whether a lease should have been renewed by now, though its node may not have been silent for long."""
    return lease.is_held and quiet.get(lease, 0.0) > _MISSED_BEATS * config.lease.renew


def _fence(view: LeaseView) -> Decision:
    run = Run(view.lease.job.job_id, view.lease.epoch)
    if view.age <= _LEASE_KEPT:
        return Leave(run, "the run before is known to have been lost")
    return DropLease(view.lease, "the run before was lost, and the job does not wait for a node any more")


def _crashed(view: LeaseView, job: SchedulerJob, snapshot: Snapshot, config: Config) -> Decision:
    """The run of the lease ended by itself, and not well; *job* does not wait to be run again."""
    run = Run(job.job_id, view.lease.epoch)
    if job.epoch != view.lease.epoch:
        return Leave(
            run, f"the lease is of run {view.lease.epoch}, which crashed; run {job.epoch} has none yet"
        )
    decision = restarts.after_crash(job, snapshot, config)
    said = isinstance(decision, Leave) and bool(decision.tell) and _is_known(decision, snapshot)
    if said or not restarts.has_crashed(job):
        # Nothing more is to be done for it.
        return _ended(view, f"the job is {job.raw_state}")
    return decision


def _is_run_of(view: LeaseView, job: SchedulerJob) -> bool:
    """Whether the lease is of this very run, on a node that the scheduler gave it."""
    return view.lease.epoch == job.epoch and view.lease.node in job.nodes


def _running(view: LeaseView, job: SchedulerJob, snapshot: Snapshot, config: Config) -> Decision:
    lease, run = view.lease, Run(job.job_id, job.epoch)
    if lease.epoch != job.epoch:
        return Leave(run, f"the lease is of run {lease.epoch}; run {job.epoch} has none yet")
    if lease.node not in job.nodes:
        return Leave(run, f"the lease is from {lease.node}, where the scheduler does not run the job")
    quiet, silent = snapshot.quiet.get(lease, 0.0), config.watcher.silent
    if quiet <= silent:
        if job.preempted:
            return Evacuate(job, "the scheduler preempts the job")
        return Leave(run, "its manager is heard")
    if quiet > _RESTARTED_TIMES * config.lease.ttl and _has_restarted(
        job, lease.node, quiet, snapshot, config
    ):
        # No manager came back with the machine, and the scheduler may take a minute to find that no job did.
        return Requeue(job, f"{lease.node} was started anew, and nothing is heard of the job there since")
    if snapshot.quiet_at[lease.node] <= silent:
        # Another manager there is heard, so the machine lives.
        return Leave(run, "manager silent, node alive", "manager-silent" if quiet > config.lease.ttl else "")
    node = snapshot.node_named.get(lease.node)
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
            run,
            "manager silent, node alive",
            "manager-silent" if probe.times >= _SILENT_CYCLES and quiet > config.lease.ttl else "",
        )
    if probe.times < _SILENT_CYCLES:
        return Leave(run, f"{node.name} did not answer once; it is asked again")
    reason = (
        f"no heartbeat came from there for {quiet:.1f} s, "
        f"and there is no answer from {node.address} port {node.port} in {_SILENT_CYCLES} tries"
    )
    if not config.watcher.mark_down:
        return Leave(run, f"{reason}; left to the scheduler, as [watcher] mark_down is false", "node-silent")
    return MarkDown(node.name, (run,), reason)


def _has_restarted(job: SchedulerJob, name: str, quiet: float, snapshot: Snapshot, config: Config) -> bool:
    """Whether a node was started after a job there was last heard of, and the job is the watcher's to be requeued."""
    node = snapshot.node_named.get(name)
    # It is told in whole seconds.
    if node is None or not node.up or node.started + 1 <= snapshot.now - quiet:
        return False
    policy = restarts.policy_of(job, snapshot, config)
    return job.requeueable and config.watcher.mark_down and policy.on_node_failure


def _lost(view: LeaseView, job: SchedulerJob, config: Config) -> Decision:
    run = Run(job.job_id, job.epoch)
    if view.age <= config.lease.ttl:
        # The node may be cut off from the scheduler rather than dead; two copies of a job must never write.
        return Leave(run, f"the lease runs {config.lease.ttl - view.age:.0f} s more")
    if not job.requeueable:
        return Leave(
            run, f"the job is {job.raw_state}, and may not be requeued (--no-requeue)", "not-requeueable"
        )
    if not config.restart.policy(job.partition).on_node_failure:
        return Leave(run, f"the job is {job.raw_state}; on_node_failure is false for it", "not-restarted")
    return Requeue(job, f"the job is {job.raw_state} by no fault of its own, and its lease has run out")


def _pending(view: LeaseView, job: SchedulerJob, snapshot: Snapshot, config: Config) -> Decision:
    run, node = Run(job.job_id, job.epoch), view.lease.node
    known = snapshot.done_for.get(job.job_id, [])
    excluded = _excluded_by_us(known)
    for name, since in excluded.items():
        if name in job.excluded and snapshot.now - since >= config.watcher.exclude:
            return Readmit(job, name, f"the job was kept away from {name} for {config.watcher.exclude} s")
    lost = Run(job.job_id, job.epoch - 1)
    marked = next((one.node for one in known if one.event == MarkDown.event and one.run == lost), "")
    if not view.lease.is_held:
        node = marked
    elif view.lease.epoch >= job.epoch:
        return Leave(run, "the lease is not of an earlier run")
    if view.age >= config.watcher.exclude or not (node and (marked == node or _is_gone(node, snapshot))):
        return Leave(run, "the job waits for a node")
    losses = restarts.losses(known, snapshot.now)
    policy = restarts.policy_of(job, snapshot, config)
    if losses > policy.budget:
        return Hold(job, f"its node was lost {losses} times within a day, and its budget is {policy.budget}")
    # Machines die without the job's doing: only a job that loses one after the other is put off.
    wait = policy.wait_before(losses - _LOSSES_FREE)
    # What was done for an earlier run may be done no more: only the list that the scheduler has tells.
    if node in job.excluded:
        if node in excluded and not wait and job.begin > snapshot.now + _WORTH_HASTENING:
            return Hasten(
                job, node, f"it was to wait {job.begin - snapshot.now:.0f} s, for no node but {node}"
            )
        return Leave(run, f"the job waits for a node other than {node}")
    bound = any(one.event == BOUND and one.node == node for one in known)
    if node in job.required and not bound:
        return Leave(run, f"the job asks for {node} by name, so it waits for that node", "pinned")
    others = {name for name in job.excluded if name != node}
    if not any(one.up and one.name != node and one.name not in others for one in snapshot.nodes):
        others -= {*excluded}  # rather where it was lost some time ago than nowhere
    return Exclude(
        job, node, f"the job was lost on {node}", tuple(sorted(others)), bound and node in job.required, wait
    )


def _is_gone(node: str, snapshot: Snapshot) -> bool:
    """Whether a run ended with its node, and not since a person had the job requeued."""
    known = snapshot.node_named.get(node)
    return known is not None and not (known.up and known.responding)


def _excluded_by_us(done: Iterable[Done]) -> dict[str, float]:
    """Return since when the watcher keeps the job of *done* away from which nodes.

    What a person has excluded is not here.
    """
    nodes: dict[str, float] = {}
    for one in sorted(done, key=lambda one: one.time):
        if not one.refused:
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
        return Leave(decision.run, decision.reason) if _is_known(decision, snapshot) else decision
    for one in reversed(snapshot.done_for.get(decision.runs[0].job_id, [])):
        if one.event != decision.event or one.node != decision.node or one.run != decision.runs[0]:
            continue
        ago = snapshot.now - one.time
        if isinstance(decision, Hasten) and not one.refused and ago > _HASTENED_FOR:
            return decision
        if not one.refused:
            return Leave(one.run, f"{one.event} {ago:.0f} s ago")
        if ago < _REFUSED_FOR:
            return Leave(one.run, f"refused {ago:.0f} s ago; asked again later")
    return decision


def _is_known(remark: Leave, snapshot: Snapshot) -> bool:
    """Whether the job's owner was told so of this run."""
    known = snapshot.done_for.get(remark.run.job_id, []) if remark.tell else []
    return any(one.event == remark.tell and one.run == remark.run for one in known)


def _unless_too_many(decisions: Iterable[Decision], snapshot: Snapshot, config: Config) -> Iterable[Decision]:
    """Where most nodes fall silent at once, believe that they are dead only after a longer silence."""
    decisions = list(decisions)
    marks = [one for one in decisions if isinstance(one, MarkDown)]
    nodes = {view.lease.node for view in snapshot.leases if view.lease.is_held}
    many = len(marks) >= _MANY_NODES and 2 * len(marks) > len(nodes)
    quiet = {view.lease.node: snapshot.quiet.get(view.lease, 0.0) for view in snapshot.leases}
    for one in decisions:
        if many and isinstance(one, MarkDown) and quiet[one.node] <= _MANY_TIMES * config.watcher.silent:
            why = f"{one.node}: {one.reason}; but {len(marks)} of {len(nodes)} nodes fell silent at once"
            yield from (Leave(run, why) for run in one.runs)
        else:
            yield one


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
