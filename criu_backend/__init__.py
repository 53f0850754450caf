"""CRIU for one process tree in a capsule: check, dump, restore. Knows nothing of jobs or stores."""

from __future__ import annotations

from criu_backend._capsule import Capsule, CapsuleError, Context, restore_capsule, start_capsule
from criu_backend._criu import Criu, CriuError, error_from_log
from criu_backend._memory import Memory, put_back
from criu_backend._result import DumpResult
from criu_backend._images import pycriu_version

__all__ = [
    "Capsule",
    "CapsuleError",
    "Context",
    "Criu",
    "CriuError",
    "DumpResult",
    "Memory",
    "error_from_log",
    "put_back",
    "pycriu_version",
    "restore_capsule",
    "start_capsule",
]
