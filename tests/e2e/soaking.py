"""A soak: nodes lose their power at random moments, and come back at others, under jobs that go on regardless."""

from __future__ import annotations

import dataclasses
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from tests.cluster import ENDED, NODES, Cluster, Job, eventually
from tests.e2e.conftest import Kills

# Counts until it is told to end, and says when and where; one of an array. Between any two of its steps it may have
# been saved here and restored elsewhere: a time counts where the host is the same before and after it.
COUNT = r"""
until [ -e go ]; do
	host=
	until [ "$host" = "$(hostname)" ]; do host=$(hostname) time=$(date +%s.%N); done
	echo "${i:=0} $time $host"; i=$((i+1)); sleep 0.1
done
exit $((SLURM_ARRAY_TASK_ID + 3))
"""
# Seconds between two kills, and for which a node stays off: at times it is back before anybody missed it.
BETWEEN = (1.0, 10.0)
OFF = (0.5, 12.0)
INTERVAL = "2s"
PACE = 0.25
# What a manager's log says when a run of the job computes.
_RUNS = ("started", "restored", "begun-again")


@dataclass(frozen=True)
class Work:
    """A program of tests/programs with its arguments, all that it prints, and how it ends."""

    command: str
    lines: Sequence[str]
    end: tuple[str, str]


@dataclass(frozen=True)
class Run:
    """One run of a job as Slurm wrote it down; times are in whole seconds, Unix time.

    *end* is when the next run began, or the job ended: of a lost run Slurm has no better one.
    """

    state: str
    node: str
    start: float
    end: float

    def had(self, when: float, margin: float = 1.0) -> bool:
        """Whether it was there at *when*; *margin* is more for who would rather believe so."""
        return self.start - margin <= when <= self.end + margin


@dataclass
class Task:
    """One job of the soak, and what became of it; *work* is None for one that counts."""

    job: Job
    out: str
    work: Work | None
    end: tuple[str, str]
    ended: tuple[str, str] | None = None
    restarts: int = -1

    def lines(self) -> list[str]:
        """What it has printed, without what Slurm writes there when it takes a run for lost."""
        return [line for line in self.job.lines(self.out) if not line.startswith("slurmstepd")]


@dataclass
class Soak:
    """The jobs, the kills, and what Slurm made of them."""

    cluster: Cluster
    dice: random.Random
    kills: Kills
    tasks: list[Task] = field(default_factory=list)
    killed: list[tuple[float, str]] = field(default_factory=list)
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def go(self, count: int, works: Sequence[Work], *, at_once: int) -> None:
        """Kill nodes *count* times under an array that counts and *at_once* of *works*, then let all jobs end."""
        counters = self._count()
        waiting = self._endless(works)
        mine = [self._submit(next(waiting)) for _ in range(at_once)]
        off: dict[str, float] = {}
        for task in [*counters, *mine]:
            task.job.wait_for("started")
        for _ in range(count):
            due = time.time() + self.dice.uniform(*BETWEEN)
            while time.time() < due:
                self._boot(off, time.time())
                for number, task in enumerate(mine):
                    if self._has_ended(task):
                        mine[number] = self._submit(next(waiting))
                time.sleep(0.2)
            if len(off) == len(NODES) - 1:
                self._boot(off, min(off.values()))
            node = self._victim(off)
            self.killed.append((self.cluster.cut_power(node), node))
            off[node] = time.time() + self.dice.uniform(*OFF)
        while off:
            time.sleep(0.2)
            self._boot(off, time.time())
        for task in counters:
            task.job.path("go").touch()
        for task in [*counters, *mine]:
            eventually(
                lambda task=task: self._has_ended(task),  # type: ignore[misc]
                within=240,
                what=f"the end of job {task.job.id}",
            )
        self.runs = self._read_runs()
        for task in self.tasks:
            self._measure(task)

    def hits(self, task: Task) -> list[float]:
        """When a node lost its power on which Slurm had the job."""
        runs = self.runs[task.job.id]
        return [when for when, node in self.killed if any(run.node == node and run.had(when) for run in runs)]

    def _count(self) -> list[Task]:
        array = self.cluster.submit(COUNT, "--array=0-1", "-o", "out.%a", checkpoint=INTERVAL)
        eventually(lambda: len(self._members(array)) == 2, within=30, what="both tasks of the array")
        for index, job_id in sorted(self._members(array).items()):
            job = Job(self.cluster, job_id, array.directory)
            self.tasks.append(Task(job, f"out.{index}", None, ("FAILED", f"{index + 3}:0")))
        return self.tasks[-2:]

    def _members(self, array: Job) -> dict[int, str]:
        """The ids of the tasks that run; one that waits has none of its own."""
        said = self.cluster.on("ctl", "squeue", "-h", "-t", "R", "-j", array.id, "-o", "%K %A")
        return {int(index): job_id for index, job_id in map(str.split, said.splitlines())}

    def _submit(self, work: Work) -> Task:
        command = f"exec {work.command} --pace {PACE}"
        task = Task(self.cluster.submit(command, checkpoint=INTERVAL), "out", work, work.end)
        self.tasks.append(task)
        return task

    @staticmethod
    def _endless(works: Sequence[Work]) -> Iterator[Work]:
        while True:
            yield from works

    def _has_ended(self, task: Task) -> bool:
        """Write down how a job ended, which Slurm forgets after some minutes."""
        if task.ended is None:
            facts = task.job.facts()
            if facts["JobState"] in ENDED:
                task.ended, task.restarts = (facts["JobState"], facts["ExitCode"]), int(facts["Restarts"])
        return task.ended is not None

    def _boot(self, off: dict[str, float], until: float) -> None:
        for node in [node for node, due in off.items() if due <= until]:
            self.cluster.testbed("start-node", node)
            del off[node]

    def _victim(self, off: dict[str, float]) -> str:
        """A node that is on, and mostly one that has work."""
        on = [node for node in NODES if node not in off]
        busy = self.cluster.on("ctl", "squeue", "-h", "-t", "R", "-o", "%N").split()
        worth = [node for node in on if node in busy]
        return self.dice.choice(worth if worth and self.dice.random() < 0.9 else on)

    def _read_runs(self) -> dict[str, list[Run]]:
        """Each job's runs, from what Slurm's jobcomp/filetxt wrote, in order."""
        found: dict[str, list[Run]] = {task.job.id: [] for task in self.tasks}
        for line in self.cluster.on("ctl", "cat", "/var/log/slurm/jobcomp.log").splitlines():
            facts = dict(re.findall(r"(\w+)=(\S*)", line))
            if facts.get("JobId") in found:
                start, end = (_unix(facts[key]) for key in ("StartTime", "EndTime"))
                runs = found[facts["JobId"]]
                if runs:
                    runs[-1] = dataclasses.replace(runs[-1], end=start)
                runs.append(Run(facts["JobState"], facts["NodeList"], start, end))
        return found

    def _measure(self, task: Task) -> None:
        """Note where in the checkpoint cycle the kills of a job fell, and how soon it computed again."""
        history = task.job.history()
        down: list[float] = []
        moments = [(when, "kill") for when in self.hits(task)]
        for when, what in sorted([*moments, *((one.time, one.event) for one in history)]):
            if what == "kill":
                before = [one.event for one in history if one.time <= when]
                self.kills.moments.append(_moment(before[-1] if before and not down else ""))
                down.append(when)
            elif what in _RUNS and down:
                if len(down) == 1:
                    self.kills.seconds.append(when - down[0])
                down.clear()


def _moment(last: str) -> str:
    known = {
        "": "before the job ran again",
        "dump": "during a dump or its shipping",
        "checkpoint": "between two checkpoints",
    }
    return known.get(last, f"after {last!r}")


def _unix(text: str) -> float:
    """Slurm's local time, which is UTC on the testbed's hosts; what has no time has not been."""
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return 0.0
