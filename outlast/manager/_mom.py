"""What a job has from its host under PBS, where MoM, and no cgroup, keeps it together.

MoM knows a job by its sessions: the capsule's has to be attached. MoM keeps a job's output in a spool of its
own and gives each run a fresh temporary directory, both on the one host: so their content goes with the
checkpoint, and is put back before a restore.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pwd
import select
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from outlast.errors import CheckpointRefused, OutlastError, RestoreFailed
from outlast.manager._files import open_for_writing
from outlast.model import SchedulerJob
from outlast.scheduler import SchedulerRefused, Witness

log = logging.getLogger(__name__)

_ATTACH_SECONDS = 10.0
_SCRIPT_SECONDS = 5.0
_HOOK_POLL_SECONDS = 0.2
_HOOK_NOTICED_SECONDS = 0.5
_TAR_SECONDS = 3600.0
# What the epilogue hook is told of runs that ended by no fault, however many there are: plugins/pbs.
HELD = "held"
LEFT = "left its host in good time"
# A temporary directory is copied while the job stands still: beyond this it would stand still for too long.
_LARGEST_DIRECTORY = 4 << 30


@dataclass(frozen=True)
class Mom:
    """MoM's hold on one run of a job: its PBS id, the spool, directories made for this run, `pbs_attach`.

    *marker* is the file by which the epilogue hook learns that the job is to run again, and why; *ahead* is
    by how much its run_version is more than its run_count.
    """

    pbs_id: str
    spool: Path
    directories: tuple[Path, ...]
    attach_program: Path
    marker: Path
    ahead: int = 0

    @classmethod
    def parse(cls, text: str, marker: Path) -> Mom:
        """Make one of what `outlast hook pbs-launch` passes on as JSON."""
        told = json.loads(text)
        directories = tuple(Path(path) for path in told["keep"])
        return cls(
            told["id"], Path(told["spool"]), directories, Path(told["attach"]), marker, int(told["ahead"])
        )

    def await_script(self, stdin: int) -> None:
        """Wait until MoM has written the script's name into the pipe *stdin*, and has closed its end.

        From then on the pipe is the job's alone, and CRIU keeps what is left in it. Passed on as it is, a
        restored shell would read the name once more from the new one, and run the script again.
        """
        if not stat.S_ISFIFO(os.fstat(stdin).st_mode):
            return
        poll = select.poll()
        poll.register(stdin, 0)
        poll.poll(_SCRIPT_SECONDS * 1000)

    def attach(self, pid: int, uid: int) -> bool:
        """Have MoM take the session of process *pid* for one of the job's; return whether it did."""
        environment = {"PATH": "/usr/bin:/bin"}
        deadline = time.monotonic() + _ATTACH_SECONDS
        said = ""
        # A process that has not yet become the user's is refused.
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            try:
                done = subprocess.run(
                    [os.fspath(self.attach_program), "-j", self.pbs_id, "-p", str(pid)],
                    env=environment,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=_ATTACH_SECONDS,
                    **_as_user(uid),
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                said = str(error)
                break
            if done.returncode == 0:
                return True
            said = done.stderr.strip()
            time.sleep(0.1)
        log.warning("MoM does not count process %d as the job's: %s", pid, said or "it has ended")
        return False

    def kept_here(self, path: str) -> bool:
        """Whether the file *path* is gone with this run, and so goes with the checkpoint."""
        return Path(path).parent == self.spool or any(
            Path(path).is_relative_to(one) for one in self.directories
        )

    def keep(self, pids: Iterable[int], images: Path, uid: int) -> list[dict[str, Any]]:
        """Copy into *images* what MoM keeps on this host only; called while the processes stand still.

        Raises CheckpointRefused where a directory is too large, and OutlastError where it cannot be read.
        """
        kept: list[dict[str, Any]] = []
        for entry in open_for_writing(pids, links=True):
            if Path(entry["path"]).parent == self.spool:
                name = f"spooled-{len(kept)}"
                with open(entry["link"], "rb") as source, (images / name).open("wb") as target:  # noqa: PTH123
                    shutil.copyfileobj(source, target, 1 << 20)
                    mode = stat.S_IMODE(os.fstat(source.fileno()).st_mode)
                kept.append({"path": entry["path"], "name": name, "mode": mode})
        for directory in self.directories:
            if not directory.is_dir():
                continue
            name = f"directory-{len(kept)}.tar"
            with (images / name).open("wb") as archive:
                _tar(["--create", "--sparse"], directory, uid, stdout=archive)
            kept.append({"path": os.fspath(directory), "name": name})
        return kept

    def put_back(
        self, kept: Sequence[Mapping[str, Any]], images: Path, stdio: Sequence[int], uid: int
    ) -> None:
        """Undo `keep` for a new run, whose standard descriptors are *stdio*. Raises RestoreFailed."""
        for entry in kept:
            path, source = Path(entry["path"]), images / entry["name"]
            if "mode" in entry:
                self._put_back_file(path, source, entry["mode"], stdio)
            elif path not in self.directories:
                raise RestoreFailed(f"{path}: PBS has not given the job this directory again")
            else:
                with source.open("rb") as archive:
                    _tar(
                        ["--extract", "--preserve-permissions", "--recursive-unlink"],
                        path,
                        uid,
                        stdin=archive,
                    )

    def set_back(self, files: Sequence[Mapping[str, Any]], stdio: Sequence[int]) -> None:
        """Cut files of the spool back to the sizes that *files* tells; others are not looked at."""
        for entry in files:
            if Path(entry["path"]).parent == self.spool:
                fd = _behind(stdio, Path(entry["path"]))
                if fd is not None:
                    os.ftruncate(fd, entry["size"])

    @staticmethod
    def await_end_hooks(seconds: float) -> None:
        """Return when MoM runs no hook for the event execjob_end, at most *seconds* later.

        After $action checkpoint_abort MoM runs them beside the job; a job that ends meanwhile hangs in state E
        for ever. Source: OpenPBS, src/resmom/requests.c, post_chkpt() and req_deletejob().
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and _runs_end_hook():
            time.sleep(_HOOK_POLL_SECONDS)
        # The hook has ended; MoM has to notice.
        time.sleep(_HOOK_NOTICED_SECONDS)

    def ask_for_rerun(self, why: str) -> None:
        """Have the epilogue hook give the job back to the queue; *why* is HELD, LEFT, or else counts as a fault."""
        with contextlib.suppress(OSError):
            self.marker.write_text(why + "\n")

    @staticmethod
    def _put_back_file(path: Path, source: Path, mode: int, stdio: Sequence[int]) -> None:
        # Through the descriptor that MoM opened, never by name: the directory is everybody's.
        fd = _behind(stdio, path)
        if fd is None:
            raise RestoreFailed(f"{path}: MoM has not opened this file for the job again")
        with source.open("rb") as saved:
            os.ftruncate(fd, 0)
            offset = 0
            while block := saved.read(1 << 20):
                # With O_APPEND the offset is the end all the same; either way the file is what it was.
                offset += os.pwrite(fd, block, offset)
        os.fchmod(fd, mode)


def _runs_end_hook() -> bool:
    """Whether MoM runs a hook's program, by the name of the input that MoM has written for it."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"--hook" in words and any(b"/hook_execjob_end_" in word for word in words):
                return True
    return False


class MomMover:
    """What leaving asks of a scheduler: the run ends here, and MoM's epilogue hook queues the job."""

    def __init__(self, mom: Mom, witness: Witness, end: Callable[[], None]) -> None:
        """*end* ends this run of the job at once."""
        self._mom = mom
        self._witness = witness
        self._end = end

    def job(self, job_id: str) -> SchedulerJob | None:
        """Return the job as it stands now."""
        return self._witness.job(job_id)

    def requeue(self, handle: str) -> None:
        """Run the job again under its own id."""
        self._mom.ask_for_rerun(LEFT)
        self._end()

    def requeue_hold(self, handle: str) -> None:
        """Refuse: only PBS's server can hold a job."""
        raise SchedulerRefused(f"hold the job with PBS's own command: qhold {handle}")

    def exclude(self, handles: Sequence[str], nodes: Sequence[str], *, at_once: bool = False) -> None:
        """Leave it to PBS where the job goes on; a node that is drained is out of service for all."""

    def require(self, handle: str, node: str) -> None:
        """Leave it to PBS where the job goes on: a move to one node is the watcher's."""

    def kill_wait(self) -> float:
        """Return 0: MoM kills a job that is queued again at once."""
        return 0.0


def _behind(stdio: Sequence[int], path: Path) -> int | None:
    """Return the one of *stdio*, open for writing, that is the file *path*."""
    for fd in stdio[1:]:
        if os.readlink(f"/proc/self/fd/{fd}") == os.fspath(path):  # noqa: PTH115
            return fd
    return None


def _tar(
    options: Sequence[str],
    directory: Path,
    uid: int,
    *,
    stdin: IO[bytes] | int = subprocess.DEVNULL,
    stdout: IO[bytes] | int = subprocess.DEVNULL,
) -> None:
    """Run tar on *directory* as its owner, who may have put anything there."""
    if stdin == subprocess.DEVNULL and (size := _size(directory)) > _LARGEST_DIRECTORY:
        raise CheckpointRefused(
            f"{directory}: {size >> 20} MiB, and it would be copied while the job stands still",
            hint=f"keep large files elsewhere: at most {_LARGEST_DIRECTORY >> 20} MiB go with a checkpoint",
        )
    command = ["tar", *options, "--file=-", "--directory", os.fspath(directory)]
    if stdin == subprocess.DEVNULL:
        command.append(".")
    done = subprocess.run(
        command,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
        cwd="/",
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        timeout=_TAR_SECONDS,
        **_as_user(uid),
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [
            f"tar ended with {done.returncode}"
        ]
        raise OutlastError(f"{directory}: {said[0]}")


def _size(directory: Path) -> int:
    """Return what the files below *directory* take up, in bytes; what cannot be looked at counts nothing."""
    total = 0
    for path, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512  # noqa: PTH118
    return total


def _as_user(uid: int) -> dict[str, Any]:
    """Return the arguments by which subprocess runs a command as user *uid*, with the groups of a login."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return {"user": uid, "group": uid, "extra_groups": []}
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return {"user": uid, "group": entry.pw_gid, "extra_groups": groups}
