"""Runs on a node: one program once, as it is or under checkpoints; prints JSON of what that took.

overhead.py MODE CHECKPOINTS EXPECTED PROGRAM [ARGUMENT...]

MODE is "none", "plain" or "forked". EXPECTED is how many seconds the program takes alone: the checkpoints are
asked for at equal distances of that. The program counts its own time, from its first instruction to its last, and
that of each step (stamps.c): from the steps around it comes what a checkpoint cost.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import struct
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from criu_backend import Criu, known_self_test, self_test
from outlast import control

_CONFIG = Path("/etc/outlast/outlast.toml")
_JOBS = Path("/run/outlast/jobs")
# Says when the program began and ended; its output would be the terminal's cost, not the checkpoints'.
_TIMED = 'date +%s.%N; "$@" >/dev/null; code=$?; date +%s.%N; times; exit $code'
_TICKS = os.sysconf("SC_CLK_TCK")
_STAMPS = Path(__file__).parent / "stamps.so"
# What a checkpoint costs is looked for within so long after it, in at least so many steps.
_AFTER_SECONDS = 5.0
_LEAST_STEPS = 5


def main() -> None:
    """Run the program."""
    mode, checkpoints, expected, *program = sys.argv[1:]
    with tempfile.TemporaryDirectory() as place:
        stamps = Path(place) / "stamps"
        timed = ["sh", "-c", _TIMED, "timed", "env", f"LD_PRELOAD={_STAMPS}", f"STAMPS={stamps}", *program]
        if mode == "none":
            print(json.dumps(_times(_run(timed))))
        else:
            if known_self_test(Criu()) is None:
                self_test(Criu())  # until it has been made, dumps are plain
            print(json.dumps(_checkpointed(mode, int(checkpoints), float(expected), timed, stamps)))


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _times(output: str) -> dict[str, float]:
    """Return how long the program took, and for how long it computed."""
    start, end, _shell, children = output.splitlines()
    minutes = re.findall(r"(\d+)m([\d.]+)s", children)
    return {
        "seconds": float(end) - float(start),
        "cpu_seconds": sum(60 * int(whole) + float(rest) for whole, rest in minutes),
    }


def _lost(stamps: Path, asked: Sequence[float]) -> list[float]:
    """Return how many seconds longer the steps after each checkpoint took than those before and those later.

    *asked* has the time of CLOCK_MONOTONIC at which each was asked for. Nothing is returned where steps take too long
    to tell: those around a checkpoint are compared since a processor's speed changes from minute to minute by more than a
    checkpoint costs. Of the steps compared with, those that took half as long again as most are left out.
    """
    data = stamps.read_bytes()
    at = [int.from_bytes(data[:8], sys.byteorder) / 1e6]
    for since in memoryview(data[8:]).cast("I"):
        at.append(at[-1] + since / 1e6)
    distance = min(_AFTER_SECONDS, (asked[-1] - asked[0]) / (len(asked) - 1) / 3)
    lost = []
    for moment in asked:
        after: list[float] = []
        beside: list[float] = []
        for begin, end in itertools.pairwise(at):
            if end > moment and begin < moment + distance:
                after.append(end - begin)
            elif moment - distance < end and begin < moment + 2 * distance:
                beside.append(end - begin)
        if min(len(after), len(beside)) < _LEAST_STEPS:
            return []
        most = 1.5 * statistics.median(beside)
        lost.append(sum(after) - len(after) * statistics.mean(one for one in beside if one < most))
    return lost


def _checkpointed(
    mode: str, checkpoints: int, expected: float, command: Sequence[str], stamps: Path
) -> dict[str, Any]:
    name = f"overhead-{os.getpid()}"
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        lines = [line for line in _CONFIG.read_text().splitlines() if not re.match(r"\s*mode\s*=", line)]
        if "[checkpoint]" not in lines:
            lines += ["[checkpoint]"]
        lines.insert(lines.index("[checkpoint]") + 1, f'mode = "{mode}"')
        config.write("\n".join(lines) + "\n")
        config.flush()
        outlast = ["outlast", "--config", config.name, "run", "--interval", "30d", "--name", name, "--"]
        with subprocess.Popen([*outlast, *command], stdout=subprocess.PIPE, text=True) as job:
            manager = _JOBS / name / "manager.sock"
            _await_running(manager, job)
            start = time.monotonic()
            asked = []
            for number in range(1, checkpoints + 1):
                time.sleep(max(0.0, start + number * expected / (checkpoints + 1) - time.monotonic()))
                asked.append(time.monotonic())
                control.call(manager, {"op": "checkpoint", "wait": True}, timeout=expected)
            spent = _cpu_seconds(_peer(manager))
            output, _ = job.communicate()
            if job.returncode:
                sys.exit(f"{' '.join(command)}: exit code {job.returncode}")
        log = Path(f"/var/log/outlast/jobs/{name}.log").read_text()
    found = re.findall(r"paused ([0-9.]+) ms \((\w+)\), (\d+) bytes, (\d+) shipped", log)
    if len(found) != checkpoints or any(kind != mode for _, kind, *_ in found):
        sys.exit(f"not {checkpoints} {mode} checkpoints but {found}")
    return _times(output) | {
        "pauses_ms": [float(pause) for pause, *_ in found],
        "shipped_bytes": sum(int(shipped) for *_, shipped in found),
        "manager_cpu_seconds": spent,
        "lost_seconds": _lost(stamps, asked),
    }


def _await_running(manager: Path, job: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            if control.call(manager, {"op": "status"})["running"]:
                return
        except Exception as error:  # noqa: BLE001 - it is not there yet, or does not answer yet
            if job.poll() is not None or time.monotonic() > until:
                sys.exit(f"the job did not start: {error}")
        time.sleep(0.05)


def _peer(manager: Path) -> int:
    """The process that serves a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.connect(str(manager))
        return int(struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def _cpu_seconds(pid: int) -> float:
    """What a process and those of its children that have ended have computed; proc_pid_stat(5), 14 to 17."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS


if __name__ == "__main__":
    main()
