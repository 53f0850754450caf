"""What the tests of the documentation need: programs that read it, and the testbed to try it on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster import (
    Cluster,
    cluster,
    cluster_to_break,
    module_cluster,
    pytest_runtest_makereport,
    shared_cluster,
)

__all__ = [
    "Cluster",
    "cluster",
    "cluster_to_break",
    "module_cluster",
    "pytest_runtest_makereport",
    "shared_cluster",
]

Need = Callable[[str, "str | None"], None]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def program(need: Need) -> Callable[[str], str]:
    """Return a program's path; skips where it is missing, unless "docs" was promised."""

    def find(name: str) -> str:
        path = shutil.which(name)
        need("docs", None if path else f"no {name}")
        return str(path)

    return find


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The man pages, as they are installed."""
    into = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, ROOT / "docs/man/make.py", into], check=True)
    return into
