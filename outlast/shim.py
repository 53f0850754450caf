#!/usr/bin/python3 -IS
"""The job's stand-in: runs where the scheduler started the job, while the job runs in its capsule.

    outlast-shim --interval INTERVAL [--manager DIR] -- COMMAND [ARGUMENT...]

Hands its standard descriptors to the job's manager, sets the job's files back when the manager asks for it
(as the user, so that nothing can be reached that the user could not), forwards signals, and ends as the job
ended. Should there be no manager, the job runs here as if there were no checkpoints.

It imports nothing but the standard library's built-in parts, since it is part of every job's start.
"""

import array
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time

_RUNTIME = "/run/outlast/jobs"
_SET_BACK = "/usr/libexec/outlast/outlast-set-back"
# What the scheduler, or its hook, calls the job and its run; the first that is set counts.
_JOB_ID = ("OUTLAST_JOB_ID", "SLURM_JOB_ID")
_EPOCH = ("OUTLAST_EPOCH", "SLURM_RESTART_COUNT")
_MANAGER_SECONDS = 20.0
# The same for a run that cannot do without, and whose manager is seen to be starting.
_RESTART_SECONDS = 120.0
_TEMPORARY_FAILURE = 75
# Where Slurm's Prolog notes the jobs that it was run for since this node was started, and for how long after its
# start a job may turn up that it was not run for.
_PROLOGS = "/run/outlast/prolog"
_YOUNG_SECONDS = 600.0
# How long slurmd may take to end a job that was queued again.
_REQUEUE_SECONDS = 60.0
# How long the manager may take to save the job before a signal that ends it is forwarded.
_ASK_SECONDS = 120.0
# Not forwarded: those that cannot be caught, that tell of the shim's own faults, and of its children.
_OWN = {
    "SIGKILL",
    "SIGSTOP",
    "SIGCHLD",
    "SIGSEGV",
    "SIGBUS",
    "SIGFPE",
    "SIGILL",
    "SIGABRT",
    "SIGTRAP",
    "SIGSYS",
    "SIGPIPE",
}
_FORWARDED = [number for number in signal.valid_signals() if getattr(number, "name", "SIGRT") not in _OWN]
# Before there is a job to forward them to, these end the shim as they would have ended the job.
_DEADLY = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU}


def say(text: str) -> None:
    """Write one line to the job's standard error."""
    try:
        os.write(2, f"outlast: {text}\n".encode(errors="surrogateescape"))
    except OSError:
        pass


def variable(names: "tuple[str, ...]", default: str) -> str:
    """Return the first of the environment's variables *names* that is set."""
    return next((os.environ[name] for name in names if name in os.environ), default)


def run_without(argv: list[str], why: str) -> None:
    """Become the job itself, without checkpoints; a job that has been requeued is not started again."""
    if variable(_EPOCH, "0") != "0":
        say(f"{why}; the job was restarted, and is not begun from its start while it may have checkpoints")
        say("see that outlast works on this node ('outlast doctor'), then requeue the job")
        sys.exit(_TEMPORARY_FAILURE)
    say(f"{why}; the job runs without checkpoints")
    become(argv)


def node_was_lost() -> bool:
    """Whether this node lost its power after Slurm's Prolog had prepared it for this run, and was back at once.

    slurmd then starts the job without another Prolog. The first process of a node is as old as the node is up.
    """
    job_id = os.environ.get("SLURM_JOB_ID", "")
    if not job_id or _JOB_ID[0] in os.environ or variable(_EPOCH, "0") == "0":
        return False
    if os.path.exists(f"{_PROLOGS}/{job_id}"):
        return False
    try:
        with open("/proc/1/stat") as stat:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
    except OSError:
        return False
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK") < _YOUNG_SECONDS


def queue_again() -> None:
    """Have Slurm queue this job again, which ends this process; returns if that was not to be."""
    import subprocess  # only a job whose node was lost needs it

    try:
        done = subprocess.run(
            ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=False,
            timeout=_REQUEUE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    if done.returncode == 0:
        time.sleep(_REQUEUE_SECONDS)


def become(argv: list[str]) -> None:
    """Replace this process by the job's command."""
    for number in _FORWARDED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - the job's own command
    except OSError as error:
        say(f"{argv[0]}: {error.strerror}")
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


def connect(directory: str) -> "socket.socket | None":
    """Return a connection to the job's manager, which may still be starting; None if none answers."""
    begun = time.monotonic()
    restarted = variable(_EPOCH, "0") != "0"
    while True:
        # Behind this file a manager is starting; what may listen there still is that of an earlier run.
        starting = os.path.exists(directory + ".starting")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if not starting:
                connection.connect(directory + "/shim.sock")
                return connection
        except OSError:
            if not os.path.isdir(directory):
                return None
        connection.close()
        if time.monotonic() > begun + (_RESTART_SECONDS if restarted and starting else _MANAGER_SECONDS):
            return None
        time.sleep(0.02)


def set_back(files: "list[dict[str, object]]", epoch: int) -> "str | None":
    """Have every file be what it was; return why that cannot be."""
    import subprocess  # only a job that is brought back needs it

    request = json.dumps({"files": files, "epoch": epoch})
    done = subprocess.run(
        [sys.executable, "-IS", _SET_BACK], input=request, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        return done.stdout.strip() or f"{_SET_BACK} ended with {done.returncode}"
    return None


class Shim:
    """One run of the job: its manager, its capsule, its signals."""

    def __init__(self, argv: list[str], interval: str) -> None:
        self.argv = argv
        self.interval = interval
        self.started = False
        self.attached = False
        self.manager_gone = False
        self.ask: "list[int]" = []  # signals that the manager decides on
        self.asked: "dict[int, float]" = {}  # those that it was asked about, and until when that may take
        self.capsule_gone = False
        self.wake_read, wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        os.set_blocking(wake_write, False)
        self.status, self.capsule_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.input = b""
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in _FORWARDED:
            signal.signal(number, lambda *_: None)

    def run(self, manager: socket.socket) -> int:
        """Have the job run in a capsule; return its wait status."""
        self.manager = manager
        hello = json.dumps({"op": "hello", "argv": self.argv, "interval": self.interval}).encode() + b"\n"
        fds = array.array("i", [0, 1, 2, self.capsule_end.fileno()])
        manager.sendmsg([hello[:1]], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        manager.sendall(hello[1:])
        self.capsule_end.close()
        poll = select.poll()
        for fd in (manager.fileno(), self.status.fileno(), self.wake_read):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(self.patience())}
            for number in [number for number, until in self.asked.items() if time.monotonic() >= until]:
                self.forward(number)
            if self.wake_read in ready:
                self.forward_signals()
            if self.status.fileno() in ready:
                message = self.status.recv(4)
                if len(message) == 4:
                    return int(struct.unpack("=i", message)[0])
                poll.unregister(self.status.fileno())
                self.capsule_gone = True
            if manager.fileno() in ready and not self.read_manager(manager):
                poll.unregister(manager.fileno())
                self.manager_gone = True
                for number in list(self.asked):
                    self.forward(number)
            if self.capsule_gone and self.started:
                # Gone without a word: somebody killed its init, and the kernel the job with it.
                return int(signal.SIGKILL)
            # While somebody holds the other end there is, or may yet be, a capsule; a second copy of the
            # job must not start beside it.
            if self.capsule_gone and self.manager_gone:
                run_without(self.argv, "the manager on this node ended")

    def forward_signals(self) -> None:
        for number in os.read(self.wake_read, 4096):
            if not (self.started or self.manager_gone) and number in _DEADLY:
                die_by(number)
            if self.attached:
                continue
            if number in self.ask and number not in self.asked and not self.manager_gone:
                try:
                    self.manager.sendall(json.dumps({"op": "signal", "number": number}).encode() + b"\n")
                except OSError:
                    self.forward(number)
                else:
                    self.asked[number] = time.monotonic() + _ASK_SECONDS
            elif number not in self.asked:
                self.forward(number)

    def forward(self, number: int) -> None:
        """Have the capsule's init send the job a signal."""
        self.asked.pop(number, None)
        try:
            self.status.send(struct.pack("=i", number))
        except OSError:
            pass  # the job has just ended; its status follows

    def patience(self) -> "float | None":
        """Return for how many milliseconds at most to wait for anything to happen."""
        if not self.asked:
            return None
        return max(0.0, min(self.asked.values()) - time.monotonic()) * 1000

    def read_manager(self, manager: socket.socket) -> bool:
        """Do what the manager says; return False once it has hung up."""
        try:
            data = manager.recv(65536)
        except OSError:
            data = b""
        if not data:
            return False
        *lines, self.input = (self.input + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            operation = message["op"]
            if operation == "say":
                say(message["text"])
            elif operation == "started":
                self.started = True
                self.ask = message.get("ask", [])
            elif operation == "forward":
                self.forward(message["number"])
            elif operation == "attached":
                # The scheduler signals the job's own session too: forwarded, a signal would come twice.
                self.attached = True
            elif operation == "set-back":
                reply = {"op": "set-back", "error": set_back(message["files"], message["epoch"])}
                manager.sendall(json.dumps(reply).encode() + b"\n")
            elif operation == "run-without":
                run_without(self.argv, message["why"])
            elif operation == "exit":
                say(message["text"])
                sys.exit(message["code"])
        return True


def die_by(number: int) -> None:
    """End by signal *number*, as the job did; the job has dumped core already if it should have."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    sys.exit(128 + number)


def main(arguments: list[str]) -> int:
    """Entry point; *arguments* are those after the program's own name."""
    interval, directory = "", ""
    while arguments and arguments[0] != "--":
        option = arguments.pop(0)
        if option not in ("--interval", "--manager") or not arguments:
            say(f"{option}: no such option; usage: outlast-shim --interval 10m [--manager DIR] -- COMMAND...")
            return 64
        if option == "--interval":
            interval = arguments.pop(0)
        else:
            directory = arguments.pop(0)
    argv = arguments[1:]
    if not argv:
        say("no command; usage: outlast-shim --interval 10m [--manager DIR] -- COMMAND...")
        return 64
    directory = directory or f"{_RUNTIME}/{variable(_JOB_ID, 'none')}"
    manager = connect(directory)
    if manager is None:
        if node_was_lost():
            queue_again()
        run_without(argv, f"no manager answers at {directory}/shim.sock")
        return 1
    status = Shim(argv, interval).run(manager)
    manager.close()
    if os.WIFSIGNALED(status):
        die_by(os.WTERMSIG(status))
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
