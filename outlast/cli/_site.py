"""The verbs for those who operate a site: services, the store, the state of a machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from outlast import audit, storekeeper, terminal
from outlast.cli._verbs import RUNTIME, AddVerb, config_of, print_json, with_json
from outlast.config import Config, config_files, explain_config, read_config
from outlast.errors import ConfigError


def add(verb: AddVerb) -> None:
    """Add these verbs."""
    with_json(verb("doctor", _doctor))
    sub = with_json(verb("config", _config))
    sub.add_argument("action", choices=("check", "show"))
    sub = with_json(verb("metrics", _metrics))
    sub.add_argument("--textfile", type=Path, metavar="FILE", help="write them there, for the node exporter")
    with_json(verb("watcher", _watcher))
    sub = with_json(verb("launcher", _launcher))
    sub.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="listen here: 127.0.0.1")
    sub.add_argument("--port", type=int, default=0, help="and at this port: any that is free")
    sub.add_argument("--socket", type=Path, metavar="PATH", help="or at this UNIX socket, for a proxy")
    sub.add_argument("--origin", metavar="URL", help="the proxy's own address: https://ood.example.org")
    sub.add_argument("--tls-cert", type=Path, metavar="FILE", help="serve HTTPS with this certificate")
    sub.add_argument("--tls-key", type=Path, metavar="FILE", help="and this key")
    sub.add_argument("--token-file", type=Path, metavar="FILE", help="take the token from here, print none")
    storekeeper.add_verbs(verb("store", _store))


def _doctor(args: argparse.Namespace) -> None:
    """Check that this machine can do its part, and say how to mend what it cannot."""
    from outlast import doctor

    findings = doctor.examine(args.config)
    if args.json:
        print_json({"findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            print(f"{terminal.verdict(f'{finding.verdict:<5}')} {finding.what}: {finding.fact}")
            if finding.remedy:
                print(f"      {finding.remedy}")
    if any(finding.verdict == "FAIL" for finding in findings):
        sys.exit(1)


def _config(args: argparse.Namespace) -> None:
    """Check the configuration's files, or show every key: its value, and where that comes from."""
    if args.action == "check":
        read_config(args.config)
        paths = [str(path) for path in config_files(args.config)]
        print_json({"ok": True, "files": paths}) if args.json else print(f"{', '.join(paths)}: in order")
        return
    found = explain_config(args.config)
    if args.json:
        print_json({key: {"value": value, "from": origin} for key, (value, origin) in found.items()})
        return
    table = ""
    for key, (value, origin) in sorted(found.items(), key=lambda one: "." in one[0]):
        *tables, name = key.split(".")
        if ".".join(tables) != table:
            table = ".".join(tables)
            print(f"\n[{table}]")
        # What is printed can be read as a file again: JSON's texts and numbers are TOML's too.
        print(f"{f'{name} = {json.dumps(value)}':<48} # {origin}")


def _metrics(args: argparse.Namespace) -> None:
    """Print what Outlast does on this node in figures, as Prometheus reads them (for root)."""
    from outlast.exposition import render
    from outlast.metrics import node_metrics, write_textfile

    families = node_metrics(config_of(args), RUNTIME)
    if args.textfile is not None:
        write_textfile(render(families), args.textfile)
    if args.json:
        print_json({"metrics": [dataclasses.asdict(family) for family in families]})
    elif args.textfile is None:
        print(render(families), end="")


def _watcher(args: argparse.Namespace) -> None:
    """Watch the cluster's checkpointed jobs, and have those that are lost run again."""
    from outlast import watcher

    watcher.run(config_of(args))


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
    launcher.serve(config, options, lambda line: print(_as_json(line) if args.json else line, flush=True))


def _as_json(line: str) -> str:
    """Return what the launcher says as one JSON value; its address under that name."""
    return json.dumps({"address" if line.startswith("http") else "message": line})


def _store(args: argparse.Namespace) -> None:
    """Make the key of the checkpoint store; check, tidy and measure it (for root on a node)."""
    what = args.act.__name__.strip("_")
    if what == "stats":
        storekeeper.run(config_of(args), args, print)
        return
    checkpoint = getattr(args, "checkpoint", None)
    job = checkpoint.partition("@")[0] if checkpoint else getattr(args, "job", None) or ""
    facts = {"checkpoint": checkpoint} if checkpoint else {}
    with audit.attempt(f"store {what}", job=job, **facts), terminal.steps() as draw:
        storekeeper.run(config_of(args), args, print, draw)
