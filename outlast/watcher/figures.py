"""What the watcher does, in figures."""

from __future__ import annotations

import time

import outlast
from outlast.exposition import Family, render
from outlast.watcher.loop import Loop


class Figures:
    """Counts the cycles of *loop*; another thread may read at any time."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._cycles = 0
        self._faults = 0
        self._seconds = 0.0
        self._faulty = False
        self._newest = 0.0

    def count(self, seconds: float, *, faulty: bool) -> None:
        """Count a cycle that took *seconds*; in a *faulty* one nothing could be decided."""
        self._cycles += 1
        self._faults += faulty
        self._seconds += seconds
        self._faulty = faulty
        if not faulty:
            self._newest = time.time()

    def text(self) -> str:
        """Return the figures as Prometheus reads them."""
        acted = sorted(self._loop.notes.acted.copy().items())
        return render(
            [
                Family("outlast_build_info", "gauge", "Always 1.", [({"version": outlast.__version__}, 1)]),
                Family("outlast_watcher_cycles_total", "counter", "Cycles.", [({}, self._cycles)]),
                Family(
                    "outlast_watcher_faulty_cycles_total",
                    "counter",
                    "Cycles in which store or scheduler did not answer, and nothing was decided.",
                    [({}, self._faults)],
                ),
                Family(
                    "outlast_watcher_cycle_seconds_total",
                    "counter",
                    "How long the cycles took.",
                    [({}, self._seconds)],
                ),
                Family(
                    "outlast_watcher_healthy",
                    "gauge",
                    "Whether store and scheduler answered in the newest cycle.",
                    [({}, int(not self._faulty))],
                ),
                Family(
                    "outlast_watcher_last_cycle_timestamp_seconds",
                    "gauge",
                    "When the newest cycle without a fault ended, in Unix time.",
                    [({}, self._newest)],
                ),
                Family(
                    "outlast_watcher_leases",
                    "gauge",
                    "Leases in the store: jobs with checkpoints that run, or did.",
                    [({}, len(self._loop.leases))],
                ),
                Family(
                    "outlast_watcher_actions_total",
                    "counter",
                    "What the watcher did for jobs, by the word of the event log, and what the scheduler refused.",
                    [
                        ({"event": event, "result": "refused" if refused else "done"}, count)
                        for (event, refused), count in acted
                    ],
                ),
            ]
        )
