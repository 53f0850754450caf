"""What the verbs share: the parser of one, whom to ask, and how answers are printed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from outlast import control
from outlast.config import Config, read_config
from outlast.control import Peer
from outlast.errors import ConfigError, UsageError

EXIT_CODES = """\
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

RUNTIME = Path("/run/outlast/jobs")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


class AddVerb(Protocol):
    """Adds a verb to the command line, with its first line of documentation as help; returns its parser."""

    def __call__(
        self, name: str, run: Callable[[argparse.Namespace], None], *, shown: bool = True
    ) -> argparse.ArgumentParser:
        """Add verb *name*, which calls *run*; where it is not *shown*, help does not list it."""


def with_json(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give a verb the option --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    return parser


def config_of(args: argparse.Namespace) -> Config:
    """Return the configuration; with --store it needs no file."""
    if args.store is None:
        return read_config(args.config)
    config = read_config(args.config) if args.config.exists() else Config()
    url = args.store if "://" in args.store else f"file://{Path(args.store).absolute()}"
    if url == config.store.url:
        return config
    return dataclasses.replace(config, store=dataclasses.replace(config.store, url=url, local="", other={}))


def ask(args: argparse.Namespace, request: Mapping[str, Any]) -> Mapping[str, Any]:
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

    return direct.answer(config_of(args), Peer(os.getpid(), os.geteuid(), os.getegid()), request)


def _watcher_socket(args: argparse.Namespace) -> Path:
    # A user may not be allowed to read the file; the socket is then where it is by default.
    try:
        return read_config(args.config).watcher.socket
    except ConfigError:
        return Config().watcher.socket


def age(created: float) -> str:
    seconds = max(0, int(time.time() - created))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit} ago"
    return f"{seconds}s ago"


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"


def print_json(value: object) -> None:
    print(json.dumps(value))


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print *rows* under *head*, each column as wide as it must be."""
    texts = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(_width, column)) for column in zip(*texts, strict=True)]
    for row in texts:
        cells = (text + " " * (width - _width(text)) for text, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _width(text: str) -> int:
    """Return how many characters of *text* are seen: colors are not."""
    return len(_COLOR.sub("", text))
