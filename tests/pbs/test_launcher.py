"""The launcher on PBS, as its page speaks to it: submit, watch, hold, release."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import eventually
from tests.pbs.conftest import Pbs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

SOCKET = "/shared/alice/launcher.sock"
TOKEN = "0123456789abcdef0123456789abcdef"  # noqa: S105 - of this test's launcher alone
ORIGIN = "https://launcher.example.org"
# Speaks HTTP to a socket; prints the answer, of a stream what comes within some seconds.
CLIENT = """
import http.client, json, socket, sys, time
method, path, body, seconds = sys.argv[1:]
connection = http.client.HTTPConnection("launcher.example.org")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect("SOCKET")
connection.sock.settimeout(float(seconds))
headers = {"Authorization": "Bearer TOKEN", "Content-Type": "application/json"}
connection.request(method, path, body or None, headers)
answer = connection.getresponse()
until = time.monotonic() + float(seconds)
try:
    while time.monotonic() < until and (text := answer.read1(65536)):
        sys.stdout.write(text.decode())
except TimeoutError:
    pass
sys.exit(answer.status >= 400)
"""


class Page:
    """What a browser of alice's would ask the launcher for."""

    def __init__(self, pbs: Pbs) -> None:
        self.pbs = pbs

    def ask(self, method: str, path: str, body: object = None, seconds: float = 30) -> str:
        """Return the answer's text; it must be no error."""
        program = CLIENT.replace("SOCKET", SOCKET).replace("TOKEN", TOKEN)
        text = "" if body is None else json.dumps(body)
        return self.pbs.on("ctl", "python3", "-c", program, method, path, text, str(seconds), user=True)

    def told(self, job: str) -> str:
        """What the page is told of *job* within two seconds."""
        return self.ask("GET", f"/api/stream?job={job}", seconds=2)

    def row(self, job: str) -> dict[str, Any]:
        """The job's row in the panel of jobs."""
        for line in self.told(job).splitlines():
            if line.startswith("data:") and '"rows"' in line:
                rows = json.loads(line.removeprefix("data:"))["rows"]
                found = [row for row in rows if row["id"] == job]
                if found:
                    return dict(found[0])
        return {}


@pytest.fixture
def page(pbs: Pbs) -> Iterator[Page]:
    """A launcher of alice's on the controller."""
    pbs.on("ctl", "sh", "-c", f"umask 077; echo {TOKEN} > ~/launcher.token", user=True)
    command = (
        f"outlast launcher --socket {SOCKET} --origin {ORIGIN} --token-file /shared/alice/launcher.token"
    )
    path = "PATH=/usr/local/bin:/opt/pbs/bin:/usr/bin:/bin"
    script = f"{path} setsid {command} </dev/null >~/launcher.log 2>&1 & echo $!"
    pid = pbs.on("ctl", "sh", "-c", script, user=True).strip()
    page = Page(pbs)

    def answers() -> bool:
        client = CLIENT.replace("SOCKET", SOCKET).replace("TOKEN", TOKEN)
        return (
            pbs.try_on("ctl", "python3", "-c", client, "GET", "/api/facts", "", "5", user=True).returncode
            == 0
        )

    try:
        eventually(
            answers, within=40, what=f"a launcher: {pbs.file('/shared/alice/launcher.log').read_text()}"
        )
        yield page
    finally:
        pbs.on("ctl", "kill", pid)


def test_a_job_is_submitted_watched_held_and_released_from_the_page(page: Page) -> None:
    facts = json.loads(page.ask("GET", "/api/facts"))
    assert "workq" in [one["name"] for one in facts["partitions"]]
    directory = page.pbs.new_directory()
    form = {
        "kind": "command",
        "text": "for i in $(seq 400); do echo tick $i; sleep 0.2; done",
        "name": "from the page",
        "interval": "1h",
        "directory": directory,
        "output": "out",
        "time": "30",
        "cpus": "1",
    }
    assert "#PBS -v OUTLAST_INTERVAL=1h" in json.loads(page.ask("POST", "/api/preview", form))["script"]
    job = json.loads(page.ask("POST", "/api/jobs", form))["job"]
    eventually(lambda: page.row(job).get("kind") == "running", within=60, what=f"{job} to run")
    # Live: the output is at its own place while the job runs, not in MoM's spool.
    eventually(lambda: "tick 5" in page.told(job), within=60, what="its output on the page")
    assert page.row(job)["name"] == "from_the_page"
    page.ask("POST", f"/api/jobs/{job}/hold", {})
    eventually(
        lambda: page.row(job).get("kind") == "held", within=90, what=f"{job} to be held: {page.row(job)}"
    )
    held = page.pbs.file(f"{directory}/out").read_text().splitlines()
    page.ask("POST", f"/api/jobs/{job}/release", {})
    page.pbs.pbs("qmgr", "-c", "set server scheduling = true")

    def goes_on() -> bool:
        page.pbs.pbs("qmgr", "-c", "set server scheduling = true")
        return len(page.pbs.file(f"{directory}/out").read_text().splitlines()) > len(held) + 5

    eventually(goes_on, within=90, what="more of its output")
    lines = page.pbs.file(f"{directory}/out").read_text().splitlines()
    assert lines == [f"tick {number}" for number in range(1, len(lines) + 1)]
    page.ask("POST", f"/api/jobs/{job}/cancel", {})
    eventually(lambda: page.row(job).get("kind") == "ended", within=60, what=f"{job} to end: {page.row(job)}")
