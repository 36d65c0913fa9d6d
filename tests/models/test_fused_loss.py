"""The compiled loss is the cross-entropy of whole logits, as near as bfloat16 comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elman.models import fused_loss, softmax
from elman.models.softmax import linear_loss, linear_scores
from kernel_support import PRODUCTS, use_product

SHAPES = [(1, 5, 3), (7, 11, 6), (16, 33, 32), (70, 500, 100), (130, 97, 40), (64, 192, 64), (600, 65, 24)]
"""Positions, tokens, hidden units."""


@pytest.fixture(params=PRODUCTS, autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels with each kind of product that they have."""
    use_product(monkeypatch, fused_loss, request.param)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["small", "large"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two kernels, whatever the vocabulary and the targets."""
    monkeypatch.setattr(fused_loss, "is_small", lambda *_: request.param == "small")


def layer(positions: int, tokens: int, hidden_size: int) -> tuple[list[Tensor], Tensor]:
    """Features, weights and biases that bfloat16 holds exactly, and targets of which some do not count."""
    torch.manual_seed(0)
    sizes = ((positions, hidden_size), (tokens, hidden_size), (tokens,))
    tensors = [(2 * torch.randn(size) * hidden_size**-0.25).bfloat16().float().requires_grad_() for size in sizes]
    targets_N = torch.randint(tokens, (positions,))
    targets_N[3::5] = softmax.IGNORED
    return tensors, targets_N


def with_gradients(tensors: list[Tensor], targets_N: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_loss(tensors[0].bfloat16(), *tensors[1:], targets_N)
    return [loss.detach(), *torch.autograd.grad(0.3 * loss, tensors)]


def exact(tensors: list[Tensor], targets_N: Tensor) -> list[Tensor]:
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    loss = F.cross_entropy(F.linear(*doubles), targets_N, ignore_index=softmax.IGNORED, reduction="sum")
    return [loss.detach(), *torch.autograd.grad(0.3 * loss, doubles)]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_is_good_to_a_millionth_and_every_gradient_to_bfloat16(shape: tuple[int, int, int], threads: int) -> None:
    torch.set_num_threads(threads)
    tensors, targets_N = layer(*shape)
    found, expected = with_gradients(tensors, targets_N), exact(tensors, targets_N)
    assert distance(found[0], expected[0]) < 2e-6
    assert all(gradient.dtype == torch.float32 for gradient in found)
    for ours, true in zip(found[1:], expected[1:], strict=True):
        assert ours.shape == true.shape
        assert distance(ours, true) < 0.005


def test_rows_beyond_the_biases_are_no_tokens_and_their_gradient_is_nought() -> None:
    tensors, targets_N = layer(70, 97, 40)
    expected = with_gradients(tensors, targets_N)
    longer = [tensors[0], torch.cat((tensors[1].detach(), torch.full((3, 40), 100.0))).requires_grad_(), tensors[2]]
    for _ in range(2):  # the second time the gradient's memory may be what the first one left
        loss, d_features, d_weight, d_bias = with_gradients(longer, targets_N)
        assert not d_weight[97:].any()
        for found, same in zip((loss, d_features, d_weight[:97], d_bias), expected, strict=True):
            assert torch.equal(found, same)
        d_weight.fill_(torch.nan)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(IndexError, match="of 97 tokens"):
        linear_loss(longer[0].bfloat16(), *longer[1:], targets_N.clamp(min=0) + 97)
    scores = [linear_scores(given[0].bfloat16(), *given[1:], targets_N) for given in (tensors, longer)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("shape", "size"), [((70, 500, 100), 16), ((70, 500, 100), 69), ((33, 97, 40), 1)])
def test_positions_whose_scores_do_not_fit_are_scored_in_parts(
    shape: tuple[int, int, int], size: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(threads)
    tensors, targets_N = layer(*shape)
    targets_N[16:32] = softmax.IGNORED  # a whole part
    whole = with_gradients(tensors, targets_N)
    monkeypatch.setattr(fused_loss, "KEPT_LOGITS", size * shape[1])
    monkeypatch.setattr(fused_loss, "FEWEST_POSITIONS", 1)
    found, expected = with_gradients(tensors, targets_N), exact(tensors, targets_N)
    for ours, other, true in zip(found, whole, expected, strict=True):
        assert distance(ours, true) < 0.005
        assert distance(ours, other.double()) < 1e-4  # but for what was rounded with another largest score


def test_where_no_target_counts_loss_and_gradients_are_zero() -> None:
    tensors, targets_N = layer(20, 50, 32)
    found = with_gradients(tensors, torch.full_like(targets_N, softmax.IGNORED))
    assert all(not value.any() for value in found)


def test_a_confident_prediction_has_its_own_small_gradient() -> None:
    (features_NH, weight_VH, bias_V), _ = layer(16, 64, 32)
    with torch.no_grad():
        bias_V[9] += 10.0
    targets_N = torch.full((16,), 9)
    found, expected = (f([features_NH, weight_VH, bias_V], targets_N) for f in (with_gradients, exact))
    for ours, true in zip(found, expected, strict=True):
        assert distance(ours, true) < 0.02


def test_scores_of_any_size_make_no_overflow_and_nan_stays() -> None:
    tensors, targets_N = layer(20, 50, 32)
    with torch.no_grad():
        tensors[0] *= 2**12
    found, expected = with_gradients(tensors, targets_N), exact(tensors, targets_N)
    assert distance(found[0], expected[0]) < 1e-5
    assert all(torch.isfinite(gradient).all() for gradient in found)
    with torch.no_grad():
        tensors[0][4, 2] = torch.nan
    assert with_gradients(tensors, targets_N)[0].isnan()


def test_what_is_not_wanted_is_not_computed_and_without_gradients_nothing_is_kept() -> None:
    (features_NH, weight_VH, bias_V), targets_N = layer(20, 50, 32)
    every = with_gradients([features_NH, weight_VH, bias_V], targets_N)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_loss(features_NH.bfloat16(), weight_VH.detach(), bias_V.detach(), targets_N)
        [alone] = torch.autograd.grad(0.3 * loss, [features_NH])
        assert torch.equal(alone, every[1])
        with torch.no_grad():
            assert torch.equal(linear_loss(features_NH.bfloat16(), weight_VH, bias_V, targets_N), every[0])


@pytest.mark.parametrize("threads", [1, 3])
def test_scores_are_the_loss_and_count_the_likeliest_predictions(threads: int) -> None:
    torch.set_num_threads(threads)
    tensors, targets_N = layer(70, 500, 40)
    with torch.no_grad():
        likeliest_N = F.linear(*(tensor.double() for tensor in tensors)).argmax(1)
    targets_N[:30] = likeliest_N[:30]
    with torch.autocast("cpu", torch.bfloat16):
        loss, correct = linear_scores(tensors[0].bfloat16(), *tensors[1:], targets_N)
    assert torch.equal(loss, with_gradients(tensors, targets_N)[0])
    assert correct == (targets_N == likeliest_N).sum()


def test_a_target_that_is_no_token_is_refused() -> None:
    tensors, targets_N = layer(20, 50, 32)
    for wrong in (50, -1):
        targets_N[2] = wrong
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(IndexError, match="target out of range"):
            linear_loss(tensors[0].bfloat16(), *tensors[1:], targets_N)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_gradients_of_a_mean_are_those_of_the_sum_by_the_number_of_targets_that_count(scale: float) -> None:
    tensors, targets_N = layer(70, 50, 32)
    count = (targets_N != softmax.IGNORED).sum()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_loss(tensors[0].bfloat16(), *tensors[1:], targets_N)
    found = torch.autograd.grad(scale * (loss / count), tensors)
    for ours, true in zip(found, exact(tensors, targets_N)[1:], strict=True):
        assert distance(ours, true * scale / 0.3 / count) < 0.005


def test_features_may_be_columns_of_wider_rows() -> None:
    (features_NH, weight_VH, bias_V), targets_N = layer(40, 50, 32)
    found = with_gradients([features_NH, weight_VH, bias_V], targets_N)
    with torch.autocast("cpu", torch.bfloat16):
        for wider in (F.pad(features_NH.bfloat16(), (0, 7), value=torch.nan), features_NH.bfloat16().t().contiguous()):
            columns = wider[:, :32] if wider.shape[0] == 40 else wider.t()
            assert not columns.is_contiguous()
            assert torch.equal(linear_loss(columns, weight_VH, bias_V, targets_N), found[0])


def test_a_loss_goes_backward_again_alike_where_its_graph_is_retained() -> None:
    tensors, targets_N = layer(20, 50, 32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_loss(tensors[0].bfloat16(), *tensors[1:], targets_N)
    loss.backward(retain_graph=True)
    first = [tensor.grad.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.grad.zero_()  # which must not reach what is kept
        tensor.grad = None
    loss.backward()
    assert all(torch.equal(tensor.grad, gradient) for tensor, gradient in zip(tensors, first, strict=True))


def test_threads_may_be_others_when_it_goes_backward() -> None:
    tensors, targets_N = layer(320, 500, 64)
    torch.set_num_threads(4)
    expected = with_gradients(tensors, targets_N)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_loss(tensors[0].bfloat16(), *tensors[1:], targets_N)
    torch.set_num_threads(1)
    for ours, theirs in zip(torch.autograd.grad(0.3 * loss, tensors), expected[1:], strict=True):
        assert distance(ours, theirs.double()) < 0.005


def test_tokens_that_are_ruled_out_have_no_part_in_it() -> None:
    (features_NH, weight_VH, bias_V), targets_N = layer(20, 300, 32)
    with torch.no_grad():
        bias_V[:200] = -torch.inf
    targets_N = torch.where(targets_N < 0, targets_N, 200 + targets_N % 100)
    found = with_gradients([features_NH, weight_VH, bias_V], targets_N)
    expected = exact([features_NH, weight_VH, bias_V], targets_N)
    assert distance(found[0], expected[0]) < 2e-6
    assert all(distance(ours, true) < 0.005 for ours, true in zip(found[1:], expected[1:], strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_computed(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, targets_N = layer(20, 50, 32)
    called = []
    for name in ("_small", "_large"):
        whole = getattr(fused_loss, name)
        monkeypatch.setattr(
            fused_loss, name, lambda *given, whole=whole, **named: called.append(named) or whole(*given, **named)
        )
    with mode(), torch.autocast("cpu", torch.bfloat16):
        linear_loss(tensors[0].bfloat16(), *tensors[1:], targets_N)
    [named] = called
    assert named["factor"] is None


def test_biases_may_be_narrower_and_targets_too() -> None:
    (features_NH, weight_VH, bias_V), targets_N = layer(40, 50, 32)
    expected = with_gradients([features_NH, weight_VH, bias_V], targets_N)
    narrow_V = bias_V.detach().bfloat16().requires_grad_()
    found = with_gradients([features_NH, weight_VH, narrow_V], targets_N.int())
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[3], expected[3].bfloat16())
