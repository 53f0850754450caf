"""What a store says and does when its server is away, stuck, another one, or lets nobody in."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outlast.errors import OutlastError, StoreRefused, StoreUnavailable
from outlast.model import CheckpointId, JobKey, Lease
from outlast.store import open_store

if TYPE_CHECKING:
    from tests.conftest import SshServer, StartSshd

FIRST, SECOND = CheckpointId(0, 1), CheckpointId(0, 2)
LARGE = 96 << 20


@pytest.fixture
def server(own_server: SshServer) -> SshServer:
    return own_server


@pytest.fixture
def top(server: SshServer) -> Path:
    return server.served


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """An image that takes a while to ship."""
    directory = tmp_path / "large"
    directory.mkdir()
    with (directory / "pages-1.img").open("wb") as file:
        for _ in range(LARGE >> 20):
            file.write(os.urandom(1 << 20))
    return directory


def in_background(call: Callable[[], object]) -> tuple[threading.Thread, list[OutlastError | None]]:
    """Start *call*; when the thread has ended, the list holds what it raised."""
    outcome: list[OutlastError | None] = []

    def run() -> None:
        try:
            call()
            outcome.append(None)
        except OutlastError as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.002)


def stored_bytes(directory: Path) -> int:
    """Bytes in *directory*, unfinished files too, which may come and go while this looks."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def test_server_killed_in_the_middle_of_an_upload_leaves_nothing_half_visible(
    server: SshServer, top: Path, job: JobKey, large: Path, source: Path
) -> None:
    with open_store(server.config(top)) as store:
        store.publish(job, FIRST, source, {})
        thread, outcome = in_background(lambda: store.publish(job, SECOND, large, {}))
        wait_until(lambda: stored_bytes(top) > 8 << 20)
        server.kill()
        thread.join(30)

        assert isinstance(outcome[0], StoreUnavailable)
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1"):
            store.checkpoints(job)
        assert stored_bytes(top) < LARGE

        server.start()
        assert [checkpoint.id for checkpoint in store.checkpoints(job)] == [FIRST]
        third = CheckpointId(0, 3)
        store.publish(job, third, large, {})
        assert store.forget(job, 1) == 1
        assert [checkpoint.id for checkpoint in store.checkpoints(job)] == [third]
        files = (path for path in (top / "jobs/testbed/17").rglob("*.*") if path.is_file())
        assert {path.suffix for path in files} == {".ck", ".pack"}


def test_server_killed_in_the_middle_of_a_download_leaves_nothing_behind(
    server: SshServer, top: Path, job: JobKey, large: Path, tmp_path: Path
) -> None:
    fetched = tmp_path / "spool"
    fetched.mkdir()
    with open_store(server.config(top)) as store:
        store.publish(job, FIRST, large, {})
        thread, outcome = in_background(lambda: store.fetch(job, FIRST, fetched / "image"))
        wait_until(lambda: any(path.stat().st_blocks for path in fetched.rglob("pages*")))
        server.kill()
        thread.join(30)

        assert isinstance(outcome[0], StoreUnavailable)
        assert list(fetched.iterdir()) == []
        server.start()
        store.fetch(job, FIRST, fetched / "image")
        assert (fetched / "image/pages-1.img").read_bytes() == (large / "pages-1.img").read_bytes()


def test_server_that_started_again_meanwhile_is_not_noticed(
    server: SshServer, top: Path, job: JobKey
) -> None:
    lease = Lease(job, 0, "n1", 2000)
    with open_store(server.config(top)) as store:
        store.renew_lease(lease)
        store.put_record(job, "start", {"a": 1})
        before = store.leases("testbed")
        server.kill()
        server.start()
        time.sleep(0.3)  # for the end of the old connection to arrive

        assert store.get_record(job, "start") == {"a": 1}
        store.renew_lease(lease)
        assert [view.lease for view in store.leases("testbed")] == [view.lease for view in before]


def test_silent_server_is_unavailable_after_the_timeout(
    server: SshServer, top: Path, job: JobKey, source: Path
) -> None:
    lease = Lease(job, 0, "n1", 2000)
    with open_store(server.config(top, timeout=1.0)) as store:
        store.renew_lease(lease)
        server.stop()
        for call in (
            lambda: store.renew_lease(lease),  # on the connection that stands
            lambda: store.renew_lease(lease),  # on none: the server's kernel takes it, and no more
            lambda: store.checkpoints(job),
        ):
            start = time.monotonic()
            with pytest.raises(StoreUnavailable, match="no answer within 1 s"):
                call()
            assert 0.9 <= time.monotonic() - start < 6
        server.resume()

        store.renew_lease(lease)
        assert [view.lease for view in store.leases("testbed")] == [lease]


@pytest.mark.parametrize("doing", ["publish", "fetch"])
def test_server_that_falls_silent_in_the_middle_is_unavailable_after_the_timeout(
    server: SshServer, top: Path, job: JobKey, large: Path, tmp_path: Path, doing: str
) -> None:
    with open_store(server.config(top, timeout=1.0)) as store:
        if doing == "publish":
            thread, outcome = in_background(lambda: store.publish(job, FIRST, large, {}))
            wait_until(lambda: stored_bytes(top) > 4 << 20)
        else:
            store.publish(job, FIRST, large, {})
            thread, outcome = in_background(lambda: store.fetch(job, FIRST, tmp_path / "fetched"))
            wait_until(lambda: any(path.stat().st_blocks for path in tmp_path.rglob("*fetched*/pages*")))
        server.stop()
        start = time.monotonic()
        thread.join(30)

        assert time.monotonic() - start < 6
        assert isinstance(outcome[0], StoreUnavailable)
        server.resume()
        store.publish(job, SECOND, large, {})
        assert store.checkpoints(job)[0].id == SECOND


class Relay:
    """Hands bytes to a server and back, until it is told to take no more; its buffers are small.

    *rate*: bytes a second that go to the server.
    """

    def __init__(self, port: int, rate: float = 1e12) -> None:
        self._to = port
        self._rate = rate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        self.port = int(self._listener.getsockname()[1])
        self.stopped = threading.Event()
        self.done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        near, _ = self._listener.accept()
        with near, socket.create_connection(("127.0.0.1", self._to)) as far:
            while not self.stopped.is_set():
                for ready in select.select([near, far], [], [], 0.05)[0]:
                    data = ready.recv(4096)
                    if not data:
                        self.stopped.set()
                    (far if ready is near else near).sendall(data)
                    time.sleep(len(data) / self._rate if ready is near else 0)
            self.done.wait(60)

    def close(self) -> None:
        self.stopped.set()
        self.done.set()
        self._thread.join(60)
        self._listener.close()


def test_slow_link_is_no_silent_server(server: SshServer, top: Path, job: JobKey, tmp_path: Path) -> None:
    relay = Relay(server.port, rate=2e6)
    server.known_hosts.write_text(server.known_hosts.read_text().replace(str(server.port), str(relay.port)))
    config = server.config(top, timeout=1.0)
    config = dataclasses.replace(config, url=config.url.replace(str(server.port), str(relay.port)))
    image = tmp_path / "image"
    image.mkdir()
    (image / "pages").write_bytes(os.urandom(4 << 20))
    with open_store(config) as store:
        store.publish(job, FIRST, image, {})  # takes twice as long as a server may be silent
        store.fetch(job, FIRST, tmp_path / "fetched")
    relay.close()

    assert (tmp_path / "fetched/pages").read_bytes() == (image / "pages").read_bytes()


def test_server_that_takes_no_more_bytes_is_unavailable_after_the_timeout(
    server: SshServer, top: Path, job: JobKey, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = socket.create_connection

    def connect_narrowly(address: tuple[str, int], timeout: float | None = None) -> socket.socket:
        connection = connect(address, timeout)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        return connection

    relay = Relay(server.port)
    config = server.config(top, timeout=1.0)
    server.known_hosts.write_text(server.known_hosts.read_text().replace(str(server.port), str(relay.port)))
    config = dataclasses.replace(config, url=config.url.replace(str(server.port), str(relay.port)))
    monkeypatch.setattr("outlast.store._sftp.socket.create_connection", connect_narrowly)
    with open_store(config) as store:
        thread, outcome = in_background(lambda: store.publish(job, FIRST, large, {}))
        wait_until(lambda: stored_bytes(top) > 1 << 20)
        relay.stopped.set()
        start = time.monotonic()
        thread.join(30)
        taken = time.monotonic() - start
        relay.close()

        assert taken < 8
        assert isinstance(outcome[0], StoreUnavailable)


def test_absent_server_is_unavailable(server: SshServer, top: Path, job: JobKey) -> None:
    server.kill()

    with open_store(server.config(top)) as store:
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match=r"(?i)refused"):
                store.checkpoints(job)


def test_host_without_an_address_is_unavailable(server: SshServer, top: Path, job: JobKey) -> None:
    config = dataclasses.replace(server.config(top), url="sftp://root@no-such-host.invalid/ckpt")

    with open_store(config) as store, pytest.raises(StoreUnavailable, match=r"no-such-host\.invalid"):
        store.checkpoints(job)


def test_read_only_server_is_refused(
    start_sshd: StartSshd, transport: str, job: JobKey, source: Path
) -> None:
    server = start_sshd(sftp="internal-sftp -R")
    server.transport = transport
    with open_store(server.config(server.served)) as store:
        assert store.checkpoints(job) == []
        for call in (
            lambda: store.publish(job, FIRST, source, {}),
            lambda: store.put_record(job, "start", {}),
            lambda: store.append_events(job, "m0", [{}]),
            lambda: store.renew_lease(Lease(job, 0, "n1", 2000)),
        ):
            with pytest.raises(StoreRefused, match="permission denied"):
                call()
    server.kill()


def test_full_server_says_so(server: SshServer, small_disk: Path, job: JobKey, large: Path) -> None:
    with open_store(server.config(small_disk)) as store:
        with pytest.raises(StoreRefused, match="no space") as caught:
            store.publish(job, FIRST, large, {})
        assert caught.value.hint == "make room on the server"
        assert stored_bytes(small_disk / "jobs") == 0
        store.put_record(job, "start", {})
