"""A job goes on after a restore where it stood at the dump, in the place of another peer."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.criu.capsules import Job, Place
from tests.criu.visible import inner, quiet, status_of, tasks_of, visible_state
from tests.criu.waiting import eventually, exit_code, killed_by, lives

pytestmark = pytest.mark.criu

# A job of several processes and threads that has something of everything /proc shows.
MANY_THINGS = """
    signal.signal(signal.SIGUSR1, lambda *_: say("USR1"))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    os.umask(0o037)
    os.mkdir("below")
    os.chdir("below")
    data = open("data", "w+b", buffering=0)
    data.write(b"0123456789")
    data.seek(4)
    again = os.dup(data.fileno())
    reading, writing = os.pipe()
    os.write(writing, b"in the pipe")
    left, right = socket.socketpair()
    left.send(b"in the socket")
    memory = os.memfd_create("m")
    os.write(memory, b"in memory")
    def thread(number):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP] if number else [])
        wait("go")
        done.append(number)
    done = []
    threads = [threading.Thread(target=thread, args=[number]) for number in range(3)]
    for one in threads:
        one.start()
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        os.kill(os.getpid(), signal.SIGTERM)
        os.chdir("/")
        os.close(again)
        os.write(writing, b", and more")
        say("child")
        while True: time.sleep(60)
    say("parent")
    wait("go")
    for one in threads:
        one.join()
    assert sorted(done) == [0, 1, 2], done
    assert os.read(again, 100) == b"456789"
    assert os.read(reading, 100) == b"in the pipe, and more"
    assert right.recv(100) == b"in the socket"
    assert os.pread(memory, 100, 0) == b"in memory"
    signal.raise_signal(signal.SIGUSR1)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    sys.exit(11)
"""


def many_things(place: Place) -> Job:
    job = place.python(MANY_THINGS)
    eventually(lambda: sorted(job.said()) == ["child", "parent"], "the job stands")
    quiet(job.capsule)
    return job


@pytest.mark.timeout(120)
def test_visible_state_is_the_same_over_three_generations(place: Place) -> None:
    job = many_things(place)
    before = visible_state(job.capsule)
    assert len({number for number, _ in before}) == 2
    assert len(before[job.capsule.job_pid, "files"]) == 10  # type: ignore[arg-type]
    for _ in range(3):
        job = place.again(job)

        assert visible_state(job.capsule) == before
    (place.path / "below" / "go").touch()
    assert job.ended() == exit_code(11)
    assert sorted(job.said()) == ["USR1", "child", "parent"]


def test_job_in_the_midst_of_its_work_loses_and_doubles_nothing(place: Place) -> None:
    job = place.python("""
        number = 0
        while not os.path.exists("stop"):
            say(number)
            number += 1
            time.sleep(0.002)
        say("end", number)
    """)
    for generation in range(3):
        eventually(lambda job=job: len(job.said()) > 20, "the job works")  # type: ignore[misc]
        sizes: list[int] = []
        images, _ = place.dump(job, lambda sizes=sizes: sizes.append(place.output.stat().st_size))  # type: ignore[misc]
        time.sleep(0.05 * generation)
        place.lose(job)
        os.truncate(place.output, sizes[0])
        job = place.restore(images)
    place.touch("stop")

    assert job.ended() == exit_code(0)
    lines = job.said()
    assert lines == [*map(str, range(len(lines) - 1)), f"end {len(lines) - 1}"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR2])
def test_signal_ends_a_restored_job_as_it_is(place: Place, number: signal.Signals) -> None:
    job = place.python("say('ready'); time.sleep(60)")
    job.says("ready")
    job = place.again(job)
    job.peer.signal(number)

    assert job.ended() == killed_by(number)


def test_restored_job_is_where_its_new_peer_is(user_place: Place) -> None:
    job = user_place.start(["sleep", "60"])
    eventually(lambda: status_of(job.pid)["Name"] == "sleep", "the job runs")
    images, _ = user_place.dump(job)
    number = job.capsule.job_pid
    user_place.lose(job)
    point = next(
        Path(line.split()[1])
        for line in Path("/proc/self/mounts").read_text().splitlines()
        if line.split()[2] == "cgroup2" or line.split()[1].endswith("/pids")
    )
    cgroup = point / f"outlast-criu-{os.getpid()}"
    cgroup.mkdir()
    try:
        peer = user_place.peer(prepare=lambda: (cgroup / "cgroup.procs").write_text("0"))
        job = user_place.restore(images, peer)

        assert inner(job.pid) == number
        assert job.capsule.job_pid == number
        mine = Path(f"/proc/{job.pid}/cgroup").read_text()
        assert cgroup.name in mine
        assert mine == Path(f"/proc/{peer.process.pid}/cgroup").read_text()
        user_place.lose(job)
    finally:
        eventually(lambda: not (cgroup / "cgroup.procs").read_text(), "the cgroup is empty")
        cgroup.rmdir()


def test_end_of_the_new_peer_ends_the_restored_job(place: Place) -> None:
    job = many_things(place)
    job = place.again(job)
    pidfds = [os.pidfd_open(pid) for pid in tasks_of(job.capsule).values()]
    assert len(pidfds) == 2
    job.peer.kill()

    assert job.capsule.wait(10)
    eventually(lambda: not any(map(lives, pidfds)), "the job's processes are gone")


def test_pipes_of_the_new_peer_take_the_place_of_the_old(place: Place) -> None:
    def pipes() -> tuple[tuple[int, int, int], int, int]:
        down, up, error = os.pipe(), os.pipe(), os.pipe()
        os.close(error[0])
        return (down[0], up[1], error[1]), down[1], up[0]

    stdio, down, up = pipes()
    job = place.start(
        ["sh", "-c", "while read word; do echo $word and $word; done; exit 6"], place.peer(stdio)
    )
    names = [(number, str(Path(f"/proc/self/fd/{fd}").readlink())) for number, fd in enumerate(stdio)]
    os.write(down, b"one\n")
    assert os.read(up, 100) == b"one and one\n"
    images, _ = place.dump(job)
    place.lose(job)
    for fd in (*stdio, down, up):
        os.close(fd)
    stdio, down, up = pipes()
    job = place.restore(images, place.peer(stdio), inherit=names)
    for fd in stdio:
        os.close(fd)
    os.write(down, b"two\n")

    assert os.read(up, 100) == b"two and two\n"
    os.close(down)
    assert os.read(up, 100) == b""
    assert job.ended() == exit_code(6)
    os.close(up)


def test_terminal_of_the_new_peer_takes_the_place_of_the_old(place: Place) -> None:
    def terminal() -> tuple[int, int, str]:
        main, end = os.openpty()
        info = os.fstat(end)
        os.chown(os.ttyname(end), place.uid, -1)
        return main, end, f"tty[{info.st_rdev:x}:{info.st_dev:x}]"

    def lines(main: int, wanted: bytes) -> bytes:
        data = b""
        while wanted not in data:
            data += os.read(main, 1000)
        return data

    main, end, name = terminal()
    spare = os.openpty()  # the next one is another terminal
    job = place.start(
        ["sh", "-c", "while read word; do echo $word and $word; done; exit 8"], place.peer((end, end, end))
    )
    os.write(main, b"one\n")
    assert lines(main, b"one and one")
    images, _ = place.dump(job, external=[name])
    place.lose(job)
    second, second_end, other = terminal()
    assert other != name
    job = place.restore(
        images,
        place.peer((second_end, second_end, second_end)),
        inherit=[(number, name) for number in range(3)],
    )
    os.write(second, b"two\n")

    assert lines(second, b"two and two")
    os.write(second, b"\x04")
    assert job.ended() == exit_code(8)
    for fd in (main, end, second, second_end, *spare):
        os.close(fd)


def test_processes_that_talk_through_pipes_go_on_talking(place: Place) -> None:
    job = place.python("""
        down, up = os.pipe(), os.pipe()
        if os.fork() == 0:
            while data := os.read(down[0], 8):
                number, = struct.unpack("=q", data)
                os.write(up[1], struct.pack("=q", number * number))
        number = 0
        say("ready")
        while not os.path.exists("stop"):
            os.write(down[1], struct.pack("=q", number))
            answer, = struct.unpack("=q", os.read(up[0], 8))
            assert answer == number * number
            number += 1
        sys.exit(0 if number > 100 else 1)
    """)
    job.says("ready")
    for _ in range(2):
        time.sleep(0.1)
        job = place.again(job)
    place.touch("stop")

    assert job.ended() == exit_code(0)


def test_shell_pipeline_goes_on(place: Place) -> None:
    counting = "i=0; while [ ! -e stop ]; do i=$((i + 1)); echo $i; done"
    summing = "s=0; while read n; do s=$((s + n)); c=$n; done; [ $s = $((c * (c + 1) / 2)) ] && echo right $c"
    job = place.start(["sh", "-c", f"({counting}) | cat | ({summing})"])
    eventually(lambda: len(tasks_of(job.capsule)) == 4, "the pipeline runs")
    job = place.again(job)
    place.touch("stop")

    assert job.ended() == exit_code(0)
    assert job.said()[0].startswith("right ")


def test_orphan_stays_in_the_job_and_in_its_image(place: Place) -> None:
    job = place.python("""
        if os.fork() == 0:
            if os.fork() == 0:
                os.setsid()
                wait("go")
                say("orphan", os.getppid())
                os._exit(21)
            os._exit(0)
        os.wait()
        say("ready")
        pid, status = os.wait()
        say("reaped", os.waitstatus_to_exitcode(status))
    """)
    job.says("ready")
    assert len(tasks_of(job.capsule)) == 2
    root = job.capsule.job_pid
    job = place.again(job)
    place.touch("go")

    assert job.ended() == exit_code(0)
    assert job.said() == ["ready", f"orphan {root}", "reaped 21"]


def test_deleted_open_file_is_in_the_image(place: Place) -> None:
    job = place.python("""
        file = open("gone", "w+b", buffering=0)
        file.write(b"kept" * 1000)
        os.unlink("gone")
        say("ready")
        wait("go")
        file.write(b"end")
        file.seek(0)
        assert file.read() == b"kept" * 1000 + b"end"
        assert not os.path.exists("gone")
    """)
    job.says("ready")
    job = place.again(job)
    place.touch("go")

    assert job.ended() == exit_code(0)


def test_memory_comes_back_as_it_was(place: Place) -> None:
    job = place.python("""
        import hashlib, mmap
        table = bytearray(os.urandom(24 << 20))
        shared = mmap.mmap(-1, 1 << 20)
        shared[:] = os.urandom(1 << 20)
        def digest(): return hashlib.sha256(bytes(table) + shared[:]).hexdigest()
        say(digest())
        wait("go")
        say(digest())
    """)
    eventually(lambda: job.said(), "the job has a digest")
    job = place.again(job)
    place.touch("go")
    assert job.ended() == exit_code(0)

    first, second = job.said()
    assert first == second


def test_connection_within_the_job_goes_on(place: Place) -> None:
    job = place.python("""
        listener = socket.create_server(("127.0.0.1", 0))
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        ours.send(b"sent before")
        say("ready")
        wait("go")
        assert theirs.recv(100) == b"sent before"
        theirs.send(b"sent after")
        assert ours.recv(100) == b"sent after"
    """)
    job.says("ready")
    job = place.again(job)
    place.touch("go")

    assert job.ended() == exit_code(0)


def test_ports_that_the_lost_run_still_holds_are_free_for_its_restore(user_place: Place) -> None:
    """The kernel remembers a closed connection for a minute, in which nobody could listen at its port."""
    job = user_place.python("""
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(4)
        def talk():
            mine = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
            theirs.close()
            assert mine.recv(1) == b""
            mine.close()
        talk()
        say("ready")
        wait("go")
        talk()
        say("done")
    """)
    job.says("ready")
    images, _ = user_place.dump(job)
    user_place.lose(job)

    restored = user_place.restore(images)
    user_place.touch("go")

    restored.says("done")
    assert restored.ended() == exit_code(0)


def test_same_image_can_be_restored_twice(place: Place) -> None:
    job = place.python("say('ready'); wait('go'); sys.exit(13)")
    job.says("ready")
    images, _ = place.dump(job)
    place.lose(job)
    first, second = place.restore(images), place.restore(images)

    assert first.capsule.job_pid == second.capsule.job_pid
    place.touch("go")
    assert [first.ended(), second.ended()] == [exit_code(13), exit_code(13)]
