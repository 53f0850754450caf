"""How long a job stands still for a checkpoint, as it sees it itself: plain to tmpfs and to disk, and forked.

Beside the pauses there is what bounds the forked one from below: what fork() of the same processes takes, and
CRIU's dump of as many processes without memory ("metadata"). The notes hold the ratios of the medians:
plain_over_forked (plain to tmpfs) and pause_over_limit (forked over the sum of the two bounds), by kind of
pages and MiB, and for trees by the number of processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from ci.bench import Bed, Bench

ROUNDS = 5

_PROGRAMS = Path(__file__).parent / "programs"
_TREE_MIB = 512
_SECONDS = 900.0


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def options(parser: argparse.ArgumentParser) -> None:
    """Add what to measure."""
    parser.add_argument("--sizes", type=_numbers, default=[64, 256, 1024, 4096], metavar="MIB,...")
    parser.add_argument("--pages", choices=("4k", "thp", "both"), default="both")
    parser.add_argument("--trees", type=_numbers, default=[16, 64], metavar="PROCESSES,...")


def run(bench: Bench) -> None:
    """Measure."""
    over_forked: dict[str, dict[str, float]] = {}
    over_limit: dict[str, dict[str, float]] = {}
    kinds = [kind for kind in ("4k", "thp") if bench.options.pages in (kind, "both")]
    with bench.testbed() as bed:
        for name in ("pausing.c", "pausing.py"):
            bed.give(_PROGRAMS / name, name)
        bed.output("n1", ["gcc", "-O2", "-Wall", "-Werror", "-o", "pausing", "pausing.c"])
        for kind in kinds:
            for mib in bench.options.sizes:
                found = _measure(bench, bed, f"{mib} MiB, {kind}", mib, kind == "thp", 1)
                _put(over_forked, over_limit, kind, str(mib), found)
        for processes in bench.options.trees:
            each = _TREE_MIB // processes
            found = _measure(bench, bed, f"{processes} processes of {each} MiB", each, False, processes)
            _put(over_forked, over_limit, "tree", str(processes), found)
    bench.note("plain_over_forked", over_forked)
    bench.note("pause_over_limit", over_limit)


def _measure(
    bench: Bench, bed: Bed, what: str, mib: int, huge: bool, processes: int
) -> dict[str, list[float]]:
    bench.say(what)
    home = "/shared/alice"
    numbers = map(str, (mib, int(huge), processes, bench.round_count))
    command = ["python3", "-W", "ignore", f"{home}/pausing.py", f"{home}/pausing", *numbers]
    found: dict[str, list[float]] = json.loads(bed.output("n1", command, root=True, within=_SECONDS))
    for variant, values in found.items():
        for value in values:
            bench.add(variant, what, value, "ms")
    return found


def _put(
    over_forked: dict[str, dict[str, float]],
    over_limit: dict[str, dict[str, float]],
    kind: str,
    size: str,
    found: dict[str, list[float]],
) -> None:
    median = {variant: statistics.median(values) for variant, values in found.items()}
    limit = median["fork()"] + median["metadata"]
    over_forked.setdefault(kind, {})[size] = round(median["plain, tmpfs"] / median["forked"], 2)
    over_limit.setdefault(kind, {})[size] = round(median["forked"] / limit, 3)
