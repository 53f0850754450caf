"""The verbs that look at a job from further off: its report, and a live view of all jobs."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from outlast import terminal
from outlast.cli._verbs import AddVerb, age, ask, milliseconds, moment, print_json, print_table, with_json
from outlast.errors import OutlastError, UsageError

_EVENTS = 8  # of the chosen job, in the live view


def add(verb: AddVerb) -> None:
    """Add these verbs."""
    sub = with_json(verb("report", _report))
    sub.add_argument("job", metavar="JOB", help="the scheduler's id of the job, such as 17")
    sub.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw it: FILE ends in .svg, .html or .png (matplotlib)"
    )
    sub = with_json(verb("top", _top))
    sub.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="look so often: 2")
    sub.add_argument("--once", action="store_true", help="print it once; so it is where there is no terminal")


def _report(args: argparse.Namespace) -> None:
    """Tell what a job has been through: its runs, and what checkpoints cost it and saved it.

    With --plot, draw it as well: a lane for each node, with runs, pauses, uploads, failures and restarts.
    """
    from outlast import plot, timeline

    events = ask(args, {"op": "events", "job": args.job})["events"]
    stored = ask(args, {"op": "list", "job": args.job})["checkpoints"]
    # The scheduler may be away, or have forgotten the job: then it is not known to run.
    states: dict[str, str] = {}
    with contextlib.suppress(OutlastError):
        states = {job["job_id"]: job["state"] for job in ask(args, {"op": "status"})["jobs"]}
    running = states.get(args.job, "").split("+")[0].upper() in ("RUNNING", "R", "E")
    history = timeline.read_history(args.job, events, stored, running_at=time.time() if running else None)
    if args.plot is not None:
        plot.plot(history, args.plot)
    if args.json:
        print_json({**history.as_dictionary(), "plot": None if args.plot is None else str(args.plot)})
        return
    rows = [
        (
            run.epoch,
            run.node,
            moment(run.start),
            plot.span(run.end - run.start),
            run.origin or "its start",
            run.how,
        )
        for run in history.runs
    ]
    if rows:
        print_table(("RUN", "NODE", "BEGAN", "FOR", "FROM", "ENDED"), rows)
        print()
    for name, text in plot.cost_lines(history.cost):
        print(f"{name:<15} {text}")
    for failure in history.failures:
        print(
            f"{terminal.event(f'{failure.event:<15}')} {moment(failure.time)} {failure.node}: {failure.text}"
        )


def _top(args: argparse.Namespace) -> None:
    """Show your jobs that are being checkpointed, live.

    Arrow keys choose a job, whose last events are shown below; q ends it.
    """
    if args.every < 0.2:
        raise UsageError(f"top: every {args.every:g} s is too often", hint="0.2 s is the least")
    if args.json:
        print_json(ask(args, {"op": "status"}))
        return
    if args.once or not (sys.stdin.isatty() and sys.stdout.isatty()):
        for line in _screen(ask(args, {"op": "status"})["jobs"], None, (), 200, None):
            print(line)
        return
    with _full_screen():
        _live(args)


def _live(args: argparse.Namespace) -> None:
    chosen: str | None = None
    while True:
        problem = None
        jobs: Sequence[Mapping[str, Any]] = ()
        events: Sequence[Mapping[str, Any]] = ()
        try:
            jobs = ask(args, {"op": "status"})["jobs"]
            ids = [str(job["job_id"]) for job in jobs]
            if chosen not in ids:
                chosen = ids[0] if ids else None
            if chosen is not None:
                events = ask(args, {"op": "events", "job": chosen})["events"][-_EVENTS:]
        except OutlastError as error:
            problem = str(error)
            ids = []
        until = time.monotonic() + args.every
        while (left := until - time.monotonic()) > 0:
            columns, rows = shutil.get_terminal_size()
            lines = _screen(jobs, chosen, events, columns, problem)
            sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\r\n" for line in lines[: rows - 1]) + "\x1b[J")
            sys.stdout.flush()
            key = _key(left)
            if key in ("q", "Q", "\x03"):
                return
            if key in ("\x1b[A", "\x1b[B") and chosen in ids:
                place = ids.index(chosen) + (1 if key == "\x1b[B" else -1)
                chosen = ids[max(0, min(len(ids) - 1, place))]
                break


def _screen(
    jobs: Sequence[Mapping[str, Any]],
    chosen: str | None,
    events: Sequence[Mapping[str, Any]],
    width: int,
    problem: str | None,
) -> list[str]:
    """Return the lines of one view; each is at most *width* wide."""
    running = sum(str(job["state"]).startswith(("RUNNING", "R")) for job in jobs)
    stored = sum(job["checkpoints"] for job in jobs)
    head = (
        f"outlast top  {time.strftime('%H:%M:%S')}  {len(jobs)} jobs, {running} running, {stored} checkpoints"
    )
    lines = [terminal.paint(head[:width], "1"), terminal.paint((problem or "")[:width], "31")]
    titles = ("JOB", "NAME", "STATE", "NODE", "RESTARTS", "CKPTS", "NEWEST", "PAUSE")
    cells = [
        (
            str(job["job_id"]),
            _plain(str(job["name"]))[:24],
            str(job["state"]),
            ",".join(job["nodes"]) or "-",
            str(job["epoch"]),
            str(job["checkpoints"]),
            age(job["newest"]["created"]) if job["newest"] else "-",
            milliseconds(job["newest"]["pause_ms"]) if job["newest"] else "-",
        )
        for job in jobs
    ]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]

    def line(row: Sequence[str], mark: str, *, colors: bool) -> str:
        padded = [text.ljust(wide) for text, wide in zip(row, widths, strict=True)]
        text = mark + "  ".join(padded)
        if len(text) > width or not colors:
            return text[:width]
        padded[2] = terminal.state(padded[2])
        return mark + "  ".join(padded)

    lines.append(terminal.paint(line(titles, "  ", colors=False), "7"))
    lines += [
        line(row, "> " if job["job_id"] == chosen else "  ", colors=True)
        for job, row in zip(jobs, cells, strict=True)
    ]
    if not jobs:
        lines.append("  no job of yours is being checkpointed: sbatch --checkpoint=10m job.sh")
    if chosen is not None:
        lines += ["", terminal.paint(f"job {chosen}: what happened last"[:width], "1")]
        for event in events:
            when = moment(event["time"])[11:]
            text = f"  {when}  {event['node']:<8} {event['event']:<18} {_plain(event['text'])}"
            lines.append(text[:width])
    return lines


def _plain(text: str) -> str:
    """Return *text* without what a terminal would act upon: names and error texts are other people's."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


@contextlib.contextmanager
def _full_screen() -> Iterator[None]:
    """Take the whole terminal, keys without Enter, and give it back as it was."""
    before = termios.tcgetattr(sys.stdin)
    sys.stdout.write("\x1b[?1049h\x1b[?25l")
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()


def _key(seconds: float) -> str:
    """Return what was pressed, the arrows as their escape sequences; "" after *seconds* without any."""
    ready, _, _ = select.select([sys.stdin], [], [], max(0.0, seconds))
    # Not through sys.stdin, which would keep what it has read ahead from select.
    return os.read(sys.stdin.fileno(), 16).decode(errors="replace") if ready else ""
