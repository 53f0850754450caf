"""A node without the key, a store without room: the job runs all the same, and nothing stored is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import Cluster, eventually

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

COUNT = "i=0; until [ -e go ]; do i=$((i+1)); echo $i; sleep 0.2; done; exit 3"
# Its memory, which does not compress, is small at first and large when it is told so.
GROW = (
    "exec python3 -uc 'import os, time\n"
    "i, kept = 0, os.urandom(1 << 20)\n"
    'while not os.path.exists("go"):\n'
    '    if os.path.exists("grow") and len(kept) == 1 << 20: kept = os.urandom(40 << 20)\n'
    "    i += 1; print(i); time.sleep(0.2)\n"
    "raise SystemExit(3)'"
)
KEY, SETTINGS = "/etc/outlast/data.key", "/etc/outlast/outlast.toml"


@pytest.fixture
def without_key(cluster_to_break: Cluster) -> Iterator[str]:
    """A node whose key file is not there."""
    cluster_to_break.on("n2", "mv", KEY, KEY + ".kept")
    yield "n2"
    cluster_to_break.on("n2", "mv", KEY + ".kept", KEY)


@pytest.fixture
def quota(cluster_to_break: Cluster) -> Iterator[str]:
    """A node whose jobs may have 20 MB in the store."""
    before = cluster_to_break.on("n3", "cat", SETTINGS)
    text = before.replace("[store]\n", '[store]\nquota = "20M"\n')
    cluster_to_break.on("n3", "tee", SETTINGS, stdin=text)
    yield "n3"
    cluster_to_break.on("n3", "tee", SETTINGS, stdin=before)


def test_job_on_a_node_without_the_key_runs_and_its_owner_is_told(
    cluster_to_break: Cluster, without_key: str
) -> None:
    job = cluster_to_break.submit(COUNT, "-w", without_key)
    eventually(
        lambda: [line for line in job.lines() if KEY in line and "no such key file" in line],
        within=40,
        what="the job's owner is told",
    )
    job.path("go").touch()

    assert job.wait_for_end() == ("FAILED", "3:0")
    counted = [line for line in job.lines() if line.isdigit()]
    assert counted == [str(i) for i in range(1, len(counted) + 1)]


def test_job_is_never_begun_again_because_a_node_lacks_the_key(
    cluster_to_break: Cluster, without_key: str
) -> None:
    job = cluster_to_break.submit(COUNT, "-w", "n1")
    job.wait_for("checkpoint", count=2)
    cluster_to_break.on("ctl", "scontrol", "requeuehold", job.id)
    job.wait_for_state("PENDING")
    cluster_to_break.on("ctl", "scontrol", "update", f"JobId={job.id}", f"ReqNodeList={without_key}")
    cluster_to_break.on("ctl", "scontrol", "release", job.id)
    job.wait_for_end(within=100)

    assert [line for line in job.lines() if KEY in line]
    assert job.lines().count("1") == 1
    # With the key it goes on from where it was.
    cluster_to_break.on(without_key, "cp", "-p", KEY + ".kept", KEY)
    cluster_to_break.on("ctl", "scontrol", "requeue", job.id)
    job.wait_for("restored", within=100)
    job.path("go").touch()
    assert job.wait_for_end(within=100) == ("FAILED", "3:0")
    assert job.lines().count("1") == 1


def test_job_beyond_its_quota_runs_on_and_its_newest_checkpoint_stays_whole(
    cluster_to_break: Cluster, quota: str
) -> None:
    job = cluster_to_break.submit(GROW, "-w", quota)
    job.wait_for("checkpoint", count=2)
    job.path("grow").touch()
    failed = job.wait_for("checkpoint-failed", within=60)
    assert "quota" in failed.text
    before = len(job.lines())
    eventually(lambda: len(job.lines()) > before + 5, within=20, what="the job runs on")
    assert job.checkpoints() >= 1
    done = cluster_to_break.try_on("n1", "outlast", "store", "check", "--read-data", job.id)
    assert done.returncode == 0, done.stderr
    job.requeue()
    job.wait_for("restored", within=100)
    job.path("go").touch()

    assert job.wait_for_end(within=100) == ("FAILED", "3:0")
    assert job.lines().count("1") == 1
