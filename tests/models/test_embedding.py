"""A large embedding is torch's, and its gradient's memory serves again without being shared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from elman.models import embedding, memory
from elman.models.embedding import Embedding

V, E = 5000, 64


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "LARGE_BYTES", 2**20)


def pair() -> tuple[Embedding, nn.Embedding]:
    """The same weights in both."""
    torch.manual_seed(0)
    ours, theirs = Embedding(V, E), nn.Embedding(V, E)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gradient(module: nn.Embedding, tokens_BT: Tensor, factors: Tensor) -> Tensor:
    module.zero_grad()
    (module(tokens_BT) * factors).sum().backward()
    assert module.weight.grad is not None
    return module.weight.grad


def test_rows_and_gradients_are_torch_s_to_the_bit_window_after_window() -> None:
    ours, theirs = pair()
    for _ in range(4):  # other rows each time, of which some occur often
        tokens_BT = torch.randint(40, (8, 25)) * torch.randint(120, ())
        assert torch.equal(ours(tokens_BT), theirs(tokens_BT))
        factors = torch.randn(8, 25, E)
        assert torch.equal(gradient(ours, tokens_BT, factors), gradient(theirs, tokens_BT, factors))


def test_a_gradient_that_is_held_stays_and_one_that_is_freed_serves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free", [])
    ours, theirs = pair()
    tokens_BT, factors = torch.randint(V, (4, 9)), torch.randn(4, 9, E)
    held = gradient(ours, tokens_BT, factors)
    kept, place = held.clone(), held.data_ptr()
    assert gradient(ours, tokens_BT, 2 * factors).data_ptr() != place
    assert torch.equal(held, kept)
    del held
    assert gradient(ours, tokens_BT.flip(0), factors).data_ptr() == place
    assert torch.equal(ours.weight.grad, gradient(theirs, tokens_BT.flip(0), factors))


def test_gradients_of_several_windows_add_up() -> None:
    ours, theirs = pair()
    windows = [(torch.randint(V, (4, 9)), torch.randn(4, 9, E)) for _ in range(3)]
    for module in (ours, theirs):
        for tokens_BT, factors in windows:
            (module(tokens_BT) * factors).sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_a_sparse_gradient_is_left_to_torch() -> None:
    ours, _ = pair()
    ours.sparse = True
    ours(torch.tensor([[1, 2]])).sum().backward()
    assert ours.weight.grad.is_sparse


def test_a_token_without_a_row_is_refused() -> None:
    with pytest.raises(IndexError):
        pair()[0](torch.tensor([[V]]))
