#!/usr/bin/python3
"""A double of pbs_mom: runs jobs under the hook, knows them by their sessions, and does its $action lines."""

from __future__ import annotations

import contextlib
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
# Of MoM's own timer, so that tests need not wait for whole minutes.
MINUTE_SECONDS = 5.0
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
        self.rerun = self.over_limit = self.over = self.end_hooks = False
        self.used = {"cput": "00:00:00", "mem": "0kb"}
        self.sessions: list[int] = []
        self.stdout, self.stderr = (self._output(end) for end in ("OU", "ER"))
        self.temporary = Path(f"/var/tmp/pbs.{job['id']}")
        self.user = pwd.getpwnam(job["user"])
        private = Path(self.user.pw_dir, f"pbs.{job['id']}.x8z")
        self.directory = private if job["sandbox"] == "PRIVATE" else Path(self.user.pw_dir)

    def _output(self, end: str) -> Path:
        """Where the job writes: in the spool, or with -k ...d at once where it is to be in the end."""
        end = "OU" if self.job["join"] == "oe" else end
        letter = {"OU": "o", "ER": "e"}[end]
        direct = letter in self.job["keep"] and "d" in self.job["keep"]
        return wire.final_path(self.job, letter) if direct else SPOOL / f"{self.job['id']}.{end}"

    def start(self) -> None:
        """Start the job's script as its user, in a session of its own."""
        job, owner = self.job, (self.user.pw_uid, self.user.pw_gid)
        script = JOBS / f"{job['id']}.SC"
        script.write_text(job["script"])
        script.chmod(0o700)
        os.chown(script, *owner)
        for path, name in ((self.stdout, "OU"), (self.stderr, "ER")):
            if path.parent == SPOOL:
                path.unlink(missing_ok=True)
                path.write_text(job["spool"].get(name, ""))
                # What comes back from the server after a requeue has another mode.
                path.chmod(0o644 if name in job["spool"] else 0o600)
            path.touch()
            os.chown(path, *owner)
        own = [self.temporary, self.directory] if job["sandbox"] == "PRIVATE" else [self.temporary]
        for directory in own:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(mode=0o700)
            os.chown(directory, *owner)
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
            "PBS_JOBDIR": str(self.directory),
            "TMPDIR": str(self.temporary),
        }
        lines = [f'pbs.event().env="""{wire.listed(environment)}"""', *self.lines()]
        lines.insert(0, "pbs.event().progname=/bin/bash")
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
                cwd=self.directory,
                start_new_session=True,
                user=owner[0],
                group=owner[1],
                extra_groups=[owner[1]],
            )
        os.close(read)
        os.close(write)
        self.sessions.append(process.pid)
        threading.Thread(target=self.wait, args=(process,), daemon=True).start()
        if "walltime" in job["resources"]:
            hours, minutes, seconds = map(int, job["resources"]["walltime"].split(":"))
            threading.Timer(hours * 3600 + minutes * 60 + seconds, self._time_is_over).start()
        if "=" in job["checkpoint"]:
            threading.Thread(
                target=self._checkpoints, args=(int(job["checkpoint"].split("=")[1]),), daemon=True
            ).start()

    def _time_is_over(self) -> None:
        self.over_limit = not self.over
        self.kill()

    def _checkpoints(self, minutes: int) -> None:
        """MoM's own timer, read at the job's start: a later qalter -c does not change it."""
        while not self.over:
            time.sleep(minutes * MINUTE_SECONDS)
            if not self.over:
                self.action("checkpoint")

    def look(self) -> None:
        """Count what the job's sessions have used: those of a restored capsule only if it was attached."""
        ticks = resident = 0
        for pid in processes(set(self.sessions)):
            with contextlib.suppress(OSError, IndexError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))
                resident += int(fields[21]) * 4
        seconds = ticks // os.sysconf("SC_CLK_TCK")
        text = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        memory = max(resident, int(self.used["mem"].removesuffix("kb")))
        self.used = {"cput": max(text, self.used["cput"]), "mem": f"{memory}kb"}

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
        self.over = True
        status = -11 if self.rerun else -29 if self.over_limit else status
        # The server then asks MoM to delete the job, and MoM, which takes that for a repetition, never answers.
        stuck = self.end_hooks
        output = wire.run_hook(self.hook, "execjob_epilogue", self.lines(Exit_status=status))
        obit = {"obit": self.job["id"], "version": self.job["run_version"], "status": status}
        obit |= {"stuck": stuck, "used": self.used}
        spooled = [path for path in (self.stdout, self.stderr) if path.parent == SPOOL]
        obit["spool"] = {path.suffix[1:]: path.read_text() for path in spooled if path.exists()}
        if wire.value(output, "job._rerun") == "True":
            obit["status"] = -18
        shutil.rmtree(self.temporary, ignore_errors=True)
        if self.job["sandbox"] == "PRIVATE":
            shutil.rmtree(self.directory, ignore_errors=True)
        for path in (*spooled, JOBS / f"{self.job['id']}.SC"):
            path.unlink(missing_ok=True)
        wire.run_hook(self.hook, "execjob_end", self.lines(Exit_status=status))
        while True:
            try:
                wire.ask(wire.SERVER, obit)
                break
            except OSError:
                time.sleep(0.5)
        # Until the server knows, the job is here; by then its next run may be.
        if tasks.get(self.job["id"]) is self:
            del tasks[self.job["id"]]

    def hold(self) -> int:
        """$action checkpoint_abort; when it has gone well, MoM runs the hooks of execjob_end beside the job."""
        code = self.action("checkpoint_abort")
        if code == 0:
            self.end_hooks = True
            threading.Thread(target=self._end_hooks, daemon=True).start()
        return code

    def _end_hooks(self) -> None:
        wire.run_hook(self.hook, "execjob_end", self.lines())
        self.end_hooks = False

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
        for one in list(tasks.values()):
            one.look()
        known = {name: one.job["run_version"] for name, one in list(tasks.items())}
        return {"jobs": known, "used": {name: one.used for name, one in list(tasks.items())}}
    elif task is None:
        return {"code": 1}
    elif operation == "kill":
        task.rerun = request.get("rerun", False)
        task.signal(signal.SIGKILL) if task.rerun else task.kill()
    elif operation == "discard":
        wire.run_hook(task.hook, "execjob_end", task.lines())
        task.signal(signal.SIGKILL)
    elif operation == "signal":
        task.signal(request["number"])
    elif operation == "hold":
        return {"code": task.hold()}
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
