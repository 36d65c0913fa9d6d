"""The compiled kernel generates what the plain path does, for every model that it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from elman.config.schema import GenerationConfig, ModelConfig
from elman.models import fast_generation, sampling
from elman.models.fast_generation import STAGES, FastGenerator, is_fast
from elman.models.language_model import LanguageModel
from elman.models.sampling import filtered_probabilities, generate
from elman.models.state import expand
from kernel_support import BUILDS, library_of

PROMPT = [3, 1, 4, 1, 5]
V = 23
CELLS: dict[str, dict[str, Any]] = {
    kind: {"cell": "rnn", "nonlinearity": kind[4:]} if kind.startswith("rnn_") else {"cell": kind} for kind in STAGES
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "residual": {"residual": True, "embedding_size": 40},
    "residual past a first layer of another width": {"residual": True},
    "layer norm": {"layer_norm": True},
    "both, odd sizes": {"layer_norm": True, "residual": True, "hidden_size": 37, "embedding_size": 37},
    "tied": {"tie_weights": True, "embedding_size": 40},
    "tied through a projection": {"tie_weights": True},
    "narrower last layer": {"last_hidden_size": 19},
    "learned start": {"initial_state": "learned"},
    "one layer, wider than a panel": {"num_layers": 1, "hidden_size": 100},
    "three layers": {"num_layers": 3},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "almost greedy": {"temperature": 1e-40},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 4},
    "top_k beyond the vocabulary": {"top_k": 99},
    "top_k 1": {"top_k": 1},
    "top_p": {"top_p": 0.7},
    "top_p that leaves one": {"top_p": 1e-3},
    "min_p": {"min_p": 0.3},
    "all of them": {"top_k": 9, "top_p": 0.9, "min_p": 0.1},
    "repetition penalty": {"repetition_penalty": 1.5},
    "repetition penalty, greedy": {"repetition_penalty": 1.5, "temperature": 0.0},
    "repetition penalty, nucleus": {"repetition_penalty": 1.2, "top_p": 0.8},
}


@pytest.fixture(params=BUILDS, autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel in both of its builds."""
    kernel = library_of(fast_generation.SOURCE, request.param)
    monkeypatch.setattr(fast_generation, "_kernel", lambda: kernel)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(**settings: Any) -> LanguageModel:
    """Random weights, none of them zero; preferences strong enough to matter."""
    torch.manual_seed(0)
    config = ModelConfig(**{"embedding_size": 24, "hidden_size": 40, "num_layers": 2} | settings)
    model = LanguageModel(config, vocabulary_size=V, num_inputs=V + 1, start_id=V, context_length=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("body"):
                parameter.mul_(3)
            parameter.add_(0.1 * torch.randn_like(parameter))
            if config.nonlinearity == "relu" and name.startswith("body"):
                parameter.mul_(0.3)  # else h grows without end
    return model.eval()


def plain(model: LanguageModel, config: GenerationConfig, *, forbidden: Sequence[int] = ()) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "is_fast", lambda model: False)
        return list(generate(model, PROMPT, config, forbidden=forbidden))


@torch.no_grad()
def after(model: LanguageModel, ids_TB: Tensor) -> tuple[Tensor, list[Tensor]]:
    """By the plain path in double precision: logits before each token and after the last (T + 1, B, V), the state."""
    double = LanguageModel.from_architecture(model.architecture).double().eval()
    double.load_state_dict(model.state_dict())
    prompt_BT = torch.tensor([[model.start_id, *PROMPT]]).expand(ids_TB.shape[1], -1)
    logits_BTV, state = double(torch.cat((prompt_BT, ids_TB.t()), dim=1))
    return logits_BTV[:, len(PROMPT) :].transpose(0, 1), [tensor for part in state for tensor in part]


def assert_drawn(model: LanguageModel, config: GenerationConfig, steps: list[list[int]], tolerance: float) -> None:
    """Every token is the one at its draw's quantile, or that of a draw which is so much beside it."""
    ids_TB = torch.tensor(steps)
    logits_TBV, _ = after(model, ids_TB)
    uniforms_BT = torch.rand(
        ids_TB.shape[1], len(steps), generator=torch.Generator().manual_seed(config.seed), dtype=torch.float64
    )
    for logits_BV, ids_B, uniforms_B in zip(logits_TBV[:-1], ids_TB, uniforms_BT.t(), strict=True):
        upper_BV = filtered_probabilities(logits_BV, config).cumsum(dim=1)
        upper_B = upper_BV.gather(1, ids_B[:, None])[:, 0]
        lower_B = torch.where(ids_B > 0, upper_BV.gather(1, (ids_B - 1).clamp(min=0)[:, None])[:, 0], 0.0)
        assert torch.all((lower_B - tolerance <= uniforms_B) & (uniforms_B <= upper_B + tolerance))


@torch.inference_mode()
def start(model: LanguageModel, batch_size: int, config: GenerationConfig) -> FastGenerator:
    logits_1V, state = sampling._read_prompt(model, PROMPT, None)
    return FastGenerator(model, config, logits_1V.expand(batch_size, -1), expand(state, batch_size), None, None)


def draws(length: int, batch_size: int) -> Tensor:
    return torch.rand(length, batch_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("samples", [1, 19])
def test_every_cell_draws_from_the_equations_distribution_for_hundreds_of_tokens(kind: str, samples: int) -> None:
    model, config = build(**CELLS[kind]), GenerationConfig(length=300, samples=samples, seed=2, temperature=1.0)
    assert is_fast(model)
    steps = list(generate(model, PROMPT, config))
    assert_drawn(model, config, steps, tolerance=1e-3)
    assert len({token for step in steps for token in step}) > 4


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "mingru"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_draws_from_the_equations_distribution(cell: str, name: str) -> None:
    model, config = build(cell=cell, **ARCHITECTURES[name]), GenerationConfig(length=100, samples=3, seed=3)
    assert is_fast(model)
    assert_drawn(model, config, list(generate(model, PROMPT, config)), tolerance=2e-3)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_draws_the_plain_path_s_tokens(name: str) -> None:
    model = build(cell="gru")
    config = GenerationConfig(**{"length": 100, "samples": 3, "seed": 4, "temperature": 1.0} | SETTINGS[name])
    steps = list(generate(model, PROMPT, config, forbidden=[0, 7]))
    assert steps == plain(model, config, forbidden=[0, 7])
    assert not {0, 7} & {token for step in steps for token in step}


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("batch_size", [1, 2, 35])
@pytest.mark.parametrize("tabled", [True, False])
def test_logits_and_state_are_nearly_those_of_double_precision(
    kind: str, batch_size: int, tabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not tabled:
        monkeypatch.setattr(fast_generation, "TABLE_SIZE", 0)
    model = build(**CELLS[kind], residual=True, layer_norm=True)
    generator = start(model, batch_size, GenerationConfig(temperature=1.0))
    ids_TB = generator.advance(draws(30, batch_size))
    logits_TBV, state = after(model, ids_TB)
    assert logits_TBV[-1].std() > 0.5
    torch.testing.assert_close(generator.logits.double(), logits_TBV[-1], atol=5e-3, rtol=0)
    for ours, theirs in zip([tensor for part in generator.state for tensor in part], state, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", STAGES)
def test_numbers_depend_neither_on_the_batch_nor_on_threads_nor_on_chunks(kind: str) -> None:
    model, config, uniforms_TB = build(**CELLS[kind], layer_norm=True), GenerationConfig(), draws(20, 33)
    whole = start(model, 33, config)
    ids_TB = whole.advance(uniforms_TB)
    threaded = start(model, 33, config)
    parts = zip(uniforms_TB.split(7), (3, 1, 2), strict=True)
    assert torch.equal(torch.cat([threaded.advance(part_TB, threads) for part_TB, threads in parts]), ids_TB)
    assert torch.equal(threaded.logits, whole.logits)
    for row in (0, 32):
        alone = start(model, 1, config)
        assert torch.equal(alone.advance(uniforms_TB[:, row : row + 1]), ids_TB[:, row : row + 1])
        assert torch.equal(alone.logits[0], whole.logits[row])


def test_chunks_grow_while_they_are_quick_and_all_threads_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = build(), GenerationConfig(length=200, samples=2)
    quick = list(generate(model, PROMPT, config))
    calls: list[tuple[int, int]] = []
    advance = FastGenerator.advance

    def noted(self: FastGenerator, uniforms_TB: Tensor, threads: int) -> Tensor:
        calls.append((len(uniforms_TB), threads))
        return advance(self, uniforms_TB, threads)

    monkeypatch.setattr(FastGenerator, "advance", noted)
    monkeypatch.setattr(fast_generation, "THREAD_SHARE", 1)
    torch.set_num_threads(3)
    monkeypatch.setattr(sampling, "CHUNK_SECONDS", 1e9)
    assert list(generate(model, PROMPT, config)) == quick
    assert [length for length, _ in calls] == [16, 32, 64, 88]
    assert [threads for _, threads in calls][:3] == [1, 2, 3]
    calls.clear()
    monkeypatch.setattr(sampling, "CHUNK_SECONDS", 0.0)
    monkeypatch.setattr(sampling, "CALLS_BETWEEN_TRIALS", 5)
    assert list(generate(model, PROMPT, config)) == quick
    assert [length for length, _ in calls[:4]] == [16, 1, 1, 1]
    assert [threads for _, threads in calls[5:8]] == [1, 2, 3]


def test_a_state_beyond_one_is_not_clipped() -> None:
    model = build(cell="gru", initial_state="learned")
    with torch.no_grad():
        for layer in model.body.layers:
            layer.initial[0].fill_(5.0)
            layer.weights.bias_ih_l0[40:80] += 6  # z, which keeps it
    generator = start(model, 1, GenerationConfig(temperature=1.0))
    ids_TB = generator.advance(draws(10, 1))
    logits_TBV, state = after(model, ids_TB)
    assert state[0].max() > 3
    torch.testing.assert_close(generator.logits.double(), logits_TBV[-1], atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [{"cell": "transformer", "hidden_size": 40}, {"head": "last_step", "max_sequence_length": 3},
     {"softmax": "adaptive", "cutoffs": (8,)}],
)  # fmt: skip
def test_models_that_the_kernel_does_not_know_take_the_plain_path(settings: dict[str, Any]) -> None:
    model = build(**settings)
    assert not is_fast(model)
    assert len(list(generate(model, PROMPT, GenerationConfig(length=5)))) == 5


def test_double_precision_takes_the_plain_path() -> None:
    assert not is_fast(build().double())


def test_without_a_compiler_the_plain_path_generates_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = build(), GenerationConfig(length=50)
    fast = list(generate(model, PROMPT, config))
    monkeypatch.setattr(fast_generation, "_kernel", lambda: None)
    assert not is_fast(model)
    assert list(generate(model, PROMPT, config)) == fast


def test_weights_that_are_not_numbers_generate_tokens_of_the_vocabulary() -> None:
    model = build()
    with torch.no_grad():
        model.output_bias.fill_(torch.nan)
    for settings in ({}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3}):
        generator = start(model, 2, GenerationConfig(**settings))
        ids_TB = generator.advance(draws(20, 2))
        assert ids_TB.min() >= 0
        assert ids_TB.max() < V
