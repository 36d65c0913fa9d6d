"""How soon a recipe reaches a validation loss on a corpus, from the start of the command.

    python tests/benchmarks/recipe.py --config pipelines/experiments/characters-fast.yaml --corpus FILE

The whole command runs as a user would run it, in a process and a store of its own, with the first nine tenths
of the corpus for training and the rest for validation. Printed are the seconds from its start to each target
(nats per character, the state carried over the split), the best loss, and what the same model scores on
windows that are drawn at random and read without a state before them, as nanoGPT estimates its loss
(https://github.com/karpathy/nanoGPT, windows of 256 characters).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness import corpus_name, elsewhere, parser, write_json
from torch.nn import functional as F

from elman.config.schema import TrackingConfig
from elman.tasks.hardware import set_threads
from elman.text.prepare import prepare
from elman.text.prepared import PreparedSplit
from elman.tracking.store import RunStore
from elman.training.loading import LoadedModel, load_model

WINDOW = 256
RECIPE = Path(__file__).parents[2] / "pipelines" / "experiments" / "characters-fast.yaml"


@torch.inference_mode()
def windowed_loss(loaded: LoadedModel, windows: int) -> float:
    """Mean loss over windows drawn from the validation split, nats; each begins without a state."""
    split = prepare(loaded.config.corpus).splits["validation"]
    assert isinstance(split, PreparedSplit)
    tokens = torch.as_tensor(split.open().astype("int64"))
    draw = torch.Generator().manual_seed(1)
    starts = torch.randint(len(tokens) - WINDOW - 1, (windows,), generator=draw)
    model = loaded.model.eval()
    total = 0.0
    for part in starts.split(64):
        windows_BT = torch.stack([tokens[i : i + WINDOW + 1] for i in part.tolist()])
        logits_BTV, _ = model(windows_BT[:, :-1])
        total += float(F.cross_entropy(logits_BTV.flatten(0, 1), windows_BT[:, 1:].flatten(), reduction="sum"))
    return total / (windows * WINDOW)


def curve(store: RunStore, run_id: str, begun: float) -> list[tuple[float, float]]:
    """(seconds since the command began, validation loss)."""
    points = store.client.get_metric_history(run_id, "val/loss")
    return [(point.timestamp / 1000 - begun, point.value) for point in sorted(points, key=lambda p: p.step)]


def run(options: Any) -> dict[str, Any]:
    """One whole command, and what came of it."""
    command = [sys.executable, "-m", "elman.cli", "train", "--config", str(options.config),
               "--corpus.name", options.corpus, "--corpus.validation_fraction", "0.1",
               "--corpus.test_fraction", "0", "--json", "--trainer.threads", str(options.threads),
               *options.settings]  # fmt: skip
    begun = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.time() - begun
    if done.returncode:
        raise SystemExit(done.stderr)
    answer = json.loads(done.stdout)
    store = RunStore(TrackingConfig())
    points = curve(store, answer["run_id"], begun)
    reached = {str(target): next((at for at, loss in points if loss <= target), None) for target in options.targets}
    return {
        "recipe": options.config.stem, "corpus": Path(options.corpus).name, "seconds": seconds,
        "tokens_per_second": answer["tokens_per_second"], "best": answer["metrics"]["val/loss"], "reached": reached,
        "windowed": windowed_loss(load_model(answer["run_id"], store), options.windows), "curve": points,
    }  # fmt: skip


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(turns=1)
    arguments.add_argument("--config", type=Path, default=RECIPE, help="experiment file")
    arguments.add_argument("--corpus", default="bible-asv", help="corpus.name: a text file, or a built-in")
    arguments.add_argument("--targets", type=float, nargs="+", default=[1.52, 1.4697, 1.45, 1.4], help="nats")
    arguments.add_argument("--windows", type=int, default=512, help="windows drawn")
    arguments.add_argument("settings", nargs="*", help="more flags of elman train, after --")
    options = arguments.parse_args()
    options.config = options.config.absolute()
    options.corpus = corpus_name(options.corpus)
    set_threads(options.threads)
    results = []
    for _ in range(options.turns):
        with elsewhere():
            result = run(options)
        results.append(result)
        print(f"{result['recipe']} on {result['corpus']}: best {result['best']:.4f} nats, {result['seconds']:.0f} s "
              f"in all, {result['tokens_per_second']:,.0f} tokens/s; in windows of {WINDOW}: {result['windowed']:.4f}")
        for target, at in result["reached"].items():
            print(f"  {float(target):.4f} nats: " + ("not reached" if at is None else f"after {at:.0f} s"))
    write_json(options.json, results)


if __name__ == "__main__":
    main()
