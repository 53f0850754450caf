"""Outlast makes the jobs of a Slurm or PBS cluster outlast the nodes they run on.

For programs that run under it: ckpt(), tckpt(), on_ckpt(), exclude(), include(), active(), CheckpointFailed;
and for their critical data protect(), protect_file(), unprotect(), save(), load().
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outlast._ckpt import CheckpointFailed, active, ckpt, exclude, include, on_ckpt, tckpt
    from outlast._critical import load, protect, protect_file, save, unprotect

__version__ = "0.1.0"
__all__ = [
    "CheckpointFailed",
    "__version__",
    "active",
    "ckpt",
    "exclude",
    "include",
    "load",
    "on_ckpt",
    "protect",
    "protect_file",
    "save",
    "tckpt",
    "unprotect",
]
_CRITICAL = frozenset({"load", "protect", "protect_file", "save", "unprotect"})


def __getattr__(name: str) -> object:
    # Imported when used: every other part of Outlast imports this package too.
    if name in _CRITICAL:
        from outlast import _critical

        return getattr(_critical, name)
    if name in __all__:
        from outlast import _ckpt

        return getattr(_ckpt, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
