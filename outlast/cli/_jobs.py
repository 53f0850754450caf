"""The verbs for jobs: what they do, and what is to be done with them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outlast import audit, control, terminal
from outlast.cli._verbs import (
    RUNTIME,
    AddVerb,
    age,
    ask,
    config_of,
    milliseconds,
    moment,
    print_json,
    print_table,
    with_json,
)
from outlast.errors import OutlastError, UsageError
from outlast.model import parse_checkpoint_name
from outlast.terminal import size

_CHECKPOINT_SECONDS = 600.0
_LEAVING_SECONDS = 900.0


def add(verb: AddVerb) -> None:
    """Add these verbs."""
    for name, run in (("status", _status), ("list", _list), ("events", _events), ("checkpoint", _checkpoint)):
        sub = with_json(verb(name, run))
        if name == "checkpoint":
            sub.add_argument(
                "--pid", metavar="PID", help="of this process and all below it; then JOB is its name"
            )
        if name != "status":
            more: dict[str, Any] = {"nargs": "?"} if name == "checkpoint" else {}
            sub.add_argument("job", metavar="JOB", help="the scheduler's id of the job, such as 17", **more)
    sub = with_json(verb("show", _show))
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="its name, such as 17@1.4")
    for name, run in (("migrate", _migrate), ("hold", _hold), ("release", _release)):
        sub = with_json(verb(name, run))
        sub.add_argument("job", metavar="JOB", help="the scheduler's id of the job, such as 17")
        if name == "migrate":
            sub.add_argument("--to", metavar="NODE", help="this node; else the scheduler chooses")
    sub = with_json(verb("restart", _restart))
    sub.add_argument("job", metavar="JOB|CHECKPOINT", help="17, or 17@0.4 for an older checkpoint")
    sub = with_json(verb("policy", _policy))
    sub.add_argument("job", metavar="JOB", help="the scheduler's id of the job, such as 17")
    sub.add_argument(
        "choice", metavar="KEY=VALUE", nargs="*", help="such as budget=3; none: the site's policy"
    )
    sub = with_json(verb("drain", _drain))
    sub.add_argument("node", metavar="NODE")
    sub.add_argument("--wait", action="store_true", help="until all of them have left it")
    sub = with_json(verb("explain", _explain))
    sub.add_argument("job", metavar="JOB|PID", help="a job on this node, or as root any process")


def _status(args: argparse.Namespace) -> None:
    """Show your jobs that are being checkpointed."""
    jobs = ask(args, {"op": "status"})["jobs"]
    if args.json:
        print_json({"jobs": jobs})
        return
    rows = [
        (
            job["job_id"],
            job["name"],
            terminal.state(job["state"]),
            ",".join(job["nodes"]) or "-",
            job["epoch"],
            job["checkpoints"],
            age(job["newest"]["created"]) if job["newest"] else "-",
            milliseconds(job["newest"]["pause_ms"]) if job["newest"] else "-",
            _interval(job),
        )
        for job in jobs
    ]
    print_table(("JOB", "NAME", "STATE", "NODE", "RESTARTS", "CKPTS", "NEWEST", "PAUSE", "INTERVAL"), rows)


def _interval(job: Mapping[str, Any]) -> str:
    if not job.get("interval"):
        return "-"
    return f"{job['interval']}s" + (" (auto)" if job["auto"] else "")


def _list(args: argparse.Namespace) -> None:
    """List the checkpoints of a job, the newest first."""
    checkpoints = ask(args, {"op": "list", "job": args.job})["checkpoints"]
    if args.json:
        print_json({"checkpoints": checkpoints})
        return
    rows = [
        (
            one["name"],
            moment(one["created"]),
            one["node"],
            size(one["image_bytes"]),
            size(one["stored_bytes"]),
            milliseconds(one["pause_ms"]),
            " and ".join(one["where"]) + ("" if one["durable"] else " only"),
        )
        for one in checkpoints
    ]
    print_table(("CHECKPOINT", "TIME", "NODE", "IMAGE", "STORED", "PAUSE", "WHERE"), rows)


def _events(args: argparse.Namespace) -> None:
    """Show what happened to a job: starts, checkpoints, failures, restarts."""
    events = ask(args, {"op": "events", "job": args.job})["events"]
    if args.json:
        print_json({"events": events})
        return
    for event in events:
        word = terminal.event(f"{event['event']:<18}")
        print(f"{moment(event['time'])}  {event['node']:<8} {word} {event['text']}")


def _checkpoint(args: argparse.Namespace) -> None:
    """Take a checkpoint of a running job now, and wait until it is in the store.

    With --pid, of a process that Outlast did not start, and of all below it: as root, and only if it leads a
    session and has no terminal. 'outlast recover' starts it again.
    """
    if args.pid is not None:
        from outlast import foreign

        job = args.job or f"pid-{args.pid}"
        with audit.attempt("checkpoint", job=job, pid=args.pid):
            name = foreign.checkpoint(config_of(args), args.pid, job)
        print_json({"name": name}) if args.json else print(name)
        return
    if args.job is None:
        raise UsageError("checkpoint: of what?", hint="name a job, or with --pid a process")
    manager = RUNTIME / args.job / "manager.sock"
    if manager.exists():
        _checkpoint_here(args, manager)
        return
    before = {one["name"] for one in ask(args, {"op": "list", "job": args.job})["checkpoints"]}
    failures = _failures(args)
    ask(args, {"op": "checkpoint", "job": args.job})
    deadline = time.monotonic() + _CHECKPOINT_SECONDS
    with terminal.progress(f"job {args.job}: dumped and uploaded"):
        while time.monotonic() < deadline:
            time.sleep(0.5)
            newest = ask(args, {"op": "list", "job": args.job})["checkpoints"]
            if newest and newest[0]["name"] not in before:
                print_json(newest[0]) if args.json else print(newest[0]["name"])
                return
            if len(failed := _failures(args)) > len(failures):
                raise OutlastError(failed[-1]["text"], hint=failed[-1].get("hint"))
    raise OutlastError(
        f"job {args.job}: no checkpoint within {_CHECKPOINT_SECONDS:.0f} s",
        hint=f"'outlast events {args.job}' says what it does",
    )


def _checkpoint_here(args: argparse.Namespace, manager: Path) -> None:
    """Have the job's manager on this node take a checkpoint.

    Maybe from inside the job, so no connection is kept meanwhile: CRIU could not dump it.
    """
    before = control.call(manager, {"op": "status"})
    control.call(manager, {"op": "checkpoint"})
    deadline = time.monotonic() + _CHECKPOINT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.5)
        now = control.call(manager, {"op": "status"})
        if now["newest"] not in (None, before["newest"]):
            print_json({"name": now["newest"]}) if args.json else print(now["newest"])
            return
        if now["last_error"] not in (None, before["last_error"]):
            raise OutlastError(now["last_error"])
    raise OutlastError(f"job {args.job}: no checkpoint within {_CHECKPOINT_SECONDS:.0f} s")


def _show(args: argparse.Namespace) -> None:
    """Show one checkpoint: when, where and how it was made, what it takes, and who went on from it."""
    job_id, _ = parse_checkpoint_name(args.checkpoint)
    one = dict(ask(args, {"op": "show", "job": job_id, "checkpoint": args.checkpoint})["checkpoint"])
    if args.json:
        print_json(one)
        return
    facts = [
        ("checkpoint", one["name"] + (", pinned" if one["pinned"] else "")),
        ("made", f"{moment(one['created'])} on {one['node']}, {age(one['created'])}"),
        ("how", f"{one['mode'] or '-'}, by CRIU {one['criu'] or '-'}"),
        ("stood still", milliseconds(one["pause_ms"])),
        ("image", size(one["image_bytes"])),
        ("stored", size(one["stored_bytes"])),
        ("restored", ", ".join(f"on {r['node']} at {moment(r['time'])}" for r in one["restored"]) or "never"),
    ]
    for name, text in facts:
        print(f"{name:<12} {text}")


def _migrate(args: argparse.Namespace) -> None:
    """Save a running job, and have it go on on another node."""
    answer = ask(args, {"op": "migrate", "job": args.job, "to": args.to})
    said = f"job {args.job} is asked to move; 'outlast events {args.job}' shows how it goes"
    _asked(args, said, request=answer.get("request"), to=args.to)


def _hold(args: argparse.Namespace) -> None:
    """Save a running job, and have it wait until it is released."""
    answer = ask(args, {"op": "hold", "job": args.job})
    said = f"job {args.job} is asked to stop; 'outlast release {args.job}' lets it go on"
    _asked(args, said, request=answer.get("request"))


def _release(args: argparse.Namespace) -> None:
    """Let a job that was held go on."""
    ask(args, {"op": "release", "job": args.job})
    _asked(args, "")


def _asked(args: argparse.Namespace, text: str, **facts: object) -> None:
    """Say what was asked of a job."""
    if args.json:
        print_json({"job": args.job, **facts})
    elif text:
        print(text)


def _restart(args: argparse.Namespace) -> None:
    """Have a job go on from its newest checkpoint, or from one of your choice."""
    job = args.job
    name = None
    if "@" in job:
        name, job = job, parse_checkpoint_name(job)[0]
    chosen = ask(args, {"op": "restart", "job": job, "checkpoint": name})["checkpoint"]
    print_json({"job": job, "checkpoint": chosen}) if args.json else print(chosen)


def _policy(args: argparse.Namespace) -> None:
    """Choose after which ends a job is run again; docs/use.md has the keys."""
    text = " ".join(args.choice)
    ask(args, {"op": "policy", "job": args.job, "text": text})
    if args.json:
        print_json({"job": args.job, "policy": text})


def _drain(args: argparse.Namespace) -> None:
    """Take a node out of service, and have its checkpointed jobs go on on others."""
    jobs = ask(args, {"op": "drain", "node": args.node})["jobs"]
    left = _wait_for_leaving(args, jobs) if args.wait else None
    if args.json:
        print_json({"node": args.node, "jobs": jobs, "left": left})
        return
    print(f"{args.node}: drained; {len(jobs)} jobs move{': ' + ' '.join(jobs) if jobs else ''}")


def _wait_for_leaving(args: argparse.Namespace, jobs: Sequence[str]) -> list[str]:
    """Wait until none of *jobs* is on the node any more; return them. Raises OutlastError."""
    deadline = time.monotonic() + _LEAVING_SECONDS
    with terminal.progress(f"jobs leave {args.node}", len(jobs)) as advance:
        while True:
            there = {
                job["job_id"] for job in ask(args, {"op": "status"})["jobs"] if args.node in job["nodes"]
            }
            still = [job for job in jobs if job in there]
            advance(len(jobs) - len(still))
            if not still:
                return list(jobs)
            if time.monotonic() > deadline:
                raise OutlastError(
                    f"{args.node}: still there after {_LEAVING_SECONDS:.0f} s: {' '.join(still)}",
                    hint=f"'outlast events {still[0]}' says why",
                )
            time.sleep(0.5)


def _explain(args: argparse.Namespace) -> None:
    """Say what of a running job, or of the process PID, does not go with a checkpoint, and what to do."""
    manager = RUNTIME / args.job / "manager.sock"
    if manager.exists():
        findings = list(control.call(manager, {"op": "explain"})["findings"])
    else:
        from outlast import foreign

        findings = foreign.findings(args.job)
    if args.json:
        print_json({"findings": findings})
        return
    for one in findings:
        where = f"process {one['pid']} ({one['name']})"
        print(f"{where}{'' if one['fd'] is None else ', descriptor ' + str(one['fd'])}: {one['what']}")
        print(
            f"    {'no checkpoint while it is there' if one['stops'] else 'the rest is restored'}: {one['way_out']}"
        )
    if not findings:
        print("nothing speaks against a checkpoint")


def _failures(args: argparse.Namespace) -> list[Mapping[str, Any]]:
    events = ask(args, {"op": "events", "job": args.job})["events"]
    return [event for event in events if event["event"] == "checkpoint-failed"]
