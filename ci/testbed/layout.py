"""Where one testbed keeps its things, what they are called, and which hosts there are.

Every name in the kernel that a testbed makes is derived from the path of its state directory, never from a
file in it: so `down` finds all of it after a crash and after the loss of that directory, and two testbeds
live side by side.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class TestbedError(Exception):
    """Something that the caller can understand; *hint* is the next thing to try."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


@dataclasses.dataclass(frozen=True)
class HostName:
    """A host's name, its address in RFC 2544's range for tests, and its role: "ctl", "store" or "node"."""

    name: str
    address: str
    role: str

    @property
    def console(self) -> str:
        """The address by which its operator reaches it where it is a virtual machine."""
        return self.address.replace("198.18.", "198.19.", 1)


HOSTS = {
    host.name: host
    for host in (
        HostName("ctl", "198.18.0.1", "ctl"),
        HostName("store", "198.18.0.2", "store"),
        HostName("n1", "198.18.0.11", "node"),
        HostName("n2", "198.18.0.12", "node"),
        HostName("n3", "198.18.0.13", "node"),
    )
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The paths of one testbed. *state* belongs to the testbed alone; *cache* is shared and outlives it."""

    state: Path
    cache: Path

    @property
    def tag(self) -> str:
        """The name of this testbed's directory in each cgroup hierarchy."""
        return "outlast-" + hashlib.sha256(os.fsencode(self.state)).hexdigest()[:8]

    @property
    def shared(self) -> Path:
        """What every host sees as /shared."""
        return self.state / "shared"

    @property
    def conf(self) -> Path:
        """The file system layer with the configuration that all hosts have in common."""
        return self.state / "conf"

    @property
    def product(self) -> Path:
        """The file system layer with the installed product; empty in a bare cluster."""
        return self.state / "product"

    @property
    def languages(self) -> Path:
        """Where there is one, a link to the file system layer with more languages."""
        return self.state / "languages"

    @property
    def scratch(self) -> Path:
        """What is needed only during `up`."""
        return self.state / "scratch"

    def host(self, name: str) -> Path:
        """The directory with a host's own layer ("upper"), its console and its pid file."""
        return self.state / "hosts" / name

    @property
    def up_mark(self) -> Path:
        """Exists from the end of a whole `up` until the beginning of `down`."""
        return self.state / "up"

    @property
    def machines(self) -> Path:
        """A link to the cached layer with what virtual machines need; absent where no node is one."""
        return self.state / "machines"

    @property
    def memory(self) -> Path:
        """Exists where Slurm holds jobs to their memory."""
        return self.state / "memory"

    def is_machine(self, name: str) -> bool:
        """Whether the host is a virtual machine, rather than a set of namespaces."""
        return HOSTS[name].role == "node" and self.machines.exists()

    def own(self) -> list[Path]:
        """Everything that `up` puts into the state directory."""
        return [
            self.up_mark,
            self.machines,
            self.memory,
            self.shared,
            self.conf,
            self.product,
            self.languages,
            self.scratch,
            self.state / "hosts",
        ]


def layout_from_environment() -> Layout:
    """Read $OUTLAST_TESTBED_DIR and $OUTLAST_CACHE.

    Raises:
        TestbedError: a path holds a character that the options of an overlay mount cannot hold.
    """
    paths = []
    for variable, default in (
        ("OUTLAST_TESTBED_DIR", "/var/lib/outlast-testbed"),
        ("OUTLAST_CACHE", "/var/cache/outlast"),
    ):
        path = Path(os.environ.get(variable) or default).resolve()
        if bad := set(str(path)) & set(':,\\"\n'):
            raise TestbedError(
                f"{variable}={path}: holds {min(bad)!r}, which an overlay mount cannot take",
                hint="choose another directory",
            )
        paths.append(path)
    return Layout(*paths)


@contextmanager
def locked(layout: Layout) -> Iterator[None]:
    """Hold the testbed alone: waits for any other `up`, `down`, `cut`... of it; makes the state directory.

    The lock is on the directory itself, so that it leaves no file; whoever waited looks again whether the
    directory is still the one at that path, since `down` removes it.
    """
    while True:
        layout.state.mkdir(parents=True, exist_ok=True, mode=0o755)
        try:
            handle = os.open(layout.state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(handle), os.stat(layout.state))  # noqa: PTH116
            except FileNotFoundError:
                same = False
            if same:
                yield
                return
        finally:
            os.close(handle)
