"""How a job's memory is dumped: the best way that this node's self-test and this job's last dumps allow."""

from __future__ import annotations

import logging
import threading

from criu_backend import Criu, DumpResult, best_mode, known_self_test, self_test
from outlast.manager._events import EventLog

log = logging.getLogger(__name__)

# A job whose forked dumps fail so often gets plain ones from then on.
_MOST_FAILURES = 2


class Modes:
    """Chooses between "forked", "lazy" and "plain" for each dump of one job, and tells of each change."""

    def __init__(self, wanted: str, criu: Criu, events: EventLog) -> None:
        """Prepare; *wanted* is the configuration's checkpoint.mode."""
        self._wanted = wanted
        self._criu = criu
        self._events = events
        self._failures = 0
        self._failed_last = False
        self._told: tuple[str, str | None] | None = None

    def prepare(self) -> None:
        """Have this node's self-test made in the background, unless it has been since it was booted."""
        if self._wanted != "plain" and known_self_test(self._criu) is None:
            threading.Thread(target=self._test, name="self-test", daemon=True).start()

    def choose(self) -> tuple[str, str | None]:
        """Return the way to dump next, and why it is not the one wanted."""
        if self._failures >= _MOST_FAILURES:
            return "plain", f"{self._failures} dumps of this job failed otherwise"
        if self._failed_last:
            return "plain", "the last dump of this job failed otherwise"
        return best_mode(self._wanted, self._criu)

    def failed(self, mode: str) -> None:
        """Tell that a dump in *mode* failed, or its memory was lost before it was stored."""
        self._failed_last = mode != "plain"
        self._failures += mode != "plain"

    def succeeded(self, result: DumpResult, reason: str | None) -> None:
        """Tell that a checkpoint has been stored."""
        self._failed_last = False
        now = (result.mode, result.reason or reason)
        if now != self._told and (self._told is not None or now[1] is not None or now[0] != "plain"):
            why = f": {now[1]}" if now[1] else ""
            self._events.add("mode", f"dumps are {now[0]} from now on{why}", mode=now[0], reason=now[1])
        self._told = now

    def _test(self) -> None:
        try:
            result = self_test(self._criu)
        except OSError as error:
            log.warning("this node's self-test: %s", error)
            return
        for trial in result.trials:
            if trial.problem is not None:
                log.warning("this node's self-test: %s dumps are not used: %s", trial.mode, trial.problem)
