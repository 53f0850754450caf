"""What `outlast doctor` looks at where Slurm is the scheduler: slurm.conf, the plugin, the watcher."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from outlast import control
from outlast.config import Config
from outlast.doctor import Finding
from outlast.errors import OutlastError

_COMMAND_SECONDS = 10
# Below this, a requeue delay is not what a user waits for.
_SHORT_CRED_EXPIRE = 30
_SHORT_SLURMD_TIMEOUT = 60
# Below this Slurm was seen to set healthy nodes down: docs/operate.md.
_LEAST_SLURMD_TIMEOUT = 6
# A last checkpoint has that long, less 1.5 s.
_LEAST_KILL_WAIT = 10
_LEAST_REQUEUES = 100


def examine(scontrol: str, config: Config) -> Iterator[Finding]:
    """Look at Slurm's side of this machine: what *scontrol* says of slurm.conf, and files beside that."""
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
    if timeout < _LEAST_SLURMD_TIMEOUT:
        yield Finding("warn", "dead nodes", fact, "slurm.conf: SlurmdTimeout=6, or busy nodes are set down")
    elif timeout <= _SHORT_SLURMD_TIMEOUT:
        yield Finding("ok", "dead nodes", fact)
    else:
        yield Finding(
            "warn", "dead nodes", fact, "the watcher marks a dead node down sooner; keep it running"
        )
    wait = int(re.match(r"\d+", settings.get("KillWait", "30"))[0])  # type: ignore[index]
    fact = f"KillWait is {wait} s: what a run that is preempted or requeued has for a last checkpoint"
    yield (
        Finding("ok", "last checkpoint", fact)
        if wait >= _LEAST_KILL_WAIT
        else Finding("warn", "last checkpoint", fact, "slurm.conf: KillWait=30")
    )
    tracked = settings.get("ProctrackType", "")
    yield (
        Finding("ok", "ProctrackType", tracked)
        if tracked == "proctrack/cgroup"
        else Finding(
            "warn",
            "ProctrackType",
            f"{tracked}: may miss processes when a job is ended",
            "slurm.conf: ProctrackType=proctrack/cgroup",
        )
    )
    most = int(re.match(r"\d+", settings.get("MaxBatchRequeue", "5"))[0])  # type: ignore[index]
    fact = f"MaxBatchRequeue is {most}: Slurm holds a job for good that has lost more nodes in all its life"
    yield (
        Finding("ok", "lost nodes", fact)
        if most >= _LEAST_REQUEUES
        else Finding(
            "warn", "lost nodes", fact, "slurm.conf: MaxBatchRequeue=1000; [restart] budget limits a day"
        )
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
