"""The cluster as a whole: up, down, what is in what state, and what its logs say."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from ci.testbed import cgroups, host, images, machine, machines, settings, switch
from ci.testbed.layout import HOSTS, Layout, TestbedError, locked

_BARE = "bare"


class HostStatus(TypedDict):
    """One host as `status --json` shows it; *pid* is that of its init as this machine sees it."""

    host: str
    state: str
    address: str
    pid: int | None
    cut: bool


def _lower(layout: Layout, root: Path) -> list[Path]:
    layers = [layout.conf, layout.product, layout.languages, layout.machines]
    return [*(layer.resolve() for layer in layers if layer.is_dir()), root]


def up(
    layout: Layout,
    checkout: Path | None,
    *,
    languages: bool = False,
    with_machines: bool = False,
    memory: bool = False,
    patience: float = 60.0,
) -> None:
    """Start the cluster and return when the scheduler says that all nodes are idle.

    Args:
        checkout: what to install the product from; None for a cluster without it.
        languages: install more languages on all hosts.
        with_machines: have each node be a virtual machine with a kernel of its own.
        memory: have Slurm hold each job to its --mem.
        patience: seconds until a cluster that does not come up is given up; eight times as long for machines.

    Raises:
        TestbedError: it cannot be started, and nothing of it is left; or one with another product is up.
    """
    machine.require_kernel()
    machine.require_programs("ip", "mount", "nsenter", "unshare")
    root = images.root_file_system(layout)
    more = images.added_layer(layout, root, "languages") if languages else None
    tools = images.added_layer(layout, root, "machines") if with_machines else None
    product = images.product_key(checkout, root) if checkout else _BARE
    if with_machines:
        machines.require()
        product += " on virtual machines"
        patience *= 8
    if memory:
        cgroups.require_memory()
        product += ", jobs held to their memory"
    with locked(layout):
        if layout.up_mark.exists() and switch.ports(layout):
            if layout.up_mark.read_text() != product:
                raise TestbedError(
                    f"{layout.state}: a cluster with another product is up",
                    hint="run 'scripts/testbed down' first",
                )
            machine.say("is up already")
            return
        if strange := sorted(set(layout.state.iterdir()) - set(layout.own())):
            raise TestbedError(f"{strange[0]}: not a testbed's; the directory must be empty or absent")
        _clear(layout)
        try:
            layout.shared.mkdir()
            if more is not None:
                layout.languages.symlink_to(more)
            if memory:
                layout.memory.touch()
            if tools is not None:
                layout.machines.symlink_to(tools)
            if checkout:
                images.product_layer(layout, checkout, root)
            settings.configure(layout, root)
            images.remove(layout.scratch)
            switch.start(layout)
            for name in HOSTS:
                host.start(layout, name, _lower(layout, root))
            for name in HOSTS:
                host.wait(layout, name)
            _wait_until_idle(layout, patience)
            layout.up_mark.write_text(product)
        except BaseException:
            for line in logs(layout, list(HOSTS), last=15):
                machine.say(line)
            _clear(layout)
            layout.state.rmdir()
            raise


def _wait_until_idle(layout: Layout, patience: float) -> None:
    until = time.monotonic() + patience
    wanted = {name for name, one in HOSTS.items() if one.role == "node"}
    while True:
        done = host.run(layout, "ctl", ["sinfo", "--noheader", "--Node", "--format=%N %t"])
        idle = {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" idle")}
        if idle == wanted:
            return
        if time.monotonic() > until:
            raise TestbedError(
                f"the nodes are not idle after {patience:g} s: {(done.stdout + done.stderr).strip()}"
            )
        time.sleep(0.05)


def down(layout: Layout) -> None:
    """End every process of the testbed and remove all that it made; does nothing where there is nothing.

    Raises:
        TestbedError: something is left; the message says what.
    """
    with locked(layout):
        _clear(layout)
        if strange := sorted(layout.state.iterdir()):
            raise TestbedError(f"{strange[0]}: not a testbed's; left where it is")
        layout.state.rmdir()


def _clear(layout: Layout) -> None:
    layout.up_mark.unlink(missing_ok=True)
    cgroups.kill(layout.tag)
    cgroups.remove(layout.tag)
    for path in layout.own():
        images.remove(path)


def _require_up(layout: Layout) -> None:
    if not layout.up_mark.exists():
        raise TestbedError("the testbed is not up", hint="run 'scripts/testbed up'")


def kill_node(layout: Layout, name: str) -> None:
    """Cut the power of one host, which may be off."""
    _require_up(layout)
    with locked(layout):
        host.kill(layout, name)


def start_node(layout: Layout, name: str) -> None:
    """Boot one host and return when it has its address; it may be on already."""
    _require_up(layout)
    root = images.root_file_system(layout)
    with locked(layout):
        if host.first_process(layout, name) is None:
            host.kill(layout, name)  # whatever is left of it, had it died by itself
            host.start(layout, name, _lower(layout, root))
            host.wait(layout, name)


def set_cut(layout: Layout, name: str, *, cut: bool) -> None:
    """Pull one host's network cable, or put it back."""
    _require_up(layout)
    with locked(layout):
        mark = layout.host(name) / "cut"
        if cut:
            mark.touch()
        else:
            mark.unlink(missing_ok=True)
        switch.set_cut(layout, name, cut=cut)


def status(layout: Layout) -> tuple[list[HostStatus], str | None]:
    """Each host's state, and the scheduler's word on its nodes: sinfo's one line, None when it has none."""
    hosts: list[HostStatus] = []
    for one in HOSTS.values():
        init = host.first_process(layout, one.name)
        hosts.append(
            {
                "host": one.name,
                "state": "up" if init else "down",
                "address": one.address,
                "pid": init.pid if init else None,
                "cut": host.is_cut(layout, one.name),
            }
        )
    if hosts[0]["state"] == "down":
        return hosts, None
    done = host.run(layout, "ctl", ["sinfo", "--noheader", "--format=%P %D nodes, %A allocated/idle"])
    return hosts, done.stdout.strip() or None


def logs(layout: Layout, names: Sequence[str], *, last: int | None = None) -> Iterator[str]:
    """The lines of the hosts' logs, or the *last* few of each file; every line begins with its host and file.

    They are read from the host's layer, so that a host which is off has them too.
    """
    for name in names:
        directory = layout.host(name)
        upper = directory / "upper/var/log"
        files = [directory / "console.log", *sorted(upper.glob("*.log"))]
        files += sorted(upper.glob("slurm/*.log")) + sorted(
            path for path in upper.glob("outlast/**/*") if path.is_file()
        )
        for file in files:
            if file.is_file():
                lines = file.read_text(errors="replace").splitlines()
                shown = lines[-last:] if last else lines
                yield from (f"{name} {file.name}: {line}" for line in shown)


def show_status(layout: Layout) -> None:
    """Print `status` as a table."""
    hosts, scheduler = status(layout)
    write = sys.stdout.write
    write(f"{'HOST':6} {'STATE':6} {'ADDRESS':12} {'PID':>8}  NETWORK\n")
    for one in hosts:
        cable = "cut" if one["cut"] else "ok" if one["pid"] else "-"
        write(f"{one['host']:6} {one['state']:6} {one['address']:12} {one['pid'] or '-':>8}  {cable}\n")
    if scheduler:
        write(scheduler + "\n")
