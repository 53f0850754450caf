#!/usr/bin/python3
"""A double of pbs_mom: runs jobs under the hook, knows them by their sessions, and does its $action lines."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import wire

KILL_DELAY = 3.0
SPOOL = wire.HOME / "spool"
JOBS = wire.HOME / "mom_priv" / "jobs"
CONFIG = wire.HOME / "mom_priv" / "config"


def processes(sessions: set[int]) -> list[int]:
    """Return the processes of *sessions*; like MoM, this does not see any that root owns."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            session = int((path / "stat").read_text().rpartition(")")[2].split()[3])
            if session in sessions and path.stat().st_uid != 0:
                found.append(int(path.name))
        except (OSError, IndexError):
            continue
    return found


class Task:
    """One run of one job on this host."""

    def __init__(self, job: dict[str, Any], hook: dict[str, Any]) -> None:
        self.job, self.hook = job, hook
        self.held = self.rerun = False
        self.sessions: list[int] = []
        self.stdout, self.stderr = (SPOOL / f"{job['id']}.{end}" for end in ("OU", "ER"))
        self.temporary = Path(f"/var/tmp/pbs.{job['id']}")
        self.user = pwd.getpwnam(job["user"])

    def start(self) -> None:
        """Start the job's script as its user, in a session of its own."""
        job, owner = self.job, (self.user.pw_uid, self.user.pw_gid)
        script = JOBS / f"{job['id']}.SC"
        script.write_text(job["script"])
        script.chmod(0o700)
        os.chown(script, *owner)
        for path, name in ((self.stdout, "OU"), (self.stderr, "ER")):
            path.unlink(missing_ok=True)
            path.write_text(job["spool"].get(name, ""))
            # What comes back from the server after a requeue has another mode.
            path.chmod(0o644 if name in job["spool"] else 0o600)
            os.chown(path, *owner)
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(mode=0o700)
        os.chown(self.temporary, *owner)
        environment = {
            **job["variables"],
            "PATH": "/bin:/usr/bin",
            "HOME": self.user.pw_dir,
            "LOGNAME": job["user"],
            "USER": job["user"],
            "SHELL": "/bin/bash",
            "PBS_JOBID": job["id"],
            "PBS_TASKNUM": "1",
            "PBS_ENVIRONMENT": "PBS_BATCH",
            "PBS_JOBDIR": self.user.pw_dir,
            "TMPDIR": str(self.temporary),
        }
        listed = ",".join(f"{name}={text}" for name, text in environment.items())
        lines = ["pbs.event().progname=/bin/bash", f'pbs.event().env="""{listed}"""', *self.lines()]
        output = wire.run_hook(self.hook, "execjob_launch", lines)
        program, arguments = "/bin/bash", ["-bash"]
        if wire.value(output, "accept") != "True":
            self.end(-17)  # FAILHOOK_DELETE: the job is gone for good
            return
        if (chosen := wire.value(output, "progname")) is not None:
            program, arguments, number = chosen, ["-" + Path(chosen).name], 1
            while (word := wire.value(output, f"argv[{number}]")) is not None:
                arguments.append(word)
                number += 1
            pairs = (pair.partition("=") for pair in str(wire.value(output, "env")).split(","))
            environment = {name: text for name, _, text in pairs}
        read, write = os.pipe()
        os.write(write, f"{script}\n".encode())
        with self.stdout.open("ab") as out, self.stderr.open("ab") as err:
            process = subprocess.Popen(
                arguments,
                executable=program,
                stdin=read,
                stdout=out,
                stderr=err,
                env=environment,
                cwd=self.user.pw_dir,
                start_new_session=True,
                user=owner[0],
                group=owner[1],
                extra_groups=[owner[1]],
            )
        os.close(read)
        os.close(write)
        self.sessions.append(process.pid)
        threading.Thread(target=self.wait, args=(process,), daemon=True).start()

    def lines(self, **more: object) -> list[str]:
        """The job, as a hook's input has it."""
        return wire.job_lines(self.job, exec_host2=f"{socket.gethostname()}:15002/0", **more)

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the job's first task; with it all of the job ends."""
        code = process.wait()
        self.end(256 - code if code < 0 else code)

    def end(self, status: int) -> None:
        """Clear away what is left, run the epilogue hook, and tell the server."""
        self.signal(signal.SIGKILL)
        status = -11 if self.rerun else status
        output = wire.run_hook(self.hook, "execjob_epilogue", self.lines(Exit_status=status))
        obit = {"obit": self.job["id"], "version": self.job["run_version"], "status": status, "spool": {}}
        obit["spool"] = {
            path.suffix[1:]: path.read_text() for path in (self.stdout, self.stderr) if path.exists()
        }
        if wire.value(output, "job._rerun") == "True":
            obit["status"] = -18
        shutil.rmtree(self.temporary, ignore_errors=True)
        for path in (self.stdout, self.stderr, JOBS / f"{self.job['id']}.SC"):
            path.unlink(missing_ok=True)
        while True:
            try:
                wire.ask(wire.SERVER, obit)
                break
            except OSError:
                time.sleep(0.5)
        # Until the server knows, the job is here; by then its next run may be.
        if tasks.get(self.job["id"]) is self:
            del tasks[self.job["id"]]

    def signal(self, number: int) -> None:
        """Send a signal to every process of the job's sessions."""
        for pid in processes(set(self.sessions)):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill(self) -> None:
        """End the job as PBS does: SIGTERM, and after job_kill_delay SIGKILL."""
        self.signal(signal.SIGTERM)
        threading.Timer(KILL_DELAY, self.signal, [signal.SIGKILL]).start()

    def action(self, event: str) -> int:
        """Run the script of an $action for each task; return the first exit code that is not 0."""
        for line in CONFIG.read_text().splitlines():
            words = line.split()
            if words[:2] == ["$action", event]:
                return max(
                    (
                        self._script(words[3].removeprefix("!"), words[4:], number)
                        for number in self._numbers()
                    ),
                    default=1,
                )
        return 1

    def _numbers(self) -> range:
        return range(1, len(self.sessions) + 1)

    def _script(self, program: str, words: list[str], number: int) -> int:
        known = {"%jobid": self.job["id"], "%taskid": f"{number:08X}", "%uid": str(self.user.pw_uid)}
        command = [
            "sh",
            "-c",
            'exec "$@" <&- >&- 2>&-',
            "sh",
            program,
            *(known.get(word, word) for word in words),
        ]
        return subprocess.run(command, env={"HOME": "/root"}, cwd=self.user.pw_dir, check=False).returncode


tasks: dict[str, Task] = {}


def handle(request: dict[str, Any]) -> dict[str, Any]:
    """Do what the server asks."""
    operation, task = request["op"], tasks.get(request.get("id", ""))
    if operation == "run":
        task = tasks[request["job"]["id"]] = Task(request["job"], request["hook"])
        threading.Thread(target=task.start, daemon=True).start()
    elif operation == "have":
        return {"jobs": {name: one.job["run_version"] for name, one in list(tasks.items())}}
    elif task is None:
        return {"code": 1}
    elif operation == "kill":
        task.rerun = request.get("rerun", False)
        task.signal(signal.SIGKILL) if task.rerun else task.kill()
    elif operation == "discard":
        task.signal(signal.SIGKILL)
    elif operation == "signal":
        task.signal(request["number"])
    elif operation == "hold":
        return {"code": task.action("checkpoint_abort")}
    return {"code": 0}


def attach() -> None:
    """Answer pbs_attach: take a session for one of a job's."""
    path = wire.HOME / "attach.sock"
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(0o666)
    listener.listen()
    while True:
        connection, _ = listener.accept()
        with connection:
            peer = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
            name, _, pid = connection.recv(4096).decode().partition(" ")
            task = tasks.get(name)
            try:
                allowed = task is not None and peer == task.user.pw_uid == Path(f"/proc/{pid}").stat().st_uid
                if task is not None and allowed:
                    task.sessions.append(os.getsid(int(pid)))
            except OSError:
                allowed = False
            connection.sendall(b"ok" if allowed else b"user not permitted to attach (17009)")


if __name__ == "__main__":
    for directory, mode in ((SPOOL, 0o1777), (JOBS, 0o751), (CONFIG.parent, 0o751)):
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(mode)
    CONFIG.touch()
    threading.Thread(target=attach, daemon=True).start()
    wire.serve(wire.MOM_PORT, handle)
