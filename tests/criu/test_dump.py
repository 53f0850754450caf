"""A dump leaves the job as it was, whatever becomes of the dump."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from criu_backend import Criu, CriuError
from tests.criu.capsules import Job, Place
from tests.criu.visible import quiet, run_states, visible_state
from tests.criu.waiting import eventually, exit_code

pytestmark = pytest.mark.criu

# Counts in a file that is open all the time; ends when it is told to, with 3.
COUNTER = """
    table = bytearray(os.urandom(1 << 20)) * {mib}
    say("ready")
    number = 0
    while not os.path.exists("stop"):
        number += 1
        open("count.new", "w").write(str(number))
        os.rename("count.new", "count")
        time.sleep(0.005)
    sys.exit(3)
"""


def counter(place: Place, mib: int = 1) -> Job:
    job = place.python(COUNTER.format(mib=mib))
    job.says("ready")
    eventually((place.path / "count").exists, "the job counts")
    return job


def goes_on(place: Place) -> bool:
    """Whether the counter counts."""
    count = place.path / "count"
    before = int(count.read_text())
    eventually(lambda: int(count.read_text()) > before + 2, "the job goes on counting")
    return True


def ends_well(place: Place, job: Job) -> bool:
    """Whether the counter ends as it should."""
    place.touch("stop")
    return job.ended() == exit_code(3)


def test_job_runs_on_after_a_dump(place: Place) -> None:
    job = counter(place, mib=8)
    images, result = place.dump(job)

    assert goes_on(place)
    assert 0 < result.pause < 10
    assert result.image_bytes == sum(file.stat().st_size for file in images.iterdir()) > 8 << 20
    assert result.criu_version == place.criu.version()
    assert ends_well(place, job)


def test_dump_changes_nothing_that_the_job_can_see(place: Place) -> None:
    job = place.python("""
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        say("ready")
        wait("go")
    """)
    job.says("ready")
    quiet(job.capsule)
    before = visible_state(job.capsule)
    for _ in range(3):
        place.dump(job)

    assert visible_state(job.capsule) == before


def test_whole_job_stands_still_when_on_frozen_is_called(place: Place) -> None:
    job = place.python("""
        for _ in range(3): threading.Thread(target=time.sleep, args=[60], daemon=True).start()
        if os.fork() == 0: time.sleep(60)
        say("ready")
        while True: pass
    """)
    job.says("ready")
    seen: list[set[str]] = []
    images = place.images()

    def on_frozen() -> None:
        seen.append(run_states(job.capsule))
        assert list(images.glob("pages-*.img"))

    place.criu.dump(job.capsule, images, on_frozen)

    assert len(seen) == 1
    assert seen[0] <= {"t", "T"}
    eventually(lambda: "R" in run_states(job.capsule), "the job runs on")


def test_error_while_frozen_fails_the_dump_and_not_the_job(place: Place) -> None:
    job = counter(place)

    def on_frozen() -> None:
        raise KeyError("no room")

    with pytest.raises(KeyError, match="no room"):
        place.dump(job, on_frozen)
    assert goes_on(place)
    place.dump(job)
    assert ends_well(place, job)


def test_dump_that_a_signal_breaks_off_is_begun_again_at_once(user_place: Place) -> None:
    """Schedulers send SIGCONT before SIGTERM: it takes the job out of the stop that CRIU has put it into."""
    job = counter(user_place)
    calls: list[int] = []

    def on_frozen() -> None:
        calls.append(len(calls))
        if len(calls) == 1:
            for pid in job.capsule.tasks():
                os.kill(pid, signal.SIGCONT)

    _, result = user_place.dump(job, on_frozen, mode="forked")

    assert (result.mode, result.reason, len(calls)) == ("forked", None, 2)
    assert goes_on(user_place)
    assert ends_well(user_place, job)


def test_signals_at_any_moment_of_a_dump_cost_no_checkpoint(user_place: Place) -> None:
    job = counter(user_place)
    for number in range(12):
        timer = threading.Timer(0.005 * number, os.kill, (job.pid, signal.SIGCONT))
        timer.start()
        user_place.dump(job, mode="plain")
        timer.join()

    assert goes_on(user_place)
    assert ends_well(user_place, job)


def test_refusal_is_in_criu_words_with_a_hint(place: Place) -> None:
    job = place.python(
        """
        ring = ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(120))
        say("ready" if ring > 0 else "no ring")
        wait("go")
        sys.exit(4)
        """,
        compat_filter=False,
    )
    job.says("ready")

    with pytest.raises(CriuError, match=r"^dump: (Can't retrieve FDs|.*io_uring)") as caught:
        place.dump(job)
    assert caught.value.hint is not None
    assert "compat filter" in caught.value.hint
    assert "Error" in caught.value.log.read_text()
    place.touch("go")
    assert job.ended() == exit_code(4)


def test_connection_to_a_daemon_outside_is_refused_with_a_hint(place: Place) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as daemon:
        daemon.bind(str(place.path / "daemon"))
        (place.path / "daemon").chmod(0o666)
        daemon.listen(1)
        job = place.python("""
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.connect("daemon")
            say("ready")
            sys.exit(connection.recv(1)[0])
        """)
        connection, _ = daemon.accept()
        job.says("ready")

        with connection, pytest.raises(CriuError, match="unix") as caught:
            place.dump(job)
        assert caught.value.hint == "the job talks to a daemon over a unix socket; close it"


def test_job_with_a_refused_dump_still_has_its_connection(place: Place) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as daemon:
        daemon.bind(str(place.path / "daemon"))
        (place.path / "daemon").chmod(0o666)
        daemon.listen(1)
        job = place.python("""
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.connect("daemon")
            sys.exit(connection.recv(1)[0])
        """)
        connection, _ = daemon.accept()
        with connection:
            with pytest.raises(CriuError):
                place.dump(job)
            connection.send(b"\x09")

            assert job.ended() == exit_code(9)


def test_dump_of_a_job_that_has_ended_is_an_error(place: Place) -> None:
    job = place.start(["true"])
    job.ended()

    with pytest.raises(CriuError):
        place.dump(job)


# A manager that is killed: dumps the capsule it is told, and stands still when the job does.
MANAGER = """
import sys, time
from pathlib import Path
from criu_backend import Capsule, Criu
capsule = Capsule.find(*map(int, sys.argv[3:]))
print("dumping", flush=True)
def on_frozen():
    print("frozen", flush=True)
    time.sleep(float(sys.stdin.readline()))
Criu().dump(capsule, Path(sys.argv[1]), on_frozen, mode=sys.argv[2])
"""


def manager(place: Place, job: Job, pause: float, mode: str = "plain") -> subprocess.Popen[bytes]:
    capsule = job.capsule
    numbers = (capsule.init_pid, capsule.init_start, capsule.job_pid)
    process = subprocess.Popen(
        [sys.executable, "-c", MANAGER, str(place.images()), mode, *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(f"{pause}\n".encode())
    process.stdin.flush()
    assert process.stdout is not None
    assert process.stdout.readline() == b"dumping\n"
    return process


def no_criu_is_left(place: Place) -> bool:
    """Whether no process works on the test's images any more."""
    mark = os.fsencode(place.path / "images")
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in cmdline.read_bytes():
                return False
        except (FileNotFoundError, ProcessLookupError):
            continue
    return True


def test_manager_killed_while_the_job_stands_still_costs_the_job_nothing(place: Place) -> None:
    job = counter(place)
    with manager(place, job, 60) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"frozen\n"
        assert run_states(job.capsule) <= {"t", "T"}
        process.send_signal(signal.SIGKILL)

    assert goes_on(place)
    eventually(lambda: no_criu_is_left(place), "CRIU has ended")
    place.dump(job)
    assert goes_on(place)
    assert ends_well(place, job)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", ["plain", "forked"])
def test_manager_killed_at_any_moment_costs_the_job_nothing(user_place: Place, mode: str) -> None:
    job = counter(user_place, mib=32)
    for _ in range(8):
        with manager(user_place, job, 0, mode) as process:
            time.sleep(random.uniform(0, 0.25))  # noqa: S311 - a moment, not a secret
            process.send_signal(signal.SIGKILL)

        assert goes_on(user_place)
        eventually(lambda: no_criu_is_left(user_place), "CRIU has ended")
    _, result = user_place.dump(job, mode=mode)
    assert (result.mode, result.reason) == (mode, None)
    init = job.capsule.init_pid
    # Those of the managers that were killed, and those of the last dump.
    children = Path(f"/proc/{init}/task/{init}/children")
    eventually(lambda: children.read_text().split() == [str(job.pid)], "no twin is left")
    assert ends_well(user_place, job)


def test_signals_do_not_reach_a_criu_at_work(user_place: Place) -> None:
    """The manager's own end by a terminal or a service manager signals its whole group."""
    job = counter(user_place, mib=16)
    with manager(user_place, job, 0.5) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"frozen\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(int(children[0]), number)

        assert process.wait(timeout=20) == 0
    assert goes_on(user_place)
    assert ends_well(user_place, job)


def test_missing_criu_is_an_error_with_a_hint() -> None:
    with pytest.raises(CriuError, match="no-criu") as caught:
        Criu("/usr/sbin/no-criu").version()
    assert caught.value.hint == "install criu 4.2 or later"


def test_older_criu_is_refused(tmp_path: Path) -> None:
    older = tmp_path / "criu"
    older.write_text("#!/bin/sh\necho 'Version: 3.17.1'\n")
    older.chmod(0o755)

    with pytest.raises(CriuError, match=r"criu 3\.17\.1 is too old") as caught:
        Criu(str(older)).version()
    assert caught.value.hint == "install criu 4.2 or later"


def test_criu_works_on_this_kernel() -> None:
    Criu().check()
