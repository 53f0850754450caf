"""Real processes in the peer's place and jobs in capsules, for the tests."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from criu_backend import Capsule, Context, Criu, DumpResult, put_back, start_capsule
from tests.criu.waiting import eventually

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
_PEER = Path(__file__).with_name("peer.py")
_SECONDS = 20.0

# At the beginning of every job in Python. It stands still in wait(): nothing that /proc shows of it changes.
_PRELUDE = """
import ctypes, os, select, signal, socket, struct, sys, threading, time
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def wait(name):
    while not os.path.exists(name):
        time.sleep(0.01)
"""


class Peer:
    """A process as the shim is: its context becomes the job's, its end is the job's end."""

    def __init__(
        self,
        stdio: tuple[int, int, int],
        *,
        uid: int = 0,
        cwd: Path | str = "/",
        groups: Sequence[int] = (),
        umask: int = 0o022,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        """Start it. *prepare* is called in it before it becomes user *uid*."""

        def become() -> None:
            if prepare is not None:
                prepare()
            os.umask(umask)
            os.setgroups(groups)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)

        self._handed_over = False
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with mine:
            self.process = subprocess.Popen(
                [sys.executable, "-IS", _PEER, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=cwd,
                preexec_fn=become,
                pass_fds=(theirs.fileno(),),
            )
            theirs.close()
            self.context = Context(self.process.pid, os.pidfd_open(self.process.pid), stdio, mine.detach())
        assert self._line() == "here"

    def _line(self) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], _SECONDS)
        assert ready, f"the capsule said nothing for {_SECONDS:g} s"
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self.process.stdout.fileno(), 1)
            assert byte, "the peer has ended"
            line += byte
        return line.decode().strip()

    def hand_over(self) -> None:
        """Close this process's copies of the descriptors that a capsule has by now; once is enough."""
        if not self._handed_over:
            # A second close would hit whatever has got the same number since.
            self._handed_over = True
            os.close(self.context.status)

    def status(self) -> int:
        """The job's wait status, which the capsule tells once."""
        return int(self._line())

    def hears_no_more(self) -> bool:
        """Whether the next that the peer hears is the end of its connection."""
        return self._line() == "gone"

    def signal(self, number: int) -> None:
        """Have the capsule send signal *number* to the job."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n".encode())
        self.process.stdin.flush()

    def kill(self) -> None:
        """End it as a scheduler does that has lost its patience."""
        self.hand_over()
        self.process.kill()
        self.process.wait(timeout=10)

    def close(self) -> None:
        """End it and give back what it holds."""
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        os.close(self.context.pidfd)


@dataclass
class Job:
    """A job in its capsule."""

    peer: Peer
    capsule: Capsule
    state: Path
    output: Path

    @property
    def pid(self) -> int:
        """The PID of the job's root, as the test sees it."""
        return next(self.capsule.tasks())

    def said(self) -> list[str]:
        """The lines that it has written so far."""
        return self.output.read_text(errors="replace").splitlines()

    def says(self, line: str) -> None:
        """Wait until it has written *line*."""
        eventually(lambda: line in self.said(), f"the job says {line!r}; it said {self.said()}")

    def ended(self) -> int:
        """Wait until the capsule is gone; return the wait status that it told, which it also wrote down."""
        status = self.peer.status()
        assert self.capsule.wait(_SECONDS)
        assert (self.state / "exit").read_text() == f"{status}\n"
        return status


@dataclass
class Place:
    """A directory on the node for one test, and user *uid*; ends at its end all that was started."""

    path: Path
    uid: int
    criu: Criu = field(default_factory=Criu)
    mode: str = os.environ.get("OUTLAST_TEST_DUMP_MODE", "plain")
    _jobs: list[Job] = field(default_factory=list)
    _peers: list[Peer] = field(default_factory=list)
    _fds: list[int] = field(default_factory=list)

    @property
    def output(self) -> Path:
        """The file that the jobs' standard output and error go to."""
        return self.path / "out"

    def stdio(self) -> tuple[int, int, int]:
        """Standard descriptors as a scheduler opens them for a batch job: nothing in, one file out."""
        out = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.chown(out, self.uid, self.uid)
        self._fds += [os.open(os.devnull, os.O_RDONLY), out]
        return (self._fds[-2], out, out)

    def peer(self, stdio: tuple[int, int, int] | None = None, **how: object) -> Peer:
        """Start a peer; *how* as `Peer` takes it."""
        how = {"uid": self.uid, "cwd": self.path, **how}
        peer = Peer(stdio or self.stdio(), **how)  # type: ignore[arg-type]
        self._peers.append(peer)
        return peer

    def start(
        self,
        argv: Sequence[str],
        peer: Peer | None = None,
        *,
        environment: Mapping[str, str] = ENVIRONMENT,
        compat_filter: bool = True,
    ) -> Job:
        """Start *argv* in a capsule."""
        peer = peer or self.peer()
        state = self._state()
        capsule = start_capsule(peer.context, argv, environment, state, compat_filter=compat_filter)
        return self._job(peer, capsule, state)

    def python(self, source: str, peer: Peer | None = None, *, compat_filter: bool = True) -> Job:
        """Start a job in Python; *source* may use `say` and `wait` of the prelude."""
        program = _PRELUDE + textwrap.dedent(source)
        return self.start(
            ["/usr/bin/python3", "-ISW", "ignore", "-c", program], peer, compat_filter=compat_filter
        )

    def dump(
        self,
        job: Job,
        on_frozen: Callable[[], None] = lambda: None,
        *,
        external: Sequence[str] = (),
        mode: str | None = None,
    ) -> tuple[Path, DumpResult]:
        """Dump *job*; return the images' directory, with all memory in it, and what it cost."""
        images = self.images()
        how = mode or self.mode
        with self.criu.dump(job.capsule, images, on_frozen, external=external, mode=how) as result:
            put_back(result.memories, images)
        return images, result

    def restore(
        self,
        images: Path,
        peer: Peer | None = None,
        *,
        uid: int | None = None,
        inherit: Sequence[tuple[int, str]] = (),
        pages: socket.socket | None = None,
    ) -> Job:
        """Restore what is in *images*; the memory follows from *pages*, if there is any."""
        peer = peer or self.peer()
        state = self._state()
        version = self.criu.version()
        owner = self.uid if uid is None else uid
        capsule = self.criu.restore(
            peer.context,
            images,
            state,
            uid=owner,
            dumped_by=version,
            inherit=inherit,
            pages=pages,
        )
        return self._job(peer, capsule, state)

    def again(self, job: Job, on_frozen: Callable[[], None] = lambda: None) -> Job:
        """Dump *job*, kill it as a power cut would, and restore it in a new capsule for a new peer."""
        images, _ = self.dump(job, on_frozen)
        self.lose(job)
        return self.restore(images)

    def lose(self, job: Job) -> None:
        """Kill *job* and its peer."""
        job.capsule.kill()
        assert job.capsule.wait(_SECONDS)
        job.peer.kill()

    def touch(self, name: str) -> None:
        """Make the file that a job waits for."""
        (self.path / name).touch()

    def images(self) -> Path:
        """A new directory for images."""
        directory = self.path / f"images{len(list(self.path.glob('images*')))}"
        directory.mkdir(mode=0o700)
        return directory

    def _state(self) -> Path:
        directory = self.path / f"state{len(self._jobs)}"
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory

    def _job(self, peer: Peer, capsule: Capsule, state: Path) -> Job:
        peer.hand_over()
        job = Job(peer, capsule, state, self.output)
        self._jobs.append(job)
        return job

    def end(self) -> None:
        """End everything that was started, and see that it has ended."""
        for job in self._jobs:
            job.capsule.kill()
            assert job.capsule.wait(_SECONDS)
        self._jobs.clear()
        for peer in self._peers:
            peer.close()
        self._peers.clear()

    def close(self) -> None:
        """End everything, and remove the directory."""
        self.end()
        for fd in set(self._fds):
            with contextlib.suppress(OSError):
                os.close(fd)
        shutil.rmtree(self.path)
