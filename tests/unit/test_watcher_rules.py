"""What holds for the watcher's decisions whatever it sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from outlast.config import Config
from outlast.model import JobKey, JobState, Lease, LeaseView, SchedulerJob, SchedulerNode
from outlast.watcher.actions import (
    Done,
    DropLease,
    Exclude,
    Hasten,
    Leave,
    MarkDown,
    Probe,
    Readmit,
    Requeue,
    Run,
    Snapshot,
)
from outlast.watcher.decisions import decide

CONFIG = Config(cluster="c")
NOW = 1000.0
NODES = ("n1", "n2")
JOBS = ("17", "18")
EPOCHS = st.integers(0, 1)
SOME_NODES = st.sampled_from([(), ("n1",), ("n2",), NODES])
RARELY = st.integers(0, 4).map(lambda number: number == 0)
STATES = st.sampled_from([*JobState, JobState.PENDING, JobState.RUNNING, JobState.RUNNING])
EVENTS = [
    "node-excluded",
    "node-excluded",
    "node-readmitted",
    "node-marked-down",
    "bound",
    "hastened",
    "requeued",
    "lease-dropped",
]


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Snapshots of small clusters, few of them sound, but close enough to each rule that all are met."""
    jobs = [
        SchedulerJob(
            job_id=job_id,
            state=(state := draw(STATES)),
            raw_state=state.name,
            epoch=draw(EPOCHS),
            nodes=draw(st.sampled_from([("n1",), ("n2",)])),
            uid=2000,
            name="lu",
            excluded=draw(SOME_NODES),
            required=draw(SOME_NODES),
            requeueable=not draw(RARELY),
            handle=job_id,
            begin=draw(st.sampled_from([0.0, NOW + 6])),
        )
        for job_id in JOBS
        if not draw(RARELY)
    ]
    leases = [
        LeaseView(
            Lease(
                JobKey("c", job_id),
                draw(EPOCHS),
                draw(st.sampled_from([*NODES, *NODES, "_", "_lifted"])),
                2000,
            ),
            draw(st.sampled_from([0.0, 5.0, 5.1, 20.0, 61.0, 301.0])),
        )
        for job_id in JOBS
        if not draw(RARELY)
    ]
    nodes = [
        SchedulerNode(
            name,
            up=not draw(RARELY),
            responding=draw(st.booleans()),
            address=name,
            started=draw(st.sampled_from([0.0, NOW - 100, NOW - 100, NOW - 10])),
        )
        for name in NODES
        if not draw(RARELY)
    ]
    probes: Mapping[str, Probe] = {
        name: Probe(draw(st.booleans()), draw(st.integers(1, 20))) for name in NODES if not draw(RARELY)
    }
    past = st.builds(
        Done,
        time=st.sampled_from([NOW - 400, NOW - 301, NOW - 11, NOW - 1]),
        event=st.sampled_from(EVENTS),
        run=st.builds(Run, st.sampled_from(JOBS), EPOCHS),
        node=st.sampled_from([*NODES, *NODES, ""]),
        refused=RARELY,
    )
    done = draw(st.lists(past, max_size=3))
    quiet = {view.lease: draw(st.sampled_from([0.0, 2.0, 2.1, 20.0])) for view in leases}
    return Snapshot(NOW, tuple(leases), tuple(jobs), tuple(nodes), probes, tuple(done), quiet)


@pytest.mark.parametrize("kind", [MarkDown, Requeue, Exclude, Readmit, DropLease])
def test_the_snapshots_below_lead_to_every_action(kind: type) -> None:
    find(
        snapshots(),
        lambda seen: any(isinstance(one, kind) for one in decide(seen, CONFIG)),
        settings=settings(max_examples=5000, database=None, derandomize=True, phases=[Phase.generate]),
    )


@settings(max_examples=300)
@given(snapshots())
def test_a_node_that_answers_or_was_not_asked_is_never_marked_down(seen: Snapshot) -> None:
    for decision in decide(seen, CONFIG):
        if isinstance(decision, MarkDown):
            assert not seen.probes[decision.node].answered
            assert seen.probes[decision.node].times >= 2


@given(snapshots())
def test_no_node_is_marked_down_while_any_manager_there_is_heard(seen: Snapshot) -> None:
    for decision in decide(seen, CONFIG):
        if isinstance(decision, MarkDown):
            there = [lease for lease in seen.quiet if lease.node == decision.node]
            assert there
            assert all(seen.quiet[lease] > CONFIG.watcher.silent for lease in there)


@given(snapshots())
def test_only_jobs_that_were_lost_and_have_no_valid_lease_are_requeued(seen: Snapshot) -> None:
    views = {view.lease.job.job_id: view for view in seen.leases}
    for decision in decide(seen, CONFIG):
        if isinstance(decision, Requeue):
            view = views[decision.job.job_id]
            assert decision.job.requeueable
            if decision.job.state is JobState.LOST:
                assert view.age > CONFIG.lease.ttl
                continue
            quiet = seen.quiet[view.lease]
            assert decision.job.state is JobState.RUNNING
            assert quiet > 2 * CONFIG.lease.ttl
            assert seen.node_named[view.lease.node].started + 1 > NOW - quiet


@given(snapshots())
def test_only_pending_jobs_have_nodes_excluded_and_never_the_one_they_ask_for(seen: Snapshot) -> None:
    for decision in decide(seen, CONFIG):
        if isinstance(decision, Exclude | Hasten | Readmit):
            assert decision.job.state is JobState.PENDING
        if isinstance(decision, Hasten):
            assert decision.node in decision.job.excluded
        if isinstance(decision, Exclude):
            assert decision.node not in decision.job.excluded
            assert decision.unbind is (decision.node in decision.job.required)


@given(snapshots())
def test_the_lease_of_a_job_that_is_to_run_is_never_dropped(seen: Snapshot) -> None:
    states = {job.job_id: job.state for job in seen.jobs}
    for decision in decide(seen, CONFIG):
        if isinstance(decision, DropLease) and not decision.lease.is_fence:
            state = states.get(decision.lease.job.job_id)
            assert state in (None, JobState.DONE, JobState.FAILED)


@given(snapshots())
def test_what_was_done_is_not_done_again(seen: Snapshot) -> None:
    acted = [one for one in decide(seen, CONFIG) if not isinstance(one, Leave)]
    remarks = [one for one in decide(seen, CONFIG) if isinstance(one, Leave) and one.tell]
    recorded = [Done(NOW, one.event, run, one.node) for one in acted for run in one.runs]
    recorded += [Done(NOW, one.tell, one.run) for one in remarks]
    # Both end the delay of a pending job. Where it is there again, ending it again is no repetition.
    begun = {one.job.job_id for one in acted if isinstance(one, Exclude | Hasten)}
    jobs = tuple(dataclasses.replace(job, begin=0.0) if job.job_id in begun else job for job in seen.jobs)

    again = decide(dataclasses.replace(seen, jobs=jobs, done=(*seen.done, *recorded)), CONFIG)

    assert all(isinstance(one, Leave) and not one.tell for one in again)


@given(snapshots())
def test_every_lease_is_decided_about_and_no_node_marked_down_twice(seen: Snapshot) -> None:
    decisions = decide(seen, CONFIG)
    decided = [
        run.job_id for one in decisions for run in (one.runs if not isinstance(one, Leave) else (one.run,))
    ]
    marked = [one.node for one in decisions if isinstance(one, MarkDown)]

    assert sorted(decided) == sorted(view.lease.job.job_id for view in seen.leases)
    assert len(marked) == len(set(marked))
