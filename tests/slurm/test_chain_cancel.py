"""scancel before, during and after a dump: the job ends, nothing of it stays, nobody brings it back."""

from __future__ import annotations

import pytest

from tests.cluster import Cluster, Job, eventually

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]

# 400 MB of its own memory: the dump takes long enough to be hit.
LARGE = """
exec python3 -uc 'import os, time
memory = bytearray(os.urandom(1 << 20) * 400)
print("ready", flush=True)
time.sleep(300)'
"""


CANCELLED: list[Job] = []


def assert_cancelled(job: Job, node: str) -> None:
    """Check that *job* has ended for good and that nothing of it is left on *node*."""
    assert job.wait_for_end(within=20)[0] == "CANCELLED"
    eventually(lambda: not job.cluster.left(node, job.id), within=40, what="nothing left of it")
    eventually(lambda: node in job.cluster.idle(), within=20, what=f"{node} is idle")
    assert job.history("checkpoint-failed") == []
    CANCELLED.append(job)


def root_of(job: Job) -> int:
    """The PID on its node of the job's first process."""
    return next(pid for pid, command in job.tree().items() if "python3 -uc" in command)


def test_scancel_before_the_first_dump(cluster: Cluster) -> None:
    job = cluster.submit("echo ready; sleep 300", checkpoint="10m")
    job.wait_for_line("ready")
    node = job.node
    job.cancel()

    assert_cancelled(job, node)


@pytest.mark.parametrize("options", [[], ["--signal=KILL"]], ids=["TERM", "KILL"])
def test_scancel_while_the_job_stands_still_for_a_dump(cluster: Cluster, options: list[str]) -> None:
    job = cluster.submit(LARGE, "-w", "n1", checkpoint="3s")
    job.wait_for_line("ready")
    pid = root_of(job)
    # On the node itself, since every hop would be another few milliseconds of a short window.
    catch = f"until grep -q '^State:.t' /proc/{pid}/status; do :; done; scancel {' '.join(options)} {job.id}"
    cluster.on("n1", "timeout", "20", "sh", "-c", catch, user=True, within=30)

    assert len(job.history("dump")) == 1
    assert_cancelled(job, "n1")


def test_scancel_while_a_checkpoint_is_shipped(cluster: Cluster) -> None:
    job = cluster.submit(LARGE, "-w", "n2", checkpoint="3s")
    job.wait_for_line("ready")
    pid = root_of(job)
    state = f"$(grep -o '^State:.[a-zA-Z]' /proc/{pid}/status | tail -c 2)"
    catch = f'until [ "{state}" = t ]; do :; done; while [ "{state}" = t ]; do :; done; scancel {job.id}'
    cluster.on("n2", "timeout", "20", "sh", "-c", catch, user=True, within=30)

    assert job.checkpoints() == 0, "it was not shipped yet"
    assert_cancelled(job, "n2")


def test_scancel_after_a_dump(cluster: Cluster) -> None:
    job = cluster.submit("sleep 300", checkpoint="1s")
    job.wait_for("checkpoint", count=2)
    node = job.node
    job.cancel()

    assert_cancelled(job, node)


def test_nobody_brings_a_cancelled_job_back(cluster: Cluster) -> None:
    # A job that is lost after all of them were cancelled: when it is seen to, they would have been as well.
    lost = cluster.submit("sleep 300", checkpoint="1s")
    lost.wait_for("checkpoint")
    lost.requeue()
    lost.wait_for("restored", within=60)

    assert len(CANCELLED) == 5
    assert {(job.state, job.restarts) for job in CANCELLED} == {("CANCELLED", 0)}
