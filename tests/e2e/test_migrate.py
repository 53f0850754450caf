"""Jobs that are moved, held and restarted by people lose nothing."""

from __future__ import annotations

import pytest

from tests.cluster import Cluster, Job, eventually
from tests.e2e import clocked

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def outlast(cluster: Cluster, *words: str, root: bool = False) -> str:
    """What `outlast` says to alice, or to root."""
    return cluster.on("ctl", "outlast", *words, user=not root)


def assert_goes_on(job: Job, host: str) -> None:
    """Check that the job computes on *host*, from where it was."""
    eventually(lambda: clocked.lines(job)[-1].host == host, within=30, what=f"a line from {host}")
    clocked.assert_whole(job)


def test_a_job_is_moved_to_another_node_within_seconds(cluster_to_break: Cluster) -> None:
    job = clocked.start(cluster_to_break)
    first = job.node
    outlast(cluster_to_break, "migrate", job.id)
    line = clocked.await_other_host(job, first, within=15)

    clocked.assert_whole(job)
    before = max(one.time for one in clocked.lines(job) if one.host == first)
    assert line.time - before < 10


def test_a_job_is_moved_to_the_node_of_choice_and_away_from_it_again(cluster_to_break: Cluster) -> None:
    job = clocked.start(cluster_to_break)
    other = "n3" if job.node != "n3" else "n1"
    outlast(cluster_to_break, "migrate", job.id, "--to", other)
    assert_goes_on(job, other)
    job.wait_for("restored")
    outlast(cluster_to_break, "migrate", job.id)
    eventually(lambda: clocked.lines(job)[-1].host != other, within=30, what="a line from elsewhere")

    clocked.assert_whole(job)


def test_a_held_job_waits_until_it_is_released(cluster_to_break: Cluster) -> None:
    job = clocked.start(cluster_to_break)
    outlast(cluster_to_break, "hold", job.id)
    eventually(
        lambda: job.facts()["Reason"] == "job_requeued_in_held_state", within=20, what="the job is held"
    )
    outlast(cluster_to_break, "release", job.id)
    job.wait_for("restored", within=40)

    clocked.assert_whole(job)
    assert job.restarts == 1


def test_a_drained_node_is_left_by_its_jobs_and_takes_no_new_ones(cluster_to_break: Cluster) -> None:
    job = clocked.start(cluster_to_break)
    first = job.node
    refused = cluster_to_break.try_on("ctl", "outlast", "drain", first, user=True)
    outlast(cluster_to_break, "drain", first, root=True)
    try:
        clocked.await_other_host(job, first, within=20)
    finally:
        cluster_to_break.on("ctl", "scontrol", "update", f"NodeName={first}", "State=RESUME")

    assert "only an operator" in refused.stderr
    clocked.assert_whole(job)


def test_a_job_goes_on_from_the_checkpoint_of_choice(cluster_to_break: Cluster) -> None:
    job = clocked.start(cluster_to_break)
    job.wait_for("checkpoint", count=2)
    name = f"{job.id}@0.1"
    outlast(cluster_to_break, "restart", name)
    event = job.wait_for("restored", within=40)

    assert event.text.startswith(name)


def test_what_is_requeued_by_slurm_is_saved_first(cluster_to_break: Cluster) -> None:
    job = cluster_to_break.submit(clocked.SCRIPT, checkpoint="1h")
    job.wait_for("started")
    eventually(lambda: len(clocked.lines(job)) > 20, within=30, what="twenty lines")
    job.requeue()
    job.wait_for("restored", within=40)

    clocked.assert_whole(job)
    assert job.history("begun-again") == []
