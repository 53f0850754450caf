"""The local control sockets of managers and watcher: one JSON line asks, one JSON line answers.

Who asks is the kernel's word (SO_PEERCRED), never the message's. An error crosses the socket as its
text, its hint and its exit code, and comes out on the other side as an OutlastError again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.errors import OutlastError, UsageError

log = logging.getLogger(__name__)

_LONGEST_LINE = 64 << 20
_REQUEST_SECONDS = 10.0


@dataclass(frozen=True)
class Peer:
    """The process at the other end of a local socket when it connected."""

    pid: int
    uid: int
    gid: int


class RemoteError(OutlastError):
    """What the other end of a control socket said no with; its exit code is the other end's."""

    def __init__(self, message: str, *, hint: str | None, exit_code: int) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


Handler = Callable[[Peer, Mapping[str, Any]], Mapping[str, Any]]


def peer_of(connection: socket.socket) -> Peer:
    """Return who is at the other end of a connected unix socket, as the kernel knows it."""
    size = struct.calcsize("3i")
    return Peer(*struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)))


def listen(path: Path) -> socket.socket:
    """Return a socket that listens at *path*, which anybody may connect to; a stale one is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    listener.bind(str(fresh))
    fresh.chmod(0o666)
    listener.listen(64)
    # The name appears only when a connection will be accepted.
    fresh.rename(path)
    return listener


def answer(connection: socket.socket, handle: Handler) -> None:
    """Read one request from *connection*, answer it with what *handle* returns, and close it."""
    with connection, contextlib.suppress(OSError):
        connection.settimeout(_REQUEST_SECONDS)
        peer = peer_of(connection)
        with connection.makefile("rwb") as file:
            if not (line := file.readline(_LONGEST_LINE)):
                return  # it has hung up without a word, as one does that only looks who is there
            try:
                reply = {"ok": True, **handle(peer, _parsed(line))}
            except OutlastError as error:
                reply = {"ok": False, "error": str(error), "hint": error.hint, "exit_code": error.exit_code}
            except Exception as error:
                log.exception("a control request failed")
                reply = {"ok": False, "error": f"internal fault: {error!r}", "hint": None, "exit_code": 70}
            connection.settimeout(None)
            file.write(json.dumps(reply).encode() + b"\n")


def _parsed(line: bytes) -> Mapping[str, Any]:
    try:
        request = json.loads(line)
    except ValueError:
        raise UsageError("the request is no JSON") from None
    if not isinstance(request, dict):
        raise UsageError("the request is no JSON object")
    return request


def serve(listener: socket.socket, handle: Handler) -> None:
    """Answer requests, each in a thread of its own, until *listener* is closed."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=answer, args=(connection, handle), daemon=True).start()


def call(path: Path, request: Mapping[str, Any], *, timeout: float = 30.0) -> Mapping[str, Any]:
    """Ask the process that listens at *path* and return its answer.

    Raises:
        RemoteError: it said no.
        OutlastError: nobody listens there, or no answer came within *timeout* seconds.
    """
    try:
        with _connected(path, timeout) as connection, connection.makefile("rwb") as file:
            file.write(json.dumps(request).encode() + b"\n")
            file.flush()
            line = file.readline()
    except OSError as error:
        raise OutlastError(f"{path}: {error.strerror or error}") from None
    if not line:
        raise OutlastError(f"{path}: closed without an answer")
    reply: dict[str, Any] = json.loads(line)
    if not reply.pop("ok"):
        raise RemoteError(reply["error"], hint=reply["hint"], exit_code=reply["exit_code"])
    return reply


@contextlib.contextmanager
def _connected(path: Path, timeout: float) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        connection.connect(os.fspath(path))
        yield connection
