"""Tokens per second of whole training steps on characters, against Keras as its textbook shows.

    python tests/benchmarks/keras_speed.py --cells lstm gru rnn

Keras is keras.layers.Embedding, LSTM (or GRU, SimpleRNN; stateful) and Dense, compiled with AdamW and
trained by train_on_batch. It runs in a process of its own, which takes turns with ours; --python
names another interpreter that has it. Without Keras: one line that says how to install it, exit 2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

CELLS = ("rnn", "lstm", "gru")
VOCABULARY_SIZE, BATCH_SIZE, SEQUENCE_LENGTH = 65, 64, 128
INSTALL = "keras_speed needs Keras: .venv/bin/pip install -e '.[keras]', or --python with an interpreter that has it."


def serve() -> None:
    """The other process: builds what a line of standard input names, then one step a line; answers its seconds."""
    import time

    try:
        import keras
    except ImportError:
        print(json.dumps({"error": INSTALL}), flush=True)
        return
    import numpy as np

    channel = os.fdopen(os.dup(1), "w")  # libraries print, too
    os.dup2(2, 1)

    def answer(value: object) -> None:
        print(json.dumps(value), file=channel, flush=True)

    answer({"keras": keras.__version__, "backend": keras.backend.backend()})
    draw = np.random.default_rng(0)
    stream = draw.integers(0, VOCABULARY_SIZE, (BATCH_SIZE, SEQUENCE_LENGTH + 1))
    model: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "cell" in asked:
            kind = {"rnn": keras.layers.SimpleRNN, "lstm": keras.layers.LSTM, "gru": keras.layers.GRU}[asked["cell"]]
            size = asked["hidden_size"]
            layers = [kind(size, return_sequences=True, stateful=True) for _ in range(asked["layers"])]
            model = keras.Sequential([
                keras.Input(batch_shape=(BATCH_SIZE, SEQUENCE_LENGTH), dtype="int32"),
                keras.layers.Embedding(VOCABULARY_SIZE, size), *layers, keras.layers.Dense(VOCABULARY_SIZE),
            ])  # fmt: skip
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(optimizer=keras.optimizers.AdamW(1e-3, global_clipnorm=0.25), loss=loss)
            answer("built")
            continue
        begin = time.perf_counter()
        model.train_on_batch(stream[:, :-1], stream[:, 1:])
        answer(time.perf_counter() - begin)


class Other:
    """The process that has Keras."""

    def __init__(self, python: str, threads: int) -> None:
        named = {name: str(threads) for name in ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")}
        env = os.environ | named | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [python, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.about = self._read()
        if "error" in self.about:
            raise ImportError(self.about["error"])

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("The process with Keras has ended; its errors stand above.")
        return json.loads(line)

    def ask(self, value: object) -> Any:
        assert self._process.stdin is not None
        print(json.dumps(value), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self._process.communicate()


def main() -> int:
    from harness import parser

    arguments = parser(__doc__)
    arguments.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="cells to measure")
    arguments.add_argument("--layers", nargs="+", type=int, default=[1], help="numbers of layers to measure")
    arguments.add_argument("--hidden-size", type=int, default=512, help="embedding and hidden units")
    arguments.add_argument("--python", default=sys.executable, help="interpreter that has Keras")
    options = arguments.parse_args()
    try:
        other = Other(options.python, options.threads)
    except ImportError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        measure(other, options)
    finally:
        other.close()
    return 0


def measure(other: Other, options: Any) -> None:
    import torch
    from harness import environment, rate, shown, speedup, take_turns, write_json
    from training_speed import elman_step

    from elman.data.windows import Window

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    stream = torch.randint(VOCABULARY_SIZE, (BATCH_SIZE, SEQUENCE_LENGTH + 1))
    window = Window(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), None, False)
    print(environment() | other.about)
    print(f"{'cell':5} {'layers':>6} {'keras':>9} {'elman':>9}   times as fast (quartiles)")
    results = []
    for num_layers in options.layers:
        for cell in options.cells:
            other.ask({"cell": cell, "hidden_size": options.hidden_size, "layers": num_layers})
            steps: dict[str, Callable[[], object]] = {
                "keras": lambda: other.ask({}),
                "elman": elman_step(cell, options.hidden_size, num_layers, window),
            }
            seconds = take_turns(steps, turns=options.turns)
            tokens = {name: rate(turns, BATCH_SIZE * SEQUENCE_LENGTH) for name, turns in seconds.items()}
            gain = speedup(seconds["elman"], seconds["keras"])
            results.append(
                {"cell": cell, "layers": num_layers, "hidden_size": options.hidden_size, "tokens_per_second": tokens,
                 "speedup": gain} | other.about
            )  # fmt: skip
            figures = f"{tokens['keras']:9,.0f} {tokens['elman']:9,.0f}"
            print(f"{cell:5} {num_layers:6} {figures}   {shown(gain)}", flush=True)
    write_json(options.json, results)


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve()
    else:
        sys.exit(main())
