"""The form becomes a script, and nothing that is written into it becomes anything else."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from outlast.launcher._slurm import parse_jobs, parse_partitions
from outlast.launcher._spec import SpecError, parse_spec


def form(**fields: object) -> dict[str, object]:
    """A form that can be used as it is, but for *fields*."""
    return {"kind": "command", "text": "./lu 400", "interval": "10m", **fields}


def wrong(**fields: object) -> dict[str, str]:
    """What is said to be wrong with the form."""
    with pytest.raises(SpecError) as caught:
        parse_spec(form(**fields))
    return caught.value.fields


def test_a_command_becomes_a_script_with_the_fields_as_options(tmp_path: Path) -> None:
    script = parse_spec(
        form(name="lu", partition="main", time="4:00:00", cpus="2", memory="4G", directory=str(tmp_path))
    ).script()
    assert script == (
        "#!/bin/sh\n#SBATCH --job-name=lu\n#SBATCH --partition=main\n#SBATCH --time=4:00:00\n"
        f"#SBATCH --cpus-per-task=2\n#SBATCH --mem=4G\n#SBATCH --chdir={tmp_path}\n"
        "#SBATCH --checkpoint=10m\n./lu 400\n"
    )


def test_fields_that_are_empty_are_left_to_the_scheduler() -> None:
    assert parse_spec(form(interval="", name="  ")).script() == "#!/bin/sh\n./lu 400\n"


def test_a_script_keeps_its_own_options_above_its_first_command() -> None:
    text = "#!/bin/bash\n#SBATCH --time=5\n\necho $A\n"
    script = parse_spec(form(kind="script", text=text, environment="A=1")).script()
    assert script == "#!/bin/bash\n#SBATCH --checkpoint=10m\n#SBATCH --time=5\n\nexport A=1\necho $A\n"


@pytest.mark.parametrize(
    "value", ["$(touch gone)", "`touch gone`", "a'b\"c", "; touch gone #", "é ü", "\\", ""]
)
def test_a_variable_has_its_value_to_the_letter(value: str, tmp_path: Path) -> None:
    spec = parse_spec(form(text='printf %s "$VALUE"', environment=f"VALUE={value}"))
    done = subprocess.run(
        ["/bin/sh"], input=spec.script().encode(), cwd=tmp_path, capture_output=True, check=True
    )
    assert done.stdout.decode() == value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "a\n#SBATCH --wrap=evil"),
        ("name", "a\rb"),
        ("name", "a\u2028b"),
        ("name", "x" * 256),
        ("partition", "--help"),
        ("partition", "main gpu"),
        ("time", "1;2"),
        ("time", "--time"),
        ("cpus", "0"),
        ("cpus", "-1"),
        ("cpus", "٣"),
        ("cpus", "1e9"),
        ("memory", "4 GB"),
        ("memory", "-4G"),
        ("interval", "10"),
        ("interval", "31d"),
        ("interval", "5m --exclusive"),
        ("directory", "relative/path"),
        ("directory", "/no/such/directory"),
        ("directory", "/etc/passwd"),
        ("directory", "/tmp\n/etc"),
        ("directory", "/tmp\\"),
        ("output", "a\\b"),
        ("output", "a\x00b"),
        ("errors", "a\x1b[2Jb"),
        ("environment", "1A=b"),
        ("environment", "A B=c"),
        ("environment", "nothing"),
        ("environment", "A=\x07"),
        ("text", ""),
        ("text", "a\x00b"),
        ("kind", "shell"),
        ("name", 17),
        ("environment", ["A=1"]),
    ],
)
def test_a_field_that_cannot_be_used_is_named(field: str, value: object) -> None:
    said = wrong(**{field: value})
    assert list(said) == [field]


def test_every_wrong_field_is_named_at_once() -> None:
    assert set(wrong(text=" ", cpus="many", time="soon")) == {"text", "cpus", "time"}


def test_a_script_says_what_runs_it() -> None:
    assert "text" in wrong(kind="script", text="echo hello")


def test_other_peoples_jobs_and_rows_of_another_form_are_left_out() -> None:
    start = {"set": True, "infinite": False, "number": 5}
    rest = {"name": "a", "job_state": ["RUNNING"], "restart_cnt": 1, "nodes": "n1", "start_time": start}
    rows = [
        {"job_id": 1, "user_id": 7} | rest,
        {"job_id": 2, "user_id": 8} | rest,
        {"job_id": 3, "user_id": 7},
    ]
    text = json.dumps({"jobs": rows})
    (job,) = parse_jobs(text, 7)
    assert (job.id, job.kind, job.nodes, job.restarts, job.started) == ("1", "running", "n1", 1, 5)


def test_the_default_partition_is_known_by_its_star() -> None:
    assert [(one.name, one.default) for one in parse_partitions("main*\ngpu\n")] == [
        ("main", True),
        ("gpu", False),
    ]
