"""What is configured on the hosts: keys, Slurm, the store, the product; as layers of their file systems."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ci.testbed import cgroups, images, machine, machines
from ci.testbed.layout import HERE, HOSTS, Layout, TestbedError

_PLUGIN = Path("usr/lib/x86_64-linux-gnu/slurm-wlm/spank_outlast.so")
_HOOKS = {"Prolog": "prolog", "Epilog": "epilog", "EpilogSlurmctld": "epilog-slurmctld"}
_HOOK_DIRECTORY = Path("usr/libexec/outlast/slurm")
_OWN = "usr/local/lib/testbed"


class Layer:
    """A directory that becomes part of a host's file system; its owners are those of *root*'s passwd."""

    def __init__(self, top: Path, root: Path) -> None:
        self._top = top
        self._root = root
        self._ids = {"root": (0, 0)}
        for line in (root / "etc/passwd").read_text().splitlines():
            name, _, uid, gid, *_ = line.split(":")
            self._ids[name] = (int(uid), int(gid))
        top.mkdir(parents=True, exist_ok=True)

    def directory(self, name: str, *, mode: int = 0o755, owner: str = "root") -> Path:
        """Make a directory and its parents; one that Debian has keeps owner and mode, which it would hide."""
        path = self._top / name
        if path.is_dir():
            return path
        if name != ".":
            self.directory(str(Path(name).parent))
        path.mkdir()
        known = self._root / name
        if known.is_dir():
            shutil.copystat(known, path)
            os.chown(path, known.stat().st_uid, known.stat().st_gid)
        else:
            path.chmod(mode)
            os.chown(path, *self._ids[owner])
        return path

    def file(self, name: str, data: str | bytes, *, mode: int = 0o644, owner: str = "root") -> None:
        """Write a file."""
        path = self.directory(str(Path(name).parent)) / Path(name).name
        path.touch(mode=0o600)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        os.chown(path, *self._ids[owner])
        path.chmod(mode)


def _ours(name: str) -> str:
    return (HERE / "etc" / name).read_text()


def configure(layout: Layout, root: Path) -> None:
    """Write the layer that all hosts have in common, and what each has of its own.

    The product, if there is one, must be in its layer by now: what it does not have is not configured, since
    a scheduler refuses to start with a hook or plugin that is not there.
    """
    made = _make_keys(layout, root)
    common = Layer(layout.conf, root)
    common.file(
        "etc/hosts", "127.0.0.1 localhost\n" + "".join(f"{h.address} {h.name}\n" for h in HOSTS.values())
    )
    common.file("etc/munge/munge.key", os.urandom(128), mode=0o400, owner="munge")
    with_machines = layout.machines.exists()
    slurm = machines.slow(_ours("slurm.conf")) if with_machines else _ours("slurm.conf")
    limits = _ours("cgroup-memory.conf") if layout.memory.exists() else ""
    if limits:
        slurm = slurm.replace("TaskPlugin=task/none", "TaskPlugin=task/cgroup")
        slurm = slurm.replace("=CR_CPU\n", "=CR_CPU_Memory\nDefMemPerCPU=100\n")
    common.file("etc/slurm/slurm.conf", slurm + _hook_lines(layout))
    version = 2 if with_machines else cgroups.version(cgroups.hierarchies())
    common.file("etc/slurm/cgroup.conf", _ours(f"cgroup-v{version}.conf") + limits)
    if (layout.product / _PLUGIN).exists():
        common.file("etc/slurm/plugstack.conf", _ours("plugstack.conf"))
    common.file("etc/outlast/outlast.toml", _ours("outlast.toml") + (machines.SLOW if with_machines else ""))
    store = HOSTS["store"]
    host_key = " ".join((made / "host.pub").read_text().split()[:2])
    common.file("etc/outlast/known_hosts", f"{store.name},{store.address} {host_key}\n")
    common.file(f"{_OWN}/services.sh", (HERE / "services.sh").read_text(), mode=0o755)
    if with_machines:
        machines.configure(common, made)
    elif machine.lacks_sys_resource():
        common.file(f"{_OWN}/rlimit_shim.so", (made / "rlimit_shim.so").read_bytes(), mode=0o755)
        common.file(
            "usr/local/sbin/criu",
            "#!/bin/sh\n"
            f'LD_PRELOAD=/{_OWN}/rlimit_shim.so${{LD_PRELOAD:+:$LD_PRELOAD}} exec /usr/sbin/criu "$@"\n',
            mode=0o755,
        )
    # As `outlast store init` would make it on one node, and an administrator copy it to the others.
    data_key = f"{os.urandom(4).hex()} {os.urandom(32).hex()}\n"
    for host in HOSTS.values():
        own = Layer(layout.host(host.name) / "upper", root)
        own.file("etc/hostname", host.name + "\n")
        if host.role == "store":
            own.file("etc/ssh/sshd_config", _ours("sshd_config"))
            own.file("etc/ssh/ssh_host_ed25519_key", (made / "host").read_bytes(), mode=0o600)
            own.file("etc/ssh/authorized_keys/outlast", (made / "client.pub").read_bytes())
            own.directory("srv/outlast")
            own.directory("srv/outlast/ckpt", mode=0o700, owner="outlast")
        else:
            owner = "slurm" if host.role == "ctl" else "root"
            own.file("etc/outlast/store.key", (made / "client").read_bytes(), mode=0o600, owner=owner)
        if host.role == "node":
            own.file("etc/outlast/data.key", data_key, mode=0o600)


def _hook_lines(layout: Layout) -> str:
    if not layout.product.is_dir():
        return ""
    lines = ""
    for key, name in _HOOKS.items():
        if (layout.product / _HOOK_DIRECTORY / name).exists():
            lines += f"{key}=/{_HOOK_DIRECTORY / name}\n"
        else:
            machine.say(f"the product has no /{_HOOK_DIRECTORY / name}; {key} is not configured")
    if not (layout.product / _PLUGIN).exists():
        machine.say(f"the product has no /{_PLUGIN}; there is no --checkpoint option")
    return lines


def _make_keys(layout: Layout, root: Path) -> Path:
    """Make the store's host key, its one client's keys, and the shim where it is needed; return where."""
    made = layout.scratch / "made"
    made.mkdir(parents=True, mode=0o700)
    commands = [
        f"ssh-keygen -q -t ed25519 -N '' -C outlast-testbed -f /made/{name}"
        for name in ("host", "client", "console")
    ]
    if machine.lacks_sys_resource():
        flags = "-std=c17 -O2 -Wall -Wextra -Werror -shared -fPIC"
        commands.append(f"gcc {flags} -o /made/rlimit_shim.so /testbed/rlimit_shim.c")
    done = images.run_in_root(
        root,
        layout.scratch / "root",
        [f"{made}=/made:rw", f"{HERE}=/testbed"],
        ["sh", "-ec", "\n".join(commands)],
    )
    if done.returncode:
        raise TestbedError(f"making the keys: {done.stdout.strip()}")
    return made
