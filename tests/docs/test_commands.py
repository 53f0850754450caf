"""Every command that README and docs/use.md show is run here, as they show it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, Job, eventually
from tests.docs.conftest import ROOT

pytestmark = [pytest.mark.docs, pytest.mark.timeout(300)]

DOCUMENTS = ("README.md", "docs/use.md")
PROGRAMS = ("sbatch", "outlast", "sudo", "scontrol", "squeue", "setsid", "export", "man")
# What is run by another part, and why not here.
ELSEWHERE = {
    "sudo scripts/test": "this is a part of it",
    "sudo scripts/demo --keep": "tests/docs runs it without --keep, and has a testbed of its own",
    "export OUTLAST_APPEND": "tests/slurm/test_chain_files.py",
    "export PMIX_MCA": "the part languages: tests/criu/kinds/table.py, Open MPI",
    "mpirun": "the part languages: tests/criu/kinds/table.py, Open MPI",
}


def commands(document: str) -> list[str]:
    """Return the commands in the code blocks of *document*, each once: those that begin with a known program."""
    found: dict[str, None] = {}
    fenced = False
    for line in (ROOT / document).read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
            continue
        if not fenced and not line.startswith("    "):
            continue
        # Several stand in one line where there is room; what follows a "#" is said of it.
        for part in re.split(r"\s{3,}", line.split(" # ")[0].strip()):
            text = part.split("  #")[0].strip().removeprefix("$ ")
            if text.split(" ")[0] in PROGRAMS:
                found[text] = None
    return list(found)


ALL = {text: document for document in DOCUMENTS for text in commands(document)}


def elsewhere(text: str) -> bool:
    return any(text == one or (one in text and one != "sudo scripts/test") for one in ELSEWHERE) or (
        text.startswith("sudo scripts/test ") or text == "sudo scripts/test"
    )


@pytest.fixture(scope="module")
def place(module_cluster: Cluster) -> str:
    """A directory of alice's with the files that the documents speak of."""
    directory = module_cluster.new_directory()
    seen = module_cluster.file(directory)
    (seen / "job.sh").write_text("#!/bin/sh\nfor i in $(seq 2000); do echo $i; sleep 0.3; done\n")
    (seen / "train.py").write_text(
        "import time\nfor step in range(2000):\n    print(step)\n    time.sleep(0.3)\n"
    )
    module_cluster.on("ctl", "cp", module_cluster.program("lu").split()[-1], f"{directory}/lu")
    return directory


def submitted(cluster: Cluster, place: str) -> Job:
    """Submit a job of alice's that has one checkpoint; return it."""
    script = "for i in $(seq 2000); do echo $i; sleep 0.3; done"
    job = cluster.submit(script, checkpoint="1h", directory=place)
    job.wait_for("started")
    cluster.on("ctl", "outlast", "checkpoint", job.id, user=True)
    return job


@pytest.fixture(scope="module")
def shown(module_cluster: Cluster, place: str) -> Job:
    """The job that the documents call 17, for who only looks at it."""
    return submitted(module_cluster, place)


@pytest.fixture
def moved(cluster: Cluster, place: str) -> Iterator[Job]:
    """The same, for one test that stops or moves it."""
    job = submitted(cluster, place)
    yield job
    job.cancel()


def stored(job: Job) -> str:
    """The name of a checkpoint of *job* that is in the store."""
    said = job.cluster.on("ctl", "outlast", "list", "--json", job.id, user=True)
    return str(json.loads(said)["checkpoints"][0]["name"])


def test_the_testbed_that_was_kept_can_be_looked_at(cluster: Cluster) -> None:
    (text,) = [text for text in ALL if "scripts/testbed" in text]
    assert cluster.testbed(*text.removeprefix("sudo scripts/testbed ").split()).startswith("JOB")


def test_there_are_commands_in_both_documents() -> None:
    for document in DOCUMENTS:
        assert len(commands(document)) >= 10, document


@pytest.mark.parametrize("text", [text for text in ALL if text.startswith("sbatch") and not elsewhere(text)])
def test_what_is_submitted_runs(cluster: Cluster, place: str, text: str) -> None:
    here = re.sub(r"--partition=\S+", "--partition=main", text)
    said = cluster.on("ctl", "bash", "-c", f"cd {place} && {here} --parsable" if "--wrap" in here else
                      f"cd {place} && {here.replace('sbatch', 'sbatch --parsable', 1)}", user=True)  # fmt: skip
    (job_id,) = re.findall(r"^(\d+)$", said, re.M)
    try:
        task = Job(cluster, job_id, place)
        eventually(
            lambda: "RUNNING" in cluster.on("ctl", "squeue", "-h", "-j", job_id, "-o", "%T"),
            within=30,
            what="it runs",
        )
        if "--array" not in text:
            task.wait_for("started")
    finally:
        cluster.on("ctl", "scancel", job_id)


@pytest.mark.parametrize(
    "text",
    [
        text
        for text in ALL
        if text.startswith("outlast ")
        and not text.startswith(("outlast run", "outlast launcher", "outlast recover"))
    ],
)
def test_what_is_asked_of_a_job_is_answered(
    cluster: Cluster, place: str, request: pytest.FixtureRequest, text: str
) -> None:
    moves = text.split()[1] in ("migrate", "restart", "hold", "release")
    job: Job = request.getfixturevalue("moved" if moves else "shown")
    words = shlex.split(re.sub(r"\b17@\d\.\d\b", "CHECKPOINT", text))
    if words[1] == "release":
        cluster.on("ctl", "outlast", "hold", job.id, user=True)
        job.wait_for_state("PENDING")
    words = [stored(job) if word == "CHECKPOINT" else job.id if word == "17" else word for word in words]
    if words[1] == "top":
        words.append("--once")
    host = job.node if words[1] == "explain" else "ctl"
    done = cluster.try_on(host, "bash", "-c", f"cd {place} && {shlex.join(words)}", user=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    if "--plot" in words:
        assert cluster.file(f"{place}/{words[-1]}").stat().st_size > 1000


@pytest.mark.parametrize("text", [text for text in ALL if text.startswith("outlast launcher")])
def test_the_launcher_prints_an_address(cluster: Cluster, text: str) -> None:
    said = cluster.on("ctl", "bash", "-c", f"timeout -s INT 5 {text} || true", user=True)
    assert "http://127.0.0.1:" in said


@pytest.mark.parametrize("text", [text for text in ALL if re.match(r"(sudo )?outlast (run|recover)", text)])
def test_without_a_scheduler_a_command_runs_and_its_checkpoint_comes_back(
    cluster: Cluster, place: str, shown: Job, text: str
) -> None:
    here = text.removeprefix("sudo ").replace("./lu 2000 500", "./lu 200 20")
    if " recover " in here:
        here = re.sub(r"\b17@\d\.\d\b", stored(shown), here)
        here = here if "17" not in here.split() else here.replace(" 17 ", f" {shown.id} ")
    if "alien" in here:
        start = f"cd {place} || exit; setsid sleep 1000 >o 2>&1 </dev/null & echo $!; sleep 0.3"
        pid = cluster.on("n1", "bash", "-c", start).strip()
        cluster.on("n1", "outlast", "checkpoint", "--pid", pid, "alien")
        cluster.on("n1", "kill", "-9", pid)
    # It is the job itself from now on, and that goes on for long: it is looked at, and ended.
    ended = cluster.try_on("n1", "timeout", "-s", "KILL", "8", "bash", "-c", f"cd {place} && {here}")
    assert "Traceback" not in ended.stderr
    assert ended.returncode in (0, 137, -9), ended.stderr
    log = cluster.try_on("n1", "sh", "-c", "cat /var/log/outlast/jobs/*.log").stdout
    assert "started:" in log or "restored:" in log


def test_a_process_that_outlast_did_not_start_is_checkpointed_and_started_again(
    cluster: Cluster, place: str
) -> None:
    texts = [text for text in ALL if "--pid" in text]
    for text in texts:
        start = f"cd {place} || exit; setsid ./lu 2000 500 >out 2>&1 </dev/null & echo $!; sleep 1"
        pid = cluster.on("n2", "bash", "-c", start).strip()
        said = cluster.on("n2", *shlex.split(text.removeprefix("sudo ").replace("4711", pid)))
        assert "alien@" in said
        cluster.on("n2", "kill", "-9", pid)


def test_the_demo_does_what_the_readme_shows(tmp_path: Path) -> None:
    (text,) = [text for text in ALL if text == "sudo scripts/demo"]
    done = subprocess.run(
        [*text.removeprefix("sudo ").split(), "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OUTLAST_TESTBED_DIR": str(tmp_path / "bed")},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ok"] is True


def test_no_command_is_left_that_nobody_runs() -> None:
    kinds: list[Callable[[str], object]] = [
        elsewhere,
        lambda text: text.startswith(("sbatch ", "outlast ")),
        lambda text: re.match(r"sudo outlast (run|recover|checkpoint --pid) ", text),
        lambda text: text in ("sudo scripts/demo", "sudo scripts/testbed user ctl outlast status"),
    ]
    assert [text for text in ALL if not any(kind(text) for kind in kinds)] == []
