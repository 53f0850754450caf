"""A job restored by post-copy runs before its memory is there, and computes as if it had been there."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from criu_backend import PageServer, first_wanted, write_eager_pages
from tests.criu.capsules import Job, Place
from tests.criu.waiting import eventually, exit_code

pytestmark = pytest.mark.criu

PAGE = 4096

# Holds 64 MiB that it can check, and checks them when told; counts meanwhile.
HOLDER = """
    import hashlib
    block = bytearray(os.urandom(1 << 20) * 64)
    digest = hashlib.sha256(block).hexdigest()
    def count():
        number = 0
        while True:
            number += 1
            ticks[0] = number
            time.sleep(0.01)
    ticks = [0]
    threading.Thread(target=count, daemon=True).start()
    say("ready")
    wait("go")
    say("ticks", ticks[0])
    say("same" if hashlib.sha256(block).hexdigest() == digest else "DIFFERENT")
"""


class Source:
    """The pages of a dump, given as slowly as a test wants."""

    def __init__(self, job: Job, place: Place) -> None:
        self.images = place.images()
        self.dump = place.criu.dump(job.capsule, self.images, lambda: None, mode="plain")
        self.runs = {memory.name: memory.runs for memory in self.dump.memories}
        self.total = sum(pages for some in self.runs.values() for _, _, pages in some)
        self.given = 0
        self.fail_after = 1 << 60
        self.slow = 0.0  # seconds that each request takes
        self.gate = threading.Event()
        self.gate.set()

    def read(self, space: int, vaddr: int, pages: int) -> bytes:
        self.gate.wait(20)
        time.sleep(self.slow)
        if self.given > self.fail_after:
            raise OSError("the store is gone")
        buffer = bytearray(pages * PAGE)
        for memory in self.dump.memories:
            try:
                memory.readinto(space, vaddr, memoryview(buffer))
            except OSError:
                continue
            self.given += pages
            return bytes(buffer)
        raise OSError(f"no page at {vaddr:#x}")


def restored(place: Place, job: Job, source: Source, *, open_gate: bool = True) -> tuple[Job, PageServer]:
    """Kill *job* and bring it back in the place of another peer, its pages to follow when the gate is open."""
    place.lose(job)
    assert write_eager_pages(source.images, source.runs, source.read) == source.given
    if not open_gate:
        source.gate.clear()
    link, pages = socket.socketpair()
    server = PageServer(source.runs, source.read, place.criu.version(), link)
    return place.restore(source.images, pages=pages), server


def test_job_goes_on_and_has_its_memory(place: Place) -> None:
    job = place.python(HOLDER)
    job.says("ready")
    again, server = restored(place, job, Source(job, place))

    assert server.wait(60)
    assert (server.error, server.complete) == (None, True)
    place.touch("go")
    again.says("same")
    assert again.ended() == exit_code(0)


def test_job_runs_while_most_of_its_memory_is_not_there(place: Place) -> None:
    job = place.python(HOLDER)
    job.says("ready")
    source = Source(job, place)
    again, server = restored(place, job, source, open_gate=False)
    given = source.given

    place.touch("go")
    source.gate.set()
    again.says("same")
    assert given < source.total / 10
    assert server.wait(60)
    assert again.ended() == exit_code(0)


def test_what_is_restored_at_once_does_not_follow(place: Place) -> None:
    job = place.python(HOLDER)
    job.says("ready")
    source = Source(job, place)
    again, server = restored(place, job, source, open_gate=False)
    at_once = source.given
    source.gate.set()

    assert server.wait(60)
    assert at_once > 500  # the interpreter's stacks, heaps and libraries' data
    assert server.pages <= source.total - at_once
    place.touch("go")
    again.says("same")
    assert again.ended() == exit_code(0)


def test_smallest_runs_are_wanted_first() -> None:
    runs = [(1, 0x1000, 3), (1, 0x9000, 300), (2, 0x1000, 1), (1, 0x5000, 2), (2, 0x8000, 250)]

    assert first_wanted(runs, 5) == {(2, 0x1000, 1), (1, 0x5000, 2)}
    assert first_wanted(runs, 6) == {(2, 0x1000, 1), (1, 0x5000, 2), (1, 0x1000, 3)}
    assert first_wanted(runs, 1000) == {*runs} - {(1, 0x9000, 300)}


def test_failing_store_ends_the_job_before_it_computes_on_zeros(place: Place) -> None:
    job = place.python(HOLDER)
    job.says("ready")
    source = Source(job, place)
    source.slow = 0.02
    again, server = restored(place, job, source)
    source.fail_after = source.given + 500

    assert server.wait(60)
    assert not server.complete
    eventually(lambda: not again.capsule.alive, "the capsule has ended")
    assert again.peer.hears_no_more()
    assert "DIFFERENT" not in again.said()
    assert not (again.state / "exit").exists()


def test_job_may_end_while_its_pages_still_follow(place: Place) -> None:
    job = place.python(HOLDER.replace('say("ticks", ticks[0])', "os._exit(3)"))
    job.says("ready")
    source = Source(job, place)
    source.slow = 0.02
    again, server = restored(place, job, source)
    place.touch("go")

    assert again.ended() == exit_code(3)
    assert server.wait(60)
    assert source.given < sum(pages for some in source.runs.values() for _, _, pages in some)
