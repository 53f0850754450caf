"""The audit log, and who may do what with the watcher, without a cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from outlast import audit
from outlast.control import Peer
from outlast.errors import OutlastError, UsageError


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log of this test's own."""
    monkeypatch.setattr(audit, "LOG", tmp_path / "audit.log")
    monkeypatch.setattr(audit, "_SYSLOG", tmp_path / "none")
    return tmp_path / "audit.log"


def entries(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_an_entry_says_what_for_whom_and_is_for_its_owner_only(log: Path) -> None:
    audit.record("verify", job="17", checkpoint="17@0.1")
    (entry,) = entries(log)
    assert (entry["what"], entry["job"], entry["uid"]) == ("verify", "17", os.getuid())
    assert (entry["refused"], entry["checkpoint"]) == (False, "17@0.1")
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_log_that_was_rotated_is_begun_anew(log: Path) -> None:
    audit.record("verify", job="17")
    log.rename(log.with_suffix(".1"))
    audit.record("recover", job="17")
    assert [entry["what"] for entry in entries(log)] == ["recover"]


def test_what_is_no_file_of_its_own_is_not_written_to(log: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("")
    for put in (log.symlink_to, log.hardlink_to, lambda path: os.mkfifo(log)):
        put(other)
        audit.record("verify", job="17")
        log.unlink()
    assert other.read_text() == ""


def test_a_log_that_cannot_be_written_costs_nothing(log: Path) -> None:
    log.mkdir()
    audit.record("verify", job="17")


def test_what_fails_is_told_as_refused_and_still_fails(log: Path) -> None:
    with pytest.raises(OutlastError), audit.attempt("verify", job="17"):
        raise OutlastError("no")
    assert [(entry["refused"], entry["why"]) for entry in entries(log)] == [(True, "no")]


def test_of_looking_only_refusals_are_told_and_of_all_else_everything(log: Path) -> None:
    def handle(peer: Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
        if peer.uid != 1000:
            raise UsageError("no such job of yours")
        return {}

    answer = audit.audited(handle, frozenset({"list"}))
    answer(Peer(7, 1000, 1000), {"op": "list", "job": "17"})
    answer(Peer(7, 1000, 1000), {"op": "restart", "job": "17", "checkpoint": "17@0.1"})
    for operation in ("list", "restart"):
        with pytest.raises(UsageError):
            answer(Peer(8, 2000, 2000), {"op": operation, "job": "17"})
    told = [(entry["what"], entry["uid"], entry["refused"], entry["pid"]) for entry in entries(log)]
    assert told == [("restart", 1000, False, 7), ("list", 2000, True, 8), ("restart", 2000, True, 8)]
    assert entries(log)[0]["checkpoint"] == "17@0.1"
