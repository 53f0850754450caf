"""The verbs that run something on this machine: a command, a checkpoint, a job's manager."""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from outlast import audit, terminal
from outlast.cli._verbs import AddVerb, config_of, print_json, with_json
from outlast.errors import ConfigError, OutlastError, UsageError
from outlast.model import JobKey, parse_checkpoint_name, parse_pace


def add(verb: AddVerb) -> None:
    """Add these verbs."""
    sub = with_json(verb("recover", _recover))
    sub.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="such as 17@1.4, or 17 for the newest of job 17"
    )
    sub.add_argument("--name", help="the name of the job that it becomes")
    sub.add_argument(
        "--interval", default="10m", metavar="TIME", help="time between checkpoints: 30s, 10m, 1h; or auto"
    )
    sub = with_json(verb("run", _run))
    sub.add_argument(
        "--interval", default="10m", metavar="TIME", help="time between checkpoints: 30s, 10m, 1h; or auto"
    )
    sub.add_argument("--name", help="the job's name, under which it goes on when it is run again")
    sub.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND [ARGUMENT...]")
    sub = with_json(verb("verify", _verify))
    sub.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="its name, such as 17@1.4")
    sub.add_argument(
        "--due", action="store_true", help="the newest ones that were not verified for [verify] every"
    )
    sub = verb("manager", _manager, shown=False)
    sub.add_argument("--job", required=True)
    sub.add_argument("--uid", type=int)
    sub.add_argument("--standalone", action="store_true")
    sub.add_argument("--first", action="store_true")
    sub.add_argument("--mom")
    verb("hook", _hook, shown=False).add_argument("hook")


def _run(args: argparse.Namespace) -> None:
    """Run a command under checkpoints on this machine, without a scheduler.

    With --name, running the same name again after the machine or the command was lost goes on from the
    newest checkpoint. Needs root, since CRIU does.
    """
    from outlast import hooks

    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UsageError("run: no command", hint="write outlast run --interval 30s -- COMMAND")
    parse_pace(args.interval)
    if os.geteuid() != 0:
        raise UsageError("run: CRIU needs root", hint="run it with sudo")
    config = config_of(args)
    if not config.store.url:
        raise ConfigError(
            "run: no store", hint="give --store DIR, or set url under [store] in " + str(args.config)
        )
    if args.store is not None and "://" not in args.store:
        Path(args.store).mkdir(mode=0o700, parents=True, exist_ok=True)
    _make_key(config.store.key)
    name = args.name or f"run-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
    _announce(args, job=name)
    hooks.run_standalone(args.config, config.store.url, name, args.interval, command, first=args.name is None)


def _announce(args: argparse.Namespace, **facts: object) -> None:
    """With --json, tell which job begins; on standard error, since standard output is the command's."""
    if args.json:
        print(json.dumps(facts), file=sys.stderr, flush=True)


def _make_key(path: Path) -> None:
    """See to it that there is a key to encrypt checkpoints with, and say so where one had to be made."""
    from outlast.store import add_key

    if not path.exists():
        add_key(path)
        print(f"outlast: made {path}: keep a copy, without it no checkpoint can be read", file=sys.stderr)


def _recover(args: argparse.Namespace) -> None:
    """Start a checkpoint on this machine, as its owner, and go on taking checkpoints. Needs root, as CRIU does."""
    from outlast import foreign, hooks

    parse_pace(args.interval)
    if os.geteuid() != 0:
        raise UsageError("recover: CRIU needs root", hint="run it with sudo")
    config = config_of(args)
    name = args.name or f"recover-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
    with audit.attempt("recover", job=args.checkpoint.partition("@")[0], checkpoint=args.checkpoint, to=name):
        uid, argv = foreign.adopt(config, args.checkpoint, name)
    _announce(args, job=name, checkpoint=args.checkpoint, uid=uid, argv=argv)
    hooks.run_standalone(args.config, config.store.url, name, args.interval, argv, first=False, uid=uid)


def _verify(args: argparse.Namespace) -> None:
    """Restore a checkpoint in a sandbox on this node, to see that it can be, and end it at once.

    For root on a node. The job is not touched, whether it runs or not.
    """
    from outlast.verify import sentence, verify, verify_due

    if args.due == (args.checkpoint is not None):
        raise UsageError("verify: what?", hint="name one checkpoint, such as 17@1.4, or give --due")
    config = config_of(args)
    if args.due:
        bad = []
        all_found = []
        for found in verify_due(config):
            facts = {"checkpoint": found["checkpoint"], "ok": found["ok"]}
            audit.record("verify", job=str(found["checkpoint"]).partition("@")[0], **facts)
            all_found.append(found)
            bad += [] if found["ok"] else [sentence(found)]
            if found["ok"] and not args.json:
                print(sentence(found), flush=True)
        if args.json:
            print_json(all_found)
        if bad:
            raise OutlastError("\n".join(bad))
        return
    job_id, id_ = parse_checkpoint_name(args.checkpoint)
    with (
        audit.attempt("verify", job=job_id, checkpoint=args.checkpoint),
        terminal.progress(f"{args.checkpoint}: fetched and restored"),
    ):
        found = verify(config, JobKey(config.cluster, job_id), id_)
    if args.json:
        print_json(found)
    elif found["ok"]:
        print(sentence(found))
    if not found["ok"]:
        raise OutlastError(sentence(found))


def _manager(args: argparse.Namespace) -> None:
    """Serve one job on this node (started by hooks and by 'run')."""
    from outlast.manager import Manager

    manager = Manager(
        config_of(args), args.job, uid=args.uid, standalone=args.standalone, first=args.first, mom=args.mom
    )
    manager.run()


def _hook(args: argparse.Namespace) -> None:
    """Do what a scheduler's hook has to do (started by hooks/)."""
    from outlast import hooks

    if args.hook not in hooks.HOOKS:
        raise UsageError(f"hook {args.hook}: no such hook", hint=f"they are {', '.join(hooks.HOOKS)}")
    hooks.HOOKS[args.hook](args.config)
