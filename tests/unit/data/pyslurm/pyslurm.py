"""Stands in for pyslurm, which is built against its site's Slurm: gives what a real one told, as objects."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

_HERE = Path(__file__).parent


class RPCError(Exception):
    """What the real one raises, in Slurm's words."""


class _Collection:
    key = ""

    def __init__(self, rows: list[SimpleNamespace]) -> None:
        self._rows = rows

    @classmethod
    def load(cls) -> _Collection:
        """Give the capture "now.json" beside this file, unless there is a file "away"."""
        if (_HERE / "away").exists():
            raise RPCError("Unable to contact slurm controller (connect failure)")
        rows = json.loads((_HERE / "now.json").read_text())[cls.key]
        return cls([SimpleNamespace(**row) for row in rows])

    def values(self) -> list[SimpleNamespace]:
        """All that there are."""
        return self._rows


class Jobs(_Collection):
    """See `pyslurm.Jobs`."""

    key = "jobs"


class Nodes(_Collection):
    """See `pyslurm.Nodes`."""

    key = "nodes"
