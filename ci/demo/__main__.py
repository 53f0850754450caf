"""A job under checkpoints, its node killed, the right result elsewhere: in a minute, on a cluster of its own.

The cluster is a real Slurm in namespaces of this machine; all that it needs is installed or made at the first
run, which takes some minutes more. Ends with 0 only if all of it held: the job was restored on another node,
its result is that of an uninterrupted run, and its output has every line exactly once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import TextIO

from ci.bench import Bed, end_on_signals, testbed, testbed_command
from ci.demo import chain
from ci.demo.chain import Outcome, megabytes
from ci.testbed.layout import TestbedError

_JSON = """\
--json: the object has ok, job_id, nodes (in order), checkpoints (their number), pause_ms, image_bytes and
shipped_bytes (lists, one value a checkpoint), kill_to_known_dead_s, kill_to_running_s (from the kill to the
first line of output that was computed elsewhere), fetch_s, restore_s, lines_set_back (written after the
checkpoint, cut off at the restore and computed again), lines_lost, lines_doubled, result_matches, exit_code
(the job's, as Slurm has it), and problems (sentences). What was not seen is null."""


class Screen:
    """Where the timeline goes: in colors if somebody looks."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        plain = not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") in (None, "dumb")
        self._colors = {} if plain else {"bad": "31", "good": "32", "what": "36", "dim": "2", "head": "1"}
        self._begin: float | None = None

    def say(self, text: str = "", kind: str = "") -> None:
        """Print a line."""
        print(self._paint(text, kind), file=self._stream, flush=True)

    def tell(self, moment: float, what: str, text: str) -> None:
        """Print what happened, with the seconds since the first thing that did."""
        if self._begin is None:
            self._begin = moment
        seconds = self._paint(f"{moment - self._begin:6.1f} s", "dim")
        bad = what in ("node killed", "known dead") or "fail" in what or "unreachable" in what
        kind = "bad" if bad else "good" if what in ("restored", "new output", "result") else "what"
        self.say(f"{seconds}  {self._paint(f'{what:<14}', kind)} {text}")

    def _paint(self, text: str, kind: str) -> str:
        color = self._colors.get(kind)
        return f"\x1b[{color}m{text}\x1b[0m" if color else text


def _figures(outcome: Outcome) -> dict[str, object]:
    """The outcome as the object that --json prints."""
    checkpoints = outcome.of("checkpoint")
    restored = outcome.of("restored")
    compared = outcome.comparison
    return {
        "ok": not outcome.problems,
        "job_id": outcome.job_id or None,
        "nodes": outcome.nodes,
        "checkpoints": len(checkpoints),
        "pause_ms": [one["pause_ms"] for one in checkpoints],
        "image_bytes": [one["image_bytes"] for one in checkpoints],
        "shipped_bytes": [one["stored_bytes"] for one in checkpoints],
        "kill_to_known_dead_s": _rounded(outcome.kill_to_known_dead),
        "kill_to_running_s": _rounded(outcome.kill_to_running),
        "fetch_s": restored[0]["fetch_s"] if restored else None,
        "restore_s": restored[0]["restore_s"] if restored else None,
        "lines_set_back": outcome.set_back,
        "lines_lost": compared.lost if compared else None,
        "lines_doubled": compared.doubled if compared else None,
        "result_matches": compared.result_matches if compared else None,
        "exit_code": outcome.exit_code,
        "problems": outcome.problems,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _report(screen: Screen, outcome: Outcome) -> None:
    """Say whether it held, and print the figures."""
    compared = outcome.comparison
    screen.say()
    if outcome.problems or compared is None:
        screen.say("What did not hold:", "bad")
        for problem in outcome.problems:
            screen.say(f"  {problem}")
    else:
        screen.say("The job outlasted its node:", "good")
        screen.say(f"  result          {compared.result!r}, as in an uninterrupted run")
        screen.say(f"  output          {compared.lines} progress lines, each exactly once, in order")
        if outcome.set_back:
            lines = "1 line" if outcome.set_back == 1 else f"{outcome.set_back} lines"
            screen.say(
                f"                  ({lines} written after the checkpoint set back and computed again)"
            )
    checkpoints = outcome.of("checkpoint")
    if pauses := [one["pause_ms"] for one in checkpoints]:
        screen.say()
        screen.say("Figures:", "head")
        each = ", ".join(f"{pause:.0f}" for pause in pauses)
        screen.say(f"  pause           {statistics.median(pauses):.0f} ms (median of {each})")
        shipped = sum(one["stored_bytes"] for one in checkpoints)
        image = sum(one["image_bytes"] for one in checkpoints)
        screen.say(
            f"  shipped         {megabytes(shipped)} for {len(pauses)} checkpoints of {megabytes(image)}"
        )
    if (seconds := outcome.kill_to_running) is not None:
        screen.say(
            f"  dead to alive   {seconds:.1f} s from the kill to the first new line of output, of which"
        )
        for part, seconds in outcome.parts():
            screen.say(f"    {seconds:9.2f} s   {part}")


def _keep_logs(screen: Screen, bed: Bed) -> None:
    """Write all logs to a file that outlives the cluster, and show the ends of those that tell most."""
    handle, name = tempfile.mkstemp(prefix="outlast-demo-", suffix=".log")
    with open(handle, "w") as file:  # noqa: PTH123 - opens a descriptor
        file.writelines(line + "\n" for line in bed.logs())
    screen.say()
    screen.say(f"The hosts' logs are kept in {name}; the ends of Outlast's own:", "head")
    for line in bed.logs(last=8):
        file_name = line.split(":", 1)[0].split()[-1]
        if file_name == "watcher.log" or file_name.removesuffix(".log").isdigit():
            screen.say(f"  {line}")


def _show_around(screen: Screen, bed: Bed, outcome: Outcome) -> None:
    command = testbed_command(bed.state)
    screen.say()
    screen.say("The cluster is still up. To look around:", "head")
    for words in (
        f"user ctl outlast events {outcome.job_id}",
        f"user ctl outlast list {outcome.job_id}",
        "user ctl sbatch --checkpoint=5s lu.sh",
        "user ctl outlast status",
        "user ctl bash",
        *(f"start-node {node}" for node in outcome.nodes[:1] if outcome.killed),
        "logs",
    ):
        screen.say(f"  {command} {words}")
    screen.say("To end it:", "head")
    screen.say(f"  {command} down")


def _demo(screen: Screen, *, keep: bool) -> Outcome:
    screen.say("A Slurm cluster of a controller, a checkpoint store and three nodes:", "head")
    with testbed("demo") as bed:
        try:
            expected = chain.reference(bed)
            screen.say(
                f"The job: {chain.SWEEPS} LU factorizations, a line each. It knows nothing of checkpoints."
            )
            screen.say()
            outcome = chain.run(bed, expected, screen.tell)
        except TestbedError:
            _keep_logs(screen, bed)
            raise
        _report(screen, outcome)
        if outcome.problems:
            _keep_logs(screen, bed)
        if keep:
            bed.keep = True
            _show_around(screen, bed, outcome)
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of scripts/demo; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="demo", description=__doc__, epilog=_JSON, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", action="store_true", help="leave the cluster up, to look around in it")
    parser.add_argument(
        "--json", action="store_true", help="end with one JSON object; the rest goes to stderr"
    )
    args = parser.parse_args(argv)
    end_on_signals()
    screen = Screen(sys.stderr if args.json else sys.stdout)
    outcome = Outcome()
    code = 1
    try:
        outcome = _demo(screen, keep=args.keep)
        code = 1 if outcome.problems else 0
    except TestbedError as error:
        outcome.problems.append(str(error))
        print(f"demo: {error}", file=sys.stderr)
        if error.hint:
            print(f"demo: {error.hint}", file=sys.stderr)
    except KeyboardInterrupt:
        outcome.problems.append("interrupted")
        print("demo: interrupted; the cluster is gone", file=sys.stderr)
        code = 130
    if args.json:
        print(json.dumps(_figures(outcome)))
    return code


if __name__ == "__main__":
    sys.exit(main())
