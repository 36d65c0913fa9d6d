"""Norms in bfloat16 are trained as in single precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elman.config.schema import ModelConfig
from elman.models.language_model import LanguageModel
from elman.models.normalization import LayerNorm


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_the_weights_are_sums_over_any_number_of_positions(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    norm, x_NH = LayerNorm(16), torch.randn(5000, 16).bfloat16()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            out_NH = norm(x_NH)
            out_NH.sum().backward()
    finally:
        torch.set_num_threads(before)
    assert out_NH.dtype == torch.bfloat16
    assert norm.bias.grad.tolist() == [5000] * 16
    exact = nn.functional.layer_norm(x_NH.double(), (16,))
    torch.testing.assert_close(norm.weight.grad.double(), exact.sum(0), rtol=1e-3, atol=0.05)


def test_time_major_memory_stays_time_major() -> None:
    x_BTH, norm = torch.randn(5, 3, 16).transpose(0, 1), LayerNorm(16)
    out_BTH = norm(x_BTH)
    assert out_BTH.transpose(0, 1).is_contiguous()
    torch.testing.assert_close(out_BTH, nn.functional.layer_norm(x_BTH, (16,)))
    sliced = torch.randn(3, 5, 20)[..., :16]
    torch.testing.assert_close(norm(sliced), nn.functional.layer_norm(sliced, (16,)))


def test_double_precision_stays() -> None:
    x_NH = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(LayerNorm(8).double()(x_NH), nn.functional.layer_norm(x_NH, (8,)))


@pytest.mark.parametrize(
    "settings",
    [
        {"cell": "lstm", "num_layers": 2, "layer_norm": True},
        {"cell": "mingru", "layer_norm": True},
        {"cell": "transformer", "embedding_size": 16},
    ],
    ids=str,
)
def test_every_norm_of_a_model_learns_in_bf16_what_it_learns_in_single_precision(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    config = ModelConfig(**{"embedding_size": 32, "hidden_size": 32} | settings)
    model = LanguageModel(config, vocabulary_size=20, num_inputs=21, start_id=20, context_length=64)
    tokens_BT = torch.randint(20, (64, 64))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        features = model.features(tokens_BT)
        (features.raw_BTH.float() * torch.arange(features.raw_BTH.shape[2])).sum().backward()  # of one sign
        norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
        return [parameter.grad.clone() for norm in norms for parameter in norm.parameters()]

    expected = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients()
    assert len(expected) >= 2
    for ours, exact in zip(found, expected, strict=True):
        assert (ours - exact).norm() < 0.03 * exact.norm()
