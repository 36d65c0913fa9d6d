from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest

from elman.errors import TrackingError
from elman.tracking.server import PASSWORD, serve
from support import free_port


@pytest.mark.parametrize("port", [0, 70000])
def test_a_port_that_is_none_is_refused(workplace: Path, port: int) -> None:
    with pytest.raises(TrackingError, match="--port"):
        serve(port, ready=lambda address: None)


def test_a_port_in_use_is_refused_with_another_to_try(workplace: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(TrackingError, match="is in use"):
            serve(taken.getsockname()[1], ready=lambda address: None)


@contextmanager
def running(*flags: str, end: int = signal.SIGINT, **environment: str) -> Iterator[str]:
    """A real server's address; at the end the command is ended by a signal, and nothing answers any more."""
    port = free_port()
    command = [sys.executable, "-m", "elman.cli", "ui", "--port", str(port), *flags]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line
        yield found[0]
    finally:
        server.send_signal(end)
        server.wait(timeout=30)
        server.stdout.close()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def answer(url: str, body: bytes | None = None, **headers: str) -> int:
    """Status of a request."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        error.close()
        return int(error.code)


SEARCH = "/api/2.0/mlflow/experiments/search"


@pytest.mark.slow
def test_the_ui_answers_on_this_machine_alone_and_ends_with_its_command(workplace: Path) -> None:
    with running() as address:
        with urllib.request.urlopen(address, timeout=30) as page:
            assert b"MLflow" in page.read()
        listening = {
            c.laddr.ip for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.laddr.port == int(address.rsplit(":", 1)[1])
        }  # fmt: skip
        assert listening == {"127.0.0.1"}
        body = b'{"max_results": 5}'
        assert answer(address + SEARCH, body) == 200
        assert answer(address + SEARCH, body, Host="evil.example") == 403
        assert answer(address + SEARCH, body, Origin="http://evil.example") == 403
        job = b'{"job_name": "invoke_scorer", "params": {}}'
        request = urllib.request.Request(f"{address}/ajax-api/3.0/jobs/", job, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(request, timeout=30)
        with refusal.value as error:
            assert b"MLFLOW_SERVER_ENABLE_JOB_EXECUTION" in error.read()
    with closing(sqlite3.connect(workplace / "mlruns" / "mlflow.db")) as database:
        assert database.execute("SELECT count(*) FROM jobs").fetchone() == (0,)


@pytest.mark.parametrize("password", [None, "", "short"])
def test_a_team_server_has_no_default_password(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, password: str | None
) -> None:
    monkeypatch.delenv(PASSWORD, raising=False)
    if password is not None:
        monkeypatch.setenv(PASSWORD, password)
    with pytest.raises(TrackingError, match=PASSWORD):
        serve(free_port(), ready=lambda address: None, team=True)
    assert not (workplace / "mlruns" / "auth.ini").exists()


@pytest.mark.slow
def test_a_team_server_lets_nobody_in_without_the_password(workplace: Path) -> None:
    password = "correct horse battery"
    with running("--team", end=signal.SIGTERM, **{PASSWORD: password}) as address:
        body = b'{"max_results": 5}'
        assert answer(address + SEARCH, body) == 401
        for given, status in ((password, 200), ("password1234", 401)):
            token = b64encode(f"admin:{given}".encode()).decode()
            assert answer(address + SEARCH, body, Authorization=f"Basic {token}") == status
    written = [path.read_bytes() for path in (workplace / "mlruns").rglob("*") if path.is_file()]
    assert not any(password.encode() in content for content in written)
