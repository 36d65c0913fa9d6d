"""Tiny texts and tiny configurations."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from elman.config.schema import ExperimentConfig
from elman.config.tree import build

SYLLABLES = ("ba", "do", "ki", "lu", "me", "no", "ra", "si", "tu", "ve")


Refuse = Callable[..., str]
"""Runs a command that has to be refused: its words, and ``names``, what its one line must hold."""


def files(folder: Path) -> dict[Path, int]:
    """Every file below a folder, with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


class Payload:
    """Unpickled, it touches a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.canary,)


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def put_store(folder: Path, database: Path) -> None:
    """Give a folder, which may not exist, a local store: a copy of an MLflow database."""
    (folder / "mlruns").mkdir(parents=True)
    shutil.copy(database, folder / "mlruns" / "mlflow.db")


def make_text(words: int, seed: int = 0) -> str:
    """Sentences of made-up words with some structure to learn."""
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(60)]
    lines, line = [], []
    for _ in range(words):
        line.append(draw.choice(lexicon))
        if len(line) > 7:
            lines.append(" ".join(line) + ".")
            line = []
    return "\n".join([*lines, " ".join(line)]) + "\n"


def tiny(corpus: Path | str, **settings: Any) -> ExperimentConfig:
    """A configuration that trains in a second; dotted names have __ for the dot."""
    flat: dict[str, Any] = {
        "name": "tiny",
        "corpus.name": str(corpus),
        "corpus.validation_fraction": 0.1,
        "corpus.test_fraction": 0.1,
        "model.embedding_size": 8,
        "model.hidden_size": 16,
        "data.batch_size": 8,
        "data.sequence_length": 16,
        "trainer.max_epochs": None,
        "trainer.max_steps": 20,
        "trainer.threads": 1,
        "trainer.sample_length": 20,
        "trainer.log_every_steps": 1,
        "tracking.system_metrics": False,
    }
    flat |= {name.replace("__", "."): value for name, value in settings.items()}
    return build(ExperimentConfig, flat)


@contextmanager
def small_disk_at(folder: Path) -> Iterator[Path]:
    """A file system of 2 MB in a folder that is made for it; the test is skipped where mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
