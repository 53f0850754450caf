"""Hosts that are virtual machines: QEMU in software, a kernel of Debian's, the host's directory as its disk.

Such a host differs from one in namespaces where clusters differ from this machine: cgroup v2, every capability,
a kernel that tracks changed pages, other kernels on other nodes, and a home on NFS whose root is nobody. Its disk
is the directory "upper" as that of any host, served by virtiofs; its port is a tap beside the others' veths.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ci.testbed import switch
from ci.testbed.layout import HERE, HOSTS, Layout, TestbedError
from ci.testbed.procs import Process, only_child, spawn

_OWN = "usr/local/lib/testbed"
_MEMORY = "1G"
# Debian 13's own kernel, and the next release's on one node: images go from either to the other.
_KERNELS = {"n3": "forky"}
_BOOT_SECONDS = 480.0

# A machine that QEMU plays is tens of times slower than this one: what a site would set for slow nodes.
SLOW = """
[lease]
renew = "1s"
ttl = "16s"

[watcher]
silent = "10s"
"""
_SLOW_SLURM = {"MessageTimeout": "10", "TCPTimeout": "5", "SlurmdTimeout": "60"}


class Files(Protocol):
    """Where a layer's files are written to."""

    def file(self, name: str, data: str | bytes, *, mode: int = 0o644, owner: str = "root") -> None:
        """Write a file."""


def require() -> None:
    """Refuse a machine on which there can be no virtual machines with a network."""
    if not Path("/dev/net/tun").exists():
        raise TestbedError(
            "/dev/net/tun: there is none, and virtual machines get their network by it",
            hint="modprobe tun",
        )


def slow(slurm_conf: str) -> str:
    """Slurm's configuration with times that a slow node keeps."""
    for key, value in _SLOW_SLURM.items():
        slurm_conf = re.sub(rf"^{key}=.*$", f"{key}={value}", slurm_conf, flags=re.MULTILINE)
    return slurm_conf


def configure(common: Files, made: Path) -> None:
    """Write what virtual machines have beside, and what serves them.

    Args:
        made: the directory with the key pair "console", by which the operator gets into each, and its host key.
    """
    for name in ("vm_init.sh", "etc/ganesha.conf", "etc/console_sshd_config", "etc/nfs_options"):
        source = HERE / name
        common.file(f"{_OWN}/{source.name}", source.read_bytes(), mode=source.stat().st_mode & 0o777)
    public = (made / "console.pub").read_bytes()
    common.file(f"{_OWN}/console_key", (made / "console").read_bytes(), mode=0o600)
    common.file(f"{_OWN}/console_authorized_keys", public)
    common.file(f"{_OWN}/console_known_hosts", b"console " + b" ".join(public.split()[:2]) + b"\n")


def start(layout: Layout, name: str, lower: Sequence[Path], console: Path, *, cut: bool) -> Process:
    """Switch the machine on; return its QEMU, with which it ends. `wait` says when it has booted."""
    directory = layout.host(name)
    (directory / "tools").mkdir(exist_ok=True)
    host = HOSTS[name]
    network = switch.plug_machine(layout, name, cut=cut)
    enter = ["nsenter", "--target", str(network), "--net"]
    parent = spawn(
        layout.tag,
        name,
        [
            *enter,
            *("unshare", "--fork", "--pid", "--mount", "--propagation", "private"),
            *("bash", str(HERE / "vm_boot.sh"), name, host.role, host.address, host.console),
            *(_KERNELS.get(name, "trixie"), _MEMORY, str(directory), ":".join(map(str, lower))),
        ],
        console,
    )
    return only_child(parent, console)


def wait(layout: Layout, name: str) -> None:
    """Wait until the machine has booted and takes commands.

    Raises:
        TestbedError: it has ended, or takes too long.
    """
    directory = layout.host(name)
    init = Process.read(directory / "pid")
    console = directory / "console.log"
    until = time.monotonic() + _BOOT_SECONDS
    connection = None
    while init is not None and Process.of(init.pid) == init and time.monotonic() < until:
        root = Path(f"/proc/{init.pid}/root")
        if (root / "run/console").is_socket():
            return
        if connection is None or Process.of(connection.pid) != connection:
            # Tried again when it ends, as it does where the machine's own tree is not there yet.
            options = (
                *("BatchMode=yes", "LogLevel=ERROR", "ConnectTimeout=60", "ConnectionAttempts=200"),
                *("ControlMaster=yes", "ControlPath=/run/console", "HostKeyAlias=console"),
                *(f"IdentityFile=/{_OWN}/console_key", f"UserKnownHostsFile=/{_OWN}/console_known_hosts"),
            )
            connection = spawn(
                layout.tag,
                name,
                [
                    *("nsenter", "--target", str(init.pid), "--mount", "--net", "--root", "--"),
                    *("/usr/bin/ssh", "-F", "none", "-N", *(word for one in options for word in ("-o", one))),
                    f"root@{HOSTS[name].console}",
                ],
                directory / "operator.log",
            )
        time.sleep(0.1)
    said = console.read_text(errors="replace").strip().splitlines() if console.exists() else []
    raise TestbedError(f"{name}: the virtual machine did not boot: {said[-1] if said else 'it said nothing'}")
