"""Each kind of thing that a job may hold survives, or is refused in words that say what to do."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from criu_backend import Criu, CriuError, best_mode, explain, known_self_test, self_test
from outlast.config import CheckpointConfig
from tests.criu.capsules import ENVIRONMENT, Job, Place
from tests.criu.conftest import USER
from tests.criu.kinds.table import REFUSED, TCP_OUTSIDE, WORKS, Kind, Refused
from tests.criu.saved import Saved
from tests.criu.waiting import eventually, exit_code

pytestmark = pytest.mark.criu

HERE = Path(__file__).parent / "kinds"
TICK = re.compile(r"tick (\d+) (.*)")


@pytest.fixture(scope="session")
def programs() -> Iterator[Path]:
    """A directory that every user may look into: what has been compiled, and what needs no compiling."""
    top = Path(tempfile.mkdtemp(prefix="kinds-", dir="/tmp"))
    top.chmod(0o755)
    path = top / "kinds"  # holds.py is a module of a package of this name
    path.mkdir()
    for source in HERE.iterdir():
        if source.is_file():
            shutil.copy(source, path)
    yield path
    shutil.rmtree(top)


@pytest.fixture(scope="session")
def why_not_forked() -> str | None:
    """Why this node makes no forked dumps, if it does not."""
    criu = Criu()
    if known_self_test(criu) is None:
        self_test(criu)
    mode, reason = best_mode("forked", criu)
    return None if mode == "forked" else reason or mode


@pytest.fixture
def place_of(request: pytest.FixtureRequest) -> Iterator[Callable[[Kind], Place]]:
    """Make the place for a kind: its user's."""
    with contextlib.ExitStack() as closing:

        def make(kind: Kind) -> Place:
            path = Path(tempfile.mkdtemp(prefix="criu-", dir="/tmp"))
            path.chmod(0o755)
            uid = 0 if kind.root else USER
            os.chown(path, uid, uid)
            place = Place(path, uid, mode="plain")
            closing.callback(place.close)
            return place

        yield make


Start = Callable[[Place, Kind], Job]


@pytest.fixture
def start(programs: Path, need: Callable[[str, str | None], None]) -> Start:
    """Start the program of a kind, and wait for its first ticks."""

    def begin(place: Place, kind: Kind) -> Job:
        if kind.needs:
            need(
                "criu" if not kind.long else "languages",
                None if shutil.which(kind.needs) else f"no {kind.needs}",
            )
        names = {"here": str(programs), "built": str(programs)}
        if kind.build and not (programs / f"{kind.name}.built").exists():
            command = [word.format_map(names) for word in kind.build]
            done = subprocess.run(command, cwd=programs, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            (programs / f"{kind.name}.built").touch()
        argv = [
            word.format_map(names) if "{built}" in word or "{here}" in word else word for word in kind.command
        ]
        environment = {**ENVIRONMENT, "HOME": str(place.path), "OMP_WAIT_POLICY": "passive"}
        unfiltered = isinstance(kind, Refused) and kind.unfiltered
        job = place.start(argv, environment=environment, compat_filter=not unfiltered)
        eventually(lambda: len(ticks(job)) > 2, f"{kind.name} begins; it said {job.said()}")
        return job

    return begin


def ticks(job: Job) -> list[tuple[int, str]]:
    """What the job has said so far of what it holds."""
    return [(int(match[1]), match[2].strip()) for line in job.said() if (match := TICK.fullmatch(line))]


def goes_on(job: Job) -> bool:
    """Whether the job says more."""
    before = len(ticks(job))
    eventually(lambda: len(ticks(job)) > before + 2, f"the job goes on; it said {job.said()[-3:]}")
    return True


def nothing_is_lost(job: Job) -> bool:
    """Whether the job has told each number once, in order, and each time that all was well."""
    said = ticks(job)
    assert [number for number, _ in said] == list(range(len(said)))
    assert {word for _, word in said} == {"ok"}
    return True


@pytest.mark.parametrize("mode", ["plain", "forked"])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.long] * kind.long, id=kind.name) for kind in WORKS]
)
@pytest.mark.timeout(120)
def test_works(
    kind: Kind, mode: str, place_of: Callable[[Kind], Place], start: Start, why_not_forked: str | None
) -> None:
    if mode == "forked" and why_not_forked is not None:
        pytest.skip(f"no forked dumps on this node: {why_not_forked}")
    place = place_of(kind)
    job = start(place, kind)
    saved = Saved(place, job, CheckpointConfig(), mode=mode, lose=False)
    assert (saved.result.mode, saved.result.reason) == (mode, None)
    assert goes_on(job)
    assert nothing_is_lost(job)
    place.lose(job)

    restored = saved.restore()
    if (place.path / "end.asked").exists():
        place.touch("end")

    assert goes_on(restored)
    assert nothing_is_lost(restored)
    again = Saved(place, restored, CheckpointConfig(), mode=mode).restore()
    assert goes_on(again)
    if kind.exit_code is not None:
        place.touch("stop")
        assert again.ended() == exit_code(kind.exit_code)


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.name) for kind in WORKS if not kind.long])
def test_nothing_is_said_against_what_works(
    kind: Kind, place_of: Callable[[Kind], Place], start: Start
) -> None:
    place = place_of(kind)
    job = start(place, kind)

    assert [str(one) for one in explain(job.capsule.tasks(), job.capsule.init_pid)] == []
    assert goes_on(job)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one CPU only")
def test_cpu_affinity_after_a_restore_is_that_of_the_new_allocation(place: Place) -> None:
    job = place.python(
        """
        threading.Thread(target=time.sleep, args=[600], daemon=True).start()
        say("ready")
        while True: time.sleep(0.01)
        """,
        place.peer(prepare=lambda: os.sched_setaffinity(0, {0})),
    )
    job.says("ready")
    assert affinities(job) == [{0}, {0}]
    images, _ = place.dump(job)
    place.lose(job)

    restored = place.restore(images, place.peer(prepare=lambda: os.sched_setaffinity(0, {1})))

    assert affinities(restored) == [{1}, {1}]


def affinities(job: Job) -> list[set[int]]:
    """On which CPUs each thread of the job may run."""
    return [os.sched_getaffinity(int(task.name)) for task in Path(f"/proc/{job.pid}/task").iterdir()]


def echo(listener: socket.socket) -> None:
    """Serve one connection of a job to the outside."""
    with contextlib.suppress(OSError):
        connection, _ = listener.accept()
        with connection:
            while data := connection.recv(9):
                connection.sendall(data)


@pytest.fixture
def outside() -> Iterator[Callable[[Place], None]]:
    """Daemons that are no part of the job: at the UNIX socket `daemon`, and at the TCP port in `port`."""
    with contextlib.ExitStack() as closing:

        def open_(place: Place) -> None:
            local = closing.enter_context(socket.socket(socket.AF_UNIX))
            local.bind(str(place.path / "daemon"))
            (place.path / "daemon").chmod(0o666)
            local.listen(1)
            remote = closing.enter_context(socket.create_server(("127.0.0.1", 0)))
            (place.path / "port").write_text(str(remote.getsockname()[1]))
            for listener in (local, remote):
                threading.Thread(target=echo, args=[listener], daemon=True).start()

        yield open_


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.name) for kind in REFUSED])
def test_is_refused_and_explained(
    kind: Refused,
    place_of: Callable[[Kind], Place],
    start: Start,
    outside: Callable[[Place], None],
) -> None:
    place = place_of(kind)
    outside(place)
    job = start(place, kind)

    with pytest.raises(CriuError, match=rf"^dump: .*({kind.said})") as caught:
        place.dump(job)
    found = explain(job.capsule.tasks(), job.capsule.init_pid)

    assert caught.value.hint
    assert {one.kind for one in found if one.stops} == ({kind.finding} if kind.finding else set())
    assert goes_on(job)
    assert nothing_is_lost(job)


def test_connection_to_another_host_is_dead_after_a_restore_and_told_of_before(
    place_of: Callable[[Kind], Place], start: Start, outside: Callable[[Place], None]
) -> None:
    place = place_of(TCP_OUTSIDE)
    outside(place)
    job = start(place, TCP_OUTSIDE)

    found = explain(job.capsule.tasks(), job.capsule.init_pid)

    assert [(one.kind, one.stops) for one in found] == [("tcp-outside", False)]
    port = (place.path / "port").read_text()
    assert str(found[0]).endswith(f"a TCP connection to 127.0.0.1:{port}, which is dead after a restore")


def test_explaining_costs_the_job_milliseconds(place_of: Callable[[Kind], Place], start: Start) -> None:
    kind = next(kind for kind in WORKS if kind.name == "process-pool")
    place = place_of(kind)
    job = start(place, kind)

    begin = time.process_time()
    for _ in range(10):
        explain(job.capsule.tasks(), job.capsule.init_pid)

    assert (time.process_time() - begin) / 10 < 0.05
