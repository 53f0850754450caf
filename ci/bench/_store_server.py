"""The server that the store benchmark's tools all ship to: one sshd on loopback, its directory on tmpfs."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from ci.testbed.layout import TestbedError

CIPHER = "aes128-gcm@openssh.com"
HOST = "storage"  # the server's name in the ssh_config that every tool but Outlast is given
_PROGRAMS = Path(__file__).parent / "programs"


class Server:
    """An sshd that lets in this user by one key; *directory* is where its stores may be made."""

    def __init__(self, home: Path, pid: int, port: int, real_port: int) -> None:
        self.home = home
        self.port = port  # where the tools connect: the server's, or that of the relay before it
        self._pid = pid
        self._real_port = real_port
        self.directory = home / "served"
        self.identity = home / "user"
        self.known_hosts = home / f"known_hosts.{port}"
        self.ssh_config = home / f"ssh_config.{port}"
        kind, key = (home / "host.pub").read_text().split()[:2]
        self.known_hosts.write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
        self.ssh_config.write_text(
            f"Host {HOST}\n  HostName 127.0.0.1\n  Port {port}\n  User root\n  IdentityFile {self.identity}\n"
            f"  IdentitiesOnly yes\n  UserKnownHostsFile {self.known_hosts}\n  StrictHostKeyChecking yes\n"
            f"  Ciphers {CIPHER}\n  LogLevel ERROR\n  ControlMaster no\n"
        )

    @property
    def ssh(self) -> list[str]:
        """The ssh of the tools, without the host."""
        return ["ssh", "-F", str(self.ssh_config)]

    def cpu_seconds(self) -> float:
        """The processor time of the server and all its sessions so far, those that ended included."""
        until = time.monotonic() + 0.3
        while len(_family(self._pid)) > 1 and time.monotonic() < until:
            time.sleep(0.01)  # a session that ends now is counted when it has been waited for
        tick = os.sysconf("SC_CLK_TCK")
        total = 0
        for pid in _family(self._pid):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += sum(map(int, fields[11:15]))
        return total / tick

    @contextlib.contextmanager
    def delayed(self, seconds: float) -> Iterator[Server]:
        """The same server at a round trip of *seconds*."""
        program = self.home / "relay"
        if not program.exists():
            source = str(_PROGRAMS / "relay.c")
            subprocess.run(["gcc", "-O2", "-std=gnu11", "-pthread", "-o", program, source], check=True)
        port = _free_port()
        words = [str(program), str(port), str(self._real_port), str(round(seconds / 2 * 1e6))]
        relay = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            if not relay.stdout or relay.stdout.readline() != b"ready\n":
                raise TestbedError("the relay does not start")
            yield Server(self.home, self._pid, port, self._real_port)
        finally:
            relay.kill()
            relay.wait()


@contextlib.contextmanager
def start(home: Path) -> Iterator[Server]:
    """Start an sshd; it ends with the block.

    Raises:
        TestbedError: there is none on this machine, or it does not start.
    """
    binary = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if binary is None:
        raise TestbedError("no sshd", hint="apt-get install openssh-server")
    (home / "served").mkdir()
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)], check=True)
    port = _free_port()
    (home / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {home}/host\nAuthorizedKeysFile {home}/user.pub\n"
        "PasswordAuthentication no\nPermitRootLogin yes\nStrictModes no\nUsePAM no\nPidFile none\n"
        "Subsystem sftp internal-sftp\n"
    )
    with (home / "sshd.log").open("wb") as log:
        sshd = subprocess.Popen([binary, "-D", "-e", "-f", home / "sshd_config"], stderr=log)
    try:
        _wait_for(port, sshd)
        yield Server(home, sshd.pid, port, port)
    finally:
        sshd.terminate()
        sshd.wait(10)


def _wait_for(port: int, sshd: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 10
    while time.monotonic() < until and sshd.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TestbedError("sshd does not listen")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _family(pid: int) -> list[int]:
    """Return *pid* and all its descendants."""
    family = [pid]
    for member in family:
        with contextlib.suppress(OSError):
            family += map(int, Path(f"/proc/{member}/task/{member}/children").read_text().split())
    return family
