"""A tournament: cells at an equal budget, each at its own best settings, with a verdict.

Every contestant searches the same small space, is then trained with the same seeds, and is
tested once a seed on the same text. What a contestant wins by is given with its interval.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elman.analysis.verdict import Verdict, block_bits, compare_blocks, token_losses
from elman.config.load import dump_yaml
from elman.config.plan import SearchPlan
from elman.config.schema import ExperimentConfig
from elman.config.search import SearchConfig
from elman.config.tournament import TournamentPlan
from elman.config.tree import build, flatten, override
from elman.errors import ConfigError, DivergenceError, SearchFailedError
from elman.search.study import run_search
from elman.tasks.hardware import resolve_device, resolve_precision, set_threads
from elman.text.prepare import prepare
from elman.text.prepared import PreparedCorpus, PreparedSplit
from elman.tracking.plots import Curve, curves_with_bands
from elman.tracking.store import Run, RunStore
from elman.training.experiment import RunResult, run_experiment
from elman.training.loading import load_model
from elman.training.progress import Reporter, Silence


@dataclass
class Contestant:
    """One contestant, trained.

    Attributes:
        point: What its search chose.
        experiment: Its settings, the search's choice included.
        results: Its trainings, one a seed.
        failures: Why seeds have none.
    """

    name: str
    point: dict[str, Any]
    experiment: ExperimentConfig
    results: list[RunResult] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    bits_SK: NDArray[np.float64] | None = None

    @property
    def test(self) -> list[float]:
        """Bits per byte on the test split, one a seed."""
        return [result.metrics["test/bits_per_byte"] for result in self.results]


@dataclass(frozen=True)
class TournamentResult:
    """What a tournament came to.

    Attributes:
        run_id: The tournament's own run.
        contestants: The best first.
        verdicts: Every pair, those of the best one first.
        seconds: Wall time.
    """

    run_id: str
    name: str
    contestants: list[Contestant]
    verdicts: list[Verdict]
    seconds: float


def run_tournament(plan: TournamentPlan, workers: int = 1, reporter: Reporter | None = None) -> TournamentResult:
    """Hold a tournament.

    Args:
        plan: The file, read.
        workers: Processes of each contestant's search.
        reporter: Watches.

    Raises:
        ElmanError: The file or a corpus cannot be used; nothing has been trained.
        SearchFailedError: A contestant could not be trained at all.
        StoppedError: The user stopped it.
    """
    reporter = reporter or Silence()
    begun = time.monotonic()
    corpus = _common_text(plan, reporter)
    first = next(iter(plan.contestants.values()))
    store = RunStore(first.tracking)
    config = plan.config
    params = {key: json.dumps(value) for key, value in flatten(config).items()}
    params |= {f"space.{name}": json.dumps(value) for name, value in plan.space.items()}
    files = {f"contestants/{name}.yaml": dump_yaml(experiment) for name, experiment in plan.contestants.items()}
    tags = {"kind": "tournament", "corpus.digest": corpus.digest}
    with store.open_run(config.name, params, tags, files=files) as run:
        reporter.note(f"tournament {config.name}: run {run.id}")
        contestants = []
        for name, experiment in plan.contestants.items():
            contestant = _choose(plan, name, experiment, run, workers, reporter)
            _train(contestant, config.seeds, store, run, corpus, reporter)
            contestants.append(contestant)
        contestants.sort(key=lambda c: statistics.fmean(c.test))
        verdicts = _verdicts(contestants, config.seed)
        _record(run, contestants, verdicts)
        return TournamentResult(run.id, config.name, contestants, verdicts, time.monotonic() - begun)


def _common_text(plan: TournamentPlan, reporter: Reporter) -> PreparedCorpus:
    """The text that all are trained and tested on.

    Raises:
        ConfigError: Contestants differ in it, or it has no test split.
    """
    corpora = {experiment.corpus for experiment in plan.contestants.values()}
    if len(corpora) > 1:
        raise ConfigError(f"{plan.source}: contestants must share their corpus settings, or they do not compare.")
    corpus = prepare(corpora.pop(), progress=reporter.stage)
    if not isinstance(corpus.splits.get("test"), PreparedSplit):
        raise ConfigError(f"{plan.source}: {corpus.name} has no test split to judge by: raise corpus.test_fraction.")
    return corpus


def _choose(
    plan: TournamentPlan, name: str, experiment: ExperimentConfig, run: Run, workers: int, reporter: Reporter
) -> Contestant:
    """Let a contestant search its own settings."""
    config = plan.config
    if not plan.space:
        return Contestant(name, {}, experiment)
    flat = {
        # The run's id makes it a study of this tournament alone.
        "study.name": f"{config.name}-{name}-{run.id[:8]}",
        "study.trials": config.trials,
        "study.sampler": config.sampler,
        "study.seed": config.seed,
        "search.workers": workers,
        "search.seeds": 0,
        "search.keep_checkpoints": 0,
    }
    search = SearchPlan(plan.source, experiment, build(SearchConfig, flat), plan.space)
    reporter.note(f"{name}: searching {', '.join(plan.space)}")
    found = run_search(search, reporter, parent=run.id)
    chosen = override(found.experiment, {"name": experiment.name, "trainer.threads": experiment.trainer.threads})
    return Contestant(name, found.point, chosen)


def _train(
    contestant: Contestant, seeds: int, store: RunStore, run: Run, corpus: PreparedCorpus, reporter: Reporter
) -> None:
    """Train a contestant with every seed, and score the test text block by block."""
    test = corpus.splits["test"]
    assert isinstance(test, PreparedSplit)
    experiment = contestant.experiment
    blocks = []
    for index in range(seeds):
        seed = (experiment.seed + index) % 2**32
        reporter.note(f"{contestant.name}: training with seed {seed}")
        try:
            one = override(experiment, {"seed": seed})
            result = run_experiment(one, store, reporter, parent=run.id, tags={"contestant": contestant.name})
        except DivergenceError as error:
            contestant.failures.append(str(error))
            reporter.note(f"{contestant.name}, seed {seed}: {error}")
            continue
        contestant.results.append(result)
        contestant.curves.append(store.history(result.run_id, "val/bits_per_byte"))
        set_threads(experiment.trainer.threads)
        device = resolve_device(experiment.trainer.device)
        precision = resolve_precision(experiment.trainer.precision, device)
        model = load_model(result.run_id, store).model
        blocks.append(block_bits(token_losses(model, test, experiment.data, device, precision), test))
    if not blocks:
        raise SearchFailedError(f"{contestant.name} could not be trained with any seed: {contestant.failures[0]}")
    contestant.bits_SK = np.stack(blocks)


def _verdicts(contestants: Sequence[Contestant], seed: int) -> list[Verdict]:
    verdicts = []
    for first, second in itertools.combinations(contestants, 2):
        assert first.bits_SK is not None
        assert second.bits_SK is not None
        verdicts.append(compare_blocks(first.name, first.bits_SK, second.name, second.bits_SK, seed))
    return verdicts


def standings(contestants: Sequence[Contestant]) -> list[dict[str, Any]]:
    """One row a contestant: figures as means over seeds, with the spread of the test's."""
    return [
        {
            "contestant": c.name,
            "test_bits_per_byte": statistics.fmean(c.test),
            "test_spread": statistics.stdev(c.test) if len(c.test) > 1 else None,
            "validation_bits_per_byte": statistics.fmean(r.metrics["val/bits_per_byte"] for r in c.results),
            "parameters": c.results[0].parameters["total"],
            "tokens_per_second": statistics.fmean(r.tokens_per_second for r in c.results),
            "seconds": statistics.fmean(r.seconds for r in c.results),
            "seeds": len(c.results),
            "settings": dict(c.point),
            "runs": [r.run_id for r in c.results],
            "failures": c.failures,
        }
        for c in contestants
    ]


def _record(run: Run, contestants: Sequence[Contestant], verdicts: Sequence[Verdict]) -> None:
    rows = standings(contestants)
    said = [{**asdict(verdict), "is_sure": verdict.is_sure, "verdict": str(verdict)} for verdict in verdicts]
    run.log_json("results.json", {"standings": rows, "verdicts": said})
    run.metrics.add({f"test/{row['contestant']}": row["test_bits_per_byte"] for row in rows}, 0)
    for contestant in contestants:
        run.log_text(f"best/{contestant.name}.yaml", dump_yaml(contestant.experiment))
    run.log_figure("curves.png", curves_with_bands({c.name: c.curves for c in contestants}))
    lines = ["| | test bits/byte | parameters |", "| --- | --- | --- |"]
    lines += [f"| {r['contestant']} | {r['test_bits_per_byte']:.4f} | {r['parameters']:,} |" for r in rows]
    run.describe("\n".join([*lines, "", *(f"- {verdict}" for verdict in verdicts)]))
    run.set_tags({"winner": contestants[0].name})


def save_curves(result: TournamentResult, path: Path) -> None:
    """The curves, as a PNG beside what other comparisons write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    curves_with_bands({c.name: c.curves for c in result.contestants}).savefig(path, dpi=120)


