"""The command line, on the cluster's controller, as the job's owner and as somebody else."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.cluster import Cluster, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")


@pytest.fixture(scope="module")
def job(module_cluster: Cluster) -> Job:
    """A job of alice's with two checkpoints."""
    job = module_cluster.submit("sleep 600", "-J", "simulation", checkpoint="2s")
    job.wait_for("checkpoint", count=2)
    return job


def ask(job: Job, *words: str, nobody: bool = False) -> subprocess.CompletedProcess[str]:
    """Run outlast on the controller, as alice or as nobody."""
    if nobody:
        return job.cluster.try_on("ctl", *NOBODY, "outlast", *words)
    return job.cluster.try_on("ctl", "outlast", *words, user=True)


def test_status_shows_the_owners_jobs_only(job: Job) -> None:
    shown = json.loads(ask(job, "status", "--json").stdout)["jobs"]
    (row,) = [row for row in shown if row["job_id"] == job.id]

    assert row["name"] == "simulation"
    assert row["state"] == "RUNNING"
    assert row["nodes"] == [job.node]
    assert row["checkpoints"] >= 1
    assert row["lease_age"] < 5
    assert json.loads(ask(job, "status", "--json", nobody=True).stdout) == {"jobs": []}
    assert "simulation" in ask(job, "status").stdout


def test_list_shows_the_newest_checkpoint_first(job: Job) -> None:
    shown = json.loads(ask(job, "list", "--json", job.id).stdout)["checkpoints"]

    assert 1 <= len(shown) <= 3, "two are kept, and a third is there until then"
    assert [one["seq"] for one in shown] == sorted((one["seq"] for one in shown), reverse=True)
    assert all(one["name"] == f"{job.id}@0.{one['seq']}" for one in shown)
    assert all(0 < one["pause_ms"] < 10_000 and one["image_bytes"] > 0 for one in shown)
    assert f"{job.id}@0." in ask(job, "list", job.id).stdout


def test_events_tell_what_happened_in_order(job: Job) -> None:
    events = json.loads(ask(job, "events", "--json", job.id).stdout)["events"]

    # How the job is dumped is told once, at the first checkpoint, wherever that comes in between.
    names = [event["event"] for event in events if event["event"] != "mode"]
    assert names[:3] == ["started", "dump", "checkpoint"]
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert "paused" in ask(job, "events", job.id).stdout


def test_checkpoint_takes_one_now_and_names_it(cluster: Cluster) -> None:
    job = cluster.submit("sleep 600", checkpoint="1h")
    job.wait_for("started")
    done = ask(job, "checkpoint", job.id)
    listed = json.loads(ask(job, "list", "--json", job.id).stdout)["checkpoints"]

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{job.id}@0.1\n", "")
    assert [one["name"] for one in listed] == [f"{job.id}@0.1"]
    job.cancel()


def test_job_takes_its_own_checkpoint_and_goes_on_when_it_is_stored(cluster: Cluster) -> None:
    job = cluster.submit('outlast checkpoint "$SLURM_JOB_ID"; echo "$?"; sleep 600', checkpoint="1h")
    job.wait_for_line("0")

    assert job.lines() == [f"{job.id}@0.1", "0"]
    assert job.checkpoints() == 1
    job.cancel()


@pytest.mark.parametrize("verb", ["list", "events", "checkpoint"])
def test_job_of_another_user_is_no_job(job: Job, verb: str) -> None:
    before = len(job.history("asked"))
    done = ask(job, verb, job.id, nobody=True)
    missing = ask(job, verb, "999999", nobody=True)

    assert done.returncode == missing.returncode == 64
    assert done.stdout == ""
    assert done.stderr == missing.stderr.replace("999999", job.id)
    assert done.stderr.startswith(f"outlast: job {job.id}: no such job of yours\n")
    assert len(job.history("asked")) == before


def test_managers_socket_refuses_another_user(job: Job) -> None:
    call = (
        "from outlast import control; from pathlib import Path; import sys\n"
        f"control.call(Path('/run/outlast/jobs/{job.id}/manager.sock'), {{'op': sys.argv[1]}})\n"
    )
    for operation in ("status", "checkpoint", "job-ended"):
        done = job.cluster.try_on(job.node, *NOBODY, "python3", "-c", call, operation)

        assert done.returncode != 0
        assert "no such job of yours" in done.stderr
    assert job.state == "RUNNING"


def test_owner_cannot_tell_a_manager_that_its_job_has_ended(job: Job) -> None:
    call = (
        "from outlast import control; from pathlib import Path\n"
        f"control.call(Path('/run/outlast/jobs/{job.id}/manager.sock'), {{'op': 'job-ended'}})\n"
    )
    done = job.cluster.try_on(job.node, "python3", "-c", call, user=True)

    assert "no such request" in done.stderr


@pytest.mark.parametrize("host", ["ctl", "n1"])
def test_doctor_finds_a_healthy_host_healthy(cluster: Cluster, host: str) -> None:
    done = cluster.try_on(host, "outlast", "doctor", "--json")
    findings = json.loads(done.stdout)["findings"]

    assert [finding for finding in findings if finding["verdict"] == "FAIL"] == []
    named = {finding["what"] for finding in findings}
    assert {"configuration", "store", "clock", "spool", "logs", "slurm", "plugin", "ProctrackType"} <= named
    # Each says how to mend what could be better; the testbed's Slurm leaves little time for a last checkpoint.
    assert all(finding["remedy"] for finding in findings if finding["verdict"] != "ok")
    assert [one["verdict"] for one in findings if one["what"] == "last checkpoint"] == ["warn"]
    assert done.returncode == 0


def test_doctor_says_what_is_wrong_and_how_to_mend_it(cluster: Cluster) -> None:
    path = "/etc/outlast/store.key"
    cluster.on("n1", "mv", path, path + ".kept")
    try:
        done = cluster.try_on("n1", "outlast", "doctor")
    finally:
        cluster.on("n1", "mv", path + ".kept", path)

    assert done.returncode == 1
    assert "FAIL" in done.stdout
    assert path in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/etc/outlast/data.key", "data key"),
        ("/usr/libexec/outlast/outlast-capsule", "outlast-capsule"),
        ("/usr/libexec/outlast/outlast-shim", "outlast-shim"),
        ("/etc/slurm/plugstack.conf", "plugstack"),
    ],
)
def test_doctor_misses_what_is_not_there(cluster: Cluster, path: str, what: str) -> None:
    cluster.on("n1", "mv", path, path + ".kept")
    try:
        done = cluster.try_on("n1", "outlast", "doctor", "--json")
    finally:
        cluster.on("n1", "mv", path + ".kept", path)
    failed = {one["what"]: one for one in json.loads(done.stdout)["findings"] if one["verdict"] == "FAIL"}

    assert what in failed
    assert failed[what]["remedy"]
    assert done.returncode == 1


def test_doctor_names_the_line_that_is_wrong(cluster: Cluster) -> None:
    path = "/etc/outlast/conf.d/site.toml"
    cluster.on("n1", "sh", "-c", f"mkdir -p /etc/outlast/conf.d && echo 'clustr = 1' >{path}")
    try:
        done = cluster.try_on("n1", "outlast", "doctor")
    finally:
        cluster.on("n1", "rm", path)

    assert f"FAIL  configuration: {path}:1: clustr: no such key" in done.stdout
    assert done.returncode == 1
