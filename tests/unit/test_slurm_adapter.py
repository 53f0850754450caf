"""The Slurm adapter's arguments and parsers, held to what a real slurmctld 24.11.5 printed.

tests/unit/data holds the output of the adapter's own two commands, cut down to a part of the fields, on a
cluster of three nodes whose n1 lost its power: before it (running), when Slurm had marked it as not
responding (silent), when it was down (lost), and when a task of an array had been requeued by hand
(requeued). schema-0.0.40 is the same cluster asked for the older schema, that of Slurm 23.11. schema-0.0.45 is what
a real slurmctld 26.05.5 printed, before n1 was set down (running) and after it (lost); schema-0.0.43 and 44, those
of 25.05 and 25.11, what it printed when asked for them.
"""

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.errors import ConfigError, OutlastError
from outlast.model import JobState, SchedulerJob
from outlast.scheduler import SchedulerRefused, SchedulerUnavailable, slurm
from outlast.scheduler import _slurm_text as text
from outlast.scheduler.hostlist import expand

DATA = Path(__file__).parent / "data"


def jobs(capture: str) -> dict[str, SchedulerJob]:
    return {job.job_id: job for job in text.parse_jobs((DATA / f"{capture}.jobs.json").read_text())}


def with_first_job(capture: str, **fields: object) -> str:
    output = json.loads((DATA / f"{capture}.jobs.json").read_text())
    output["jobs"] = [output["jobs"][0] | fields]
    return json.dumps(output)


def with_first_node(**fields: object) -> str:
    output = json.loads((DATA / "running.nodes.json").read_text())
    output["nodes"] = [output["nodes"][0] | fields]
    return json.dumps(output)


def test_states_of_a_healthy_cluster_are_read() -> None:
    states = {job_id: (job.state, job.raw_state) for job_id, job in jobs("running").items()}

    assert states == {
        "1": (JobState.DONE, "COMPLETED"),
        "2": (JobState.FAILED, "FAILED"),
        "3": (JobState.FAILED, "CANCELLED"),
        "4": (JobState.RUNNING, "RUNNING"),
        "5": (JobState.RUNNING, "RUNNING"),
        "6": (JobState.PENDING, "PENDING"),
        "7": (JobState.PENDING, "PENDING"),
        "8": (JobState.RUNNING, "RUNNING"),
    }


def test_a_running_job_is_read_whole() -> None:
    assert jobs("running")["4"] == SchedulerJob(
        job_id="4",
        state=JobState.RUNNING,
        raw_state="RUNNING",
        epoch=0,
        nodes=("n1",),
        uid=2000,
        name="runner",
        excluded=(),
        required=("n1",),
        requeueable=True,
        handle="4",
        partition="main",
    )


def test_a_requeued_job_is_pending_with_a_higher_epoch_and_no_node() -> None:
    job = jobs("lost")["4"]

    assert (job.state, job.epoch, job.nodes) == (JobState.PENDING, 1, ())


def test_a_job_that_may_not_be_requeued_is_lost_with_its_node() -> None:
    job = jobs("lost")["5"]

    assert (job.state, job.raw_state, job.requeueable) == (JobState.LOST, "NODE_FAIL", False)


def test_a_requeued_job_whose_last_run_is_still_being_cleared_away_is_pending() -> None:
    job = jobs("requeued")["8"]

    assert (job.state, job.raw_state, job.epoch) == (JobState.PENDING, "PENDING+COMPLETING", 1)


def test_a_task_of_an_array_is_called_by_its_number_in_the_array() -> None:
    task, rest = jobs("running")["8"], jobs("running")["6"]

    assert (task.handle, task.excluded) == ("6_1", ("n1", "n3"))
    assert rest.handle == "6"


def test_the_schema_of_slurm_23_11_reads_the_same() -> None:
    old = jobs("schema-0.0.40")

    assert {job_id: job.raw_state for job_id, job in old.items()} == {
        "1": "COMPLETED",
        "2": "FAILED",
        "3": "RUNNING",
        "4": "PENDING",
        "5": "NODE_FAIL",
        "6": "PENDING",
        "7": "PENDING",
        "8": "PENDING",
        "9": "RUNNING",
    }
    assert old["4"].excluded == ("n1",)
    assert old["4"].required == ("n1",)


@pytest.mark.parametrize("schema", ["0.0.43", "0.0.44", "0.0.45"])
def test_the_schemas_of_later_slurms_read_the_same(schema: str) -> None:
    lost = jobs(f"schema-{schema}.lost")

    assert {job_id: job.raw_state for job_id, job in lost.items()} == {
        "1": "COMPLETED",
        "2": "FAILED",
        "3": "CANCELLED",
        "4": "PENDING",
        "5": "NODE_FAIL",
        "6": "RUNNING",
        "7": "PENDING",
        "8": "PENDING",
        "9": "RUNNING",
        "10": "PENDING",
    }
    assert lost["4"] == SchedulerJob(
        job_id="4",
        state=JobState.PENDING,
        raw_state="PENDING",
        epoch=1,
        nodes=(),
        uid=2000,
        name="runner",
        required=("n1",),
        handle="4",
        begin=lost["4"].begin,
        end=lost["4"].end,
        partition="main",
    )
    assert (lost["6"].handle, lost["6"].nodes, lost["6"].excluded) == ("6_2", ("n2",), ("n1",))
    assert not lost["5"].requeueable
    assert lost["7"].begin > lost["4"].begin > 1.7e9
    found = text.parse_nodes((DATA / f"schema-{schema}.lost.nodes.json").read_text())
    assert [(node.name, node.up, node.port) for node in found] == [
        ("n1", False, 7001),
        ("n2", True, 7002),
        ("n3", True, 7003),
    ]


def test_a_running_task_of_an_array_is_read_whole_in_the_newest_schema() -> None:
    assert jobs("schema-0.0.45.running")["9"] == SchedulerJob(
        job_id="9",
        state=JobState.RUNNING,
        raw_state="RUNNING",
        epoch=0,
        nodes=("n2",),
        uid=2000,
        name="arr",
        excluded=("n1",),
        handle="6_0",
        begin=jobs("schema-0.0.45.running")["9"].begin,
        end=jobs("schema-0.0.45.running")["9"].end,
        partition="main",
    )


def test_a_state_that_is_one_text_is_read() -> None:
    (job,) = text.parse_jobs(with_first_job("running", job_state="RUNNING", array_job_id=12, array_task_id=0))

    assert (job.state, job.handle) == (JobState.RUNNING, "12_0")


@pytest.mark.parametrize(
    ("words", "state"),
    [
        (["SUSPENDED"], JobState.RUNNING),
        (["RUNNING", "CONFIGURING"], JobState.RUNNING),
        (["COMPLETED", "COMPLETING"], JobState.DONE),
        (["NODE_FAIL", "COMPLETING"], JobState.LOST),
        (["NODE_FAIL", "COMPLETING", "REQUEUED"], JobState.PENDING),
        (["PREEMPTED"], JobState.LOST),
        (["BOOT_FAIL"], JobState.LOST),
        (["TIMEOUT"], JobState.FAILED),
        (["OUT_OF_MEMORY"], JobState.FAILED),
        (["DEADLINE"], JobState.FAILED),
        (["PENDING", "SPECIAL_EXIT"], JobState.PENDING),
        (["PENDING", "REVOKED"], JobState.FAILED),
    ],
)
def test_states_with_flags_are_folded(words: list[str], state: JobState) -> None:
    (job,) = text.parse_jobs(with_first_job("running", job_state=words))

    assert job.state is state


@pytest.mark.parametrize(
    "words", [["MELTED"], ["RUNNING", "MELTED"], ["RUNNING", "PENDING"], ["COMPLETING"], [], ""]
)
def test_an_unknown_job_state_is_refused(words: object) -> None:
    with pytest.raises(OutlastError, match="job 1 is in the unknown state"):
        text.parse_jobs(with_first_job("running", job_state=words))


def test_nodes_are_read() -> None:
    seen = {
        capture: [
            (node.name, node.up, node.responding)
            for node in text.parse_nodes((DATA / f"{capture}.nodes.json").read_text())
        ]
        for capture in ("running", "silent", "lost", "schema-0.0.40")
    }

    others = [("n2", True, True), ("n3", True, True)]
    assert seen == {
        "running": [("n1", True, True), *others],
        "silent": [("n1", True, False), *others],
        "lost": [("n1", False, False), *others],
        "schema-0.0.40": [("n1", False, False), *others],
    }


def test_a_node_is_asked_where_its_slurmd_listens() -> None:
    (node,) = text.parse_nodes(with_first_node(address="198.18.0.11", port=7003))

    assert (node.address, node.port) == ("198.18.0.11", 7003)


@pytest.mark.parametrize(
    ("words", "up"),
    [
        (["IDLE", "DRAIN"], True),
        (["MIXED", "FAIL"], True),
        (["IDLE", "FAIL"], False),
        (["IDLE", "POWERED_DOWN"], False),
        (["UNKNOWN"], True),
        (["FUTURE"], False),
        ("DOWN", False),
    ],
)
def test_a_node_is_up_unless_it_is_down_failed_or_off(words: object, up: bool) -> None:
    (node,) = text.parse_nodes(with_first_node(state=words))

    assert node.up is up


@pytest.mark.parametrize("words", [["MELTED"], ["IDLE", "MELTED"], ["IDLE", "DOWN"], ["DRAIN"], []])
def test_an_unknown_node_state_is_refused(words: object) -> None:
    with pytest.raises(OutlastError, match="node n1 is in the unknown state"):
        text.parse_nodes(with_first_node(state=words))


@pytest.mark.parametrize(
    "output", ["", "slurm_load_jobs error", "[]", "{}", '{"jobs": [{"job_id": 1}]}', '{"jobs": [3]}']
)
def test_output_of_another_form_is_refused(output: str) -> None:
    with pytest.raises(OutlastError, match="squeue: "):
        text.parse_jobs(output)


@pytest.mark.parametrize(
    ("short", "names"),
    [
        ("", ()),
        ("n1", ("n1",)),
        ("n[1,3]", ("n1", "n3")),
        ("n[1-2,07],x", ("n1", "n2", "n07", "x")),
        ("r[1-2]n[09-10]", ("r1n09", "r1n10", "r2n09", "r2n10")),
        ("gpu-[1-2].site.org,n1", ("gpu-1.site.org", "gpu-2.site.org", "n1")),
    ],
)
def test_hostlists_are_expanded(short: str, names: tuple[str, ...]) -> None:
    assert expand(short) == names


@pytest.mark.parametrize("short", ["n[1-", "n[a-b]", "n[]", "n[1-2]]", "n[5-1]"])
def test_what_is_no_hostlist_is_refused(short: str) -> None:
    with pytest.raises(OutlastError, match="not a list of nodes"):
        expand(short)


@given(st.lists(st.integers(0, 999), min_size=1, max_size=5), st.integers(1, 4))
def test_a_hostlist_of_single_numbers_keeps_their_width(numbers: list[int], width: int) -> None:
    padded = [str(number).zfill(width) for number in numbers]

    assert expand(f"n[{','.join(padded)}]") == tuple(f"n{text}" for text in padded)


def test_commands_name_the_job_and_the_whole_list_of_nodes() -> None:
    assert text.requeue_command("6_1") == ["scontrol", "requeue", "6_1"]
    assert text.exclude_command(["6_1"], ["n1", "n3"]) == [
        "scontrol",
        "update",
        "JobId=6_1",
        "ExcNodeList=n1,n3",
    ]
    assert text.exclude_command(["4"], []) == ["scontrol", "update", "JobId=4", "ExcNodeList="]
    assert text.mark_down_command(["n1"], "no answer") == [
        "scontrol",
        "update",
        "NodeName=n1",
        "State=DOWN",
        "Reason=no answer",
    ]


def test_slurm_user_is_found() -> None:
    output = "SlurmSchedLogLevel      = 0\nSlurmUser               = slurm(64030)\nSlurmdDebug = debug\n"

    assert text.parse_slurm_user(output) == 64030


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of programs in front of PATH; both of Slurm's are there and print nothing."""
    place = tmp_path / "bin"
    place.mkdir()
    for name in ("squeue", "scontrol"):
        program(place, name, "exit 0")
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place


def program(place: Path, name: str, script: str) -> None:
    (place / name).write_text(f"#!/bin/sh\n{script}\n")
    (place / name).chmod(0o755)


def test_one_query_tells_all_jobs(programs: Path) -> None:
    program(programs, "squeue", f'[ "$*" = "--all --states=all --json" ] && cat "{DATA}/lost.jobs.json"')

    assert {job.job_id: job for job in slurm.SlurmScheduler().jobs()} == jobs("lost")


def test_commands_see_no_variable_that_changes_their_output(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    monkeypatch.setenv("SLURM_CLUSTERS", "other")
    monkeypatch.setenv("SLURM_CONF", "/opt/slurm.conf")
    program(programs, "scontrol", f"env | grep -v ^PWD= | sort > {programs}/env")

    slurm.SlurmScheduler().requeue("4")

    names = [line.split("=")[0] for line in (programs / "env").read_text().splitlines()]
    assert [name for name in names if name != "_"] == ["LC_ALL", "PATH", "SLURM_CONF", "SLURM_JSON"]


@pytest.mark.parametrize(
    "words",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "slurm_load_jobs error: Socket timed out on send/recv operation",
        "Unexpected message received for job 4",
    ],
)
def test_a_slurmctld_that_does_not_answer_is_unavailable(programs: Path, words: str) -> None:
    program(programs, "scontrol", f"echo '{words}' >&2; exit 1")

    with pytest.raises(SchedulerUnavailable, match="scontrol: "):
        slurm.SlurmScheduler().requeue("4")


@pytest.mark.parametrize(
    "words",
    [
        "Requested operation is presently disabled for job 5",
        "6_1: Job is no longer pending execution",
        "slurm_update error: Invalid node name specified",
    ],
)
def test_a_no_of_slurmctld_is_told_in_its_own_words(programs: Path, words: str) -> None:
    program(programs, "scontrol", f"echo '{words}' >&2; exit 1")

    with pytest.raises(SchedulerRefused) as refused:
        slurm.SlurmScheduler().exclude(["4"], ["n1"])

    assert str(refused.value) == f"scontrol update JobId=4 ExcNodeList=n1: {words}"


def test_a_command_that_hangs_is_ended(programs: Path) -> None:
    program(programs, "squeue", "exec sleep 60")
    began = time.monotonic()

    with pytest.raises(SchedulerUnavailable, match=r"no answer within 0\.3 s"):
        slurm.SlurmScheduler(timeout=0.3).jobs()

    assert time.monotonic() - began < 10


def test_missing_commands_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(ConfigError, match="squeue: not on PATH"):
        slurm.SlurmScheduler()
