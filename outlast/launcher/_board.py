"""The user's jobs, as the scheduler and the watcher tell of them, for all open pages at once."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outlast import control
from outlast.errors import OutlastError
from outlast.launcher._pbs import Queue
from outlast.launcher._slurm import Job

log = logging.getLogger(__name__)

_SECONDS = 1.5  # between two looks, while somebody looks; more where a look takes long
_LONGEST = 15.0
_KEPT = 2000  # jobs that Slurm has forgotten and that are still shown
_NOTES = 200  # per job


class Watcher:
    """The cluster's watcher, asked as this process's user; who that is, it hears from the kernel."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def ask(self, **request: Any) -> Mapping[str, Any]:  # noqa: ANN401 - any JSON value
        """Ask and return the answer. Raises OutlastError: no, or no answer."""
        return await asyncio.to_thread(control.call, self._socket, request, timeout=30.0)


class Board:
    """What is known of the user's jobs; each change has a number, and pages ask for what came after one."""

    def __init__(self, queue: Queue, watcher: Watcher) -> None:
        self._queue = queue
        self._watcher = watcher
        self._instance = secrets.token_hex(4)
        self._version = 0
        self._rows: dict[str, dict[str, Any]] = {}
        self._versions: dict[str, int] = {}
        self._dropped: dict[str, int] = {}
        self._jobs: dict[str, Job] = {}
        self._kept: dict[str, dict[str, Any]] = {}
        self._notes: dict[str, list[dict[str, Any]]] = {}
        self._changed = asyncio.Event()
        self._pressed = asyncio.Event()
        self._viewers = 0
        self._looking = asyncio.Lock()
        self.problems: dict[str, str] = {}

    # --- for pages ---------------------------------------------------------------------------------------

    def job(self, job_id: str) -> Job | None:
        """Return the job of that id, if it is one of the user's."""
        return self._jobs.get(job_id)

    def row(self, job_id: str) -> Mapping[str, Any] | None:
        """Return what pages are told of a job."""
        return self._rows.get(job_id)

    def since(self, mark: str) -> dict[str, Any]:
        """Return the rows that have changed since *mark*, which an earlier answer held, or all of them."""
        instance, _, number = mark.partition(".")
        known = int(number) if instance == self._instance and number.isascii() and number.isdigit() else -1
        return {
            "all": known < 0,
            "rows": [row for job_id, row in self._rows.items() if self._versions[job_id] > known],
            "gone": [job_id for job_id, version in self._dropped.items() if version > known],
            "mark": f"{self._instance}.{self._version}",
            "problems": dict(self.problems),
        }

    def notes(self, job_id: str) -> list[dict[str, Any]]:
        """Return what this launcher has done to a job, as events."""
        return self._notes.get(job_id, [])

    def note(self, job_id: str, event: str, text: str) -> None:
        """Add to a job's control messages what this launcher does to it."""
        entry = {"time": time.time(), "node": "launcher", "event": event, "text": text}
        notes = self._notes.setdefault(job_id, [])
        notes.append(entry)
        del notes[:-_NOTES]
        self._announce()

    async def changed(self) -> None:
        """Return when something has changed after this call."""
        await self._changed.wait()

    def press(self) -> None:
        """Look again at once: something was done that changes what there is to see."""
        self._pressed.set()

    def enter(self) -> None:
        """Somebody looks from now on."""
        self._viewers += 1
        self.press()

    def leave(self) -> None:
        """He looks no longer."""
        self._viewers -= 1

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # --- looking -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look at jobs for as long as somebody looks at them here."""
        while True:
            begin = time.monotonic()
            if self._viewers:
                await self._look()
            took = time.monotonic() - begin
            # A large cluster's controller has other things to do than to answer this.
            self._pressed.clear()
            try:
                async with asyncio.timeout(max(_SECONDS, min(3 * took, _LONGEST)) if self._viewers else None):
                    await self._pressed.wait()
            except TimeoutError:
                continue

    async def refresh(self) -> None:
        """Return when what is known is not older than this call."""
        await self._look()

    async def _look(self) -> None:
        # One at a time: an older answer must not come after a newer one.
        async with self._looking:
            await self._look_now()

    async def _look_now(self) -> None:
        jobs, kept = await asyncio.gather(self._queue.jobs(), self._status(), return_exceptions=True)
        problems = {}
        for source, answer in (("scheduler", jobs), ("watcher", kept)):
            if isinstance(answer, OutlastError):
                problems[source] = str(answer) + (f" ({answer.hint})" if answer.hint else "")
            elif isinstance(answer, BaseException):
                raise answer
        if not isinstance(kept, BaseException):
            self._kept = kept
        if not isinstance(jobs, BaseException):
            self._take({job.id: job for job in jobs})
        if problems != self.problems:
            self.problems = problems
            self._announce()

    async def _status(self) -> dict[str, dict[str, Any]]:
        answer = await self._watcher.ask(op="status")
        return {row["job_id"]: row for row in answer["jobs"]}

    def _take(self, jobs: dict[str, Job]) -> None:
        forgotten = [job_id for job_id in self._rows if job_id not in jobs]
        for job_id in forgotten[: max(0, len(forgotten) - _KEPT)]:
            self._drop(job_id)
        before = self._version
        for job_id, job in jobs.items():
            self._put(job_id, job, known=True)
        for job_id in forgotten[-_KEPT:]:
            self._put(job_id, self._jobs[job_id], known=False)
        if self._version != before:
            self._announce()

    def _put(self, job_id: str, job: Job, *, known: bool) -> None:
        row = job.row() | {"known": known} | self._checkpoints(job_id)
        self._jobs[job_id] = job
        if row != self._rows.get(job_id):
            self._version += 1
            self._rows[job_id] = row
            self._versions[job_id] = self._version
            self._dropped.pop(job_id, None)

    def _checkpoints(self, job_id: str) -> dict[str, Any]:
        kept = self._kept.get(job_id)
        if kept is None:
            old = self._rows.get(job_id, {})
            return {key: old.get(key) for key in ("watched", "checkpoints", "newest")}
        newest = kept["newest"]
        return {"watched": True, "checkpoints": kept["checkpoints"], "newest": newest and dict(newest)}

    def _drop(self, job_id: str) -> None:
        self._version += 1
        for table in (self._rows, self._versions, self._jobs, self._notes):
            table.pop(job_id, None)
        self._dropped[job_id] = self._version
