"""What every benchmark shares: taking turns, medians with their spread, and a JSON that tells the machine.

Absolute figures of a machine that others use say little. Those that are compared take turns in
one process, and a ratio is the median over the turns, with its quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

_FLAGS = re.compile(r"\b(fma|f16c|avx2|avx_vnni|avx512\w+|amx\w+|asimd\w*|sve\w*|i8mm|bf16)\b")

Turns = dict[str, list[float]]
"""Seconds of every turn, by name."""


def take_turns(steps: Mapping[str, Callable[[], object]], *, turns: int, warm_up: int = 2) -> Turns:
    """Time all ``steps`` once a turn, after some turns that do not count."""
    seconds: Turns = {name: [] for name in steps}
    for turn in range(warm_up + turns):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def task_step(task: Any, window: Callable[[], Any], precision: Any) -> Callable[[], None]:
    """A whole training step of a LanguageModeling task on its own: forward, loss, backward, clipping, update.

    Args:
        task: What is trained; on the CPU.
        window: Gives the next window.
        precision: A context manager factory, such as ``lambda: torch.autocast("cpu", torch.bfloat16)``.
    """
    optimizer = task.configure_optimizers()

    def step() -> None:
        with precision():
            loss = task.training_step(window(), 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        task.configure_gradient_clipping(optimizer)
        optimizer.step()

    return step


def rate(seconds: list[float], amount: float) -> float:
    """Median of ``amount`` per second."""
    return amount / statistics.median(seconds)


def speedup(seconds: list[float], reference: list[float]) -> dict[str, float]:
    """How many times as fast as the reference, turn by turn."""
    return spread([theirs / ours for ours, theirs in zip(seconds, reference, strict=True)])


def spread(figures: list[float]) -> dict[str, float]:
    """Median and quartiles; one figure is all of them."""
    low, middle, high = statistics.quantiles(figures, n=4, method="inclusive") if len(figures) > 1 else figures * 3
    return {"median": middle, "low": low, "high": high}


def shown(ratio: Mapping[str, float]) -> str:
    """A ``spread`` in a table."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def matrix_rate(dtype: torch.dtype, *, size: int = 2048, turns: int = 5) -> float:
    """Best rate of a large square product, floating-point operations per second."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    seconds = take_turns({"product": lambda: a @ b}, turns=turns)["product"]
    return 2 * size**3 / min(seconds)


def environment() -> dict[str, Any]:
    """Hardware and versions that the figures hold for, in short."""
    return {
        "processor": _of_processor("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--threads", type=int, default=2, help="threads that torch uses")
    made.add_argument("--turns", type=int, default=7, help="turns that count")
    made.add_argument("--json", type=_absolute, help="file to write the figures to, with hardware and versions")
    return made


@contextlib.contextmanager
def elsewhere() -> Iterator[Path]:
    """Work in an empty folder, which goes afterwards: trainings put their store where one stands."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        yield Path(name)


def corpus_name(given: str) -> str:
    """What ``corpus.name`` is to be from any folder: a file's whole path, or a corpus by its own name."""
    path = Path(given)
    return str(path.absolute()) if path.exists() else given


def provenance() -> dict[str, Any]:
    """``environment``, and all else that tells why figures differ: the processor's flags, packages, the code."""
    from elman.tracking.environment import code_state
    from elman.tracking.environment import environment as recorded

    commit, diff = code_state()
    flags = _FLAGS.findall(_of_processor("flags") or _of_processor("Features"))
    code = {"commit": commit, "uncommitted_changes": bool(diff)}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    rest = {name: value for name, value in recorded().items() if name != "cpu"}
    return environment() | {"flags": sorted(set(flags)), "date": date} | code | rest


def _absolute(path: str) -> Path:
    return Path(path).absolute()


def _of_processor(field: str) -> str:
    """What /proc/cpuinfo says of the first core; empty where it says nothing."""
    if not (info := Path("/proc/cpuinfo")).exists():
        return ""
    lines = info.read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def write_json(path: Path | None, results: list[dict[str, Any]]) -> None:
    """Write the figures, where a file was asked for."""
    if path is not None:
        report = {"environment": provenance(), "results": results}
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
