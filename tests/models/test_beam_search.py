"""Beam search against exhaustive search."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import exp, fsum

import pytest
import torch

from elman.config.schema import RECURRENT_CELLS, GenerationConfig
from elman.models.language_model import LanguageModel
from elman.models.sampling import Hypothesis, beam_search, generate

Tiny = Callable[..., LanguageModel]
CELLS = (*RECURRENT_CELLS, "transformer")


def exhaustive(
    model: LanguageModel, prompt: list[int], length: int, forbidden: tuple[int, ...] = ()
) -> list[Hypothesis]:
    """Every continuation, best first."""
    allowed = [token for token in range(model.vocabulary_size) if token not in forbidden]
    ids_NT = torch.tensor(list(product(allowed, repeat=length)))
    before_NT = torch.tensor([[model.start_id, *prompt]]).expand(len(ids_NT), -1)
    with torch.no_grad():
        logits_NTV, _ = model(torch.cat((before_NT, ids_NT), dim=1))
    logits_NTV = logits_NTV[:, len(prompt) : -1].clone()
    logits_NTV[..., list(forbidden)] = -torch.inf
    scores_N = logits_NTV.log_softmax(dim=-1).gather(2, ids_NT.unsqueeze(2)).sum(dim=(1, 2))
    order_N = scores_N.argsort(descending=True)
    return [Hypothesis(ids_NT[row].tolist(), scores_N[row].item()) for row in order_N.tolist()]


def assert_same(found: list[Hypothesis], expected: list[Hypothesis]) -> None:
    assert [hypothesis.ids for hypothesis in found] == [hypothesis.ids for hypothesis in expected]
    assert [h.log_probability for h in found] == pytest.approx([h.log_probability for h in expected], abs=1e-10)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("prompt", [[], [5, 1]])
def test_beams_enough_for_every_prefix_find_what_exhaustive_search_finds(
    tiny: Tiny, cell: str, prompt: list[int]
) -> None:
    model = tiny(cell)
    found = beam_search(model, prompt, GenerationConfig(length=4, beams=7**3, samples=20))
    assert_same(found, exhaustive(model, prompt, 4)[:20])


def test_all_continuations_have_a_total_probability_of_one(tiny: Tiny) -> None:
    found = beam_search(tiny("lstm"), [1], GenerationConfig(length=3, beams=500, samples=500))
    assert len(found) == 7**3
    assert fsum(exp(hypothesis.log_probability) for hypothesis in found) == pytest.approx(1, abs=1e-10)


def test_forbidden_tokens_never_occur_and_leave_their_probability_to_the_others(tiny: Tiny) -> None:
    model = tiny("gru")
    found = beam_search(model, [1], GenerationConfig(length=3, beams=500, samples=500), forbidden=[0, 4])
    assert len(found) == 5**3
    assert_same(found, exhaustive(model, [1], 3, forbidden=(0, 4)))


def test_a_single_beam_is_greedy(tiny: Tiny) -> None:
    model = tiny("lstm")
    greedy = [step[0] for step in generate(model, [2], GenerationConfig(length=9, temperature=0.0))]
    [found] = beam_search(model, [2], GenerationConfig(length=9, beams=1))
    assert found.ids == greedy


@pytest.mark.parametrize("cell", CELLS)
def test_scores_are_those_of_the_whole_forward_pass_and_fall(tiny: Tiny, cell: str) -> None:
    model = tiny(cell)
    found = beam_search(model, [3], GenerationConfig(length=12, beams=5, samples=4))
    assert len(found) == 4
    assert found == sorted(found, key=lambda hypothesis: -hypothesis.log_probability)
    for hypothesis in found:
        with torch.no_grad():
            logits_1TV, _ = model(torch.tensor([[model.start_id, 3, *hypothesis.ids]]))
        scores_TV = logits_1TV[0, 1:-1].log_softmax(dim=-1)
        score = scores_TV.gather(1, torch.tensor(hypothesis.ids).unsqueeze(1)).sum().item()
        assert hypothesis.log_probability == pytest.approx(score, abs=1e-10)


def test_training_mode_is_restored(tiny: Tiny) -> None:
    model = tiny("lstm", dropout=0.5).train()
    one, again = (beam_search(model, [], GenerationConfig(length=3, beams=3)) for _ in range(2))
    assert model.training
    assert one == again
