"""Real CRIU, real processes: run inside a node of the testbed by 'scripts/test criu'."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from criu_backend import Criu, CriuError
from criu_backend._capsule import HELPER
from tests.criu.capsules import Place

USER = 2000


@pytest.fixture(scope="session", autouse=True)
def _criu(need: Callable[[str, str | None], None]) -> None:
    """Skip, and say why in CRIU's own words, where CRIU cannot work."""
    need("criu", None if os.geteuid() == 0 else "CRIU must be root")
    need("criu", None if shutil.which("criu") else "no criu on PATH")
    need("criu", None if HELPER.exists() else f"no {HELPER}: install the product")
    try:
        Criu().version()
    except CriuError as error:
        need("criu", str(error))
    check = subprocess.run(["criu", "check"], capture_output=True, text=True)
    need("criu", None if check.returncode == 0 else "criu check: " + check.stderr.strip().splitlines()[-1])


def _place(uid: int) -> Iterator[Place]:
    # Not pytest's own directory, which only root may enter.
    path = Path(tempfile.mkdtemp(prefix="criu-", dir="/tmp"))
    path.chmod(0o755)
    os.chown(path, uid, uid)
    place = Place(path, uid)
    try:
        yield place
    finally:
        place.close()


@pytest.fixture(params=["root", "user", "user, forked"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A directory for the test and a user: once root, and somebody without rights by plain and forked dumps."""
    for place in _place(0 if request.param == "root" else USER):
        if "forked" in request.param:
            place.mode = "forked"
        yield place


@pytest.fixture
def user_place() -> Iterator[Place]:
    """The same, for the user only."""
    yield from _place(USER)


@pytest.fixture
def lasting_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins of small jobs, too, live until the dump's result is closed."""
    monkeypatch.setattr("criu_backend._small._MOST_TAKEN", -1)


@pytest.fixture(params=["twins end at once", "twins last"])
def either_way(request: pytest.FixtureRequest) -> None:
    """Once as dumps of small jobs are made, and once as those of large ones."""
    if request.param == "twins last":
        request.getfixturevalue("lasting_twins")
