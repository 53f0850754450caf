"""Jobs with Open MPI go on on another node, where they talk over loopback."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.conftest import Need

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(240)]

KINDS = Path(__file__).parents[1] / "criu" / "kinds"
# As docs/use.md tells the user to.
LOOPBACK = "export PMIX_MCA_ptl_tcp_if_include=lo OMPI_MCA_btl=self,sm"


@pytest.fixture
def program(cluster_to_break: Cluster, need: Need) -> str:
    """The MPI program, built."""
    has = cluster_to_break.try_on("n1", "sh", "-c", "command -v mpicc").stdout.strip()
    need("languages", None if has else "no mpicc on the testbed's nodes: scripts/testbed up --languages")
    shutil.copy(KINDS / "mpi.c", cluster_to_break.file("/shared/mpi.c"))
    cluster_to_break.on("n1", "mpicc", "-O2", "-o", "/shared/mpi", "/shared/mpi.c")
    return "/shared/mpi"


def test_open_mpi_goes_on_on_another_node_after_a_power_cut(cluster_to_break: Cluster, program: str) -> None:
    cluster = cluster_to_break
    job = cluster.submit(f"{LOOPBACK}\nmpirun --oversubscribe -np 2 {program}", "-n2", checkpoint="2s")
    job.wait_for("checkpoint", count=2, within=60)
    first = job.node
    cluster.cut_power(first)
    restored = job.wait_for("restored", within=120)
    before = len(job.lines())
    job.wait_for("checkpoint", count=job.checkpoints() + 1, within=60)
    cluster.on("ctl", "touch", f"{job.directory}/stop", user=True)

    assert job.wait_for_end() == ("COMPLETED", "0:0")
    assert restored.node != first
    ticks = [match for line in job.lines() if (match := re.fullmatch(r"tick (\d+) (.*)", line))]
    assert [int(match[1]) for match in ticks] == list(range(len(ticks)))
    assert {match[2] for match in ticks} == {"ok"}
    assert len(job.lines()) > before
