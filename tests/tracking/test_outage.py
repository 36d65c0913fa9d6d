"""Tracking outages: the training goes on as if there were none, and nothing is lost or doubled.

A real MLflow server, on SQLite and on PostgreSQL, stands behind a proxy that fails on request.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elman.cli import main
from elman.config.schema import ExperimentConfig, TrackingConfig
from elman.tracking import sender
from elman.tracking.local import local_runs, outboxes
from elman.tracking.outbox import Outbox
from elman.tracking.store import RunStore
from elman.training.experiment import RunResult, run_experiment
from elman.training.lock import is_interrupted
from elman.training.progress import Silence
from outage_support import Proxy, Server, holdings, postgres_server
from support import make_text, small_disk_at, tiny


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with ExitStack() as held:
        if request.param == "sqlite":
            backend = f"sqlite:///{folder / 'mlflow.db'}"
        else:
            backend = held.enter_context(postgres_server()).get_uri().replace("postgresql://", "postgresql+psycopg://")
        made = Server(backend, folder)
        held.callback(made.stop)
        made.start()
        yield made


on_sqlite = pytest.mark.parametrize("server", ["sqlite"], indirect=True)


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    made = Proxy(server.port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    yield made
    made.close()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(make_text(2000), encoding="utf-8")
    monkeypatch.setattr(sender, "SEND_SECONDS", 0.02)
    monkeypatch.setattr(sender, "LONGEST_PAUSE", 0.2)
    monkeypatch.setattr(sender, "STALL_SECONDS", 1.0)
    monkeypatch.setattr("elman.tracking.store.STALL_SECONDS", 1.0)
    monkeypatch.setattr("elman.tracking.store.START_SECONDS", 1.0)
    return tmp_path


class Acting(Silence):
    """Does something at some of the steps that it is told of; the steps are slow enough for a sender to fail."""

    def __init__(self, acts: dict[int, Any], pause: float = 0.01) -> None:
        self._acts, self._step, self._pause = acts, 0, pause
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, *arguments: Any) -> None:
        self._step += 1
        self._acts.get(self._step, lambda: None)()
        time.sleep(self._pause)


def configuration(name: str = "tiny", **settings: Any) -> ExperimentConfig:
    config = tiny("text.txt", trainer__max_steps=40, trainer__validate_every_steps=20, **settings)
    return replace(config, name=name)


def train(acts: dict[int, Any] | None = None, config: ExperimentConfig | None = None) -> RunResult:
    return run_experiment(config or configuration(), reporter=Acting(acts or {}))


def undisturbed(server: Server) -> dict[str, Any]:
    """What a run on this server comes to; one training serves all tests."""
    if server.peace is None:
        run_id = train().run_id
        assert main(["sync"]) == 0  # on a busy machine the server may have been too slow for the command's end
        store, run_id = found(run_id)
        server.peace = holdings(store, run_id)
    return copy.deepcopy(server.peace)


def found(reference: str) -> tuple[RunStore, str]:
    store = RunStore(TrackingConfig())
    return store, store.find_run(reference).id


def runs_named(store: RunStore, mark: str) -> int:
    return len(store.runs(filter_string=f"tags.`{sender.MARK}` = '{mark}'"))


def test_failures_of_every_kind_in_the_middle_change_neither_weights_nor_what_is_recorded(
    server: Server, proxy: Proxy, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = undisturbed(server)
    store = RunStore(TrackingConfig())
    assert expected["status"] == "FINISHED"
    assert "checkpoints/best.ckpt" in expected["artifacts"]
    assert len(expected["rows"]["train/loss"]) == 40

    def to(mode: str) -> Any:
        return lambda: setattr(proxy, "mode", mode)

    disturbed = train({5: to("500"), 12: to("drop"), 19: to("lost"), 26: to("500"), 33: to("pass")})
    assert proxy.failed > 3
    assert "it waits in" in caplog.text
    assert holdings(store, disturbed.run_id) == expected
    assert not outboxes()
    assert disturbed.model_uri is not None


def test_with_the_server_down_from_start_to_end_sync_delivers_everything_once(
    server: Server,
    proxy: Proxy,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = undisturbed(server)
    proxy.mode = "drop"
    watcher = Acting({})
    offline = run_experiment(configuration(tracking__register="bard"), reporter=watcher)
    assert any("waits in" in note for note in watcher.notes)
    assert "records of run" in caplog.text
    assert (offline.model_uri, offline.registered) == (None, None)
    assert main(["sync"]) == 2
    assert "wait still" in capsys.readouterr().err
    proxy.mode = "lost"  # what the server does, nobody hears of
    assert main(["sync"]) == 2
    proxy.mode = "pass"
    capsys.readouterr()
    assert main(["sync"]) == 0
    assert "records delivered" in capsys.readouterr().out
    store, run_id = found(offline.run_id)
    assert runs_named(store, offline.run_id) == 1
    late = holdings(store, run_id)
    registered = store.client.get_registered_model("bard").aliases
    assert registered == {"champion": "1"}
    for part in ("tags", "artifacts", "params"):  # of the registration, and of the settings that it changes
        for one in (late, expected):
            one[part] = {k: v for k, v in one[part].items()
                         if k not in ("tracking.register", "config.signature", "config.yaml")
                         and not k.startswith("checkpoints/")}  # fmt: skip
    assert late == expected
    assert main(["sync"]) == 0
    assert "Nothing waits" in capsys.readouterr().out
    assert holdings(store, run_id)["rows"] == expected["rows"]
    store.client.delete_registered_model("bard")


def test_a_sync_that_is_killed_again_and_again_makes_neither_gap_nor_double(
    server: Server, proxy: Proxy, place: Path
) -> None:
    expected = undisturbed(server)
    proxy.mode = "drop"
    offline = train()
    proxy.mode = "pass"
    code = textwrap.dedent("""
        import os, signal
        from elman.cli import main
        from elman.tracking.outbox import Outbox
        mark, count = Outbox.mark, 0
        def counted(self, *arguments, **named):
            global count
            count += 1
            if count > 1:
                os.kill(os.getpid(), signal.SIGKILL)  # the store has it, and we do not know
            return mark(self, *arguments, **named)
        Outbox.mark = counted
        main(["sync"])
    """)
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    assert main(["sync"]) == 0
    store, run_id = found(offline.run_id)
    assert runs_named(store, offline.run_id) == 1
    assert holdings(store, run_id) == expected


@on_sqlite
def test_an_error_of_the_training_in_an_outage_is_shown_as_itself(proxy: Proxy, place: Path) -> None:
    def fail() -> None:
        raise ValueError("out of luck")

    with pytest.raises(ValueError, match="out of luck"):
        train({2: lambda: setattr(proxy, "mode", "drop"), 9: fail})
    proxy.mode = "pass"
    assert len(outboxes()) == 1
    assert main(["sync"]) == 0
    [run] = RunStore(TrackingConfig()).runs(limit=1)
    assert (run.status, run.tags["error"]) == ("FAILED", "out of luck")


@pytest.mark.parametrize("server", ["postgresql"], indirect=True)
def test_a_server_that_is_stopped_and_started_again_gets_everything(
    server: Server, proxy: Proxy, place: Path
) -> None:
    expected = undisturbed(server)
    disturbed = train({10: server.stop})
    assert len(outboxes()) == 1
    server.start()
    assert main(["sync"]) == 0
    store, run_id = found(disturbed.run_id)
    assert holdings(store, run_id) == expected


@on_sqlite
def test_answers_after_six_seconds_hold_nothing_up(proxy: Proxy, place: Path) -> None:
    slow = train({3: lambda: setattr(proxy, "mode", "slow")})
    [folder] = outboxes()
    proxy.mode = "pass"
    assert main(["sync"]) == 0
    assert found(slow.run_id)[0].find_run(slow.run_id).mark == folder.name
    assert not outboxes()


@on_sqlite
def test_one_deadline_covers_every_answer_that_the_start_waits_for(
    proxy: Proxy, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elman.tracking.store.START_SECONDS", 2.0)
    proxy.mode, proxy.delay = "slow", 0.7  # three answers, each of them in time, and the last one too late
    with RunStore(TrackingConfig(), may_be_away=True).start_run(ExperimentConfig(), "r", {}) as run:
        assert "no answer within" in (run.store.away or "")
        proxy.mode = "pass"
    assert main(["sync"]) == 0
    store = RunStore(TrackingConfig())
    assert runs_named(store, store.find_run(run.id).mark) == 1


# Killed, and gone on with, while the store is away -----------------------------------------------


@on_sqlite
@pytest.mark.parametrize("at_first", ["pass", "drop"])
def test_a_run_is_gone_on_with_in_an_outage_whether_the_store_knows_it_or_not(
    server: Server, proxy: Proxy, place: Path, at_first: str
) -> None:
    expected = undisturbed(server)
    proxy.mode = at_first
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r}); sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from elman.tracking import sender, store
sender.SEND_SECONDS, store.START_SECONDS = 0.02, {1.0 if at_first == "drop" else 60.0}
from test_outage import train
train({{27: lambda: os.kill(os.getpid(), signal.SIGKILL)}})
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    proxy.mode = "drop"
    [run] = local_runs()
    assert is_interrupted(run)
    assert run.is_unheard == (at_first == "drop")
    result = run_experiment(configuration(), reporter=Acting({}), go_on=True)
    assert result.run_id == run.id
    proxy.mode = "pass"
    assert main(["sync"]) == 0
    store, run_id = found(run.id)
    late = holdings(store, run_id)
    assert late["tags"].pop("resume.1") == "from step 20"
    assert late["tags"].pop("resume.count") == "1"
    assert late == expected
    assert len(store.runs(filter_string=f"tags.`{sender.MARK}` = '{run.mark}'")) == 1


@on_sqlite
def test_an_outage_leaves_only_what_is_here_to_go_on_with(
    proxy: Proxy, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.mode = "drop"
    assert main(["train", "--resume", "0123456789ab"]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "loading" not in line]
    assert "does not answer (it closes the connection)" in line
    assert "holds no run 0123456789ab to go on with" in line
    assert not (place / "mlruns").exists()


@on_sqlite
def test_a_double_would_be_noticed(proxy: Proxy, place: Path) -> None:
    store = RunStore(TrackingConfig())
    with store.start_run(ExperimentConfig(), "r", {}) as run:
        run.metrics.add({"loss": 1.0}, 4)
    before = holdings(store, run.id)["rows"]
    store.client.log_metric(run.id, "loss", 1.0, step=4)
    assert holdings(store, run.id)["rows"]["loss"] == before["loss"] * 2


# The outbox itself -----------------------------------------------------------------------------


def test_a_password_in_the_address_is_not_kept_and_sync_asks_for_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:canary@127.0.0.1:9")
    train()
    [folder] = outboxes()
    assert not [path for path in folder.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(["sync"]) == 2
    said = capsys.readouterr().err
    assert "wants a password" in said
    assert len(said.strip().splitlines()) == 1
    assert [path.name for path in outboxes()] == [folder.name]


def test_a_run_that_is_being_trained_is_left_to_its_process(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunStore().start_run(ExperimentConfig(), "r", {}):
        [folder] = outboxes()
        assert main(["sync", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["busy"] == [folder.name]


def test_the_first_value_of_a_metric_at_a_step_stands_and_survives_a_kill(tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import os, pathlib, signal
        from elman.tracking.outbox import Outbox
        box = Outbox(pathlib.Path({str(tmp_path)!r}) / "box")
        box.add({{"a": 1.0, "b": float("nan")}}, 1)
        box.flush()
        box.put("tag", "colour", "blue")
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    box = Outbox(tmp_path / "box")
    box.add({"a": 2.0}, 1)
    box.add({"a": 3.0}, 2)
    assert box.history("a") == [(1, 1.0), (2, 3.0)]
    assert box.waiting() == 4
    assert box.records(9)[0].content == "blue"
    assert box.close(ended=True) == 0
    assert (tmp_path / "box").exists()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def _scribble(path: Path) -> None:
    """On the pages of the middle."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(range(256)) * 32 + data[len(data) // 2 + 256 * 32 :])


def _replace(path: Path) -> None:
    path.write_bytes(b"no database" * 900)


@pytest.mark.parametrize(("damage", "least"), [(_cut, 0), (_scribble, 50), (_replace, 0)])
def test_a_damaged_outbox_is_set_aside_with_a_warning_and_what_can_be_read_is_kept(
    tmp_path: Path, damage: Callable[[Path], None], least: int, caplog: pytest.LogCaptureFixture
) -> None:
    box = Outbox(tmp_path / "box")
    box.set_fact("run", "0123")
    for step in range(1000):
        box.add({"train/loss": step / 7}, step)
    box.close(ended=False)
    damage(tmp_path / "box" / "outbox.db")
    damaged = (tmp_path / "box" / "outbox.db").read_bytes()
    caplog.clear()
    box = Outbox(tmp_path / "box")
    [message] = caplog.messages
    assert "is damaged" in message
    assert (tmp_path / "box" / "damaged-1-outbox.db").read_bytes() == damaged
    kept = box.history("train/loss")
    assert least <= len(kept) < 1000
    assert all(value == step / 7 for step, value in kept)
    box.add({"train/loss": 1.0}, 1000)
    assert box.history("train/loss") == [*kept, (1000, 1.0)]
    box.close(ended=False)
    caplog.clear()
    Outbox(tmp_path / "box").close(ended=False)
    assert caplog.messages == []


@pytest.fixture
def small_disk(workplace: Path) -> Iterator[Path]:
    with small_disk_at(workplace / "mlruns" / "outbox") as folder:
        yield folder


def test_a_full_disk_under_the_outbox_is_said_once_and_the_store_gets_everything(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (small_disk / "filler").write_bytes(bytes(2**21 - 150_000))
    Path("text.txt").write_text(make_text(2000), encoding="utf-8")
    result = train()
    store = RunStore()
    assert store.find_run(result.run_id).status == "FINISHED"
    assert [step for step, _ in store.history(result.run_id, "train/loss")] == list(range(1, 41))
    assert caplog.text.count("cannot be written") == 1
    assert "lost" not in caplog.text


def test_with_disk_full_and_store_away_the_training_goes_on_and_losses_are_counted(
    small_disk: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elman.tracking.store.STALL_SECONDS", 0.2)
    (small_disk / "filler").write_bytes(bytes(2**21 - 8192))
    Path("text.txt").write_text(make_text(2000), encoding="utf-8")
    result = train(config=configuration(tracking__uri="http://127.0.0.1:9"))
    assert result.metrics["val/loss"] > 0
    assert caplog.text.count("cannot be written") == 1
    assert caplog.text.count("are lost") == 1


def test_eight_trainings_at_once_on_a_fresh_store_lose_nothing(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(make_text(2000), encoding="utf-8")
    code = textwrap.dedent("""
        import os, sys
        from support import tiny
        import elman.training.experiment as experiment, elman.tracking.store as store
        store.warm()
        config = tiny("text.txt", trainer__max_steps=25, trainer__sample_length=0)
        from elman.text.prepare import prepare
        prepare(config.corpus)
        children = []
        for seed in range(8):
            child = os.fork()
            if child == 0:
                from elman.config.tree import override
                try:
                    experiment.run_experiment(override(config, {"seed": seed}))
                except BaseException:
                    import traceback
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
    """)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "mlruns" / "mlflow.db") as database:
        assert database.execute("SELECT status, count(*) FROM runs GROUP BY status").fetchall() == [("FINISHED", 8)]
        steps = database.execute("SELECT count(*) FROM metrics WHERE key = 'train/loss' GROUP BY run_uuid").fetchall()
    assert steps == [(25,)] * 8
    assert not (tmp_path / "mlruns" / "outbox").exists() or not list((tmp_path / "mlruns" / "outbox").iterdir())
