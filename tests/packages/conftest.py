"""What the tests here share: the packages, built once, and bare machines."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from ci import packages
from ci.testbed.layout import Layout, TestbedError, layout_from_environment
from tests.conftest import Need

Boot = Callable[[Path], AbstractContextManager[packages.Bare]]

NEWER = "9.9.9"


@pytest.fixture(scope="session")
def layout(need: Need) -> Iterator[Layout]:
    """A place of our own, beside the cache that all share."""
    state = Path(tempfile.mkdtemp(prefix="outlast-packages-"))
    state.chmod(0o755)
    found = Layout(state, layout_from_environment().cache)
    try:
        for kind in ("build", "fresh"):
            packages.root(kind, found)
    except TestbedError as error:
        need("packages", str(error))
    yield found
    shutil.rmtree(state)


@pytest.fixture(scope="session")
def debs(layout: Layout) -> Path:
    """A directory with the Debian packages of this checkout."""
    out = layout.state / "debs"
    packages.build("deb", layout, out)
    return out


@pytest.fixture(scope="session")
def newer_debs(layout: Layout) -> Path:
    """A directory with the same packages, in a version to upgrade to."""
    out = layout.state / "newer"
    packages.build("deb", layout, out, version=NEWER)
    return out


@pytest.fixture
def bare(layout: Layout) -> Iterator[packages.Bare]:
    """A bare machine, which sees the directory of all that was built at /shared."""
    with packages.bare(layout, layout.state) as machine:
        yield machine
