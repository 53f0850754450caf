"""What `outlast store` does, for the administrator of a site, as root on a node."""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from outlast.config import Config
from outlast.errors import CorruptCheckpoint, UsageError
from outlast.model import CheckpointId, JobKey, parse_checkpoint_name, parse_interval

if TYPE_CHECKING:
    # Otherwise imported where it is used: every command makes this parser, and few need a store.
    from outlast.store import Store

_ENDED, _LOST, _GRACE = "7d", "30d", "2d"


def add_verbs(parser: argparse.ArgumentParser) -> None:
    """Add the verbs to the parser of `outlast store`; each sets `act`, to be called by `run`."""
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, act: Callable[[Config, argparse.Namespace], Any]) -> argparse.ArgumentParser:
        text = inspect.cleandoc(act.__doc__ or "")
        sub = verbs.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            epilog=parser.epilog,
            formatter_class=parser.formatter_class,
        )
        sub.set_defaults(act=act)
        sub.add_argument("--json", action="store_true", help="print one JSON value")
        return sub

    sub = verb("init", _init)
    sub.add_argument("--rotate", action="store_true", help="encrypt with a fresh key from now on")
    sub.add_argument("--of", metavar="NAME", default="", help="that of the further store NAME")
    sub = verb("check", _check)
    sub.add_argument("job", nargs="?", metavar="JOB", help="only this job's")
    sub.add_argument("--read-data", action="store_true", help="read and verify every stored page, too")
    sub = verb("forget", _forget)
    sub.add_argument("job", metavar="JOB")
    sub.add_argument("--keep-last", type=int, default=1, metavar="N", help="keep the newest N (1)")
    sub.add_argument(
        "--keep-within", metavar="TIME", help="keep those made within 30m, 12h, 2d of the newest"
    )
    sub.add_argument("--keep-hourly", type=int, default=0, metavar="N", help="keep one of each of N hours")
    sub.add_argument("--keep-daily", type=int, default=0, metavar="N", help="keep one of each of N days")
    sub = verb("prune", _prune)
    sub.add_argument("--ended", default=_ENDED, metavar="TIME", help=f"after an end: {_ENDED}")
    sub.add_argument("--lost", default=_LOST, metavar="TIME", help=f"if there was no end: {_LOST}")
    sub.add_argument("--grace", default=_GRACE, metavar="TIME", help=f"in the trash: {_GRACE}")
    verb("stats", _stats)
    for name, act in (("pin", _pin), ("unpin", _unpin)):
        verb(name, act).add_argument("checkpoint", metavar="CHECKPOINT", help="its name, such as 17@1.4")


def run(
    config: Config,
    args: argparse.Namespace,
    say: Callable[[str], None],
    draw: Callable[[str, int, int], None] = lambda *_: None,
) -> None:
    """Do what *args* say, and say what came of it. Raises OutlastError.

    *draw* hears meanwhile of what takes long: what it is about, how much of it is done, and of how much.
    """
    args.draw = draw
    answer = args.act(config, args)
    lines = answer.pop("text")
    for line in [json.dumps(answer)] if args.json else lines:
        say(line)
    if answer.get("damaged"):
        raise CorruptCheckpoint(
            f"{len(answer['damaged'])} checkpoints are damaged", hint="jobs go on from those that are good"
        )


def _init(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Make the key that checkpoints are encrypted with.

    A key that is there stays, and with --rotate it is kept to read what it encrypted. Copy the file to all
    nodes, and keep a copy elsewhere: without it no checkpoint can be read.
    """
    from outlast.store import add_key, read_keyring

    if args.of and args.of not in config.store.other:
        raise UsageError(
            f"store {args.of!r}: not in the configuration",
            hint=f"the further stores are: {', '.join(config.store.other) or 'none'}",
        )
    path = config.store.named(args.of).key if args.of else config.store.key
    made = args.rotate or not path.exists()
    if made:
        add_key(path)
    key_id = read_keyring(path).newest
    text = [f"{path}: {'made key' if made else 'has key'} {key_id}"]
    if made:
        text.append("copy the file to all nodes (root, mode 0600), and keep a copy elsewhere")
        text.append("a node without it neither stores checkpoints nor restores them")
    return {"key": key_id, "made": made, "file": str(path), "text": text}


def _check(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Verify checkpoints: manifests and packs' sizes, and with --read-data every byte.

    Ends with exit code 74 if one is damaged.
    """
    from outlast.store import KeyMissing

    good, pages = [], 0
    damaged = []
    with _opened(config) as store:
        for job in _jobs(config, store, args.job):
            for id in store.published(job):
                name = id.name(job.job_id)
                draw = functools.partial(args.draw, name)
                try:
                    pages += store.verify(job, id, read_data=args.read_data, progress=draw)
                except (CorruptCheckpoint, KeyMissing) as error:
                    damaged.append({"checkpoint": name, "why": str(error)})
                except UsageError:
                    continue  # forgotten meanwhile
                else:
                    good.append(name)
    text = [f"{one['checkpoint']}: {one['why']}" for one in damaged]
    read = f", {pages} pages read" if args.read_data else ""
    text.append(f"{len(good)} good, {len(damaged)} damaged{read}")
    return {"good": good, "damaged": damaged, "pages": pages if args.read_data else None, "text": text}


def _forget(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Remove old checkpoints of a job; the newest and those that are pinned always stay."""
    from outlast.store import Policy

    within = parse_interval(args.keep_within) if args.keep_within else 0
    if min(args.keep_last, args.keep_hourly, args.keep_daily) < 0 or args.keep_last < 1:
        raise UsageError("store forget: the newest checkpoint is always kept, and nothing is kept -1 times")
    policy = Policy(args.keep_last, within, args.keep_hourly, args.keep_daily)
    with _opened(config) as store:
        (job,) = _jobs(config, store, args.job)
        gone = store.forget(job, 1, policy.choose)
        left = [checkpoint.id.name(job.job_id) for checkpoint in store.checkpoints(job)]
    return {"forgotten": gone, "left": left, "text": [f"{gone} forgotten; left: {' '.join(left) or 'none'}"]}


def _prune(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Put jobs that are long over into the store's trash, and empty what has lain there long.

    To be run once a day, from any one node. No job is held up by it.
    """
    ended, lost, grace = (float(parse_interval(getattr(args, name))) for name in ("ended", "lost", "grace"))
    draw = functools.partial(args.draw, "jobs")
    with _opened(config) as store:
        done = store.prune(config.cluster, ended=ended, lost=lost, grace=grace, progress=draw)
    text = [f"to the trash: {name}" for name in done.trashed] + [f"removed: {name}" for name in done.removed]
    return {"trashed": done.trashed, "removed": done.removed, "text": text or ["nothing to do"]}


def _stats(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Show what each job has in the store."""
    from outlast.store import KeyMissing

    rows: list[dict[str, Any]] = []
    with _opened(config) as store:
        for job in store.jobs(config.cluster):
            usage, found = store.usage(job), []
            # Of a foreign key there is nothing to tell but the room that it takes.
            with contextlib.suppress(KeyMissing):
                found = store.checkpoints(job)
            rows.append(
                {
                    "job": job.job_id,
                    "checkpoints": len(found),
                    "pinned": sorted(id.name(job.job_id) for id in store.pins(job)),
                    "image_bytes": found[0].image_bytes if found else 0,
                    "stored_bytes": usage.stored_bytes,
                    "idle_s": round(usage.idle) if found else None,
                }
            )
    total = sum(row["stored_bytes"] for row in rows)
    text = [
        f"{row['job']}: {row['checkpoints']} checkpoints, the newest of {row['image_bytes']} bytes; "
        f"{row['stored_bytes']} bytes in the store"
        + (f", pinned: {' '.join(row['pinned'])}" if row["pinned"] else "")
        for row in rows
    ]
    return {"jobs": rows, "stored_bytes": total, "text": [*text, f"{len(rows)} jobs, {total} bytes"]}


def _pin(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Keep a checkpoint until it is unpinned."""
    with _opened(config) as store:
        job, id = _named(config, args.checkpoint)
        store.pin(job, id)
    return {"pinned": args.checkpoint, "text": [f"{args.checkpoint}: stays until it is unpinned"]}


def _unpin(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Let a pinned checkpoint go when its time comes."""
    with _opened(config) as store:
        job, id = _named(config, args.checkpoint)
        if not store.unpin(job, id):
            raise UsageError(f"{args.checkpoint}: is not pinned")
    return {"unpinned": args.checkpoint, "text": [f"{args.checkpoint}: goes when its time comes"]}


def _opened(config: Config) -> Store:
    from outlast.store import open_store

    return open_store(config.store)


def _named(config: Config, name: str) -> tuple[JobKey, CheckpointId]:
    job_id, id = parse_checkpoint_name(name)
    return JobKey(config.cluster, job_id), id


def _jobs(config: Config, store: Store, wanted: str | None) -> Iterator[JobKey]:
    """Yield the job that is *wanted*, or else all of the cluster. Raises UsageError."""
    jobs = store.jobs(config.cluster)
    if wanted is None:
        yield from jobs
    elif JobKey(config.cluster, wanted) in jobs:
        yield JobKey(config.cluster, wanted)
    else:
        raise UsageError(f"job {wanted}: nothing of it is in the store of cluster {config.cluster}")
