"""Is the sequence model what it says it is? Each check catches one kind of bug that training hides.

A model that sees the next token, forgets its state between windows or keeps dropping units
while it is scored trains without complaint, and its figures are wrong. What must be exact is
compared in double precision, on a copy.

Shape suffixes: B batch, T time steps, H hidden, V vocabulary, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from elman.analysis.finding import Finding, Outcome, check, failure, ok
from elman.analysis.kernels import kernels
from elman.analysis.learning import fresh_loss, learning, loss
from elman.analysis.masks import evaluation, masks
from elman.analysis.specimen import BATCH, BUG, EXACT, STEPS, Specimen, distance, exact, listed, random_tokens
from elman.models.language_model import LanguageModel
from elman.models.state import State
from elman.text.tokenizer import UNKNOWN, split_words


def examine_model(specimen: Specimen) -> Iterator[Finding]:
    """Every check in turn; the random numbers of the caller stay as they are."""
    checks: tuple[Callable[[Specimen], Finding], ...] = (
        round_trip, weights, causality, carry, kernels, storage, evaluation, masks, loss, fresh_loss, learning,
    )  # fmt: skip
    for examine in checks:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield examine(specimen)


# What the model sees ----------------------------------------------------------------------


@check("no look ahead")
def causality(specimen: Specimen) -> Outcome:
    """Logits at t depend on no input after t: by gradient, and by changing what comes after. Nor on other rows."""
    model = exact(specimen.model)
    others = torch.arange(model.vocabulary_size)
    others = others[others != model.start_id]
    tokens_T = others[torch.randperm(len(others))[:STEPS]]  # all different: each has a row of the embedding to itself
    logits_TV = model(tokens_T[None])[0][0]
    for t in sorted({0, len(tokens_T) // 2, len(tokens_T) - 2} & set(range(len(tokens_T) - 1))):
        # The score of a token that was seen: where weights are tied, the future's rows have no part in it as output.
        grads = torch.autograd.grad(
            logits_TV[t, tokens_T[0]], model.embedding.weight, retain_graph=True, allow_unused=True
        )
        grad_VE = grads[0] if grads[0] is not None else torch.zeros_like(model.embedding.weight)
        if grad_VE[tokens_T[t + 1 :]].any():
            return failure(f"the logits of step {t} have a gradient from inputs after it", BUG)
        if not grad_VE[tokens_T[: t + 1]].any():
            return failure(f"the logits of step {t} have no gradient from the inputs up to it", BUG)
    tokens_BT = random_tokens(model)
    changed_BT = (tokens_BT + torch.randint(1, model.vocabulary_size, tokens_BT.shape)) % model.vocabulary_size
    with torch.no_grad():
        whole_BTV = model(tokens_BT)[0]
        for t in (0, STEPS // 3, STEPS - 2):
            mixed_BT = torch.cat((tokens_BT[:, : t + 1], changed_BT[:, t + 1 :]), dim=1)
            if distance(model(mixed_BT)[0][:, : t + 1], whole_BTV[:, : t + 1]) > EXACT:
                return failure(f"the logits up to step {t} change with the inputs after it", BUG)
        mixed_BT = torch.cat((tokens_BT[:1], changed_BT[1:]))
        if distance(model(mixed_BT)[0][:1], whole_BTV[:1]) > EXACT:
            return failure("the logits of one row of the batch change with the others", BUG)
    return ok("no gradient from the future, no change by it, none between rows")


@check("carried state")
def carry(specimen: Specimen) -> Outcome:
    """One long window equals chunks with the state carried, and the past has a say."""
    model = exact(specimen.model)
    tokens_BT = random_tokens(model)
    whole_BTV, whole_state = model(tokens_BT)
    for lengths in ((1, 2, 5, STEPS - 8), (STEPS // 2, STEPS // 2), (1,) * STEPS):
        for with_grad in (True, False):  # without, single steps have kernels of their own
            with torch.set_grad_enabled(with_grad):
                chunks_BTV, state = _in_chunks(model, tokens_BT, lengths)
            apart = distance(chunks_BTV, whole_BTV)
            if not apart <= EXACT:
                return failure(f"windows of {listed(lengths)} are {apart:.1e} away from one of {STEPS}", BUG)
            pairs = zip(_leaves(state), _leaves(whole_state), strict=True)
            if any(distance(one.double(), other.double()) > EXACT for one, other in pairs):
                return failure(f"windows of {listed(lengths)} end in another state than one of {STEPS}", BUG)
    changed_BT = tokens_BT.clone()
    changed_BT[:, 0] = (changed_BT[:, 0] + 1) % model.vocabulary_size
    narrow = model.last_step and model.config.max_sequence_length == 1
    if not narrow and torch.equal(model(changed_BT)[0][:, 1], whole_BTV[:, 1]):
        return failure("the second prediction is the same whatever the first token was", BUG)
    return ok(f"{STEPS} steps at once, in chunks and one by one: equal to {EXACT:.0e}, state and all")


# What it is made of -----------------------------------------------------------------------


@check("weights")
def weights(specimen: Specimen) -> Outcome:
    """Every weight is a finite number."""
    named = dict(specimen.model.named_parameters())
    bad = [name for name, parameter in named.items() if not torch.isfinite(parameter).all()]
    if bad:
        return failure(f"NaN or infinite: {listed(bad)}", "use an earlier checkpoint: this training diverged.")
    return ok(f"{sum(parameter.numel() for parameter in named.values()):,}, all finite")


@check("tied weights")
def storage(specimen: Specimen) -> Outcome:
    """Where weights are tied, embedding and output are one storage; else they are two."""
    model = exact(specimen.model)
    tied = model.config.tie_weights
    row = int(torch.randint(model.vocabulary_size, ()))
    features_BTH = torch.randn(2, 3, model.body.output_size, dtype=torch.float64)
    with torch.no_grad():
        before_BTV = model.project(features_BTH)
        model.embedding.weight[row] += 1.0
        moved = (model.project(features_BTH) != before_BTV).flatten(0, 1).any(0).nonzero().flatten().tolist()
    if tied and moved != [row]:
        return failure("model.tie_weights is true, and the output does not follow the embedding", BUG)
    if not tied and moved:
        return failure("model.tie_weights is false, and the output follows the embedding", BUG)
    return ok("embedding and output are one storage" if tied else "not tied: embedding and output are apart")


@check("tokenizer")
def round_trip(specimen: Specimen) -> Outcome:
    """The corpus's own text survives being encoded and decoded."""
    tokenizer, text = specimen.tokenizer, specimen.text
    unknown = tokenizer.unknown_symbols(text)
    lost = [symbol for symbol in unknown if symbol != UNKNOWN]
    if specimen.knows_text and lost:
        return failure(f"the vocabulary lacks {listed(map(repr, lost))} of its own training text", BUG)
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(ids)
    if tokenizer.level == "word":
        hidden = set(unknown)
        expected: Any = [UNKNOWN if word in hidden else word for word in split_words(text)]
        found: Any = split_words(decoded)
    else:
        table = dict.fromkeys(map(ord, lost), UNKNOWN) if tokenizer.level == "character" else {}
        expected, found = text.translate(table), decoded
    if found != expected:
        pairs = enumerate(zip(found, expected, strict=False))
        place = next((i for i, (one, other) in pairs if one != other), min(len(found), len(expected)))
        unit = "word" if tokenizer.level == "word" else "character"
        got, wanted = (part[place : place + 1] for part in (found, expected))
        return failure(f"{unit} {place} comes back as {got!r} instead of {wanted!r}", "train with a new tokenizer.")
    hidden_share = f"; {len(lost)} symbols stay unknown" if lost else ""
    size = f"{len(text):,} characters, {len(ids):,} tokens, {tokenizer.vocabulary_size:,} symbols"
    return ok(f"{size}: the same again{hidden_share}")


def _in_chunks(model: LanguageModel, tokens_BT: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, State]:
    state, logits = model.initial_state(BATCH), []
    for chunk_BT in torch.split(tokens_BT, list(lengths), dim=1):
        chunk_BTV, state = model(chunk_BT, state)
        logits.append(chunk_BTV)
    return torch.cat(logits, dim=1), state


def _leaves(state: State) -> list[Tensor]:
    return [tensor for part in state for tensor in part]
