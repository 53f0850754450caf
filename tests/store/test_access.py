"""Who may speak to whom: keys, host keys, and the configuration that names them."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from outlast.config import StoreConfig
from outlast.errors import ConfigError, OutlastError, StoreRefused, StoreUnavailable
from outlast.model import JobKey
from outlast.store import Store, open_store

if TYPE_CHECKING:
    from tests.conftest import SshServer, StartSshd


@pytest.fixture
def server(own_server: SshServer) -> SshServer:
    return own_server


@pytest.fixture
def top(server: SshServer) -> Path:
    return server.served


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
    start_sshd: StartSshd, transport: str, job: JobKey, tmp_path: Path, kind: str
) -> None:
    key = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(key)], check=True)
    server = start_sshd(extra=f"HostKey {key}\n")
    server.transport = transport
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


@pytest.mark.parametrize(
    ("sftp", "kind", "why"),
    [("", StoreRefused, "no SFTP for"), ("/bin/false", StoreUnavailable, "no SFTP session")],
)
def test_server_without_sftp_is_told(
    start_sshd: StartSshd, transport: str, job: JobKey, sftp: str, kind: type[OutlastError], why: str
) -> None:
    server = start_sshd(sftp=sftp)
    server.transport = transport
    error = refusal(server.config(server.served), job)
    server.kill()

    assert isinstance(error, kind)
    assert why in str(error)
    assert "127.0.0.1" in str(error)


def test_store_may_be_opened_again_and_again(server: SshServer, top: Path, job: JobKey) -> None:
    config = server.config(top)

    with open_store(config) as first, open_store(config) as second:
        first.put_record(job, "start", {"a": 1})
        assert second.get_record(job, "start") == {"a": 1}


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
