"""Bringing one checkpoint back to life: fetched whole first, or run at once with its pages to follow."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from criu_backend import Capsule, Criu, PageServer, write_eager_pages
from outlast.config import Config
from outlast.errors import StoreUnavailable
from outlast.manager._cpu import require
from outlast.manager._events import EventLog
from outlast.manager._files import passed_through
from outlast.manager._run import Run, keep_log
from outlast.manager._saving import sources
from outlast.manager._shim import Shim
from outlast.model import Checkpoint
from outlast.store import Store

log = logging.getLogger(__name__)

# Below this, to fetch everything first takes no longer than to start a pager.
_WORTH_POST_COPY = 32 << 20
_RETRY_SECONDS = 0.5
_POLL_SECONDS = 0.05


class Following:
    """The pages of a restored job that are still to come. The images and a store are held until then."""

    def __init__(self, server: PageServer, store: Store, images: Path) -> None:
        self.server = server
        self._store = store
        self._images = images
        self._begin = time.monotonic()

    def wait(self, capsule: Capsule) -> bool:
        """Wait until all pages are in, or the job has ended by itself; False if they will never be."""
        while not self.server.wait(_POLL_SECONDS):
            if not capsule.alive:
                # Its end and the pager's come at the same time.
                self.server.wait(1)
                break
        return self.server.complete or self.server.error is None

    @property
    def error(self) -> str:
        """Why the pages did not come."""
        return str(self.server.error)

    @property
    def facts(self) -> dict[str, Any]:
        """How many pages came after the restore, and in what time."""
        return {"pages": self.server.pages, "pages_s": round(time.monotonic() - self._begin, 3)}

    def close(self) -> None:
        """Let go of the store and the images."""
        self.server.close()
        self._store.close()
        shutil.rmtree(self._images, ignore_errors=True)


class Restorer:
    """Restores checkpoints of one job on this node."""

    def __init__(self, config: Config, criu: Criu, events: EventLog) -> None:
        self._config = config
        self._criu = criu
        self._events = events
        self.following: Following | None = None

    def restore(self, run: Run, shim: Shim, store: Store, checkpoint: Checkpoint, *, whole: bool) -> Capsule:
        """Have the job of *run* go on from *checkpoint* in the place of *shim*, its files set back to it.

        Args:
            store: where pages are still to follow afterwards, it is `following`'s, which closes it; a
                connection of its own would cost as much time as all else together.
            whole: fetch all of it before it runs, whatever the configuration says.

        Raises:
            OutlastError, CriuError, CapsuleError: it does not run; nothing is left of it.
        """
        name = checkpoint.id.name(run.job.job_id)
        require(checkpoint.meta.get("cpu", ()), name)
        images = run.directory / "spool" / f"restore-{checkpoint.id.epoch}.{checkpoint.id.seq}"
        shutil.rmtree(images, ignore_errors=True)
        begin = time.monotonic()
        with contextlib.ExitStack() as closing:
            closing.callback(shutil.rmtree, images, ignore_errors=True)
            closing.push(lambda kind, *_: keep_log(images / "restore.log", run, failed=kind is not None))
            following = None
            if not whole and self._follow(checkpoint):
                following = self._prepare(run, store, checkpoint, images)
                # The store stays the caller's until the job runs.
                closing.callback(following.server.close)
            else:
                store.fetch(run.job, checkpoint.id, images)
            fetched = time.monotonic()
            capsule = self._bring_back(run, shim, checkpoint, images, following)
            if following is not None:
                keep_log(images / "restore.log", run)
                closing.pop_all()
        self.following = following
        seconds = time.monotonic() - begin
        self._events.add(
            "restored",
            f"{name}, made on {checkpoint.meta['node']}, runs again after {seconds:.2f} s"
            + ("; its pages follow" if following else ""),
            checkpoint=name,
            fetch_s=round(fetched - begin, 3),
            restore_s=round(seconds - (fetched - begin), 3),
            post_copy=following is not None,
        )
        return capsule

    def _follow(self, checkpoint: Checkpoint) -> bool:
        how = self._config.restart.post_copy
        return how == "on" or (how == "auto" and checkpoint.image_bytes >= _WORTH_POST_COPY)

    def _prepare(self, run: Run, store: Store, checkpoint: Checkpoint, images: Path) -> Following:
        """Fetch what CRIU restores at once, and start to serve the rest."""
        stored = store.open(run.job, checkpoint.id)

        def read(space: int, vaddr: int, count: int) -> bytes:
            deadline = time.monotonic() + self._config.restart.pages_wait
            while True:
                try:
                    return stored.read(space, vaddr, count)
                except StoreUnavailable:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(_RETRY_SECONDS)

        stored.fetch_files(images)
        runs = {path: [tuple(map(int, row)) for row in rows] for path, rows in stored.memories.items()}
        write_eager_pages(images, runs, read)  # type: ignore[arg-type]
        server = PageServer(runs, read, self._criu.version())  # type: ignore[arg-type]
        return Following(server, store, images)

    def _bring_back(
        self, run: Run, shim: Shim, checkpoint: Checkpoint, images: Path, following: Following | None
    ) -> Capsule:
        meta = checkpoint.meta
        with sources(meta["files"], images, run) as files:
            shim.set_back(files, run.epoch - 1)
        if run.mom is not None:
            kept = [entry for entry in meta["files"] if "name" in entry]
            run.mom.put_back(kept, images, shim.stdio, run.uid)
        passed = passed_through(shim.stdio)
        inherit = [(entry["fd"], entry["name"]) for entry in meta["passed"]]
        capsule = self._criu.restore(
            shim.context,
            images,
            run.directory,
            uid=run.uid,
            dumped_by=meta["criu"],
            tcp=self._config.checkpoint.tcp,
            inherit=inherit,
            pages=None if following is None else following.server,
        )
        inherited = {fd for fd, _ in inherit}
        run.passed = [entry for entry in passed if entry["fd"] in inherited]
        return capsule
