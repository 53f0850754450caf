"""The command line: parse, call one function, turn its error into text and an exit code."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import outlast
from outlast import journal
from outlast.cli import _completion, _here, _jobs, _site, _views
from outlast.cli._verbs import EXIT_CODES
from outlast.config import DEFAULT_PATH
from outlast.errors import OutlastError

__all__ = ["main", "parser"]


class _JsonLines(logging.Formatter):
    """A log as JSON, one value a line; times are Unix times."""

    def format(self, record: logging.LogRecord) -> str:
        value: dict[str, Any] = {"time": record.created, "level": record.levelname.lower()}
        value["message"] = record.getMessage()
        if record.exc_info:
            value["trace"] = self.formatException(record.exc_info)
        return json.dumps(value)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    whole = argparse.ArgumentParser(
        prog="outlast",
        description=outlast.__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument(
        "--config", type=Path, default=DEFAULT_PATH, metavar="FILE", help=f"read this, not {DEFAULT_PATH}"
    )
    whole.add_argument("--debug", action="store_true", help="log more, and show where an error arose")
    whole.add_argument("--version", action="version", version=f"outlast {outlast.__version__}")
    commands = whole.add_subparsers(metavar="COMMAND", required=True)

    def verb(
        name: str, run: Callable[[argparse.Namespace], None], *, shown: bool = True
    ) -> argparse.ArgumentParser:
        text = inspect.cleandoc(run.__doc__ or "")
        form: dict[str, Any] = {"help": text.splitlines()[0]} if shown else {}
        sub = commands.add_parser(
            name,
            description=text,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **form,
        )
        sub.set_defaults(run=run, verb=name)
        sub.add_argument("--store", metavar="DIR|URL", help="use this store, not the configured one")
        return sub

    for verbs in (_jobs, _views, _here, _site, _completion):
        verbs.add(verb)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``outlast`` command; returns its exit code."""
    args = parser().parse_args(argv)
    journal.set_up(
        logging.DEBUG if args.debug else logging.INFO,
        service=args.verb in ("manager", "watcher"),
        job_id=args.job if args.verb == "manager" else "",
    )
    if args.verb == "watcher" and args.json:
        for handler in logging.getLogger().handlers:
            if not isinstance(handler, journal.JournalHandler):
                handler.setFormatter(_JsonLines())
    logging.getLogger("paramiko").setLevel(logging.WARNING)
    try:
        args.run(args)
    except OutlastError as error:
        if args.debug:
            raise
        return _tell(args, error)
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python must not complain of it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except PermissionError as error:
        if args.debug:
            raise
        return _tell(
            args, OutlastError(f"{error.filename}: {error.strerror}", hint="this may be root's to do")
        )
    except KeyboardInterrupt:
        return 130
    return 0


def _tell(args: argparse.Namespace, error: OutlastError) -> int:
    """Say on standard error what is wrong; return the exit code."""
    if getattr(args, "json", False):
        fault = {"error": str(error), "hint": error.hint, "exit_code": error.exit_code}
        print(json.dumps(fault), file=sys.stderr)
        return error.exit_code
    print(f"outlast: {error}", file=sys.stderr)
    if error.hint:
        print(f"outlast: {error.hint}", file=sys.stderr)
    return error.exit_code
