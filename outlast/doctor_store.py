"""What `outlast doctor` looks at of stores: each one of the configuration, and this node's own directory."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from outlast.config import Config, StoreConfig
from outlast.doctor import Finding
from outlast.errors import ConfigError, OutlastError
from outlast.store import open_store, read_keyring

_LEAST_STORE = 1 << 30  # bytes: with less than this left, the next checkpoint of a job may be refused
# File systems that several machines have at the same time; statfs(2), and what sites use beside it.
_SHARED = re.compile(
    r"nfs|nfs4|cifs|smb3|9p|afs|beegfs|ceph|gfs2|gpfs|lustre|ocfs2|orangefs|pvfs2|panfs|wekafs|virtiofs|fuse\..*"
)
_MOUNTED = Path("/proc/self/mountinfo")


def stores(config: Config) -> Iterator[Finding]:
    """Look at the main store and at every [store.other.NAME]: as far as this user has its identity."""
    yield from _store("store", config.store, config.cluster)
    for name in config.store.other:
        yield from _store(f"store {name}", config.store.named(name), config.cluster)


def keys(config: Config) -> Iterator[Finding]:
    """Look at the keys that checkpoints are encrypted with, each file once."""
    seen = set()
    for name in ("", *config.store.other):
        path = config.store.named(name).key if name else config.store.key
        if path not in seen:
            yield _data_key(f"data key {name}".rstrip(), path, name)
        seen.add(path)


def own_directory(config: Config) -> Iterator[Finding]:
    """Look at the directory that this node has before the store, if it is to have one."""
    if not config.store.local:
        return
    path, what = Path(config.store.local), "local"
    try:
        status = path.stat()
    except OSError as error:
        fact = f"{path}: {error.strerror}; checkpoints go straight to the store"
        yield Finding("warn", what, fact, f"install -d -m 700 {path}, on a disk of this node's own")
        return
    if not path.is_dir():
        yield Finding("FAIL", what, f"{path}: no directory", f"install -d -m 700 {path}, in its place")
        return
    kind = kind_of(path, _MOUNTED.read_text())
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        mode = f"{status.st_mode & 0o7777:04o}"
        fact = f"{path}: of user {status.st_uid}, mode {mode}: others can write to it, and no checkpoint is taken"
        yield Finding("FAIL", what, fact, f"chown root {path}; chmod 700 {path}")
    elif _SHARED.fullmatch(kind):
        fact = f"{path}: on {kind}, which other machines have, too: they would take its checkpoints for their own"
        yield Finding(
            "FAIL", what, fact, "set local under [store] to a directory on a disk of this node's own"
        )
    elif status.st_mode & 0o077:
        fact = f"{path}: others may look into it, mode {status.st_mode & 0o7777:04o}"
        yield Finding("warn", what, fact, f"chmod 700 {path}")
    elif kind in ("tmpfs", "ramfs"):
        fact = f"{path}: on {kind}: it takes memory from jobs, and is empty after a reboot"
        yield Finding("warn", what, fact, "set local under [store] to a directory on a disk")
    else:
        yield Finding("ok", what, f"{path}: this node's own, on {kind}")
    free, memory = shutil.disk_usage(path).free, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fact = f"{free >> 20} MiB free at {path}, for jobs in {memory >> 20} MiB of memory"
    if free >= memory:
        yield Finding("ok", "local room", fact)
    else:
        remedy = "make room there: checkpoints that do not fit go straight to the store"
        yield Finding("warn", "local room", fact, remedy)


def kind_of(path: Path, mounted: str) -> str:
    """Return the type of the file system that *path* is on; *mounted* is as proc_pid_mountinfo(5) has it."""
    path = path.resolve()
    best, kind = -1, "an unknown file system"
    for line in mounted.splitlines():
        fields, _, rest = line.partition(" - ")
        # Blanks and the like are octal there.
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields.split()[4]))
        # Of two on one point the later hides the earlier.
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), rest.split()[0]
    return kind


def _store(what: str, config: StoreConfig, cluster: str) -> Iterator[Finding]:
    over_ssh = config.url.startswith("sftp:")
    if over_ssh and os.geteuid() != 0 and not os.access(config.identity, os.R_OK):
        fact = f"not looked at: {config.identity} cannot be read"
        yield Finding("warn", what, fact, "run 'outlast doctor' as root")
        return
    if over_ssh and config.identity.exists() and config.identity.stat().st_mode & 0o077:
        fact = f"{config.identity} can be read by others"
        yield Finding("FAIL", f"{what} key", fact, f"chmod 600 {config.identity}")
    try:
        with open_store(config) as store:
            leases = store.leases(cluster)
            free = store.free()
    except OutlastError as error:
        yield Finding("FAIL", what, f"{config.url}: {error}", error.hint or "")
        return
    yield Finding("ok", what, f"{config.url} answers and can be written; {len(leases)} jobs hold a lease")
    if free is None:
        yield Finding("ok", f"{what} room", f"{config.url}: the server does not say how much is free")
    elif free < _LEAST_STORE:
        remedy = "make room there: jobs whose checkpoints it refuses run on with the older ones"
        yield Finding("warn", f"{what} room", f"{free >> 20} MiB free at {config.url}", remedy)
    else:
        yield Finding("ok", f"{what} room", f"{free >> 20} MiB free at {config.url}")


def _data_key(what: str, path: Path, store: str) -> Finding:
    try:
        keyring = read_keyring(path)
    except ConfigError as error:
        make = f"all nodes need the same key file; make it on one with 'outlast store init --of {store}'"
        return Finding(
            "FAIL", what, str(error), make if store else error.hint or "all nodes need the same key file"
        )
    older = len(keyring.keys) - 1
    fact = f"{path}: {keyring.newest} encrypts" + (f", {older} older can be read" if older else "")
    return Finding("ok", what, fact)
