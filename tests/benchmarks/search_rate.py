"""Trials per hour: a search with two warm workers, against a process started afresh for each trial.

    python tests/benchmarks/search_rate.py --trials 12

The trials are short, so that what a trial costs beyond its training shows.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import parser, write_json

EXPERIMENT = """\
corpus: {{name: bible-asv}}
model: {{cell: gru, embedding_size: 32, hidden_size: 64}}
data: {{batch_size: 32, sequence_length: 32, evaluation_batch_size: 64}}
trainer: {{max_epochs: null, max_steps: {steps}, sample_length: 0}}
tracking: {{system_metrics: false}}
"""
SEARCH = """\
base: base.yaml
study: {{name: rate-{turn}, sampler: random, trials: {trials}, seed: {turn}}}
search: {{seeds: 0, keep_checkpoints: 0}}
space: {{optimizer.lr: {{low: 1.0e-3, high: 1.0e-2, log: true}}}}
"""


def elman(folder: Path, *arguments: str) -> float:
    """Seconds that one command takes."""
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "elman.cli", *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    return time.perf_counter() - begin


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(turns=3)
    arguments.add_argument("--trials", type=int, default=12, help="trials of a study")
    arguments.add_argument("--steps", type=int, default=100, help="steps of a trial")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base.yaml").write_text(EXPERIMENT.format(steps=options.steps), encoding="utf-8")
        elman(folder, "train", "--config", "base.yaml", "--trainer.max_steps", "1")  # prepares the corpus
        seconds: dict[str, list[float]] = {"two warm workers": [], "a process a trial": []}
        for turn in range(options.turns):
            (folder / "search.yaml").write_text(SEARCH.format(turn=turn, trials=options.trials), encoding="utf-8")
            whole = elman(folder, "search", "--config", "search.yaml", "--workers", "2")
            seconds["two warm workers"].append(whole / options.trials)
            one = statistics.fmean(
                elman(folder, "train", "--config", "base.yaml", "--optimizer.lr", f"{0.001 * (i + 1)}")
                for i in range(3)
            )
            seconds["a process a trial"].append(one)
    ratios = [b / a for a, b in zip(seconds["two warm workers"], seconds["a process a trial"], strict=True)]
    for kind, values in seconds.items():
        print(f"{kind:18} {statistics.median(values):6.2f} s a trial, {3600 / statistics.median(values):7,.0f} an hour")
    print(f"{statistics.median(ratios):.2f} times as many ({min(ratios):.2f}–{max(ratios):.2f})")
    write_json(options.json, [{"seconds": seconds, "ratios": ratios, "trials": options.trials}])


if __name__ == "__main__":
    main()
