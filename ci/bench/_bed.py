"""A cluster to run things on: the testbed, brought up for one purpose and taken away again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ci.testbed import cluster, machine, switch
from ci.testbed.layout import HERE, HOSTS, Layout, TestbedError, layout_from_environment

CHECKOUT = HERE.parents[1]
NODES = tuple(name for name, host in HOSTS.items() if host.role == "node")
_IDLE_SECONDS = 60.0


class Bed:
    """A testbed that is up, with the product of this checkout installed on all hosts."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.keep = False  # set it to leave the cluster up

    @property
    def home(self) -> Path:
        """The home directory of alice as this machine sees it; on the hosts it is /shared/alice."""
        return self._layout.shared / "alice"

    @property
    def state(self) -> Path:
        """The testbed's directory: scripts/testbed finds it by $OUTLAST_TESTBED_DIR."""
        return self._layout.state

    def start(self, host: str, argv: Sequence[str], *, root: bool = False) -> subprocess.Popen[str]:
        """Start a program on a host, as alice in her home or as root, with stdout and stderr in pipes."""
        return subprocess.Popen(
            self._command(host, argv, root), stdin=subprocess.DEVNULL, stdout=-1, stderr=-1, text=True
        )

    def run(
        self, host: str, argv: Sequence[str], *, root: bool = False, within: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a host, as alice in her home or as root, to its end; it may fail.

        Raises:
            TestbedError: it did not end within so many seconds, and was ended.
        """
        try:
            return subprocess.run(
                self._command(host, argv, root),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=within,
            )
        except subprocess.TimeoutExpired:
            raise TestbedError(f"{host}: {' '.join(argv)}: not done after {within:g} s") from None

    def output(self, host: str, argv: Sequence[str], *, root: bool = False, within: float = 60.0) -> str:
        """Run a program as `run` does and return what it printed.

        Raises:
            TestbedError: it failed; the message has the last line that it said.
        """
        done = self.run(host, argv, root=root, within=within)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
            raise TestbedError(f"{host}: {' '.join(argv)}: {said[-1]}")
        return done.stdout

    def kill_node(self, host: str) -> None:
        """Cut a host's power; returns when none of its processes is left."""
        cluster.kill_node(self._layout, host)

    def start_nodes(self) -> None:
        """Boot every node that is off, and wait until the scheduler says that all of them are idle."""
        for name in NODES:
            cluster.start_node(self._layout, name)
        until = time.monotonic() + _IDLE_SECONDS
        while True:
            lines = self.output("ctl", ["sinfo", "--noheader", "--Node", "--format=%N %t"]).splitlines()
            if sorted(lines) == [f"{name} idle" for name in NODES]:
                return
            if time.monotonic() > until:
                raise TestbedError(f"the nodes are not idle after {_IDLE_SECONDS:g} s: {', '.join(lines)}")
            time.sleep(0.1)

    def cut(self, host: str) -> None:
        """Pull a host's network cable."""
        cluster.set_cut(self._layout, host, cut=True)

    def heal(self, host: str) -> None:
        """Put a host's network cable back."""
        cluster.set_cut(self._layout, host, cut=False)

    def give(self, source: Path, name: str) -> Path:
        """Copy a file or a directory, but no "build", into alice's home, under *name* and as hers."""
        owner = self.home.stat()
        target = self.home / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("build"))
        else:
            shutil.copy(source, target)
        for path in (target, *target.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)
        return target

    def programs(self) -> None:
        """Compile tests/programs on the cluster, as alice would; they are then ./lu ... in her home."""
        self.give(CHECKOUT / "tests/programs", "programs")
        self.output("ctl", ["make", "--silent", "-C", "programs", "O=/shared/alice"], within=120)

    def logs(self, *, last: int | None = None) -> list[str]:
        """All that the hosts have logged, or the *last* lines of each file, hosts that are off included."""
        return list(cluster.logs(self._layout, list(HOSTS), last=last))

    def versions(self) -> dict[str, str]:
        """What runs on the hosts: the versions of CRIU, Slurm and Outlast."""
        commands = {
            "criu": ["criu", "--version"],
            "slurm": ["sinfo", "-V"],
            "outlast": ["outlast", "--version"],
        }
        said = {name: self.output("n1", argv, root=True) for name, argv in commands.items()}
        return {name: text.splitlines()[0].split()[-1] for name, text in said.items()}

    def _command(self, host: str, argv: Sequence[str], root: bool) -> list[str]:
        verb = "exec" if root else "user"
        return ["bash", str(HERE / "enter.sh"), str(self._layout.state), verb, host, *argv]


@contextmanager
def testbed(purpose: str) -> Iterator[Bed]:
    """Bring a cluster up; end it and remove all of it at the end, unless `Bed.keep` says otherwise.

    Its state is in $OUTLAST_TESTBED_DIR, or in /var/lib/outlast-PURPOSE.

    Raises:
        TestbedError: one is up there already, or it cannot be started.
    """
    os.environ.setdefault("OUTLAST_TESTBED_DIR", f"/var/lib/outlast-{purpose}")
    machine.require_root()
    layout = layout_from_environment()
    if layout.up_mark.exists() and switch.ports(layout):
        raise TestbedError(
            f"a cluster is up already in {layout.state}",
            hint=f"end it: {testbed_command(layout.state)} down",
        )
    cluster.up(layout, CHECKOUT)
    bed = Bed(layout)
    try:
        yield bed
    finally:
        if not bed.keep:
            # Whoever is impatient now would leave half of it behind.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            cluster.down(layout)


def testbed_command(state: Path) -> str:
    """How a person calls scripts/testbed for the cluster in *state*."""
    return f"sudo OUTLAST_TESTBED_DIR='{state}' scripts/testbed"


def end_on_signals() -> None:
    """Have SIGTERM and SIGHUP end the program as SIGINT does, by an exception: all is cleared away."""

    def end(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGHUP, end)
