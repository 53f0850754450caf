"""Measure Outlast on a cluster of its own, on this machine."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

from ci.bench import Bench, end_on_signals
from ci.bench._frame import table
from ci.testbed.layout import TestbedError


class Benchmark(Protocol):
    """A module of this package; see the package's docstring."""

    __doc__: str
    ROUNDS: int
    run: Callable[[Bench], None]


def _names() -> list[str]:
    found = pkgutil.iter_modules([str(Path(__file__).parent)])
    return sorted(one.name for one in found if not one.name.startswith("_"))


def _load(name: str) -> Benchmark:
    return cast(Benchmark, importlib.import_module(f"ci.bench.{name}"))


def _list() -> None:
    width = max(map(len, _names()))
    for name in _names():
        print(f"{name:<{width}}  {_load(name).__doc__.splitlines()[0]}")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("there must be one round at least")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench",
        description=__doc__,
        epilog="'bench NAME --help' shows a benchmark's own options. Ends with 0 if all that must hold did.",
    )
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    names = parser.add_subparsers(dest="name", metavar="NAME")
    for name in _names():
        module = _load(name)
        text = module.__doc__
        sub = names.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
        sub.add_argument(
            "--rounds", type=_count, default=module.ROUNDS, metavar="N", help="default: %(default)s"
        )
        options = getattr(module, "options", None)
        if options is not None:
            options(sub)
    return parser


def _print(bench: Bench) -> None:
    facts = bench.machine
    print(
        f"{facts['cores']} cores of {facts['cpu']}, {int(str(facts['memory_bytes'])) / 2**30:.0f} GiB; "
        f"Linux {facts['kernel']}"
        + "".join(f"; {word} {facts[key]}" for key, word in _VERSIONS.items() if key in facts)
    )
    for line in table(bench.rows()):
        print(line)
    for name, fact in bench.notes.items():
        print(f"{name}: {json.dumps(fact)}")
    for problem in bench.problems:
        print(f"did not hold: {problem}")


_VERSIONS = {"criu": "CRIU", "slurm": "Slurm", "outlast": "Outlast"}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of scripts/bench; returns its exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list:
        _list()
        return 0
    if options.name is None:
        parser.error("which one? 'bench --list' shows what there is")
    end_on_signals()
    name, rounds, as_json = options.name, options.rounds, options.json
    for frame in ("list", "name", "rounds", "json"):
        delattr(options, frame)
    bench = Bench(name, rounds, options)
    interrupted = False
    try:
        _load(name).run(bench)
    except TestbedError as error:
        bench.problem(str(error))
        if error.hint:
            bench.say(error.hint)
    except KeyboardInterrupt:
        interrupted = True
        bench.problem("interrupted")
    if as_json:
        print(json.dumps(bench.as_json()))
    else:
        _print(bench)
    return 130 if interrupted else 1 if bench.problems else 0


if __name__ == "__main__":
    sys.exit(main())
