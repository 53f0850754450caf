"""One job on one node: builds its capsule, starts or restores it there, checkpoints it, ships, reports."""

from __future__ import annotations

from outlast.manager._daemon import RUNTIME, Manager

__all__ = ["RUNTIME", "Manager"]
