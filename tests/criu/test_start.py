"""A job in a capsule runs as its peer would have run it, and ends as it ended."""

from __future__ import annotations

import errno
import os
import resource
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from criu_backend import CapsuleError, start_capsule
from tests.criu.capsules import ENVIRONMENT, Place
from tests.criu.visible import inner, quiet, status_of, tasks_of
from tests.criu.waiting import eventually, exit_code, killed_by, lives

pytestmark = pytest.mark.criu


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_exit_code_comes_through(place: Place, code: int) -> None:
    job = place.start(["sh", "-c", f"exit {code}"])

    assert job.ended() == exit_code(code)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_killing_signal_comes_through(place: Place, number: signal.Signals) -> None:
    job = place.start(["sh", "-c", f"kill -{int(number)} $$"])

    assert job.ended() == killed_by(number)


def test_signal_for_the_peer_reaches_the_job(place: Place) -> None:
    job = place.python("""
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(5))
        say("ready")
        while True: time.sleep(1)
    """)
    job.says("ready")
    job.peer.signal(signal.SIGUSR1)

    assert job.ended() == exit_code(5)


def test_job_sees_no_other_process_but_init(place: Place) -> None:
    job = place.start(["sh", "-c", "echo $$; cd /proc; echo [0-9]*"])
    job.ended()

    pid = job.capsule.job_pid
    assert pid >= 1000
    assert job.said() == [f"{pid}", f"1 {pid}"]


def test_jobs_of_one_node_have_pids_of_their_own_for_their_files_in_tmp(place: Place) -> None:
    jobs = [place.start(["sh", "-c", "sleep 60 & wait"]) for _ in range(3)]

    assert len({job.capsule.job_pid for job in jobs}) == 3


def test_nothing_of_the_job_is_left_when_its_root_has_ended(place: Place) -> None:
    job = place.python("""
        if os.fork() == 0:
            os.setsid()
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            say("child")
            time.sleep(60)
        wait("go")
    """)
    job.says("child")
    pidfds = [os.pidfd_open(pid) for pid in job.capsule.tasks()]
    assert len(pidfds) == 2
    place.touch("go")
    job.ended()

    eventually(lambda: not any(map(lives, pidfds)), "the job's processes are gone")
    assert job.peer.hears_no_more()


def test_command_that_is_not_there_ends_with_127(place: Place) -> None:
    job = place.start(["no-such-command"])

    assert job.ended() == exit_code(127)
    assert job.said() == ["outlast: no-such-command: No such file or directory"]


def test_command_that_may_not_be_executed_ends_with_126(place: Place) -> None:
    job = place.start(["/etc/passwd"])

    assert job.ended() == exit_code(126)
    assert job.said() == ["outlast: /etc/passwd: Permission denied"]


@pytest.fixture
def cgroup() -> Iterator[list[Path]]:
    """A new cgroup in every hierarchy that takes one as it is."""
    name = f"outlast-criu-{uuid.uuid4().hex[:8]}"
    made = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, options, *_ = line.split()
        if kind in ("cgroup", "cgroup2") and "cpuset" not in options:
            made.append(Path(point, name))
            made[-1].mkdir()
    assert made
    yield made
    for directory in made:
        eventually(lambda directory=directory: not (directory / "cgroup.procs").read_text(), "it is empty")  # type: ignore[misc]
        directory.rmdir()


def test_job_runs_in_the_context_of_its_peer(cgroup: list[Path], user_place: Place) -> None:
    def prepare() -> None:
        for directory in cgroup:
            (directory / "cgroup.procs").write_text("0")
        os.sched_setaffinity(0, {1})
        os.nice(5)
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_STACK, (4 << 20, 4 << 20))
        Path("/proc/self/oom_score_adj").write_text("123")

    peer = user_place.peer(groups=[2500, 2501], umask=0o027, prepare=prepare)
    environment = {"A": "1", "EMPTY": "", "WITH": "a = b\n c", "PATH": "/usr/bin"}
    job = user_place.start(["sleep", "60"], peer, environment=environment)
    eventually(lambda: status_of(job.pid)["Name"] == "sleep", "the job runs")
    mine, theirs = Path(f"/proc/{job.pid}"), Path(f"/proc/{peer.process.pid}")

    assert str(cgroup[0].name) in (theirs / "cgroup").read_text()
    for name in ("cgroup", "limits", "oom_score_adj"):
        assert (mine / name).read_text() == (theirs / name).read_text()
    job_status, peer_status = status_of(job.pid), status_of(peer.process.pid)
    for name in ("Uid", "Gid", "Groups", "Umask", "Cpus_allowed_list", "CapEff", "CapBnd", "NoNewPrivs"):
        assert (name, job_status[name]) == (name, peer_status[name])
    assert job_status["Uid"].split() == ["2000"] * 4
    assert job_status["Groups"].split() == ["2500", "2501"]
    assert os.getpriority(os.PRIO_PROCESS, job.pid) == 5
    assert (mine / "cwd").readlink() == user_place.path
    entries = (mine / "environ").read_bytes().rstrip(b"\0").decode().split("\0")
    assert dict(entry.split("=", 1) for entry in entries) == environment
    assert (mine / "cmdline").read_bytes() == b"sleep\x0060\0"


def test_job_has_three_descriptors_no_caught_signals_and_its_own_session(place: Place) -> None:
    job = place.start(["sleep", "60"])
    eventually(lambda: status_of(job.pid)["Name"] == "sleep", "the job runs")
    quiet(job.capsule)
    status = status_of(job.pid)

    assert sorted(fd.name for fd in Path(f"/proc/{job.pid}/fd").iterdir()) == ["0", "1", "2"]
    assert [int(status[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt")] == [0, 0, 0]
    assert inner(job.pid, "NSsid") == job.capsule.job_pid


def test_output_and_error_that_share_one_open_file_go_on_sharing_it(place: Place) -> None:
    both = os.open(place.output, os.O_WRONLY | os.O_CREAT, 0o666)
    place.output.chmod(0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.write(both, b"before\n")
    job = place.start(
        ["sh", "-c", "echo one; echo two >&2; echo three"], place.peer(stdio=(nothing, both, both))
    )
    job.ended()
    os.close(both)
    os.close(nothing)

    # With an offset of its own each would write over the other's lines.
    assert job.said() == ["before", "one", "two", "three"]


def test_input_goes_on_where_it_stands(place: Place) -> None:
    (place.path / "in").write_text("one\ntwo\nthree\n")
    standard_input = os.open(place.path / "in", os.O_RDONLY)
    os.read(standard_input, 4)
    _, out, error = place.stdio()
    job = place.start(["cat"], place.peer(stdio=(standard_input, out, error)))
    job.ended()
    os.close(standard_input)

    assert job.said() == ["two", "three"]


def test_pipes_are_the_jobs_standard_descriptors(place: Place) -> None:
    down, up = os.pipe(), os.pipe()
    job = place.start(["tr", "a-z", "A-Z"], place.peer(stdio=(down[0], up[1], up[1])))
    for fd in (down[0], up[1]):
        os.close(fd)
    os.write(down[1], b"hello")
    os.close(down[1])

    assert os.read(up[0], 100) == b"HELLO"
    assert os.read(up[0], 100) == b""
    assert job.ended() == exit_code(0)
    os.close(up[0])


def test_compat_filter_answers_as_an_old_kernel_would(place: Place) -> None:
    source = """
        libc = ctypes.CDLL(None, use_errno=True)
        print(libc.syscall(425, 4, ctypes.create_string_buffer(120)) >= 0, ctypes.get_errno())
        try:
            socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
            print(0)
        except OSError as error:
            print(error.errno)
        socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    """
    job = place.python(source)
    job.ended()

    assert job.said() == [f"False {errno.ENOSYS}", str(errno.EPROTONOSUPPORT)]


def test_without_the_filter_the_kernel_answers(place: Place) -> None:
    job = place.python(
        "say(ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(120)) >= 0)", compat_filter=False
    )
    job.ended()

    assert job.said() == ["True"]


def test_missing_helper_is_said_and_nothing_runs(place: Place) -> None:
    peer = place.peer()
    missing = Path("/usr/libexec/outlast/none")

    with pytest.raises(CapsuleError, match=r"/usr/libexec/outlast/none: No such file or directory"):
        start_capsule(peer.context, ["touch", "ran"], ENVIRONMENT, place.path, helper=missing)
    assert not (place.path / "ran").exists()


def test_no_capsule_is_made_for_a_peer_that_has_ended(place: Place) -> None:
    peer = place.peer()
    peer.process.kill()
    peer.process.wait(timeout=10)

    with pytest.raises(CapsuleError, match=rf"{peer.process.pid}"):
        start_capsule(peer.context, ["touch", "ran"], ENVIRONMENT, place.path)
    assert not (place.path / "ran").exists()


def test_end_of_the_peer_ends_all_in_the_capsule(place: Place) -> None:
    job = place.python("""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                say("child")
                time.sleep(60)
        time.sleep(60)
    """)
    eventually(lambda: job.said() == ["child"] * 3, "the children run")
    pidfds = [os.pidfd_open(pid) for pid in tasks_of(job.capsule).values()]
    assert len(pidfds) == 4
    job.peer.kill()

    assert job.capsule.wait(10)
    assert not job.capsule.alive
    eventually(lambda: not any(map(lives, pidfds)), "the job's processes are gone")


def test_end_of_the_capsule_is_heard_by_the_peer(place: Place) -> None:
    job = place.start(["sleep", "60"])
    job.capsule.kill()

    assert job.peer.hears_no_more()
