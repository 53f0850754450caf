"""From the power cut of a node to the job computing elsewhere, phase by phase, with the watcher and without.

Each round is one small job whose node is killed between two checkpoints; it takes about half a minute. Without
the watcher means that its process stands still: what is left is Slurm, with the testbed's short timeouts. Phases,
all in seconds since the kill: "known" (the node is marked down), "requeued" (the job is pending again), "started"
(Slurm runs it on another node), "restored" (the job's processes are back), "first line" (of new output).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from ci.bench import Bed, Bench
from ci.testbed.layout import TestbedError

ROUNDS = 10

_INTERVAL = 3
_WITHIN = 90.0
# Prints when and where each line was written; nothing else can tell a restored job's first line.
_JOB = """#!/bin/bash
i=0
while :; do echo "$i $(date +%s.%N) $(hostname)"; i=$((i+1)); sleep 0.05; done
"""
_PHASES = ("known", "requeued", "started", "restored", "first line")


def run(bench: Bench) -> None:
    """Measure."""
    with bench.testbed() as bed:
        script = bed.home / "recovery.sh"
        script.write_text(_JOB)
        for variant in bench.rounds("with the watcher", "without"):
            phases = _recover(bench, bed, watched=variant != "without")
            bed.start_nodes()
            for name in _PHASES:
                bench.add(variant, name, phases[name], "s")
        _sum_up(bench)


def _recover(bench: Bench, bed: Bed, *, watched: bool) -> dict[str, float]:
    """Have one job lose its node; return its phases."""
    watcher = bed.output("ctl", ["pgrep", "-f", "outlast watcher"], root=True).split()
    words = bed.output("ctl", ["sbatch", f"--checkpoint={_INTERVAL}s", "-o", "%j.out", "recovery.sh"]).split()
    job_id = words[-1]
    out = bed.home / f"{job_id}.out"
    _await(lambda: "checkpoint" in _events(bed, job_id), "the first checkpoint")
    # Later by a part of the interval that differs from round to round.
    time.sleep(0.3 * (int(job_id) % 7))
    node = bed.output("ctl", ["squeue", "-h", "-j", job_id, "-o", "%N"]).strip()
    if {where for _, _, where in _lines(out)} != {node}:
        bench.say(f"job {job_id}: Slurm had it start twice, as it does on a node that came back; once more")
        bed.output("ctl", ["scancel", job_id])
        bed.start_nodes()
        return _recover(bench, bed, watched=watched)
    if not watched:
        bed.output("ctl", ["kill", "-STOP", *watcher], root=True)
    begin = time.time()
    bed.kill_node(node)
    phases: dict[str, float] = {}

    def back() -> bool:
        state, _, where = (
            bed.output("ctl", ["squeue", "-h", "-j", job_id, "-o", "%T %N"]).strip().partition(" ")
        )
        if state != "RUNNING":
            phases.setdefault("requeued", time.time() - begin)
        elif where != node:
            phases.setdefault("started", time.time() - begin)
        return _first_line(out, node, begin) is not None

    try:
        _await(back, "the job's first line on another node")
    finally:
        if not watched:
            bed.output("ctl", ["kill", "-CONT", *watcher], root=True)
    first = _first_line(out, node, begin)
    assert first is not None  # noqa: S101 - it was just waited for
    phases["first line"] = first - begin
    _await(lambda: "restored" in _events(bed, job_id), "the event of the restore")
    events = _events(bed, job_id)
    phases["restored"] = events["restored"] - begin
    # Slurm by itself has a node down and its jobs queued again in one step.
    phases["known"] = (
        events["node-marked-down"] - begin if "node-marked-down" in events else phases["requeued"]
    )
    phases.setdefault("started", phases["restored"])
    phases["requeued"] = max(phases["requeued"], phases["known"])
    if min(events["restored"], events.get("node-marked-down", begin)) < begin:
        bench.problem(f"job {job_id}: was lost before its node was")
    if not _in_order(out):
        bench.problem(f"job {job_id}: its output has lines twice or not at all")
    bed.run("ctl", ["scancel", job_id])
    return phases


def _events(bed: Bed, job_id: str) -> dict[str, float]:
    """When each event of the job came first."""
    done = bed.run("ctl", ["outlast", "events", job_id, "--json"])
    events = json.loads(done.stdout)["events"] if done.returncode == 0 else []
    return {one["event"]: one["time"] for one in reversed(events)}


def _lines(out: Path) -> list[list[str]]:
    lines = [line.split() for line in out.read_text(errors="replace").splitlines()]
    return [line for line in lines if len(line) == 3 and line[0].isdecimal()]


def _first_line(out: Path, lost: str, since: float) -> float | None:
    times = (float(when) for _, when, where in _lines(out) if where != lost)
    return next((when for when in times if when > since), None)


def _in_order(out: Path) -> bool:
    numbers = [int(number) for number, _, _ in _lines(out)]
    return numbers == list(range(len(numbers)))


def _await(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + _WITHIN
    while not condition():
        if time.monotonic() > until:
            raise TestbedError(f"{what}: not there after {_WITHIN:g} s")
        time.sleep(0.05)


def _sum_up(bench: Bench) -> None:
    """Keep the figures that are asked for most under plain names."""
    rows = {(row.variant, row.quantity): row for row in bench.rows()}
    ours, alone = rows["with the watcher", "first line"], rows["without", "first line"]
    bench.note("median_s", round(ours.median, 2))
    bench.note("max_s", round(max(ours.values), 2))
    bench.note("without_watcher_median_s", round(statistics.median(alone.values), 2))
    bench.note("phases", {name: round(rows["with the watcher", name].median, 2) for name in _PHASES})
