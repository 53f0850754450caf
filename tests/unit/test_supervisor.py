"""What starts a job's manager anew gives up one that cannot start, and never one that lives."""

from __future__ import annotations

import subprocess
from pathlib import Path

from outlast.hooks import supervisor


def run(tmp_path: Path, command: str, good_life: int) -> tuple[int, int]:
    """Supervise *command*, which adds a line to `deaths`; return the exit code and how many there were."""
    waited_for = tmp_path / "starting"
    waited_for.touch()
    deaths = tmp_path / "deaths"
    argv = ["/bin/sh", "-c", supervisor(good_life, pause=0.05), str(waited_for), "/bin/sh", "-c", command]
    done = subprocess.run(argv, env={"DEATHS": str(deaths), "PATH": "/usr/bin:/bin"}, timeout=60, check=False)
    return done.returncode, len(deaths.read_text().splitlines())


def test_a_manager_that_dies_at_once_is_given_up_after_five_deaths(tmp_path: Path) -> None:
    code, deaths = run(tmp_path, 'echo >>"$DEATHS"; exit 3', 60)

    assert (code, deaths) == (1, 5)
    assert not (tmp_path / "starting").exists()


def test_deaths_after_a_good_life_do_not_add_up(tmp_path: Path) -> None:
    # The third life is a good one; four short ones follow, and then it ends well.
    command = 'echo >>"$DEATHS"; n=$(wc -l <"$DEATHS"); [ "$n" != 3 ] || sleep 2; [ "$n" -ge 7 ]'
    code, deaths = run(tmp_path, command, 2)

    assert (code, deaths) == (0, 7)
    assert (tmp_path / "starting").exists()
