"""Runs on a node: the pauses of one job, as it sees them itself.

pausing.py PROGRAM MIB HUGE PROCESSES ROUNDS prints JSON: lists of milliseconds, by variant. Where DMTCP is installed,
its own checkpoints of the same program, into the same tmpfs and without gzip, are one of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from criu_backend import Capsule, Context, Criu, start_capsule

_SECONDS = 120.0
_TMPFS, _DISK = Path("/run"), Path("/var/tmp")
_VARIANTS = (("plain, tmpfs", "plain", _TMPFS), ("plain, disk", "plain", _DISK), ("forked", "forked", _TMPFS))


class Program:
    """The program, running, as far as its output tells of it."""

    def __init__(self, output: Path, processes: int) -> None:
        self._output = output
        self._processes = processes
        self._await("ready")

    def during(self, act: Callable[[], None]) -> float:
        """Return the longest time, in ms, that a process stood still while *act* ran."""
        time.sleep(0.2)
        before = len(self._lines())
        act()
        time.sleep(0.2)
        gaps = [float(line.split()[1]) for line in self._lines()[before:] if line.startswith("gap ")]
        return max(gaps, default=0.0) * 1e3

    def _await(self, start: str, before: int = 0) -> None:
        until = time.monotonic() + _SECONDS
        while sum(line.startswith(start) for line in self._lines()[before:]) < self._processes:
            if time.monotonic() > until:
                sys.exit(f"the job did not say {start!r} within {_SECONDS:.0f} s")
            time.sleep(0.02)

    def _lines(self) -> list[str]:
        return self._output.read_text().splitlines()


class Job(Program):
    """The program, running in a capsule."""

    def __init__(self, capsule: Capsule, output: Path, processes: int) -> None:
        self.capsule = capsule
        super().__init__(output, processes)

    def forks(self) -> float:
        """Return how long fork() takes, in ms: the sum of all processes, one after the other."""
        before = len(self._lines())
        for pid in list(self.capsule.tasks()):  # before there are more for a moment
            os.kill(pid, signal.SIGUSR1)
            time.sleep(0.02)
        self._await("fork ", before)
        return (
            sum(float(line.split()[1]) for line in self._lines()[before:] if line.startswith("fork ")) * 1e3
        )


@contextlib.contextmanager
def running(program: str, mib: int, huge: int, processes: int) -> Iterator[Job]:
    """Run the program in a capsule."""
    with contextlib.ExitStack() as closing:
        place = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="pausing-", dir=_TMPFS)))
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        closing.callback(mine.close)
        with theirs:
            peer = subprocess.Popen(["sleep", "3600"], pass_fds=(theirs.fileno(),))
        closing.callback(peer.wait)
        closing.callback(peer.kill)
        output = closing.enter_context((place / "output").open("a"))
        null = closing.enter_context(Path(os.devnull).open())
        pidfd = os.pidfd_open(peer.pid)
        closing.callback(os.close, pidfd)
        stdio = (null.fileno(), output.fileno(), output.fileno())
        context = Context(peer.pid, pidfd, stdio, mine.fileno())
        argv = [program, str(mib), str(huge), str(processes)]
        capsule = start_capsule(context, argv, {"PATH": "/usr/bin:/bin"}, place)
        closing.callback(capsule.wait, 60)
        closing.callback(capsule.kill)
        yield Job(capsule, place / "output", processes)


def pause(job: Job, mode: str, where: Path) -> float:
    """Dump the job and return its pause in ms."""
    images = Path(tempfile.mkdtemp(prefix="pausing-images-", dir=where))

    def dump() -> None:
        with Criu().dump(job.capsule, images, lambda: None, mode=mode) as result:
            if result.mode != mode:
                sys.exit(f"a {mode} dump became a {result.mode} one: {result.reason}")

    try:
        return job.during(dump)
    finally:
        shutil.rmtree(images)


def dmtcp(argv: Sequence[str], processes: int, rounds: int) -> list[float]:
    """Return the pauses, in ms, of the program under DMTCP, which checkpoints into tmpfs."""
    with contextlib.ExitStack() as closing:
        place = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="pausing-", dir=_TMPFS)))
        port = place / "port"
        output = closing.enter_context((place / "output").open("w"))
        launch = ["dmtcp_launch", "--new-coordinator", "--coord-port", "0", "--port-file", str(port)]
        launch += ["--no-gzip", "--quiet", "--ckptdir", str(place / "images")]
        subprocess.Popen([*launch, *argv], stdin=subprocess.DEVNULL, stdout=output)

        def command(word: str) -> None:
            to = ["dmtcp_command", "--coord-port", port.read_text().strip(), word]
            subprocess.run(to, check=True, stdout=subprocess.DEVNULL)

        program = Program(place / "output", processes)
        closing.callback(command, "--quit")
        found = []
        for _ in range(rounds):
            found.append(program.during(lambda: command("--bcheckpoint")))
            shutil.rmtree(place / "images", ignore_errors=True)
            (place / "images").mkdir()
    return found


def main() -> None:
    """Measure, and print what was measured."""
    program, *numbers = sys.argv[1:]
    mib, huge, processes, rounds = map(int, numbers)
    found: dict[str, list[float]] = {}
    with running(program, mib, huge, processes) as job, running(program, 0, 0, processes) as empty:
        for number in range(rounds):
            for variant, mode, where in _VARIANTS if number % 2 == 0 else reversed(_VARIANTS):
                found.setdefault(variant, []).append(pause(job, mode, where))
            found.setdefault("fork()", []).append(job.forks())
            found.setdefault("metadata", []).append(pause(empty, "plain", _TMPFS))
    if shutil.which("dmtcp_launch") is not None:
        found["DMTCP"] = dmtcp([program, *map(str, (mib, huge, processes))], processes, rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
