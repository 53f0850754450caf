"""Outlast's store beside ssh cat, restic, borg and rsync: images of real programs, one sshd, in turns.

Four programs are dumped by CRIU on a node of a cluster, three times each. Then every tool ships the first
dump and the two that follow, and brings the last one back; tools take turns, all of them over SSH with the
same cipher to the same sshd on loopback, whose directory is on tmpfs. At last all is done once more at a round
trip of 20 ms. Outlast is connected as the manager of a job is, once for all checkpoints; the other tools connect
for each, so "outlast+connect" has that time added. Takes about 15 minutes, in parts with --programs, and 4 GB of
memory. Needs restic, borgbackup and rsync, as Debian has them.

The ratios are Outlast's median divided by the other's, for each program; in "notes" of the JSON object stand
their medians over the programs, and the load of the machine in the meantime.
"""

from __future__ import annotations

import argparse
import filecmp
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ci.bench import CHECKOUT, Bench, end_on_signals
from ci.bench import _store_images as images
from ci.bench import _store_server as servers
from ci.bench import _store_tools as tools

ROUNDS = 3
_NOISE = "noise"
_NOISE_SIZE = 256 << 20
_ALL = (*images.PROGRAMS, _NOISE)
_VARIANTS = ("ssh cat", "restic", "borg", "rsync", "outlast")
_CONNECTED = "outlast+connect"

# What is to be reached: at most, but for the last, which is at least.
_TARGETS = {
    "following_bytes_vs_changed_pages": 1.05,
    "following_bytes_vs_restic": 0.40,
    "following_time_vs_restic": 0.15,
    "first_time_vs_restic": 0.30,
    "restore_time_vs_restic": 0.40,
    "incompressible_mbps_vs_sshcat": 0.70,
}


def options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's own options."""
    parser.add_argument("--images", type=Path, help="dumps of an earlier run, instead of new ones")
    parser.add_argument("--keep-images", type=Path, help="leave the dumps in this directory, for --images")
    parser.add_argument(
        "--programs",
        type=_programs,
        default=_ALL,
        metavar="NAME,...",
        help=f"only these of {', '.join(_ALL)}: a long run in parts, with the same --images",
    )
    parser.add_argument("--transport", default="auto", help="Outlast's: auto, openssh or paramiko")
    parser.add_argument("--python", help="the Python for Outlast; default: one made as that of the tests is")
    parser.add_argument("--round-trip", type=float, default=20.0, metavar="MS", help="0 leaves that part out")
    parser.add_argument("--delayed-rounds", type=int, default=1, metavar="N", help="rounds at --round-trip")


def _programs(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in _ALL]:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: not one of {', '.join(_ALL)}")
    return names


def run(bench: Bench) -> None:
    """Measure."""
    bench.note("versions", tools.versions())
    given = bench.options
    python = given.python or _python()
    before = os.getloadavg()
    try:
        with tempfile.TemporaryDirectory(prefix="outlast-bench-", dir="/dev/shm") as name:
            home = Path(name)
            _get_images(bench, home / "images")
            if _NOISE in given.programs:
                images.noise(home / "images" / _NOISE / "1", _NOISE_SIZE)
            with servers.start(home) as server:
                _near(bench, home, server, python)
                if given.round_trip and given.delayed_rounds:
                    with server.delayed(given.round_trip / 1000) as far:
                        _far(bench, home, far, python)
    finally:
        _conclude(bench, before)


def _conclude(bench: Bench, before: tuple[float, float, float]) -> None:
    """Keep what follows from the figures, those of a run that was interrupted too."""
    bench.note("load", {"before": before, "after": os.getloadavg()})
    bench.note("targets", _TARGETS)
    bench.note("ratios", _ratios(bench))
    bench.note("ratios_by_program", _by_program(bench, ""))
    bench.note("ratios_by_program_at_round_trip", _by_program(bench, "far "))
    for ratio, value in _ratios(bench).items():
        bench.say(f"{ratio}: {value:.3f}, wanted {_TARGETS[ratio]:.2f}")


def _get_images(bench: Bench, into: Path) -> None:
    given = bench.options
    if given.images:
        shutil.copytree(given.images, into)
    else:
        with bench.testbed() as bed:
            images.dump(bed, into, bench.say)
        # The cluster's end is not to be interrupted; what follows is.
        end_on_signals()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if given.keep_images:
        shutil.copytree(into, given.keep_images, dirs_exist_ok=True)


def _near(bench: Bench, home: Path, server: servers.Server, python: str) -> None:
    for program in bench.options.programs:
        for variant in bench.rounds(*(("ssh cat", "outlast") if program == _NOISE else _VARIANTS)):
            _measure(bench, home, server, python, variant, program, "")


def _far(bench: Bench, home: Path, server: servers.Server, python: str) -> None:
    for program in (name for name in bench.options.programs if name != _NOISE):
        for number in range(bench.options.delayed_rounds):
            for variant in _VARIANTS if number % 2 == 0 else _VARIANTS[::-1]:
                bench.say(f"at a round trip of {bench.options.round_trip:g} ms: {program}: {variant}")
                _measure(bench, home, server, python, variant, program, "far ")


def _measure(
    bench: Bench, home: Path, server: servers.Server, python: str, variant: str, program: str, where: str
) -> None:
    dumps = sorted((home / "images" / program).iterdir(), key=lambda path: int(path.name))
    shown = home / "work" / program  # every dump under the same path, as a job's checkpoints have it
    sizes = [images.size_of(dump) for dump in dumps]
    store = server.directory / "store"
    connecting = None
    with tools.make(variant, server, store, python, bench.options.transport) as tool:
        if isinstance(tool, tools.Outlast):
            connecting = tool.connect()
            bench.add(variant, f"{where}connect", connecting, "s")

        def keep(what: str, size: int, step: Callable[[], tools.Step], *, ships: bool) -> None:
            on_server = server.cpu_seconds()
            took = step()
            name = f"{where}{program} {what}"
            bench.add(variant, f"{name} time", took.seconds, "s")
            if connecting is not None:
                bench.add(_CONNECTED, f"{name} time", took.seconds + connecting, "s")
            bench.add(variant, f"{name} rate", size / took.seconds / 1e6, "MB/s of image")
            bench.add(variant, f"{name} cpu", took.cpu, "s")
            bench.add(variant, f"{name} server cpu", server.cpu_seconds() - on_server, "s")
            if ships:
                bench.add(variant, f"{name} bytes", took.shipped, "bytes")

        for number, dump in enumerate(dumps, 1):
            shutil.rmtree(shown, ignore_errors=True)
            shutil.copytree(dump, shown, copy_function=os.link)
            what = "first" if number == 1 else "following"
            keep(what, sizes[number - 1], lambda number=number: tool.save(shown, number), ships=True)  # type: ignore[misc]
        into = home / "restored"
        keep("restore", sizes[-1], lambda: tool.restore(len(dumps), into), ships=False)
        if isinstance(tool, tools.Outlast):
            bench.add(variant, f"{where}{program} anonymous memory", tool.anonymous, "bytes")
            for old, new in itertools.pairwise(dumps if not where else []):
                changed = tool.changed(old, new)
                bench.add("changed pages", f"{program} following bytes", changed, "bytes")
        if variant != "ssh cat" and not _same(dumps[-1], into, program):
            bench.problem(f"{variant}: {program}: what came back is not what was shipped")
    shutil.rmtree(into, ignore_errors=True)
    shutil.rmtree(shown)


def _same(wanted: Path, found: Path, program: str) -> bool:
    """Whether the files of *wanted* are in *found*, or in the directory *program* somewhere below it."""
    if not (found / next(wanted.iterdir()).name).exists():
        found = next(found.rglob(f"work/{program}"), found)
    names = [path.name for path in wanted.iterdir()]
    return filecmp.cmpfiles(wanted, found, names, shallow=False)[0] == names


def _by_program(bench: Bench, where: str) -> dict[str, dict[str, float]]:
    medians = {(row.variant, row.quantity): row.median for row in bench.rows()}

    def ratio(quantity: str, other: str, variant: str = "outlast") -> dict[str, float]:
        pairs = {
            program: (
                medians.get((variant, f"{where}{program} {quantity}")),
                medians.get((other, f"{where}{program} {quantity}")),
            )
            for program in (*images.PROGRAMS, _NOISE)
        }
        return {program: ours / theirs for program, (ours, theirs) in pairs.items() if ours and theirs}

    found = {}
    for peer in _VARIANTS[:-1]:
        word = peer.replace(" ", "")
        for quantity in ("first", "following", "restore"):
            found[f"{quantity}_time_vs_{word}"] = ratio(f"{quantity} time", peer)
            found[f"{quantity}_time_with_connect_vs_{word}"] = ratio(f"{quantity} time", peer, _CONNECTED)
        found[f"following_bytes_vs_{word}"] = ratio("following bytes", peer)
    found["following_bytes_vs_changed_pages"] = ratio("following bytes", "changed pages")
    found["incompressible_mbps_vs_sshcat"] = {
        program: value for program, value in ratio("first rate", "ssh cat").items() if program == _NOISE
    }
    return {name: values for name, values in found.items() if values}


def _ratios(bench: Bench) -> dict[str, float]:
    by_program = _by_program(bench, "")
    return {name: statistics.median(by_program[name].values()) for name in _TARGETS if name in by_program}


def _python() -> str:
    """Return a Python that has what Outlast needs, in the environment that scripts/test makes."""
    made: Sequence[str] = subprocess.check_output(["bash", CHECKOUT / "ci/venv.sh"], text=True).splitlines()
    return f"{made[-1]}/bin/python"
