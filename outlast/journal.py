"""Logs as the machine's journal likes them: each entry with its priority, and the job's id as a field.

The fields are JOB_ID, OUTLAST_EVENT (a word of docs/operate.md) and OUTLAST_CHECKPOINT, where an entry has them.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

SOCKET = Path("/run/systemd/journal/socket")
_FIELDS = {"job_id": "JOB_ID", "event": "OUTLAST_EVENT", "checkpoint": "OUTLAST_CHECKPOINT"}
# syslog(3)'s priorities.
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_TOO_LONG = (errno.EMSGSIZE, errno.ENOBUFS)
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def set_up(level: int, *, service: bool, job_id: str = "") -> None:
    """Have this process's log go where it is read.

    Args:
        service: the process runs for long and unattended: its log goes into the journal, with the time where
            standard error is no journal; else it is for the person at the terminal.
        job_id: the job that all entries are about.
    """
    fields = {"job_id": job_id} if job_id else {}
    handlers: list[logging.Handler] = []
    journal = _stderr_is_journal()
    if service and (journal or SOCKET.exists()):
        handlers.append(JournalHandler(SOCKET, fields))
    if not (service and journal):
        plain = logging.StreamHandler()
        form = "%(asctime)s outlast: %(message)s" if service else "outlast: %(message)s"
        plain.setFormatter(logging.Formatter(form))
        handlers.append(plain)
    logging.basicConfig(level=level, handlers=handlers)


def _stderr_is_journal() -> bool:
    # systemd.exec(5): device and inode of what standard error was when the service was started.
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


class JournalHandler(logging.Handler):
    """Sends each entry to journald. Source: systemd, docs/JOURNAL_NATIVE_PROTOCOL.md."""

    def __init__(self, path: Path, fields: Mapping[str, str]) -> None:
        """Prepare; *fields*, by the names that a log record has them under, go with every entry."""
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self._path = path
        self._fields = dict(fields)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def emit(self, record: logging.LogRecord) -> None:
        """Send it; a journal that is away gets nothing, and costs nothing."""
        try:
            entry = self.entry(record)
            try:
                self._socket.sendto(entry, os.fspath(self._path))
            except OSError as error:
                if error.errno not in _TOO_LONG:
                    raise
                self._send_long(entry)
        except OSError:
            if _stderr_is_journal():
                # sd-daemon(3): what is read from there may begin with its priority.
                sys.stderr.write(f"<{_priority(record.levelno)}>{self.format(record)}\n")
        except Exception:  # noqa: BLE001 - as every handler: no entry ends the program
            self.handleError(record)

    def entry(self, record: logging.LogRecord) -> bytes:
        """Return *record* as a datagram for journald."""
        fields = {
            "MESSAGE": self.format(record),
            "PRIORITY": str(_priority(record.levelno)),
            "SYSLOG_IDENTIFIER": "outlast",
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
        }
        for name, field in _FIELDS.items():
            value = getattr(record, name, None) or self._fields.get(name)
            if value:
                fields[field] = str(value)
        return b"".join(_field(name, value.encode(errors="replace")) for name, value in fields.items())

    def _send_long(self, entry: bytes) -> None:
        handle = os.memfd_create("outlast-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with os.fdopen(os.dup(handle), "wb") as file:
                file.write(entry)
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _SEALS)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", handle))]
            self._socket.sendmsg([], rights, 0, os.fspath(self._path))
        finally:
            os.close(handle)


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), 7)


def _field(name: str, value: bytes) -> bytes:
    if b"\n" in value:
        return name.encode() + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"
    return name.encode() + b"=" + value + b"\n"
