"""The batch script that slurmd keeps for a job on its node: gone with the job, and open in the job's shell."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path

# Below SlurmdSpoolDir, whatever that is. No component begins with a dot, so it leads where it says.
_SPOOLED = re.compile(r"(?:/\w[\w.-]*)+/job\d+/slurm_script")
_NAME = "script"
_MOST_BYTES = 64 << 20  # sbatch takes 4 MiB unless max_script_size says otherwise


def keep_script(program: str, images: Path) -> None:
    """Add to *images* the batch script *program*, if it is one, for a restore where no slurmd brings it."""
    if not _SPOOLED.fullmatch(program):
        return
    # A dump without it is as good as ever to the scheduler.
    with contextlib.suppress(OSError):
        source = os.open(program, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(source, "rb") as file:
            (images / _NAME).write_bytes(file.read(_MOST_BYTES))


def put_script(program: str, images: Path, uid: int) -> None:
    """Put the script in *images* to where the job of user *uid* had it open, if there is none.

    Only root's own directories are gone through: what the program is called is the user's word.

    Raises OSError: that place cannot be written to.
    """
    if not _SPOOLED.fullmatch(program) or not (images / _NAME).exists():
        return
    for parent in reversed(Path(program).parents):
        parent.mkdir(mode=0o755, exist_ok=True)
        facts = parent.lstat()
        if facts.st_uid != 0 or not stat.S_ISDIR(facts.st_mode):
            return
    with contextlib.suppress(FileExistsError):
        target = os.open(program, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o700)
        with os.fdopen(target, "wb") as file:
            file.write((images / _NAME).read_bytes())
            os.fchown(target, uid, -1)
