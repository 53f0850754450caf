"""Which version of the format a store has: a file at its top says so, and is looked at before all else."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from outlast.errors import ConfigError
from outlast.store._backend import Backend

VERSION = 1
NAME = "format"
_MARKER = {"outlast": "store", "version": VERSION}
_WRITING = frozenset({"create", "replace", "append", "touch", "clock"})


class Marked:
    """A backend whose store has the format of this Outlast, as far as its marker tells; made by `marked`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._looked = False
        self._there = False

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the backend has
        found = getattr(self._backend, name)
        if self._there or name in ("close", "mtime_step"):
            return found

        def looked(*args: Any, **options: Any) -> object:  # noqa: ANN401
            self._look(makes=name in _WRITING)
            return found(*args, **options)

        return looked

    def _look(self, *, makes: bool) -> None:
        if not self._looked:
            with contextlib.suppress(FileNotFoundError):
                _check(self._backend.read(NAME))
                self._there = True
            self._looked = True
        if makes and not self._there:
            # Somebody else may make it now: then it says the same, or this Outlast must keep off.
            with contextlib.suppress(FileExistsError):
                self._backend.create(NAME, [json.dumps(_MARKER, separators=(",", ":")).encode() + b"\n"])
            _check(self._backend.read(NAME))
            self._there = True


def _check(data: bytes) -> None:
    """Raise ConfigError unless *data* is the marker of a store that this Outlast understands."""
    try:
        marker = json.loads(data)
        kind, version = marker["outlast"], int(marker["version"])
    except (KeyError, TypeError, ValueError, RecursionError):
        kind, version = None, 0
    if kind != "store" or version < 1:
        raise ConfigError(
            f"the store: its file '{NAME}' is not one that Outlast wrote",
            hint="correct the url under [store]; if it is right, restore that file: docs/store-format.md",
        )
    if version > VERSION:
        raise ConfigError(
            f"the store: has format version {version}, and this Outlast knows {VERSION}",
            hint="install on this machine the Outlast of those that write there",
        )
