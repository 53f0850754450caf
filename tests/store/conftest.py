"""The places that a store can be in, each a directory that the tests can also look into."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outlast.config import StoreConfig
from outlast.model import JobKey
from outlast.store import Store, add_key, open_store
from outlast.store._backend import Backend
from outlast.store._keys import Keyring, read_keyring
from outlast.store._local import LocalBackend
from outlast.store._openssh import ProcessLink
from outlast.store._remote import SftpBackend
from outlast.store._sftp import Server, SshLink

if TYPE_CHECKING:
    from tests.conftest import Need, SshServer, StartSshd


@pytest.fixture(params=["paramiko", "openssh"])
def transport(request: pytest.FixtureRequest) -> str:
    """What speaks SSH; for tests that start servers of their own."""
    return str(request.param)


@pytest.fixture(params=["local", "paramiko", "openssh"])
def server(request: pytest.FixtureRequest) -> SshServer | None:
    """The server of the store, spoken to by either transport, or None for a store in a directory."""
    if request.param == "local":
        return None
    sshd: SshServer = request.getfixturevalue("sshd")
    sshd.transport = request.param
    return sshd


@pytest.fixture
def own_server(start_sshd: StartSshd, transport: str) -> Iterator[SshServer]:
    """A server of this test's own, to be mistreated."""
    server = start_sshd()
    server.transport = transport
    yield server
    server.resume()
    server.kill()


@pytest.fixture
def top(server: SshServer | None, tmp_path: Path) -> Path:
    """The store's top directory, as this machine sees it: empty."""
    own = f"{tmp_path.parent.name}-{tmp_path.name}"
    directory = tmp_path / "store" if server is None else server.served / own
    directory.mkdir()
    return directory


@pytest.fixture
def config(server: SshServer | None, top: Path) -> StoreConfig:
    if server is not None:
        return server.config(top)
    key = top.with_name("data.key")
    add_key(key)
    return StoreConfig(url=f"file://{top}", key=key)


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    """A fresh key, not that of `config`."""
    add_key(tmp_path / "other.key")
    return read_keyring(tmp_path / "other.key")


@pytest.fixture
def store(config: StoreConfig) -> Iterator[Store]:
    with open_store(config) as opened:
        yield opened


@pytest.fixture
def backend(server: SshServer | None, top: Path) -> Iterator[Backend]:
    opened: Backend = LocalBackend(top) if server is None else remote(server, top)
    yield opened
    opened.close()


def remote(server: SshServer, top: Path) -> SftpBackend:
    user, _, rest = server.url(top).removeprefix("sftp://").partition("@")
    path = rest[rest.index("/") :]
    connect = ProcessLink if server.transport == "openssh" else SshLink
    there = Server(user, "127.0.0.1", server.port, server.key, server.known_hosts, 20.0)
    return SftpBackend(there, path, connect)


@pytest.fixture
def job() -> JobKey:
    return JobKey("testbed", "17")


@pytest.fixture
def nvme(tmp_path: Path) -> Path:
    """The node's own directory."""
    directory = tmp_path / "nvme"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Files like those of an image: large and small, in directories, with zeros and with holes."""
    directory = tmp_path / "image"
    (directory / "deep" / "er").mkdir(parents=True)
    (directory / "core.img").write_bytes(b"CORE" + bytes(range(256)) * 9)
    (directory / "empty").touch()
    (directory / "pages-1.img").write_bytes(os.urandom(2 << 20) + bytes(3 << 20) + b"text " * 100_000)
    (directory / "deep" / "er" / "zeros").write_bytes(bytes(5000))
    with (directory / "deep" / "hole").open("wb") as file:
        file.seek(8 << 20)
        file.write(b"end")
        file.truncate(20 << 20)
    (directory / "core.img").chmod(0o640)
    return directory


@pytest.fixture
def tree() -> Callable[[Path], dict[str, tuple[int, bytes]]]:
    """Read the files below a directory: their paths, permission bits and content."""

    def read(directory: Path) -> dict[str, tuple[int, bytes]]:
        files = (path for path in directory.rglob("*") if path.is_file())
        return {
            str(path.relative_to(directory)): (path.stat().st_mode & 0o777, path.read_bytes())
            for path in files
        }

    return read


@pytest.fixture
def small_disk(need: Need, top: Path) -> Iterator[Path]:
    """The store's top directory on a disk of 6 MiB."""
    need("root", None if os.geteuid() == 0 else "mounting needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "outlast-test", top], check=True)
    yield top
    subprocess.run(["umount", "-l", top], check=True)


@pytest.fixture
def mounted(need: Need) -> Iterator[Callable[[Path, str], None]]:
    """Mount a small disk on a directory until the test is over."""
    need("root", None if os.geteuid() == 0 else "mounting needs root")
    places: list[Path] = []

    def mount(place: Path, size: str) -> None:
        options = f"size={size},mode=700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "outlast-test", place], check=True)
        places.append(place)

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", place], check=True)
