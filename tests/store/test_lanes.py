"""Long transfers to a server far away, where several connections share the work."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outlast.errors import OutlastError, StoreUnavailable
from outlast.model import CheckpointId, JobKey
from outlast.store import _lanes, _remote, open_store
from outlast.store._wire import Lost
from tests.store.conftest import remote

if TYPE_CHECKING:
    from tests.conftest import SshServer

FIRST, SECOND = CheckpointId(0, 1), CheckpointId(0, 2)


@pytest.fixture
def server(own_server: SshServer, monkeypatch: pytest.MonkeyPatch) -> SshServer:
    """A server that counts as one far away: four connections are worth their while, one with the other."""
    monkeypatch.setattr(_remote, "connections", lambda *_: 4)
    return own_server


@pytest.fixture
def large(tmp_path: Path) -> Path:
    directory = tmp_path / "large"
    directory.mkdir()
    with (directory / "pages-1.img").open("wb") as file:
        for _ in range(160):
            file.write(os.urandom(1 << 20))
    return directory


def test_more_connections_are_worth_it_only_far_away() -> None:
    assert _lanes.connections(0.0002) == _lanes.connections(0.005) == 1
    assert _lanes.connections(0.010) == 2
    assert _lanes.connections(0.020) == _lanes.connections(1.0) == 4
    assert _lanes.connections(0.020, 32 << 20) == 1


def test_image_comes_back_whole_over_several_connections(
    server: SshServer, job: JobKey, large: Path, tmp_path: Path
) -> None:
    with open_store(server.config(server.served)) as store:
        store.publish(job, FIRST, large, {})
        shipping = server.log.count("Accepted publickey")
        store.fetch(job, FIRST, tmp_path / "fetched")
        assert (tmp_path / "fetched/pages-1.img").read_bytes() == (large / "pages-1.img").read_bytes()

    assert 2 <= shipping <= 4
    assert shipping < server.log.count("Accepted publickey") <= 7


def test_connections_that_helped_end_with_the_checkpoint(server: SshServer, job: JobKey, large: Path) -> None:
    with open_store(server.config(server.served)) as store:
        store.publish(job, FIRST, large, {})
        assert server.log.count("Accepted publickey") > 1
        until = time.monotonic() + 10
        while len(server.sessions()) > 1 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(server.sessions()) == 1
        assert store.checkpoints(job)[0].id == FIRST


def test_small_files_are_not_worth_a_connection(server: SshServer, job: JobKey, source: Path) -> None:
    with open_store(server.config(server.served)) as store:
        store.publish(job, FIRST, source, {})
        time.sleep(0.3)

    assert server.log.count("Accepted publickey") == 1


def test_transfer_goes_on_alone_where_the_server_wants_no_more(server: SshServer, large: Path) -> None:
    data = (large / "pages-1.img").read_bytes()
    backend = remote(server, server.served)
    connect = backend._connected
    calls = []

    def once() -> object:
        calls.append(1)
        if len(calls) > 1:
            raise Lost("no more of you")
        return connect()

    backend._connected = once  # type: ignore[assignment, method-assign]
    assert backend.create("file", [data]) == len(data)
    assert len(calls) == 2
    assert b"".join(backend.read_ranges("file", [(0, 100), (100, len(data) - 100)])) == data
    backend.close()


def test_loss_of_a_connection_that_helps_is_no_loss_of_data(
    server: SshServer, job: JobKey, large: Path, tmp_path: Path
) -> None:
    with open_store(server.config(server.served)) as store:
        outcome: list[OutlastError | None] = []

        def publish() -> None:
            try:
                store.publish(job, FIRST, large, {})
                outcome.append(None)
            except OutlastError as error:
                outcome.append(error)

        thread = threading.Thread(target=publish)
        thread.start()
        until = time.monotonic() + 30
        while server.log.count("Accepted publickey") < 3 and time.monotonic() < until:
            time.sleep(0.002)
        server.kill()
        thread.join(30)
        server.start()

        assert outcome == [None] or isinstance(outcome[0], StoreUnavailable)
        store.publish(job, SECOND, large, {})
        store.fetch(job, SECOND, tmp_path / "fetched")
        assert (tmp_path / "fetched/pages-1.img").read_bytes() == (large / "pages-1.img").read_bytes()
