"""Which of a job's checkpoints stay: a pure function of what there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outlast.model import Checkpoint, CheckpointId

_HOUR, _DAY = 3600, 86400


@dataclass(frozen=True)
class Policy:
    """What to keep, besides the newest checkpoint; whatever one of these wants stays.

    *last*: so many of the newest. *within*: all that are not older than so many seconds than the newest.
    *hourly*, *daily*: the newest of each of the last so many hours and days (UTC) that have one.
    """

    last: int = 1
    within: float = 0.0
    hourly: int = 0
    daily: int = 0

    def choose(self, checkpoints: Sequence[Checkpoint]) -> set[CheckpointId]:
        """Return which of *checkpoints*, newest first, stay."""
        if not checkpoints:
            return set()
        newest = checkpoints[0].created
        kept = {checkpoint.id for checkpoint in checkpoints[: max(1, self.last)]}
        kept |= {one.id for one in checkpoints if one.created >= newest - self.within}
        for length, count in ((_HOUR, self.hourly), (_DAY, self.daily)):
            seen: dict[int, CheckpointId] = {}
            for checkpoint in checkpoints:
                seen.setdefault(int(checkpoint.created // length), checkpoint.id)
            kept |= set(list(seen.values())[:count])
        return kept
