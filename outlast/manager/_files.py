"""What a job's open files looked like at one moment, so that a restore can set them back to it."""

from __future__ import annotations

import os
import re
import select
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

DELETED = " (deleted)"


@dataclass(frozen=True)
class NamedFile:
    """A regular file with a name, that a process has open or mapped."""

    link: str  # in /proc: leads to the very file, whatever its name leads to meanwhile
    path: str
    info: os.stat_result
    position: int = 0
    flags: int = 0

    @property
    def writes(self) -> bool:
        """Whether it is open for writing."""
        return self.flags & os.O_ACCMODE != os.O_RDONLY


def named_file(link: str) -> NamedFile | None:
    """Return the file that *link*, in /proc, leads to, if there is one and it is regular and has a name."""
    try:
        info = os.stat(link)  # noqa: PTH116 - follows the magic link to the open file itself
        path = os.readlink(link)  # noqa: PTH115
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(info.st_mode) or info.st_nlink == 0 or path.endswith(DELETED):
        return None
    return NamedFile(link, path, info)


def open_files(pid: int) -> Iterator[NamedFile]:
    """Yield each regular file with a name that process *pid* has open, with where it stands and its flags.

    Even while the process stands still descriptors come and go: those of CRIU's code inside it.
    """
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        file = named_file(os.fspath(fd))
        if file is None:
            continue
        try:
            position, flags = _position(Path(f"/proc/{pid}/fdinfo/{fd.name}"))
        except FileNotFoundError:
            continue
        yield replace(file, position=position, flags=flags)


def open_for_writing(pids: Iterable[int], *, links: bool = False) -> list[dict[str, Any]]:
    """Return path and size (bytes) of each regular file that a process of *pids* has open for writing.

    With *links* there is also "link", the name in /proc by which the open file itself can be reached.

    Called while the processes stand still. The size is read through the open descriptor, never by the name,
    which the job's owner may have given to another file. Files without a name are left out: they are in
    CRIU's images.
    """
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for pid in pids:
        for file in open_files(pid):
            if file.writes:
                entry: dict[str, Any] = {"path": file.path, "size": file.info.st_size}
                found.setdefault(
                    (file.info.st_dev, file.info.st_ino), entry | ({"link": file.link} if links else {})
                )
    return sorted(found.values(), key=lambda entry: str(entry["path"]))


def standard_files(fds: Iterable[int]) -> list[dict[str, Any]]:
    """Return path and size (bytes) of the regular files behind *fds*, a job's standard descriptors."""
    found: dict[str, dict[str, Any]] = {}
    for fd in fds:
        info = os.fstat(fd)
        path = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
        _, flags = _position(Path(f"/proc/self/fdinfo/{fd}"))
        if stat.S_ISREG(info.st_mode) and info.st_nlink and flags & os.O_ACCMODE != os.O_RDONLY:
            found[path] = {"path": path, "size": info.st_size}
    return list(found.values())


def passed_through(fds: Iterable[int]) -> list[dict[str, Any]]:
    """Tell which of a job's standard descriptors, numbered from 0, lead out of its capsule.

    A pipe that nobody can write to any more does not lead out: it is the job's, with what is left in it.

    Returns:
        For each pipe and terminal: `fd`, its number in the job; `name`, what CRIU's --inherit-fd calls it;
        and for a terminal `external`, what CRIU's --external calls it. Source: criu(8).
    """
    found = []
    for number, fd in enumerate(fds):
        info = os.fstat(fd)
        if stat.S_ISFIFO(info.st_mode):
            if _hung_up(fd):
                continue
            found.append({"fd": number, "name": f"pipe:[{info.st_ino}]"})
        elif stat.S_ISCHR(info.st_mode) and os.isatty(fd):
            name = f"tty[{info.st_rdev:x}:{info.st_dev:x}]"
            found.append({"fd": number, "name": name, "external": name})
    return found


def _hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def _position(fdinfo: Path) -> tuple[int, int]:
    """Return where a descriptor stands and its flags. Source: proc_pid_fdinfo(5)."""
    match = re.search(r"^pos:\s*([0-9]+)\nflags:\s*([0-7]+)", fdinfo.read_text())
    return (int(match[1]), int(match[2], 8)) if match else (0, 0)
