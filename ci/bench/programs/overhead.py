"""Runs on a node: one program once, as it is or under checkpoints; prints JSON of what that took.

overhead.py MODE SHARE CHECKPOINTS EXPECTED PROGRAM [ARGUMENT...]

MODE is "none", "neighbor", "plain" or "forked". EXPECTED is how many seconds the program takes alone: the checkpoints
are asked for at equal distances of nine tenths of that. Without any ("none") those moments are looked at all the
same, and with "neighbor" another processor then computes for as long as it takes to ship 54 MB. With a SHARE other
than "-" they are made by the job's interval, as long as that distance, and shipped with that `checkpoint.cpu_share`,
which holds none back that is asked for.

The program counts its own time, from its first instruction to its last, and that of each step and its parts
(stamps.c): from those around it comes what a checkpoint cost.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import os
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from criu_backend import Criu, known_self_test, self_test
from outlast import control
from outlast.errors import OutlastError

_CONFIG = Path("/etc/outlast/outlast.toml")
_JOBS = Path("/run/outlast/jobs")
_TICKS = os.sysconf("SC_CLK_TCK")
_STAMPS = Path(__file__).parent / "stamps.so"
_BIN_SECONDS = 0.05
_MARGIN = 0.9  # of the time that a run is expected to take: it may be faster
_NO_STEP = (1 << 31) - 1
_ENDED_EARLY = (
    "the program ended before the last checkpoint was due: other work slowed it while it was found out how long it "
    "takes; leave the machine alone and measure again"
)
_SECONDS = 60.0
_WINDOW_SECONDS = 1.0
_SHIPPING_SECONDS = 0.4
_SHIPPING = """
import hashlib, os, sys, time, zlib
data = os.urandom(8 << 20)
while time.process_time() < float(sys.argv[1]):
    for at in range(0, len(data), 1 << 16):
        zlib.compress(data[at : at + (1 << 16)], 1)
        hashlib.blake2b(data[at : at + (1 << 16)]).digest()
        if time.process_time() >= float(sys.argv[1]):
            break
"""


def main() -> None:
    """Run the program."""
    mode, share, checkpoints, expected, *program = sys.argv[1:]
    with tempfile.TemporaryDirectory() as place:
        stamps = Path(place) / "stamps"
        # One process, as the papers' programs were. Its output would be the terminal's cost, not the checkpoints'.
        timed = ["env", f"LD_PRELOAD={_STAMPS}", f"STAMPS={stamps}", *program]
        distance = _MARGIN * float(expected) / (int(checkpoints) + 1)
        moments = [n * distance for n in range(1, int(checkpoints) + 1)]
        window = min(_WINDOW_SECONDS, distance / 4)  # four of them come between two checkpoints
        if mode in ("none", "neighbor"):
            start = time.monotonic()
            asked = [start + one for one in moments]
            if mode == "neighbor":
                threading.Thread(target=_compute_at, args=[asked], daemon=True).start()
            subprocess.run(timed, check=True, stdout=subprocess.DEVNULL)
            print(json.dumps(_pace(stamps, asked, window)))
        else:
            if known_self_test(Criu()) is None:
                self_test(Criu())  # until it has been made, dumps are plain
            print(json.dumps(_checkpointed(mode, share, moments, timed, stamps, window)))


def _compute_at(moments: Sequence[float]) -> None:
    """Compute, at each of *moments*, what shipping does, in a process of its own."""
    for moment in moments:
        time.sleep(max(0.0, moment - time.monotonic()))
        subprocess.run([sys.executable, "-c", _SHIPPING, str(_SHIPPING_SECONDS)], check=True)


def _pace(stamps: Path, asked: Sequence[float], window: float) -> dict[str, Any]:
    """Return how long the program took and computed, and how much less than usual was done around each checkpoint.

    *asked* has the times of CLOCK_MONOTONIC at which they were asked for. "short" has a list of shares for each, one
    for every bin from one and a half *window* seconds before it to as much after its window. A part of a step is as
    much work as it takes in the median of all steps. Usual is the median of the bins outside the window.
    """
    data = stamps.read_bytes()
    start, end, computed, done_first = (one / 1e6 for one in memoryview(data[:32]).cast("Q"))
    at = [done_first]
    ends = []  # of steps, as indexes into at
    for since in memoryview(data[32:]).cast("I"):
        at.append(at[-1] + (since & _NO_STEP) / 1e6)
        if since > _NO_STEP:
            ends.append(len(at) - 1)
    parts = ends[0]
    del at[ends[-1] // parts * parts + 1 :]  # the last line that is written ends no step
    if asked and at[-1] < asked[-1]:
        sys.exit(_ENDED_EARLY)
    took = [end - begin for begin, end in itertools.pairwise(at)]
    work = [statistics.median(took[part::parts]) for part in range(parts)]
    done = [0.0, *itertools.accumulate(itertools.islice(itertools.cycle(work), len(took)))]

    def done_at(moment: float) -> float:
        i = bisect.bisect_right(at, moment) - 1
        return done[i] + (moment - at[i]) / took[i] * (done[i + 1] - done[i])

    around, within = round(1.5 * window / _BIN_SECONDS), round(window / _BIN_SECONDS)
    short = []
    for moment in asked:
        bounds = [moment + n * _BIN_SECONDS for n in range(-around, within + around + 1)]
        if at[0] <= bounds[0] and bounds[-1] < at[-1]:
            speeds = [then - now for now, then in itertools.pairwise(map(done_at, bounds))]
            usual = statistics.median(speeds[:around] + speeds[around + within :])
            short.append([round(1 - speed / usual, 4) for speed in speeds])
    return {
        "seconds": end - start,
        "cpu_seconds": computed,
        "short": short,
        "bin_seconds": _BIN_SECONDS,
        "bins": [around, around + within],
    }


def _checkpointed(
    mode: str, share: str, moments: Sequence[float], command: Sequence[str], stamps: Path, window: float
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
        with subprocess.Popen([*outlast, *command], stdout=subprocess.DEVNULL) as job:
            manager = _JOBS / name / "manager.sock"
            _await_running(manager, job)
            start = time.monotonic()
            asked = []
            taken = []
            program = _pid_of(stamps)
            checkpoint = partial(control.call, manager, {"op": "checkpoint", "wait": True}, timeout=_SECONDS)
            for moment in moments:
                time.sleep(max(0.0, start + moment - time.monotonic()))
                if share == "-":
                    asked.append(time.monotonic())
                    try:
                        off, faults = _window(program, window, checkpoint)
                        usual_off, usual_faults = _window(program, window, lambda: None)
                    except (OSError, OutlastError):
                        if Path(f"/proc/{program}").exists():
                            raise
                        job.wait()
                        sys.exit(_ENDED_EARLY)
                    taken.append(((off - usual_off) * 1e3, faults - usual_faults))
            spent = _cpu_seconds(_peer(manager))
            if job.wait():
                sys.exit(f"{' '.join(command)}: exit code {job.returncode}")
        log = Path(f"/var/log/outlast/jobs/{name}.log").read_text()
    found = re.findall(r"paused ([0-9.]+) ms \((\w+)\), (\d+) bytes, (\d+) shipped", log)
    wrong = len(found) != len(asked) if share == "-" else not found
    if wrong or any(kind != mode for _, kind, *_ in found):
        sys.exit(f"not {len(moments)} {mode} checkpoints but {found}")
    return {
        "pauses_ms": [float(pause) for pause, *_ in found],
        "shipped_bytes": sum(int(shipped) for *_, shipped in found),
        "manager_cpu_seconds": spent,
        "off_ms": [off for off, _ in taken],
        "faults": [faults for _, faults in taken],
    } | _pace(stamps, asked, window)


def _window(pid: int, seconds: float, act: Callable[[], object]) -> tuple[float, int]:
    """Do *act*; return for how many of so many *seconds* from now *pid* did not compute, and its page faults."""

    def state() -> tuple[float, float, int]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # The clock of another process: clock_getcpuclockid(3), as Linux makes its number.
        computed = time.clock_gettime(~pid << 3 | 2)
        return time.monotonic(), computed, int(fields[7])

    begin, computed, faults = state()
    act()
    time.sleep(max(0.0, begin + seconds - time.monotonic()))
    end, computed_then, faults_then = state()
    return end - begin - (computed_then - computed), faults_then - faults


def _pid_of(stamps: Path) -> int:
    """Find the program by where it writes its steps down; the shell that started it has no such thing."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"STAMPS={stamps}".encode() in environment.read_bytes().split(b"\0"):
                    return int(environment.parent.name)
        time.sleep(0.05)
    sys.exit("the program did not start")


def _await_running(manager: Path, job: subprocess.Popen[bytes]) -> None:
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
