"""The command line: parse, call one function, turn its error into text and an exit code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import outlast
from outlast import control, storekeeper
from outlast.config import DEFAULT_PATH, Config, read_config
from outlast.control import Peer
from outlast.errors import ConfigError, OutlastError, UsageError
from outlast.model import JobKey, parse_checkpoint_name, parse_interval

_EXIT_CODES = """\
exit codes:
   0  done
   1  something else went wrong; the message says what
  64  the command is wrong: no such job of yours, a bad interval
  65  the job cannot be checkpointed as it is
  69  the scheduler refused
  70  no checkpoint could be restored
  73  the store refused; its administrator must look
  74  stored data is damaged
  75  the store or the scheduler did not answer; try again
  78  the configuration is wrong
"""

_RUNTIME = Path("/run/outlast/jobs")
_CHECKPOINT_SECONDS = 600.0


def _config(args: argparse.Namespace) -> Config:
    """Return the configuration; with --store it needs no file."""
    if args.store is None:
        return read_config(args.config)
    config = read_config(args.config) if args.config.exists() else Config()
    url = args.store if "://" in args.store else f"file://{Path(args.store).absolute()}"
    return dataclasses.replace(config, store=dataclasses.replace(config.store, url=url))


def _ask(args: argparse.Namespace, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Ask the watcher, or where none runs on this machine, the store itself."""
    watcher = _watcher_socket(args)
    if args.store is None and watcher.exists():
        return control.call(watcher, request)
    if os.geteuid() != 0 and args.store is None:
        raise UsageError(
            f"{watcher}: no watcher on this machine",
            hint="ask on the machine that the watcher runs on, usually the scheduler's controller",
        )
    from outlast import direct

    return direct.answer(_config(args), Peer(os.getpid(), os.geteuid(), os.getegid()), request)


def _watcher_socket(args: argparse.Namespace) -> Path:
    # A user may not be allowed to read the file; the socket is then where it is by default.
    try:
        return read_config(args.config).watcher.socket
    except ConfigError:
        return Config().watcher.socket


def _status(args: argparse.Namespace) -> None:
    """Show your jobs that are being checkpointed."""
    jobs = _ask(args, {"op": "status"})["jobs"]
    if args.json:
        _print_json({"jobs": jobs})
        return
    rows = [
        (
            job["job_id"],
            job["name"],
            job["state"],
            ",".join(job["nodes"]) or "-",
            job["epoch"],
            job["checkpoints"],
            _age(job["newest"]["created"]) if job["newest"] else "-",
            _milliseconds(job["newest"]["pause_ms"]) if job["newest"] else "-",
        )
        for job in jobs
    ]
    _print_table(("JOB", "NAME", "STATE", "NODE", "RESTARTS", "CKPTS", "NEWEST", "PAUSE"), rows)


def _list(args: argparse.Namespace) -> None:
    """List the checkpoints of a job, the newest first."""
    checkpoints = _ask(args, {"op": "list", "job": args.job})["checkpoints"]
    if args.json:
        _print_json({"checkpoints": checkpoints})
        return
    rows = [
        (
            one["name"],
            _moment(one["created"]),
            one["node"],
            _size(one["image_bytes"]),
            _size(one["stored_bytes"]),
            _milliseconds(one["pause_ms"]),
        )
        for one in checkpoints
    ]
    _print_table(("CHECKPOINT", "TIME", "NODE", "IMAGE", "STORED", "PAUSE"), rows)


def _events(args: argparse.Namespace) -> None:
    """Show what happened to a job: starts, checkpoints, failures, restarts."""
    events = _ask(args, {"op": "events", "job": args.job})["events"]
    if args.json:
        _print_json({"events": events})
        return
    for event in events:
        print(f"{_moment(event['time'])}  {event['node']:<8} {event['event']:<18} {event['text']}")


def _checkpoint(args: argparse.Namespace) -> None:
    """Take a checkpoint of a running job now, and wait until it is in the store.

    With --pid, of a process that Outlast did not start, and of all below it: as root, and only if it leads a
    session and has no terminal. 'outlast recover' starts it again.
    """
    if args.pid is not None:
        from outlast import foreign

        name = foreign.checkpoint(_config(args), args.pid, args.job or f"pid-{args.pid}")
        _print_json({"name": name}) if args.json else print(name)
        return
    if args.job is None:
        raise UsageError("checkpoint: of what?", hint="name a job, or with --pid a process")
    manager = _RUNTIME / args.job / "manager.sock"
    if manager.exists():
        _checkpoint_here(args, manager)
        return
    before = {one["name"] for one in _ask(args, {"op": "list", "job": args.job})["checkpoints"]}
    failures = _failures(args)
    _ask(args, {"op": "checkpoint", "job": args.job})
    deadline = time.monotonic() + _CHECKPOINT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.5)
        newest = _ask(args, {"op": "list", "job": args.job})["checkpoints"]
        if newest and newest[0]["name"] not in before:
            _print_json(newest[0]) if args.json else print(newest[0]["name"])
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
            _print_json({"name": now["newest"]}) if args.json else print(now["newest"])
            return
        if now["last_error"] not in (None, before["last_error"]):
            raise OutlastError(now["last_error"])
    raise OutlastError(f"job {args.job}: no checkpoint within {_CHECKPOINT_SECONDS:.0f} s")


def _migrate(args: argparse.Namespace) -> None:
    """Save a running job, and have it go on on another node."""
    _ask(args, {"op": "migrate", "job": args.job, "to": args.to})
    print(f"job {args.job} is asked to move; 'outlast events {args.job}' shows how it goes")


def _hold(args: argparse.Namespace) -> None:
    """Save a running job, and have it wait until it is released."""
    _ask(args, {"op": "hold", "job": args.job})
    print(f"job {args.job} is asked to stop; 'outlast release {args.job}' lets it go on")


def _release(args: argparse.Namespace) -> None:
    """Let a job that was held go on."""
    _ask(args, {"op": "release", "job": args.job})


def _restart(args: argparse.Namespace) -> None:
    """Have a job go on from its newest checkpoint, or from one of your choice."""
    job = args.job
    name = None
    if "@" in job:
        name, job = job, parse_checkpoint_name(job)[0]
    print(_ask(args, {"op": "restart", "job": job, "checkpoint": name})["checkpoint"])


def _drain(args: argparse.Namespace) -> None:
    """Take a node out of service, and have its checkpointed jobs go on on others."""
    jobs = _ask(args, {"op": "drain", "node": args.node})["jobs"]
    print(f"{args.node}: drained; {len(jobs)} jobs move{': ' + ' '.join(jobs) if jobs else ''}")


def _explain(args: argparse.Namespace) -> None:
    """Say what of a running job, or of the process PID, does not go with a checkpoint, and what to do."""
    manager = _RUNTIME / args.job / "manager.sock"
    if manager.exists():
        findings = list(control.call(manager, {"op": "explain"})["findings"])
    else:
        from outlast import foreign

        findings = foreign.findings(args.job)
    if args.json:
        _print_json({"findings": findings})
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
    events = _ask(args, {"op": "events", "job": args.job})["events"]
    return [event for event in events if event["event"] == "checkpoint-failed"]


def _run(args: argparse.Namespace) -> None:
    """Run a command under checkpoints on this machine, without a scheduler.

    With --name, running the same name again after the machine or the command was lost goes on from the
    newest checkpoint. Needs root, since CRIU does.
    """
    from outlast import hooks

    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UsageError("run: no command", hint="write outlast run --interval 30s -- COMMAND")
    parse_interval(args.interval)
    if os.geteuid() != 0:
        raise UsageError("run: CRIU needs root", hint="run it with sudo")
    config = _config(args)
    if not config.store.url:
        raise ConfigError(
            "run: no store", hint="give --store DIR, or set url under [store] in " + str(args.config)
        )
    if args.store is not None and "://" not in args.store:
        Path(args.store).mkdir(mode=0o700, parents=True, exist_ok=True)
    _make_key(config.store.key)
    name = args.name or f"run-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
    hooks.run_standalone(args.config, config.store.url, name, args.interval, command, first=args.name is None)


def _make_key(path: Path) -> None:
    """See to it that there is a key to encrypt checkpoints with, and say so where one had to be made."""
    from outlast.store import add_key

    if not path.exists():
        add_key(path)
        print(f"outlast: made {path}: keep a copy, without it no checkpoint can be read", file=sys.stderr)


def _recover(args: argparse.Namespace) -> None:
    """Start a checkpoint on this machine, as its owner, and go on taking checkpoints. Needs root, as CRIU does."""
    from outlast import foreign, hooks

    parse_interval(args.interval)
    if os.geteuid() != 0:
        raise UsageError("recover: CRIU needs root", hint="run it with sudo")
    config = _config(args)
    name = args.name or f"recover-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
    uid, argv = foreign.adopt(config, args.checkpoint, name)
    hooks.run_standalone(args.config, config.store.url, name, args.interval, argv, first=False, uid=uid)


def _manager(args: argparse.Namespace) -> None:
    """Serve one job on this node (started by hooks and by 'run')."""
    from outlast.manager import Manager

    manager = Manager(
        _config(args), args.job, uid=args.uid, standalone=args.standalone, first=args.first, mom=args.mom
    )
    manager.run()


def _watcher(args: argparse.Namespace) -> None:
    """Watch the cluster's checkpointed jobs, and have those that are lost run again."""
    from outlast import watcher

    watcher.run(_config(args))


def _launcher(args: argparse.Namespace) -> None:
    """Serve a web page for your jobs: submit, watch, and what they print."""
    from outlast import launcher

    try:
        config = read_config(args.config)
    except ConfigError:
        config = Config()  # a user may not be allowed to read the file
    options = launcher.Options(
        host=args.host,
        port=args.port,
        socket=args.socket,
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        origin=args.origin,
        token_file=args.token_file,
    )
    launcher.serve(config, options, lambda line: print(line, flush=True))


def _store(args: argparse.Namespace) -> None:
    """Make the key of the checkpoint store; check, tidy and measure it (for root on a node)."""
    storekeeper.run(_config(args), args, print)


def _hook(args: argparse.Namespace) -> None:
    """Do what a scheduler's hook has to do (started by hooks/)."""
    from outlast import hooks

    if args.hook not in hooks.HOOKS:
        raise UsageError(f"hook {args.hook}: no such hook", hint=f"they are {', '.join(hooks.HOOKS)}")
    hooks.HOOKS[args.hook](args.config)


def _doctor(args: argparse.Namespace) -> None:
    """Check that this machine can do its part, and say how to mend what it cannot."""
    from outlast import doctor

    findings = doctor.examine(args.config)
    if args.json:
        _print_json({"findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            print(f"{finding.verdict:<5} {finding.what}: {finding.fact}")
            if finding.remedy:
                print(f"      {finding.remedy}")
    if any(finding.verdict == "FAIL" for finding in findings):
        sys.exit(1)


def _age(created: float) -> str:
    seconds = max(0, int(time.time() - created))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit} ago"
    return f"{seconds}s ago"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _print_json(value: object) -> None:
    print(json.dumps(value))


def _print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print *rows* under *head*, each column as wide as it must be."""
    texts = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _verify(args: argparse.Namespace) -> None:
    """Restore a checkpoint in a sandbox on this node, to see that it can be, and end it at once.

    For root on a node. The job is not touched, whether it runs or not.
    """
    from outlast.verify import verify

    job_id, id_ = parse_checkpoint_name(args.checkpoint)
    config = _config(args)
    found = verify(config, JobKey(config.cluster, job_id), id_)
    if args.json:
        _print_json(found)
    elif found["ok"]:
        print(f"{args.checkpoint}: {found['processes']} processes came up after {found['seconds']:.1f} s")
    if not found["ok"]:
        raise OutlastError(f"{args.checkpoint}: does not come up on this node: {found['why']}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="outlast",
        description=outlast.__doc__,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_PATH, metavar="FILE")
    parser.add_argument("--debug", action="store_true", help="log more, and show where an error arose")
    parser.add_argument("--version", action="version", version=f"outlast {outlast.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def verb(
        name: str, run: Callable[[argparse.Namespace], None], *, shown: bool = True
    ) -> argparse.ArgumentParser:
        text = run.__doc__ or ""
        form: dict[str, Any] = {"help": text.splitlines()[0]} if shown else {}
        sub = commands.add_parser(
            name,
            description=text,
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **form,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--store", metavar="DIR|URL", help="use this store, not the configured one")
        return sub

    for name, run in (("status", _status), ("list", _list), ("events", _events), ("checkpoint", _checkpoint)):
        sub = verb(name, run)
        sub.add_argument("--json", action="store_true", help="print one JSON value")
        if name == "checkpoint":
            sub.add_argument(
                "--pid", metavar="PID", help="of this process and all below it; then JOB is its name"
            )
        if name != "status":
            more: dict[str, Any] = {"nargs": "?"} if name == "checkpoint" else {}
            sub.add_argument("job", metavar="JOB", help="the scheduler's id of the job, such as 17", **more)
    for name, run in (("migrate", _migrate), ("hold", _hold), ("release", _release)):
        sub = verb(name, run)
        sub.add_argument("job", metavar="JOB", help="the scheduler's id of the job, such as 17")
        if name == "migrate":
            sub.add_argument("--to", metavar="NODE", help="this node; else the scheduler chooses")
    sub = verb("restart", _restart)
    sub.add_argument("job", metavar="JOB|CHECKPOINT", help="17, or 17@0.4 for an older checkpoint")
    verb("drain", _drain).add_argument("node", metavar="NODE")
    sub = verb("explain", _explain)
    sub.add_argument("--json", action="store_true", help="print one JSON value")
    sub.add_argument("job", metavar="JOB|PID", help="a job on this node, or as root any process")
    sub = verb("recover", _recover)
    sub.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="such as 17@1.4, or 17 for the newest of job 17"
    )
    sub.add_argument("--name", help="the name of the job that it becomes")
    sub.add_argument(
        "--interval", default="10m", metavar="TIME", help="time between checkpoints: 30s, 10m, 1h"
    )
    sub = verb("run", _run)
    sub.add_argument(
        "--interval", default="10m", metavar="TIME", help="time between checkpoints: 30s, 10m, 1h"
    )
    sub.add_argument("--name", help="the job's name, under which it goes on when it is run again")
    sub.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND [ARGUMENT...]")
    sub = verb("verify", _verify)
    sub.add_argument("--json", action="store_true", help="print one JSON value")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="its name, such as 17@1.4")
    verb("doctor", _doctor).add_argument("--json", action="store_true", help="print one JSON value")
    verb("watcher", _watcher)
    sub = verb("launcher", _launcher)
    sub.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="listen here: 127.0.0.1")
    sub.add_argument("--port", type=int, default=0, help="and at this port: any that is free")
    sub.add_argument("--socket", type=Path, metavar="PATH", help="or at this UNIX socket, for a proxy")
    sub.add_argument("--origin", metavar="URL", help="the proxy's own address: https://ood.example.org")
    sub.add_argument("--tls-cert", type=Path, metavar="FILE", help="serve HTTPS with this certificate")
    sub.add_argument("--tls-key", type=Path, metavar="FILE", help="and this key")
    sub.add_argument("--token-file", type=Path, metavar="FILE", help="take the token from here, print none")
    storekeeper.add_verbs(verb("store", _store))
    sub = verb("manager", _manager, shown=False)
    sub.add_argument("--job", required=True)
    sub.add_argument("--uid", type=int)
    sub.add_argument("--standalone", action="store_true")
    sub.add_argument("--first", action="store_true")
    sub.add_argument("--mom")
    verb("hook", _hook, shown=False).add_argument("hook")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``outlast`` command; returns its exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.debug else logging.INFO,
        format="%(asctime)s outlast: %(message)s"
        if args.run in (_manager, _watcher)
        else "outlast: %(message)s",
    )
    logging.getLogger("paramiko").setLevel(logging.WARNING)
    try:
        args.run(args)
    except OutlastError as error:
        if args.debug:
            raise
        print(f"outlast: {error}", file=sys.stderr)
        if error.hint:
            print(f"outlast: {error.hint}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python must not complain of it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
