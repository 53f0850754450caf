"""The rpm packages and the wheel, which hold the same as Debian's."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import outlast
from ci import packages
from ci.packages import Bare
from ci.testbed import images
from ci.testbed.layout import Layout

pytestmark = [pytest.mark.packages, pytest.mark.timeout(600)]

# Where the two systems have the same thing.
PLACES = (
    (r"^/usr/lib64/slurm/", "/usr/lib/x86_64-linux-gnu/slurm-wlm/"),
    (r"^/usr/lib64/", "/usr/lib/x86_64-linux-gnu/"),
    (r"^/usr/lib/python3[0-9.]*/(site|dist)-packages/", "/usr/lib/python3/dist-packages/"),
    (r"\.gz$", ""),
)


def held(listing: str) -> set[str]:
    """The product's own files among those listed: no documentation, and no bytecode, which dpkg makes itself."""
    found = set()
    for path in listing.split():
        for pattern, there in PLACES:
            path = re.sub(pattern, there, path)
        if not re.search(r"/usr/share/(doc|licenses|lintian)/|__pycache__|/\.build-id", path):
            found.add(path)
    return found


def test_rpm_packages_hold_the_same_files(layout: Layout, debs: Path) -> None:
    out = layout.state / "rpms"
    packages.build("rpm", layout, out)
    listing = images.run_in_root(
        packages.root("build", layout),
        layout.state / "rpm-list",
        [f"{out}=/rpms:rw"],
        ["sh", "-c", "rpm -qlp --noghost /rpms/*/*.rpm"],
    )
    of_rpms = {path for path in held(listing.stdout) if path.startswith("/")}
    of_debs = set()
    for path in debs.glob("*.deb"):
        text = subprocess.run(["dpkg-deb", "-c", path], capture_output=True, text=True, check=True).stdout
        lines = [line.split() for line in text.splitlines() if not line.startswith("d")]
        of_debs |= held("\n".join(words[5].removeprefix(".") for words in lines))
    # rpm lists the directories that are the product's own as well.
    directories = {str(parent) for path in of_debs for parent in Path(path).parents}

    assert listing.returncode == 0, listing.stdout
    assert sorted(of_debs - of_rpms) == []
    assert sorted(of_rpms - of_debs - directories - {"/etc/outlast/conf.d", "/etc/outlast"}) == []


def test_wheel_serves_a_controller(layout: Layout, bare: Bare) -> None:
    packages.build("wheel", layout, layout.state / "wheel")
    wheel = next((layout.state / "wheel").glob("*.whl")).name
    made = bare.run(
        "sh",
        "-ec",
        "python3 -m venv --system-site-packages /opt/outlast;"
        f"/opt/outlast/bin/pip install --quiet --no-index --no-deps /shared/wheel/{wheel}",
        within=120,
    )
    command = "/opt/outlast/bin/outlast"
    said = bare.run(command, "--version").stdout
    config = bare.path("/root/outlast.toml")
    config.write_text("[store]\nurl = 'file:///srv/store'\nkey = '/root/data.key'\n")
    bare.run("mkdir", "-p", "/srv/store")
    checked = bare.run(command, "--config", "/root/outlast.toml", "config", "check")
    began = bare.run(command, "--config", "/root/outlast.toml", "store", "init")
    looked = bare.run(command, "--config", "/root/outlast.toml", "store", "check")
    native = bare.run("sh", "-c", "ls /opt/outlast/lib/python3*/site-packages/criu_backend/native/Makefile")

    assert made.returncode == 0, made.stdout
    assert said == f"outlast {outlast.__version__}\n"
    assert (checked.returncode, began.returncode, looked.returncode) == (0, 0, 0), looked.stdout
    assert native.returncode == 0  # what is compiled for a node
