"""Bringing one checkpoint back to life: fetched whole first, or run at once with its pages to follow."""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from criu_backend import Capsule, Criu, CriuError, Looked, write_eager_pages
from outlast.config import Config
from outlast.errors import OutlastError
from outlast.manager._cpu import require
from outlast.manager._events import EventLog
from outlast.manager._files import passed_through
from outlast.manager._pager import PROGRESS, Pager
from outlast.manager._run import Run, keep_log
from outlast.manager._saving import sources
from outlast.manager._shim import Shim
from outlast.model import Checkpoint, JobKey
from outlast.store import Store

log = logging.getLogger(__name__)

# Below this, to fetch everything first takes no longer than to start a pager.
_WORTH_POST_COPY = 32 << 20
_POLL_SECONDS = 0.05
# Of what CRIU restores at once, so much is fetched before it is known to be what the job goes on from.
_MOST_AHEAD = (64 << 20) // 4096  # pages


class Following:
    """The pages of a restored job that are still to come."""

    def __init__(self, pager: Pager) -> None:
        self._pager = pager

    def wait(self, capsule: Capsule) -> bool:
        """Wait until all pages are in, or the job has ended by itself; False if they will never be."""
        while not self._pager.wait(_POLL_SECONDS):
            if not capsule.alive:
                # Its end and the pager's come at the same time, unless that waits for the store.
                if not self._pager.wait(1):
                    return True
                break
        return self.complete or self._pager.result["error"] is None

    @property
    def complete(self) -> bool:
        """Whether all pages are in."""
        return bool(self._pager.result["complete"])

    @property
    def error(self) -> str:
        """Why the pages did not come."""
        return str(self._pager.result["error"])

    @property
    def facts(self) -> dict[str, Any]:
        """How many pages came after the restore, and in what time."""
        result = self._pager.result
        return {"pages": result["pages"], "pages_s": result.get("seconds")}


@dataclass(frozen=True)
class _Prepared:
    """What was fetched, and looked over, of a checkpoint before it was known to be what the job goes on from."""

    checkpoint: Checkpoint
    images: Path
    looked: Looked


class Restorer:
    """Restores checkpoints of one job on this node."""

    def __init__(self, config: Config, criu: Criu, events: EventLog, pager: Pager) -> None:
        self._config = config
        self._criu = criu
        self._events = events
        self._pager = pager
        self._prepared: _Prepared | None = None
        self.following: Following | None = None

    def prepare(self, job: JobKey, store: Store, checkpoint: Checkpoint, spool: Path) -> None:
        """Fetch of *checkpoint*, from which *job* is likely to go on soon, what CRIU restores at once.

        It is put below *spool*, that of the job's run. Whatever goes wrong goes wrong again, and is told, when the
        job is restored.
        """
        if not self._follow(checkpoint):
            return
        images = spool / _called(checkpoint, following=True)
        try:
            self._pager.prepare(job, checkpoint.id)
            _fetch_part(store, job, checkpoint, images, _MOST_AHEAD)
            looked = self._criu.look_over(images, int(checkpoint.meta["uid"]))
        except (OutlastError, CriuError, OSError) as error:
            log.debug("nothing is fetched ahead: %s", error)
            shutil.rmtree(images, ignore_errors=True)
        else:
            self._prepared = _Prepared(checkpoint, images, looked)

    def discard(self) -> None:
        """Remove what was prepared, and is of no use."""
        if self._prepared is not None:
            shutil.rmtree(self._prepared.images, ignore_errors=True)
            self._prepared = None

    def restore(self, run: Run, shim: Shim, store: Store, checkpoint: Checkpoint, *, whole: bool) -> Capsule:
        """Have the job of *run* go on from *checkpoint* in the place of *shim*, its files set back to it.

        Args:
            whole: fetch all of it before it runs, whatever the configuration says.

        Raises:
            OutlastError, CriuError, CapsuleError: it does not run; nothing is left of it.
        """
        name = checkpoint.id.name(run.job.job_id)
        require(checkpoint.meta.get("cpu", ()), name)
        follow = not whole and self._follow(checkpoint)
        images = run.directory / "spool" / _called(checkpoint, following=follow)
        # The very same checkpoint: what it is was read from the store once more meanwhile.
        prepared = self._prepared
        if prepared is not None and (prepared.checkpoint, prepared.images) == (checkpoint, images):
            self._prepared = None
        else:
            prepared = None
            self.discard()
            shutil.rmtree(images, ignore_errors=True)
        begin = time.monotonic()
        with contextlib.ExitStack() as closing:
            closing.callback(shutil.rmtree, images, ignore_errors=True)
            closing.push(lambda kind, *_: keep_log(images / "restore.log", run, failed=kind is not None))
            files = closing.enter_context(_SettingBack(run, shim, checkpoint))
            pages = None
            if follow:
                version, progress = self._criu.version(), run.directory / PROGRESS
                pages = self._pager.open(run.job, checkpoint.id, images, version, progress)
                closing.enter_context(pages)
                if prepared is None:
                    _fetch_part(store, run.job, checkpoint, images)
            else:
                store.fetch(run.job, checkpoint.id, images)
            fetched = time.monotonic()
            files.finish(images)
            capsule = self._bring_back(
                run, shim, checkpoint, images, pages, prepared.looked if prepared is not None else None
            )
            if follow:
                keep_log(images / "restore.log", run)
                closing.pop_all()  # the pager removes the images
        self.following = Following(self._pager) if follow else None
        run.pager = self._pager.pid if follow else None
        seconds = time.monotonic() - begin
        self._events.add(
            "restored",
            f"{name}, made on {checkpoint.meta['node']}, runs again after {seconds:.2f} s"
            + ("; its pages follow" if follow else ""),
            checkpoint=name,
            made=checkpoint.created,
            made_on=checkpoint.meta["node"],
            fetch_s=round(fetched - begin, 3),
            restore_s=round(seconds - (fetched - begin), 3),
            post_copy=follow,
            ahead=prepared is not None,
        )
        return capsule

    def _follow(self, checkpoint: Checkpoint) -> bool:
        how = self._config.restart.post_copy
        return how == "on" or (how == "auto" and checkpoint.image_bytes >= _WORTH_POST_COPY)

    def _bring_back(
        self,
        run: Run,
        shim: Shim,
        checkpoint: Checkpoint,
        images: Path,
        pages: socket.socket | None,
        looked: Looked | None,
    ) -> Capsule:
        meta = checkpoint.meta
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
            pages=pages,
            looked=looked,
        )
        inherited = {fd for fd, _ in inherit}
        run.passed = [entry for entry in passed if entry["fd"] in inherited]
        run.goes_on_from(checkpoint.id, meta)
        return capsule


def _called(checkpoint: Checkpoint, *, following: bool) -> str:
    kind = "following" if following else "whole"
    return f"restore-{checkpoint.id.epoch}.{checkpoint.id.seq}-{kind}"


def _fetch_part(
    store: Store, job: JobKey, checkpoint: Checkpoint, images: Path, most: int | None = None
) -> None:
    """Make the directory *images* of what CRIU restores at once. Raises OutlastError.

    Args:
        most: give up where that is more than so many pages.
    """
    stored = store.open(job, checkpoint.id)
    stored.fetch_files(images)
    runs = {path: [(int(a), int(b), int(c)) for a, b, c in rows] for path, rows in stored.memories.items()}

    total = 0

    def load(ranges: Sequence[tuple[int, int, int]]) -> None:
        nonlocal total
        total += sum(pages for _, _, pages in ranges)
        if most is not None and total > most:
            raise OutlastError(f"more than {most} pages are restored at once")
        stored.load(ranges)

    write_eager_pages(images, runs, stored.read, load)


class _SettingBack:
    """The job's files being set back by its shim, beside the fetching where they need nothing of it."""

    def __init__(self, run: Run, shim: Shim, checkpoint: Checkpoint) -> None:
        self._run = run
        self._shim = shim
        self._files = checkpoint.meta["files"]
        self._failure: OutlastError | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if not any("saved" in entry for entry in self._files):
            self._thread = threading.Thread(target=self._act, args=(None,), name="files")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.join()  # the shim answers one question after the other

    def finish(self, images: Path) -> None:
        """Return when all files are as at the checkpoint. Raises as `Shim.set_back` does."""
        if self._thread is None:
            self._act(images)
        else:
            self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _act(self, images: Path | None) -> None:
        try:
            with sources(self._files, images, self._run) as files:
                self._shim.set_back(files, self._run.epoch - 1)
        except OutlastError as error:
            self._failure = error
