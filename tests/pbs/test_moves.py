"""Runs of a job that end in good time under PBS: held, moved, drained, preempted, at their walltime."""

from __future__ import annotations

import pytest

from tests.cluster import eventually
from tests.pbs.conftest import MOMS, Pbs
from tests.pbs.jobs import TICKS, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]


def other(node: str) -> str:
    """The host that *node* is not."""
    return next(name for name in MOMS if name != node)


def test_a_job_is_held_and_released_by_its_owner(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1h")
    job.wait_for_session()
    job.wait_for("started")
    job.outlast("hold", job.id)
    job.wait_for_state("H")
    assert (job.count("checkpoint"), job.count("held")) == (1, 1)
    job.outlast("release", job.id)
    job.wait_for("restored")
    job.ends_whole()


def test_a_job_is_moved_to_another_host_and_back(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1h")
    job.wait_for_session()
    job.wait_for("started")
    first = job.node
    refused = pbs.try_on("ctl", "outlast", "migrate", "--to", first, job.id, user=True)
    assert (refused.returncode != 0, "runs on" in refused.stderr) == (True, True)
    job.outlast("migrate", job.id)
    job.wait_for("restored")
    assert job.node == other(first)
    job.wait_for_session()
    job.outlast("migrate", "--to", first, job.id)
    job.wait_for("restored", 2)
    assert job.node == first
    assert job.facts["Resource_List"]["select"].count("host=") == 1
    job.ends_whole()


def test_a_job_that_was_moved_is_not_bound_to_a_host_that_is_lost(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1s")
    job.wait_for_session()
    job.wait_for("checkpoint")
    job.outlast("migrate", job.id)
    job.wait_for("restored")
    lost = job.node
    count = job.count("checkpoint")
    job.wait_for("checkpoint", count + 1)
    pbs.testbed("kill-node", lost)
    job.wait_for("restored", 2, within=150)
    assert job.node == other(lost)
    job.ends_whole()


def test_the_jobs_of_a_host_that_is_drained_go_on_elsewhere(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1h")
    job.wait_for_session()
    job.wait_for("started")
    first = job.node
    assert job.id in pbs.on("ctl", "outlast", "drain", first)
    job.wait_for("restored")
    assert (job.node, job.count("left")) == (other(first), 1)
    # It was restored once; a run that is not its first leaves as well.
    job.wait_for_session()
    pbs.pbs("pbsnodes", "-r", first)
    pbs.on("ctl", "outlast", "drain", other(first))
    job.wait_for("restored", 2)
    assert job.node == first
    job.ends_whole()


def test_a_job_goes_on_from_a_checkpoint_of_its_owners_choice(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1h")
    job.wait_for_session()
    job.wait_for("started")
    older = job.outlast("checkpoint", job.id).strip()
    newer = job.outlast("checkpoint", job.id).strip()
    assert older != newer
    assert job.outlast("restart", older).strip() == older
    job.wait_for("restored")
    assert f"restored: {older}," in job.log
    job.ends_whole()


def test_a_job_is_saved_before_its_walltime_ends(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1h", "-l", "walltime=00:00:20")
    job.wait_for("restored", within=90)
    assert job.count("left") >= 1
    job.ends_whole()


def test_a_job_that_is_preempted_by_checkpoint_goes_on_afterwards(pbs: Pbs) -> None:
    queue = "queue_type=execution,enabled=true,started=true,priority=200"
    if "express" not in pbs.pbs("qmgr", "-c", "print server"):
        pbs.pbs("qmgr", "-c", f"create queue express {queue}")
    pbs.pbs("qmgr", "-c", "set sched preempt_order = C")
    pbs.pbs("qmgr", "-c", "set server scheduler_iteration = 5")
    pbs.pbs("pbsnodes", "-o", "n2")
    jobs = [Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1h") for _ in range(2)]
    for job in jobs:
        job.wait_for("started")
        job.wait_for_session()
    urgent = Job(pbs, "sleep 2; echo done", "-q", "express")
    urgent.wait_for_state("F")
    assert urgent.output() == ["done"]
    preempted = [job for job in jobs if job.count("held")]
    assert len(preempted) == 1
    preempted[0].wait_for("restored", within=90)
    for job in jobs:
        job.ends_whole()


def test_moms_own_timer_takes_checkpoints_and_the_job_goes_on_anywhere(pbs: Pbs) -> None:
    # With checkpoint_min PBS gives "-c w" minutes of its own, and MoM calls $action checkpoint.
    pbs.pbs("qmgr", "-c", "set queue workq checkpoint_min = 1")
    try:
        job = Job(pbs, "sleep 1000", "-c", "w")
        assert job.facts["Checkpoint"] == "w=1"
        job.wait_for("asked", within=200)
        eventually(lambda: job.count("checkpoint") >= 1, within=30, what="a checkpoint")
        node = job.node
        pbs.testbed("kill-node", node)
        pbs.testbed("start-node", node)
        pbs.start_mom(node)
        job.wait_for("restored", within=120)
        pbs.pbs("qdel", job.id, user=True)
        job.wait_for_state("F")
    finally:
        pbs.pbs("qmgr", "-c", "unset queue workq checkpoint_min")


def test_qalter_changes_how_often_a_running_job_is_saved(pbs: Pbs) -> None:
    job = Job(pbs, "sleep 1000", "-v", "OUTLAST_INTERVAL=1s")
    job.wait_for("checkpoint", 2)
    pbs.pbs("qalter", "-c", "n", job.id, user=True)
    eventually(lambda: not grows(job), within=60, what="no more checkpoints")
    taken = job.count("checkpoint")
    pbs.pbs("qalter", "-c", "w=600", job.id, user=True)
    assert job.outlast("checkpoint", job.id)
    eventually(lambda: job.count("checkpoint") == taken + 1, within=30, what="the one that was asked for")
    pbs.pbs("qdel", job.id, user=True)
    job.wait_for_state("F")


def grows(job: Job) -> bool:
    """Whether more checkpoints come within three times the interval that the job had."""
    before = job.count("checkpoint")
    try:
        eventually(lambda: job.count("checkpoint") > before, within=4, what="more")
    except AssertionError:
        return False
    return True
