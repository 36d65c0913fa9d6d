"""Megabytes per second of preparing a corpus, against the library `tokenizers` alone on all cores.

    python tests/benchmarks/prepare_speed.py --levels byte character word bpe

Ours is all that `elman train` does where the cache is cold: digest, splits, vocabulary of the training split,
tokens of every split on the disk, counts. The library trains on the first nine tenths and encodes the whole, line
by line, a megabyte at a time, and keeps the ids in memory: byte-level BPE at our settings, and WordLevel over its
WhitespaceSplit, with every word. Bytes and characters have no counterpart there. Without --corpus it is the Bible
enlarged to --megabytes, in which three words in a hundred are varied.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path

from enlarge import write_enlarged
from harness import environment, parser, rate, speedup, take_turns, write_json
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from elman.config.schema import CorpusConfig
from elman.text.prepare import prepare
from elman.text.tokenizer import BPE_VOCABULARY_SIZE

LEVELS = ("byte", "character", "word", "bpe")
AT_ONCE = 1 << 20  # characters


def with_elman(path: Path, level: str, folder: Path) -> Callable[[], object]:
    caches = (folder / f"{level}-{number}" for number in count())
    config = CorpusConfig(name=str(path), level=level)  # type: ignore[arg-type]
    return lambda: prepare(config, next(caches))


def with_tokenizers(path: Path, level: str) -> Callable[[], object]:
    def step() -> list[list[int]]:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if level == "bpe":
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            trainer = trainers.BpeTrainer(vocab_size=BPE_VOCABULARY_SIZE, min_frequency=2, show_progress=False,
                                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
        else:
            tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
            tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            trainer = trainers.WordLevelTrainer(vocab_size=10**8, special_tokens=["<unk>"], show_progress=False)
        tokenizer.train_from_iterator(lines[: len(lines) * 9 // 10], trainer)
        ids: list[list[int]] = []
        batch: list[str] = []
        held = 0
        for line in [*lines, ""]:
            batch.append(line)
            held += len(line)
            if held >= AT_ONCE or not line:
                ids += [encoding.ids for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]
                batch, held = [], 0
        return ids

    return step


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(turns=3)
    arguments.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), help="levels to measure")
    arguments.add_argument("--corpus", type=Path, help="text file to prepare instead")
    arguments.add_argument("--megabytes", type=float, default=50, help="size of the enlarged Bible")
    options = arguments.parse_args()
    print(environment())
    print(f"{'level':9} {'elman':>12} {'tokenizers':>12}   elman over tokenizers")
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = options.corpus or write_enlarged(folder / "corpus.txt", options.megabytes)
        megabytes = path.stat().st_size / 1e6
        with_elman(write_enlarged(folder / "small.txt", 0.1), "byte", folder / "small")()  # libraries are imported
        for level in options.levels:
            steps = {"elman": with_elman(path, level, folder)}
            if level in ("word", "bpe"):
                steps["tokenizers"] = with_tokenizers(path, level)
            seconds = take_turns(steps, turns=options.turns, warm_up=0)
            speed = {name: rate(turns, megabytes) for name, turns in seconds.items()}
            rates = {name: [megabytes / turn for turn in turns] for name, turns in seconds.items()}
            result = {"level": level, "megabytes": megabytes, "megabytes_per_second": rates}
            line = f"{level:9} {speed['elman']:7.1f} MB/s"
            if "tokenizers" in seconds:
                result["speedup"] = gain = speedup(seconds["elman"], seconds["tokenizers"])
                spread = f"({gain['low']:.2f}–{gain['high']:.2f})"
                line += f" {speed['tokenizers']:7.1f} MB/s   {gain['median']:.2f} {spread}"
            else:
                line += f"   ({min(rates['elman']):.1f}–{max(rates['elman']):.1f})"
            results.append(result)
            print(line, flush=True)
    write_json(options.json, results)


if __name__ == "__main__":
    main()
