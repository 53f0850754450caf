"""Killing CRIU in the middle of a dump costs a job no more where the dump is a forked one."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from criu_backend import CriuError
from tests.criu.capsules import Job, Place
from tests.criu.waiting import eventually

pytestmark = pytest.mark.criu

_KILLS = int(os.environ.get("OUTLAST_TEST_KILLS", "20"))

_COUNTING = """
    data = bytearray(os.urandom(16 << 20))
    for _ in range(2): threading.Thread(target=time.sleep, args=[600], daemon=True).start()
    say("ready")
    number = 0
    while True:
        number += 1
        data[number * 4096 % len(data)] = number % 256
        open("count.new", "w").write(str(number))
        os.rename("count.new", "count")
        time.sleep(0.002)
"""


def counting(place: Place) -> Job:
    (place.path / "count").unlink(missing_ok=True)
    before = place.output.stat().st_size if place.output.exists() else 0
    job = place.python(_COUNTING)
    eventually(lambda: place.output.stat().st_size > before, "the job is ready")
    eventually((place.path / "count").exists, "the job counts")
    return job


def goes_on(place: Place, job: Job) -> bool:
    count = place.path / "count"
    before = int(count.read_text())
    until = time.monotonic() + 5
    while time.monotonic() < until and job.capsule.alive:
        if int(count.read_text()) > before + 2:
            return True
        time.sleep(0.005)
    return False


def criu_of(images: Path) -> list[int]:
    """The CRIU that dumps into *images*, but not the program that it was started by."""
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = cmdline.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[0].endswith(b"criu") and os.fsencode(images) in words:
            found.append(int(cmdline.parent.name))
    return found


def kill_at(images: Path, delay: float, killed: list[int]) -> None:
    """Kill the CRIU that dumps into *images* so many seconds after it has begun to write."""
    until = time.monotonic() + 10
    while not (images / "dump.log").exists() and time.monotonic() < until:
        time.sleep(0.0002)
    pids = criu_of(images)
    time.sleep(delay)
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        except ProcessLookupError:
            pass


def names_below_init(job: Job) -> set[str]:
    init = job.capsule.init_pid
    pids = Path(f"/proc/{init}/task/{init}/children").read_text().split()
    return {Path(f"/proc/{pid}/comm").read_text().rstrip("\n") for pid in pids}


def kill_again_and_again(place: Place, mode: str) -> int:
    """Kill so many dumps at random moments, and return how many jobs died of it."""
    job = counting(place)
    longest = 0.06  # seconds; becomes about twice what a dump takes here, so that half of the moments hit
    killed = died = dumps = 0
    chance = random.Random(1)  # noqa: S311 - moments, not secrets
    while killed < _KILLS:
        dumps += 1
        assert dumps <= 20 * _KILLS, f"{killed} of {dumps} dumps were hit; a moment is at most {longest} s"
        images = place.images()
        victims: list[int] = []
        killer = threading.Thread(target=kill_at, args=(images, chance.uniform(0, longest), victims))
        killer.start()
        try:
            place.criu.dump(job.capsule, images, lambda: None, mode=mode).close()
        except CriuError:
            killed += 1
            longest = min(0.06, longest * 1.1)
        else:
            longest *= 0.9
        killer.join()
        if not goes_on(place, job):
            died += 1
            place.end()
            job = counting(place)
    eventually(lambda: "outlast-twin" not in names_below_init(job), "no twin is left")
    print(f"{mode}: {dumps} dumps, {killed} of them killed, {died} jobs died")
    return died


@pytest.mark.timeout(600)
def test_killing_criu_costs_a_job_no_more_with_forked_dumps(user_place: Place) -> None:
    died = {mode: kill_again_and_again(user_place, mode) for mode in ("plain", "forked")}
    # CRIU's own handling of the processes is common to both, and each death a matter of chance.
    assert died["forked"] <= 2 * died["plain"] + 4
