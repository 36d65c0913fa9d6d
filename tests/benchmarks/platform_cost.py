"""What the platform adds to a step: Lightning, tracking, progress and metrics, against the same step bare.

    python tests/benchmarks/platform_cost.py

Both train the same model in the same precision on the same windows. Parts of a whole training
take turns with as many bare steps, so that other work on the machine disturbs both alike. So does
what the platform does beside the training, in threads that write metrics down and send them to
the tracking store: "beside" is the processor's time that these take for a step, and is to be added.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from typing import Any

import lightning as L
import torch
from harness import elsewhere, parser, task_step, write_json

from elman.config.schema import ExperimentConfig
from elman.config.tree import build
from elman.data.datamodule import CorpusData
from elman.tasks.hardware import autocast, resolve_precision
from elman.tasks.language_modeling import LanguageModeling
from elman.text.prepare import prepare
from elman.training.experiment import build_language_model, run_experiment

PART = 50


class Watch(L.Callback):
    """Times parts of the training, and runs the bare steps between them."""

    def __init__(self, bare: Any) -> None:
        self._bare, self._begin = bare, 0.0
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.beside: list[float] = []
        self._clocks: list[int] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        threads = [one for one in threading.enumerate() if one.name in ("outbox", "sender")]
        assert len(threads) == 2
        self._clocks = [time.pthread_getcpuclockid(one.ident) for one in threads if one.ident]

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % PART == 0:
            if batch_idx:
                self.ours.append((time.perf_counter() - self._begin) / PART)
                begin = time.perf_counter()
                for _ in range(PART):
                    self._bare()
                self.theirs.append((time.perf_counter() - begin) / PART)
                self.beside.append(sum(map(time.clock_gettime, self._clocks)))
            self._begin = time.perf_counter()


def config_of(hidden_size: int, steps: int) -> ExperimentConfig:
    flat = {"model.cell": "gru", "model.embedding_size": hidden_size, "model.hidden_size": hidden_size,
            "trainer.max_epochs": None, "trainer.max_steps": steps, "trainer.validate_every_steps": steps,
            "trainer.sample_length": 0, "data.sequence_length": 64, "data.batch_size": 64}  # fmt: skip
    return build(ExperimentConfig, flat)


def bare_step(config: ExperimentConfig) -> Any:
    corpus = prepare(config.corpus)
    model = build_language_model(config, corpus.tokenizer)
    task = LanguageModeling(model, config.optimizer, bits=None, sequence_length=config.data.sequence_length)  # type: ignore[arg-type]
    data = CorpusData(corpus, config.data, config.seed)
    windows = itertools.chain.from_iterable(map(data.train_loader, itertools.count()))
    cpu = torch.device("cpu")
    precision = resolve_precision("auto", cpu)
    return task_step(task, lambda: next(windows), lambda: autocast(precision, cpu))


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(turns=10)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    print(f"{'hidden':>6} {'bare ms':>8} {'elman ms':>9} {'added ms':>9} {'beside ms':>9} {'share':>7}")
    with elsewhere():
        for hidden_size in (64, 256):
            config = config_of(hidden_size, PART * (options.turns + 2))
            watch = Watch(bare_step(config))
            import elman.training.experiment as experiment

            whole = experiment._samples
            experiment._samples = lambda *given, watch=watch, **named: (watch,)
            try:
                run_experiment(config)
            finally:
                experiment._samples = whole
            ours, theirs = watch.ours[1:], watch.theirs[1:]
            added = statistics.median(a - b for a, b in zip(ours, theirs, strict=True))
            beside = (watch.beside[-1] - watch.beside[0]) / (PART * (len(watch.beside) - 1))
            bare = statistics.median(theirs)
            print(f"{hidden_size:6} {1e3 * bare:8.2f} {1e3 * statistics.median(ours):9.2f} {1e3 * added:9.2f}"
                  f" {1e3 * beside:9.2f} {(added + beside) / bare:7.1%}", flush=True)  # fmt: skip
            found = {"elman": ours, "bare": theirs, "added": added, "beside": beside}
            results.append({"hidden_size": hidden_size, **found})
    write_json(options.json, results)


if __name__ == "__main__":
    main()
