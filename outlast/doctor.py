"""What `outlast doctor` looks at: each finding says what is so, and if it should not be, how to mend it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from criu_backend import Criu, CriuError, pycriu_version, self_test
from outlast import control
from outlast.config import Config, read_config
from outlast.errors import ConfigError, OutlastError
from outlast.store import open_store, read_keyring

_SHIM = Path("/usr/libexec/outlast/outlast-shim")
_HELPER = Path("/usr/libexec/outlast/outlast-capsule")
_COMMAND_SECONDS = 10
# Below this, a requeue delay is not what a user waits for.
_SHORT_CRED_EXPIRE = 30
_SHORT_SLURMD_TIMEOUT = 60
_LEAST_SPOOL = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One thing looked at. *verdict* is "ok", "warn" (it works, and could work better) or "FAIL"."""

    verdict: str
    what: str
    fact: str
    remedy: str = ""


def examine(path: Path) -> list[Finding]:
    """Look at all that this machine needs for its part: a node, a controller or a login node."""
    try:
        config = read_config(path)
    except ConfigError as error:
        return [Finding("FAIL", "configuration", str(error), error.hint or "")]
    findings = [Finding("ok", "configuration", f"{path}, cluster {config.cluster}")]
    has_daemon = shutil.which("slurmd") or shutil.which("slurmctld")
    readable = os.access(config.store.identity, os.R_OK) or not config.store.url.startswith("sftp:")
    # A login node needs no key; and a user who may not read it learns nothing from its absence.
    if readable or (os.geteuid() == 0 and has_daemon):
        findings += _store(config)
    else:
        fact = f"not looked at: {config.store.identity} cannot be read"
        findings.append(Finding("warn", "store", fact, "run 'outlast doctor' as root"))
    if config.scheduler == "pbs":
        from outlast import doctor_pbs

        if doctor_pbs.settings().get("PBS_START_MOM") == "1":
            findings += _node(config)
        findings += doctor_pbs.examine(config)
        return findings
    if shutil.which("slurmd") or not shutil.which("slurmctld"):
        findings += _node(config)
    if scontrol := shutil.which("scontrol"):
        findings += _slurm(scontrol, config)
    return findings


def _store(config: Config) -> Iterator[Finding]:
    where = config.store.url
    key = config.store.identity
    if where.startswith("sftp:") and key.exists() and key.stat().st_mode & 0o077:
        yield Finding("FAIL", "store key", f"{key} can be read by others", f"chmod 600 {key}")
    try:
        with open_store(config.store) as store:
            leases = store.leases(config.cluster)
    except OutlastError as error:
        yield Finding("FAIL", "store", f"{where}: {error}", error.hint or "")
    else:
        yield Finding("ok", "store", f"{where} answers and can be written; {len(leases)} jobs hold a lease")


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
        yield _data_key(config)
    for program in (_SHIM, _HELPER):
        if os.access(program, os.X_OK):
            yield Finding("ok", program.name, str(program))
        else:
            yield Finding("FAIL", program.name, f"{program}: not there", "make install (docs/install.md)")
    spool = config.checkpoint.spool
    place = next(parent for parent in (spool, *spool.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    fact = f"{free >> 20} MiB free at {place}; an image waits there until it is shipped"
    remedy = "make room there, or set spool under [checkpoint]"
    yield Finding("ok", "spool", fact) if free >= _LEAST_SPOOL else Finding("warn", "spool", fact, remedy)


def _runs_jobs() -> bool:
    """Whether the scheduler, if there is one, has jobs run on this machine."""
    if shutil.which("scontrol") is None:
        return True
    host = socket.gethostname().split(".")[0]
    asked = ["scontrol", "show", "node", host]
    return subprocess.run(asked, capture_output=True, timeout=_COMMAND_SECONDS).returncode == 0


def _data_key(config: Config) -> Finding:
    try:
        keyring = read_keyring(config.store.key)
    except ConfigError as error:
        return Finding("FAIL", "data key", str(error), error.hint or "all nodes need the same key file")
    older = len(keyring.keys) - 1
    fact = f"{config.store.key}: {keyring.newest} encrypts" + (
        f", {older} older can be read" if older else ""
    )
    return Finding("ok", "data key", fact)


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


def _slurm(scontrol: str, config: Config) -> Iterator[Finding]:
    try:
        text = subprocess.run(
            [scontrol, "show", "config"], capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("FAIL", "slurm", f"scontrol show config: {error}", "is slurmctld up?")
        return
    settings = dict(re.findall(r"^(\w+(?:\[\d+\])?)\s*= (.*?)\s*$", text, re.M))
    yield Finding("ok", "slurm", settings.get("SLURM_VERSION", "version unknown"))
    for key, program in (
        ("Prolog", "prolog"),
        ("Epilog", "epilog"),
        ("EpilogSlurmctld", "epilog-slurmctld"),
    ):
        value = " ".join(text for name, text in settings.items() if re.fullmatch(rf"{key}(\[\d+\])?", name))
        if program in value and value != "(null)":
            yield Finding("ok", key, value)
        else:
            wanted = f"{key}=/usr/libexec/outlast/slurm/{program}"
            yield Finding(
                "FAIL",
                key,
                f"{value or '(null)'}: not Outlast's",
                f"slurm.conf: {wanted}, or call it from yours",
            )
    yield from _plugstack(settings)
    yield from _timing(settings)
    # Written as "ctl" or "ctl(198.18.0.1)"; slurmctld may be installed on hosts that are no controllers.
    controllers = {text.split("(")[0] for name, text in settings.items() if name.startswith("SlurmctldHost")}
    if {socket.gethostname(), socket.gethostname().split(".")[0]} & controllers:
        yield from _watcher(config)


def _plugstack(settings: dict[str, str]) -> Iterator[Finding]:
    named = settings.get("PlugStackConfig", "(null)")
    beside = Path(settings.get("SLURM_CONF", "/etc/slurm/slurm.conf")).with_name("plugstack.conf")
    main = beside if named == "(null)" else Path(named)
    included = main.parent / (main.name + ".d")
    texts = [path.read_text() for path in (main, *sorted(included.glob("*"))) if path.is_file()]
    line = re.search(r"^\s*(required|optional)\s+(\S*spank_outlast\.so)", "\n".join(texts), re.M)
    if line is None:
        yield Finding(
            "FAIL", "plugstack", f"{main}: names no spank_outlast.so", "add: optional spank_outlast.so"
        )
        return
    directories = [Path(place) for place in settings.get("PluginDir", "").split(":")]
    if not any((directory / line[2]).exists() for directory in directories):
        yield Finding(
            "FAIL",
            "plugin",
            f"{line[2]}: in none of {settings.get('PluginDir')}",
            "make -C plugins/slurm install",
        )
    elif line[1] == "required":
        yield Finding(
            "warn", "plugin", f"{line[2]} is required", "write optional: then a fault of it stops no job"
        )
    else:
        yield Finding("ok", "plugin", f"{line[2]}, optional")


def _timing(settings: dict[str, str]) -> Iterator[Finding]:
    """The settings that decide how soon a lost job runs again. Source: measured, docs/operate.md."""
    match = re.search(r"cred_expire=(\d+)", settings.get("AuthInfo", ""))
    expire = int(match[1]) if match else 120
    fact = f"cred_expire is {expire} s: a requeued job waits one second longer than that"
    yield (
        Finding("ok", "requeue delay", fact)
        if expire <= _SHORT_CRED_EXPIRE
        else Finding("warn", "requeue delay", fact, "slurm.conf: AuthInfo=cred_expire=5 makes it 6 s")
    )
    timeout = int(re.match(r"\d+", settings.get("SlurmdTimeout", "300"))[0])  # type: ignore[index]
    fact = f"SlurmdTimeout is {timeout} s"
    yield (
        Finding("ok", "dead nodes", fact)
        if timeout <= _SHORT_SLURMD_TIMEOUT
        else Finding("warn", "dead nodes", fact, "the watcher marks a dead node down sooner; keep it running")
    )
    if settings.get("JobRequeue", "1") == "0":
        yield Finding("warn", "JobRequeue", "0", "jobs with --checkpoint are made requeueable by the plugin")


def _watcher(config: Config) -> Iterator[Finding]:
    try:
        control.call(config.watcher.socket, {"op": "status"}, timeout=_COMMAND_SECONDS)
    except OutlastError as error:
        yield Finding("FAIL", "watcher", str(error), "start 'outlast watcher' here, as SlurmUser")
    else:
        yield Finding("ok", "watcher", f"answers at {config.watcher.socket}")
