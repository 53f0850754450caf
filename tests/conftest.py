"""Fixtures that start the real thing, or skip and say why."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outlast.config import StoreConfig
from outlast.store import add_key

Need = Callable[[str, "str | None"], None]
StartSshd = Callable[..., "SshServer"]


@pytest.fixture(scope="session")
def need() -> Need:
    """Call it with a thing and the reason why it is missing, or None: skips, unless it was promised.

    Where $OUTLAST_TEST_NEEDS names the thing, the test fails instead, so that the job of CI which is
    there to test against it can never turn green by skipping.
    """

    def need_(what: str, why_not: str | None) -> None:
        if why_not is None:
            return
        if what in os.environ.get("OUTLAST_TEST_NEEDS", "").split(","):
            pytest.fail(f"{what} was promised by $OUTLAST_TEST_NEEDS: {why_not}", pytrace=False)
        pytest.skip(why_not)

    return need_


class SshServer:
    """OpenSSH on a loopback port of its own, with its own keys; lets in one key, to SFTP only."""

    def __init__(self, binary: str, home: Path, *, chroot: Path | None, sftp: str, extra: str) -> None:
        self._binary = binary
        self._home = home
        self._chroot = chroot
        self._server: subprocess.Popen[bytes] | None = None
        self.transport = "auto"  # by which `config` has it spoken to
        self.key = home / "user"
        self.host_key = home / "host.pub"
        self.known_hosts = home / "known_hosts"
        self.data_key = home / "data.key"
        add_key(self.data_key)
        self.served = home / "served" if chroot is None else chroot / "served"  # as this machine sees it
        self.served.mkdir(mode=0o700)
        for name in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)]
            subprocess.run(command, check=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        kind, key = self.host_key.read_text().split()[:2]
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")
        (home / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1:{self.port}\nHostKey {home}/host\nAuthorizedKeysFile {home}/user.pub\n"
            "PasswordAuthentication no\nPermitRootLogin yes\nStrictModes no\nUsePAM no\nPidFile none\n"
            "LogLevel VERBOSE\n"
            + (f"Subsystem sftp {sftp}\nForceCommand {sftp}\n" if sftp else "")
            + (f"ChrootDirectory {chroot}\n" if chroot else "")
            + extra
        )

    @property
    def log(self) -> str:
        """What the server has said so far."""
        return (self._home / "log").read_text(errors="replace")

    def url(self, directory: Path) -> str:
        """The store's url for *directory*, which is `served` or lies below it."""
        seen = directory if self._chroot is None else Path("/", directory.relative_to(self._chroot))
        return f"sftp://{getpass.getuser()}@127.0.0.1:{self.port}{seen}"

    def config(self, directory: Path, timeout: float = 20.0) -> StoreConfig:
        """The configuration of a store in *directory*."""
        return StoreConfig(
            self.url(directory),
            self.key,
            self.known_hosts,
            key=self.data_key,
            timeout=timeout,
            transport=self.transport,
        )

    def start(self) -> None:
        """Start it, at the same port each time, and wait until it listens."""
        config = self._home / "sshd_config"
        with (self._home / "log").open("ab") as log:
            self._server = subprocess.Popen([self._binary, "-D", "-e", "-f", config], stderr=log)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if self._server.poll() is not None:
                pytest.fail(f"sshd ended with {self._server.returncode}:\n{self.log}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        pytest.fail(f"sshd did not listen within 10 s:\n{self.log}")

    def sessions(self) -> list[int]:
        """Return the processes that serve one connection each."""
        assert self._server is not None
        pid = self._server.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def kill(self) -> None:
        """End the server and every session of it, without a word to anybody."""
        self._signal(signal.SIGKILL)
        if self._server is not None:
            self._server.wait(timeout=10)
            self._server = None

    def stop(self) -> None:
        """Suspend the server and every session: they keep their connections and answer nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `stop`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._server is None:
            return
        for pid in _family(self._server.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@pytest.fixture(scope="session")
def start_sshd(tmp_path_factory: pytest.TempPathFactory, need: Need) -> Iterator[StartSshd]:
    """Start an SshServer; all of them end with the test session.

    Where the tests run as root, `chroot=True` shows its users nothing but its own directory, as a site
    would have it. *sftp* is the SFTP server's command line, "" for none; *extra* are more lines for
    its configuration.
    """
    binary = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    need("sshd", None if binary else "no sshd; install openssh-server")
    assert binary is not None
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with contextlib.ExitStack() as ending:

        def start(*, chroot: bool = False, sftp: str = "internal-sftp", extra: str = "") -> SshServer:
            jail = None
            if chroot and os.geteuid() == 0:
                # Every directory above a chroot must be root's alone, and that rules out /tmp.
                jail = Path(
                    ending.enter_context(tempfile.TemporaryDirectory(prefix="outlast-test-", dir="/run"))
                )
                jail.chmod(0o755)
            home = tmp_path_factory.mktemp("sshd")
            server = SshServer(binary, home, chroot=jail, sftp=sftp, extra=extra)
            server.start()
            ending.callback(server.kill)
            return server

        yield start


@pytest.fixture(scope="session")
def sshd(start_sshd: StartSshd) -> SshServer:
    """A real OpenSSH server that all tests share."""
    return start_sshd(chroot=True)


def _family(pid: int) -> list[int]:
    """Return *pid* and all its descendants, the oldest first."""
    family = [pid]
    for member in family:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/{member}/task/{member}/children").read_text()
            family += map(int, children.split())
    return family
