"""The live part of a page: one stream of server-sent events with the list of jobs and one job's insides.

Source of the form: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from outlast.errors import OutlastError
from outlast.launcher._board import Board, Watcher
from outlast.launcher._output import Follower

_EVENTS_SECONDS = 1.0
_OUTPUT_SECONDS = 0.3
_PING_SECONDS = 5.0
_BATCH = 1000  # events in one message
_WAITING = 64  # messages that a slow page may be behind


def encode(event: str, data: object) -> bytes:
    """Return one message of the stream."""
    return f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()


class Stream:
    """What one page is told from now on."""

    def __init__(self, board: Board, watcher: Watcher, mark: str, job_id: str | None) -> None:
        """*mark*: see `Board.since`; *job_id*: of the job that the page shows."""
        self._board = board
        self._watcher = watcher
        self._mark = mark
        self._job_id = job_id
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(_WAITING)
        self._restarts: int | None = None

    async def messages(self) -> AsyncGenerator[bytes, None]:
        """Yield messages, and a comment now and then by which a broken connection is noticed."""
        self._board.enter()
        work = [self._jobs()]
        if self._job_id is not None:
            work += [self._events(self._job_id), self._output(self._job_id)]
        tasks = [asyncio.create_task(one) for one in work]
        try:
            while True:
                try:
                    async with asyncio.timeout(_PING_SECONDS):
                        message = await self._queue.get()
                except TimeoutError:
                    message = b": still here\n\n"
                yield message
                for task in tasks:
                    if task.done():
                        task.result()
        finally:
            self._board.leave()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _tell(self, event: str, data: object) -> None:
        await self._queue.put(encode(event, data))

    async def _jobs(self) -> None:
        problems: object = None
        while True:
            news = self._board.since(self._mark)
            if news["rows"] or news["gone"] or news["all"] or news["problems"] != problems:
                self._mark, problems = news["mark"], news["problems"]
                await self._tell("jobs", news)
            await self._board.changed()

    async def _events(self, job_id: str) -> None:
        told: set[str] = set()
        complaint: str | None = None
        listed: object = ()
        while True:
            answer: list[dict[str, Any]] = []
            problem = None
            begin = time.monotonic()
            row = self._board.row(job_id) or {}
            if row.get("watched"):
                try:
                    answer = list((await self._watcher.ask(op="events", job=job_id))["events"])
                    newest = max(
                        (one["time"] for one in answer if one["event"] == "checkpoint"), default=None
                    )
                    if newest != listed:
                        stored = await self._watcher.ask(op="list", job=job_id)
                        listed = newest
                        await self._tell("checkpoints", {"job": job_id, **stored})
                except OutlastError as error:
                    problem = str(error)
            answer += self._board.notes(job_id)
            new = []
            for entry in answer:
                name = json.dumps(entry, sort_keys=True)
                if name not in told:
                    told.add(name)
                    new.append(entry)
            if problem != complaint:
                complaint = problem
                await self._tell("trouble", {"job": job_id, "text": problem})
            for start in range(0, len(new), _BATCH):
                await self._tell("events", {"job": job_id, "events": new[start : start + _BATCH]})
            # A store that is slow is not asked more often for that.
            await asyncio.sleep(max(_EVENTS_SECONDS, 3 * (time.monotonic() - begin)))

    async def _output(self, job_id: str) -> None:
        followers: dict[str, Follower] = {}
        told: object = None
        while True:
            job = self._board.job(job_id)
            if job is not None:
                files = {"out": job.output, "err": job.errors if job.errors != job.output else ""}
                if files != told:
                    told = files
                    followers = {which: Follower(path) for which, path in files.items() if path}
                    await self._tell("files", {"job": job_id, **files})
                if self._restarts is not None and job.restarts != self._restarts:
                    for follower in followers.values():
                        follower.recheck()
                self._restarts = job.restarts
            for which, follower in followers.items():
                for message in await asyncio.to_thread(follower.poll):
                    await self._tell("output", {"job": job_id, "stream": which, **message})
            await asyncio.sleep(_OUTPUT_SECONDS)
