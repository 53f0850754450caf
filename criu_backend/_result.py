"""What a dump gives: small files in a directory, the memory beside them, and what it cost."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from criu_backend._capsule import Capsule
from criu_backend._forked import complete
from criu_backend._headroom import Headroom
from criu_backend._images import statistics
from criu_backend._memory import FileMemory, Memory, take_pages
from criu_backend._pagemap import PAGE
from criu_backend._predicted import verify
from criu_backend._small import take
from criu_backend._twins import Keeper, Twin, read_twins


@dataclass(frozen=True)
class DumpResult:
    """A dump: the job runs again, and its memory is to be read from *memories* before `close`.

    *mode* is how it was made: "forked", "lazy" (forked, by CRIU's own lazy pages) or "plain"; *reason* says
    why it is "plain", or in part, where something else was asked for. The job stood still for *pause*
    seconds, of which *copy_seconds* went into copying page tables; *image_bytes* is the size of all, memory
    included.
    """

    pause: float
    image_bytes: int
    criu_version: str
    mode: str
    reason: str | None
    memories: Sequence[Memory]
    copy_seconds: float = 0.0
    _closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    def close(self) -> None:
        """Free what the memories are in: files and twins. Reading them is over."""
        self._closing.close()

    def __enter__(self) -> DumpResult:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def collect(
    images: Path,
    capsule: Capsule,
    mode: str,
    *,
    criu_version: str,
    headroom: Headroom,
    room: memoryview | None,
    reason: str | None = None,
) -> DumpResult:
    """Make a result of what CRIU, and with a *mode* other than "plain" its plugin, left behind.

    Args:
        headroom: asked again and again, from another thread, whether the twins must end for want of memory.
        room: memory for what small twins hold; see `make_room`.

    Raises:
        ImageError: the images are not what they should be.
        OSError: a twin has ended, or *images* cannot be written. Nothing is left behind but *images* itself.
    """
    with contextlib.ExitStack() as closing:
        aside = images.with_name(images.name + ".pages")
        closing.callback(shutil.rmtree, aside, ignore_errors=True)
        written: list[FileMemory] = []
        memories: Sequence[Memory] = written
        twins: list[Twin] = []
        frozen = 0.0
        if mode != "plain":
            twins, without, frozen = read_twins(capsule, images)
            closing.callback(Keeper(twins, headroom.is_short).close)
            take(twins, capsule, room)
            for twin in twins:
                verify(images, twin)
            (images / "twins").unlink()
            if without:
                reason = f"{len(without)} of {len(without) + len(twins)} processes could have no twin"
        for memory in take_pages(images, aside):
            closing.callback(memory.close)
            written.append(memory)
        if twins:
            memories = complete(images, written, twins)
        size = sum(file.stat().st_size for file in images.iterdir())
        size += sum(pages * PAGE for memory in memories for _, _, pages in memory.runs)
        return DumpResult(
            pause=frozen if mode == "lazy" else statistics(images)["frozen_time"] / 1e6,
            image_bytes=size,
            criu_version=criu_version,
            mode=mode if twins else "plain",
            reason=reason,
            memories=memories,
            copy_seconds=sum(twin.copy_seconds for twin in twins),
            _closing=closing.pop_all(),
        )
    raise AssertionError
