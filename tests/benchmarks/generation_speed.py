"""Tokens per second of generation, one stream and many, against the loop that one would write with torch alone.

    python tests/benchmarks/generation_speed.py --cells rnn lstm gru

"plain" is nn.Embedding, nn.LSTM (or GRU, RNN), nn.Linear, softmax and multinomial for one token after
another, in single precision without gradients; "one" and "many" are this package's ``generate`` with one
stream and with several. Then the time per token after position 100,000 over that after position 100.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from harness import environment, parser, rate, shown, speedup, spread, take_turns, write_json
from torch import Tensor, nn

from elman.config.schema import GenerationConfig, ModelConfig
from elman.models.language_model import LanguageModel
from elman.models.sampling import generate

VOCABULARY_SIZE, TEMPERATURE = 65, 0.8
EARLY, LATE = 100, 100_000
CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class Plain:
    """What a tutorial has."""

    def __init__(self, cell: str, hidden_size: int, num_layers: int) -> None:
        self.embedding = nn.Embedding(VOCABULARY_SIZE, hidden_size)
        self.recurrent = CELLS[cell](hidden_size, hidden_size, num_layers, batch_first=True).eval()
        self.output = nn.Linear(hidden_size, VOCABULARY_SIZE)
        self.token_BT = torch.zeros(1, 1, dtype=torch.int64)
        self.state: Tensor | tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def take(self, count: int) -> None:
        for _ in range(count):
            out_BTH, self.state = self.recurrent(self.embedding(self.token_BT), self.state)
            probabilities_BV = (self.output(out_BTH[:, -1]) / TEMPERATURE).softmax(dim=1)
            self.token_BT = torch.multinomial(probabilities_BV, 1)


def stream(model: LanguageModel, length: int, samples: int = 1) -> Iterator[list[int]]:
    """A generation that is under way."""
    steps = generate(model, [], GenerationConfig(length=length, samples=samples, temperature=TEMPERATURE))
    next(steps)
    return steps


def take(steps: Iterator[list[int]], count: int) -> None:
    assert sum(1 for _ in islice(steps, count)) == count


def endless(model: LanguageModel, samples: int, count: int) -> Callable[[], None]:
    """Take so many steps a call."""
    streams = {"now": stream(model, 1)}

    def step() -> None:
        try:
            take(streams["now"], count)
        except AssertionError:  # used up
            streams["now"] = stream(model, 20 * count + 1, samples)
            take(streams["now"], count)

    return step


def position_ratio(model: LanguageModel, count: int, turns: int) -> dict[str, float]:
    """Time per token late in a text over that early in one: median and quartiles."""
    late = stream(model, LATE + 1 + count * turns)
    take(late, LATE)
    ratios = []
    for turn in range(turns):
        early = stream(model, EARLY + 1 + count)
        take(early, EARLY)
        steps = {"early": partial(take, early, count), "late": partial(take, late, count)}
        order = list(steps) if turn % 2 else list(reversed(steps))
        seconds = take_turns({name: steps[name] for name in order}, turns=1, warm_up=0)
        ratios.append(seconds["late"][0] / seconds["early"][0])
    return spread(ratios)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="cells to measure")
    arguments.add_argument("--layers", type=int, default=2, help="recurrent layers")
    arguments.add_argument("--hidden-size", type=int, default=512, help="embedding and hidden units")
    arguments.add_argument("--streams", type=int, default=64, help="how many are many")
    arguments.add_argument("--tokens", type=int, default=2000, help="tokens of one stream in a turn")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    print(environment())
    print(f"{'cell':5} {'plain':>9} {'one':>9} {'many':>10}   tokens/s, and ratios (quartiles)")
    results = []
    for cell in options.cells:
        torch.manual_seed(0)
        sizes = {"embedding_size": options.hidden_size, "hidden_size": options.hidden_size}
        model = LanguageModel(
            ModelConfig(cell=cell, num_layers=options.layers, **sizes), vocabulary_size=VOCABULARY_SIZE,
            num_inputs=VOCABULARY_SIZE + 1, start_id=VOCABULARY_SIZE, context_length=1,
        )  # fmt: skip
        plain = Plain(cell, options.hidden_size, options.layers)
        counts = {"plain": options.tokens // 20, "one": options.tokens, "many": options.tokens // 4}
        steps = {
            "plain": lambda plain=plain, count=counts["plain"]: plain.take(count),
            "one": endless(model, 1, counts["one"]),
            "many": endless(model, options.streams, counts["many"]),
        }
        seconds = take_turns(steps, turns=options.turns)
        per_token = {name: [turn / counts[name] for turn in turns] for name, turns in seconds.items()}
        per_token["many"] = [turn / options.streams for turn in per_token["many"]]
        ratios = {
            "one over plain": speedup(per_token["one"], per_token["plain"]),
            "many over plain": speedup(per_token["many"], per_token["plain"]),
            "many over one": speedup(per_token["many"], per_token["one"]),
            f"time at {LATE} over {EARLY}": position_ratio(model, 4 * options.tokens, options.turns),
        }
        tokens = {name: rate(turns, 1) for name, turns in per_token.items()}
        results.append({
            "cell": cell, "layers": options.layers, "hidden_size": options.hidden_size, "streams": options.streams,
            "tokens_per_second": tokens, "ratios": ratios,
        })  # fmt: skip
        figures = " ".join(f"{tokens[name]:{width},.0f}" for name, width in (("plain", 9), ("one", 9), ("many", 10)))
        print(f"{cell:5} {figures}   " + ", ".join(f"{name} {shown(ratios[name])}" for name in ratios), flush=True)
    write_json(options.json, results)


if __name__ == "__main__":
    main()
