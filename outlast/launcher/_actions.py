"""What a person can have done to one of his jobs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from outlast.errors import OutlastError, UsageError
from outlast.launcher._board import Board, Watcher
from outlast.launcher._pbs import Queue
from outlast.launcher._slurm import Job
from outlast.model import parse_checkpoint_name

_CHECKPOINT_SECONDS = 600.0
_TICK = 0.5
_LONGEST_NAME = 200


class Actions:
    """The actions; each does its work or begins it, and tells of it in the job's control messages."""

    def __init__(self, board: Board, queue: Queue, watcher: Watcher) -> None:
        self._board = board
        self._queue = queue
        self._watcher = watcher
        self._holding: dict[str, asyncio.Task[None]] = {}
        self._table: dict[str, Callable[[Job, Mapping[str, Any]], Awaitable[str]]] = {
            "checkpoint": self._checkpoint,
            "restart": self._restart,
            "migrate": self._migrate,
            "hold": self._hold,
            "release": self._release,
            "cancel": self._cancel,
        }

    async def act(self, name: str, job_id: str, form: Mapping[str, Any]) -> str:
        """Do the action *name*; return what was done, for the one who asked.

        *form*: for restart, `checkpoint`, its name (else the newest); for migrate, `to`, a node (else any).

        Raises:
            UsageError: there is no such action, no such job of the user's, or not in its state.
            OutlastError: the scheduler or the watcher said no.
        """
        # What the page shows may be some seconds old, and so what the user decided upon.
        await self._board.refresh()
        job = self._board.job(job_id)
        if job is None or name not in self._table:
            raise UsageError(
                f"job {job_id}: no such job of yours" if job is None else f"{name}: no such action"
            )
        said = await self._table[name](job, form)
        self._board.note(job_id, name, said)
        self._board.press()
        return said

    async def close(self) -> None:
        """Give up what waits for a checkpoint."""
        for task in self._holding.values():
            task.cancel()
        await asyncio.gather(*self._holding.values(), return_exceptions=True)

    async def _checkpoint(self, job: Job, _: Mapping[str, Any]) -> str:
        await self._watcher.ask(op="checkpoint", job=job.id)
        return "a checkpoint was asked for"

    async def _restart(self, job: Job, form: Mapping[str, Any]) -> str:
        name = _text(form, "checkpoint")
        # The watcher looks into the store for it; that it is this job's is to be seen here.
        if name is not None and parse_checkpoint_name(name)[0] != job.id:
            raise UsageError(f"{name}: not a checkpoint of job {job.id}")
        answer = await self._watcher.ask(op="restart", job=job.id, checkpoint=name)
        return f"the job goes on from {answer['checkpoint']}"

    async def _migrate(self, job: Job, form: Mapping[str, Any]) -> str:
        node = _text(form, "to")
        await self._watcher.ask(op="migrate", job=job.id, to=node)
        return f"the job is saved, and goes on {f'on {node}' if node else 'on another node'}"

    async def _release(self, job: Job, _: Mapping[str, Any]) -> str:
        await self._queue.release(job.handle)
        return "released: the job may start again"

    async def _cancel(self, job: Job, _: Mapping[str, Any]) -> str:
        if job.id in self._holding:
            self._holding[job.id].cancel()
        await self._queue.cancel(job.handle)
        return "cancelled"

    async def _hold(self, job: Job, _: Mapping[str, Any]) -> str:
        if job.kind == "pending":
            await self._queue.hold(job.handle)
            await self._board.refresh()
            job = self._board.job(job.id) or job
            # One that has started in this moment runs on, whatever "hold" says.
            if job.kind != "running":
                return "held: the job does not start until it is released"
        if job.kind != "running":
            raise UsageError(f"job {job.id}: is {job.state}; only a pending or running job can be held")
        if job.id in self._holding:
            raise UsageError(f"job {job.id}: is being held already; it waits for its checkpoint")
        # Asked for first, so that a job without checkpoints is refused before anything is begun.
        before = await self._newest(job.id)
        since = time.time()
        await self._watcher.ask(op="checkpoint", job=job.id)
        task = asyncio.create_task(self._hold_when_safe(job, before, since))
        self._holding[job.id] = task
        task.add_done_callback(lambda _: self._holding.pop(job.id, None))
        return "a checkpoint was asked for; the job gives its node back as soon as that is in the store"

    async def _hold_when_safe(self, job: Job, before: str | None, since: float) -> None:
        """Requeue and hold *job* once it has a checkpoint newer than *before*; leave it alone otherwise."""
        try:
            newest = await self._checkpoint_after(job, before, since)
            await self._queue.requeue_held(job.handle)
        except OutlastError as error:
            self._board.note(job.id, "not-held", f"the job runs on: {error}")
        else:
            self._board.note(job.id, "on-hold", f"the job will go on from {newest} when it is released")
            self._board.press()

    async def _checkpoint_after(self, job: Job, before: str | None, since: float) -> str:
        deadline = time.monotonic() + _CHECKPOINT_SECONDS
        while time.monotonic() < deadline:
            newest = await self._newest(job.id)
            if newest is not None and newest != before:
                return newest
            events = (await self._watcher.ask(op="events", job=job.id))["events"]
            failed = [one for one in events if one["event"] == "checkpoint-failed" and one["time"] >= since]
            if failed:
                raise OutlastError(f"there is no checkpoint: {failed[-1]['text']}")
            now = self._board.job(job.id)
            if now is None or now.kind != "running":
                raise OutlastError(f"it is {now.state if now else 'gone'}")
            await asyncio.sleep(_TICK)
        raise OutlastError(f"there was no checkpoint within {_CHECKPOINT_SECONDS:.0f} s")

    async def _newest(self, job_id: str) -> str | None:
        checkpoints = (await self._watcher.ask(op="list", job=job_id))["checkpoints"]
        return str(checkpoints[0]["name"]) if checkpoints else None


def _text(form: Mapping[str, Any], key: str) -> str | None:
    """Return a field of a form that may be empty. Raises UsageError where it is no short text."""
    value = form.get(key)
    if value in (None, ""):
        return None
    if not isinstance(value, str) or len(value) > _LONGEST_NAME or not value.isprintable():
        raise UsageError(f"{key}: not a name")
    return value.strip() or None
