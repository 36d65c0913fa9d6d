"""Continuations of a prompt: sampled, greedy, or by beam search.

The prompt is read once; after that each step feeds one token with the carried state. Where
``fast_generation`` has a kernel for the model, it takes the steps.

Shape suffixes: B samples or beams, T time steps, V vocabulary, K the likeliest tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from elman.config.schema import GenerationConfig
from elman.errors import ModelError
from elman.models.fast_generation import FastGenerator, is_fast
from elman.models.language_model import LanguageModel
from elman.models.state import State, expand, select

PROMPT_CHUNK = 256
"""Tokens of the prompt that are read at once: a long one must not fill the memory."""
FIRST_CHUNK = 16
"""Steps that the compiled kernel takes in its first call."""
CHUNK_SECONDS = 0.02
"""About how long its later calls take: text should be seen to appear, and little be thrown away after a stop."""
CALLS_BETWEEN_TRIALS = 50
"""After so many, all numbers of threads are tried again."""


class Hypothesis(NamedTuple):
    """A continuation that beam search kept."""

    ids: list[int]
    """The tokens, without the prompt."""
    log_probability: float
    """Natural logarithm of the continuation's probability, given the prompt."""


def filtered_probabilities(logits_BV: Tensor, config: GenerationConfig, seen_BV: Tensor | None = None) -> Tensor:
    """The distribution (B, V) that the next token is drawn from.

    In this order: the repetition penalty, temperature, top_k, top_p and min_p, each on what the
    one before has left; then the rest is scaled to sum to one. A tie at the border of top_k or
    top_p is broken, so that no more tokens stay than asked for.

    Args:
        logits_BV: Scores; −inf forbids a token.
        config: The settings.
        seen_BV: True where a token has occurred in the prompt or the continuation; needed
            only for a repetition penalty.

    Source: top_k: Fan et al. (2018), arXiv:1805.04833; top_p: Holtzman et al. (2020),
    arXiv:1904.09751; min_p: Nguyen et al. (2024), arXiv:2407.01082; repetition penalty:
    Keskar et al. (2019), arXiv:1909.05858, section 4.1.
    """
    if seen_BV is not None and config.repetition_penalty != 1:
        penalty = config.repetition_penalty
        penalized_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = torch.where(seen_BV, penalized_BV, logits_BV)
    if config.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(1, logits_BV.argmax(dim=1, keepdim=True), 1.0)
    # The largest logit goes to 0 first: a temperature near 0 must not overflow.
    logits_BV = (logits_BV - logits_BV.amax(dim=1, keepdim=True)) / config.temperature
    top_p = None if config.top_p == 1 else config.top_p
    if config.top_k is None and top_p is None:
        return _above(config.min_p, logits_BV.softmax(dim=1))
    vocabulary_size = logits_BV.shape[1]
    logits_BK, ids_BK = logits_BV.topk(min(config.top_k or vocabulary_size, vocabulary_size), dim=1)
    probabilities_BK = logits_BK.softmax(dim=1)
    if top_p is not None:
        before_BK = probabilities_BK.cumsum(dim=1) - probabilities_BK
        before_BK[:, 0] = 0  # rounding must not drop the likeliest
        probabilities_BK = probabilities_BK.masked_fill(before_BK >= top_p, 0.0)
    return torch.zeros_like(logits_BV).scatter_(1, ids_BK, _above(config.min_p, probabilities_BK))


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Token ids (B,) at the quantiles ``uniform_B`` (float64, in [0, 1)) of each distribution.

    One number per token, drawn elsewhere, makes a text repeat on every device.
    """
    cumulative_BV = probabilities_BV.cumsum(dim=1, dtype=torch.float64)
    quantile_B1 = uniform_B.unsqueeze(1) * cumulative_BV[:, -1:]
    ids_B = torch.searchsorted(cumulative_BV, quantile_B1, right=True).squeeze(1)
    return ids_B.clamp_(max=probabilities_BV.shape[1] - 1)


def generate(
    model: LanguageModel, prompt_ids: Sequence[int], config: GenerationConfig, *, forbidden: Sequence[int] = ()
) -> Iterator[list[int]]:
    """Continue a prompt, one token at a time: see ``generate_chunks``.

    Yields:
        The next id of every sample.
    """
    for ids_TB in generate_chunks(model, prompt_ids, config, forbidden=forbidden):
        yield from ids_TB.tolist()


@torch.inference_mode()
def generate_chunks(
    model: LanguageModel, prompt_ids: Sequence[int], config: GenerationConfig, *, forbidden: Sequence[int] = ()
) -> Iterator[Tensor]:
    """Continue a prompt, as many tokens at a time as come in the twinkling of an eye.

    Args:
        model: Runs in evaluation mode, and is put back as it was.
        prompt_ids: Tokens in [0, V); none generates from the start of a text.
        config: ``length`` steps of ``samples`` continuations; ``beams`` and ``stop`` are for the caller.
        forbidden: Tokens that are never generated.

    Yields:
        The next ids (T, B) of every sample. The same seed gives the same ids; each sample has draws
        of its own, and the first has the same ones whatever the number of samples and the length.

    Raises:
        ModelError: If every token is forbidden.
    """
    with _evaluating(model):
        bias_V = _bias(model, forbidden)
        logits_BV, state = _read_prompt(model, prompt_ids, bias_V)
        logits_BV, state = logits_BV.expand(config.samples, -1), expand(state, config.samples)
        seen_BV: Tensor | None = None
        if config.repetition_penalty != 1:
            seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
            seen_BV[:, list(prompt_ids)] = True
        generator = torch.Generator().manual_seed(config.seed)
        uniforms_TB = torch.rand(config.samples, config.length, generator=generator, dtype=torch.float64).T
        if is_fast(model):
            yield from _in_chunks(FastGenerator(model, config, logits_BV, state, bias_V, seen_BV), uniforms_TB)
            return
        uniforms_TB = uniforms_TB.to(logits_BV.device)
        for step, uniform_B in enumerate(uniforms_TB.unbind(), start=1):
            ids_B = next_token(logits_BV, config, uniform_B, seen_BV)
            yield ids_B.unsqueeze(0)
            if seen_BV is not None:
                seen_BV.scatter_(1, ids_B.unsqueeze(1), True)
            if step < config.length:
                logits_BV, state = _step(model, ids_B, state, bias_V)


def _in_chunks(generator: FastGenerator, uniforms_TB: Tensor) -> Iterator[Tensor]:
    """Ids (T, B); how many are made at once, and on how many threads, is for the clock: they do not depend on it.

    Whether a second thread pays depends on the model, and on who else uses the machine.
    """
    seconds: dict[int, float] = {}  # a step, by threads
    size, calls = FIRST_CHUNK, 0
    while len(uniforms_TB) > 0:
        untried = [threads for threads in generator.thread_counts if threads not in seconds]
        threads = untried[0] if untried else min(seconds, key=seconds.__getitem__)
        begin = time.perf_counter()
        ids_TB = generator.advance(uniforms_TB[:size], threads)
        seconds[threads] = (time.perf_counter() - begin) / len(ids_TB)
        yield ids_TB
        uniforms_TB = uniforms_TB[size:]
        size = max(1, min(2 * size, int(CHUNK_SECONDS / seconds[threads])))
        calls += 1
        if calls % CALLS_BETWEEN_TRIALS == 0:
            seconds.clear()


def next_token(
    logits_BV: Tensor, config: GenerationConfig, uniform_B: Tensor, seen_BV: Tensor | None = None
) -> Tensor:
    """Ids (B,) of the next tokens: drawn from ``filtered_probabilities``, or the likeliest at temperature 0."""
    if config.temperature == 0 and seen_BV is None:
        return logits_BV.argmax(dim=1)
    return draw(filtered_probabilities(logits_BV, config, seen_BV), uniform_B)


@torch.inference_mode()
def beam_search(
    model: LanguageModel, prompt_ids: Sequence[int], config: GenerationConfig, *, forbidden: Sequence[int] = ()
) -> list[Hypothesis]:
    """Look for the likeliest continuations of ``config.length`` tokens.

    Nothing is sampled: of the settings, ``length``, ``beams`` and ``samples`` count. All
    hypotheses are of one length, so that their probabilities compare without normalisation.

    Returns:
        The ``samples`` best of ``beams``, best first; fewer where there are not so many continuations.

    Raises:
        ModelError: If every token is forbidden.

    Source: Graves (2012), arXiv:1211.3711, section 3; Sutskever et al. (2014), arXiv:1409.3215.
    """
    with _evaluating(model):
        bias_V = _bias(model, forbidden)
        logits_BV, state = _read_prompt(model, prompt_ids, bias_V)
        scores_B = torch.zeros(1, dtype=torch.float64, device=logits_BV.device)
        ids_BT = torch.empty(1, 0, dtype=torch.int64, device=logits_BV.device)
        for step in range(config.length):
            if step > 0:
                logits_BV, state = _step(model, ids_BT[:, -1], state, bias_V)
            scores_BV = scores_B.unsqueeze(1) + logits_BV.double().log_softmax(dim=1)
            scores_B, flat_B = scores_BV.flatten().topk(min(config.beams, scores_BV.numel()))
            possible_B = scores_B > -torch.inf
            scores_B, flat_B = scores_B[possible_B], flat_B[possible_B]
            rows_B, tokens_B = flat_B // scores_BV.shape[1], flat_B % scores_BV.shape[1]
            ids_BT = torch.cat((ids_BT[rows_B], tokens_B.unsqueeze(1)), dim=1)
            state = select(state, rows_B)
        kept = zip(ids_BT.tolist(), scores_B.tolist(), strict=True)
        return [Hypothesis(ids, score) for ids, score in kept][: config.samples]


def _above(min_p: float | None, probabilities_BK: Tensor) -> Tensor:
    """Drop what is less likely than a share of the likeliest, and scale the rest to sum to one."""
    if min_p is not None:
        floor_B1 = min_p * probabilities_BK.amax(dim=1, keepdim=True)
        probabilities_BK = probabilities_BK.masked_fill(probabilities_BK < floor_B1, 0.0)
    return probabilities_BK / probabilities_BK.sum(dim=1, keepdim=True)


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Switch dropout off for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _bias(model: LanguageModel, forbidden: Sequence[int]) -> Tensor | None:
    """What forbids: −inf for the forbidden tokens and 0 for the others; None where there are none."""
    predicted = {token for token in forbidden if token < model.vocabulary_size}  # the start symbol never is
    if not predicted:
        return None
    if len(predicted) == model.vocabulary_size:
        raise ModelError(f"All {model.vocabulary_size} tokens are forbidden: nothing is left to generate.")
    bias_V = torch.zeros_like(model.output_bias)
    bias_V[sorted(predicted)] = -torch.inf
    return bias_V


def _read_prompt(model: LanguageModel, prompt_ids: Sequence[int], bias_V: Tensor | None) -> tuple[Tensor, State]:
    """Logits (1, V) after the start symbol and the prompt, and the carry there."""
    ids = [model.start_id, *prompt_ids]
    if model.last_step:
        ids = ids[-model.config.max_sequence_length :]  # what lies before its window has no effect
    tokens_1T = torch.tensor([ids], device=model.output_bias.device)
    state: State | None = None
    for chunk_1T in tokens_1T.split(PROMPT_CHUNK, dim=1):  # type: ignore[no-untyped-call]
        features = model.features(chunk_1T, state)
        state = features.state
    assert state is not None
    return _score(model, features.raw_BTH, bias_V), state


def _step(model: LanguageModel, ids_B: Tensor, state: State, bias_V: Tensor | None) -> tuple[Tensor, State]:
    features = model.features(ids_B.unsqueeze(1), state)
    return _score(model, features.raw_BTH, bias_V), features.state


def _score(model: LanguageModel, raw_BTH: Tensor, bias_V: Tensor | None) -> Tensor:
    logits_BV = model.project(raw_BTH[:, -1])
    if logits_BV.dtype in (torch.bfloat16, torch.float16):
        logits_BV = logits_BV.float()
    return logits_BV if bias_V is None else logits_BV + bias_V
