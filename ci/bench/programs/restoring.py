"""Runs on nodes, as root: `make MIB` dumps a job into the store, `measure MIB ROUNDS` restores it.

The job tells the time as often as it can; the first time that it tells after a restore has begun is its first
instruction. What a manager does when it starts, while the scheduler starts the job, is done before: it connects to
the store, and fetches what the job will need first. `measure` prints an object of JSON: for each variant the
milliseconds from the moment when the job may go on to its first instruction, those of them that went into fetching,
how long it took for all memory to be there, and, apart from all that, how long the manager took before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from criu_backend import Context, Criu, start_capsule
from outlast.config import read_config
from outlast.manager._events import EventLog
from outlast.manager._launch import Launcher
from outlast.manager._pager import Pager
from outlast.manager._run import Run
from outlast.manager._shim import Shim
from outlast.model import CheckpointId, JobKey
from outlast.store import open_store

_USER = 2000
_PLACE = Path("/run/outlast/bench")
_TOLD = Path("/run/outlast/bench.told")
_SECONDS = 120.0
_SETTLE_SECONDS = 0.5

_JOB = """
import os, sys, time
told = os.open({told!r}, os.O_WRONLY | os.O_APPEND)
memory = [os.urandom(1 << 20) for _ in range({mib})]
while True:
    os.write(told, b"%.6f\\n" % time.time())
    time.sleep(0.0005)
"""


@contextlib.contextmanager
def _peer() -> Iterator[Context]:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        ["sleep", str(_SECONDS)],
        user=_USER,
        group=_USER,
        extra_groups=[],
        cwd="/",
        pass_fds=(theirs.fileno(),),
    )
    nothing = os.open(os.devnull, os.O_RDWR)
    pidfd = os.pidfd_open(process.pid)
    try:
        yield Context(process.pid, pidfd, (nothing, nothing, nothing), mine.fileno())
    finally:
        process.kill()
        process.wait()
        for fd in (nothing, pidfd):
            os.close(fd)
        mine.close()
        theirs.close()


def _first_after(moment: float) -> float:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        for line in _TOLD.read_text().splitlines():
            if float(line) > moment:
                return float(line)
        time.sleep(0.0002)
    raise SystemExit("the job did not run")


def _prepare() -> None:
    shutil.rmtree(_PLACE, ignore_errors=True)
    (_PLACE / "spool").mkdir(parents=True)
    _TOLD.write_text("")
    _TOLD.chmod(0o666)


def make(mib: int) -> None:
    """Dump a job of so many MiB, which no compression makes smaller, into the store, and end it."""
    _prepare()
    config, criu = read_config(), Criu()
    images = _PLACE / "spool" / "images"
    images.mkdir(mode=0o700)
    with _peer() as context:
        source = _JOB.format(told=os.fspath(_TOLD), mib=mib)
        argv = ["/usr/bin/python3", "-IS", "-c", source]
        capsule = start_capsule(context, argv, {"PATH": "/usr/bin:/bin"}, _PLACE)
        _first_after(0)
        with (
            criu.dump(capsule, images, lambda: None, mode="forked") as result,
            open_store(config.store) as store,
        ):
            meta: dict[str, Any] = {"node": socket.gethostname(), "files": [], "passed": []}
            meta |= {"criu": result.criu_version}
            meta |= {"epoch": 0, "seq": 1, "time": time.time(), "uid": _USER, "pause_ms": 0.0}
            job = JobKey("bench", str(mib))
            store.put_record(job, "start", {"uid": _USER, "epoch": 0, "files": []})
            store.publish(job, CheckpointId(0, 1), images, meta, result.memories)
        capsule.kill()
        capsule.wait(10)


def measure(mib: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Restore what `make` made, in turns whole and by post-copy."""
    job = JobKey("bench", str(mib))
    found: dict[str, list[dict[str, float]]] = {"fetch-all": [], "post-copy": []}
    for number in range(rounds):
        for variant in sorted(found, reverse=bool(number % 2)):
            found[variant].append(_restore(job, variant))
    return found


def _restore(job: JobKey, variant: str) -> dict[str, float]:
    _prepare()
    config, criu = read_config(), Criu()
    how = "on" if variant == "post-copy" else "off"
    config = dataclasses.replace(config, restart=dataclasses.replace(config.restart, post_copy=how))
    facts: dict[str, Any] = {}
    events = SimpleNamespace(add=lambda event, text, **more: facts.update(more, event=event))
    pager = Pager(config)
    launcher = Launcher(config, criu, cast(EventLog, events), pager)
    run = Run(job, 1, _USER, socket.gethostname(), 0, [], _PLACE)
    with _peer() as context:
        shim = SimpleNamespace(
            context=context, stdio=context.stdio, gone=False, set_back=lambda files, epoch: None
        )
        clock = time.monotonic()
        launcher.connect(job, _PLACE / "spool")
        launcher.store()
        connected = time.monotonic() - clock
        time.sleep(_SETTLE_SECONDS)
        begin, clock = time.time(), time.monotonic()
        run.capsule = launcher.launch(run, cast(Shim, shim))
        if facts["event"] != "restored" or facts["post_copy"] != (how == "on"):
            raise SystemExit(f"not what is measured: {facts}")
        first = _first_after(begin)
        launcher.await_pages(run, cast(Shim, shim))
        whole = time.monotonic() - clock
        pager.close()
        run.capsule.kill()
        run.capsule.wait(10)
    return {
        "first": (first - begin) * 1000,
        "fetch": facts["fetch_s"] * 1000,
        "connect": connected * 1000,
        "whole": whole * 1000,
    }


if __name__ == "__main__":
    logging.disable()
    if sys.argv[1] == "make":
        make(int(sys.argv[2]))
    else:
        sys.stdout.write(json.dumps(measure(int(sys.argv[2]), int(sys.argv[3]))))
