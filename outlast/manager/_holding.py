"""The right of this run to go on: how it is held, what extends it, and how it begins.

docs/adr/0018-leases-and-the-guard.md has the rule and why no two runs of a job ever run at once under it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from outlast.config import LeaseConfig
from outlast.errors import OutlastError
from outlast.manager._events import EventLog
from outlast.manager._guard import Guard, boottime
from outlast.model import JobState, Lease, LeaseView, SchedulerJob
from outlast.store import Store

log = logging.getLogger(__name__)

# How much sooner than its end a lease is over for its holder: clocks differ by less over a lease's length,
# and a job is stopped in less.
MARGIN_SECONDS = 0.3
_POLL_SECONDS = 0.1

Ask = Callable[[], SchedulerJob | None]


def lease_end(renewed: float, ttl: float) -> float:
    """Return until when the job may run whose lease was last extended by what was begun at *renewed*."""
    return renewed + ttl - MARGIN_SECONDS


def is_this_run(job: SchedulerJob | None, epoch: int, node: str) -> bool:
    """Whether the scheduler's word on a job is that its run *epoch* goes on here."""
    return job is not None and job.state is JobState.RUNNING and job.epoch == epoch and node in job.nodes


def takeover_wait(
    views: list[LeaseView], mine: Lease, claimed: float | None, now: float, ttl: float
) -> float:
    """Return for how many seconds more the run *mine* must not begin; 0 if it may.

    Args:
        views: the job's lease in the store, of the highest run, if there is one.
        claimed: when this run took the lease from another that had not given it up (`boottime`), or None.
        now: `boottime`.
    """
    waits = [0.0]
    if claimed is not None:
        waits.append(claimed + ttl - now)
    for view in views:
        if view.lease.is_fence and not view.lease.is_lifted and view.lease.epoch == mine.epoch:
            # Put up when the scheduler had taken the run before for lost; the watcher lifts it in time.
            # Should the watcher be gone, the fence's age says as much.
            waits.append(ttl - view.age)
    return max(waits)


class Holding:
    """The lease of one run, as its manager holds it."""

    def __init__(self, config: LeaseConfig, lease: Lease, events: EventLog, ask: Ask | None) -> None:
        """*ask* returns the scheduler's word on the job; None where there is no scheduler."""
        self._config = config
        self._lease = lease
        self._events = events
        self._ask = ask
        self._extended = boottime()
        self._guard: Guard | None = None
        self._over = threading.Event()
        self._was_frozen = False
        self._lock = threading.Lock()
        self._fault = ""
        self._stopped = False

    def await_turn(self, store: Store, gone: Callable[[], bool]) -> bool:
        """Take the lease, and return once no other run of the job can still be running; False if *gone*.

        Raises:
            LeaseLost: a later run has it.
            StoreUnavailable: the store does not answer; call again.
        """
        job, cluster = self._lease.job, self._lease.job.cluster
        claimed = None
        told = False
        while True:
            views = [view for view in store.leases(cluster) if view.lease.job == job]
            left = takeover_wait(views, self._lease, claimed, boottime(), self._config.ttl)
            if left <= 0 and claimed is None and any(_is_in_the_way(view, self._lease) for view in views):
                store.renew_lease(self._lease)
                claimed = boottime()
                continue
            if left <= 0:
                start = boottime()
                store.renew_lease(self._lease)
                self.extend(start)
                return True
            if not told:
                told = True
                self._events.add(
                    "waits", f"the run before may still go on somewhere, for {left:.1f} s at most"
                )
            if gone():
                return False
            if claimed is not None:
                store.renew_lease(self._lease)
            time.sleep(min(left, _POLL_SECONDS))

    def watch(self, guard: Guard) -> None:
        """Have *guard* stop the job from now on whenever the lease runs out."""
        first = self._guard is None
        self._guard = guard
        self._allow()
        if first:
            threading.Thread(target=self._seek_witness, name="witness", daemon=True).start()

    def extend(self, since: float) -> None:
        """The lease was extended, by what was begun at *since* (`boottime`)."""
        with self._lock:
            if since <= self._extended:
                return
            self._extended = since
        self._allow()
        self._tell()

    def stop(self) -> None:
        """Have the job stand still until it is ended or `go_on` is called."""
        self._stopped = True
        if self._guard is not None:
            self._guard.allow(0.0)

    def go_on(self) -> None:
        """Let a job go on that `stop` had stand still."""
        if self._stopped:
            self._stopped = False
            self._allow()

    def end(self) -> None:
        """Nothing of the job is left."""
        self._over.set()

    @property
    def left(self) -> float:
        """For how many seconds more the job may run."""
        return lease_end(self._extended, self._config.ttl) - boottime()

    def _allow(self) -> None:
        guard = self._guard
        if guard is None or not self._config.guard or self._stopped:
            return
        try:
            guard.allow(lease_end(self._extended, self._config.ttl))
        except OutlastError as error:
            if str(error) != self._fault:
                self._fault = str(error)
                self._events.add("no-guard", str(error))

    def _seek_witness(self) -> None:
        """Where the store does not answer, ask the scheduler whether it has this run go on."""
        pace = max(0.1, self._config.ttl / 8)
        while not self._over.wait(pace):
            self._tell()
            if self._ask is None or self.left > self._config.ttl / 2:
                continue
            start = boottime()
            try:
                job = self._ask()
            except OutlastError as error:
                log.debug("the scheduler does not answer either: %s", error)
                continue
            if is_this_run(job, self._lease.epoch, self._lease.node):
                self.extend(start)

    def _tell(self) -> None:
        guard = self._guard
        if guard is None or self._stopped or self._over.is_set() or guard.frozen is self._was_frozen:
            return
        self._was_frozen = guard.frozen
        if self._was_frozen:
            self._events.add(
                "frozen",
                "the job stands still: neither the store nor the scheduler says that this run goes on",
            )
        else:
            self._events.add("thawed", "the job goes on: its lease was renewed")


def _is_in_the_way(view: LeaseView, mine: Lease) -> bool:
    """Whether a lease is of a run that may still be running, and is not known to have been stopped."""
    lease = view.lease
    return lease != mine and not lease.is_fence and lease.epoch <= mine.epoch
