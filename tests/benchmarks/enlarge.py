"""A text of any size for benchmarks: the Bible over and over, with ever other words in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from elman.text.builtin import read_builtin

_NEW_WORDS = 0.03  # share of the words that get a tail, so that the vocabulary grows with the text


def enlarged(megabytes: float, *, line_ends: bool = True) -> Iterator[bytes]:
    """UTF-8 in blocks of a few megabytes, ``megabytes`` in all; without ``line_ends`` it is a single line."""
    words = "".join(text for batch in read_builtin("bible-asv", "train", (0.0, 0.0)) for text, _ in batch).split(" ")
    draw = np.random.default_rng(1)
    left = round(megabytes * 1e6)
    while left > 0:
        copy = list(words)
        places = np.flatnonzero(draw.random(len(words)) < _NEW_WORDS)
        tails = np.minimum(draw.pareto(0.6, len(places)), 1e6).astype(int)
        for place, tail in zip(places.tolist(), tails.tolist(), strict=True):
            copy[place] = f"{copy[place]}{tail:x}"
        text = " ".join(copy) + "\n"
        block = (text if line_ends else text.replace("\n", " ")).encode()[:left]
        left -= len(block)
        yield block if left else block.decode("utf-8", "ignore").encode()  # no half character at the end


def write_enlarged(path: Path, megabytes: float, *, line_ends: bool = True) -> Path:
    """Write such a text to a file."""
    with path.open("wb") as file:
        file.writelines(enlarged(megabytes, line_ends=line_ends))
    return path
