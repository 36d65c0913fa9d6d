"""The MLflow UI on the local store, for this machine alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence

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
    refuse_port(port)
    uri = f"sqlite:///{local_root() / 'mlflow.db'}"
    RunStore(TrackingConfig(uri=uri))  # the tables exist before the server looks
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--no-serve-artifacts",
        "--default-artifact-root", str(local_root() / "artifacts"), "--host", HOST, "--port", str(port),
        "--workers", "1",
    ]  # fmt: skip
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    address = f"http://{HOST}:{port}"
    return run_server("the MLflow server", command, environment, address, f"{address}/health", ready)


def refuse_port(port: int) -> None:
    """Refuse a port that does not exist, or that somebody else listens on.

    Raises:
        TrackingError: It is such a one.
    """
    if not 0 < port < 65536:
        raise TrackingError(f"--port must be from 1 to 65535, got {port}.")
    if not _is_free(port):
        raise TrackingError(f"--port {port} is in use: end what uses it, or choose another, such as --port {port + 1}.")


def run_server(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    address: str,
    health: str,
    ready: Callable[[str], None],
) -> int:
    """Run a server until it ends or we are interrupted; ``ready`` is told the address once ``health`` answers.

    Raises:
        TrackingError: It does not come up.
    """
    server = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        _wait(server, name, health)
        ready(address)
        return server.wait()
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=20)


def _wait(server: subprocess.Popen[bytes], name: str, url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise TrackingError(f"{name} ended at once with code {server.returncode}: does another one run?")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise TrackingError(f"{name} did not answer at {url} within {START_SECONDS} s.")
