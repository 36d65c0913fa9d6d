"""Does a run overfit, and what helps? The four textbook remedies, tried from its own settings and seed.

A run overfits where the model does markedly better on the text it was trained on than on
text it was not. Fewer hidden units, weight decay, dropout and more data are then tried one
at a time, for as many steps as the run had, and what each bought is read off the validation
split: the test split is left alone, for a choice is being made.

Source: Goodfellow, Bengio & Courville (2016), Deep Learning, chapter 7.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elman.analysis.verdict import block_bits, token_losses
from elman.config.schema import ExperimentConfig
from elman.config.tree import flatten, override
from elman.errors import ConfigError, DivergenceError, ElmanError, ModelError
from elman.tasks.hardware import resolve_device, resolve_precision, set_threads
from elman.text.prepare import prepare
from elman.text.prepared import PreparedCorpus, PreparedSplit
from elman.tracking.plots import Curve, curves_with_bands
from elman.tracking.store import RunStore
from elman.training.experiment import run_experiment, run_lengths
from elman.training.loading import LoadedModel, load_model
from elman.training.progress import Reporter, Silence

MARKED = 0.03
"""Share of the validation figure that a gap must exceed to count as overfitting."""

WORTH_BITS = 0.002
"""Bits per byte below which a remedy bought nothing worth having."""

FRACTIONS = (0.25, 0.5)
"""Of the training text, for the learning curve; the whole of it is the run itself."""

REMEDIES = ("fewer hidden units", "weight decay", "dropout", "more data")


@dataclass(frozen=True)
class Gap:
    """How much better a model does on its training text.

    Attributes:
        train: Bits per byte on training text, without dropout.
        validation: Bits per byte on the validation split.
        error: Standard error of their difference.
        risen: Bits per byte that validation rose by between its best and the end of the training.
    """

    train: float
    validation: float
    error: float
    risen: float

    @property
    def size(self) -> float:
        """Bits per byte."""
        return self.validation - self.train

    @property
    def overfits(self) -> bool:
        """Whether the gap is beyond chance and marked, or validation turned round."""
        sure = self.size > 2 * self.error and self.size > MARKED * self.validation
        return sure or self.risen > MARKED * self.validation

    def __str__(self) -> str:
        verdict = "it overfits" if self.overfits else "it does not overfit"
        turned = f", and validation rose by {self.risen:.3f} after its best" if self.risen > 0.001 else ""
        return (
            f"{verdict}: {self.train:.4f} bits per byte on training text, {self.validation:.4f} on validation, "
            f"a gap of {self.size:.4f} ± {2 * self.error:.4f} ({self.size / self.validation:.1%}){turned}"
        )


@dataclass
class Trial:
    """One remedy at one strength.

    Attributes:
        changes: The settings that it changes.
        bits: Validation bits per byte; None where it failed.
        gain: Bits per byte better than the run itself.
        minutes: Of training.
        reason: Why it failed.
    """

    remedy: str
    changes: dict[str, Any]
    bits: float | None = None
    gain: float | None = None
    minutes: float = 0.0
    parameters: int = 0
    run_id: str | None = None
    reason: str = ""


@dataclass
class RemedyResult:
    """What the remedies bought.

    Attributes:
        run_id: Of the run that holds the trials.
        subject: Of the run that was looked at.
        recommendation: One sentence.
        best: The recommended trial; None where nothing helped.
        next_doubling: Bits per byte that twice the text may buy, from the learning curve.
    """

    run_id: str
    subject: str
    gap: Gap
    baseline_bits: float
    baseline_minutes: float
    trials: list[Trial] = field(default_factory=list)
    recommendation: str = ""
    best: Trial | None = None
    next_doubling: float | None = None
    seconds: float = 0.0


def run_remedies(
    reference: str, store: RunStore, reporter: Reporter | None = None, *, force: bool = False
) -> RemedyResult:
    """Look whether a run overfits, and try each remedy.

    Args:
        reference: A run's id.
        store: Where it is, and where the trials go.
        reporter: Watches.
        force: Try the remedies even where it does not overfit.

    Raises:
        ElmanError: There is no such run, or it cannot be repeated; nothing has been trained.
    """
    reporter = reporter or Silence()
    begun = time.monotonic()
    subject = store.find_run(reference)
    if subject.tags.get("kind") in ("search", "tournament", "remedy"):
        raise ModelError(f"{reference} is a {subject.tags['kind']}, not a training: name one of its runs.")
    loaded = load_model(subject.id, store)
    corpus = prepare(loaded.config.corpus, progress=reporter.stage)
    if corpus.digest != loaded.corpus_digest:
        raise ConfigError(f"corpus.name {corpus.name} is another text now than when run {subject.id} was trained.")
    if not isinstance(corpus.splits["train"], PreparedSplit):
        raise ConfigError("corpus.streaming keeps no training text to look at: elman remedy needs it false.")
    curve = store.history(subject.id, "val/bits_per_byte")
    gap = measure_gap(loaded, corpus, curve)
    reporter.note(f"run {subject.id} ({subject.name}): {gap}")
    baseline, minutes = gap.validation, subject.metrics.get("training/seconds", 0.0) / 60
    base = _repeatable(loaded.config, corpus, [step for step, _ in store.history(subject.id, "train/loss")])
    params = {"subject": subject.id, **{key: json.dumps(value) for key, value in flatten(base).items()}}
    tags = {"kind": "remedy", "subject": subject.id, "corpus.digest": corpus.digest}
    with store.open_run(f"remedy {subject.name}", params, tags) as run:
        result = RemedyResult(run.id, subject.id, gap, baseline, minutes)
        curves: dict[str, list[Curve]] = {"as it was": [curve]}
        for trial in plan_trials(base, loaded) if gap.overfits or force else []:
            _try(trial, base, baseline, store, run.id, reporter)
            if trial.run_id is not None:
                label = f"{trial.remedy} {_shown(trial.changes)}"
                curves[label] = [store.history(trial.run_id, "val/bits_per_byte")]
            result.trials.append(trial)
        _judge(result)
        rows = [{**vars(trial)} for trial in result.trials]
        run.log_json("remedies.json", {"gap": vars(gap), "overfits": gap.overfits, "trials": rows,
                                       "recommendation": result.recommendation})  # fmt: skip
        if result.trials:
            run.log_figure("curves.png", curves_with_bands(curves))
        run.metrics.add({"gap": gap.size}, 0)
        run.metrics.add({f"gain/{t.remedy.replace(' ', '_')}": t.gain for t in best_of_each(result)
                         if t.gain is not None}, 0)  # fmt: skip
        run.describe(f"{gap}\n\n{result.recommendation}")
        result.seconds = time.monotonic() - begun
    return result


def measure_gap(loaded: LoadedModel, corpus: PreparedCorpus, curve: Curve) -> Gap:
    """Score the best checkpoint on the validation split, and on as much of the training text."""
    trainer = loaded.config.trainer
    set_threads(trainer.threads)
    device = resolve_device(trainer.device)
    precision = resolve_precision(trainer.precision, device)
    validation, train = corpus.splits["validation"], corpus.splits["train"]
    assert isinstance(validation, PreparedSplit)
    assert isinstance(train, PreparedSplit)
    part = train.part(min(train.tokens, validation.tokens))
    scores = [
        block_bits(token_losses(loaded.model, split, loaded.config.data, device, precision), split)
        for split in (part, validation)
    ]
    errors = [float(np.std(bits, ddof=1)) / len(bits) ** 0.5 if len(bits) > 1 else 0.0 for bits in scores]
    values = [value for _, value in curve]
    risen = max(0.0, values[-1] - min(values)) if values else 0.0
    hidden = validation.unknown_bits / validation.bytes  # what <unk> hides is charged, as everywhere
    return Gap(
        train=float(scores[0].mean()) + part.unknown_bits / part.bytes,
        validation=float(scores[1].mean()) + hidden,
        error=(errors[0] ** 2 + errors[1] ** 2) ** 0.5,
        risen=risen,
    )


def _repeatable(config: ExperimentConfig, corpus: PreparedCorpus, steps: list[int]) -> ExperimentConfig:
    """The run's settings, bounded by its steps: a remedy must not win by training longer."""
    length = run_lengths(config, corpus) or max(steps, default=0)
    if length < 1:
        raise ConfigError("The run logged no steps: train it anew before looking for remedies.")
    every = config.trainer.validate_every_steps
    if every is None:
        every = max(1, length // (config.trainer.max_epochs or 10))
    return override(config, {"trainer.max_steps": length, "trainer.max_epochs": None, "trainer.max_minutes": None,
                             "trainer.validate_every_steps": min(every, length), "trainer.sample_length": 0,
                             "tracking.register": None})  # fmt: skip


def plan_trials(base: ExperimentConfig, loaded: LoadedModel) -> list[Trial]:
    """Each remedy at two strengths, as far as the schema takes them."""
    size = int(loaded.model.architecture["config"]["hidden_size"])
    unit = 2 * base.model.num_heads if base.model.cell == "transformer" else 1
    smaller = sorted({max(unit, size * share // 4 // unit * unit) for share in (1, 2)} - {size}, reverse=True)
    trials = [Trial("fewer hidden units", {"model.hidden_size": s, "model.parameter_budget": None}) for s in smaller]
    decays = (0.01, 0.1) if base.optimizer.name == "adamw" else (1e-6, 1e-5)
    trials += [Trial("weight decay", {"optimizer.weight_decay": decay}) for decay in decays
               if decay > base.optimizer.weight_decay]  # fmt: skip
    trials += [Trial("dropout", {"model.dropout": p}) for p in (0.2, 0.4) if p > base.model.dropout]
    share = base.corpus.training_fraction
    trials += [Trial("more data", {"corpus.training_fraction": share * f}) for f in FRACTIONS]
    return trials


def _try(
    trial: Trial, base: ExperimentConfig, baseline: float, store: RunStore, parent: str, reporter: Reporter
) -> None:
    reporter.note(f"{trial.remedy}: {_shown(trial.changes)}")
    try:
        config = override(base, {**trial.changes, "name": "remedy"})
        result = run_experiment(config, store, reporter, parent=parent, tags={"remedy": trial.remedy})
    except (ElmanError, DivergenceError) as error:
        trial.reason = str(error)
        reporter.note(f"{trial.remedy}: {error}")
        return
    trial.bits, trial.run_id = result.metrics["val/bits_per_byte"], result.run_id
    trial.gain, trial.minutes = baseline - trial.bits, result.seconds / 60
    trial.parameters = result.parameters["total"]


def best_of_each(result: RemedyResult) -> list[Trial]:
    """The better strength of every remedy that was tried, more data apart: what it bought is the run itself."""
    found = []
    for remedy in REMEDIES[:3]:
        tried = [t for t in result.trials if t.remedy == remedy and t.gain is not None]
        if tried:
            found.append(max(tried, key=lambda t: t.gain or 0.0))
    return found


def _judge(result: RemedyResult) -> None:
    """Read the learning curve, and recommend one remedy."""
    curve = {t.changes["corpus.training_fraction"]: t.bits for t in result.trials
             if t.remedy == "more data" and t.bits is not None}  # fmt: skip
    if len(curve) == len(FRACTIONS):
        quarter, half = (curve[f] for f in sorted(curve))
        earlier, later = quarter - half, half - result.baseline_bits
        # Losses fall by a power of the text's length: each doubling buys a constant share of the one before.
        if earlier > 0 and later > 0:
            result.next_doubling = later * min(1.0, later / earlier)
    if not result.trials:
        result.recommendation = "Nothing to mend: train longer, or make the model larger."
        return
    candidates = best_of_each(result)
    result.best = max(candidates, key=lambda t: t.gain or 0.0, default=None)
    data = result.next_doubling or 0.0
    gain = (result.best.gain or 0.0) if result.best is not None else 0.0
    if gain < WORTH_BITS and data < WORTH_BITS:
        result.best = None
        result.recommendation = "None of the remedies bought anything: leave the settings as they are."
    elif data > gain:
        result.recommendation = (
            f"Get more text: twice as much may buy about {data:.3f} bits per byte, more than any setting did"
            + (f" ({result.best.remedy}: {gain:.3f})." if result.best is not None and gain >= WORTH_BITS else ".")
        )
    else:
        assert result.best is not None
        flags = " ".join(f"--{k} {json.dumps(v)}" for k, v in result.best.changes.items())
        result.recommendation = (
            f"Use {result.best.remedy}: {gain:.3f} bits per byte better for {result.best.minutes:.1f} minutes of "
            f"training, instead of {result.baseline_minutes:.1f} ({flags})."
        )


def _shown(changes: dict[str, Any]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in changes.items() if value is not None)
