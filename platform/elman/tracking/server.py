"""The MLflow UI on the local store: for this machine alone, or for a team, with passwords."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

from elman.config.schema import TrackingConfig
from elman.errors import TrackingError
from elman.tracking.local import local_root
from elman.tracking.store import RunStore

HOST = "127.0.0.1"
START_SECONDS = 120
PASSWORD, SECRET = "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"
SHORTEST_PASSWORD = 12


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def serve(port: int, ready: Callable[[str], None], *, team: bool = False) -> int:
    """Serve until interrupted; ``ready`` is told the address once it answers.

    One worker and no job runner: a default server starts fifteen processes for one reader.

    Args:
        port: On this machine's own address. Others come to it through a proxy that speaks TLS or
            through ssh, for passwords would cross the network in the clear.
        ready: See above.
        team: Ask everyone for a password, and pass the artifacts through, for those who
            do not share this disk.

    Raises:
        TrackingError: The port is taken, no password is given to a team's server, or it does not come up.
    """
    refuse_port(port)
    extra, environment = _team() if team else ([*_ARTIFACTS_DIRECTLY, str(local_root() / "artifacts")], {})
    uri = f"sqlite:///{local_root() / 'mlflow.db'}"
    RunStore(TrackingConfig(uri=uri))  # the tables exist before the server looks
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", HOST, "--port", str(port),
        "--workers", "1", *extra,
    ]  # fmt: skip
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **environment}
    address = f"http://{HOST}:{port}"
    return run_server("the MLflow server", command, environment, address, f"{address}/health", ready)


_ARTIFACTS_DIRECTLY = ("--no-serve-artifacts", "--default-artifact-root")


def _team() -> tuple[list[str], dict[str, str]]:
    """What MLflow's server is told, on its command line and by environment, for it to ask for passwords."""
    if find_spec("flask_wtf") is None:
        raise TrackingError("--team needs MLflow's authentication: pip install 'elman[team]'.")
    if len(os.environ.get(PASSWORD, "")) < SHORTEST_PASSWORD:
        raise TrackingError(
            f"--team needs {PASSWORD} in the environment, {SHORTEST_PASSWORD} characters or more: there is no default."
        )
    settings = local_root() / "auth.ini"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{local_root() / 'auth.db'}\n"
        "admin_username = admin\nauthorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environment = {"MLFLOW_AUTH_CONFIG_PATH": str(settings), SECRET: os.environ.get(SECRET) or secrets.token_hex(32)}
    artifacts = ["--artifacts-destination", str(local_root() / "artifacts")]
    return ["--app-name", "basic-auth", "--serve-artifacts", *artifacts], environment


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
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the server would outlive us
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
        signal.signal(signal.SIGTERM, before)


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
