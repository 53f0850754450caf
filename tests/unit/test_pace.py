"""What shipping may take of a node's processors."""

from __future__ import annotations

from collections.abc import Sequence

from outlast.manager._pace import paced


class Node:
    """Clocks of a node, and a memory each reading of which is followed by a second's work."""

    name = "pages-1.img"
    runs: Sequence[tuple[int, int, int]] = [(1, 0x1000, 1)]

    def __init__(self) -> None:
        self.wall = self.cpu = 100.0
        self.read = 0

    def readinto(self, space: int, vaddr: int, buffer: memoryview) -> None:
        self.read += 1
        self.wall += 1
        self.cpu += 1

    def sleep(self, seconds: float) -> None:
        self.wall += seconds

    def seconds_for(self, reads: int, share: float, *, hurry: bool = False) -> float:
        """How long it takes to read so often."""
        begin = self.wall
        (memory,) = paced(
            [self],
            share,
            hurry=lambda: hurry,
            wall=lambda: self.wall,
            cpu=lambda: self.cpu,
            sleep=self.sleep,
        )
        assert (memory.name, memory.runs) == (self.name, self.runs)
        for _ in range(reads):
            memory.readinto(1, 0x1000, memoryview(bytearray(4096)))
        assert self.read == reads
        return self.wall - begin


def test_shipping_takes_no_more_than_its_share_of_a_core() -> None:
    assert 18 <= Node().seconds_for(10, 0.5) <= 20


def test_without_a_share_nothing_is_held_back() -> None:
    assert Node().seconds_for(10, 0) == 10


def test_what_somebody_waits_for_is_not_held_back() -> None:
    assert Node().seconds_for(10, 0.5, hurry=True) == 10
