"""Every setting, declared once.

A setting is a field of a frozen dataclass, with its description in the docstring
below it and its check in ``__post_init__``. Flags, ``--help``, YAML, MLflow params,
the table in the README and search spaces all derive from these classes. Standard
library only, so that this module loads in a blink.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from typing import Literal

from elman.errors import ConfigError, without_password

Cell = Literal["rnn", "lstm", "gru", "gru_reset_before", "mingru", "minlstm", "transformer"]
Level = Literal["byte", "character", "word", "bpe"]
Place = Literal["embedding", "input", "layer", "output"]

RECURRENT_CELLS = ("rnn", "lstm", "gru", "gru_reset_before", "mingru", "minlstm")
MINIMAL_CELLS = ("mingru", "minlstm")
"""Those whose gates see the input alone: no weight meets the state, and a window is computed at once."""


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Refuse a value: ``name`` must be ``rule``. Written so that NaN fails every comparison."""
    if not holds:
        raise ConfigError(f"{name} must be {rule}, got {value!r}.")


def _count(name: str, value: int, most: int) -> None:
    """Refuse a count below 1, or so large that it would only exhaust the memory."""
    require(value >= 1, name, value, "at least 1")
    require(value <= most, name, value, f"at most {most}")


def _positive(name: str, value: float | None) -> None:
    require(value is None or (value > 0 and isfinite(value)), name, value, "a positive number")


def _probability(name: str, value: float | None) -> None:
    require(value is None or 0 <= value < 1, name, value, "at least 0 and below 1")


def _not_negative(name: str, value: float) -> None:
    require(value >= 0 and isfinite(value), name, value, "zero or a positive number")


def check_name(name: str, value: str | None) -> None:
    """Names become folders and addresses: an allow-list keeps ``../`` and invisible characters out of both."""
    holds = value is None or re.fullmatch(r"\w[\w .,+=()-]{0,127}", value) is not None
    require(holds, name, value, "a name of up to 128 letters, digits, spaces and . , + = ( ) _ -")


def check_store(name: str, value: str | None) -> None:
    """An address of a kind that is tested; MLflow takes others, some of which run what they are told to."""
    holds = not value or re.match(r"((sqlite|postgresql|mysql)(\+\w+)?|https?)://", value) is not None
    require(holds, name, without_password(value or ""), "sqlite:///PATH, postgresql://…, mysql://… or http(s)://…")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which text, how it is split, and how it is cut into tokens."""

    name: str = "bible-asv"
    """A built-in or preset by name; a path to a text file, directory or glob (.txt, .txt.gz,
    .jsonl, .parquet, or source code); or hub:OWNER/NAME."""
    level: Level = "character"
    """What a token is: byte, character, word or bpe."""
    validation_file: str | None = None
    """File, directory or glob that is the validation split; None takes the official split or cuts one."""
    test_file: str | None = None
    """File, directory or glob that is the test split; None takes the official split or cuts one."""
    validation_fraction: float = 0.05
    """Share of the characters cut off as validation split where the corpus has no official one."""
    test_fraction: float = 0.05
    """Share of the characters, at the end, cut off as test split where the corpus has no official
    split; 0 makes none."""
    training_fraction: float = 1.0
    """Share of the training split that is used, spread over it in twenty pieces: for learning curves."""
    folds: int | None = None
    """Blocks of running text that k-fold cross-validation cuts the training text into, together with what
    would be cut off it as validation split; None makes no folds."""
    fold: int = 0
    """Which block is the validation split, counted from 0; the others are the training split."""
    fold_gap: int = 1000
    """Characters left out on either side of the held-out block, so that nothing leaks over its borders."""
    config: str | None = None
    """Configuration of a hub data set; None takes its default."""
    split: str | None = None
    """Split of a hub data set that is the training text; None takes `train`."""
    column: str = "text"
    """Column that holds the text, in .jsonl, .parquet and hub data sets."""
    revision: str | None = None
    """Git revision of a hub data set; None takes the newest."""
    streaming: bool = False
    """Read the training split on the fly and keep no copy: for corpora larger than the disk."""
    streaming_sample: int = 10_000_000
    """Characters at the start of a streamed training split that make the vocabulary and, where
    there is no official one, the validation and test splits."""
    document_separator: str | None = None
    """Text that ends a document inside a plain file; None makes each file (and each row) one document."""
    encoding_errors: Literal["strict", "replace", "ignore"] = "strict"
    """What invalid UTF-8 does: strict refuses it and names the byte, replace puts U+FFFD, ignore drops it."""
    vocabulary_size: int | None = None
    """Most tokens in the vocabulary; the most frequent stay. None keeps every word and
    character, and makes 4,096 for bpe. Bytes are always 256."""
    min_count: int = 1
    """A word or character seen less often in the training split becomes `<unk>`."""

    def __post_init__(self) -> None:
        require(self.name.strip() != "", "corpus.name", self.name, "a name or a path")
        require(0 < self.validation_fraction < 1, "corpus.validation_fraction", self.validation_fraction,
                 "above 0 and below 1")
        _probability("corpus.test_fraction", self.test_fraction)
        require(self.validation_fraction + self.test_fraction < 1, "corpus.validation_fraction + corpus.test_fraction",
                 self.validation_fraction + self.test_fraction, "below 1")
        require(0 < self.training_fraction <= 1, "corpus.training_fraction", self.training_fraction,
                "above 0 and at most 1")
        require(self.training_fraction == 1 or not self.streaming, "corpus.training_fraction", self.training_fraction,
                "1 with corpus.streaming, whose length is not known")
        self._check_folds()
        require(self.streaming_sample >= 1000, "corpus.streaming_sample", self.streaming_sample, "at least 1000")
        require(self.min_count >= 1, "corpus.min_count", self.min_count, "at least 1")
        require(self.document_separator != "", "corpus.document_separator", self.document_separator,
                 "some text, or null for none")
        require(self.column != "", "corpus.column", self.column, "the name of a column")
        if self.vocabulary_size is not None:
            require(self.level != "byte", "corpus.vocabulary_size", self.vocabulary_size,
                     "null at corpus.level byte, which always has 256")
            least = 257 if self.level == "bpe" else 3
            require(self.vocabulary_size >= least, "corpus.vocabulary_size", self.vocabulary_size,
                     f"at least {least} at corpus.level {self.level}")
            require(self.level != "bpe" or self.vocabulary_size <= 10**6, "corpus.vocabulary_size",
                    self.vocabulary_size, "at most 1000000 at corpus.level bpe")
        if self.level in ("byte", "bpe"):
            require(self.min_count == 1, "corpus.min_count", self.min_count,
                     f"1 at corpus.level {self.level}, which has no unknown tokens")


    def _check_folds(self) -> None:
        require(self.fold_gap >= 0, "corpus.fold_gap", self.fold_gap, "zero or more")
        if self.folds is None:
            require(self.fold == 0, "corpus.fold", self.fold, "0 where corpus.folds is null")
            return
        require(self.folds >= 2, "corpus.folds", self.folds, "at least 2, or null")
        require(0 <= self.fold < self.folds, "corpus.fold", self.fold, f"from 0 to {self.folds - 1}")
        require(not self.streaming, "corpus.folds", self.folds,
                 "null with corpus.streaming, which cannot leave out a block")
        require(self.validation_file is None, "corpus.folds", self.folds,
                 "null with corpus.validation_file: a fold is its own validation split")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture: embed, unroll, project."""

    cell: Cell = "lstm"
    """Recurrence: rnn (Elman), lstm, gru (torch's), gru_reset_before (Cho et al.'s), mingru and
    minlstm (Feng et al.'s, computed in parallel over time), or a small causal transformer as the
    yardstick."""
    nonlinearity: Literal["tanh", "relu"] = "tanh"
    """Activation of the rnn cell."""
    embedding_size: int = 128
    """Width of the token embedding."""
    hidden_size: int = 256
    """Hidden units in each layer."""
    last_hidden_size: int | None = None
    """Hidden units in the last layer; None takes hidden_size."""
    parameter_budget: int | None = None
    """Total parameters to come closest to from below by choosing hidden_size; None keeps hidden_size."""
    num_layers: int = 1
    """Recurrent layers (or Transformer blocks), stacked."""
    num_heads: int = 4
    """Attention heads of the transformer."""
    tie_weights: bool = False
    """Share the embedding with the output layer, through a projection where the sizes differ."""
    softmax: Literal["exact", "adaptive"] = "exact"
    """Output layer: exact scores every token in full width; adaptive, for words, scores rarer ones
    in narrower clusters, which is faster at large vocabularies."""
    cutoffs: tuple[int, ...] = ()
    """Token ids at which the adaptive softmax's clusters begin, rising; empty takes a sixteenth and
    a quarter of the vocabulary."""
    residual: bool = False
    """Add each layer's input to its output where the sizes agree (Transformer blocks always do)."""
    layer_norm: bool = False
    """Normalise each recurrent layer's output (Transformer blocks always do)."""
    initial_state: Literal["zero", "learned"] = "zero"
    """Hidden state at the start of a text: zeros, or parameters learned with the rest."""
    forget_bias: float = 1.0
    """Initial bias of the forget gate of lstm and minlstm."""
    dropout: float = 0.0
    """Dropout probability at the input, between layers and at the output, wherever the
    setting for that place is null."""
    embedding_dropout: float = 0.0
    """Probability of dropping a whole word from the embedding."""
    input_dropout: float | None = None
    """Dropout on the embedded input; null follows dropout. Over few symbols 0 is faster: products are looked up."""
    layer_dropout: float | None = None
    """Dropout between layers; null follows dropout."""
    output_dropout: float | None = None
    """Dropout on the last layer's output; null follows dropout."""
    weight_dropout: float = 0.0
    """Dropout on the hidden-to-hidden weights, one mask per window."""
    variational: tuple[Place, ...] = ()
    """Places where dropout keeps one mask for a whole window: embedding, input, layer, output.
    Elsewhere each step draws its own."""
    head: Literal["every_step", "last_step"] = "every_step"
    """Predict after every step, or only after the last step of a padded window (many-to-one)."""
    max_sequence_length: int = 64
    """Tokens in the padded window of head last_step."""

    def __post_init__(self) -> None:
        for name, most in (("embedding_size", 10**6), ("hidden_size", 10**6), ("num_layers", 1000),
                           ("num_heads", 1000), ("max_sequence_length", 10**6), ("last_hidden_size", 10**6),
                           ("parameter_budget", 10**12)):  # fmt: skip
            value = getattr(self, name)
            if value is not None:
                _count(f"model.{name}", value, most)
        for name in ("dropout", "embedding_dropout", "input_dropout", "layer_dropout", "output_dropout",
                     "weight_dropout"):
            _probability(f"model.{name}", getattr(self, name))
        require(isfinite(self.forget_bias), "model.forget_bias", self.forget_bias, "finite")
        require(len(set(self.variational)) == len(self.variational), "model.variational", self.variational,
                 "a list that names each place once")
        if self.cell != "rnn":
            require(self.nonlinearity == "tanh", "model.nonlinearity", self.nonlinearity,
                     f"tanh with model.cell {self.cell}; only rnn has a choice")
        if self.cell not in ("lstm", "minlstm"):
            require(self.forget_bias == 1.0, "model.forget_bias", self.forget_bias,
                     f"left at 1.0 with model.cell {self.cell}; only lstm and minlstm have a forget gate's bias to set")
        if self.cell in MINIMAL_CELLS:
            require(self.weight_dropout == 0, "model.weight_dropout", self.weight_dropout,
                     f"0 with model.cell {self.cell}, which has no recurrent weights")
        if self.layer_dropout:
            require(self.num_layers > 1, "model.layer_dropout", self.layer_dropout,
                     "0 or null with model.num_layers 1; there is nothing between layers")
        if self.cell == "transformer":
            self._check_transformer()
        if self.softmax == "adaptive":
            require(not self.tie_weights, "model.tie_weights", self.tie_weights,
                     "false with model.softmax adaptive, whose clusters are narrower than the embedding")
            require(all(a < b for a, b in pairwise((0, *self.cutoffs))), "model.cutoffs", self.cutoffs,
                     "rising ids above 0")
        else:
            require(not self.cutoffs, "model.cutoffs", self.cutoffs, "empty with model.softmax exact")

    def _check_transformer(self) -> None:
        if self.parameter_budget is None:
            require(self.hidden_size % (2 * self.num_heads) == 0, "model.hidden_size", self.hidden_size,
                     f"a multiple of 2 × model.num_heads ({2 * self.num_heads}) with model.cell transformer")
        require(self.last_hidden_size is None, "model.last_hidden_size", self.last_hidden_size,
                 "null with model.cell transformer, whose blocks are of one size")
        require(self.initial_state == "zero", "model.initial_state", self.initial_state,
                 "zero with model.cell transformer, which has no hidden state")
        require(self.weight_dropout == 0, "model.weight_dropout", self.weight_dropout,
                 "0 with model.cell transformer, which has no recurrent weights")

    def dropout_at(self, place: Place) -> float:
        """Dropout probability in force at ``place``."""
        own = {"embedding": self.embedding_dropout, "input": self.input_dropout, "layer": self.layer_dropout,
               "output": self.output_dropout}[place]
        return self.dropout if own is None else own


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How the token stream is folded into rows and cut into windows."""

    batch_size: int = 64
    """Parallel streams: the training split is folded into so many contiguous rows."""
    sequence_length: int = 64
    """Truncated-BPTT window, in tokens."""
    variable_length: bool = False
    """Draw each training window's length around sequence_length, and scale the learning rate with it."""
    evaluation_batch_size: int = 16
    """Parallel streams in validation and test; fewer where the split is short."""
    reset_at_documents: bool = False
    """Reset the hidden state at document borders instead of carrying it across."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "sequence_length", "evaluation_batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"data.{name}", value, "at least 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer, learning-rate schedule and regularisation."""

    name: Literal["sgd", "adam", "adamw", "rmsprop", "nt_asgd"] = "adamw"
    """Update rule; nt_asgd is SGD that starts averaging once validation stops improving."""
    lr: float = 3e-3
    """Peak learning rate."""
    embedding_lr_factor: float = 1.0
    """Factor on the learning rate for the embedding; above 1 helps adam and adamw where time is short."""
    momentum: float = 0.0
    """Momentum of sgd, nt_asgd and rmsprop."""
    nesterov: bool = False
    """Nesterov's form of momentum, for sgd."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's first and second moments."""
    weight_decay: float = 0.0
    """L2 penalty (decoupled in adamw) on weight matrices; biases, norms and embeddings are spared."""
    max_grad_norm: float | None = 1.0
    """Ceiling on the global L2 gradient norm; null leaves gradients unclipped."""
    schedule: Literal["constant", "cosine", "linear", "one_cycle", "step", "plateau"] = "cosine"
    """Learning rate over time: constant; cosine, linear or one_cycle (over the whole training);
    step (by epochs); plateau (by the validation loss)."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its peak."""
    final_lr_fraction: float = 0.01
    """Share of lr at the end of cosine, linear and one_cycle, and the floor of plateau."""
    decay_factor: float = 0.5
    """Factor on the learning rate at each decay of step and plateau."""
    decay_start_epoch: int = 0
    """Epochs at the full rate before step begins to decay."""
    decay_every_epochs: int = 1
    """Epochs between decays of step."""
    decay_patience: int = 0
    """Validations without improvement that plateau tolerates before it decays."""
    nonmonotone_interval: int = 5
    """Validations that nt_asgd looks back: averaging starts when the loss beats none of the best before them."""
    activation_regularization: float = 0.0
    """Weight of the mean squared dropped-out output (AR)."""
    temporal_activation_regularization: float = 0.0
    """Weight of the mean squared change of the output from step to step (TAR)."""

    def __post_init__(self) -> None:
        for name in ("lr", "embedding_lr_factor", "max_grad_norm"):
            _positive(f"optimizer.{name}", getattr(self, name))
        for name in ("weight_decay", "activation_regularization", "temporal_activation_regularization"):
            _not_negative(f"optimizer.{name}", getattr(self, name))
        for name in ("warmup_steps", "decay_start_epoch", "decay_patience"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name}", value, "zero or more")
        for name in ("decay_every_epochs", "nonmonotone_interval"):
            value = getattr(self, name)
            require(value >= 1, f"optimizer.{name}", value, "at least 1")
        _probability("optimizer.momentum", self.momentum)
        for beta in self.betas:
            _probability("optimizer.betas", beta)
        require(0 <= self.final_lr_fraction <= 1, "optimizer.final_lr_fraction", self.final_lr_fraction,
                 "from 0 to 1")
        require(0 < self.decay_factor < 1, "optimizer.decay_factor", self.decay_factor, "above 0 and below 1")
        if self.name in ("adam", "adamw"):
            require(self.momentum == 0, "optimizer.momentum", self.momentum,
                     f"0 with optimizer.name {self.name}; set optimizer.betas instead")
        if self.nesterov:
            require(self.name == "sgd" and self.momentum > 0, "optimizer.nesterov", self.nesterov,
                     "false unless optimizer.name is sgd with a positive optimizer.momentum")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, on what, and how often to look."""

    max_epochs: int | None = 5
    """Passes over the training split; null leaves the end to max_steps or max_minutes."""
    max_steps: int | None = None
    """Optimizer steps; null sets no limit."""
    max_minutes: float | None = None
    """Minutes of training, wall clock; null sets no limit. The schedule follows whichever limit comes first."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic: auto takes bf16 where the hardware multiplies in it, else fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train: auto takes a GPU where there is one."""
    threads: int | None = None
    """CPU threads; null takes every core of this process."""
    accumulate_windows: int = 1
    """Windows whose gradients make one optimizer step."""
    validate_every_steps: int | None = None
    """Steps between validations; null validates at the end of each epoch."""
    patience: int | None = None
    """Validations without improvement before training stops early; null never does."""
    log_every_steps: int = 10
    """Steps between logged training metrics."""
    checkpoint_minutes: float | None = 10.0
    """Minutes between checkpoints to resume from, besides one at each validation; null writes none by the clock."""
    checkpoint_every_steps: int | None = None
    """Steps between checkpoints to resume from, besides those; null writes none by steps."""
    sample_length: int = 300
    """Tokens of generated text recorded at each validation; 0 records none."""
    sample_prompt: str = ""
    """Prompt of those samples; empty starts from the beginning of a text."""

    def __post_init__(self) -> None:
        for name in ("max_epochs", "max_steps", "threads", "validate_every_steps", "patience",
                     "checkpoint_every_steps"):  # fmt: skip
            value = getattr(self, name)
            require(value is None or value >= 1, f"trainer.{name}", value, "at least 1, or null")
        _positive("trainer.max_minutes", self.max_minutes)
        _positive("trainer.checkpoint_minutes", self.checkpoint_minutes)
        for name in ("accumulate_windows", "log_every_steps"):
            value = getattr(self, name)
            require(value >= 1, f"trainer.{name}", value, "at least 1")
        require(self.threads is None or self.threads <= 4096, "trainer.threads", self.threads, "at most 4096")
        require(self.sample_length >= 0, "trainer.sample_length", self.sample_length, "zero or more")
        require(self.sample_length <= 10**6, "trainer.sample_length", self.sample_length, "at most 1000000")
        if self.max_epochs is None and self.max_steps is None and self.max_minutes is None:
            raise ConfigError(
                "trainer.max_epochs, trainer.max_steps and trainer.max_minutes are all null: "
                "set at least one, or training never ends."
            )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where the run is recorded."""

    uri: str | None = None
    """MLflow tracking URI; null takes MLFLOW_TRACKING_URI, else sqlite under ./mlruns."""
    experiment: str = "elman"
    """MLflow experiment that holds the run."""
    register: str | None = None
    """Name under which the model is registered; null registers none."""
    system_metrics: bool = True
    """Sample processor, memory and GPU use while training."""

    def __post_init__(self) -> None:
        check_store("tracking.uri", self.uri)
        check_name("tracking.experiment", self.experiment)
        check_name("tracking.register", self.register)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One training, whole: everything needed to repeat it."""

    name: str = "default"
    """What the run is called."""
    seed: int = 1
    """Seed of every random draw: initial weights, dropout, window lengths, samples."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check_name("name", self.name)
        require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 4294967295")
        if self.corpus.streaming and self.trainer.max_steps is None and self.trainer.max_minutes is None:
            raise ConfigError(
                "corpus.streaming needs trainer.max_steps or trainer.max_minutes: "
                "a stream's length is not known, and the learning rate follows the share of the training done."
            )
        if self.model.softmax == "adaptive" and self.corpus.level != "word":
            raise ConfigError(
                f"model.softmax adaptive contradicts corpus.level {self.corpus.level}, "
                "whose tokens are few or not numbered by frequency: choose exact, or corpus.level word."
            )
        if self.data.reset_at_documents and self.model.head == "last_step":
            raise ConfigError(
                "data.reset_at_documents contradicts model.head last_step, which carries no state: "
                "leave one at its default."
            )


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How a continuation is chosen from the model's probabilities."""

    length: int = 400
    """Tokens to generate."""
    temperature: float = 0.8
    """Divisor of the logits before sampling; 0 takes the likeliest token every time (greedy)."""
    top_k: int | None = None
    """Sample among the k likeliest tokens; null among all."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together hold this probability (nucleus); null among all."""
    min_p: float | None = None
    """Drop tokens less likely than this share of the likeliest one's probability; null drops none."""
    repetition_penalty: float = 1.0
    """Divisor of the positive (factor of the negative) logits of tokens already seen; 1 leaves them."""
    beams: int = 1
    """Beam search that keeps so many hypotheses and samples nothing; 1 samples."""
    samples: int = 1
    """Continuations to generate."""
    stop: str | None = None
    """End a continuation before this text; null ends at length."""
    seed: int = 1
    """Seed of the draws."""

    def __post_init__(self) -> None:
        for name, most in (("length", 10**7), ("beams", 1000), ("samples", 10_000)):
            _count(f"--{name}", getattr(self, name), most)
        require(self.samples * self.length <= 10**8, "--samples", self.samples,
                f"at most {10**8 // self.length} with --length {self.length}")
        _not_negative("--temperature", self.temperature)
        require(self.top_k is None or self.top_k >= 1, "--top_k", self.top_k, "at least 1")
        require(self.top_p is None or 0 < self.top_p <= 1, "--top_p", self.top_p, "above 0 and at most 1")
        require(self.min_p is None or 0 <= self.min_p <= 1, "--min_p", self.min_p, "from 0 to 1")
        _positive("--repetition_penalty", self.repetition_penalty)
        require(self.stop != "", "--stop", self.stop, "some text")
        require(0 <= self.seed < 2**32, "--seed", self.seed, "from 0 to 4294967295")
        if self.beams > 1:
            require(self.samples <= self.beams, "--samples", self.samples, f"at most --beams ({self.beams})")
