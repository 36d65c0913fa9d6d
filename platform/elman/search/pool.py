"""The workers of one machine, and their share of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from elman.config.schema import TrackingConfig
from elman.search.trial import Job
from elman.search.worker import work
from elman.tasks.hardware import cores

LAST_WORDS_SECONDS = 20.0
"""What a worker that is told to stop has for ending its step and its run."""


@dataclass
class Seat:
    """A place where one trial at a time is trained.

    Attributes:
        job: What it trains now.
        ready: Whether it has come up.
    """

    process: BaseProcess
    pipe: Connection
    index: int
    job: Job | None = None
    ready: bool = False

    def send(self, job: Job) -> None:
        """Give it a trial; a worker that has just died is found out by the next wait."""
        self.job = job
        self.answer(job)

    def answer(self, value: Any) -> None:
        """Answer what it asked."""
        try:
            self.pipe.send(value)
        except (BrokenPipeError, OSError):
            return


class Pool:
    """Workers, each a spawned process with its share of the cores, or a GPU of its own.

    Args:
        size: How many.
        threads: Of each; None divides the cores.
        tracking: Where they record.
        gpus: GPUs of this machine.
    """

    def __init__(self, size: int, threads: int | None, tracking: TrackingConfig, gpus: int = 0) -> None:
        self._context = multiprocessing.get_context("spawn")
        self.threads = threads or max(1, cores() // size)
        self._tracking, self._gpus = tracking, gpus
        self.seats = [self._spawn(index) for index in range(size)]

    def _spawn(self, index: int) -> Seat:
        here, there = self._context.Pipe()
        gpu = index % self._gpus if self._gpus else None
        process = self._context.Process(
            target=work, args=(there, self.threads, gpu, self._tracking), name=f"worker-{index}", daemon=True
        )
        process.start()
        there.close()  # or its end would never be noticed
        return Seat(process, here, index)

    def replace(self, seat: Seat) -> None:
        """Put a new worker in the place of a dead one."""
        self._bury(seat)
        self.seats[self.seats.index(seat)] = self._spawn(seat.index)

    def messages(self, timeout: float) -> list[tuple[Seat, tuple[str, Any] | None]]:
        """What the workers say within so many seconds; None from one that is gone."""
        by_pipe = {seat.pipe: seat for seat in self.seats}
        said: list[tuple[Seat, tuple[str, Any] | None]] = []
        for pipe in wait(list(by_pipe), timeout):
            assert isinstance(pipe, Connection)
            try:
                kind, *rest = pipe.recv()
                said.append((by_pipe[pipe], (kind, rest[0] if len(rest) == 1 else tuple(rest))))
            except (EOFError, OSError):
                said.append((by_pipe[pipe], None))
        return said

    def stop(self) -> None:
        """Ask every worker that trains to end its step and its run."""
        for seat in self.seats:
            if seat.job is not None and seat.process.pid is not None and seat.process.is_alive():
                os.kill(seat.process.pid, signal.SIGTERM)

    def close(self) -> None:
        """Send the idle ones home, and end those that do not go."""
        for seat in self.seats:
            if seat.job is None:
                seat.answer(None)
        deadline = time.monotonic() + 5
        for seat in self.seats:
            if seat.job is None and seat.ready:
                seat.process.join(max(0.0, deadline - time.monotonic()))
            self._bury(seat)

    @staticmethod
    def _bury(seat: Seat) -> None:
        if seat.process.is_alive():
            seat.process.kill()
        seat.process.join(10)
        seat.pipe.close()
