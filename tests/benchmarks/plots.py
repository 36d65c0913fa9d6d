"""One picture for each benchmark's figures: medians, their spread, and the goal where there is one.

    python tests/benchmarks/plots.py build/bench

Reads every *.json there that a benchmark wrote, and draws a .png beside it. A bar is a median, its whisker
the quartiles, the tick across it the goal; what misses its goal is red.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt

plt.switch_backend("Agg")

MET, MISSED, PLAIN, GOAL = "#3b7d4f", "#b5473c", "#5b7793", "#1d1d1d"
UNITS = {
    "tokens_per_second": "tokens/s", "megabytes_per_second": "MB/s", "speedup": "times as fast", "seconds": "s",
    "share": "share of the processor's bf16 rate", "help": "s to `elman --help`", "first_step": "s to the first step",
    "ratios": "ratio", "growth": "MB more than the small corpus", "peak": "MB at most", "added": "s added to a step",
    "change": "change of the loss in bf16", "fp32": "nats in fp32", "bf16": "nats in bf16",
    "cost_of_a_step": "times a step's time", "seconds_to_the_end": "s to the end", "best": "nats",
    "windowed": "nats in windows", "microseconds_per_token": "µs a token", "bits_per_byte": "bits a byte",
}  # fmt: skip
RECIPE_GOALS = ((1.4697, 120), (1.45, 180))  # nats on tiny shakespeare, and the seconds to get there
SETTINGS = {"layers", "length", "hidden_size", "borders"}  # numbers that tell results apart; words always do


class Goal(NamedTuple):
    """What a figure should be at least, or at most."""

    value: float
    at_most: bool = False


class Row(NamedTuple):
    """One figure: its median and quartiles."""

    label: str
    median: float
    low: float
    high: float
    goal: Goal | None

    @property
    def colour(self) -> str:
        if self.goal is None:
            return PLAIN
        met = self.median <= self.goal.value if self.goal.at_most else self.median >= self.goal.value
        return MET if met else MISSED


def as_text(figure: float) -> str:
    """Four digits that count, or all before the point."""
    return f"{figure:,.4g}" if abs(figure) < 1e4 else f"{figure:,.0f}"


Panels = dict[str, list[Row]]
"""Rows by quantity."""


def training_goal(result: Mapping[str, Any]) -> float | None:
    goals = {("lstm", 1): 3, ("gru", 1): 5, ("rnn", 1): 5, ("lstm", 2): 2.2, ("gru", 2): 3.5, ("rnn", 2): 3.5}
    return goals.get((result["cell"], result["layers"]))


def goal_of(benchmark: str, quantity: str, part: str, result: Mapping[str, Any]) -> Goal | None:
    """The goal of one figure, if it has one."""
    at_least: float | None = None
    at_most: float | None = None
    match benchmark, quantity:
        case "training_speed", "speedup":
            at_least = training_goal(result)
        case "keras_speed", "speedup":
            at_least = 4 if result["layers"] == 1 else None
        case "word_speed", "speedup":
            at_least = {"exact": 3, "adaptive": 6}.get(part)
        case "recurrent_share", "share":
            at_least = 0.7
        case "generation_speed", "ratios":
            at_least = {"one over plain": 5, "many over one": 20}.get(part)
            at_most = 1.05 if part.startswith("time at") else None
        case "search_rate", "ratios":
            at_least = 2
        case "prepare_speed", "megabytes_per_second":
            at_least = 50 if result["level"] in ("byte", "character") else None
        case "prepare_speed", "speedup":
            at_least = 0.9
        case "memory", "growth":
            at_most = 100
        case "startup", "help":
            at_most = 0.4
        case "startup", "first_step":
            at_most = 6
        case "platform_cost", "added":
            at_most = 2e-4
        case "precision_quality", "change":
            at_most = 0.005
    if at_least is not None:
        return Goal(at_least)
    return None if at_most is None else Goal(at_most, at_most=True)


def spread(value: object) -> tuple[float, float, float] | None:
    """Median and quartiles of a figure, or of a list of them."""
    match value:
        case {"median": float() as median, "low": float() as low, "high": float() as high}:
            return median, low, high
        case [float() | int(), *_] if all(isinstance(part, float | int) for part in value):
            low, median, high = statistics.quantiles(value, n=4, method="inclusive") if len(value) > 1 else value * 3
            return median, low, high
        case float() if math.isfinite(value):
            return value, value, value
    return None


def panels_of(benchmark: str, results: list[dict[str, Any]]) -> Panels:
    """What a benchmark measured, by quantity."""
    tell = [name for name in results[0]
            if len({json.dumps(result.get(name)) for result in results}) > 1
            and (name in SETTINGS or isinstance(results[0][name], str))]  # fmt: skip
    panels: Panels = {}
    for result in results:
        named = {name: f"{name.replace('_', ' ')} {result[name]}" for name in SETTINGS & result.keys()}
        who = " ".join(named.get(name, str(result[name])) for name in tell)
        for quantity, value in result.items():
            if quantity in tell or quantity not in UNITS:
                continue
            parts = {"": value} if spread(value) else value if isinstance(value, dict) else {}
            for part, figure in parts.items():
                if figures := spread(figure):
                    goal = goal_of(benchmark, quantity, part, result)
                    label = ", ".join(filter(None, [who, part])) or benchmark.replace("_", " ")
                    panels.setdefault(quantity, []).append(Row(label, *figures, goal))
    return panels


def draw_rows(axes: Any, quantity: str, rows: list[Row]) -> None:
    values = [row.median for row in rows if row.median > 0]
    logarithmic = len(values) == len(rows) and max(values) > 30 * min(values)
    for place, row in enumerate(rows):
        axes.barh(place, row.median, height=0.62, color=row.colour, alpha=0.85)
        whiskers = [[max(0.0, row.median - row.low)], [max(0.0, row.high - row.median)]]
        if row.high > row.low:
            axes.errorbar(row.median, place, xerr=whiskers, color="#222222", capsize=3, linewidth=1)
        if row.goal is not None:
            axes.plot([row.goal.value] * 2, [place - 0.42, place + 0.42], color=GOAL, linewidth=2)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    axes.invert_yaxis()
    figures = axes.secondary_yaxis("right")
    figures.set_yticks(range(len(rows)), [as_text(row.median) for row in rows], fontsize=8)
    figures.tick_params(length=0)
    figures.spines["right"].set_visible(False)
    axes.set_xlabel(UNITS[quantity], fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    if logarithmic:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_formatter(lambda value, _: as_text(value))
    goals = {row.goal.at_most for row in rows if row.goal is not None}
    if goals:
        how = " or ".join("at most" if at_most else "at least" for at_most in sorted(goals))
        axes.set_title(f"tick: goal ({how})", fontsize=8, loc="right", color=GOAL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)


def curves_of(benchmark: str, results: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Figures that belong to a line over something: (quantity over what) to (who to points)."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for number, result in enumerate(results, 1):
        if benchmark == "recipe":
            lines = curves.setdefault("validation loss, nats|seconds", {})
            lines[f"{result['corpus']}, run {number}"] = result["curve"]
        if benchmark == "scan_lengths":
            for quantity in ("microseconds_per_token", "bits_per_byte"):
                if quantity in result:
                    lines = curves.setdefault(f"{UNITS[quantity]}|tokens in a window", {})
                    lines.setdefault(result["contestant"], []).append((result["length"], result[quantity]))
    return curves


def draw_curves(axes: Any, what: str, lines: dict[str, list[tuple[float, float]]]) -> None:
    quantity, over = what.split("|")
    for who, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=who)
    if over == "seconds":
        low = min(loss for points in lines.values() for _, loss in points)
        axes.set_ylim(top=1.5 * low)
        for target, at in RECIPE_GOALS if all("shakespeare" in who for who in lines) else ():
            axes.plot(at, target, marker="_", color=GOAL, markersize=18, markeredgewidth=2)
    else:
        places = sorted({place for points in lines.values() for place, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:,.0f}" for place in places])
        axes.set_ylim(bottom=0 if "µs" in quantity else None)
    axes.set_xlabel(over, fontsize=9)
    axes.set_ylabel(quantity, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def draw(source: Path) -> Path | None:
    """The picture of one file of figures; None where it holds nothing to draw."""
    report = json.loads(source.read_text(encoding="utf-8"))
    results, surroundings = report["results"], report["environment"]
    if not results:
        return None
    curves = curves_of(source.stem, results)
    panels = {} if source.stem == "scan_lengths" else panels_of(source.stem, results)
    heights = [2.6 for _ in curves] + [0.55 + 0.27 * len(rows) for rows in panels.values()]
    if not heights:
        return None
    figure, grid = plt.subplots(len(heights), figsize=(8, sum(heights) + 0.5 * len(heights) + 0.7), squeeze=False,
                                layout="constrained", gridspec_kw={"height_ratios": heights})  # fmt: skip
    drawings: list[Callable[[Any], None]] = [lambda axes, c=c: draw_curves(axes, *c) for c in curves.items()]
    drawings += [lambda axes, p=p: draw_rows(axes, *p) for p in panels.items()]
    for drawing, axes in zip(drawings, grid[:, 0], strict=True):
        drawing(axes)
    figure.suptitle(source.stem.replace("_", " "), fontsize=12, x=0.01, ha="left")
    figure.supxlabel(textwrap.fill(told(surroundings), 155), fontsize=7, color="#666666", x=0.01, ha="left")
    target = source.with_suffix(".png")
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target


def told(surroundings: Mapping[str, Any]) -> str:
    """Where and when it was measured, in a line."""
    packages = surroundings.get("packages", {})
    facts = [
        surroundings["processor"], f"{surroundings['cores']} cores, {surroundings['threads']} threads",
        f"load {surroundings['load']:.1f}", f"Python {surroundings['python']}", f"torch {surroundings['torch']}",
        f"elman {packages.get('elman', '?')} at {(surroundings.get('commit') or 'no commit')[:10]}"
        + (" with changes" if surroundings.get("uncommitted_changes") else ""), surroundings.get("date", ""),
    ]  # fmt: skip
    return ", ".join(filter(None, facts))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path, nargs="?", default=Path("build/bench"), help="where the figures are")
    folder = arguments.parse_args().folder
    for source in sorted(folder.glob("*.json")):
        target = draw(source)
        print(target or f"{source}: nothing to draw")


if __name__ == "__main__":
    main()
