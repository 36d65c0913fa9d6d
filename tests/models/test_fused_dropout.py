"""The compiled dropout: its random words are Philox's, and backward drops what forward did."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from elman.models import fused_dropout
from elman.models.fused_dropout import dropout
from kernel_support import BUILDS, library_of

P = 0.3
SIZE = fused_dropout.FEWEST


@pytest.fixture(params=BUILDS, autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel in both of its builds."""
    made = fused_dropout._by_type(library_of(fused_dropout.SOURCE, request.param))
    monkeypatch.setattr(fused_dropout, "_kernels", lambda: made)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def philox(key: int, counter: int) -> list[int]:
    """Philox4x32-10 as its authors define it."""
    words = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    keys = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [(second >> 32) ^ words[1] ^ keys[0], second & 0xFFFFFFFF,
                 (first >> 32) ^ words[3] ^ keys[1], first & 0xFFFFFFFF]  # fmt: skip
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return words


def test_reference_is_that_of_the_paper() -> None:
    # The known answers that come with the authors' library: key and counter all zeros.
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_element_goes_where_its_random_word_is_small(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    torch.manual_seed(3)
    dropped = dropout(torch.ones(SIZE + 7, dtype=dtype), P)
    words = [philox(seed, counter) for counter in range(SIZE // 4 + 16)]
    where = [words[16 * (i // 64) + i % 16][i % 64 // 16] for i in (*range(200), *range(SIZE - 70, SIZE + 7))]
    expected = torch.tensor([0.0 if word < round(P * 2**32) else 1 / (1 - P) for word in where]).to(dtype)
    assert torch.equal(torch.cat((dropped[:200], dropped[SIZE - 70 :])), expected)


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_where_values_did_whatever_their_layout(dtype: torch.dtype, time_major: bool) -> None:
    x = torch.randn(30, 20, 64).to(dtype)
    x = (x.transpose(0, 1) if time_major else x).requires_grad_()
    dropped = dropout(x, P)
    d_dropped = torch.randn(dropped.shape).to(dtype)
    for laid_out in (d_dropped, d_dropped.transpose(0, 1).contiguous().transpose(0, 1)):
        [d_x] = torch.autograd.grad(dropped, [x], laid_out, retain_graph=True)
        scale = (dropped.detach() != 0).to(torch.float32) / (1 - P)
        assert torch.equal(d_x, (d_dropped.float() * scale).to(dtype))
        assert torch.equal(dropped.detach(), (x.detach().float() * scale).to(dtype))


def drawn(threads: int, seed: int) -> Tensor:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    return dropout(torch.ones(5, SIZE), P)


def test_a_mask_is_its_seeds_whatever_the_threads_and_the_next_one_differs() -> None:
    assert torch.equal(drawn(1, 0), drawn(3, 0))
    assert not torch.equal(drawn(1, 0), drawn(1, 1))
    assert not torch.equal(dropout(torch.ones(SIZE), P), dropout(torch.ones(SIZE), P))


def test_the_share_that_goes_is_p_and_neighbours_go_independently() -> None:
    for p in (0.01, 0.5, 0.99):
        torch.manual_seed(1)
        gone = dropout(torch.ones(2**20), p) == 0
        share = gone.double().mean().item()
        assert abs(share - p) < 5 * (p * (1 - p) / 2**20) ** 0.5
        for distance in (1, 16, 64):
            both = (gone[distance:] & gone[:-distance]).double().mean().item()
            assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / 2**20) ** 0.5 + 2e-4


def test_without_a_compiler_torch_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_dropout, "_kernels", lambda: None)
    dropped = dropout(torch.ones(4 * SIZE), P)
    assert abs((dropped == 0).double().mean().item() - P) < 0.02
