"""Looking at a study from outside."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import optuna
from optuna.study import Study
from optuna.trial import TrialState

from elman.tracking.store import RunStore


def open_study(name: str = "s") -> Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{Path('mlruns/search.db').absolute()}")


def assert_whole(study: Study, store: RunStore, ended: int) -> None:
    """So many trials count, their numbers are contiguous, and nothing is left running."""
    trials = study.get_trials(deepcopy=False)
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert not [t for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    assert sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials) == ended
    children = store.children(study.user_attrs["mlflow_run"])
    assert "RUNNING" not in {run.status for run in children}
    states = {"COMPLETE": "FINISHED", "PRUNED": "FINISHED"}
    by_number: dict[str, list[str]] = {}
    for run in children:
        if "trial.number" in run.tags:
            by_number.setdefault(run.tags["trial.number"], []).append(run.status)
    for trial in trials:
        if trial.state.name in states:
            assert by_number[str(trial.number)] == ["FINISHED"], trial.number


def running_children() -> list[str]:
    """Trials' runs that the local store has as RUNNING; asked of the database itself, which is quick."""
    path = Path("mlruns/mlflow.db").absolute()
    if not path.exists():
        return []
    question = (
        "select r.run_uuid from runs r join tags t on t.run_uuid = r.run_uuid "
        "where r.status = 'RUNNING' and t.key = 'trial.number'"
    )
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as database:
        try:
            return [run for (run,) in database.execute(question)]
        except sqlite3.OperationalError:  # the tables are being made
            return []
