"""Checkpoints of a running job: dump, ship, and once more, for as long as it runs."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from criu_backend import Capsule, CapsuleError, Criu, CriuError, DumpResult
from outlast.config import Config
from outlast.errors import CheckpointRefused, OutlastError, StoreRefused, StoreUnavailable
from outlast.manager._cpu import features
from outlast.manager._events import EventLog
from outlast.manager._findings import Findings
from outlast.manager._guard import is_frozen
from outlast.manager._interval import Pace, phase
from outlast.manager._launch import Launcher
from outlast.manager._modes import Modes
from outlast.manager._pace import beside, paced
from outlast.manager._run import Run, keep_log
from outlast.manager._saving import declared, make_durable, save
from outlast.manager._script import keep_script
from outlast.manager._turns import NodeTurns, StoreTurns
from outlast.model import Checkpoint, CheckpointId
from outlast.store import Shipped, Store, open_store

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 1.0
_LONGEST_RETRY_SECONDS = 30.0
_ENDING_SECONDS = 0.5
_LAST_UPLOAD_SECONDS = 600.0
_LOOK_SECONDS = 0.5
# How long whoever waits for a checkpoint waits for it: it is stored even if the link is slow.
_TAKE_SECONDS = 3600.0
_LONGEST_WAIT_SECONDS = 86400.0
# How much of an old checkpoint's time still counts at each newer one.
_FADING = 0.8


class Checkpointer:
    """Takes a job's checkpoints in a thread of its own, every interval and when asked.

    A checkpoint that fails, for whatever reason, is an event; the job runs on, and the next is tried in
    its turn.
    """

    def __init__(
        self,
        config: Config,
        run: Run,
        criu: Criu,
        launcher: Launcher,
        events: EventLog,
        say: Callable[[str], None],
    ) -> None:
        """Prepare; *say* writes a line to the job's standard error."""
        self._say = say
        self._config = config
        self._run = run
        self._criu = criu
        self._launcher = launcher
        self._events = events
        self._modes = Modes(config.checkpoint.mode, criu, events)
        self._pace = Pace(config.checkpoint, run, events)
        self._node_turns = NodeTurns(run.directory.parent.with_name("uploads"), config.checkpoint.uploads)
        self.store_turns = StoreTurns(run.job, run.node, run.uid, config.store.uploads)
        self._store_turn = functools.partial(self.store_turns.taken, self._hurry)
        self.findings = Findings(run, events, say)
        self._wake = threading.Condition()
        self._asked = 0
        self._done = 0
        self._answered = 0  # as many of those that asked have had their checkpoint, or its failure
        self._stopped = False
        self._urgent = False  # somebody waits for the checkpoint that is due
        self._began = 0.0  # when the newest checkpoint, or the job, did
        self._ended = False
        self._told = False
        self._not_shipped = ""
        self.newest: Checkpoint | None = None
        self.last_error: str | None = None
        self._thread = threading.Thread(target=self._loop, name="checkpoints", daemon=True)

    def start(self) -> None:
        """Begin; the first checkpoint is due in one interval, or with a long one in a part of it."""
        self._modes.prepare()
        self.findings.begin()
        self._thread.start()

    @property
    def seconds(self) -> float:
        """How long a checkpoint takes until it is stored: the longest of the last ones, of earlier runs too."""
        return self._run.seconds

    def ask(self) -> None:
        """Have a checkpoint taken as soon as the one under way, if any, is done."""
        with self._wake:
            self._asked += 1
            self._wake.notify_all()

    def take(self, seconds: float = _TAKE_SECONDS) -> Checkpoint:
        """Have a checkpoint taken that begins after this call, and return it when it is in the store.

        Raises OutlastError: it failed, the job ended, or it took longer than *seconds*.
        """
        with self._wake:
            self._asked += 1
            mine, before = self._asked, self._run.seq
            self._wake.notify_all()
            self._wake.wait_for(lambda: self._answered >= mine or self._stopped, seconds)
            if self._answered >= mine and self.newest is not None and self.newest.id.seq > before:
                return self.newest
        why = self.last_error or ("the job has ended" if self._ended else f"not done within {seconds:.0f} s")
        raise OutlastError(f"job {self._run.job.job_id}: no checkpoint: {why}")

    def set_interval(self, seconds: int) -> None:
        """Take checkpoints every *seconds* from now on, or with 0 only when asked."""
        self._events.add(
            "interval", f"every {seconds} s from now on" if seconds else "only when asked from now on"
        )
        with self._wake:
            self._run.auto = False
            self._run.interval = seconds
            self._run.save()
            self._began = time.monotonic()
            self._wake.notify_all()

    def finish(self) -> None:
        """The job has ended: stop when what is under way is done."""
        with self._wake:
            self._ended = True
            self._wake.notify_all()

    def join(self, seconds: float) -> bool:
        """Wait for the thread to have stopped, at most *seconds*; return whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        run = self._run
        self._began = time.monotonic() - phase(run.job, run.epoch, 0 if run.auto else run.interval)
        lock = os.open(self._run.directory / "criu.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            # CRIU inherits the lock, and so holds it even if this manager dies while it dumps.
            fcntl.flock(lock, fcntl.LOCK_EX)
            with open_store(
                self._config.store, node=self._run.node, told=self._shipped, turn=self._later
            ) as store:
                with contextlib.suppress(OutlastError):  # the next checkpoint is shipped all the same
                    store.resume(self._run.job, self._run.epoch)
                while self._pause():
                    if is_frozen(self._run.directory):
                        # What stands still would be restored standing still. Its time comes when it goes on.
                        self._fail_while_frozen()
                        continue
                    with self._turn(store):
                        self._began = time.monotonic()
                        before = self.newest
                        self._checkpoint(
                            store, lock, self._began + (self._run.interval or _LONGEST_WAIT_SECONDS)
                        )
                        took = time.monotonic() - self._began
                    self._run.seconds = max(took + store.shipping_seconds, self._run.seconds * _FADING)
                    if self.newest is not None and self.newest is not before:
                        self._pace.learn(store, self.newest.meta["pause_ms"] / 1000, took)
                    # A job whose checkpoints take longer than its interval must get on all the same.
                    self._began = max(self._began, time.monotonic() - self._run.interval / 2)
                    with self._wake:
                        self._answered = self._done
                        self._wake.notify_all()
                if self.newest is not None:
                    # What only this node has is worth nothing to a run elsewhere.
                    store.await_durable(self._run.job, self.newest.id, _LAST_UPLOAD_SECONDS)
        finally:
            os.close(lock)
            with self._wake:
                self._stopped = True
                self._wake.notify_all()

    @contextlib.contextmanager
    def _turn(self, store: Store) -> Iterator[None]:
        """Wait until others leave room to ship; what goes to this node's own directory has its turn after that."""
        at_store = contextlib.nullcontext() if store.ships_later else self._store_turn()
        with self._node_turns.taken(self._hurry), at_store:
            yield

    @contextlib.contextmanager
    def _later(self) -> Iterator[None]:
        """The turn of what goes to the store from this node's own directory."""
        with self._store_turn(), self._beside():
            yield

    def _beside(self) -> contextlib.AbstractContextManager[None]:
        """Work on processors that the job leaves alone, where it does."""
        capsule = self._run.capsule
        return beside(capsule.tasks() if capsule is not None else ())

    def _hurry(self, seconds: float) -> bool:
        """Wait for *seconds* unless somebody waits for a checkpoint or the job has ended; tell if that is so."""
        with self._wake:
            return self._wake.wait_for(
                lambda: self._urgent or self._ended or self._asked != self._done, seconds
            )

    def _fail_while_frozen(self) -> None:
        self.last_error = "the job stands still, since its lease could not be renewed"
        with self._wake:
            self._answered = self._done
            self._wake.notify_all()
            if not self._ended:
                self._wake.wait(_FIRST_RETRY_SECONDS)

    def _pause(self) -> bool:
        """Wait until the next checkpoint is due or asked for; return False when the job has ended."""
        with self._wake:
            while not self._ended and self._asked == self._done and (left := self._left()) > 0:
                self._wake.wait(left)
            self._urgent = self._asked != self._done
            self._done = self._asked
            return not self._ended

    def _left(self) -> float:
        """Return how many seconds are left until a checkpoint is due; an interval of 0 is never over."""
        interval = self._run.interval
        return self._began + interval - time.monotonic() if interval else _LONGEST_WAIT_SECONDS

    def _checkpoint(self, store: Store, lock: int, overtaken: float) -> None:
        self._run.seq += 1
        self._run.save()
        id_ = CheckpointId(self._run.epoch, self._run.seq)
        name = id_.name(self._run.job.job_id)
        images = self._run.directory / "spool" / f"{id_.epoch}.{id_.seq}"
        mode, reason = self._modes.choose()
        try:
            self.findings.before_dump()
            images.mkdir(mode=0o700, parents=True)
            files: list[dict[str, Any]] = []
            with self._dump(images, lock, files, mode) as result:
                make_durable(files, self._run.uid)
                meta = self._meta(result, files)
                begin = time.monotonic()
                with self._beside():
                    checkpoint = self._ship(store, id_, images, result, meta, overtaken)
        except (OutlastError, CriuError, CapsuleError, OSError) as error:
            # A job that ends while it is dumped is no failure of the dump; what ended it may have broken the
            # dump off first.
            if self._run.capsule is not None and not self._run.capsule.wait(_ENDING_SECONDS):
                self.last_error = str(error)
                if not isinstance(error, CheckpointRefused | StoreUnavailable | StoreRefused):
                    self._modes.failed(mode)
                hint = getattr(error, "hint", None)
                self._events.add("checkpoint-failed", f"{name}: {error}", checkpoint=name, hint=hint)
                self._complain(error, hint)
        else:
            self.newest = checkpoint
            self.last_error = None
            self._modes.succeeded(result, reason)
            self._events.add(
                "checkpoint",
                f"{name}: paused {meta['pause_ms']:.1f} ms ({result.mode}), {checkpoint.image_bytes} bytes, "
                f"{checkpoint.stored_bytes} shipped",
                checkpoint=name,
                pause_ms=meta["pause_ms"],
                mode=result.mode,
                reason=result.reason,
                image_bytes=checkpoint.image_bytes,
                stored_bytes=checkpoint.stored_bytes,
                ship_s=round(time.monotonic() - begin, 3),
            )
        finally:
            shutil.rmtree(images, ignore_errors=True)

    def _complain(self, error: Exception, hint: str | None) -> None:
        """Tell the job's owner, once, that there is no checkpoint, unless it is the store's passing fault."""
        if self.newest is None and not self._told and not isinstance(error, StoreUnavailable):
            self._told = True
            self._say(f"no checkpoint: {error}; the job runs on{'; ' + hint if hint else ''}")

    def _dump(self, images: Path, lock: int, files: list[dict[str, Any]], mode: str) -> DumpResult:
        """Dump the job in *mode*, and add to *files* what a restore has to set back."""
        run = self._run
        capsule = run.capsule
        assert capsule is not None  # noqa: S101 - there is no checkpointer without a job
        self._events.add("dump", f"checkpoint {run.epoch}.{run.seq} begins")
        try:
            with self.findings.dumping:
                return self._criu.dump(
                    capsule,
                    images,
                    lambda: files.__setitem__(slice(None), self._look(capsule, images)),
                    tcp=self._config.checkpoint.tcp,
                    external=[entry["external"] for entry in run.passed if "external" in entry],
                    lock_fd=lock,
                    mode=mode,
                    beside=self._beside,
                )
        finally:
            keep_log(images / "dump.log", run)
            (images / "dump.log").unlink(missing_ok=True)

    def _meta(self, result: DumpResult, files: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what the checkpoint's manifest tells of it."""
        run = self._run
        return {
            "node": run.node,
            "epoch": run.epoch,
            "seq": run.seq,
            "time": time.time(),
            "place": run.place,
            "seconds": round(run.seconds, 3),
            "interval": run.interval,
            "auto": run.auto,
            "uid": run.uid,
            "argv": run.argv,
            "pause_ms": round(result.pause * 1000, 3),
            "mode": result.mode,
            "criu": result.criu_version,
            "kernel": os.uname().release,
            "machine": os.uname().machine,
            "cpu": features(),
            "files": files,
            "passed": run.passed,
        }

    def _look(self, capsule: Capsule, images: Path) -> list[dict[str, Any]]:
        """Tell what a restore has to set back, while the job stands still; under PBS some go with it."""
        run, mom = self._run, self._run.mom
        keep_script(run.argv[0], images)
        kept = [] if mom is None else mom.keep(capsule.tasks(), images, run.uid)

        def elsewhere(path: str) -> bool:
            return mom is not None and mom.kept_here(path)

        files = save(capsule.tasks(), images, run.uid, self._config.checkpoint, elsewhere)
        have = {entry["path"] for entry in files}
        appended = [one for one in declared(run.workdir, run.globs, run.uid) if one.get("path") not in have]
        return files + appended + kept

    def _is_awaited(self) -> bool:
        """Whether somebody waits for the checkpoint under way, or the job for nothing but this."""
        return self._ended or self._answered < self._asked

    def _ship(
        self,
        store: Store,
        id_: CheckpointId,
        images: Path,
        result: DumpResult,
        meta: dict[str, Any],
        overtaken: float,
    ) -> Checkpoint:
        """Publish the checkpoint; while the store does not answer try again until the next one is due."""
        wait = _FIRST_RETRY_SECONDS
        told = False
        memories = paced(result.memories, self._config.checkpoint.cpu_share, hurry=self._is_awaited)
        while True:
            try:
                self._launcher.settle(self._run.job, store)
                checkpoint = store.publish(self._run.job, id_, images, meta, memories)
                break
            except StoreRefused:
                # Older checkpoints make room for this one; the newest stays until it is there.
                if not self._launcher.settled or not store.forget(self._run.job, 1):
                    raise
            except StoreUnavailable as error:
                if not told:
                    told = True
                    self._events.add("store-unreachable", f"checkpoint {id_.epoch}.{id_.seq} waits: {error}")
                with self._wake:
                    if not self._ended:
                        self._wake.wait(wait)
                    if self._ended or time.monotonic() > overtaken:
                        raise
                wait = min(2 * wait, _LONGEST_RETRY_SECONDS)
        try:
            store.forget(self._run.job, self._config.checkpoint.keep)
        except OutlastError as error:
            log.warning("old checkpoints stay for now: %s", error)
        if self._answered < self._done:
            self._await_durable(store, id_)
        return checkpoint

    def _await_durable(self, store: Store, id_: CheckpointId) -> None:
        """Whoever asked for a checkpoint means to go on from it, maybe elsewhere: so it must be in the store."""
        until = time.monotonic() + _TAKE_SECONDS
        while not store.await_durable(self._run.job, id_, _LOOK_SECONDS):
            if self._ended or time.monotonic() > until:
                raise StoreUnavailable(f"checkpoint {id_.epoch}.{id_.seq} is on this node only")

    def _shipped(self, one: Shipped) -> None:
        """A checkpoint has come from this node's tier to the store, or has not."""
        name = one.id.name(one.job.job_id)
        if one.error is None:
            self._events.add(
                "durable",
                f"{name}: in the store after {one.seconds:.1f} s",
                checkpoint=name,
                ship_s=round(one.seconds, 3),
            )
        elif (told := str(one.error)) != self._not_shipped:
            self._not_shipped = told
            self._events.add(
                "not-durable", f"{name}: on this node only: {told}", checkpoint=name, hint=one.error.hint
            )
