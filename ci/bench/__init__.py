"""Benchmarks: `scripts/bench NAME` runs the module NAME of this package.

A benchmark called `store` is the file ci/bench/store.py, and nothing else has to know of it; files with an
underscore first are the frame's. It has:

    '''One sentence: what is measured.'''        # the module's docstring; --list and --help show it

    ROUNDS = 5                                   # how often each variant is measured unless --rounds says so

    def options(parser: argparse.ArgumentParser) -> None:
        '''Add its own options.'''               # may be left out

    def run(bench: Bench) -> None:
        '''Measure.'''
        with bench.testbed() as bed:             # a cluster of its own, gone afterwards; see Bed
            bed.programs()                       # ./lu, ./matmul and ./cellular in alice's home
            for variant in bench.rounds("plain", "checkpointed"):
                begin = time.monotonic()
                bed.output("n1", [...])
                bench.add(variant, "run", time.monotonic() - begin, "s")

`Bench.rounds` gives each variant once a round, in turns forwards and backwards, so that a machine that gets
slower or warmer wrongs none of them. `Bench.add` keeps one value; the table and the JSON object have the
median, min, max and n of each variant and quantity, in the order of their first value, and, where there are
several variants, the median's ratio to that of the first. `Bench.options` has the parsed options.
`Bench.problem` says that something that must hold did not; the benchmark then ends with 1 and its figures are
not to be trusted. TestbedError does the same, at once. `Bench.note` keeps a fact for the JSON object's
"notes".

The JSON object: bench, ok, rounds, options, machine (cores, cpu, memory_bytes, kernel, and with a testbed
criu, slurm, outlast), results (a list of variant, quantity, unit, median, min, max, n, values), notes,
problems.

The standard library only; bounded waits only; figures from what was measured only.
"""

from ci.bench._bed import CHECKOUT, NODES, Bed, end_on_signals, testbed, testbed_command
from ci.bench._frame import Bench, Row

__all__ = ["CHECKOUT", "NODES", "Bed", "Bench", "Row", "end_on_signals", "testbed", "testbed_command"]
