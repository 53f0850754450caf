"""CRIU reaches the job's files as the job's owner: what native/owner.c, loaded into it, has to be told."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

# Loaded into CRIU: native/owner.c.
OWNER_LIBRARY = Path("/usr/libexec/outlast/outlast-owner.so")


def as_owner(environment: Mapping[str, str], pid: int | None) -> dict[str, str]:
    """Return *environment*, for a CRIU, with which that reaches the files of a job as process *pid* would.

    Args:
        pid: a process of the job's owner; where it has ended, and for a job of root's, nothing is added.
    """
    added = dict(environment)
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return added
    # The fourth of each are those by which files are reached: proc_pid_status(5).
    ids = {name: re.findall(r"\d+", value) for name, value in re.findall(r"^(\w+):(.*)$", status, re.M)}
    uid, gid = ids["Uid"][3], ids["Gid"][3]
    if uid != "0" and OWNER_LIBRARY.exists():
        added["OUTLAST_OWNER"] = f"{uid}:{gid}:{','.join(ids['Groups'])}"
        added["LD_PRELOAD"] = ":".join(
            filter(None, (environment.get("LD_PRELOAD"), os.fspath(OWNER_LIBRARY)))
        )
    return added
