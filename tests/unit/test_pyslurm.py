"""What pyslurm tells is read as what Slurm's commands print, held to what both told of one slurmctld.

tests/unit/data/pyslurm holds what pyslurm 24.11.0, built against Debian's Slurm 24.11.5, and squeue and scontrol said
of a cluster of three nodes one after the other: with jobs of all kinds (running), when a task of an array had just
been queued again (requeued), and when a node had been lost (lost). Only the fields that are asked for are kept.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest

from outlast.model import SchedulerJob
from outlast.scheduler import SchedulerUnavailable, slurm
from outlast.scheduler import _slurm_text as text

DATA = Path(__file__).parent / "data" / "pyslurm"
SQUEUE = """\
echo "$*" >>{told}
case "$*" in
*--jobs=*) cat {data}/requeued.jobs.json ;;
*--json*) cat {data}/lost.jobs.json ;;
esac
"""


class Site:
    """A machine with Slurm's commands and with pyslurm."""

    def __init__(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.library = here / "library"
        shutil.copytree(DATA, self.library)
        self.told = here / "told"
        self.told.touch()
        programs = here / "bin"
        programs.mkdir()
        self._program(programs / "squeue", SQUEUE.format(told=self.told, data=DATA))
        self._program(programs / "scontrol", f"cat {DATA}/lost.nodes.json")
        # Where pyslurm is installed the interpreter finds it by itself.
        self._program(programs / "python", f'PYTHONPATH={self.library} exec {sys.executable} "$@"')
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        monkeypatch.setattr(sys, "executable", str(programs / "python"))
        monkeypatch.syspath_prepend(self.library)

    @staticmethod
    def _program(path: Path, script: str) -> None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def now(self, capture: str) -> None:
        """Have slurmctld be as in *capture*."""
        shutil.copy(DATA / f"{capture}.json", self.library / "now.json")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def by_commands(capture: str) -> dict[str, SchedulerJob]:
    return {job.job_id: job for job in text.parse_jobs((DATA / f"{capture}.jobs.json").read_text())}


@pytest.mark.parametrize("capture", ["running", "lost"])
def test_jobs_are_the_same_by_pyslurm_and_by_squeue(site: Site, capture: str) -> None:
    site.now(capture)

    assert {job.job_id: job for job in slurm.SlurmScheduler().jobs()} == by_commands(capture)


@pytest.mark.parametrize("capture", ["running", "lost"])
def test_nodes_are_the_same_by_pyslurm_and_by_scontrol(site: Site, capture: str) -> None:
    site.now(capture)

    nodes = slurm.SlurmScheduler().nodes()

    assert nodes == text.parse_nodes((DATA / f"{capture}.nodes.json").read_text())
    assert all(node.started > 1.7e9 for node in nodes)


def test_squeue_is_asked_only_of_jobs_whose_state_pyslurm_tells_in_part(site: Site) -> None:
    scheduler = slurm.SlurmScheduler()
    site.now("running")
    scheduler.jobs()
    assert site.told.read_text() == ""
    # The task 6_1 is COMPLETING, and what comes after that pyslurm does not say.
    site.now("requeued")
    found = {job.job_id: job for job in scheduler.jobs()}

    assert site.told.read_text() == "--all --states=all --jobs=10 --json\n"
    assert found["10"] == by_commands("requeued")["10"]
    assert found["10"].raw_state == "PENDING+COMPLETING"


def test_an_array_has_a_task_0(site: Site) -> None:
    site.now("lost")
    handles = {job.job_id: job.handle for job in slurm.SlurmScheduler().jobs()}

    assert handles["9"] == "6_0"
    assert handles["6"] == "6_3"


def test_the_rest_of_an_array_is_called_by_its_id(site: Site) -> None:
    site.now("running")
    handles = {job.job_id: job.handle for job in slurm.SlurmScheduler().jobs()}

    assert handles["6"] == "6"


def test_a_slurmctld_that_does_not_answer_is_unavailable_and_asked_again(site: Site) -> None:
    scheduler = slurm.SlurmScheduler()
    site.now("running")
    (site.library / "away").touch()
    with pytest.raises(SchedulerUnavailable, match="pyslurm: Unable to contact"):
        scheduler.jobs()
    (site.library / "away").unlink()

    assert len(scheduler.jobs()) == len(by_commands("running"))
    assert site.told.read_text() == ""


@pytest.mark.parametrize(
    "fault", ["raise ImportError('libslurmfull.so.42: not there')", "import os; os._exit(1)"]
)
def test_a_pyslurm_that_does_not_work_here_is_told_of_once_and_done_without(
    site: Site, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    (site.library / "pyslurm.py").write_text(fault)
    scheduler = slurm.SlurmScheduler()
    with caplog.at_level(logging.WARNING):
        first, second = scheduler.jobs(), scheduler.jobs()

    assert first == second == tuple(by_commands("lost").values())
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("pyslurm jobs: ")


def test_where_many_states_are_told_in_part_all_jobs_are_asked_for(site: Site) -> None:
    capture = json.loads((DATA / "requeued.json").read_text())
    (one,) = [row for row in capture["jobs"] if row["state"] == "COMPLETING"]
    capture["jobs"] = [one | {"id": number} for number in range(1, 1000)]
    (site.library / "now.json").write_text(json.dumps(capture))
    slurm.SlurmScheduler().jobs()

    assert site.told.read_text() == "--all --states=all --json\n"
