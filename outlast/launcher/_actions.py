"""What a person can have done to one of his jobs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from outlast.errors import OutlastError, UsageError
from outlast.launcher._board import Board, Watcher
from outlast.launcher._slurm import Job, Slurm

_CHECKPOINT_SECONDS = 600.0
_TICK = 0.5


class Actions:
    """The actions; each does its work or begins it, and tells of it in the job's control messages."""

    def __init__(self, board: Board, slurm: Slurm, watcher: Watcher) -> None:
        self._board = board
        self._slurm = slurm
        self._watcher = watcher
        self._holding: dict[str, asyncio.Task[None]] = {}
        self._table: dict[str, Callable[[Job], Awaitable[str]]] = {
            "checkpoint": self._checkpoint,
            "hold": self._hold,
            "release": self._release,
            "cancel": self._cancel,
        }

    async def act(self, name: str, job_id: str) -> str:
        """Do the action *name*; return what was done, for the one who asked.

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
        said = await self._table[name](job)
        self._board.note(job_id, name, said)
        self._board.press()
        return said

    async def close(self) -> None:
        """Give up what waits for a checkpoint."""
        for task in self._holding.values():
            task.cancel()
        await asyncio.gather(*self._holding.values(), return_exceptions=True)

    async def _checkpoint(self, job: Job) -> str:
        await self._watcher.ask(op="checkpoint", job=job.id)
        return "a checkpoint was asked for"

    async def _release(self, job: Job) -> str:
        await self._slurm.release(job.handle)
        return "released: the job may start again"

    async def _cancel(self, job: Job) -> str:
        if job.id in self._holding:
            self._holding[job.id].cancel()
        await self._slurm.cancel(job.handle)
        return "cancelled"

    async def _hold(self, job: Job) -> str:
        if job.kind == "pending":
            await self._slurm.hold(job.handle)
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
            await self._slurm.requeue_held(job.handle)
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
