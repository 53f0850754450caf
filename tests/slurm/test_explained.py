"""What of a job does not go with its checkpoints is told on its stderr and in its events, before one is missed."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from criu_backend import way_out
from tests.cluster import NODES, Cluster, Job, eventually

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]

KINDS = Path(__file__).parents[1] / "criu" / "kinds"
HOLDS = "env PYTHONPATH=/shared python3 -su -m kinds.holds"
# By kind of finding: what a process does to have it.
HELD = {
    "io_uring": f"{HOLDS} io-uring",
    "message-queue": f"{HOLDS} message-queue",
    "deleted-linked": f"{HOLDS} deleted-but-linked",
    "traced": "strace -o /dev/null sleep 1000",
    "user-namespace": "unshare --user sleep 1000",
    "gpu": "bash -c 'exec 9<>/dev/nvidia77; exec sleep 1000'",
    "rdma": "bash -c 'exec 9<>/dev/infiniband/uverbs77; exec sleep 1000'",
    "fuse": "bash -c 'exec 9<>/dev/fuse; exec sleep 1000'",
    "tcp-outside": "bash -c 'exec 9<>/dev/tcp/store/22; exec sleep 1000'",
}
NO_FILES = {"traced", "user-namespace"}


@pytest.fixture(scope="module")
def job(module_cluster: Cluster) -> Job:
    """A job that holds all of it, a process each."""
    for node in NODES:
        # There is no such hardware: of each name there is the FUSE device, which CRIU dumps as little.
        made = (
            "mkdir -p /dev/infiniband; for name in nvidia77 infiniband/uverbs77 fuse; do "
            "[ -e /dev/$name ] || mknod -m 666 /dev/$name c 10 229; done"
        )
        module_cluster.on(node, "sh", "-c", made)
    shutil.copytree(KINDS, module_cluster.file("/shared/kinds"), dirs_exist_ok=True)
    script = "".join(f"{command} >/dev/null &\n" for command in HELD.values())
    return module_cluster.submit(
        script + "echo begun; wait", "--export=ALL,OUTLAST_FILTER=off", checkpoint="1h"
    )


@pytest.fixture
def findings(job: Job) -> dict[str, dict[str, object]]:
    """The job's events of what was found, by kind."""
    job.wait_for("finding", within=60)

    def found() -> dict[str, dict[str, object]]:
        return {event["kind"]: event for event in job.events() if event["event"] == "finding"}

    eventually(lambda: set(found()) >= set(HELD), within=60, what=f"all of {sorted(HELD)}")
    return found()


@pytest.mark.parametrize("kind", sorted(HELD))
def test_finding_is_an_event_and_a_line_with_pid_descriptor_reason_and_way_out(
    job: Job, findings: dict[str, dict[str, object]], kind: str
) -> None:
    event = findings[kind]

    where = f"outlast: process {event['pid']} ({event['name']})"
    (line,) = [line for line in job.lines() if line.startswith(f"{where}") and str(event["what"]) in line]
    assert line.endswith(way_out(kind))
    assert ("there is no checkpoint while it is there" in line) == (kind != "tcp-outside")
    assert (event["fd"] is None) == (kind in NO_FILES)
    assert event["fd"] is None or f", descriptor {event['fd']}: " in line


def test_nothing_else_is_found(findings: dict[str, dict[str, object]]) -> None:
    assert set(findings) == set(HELD)


def test_explain_says_the_same_on_demand_by_job_and_by_pid(
    job: Job, findings: dict[str, dict[str, object]]
) -> None:
    def explain(what: str, *, user: bool) -> set[str]:
        said = job.cluster.on(job.node, "outlast", "explain", "--json", what, user=user)
        return {one["kind"] for one in json.loads(said)["findings"]}

    assert explain(job.id, user=True) == set(findings)
    pid = next(pid for pid, command in job.tree().items() if "kinds.holds message-queue" in command)
    assert explain(str(pid), user=False) >= {"message-queue"}


def test_checkpoint_that_is_asked_for_is_refused_and_the_job_runs_on(
    job: Job, findings: dict[str, dict[str, object]]
) -> None:
    done = job.cluster.try_on(job.node, "outlast", "checkpoint", job.id, user=True)

    assert done.returncode != 0
    assert findings
    assert "dump" in done.stderr
    assert job.state == "RUNNING"
    assert job.checkpoints() == 0
    job.cancel()


def test_step_of_srun_is_no_part_of_a_checkpoint_and_that_is_said(cluster: Cluster) -> None:
    """CRIU would dump srun, and Slurm would end the step with the node: what is restored would not be the job."""
    job = cluster.submit(
        "srun --overlap sh -c 'until [ -e go ]; do sleep 0.2; done; echo stepped'", checkpoint="1h"
    )
    job.wait_for("finding")

    found = [event.text for event in job.history("finding")]
    assert any("a step of srun, whose processes are the node's and not the job's" in text for text in found)
    done = cluster.try_on(job.node, "outlast", "checkpoint", job.id, user=True)
    assert done.returncode != 0
    assert "a step of srun" in done.stderr
    cluster.on("ctl", "touch", f"{job.directory}/go", user=True)
    assert job.wait_for_end() == ("COMPLETED", "0:0")
    assert "stepped" in job.lines()
    assert job.checkpoints() == 0


def test_what_comes_later_is_told_before_the_next_dump(cluster: Cluster) -> None:
    late = shlex.quote(
        "until [ -e go ]; do sleep 0.2; done; exec 9<>/dev/tcp/store/22; echo late; exec sleep 1000"
    )
    job = cluster.submit(f"exec bash -c {late}", checkpoint="1h")
    job.wait_for("started")
    done = cluster.on(job.node, "outlast", "checkpoint", job.id, user=True)
    assert done.strip().startswith(f"{job.id}@")
    assert job.history("finding") == []
    cluster.on("ctl", "touch", f"{job.directory}/go", user=True)
    job.wait_for_line("late")
    cluster.on(job.node, "outlast", "checkpoint", job.id, user=True)

    (event,) = job.history("finding")
    assert "a TCP connection to 198.18.0.2:22, which is dead after a restore" in event.text
    job.cancel()
