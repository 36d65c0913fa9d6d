"""Minimal cells against GRU and LSTM over lengths of the window: time per token, and bits per byte.

    python tests/benchmarks/scan_lengths.py --lengths 64 256 1024 4096 --train-tokens 1000000 --corpus my-novel.txt

Every step has the same number of tokens, so that a window eight times as long has an eighth of the rows. The
first part times whole training steps, in turns; "of gru" is how many times as fast as the GRU at that length.
The second trains each contestant on the same tokens (or, with --minutes, for the same time) at each length, and
scores the validation split with the state carried over it. A layer of GRU is 3 of minGRU or 2 of minLSTM of equal
width in parameters. All have residual connections and normalised layers, which the deep ones need, and which make
the others better too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import corpus_name, elsewhere, environment, parser, rate, speedup, take_turns, task_step, write_json

from elman.config.schema import ExperimentConfig, ModelConfig, OptimizerConfig
from elman.config.tree import build
from elman.data.windows import Window
from elman.models.count import count_parameters
from elman.models.language_model import LanguageModel
from elman.tasks.hardware import autocast, resolve_precision
from elman.tasks.language_modeling import LanguageModeling
from elman.training.experiment import run_experiment

VOCABULARY_SIZE = 70
COMMON = {"residual": True, "layer_norm": True}
CONTESTANTS: dict[str, dict[str, Any]] = {
    "gru": {"cell": "gru"},
    "lstm": {"cell": "lstm"},
    "mingru": {"cell": "mingru"},
    "minlstm": {"cell": "minlstm"},
    "mingru-3": {"cell": "mingru", "num_layers": 3},
    "minlstm-2": {"cell": "minlstm", "num_layers": 2},
}


def training_step(name: str, size: int, length: int, tokens: int) -> Callable[[], None]:
    torch.manual_seed(0)
    stream = torch.randint(VOCABULARY_SIZE, (tokens // length, length + 1))
    window = Window(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), None, False)
    task = LanguageModeling(model_of(name, size), OptimizerConfig(), bits=None, sequence_length=length)
    cpu = torch.device("cpu")
    return task_step(task, lambda: window, lambda: autocast(resolve_precision("auto", cpu), cpu))


def model_of(name: str, size: int) -> LanguageModel:
    config = ModelConfig(embedding_size=size, hidden_size=size, **COMMON, **CONTESTANTS[name])
    ids = {"vocabulary_size": VOCABULARY_SIZE, "num_inputs": VOCABULARY_SIZE + 1, "start_id": VOCABULARY_SIZE}
    return LanguageModel(config, **ids, context_length=1)


def time_lengths(options: Any) -> list[dict[str, Any]]:
    size, tokens = options.hidden_size, options.tokens
    print(f"\nMicroseconds per token of training, {tokens} tokens a step, {size} units (of gru: median, quartiles)")
    print("length " + "".join(f"{name:>27}" for name in options.contestants))
    results = []
    for length in options.lengths:
        steps = {name: training_step(name, size, length, tokens) for name in options.contestants}
        seconds = take_turns(steps, turns=options.turns, warm_up=1)
        line = f"{length:6} "
        for name in steps:
            gain = speedup(seconds[name], seconds[options.contestants[0]])
            micros = 1e6 / rate(seconds[name], tokens)
            results.append({"contestant": name, "length": length, "microseconds_per_token": micros, "speedup": gain})
            line += f"{micros:9.1f} {gain['median']:5.2f} ({gain['low']:.2f}–{gain['high']:.2f})".rjust(27)
        print(line, flush=True)
    return results


def config_of(options: Any, name: str, length: int) -> ExperimentConfig:
    flat = {"trainer.max_epochs": None, "trainer.threads": options.threads, "trainer.sample_length": 0,
            "tracking.system_metrics": False, "corpus.test_fraction": 0.0, "seed": options.seed,
            "model.embedding_size": options.train_size, "model.hidden_size": options.train_size,
            "data.sequence_length": length, "data.batch_size": options.train_step // length,
            "optimizer.lr": options.lr, "optimizer.warmup_steps": 20}  # fmt: skip
    flat |= {f"model.{key}": value for key, value in (COMMON | CONTESTANTS[name]).items()}
    if options.minutes is not None:
        flat["trainer.max_minutes"] = options.minutes
    else:
        flat["trainer.max_steps"] = options.train_tokens // options.train_step
    if options.corpus is not None:
        flat["corpus.name"] = corpus_name(options.corpus)
    return build(ExperimentConfig, flat)


def train_lengths(options: Any) -> list[dict[str, Any]]:
    limit = f"{options.train_tokens:,} tokens" if options.minutes is None else f"{options.minutes:g} minutes"
    print(f"\nBits per byte of the validation split after {limit}, {options.train_step} tokens a step, "
          f"{options.train_size} units (tokens/s)")  # fmt: skip
    print("length " + "".join(f"{name:>20}" for name in options.trained))
    pairs = [(length, name) for length in options.lengths for name in options.trained]
    configs = {pair: config_of(options, pair[1], pair[0]) for pair in pairs}
    results = []
    with elsewhere():
        for length in options.lengths:
            line = f"{length:6} "
            for name in options.trained:
                done = run_experiment(configs[length, name])
                bits = done.metrics["val/bits_per_byte"]
                results.append({"contestant": name, "length": length, "bits_per_byte": bits,
                                "tokens_per_second": done.tokens_per_second})  # fmt: skip
                line += f"{bits:.4f} ({done.tokens_per_second:,.0f})".rjust(20)
            print(line, flush=True)
    return results


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(turns=5)
    arguments.add_argument("--lengths", nargs="+", type=int, default=[64, 256, 1024, 4096], help="steps of a window")
    arguments.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS),
                           help="who is timed; ratios are to the first")  # fmt: skip
    arguments.add_argument("--hidden-size", type=int, default=512, help="embedding and hidden units, timed")
    arguments.add_argument("--tokens", type=int, default=8192, help="tokens of a step, timed")
    arguments.add_argument("--trained", nargs="*", choices=CONTESTANTS,
                           default=["gru", "lstm", "mingru-3", "minlstm-2"], help="who is trained")  # fmt: skip
    arguments.add_argument("--train-size", type=int, default=256, help="embedding and hidden units, trained")
    arguments.add_argument("--train-step", type=int, default=4096, help="tokens of a step, trained")
    arguments.add_argument("--train-tokens", type=int, default=1_000_000, help="tokens that each is trained on")
    arguments.add_argument("--minutes", type=float, help="train for this long each, instead")
    arguments.add_argument("--lr", type=float, default=1.6e-2, help="peak learning rate")
    arguments.add_argument("--seed", type=int, default=1, help="of the trainings")
    arguments.add_argument("--corpus", help="a file or a corpus by name; else the embedded default")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    print(environment())
    sizes = {name: count_parameters(model_of(name, options.hidden_size))["recurrent"] for name in CONTESTANTS}
    print("recurrent parameters: " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    results = time_lengths(options) if options.turns else []
    results += train_lengths(options) if options.trained else []
    write_json(options.json, results)


if __name__ == "__main__":
    main()
