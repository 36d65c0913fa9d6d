from __future__ import annotations

import json
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from elman.config.load import load_config
from elman.config.plan import SearchPlan
from elman.config.schema import ExperimentConfig
from elman.errors import DataError, SearchFailedError, SearchSpaceError
from elman.search.answer import SearchResult
from elman.search.study import run_search
from elman.tracking.store import RunStore
from elman.training.experiment import run_experiment
from search_support import assert_whole, open_study, running_children

MakePlan = Callable[..., SearchPlan]
Search = Callable[[SearchPlan], SearchResult]


def trials_so_far() -> list[optuna.trial.FrozenTrial]:
    try:
        return open_study().get_trials(deepcopy=False)
    except KeyError:  # the study is not there yet
        return []


def kill_worker_when(ready: Callable[[], bool], killed: list[int]) -> threading.Thread:
    """Kill one worker of this process with SIGKILL as soon as ``ready`` says so."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not killed:
            if ready():
                for child in psutil.Process().children():
                    if "spawn_main" in " ".join(child.cmdline()):
                        child.send_signal(signal.SIGKILL)
                        killed.append(child.pid)
                        return
            time.sleep(0.05)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_grid_over_folds_fits_each_point_and_fold_once_and_the_best_repeats_to_the_bit(
    make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan(
        {"model.hidden_size": [4, 16], "model.dropout": [0.0, 0.3]},
        study={"sampler": "grid", "folds": 2, "seed": 7},
        search={"workers": 2, "seeds": 2},
        corpus__fold_gap=50,
    )
    result = run_search(plan)
    store = RunStore()
    assert result.trials == {"complete": 4, "pruned": 0, "failed": 0, "lost": 0}
    assert result.fits == 8
    assert_whole(open_study(), store, 4)

    parent = store.find_run(result.run_id)
    children = store.children(parent.id)
    trials = [run for run in children if "trial.number" in run.tags]
    assert (parent.status, len(trials), len(children)) == ("FINISHED", 4, 6)
    for run in trials:
        folds = [min(v for _, v in store.history(run.id, f"fold-{i}/val/bits_per_byte")) for i in (1, 2)]
        assert run.metrics["val/bits_per_byte"] == pytest.approx(statistics.fmean(folds), rel=1e-6)
        assert run.metrics["cv/standard_error"] == pytest.approx(statistics.stdev(folds) / math.sqrt(2), rel=1e-6)
        assert {a.path for a in store.client.list_artifacts(run.id)} == {"config.yaml"}
    assert result.values[0] == min(run.metrics["val/bits_per_byte"] for run in trials)
    names = {a.path for a in store.client.list_artifacts(parent.id)}
    assert {"best.yaml", "search.yaml", "base.yaml", "trials.csv", "trials.json", "importances.json", "plots"} <= names
    plots = {a.path.removeprefix("plots/") for a in store.client.list_artifacts(parent.id, "plots")}
    assert {"history.png", "slice.png", "contour.png", "parallel-coordinates.png", "importances.png", "rank.png",
            "timeline.png", "study.html"} <= plots  # fmt: skip
    rows = json.loads(store.download(parent.id, "trials.json", tmp_path).read_text())
    assert {(row["model.hidden_size"], row["model.dropout"]) for row in rows} == {(4, 0), (4, 0.3), (16, 0), (16, 0.3)}

    best = load_config(ExperimentConfig, store.download(parent.id, "best.yaml", tmp_path))
    assert {k: getattr(best.model, k.split(".")[1]) for k in result.point} == result.point
    assert [r.metrics["val/loss"] for r in result.retrained] != [result.retrained[0].metrics["val/loss"]] * 2
    by_hand = run_experiment(best, store)
    assert by_hand.metrics == result.retrained[0].metrics
    model = store.client.get_model_version_by_alias("s", "champion")
    assert model.run_id in {r.run_id for r in result.retrained}

    again = run_search(plan)
    assert (again.run_id, again.best, again.values) == (result.run_id, result.best, result.values)
    assert [r.run_id for r in again.retrained] == [r.run_id for r in result.retrained]
    assert len(store.children(parent.id)) == 6


def test_a_trial_trains_what_its_settings_train_by_hand_and_only_the_best_few_keep_checkpoints(
    make_plan: MakePlan, search: Search,
) -> None:
    plan = make_plan(
        {"optimizer.lr": [1e-4, 1e-3, 1e-2]}, study={"sampler": "grid"}, search={"keep_checkpoints": 1, "seeds": 1}
    )
    result = search(plan)
    store = RunStore()
    assert result.point == {"optimizer.lr": 1e-2}
    assert result.retrained[0].metrics["val/bits_per_byte"] == result.values[0]
    kept = [run.tags["trial.number"] for run in store.children(result.run_id)
            if "trial.number" in run.tags and store.client.list_artifacts(run.id, "checkpoints")]  # fmt: skip
    assert kept == ["2"]
    assert not list(Path("mlruns/checkpoints").glob("*"))


def test_a_diverging_trial_is_pruned_with_its_reason_and_the_study_goes_on(make_plan: MakePlan, search: Search) -> None:
    plan = make_plan({"optimizer.lr": [1e38, 1e-2]}, study={"sampler": "grid"}, optimizer__max_grad_norm=None,
                     optimizer__name="sgd")  # fmt: skip
    result = search(plan)
    assert (result.trials["complete"], result.trials["pruned"], result.best) == (1, 1, 1)
    diverged = next(r for r in RunStore().children(result.run_id) if r.tags.get("trial.number") == "0")
    assert (diverged.status, diverged.tags["trial.state"]) == ("FINISHED", "PRUNED")
    assert "diverged" in diverged.tags["trial.reason"]


def test_a_study_in_which_every_trial_fails_says_why_once(make_plan: MakePlan, search: Search) -> None:
    plan = make_plan({"optimizer.lr": [1e38, 2e38]}, study={"sampler": "grid"}, optimizer__max_grad_norm=None,
                     optimizer__name="sgd")  # fmt: skip
    with pytest.raises(SearchFailedError, match="no trial completed; 2 of 2 ended so: training diverged"):
        search(plan)
    store = RunStore()
    assert [run.status for run in store.runs() if run.tags.get("kind") == "search"] == ["FAILED"]
    assert not running_children()


def test_a_hopeless_trial_is_pruned_and_recorded_as_finished(make_plan: MakePlan, search: Search) -> None:
    plan = make_plan(
        {"optimizer.lr": [1e-2, 1e-9]}, study={"sampler": "grid", "pruner": "median", "pruner_startup": 1},
        trainer__max_steps=40, trainer__validate_every_steps=10,
    )  # fmt: skip
    result = search(plan)
    assert (result.trials["complete"], result.trials["pruned"]) == (1, 1)
    store = RunStore()
    pruned = next(r for r in store.children(result.run_id) if r.tags.get("trial.number") == "1")
    assert (pruned.status, pruned.tags["trial.state"]) == ("FINISHED", "PRUNED")
    assert len(store.history(pruned.id, "val/loss")) < 4
    assert open_study().trials[1].intermediate_values


def test_two_metrics_give_the_pareto_front_and_a_ceiling_keeps_large_models_out(
    make_plan: MakePlan, search: Search
) -> None:
    plan = make_plan(
        {"model.hidden_size": [4, 16, 64]}, study={"sampler": "grid", "metric": ["val/bits_per_byte",
                                                                                "model/parameters"]},
        constraints={"parameters": 5000}, trainer__max_steps=60, optimizer__lr=1e-2,
    )  # fmt: skip
    result = search(plan)
    assert result.trials["pruned"] == 1
    assert result.front == [0, 1]
    assert result.best == 1
    study = open_study()
    assert study.trials[2].state == TrialState.PRUNED
    assert "constraints.parameters 5,000" in study.trials[2].user_attrs["reason"]
    assert [t.user_attrs["outcome"]["fits"] for t in study.trials] == [1, 1, 0]


def test_the_one_standard_error_rule_takes_the_smallest_model_that_is_not_worse(
    make_plan: MakePlan, search: Search
) -> None:
    plan = make_plan(
        {"model.hidden_size": [4, 16, 18]}, study={"sampler": "grid", "folds": 2, "choose": "one_standard_error"},
        corpus__fold_gap=0, trainer__max_steps=60,
    )  # fmt: skip
    result = search(plan)
    outcomes = [trial.user_attrs["outcome"] for trial in open_study().trials]
    values = [outcome["values"][0] for outcome in outcomes]
    best = values.index(min(values))
    margin = outcomes[best]["standard_error"]
    expected = next(i for i, value in enumerate(values) if value <= values[best] + margin)
    assert result.best == expected


def test_a_killed_worker_s_trial_is_run_again_once_and_the_count_is_exact(make_plan: MakePlan) -> None:
    plan = make_plan(
        {"optimizer.lr": {"low": 1e-3, "high": 1e-1, "log": True}}, study={"sampler": "random", "trials": 3},
        search={"workers": 2}, trainer__max_steps=1000,
    )  # fmt: skip
    killed: list[int] = []
    thread = kill_worker_when(lambda: len(running_children()) >= 2, killed)
    result = run_search(plan)
    thread.join(1)
    assert killed
    study, store = open_study(), RunStore()
    assert_whole(study, store, 3)
    assert result.trials == {"complete": 3, "pruned": 0, "failed": 0, "lost": 1}
    [lost] = [t for t in study.trials if t.state == TrialState.FAIL]
    [again] = [t for t in study.trials if t.user_attrs.get("retry_of") == lost.number]
    assert again.params == lost.params
    # It may have been killed before it had a run.
    statuses = [r.status for r in store.children(result.run_id) if r.tags.get("trial.number") == str(lost.number)]
    assert statuses in ([], ["FAILED"])


def test_a_stopped_search_goes_on_where_it_was_with_new_draws(make_plan: MakePlan) -> None:
    plan = make_plan(
        {"optimizer.lr": {"low": 1e-3, "high": 1e-1, "log": True}}, study={"sampler": "random", "trials": 3},
        trainer__max_steps=200,
    )  # fmt: skip

    def stop() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if any(t.state == TrialState.COMPLETE for t in trials_so_far()) and running_children():
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    from elman.tracking.store import StoppedError

    with pytest.raises(StoppedError):
        run_search(plan)
    store = RunStore()
    parent = open_study().user_attrs["mlflow_run"]
    assert store.find_run(parent).status == "KILLED"
    assert not running_children()
    result = run_search(plan)
    study = open_study()
    assert result.run_id == parent
    assert store.find_run(parent).status == "FINISHED"
    assert_whole(study, store, 3)
    complete = [t.params["optimizer.lr"] for t in study.trials if t.state == TrialState.COMPLETE]
    assert len(set(complete)) == 3


def test_the_same_name_with_another_space_is_refused(make_plan: MakePlan, search: Search) -> None:
    study = {"sampler": "grid"}
    search(make_plan({"optimizer.lr": [1e-2]}, study=study))
    with pytest.raises(SearchSpaceError, match="earlier study with another space"):
        search(make_plan({"optimizer.lr": [1e-3]}, study=study))


def test_windows_longer_than_the_text_are_refused_before_anything_is_recorded(
    make_plan: MakePlan, search: Search
) -> None:
    with pytest.raises(DataError, match="fewer than one window"):
        search(make_plan({"data.batch_size": {"low": 8, "high": 8000}}, study={"trials": 2}))
    assert not Path("mlruns/search.db").exists()
    assert RunStore().runs() == []


@pytest.mark.parametrize(
    ("study", "settings"),
    [
        ({"sampler": "tpe"}, {}),
        ({"sampler": "gp"}, {}),
        ({"sampler": "cmaes"}, {}),
        ({"sampler": "nsga2"}, {}),
        ({"sampler": "random", "pruner": "successive_halving"}, {}),
        ({"sampler": "random", "pruner": "hyperband"}, {}),
        ({"sampler": "random", "pruner": "patience", "pruner_patience": 1}, {}),
        ({"sampler": "random", "pruner": "wilcoxon", "folds": 3}, {"corpus__fold_gap": 10}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_every_sampler_and_pruner_brings_a_study_to_its_end(
    make_plan: MakePlan, search: Search, study: dict[str, Any], settings: dict[str, Any]
) -> None:
    space = {"optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True}, "model.hidden_size": {"low": 4, "high": 16}}
    settings = {"trainer__max_steps": 9, "trainer__validate_every_steps": 3} | settings
    plan = make_plan(space, study=study | {"trials": 4}, **settings)
    result = search(plan)
    assert result.trials["complete"] + result.trials["pruned"] == 4
    assert result.trials["failed"] == 0
    points = {tuple(trial.params.values()) for trial in open_study().trials}
    assert len(points) == 4
    assert_whole(open_study(), RunStore(), 4)


def test_minutes_end_a_study_and_cut_its_last_trial_off(make_plan: MakePlan, search: Search) -> None:
    plan = make_plan(
        {"optimizer.lr": {"low": 1e-3, "high": 1e-2}}, study={"sampler": "random", "minutes": 0.05},
        trainer__max_steps=150, trainer__validate_every_steps=50,
    )  # fmt: skip
    begun = time.monotonic()
    result = search(plan)
    assert time.monotonic() - begun < 60 * 0.05 + 15
    last = open_study().trials[-1]
    assert last.state in (TrialState.PRUNED, TrialState.COMPLETE)
    assert result.trials["complete"] >= 1
    if last.state == TrialState.PRUNED:
        assert "minutes were over" in last.user_attrs["reason"]


def test_known_good_points_are_tried_first_and_once(make_plan: MakePlan, search: Search) -> None:
    space = {"optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True}}
    known = ({"optimizer.lr": 0.01}, {"optimizer.lr": 0.02})
    search(make_plan(space, study={"sampler": "random", "trials": 3}, enqueue=known))
    search(make_plan(space, study={"sampler": "random", "trials": 4}, enqueue=known))
    rates = [trial.params["optimizer.lr"] for trial in open_study().trials]
    assert rates[:2] == [0.01, 0.02]
    assert len(set(rates)) == len(rates) == 4


def test_draws_depend_on_the_seed_alone_however_often_a_study_is_interrupted(
    make_plan: MakePlan, search: Search
) -> None:
    space = {"optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True}}

    def rates(name: str, *trials: int, seed: int = 1) -> list[float]:
        for number in trials:
            search(make_plan(space, study={"name": name, "sampler": "random", "trials": number, "seed": seed},
                             trainer__max_steps=2))  # fmt: skip
        return [trial.params["optimizer.lr"] for trial in open_study(name).trials]

    whole = rates("a", 3)
    assert rates("b", 1, 3) == whole
    assert rates("c", 1, seed=2) != whole[:1]
    assert len(set(whole)) == 3
