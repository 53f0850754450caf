"""What the parts of the double say to each other: one JSON line asks, one answers, over TCP."""

from __future__ import annotations

import json
import re
import shlex
import socket
import socketserver
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HOME = Path("/var/spool/pbs")
SERVER = ("ctl", 15001)
MOM_PORT = 15002


def ask(address: tuple[str, int], request: Mapping[str, Any], timeout: float = 120) -> dict[str, Any]:
    """Ask whoever listens at *address*. Raises OSError where nobody answers."""
    with socket.create_connection(address, timeout=3) as connection, connection.makefile("rwb") as file:
        connection.settimeout(timeout)
        file.write(json.dumps(request).encode() + b"\n")
        file.flush()
        line = file.readline()
    if not line:
        raise ConnectionResetError("hung up")
    answer: dict[str, Any] = json.loads(line)
    return answer


def serve(port: int, handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer requests at *port*, each in a thread of its own; does not return."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line = self.rfile.readline()
            if line:
                self.wfile.write(json.dumps(handle(json.loads(line))).encode() + b"\n")

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    Server(("", port), Handler).serve_forever()


def run_hook(hook: Mapping[str, Any], event: str, lines: list[str], alarm: float = 60) -> str:
    """Run *hook* for *event* as PBS does, and return its output; one that fails has rejected the event.

    Args:
        hook: its `code`, `config` and `events`.
        lines: the input, without the event's type.
    """
    if event not in hook.get("events", ()):
        return "pbs.event().accept=True\n"
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for file, text in (("hook.py", hook["code"]), ("hook.cf", hook["config"])):
            (work / file).write_text(text)
        (work / "in").write_text("\n".join([*lines, f"pbs.event().type={event}"]) + "\n")
        command = [
            str(HERE / "pbs_python"),
            "--hook",
            "-i",
            "in",
            "-o",
            "out",
            "-L",
            "/var/log",
            "-e",
            "4095",
            "hook.py",
        ]
        environment = {
            "PATH": "/bin:/usr/bin",
            "PBS_HOOK_CONFIG_FILE": str(work / "hook.cf"),
            "PBS_EXEC": "/usr/local",
            "PBS_HOME": str(HOME),
        }
        try:
            # MoM's hooks run under MoM's umask.
            subprocess.run(
                command,
                cwd=work,
                env=environment,
                timeout=alarm,
                start_new_session=True,
                umask=0o077,
                check=False,
            )
            return (work / "out").read_text()
        except (OSError, subprocess.TimeoutExpired):
            return "pbs.event().accept=False\n"


def value(output: str, name: str) -> str | None:
    """Return the value of `pbs.event().NAME` in a hook's output."""
    match = re.search(rf'^pbs\.event\(\)\.{re.escape(name)}=("""(?s:.*?)"""|.*)$', output, re.M)
    return match[1].removeprefix('"""').removesuffix('"""') if match else None


def final_path(job: Mapping[str, Any], letter: str) -> Path:
    """Return where a job's output (o) or errors (e) end up: `ticks.o17`, `ticks.o17.3` of an array's task."""
    if job["paths"][letter]:
        return Path(job["cwd"]) / str(job["paths"][letter])
    number = job["id"].split(".")[0].replace("[", ".").replace("]", "")
    return Path(job["cwd"]) / f"{job['name']}.{letter}{number}"


def listed(variables: Mapping[str, str]) -> str:
    """Return variables as PBS lists them."""
    return ",".join(f"{name}={text}" for name, text in variables.items())


def job_lines(job: Mapping[str, Any], **more: object) -> list[str]:
    """Return a job as the input of a hook has it."""
    facts = {
        "id": job["id"],
        "Job_Name": job["name"],
        "Checkpoint": job["checkpoint"],
        "euser": job["user"],
        "Rerunable": job["rerunable"],
        "run_count": job["run_count"],
        "run_version": job["run_version"],
        "job_state": job["state"],
        "stime": int(job["began"]),
        **({"interactive": 1} if job["interactive"] else {}),
        **more,
    }
    lines = [f"pbs.event().job.{name}={text}" for name, text in facts.items()]
    lines += [f"pbs.event().job.Resource_List[{name}]={text}" for name, text in job["resources"].items()]
    return [*lines, f'pbs.event().job.Variable_List="""{listed(job["variables"])}"""']


def directives(script: str) -> list[str]:
    """Return the words in the #PBS lines of a script."""
    return [word for line in re.findall(r"^#PBS +(.*)$", script, re.M) for word in shlex.split(line)]


def pairs(text: str) -> dict[str, str]:
    """Split A=1,B=2."""
    return {name: rest for name, _, rest in (one.partition("=") for one in text.split(",") if one)}
