"""Entries in the journal of a real systemd-journald, found by the job that they are about."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from ci.packages import Bare
from tests.packages.test_debian import CountingJob, install, until

pytestmark = [pytest.mark.packages, pytest.mark.timeout(600)]


def test_journal_knows_the_job_of_each_entry(bare: Bare, debs: Path, tmp_path: Path) -> None:
    install(bare, debs, "outlast")
    bare.run("sh", "-ec", "systemd-machine-id-setup; mkdir -p /run/systemd/journal")
    bare.start("/usr/lib/systemd/systemd-journald", log=tmp_path / "journald")
    deadline = time.monotonic() + 20
    while not bare.path("/run/systemd/journal/socket").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    job = CountingJob(bare, tmp_path / "log")
    job.run()
    job.goes_on()
    job.checkpoint()

    def entries() -> list[dict[str, str]]:
        found = bare.run("journalctl", "--output=json", "-t", "outlast", "JOB_ID=count").stdout
        return [json.loads(line) for line in found.splitlines() if line.startswith("{")]

    until(lambda: any(one.get("OUTLAST_EVENT") == "checkpoint" for one in entries()), job.story)
    (kept,) = [one for one in entries() if one.get("OUTLAST_EVENT") == "checkpoint"]

    assert kept["OUTLAST_CHECKPOINT"] == "count@0.1"
    assert kept["PRIORITY"] == "6"
    assert {"started", "dump"} <= {one.get("OUTLAST_EVENT") for one in entries()}
