"""How much memory a job may still take, by its memory cgroups and the machine: what twins cost it.

A twin shares its process's memory until that is written to; each page that the process then writes is
copied, and counts as the job's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_MIB = 1 << 20
# To begin with: what must be free, of the tree's memory, and at least. While twins live: of the limit.
_SHARE_TO_BEGIN = 0.10
_LEAST_TO_BEGIN = 32 * _MIB
_SHARE_TO_GO_ON = 0.05
_MOST_TO_GO_ON = 256 * _MIB
_PAGE_TABLE_SHARE = 512  # an entry of 8 bytes for a page of 4096


@dataclass(frozen=True)
class _Group:
    """One memory cgroup: the files that say what it may use, uses, and could give back (bytes)."""

    limit: Path
    usage: Path
    stat: Path

    def free(self) -> tuple[int, int] | None:
        """Return (bytes free, limit), or None where there is no limit."""
        limit = _number(self.limit)
        usage = _number(self.usage)
        if limit is None or usage is None or limit >= 1 << 60:
            return None
        reclaimable = sum(
            int(value)
            for value in re.findall(r"^(?:total_)?(?:in)?active_file (\d+)$", _text(self.stat), re.M)
        )
        return limit - max(usage - reclaimable, 0), limit


class Headroom:
    """What the processes of a tree, *pids*, may still take."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = list(pids)
        self._groups = _memory_groups(self._pids[0]) if self._pids else []
        self._last_free: int | None = None

    def resident(self) -> int:
        """Return how much memory of their own, in bytes, the processes have."""
        return sum(_resident(pid) for pid in self._pids)

    def shortage(self) -> str | None:
        """Return why there is no room for twins, or None where there is."""
        size = self.resident()
        need = max(int(size * _SHARE_TO_BEGIN), _LEAST_TO_BEGIN) + size // _PAGE_TABLE_SHARE
        free = self._free()
        if free is not None and free[0] < need:
            return f"twins may need {need // _MIB} MiB, and {max(free[0], 0) // _MIB} MiB are free"
        return None

    def is_ample(self, size: int) -> bool:
        """Return whether *size* bytes may be taken twice, here and by the tree, without its being short then."""
        free = self._free()
        # If both are between two calls of is_short(), that reckons with twice as much again.
        return free is None or free[0] >= (2 + 4) * size + _kept_free(free[1])

    def is_short(self) -> bool:
        """Return whether twins must end now, before the kernel ends something of the job.

        To be asked at even intervals: what was taken since the last time may be taken twice over by the next.
        """
        free = self._free()
        if free is None:
            return False
        taken = max(self._last_free - free[0], 0) if self._last_free is not None else 0
        self._last_free = free[0]
        return free[0] < _kept_free(free[1]) + 2 * taken

    def _free(self) -> tuple[int, int] | None:
        """Return (bytes free, of how many) where it is tightest."""
        memory = {
            key: int(value) * 1024
            for key, value in re.findall(r"^(\w+):\s+(\d+) kB", _text(Path("/proc/meminfo")), re.M)
        }
        found = [free for group in self._groups if (free := group.free()) is not None]
        if "MemAvailable" in memory:
            found.append((memory["MemAvailable"], memory["MemTotal"]))
        return min(found, default=None)


def _kept_free(limit: int) -> int:
    return min(int(limit * _SHARE_TO_GO_ON), _MOST_TO_GO_ON)


def _memory_groups(pid: int) -> list[_Group]:
    """Return the memory cgroup of *pid* and those above it, as far as they can be seen from here.

    Source: cgroups(7), proc_pid_mountinfo(5).
    """
    paths = dict(re.findall(r"^\d+:([^:]*):(.*)$", _text(Path(f"/proc/{pid}/cgroup")), re.M))
    groups = []
    for line in _text(Path("/proc/self/mountinfo")).splitlines():
        left, _, right = line.partition(" - ")
        root, mount = left.split()[3:5]
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup" and "memory" in options.split(","):
            path = next((path for names, path in paths.items() if "memory" in names.split(",")), None)
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
        elif kind == "cgroup2":
            path = paths.get("")
            names = ("memory.max", "memory.current", "memory.stat")
        else:
            continue
        if path is None or path.startswith("/.."):
            continue
        top = Path(mount)
        inside = Path(path)
        if root != "/" and inside.is_relative_to(root):
            inside = Path("/") / inside.relative_to(root)
        for directory in (inside, *inside.parents):
            files = [top / directory.relative_to("/") / name for name in names]
            if files[0].exists():
                groups.append(_Group(*files))
    return groups


def _resident(pid: int) -> int:
    """Return how much memory of its own, in bytes, process *pid* has."""
    match = re.search(r"^RssAnon:\s+(\d+) kB", _text(Path(f"/proc/{pid}/status")), re.M)
    return int(match[1]) * 1024 if match else 0


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
