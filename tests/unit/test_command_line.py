"""The command line without a cluster: what all verbs have in common, and what a terminal is shown."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from outlast import control
from outlast.cli import parser
from tests.terminal import Terminal

ROOT = Path(__file__).parents[2]


def verbs(
    of: argparse.ArgumentParser, name: str = "outlast"
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every verb that help shows, and those below it, with their parsers."""
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            shown = {choice.dest for choice in action._choices_actions}
            for word, sub in action.choices.items():
                if word in shown:
                    inner = list(verbs(sub, f"{name} {word}"))
                    yield from inner or [(f"{name} {word}", sub)]


VERBS = dict(verbs(parser()))


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_can_answer_in_json_and_says_its_exit_codes(verb: str) -> None:
    assert "--json" in VERBS[verb]._option_string_actions
    text = VERBS[verb].format_help()
    assert "exit codes:" in text
    assert "  75  " in text


def outlast(*words: str, config: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "outlast.cli", "--config", str(config), *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=30)


class Watcher:
    """Stands where a watcher listens, and answers what it was given."""

    def __init__(self, path: Path, answers: Mapping[str, Mapping[str, Any]]) -> None:
        self.answers = dict(answers)
        self._listener = control.listen(path)
        threading.Thread(target=control.serve, args=(self._listener, self._handle), daemon=True).start()

    def _handle(self, peer: control.Peer, request: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.answers[str(request["op"])]

    def close(self) -> None:
        self._listener.close()


def job(number: int, state: str = "RUNNING") -> dict[str, Any]:
    newest = {"created": time.time() - 30, "pause_ms": 12.3}
    return {
        "job_id": str(number), "name": f"sim-{number}", "state": state, "nodes": ["n1"], "epoch": 1, "uid": 0,
        "checkpoints": 2, "newest": newest, "lease_age": 0.1,
    }  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Path]:
    """A configuration whose watcher has two jobs."""
    socket = tmp_path / "watcher.sock"
    file = tmp_path / "outlast.toml"
    file.write_text(f'[watcher]\nsocket = "{socket}"\n')
    log = [{"time": time.time(), "node": "n1", "event": "started", "text": "a\x1b[31mb"}]
    watcher = Watcher(socket, {"status": {"jobs": [job(1), job(2, "PENDING")]}, "events": {"events": log}})
    yield file
    watcher.close()


def test_an_error_is_one_json_value_where_json_was_asked_for(tmp_path: Path) -> None:
    done = outlast("show", "nonsense", "--json", config=tmp_path / "none.toml")
    plain = outlast("show", "nonsense", config=tmp_path / "none.toml")

    assert done.returncode == plain.returncode == 64
    fault = json.loads(done.stderr)
    assert fault["exit_code"] == 64
    assert plain.stderr == f"outlast: {fault['error']}\noutlast: {fault['hint']}\n"


def test_no_color_and_no_control_character_goes_into_a_pipe(config: Path) -> None:
    for words in (("status",), ("top",), ("top", "--once")):
        done = outlast(*words, config=config)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout
        assert "sim-1" in done.stdout


def test_status_is_colored_on_a_terminal_unless_no_color_is_set(config: Path) -> None:
    command = (sys.executable, "-m", "outlast.cli", "--config", str(config), "status")
    shown = Terminal(*command)
    assert shown.end() == 0
    assert "\x1b[32mRUNNING" in shown.seen

    plain = Terminal(*command, NO_COLOR="1")
    assert plain.end() == 0
    assert "\x1b" not in plain.seen
    assert "RUNNING" in plain.seen


def test_top_shows_the_chosen_jobs_events_follows_the_arrow_keys_and_gives_the_terminal_back(
    config: Path,
) -> None:
    shown = Terminal(sys.executable, "-m", "outlast.cli", "--config", str(config), "top", "--every", "0.3")
    shown.until("job 1: what happened last")
    assert "\x1b[?1049h" in shown.seen
    assert "> 1 " in shown.seen
    # What a job's name or an error text holds is not acted upon.
    shown.until("a?[31mb")
    shown.type_("\x1b[B")
    shown.until("job 2: what happened last")
    shown.type_("q")
    assert shown.end() == 0
    assert shown.seen.endswith("\x1b[?25h\x1b[?1049l")


def test_progress_is_drawn_on_a_terminal_and_nowhere_else(tmp_path: Path) -> None:
    program = (
        "from outlast.terminal import progress\nimport time\n"
        "with progress('verify', 4) as advance:\n"
        "    for n in range(5):\n        advance(n); time.sleep(2 if n == 2 else 0)\n"
    )
    pytest.importorskip("rich")
    shown = Terminal(sys.executable, "-c", program)
    assert shown.end() == 0
    assert "verify" in shown.seen
    assert "2/4" in shown.seen
    piped = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert piped.stdout + piped.stderr == b""


def test_steps_draw_one_thing_after_another(tmp_path: Path) -> None:
    program = (
        "from outlast.terminal import steps\nimport time\n"
        "with steps() as draw:\n    for name in ('17@0.1', '17@0.2'):\n"
        "        for n in range(4):\n            draw(name, n, 3); time.sleep(1 if n == 2 else 0)\n"
    )
    pytest.importorskip("rich")
    shown = Terminal(sys.executable, "-c", program)
    assert shown.end() == 0
    assert "17@0.1" in shown.seen
    assert "17@0.2" in shown.seen
    assert "2/3" in shown.seen
