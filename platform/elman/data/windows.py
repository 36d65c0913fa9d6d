"""Contiguous windows for truncated back-propagation through time.

The token stream is folded into B contiguous rows, and the rows are walked together in
windows of T steps, so that the state after one window is the state before the next.
Every token of the stream is a target exactly once in a pass; its input is the token
before it. Rows differ by one token at most: where the shorter ones have ended, the
target is IGNORED.

Source: Williams & Peng (1990), doi:10.1162/neco.1990.2.4.490 (truncation);
Merity et al. (2018), arXiv:1708.02182, section 5.1 (window lengths drawn at random).

Shape suffixes: B batch, T time steps.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IGNORED = -100
"""Target of a position that has none; torch's cross-entropy skips it."""

RELEASE_BYTES = 32 * 2**20
"""Read this much of a memory map, then let go of its pages: they would count as this process's memory."""


class Window(NamedTuple):
    """One step of truncated back-propagation through time.

    Attributes:
        inputs_BT: Token ids, int64.
        targets_BT: The next token at each position, int64, or IGNORED.
        resets_BT: True where the state must be reset before the position; None where nowhere.
        is_first: The window begins a pass: the state starts anew.
    """

    inputs_BT: Tensor
    targets_BT: Tensor
    resets_BT: Tensor | None
    is_first: bool

    def to(self, device: torch.device, non_blocking: bool = False) -> Window:
        """The same window on ``device``; a GPU copy overlaps with computation."""
        move = {"device": device, "non_blocking": non_blocking}
        resets = None if self.resets_BT is None else self.resets_BT.to(**move)  # type: ignore[call-overload]
        return Window(self.inputs_BT.to(**move), self.targets_BT.to(**move), resets, self.is_first)  # type: ignore[call-overload]


class TokenFile:
    """A file of tokens, memory-mapped: it costs address space, not memory.

    Args:
        path: Raw tokens, little-endian.
        dtype: Their unsigned integer type.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._path, self._dtype = path, np.dtype(dtype)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.tokens: npt.NDArray[Any] = np.frombuffer(self._map, dtype=self._dtype)
        self._read = 0

    def note_read(self, count: int) -> None:
        """Account for ``count`` tokens read, and release the pages from time to time."""
        self._read += count * self._dtype.itemsize
        if self._read >= RELEASE_BYTES:
            # The page cache keeps them: reading on costs a minor fault, not the disk.
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read = 0


def window_lengths(total: int, sequence_length: int, rng: np.random.Generator | None) -> list[int]:
    """Lengths of the windows that cover ``total`` steps, drawn around ``sequence_length`` where ``rng`` is given.

    The draw is Merity et al.'s: with probability 0.95 around sequence_length, else around
    half of it, with a standard deviation of 5 and at least 5 tokens.
    """
    lengths, left = [], total
    while left > 0:
        length = sequence_length
        if rng is not None:
            centre = sequence_length if rng.random() < 0.95 else sequence_length / 2
            length = max(min(5, sequence_length), round(rng.normal(centre, 5)))
        lengths.append(min(length, left))
        left -= lengths[-1]
    return lengths


class WindowLoader:
    """One pass over a token stream, window by window.

    Args:
        tokens: The stream, any integer type.
        batch_size: B, rows.
        sequence_length: T, steps in a window.
        start_id: Input before the first token of the stream (and of a document, with ``document_starts``).
        variable_seed: Draws window lengths where given; the same seed draws the same.
        document_starts: Offsets at which the state is reset, ascending; None carries it across.
        on_read: Told how many tokens each window read.
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        *,
        batch_size: int,
        sequence_length: int,
        start_id: int,
        variable_seed: tuple[int, int] | None = None,
        document_starts: npt.NDArray[Any] | None = None,
        on_read: Callable[[int], None] | None = None,
    ) -> None:
        self._tokens, self._start_id = tokens, start_id
        base, extra = divmod(len(tokens), batch_size)
        row = np.arange(batch_size)
        self._begin_B = row * base + np.minimum(row, extra)
        self._length_B = base + (row < extra)
        rng = None if variable_seed is None else np.random.default_rng(variable_seed)
        self._lengths = window_lengths(int(self._length_B.max()), sequence_length, rng)
        self._starts = None if document_starts is None else np.asarray(document_starts)
        self._on_read = on_read
        self._next = self._from = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[Window]:
        first, self._from = self._from, 0
        begin = sum(self._lengths[:first])
        for index in range(first, len(self._lengths)):
            length = self._lengths[index]
            self._next = index + 1
            yield self._window(begin, length)
            begin += length

    def _window(self, begin: int, length: int) -> Window:
        column_T = np.arange(begin, begin + length)
        position_BT = self._begin_B[:, None] + column_T
        ended_BT = column_T >= self._length_B[:, None]
        position_BT[ended_BT] = 0
        targets_BT = self._tokens[position_BT].astype(np.int64)
        inputs_BT = self._tokens[np.maximum(position_BT - 1, 0)].astype(np.int64)
        inputs_BT[position_BT == 0] = self._start_id
        targets_BT[ended_BT] = IGNORED
        resets = None
        if self._starts is not None and len(self._starts):
            at = np.minimum(np.searchsorted(self._starts, position_BT), len(self._starts) - 1)
            resets_BT = (self._starts[at] == position_BT) & ~ended_BT
            inputs_BT[resets_BT] = self._start_id
            resets = torch.from_numpy(resets_BT) if resets_BT.any() else None
        if self._on_read is not None:
            self._on_read(position_BT.size)
        return Window(torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT), resets, is_first=begin == 0)

    def state_dict(self) -> dict[str, int]:
        """Where the pass stands: the next window."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next pass where ``state_dict`` was taken."""
        self._next = self._from = state["next"]


class StreamLoader:
    """One pass over a corpus that is read on the fly.

    A stream has no length and cannot be folded. Its pieces (contiguous text) are dealt to
    the row that has least in store, so that each row is a chain of whole pieces.

    Args:
        pieces: Yields token arrays, each with whether it begins a document.
        batch_size: B, rows.
        sequence_length: T, steps in a window.
        start_id: Input before the first token of each row (and of a document, with ``reset_at_documents``).
        reset_at_documents: Mark document borders as resets.
    """

    def __init__(
        self,
        pieces: Callable[[], Iterator[tuple[npt.NDArray[Any], bool]]],
        *,
        batch_size: int,
        sequence_length: int,
        start_id: int,
        reset_at_documents: bool = False,
    ) -> None:
        self._pieces, self._B, self._T, self._start_id = pieces, batch_size, sequence_length, start_id
        self._mark = reset_at_documents
        self._next = self._from = 0

    def state_dict(self) -> dict[str, int]:
        """Where the pass stands: the next window."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next pass where ``state_dict`` was taken; what lies before is read again, there is no other way."""
        self._next = self._from = state["next"]

    def __iter__(self) -> Iterator[Window]:
        first, self._from = self._from, 0
        for index, window in enumerate(self._windows()):
            if index >= first:
                self._next = index + 1
                yield window

    def _windows(self) -> Iterator[Window]:
        tokens_B = [np.empty(0, np.int64) for _ in range(self._B)]
        resets_B = [np.empty(0, np.bool_) for _ in range(self._B)]
        previous_B = np.full(self._B, self._start_id, np.int64)
        is_first = True
        pieces = self._pieces()
        exhausted = False
        while True:
            while not exhausted and min(map(len, tokens_B)) < self._T:
                piece = next(pieces, None)
                if piece is None:
                    exhausted = True
                    break
                row = min(range(self._B), key=lambda b: len(tokens_B[b]))
                marks = np.zeros(len(piece[0]), np.bool_)
                marks[:1] = piece[1] and self._mark
                tokens_B[row] = np.concatenate([tokens_B[row], piece[0].astype(np.int64)])
                resets_B[row] = np.concatenate([resets_B[row], marks])
            length = min(self._T, max(map(len, tokens_B)))
            if length == 0:
                return
            targets_BT = np.full((self._B, length), IGNORED, np.int64)
            inputs_BT = np.full((self._B, length), self._start_id, np.int64)
            resets_BT = np.zeros((self._B, length), np.bool_)
            for b in range(self._B):
                held = tokens_B[b][:length]
                n = len(held)
                if n == 0:
                    continue
                targets_BT[b, :n], resets_BT[b, :n] = held, resets_B[b][:n]
                inputs_BT[b, 0], inputs_BT[b, 1:n] = previous_B[b], held[:-1]
                previous_B[b] = held[-1]
                tokens_B[b], resets_B[b] = tokens_B[b][n:], resets_B[b][n:]
            inputs_BT[resets_BT] = self._start_id
            resets = torch.from_numpy(resets_BT) if resets_BT.any() else None
            yield Window(torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT), resets, is_first)
            is_first = False
