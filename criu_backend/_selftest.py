"""Whether checkpoints work on this node, found out by making one of a small program and bringing it back.

What a kernel and a CRIU can do together is known only afterwards; so each way of dumping is tried on a canary
first, and what did not bring it back whole is not used for jobs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from criu_backend._capsule import HELPER, Capsule, CapsuleError, Context, start_capsule
from criu_backend._criu import Criu
from criu_backend._memory import put_back
from criu_backend._plugin import TWIN_LIBRARY
from criu_backend._said import CriuError

CACHE = Path("/run/outlast/selftest.json")
# From the best to the one that needs least.
LADDER = ("forked", "lazy", "plain")

# What is fast enough at all: a node that is busy, or a virtual machine played in software, passes nevertheless.
_SECONDS = 120.0
_MIB = 16

# A parent and a child, each with memory that it knows the sum of, and a thread that goes on changing more.
# Each answers to a file "ask.N" with a file "answer.N.WHO".
_CANARY = """
import hashlib, os, sys, threading, time
data = os.urandom(1 << 20) * {mib}
before = hashlib.sha256(data).digest()
who = "parent" if os.fork() else "child"
table = [0] * 4096
def change():
    while True:
        for i in range(len(table)):
            table[i] += 1
        time.sleep(0.001)
threading.Thread(target=change, daemon=True).start()
asked = 0
open("ready." + who, "w").close()
while True:
    if os.path.exists(f"ask.{{asked}}"):
        now = table[:]  # in one step, beside which the thread makes none
        steps = [a - b for a, b in zip(now, now[1:])]
        good = hashlib.sha256(data).digest() == before and max(steps) <= 1 and min(steps) >= 0
        with open("answer.new." + who, "w") as file:
            file.write("whole" if good else "its memory is not what it was")
        os.rename("answer.new." + who, f"answer.{{asked}}.{{who}}")
        asked += 1
    time.sleep(0.005)
"""


@dataclass(frozen=True)
class Trial:
    """One way of dumping, tried: *problem* is None where it worked; *pause* is in seconds."""

    mode: str
    problem: str | None
    pause: float | None = None


@dataclass(frozen=True)
class SelfTest:
    """What was found out of this node, *key* says in which state of it."""

    key: dict[str, str]
    trials: tuple[Trial, ...]

    @property
    def best(self) -> str:
        """The best way of dumping that worked, or "plain"."""
        worked = [trial.mode for trial in self.trials if trial.problem is None]
        return next((mode for mode in LADDER if mode in worked), "plain")

    def problem(self, mode: str) -> str | None:
        """Return why *mode* is not to be used, None where it may be."""
        for trial in self.trials:
            if trial.mode == mode:
                return trial.problem
        return "not tried"


def self_test(criu: Criu | None = None, cache: Path = CACHE) -> SelfTest:
    """Try every way of dumping on this node, which takes some seconds, and remember the outcome in *cache*.

    Two at a time do it once. Must be called as root. Raises OSError where *cache* cannot be written.
    """
    criu = criu or Criu()
    cache.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with cache.with_suffix(".lock").open("a+") as lock:
        asked = time.time()
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = known_self_test(criu, cache)
        if known is not None and cache.stat().st_mtime > asked:
            return known
        _clear_away(lock)
        result = SelfTest(_key(criu), tuple(_trials(criu, lock)))
        fresh = cache.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(result)))
        fresh.rename(cache)
        return result


def known_self_test(criu: Criu | None = None, cache: Path = CACHE) -> SelfTest | None:
    """Return what `self_test` found out with this kernel, this CRIU and this Outlast; None if it has not."""
    try:
        found = json.loads(cache.read_text())
        result = SelfTest(found["key"], tuple(Trial(**trial) for trial in found["trials"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if result.key == _key(criu or Criu()) else None


def _key(criu: Criu) -> dict[str, str]:
    try:
        version = criu.version()
    except CriuError as error:
        version = str(error)
    return {
        "kernel": os.uname().release,
        "machine": os.uname().machine,
        "criu": version,
        "capsule": _digest(HELPER),
        "twin": _digest(TWIN_LIBRARY),
    }


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def _trials(criu: Criu, places: TextIO) -> Iterator[Trial]:
    for mode in reversed(LADDER):
        # Where this process ends in the middle, Python clears away beside CRIU, which may still write.
        with tempfile.TemporaryDirectory(prefix="outlast-canary-", ignore_cleanup_errors=True) as name:
            print(name, file=places, flush=True)
            try:
                yield Trial(mode, None, _try(criu, mode, Path(name)))
            except (CriuError, CapsuleError, OSError, _Failure) as error:
                yield Trial(mode, str(error))


def _clear_away(places: TextIO) -> None:
    """Remove what is left of self-tests that were not finished, by the places that they noted in *places*."""
    places.seek(0)
    for name in places.read().splitlines():
        shutil.rmtree(name, ignore_errors=True)
    places.truncate(0)


class _Failure(Exception):
    """The canary did not survive."""


def _try(criu: Criu, mode: str, place: Path) -> float:
    """Dump a canary, see that it lives, bring it back twice over, and return its pause."""
    with contextlib.ExitStack() as closing:
        context = _context(place, closing)
        program = [sys.executable, "-IS", "-c", _CANARY.format(mib=_MIB)]
        state = place / "state"
        state.mkdir()
        environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin")}
        capsule = start_capsule(context, program, environment, state)
        closing.callback(_end, capsule)
        for who in ("parent", "child"):
            _await(capsule, place / f"ready.{who}")
        pause = 0.0
        for number in range(2):
            images = place / f"images{number}"
            images.mkdir(mode=0o700)
            with criu.dump(capsule, images, lambda: None, mode=mode) as result:
                pause = max(pause, result.pause)
                if result.mode != mode:
                    raise _Failure(result.reason or f"it became a {result.mode} dump")
                put_back(result.memories, images)
            _ask(capsule, place, 2 * number)
            _end(capsule)
            (place / f"ask.{2 * number}").unlink()
            for answer in place.glob("answer.*"):
                answer.unlink()
            context = _context(place, closing)
            version = criu.version()
            capsule = criu.restore(context, images, state, uid=0, dumped_by=version)
            closing.callback(_end, capsule)
            shutil.rmtree(images)
            _ask(capsule, place, 2 * number)
            _ask(capsule, place, 2 * number + 1)
        return pause


def _context(place: Path, closing: contextlib.ExitStack) -> Context:
    """Start a process in whose place the canary runs."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    closing.callback(mine.close)
    with theirs:
        # It ends with this process, however that ends, and the canary with it: managers await no self-test.
        peer = subprocess.Popen(
            ["cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd=place,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    closing.enter_context(peer)
    closing.callback(peer.kill)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    closing.callback(os.close, null)
    pidfd = os.pidfd_open(peer.pid)
    closing.callback(os.close, pidfd)
    return Context(peer.pid, pidfd, (null, null, null), mine.fileno())


def _end(capsule: Capsule) -> None:
    capsule.kill()
    capsule.wait(_SECONDS)


def _ask(capsule: Capsule, place: Path, number: int) -> None:
    (place / f"ask.{number}").touch()
    for who in ("parent", "child"):
        answer = place / f"answer.{number}.{who}"
        _await(capsule, answer)
        if (said := answer.read_text()) != "whole":
            raise _Failure(f"the canary's {who}: {said}")


def _await(canary: Capsule, path: Path) -> None:
    until = time.monotonic() + _SECONDS
    while not path.exists():
        if canary.wait(0.005) and not path.exists():
            raise _Failure("the canary has ended")
        if time.monotonic() > until:
            raise _Failure(f"the canary did not answer within {_SECONDS:.0f} s")


def best_mode(wanted: str, criu: Criu | None = None, cache: Path = CACHE) -> tuple[str, str | None]:
    """Return the way of dumping to use for *wanted*, and why it is another.

    *wanted* is "auto", "forked", "lazy" or "plain". No way but "plain" is used before the self-test has
    shown that it works.
    """
    if wanted == "plain":
        return "plain", None
    known = known_self_test(criu, cache)
    if known is None:
        return "plain", "the node's self-test has not been made yet"
    if wanted == "auto":
        best = known.best
        return best, None if best == LADDER[0] else f"self-test: {LADDER[0]}: {known.problem(LADDER[0])}"
    problem = known.problem(wanted)
    return ("plain", f"self-test: {wanted}: {problem}") if problem else (wanted, None)
