"""Whether a checkpoint can be brought back to life on this node, found out by doing so in a sandbox.

In a network of its own, which leads nowhere, and with stand-ins in the place of every file that the job had
open for writing, CRIU restores all processes and leaves them stopped; then they are killed. None of them runs
an instruction, so nothing of the job's is changed and nobody hears of it twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from criu_backend import CapsuleError, Context, Criu, CriuError, opened_files
from outlast.config import Config
from outlast.errors import CorruptCheckpoint, OutlastError, UsageError
from outlast.manager._cpu import UnfitNode, require
from outlast.model import Checkpoint, CheckpointId, JobKey

if TYPE_CHECKING:
    from outlast.store import Store

_RUNTIME = Path("/run/outlast")
_SECONDS = 600.0
# The scheduler gives a job this file on every node that it starts it on.
_SCRIPT = "slurm_script"


def verify(config: Config, job: JobKey, id_: CheckpointId) -> dict[str, Any]:
    """Restore checkpoint *id_* of *job* in a sandbox on this node, as root, and end it.

    Returns:
        `checkpoint`, its name; `ok`; `why` not; `processes`, how many came up; `seconds` that it took.

    Raises:
        UsageError: there is no such checkpoint, or the caller is not root. StoreUnavailable, ConfigError.
    """
    from outlast.store import open_store, this_node

    _require_root()
    begin = time.monotonic()
    name = id_.name(job.job_id)
    _RUNTIME.mkdir(mode=0o755, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="verify-", dir=_RUNTIME) as place:
        images = Path(place) / "images"
        found: dict[str, Any] = {"ok": False, "processes": 0}
        with open_store(config.store, node=this_node()) as store:
            try:
                store.fetch(job, id_, images)
            except CorruptCheckpoint as error:
                found["why"] = str(error)
            else:
                checkpoint = next(one for one in store.checkpoints(job) if one.id == id_)
                found |= _in_sandbox(Path(place), checkpoint, config)
    return {"checkpoint": name, **found, "seconds": round(time.monotonic() - begin, 3)}


def verify_due(config: Config) -> Iterator[dict[str, Any]]:
    """Verify the newest checkpoint of every job that may need it and was not verified for `verify.every`.

    What came of it is a record of the job, `verified`, and an event; by the record other nodes leave it out. A
    job whose processors' instructions this node lacks is left for another node.

    Yields:
        For each one what `verify` returns.

    Raises:
        UsageError: the caller is not root, or this node is at it already.
    """
    from outlast.store import open_store

    _require_root()
    _RUNTIME.mkdir(mode=0o755, exist_ok=True)
    with (_RUNTIME / "verify.lock").open("w") as lock, open_store(config.store) as store:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError("verify: this node is verifying already", hint="let that one end") from None
        held = {view.lease.job for view in store.leases(config.cluster)}
        for job in store.jobs(config.cluster):
            # Of one that has ended, and does not run again, nobody needs it.
            if job not in held and store.get_record(job, "ended") is not None:
                continue
            if (checkpoint := _due(config, store, job)) is None:
                continue
            found = verify(config, job, checkpoint.id)
            node = socket.gethostname().split(".")[0]
            record = {
                "checkpoint": [checkpoint.id.epoch, checkpoint.id.seq],
                "node": node,
                "time": time.time(),
            }
            store.put_record(job, "verified", {**record, "ok": found["ok"], "why": found.get("why")})
            event = {"time": time.time(), "node": node, "epoch": checkpoint.id.epoch}
            event |= {"event": "verified" if found["ok"] else "not-verified", "text": sentence(found)}
            store.append_events(job, f"verify-{node}", [event])
            yield found


def sentence(found: Mapping[str, Any]) -> str:
    """Return what `verify` found, for people."""
    if found["ok"]:
        return f"{found['checkpoint']}: {found['processes']} processes came up after {found['seconds']:.1f} s"
    return f"{found['checkpoint']}: does not come up on this node: {found['why']}"


def _due(config: Config, store: Store, job: JobKey) -> Checkpoint | None:
    last = store.get_record(job, "verified")
    if last is not None and time.time() - last["time"] < config.verify.every:
        return None
    checkpoints = store.checkpoints(job)
    try:
        require(checkpoints[0].meta.get("cpu", ()) if checkpoints else (), str(job))
    except UnfitNode:
        return None
    return checkpoints[0] if checkpoints else None


def _require_root() -> None:
    if os.geteuid() != 0:
        raise UsageError("verify: only root can restore what is another user's")


def _in_sandbox(place: Path, checkpoint: Checkpoint, config: Config) -> dict[str, Any]:
    """Have another process of this program do the rest, in namespaces of its own."""
    task = {
        "meta": dict(checkpoint.meta),
        "criu": config.checkpoint.criu,
        "tcp": config.checkpoint.tcp,
        "scratch": config.checkpoint.scratch,
    }
    command = ["unshare", "--mount", "--net", "--propagation", "private", "--", sys.executable, "-P", "-m"]
    try:
        done = subprocess.run(
            [*command, "outlast.verify", os.fspath(place)],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        answer: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"why": f"it did not come up within {_SECONDS:.0f} s"}
    except ValueError:
        raise OutlastError(f"verify: the sandbox could not be made: {done.stderr.strip()}") from None
    return answer


def _come_up(place: Path, task: Mapping[str, Any]) -> int:
    """Restore what is in *place*, inside the sandbox; return how many processes there were."""
    meta, images, state = task["meta"], place / "images", place / "state"
    state.mkdir(mode=0o700)
    # Connections within the job go by addresses of the node that it ran on.
    Path("/proc/sys/net/ipv4/ip_nonlocal_bind").write_text("1")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    room = place / "room"
    room.mkdir()
    _mount("-t", "tmpfs", "-o", "mode=0755", "outlast", os.fspath(room))
    for directory in filter(None, task["scratch"].split(":")):
        _mount("-t", "tmpfs", "-o", "mode=1777", "outlast", directory)
    for entry in meta["files"]:
        if "path" in entry and ("size" in entry or "mode" in entry):
            _stand_in(room, images, entry, meta["uid"])
    for path, size, mode in opened_files(images):
        if Path(path).name == _SCRIPT:
            _stand_in(room, images, {"path": path, "size": size, "mode": mode, "optional": True}, meta["uid"])
    criu = Criu(task["criu"])
    with contextlib.ExitStack() as closing:
        stdio = _standard_descriptors(meta["passed"])
        mine, theirs = map(closing.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        peer = subprocess.Popen(
            ["sleep", str(_SECONDS)],
            user=meta["uid"],
            extra_groups=[],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
        )
        closing.callback(peer.wait)
        closing.callback(peer.kill)
        pidfd = os.pidfd_open(peer.pid)
        capsule = criu.restore(
            Context(peer.pid, pidfd, stdio, mine.fileno()),
            images,
            state,
            uid=meta["uid"],
            dumped_by=meta["criu"],
            tcp=task["tcp"],
            inherit=[(one["fd"], one["name"]) for one in meta["passed"]],
            stopped=True,
        )
        count = len(list(capsule.tasks()))
        capsule.kill()
        capsule.wait(10)
        return count


def _standard_descriptors(passed: list[dict[str, Any]]) -> tuple[int, int, int]:
    """Return descriptors of the kind that led out of the job's capsule, which lead nowhere."""
    found = [os.open(os.devnull, os.O_RDWR) for _ in range(3)]
    for entry in passed:
        if entry["name"].startswith("tty"):
            found[entry["fd"]] = os.openpty()[1]
        else:
            found[entry["fd"]] = os.pipe()[0 if entry["fd"] == 0 else 1]
    return (found[0], found[1], found[2])


def _stand_in(room: Path, images: Path, entry: Mapping[str, Any], uid: int) -> None:
    """Put a file of the right size and mode, and where they were saved contents, where CRIU looks for it.

    Raises:
        OutlastError: the file could not be set back in earnest either.
    """
    path = Path(entry["path"])
    saved = entry.get("saved", entry.get("name"))
    here = None
    with contextlib.suppress(FileNotFoundError):
        here = path.stat()
    if "size" in entry and saved is None and not entry.get("optional"):
        if here is None:
            raise OutlastError(f"{path}: No such file or directory")
        if here.st_size < entry["size"]:
            raise OutlastError(f"{path}: it has {here.st_size} bytes, and had {entry['size']}")
    if here is not None and not stat.S_ISREG(here.st_mode):
        return
    target = room / f"file-{len(list(room.iterdir()))}"
    if saved is not None:
        shutil.copyfile(images / saved, target)
    else:
        target.touch()
        os.truncate(target, entry["size"])
    target.chmod(entry.get("mode", here.st_mode & 0o7777 if here is not None else 0o644))
    os.chown(target, uid, -1)
    if here is None:
        _make_room_for(path, room)
        path.touch()
    _mount("--bind", os.fspath(target), os.fspath(path))


def _make_room_for(path: Path, room: Path) -> None:
    """Have a file *path* be possible, without a trace on this node's disks."""
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not _is_ours(parent):
        over = room / f"over-{len(list(room.iterdir()))}"
        for name in ("upper", "work"):
            (over / name).mkdir(parents=True)
        options = f"lowerdir={parent},upperdir={over}/upper,workdir={over}/work"
        _mount("-t", "overlay", "-o", options, "outlast", os.fspath(parent))
    path.parent.mkdir(parents=True, exist_ok=True)


def _is_ours(directory: Path) -> bool:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return any(source == "outlast" and directory.is_relative_to(where) for source, where, *_ in mounts)


def _mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise OutlastError(f"verify: {done.stderr.strip()}")


def main() -> None:
    """Entry point in the sandbox."""
    answer: dict[str, Any]
    try:
        processes = _come_up(Path(sys.argv[1]), json.load(sys.stdin))
        answer = {"ok": True, "processes": processes}
    except (OutlastError, CriuError, CapsuleError, OSError) as error:
        answer = {"ok": False, "why": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
