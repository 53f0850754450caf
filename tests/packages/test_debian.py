"""The Debian packages on a bare machine: installed, used, upgraded under a running job, removed."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import outlast
from ci.packages import CHECKOUT, Bare
from ci.testbed.layout import Layout
from tests.packages.conftest import NEWER

pytestmark = [pytest.mark.packages, pytest.mark.timeout(600)]

# A counter in memory; nothing of it is on the disk but what it says.
JOB = "import time\nn = 0\nwhile True:\n    print(n := n + 1, flush=True)\n    time.sleep(0.05)\n"
SECONDS = 60.0
_ADDRESS = "bogus-mail-host,bogus-mail-host-in-debian-changelog"


def install(bare: Bare, directory: Path, *names: str) -> None:
    """Install these packages, or else all in *directory*, with dpkg: what they need must be there."""
    paths = [
        f"/shared/{directory.name}/{path.name}"
        for path in sorted(directory.glob("*.deb"))
        if not names or path.name.partition("_")[0] in names
    ]
    done = bare.run("dpkg", "--force-unsafe-io", "-i", *paths, within=120)
    assert done.returncode == 0, done.stdout


def until(true: Callable[[], bool], what: Callable[[], str]) -> None:
    """Wait until it is true; say *what* there is if it never is."""
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


class CountingJob:
    """A job without a scheduler that counts; each run of it goes on where its newest checkpoint was."""

    def __init__(self, bare: Bare, log: Path, name: str = "count") -> None:
        self.bare = bare
        self.log = log
        self.name = name
        bare.path("/root/job.py").write_text(JOB)

    def run(self) -> None:
        """Start it, or have it go on, by the command that is installed now."""
        command = ("outlast", "run", "--store", "/srv/store", "--name", self.name, "--interval", "1h", "--")
        # Its output is a file of the machine's, which is set back with it.
        shell = f"exec {' '.join(command)} python3 /root/job.py >>/root/out 2>>/root/err"
        self.bare.start("sh", "-c", shell, log=self.log)

    def lines(self) -> list[int]:
        path = self.bare.path("/root/out")
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    def goes_on(self, beyond: int = 0) -> None:
        """See it count on, *beyond* a number."""
        now = max([beyond, *self.lines()])
        until(lambda: max([0, *self.lines()]) > now + 5, self.story)

    def checkpoint(self) -> int:
        """Have one taken; return what was counted when it was asked for."""
        before = self.lines()[-1]
        ask = (
            "import pathlib; from outlast import control; "
            f"path = pathlib.Path('/run/outlast/jobs/{self.name}/manager.sock'); "
            "control.call(path, {'op': 'checkpoint', 'wait': True}, timeout=60)"
        )
        done = self.bare.run("python3", "-P", "-c", ask)
        assert done.returncode == 0, done.stdout + self.story()
        return before

    def crash(self) -> None:
        """End all that belongs to it, as a machine that fails would."""
        for process in self.bare.path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                argv = process.joinpath("cmdline").read_bytes()
                if process.name != "1" and any(word in argv for word in (b"outlast", b"job.py")):
                    self.bare.run("kill", "-KILL", process.name)

    def story(self) -> str:
        log = self.bare.path(f"/var/log/outlast/jobs/{self.name}.log")
        text = log.read_text()[-3000:] if log.exists() else "no log"
        return f"{self.bare.path('/root/err').read_text()}\n{text}\n{self.lines()[-3:]}"


def test_versions_agree() -> None:
    changelog = (CHECKOUT / "packaging/debian/changelog").read_text()
    spec = (CHECKOUT / "packaging/outlast.spec").read_text()

    assert re.match(r"outlast \((.*?)\)", changelog)[1] == outlast.__version__  # type: ignore[index]
    assert re.search(r"^Version: (.*)$", spec, re.M)[1] == outlast.__version__  # type: ignore[index]


def test_purge_leaves_nothing(bare: Bare, debs: Path, tmp_path: Path) -> None:
    before = bare.files()
    accounts = bare.run("cat", "/etc/passwd", "/etc/group").stdout
    install(bare, debs)
    job = CountingJob(bare, tmp_path / "log")
    bare.run("mkdir", "-p", "/etc/outlast/conf.d")
    bare.path("/etc/outlast/outlast.toml").write_text("[store]\nurl = 'file:///srv/store'\n")
    bare.path("/etc/outlast/conf.d/site.toml").write_text("[checkpoint]\nkeep = 3\n")
    job.run()
    job.goes_on()
    job.checkpoint()
    bare.run("kill", "-TERM", *bare.run("pidof", "-x", "outlast-shim").stdout.split())
    until(lambda: not bare.path("/run/outlast/jobs/count").exists(), job.story)
    installed = set(bare.files()) - set(before)
    names = bare.run("dpkg-query", "-W", "-f", "${Package}\n").stdout.split()
    ours = [name for name in names if name.startswith(("outlast", "liboutlast"))]
    purged = bare.run("dpkg", "--purge", *ours, within=120)
    bare.run(
        "rm", "-rf", "/root/job.py", "/root/out", "/root/err", "/srv/store", "/root/.config", "/root/.cache"
    )
    after = bare.files()

    assert purged.returncode == 0, purged.stdout
    assert "/usr/bin/outlast" in installed
    assert sorted(set(after) - set(before)) == []
    assert sorted(set(before) - set(after)) == []
    assert {path for path in before if before[path] != after[path]} == set()
    assert bare.run("cat", "/etc/passwd", "/etc/group").stdout == accounts


def test_running_job_outlasts_upgrade_and_downgrade(
    bare: Bare, debs: Path, newer_debs: Path, tmp_path: Path
) -> None:
    job = CountingJob(bare, tmp_path / "log")
    install(bare, debs, "outlast")
    job.run()
    job.goes_on()

    install(bare, newer_debs, "outlast")

    assert NEWER in bare.run("outlast", "--version").stdout
    job.goes_on()
    saved = job.checkpoint()  # by the manager that was there before
    job.goes_on(saved)
    job.crash()
    job.run()
    job.goes_on(saved)
    assert job.lines() == list(range(1, len(job.lines()) + 1)), job.story()

    install(bare, debs, "outlast")

    assert outlast.__version__ in bare.run("outlast", "--version").stdout
    job.goes_on()
    again = job.checkpoint()
    job.crash()
    job.run()
    job.goes_on(again)
    assert job.lines() == list(range(1, len(job.lines()) + 1)), job.story()


def test_services_are_sound_and_confined(bare: Bare, debs: Path) -> None:
    install(bare, debs, "outlast", "outlast-slurm")
    bare.run("useradd", "--system", "slurm")
    units = sorted(path.name for path in bare.path("/usr/lib/systemd/system").glob("outlast-*"))
    verified = bare.run("systemd-analyze", "verify", *[f"/usr/lib/systemd/system/{unit}" for unit in units])
    exposure = bare.run(
        *("systemd-analyze", "security", "--offline=yes", "--threshold=25"),
        "/usr/lib/systemd/system/outlast-watcher.service",
    )

    assert "outlast-watcher.service" in units
    assert (verified.returncode, [one for one in verified.stdout.splitlines() if "outlast" in one]) == (0, [])
    assert exposure.returncode == 0, exposure.stdout


def test_no_service_is_started_by_installing(bare: Bare, debs: Path) -> None:
    before = set(bare.path("/etc/systemd/system").rglob("*"))
    install(bare, debs)

    assert set(bare.path("/etc/systemd/system").rglob("*")) == before


def test_store_account_can_do_nothing_but_sftp(bare: Bare, debs: Path) -> None:
    install(bare, debs, "outlast-store")
    bare.run("ssh-keygen", "-A")
    bare.run("mkdir", "-p", "/run/sshd")
    settings = bare.run("/usr/sbin/sshd", "-T", "-C", "user=outlast,host=h,addr=198.18.0.1").stdout
    place = bare.run("stat", "-c", "%U %a", "/srv/outlast", "/srv/outlast/ckpt").stdout.split("\n")

    assert "chrootdirectory /srv/outlast\n" in settings
    assert "forcecommand internal-sftp\n" in settings
    assert place[:2] == ["root 755", "outlast 700"]


def test_logs_are_rotated(bare: Bare, debs: Path) -> None:
    install(bare, debs, "outlast")
    bare.path("/var/log/outlast").mkdir(exist_ok=True)
    bare.path("/var/log/outlast/audit.log").write_text("a line\n")
    turned = bare.run("logrotate", "--force", "/etc/logrotate.d/outlast")
    old = bare.path("/var/log/outlast/jobs/17.log")
    old.parent.mkdir(exist_ok=True)
    old.write_text("of a job that ended long ago\n")
    bare.run("touch", "-d", "1 minute ago", "/var/log/outlast/jobs/17.log")

    assert turned.returncode == 0, turned.stdout
    assert bare.path("/var/log/outlast/audit.log.1.gz").exists(), turned.stdout
    assert bare.run("systemd-tmpfiles", "--create", "--clean", "outlast.conf").returncode == 0
    assert old.exists()  # it is younger than a month


def test_lintian_finds_no_error(layout: Layout, debs: Path) -> None:
    from ci.packages import root
    from ci.testbed import images

    done = images.run_in_root(
        root("build", layout),
        layout.state / "lintian",
        [f"{debs}=/debs:rw"],
        # The developers have no address of their own.
        ["sh", "-c", f"lintian --allow-root --fail-on error --suppress-tags {_ADDRESS} /debs/*.deb"],
    )

    assert done.returncode == 0, done.stdout
