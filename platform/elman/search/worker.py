"""A worker: a process that trains one trial after the other, warm from the first.

It is spawned, not forked: database clients and torch's threads do not survive a fork. What
takes seconds (a new interpreter, importing torch) is paid once, and the driver prepares
meanwhile. It speaks to whoever started it through a pipe, and dies with it.
"""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing.connection import Connection
from typing import Any

from elman.config.schema import TrackingConfig


def work(pipe: Connection, threads: int, gpu: int | None, tracking: TrackingConfig) -> None:
    """Serve, as a process of its own.

    Args:
        pipe: See ``serve``.
        threads: This worker's share of the cores.
        gpu: The GPU that is this worker's; None takes none.
        tracking: Where trials are recorded.
    """
    _leave_the_terminal()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    serve(pipe, tracking)


def serve(pipe: Connection, tracking: TrackingConfig) -> None:
    """Train what comes through the pipe, until None comes or it closes.

    Args:
        pipe: Brings Jobs; takes ("ready", pid), ("report", step, value), ("outcome", Outcome) and ("free", None).
            A report and an outcome are answered by a bool: whether to prune, whether to keep the checkpoint.
        tracking: Where trials are recorded.
    """
    from elman.search.storage import PATIENCE_SECONDS
    from elman.search.trial import Job, Outcome, run_trial
    from elman.tracking.store import RunStore, warm

    warm()
    store: RunStore | None = None

    def report(step: int, value: float) -> bool:
        pipe.send(("report", step, value))
        return bool(pipe.recv())

    def settle(outcome: Outcome) -> bool:
        pipe.send(("outcome", outcome))
        return bool(pipe.recv())

    try:
        pipe.send(("ready", os.getpid()))
        while True:
            job: Job | None = pipe.recv()
            if job is None:
                return
            # Not before: a search that is refused leaves no store behind.
            store = store or RunStore(tracking, patience=PATIENCE_SECONDS)
            run_trial(job, store, report, settle)
            pipe.send(("free", None))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the driver is gone


def _leave_the_terminal() -> None:
    """Ctrl-C is the driver's to hear; and nobody trains for a driver that is dead."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from multiprocessing import parent_process

    parent: Any = parent_process()

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    if parent is not None:
        threading.Thread(target=watch, name="parent", daemon=True).start()
