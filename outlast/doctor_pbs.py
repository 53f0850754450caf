"""What `outlast doctor` looks at where PBS is the scheduler: on its server, and on a host with a MoM."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from outlast import control
from outlast.config import Config
from outlast.doctor import Finding
from outlast.errors import OutlastError

_SECONDS = 10
_EVENTS = {"queuejob", "modifyjob", "execjob_launch", "execjob_epilogue", "execjob_end", "exechost_startup"}
_LONG_FAIL_REQUEUE = 120
_INSTALL = "/usr/libexec/outlast/pbs/install-pbs"


def settings() -> dict[str, str]:
    """Return what stands in pbs.conf; nothing where PBS is not installed."""
    path = Path(os.environ.get("PBS_CONF_FILE", "/etc/pbs.conf"))
    if not path.exists():
        return {}
    return dict(re.findall(r"^(\w+)=(.*?)\s*$", path.read_text(), re.M))


def examine(config: Config) -> Iterator[Finding]:
    """Look at PBS's side of this machine, as the user who asks may see it."""
    conf = settings()
    if not conf:
        yield Finding(
            "FAIL", "pbs", "/etc/pbs.conf: not there", "install PBS, or set scheduler in outlast.toml"
        )
        return
    if conf.get("PBS_START_SERVER") == "1":
        yield from _server(Path(conf.get("PBS_EXEC", "/opt/pbs"), "bin", "qmgr"))
        try:
            control.call(config.watcher.socket, {"op": "status"}, timeout=_SECONDS)
        except OutlastError as error:
            yield Finding("FAIL", "watcher", str(error), "start 'outlast watcher' here, as root")
        else:
            yield Finding("ok", "watcher", f"answers at {config.watcher.socket}")
    if conf.get("PBS_START_MOM") == "1":
        yield from _mom(Path(conf.get("PBS_HOME", "/var/spool/pbs"), "mom_priv", "config"))


def _server(qmgr: Path) -> Iterator[Finding]:
    hook = _ask(qmgr, "list hook outlast")
    events = re.search(r"event = ([\w,\s]+?)\n\s*\w+ =", hook)
    missing = _EVENTS - set(re.findall(r"\w+", events[1])) if events else _EVENTS
    if "enabled = true" in hook and not missing:
        yield Finding("ok", "hook", "outlast, enabled")
    else:
        fact = f"lacks {', '.join(sorted(missing))}" if events and missing else "not there, or not enabled"
        yield Finding("FAIL", "hook", f"outlast: {fact}", f"run {_INSTALL} as root on the server")
    match = re.search(r"node_fail_requeue = (-?\d+)", _ask(qmgr, "list server node_fail_requeue"))
    seconds = int(match[1]) if match else 310
    fact = f"node_fail_requeue is {seconds}: PBS queues the jobs of a host that is down so many seconds later"
    if seconds == 0:
        yield Finding("FAIL", "lost jobs", "node_fail_requeue is 0: never queued again", f"run {_INSTALL}")
    elif seconds > _LONG_FAIL_REQUEUE:
        yield Finding("warn", "lost jobs", fact, "qmgr -c 'set server node_fail_requeue = 30'")
    else:
        yield Finding("ok", "lost jobs", fact)


def _mom(path: Path) -> Iterator[Finding]:
    try:
        text = path.read_text()
    except OSError as error:
        yield Finding("warn", "mom", f"{path}: {error.strerror}", "run 'outlast doctor' as root")
        return
    for event in ("checkpoint", "checkpoint_abort", "restart"):
        line = re.search(rf"^\$action {event} .*/outlast/pbs/action {event} .*$", text, re.M)
        what = f"$action {event}"
        if line:
            yield Finding("ok", what, line[0])
        else:
            yield Finding("FAIL", what, f"{path}: not Outlast's", f"run {_INSTALL} as root on this host")


def _ask(qmgr: Path, words: str) -> str:
    try:
        return subprocess.run(
            [qmgr, "-c", words], capture_output=True, text=True, timeout=_SECONDS, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
