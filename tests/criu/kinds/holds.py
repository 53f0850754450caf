"""A job that holds one kind of thing and says again and again whether it still has it: holds.py KIND.

It says "ready", and then "tick N ok" for as long as check() returns what it returned at first. It ends with 3 when
there is a file `stop`.
"""

# System calls are what it is about.
# ruff: noqa: PTH102, PTH103, PTH106, PTH108, PTH208, S606

from __future__ import annotations

import array
import ctypes
import fcntl
import mmap
import multiprocessing
import os
import pty
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

Check = Callable[[], object]
LIBC = ctypes.CDLL(None, use_errno=True)
HOLDS: dict[str, Callable[[], Check]] = {}
MIB = 1 << 20


def kind(make: Callable[[], Check]) -> Callable[[], Check]:
    """Enter *make* into the table under its name."""
    HOLDS[make.__name__.strip("_").replace("_", "-")] = make
    return make


def say(*words: object) -> None:
    """Write a line at once."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def child(work: Callable[[], object]) -> int:
    """Have *work* done in a child, which then ends; return its PID."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def linger() -> None:
    """Do nothing for as long as the parent lives."""
    while True:
        time.sleep(0.05)


def fd_of(result: int) -> int:
    """Return what a system call returned, if it is no error."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def echo(connection: socket.socket) -> None:
    """Send back what comes, until nothing comes any more."""
    while data := connection.recv(9):
        connection.sendall(data)


def asks(connection: socket.socket) -> Check:
    """Check that *connection* answers what it is asked."""

    def check() -> object:
        connection.sendall(b"are-you-9")
        return connection.recv(9, socket.MSG_WAITALL)

    return check


def counted(memory: mmap.mmap | memoryview) -> Check:
    """Have a child write into *memory*, and check that the parent sees it: that it is one memory for both."""
    memory[2 * MIB] = 7

    def work() -> None:
        while True:
            memory[0] = (memory[0] + 1) % 256
            time.sleep(0.002)

    child(work)

    def check() -> object:
        before, until = memory[0], time.monotonic() + 5
        while memory[0] == before and time.monotonic() < until:
            time.sleep(0.001)
        return memory[0] != before, memory[2 * MIB]

    return check


# --- processes -------------------------------------------------------------------------------------------------


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


# --- threads and numbers ---------------------------------------------------------------------------------------


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


# --- memory ----------------------------------------------------------------------------------------------------


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


# --- files -----------------------------------------------------------------------------------------------------


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


# --- pipes, events, terminals ----------------------------------------------------------------------------------


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


# --- sockets ---------------------------------------------------------------------------------------------------


@kind
def unix_pair() -> Check:
    mine, theirs = socket.socketpair()
    child(lambda: echo(theirs))
    return asks(mine)


def unix_listener(address: str) -> Check:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(4)

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=echo, args=[connection], daemon=True).start()

    child(serve)
    kept = socket.socket(socket.AF_UNIX)
    kept.connect(address)

    def check() -> object:
        with socket.socket(socket.AF_UNIX) as new:
            new.connect(address)
            return asks(kept)(), asks(new)()

    return check


@kind
def unix_named() -> Check:
    return unix_listener("listener")


@kind
def unix_abstract() -> Check:
    return unix_listener(f"\0holds-{os.getuid()}-{time.time_ns()}")


@kind
def unix_datagram() -> Check:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def check() -> object:
        mine.send(b"q")
        return theirs.recv(9)

    return check


@kind
def tcp_listener() -> Check:
    listener = socket.create_server(("127.0.0.1", 0))

    def check() -> object:
        with socket.create_connection(listener.getsockname()) as mine, listener.accept()[0] as theirs:
            mine.send(b"q")
            # So that no address is left in use behind it.
            mine.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return theirs.recv(1)

    return check


@kind
def tcp_listener_idle() -> Check:
    listener = socket.create_server(("127.0.0.1", 0))
    return listener.getsockname


@kind
def tcp_inside() -> Check:
    listener = socket.create_server(("127.0.0.1", 0))
    child(lambda: echo(listener.accept()[0]))
    return asks(socket.create_connection(listener.getsockname()))


@kind
def udp() -> Check:
    theirs = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    theirs.bind(("127.0.0.1", 0))
    mine = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    mine.connect(theirs.getsockname())

    def check() -> object:
        mine.send(b"q")
        return theirs.recv(5)

    return check


@kind
def netlink() -> Check:
    connection = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    connection.bind((0, 0))
    return lambda: connection.getsockname()[0] > 0


@kind
def raw_socket() -> Check:
    connection = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
    return connection.fileno


@kind
def packet_socket() -> Check:
    connection = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)
    return connection.fileno


# --- what cannot be dumped -------------------------------------------------------------------------------------


@kind
def io_uring() -> Check:
    fd = fd_of(LIBC.syscall(425, 4, ctypes.create_string_buffer(120)))
    return lambda: fd


@kind
def message_queue() -> Check:
    # attributes: flags, 2 messages of 8 bytes at most, none yet
    attributes = array.array("l", [0, 2, 8, 0, 0, 0, 0, 0]).tobytes()
    fd = fd_of(LIBC.mq_open(f"/holds-{os.getuid()}".encode(), os.O_RDWR | os.O_CREAT, 0o600, attributes))
    return lambda: fd


@kind
def userfaultfd() -> Check:
    fd = fd_of(LIBC.syscall(323, 1))
    return lambda: fd


@kind
def perf_event() -> Check:
    attributes = ctypes.create_string_buffer(struct.pack("IIQ", 1, 112, 0) + bytes(96))
    fd = fd_of(LIBC.syscall(298, attributes, 0, -1, -1, 0))
    return lambda: fd


@kind
def bpf() -> Check:
    fd = fd_of(
        LIBC.syscall(321, 0, ctypes.create_string_buffer(struct.pack("IIIII", 2, 4, 4, 1, 0) + bytes(60)), 72)
    )
    return lambda: fd


@kind
def fuse() -> Check:
    os.mknod("fuse", 0o20600, os.makedev(10, 229))
    fd = os.open("fuse", os.O_RDWR)
    return lambda: fd


@kind
def traced() -> Check:
    strace = subprocess.Popen(["strace", "-f", "-o", "/dev/null", "sleep", "1000"])
    while not any("sleep" in Path(f"/proc/{pid}/comm").read_text() for pid in _children(strace.pid)):
        time.sleep(0.01)
    return lambda: strace.poll()


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def unshared(flags: int) -> Check:
    fd_of(LIBC.unshare(flags))
    return os.getpid


@kind
def user_namespace() -> Check:
    return unshared(0x10000000)


@kind
def mount_namespace() -> Check:
    return unshared(0x00020000)


@kind
def pid_namespace() -> Check:
    check = unshared(0x20000000)
    child(linger)
    return check


@kind
def unix_outside() -> Check:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect("daemon")
    return asks(connection)


@kind
def tcp_outside() -> Check:
    connection = socket.create_connection(("127.0.0.1", int(Path("port").read_text())))
    return asks(connection)


def main(name: str) -> Any:  # noqa: ANN401
    """Hold *name*, and tell of it until asked to stop."""
    check = HOLDS[name]()
    first = check()
    say("ready", first)
    number = 0
    while not os.path.exists("stop"):  # noqa: PTH110
        now = check()
        say("tick", number, "ok" if now == first else f"is {now!r} and was {first!r}")
        number += 1
        time.sleep(0.01)
    os._exit(3)


if __name__ == "__main__":
    main(sys.argv[1])
