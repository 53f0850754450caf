"""Jobs in their second run, which went on from a checkpoint: all that Slurm does reaches them."""

from __future__ import annotations

import time

import pytest

from tests.cluster import Cluster, Job, eventually, together

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

# Prints a line every 0.2 s; once there is a file `go` in its directory it does *what*.
COUNT = """
i=0
until [ -e go ]; do i=$((i+1)); echo "line $i"; sleep 0.2; done
{what}
"""
# Neither SIGTERM nor time ends it: only what Slurm sends after KillWait.
STUBBORN = COUNT.format(what="trap 'echo told to end' TERM; echo listening; while :; do sleep 0.2; done")
FAMILY = """
trap 'echo told' USR1
setsid sleep 4001 &
python3 -c 'import os, time; os.fork() or os._exit(0); time.sleep(4002)' &
env | sort >environment.before
tr '\\0' '\\n' </proc/self/limits >limits.before
""" + COUNT.format(
    what="env | sort >environment.after; tr '\\0' '\\n' </proc/self/limits >limits.after\n"
    "touch done; sleep 300"
)
# It holds a message queue, which CRIU cannot dump: so not even its requeue makes a checkpoint.
BEGUN_AGAIN = """
echo "run ${SLURM_RESTART_COUNT:-0}"
exec python3 -c '
import ctypes, time
assert ctypes.CDLL(None).mq_open(b"/outlast", 0o102, 0o600, None) >= 0
time.sleep(300)
'
"""


@pytest.fixture(scope="module")
def jobs(module_cluster: Cluster) -> dict[str, Job]:
    """Six jobs in their second run: five from a checkpoint, one that had none from its beginning."""
    scripts = {
        # Ends well when it is asked to: it has not done its work for all that.
        "exits 7": "trap 'exit 0' TERM\n" + COUNT.format(what="exit 7"),
        "dies by a signal": COUNT.format(what="kill -SEGV $$"),
        "is cancelled": STUBBORN,
        "runs out of time": STUBBORN,
        "has a family": FAMILY,
    }
    jobs = {name: module_cluster.submit(script) for name, script in scripts.items()}
    again = module_cluster.submit(BEGUN_AGAIN, checkpoint="10m")
    together([*jobs.values()], lambda job: job.wait_for("checkpoint", within=60))
    again.wait_for_line("run 0")
    together([*jobs.values(), again], Job.requeue)
    together([*jobs.values()], lambda job: job.wait_for("restored", within=60))
    again.wait_for("begun-again", within=60)
    late = jobs["runs out of time"]
    late.path("go").touch()
    late.wait_for_line("listening")
    # slurmctld looks for those that are late every half minute.
    module_cluster.on("ctl", "scontrol", "update", f"JobId={late.id}", "EndTime=now+1")
    return jobs | {"begins again": again}


def assert_counted(job: Job) -> int:
    """Check that each line of its counting is there once, in order; return how many."""
    counted = [line for line in job.lines() if line.startswith("line ")]
    assert counted == [f"line {i}" for i in range(1, len(counted) + 1)]
    assert len(counted) > 0
    return len(counted)


def test_no_line_of_the_output_is_lost_or_twice(jobs: dict[str, Job]) -> None:
    job = jobs["exits 7"]
    before = assert_counted(job)
    eventually(lambda: assert_counted(job) > before, within=20, what="the count goes on")

    assert job.restarts == 1
    # Slurm announced the requeue once: in the output, where the last checkpoint was made after that, or else
    # in what was cut off.
    lost = [
        line
        for path in job.path().parent.glob("out.outlast-lost.*")
        for line in path.read_text().splitlines()
    ]
    announced = [line for line in [*job.lines(), *lost] if "DUE TO JOB REQUEUE" in line]
    assert len(announced) == 1


def test_job_that_ended_well_only_because_it_was_asked_to_goes_on(jobs: dict[str, Job]) -> None:
    ended, restored = jobs["exits 7"].history("ended")[0], jobs["exits 7"].history("restored")[0]

    assert ended.text == "the job ended with exit code 0, having been asked to"
    assert ended.time < restored.time


def test_exit_code_of_a_restored_job_is_slurms(jobs: dict[str, Job]) -> None:
    job = jobs["exits 7"]
    job.path("go").touch()

    assert job.wait_for_end() == ("FAILED", "7:0")
    assert_counted(job)


def test_signal_that_ended_a_restored_job_is_slurms(jobs: dict[str, Job]) -> None:
    job = jobs["dies by a signal"]
    job.path("go").touch()

    assert job.wait_for_end() == ("FAILED", "0:11")


def test_scancel_reaches_a_restored_job_and_ends_it_after_kill_wait(jobs: dict[str, Job]) -> None:
    job = jobs["is cancelled"]
    job.path("go").touch()
    job.wait_for_line("listening")
    node = job.node
    job.cancel()
    began = time.monotonic()
    job.wait_for_line("told to end")

    assert job.wait_for_end()[0] == "CANCELLED"
    eventually(lambda: not job.cluster.left(node, job.id), within=30, what="nothing left of it")
    assert 3 < time.monotonic() - began < 30, "KillWait is 5 s"


def test_slurm_lists_the_processes_of_a_restored_job(jobs: dict[str, Job]) -> None:
    job = jobs["has a family"]
    commands = list(job.tree().values())

    for part in ("outlast-shim", "/slurm_script", "sleep 4001", "time.sleep(4002)"):
        assert [command for command in commands if part in command], f"{part} in {commands}"


def test_signal_from_slurm_reaches_a_restored_job(jobs: dict[str, Job]) -> None:
    job = jobs["has a family"]
    job.cluster.on("ctl", "scancel", "--batch", "--signal=USR1", job.id, user=True)

    job.wait_for_line("told")
    assert job.state == "RUNNING"


def test_restored_job_keeps_its_environment_and_limits(jobs: dict[str, Job]) -> None:
    job = jobs["has a family"]
    job.path("go").touch()
    eventually(job.path("done").exists, within=20, what="the job has looked again")

    for name in ("environment", "limits"):
        assert job.path(f"{name}.after").read_text() == job.path(f"{name}.before").read_text()
    assert "SLURM_JOB_ID=" + job.id in job.path("environment.after").read_text()
    assert "SLURM_SPANK" not in job.path("environment.after").read_text()


def test_job_without_a_checkpoint_begins_again_on_an_empty_output(jobs: dict[str, Job]) -> None:
    job = jobs["begins again"]
    job.wait_for_line("run 1")

    assert [line for line in job.lines() if not line.startswith("outlast:")] == ["run 1"]


def test_time_limit_reaches_a_restored_job(jobs: dict[str, Job]) -> None:
    job = jobs["runs out of time"]

    assert job.wait_for_end(within=90)[0] == "TIMEOUT"
    assert "told to end" in job.lines()
    eventually(lambda: not job.cluster.left(job.node, job.id), within=30, what="nothing left of it")
