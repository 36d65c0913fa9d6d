"""What the Transformer's cache holds, and how far back attention reaches."""

from __future__ import annotations

from collections.abc import Callable

import torch

from elman.models.language_model import LanguageModel

Tiny = Callable[..., LanguageModel]


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(7, shape, generator=torch.Generator().manual_seed(5))


def test_a_position_sees_itself_and_context_length_tokens_before_it(tiny: Tiny) -> None:
    model = tiny("transformer", num_layers=1, context_length=3)
    tokens_BT = tokens(1, 10)
    for where in ("one window", "two windows"):
        reach = []
        for changed in range(10):
            other_BT = tokens_BT.clone()
            other_BT[:, changed] = (other_BT[:, changed] + 1) % 7
            if where == "one window":
                last, other = model(tokens_BT)[0][:, -1], model(other_BT)[0][:, -1]
            else:
                last = model(tokens_BT[:, 8:], model(tokens_BT[:, :8])[1])[0][:, -1]
                other = model(other_BT[:, 8:], model(other_BT[:, :8])[1])[0][:, -1]
            reach.append(not torch.equal(last, other))
        assert reach == [False] * 6 + [True] * 4


def test_many_windows_of_any_length_equal_one(tiny: Tiny) -> None:
    model = tiny("transformer", num_layers=3, context_length=4)
    tokens_BT = tokens(2, 23)
    pieces, state = [], None
    for piece_BT in tokens_BT.split([1, 9, 2, 1, 7, 3], dim=1):
        logits_BTV, state = model(piece_BT, state)
        pieces.append(logits_BTV)
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens_BT)[0], rtol=0, atol=1e-10)


def test_cache_keeps_its_size(tiny: Tiny) -> None:
    model = tiny("transformer", context_length=4)
    fresh = model.initial_state(2)
    _, state = model(tokens(2, 9), model(tokens(2, 3))[1])
    assert [t.shape for part in state for t in part] == [t.shape for part in fresh for t in part]
    assert state[0][0].shape == (2, 2, 4, 4)


def test_cache_of_a_fresh_row_is_invalid_until_it_fills(tiny: Tiny) -> None:
    model = tiny("transformer", context_length=4)
    _, state = model(tokens(2, 3))
    assert state[-1][0].tolist() == [[False, True, True, True]] * 2
    reset = model.reset(state, torch.tensor([False, True]))
    assert reset[-1][0].tolist() == [[False, True, True, True], [False] * 4]


def test_order_of_tokens_matters(tiny: Tiny) -> None:
    model = tiny("transformer", num_layers=1, context_length=4)
    one, other = model(torch.tensor([[1, 2, 3]]))[0][:, -1], model(torch.tensor([[2, 1, 3]]))[0][:, -1]
    assert not torch.allclose(one, other)
