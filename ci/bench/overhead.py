"""What checkpoints cost a job in time: the papers' experiments, each run beside the same run without checkpoints.

LU factorization with 3 and 6 checkpoints, matrix multiplication and a cellular automaton with 10, sequential
("plain") and forked, on one node of a cluster, shipped to its SFTP store meanwhile. A round runs the program
once without checkpoints, once in each way, and once more without; a run's ratio is its time over the mean of the
two without in its round, and "noise" is the second of these over the first. The work of a program is repeated
until a run lasts as long as asked for.

On a machine with other work a run's time says little; "CPU ratio" is then of more use: the time that the program
computed for, and its pauses, over the time that it computes for alone.

The notes hold the medians of the ratios of forked checkpoints, lu {checkpoints: ratio} and matmul and cellular
{size: ratio}, and noise, what ratio the runs without checkpoints have to each other. --plot draws them beside
what the papers measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ci.bench import Bed, Bench
from ci.bench._overhead_plot import draw, require

ROUNDS = 5

_PROGRAM = Path(__file__).parent / "programs" / "overhead.py"
_PROBE_SECONDS = 3.0


@dataclass(frozen=True)
class _Case:
    """One program of one size, with so many checkpoints a run."""

    program: str
    size: int
    checkpoints: tuple[int, ...]
    probe_steps: int

    @property
    def name(self) -> str:
        return f"{self.program} {self.size}"


# LU's image is about 1.3 MB at order 400, as the paper's was.
_CASES = (
    _Case("lu", 400, (3, 6), 20),
    _Case("matmul", 500, (10,), 8),
    _Case("matmul", 615, (10,), 4),
    _Case("matmul", 1020, (10,), 2),
    _Case("matmul", 1500, (10,), 1),
    _Case("cellular", 1024, (10,), 100),
    _Case("cellular", 2048, (10,), 25),
)


def options(parser: argparse.ArgumentParser) -> None:
    """Add what to measure."""
    names = [f"{case.program}-{case.size}" for case in _CASES]
    parser.add_argument(
        "--cases",
        type=lambda text: [_case(word) for word in text.split(",")],
        default=list(_CASES),
        metavar="CASE,...",
        help=f"of {', '.join(names)}; all of them unless given",
    )
    parser.add_argument(
        "--modes",
        type=lambda text: text.split(","),
        default=["plain", "forked"],
        metavar="MODE,...",
        help="of plain (sequential) and forked; both unless given",
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long a run lasts: %(default)g")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the ratios beside the papers'")


def _case(text: str) -> _Case:
    for case in _CASES:
        if text == f"{case.program}-{case.size}":
            return case
    raise argparse.ArgumentTypeError(f"{text}: no such case")


def run(bench: Bench) -> None:
    """Measure."""
    ratios: dict[str, dict[str, float]] = {}
    noise: dict[str, float] = {}
    if bench.options.plot is not None:
        require()
    with bench.testbed() as bed:
        bed.give(_PROGRAM, "overhead.py")
        bed.programs()
        for case in bench.options.cases:
            noise[case.name] = _measure(bench, bed, case, ratios)
    for program, found in ratios.items():
        bench.note(program, found)
    bench.note("noise", noise)
    if bench.options.plot is not None:
        draw(bench.options.plot, ratios, noise)


def _measure(bench: Bench, bed: Bed, case: _Case, ratios: dict[str, dict[str, float]]) -> float:
    probe = _once(bed, case, case.probe_steps, "none", 0, _PROBE_SECONDS)["seconds"]
    steps = max(1, round(case.probe_steps * bench.options.seconds / probe))
    expected = probe / case.probe_steps * steps
    bench.say(f"{case.name}: {steps} steps, about {expected:.0f} s a run")
    ways = [(mode, count) for count in case.checkpoints for mode in bench.options.modes]
    found: dict[tuple[str, int], list[float]] = {}
    noise: list[float] = []
    for number in range(bench.round_count):
        bench.say(f"{case.name}: round {number + 1} of {bench.round_count}")
        before = _once(bed, case, steps, "none", 0, expected)
        expected = first = float(before["seconds"])
        told: dict[tuple[str, int], dict[str, Any]] = {}
        for mode, count in ways if number % 2 == 0 else reversed(ways):
            told[mode, count] = _once(bed, case, steps, mode, count, expected)
        after = _once(bed, case, steps, "none", 0, expected)
        last = float(after["seconds"])
        alone = (first + last) / 2
        computed = (before["cpu_seconds"] + after["cpu_seconds"]) / 2
        noise.append(last / first)
        bench.add("none", f"{case.name}, run", alone, "s")
        bench.add("none", f"{case.name}, ratio", last / first, "")
        for (mode, count), answer in told.items():
            variant, ratio = f"{mode}, {count} checkpoints", answer["seconds"] / alone
            found.setdefault((mode, count), []).append(ratio)
            bench.add(variant, f"{case.name}, run", answer["seconds"], "s")
            bench.add(variant, f"{case.name}, ratio", ratio, "")
            worked = answer["cpu_seconds"] + sum(answer["pauses_ms"]) / 1e3
            bench.add(variant, f"{case.name}, CPU ratio", worked / computed, "")
            bench.add(variant, f"{case.name}, pause", statistics.median(answer["pauses_ms"]), "ms")
            bench.add(variant, f"{case.name}, shipped", answer["shipped_bytes"] / 1e6, "MB")
            bench.add(variant, f"{case.name}, manager's CPU", answer["manager_cpu_seconds"], "s")
    for (mode, count), values in found.items():
        if mode == "forked":
            key = str(count) if case.program == "lu" else str(case.size)
            ratios.setdefault(case.program, {})[key] = round(statistics.median(values), 4)
    return round(statistics.median(noise), 4)


def _once(
    bed: Bed, case: _Case, steps: int, mode: str, checkpoints: int, expected: float
) -> dict[str, float]:
    home = "/shared/alice"
    command = ["python3", "-W", "ignore", f"{home}/overhead.py", mode, str(checkpoints), str(expected)]
    work = [f"{home}/{case.program}", str(case.size), str(steps)]
    answer: dict[str, Any] = json.loads(
        bed.output("n1", [*command, *work], root=True, within=120 + 10 * expected)
    )
    return answer
