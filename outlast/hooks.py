"""What a scheduler's hooks ask for, each a bounded step: start a manager, tell it or the watcher an end."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from outlast import control
from outlast.config import Config, read_config
from outlast.errors import ConfigError, OutlastError, UsageError
from outlast.model import parse_interval

_RUNTIME = Path("/run/outlast/jobs")
_LOGS = Path("/var/log/outlast/jobs")
_SHIM = Path("/usr/libexec/outlast/outlast-shim")
_READY_SECONDS = 10.0
# MoM ends an action that takes longer than mom_priv/config says; this is only not to wait for ever.
_ACTION_SECONDS = 3600.0
_TELL_SECONDS = 2.0
# systemd gives a unit 90 s to stop, unless told otherwise (DefaultTimeoutStopSec).
_NODE_STOP_SECONDS = 80.0

# A manager that has lived for so long could start, whatever it died of.
_GOOD_LIFE_SECONDS = 60


def supervisor(good_life: int = _GOOD_LIFE_SECONDS, pause: float = 1.0) -> str:
    """Return the program for a shell that starts its arguments anew whenever they fail; its $0 is a file.

    It costs a shell. A command that dies for the fifth time in a row is given up, and the file, which has others
    wait for it, is removed; one that has lived for *good_life* seconds begins a new row. There are *pause*
    seconds between two starts.
    """
    return (
        'n=0; while t=$(date +%s); ! "$@"; do '
        f"[ $(($(date +%s) - t)) -lt {good_life} ] || n=0; n=$((n+1)); "
        '[ "$n" -lt 5 ] || { rm -f "$0"; exit 1; }; sleep 1; done'
    )


def start_manager(job_id: str, options: Sequence[str]) -> Path:
    """Start the manager of *job_id*, detached from everything of the caller's; return its directory.

    Until it answers there, the file `DIRECTORY.starting` tells the shim to wait for it.
    """
    directory = _RUNTIME / job_id
    command = [sys.executable, "-P", "-m", "outlast.cli", *options]
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
    }
    # Whatever this one's is: the shim, which is the job's owner's, must get at the manager's socket.
    umask = os.umask(0o022)
    try:
        _RUNTIME.mkdir(mode=0o755, parents=True, exist_ok=True)
        _LOGS.mkdir(mode=0o755, parents=True, exist_ok=True)
        starting = directory.with_name(job_id + ".starting")
        starting.touch()
        with (_LOGS / f"{job_id}.log").open("ab") as log:
            subprocess.Popen(
                ["/bin/sh", "-c", supervisor(), os.fspath(starting), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment,
                start_new_session=True,
            )
    finally:
        os.umask(umask)
    return directory


def _prolog(config: Path) -> None:
    """Start the manager of the job that Slurm is about to start on this node."""
    job_id, uid = _variable("SLURM_JOB_ID"), _variable("SLURM_JOB_UID")
    if os.environ.get("SLURM_JOB_NUM_NODES", "1") != "1" or "SLURM_HET_JOB_ID" in os.environ:
        return  # the plugin leaves these jobs alone, and tells them so
    read_config(config)
    start_manager(job_id, ["--config", str(config), "manager", "--job", job_id, "--uid", str(int(uid))])


def _epilog(_config: Path) -> None:
    """Tell the job's manager that Slurm has ended the job on this node."""
    path = _RUNTIME / _variable("SLURM_JOB_ID") / "manager.sock"
    if path.exists():
        control.call(path, {"op": "job-ended"}, timeout=_TELL_SECONDS)


def _ended(config: Path) -> None:
    """Tell the watcher that a job has ended, as EpilogSlurmctld was told."""
    try:
        path = read_config(config).watcher.socket
    except ConfigError:
        path = Config().watcher.socket
    names = ("JOB_ID", "JOB_EXIT_CODE", "JOB_EXIT_CODE2", "JOB_RESTART_COUNT", "JOB_NODELIST", "JOB_UID")
    facts = {name.lower(): os.environ[f"SLURM_{name}"] for name in names if f"SLURM_{name}" in os.environ}
    control.call(path, {"op": "ended", **facts}, timeout=_TELL_SECONDS)


def _node_stop(_config: Path) -> None:
    """Have all jobs of this node saved and queued for other nodes, since it is shut down; wait until they are."""
    deadline = time.monotonic() + _NODE_STOP_SECONDS
    told = []
    for path in sorted(_RUNTIME.glob("*/manager.sock")):
        if path.parent.is_symlink():  # each manager has one link, by its job's name
            with contextlib.suppress(OutlastError):
                control.call(path, {"op": "leave"}, timeout=_TELL_SECONDS)
                told.append(path)
    while any(path.exists() for path in told) and time.monotonic() < deadline:
        time.sleep(0.2)


def _pbs_launch(config: Path) -> None:
    """Start the manager of the job whose script MoM is about to start on this host."""
    job_id, uid = _variable("OUTLAST_JOB_ID"), _variable("OUTLAST_JOB_UID")
    read_config(config)
    (_RUNTIME / f"{job_id}.requeue").unlink(missing_ok=True)
    mom = {
        "id": _variable("OUTLAST_PBS_ID"),
        "spool": _variable("OUTLAST_SPOOL"),
        "keep": [path for path in _variable("OUTLAST_KEEP").split(":") if path],
        "attach": _variable("OUTLAST_ATTACH"),
        "ahead": int(_variable("OUTLAST_RUNS_AHEAD")),
    }
    options = ["--config", str(config), "manager", "--job", job_id, "--uid", str(int(uid))]
    start_manager(job_id, [*options, "--mom", json.dumps(mom)])


def _pbs_end(_config: Path) -> None:
    """Tell the job's manager that PBS has ended the job on this host."""
    path = _RUNTIME / _variable("OUTLAST_JOB_ID") / "manager.sock"
    if path.exists():
        control.call(path, {"op": "job-ended"}, timeout=_TELL_SECONDS)


def _pbs_checkpoint(_config: Path) -> None:
    """MoM's $action checkpoint: return when the checkpoint is in the store."""
    _ask_manager({"op": "checkpoint", "wait": True})


def _pbs_hold(_config: Path) -> None:
    """MoM's $action checkpoint_abort: return when the checkpoint is in the store, and this run over."""
    _ask_manager({"op": "hold"})


def _ask_manager(request: Mapping[str, object]) -> None:
    job_id = _variable("OUTLAST_JOB_ID")
    path = _RUNTIME / job_id / "manager.sock"
    if not path.exists():
        raise UsageError(f"job {job_id}: runs without checkpoints", hint="ask for them when it is submitted")
    control.call(path, request, timeout=_ACTION_SECONDS)


def _pbs_restart(_config: Path) -> None:
    """MoM's $action restart: MoM would have a held job go on here; have it queued instead, by the epilogue."""
    _RUNTIME.mkdir(mode=0o755, parents=True, exist_ok=True)
    (_RUNTIME / f"{_variable('OUTLAST_JOB_ID')}.requeue").write_text("held\n")


def _pbs_interval(config: Path) -> None:
    """Tell the watcher that a running job is to have another interval, as qalter -c asked."""
    text = _variable("OUTLAST_INTERVAL")
    seconds = 0 if text == "never" else parse_interval(text)
    request = {"op": "interval", "job": _variable("OUTLAST_JOB_ID"), "seconds": seconds}
    control.call(read_config(config).watcher.socket, request, timeout=_TELL_SECONDS)


def _pbs_startup(_config: Path) -> None:
    """Clear away what jobs that no longer have a manager on this host left in the runtime directory."""
    for path in _RUNTIME.glob("*.requeue"):
        path.unlink(missing_ok=True)
    for path in _RUNTIME.glob("*.starting"):
        if not _answers(path.with_suffix("") / "manager.sock"):
            path.unlink(missing_ok=True)


HOOKS: Mapping[str, Callable[[Path], None]] = {
    "prolog": _prolog,
    "epilog": _epilog,
    "ended": _ended,
    "node-stop": _node_stop,
    "pbs-launch": _pbs_launch,
    "pbs-end": _pbs_end,
    "pbs-checkpoint": _pbs_checkpoint,
    "pbs-hold": _pbs_hold,
    "pbs-restart": _pbs_restart,
    "pbs-interval": _pbs_interval,
    "pbs-startup": _pbs_startup,
}


def run_standalone(
    config: Path,
    store_url: str,
    name: str,
    interval: str,
    command: Sequence[str],
    *,
    first: bool,
    uid: int | None = None,
) -> None:
    """Start the manager of a job without a scheduler, and become the job's shim, as user *uid*. Does not return.

    Raises:
        UsageError: a job of that name is running.
        OutlastError: the manager did not come up.
    """
    path = _RUNTIME / name / "manager.sock"
    if _answers(path):
        raise UsageError(f"run: a job named {name} is running on this machine", hint="choose another --name")
    options = ["--config", str(config), "manager", "--store", store_url, "--job", name, "--standalone"]
    directory = start_manager(name, [*options, "--first"] if first else options)
    deadline = time.monotonic() + _READY_SECONDS
    while not (directory / "shim.sock").exists():
        if time.monotonic() > deadline:
            raise OutlastError("run: the manager did not start", hint=f"its log is {_LOGS / name}.log")
        time.sleep(0.02)
    if uid is not None and uid != os.geteuid():
        owner = pwd.getpwuid(uid)
        os.initgroups(owner.pw_name, owner.pw_gid)
        os.setgid(owner.pw_gid)
        os.setuid(uid)
    shim = [str(_SHIM), "--interval", interval, "--manager", str(directory), "--", *command]
    os.execv(shim[0], shim)  # noqa: S606


def _answers(path: Path) -> bool:
    try:
        control.call(path, {"op": "status"}, timeout=_TELL_SECONDS)
    except control.RemoteError:
        return True
    except OutlastError:
        return False
    return True


def _variable(name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        raise UsageError(f"${name} is not set", hint="this is started by the scheduler's hooks") from None
