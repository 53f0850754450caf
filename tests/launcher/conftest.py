"""A launcher of alice's on the testbed's controller, a way to its loopback, and a browser to look at it."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import re
import select
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from tests.cluster import (
    Cluster,
    cluster,
    cluster_to_break,
    module_cluster,
    pytest_runtest_makereport,
    shared_cluster,
)

__all__ = ["cluster", "cluster_to_break", "module_cluster", "pytest_runtest_makereport", "shared_cluster"]

Need = Callable[[str, "str | None"], None]

_CLONE_NEWNET = 0x40000000  # linux/sched.h


class Relay:
    """Carries connections to a port of this machine's loopback over to the same port of another's.

    The other's is that of the network namespace of process *pid*. The port is the same, since the launcher
    answers only to the address that it has printed.
    """

    def __init__(self, pid: int, port: int) -> None:
        self._pid = pid
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        # A namespace is a thread's own: only this one goes there, and a socket stays where it was made.
        libc = ctypes.CDLL(None, use_errno=True)
        with (
            Path(f"/proc/{self._pid}/ns/net").open() as there,
            Path("/proc/thread-self/ns/net").open() as here,
        ):
            while True:
                try:
                    near, _ = self._listener.accept()
                except OSError:
                    return
                assert libc.setns(there.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
                far = socket.socket()
                assert libc.setns(here.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
                threading.Thread(target=self._carry, args=(near, far), daemon=True).start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        with near, far, contextlib.suppress(OSError):
            far.connect(("127.0.0.1", self._port))
            other = {near: far, far: near}
            while True:
                for ready in select.select([near, far], [], [])[0]:
                    data = ready.recv(1 << 16)
                    if not data:
                        return
                    other[ready].sendall(data)


class Launcher:
    """One `outlast launcher` on the controller, and requests to it."""

    def __init__(self, cluster: Cluster, *options: str) -> None:
        command = [str(Path(__file__).parents[2] / "scripts/testbed"), "user", "ctl", "outlast", "launcher"]
        self._process = subprocess.Popen(
            [*command, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OUTLAST_TESTBED_DIR": str(cluster.state)},
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        assert re.match(r"https?://127\.0\.0\.1:", self.address), self.address
        self.token = self.address.partition("#token=")[2]
        self.port = int(self.address.split(":")[2].split("/")[0])
        ctl = int((cluster.state / "hosts/ctl/pid").read_text().split()[0])
        self._relay = Relay(ctl, self.port)

    def close(self) -> None:
        """End it."""
        self._relay.close()
        self._process.terminate()
        self._process.wait(timeout=10)

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        token: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Send one request, with the right token unless another is given; return status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = {"Authorization": f"Bearer {self.token if token is None else token}"}
        data = None
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        sent |= headers or {}
        connection.request(
            method, path, body=data, headers={name: text for name, text in sent.items() if text}
        )
        with contextlib.closing(connection):
            answer = connection.getresponse()
            return answer.status, {name.lower(): text for name, text in answer.getheaders()}, answer.read()

    def tell(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Send one request that must succeed; return its JSON."""
        status, _, answer = self.ask(method, path, body)
        assert status < 300, (status, answer)
        return dict(json.loads(answer))

    def hear(self, query: str, until: Callable[[str, dict[str, Any]], bool], within: float = 20) -> None:
        """Follow the stream until *until*, called with each event's name and data, is true."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=within)
        with contextlib.closing(connection):
            connection.request(
                "GET", f"/api/stream?{query}", headers={"Authorization": f"Bearer {self.token}"}
            )
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            deadline, name = time.monotonic() + within, ""
            while time.monotonic() < deadline:
                line = answer.readline().decode()
                if line.startswith("event: "):
                    name = line[7:].strip()
                if line.startswith("data: ") and until(name, json.loads(line[6:])):
                    return
        pytest.fail(f"not within {within:g} s in the stream {query}")


@pytest.fixture(scope="module")
def launcher(module_cluster: Cluster) -> Iterator[Launcher]:
    """A launcher of alice's."""
    running = Launcher(module_cluster)
    yield running
    running.close()


@pytest.fixture(scope="session")
def start_browser(tmp_path_factory: pytest.TempPathFactory, need: Need) -> Callable[..., Chrome]:
    """Start a headless Chromium with a profile of its own, `dark` and so wide if asked."""
    driver, browser = shutil.which("chromedriver"), shutil.which("chromium")
    need("chromium", None if driver and browser else "no chromium; install chromium and chromium-driver")
    assert driver is not None
    assert browser is not None

    def start(*, width: int = 1440, height: int = 1000, dark: bool = False) -> Chrome:
        options = ChromeOptions()
        options.binary_location = browser
        words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        words += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        words += ["--disable-dev-shm-usage", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]
        for word in words:
            options.add_argument(word)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        page = Chrome(options=options, service=Service(driver))
        page.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        if dark:
            feature = {"name": "prefers-color-scheme", "value": "dark"}
            page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        return page

    return start


@pytest.fixture
def browser(start_browser: Callable[..., Chrome]) -> Iterator[Chrome]:
    """A browser of a desk's size; nothing may have gone wrong on its pages at the end."""
    page = start_browser()
    yield page
    log = [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]  # type: ignore[no-untyped-call]
    page.quit()
    assert log == []
