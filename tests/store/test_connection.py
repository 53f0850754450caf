"""What a store says and does when its server is away, stuck, another one, or lets nobody in."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from outlast.config import StoreConfig
from outlast.errors import ConfigError, OutlastError, StoreRefused, StoreUnavailable
from outlast.model import CheckpointId, JobKey, Lease
from outlast.store import Store, open_store

if TYPE_CHECKING:
    from tests.conftest import SshServer, StartSshd

FIRST, SECOND = CheckpointId(0, 1), CheckpointId(0, 2)
LARGE = 96 << 20


@pytest.fixture
def server(start_sshd: StartSshd) -> Iterator[SshServer]:
    """A server of this test's own, to be mistreated."""
    server = start_sshd()
    yield server
    server.resume()
    server.kill()


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
        assert [path.name for path in (top / "jobs/testbed/17/data").iterdir()] == ["0-3.bin"]


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


# --- who is who ---------------------------------------------------------------------------------------


def refusal(config: StoreConfig, job: JobKey) -> OutlastError:
    with open_store(config) as store, pytest.raises(OutlastError) as caught:
        store.checkpoints(job)
    return caught.value


def test_unknown_host_key_is_refused_and_told(
    server: SshServer, top: Path, job: JobKey, tmp_path: Path
) -> None:
    known = tmp_path / "known"
    known.write_text("")
    error = refusal(dataclasses.replace(server.config(top), known_hosts=known), job)

    assert isinstance(error, ConfigError)
    assert f"[127.0.0.1]:{server.port}" in str(error)
    assert str(known) in str(error)
    assert fingerprint(server.host_key) in str(error)
    assert known.read_text() == ""
    assert error.hint is not None
    known.write_text(error.hint.partition("the line: ")[2] + "\n")  # as the hint says
    with open_store(dataclasses.replace(server.config(top), known_hosts=known)) as store:
        assert store.checkpoints(job) == []


def test_changed_host_key_is_refused_and_told(
    server: SshServer, top: Path, job: JobKey, tmp_path: Path
) -> None:
    known = tmp_path / "known"
    other = (server.key.with_suffix(".pub")).read_text().split()[:2]
    known.write_text(f"[127.0.0.1]:{server.port} {' '.join(other)}\n")
    error = refusal(dataclasses.replace(server.config(top), known_hosts=known), job)

    assert isinstance(error, ConfigError)
    assert str(known) in str(error)
    assert fingerprint(server.host_key) in str(error)
    assert "not the one" in str(error)


def test_host_key_of_another_port_does_not_count(
    server: SshServer, top: Path, job: JobKey, tmp_path: Path
) -> None:
    known = tmp_path / "known"
    known.write_text(server.known_hosts.read_text().replace(str(server.port), "22"))

    assert isinstance(refusal(dataclasses.replace(server.config(top), known_hosts=known), job), ConfigError)


def test_hashed_known_hosts_are_understood(server: SshServer, top: Path, job: JobKey, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.write_text(server.known_hosts.read_text())
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True)

    assert "127.0.0.1" not in known.read_text()
    with open_store(dataclasses.replace(server.config(top), known_hosts=known)) as store:
        assert store.checkpoints(job) == []


@pytest.mark.parametrize("kind", ["ecdsa", "rsa"])
def test_server_may_be_known_by_any_of_its_keys(
    start_sshd: StartSshd, job: JobKey, tmp_path: Path, kind: str
) -> None:
    key = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(key)], check=True)
    server = start_sshd(extra=f"HostKey {key}\n")
    known = tmp_path / "known"
    public = " ".join(key.with_suffix(".pub").read_text().split()[:2])
    known.write_text(f"[127.0.0.1]:{server.port} {public}\n")

    with open_store(dataclasses.replace(server.config(server.served), known_hosts=known)) as store:
        assert store.checkpoints(job) == []
    server.kill()


@pytest.mark.parametrize("kind", ["ecdsa", "rsa"])
def test_user_key_may_be_of_any_usual_kind(
    server: SshServer, top: Path, job: JobKey, tmp_path: Path, kind: str
) -> None:
    key = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(key)], check=True)
    with server.key.with_suffix(".pub").open("a") as authorized:
        authorized.write(key.with_suffix(".pub").read_text())

    with open_store(dataclasses.replace(server.config(top), identity=key)) as store:
        assert store.checkpoints(job) == []


def test_refused_user_key_is_told_with_the_line_that_is_missing(
    server: SshServer, top: Path, job: JobKey, tmp_path: Path
) -> None:
    key = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    error = refusal(dataclasses.replace(server.config(top), identity=key), job)

    assert isinstance(error, StoreRefused)
    assert str(key) in str(error)
    public = " ".join(key.with_suffix(".pub").read_text().split()[:2])
    assert error.hint is not None
    assert public in error.hint


def test_no_other_key_of_this_user_is_tried(
    server: SshServer, top: Path, job: JobKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    (home / ".ssh/id_ed25519").write_bytes(server.key.read_bytes())
    (home / ".ssh/known_hosts").write_bytes(server.known_hosts.read_bytes())
    key = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    monkeypatch.setenv("HOME", str(home))

    assert isinstance(refusal(dataclasses.replace(server.config(top), identity=key), job), StoreRefused)
    empty = tmp_path / "known"
    empty.write_text("")
    assert isinstance(refusal(dataclasses.replace(server.config(top), known_hosts=empty), job), ConfigError)


def test_server_without_sftp_is_told(start_sshd: StartSshd, job: JobKey) -> None:
    server = start_sshd(sftp="/bin/false")
    error = refusal(server.config(server.served), job)
    server.kill()

    assert isinstance(error, StoreRefused | StoreUnavailable)
    assert "127.0.0.1" in str(error)


def test_read_only_server_is_refused(start_sshd: StartSshd, job: JobKey, source: Path) -> None:
    server = start_sshd(sftp="internal-sftp -R")
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
        assert stored_bytes(small_disk) == 0
        store.put_record(job, "start", {})


# --- configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "is not set"),
        ("/srv/ckpt", "neither"),
        ("http://store/ckpt", "neither"),
        ("sftp://store/ckpt", "no user"),
        ("sftp://outlast@/ckpt", "no host"),
        ("sftp://outlast@store", "no directory"),
        ("sftp://outlast:secret@store/ckpt", "password"),
        ("sftp://outlast@store:port/ckpt", "(?i)port"),
        ("sftp://outlast@store/../ckpt", r"\.\."),
        ("sftp://outlast@store/ckpt?x=1", r"\?"),
        ("file://store/ckpt", "no directory of this machine"),
        ("file:///", "no directory of this machine"),
    ],
)
def test_url_that_says_nothing_clear_is_refused(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        open_store(StoreConfig(url=url))
    assert caught.value.hint is not None
    assert "secret" not in (caught.value.hint + "")


def test_key_and_known_hosts_are_checked_when_the_store_is_opened(
    server: SshServer, top: Path, tmp_path: Path
) -> None:
    config = server.config(top)
    (tmp_path / "garbage").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nxx\n")
    locked = tmp_path / "locked"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(locked)], check=True)
    server.kill()

    changes: list[tuple[dict[str, Any], str]] = [
        ({"identity": tmp_path / "absent"}, "absent: no such file"),
        ({"identity": tmp_path / "garbage"}, "garbage: not a private key"),
        ({"identity": locked}, "locked: .*passphrase"),
        ({"known_hosts": tmp_path / "absent"}, "absent: no such file"),
    ]
    for change, why in changes:
        with pytest.raises(ConfigError, match=why):
            open_store(dataclasses.replace(config, **change))
    assert isinstance(open_store(config), Store)


def fingerprint(public: Path) -> str:
    told = subprocess.run(["ssh-keygen", "-l", "-f", str(public)], capture_output=True, text=True, check=True)
    return told.stdout.split()[1]
