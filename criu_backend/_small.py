"""Small twins are read, and end, as soon as the job goes on, and leave it no faults."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from criu_backend._capsule import Capsule, _inner_pid
from criu_backend._headroom import Headroom
from criu_backend._regain import regain
from criu_backend._twins import Twin

# What twins hold in all, in bytes, that is read at once, within some 15 ms.
_MOST_TAKEN = 64 << 20
# By so many bytes a tree may grow between the making of the room and its freezing.
_GROWTH = 2 << 20


def make_room(headroom: Headroom) -> memoryview | None:
    """Have memory ready for what the twins of a small tree will hold, None where it is large or memory short.

    That takes as long as reading them does, and this can be done before the tree is frozen.
    """
    size = headroom.resident()
    if size > _MOST_TAKEN or not headroom.is_ample(size):
        return None
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    try:
        return memoryview(mmap.mmap(-1, size + _GROWTH, flags=flags))
    except OSError:  # as where memory may not be overcommitted
        return None


def take(twins: Sequence[Twin], capsule: Capsule, room: memoryview | None) -> None:
    """Read into *room* and end the twins of the tree in *capsule*, if all fit in.

    While they live each page that the job writes to is copied, and its first write to a page afterwards would be a
    fault for nothing. Raises OSError when a twin has ended.
    """
    sizes = [twin.size() for twin in twins]
    if room is None or sum(sizes) > len(room):
        return
    for twin, size in zip(twins, sizes, strict=True):
        twin.take(room[:size])
        room = room[size:]
    here = {_inner_pid(pid): pid for pid in capsule.tasks()}
    for twin in twins:
        if twin.pid in here and twin.await_end():
            regain(here[twin.pid], twin.pages())
