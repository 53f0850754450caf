"""What CRIU says in its log, and what the job's author can do about it."""

from __future__ import annotations

import re
from pathlib import Path

from criu_backend._explain import way_out

_ERROR = re.compile(r"^(?:\([0-9.]+\))?\s*(?:\d+: )?Error \((?P<where>[^)]+)\): (?P<what>.*)$", re.M)

# What CRIU logs as an error although it is none. Source: criu 4.2, seen where CAP_SYS_RESOURCE is missing.
_NOISE = re.compile(r"Can't setup RLIMIT_NOFILE|Unable to create tun")

# What CRIU says, and what the job's author can do about it. Source: criu 4.2, criu/files-ext.c,
# criu/sk-inet.c, criu/sk-unix.c, criu/files-reg.c, criu/tty.c, and what was seen of it.
_HINTS = (
    (
        re.compile(r"io_uring"),
        "the job uses io_uring, which CRIU cannot dump: start it with the compat filter",
    ),
    (
        # Linux 6.8 and later refuse to pass the descriptor of an io_uring on.
        re.compile(r"Can't retrieve FDs from socket"),
        "the job has an open file that cannot be handed on, such as an io_uring: use the compat filter",
    ),
    (re.compile(r"half of stream unix connection"), "the job talks to a daemon over a unix socket; close it"),
    (re.compile(r"Can't dump .*/dev/nvidia|/dev/kfd"), "GPU state needs CRIU's GPU plugins"),
    (re.compile(r"chr 10:229"), way_out("fuse")),
    (re.compile(r"userfaultfd"), way_out("userfaultfd")),
    (re.compile(r"perf_event"), way_out("perf")),
    (re.compile(r"anon_inode:bpf"), way_out("bpf")),
    (re.compile(r"Can't dump file \d+ of that type"), way_out("device")),
    # Those of a POSIX message queue alone are on a file system that is not mounted.
    (re.compile(r"Can't lookup mount=\d+ for fd=\d+ path=/[^/]*$"), way_out("message-queue")),
    (re.compile(r"fsnotify"), "watch files (inotify) on a file system with file handles: ext4, XFS, tmpfs"),
    (re.compile(r"link remap for .*\.nfs"), way_out("deleted-nfs")),
    (re.compile(r"link remap"), way_out("deleted-linked")),
    (re.compile(r"Unable to convert uid or gid"), way_out("user-namespace")),
    (re.compile(r"have a proper root mount"), way_out("mount-namespace")),
    (re.compile(r"Unable to detach from"), way_out("leaderless")),
    (re.compile(r"Unseizable"), "the job is traced (strace, gdb); checkpoints work once that has ended"),
    (re.compile(r"nested (pid|user|mnt) namespace"), "containers inside the job cannot be dumped"),
    (re.compile(r"has bad size"), "a file that the job had open has changed since the checkpoint"),
    (re.compile(r"Can't open file .*: No such file"), "a file that the job had open is not on this node"),
    (re.compile(r"increase limit|ghost file"), "a deleted file that the job has open is too large"),
    (re.compile(r"Cannot assign requested address"), "the job listens on the address of the node it ran on"),
)

# SIGCONT, as a scheduler sends it before SIGTERM, takes a task out of the stop that CRIU put it into.
# Source: criu 4.2, compel/src/lib/infect.c, criu/parasite-syscall.c.
_INTERRUPTED = re.compile(r"task interruption, aborting|was stopped by \d+ unexpectedly")


class CriuError(Exception):
    """CRIU failed. *log* is its full log, kept; *hint*, where one is known, is for the job's author.

    *interrupted* says that a signal for the job broke it off, so that the next try may succeed.
    """

    def __init__(
        self, message: str, *, log: Path, hint: str | None = None, interrupted: bool = False
    ) -> None:
        super().__init__(message)
        self.log = log
        self.hint = hint
        self.interrupted = interrupted


def error_from_log(action: str, log: Path) -> CriuError:
    """Turn CRIU's log into an error that says why.

    Args:
        action: "dump" or "restore".
        log: the file that CRIU wrote at verbosity 1 or more; a missing file is an empty log.
    """
    text = log.read_text(errors="replace") if log.exists() else ""
    found = [(where, what) for where, what in _ERROR.findall(text) if not _NOISE.search(what)]
    # The first error is the cause; those after it are CRIU undoing its work.
    where, what = found[0] if found else ("no error in its log", "CRIU ended without saying why")
    hint = next((h for pattern, h in _HINTS if any(pattern.search(said) for _, said in found)), None)
    interrupted = any(_INTERRUPTED.search(said) for _, said in found)
    return CriuError(f"{action}: {what} ({where}; log: {log})", log=log, hint=hint, interrupted=interrupted)
