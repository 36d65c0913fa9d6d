from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elman.data.windows import IGNORED, StreamLoader, TokenFile, Window, WindowLoader, window_lengths

START = 1000


def loader(count: int, batch_size: int, sequence_length: int, **named: Any) -> WindowLoader:
    tokens = np.arange(count, dtype=np.uint16)
    return WindowLoader(tokens, batch_size=batch_size, sequence_length=sequence_length, start_id=START, **named)


def targets_of(windows: list[Window]) -> list[int]:
    found = torch.cat([w.targets_BT.flatten() for w in windows])
    return sorted(found[found != IGNORED].tolist())


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 12), st.booleans())
def test_every_token_is_a_target_exactly_once(count: int, batch: int, length: int, variable: bool) -> None:
    windows = list(loader(count, batch, length, variable_seed=(3, 1) if variable else None))
    assert targets_of(windows) == list(range(count))


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 12))
def test_the_input_at_every_position_is_the_token_before_its_target(count: int, batch: int, length: int) -> None:
    for window in loader(count, batch, length):
        inputs, targets = window.inputs_BT.flatten(), window.targets_BT.flatten()
        for before, after in zip(inputs.tolist(), targets.tolist(), strict=True):
            if after != IGNORED:
                assert before == (after - 1 if after else START)


def test_rows_go_on_from_window_to_window() -> None:
    windows = list(loader(103, 4, 10))
    for first, second in pairwise(windows):
        assert (second.inputs_BT[:, 0] == first.targets_BT[:, -1])[second.targets_BT[:, 0] != IGNORED].all()


def test_only_the_first_window_begins_a_pass() -> None:
    assert [w.is_first for w in loader(100, 2, 10)] == [True, False, False, False, False]


def test_a_loader_can_be_walked_again() -> None:
    walked = loader(57, 3, 5)
    assert targets_of(list(walked)) == targets_of(list(walked)) == list(range(57))


def test_a_restored_loader_goes_on_where_the_other_stopped() -> None:
    whole = list(loader(200, 3, 7, variable_seed=(1, 2)))
    first = loader(200, 3, 7, variable_seed=(1, 2))
    walk = iter(first)
    head = [next(walk) for _ in range(4)]
    second = loader(200, 3, 7, variable_seed=(1, 2))
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert len(head) + len(rest) == len(whole)
    for a, b in zip([*head, *rest], whole, strict=True):
        assert torch.equal(a.inputs_BT, b.inputs_BT)
        assert torch.equal(a.targets_BT, b.targets_BT)
    assert targets_of(list(second)) == list(range(200))


def test_drawn_lengths_vary_around_the_nominal_one_and_repeat_with_their_seed() -> None:
    lengths = window_lengths(100_000, 70, np.random.default_rng(5))
    assert lengths == window_lengths(100_000, 70, np.random.default_rng(5))
    assert sum(lengths) == 100_000
    assert min(lengths[:-1]) >= 5
    assert 65 < np.mean(lengths) < 71
    short = np.mean(np.array(lengths) < 50)
    assert 0.02 < short < 0.09


def test_a_document_border_resets_and_starts_anew() -> None:
    [window] = loader(12, 2, 6, document_starts=np.array([0, 4, 9]))
    assert window.resets_BT is not None
    assert window.resets_BT.nonzero().tolist() == [[0, 0], [0, 4], [1, 3]]
    assert window.inputs_BT.tolist() == [[START, 0, 1, 2, START, 4], [5, 6, 7, START, 9, 10]]


def test_a_window_without_borders_has_no_resets() -> None:
    windows = list(loader(40, 1, 10, document_starts=np.array([0])))
    assert windows[0].resets_BT is not None
    assert all(w.resets_BT is None for w in windows[1:])


@pytest.mark.parametrize("sizes", [[50], [7, 3, 20, 1, 1, 9], [1] * 30, [0, 5, 0]])
def test_a_stream_gives_every_token_once_and_keeps_pieces_contiguous(sizes: list[int]) -> None:
    def pieces() -> Iterator[tuple[np.ndarray, bool]]:
        begin = 0
        for size in sizes:
            yield np.arange(begin, begin + size, dtype=np.uint8), True
            begin += size

    walked = StreamLoader(pieces, batch_size=3, sequence_length=4, start_id=START)
    windows = list(walked)
    assert targets_of(windows) == list(range(sum(sizes)))
    assert targets_of(list(walked)) == list(range(sum(sizes)))
    starts = {0, *np.cumsum(sizes).tolist()}
    for row in range(3):
        targets = [t for w in windows for t in w.targets_BT[row].tolist() if t != IGNORED]
        inputs = [i for w in windows for i, t in zip(w.inputs_BT[row].tolist(), w.targets_BT[row].tolist(), strict=True)
                  if t != IGNORED]  # fmt: skip
        assert inputs[1:] == targets[:-1]
        assert all(b == a + 1 or b in starts for a, b in pairwise(targets))


def test_a_stream_marks_documents_where_asked() -> None:
    def pieces() -> Iterator[tuple[np.ndarray, bool]]:
        yield np.arange(3), True
        yield np.arange(3, 6), False
        yield np.arange(6, 9), True

    [first, second, third] = StreamLoader(
        pieces, batch_size=1, sequence_length=3, start_id=START, reset_at_documents=True
    )
    assert first.resets_BT is not None
    assert second.resets_BT is None
    assert third.resets_BT is not None
    assert third.inputs_BT.tolist() == [[START, 6, 7]]


def test_a_token_file_reads_what_was_written_after_its_pages_were_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elman.data.windows.RELEASE_BYTES", 100)
    path = tmp_path / "tokens.bin"
    np.arange(10_000, dtype="<u2").tofile(path)
    file = TokenFile(path, np.uint16)
    walked = WindowLoader(file.tokens, batch_size=4, sequence_length=50, start_id=START, on_read=file.note_read)
    assert targets_of(list(walked)) == list(range(10_000))


@pytest.mark.parametrize("stop", [0, 1, 4, 6])
def test_a_stream_goes_on_at_the_window_where_it_was_left(stop: int) -> None:
    def pieces() -> Iterator[tuple[Any, bool]]:
        for begin in range(0, 60, 7):
            yield np.arange(begin, min(begin + 7, 60)), begin % 21 == 0

    def loader() -> StreamLoader:
        return StreamLoader(pieces, batch_size=3, sequence_length=4, start_id=START, reset_at_documents=True)

    whole, first, second = list(loader()), loader(), loader()
    for _, _ in zip(range(stop), first, strict=False):
        pass
    second.load_state_dict({"next": stop})
    rest = list(second)
    assert len(rest) == len(whole) - stop
    for expected, found in zip(whole[stop:], rest, strict=True):
        assert torch.equal(expected.inputs_BT, found.inputs_BT)
        assert torch.equal(expected.targets_BT, found.targets_BT)
        assert expected.is_first == found.is_first
    assert second.state_dict() == {"next": len(whole)}
    assert len(list(second)) == len(whole)  # the next pass is a whole one
