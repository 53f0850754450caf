"""Processes of the testbed, known by PID and start time: a PID that is used again is never taken for ours."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from ci.testbed import cgroups
from ci.testbed.layout import PATH, TestbedError


@dataclasses.dataclass(frozen=True)
class Process:
    """A process as this machine sees it.

    *started* is in clock ticks since boot: proc(5), /proc/PID/stat, field 22.
    """

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this PID now; None when there is none, or only its exit status."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The name, in parentheses, may hold anything; state is the first field after it.
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    @classmethod
    def read(cls, path: Path) -> Process | None:
        """The process that `write` noted in *path*, if it still lives."""
        try:
            pid, started = map(int, path.read_text().split())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        known = cls(pid, started)
        return known if cls.of(pid) == known else None

    def write(self, path: Path) -> None:
        """Note the process in *path*, whole or not at all."""
        temporary = path.with_suffix(".new")
        temporary.write_text(f"{self.pid} {self.started}\n")
        temporary.replace(path)


def spawn(tag: str, host: str, argv: Sequence[str], log: Path) -> Process:
    """Start a program in a host's cgroups and its own session, without stdin; its output goes to *log*."""
    joins = cgroups.joins(tag, host)

    def join() -> None:
        for path in joins:
            path.write_text("0")

    with log.open("ab") as output:
        started = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env={"PATH": PATH, "LANG": "C.UTF-8"},
            start_new_session=True,
            # The testbed has one thread, so that code between fork and exec is safe.
            preexec_fn=join,
        )
    process = Process.of(started.pid)
    # Its end is seen through Process; without this, Popen would warn that nobody waits for it.
    started.returncode = 0
    if process is None:
        raise _ended(argv, log)
    return process


def wait_for_program(process: Process, name: str, log: Path, *, within: float = 10.0) -> None:
    """Wait until the process has become the program *name* by exec."""
    until = time.monotonic() + within
    while Process.of(process.pid) == process:
        if Path(f"/proc/{process.pid}/comm").read_text().strip() == name:
            return
        if time.monotonic() > until:
            break
        time.sleep(0.002)
    raise _ended([name], log)


def only_child(process: Process, log: Path, *, within: float = 10.0) -> Process:
    """Wait until the process, which starts one child and no other, has done so; return the child."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + within
    while Process.of(process.pid) == process and time.monotonic() < until:
        for pid in children.read_text().split():
            if child := Process.of(int(pid)):
                return child
        time.sleep(0.002)
    raise _ended(["the host's first process"], log)


def _ended(argv: Sequence[str], log: Path) -> TestbedError:
    said = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return TestbedError(f"{os.fspath(argv[0])}: did not start: {said[-1] if said else 'it said nothing'}")
