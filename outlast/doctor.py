"""What `outlast doctor` looks at: each finding says what is so, and if it should not be, how to mend it."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from criu_backend import Criu, CriuError, pycriu_version, self_test
from outlast.config import Config, read_config
from outlast.errors import ConfigError

_SHIM = Path("/usr/libexec/outlast/outlast-shim")
_HELPER = Path("/usr/libexec/outlast/outlast-capsule")
_COMMAND_SECONDS = 10
_LEAST_SPOOL = 1 << 30
_LEAST_LOGS = 64 << 20
_LOGS = Path("/var/log/outlast")
# struct timex of 64-bit Linux: its size, where its status stands, and the bit of that which says "not in step".
_TIMEX_BYTES, _TIMEX_STATUS, _STA_UNSYNC = 208, 40, 0x40


@dataclass(frozen=True)
class Finding:
    """One thing looked at. *verdict* is "ok", "warn" (it works, and could work better) or "FAIL"."""

    verdict: str
    what: str
    fact: str
    remedy: str = ""


def examine(path: Path) -> list[Finding]:
    """Look at all that this machine needs for its part: a node, a controller or a login node."""
    from outlast import doctor_store

    try:
        config = read_config(path)
    except ConfigError as error:
        return [Finding("FAIL", "configuration", str(error), error.hint or "")]
    findings = [Finding("ok", "configuration", f"{path}, cluster {config.cluster}")]
    has_daemon = shutil.which("slurmd") or shutil.which("slurmctld")
    readable = os.access(config.store.identity, os.R_OK) or not config.store.url.startswith("sftp:")
    # A login node needs no key; and a user who may not read it learns nothing from its absence.
    if readable or (os.geteuid() == 0 and has_daemon):
        findings += doctor_store.stores(config)
    else:
        fact = f"not looked at: {config.store.identity} cannot be read"
        findings.append(Finding("warn", "store", fact, "run 'outlast doctor' as root"))
    findings.append(_clock())
    if config.scheduler == "pbs":
        from outlast import doctor_pbs

        if doctor_pbs.settings().get("PBS_START_MOM") == "1":
            findings += _node(config)
        findings += doctor_pbs.examine(config)
        return findings
    if shutil.which("slurmd") or not shutil.which("slurmctld"):
        findings += _node(config)
    if scontrol := shutil.which("scontrol"):
        from outlast import doctor_slurm

        findings += doctor_slurm.examine(scontrol, config)
    return findings


def _node(config: Config) -> Iterator[Finding]:
    criu = Criu(config.checkpoint.criu)
    try:
        version = criu.version()
    except CriuError as error:
        yield Finding("FAIL", "criu", str(error), error.hint or "")
        return
    yield Finding("ok", "criu", f"version {version}")
    binding = pycriu_version()
    if binding == version:
        yield Finding("ok", "pycriu", f"version {binding}")
    else:
        yield Finding(
            "FAIL",
            "pycriu",
            f"version {binding}, but CRIU is {version}" if binding else "not installed",
            "install the one that comes with CRIU (Debian: python3-pycriu): images of another version are misread",
        )
    if os.geteuid() == 0:
        try:
            criu.check()
        except CriuError as error:
            yield Finding("FAIL", "kernel", str(error), "'criu check --all' says what the kernel lacks")
        else:
            yield Finding("ok", "kernel", f"{os.uname().release}: criu check is content")
            yield from _self_test(criu)
    if os.geteuid() == 0 and _runs_jobs():
        from outlast import doctor_store

        yield from doctor_store.keys(config)
        yield from doctor_store.own_directory(config)
    for program in (_SHIM, _HELPER):
        if os.access(program, os.X_OK):
            yield Finding("ok", program.name, str(program))
        else:
            yield Finding("FAIL", program.name, f"{program}: not there", "make install (docs/install.md)")
    remedy = "make room there, or set spool under [checkpoint]"
    yield _room(
        "spool", config.checkpoint.spool, _LEAST_SPOOL, "an image waits there until it is shipped", remedy
    )
    remedy = "make room there: a manager that cannot write its log goes on without"
    yield _room("logs", _LOGS, _LEAST_LOGS, "managers write there", remedy)


def _room(what: str, path: Path, least: int, why: str, remedy: str) -> Finding:
    place = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    fact = f"{free >> 20} MiB free at {place}; {why}"
    return Finding("ok", what, fact) if free >= least else Finding("warn", what, fact, remedy)


def _clock() -> Finding:
    """Ask the kernel whether something keeps its clock in step. Source: adjtimex(2)."""
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes = 0 changes nothing
    state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    unsynchronized = state < 0 or struct.unpack_from("@i", buffer, _TIMEX_STATUS)[0] & _STA_UNSYNC
    if not unsynchronized:
        return Finding("ok", "clock", "kept in step with others")
    fact = "nothing keeps it in step; munge refuses what differs by five minutes, and event logs mislead"
    return Finding("warn", "clock", fact, "run chrony, ntpd or systemd-timesyncd")


def _runs_jobs() -> bool:
    """Whether the scheduler, if there is one, has jobs run on this machine."""
    if shutil.which("scontrol") is None:
        return True
    host = socket.gethostname().split(".")[0]
    asked = ["scontrol", "show", "node", host]
    return subprocess.run(asked, capture_output=True, timeout=_COMMAND_SECONDS).returncode == 0


def _self_test(criu: Criu) -> Iterator[Finding]:
    """Dump, restore and compare a small process of our own, in every way that a job may be dumped."""
    result = self_test(criu)
    for trial in result.trials:
        if trial.problem is None:
            yield Finding("ok", f"dumps, {trial.mode}", "a process was dumped, restored and compared")
        else:
            verdict = "FAIL" if trial.mode == "plain" else "warn"
            yield Finding(
                verdict, f"dumps, {trial.mode}", trial.problem, "jobs are dumped in the next best way"
            )
