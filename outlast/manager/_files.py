"""What a job's open files looked like at one moment, so that a restore can set them back to it."""

from __future__ import annotations

import os
import re
import select
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_DELETED = " (deleted)"


def open_for_writing(pids: Iterable[int], *, links: bool = False) -> list[dict[str, Any]]:
    """Return path and size (bytes) of each regular file that a process of *pids* has open for writing.

    With *links* there is also "link", the name in /proc by which the open file itself can be reached.

    Called while the processes stand still. The size is read through the open descriptor, never by the name,
    which the job's owner may have given to another file. Files without a name are left out: they are in
    CRIU's images.
    """
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for pid in pids:
        directory = Path(f"/proc/{pid}/fd")
        for fd in directory.iterdir():
            info = os.stat(fd)  # noqa: PTH116 - follows the magic link to the open file itself
            if not stat.S_ISREG(info.st_mode) or info.st_nlink == 0 or (info.st_dev, info.st_ino) in found:
                continue
            if not _writes(Path(f"/proc/{pid}/fdinfo/{fd.name}")):
                continue
            path = os.readlink(fd)  # noqa: PTH115
            if not path.endswith(_DELETED):
                entry: dict[str, Any] = {"path": path, "size": info.st_size}
                found[info.st_dev, info.st_ino] = entry | ({"link": os.fspath(fd)} if links else {})
    return sorted(found.values(), key=lambda entry: str(entry["path"]))


def standard_files(fds: Iterable[int]) -> list[dict[str, Any]]:
    """Return path and size (bytes) of the regular files behind *fds*, a job's standard descriptors."""
    found: dict[str, dict[str, Any]] = {}
    for fd in fds:
        info = os.fstat(fd)
        path = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
        if stat.S_ISREG(info.st_mode) and info.st_nlink and _writes(Path(f"/proc/self/fdinfo/{fd}")):
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


def _writes(fdinfo: Path) -> bool:
    match = re.search(r"^flags:\s*([0-7]+)", fdinfo.read_text(), re.M)
    return match is not None and int(match[1], 8) & os.O_ACCMODE != os.O_RDONLY
