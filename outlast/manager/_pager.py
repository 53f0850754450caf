"""Gives a restored job the pages that follow, from a process of its own: they come though the manager may die.

The process is forked off before the manager has threads, so that it costs no start of another Python, and is
connected to the store before anybody waits for it. It ends with the manager, unless a job's pages follow.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import select
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from criu_backend import Capsule, PageServer, first_wanted
from outlast.config import Config
from outlast.errors import OutlastError, StoreUnavailable
from outlast.model import CheckpointId, JobKey
from outlast.store import Store, open_store, this_node

log = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_SECONDS = 0.5
_TELL_SECONDS = 0.1
_LONGEST = 65536
_FIRST_PAGES = 4096
_GONE = "the page server ended"
_PR_SET_NAME = 15
_NAME = "outlast-pager"
# In the directory of the job's manager: how many pages have come, for whoever takes over from it.
PROGRESS = "pages.json"


class Pager:
    """The manager's end of its page server's process."""

    def __init__(self, config: Config) -> None:
        """Fork it. Call this before there is a second thread."""
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            mine.close()
            try:
                _Server(config, its).serve()
            finally:
                os._exit(0)
        its.close()
        self._socket = mine
        self._number = 0  # of the newest checkpoint that was opened
        self._over: Mapping[str, Any] | None = None

    @property
    def pid(self) -> int:
        """The process's PID."""
        return self._pid

    def connect(self, job: JobKey) -> None:
        """Have it connect to the store, of which *job* will need something."""
        self._ask({"op": "connect", "job": [job.cluster, job.job_id]})

    def prepare(self, job: JobKey, id_: CheckpointId) -> None:
        """Have it read ahead what it needs to give the pages of a checkpoint that is likely to be opened."""
        self._ask({"op": "prepare", "job": [job.cluster, job.job_id], "id": [id_.epoch, id_.seq]})

    def open(
        self, job: JobKey, id_: CheckpointId, images: Path, criu_version: str, progress: Path
    ) -> socket.socket:
        """Have it give the pages of a checkpoint; return the end of the line that CRIU's daemon is to have.

        What is asked for before it can be given waits there. Closed unused, it calls all off. Should the pages not
        be had, `result` will say so.

        Args:
            images: what it removes when all pages have come.
            criu_version: of the CRIU that will ask, as it prints it.
            progress: the file that it tells in how far it is.
        """
        self._over = None
        self._number += 1
        request = {
            "op": "open",
            "number": self._number,
            "job": [job.cluster, job.job_id],
            "id": [id_.epoch, id_.seq],
            "images": os.fspath(images),
            "criu": criu_version,
            "progress": os.fspath(progress),
        }
        peer, link = socket.socketpair()
        with link:
            self._ask(request, link.fileno())
        return peer

    def wait(self, seconds: float) -> bool:
        """Wait at most *seconds* for the last page to be given, or a failure; return whether it is over."""
        if self._over is None:
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            if poll.poll(seconds * 1000):
                self._over = self._hear()
        return self._over is not None

    @property
    def result(self) -> Mapping[str, Any]:
        """What became of it: `complete`, `pages` (given), `error` (a text, or None)."""
        return self._over or {"complete": False, "pages": 0, "error": _GONE}

    def close(self) -> None:
        """Let it end, unless pages still follow."""
        self._socket.close()

        def reap() -> None:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)

        threading.Thread(target=reap, name="pager", daemon=True).start()

    def _ask(self, request: Mapping[str, Any], *fds: int) -> None:
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], fds)
        except OSError:
            log.warning("the page server has ended")  # as who has the other end of the line will see

    def _hear(self) -> dict[str, Any] | None:
        """Return what became of the newest checkpoint that was opened, or None where it tells of another."""
        try:
            data = self._socket.recv(_LONGEST)
        except OSError:
            data = b""
        if not data:
            return {"complete": False, "pages": 0, "error": _GONE}
        answer: dict[str, Any] = json.loads(data)
        return answer if answer.pop("number") == self._number else None


class _Ready:
    """A checkpoint of which pages can be given at once."""

    def __init__(self, store: Store, job: JobKey, id_: CheckpointId) -> None:
        """Raises as `Store.open` does."""
        self.job, self.id = job, id_
        self.stored = store.open(job, id_)
        self.runs = {
            path: [(int(a), int(b), int(c)) for a, b, c in rows]
            for path, rows in self.stored.memories.items()
        }

    def load(self) -> None:
        """Fetch what is asked for first."""
        self.stored.load(first_wanted((run for some in self.runs.values() for run in some), _FIRST_PAGES))


class _Server:
    """The process itself."""

    def __init__(self, config: Config, control: socket.socket) -> None:
        self._config = config
        self._control = control
        self._store: Store | None = None
        self._ready: _Ready | None = None

    def serve(self) -> None:
        """Do what the manager asks for until it hangs up."""
        ctypes.CDLL(None).prctl(_PR_SET_NAME, _NAME.encode(), 0, 0, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while True:
            data, fds, _, _ = socket.recv_fds(self._control, _LONGEST, 1)
            if not data:
                return
            request = json.loads(data)
            job = JobKey(*request["job"])
            try:
                if request["op"] == "connect":
                    self._connected().get_record(job, "start")
                elif request["op"] == "prepare":
                    self._made_ready(job, CheckpointId(*request["id"]))
                else:
                    self._follow(job, request, socket.socket(fileno=fds[0]))
            except OutlastError as error:
                log.debug("not now: %s", error)  # when it is needed it is tried again

    def _connected(self) -> Store:
        if self._store is None:
            self._store = open_store(self._config.store, node=this_node())
        return self._store

    def _follow(self, job: JobKey, request: Mapping[str, Any], link: socket.socket) -> None:
        """Give one checkpoint's pages at *link* until nobody asks for more."""
        begin, number = time.monotonic(), request["number"]
        progress, id_ = Path(request["progress"]), CheckpointId(*request["id"])
        progress.unlink(missing_ok=True)
        found: dict[str, Any] = {"complete": False, "pages": 0, "error": None}
        total = 0
        with link:
            try:
                ready = self._patiently(lambda: self._made_ready(job, id_), link)
                total = sum(pages for some in ready.runs.values() for _, _, pages in some)
                found |= self._serve_pages(ready, link, request["criu"], progress, total)
            except OutlastError as error:
                found["error"] = str(error)
        # What CRIU has opened stays; the manager may be gone, and nobody else would remove it.
        shutil.rmtree(request["images"], ignore_errors=True)
        found["seconds"] = round(time.monotonic() - begin, 3)
        self._note(progress, {"over": True, "total": total, **found})
        self._tell({"number": number, **found})

    def _serve_pages(
        self, ready: _Ready, link: socket.socket, criu_version: str, progress: Path, total: int
    ) -> dict[str, Any]:
        """Give pages at *link* until nobody asks for more; return what became of it."""

        def read(space: int, vaddr: int, count: int) -> bytes:
            return self._patiently(lambda: ready.stored.read(space, vaddr, count), link)

        self._note(progress, {"over": False, "pages": 0, "total": total})
        server = PageServer(ready.runs, read, criu_version, link)
        with contextlib.suppress(OutlastError):  # what cannot be had now is asked for again
            ready.load()
        told = 0
        while not server.wait(_TELL_SECONDS):
            if server.pages != told:
                told = server.pages
                self._note(progress, {"over": False, "pages": told, "total": total})
        error = None if server.error is None else str(server.error)
        return {"complete": server.complete, "pages": server.pages, "error": error}

    def _made_ready(self, job: JobKey, id_: CheckpointId) -> _Ready:
        if self._ready is None or (self._ready.job, self._ready.id) != (job, id_):
            self._ready = _Ready(self._connected(), job, id_)
        return self._ready

    def _patiently(self, act: Callable[[], T], link: socket.socket) -> T:
        """Call *act* until the store answers it, or somebody else can restore the job, or *link* has been closed."""
        deadline = time.monotonic() + self._config.restart.pages_wait
        while True:
            try:
                return act()
            except StoreUnavailable:
                # Without a manager nobody would restore the job again: it waits for the store.
                if (time.monotonic() > deadline and _is_heard(self._control)) or not _is_heard(link):
                    raise
                time.sleep(_RETRY_SECONDS)

    def _note(self, progress: Path, value: Mapping[str, Any]) -> None:
        part = progress.with_name(progress.name + ".new")
        try:
            part.write_text(json.dumps(value))
            part.replace(progress)
        except OSError as error:
            log.debug("%s: %s", progress, error)  # only for those who look on

    def _tell(self, message: Mapping[str, Any]) -> None:
        try:
            self._control.send(json.dumps(message).encode())
        except OSError:
            log.debug("the manager has ended meanwhile")


def _is_heard(link: socket.socket) -> bool:
    """Tell whether the other end of *link* is open."""
    poll = select.poll()
    poll.register(link, 0)
    return not poll.poll(0)


def read_progress(directory: Path) -> Mapping[str, Any] | None:
    """Return how far the pages have come of the job whose manager's directory this is; None: none follow.

    `pages` of `total` are there; when `over`, `complete` and `error` tell what became of it.
    """
    try:
        found: dict[str, Any] = json.loads((directory / PROGRESS).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found


def await_pages(pid: int, directory: Path, capsule: Capsule) -> Mapping[str, Any]:
    """Wait for the pages that process *pid*, which a manager before this left behind, gives to *capsule*.

    Returns what became of it, as `read_progress` does; without `complete` the capsule has ended or will.
    """
    found = read_progress(directory) or {}
    while capsule.alive and not found.get("over") and _is_pager(pid):
        time.sleep(_TELL_SECONDS)
        found = read_progress(directory) or {}
    return found


def _is_pager(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == _NAME
    except OSError:
        return False
