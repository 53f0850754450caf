"""Writes the tables of docs/limits.md from what the tests try: python -m ci.limits [--check]."""

from __future__ import annotations

import sys
from pathlib import Path

from criu_backend import way_out
from tests.criu.kinds.table import DELETED_NFS, GROUPS, REFUSED, STEP, TCP_OUTSIDE, WORKS

DOCUMENT = Path(__file__).parents[1] / "docs" / "limits.md"
BEGIN, END = "<!-- from tests/criu/kinds/table.py: python -m ci.limits -->", "<!-- end -->"


def tables() -> str:
    """Return the two tables as Markdown."""
    lines = ["| survives | |", "|---|---|"]
    for group in GROUPS:
        texts = [
            kind.text + (f" ({kind.note})" if kind.note else "") for kind in WORKS if kind.group == group
        ]
        lines.append(f"| {group} | {'; '.join(texts)} |")
    lines += ["", "| does not | what to do |", "|---|---|"]
    for kind in REFUSED:
        note = f" ({kind.note})" if kind.finding and kind.note else ""
        lines.append(f"| {kind.text}{note} | {way_out(kind.finding) if kind.finding else kind.note} |")
    lines.append(f"| {DELETED_NFS.text} | {way_out(DELETED_NFS.name)} |")
    lines.append(f"| {STEP.text} | {way_out('step')} |")
    lines.append(f"| {TCP_OUTSIDE.text} | {way_out('tcp-outside')} |")
    return "\n".join(lines)


def document() -> str:
    """Return docs/limits.md as it should be: what is there now, with the tables of now."""
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def main() -> int:
    """Entry point; with --check nothing is written, and 1 returned if something would be."""
    fresh = document()
    if fresh == DOCUMENT.read_text():
        return 0
    if sys.argv[1:] == ["--check"]:
        print("docs/limits.md is not what the tests try: run python -m ci.limits")
        return 1
    DOCUMENT.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
