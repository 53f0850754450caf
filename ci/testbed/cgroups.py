"""The testbed's directories in this machine's cgroup hierarchies: who is in them, and how to end them all.

A host's processes are found here and nowhere else. A process may lose its parent, its session and its pid
file, but it cannot leave the cgroup of the host that it runs in, since each host sees only its own part of
the tree.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

from ci.testbed.layout import TestbedError

# What Slurm's cgroup/v1 plugin needs, and what keeps a job's accounting apart.
_V1 = frozenset({"freezer", "cpuset", "cpu", "cpuacct", "devices", "pids"})
# Left alone unless jobs are to be held to their memory: an empty memory cgroup stays charged with page cache
# long after its end.
_MEMORY = "memory"


@dataclasses.dataclass(frozen=True)
class Hierarchy:
    """One mounted hierarchy; *controllers* is what to mount it by, and empty for cgroup2."""

    mount: Path
    controllers: str

    @property
    def name(self) -> str:
        """The directory below /sys/fs/cgroup where a host mounts it."""
        return self.mount.name if self.controllers else "unified"


def hierarchies(*, memory: bool = False) -> list[Hierarchy]:
    """The hierarchies that the testbed uses on this machine, with cgroup v1's of *memory* or without.

    Raises:
        TestbedError: there is neither a cgroup v1 freezer nor a pure cgroup2.
    """
    known = _V1 | {_MEMORY} if memory else _V1
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        mount = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), where))
        if kind == "cgroup2":
            found.append(Hierarchy(mount, ""))
        elif kind == "cgroup" and (wanted := [word for word in options.split(",") if word in known]):
            found.append(Hierarchy(mount, ",".join(wanted)))
    found = list({(one.controllers, one.name): one for one in reversed(found)}.values())[::-1]
    v2_only = len(found) == 1 and not found[0].controllers
    if not v2_only and not any("freezer" in one.controllers.split(",") for one in found):
        raise TestbedError(
            "/proc/self/mounts: neither a cgroup v1 freezer nor cgroup2 is mounted",
            hint="boot with cgroup2 (systemd.unified_cgroup_hierarchy=1), or mount the v1 freezer hierarchy",
        )
    return found


def version(found: list[Hierarchy]) -> int:
    """1 where hosts get v1 hierarchies, with or without a cgroup2 beside; 2 on a pure cgroup2 machine."""
    return 1 if any(one.controllers for one in found) else 2


def require_memory() -> None:
    """Refuse a machine where no host could hold its jobs to their memory.

    Raises:
        TestbedError: there are cgroup v1 hierarchies, and none is that of memory.
    """
    found = hierarchies(memory=True)
    if version(found) == 1 and not any(_MEMORY in one.controllers.split(",") for one in found):
        raise TestbedError(
            "/proc/self/mounts: cgroup v1's memory hierarchy is not mounted",
            hint="mount -t cgroup -o memory cgroup /sys/fs/cgroup/memory",
        )


def of(tag: str, host: str) -> list[Hierarchy]:
    """The hierarchies in which a host has a directory."""
    return [one for one in hierarchies(memory=True) if (one.mount / tag / host).is_dir()]


def create(tag: str, host: str, *, memory: bool = False) -> None:
    """Make the directories of one host; with *memory* Slurm can hold its jobs to theirs there."""
    for one in hierarchies(memory=memory):
        base = one.mount / tag
        base.mkdir(exist_ok=True)
        if "cpuset" in one.controllers.split(","):
            # A new cpuset is empty and takes no process.
            for knob in ("cpuset.cpus", "cpuset.mems"):
                (base / knob).write_text((one.mount / knob).read_text())
            (base / "cgroup.clone_children").write_text("1")
        (base / host).mkdir(exist_ok=True)
        if version(hierarchies()) == 2:
            for directory in (one.mount, base):
                for controller in (directory / "cgroup.controllers").read_text().split():
                    # Where the machine refuses one, Slurm goes without it.
                    with suppress(OSError):
                        (directory / "cgroup.subtree_control").write_text("+" + controller)


def settle(tag: str, host: str) -> None:
    """Move what runs in a host's top directory to a leaf, once its first process has its namespaces.

    On a pure cgroup2 machine only, where a directory that has children with controllers must hold no process.
    The host still sees its top directory as the root, and Slurm makes its own directories there.
    """
    if version(found := hierarchies()) == 1:
        return
    top = found[0].mount / tag / host
    (top / "init").mkdir(exist_ok=True)
    while pids := (top / "cgroup.procs").read_text().split():
        for pid in pids:
            with suppress(ProcessLookupError):
                (top / "init" / "cgroup.procs").write_text(pid)


def joins(tag: str, host: str) -> list[Path]:
    """The files in a host's cgroups to which a process of one thread writes "0" to be there from then on."""
    files = []
    for one in of(tag, host):
        base = one.mount / tag / host
        if one.controllers:
            # Rather than cgroup.procs: to move oneself as a thread takes no lock of the whole machine,
            # several ms each.
            files.append(base / "tasks")
        else:
            leaf = base / "init"
            files.append((leaf if leaf.is_dir() else base) / "cgroup.procs")
    return files


def _directories(tag: str, host: str | None) -> list[Path]:
    """All directories of a host, or of the whole testbed, the deepest first."""
    found = []
    for one in hierarchies(memory=True):
        top = one.mount / tag / host if host else one.mount / tag
        found += [Path(path) for path, _, _ in os.walk(top, topdown=False)]
    return found


def processes(tag: str, host: str | None = None) -> set[int]:
    """The PIDs of everything that runs in a host (or, without one, in the testbed)."""
    found: set[int] = set()
    for directory in _directories(tag, host):
        with suppress(OSError):
            found.update(map(int, (directory / "cgroup.procs").read_text().split()))
    return found - {0}


def kill(tag: str, host: str | None = None, *, within: float = 15.0) -> None:
    """SIGKILL every process of a host (or of the testbed) and wait until all are gone, *within* seconds.

    Raises:
        TestbedError: a process did not end, such as one that waits for a dead disk.
    """
    until = time.monotonic() + within
    while pids := processes(tag, host):
        if time.monotonic() > until:
            raise TestbedError(
                f"{host or tag}: processes {sorted(pids)} did not end within {within:g} s of SIGKILL",
                hint="look at /proc/PID/stack of them, then run 'scripts/testbed down' again",
            )
        for directory in _directories(tag, host):
            # A frozen task dies only once it is thawed, and Slurm and CRIU both freeze.
            for knob, thawed in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
                with suppress(OSError):
                    if (directory / knob).exists():
                        (directory / knob).write_text(thawed)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def remove(tag: str, host: str | None = None, *, within: float = 5.0) -> None:
    """Remove a host's directories (or the testbed's), which must hold no process any more.

    Raises:
        TestbedError: a directory stayed busy for *within* seconds.
    """
    until = time.monotonic() + within
    while True:
        error: OSError | None = None
        for directory in _directories(tag, host):
            try:
                directory.rmdir()
            except FileNotFoundError:
                pass
            except OSError as failure:  # busy for a moment after its last process
                error = failure
        if error is None:
            return
        if time.monotonic() > until:
            raise TestbedError(f"{error.filename}: {error.strerror}", hint="run 'scripts/testbed down' again")
        time.sleep(0.02)
