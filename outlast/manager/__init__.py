"""One job on one node: builds its capsule, starts or restores it there, checkpoints it, ships, reports."""

from __future__ import annotations

from outlast.manager._daemon import RUNTIME, Manager
from outlast.manager._files import open_for_writing
from outlast.manager._findings import as_dictionary
from outlast.manager._script import put_script

__all__ = ["RUNTIME", "Manager", "as_dictionary", "open_for_writing", "put_script"]
