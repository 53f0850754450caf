"""The launcher's web server: who may ask, what may be asked, and the page itself.

Whoever has the token acts as the user. It travels in a header that only the page's own scripts set, never in
a cookie: so no other site, and no other port of this machine, can have a browser send it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import importlib.resources
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aiohttp import web

from outlast.errors import OutlastError, UsageError
from outlast.launcher._actions import Actions
from outlast.launcher._board import Board, Watcher
from outlast.launcher._pbs import queue_of
from outlast.launcher._spec import SpecError, parse_spec
from outlast.launcher._stream import Stream
from outlast.scheduler import SchedulerUnavailable

log = logging.getLogger(__name__)

_LARGEST_REQUEST = 4 << 20
_TICKET_SECONDS = 60.0
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Site:
    """The page of one user, and what it can ask for."""

    def __init__(
        self,
        *,
        token: str,
        hosts: set[str],
        origins: set[str],
        watcher: Path,
        scheduler: str,
        facts: dict[str, Any],
    ) -> None:
        """Prepare.

        Args:
            token: who shows it acts as the user.
            hosts: what a request's Host header may say, in small letters.
            origins: what its Origin header may say.
            watcher: the watcher's socket.
            scheduler: "slurm" or "pbs".
            facts: what the page is told of user and cluster.
        """
        self.hosts = hosts
        self.origins = origins
        self._token = token.encode()
        self._facts = facts
        self._queue = queue_of(scheduler)
        self._watcher = Watcher(watcher)
        self._files = _static_files()
        self._tickets: dict[str, tuple[float, str]] = {}

    def app(self) -> web.Application:
        """Return the web application."""
        app = web.Application(middlewares=[self._guard], client_max_size=_LARGEST_REQUEST)
        app.cleanup_ctx.append(self._background)
        app.on_response_prepare.append(_harden)
        job = f"{{job:{self._queue.job_id}}}"
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/static/{name}", self._static),
                web.get("/download/{ticket}", self._download),
                web.get("/api/facts", self._tell_facts),
                web.get("/api/stream", self._stream),
                web.post("/api/preview", self._preview),
                web.post("/api/jobs", self._submit),
                web.post(f"/api/jobs/{job}/download", self._ticket),
                web.post(f"/api/jobs/{job}/{{action:[a-z]{{1,20}}}}", self._act),
            ]
        )
        return app

    async def _background(self, _: web.Application) -> AsyncIterator[None]:
        self._board = Board(self._queue, self._watcher)
        self._actions = Actions(self._board, self._queue, self._watcher)
        looking = asyncio.create_task(self._board.run())
        yield
        looking.cancel()
        await self._actions.close()
        with contextlib.suppress(asyncio.CancelledError):
            await looking

    # --- who may ask -------------------------------------------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turn away what does not come from the page itself, and tell errors as JSON."""
        # A name of somebody else's that leads to this address would otherwise be "the same origin".
        if request.host.lower() not in self.hosts:
            return _no(421, "this server is not known by that name", "open the address that it printed")
        origin = request.headers.get("Origin")
        if origin is not None and origin.lower() not in self.origins:
            return _no(403, "requests of other sites are not answered")
        # A link from elsewhere may open the page, and nothing else.
        opens = request.path == "/" and request.headers.get("Sec-Fetch-Mode") == "navigate"
        if request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none") and not opens:
            return _no(403, "requests of other sites are not answered")
        if request.path.startswith("/api/"):
            if not self._shows_token(request):
                return _no(
                    401, "the token is missing or wrong", "open the address that 'outlast launcher' printed"
                )
            if request.method == "POST" and request.content_type != "application/json":
                return _no(415, "only JSON is taken")
        try:
            return await handler(request)
        except SpecError as error:
            return web.json_response({"error": str(error), "fields": error.fields}, status=422)
        except SchedulerUnavailable as error:
            return _no(503, str(error), error.hint)
        except OutlastError as error:
            return _no(409, str(error), error.hint)
        except web.HTTPException as error:
            return _no(error.status, error.reason)
        except ConnectionError:
            raise
        except Exception:
            log.exception("%s %s", request.method, request.path)
            return _no(500, "internal fault", "the launcher's terminal shows more")

    def _shows_token(self, request: web.Request) -> bool:
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(token.encode(errors="replace"), self._token)

    # --- the page ----------------------------------------------------------------------------------------

    async def _page(self, _: web.Request) -> web.Response:
        return self._file("index.html")

    async def _static(self, request: web.Request) -> web.Response:
        return self._file(request.match_info["name"])

    def _file(self, name: str) -> web.Response:
        # Looked up among the files that there are; a path is never made of what was asked for.
        if name not in self._files:
            raise web.HTTPNotFound
        kind = _TYPES[Path(name).suffix]
        return web.Response(body=self._files[name], content_type=kind, charset="utf-8")

    async def _tell_facts(self, _: web.Request) -> web.Response:
        try:
            partitions = [one.__dict__ for one in await self._queue.partitions()]
        except OutlastError:
            partitions = []  # the field is then for free text
        return web.json_response({**self._facts, "partitions": partitions})

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        job_id = request.query.get("job") or None
        if job_id is not None and not re.fullmatch(self._queue.job_id, job_id):
            raise UsageError(f"{job_id[:40]!r}: not a job's id")
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}
        )
        await response.prepare(request)
        stream = Stream(self._board, self._watcher, request.query.get("since", ""), job_id)
        with contextlib.suppress(ConnectionError):
            async with contextlib.aclosing(stream.messages()) as messages:
                async for message in messages:
                    await response.write(message)
        return response

    # --- what can be asked for ---------------------------------------------------------------------------

    async def _preview(self, request: web.Request) -> web.Response:
        form = await _form(request)
        try:
            return web.json_response({"script": self._queue.script(parse_spec(form)), "fields": {}})
        except SpecError as error:
            # Somebody is still typing: no fault of anybody's.
            return web.json_response({"script": None, "fields": error.fields})

    async def _submit(self, request: web.Request) -> web.Response:
        script = self._queue.script(parse_spec(await _form(request)))
        job_id = await self._queue.submit(script)
        await self._board.refresh()
        if self._board.job(job_id):
            self._board.note(job_id, "submitted", "by this launcher")
        return web.json_response({"job": job_id}, status=201)

    async def _act(self, request: web.Request) -> web.Response:
        form = await _form(request)
        said = await self._actions.act(request.match_info["action"], request.match_info["job"], form)
        return web.json_response({"said": said})

    async def _ticket(self, request: web.Request) -> web.Response:
        """Give out the address of one download: the browser itself fetches it, and shows no token there."""
        which = (await _form(request)).get("stream")
        job = self._board.job(request.match_info["job"])
        if job is None or which not in ("out", "err"):
            raise UsageError("no such output")
        now = time.monotonic()
        self._tickets = {name: one for name, one in self._tickets.items() if one[0] > now}
        ticket = secrets.token_urlsafe(24)
        self._tickets[ticket] = (now + _TICKET_SECONDS, job.output if which == "out" else job.errors)
        return web.json_response({"path": f"download/{ticket}"})

    async def _download(self, request: web.Request) -> web.StreamResponse:
        until, path = self._tickets.pop(request.match_info["ticket"], (0.0, ""))
        if time.monotonic() > until:
            raise web.HTTPGone(reason="this address is good for one download, and for a minute")
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            raise OutlastError(f"{path}: {error.strerror}") from None
        with os.fdopen(fd, "rb") as file:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise OutlastError(f"{path}: not a regular file")
            response = web.StreamResponse(
                headers={
                    "Content-Type": "application/octet-stream",
                    "Content-Disposition": f"attachment; filename*=UTF-8''{quote(Path(path).name, safe='')}",
                }
            )
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):
                left = info.st_size
                while left > 0 and (block := await asyncio.to_thread(file.read, min(left, 1 << 20))):
                    left -= len(block)
                    await response.write(block)
        return response


async def _harden(_: web.Request, response: web.StreamResponse) -> None:
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers["Server"] = "outlast"


async def _form(request: web.Request) -> dict[str, Any]:
    try:
        form = await request.json()
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        form = None
    if not isinstance(form, dict):
        raise UsageError("the request is no JSON object")
    return form


def _no(status: int, error: str, hint: str | None = None) -> web.Response:
    return web.json_response({"error": error, "hint": hint}, status=status)


def _static_files() -> dict[str, bytes]:
    directory = importlib.resources.files("outlast.launcher") / "static"
    return {file.name: file.read_bytes() for file in directory.iterdir() if Path(file.name).suffix in _TYPES}
