"""Kinds of files, pipes, events and terminals that a job holds."""

# System calls are what it is about.
# ruff: noqa: PTH102, PTH103, PTH106, PTH108, S606

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import pty
import select
import signal
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .holding import LIBC, Check, child, fd_of, kind, linger


@kind
def deleted_file() -> Check:
    fd = os.open("gone", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"abc" * 100000)
    os.unlink("gone")
    return lambda: (os.pread(fd, 3, 299997), os.fstat(fd).st_size)


@kind
def nameless_file() -> Check:
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR)
    os.write(fd, b"abc")
    return lambda: os.pread(fd, 3, 0)


@kind
def deleted_but_linked() -> Check:
    fd = os.open("one", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"abc")
    os.link("one", "other")
    os.unlink("one")
    return lambda: os.pread(fd, 3, 0)


@kind
def deleted_directory() -> Check:
    os.makedirs("below/it")
    fd = os.open(".", os.O_RDONLY)
    pid = os.fork()
    if pid == 0:
        os.chdir("below/it")
        os.rmdir("../it")
        linger()
    os.close(fd)
    while Path("below/it").exists():
        time.sleep(0.01)
    return lambda: Path(f"/proc/{pid}/cwd").readlink().name.split()[-1]


@kind
def devices() -> Check:
    files = [Path(name).open("rb", 0) for name in ("/dev/null", "/dev/zero", "/dev/urandom")]  # noqa: SIM115
    return lambda: [len(file.read(3)) for file in files]


@kind
def proc_files() -> Check:
    status = Path("/proc/self/status").open()  # noqa: SIM115
    other = Path("/sys/kernel/mm/transparent_hugepage/enabled").open()  # noqa: SIM115

    def check() -> object:
        status.seek(0)
        return status.readline(), bool(os.pread(other.fileno(), 9, 0))

    return check


@kind
def proc_file_of_the_dead() -> Check:
    pid = child(lambda: time.sleep(0.1))
    file = Path(f"/proc/{pid}/status").open()  # noqa: SIM115
    os.waitpid(pid, 0)
    return lambda: file.fileno()


def locked(lock: Callable[[int], object], how: str) -> Check:
    fd = os.open("locked", os.O_RDWR | os.O_CREAT)
    lock(fd)
    inode = os.fstat(fd).st_ino
    return lambda: (
        [line.split()[1:4] for line in Path("/proc/locks").read_text().splitlines() if f":{inode} " in line]
        == [[how, "ADVISORY", "WRITE"]]
    )


@kind
def lock_flock() -> Check:
    return locked(lambda fd: fcntl.flock(fd, fcntl.LOCK_EX), "FLOCK")


@kind
def lock_posix() -> Check:
    return locked(lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX), "POSIX")


@kind
def lock_ofd() -> Check:
    return locked(lambda fd: fcntl.fcntl(fd, 37, struct.pack("hhlli4x", 1, 0, 0, 0, 0)), "OFDLCK")


@kind
def pipe() -> Check:
    reading, writing = os.pipe()
    os.write(writing, b"left")

    def check() -> object:
        os.write(writing, b"more")
        return os.read(reading, 4) in (b"left", b"more")

    return check


@kind
def fifo() -> Check:
    os.mkfifo("fifo")
    fd = os.open("fifo", os.O_RDWR)

    def check() -> object:
        os.write(fd, b"q")
        return os.read(fd, 1)

    return check


@kind
def terminal() -> Check:
    """A shell on a terminal of its own, as script(1), tmux and expect have it."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execvp("cat", ["cat"])

    def check() -> object:
        os.write(fd, b"x\n")
        seen = b""
        while len(seen) < 6:  # the terminal's own echo, and cat's
            seen += os.read(fd, 6 - len(seen))
        return seen, os.tcgetpgrp(fd) == pid

    return check


@kind
def epoll() -> Check:
    reading, writing = os.pipe()
    poll = select.epoll()
    poll.register(reading, select.EPOLLIN)

    def check() -> object:
        os.write(writing, b"x")
        return poll.poll(1) == [(reading, select.EPOLLIN)], os.read(reading, 1)

    return check


@kind
def eventfd() -> Check:
    fd = os.eventfd(3)

    def check() -> object:
        os.eventfd_write(fd, 1)
        return os.eventfd_read(fd) in (1, 4)

    return check


@kind
def timerfd() -> Check:
    fd = fd_of(LIBC.timerfd_create(1, 0))
    fd_of(LIBC.timerfd_settime(fd, 0, array.array("l", [0, 10**7, 0, 10**7]).tobytes(), None))
    return lambda: len(os.read(fd, 8))


@kind
def signalfd() -> Check:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    mask = (1 << (signal.SIGUSR1 - 1)).to_bytes(128, "little")
    fd = fd_of(LIBC.signalfd(-1, mask, 0))

    def check() -> object:
        os.kill(os.getpid(), signal.SIGUSR1)
        return len(os.read(fd, 128))

    return check


@kind
def inotify() -> Check:
    return watching(tempfile.mkdtemp(dir="/dev/shm"))


@kind
def inotify_without_handles() -> Check:
    os.mkdir("watched")
    return watching("watched")


def watching(directory: str) -> Check:
    fd = fd_of(LIBC.inotify_init1(0))
    fd_of(LIBC.inotify_add_watch(fd, directory.encode(), 0x100))

    def check() -> object:
        Path(directory, "file").touch()
        Path(directory, "file").unlink()
        return b"file" in os.read(fd, 4096)

    return check


@kind
def fanotify() -> Check:
    fd = fd_of(LIBC.fanotify_init(0, 0))
    os.mkdir("watched")
    return lambda: fd


@kind
def pidfd() -> Check:
    fd = os.pidfd_open(child(linger))
    return lambda: signal.pidfd_send_signal(fd, 0)


@kind
def timer() -> Check:
    counts = [0]

    def count(*_: object) -> None:
        counts[0] += 1

    signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)

    def check() -> object:
        before, until = counts[0], time.monotonic() + 5
        while counts[0] == before and time.monotonic() < until:
            time.sleep(0.005)
        return counts[0] != before

    return check


@kind
def aio() -> Check:
    context = ctypes.c_ulong(0)
    fd_of(LIBC.syscall(206, 8, ctypes.byref(context)))
    events = ctypes.create_string_buffer(32)
    nothing = (ctypes.c_long * 2)(0, 0)
    return lambda: LIBC.syscall(208, context, ctypes.c_long(0), ctypes.c_long(1), events, nothing)
