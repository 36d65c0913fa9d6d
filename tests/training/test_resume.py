from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

import torture
from elman.cli import main
from elman.config.schema import ExperimentConfig
from elman.errors import ConfigError, DataError, DivergenceError, ModelError, TrackingError
from elman.tasks.schedule import Schedule
from elman.tracking.store import RunStore, StoppedError
from elman.training.checkpoint import States, is_sound, put_back_best, read_sums, write_whole
from elman.training.experiment import resume_experiment, run_experiment
from elman.training.keeper import Keeper, random_state, restore_random_state
from elman.training.lock import FolderLock, checkpoint_folder, is_interrupted
from elman.training.progress import Silence
from support import make_text, small_disk_at, tiny


@pytest.fixture
def store(workplace: Path) -> RunStore:
    return RunStore()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[torture.Bench]:
    bench = torture.Bench(tmp_path_factory.mktemp("bench"), empty_database)
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def peace(bench: torture.Bench) -> Any:
    """What each case comes to when nobody disturbs it."""
    known: dict[str, dict[str, Any]] = {}

    def outcome(case: str) -> dict[str, Any]:
        if case not in known:
            known[case] = bench.finish(bench.place(), case)
        return known[case]

    return outcome


def states(work: Path) -> list[Path]:
    return sorted((work / "mlruns" / "checkpoints").glob("*/0*"))


class Stopper(Silence):
    """Sends signals at the n-th logged step."""

    def __init__(self, step: int, *numbers: int) -> None:
        self._left, self._numbers = step, numbers

    def step(self, progress: float, seconds_left: float, metrics: Any) -> None:
        self._left -= 1
        if self._left == 0:
            for number in self._numbers:
                os.kill(os.getpid(), number)


# To the bit ------------------------------------------------------------------------------

KILLS = list(zip(cycle(torture.CASES), torture.NASTY, strict=False))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kill"), KILLS, ids=lambda value: str(value)[-40:])
def test_a_run_killed_at_the_worst_moment_ends_as_if_it_had_not_been(
    bench: torture.Bench, peace: Any, case: str, kill: torture.Kill
) -> None:
    work = bench.place()
    assert bench.run(work, case, kills=[kill]) in (-signal.SIGKILL, 0)
    found = torture.outcome(work) if torture.is_finished(work) else bench.finish(work, case)
    assert torture.differences(peace(case), found) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_again_and_again_at_random_ends_as_if_it_had_not_been(
    bench: torture.Bench, peace: Any, seed: int
) -> None:
    work, case = bench.place(), "lstm"
    expected = peace(case)
    for index in range(3):
        seconds = 0.25 + 0.3 * ((7 * seed + 3 * index) % 5)
        if not torture.is_finished(work):
            bench.run(work, case, seconds=seconds)
    found = torture.outcome(work) if torture.is_finished(work) else bench.finish(work, case)
    assert torture.differences(expected, found) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [(torture.STEP, 6, "after"), (torture.STEP, 13, "before"), (torture.VALIDATION, 4, "before")],
    ids=["before-its-validation", "while-gradients-gather", "in-its-validation"],
)
def test_a_run_stopped_by_sigterm_ends_as_if_it_had_not_been(
    bench: torture.Bench, peace: Any, place: torture.Kill
) -> None:
    work = bench.place()
    assert bench.run(work, "lstm", kills=[place], signal="SIGTERM") == 143
    assert torture.status_of(work) == "KILLED"
    assert not states(work)  # the run has them
    assert torture.differences(peace("lstm"), bench.finish(work, "lstm")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        {"forget": ["loops.fit_loop.state_dict.combined_loader"],
         "instead": {"loops.fit_loop.state_dict.combined_loader": []}},
        {"forget": ["carry"], "instead": {}},
        {"no_random": True},
    ],
    ids=["loader", "carry", "generators"],
)  # fmt: skip
def test_the_comparison_notices_what_a_checkpoint_lacks(bench: torture.Bench, peace: Any, loss: dict[str, Any]) -> None:
    work = bench.place()
    assert bench.run(work, "lstm", kills=[(torture.STEP, 14, "after")]) == -signal.SIGKILL
    try:
        found = bench.finish(work, "lstm", **loss)
    except AssertionError:
        return  # a loader at its start ends in another place altogether
    assert torture.differences(peace("lstm"), found)


@pytest.mark.slow
def test_the_cases_average_weights_and_lose_their_patience(peace: Any) -> None:
    assert peace("lstm")["last"]["averaged"] is not None
    assert peace("patient")["last"]["callbacks"]["Limits"]["waited"] == 3
    assert {key for key, _ in peace("lstm")["places"]} >= {"val/loss", "train/loss", "optimizer/lr", "best/loss"}


# What is broken --------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.slow
def test_a_damaged_state_is_passed_over_and_with_every_one_damaged_nothing_begins(
    bench: torture.Bench, peace: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = bench.place()
    assert bench.run(work, "lstm", kills=[(torture.STEP, 30, "after")]) == -signal.SIGKILL
    saved = shutil.copytree(work, work.with_name("saved"))
    three = states(work)
    assert len(three) == 3
    for count, (damage, state) in enumerate(zip((_flip, _truncate), reversed(three), strict=False), 1):
        damage(state / "state.ckpt")
        again = shutil.copytree(work, work.with_name(f"again-{count}"))
        _move_artifacts(work, again)
        assert torture.differences(peace("lstm"), bench.finish(again, "lstm")) == []
        assert (again / "log").read_text().count("warning: damaged, and passed over") == 1
    _empty(three[0] / "state.ckpt")
    monkeypatch.chdir(work)
    assert main(["train", "--resume", str(torture.begun_run(work))]) == 1
    error = capsys.readouterr().err.splitlines()
    assert [line for line in error if line.startswith("elman:")] == error[-1:]
    assert all(str(state / "state.ckpt") in error[-1] for state in three)
    for state in three:
        shutil.rmtree(state)
    assert main(["train", "--resume", str(torture.begun_run(work))]) == 1
    assert "every checkpoint" in (error := capsys.readouterr().err.splitlines())[-1]
    assert str(three[0].parent) in error[-1]
    assert torture.status_of(work) == "RUNNING"
    assert len(states(saved)) == 3


def test_a_pipe_where_a_state_should_be_is_damage_and_nobody_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  state.ckpt\n")
    os.mkfifo(tmp_path / "state.ckpt")
    assert not is_sound(tmp_path)


def _move_artifacts(old: Path, new: Path) -> None:
    """A store remembers absolute places."""
    import sqlite3

    database = sqlite3.connect(new / "mlruns" / "mlflow.db")
    for table, column in (("runs", "artifact_uri"), ("experiments", "artifact_location")):
        database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (str(old), str(new)))
    database.commit()
    database.close()


@pytest.mark.slow
@pytest.mark.parametrize("calls", [(1, 9), (8, 30)])
def test_a_disk_that_is_full_for_a_while_changes_nothing_and_is_said_once(
    bench: torture.Bench, peace: Any, calls: tuple[int, int]
) -> None:
    work = bench.place()
    assert torture.differences(peace("lstm"), bench.finish(work, "lstm", full=calls)) == []
    assert (work / "log").read_text().count("warning: ") == 1


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_the_last_good_state_to_resume_from(bench: torture.Bench, peace: Any) -> None:
    work = bench.place()
    with small_disk_at(work / "mlruns" / "checkpoints") as folder:
        (folder / "filler").write_bytes(bytes(2**21 - 350_000))
        assert bench.run(work, "lstm", kills=[(torture.STEP, 45, "after")]) == -signal.SIGKILL
        assert (work / "log").read_text().count("No space left on device") == 1
        assert not list(folder.rglob("*.partial*"))
        (folder / "filler").unlink()
        assert torture.differences(peace("lstm"), bench.finish(work, "lstm")) == []


def test_a_new_best_leaves_the_states_before_it_as_they_were(tmp_path: Path) -> None:
    states = States(tmp_path)
    best = tmp_path / "best.ckpt"

    def write(path: Path, data: bytes) -> str:
        return write_whole(path, lambda file: file.write(data))

    old = states.write(lambda path: write(path, b"state"), (best, write(best, b"good")))
    assert put_back_best(old, tmp_path) == (best, read_sums(old)["best.ckpt"])
    new = states.write(lambda path: write(path, b"later state"), (best, write(best, b"better")))
    assert is_sound(old)
    assert is_sound(new)
    assert put_back_best(old, tmp_path) is not None
    assert best.read_bytes() == b"good"
    assert (new / "best.ckpt").read_bytes() == b"better"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000001", "000002", "best.ckpt"]


def test_divergence_overwrites_neither_the_best_nor_the_last_good_state(
    store: RunStore, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(self: Schedule, *, step: int, progress: float, epoch: int) -> float:
        return 1e-3 if step < 5 else 1e38

    monkeypatch.setattr(Schedule, "factor", explode)
    config = tiny(
        text_file, optimizer__name="sgd", optimizer__lr=1.0, optimizer__max_grad_norm=None,
        trainer__validate_every_steps=2, trainer__checkpoint_every_steps=1,
    )  # fmt: skip
    with pytest.raises(DivergenceError):
        run_experiment(config, store)
    [run] = store.runs()
    last, best = (
        torch.load(store.download(run.id, f"checkpoints/{name}.ckpt", tmp_path), weights_only=True)
        for name in ("last", "best")
    )
    assert (last["global_step"], best["global_step"]) == (5, 4)
    assert all(value.abs().max() < 1e3 for value in last["state_dict"].values())


# Being told to stop ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_with_its_exit_code_and_the_command_that_resumes(
    workplace: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr("elman.training.progress.terminal_reporter", lambda: Stopper(3, number))
    config = tiny(text_file)
    (workplace / "config.yaml").write_text(_yaml(config))
    assert main(["train", "--config", "config.yaml"]) == (130 if number == signal.SIGINT else 143)
    store = RunStore()
    [run] = store.runs()
    error = capsys.readouterr().err
    assert f"`elman train --resume {run.id}` goes on with it" in error
    assert run.status == "KILLED"

    monkeypatch.setattr("elman.training.progress.terminal_reporter", Silence)
    assert main(["train", "--resume", run.id, "--config", "config.yaml", "--trainer.max_steps", "9", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["run_id"] == run.id
    [run] = store.runs()
    assert (run.status, run.tags["resume.count"]) == ("FINISHED", "1")
    assert run.tags["resume.1"] == "from step 3; trainer.max_steps 20 → 9"
    assert [step for step, _ in store.history(run.id, "train/loss")] == list(range(1, 10))


def _yaml(config: ExperimentConfig) -> str:
    from elman.config.load import dump_yaml

    return dump_yaml(config)


def test_a_second_ctrl_c_leaves_at_once_and_the_state_before_it_stands(store: RunStore, text_file: Path) -> None:
    config = tiny(text_file, trainer__checkpoint_every_steps=2)
    with pytest.raises(StoppedError):
        run_experiment(config, store, Stopper(5, signal.SIGINT, signal.SIGINT))
    [run] = store.runs()
    assert run.status == "KILLED"
    assert [path.name for path in states(Path.cwd())] == ["000001", "000002"]
    result, _ = resume_experiment(run.id, store=store)
    assert result.run_id == run.id
    assert [step for step, _ in store.history(run.id, "train/loss")] == list(range(1, 21))
    assert not checkpoint_folder(run.id).exists()


def test_checkpoints_come_by_steps_and_by_minutes_and_three_are_kept(
    store: RunStore, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    write = Keeper._write

    def noted(self: Keeper, trainer: Any, states: Any) -> None:
        write(self, trainer, states)
        steps.append(trainer.global_step)
        assert len(list(states.folder.glob("0*"))) == min(3, len(steps))

    monkeypatch.setattr(Keeper, "_write", noted)
    run_experiment(tiny(text_file, trainer__checkpoint_every_steps=6), store)
    assert steps == [6, 12, 18, 20]
    steps.clear()
    run_experiment(tiny(text_file, trainer__max_steps=5, trainer__checkpoint_minutes=1e-9), store)
    assert steps == [1, 2, 3, 4, 5]
    steps.clear()
    run_experiment(tiny(text_file, trainer__max_steps=5, trainer__checkpoint_minutes=None), store)
    assert steps == [5]


# Who may resume what ---------------------------------------------------------------------


@pytest.fixture
def stopped(store: RunStore, text_file: Path) -> str:
    with pytest.raises(StoppedError) as stop:
        run_experiment(tiny(text_file), store, Stopper(3, signal.SIGTERM))
    assert stop.value.run_id is not None
    return stop.value.run_id


def test_two_cannot_resume_one_run(store: RunStore, stopped: str) -> None:
    with FolderLock(checkpoint_folder(stopped)):
        with pytest.raises(TrackingError, match=r"^Run \w+ is being trained by another process \(process \d+ on "):
            resume_experiment(stopped, store=store)
        assert store.find_run(stopped).status == "KILLED"
    resume_experiment(stopped, store=store)
    assert store.find_run(stopped).status == "FINISHED"


def test_a_run_whose_process_is_gone_is_interrupted_and_one_that_trains_is_not(store: RunStore, stopped: str) -> None:
    store.client.update_run(stopped, status="RUNNING")
    assert not is_interrupted(store.find_run(stopped))  # of another machine, for all that is known
    with FolderLock(checkpoint_folder(stopped)):
        assert not is_interrupted(store.find_run(stopped))
    assert is_interrupted(store.find_run(stopped))
    store.client.update_run(stopped, status="FINISHED")
    assert not is_interrupted(store.find_run(stopped))


def test_a_run_killed_before_it_held_its_folder_is_interrupted_and_names_its_command(
    bench: torture.Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = bench.place()
    assert bench.run(work, "gru", kills=[(torture.LOCK, 1, "before")]) == -signal.SIGKILL
    monkeypatch.chdir(work)
    assert main(["runs"]) == 0
    run_id = torture.begun_run(work)
    assert f"elman train --resume {run_id}" in capsys.readouterr().out
    bench.finish(work, "gru", resume=run_id)
    assert torture.begun_run(work) == run_id


def test_the_same_command_goes_on_with_what_was_stopped_and_with_nothing_else(
    store: RunStore, stopped: str, text_file: Path
) -> None:
    config = tiny(text_file)
    assert run_experiment(tiny(text_file, model__hidden_size=17), store, go_on=True).run_id != stopped
    assert run_experiment(config, store, go_on=True).run_id == stopped
    assert store.find_run(stopped).tags["resume.1"] == "from step 3"
    again = run_experiment(config, store, go_on=True)
    assert again.run_id != stopped  # that one is finished
    with pytest.raises(StoppedError) as stop:
        run_experiment(config, store, Stopper(3, signal.SIGTERM))
    text_file.write_text(make_text(901, seed=9), encoding="utf-8")
    assert run_experiment(config, store, go_on=True).run_id not in (stopped, again.run_id, stop.value.run_id)


def test_the_same_command_takes_over_where_a_run_is_tracked(store: RunStore, stopped: str, text_file: Path) -> None:
    again = run_experiment(tiny(text_file, tracking__register="bard"), store, go_on=True)
    assert (again.run_id, again.registered) == (stopped, "models:/bard/1 (champion)")


def test_what_shapes_the_training_cannot_change_in_its_middle(store: RunStore, stopped: str) -> None:
    for changes, says in (
        ({"optimizer.lr": 0.5}, r"^optimizer\.lr is 0\.003 in run \w+ and cannot become 0\.5 in the middle of it"),
        ({"model.hidden_size": 32}, r"^model\.hidden_size is 16 in run"),
        ({"data.batch_size": 4}, r"^data\.batch_size is 8 in run"),
        ({"seed": 2}, r"^seed is 1 in run"),
        ({"trainer.max_steps": -1}, r"^trainer\.max_steps must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=says):
            resume_experiment(stopped, changes, store)
        assert store.find_run(stopped).status == "KILLED"
        assert not checkpoint_folder(stopped).exists()


def test_a_changed_corpus_vocabulary_or_architecture_is_refused(
    store: RunStore, stopped: str, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import elman.training.experiment as experiment

    build = experiment.build_language_model
    monkeypatch.setattr(
        experiment, "build_language_model",
        lambda config, tokenizer: build(tiny(text_file, model__num_layers=2), tokenizer),
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"^The architecture is not the one that run \w+ began with"):
        resume_experiment(stopped, store=store)
    monkeypatch.undo()
    monkeypatch.chdir(Path(store.uri.removeprefix("sqlite:///")).parent.parent)
    text_file.write_text(make_text(4000, seed=9), encoding="utf-8")
    with pytest.raises(DataError, match=r"the text is not the one that run \w+ began with"):
        resume_experiment(stopped, store=store)
    assert store.find_run(stopped).status == "KILLED"


def test_a_finished_run_wants_more_to_do_and_then_goes_on(store: RunStore, text_file: Path) -> None:
    first = run_experiment(tiny(text_file, trainer__max_steps=6), store)
    with pytest.raises(ConfigError, match=r"is finished: give --trainer\.max_epochs"):
        resume_experiment(first.run_id, store=store)
    result, config = resume_experiment(first.run_id, {"trainer.max_steps": 10, "trainer.log_every_steps": 2}, store)
    assert (result.run_id, config.trainer.max_steps) == (first.run_id, 10)
    assert [step for step, _ in store.history(first.run_id, "train/loss")] == [1, 2, 3, 4, 5, 6, 8, 10]
    assert [step for step, _ in store.history(first.run_id, "test/loss")] == [6, 10]
    assert len(store.runs()) == 1


def test_changed_limits_survive_a_kill_before_the_next_state(
    store: RunStore, stopped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoppedError):
        resume_experiment(stopped, {"trainer.max_steps": 7}, store, Stopper(1, signal.SIGINT, signal.SIGINT))
    result, config = resume_experiment(stopped, store=store)
    assert (config.trainer.max_steps, result.ended_by) == (7, "trainer.max_steps 7 reached")


def test_there_is_no_silent_start_from_zero(store: RunStore, stopped: str) -> None:
    store.delete_artifact(stopped, "checkpoints")
    with pytest.raises(ModelError, match=r"left no checkpoint here, nor among its artifacts"):
        resume_experiment(stopped, store=store)
    store.client.update_run(stopped, status="RUNNING")
    with pytest.raises(TrackingError, match=r"is RUNNING, and not of this folder"):
        resume_experiment(stopped, store=store)
    with pytest.raises(TrackingError, match="There is no run"):
        resume_experiment("0123456789abcdef0123456789abcdef", store=store)


def test_every_generator_comes_back_as_it_was() -> None:
    import random

    import numpy as np

    state = random_state()
    drawn = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), np.random.standard_normal()
    restore_random_state(state)
    assert drawn == (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), np.random.standard_normal())


def test_what_the_store_has_is_dropped_and_what_it_never_got_is_sent(store: RunStore) -> None:
    with store.open_run("rows", {}, {}) as run:
        run.metrics.add({"loss": 1.0, "rate": 1.0}, 1)
    with store.open_run("rows", {}, {}, resume=store.find_run(run.id)) as again:
        assert again.history("loss") == [(1, 1.0)]
        again.metrics.add({"rate": 9.0}, 1)
        for step in (1, 2, 3):
            again.metrics.add({"loss": float(step)}, step)
    assert store.history(run.id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert store.history(run.id, "rate") == [(1, 1.0)]
