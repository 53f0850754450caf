"""The way to an SFTP server through OpenSSH's own client, whose ciphers run beside Python, not in it.

What the administrator has set up for that client serves here too: ssh_config, ProxyJump, ControlMaster,
certificates. Host keys are strict all the same, whatever is set up there.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time

from outlast.errors import ConfigError, OutlastError, StoreRefused, StoreUnavailable
from outlast.store._sftp import Server
from outlast.store._wire import Lost

_BUFFER = 4 << 20  # bytes between Python and ssh, in each direction
_RECEIVE = 1 << 20

# What ssh says on its standard error, and who can do something about it. Source: OpenSSH 9.2 and 10.0.
_HOST_KEY = re.compile(r"Host key verification failed|HOST IDENTIFICATION HAS CHANGED|host key is known")
_REFUSED = re.compile(r"Permission denied|Too many authentication failures|subsystem request failed")


def find_ssh() -> str | None:
    """Return the path of OpenSSH's client, or None where there is none."""
    return shutil.which("ssh")


class ProcessLink:
    """The SFTP subsystem at the end of an `ssh -s`; see `outlast.store._wire.Link`."""

    def __init__(self, server: Server) -> None:
        """Start ssh. Whether the server lets it in, the first `receive` tells.

        Raises:
            StoreUnavailable: ssh cannot be started.
        """
        self._server = server
        self._answered = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the link
        mine, its = socket.socketpair()
        for end in (mine, its):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        mine.settimeout(server.timeout)
        self._socket = mine
        try:
            self._process = subprocess.Popen(
                _command(server),
                stdin=its.fileno(),
                stdout=its.fileno(),
                stderr=self._errors,
                start_new_session=True,
                env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": os.environ.get("HOME", "/root")},
            )
        except OSError as error:
            mine.close()
            raise StoreUnavailable(f"ssh: {error.strerror}") from error
        finally:
            its.close()

    def send(self, data: bytes) -> None:
        """See `Link.send`."""
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise self._lost(error) from error

    def receive(self) -> bytes:
        """See `Link.receive`.

        Raises:
            ConfigError: the server is not the one in known_hosts.
            StoreRefused: the server does not let this user in.
        """
        try:
            data = self._socket.recv(_RECEIVE)
        except OSError as error:
            raise self._lost(error) from error
        if not data:
            raise self._lost(EOFError())
        self._answered = True
        return data

    def is_open(self) -> bool:
        """See `Link.is_open`."""
        return self._process.poll() is None

    def close(self) -> None:
        """See `Link.close`."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _lost(self, error: Exception) -> Exception:
        """Return what became of the connection, in words that tell who can put it right."""
        server = self._server
        if isinstance(error, TimeoutError):
            return Lost(f"no answer within {server.timeout:g} s")
        # ssh closes its end a moment before it has said why.
        deadline = time.monotonic() + 1
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        said = self._said()
        if not self._answered and (typed := _refusal(server, said)) is not None:
            return typed
        return Lost(said.splitlines()[-1].strip() if said.strip() else "the connection broke")

    def _said(self) -> str:
        if self._errors.closed:
            return ""
        self._errors.seek(0)
        return self._errors.read(1 << 16).decode(errors="replace")


def _refusal(server: Server, said: str) -> OutlastError | None:
    if _HOST_KEY.search(said):
        return ConfigError(
            f"{server}: its host key is not one that {server.known_hosts} has for {server.known_as}",
            hint="compare the server's own (ssh-keyscan shows it) with that file; if it is another, ask its "
            "administrator before you change the line",
        )
    if _REFUSED.search(said):
        return StoreRefused(
            f"{server}: the store does not let {server.user} in: {said.strip().splitlines()[-1]}",
            hint=f"authorized_keys of {server.user} there needs the public half of {server.identity}, "
            "and sshd_config a line: Subsystem sftp internal-sftp",
        )
    return None


def _command(server: Server) -> list[str]:
    seconds = max(1, round(server.timeout))
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": os.fspath(server.known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "UpdateHostKeys": "no",
        "IdentitiesOnly": "yes",
        "ConnectTimeout": str(seconds),
        "ServerAliveInterval": str(max(1, seconds // 2)),
        "ServerAliveCountMax": "2",
        "RequestTTY": "no",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "ClearAllForwardings": "yes",
        "LogLevel": "ERROR",
        # AES-GCM costs about half of OpenSSH's default cipher.
        "Ciphers": "^aes128-gcm@openssh.com,aes256-gcm@openssh.com",
    }
    command = ["ssh", "-i", os.fspath(server.identity), "-p", str(server.port), "-l", server.user]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    return [*command, "-s", "--", server.host, "sftp"]
