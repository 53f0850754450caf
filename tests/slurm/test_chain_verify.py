"""A checkpoint is verified by bringing it back to life in a sandbox, which the job does not notice."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cluster import Cluster, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

# Holds a file of its shared directory, one of the node's own disk, and a connection between two processes.
HOLDER = """
cat >holder.py <<'END'
import os, socket, time
kept = open("kept", "ab", 0)
here = open("/tmp/holder-%s" % os.environ["SLURM_JOB_ID"], "w+b", 0)
here.write(b"here")
listener = socket.create_server(("127.0.0.1", 0))
if os.fork() == 0:
    mine = socket.create_connection(listener.getsockname())
    while True:
        time.sleep(1)
theirs, _ = listener.accept()
step = 0
while True:
    step += 1
    kept.write(b"x")
    print(step, flush=True)
    time.sleep(0.1)
END
python3 holder.py
"""


def test_checkpoint_comes_up_on_another_node_and_the_job_does_not_notice(cluster: Cluster) -> None:
    job = cluster.submit(HOLDER, "-w", "n1", checkpoint="4s")
    job.wait_for("checkpoint", within=60)
    name = f"{job.id}@0.1"
    said = cluster.on("n2", "outlast", "verify", "--json", name)
    found = json.loads(said)

    assert (found["checkpoint"], found["ok"], found["processes"]) == (name, True, 3)
    lines = [line for line in job.lines() if not line.startswith("slurmstepd")]
    assert lines == [str(step) for step in range(1, len(lines) + 1)]
    assert not cluster.try_on(
        "n2", "sh", stdin="ls -d /tmp/holder-* /run/outlast/verify-*; grep holder /proc/mounts"
    ).stdout
    assert "holder.py" not in cluster.on("n2", "ps", "-eo", "args")

    job.cancel()
    job.wait_for_end(within=60)
    job.path("kept").unlink()
    done = cluster.try_on("n2", "outlast", "verify", name)
    assert done.returncode == 1
    assert f"{name}: does not come up on this node: {job.directory}/kept: No such file" in done.stderr
    assert not job.path("kept").exists()


def belongs(found: dict[str, Any], job: Job) -> bool:
    """Whether a verified checkpoint is of *job*."""
    return str(found["checkpoint"]).startswith(f"{job.id}@")


def test_what_is_due_is_verified_once_by_whichever_node_comes_first(cluster: Cluster) -> None:
    job = cluster.submit(HOLDER, "-w", "n1", checkpoint="2s")
    job.wait_for("checkpoint", count=2, within=60)
    command = ("outlast", "verify", "--due", "--json")
    # Of jobs of other tests, whose files are gone, it says that they do not come up.
    first, second = (
        [one for one in json.loads(cluster.try_on(node, *command).stdout) if belongs(one, job)]
        for node in ("n2", "n3")
    )

    assert [(one["ok"], one["processes"]) for one in first] == [(True, 3)]
    assert second == []
    assert [(one["event"], one["node"]) for one in job.events() if one["event"] == "verified"] == [
        ("verified", "n2")
    ]
    assert job.state == "RUNNING"
    job.cancel()


def test_due_checkpoint_that_does_not_come_up_is_named(cluster: Cluster) -> None:
    job = cluster.submit(HOLDER, "-w", "n1", checkpoint="1h")
    job.wait_for_line("5")
    cluster.on("ctl", "outlast", "checkpoint", job.id, user=True)
    job.wait_for("checkpoint", within=60)
    job.path("kept").rename(job.path("elsewhere"))
    done = cluster.try_on("n2", "outlast", "verify", "--due")

    assert done.returncode == 1
    assert f"{job.directory}/kept: No such file" in done.stderr
    assert [one["event"] for one in job.events() if "verified" in one["event"]] == ["not-verified"]
    job.cancel()


def test_only_root_may_verify(cluster: Cluster) -> None:
    done = cluster.try_on("n2", "outlast", "verify", "1@0.1", user=True)

    assert done.returncode != 0
    assert "Traceback" not in done.stderr
