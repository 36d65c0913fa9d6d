"""One experiment from its configuration to its record: the only place that puts the parts together."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import torch

from elman.config.schema import ExperimentConfig, GenerationConfig, TrackingConfig
from elman.config.tree import flatten
from elman.data.datamodule import CorpusData, check_lengths
from elman.errors import ConfigError, without_password
from elman.models.count import count_parameters
from elman.models.language_model import LanguageModel, build_model
from elman.models.memory import keep_freed_memory
from elman.tasks.generation import TextGenerator
from elman.tasks.hardware import Precision, resolve_device, resolve_precision, set_threads
from elman.tasks.language_modeling import LanguageModeling
from elman.text.prepare import prepare
from elman.text.prepared import PreparedCorpus, PreparedSplit
from elman.text.tokenizer import Tokenizer
from elman.tracking.environment import SystemMetrics, code_state, environment
from elman.tracking.logger import RunLogger
from elman.tracking.plots import loss_curves
from elman.tracking.run import Run
from elman.tracking.store import RunStore, StoppedError, refuse_unmade
from elman.training.callbacks import Checkpoints, Limits, Recorder, Samples, StopSignals
from elman.training.checkpoint import BEST, LAST, STATE, States, link
from elman.training.evaluation import score_test
from elman.training.export import log_model
from elman.training.keeper import Keeper
from elman.training.loading import provenance
from elman.training.lock import FolderLock
from elman.training.lock import checkpoint_folder as checkpoint_folder
from elman.training.progress import Reporter, Silence
from elman.training.resume import SHAPELESS, Resumption, find_unfinished, resumed
from elman.training.trainer import build_trainer, seed_everything

SAMPLE_CHARACTERS = 400
"""Length of the text that a training ends with."""


@dataclass(frozen=True)
class RunResult:
    """What a training came to.

    Attributes:
        metrics: The best checkpoint's, by their names in MLflow.
        tokens_per_second: Over the training alone, validation not counted.
        seconds: Wall time of the whole training, with validation.
        sample: Text that the best model wrote.
        model_uri: None where the store has not taken the model yet, and so with ``registered``.
    """

    run_id: str
    name: str
    metrics: dict[str, float]
    parameters: dict[str, int]
    tokens_per_second: float
    seconds: float
    sample: str
    model_uri: str | None
    ended_by: str
    registered: str | None


@dataclass(frozen=True)
class Fit:
    """A training that came to its end.

    Attributes:
        model: With the best checkpoint's weights.
        best: The best checkpoint's validation figures, by their names in MLflow.
        checkpoint: The best checkpoint's file.
        step: Optimizer steps done.
        tokens_per_second: Over the training alone, validation not counted.
        seconds: Wall time of the whole training, with validation.
        ended_by: What ended it.
    """

    model: LanguageModel
    best: dict[str, float]
    checkpoint: Path
    step: int
    tokens_per_second: float
    seconds: float
    ended_by: str


def build_language_model(config: ExperimentConfig, tokenizer: Tokenizer) -> LanguageModel:
    """The network for a configuration and a vocabulary, its weights drawn from the configuration's seed."""
    seed_everything(config.seed)
    return build_model(
        config.model,
        vocabulary_size=tokenizer.vocabulary_size,
        num_inputs=tokenizer.num_inputs,
        start_id=tokenizer.start_id,
        context_length=config.data.sequence_length,
    )


def run_name(config: ExperimentConfig, model: LanguageModel) -> str:
    """A name that tells runs apart at a glance."""
    shape = model.architecture["config"]
    return f"{config.name}-{config.model.cell}-{shape['num_layers']}x{shape['hidden_size']}-{config.corpus.level}"


def write_sample(generator: TextGenerator, prompt: str, characters: int, seed: int) -> str:
    """Text of about so many characters, the prompt included."""
    text = prompt
    settings = GenerationConfig(length=characters, seed=seed)
    for [piece] in generator.stream(prompt, settings, "skip"):
        text += piece
        if len(text) >= characters:
            break
    return text[:characters]


def run_experiment(
    config: ExperimentConfig,
    store: RunStore | None = None,
    reporter: Reporter | None = None,
    *,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
    resume: Resumption | None = None,
    go_on: bool = False,
) -> RunResult:
    """Train, test and record one configuration.

    Args:
        config: All of it.
        store: Where to record; None opens the one that the configuration names.
        reporter: Watches.
        parent: Id of the run that this one belongs to.
        tags: Recorded with it.
        resume: A run to go on with, instead of starting one.
        go_on: Whether to go on with the newest run of this configuration where it was stopped or killed.

    Raises:
        ElmanError: The configuration or the corpus cannot be used; nothing has been recorded.
        DivergenceError: The loss became NaN or infinite; the run is FAILED, its checkpoints kept.
        StoppedError: The user stopped it; the run is KILLED, its newest state kept.
    """
    reporter = reporter or Silence()
    set_threads(config.trainer.threads)
    device = resolve_device(config.trainer.device)
    precision = resolve_precision(config.trainer.precision, device)
    corpus = prepare(config.corpus, progress=reporter.stage, check=lambda made: check_lengths(made, config.data))
    model = build_language_model(config, corpus.tokenizer)
    unknown = corpus.tokenizer.unknown_symbols(config.trainer.sample_prompt)
    if unknown:
        raise ConfigError(
            f"trainer.sample_prompt has {unknown[0]!r}, which the training split lacks: leave it out of the prompt."
        )
    if resume is not None:
        resume.check(corpus, model)
    store = store or RunStore(config.tracking, may_be_away=True)
    if go_on and (unfinished := find_unfinished(config, corpus.digest, store)) is not None:
        reporter.note(
            f"run {unfinished.id} has these settings and did not finish: it is gone on with (--resume none begins a "
            "new one)"
        )
        flat = flatten(config)
        return resume_experiment(unfinished.id, {name: flat[name] for name in SHAPELESS}, store, reporter)[0]
    _announce(reporter, config, corpus, model, device, precision)
    with StopSignals() as signals, ExitStack() as held:
        described = {**run_tags(corpus, precision), **(tags or {})}
        if resume is None:
            opened = store.start_run(config, run_name(config, model), described, parent)
        else:
            opened = store.open_run(resume.run.name, {}, {}, resume=resume.run)
        with opened as run:
            reporter.note(f"run {run.id} ({run.name})")
            if store.away is not None:
                reporter.note(
                    f"warning: the tracking store {without_password(store.uri)} does not answer ({store.away}): the "
                    f"training begins, and what it logs waits in {run.metrics.folder}."
                )
            states, start = States(checkpoint_folder(run.id)), None
            if resume is not None:
                states, start = resume.states, _go_on(run, resume, corpus, reporter)
            else:  # whoever resumes holds the folder before the run is touched
                held.enter_context(FolderLock(states.folder))
            first = 1 + max((at for at, _ in run.history("system/cpu_utilization_percentage")), default=-1)
            record = SystemMetrics(run.metrics, start=first) if config.tracking.system_metrics else nullcontext()
            with record, _kept_checkpoints(run, states, signals, held):
                if start is None:
                    _record_inputs(run, corpus)
                try:
                    logger = RunLogger(run.metrics, run.name, run.id)
                    samples = _samples(config, model, corpus, run)
                    done = fit(
                        config, corpus, model, logger=logger, folder=states.folder, signals=signals, reporter=reporter,
                        watchers=samples, device=device, precision=precision, states=states, start=start,
                    )  # fmt: skip
                    result = _conclude(config, run, corpus, done, reporter, device, precision)
                finally:
                    reporter.close()
        return _as_delivered(result, run, config.tracking.register)


def resume_experiment(
    reference: str,
    changes: Mapping[str, object] | None = None,
    store: RunStore | None = None,
    reporter: Reporter | None = None,
    *,
    file: str | Path | None = None,
) -> tuple[RunResult, ExperimentConfig]:
    """Go on with a run that was stopped, killed or finished.

    Args:
        reference: The run's id, the beginning of it, or its name.
        changes: Dotted settings that shall differ from then on: limits, intervals.
        store: Where the run is; None opens the one that the changes or the environment name.
        reporter: Watches.
        file: YAML file of settings; it must not contradict the run.

    Returns:
        What came of it, and the settings it was trained with.

    Raises:
        ElmanError: It cannot go on, or not with these settings; the run is as it was.
        UnusableCheckpointsError: All its states are damaged.
        DivergenceError: As run_experiment.
        StoppedError: As run_experiment.
    """
    changes = dict(changes or {})
    uri = changes.get("tracking.uri")
    if store is None:
        where = TrackingConfig(uri=None if uri is None else str(uri))
        refuse_unmade(where)
        store = RunStore(where, may_be_away=True)
    with resumed(reference, changes, store, file) as resume:
        place = replace(resume.config.tracking, uri=store.config.uri)
        there = RunStore(place, may_be_away=True, away=store.away)
        return run_experiment(resume.config, there, reporter, resume=resume), resume.config


def _go_on(run: Run, resume: Resumption, corpus: PreparedCorpus, reporter: Reporter) -> Path | None:
    """Tell the run, and take over what the process before left undone; returns the state to go on from."""
    for note in resume.notes:
        reporter.note(note)
    resume.begun = True
    resume.adopt(corpus)
    run.set_tags(resume.tags())
    if resume.path is not None:
        reporter.note(f"going on from step {resume.step:,}")
    return resume.path


def run_lengths(config: ExperimentConfig, corpus: PreparedCorpus) -> int | None:
    """Optimizer steps of a whole training; None where only its minutes bound it, or the corpus is a stream."""
    c = config.trainer
    windows = CorpusData(corpus, config.data, config.seed).windows_per_epoch()
    bounds = [] if c.max_steps is None else [c.max_steps]
    if c.max_epochs is not None and windows is not None:
        bounds.append(c.max_epochs * -(-windows // c.accumulate_windows))
    return min(bounds) if bounds and c.max_minutes is None else None


def fit(
    config: ExperimentConfig,
    corpus: PreparedCorpus,
    model: LanguageModel,
    *,
    logger: RunLogger,
    folder: Path,
    signals: StopSignals,
    reporter: Reporter,
    watchers: Sequence[L.Callback] = (),
    device: torch.device,
    precision: Precision,
    states: States | None = None,
    start: Path | None = None,
) -> Fit:
    """Train a model; the best checkpoint is in ``folder`` afterwards.

    Args:
        config: All of it but where it is tracked.
        corpus: Prepared.
        model: With fresh weights; it ends with the best checkpoint's.
        logger: Takes the metrics.
        folder: For best.ckpt.
        signals: The user's wish to stop.
        reporter: Watches.
        watchers: Callbacks that act after all others.
        device: Where to train.
        precision: Arithmetic.
        states: Where to write states to resume from; None writes none.
        start: A state to go on from.

    Raises:
        DivergenceError: The loss became NaN or infinite.
        StoppedError: The user stopped it.
    """
    validation, train = corpus.splits["validation"], corpus.splits["train"]
    assert isinstance(validation, PreparedSplit)
    data = CorpusData(corpus, config.data, config.seed)
    keep_freed_memory()
    task = LanguageModeling(
        model,
        config.optimizer,
        bits=validation,
        sequence_length=config.data.sequence_length,
        scale_lr=config.data.variable_length,
    )
    limits = Limits(config.trainer, signals)
    recorder = Recorder(config.trainer, limits, reporter, train if isinstance(train, PreparedSplit) else None)
    checkpoints = Checkpoints(
        folder,
        {
            "architecture": model.architecture,
            "tokenizer": corpus.tokenizer.to_json(),
            "provenance": provenance(config, corpus),
        },
        warn=lambda text: keeper.warn(text),
    )
    keeper = Keeper(config.trainer, signals, recorder, checkpoints, states, reporter)
    if start is not None:
        keeper.adopt(start)
    trainer = build_trainer(
        config.trainer,
        device=device,
        precision=precision,
        logger=logger,
        callbacks=[limits, recorder, checkpoints, *watchers, keeper],
    )
    trainer.fit(task, datamodule=data, ckpt_path=None if start is None else str(start / STATE), weights_only=True)
    signals.at_once = True
    if signals.received is not None:
        raise StoppedError(signals.received)
    model.load_state_dict(checkpoints.weights(trainer))
    return Fit(
        model=model,
        best=recorder.best,
        checkpoint=checkpoints.best,
        step=trainer.global_step,
        tokens_per_second=recorder.tokens / max(recorder.seconds, 1e-9),
        seconds=limits.seconds,
        ended_by=limits.reason,
    )


def _samples(
    config: ExperimentConfig, model: LanguageModel, corpus: PreparedCorpus, run: Run
) -> Sequence[L.Callback]:
    if not config.trainer.sample_length:
        return ()
    generator = TextGenerator(model, corpus.tokenizer)

    def write() -> str:
        return write_sample(generator, config.trainer.sample_prompt, config.trainer.sample_length, config.seed)

    return (Samples(write, lambda text: run.log_text("samples.txt", text)),)


def _conclude(
    config: ExperimentConfig,
    run: Run,
    corpus: PreparedCorpus,
    done: Fit,
    reporter: Reporter,
    device: torch.device,
    precision: Precision,
) -> RunResult:
    """Test the best checkpoint, and record what came of the training."""
    model = done.model
    reporter.stage("testing the best checkpoint")
    test = score_test(model, corpus, config.data, device, precision)
    run.metrics.add(test, done.step)
    metrics = done.best | test
    model.cpu()
    sample = write_sample(
        TextGenerator(model, corpus.tokenizer), config.trainer.sample_prompt, SAMPLE_CHARACTERS, config.seed
    )
    parameters = count_parameters(model)
    run.metrics.add(final_figures(done, parameters["total"]), done.step)
    reporter.stage("recording the model")
    run.log_figure("loss_curves.png", _figure(run))
    log_model(run, model, corpus.tokenizer, provenance(config, corpus), example=sample[:20])
    if config.tracking.register is not None:
        bits = metrics.get("test/bits_per_byte", metrics["val/bits_per_byte"])
        run.register(config.tracking.register, bits_per_byte=bits, digest=corpus.digest)
    run.set_tags({"ended_by": done.ended_by})
    run.describe(_summary(metrics, sample))
    return RunResult(
        run_id=run.id,
        name=run.name,
        metrics=metrics,
        parameters=parameters,
        tokens_per_second=done.tokens_per_second,
        seconds=done.seconds,
        sample=sample,
        model_uri=None,
        ended_by=done.ended_by,
        registered=None,
    )


def _as_delivered(result: RunResult, run: Run, name: str | None) -> RunResult:
    """Add what the store answered; what it has not taken yet is not known."""
    answered = run.answers
    version = answered.get("register")
    registered = None
    if version is not None:
        registered = f"models:/{name}/{version[0]}" + (" (champion)" if version[1] else "")
    return replace(result, run_id=run.id, model_uri=answered.get("model"), registered=registered)


def final_figures(done: Fit, parameters: int) -> dict[str, float]:
    """What a training came to, by the names that runs are compared by."""
    return {"best/" + key.removeprefix("val/"): value for key, value in done.best.items()} | {
        "training/seconds": done.seconds,
        "training/tokens_per_second": done.tokens_per_second,
        "model/parameters": parameters,
    }


@contextmanager
def _kept_checkpoints(run: Run, states: States, signals: StopSignals, held: ExitStack) -> Iterator[None]:
    """Hand the best checkpoint and the newest state over to the run however the training ends.

    The folder goes when the run has them, and its status too, so that it is recognised
    until then. What is not handed over, for want of time or of anything to hand over, is
    resumed from the folder.
    """
    try:
        yield
    except BaseException as error:
        handed_over = not signals.hurried and _hand_over(run, states)
        if handed_over or not isinstance(error, StoppedError):
            held.callback(shutil.rmtree, states.folder, ignore_errors=True)
        raise
    if _hand_over(run, states):
        held.callback(shutil.rmtree, states.folder, ignore_errors=True)


def _hand_over(run: Run, states: States) -> bool:
    best, last = states.folder / BEST, states.folder / LAST
    if states.newest is not None:
        last.unlink(missing_ok=True)
        link(states.newest / STATE, last)
    kept = [run.log_file(path, "checkpoints") for path in (best, last) if path.exists()]
    return bool(kept) and all(kept)


def _figure(run: Run) -> object:
    curves = run.history("train/bits_per_byte"), run.history("val/bits_per_byte")
    return loss_curves({run.name: curves})


def run_tags(corpus: PreparedCorpus, precision: Precision) -> dict[str, str]:
    """What tells runs apart that no setting does: the text, the vocabulary, the arithmetic, the code."""
    commit, diff = code_state()
    fingerprint = corpus.tokenizer.fingerprint
    tags = {"corpus.digest": corpus.digest, "precision": precision, "tokenizer.fingerprint": fingerprint}
    if commit is not None:
        tags |= {"mlflow.source.git.commit": commit, "git.dirty": str(bool(diff)).lower()}
    return tags


def _record_inputs(run: Run, corpus: PreparedCorpus) -> None:
    run.log_text("tokenizer.json", corpus.tokenizer.to_json())
    run.log_json("environment.json", environment())
    _, diff = code_state()
    if diff:
        run.log_text("git.diff", diff)
    run.log_dataset(
        name=corpus.name, digest=corpus.digest, source=corpus.source,
        splits={name: _sizes(split) for name, split in corpus.splits.items()},
    )  # fmt: skip


def _summary(metrics: Mapping[str, float], sample: str) -> str:
    rows = [
        f"| {name} | {metrics[f'{prefix}/loss']:.4f} | {metrics[f'{prefix}/perplexity']:.2f} "
        f"| {metrics[f'{prefix}/bits_per_byte']:.4f} | {metrics[f'{prefix}/accuracy']:.1%} |"
        for prefix, name in (("val", "validation"), ("test", "test"))
        if f"{prefix}/loss" in metrics
    ]
    head = ["| | loss (nats) | perplexity | bits/byte | accuracy |", "| --- | --- | --- | --- | --- |"]
    quoted = [f"> {line}" for line in sample.split("\n")]
    return "\n".join([*head, *rows, "", *quoted])


def _sizes(split: object) -> Mapping[str, object]:
    if not isinstance(split, PreparedSplit):
        return {"streamed": True}
    return {"tokens": split.tokens, "characters": split.characters, "bytes": split.bytes,
            "unknown_tokens": split.unknown_tokens}  # fmt: skip


def _announce(
    reporter: Reporter,
    config: ExperimentConfig,
    corpus: PreparedCorpus,
    model: LanguageModel,
    device: torch.device,
    precision: Precision,
) -> None:
    train = corpus.splits["train"]
    size = f"{train.tokens:,} training tokens" if isinstance(train, PreparedSplit) else "streamed"
    reporter.note(f"corpus {corpus.name}: {size}, {corpus.tokenizer.vocabulary_size:,} {config.corpus.level} symbols")
    for warning in corpus.warnings:
        reporter.note(f"warning: {warning}")
    parameters = count_parameters(model)["total"]
    shape = model.architecture["config"]
    units = f"{shape['num_layers']} × {shape['hidden_size']} hidden units"
    reporter.note(f"model {config.model.cell}, {units}, {parameters:,} parameters")
    why = ""
    if config.trainer.precision == "auto":
        why = " (this hardware multiplies bfloat16)" if precision == "bf16" else " (it has no bfloat16 multiplier)"
    threads = torch.get_num_threads()
    plural = "thread" if threads == 1 else "threads"
    reporter.note(f"on {device.type} with {threads} {plural}, in {precision}{why}")
