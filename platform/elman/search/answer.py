"""The answer of a study: the winner chosen, recorded, trained again in full, tested once and registered."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial

from elman.config.load import dump_yaml
from elman.config.plan import SearchPlan
from elman.config.schema import ExperimentConfig
from elman.config.search import SearchConfig
from elman.config.tree import override, signature
from elman.search.report import record_study
from elman.search.space import Space
from elman.search.tally import ranking, refuse_empty, tally
from elman.tracking.local import local_root
from elman.tracking.registry import register
from elman.tracking.store import Run, RunStore
from elman.training.experiment import RunResult, run_experiment
from elman.training.progress import Reporter


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    Attributes:
        run_id: The study's own run.
        best: The winning trial's number.
        point: Its settings.
        values: Its figures, of the study's metrics.
        standard_error: Of the mean over the folds; None without folds.
        front: Numbers of the trials on the Pareto front; the winner alone with one metric.
        trials: Completed, pruned, failed, lost.
        fits: Trainings that came to their end.
        experiment: The winner as an experiment, ready to train.
        retrained: The trainings of it, one a seed.
        seconds: Wall time of this call.
    """

    run_id: str
    name: str
    best: int
    point: dict[str, Any]
    values: list[float]
    standard_error: float | None
    front: list[int]
    trials: dict[str, int]
    fits: int
    experiment: ExperimentConfig
    retrained: list[RunResult] = field(default_factory=list)
    seconds: float = 0.0


def conclude(
    plan: SearchPlan,
    space: Space,
    study: Study,
    store: RunStore,
    run: Run,
    reporter: Reporter,
    threads: int,
    begun: float,
) -> SearchResult:
    """Choose the winner, record the study, and train the winner again.

    Args:
        threads: Of the workers; the winner repeats to the bit with as many.
        begun: When the search began, on the monotonic clock.

    Raises:
        SearchFailedError: No trial completed.
    """
    refuse_empty(study)
    config = plan.config
    winner = choose(study, config)
    point = point_of(winner, space)
    experiment = override(
        space.experiment(point), {"name": f"{config.study.name}-best", "trainer.threads": threads}
    )
    front = [trial.number for trial in study.best_trials] if len(config.study.metrics) > 1 else [winner.number]
    outcome = winner.user_attrs["outcome"]
    reporter.stage("drawing the study")
    run.log_text("best.yaml", dump_yaml(experiment))
    path = best_file(config.study.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_yaml(experiment), encoding="utf-8")
    if len(front) > 1:
        for number in front:
            other = override(space.experiment(point_of(study.trials[number], space)), {"trainer.threads": threads})
            run.log_text(f"pareto/trial-{number}.yaml", dump_yaml(other))
    record_study(run, study, space, winner, config)
    retrained = _retrain(plan, study, experiment, store, run, reporter)
    study.set_user_attr("finished", True)
    trials = study.get_trials(deepcopy=False)
    counts = tally(trials)
    figures: dict[str, float] = {f"best/{m.partition('/')[2]}": v for m, v in zip(config.study.metrics, winner.values,
                                                                               strict=True)}  # fmt: skip
    for key in ("test/bits_per_byte", "test/loss", "test/perplexity", "test/accuracy"):
        values = [result.metrics[key] for result in retrained if key in result.metrics]
        if values:
            figures[key] = statistics.fmean(values)
    run.metrics.add(figures, len(trials))
    run.describe(_summary(winner, point, config, counts.complete, retrained))
    return SearchResult(
        run_id=run.id,
        name=config.study.name,
        best=winner.number,
        point=point,
        values=list(winner.values),
        standard_error=outcome["standard_error"],
        front=front,
        trials={"complete": counts.complete, "pruned": counts.pruned, "failed": counts.failed, "lost": counts.lost},
        fits=sum(t.user_attrs["outcome"]["fits"] for t in trials if "outcome" in t.user_attrs),
        experiment=experiment,
        retrained=retrained,
        seconds=time.monotonic() - begun,
    )


def best_file(study: str) -> Path:
    """Where the winner's settings are, beside the artifact: to be trained at once."""
    return local_root() / "searches" / f"{study}.yaml"


def point_of(trial: FrozenTrial, space: Space) -> dict[str, Any]:
    """A trial's settings."""
    return space.restored(trial.params)


def choose(study: Study, config: SearchConfig) -> FrozenTrial:
    """The winner: the best, or the smallest model that is within one standard error of it.

    Source of the rule: Breiman et al. (1984), Classification and Regression Trees, section 3.4.3.
    """
    ranked = ranking(study)
    if config.study.choose == "best":
        return ranked[0]
    best = ranked[0]
    margin = best.user_attrs["outcome"]["standard_error"]
    within = [trial for trial in ranked if abs(trial.values[0] - best.values[0]) <= margin]
    return min(within, key=lambda t: (t.user_attrs["outcome"]["figures"]["model/parameters"], t.number))


def _retrain(
    plan: SearchPlan, study: Study, experiment: ExperimentConfig, store: RunStore, run: Run, reporter: Reporter
) -> list[RunResult]:
    """Train the winner in full, once a seed; the one that validates best is registered.

    A study that is called again and chooses the same winner has it trained already.
    """
    config = plan.config
    what = {"experiment": signature(experiment), "seeds": config.search.seeds}
    done = study.user_attrs.get("retrained")
    if done is not None and done["what"] == what:
        return [RunResult(**result) for result in done["results"]]
    results: list[RunResult] = []
    for index in range(config.search.seeds):
        seed = (experiment.seed + index) % 2**32
        reporter.note(f"training the best settings in full, seed {seed}")
        one = override(experiment, {"seed": seed, "name": f"{config.study.name}-best"})
        results.append(
            run_experiment(one, store, reporter, parent=run.id, tags={"study.name": config.study.name, "kind": "best"})
        )
    if results:
        chosen = min(results, key=lambda result: result.metrics["val/loss"])
        bits = chosen.metrics.get("test/bits_per_byte", chosen.metrics["val/bits_per_byte"])
        digest = store.find_run(chosen.run_id).tags["corpus.digest"]
        name = config.search.register or config.study.name
        assert chosen.model_uri is not None, "a search waits for its store"
        version, champion = register(store, chosen.run_id, chosen.model_uri, name, bits_per_byte=bits, digest=digest)
        run.set_tags({"best.run": chosen.run_id, "registered": f"models:/{name}/{version}"})
        reporter.note(f"registered as models:/{name}/{version}" + (" (champion)" if champion else ""))
    study.set_user_attr("retrained", {"what": what, "results": [asdict(result) for result in results]})
    return results


def _summary(
    winner: FrozenTrial, point: Mapping[str, Any], config: SearchConfig, complete: int, retrained: list[RunResult]
) -> str:
    error = winner.user_attrs["outcome"]["standard_error"]
    spread = f" ± {error:.4f}" if error is not None else ""
    lines = [
        f"Trial {winner.number} of {complete} that completed: "
        + ", ".join(f"{m} {v:.4f}{spread}" for m, v in zip(config.study.metrics, winner.values, strict=True)),
        "",
        *(f"- {name}: {value}" for name, value in point.items()),
    ]
    test = [r.metrics["test/bits_per_byte"] for r in retrained if "test/bits_per_byte" in r.metrics]
    if test:
        seeds = f"{len(test)} seeds" if len(test) > 1 else "one seed"
        lines += ["", f"Trained again with {seeds}: {statistics.fmean(test):.4f} bits per byte on the test split."]
    return "\n".join(lines)
