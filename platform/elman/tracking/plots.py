"""Loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Curve = Sequence[tuple[int, float]]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Running mean over the last ``window`` values."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def loss_curves(runs: Mapping[str, tuple[Curve, Curve]], *, unit: str = "bits per byte") -> Any:
    """A figure of training (thin, smoothed) and validation (marked) curves, one colour a run.

    Args:
        runs: Name → (training curve, validation curve), each (step, value).
        unit: What the values are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lows, highs = [], []
    for index, (name, (train, validation)) in enumerate(runs.items()):
        colour = f"C{index % 10}"
        if train:
            steps, values = zip(*train, strict=True)
            means = smoothed(values, max(1, len(values) // 100))
            axes.plot(steps, means, color=colour, alpha=0.45, linewidth=1.2, label=f"{name}: training")
            lows.append(min(means))
            highs.append(means[min(len(means) - 1, len(means) // 20)])
        if validation:
            steps, values = zip(*validation, strict=True)
            axes.plot(steps, values, color=colour, marker="o", markersize=4, linewidth=1.8, label=f"{name}: validation")
            lows.append(min(values))
            highs.append(max(values))
    if lows:
        low, high = min(lows), max(highs)
        margin = max(0.05 * (high - low), 1e-3)
        # The first few steps fall from the ceiling and would flatten everything after them.
        axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:  # runs without a curve have no entry
        axes.legend(frameon=False)
    return figure


def curves_with_bands(contestants: Mapping[str, Sequence[Curve]], *, unit: str = "bits per byte") -> Any:
    """A figure of validation curves: each contestant's mean over seeds, in a band from its lowest to its highest.

    Args:
        contestants: Name → one curve a seed, each (step, value); steps that not every seed has are left out.
        unit: What the values are.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, (name, curves) in enumerate(contestants.items()):
        by_step = [dict(curve) for curve in curves]
        steps = sorted(set.intersection(*(set(values) for values in by_step))) if by_step else []
        values = [[one[step] for one in by_step] for step in steps]
        means = [sum(row) / len(row) for row in values]
        axes.plot(steps, means, color=f"C{index % 10}", marker="o", markersize=4, linewidth=1.8, label=name)
        axes.fill_between(steps, [min(row) for row in values], [max(row) for row in values], color=f"C{index % 10}",
                          alpha=0.2, linewidth=0)  # fmt: skip
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"validation, {unit}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
