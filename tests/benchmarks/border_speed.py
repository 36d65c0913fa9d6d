"""Steps whose windows have documents' borders in them, against the same without.

    python tests/benchmarks/border_speed.py --cells lstm gru --borders 8 96

At a border the state of one row starts anew (data.reset_at_documents). "cut" is what one would do
with kernels that carry every row alike: the window in pieces, from border to border.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import environment, parser, rate, shown, speedup, take_turns, task_step, write_json
from torch import Tensor

from elman.config.schema import RECURRENT_CELLS, ModelConfig, OptimizerConfig
from elman.data.windows import Window
from elman.models.language_model import Features, LanguageModel
from elman.models.state import State, pieces
from elman.tasks.language_modeling import LanguageModeling

VOCABULARY_SIZE, HIDDEN_SIZE, BATCH_SIZE, SEQUENCE_LENGTH = 65, 512, 64, 64


class Cut(LanguageModel):
    """Runs a window from border to border."""

    def features(
        self, tokens_BT: Tensor, state: State | None = None, resets_BT: Tensor | None = None
    ) -> Features:
        if resets_BT is None:
            return super().features(tokens_BT, state)
        state = self.initial_state(tokens_BT.shape[0]) if state is None else state
        raw, dropped = [], []
        for begin, end, rows_B in pieces(resets_BT):
            state = state if rows_B is None else self.reset(state, rows_B)
            part = super().features(tokens_BT[:, begin:end], state)
            state = part.state
            raw.append(part.raw_BTH)
            dropped.append(part.dropped_BTH)
        return Features(torch.cat(raw, 1), torch.cat(dropped, 1), state)


def step_of(kind: type[LanguageModel], cell: str, window: Window) -> Callable[[], None]:
    config = ModelConfig(cell=cell, embedding_size=HIDDEN_SIZE, hidden_size=HIDDEN_SIZE)
    sizes = {"vocabulary_size": VOCABULARY_SIZE, "num_inputs": VOCABULARY_SIZE + 1, "start_id": VOCABULARY_SIZE}
    model = kind(config, **sizes, context_length=SEQUENCE_LENGTH)
    task = LanguageModeling(model, OptimizerConfig(), bits=None, sequence_length=SEQUENCE_LENGTH)  # type: ignore[arg-type]
    return task_step(task, lambda: window, lambda: torch.autocast("cpu", torch.bfloat16))


def main() -> None:
    arguments = parser(__doc__)
    every = (*RECURRENT_CELLS, "transformer")
    cells = arguments.add_argument("--cells", nargs="+", choices=every, help="cells to measure")
    cells.default = ["lstm", "gru", "mingru", "transformer"]
    arguments.add_argument("--borders", nargs="+", type=int, default=[8, 96], help="borders in a window")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    stream = torch.randint(VOCABULARY_SIZE, (BATCH_SIZE, SEQUENCE_LENGTH + 1))
    window = Window(stream[:, :-1].contiguous(), stream[:, 1:].contiguous(), None, False)
    print(environment())
    print(f"{'cell':<16} {'borders':>7} {'none':>9} {'cut':>9} {'elman':>9}  tokens/s; elman over none, and over cut")
    results = []
    for cell in options.cells:
        for borders in options.borders:
            places = torch.randperm(BATCH_SIZE * SEQUENCE_LENGTH)[:borders]
            resets = torch.zeros(BATCH_SIZE * SEQUENCE_LENGTH, dtype=torch.bool)
            resets[places] = True
            bordered = window._replace(resets_BT=resets.view(BATCH_SIZE, SEQUENCE_LENGTH))
            steps = {
                "none": step_of(LanguageModel, cell, window),
                "cut": step_of(Cut, cell, bordered),
                "elman": step_of(LanguageModel, cell, bordered),
            }
            seconds = take_turns(steps, turns=options.turns)
            tokens = {name: rate(turns, BATCH_SIZE * SEQUENCE_LENGTH) for name, turns in seconds.items()}
            gains = {name: speedup(seconds["elman"], seconds[name]) for name in ("none", "cut")}
            results.append({"cell": cell, "borders": borders, "tokens_per_second": tokens, "speedup": gains})
            figures = " ".join(f"{tokens[name]:9,.0f}" for name in steps)
            print(f"{cell:<16} {borders:7} {figures}  {'  '.join(map(shown, gains.values()))}", flush=True)
    write_json(options.json, results)


if __name__ == "__main__":
    main()
