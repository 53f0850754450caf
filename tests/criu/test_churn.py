"""Jobs that start processes all the time, as scripts do; some are just beginning or ending when CRIU comes."""

from __future__ import annotations

import time

import pytest

from tests.criu.capsules import Place
from tests.criu.test_forked import answer, answering, only_the_job_is_left
from tests.criu.waiting import eventually, exit_code

pytestmark = pytest.mark.criu

_DUMPS = 15
# Four processes that start others without end, each in its own way: fork(), fork() within fork(), vfork() and a
# shell's pipelines. Asked, the job says whether all four went on.
_STARTING = """
    import mmap, subprocess
    counts = mmap.mmap(-1, 4096)
    def count(place):
        return int.from_bytes(counts[8 * place:8 * place + 8], "little")
    def fork_once():
        pid = os.fork()
        if pid == 0: os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    def fork_twice():
        pid = os.fork()
        if pid == 0:
            memory = os.urandom(1 << 20)
            os._exit(8 if fork_once() and len(memory) == 1 << 20 else 1)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 8
    def spawn():
        return subprocess.call(["/bin/true"]) == 0
    def pipeline():
        return subprocess.check_output("echo one two | tr o 0 | sort", shell=True) == b"0ne tw0\\n"
    starters = fork_once, fork_twice, spawn, pipeline
    for place, start in enumerate(starters):
        if os.fork() == 0:
            while start():
                counts[8 * place:8 * place + 8] = (count(place) + 1).to_bytes(8, "little")
            say("wrong", start.__name__)
            os._exit(1)
    def check():
        before = [count(place) for place in range(4)]
        until = time.monotonic() + 30
        while True:
            done = [count(place) > before[place] + 2 for place in range(4)]
            if all(done) or time.monotonic() > until: return done
            time.sleep(0.01)
"""


@pytest.mark.parametrize("mode", ["plain", "forked"])
@pytest.mark.timeout(240)
def test_job_that_starts_processes_all_the_time_is_saved_and_goes_on(user_place: Place, mode: str) -> None:
    job = answering(user_place, _STARTING)
    for number in range(_DUMPS):
        images, result = user_place.dump(job, mode=mode)
        assert (result.mode, result.reason) == (mode, None)
        time.sleep(0.01 * number)  # not in step with what the job does

    assert answer(user_place, job, 0) == "[True, True, True, True]"
    eventually(lambda: only_the_job_is_left(job), "the twins are gone")
    user_place.lose(job)
    again = user_place.restore(images)
    assert answer(user_place, again, 1) == "[True, True, True, True]"
    assert not [line for line in again.said() if line.startswith("wrong")]
    user_place.touch("stop")
    assert again.ended() == exit_code(3)
