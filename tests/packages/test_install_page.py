"""docs/install.md, done as it says, on a bare machine that is node and store in one."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from ci.packages import CHECKOUT, Bare

pytestmark = [pytest.mark.packages, pytest.mark.timeout(600)]


def sections() -> dict[str, str]:
    """The page's sections by their headings, without numbers."""
    text = (CHECKOUT / "docs/install.md").read_text()
    parts = re.split(r"^## (?:\d+\. )?(.*)$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(section: str) -> list[str]:
    """What is to be typed, or written into the file that its first line names."""
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", section, re.M)
    return [re.sub(r"^    ", "", one.strip("\n"), flags=re.M) for one in found if one.strip()]


def test_page_is_true(bare: Bare, debs: Path, tmp_path: Path) -> None:
    bare.path("/etc/apt/apt.conf.d/yes").write_text('APT::Get::Assume-Yes "true";\n')
    bare.run(
        "sh",
        "-c",
        "echo 127.0.0.1 localhost store.example.org >/etc/hosts; ssh-keygen -A; mkdir -p /run/sshd",
    )
    page = sections()
    build, install = blocks(page["Outlast itself"])[:2], blocks(page["Outlast itself"])[2:]
    typed = []
    for block in [*install, *blocks(page["The store"]), *blocks(page["Configuration"])]:
        if match := re.match(r"# (/\S+)\n", block):
            bare.path(match[1]).write_text(block)
            continue
        if block.startswith("ssh-keyscan"):
            bare.start("/usr/sbin/sshd", "-D", "-e", log=tmp_path / "sshd")
            deadline = time.monotonic() + 20
            while bare.run("ssh-keyscan", "localhost").stdout == "" and time.monotonic() < deadline:
                time.sleep(0.1)
        done = bare.run(
            "sh", "-ec", f"cd /shared/debs; {block}", env={"DEBIAN_FRONTEND": "noninteractive"}, within=120
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}"
        typed.append(block)
    doctor = bare.run("outlast", "doctor").stdout

    assert "dpkg-buildpackage -b -us -uc" in build[0]  # as ci/packages/build.sh does
    assert "rpmbuild -bb --build-in-place packaging/outlast.spec" in build[1]
    assert len(typed) >= 6
    assert "ok    store: sftp://outlast@store.example.org/ckpt answers" in doctor
    assert bare.path("/etc/outlast/data.key").stat().st_mode & 0o777 == 0o600
    assert "ok    dumps, plain" in doctor
