"""The manager's end of the connection to a job's shim."""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from criu_backend import Context
from outlast.control import Peer, peer_of
from outlast.errors import OutlastError

_HELLO_SECONDS = 10.0
_SET_BACK_SECONDS = 3600.0
_DESCRIPTORS = 4


class ShimGone(OutlastError):
    """The scheduler has ended the job while it was being started."""


class Shim:
    """One shim that asked for its job to be run: who it is, what it runs, and what to tell it."""

    def __init__(self, connection: socket.socket) -> None:
        """Take the hello of the shim at the other end. Raises OutlastError if there is none."""
        self._connection = connection
        self.peer: Peer = peer_of(connection)
        self._pidfd = os.pidfd_open(self.peer.pid)
        self._fds: list[int] = []
        self._input = b""
        connection.settimeout(_HELLO_SECONDS)
        try:
            data, ancillary, _, _ = connection.recvmsg(65536, socket.CMSG_SPACE(4 * _DESCRIPTORS))
            for _, kind, packed in ancillary:
                if kind == socket.SCM_RIGHTS:
                    self._fds.extend(array.array("i", packed[: len(packed) // 4 * 4]))
            self._input = data
            hello = self._message()
            if len(self._fds) != _DESCRIPTORS or hello.get("op") != "hello":
                raise OutlastError("the shim said no hello")
        except (OSError, ValueError) as error:
            self.close()
            raise OutlastError(f"the shim said no hello: {error}") from None
        except OutlastError:
            self.close()
            raise
        self.argv: list[str] = [str(word) for word in hello["argv"]]
        self.interval = str(hello["interval"])
        # The kernel's copy, as the scheduler set it; no message can say otherwise.
        raw = Path(f"/proc/{self.peer.pid}/environ").read_bytes()
        pairs = (os.fsdecode(item).partition("=") for item in raw.split(b"\0") if item)
        self.environment = {key: value for key, _, value in pairs}

    @property
    def stdio(self) -> tuple[int, int, int]:
        """The job's standard descriptors."""
        return (self._fds[0], self._fds[1], self._fds[2])

    @property
    def context(self) -> Context:
        """The process in whose place the job is to run."""
        return Context(self.peer.pid, self._pidfd, self.stdio, self._fds[3])

    @property
    def gone(self) -> bool:
        """Whether the shim has ended or hung up."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.register(self._connection, select.POLLRDHUP)
        return bool(poll.poll(0))

    def say(self, text: str) -> None:
        """Have a line written to the job's standard error; a shim that is gone hears nothing."""
        with contextlib.suppress(OSError):
            self._send({"op": "say", "text": text})

    def started(self, *, ask: bool = False) -> None:
        """Tell the shim that the job runs in its capsule; with *ask* it forwards SIGTERM only when told to."""
        with contextlib.suppress(OSError):
            self._send({"op": "started", "ask": [signal.SIGTERM] if ask else []})

    def forward(self, number: int) -> None:
        """Have the shim send the job the signal that it told of; see `signals`."""
        with contextlib.suppress(OSError):
            self._send({"op": "forward", "number": number})

    def signals(self) -> Iterator[int]:
        """Yield the signals that the shim was sent and has not forwarded, until it ends."""
        with contextlib.suppress(OSError, ValueError):
            self._connection.settimeout(None)
            while True:
                message = self._message()
                if message.get("op") == "signal":
                    yield int(message["number"])

    def attached(self) -> None:
        """Tell the shim that the scheduler signals the job itself, so that it need not forward anything."""
        with contextlib.suppress(OSError):
            self._send({"op": "attached"})

    def run_without(self, why: str) -> None:
        """Have the shim run the job itself, without checkpoints."""
        with contextlib.suppress(OSError):
            self._send({"op": "run-without", "why": why})

    def exit(self, code: int, text: str) -> None:
        """Have the shim end the job with *code*, after *text* on its standard error."""
        with contextlib.suppress(OSError):
            self._send({"op": "exit", "code": code, "text": text})

    def set_back(self, files: Sequence[Mapping[str, Any]], epoch: int) -> None:
        """Have *files* cut back to the sizes that they had; what is cut off is kept under *epoch*'s name.

        Raises:
            OutlastError: a file cannot be set back; its name and the reason are in the text.
            ShimGone: there is no shim any more.
        """
        if not files:
            return
        try:
            self._connection.settimeout(_SET_BACK_SECONDS)
            self._send({"op": "set-back", "files": list(files), "epoch": epoch})
            answer = self._message()
        except OSError:
            raise ShimGone("the shim ended while files were set back") from None
        if answer["error"] is not None:
            raise OutlastError(f"setting back {answer['error']}")

    def close(self) -> None:
        """Close this end, the job's descriptors included; the capsule has its own."""
        for fd in (*self._fds, self._pidfd):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds = []
        self._connection.close()

    def release(self) -> None:
        """Close the job's descriptors, but stay connected, to be able to say something."""
        for fd in (*self._fds, self._pidfd):
            os.close(fd)
        self._fds = []
        self._pidfd = os.open(os.devnull, os.O_RDONLY)

    def _send(self, message: Mapping[str, Any]) -> None:
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def _message(self) -> dict[str, Any]:
        while b"\n" not in self._input:
            data = self._connection.recv(65536)
            if not data:
                raise ConnectionError("the shim hung up")
            self._input += data
        line, _, self._input = self._input.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
