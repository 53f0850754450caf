"""Draws a job's history: a lane per node, and on it runs, pauses, uploads, failures and restarts.

SVG and HTML are written here; PNG is drawn by matplotlib, where that is installed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from html import escape
from pathlib import Path

from outlast.errors import OutlastError, UsageError
from outlast.terminal import size
from outlast.timeline import Cost, History, Run

_WIDTH, _LEFT, _RIGHT, _TOP, _LANE = 960, 90, 24, 58, 46
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
_TICKS = 9
_BAR = 20

# Colors that differ in lightness too, for who cannot tell red from green; those of the launcher's page.
_COLORS = {
    "ink": "#1b2430",
    "muted": "#5b6675",
    "paper": "#ffffff",
    "grid": "#e3e7ec",
    "run": "#7fb2e5",
    "again": "#c96b2c",
    "pause": "#123a63",
    "upload": "#2f9c83",
    "failure": "#b3261e",
    "restart": "#5b6675",
}
_DARK = {"ink": "#e8edf3", "muted": "#9fabb9", "paper": "#12161c", "grid": "#2a323c", "run": "#3d76ad"}
_DARK |= {
    "again": "#f0a060",
    "pause": "#e8edf3",
    "upload": "#5fd0b4",
    "failure": "#ff8a80",
    "restart": "#9fabb9",
}


def plot(history: History, path: Path) -> None:
    """Draw *history* into *path*; its ending says how: .svg, .html or .png.

    Raises:
        UsageError: another ending, or there is nothing to be drawn.
        OutlastError: the file cannot be written, or matplotlib is missing.
    """
    kinds: dict[str, Callable[[History], bytes]] = {".svg": _svg_file, ".html": _html_file, ".png": _png_file}
    if path.suffix.lower() not in kinds:
        raise UsageError(f"{path}: not a kind of picture", hint="its name must end in .svg, .html or .png")
    if not history.runs:
        raise UsageError(f"job {history.job}: has not run yet", hint="there is nothing to be drawn")
    data = kinds[path.suffix.lower()](history)
    try:
        path.write_bytes(data)
    except OSError as error:
        raise OutlastError(f"{path}: {error.strerror}") from None


def cost_lines(cost: Cost) -> list[tuple[str, str]]:
    """Return what there is to say of *cost*, as names and texts for people."""
    share = f" ({100 * cost.pause_s / cost.run_s:.2f} %)" if cost.run_s else ""
    image = size(cost.image_bytes)
    failed = f", {cost.failed} failed" if cost.failed else ""
    return [
        ("elapsed", f"{span(cost.elapsed_s)}: {span(cost.run_s)} on a node, {span(cost.down_s)} between runs"),
        ("checkpoints", f"{cost.checkpoints}{failed}; image {image}, in all {size(cost.shipped_bytes)} shipped"),
        ("stood still", f"{span(cost.pause_s)}{share}; uploads took {span(cost.upload_s)} while it ran"),
        ("restarts", f"{cost.restarts}; {span(cost.restore_s)} to fetch and restore"),
        ("computed again", span(cost.again_s)),
        ("saved", f"{span(cost.saved_s)} that did not have to be computed again"),
    ]  # fmt: skip


def span(seconds: float) -> str:
    """Return a length of time in words short enough for a label."""
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s".replace(".0 ", " ")
    if seconds < 120:
        return f"{seconds:.0f} s"
    for unit, length, below in (("min", 60, 7200), ("h", 3600, 172800), ("d", 86400, float("inf"))):
        if seconds < below:
            return f"{seconds / length:.1f} {unit}".replace(".0 ", " ")
    raise AssertionError


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().strftime("%H:%M:%S")


def _how(run: Run) -> str:
    return {"running": "runs", "lost": "was lost", "unknown": "not known how it ended"}.get(run.how, run.how)


def _ticks(begin: float, end: float) -> Iterator[tuple[float, str]]:
    length = end - begin
    step = next((one for one in _STEPS if length / one <= _TICKS), max(_STEPS[-1], round(length / _TICKS)))
    at = 0
    while at <= length:
        yield begin + at, f"+{span(at)}" if at else _clock(begin)
        at += step


class _Drawing:
    """The SVG of one history, in a frame `_WIDTH` wide."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._begin, self._end = history.begin, history.end
        self.bottom = _TOP + _LANE * len(history.nodes)
        self.height = self.bottom + 30 + 20 + 16 * 6 + 16
        self._parts: list[str] = []

    def text(self) -> str:
        """Return the whole SVG element."""
        history = self._history
        cost = history.cost
        title = (
            f"Job {history.job}: {len(history.runs)} runs on {', '.join(history.nodes)}; "
            f"{cost.checkpoints} checkpoints; {cost.restarts} restarts; {len(history.failures)} failures; "
            f"{span(self._end - self._begin)} in all"
        )
        self._axis()
        for index, run in enumerate(history.runs):
            self._run(run, history.runs[index + 1] if index + 1 < len(history.runs) else None)
        self._checkpoints()
        for one in history.failures:
            self._failure(one.time, one.node, f"{_clock(one.time)} {one.event}: {one.text}")
        self._legend()
        self._cost()
        style = "".join(f".{name}{{--c:{color}}}" for name, color in _COLORS.items())
        dark = "".join(f".{name}{{--c:{color}}}" for name, color in _DARK.items())
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {self.height}" width="{_WIDTH}" '
            f'height="{self.height}" role="img" aria-label="{escape(title)}" font-family="sans-serif" '
            f'font-size="12"><title>{escape(title)}</title><style>{style}'
            ".f{fill:var(--c)}.s{stroke:var(--c);fill:none}"
            f"@media(prefers-color-scheme:dark){{{dark}}}</style>"
            '<defs><pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><rect width="2.5" height="6" class="again f"/></pattern></defs>'
            f'<rect width="{_WIDTH}" height="{self.height}" class="paper f"/>'
            f'<text x="16" y="26" font-size="16" font-weight="bold" class="ink f">Job {escape(history.job)}</text>'
            + "".join(self._parts)
            + "</svg>\n"
        )

    def _x(self, at: float) -> float:
        share = (min(self._end, max(self._begin, at)) - self._begin) / (self._end - self._begin)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 2)

    def _y(self, node: str) -> int:
        return _TOP + _LANE * self._history.nodes.index(node)

    def _add(self, element: str, title: str = "") -> None:
        """Add an element, written without its end, and what is shown of it under the pointer."""
        name = element.split()[0]
        self._parts.append(
            f"<{element}><title>{escape(title)}</title></{name}>" if title else f"<{element}/>"
        )

    def _label(self, x: float, y: float, text: str, kind: str = "muted", anchor: str = "start") -> None:
        self._parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{kind} f">{escape(text)}</text>'
        )

    def _axis(self) -> None:
        for at, text in _ticks(self._begin, self._end):
            x = self._x(at)
            self._add(f'line x1="{x}" x2="{x}" y1="{_TOP - 8}" y2="{self.bottom}" class="grid s"')
            self._label(x, self.bottom + 16, text, anchor="middle" if at > self._begin else "start")
        for node in self._history.nodes:
            y = self._y(node) + _BAR / 2
            self._label(
                _LEFT - 10, y + 4, node if len(node) < 13 else node[:11] + "…", kind="ink", anchor="end"
            )
            self._add(f'line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" class="grid s"')

    def _run(self, run: Run, following: Run | None) -> None:
        x1, y = self._x(run.start), self._y(run.node)
        x2 = max(x1 + 2, self._x(run.end))
        origin = f"from {run.origin}, " if run.origin else ""
        when = f"{_clock(run.start)} to {_clock(run.end)} ({span(run.end - run.start)})"
        what = f"{run.node}, {when}: {origin}{_how(run)}"
        self._add(f'rect x="{x1}" y="{y}" width="{x2 - x1:.2f}" height="{_BAR}" rx="3" class="run f"', what)
        if run.again is not None:
            x = self._x(run.again)
            self._add(
                f'rect x="{x}" y="{y}" width="{max(1.0, x2 - x):.2f}" height="{_BAR}" fill="url(#hatch)"',
                f"{span(run.end - run.again)} computed again",
            )
        if following is None:
            return
        to, down = self._x(following.start), self._y(following.node) + _BAR / 2
        bend = max(14.0, (to - x2) / 2)
        middle = y + _BAR / 2
        self._add(
            f'path d="M{x2},{middle} C{x2 + bend},{middle} {to - bend},{down} {to},{down}" '
            'stroke-width="1.5" stroke-dasharray="5 3" class="restart s"',
            f"{span(following.start - run.end)} until it ran again on {following.node}",
        )
        self._add(f'circle cx="{to}" cy="{down}" r="3.5" class="restart f"')

    def _checkpoints(self) -> None:
        last = -1.0
        for one in self._history.checkpoints:
            if one.node not in self._history.nodes:
                continue
            x, y = self._x(one.begin), self._y(one.node)
            if abs(x - last) < 1:
                continue  # more than one in a pixel are drawn as one
            last = x
            up, done = self._x(one.end - one.upload_s), self._x(one.end)
            self._add(
                f'rect x="{up}" y="{y + _BAR + 4}" width="{max(1.5, done - up):.2f}" height="4" class="upload f"',
                f"{one.name}: {size(one.stored_bytes)} shipped in {span(one.upload_s)}",
            )
            wide = max(2.0, self._x(one.begin + one.pause_s) - x)
            self._add(
                f'rect x="{x}" y="{y - 4}" width="{wide:.2f}" height="{_BAR + 8}" class="pause f"',
                f"{one.name} at {_clock(one.begin)}: stood still for {1000 * one.pause_s:.0f} ms",
            )

    def _failure(self, at: float, node: str, title: str) -> None:
        x = self._x(at)
        y = self._y(node) + _BAR / 2 if node in self._history.nodes else _TOP
        self._parts.append(
            f'<g><title>{escape(title)}</title><circle cx="{x}" cy="{y}" r="8" class="failure f"/>'
            f'<path d="M{x - 3.5},{y - 3.5}l7,7m0,-7l-7,7" stroke-width="2" class="paper s"/></g>'
        )

    def _legend(self) -> None:
        x = 150
        for kind, text in (
            ("run", "runs"),
            ("again", "computed again"),
            ("pause", "checkpoint (pause)"),
            ("upload", "upload"),
            ("failure", "failure"),
            ("restart", "restart"),
        ):
            if kind == "restart":
                mark = f'<path d="M{x},21h22" stroke-width="1.5" stroke-dasharray="5 3" class="restart s"/>'
            elif kind == "failure":
                mark = f'<circle cx="{x + 15}" cy="21" r="6" class="failure f"/>'
            else:
                wide, tall = {"pause": (3, 16), "upload": (18, 4)}.get(kind, (18, 12))
                fill = 'fill="url(#hatch)"' if kind == "again" else f'class="{kind} f"'
                mark = (
                    f'<rect x="{x + 22 - wide}" y="{21 - tall / 2}" width="{wide}" height="{tall}" {fill}/>'
                )
            self._parts.append(mark)
            self._label(x + 28, 25, text)
            x += 46 + 7 * len(text)

    def _cost(self) -> None:
        for index, (name, text) in enumerate(cost_lines(self._history.cost)):
            y = self.bottom + 54 + 16 * index
            self._label(_LEFT + 20, y, name, kind="ink", anchor="end")
            self._label(_LEFT + 32, y, text)


def svg(history: History) -> str:
    """Return *history* as an SVG picture."""
    return _Drawing(history).text()


def _svg_file(history: History) -> bytes:
    return svg(history).encode()


def _html_file(history: History) -> bytes:
    """Return a page with the picture, and all that it shows as tables."""
    runs = [
        (run.node, _clock(run.start), _clock(run.end), run.origin or "its start", _how(run))
        for run in history.runs
    ]
    checkpoints = [
        (
            *(one.name, one.node, _clock(one.begin), f"{1000 * one.pause_s:.0f} ms"),
            *(span(one.upload_s), size(one.stored_bytes)),
        )
        for one in history.checkpoints
    ]
    failures = [(_clock(one.time), one.node, one.event, one.text) for one in history.failures]
    tables = (
        _table("Runs", ("Node", "From", "Until", "Began with", "Ended"), runs)
        + _table("Checkpoints", ("Name", "Node", "Begun", "Pause", "Upload", "Shipped"), checkpoints)
        + _table("Failures", ("Time", "Node", "What", "Why"), failures)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Job {escape(history.job)}</title><style>:root{{color-scheme:light dark}}"
        "body{font:14px sans-serif;max-width:1000px;margin:2em auto;padding:0 1em}svg{max-width:100%;height:auto}"
        "table{border-collapse:collapse}th,td{text-align:left;padding:2px 14px 2px 0;vertical-align:top}"
        "</style></head>"
        f"<body>{svg(history)}{tables}</body></html>\n"
    ).encode()


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    titles = "".join(f"<th scope=col>{escape(word)}</th>" for word in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<h2>{title}</h2><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _png_file(history: History) -> bytes:
    """Return the picture as PNG, drawn by matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise OutlastError(
            "PNG pictures are drawn by matplotlib, which is not installed",
            hint="install python3-matplotlib (pip: outlast[plot]), or name a file that ends in .svg or .html",
        ) from None
    mpl.use("Agg")
    from matplotlib import pyplot

    nodes, begin = history.nodes, history.begin
    figure, axes = pyplot.subplots(figsize=(11, 2.6 + 0.6 * len(nodes)), dpi=110)
    lane = {node: len(nodes) - 1 - index for index, node in enumerate(nodes)}
    for index, run in enumerate(history.runs):
        y = lane[run.node]
        axes.barh(y, run.end - run.start, left=run.start - begin, height=0.4, color=_COLORS["run"])
        if run.again is not None:
            axes.barh(
                y, run.end - run.again, left=run.again - begin, height=0.4,
                facecolor="none", edgecolor=_COLORS["again"], hatch="////", linewidth=0,
            )  # fmt: skip
        if index + 1 < len(history.runs):
            following = history.runs[index + 1]
            axes.annotate(
                "", (following.start - begin, lane[following.node]), (run.end - begin, y),
                arrowprops={"arrowstyle": "->", "linestyle": "--", "color": _COLORS["restart"]},
            )  # fmt: skip
    for one in history.checkpoints:
        if one.node in lane:
            y, at = lane[one.node], one.begin - begin
            axes.vlines(at, y - 0.28, y + 0.28, color=_COLORS["pause"], linewidth=1.5)
            axes.hlines(
                y - 0.33,
                one.end - one.upload_s - begin,
                one.end - begin,
                color=_COLORS["upload"],
                linewidth=3,
            )
    for failure in history.failures:
        if failure.node in lane:
            axes.plot(failure.time - begin, lane[failure.node], "X", color=_COLORS["failure"], markersize=11)
    axes.set_yticks([lane[node] for node in nodes], nodes)
    axes.set_ylim(-0.7, len(nodes) - 0.3)
    axes.set_xlim(0, history.end - begin)
    axes.set_xlabel(f"seconds since {datetime.fromtimestamp(begin).astimezone():%Y-%m-%d %H:%M:%S}")
    axes.set_title(f"Job {history.job}", loc="left", fontweight="bold")
    facts = "\n".join(f"{name}: {text}" for name, text in cost_lines(history.cost))
    figure.text(0.01, 0.01, facts, fontsize=8, va="bottom")
    figure.tight_layout(rect=(0, 0.22, 1, 1))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Description": f"the history of job {history.job}"})
    pyplot.close(figure)
    return picture.getvalue()
