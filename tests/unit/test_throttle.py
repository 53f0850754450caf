"""All uploads of a node share one bandwidth, and share it fairly."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlast.config import StoreConfig
from outlast.store._local import LocalBackend
from outlast.store._throttle import Throttled

MIB = 1 << 20


class Node:
    """One clock, which goes on when somebody sleeps."""

    def __init__(self, here: Path) -> None:
        self.here = here
        self.now = 5000.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def uploader(self, name: str, rate: int) -> Throttled:
        (self.here / name).mkdir()
        backend = LocalBackend(self.here / name)
        return Throttled(backend, rate, self.here / "ledger", clock=lambda: self.now, sleep=self.sleep)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_an_upload_takes_as_long_as_its_bandwidth_says_and_is_whole(node: Node) -> None:
    data = bytes(range(256)) * 4096 * 8
    one = node.uploader("a", MIB)

    assert one.create("x", [data[: 3 * MIB], data[3 * MIB :]]) == 8 * MIB
    assert node.now - 5000 == pytest.approx(8, abs=0.3)
    assert one.read("x") == data


def test_two_uploads_have_their_turns_by_small_shares(node: Node) -> None:
    streams = [node.uploader(name, MIB)._paced([bytes(2 * MIB)]) for name in "ab"]
    done = [0, 0]
    while min(done) < 2 * MIB:
        for n, stream in enumerate(streams):
            done[n] += len(next(stream, b""))
            assert abs(done[0] - done[1]) <= MIB // 2

    assert node.now - 5000 == pytest.approx(4, abs=0.5)


def test_a_ledger_of_before_a_restart_of_the_machine_holds_nobody_up(node: Node) -> None:
    one = node.uploader("a", MIB)
    one.create("x", [bytes(MIB)])
    node.now = 3.0
    node.slept.clear()
    one.create("y", [bytes(MIB // 4)])

    assert sum(node.slept) == 0


@pytest.mark.parametrize("text", ["1", "10x", "-1M"])
def test_a_bandwidth_that_cannot_be_meant_is_refused(text: str) -> None:
    assert StoreConfig(bandwidth="100M").bandwidth_bytes == 100 * MIB
    with pytest.raises(ValueError, match="bandwidth"):
        StoreConfig(bandwidth=text)
