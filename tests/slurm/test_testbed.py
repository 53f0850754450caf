"""The testbed: what its hosts can do, what a power cut and a pulled cable do to them, what is left behind.

$OUTLAST_TESTBED_KEEP=1 uses the cluster that is up already, and leaves it up.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.testbeds import DEFAULT_STATE, NOTHING, Testbed, eventually

# The first `up` on a machine makes the root file system, from a mirror.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

SFTP_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", "IdentitiesOnly=yes"),
    *("-o", "UserKnownHostsFile=/etc/outlast/known_hosts", "-i", "/etc/outlast/store.key"),
)


@pytest.fixture(scope="module", autouse=True)
def _root(need: Callable[[str, str | None], None]) -> None:
    need("slurm", None if os.geteuid() == 0 else "the testbed must be root")


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    if os.environ.get("OUTLAST_TESTBED_KEEP"):
        running = Testbed(Path(os.environ.get("OUTLAST_TESTBED_DIR") or DEFAULT_STATE).resolve())
        assert (running.state / "up").exists(), f"$OUTLAST_TESTBED_KEEP is set, but {running.state} is not up"
        yield running
        return
    own = Testbed(tmp_path_factory.mktemp("a test") / "bed")
    own("up", "--no-product", within=500)
    try:
        yield own
    finally:
        own("down")
    assert own.left() == NOTHING


@pytest.fixture
def cluster(testbed: Testbed) -> Iterator[Testbed]:
    """The testbed with all hosts on and idle, however a test has left it."""
    yield testbed
    for name, host in testbed.hosts().items():
        if host["cut"]:
            testbed("heal", name)
        if host["state"] == "down":
            testbed("start-node", name)
    testbed("exec", "ctl", "scancel", "--user=alice")
    eventually(lambda: idle_nodes(testbed) == {"n1", "n2", "n3"}, within=60, what="all nodes idle")


def idle_nodes(testbed: Testbed) -> set[str]:
    lines = testbed("exec", "ctl", "sinfo", "--noheader", "--Node", "--format=%N %t").splitlines()
    return {line.split()[0] for line in lines if line.endswith(" idle")}


def test_a_job_of_one_user_runs_on_all_nodes(cluster: Testbed) -> None:
    said = cluster("user", "n1", "srun", "--nodes=3", "sh", "-c", 'echo "$(hostname) $(id -un) $PWD"')

    assert sorted(said.splitlines()) == [f"{name} alice /shared/alice" for name in ("n1", "n2", "n3")]


def test_a_batch_job_writes_its_output_into_the_shared_home(cluster: Testbed) -> None:
    job = cluster(
        "user", "n1", "sbatch", "--parsable", "--wait", "--output=out.%j", stdin="#!/bin/sh\nhostname\n"
    ).strip()

    assert cluster("user", "n3", "cat", f"out.{job}").strip() in {"n1", "n2", "n3"}


def test_a_jobs_tasks_are_found_by_cgroup_even_in_a_session_of_their_own(cluster: Testbed) -> None:
    script = "#!/bin/sh\nsetsid sh -c 'echo $$ > task.pid; exec sleep 300' &\nsleep 300\n"
    job = cluster("user", "n1", "sbatch", "--parsable", "--nodelist=n2", stdin=script).strip()
    eventually(
        lambda: cluster.try_("user", "n2", "test", "-s", "task.pid").returncode == 0, within=20, what="start"
    )
    pid = cluster("user", "n2", "cat", "task.pid").strip()
    # Not this moment's `test`, but what Slurm will act on.
    tasks = cluster("exec", "n2", "scontrol", "listpids", job)
    cluster("user", "n1", "scancel", job)

    assert pid in {line.split()[0] for line in tasks.splitlines()}
    eventually(
        lambda: cluster.try_("exec", "n2", "test", "-e", f"/proc/{pid}").returncode,
        within=20,
        what=f"{pid} ended",
    )


def test_exec_passes_stdio_and_the_exit_code(cluster: Testbed) -> None:
    done = cluster.try_("exec", "n1", "sh", "-c", "cat; echo wrong >&2; exit 37", stdin="line\n")

    assert (done.stdout, done.stderr, done.returncode) == ("line\n", "wrong\n", 37)


def test_exec_is_root_and_user_is_alice_in_a_clean_environment(cluster: Testbed) -> None:
    root = cluster.try_("exec", "n1", "sh", "-c", "id -u; pwd; env", LEAK="1").stdout
    alice = cluster.try_("user", "n1", "sh", "-c", "id -u; pwd; env", LEAK="1").stdout

    assert root.splitlines()[:2] == ["0", "/root"]
    assert alice.splitlines()[:2] == ["2000", "/shared/alice"]
    for said in (root, alice):
        assert "PATH=/usr/local/sbin:" in said
        assert "LEAK" not in said


def test_a_command_ends_with_its_caller(cluster: Testbed) -> None:
    caller = cluster.start("exec", "n1", "sleep", "4242")
    running = ["exec", "n1", "pgrep", "-f", "^sleep 4242"]
    eventually(lambda: cluster.try_(*running).returncode == 0, within=10, what="the command runs")
    caller.kill()
    caller.wait()

    eventually(lambda: cluster.try_(*running).returncode == 1, within=10, what="the command has ended")


def test_what_cannot_be_started_is_said_with_125(cluster: Testbed) -> None:
    cluster("kill-node", "n3")
    for words, why in (
        (("exec", "n3", "true"), "n3: the host is off"),
        (("exec", "n9", "true"), "n9: no such host"),
        (("user", "n1"), "give a host and a command"),
    ):
        done = cluster.try_(*words)

        assert done.returncode == 125
        assert why in done.stderr


def test_a_host_sees_its_own_processes_address_and_name_only(cluster: Testbed) -> None:
    init = cluster("exec", "n1", "cat", "/proc/1/comm").strip()
    count = len(cluster("exec", "n1", "ps", "-e", "--no-headers").splitlines())
    links = json.loads(cluster("exec", "n1", "ip", "-json", "-4", "address"))
    addresses = [address["local"] for link in links for address in link["addr_info"]]

    assert init == "tini"
    assert count < 20
    assert sorted(addresses) == ["127.0.0.1", "198.18.0.11"]
    assert cluster("exec", "n1", "hostname").strip() == "n1"
    assert cluster("exec", "n1", "ip", "route", "show", "default") == ""


def test_criu_dumps_and_restores_a_users_process(cluster: Testbed) -> None:
    start = "setsid sleep 4243 </dev/null >/dev/null 2>&1 & echo $!"
    cluster("user", "n2", "sh", "-c", start)
    pid = cluster("exec", "n2", "pgrep", "-f", "^sleep 4243").strip()
    criu = "criu {} -D /tmp/image -v1 --manage-cgroups=ignore"
    cluster("exec", "n2", "mkdir", "/tmp/image")
    cluster("exec", "n2", *criu.format("dump").split(), "--tree", pid)
    gone = cluster.try_("exec", "n2", "test", "-e", f"/proc/{pid}")
    cluster("exec", "n2", *criu.format("restore").split(), "--restore-detached")
    owner = cluster("exec", "n2", "stat", "--format=%U", f"/proc/{pid}").strip()
    cluster("exec", "n2", "sh", "-c", f"kill {pid}; rm -r /tmp/image")

    assert gone.returncode == 1
    assert owner == "alice"


def test_a_job_of_a_node_without_power_runs_again_elsewhere(cluster: Testbed) -> None:
    script = "#!/bin/sh\necho $(hostname) ${SLURM_RESTART_COUNT:-0} >> runs\nsleep 300\n"
    cluster("user", "n1", "rm", "-f", "runs")
    job = cluster("user", "n1", "sbatch", "--parsable", stdin=script).strip()

    def runs() -> list[str]:
        return cluster.try_("user", "ctl", "cat", "runs").stdout.splitlines()

    eventually(lambda: len(runs()) == 1, within=20, what="the job runs")
    first = runs()[0].split()[0]
    cluster("kill-node", first)
    state = cluster.hosts()[first]["state"]
    eventually(lambda: len(runs()) == 2, within=60, what="the job runs elsewhere")
    second, count = runs()[1].split()
    same = cluster("exec", "ctl", "squeue", "--noheader", "--format=%A %N").split()

    assert state == "down"
    assert second != first
    assert count == "1"
    assert same == [job, second]


def test_a_power_cut_keeps_the_disk_and_empties_run(cluster: Testbed) -> None:
    for path in ("/root/kept", "/run/lost", "/dev/shm/lost"):
        cluster("exec", "n2", "touch", path)
    cluster("kill-node", "n2")
    cluster("kill-node", "n2")  # no power, no harm
    cluster("start-node", "n2")
    cluster("start-node", "n2")
    there = cluster.try_("exec", "n2", "ls", "/root/kept", "/run/lost", "/dev/shm/lost").stdout

    assert there.split() == ["/root/kept"]
    eventually(lambda: "n2" in idle_nodes(cluster), within=40, what="n2 is back")


def test_a_power_cut_ends_also_what_is_frozen(cluster: Testbed) -> None:
    freeze = """
        exec >/dev/null 2>&1
        cd /sys/fs/cgroup/freezer && mkdir ice
        sleep 4244 &
        echo $! >ice/cgroup.procs
        echo FROZEN >ice/freezer.state
        until grep FROZEN ice/freezer.state; do sleep 0.1; done"""
    if not Path("/sys/fs/cgroup/freezer").is_dir():
        pytest.skip("this machine has no v1 freezer")
    cluster("exec", "n1", "sh", "-c", freeze)
    cluster("kill-node", "n1")

    assert not [top for top in cluster.cgroups() if top.endswith("/n1") or "/n1/" in top]


def can_reach_store(testbed: Testbed, host: str) -> bool:
    probe = "exec 3<>/dev/tcp/store/22 && read -r -t 2 line <&3 && [[ $line = SSH-* ]]"
    return testbed.try_("exec", host, "timeout", "3", "bash", "-c", probe).returncode == 0


def test_a_cut_node_is_reached_by_nobody_until_it_is_healed(cluster: Testbed) -> None:
    before = can_reach_store(cluster, "n3")
    cluster("cut", "n3")
    during = can_reach_store(cluster, "n3")
    others = can_reach_store(cluster, "n1")
    marked = cluster.hosts()["n3"]
    cluster("heal", "n3")

    assert before
    assert not during
    assert others
    assert (marked["state"], marked["cut"]) == ("up", True)
    eventually(lambda: can_reach_store(cluster, "n3"), within=10, what="n3 reaches the store")


def test_a_pulled_cable_stays_pulled_over_a_power_cut(cluster: Testbed) -> None:
    cluster("cut", "n3")
    cluster("kill-node", "n3")
    cluster("start-node", "n3")
    during = can_reach_store(cluster, "n3")
    cluster("heal", "n3")

    assert not during
    eventually(lambda: can_reach_store(cluster, "n3"), within=10, what="n3 reaches the store")


def sftp(testbed: Testbed, host: str, commands: str) -> subprocess.CompletedProcess[str]:
    return testbed.try_("exec", host, "sftp", "-b", "-", *SFTP_OPTIONS, "outlast@store", stdin=commands)


@pytest.mark.parametrize("host", ["n1", "n2", "n3", "ctl"])
def test_the_store_takes_files_by_sftp(cluster: Testbed, host: str) -> None:
    done = sftp(cluster, host, f"put /etc/hostname ckpt/from-{host}\nget ckpt/from-{host} /tmp/back\n")

    assert done.returncode == 0, done.stderr
    assert cluster("exec", host, "cat", "/tmp/back").strip() == host


def test_the_store_gives_one_directory_and_no_shell(cluster: Testbed) -> None:
    outside = sftp(cluster, "n1", "put /etc/hostname /from-n1\n")
    shell = cluster.try_("exec", "n1", "ssh", *SFTP_OPTIONS, "outlast@store", "id")
    root = cluster.try_("exec", "n1", "ssh", *SFTP_OPTIONS, "root@store", "id")
    tunnel = cluster.try_("exec", "n1", "ssh", *SFTP_OPTIONS, "-W", "ctl:6817", "outlast@store")
    key = cluster.try_("user", "n1", "cat", "/etc/outlast/store.key")

    assert "Permission denied" in outside.stderr
    assert "sftp connections only" in shell.stdout
    assert "uid=" not in shell.stdout
    assert "Permission denied" in root.stderr
    assert tunnel.returncode != 0
    assert key.returncode != 0


def test_an_unknown_host_key_is_refused(cluster: Testbed) -> None:
    options = [word.replace("/etc/outlast/known_hosts", "/dev/null") for word in SFTP_OPTIONS]
    done = cluster.try_("exec", "n1", "sftp", "-b", "-", *options, "outlast@store", stdin="ls\n")

    assert "Host key verification failed" in done.stderr


def test_logs_name_the_host_on_every_line_also_of_one_that_is_off(cluster: Testbed) -> None:
    cluster("kill-node", "n2")
    lines = cluster("logs").splitlines()

    assert {line.split()[0] for line in lines} >= {"ctl", "store", "n1", "n2", "n3"}
    assert any(line.startswith("ctl slurmctld.log: ") for line in lines)
    assert any(line.startswith("n2 slurmd.log: ") for line in lines)
    assert {line.split()[0] for line in cluster("logs", "n1").splitlines()} == {"n1"}


def test_up_while_up_changes_nothing(testbed: Testbed) -> None:
    before = testbed.hosts()
    if not os.environ.get("OUTLAST_TESTBED_KEEP"):
        done = testbed.try_("up", "--no-product")

        assert "is up already" in done.stderr
        assert done.returncode == 0
    assert testbed.hosts() == before
