"""What is killed and what goes away: real processes, a real PostgreSQL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.study import Study
from optuna.trial import TrialState

from elman.config.load import dump_yaml
from elman.config.plan import SearchPlan
from elman.errors import TrackingError
from elman.search.storage import close_storage, open_storage
from elman.search.study import SearchResult
from elman.tracking.store import RunStore
from search_support import assert_whole, open_study, running_children
from support import tiny

MakePlan = Callable[..., SearchPlan]
Search = Callable[[SearchPlan], SearchResult]


def elman(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The command line, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "elman.cli", *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )  # fmt: skip


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if process is not None and process.poll() is not None:
            pytest.fail(f"ended with {process.returncode}: {process.communicate()}")
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def write_search(folder: Path, text_file: Path, study: str, **settings: Any) -> Path:
    (folder / "base.yaml").write_text(dump_yaml(tiny(text_file, **settings)), encoding="utf-8")
    path = folder / "search.yaml"
    space = "space: {optimizer.lr: {low: 1.0e-3, high: 1.0e-1, log: true}}\nsearch: {seeds: 0}\n"
    path.write_text(f"base: base.yaml\nstudy: {study}\n{space}", encoding="utf-8")
    return path


@pytest.mark.slow
def test_the_whole_command_killed_goes_on_by_the_same_command(workplace: Path, text_file: Path) -> None:
    path = write_search(workplace, text_file, "{name: s, sampler: random, trials: 3}", trainer__max_steps=250)
    first = elman("search", "--config", str(path), "--workers", "2")
    wait_until(lambda: len(running_children()) >= 1, first)
    workers = [child for child in psutil.Process(first.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    first.kill()
    first.communicate()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert workers
    assert not alive, "workers outlived their driver"

    again = elman("search", "--config", str(path), "--workers", "2", "--json")
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    result = json.loads(out)
    assert result["trials"]["complete"] == 3
    study, store = open_study(), RunStore()
    assert_whole(study, store, 3)
    assert [run.id for run in store.runs() if run.tags.get("kind") == "search"] == [result["run_id"]]
    complete = [t.params["optimizer.lr"] for t in study.trials if t.state == TrialState.COMPLETE]
    assert len(set(complete)) == 3


@pytest.mark.slow
def test_a_restarted_postgresql_loses_nothing_with_workers_from_two_commands(
    workplace: Path, text_file: Path, postgres: Any
) -> None:
    """Both the study and the runs are on a server that is away for three seconds."""
    url = postgres.get_uri()
    postgres.psql("create database tracking;")
    tracking = postgres.get_uri(database="tracking").replace("postgresql://", "postgresql+psycopg://")
    where = ["--storage", url, "--tracking.uri", tracking]
    path = write_search(workplace, text_file, "{name: s, sampler: tpe, trials: 14}", trainer__max_steps=500)

    def count(condition: str) -> int:
        try:
            answer = postgres.psql(f"select 'n='||count(*) from trials t where {condition};")
            return int(answer.split("n=")[1].split()[0])
        except (subprocess.CalledProcessError, IndexError):  # the tables are not made yet
            return 0

    first = elman("search", "--config", str(path), "--workers", "1", "--json", *where)
    wait_until(lambda: count("state = 'RUNNING'") > 0, first)
    second = elman("search", "--join", "s", "--workers", "1", *where)
    given_away = "exists (select 1 from trial_user_attributes a where a.trial_id = t.trial_id and a.key = 'seat')"
    wait_until(lambda: count(f"state = 'RUNNING' and {given_away}") > 0, second)
    postgres.stop()
    time.sleep(3)
    postgres.start()

    out, err = first.communicate(timeout=150)
    assert first.returncode == 0, err
    assert "does not answer" in err
    assert "answers again" in err
    assert json.loads(out)["trials"] == {"complete": 14, "pruned": 0, "failed": 0, "lost": 0}
    storage = open_storage(url)
    trials = optuna.load_study(study_name="s", storage=storage).trials
    close_storage(storage)
    assert [trial.number for trial in trials] == list(range(14))
    away = [trial for trial in trials if "seat" in trial.user_attrs]
    assert away
    said, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert f"{len(away)} of its trials were trained here" in said
    listed, _ = elman("runs", "--all", "--json", "--limit", "100", "--tracking.uri", tracking).communicate(timeout=60)
    runs = [run for run in json.loads(listed)["runs"] if "trial.number" in run["tags"]]
    assert "RUNNING" not in {run["status"] for run in runs}
    finished = [run["tags"]["trial.number"] for run in runs if run["status"] == "FINISHED"]
    assert sorted(map(int, finished)) == list(range(14))


def _study_left_by_a_dead_driver(plan: SearchPlan, search: Search) -> tuple[Study, SearchResult]:
    """A finished study to which a driver that died has added a trial that still runs."""
    result = search(plan)
    study = open_study()
    trial = study.ask()
    trial.suggest_float("optimizer.lr", 1e-3, 1e-1, log=True)
    return study, result


def test_a_trial_that_a_dead_driver_left_running_is_run_again(make_plan: MakePlan, search: Search) -> None:
    space = {"optimizer.lr": {"low": 1e-3, "high": 1e-1, "log": True}}
    study, _ = _study_left_by_a_dead_driver(make_plan(space, study={"sampler": "random", "trials": 1}), search)
    lost = study.trials[1].params
    search(make_plan(space, study={"sampler": "random", "trials": 2}))
    assert_whole(study, RunStore(), 2)
    assert study.trials[1].user_attrs["reason"] == "the search was killed"
    assert study.trials[2].params == lost


def test_an_outcome_that_a_dead_driver_had_written_down_is_not_trained_again(
    make_plan: MakePlan, search: Search
) -> None:
    space = {"optimizer.lr": {"low": 1e-3, "high": 1e-1, "log": True}}
    study, _ = _study_left_by_a_dead_driver(make_plan(space, study={"sampler": "random", "trials": 1}), search)
    outcome = study.trials[0].user_attrs["outcome"] | {"values": [0.5], "run_id": None}
    study._storage.set_trial_user_attr(study.trials[1]._trial_id, "outcome", outcome)
    result = search(make_plan(space, study={"sampler": "random", "trials": 2}))
    assert len(study.trials) == 2
    assert (result.best, result.values) == (1, [0.5])


def test_a_study_that_somebody_drives_is_refused(make_plan: MakePlan, search: Search) -> None:
    plan = make_plan({"optimizer.lr": [1e-2]}, study={"sampler": "grid"})
    search(plan)
    import socket

    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        sign = {"host": socket.gethostname(), "pid": sleeper.pid, "beat": time.time(), "released": False}
        open_study().set_user_attr("driver", sign)
        with pytest.raises(TrackingError, match=rf"study.name s is run by process {sleeper.pid} on .*--join"):
            search(plan)
    finally:
        sleeper.send_signal(signal.SIGKILL)
        sleeper.wait()
    search(plan)


def test_joining_a_study_that_is_not_there_is_one_line(workplace: Path) -> None:
    process = elman("search", "--join", "nowhere", "--storage", "sqlite:///mlruns/search.db")
    _, err = process.communicate(timeout=60)
    [line] = [line for line in err.splitlines() if line.startswith("elman:")]
    assert process.returncode == 2
    assert "--join nowhere: mlruns/search.db does not exist" in line


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://u:secret@127.0.0.1:1/x", "cannot be used"),
        ("mongodb://somewhere", "is no storage"),
        ("grpc://nowhere", "no proxy's address"),
        ("grpc://127.0.0.1:1", "cannot be used"),
    ],
)
def test_a_storage_out_of_reach_is_one_line_without_its_password(workplace: Path, url: str, said: str) -> None:
    with pytest.raises(TrackingError) as caught:
        open_storage(url)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_journal_with_a_torn_last_line_is_mended(workplace: Path) -> None:
    path = workplace / "study.journal"
    said: list[str] = []
    study = optuna.create_study(study_name="s", storage=open_storage(f"journal:{path}", said.append))
    study.enqueue_trial({"x": 1.0})
    assert said == []
    with path.open("ab") as file:
        file.write(b'{"op_code": 4, "work')
    again = optuna.load_study(study_name="s", storage=open_storage(f"journal:{path}", said.append))
    again.enqueue_trial({"x": 2.0})
    assert len(optuna.load_study(study_name="s", storage=open_storage(f"journal:{path}")).trials) == 2
    assert len(said) == 1
    assert "torn" in said[0]


def test_a_journal_keeps_a_study(make_plan: MakePlan, search: Search, workplace: Path) -> None:
    url = f"journal:{workplace / 'study.journal'}"
    space = {"optimizer.lr": {"low": 1e-3, "high": 1e-1, "log": True}}
    search(make_plan(space, study={"sampler": "random", "trials": 1}, search={"storage": url}))
    result = search(make_plan(space, study={"sampler": "random", "trials": 2}, search={"storage": url}))
    assert result.trials["complete"] == 2
    assert len(optuna.load_study(study_name="s", storage=open_storage(url)).trials) == 2


@pytest.mark.slow
def test_a_study_behind_optuna_s_proxy(make_plan: MakePlan, search: Search, workplace: Path) -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from optuna.storages import RDBStorage, run_grpc_proxy_server\n"
        "run_grpc_proxy_server(RDBStorage('sqlite:///proxy.db'), host='127.0.0.1', port=13987)\n"
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = "grpc://127.0.0.1:13987"
        space = {"optimizer.lr": {"low": 1e-3, "high": 1e-1, "log": True}}
        result = search(make_plan(space, study={"sampler": "random", "trials": 2}, search={"storage": url}))
        assert result.trials["complete"] == 2
    finally:
        server.kill()
        server.wait()
