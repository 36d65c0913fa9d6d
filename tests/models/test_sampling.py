"""Sampling follows the exact distributions, repeats with its seed, and streams."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest
import torch
from torch import Tensor

from elman.config.schema import RECURRENT_CELLS, GenerationConfig
from elman.errors import ModelError
from elman.models import sampling
from elman.models.language_model import LanguageModel
from elman.models.sampling import draw, filtered_probabilities, generate, next_token

Tiny = Callable[..., LanguageModel]
P = [0.40, 0.25, 0.15, 0.12, 0.08]
DRAWS = 10_000
CRITICAL = {1: 10.828, 2: 13.816, 3: 16.266, 4: 18.467}  # chi-square by degrees of freedom, at 0.001


def config(**settings: object) -> GenerationConfig:
    return GenerationConfig(**{"temperature": 1.0} | settings)


def normalized(weights: list[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


CASES = {
    "temperature 1": (config(), P),
    "temperature 0.5": (config(temperature=0.5), normalized([p**2 for p in P])),
    "temperature 2": (config(temperature=2.0), normalized([p**0.5 for p in P])),
    "top_k": (config(top_k=3), normalized([0.40, 0.25, 0.15, 0, 0])),
    "top_k beyond the vocabulary": (config(top_k=9), P),
    "top_p": (config(top_p=0.7), normalized([0.40, 0.25, 0.15, 0, 0])),
    "top_p below the likeliest": (config(top_p=0.1), [1.0, 0, 0, 0, 0]),
    "top_p 1": (config(top_p=1.0), P),
    "min_p": (config(min_p=0.35), normalized([0.40, 0.25, 0.15, 0, 0])),
    # of the four left by top_k, 0.40 + 0.25 + 0.15 hold 0.80 / 0.92 = 0.87 of the probability
    "top_k, then top_p": (config(top_k=4, top_p=0.85), normalized([0.40, 0.25, 0.15, 0, 0])),
    "top_p, then min_p": (config(top_p=0.9, min_p=0.5), normalized([0.40, 0.25, 0, 0, 0])),
    # at temperature 0.5 the squares are 0.16 0.0625 0.0225 0.0144 0.0064: two hold 0.84 of them
    "temperature, then top_p": (config(temperature=0.5, top_p=0.8), normalized([0.16, 0.0625, 0, 0, 0])),
    "greedy": (config(temperature=0.0), [1.0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 0, 4, 2, 1]])
def test_filtered_probabilities_are_exact_and_draws_follow_them(case: str, order: list[int]) -> None:
    settings, expected = CASES[case]
    logits_BV = (torch.tensor(P, dtype=torch.float64).log() + 3)[order].unsqueeze(0)
    expected_V = torch.tensor(expected, dtype=torch.float64)[order]
    torch.testing.assert_close(filtered_probabilities(logits_BV, settings)[0], expected_V)
    uniform_B = torch.rand(DRAWS, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    ids_B = next_token(logits_BV.expand(DRAWS, -1), settings, uniform_B)
    assert_follows(ids_B, expected_V)


def assert_follows(ids_B: Tensor, expected_V: Tensor) -> None:
    counts_V = torch.bincount(ids_B, minlength=len(expected_V)).double()
    possible = expected_V > 0
    assert counts_V[~possible].sum() == 0
    freedom = int(possible.sum()) - 1
    if freedom > 0:
        means = len(ids_B) * expected_V[possible]
        assert ((counts_V[possible] - means) ** 2 / means).sum() < CRITICAL[freedom]


def test_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    logits_BV = torch.tensor([[2.0, 1.0, -1.0, -2.0]], dtype=torch.float64)
    seen_BV = torch.tensor([[True, False, True, False]])
    expected_V = torch.tensor([2.0 / 1.5, 1.0, -1.5, -2.0], dtype=torch.float64).softmax(dim=0)
    settings = config(repetition_penalty=1.5)
    torch.testing.assert_close(filtered_probabilities(logits_BV, settings, seen_BV)[0], expected_V)
    uniform_B = torch.rand(DRAWS, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    ids_B = next_token(logits_BV.expand(DRAWS, -1), settings, uniform_B, seen_BV.expand(DRAWS, -1))
    assert_follows(ids_B, expected_V)


def test_top_k_keeps_no_more_than_k_of_tied_tokens() -> None:
    probabilities_BV = filtered_probabilities(torch.zeros(1, 6), config(top_k=2))
    assert sorted(probabilities_BV[0].tolist()) == [0, 0, 0, 0, 0.5, 0.5]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_draw_never_takes_a_token_of_probability_zero(uniform: float) -> None:
    probabilities_BV = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    assert draw(probabilities_BV, torch.tensor([uniform], dtype=torch.float64)).item() in (1, 3)


def test_a_temperature_near_zero_is_greedy_and_finite() -> None:
    probabilities_BV = filtered_probabilities(torch.tensor([[50.0, 51.0, -80.0]]), config(temperature=1e-30))
    assert probabilities_BV.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("cell", [*RECURRENT_CELLS, "transformer"])
@pytest.mark.parametrize("head", ["every_step", "last_step"])
@pytest.mark.parametrize("prompt", [[], [3, 1, 4, 1, 5]])
def test_generation_draws_from_the_whole_forward_pass(tiny: Tiny, cell: str, head: str, prompt: list[int]) -> None:
    model = tiny(cell, head=head, max_sequence_length=3)
    settings = config(length=12, temperature=0.7, seed=3)
    ids = [step[0] for step in generate(model, prompt, settings)]
    logits_1TV, _ = model(torch.tensor([[model.start_id, *prompt, *ids]]))
    logits_TV = logits_1TV[0, len(prompt) : -1].detach()
    uniform_T = torch.rand(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert ids == draw(filtered_probabilities(logits_TV, settings), uniform_T).tolist()


def test_first_generated_token_follows_the_model_s_distribution(tiny: Tiny) -> None:
    model = tiny("lstm", hidden_size=4)
    expected_V = model(torch.tensor([[model.start_id, 2]]))[0][0, -1].detach().softmax(dim=0)
    first = next(generate(model, [2], config(length=1, samples=DRAWS)))
    counts_V = torch.bincount(torch.tensor(first), minlength=7)
    means_V = DRAWS * expected_V
    assert ((counts_V - means_V) ** 2 / means_V).sum() < 22.458  # six degrees of freedom, at 0.001


def test_a_seed_repeats_its_text_and_another_does_not(tiny: Tiny) -> None:
    model = tiny("lstm")
    one, again, other = (list(generate(model, [1], config(length=40, seed=seed))) for seed in (1, 1, 2))
    assert one == again != other


def test_generation_ignores_and_spares_the_global_random_state(tiny: Tiny) -> None:
    model = tiny("lstm")
    torch.manual_seed(1)
    one = list(generate(model, [1], config(length=20)))
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert list(generate(model, [1], config(length=20))) == one


def test_samples_differ_and_the_first_does_not_depend_on_their_number_or_the_length(tiny: Tiny) -> None:
    model = tiny("gru")
    three = list(zip(*generate(model, [1], config(length=40, samples=3)), strict=True))
    [alone] = zip(*generate(model, [1], config(length=25)), strict=True)
    assert len(set(three)) == 3
    assert three[0][:25] == alone


@pytest.mark.parametrize("cell", ["lstm", "transformer"])
def test_text_does_not_depend_on_how_the_prompt_is_chunked(
    tiny: Tiny, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = tiny(cell), [1, 5, 2, 0, 6, 3, 3, 1, 4]
    whole = list(generate(model, prompt, config(length=30)))
    monkeypatch.setattr(sampling, "PROMPT_CHUNK", 2)
    assert list(generate(model, prompt, config(length=30))) == whole


def test_generation_streams_and_restores_training_mode_even_when_abandoned(tiny: Tiny) -> None:
    model = tiny("lstm", dropout=0.5).train()
    stream = generate(model, [], config(length=10))
    assert len(list(islice(stream, 3))) == 3
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert model.training
    list(generate(model.eval(), [], config(length=2)))
    assert not model.training


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_forbidden_tokens_never_occur(tiny: Tiny, temperature: float) -> None:
    settings = config(length=50, samples=4, temperature=temperature, repetition_penalty=1.2)
    ids = {token for step in generate(tiny("rnn"), [0], settings, forbidden=[0, 2, 3, 7]) for token in step}
    assert ids <= {1, 4, 5, 6}


def test_forbidding_every_token_is_refused_in_one_line(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match="All 7 tokens are forbidden"):
        next(generate(tiny("rnn"), [0], config(), forbidden=range(7)))


def test_repetition_penalty_counts_prompt_and_continuation(tiny: Tiny) -> None:
    settings = config(length=7, temperature=0.0, repetition_penalty=1e9)
    model = tiny("lstm")
    with torch.no_grad():
        model.output_bias += 30  # all logits positive, so that a seen token's falls to nothing
    ids = [step[0] for step in generate(model, [4], settings)]
    assert sorted([4, *ids[:6]]) == list(range(7))


def test_greedy_takes_the_likeliest_token_each_time(tiny: Tiny) -> None:
    model = tiny("gru")
    ids = [step[0] for step in generate(model, [2], config(length=8, temperature=0.0))]
    logits_1TV, _ = model(torch.tensor([[model.start_id, 2, *ids]]))
    assert ids == logits_1TV[0, 1:-1].argmax(dim=1).tolist()
