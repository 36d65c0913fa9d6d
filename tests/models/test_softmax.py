"""The output layers of large vocabularies, held to F.cross_entropy and to the definition."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elman.config.schema import ExperimentConfig, ModelConfig
from elman.config.tree import build
from elman.errors import ConfigError
from elman.models import fused_loss, language_model, softmax
from elman.models.count import count_parameters
from elman.models.language_model import LanguageModel, build_model
from elman.models.softmax import AdaptiveSoftmax, default_cutoffs, linear_loss, linear_scores

V, H = 11, 6
TARGETS_N = torch.tensor([0, 3, 10, -100, 7, 4, 3])
Tiny = Callable[..., LanguageModel]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "CHUNK", 4)


def layer(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = ((len(TARGETS_N), H), (V, H), (V,))
    return tuple(torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes)


def plain_loss(features_NH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> Tensor:
    logits_NV = F.linear(features_NH, weight_VH, bias_V)
    return F.cross_entropy(logits_NV, TARGETS_N, reduction="sum")


def with_gradients(loss: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    value = loss(*tensors)
    return [value.detach(), *torch.autograd.grad(0.3 * value, tensors)]


@pytest.mark.parametrize("kept", [0, 2**27], ids=["logits computed again", "logits kept"])
def test_loss_and_gradients_in_chunks_are_those_of_whole_logits(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "KEPT_LOGITS", kept)
    found = with_gradients(lambda *tensors: linear_loss(*tensors, TARGETS_N), layer())
    torch.testing.assert_close(found, with_gradients(plain_loss, layer()), rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(lambda *tensors: linear_loss(*tensors, TARGETS_N), layer())


def test_rows_beyond_the_biases_are_no_tokens_and_their_gradient_is_nought() -> None:
    features_NH, weight_VH, bias_V = layer()
    longer = torch.cat((weight_VH.detach(), torch.full((2, H), 100.0, dtype=torch.float64))).requires_grad_()
    tensors = (features_NH, longer, bias_V)
    found = with_gradients(lambda *given: linear_loss(*given, TARGETS_N), tensors)
    expected = with_gradients(lambda features, weight, bias: plain_loss(features, weight[:V], bias), tensors)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert linear_scores(*tensors, TARGETS_N) == linear_scores(*layer(), TARGETS_N)


def test_in_bf16_loss_and_gradients_are_close_and_of_the_parameters_type() -> None:
    expected = with_gradients(plain_loss, layer(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(lambda *tensors: linear_loss(*tensors, TARGETS_N), layer(torch.float32))
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() < 0.02 * exact.norm()


def test_scores_in_chunks_count_the_likeliest_predictions() -> None:
    tensors = layer()
    logits_NV = F.linear(*tensors)
    loss, correct = linear_scores(*tensors, TARGETS_N)
    torch.testing.assert_close(loss, plain_loss(*tensors).detach(), rtol=0, atol=1e-10)
    assert correct == (logits_NV.argmax(1) == TARGETS_N).sum()
    right_N = logits_NV.argmax(1)
    assert linear_scores(*tensors, right_N)[1] == len(right_N)


@pytest.mark.parametrize("settings", [{}, {"tie_weights": True}, {"tie_weights": True, "embedding_size": 8}], ids=str)
def test_a_models_loss_in_parts_trains_it_as_whole_logits_do(tiny: Tiny, settings: dict[str, Any]) -> None:
    model = tiny(**settings)
    features_BTH = torch.randn(2, 5, 8, dtype=torch.float64).transpose(0, 1)  # time-major, as the kernel leaves it
    targets_BT = torch.randint(7, (5, 2))

    def gradients(loss: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return [loss.detach(), *(grad for grad in grads if grad is not None)]

    whole = F.cross_entropy(model.project(features_BTH).flatten(0, 1), targets_BT.flatten(), reduction="sum")
    expected = gradients(whole)
    torch.testing.assert_close(gradients(model.loss(features_BTH, targets_BT)), expected, rtol=0, atol=1e-10)


def adaptive() -> tuple[AdaptiveSoftmax, Tensor, Tensor]:
    torch.manual_seed(0)
    made = AdaptiveSoftmax(H, V, (3, 6)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(2 * torch.randn_like(parameter))
    bias_V = torch.randn(V, dtype=torch.float64, requires_grad=True)
    return made, torch.randn(len(TARGETS_N), H, dtype=torch.float64, requires_grad=True), bias_V


def test_adaptive_probabilities_sum_to_one_and_the_loss_is_minus_their_logarithm() -> None:
    made, features_NH, bias_V = adaptive()
    log_NV = made.log_probabilities(features_NH, bias_V)
    assert log_NV.shape == (len(TARGETS_N), V)
    torch.testing.assert_close(log_NV.exp().sum(1), torch.ones(len(TARGETS_N), dtype=torch.float64))
    expected = F.nll_loss(log_NV, TARGETS_N, reduction="sum")
    torch.testing.assert_close(made.loss(features_NH, bias_V, TARGETS_N), expected, rtol=0, atol=1e-10)


def test_adaptive_gradients_are_those_of_the_log_probabilities() -> None:
    made, *inputs = adaptive()
    tensors = [*inputs, *made.parameters()]
    expected = torch.autograd.grad(F.nll_loss(made.log_probabilities(*inputs), TARGETS_N, reduction="sum"), tensors)
    found = torch.autograd.grad(made.loss(*inputs, TARGETS_N), tensors)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(lambda *given: made.loss(*given, TARGETS_N), tuple(inputs))


def test_adaptive_probability_is_the_clusters_times_the_tokens_within() -> None:
    made, features_NH, bias_V = adaptive()
    head = (F.linear(features_NH, made.head) + torch.cat((bias_V[:3], made.cluster_bias))).softmax(1)
    within = (features_NH @ made.narrow[1].t() @ made.tails[1].t() + bias_V[6:]).softmax(1)
    found = made.log_probabilities(features_NH, bias_V).exp()
    torch.testing.assert_close(found[:, 8], head[:, 4] * within[:, 2])
    torch.testing.assert_close(found[:, 1], head[:, 1])


def test_adaptive_scores_look_into_a_cluster_wherever_its_tokens_can_win() -> None:
    made, _, bias_V = adaptive()
    features_NH = torch.randn(200, H, dtype=torch.float64)
    right_N = made.log_probabilities(features_NH, bias_V).argmax(1)
    assert all(((right_N >= begin) & (right_N < end)).any() for begin, end in ((0, 3), (3, 6), (6, V)))
    loss, correct = made.scores(features_NH, bias_V, right_N)
    assert correct == 200
    torch.testing.assert_close(loss, made.loss(features_NH, bias_V, right_N).detach())
    assert made.scores(features_NH, bias_V, (right_N + 1) % V)[1] == 0


def test_default_cutoffs_rise_within_every_vocabulary() -> None:
    assert default_cutoffs(33_000) == (2062, 8250)
    for size in range(2, 100):
        cutoffs = default_cutoffs(size)
        assert 0 < cutoffs[0] <= cutoffs[-1] < size


def test_an_adaptive_models_parameters_are_all_counted_and_kept_to_a_budget() -> None:
    config = ModelConfig(softmax="adaptive", cutoffs=(100,), hidden_size=16, embedding_size=12)
    sizes = {"vocabulary_size": 500, "num_inputs": 500, "start_id": 1, "context_length": 8}
    counts = count_parameters(build_model(config, **sizes))
    assert counts["output"] == 500 + (101 * 16 + 1) + (4 * 16 + 400 * 4)
    budget = ModelConfig(softmax="adaptive", parameter_budget=100_000, embedding_size=12)
    assert 99_000 <= count_parameters(build_model(budget, **sizes))["total"] <= 100_000


def test_an_adaptive_model_is_rebuilt_from_its_architecture(tiny: Tiny) -> None:
    model = tiny(softmax="adaptive", cutoffs=(2, 4))
    again = LanguageModel.from_architecture(json.loads(json.dumps(model.architecture))).double().eval()
    again.load_state_dict(model.state_dict())
    tokens_BT = torch.randint(7, (2, 5))
    assert torch.equal(again(tokens_BT)[0], model(tokens_BT)[0])


def test_cutoffs_beyond_the_vocabulary_are_refused_in_one_line(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"^model\.cutoffs must be below the vocabulary of 7, got \[2, 7\]: .*\.$"):
        tiny(softmax="adaptive", cutoffs=(2, 7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.softmax": "adaptive"}, r"model\.softmax adaptive contradicts corpus\.level character"),
        ({"model.softmax": "adaptive", "corpus.level": "word", "model.tie_weights": True}, r"^model\.tie_weights "),
        ({"model.softmax": "adaptive", "corpus.level": "word", "model.cutoffs": (5, 5)}, r"^model\.cutoffs .* rising"),
        ({"model.cutoffs": (5,)}, r"^model\.cutoffs .* empty with model\.softmax exact"),
    ],
)
def test_what_contradicts_the_adaptive_softmax_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        build(ExperimentConfig, settings)
    assert "\n" not in str(refused.value)


def test_logits_come_in_parts_where_the_vocabulary_is_large_or_clustered(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not tiny().scores_in_parts(10**9)
    assert tiny(softmax="adaptive", cutoffs=(2,)).scores_in_parts(1)
    monkeypatch.setattr(language_model, "LARGE_VOCABULARY", 7)
    assert tiny().scores_in_parts(1)


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("kernel", ["small", "large"])
def test_a_smaller_vocabulary_comes_in_parts_where_a_compiled_kernel_pays(
    kernel: str, tie_weights: bool, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(tie_weights=tie_weights).float()
    monkeypatch.setattr(fused_loss, "FEWEST_LOGITS", 7 * 100)
    monkeypatch.setattr(fused_loss, "FEWEST_TARGETS", 100)
    if kernel == "large":
        monkeypatch.setattr(fused_loss, "LEAST_LARGE", 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert not model.scores_in_parts(99)
        assert model.scores_in_parts(100) == (fused_loss._kernels() is not None)
        monkeypatch.setattr(fused_loss, "_kernels", lambda: None)
        assert not model.scores_in_parts(100)
    assert not model.scores_in_parts(100)


def test_a_small_vocabulary_comes_whole_where_a_thread_has_fewer_targets_than_hidden_units(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(softmax, "is_fused", lambda *_: True)
    weight_VH, enough = torch.empty(50, 300), 300 * torch.get_num_threads()
    assert not softmax.kernel_pays(weight_VH, enough - 1)
    assert softmax.kernel_pays(weight_VH, enough)
