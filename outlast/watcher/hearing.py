"""For how long nothing has been heard of each manager, by the watcher's own clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from outlast.model import Lease, LeaseView


class Hearing:
    """Remembers when each lease's count of beats was last seen to have grown.

    Times of files would be of no use: SFTP tells them in whole seconds, and by another machine's clock. A
    lease counts as heard when it is first seen, so a watcher that has just begun takes nobody for dead.
    """

    def __init__(self) -> None:
        self._beats: dict[Lease, tuple[int, float]] = {}
        self.quiet: Mapping[Lease, float] = {}

    def hear(self, views: Iterable[LeaseView], now: float) -> None:
        """Take note of the leases as they were read at *now* (monotonic, seconds); `quiet` tells of them."""
        beats = {}
        for view in views:
            known = self._beats.get(view.lease)
            beats[view.lease] = known if known is not None and known[0] == view.beat else (view.beat, now)
        self._beats = beats
        self.quiet = {lease: now - since for lease, (_, since) in beats.items()}

    def forget(self) -> None:
        """The leases could not be read: that nothing was heard meanwhile proves nothing."""
        self._beats = {}
        self.quiet = {}
