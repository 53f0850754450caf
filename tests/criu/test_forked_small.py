"""What small twins hold is kept, they end at once, and the job's first writes afterwards are no faults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from criu_backend import put_back
from tests.criu.capsules import Place
from tests.criu.test_forked import answer, answering, children_of_init, forked, only_the_job_is_left
from tests.criu.visible import tasks_of
from tests.criu.waiting import eventually

pytestmark = pytest.mark.criu


def test_twin_of_a_small_job_ends_at_once_and_its_memory_is_kept(user_place: Place) -> None:
    job = answering(
        user_place,
        """
    import hashlib
    data = bytearray(os.urandom(24 << 20))
    def check():
        was = hashlib.sha256(data).hexdigest()
        for page in range(0, len(data), 4096): data[page] ^= 255
        return was
        """,
    )
    images = user_place.images()
    with user_place.criu.dump(job.capsule, images, lambda: None, mode="forked") as result:
        assert (result.mode, result.reason) == ("forked", None)
        eventually(lambda: only_the_job_is_left(job), "the twin is gone")
        before = answer(user_place, job, 0)
        put_back(result.memories, images)
    user_place.touch("ask.1")
    assert answer(user_place, job, 1) != before
    for number in range(2):
        (user_place.path / f"ask.{number}").unlink()
    user_place.lose(job)
    job = user_place.restore(images)

    user_place.touch("ask.0")
    eventually(lambda: job.said().count(f"answer 0 {before}") == 2, "the memory of the instant of the dump")


# check() counts up each of 6144 pages, and tells how many of the writes were faults, and the sum of all pages.
WRITING = """
    import mmap, resource
    memory = mmap.mmap(-1, 24 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    def check():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for page in range(0, len(memory), 4096): memory[page] += 1
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before} {sum(memory[::4096])}"
    check()
"""


def test_first_writes_after_a_small_dump_are_no_faults(user_place: Place) -> None:
    job = answering(user_place, WRITING)
    forked(user_place, job)

    assert int(answer(user_place, job, 0).split()[0]) < 600


def test_first_writes_after_a_twin_that_lasts_are_faults(user_place: Place, lasting_twins: None) -> None:
    """The test above can fail."""
    job = answering(user_place, WRITING)
    forked(user_place, job)

    assert int(answer(user_place, job, 0).split()[0]) >= 6144


def test_tree_that_outgrows_the_room_for_its_memory_is_read_from_twins_that_last(
    user_place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("criu_backend._small._GROWTH", -(8 << 20))
    job = answering(user_place, WRITING)
    images = user_place.images()
    with user_place.criu.dump(job.capsule, images, lambda: None, mode="forked") as result:
        assert (result.mode, result.reason) == ("forked", None)
        assert len(children_of_init(job)) == 2
        put_back(result.memories, images)
    user_place.lose(job)
    job = user_place.restore(images)

    assert answer(user_place, job, 0).split()[1] == str(2 * 6144)


def test_memory_that_processes_of_a_job_share_stays_shared(user_place: Place) -> None:
    job = answering(user_place, WRITING + "    if os.fork() == 0: time.sleep(60)\n")
    eventually(lambda: len(tasks_of(job.capsule)) == 2, "it has a child")
    forked(user_place, job)

    assert all(private_mib(pid) < 12 for pid in tasks_of(job.capsule).values())


def private_mib(pid: int) -> int:
    match = re.search(r"^Private_Dirty:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    assert match is not None
    return int(match[1]) >> 10
