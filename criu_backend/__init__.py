"""CRIU for one process tree in a capsule: check, dump, restore. Knows nothing of jobs or stores."""

from __future__ import annotations

from criu_backend._capsule import Capsule, CapsuleError, Context, restore_capsule, start_capsule
from criu_backend._criu import Criu, Looked
from criu_backend._explain import INCOMPLETE, Finding, explain, way_out
from criu_backend._images import opened_files, pycriu_version, warm_up
from criu_backend._memory import Memory, put_back
from criu_backend._postcopy import PageServer, first_wanted, write_eager_pages
from criu_backend._result import DumpResult
from criu_backend._said import CriuError, error_from_log
from criu_backend._selftest import SelfTest, best_mode, known_self_test, self_test

__all__ = [
    "INCOMPLETE",
    "Capsule",
    "CapsuleError",
    "Context",
    "Criu",
    "CriuError",
    "DumpResult",
    "Finding",
    "Looked",
    "Memory",
    "PageServer",
    "SelfTest",
    "best_mode",
    "error_from_log",
    "explain",
    "first_wanted",
    "known_self_test",
    "opened_files",
    "put_back",
    "pycriu_version",
    "restore_capsule",
    "self_test",
    "start_capsule",
    "warm_up",
    "way_out",
    "write_eager_pages",
]
