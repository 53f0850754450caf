"""ckpt() for programs in Python: checkpoint this job at this point. Uses only what Python brings itself.

Source: lib/man/outlast_ckpt.3; the same in C is lib/liboutlast.c.
"""

# Simple paths: one system call for each look, and it is imported by users' programs.
# ruff: noqa: PTH115, PTH118, PTH123

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable

_VARIABLE = "OUTLAST_JOB"
_CONNECT_SECONDS = 10.0
_FIRST_WAIT, _LONGEST_WAIT = 0.001, 0.05  # seconds between two looks
_WITHOUT_SECONDS = 2.0
_PENDING = "pending"

_before: list[Callable[[], object]] = []
_after: list[Callable[[bool], object]] = []


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


def ckpt() -> bool:
    """Checkpoint the whole job at this point.

    Returns False when the checkpoint is in the store, and True in the job that was restored from it, as fork()
    returns twice. Where there is no Outlast, or the job runs without checkpoints, it returns False at once.
    Connections to other hosts should be closed before.

    Raises:
        CheckpointFailed: there is no checkpoint.
    """
    directory = os.environ.get(_VARIABLE)
    if not directory or not os.path.lexists(os.path.join(directory, "run")):
        return False
    for hook in _before:
        hook()
    restored = False
    try:
        restored = _ckpt(directory)
    finally:
        for hook_after in _after:
            hook_after(restored)
    return restored


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
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_CONNECT_SECONDS)
            connection.connect(os.path.join(directory, "manager.sock"))
            connection.sendall(b'{"op": "ckpt"}\n')
            line = b""
            while not line.endswith(b"\n") and (data := connection.recv(4096)):
                line += data
    except OSError as error:
        raise CheckpointFailed(f"{directory}/manager.sock: {error.strerror or error}") from None
    reply = json.loads(line or b'{"ok": false, "error": "no answer"}')
    if reply["ok"]:
        run, number = reply["ckpt"].split()
        return run, number
    if reply.get("exit_code") == os.EX_USAGE:
        return None
    raise CheckpointFailed(str(reply["error"]))


def _capsule() -> tuple[str, str]:
    """Return what tells one capsule from every other: when the host was booted, and when the capsule's init began."""
    with open("/proc/sys/kernel/random/boot_id") as boot, open("/proc/1/stat") as init:
        return boot.read(), init.read().rpartition(")")[2].split()[19]


def _link(*path: str) -> str | None:
    try:
        return os.readlink(os.path.join(*path))
    except OSError:
        return None
