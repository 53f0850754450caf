"""Packages of the product, built from a checkout, and bare machines to install them on.

What they are built with, and the bare system, are kept in the cache under the hash of what they are made from.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ci.testbed import cgroups, images, machine
from ci.testbed.layout import HERE as TESTBED
from ci.testbed.layout import PATH, Layout, TestbedError
from ci.testbed.procs import Process, only_child, spawn, wait_for_program

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]

_HOST = "bare"
_KEPT_ROOTS = 4  # two kinds, of this recipe and of the one before


def root(kind: str, layout: Layout) -> Path:
    """Return the directory of a root file system, "build" or "fresh" (rootfs.sh), made if it is not there.

    Raises:
        TestbedError: it cannot be made; the message holds mmdebstrap's own last words.
    """
    control = CHECKOUT / "packaging" / "debian" / "control"
    recipe = HERE / "rootfs.sh"
    fields = re.findall(
        r"^(?:Pre-|Build-)?(?:Depends|Recommends):(.*(?:\n[ \t].*)*)", control.read_text(), re.M
    )
    needs = sorted({one.strip() for field in fields for one in field.split(",") if "$" not in one})
    key = hashlib.sha256(recipe.read_bytes() + repr(needs).encode()).hexdigest()[:12]
    tree = layout.cache / f"packages-{kind}-{key}"
    layout.cache.mkdir(parents=True, exist_ok=True)
    with (layout.cache / "packages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if tree.is_dir():
            os.utime(tree)
            return tree
        machine.require_programs("mmdebstrap", "unshare")
        machine.say(f"making the root file system for packages: {kind}")
        work, log = tree.with_name(f"packages-{kind}.unfinished"), layout.cache / f"packages-{kind}.log"
        images.remove(work)
        argv: list[str | Path] = [
            recipe,
            kind,
            work,
            machine.debian_mirror(),
            control,
            *machine.apt_options(),
        ]
        images.run_recipe(f"building {tree.name}", argv, log, {})
        subprocess.run(["sync", "--file-system", layout.cache], check=True)
        work.rename(tree)
        kept = sorted(layout.cache.glob("packages-*-*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in kept[_KEPT_ROOTS:]:
            images.remove(old)
        return tree


def build(kind: str, layout: Layout, out: Path, *, version: str = "") -> None:
    """Build the packages of the checkout, "deb", "rpm" or "wheel" (build.sh), into *out*.

    Args:
        version: as which they are built; the checkout's own if it is empty.

    Raises:
        TestbedError: they cannot be built; the message holds the last words of who should have.
    """
    lower = root("build", layout)
    work = layout.state / f"build-{kind}{version}"
    source = work / "outlast"
    names = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        capture_output=True,
        check=True,
    ).stdout
    for name in map(os.fsdecode, filter(None, names.split(b"\0"))):
        if (CHECKOUT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, source / name)
    out.mkdir(parents=True, exist_ok=True)
    done = images.run_in_root(
        lower,
        work / "scratch",
        [f"{work}=/build:rw", f"{out}=/out:rw"],
        ["bash", "/build/outlast/ci/packages/build.sh", kind, "/build/outlast", "/out", version],
    )
    images.remove(work)
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-20:])
        raise TestbedError(f"building as {kind} ended with {done.returncode}:\n{last}")


class Bare:
    """A machine with a bare Debian and what it was given to see; it loses all that is written when it ends."""

    def __init__(self, layout: Layout, init: Process) -> None:
        self._layout = layout
        self._init = init

    def run(
        self, *argv: str, within: float = 60.0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run *argv* there as root; a failure is in the exit code, and what it said of it in stdout."""
        given = [f"{name}={value}" for name, value in (env or {}).items()]
        return subprocess.run(
            [*self._enter(), *given, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            timeout=within,
        )

    def start(self, *argv: str, log: Path) -> subprocess.Popen[bytes]:
        """Start *argv* there as root, its output in *log*; it ends with the machine."""
        with log.open("wb") as output:
            return subprocess.Popen(
                [*self._enter(), *argv], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def path(self, inside: str) -> Path:
        """Where this process sees what is *inside* on the machine's disk."""
        return Path(f"/proc/{self._init.pid}/root{inside}")

    def files(self) -> dict[str, str]:
        """Every path on the machine's disk, with its kind, mode and owner, but for what packages' tools note."""
        found = self.run(
            *(
                "find",
                "/",
                "-xdev",
                "-path",
                "/var/lib/dpkg",
                "-prune",
                "-o",
                "-path",
                "/var/log/apt",
                "-prune",
            ),
            *("-o", "-printf", r"%p\t%y %m %u %g\n"),
        )
        pairs = (line.split("\t") for line in found.stdout.splitlines() if "\t" in line)
        return {path: facts for path, facts in pairs if not path.startswith(_NOTES)}

    def _enter(self) -> list[str]:
        joins = " ".join(f"echo 0 >{path};" for path in cgroups.joins(self._layout.tag, _HOST))
        return [
            *("bash", "-c", f'{joins} exec "$@"', "-"),
            *("nsenter", "--target", str(self._init.pid), "--all", "--"),
            *("/usr/bin/env", "-i", "-C", "/root", f"PATH={PATH}", "HOME=/root", "LANG=C.UTF-8"),
        ]


_NOTES = (
    "/var/cache/",
    "/var/log/dpkg.log",
    "/var/log/alternatives.log",
    "/etc/ld.so.cache",
    "/oldroot",
    "/shared",
)


@contextmanager
def bare(layout: Layout, shared: Path) -> Iterator[Bare]:
    """Boot a bare machine, which sees *shared* at /shared; it is gone afterwards with all that it ran."""
    lower = root("fresh", layout)
    directory = layout.state / "bare"
    for part in ("upper", "work", "root"):
        (directory / part).mkdir(parents=True, exist_ok=True)
    service = directory / "upper/usr/local/lib/testbed/services.sh"
    service.parent.mkdir(parents=True)
    service.write_text("ip link set lo up\nexec sleep infinity\n")
    cgroups.create(layout.tag, _HOST)
    try:
        console = directory / "console.log"
        parent = spawn(
            layout.tag,
            _HOST,
            [
                *("unshare", "--fork", "--pid", "--mount", "--uts", "--ipc", "--net", "--cgroup"),
                *("--propagation", "private", "bash", str(TESTBED / "boot.sh")),
                *(_HOST, "bare", str(directory), str(lower), str(shared)),
                *(f"{one.name}={one.controllers}" for one in cgroups.hierarchies()),
            ],
            console,
        )
        init = only_child(parent, console)
        cgroups.settle(layout.tag, _HOST)
        wait_for_program(init, "tini", console)
        try:
            yield Bare(layout, init)
        finally:
            os.kill(init.pid, signal.SIGKILL)
    finally:
        cgroups.kill(layout.tag)
        cgroups.remove(layout.tag)
        images.remove(directory)
