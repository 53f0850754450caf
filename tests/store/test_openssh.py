"""What administrators set up for OpenSSH's client serves the store too; what would weaken it does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outlast.config import StoreConfig
from outlast.errors import ConfigError, OutlastError
from outlast.model import JobKey
from outlast.store import open_store

if TYPE_CHECKING:
    from tests.conftest import SshServer, StartSshd


@pytest.fixture
def server(start_sshd: StartSshd) -> Iterator[SshServer]:
    """A server of this test's own, spoken to by OpenSSH's client."""
    server = start_sshd()
    server.transport = "openssh"
    yield server
    server.kill()


@pytest.fixture
def ssh_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the client reads as its user's ssh_config: the real one is looked up by the password database."""
    client = shutil.which("ssh")
    assert client is not None
    path = tmp_path / "ssh_config"
    path.touch()
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "ssh").write_text(f'#!/bin/sh\nexec {client} -F {path} "$@"\n')
    (programs / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return path


def works(config: StoreConfig, job: JobKey) -> bool:
    with open_store(config) as store:
        store.put_record(job, "start", {"a": 1})
        return store.get_record(job, "start") == {"a": 1}


def test_server_behind_another_is_reached_as_ssh_config_says(
    server: SshServer, start_sshd: StartSshd, job: JobKey, ssh_config: Path
) -> None:
    jump = start_sshd(sftp="", extra="AllowTcpForwarding yes\n")
    ssh_config.write_text(
        f"Host jump\n  HostName 127.0.0.1\n  Port {jump.port}\n  IdentityFile {jump.key}\n"
        f"  UserKnownHostsFile {jump.known_hosts}\nHost 127.0.0.1\n  ProxyJump jump\n"
    )

    assert "direct-tcpip" not in jump.log
    assert works(server.config(server.served), job)
    assert "Accepted publickey" in jump.log
    jump.kill()


def test_client_runs_on_the_processors_that_its_thread_may_run_on(server: SshServer, job: JobKey) -> None:
    everywhere = os.sched_getaffinity(0)
    if len(everywhere) < 2:
        pytest.skip("one processor")
    one = {min(everywhere)}
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    others = set(children.read_text().split())
    with open_store(server.config(server.served)) as store:
        store.put_record(job, "start", {"a": 1})
        (ssh,) = set(children.read_text().split()) - others

        os.sched_setaffinity(0, one)
        try:
            store.put_record(job, "start", {"a": 2})
            assert os.sched_getaffinity(int(ssh)) == one
        finally:
            os.sched_setaffinity(0, everywhere)
        store.put_record(job, "start", {"a": 3})
        assert os.sched_getaffinity(int(ssh)) == everywhere


def test_connection_that_stands_already_is_used(
    server: SshServer, job: JobKey, ssh_config: Path, tmp_path: Path
) -> None:
    control = tmp_path / "control"
    ssh_config.write_text(f"Host *\n  ControlPath {control}\n")
    user = server.url(server.served).partition("//")[2].partition("@")[0]
    master = subprocess.Popen(
        [
            *("ssh", "-M", "-N", "-i", str(server.key), "-p", str(server.port), "-o", "BatchMode=yes"),
            *("-o", f"UserKnownHostsFile={server.known_hosts}", f"{user}@127.0.0.1"),
        ]
    )
    try:
        for _ in range(100):
            if control.exists():
                break
            with pytest.raises(subprocess.TimeoutExpired):
                master.wait(0.1)
        assert works(server.config(server.served), job)
        assert server.log.count("Accepted publickey") == 1
    finally:
        master.terminate()
        master.wait(10)


@pytest.mark.parametrize(
    "line",
    [
        "StrictHostKeyChecking no",
        "StrictHostKeyChecking accept-new",
        "GlobalKnownHostsFile {known}",
        "UserKnownHostsFile {known}",
        "VerifyHostKeyDNS yes",
        "UpdateHostKeys yes",
    ],
)
def test_host_keys_are_strict_whatever_ssh_config_says(
    server: SshServer, job: JobKey, ssh_config: Path, tmp_path: Path, line: str
) -> None:
    known = tmp_path / "known"
    known.write_bytes(server.known_hosts.read_bytes())
    server.known_hosts.write_text("")
    ssh_config.write_text(f"Host *\n  {line.format(known=known)}\n")

    with open_store(server.config(server.served)) as store, pytest.raises(OutlastError) as caught:
        store.checkpoints(job)
    assert isinstance(caught.value, ConfigError)
    assert server.known_hosts.read_text() == ""
    assert "Accepted publickey" not in server.log


def test_client_is_the_default_where_it_is_installed(
    server: SshServer, job: JobKey, ssh_config: Path
) -> None:
    ssh_config.write_text("Host *\n  ProxyCommand /bin/false\n")
    server.transport = "auto"

    with open_store(server.config(server.served)) as store, pytest.raises(OutlastError):
        store.checkpoints(job)  # paramiko knows of no ProxyCommand
    ssh_config.write_text("")
    assert works(server.config(server.served), job)


def test_store_does_without_the_client(
    server: SshServer, job: JobKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    server.transport = "auto"

    assert works(server.config(server.served), job)
