"""The capsule: a process tree in its own PID, mount and IPC namespaces, under a mini-init.

The work that only the kernel's own calls can do is in native/capsule.c, a helper program; here it is started
and what it made is found again.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from types import MappingProxyType

HELPER = Path("/usr/libexec/outlast/outlast-capsule")

# The restored tree finds the new standard descriptors here. Source: native/capsule.c, INHERITED_STDIO.
INHERITED_STDIO = 10
PAGES_FD = 13
READY_FD = 14

_CLEAN_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


class CapsuleError(Exception):
    """A capsule could not be made; its text says why."""


@dataclass(frozen=True)
class Context:
    """The process in whose place a capsule's job runs, and how to reach it.

    *pidfd* keeps its PID from being another's; *stdio* are the job's three standard descriptors; *status*
    is one end of a SOCK_SEQPACKET pair, whose other end the process itself holds: it writes signals as int32
    and reads the job's wait status as int32. None of them is closed here.
    """

    pid: int
    pidfd: int
    stdio: tuple[int, int, int]
    status: int


@dataclass(frozen=True)
class Capsule:
    """A running capsule: its init's PID and start time (clock ticks since boot), and its job's PID inside."""

    init_pid: int
    init_start: int
    job_pid: int

    @classmethod
    def find(cls, init_pid: int, init_start: int, job_pid: int) -> Capsule | None:
        """Return the capsule that was described so, if it still lives."""
        return cls(init_pid, init_start, job_pid) if _start_time(init_pid) == init_start else None

    @property
    def alive(self) -> bool:
        """Whether its init, and so the job, still lives."""
        return _start_time(self.init_pid) == self.init_start

    def wait(self, seconds: float) -> bool:
        """Wait until the capsule has ended, at most *seconds*; return whether it has."""
        try:
            pidfd = os.pidfd_open(self.init_pid)
        except ProcessLookupError:
            return True
        try:
            if not self.alive:
                return True
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            return bool(poll.poll(seconds * 1000))
        finally:
            os.close(pidfd)

    def kill(self) -> None:
        """End the capsule and all in it at once."""
        try:
            pidfd = os.pidfd_open(self.init_pid)
        except ProcessLookupError:
            return
        try:
            if self.alive:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)

    def tasks(self) -> Iterator[int]:
        """Yield the PIDs, as this process sees them, of the job's processes: of its root and all below it."""
        pending = [pid for pid in _children(self.init_pid) if _inner_pid(pid) == self.job_pid]
        while pending:
            pid = pending.pop()
            yield pid
            pending.extend(_children(pid))


def start_capsule(
    context: Context,
    argv: Sequence[str],
    environment: Mapping[str, str],
    state: Path,
    *,
    compat_filter: bool = True,
    helper: Path = HELPER,
) -> Capsule:
    """Run *argv* as the user, in the cgroups and within the limits of *context*, in a capsule of its own.

    When the job has ended, the file `exit` in *state* holds its wait status; if it was sent SIGTERM or
    SIGINT before, there is a file `asked-to-end`.

    Raises:
        CapsuleError: the capsule could not be made; nothing of the job has run. A command that cannot be
            executed is no such error: the job then ends with 126 or 127, as under a shell.
    """
    program = _program(argv, environment)
    options = [] if compat_filter else ["--no-filter"]
    return _make("start", context, program, state, options, helper)


def restore_capsule(
    context: Context,
    command: Sequence[str],
    environment: Mapping[str, str],
    state: Path,
    *,
    last_pid: int,
    pager: tuple[Sequence[str], int] | None = None,
    helper: Path = HELPER,
) -> Capsule:
    """Make a capsule as `start_capsule` does and run *command*, a `criu restore`, as root in it, in *environment*.

    Args:
        command: must write the PID of the tree's root to `restored.pid` in *state*. The descriptors 10, 11
            and 12 in it are the three of *context*.
        last_pid: CRIU's own processes get the PIDs after this one, so none that the tree needs may follow.
        pager: a program that runs beside the tree until it has all its pages, and a descriptor that it
            gets as 13 (PAGES_FD); it writes to 14 (READY_FD) when it is ready, and *command*, which starts at the
            same time, can read that from 14. If it fails the capsule ends.

    Raises:
        CapsuleError: the capsule could not be made, or *command* failed; nothing is left running.
    """
    (state / "restored.pid").unlink(missing_ok=True)
    program = _program(command, environment)
    options = ["--last-pid", str(last_pid)]
    if pager is None:
        return _make("restore", context, program, state, options, helper)
    argv, pages = pager
    pager_fd = os.memfd_create("pager")
    try:
        _write_program(pager_fd, _program(argv, clean_environment()))
        fds = {"pager": pager_fd, "pages": pages}
        return _make("restore", context, program, state, options, helper, fds)
    finally:
        os.close(pager_fd)


def enter_command(capsule: Capsule, command: Sequence[str], helper: Path = HELPER) -> list[str]:
    """Return the command that runs *command* inside *capsule*, where only SIGKILL can end it."""
    return [os.fspath(helper), "enter", str(capsule.init_pid), "--", *command]


def clean_environment(**extra: str) -> dict[str, str]:
    """Return the environment for programs that run as root: nothing of the job's or the caller's is in it."""
    return {**_CLEAN_ENVIRONMENT, **extra}


def _program(argv: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    return [str(len(argv)), *argv, *(f"{key}={value}" for key, value in environment.items())]


def _write_program(fd: int, strings: Sequence[str]) -> None:
    with open(os.dup(fd), "wb") as file:  # noqa: PTH123 - a descriptor has no path
        file.write(b"".join(os.fsencode(text) + b"\0" for text in strings))


def _make(
    action: str,
    context: Context,
    program: Sequence[str],
    state: Path,
    options: Sequence[str],
    helper: Path,
    more: Mapping[str, int] = MappingProxyType({}),
) -> Capsule:
    for name in ("exit", "asked-to-end"):
        (state / name).unlink(missing_ok=True)
    program_fd = os.memfd_create("program")
    state_fd = os.open(state, os.O_DIRECTORY | os.O_CLOEXEC)
    report, theirs = socket.socketpair()
    try:
        _write_program(program_fd, program)
        fds = {
            **more,
            "pidfd": context.pidfd,
            "status": context.status,
            "report": theirs.fileno(),
            "state": state_fd,
            "program": program_fd,
        }
        command = [os.fspath(helper), action, "--peer", str(context.pid)]
        command += [word for name, fd in fds.items() for word in (f"--{name}", str(fd))]
        keeper = Popen(
            [*command, *options],
            stdin=context.stdio[0],
            stdout=context.stdio[1],
            stderr=context.stdio[2],
            pass_fds=tuple(fds.values()),
            env=clean_environment(),
            cwd="/",
        )
        theirs.close()
        init_pid, start, job_pid, error = 0, None, 0, "it ended without a word"
        with report.makefile() as lines:
            for line in lines:
                word, _, rest = line.rstrip("\n").partition(" ")
                if word == "init":
                    init_pid = int(rest)
                    start = _start_time(init_pid)
                    report.sendall(b"1")  # its consent: see native/capsule.c
                elif word == "ready":
                    job_pid = int(rest)
                    break
                else:
                    error = rest or line.strip()
        keeper.wait()
        if not job_pid or start is None:
            raise CapsuleError(error)
        return Capsule(init_pid, start, job_pid)
    except OSError as error:
        raise CapsuleError(f"{helper}: {error.strerror}") from error
    finally:
        for fd in (program_fd, state_fd):
            os.close(fd)
        report.close()
        theirs.close()


def _start_time(pid: int) -> int | None:
    """Return when process *pid* started, in clock ticks since boot; None when it has ended.

    Source: proc_pid_stat(5), fields 3 and 22.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _children(pid: int) -> list[int]:
    found: list[int] = []
    gone = (FileNotFoundError, ProcessLookupError)
    with contextlib.suppress(*gone):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(*gone):  # others may have children
                found.extend(map(int, (thread / "children").read_text().split()))
    return found


def _inner_pid(pid: int) -> int | None:
    """Return what *pid* is called in the innermost PID namespace that it is in."""
    try:
        match = re.search(r"^NSpid:.*?(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(match[1]) if match else None
