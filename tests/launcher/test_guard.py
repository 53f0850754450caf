"""Nobody but the page itself, opened by who has the token, gets anything out of a launcher."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import re
import shlex
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.cluster import Cluster, eventually
from tests.launcher.conftest import Launcher

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(180)]

POSTS = ["/api/preview", "/api/jobs", "/api/jobs/1/cancel", "/api/jobs/1/checkpoint", "/api/jobs/1/download"]
GETS = ["/api/facts", "/api/stream", "/api/stream?job=1"]


def jobs_of_alice(cluster: Cluster) -> set[str]:
    return set(
        cluster.on("ctl", "squeue", "--noheader", "--states=all", "--format=%i", "--user=alice").split()
    )


def known(launcher: Launcher, job_id: str) -> dict[str, object]:
    """Wait until the launcher knows a job; return what it tells of it."""
    found: dict[str, object] = {}

    def seen(event: str, data: dict[str, list[dict[str, object]]]) -> bool:
        found.update(next((row for row in data.get("rows", []) if row["id"] == job_id), {}))
        return bool(found)

    launcher.hear("since=", seen)
    return found


@pytest.fixture(scope="module")
def held_job(module_cluster: Cluster) -> Iterator[str]:
    """A job of alice's that does not start."""
    job = module_cluster.submit("true", "--hold")
    yield job.id
    job.cancel()


@pytest.mark.parametrize("token", ["", "wrong", "Ä"])
def test_without_the_token_nothing_is_told_and_nothing_done(launcher: Launcher, token: str) -> None:
    headers = (
        {"Authorization": f"Bearer {token}".encode().decode("latin-1")} if token else {"Authorization": ""}
    )
    for path in GETS:
        assert launcher.ask("GET", path, headers=headers)[0] == 401
    for path in POSTS:
        assert launcher.ask("POST", path, {}, headers=headers)[0] == 401


def test_the_token_counts_in_its_header_only(launcher: Launcher) -> None:
    elsewhere = {"Authorization": "", "Cookie": f"token={launcher.token}; outlast-token={launcher.token}"}
    assert launcher.ask("GET", f"/api/facts?token={launcher.token}", headers=elsewhere)[0] == 401
    basic = {"Authorization": f"Basic {launcher.token}"}
    assert launcher.ask("GET", "/api/facts", headers=basic)[0] == 401
    assert launcher.ask("GET", "/api/facts")[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_another_site_is_refused_even_with_the_token(launcher: Launcher, headers: dict[str, str]) -> None:
    for path in POSTS:
        assert launcher.ask("POST", path, {}, headers=headers)[0] == 403
    for path in GETS:
        assert launcher.ask("GET", path, headers=headers)[0] == 403


def test_the_page_itself_is_let_in(launcher: Launcher) -> None:
    own = {"Origin": f"http://127.0.0.1:{launcher.port}", "Sec-Fetch-Site": "same-origin"}
    assert launcher.ask("POST", "/api/preview", {}, headers=own)[0] == 200


def test_a_name_of_somebody_elses_for_this_address_is_refused(launcher: Launcher) -> None:
    for host in ("evil.example", f"evil.example:{launcher.port}", "127.0.0.1", f"127.0.0.1.:{launcher.port}"):
        assert launcher.ask("GET", "/", headers={"Host": host})[0] == 421
        assert launcher.ask("GET", "/api/facts", headers={"Host": host})[0] == 421


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_what_a_form_of_another_site_could_send_is_refused(launcher: Launcher, kind: str) -> None:
    status, _, _ = launcher.ask("POST", "/api/jobs", b"{}", headers={"Content-Type": kind or "text/plain"})
    assert status == 415


def test_no_other_origin_is_ever_allowed(launcher: Launcher) -> None:
    asks = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST", "Authorization": ""}
    status, headers, _ = launcher.ask("OPTIONS", "/api/jobs", headers=asks)
    assert status >= 400
    assert not [name for name in headers if name.startswith("access-control")]


def test_every_answer_forbids_foreign_scripts_frames_and_guesses(launcher: Launcher) -> None:
    for path in ("/", "/static/main.js", "/api/facts", "/no/such/page"):
        _, headers, _ = launcher.ask("GET", path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "set-cookie" not in headers


def test_the_page_has_no_script_or_style_of_its_own_and_asks_nobody_else(launcher: Launcher) -> None:
    page = launcher.ask("GET", "/")[2].decode()
    assert not re.search(r"<script(?![^>]*src=)|<style|\son[a-z]+=|\sstyle=|javascript:", page)
    names = re.findall(r"(?:src|href)=\"(static/[^\"]+)\"", page)
    texts = [page] + [launcher.ask("GET", f"/{name}")[2].decode() for name in {*names, "static/api.js"}]
    for text in texts:
        addresses = set(re.findall(r"https?://[^\s\"')]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize(
    "path",
    [
        "/static/../_web.py",
        "/static/..%2f_web.py",
        "/static/%2e%2e/__init__.py",
        "/static//etc/passwd",
        "/static/%00",
        "/download/..%2f..%2fetc%2fpasswd",
        "/download/",
    ],
)
def test_no_path_leads_out_of_the_pages_own_files(launcher: Launcher, path: str) -> None:
    status, _, answer = launcher.ask("GET", path)
    assert status in (404, 410)
    assert b"root:" not in answer
    assert b"import" not in answer


@pytest.mark.parametrize(
    "job", ["--help", "-w", "1;id", "1%20--me", "1%0a2", "$(id)", "alice", "..", "1.batch"]
)
def test_a_job_is_a_number_and_nothing_else(launcher: Launcher, job: str) -> None:
    assert launcher.ask("POST", f"/api/jobs/{job}/cancel", {})[0] == 404


def test_a_stream_of_what_is_no_job_is_refused(launcher: Launcher) -> None:
    for job in ("--help", "1;id", "x" * 5000):
        assert launcher.ask("GET", f"/api/stream?job={job}")[0] == 409


def test_there_is_no_action_but_those_that_are_told(launcher: Launcher, held_job: str) -> None:
    known(launcher, held_job)
    for action in ("suspend", "update", "requeue", "act", "close"):
        assert launcher.ask("POST", f"/api/jobs/{held_job}/{action}", {})[0] == 409


@pytest.mark.parametrize(
    ("action", "form"),
    [
        ("restart", {"checkpoint": "1@0.1"}),
        ("restart", {"checkpoint": "../../x@0.1"}),
        ("restart", {"checkpoint": ["1@0.1"]}),
        ("restart", {"checkpoint": "x" * 5000}),
        ("migrate", {"to": "--help"}),
        ("migrate", {"to": {"a": 1}}),
        ("migrate", {"to": "n1\nn2"}),
    ],
)
def test_what_is_no_checkpoint_or_node_of_the_job_is_refused(
    launcher: Launcher, held_job: str, action: str, form: dict[str, object]
) -> None:
    known(launcher, held_job)
    status, _, body = launcher.ask("POST", f"/api/jobs/{held_job}/{action}", form)
    assert status == 409, body


def certificate(directory: Path) -> None:
    """Write cert.pem and key.pem of a server at 127.0.0.1 into *directory*."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "launcher")])
    now = datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    kind, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (directory / "cert.pem").write_bytes(made.public_bytes(kind))
    (directory / "key.pem").write_bytes(key.private_bytes(kind, form, serialization.NoEncryption()))


def test_over_tls_it_answers_by_its_certificate_and_nothing_in_the_clear(cluster: Cluster) -> None:
    place = cluster.new_directory()
    seen = cluster.file(place)
    certificate(seen)
    running = Launcher(cluster, "--tls-cert", f"{place}/cert.pem", "--tls-key", f"{place}/key.pem")
    try:
        assert running.address.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cadata=(seen / "cert.pem").read_text())
        connection = http.client.HTTPSConnection("127.0.0.1", running.port, timeout=20, context=trusting)
        with contextlib.closing(connection):
            connection.connect()
            assert connection.sock.version() in ("TLSv1.2", "TLSv1.3")
            bearer = {"Authorization": f"Bearer {running.token}"}
            connection.request("GET", "/api/facts", headers=bearer)
            assert connection.getresponse().status == 200
        stranger = http.client.HTTPSConnection("127.0.0.1", running.port, timeout=20)
        with contextlib.closing(stranger), pytest.raises(ssl.SSLCertVerificationError):
            stranger.connect()
        plain = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
        with contextlib.closing(plain), pytest.raises((http.client.HTTPException, ConnectionError)):
            plain.request("GET", "/")
            plain.getresponse()
    finally:
        running.close()


def test_other_peoples_jobs_are_neither_shown_nor_touched(launcher: Launcher, cluster: Cluster) -> None:
    script = "#!/bin/sh\nsleep 100\n"
    said = cluster.on("ctl", "sbatch", "--parsable", "--hold", "--output=/dev/null", stdin=script)
    other = said.strip()
    try:
        own = cluster.submit("true", "--hold").id
        known(launcher, own)
        launcher.hear(
            "since=", lambda event, data: event == "jobs" and other not in [r["id"] for r in data["rows"]]
        )
        for action in ("cancel", "release", "hold", "checkpoint"):
            status, _, answer = launcher.ask("POST", f"/api/jobs/{other}/{action}", {})
            assert (status, json.loads(answer)["error"]) == (409, f"job {other}: no such job of yours")
        assert "PENDING" in cluster.on("ctl", "scontrol", "show", "job", other)
    finally:
        cluster.on("ctl", "scancel", other)


@pytest.mark.parametrize("path", ["/etc/outlast/store.key", "/etc/shadow"])
def test_a_file_that_the_user_may_not_read_is_not_read(
    launcher: Launcher, cluster: Cluster, path: str
) -> None:
    job = cluster.submit("true", "--hold", f"--output={path}")
    assert known(launcher, job.id)["output"] == path
    launcher.hear(
        f"job={job.id}",
        lambda event, data: event == "output" and data.get("text") == f"{path}: Permission denied",
    )
    ticket = launcher.tell("POST", f"/api/jobs/{job.id}/download", {"stream": "out"})["path"]
    status, _, answer = launcher.ask("GET", f"/{ticket}")
    assert (status, json.loads(answer)["error"]) == (409, f"{path}: Permission denied")
    job.cancel()


def test_a_download_is_a_file_to_keep_and_its_address_is_good_once(
    launcher: Launcher, cluster: Cluster
) -> None:
    job = cluster.submit("printf '<script>alert(1)</script>'", checkpoint=None)
    job.wait_for_end()
    known(launcher, job.id)
    ticket = launcher.tell("POST", f"/api/jobs/{job.id}/download", {"stream": "out"})["path"]
    status, headers, answer = launcher.ask("GET", f"/{ticket}", headers={"Authorization": ""})
    assert (status, answer) == (200, b"<script>alert(1)</script>")
    assert headers["content-disposition"].startswith("attachment;")
    assert headers["content-type"] == "application/octet-stream"
    assert launcher.ask("GET", f"/{ticket}")[0] == 410


def test_a_form_with_a_wrong_field_submits_nothing(launcher: Launcher, cluster: Cluster) -> None:
    before = jobs_of_alice(cluster)
    for field in ({"name": "a\n#SBATCH --uid=0"}, {"partition": "--wrap=id"}, {"time": "1 --array=1-99"}):
        status, _, answer = launcher.ask("POST", "/api/jobs", {"kind": "command", "text": "true", **field})
        assert (status, list(json.loads(answer)["fields"])) == (422, list(field))
    for body in (b"[]", b"{", b"\xff", b'"text"', b"[" * 100_000):
        assert launcher.ask("POST", "/api/jobs", body)[0] == 409
    assert jobs_of_alice(cluster) == before


@pytest.mark.parametrize(
    "name", ['a "quoted" \\name\\', "it's #1", "--help", "<b>$(id)`id`</b>", "ünïcødé 名前", "a=b,c;d|e&f"]
)
def test_any_name_and_directory_reach_the_scheduler_to_the_letter(
    launcher: Launcher, cluster: Cluster, name: str
) -> None:
    directory = f"{cluster.new_directory()}/{name.translate(dict.fromkeys(map(ord, '/' + chr(92)), '_'))}"
    cluster.on("ctl", "mkdir", "--", directory, user=True)
    form = {
        "kind": "command",
        "text": 'printf "%s" "$V"',
        "name": name,
        "directory": directory,
        "output": "o",
    }
    value = "'\"$(id) \\ é"
    job_id = launcher.tell("POST", "/api/jobs", {**form, "environment": f"V={value}"})["job"]
    row = known(launcher, job_id)
    assert (row["name"], row["directory"]) == (name, directory)
    output = cluster.file(directory) / "o"
    eventually(lambda: output.exists() and output.read_text() == value, within=30, what="the job's output")


def test_it_listens_on_loopback_as_the_user_and_is_not_told_the_token_by_its_arguments(
    launcher: Launcher, cluster: Cluster
) -> None:
    lines = cluster.on("ctl", "ss", "-Hltnp").splitlines()
    (line,) = [line for line in lines if f":{launcher.port} " in line]
    assert line.split()[3] == f"127.0.0.1:{launcher.port}"
    pid = re.search(r"pid=([0-9]+)", line)
    assert pid is not None
    assert cluster.on("ctl", "ps", "-o", "euser=", "-p", pid[1]).strip() == "alice"
    assert launcher.token not in cluster.on("ctl", "ps", "-e", "-ww", "-o", "args=")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--host 198.18.0.1", "over a network only with TLS"),
        ("--host 0.0.0.0", "name one address, not all"),
        ("--host ctl", "not an address"),
        ("--tls-key /etc/hostname", "--tls-key without --tls-cert"),
        ("--tls-cert /etc/hostname", "/etc/hostname: "),
        ("--socket /tmp/launcher.sock", "add --origin"),
        ("--origin https://a.example/path", "not an origin"),
        ("--token-file /etc/hostname", "others may read it"),
        ("--port 70000", "choose another --port"),
    ],
)
def test_what_would_let_others_in_is_refused(cluster: Cluster, options: str, said: str) -> None:
    done = cluster.try_on("ctl", "outlast", "launcher", *shlex.split(options), user=True, within=20)
    assert done.returncode not in (0, 125)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_root_is_refused(cluster: Cluster) -> None:
    done = cluster.try_on("ctl", "outlast", "launcher", within=20)
    assert (done.returncode, "must not be root" in done.stderr) == (64, True)


def test_behind_a_proxy_it_listens_at_a_socket_of_the_users_own(cluster: Cluster) -> None:
    directory = cluster.new_directory()
    script = f"""
        head -c 24 /dev/urandom | base64 > {directory}/token; chmod 600 {directory}/token
        outlast launcher --socket {directory}/s --origin https://ood.example --token-file {directory}/token &
        while [ ! -S {directory}/s ]; do sleep 0.1; done
        stat -c %a {directory}/s
        python3 - {directory} <<'END'
import http.client, pathlib, socket, sys
directory = pathlib.Path(sys.argv[1])
for host in ("ood.example", "evil.example"):
    connection = http.client.HTTPConnection("proxy")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(directory / "s"))
    token = (directory / "token").read_text().strip()
    connection.request("GET", "/api/facts", headers={{"Host": host, "Authorization": "Bearer " + token}})
    print(connection.getresponse().status)
END
        kill $!; wait $!; ls {directory}
    """
    said = cluster.on("ctl", "bash", "-c", script, user=True, within=30)
    words = f"https://ood.example/ outlast: the launcher listens at {directory}/s 600 200 421 token"
    assert sorted(said.split()) == sorted(words.split())


def test_the_stream_tells_only_what_has_changed_since_its_mark(launcher: Launcher, cluster: Cluster) -> None:
    first = cluster.submit("true", "--hold")
    known(launcher, first.id)
    marks: list[str] = []

    def filled(_: str, data: dict[str, Any]) -> bool:
        marks.append(data["mark"])
        return bool(data["rows"])

    launcher.hear("since=", filled)
    second = cluster.submit("true", "--hold")
    told: list[str] = []

    def seen(_: str, data: dict[str, list[dict[str, str]]]) -> bool:
        told.extend(row["id"] for row in data["rows"])
        return second.id in told

    launcher.hear(f"since={marks[-1]}", seen)
    assert first.id not in told


def test_the_product_has_the_pages_files_installed(cluster: Cluster) -> None:
    here = {path.name for path in (Path(__file__).parents[2] / "outlast/launcher/static").iterdir()}
    command = "ls /usr/lib/python3/dist-packages/outlast/launcher/static"
    assert set(cluster.on("ctl", "sh", "-c", command).split()) == here
