"""Leaving a node in good time: a last checkpoint, and the scheduler runs the job again, elsewhere or later."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from criu_backend import Capsule
from outlast.errors import OutlastError
from outlast.manager._checkpoints import Checkpointer
from outlast.manager._events import EventLog
from outlast.manager._holding import Holding, is_this_run
from outlast.model import JobState, SchedulerJob

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.3
# How long the scheduler may take to take the job away, and then to have it pending again.
_TAKEN_SECONDS = 30.0
_PENDING_SECONDS = 20.0
# What is added to the time that the last checkpoints took, for the next to be done before the end.
_LEAST_NOTICE = 10.0
_SPARE_SECONDS = 5.0
_FAR_AWAY = 300 * 86400.0
_LOOK_SECONDS = 60.0
# Before Slurm kills what it has asked to end, the signal must have reached the job.
_BEFORE_KILL = 1.5


class Mover(Protocol):
    """What leaving asks of a scheduler; see `outlast.scheduler.slurm.SlurmScheduler`."""

    def job(self, job_id: str) -> SchedulerJob | None:
        """Return the job as it stands now."""

    def requeue(self, handle: str) -> None:
        """Run the job again under its own id."""

    def requeue_hold(self, handle: str) -> None:
        """Queue the job again under its own id, and hold it."""

    def exclude(self, handles: list[str], nodes: list[str], *, at_once: bool = False) -> None:
        """Keep pending jobs off exactly *nodes*."""

    def require(self, handle: str, node: str) -> None:
        """Have a pending job start on *node* alone."""

    def kill_wait(self) -> float:
        """Return the seconds between the signal that asks a job to end and the one that ends it."""


class Leaving:
    """How one run ends before its time, to be gone on with elsewhere."""

    def __init__(
        self,
        run: tuple[str, int, str],
        capsule: Capsule,
        checkpointer: Checkpointer,
        holding: Holding,
        events: EventLog,
        scheduler: Mover,
    ) -> None:
        """*run* is the job's id, the run's epoch and this node's name."""
        self._job_id, self._epoch, self._node = run
        self._capsule = capsule
        self._checkpointer = checkpointer
        self._holding = holding
        self._events = events
        self._scheduler = scheduler
        self._busy = threading.Lock()
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(
        self,
        why: str,
        *,
        hold: bool = False,
        to: str | None = None,
        away: bool = False,
        unbind: bool = False,
        save: bool = True,
    ) -> None:
        """Leave, in a thread of its own.

        Args:
            why: for the job's log.
            hold: the job is not to run before it is released.
            to: it is to run on this node.
            away: it is to run on another node than this, at once.
            unbind: the scheduler is to start it anywhere, though it was sent to this very node.
            save: begin with a checkpoint.
        """

        def act() -> None:
            if self._leave(why, hold=hold, save=save) and away:
                self._send_on(to, unbind=unbind)

        self._in_thread(act)

    def before_end(self, end: float | None) -> None:
        """Leave before the run's time is over, at *end* (Unix time; None asks the scheduler)."""
        self._in_thread(lambda: self._await_end(end))

    def asked_to_end(self, forward: Callable[[], None]) -> None:
        """The scheduler asks the run to end: *forward* that to the job, after a checkpoint if it is to run again."""

        def act() -> None:
            try:
                self._checkpoint_before_kill()
            finally:
                forward()

        self._in_thread(act)

    def finish(self, seconds: float) -> None:
        """The run has ended: wait for what is still to be told to the scheduler, at most *seconds*."""
        self._over.set()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _in_thread(self, act: Callable[[], None]) -> None:
        thread = threading.Thread(target=act, name="leaving", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _leave(self, why: str, *, hold: bool = False, save: bool = True) -> bool:
        """Save the job, and have it queued again; return whether that was done."""
        if not self._busy.acquire(blocking=False):
            return False
        try:
            job = self._scheduler.job(self._job_id)
            if not is_this_run(job, self._epoch, self._node):
                raise OutlastError("the scheduler does not run the job here any more")
            assert job is not None  # noqa: S101 - is_this_run() says so
            if not job.requeueable:
                raise OutlastError(
                    "the job may not be requeued (--no-requeue)", hint="scontrol update JobId=... Requeue=1"
                )
            self._events.add("leaving", why)
            saved = f", with checkpoint {self._checkpointer.take().id.name(self._job_id)}" if save else ""
            # What it would do from now on would be done once more.
            self._holding.stop()
            self._events.add("left", f"the job is queued again{saved}")
            (self._scheduler.requeue_hold if hold else self._scheduler.requeue)(job.handle)
        except OutlastError as error:
            self._holding.go_on()
            self._events.add("not-left", f"{why}: {error}; the job runs on", hint=error.hint)
            self._busy.release()
            return False
        self._await(lambda now: not is_this_run(now, self._epoch, self._node), _TAKEN_SECONDS)
        self._capsule.kill()
        return True

    def _send_on(self, to: str | None, *, unbind: bool) -> None:
        """Have the pending job start elsewhere without the delay that a requeued job has."""

        def settled(now: SchedulerJob | None) -> bool:
            if now is None or (now.epoch > self._epoch and now.state is not JobState.PENDING):
                return True
            if now.state is not JobState.PENDING:
                return False
            if unbind and to is None and now.required == (self._node,):
                self._scheduler.require(now.handle, "")
            if to is not None and now.required != (to,):
                self._scheduler.require(now.handle, to)
            if to is None and self._node not in now.excluded:
                self._scheduler.exclude([now.handle], [*now.excluded, self._node], at_once=True)
            elif now.begin > time.time() + 1:
                self._scheduler.exclude([now.handle], [*now.excluded], at_once=True)
            # The delay comes when the scheduler has cleared up after the run, which the state tells.
            return "COMPLETING" not in now.raw_state and now.begin <= time.time() + 1

        if not self._await(settled, _PENDING_SECONDS):
            log.warning("the job starts when the scheduler thinks it right")

    def _await(self, condition: Callable[[SchedulerJob | None], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OutlastError):
                if condition(self._scheduler.job(self._job_id)):
                    return True
            time.sleep(_POLL_SECONDS)
        return False

    def _await_end(self, end: float | None) -> None:
        while not self._over.is_set():
            if end is None or (end - time.time() < _FAR_AWAY and end - time.time() <= self._notice()):
                # The limit may have been changed, so it is asked for before it is believed.
                with contextlib.suppress(OutlastError):
                    job = self._scheduler.job(self._job_id)
                    end = job.end if job is not None else None
                if end and end - time.time() <= self._notice():
                    self._leave("the time limit comes")
                    return
            left = _LOOK_SECONDS if end is None else max(0.5, end - time.time() - self._notice())
            self._over.wait(min(left, _LOOK_SECONDS))

    def _notice(self) -> float:
        """Return how long before its end the run must begin to leave."""
        return max(_LEAST_NOTICE, 2 * self._checkpointer.seconds + _SPARE_SECONDS)

    def _checkpoint_before_kill(self) -> None:
        if self._busy.locked():
            self._capsule.kill()
            return
        try:
            job = self._scheduler.job(self._job_id)
            if job is None or job.state not in (JobState.PENDING, JobState.LOST):
                return  # cancelled, at its limit, or not ended by the scheduler at all: the job's own affair
            seconds = self._scheduler.kill_wait() - _BEFORE_KILL
            if seconds > self._checkpointer.seconds:
                self._events.add("leaving", f"the scheduler queues the job again ({job.raw_state})")
                self._checkpointer.take(seconds)
        except OutlastError as error:
            self._events.add("not-saved", f"no last checkpoint: {error}")
