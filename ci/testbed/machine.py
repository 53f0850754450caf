"""What this machine must be and have, and what it tells: its programs, its kernel, its Debian mirror."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ci.testbed import cgroups
from ci.testbed.layout import TestbedError

_PACKAGES = {
    "ip": "iproute2",
    "mmdebstrap": "mmdebstrap",
    "mount": "mount",
    "nsenter": "util-linux",
    "tar": "tar",
    "unshare": "util-linux",
    "zstd": "zstd",
}
_CAP_SYS_RESOURCE = 24  # linux/capability.h


def say(message: str) -> None:
    """Tell the person at the terminal what is being done; standard output is for results."""
    print(f"testbed: {message}", file=sys.stderr, flush=True)


def require_root() -> None:
    """Refuse to go on as anybody else."""
    if os.geteuid():
        raise TestbedError(
            "the testbed makes namespaces and cgroups, for which it must be root", hint="use sudo"
        )


def require_kernel() -> None:
    """Refuse, by name of what is missing, a machine on which the testbed cannot work."""
    if (machine := platform.machine()) != "x86_64":
        raise TestbedError(f"this machine is {machine}; the testbed is made for x86_64")
    cgroups.hierarchies()
    if "\toverlay\n" not in Path("/proc/filesystems").read_text():
        subprocess.run(["modprobe", "overlay"], check=False, capture_output=True)
    probe = subprocess.run(
        [
            "unshare",
            "--fork",
            "--pid",
            "--mount",
            "--uts",
            "--ipc",
            "--net",
            "--cgroup",
            "mount",
            "-t",
            "tmpfs",
            "t",
            "/mnt",
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    if probe.returncode:
        raise TestbedError(
            f"new namespaces with mounts of their own: {probe.stderr.strip()}",
            hint="run it in a machine or a virtual machine, not in an unprivileged container",
        )


def require_programs(*names: str) -> None:
    """See that each program is there, by apt-get where it is not.

    Raises:
        TestbedError: it is not there and cannot be installed.
    """
    missing = sorted({_PACKAGES[name] for name in names if not shutil.which(name)})
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise TestbedError(
            f"missing: {', '.join(missing)}", hint="install them; without apt-get this is up to you"
        )
    say(f"installing {', '.join(missing)}")
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        done = subprocess.run(
            ["apt-get", "-q", *command],
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise TestbedError(
                f"apt-get {command[0]}: {lines[-1] if lines else done.returncode}",
                hint=f"install {', '.join(missing)} by hand",
            )


def lacks_sys_resource() -> bool:
    """Whether CAP_SYS_RESOURCE is missing, which CRIU needs to read the limits of another user's process."""
    status = Path("/proc/self/status").read_text()
    sets = [
        int(re.findall(rf"^{name}:\s*(\w+)", status, re.MULTILINE)[0], 16) for name in ("CapEff", "CapBnd")
    ]
    return not all(value >> _CAP_SYS_RESOURCE & 1 for value in sets)


def debian_mirror() -> str:
    """The Debian mirror that this machine's own apt sources name, or $OUTLAST_DEBIAN_MIRROR.

    Raises:
        TestbedError: they name none.
    """
    if chosen := os.environ.get("OUTLAST_DEBIAN_MIRROR"):
        return chosen
    for uri, suites, components in _sources(Path("/etc/apt")):
        # The releases themselves: neither -security, whose archive is another, nor -updates.
        if (
            "main" in components
            and any(re.fullmatch(r"[a-z]+", suite) for suite in suites)
            and "security" not in uri
        ):
            if not uri.startswith("mirror+file:"):
                return uri.rstrip("/")
            mirrors = Path(uri.removeprefix("mirror+file:")).read_text().split()
            return next(word for word in mirrors if "://" in word).rstrip("/")
    raise TestbedError(
        "/etc/apt: no source names a Debian mirror with the component main",
        hint="set OUTLAST_DEBIAN_MIRROR to the address of one",
    )


def _sources(etc: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each address in apt's sources with its suites and components: sources.list(5), both formats."""
    for path in sorted(etc.glob("sources.list.d/*.sources")):
        text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE)
        for stanza in re.split(r"\n\s*\n", text):
            fields = {
                key.lower(): value.split()
                for key, value in re.findall(r"^([\w-]+):((?:.*(?:\n[ \t].*)*))", stanza, re.MULTILINE)
            }
            if "deb" in fields.get("types", []) and fields.get("enabled", ["yes"]) != ["no"]:
                for uri in fields.get("uris", []):
                    yield uri, fields.get("suites", []), fields.get("components", [])
    for path in [etc / "sources.list", *sorted(etc.glob("sources.list.d/*.list"))]:
        for line in path.read_text().splitlines() if path.exists() else []:
            words = re.sub(r"\[.*?\]", "", line.partition("#")[0]).split()
            if len(words) > 3 and words[0] == "deb":
                yield words[1], words[2:3], words[3:]


def apt_options() -> list[str]:
    """The machine's own apt settings of how to reach a mirror, such as a proxy."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    wanted = re.compile(r'^(Acquire::(?:https?::.+|Check-Date) "[^"]+");$', re.MULTILINE)
    return wanted.findall(dump)
