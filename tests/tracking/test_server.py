from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from elman.errors import TrackingError
from elman.tracking.server import serve


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


@pytest.mark.slow
def test_the_ui_answers_on_this_machine_alone_and_ends_with_its_command(workplace: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "elman.cli", "ui", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line
        with urllib.request.urlopen(found[0], timeout=30) as answer:
            assert b"MLflow" in answer.read()
        page = f"{found[0]}/api/2.0/mlflow/experiments/search"
        foreign = urllib.request.Request(page, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(foreign, timeout=30)
        assert refusal.value.code == 403
        refusal.value.close()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
        assert server.stdout is not None
        server.stdout.close()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
