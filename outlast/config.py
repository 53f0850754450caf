"""Site configuration: a TOML file and those in conf.d beside it, checked whole before anything runs."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import socket
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from outlast._toml import Origins, load
from outlast.policy import RestartPolicy, changed

_SIZE = re.compile(r"([0-9]{1,12})([KMGT]?)")
DEFAULT_PATH = Path("/etc/outlast/outlast.toml")


def _parse_size(key: str, text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f'{key} = "{text}": must be a whole number and K, M, G or T: "50G"')
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2]]


def _check_timeout(seconds: float) -> None:
    if not 0.1 <= seconds <= 3600:
        raise ValueError(f"timeout = {seconds:g}: must be 0.1 to 3600 seconds")


@dataclasses.dataclass(frozen=True)
class OtherStore:
    """A [store.other.NAME] table: a further store, for the checkpoints of some jobs.

    A job is one of them if each of *partitions*, *users* and *jobs* that is not empty has a pattern for it;
    patterns are as the shell's, with blanks between them. What is empty below is as in [store].
    """

    url: str = ""
    partitions: str = ""  # Slurm's partitions, PBS's queues
    users: str = ""
    jobs: str = ""  # names of jobs
    identity: str = ""
    known_hosts: str = ""
    key: str = ""
    quota: str = ""
    user_quota: str = ""
    timeout: float = 0.0  # 0: as in [store]

    def __post_init__(self) -> None:
        if not self.url:
            raise ValueError('url = "": must be set: sftp://USER@HOST/DIR or file:///DIR')
        if not (self.partitions or self.users or self.jobs):
            raise ValueError('partitions = "": one of partitions, users and jobs must say whose store it is')
        if self.timeout:
            _check_timeout(self.timeout)
        for key in ("quota", "user_quota"):
            _parse_size(key, getattr(self, key) or "0")


@dataclasses.dataclass(frozen=True)
class StoreConfig:
    """The [store] table: where checkpoints go.

    *url* is `sftp://USER@HOST[:PORT]/DIR` (DIR as the server shows it) or `file:///DIR`.
    """

    url: str = ""
    identity: Path = Path("/etc/outlast/store.key")
    known_hosts: Path = Path("/etc/outlast/known_hosts")
    key: Path = Path("/etc/outlast/data.key")  # what checkpoints are encrypted with; read by root, on nodes
    quota: str = ""  # what a job may have in the store, such as "50G"; "" is any amount
    user_quota: str = ""  # what all jobs of a user may have there together
    local: str = ""  # a directory of the node's own that checkpoints go to first; "" for none
    timeout: float = 10.0  # seconds without an answer until the store counts as unreachable
    transport: str = "auto"  # what speaks SSH: "openssh" or "paramiko"; auto: OpenSSH if it is there
    bandwidth: str = ""  # bytes a second that uploads of one node may take, such as "100M"; "" is any number
    uploads: int = 0  # jobs of all nodes that ship checkpoints to it at the same time; 0 for any number
    other: Mapping[str, OtherStore] = dataclasses.field(default_factory=dict)  # further stores, by name

    def __post_init__(self) -> None:
        if self.transport not in ("auto", "openssh", "paramiko"):
            raise ValueError(f'transport = "{self.transport}": must be "auto", "openssh" or "paramiko"')
        _check_timeout(self.timeout)
        for key in ("quota", "user_quota"):
            _parse_size(key, getattr(self, key) or "0")
        if self.bandwidth and _parse_size("bandwidth", self.bandwidth) < 1 << 16:
            raise ValueError(f'bandwidth = "{self.bandwidth}": must be 64K or more')
        if not 0 <= self.uploads <= 100000:
            raise ValueError(f"uploads = {self.uploads}: must be 0 to 100000")
        if self.local and not self.local.startswith("/"):
            raise ValueError(f'local = "{self.local}": must be a path from the root')
        for name in self.other:
            if name == "store" or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", name):
                raise ValueError(
                    f'other = "{name}": must be a name of letters, digits, "_" and "-", not "store"'
                )

    @property
    def bandwidth_bytes(self) -> int:
        """*bandwidth* in bytes a second; 0 for any number."""
        return _parse_size("bandwidth", self.bandwidth or "0")

    def store_of(self, *, partition: str, user: str, job: str) -> str:
        """Return the name of the first of *other* that is for such a job, *job* being its name; "" for this one."""
        facts = {"partitions": partition, "users": user, "jobs": job}
        for name, other in self.other.items():
            rules = {key: getattr(other, key).split() for key in facts}
            if all(
                any(fnmatch.fnmatchcase(facts[key], pattern) for pattern in patterns)
                for key, patterns in rules.items()
                if patterns
            ):
                return name
        return ""

    def named(self, name: str) -> StoreConfig:
        """Return the configuration of the store that is called *name* in *other*, as if it were the only one."""
        other = self.other[name]
        return dataclasses.replace(
            self,
            url=other.url,
            identity=Path(other.identity or self.identity),
            known_hosts=Path(other.known_hosts or self.known_hosts),
            key=Path(other.key or self.key),
            timeout=other.timeout or self.timeout,
            quota=other.quota or self.quota,
            user_quota=other.user_quota or self.user_quota,
            local="",
            other={},
        )

    @property
    def user_quota_bytes(self) -> int:
        """*user_quota* in bytes; 0 for any amount."""
        return _parse_size("user_quota", self.user_quota or "0")

    @property
    def quota_bytes(self) -> int:
        """*quota* in bytes; 0 for any amount."""
        return _parse_size("quota", self.quota or "0")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The [checkpoint] table. Times in the file are texts such as "10m"; here they are seconds."""

    keep: int = 2  # newest checkpoints of a job that are kept in the store
    criu: str = "criu"
    tcp: str = "established"
    mode: str = "auto"  # how memory is dumped; docs/adr/0006-forked-checkpoints.md
    cpu_share: float = 0.0  # cores that shipping a checkpoint may take on average, such as 0.5; 0 is no bound
    spool: Path = Path("/run/outlast/jobs")
    scratch: str = "/tmp:/var/tmp:/dev/shm"  # noqa: S108 - where files are this node's own; "" for nowhere
    save_files: str = "256M"  # what a checkpoint holds at most of files there and of those written in place
    save_mapped: str = "4G"  # what it holds at most of files that are mapped for writing
    node_mtbf: float = (
        30 * 86400.0
    )  # mean seconds between two failures of a node, until the site's own are seen
    auto_least: float = 60.0  # bounds of the interval that --checkpoint=auto chooses
    auto_most: float = 3600.0
    uploads: int = 4  # jobs of a node that ship checkpoints at the same time; 0 for any number
    append_globs: str = ""  # files that jobs append to and close again, such as "*.log", of all jobs

    def __post_init__(self) -> None:
        _parse_size("save_files", self.save_files)
        _parse_size("save_mapped", self.save_mapped)
        if any(not one.startswith("/") for one in self.scratch.split(":") if one):
            raise ValueError(
                f'scratch = "{self.scratch}": must be paths from the root, with colons between them'
            )
        if not (self.cpu_share == 0 or 0.01 <= self.cpu_share <= 1024):
            raise ValueError(f"cpu_share = {self.cpu_share:g}: must be 0, or 0.01 to 1024")
        if not 600 <= self.node_mtbf <= 1e10:
            raise ValueError(f"node_mtbf = {self.node_mtbf:g}: must be 600 seconds or more")
        if not 1 <= self.auto_least <= self.auto_most <= 30 * 86400:
            raise ValueError(
                f"auto_least = {self.auto_least:g}: must be 1 second to auto_most, and that at most 30d"
            )
        if not 0 <= self.uploads <= 1024:
            raise ValueError(f"uploads = {self.uploads}: must be 0 to 1024")
        if not 1 <= self.keep <= 1000:
            raise ValueError(f"keep = {self.keep}: must be 1 to 1000")
        if self.mode not in ("auto", "forked", "lazy", "plain"):
            raise ValueError(f'mode = "{self.mode}": must be "auto", "forked", "lazy" or "plain"')
        if self.tcp not in ("established", "close"):
            raise ValueError(f'tcp = "{self.tcp}": must be "established" or "close"')

    @property
    def save_files_bytes(self) -> int:
        """*save_files* in bytes."""
        return _parse_size("save_files", self.save_files)

    @property
    def save_mapped_bytes(self) -> int:
        """*save_mapped* in bytes."""
        return _parse_size("save_mapped", self.save_mapped)


@dataclasses.dataclass(frozen=True)
class RestartConfig:
    """The [restart] table."""

    store_wait: int = 3600  # seconds that a requeued job waits for a store that does not answer
    start_wait: int = 5  # seconds that a new job's start waits for the store
    at_time_limit: bool = True  # a job that comes to its time limit is saved and queued again
    post_copy: str = "auto"  # or "on" or "off": whether a job runs before all its memory is fetched
    pages_wait: int = 60  # seconds that a job stands still for a page while the store does not answer
    when_unrestorable: str = "hold"  # or "fresh": what becomes of a job none of whose checkpoints can be used
    on_node_failure: bool = RestartPolicy.on_node_failure  # this and the next four: outlast/policy.py
    on_crash: str = RestartPolicy.on_crash
    budget: int = RestartPolicy.budget
    backoff: float = RestartPolicy.backoff
    when_repeating: str = RestartPolicy.when_repeating
    # The same five keys for jobs of one partition: [restart.partition.NAME].
    partition: Mapping[str, Mapping[str, object]] = dataclasses.field(default_factory=dict)

    def policy(self, partition: str = "", choice: Mapping[str, object] | None = None) -> RestartPolicy:
        """Return the policy for a job in *partition* whose owner chose *choice*: what is narrower counts."""
        keys = [field.name for field in dataclasses.fields(RestartPolicy)]
        site = RestartPolicy(**{key: getattr(self, key) for key in keys})
        return changed(changed(site, self.partition.get(partition, {})), choice or {})

    def __post_init__(self) -> None:
        self.policy()
        for name, values in self.partition.items():
            try:
                if not isinstance(values, Mapping):
                    raise ValueError("must be a table")
                self.policy(name)
            except ValueError as error:
                raise ValueError(f"partition {name}: {error}") from None
        if self.when_unrestorable not in ("hold", "fresh"):
            raise ValueError(f'when_unrestorable = "{self.when_unrestorable}": must be "hold" or "fresh"')
        if self.post_copy not in ("auto", "on", "off"):
            raise ValueError(f'post_copy = "{self.post_copy}": must be "auto", "on" or "off"')


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """The [verify] table: what `outlast verify --due` does."""

    every: int = 86400  # seconds after which a job's newest checkpoint is to be verified once more

    def __post_init__(self) -> None:
        if not 1 <= self.every <= 366 * 86400:
            raise ValueError(f"every = {self.every}: must be between 1 second and 366 days")


@dataclasses.dataclass(frozen=True)
class LeaseConfig:
    """The [lease] table, in seconds: for how long a run may go on of which nothing is heard."""

    renew: float = 0.5
    ttl: float = 4.0
    guard: bool = True  # stop the job when its lease could not be renewed for so long

    def __post_init__(self) -> None:
        if not 0.1 <= self.renew <= self.ttl / 2:
            raise ValueError(f"renew = {self.renew:g}: must be 0.1 or more, and at most half of ttl")
        if self.ttl < 1:
            raise ValueError(f"ttl = {self.ttl:g}: must be 1 or more")


@dataclasses.dataclass(frozen=True)
class WatcherConfig:
    """The [watcher] table."""

    cycle: float = 0.5  # seconds between two looks
    silent: float = 2.0  # seconds without a heartbeat until a node that does not answer either is dead
    mark_down: bool = True  # tell the scheduler at once that a node is dead
    exclude: int = 300  # seconds for which a job is kept away from the node that it was lost on
    takeover: float = 3.0  # seconds without a beat of the watcher that acts until another takes over
    socket: Path = Path("/run/outlast/watcher.sock")
    metrics: str = ""  # "HOST:PORT" to be asked at for figures over HTTP; "" for nowhere

    def __post_init__(self) -> None:
        if self.metrics and not re.fullmatch(r"\S+:[0-9]{1,5}", self.metrics):
            raise ValueError(f'metrics = "{self.metrics}": must be an address and a port: "127.0.0.1:9469"')
        if not 1 <= self.takeover <= 3600:
            raise ValueError(f"takeover = {self.takeover:g}: must be 1 to 3600 seconds")


@dataclasses.dataclass(frozen=True)
class Config:
    """All of it; every key has a default but `store.url`."""

    cluster: str = dataclasses.field(default_factory=lambda: socket.gethostname().split(".")[0])
    scheduler: str = "slurm"  # or "pbs"
    store: StoreConfig = StoreConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    restart: RestartConfig = RestartConfig()
    verify: VerifyConfig = VerifyConfig()
    lease: LeaseConfig = LeaseConfig()
    watcher: WatcherConfig = WatcherConfig()

    def __post_init__(self) -> None:
        if self.scheduler not in ("slurm", "pbs"):
            raise ValueError(f'scheduler = "{self.scheduler}": must be "slurm" or "pbs"')


def config_files(path: Path = DEFAULT_PATH) -> list[Path]:
    """Return the files that make up the configuration, in order: *path*, and `conf.d/*.toml` beside it."""
    return [path, *sorted((path.parent / "conf.d").glob("*.toml"))]


def read_config(path: Path = DEFAULT_PATH) -> Config:
    """Read *path*, then `conf.d/*.toml` beside it by name, of which a later one wins; check every key.

    Raises:
        ConfigError: a file cannot be read or is no TOML, a key is unknown, or a value is of the wrong kind or
            out of range. The message names the file, the line, the table, the key and what is allowed.
    """
    return load(Config, config_files(path))[0]


def explain_config(path: Path = DEFAULT_PATH) -> dict[str, tuple[object, str]]:
    """Return every key with its value, as `read_config` has it, and where it stands: a file and line, or "default".

    No secret is among them: of keys only the files' names, of an address not its password.

    Raises:
        ConfigError: as `read_config`.
    """
    config, origins = load(Config, config_files(path))
    return dict(_explained(config, origins, ()))


def _explained(
    table: object, origins: Origins, where: tuple[str, ...]
) -> Iterator[tuple[str, tuple[object, str]]]:
    for field in dataclasses.fields(typing.cast(Any, table)):
        name, value = (*where, field.name), getattr(table, field.name)
        if dataclasses.is_dataclass(value):
            yield from _explained(value, origins, name)
        elif isinstance(value, Mapping):
            for key, one in value.items():
                yield from _explained(one, origins, (*name, key))
        else:
            if isinstance(value, str):
                value = re.sub(r"(?<=://)([^:@/]*):[^@/]*@", r"\1:***@", value)
            shown = str(value) if isinstance(value, Path) else value
            yield ".".join(name), (shown, str(origins.get(name, "default")))
