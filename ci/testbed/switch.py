"""The network between the hosts: a bridge in a network namespace of its own, one port for each host.

Nothing of it is seen in this machine's own network. A process that only sleeps holds the namespace, so that
it needs no mount in /run/netns and ends with that process.
"""

from __future__ import annotations

import json
import subprocess

from ci.testbed import cgroups
from ci.testbed.layout import HOSTS, Layout, TestbedError
from ci.testbed.procs import Process, spawn, wait_for_program

_NAME = "switch"


def _process(layout: Layout) -> Process | None:
    return Process.read(layout.host(_NAME) / "pid")


def _ip(pid: int, *commands: str) -> None:
    """Run `ip` commands inside the network namespace of *pid*."""
    done = subprocess.run(
        ["nsenter", "--target", str(pid), "--net", "ip", "-batch", "-"],
        input="\n".join(commands) + "\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise TestbedError(f"ip: {'; '.join(commands)}: {done.stderr.strip()}")


def _running(layout: Layout) -> Process:
    process = _process(layout)
    if process is None:
        raise TestbedError("the switch of the testbed is not running", hint="run 'scripts/testbed up'")
    return process


def start(layout: Layout) -> None:
    """Make the bridge."""
    directory = layout.host(_NAME)
    directory.mkdir(parents=True)
    cgroups.create(layout.tag, _NAME)
    console = directory / "console.log"
    process = spawn(layout.tag, _NAME, ["unshare", "--net", "sleep", "infinity"], console)
    wait_for_program(process, "sleep", console)  # only then has it made the namespace
    process.write(directory / "pid")
    _ip(process.pid, "link set lo up", "link add br0 type bridge", "link set br0 up")
    if layout.machines.exists():
        _ip(process.pid, "link add br1 type bridge", "address add 198.19.0.254/24 dev br1", "link set br1 up")


def plug(layout: Layout, name: str, pid: int, *, cut: bool) -> None:
    """Connect the host whose first process is *pid*; neither its address nor its hardware address changes."""
    address = HOSTS[name].address
    hardware = "02:00:{:02x}:{:02x}:{:02x}:{:02x}".format(*map(int, address.split(".")))
    _ip(
        _running(layout).pid,
        f"link add {name} type veth peer name eth0 address {hardware} netns {pid}",
        f"link set {name} master br0 {'down' if cut else 'up'}",
    )
    _ip(pid, "link set lo up", f"address add {address}/24 dev eth0", "link set eth0 up")


def plug_machine(layout: Layout, name: str, *, cut: bool) -> int:
    """Make the ports that the virtual machine *name* opens; return whose network it must be started in.

    The second port is the operator's: commands reach a host whose cable is cut, as they reach one in namespaces.
    """
    switch = _running(layout).pid
    _ip(
        switch,
        f"tuntap add {name} mode tap",
        f"link set {name} master br0 {'down' if cut else 'up'}",
        f"tuntap add {name}-console mode tap",
        f"link set {name}-console master br1 up",
    )
    return switch


def set_cut(layout: Layout, name: str, *, cut: bool) -> None:
    """Take the host's port down or up; a host that is not running has no port."""
    if name in ports(layout):
        _ip(_running(layout).pid, f"link set {name} {'down' if cut else 'up'}")


def ports(layout: Layout) -> dict[str, bool]:
    """The hosts that are plugged in, each with whether its port is up."""
    process = _process(layout)
    if process is None:
        return {}
    text = subprocess.run(
        ["nsenter", "--target", str(process.pid), "--net", "ip", "-json", "link", "show", "master", "br0"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {link["ifname"]: "UP" in link["flags"] for link in json.loads(text or "[]") if link}


def unplug(layout: Layout, name: str) -> None:
    """Remove a dead host's port at once, which the kernel would do in its own time."""
    process = _process(layout)
    if process is None or name not in ports(layout):
        return
    try:
        _ip(process.pid, f"link delete {name}")
        if layout.is_machine(name):
            _ip(process.pid, f"link delete {name}-console")
    except TestbedError:
        if name in ports(layout):  # else the kernel came first
            raise
