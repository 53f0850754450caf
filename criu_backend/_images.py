"""Reading CRIU's images, through the pycriu that comes with CRIU. Nothing else imports pycriu.

CRIU changes its formats: fields of the page map moved in 4.2, and an older pycriu then reads zeros without
an error. So a pycriu whose version is not the images' is refused.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any


class ImageError(Exception):
    """Images cannot be read, or hold what must not be restored; *hint* is what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


# Source: CRIU, criu/include/image.h, TASK_DEAD.
_TASK_DEAD = 2


def pycriu_version() -> str | None:
    """Return the version of the pycriu that is installed, None where there is none."""
    try:
        import pycriu
    except ImportError:
        return None
    return str(pycriu.__version__)


def warm_up() -> None:
    """Import what takes long to, while nobody waits for it."""
    pycriu_version()


def entries(image: Path) -> list[dict[str, Any]]:
    """Return the entries of one image file as dictionaries of CRIU's own field names.

    Raises:
        ImageError: there is no pycriu, or the file is no image.
    """
    try:
        import pycriu
    except ImportError:
        raise ImageError(
            "the Python package pycriu is missing",
            hint="install the one that comes with CRIU (Debian: python3-pycriu), of CRIU's own version",
        ) from None
    try:
        with image.open("rb") as file:
            loaded: list[dict[str, Any]] = pycriu.images.load(file)["entries"]
    except Exception as error:
        # pycriu has no error class of its own for a file that is not what it should be.
        raise ImageError(f"{image.name}: not a CRIU image: {error}") from error
    return loaded


def statistics(images: Path) -> dict[str, Any]:
    """Return what CRIU measured of the dump in *images*: times in microseconds (frozen_time), pages."""
    measured: dict[str, Any] = entries(images / "stats-dump")[0]["dump"]
    return measured


def opened_files(images: Path) -> list[tuple[str, int, int]]:
    """Return path, size (bytes) and mode of each regular file that the tree in *images* has open or mapped."""
    found = []
    for entry in entries(images / "files.img"):
        if "reg" in entry:
            regular = entry["reg"]
            path = regular["name"]
            path = os.fsdecode(path) if isinstance(path, bytes) else path
            found.append((path, int(regular.get("size", 0)), stat.S_IMODE(int(regular.get("mode", 0o644)))))
    return found


def highest_pid(images: Path) -> int:
    """Return the highest number that a process, thread, session or group of the tree in *images* has."""
    found = [int(match[1]) for path in images.glob("core-*.img") if (match := re.search(r"(\d+)", path.name))]
    for process in entries(images / "pstree.img"):
        # Not its threads: each has a core file, and of a process that has ended CRIU tells any number.
        found += [process["pid"], process["pgid"], process["sid"]]
    return max(found)


def rearm_timers(images: Path) -> None:
    """Have periodic timerfds go on that had expired, and not been read, when the tree stood still.

    The kernel arms such a timer again when it is read, and until then tells CRIU of no time left; CRIU 4.2 restores
    that as a timer that is switched off, and a read of it never returns. One that is off has no ticks.
    """
    import pycriu

    path = images / "files.img"
    with path.open("rb") as file:
        image = pycriu.images.load(file)
    found = False
    for entry in image["entries"]:
        timer = entry.get("tfd", {})
        left = timer.get("vsec", 0) or timer.get("vnsec", 0)
        if timer.get("ticks") and not left and (timer["isec"] or timer["insec"]):
            timer["vnsec"] = 1
            found = True
    if found:
        part = images / "files.img.new"
        with part.open("wb") as file:
            pycriu.images.dump(image, file)
        part.replace(path)


def root_pid(images: Path) -> int:
    """Return the PID of the root of the tree in *images*."""
    return int(entries(images / "pstree.img")[0]["pid"])


def require_owner(images: Path, uid: int) -> None:
    """Make sure that every task in *images* is user *uid*'s and holds no more rights than a user has.

    CRIU restores as root whatever credentials an image names; so they are looked at first. A job of root
    may hold anything.

    Raises:
        ImageError: a task is somebody else's, or holds capabilities.
    """
    if uid == 0:
        return
    for path in sorted(images.glob("core-*.img")):
        core = entries(path)[0]
        creds = core.get("thread_core", {}).get("creds")
        if creds is None:
            if core.get("tc", {}).get("task_state") == _TASK_DEAD:
                continue  # ended, and not yet waited for: it never runs again
            raise ImageError(f"{path.name}: holds no credentials")
        ids = {creds[name] for name in ("uid", "euid", "suid", "fsuid")}
        capabilities = [word for name in ("cap_prm", "cap_eff", "cap_inh") for word in creds.get(name, ())]
        if ids != {uid} or any(capabilities):
            raise ImageError(
                f"{path.name}: a task of user {', '.join(map(str, sorted(ids)))} "
                f"{'with capabilities ' if any(capabilities) else ''}in a checkpoint of user {uid}",
                hint="set-user-ID programs inside a job cannot be checkpointed",
            )
