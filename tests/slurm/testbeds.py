"""A testbed as its tests see it: its script, its hosts, what is left of it in the kernel."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "testbed"
DEFAULT_STATE = Path("/var/lib/outlast-testbed")


@dataclasses.dataclass(frozen=True)
class Testbed:
    """One testbed, by its state directory; what it says is checked by looking at the machine itself."""

    __test__ = False

    state: Path

    @property
    def tag(self) -> str:
        return "outlast-" + hashlib.sha256(os.fsencode(self.state)).hexdigest()[:8]

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"OUTLAST_TESTBED_DIR": str(self.state)}

    def try_(
        self, *words: str, stdin: str = "", within: float = 60, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, *words],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=within,
            env=self.environment | variables,
        )

    def __call__(self, *words: str, stdin: str = "", within: float = 60) -> str:
        done = self.try_(*words, stdin=stdin, within=within)
        assert done.returncode == 0, (
            f"testbed {' '.join(words)}: {done.returncode}: {done.stdout}{done.stderr}"
        )
        return done.stdout

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [SCRIPT, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.environment,
        )

    def hosts(self) -> dict[str, dict[str, object]]:
        return {host["host"]: host for host in json.loads(self("status", "--json"))["hosts"]}

    def processes(self) -> list[str]:
        """All on the machine that is in this testbed's cgroups, or in a mount namespace with its files."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                said = (process / "cgroup").read_text() + (process / "mountinfo").read_text()
                if self.tag in said or str(self.state).replace(" ", "\\040") in said:
                    found.append(f"{process.name}: {(process / 'comm').read_text().strip()}")
        return found

    def cgroups(self) -> list[str]:
        return [top for top, _, _ in os.walk("/sys/fs/cgroup") if self.tag in top]

    def left(self) -> dict[str, object]:
        """All that the testbed has on this machine: nothing of it may be there after `down`."""
        return {
            "processes": self.processes(),
            "cgroups": self.cgroups(),
            "state": sorted(self.state.parent.glob(self.state.name)),
        }


NOTHING: dict[str, object] = {"processes": [], "cgroups": [], "state": []}


def eventually(true: Callable[[], object], *, within: float, what: str) -> None:
    until = time.monotonic() + within
    while not true():
        assert time.monotonic() < until, f"not within {within:g} s: {what}"
        time.sleep(0.1)


def _names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.is_dir() else set()


def machine_wide() -> dict[str, set[str]]:
    """What the whole machine sees: none of it may differ by a testbed, not even while it is up."""
    return {
        "mounts": set(Path("/proc/self/mounts").read_text().splitlines()),
        "links": _names_in(Path("/sys/class/net")),
        "network namespaces": _names_in(Path("/run/netns")),
    }
