"""The guard of a job: outlast-guard, of a PID namespace with one process, as the manager starts and feeds it."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from criu_backend import Capsule
from outlast.manager._guard import PROGRAM, Guard, boottime

_SECONDS = 10.0


@dataclass
class _Capsule:
    """What a guard must know of a capsule: its init, here `unshare`'s child, whose only child computes."""

    init_pid: int
    alive: bool = True

    @property
    def init_start(self) -> int:
        return int(Path(f"/proc/{self.init_pid}/stat").read_text().rpartition(")")[2].split()[19])

    @property
    def worker(self) -> int:
        """The process that is stopped and let go on."""
        return int(Path(f"/proc/{self.init_pid}/task/{self.init_pid}/children").read_text().split()[0])

    def stands_still(self) -> bool:
        return Path(f"/proc/{self.worker}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.fixture
def capsule() -> Iterator[_Capsule]:
    """A PID namespace with an init and one process below it."""
    command = ["unshare", "--fork", "--pid", "--kill-child", "sh", "-c", "sleep 300 & wait"]
    with subprocess.Popen(command) as outer:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        _eventually(lambda: children.read_text().split())
        found = _Capsule(int(children.read_text().split()[0]))
        _eventually(
            lambda: Path(f"/proc/{found.init_pid}/task/{found.init_pid}/children").read_text().split()
        )
        yield found
        outer.kill()


@pytest.fixture
def directory() -> Iterator[Path]:
    """The state directory of the job."""
    with tempfile.TemporaryDirectory(prefix="guard-", dir="/run") as path:
        yield Path(path)


def _eventually(true: Callable[[], object]) -> None:
    until = time.monotonic() + _SECONDS
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def _guard(directory: Path, capsule: _Capsule) -> Guard:
    return Guard(directory, cast("Capsule", capsule), 0)


def _guards(directory: Path) -> list[int]:
    """The guards that look after *directory*."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[:1] == [os.fsencode(PROGRAM)] and os.fsencode(directory) in words:
                found.append(int(entry.name))
    return found


def test_a_job_stands_still_when_its_time_is_over_and_goes_on_when_it_is_given_more(
    directory: Path, capsule: _Capsule
) -> None:
    guard = _guard(directory, capsule)
    guard.allow(boottime() + 0.3)
    assert not capsule.stands_still()
    _eventually(lambda: capsule.stands_still() and guard.frozen)
    guard.allow(boottime() + 60)
    _eventually(lambda: not capsule.stands_still() and not guard.frozen)


def test_a_guard_whose_place_another_has_taken_lets_the_job_alone(directory: Path, capsule: _Capsule) -> None:
    guard = _guard(directory, capsule)
    guard.allow(boottime() + 1.0)
    first = _guards(directory)
    guard._start()  # as a second thread would that found none yet
    guard.allow(boottime() + 60)
    _eventually(lambda: len(_guards(directory)) == 1)
    assert _guards(directory) != first
    assert not capsule.stands_still()
    assert not guard.frozen


def test_threads_that_allow_at_once_start_one_guard(directory: Path, capsule: _Capsule) -> None:
    guard = _guard(directory, capsule)
    threads = [threading.Thread(target=guard.allow, args=(boottime() + 60,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(_guards(directory)) == 1
