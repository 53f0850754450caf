"""What journald is sent, on a socket as its own."""

from __future__ import annotations

import logging
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.journal import JournalHandler


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "socket"))
        receiver.settimeout(10)
        yield receiver


@pytest.fixture
def log(tmp_path: Path, journal: socket.socket) -> Iterator[logging.Logger]:
    assert journal.getsockname()
    logger = logging.getLogger("outlast.test_journal")
    logger.setLevel(logging.INFO)
    handler = JournalHandler(tmp_path / "socket", {"job_id": "17"})
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)


def fields(data: bytes) -> dict[str, str]:
    """Read an entry as docs/JOURNAL_NATIVE_PROTOCOL.md of systemd has it."""
    found = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack_from("<Q", data)
            value, data = data[8 : 8 + length], data[8 + length + 1 :]
        found[name.decode()] = value.decode()
    return found


def test_entries_have_priority_and_fields(journal: socket.socket, log: logging.Logger) -> None:
    log.warning("job %s: lost", "17", extra={"event": "requeued", "checkpoint": None})
    found = fields(journal.recv(1 << 16))

    assert found["MESSAGE"] == "job 17: lost"
    assert found["PRIORITY"] == "4"
    assert (found["JOB_ID"], found["OUTLAST_EVENT"]) == ("17", "requeued")
    assert found["SYSLOG_IDENTIFIER"] == "outlast"
    assert "OUTLAST_CHECKPOINT" not in found


def test_entries_of_several_lines_stay_one(journal: socket.socket, log: logging.Logger) -> None:
    log.info("one\nJOB_ID=18\nthree")
    found = fields(journal.recv(1 << 16))

    assert found["MESSAGE"] == "one\nJOB_ID=18\nthree"
    assert found["JOB_ID"] == "17"


def test_entries_too_long_for_a_datagram_come_in_a_file(journal: socket.socket, log: logging.Logger) -> None:
    log.info("x" * 5_000_000)
    _, handles, _, _ = socket.recv_fds(journal, 16, 1)
    with os.fdopen(handles[0], "rb") as file:
        file.seek(0)
        found = fields(file.read())

    assert len(found["MESSAGE"]) == 5_000_000


def test_journal_that_is_away_costs_nothing(tmp_path: Path) -> None:
    handler = JournalHandler(tmp_path / "none", {})

    handler.emit(logging.LogRecord("outlast", logging.INFO, __file__, 1, "said", (), None))


@pytest.mark.parametrize("is_journal", [True, False])
def test_services_that_log_to_the_journal_say_things_once(tmp_path: Path, is_journal: bool) -> None:
    script = (
        "import logging, os, pathlib, sys; from outlast import journal\n"
        "journal.SOCKET = pathlib.Path(sys.argv[1])\n"
        "s = os.fstat(2); os.environ['JOURNAL_STREAM'] = f'{s.st_dev}:{s.st_ino}' if sys.argv[2] else ''\n"
        "journal.set_up(logging.INFO, service=True, job_id='17')\n"
        "logging.info('said')\n"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "socket"))
        receiver.settimeout(10)
        argv = [sys.executable, "-c", script, str(tmp_path / "socket"), "yes" if is_journal else ""]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        found = fields(receiver.recv(1 << 16))

    assert (found["MESSAGE"], found["JOB_ID"]) == ("said", "17")
    assert ("said" in done.stderr) is not is_journal
