"""A job may checkpoint itself at its own points, in C and in Python, and can ask what speaks against it."""

from __future__ import annotations

import json
import shlex
import uuid
from collections.abc import Iterator

import pytest

from tests.cluster import Cluster, Job, eventually

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]


@pytest.fixture(params=["steps", "steps.py"])
def program(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    """The example of tests/programs, in C and in Python."""
    return cluster.program(request.param)


def test_each_call_of_ckpt_is_a_checkpoint_and_returns_zero(cluster: Cluster, program: str) -> None:
    job = cluster.submit(f"{program} 3", checkpoint="1h")

    assert job.wait_for_end() == ("COMPLETED", "0:0")
    assert job.lines() == ["step 1", "step 2", "step 3", "done"]
    assert job.checkpoints() == 3


@pytest.mark.parametrize("name", ["steps", "steps.py"])
def test_job_that_lost_its_node_comes_back_out_of_its_last_ckpt(cluster_to_break: Cluster, name: str) -> None:
    program = cluster_to_break.program(name)
    job = cluster_to_break.submit(f"{program} 8", checkpoint="1h")
    job.wait_for("checkpoint", count=3)
    cluster_to_break.cut_power(job.node)

    assert job.wait_for_end(within=120)[0] == "COMPLETED"
    said = [line for line in job.lines() if line.startswith(("step", "restored", "done"))]
    restored = [line for line in said if line.startswith("restored in step")]
    assert len(restored) == 1
    number = int(restored[0].split()[-1])
    assert number >= 3
    assert "connection: opened again" in job.lines()
    expected = [f"step {step}" for step in range(1, 9)]
    expected.insert(number, restored[0])
    assert said == [*expected, "done"]


def test_ckpt_costs_nothing_and_does_nothing_without_outlast(cluster: Cluster, program: str) -> None:
    job = cluster.submit(f"{program} 3", checkpoint=None)

    assert job.wait_for_end() == ("COMPLETED", "0:0")
    assert job.lines() == ["step 1", "step 2", "step 3", "done"]


def test_job_that_another_one_submitted_does_not_checkpoint_that(cluster: Cluster, program: str) -> None:
    first = cluster.submit("sleep 60", checkpoint="1h")
    first.wait_for("started")
    job = cluster.submit(
        f"export OUTLAST_JOB=/run/outlast/jobs/{first.id}; {program} 2", "-w", first.node, checkpoint=None
    )

    assert job.wait_for_end() == ("COMPLETED", "0:0")
    assert first.checkpoints() == 0
    first.cancel()


@pytest.mark.parametrize("name", ["mark", "mark.py"])
def test_tckpt_has_the_own_job_and_another_of_the_same_user_checkpointed(cluster: Cluster, name: str) -> None:
    other = cluster.submit("echo $$; exec sleep 100", checkpoint="1h")
    other.wait_for("started")
    pid = next(pid for pid, command in other.tree().items() if command == "sleep 100")
    mark = cluster.program(name)
    cluster.on(other.node, *mark.split(), str(pid), user=True)
    mine = cluster.submit(f"{mark} && echo marked; sleep 100", checkpoint="1h")
    mine.wait_for_line("marked")

    for job in (other, mine):
        job.wait_for("checkpoint")
        job.cancel()


def test_tckpt_of_what_is_not_the_callers_is_refused(cluster: Cluster) -> None:
    mark = cluster.program("mark")
    job = cluster.submit("exec sleep 100", checkpoint=None)
    job.wait_for_state("RUNNING")
    eventually(lambda: "sleep 100" in job.tree().values(), within=20, what="the job's sleep")
    pid = next(pid for pid, command in job.tree().items() if command == "sleep 100")

    for who, why in ((pid, "not of a job that is checkpointed"), (1, "Permission denied")):
        done = cluster.try_on(job.node, *mark.split(), str(who), user=True)
        assert done.returncode == 1
        assert f"mark: process {who}: " in done.stderr
        assert why in done.stderr
    job.cancel()


def test_recover_starts_a_users_checkpoint_on_any_node_as_that_user(cluster: Cluster) -> None:
    """The job is gone, and the scheduler has no part in it."""
    count = "i=0; until [ -e stop ]; do i=$((i+1)); echo $i; sleep 0.1; done; id -un; exit 7"
    job = cluster.submit(count, "-w", "n1", checkpoint="1h")
    job.wait_for_line("5")
    name = cluster.on("n1", "outlast", "checkpoint", job.id, user=True).strip()
    job.cancel()
    assert job.wait_for_end()[0] == "CANCELLED"
    eventually(lambda: not cluster.left("n1", job.id), within=40, what="nothing left of it")
    known = len(job.lines())
    stop = f"{job.directory}/stop"
    script = (
        f"cd {job.directory}; (sleep 3; touch {stop}) & exec outlast recover {name} --name again-{job.id}"
    )
    done = cluster.try_on("n3", "sh", "-c", script)

    assert done.returncode == 7
    numbers = [line for line in job.lines() if line.isdigit()]
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    assert job.lines()[-1] == "alice"
    assert known > 5


SERVE = (
    "l = socket.socket(socket.AF_UNIX); l.bind(name); l.listen(1); print('ready', flush=True); c = l.accept()"
)
CONNECT = "s = socket.socket(socket.AF_UNIX); s.connect(name); print('ready', flush=True)"


@pytest.fixture
def connected(cluster: Cluster) -> Iterator[Job]:
    """A job that holds on to its connection to a daemon on its node, which is no part of it."""
    name = f"name = '\\0outlast-{uuid.uuid4().hex}'"
    jobs: list[Job] = []
    for what, options in ((SERVE, ()), (CONNECT, ("1h",))):
        source = f"import socket, time; {name}; {what}; time.sleep(100)"
        node = ("-w", jobs[0].node) if jobs else ()
        job = cluster.submit(
            f"exec python3 -c {shlex.quote(source)}", *node, checkpoint=options[0] if options else None
        )
        job.wait_for_line("ready")
        jobs.append(job)
    yield jobs[1]
    for job in jobs:
        job.cancel()


def test_what_stands_against_a_checkpoint_is_told_before_the_first_is_due(connected: Job) -> None:
    event = connected.wait_for("finding")

    assert "a stream socket to a process outside the job" in event.text
    connected.wait_for_line(next(line for line in connected.lines() if line.startswith("outlast: process")))
    (line,) = [line for line in connected.lines() if line.startswith("outlast:")]
    assert "there is no checkpoint while it is there: close it when it has been used" in line


def test_explain_says_it_when_asked(connected: Job) -> None:
    said = connected.cluster.on(connected.node, "outlast", "explain", "--json", connected.id, user=True)
    (finding,) = json.loads(said)["findings"]

    assert (finding["kind"], finding["stops"], finding["name"]) == ("unix-outside", True, "python3")
    assert finding["fd"] >= 3
