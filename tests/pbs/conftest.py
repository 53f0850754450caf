"""A PBS cluster for the tests: a real one where its commands are installed in the testbed's hosts, else the double.

$OUTLAST_PBS_TESTBED names the state directory of a testbed that is up, with a real PBS in it: server on ctl,
MoMs on n1 and n2. Without it a testbed comes up for these tests only, and the double is put into its hosts.
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import ROOT, Cluster, eventually

HERE = Path(__file__).resolve().parent
MOMS = ("n1", "n2")
COMMANDS = (
    *("qsub", "qstat", "qdel", "qhold", "qrls", "qrerun", "qsig", "qalter", "qmgr", "qterm", "pbsnodes"),
    "pbs_attach",
)
DOUBLE = "/usr/local/lib/pbs-double"
SERVER = f"{DOUBLE}/server.py {' '.join(MOMS)}"
# A watcher whose parent is the host's init was started by these tests.
END_WATCHERS = """
for one in $(pgrep -f '^[^ ]*python3 -P /usr/bin/outlast watcher'); do
	parent=$(ps -o ppid= "$one" | tr -d ' ')
	[ "$parent" = 1 ] || kill "$parent"
	kill "$one"
done
"""
INSTALL = "/usr/libexec/outlast/pbs/install-pbs"


class Pbs(Cluster):
    """PBS on the testbed's ctl, n1 and n2."""

    def __init__(self, state: Path, *, real: bool) -> None:
        super().__init__(state)
        self.real = real

    def pbs(self, *command: str, user: bool = False) -> str:
        """Run one of PBS's commands on the server, as root or as alice; it must succeed."""
        return self.on(
            "ctl", "env", "PATH=/usr/local/bin:/opt/pbs/bin:/opt/pbs/sbin:/usr/bin:/bin", *command, user=user
        )

    def try_pbs(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run one of PBS's commands as alice; whatever comes of it."""
        return self.try_on(
            "ctl", "env", "PATH=/usr/local/bin:/opt/pbs/bin:/usr/bin:/bin", *command, user=True
        )

    def start_mom(self, node: str) -> None:
        """Start the MoM of a host that has just come up."""
        name = "pbs_mom" if self.real else f"{DOUBLE}/mom.py"

        def started() -> bool:
            # What is started while the host is still booting may end with that.
            time.sleep(1)
            if (
                self.try_on(
                    node, "sh", stdin=f"ps -eo args | grep -q '[/]{name.rpartition('/')[2]}'"
                ).returncode
                == 0
            ):
                return True
            if self.real:
                self.try_on(node, "sh", "-c", "/opt/pbs/libexec/pbs_init.d start >/dev/null 2>&1")
            else:
                self.daemon(node, name)
            return False

        eventually(started, within=30, what=f"a MoM on {node}")

    def daemon(self, host: str, command: str) -> None:
        """Start *command* on *host*, for as long as that is up."""
        self.on(
            host,
            "sh",
            "-c",
            f"mkdir -p /var/log; setsid {command} </dev/null >>/var/log/pbs-tests.log 2>&1 &",
        )

    def put(self, host: str, source: Path, target: str) -> None:
        """Copy what is in the directory *source* into *target* on *host*, as root's."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(source, arcname=".", filter=_as_root)
        subprocess.run(
            [
                ROOT / "scripts" / "testbed",
                "exec",
                host,
                "sh",
                "-c",
                f"mkdir -p {target} && tar -C {target} --no-overwrite-dir -xf -",
            ],
            input=packed.getvalue(),
            check=True,
            timeout=60,
            env=os.environ | {"OUTLAST_TESTBED_DIR": str(self.state)},
        )

    def restart_server(self, how: str) -> None:
        """Have qterm end the server, and start it again; with "quick" jobs are to run on meanwhile."""
        self.pbs("qterm", "-t", how)
        eventually(lambda: self.try_pbs("qstat").returncode != 0, within=30, what="the server's end")
        if self.real:
            # It ends some time after it has stopped to answer.
            eventually(
                lambda: (
                    self.try_on(
                        "ctl", "sh", "-c", "! pgrep -x pbs_server.bin && ! pgrep -x pbs_server"
                    ).returncode
                    == 0
                ),
                within=60,
                what="no server",
            )
            self.on("ctl", "sh", "-c", "/opt/pbs/libexec/pbs_init.d start >/dev/null 2>&1 || true")
        else:
            self.daemon("ctl", SERVER)
        eventually(lambda: self.try_pbs("qstat").returncode == 0, within=60, what="a server")

    def nodes_up(self) -> bool:
        """Whether PBS would run jobs on every MoM."""
        said = self.pbs("pbsnodes", "-a", "-F", "json")
        return said.replace(" ", "").replace("\t", "").count('"state":"free"') >= len(MOMS)

    def mend_pbs(self) -> None:
        """Bring all hosts back into service."""
        for node in MOMS:
            self.testbed("heal", node)
            if self.try_on(node, "true").returncode:
                self.testbed("start-node", node)
                self.start_mom(node)
        self.pbs("pbsnodes", "-r", *MOMS)
        eventually(self.nodes_up, within=60, what="all MoMs up")


def _as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _set_up(cluster: Pbs, product: Path) -> None:
    subprocess.run(["make", "-s", "-C", ROOT, "install-pbs", f"DESTDIR={product}"], check=True, timeout=60)
    for host in ("ctl", *MOMS):
        cluster.put(host, product, "/")
        cluster.on(
            host,
            "sh",
            "-c",
            "f=/etc/outlast/outlast.toml; grep -q scheduler $f || sed -i '1i scheduler = \"pbs\"' $f",
        )
        if cluster.real:
            continue
        cluster.put(host, HERE / "double", DOUBLE)
        links = "; ".join(f"ln -sf {DOUBLE}/command.py /usr/local/bin/{name}" for name in COMMANDS)
        start = "PBS_START_SERVER=1" if host == "ctl" else "PBS_START_MOM=1"
        conf = f"PBS_EXEC=/usr/local\\nPBS_HOME=/var/spool/pbs\\n{start}\\n"
        cluster.on(
            host, "sh", "-c", f"{links}; printf '{conf}' >/etc/pbs.conf; mkdir -p /var/spool/pbs/mom_priv"
        )
    # The testbed's own watcher asks Slurm; it is ended with the shell that would start it again.
    cluster.on("ctl", "sh", stdin=END_WATCHERS)
    if not cluster.real:
        for node in MOMS:
            cluster.start_mom(node)
        cluster.daemon("ctl", SERVER)
    eventually(
        lambda: cluster.try_pbs("qstat", "-f", "-F", "json").returncode == 0, within=30, what="a server"
    )
    for host in ("ctl", *MOMS):
        cluster.on(host, INSTALL)
    cluster.pbs("qmgr", "-c", "set server node_fail_requeue = 3")
    cluster.daemon("ctl", "env PATH=/usr/local/bin:/opt/pbs/bin:/usr/bin:/bin /usr/bin/outlast watcher")


@pytest.fixture(scope="session")
def pbs_cluster(
    tmp_path_factory: pytest.TempPathFactory, need: Callable[[str, str | None], None]
) -> Iterator[Pbs]:
    """The cluster, with Outlast installed as docs/install-pbs.md says."""
    need("pbs", None if os.geteuid() == 0 else "the testbed must be root")
    product = tmp_path_factory.mktemp("product")
    given = os.environ.get("OUTLAST_PBS_TESTBED")
    if given:
        cluster = Pbs(Path(given), real=True)
        assert cluster.pbs("which", "qstat", "pbs_python"), "no PBS in it"
        _set_up(cluster, product)
        yield cluster
        return
    cluster = Pbs(tmp_path_factory.mktemp("pbs") / "bed", real=False)
    cluster.testbed("up", within=500)
    try:
        _set_up(cluster, product)
        yield cluster
    finally:
        cluster.testbed("down")


@pytest.fixture
def pbs(pbs_cluster: Pbs) -> Iterator[Pbs]:
    """The cluster, with all MoMs up before and after the test."""
    pbs_cluster.mend_pbs()
    time.sleep(0.5)
    yield pbs_cluster
    pbs_cluster.mend_pbs()
