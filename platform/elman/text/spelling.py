"""Spelling model: the bits that an unknown symbol's own characters would have cost.

A model that says ``<unk>`` has not yet said which word. To compare it with one that spells
everything, each ``<unk>`` that hides a word (a character, at character level) is charged the bits
of spelling it: its UTF-8 bytes and an end sign, under a unigram model of bytes with add-one
smoothing, estimated from the symbols of the training split. The idea of charging the unknown is
the adjusted perplexity of Ueberla (1994), "Analysing a simple language model", Computer Speech and
Language 8; spelling it out byte by byte instead of spreading it evenly makes the vocabulary open, as
in Mielke & Eisner (2019), "Spell Once, Summon Anywhere", arXiv:1804.08205, whose speller is an RNN
where ours is a unigram: ours is a simple, pessimistic upper bound, and the same for all models.

An ``<unk>`` that stands in the text itself hides nothing, since there the text is masked; it pays nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SpellingModel:
    """Unigram model of bytes with an end sign; ``bits_of_sign`` (257,) gives the price of each, the end's last."""

    bits_of_sign: NDArray[np.float64]

    @classmethod
    def from_counts(cls, counts: Mapping[str, int]) -> SpellingModel:
        """Estimate from how often each symbol occurs in the training text."""
        signs = np.zeros(257, dtype=np.float64)
        raw = [symbol.encode("utf-8", "surrogatepass") for symbol in counts]
        if raw:
            letters = np.frombuffer(b"".join(raw), dtype=np.uint8)
            lengths = np.fromiter(map(len, raw), dtype=np.int64, count=len(raw))
            times = np.fromiter(counts.values(), dtype=np.int64, count=len(raw))
            signs[:256] = np.bincount(letters, weights=np.repeat(times, lengths), minlength=256)
            signs[256] = times.sum()
        return cls(np.log2(signs.sum() + 257) - np.log2(signs + 1))

    @classmethod
    def from_bits(cls, bits: Sequence[float]) -> SpellingModel:
        """Restore one from its ``bits_of_sign``."""
        return cls(np.array(bits, dtype=np.float64))

    def bits(self, symbol: str) -> float:
        """Bits that spell one symbol."""
        signs = np.frombuffer(symbol.encode("utf-8", "surrogatepass"), dtype=np.uint8)
        return float(self.bits_of_sign[signs].sum() + self.bits_of_sign[256])
