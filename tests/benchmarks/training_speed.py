"""Tokens per second of whole training steps, against the loop that one would write with torch alone.

    python tests/benchmarks/training_speed.py --cells lstm gru rnn --layers 1 2

A step is forward, loss, backward, clipping and AdamW. "bare" is nn.Embedding, nn.LSTM (or GRU,
RNN) and nn.Linear in single precision, "autocast" the same in bfloat16, "elman" this package.
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

VOCABULARY_SIZE, BATCH_SIZE, SEQUENCE_LENGTH = 65, 64, 128
GATES = {"rnn": 1, "lstm": 4, "gru": 3}


class Bare(nn.Module):
    """What a tutorial has."""

    def __init__(self, cell: str, hidden_size: int, num_layers: int, vocabulary_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, hidden_size)
        kind = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[cell]
        self.recurrent = kind(hidden_size, hidden_size, num_layers, batch_first=True)
        self.output = nn.Linear(hidden_size, vocabulary_size)

    def forward(self, tokens_BT: Tensor, state: object) -> tuple[Tensor, object]:
        out_BTH, state = self.recurrent(self.embedding(tokens_BT), state)
        return self.output(out_BTH), state


def bare_step(
    cell: str, hidden_size: int, num_layers: int, window: Window, vocabulary_size: int, *, autocast: bool
) -> Callable[[], object]:
    model = Bare(cell, hidden_size, num_layers, vocabulary_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    carry: list[object] = [None]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits_BTV, state = model(window.inputs_BT, carry[0])
            loss = F.cross_entropy(logits_BTV.flatten(0, 1), window.targets_BT.flatten())
        carry[0] = tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25, foreach=True)
        optimizer.step()

    return step


def elman_step(
    cell: str, hidden_size: int, num_layers: int, window: Window, vocabulary_size: int = VOCABULARY_SIZE
) -> Callable[[], object]:
    config = ModelConfig(cell=cell, embedding_size=hidden_size, hidden_size=hidden_size, num_layers=num_layers)
    sizes = {"vocabulary_size": vocabulary_size, "num_inputs": vocabulary_size + 1, "start_id": vocabulary_size}
    model = LanguageModel(config, **sizes, context_length=SEQUENCE_LENGTH)
    task = LanguageModeling(model, OptimizerConfig(), bits=None, sequence_length=SEQUENCE_LENGTH)
    return task_step(task, lambda: window, lambda: torch.autocast("cpu", torch.bfloat16))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--cells", nargs="+", choices=GATES, default=list(GATES), help="cells to measure")
    arguments.add_argument("--layers", nargs="+", type=int, default=[1, 2], help="numbers of layers to measure")
    arguments.add_argument("--hidden-size", type=int, default=512, help="embedding and hidden units")
    arguments.add_argument("--vocabulary-size", type=int, default=VOCABULARY_SIZE, help="symbols")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    stream = torch.randint(options.vocabulary_size, (BATCH_SIZE, SEQUENCE_LENGTH + 1))
    window = Window(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), None, False)
    peak = matrix_rate(torch.bfloat16)
    print(environment())
    print(f"bfloat16 products: {peak / 1e9:.0f} Gflop/s at best")
    print(f"{'cell':5} {'layers':>6} {'bare':>9} {'autocast':>9} {'elman':>9}   times as fast as bare (quartiles)")
    results = []
    for num_layers in options.layers:
        for cell in options.cells:
            size = (cell, options.hidden_size, num_layers, window, options.vocabulary_size)
            steps = {
                "bare": bare_step(*size, autocast=False),
                "autocast": bare_step(*size, autocast=True),
                "elman": elman_step(*size),
            }
            seconds = take_turns(steps, turns=options.turns)
            tokens = {name: rate(turns, BATCH_SIZE * SEQUENCE_LENGTH) for name, turns in seconds.items()}
            gain = speedup(seconds["elman"], seconds["bare"])
            results.append({"cell": cell, "layers": num_layers, "tokens_per_second": tokens, "speedup": gain})
            figures = " ".join(f"{tokens[name]:9,.0f}" for name in steps)
            print(f"{cell:5} {num_layers:6} {figures}   {shown(gain)}", flush=True)
    for result in results:
        result |= {"hidden_size": options.hidden_size, "matrix_rate": peak, "vocabulary_size": options.vocabulary_size}
    write_json(options.json, results)


if __name__ == "__main__":
    main()
