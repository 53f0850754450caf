"""Whether a tree has TCP connections."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

_LISTEN, _CLOSE = "0A", "07"  # proc_pid_net(5), /proc/net/tcp; net/tcp_states.h


def has_connections(pids: Iterable[int]) -> bool:
    """Return whether a process of *pids* has a TCP connection open, its own listening sockets apart.

    What cannot be found out counts as yes. A connection may be made right afterwards.
    """
    for pid in pids:
        sockets: set[str] = set()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    match = re.fullmatch(r"socket:\[(\d+)\]", str(fd.readlink()))
                    if match:
                        sockets.add(match[1])
            if sockets and sockets & _connected(pid):
                return True
    return False


def _connected(pid: int) -> set[str]:
    """Return the inodes of the TCP connections in the network namespace of *pid*."""
    found = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] not in (_LISTEN, _CLOSE):
                    found.add(fields[9])
    return found
