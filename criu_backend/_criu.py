"""Running CRIU: its version, dump and restore of one tree, and its log turned into an error."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from criu_backend._capsule import (
    HELPER,
    INHERITED_STDIO,
    PAGES_FD,
    READY_FD,
    Capsule,
    CapsuleError,
    Context,
    clean_environment,
    enter_command,
    restore_capsule,
)
from criu_backend._headroom import Headroom
from criu_backend._images import ImageError, highest_pid, rearm_timers, require_owner, root_pid
from criu_backend._owner import as_owner
from criu_backend._plugin import TWIN_LIBRARY, TwinPlugin
from criu_backend._ports import free_ports
from criu_backend._predicted import Mispredicted
from criu_backend._result import DumpResult, collect
from criu_backend._said import CriuError, error_from_log
from criu_backend._small import make_room
from criu_backend._sockets import has_connections
from criu_backend._twins import end_twins

# Loaded into CRIU when it restores: native/reaper.c.
REAPER_LIBRARY = Path("/usr/libexec/outlast/outlast-reaper.so")

# To know when a task has left its code, CRIU sets a breakpoint of the processor's, unless it is told that there are
# none; then it follows the few system calls that are left. The kernel takes 15 ms to switch on the first breakpoint
# of a machine. Source: criu 4.2, criu/include/fault-injection.h, FI_NO_BREAKPOINTS.
_NO_BREAKPOINTS = {"CRIU_FAULT": "130"}

# Where CRIU keeps what it found out about the kernel until the next boot. Source: criu 4.2, criu/kerndat.c.
_KERNEL_KNOWN = Path("/run/criu.kdat")

_SUPPORTED = (4, 1)
_FREEZE_SECONDS = 10
# A signal that comes in the wrong moment breaks a dump off; so often it is begun again at once.
_MOST_INTERRUPTIONS = 4


@dataclass(frozen=True)
class Looked:
    """What was found in images of processes of user *uid*: the highest PID of anything there, and their root's."""

    uid: int
    last_pid: int
    root_pid: int


class Criu:
    """The CRIU that is installed here, *program* by name or path."""

    def __init__(
        self, program: str = "criu", helper: Path = HELPER, twin_library: Path = TWIN_LIBRARY
    ) -> None:
        self._program = program
        self._helper = helper
        self._known: tuple[tuple[str, int, int], str] | None = None  # which program, and its version
        self._plugin = TwinPlugin(twin_library)

    def version(self) -> str:
        """Return the version as CRIU prints it, such as "4.2.1".

        Raises:
            CriuError: there is no CRIU, or it is older than 4.1, the oldest that is supported.
        """
        # Asked once, since a job may be waiting; another file in its place is asked anew.
        path = shutil.which(self._program) or self._program
        info = os.stat(path) if os.path.exists(path) else None  # noqa: PTH116, PTH110
        which = (path, info.st_ino, info.st_mtime_ns) if info is not None else None
        if self._known is not None and self._known[0] == which:
            return self._known[1]
        version = self._ask_version()
        if which is not None:
            self._known = (which, version)
        return version

    def _ask_version(self) -> str:
        try:
            text = subprocess.run(
                [self._program, "--version"],
                env=clean_environment(),
                capture_output=True,
                text=True,
                timeout=10,
            ).stdout
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CriuError(
                f"{self._program} --version: {error}", log=Path(os.devnull), hint="install criu 4.2 or later"
            ) from None
        match = re.search(r"^Version:\s*(\d+)\.(\d+)(\S*)", text, re.M)
        if match is None:
            raise CriuError(f"{self._program} --version says {text!r}", log=Path(os.devnull))
        version = f"{match[1]}.{match[2]}{match[3]}"
        if (int(match[1]), int(match[2])) < _SUPPORTED:
            raise CriuError(
                f"criu {version} is too old", log=Path(os.devnull), hint="install criu 4.2 or later"
            )
        return version

    def warm_up(self) -> None:
        """Have CRIU find out once what this kernel can, while nobody waits for it. Raises as `version` does."""
        self.version()
        if not _KERNEL_KNOWN.exists():
            with contextlib.suppress(CriuError, OSError, subprocess.TimeoutExpired):
                self.check()

    def check(self) -> None:
        """Ask CRIU whether it works on this kernel. Raises CriuError with its own words if not."""
        result = subprocess.run(
            [self._program, "check"], env=clean_environment(), capture_output=True, text=True, timeout=60
        )
        if result.returncode != 0:
            said = [line for line in result.stderr.splitlines() if "Error" in line] or ["no reason given"]
            raise CriuError(f"criu check: {said[0].strip()}", log=Path(os.devnull))

    def dump(
        self,
        capsule: Capsule,
        images: Path,
        on_frozen: Callable[[], None],
        *,
        tcp: str = "established",
        external: Sequence[str] = (),
        lock_fd: int | None = None,
        mode: str = "plain",
        beside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> DumpResult:
        """Write images of the tree in *capsule* into the directory *images*, and let it run on.

        CRIU is waited for however long it takes: to kill it could kill the job.

        Args:
            images: an empty directory, which the capsule sees at the same path. The memory is not in it but
                beside it, until the result is closed.
            on_frozen: called when the job stands still and nothing more of it can change; an exception out
                of it makes the dump fail, the job runs on, and the exception is raised again here. If it is
                called twice, the last call is the one that counts.
            tcp: "established" keeps TCP connections (those within the job), "close" drops them.
            external: values for CRIU's --external.
            lock_fd: a descriptor that CRIU keeps open, so that a lock on it outlives this process.
            mode: "plain" writes the memory while the job stands still; "forked" has twins made of its
                processes, and "lazy" does so without LD_PRELOAD, which takes longer. Where there can be no
                twins the result is "plain", and says why.
            beside: what is done while the job runs is done within this; CRIU runs without it.

        Raises:
            CriuError: there is no image; the job is unharmed.
        """
        log = images / "dump.log"
        end_twins(capsule)
        headroom = Headroom(capsule.tasks())
        reason = None
        if mode != "plain" and (reason := self._plugin.why_not() or headroom.shortage()):
            mode = "plain"
        room = None
        if mode != "plain":
            with beside():
                room = make_room(headroom)
        predict, interruptions = True, 0
        try:
            while True:
                try:
                    self._write_images(
                        capsule, images, on_frozen, mode, predict, tcp=tcp, external=external, lock_fd=lock_fd
                    )
                    with beside():
                        return collect(
                            images,
                            capsule,
                            mode,
                            criu_version=self.version(),
                            headroom=headroom,
                            room=room,
                            reason=reason,
                        )
                except Mispredicted as error:
                    reason = str(error)
                    predict = False
                except CriuError as error:
                    if not error.interrupted or interruptions == _MOST_INTERRUPTIONS:
                        raise
                    interruptions += 1
                end_twins(capsule)
                for path in images.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        except BaseException as error:
            end_twins(capsule)
            if isinstance(error, ImageError):
                raise CriuError(f"dump: {error}", log=log, hint=error.hint) from None
            if isinstance(error, ProcessLookupError):
                raise CriuError(f"dump: {error}", log=log, hint="is there memory enough?") from None
            raise

    def _write_images(
        self,
        capsule: Capsule,
        images: Path,
        on_frozen: Callable[[], None],
        mode: str,
        predict: bool,
        *,
        tcp: str,
        external: Sequence[str],
        lock_fd: int | None,
    ) -> None:
        log = images / "dump.log"
        path = images / "notify.sock"
        command = [self._program, "dump", "--tree", str(capsule.job_pid), "--images-dir", os.fspath(images)]
        command += ["--log-file", log.name, "-v2", "--leave-running", *_common_options(tcp)]
        # To take the lock away again costs 15 ms, most of the pause of a small job.
        lock = "nftables" if has_connections(capsule.tasks()) else "skip"
        command += ["--network-lock", lock, "--ghost-limit", "1G", "--timeout", str(_FREEZE_SECONDS)]
        command += [word for value in external for word in ("--external", value)]
        if mode == "plain":
            command += ["--action-script", os.fspath(self._helper)]
        failure: list[BaseException] = []
        with (
            self._plugin.call(mode, capsule, images, predict=predict) as call,
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
        ):
            listener.bind(_short(images, path.name))
            listener.listen(1)
            process = subprocess.Popen(
                enter_command(capsule, [*command, *call.arguments], self._helper),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=as_owner(
                    clean_environment(OUTLAST_NOTIFY=os.fspath(path), **call.environment),
                    next(capsule.tasks(), None),
                ),
                start_new_session=True,
                pass_fds=call.fds if lock_fd is None else [*call.fds, lock_fd],
            )
            pidfd = os.pidfd_open(process.pid)
            try:
                _serve_notifications(listener, pidfd, on_frozen, failure)
            finally:
                os.close(pidfd)
                code = process.wait()
            path.unlink(missing_ok=True)
            if failure:
                raise failure[0]
            if code != 0:
                raise error_from_log("dump", log)

    def look_over(self, images: Path, uid: int) -> Looked:
        """Make sure that *images* are those of processes of user *uid*, and make them ready for a restore.

        Raises:
            CriuError: they must not be restored, or cannot be read.
        """
        try:
            require_owner(images, uid)
            rearm_timers(images)
            return Looked(uid, highest_pid(images), root_pid(images))
        except ImageError as error:
            raise CriuError(f"restore: {error}", log=images / "restore.log", hint=error.hint) from None

    def restore(
        self,
        context: Context,
        images: Path,
        state: Path,
        *,
        uid: int,
        dumped_by: str,
        tcp: str = "established",
        inherit: Sequence[tuple[int, str]] = (),
        pages: socket.socket | None = None,
        stopped: bool = False,
        looked: Looked | None = None,
    ) -> Capsule:
        """Bring the tree in *images* back to life in a capsule of its own, in the place of *context*.

        Args:
            uid: the job's owner; images of anybody else's processes are refused.
            dumped_by: CRIU's version that wrote the images.
            inherit: which of the standard descriptors (0, 1, 2) of *context* take the place of which open
                file of the tree, in CRIU's words, such as (1, "pipe:[4711]").
            pages: the tree runs at once, and gets its pages afterwards from the `PageServer` at the other end
                of this, which is closed here; *images* must stay until that is complete. Should it fail, the
                capsule ends.
            stopped: leave all processes of the tree stopped: none of them runs an instruction.
            looked: what `look_over` said of *images*, if nobody else can have changed them since.

        Raises:
            CriuError: it did not work; nothing is left running. CapsuleError likewise, before CRIU ran.
        """
        log = images / "restore.log"
        mine = self.version()
        if _release(mine) < _release(dumped_by):
            raise CriuError(
                f"restore: the images were written by criu {dumped_by}, this node has {mine}",
                log=log,
                hint=f"install criu {dumped_by} or later on this node",
            )
        if looked is None or looked.uid != uid:
            looked = self.look_over(images, uid)
        try:
            free_ports(images)
        except ImageError as error:
            raise CriuError(f"restore: {error}", log=log, hint=error.hint) from None
        loaded = {"LD_PRELOAD": os.fspath(REAPER_LIBRARY), "OUTLAST_ROOT": str(looked.root_pid)}
        environment = as_owner(clean_environment(**loaded, **_NO_BREAKPOINTS), context.pid)
        command = [self._program, "restore", "--images-dir", os.fspath(images)]
        command += ["--log-file", log.name, "-v2", "--pidfile", os.fspath(state / "restored.pid")]
        command += ["--restore-detached", "--network-lock=nftables", *_common_options(tcp)]
        for fd, what in inherit:
            command += ["--inherit-fd", f"fd[{INHERITED_STDIO + fd}]:{what}"]
        if stopped:
            command.append("--leave-stopped")
        pager = None
        if pages is not None:
            command.append("--lazy-pages")
            daemon = [self._program, "lazy-pages", "--no-default-config", "--images-dir", os.fspath(images)]
            daemon += ["--log-file", "lazy.log", "-v2", "--page-server", "--ps-socket", str(PAGES_FD)]
            pager = ([*daemon, "--status-fd", str(READY_FD)], pages.fileno())
            environment["OUTLAST_READY"] = str(READY_FD)
        try:
            # Far from the tree's own, and from what those of its processes that are gone were called.
            last = looked.last_pid + 10000
            return restore_capsule(
                context, command, environment, state, last_pid=last, pager=pager, helper=self._helper
            )
        except CapsuleError as error:
            if log.exists():
                raise error_from_log("restore", log) from error
            raise
        finally:
            if pages is not None:
                pages.close()  # so that the end of CRIU's daemon is seen


def _common_options(tcp: str) -> list[str]:
    return [
        "--no-default-config",
        "--manage-cgroups=ignore",
        "--file-locks",
        "--ext-unix-sk",
        f"--tcp-{tcp}",
    ]


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _short(directory: Path, name: str) -> str:
    """Return a path to *name* that fits into a unix socket's address, however deep *directory* is."""
    direct = os.fspath(directory / name)
    if len(direct) < 100:
        return direct
    raise CriuError(
        f"{direct}: too long a path for a socket", log=Path(os.devnull), hint="choose a shorter spool"
    )


def _serve_notifications(
    listener: socket.socket, pidfd: int, on_frozen: Callable[[], None], failure: list[BaseException]
) -> None:
    """Answer the action script until the process of *pidfd* has ended."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if listener.fileno() in ready:
            connection, _ = listener.accept()
            with connection:
                try:
                    on_frozen()
                    verdict = b"1"
                except Exception as error:  # noqa: BLE001 - raised again when CRIU has let the job go
                    failure.append(error)
                    verdict = b"0"
                with contextlib.suppress(OSError):
                    connection.sendall(verdict)
        elif pidfd in ready:
            return
