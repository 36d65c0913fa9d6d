"""Validation loss in bfloat16 against single precision: the same text, settings and seeds, all else equal.

    python tests/benchmarks/precision_quality.py --seeds 5 --steps 1000 --corpus my-novel.txt

Each seed trains twice, and the pair is compared: both start from the same weights. The target is
0.5 % of the loss; the spread over seeds in one precision is printed beside it.
"""

from __future__ import annotations

import statistics
from typing import Any

from harness import corpus_name, elsewhere, environment, parser, write_json

from elman.config.schema import ExperimentConfig
from elman.config.tree import build
from elman.training.experiment import run_experiment

TARGET = 0.005
PRECISIONS = ("fp32", "bf16")


def config_of(options: Any, seed: int, precision: str) -> ExperimentConfig:
    flat = {"seed": seed, "model.cell": options.cell, "model.embedding_size": options.hidden_size,
            "model.hidden_size": options.hidden_size, "data.batch_size": options.batch_size,
            "trainer.max_epochs": None, "trainer.max_steps": options.steps, "trainer.precision": precision,
            "trainer.threads": options.threads, "trainer.sample_length": 0}  # fmt: skip
    if options.corpus is not None:
        flat["corpus.name"] = corpus_name(options.corpus)
    return build(ExperimentConfig, flat)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--corpus", help="a file or a corpus by name; else the embedded default")
    arguments.add_argument("--seeds", type=int, default=5, help="pairs of trainings")
    arguments.add_argument("--steps", type=int, default=1000, help="steps of each")
    arguments.add_argument("--cell", default="lstm", help="recurrence")
    arguments.add_argument("--hidden-size", type=int, default=256, help="embedding and hidden units")
    arguments.add_argument("--batch-size", type=int, default=64, help="parallel streams")
    options = arguments.parse_args()
    configs = [[config_of(options, seed, name) for name in PRECISIONS] for seed in range(1, options.seeds + 1)]
    print(environment())
    print(f"{'seed':>4} {'fp32':>8} {'bf16':>8} {'change':>8}")
    pairs = []
    with elsewhere():
        for single, half in configs:
            losses = [run_experiment(config).metrics["val/loss"] for config in (single, half)]
            pairs.append(losses)
            print(f"{single.seed:4} {losses[0]:8.4f} {losses[1]:8.4f} {losses[1] / losses[0] - 1:+8.3%}", flush=True)
    single, half = zip(*pairs, strict=True)
    change = statistics.mean(half) / statistics.mean(single) - 1
    spread = statistics.stdev(single) / statistics.mean(single) if len(single) > 1 else 0.0
    verdict = "within" if change <= TARGET else "beyond"
    print(f"mean change {change:+.3%}, {verdict} {TARGET:.1%}; spread over seeds in fp32 {spread:.3%}")
    write_json(options.json, [{
        "cell": options.cell, "hidden_size": options.hidden_size, "steps": options.steps, "fp32": single,
        "bf16": half, "change": change, "spread": spread, "target": TARGET, "corpus": options.corpus,
    }])  # fmt: skip


if __name__ == "__main__":
    main()
