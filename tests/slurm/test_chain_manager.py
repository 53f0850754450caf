"""Managers that die or never start: the job is never hung, and ends as it would have ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.cluster import Cluster, Job, eventually

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

PROLOG = "/usr/libexec/outlast/slurm/prolog"
COUNT = "i=0; until [ -e go ]; do i=$((i+1)); echo $i; sleep 0.2; done; exit 7"
LARGE = """
python3 -c 'import os, time
memory = bytearray(os.urandom(1 << 20) * 400)
print("ready", flush=True)
time.sleep(300)' &
until [ -e go ]; do sleep 0.1; done
kill $!
exit 7
"""


def manager_of(job: Job, node: str) -> dict[str, int]:
    """The PIDs of the job's manager (`python3`) and of the shell that starts it anew (`sh`)."""
    found = {}
    for line in job.cluster.on(node, "ps", "-eo", "pid,comm,args").splitlines():
        pid, program, arguments = line.split(None, 2)
        if f"manager --job {job.id} " in arguments + " ":
            found[program] = int(pid)
    return found


def assert_ends_with_7(job: Job, node: str) -> None:
    job.path("go").touch()

    assert job.wait_for_end() == ("FAILED", "7:0")
    counted = [line for line in job.lines() if line.isdigit()]
    assert counted == [str(i) for i in range(1, len(counted) + 1)]
    eventually(lambda: node in job.cluster.idle(), within=20, what=f"{node} is idle")


@contextmanager
def no_configuration(cluster: Cluster, node: str) -> Iterator[None]:
    """Let Outlast be misconfigured on *node*, so that no manager starts there."""
    path = "/etc/outlast/outlast.toml"
    cluster.on(node, "cp", "-p", path, path + ".kept")
    try:
        cluster.on(node, "tee", path, stdin="no such thing\n")
        yield
    finally:
        cluster.on(node, "mv", path + ".kept", path)


@contextmanager
def no_prolog(cluster: Cluster, node: str) -> Iterator[None]:
    """Have slurmd on *node* run nothing before a job, as when the node lost its power since."""
    cluster.on(node, "mount", "--bind", "/bin/true", PROLOG)
    try:
        yield
    finally:
        cluster.on(node, "umount", PROLOG)


def test_killed_manager_is_started_again_and_goes_on_with_the_checkpoints(cluster: Cluster) -> None:
    job = cluster.submit(COUNT, "-w", "n1")
    job.wait_for("checkpoint")
    before = manager_of(job, "n1")
    cluster.on("n1", "kill", "-KILL", str(before["python3"]))
    job.wait_for("manager-restarted")
    done = job.checkpoints()
    job.wait_for("checkpoint", count=done + 2)
    after = manager_of(job, "n1")

    assert after["sh"] == before["sh"]
    assert after["python3"] != before["python3"]
    names = [event.text.split(":")[0] for event in job.history("checkpoint")]
    assert len(set(names)) == len(names), "no checkpoint's number is used twice"
    assert_ends_with_7(job, "n1")
    eventually(lambda: not cluster.left("n1", job.id), within=40, what="nothing left of it")


def test_job_goes_on_from_a_checkpoint_of_a_manager_that_was_started_again(cluster: Cluster) -> None:
    job = cluster.submit(COUNT, "-w", "n2")
    job.wait_for("checkpoint")
    cluster.on("n2", "kill", "-KILL", str(manager_of(job, "n2")["python3"]))
    job.wait_for("manager-restarted")
    job.wait_for("checkpoint", count=job.checkpoints() + 1)
    job.requeue()
    restored = job.wait_for("restored", within=60)

    newest = [event for event in job.history("checkpoint") if event.time < restored.time][-1]
    assert newest.text.split(":")[0] in restored.text
    assert_ends_with_7(job, "n2")


def test_manager_killed_while_the_job_stands_still_leaves_it_running(cluster: Cluster) -> None:
    job = cluster.submit(LARGE, "-w", "n3", checkpoint="3s")
    job.wait_for_line("ready")
    pid = next(pid for pid, command in job.tree().items() if "python3 -c" in command)
    manager = manager_of(job, "n3")["python3"]
    catch = f"until grep -q '^State:.t' /proc/{pid}/status; do :; done; kill -KILL {manager}"
    cluster.on("n3", "timeout", "20", "sh", "-c", catch, within=30)
    job.wait_for("manager-restarted")

    def stands_still() -> bool:
        return "State:\tt" in cluster.on("n3", "cat", f"/proc/{pid}/status")

    eventually(lambda: not stands_still(), within=20, what="the job runs again")
    job.wait_for("checkpoint", within=60)
    assert_ends_with_7(job, "n3")


def test_job_whose_manager_is_gone_for_good_ends_as_without_checkpoints(cluster: Cluster) -> None:
    job = cluster.submit(COUNT, "-w", "n1")
    job.wait_for("checkpoint")
    manager = manager_of(job, "n1")
    cluster.on("n1", "kill", "-KILL", str(manager["sh"]), str(manager["python3"]))
    seen = len(job.lines())
    eventually(lambda: len(job.lines()) > seen + 10, within=20, what="the job runs on")

    assert_ends_with_7(job, "n1")
    assert job.restarts == 0


def test_scancel_ends_a_job_whose_manager_is_gone(cluster: Cluster) -> None:
    job = cluster.submit(COUNT, "-w", "n1")
    job.wait_for("checkpoint")
    manager = manager_of(job, "n1")
    cluster.on("n1", "kill", "-KILL", str(manager["sh"]), str(manager["python3"]))
    tree = job.tree()
    job.cancel()

    assert job.wait_for_end()[0] == "CANCELLED"
    assert len(tree) >= 3
    pids = ",".join(map(str, tree))
    eventually(
        lambda: not cluster.try_on("n1", "ps", "-o", "pid=", "-p", pids).stdout,
        within=20,
        what="the job's processes are gone",
    )


def test_job_on_a_node_without_a_manager_runs_without_checkpoints_and_says_so(cluster: Cluster) -> None:
    with no_configuration(cluster, "n2"):
        job = cluster.submit(COUNT, "-w", "n2")
        job.wait_for_line("5")

    assert_ends_with_7(job, "n2")
    assert job.lines()[0] == (
        f"outlast: no manager answers at /run/outlast/jobs/{job.id}/shim.sock; "
        "the job runs without checkpoints"
    )
    assert job.history() == []


def test_job_is_not_begun_again_where_there_is_no_manager_to_restore_it(cluster: Cluster) -> None:
    job = cluster.submit(COUNT, "-w", "n3")
    job.wait_for("checkpoint")
    with no_configuration(cluster, "n3"):
        job.requeue()

        assert job.wait_for_end() == ("FAILED", "75:0")
    assert "see that outlast works on this node" in job.lines()[-1]
    job.requeue()
    job.wait_for("restored", within=60)
    assert_ends_with_7(job, "n3")


def test_restarted_job_whose_node_was_lost_between_its_prolog_and_its_start_is_queued_again(
    cluster_to_break: Cluster,
) -> None:
    cluster_to_break.testbed("kill-node", "n3")
    cluster_to_break.testbed("start-node", "n3")
    eventually(lambda: "n3" in cluster_to_break.idle(), within=60, what="n3 is idle")
    job = cluster_to_break.submit(COUNT, "-w", "n3")
    job.wait_for("checkpoint")
    with no_prolog(cluster_to_break, "n3"):
        job.requeue()
        eventually(lambda: job.restarts >= 2, within=90, what="the job queued again by itself")

    job.wait_for("restored", within=90)
    assert_ends_with_7(job, "n3")
