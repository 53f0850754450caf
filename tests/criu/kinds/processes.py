"""Kinds of processes, threads and memory that a job holds."""

# System calls are what it is about.
# ruff: noqa: PTH103, PTH108, PTH208

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import resource
import signal
import struct
import threading
import time
from multiprocessing import shared_memory
from pathlib import Path

from .holding import LIBC, MIB, Check, child, counted, fd_of, kind, linger


@kind
def zombie() -> Check:
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    time.sleep(0.1)
    return lambda: Path(f"/proc/{pid}/stat").read_text().split()[2]


@kind
def child_that_ends_later() -> Check:
    pid = os.fork()
    if pid == 0:
        while not Path("end").exists():
            time.sleep(0.01)
        os._exit(7)
    said: list[int] = []

    def check() -> object:
        if not said:
            Path("end.asked").touch()  # the test makes "end" after the restore
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                said.append(os.waitstatus_to_exitcode(status))
        return said in ([], [7])

    return check


@kind
def stopped_child() -> Check:
    pid = child(linger)
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)

    def check() -> object:
        # CRIU traces what it stops, and after a restore stops what was stopped: for a moment it is something else.
        until = time.monotonic() + 5
        while (state := Path(f"/proc/{pid}/stat").read_text().split()[2]) != "T" and time.monotonic() < until:
            time.sleep(0.005)
        return state

    return check


@kind
def sessions() -> Check:
    def work() -> None:
        os.setsid()
        child(linger)
        linger()

    pid = child(work)
    time.sleep(0.1)
    return lambda: (os.getsid(pid) == pid, os.getpgid(pid) == pid)


@kind
def orphan() -> Check:
    """The leader of a session has ended, its daemon goes on."""
    reading, writing = os.pipe()

    def work() -> None:
        os.setsid()
        os.write(writing, child(linger).to_bytes(4))

    os.waitpid(child(work), 0)
    pid = int.from_bytes(os.read(reading, 4))
    return lambda: Path(f"/proc/{pid}/stat").read_text().split()[3]


@kind
def names_and_flags() -> Check:
    LIBC.prctl(15, b"renamed", 0, 0, 0)
    LIBC.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
    LIBC.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    return lambda: (Path("/proc/self/comm").read_text(), LIBC.prctl(3), LIBC.prctl(39, 0, 0, 0, 0))


@kind
def nice() -> Check:
    os.nice(3)
    return lambda: os.nice(0)


@kind
def limits() -> Check:
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
    return lambda: resource.getrlimit(resource.RLIMIT_NOFILE)


@kind
def net_namespace() -> Check:
    """One of the job's own, with the loopback interface only, which is down."""
    fd_of(LIBC.unshare(0x40000000))
    return lambda: Path("/proc/self/net/dev").read_text().count(":")


@kind
def user_ids() -> Check:
    os.setresgid(1001, 1000, 1002)
    os.setresuid(1001, 1000, 0)
    return lambda: (os.getresuid(), os.getresgid())


@kind
def chroot() -> Check:
    os.makedirs("root/inside")
    here = os.open(".", os.O_RDONLY)
    os.chroot("root")
    os.fchdir(here)  # to see "stop"; the root stays
    os.close(here)
    return lambda: os.listdir("/")


@kind
def seccomp() -> Check:
    LIBC.prctl(38, 1, 0, 0, 0)
    # getpriority is refused, all else allowed.
    instructions = [(0x20, 0, 0, 0), (0x15, 0, 1, 140), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in instructions))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(program)))
    fd_of(LIBC.prctl(22, 2, header, 0, 0))
    return lambda: (LIBC.syscall(140, 0, 0), ctypes.get_errno())


@kind
def clocks() -> Check:
    """The monotonic clock never runs backwards, and does not leap by hours."""
    last = [time.monotonic()]

    def check() -> object:
        now = time.monotonic()
        fine = last[0] <= now < last[0] + 60
        last[0] = now
        return fine

    return check


@kind
def threads() -> Check:
    counts = [0] * 4

    def work(number: int) -> None:
        while True:
            counts[number] += 1
            time.sleep(0.001)

    for number in range(4):
        threading.Thread(target=work, args=[number], daemon=True).start()

    def check() -> object:
        before = list(counts)
        until = time.monotonic() + 5
        while any(a == b for a, b in zip(before, counts, strict=True)) and time.monotonic() < until:
            time.sleep(0.001)
        return [a != b for a, b in zip(before, counts, strict=True)]

    return check


@kind
def numpy() -> Check:
    import numpy as np

    matrix = np.arange(250000.0).reshape(500, 500) % 7
    return lambda: float((matrix @ matrix).sum())


@kind
def process_pool() -> Check:
    pool = multiprocessing.get_context("fork").Pool(2)
    return lambda: pool.map(abs, [-1, -2, -3])


@kind
def shared_anonymous() -> Check:
    return counted(mmap.mmap(-1, 4 * MIB))


@kind
def shared_unlinked() -> Check:
    name = f"/dev/shm/holds-{os.getuid()}-{time.time_ns()}"
    fd = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, 4 * MIB)
    os.unlink(name)
    return counted(mmap.mmap(fd, 4 * MIB))


@kind
def shared_named() -> Check:
    memory = shared_memory.SharedMemory(create=True, size=4 * MIB)
    assert memory.buf is not None
    check = counted(memory.buf)
    return lambda: (check(), memory is not None)


@kind
def memfd() -> Check:
    fd = os.memfd_create("held")
    os.ftruncate(fd, 4 * MIB)
    memory = mmap.mmap(fd, 4 * MIB)
    memory[5] = 9
    return lambda: (memory[5], os.fstat(fd).st_size)


def advised(advice: int) -> Check:
    memory = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[0:3] = b"abc"
    memory.madvise(advice)
    return lambda: memory[0:3]


@kind
def dontfork() -> Check:
    return advised(mmap.MADV_DONTFORK)


@kind
def wipeonfork() -> Check:
    return advised(18)


@kind
def mlocked() -> Check:
    memory = mmap.mmap(-1, 16 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fd_of(LIBC.mlock(ctypes.c_void_p(address), 16 * 4096))
    return lambda: [line for line in Path("/proc/self/status").read_text().splitlines() if "VmLck" in line]
