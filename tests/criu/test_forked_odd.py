"""Forked dumps of jobs that are not as most are: wide or deep trees, huge pages, threads without a leader."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from criu_backend import CriuError
from tests.criu.capsules import Place
from tests.criu.test_forked import answer, answering, forked
from tests.criu.waiting import eventually, exit_code

pytestmark = pytest.mark.criu

_NR_HUGEPAGES = Path("/proc/sys/vm/nr_hugepages")


@pytest.fixture
def huge_pages(need: Callable[[str, str | None], None]) -> Iterator[None]:
    """Eight huge pages of 2 MiB are there to be had."""
    before = _NR_HUGEPAGES.read_text()
    try:
        _NR_HUGEPAGES.write_text("8")
    except OSError as error:
        need("hugetlb", f"{_NR_HUGEPAGES}: {error.strerror}")
    yield
    _NR_HUGEPAGES.write_text(before)


def test_huge_pages_are_of_the_instant_of_the_dump(
    user_place: Place, huge_pages: None, either_way: None
) -> None:
    job = answering(
        user_place,
        """
    import mmap
    area = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
    area[0] = area[2 << 20] = 1
    def check():
        seen = area[0], area[2 << 20]
        area[0] += 1
        area[2 << 20] += 1
        return seen
        """,
    )
    assert answer(user_place, job, 0) == "(1, 1)"
    images = forked(user_place, job)
    assert answer(user_place, job, 1) == "(2, 2)"
    user_place.lose(job)
    again = user_place.restore(images)

    # It was asked before it was lost, and answers as it did.
    eventually(lambda: again.said().count("answer 1 (2, 2)") == 2, "the same answer as before")
    user_place.touch("stop")
    assert again.ended() == exit_code(3)


# A tree of 64: children of the job's root, or each the child of the one before. Each has memory of its own that it
# changes when it is asked, and tells of.
_TREE = """
    import mmap, socket
    def serve(end, number):
        area = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.write(bytes([number]) * len(area))
        while end.recv(1):
            end.sendall(bytes([number if area[:] == bytes([area[0]]) * len(area) else 255, area[0] - number]))
            area.seek(0)
            area.write(bytes([area[0] + 1]) * len(area))
        os._exit(0)
    ends = [socket.socketpair() for _ in range(64)]
    deep = {deep}
    def grow(number):
        pid = os.fork()
        if pid == 0:
            if deep and number < 63: grow(number + 1)
            serve(ends[number][1], number)
    if deep: grow(1)
    else:
        for number in range(1, 64): grow(number)
    def ask(end):
        end.sendall(b"?")
        return tuple(end.recv(2, socket.MSG_WAITALL))
    def check():
        told = [ask(mine) for mine, _ in ends[1:]]
        return [number for number, _ in told] == list(range(1, 64)), {{count for _, count in told}}
"""


@pytest.mark.parametrize("deep", [False, True], ids=["wide", "deep"])
@pytest.mark.timeout(120)
def test_tree_of_64_processes_is_of_one_instant(user_place: Place, deep: bool, either_way: None) -> None:
    job = answering(user_place, _TREE.format(deep=deep))
    assert answer(user_place, job, 0) == "(True, {0})"
    images = forked(user_place, job)
    assert answer(user_place, job, 1) == "(True, {1})"
    user_place.lose(job)
    again = user_place.restore(images)

    # It was asked before it was lost, and answers as it did.
    eventually(lambda: again.said().count("answer 1 (True, {1})") == 2, "the same answer as before")
    assert answer(user_place, again, 2) == "(True, {2})"
    user_place.touch("stop")
    assert again.ended() == exit_code(3)


@pytest.mark.parametrize("mode", ["plain", "forked"])
def test_process_whose_first_thread_has_ended_is_refused_and_runs_on(
    user_place: Place, mode: str, need: Callable[[str, str | None], None]
) -> None:
    need("gcc", None if shutil.which("gcc") else "no gcc; install it")
    program = user_place.path / "leaderless"
    source = Path(__file__).parent / "kinds/leaderless.c"
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-pthread", "-o", program, source], check=True)
    job = user_place.start([str(program)])
    eventually(lambda: len(job.said()) > 3, "the second thread counts")
    with pytest.raises(CriuError) as caught:
        user_place.dump(job, mode=mode)
    before = len(job.said())
    eventually(lambda: len(job.said()) > before + 3, "the second thread goes on counting")
    assert "pthread_join" in str(caught.value.hint)
    user_place.touch("stop")
    assert job.ended() == exit_code(3)
