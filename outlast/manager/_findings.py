"""Telling the job's owner what of the job does not go with its checkpoints, at its start and before each dump."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from criu_backend import INCOMPLETE, Finding, explain
from outlast.errors import CheckpointRefused
from outlast.manager._events import EventLog
from outlast.manager._run import Run

log = logging.getLogger(__name__)

# Programs open and close much in their first seconds; what is still there a little later stays.
_FIRST_LOOK_SECONDS = 3.0
_SECOND_LOOK_SECONDS = 3.0
# Before a dump: what is gone by then was on its way.
_SHORT_LOOK_SECONDS = 0.2


class Findings:
    """Looks into the running job: shortly after its start, and before each dump."""

    def __init__(self, run: Run, events: EventLog, say: Callable[[str], None]) -> None:
        """Prepare; *say* writes a line to the job's standard error."""
        self._run = run
        self._events = events
        self._say = say
        self._told: set[tuple[str, int]] = set()
        # Held while CRIU dumps the job: it traces it, and that is no finding.
        self.dumping = threading.Lock()

    def begin(self) -> None:
        """Look shortly after the job's start, in the background."""
        self._later(_FIRST_LOOK_SECONDS, self._first_look)

    def look(self) -> list[Finding]:
        """Return what does not go with a checkpoint of the job as it is now."""
        capsule = self._run.capsule
        if capsule is None:
            return []
        try:
            with self.dumping:
                return explain(capsule.tasks(), capsule.init_pid)
        except OSError as error:
            log.warning("the job cannot be looked into: %s", error)
            return []

    def before_dump(self) -> None:
        """Tell of what has come since the last look.

        Raises:
            CheckpointRefused: CRIU would dump the job, and what is restored would not be the job.
        """
        found = self.look()
        if any(self._is_new(one) for one in found):
            time.sleep(_SHORT_LOOK_SECONDS)
            seen = {(one.kind, one.pid, one.fd) for one in found}
            found = [one for one in self.look() if (one.kind, one.pid, one.fd) in seen]
            self.tell(found)
        for one in found:
            if one.kind in INCOMPLETE:
                raise CheckpointRefused(str(one), hint=one.way_out)

    def _is_new(self, one: Finding) -> bool:
        return (one.kind, one.pid) not in self._told

    def tell(self, found: list[Finding]) -> None:
        """Tell of each of *found* once: a line on the job's standard error, and an event."""
        for one in found:
            if not self._is_new(one):
                continue
            self._told.add((one.kind, one.pid))
            so = "; there is no checkpoint while it is there" if one.stops else ""
            self._events.add("finding", str(one), **as_dictionary(one))
            self._say(f"{one}{so}: {one.way_out}")

    def _first_look(self) -> None:
        first = {(one.kind, one.pid, one.fd) for one in self.look()}
        if first:
            self._later(_SECOND_LOOK_SECONDS, lambda: self._second_look(first))

    def _second_look(self, first: set[tuple[str, int, int | None]]) -> None:
        self.tell([one for one in self.look() if (one.kind, one.pid, one.fd) in first])

    @staticmethod
    def _later(seconds: float, act: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, act)
        timer.daemon = True
        timer.start()


def as_dictionary(one: Finding) -> dict[str, Any]:
    """Return a finding as `outlast explain --json` shows it."""
    return {
        "kind": one.kind,
        "pid": one.pid,
        "name": one.name,
        "fd": one.fd,
        "stops": one.stops,
        "what": one.what,
        "way_out": one.way_out,
    }
