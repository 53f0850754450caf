"""The way to an SFTP server. The only module of outlast that knows SSH, and so the only one with paramiko."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import paramiko
from paramiko.hostkeys import InvalidHostKey

from outlast.errors import ConfigError, StoreRefused, StoreUnavailable
from outlast.store._wire import Lost

# AES-GCM costs about half of the other ciphers; those stay, for servers and libraries that lack it.
_FAST_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")

_PACKET = 128 << 10  # bytes in one SSH packet to us, at most
_PIECE = 32 << 10  # bytes in one SSH packet from us: OpenSSH takes no more

# paramiko logs what it also raises, with traces; only what is raised is for people.
_SSH_LOG = "outlast.store.ssh"
logging.getLogger(_SSH_LOG).setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Server:
    """Where the SFTP server is, and how both sides prove who they are."""

    user: str
    host: str
    port: int
    identity: Path
    known_hosts: Path
    timeout: float  # seconds without an answer until it counts as unreachable

    def __str__(self) -> str:
        return self.host if self.port == 22 else f"{self.host}:{self.port}"

    @property
    def known_as(self) -> str:
        """The server's name as known_hosts files write it."""
        return self.host if self.port == 22 else f"[{self.host}]:{self.port}"


class SshLink:
    """The SFTP subsystem at the end of an SSH connection; see `outlast.store._wire.Link`."""

    window = 32 << 20  # bytes that the server may send ahead: more than is ever asked for at once

    def __init__(self, server: Server) -> None:
        """Connect.

        Raises:
            ConfigError: the server is not the one in known_hosts, or a file is missing or unfit.
            StoreRefused: the server does not let this user in.
            StoreUnavailable: it does not answer.
        """
        key, known = read_credentials(server)
        self._server = server
        self._transport: paramiko.Transport | None = None
        self._channel: paramiko.Channel | None = None
        # One of paramiko's waits has no timeout; it ends when the transport is closed.
        guard = threading.Timer(4 * server.timeout, self.close)
        guard.daemon = True
        guard.start()
        try:
            self._connect(key, known)
        except BaseException:
            self.close()
            raise
        finally:
            guard.cancel()

    def send(self, data: bytes) -> None:
        """See `Link.send`."""
        assert self._channel is not None  # noqa: S101 - __init__ has set it
        with self._losing():
            for start in range(0, len(data), _PIECE):
                piece = data[start : start + _PIECE]
                while piece:
                    count = self._channel.send(piece)
                    if count == 0:
                        raise EOFError
                    piece = piece[count:]

    def receive(self) -> bytes:
        """See `Link.receive`."""
        assert self._channel is not None  # noqa: S101 - __init__ has set it
        with self._losing():
            data = self._channel.recv(self.window)  # all that is there: paramiko would move what stays behind
            if not data:
                raise EOFError
            return data

    def is_open(self) -> bool:
        """See `Link.is_open`."""
        transport, channel = self._transport, self._channel
        return transport is not None and transport.is_active() and channel is not None and not channel.closed

    def close(self) -> None:
        """See `Link.close`."""
        if self._transport is not None:
            self._transport.close()

    def _connect(self, key: paramiko.PKey, known: paramiko.HostKeys) -> None:
        server = self._server
        with self._unavailable():
            connection = socket.create_connection((server.host, server.port), server.timeout)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A server that takes no more bytes holds up paramiko's writes without end. The kernel's own
            # bound on data that is not acknowledged breaks the connection instead.
            milliseconds = max(1, int(server.timeout * 1000))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
            transport = self._transport = paramiko.Transport(connection)
            transport.set_log_channel(_SSH_LOG)
            transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = server.timeout
            _prefer(transport, [*(known.lookup(server.known_as) or ())])
            transport.start_client(timeout=server.timeout)
            offered = transport.get_remote_server_key()  # raises where start_client ran out of time
        check_host_key(server, offered, known)
        with self._unavailable():
            try:
                transport.auth_publickey(server.user, key)
            except paramiko.AuthenticationException as error:
                if not transport.is_active() or "timeout" in str(error).lower():
                    raise EOFError(str(error)) from error
                raise key_refused(server, key) from error
        with self._unavailable():
            try:
                self._channel = transport.open_session(self.window, _PACKET, server.timeout)
                self._channel.settimeout(server.timeout)
                self._channel.invoke_subsystem("sftp")
            except paramiko.SSHException as error:
                if not transport.is_active():
                    raise
                raise sftp_refused(server, str(error)) from error
        transport.set_keepalive(max(1, int(server.timeout / 2)))

    @contextlib.contextmanager
    def _unavailable(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise StoreUnavailable(
                f"{self._server}: {self._reason(error, time.monotonic() - start)}"
            ) from error

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise Lost(self._reason(error, time.monotonic() - start)) from error

    def _reason(self, error: Exception, elapsed: float) -> str:
        if isinstance(error, TimeoutError) or elapsed >= self._server.timeout:
            return f"no answer within {self._server.timeout:g} s"
        return (
            (error.strerror if isinstance(error, OSError) else None) or str(error) or "the connection broke"
        )


def read_credentials(server: Server) -> tuple[paramiko.PKey, paramiko.HostKeys]:
    """Return this side's key, and the keys by which servers are known. Raises ConfigError."""
    return _read_key(server.identity), _read_known_hosts(server.known_hosts)


def _read_key(path: Path) -> paramiko.PKey:
    make = "make one without a passphrase: ssh-keygen -t ed25519 -N '' -f " + str(path)
    reasons = []
    for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
        try:
            return kind.from_private_key_file(str(path))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; it is the key for the store", hint=make) from None
        except paramiko.PasswordRequiredException:
            raise ConfigError(f"{path}: the key for the store has a passphrase", hint=make) from None
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        except (paramiko.SSHException, ValueError, IndexError) as error:
            reasons.append(str(error))  # of another kind, or garbled
    raise ConfigError(f"{path}: not a private key: {reasons[0]}", hint=make)


def _read_known_hosts(path: Path) -> paramiko.HostKeys:
    try:
        return paramiko.HostKeys(str(path))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; it names the store's host key",
            hint="write it with ssh-keyscan, then check it",
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (InvalidHostKey, ValueError, paramiko.SSHException) as error:
        raise ConfigError(f"{path}: a line holds no host key: {error}") from None


def _prefer(transport: paramiko.Transport, known_kinds: list[str]) -> None:
    """Ask for the cheap ciphers first, and for the kinds of host key by which the server is known."""
    options = transport.get_security_options()
    fast = [cipher for cipher in _FAST_CIPHERS if cipher in options.ciphers]
    options.ciphers = [*fast, *(cipher for cipher in options.ciphers if cipher not in fast)]
    if "ssh-rsa" in known_kinds:
        known_kinds = [*known_kinds, "rsa-sha2-512", "rsa-sha2-256"]
    options.key_types = sorted(options.key_types, key=lambda kind: kind not in known_kinds)


def key_refused(server: Server, key: paramiko.PKey) -> StoreRefused:
    """Return the error for a server that does not let in the holder of *key*."""
    return StoreRefused(
        f"{server}: the store does not let {server.user} in with the key {server.identity}",
        hint=f"authorized_keys of {server.user} there needs the line: {key.get_name()} {key.get_base64()}",
    )


def sftp_refused(server: Server, why: str) -> StoreRefused:
    """Return the error for a server that lets this user in, but not to SFTP."""
    return StoreRefused(
        f"{server}: no SFTP for {server.user}: {why}",
        hint="sshd_config there needs the line: Subsystem sftp internal-sftp",
    )


def check_host_key(server: Server, offered: paramiko.PKey, known: paramiko.HostKeys) -> None:
    """Raise ConfigError unless *offered* is a key by which the server is known."""
    mine = known.lookup(server.known_as)
    if mine is not None and any(key == offered for key in mine.values()):
        return
    digest = base64.b64encode(hashlib.sha256(offered.asbytes()).digest()).decode().rstrip("=")
    found = f"{offered.get_name()} SHA256:{digest}"
    if mine is None:
        raise ConfigError(
            f"{server}: {server.known_hosts} has no line for {server.known_as}, whose host key is {found}",
            hint=f"compare that with the server's own, then add the line: "
            f"{server.known_as} {offered.get_name()} {offered.get_base64()}",
        )
    raise ConfigError(
        f"{server}: its host key is {found}, which is not the one in {server.known_hosts}",
        hint="either it was installed anew or this is another machine: ask its administrator before you "
        f"change the line for {server.known_as}",
    )
