"""ckpt() for programs in Python: checkpoint this job at this point. Uses only what Python brings itself.

Source: lib/man/outlast_ckpt.3; the same in C is lib/ckpt.c.
"""

# Simple paths: one system call for each look, and it is imported by users' programs.
# ruff: noqa: PTH115, PTH118, PTH120, PTH123

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import time
from collections.abc import Callable
from typing import Any

_VARIABLE = "OUTLAST_JOB"
_CONNECT_SECONDS = 10.0
_FIRST_WAIT, _LONGEST_WAIT = 0.001, 0.05  # seconds between two looks
_WITHOUT_SECONDS = 2.0
_PENDING = "pending"

_before: list[Callable[[], object]] = []
_after: list[Callable[[bool], object]] = []
# By first byte and length, in whole pages: what keeps the memory alive.
_excluded: dict[tuple[int, int], object] = {}


class CheckpointFailed(Exception):
    """There is no checkpoint; the program runs on. Its text says why."""


def on_ckpt(
    before: Callable[[], object] | None = None, after: Callable[[bool], object] | None = None
) -> None:
    """Have *before* called at the beginning of each ckpt(), and *after* at its end, with whether it was restored.

    The last *before* to be registered is the first to be called; *after* the other way round, as with
    pthread_atfork.
    """
    if before is not None:
        _before.insert(0, before)
    if after is not None:
        _after.append(after)


def active() -> bool:
    """Return whether this process is one of a job that is checkpointed."""
    return _mine() is not None


def exclude(memory: Any) -> None:  # noqa: ANN401
    """Leave *memory*, a writable buffer, out of the checkpoints that ckpt() takes: scratch memory.

    Its whole pages are given back before each, so they read as zero after it, in the running job too. Private memory
    only. Periodic checkpoints hold it.
    """
    pages, held = _pages(memory)
    if pages[1] > 0:
        _excluded[pages] = held


def include(memory: Any) -> None:  # noqa: ANN401
    """Undo exclude(); KeyError if the same memory was not excluded."""
    pages, _ = _pages(memory)
    if pages[1] > 0:
        del _excluded[pages]


def _pages(memory: Any) -> tuple[tuple[int, int], object]:  # noqa: ANN401
    view = memoryview(memory).cast("B")
    held = (ctypes.c_char * view.nbytes).from_buffer(view)
    address = ctypes.addressof(held)
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + view.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    return (first, max(0, last - first)), held


def ckpt() -> bool:
    """Checkpoint the whole job at this point.

    Returns False when the checkpoint is in the store, and True in the job that was restored from it, as fork()
    returns twice. Where there is no Outlast, or the job runs without checkpoints, it returns False at once.
    Connections to other hosts should be closed before.

    Raises:
        CheckpointFailed: there is no checkpoint.
    """
    directory = _mine()
    if directory is None:
        return False
    for hook in _before:
        hook()
    if _excluded:
        libc = ctypes.CDLL(None)
        for address, length in _excluded:
            libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
    restored = False
    try:
        restored = _ckpt(directory)
    finally:
        for hook_after in _after:
            hook_after(restored)
    return restored


def tckpt(pid: int = 0) -> None:
    """Have the whole job of process *pid* checkpointed soon, without it noticing; return when that is agreed on.

    Args:
        pid: a process of the caller's own job, or of another job of the same user on this node; 0: the caller.

    Raises:
        CheckpointFailed: it is not of a job that is checkpointed, or not the caller's.
    """
    directory = _mine() if pid == 0 else _directory_of(pid)
    if not directory:
        raise CheckpointFailed(f"process {pid or os.getpid()}: it is not of a job that is checkpointed")
    reply = _converse(directory, b'{"op": "checkpoint"}\n')
    if not reply["ok"]:
        raise CheckpointFailed(str(reply["error"]))


def _mine() -> str | None:
    """Return the directory of this job's manager; None where there is none."""
    named = os.environ.get(_VARIABLE)
    if not named:
        return None
    if os.path.lexists(os.path.join(named, "run")):
        return named
    # Maybe the job was recovered under another name: then one of the managers here knows this process.
    try:
        with os.scandir(os.path.dirname(named)) as entries:
            others = [entry.path for entry in entries if entry.is_symlink()]
    except OSError:
        return None
    for directory in others:
        try:
            if _converse(directory, b'{"op": "ckpt", "probe": true}\n')["ok"]:
                return directory
        except CheckpointFailed:
            continue
    return None


def _directory_of(pid: int) -> str:
    """Return $OUTLAST_JOB of another process, which only its user may read; "" if it has none."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            words = file.read().split(b"\0")
    except OSError as error:
        raise CheckpointFailed(f"process {pid}: {error.strerror}") from None
    name = _VARIABLE.encode() + b"="
    return next((os.fsdecode(word[len(name) :]) for word in words if word.startswith(name)), "")


def _ckpt(directory: str) -> bool:
    before = _capsule()
    ticket = _ask(directory)
    if ticket is None:
        return False
    run, number = ticket
    wait = _FIRST_WAIT
    without = 0.0
    while True:
        # One system call for each look: there is no open file that would have to be there after a restore.
        now = _link(directory, "run")
        if now not in (None, run):
            return True
        # Restored as another job, of which nobody here knows by the old name?
        without = 0.0 if now is not None else without + wait
        if without > _WITHOUT_SECONDS:
            if _capsule() != before:
                return True
            without = 0.0
        said = _link(directory, "calls", number)
        if now is not None and said != _PENDING and _link(directory, "run") == run:
            if said is not None and said.startswith("done "):
                return False
            raise CheckpointFailed(
                (said or "").removeprefix("failed ") or "the job's manager does not know of it"
            )
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT)


def _ask(directory: str) -> tuple[str, str] | None:
    """Ask the job's manager; return what to look for, or None where this process is not of its job."""
    reply = _converse(directory, b'{"op": "ckpt"}\n')
    if reply["ok"]:
        run, number = str(reply["ckpt"]).split()
        return run, number
    if reply.get("exit_code") == os.EX_USAGE:
        return None
    raise CheckpointFailed(str(reply["error"]))


def _converse(directory: str, request: bytes) -> dict[str, Any]:
    """Send one request to the job's manager; return its answer."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_CONNECT_SECONDS)
            connection.connect(os.path.join(directory, "manager.sock"))
            connection.sendall(request)
            line = b""
            while not line.endswith(b"\n") and (data := connection.recv(4096)):
                line += data
    except OSError as error:
        raise CheckpointFailed(f"{directory}/manager.sock: {error.strerror or error}") from None
    reply: dict[str, Any] = json.loads(line or b'{"ok": false, "error": "no answer"}')
    return reply


def _capsule() -> tuple[str, str]:
    """Return what tells one capsule from every other: when the host was booted, and when the capsule's init began."""
    with open("/proc/sys/kernel/random/boot_id") as boot, open("/proc/1/stat") as init:
        return boot.read(), init.read().rpartition(")")[2].split()[19]


def _link(*path: str) -> str | None:
    try:
        return os.readlink(os.path.join(*path))
    except OSError:
        return None
