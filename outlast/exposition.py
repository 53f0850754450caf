"""Figures as Prometheus reads them, and a socket to read them from.

Source of the format: Prometheus, docs/instrumenting/exposition_formats.md, "Text-based format", version 0.0.4.
"""

from __future__ import annotations

import dataclasses
import http.server
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclasses.dataclass(frozen=True)
class Family:
    """All samples of one name. *kind* is "gauge" or "counter"; the names of counters end in _total."""

    name: str
    kind: str
    help: str
    samples: Sequence[tuple[Mapping[str, str], float]]


def render(families: Iterable[Family]) -> str:
    """Return the text of *families*; those without samples are left out."""
    return "".join(f"{line}\n" for family in families if family.samples for line in _lines(family))


def _lines(family: Family) -> Iterator[str]:
    yield f"# HELP {family.name} {family.help}"
    yield f"# TYPE {family.name} {family.kind}"
    for labels, value in family.samples:
        inner = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
        yield f"{family.name}{{{inner}}} {value!r}" if inner else f"{family.name} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of "HOST:PORT". Raises ValueError: it is none."""
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 65536):
        raise ValueError(f'"{text}": must be an address and a port: "127.0.0.1:9469"')
    return host.strip("[]"), int(port)


def serve(address: str, read: Callable[[], str]) -> Callable[[], None]:
    """Answer GET /metrics at *address* with what *read* returns, in a thread; return what ends it.

    Raises:
        OSError: nothing can listen there.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10  # seconds that a client may be silent

        def do_GET(self) -> None:
            """Answer."""
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, "there is only /metrics")
                return
            body = read().encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say it where the rest is said."""
            log.debug("metrics: " + format, *args)  # noqa: G003

    server = http.server.ThreadingHTTPServer(parse_address(address), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()

    def end() -> None:
        server.shutdown()
        server.server_close()

    return end
