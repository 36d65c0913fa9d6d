"""The carry between windows: one inner tuple of tensors per layer, every tensor batch-first.

Shape suffixes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

State = tuple[tuple[Tensor, ...], ...]


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply ``function`` to every tensor of the carry."""
    return tuple(tuple(function(tensor) for tensor in part) for part in state)


def detach(state: State) -> State:
    """Cut the carry from its graph, so that no gradient crosses the window's border."""
    return map_state(Tensor.detach, state)


def select(state: State, rows: Tensor) -> State:
    """Take ``rows`` (int64, any length) of the batch, with repetition: beams that fork."""
    return map_state(lambda tensor: tensor.index_select(0, rows), state)


def expand(state: State, batch_size: int) -> State:
    """Repeat a carry of one row ``batch_size`` times, sharing memory."""
    return map_state(lambda tensor: tensor.expand(batch_size, *tensor.shape[1:]), state)


def to_device(state: State, device: torch.device | str) -> State:
    """Move the carry to ``device``."""
    return map_state(lambda tensor: tensor.to(device), state)


def replace_rows(state: State, other: State, rows_B: Tensor) -> State:
    """Put the rows of ``other`` where ``rows_B`` is True and leave the rest as it is."""
    return tuple(
        tuple(
            torch.where(rows_B.view(-1, *(1,) * (kept.dim() - 1)), put, kept)
            for kept, put in zip(part, other_part, strict=True)
        )
        for part, other_part in zip(state, other, strict=True)
    )


def pieces(resets_BT: Tensor) -> Iterator[tuple[int, int, Tensor | None]]:
    """Cut a window wherever a row's state is reset.

    Yields:
        First step and end of each piece, and the rows (B) that are reset before it; None where none is.
    """
    columns = resets_BT.any(0).nonzero().flatten().tolist()
    for begin, end in pairwise(sorted({0, *columns, resets_BT.shape[1]})):
        yield begin, end, resets_BT[:, begin] if begin in columns else None
