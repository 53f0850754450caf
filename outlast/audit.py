"""The audit log: who had what done with a job's images, on the machine where it was done.

Each entry is one line of JSON in /var/log/outlast/audit.log and one message to the system log, facility
"authpriv". Who it was is the kernel's word: the peer of a socket, or this process's own credentials.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from outlast.control import Handler, Peer
from outlast.errors import OutlastError

LOG = Path("/var/log/outlast/audit.log")
_SYSLOG = Path("/dev/log")
_UNSET = 0xFFFFFFFF  # what the kernel calls the login user of what nobody logged in for

log = logging.getLogger(__name__)


def record(what: str, *, job: str, uid: int | None = None, refused: bool = False, **facts: Any) -> None:  # noqa: ANN401
    """Add an entry; where that cannot be done, go on: no job is lost for a full disk.

    Args:
        what: such as "checkpoint", "restore", "verify", "forget".
        job: the job's id; "" for none.
        uid: who asked; None for this process itself, and for the user who once logged in for it.
        refused: it was asked for and not done.
        facts: more, as JSON values.
    """
    entry: dict[str, Any] = {
        "time": time.time(),
        "host": socket.gethostname().split(".")[0],
        "what": what,
        "job": job,
        "uid": os.getuid() if uid is None else uid,
        "refused": refused,
        **facts,
    }
    if uid is None and (login := _login_uid()) is not None:
        entry["login_uid"] = login
    line = json.dumps(entry)
    try:
        _append(line.encode() + b"\n")
    except OSError as error:
        log.debug("%s: %s", LOG, error)
    if _SYSLOG.exists():
        with contextlib.suppress(OSError):
            handler = logging.handlers.SysLogHandler(
                str(_SYSLOG), facility=logging.handlers.SysLogHandler.LOG_AUTHPRIV
            )
            handler.ident = "outlast-audit: "
            handler.emit(logging.LogRecord("audit", logging.INFO, "", 0, line, None, None))
            handler.close()


@contextlib.contextmanager
def attempt(what: str, *, job: str, uid: int | None = None, **facts: Any) -> Iterator[None]:  # noqa: ANN401
    """Add an entry for what the block does, at its end; it is one of a refusal where that is an OutlastError."""
    try:
        yield
    except OutlastError as error:
        record(what, job=job, uid=uid, refused=True, why=str(error), **facts)
        raise
    record(what, job=job, uid=uid, **facts)


def audited(handle: Handler, looks: frozenset[str]) -> Handler:
    """Return *handle* with an entry for each request of a control socket.

    Of those that only look, *looks*, those that were refused: pages and live views ask many times a minute.
    """

    def answered(peer: Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
        what, job = str(request.get("op"))[:40], str(request.get("job", ""))[:200]
        facts = {key: request[key] for key in ("checkpoint", "to", "node") if request.get(key) is not None}
        try:
            answer = handle(peer, request)
        except OutlastError as error:
            record(what, job=job, uid=peer.uid, refused=True, pid=peer.pid, why=str(error), **facts)
            raise
        if what not in looks:
            record(what, job=job, uid=peer.uid, pid=peer.pid, **facts)
        return answer

    return answered


def _append(data: bytes) -> None:
    """Add *data* to the log, which is opened anew each time, so that one that was rotated is not written to."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(LOG, flags)
    except FileNotFoundError:
        fd = os.open(LOG, flags | os.O_CREAT | os.O_EXCL, 0o600)
        directory = LOG.parent.stat()
        # Where the directory is the watcher's, it must be able to write what root was the first to write.
        if os.geteuid() == 0:
            os.fchown(fd, directory.st_uid, directory.st_gid)
    try:
        found = os.fstat(fd)
        # Root must not add to a file that somebody else has put there.
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            os.write(fd, data)
    finally:
        os.close(fd)


def _login_uid() -> int | None:
    try:
        found = int(Path("/proc/self/loginuid").read_text())
    except (OSError, ValueError):
        return None
    return None if found == _UNSET else found
