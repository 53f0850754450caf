"""What is left of a testbed after `down`, whatever ended its `up`: nothing, in files and in the kernel."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.testbeds import NOTHING, Testbed, eventually, machine_wide

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def _root(need: Callable[[str, str | None], None]) -> None:
    need("slurm", None if os.geteuid() == 0 else "the testbed must be root")


@pytest.fixture
def second(tmp_path: Path) -> Iterator[Testbed]:
    """A testbed beside the first that is not up, for tests that start and break it."""
    other = Testbed(tmp_path / "an other")
    yield other
    other("down")


def test_nothing_of_a_testbed_is_seen_machine_wide_and_nothing_stays_after_down(second: Testbed) -> None:
    before = machine_wide()
    second("up", "--no-product", within=500)
    during = machine_wide()
    # What a job's owner may leave behind: a daemon in a session and namespaces of its own.
    second("exec", "n1", "sh", "-c", "setsid unshare --mount --pid --fork sleep 4245 >/dev/null 2>&1 &")
    second("kill-node", "n2")
    second("cut", "n3")
    second("down")

    assert during == before
    assert second.left() == NOTHING
    second("down")
    assert second.left() == NOTHING
    assert machine_wide() == before


def test_down_finds_everything_when_its_files_are_lost(second: Testbed) -> None:
    second("up", "--no-product", within=500)
    shutil.rmtree(second.state, ignore_errors=True)
    second("down")

    assert second.left() == NOTHING


@pytest.mark.parametrize("attempt", range(4))
def test_an_up_that_is_killed_leaves_what_down_clears(second: Testbed, attempt: int) -> None:
    first = second.start("up", "--no-product")
    delay = random.Random(attempt).uniform(0.2, 1.5)  # noqa: S311
    time.sleep(delay)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second("down")

    assert second.left() == NOTHING, f"killed after {delay:.2f} s"


def test_an_up_that_is_killed_is_cleared_by_the_next(second: Testbed) -> None:
    first = second.start("up", "--no-product")
    time.sleep(1.0)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second("up", "--no-product", within=500)

    assert {host["state"] for host in second.hosts().values()} == {"up"}


def test_an_up_that_is_told_to_stop_clears_after_itself(second: Testbed) -> None:
    first = second.start("up", "--no-product")
    eventually(lambda: second.processes(), within=500, what="a host has started")
    first.send_signal(signal.SIGTERM)
    code = first.wait(timeout=60)

    assert code == 128 + signal.SIGTERM
    assert second.left() == NOTHING


def test_a_directory_that_is_not_a_testbeds_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.touch()
    other = Testbed(tmp_path)
    up, down = other.try_("up", "--no-product", within=500), other.try_("down")

    assert (up.returncode, down.returncode) == (1, 1)
    assert "not a testbed's" in up.stderr
    assert precious.exists()
