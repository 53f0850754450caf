"""How soon a job runs on another node: everything fetched first and then CRIU's restore, against post-copy.

Jobs of some sizes, with memory that cannot be compressed, are dumped on one node into the SFTP store and lost.
Another node restores each in turns, with the product's own launcher. Time counts from the moment when the job may
go on there to its first instruction. What comes before that is not in it: that a node is found dead and the scheduler
starts the job elsewhere (the benchmark recovery), and what the manager does meanwhile, which is shown apart: it
connects to the store, and for post-copy fetches what the job needs first. When the job may go on it reads again what
that is. The notes hold, by MiB, fetch_all_over_post_copy (of the medians) and first_instruction_ms (by post-copy).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from ci.bench import Bench

ROUNDS = 3

_PROGRAM = Path(__file__).parent / "programs" / "restoring.py"
_SECONDS = 900.0


def options(parser: argparse.ArgumentParser) -> None:
    """Add what to measure."""
    parser.add_argument(
        "--sizes",
        type=lambda text: [int(word) for word in text.split(",")],
        default=[256, 1024, 4096],
        metavar="MIB,...",
    )


def run(bench: Bench) -> None:
    """Measure."""
    ratios: dict[str, float] = {}
    first: dict[str, float] = {}
    with bench.testbed() as bed:
        bed.give(_PROGRAM, "restoring.py")
        program = ["python3", "-W", "ignore", "/shared/alice/restoring.py"]
        for mib in bench.options.sizes:
            bench.say(f"{mib} MiB")
            bed.output("n1", [*program, "make", str(mib)], root=True, within=_SECONDS)
            rounds = str(bench.round_count)
            said = bed.output("n2", [*program, "measure", str(mib), rounds], root=True, within=_SECONDS)
            found = json.loads(said)
            for variant, rows in found.items():
                for row in rows:
                    bench.add(variant, f"first instruction, {mib} MiB", row["first"], "ms")
                    bench.add(
                        variant, f"connecting and what is fetched ahead, {mib} MiB", row["connect"], "ms"
                    )
                    bench.add(variant, f"fetched before it, {mib} MiB", row["fetch"], "ms")
                    bench.add(variant, f"all memory there, {mib} MiB", row["whole"], "ms")
            medians = {name: statistics.median(row["first"] for row in rows) for name, rows in found.items()}
            ratios[str(mib)] = round(medians["fetch-all"] / medians["post-copy"], 2)
            first[str(mib)] = round(medians["post-copy"], 1)
    bench.note("fetch_all_over_post_copy", ratios)
    bench.note("first_instruction_ms", first)
