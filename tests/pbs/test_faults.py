"""What PBS and its hosts do to a job in the worst moment, and what a job keeps on its host."""

from __future__ import annotations

import re

import pytest

from tests.cluster import eventually
from tests.pbs.conftest import Pbs
from tests.pbs.jobs import TICKS, WHOLE, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

BURN = """
python3 -c "
import time
def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
block = bytearray(64 << 20)
burn(1)
print('before', flush=True)
time.sleep(8)
burn(4)
print('after', flush=True)
time.sleep({rest})
"
"""

PRIVATE = """
echo begun > here
for i in $(seq 10); do echo $i >> here; sleep 1; done
cp here "$PBS_O_WORKDIR/there"
"""


def seconds(text: str) -> int:
    """What PBS writes as HH:MM:SS."""
    hours, minutes, rest = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + int(rest)


def test_a_job_runs_on_while_the_server_is_restarted(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1s")
    job.wait_for("checkpoint", 2)
    pbs.restart_server("quick")
    count = job.count("checkpoint")
    job.wait_for("checkpoint", count + 1)
    assert (job.state, job.count("restored"), job.count("started")) == ("R", 0, 1)
    pbs.pbs("qrerun", job.id)
    job.wait_for("restored", within=90)
    job.ends_whole()


def test_the_tasks_of_an_array_go_on_when_their_host_is_lost(pbs: Pbs) -> None:
    whole = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1s", "-J", "1-2")
    tasks = [whole.task(number) for number in (1, 2)]
    for task in tasks:
        task.wait_for("checkpoint", 2)
    lost = tasks[0].node
    there = [task for task in tasks if task.node == lost]
    pbs.testbed("kill-node", lost)
    for task in there:
        task.wait_for("restored", within=150)
        assert task.node != lost
    for task in tasks:
        eventually(lambda task=task: task.output_path().exists(), within=120, what=task.log)  # type: ignore[misc]
        assert task.output() == WHOLE, task.log


def test_a_job_that_is_deleted_while_it_is_dumped_is_gone(pbs: Pbs) -> None:
    script = "exec python3 -c 'import os, time; block = os.urandom(300 << 20); print(1, flush=True); time.sleep(300)'"
    job = Job(pbs, script, "-v", "OUTLAST_INTERVAL=1h")
    job.wait_for("started")
    job.wait_for_session()
    node = job.node
    pbs.on("ctl", "sh", "-c", f"outlast checkpoint {job.id} >/dev/null 2>&1 &", user=True)
    job.wait_for("dump")
    pbs.pbs("qdel", job.id, user=True)
    job.wait_for_state("F")
    eventually(lambda: job.processes(node) == [], within=60, what="nothing left of the job")
    eventually(
        lambda: pbs.try_on(node, "test", "-e", f"/run/outlast/jobs/{job.id}").returncode != 0,
        within=60,
        what=f"its manager's end:\n{job.log}",
    )
    assert job.count("restored") == 0


@pytest.mark.parametrize("name", ["steps", "steps.py"])
def test_a_job_checkpoints_itself_in_c_and_in_python(pbs: Pbs, name: str) -> None:
    job = Job(pbs, f"{pbs.program(name)} 3", "-v", "OUTLAST_INTERVAL=1h")
    job.wait_for_state("F")
    assert job.output() == ["step 1", "step 2", "step 3", "done"]
    assert (job.count("checkpoint"), int(job.facts["Exit_status"])) == (3, 0)


def test_output_that_is_written_at_its_own_place_is_right_after_a_lost_host(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1s", "-k", "oed")
    job.wait_for("checkpoint", 3)
    pbs.testbed("kill-node", job.node)
    job.wait_for("restored", within=120)
    job.wait_for_state("F")
    assert job.output() == WHOLE, job.log


def test_a_private_directory_goes_with_the_job(pbs: Pbs) -> None:
    job = Job(pbs, PRIVATE, "-v", "OUTLAST_INTERVAL=1s", "-W", "sandbox=PRIVATE")
    job.wait_for("checkpoint", 3)
    pbs.testbed("kill-node", job.node)
    job.wait_for("restored", within=120)
    job.wait_for_state("F")
    said = pbs.file(f"{job.directory}/there").read_text().split()
    assert said == ["begun", *map(str, range(1, 11))], job.log


def test_pbs_counts_what_a_restored_job_uses(pbs: Pbs) -> None:
    # A real MoM samples what its jobs use every 10 s, and longer ones up to every two minutes.
    job = Job(pbs, BURN.replace("{rest}", "130" if pbs.real else "3"), "-v", "OUTLAST_INTERVAL=1h")
    job.wait_for("started")
    job.wait_for_session()
    eventually(lambda: "before" in spooled(job), within=60, what="its first half")
    assert job.outlast("checkpoint", job.id)
    pbs.pbs("qrerun", job.id)
    job.wait_for("restored", within=90)
    job.wait_for_state("F", within=220)
    used = job.facts["resources_used"]
    assert seconds(used["cput"]) >= 4, used
    assert int(re.sub(r"\D", "", used["mem"])) >= 64 << 10, used


def spooled(job: Job) -> str:
    """What the job has written up to now."""
    return job.pbs.try_on(job.node or "n1", "cat", f"/var/spool/pbs/spool/{job.id}.OU").stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-c", "w=5", "-l", "select=2:ncpus=1", "-l", "place=scatter"], "several hosts"),
        (["-I", "-c", "w=5"], "interactive"),
    ],
    ids=["several-hosts", "interactive"],
)
def test_what_cannot_be_saved_is_refused_with_the_reason(pbs: Pbs, options: list[str], words: str) -> None:
    directory = pbs.new_directory()
    pbs.on("ctl", "sh", "-c", f"echo true > {directory}/job.sh", user=True)
    interactive = "-I" in options
    command = " ".join(["qsub", *options, *([] if interactive else [f"{directory}/job.sh"])])
    # An interactive job asks for a terminal.
    done = pbs.try_pbs(*(["script", "-qec", command, "/dev/null"] if interactive else ["sh", "-c", command]))
    assert done.returncode != 0
    assert words in done.stdout + done.stderr
