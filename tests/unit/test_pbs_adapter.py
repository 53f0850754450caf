"""PBS behind the scheduler protocol, on what a real OpenPBS 23.06 printed."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest

from outlast.errors import ConfigError, OutlastError
from outlast.model import JobKey, JobState
from outlast.scheduler import SchedulerRefused, SchedulerUnavailable
from outlast.scheduler._pbs_text import (
    EXIT_WORDS,
    bound,
    down_nodes,
    job_name,
    jobs_on,
    parse_jobs,
    parse_nodes,
    roomy_node,
    to_readmit,
)
from outlast.scheduler.pbs import PbsScheduler
from tests.cluster import eventually

DATA = Path(__file__).parent / "data"
JOBS = (DATA / "pbs.jobs.json").read_text()
NODES = (DATA / "pbs.nodes.json").read_text()
USERS = {"alice": 2000}


def changed(text: str, key: str, name: str, **facts: object) -> str:
    """*text* with *facts* in its row *name*; None takes one away."""
    table = json.loads(text)
    row = table[key][name] | facts
    table[key][name] = {name: value for name, value in row.items() if value is not None}
    return json.dumps(table)


def test_a_running_job_is_read() -> None:
    (job,) = parse_jobs(JOBS, USERS)
    assert (job.job_id, job.handle, job.name) == ("0.ctl", "0.ctl", "probe")
    assert (job.state, job.raw_state, job.epoch) == (JobState.RUNNING, "R", 0)
    assert (job.nodes, job.uid, job.requeueable) == (("n2",), 2000, True)


def test_a_waiting_jobs_epoch_is_that_of_its_next_run() -> None:
    (job,) = parse_jobs(changed(JOBS, "Jobs", "0.ctl", job_state="Q", run_version=3, exec_host=None), USERS)
    assert (job.state, job.epoch, job.nodes) == (JobState.PENDING, 3, ())


def test_who_is_no_manager_of_pbs_knows_a_run_by_its_count() -> None:
    text = changed(JOBS, "Jobs", "0.ctl", run_version=None, run_count=2)
    assert parse_jobs(text, USERS)[0].epoch == 1
    assert parse_jobs(text, USERS, ahead=3)[0].epoch == 4, "a manager of PBS had set the count back"


@pytest.mark.parametrize("letter", "QHWT")
def test_a_job_that_waits_is_pending(letter: str) -> None:
    assert parse_jobs(changed(JOBS, "Jobs", "0.ctl", job_state=letter), USERS)[0].state is JobState.PENDING


@pytest.mark.parametrize("letter", "RESU")
def test_a_job_that_has_its_host_is_running(letter: str) -> None:
    assert parse_jobs(changed(JOBS, "Jobs", "0.ctl", job_state=letter), USERS)[0].state is JobState.RUNNING


@pytest.mark.parametrize(
    ("status", "state", "word"),
    [(0, JobState.DONE, "F"), (7, JobState.FAILED, "F(7)"), (-29, JobState.FAILED, "F(KILL_WALLTIME)")],
)
def test_a_finished_job_is_told_apart_by_its_exit_status(status: int, state: JobState, word: str) -> None:
    (job,) = parse_jobs(changed(JOBS, "Jobs", "0.ctl", job_state="F", Exit_status=status), USERS)
    assert (job.state, job.raw_state) == (state, word)


def test_an_unknown_state_is_never_guessed() -> None:
    with pytest.raises(OutlastError, match="unknown state 'Z'"):
        parse_jobs(changed(JOBS, "Jobs", "0.ctl", job_state="Z"), USERS)


def test_every_negative_exit_status_has_pbss_word() -> None:
    assert {-1, -4, -5, -11, -18, -20, -29, -30} <= set(EXIT_WORDS)
    assert all(number < 0 for number in EXIT_WORDS)


@pytest.mark.parametrize(("handle", "name"), [("17.ctl", "17.ctl"), ("17[3].ctl", "17_3.ctl")])
def test_a_job_has_a_name_that_the_store_can_have(handle: str, name: str) -> None:
    assert job_name(handle) == name
    assert JobKey("cluster", name).job_id == name


def test_the_tasks_of_an_array_are_jobs_and_the_array_is_none() -> None:
    rows = json.loads(JOBS)
    row = rows["Jobs"].pop("0.ctl")
    rows["Jobs"] = {
        "5[].ctl": row | {"job_state": "B"},
        "5[1].ctl": row,
        "5[2].ctl": row | {"job_state": "Q"},
    }
    jobs = parse_jobs(json.dumps(rows), USERS)
    assert [(job.job_id, job.handle) for job in jobs] == [("5_1.ctl", "5[1].ctl"), ("5_2.ctl", "5[2].ctl")]


def test_no_jobs_are_no_error() -> None:
    assert parse_jobs('{"timestamp": 1, "pbs_server": "ctl"}') == ()


@pytest.mark.parametrize(
    "output", ["", "qstat: down", "[]", '{"Jobs": {"1.ctl": {}}}', '{"Jobs": {"1.ctl": 1}}']
)
def test_other_output_is_an_error_and_no_empty_cluster(output: str) -> None:
    with pytest.raises(OutlastError, match="qstat"):
        parse_jobs(output)


def test_nodes_are_read() -> None:
    n2, n1 = parse_nodes(NODES)
    assert (n2.name, n2.address, n2.port, n2.up, n2.responding) == ("n2", "n2", 15002, True, True)
    assert n1.name == "n1"


def test_a_node_that_is_down_is_the_watchers_until_it_has_seen_to_it() -> None:
    node = parse_nodes(changed(NODES, "nodes", "n2", state="down"))[0]
    assert (node.up, node.responding) == (True, False)
    node = parse_nodes(changed(NODES, "nodes", "n2", state="down,offline", comment="outlast: silent"))[0]
    assert (node.up, node.responding) == (False, False)
    assert down_nodes(changed(NODES, "nodes", "n2", state="down,offline")) == {"n2"}


@pytest.mark.parametrize(
    ("facts", "again"),
    [
        ({"state": "offline", "comment": "outlast: silent"}, ("n2",)),
        ({"state": "offline", "comment": "disk broken"}, ()),
        ({"state": "down,offline", "comment": "outlast: silent"}, ()),
        ({"state": "offline", "comment": "outlast: silent", "last_state_change_time": 1900}, ()),
        ({"state": "free", "comment": "outlast: silent"}, ()),
    ],
    ids=["up-again", "a-persons", "still-down", "too-soon", "in-service"],
)
def test_only_what_the_watcher_took_away_is_put_back(
    facts: dict[str, object], again: tuple[str, ...]
) -> None:
    facts = {"last_state_change_time": 1000, **facts}
    assert to_readmit(changed(NODES, "nodes", "n2", **facts), now=2000) == again


def test_the_jobs_on_a_node_are_found_by_where_they_run() -> None:
    assert jobs_on(JOBS, "n2") == ("0.ctl",)
    assert jobs_on(JOBS, "n") == ()


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs in the place of PBS's, which write down their arguments and print what a file beside them says."""
    for name in ("qstat", "pbsnodes", "qrerun", "qhold", "qrls", "qalter", "qmgr"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n'
            f"cat {tmp_path}/{name}.err >&2 2>/dev/null && exit 1\ncat {tmp_path}/{name}.out 2>/dev/null; exit 0\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "qstat.out").write_text(JOBS)
    (tmp_path / "pbsnodes.out").write_text(NODES)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_a_silent_node_is_taken_out_of_service_and_its_jobs_are_queued_again(commands: Path) -> None:
    PbsScheduler().mark_down(["n2"], "outlast: no answer")
    calls = (commands / "calls").read_text().splitlines()
    assert calls[0] == "pbsnodes -o -C outlast: no answer n2"
    assert calls[-1] == "qrerun -W force 0.ctl"


def test_where_pbs_knows_a_node_to_be_down_its_jobs_are_left_to_it(commands: Path) -> None:
    (commands / "pbsnodes.out").write_text(changed(NODES, "nodes", "n2", state="down"))
    PbsScheduler().mark_down(["n2"], "no answer")
    assert "qrerun" not in (commands / "calls").read_text(), (
        "PBS would not run the job before the node is back"
    )


def test_no_answer_and_a_no_are_told_apart(commands: Path) -> None:
    (commands / "qrerun.err").write_text("qrerun: Request invalid for state of job 0.ctl\n")
    with pytest.raises(SchedulerRefused, match="Request invalid"):
        PbsScheduler().requeue("0.ctl")
    (commands / "qrerun.err").write_text(
        "Connection refused\nqrerun: cannot connect to server ctl (errno=15010)\n"
    )
    with pytest.raises(SchedulerUnavailable, match="cannot connect"):
        PbsScheduler().requeue("0.ctl")


def test_without_pbs_there_is_a_word_on_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("outlast.scheduler.pbs._PLACES", ())
    with pytest.raises(ConfigError, match="qstat: not on PATH"):
        PbsScheduler()


@pytest.mark.parametrize(
    ("select", "node", "then"),
    [
        ("1:ncpus=1", "n2", "1:ncpus=1:host=n2"),
        ("1:ncpus=1:host=n1", "n2", "1:ncpus=1:host=n2"),
        ("2:ncpus=1+1:ncpus=2:host=n1:mem=1gb", "n2", "2:ncpus=1:host=n2+1:ncpus=2:mem=1gb:host=n2"),
        ("1:ncpus=1:host=n2", "", "1:ncpus=1"),
    ],
)
def test_a_job_is_bound_to_a_node_by_its_select_statement(select: str, node: str, then: str) -> None:
    assert bound(select, node) == then


def with_resources(**more: object) -> str:
    """The captured job, with *more* in its Resource_List."""
    row = json.loads(JOBS)["Jobs"]["0.ctl"]
    return changed(JOBS, "Jobs", "0.ctl", Resource_List=row["Resource_List"] | more)


def test_the_node_that_a_job_asks_for_is_known() -> None:
    assert parse_jobs(with_resources(select="1:ncpus=1:host=n2:mem=1gb"), USERS)[0].required == ("n2",)
    assert parse_jobs(JOBS, USERS)[0].required == ()


def test_a_running_jobs_end_is_its_start_and_its_walltime() -> None:
    begin = time.mktime(time.strptime("2026-11-22 02:19:34", "%Y-%m-%d %H:%M:%S"))
    assert parse_jobs(with_resources(walltime="01:00:30"), USERS)[0].end == begin + 3630
    assert parse_jobs(JOBS, USERS)[0].end == 0.0, "it has no walltime"


def test_a_node_with_room_is_another_than_the_jobs_own() -> None:
    row = json.loads(JOBS)["Jobs"]["0.ctl"]
    assert roomy_node(NODES, row) == "n1"
    assert roomy_node(changed(NODES, "nodes", "n1", resources_assigned={"ncpus": 2}), row) is None
    assert roomy_node(changed(NODES, "nodes", "n1", state="job-busy"), row) is None
    assert roomy_node(changed(NODES, "nodes", "n1", state="offline"), row) is None


def calls_after(commands: Path, last: str) -> list[str]:
    """What was called, once that begins with *last*, without the questions."""

    def called() -> list[str]:
        lines = (commands / "calls").read_text().splitlines() if (commands / "calls").exists() else []
        return [line for line in lines if not line.startswith(("qstat", "pbsnodes -a"))]

    eventually(lambda: called() and called()[-1].startswith(last), within=20, what=f"{last}: {called()}")
    return called()


RUNNING = changed(JOBS, "Jobs", "0.ctl", substate=42)


def test_a_job_is_moved_by_a_hold_of_its_own_kind_and_bound_meanwhile(commands: Path) -> None:
    (commands / "qstat.out").write_text(RUNNING)
    assert PbsScheduler().leave("0.ctl", hold=False, to=None) == "n1"
    eventually(lambda: "qhold" in (commands / "calls").read_text(), within=10, what="a hold")
    (commands / "qstat.out").write_text(changed(JOBS, "Jobs", "0.ctl", job_state="H", exec_host=None))
    assert calls_after(commands, "qmgr")[:3] == [
        "qhold -h s 0.ctl",
        "qalter -l select=1:ncpus=1:host=n1 0.ctl",
        "qrls -h s 0.ctl",
    ]


def test_a_job_whose_hold_fails_is_not_left_held(commands: Path) -> None:
    (commands / "qstat.out").write_text(RUNNING)
    (commands / "qhold.err").write_text("qhold: MOM rejected hold request: 15061 0.ctl\n")
    assert PbsScheduler().leave("0.ctl", hold=True, to=None) == ""
    assert calls_after(commands, "qmgr")[:2] == ["qhold -h u 0.ctl", "qrls -h u 0.ctl"]


@pytest.mark.parametrize(
    ("facts", "handle", "words"),
    [
        ({"substate": 41}, "0.ctl", "has not begun"),
        ({"Checkpoint": "n"}, "0.ctl", "no checkpoints"),
        ({}, "0[1].ctl", "task of an array"),
        ({}, "1.ctl", "has not begun, or is over"),
    ],
)
def test_what_pbs_would_not_save_is_not_held(
    commands: Path, facts: dict[str, object], handle: str, words: str
) -> None:
    (commands / "qstat.out").write_text(changed(RUNNING, "Jobs", "0.ctl", **facts))
    with pytest.raises(SchedulerRefused, match=words):
        PbsScheduler().leave(handle, hold=False, to="n1")
    assert not (commands / "calls").exists() or "qhold" not in (commands / "calls").read_text()


def test_a_node_that_a_person_drains_is_not_put_back_by_the_watcher(commands: Path) -> None:
    PbsScheduler().drain("n2", "outlast: maintenance")
    assert (commands / "calls").read_text() == "pbsnodes -o -C maintenance by outlast n2\n"
    facts = {"state": "offline", "comment": "maintenance by outlast", "last_state_change_time": 1}
    assert to_readmit(changed(NODES, "nodes", "n2", **facts), now=2000) == ()
