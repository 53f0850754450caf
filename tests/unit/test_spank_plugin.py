"""The SPANK plugin, loaded by a small host program under the address and undefined behavior sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.errors import UsageError
from outlast.model import parse_pace

ROOT = Path(__file__).resolve().parents[2]
PLUGIN_SOURCE = ROOT / "plugins" / "slurm"
HOST_SOURCE = Path(__file__).parent / "spank_host" / "host.c"

SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"]
INHERITED = "SLURM_SPANK__SLURM_SPANK_OPTION_outlast_checkpoint"
BATCH_ONLY = "log outlast: --checkpoint acts on batch jobs only; this runs without checkpoints"

Run = Callable[..., list[str]]


def _slurm_headers() -> Path | None:
    """The directory that holds slurm/spank.h: this machine's, or that of the testbed's root file system."""
    cache = Path(os.environ.get("OUTLAST_CACHE") or "/var/cache/outlast")
    for directory in (Path("/usr/include"), *sorted(cache.glob("rootfs-*/usr/include"))):
        if (directory / "slurm" / "spank.h").exists():
            return directory
    return None


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, need: Callable[[str, str | None], None]) -> Path:
    """The plugin and four hosts, compiled: an older Slurm's, sbatch, scrontab and slurmstepd ("node")."""
    compiler = shutil.which("gcc")
    need("spank", None if compiler else "no gcc")
    headers = _slurm_headers()
    need("spank", None if headers else "no slurm/spank.h: install libslurm-dev, or run 'scripts/testbed up'")
    assert compiler is not None
    built = tmp_path_factory.mktemp("spank") / "plugin"
    shutil.copytree(PLUGIN_SOURCE, built, ignore=shutil.ignore_patterns("*.so"))
    # After the compiler's own directories: a root file system has a libc of its own beside Slurm.
    includes = ["-idirafter", str(headers)]
    _compile(["make", "-C", str(built), "CFLAGS=" + " ".join(SANITIZERS), "CPPFLAGS=" + " ".join(includes)])
    for name, defined in (
        ("old", []),
        ("sbatch", ["-DSBATCH"]),
        ("scrontab", ["-DSCRONTAB"]),
        ("node", ["-DNODE"]),
    ):
        output = ["-rdynamic", "-o", str(built / name), str(HOST_SOURCE), "-ldl"]
        _compile([compiler, *SANITIZERS, *WARNINGS, *includes, *defined, *output])
    return built


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def run(built: Path) -> Run:
    """Runs a host and returns what it printed; a sanitizer's finding fails the test."""

    def run_(
        host: str, where: str, *settings: str, refused: bool = False, inherited: bool = False
    ) -> list[str]:
        environment = {"PATH": "/usr/bin:/bin"} | ({INHERITED: "10m"} if inherited else {})
        done = subprocess.run(
            [built / host, built / "spank_outlast.so", where, *settings],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.stderr == ""
        assert done.returncode == (1 if refused else 0)
        return done.stdout.splitlines()

    return run_


TAKEN = ["auto", "1s", "30s", "10m", "1h", "2d", "30d", "720h", "43200m", "2592000s"]
REFUSED = [
    *(
        "",
        "m",
        "s",
        "10",
        "10 m",
        " 10m",
        "10m ",
        "10m\n",
        "10M",
        "10min",
        "1h30m",
        "10m;reboot",
        "%s%n",
        "٣m",
    ),
    *("0s", "00m", "010m", "1.5h", "-5m", "+5m", "31d", "721h", "2592001s", "9999999s", "10000000s"),
    *("99999999999999999999s", "1" * 5000 + "s", "m" * 5000, "10m\n"),
]


@pytest.mark.parametrize("text", TAKEN)
def test_plugin_takes_the_intervals_that_the_rest_takes(run: Run, text: str) -> None:
    lines = run("sbatch", "allocator", f"option={text}")

    assert "option 0" in lines
    assert parse_pace(text) != 0


@pytest.mark.parametrize("text", REFUSED)
def test_plugin_refuses_what_the_rest_refuses_and_says_what_to_write(run: Run, text: str) -> None:
    lines = run("sbatch", "allocator", f"option={text}", refused=True)

    with pytest.raises(UsageError):
        parse_pace(text)
    assert "\n".join(lines[2:-1]) == (
        f"error outlast: --checkpoint={text[:64]}: not a time between 1s and 30d; "
        "write a whole number and a unit: 30s, 10m, 1h or 2d; or auto"
    )
    assert lines[-1] == "option -1"


@pytest.mark.parametrize("text", ["10x", "", "9" * 5000])
def test_bad_interval_on_the_node_costs_the_job_nothing_but_its_checkpoints(run: Run, text: str) -> None:
    lines = run("node", "remote", f"option={text}")

    assert "option 0" in lines
    assert "slurm_spank_task_init 0" in lines
    assert not any(line.startswith("prepend") for line in lines)


@pytest.mark.parametrize("where", ["allocator", "local", "remote"])
def test_option_is_known_where_users_write_it_and_where_the_job_runs(run: Run, where: str) -> None:
    assert "registered checkpoint INTERVAL" in run("node", where)


@pytest.mark.parametrize("where", ["slurmd", "job_script"])
def test_plugin_does_nothing_in_slurmd(run: Run, where: str) -> None:
    assert run("node", where, "arg=nonsense") == ["slurm_spank_init 0", "slurm_spank_init_post_opt 0"]


@pytest.mark.parametrize("chosen", [(), ("open-mode=unset", "requeue=unset")])
def test_job_that_chose_nothing_is_appended_to_and_requeued(run: Run, chosen: tuple[str, ...]) -> None:
    lines = run("sbatch", "allocator", "option=10m", *chosen)

    assert lines[3:] == ["set open-mode append", "set requeue requeue", "slurm_spank_init_post_opt 0"]


@pytest.mark.parametrize("mode", ["t", "truncate"])
def test_users_own_choice_stands_and_its_cost_is_said(run: Run, mode: str) -> None:
    lines = run("sbatch", "allocator", "option=10m", f"open-mode={mode}", "requeue=no-requeue")

    assert lines[3:] == [
        "log outlast: --open-mode=truncate: every restart empties the job's output file",
        "log outlast: --no-requeue: the job is not restarted when its node fails",
        "slurm_spank_init_post_opt 0",
    ]


# Slurm 23.11 to 26.05 give the open mode by its first letter.
@pytest.mark.parametrize("mode", ["a", "append"])
def test_choice_that_the_plugin_would_make_is_left_as_it_is(run: Run, mode: str) -> None:
    lines = run("sbatch", "allocator", "option=10m", f"open-mode={mode}", "requeue=requeue")

    assert lines[3:] == ["slurm_spank_init_post_opt 0"]


def test_sbatch_without_its_symbols_tells_the_user_what_to_write(run: Run) -> None:
    lines = run("old", "allocator", "option=10m", "name=sbatch")

    assert lines[3] == (
        "log outlast: this sbatch keeps its options to itself; "
        "write --open-mode=append and --requeue beside --checkpoint"
    )


@pytest.mark.parametrize("nodes", ["2", "2-4", "16"])
def test_submission_of_a_job_on_several_nodes_says_that_it_has_no_checkpoints(run: Run, nodes: str) -> None:
    said = "log outlast: this runs without checkpoints: only jobs on one node can be checkpointed"

    assert run("sbatch", "allocator", "option=10m", f"nodes={nodes}").count(said) == 1
    assert said not in run("sbatch", "allocator", f"nodes={nodes}")


@pytest.mark.parametrize("nodes", ["1", "0", "1-4", ""])
def test_submission_of_a_job_that_may_have_one_node_says_nothing(run: Run, nodes: str) -> None:
    assert not any(
        "without checkpoints" in one for one in run("sbatch", "allocator", "option=10m", f"nodes={nodes}")
    )


def test_submission_of_a_heterogeneous_job_says_once_that_it_has_no_checkpoints(run: Run) -> None:
    said = "log outlast: this runs without checkpoints: heterogeneous jobs cannot be checkpointed"

    assert run("sbatch", "allocator", "option=10m", "components=3").count(said) == 1
    assert said not in run("sbatch", "allocator", "components=3")


@pytest.mark.parametrize(("where", "name"), [("allocator", "salloc"), ("local", "srun")])
def test_salloc_and_srun_say_that_the_flag_is_for_batch_jobs(run: Run, where: str, name: str) -> None:
    assert run("old", where, "option=10m", f"name={name}").count(BATCH_ONLY) == 1


def test_scrontab_refuses_the_flag_which_it_would_lose(run: Run) -> None:
    lines = run("scrontab", "allocator", "option=10m", refused=True)

    assert lines[2] == (
        "error outlast: scrontab gives no --checkpoint to its jobs; "
        "let the entry's command be sbatch --checkpoint=INTERVAL"
    )


def test_srun_that_inherited_the_flag_says_nothing(run: Run) -> None:
    assert BATCH_ONLY not in run("old", "local", "option=10m", "name=srun", inherited=True)


@pytest.mark.parametrize(("host", "where"), [("sbatch", "allocator"), ("old", "local"), ("node", "remote")])
def test_job_without_the_flag_is_left_alone(run: Run, host: str, where: str) -> None:
    lines = run(host, where, "env=SLURM_JOB_NUM_NODES=4", "arg=shim=/nowhere")

    assert [line for line in lines if not line.endswith(" 0")] == ["registered checkpoint INTERVAL"]


def test_batch_script_is_put_behind_the_shim(run: Run) -> None:
    lines = run("node", "remote", "option=10m", "arg=shim=/bin/sh", "env=SLURM_JOB_NUM_NODES=1")

    assert lines[4:] == [
        f"unsetenv {INHERITED}",
        "prepend /bin/sh --interval 10m --",
        "slurm_spank_task_init 0",
    ]


@pytest.mark.parametrize("step", ["0", "1", "4294967290", "4294967292"])
def test_steps_are_left_alone(run: Run, step: str) -> None:
    lines = run("node", "remote", "option=10m", "arg=shim=/bin/sh", f"step={step}")

    assert lines[4:] == ["slurm_spank_task_init 0"]


@pytest.mark.parametrize(
    ("host", "settings", "reason"),
    [
        ("node", ["arg=shim=/no/shim"], "/no/shim: No such file or directory"),
        ("node", ["arg=shim=/etc/passwd"], "/etc/passwd: Permission denied"),
        ("old", ["arg=shim=/bin/sh"], "they need Slurm 23.11 or later"),
        (
            "node",
            ["arg=shim=/bin/sh", "env=SLURM_JOB_NUM_NODES=2"],
            "the job has 2 nodes, and only jobs on one node can be checkpointed",
        ),
        (
            "node",
            ["arg=shim=/bin/sh", "env=SLURM_JOB_NUM_NODES=1", "env=SLURM_HET_SIZE=2"],
            "heterogeneous jobs cannot be checkpointed",
        ),
    ],
)
def test_job_that_cannot_be_checkpointed_runs_without_and_says_why(
    run: Run, host: str, settings: list[str], reason: str
) -> None:
    lines = run(host, "remote", "option=10m", *settings)

    assert lines[4:] == [
        f"unsetenv {INHERITED}",
        f"log outlast: runs without checkpoints: {reason}",
        "slurm_spank_task_init 0",
    ]


@pytest.mark.parametrize("argument", ["shim=", "shim=relative", "interval=10m", "", "shim=/" + "x" * 5000])
def test_wrong_line_in_plugstack_conf_is_named_and_stops_nothing(run: Run, argument: str) -> None:
    lines = run("node", "remote", f"arg={argument}")

    assert lines[0] == (
        f"error outlast: plugstack.conf: {argument}: not understood; the only argument is shim=/absolute/path"
    )
    assert lines[-1] == "slurm_spank_task_init 0"
