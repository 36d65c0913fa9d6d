"""Seconds until something happens: `elman --help`, and a warm `elman train` until its first step.

    python tests/benchmarks/startup.py
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import parser, write_json

TRAIN = ["--trainer.max_steps", "20", "--trainer.log_every_steps", "1", "--trainer.sample_length", "0"]


def seconds_to_help() -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "elman.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def seconds_to_first_step(folder: Path) -> float:
    """Until the first line that tells a training loss."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "elman.cli", "train", *TRAIN], cwd=folder, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if re.search(r"loss \d", line):
            seconds = time.perf_counter() - begin
            process.communicate()
            return seconds
    raise RuntimeError("it ended without a step")


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(turns=5)
    options = arguments.parse_args()
    helps, steps = [], []
    with tempfile.TemporaryDirectory() as name:
        seconds_to_first_step(Path(name))  # the corpus and the store are made
        for _ in range(options.turns):
            helps.append(seconds_to_help())
            steps.append(seconds_to_first_step(Path(name)))
    for what, values in (("elman --help", helps), ("elman train, first step", steps)):
        print(f"{what:24} {statistics.median(values):.2f} s ({min(values):.2f}–{max(values):.2f})")
    write_json(options.json, [{"help": helps, "first_step": steps}])


if __name__ == "__main__":
    main()
