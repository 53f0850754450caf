"""The demonstration's own figures: pauses, bytes shipped, and the time from a dead node to a running job.

Each round is one job as in scripts/demo, whose node is killed after its second checkpoint, and takes about
45 seconds. A round whose job does not end as an uninterrupted one would is a problem.
"""

from __future__ import annotations

from ci.bench import Bench
from ci.demo import chain

ROUNDS = 3


def run(bench: Bench) -> None:
    """Measure."""
    with bench.testbed() as bed:
        expected = chain.reference(bed)
        for variant in bench.rounds("default"):
            outcome = chain.run(bed, expected, lambda _, what, text: bench.say(f"  {what:<14} {text}"))
            for problem in outcome.problems:
                bench.problem(f"job {outcome.job_id}: {problem}")
            for one in outcome.of("checkpoint"):
                bench.add(variant, "pause", one["pause_ms"], "ms")
                bench.add(variant, "image", one["image_bytes"], "bytes")
                bench.add(variant, "shipped", one["stored_bytes"], "bytes")
                bench.add(variant, "time to ship", one["ship_s"], "s")
            for one in outcome.of("restored"):
                bench.add(variant, "time to fetch", one["fetch_s"], "s")
                bench.add(variant, "time to restore", one["restore_s"], "s")
            if outcome.kill_to_known_dead is not None:
                bench.add(variant, "kill to known dead", outcome.kill_to_known_dead, "s")
            if outcome.kill_to_running is not None:
                bench.add(variant, "kill to running", outcome.kill_to_running, "s")
            bed.start_nodes()
