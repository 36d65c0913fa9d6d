"""optuna-dashboard on the studies, for this machine alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

from elman.errors import TrackingError
from elman.search.storage import default_storage, open_storage
from elman.tracking.server import HOST, refuse_port, run_server


def serve_dashboard(storage: str | None, port: int, ready: Callable[[str], None]) -> int:
    """Serve until interrupted; ``ready`` is told the address once it answers.

    Raises:
        TrackingError: The port is taken, or there is no such storage.
    """
    refuse_port(port)
    url = storage or default_storage()
    if url.startswith("grpc://"):
        raise TrackingError(f"--storage {url} is a proxy, which optuna-dashboard cannot read: name its database.")
    open_storage(url)  # its tables exist before the server looks
    command = [sys.executable, "-c", "from optuna_dashboard._cli import main; main()"]
    command += ["--host", HOST, "--port", str(port)]
    if url.startswith("journal:"):
        command += ["--storage-class", "JournalFileStorage", url.removeprefix("journal:")]
    else:
        url = re.sub(r"^postgresql://", "postgresql+psycopg://", url)
        command += ["--storage-class", "RDBStorage", re.sub(r"^mysql://", "mysql+pymysql://", url)]
    return run_server("optuna-dashboard", command, {}, f"http://{HOST}:{port}", f"http://{HOST}:{port}/", ready)


