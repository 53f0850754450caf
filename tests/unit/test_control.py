"""The local control sockets: what comes of a request, and of what is none."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from outlast.control import Peer, answer


def reply_to(request: bytes) -> bytes:
    """What a process is told that sends *request*."""

    def handle(peer: Peer, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"heard": asked["op"]}

    mine, its = socket.socketpair()
    thread = threading.Thread(target=answer, args=(its, handle))
    thread.start()
    with mine:
        mine.sendall(request)
        mine.shutdown(socket.SHUT_WR)
        told = mine.makefile("rb").read()
    thread.join()
    return told


def test_request_is_answered() -> None:
    assert json.loads(reply_to(b'{"op": "status"}\n')) == {"ok": True, "heard": "status"}


def test_who_only_connects_and_hangs_up_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert reply_to(b"") == b""
    assert not caplog.records


@pytest.mark.parametrize(
    ("request_", "why"), [(b"GET / HTTP/1.1\n", "is no JSON"), (b"[]\n", "is no JSON object")]
)
def test_what_is_no_request_is_told_so(request_: bytes, why: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        told = json.loads(reply_to(request_))

    assert (told["ok"], told["error"]) == (False, f"the request {why}")
    assert not caplog.records
