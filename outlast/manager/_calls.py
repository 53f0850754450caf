"""ckpt(): a process of the job asks for a checkpoint at this point, and learns on which side of it it then is.

While it waits it may hold nothing that CRIU cannot dump, so no connection to its manager: it looks at symbolic
links in the directory that $OUTLAST_JOB names. `run` there is another text for each run of the job, which is how
the restored process knows; `calls/N` is what became of its request. See lib/man/outlast_ckpt.3.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from outlast.errors import OutlastError

log = logging.getLogger(__name__)

VARIABLE = "OUTLAST_JOB"

_PENDING = "pending"
# The caller hangs up as soon as it has its answer.
_HANG_UP_SECONDS = 0.1
# As many answers are kept; who asked looks for its own many times a second.
_KEPT = 1000
_LONGEST_TARGET = 4000


class Calls:
    """The requests of one job's processes for checkpoints, in the manager's *directory*."""

    def __init__(self, directory: Path) -> None:
        """Begin, or go on for a manager that died: whoever waits since then is told that it failed."""
        self._directory = directory / "calls"
        self._directory.mkdir(mode=0o755, exist_ok=True)
        self._lock = threading.Lock()
        known = [int(path.name) for path in self._directory.iterdir() if path.name.isdigit()]
        self._last = max(known, default=0)
        link = directory / "run"
        if not link.is_symlink():
            link.symlink_to(secrets.token_hex(8))
        self._run = str(link.readlink())
        for number in known:
            if str((self._directory / str(number)).readlink()) == _PENDING:
                self._tell(number, "failed the job's manager was started again; ask once more")

    def accept(self, take: Callable[[], str]) -> Mapping[str, str]:
        """Have *take* called soon, which returns a checkpoint's name; return what the caller waits with."""
        with self._lock:
            self._last += 1
            number = self._last
        self._tell(number, _PENDING)
        (self._directory / str(number - _KEPT)).unlink(missing_ok=True)
        threading.Timer(_HANG_UP_SECONDS, self._answer, (number, take)).start()
        return {"ckpt": f"{self._run} {number}"}

    def _answer(self, number: int, take: Callable[[], str]) -> None:
        try:
            self._tell(number, f"done {take()}")
        except OutlastError as error:
            self._tell(number, f"failed {error}")
        except Exception as error:
            log.exception("a request of the job failed")
            self._tell(number, f"failed internal fault: {error!r}")

    def _tell(self, number: int, text: str) -> None:
        link = self._directory / str(number)
        fresh = link.with_suffix(".new")
        try:
            fresh.symlink_to(os.fsdecode(os.fsencode(text)[:_LONGEST_TARGET]))
            fresh.replace(link)
        except OSError as error:
            # The directory is removed with the job's end; nobody waits any more.
            log.debug("%s: %s", link, error)
