"""One host of the cluster: boot, power cut, and running a command in it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ci.testbed import cgroups, machines, switch
from ci.testbed.layout import HERE, HOSTS, Layout
from ci.testbed.procs import Process, only_child, spawn


def first_process(layout: Layout, name: str) -> Process | None:
    """The host's PID 1, or None while the host is off."""
    return Process.read(layout.host(name) / "pid")


def is_cut(layout: Layout, name: str) -> bool:
    """Whether the host's cable is pulled; this lasts over a power cut."""
    return (layout.host(name) / "cut").exists()


def start(layout: Layout, name: str, lower: Sequence[Path]) -> None:
    """Boot the host: its file system as it left it, everything else new.

    Args:
        lower: the read-only layers below the host's own, the uppermost first.
    """
    directory = layout.host(name)
    for part in ("upper", "work", "root"):
        (directory / part).mkdir(parents=True, exist_ok=True)
    cgroups.create(layout.tag, name, memory=layout.memory.exists())
    console = directory / "console.log"
    if layout.is_machine(name):
        init = machines.start(layout, name, lower, console, cut=is_cut(layout, name))
        (directory / "join").write_text("".join(f"{path}\n" for path in cgroups.joins(layout.tag, name)))
        init.write(directory / "pid")
        return
    found = cgroups.of(layout.tag, name)
    parent = spawn(
        layout.tag,
        name,
        [
            *("unshare", "--fork", "--pid", "--mount", "--uts", "--ipc", "--net", "--cgroup"),
            *("--propagation", "private", "bash", str(HERE / "boot.sh")),
            *(name, HOSTS[name].role, str(directory), ":".join(map(str, lower)), str(layout.shared)),
            *(f"{one.name}={one.controllers}" for one in found),
        ],
        console,
    )
    init = only_child(parent, console)
    cgroups.settle(layout.tag, name)
    (directory / "join").write_text("".join(f"{path}\n" for path in cgroups.joins(layout.tag, name)))
    init.write(directory / "pid")
    switch.plug(layout, name, init.pid, cut=is_cut(layout, name))


def wait(layout: Layout, name: str) -> None:
    """Wait until commands can be run in the host; at once, unless it has a kernel to boot."""
    if layout.is_machine(name):
        machines.wait(layout, name)


def kill(layout: Layout, name: str) -> None:
    """Cut the host's power: SIGKILL of its PID 1, by which the kernel ends all; returns when none is left."""
    init = first_process(layout, name)
    if init is not None:
        os.kill(init.pid, signal.SIGKILL)
    cgroups.kill(layout.tag, name)
    (layout.host(name) / "pid").unlink(missing_ok=True)
    switch.unplug(layout, name)
    cgroups.remove(layout.tag, name)


def run(
    layout: Layout, name: str, argv: Sequence[str], *, within: float = 30.0
) -> subprocess.CompletedProcess[str]:
    """Run *argv* inside the host as root; a failure is in the exit code: 124 after *within* seconds."""
    try:
        return subprocess.run(
            ["bash", str(HERE / "enter.sh"), str(layout.state), "exec", name, *argv],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=within,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 124, "", f"{argv[0]}: no answer within {within:g} s")
