"""Runs on a node: one program once, as it is or under checkpoints; prints JSON of what that took.

overhead.py MODE SHARE CHECKPOINTS EXPECTED PROGRAM [ARGUMENT...]

MODE is "none", "plain" or "forked". EXPECTED is how many seconds the program takes alone: the checkpoints are
asked for at equal distances of that, and without any ("none") those moments are looked at all the same. With a
SHARE other than "-" they are made by the job's interval, as long as that distance, and shipped with that
`checkpoint.cpu_share`, which holds none back that is asked for.

The program counts its own time, from its first instruction to its last, and that of each step (stamps.c): from the
steps around it comes what a checkpoint cost.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import socket
import statistics
import struct
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
_AROUND_SECONDS, _BIN_SECONDS = 4.0, 0.02
_SECONDS = 60.0


def main() -> None:
    """Run the program."""
    mode, share, checkpoints, expected, *program = sys.argv[1:]
    with tempfile.TemporaryDirectory() as place:
        stamps = Path(place) / "stamps"
        timed = ["sh", "-c", _TIMED, "timed", "env", f"LD_PRELOAD={_STAMPS}", f"STAMPS={stamps}", *program]
        moments = [n * float(expected) / (int(checkpoints) + 1) for n in range(1, int(checkpoints) + 1)]
        if mode == "none":
            start = time.monotonic()
            times = _times(_run(timed))
            print(json.dumps(times | _pace(stamps, [start + one for one in moments])))
        else:
            if known_self_test(Criu()) is None:
                self_test(Criu())  # until it has been made, dumps are plain
            print(json.dumps(_checkpointed(mode, share, moments, timed, stamps)))


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


def _pace(stamps: Path, asked: Sequence[float]) -> dict[str, Any]:
    """Return how long a step takes, and how much less than usual was done around each checkpoint.

    *asked* has the time of CLOCK_MONOTONIC at which each was asked for. What is told of each is a list: the share
    that was not done in each bin from some seconds before to as many after it. Usual is what the steps take within
    that time that are not those of the second after it.
    """
    data = stamps.read_bytes()
    at = [int.from_bytes(data[:8], sys.byteorder) / 1e6]
    for since in memoryview(data[8:]).cast("I"):
        at.append(at[-1] + since / 1e6)
    steps = list(itertools.pairwise(at))
    short = []
    for moment in asked:
        near = [(b, e) for b, e in steps if e > moment - _AROUND_SECONDS and b < moment + _AROUND_SECONDS]
        usual = statistics.median(e - b for b, e in near if e < moment or b > moment + 1.0)
        bins = [0.0] * round(2 * _AROUND_SECONDS / _BIN_SECONDS)
        for begin, end in near:
            first = (begin - moment + _AROUND_SECONDS) / _BIN_SECONDS
            last = (end - moment + _AROUND_SECONDS) / _BIN_SECONDS
            for number in range(max(0, int(first)), min(len(bins), math.ceil(last))):
                within = min(last, number + 1) - max(first, number)
                bins[number] += within / (last - first) * usual / _BIN_SECONDS
        short.append([round(1 - done, 4) for done in bins])
    return {
        "step_seconds": statistics.median(end - begin for begin, end in steps),
        "short": short,
        "bin_seconds": _BIN_SECONDS,
    }


def _checkpointed(
    mode: str, share: str, moments: Sequence[float], command: Sequence[str], stamps: Path
) -> dict[str, Any]:
    name = f"overhead-{os.getpid()}"
    interval = "30d" if share == "-" else f"{moments[0]:.0f}s"
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        lines = [
            line
            for line in _CONFIG.read_text().splitlines()
            if not re.match(r"\s*(mode|cpu_share)\s*=", line)
        ]
        if "[checkpoint]" not in lines:
            lines += ["[checkpoint]"]
        at = lines.index("[checkpoint]") + 1
        lines[at:at] = [f'mode = "{mode}"', f"cpu_share = {share.replace('-', '0')}"]
        config.write("\n".join(lines) + "\n")
        config.flush()
        outlast = ["outlast", "--config", config.name, "run", "--interval", interval, "--name", name, "--"]
        with subprocess.Popen([*outlast, *command], stdout=subprocess.PIPE, text=True) as job:
            manager = _JOBS / name / "manager.sock"
            _await_running(manager, job)
            start = time.monotonic()
            asked = []
            for moment in moments:
                time.sleep(max(0.0, start + moment - time.monotonic()))
                if share == "-":
                    asked.append(time.monotonic())
                    control.call(manager, {"op": "checkpoint", "wait": True}, timeout=_SECONDS)
            spent = _cpu_seconds(_peer(manager))
            output, _ = job.communicate()
            if job.returncode:
                sys.exit(f"{' '.join(command)}: exit code {job.returncode}")
        log = Path(f"/var/log/outlast/jobs/{name}.log").read_text()
    found = re.findall(r"paused ([0-9.]+) ms \((\w+)\), (\d+) bytes, (\d+) shipped", log)
    wrong = len(found) != len(asked) if share == "-" else not found
    if wrong or any(kind != mode for _, kind, *_ in found):
        sys.exit(f"not {len(moments)} {mode} checkpoints but {found}")
    return (
        _times(output)
        | {
            "pauses_ms": [float(pause) for pause, *_ in found],
            "shipped_bytes": sum(int(shipped) for *_, shipped in found),
            "manager_cpu_seconds": spent,
        }
        | _pace(stamps, asked)
    )


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
