"""The launcher on PBS: a form becomes a script for qsub, and what qstat printed becomes jobs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from outlast.errors import OutlastError
from outlast.launcher._pbs import parse_jobs, parse_queues, pbs_script
from outlast.launcher._spec import SpecError, parse_spec

JOBS = (Path(__file__).parent / "data" / "pbs.jobs.json").read_text()
HOME = Path("/shared/alice")


def script(**fields: object) -> str:
    """The script of a form that can be used as it is, but for *fields*."""
    return pbs_script(parse_spec({"kind": "command", "text": "./lu 400", "interval": "10m", **fields}), HOME)


def changed(**facts: object) -> str:
    """The captured job with other *facts*."""
    table = json.loads(JOBS)
    table["Jobs"]["0.ctl"] |= facts
    return json.dumps(table)


def test_a_command_becomes_a_script_with_the_fields_as_options(tmp_path: Path) -> None:
    text = script(
        name="my lu",
        partition="workq",
        time="90",
        cpus="2",
        memory="4G",
        directory=str(tmp_path),
        output="out",
    )
    assert text == (
        "#!/bin/sh\n#PBS -N my_lu\n#PBS -q workq\n#PBS -l walltime=01:30:00\n#PBS -l select=1:ncpus=2:mem=4gb\n"
        f"#PBS -o {tmp_path}/out\n#PBS -j oe\n#PBS -k oed\n#PBS -v OUTLAST_INTERVAL=10m\n"
        f"cd {tmp_path} || exit\n./lu 400\n"
    )


def test_fields_that_are_empty_are_left_to_pbs() -> None:
    assert script(interval="") == "#!/bin/sh\n#PBS -j oe\n#PBS -k oed\n./lu 400\n"
    assert "#PBS -o /tmp/\n" in script(directory="/tmp")


@pytest.mark.parametrize(
    ("time", "walltime"),
    [
        ("5", "00:05:00"),
        ("5:30", "00:05:30"),
        ("4:00:00", "04:00:00"),
        ("2-12", "60:00:00"),
        ("1-0:30", "24:30:00"),
    ],
)
def test_a_time_means_what_it_means_on_slurm(time: str, walltime: str) -> None:
    assert f"#PBS -l walltime={walltime}\n" in script(time=time)


def test_a_script_keeps_its_own_options_above_its_first_command() -> None:
    text = "#!/bin/bash\n#PBS -l ncpus=2\n\necho $A\n"
    said = script(kind="script", text=text, environment="A=1", interval="")
    assert said.endswith("#PBS -k oed\n#PBS -l ncpus=2\n\nexport A=1\necho $A\n")


def test_only_a_shell_script_is_given_a_directory(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="directory: PBS has none"):
        script(kind="script", text="#!/usr/bin/python3\nprint()\n", directory=str(tmp_path))
    assert "print()" in script(kind="script", text="#!/usr/bin/python3\nprint()\n")


@pytest.mark.parametrize("value", ["$(touch gone)", "a'b\"c", "; touch gone #", "\\"])
def test_a_variable_has_its_value_to_the_letter(value: str, tmp_path: Path) -> None:
    text = script(text='printf %s "$VALUE"', environment=f"VALUE={value}")
    done = subprocess.run(["/bin/sh"], input=text.encode(), cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout.decode() == value
    assert list(tmp_path.iterdir()) == []


def test_a_running_job_is_read() -> None:
    (job,) = parse_jobs(JOBS, "alice")
    assert (job.id, job.handle, job.kind, job.nodes) == ("0.ctl", "0.ctl", "running", "n2")
    assert job.output.startswith("/")
    assert job.started is not None
    assert parse_jobs(JOBS, "bob") == []


@pytest.mark.parametrize(
    ("facts", "kind", "end"),
    [
        ({"job_state": "Q"}, "pending", ""),
        ({"job_state": "H"}, "held", ""),
        ({"job_state": "F", "Exit_status": 0}, "done", "0"),
        ({"job_state": "F", "Exit_status": 7}, "failed", "7"),
        ({"job_state": "F", "Exit_status": 271}, "ended", "signal 15"),
        ({"job_state": "F", "Exit_status": 265 + 2}, "failed", "signal 11"),
        ({"job_state": "F", "Exit_status": -29}, "failed", "-29"),
    ],
)
def test_a_job_is_of_the_kind_that_people_know(facts: dict[str, object], kind: str, end: str) -> None:
    (job,) = parse_jobs(changed(**facts), "alice")
    assert (job.kind, job.exit) == (kind, end)


def test_errors_are_where_the_output_is_when_both_are_one_file() -> None:
    (job,) = parse_jobs(changed(Output_Path="ctl:/shared/alice/", Join_Path="oe"), "alice")
    assert job.output == job.errors == "/shared/alice/0.ctl.OU"
    (job,) = parse_jobs(changed(Error_Path="ctl:/shared/alice/err", Join_Path="n"), "alice")
    assert job.errors == "/shared/alice/err"


def test_the_queues_that_take_jobs_can_be_chosen() -> None:
    text = json.dumps({"Queue": {"workq": {"enabled": "True"}, "closed": {"enabled": "False"}}})
    assert [(one.name, one.default) for one in parse_queues(text, "workq")] == [("workq", True)]


@pytest.mark.parametrize("text", ["", "qstat: down", "[]"])
def test_other_output_is_an_error_and_no_empty_list(text: str) -> None:
    with pytest.raises(OutlastError, match="qstat"):
        parse_jobs(text, "alice")
