"""The watcher: sees jobs that were lost with their nodes, and sees to it that they run again elsewhere.

It touches no process and opens no image. It may be ended and started at any time.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from outlast import audit, control
from outlast.config import Config
from outlast.errors import ConfigError, OutlastError
from outlast.exposition import serve
from outlast.scheduler import Scheduler
from outlast.scheduler.pbs import PbsScheduler
from outlast.scheduler.slurm import SlurmScheduler
from outlast.store import open_store
from outlast.watcher.answers import Desk
from outlast.watcher.figures import Figures
from outlast.watcher.loop import Loop, Wake
from outlast.watcher.turns import Turn

log = logging.getLogger(__name__)

# Requests that show what there is, and the scheduler's own.
_LOOKS = frozenset({"status", "list", "show", "events", "interval", "ended"})


def run(config: Config, *, scheduler: Scheduler | None = None) -> None:
    """Watch the cluster until SIGTERM or SIGINT; must be called in the main thread.

    Faults of the store or the scheduler are logged once, and tried again in each cycle.

    Raises:
        ConfigError: the store's address or key, or the scheduler's commands, are not there.
    """
    scheduler = scheduler or (PbsScheduler() if config.scheduler == "pbs" else SlurmScheduler())
    wake = Wake()
    ending: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        ending.append(number)
        wake.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    path = config.watcher.socket
    try:
        with open_store(config.store) as store, open_store(config.store) as store_of_turn:
            turn = Turn(store_of_turn, config.cluster, config.watcher.takeover)
            over = threading.Event()
            pace = min(config.watcher.cycle, config.watcher.takeover / 6)
            keeping = threading.Thread(target=turn.keep, args=(over, pace, wake.set), daemon=True)
            keeping.start()
            loop = Loop(config, scheduler, store, may_act=turn.may_act)
            desk = Desk(config, scheduler, leases=lambda: loop.leases, wake=wake.set)
            path.parent.mkdir(parents=True, exist_ok=True)
            listener = control.listen(path)
            figures = Figures(loop)
            stop_serving = _serve_figures(config.watcher.metrics, figures)
            handle = audit.audited(desk.handle, _LOOKS)
            threading.Thread(target=control.serve, args=(listener, handle), daemon=True).start()
            log.info("watching cluster %s; requests at %s", config.cluster, path)
            try:
                _watch(loop, turn, wake, ending, config.watcher.cycle, figures)
            finally:
                stop_serving()
                over.set()
                keeping.join(config.store.timeout)
                with contextlib.suppress(OutlastError):
                    turn.give_up()
                path.unlink(missing_ok=True)
                listener.close()
                desk.close()
        log.info("ended by signal %s", ending[0] if ending else None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve_figures(address: str, figures: Figures) -> Callable[[], None]:
    if not address:
        return lambda: None
    try:
        return serve(address, figures.text)
    except OSError as error:
        hint = "watcher.metrics is an address of this machine, and a port that nothing else has"
        raise ConfigError(f"{address}: {error.strerror}", hint=hint) from None


def _watch(loop: Loop, turn: Turn, wake: Wake, ending: list[int], seconds: float, figures: Figures) -> None:
    woken = False
    fault = ""
    while not ending:
        began = time.monotonic()
        try:
            if turn.may_act():
                loop.cycle(look=woken)
                woken = False
            else:
                loop.stand_by()
        except OutlastError as error:
            # A fault lasts for many cycles: it is told when it begins, when it changes and when it ends.
            if str(error) != fault:
                log.warning("nothing can be decided: %s", error)
            fault = str(error)
        except Exception as error:
            if repr(error) != fault:
                log.exception("internal fault; nothing can be decided")
            fault = repr(error)
        else:
            if fault:
                log.info("store and scheduler answer again")
            fault = ""
        figures.count(time.monotonic() - began, faulty=bool(fault))
        # What this watcher was told while it stood by it looks after when it acts.
        woken |= wake.wait(began + seconds - time.monotonic())
