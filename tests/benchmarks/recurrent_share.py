"""How much of the processor's own bfloat16 rate a recurrent layer reaches, forward and backward.

    python tests/benchmarks/recurrent_share.py --hidden-size 512

Counted are the products that no layer can do without: of the state forward, of the gates'
gradients backward, and of both for the weights' gradient. The rate is that of large squares.
"""

from __future__ import annotations

import statistics

import torch
from harness import environment, matrix_rate, parser, take_turns, write_json

from elman.config.schema import ModelConfig
from elman.models.fused import Rows
from elman.models.recurrent import RecurrentLayer

GATES = {"rnn": 1, "lstm": 4, "gru": 3, "gru_reset_before": 3}
ROWS, BATCH_SIZE, SEQUENCE_LENGTH = 66, 64, 128


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--cells", nargs="+", choices=GATES, default=list(GATES), help="cells to measure")
    arguments.add_argument("--hidden-size", type=int, default=512, help="hidden units")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size = options.hidden_size
    print(environment())
    print(f"{'cell':16} {'forward':>10} {'backward':>10} {'share':>6}")
    results = []
    for cell in options.cells:
        layer = RecurrentLayer(ModelConfig(cell=cell), size, size)
        x = Rows(torch.randn(ROWS, size, requires_grad=True), torch.randint(ROWS, (BATCH_SIZE, SEQUENCE_LENGTH)))
        state = tuple(part.expand(BATCH_SIZE, size) for part in layer.initial_state())
        d_outputs = torch.randn(SEQUENCE_LENGTH, BATCH_SIZE, size).bfloat16().transpose(0, 1)
        outputs: list[torch.Tensor] = []

        def forward() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                outputs[:] = [layer(x, state)[0]]  # noqa: B023 - called in this very turn

        steps = {"forward": forward, "backward": lambda: outputs[0].backward(d_outputs)}  # noqa: B023
        seconds = take_turns(steps, turns=options.turns)
        peak = matrix_rate(torch.bfloat16)
        medians = {name: statistics.median(turns) for name, turns in seconds.items()}
        operations = 3 * 2 * BATCH_SIZE * SEQUENCE_LENGTH * size * size * GATES[cell]
        share = operations / sum(medians.values()) / peak
        results.append({"cell": cell, "hidden_size": size, "seconds": medians, "share": share, "matrix_rate": peak})
        figures = " ".join(f"{median * 1e3:7.1f} ms" for median in medians.values())
        print(f"{cell:16} {figures} {share:6.0%}", flush=True)
    write_json(options.json, results)


if __name__ == "__main__":
    main()
