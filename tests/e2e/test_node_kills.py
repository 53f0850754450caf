"""Nodes that lose their power under running jobs: each job ends as if nothing had happened.

$OUTLAST_E2E_KILLS says how many kills at random moments there are, $OUTLAST_E2E_SEED which moments these are.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

import pytest

from tests.cluster import Cluster, Job, eventually
from tests.e2e.conftest import KILLS_DONE, Kills

KILLS = int(os.environ.get("OUTLAST_E2E_KILLS", "4"))
SEED = int(os.environ.get("OUTLAST_E2E_SEED", random.SystemRandom().randrange(10**6)))
INTERVAL = 3  # seconds between two checkpoints

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

# Programs with their arguments, for about a quarter of a minute each.
WORK = {"lu": ("400", "55"), "lu.py": ("40", "55")}
PACE = ("--pace", "0.25")


@pytest.fixture(scope="module")
def right(module_cluster: Cluster) -> dict[str, list[str]]:
    """What each program prints if it is left alone."""
    return {
        name: module_cluster.on("ctl", *module_cluster.program(name).split(), *arguments).splitlines()
        for name, arguments in WORK.items()
    }


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> Kills:
    """The kills so far; their figures are printed at the end."""
    done = request.config.stash.setdefault(KILLS_DONE, {})
    return done.setdefault("kills at random moments", Kills(SEED))


def start(cluster: Cluster, name: str, *options: str, interval: int = INTERVAL) -> Job:
    """Submit the workload *name*; return when it runs."""
    command = " ".join([cluster.program(name), *WORK[name], *PACE, *options])
    job = cluster.submit(f"exec {command}", "-J", name, checkpoint=f"{interval}s")
    job.wait_for("started")
    return job


def assert_right(job: Job, lines: list[str]) -> None:
    """Check that *job* ended well, and that its output is what it would be without a kill."""
    assert job.wait_for_end(within=120) == ("COMPLETED", "0:0")
    assert job.lines() == lines
    assert job.path().read_text().endswith(" ok\n")
    assert job.history("checkpoint-failed") == []
    assert job.history("restore-failed") == []


def moment_of(job: Job, killed: float) -> str:
    """Say where in its checkpoint cycle *job* was when its node was killed."""
    last = [event for event in job.history() if event.time <= killed][-1]
    return {"dump": "during a dump or its shipping", "checkpoint": "between two checkpoints"}.get(
        last.event, f"after {last.event!r}"
    )


def await_moment(job: Job, dice: random.Random, *, aimed: bool) -> None:
    """Return at a moment chosen by *dice*: anywhere in the cycle, or, if *aimed*, about a dump."""
    first = dice.randint(1, 2)
    if not aimed:
        job.wait_for("checkpoint", count=first)
        time.sleep(dice.uniform(0, INTERVAL))
        return
    begun, stored = job.wait_for("dump", count=first), job.wait_for("checkpoint", count=first)
    # The next one will take about as long; a little before and after it are of interest, too.
    offset = dice.uniform(-0.05, 1.2 * (stored.time - begun.time))
    time.sleep(max(0.0, begun.time + INTERVAL + offset - time.time()))


@pytest.mark.parametrize("number", range(KILLS))
def test_job_survives_a_kill_at_any_moment(
    cluster_to_break: Cluster, right: dict[str, list[str]], kills: Kills, number: int
) -> None:
    dice = random.Random(SEED * 1000 + number)  # noqa: S311 - no secret
    jobs = {name: start(cluster_to_break, name) for name in WORK}
    watched = jobs[dice.choice(list(WORK))]
    node = watched.node
    await_moment(watched, dice, aimed=number % 2 == 1)
    killed = cluster_to_break.cut_power(node)
    moment = moment_of(watched, killed)
    again = watched.wait_for("restored", within=90)
    kills.moments.append(moment)
    kills.seconds.append(again.time - killed)

    assert again.node != node
    for name, job in jobs.items():
        assert_right(job, right[name])
        # Slurm puts both on one node, but need not.
        assert job.restarts == (1 if job.history()[0].node == node else 0)


def test_job_that_is_killed_before_its_first_checkpoint_begins_again(
    cluster_to_break: Cluster, right: dict[str, list[str]]
) -> None:
    job = start(cluster_to_break, "lu", interval=8)
    job.wait_for_line(right["lu"][5])
    cluster_to_break.cut_power(job.node)
    job.wait_for("begun-again", within=90)

    assert_right(job, right["lu"])
    assert job.restarts == 1
    assert job.history("restored") == []


def test_job_survives_three_kills_and_one_of_them_while_it_is_restored(
    cluster_to_break: Cluster, right: dict[str, list[str]]
) -> None:
    job = start(cluster_to_break, "lu")
    job.wait_for("checkpoint", count=2)
    first = job.node
    cluster_to_break.cut_power(first)
    # Its first word in the second run is that it was restored; a moment earlier it is at it.
    eventually(lambda: job.restarts == 1 and job.state == "RUNNING", within=60, what="the second run")
    second = job.node
    cluster_to_break.cut_power(second)
    cluster_to_break.testbed("start-node", first)
    seen = len(job.history("restored"))
    third = job.wait_for("restored", count=seen + 1, within=90)
    eventually(
        lambda: [event for event in job.history("checkpoint") if event.time > third.time],
        within=60,
        what="a checkpoint of the third run",
    )
    cluster_to_break.cut_power(third.node)
    cluster_to_break.testbed("start-node", second)

    assert_right(job, right["lu"])
    assert job.restarts == 3


def test_job_goes_on_whose_node_is_back_before_it_was_missed(
    cluster_to_break: Cluster, right: dict[str, list[str]]
) -> None:
    job = start(cluster_to_break, "lu")
    job.wait_for("checkpoint", count=2)
    node = job.node
    cluster_to_break.cut_power(node)
    cluster_to_break.testbed("start-node", node)
    # The watcher misses the job or, where that takes longer, the node or, within a minute, Slurm itself does.
    job.wait_for("restored", within=150)

    assert_right(job, right["lu"])
    assert job.restarts == 1


@pytest.fixture
def only_n1(cluster_to_break: Cluster) -> Iterator[Cluster]:
    """A cluster in which jobs start on n1 alone."""
    cluster_to_break.on("ctl", "scontrol", "update", "NodeName=n[2-3]", "State=DRAIN", "Reason=test")
    try:
        yield cluster_to_break
    finally:
        cluster_to_break.on("ctl", "scontrol", "update", "NodeName=n[2-3]", "State=RESUME")


def test_job_comes_back_to_the_node_that_it_was_lost_on(
    only_n1: Cluster, right: dict[str, list[str]]
) -> None:
    job = start(only_n1, "lu")
    # When a job ends there slurmd writes down which others it has.
    assert only_n1.submit("true", checkpoint=None).wait_for_end() == ("COMPLETED", "0:0")
    job.wait_for("checkpoint", count=2)
    only_n1.cut_power("n1")
    eventually(
        lambda: "node-excluded" in {event["event"] for event in job.events()},
        within=60,
        what="it is kept off",
    )
    only_n1.testbed("start-node", "n1")
    # Slurm's own delay, which the watcher ended: what is to end the lost run there would end the next one.
    only_n1.on("ctl", "scontrol", "update", f"JobId={job.id}", "ExcNodeList=", "StartTime=now+8seconds")
    job.wait_for("restored", within=90)

    assert_right(job, right["lu"])
    assert job.restarts == 1


def test_job_that_fails_after_a_kill_fails_with_its_own_exit_code(
    cluster_to_break: Cluster, right: dict[str, list[str]]
) -> None:
    jobs = {
        ("FAILED", "7:0"): start(cluster_to_break, "lu", "--fail-at", "50", "7"),
        ("FAILED", "0:6"): start(cluster_to_break, "lu", "--signal-at", "50", "ABRT"),
    }
    for job in jobs.values():
        job.wait_for("checkpoint", count=2)
    nodes = {job.node for job in jobs.values()}
    assert len(nodes) == 1, "Slurm fills a node before it takes the next"
    cluster_to_break.cut_power(nodes.pop())

    for end, job in jobs.items():
        assert job.wait_for_end(within=90) == end
        assert job.lines() == right["lu"][:50]
        assert job.restarts == 1
