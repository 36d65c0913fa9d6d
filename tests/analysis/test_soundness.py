"""Sound models of every kind pass, and each planted bug is found by the check that is there for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elman.analysis.doctor import small_model
from elman.analysis.finding import Finding
from elman.analysis.kernels import kernels
from elman.analysis.learning import fresh_loss, learning, loss
from elman.analysis.masks import evaluation, masks
from elman.analysis.soundness import carry, causality, examine_model, round_trip, storage, weights
from elman.analysis.specimen import Specimen
from elman.config.schema import RECURRENT_CELLS, ModelConfig
from elman.models.dropout import Dropout, WordDropout
from elman.models.language_model import Features, LanguageModel
from elman.models.recurrent import RecurrentLayer, RecurrentStack
from elman.models.state import State, map_state
from elman.text.tokenizer import Tokenizer
from support import make_text

TEXT = make_text(1000)
TOKENIZER = Tokenizer.from_characters({sign: TEXT.count(sign) for sign in set(TEXT)})
EVERYWHERE = ("embedding", "input", "layer", "output")
AWD: dict[str, Any] = {
    "num_layers": 2, "dropout": 0.4, "embedding_dropout": 0.2, "weight_dropout": 0.5, "variational": EVERYWHERE,
    "tie_weights": True,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "rnn": {"cell": "rnn"},
    "relu": {"cell": "rnn", "nonlinearity": "relu"},
    "lstm": {"num_layers": 2, "dropout": 0.3, "embedding_dropout": 0.2},
    "gru": {"cell": "gru", "residual": True, "layer_norm": True, "embedding_size": 256, "num_layers": 2},
    "gru_reset_before": {"cell": "gru_reset_before", "initial_state": "learned"},
    "mingru": {"cell": "mingru", "initial_state": "learned", "num_layers": 2, "dropout": 0.3},
    "minlstm": {"cell": "minlstm", "residual": True, "layer_norm": True, "embedding_size": 256, "num_layers": 2},
    "transformer": {"cell": "transformer", "dropout": 0.2, "variational": ("layer",)},
    "last_step": {"head": "last_step", "dropout": 0.2, "max_sequence_length": 6},
    "tied": {"tie_weights": True, "embedding_size": 256},
    "awd": AWD,
    "awd gru": AWD | {"cell": "gru"},
    "adaptive": {"softmax": "adaptive", "cutoffs": (5, 10_000), "dropout": 0.3},
    "tied transformer": {"cell": "transformer", "tie_weights": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def threads() -> Any:
    """Small products are quickest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def specimen(tokenizer: Tokenizer = TOKENIZER, **settings: Any) -> Specimen:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Specimen(small_model(ModelConfig(**settings), tokenizer), tokenizer, TEXT)


def seeded(check: Callable[[Specimen], Finding], subject: Specimen) -> Finding:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return check(subject)


def assert_found(check: Callable[[Specimen], Finding], subject: Specimen, words: str) -> None:
    """The check fails with these words."""
    finding = seeded(check, subject)
    assert finding.status == "failure"
    assert words in finding.line
    assert finding.remedy


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_model_passes_every_check(kind: str) -> None:
    findings = list(examine_model(specimen(**KINDS[kind])))
    assert [finding for finding in findings if finding.status != "ok"] == []
    assert len({finding.name for finding in findings}) == len(findings) == 11


def test_a_cluster_of_which_the_batch_has_no_token_is_no_fault() -> None:
    rarest = TOKENIZER.vocabulary_size - 1
    subject = specimen(softmax="adaptive", cutoffs=(5, rarest))
    absent = replace(subject, text=TEXT.replace(TOKENIZER.decode([rarest]), ""))
    assert seeded(learning, absent).status == "ok"
    subject.model.adaptive.tails[0].requires_grad_(False).zero_()  # type: ignore[union-attr]  # it has one
    subject.model.adaptive.narrow[1].data.zero_()  # type: ignore[union-attr]
    assert_found(learning, subject, "no gradient reaches")


def test_an_examination_leaves_model_and_random_numbers_as_they_were() -> None:
    subject = specimen(**AWD)
    before = copy.deepcopy(subject.model.state_dict())
    state, training = torch.get_rng_state(), subject.model.training
    list(examine_model(subject))
    assert torch.equal(torch.get_rng_state(), state)
    assert subject.model.training == training
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    assert subject.model.output_dropout.p == 0.4
    assert not any(module._forward_hooks for module in subject.model.modules())


# Planted bugs -----------------------------------------------------------------------------


class Peeking(LanguageModel):
    """Mixes the next step's features into each."""

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Features:
        raw, dropped, after = super().features(tokens_BT, state)
        return Features(raw, dropped + 1e-3 * dropped.roll(-1, dims=1), after)


class PeekingWithoutGradient(Peeking):
    def features(self, tokens_BT: Tensor, state: State | None = None) -> Features:
        raw, dropped, after = LanguageModel.features(self, tokens_BT, state)
        return Features(raw, dropped + 1e-3 * dropped.detach().roll(-1, dims=1), after)


class Normalising(LanguageModel):
    """Subtracts the mean of the batch: rows see one another."""

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Features:
        raw, dropped, after = super().features(tokens_BT, state)
        return Features(raw, dropped - dropped.mean(0, keepdim=True), after)


@pytest.mark.parametrize("kind", ["lstm", "transformer", "tied", "last_step"])
def test_a_model_that_peeks_ahead_is_found_by_its_gradient(kind: str) -> None:
    subject = specimen(**KINDS[kind])
    subject.model.__class__ = Peeking
    assert_found(causality, subject, "have a gradient from inputs after it")


def test_a_model_that_peeks_ahead_without_gradient_is_found_by_change() -> None:
    subject = specimen()
    subject.model.__class__ = PeekingWithoutGradient
    assert_found(causality, subject, "change with the inputs after it")


def test_a_transformer_without_its_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = specimen(cell="transformer")
    body = type(subject.model.body)
    monkeypatch.setattr(body, "_visible", lambda self, length, valid: valid[:, None, None].expand(-1, 1, length, -1))
    assert_found(causality, subject, "have a gradient from inputs after it")


def test_rows_that_see_one_another_are_found() -> None:
    subject = specimen(cell="gru")
    subject.model.__class__ = Normalising
    finding = seeded(causality, subject)
    assert finding.status == "failure"


class Forgetful(RecurrentStack):
    """Hands on zeros."""

    def forward(self, x: Any, state: State, resets_BT: Tensor | None = None) -> tuple[Tensor, State]:
        out_BTH, after = super().forward(x, state, resets_BT)
        return out_BTH, map_state(torch.zeros_like, after)


class Deaf(RecurrentStack):
    """Starts every window anew, and hands on its state all the same."""

    def forward(self, x: Any, state: State, resets_BT: Tensor | None = None) -> tuple[Tensor, State]:
        return super().forward(x, map_state(torch.zeros_like, state), resets_BT)


@pytest.mark.parametrize("stack", [Forgetful, Deaf])
@pytest.mark.parametrize("cell", RECURRENT_CELLS)
def test_a_stack_that_drops_its_carry_is_found(stack: type, cell: str) -> None:
    subject = specimen(cell=cell)
    subject.model.body.__class__ = stack
    assert_found(carry, subject, "away from one of")


def test_a_transformer_that_loses_its_cache_is_found() -> None:
    subject = specimen(cell="transformer")
    body = subject.model.body
    inner = type(body)

    class Cacheless(inner):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, state: State, resets_BT: Tensor | None = None) -> tuple[Tensor, State]:
            return super().forward(x, self.initial_state(x.shape[0]), resets_BT)

    body.__class__ = Cacheless
    assert_found(carry, subject, "away from one of")


def test_a_layer_with_another_gate_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from elman.models import kernels as windows

    def swapped(x: Tensor, state: tuple[Tensor, ...], given: list[Tensor], training: bool) -> Any:
        return windows._lstm_window(x, state, [w.roll(w.shape[0] // 4, 0) for w in given], training)

    monkeypatch.setitem(windows.WINDOWS, "lstm", swapped)
    assert_found(kernels, specimen(num_layers=2), "layer 1 (lstm) is not its equations")


@pytest.mark.parametrize(("cell", "question"), [("gru", "is_fused"), ("minlstm", "is_scanned")])
def test_a_compiled_kernel_that_errs_is_found(monkeypatch: pytest.MonkeyPatch, cell: str, question: str) -> None:
    from elman.analysis import kernels as module

    monkeypatch.setattr(module, question, lambda kind, like: True)
    forward = RecurrentLayer.forward

    def wrong(self: RecurrentLayer, x: Any, state: Any) -> Any:
        out, after = forward(self, x, state)
        return (out * 1.1 if torch.is_autocast_enabled("cpu") else out), after

    monkeypatch.setattr(RecurrentLayer, "forward", wrong)
    assert_found(kernels, specimen(cell=cell), "the compiled kernel is")


def test_an_untied_copy_is_found() -> None:
    subject = specimen(tie_weights=True, embedding_size=256)
    subject.model.output_weight = nn.Parameter(subject.model.embedding.weight[:-1].detach().clone())
    assert_found(storage, subject, "does not follow the embedding")


def test_an_output_that_is_tied_without_being_asked_is_found() -> None:
    subject = specimen(embedding_size=256)
    subject.model.output_weight = None
    assert_found(storage, subject, "is false, and the output follows")


def test_a_weight_that_is_no_number_is_found() -> None:
    subject = specimen()
    with torch.no_grad():
        subject.model.output_bias[1] = torch.nan
    assert_found(weights, subject, "output_bias")


# Dropout ----------------------------------------------------------------------------------


class Restless(Dropout):
    """Drops in evaluation too."""

    def forward(self, x_BTH: Tensor) -> Tensor:
        return nn.functional.dropout(x_BTH, self.p)


class Unscaled(Dropout):
    """Scales in evaluation instead of in training, and forgets the latter."""

    def forward(self, x_BTH: Tensor) -> Tensor:
        return x_BTH if self.training else x_BTH * (1 - self.p)


class Redrawing(Dropout):
    """Draws a second mask half-way through the window."""

    def forward(self, x_BTH: Tensor) -> Tensor:
        halves = x_BTH.split(x_BTH.shape[1] // 2, dim=1)
        return torch.cat([super(Redrawing, self).forward(half) for half in halves], dim=1)


class Blind(WordDropout):
    """Drops each occurrence on its own, whatever it is asked."""

    def forward(self, tokens_BT: Tensor, num_words: int, like: Tensor) -> Tensor:
        return nn.functional.dropout(like.new_ones(tokens_BT.shape), self.p)


@pytest.mark.parametrize("kind", [Restless, Unscaled])
def test_dropout_left_on_in_evaluation_is_found(kind: type) -> None:
    subject = specimen(dropout=0.3)
    subject.model.output_dropout.__class__ = kind
    words = "still random" if kind is Restless else "same weights without dropout"
    assert_found(evaluation, subject, words)


@pytest.mark.parametrize("place", ["input", "layer", "output"])
def test_a_mask_redrawn_inside_the_window_is_found(place: str) -> None:
    subject = specimen(**AWD)
    stack = subject.model.body
    assert isinstance(stack, RecurrentStack)
    module = {"input": subject.model.input_dropout, "layer": stack.dropouts[1], "output": subject.model.output_dropout}
    module[place].__class__ = Redrawing
    assert_found(masks, subject, f"{place} dropout is variational, and redraws its mask inside a window")


def test_a_window_that_passes_dropout_in_pieces_is_found() -> None:
    class Piecewise(LanguageModel):
        def features(
            self, tokens_BT: Tensor, state: State | None = None, resets_BT: Tensor | None = None
        ) -> Features:
            pieces = []
            for tokens in tokens_BT.split(8, dim=1):
                pieces.append(super().features(tokens, state))
                state = pieces[-1].state
            raw, dropped = (torch.cat([piece[i] for piece in pieces], 1) for i in (0, 1))
            return Features(raw, dropped, pieces[-1].state)

    subject = specimen(dropout=0.3, variational=("input", "output"))
    subject.model.__class__ = Piecewise
    assert_found(masks, subject, "redraws its mask inside a window")


def test_a_mask_that_stays_where_it_should_change_is_found() -> None:
    subject = specimen(dropout=0.3)
    subject.model.output_dropout.variational = True
    assert_found(masks, subject, "output dropout is not variational, and keeps one mask")


def test_word_dropout_by_occurrence_is_found_where_it_should_be_by_type() -> None:
    subject = specimen(embedding_dropout=0.3, variational=("embedding",))
    subject.model.word_dropout.__class__ = Blind
    assert_found(masks, subject, "embedding dropout is variational, and redraws")
    subject = specimen(embedding_dropout=0.6)
    subject.model.word_dropout.variational = True
    assert_found(masks, subject, "embedding dropout is not variational, and keeps")


@pytest.mark.parametrize("cell", ["lstm", "transformer"])
def test_dropout_that_does_nothing_or_too_little_is_found(cell: str) -> None:
    subject = specimen(dropout=0.5, cell=cell)
    subject.model.input_dropout.p = 0.0
    assert_found(masks, subject, "input dropout")
    subject = specimen(dropout=0.5, cell=cell)
    subject.model.output_dropout = nn.Identity()  # type: ignore[assignment]
    assert_found(masks, subject, "output dropout does not scale")


def test_recurrent_weights_redrawn_at_every_step_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = RecurrentLayer.forward

    def stepwise(self: RecurrentLayer, x: Tensor, state: Any) -> Any:
        outs = []
        for step in x.split(1, dim=1):
            out, state = forward(self, step, state)
            outs.append(out)
        return torch.cat(outs, 1), state

    monkeypatch.setattr(RecurrentLayer, "forward", stepwise)
    assert_found(masks, specimen(weight_dropout=0.5), "not those of one mask per window")


# Learning ---------------------------------------------------------------------------------


class Cut(LanguageModel):
    """No gradient passes from the output to the layers."""

    def features(self, tokens_BT: Tensor, state: State | None = None) -> Features:
        raw, dropped, after = super().features(tokens_BT, state)
        return Features(raw, dropped.detach(), after)


class Leaky(LanguageModel):
    """So little gradient passes that nothing but the output's bias learns."""

    def project(self, features_H: Tensor) -> Tensor:
        return super().project(1e-6 * features_H)


class Biased(LanguageModel):
    """Its loss forgets the last token of the vocabulary."""

    def loss(self, features_BTH: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = self.project(features_BTH)
        logits_BTV[..., -1] = -1e9
        return nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")


def test_a_loss_that_is_not_the_logits_own_is_found() -> None:
    subject = specimen()
    subject.model.__class__ = Biased
    assert_found(loss, subject, "from the logits")


@pytest.mark.parametrize("kind", ["rnn", "lstm", "transformer", "last_step"])
def test_a_model_whose_gradient_is_cut_is_found(kind: str) -> None:
    subject = specimen(**KINDS[kind])
    subject.model.__class__ = Cut
    assert_found(learning, subject, "no gradient reaches embedding.weight")


def test_a_model_that_cannot_learn_a_batch_by_heart_is_found() -> None:
    subject = specimen()
    subject.model.__class__ = Leaky
    assert_found(learning, subject, "falls only from")


def test_a_model_too_narrow_to_learn_a_batch_by_heart_is_a_warning() -> None:
    subject = specimen()
    config = ModelConfig(embedding_size=4, hidden_size=4)
    sizes = {"vocabulary_size": TOKENIZER.vocabulary_size, "num_inputs": TOKENIZER.num_inputs}
    model = LanguageModel(config, **sizes, start_id=TOKENIZER.start_id, context_length=8)
    finding = seeded(learning, Specimen(model, TOKENIZER, subject.text, is_fresh=False))
    assert (finding.status, "for want of units" in finding.line) == ("warning", True)


def test_a_model_that_is_too_sure_of_itself_before_training_is_found() -> None:
    subject = specimen()
    with torch.no_grad():
        subject.model.output_bias[3] = 9.0
    assert_found(fresh_loss, subject, "untrained, log V is")


# Tokenizer --------------------------------------------------------------------------------


def test_a_vocabulary_that_lost_a_character_is_found() -> None:
    counts = {sign: TEXT.count(sign) for sign in set(TEXT) - {"k"}}
    assert_found(round_trip, specimen(Tokenizer.from_characters(counts)), "lacks 'k'")


@pytest.mark.parametrize("level", ["character", "word", "byte", "bpe"])
def test_a_tokenizer_that_does_not_give_back_the_text_is_found(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words: dict[str, int] = {}
    for word in TEXT.replace("\n", " ").split():
        words[word] = words.get(word, 0) + 1
    tokenizer = {
        "character": lambda: TOKENIZER,
        "word": lambda: Tokenizer.from_words(words),
        "byte": Tokenizer.for_bytes,
        "bpe": lambda: Tokenizer.train_bpe([TEXT], 300),
    }[level]()
    subject = specimen(tokenizer)
    assert seeded(round_trip, subject).status == "ok"
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: decode(self, ids).replace("ba", "b"))
    assert_found(round_trip, subject, "comes back as")


def test_symbols_that_the_vocabulary_leaves_out_on_purpose_are_no_fault() -> None:
    tokenizer = Tokenizer.from_characters({sign: TEXT.count(sign) for sign in set(TEXT)}, vocabulary_size=6)
    subject = Specimen(specimen(tokenizer).model, tokenizer, TEXT, knows_text=False)
    finding = seeded(round_trip, subject)
    assert finding.status == "ok"
    assert "stay unknown" in finding.line


def test_a_check_that_raises_is_a_failure_and_not_a_crash() -> None:
    subject = specimen()
    subject.model.output_dropout = None  # type: ignore[assignment]
    findings = list(examine_model(subject))
    assert {finding.status for finding in findings} == {"ok", "failure"}
    assert any("TypeError" in finding.line for finding in findings)
