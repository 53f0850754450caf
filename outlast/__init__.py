"""Outlast makes the jobs of a Slurm or PBS cluster outlast the nodes they run on.

For programs that run under it: ckpt(), on_ckpt() and CheckpointFailed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outlast._ckpt import CheckpointFailed, ckpt, on_ckpt

__version__ = "0.1.0"
__all__ = ["CheckpointFailed", "__version__", "ckpt", "on_ckpt"]


def __getattr__(name: str) -> object:
    # Imported when used: every other part of Outlast imports this package too.
    if name in ("CheckpointFailed", "ckpt", "on_ckpt"):
        from outlast import _ckpt

        return getattr(_ckpt, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
