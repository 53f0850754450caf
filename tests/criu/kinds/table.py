"""What a job may hold, and whether it survives: the one table behind the tests and docs/limits.md."""

from __future__ import annotations

from dataclasses import dataclass

PROCESSES, THREADS, MEMORY = "Processes", "Threads and numbers", "Memory"
FILES, EVENTS, SOCKETS, LANGUAGES = "Files", "Pipes, events, terminals", "Sockets", "Languages and tools"
GROUPS = (PROCESSES, THREADS, MEMORY, FILES, EVENTS, SOCKETS, LANGUAGES)

HOLDS = ("env", "PYTHONPATH={here}/..", "/usr/bin/python3", "-su", "-m", "kinds.holds")
# Of hardware that a test machine lacks there is a device node of its name that CRIU dumps as little.
STANDS_IN = "not tried on the hardware itself"
OPEN_MPI = ("mpirun", "--oversubscribe", "-np", "2", "{built}/mpi")


@dataclass(frozen=True)
class Kind:
    """A kind of thing that a job can hold; *text* is its row in docs/limits.md.

    It is held by *argv*, or where that is empty by holds.py. *source* is compiled first, by the command *build*.
    """

    name: str
    group: str
    text: str
    argv: tuple[str, ...] = ()
    build: tuple[str, ...] = ()  # {here} is this directory, {built} that of the programs
    root: bool = False  # only root can have it
    needs: str = ""  # a program that must be there
    long: bool = False  # it takes installing what the testbed has not
    exit_code: int | None = 3  # once it has been asked to stop; None: it is not asked
    note: str = ""

    @property
    def command(self) -> tuple[str, ...]:
        """Its command line."""
        return self.argv or (*HOLDS, self.name)


@dataclass(frozen=True)
class Refused(Kind):
    """A kind that cannot be dumped: CRIU's words match *said*, and `explain` finds it as *finding*."""

    said: str = ""
    finding: str = ""
    unfiltered: bool = False  # the compat filter keeps the job from having it


def _c(name: str, group: str, text: str, *options: str) -> Kind:
    build = ("gcc", "-O2", "-Wall", "-Wextra", "-o", f"{{built}}/{name}", f"{{here}}/{name}.c", *options)
    return Kind(name, group, text, (f"{{built}}/{name}",), build, needs="gcc")


WORKS: tuple[Kind, ...] = (
    Kind("zombie", PROCESSES, "children that have ended and were not waited for"),
    Kind("child-that-ends-later", PROCESSES, "waiting for children, their exit codes"),
    Kind("stopped-child", PROCESSES, "stopped processes"),
    Kind("sessions", PROCESSES, "process groups and sessions"),
    Kind("orphan", PROCESSES, "daemons of the job's own, whose parents have ended"),
    Kind("names-and-flags", PROCESSES, "names and flags set with prctl(2)"),
    Kind("nice", PROCESSES, "nice values"),
    Kind("limits", PROCESSES, "resource limits"),
    Kind("net-namespace", PROCESSES, "network namespaces without interfaces to the outside", root=True),
    Kind("user-ids", PROCESSES, "several user and group ids", root=True),
    Kind("chroot", PROCESSES, "chroot", root=True),
    Kind("seccomp", PROCESSES, "seccomp filters"),
    Kind("clocks", PROCESSES, "the monotonic clock, which does not leap"),
    Kind(
        "shell-loop",
        PROCESSES,
        "shell scripts that start one program after the other",
        (
            "sh",
            "-c",
            'echo ready; n=0; while ! test -e stop; do sh -c "echo tick $n ok"; n=$((n+1)); done; exit 3',
        ),
    ),
    Kind(
        "pipeline",
        PROCESSES,
        "pipelines in shell scripts",
        (
            "bash",
            "-c",
            "echo ready; n=0; while ! test -e stop; do echo tick $n maybe; n=$((n+1)); sleep 0.02; done"
            " | cat | tee /dev/null | sed -u s/maybe/ok/; exit 3",
        ),
    ),
    Kind("threads", THREADS, "threads"),
    Kind("numpy", THREADS, "NumPy and its threads"),
    Kind("process-pool", THREADS, "Python's multiprocessing"),
    _c("openmp", THREADS, "OpenMP", "-fopenmp", "-lm"),
    _c("robust", THREADS, "mutexes shared between processes, robust ones too", "-pthread"),
    _c("rseq", THREADS, "restartable sequences (rseq, of every program with glibc 2.35)"),
    _c("vdso", THREADS, "clocks read without a system call (vDSO, as every program does)"),
    Kind("shared-anonymous", MEMORY, "memory shared between the job's processes"),
    Kind("shared-unlinked", MEMORY, "shared memory of /dev/shm that has no name any more"),
    Kind(
        "shared-named",
        MEMORY,
        "shared memory of /dev/shm that still has its name",
        note="its content goes with the checkpoint",
    ),
    Kind("memfd", MEMORY, "memfd"),
    _c("sysv", MEMORY, "SysV shared memory, semaphores, message queues"),
    Kind("dontfork", MEMORY, "memory that fork does not copy (MADV_DONTFORK)"),
    Kind("wipeonfork", MEMORY, "memory that fork wipes (MADV_WIPEONFORK)"),
    Kind("mlocked", MEMORY, "memory locked with mlock"),
    Kind("deleted-file", FILES, "deleted files that are open, up to 1 GiB"),
    Kind("nameless-file", FILES, "files without a name (O_TMPFILE)"),
    Kind("deleted-directory", FILES, "a working directory that was deleted"),
    Kind("devices", FILES, "/dev/null, zero, full, random, urandom"),
    Kind("proc-files", FILES, "open files of /proc and /sys"),
    Kind("proc-file-of-the-dead", FILES, "open files of /proc of processes that have ended"),
    Kind("lock-flock", FILES, "flock"),
    Kind("lock-posix", FILES, "POSIX file locks"),
    Kind("lock-ofd", FILES, "locks of open file descriptions"),
    Kind("pipe", EVENTS, "pipes, with what is in them"),
    Kind("fifo", EVENTS, "named pipes"),
    Kind("terminal", EVENTS, "terminals of the job's own (script, expect, tmux)"),
    Kind("epoll", EVENTS, "epoll"),
    Kind("eventfd", EVENTS, "eventfd"),
    Kind("timerfd", EVENTS, "timerfd"),
    Kind("signalfd", EVENTS, "signalfd"),
    Kind("inotify", EVENTS, "inotify"),
    Kind("fanotify", EVENTS, "fanotify", root=True),
    Kind("pidfd", EVENTS, "pidfd"),
    Kind("timer", EVENTS, "timers and their signals"),
    Kind("aio", EVENTS, "Linux AIO"),
    Kind("unix-pair", SOCKETS, "socket pairs"),
    Kind("unix-named", SOCKETS, "UNIX sockets between the job's processes"),
    Kind("unix-abstract", SOCKETS, "abstract UNIX sockets between the job's processes"),
    Kind("unix-datagram", SOCKETS, "UNIX datagram sockets"),
    Kind("tcp-listener", SOCKETS, "TCP servers of the job"),
    Kind("tcp-inside", SOCKETS, "TCP connections between the job's processes"),
    Kind("udp", SOCKETS, "UDP"),
    Kind("netlink", SOCKETS, "netlink"),
    Kind("raw-socket", SOCKETS, "raw sockets", root=True),
    Kind("packet-socket", SOCKETS, "packet sockets", root=True),
    Kind(
        "parallel",
        LANGUAGES,
        "GNU parallel",
        (
            "bash",
            "-c",
            "echo ready; seq 0 100000 | parallel --will-cite -k -j2 'sleep 0.02; echo tick {} ok'",
        ),
        needs="parallel",
        long=True,
        exit_code=None,
    ),
    Kind(
        "open-mpi",
        LANGUAGES,
        "Open MPI on one node",
        OPEN_MPI,
        ("mpicc", "-O2", "-o", "{built}/mpi", "{here}/mpi.c"),
        needs="mpirun",
        long=True,
        exit_code=0,
        note="its shared files go with the checkpoint; for another node see docs/use.md",
    ),
    Kind(
        "go",
        LANGUAGES,
        "Go",
        ("{built}/server",),
        (
            "env",
            "HOME={built}",
            "GOCACHE={built}/go",
            "go",
            "build",
            "-o",
            "{built}/server",
            "{here}/server.go",
        ),
        needs="go",
        long=True,
    ),
    Kind("node", LANGUAGES, "Node.js", ("node", "{here}/server.js"), needs="node", long=True),
    Kind(
        "java",
        LANGUAGES,
        "Java",
        ("java", "-cp", "{built}", "Threads"),
        ("javac", "-d", "{built}", "{here}/Threads.java"),
        needs="javac",
        long=True,
    ),
    Kind("r", LANGUAGES, "R", ("Rscript", "{here}/matrices.R"), needs="Rscript", long=True),
)

REFUSED: tuple[Refused, ...] = (
    Refused(
        "io-uring",
        EVENTS,
        "io_uring; the job is told that there is none, as by an old kernel",
        said=r"Can't retrieve FDs|io_uring",
        finding="io_uring",
        unfiltered=True,
    ),
    Refused(
        "inotify-without-handles",
        EVENTS,
        "inotify on file systems without file handles (overlayfs, some FUSE)",
        said=r"fsnotify",
        finding="",
        note="watch files on ext4, XFS or tmpfs",
    ),
    Refused(
        "message-queue", MEMORY, "POSIX message queues", said=r"Can't lookup mount", finding="message-queue"
    ),
    Refused(
        "userfaultfd",
        MEMORY,
        "userfaultfd",
        said=r"Can't dump file|Unknown",
        finding="userfaultfd",
        root=True,
    ),
    Refused("perf-event", EVENTS, "performance counters (perf, PAPI)", said=r"", finding="perf", root=True),
    Refused("bpf", EVENTS, "BPF maps and programs", said=r"", finding="bpf", root=True),
    Refused("fuse", FILES, "FUSE servers", said=r"Can't dump file", finding="fuse", root=True),
    Refused(
        "deleted-but-linked",
        FILES,
        "deleted files that have another name still",
        said=r"link|ghost",
        finding="deleted-linked",
    ),
    Refused(
        "traced",
        PROCESSES,
        "programs under strace or gdb",
        said=r"Unseizable|seize",
        finding="traced",
        needs="strace",
    ),
    Refused(
        "leaderless",
        THREADS,
        "processes whose first thread has ended (pthread_exit in main) before the others",
        ("{built}/leaderless",),
        ("gcc", "-O2", "-Wall", "-Wextra", "-pthread", "-o", "{built}/leaderless", "{here}/leaderless.c"),
        needs="gcc",
        said=r"Unable to detach",
        finding="leaderless",
    ),
    Refused(
        "user-namespace",
        PROCESSES,
        "user namespaces (containers)",
        said=r"namespace|convert uid",
        finding="user-namespace",
        root=True,
    ),
    Refused(
        "mount-namespace",
        PROCESSES,
        "mount namespaces (containers)",
        said=r"root mount|mnt",
        finding="mount-namespace",
        root=True,
    ),
    Refused(
        "pid-namespace",
        PROCESSES,
        "PID namespaces (containers)",
        said=r"nested pid",
        finding="pid-namespace",
        root=True,
    ),
    Refused("gpu", FILES, "GPUs", said=r"Can't dump file", finding="gpu", root=True, note=STANDS_IN),
    Refused(
        "rdma", FILES, "RDMA (InfiniBand)", said=r"Can't dump file", finding="rdma", root=True, note=STANDS_IN
    ),
    Refused("device", FILES, "other devices", said=r"Can't dump file", finding="device", root=True),
    Refused(
        "unix-outside",
        SOCKETS,
        "stream sockets to daemons (nscd, munge, dbus)",
        said=r"half of stream unix",
        finding="unix-outside",
    ),
)

# A part of the job, but no part of its tree: CRIU would dump the rest. tests/slurm has it, which has srun.
STEP = Kind("step", PROCESSES, "steps of srun in the job's script")

# tests/vm has these, whose nodes have NFS.
DELETED_NFS = Kind("deleted-nfs", FILES, "files on NFS that are deleted while they are open")

# Dumped, but dead after a restore.
TCP_OUTSIDE = Kind("tcp-outside", SOCKETS, "TCP connections to other hosts: they are dead after a restore")
