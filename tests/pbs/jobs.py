"""A job of PBS's, as its owner sees it and as its managers' logs tell of it."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

from tests.cluster import eventually
from tests.pbs.conftest import MOMS, Pbs

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
        name = self.id.replace("[", "_").replace("]", "")
        logs = (
            self.pbs.state / "hosts" / node / "upper/var/log/outlast/jobs" / f"{name}.log" for node in MOMS
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

    def wait_for_session(self) -> None:
        """Wait until MoM has told PBS of the job's session: a hold before is one without a checkpoint."""
        eventually(lambda: self.facts.get("substate") == 42, within=60, what=f"{self.id} to have begun")

    def outlast(self, *words: str) -> str:
        """Run the product's command as the job's owner; it must succeed."""
        return self.pbs.on("ctl", "outlast", *words, user=True)

    def wait_for_state(self, letter: str, within: float = 90) -> None:
        """Wait for PBS's letter."""
        eventually(
            lambda: self.state == letter, within=within, what=f"job {self.id} in {letter}:\n{self.log}"
        )

    def task(self, number: int) -> Job:
        """The array's task of that number."""
        task = copy.copy(self)
        task.id = self.id.replace("[]", f"[{number}]")
        task.number = task.id.partition(".")[0]
        return task

    def output_path(self, letter: str = "o") -> Path:
        """Where PBS delivers its output at the end."""
        number = self.number.replace("[", ".").replace("]", "")
        return self.pbs.file(f"{self.directory}/ticks.{letter}{number}")

    def output(self, letter: str = "o") -> list[str]:
        """The lines of its output."""
        path = self.output_path(letter)
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
