"""The MLflow UI on the local store, for this machine alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable

from elman.config.schema import TrackingConfig
from elman.errors import TrackingError
from elman.tracking.store import RunStore, local_root

HOST = "127.0.0.1"
START_SECONDS = 120


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def serve(port: int, ready: Callable[[str], None]) -> int:
    """Serve until interrupted; ``ready`` is told the address once it answers.

    One worker and no job runner: a default server starts fifteen processes for one reader.

    Raises:
        TrackingError: The port is taken, or the server does not come up.
    """
    if not 0 < port < 65536:
        raise TrackingError(f"--port must be from 1 to 65535, got {port}.")
    if not _is_free(port):
        raise TrackingError(f"--port {port} is in use: end what uses it, or choose another, such as --port {port + 1}.")
    uri = f"sqlite:///{local_root() / 'mlflow.db'}"
    RunStore(TrackingConfig(uri=uri))  # the tables exist before the server looks
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--no-serve-artifacts",
        "--default-artifact-root", str(local_root() / "artifacts"), "--host", HOST, "--port", str(port),
        "--workers", "1",
    ]  # fmt: skip
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        address = f"http://{HOST}:{port}"
        _wait(server, f"{address}/health")
        ready(address)
        return server.wait()
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=20)


def _wait(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise TrackingError(f"The MLflow server ended at once with code {server.returncode}: does another one run?")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise TrackingError(f"The MLflow server did not answer at {url} within {START_SECONDS} s.")
