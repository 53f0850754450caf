"""One job on the testbed: checkpointed, its node killed, ended elsewhere; and what was seen of it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ci.bench import Bed
from ci.demo.output import Comparison, OutputFile, compare

ORDER = 400  # a checkpoint image of about 1.3 MB
SWEEPS = 50
PACE = 0.5  # seconds between sweeps, so that the job lasts as long on any machine
INTERVAL = 5  # seconds
_KILL_AFTER = 2  # checkpoints
_PATIENCE = 180.0  # seconds; it takes about 45
_LAST_EVENTS = 10.0  # seconds from the job's end until its manager has shipped the last event
_TICK = 0.01  # seconds
_HOLD = 2.0  # seconds until what happened is told, since events do not arrive in the order of their times
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "NODE_FAIL")
_SCRIPT = f"""\
#!/bin/sh
#SBATCH --job-name=lu
#SBATCH --output=lu-%j.out
./lu {ORDER} {SWEEPS} --pace {PACE}
"""

Tell = Callable[[float, str, str], None]
"""Called with each thing that happens: its Unix time, a few words, and the rest for people."""


@dataclasses.dataclass
class Outcome:
    """What was seen of one job. Times are in seconds or Unix times, sizes in bytes; None: was not seen."""

    job_id: str = ""
    submitted: float = 0.0
    killed: float | None = None
    known_dead: float | None = None
    running_again: float | None = None
    set_back: int | None = None  # whole lines of output
    state: str = ""
    exit_code: int | None = None
    events: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)
    comparison: Comparison | None = None
    problems: list[str] = dataclasses.field(default_factory=list)

    def of(self, event: str) -> list[Mapping[str, Any]]:
        """The job's events of one kind, in order."""
        return [one for one in self.events if one["event"] == event]

    @property
    def nodes(self) -> list[str]:
        """The nodes on which the job ran, in order."""
        return [one["node"] for one in self.events if one["event"] in ("started", "restored")]

    @property
    def kill_to_running(self) -> float | None:
        """Seconds from the kill to the first new line of output that was computed elsewhere."""
        return _between(self.killed, self.running_again)

    @property
    def kill_to_known_dead(self) -> float | None:
        """Seconds from the kill until the watcher told the scheduler that the node is dead."""
        return _between(self.killed, self.known_dead)

    def parts(self) -> list[tuple[str, float]]:
        """What the time from the kill to the first new line was spent on, in seconds."""
        found = []
        if self.kill_to_known_dead is not None:
            found.append(("until the node was known to be dead", self.kill_to_known_dead))
        for one in self.of("restored")[:1]:
            waited = _between(self.known_dead, one["time"] - one["fetch_s"] - one["restore_s"])
            if waited is not None:
                found.append(("until Slurm had the job run again", waited))
            found += [("to fetch the checkpoint", one["fetch_s"]), ("to restore it", one["restore_s"])]
            if (worked := _between(one["time"], self.running_again)) is not None:
                found.append(("until the program's next line", worked))
        return found


def reference(bed: Bed) -> list[str]:
    """Compile the program on the cluster; return what it prints when nothing interrupts it."""
    bed.programs()
    script = bed.home / "lu.sh"
    script.write_text(_SCRIPT)
    return bed.output("n3", ["./lu", str(ORDER), str(SWEEPS)], within=120).splitlines()


def run(bed: Bed, expected: Sequence[str], tell: Tell) -> Outcome:
    """Submit the job as alice, kill its node after the second checkpoint, and see how it ends.

    Raises:
        TestbedError: something of the testbed, not of the job, went wrong.
    """
    chain = _Chain(bed, tell)
    try:
        chain.follow()
    finally:
        chain.close()
    outcome = chain.outcome
    output = bed.home / f"lu-{outcome.job_id}.out"
    lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    outcome.comparison = compare(lines, expected)
    outcome.problems += _problems(outcome) + outcome.comparison.problems()
    return outcome


class _Chain:
    """The job while it runs: asks product and scheduler in turns, and looks at the output meanwhile."""

    def __init__(self, bed: Bed, tell: Tell) -> None:
        self._bed = bed
        self._tell = tell
        self._untold: list[tuple[float, str, str]] = []
        self._seen: set[str] = set()
        self._checkpoints = 0
        self._requeued = False
        self._over: float | None = None
        self._unanswered = "nothing was asked"
        self.outcome = Outcome(submitted=time.time())
        argv = ["sbatch", "--parsable", f"--checkpoint={INTERVAL}s", "lu.sh"]
        self.outcome.job_id = job_id = bed.output("ctl", argv).strip()
        self._output = OutputFile(bed.home / f"lu-{job_id}.out")
        self._questions = (
            (["outlast", "events", job_id, "--json"], self._take_events),
            (["scontrol", "show", "job", "--oneliner", job_id], self._take_state),
        )
        self._asked = 0
        self._question = bed.start("ctl", self._questions[0][0])
        self._note(
            self.outcome.submitted, "submitted", f"job {job_id}: sbatch --checkpoint={INTERVAL}s lu.sh"
        )

    def follow(self) -> None:
        """Return when the job has ended and all of its events are known, or when patience is at its end."""
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            time.sleep(_TICK)
            self._look_at_output()
            self._tell_until(time.time() - _HOLD)
            if self._question.poll() is None:
                continue
            said, complaint = self._question.communicate()
            if self._question.returncode:
                # The job is not known from its first moment on, and the store may be slow to answer.
                self._unanswered = (complaint.strip() or "no answer").splitlines()[-1]
            else:
                self._questions[self._asked][1](said)
            if self._over is not None and (
                self.outcome.of("ended") or time.monotonic() > self._over + _LAST_EVENTS
            ):
                words = f"Slurm says {self.outcome.state}, exit code {self.outcome.exit_code}"
                self._note(time.time(), "result", words)
                return
            if self.outcome.killed is None and len(self.outcome.of("checkpoint")) >= _KILL_AFTER:
                self._kill()
            self._asked = 1 - self._asked
            self._question = self._bed.start("ctl", self._questions[self._asked][0])
        if self._over is None:
            self.outcome.exit_code = None
            self.outcome.problems.append(f"the job did not end within {_PATIENCE:g} s: {self.outcome.state}")
            self._bed.run("ctl", ["scancel", self.outcome.job_id])

    def close(self) -> None:
        """End what is under way."""
        if self._question.poll() is None:
            self._question.kill()
        self._question.communicate()
        self._tell_until(math.inf)
        if not self.outcome.events:
            self.outcome.problems.append(f"no event of the job was ever seen: {self._unanswered}")

    def _note(self, moment: float, what: str, text: str) -> None:
        self._untold.append((moment, what, text))

    def _tell_until(self, moment: float) -> None:
        """Tell what happened before *moment*, in its order."""
        self._untold.sort(key=lambda one: one[0])
        while self._untold and self._untold[0][0] <= moment:
            self._tell(*self._untold.pop(0))

    def _kill(self) -> None:
        node = self.outcome.nodes[-1]
        self.outcome.killed = time.time()
        self._bed.kill_node(node)
        self._output.expect_rollback()
        line = self._output.last_line()
        self._note(self.outcome.killed, "node killed", f'{node}: power cut, after the line "{line}"')

    def _look_at_output(self) -> None:
        if self.outcome.running_again is None and self._output.has_grown_again():
            self.outcome.running_again = now = time.time()
            self.outcome.set_back = self._output.lines_set_back()
            text = f'"{self._output.last_line()}"'
            if (seconds := self.outcome.kill_to_running) is not None:
                text += f", {seconds:.1f} s after the kill"
            self._note(now, "new output", text)

    def _take_events(self, said: str) -> None:
        self.outcome.events = sorted(json.loads(said)["events"], key=lambda event: float(event["time"]))
        for event in self.outcome.events:
            if (key := json.dumps(event, sort_keys=True)) in self._seen:
                continue
            self._seen.add(key)
            kind, node, text = event["event"], event["node"], event["text"]
            if kind in ("started", "restored"):
                text = f"on {node}" + (f" from checkpoint {text}" if kind == "restored" else "")
            elif kind == "checkpoint":
                self._checkpoints += 1
                kind = f"checkpoint {self._checkpoints}"
                text = (
                    f"job stood still for {event['pause_ms']:.0f} ms; "
                    f"{megabytes(event['image_bytes'])}, shipped as {megabytes(event['stored_bytes'])}"
                )
            elif kind == "node-marked-down":
                self.outcome.known_dead = event["time"]
                kind, text = "known dead", text.removeprefix("node marked down ")
            elif kind == "node-excluded":
                kind, text = "kept away", "from " + text.removeprefix("node excluded ")
            elif kind == "requeued":
                self._requeued = True
            elif kind == "dump":
                continue
            self._note(event["time"], kind, text)

    def _take_state(self, said: str) -> None:
        facts = dict(re.findall(r"(\S+?)=(\S*)", said))
        self.outcome.state = facts["JobState"]
        if int(facts["Restarts"]) > 0 and not self._requeued:
            self._requeued = True
            self._note(time.time(), "requeued", "by Slurm, with the same job id")
        if facts["JobState"] not in _OVER:
            # Slurm may call a job failed for a moment before it requeues it.
            self._over = None
        elif self._over is None:
            self._over = time.monotonic()
        code, signal = map(int, facts["ExitCode"].split(":"))
        self.outcome.exit_code = 128 + signal if signal else code


def _problems(outcome: Outcome) -> list[str]:
    """Return, as sentences, what of the demonstration did not hold."""
    found = []
    if outcome.killed is None:
        found.append(f"there were not {_KILL_AFTER} checkpoints, and so no node was killed")
    elif not outcome.of("restored"):
        found.append("the job was not restored after its node was killed")
    elif len(set(outcome.nodes)) != len(outcome.nodes):
        found.append(f"the job ran twice on the same node: {', '.join(outcome.nodes)}")
    if outcome.killed is not None and outcome.running_again is None:
        found.append("no new line of output was seen after the kill")
    if outcome.exit_code is not None and (outcome.state, outcome.exit_code) != ("COMPLETED", 0):
        found.append(f"the job ended as {outcome.state} with exit code {outcome.exit_code}")
    for event in outcome.of("checkpoint-failed"):
        found.append(event["text"])
    return found


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else end - begin


def megabytes(count: float) -> str:
    """Write a number of bytes for people."""
    return f"{count / 1e6:.2f} MB"
