"""Jobs that must make room, and nodes that are shut down in good order: nothing is computed twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import Cluster, Job, eventually
from tests.e2e import clocked

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


@pytest.fixture
def partitions(cluster_to_break: Cluster) -> Iterator[Cluster]:
    """Two more partitions: "urgent", whose jobs have others requeued, and "polite", whose jobs get 30 s before."""
    common = "Nodes=n[1-3] State=UP MaxTime=INFINITE"
    tiers = {
        "urgent": "PriorityTier=10 PreemptMode=OFF",
        "polite": "PriorityTier=1 PreemptMode=REQUEUE GraceTime=30",
    }
    for name, words in tiers.items():
        cluster_to_break.on(
            "ctl", "scontrol", "create", f"PartitionName={name}", *common.split(), *words.split()
        )
    try:
        yield cluster_to_break
    finally:
        cluster_to_break.on("ctl", "scancel", "--user=alice")
        eventually(
            lambda: not cluster_to_break.on("ctl", "squeue", "--noheader", "--all").strip(),
            within=60,
            what="an empty queue",
        )
        for name in tiers:
            cluster_to_break.on("ctl", "scontrol", "delete", f"PartitionName={name}")


def fill(cluster: Cluster, partition: str) -> Job:
    """Start a job in *partition* that takes a node as a whole, then one that has it make room."""
    job = cluster.submit(clocked.SCRIPT, "-p", partition, "-w", "n1", "--exclusive", checkpoint="1h")
    job.wait_for("started")
    eventually(lambda: len(clocked.lines(job)) > 20, within=30, what="twenty lines")
    urgent = cluster.submit("sleep 5", "-p", "urgent", "-w", "n1", "--exclusive", checkpoint=None)
    urgent.wait_for_state("RUNNING", "COMPLETED")
    return job


def assert_saved_last(job: Job) -> None:
    """Check that nothing was lost but what the job did while its last checkpoint was shipped."""
    last = [event.time for event in job.history("dump") if event.time < job.history("restored")[0].time][-1]
    lost = clocked.lost_lines(job)
    assert all(line.time > last - 0.2 for line in lost)
    assert len(lost) < 30


@pytest.mark.parametrize("partition", ["main", "polite"])
def test_a_preempted_job_is_saved_first_and_goes_on_when_there_is_room(
    partitions: Cluster, partition: str
) -> None:
    job = fill(partitions, partition)
    before = len(clocked.lines(job))
    job.wait_for("restored", within=60)
    eventually(lambda: len(clocked.lines(job)) > before + 10, within=30, what="further lines")

    clocked.assert_whole(job)
    assert_saved_last(job)
    assert job.history("begun-again") == []
    assert job.restarts == 1


def test_a_node_that_is_shut_down_in_good_order_sends_its_jobs_elsewhere_first(
    cluster_to_break: Cluster,
) -> None:
    job = clocked.start(cluster_to_break)
    first = job.node
    cluster_to_break.on(first, "outlast", "hook", "node-stop", within=90)
    left = clocked.lines(job)[-1]
    cluster_to_break.cut_power(first)
    clocked.await_other_host(job, first, within=30)

    assert left.host == first
    clocked.assert_whole(job)
    assert_saved_last(job)
    assert job.restarts == 1
