"""A store that cannot be reached costs a job its checkpoints while that lasts, and nothing else."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

import pytest

from tests.cluster import Cluster, Job, eventually

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

COUNT = "i=0; until [ -e go ]; do i=$((i+1)); echo $i; sleep 0.2; done; exit 3"


@dataclass(frozen=True)
class Through:
    """What a store that could not be reached for a while has met: three jobs, and the command."""

    running: Job
    starting: Job
    requeued: Job
    said: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def through(module_cluster: Cluster) -> Through:
    """The three jobs when the store is back: they ran, started, were requeued while it was not there."""
    running, requeued = module_cluster.submit(COUNT, "-w", "n1"), module_cluster.submit(COUNT, "-w", "n3")
    running.wait_for("checkpoint", count=2)
    requeued.wait_for("checkpoint", count=2)
    with module_cluster.store_cut_off():
        starting = module_cluster.submit(COUNT, "-w", "n2")
        requeued.requeue()
        said = module_cluster.try_on("ctl", "outlast", "status", user=True)
        running.wait_for("store-unreachable", within=40)
        starting.wait_for("store-unreachable", within=40)
        eventually(lambda: "5" in starting.lines(), within=40, what="the job runs without its store")
        before = len(running.lines())
        eventually(lambda: len(running.lines()) > before + 5, within=20, what="the job runs on")
        eventually(
            lambda: [line for line in requeued.lines() if "waiting for it to go on" in line],
            within=60,
            what="the requeued job says that it waits",
        )
    return Through(running, starting, requeued, said)


def assert_ends_well(job: Job) -> None:
    """Have it end, and check that it never was anything but a running job."""
    job.path("go").touch()

    assert job.wait_for_end() == ("FAILED", "3:0")
    counted = [line for line in job.lines() if line.isdigit()]
    assert counted == [str(i) for i in range(1, len(counted) + 1)]


def test_checkpoint_is_tried_again_until_the_store_answers(through: Through) -> None:
    job = through.running
    healed = max(event.time for event in job.history("store-unreachable"))
    eventually(
        lambda: [event for event in job.history("checkpoint") if event.time > healed],
        within=60,
        what="a checkpoint after the store is back",
    )

    assert_ends_well(job)
    assert job.restarts == 0
    assert all(line.isdigit() for line in job.lines())


def test_job_that_starts_without_its_store_says_so_once_and_gets_checkpoints_later(through: Through) -> None:
    job = through.starting
    job.wait_for("checkpoint", within=60)

    assert_ends_well(job)
    assert job.restarts == 0
    (said,) = [line for line in job.lines() if not line.isdigit()]
    assert said.startswith("outlast: the checkpoint store does not answer")
    assert said.endswith("the job starts, and it is tried again")


def test_restart_waits_for_the_store_and_then_goes_on(through: Through) -> None:
    job = through.requeued
    job.wait_for("restored", within=60)
    before = len(job.lines())
    eventually(lambda: len(job.lines()) > before, within=20, what="the job runs on")

    assert_ends_well(job)
    assert job.restarts == 1
    assert job.history("begun-again") == []


def test_command_says_that_the_store_does_not_answer(through: Through) -> None:
    said = through.said

    assert said.returncode == 75
    assert "store" in said.stderr
    assert "Traceback" not in said.stderr
