"""What a study's run ends with: its trials as a table, what mattered, and Optuna's plots."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from elman.config.search import SearchConfig
from elman.search.space import Space
from elman.tracking.store import Run

log = logging.getLogger(__name__)

FEWEST_FOR_IMPORTANCE = 4
"""Completed trials below which saying what mattered would be guessing."""

MOST_IN_CONTOUR = 4
"""Settings in the contour and rank plots, the most important first: they are drawn in pairs."""


def record_study(run: Run, study: Study, space: Space, winner: FrozenTrial, config: SearchConfig) -> None:
    """Log everything that shows a finished study; a plot that Optuna cannot draw is left out with a warning."""
    rows = trial_table(study, space, config)
    run.log_text("trials.csv", _as_csv(rows))
    run.log_json("trials.json", rows)
    weights = importances(study, config)
    if weights:
        run.log_json("importances.json", weights)
        run.metrics.add({f"importance/{name}": value for name, value in weights.items()}, 0)
    run.set_tags({"best.trial": winner.number})
    if len(study.best_trials) > 0:
        _plots(run, study, list(weights), config)


def trial_table(study: Study, space: Space, config: SearchConfig) -> list[dict[str, Any]]:
    """One row a trial, in their order."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        outcome = trial.user_attrs.get("outcome", {})
        row: dict[str, Any] = {"trial": trial.number, "state": trial.state.name.lower()}
        row |= {name: _plain(value) for name, value in space.restored(trial.params).items()}
        values = trial.values or [None] * len(config.study.metrics)
        row |= dict(zip(config.study.metrics, values, strict=True))
        row["standard_error"] = outcome.get("standard_error")
        row["parameters"] = outcome.get("figures", {}).get("model/parameters")
        row["seconds"] = outcome.get("seconds")
        row["reason"] = trial.user_attrs.get("reason", "")
        row["run"] = outcome.get("run_id")
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _as_csv(rows: list[dict[str, Any]]) -> str:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()})
    return sink.getvalue()


def importances(study: Study, config: SearchConfig) -> dict[str, float]:
    """Share of the first metric's variance that each setting explains, the largest first.

    Empty where too few trials completed, or where they all came to the same.

    Source: fANOVA, Hutter, Hoos & Leyton-Brown (2014), ICML 32.
    """
    complete = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    values = {t.values[0] for t in complete}
    if len(complete) < FEWEST_FOR_IMPORTANCE or len(values) < 2:
        return {}
    target = None if len(config.study.metrics) == 1 else (lambda trial: trial.values[0])
    try:
        found = optuna.importance.get_param_importances(study, evaluator=_evaluator(config), target=target)
    except (ValueError, RuntimeError) as error:  # a space of one value has no variance to explain
        log.info("No importances: %s", error)
        return {}
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def _evaluator(config: SearchConfig) -> optuna.importance.FanovaImportanceEvaluator:
    return optuna.importance.FanovaImportanceEvaluator(seed=config.study.seed)


def _plots(run: Run, study: Study, ranked: list[str], config: SearchConfig) -> None:
    import optuna.visualization as interactive
    import optuna.visualization.matplotlib as still

    metrics = config.study.metrics
    names = ranked or list(dict.fromkeys(name for t in study.get_trials(deepcopy=False) for name in t.params))
    first: dict[str, Any] = {"target_name": metrics[0]}
    if len(metrics) > 1:
        first["target"] = lambda trial: trial.values[0]
    many = {"params": names[:MOST_IN_CONTOUR]} if len(names) > 1 else None
    wanted: list[tuple[str, str, dict[str, Any] | None]] = [
        ("history", "plot_optimization_history", first),
        ("slice", "plot_slice", first),
        ("contour", "plot_contour", None if many is None else first | many),
        ("parallel-coordinates", "plot_parallel_coordinate", first),
        ("importances", "plot_param_importances", first | {"evaluator": _evaluator(config)} if ranked else None),
        ("rank", "plot_rank", None if many is None else first | many),
        ("timeline", "plot_timeline", {}),
        ("intermediate-values", "plot_intermediate_values", {} if config.study.pruner != "none" else None),
        ("pareto-front", "plot_pareto_front", {"target_names": list(metrics)} if len(metrics) > 1 else None),
    ]
    pages = []
    with warnings.catch_warnings():
        # That an interface of Optuna's may change, or that a figure is tight, is no news to the user.
        warnings.simplefilter("ignore")
        for name, function, arguments in wanted:
            if arguments is None:
                continue
            figure = _drawn(name, partial(getattr(interactive, function), study, **arguments))
            if figure is not None:
                pages.append((name, figure))
            axes = _drawn(name, partial(getattr(still, function), study, **arguments))
            if axes is not None:
                _save_still(run, name, axes)
    if pages:
        run.log_text("plots/study.html", _page(config.study.name, pages))


def _drawn(name: str, draw: Callable[[], Any]) -> Any:
    try:
        return draw()
    except Exception as error:  # a plot is no reason to lose a study
        log.warning("The plot %s cannot be drawn: %s", name, error)
        return None


def _save_still(run: Run, name: str, axes: Any) -> None:
    import matplotlib.pyplot as plt
    import numpy as np

    figure = np.asarray(axes).flat[0].figure
    if name in ("slice", "contour", "rank"):
        side = len(np.asarray(axes).flat) if name == "slice" else int(math.sqrt(len(np.asarray(axes).flat)))
        figure.set_size_inches(max(6.4, 4.2 * side), 4.8 if name == "slice" else max(4.8, 3.6 * side))
    else:
        figure.set_size_inches(9, 5.5)
    try:
        run.log_figure(f"plots/{name}.png", figure)
    finally:
        plt.close(figure)


def _page(title: str, figures: list[tuple[str, Any]]) -> str:
    """Every plot on one page that needs no network: the library is in it, once."""
    import html

    parts = []
    for index, (name, figure) in enumerate(figures):
        figure.update_layout(title=name.replace("-", " "))
        parts.append(figure.to_html(full_html=False, include_plotlyjs=index == 0))
    return (
        f"<!doctype html><html><head><meta charset='utf-8'><title>{html.escape(title)}</title></head>"
        f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>"
    )
