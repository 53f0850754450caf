"""A forked dump holds what was at the instant of the freezing, and leaves the job as a plain dump does."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from criu_backend import put_back
from criu_backend._memory import RunIndex
from tests.criu.capsules import Job, Place
from tests.criu.visible import quiet, status_of, tasks_of, visible_state
from tests.criu.waiting import eventually, exit_code

pytestmark = pytest.mark.criu

# Answers to each file "ask.N" with a line: what check() returns.
ANSWERING = """
    say("ready")
    asked = 0
    while not os.path.exists("stop"):
        if os.path.exists(f"ask.{asked}"):
            say("answer", asked, check())
            asked += 1
        time.sleep(0.005)
    sys.exit(3)
"""


@pytest.fixture(scope="session")
def writers(tmp_path_factory: pytest.TempPathFactory, need: Callable[[str, str | None], None]) -> Path:
    """The program writers.c, where every user may run it."""
    need("gcc", None if shutil.which("gcc") else "no gcc; install it")
    program = tmp_path_factory.mktemp("writers") / "writers"
    for directory in (program.parent, program.parent.parent, program.parent.parent.parent):
        directory.chmod(0o755)
    source = Path(__file__).with_name("writers.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-pthread", "-o", program, source], check=True)
    return program


def forked(place: Place, job: Job) -> Path:
    """Dump *job* from twins; return the images' directory, with all memory in it."""
    images, result = place.dump(job, mode="forked")
    assert (result.mode, result.reason) == ("forked", None)
    return images


def answering(place: Place, setup: str) -> Job:
    job = place.python(setup + ANSWERING)
    job.says("ready")
    return job


def answer(place: Place, job: Job, number: int) -> str:
    """Ask a job made by `answering`."""
    place.touch(f"ask.{number}")
    start = f"answer {number} "
    eventually(lambda: any(line.startswith(start) for line in job.said()), f"answer {number}")
    return next(line.removeprefix(start) for line in reversed(job.said()) if line.startswith(start))


def children_of_init(job: Job) -> list[int]:
    init = job.capsule.init_pid
    return [int(pid) for pid in Path(f"/proc/{init}/task/{init}/children").read_text().split()]


def only_the_job_is_left(job: Job) -> bool:
    return children_of_init(job) == [job.pid]


@pytest.mark.parametrize("threads", [1, 2, 4, 8])
@pytest.mark.timeout(120)
def test_writers_at_full_speed_are_whole_afterwards_and_after_a_restore(
    user_place: Place, writers: Path, threads: int
) -> None:
    job = user_place.start([str(writers), "64", str(threads)])
    job.says("ready")

    def whole(job: Job) -> list[str]:
        before = len(job.said())
        os.kill(job.pid, signal.SIGUSR1)
        eventually(lambda: len(job.said()) >= before + threads, "all threads answer")
        return sorted(job.said()[before:])

    time.sleep(0.3)  # every page is written to several times
    good = sorted(f"thread {number} whole" for number in range(threads))
    images = forked(user_place, job)

    assert whole(job) == good
    user_place.lose(job)
    job = user_place.restore(images)
    assert whole(job) == good


@pytest.mark.timeout(180)
def test_tenth_generation_is_as_good_as_the_first(user_place: Place, either_way: None) -> None:
    job = answering(
        user_place,
        """
    import hashlib
    data = os.urandom(8 << 20)
    before = hashlib.sha256(data).digest()
    child = os.fork()
    if child == 0:
        while True: time.sleep(60)
    def check():
        os.kill(child, 0)
        return hashlib.sha256(data).digest() == before
        """,
    )
    for generation in range(10):
        images = forked(user_place, job)
        user_place.lose(job)
        job = user_place.restore(images)

        assert answer(user_place, job, generation) == "True"
    user_place.touch("stop")
    assert job.ended() == exit_code(3)


def test_nothing_of_a_twin_is_left(place: Place, lasting_twins: None) -> None:
    job = answering(place, "    def check(): return 1\n")
    images = place.images()
    with place.criu.dump(job.capsule, images, lambda: None, mode="forked") as result:
        assert len(children_of_init(job)) == 2
        assert list(images.glob("pages-*")) == []
        put_back(result.memories, images)

    eventually(lambda: only_the_job_is_left(job), "the twin is gone")
    assert not images.with_name(images.name + ".pages").exists()
    assert {path.name for path in images.iterdir() if not path.name.endswith(".img")} == {
        "dump.log",
        "stats-dump",
    }
    assert "vdso" in Path(f"/proc/{job.pid}/maps").read_text()


def test_twin_is_the_first_to_go_when_memory_is_short(user_place: Place, lasting_twins: None) -> None:
    job = answering(user_place, "    def check(): return 1\n")
    with user_place.criu.dump(job.capsule, user_place.images(), lambda: None, mode="forked"):
        (twin,) = [pid for pid in children_of_init(job) if pid != job.pid]

        assert Path(f"/proc/{twin}/oom_score_adj").read_text() == "1000\n"


def test_lost_twin_is_an_error_and_costs_the_job_nothing(user_place: Place, lasting_twins: None) -> None:
    job = answering(user_place, "    def check(): return 1\n")
    with user_place.criu.dump(job.capsule, user_place.images(), lambda: None, mode="forked") as result:
        for pid in children_of_init(job):
            if pid != job.pid:
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: only_the_job_is_left(job), "the twin is gone")

        with pytest.raises(OSError, match=r"gone|No such process"):
            put_back(result.memories, user_place.images())
    assert answer(user_place, job, 0) == "1"


@pytest.mark.timeout(150)
def test_twin_whose_reader_is_gone_ends_by_itself(user_place: Place) -> None:
    job = answering(user_place, "    def check(): return 1\n")
    numbers = f"{job.capsule.init_pid}, {job.capsule.init_start}, {job.capsule.job_pid}"
    program = (
        "import os, signal; from pathlib import Path; from criu_backend import Capsule, Criu, _small\n"
        "_small._MOST_TAKEN = -1\n"
        f"Criu().dump(Capsule({numbers}), Path({str(user_place.images())!r}), lambda: None, mode='forked')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run(["/usr/bin/python3", "-c", program], check=False)

    assert len(children_of_init(job)) == 2
    eventually(lambda: only_the_job_is_left(job), "the twin is gone", 100)


def test_twin_of_a_dead_reader_is_gone_with_the_next_dump(user_place: Place, lasting_twins: None) -> None:
    job = answering(user_place, "    def check(): return 1\n")
    user_place.criu.dump(job.capsule, user_place.images(), lambda: None, mode="forked")

    user_place.dump(job, mode="plain")
    eventually(lambda: only_the_job_is_left(job), "the twin is gone")


def test_forked_dump_changes_nothing_that_the_job_can_see(place: Place) -> None:
    job = place.python("""
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        for _ in range(3): threading.Thread(target=time.sleep, args=[60], daemon=True).start()
        if os.fork() == 0: time.sleep(60)
        say("ready")
        wait("go")
    """)
    job.says("ready")
    quiet(job.capsule)
    before = visible_state(job.capsule)
    for _ in range(3):
        forked(place, job)

    assert visible_state(job.capsule) == before


def test_orphans_stay_below_the_root_after_a_forked_dump(user_place: Place) -> None:
    job = user_place.python("""
        root = os.getpid()
        def orphan():
            if os.fork() == 0:
                if os.fork() == 0:
                    while os.getppid() != root: time.sleep(0.01)
                    say("adopted")
                    time.sleep(60)
                os._exit(0)
            os.wait()
        say("ready")
        wait("go")
        orphan()
        time.sleep(60)
    """)
    job.says("ready")
    forked(user_place, job)
    user_place.touch("go")

    job.says("adopted")


def test_what_a_killed_criu_left_undone_is_done_by_the_next_dump(user_place: Place) -> None:
    """CRIU may be killed when the job's root does not take orphans."""
    job = user_place.python("""
        ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)
        root = os.getpid()
        say("ready")
        wait("go")
        if os.fork() == 0:
            if os.fork() == 0:
                while os.getppid() not in (1, root): time.sleep(0.01)
                say("child of", os.getppid())
                time.sleep(60)
            os._exit(0)
        os.wait()
        time.sleep(60)
    """)
    job.says("ready")
    (user_place.path / ".forked").touch()
    user_place.dump(job, mode="plain")
    user_place.touch("go")

    job.says(f"child of {job.capsule.job_pid}")
    assert not (user_place.path / ".forked").exists()


def test_shared_memory_is_of_the_same_instant(user_place: Place, either_way: None) -> None:
    """Two counters in shared and private memory are counted up in turn: they differ by one at most."""
    job = user_place.python("""
        import mmap
        shared, private = mmap.mmap(-1, 4096), bytearray(4096)
        def count():
            number = 0
            while True:
                number += 1
                struct.pack_into("<Q", shared, 0, number)
                struct.pack_into("<Q", private, 0, number)
        def look():
            return struct.unpack_from("<Q", shared)[0] - struct.unpack_from("<Q", private)[0]
        threading.Thread(target=count, daemon=True).start()
        say("ready")
        sys.setswitchinterval(1e-4)
        while True:
            say("look", 0 <= look() <= 1)
            time.sleep(0.02)
    """)
    job.says("ready")
    images = forked(user_place, job)
    user_place.lose(job)
    before = len(job.said())
    job = user_place.restore(images)

    eventually(lambda: len(job.said()) > before + 20, "it goes on")
    assert "look False" not in job.said()


def test_memory_that_a_twin_does_not_get_is_in_the_images(user_place: Place, either_way: None) -> None:
    job = answering(
        user_place,
        f"""
    import mmap
    def area(advice):
        memory = mmap.mmap(-1, 16 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(0, 16, 2): memory[page * 4096 : page * 4096 + 5] = b"there"
        if advice: memory.madvise(advice)
        return memory
    areas = [area(advice) for advice in (None, {mmap.MADV_DONTFORK}, 18, {mmap.MADV_HUGEPAGE})]
    locked = area(None)
    libc = ctypes.CDLL(None)
    address = ctypes.addressof(ctypes.c_char.from_buffer(locked))
    assert libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(16 * 4096)) == 0
    def check():
        return all(area[page * 4096 : page * 4096 + 5] == (b"there" if page % 2 == 0 else bytes(5))
                   for area in [*areas, locked] for page in range(16))
        """,
    )
    images = forked(user_place, job)
    flags = vm_flags(job.pid)
    user_place.lose(job)
    job = user_place.restore(images)

    assert answer(user_place, job, 0) == "True"
    restored = vm_flags(job.pid)
    for flag in ("dc", "wf", "hg", "lo"):
        assert restored.count(flag) == flags.count(flag) > 0


def vm_flags(pid: int) -> list[str]:
    lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    return [flag for line in lines if line.startswith("VmFlags:") for flag in line.split()[1:]]


def test_flags_that_change_all_the_time_are_right_all_the_same(user_place: Place) -> None:
    """What is known of a mapping before the freezing is verified afterwards."""
    job = answering(
        user_place,
        f"""
    import mmap
    memory = mmap.mmap(-1, 8 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:8] = b"ABCDEFGH"
    def change():
        while True:
            memory.madvise({mmap.MADV_HUGEPAGE})
            memory.madvise({mmap.MADV_NOHUGEPAGE})
    threading.Thread(target=change, daemon=True).start()
    def check(): return memory[:8].decode()
        """,
    )
    for number in range(4):
        images, result = user_place.dump(job, mode="forked")
        assert result.mode == "forked"
        user_place.lose(job)
        job = user_place.restore(images)
        assert answer(user_place, job, number) == "ABCDEFGH"


def test_signals_by_the_thousand_lose_nothing(user_place: Place) -> None:
    job = answering(
        user_place,
        """
    caught, sent = [0], [0]
    def catch(*_): caught[0] += 1
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.signal(signal.SIGRTMIN, catch)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    if os.fork() == 0:
        parent = os.getppid()
        while True:
            os.kill(parent, signal.SIGALRM)
            time.sleep(0.0001)
    libc = ctypes.CDLL(None)
    def check():
        libc.sigqueue(os.getpid(), signal.SIGRTMIN, ctypes.c_void_p(0))
        sent[0] += 1
        while caught[0] < sent[0]: time.sleep(0.001)
        return signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
        """,
    )
    for number in range(15):
        forked(user_place, job)
        assert answer(user_place, job, number) == "True"


def test_interrupted_system_calls_are_resumed(user_place: Place) -> None:
    """A sleep goes on for what is left of it, a read and a wait go on waiting; none returns EINTR."""
    os.mkfifo(user_place.path / "fifo")
    (user_place.path / "fifo").chmod(0o666)
    script = "(exec sleep 1.5) && echo slept & (exec cat fifo) && echo read & wait; wait; echo waited"
    job = user_place.start(["/bin/sh", "-c", script])
    eventually(lambda: len(tasks_of(job.capsule)) >= 3, "all are at it")
    for _ in range(4):
        forked(user_place, job)
    job.says("slept")
    assert "waited" not in job.said()
    (user_place.path / "fifo").write_text("line\n")

    job.says("waited")
    assert job.said() == ["slept", "line", "read", "waited"]


def test_stopped_process_stays_stopped(user_place: Place) -> None:
    job = user_place.python("""
        if os.fork() == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            say("continued")
            time.sleep(60)
        say("ready")
        time.sleep(60)
    """)
    job.says("ready")
    child = next(pid for number, pid in tasks_of(job.capsule).items() if number != job.capsule.job_pid)
    eventually(lambda: status_of(child)["State"].startswith("T"), "the child is stopped")
    forked(user_place, job)

    assert status_of(child)["State"].startswith("T")
    os.kill(child, signal.SIGCONT)
    job.says("continued")


def test_job_may_close_its_pipe_while_its_twin_lives(user_place: Place, lasting_twins: None) -> None:
    job = user_place.start(
        ["/bin/sh", "-c", "(echo begin; while ! [ -e go ]; do sleep 0.05; done) | (cat; echo end)"]
    )
    job.says("begin")
    with user_place.criu.dump(job.capsule, user_place.images(), lambda: None, mode="forked"):
        user_place.touch("go")

        job.says("end")


def test_index_finds_no_page_that_is_not_there() -> None:
    index = RunIndex([(7, 0x1000, 2), (7, 0x5000, 1), (9, 0x1000, 1)])

    assert index.size == 4 * 4096
    assert [index.offset(7, 0x2000, 4096), index.offset(9, 0x1000, 4096)] == [4096, 3 * 4096]
    for space, vaddr, length in ((7, 0x3000, 4096), (7, 0x2000, 8192), (8, 0x1000, 4096)):
        with pytest.raises(OSError, match="no page"):
            index.offset(space, vaddr, length)
