"""The whole chain under PBS: hook, manager, capsule, store, watcher, and what PBS does when hosts go."""

from __future__ import annotations

import pytest

from tests.cluster import eventually
from tests.pbs.conftest import INSTALL, MOMS, Pbs
from tests.pbs.jobs import COUNT, TICKS, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]


def test_a_job_whose_host_is_lost_goes_on_elsewhere(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1s")
    job.wait_for("checkpoint", 3)
    lost = job.node
    pbs.testbed("kill-node", lost)
    job.wait_for("restored", within=90)
    assert job.node != lost
    job.ends_whole()


def test_a_job_whose_host_comes_back_at_once_goes_on(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1s")
    job.wait_for("checkpoint", 3)
    node = job.node
    pbs.testbed("kill-node", node)
    pbs.testbed("start-node", node)
    pbs.start_mom(node)
    job.wait_for("restored", within=90)
    job.ends_whole()


def test_a_held_job_goes_on_on_another_host(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-c", "w=30")
    job.wait_for("started")
    first = job.node
    job.wait_for_session()
    pbs.pbs("qhold", job.id, user=True)
    job.wait_for_state("H")
    assert (job.count("checkpoint"), job.count("held")) == (1, 1)
    assert job.processes(first) == []
    pbs.pbs("pbsnodes", "-o", first)
    pbs.pbs("qrls", job.id, user=True)

    def started() -> str:
        # PBS refuses the first attempt after a hold, and takes the job up in its next cycle.
        pbs.pbs("qmgr", "-c", "set server scheduling = true")
        return job.node

    eventually(started, within=20, what="its start")
    job.wait_for("restored", within=90)
    assert job.node not in ("", first)
    job.ends_whole()


def test_a_host_whose_processors_lack_an_instruction_gives_the_job_back_to_the_queue(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1s")
    job.wait_for("checkpoint", 2)
    first = job.node
    other = next(node for node in MOMS if node != first)
    mask = "sed 's/ popcnt / /' /proc/cpuinfo >/tmp/cpuinfo && mount --bind /tmp/cpuinfo /proc/cpuinfo"
    pbs.on(other, "sh", "-c", mask)
    try:
        pbs.pbs("pbsnodes", "-o", first)
        pbs.pbs("qrerun", job.id)
        job.wait_for("unfit-node", within=60)
    finally:
        pbs.pbs("pbsnodes", "-r", first)
        pbs.pbs("pbsnodes", "-o", other)
        pbs.on(other, "sh", "-c", "umount /proc/cpuinfo && rm /tmp/cpuinfo")
    job.wait_for("restored", within=90)
    assert job.node == first
    job.ends_whole()


def test_what_pbs_keeps_on_the_host_only_is_there_after_a_rerun(pbs: Pbs) -> None:
    job = Job(pbs, TICKS, "-v", "OUTLAST_INTERVAL=1s")
    job.wait_for("checkpoint", 4)
    pbs.pbs("qrerun", job.id)
    job.wait_for("restored", within=90)
    job.ends_whole()


def test_signals_and_deletion_reach_the_job_in_its_capsule(pbs: Pbs) -> None:
    job = Job(
        pbs,
        'trap "" USR1; exec /usr/bin/python3 -c "import time; time.sleep(300)"',
        "-v",
        "OUTLAST_INTERVAL=1s",
    )
    job.wait_for("checkpoint", 2)
    node = job.node
    pbs.pbs("qdel", job.id, user=True)
    job.wait_for_state("F")
    eventually(lambda: job.processes(node) == [], within=20, what="nothing left of the job")
    assert job.count("restored") == 0
    ended = int(job.facts["Exit_status"])
    assert ended >= 128, ended


def test_a_copy_that_was_cut_off_is_ended_before_it_can_write(pbs: Pbs) -> None:
    job = Job(
        pbs, TICKS.replace(f"seq {COUNT}", "seq 60") if pbs.real else TICKS, "-v", "OUTLAST_INTERVAL=1s"
    )
    job.wait_for("checkpoint", 2)
    cut = job.node
    pbs.testbed("cut", cut)
    job.wait_for("restored", within=150)
    assert job.node != cut
    pbs.testbed("heal", cut)
    job.wait_for("fenced", within=30)
    eventually(lambda: job.processes(cut) == [], within=30, what="nothing left of the old copy")
    job.wait_for_state("F", within=120)
    ticks = [line for line in job.output() if line.startswith("tick")]
    assert ticks == [f"tick {i}" for i in range(1, len(ticks) + 1)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-v", "OUTLAST_INTERVAL=3"], "not a time between 1s and 30d"),
        (["-c", "w=5", "-r", "n"], "may not be rerun"),
    ],
)
def test_what_cannot_be_had_is_refused_at_submission(pbs: Pbs, options: list[str], words: str) -> None:
    job = Job(pbs, "true", "-h")
    done = job.submit(*options)
    assert done.returncode != 0
    assert words in done.stderr
    pbs.pbs("qdel", job.id, user=True)


def test_a_job_that_asks_for_nothing_is_left_alone(pbs: Pbs) -> None:
    job = Job(pbs, "echo plain; exit 3")
    job.wait_for_state("F")
    assert (job.output(), int(job.facts["Exit_status"]), job.log) == (["plain"], 3, "")


def test_the_servers_half_is_taken_back_and_put_back_and_doctor_tells(pbs: Pbs) -> None:
    assert pbs.try_on("ctl", "outlast", "doctor").returncode == 0
    said = pbs.pbs(INSTALL, "--uninstall", "--dry-run")
    assert "hook outlast: deleted" in said
    assert pbs.pbs(INSTALL, "--uninstall") == said, "--dry-run told what would be done"
    lacking = pbs.try_on("ctl", "outlast", "doctor")
    assert lacking.returncode != 0
    assert "FAIL  hook: outlast: not there" in lacking.stdout
    # PBS refuses a hook of a name that a MoM has not been told to forget yet.
    eventually(lambda: pbs.try_on("ctl", INSTALL).returncode == 0, within=60, what="the hook again")
    pbs.pbs("qmgr", "-c", "set server node_fail_requeue = 3")
    found = pbs.try_on("ctl", "outlast", "doctor")
    assert (found.returncode, "ok    hook" in found.stdout) == (0, True), found.stdout
    job = Job(pbs, "sleep 1000", "-v", "OUTLAST_INTERVAL=1s")
    job.wait_for("checkpoint")
    pbs.pbs("qdel", job.id, user=True)
    job.wait_for_state("F")


def test_installing_again_changes_nothing_and_can_be_taken_back(pbs: Pbs) -> None:
    assert pbs.pbs(INSTALL, "--dry-run") == ""
    before = pbs.on("n1", "cat", "/var/spool/pbs/mom_priv/config")
    assert "$action checkpoint_abort" in before
    assert pbs.on("n1", INSTALL) == ""
    pbs.on("n1", INSTALL, "--uninstall")
    assert "$action" not in pbs.on("n1", "cat", "/var/spool/pbs/mom_priv/config")
    assert "$action" in pbs.on("n1", INSTALL, "--dry-run")
    pbs.on("n1", INSTALL)
    assert pbs.on("n1", "cat", "/var/spool/pbs/mom_priv/config") == before
