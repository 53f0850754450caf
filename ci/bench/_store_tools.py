"""What the store benchmark measures: Outlast, and the tools that people use for the same."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from ci.bench._store_images import size_of
from ci.bench._store_server import HOST, Server
from ci.testbed.layout import TestbedError

_SECONDS = 300  # for any one step
_PASSWORD = "bench"  # noqa: S105 - of repositories that live for a minute
_WORKER = Path(__file__).with_name("_store_worker.py")
NEEDED = {"restic": "restic", "borg": "borgbackup", "rsync": "rsync"}


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step took: seconds, bytes shipped, and processor seconds on the client's side."""

    seconds: float
    shipped: int
    cpu: float


class Tool(Protocol):
    """Something that keeps images of one program on the server; made anew for each program and round."""

    def save(self, images: Path, number: int) -> Step:
        """Ship the directory *images*, the dump of that number; it is there under that path only now."""

    def restore(self, number: int, into: Path) -> Step:
        """Bring the newest back into the directory *into*, which does not exist; its tree may lie deeper."""


class _Commands(abc.ABC):
    """A tool that is a program, started for each step."""

    def __init__(self, server: Server, store: Path) -> None:
        self._server = server
        self._store = store
        self._environment = {
            **os.environ,
            "RESTIC_PASSWORD": _PASSWORD,
            "RESTIC_CACHE_DIR": f"{store}.cache",
            "BORG_BASE_DIR": f"{store}.cache",
            "BORG_PASSPHRASE": _PASSWORD,
            "BORG_RSH": shlex.join(server.ssh),
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        }

    @abc.abstractmethod
    def save(self, images: Path, number: int) -> Step:
        """See `Tool.save`."""

    @abc.abstractmethod
    def restore(self, number: int, into: Path) -> Step:
        """See `Tool.restore`."""

    def _run(self, command: Sequence[str] | str, directory: Path | None = None) -> tuple[Step, str]:
        """Run *command*, a shell's if it is a text; what it shipped is by how much the store grew."""
        before, cpu, begin = size_of(self._store), _children_cpu(), time.monotonic()
        done = subprocess.run(
            command if isinstance(command, list) else ["bash", "-o", "pipefail", "-c", str(command)],
            env=self._environment,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        seconds = time.monotonic() - begin
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
            raise TestbedError(f"{command if isinstance(command, str) else command[0]}: {said[-1]}")
        return Step(seconds, size_of(self._store) - before, _children_cpu() - cpu), done.stdout


class SshCat(_Commands):
    """All files in a row through `ssh cat`: no tool, but what the connection can carry."""

    def save(self, images: Path, number: int) -> Step:
        """See `Tool.save`."""
        self._store.mkdir(exist_ok=True)
        ssh = shlex.join([*self._server.ssh, HOST])
        return self._run(f"cat {images}/* | {ssh} 'cat > {self._store}/{number}'")[0]

    def restore(self, number: int, into: Path) -> Step:
        """See `Tool.restore`; here it is one file."""
        into.mkdir()
        ssh = shlex.join([*self._server.ssh, HOST])
        return self._run(f"{ssh} 'cat {self._store}/{number}' > {into}/all")[0]


class Restic(_Commands):
    """restic over SFTP, encrypting as it always does."""

    def __init__(self, server: Server, store: Path) -> None:
        super().__init__(server, store)
        ssh = shlex.join([*server.ssh, HOST, "-s", "sftp"])
        self._base = ["restic", "-q", "-r", f"sftp:{HOST}:{store}", "-o", f"sftp.command={ssh}"]
        self._run([*self._base, "init", "--repository-version", "2"])

    def save(self, images: Path, number: int) -> Step:
        """See `Tool.save`."""
        del number
        return self._run([*self._base, "backup", str(images)])[0]

    def restore(self, number: int, into: Path) -> Step:
        """See `Tool.restore`."""
        del number
        return self._run([*self._base, "restore", "latest", "--target", str(into)])[0]


class Borg(_Commands):
    """borg, whose other half runs on the server; encrypting, zstd level 1."""

    def __init__(self, server: Server, store: Path) -> None:
        super().__init__(server, store)
        self._repository = f"ssh://{HOST}{store}"
        self._run(["borg", "init", "--encryption", "repokey-blake2", self._repository])

    def save(self, images: Path, number: int) -> Step:
        """See `Tool.save`."""
        name = f"{self._repository}::{number}"
        return self._run(["borg", "create", "--compression", "zstd,1", name, str(images)])[0]

    def restore(self, number: int, into: Path) -> Step:
        """See `Tool.restore`."""
        into.mkdir()
        return self._run(["borg", "extract", f"{self._repository}::{number}"], into)[0]


class Rsync(_Commands):
    """rsync onto the same file each time, by differences, zstd level 1; the server has it in clear."""

    def save(self, images: Path, number: int) -> Step:
        """See `Tool.save`."""
        how = ["--whole-file"] if number == 1 else ["--no-whole-file"]
        return self._sync([*how, f"{images}/", f"{HOST}:{self._store}/"], r"Total bytes sent: ([\d,]+)")

    def restore(self, number: int, into: Path) -> Step:
        """See `Tool.restore`."""
        del number
        words = ["--whole-file", f"{HOST}:{self._store}/", f"{into}/"]
        return self._sync(words, r"Total bytes received: ([\d,]+)")

    def _sync(self, words: list[str], shipped: str) -> Step:
        base = ["rsync", "-r", "--ignore-times", "--inplace", "--stats", "-e", shlex.join(self._server.ssh)]
        step, said = self._run([*base, "--compress", "--zc=zstd", "--zl=1", *words])
        found = re.search(shipped, said)
        return dataclasses.replace(step, shipped=int(found[1].replace(",", "")) if found else 0)


class Outlast:
    """Outlast's store in a process of its own, open from step to step as a job's manager has it."""

    def __init__(self, server: Server, store: Path, python: str, transport: str) -> None:
        store.mkdir()
        key = server.home / "data.key"
        if not key.exists():
            with open(os.open(key, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:  # noqa: PTH123
                file.write(f"{os.urandom(4).hex()} {os.urandom(32).hex()}\n")
        command = [
            *(python, str(_WORKER), "--url", f"sftp://root@127.0.0.1:{server.port}{store}"),
            *("--identity", str(server.identity), "--known-hosts", str(server.known_hosts)),
            *("--key", str(key), "--transport", transport, "--job", "1"),
        ]
        checkout = str(_WORKER.parents[2])
        self._worker = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": checkout},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.anonymous = 0  # the most anonymous memory so far, bytes
        self._ask({"do": "connect"})  # imports what it needs, and checks the configuration

    def connect(self) -> float:
        """Connect, anew if need be; return the seconds that it took."""
        self._ask({"do": "close"})
        return self._ask({"do": "connect"}).seconds

    def changed(self, old: Path, new: Path) -> int:
        """Return the bytes of the pages of *new* that are not in *old*, as zstd level 1 has them."""
        return self._ask({"do": "changed", "old": str(old), "new": str(new)}).shipped

    def save(self, images: Path, number: int) -> Step:
        """See `Tool.save`."""
        return self._ask({"do": "publish", "images": str(images), "sequence": number})

    def restore(self, number: int, into: Path) -> Step:
        """See `Tool.restore`."""
        return self._ask({"do": "fetch", "sequence": number, "into": str(into)})

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._worker.stdin.close() if self._worker.stdin else None
        try:
            self._worker.wait(10)
        except subprocess.TimeoutExpired:
            self._worker.kill()
            self._worker.wait()

    def _ask(self, request: dict[str, object]) -> Step:
        assert self._worker.stdin and self._worker.stdout  # noqa: S101 - both are pipes
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._worker.stdin, flush=True)
        line = self._worker.stdout.readline()
        if not line:
            raise TestbedError("outlast: the store's process ended; what it said is above")
        answer = json.loads(line)
        self.anonymous = answer["anonymous"]
        return Step(answer["seconds"], answer["bytes"], answer["cpu"])


PEERS: dict[str, type[_Commands]] = {"ssh cat": SshCat, "restic": Restic, "borg": Borg, "rsync": Rsync}


@contextlib.contextmanager
def make(name: str, server: Server, store: Path, python: str, transport: str) -> Iterator[Tool]:
    """Give the tool *name*, with an empty store; all that it keeps is removed at the end."""
    try:
        if name in PEERS:
            yield PEERS[name](server, store)
            return
        tool = Outlast(server, store, python, transport)
        try:
            yield tool
        finally:
            tool.close()
    finally:
        for path in (store, Path(f"{store}.cache")):
            shutil.rmtree(path, ignore_errors=True)


def versions() -> dict[str, str]:
    """Return what each of the tools calls itself. Raises TestbedError where one is not installed."""
    missing = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    if missing:
        raise TestbedError(
            f"not installed: {', '.join(missing)}", hint=f"apt-get install {' '.join(missing)}"
        )
    asked = {"restic": "version", "borg": "--version", "rsync": "--version"}
    said = {name: subprocess.check_output([name, word], text=True) for name, word in asked.items()}
    said["ssh"] = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr
    return {name: text.splitlines()[0].strip() for name, text in said.items()}


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
