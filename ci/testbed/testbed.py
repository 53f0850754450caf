"""A real Slurm cluster on one machine: a controller, a checkpoint store and three nodes in namespaces."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from ci.testbed import cluster, machine
from ci.testbed.layout import HERE, HOSTS, Layout, TestbedError, layout_from_environment

_HELP = """\
exec and user pass stdin, stdout and stderr through and end with the command's exit code, or with 125 if
it could not be started, as on a host that is off. Everything is kept in $OUTLAST_TESTBED_DIR
(/var/lib/outlast-testbed), by which several testbeds may be up at once; what can be used again is in
$OUTLAST_CACHE (/var/cache/outlast)."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="testbed",
        description=__doc__,
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = verbs.add_parser("up", help="start the cluster, with the product installed on every host")
    source = verb.add_mutually_exclusive_group()
    source.add_argument(
        "--product", type=Path, default=HERE.parents[1], metavar="DIR", help="the checkout to install from"
    )
    source.add_argument(
        "--no-product", action="store_const", dest="product", const=None, help="start a bare cluster"
    )
    verb.add_argument(
        "--languages", action="store_true", help="with Go, Node.js, Java, R, Open MPI and GNU parallel"
    )
    verb.add_argument(
        "--vm",
        action="store_true",
        help="have each node be a virtual machine (QEMU, in software): cgroup v2, home on NFS, kernels of their own",
    )
    verb.add_argument("--memory", action="store_true", help="have Slurm hold each job to its --mem")
    verbs.add_parser("down", help="end it and remove everything")
    verb = verbs.add_parser("status", help="what is up")
    verb.add_argument("--json", action="store_true", help="as one JSON object")
    for name, text in (
        ("exec", "run a command on a host as root"),
        ("user", "run a command on a host as alice"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("host", choices=HOSTS)
        verb.add_argument("command", nargs=argparse.REMAINDER)
    for name, text in (
        ("kill-node", "cut a host's power"),
        ("start-node", "boot a host"),
        ("cut", "pull a host's network cable"),
        ("heal", "put the cable back"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("host", choices=HOSTS)
    verb = verbs.add_parser("logs", help="what the daemons of all hosts, or of one, have logged")
    verb.add_argument("host", choices=HOSTS, nargs="?")
    return parser


def _run(layout: Layout, args: argparse.Namespace) -> None:
    # An `up` that is told to stop clears away what it has made so far.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(128 + signal.SIGHUP))
    if args.verb == "up":
        checkout = args.product.resolve() if args.product else None
        cluster.up(layout, checkout, languages=args.languages, with_machines=args.vm, memory=args.memory)
    elif args.verb == "down":
        cluster.down(layout)
    elif args.verb == "status" and args.json:
        hosts, scheduler = cluster.status(layout)
        sys.stdout.write(json.dumps({"hosts": hosts, "scheduler": scheduler}, indent=1) + "\n")
    elif args.verb == "status":
        cluster.show_status(layout)
    elif args.verb in ("exec", "user"):
        enter = str(HERE / "enter.sh")
        command = ["bash", enter, str(layout.state), args.verb, args.host, *args.command]
        os.execvp("bash", command)  # noqa: S606 - no shell between is the point
    elif args.verb == "kill-node":
        cluster.kill_node(layout, args.host)
    elif args.verb == "start-node":
        cluster.start_node(layout, args.host)
    elif args.verb in ("cut", "heal"):
        cluster.set_cut(layout, args.host, cut=args.verb == "cut")
    elif args.verb == "logs":
        for line in cluster.logs(layout, [args.host] if args.host else list(HOSTS)):
            sys.stdout.write(line + "\n")


def main() -> int:
    """Entry point of scripts/testbed; returns its exit code."""
    args = _parser().parse_args()
    os.umask(0o022)  # hosts' files are seen by all their users, whatever the caller prefers for his own
    try:
        machine.require_root()
        _run(layout_from_environment(), args)
    except TestbedError as error:
        print(f"testbed: {error}", file=sys.stderr)
        if error.hint:
            print(f"testbed: {error.hint}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return 0
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"testbed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
