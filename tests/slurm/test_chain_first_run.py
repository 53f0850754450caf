"""Jobs that end in their first run, with the flag and without it."""

from __future__ import annotations

import re

import pytest

from tests.cluster import Cluster, Job, eventually

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]

LOOK = """
echo "parent $(cat /proc/$PPID/comm)"
for kind in pid mnt ipc net; do echo "$kind $(readlink /proc/$$/ns/$kind)"; done
grep -e ^Seccomp: /proc/$$/status
until [ -e go ]; do sleep 0.1; done
"""


@pytest.fixture(scope="module")
def jobs(module_cluster: Cluster) -> dict[str, Job]:
    """Jobs of every kind, submitted at once."""
    submit = module_cluster.submit
    four_seconds = "for i in 1 2 3 4; do echo $i; sleep 1; done"
    return {
        "exits 7": submit("exit 7", checkpoint="10m"),
        "kills itself": submit("kill -KILL $$", checkpoint="10m"),
        "is done": submit("echo done", checkpoint="10m"),
        "has no such command": submit("exec /no/such/program", checkpoint="10m"),
        "exits 7 after a checkpoint": submit(f"{four_seconds}; exit 7"),
        "has the flag in its script": submit(f"#SBATCH --checkpoint=2s\n{four_seconds}", checkpoint=None),
        "array": submit(
            f'{four_seconds}; echo "task $SLURM_ARRAY_TASK_ID"; exit $((10 + SLURM_ARRAY_TASK_ID))',
            *("--array=1-3", "-o", "out.%a"),
        ),
        "has two nodes": submit("echo here; exit 5", "-N2"),
    }


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("exits 7", ("FAILED", "7:0")),
        ("kills itself", ("FAILED", "0:9")),
        ("is done", ("COMPLETED", "0:0")),
        ("has no such command", ("FAILED", "127:0")),
        ("exits 7 after a checkpoint", ("FAILED", "7:0")),
    ],
)
def test_end_of_a_job_is_slurms(jobs: dict[str, Job], name: str, end: tuple[str, str]) -> None:
    job = jobs[name]

    assert job.wait_for_end() == end
    assert job.history("checkpoint-failed") == []
    eventually(lambda: not job.cluster.left(job.node, job.id), within=40, what="nothing left of it")


def test_job_that_ends_before_its_first_checkpoint_leaves_none(jobs: dict[str, Job]) -> None:
    job = jobs["is done"]
    job.wait_for_end()

    assert job.lines() == ["done"]
    assert [event.event for event in job.history()] == ["started", "ended"]


def test_flag_in_the_script_is_enough(jobs: dict[str, Job]) -> None:
    job = jobs["has the flag in its script"]

    assert job.wait_for_end() == ("COMPLETED", "0:0")
    assert job.lines() == ["1", "2", "3", "4"]
    assert job.checkpoints() >= 1


def test_each_task_of_an_array_has_its_own_checkpoints_and_exit_code(jobs: dict[str, Job]) -> None:
    array = jobs["array"]
    said = array.cluster.on("ctl", "scontrol", "show", "job", "-o", array.id)
    ids = dict(re.findall(r"JobId=(\d+) .*?ArrayTaskId=(\d+)", said))
    assert sorted(ids.values()) == ["1", "2", "3"]
    for job_id, task in ids.items():
        job = Job(array.cluster, job_id, array.directory)

        assert job.wait_for_end() == ("FAILED", f"1{task}:0")
        assert job.lines(f"out.{task}") == ["1", "2", "3", "4", f"task {task}"]
        assert job.checkpoints() >= 1


def test_job_on_two_nodes_runs_without_checkpoints_and_says_so(jobs: dict[str, Job]) -> None:
    job = jobs["has two nodes"]

    assert job.wait_for_end() == ("FAILED", "5:0")
    assert job.lines()[1:] == ["here"]
    assert "runs without checkpoints: the job has 2 nodes" in job.lines()[0]
    assert job.history() == []


def test_two_jobs_on_one_node_are_checkpointed_at_once(cluster: Cluster) -> None:
    script = "i=0; until [ -e go ]; do i=$((i+1)); echo $i; sleep 0.2; done; exit {}"
    jobs = [cluster.submit(script.format(code), "-w", "n2", checkpoint="1s") for code in (21, 22)]
    for job in jobs:
        job.wait_for("checkpoint", count=3)
    for job in jobs:
        assert cluster.file(job.directory).is_dir()
        job.path("go").touch()

    assert [job.wait_for_end()[1] for job in jobs] == ["21:0", "22:0"]
    for job in jobs:
        assert job.lines() == [str(i) for i in range(1, len(job.lines()) + 1)]
        assert job.history("checkpoint-failed") == []


def test_job_without_the_flag_is_not_touched(cluster: Cluster) -> None:
    job = cluster.submit(LOOK, "-w", "n3", checkpoint=None)
    eventually(lambda: len(job.lines()) == 6, within=20, what="the job has looked around")
    parent, *namespaces, seccomp = job.lines()
    outside = [
        f"{kind} {cluster.on('n3', 'readlink', f'/proc/self/ns/{kind}').strip()}"
        for kind in ("pid", "mnt", "ipc", "net")
    ]
    commands = list(job.tree().values())
    files = cluster.on("n3", "ls", "/run/outlast/jobs").split()
    processes = cluster.on("n3", "ps", "-eo", "args")
    job.path("go").touch()

    assert parent.startswith("parent slurmstepd")
    assert namespaces == outside
    assert seccomp == "Seccomp:\t0"
    assert not [command for command in commands if "outlast" in command]
    assert job.id not in files
    assert f"--job {job.id} " not in processes
    assert job.wait_for_end() == ("COMPLETED", "0:0")
    assert cluster.try_on("ctl", "outlast", "events", job.id, user=True).returncode == 64


def test_job_that_had_done_its_work_and_is_run_again_begins_on_an_empty_output(cluster: Cluster) -> None:
    job = cluster.submit('echo "run ${SLURM_RESTART_COUNT:-0}"; sleep 3', checkpoint="1s")
    assert job.wait_for_end() == ("COMPLETED", "0:0")
    assert job.checkpoints() >= 1
    job.requeue()
    job.wait_for_line("run 1")

    assert job.wait_for_end() == ("COMPLETED", "0:0")
    assert job.lines() == ["run 1"]
    assert job.history("restored") == []
