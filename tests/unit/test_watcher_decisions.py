import dataclasses

import pytest

from outlast.config import Config, RestartConfig, WatcherConfig
from outlast.model import JobKey, JobState, Lease, LeaseView, SchedulerJob, SchedulerNode
from outlast.watcher.actions import (
    Decision,
    Done,
    DropLease,
    Evacuate,
    Exclude,
    Hasten,
    Hold,
    Leave,
    MarkDown,
    Probe,
    Readmit,
    Requeue,
    Run,
    Snapshot,
)
from outlast.watcher.decisions import decide, suspects

CONFIG = Config(cluster="c")
LEASE = Lease(JobKey("c", "17"), 0, "n1", 2000)
JOB = SchedulerJob("17", JobState.RUNNING, "RUNNING", 0, ("n1",), 2000, "lu", handle="17")
AGAIN = dataclasses.replace(JOB, state=JobState.PENDING, raw_state="PENDING", epoch=1, nodes=())
LOST = dataclasses.replace(JOB, state=JobState.LOST, raw_state="NODE_FAIL")
ALIVE = SchedulerNode("n1", up=True, responding=True, address="198.18.0.11")
DEAD = dataclasses.replace(ALIVE, up=False)
SILENT = Probe(answered=False, times=2)
NOW = 1000.0


def snapshot(
    *,
    age: float = 6.0,
    lease: Lease | None = LEASE,
    job: SchedulerJob | None = JOB,
    node: SchedulerNode | None = ALIVE,
    probe: Probe | None = SILENT,
    done: tuple[Done, ...] = (),
) -> Snapshot:
    return Snapshot(
        now=NOW,
        leases=(LeaseView(lease, age),) if lease else (),
        jobs=(job,) if job else (),
        nodes=(node,) if node else (),
        probes={"n1": probe} if probe else {},
        done=done,
        quiet={lease: age} if lease else {},
    )


def done(event: str, *, epoch: int = 0, ago: float = 0.0, refused: bool = False, node: str = "n1") -> Done:
    return Done(NOW - ago, event, Run("17", epoch), node, refused)


def leave(reason: str, tell: str = "", *, epoch: int = 0) -> Leave:
    return Leave(Run("17", epoch), reason, tell)


DEAD_REASON = (
    "no heartbeat came from there for 6.0 s, and there is no answer from 198.18.0.11 port 6818 in 2 tries"
)


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({}, MarkDown("n1", (Run("17", 0),), DEAD_REASON)),
        ({"age": 2.0}, leave("its manager is heard")),
        ({"probe": Probe(False, 1)}, leave("n1 did not answer once; it is asked again")),
        ({"probe": Probe(True, 1)}, leave("manager silent, node alive")),
        ({"probe": Probe(True, 2)}, leave("manager silent, node alive", "manager-silent")),
        (
            {"probe": Probe(True, 3), "done": (done("manager-silent", node=""),)},
            leave("manager silent, node alive"),
        ),
        ({"probe": None}, leave("it is not known whether n1 lives")),
        ({"node": None}, leave("the scheduler knows no node n1")),
        ({"node": DEAD}, leave("n1 is down already, and the scheduler requeues its jobs")),
        ({"done": (done("node-marked-down"),)}, leave("node-marked-down 0 s ago")),
        (
            {"done": (done("node-marked-down", refused=True, ago=4),)},
            leave("refused 4 s ago; asked again later"),
        ),
        (
            {"done": (done("node-marked-down", refused=True, ago=11),)},
            MarkDown("n1", (Run("17", 0),), DEAD_REASON),
        ),
        (
            {"job": dataclasses.replace(JOB, epoch=1)},
            leave("the lease is of run 0; run 1 has none yet", epoch=1),
        ),
        (
            {"job": dataclasses.replace(JOB, nodes=("n2",))},
            leave("the lease is from n1, where the scheduler does not run the job"),
        ),
    ],
)
def test_a_running_job(change: dict[str, object], outcome: Decision) -> None:
    assert decide(snapshot(**change), CONFIG) == (outcome,)  # type: ignore[arg-type]


BOOTED = dataclasses.replace(ALIVE, started=NOW - 3)
ANSWERS = {"node": BOOTED, "probe": Probe(True, 9), "age": 8.1}


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({}, Requeue(JOB, "n1 was started anew, and nothing is heard of the job there since")),
        # It may be upgraded, and its manager come back.
        ({"age": 7.9}, leave("manager silent, node alive", "manager-silent")),
        # slurmd alone was started anew, and the manager was heard after that.
        (
            {"node": dataclasses.replace(ALIVE, started=NOW - 10)},
            leave("manager silent, node alive", "manager-silent"),
        ),
        ({"node": ALIVE}, leave("manager silent, node alive", "manager-silent")),
        (
            {"job": dataclasses.replace(JOB, requeueable=False)},
            leave("manager silent, node alive", "manager-silent"),
        ),
        ({"done": (done("requeued", node=""),)}, leave("requeued 0 s ago")),
    ],
)
def test_a_job_whose_node_was_back_before_it_was_missed(change: dict[str, object], outcome: Decision) -> None:
    assert decide(snapshot(**(ANSWERS | change)), CONFIG) == (outcome,)  # type: ignore[arg-type]


def test_a_job_is_missed_on_a_node_that_was_started_anew_though_others_run_there_by_now() -> None:
    other = LeaseView(Lease(JobKey("c", "18"), 0, "n1", 2000), 0.0)
    seen = snapshot(**ANSWERS)  # type: ignore[arg-type]
    seen = dataclasses.replace(
        seen,
        leases=(*seen.leases, other),
        jobs=(*seen.jobs, dataclasses.replace(JOB, job_id="18", handle="18")),
    )

    assert [type(one) for one in decide(seen, CONFIG)] == [Requeue, Leave]


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, watcher=WatcherConfig(mark_down=False)),
        dataclasses.replace(CONFIG, restart=RestartConfig(on_node_failure=False)),
    ],
)
def test_a_node_that_was_started_anew_is_left_to_the_scheduler_where_the_site_wants_it_so(
    config: Config,
) -> None:
    assert isinstance(decide(snapshot(**ANSWERS), config)[0], Leave)  # type: ignore[arg-type]


def test_a_dead_node_is_left_to_the_scheduler_where_the_site_wants_it_so() -> None:
    config = dataclasses.replace(CONFIG, watcher=WatcherConfig(mark_down=False))

    assert decide(snapshot(), config) == (
        leave(f"{DEAD_REASON}; left to the scheduler, as [watcher] mark_down is false", "node-silent"),
    )


def test_a_dead_node_is_marked_down_once_for_all_its_jobs() -> None:
    other = dataclasses.replace(JOB, job_id="18", handle="18", epoch=2)
    lease = Lease(JobKey("c", "18"), 2, "n1", 2000)
    seen = dataclasses.replace(
        snapshot(),
        leases=(LeaseView(LEASE, 6.0), LeaseView(lease, 7.0)),
        jobs=(JOB, other),
        quiet={LEASE: 6.0, lease: 7.0},
    )

    assert decide(seen, CONFIG) == (MarkDown("n1", (Run("17", 0), Run("18", 2)), DEAD_REASON),)


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (
            {"job": LOST},
            Requeue(LOST, "the job is NODE_FAIL by no fault of its own, and its lease has run out"),
        ),
        ({"job": LOST, "age": 3.0}, leave("the lease runs 1 s more")),
        ({"job": LOST, "done": (done("requeued", node=""),)}, leave("requeued 0 s ago")),
        (
            {"job": LOST, "done": (done("requeued", node="", refused=True, ago=3),)},
            leave("refused 3 s ago; asked again later"),
        ),
        (
            {"job": dataclasses.replace(LOST, requeueable=False)},
            leave("the job is NODE_FAIL, and may not be requeued (--no-requeue)", "not-requeueable"),
        ),
    ],
)
def test_a_lost_job(change: dict[str, object], outcome: Decision) -> None:
    assert decide(snapshot(**change), CONFIG) == (outcome,)  # type: ignore[arg-type]


EXCLUDED = dataclasses.replace(AGAIN, excluded=("n1",))
NOT_RESPONDING = dataclasses.replace(ALIVE, responding=False)


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        ({"node": DEAD}, Exclude(AGAIN, "n1", "the job was lost on n1")),
        ({"node": NOT_RESPONDING}, Exclude(AGAIN, "n1", "the job was lost on n1")),
        # The node is back before the job runs again.
        ({"done": (done("node-marked-down"),)}, Exclude(AGAIN, "n1", "the job was lost on n1")),
        # Somebody had it requeued: the node is as good as any.
        ({"node": ALIVE}, leave("the job waits for a node", epoch=1)),
        ({"node": DEAD, "age": 300.0}, leave("the job waits for a node", epoch=1)),
        ({"node": DEAD, "job": EXCLUDED}, leave("the job waits for a node other than n1", epoch=1)),
        (
            {"node": DEAD, "done": (done("node-excluded", epoch=1, ago=1),)},
            leave("node-excluded 1 s ago", epoch=1),
        ),
        (
            {"node": DEAD, "done": (done("node-excluded", epoch=1, ago=1, refused=True),)},
            leave("refused 1 s ago; asked again later", epoch=1),
        ),
        (
            {"node": DEAD, "job": dataclasses.replace(AGAIN, required=("n1",))},
            leave("the job asks for n1 by name, so it waits for that node", "pinned", epoch=1),
        ),
        (
            {"job": EXCLUDED, "age": 306.0, "done": (done("node-excluded", epoch=1, ago=300),)},
            Readmit(EXCLUDED, "n1", "the job was kept away from n1 for 300 s"),
        ),
        (
            {"job": EXCLUDED, "age": 306.0, "done": (done("node-excluded", epoch=1, ago=299),)},
            leave("the job waits for a node", epoch=1),
        ),
        # A person excluded the node: it stays so.
        ({"job": EXCLUDED, "age": 306.0}, leave("the job waits for a node", epoch=1)),
        (
            {
                "job": EXCLUDED,
                "age": 306.0,
                "done": (done("node-excluded", epoch=1, ago=300), done("node-readmitted", epoch=1)),
            },
            leave("the job waits for a node", epoch=1),
        ),
        ({"job": dataclasses.replace(AGAIN, epoch=0)}, leave("the lease is not of an earlier run")),
    ],
)
def test_a_pending_job(change: dict[str, object], outcome: Decision) -> None:
    assert decide(snapshot(**{"job": AGAIN, **change}), CONFIG) == (outcome,)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (
            {"job": None, "age": 61.0},
            DropLease(
                LEASE, "the scheduler does not know the job any more, and the lease was last renewed 61 s ago"
            ),
        ),
        (
            {"job": dataclasses.replace(JOB, state=JobState.DONE, raw_state="COMPLETED"), "age": 61.0},
            DropLease(LEASE, "the job is COMPLETED, and the lease was last renewed 61 s ago"),
        ),
        (
            {"job": dataclasses.replace(JOB, state=JobState.FAILED, raw_state="FAILED"), "age": 59.0},
            leave("the job is FAILED; its manager may still be at work"),
        ),
        ({"lease": None}, None),
    ],
)
def test_an_ended_job(change: dict[str, object], outcome: Decision | None) -> None:
    assert decide(snapshot(**change), CONFIG) == ((outcome,) if outcome else ())  # type: ignore[arg-type]


def test_only_nodes_of_which_nothing_is_heard_are_asked() -> None:
    heard = SchedulerJob("18", JobState.RUNNING, "RUNNING", 0, ("n2",), 2000, "lu")
    nodes = (ALIVE, dataclasses.replace(ALIVE, name="n2"), dataclasses.replace(ALIVE, name="n3"))
    other = Lease(JobKey("c", "18"), 0, "n2", 2000)
    leases = (LeaseView(LEASE, 0.0), LeaseView(other, 0.0))

    assert suspects(leases, (JOB, heard), nodes, {LEASE: 6.0, other: 0.5}, CONFIG) == (ALIVE,)
    assert suspects(leases, (JOB,), nodes, {LEASE: 1.1}, CONFIG) == (ALIVE,)
    assert suspects(leases, (JOB,), nodes, {LEASE: 1.0}, CONFIG) == ()
    assert suspects(leases, (JOB, heard), (DEAD,), {LEASE: 6.0, other: 6.0}, CONFIG) == ()


def test_one_manager_that_is_heard_proves_that_its_node_lives() -> None:
    neighbor = dataclasses.replace(JOB, job_id="18", handle="18")
    other = Lease(JobKey("c", "18"), 0, "n1", 2000)
    seen = dataclasses.replace(
        snapshot(),
        leases=(LeaseView(LEASE, 6.0), LeaseView(other, 0.0)),
        jobs=(JOB, neighbor),
        quiet={LEASE: 6.0, other: 0.5},
    )

    assert suspects(seen.leases, seen.jobs, seen.nodes, seen.quiet, CONFIG) == ()
    assert decide(seen, CONFIG)[0] == leave("manager silent, node alive", "manager-silent")


def crowd(count: int, silent: int, quiet: float) -> Snapshot:
    """A cluster of *count* nodes with a job each, of which *silent* have been so for *quiet* seconds."""
    jobs = [dataclasses.replace(JOB, job_id=str(i), handle=str(i), nodes=(f"n{i}",)) for i in range(count)]
    leases = [Lease(JobKey("c", str(i)), 0, f"n{i}", 2000) for i in range(count)]
    return Snapshot(
        NOW,
        tuple(LeaseView(lease, 0.0) for lease in leases),
        tuple(jobs),
        tuple(dataclasses.replace(ALIVE, name=f"n{i}") for i in range(count)),
        {f"n{i}": SILENT for i in range(silent)},
        (),
        {lease: quiet if i < silent else 0.1 for i, lease in enumerate(leases)},
    )


@pytest.mark.parametrize(
    ("silent", "quiet", "marked"), [(2, 3.0, 2), (5, 3.0, 5), (6, 3.0, 0), (6, 10.0, 0), (6, 10.1, 6)]
)
def test_where_most_nodes_fall_silent_at_once_the_watcher_doubts_its_own_network_first(
    silent: int, quiet: float, marked: int
) -> None:
    decisions = decide(crowd(10, silent, quiet), CONFIG)

    assert sum(isinstance(one, MarkDown) for one in decisions) == marked


FENCE = LeaseView(LEASE.fence(), 1.0)


def test_a_job_behind_a_fence_is_kept_off_the_node_it_was_lost_on() -> None:
    marked = (done("node-marked-down"),)
    seen = dataclasses.replace(snapshot(job=AGAIN, done=marked), leases=(FENCE,))

    assert decide(seen, CONFIG) == (Exclude(AGAIN, "n1", "the job was lost on n1"),)


def test_the_delay_of_a_job_that_is_kept_off_its_node_is_ended_and_again_if_it_is_set_again() -> None:
    waiting = dataclasses.replace(EXCLUDED, begin=NOW + 6)
    excluded = done("node-excluded", epoch=1, ago=0.5)
    hasten = Hasten(waiting, "n1", "it was to wait 6 s, for no node but n1")

    def decided(*past: Done) -> tuple[Decision, ...]:
        known = (done("node-marked-down"), excluded, *past)
        return decide(dataclasses.replace(snapshot(job=waiting, done=known), leases=(FENCE,)), CONFIG)

    assert decided() == (hasten,)
    assert decided(done("hastened", epoch=1, ago=0.5)) == (leave("hastened 0 s ago", epoch=1),)
    assert decided(done("hastened", epoch=1, ago=1.5)) == (hasten,)


def test_a_delay_is_not_ended_for_a_job_that_may_run_on_the_same_node_again() -> None:
    waiting = dataclasses.replace(AGAIN, begin=NOW + 6)

    assert decide(snapshot(job=waiting), CONFIG) == (leave("the job waits for a node", epoch=1),)


def test_a_job_that_was_let_have_its_node_again_is_kept_off_it_anew_when_it_is_lost_there_again() -> None:
    # To end its delay alone would have it start there at once, and be ended with what is left of the lost run.
    waiting = dataclasses.replace(AGAIN, excluded=("n3",), begin=NOW + 6)
    nodes = (ALIVE, dataclasses.replace(ALIVE, name="n2"), dataclasses.replace(ALIVE, name="n3"))
    past = (done("node-excluded", epoch=0, ago=60), done("node-marked-down"))
    seen = dataclasses.replace(snapshot(job=waiting, done=past), leases=(FENCE,), nodes=nodes)

    assert decide(seen, CONFIG) == (Exclude(waiting, "n1", "the job was lost on n1", ("n3",)),)


def test_a_job_that_was_lost_everywhere_may_run_where_it_was_lost_first() -> None:
    job = dataclasses.replace(AGAIN, excluded=("n2",))
    nodes = (DEAD, dataclasses.replace(ALIVE, name="n2"))
    past = (done("node-excluded", epoch=0, ago=60, node="n2"), done("node-marked-down"))
    seen = dataclasses.replace(snapshot(job=job, done=past), nodes=nodes)

    assert decide(seen, CONFIG) == (Exclude(job, "n1", "the job was lost on n1"),)


def test_a_job_that_was_sent_to_a_node_is_bound_to_it_no_longer_than_the_node_lives() -> None:
    job = dataclasses.replace(AGAIN, required=("n1",))
    past = (done("bound", epoch=0, ago=60), done("node-marked-down"))

    assert decide(snapshot(job=job, done=past), CONFIG) == (
        Exclude(job, "n1", "the job was lost on n1", unbind=True),
    )


PREEMPTED = dataclasses.replace(JOB, preempted=True)


def test_a_job_that_is_preempted_is_told_to_leave_once() -> None:
    told = (done("told-to-leave", node=""),)

    assert decide(snapshot(job=PREEMPTED, age=1.0), CONFIG) == (
        Evacuate(PREEMPTED, "the scheduler preempts the job"),
    )
    assert decide(snapshot(job=PREEMPTED, age=1.0, done=told), CONFIG) == (leave("told-to-leave 0 s ago"),)


def losses(count: int) -> tuple[Done, ...]:
    """What was done for a job whose runs 0 to *count* - 1 were lost one after the other within an hour."""
    return tuple(done("node-marked-down", epoch=n, ago=60.0 * (count - n)) for n in range(count))


@pytest.mark.parametrize(("count", "wait"), [(1, 0.0), (3, 0.0), (4, 30.0), (5, 60.0)])
def test_a_job_that_loses_node_after_node_is_put_off_from_the_fourth_on(count: int, wait: float) -> None:
    job = dataclasses.replace(AGAIN, epoch=count)
    seen = snapshot(job=job, lease=dataclasses.replace(LEASE, epoch=count - 1), done=losses(count), node=DEAD)

    assert decide(seen, CONFIG) == (Exclude(job, "n1", "the job was lost on n1", wait=wait),)


def test_a_job_that_lost_more_nodes_than_its_budget_within_a_day_is_held_for_a_look() -> None:
    job = dataclasses.replace(AGAIN, epoch=6)
    lease = dataclasses.replace(LEASE, epoch=5)
    (held,) = decide(snapshot(job=job, lease=lease, done=losses(6), node=DEAD), CONFIG)
    old = tuple(dataclasses.replace(one, time=NOW - 90000) for one in losses(6)[:5])
    (fine,) = decide(snapshot(job=job, lease=lease, done=(*old, losses(6)[5]), node=DEAD), CONFIG)

    assert held == Hold(job, "its node was lost 6 times within a day, and its budget is 5")
    assert isinstance(fine, Exclude)


def test_the_policy_may_leave_lost_jobs_to_people() -> None:
    config = dataclasses.replace(
        CONFIG, restart=RestartConfig(partition={"main": {"on_node_failure": False}})
    )
    main = dataclasses.replace(LOST, partition="main")

    assert decide(snapshot(job=main), config) == (
        leave("the job is NODE_FAIL; on_node_failure is false for it", "not-restarted"),
    )
    assert isinstance(decide(snapshot(job=LOST), config)[0], Requeue)
