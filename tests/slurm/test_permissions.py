"""Who may see, checkpoint, move, restart and delete what, and what the audit log says of it."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.cluster import Cluster, Job, eventually

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]

ALICE, NOBODY = 2000, 65534
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--")
AS_WATCHER = ("setpriv", "--reuid=slurm", "--regid=slurm", "--clear-groups", "--")


@pytest.fixture(scope="module")
def job(module_cluster: Cluster) -> Job:
    """A running job of alice's with checkpoints."""
    job = module_cluster.submit("sleep 600", "-J", "simulation", checkpoint="2s")
    job.wait_for("checkpoint", count=2)
    return job


def ask(job: Job, who: str, *words: str, host: str = "ctl") -> subprocess.CompletedProcess[str]:
    """Run outlast as "alice", "nobody", "watcher" or "root"."""
    as_whom = {"nobody": AS_NOBODY, "watcher": AS_WATCHER}.get(who, ())
    return job.cluster.try_on(host, *as_whom, "outlast", *words, user=who == "alice")


def audit(job: Job, host: str = "ctl") -> list[dict[str, Any]]:
    """What the audit log on *host* has of *job*."""
    text = job.cluster.try_on(host, "cat", "/var/log/outlast/audit.log").stdout
    entries = [json.loads(line) for line in text.splitlines()]
    return [entry for entry in entries if entry["job"] == job.id]


LOOKS = ["list", "events", "report"]


@pytest.mark.parametrize("verb", LOOKS)
def test_the_owner_and_operators_see_a_job_and_nobody_else_learns_that_there_is_one(
    job: Job, verb: str
) -> None:
    for who in ("alice", "watcher", "root"):
        assert ask(job, who, verb, job.id).returncode == 0, who
    refused, missing = ask(job, "nobody", verb, job.id), ask(job, "nobody", verb, "999999")
    assert (refused.returncode, refused.stdout) == (64, "")
    assert refused.stderr == missing.stderr.replace("999999", job.id)


def test_a_checkpoint_is_shown_to_its_owner_only(job: Job) -> None:
    name = json.loads(ask(job, "alice", "list", "--json", job.id).stdout)["checkpoints"][0]["name"]
    assert ask(job, "nobody", "show", name).returncode == 64
    assert "no such job of yours" in ask(job, "nobody", "show", name).stderr


@pytest.mark.parametrize("verb", ["checkpoint", "migrate", "hold", "release", "restart"])
def test_nobody_else_has_anything_done_with_a_job_and_that_it_was_tried_is_in_the_audit_log(
    job: Job, verb: str
) -> None:
    before = len(audit(job))
    done = ask(job, "nobody", verb, job.id)

    assert done.returncode == 64
    assert "no such job of yours" in done.stderr
    entry = audit(job)[before:][-1]
    # "checkpoint" looks at what there is before it asks.
    assert entry["what"] in (verb, "list")
    assert (entry["uid"], entry["refused"], entry["host"]) == (NOBODY, True, "ctl")
    assert job.state == "RUNNING"


def test_only_an_operator_drains_a_node(job: Job) -> None:
    for who in ("alice", "nobody"):
        done = ask(job, who, "drain", "n3")
        assert (done.returncode, "only an operator" in done.stderr) == (64, True)
    assert "drain" not in job.cluster.on("ctl", "sinfo", "--noheader", "--Node", "--format=%N %t")


@pytest.mark.parametrize(
    "words",
    [
        ("verify", "{name}"),
        ("recover", "{name}"),
        ("run", "--store", "/shared/alice/mine", "--", "true"),
        ("checkpoint", "--pid", "1", "x"),
        ("store", "check"),
        ("store", "stats"),
        ("store", "forget", "{job}"),
        ("store", "prune"),
        ("store", "pin", "{name}"),
        ("store", "unpin", "{name}"),
        ("store", "init", "--rotate"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_what_reads_or_deletes_images_is_roots_on_a_node(job: Job, words: tuple[str, ...]) -> None:
    name = json.loads(ask(job, "alice", "list", "--json", job.id).stdout)["checkpoints"][0]["name"]
    kept = job.cluster.on(job.node, "sha256sum", "/etc/outlast/data.key")
    for who in ("alice", "nobody"):
        done = ask(job, who, *(word.format(name=name, job=job.id) for word in words), host=job.node)
        assert done.returncode != 0, (who, done.stdout)
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("outlast: ")
    assert ask(job, "alice", "list", job.id).returncode == 0
    assert job.cluster.on(job.node, "sha256sum", "/etc/outlast/data.key") == kept


def test_every_write_and_read_of_an_image_is_in_the_audit_log_of_its_node(cluster: Cluster) -> None:
    job = cluster.submit("sleep 600", checkpoint="1h")
    job.wait_for("started")
    assert ask(job, "alice", "checkpoint", job.id).returncode == 0
    name = f"{job.id}@0.1"
    first = job.node
    (asked,) = [entry for entry in audit(job) if entry["what"] == "checkpoint"]
    assert (asked["uid"], asked["refused"]) == (ALICE, False)
    assert asked["pid"] > 0
    (written,) = audit(job, first)
    assert (written["what"], written["checkpoint"], written["by"]) == ("checkpoint", name, "manager")
    assert (written["uid"], written["host"]) == (ALICE, first)

    assert ask(job, "root", "verify", name, host=first).returncode == 0
    assert ask(job, "root", "store", "pin", name, host=first).returncode == 0
    verified, pinned = audit(job, first)[-2:]
    assert (verified["what"], verified["checkpoint"], verified["uid"]) == ("verify", name, 0)
    assert (pinned["what"], pinned["checkpoint"], pinned["uid"]) == ("store pin", name, 0)

    assert ask(job, "alice", "migrate", job.id).returncode == 0
    job.wait_for("restored", within=60)
    eventually(
        lambda: any(entry["what"] == "restore" for node in ("n1", "n2", "n3") for entry in audit(job, node)),
        within=10,
        what="the restore in the audit log",
    )
    assert [entry["what"] for entry in audit(job)] == ["checkpoint", "migrate"]
    job.cancel()


def test_the_audit_log_is_its_writers_alone(job: Job) -> None:
    for host in ("ctl", job.node):
        assert job.cluster.on(host, "stat", "-c", "%a", "/var/log/outlast/audit.log").strip() == "600"
        assert ask(job, "alice", "status", host="ctl").returncode == 0
        read = job.cluster.try_on(host, "cat", "/var/log/outlast/audit.log", user=True)
        assert read.returncode != 0
