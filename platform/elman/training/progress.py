"""Watching a training: a live bar in a terminal, plain lines elsewhere. All of it goes to standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

PLAIN_SECONDS = 10.0
"""Between two plain lines about the same thing."""

QUIET_SECONDS = 2.0
"""Before the first line about a stage whose end can be foreseen."""


class Reporter(Protocol):
    """Whoever watches a training: the terminal, or nobody."""

    def note(self, text: str) -> None:
        """A line worth reading once."""
        ...

    def stage(self, name: str, fraction: float | None = None, figures: str = "") -> None:
        """Something beside the training goes on; ``fraction`` of it is done, and it stands like this."""
        ...

    def step(self, progress: float, seconds_left: float, metrics: Mapping[str, float]) -> None:
        """A step was logged."""
        ...

    def validated(self, epoch: float, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        """A validation ended."""
        ...

    def close(self) -> None:
        """The training is over."""
        ...


class Silence:
    """Watches nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def stage(self, name: str, fraction: float | None = None, figures: str = "") -> None:
        """Say nothing."""

    def step(self, progress: float, seconds_left: float, metrics: Mapping[str, float]) -> None:
        """Say nothing."""

    def validated(self, epoch: float, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Say nothing."""


def duration(seconds: float) -> str:
    """12 s, 3:05 min, 1:02:03 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h"


def _step_line(metrics: Mapping[str, float], seconds_left: float) -> str:
    # Short enough for eighty columns beside the bar.
    bits = f"{metrics['train/bits_per_byte']:.3f} bits/byte " if "train/bits_per_byte" in metrics else ""
    speed = f"{metrics['throughput/tokens_per_second']:,.0f} tok/s"
    return f"loss {metrics['train/loss']:.3f} {bits}{speed} {duration(seconds_left).removesuffix(' min')} left"


def _validation_line(epoch: float, step: int, metrics: Mapping[str, float], is_best: bool) -> str:
    return (
        f"epoch {epoch:.4g}, step {step:,}: validation loss {metrics['val/loss']:.4f} nats, "
        f"{metrics['val/bits_per_byte']:.4f} bits/byte, accuracy {metrics['val/accuracy']:.1%}"
        f"{' (best)' if is_best else ''}"
    )


class PlainReporter:
    """A line now and then, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._last: dict[str, float] = {}
        self._begun: dict[str, float] = {}

    def note(self, text: str) -> None:
        """Write it."""
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def _seldom(self, kind: str, text: str) -> None:
        now = time.monotonic()
        if now - self._last.get(kind, -PLAIN_SECONDS) >= PLAIN_SECONDS:
            self._last[kind] = now
            self.note(text)

    def stage(self, name: str, fraction: float | None = None, figures: str = "") -> None:
        """Write its name, and how much of it is done; what is done in a moment is not worth a line."""
        if fraction is None:
            self._seldom(name, name)
        elif figures:
            self._seldom(name, f"{fraction:4.0%}  {figures}")
        elif fraction == 0:
            self._begun[name] = time.monotonic()
        elif time.monotonic() - self._begun.setdefault(name, time.monotonic()) > QUIET_SECONDS:
            self._seldom(name, f"{name} {fraction:.0%}")

    def step(self, progress: float, seconds_left: float, metrics: Mapping[str, float]) -> None:
        """Write the figures."""
        self._seldom("step", f"{progress:4.0%}  {_step_line(metrics, seconds_left)}")

    def validated(self, epoch: float, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        """Write the figures."""
        self.note(_validation_line(epoch, step, metrics, is_best))

    def close(self) -> None:
        """Nothing is open."""


class LiveReporter:
    """A bar that stays on the last line, with the validations scrolling above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self._task: Any = None
        self._name = ""

    def _show(self, name: str, fraction: float | None, figures: str = "") -> None:
        if self._task is None:
            self._progress.start()
        if name != self._name:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task, self._name = self._progress.add_task(name, total=None, figures=figures), name
        total = None if fraction is None else 1.0
        self._progress.update(self._task, total=total, completed=fraction or 0.0, figures=figures)

    def note(self, text: str) -> None:
        """Write it above the bar."""
        self._progress.console.print(text, markup=False, soft_wrap=True)

    def stage(self, name: str, fraction: float | None = None, figures: str = "") -> None:
        """Show its name, and how much of it is done."""
        self._show(name, fraction, figures)

    def step(self, progress: float, seconds_left: float, metrics: Mapping[str, float]) -> None:
        """Move the bar."""
        self._show("training", progress, _step_line(metrics, seconds_left))

    def validated(self, epoch: float, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        """Write the figures above the bar."""
        self.note(_validation_line(epoch, step, metrics, is_best))

    def close(self) -> None:
        """Take the bar away."""
        self._progress.stop()
        self._task, self._name = None, ""


def terminal_reporter() -> LiveReporter | PlainReporter:
    """Live where standard error is a terminal."""
    return LiveReporter() if sys.stderr.isatty() else PlainReporter()
