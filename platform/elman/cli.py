"""The command line: ``elman COMMAND …``. The only module that prints.

Heavy libraries are imported inside the commands that use them, so that help and
mistakes in arguments answer at once.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elman import __version__
from elman.config.load import Flags, load_config
from elman.config.schema import CorpusConfig, ExperimentConfig, GenerationConfig, TrackingConfig
from elman.config.search import SearchConfig
from elman.config.tournament import TournamentSettings
from elman.errors import (
    ConfigError,
    DivergenceError,
    ElmanError,
    SearchFailedError,
    TrackingError,
    UnusableCheckpointsError,
    one_line,
)

if TYPE_CHECKING:
    from elman.analysis.finding import Finding
    from elman.config.plan import SearchPlan
    from elman.search.answer import SearchResult
    from elman.tracking.local import RunSummary
    from elman.tracking.store import RunStore
    from elman.training.experiment import RunResult

WHERE = ("uri", "experiment")
"""What a command that only reads runs needs to know of tracking."""

JSON_HELP = "Print exactly one JSON object on standard output."


def _flags(command: str) -> Flags:
    flags = Flags(command, _summary(command))
    flags.add_option("json", bool, JSON_HELP)
    return flags


def _print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False))


def table(rows: Sequence[Sequence[str]], *, header: bool = True) -> str:
    """Columns aligned with spaces: the first to the left, figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = [(cell, width) for cell, width in zip(row, widths, strict=True)]
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append("  ".join(cells).rstrip())
    if header:
        lines.insert(1, "  ".join("─" * w for w in widths))
    return "\n".join(lines)


def train(arguments: Sequence[str]) -> int:
    """Train, evaluate and record one experiment."""
    flags = _flags("train")
    flags.add_option("config", str, "YAML file of settings; flags override it, and it overrides the defaults.")
    flags.add_option(
        "resume", str,
        "Run to go on with; beside it, limits and intervals may be changed, nothing else. auto goes on with the newest "
        "run of the same settings and text where it was stopped or killed, and else starts one; none always does.",
    )  # fmt: skip
    flags.add_settings(ExperimentConfig)
    values, given = flags.parse(arguments)
    changes = {name: value for name, value in given.items() if name not in ("config", "json", "resume")}
    resume: str | None = None if values["resume"] == "none" else values["resume"]
    config = None if resume not in (None, "auto") else load_config(ExperimentConfig, values["config"], changes)

    from elman.training.progress import terminal_reporter

    reporter = terminal_reporter()
    reporter.stage("loading libraries")
    try:
        from elman.training.experiment import resume_experiment, run_experiment

        if config is not None:
            result = run_experiment(config, reporter=reporter, go_on=resume == "auto")
        else:
            assert resume is not None
            result, config = resume_experiment(resume, changes, reporter=reporter, file=values["config"])
    finally:
        reporter.close()
    if values["json"]:
        _print_json(
            {"run_id": result.run_id, "name": result.name, "metrics": result.metrics, "parameters": result.parameters,
             "tokens_per_second": result.tokens_per_second, "seconds": result.seconds, "sample": result.sample,
             "model_uri": result.model_uri, "ended_by": result.ended_by, "registered": result.registered}
        )  # fmt: skip
    else:
        print(_report(result, config))
    return 0


def _report(result: RunResult, config: ExperimentConfig) -> str:
    from elman.training.progress import duration

    rows = [["", "loss (nats)", "perplexity", "bits/byte", "accuracy"]]
    for prefix, name in (("val", "validation"), ("test", "test")):
        if f"{prefix}/loss" in result.metrics:
            m = {key: result.metrics[f"{prefix}/{key}"] for key in ("loss", "perplexity", "bits_per_byte", "accuracy")}
            rows.append([name, f"{m['loss']:.4f}", f"{m['perplexity']:,.2f}", f"{m['bits_per_byte']:.4f}",
                         f"{m['accuracy']:.1%}"])  # fmt: skip
    facts = (
        f"{result.parameters['total']:,} parameters · {result.tokens_per_second:,.0f} tokens/s · "
        f"{duration(result.seconds)} of training · {result.ended_by}"
    )
    prompt = "The " if config.corpus.name == "bible-asv" else ""
    more = [f'elman generate {result.run_id} --prompt "{prompt}"', "elman runs"]
    if Path("Makefile").is_file() and Path("pipelines").is_dir():
        more = [f'make generate MODEL={result.run_id} PROMPT="{prompt}"', "make runs", "make ui"]
        more.append("make search-NAME" if Path("pipelines/searches").is_dir() else 'make compare RUNS="RUN RUN"')
    else:
        more += ["elman ui", "elman compare RUN RUN"]
    if result.model_uri is None:
        more = ["elman sync   # once the tracking store is back", *more]
    registered = [f"registered as {result.registered}"] if result.registered else []
    return "\n".join(
        ["", table(rows), "", facts, *registered, "", f"─── {len(result.sample)} characters of its own ───",
         result.sample, "───", "", "next:", *(f"  {command}" for command in more)]
    )  # fmt: skip


def search(arguments: Sequence[str]) -> int:
    """Search settings: many trials, tracked, and an answer."""
    flags = _flags("search")
    flags.add_option("config", str, "Search file: base experiment, study, space.")
    flags.add_option("workers", int, "Short for --search.workers.")
    flags.add_option("storage", str, "Short for --search.storage.")
    flags.add_option("join", str, "Study to add this machine's workers to, instead of running one; needs --storage.")
    flags.add_settings(SearchConfig)
    flags.add_settings(ExperimentConfig)
    values, given = flags.parse(arguments)
    changes = {name: value for name, value in given.items() if name not in ("config", "json", "join")}
    for short in ("workers", "storage"):
        if short in changes:
            changes[f"search.{short}"] = changes.pop(short)

    from elman.config.plan import load_plan
    from elman.training.progress import terminal_reporter

    reporter = terminal_reporter()
    try:
        if values["join"] is not None:
            return _join(values["join"], changes, values["json"], reporter)
        if values["config"] is None:
            raise ConfigError("elman search needs --config FILE: pipelines/searches/ has some.")
        plan = load_plan(values["config"], changes)
        reporter.stage("loading libraries")
        from elman.search.study import run_search

        result = run_search(plan, reporter)
    finally:
        reporter.close()
    if values["json"]:
        _print_json(
            {"run_id": result.run_id, "name": result.name, "best": result.best, "point": result.point,
             "values": dict(zip(plan.config.study.metrics, result.values, strict=True)),
             "standard_error": result.standard_error, "front": result.front, "trials": result.trials,
             "fits": result.fits, "seconds": result.seconds,
             "retrained": [{"run_id": r.run_id, "metrics": r.metrics, "registered": r.registered}
                           for r in result.retrained]}
        )  # fmt: skip
    else:
        print(_search_report(result, plan))
    return 0


def _join(name: str, changes: Mapping[str, Any], as_json: bool, reporter: Any) -> int:
    from elman.config.tree import build
    from elman.config.tree import settings as settings_of

    own = {key: value for key, value in changes.items() if key in settings_of(SearchConfig)}
    if "search.storage" not in own:
        raise ConfigError("--join needs --storage URL: where the study is kept.")
    base = build(ExperimentConfig, {key: value for key, value in changes.items() if key not in own})
    reporter.stage("loading libraries")
    from elman.search.study import join_study

    done = join_study(name, build(SearchConfig, own), base, reporter)
    if as_json:
        _print_json({"study": name, "trials": done})
    else:
        print(f"The study {name} is finished; {done} of its trials were trained here.")
    return 0


def _search_report(result: SearchResult, plan: SearchPlan) -> str:
    from elman.search.answer import best_file
    from elman.training.progress import duration

    metrics = plan.config.study.metrics
    spread = "" if result.standard_error is None else f" ± {result.standard_error:.4f} (standard error)"
    figures = ", ".join(f"{m} {v:,.4f}{spread}" for m, v in zip(metrics, result.values, strict=True))
    counts = ", ".join(f"{n} {state}" for state, n in result.trials.items() if n)
    rule = "" if plan.config.study.choose == "best" else ", the smallest within one standard error of the best"
    lines = ["", f"trial {result.best}{rule}: {figures}", *(f"  {k}: {_shown(v)}" for k, v in result.point.items()), ""]
    if len(result.front) > 1:
        lines += [f"{len(result.front)} trials on the Pareto front: {', '.join(map(str, result.front))}", ""]
    if result.retrained:
        rows = [["trained again", "run", "validation bits/byte", "test bits/byte"]]
        for one in result.retrained:
            test = one.metrics.get("test/bits_per_byte")
            rows.append([one.name, one.run_id[:12], f"{one.metrics['val/bits_per_byte']:.4f}",
                         "–" if test is None else f"{test:.4f}"])  # fmt: skip
        lines += [table(rows), ""]
    lines += [
        f"{counts}; {result.fits} trainings in {duration(result.seconds)} · run {result.run_id}",
        "",
        "next:",
        f"  elman train --config {os.path.relpath(best_file(result.name))}",
        "  elman ui          # trials, plots, importances",
        "  elman dashboard   # the study in optuna-dashboard",
    ]
    if result.retrained:
        lines.insert(-2, f"  elman generate {result.retrained[0].run_id}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def sync(arguments: Sequence[str]) -> int:
    """Deliver what waits for a tracking store that was away."""
    flags = _flags("sync")
    flags.add_settings(TrackingConfig, prefix="tracking.", leaves=("uri",))
    values, given = flags.parse(arguments)
    config = flags.build(TrackingConfig, given, prefix="tracking.")

    from elman.tracking.sync import sync as deliver

    result = deliver(config)
    if values["json"]:
        _print_json(vars(result))
    else:
        for run, count in result.delivered.items():
            print(f"run {run}: {count:,} records delivered")
        for run, count in result.refused.items():
            print(f"run {run}: the store refuses {count:,} records")
        for mark in result.busy:
            print(f"mlruns/outbox/{mark}: left to the process that has it open")
        if not (result.delivered or result.waiting or result.busy):
            print("Nothing waits.")
    if result.waiting:
        count = sum(result.waiting.values())
        raise TrackingError(f"{count:,} records of {len(result.waiting)} runs wait still: {'; '.join(result.reasons)}")
    return 0


def dashboard(arguments: Sequence[str]) -> int:
    """Open optuna-dashboard on the studies."""
    flags = _flags("dashboard")
    flags.add_option("port", int, "Port on 127.0.0.1.", 8080)
    flags.add_option("storage", str, "Where the studies are; null takes sqlite under ./mlruns.")
    values, _ = flags.parse(arguments)

    from elman.search.dashboard import serve_dashboard

    return serve_dashboard(
        values["storage"], values["port"],
        ready=lambda address: print(f"optuna-dashboard: {address} (Ctrl-C ends it)", flush=True),
    )  # fmt: skip


def generate(arguments: Sequence[str]) -> int:
    """Continue a prompt with a trained model."""
    flags = _flags("generate")
    flags.add_positional("model", "A run id, models:/NAME@ALIAS, models:/NAME/VERSION, or a checkpoint's path.")
    flags.add_option("prompt", str, "Text to continue; empty starts from the beginning of a text.", "")
    flags.add_option("on-unknown", str, "What characters the model never saw do: refuse, or skip.", "refuse")
    flags.add_settings(GenerationConfig)
    flags.add_settings(TrackingConfig, prefix="tracking.", leaves=WHERE)
    values, given = flags.parse(arguments)
    if values["on-unknown"] not in ("refuse", "skip"):
        raise ConfigError(f"--on-unknown must be refuse or skip, got {values['on-unknown']!r}.")
    config = flags.build(GenerationConfig, given)
    prompt = values["prompt"]
    generator = _generator(values["model"], flags.build(TrackingConfig, given, prefix="tracking."))
    if values["json"]:
        scores = None
        if config.beams > 1:
            texts, scores = zip(*generator.beams(prompt, config, values["on-unknown"]), strict=True)
        else:
            texts = tuple(generator.complete(prompt, config, values["on-unknown"]))
        _print_json({"prompt": prompt, "samples": texts, "log_probabilities": scores})
    elif config.beams > 1:
        for text, score in generator.beams(prompt, config, values["on-unknown"]):
            print(f"── log-probability {score:.4f} nats ──\n{_harmless(prompt + text)}")
    elif config.samples > 1:
        for index, text in enumerate(generator.complete(prompt, config, values["on-unknown"]), 1):
            print(f"── sample {index} ──\n{_harmless(prompt + text)}")
    else:
        pieces = generator.stream(prompt, config, values["on-unknown"])
        first = next(pieces)  # a prompt that is refused leaves standard output empty
        print(_harmless(prompt + first[0]), end="", flush=True)
        for [piece] in pieces:
            print(_harmless(piece), end="", flush=True)
        print()
    return 0


def _generator(reference: str, tracking: TrackingConfig) -> Any:
    from elman.tasks.generation import TextGenerator
    from elman.tasks.hardware import set_threads
    from elman.tracking.store import open_to_read
    from elman.training.loading import load_model, needs_store

    set_threads(None)
    loaded = load_model(reference, open_to_read(tracking) if needs_store(reference) else None)
    return TextGenerator(loaded.model, loaded.tokenizer)


def evaluate(arguments: Sequence[str]) -> int:
    """Score a trained model on any text."""
    flags = _flags("evaluate")
    flags.add_positional("model", "A run id, models:/NAME@ALIAS, models:/NAME/VERSION, or a checkpoint's path.")
    flags.add_option("split", str, "Which split to score: train, validation or test.", "test")
    flags.add_settings(ExperimentConfig, only=("corpus", "data", "trainer", "tracking"))
    values, given = flags.parse(arguments)

    from elman.config.tree import override
    from elman.tracking.store import open_to_read
    from elman.training.evaluation import evaluate_model
    from elman.training.loading import load_model, needs_store
    from elman.training.progress import terminal_reporter

    if values["split"] not in ("train", "validation", "test"):
        raise ConfigError(f"--split must be train, validation or test, got {values['split']!r}.")
    changes = {key: value for key, value in given.items() if "." in key}
    tracking = flags.build(TrackingConfig, given, prefix="tracking.")
    loaded = load_model(values["model"], open_to_read(tracking) if needs_store(values["model"]) else None)
    reporter = terminal_reporter()
    try:
        metrics, tokens = evaluate_model(loaded, override(loaded.config, changes), values["split"], reporter)
    finally:
        reporter.close()
    if values["json"]:
        _print_json({"model": values["model"], "split": values["split"], "tokens": tokens, "metrics": metrics})
    else:
        rows = [["loss (nats)", "perplexity", "bits/byte", "bits/character", "accuracy", "tokens"]]
        rows.append([f"{metrics['loss']:.4f}", f"{metrics['perplexity']:,.2f}", f"{metrics['bits_per_byte']:.4f}",
                     f"{metrics['bits_per_character']:.4f}", f"{metrics['accuracy']:.1%}", f"{tokens:,}"])  # fmt: skip
        print(table(rows))
    return 0


def _store(flags: Flags, given: Mapping[str, Any], *, make: bool = False) -> RunStore:
    """The store that the flags name; a local one that does not exist is refused, or made."""
    from elman.tracking.store import RunStore, open_to_read

    config = flags.build(TrackingConfig, given, prefix="tracking.")
    return RunStore(config) if make else open_to_read(config)


def runs(arguments: Sequence[str]) -> int:
    """List the recorded runs."""
    flags = _flags("runs")
    example = "metrics.`test/bits_per_byte` < 2 and params.`model.cell` = 'gru'"
    flags.add_option("filter", str, f"MLflow filter, such as: {example}", "")
    flags.add_option("sort", str, "Metric to sort by, the lowest first; null sorts by time, the newest first.", None)
    flags.add_option("limit", int, "Most runs to list.", 20)
    flags.add_option("all", bool, "List the trials of searches, and the runs of other runs, too.")
    flags.add_settings(TrackingConfig, prefix="tracking.", leaves=WHERE)
    values, given = flags.parse(arguments)
    if not 1 <= values["limit"] <= 50_000:
        raise ConfigError(f"--limit must be from 1 to 50,000, got {values['limit']}.")
    order = [f"metrics.`{values['sort']}` ASC"] if values["sort"] else []
    store = _store(flags, given, make=True)
    wanted = values["filter"] if values["all"] else _without_children(values["filter"])
    found = store.runs(filter_string=wanted, order_by=order, limit=values["limit"])
    measured = {metric for run in found for metric in run.metrics}
    if values["sort"] and measured and values["sort"] not in measured:
        from elman.config.tree import nearest

        hint = nearest(values["sort"], measured)
        raise ConfigError(f"--sort {values['sort']} is a metric of none of these runs.{hint}")
    if values["json"]:
        _print_json({"runs": [_run_json(run) for run in found]})
    elif not found:
        print(f"No runs in experiment {store.config.experiment} yet: `elman train` makes the first one.")
    else:
        rows = [["run", "name", "status", "started", "val bits/byte", "test bits/byte", "parameters"]]
        rows.extend(
            [run.id[:12], run.name, _status(run), _when(run.started), _figure(run, "best/bits_per_byte"),
             _figure(run, "test/bits_per_byte"), _figure(run, "model/parameters", ",.0f")]
            for run in found
        )  # fmt: skip
        print(table(rows))
        interrupted = [run for run in found if _status(run) == "interrupted"]
        if interrupted:
            print("\ninterrupted, and to be gone on with:")
        for run in interrupted:
            print(f"  elman train --resume {run.id}")
    if not values["json"]:
        from elman.tracking.sync import stranded

        count = stranded()
        if count:
            runs_have = "1 run has" if count == 1 else f"{count} runs have"
            print(f"\n{runs_have} records that wait for their store: `elman sync` delivers them.")
    return 0


def _status(run: RunSummary) -> str:
    """MLflow's word, but for a run that nobody trains any more."""
    if run.status == "RUNNING":
        from elman.training.lock import is_interrupted

        if is_interrupted(run):
            return "interrupted"
    return run.status


def _without_children(given: str) -> str:
    """The filter, and that a run belongs to no other; one that asks for children itself is left alone."""
    if "mlflow.parentRunId" in given:
        return given
    alone = "tags.`mlflow.parentRunId` IS NULL"
    return f"{given} and {alone}" if given.strip() else alone


def _run_json(run: RunSummary) -> dict[str, Any]:
    return {"id": run.id, "name": run.name, "experiment": run.experiment, "status": run.status,
            "interrupted": _status(run) == "interrupted", "started": run.started, "ended": run.ended,
            "params": run.params, "metrics": run.metrics,
            "tags": {k: v for k, v in run.tags.items() if not k.startswith("mlflow.")}}  # fmt: skip


def _when(milliseconds: int) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d %H:%M")


def _figure(run: RunSummary, metric: str, form: str = ".4f") -> str:
    value = run.metrics.get(metric)
    return "–" if value is None else format(value, form)


def compare(arguments: Sequence[str]) -> int:
    """Put runs side by side: settings that differ, figures, and overlaid loss curves."""
    flags = _flags("compare")
    flags.add_positional("runs", "Two or more run ids.", nargs="*")
    flags.add_option("output", str, "PNG for the overlaid curves; null puts it under mlruns/comparisons.", None)
    flags.add_option("tournament", str, "Tournament file: train its contestants at an equal budget, and judge them.")
    flags.add_option("workers", int, "Processes of each contestant's search.", 1)
    flags.add_settings(TournamentSettings)
    flags.add_settings(ExperimentConfig)
    values, given = flags.parse(arguments)
    if values["tournament"] is not None:
        own = ("tournament", "workers", "output", "json", "runs")
        changes = {name: value for name, value in given.items() if name not in own}
        return _tournament(values, changes)
    allowed = ("output", "json", *(f"tracking.{leaf}" for leaf in WHERE))
    stray = next((name for name in given if name not in allowed), None)
    if stray is not None:
        raise ConfigError(f"--{stray} belongs to --tournament FILE; runs are compared as they are.")
    if len(values["runs"]) < 2:
        raise ConfigError("elman compare needs two or more runs: `elman runs` lists them.")
    _check_picture(values["output"])
    store = _store(flags, given)

    from elman.tracking.compare import compare_runs, write_curves
    from elman.tracking.local import local_root

    comparison = compare_runs([store.find_run(run) for run in values["runs"]])
    default = local_root() / "comparisons" / ("-".join(run.id[:8] for run in comparison.runs) + ".png")
    path = Path(values["output"] or default)
    try:
        write_curves(store, comparison.runs, path)
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise ConfigError(f"--output {path} cannot be written ({why}): name a PNG where you may write.") from None
    if values["json"]:
        _print_json({"runs": [run.id for run in comparison.runs], "settings": comparison.settings,
                     "metrics": comparison.metrics, "notes": comparison.notes, "curves": str(path)})  # fmt: skip
        return 0
    rows = [["", *(f"{run.name} {run.id[:6]}" for run in comparison.runs)]]
    for name, settings in comparison.settings.items():
        rows.append([name, *("–" if value is None else value for value in settings)])
    rows.append(["", *("" for _ in comparison.runs)])
    for name, metrics in comparison.metrics.items():
        form = ",.0f" if name in ("model/parameters", "training/tokens_per_second", "training/seconds") else ".4f"
        rows.append([name, *("–" if value is None else format(value, form) for value in metrics)])
    print(table(rows))
    for note in comparison.notes:
        print(f"note: {note}")
    print(f"\ncurves: {path}")
    return 0


def _check_picture(output: str | None) -> None:
    """Refuse a picture that cannot be written, before what it shows is worked out."""
    if output is None:
        return
    path = Path(output).absolute()
    above = next(folder for folder in path.parents if os.path.exists(folder))  # noqa: PTH110 - long paths make it raise
    may = path.suffix.lower() in (".png", ".pdf", ".svg") and len(path.name) < 250 and os.access(above, os.W_OK)
    if not may or path.is_dir():
        raise ConfigError(f"--output must be a .png, .pdf or .svg where you may write, got {output!r}.")


def _tournament(values: Mapping[str, Any], changes: Mapping[str, Any]) -> int:
    from elman.config.tournament import load_tournament
    from elman.training.progress import duration, terminal_reporter

    if values["runs"]:
        raise ConfigError(f"elman compare takes runs or --tournament FILE, not both; got {values['runs'][0]!r}.")
    if not 1 <= values["workers"] <= 1024:
        raise ConfigError(f"--workers must be from 1 to 1024, got {values['workers']}.")
    _check_picture(values["output"])
    plan = load_tournament(values["tournament"], changes)
    reporter = terminal_reporter()
    reporter.stage("loading libraries")
    try:
        from elman.analysis.tournament import run_tournament, save_curves, standings

        result = run_tournament(plan, values["workers"], reporter)
    finally:
        reporter.close()
    if values["output"]:
        save_curves(result, Path(values["output"]))
    rows = standings(result.contestants)
    if values["json"]:
        said = [{"better": v.better, "worse": v.worse, "difference": v.difference, "margin": v.margin,
                 "is_sure": v.is_sure, "verdict": str(v)} for v in result.verdicts]  # fmt: skip
        _print_json({"run_id": result.run_id, "standings": rows, "verdicts": said, "seconds": result.seconds})
        return 0
    shown = [["", "test bits/byte", "± seeds", "validation", "parameters", "tokens/s", "training"]]
    for row in rows:
        spread = "–" if row["test_spread"] is None else f"{row['test_spread']:.4f}"
        bits = [f"{row[f'{split}_bits_per_byte']:.4f}" for split in ("test", "validation")]
        shown.append([row["contestant"], bits[0], spread, bits[1], f"{row['parameters']:,}",
                      f"{row['tokens_per_second']:,.0f}", duration(row["seconds"])])  # fmt: skip
    print(f"\n{table(shown)}\n")
    for row in rows:
        if row["settings"]:
            print(f"{row['contestant']}: " + ", ".join(f"{k} {_shown(v)}" for k, v in row["settings"].items()))
    print("\n" + "\n".join(str(verdict) for verdict in result.verdicts))
    print("(± is a 95 % interval over text and seeds)" if plan.config.seeds > 1 else
          "(± is a 95 % interval over text alone: with one seed, luck of the seed is not in it)")  # fmt: skip
    curves = f", curves: {values['output']}" if values["output"] else ""
    print(f"\nrun {result.run_id}, {duration(result.seconds)} in all{curves}")
    return 0


def remedy(arguments: Sequence[str]) -> int:
    """Say whether a run overfits, try the textbook's remedies, and recommend one."""
    flags = _flags("remedy")
    flags.add_positional("run", "A run's id.")
    flags.add_option("force", bool, "Try the remedies even where the run does not overfit.")
    flags.add_settings(TrackingConfig, prefix="tracking.", leaves=WHERE)
    values, given = flags.parse(arguments)

    from elman.training.progress import duration, terminal_reporter

    reporter = terminal_reporter()
    reporter.stage("loading libraries")
    try:
        from elman.analysis.remedy import run_remedies

        result = run_remedies(values["run"], _store(flags, given), reporter, force=values["force"])
    finally:
        reporter.close()
    if values["json"]:
        _print_json(
            {"run_id": result.run_id, "subject": result.subject, "overfits": result.gap.overfits,
             "gap": vars(result.gap) | {"size": result.gap.size}, "recommendation": result.recommendation,
             "next_doubling": result.next_doubling, "trials": [vars(trial) for trial in result.trials]}
        )  # fmt: skip
        return 0
    print(f"\n{result.gap}\n")
    if result.trials:
        rows = [["", "strength", "validation bits/byte", "bought", "minutes", "parameters"]]
        rows.append(["as it was", "", f"{result.baseline_bits:.4f}", "", f"{result.baseline_minutes:.1f}", ""])
        for one in result.trials:
            strength = ", ".join(f"{k.rpartition('.')[2]} {_shown(v)}" for k, v in one.changes.items() if v is not None)
            bits = "failed" if one.bits is None else f"{one.bits:.4f}"
            gain = "" if one.gain is None else f"{one.gain:+.4f}"
            parameters = f"{one.parameters:,}" if one.parameters else ""
            rows.append([one.remedy, strength, bits, gain, f"{one.minutes:.1f}", parameters])
        print(table(rows))
        if result.next_doubling is not None:
            print(f"\ntwice as much text may buy about {result.next_doubling:.3f} bits per byte (the learning curve)")
    print(f"\n{result.recommendation}\n\nrun {result.run_id}, {duration(result.seconds)} in all")
    return 0


def corpus(arguments: Sequence[str]) -> int:
    """Show what a corpus holds."""
    flags = _flags("corpus")
    flags.add_positional("name", "A built-in or preset, a path, or hub:OWNER/NAME.", nargs="?")
    flags.add_settings(CorpusConfig, prefix="corpus.")
    values, given = flags.parse(arguments)
    changes = dict(given) | ({"corpus.name": values["name"]} if values["name"] is not None else {})
    config = flags.build(CorpusConfig, changes, prefix="corpus.")

    from elman.text.prepare import prepare
    from elman.text.prepared import describe
    from elman.training.progress import terminal_reporter

    reporter = terminal_reporter()
    try:
        prepared = prepare(config, progress=reporter.stage)
    finally:
        reporter.close()
    facts = describe(prepared)
    if values["json"]:
        _print_json(facts)
    else:
        print(_harmless(_describe(facts)))
    return 0


def _describe(facts: Mapping[str, Any]) -> str:
    rows = [["split", "bytes", "characters", "tokens", "documents", "unknown"]]
    for name, sizes in facts["splits"].items():
        columns = ("bytes", "characters", "tokens", "documents", "unknown_tokens")
        rows.append([name, *("streamed" if sizes[c] is None else f"{sizes[c]:,}" for c in columns)])
    coverage = facts["coverage"]
    frequent = "  ".join(f"{_visible(entry['token'])} {entry['count']:,}" for entry in facts["most_frequent"])
    lines = [
        f"{facts['name']}: {facts['source']}",
        *([facts["citation"]] if facts["citation"] not in ("", facts["source"]) else []),
        f"sha256 {facts['digest']}",
        "",
        table(rows),
        "",
        f"{facts['level']} level, {facts['vocabulary_size']:,} symbols; they cover {coverage['tokens']:.2%} of the "
        f"validation tokens and {coverage['types']:.2%} of its distinct ones",
        f"most frequent: {frequent}",
        *(f"warning: {warning}" for warning in facts["warnings"]),
        "",
        "─── sample ───",
        facts["sample"],
    ]
    return "\n".join(lines)


# C0 controls but for the two of plain text have pictures; C1 controls have none.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def _harmless(text: str) -> str:
    """A text as a terminal may have it: a model learns the control characters of its corpus, and one that moves the
    cursor or names the window is shown as a picture. Files and pipes get the text itself."""
    return text.translate(_PICTURES) if sys.stdout.isatty() else text


def _visible(token: str) -> str:
    """A token that can be told apart in a line: white space by its picture."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def doctor(arguments: Sequence[str]) -> int:
    """Check the installation, the machine and the store, and that a model computes what it should."""
    flags = _flags("doctor")
    flags.add_positional("MODEL", "A run id, models:/NAME@ALIAS, models:/NAME/VERSION, or a checkpoint.", nargs="?")
    flags.add_option("config", str, "YAML file of settings: a small model of its architecture is examined.")
    flags.add_settings(ExperimentConfig)
    values, given = flags.parse(arguments)
    changes = {name: value for name, value in given.items() if name not in ("config", "json", "MODEL")}
    if values["MODEL"] is not None:
        allowed = ("corpus.", "trainer.", "tracking.")
        stray = "config" if values["config"] else next((n for n in changes if not n.startswith(allowed)), None)
        if stray is not None:
            raise ConfigError(f"--{stray} does not go with MODEL, which is examined as it is: leave one out.")
    config = load_config(ExperimentConfig, values["config"], changes)

    from elman.training.progress import terminal_reporter

    reporter = terminal_reporter()
    reporter.stage("loading libraries")
    try:
        from elman.analysis.doctor import examine

        findings = []
        for finding in examine(config, values["MODEL"]):
            findings.append(finding)
            if not values["json"]:
                reporter.close()
                print(_finding_line(finding), flush=True)
    finally:
        reporter.close()
    failed = [finding.name for finding in findings if finding.status == "failure"]
    warned = sum(finding.status == "warning" for finding in findings)
    if values["json"]:
        _print_json({"ok": not failed, "model": values["MODEL"], "config": values["config"], "failures": len(failed),
                     "warnings": warned, "findings": [vars(finding) for finding in findings]})  # fmt: skip
    else:
        warnings = f"{warned} warning{'s' * (warned != 1)}"
        verdict = f"{len(failed)} failed: {', '.join(failed)}" if failed else "nothing failed"
        print(f"\n{len(findings)} checks, {warnings}, {verdict}")
    return 1 if failed else 0


def _finding_line(finding: Finding) -> str:
    sign = {"ok": "✓", "warning": "!", "failure": "✗"}[finding.status]
    remedy = f"\n{' ' * 20}→ {finding.remedy}" if finding.remedy else ""
    return f"{sign} {finding.name.ljust(17)} {finding.line}{remedy}"


def settings(arguments: Sequence[str]) -> int:
    """Print every setting, its default and what it does."""
    flags = _flags("settings")
    values, _ = flags.parse(arguments)

    from elman.config.tree import settings as all_settings
    from elman.config.tree import settings_table

    if values["json"]:
        _print_json({s.name: {"default": s.default, "help": s.help} for s in all_settings(ExperimentConfig).values()})
    else:
        print(settings_table(ExperimentConfig))
    return 0


def ui(arguments: Sequence[str]) -> int:
    """Open the MLflow UI on the local store."""
    flags = _flags("ui")
    flags.add_option("port", int, "Port on 127.0.0.1.", 5000)
    flags.add_option("team", bool, "Ask for passwords: the admin's is MLFLOW_AUTH_ADMIN_PASSWORD, without default.")
    values, _ = flags.parse(arguments)

    from elman.tracking.server import serve

    return serve(
        values["port"], team=values["team"],
        ready=lambda address: print(f"MLflow UI: {address} (Ctrl-C ends it)", flush=True),
    )  # fmt: skip


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    command.__name__: command
    for command in (train, search, evaluate, generate, runs, compare, remedy, sync, corpus, doctor, settings,
                    ui, dashboard)
}
"""Every command, declared here alone; its summary is its docstring."""


def _summary(command: str) -> str:
    return (COMMANDS[command].__doc__ or "").strip()


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {_summary(name)}" for name in COMMANDS]
    return "\n".join(
        ["usage: elman COMMAND …", "", "Train, compare and use recurrent language models.", "", *lines, "",
         "elman COMMAND --help tells more; elman --version, the version."]
    )  # fmt: skip


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, the system or torch, on whichever device, had none left."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(f"elman {__version__}")
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        from elman.config.tree import nearest

        hint = nearest(command, COMMANDS)
        raise ConfigError(f"{command or 'Nothing'} is not a command of elman.{hint} `elman --help` lists them.")
    return COMMANDS[command](arguments[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code of the contract."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    try:
        return _dispatch(sys.argv[1:] if arguments is None else list(arguments))
    except ElmanError as error:
        print(f"elman: {one_line(str(error))}", file=sys.stderr)
        return 2
    except (DivergenceError, SearchFailedError, UnusableCheckpointsError) as error:
        print(f"elman: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("elman: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain again while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from elman.tracking.store import StoppedError

        if isinstance(error, StoppedError):
            command = (sys.argv[1:] if arguments is None else list(arguments))[0]
            kept = f"run {error.run_id} keeps its newest checkpoint" if error.run_id else ""
            if error.run_id and command == "train":
                kept = f"`elman train --resume {error.run_id}` goes on with it"
            print(f"elman: {error}{'; ' * bool(kept)}{kept}.", file=sys.stderr)
            return 130 if error.signal_number == signal.SIGINT else 143
        if _is_out_of_memory(error):
            print(
                f"elman: not enough memory ({one_line(str(error)) or 'MemoryError'}): lower data.batch_size, "
                "data.sequence_length or model.hidden_size, or make room.", file=sys.stderr,
            )  # fmt: skip
            return 1
        traceback.print_exc()
        print(f"elman: internal error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
