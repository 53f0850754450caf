"""Where there can be no twin the dump is a plain one, says why, and is as good."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from criu_backend import Criu, best_mode, known_self_test, put_back, self_test
from criu_backend._plugin import TWIN_LIBRARY
from criu_backend._selftest import LADDER
from tests.criu.capsules import Job, Place
from tests.criu.test_forked import ANSWERING, answer, answering, children_of_init, forked
from tests.criu.visible import tasks_of
from tests.criu.waiting import eventually

pytestmark = pytest.mark.criu

_CHECKED = """
    import hashlib
    data = os.urandom({mib} << 20)
    before = hashlib.sha256(data).digest()
    def check(): return hashlib.sha256(data).digest() == before
"""


def survives(place: Place, job: Job, images: Path) -> bool:
    """Whether the job runs on, and what is restored from *images* is whole."""
    assert answer(place, job, 0) == "True"
    (place.path / "ask.0").unlink()
    place.lose(job)
    before = len(job.said())
    job = place.restore(images)
    place.touch("ask.0")
    eventually(lambda: len(job.said()) > before, "it answers after the restore")
    return job.said()[-1] == "answer 0 True"


def test_lazy_rung_brings_the_job_back(place: Place) -> None:
    job = answering(place, _CHECKED.format(mib=16))
    images, result = place.dump(job, mode="lazy")

    assert (result.mode, result.reason) == ("lazy", None)
    assert 0 < result.pause < 10
    assert survives(place, job, images)


def test_without_the_plugin_dumps_are_plain(user_place: Place) -> None:
    user_place.criu = Criu(twin_library=Path("/nonexistent/twin.so"))
    job = answering(user_place, _CHECKED.format(mib=4))
    images, result = user_place.dump(job, mode="forked")

    assert result.mode == "plain"
    assert result.reason == "/nonexistent/twin.so is not installed"
    assert survives(user_place, job, images)


def unmount(top: Path) -> None:
    subprocess.run(["umount", top], check=True)


def await_empty(group: Path) -> None:
    eventually(lambda: (group / "cgroup.procs").read_text() == "", "the group is empty")


@contextlib.contextmanager
def limited(controller: str, v1_file: str, v2_file: str, limit: int) -> Iterator[Path | None]:
    """Make a cgroup with a limit, mounting the hierarchy if need be; gives None where it cannot be had."""
    with contextlib.ExitStack() as closing:
        for kind, options, file in (("cgroup", controller, v1_file), ("cgroup2", "none", v2_file)):
            top = Path(tempfile.mkdtemp(prefix="cgroup-", dir="/tmp"))
            closing.callback(top.rmdir)
            mounted = subprocess.run(
                ["mount", "-t", kind, "-o", options if kind == "cgroup" else "rw", kind, top], check=False
            )
            if mounted.returncode:
                continue
            closing.callback(unmount, top)
            group = top / f"outlast-test-{os.getpid()}"
            group.mkdir()
            closing.callback(group.rmdir)
            if (group / file).exists():
                (group / file).write_text(str(limit))
                yield group
                await_empty(group)
                return
        yield None


@pytest.fixture
def tight_group(need: Callable[[str, str | None], None]) -> Iterator[Path]:
    """A memory cgroup with a limit of 160 MiB."""
    with limited("memory", "memory.limit_in_bytes", "memory.max", 160 << 20) as group:
        need("memory cgroup", None if group else "no memory cgroup with a limit can be made here")
        assert group is not None
        yield group


@pytest.fixture
def tight_place(user_place: Place, tight_group: Path) -> Iterator[Place]:
    """A place whose peers are in it."""
    put_into(user_place, tight_group)
    yield user_place
    user_place.end()


def kernel_killed(group: Path) -> int:
    """How many processes the kernel has killed in the memory cgroup *group*."""
    file = next(path for name in ("memory.oom_control", "memory.events") if (path := group / name).exists())
    return int(dict(line.split() for line in file.read_text().splitlines())["oom_kill"])


def put_into(place: Place, group: Path) -> None:
    """Have the peers of *place* be in the cgroup *group*."""

    def join() -> None:
        (group / "cgroup.procs").write_text("0")

    peer = place.peer
    place.peer = lambda stdio=None, **how: peer(stdio, **{"prepare": join, **how})  # type: ignore[method-assign]


def test_process_that_may_make_no_more_is_dumped_plainly(
    user_place: Place, need: Callable[[str, str | None], None]
) -> None:
    """A limit on processes refuses the twin as it refuses any child."""
    with limited("pids", "pids.max", "pids.max", 64) as group:
        need("pids cgroup", None if group else "no pids cgroup with a limit can be made here")
        assert group is not None
        put_into(user_place, group)
        job = answering(user_place, _CHECKED.format(mib=4))
        (group / "pids.max").write_text((group / "pids.current").read_text())
        images, result = user_place.dump(job, mode="forked")

        assert result.mode == "plain"
        assert result.reason == "1 of 1 processes could have no twin"
        assert "Resource temporarily unavailable" in (images / "dump.log").read_text()
        (group / "pids.max").write_text("64")
        assert survives(user_place, job, images)
        user_place.end()


def test_job_near_its_memory_limit_is_dumped_plainly(tight_place: Place) -> None:
    job = answering(tight_place, _CHECKED.format(mib=120))
    images, result = tight_place.dump(job, mode="forked")

    assert result.mode == "plain"
    assert result.reason is not None
    assert result.reason.startswith("twins may need ")
    assert survives(tight_place, job, images)


def test_twins_of_a_small_job_stay_where_there_is_no_room_for_a_copy_of_them(tight_place: Place) -> None:
    job = answering(tight_place, _CHECKED.format(mib=60))
    images = tight_place.images()
    with tight_place.criu.dump(job.capsule, images, lambda: None, mode="forked") as result:
        assert (result.mode, result.reason) == ("forked", None)
        assert len(children_of_init(job)) == 2
        put_back(result.memories, images)

    assert survives(tight_place, job, images)


def test_twins_end_when_the_job_needs_their_memory(tight_place: Place, tight_group: Path) -> None:
    """A job that writes to all of its memory while twins share it must not run into its limit."""
    job = tight_place.python(
        """
        import mmap
        memory = mmap.mmap(-1, 90 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        def touch():
            for page in range(0, len(memory), 4096):
                memory[page] = (memory[page] + 1) % 256
                if page % (1 << 20) == 0: time.sleep(0.02)
        touch()
        say("ready")
        wait("go")
        touch()
        say("done")
        time.sleep(60)
        """
    )
    job.says("ready")
    with tight_place.criu.dump(job.capsule, tight_place.images(), lambda: None, mode="forked") as result:
        assert result.mode == "forked"
        tight_place.touch("go")
        job.says("done")

        assert children_of_init(job) == [job.pid]
        assert kernel_killed(tight_group) == 0
    assert job.capsule.alive


def test_process_that_takes_orphans_costs_only_its_children_their_twins(user_place: Place) -> None:
    job = user_place.python(
        """
    import hashlib
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
        if os.fork() == 0:
            while True: time.sleep(60)
        while True: time.sleep(60)
"""
        + _CHECKED.format(mib=4)
        + ANSWERING
    )
    job.says("ready")
    eventually(lambda: len(tasks_of(job.capsule)) == 3, "there are three processes")
    images, result = user_place.dump(job, mode="forked")

    assert result.mode == "forked"
    assert result.reason in ("1 of 3 processes could have no twin", "2 of 3 processes could have no twin")
    assert len(tasks_of(job.capsule)) == 3
    assert survives(user_place, job, images)


def test_sandbox_that_kills_for_a_clone_does_not_kill_for_a_twin(user_place: Place) -> None:
    job = answering(
        user_place,
        """
    def instruction(code, jt, jf, k): return struct.pack("HBBI", code, jt, jf, k)
    program = (instruction(0x20, 0, 0, 0) + instruction(0x15, 2, 0, 56) + instruction(0x15, 1, 0, 435)
               + instruction(0x06, 0, 0, 0x7FFF0000) + instruction(0x06, 0, 0, 0x80000000))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    code = ctypes.create_string_buffer(program)
    filter = struct.pack("HxxxxxxQ", 5, ctypes.addressof(code))
    assert libc.prctl(22, 2, ctypes.create_string_buffer(filter), 0, 0) == 0
    data = b"a" * 4096
    def check(): return data == b"a" * 4096
        """,
    )

    assert survives(user_place, job, forked(user_place, job))


def test_32_bit_process_is_dumped_plainly(user_place: Place, need: Callable[[str, str | None], None]) -> None:
    need("gcc", None if shutil.which("as") and shutil.which("ld") else "no assembler")
    source = (
        ".globl _start\n_start: mov $4,%eax; mov $1,%ebx; mov $text,%ecx; mov $6,%edx; int $0x80\n"
        '1: mov $29,%eax; int $0x80; jmp 1b\n.data\ntext: .ascii "ready\\n"\n'
    )
    program = user_place.path / "small"
    subprocess.run(["as", "--32", "-o", f"{program}.o", "-"], input=source, text=True, check=True)
    subprocess.run(["ld", "-m", "elf_i386", "-o", program, f"{program}.o"], check=True)
    job = user_place.start([str(program)])
    job.says("ready")
    try:
        _, result = user_place.dump(job, mode="plain")
    except Exception as error:  # noqa: BLE001 - whatever CRIU says of such a program
        need("compat", f"this CRIU cannot dump 32-bit processes: {error}")
    images, result = user_place.dump(job, mode="forked")

    assert result.mode == "plain"
    assert "32-bit" in (images / "dump.log").read_text()
    assert job.capsule.alive


def test_self_test_passes_on_every_rung_and_is_remembered(tmp_path: Path) -> None:
    cache = tmp_path / "selftest.json"
    assert known_self_test(cache=cache) is None
    assert best_mode("auto", cache=cache) == ("plain", "the node's self-test has not been made yet")

    result = self_test(cache=cache)

    assert {trial.mode: trial.problem for trial in result.trials} == dict.fromkeys(LADDER)
    assert known_self_test(cache=cache) == result
    assert best_mode("auto", cache=cache) == ("forked", None)
    assert best_mode("plain", cache=cache) == ("plain", None)


def in_place(place: Path) -> list[int]:
    """The processes whose working directory is *place*."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == place:
                found.append(int(process.name))
    return found


def test_self_test_whose_process_is_killed_leaves_no_process_and_the_next_removes_its_files(
    tmp_path: Path,
) -> None:
    cache = tmp_path / "selftest.json"
    slow = tmp_path / "criu"
    slow.write_text('#!/bin/sh\n[ "$1" != dump ] || exec sleep 600\nexec criu "$@"\n')
    slow.chmod(0o755)
    code = f"from criu_backend import *; self_test(Criu({str(slow)!r}), __import__('pathlib').Path({str(cache)!r}))"
    tester = subprocess.Popen([sys.executable, "-c", code])
    lock = cache.with_suffix(".lock")
    eventually(lambda: lock.exists() and lock.read_text().endswith("\n"), "the canary's place", seconds=60)
    place = Path(lock.read_text().strip())
    eventually(lambda: (place / "images0").exists(), "the canary's dump", seconds=60)
    before = in_place(place)
    tester.kill()
    tester.wait()
    eventually(lambda: not in_place(place), "the canary's end", seconds=60)
    left = place.exists()
    result = self_test(cache=cache)

    assert before
    assert left
    assert not place.exists()
    assert result.problem("plain") is None


def test_self_test_of_another_kernel_does_not_count(tmp_path: Path) -> None:
    cache = tmp_path / "selftest.json"
    self_test(cache=cache)
    found = json.loads(cache.read_text())
    found["key"]["kernel"] = "5.4.0"
    cache.write_text(json.dumps(found))

    assert known_self_test(cache=cache) is None


def test_rung_that_fails_its_self_test_is_not_used(tmp_path: Path) -> None:
    cache = tmp_path / "selftest.json"
    broken = tmp_path / "twin" / "outlast-twin.so"
    broken.parent.mkdir()
    broken.write_text("no library\n")
    criu = Criu(twin_library=broken)

    result = self_test(criu, cache)

    assert result.best == "plain"
    assert result.problem("plain") is None
    mode, why = best_mode("auto", criu, cache)
    assert mode == "plain"
    assert why is not None
    assert why.startswith("self-test: forked: dump: ")


def test_plugin_alone_is_what_criu_loads() -> None:
    """Whatever else were in its directory, CRIU would load it too, as root."""
    assert sorted(path.name for path in TWIN_LIBRARY.parent.iterdir()) == [TWIN_LIBRARY.name]
