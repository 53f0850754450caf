"""Checkpoints kept elsewhere, complete or not at all, over SFTP or in a directory. docs/store-format.md."""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import cast
from urllib.parse import SplitResult, unquote, urlsplit

from outlast.config import StoreConfig
from outlast.errors import ConfigError
from outlast.store._backend import Backend
from outlast.store._keys import KeyMissing, Keyring, add_key, read_keyring
from outlast.store._local import LocalBackend
from outlast.store._quota import Quota
from outlast.store._reader import Stored
from outlast.store._retention import Policy
from outlast.store._source import Memory
from outlast.store._store import Store
from outlast.store._throttle import Throttled
from outlast.store._tier import Shipped, Tier
from outlast.store._upkeep import Progress, Pruned, Usage

_log = logging.getLogger(__name__)

__all__ = [
    "KeyMissing",
    "Memory",
    "Policy",
    "Progress",
    "Pruned",
    "Quota",
    "Shipped",
    "Store",
    "Stored",
    "Usage",
    "add_key",
    "open_store",
    "read_keyring",
    "this_node",
]

_FORMS = "write sftp://USER@HOST/DIR, sftp://USER@HOST:PORT/DIR or file:///DIR"


def open_store(
    config: StoreConfig,
    *,
    node: str = "",
    told: Callable[[Shipped], None] = lambda _: None,
    turn: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Store:
    """Return the store at *config*'s url. It connects when it is first used; use it as a context manager.

    Args:
        node: the name of this node, for whom its own directory, *config*'s local, goes with the store.
        told: hears, in another thread, what came of each checkpoint that was to be shipped from there.
        turn: held, in that thread, while one is shipped.

    Raises:
        ConfigError: the url is no such thing, or the key or the known hosts cannot be read.
    """
    others = {}
    for name in config.other:
        other = config.named(name)
        others[name] = (_backend(other), _keyring(other), _quota(other))
    tier = None
    if node and config.local and _is_fit(Path(config.local)):
        tier = Tier(Path(config.local), node, lambda: open_store(config), told, turn)
    return Store(_backend(config), _keyring(config), _quota(config), others=others, tier=tier)


def this_node() -> str:
    """Return what this machine is called as a node."""
    return socket.gethostname().split(".")[0]


def _is_fit(directory: Path) -> bool:
    """Tell whether a node's directory is there. Raises ConfigError where it is another user's."""
    try:
        status = directory.stat()
    except OSError as error:
        _log.warning("%s: %s: checkpoints are shipped at once", directory, error.strerror)
        return False
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise ConfigError(
            f"[store] local = {str(directory)!r}: not a directory that only its owner, this user, may write to",
            hint=f"chown root {directory}; chmod 700 {directory}",
        )
    return True


def _quota(config: StoreConfig) -> Quota:
    return Quota(config.quota_bytes, config.user_quota_bytes)


def _backend(config: StoreConfig) -> Backend:
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
        return _throttled(config, LocalBackend(Path(path)))
    if url.scheme == "sftp":
        return _throttled(config, _over_sftp(config, url, port or 22, path))
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
