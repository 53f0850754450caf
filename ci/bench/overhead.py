"""What checkpoints cost a job in time: the papers' experiments, each run beside the same run without checkpoints.

LU factorization with 3 and 6 checkpoints, matrix multiplication and a cellular automaton with 10, sequential
("plain") and forked, on one node of a cluster, shipped to its SFTP store meanwhile. Its server, which elsewhere has a
machine of its own, is here given only what the processors have left (SCHED_IDLE). Each round is a run without
checkpoints and one in each way; a run's ratio is its time over the mean of those without beside its round, the one
before and, but for the last, the one after. "Noise" is what two of these, one after the other, have to each other.
The work of a program is repeated until a run lasts as long as asked for.

On a machine with other work a run's time says little; "CPU ratio" is then of more use: the time that the program
computed for, and its pauses, over the time that it computes for alone. And from the time of each part of
each step comes what a checkpoint costs whatever the processor's speed is from one run to the next: how much less was
done in the second from when it was asked for than in the second and a half before and after, in bins of 50 ms, each
the median of all checkpoints. "Lost" is their sum, with its standard error (from drawing as many of the checkpoints,
again and again), and the note "by steps" is the ratio that this comes to. "None" is the same of moments without a
checkpoint, which should be 1 within its error.
"Off" is for how much longer the program did not compute (it stood still, or waited for a processor) in the second
from when a checkpoint was asked for than in the one after it, and "faults" how many more page faults it had (where
checkpoints come closer, in a quarter of the time between two).
Where two processors share a core, or its caches, the program is slower for as long as its checkpoint is shipped on
the other one. With the mode "neighbor" there are no checkpoints, but another processor computes for as long at the
same moments.

In the case "busy" the program computes on all cores, so that what ships its checkpoints takes from it. These are
made by the job's interval, with a bound on that (checkpoint.cpu_share) and with none; the note "busy" has both
ratios.

The notes hold the medians of the ratios of forked checkpoints, lu {checkpoints: ratio} and matmul and cellular
{size: ratio}, and noise. --plot draws them beside what the papers measured. Forked alone, all cases take an
hour and a half; with --keep they can be measured one by one, and what is broken off loses only the case
that it was at.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ci.bench import Bed, Bench
from ci.bench._frame import Row
from ci.bench._overhead_plot import draw, require
from ci.testbed.layout import TestbedError

ROUNDS = 5

_PROGRAMS = Path(__file__).parent / "programs"
_PROBE_SECONDS = 3.0
_BOOTSTRAPS = 200


@dataclass(frozen=True)
class _Case:
    """One program of one size, with so many checkpoints a run."""

    program: str
    size: int
    checkpoints: tuple[int, ...]
    probe_steps: int
    seconds: float = 64.0  # a minute, and what the probes may be wrong by
    shares: tuple[str, ...] = ("-",)  # of checkpoint.cpu_share; "-" for checkpoints that are asked for

    @property
    def busy(self) -> bool:
        """Whether it computes on all cores, so that what ships its checkpoints takes from it."""
        return self.shares != ("-",)

    @property
    def name(self) -> str:
        return f"{self.program} {self.size}{' on all cores' if self.busy else ''}"

    @property
    def word(self) -> str:
        """What it is called on the command line."""
        return f"{'busy-' if self.busy else ''}{self.program}-{self.size}"


@dataclass(frozen=True)
class _Way:
    """How a program runs: by itself, or with so many checkpoints."""

    mode: str = "none"
    share: str = "-"
    count: int = 0

    @property
    def name(self) -> str:
        bound = "" if self.share == "-" else f", cpu_share {self.share}"
        return f"{self.mode}, {self.count} checkpoints{bound}"


# LU's image is about 1.3 MB at order 400, as the paper's was.
_CASES = (
    _Case("lu", 400, (3, 6), 150, 37.0),
    _Case("matmul", 500, (10,), 66),
    _Case("matmul", 615, (10,), 36),
    _Case("matmul", 1020, (10,), 8),
    _Case("matmul", 1500, (10,), 3),
    _Case("cellular", 1024, (10,), 600),
    _Case("cellular", 2048, (10,), 150),
    _Case("matmul", 1500, (10,), 3, shares=("0", "0.25")),
)


def options(parser: argparse.ArgumentParser) -> None:
    """Add what to measure."""
    names = [case.word for case in _CASES]
    parser.add_argument(
        "--cases",
        type=_names,
        default=names,
        metavar="CASE,...",
        help=f"of {', '.join(names)}; all of them unless given",
    )
    parser.add_argument(
        "--modes",
        type=lambda text: text.split(","),
        default=["plain", "forked"],
        metavar="MODE,...",
        help="of plain (sequential), forked and neighbor; the first two unless given",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="how long a run lasts; 64, and 37 of LU, as in its paper, unless given",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="keep each case's values there; a case that is there already is not measured again",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ratios beside the papers'")


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := sorted(set(names) - {case.word for case in _CASES}):
        raise argparse.ArgumentTypeError(f"{unknown[0]}: no such case")
    return names


def run(bench: Bench) -> None:
    """Measure."""
    if bench.options.plot is not None:
        require()
    cases = [case for case in _CASES if case.word in bench.options.cases]
    found = {case: rows for case in cases if (rows := _kept(bench, case)) is not None}
    missing = [case for case in cases if case not in found]
    if missing:
        with bench.testbed() as bed:
            for name in ("overhead.py", "stamps.c"):
                bed.give(_PROGRAMS / name, name)
            bed.output("n1", ["gcc", "-O2", "-shared", "-fPIC", "-o", "stamps.so", "stamps.c"])
            bed.programs()
            # The server stands for another machine, so it gets what nobody here has a use for.
            bed.output("store", ["sh", "-c", "pidof sshd | xargs -n 1 chrt --idle --pid 0"], root=True)
            for case in missing:
                _measure(bench, bed, case)
                found[case] = [row for row in bench.rows() if row.quantity.startswith(f"{case.name}, ")]
                _keep(bench, case, found[case])
    ratios: dict[str, dict[str, float]] = {}
    noise: dict[str, float] = {}
    by_steps: dict[str, dict[str, dict[str, float]]] = {}
    busy: dict[str, float] = {}
    for case in cases:
        if case not in missing:
            for row in found[case]:
                for value in row.values:
                    bench.add(row.variant, row.quantity, value, row.unit)
        alone = next(row.median for row in found[case] if row.quantity == f"{case.name}, run")
        for row in found[case]:
            if row.quantity == f"{case.name}, ratio":
                if row.variant == "none":
                    noise[case.name] = round(row.median, 4)
                elif row.variant.startswith("forked") and case.busy:
                    busy[row.variant.split()[-1]] = round(row.median, 4)
                elif row.variant.startswith("forked"):
                    key = row.variant.split()[1] if case.program == "lu" else str(case.size)
                    ratios.setdefault(case.program, {})[key] = round(row.median, 4)
            elif row.quantity.startswith(f"{case.name}, lost"):
                count = max(case.checkpoints) if row.variant == "none" else int(row.variant.split()[1])
                share = count * row.median / 1e3 / alone
                name, value = ("error", share) if row.quantity.endswith("error") else ("ratio", 1 + share)
                by_steps.setdefault(case.name, {}).setdefault(row.variant, {})[name] = round(value, 4)
    for program, medians in ratios.items():
        bench.note(program, medians)
    if busy:
        bench.note("busy", busy)
    bench.note("noise", noise)
    bench.note("by steps", by_steps)
    if bench.options.plot is not None:
        draw(bench.options.plot, ratios, noise)


def _facts(bench: Bench, case: _Case) -> dict[str, object]:
    """What values must have in common to be of one table."""
    seconds = bench.options.seconds or case.seconds
    return {"rounds": bench.round_count, "modes": bench.options.modes, "seconds": seconds}


def _kept(bench: Bench, case: _Case) -> list[Row] | None:
    """Return what an earlier run kept of a case, None if nothing.

    Raises:
        TestbedError: that run was asked for something else.
    """
    file = bench.options.keep / f"{case.word}.json" if bench.options.keep is not None else None
    if file is None or not file.exists():
        return None
    kept = json.loads(file.read_text())
    if kept["facts"] != _facts(bench, case):
        raise TestbedError(
            f"{file}: measured with {kept['facts']}, not with {_facts(bench, case)}",
            hint="give the options of that run, or another directory",
        )
    return [Row(variant, quantity, unit, tuple(values)) for variant, quantity, unit, values in kept["rows"]]


def _keep(bench: Bench, case: _Case, rows: Sequence[Row]) -> None:
    if bench.options.keep is not None:
        kept = [[row.variant, row.quantity, row.unit, row.values] for row in rows]
        bench.options.keep.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"facts": _facts(bench, case), "machine": bench.machine, "rows": kept})
        (bench.options.keep / f"{case.word}.json").write_text(text)


def _measure(bench: Bench, bed: Bed, case: _Case) -> None:
    wanted = bench.options.seconds or case.seconds
    steps = case.probe_steps
    # The second time for longer: the automaton's first steps take twice as long as its later ones.
    for part in (1 / 3, 1.0):
        expected = _once(bed, case, steps, _Way(), _PROBE_SECONDS)["seconds"]
        steps, expected = math.ceil(steps * part * wanted / expected), part * wanted
    bench.say(f"{case.name}: {steps} steps, about {expected:.0f} s a run")
    ways = [
        _Way(mode, share, count)
        for count in case.checkpoints
        for share in case.shares
        for mode in bench.options.modes
    ]
    alone: list[dict[str, Any]] = []
    told: list[dict[_Way, dict[str, Any]]] = []
    for number in range(bench.round_count):
        bench.say(f"{case.name}: round {number + 1} of {bench.round_count}")
        alone.append(_once(bed, case, steps, _Way(count=max(case.checkpoints)), expected))
        # The least of them: one that was slow would have checkpoints due when the next has ended.
        expected = min(float(one["seconds"]) for one in alone)
        turn = ways if number % 2 == 0 else reversed(ways)
        told.append({way: _once(bed, case, steps, way, expected) for way in turn})
    for one in alone:
        bench.add("none", f"{case.name}, run", one["seconds"], "s")
    if not case.busy:
        _lost(bench, case, "none", alone)
        for way in ways:
            _lost(bench, case, way.name, [answers[way] for answers in told])
    for before, after in itertools.pairwise(alone):
        bench.add("none", f"{case.name}, ratio", after["seconds"] / before["seconds"], "")
    for number, answers in enumerate(told):
        _add_round(bench, case, answers, alone[number : number + 2])


def _lost(bench: Bench, case: _Case, variant: str, runs: Sequence[dict[str, Any]]) -> None:
    """Add how many ms of work a checkpoint cost, from what was left undone around all of *runs*, and its error."""
    width, (begin, end) = float(runs[0]["bin_seconds"]) * 1e3, runs[0]["bins"]
    short = [one[begin:end] for run in runs for one in run["short"]]

    def cost(some: Sequence[Sequence[float]]) -> float:
        return math.fsum(width * statistics.median(column) for column in zip(*some, strict=True))

    # Each checkpoint's own cost is of no use: what else a machine does now and then is more than what is looked for.
    draw_again = random.Random(0)  # noqa: S311 - no secret
    again = [cost(draw_again.choices(short, k=len(short))) for _ in range(_BOOTSTRAPS)]
    bench.add(variant, f"{case.name}, lost", cost(short), "ms")
    bench.add(variant, f"{case.name}, lost, error", statistics.stdev(again), "ms")


def _add_round(
    bench: Bench,
    case: _Case,
    answers: dict[_Way, dict[str, Any]],
    alone: Sequence[dict[str, Any]],
) -> None:
    """Add what the runs of one round took, beside those without checkpoints before and after it."""
    seconds = statistics.mean(one["seconds"] for one in alone)
    computed = statistics.mean(one["cpu_seconds"] for one in alone)
    for way, answer in answers.items():
        variant = way.name
        bench.add(variant, f"{case.name}, run", answer["seconds"], "s")
        bench.add(variant, f"{case.name}, ratio", answer["seconds"] / seconds, "")
        if way.mode == "neighbor":
            continue
        worked = answer["cpu_seconds"] + sum(answer["pauses_ms"]) / 1e3
        bench.add(variant, f"{case.name}, CPU ratio", worked / computed, "")
        if not case.busy:
            bench.add(variant, f"{case.name}, off", statistics.median(answer["off_ms"]), "ms")
            bench.add(variant, f"{case.name}, faults", statistics.median(answer["faults"]), "")
        bench.add(variant, f"{case.name}, pause", statistics.median(answer["pauses_ms"]), "ms")
        bench.add(variant, f"{case.name}, shipped", answer["shipped_bytes"] / 1e6, "MB")
        bench.add(variant, f"{case.name}, manager's CPU", answer["manager_cpu_seconds"], "s")


def _once(bed: Bed, case: _Case, steps: int, way: _Way, expected: float) -> dict[str, Any]:
    home = "/shared/alice"
    facts = [way.mode, way.share, str(way.count), str(expected)]
    command = ["python3", "-W", "ignore", f"{home}/overhead.py", *facts]
    work = [f"{home}/{case.program}", str(case.size), str(steps)]
    if case.busy:
        work += ["--threads", str(os.cpu_count())]
    answer: dict[str, Any] = json.loads(
        bed.output("n1", [*command, *work], root=True, within=120 + 10 * expected)
    )
    return answer
