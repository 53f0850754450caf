"""The whole chain under PBS: hook, manager, capsule, store, watcher, and what PBS does when hosts go."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import pytest

from tests.cluster import eventually
from tests.pbs.conftest import INSTALL, MOMS, Pbs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

COUNT = 16
TICKS = f"""
echo "begin"
echo "kept" > $TMPDIR/file
exec 7>>$TMPDIR/log
for i in $(seq {COUNT}); do echo tick $i; echo $i >&7; sleep 1; done
cat $TMPDIR/file; wc -l < $TMPDIR/log
echo "an error" >&2
exit 7
"""
WHOLE = ["begin", *(f"tick {i}" for i in range(1, COUNT + 1)), "kept", str(COUNT)]


class Job:
    """A job of alice's."""

    def __init__(self, pbs: Pbs, script: str, *options: str) -> None:
        self.pbs = pbs
        self.directory = pbs.new_directory()
        pbs.on(
            "ctl", "sh", "-c", f"cat > {self.directory}/job.sh", user=True, stdin=f"#!/bin/bash\n{script}\n"
        )
        self.id = self.submit(*options).stdout.strip()
        self.number = self.id.partition(".")[0]

    def submit(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run qsub in the job's directory."""
        words = " ".join(["cd", self.directory, "&&", "exec", "qsub", "-N", "ticks", *options, "job.sh"])
        return self.pbs.try_pbs("sh", "-c", words)

    @property
    def facts(self) -> dict[str, Any]:
        """What qstat says, for a job that has ended too."""
        said = json.loads(self.pbs.pbs("qstat", "-x", "-f", "-F", "json", self.id), strict=False)
        return dict(said["Jobs"][self.id])

    @property
    def state(self) -> str:
        """PBS's letter."""
        return str(self.facts["job_state"])

    @property
    def node(self) -> str:
        """Where it runs, or "" where it does not."""
        return str(self.facts.get("exec_host", "")).partition("/")[0]

    @property
    def log(self) -> str:
        """What its managers have logged, on all hosts."""
        logs = (
            self.pbs.state / "hosts" / node / "upper/var/log/outlast/jobs" / f"{self.id}.log" for node in MOMS
        )
        return "".join(path.read_text() for path in logs if path.exists())

    def count(self, event: str) -> int:
        """How often its managers have logged *event*."""
        return len(re.findall(rf" outlast: {event}: ", self.log))

    def wait_for(self, event: str, count: int = 1, within: float = 60) -> None:
        """Wait until its managers have logged *event* so often."""
        eventually(
            lambda: self.count(event) >= count, within=within, what=f"{count} times {event}:\n{self.log}"
        )

    def wait_for_state(self, letter: str, within: float = 90) -> None:
        """Wait for PBS's letter."""
        eventually(
            lambda: self.state == letter, within=within, what=f"job {self.id} in {letter}:\n{self.log}"
        )

    def output(self, letter: str = "o") -> list[str]:
        """The lines of its output, which PBS delivers at the end."""
        path = self.pbs.file(f"{self.directory}/ticks.{letter}{self.number}")
        eventually(path.exists, within=20, what=f"{path}")
        return path.read_text().splitlines()

    def ends_whole(self) -> None:
        """It ends with its own exit status, and nothing in its output is missing or twice."""
        self.wait_for_state("F")
        assert self.output() == WHOLE, self.log
        assert self.output("e")[-1:] == ["an error"]
        assert int(self.facts["Exit_status"]) == 7

    def processes(self, node: str) -> list[str]:
        """The processes on *node* that are this job's."""
        said = self.pbs.on(node, "ps", "-ww", "-eo", "args")
        return [
            line for line in said.splitlines() if f"{self.id}.SC" in line or "outlast-shim --interval" in line
        ]


def test_a_job_whose_host_is_lost_goes_on_elsewhere(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1s")
    job.wait_for("checkpoint", 3)
    lost = job.node
    pbs.testbed("kill-node", lost)
    job.wait_for("restored", within=90)
    assert job.node != lost
    job.ends_whole()


def test_a_job_whose_host_comes_back_at_once_goes_on(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1s")
    job.wait_for("checkpoint", 3)
    node = job.node
    pbs.testbed("kill-node", node)
    pbs.testbed("start-node", node)
    pbs.start_mom(node)
    job.wait_for("restored", within=90)
    job.ends_whole()


def test_a_held_job_goes_on_on_another_host(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-c", "w=30")
    job.wait_for("started")
    first = job.node
    eventually(lambda: len(job.processes(first)) > 1, within=20, what="the job's processes")
    pbs.pbs("qhold", job.id, user=True)
    job.wait_for_state("H")
    assert (job.count("checkpoint"), job.count("held")) == (1, 1)
    assert job.processes(first) == []
    pbs.pbs("pbsnodes", "-o", first)
    pbs.pbs("qrls", job.id, user=True)
    # PBS refuses the first attempt after a hold, and takes the job up in its next cycle.
    pbs.pbs("qmgr", "-c", "set server scheduling = true") if pbs.real else None
    job.wait_for("restored", within=90)
    assert job.node not in ("", first)
    job.ends_whole()


def test_a_host_whose_processors_lack_an_instruction_gives_the_job_back_to_the_queue(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1s")
    job.wait_for("checkpoint", 2)
    first = job.node
    other = next(node for node in MOMS if node != first)
    mask = "sed 's/ popcnt / /' /proc/cpuinfo >/tmp/cpuinfo && mount --bind /tmp/cpuinfo /proc/cpuinfo"
    pbs.on(other, "sh", "-c", mask)
    try:
        pbs.pbs("pbsnodes", "-o", first)
        pbs.pbs("qrerun", job.id)
        job.wait_for("unfit-node")
    finally:
        pbs.pbs("pbsnodes", "-r", first)
        pbs.pbs("pbsnodes", "-o", other)
        pbs.on(other, "sh", "-c", "umount /proc/cpuinfo && rm /tmp/cpuinfo")
    job.wait_for("restored", within=90)
    assert job.node == first
    job.ends_whole()


def test_what_pbs_keeps_on_the_host_only_is_there_after_a_rerun(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1s")
    job.wait_for("checkpoint", 4)
    pbs.pbs("qrerun", job.id)
    job.wait_for("restored", within=90)
    job.ends_whole()


def test_signals_and_deletion_reach_the_job_in_its_capsule(pbs: Pbs) -> None:
    job = Job(
        pbs,
        'trap "" USR1; exec /usr/bin/python3 -c "import time; time.sleep(300)"',
        "-v",
        "OUTLAST_INTERVAL=1s",
    )
    job.wait_for("checkpoint", 2)
    node = job.node
    pbs.pbs("qdel", job.id, user=True)
    job.wait_for_state("F")
    eventually(lambda: job.processes(node) == [], within=20, what="nothing left of the job")
    assert job.count("restored") == 0
    ended = int(job.facts["Exit_status"])
    assert ended >= 128, ended


def test_a_copy_that_was_cut_off_is_ended_before_it_can_write(pbs: Pbs) -> None:
    job = Job(
        pbs, TICKS.replace(f"seq {COUNT}", "seq 60") if pbs.real else TICKS, "-v", "OUTLAST_INTERVAL=1s"
    )
    job.wait_for("checkpoint", 2)
    cut = job.node
    pbs.testbed("cut", cut)
    job.wait_for("restored", within=150)
    assert job.node != cut
    pbs.testbed("heal", cut)
    job.wait_for("fenced", within=30)
    eventually(lambda: job.processes(cut) == [], within=30, what="nothing left of the old copy")
    job.wait_for_state("F", within=120)
    ticks = [line for line in job.output() if line.startswith("tick")]
    assert ticks == [f"tick {i}" for i in range(1, len(ticks) + 1)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-v", "OUTLAST_INTERVAL=3"], "not a time between 1s and 30d"),
        (["-c", "w=5", "-r", "n"], "may not be rerun"),
    ],
)
def test_what_cannot_be_had_is_refused_at_submission(pbs: Pbs, options: list[str], words: str) -> None:
    job = Job(pbs, "true", "-h")
    done = job.submit(*options)
    assert done.returncode != 0
    assert words in done.stderr
    pbs.pbs("qdel", job.id, user=True)


def test_a_job_that_asks_for_nothing_is_left_alone(pbs: Pbs) -> None:
    job = Job(pbs, "echo plain; exit 3")
    job.wait_for_state("F")
    assert (job.output(), int(job.facts["Exit_status"]), job.log) == (["plain"], 3, "")


def test_installing_again_changes_nothing_and_can_be_taken_back(pbs: Pbs) -> None:
    assert pbs.pbs(INSTALL, "--dry-run") == ""
    before = pbs.on("n1", "cat", "/var/spool/pbs/mom_priv/config")
    assert "$action checkpoint_abort" in before
    assert pbs.on("n1", INSTALL) == ""
    pbs.on("n1", INSTALL, "--uninstall")
    assert "$action" not in pbs.on("n1", "cat", "/var/spool/pbs/mom_priv/config")
    assert "$action" in pbs.on("n1", INSTALL, "--dry-run")
    pbs.on("n1", INSTALL)
    assert pbs.on("n1", "cat", "/var/spool/pbs/mom_priv/config") == before
