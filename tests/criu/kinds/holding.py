"""What every kind of thing that a job holds is made with: the table of them, children, answers."""

# System calls are what it is about.

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import time
from collections.abc import Callable

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
