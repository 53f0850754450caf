"""Processes that Outlast did not start: what of them can be checkpointed, and checkpoints of them."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from criu_backend import Capsule, Criu, CriuError, explain, put_back
from outlast.config import Config
from outlast.errors import CheckpointRefused, UsageError
from outlast.manager import as_dictionary, open_for_writing, put_script
from outlast.model import CheckpointId, JobKey
from outlast.store import open_store


def find(text: str) -> Capsule:
    """Return the process of the PID *text* as the root of a tree, its parent in the place of a capsule's init.

    Raises:
        UsageError: there is no such process, or this is not root.
    """
    status = Path(f"/proc/{text}/status")
    if not text.isdigit() or not status.exists():
        raise UsageError(f"{text}: no such job on this node, and no such process")
    if os.geteuid() != 0:
        raise UsageError(
            f"process {text}: not one of a job of yours", hint="only root may look into other processes"
        )
    facts = status.read_text()
    parent = int(re.findall(r"^PPid:\s*(\d+)", facts, re.M)[0])
    inner = int(re.findall(r"^NSpid:.*?(\d+)$", facts, re.M)[0])
    if parent == 0:
        raise UsageError(
            f"process {text}: it is the first of its PID namespace", hint="take what it has started"
        )
    start = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19])
    return Capsule(parent, start, inner)


def findings(text: str) -> list[dict[str, Any]]:
    """Return what of the process *text* and those below it does not go with a checkpoint."""
    tree = find(text)
    return [as_dictionary(one) for one in explain(tree.tasks(), tree.init_pid)]


def adopt(config: Config, checkpoint: str, name: str) -> tuple[int, list[str]]:
    """Make checkpoint *checkpoint*, of whatever job, the first one of the job *name*; return its owner and argv.

    *checkpoint* may be a job alone, for its newest. Both share what they have in the store.

    Raises:
        UsageError: there is no such checkpoint, or there is a job *name* already.
    """
    job = JobKey(config.cluster, checkpoint.partition("@")[0])
    mine = JobKey(config.cluster, name)
    with (
        open_store(config.store) as store,
        tempfile.TemporaryDirectory(prefix="outlast-", dir="/run") as spool,
    ):
        if store.get_record(mine, "start") is not None:
            raise UsageError(f"recover: there is a job {name} already", hint="choose another --name")
        named = (one for one in store.checkpoints(job) if checkpoint in (job.job_id, one.id.name(job.job_id)))
        found = next(named, None)
        if found is None:
            raise UsageError(
                f"{checkpoint}: no such checkpoint", hint=f"'outlast list {job.job_id}' shows what there is"
            )
        images = Path(spool, "images")
        store.fetch(job, found.id, images)
        meta = {**found.meta, "epoch": 0, "seq": 1}
        put_script(meta["argv"][0], images, int(meta["uid"]))
        record = {"uid": meta["uid"], "argv": meta["argv"], "interval": 0, "node": meta["node"], "epoch": 0}
        store.put_record(mine, "start", {**record, "time": time.time(), "files": []})
        store.publish(mine, CheckpointId(0, 1), images, meta)
        return int(meta["uid"]), list(meta["argv"])


def checkpoint(config: Config, text: str, name: str) -> str:
    """Store a checkpoint of the process *text* and all below it under the job's name *name*; return its name.

    The process runs on. It must lead a session, as what `setsid` starts does, and have no terminal and no pipe to
    anybody else: CRIU can only dump a tree that is whole.

    Raises:
        CheckpointRefused: it cannot be dumped; its text is CRIU's.
    """
    tree = find(text)
    pid = int(text)
    key = JobKey(config.cluster, name)
    criu = Criu(config.checkpoint.criu)
    with (
        open_store(config.store) as store,
        tempfile.TemporaryDirectory(prefix="outlast-", dir="/run") as spool,
    ):
        seq = max((one.id.seq for one in store.checkpoints(key)), default=0) + 1
        id_ = CheckpointId(0, seq)
        images = Path(spool, "images")
        images.mkdir(mode=0o700)
        uid = Path(f"/proc/{pid}").stat().st_uid
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        files: list[dict[str, Any]] = []
        try:
            result = criu.dump(
                tree,
                images,
                lambda: files.__setitem__(slice(None), open_for_writing(tree.tasks())),
                tcp=config.checkpoint.tcp,
            )
        except CriuError as error:
            kept = Path(tempfile.gettempdir(), f"outlast-dump-{pid}.log")
            if error.log.exists():
                shutil.copyfile(error.log, kept)
            hint = (
                error.hint or "start it with 'setsid PROGRAM >FILE 2>&1 </dev/null', or under 'outlast run'"
            )
            raise CheckpointRefused(str(error).replace(str(error.log), str(kept)), hint=hint) from None
        with result:
            put_back(result.memories, images)
        (images / "dump.log").unlink(missing_ok=True)
        meta = {
            "node": os.uname().nodename.split(".")[0],
            "epoch": 0,
            "seq": seq,
            "time": time.time(),
            "uid": uid,
            "argv": argv,
            "pause_ms": round(result.pause * 1000, 3),
            "mode": result.mode,
            "criu": result.criu_version,
            "kernel": os.uname().release,
            "machine": os.uname().machine,
            "files": files,
            "passed": [],
        }
        if store.get_record(key, "start") is None:
            record = {
                "uid": uid,
                "argv": argv,
                "interval": 0,
                "node": meta["node"],
                "epoch": 0,
                "time": time.time(),
            }
            store.put_record(key, "start", {**record, "files": []})
        return store.publish(key, id_, images, meta).id.name(name)
