"""Kinds of things that cannot be dumped, or are dead after a restore."""

# System calls are what it is about.

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import socket
import struct
import subprocess
import time
from pathlib import Path

from .holding import LIBC, Check, asks, child, fd_of, kind, linger


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


def _device(path: str, number: int) -> Check:
    """Hold a device node called *path*. Those of hardware are the FUSE device, which can be opened everywhere."""
    Path(path).parent.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mknod(path, 0o20666, number)
    fd = os.open(path, os.O_RDWR)
    return lambda: fd


@kind
def gpu() -> Check:
    return _device("/dev/nvidia77", os.makedev(10, 229))


@kind
def rdma() -> Check:
    return _device("/dev/infiniband/uverbs77", os.makedev(10, 229))


@kind
def device() -> Check:
    return _device("/dev/loop-control77", os.makedev(10, 237))


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
