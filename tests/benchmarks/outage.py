"""What a tracking server that fails costs a training: steps against those of one that is not disturbed.

    python tests/benchmarks/outage.py

A real MLflow server stands behind a proxy that answers 500, or drops the connection, or takes six seconds
to answer, from the first step to the last. Trainings take turns; what is compared is their tokens per second
(goal: a step costs at most 1.1 times). "ends" is what the command takes from its last step to its end where
nobody answers (goal: ten seconds at most), the test of the best checkpoint and its sample included.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from harness import elsewhere, parser, speedup, write_json

sys.path.insert(0, str(Path(__file__).parents[1]))

from elman.config.schema import ExperimentConfig
from elman.config.tree import override
from elman.training.experiment import run_experiment
from elman.training.progress import Silence
from outage_support import Proxy, Server

MODES = ("pass", "500", "drop", "slow")


class Watch(Silence):
    """Sets the proxy's mode when the training begins, and notes when the last step was logged."""

    def __init__(self, proxy: Proxy, mode: str) -> None:
        self._proxy, self._mode, self.last = proxy, mode, 0.0

    def step(self, *arguments: object) -> None:
        self._proxy.mode, self.last = self._mode, time.perf_counter()


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(turns=3)
    arguments.add_argument("--steps", type=int, default=150, help="steps of a training")
    options = arguments.parse_args()
    logging.getLogger("elman.tracking").setLevel(logging.ERROR)  # that the store is away is the point
    settings = {"trainer.threads": options.threads, "trainer.max_epochs": None, "trainer.max_steps": options.steps,
                "trainer.log_every_steps": 1}  # fmt: skip
    config = override(ExperimentConfig(), settings)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    ends: dict[str, list[float]] = {mode: [] for mode in MODES}
    with elsewhere() as folder:
        server = Server(f"sqlite:///{folder / 'mlflow.db'}", folder)
        server.start()
        proxy = Proxy(server.port)
        os.environ["MLFLOW_TRACKING_URI"] = proxy.uri
        try:
            for turn in range(options.turns + 1):
                for mode in MODES:
                    watch = Watch(proxy, mode)
                    result = run_experiment(config, reporter=watch)
                    if turn:  # the first one warms up
                        ends[mode].append(time.perf_counter() - watch.last)
                        seconds[mode].append(1 / result.tokens_per_second)
                    proxy.mode = "pass"
        finally:
            proxy.close()
            server.stop()
    results = []
    for mode in MODES[1:]:
        cost = speedup(seconds["pass"], seconds[mode])
        last = max(ends[mode])
        results.append({"store": mode, "cost_of_a_step": cost, "seconds_to_the_end": ends[mode]})
        print(f"{mode:>5}  a step costs {cost['median']:.3f} × ({cost['low']:.3f} to {cost['high']:.3f}); "
              f"ends within {last:.1f} s of its last step")  # fmt: skip
    print(f" pass  ends within {max(ends['pass']):.1f} s of its last step")
    write_json(options.json, results)


if __name__ == "__main__":
    main()
