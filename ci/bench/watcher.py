"""The watcher's own cost: a cycle over a large cluster, its memory, and what it does when many nodes die at once.

Nodes and jobs are simulated: the store is a real directory with a real lease for every job, the scheduler is one
that answers at once and counts what it is asked. Nodes that "die" listen on a port whose kernel answers nobody.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ci.bench import CHECKOUT, Bench
from ci.testbed.layout import TestbedError
from outlast.config import Config, LeaseConfig, StoreConfig, WatcherConfig
from outlast.model import JobState, SchedulerJob, SchedulerNode

ROUNDS = 5

_MOST_SECONDS = 1.0
_MOST_MB = 200.0


def options(parser: argparse.ArgumentParser) -> None:
    """Add its own options."""
    parser.add_argument("--jobs", type=int, default=10000)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--die", type=int, default=300, help="so many nodes at once; default: %(default)s")


def run(bench: Bench) -> None:
    """Measure, in a process of its own, so that the memory is the watcher's."""
    jobs, nodes, die = bench.options.jobs, bench.options.nodes, bench.options.die
    for variant in bench.rounds("default"):
        command = [_python(), "-m", "ci.bench.watcher", str(jobs), str(nodes), str(die)]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode:
            bench.problem(done.stderr.strip().splitlines()[-1])
            return
        found = json.loads(done.stdout)
        bench.add(variant, "cycle", found["cycle_s"], "s")
        bench.add(variant, "cycle that asks the scheduler", found["look_s"], "s")
        bench.add(variant, "memory", found["rss_mb"], "MB")
        bench.add(variant, f"{die} nodes dead: until the last is marked down", found["marked_s"], "s")
        bench.add(variant, f"{die} nodes dead: until the last job is sent on", found["sent_s"], "s")
        bench.add(variant, f"{die} nodes dead: commands to the scheduler", found["commands"], "")
        if max(found["cycle_s"], found["look_s"]) > _MOST_SECONDS or found["rss_mb"] > _MOST_MB:
            bench.problem(f"a cycle of {found['look_s']:.2f} s, {found['rss_mb']:.0f} MB: too much")
        bench.note("jobs", jobs)
        bench.note("nodes", nodes)
        bench.note("cycle_s", found["look_s"])
        bench.note("rss_mb", found["rss_mb"])


def _python() -> str:
    """Return a Python that has what the store needs: $OUTLAST_PYTHON, or the tests' own, made if it is not there."""
    if named := os.environ.get("OUTLAST_PYTHON"):
        return named
    made = subprocess.run(
        ["bash", Path(__file__).parents[1] / "venv.sh"], capture_output=True, text=True, check=False
    )
    if made.returncode:
        last = made.stderr.strip().rpartition("\n")[2]
        raise TestbedError(
            f"making a Python with paramiko: {last}",
            hint="name one that has it: OUTLAST_PYTHON=/usr/bin/python3",
        )
    return f"{made.stdout.split()[-1]}/bin/python"


class _Cluster:
    """A scheduler that answers at once, and does what it is told."""

    def __init__(self, jobs: int, nodes: int, silent: int, alive: int) -> None:
        self.commands = 0
        self._ports = {"alive": alive, "silent": silent}
        self._nodes = {f"n{i}": SchedulerNode(f"n{i}", True, True, "127.0.0.1", alive) for i in range(nodes)}
        self._jobs = {
            str(i): SchedulerJob(
                str(i),
                JobState.RUNNING,
                "RUNNING",
                0,
                (f"n{i % nodes}",),
                1000 + i % 50,
                f"job {i}",
                handle=str(i),
            )
            for i in range(jobs)
        }

    def die(self, count: int) -> set[str]:
        names = list(self._nodes)[:count]
        for name in names:
            self._nodes[name] = SchedulerNode(name, True, True, "127.0.0.1", self._ports["silent"])
        return set(names)

    def jobs(self) -> tuple[SchedulerJob, ...]:
        return tuple(self._jobs.values())

    def nodes(self) -> tuple[SchedulerNode, ...]:
        return tuple(self._nodes.values())

    def mark_down(self, nodes: Sequence[str], _reason: str) -> None:
        self.commands += 1
        for name in nodes:
            self._nodes[name] = SchedulerNode(name, False, False, "127.0.0.1", self._ports["silent"])
        for key, job in self._jobs.items():
            if job.nodes[:1] and job.nodes[0] in nodes:
                self._jobs[key] = SchedulerJob(
                    key,
                    JobState.PENDING,
                    "PENDING",
                    1,
                    (),
                    job.uid,
                    job.name,
                    handle=key,
                    begin=time.time() + 6,
                )

    def exclude(self, handles: Sequence[str], nodes: Sequence[str], *, at_once: bool = False) -> None:
        self.commands += 1
        for key in handles:
            job = self._jobs[key]
            begin = 0.0 if at_once else job.begin
            self._jobs[key] = SchedulerJob(
                key, job.state, job.raw_state, 1, (), job.uid, job.name, tuple(nodes), handle=key, begin=begin
            )

    def requeue(self, handle: str) -> None:
        raise NotImplementedError(handle)

    def requeue_hold(self, handle: str) -> None:
        raise NotImplementedError(handle)

    def hold(self, handle: str) -> None:
        raise NotImplementedError(handle)

    def delay(self, handle: str, seconds: float) -> None:
        raise NotImplementedError(handle, seconds)

    def require(self, handle: str, node: str) -> None:
        raise NotImplementedError(handle, node)

    def release(self, handle: str) -> None:
        raise NotImplementedError(handle)

    def leave(self, handle: str, *, hold: bool, to: str | None) -> str | None:
        raise NotImplementedError(handle)

    def drain(self, node: str, reason: str) -> None:
        raise NotImplementedError(node, reason)

    def users(self) -> frozenset[int]:
        return frozenset()


def _measure(jobs: int, nodes: int, die: int) -> dict[str, float]:
    # Not above: what runs the benchmarks has the standard library only.
    from outlast.store import open_store
    from outlast.watcher.actions import MarkDown
    from outlast.watcher.loop import Loop

    with contextlib.ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        alive = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        first = stack.enter_context(socket.socket())
        first.connect(silent.getsockname())  # the queue is full now: further SYNs get no answer
        config = Config(
            cluster="c",
            store=StoreConfig(url=f"file://{top}"),
            lease=LeaseConfig(renew=0.5, ttl=4.0),
            watcher=WatcherConfig(silent=2.0),
        )
        cluster = _Cluster(jobs, nodes, silent.getsockname()[1], alive.getsockname()[1])
        directory = top / "leases/c"
        directory.mkdir(parents=True)
        files = [directory / f"{i}@0@n{i % nodes}@{1000 + i % 50}" for i in range(jobs)]

        def beat(dead: frozenset[str]) -> None:
            """Every manager that lives renews its lease; not part of what is measured."""
            for number, file in enumerate(files):
                if f"n{number % nodes}" not in dead:
                    with file.open("ab") as lease:
                        lease.write(b"\n")

        loop = Loop(config, cluster, open_store(config.store))
        beat(frozenset())
        loop.cycle(look=True)
        found = {"cycle_s": _seconds(loop.cycle), "look_s": _seconds(lambda: loop.cycle(look=True))}
        dead = frozenset(cluster.die(die))
        begin, marked, sent = time.monotonic(), 0, 0
        found["marked_s"] = found["sent_s"] = 0.0
        lost = sum(f"n{number % nodes}" in dead for number in range(jobs))
        while sent < lost and time.monotonic() - begin < 60:
            beat(dead)
            for decision in loop.cycle():
                if isinstance(decision, MarkDown):
                    marked += 1
                    found["marked_s"] = time.monotonic() - begin
            sent = sum(bool(job.excluded) for job in cluster.jobs())
            found["sent_s"] = time.monotonic() - begin
        if marked != die or sent != lost:
            raise SystemExit(f"{marked} of {die} nodes were marked down, {sent} of {lost} jobs sent on")
        found["commands"] = cluster.commands
    found["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def _seconds(act: object) -> float:
    begin = time.monotonic()
    act()  # type: ignore[operator]
    return time.monotonic() - begin


if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")
    print(json.dumps(_measure(*map(int, sys.argv[1:4]))))
