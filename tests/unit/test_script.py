"""A batch script that slurmd removes with its job comes back from the checkpoint, where it was and nowhere else."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.manager._script import keep_script, put_script


@pytest.fixture
def spool() -> Iterator[Path]:
    """A directory below root's directories only, as slurmd's is."""
    if os.geteuid() != 0:
        pytest.skip("must be root")
    with tempfile.TemporaryDirectory(prefix="outlast-test-", dir="/run") as path:
        yield Path(path)


def kept(spool: Path, tmp_path: Path) -> Path:
    """A script of job 17 that is in the images, and slurmd has removed."""
    script = spool / "job00017" / "slurm_script"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nexit 7\n")
    keep_script(str(script), tmp_path)
    script.unlink()
    script.parent.rmdir()
    return script


def test_script_is_put_back_as_its_owners(spool: Path, tmp_path: Path) -> None:
    script = kept(spool, tmp_path)

    put_script(str(script), tmp_path, 2000)

    facts = script.stat()
    assert script.read_text() == "#!/bin/sh\nexit 7\n"
    assert (facts.st_uid, stat.S_IMODE(facts.st_mode)) == (2000, 0o700)


def test_script_that_is_there_stays(spool: Path, tmp_path: Path) -> None:
    script = kept(spool, tmp_path)
    script.parent.mkdir()
    script.write_text("another")

    put_script(str(script), tmp_path, 2000)

    assert script.read_text() == "another"


def test_script_is_not_put_where_a_user_leads(spool: Path, tmp_path: Path) -> None:
    script = kept(spool, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (spool / "job00017").symlink_to(tmp_path / "elsewhere")

    put_script(str(script), tmp_path, 2000)

    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    "program", ["/etc/passwd", "/run/../etc/job1/slurm_script", "job1/slurm_script", "/usr/bin/python3"]
)
def test_no_other_program_is_kept_or_put(program: str, tmp_path: Path) -> None:
    keep_script(program, tmp_path)

    assert list(tmp_path.iterdir()) == []
    (tmp_path / "script").write_text("x")
    put_script(program, tmp_path, 2000)
    assert not Path("/etc/job1").exists()
