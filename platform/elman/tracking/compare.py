"""Runs side by side: the settings that differ, the figures, the curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elman.errors import TrackingError
from elman.tracking.local import RunSummary
from elman.tracking.plots import loss_curves
from elman.tracking.store import RunStore

FIGURES = (
    "best/loss", "best/perplexity", "best/bits_per_byte", "best/bits_per_character", "best/accuracy",
    "test/loss", "test/perplexity", "test/bits_per_byte", "test/bits_per_character", "test/accuracy",
    "model/parameters", "training/tokens_per_second", "training/seconds",
)  # fmt: skip
"""What a comparison shows, in this order; ``best/`` is the best checkpoint on the validation split."""

UNINTERESTING = ("name", "tracking.uri", "tracking.experiment", "tracking.register", "tracking.system_metrics")


@dataclass(frozen=True)
class Comparison:
    """Runs, compared.

    Attributes:
        settings: Dotted name → one value a run, for the settings that differ.
        metrics: Name → one value a run, None where a run has none.
        notes: What a reader must know before trusting the comparison.
    """

    runs: list[RunSummary]
    settings: dict[str, list[str | None]]
    metrics: dict[str, list[float | None]]
    notes: list[str]


def compare_runs(runs: Sequence[RunSummary]) -> Comparison:
    """Put runs side by side.

    Raises:
        TrackingError: Two runs name the same corpus and trained on different text.
    """
    digests: dict[str, dict[str, str]] = {}
    for run in runs:
        name, digest = run.params.get("corpus.name", ""), run.tags.get("corpus.digest", "")
        digests.setdefault(name, {}).setdefault(digest, run.id)
    for name, found in digests.items():
        if len(found) > 1:
            first, second = list(found.values())[:2]
            raise TrackingError(
                f"Runs {first} and {second} both name the corpus {name}, but its text differed between them "
                "(another digest): their figures do not compare."
            )
    notes = []
    if len({digest for found in digests.values() for digest in found}) > 1:
        notes.append("the runs are on different corpora: their figures do not compare")
    unfinished = [run.name for run in runs if run.status != "FINISHED"]
    if unfinished:
        notes.append(f"not finished: {', '.join(unfinished)}")
    names = {key: None for run in runs for key in run.params if key not in UNINTERESTING}
    every_setting = {key: [run.params.get(key) for run in runs] for key in names}
    settings = {key: values for key, values in every_setting.items() if len(set(values)) > 1}
    every_metric = {key: [run.metrics.get(key) for run in runs] for key in FIGURES}
    metrics = {key: values for key, values in every_metric.items() if set(values) != {None}}
    return Comparison(list(runs), settings, metrics, notes)


def write_curves(store: RunStore, runs: Sequence[RunSummary], path: Path) -> None:
    """The runs' curves in bits per byte, overlaid, as a PNG."""
    curves = {}
    for run in runs:
        label = run.name if [r.name for r in runs].count(run.name) == 1 else f"{run.name} {run.id[:6]}"
        curves[label] = (store.history(run.id, "train/bits_per_byte"), store.history(run.id, "val/bits_per_byte"))
    path.parent.mkdir(parents=True, exist_ok=True)
    loss_curves(curves).savefig(path, dpi=120)
