"""Starting a job, or bringing it back: what happens between a shim's hello and a running job."""

from __future__ import annotations

import contextlib
import logging
import pwd
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from criu_backend import Capsule, CapsuleError, Criu, CriuError, start_capsule, warm_up
from outlast.config import Config, StoreConfig
from outlast.errors import ConfigError, OutlastError, RestoreFailed, StoreUnavailable, UsageError
from outlast.manager import _unrestored
from outlast.manager._calls import VARIABLE
from outlast.manager._cpu import UnfitNode
from outlast.manager._events import EventLog
from outlast.manager._files import passed_through, standard_files
from outlast.manager._pager import Pager
from outlast.manager._restore import Restorer
from outlast.manager._run import Run
from outlast.manager._saving import declared
from outlast.manager._shim import Shim, ShimGone
from outlast.model import Checkpoint, CheckpointId, JobKey
from outlast.policy import parse_choice
from outlast.store import Store, open_store, this_node

log = logging.getLogger(__name__)

_RETRY_SECONDS = 2.0
_END_SECONDS = 10.0

# By which a job's owner chooses of which ends it is run again: docs/use.md.
RESTART_VARIABLE = "OUTLAST_RESTART"

T = TypeVar("T")


class Ahead:
    """A store that is being connected to before it is needed."""

    def __init__(self, config: StoreConfig, touch: Callable[[Store], object]) -> None:
        """Begin; *touch* is called with it, for which it must connect."""
        self._config = config
        self._touch = touch
        self._store: Store | None = None
        self._thread = threading.Thread(target=self._connect, name="connect", daemon=True)
        self._thread.start()

    def store(self) -> Store:
        """Return it, the same each time. What went wrong so far goes wrong again when it is used."""
        self._thread.join()
        if self._store is None:
            self._store = open_store(self._config, node=this_node())
        return self._store

    def _connect(self) -> None:
        with contextlib.suppress(OutlastError):
            self._store = open_store(self._config, node=this_node())
            self._touch(self._store)


class Launcher:
    """Decides whether a job is begun or brought back, and does it."""

    def __init__(self, config: Config, criu: Criu, events: EventLog, pager: Pager) -> None:
        self._config = config
        self._criu = criu
        self._events = events
        self._pager = pager
        self._restorer = Restorer(config, criu, events, pager)
        # The record of the job's first start, until the store has it: nothing else may be stored before.
        self._beginning: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._ahead: Ahead | None = None

    def connect(self, job: JobKey, spool: Path) -> None:
        """Begin to connect to the store, before anybody waits for what it has of *job*; some is fetched into *spool*.

        Where the job has run before, it is likely to go on from its newest checkpoint. When it may go on, it is
        looked into the store once more, and what was fetched of another checkpoint is thrown away.
        """

        def touch(store: Store) -> None:
            if store.get_record(job, "start") is None:
                return
            self._pager.connect(job)
            with contextlib.suppress(CriuError):
                self._criu.warm_up()
            for checkpoint in _wanted(store.checkpoints(job), store.get_record(job, "restart"))[:1]:
                self._restorer.prepare(job, store, checkpoint, spool)

        self._ahead = Ahead(self._config.store, touch)
        # Beside that, which mostly waits: each dump needs it, too.
        threading.Thread(target=warm_up, name="warm-up", daemon=True).start()

    @property
    def pages_follow(self) -> bool:
        """Whether the job that was brought back has not all its memory yet."""
        return self._restorer.following is not None

    def store(self) -> Store:
        """Return the store that `launch` will use, connected already if there was time enough."""
        if self._ahead is None:
            self._ahead = Ahead(self._config.store, lambda _: None)
        return self._ahead.store()

    def _open_store(self) -> Store:
        """Return that store, which is the caller's from now on."""
        store, self._ahead = self.store(), None
        return store

    def launch(self, run: Run, shim: Shim) -> Capsule:
        """Have the job of *run* run in a capsule in the place of *shim*.

        Raises:
            OutlastError: it does not run, and must not be begun again either; the text says why.
            CapsuleError: it does not run; nothing speaks against its running without a capsule.
            ShimGone: the scheduler has ended the job meanwhile.
        """
        if run.epoch == 0:
            return self._begin(run, shim)
        store = self._open_store()
        try:
            return self.when_store_answers(shim, lambda: self._go_on(run, shim, store))
        finally:
            self._restorer.discard()
            store.close()

    @property
    def settled(self) -> bool:
        """Whether the store knows of the job's start."""
        return self._beginning is None

    def settle(self, job: JobKey, store: Store) -> None:
        """Store the record of the job's start if the store has not got it yet.

        What another job of the same id left there, of a cluster that began to count again, is put aside
        first. Raises StoreUnavailable or StoreRefused.
        """
        with self._lock:
            if self._beginning is None:
                return
            if store.retire(job):
                self._events.add("retired", "an older job of the same id was put aside in the store")
            store.put_record(job, "start", self._beginning)
            self._beginning = None

    def _begin(self, run: Run, shim: Shim) -> Capsule:
        """Start the job from its beginning, as its first run."""
        self._beginning = {
            "uid": run.uid,
            "argv": run.argv,
            "interval": run.interval,
            "node": run.node,
            "epoch": run.epoch,
            "time": time.time(),
            "files": standard_files(shim.stdio) + self._declared(run),
            "store": self._store_of(run, shim),
        }
        self._settle_soon(run, shim)
        return self._start(run, shim)

    def _choice(self, shim: Shim) -> str:
        """Return the restart policy that the job's owner chose for it, or "" where it cannot be used."""
        text = shim.environment.get(RESTART_VARIABLE, "")
        try:
            parse_choice(text)
        except UsageError as error:
            self._events.add("restart-policy", f"${RESTART_VARIABLE}: {error}")
            shim.say(f"${RESTART_VARIABLE}: {error}; the site's policy holds")
            return ""
        return text

    def _store_of(self, run: Run, shim: Shim) -> str:
        """Return the name of the store that is for this job's checkpoints, by the rules of the site."""
        told = shim.environment
        try:
            user = pwd.getpwuid(run.uid).pw_name
        except KeyError:
            user = str(run.uid)
        return self._config.store.store_of(
            partition=told.get("SLURM_JOB_PARTITION") or told.get("PBS_QUEUE", ""),
            user=user,
            job=told.get("SLURM_JOB_NAME") or told.get("PBS_JOBNAME", ""),
        )

    def _declared(self, run: Run) -> list[dict[str, Any]]:
        """Return what `declared` does; that a job starts is worth more than what it says of its files."""
        try:
            return declared(run.workdir, run.globs, run.uid)
        except OutlastError as error:
            self._events.add("append-globs", str(error))
            return []

    def _settle_soon(self, run: Run, shim: Shim) -> None:
        """Wait a little for the store to know of the start; without it the job starts all the same.

        A job that was lost before its first checkpoint is begun again with its output set back to this
        start; so the store should know of it before the job's first line.
        """
        problem: list[OutlastError] = []

        def settle() -> None:
            try:
                with self._open_store() as store:
                    self.settle(run.job, store)
            except OutlastError as error:
                problem.append(error)

        thread = threading.Thread(target=settle, daemon=True)
        thread.start()
        thread.join(self._config.restart.start_wait)
        if not self.settled:
            why = str(problem[0]) if problem else "no answer so far"
            self._events.add("store-unreachable", f"the job starts before its store answers: {why}")
            what = "cannot be used" if problem and isinstance(problem[0], ConfigError) else "does not answer"
            shim.say(f"the checkpoint store {what} ({why}); the job starts, and it is tried again")

    def _start(self, run: Run, shim: Shim) -> Capsule:
        if run.mom is not None:
            run.mom.await_script(shim.stdio[0])
        run.passed = passed_through(shim.stdio)
        environment = {**shim.environment, VARIABLE: str(run.directory.with_name(run.job.job_id))}
        compatible = shim.environment.get("OUTLAST_FILTER") != "off"
        capsule = start_capsule(shim.context, run.argv, environment, run.directory, compat_filter=compatible)
        run.goes_on_from(None, {})
        # The log can be read on the store's machine, so it does not tell the arguments.
        facts = {"interval": run.interval, "restart": self._choice(shim)}
        self._events.add("started", Path(run.argv[0]).name, **facts)
        return capsule

    def when_store_answers(self, shim: Shim, act: Callable[[], T]) -> T:
        """Call *act* until the store answers it, for as long as the configuration allows."""
        deadline = time.monotonic() + self._config.restart.store_wait
        told = False
        while True:
            try:
                return act()
            except StoreUnavailable as error:
                if time.monotonic() > deadline:
                    raise
                if not told:
                    told = True
                    self._events.add("store-unreachable", f"the restart waits for the store: {error}")
                    shim.say(f"the checkpoint store does not answer ({error}); waiting for it to go on")
            for _ in range(int(_RETRY_SECONDS / 0.1)):
                if shim.gone:
                    raise ShimGone("the job was ended while it waited for its store")
                time.sleep(0.1)

    def await_pages(self, run: Run, shim: Shim) -> None:
        """Return when the restored job of *run* has all its memory, or has ended.

        Where the store cannot give the rest of it, the job is ended and restored once more, whole: its
        files are set back again, so nothing that it did meanwhile is left. Raises as `launch` does.
        """
        following = self._restorer.following
        if following is None or run.capsule is None:
            return
        if following.wait(run.capsule):
            self._restorer.following = None
            if following.complete:
                self._events.add(
                    "pages-arrived",
                    f"all memory is here: {following.facts['pages']} pages followed",
                    **following.facts,
                )
            return
        self._events.add(
            "pages-failed", f"the job's memory did not come: {following.error}; it is restored again"
        )
        run.capsule.kill()
        run.capsule.wait(_END_SECONDS)
        run.capsule = None
        with open_store(self._config.store, node=this_node()) as store:
            run.capsule = self.when_store_answers(shim, lambda: self._go_on(run, shim, store, whole=True))

    def _go_on(self, run: Run, shim: Shim, store: Store, *, whole: bool = False) -> Capsule:
        """Bring the job back from its newest good checkpoint, or begin it again where there is none."""
        # Without it a job that could go on elsewhere would look like one that has nothing to go on from.
        store.require_key()
        with store.foreseeing(run.job, "start", "ended", "restart", _unrestored.RECORD):
            for request in store.take_requests(run.job):
                # What else was asked for was asked of the run before.
                if request.get("op") == "restart":
                    remember_choice(store, run.job, request, run.epoch)
            ended = store.get_record(run.job, "ended")
            # One that ended well because it was asked to (requeued, preempted) has not done its work yet.
            if ended is not None and ended.get("status") == 0 and not ended.get("asked"):
                # It had done its work; whoever runs it again wants all of it again. Its output too: the node may
                # have died before the scheduler heard of the end.
                if (start := store.get_record(run.job, "start")) is not None:
                    self._set_back_to(start, run, shim)
                return self._begin(run, shim)
            store.require_home(run.job)
            chosen = store.get_record(run.job, "restart")
            doubtful = store.get_record(run.job, _unrestored.RECORD) is not None
            # What only this node has of a run before the last one is of a branch that others may have left.
            found = [
                one for one in store.checkpoints(run.job) if one.durable or one.id.epoch >= run.epoch - 1
            ]
        checkpoints = _wanted(found, chosen)
        unfit: UnfitNode | None = None
        for checkpoint in checkpoints:
            try:
                capsule = self._restorer.restore(run, shim, store, checkpoint, whole=whole)
            except (StoreUnavailable, ShimGone):
                raise
            except (OutlastError, CriuError, CapsuleError) as error:
                name = checkpoint.id.name(run.job.job_id)
                self._events.add("restore-failed", f"{name}: {error}", checkpoint=name)
                if isinstance(error, UnfitNode):
                    unfit = error
                    continue
                # Those of the run that goes on from an older one must not take its place in the store.
                _unrestored.keep(store, run.job, checkpoint.id)
                continue
            if doubtful:
                _unrestored.release(store, run.job, checkpoint.id)
            return capsule
        if unfit is not None:
            raise unfit
        start = store.get_record(run.job, "start")
        if checkpoints:
            newest = checkpoints[0].id.name(run.job.job_id)
            if self._config.restart.when_unrestorable == "hold" or start is None:
                raise RestoreFailed(
                    f"none of the {len(checkpoints)} checkpoints of job {run.job.job_id} could be restored",
                    hint=f"'outlast events {run.job.job_id}' says why; they are kept, the newest is {newest}",
                )
            why = (
                f"none of its {len(checkpoints)} checkpoints could be restored; the newest, {newest}, is kept"
            )
        else:
            why = "there was no checkpoint yet"
        if start is None:
            # The store answers and has never heard of the job: it did not get as far as its first line.
            return self._begin(run, shim)
        self._set_back_to(start, run, shim)
        capsule = self._start(run, shim)
        self._events.add("begun-again", f"{why}; the job began again from its start")
        return capsule

    def _set_back_to(self, start: Mapping[str, Any], run: Run, shim: Shim) -> None:
        """Have the job's output be what it was when the job started for the first time."""
        files = start["files"]
        if run.mom is not None:
            run.mom.set_back([entry for entry in files if "path" in entry], shim.stdio)
            files = [entry for entry in files if "walk" in entry or not run.mom.kept_here(entry["path"])]
        shim.set_back(files, run.epoch - 1)


def remember_choice(store: Store, job: JobKey, request: Mapping[str, Any], run: int) -> None:
    """Have run *run* of *job*, and those after it, go on from the checkpoint that somebody chose."""
    store.put_record(job, "restart", {"checkpoint": request["checkpoint"], "run": run})
    # One that had done all its work would be begun anew.
    store.put_record(job, "ended", {"status": None, "epoch": run - 1, "time": time.time()})


def _wanted(checkpoints: list[Checkpoint], chosen: Mapping[str, Any] | None) -> list[Checkpoint]:
    """Leave out what is newer than the checkpoint from which somebody had the job restarted, but not newer runs'."""
    if chosen is None:
        return checkpoints
    if chosen["checkpoint"] is None:  # it was to begin again
        return [one for one in checkpoints if one.id.epoch >= chosen["run"]]
    newest = CheckpointId(*chosen["checkpoint"])
    return [one for one in checkpoints if one.id <= newest or one.id.epoch >= chosen["run"]]


def epoch_of(environment: Mapping[str, str]) -> int:
    """Return which run of its job a shim with *environment* is: what the scheduler, or its hook, says."""
    for name in ("OUTLAST_EPOCH", "SLURM_RESTART_COUNT"):
        if name in environment:
            return int(environment[name])
    return 0


def end_of(environment: Mapping[str, str]) -> float | None:
    """Return when a shim with *environment* must have ended, in Unix time, as far as the scheduler says."""
    text = environment.get("SLURM_JOB_END_TIME") or environment.get("OUTLAST_END_TIME", "")
    return float(text) if text.isdecimal() else None


def first_epoch_of(store: Store, job: JobKey) -> int:
    """Return which run of *job* a run without a scheduler is: one after the last that the store knows."""
    start = store.get_record(job, "start")
    if start is None:
        return 0
    epochs = [int(start["epoch"]), *(checkpoint.id.epoch for checkpoint in store.checkpoints(job))]
    return max(epochs) + 1
