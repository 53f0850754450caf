"""Slurm's short form of lists of nodes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from outlast.errors import OutlastError

# One item of a list of nodes: commas inside its brackets do not end it.
_HOSTS = r"(?:[^][,]|\[[^][]+\])+"


def expand(hostlist: str) -> tuple[str, ...]:
    """Return the names that Slurm's short form means: `n[1-2,07],x` is n1, n2, n07 and x.

    Raises:
        OutlastError: *hostlist* is no such form.

    Source:
        scontrol(1), "show hostlist"; a width given by leading zeros is kept.
    """
    names: list[str] = []
    if hostlist and not re.fullmatch(f"{_HOSTS}(?:,{_HOSTS})*", hostlist):
        raise OutlastError(f"{hostlist!r}: not a list of nodes")
    for hosts in re.findall(_HOSTS, hostlist):
        pieces = enumerate(re.split(r"\[(.*?)\]", hosts))
        choices = [list(_numbers(text, hostlist)) if i % 2 else [text] for i, text in pieces]
        names += ("".join(choice) for choice in itertools.product(*choices))
    return tuple(names)


def _numbers(ranges: str, hostlist: str) -> Iterable[str]:
    for part in ranges.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(first) > int(last):
            raise OutlastError(f"{hostlist!r}: not a list of nodes")
        for number in range(int(first), int(last) + 1):
            yield str(number).zfill(len(first))
