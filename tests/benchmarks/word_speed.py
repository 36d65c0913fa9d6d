"""Tokens per second of whole training steps on words, against the loop that one would write with torch alone.

    python tests/benchmarks/word_speed.py --hidden-sizes 400 650 --optimizer sgd

A step is forward, loss, backward, clipping to 0.25 and the update, of an LSTM. "bare" is
nn.Embedding, nn.LSTM and nn.Linear in single precision, "autocast" the same in bfloat16; "exact"
and "adaptive" are this package with either softmax. Words are drawn by Zipf's law, ids by
falling frequency: the adaptive softmax's work depends on it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import environment, matrix_rate, parser, rate, shown, speedup, take_turns, task_step, write_json
from torch import Tensor, nn
from torch.nn import functional as F

from elman.config.schema import ModelConfig, OptimizerConfig
from elman.data.windows import Window
from elman.models.language_model import LanguageModel
from elman.tasks.language_modeling import LanguageModeling

BATCH_SIZE, SEQUENCE_LENGTH = 20, 35
RATES = {"sgd": 1.0, "adamw": 1e-3}
MAX_GRAD_NORM = 0.25


class Bare(nn.Module):
    """What a tutorial has."""

    def __init__(self, vocabulary_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, hidden_size)
        self.recurrent = nn.LSTM(hidden_size, hidden_size, num_layers, batch_first=True)
        self.output = nn.Linear(hidden_size, vocabulary_size)

    def forward(self, tokens_BT: Tensor, state: object) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out_BTH, state = self.recurrent(self.embedding(tokens_BT), state)
        return self.output(out_BTH), state


def bare_step(sizes: tuple[int, int, int], optimizer_name: str, windows: list[Window], *, autocast: bool,
              ) -> Callable[[], object]:  # fmt: skip
    model = Bare(*sizes)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer_name]
    optimizer = kind(model.parameters(), lr=RATES[optimizer_name], fused=True)
    carry: list[object] = [None]
    turn = iter(range(10**9))

    def step() -> None:
        window = windows[next(turn) % len(windows)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits_BTV, state = model(window.inputs_BT, carry[0])
            loss = F.cross_entropy(logits_BTV.flatten(0, 1), window.targets_BT.flatten())
        carry[0] = tuple(part.detach() for part in state)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM, foreach=True)
        optimizer.step()

    return step


def elman_step(sizes: tuple[int, int, int], optimizer_name: str, windows: list[Window], *, softmax: str,
               ) -> Callable[[], object]:  # fmt: skip
    vocabulary_size, hidden_size, num_layers = sizes
    config = ModelConfig(embedding_size=hidden_size, hidden_size=hidden_size, num_layers=num_layers, softmax=softmax)
    ids = {"vocabulary_size": vocabulary_size, "num_inputs": vocabulary_size, "start_id": 1}
    model = LanguageModel(config, **ids, context_length=SEQUENCE_LENGTH)
    rule = OptimizerConfig(name=optimizer_name, lr=RATES[optimizer_name], max_grad_norm=MAX_GRAD_NORM)
    task = LanguageModeling(model, rule, bits=None, sequence_length=SEQUENCE_LENGTH)
    turn = iter(range(10**9))
    return task_step(
        task, lambda: windows[next(turn) % len(windows)], lambda: torch.autocast("cpu", torch.bfloat16)
    )


def zipf(vocabulary_size: int, *shape: int) -> Tensor:
    """Token ids with frequencies as 1 / (rank + 2.7), after Mandelbrot."""
    weights_V = 1 / (torch.arange(vocabulary_size) + 3.7)
    return torch.multinomial(weights_V, torch.Size(shape).numel(), replacement=True).view(shape)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--hidden-sizes", nargs="+", type=int, default=[400, 650], help="embedding and hidden units")
    arguments.add_argument("--layers", nargs="+", type=int, default=[1], help="numbers of layers to measure")
    arguments.add_argument("--vocabulary-size", type=int, default=33_000, help="words")
    arguments.add_argument("--optimizer", choices=RATES, default="sgd", help="update rule of all")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    windows = []
    for _ in range(4):
        stream = zipf(options.vocabulary_size, BATCH_SIZE, SEQUENCE_LENGTH + 1)
        windows.append(Window(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), None, False))
    peak = matrix_rate(torch.bfloat16)
    print(environment())
    print(f"bfloat16 products: {peak / 1e9:.0f} Gflop/s at best; {options.optimizer}")
    names = ("bare", "autocast", "exact", "adaptive")
    print(f"{'hidden':>6} {'layers':>6}" + "".join(f" {name:>9}" for name in names), "  exact and adaptive over bare")
    results = []
    for num_layers in options.layers:
        for hidden_size in options.hidden_sizes:
            size = ((options.vocabulary_size, hidden_size, num_layers), options.optimizer, windows)
            steps = {
                "bare": bare_step(*size, autocast=False),
                "autocast": bare_step(*size, autocast=True),
                "exact": elman_step(*size, softmax="exact"),
                "adaptive": elman_step(*size, softmax="adaptive"),
            }
            seconds = take_turns(steps, turns=options.turns)
            tokens = {name: rate(turns, BATCH_SIZE * SEQUENCE_LENGTH) for name, turns in seconds.items()}
            gains = {name: speedup(seconds[name], seconds["bare"]) for name in ("exact", "adaptive")}
            results.append({
                "hidden_size": hidden_size, "layers": num_layers, "vocabulary_size": options.vocabulary_size,
                "optimizer": options.optimizer, "tokens_per_second": tokens, "speedup": gains, "matrix_rate": peak,
            })  # fmt: skip
            figures = "".join(f" {tokens[name]:9,.0f}" for name in names)
            print(f"{hidden_size:6} {num_layers:6}{figures}   {'  '.join(map(shown, gains.values()))}", flush=True)
    write_json(options.json, results)


if __name__ == "__main__":
    main()
