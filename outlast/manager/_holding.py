"""The right of this run to go on: how it is held, what extends it, and how it begins.

docs/adr/0011-leases-and-the-guard.md has the rule and why no two runs of a job ever run at once under it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

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


class LeaseStore(Protocol):
    """What taking over asks of a store; see `outlast.store.Store`."""

    def leases(self, cluster: str) -> list[LeaseView]:
        """Return each job's lease of the highest run."""

    def renew_lease(self, lease: Lease) -> None:
        """Tell everybody that *lease* is held."""


class Takeover:
    """How one run takes the lease from the run before it, whatever has become of that."""

    def __init__(self, mine: Lease, ttl: float) -> None:
        self._mine = mine
        self._ttl = ttl
        self._claimed: float | None = None
        self.taken = 0.0  # when the renewal began after which this run may go on

    def step(self, store: LeaseStore, clock: Callable[[], float]) -> float:
        """Do what is to be done now; return for how many seconds at most the run must not begin yet, 0 if it may.

        *clock* is `boottime`. Raises as `Store.leases` and `Store.renew_lease`.
        """
        mine = self._mine
        views = [view for view in store.leases(mine.job.cluster) if view.lease.job == mine.job]
        if self._claimed is None and any(_is_in_the_way(view.lease, mine) for view in views):
            store.renew_lease(mine)
            # From here on the run before cannot renew any more; it may have done so a moment ago.
            self._claimed = clock()
        elif self._claimed is not None:
            store.renew_lease(mine)
        left = 0.0 if self._claimed is None else self._claimed + self._ttl - clock()
        for view in views:
            if view.lease.is_fence and not view.lease.is_lifted and view.lease.epoch == mine.epoch:
                # Put up when the scheduler had taken the run before for lost; the watcher lifts it in time.
                # Should the watcher be gone, the fence's age says as much.
                left = max(left, self._ttl - view.age)
        if left > 0:
            return left
        self.taken = clock()
        store.renew_lease(mine)
        return 0.0


def _is_in_the_way(lease: Lease, mine: Lease) -> bool:
    """Whether a lease leaves it open that an earlier run is still running.

    A fence speaks for the run that it was put up before, and for no later one: by then the run before it may not
    have stopped yet, and the run that it let begin may have done so.
    """
    if lease == mine or lease.has_ended or lease.epoch > mine.epoch:
        return False
    return not (lease.is_fence and lease.epoch == mine.epoch)


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
        self._takeover = Takeover(lease, config.ttl)

    def await_turn(self, store: Store, gone: Callable[[], bool]) -> bool:
        """Take the lease, and return once no other run of the job can still be running; False if *gone*.

        Raises:
            LeaseLost: a later run has it.
            StoreUnavailable: the store does not answer; call again.
        """
        told = False
        while left := self._takeover.step(store, boottime):
            if not told:
                told = True
                self._events.add(
                    "waits", f"the run before may still go on somewhere, for {left:.1f} s at most"
                )
            if gone():
                return False
            time.sleep(min(left, _POLL_SECONDS))
        self.extend(self._takeover.taken)
        return True

    def watch(self, guard: Guard) -> None:
        """Have *guard* stop the job from now on whenever the lease runs out."""
        self._guard = guard
        self._allow()
        threading.Thread(target=self._seek_witness, name="witness", daemon=True).start()

    def is_disowned(self) -> bool:
        """Whether the job stands still, and the scheduler says that this run of it is over.

        Its lease alone would not tell, where the run after it has come and gone meanwhile.
        """
        if self._ask is None or self._guard is None or self._stopped or not self._guard.frozen:
            return False
        try:
            return not is_this_run(self._ask(), self._lease.epoch, self._lease.node)
        except OutlastError:
            return False

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
