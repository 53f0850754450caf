"""Jobs that must make room, and nodes that are shut down in good order: nothing is computed twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster import Cluster, Job, eventually
from tests.e2e import clocked

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


@contextmanager
def two_more(cluster: Cluster) -> Iterator[Cluster]:
    """Two more partitions: "urgent", whose jobs have others requeued, and "polite", whose jobs get 30 s before."""
    common = "Nodes=n[1-3] State=UP MaxTime=INFINITE"
    tiers = {
        "urgent": "PriorityTier=10 PreemptMode=OFF",
        "polite": "PriorityTier=1 PreemptMode=REQUEUE GraceTime=30",
    }
    for name, words in tiers.items():
        cluster.on("ctl", "scontrol", "create", f"PartitionName={name}", *common.split(), *words.split())
    try:
        yield cluster
    finally:
        cluster.on("ctl", "scancel", "--user=alice")
        eventually(
            lambda: not cluster.on("ctl", "squeue", "--noheader", "--all").strip(),
            within=60,
            what="an empty queue",
        )
        for name in tiers:
            cluster.on("ctl", "scontrol", "delete", f"PartitionName={name}")


@pytest.fixture
def partitions(cluster_to_break: Cluster) -> Iterator[Cluster]:
    """Both partitions."""
    with two_more(cluster_to_break) as cluster:
        yield cluster


def fill(cluster: Cluster, partition: str, *options: str, before: str = "") -> Job:
    """Start a job in *partition* that takes a node as a whole, then one that has it make room."""
    where = ("-p", partition, "-w", "n1", "--exclusive")
    job = cluster.submit(before + clocked.SCRIPT, *where, *options, checkpoint="1h")
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


def reconfigure(cluster: Cluster, parameters: str) -> None:
    """Have slurmctld, which starts itself anew for that, read its configuration."""
    cluster.on("ctl", "scontrol", "reconfigure")
    wanted = f"PreemptParameters = {parameters}"
    eventually(
        lambda: wanted in " ".join(cluster.try_on("ctl", "scontrol", "show", "config").stdout.split()),
        within=30,
        what=wanted,
    )


@pytest.fixture
def telling(cluster_to_break: Cluster) -> Iterator[Cluster]:
    """Both partitions, in which jobs that are to make room get the signal that their users chose at once."""
    path, line = "/etc/slurm/slurm.conf", "PreemptParameters=send_user_signal"
    cluster_to_break.on("ctl", "sh", "-c", f"cp {path} /root/slurm.conf; echo {line} >>{path}")
    reconfigure(cluster_to_break, "send_user_signal")
    try:
        # What is made by hand does not outlive a new configuration.
        with two_more(cluster_to_break) as cluster:
            yield cluster
    finally:
        cluster_to_break.on("ctl", "sh", "-c", f"cat /root/slurm.conf >{path}")
        reconfigure(cluster_to_break, "(null)")


def test_a_preempted_job_gets_the_signal_that_its_user_chose_and_is_saved_all_the_same(
    telling: Cluster,
) -> None:
    job = fill(telling, "polite", "--signal=B:USR1@20", before="trap 'echo told' USR1; ")
    job.wait_for("restored", within=60)
    before = len(clocked.lines(job))
    eventually(lambda: len(clocked.lines(job)) > before + 10, within=30, what="further lines")

    clocked.assert_whole(job)
    assert job.lines().count("told") == 1
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
