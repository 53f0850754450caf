"""Checkpoints kept elsewhere, complete or not at all, over SFTP or in a directory. docs/store-format.md."""

from __future__ import annotations

from pathlib import Path
from typing import cast
from urllib.parse import SplitResult, unquote, urlsplit

from outlast.config import StoreConfig
from outlast.errors import ConfigError
from outlast.store._backend import Backend
from outlast.store._keys import KeyMissing, Keyring, add_key, read_keyring
from outlast.store._local import LocalBackend
from outlast.store._reader import Stored
from outlast.store._retention import Policy
from outlast.store._source import Memory
from outlast.store._store import Store
from outlast.store._throttle import Throttled
from outlast.store._upkeep import Pruned, Usage

__all__ = [
    "KeyMissing",
    "Memory",
    "Policy",
    "Pruned",
    "Store",
    "Stored",
    "Usage",
    "add_key",
    "open_store",
    "read_keyring",
]

_FORMS = "write sftp://USER@HOST/DIR, sftp://USER@HOST:PORT/DIR or file:///DIR"


def open_store(config: StoreConfig) -> Store:
    """Return the store at *config*'s url. It connects when it is first used; use it as a context manager.

    Raises:
        ConfigError: the url is no such thing, or the key or the known hosts cannot be read.
    """
    try:
        url = urlsplit(config.url)
        port = url.port
    except ValueError as error:
        raise _bad(config, str(error)) from None
    if url.query or url.fragment:
        raise _bad(config, "has a '?' or '#'")
    path = unquote(url.path).rstrip("/")
    if ".." in path.split("/") or "\0" in path:
        raise _bad(config, "names a directory by '..'")
    if url.scheme == "file":
        if url.netloc or not path:
            raise _bad(config, "names no directory of this machine")
        return Store(_throttled(config, LocalBackend(Path(path))), _keyring(config), config.quota_bytes)
    if url.scheme == "sftp":
        return Store(
            _throttled(config, _over_sftp(config, url, port or 22, path)),
            _keyring(config),
            config.quota_bytes,
        )
    raise _bad(config, "neither sftp:// nor file://" if config.url else "is not set")


def _throttled(config: StoreConfig, backend: Backend) -> Backend:
    rate = config.bandwidth_bytes
    return cast(Backend, Throttled(backend, rate)) if rate else backend


def _keyring(config: StoreConfig) -> Keyring | ConfigError:
    try:
        return read_keyring(config.key)
    except ConfigError as error:
        return error


def _over_sftp(config: StoreConfig, url: SplitResult, port: int, path: str) -> Backend:
    # Imported here, since paramiko takes long to import and a store in a directory does without it.
    from outlast.store._openssh import ProcessLink, find_ssh
    from outlast.store._remote import SftpBackend
    from outlast.store._sftp import Server, SshLink, read_credentials

    if not url.username or not url.hostname:
        raise _bad(config, "names no user or no host")
    if url.password is not None:
        raise _bad(config, "holds a password, and only a key is used")
    if not url.path:
        raise _bad(config, "names no directory")
    server = Server(
        user=unquote(url.username),
        host=url.hostname,
        port=port,
        identity=config.identity,
        known_hosts=config.known_hosts,
        timeout=config.timeout,
    )
    read_credentials(server)
    # OpenSSH's client moves about twice as much in the same time, since its ciphers do not wait for Python.
    if config.transport == "paramiko" or (config.transport == "auto" and find_ssh() is None):
        return SftpBackend(server, path, SshLink)
    return SftpBackend(server, path, ProcessLink)


def _bad(config: StoreConfig, why: str) -> ConfigError:
    return ConfigError(f"[store] url = {config.url!r}: {why}", hint=_FORMS)
