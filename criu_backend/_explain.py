"""What of a process tree cannot be dumped, or does not survive: found in /proc, without touching the processes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from criu_backend._peers import Connections, Endpoint

# What CRIU writes into its images at most of a deleted file: --ghost-limit of `Criu.dump`.
GHOST_LIMIT = 1 << 30

# Descriptors without a file that CRIU knows. Source: criu 4.2, criu/files.c, dump_one_file().
_KNOWN_ANONYMOUS = frozenset(("eventfd", "eventpoll", "inotify", "fanotify", "signalfd", "timerfd", "pidfd"))
# Character devices that CRIU opens again: (major, minors or None for all). Source: criu/files.c, dump_chrdev();
# Linux, Documentation/admin-guide/devices.txt.
_KNOWN_DEVICES: Mapping[int, frozenset[int] | None] = {
    1: None,  # null, zero, full, random, urandom, kmsg
    4: None,  # consoles
    5: frozenset({0, 1, 2}),  # tty, console, ptmx
    10: frozenset({200}),  # net/tun
    **dict.fromkeys(range(136, 144)),  # terminals
}
_KNOWN_SOCKETS = re.compile(r"UNIX.*|TCP(v6)?|UDP(-?Lite)?(v6)?|RAW(v6)?|PING(v6)?|NETLINK|PACKET")
# statfs(2)
_MQUEUE_MAGIC = 0x19800202
_NFS_MAGIC = 0x6969
# What NFS calls a file that is deleted while it is open: number and counter. Source: Linux, fs/nfs/unlink.c.
_SILLY = re.compile(r"/\.nfs[0-9a-f]{24}$")
# Not "net": CRIU dumps those too.
_NAMESPACES = ("user", "pid_for_children", "mnt")  # the last is read last: see _process()

# By kind: what is found, and what can be done about it. {} is what exactly.
_WORDS: Mapping[str, tuple[str, str]] = {
    "io_uring": (
        "an io_uring, which CRIU cannot dump",
        "start the job with the compat filter (no OUTLAST_FILTER=off), or it without io_uring (UV_USE_IO_URING=0)",
    ),
    "userfaultfd": ("a userfaultfd, which CRIU cannot dump", "switch off post-copy memory in the program"),
    "perf": ("a performance counter (perf_event_open)", "do not run the job under perf or PAPI"),
    "bpf": ("a BPF map or program", "close it once it is loaded"),
    "anonymous": ("{}, which CRIU cannot dump", "close it when the program needs it no more"),
    "message-queue": ("the POSIX message queue {}", "use SysV message queues, or pipes"),
    "unix-outside": (
        "a stream socket to a process outside the job{}",
        "close it when it has been used; for nscd, munge or dbus, look things up before the long part",
    ),
    "tcp-outside": (
        "a TCP connection to {}, which is dead after a restore",
        "have the program connect anew when it breaks; [checkpoint] tcp = close has it break at once",
    ),
    "socket": ("a socket of the kind {}, which CRIU cannot dump", "use TCP or a UNIX socket"),
    "gpu": ("the GPU device {}", "checkpoints of jobs on GPUs are not possible"),
    "rdma": ("the RDMA device {}", "have MPI use shared memory and TCP (Open MPI: --mca btl self,sm)"),
    "fuse": ("a FUSE server ({})", "mount the file system outside the job"),
    "device": ("the device {}", "close it when it has been used"),
    "device-memory": ("memory of the device {}", "unmap it when it has been used"),
    "user-namespace": ("a user namespace of its own (a container)", "run the program without the container"),
    "pid-namespace": ("a PID namespace of its own (a container)", "run the program without the container"),
    "mount-namespace": (
        "a mount namespace of its own (a container)",
        "run the program without the container",
    ),
    "step": (
        "a step of srun, whose processes are the node's and not the job's",
        "start the program without srun (Open MPI: mpirun), or take its steps' results between checkpoints",
    ),
    "leaderless": (
        "its first thread has ended before the others, which CRIU cannot dump",
        "have the first thread wait for the others (pthread_join) and end last",
    ),
    "traced": ("it is traced by process {} (strace, gdb)", "checkpoints work once that has ended"),
    "deleted-large": ("a deleted file of {}", "at most 1 GiB goes with a checkpoint: do not delete it"),
    "deleted-nfs": ("{}, deleted on NFS while it is open", "delete it when it has been closed"),
    "deleted-linked": ("{}, deleted, but with another name", "open the file by the name that it has now"),
}
KINDS = tuple(_WORDS)
# These do not stop the dump; the restored job has lost them.
_LOST = frozenset({"tcp-outside"})
# CRIU dumps the tree with these, but a part of the job is no part of the tree.
INCOMPLETE = frozenset({"step"})


@dataclass(frozen=True)
class Finding:
    """One thing of the process *pid*, as the job itself calls it, that does not go with a checkpoint.

    *fd* is its descriptor, or None where it is no file; *stops* says whether there can be no checkpoint at all.
    """

    kind: str
    pid: int
    name: str
    fd: int | None
    what: str
    way_out: str

    @property
    def stops(self) -> bool:
        """Whether there is no checkpoint while it is there; else only this is gone after a restore."""
        return self.kind not in _LOST

    def __str__(self) -> str:
        where = f"process {self.pid} ({self.name})"
        return f"{where}{'' if self.fd is None else f', descriptor {self.fd}'}: {self.what}"


def way_out(kind: str) -> str:
    """Return what the author of a job can do about findings of *kind*, one of `KINDS`."""
    return _WORDS[kind][1]


def explain(pids: Iterable[int], outside: int) -> list[Finding]:
    """Return what of the processes *pids* does not go with a checkpoint.

    It reads /proc only, about 10 µs for each descriptor; what ends meanwhile is passed over. Not while a dump is
    under way: CRIU traces the job then.

    Args:
        pids: the tree, as this process sees it.
        outside: the PID of a process in the namespaces that CRIU is to run in: of a capsule its init.
    """
    found: list[Finding] = []
    sockets: dict[int, list[tuple[int, int]]] = {}
    tree = list(pids)
    for pid in tree:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.extend(_process(pid, outside))
            found.extend(_descriptors(pid, sockets))
            found.extend(_mappings(pid))
    if sockets and tree:
        found.extend(_connections(tree[0], sockets))
    return found


def _finding(kind: str, pid: int, fd: int | None = None, exactly: str = "") -> Finding:
    what, way = _WORDS[kind]
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        status = Path(f"/proc/{pid}/status").read_text()
        name = re.findall(r"^Name:\s*(.*)$", status, re.M)[0]
        inner = int(re.findall(r"^NSpid:.*?(\d+)$", status, re.M)[0])
        return Finding(kind, inner, name, fd, what.format(exactly), way)
    return Finding(kind, pid, "?", fd, what.format(exactly), way)


def _process(pid: int, outside: int) -> Iterator[Finding]:
    status = Path(f"/proc/{pid}/status").read_text()
    if re.search(r"^State:\s*[ZX]", status, re.M):
        if _has_live_threads(pid):
            yield _finding("leaderless", pid)
        return
    tracers = {
        tracer
        for task in Path(f"/proc/{pid}/task").iterdir()
        for tracer in re.findall(r"^TracerPid:\s*([1-9]\d*)$", _text(task / "status"), re.M)
    }
    for tracer in sorted(tracers):
        yield _finding("traced", pid, exactly=tracer)
    with contextlib.suppress(OSError):
        if os.path.basename(os.readlink(f"/proc/{pid}/exe")) == "srun":  # noqa: PTH115, PTH119
            yield _finding("step", pid)
    own = {name: _namespace(pid, name) for name in _NAMESPACES}
    if own["mnt"] == "none":
        return  # it is just ending: of all that live, this can be read
    for name in _NAMESPACES:
        if own[name] != _namespace(outside, name):
            kind = {"pid_for_children": "pid", "mnt": "mount"}.get(name, name)
            yield _finding(f"{kind}-namespace", pid)


def _has_live_threads(pid: int) -> bool:
    """Whether the first thread of *pid*, which has ended, has left others that are not about to end themselves."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        status = _text(task / "status")
        pending = re.search(r"^SigPnd:\s*(\w+)$", status, re.M)
        # A process that ends as a whole has SIGKILL sent to each of its threads.
        ending = pending is None or int(pending[1], 16) & 1 << signal.SIGKILL - 1
        if not ending and not re.search(r"^State:\s*[ZX]", status, re.M) and not _is_exiting(task):
            return True
    return False


def _is_exiting(task: Path) -> bool:
    """Whether a thread is on its way out: proc_pid_stat(5), flags; PF_EXITING of linux/sched.h."""
    fields = _text(task / "stat").rpartition(")")[2].split()
    return not fields or bool(int(fields[6]) & 0x4)


def _namespace(pid: int, name: str) -> str:
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(f"/proc/{pid}/ns/{name}")  # noqa: PTH115 - many of them, and fast
    # A PID namespace for children that has no init yet cannot be read.
    return "none"


def _descriptors(pid: int, sockets: dict[int, list[tuple[int, int]]]) -> Iterator[Finding]:
    for number in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
        path = f"/proc/{pid}/fd/{number}"
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(path)  # noqa: PTH115
            fd = int(number)
            if target.startswith("socket:["):
                kind = _socket_kind(path)
                if kind is not None and not _KNOWN_SOCKETS.fullmatch(kind):
                    yield _finding("socket", pid, fd, kind)
                sockets.setdefault(int(target[8:-1]), []).append((pid, fd))
            elif target.startswith("anon_inode:"):
                yield from _anonymous(pid, fd, target.removeprefix("anon_inode:").strip("[]"))
            elif target.startswith("/") and not target.startswith("/memfd:"):
                yield from _file(pid, fd, target, os.stat(path))  # noqa: PTH116


def _anonymous(pid: int, fd: int, name: str) -> Iterator[Finding]:
    if name.startswith("bpf"):
        yield _finding("bpf", pid, fd)
    elif name in ("io_uring", "userfaultfd"):
        yield _finding(name, pid, fd)
    elif name == "perf_event":
        yield _finding("perf", pid, fd)
    elif name not in _KNOWN_ANONYMOUS:
        yield _finding("anonymous", pid, fd, name)


def _file(pid: int, fd: int, target: str, facts: os.stat_result) -> Iterator[Finding]:
    if stat.S_ISCHR(facts.st_mode):
        major, minor = os.major(facts.st_rdev), os.minor(facts.st_rdev)
        minors = _KNOWN_DEVICES.get(major, frozenset())
        if minors is not None and minor not in minors:
            yield _finding(_device_kind(target, major, minor), pid, fd, target)
    elif stat.S_ISREG(facts.st_mode):
        path = f"/proc/{pid}/fd/{fd}"
        if target.count("/") == 1 and _is_on(path, _MQUEUE_MAGIC):
            yield _finding("message-queue", pid, fd, target.removesuffix(" (deleted)"))
        elif _SILLY.search(target) and _is_on(path, _NFS_MAGIC):
            yield _finding("deleted-nfs", pid, fd, target)
        elif target.endswith(" (deleted)"):
            size = facts.st_blocks * 512
            if facts.st_nlink:
                yield _finding("deleted-linked", pid, fd, target.removesuffix(" (deleted)"))
            elif size > GHOST_LIMIT:
                yield _finding("deleted-large", pid, fd, f"{size >> 20} MiB")


def _device_kind(path: str, major: int, minor: int) -> str:
    if path.startswith(("/dev/nvidia", "/dev/dri/", "/dev/kfd")):
        return "gpu"
    if path.startswith("/dev/infiniband/") or major == 231:
        return "rdma"
    return "fuse" if (major, minor) == (10, 229) else "device"


def _mappings(pid: int) -> Iterator[Finding]:
    mapped = set(re.findall(r" (/dev/\S+)", _text(Path(f"/proc/{pid}/maps"))))
    for path in sorted(mapped):
        if not path.startswith(("/dev/shm/", "/dev/zero", "/dev/null", "/dev/hugepages")):  # noqa: S108
            with contextlib.suppress(OSError):
                facts = Path(path).stat()
                if stat.S_ISCHR(facts.st_mode):
                    yield _finding("device-memory", pid, exactly=path)


def _connections(pid: int, sockets: Mapping[int, list[tuple[int, int]]]) -> Iterator[Finding]:
    """Find the connections of which only one end is in the tree."""
    known = Connections(pid)
    mine = {end for inode in sockets if (end := known.tcp(inode)) is not None}
    for inode, holders in sockets.items():
        peer = known.unix_peer(inode)
        if peer and peer not in sockets:
            yield _finding("unix-outside", *holders[0], _behind(known.name(peer)))
        end = known.tcp(inode)
        if end is None or not end.connected:
            continue
        other = Endpoint(end.remote, end.local)
        if other not in mine and not known.waiting(other):
            yield _finding("tcp-outside", *holders[0], end.remote)


def _behind(name: str) -> str:
    return f" ({name})" if name else ""


def _socket_kind(path: str) -> str | None:
    try:
        return os.getxattr(path, "system.sockprotoname").rstrip(b"\0").decode()
    except OSError:
        return None


class _Statfs(ctypes.Structure):
    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_char * 248))


def _is_on(path: str, magic: int) -> bool:
    facts = _Statfs()
    result = ctypes.CDLL(None).statfs(path.encode(), ctypes.byref(facts))
    return bool(result == 0 and facts.f_type == magic)


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
