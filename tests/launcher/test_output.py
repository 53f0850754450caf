"""What a page shows of a file is what the file holds, whatever happens to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlast.launcher import _output
from outlast.launcher._output import Follower


class Page:
    """The lines that somebody shows who does what the messages say, as static/output.js does."""

    def __init__(self, path: Path) -> None:
        self.follower = Follower(str(path))
        self.lines: list[list[object]] = []
        self.seen: list[str] = []
        self.taken_back: list[str] = []
        self.skipped = 0

    def look(self) -> list[str]:
        """Poll once; return the lines' texts."""
        for message in self.follower.poll():
            self.seen.append(message["op"])
            match message["op"]:
                case "begin":
                    self.lines = []
                    self.skipped = message["skipped"]
                case "reset":
                    self.lines = []
                case "cut":
                    self.taken_back += [str(line[1]) for line in self.lines if line[0] >= message["start"]]
                    self.lines = [line for line in self.lines if line[0] < message["start"]]
                case "lines":
                    for line in message["lines"]:
                        if self.lines and self.lines[-1][0] == line[0]:
                            self.lines.pop()
                        self.lines.append(line)
        return [str(line[1]) for line in self.lines]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out"


def append(path: Path, text: str | bytes) -> None:
    with path.open("ab") as file:
        file.write(text.encode() if isinstance(text, str) else text)


def test_lines_appear_as_they_are_written(path: Path) -> None:
    page = Page(path)
    assert page.look() == []
    append(path, "one\ntw")
    assert page.look() == ["one", "tw"]
    append(path, "o\n\nthree\n")
    assert page.look() == ["one", "two", "", "three"]
    assert page.look() == ["one", "two", "", "three"]


def test_lines_that_a_restore_cuts_off_are_taken_back(path: Path) -> None:
    page = Page(path)
    append(path, "one\ntwo\nthree\nfo")
    page.look()
    os.truncate(path, len("one\ntw"))
    assert page.look() == ["one", "tw"]
    assert page.taken_back == ["two", "three", "fo"]
    append(path, "o again\n")
    assert page.look() == ["one", "two again"]


def test_a_file_that_was_cut_and_grew_beyond_its_old_end_between_two_looks_is_right(path: Path) -> None:
    page = Page(path)
    append(path, "one\ntwo 12:00\nthree 12:01\n")
    page.look()
    os.truncate(path, len("one\n"))
    append(path, "two 12:05\nthree 12:06\nfour 12:07\n")
    assert page.look() == ["one", "two 12:05", "three 12:06", "four 12:07"]
    assert page.taken_back == ["two 12:00", "three 12:01"]


def test_a_change_far_behind_the_end_is_found_when_the_job_was_restarted(path: Path) -> None:
    page = Page(path)
    same = "x" * 10_000 + "\n"
    append(path, "run 1\n" + same)
    page.look()
    os.truncate(path, 0)
    append(path, "run 2\n" + same)
    page.follower.recheck()
    assert page.look() == ["run 2", "x" * 4096]


def test_a_file_that_is_replaced_or_removed_is_shown_anew(path: Path) -> None:
    page = Page(path)
    append(path, "old\n")
    page.look()
    fresh = path.with_name("fresh")
    append(fresh, "new\nfile\n")
    fresh.rename(path)
    assert page.look() == ["new", "file"]
    path.unlink()
    assert page.look() == []
    append(path, "once more\n")
    assert page.look() == ["once more"]


def test_of_a_long_file_the_end_is_shown_from_a_lines_start(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_output, "FIRST", 100)
    append(path, "".join(f"line {number}\n" for number in range(1000)))
    page = Page(path)
    assert page.look() == [f"line {number}" for number in range(1000 - len(page.lines), 1000)]
    assert 5 < len(page.lines) < 12
    assert page.skipped == path.stat().st_size - sum(len(str(line[1])) + 1 for line in page.lines)


def test_a_file_set_back_behind_what_is_shown_is_shown_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_output, "FIRST", 100)
    append(path, "".join(f"line {number}\n" for number in range(1000)))
    page = Page(path)
    page.look()
    os.truncate(path, len("line 0\nline 1\n"))
    assert page.look() == ["line 0", "line 1"]
    assert "reset" in page.seen


def test_a_line_without_end_is_bounded_and_says_so(path: Path) -> None:
    page = Page(path)
    for _ in range(5):
        append(path, b"z" * 100_000)
        page.look()
    (line,) = page.lines
    assert line[1:] == ["z" * 4096, False, 500_000 - 4096]
    append(path, "\nnext\n")
    assert [str(one[1])[:5] for one in page.lines] == ["zzzzz"]
    assert page.look()[1:] == ["next"]


def test_output_that_comes_too_fast_is_skipped_and_said_to_be(path: Path) -> None:
    page = Page(path)
    append(path, "first\n")
    page.look()
    append(path, b"a line of no interest\n" * 500_000)
    assert page.look()[-1] == "a line of no interest"
    assert "skip" in page.seen
    assert len(page.lines) < 20_000


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (b"\x1b[31mred\x1b[0m \x1b]0;title\x07end", "red end"),
        (b"a\x00b\x07c\x1bd", "a␀b␇c␛d"),
        (b"\xff\xfe\xc3(", "\ufffd\ufffd\ufffd("),
        ("to \u202e left".encode(), "to \ufffd left"),
        (b"<script>alert(1)</script>", "<script>alert(1)</script>"),
        (b"10%\r50%\r100%", "100%"),
        (b"dos\r", "dos"),
        (b"\tkept", "\tkept"),
    ],
)
def test_what_a_terminal_would_obey_is_made_visible_or_left_out(
    path: Path, written: bytes, shown: str
) -> None:
    append(path, written + b"\n")
    assert Page(path).look() == [shown]


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (message,) = Follower(str(fifo)).poll()
    assert message["op"] == "problem"
    (message,) = Follower(str(tmp_path)).poll()
    assert message["op"] == "problem"
    (message,) = Follower("/dev/zero").poll()
    assert message["op"] == "problem"


step = st.one_of(
    st.tuples(st.just("append"), st.text("ab\n", max_size=30)),
    st.tuples(st.just("cut"), st.integers(0, 60)),
    st.tuples(st.just("look"), st.just(0)),
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(step, max_size=40))
def test_after_any_appends_and_cuts_the_page_shows_the_file(
    path: Path, steps: list[tuple[str, object]]
) -> None:
    path.unlink(missing_ok=True)
    append(path, "")
    page = Page(path)
    for what, value in steps:
        if what == "append":
            append(path, str(value))
        elif what == "cut" and isinstance(value, int):
            os.truncate(path, min(value, path.stat().st_size))
        else:
            page.look()
    page.follower.recheck()
    text = path.read_text()
    expected = text.split("\n")
    assert page.look() == (expected if expected[-1] else expected[:-1])
