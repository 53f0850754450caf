"""A node's own directory and the store behind it, as one place for checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

from outlast.errors import StoreUnavailable
from outlast.store._backend import Backend, Entry
from outlast.store._local import LocalBackend


class TieredBackend:
    """See `Backend`: files are made and removed here, and read here or else in the store behind.

    Only for checkpoints: what else a store has is not in a node's directory.
    """

    mtime_step = 1.0

    def __init__(self, local: LocalBackend, behind: Backend) -> None:
        self._local = local
        self._behind = behind
        self._alone = False
        self._seen: dict[str, list[Entry]] = {}  # what the store behind was last seen to have

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._behind, name)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Meanwhile ask the store behind for nothing: it has what it was last seen to have, and cannot be read."""
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def create(self, name: str, chunks: Iterable[bytes]) -> int:
        """See `Backend.create`. What is of no checkpoint, such as the note of a quota, is for everybody."""
        return self._owner(name).create(name, chunks)

    def remove(self, name: str) -> bool:
        """See `Backend.remove`."""
        return self._owner(name).remove(name)

    def read(self, name: str) -> bytes:
        """See `Backend.read`."""
        try:
            return self._local.read(name)
        except FileNotFoundError:
            if self._alone:
                raise
        return self._behind.read(name)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """See `Backend.read_ranges`."""
        is_here = self._alone or self._local.entry(name) is not None
        yield from (self._local if is_here else self._behind).read_ranges(name, ranges)

    def read_each(self, wanted: Sequence[tuple[str, int, int]]) -> Generator[bytes, None, None]:
        """See `Backend.read_each`."""
        if self._alone:
            yield from self._local.read_each(wanted)
            return
        here = [self._local.entry(name) is not None for name, _, _ in wanted]
        far = self._behind.read_each([one for one, mine in zip(wanted, here, strict=True) if not mine])
        for one, mine in zip(wanted, here, strict=True):
            yield from self._local.read_each([one]) if mine else [next(far)]

    def entry(self, name: str) -> Entry | None:
        """See `Backend.entry`, of this node alone: whether a name is free in the store shows when it is shipped."""
        return self._local.entry(name)

    def list(self, directory: str) -> list[Entry]:
        """See `Backend.list`."""
        if not self._alone:
            self._seen[directory] = self._behind.list(directory)
        found = {entry.name: entry for entry in self._seen.get(directory, ())}
        found |= {entry.name: entry for entry in self._local.list(directory)}
        return sorted(found.values(), key=lambda entry: entry.name)

    def _owner(self, name: str) -> Backend:
        if name.startswith("jobs/"):
            return self._local
        if self._alone:
            raise StoreUnavailable(f"{name}: the store does not answer")
        return self._behind
