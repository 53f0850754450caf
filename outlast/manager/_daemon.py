"""The manager's process: its sockets, its threads, its end.

Beside the main thread, which waits for the end, there are: one that answers the control socket, one that
takes the shim's hello and launches the job, one that renews the lease and looks into the mailbox, one that
waits for the capsule's end, and the checkpointer's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from criu_backend import Capsule, CapsuleError, Criu, CriuError
from outlast import audit, control
from outlast.config import Config, StoreConfig
from outlast.control import Peer
from outlast.errors import ConfigError, LeaseLost, OutlastError, UsageError
from outlast.manager._calls import Calls
from outlast.manager._checkpoints import Checkpointer
from outlast.manager._cpu import UnfitNode
from outlast.manager._events import EventLog
from outlast.manager._findings import as_dictionary
from outlast.manager._guard import Guard, boottime
from outlast.manager._holding import Ask, Holding
from outlast.manager._launch import Launcher, end_of, epoch_of, first_epoch_of, remember_choice
from outlast.manager._leaving import Leaving, Mover
from outlast.manager._mom import HELD, Mom, MomMover
from outlast.manager._pager import Pager, await_pages, read_progress
from outlast.manager._run import Run
from outlast.manager._shim import Shim, ShimGone
from outlast.model import JobKey, JobState, Lease, parse_pace
from outlast.scheduler import Witness
from outlast.scheduler.pbs import PbsScheduler
from outlast.scheduler.slurm import SlurmScheduler
from outlast.store import Store, open_store

log = logging.getLogger(__name__)

# Requests that have nothing to do with an image, or come from the job itself and become events.
_LOOKS = frozenset({"status", "explain", "ckpt", "job-ended"})

RUNTIME = Path("/run/outlast/jobs")

# How long a manager whose job has ended waits for the scheduler to say so too.
_GRACE_SECONDS = 30.0
# How long the upload of a failed job's last checkpoint may go on after it.
_LAST_UPLOAD_SECONDS = 600.0
# How long a restart waits for the last upload of the run before it, on the same node.
_PREDECESSOR_SECONDS = 120.0
_POLL_SECONDS = 0.5
# How long a job that is held lives on after its last checkpoint is in the store.
_HOLD_SECONDS = 1.5
# How much longer hooks of other people's may keep it: an execjob_end hook's alarm, unless set, is 30 s.
_END_HOOK_SECONDS = 120.0
_HANG_UP_SECONDS = 0.2


class Manager:
    """The manager of one job on this node."""

    def __init__(
        self,
        config: Config,
        job_id: str,
        *,
        uid: int | None,
        runtime: Path = RUNTIME,
        standalone: bool = False,
        first: bool = False,
        mom: str | None = None,
    ) -> None:
        """Prepare; `run` does the work.

        Args:
            runtime: below it, under the job's id, are the sockets and the spool, for as long as this runs.
            uid: the job's owner as the scheduler told root; None takes the first shim's.
            standalone: no scheduler counts the job's runs, and none tells that it has ended.
            first: with *standalone*, this is known to be the job's first run.
            mom: under PBS, what `Mom.parse` reads.
        """
        self._config = config
        self._job = JobKey(config.cluster, job_id)
        self._link = runtime / job_id
        self._directory = self._link
        self._predecessor: Path | None = None
        self._uid = uid
        self._mom = None if mom is None else Mom.parse(mom, runtime / f"{job_id}.requeue")
        self._standalone = standalone
        self._first = first
        self._node = socket.gethostname().split(".")[0]
        self._criu = Criu(config.checkpoint.criu)
        self._events = EventLog(self._job, self._node)
        self._pager = Pager(config)
        self._launcher = Launcher(config, self._criu, self._events, self._pager)
        self._run: Run | None = None
        self._checkpointer: Checkpointer | None = None
        self._launching = threading.Lock()
        self._job_over = threading.Event()  # the scheduler says that the job has ended on this node
        self._finished = threading.Event()  # nothing is left to do for it
        self._leased = threading.Event()
        self._taken_over = threading.Event()  # the job has all its memory, and is checkpointed
        self._holding: Holding | None = None
        self._calls: Calls | None = None
        self._scheduler: Witness | None = None
        self._leaving: Leaving | None = None

    def run(self) -> None:
        """Serve the job until it has ended and all that belongs to it has been stored."""
        directory = self._settle_in()
        inherited = self._run  # not what a shim starts as soon as it can connect
        with (directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._calls = Calls(directory)
            shim_listener = control.listen(directory / "shim.sock")
            control_listener = control.listen(directory / "manager.sock")
            self._point_link_at(directory)
            if inherited is None:
                self._launcher.connect(self._job, directory / "spool")
            threading.Thread(target=self._serve_shims, args=(shim_listener,), daemon=True).start()
            handle = audit.audited(self._handle, _LOOKS)
            threading.Thread(target=control.serve, args=(control_listener, handle), daemon=True).start()
            heartbeat = threading.Thread(target=self._heartbeat, daemon=True)
            heartbeat.start()
            if inherited is not None:
                self._adopt(inherited)
            while not self._finished.wait(_POLL_SECONDS):
                if self._job_over.is_set() and self._run is None and not self._launching.locked():
                    break
            self._finished.set()
            heartbeat.join(self._config.store.timeout)
            with contextlib.suppress(OSError):
                if self._link.resolve() == directory:
                    self._link.unlink()
            shutil.rmtree(directory, ignore_errors=True)

    def _settle_in(self) -> Path:
        """Make this manager's directory, or take that of one that died and left the job running.

        The job's name is a symbolic link to the directory of its newest manager: that of an earlier run of
        the job on this node may still be shipping.
        """
        old = self._link.resolve()
        if old.is_dir() and old != self._link:
            with (old / "lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._predecessor = old / "lock"
                else:
                    run = Run.load(self._job, self._node, old)
                    if (
                        run is not None
                        and run.capsule is not None
                        and (run.capsule.alive or self._is_again())
                    ):
                        run.mom = self._mom
                        self._run = run
                        return old
                    shutil.rmtree(old, ignore_errors=True)
        directory = self._link.with_name(f"{self._link.name}.{os.getpid()}")
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o755, parents=True)
        (directory / "spool").mkdir(mode=0o700)
        return directory

    @property
    def _starting(self) -> Path:
        """What whoever starts a manager for a run leaves for the run's shim, to be waited for."""
        return self._link.with_name(self._link.name + ".starting")

    def _is_again(self) -> bool:
        """Whether this manager is started again in the place of one that died, and not for another run."""
        return not self._starting.exists()

    def _point_link_at(self, directory: Path) -> None:
        self._directory = directory
        fresh = self._link.with_name(f"{directory.name}.link")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(directory.name)
        fresh.replace(self._link)
        self._starting.unlink(missing_ok=True)

    def _await_predecessor(self, shim: Shim) -> None:
        """Wait for the manager of the run before this one, which may be shipping the newest checkpoint."""
        if self._predecessor is None or not self._predecessor.exists():
            return
        deadline = time.monotonic() + _PREDECESSOR_SECONDS
        with self._predecessor.open("w") as lock:
            while time.monotonic() < deadline and not shim.gone:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.1)
                else:
                    return

    # --- the job -----------------------------------------------------------------------------------------

    def _serve_shims(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve_shim, args=(connection,), daemon=True).start()

    def _serve_shim(self, connection: socket.socket) -> None:
        try:
            shim = Shim(connection)
        except OutlastError as error:
            log.warning("%s", error)
            return
        with contextlib.ExitStack() as closing, self._launching:
            closing.callback(shim.close)
            if self._run is not None or self._finished.is_set():
                shim.run_without("the job has its capsule already; this command")
                return
            try:
                self._launch(shim)
            except Exception as error:
                if self._run is not None and self._run.capsule is not None:
                    # The job runs. Whatever else went wrong, a second copy of it must not be started.
                    log.exception("the job runs, but not all that belongs to it could be set up")
                else:
                    self._not_launched(shim, error)
                    return
            shim.release()
            closing.pop_all()

    def _not_launched(self, shim: Shim, error: Exception) -> None:
        """Tell the shim what to do without a capsule."""
        match error:
            case ShimGone():
                self._events.add("cancelled", str(error))
            case UnfitNode() if self._go_elsewhere():
                self._events.add("unfit-node", f"{error}; the job is queued for another node")
            case UnfitNode() if self._mom is not None:
                # PBS cannot keep a queued job off one host; it is run again as often as after any fault.
                self._events.add("unfit-node", f"{error}; the job is queued again")
                self._mom.ask_for_rerun(str(error))
                shim.exit(error.exit_code, f"{error}; {error.hint}")
            case OutlastError():
                self._events.add("not-started", str(error))
                if self._mom is not None and error.exit_code in (os.EX_TEMPFAIL, os.EX_SOFTWARE):
                    self._mom.ask_for_rerun(str(error))
                shim.exit(error.exit_code, f"{error}; {error.hint}" if error.hint else str(error))
            case CapsuleError() | CriuError() | OSError():
                self._events.add("no-capsule", str(error))
                shim.run_without(f"no capsule: {error}")
            case _:
                log.error("launching the job failed", exc_info=error)
                self._events.add("no-capsule", f"internal fault: {error!r}")
                shim.run_without(f"internal fault: {error!r}")
        self._end(None)

    def _go_elsewhere(self) -> bool:
        """Have the scheduler queue the job again, for any node but this; return whether it does."""
        scheduler = self._scheduler
        if not isinstance(scheduler, SlurmScheduler):
            return False
        try:
            job = scheduler.job(self._job.job_id)
            if job is None or not job.requeueable:
                return False
            scheduler.requeue(job.handle)
        except OutlastError as error:
            log.warning("the job cannot be queued for another node: %s", error)
            return False
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OutlastError):
                now = scheduler.job(self._job.job_id)
                # Until the scheduler has cleared up after this run it changes nothing of the next.
                if now is None or (now.state is JobState.PENDING and "COMPLETING" not in now.raw_state):
                    if now is not None:
                        scheduler.exclude([now.handle], [*now.excluded, self._node], at_once=True)
                    return True
            time.sleep(_POLL_SECONDS)
        log.warning("the job is queued again, but not kept away from this node")
        return True

    def _launch(self, shim: Shim) -> None:
        if self._uid is not None and shim.peer.uid != self._uid:
            raise UsageError(f"the job is of user {self._uid}, not of user {shim.peer.uid}")
        chosen = parse_pace(shim.interval)
        # With `auto`, the first checkpoint comes soon, to learn what it costs.
        interval = chosen or round(self._config.checkpoint.auto_least)
        self._criu.version()
        epoch = epoch_of(shim.environment)
        if self._standalone and not self._first:
            with open_store(self._config.store) as store:
                epoch = first_epoch_of(store, self._job)
        self._await_predecessor(shim)
        self._events.epoch, self._events.uid = epoch, shim.peer.uid
        run = Run(self._job, epoch, shim.peer.uid, self._node, interval, shim.argv, self._directory)
        run.auto = chosen is None
        run.mom = self._mom
        run.shim_pid = shim.peer.pid
        run.workdir = os.readlink(f"/proc/{run.shim_pid}/cwd")  # noqa: PTH115
        globs = (self._config.checkpoint.append_globs, shim.environment.get("OUTLAST_APPEND", ""))
        run.globs = " ".join(globs).split()
        self._run = run
        self._take_turn(run, shim)
        self._leased.set()
        run.capsule = self._launcher.launch(run, shim)
        run.save()
        shim.started(ask=self._scheduler is not None and run.mom is None)
        self._guard(run)
        first = run.capsule
        self._launcher.await_pages(run, shim)
        self._pager.close()
        if run.capsule is not first:
            self._guard(run)  # each capsule has its own
        run.pager = None
        run.save()
        self._take_over(run, shim.say, end_of(shim.environment))
        threading.Thread(target=self._hear, args=(shim,), daemon=True).start()
        if run.mom is not None and run.mom.attach(next(run.capsule.tasks(), 0), run.uid):
            shim.attached()

    def _take_turn(self, run: Run, shim: Shim) -> None:
        """Return once no earlier run of the job can be running any more."""
        holding = self._holding = self._hold_lease(run)
        if run.epoch == 0:
            return
        store = self._launcher.store()
        if not self._launcher.when_store_answers(shim, lambda: holding.await_turn(store, lambda: shim.gone)):
            raise ShimGone("the job was ended while it waited for the run before it to have ended")

    def _hold_lease(self, run: Run) -> Holding:
        scheduler = self._scheduler = None if self._standalone else _witness(self._config, self._mom)
        ask: Ask | None = None if scheduler is None else lambda: scheduler.job(self._job.job_id)
        return Holding(self._config.lease, self._lease(run), self._events, ask)

    def _store_for_leases(self) -> StoreConfig:
        """The store, of which nobody waits for an answer for longer than a lease lasts."""
        store = self._config.store
        return dataclasses.replace(store, timeout=min(store.timeout, max(1.0, self._config.lease.ttl / 2)))

    def _guard(self, run: Run) -> None:
        # Without a scheduler nobody runs the job again elsewhere but a person, who can be asked to wait.
        if self._holding is not None and run.capsule is not None and not self._standalone:
            self._holding.watch(Guard(run.directory, run.capsule, run.shim_pid))

    def _hear(self, shim: Shim) -> None:
        """Decide on the signals that the shim tells of."""
        for number in shim.signals():
            if self._leaving is None:
                shim.forward(number)
            else:
                self._leaving.asked_to_end(lambda number=number: shim.forward(number))  # type: ignore[misc]

    def _take_over(
        self, run: Run, say: Callable[[str], None] = lambda _: None, end: float | None = None
    ) -> None:
        """Checkpoint the running job from now on, and see to its end."""
        self._checkpointer = Checkpointer(self._config, run, self._criu, self._launcher, self._events, say)
        self._checkpointer.start()
        mover = self._mover(run)
        if mover is not None and self._holding is not None and run.capsule is not None:
            self._leaving = Leaving(
                (self._job.job_id, run.epoch, self._node),
                run.capsule,
                self._checkpointer,
                self._holding,
                self._events,
                mover,
            )
            if self._config.restart.at_time_limit:
                self._leaving.before_end(end)
        self._taken_over.set()
        threading.Thread(target=self._await_end, args=(run,), daemon=True).start()

    def _mover(self, run: Run) -> Mover | None:
        """Return what has the scheduler run the job again, if there is such a thing."""
        if isinstance(self._scheduler, SlurmScheduler):
            return self._scheduler
        if self._scheduler is None or run.mom is None or run.capsule is None:
            return None
        return MomMover(run.mom, self._scheduler, run.capsule.kill)

    def _await_end(self, run: Run) -> None:
        assert run.capsule is not None  # noqa: S101
        while not run.capsule.wait(3600):
            pass
        status: int | None
        try:
            status = os.waitstatus_to_exitcode(int((run.directory / "exit").read_text()))
        except FileNotFoundError:
            # While its pages follow nothing ends a capsule but their failing, or somebody whom the scheduler knows.
            status = None if run.pager is None else -signal.SIGKILL
        self._end(status, asked=(run.directory / "asked-to-end").exists())

    def _end(self, status: int | None, *, asked: bool = False) -> None:
        """The job has ended: with code *status*, by signal -*status*, or (None) killed with its capsule."""
        checkpointer = self._checkpointer
        self._taken_over.set()  # nobody waits for it any more
        place = {} if self._run is None else self._run.progress()
        if status is None:
            self._events.add("killed", "the job was ended with its capsule", **place)
        else:
            how = f"by signal {-status}" if status < 0 else f"with exit code {status}"
            why = ", having been asked to" if asked else ""
            self._events.add("ended", f"the job ended {how}{why}", status=status, asked=asked, **place)
        if checkpointer is not None:
            checkpointer.finish()
            # The work is done, and its last checkpoint of no more use; a restart may follow another end.
            if status != 0 or asked:
                checkpointer.join(_LAST_UPLOAD_SECONDS)
        self._leased.clear()
        if self._holding is not None:
            self._holding.end()
        self._store_end(status, asked=asked)
        if not self._standalone:
            self._job_over.wait(_GRACE_SECONDS)
        if self._leaving is not None:
            self._leaving.finish(_GRACE_SECONDS)
        self._finished.set()

    def _store_end(self, status: int | None, *, asked: bool) -> None:
        run = self._run
        try:
            with open_store(self._config.store, node=self._node) as store:
                if run is not None:
                    if status is not None:
                        self._launcher.settle(self._job, store)
                        end = {"status": status, "asked": asked, "epoch": run.epoch, "time": time.time()}
                        store.put_record(self._job, "ended", end)
                    if status == 0:
                        store.forget(self._job, 1)
                        store.leave_node(self._job)
                    self._events.flush(store)
                    if status != 0 and not self._standalone and run.mom is None:
                        # The watcher is to look into how the run ended, which the events tell.
                        store.renew_lease(self._lease(run).ended())
                    store.drop_lease(self._lease(run))
                if self._checkpointer is not None:
                    self._checkpointer.store_turns.leave(store)
                self._events.flush(store)
        except OutlastError as error:
            log.warning("the job's end is not in the store: %s", error)

    # --- lease, mailbox, event log -----------------------------------------------------------------------

    def _lease(self, run: Run) -> Lease:
        return Lease(self._job, run.epoch, self._node, run.uid)

    def _heartbeat(self) -> None:
        """Renew the lease, do what the mailbox asks for, ship events: for as long as the job runs."""
        fault = ""
        with open_store(self._store_for_leases()) as store:
            while not self._finished.wait(self._config.lease.renew):
                if not self._leased.is_set() or self._run is None:
                    continue
                try:
                    self._beat(store, self._run)
                except LeaseLost as error:
                    self._fence(error)
                except OutlastError as error:
                    # A fault lasts for many beats: it is told when it begins and when it changes.
                    if str(error) != fault:
                        log.warning("no heartbeat: %s", error)
                    fault = str(error)
                else:
                    fault = ""

    def _beat(self, store: Store, run: Run) -> None:
        start = boottime()
        store.renew_lease(self._lease(run))
        if self._holding is not None:
            if self._holding.is_disowned():
                raise LeaseLost(f"the scheduler has run {run.epoch} of the job go on here no more")
            self._holding.extend(start)
        if self._checkpointer is not None:
            self._checkpointer.store_turns.step(store)
        if not self._launcher.settled or run.capsule is None:
            return
        # While the job's pages follow, requests stay where they are.
        for request in store.take_requests(self._job) if self._checkpointer is not None else ():
            if self._checkpointer is None:
                continue
            if request.get("op") == "checkpoint":
                self._events.add("asked", f"user {request.get('uid')} asked for a checkpoint")
                self._checkpointer.ask()
            elif request.get("op") in ("migrate", "hold") and self._leaving is not None:
                self._leave(store, self._leaving, request)
            elif request.get("op") == "restart" and self._leaving is not None:
                remember_choice(store, self._job, request, run.epoch + 1)
                self._leaving.start(f"user {request.get('uid')} had it restarted", save=False)
            elif request.get("op") == "leave" and self._leaving is not None:
                self._leaving.start(str(request.get("why")))
            elif request.get("op") == "interval":
                self._checkpointer.set_interval(int(request["seconds"]))
        self._events.flush(store)

    def _leave(self, store: Store, leaving: Leaving, request: Mapping[str, Any]) -> None:
        hold, to = request["op"] == "hold", request.get("to")
        bound = store.get_record(self._job, "bound") or {}
        if to is not None:
            store.put_record(self._job, "bound", {"node": to})
        leaving.start(
            f"user {request.get('uid')} asked for it",
            hold=hold,
            to=to,
            away=not hold and self._mom is None,
            unbind=bound.get("node") == self._node,
        )

    def _fence(self, error: LeaseLost) -> None:
        """End this copy of the job: another, of a later run, goes on elsewhere."""
        self._leased.clear()
        if self._holding is not None:
            self._holding.end()  # that its guard ends with it does not mean that it goes on
        self._events.add("fenced", f"this copy of the job is ended: {error}")
        if self._run is not None and self._run.capsule is not None:
            self._run.capsule.kill()

    # --- the control socket ------------------------------------------------------------------------------

    def _handle(self, peer: Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
        operation = request.get("op")
        owner = self._uid if self._uid is not None else self._run.uid if self._run is not None else 0
        if peer.uid not in (0, owner):
            raise UsageError(f"job {self._job.job_id}: no such job of yours")
        if operation == "status":
            return self._status()
        if operation == "checkpoint":
            self._require_running()
            self._events.add("asked", f"user {peer.uid} asked for a checkpoint")
            if request.get("wait"):
                return {"checkpoint": self._running().take().id.name(self._job.job_id)}
            # Not before the peer has hung up: it may be a process of the job, and CRIU dumps no connections.
            threading.Timer(_HANG_UP_SECONDS, lambda: self._running().ask()).start()
            return {}
        if operation == "ckpt":
            return self._ckpt(peer, probe=bool(request.get("probe")))
        if operation == "explain":
            found = self._checkpointer.findings.look() if self._checkpointer is not None else []
            return {"findings": [as_dictionary(one) for one in found]}
        if operation == "hold" and peer.uid == 0:
            return self._hold()
        if operation == "leave" and peer.uid == 0:
            if self._leaving is None:
                raise UsageError(f"job {self._job.job_id}: does not run here, or nobody can queue it again")
            self._leaving.start("the node is shut down", away=True)
            return {}
        if operation == "job-ended" and peer.uid == 0:
            self._job_over.set()
            if self._mom is not None and self._run is not None and self._run.capsule is not None:
                # Had MoM not known of the capsule, nobody would have ended it.
                self._run.capsule.kill()
            return {}
        raise UsageError(f"{operation!r}: no such request")

    def _ckpt(self, peer: Peer, *, probe: bool) -> Mapping[str, str]:
        """Have a checkpoint taken for a process of the job, which waits for it without a connection.

        With *probe* only tell it that it is one: one of a job recovered under another name looks for its manager.
        """
        run = self._require_running()
        if self._calls is None or run.capsule is None:
            raise UsageError(f"job {self._job.job_id} does not run on this node")
        if peer.pid not in run.capsule.tasks():
            raise UsageError(f"process {peer.pid} is not of job {self._job.job_id}")
        if probe:
            return {"job": self._job.job_id}
        return self._calls.accept(lambda: self._running().take().id.name(self._job.job_id))

    def _require_running(self) -> Run:
        """Return the run that has its job running here. Raises UsageError where there is none."""
        run = self._run
        if run is None or run.capsule is None or self._finished.is_set():
            raise UsageError(f"job {self._job.job_id} does not run on this node")
        return run

    def _running(self) -> Checkpointer:
        """Return who takes the checkpoints; of a job whose pages follow there are none until all are in."""
        self._taken_over.wait()
        if self._checkpointer is None:
            raise UsageError(f"job {self._job.job_id} does not run on this node")
        return self._checkpointer

    def _hold(self) -> Mapping[str, Any]:
        """Take a checkpoint, and end this run when it is in the store: the scheduler holds the job."""
        run = self._require_running()
        if self._mom is None or run.capsule is None:
            raise UsageError(f"job {self._job.job_id} does not run on this node")
        name = self._running().take().id.name(self._job.job_id)
        if self._holding is not None:
            self._holding.stop()  # what it would do from now on would be done once more
        self._events.add("held", f"the run ends with checkpoint {name}")
        self._mom.ask_for_rerun(HELD)
        # MoM goes on with a hold when its action has ended, and gets it wrong if the job is gone before it has.
        threading.Timer(_HOLD_SECONDS, self._end_held, (self._mom, run.capsule)).start()
        return {"checkpoint": name}

    @staticmethod
    def _end_held(mom: Mom, capsule: Capsule) -> None:
        mom.await_end_hooks(_END_HOOK_SECONDS)
        capsule.kill()

    def _status(self) -> dict[str, Any]:
        run, checkpointer = self._run, self._checkpointer
        newest = checkpointer.newest if checkpointer is not None else None
        return {
            "job_id": self._job.job_id,
            "node": self._node,
            "epoch": run.epoch if run is not None else None,
            "running": run is not None and run.capsule is not None and run.capsule.alive,
            "newest": newest.id.name(self._job.job_id) if newest is not None else None,
            "last_error": checkpointer.last_error if checkpointer is not None else None,
            "pages": read_progress(run.directory) if run is not None else None,
            "tally": self._events.tally(),
        }

    # --- a manager that died and was started again -------------------------------------------------------

    def _adopt(self, run: Run) -> None:
        """Take over the job of a manager that died; where it ended meanwhile, tell of that."""
        self._pager.close()
        self._events.epoch = run.epoch
        if run.capsule is not None and not run.capsule.alive:
            self._events.add("manager-restarted", "the job had ended when its manager was started again")
            threading.Thread(target=self._await_end, args=(run,), daemon=True).start()
            return
        self._events.add("manager-restarted", "the job's manager was started again, and takes over")
        with (run.directory / "criu.lock").open("a") as file:
            # A dump that the old manager began goes on without it, and must be over before the next.
            fcntl.flock(file, fcntl.LOCK_EX)
        for images in (run.directory / "spool").iterdir():
            if run.pager is None or not images.name.endswith("-following"):
                shutil.rmtree(images, ignore_errors=True)
        self._holding = self._hold_lease(run)
        self._leased.set()
        self._guard(run)
        threading.Thread(target=self._take_over_later, args=(run,), daemon=True).start()

    def _take_over_later(self, run: Run) -> None:
        """Take over when the pages have come that the old manager's page server still gives."""
        if run.pager is not None and run.capsule is not None:
            found = await_pages(run.pager, run.directory, run.capsule)
            if found.get("complete"):
                self._events.add(
                    "pages-arrived",
                    f"all memory is here: {found['pages']} pages followed",
                    pages=found["pages"],
                )
                run.pager = None
                run.save()
        self._take_over(run)


def _witness(config: Config, mom: Mom | None) -> Witness | None:
    """Return whom to ask of the job's run when the store does not answer, if there is anybody."""
    try:
        if config.scheduler == "pbs":
            return PbsScheduler(timeout=config.lease.ttl / 2, ahead=mom.ahead if mom is not None else 0)
        return SlurmScheduler(timeout=config.lease.ttl / 2)
    except ConfigError as error:
        log.warning("a store that does not answer will have the job stand still: %s", error)
        return None
