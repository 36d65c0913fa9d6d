"""Language model: embed, unroll, project.

Shape suffixes: B batch, T time steps, W steps of the padded window, E embedding, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elman.config.schema import MINIMAL_CELLS, RECURRENT_CELLS, ModelConfig
from elman.errors import ConfigError, ModelError
from elman.models.count import count_parameters, refuse_what_no_memory_holds, solve_hidden_size
from elman.models.dropout import Dropout, WordDropout
from elman.models.embedding import Embedding
from elman.models.fused import Rows
from elman.models.initialization import (
    embedding_std,
    initialize_embedding,
    initialize_linear,
    initialize_output,
)
from elman.models.recurrent import RecurrentStack
from elman.models.softmax import (
    LARGE_VOCABULARY,
    AdaptiveSoftmax,
    default_cutoffs,
    kernel_pays,
    linear_loss,
    linear_scores,
)
from elman.models.state import State, expand, replace_rows
from elman.models.transformer import TransformerStack


class Features(NamedTuple):
    """What the layers made of a window, before it is scored."""

    raw_BTH: Tensor
    """The last layer's output."""
    dropped_BTH: Tensor
    """The same after output dropout."""
    state: State
    """Carry for the next window, still attached."""


class LanguageModel(nn.Module):
    """Scores the next token after every token.

    Args:
        config: The architecture; its parameter_budget must be solved (``build_model`` does).
        vocabulary_size: Tokens that can be predicted, V.
        num_inputs: Rows of the embedding: V, or V + 1 where ``start_id`` is V.
        start_id: The token that stands before every text.
        context_length: Tokens that the transformer's cache keeps; other cells ignore it.

    Weights may be tied: the first V rows of the embedding are the output matrix too, through a
    projection from H to E where the sizes differ.

    Source: Zaremba et al. (2014), arXiv:1409.2329; tied weights: Press & Wolf (2017),
    arXiv:1608.05859, and Inan et al. (2017), arXiv:1611.01462.
    """

    def __init__(
        self, config: ModelConfig, *, vocabulary_size: int, num_inputs: int, start_id: int, context_length: int
    ) -> None:
        super().__init__()
        assert config.parameter_budget is None
        assert vocabulary_size <= num_inputs
        assert 0 <= start_id < num_inputs
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.num_inputs = num_inputs
        self.start_id = start_id
        self.context_length = context_length
        self.last_step = config.head == "last_step"

        rows = torch.empty(num_inputs, config.embedding_size)  # nn.Embedding's own draws would be lost
        self.embedding = Embedding.from_pretrained(rows, freeze=False)  # type: ignore[no-untyped-call]
        self.word_dropout = WordDropout(config.dropout_at("embedding"), variational="embedding" in config.variational)
        self.input_dropout = Dropout(config.dropout_at("input"), variational="input" in config.variational)
        self.input_projection: nn.Linear | None = None
        self.body: RecurrentStack | TransformerStack
        if config.cell in RECURRENT_CELLS:
            self.body = RecurrentStack(config, config.embedding_size)
        else:
            if config.embedding_size != config.hidden_size:
                self.input_projection = nn.Linear(config.embedding_size, config.hidden_size, bias=False)
                initialize_linear(self.input_projection)
            within = config.max_sequence_length - 1 if self.last_step else context_length
            self.body = TransformerStack(config, context_length=within, cached=not self.last_step)
        self.output_dropout = Dropout(config.dropout_at("output"), variational="output" in config.variational)

        self.projection: nn.Linear | None = None
        self.output_weight: nn.Parameter | None = None
        self.adaptive: AdaptiveSoftmax | None = None
        if config.softmax == "adaptive":
            cutoffs = config.cutoffs or default_cutoffs(vocabulary_size)
            if not cutoffs or cutoffs[-1] >= vocabulary_size:
                raise ConfigError(
                    f"model.cutoffs must be below the vocabulary of {vocabulary_size}, got {list(cutoffs)}: "
                    "choose lower ones, or model.softmax exact."
                )
            self.adaptive = AdaptiveSoftmax(self.body.output_size, vocabulary_size, cutoffs)
        elif not config.tie_weights:
            self.output_weight = nn.Parameter(torch.empty(vocabulary_size, self.body.output_size))
            initialize_output(self.output_weight)
        elif self.body.output_size != config.embedding_size:
            self.projection = nn.Linear(self.body.output_size, config.embedding_size, bias=False)
            # The embedding that it leads to is of unit variance: the logits should begin below one.
            initialize_linear(self.projection, gain=config.embedding_size**-0.5)
        self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))
        std = embedding_std(
            config.embedding_size,
            is_output=config.tie_weights and self.projection is None,
            unit_features=config.cell in ("transformer", *MINIMAL_CELLS),
        )
        initialize_embedding(self.embedding.weight, std=std, start_id=start_id, vocabulary_size=vocabulary_size)

    @property
    def architecture(self) -> dict[str, Any]:
        """Everything ``from_architecture`` needs, as plain JSON."""
        config = asdict(self.config)
        config |= {name: list(config[name]) for name in ("variational", "cutoffs")}
        return {
            "config": config,
            "vocabulary_size": self.vocabulary_size,
            "num_inputs": self.num_inputs,
            "start_id": self.start_id,
            "context_length": self.context_length,
        }

    @classmethod
    def from_architecture(cls, architecture: dict[str, Any]) -> Self:
        """Rebuild the model, with fresh weights.

        Raises:
            ModelError: If a setting is missing or unknown, as in a model of another version.
        """
        try:
            sizes = {key: value for key, value in architecture.items() if key != "config"}
            settings = dict(architecture["config"])
            config = ModelConfig(
                **settings
                | {"variational": tuple(settings["variational"]), "cutoffs": tuple(settings.get("cutoffs", ()))}
            )
            return cls(config, **sizes)
        except (KeyError, TypeError) as error:
            raise ModelError(f"The model's architecture does not fit this version of elman: {error}.") from error

    def initial_state(self, batch_size: int) -> State:
        """The carry at the start of a text, on the model's device: zeros, learned, or an empty cache.

        With head last_step the carry is the padding: the W − 1 tokens before the first.
        """
        if self.last_step:
            before = (1, self.config.max_sequence_length - 1)
            padding = torch.full(before, self.start_id, device=self.embedding.weight.device)
            return expand(((padding,),), batch_size)
        return self.body.initial_state(batch_size)

    def reset(self, state: State, rows_B: Tensor) -> State:
        """Return the rows that are True to the initial state, as at a document's border."""
        return replace_rows(state, self.initial_state(rows_B.shape[0]), rows_B)

    def features(
        self, tokens_BT: Tensor, state: State | None = None, resets_BT: Tensor | None = None
    ) -> Features:
        """Run a window through embedding and layers.

        Args:
            tokens_BT: Token ids in [0, num_inputs), int64.
            state: Carry from the preceding window; None starts a text.
            resets_BT: True before whose step the state starts anew, as at a document's border.
        """
        if state is None:
            state = self.initial_state(tokens_BT.shape[0])
        assert state[0][0].shape[0] == tokens_BT.shape[0], "the carry is of another batch size"
        if self.last_step:
            assert resets_BT is None, "head last_step carries no state"
            raw_BTH, state = self._last_steps(tokens_BT, state)
        else:
            raw_BTH, state = self.body(self._embed(tokens_BT), state, resets_BT)
        return Features(raw_BTH, self.output_dropout(raw_BTH), state)

    def project(self, features_H: Tensor) -> Tensor:
        """Logits (…, V) of features (…, H); with the adaptive softmax they are log-probabilities."""
        if features_H.dim() == 3 and not features_H.is_contiguous():
            # A view of time-major memory, as the compiled kernel leaves: copying it would cost as much as the product.
            return self.project(features_H.transpose(0, 1).contiguous()).transpose(0, 1)
        if self.adaptive is not None:
            return self.adaptive.log_probabilities(features_H, self.output_bias)
        features_H, weight_VH, bias_V = self._output(features_H)
        return F.linear(features_H, weight_VH[: self.vocabulary_size], bias_V)

    def scores_in_parts(self, num_targets: int) -> bool:
        """Whether ``loss`` and ``scores`` are to be used for so many targets, instead of whole logits."""
        if self.adaptive is not None or self.vocabulary_size >= LARGE_VOCABULARY:
            return True
        return kernel_pays(self._output_weight.detach()[: self.vocabulary_size], num_targets)

    def loss(self, features_BTH: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy of the targets, summed, in nats, without whole logits; torch's ignore index is skipped."""
        features_NH, targets_N = _flat(features_BTH, targets_BT)
        if self.adaptive is not None:
            return self.adaptive.loss(features_NH, self.output_bias, targets_N)
        return linear_loss(*self._output(features_NH), targets_N)

    def scores(self, features_BTH: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and how many targets were the likeliest prediction; no gradients."""
        features_NH, targets_N = _flat(features_BTH, targets_BT)
        if self.adaptive is not None:
            return self.adaptive.scores(features_NH, self.output_bias, targets_N)
        return linear_scores(*self._output(features_NH), targets_N)

    def _output(self, features_H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the exact output layer multiplies and adds: features, weight (V and more rows, ·) and bias (V,)."""
        if self.projection is not None:
            features_H = F.linear(features_H, self.projection.weight)
        return features_H, self._output_weight, self.output_bias

    @property
    def _output_weight(self) -> Tensor:
        return self.embedding.weight if self.output_weight is None else self.output_weight

    def forward(self, tokens_BT: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Score the next token at every position.

        Args:
            tokens_BT: Token ids in [0, num_inputs), int64.
            state: Carry from the preceding window; None starts a text.

        Returns:
            Logits (B, T, V), and the carry for the next window, still attached.
        """
        features = self.features(tokens_BT, state)
        return self.project(features.dropped_BTH), features.state

    def _embed(self, tokens_BT: Tensor) -> Tensor | Rows:
        words_VE = self.embedding.weight
        scale_BT = None
        if self.training and self.word_dropout.p > 0:
            scale_BT = self.word_dropout(tokens_BT, self.num_inputs, words_VE)
        varied = self.training and self.input_dropout.p > 0
        # Every position is a row of a small matrix: the first layer may multiply that one instead.
        if isinstance(self.body, RecurrentStack) and not varied and 2 * self.num_inputs <= tokens_BT.numel():
            if scale_BT is None:
                return Rows(words_VE, tokens_BT)
            kept_VE, none_1E = words_VE / (1 - self.word_dropout.p), words_VE.new_zeros(1, words_VE.shape[1])
            return Rows(torch.cat((kept_VE, none_1E)), tokens_BT.masked_fill(scale_BT == 0, self.num_inputs))
        embedded_BTE: Tensor = self.embedding(tokens_BT)
        if scale_BT is not None:
            embedded_BTE = embedded_BTE * scale_BT.unsqueeze(-1)
        embedded_BTE = self.input_dropout(embedded_BTE)
        if self.input_projection is not None:
            embedded_BTE = self.input_projection(embedded_BTE)
        return embedded_BTE

    def _last_steps(self, tokens_BT: Tensor, state: State) -> tuple[Tensor, State]:
        """The textbook's many-to-one: every position is the last step of a window of its own."""
        batch_size, length = tokens_BT.shape
        ((carried_BW,),) = state
        stream = torch.cat((carried_BW, tokens_BT), dim=1)
        windows_BTW = stream.unfold(1, self.config.max_sequence_length, 1)
        windows_NW = windows_BTW.flatten(0, 1)
        out_NWH, _ = self.body(self._embed(windows_NW), self.body.initial_state(windows_NW.shape[0]))
        return out_NWH[:, -1].unflatten(0, (batch_size, length)), ((stream[:, length:],),)


def _flat(features_BTH: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens in the order in memory: that of the compiled kernel is time-major, and a copy costs."""
    if not features_BTH.is_contiguous():
        features_BTH, targets_BT = features_BTH.transpose(0, 1), targets_BT.t()
    return features_BTH.flatten(0, 1), targets_BT.flatten()


def build_model(
    config: ModelConfig, *, vocabulary_size: int, num_inputs: int, start_id: int, context_length: int
) -> LanguageModel:
    """Build the model, choosing hidden_size where the config gives a parameter_budget.

    Raises:
        ConfigError: If no hidden size keeps the budget, or the memory cannot hold the model.
    """
    sizes = {
        "vocabulary_size": vocabulary_size,
        "num_inputs": num_inputs,
        "start_id": start_id,
        "context_length": context_length,
    }

    def total(hidden_size: int) -> int:
        candidate = replace(config, hidden_size=hidden_size, parameter_budget=None)
        with torch.device("meta"):  # shapes without storage
            return count_parameters(LanguageModel(candidate, **sizes))["total"]

    if config.parameter_budget is not None:
        config = replace(config, hidden_size=solve_hidden_size(config, total), parameter_budget=None)
    refuse_what_no_memory_holds(config, total(config.hidden_size))
    return LanguageModel(config, **sizes)
