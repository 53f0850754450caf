"""The way to an SFTP server through OpenSSH's own client, whose ciphers run beside Python, not in it.

What the administrator has set up for that client serves here too: ssh_config, ProxyJump, ControlMaster,
certificates. Host keys are strict all the same, whatever is set up there.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path

import paramiko

from outlast.errors import ConfigError, OutlastError, StoreUnavailable
from outlast.store._sftp import Server, check_host_key, key_refused, read_credentials, sftp_refused
from outlast.store._wire import Lost

_BUFFER = 4 << 20  # bytes between Python and ssh, in each direction
_RECEIVE = 1 << 20

# What ssh says on its standard error, and who can do something about it. Source: OpenSSH 9.2 and 10.0.
_HOST_KEY = re.compile(r"Host key verification failed|HOST IDENTIFICATION HAS CHANGED|host key is known")
_REFUSED = re.compile(r"Permission denied|Too many authentication failures")
_NO_SFTP = re.compile(r"subsystem request failed.*", re.IGNORECASE)


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
        self._processors = os.sched_getaffinity(0)
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
                env=_environment(),
            )
        except OSError as error:
            mine.close()
            raise StoreUnavailable(f"ssh: {error.strerror}") from error
        finally:
            its.close()

    def send(self, data: bytes) -> None:
        """See `Link.send`."""
        self._follow()
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

    def _follow(self) -> None:
        """Have ssh run where the thread may that it works for."""
        processors = os.sched_getaffinity(0)
        if processors != self._processors and self._process.poll() is None:
            self._processors = processors
            with contextlib.suppress(OSError):
                os.sched_setaffinity(self._process.pid, processors)

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
    """Return the error for what ssh *said* before any answer to SFTP; None: nobody refused anything."""
    if _HOST_KEY.search(said):
        return _host_key_error(server)
    if match := _NO_SFTP.search(said):
        return sftp_refused(server, match[0].strip())
    if _REFUSED.search(said):
        return key_refused(server, read_credentials(server)[0])
    return None


def _host_key_error(server: Server) -> OutlastError:
    """Return what is wrong with the host key, which is asked for once more: ssh does not say all of it."""
    _, known = read_credentials(server)
    with tempfile.TemporaryDirectory() as name:
        offered = Path(name, "offered")
        # It is let to write the key down, and offers none of this side.
        changed = {
            "StrictHostKeyChecking": "accept-new",
            "UserKnownHostsFile": os.fspath(offered),
            "PreferredAuthentications": "none",
            "HashKnownHosts": "no",
            "ControlPath": "none",
        }
        kinds = [kind for kind in known.lookup(server.known_as) or ()]
        if kinds:
            changed["HostKeyAlgorithms"] = "^" + ",".join(kinds)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                _command(server, changed),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=server.timeout,
                check=False,
                env=_environment(),
            )
        if offered.exists():
            for kind_and_key in (line.split()[1:3] for line in offered.read_text().splitlines()):
                try:
                    key = paramiko.PKey.from_type_string(kind_and_key[0], b64decode(kind_and_key[1]))
                    check_host_key(server, key, known)
                except ConfigError as error:
                    return error
                except (paramiko.SSHException, ValueError, IndexError):
                    continue
    return ConfigError(
        f"{server}: its host key is not the one in {server.known_hosts}",
        hint="compare the server's own (ssh-keyscan shows it) with that file; if it is another, ask its "
        "administrator before you change the line",
    )


def _environment() -> dict[str, str]:
    """Return what of this process's environment ssh is given: where programs, home and the agent are."""
    given = {name: os.environ[name] for name in ("PATH", "HOME", "SSH_AUTH_SOCK") if name in os.environ}
    return {"PATH": "/usr/bin:/bin", **given}


def _command(server: Server, changed: Mapping[str, str] | None = None) -> list[str]:
    seconds = max(1, math.ceil(server.timeout))
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": os.fspath(server.known_hosts),
        "GlobalKnownHostsFile": "/dev/null",
        "VerifyHostKeyDNS": "no",
        "UpdateHostKeys": "no",
        "IdentitiesOnly": "yes",
        "PreferredAuthentications": "publickey",
        # This side counts the time of every answer itself; ssh's own only ends what nobody waits for.
        "ConnectTimeout": str(seconds + 1),
        "ServerAliveInterval": str(max(1, seconds // 2)),
        "ServerAliveCountMax": "3",
        "RequestTTY": "no",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "ClearAllForwardings": "yes",
        "PermitLocalCommand": "no",
        "LogLevel": "ERROR",
        # AES-GCM costs about half of OpenSSH's default cipher.
        "Ciphers": "^aes128-gcm@openssh.com,aes256-gcm@openssh.com",
        **(changed or {}),
    }
    command = ["ssh", "-i", os.fspath(server.identity), "-l", server.user]
    if server.port != 22:  # else ssh_config may know of another
        command += ["-p", str(server.port)]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    return [*command, "-s", "--", server.host, "sftp"]
