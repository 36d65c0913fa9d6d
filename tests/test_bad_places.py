"""Where things are recorded, and which models are named: what cannot be used is one line, and stays as it was."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from elman.cli import main
from elman.config.tree import override
from elman.tracking.store import RunStore
from elman.training.experiment import run_experiment
from support import Refuse, files, free_port, make_text, put_store, small_disk_at, tiny

COMMANDS = {
    "train": ("train", "--config", "c.yaml"), "search": ("search", "--config", "s.yaml"),
    "compare": ("compare", "--tournament", "t.yaml"), "ui": ("ui", "--port", "{port}"),
    "dashboard": ("dashboard", "--port", "{port}"),
}  # fmt: skip


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def written(refuse: Refuse) -> Path:
    """A working directory with a file for each command, and a text."""
    here = Path.cwd()
    text = here / "text.txt"
    text.write_text(make_text(1500))
    whole = f"corpus.name: {text}\ntrainer.max_epochs: null\ntrainer.max_steps: 2\ndata.sequence_length: 8\n"
    (here / "c.yaml").write_text(whole)
    (here / "s.yaml").write_text("base: c.yaml\nstudy: {trials: 1}\nspace: {model.hidden_size: [8, 16]}\n")
    (here / "t.yaml").write_text(
        "base: c.yaml\ncontest: {parameters: 3000, trials: 0}\ncontestants: {a: {}, b: {model.cell: gru}}\n"
    )
    return here


@pytest.mark.parametrize("command", COMMANDS)
def test_a_store_that_cannot_be_made_is_one_line(written: Path, refuse: Refuse, port: int, command: str) -> None:
    (written / "mlruns").write_text("no folder")
    words = [word.format(port=port) for word in COMMANDS[command]]
    refuse(*words, names=("mlruns",))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_store_is_one_line(written: Path, refuse: Refuse, port: int, command: str) -> None:
    with small_disk_at(written / "mlruns") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        words = [word.format(port=port) for word in COMMANDS[command]]
        refuse(*words, names=("mlruns", "Read-only file system"))


@pytest.mark.parametrize("has_database", [False, True])
@pytest.mark.parametrize("command", ["train", "search", "compare"])
def test_a_full_store_is_one_line(
    written: Path, refuse: Refuse, empty_database: Path, command: str, has_database: bool
) -> None:
    with small_disk_at(written / "mlruns") as disk:
        if has_database:
            shutil.copy(empty_database, disk / "mlflow.db")
        (disk / ".lock").touch()  # empty, and no matter
        (disk / ".search.lock").touch()
        size = shutil.disk_usage(disk).free
        (disk / "full").write_bytes(b"\0" * size)
        refuse(*COMMANDS[command], names=("mlruns", "full"))


@pytest.mark.parametrize("command", ["ui", "dashboard"])
def test_a_port_in_use_is_one_line_that_offers_another(refuse: Refuse, command: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        refuse(command, "--port", str(taken), names=(f"--port {taken} is in use", str(taken + 1)))


def test_looking_for_a_run_makes_no_store(refuse: Refuse) -> None:
    for words in ("generate abc", "evaluate abc", "compare abc def", "remedy abc", "doctor abc", "train --resume abc",
                  "generate models:/x@y", "generate models:/x/1"):  # fmt: skip
        refuse(*words.split(), names=())
    refuse("search", "--join", "x", "--storage", "sqlite:///there/x.db", names=("there/x.db", "--storage"))
    refuse("generate", "abc", "--tracking.uri", "sqlite:///there/x.db", names=("there/x.db",))


def test_a_store_of_a_kind_without_its_driver_is_one_line(refuse: Refuse) -> None:
    Path("mlruns").mkdir()
    Path("mlruns/.lock").touch()  # empty, and no matter
    refuse("runs", "--tracking.uri", "mysql+nodriver://127.0.0.1:9/x", names=("mysql+nodriver", "tracking.uri"))


def test_a_text_that_is_given_as_a_journal_stays_whole(tmp_path: Path, refuse: Refuse) -> None:
    text = tmp_path / "novel.txt"
    for content in ("one line without an end", "two lines\nwithout an end", '{"op'):
        text.write_text(content)
        (tmp_path / "work" / "mlruns").mkdir(exist_ok=True)
        (tmp_path / "work" / "mlruns" / ".search.lock").touch()
        if content != '{"op':  # as a journal begins
            refuse("dashboard", "--storage", f"journal:{text}", names=("novel.txt", "no journal"))
            assert text.read_text() == content


# MODEL ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> tuple[Path, str, Path]:
    """A folder with a store, the id of a stopped run in it, and its newest state."""
    folder = tmp_path_factory.mktemp("runs")
    put_store(folder, empty_database)
    (folder / "text.txt").write_text(make_text(1500))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        store = RunStore()
        result = run_experiment(tiny(folder / "text.txt", trainer__max_steps=4, trainer__validate_every_steps=2), store)
        state = store.download(result.run_id, "checkpoints/last.ckpt", folder)
    return folder, result.run_id, state


def other_vocabulary(checkpoint: dict[str, Any]) -> None:
    """One symbol for another: the same size, and another text."""
    known = json.loads(checkpoint["elman"]["tokenizer"])
    vocabulary = known["model"]["vocab"]
    vocabulary["Ш"] = vocabulary.pop("a")
    checkpoint["elman"]["tokenizer"] = json.dumps(known)


def other_architecture(checkpoint: dict[str, Any]) -> None:
    checkpoint["elman"]["architecture"]["config"]["cell"] = "gru"


def other_size(checkpoint: dict[str, Any]) -> None:
    checkpoint["elman"]["architecture"]["config"]["hidden_size"] = 200_000  # 1.3 TB, if it were made


def other_text(checkpoint: dict[str, Any]) -> None:
    checkpoint["elman"]["provenance"]["corpus_digest"] = "0" * 64


def nothing_of_ours(checkpoint: dict[str, Any]) -> None:
    del checkpoint["elman"]


CHANGES = {
    "vocabulary": (other_vocabulary, "vocabulary"), "architecture": (other_architecture, ""), "size": (other_size, ""),
    "text": (other_text, "text is not the one"), "nothing of ours": (nothing_of_ours, "not a checkpoint of elman"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_a_run_is_not_resumed_from_a_state_of_another_training(
    runs: tuple[Path, str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    kind: str,
) -> None:  # fmt: skip
    folder, run_id, state = runs
    change, words = CHANGES[kind]
    monkeypatch.chdir(folder)
    checkpoint = torch.load(state, weights_only=True)
    change(checkpoint)
    store = RunStore()
    [uri] = [store.client.get_run(run_id).info.artifact_uri]
    place = Path(uri) / "checkpoints" / "last.ckpt"
    kept = place.read_bytes()
    try:
        torch.save(checkpoint, place)
        before = files(folder)
        assert main(["train", "--resume", run_id, "--trainer.max_steps", "8"]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line != "loading libraries"]
        assert len(lines) == 1, lines
        assert words in lines[0]
        changed = [path for path, at in files(folder).items() if before.get(path) != at]
        assert changed == []
        assert store.find_run(run_id).status == "FINISHED"
    finally:
        place.write_bytes(kept)


@pytest.mark.parametrize("command", ["generate", "evaluate", "doctor"])
@pytest.mark.parametrize("kind", ["architecture", "size", "nothing of ours"])
def test_a_checkpoint_that_contradicts_itself_is_one_line(
    runs: tuple[Path, str, Path], tmp_path: Path, refuse: Refuse, command: str, kind: str
) -> None:
    checkpoint = torch.load(runs[2], weights_only=True)
    CHANGES[kind][0](checkpoint)
    torch.save(checkpoint, tmp_path / "m.ckpt")
    refuse(command, str(tmp_path / "m.ckpt"), names=("m.ckpt",))


def test_a_prompt_that_another_vocabulary_lacks_is_refused_and_a_text_is_charged_for_it(
    runs: tuple[Path, str, Path], tmp_path: Path, refuse: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(runs[2], weights_only=True)
    other_vocabulary(checkpoint)
    torch.save(checkpoint, tmp_path / "m.ckpt")
    refuse("generate", str(tmp_path / "m.ckpt"), "--prompt", "ba", names=("'a'", "--on-unknown skip"))
    scores = []
    for model in (runs[2], tmp_path / "m.ckpt"):
        assert main(["evaluate", str(model), "--corpus.name", str(runs[0] / "text.txt"), "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["metrics"])
    assert scores[1]["bits_per_byte"] > scores[0]["bits_per_byte"] + 0.1  # what it lacks is spelled, and charged


def test_a_text_of_symbols_that_a_model_lacks_is_scored_and_charged(
    runs: tuple[Path, str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text("ШЩЪ ЫЬЭ\n" * 300)
    assert main(["evaluate", str(runs[2]), "--corpus.name", str(tmp_path / "t.txt"), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert 3 < metrics["bits_per_byte"] < 100


@pytest.mark.parametrize("name", ["", "/dev/zero", "/proc/self/mem", ".", "x" * 5000, "a\0b", "../x", "models:/../x/1"])
@pytest.mark.parametrize("command", ["generate", "evaluate", "doctor"])
def test_a_model_by_a_name_that_can_be_none_is_one_line(refuse: Refuse, command: str, name: str) -> None:
    if command == "doctor" and name == "":
        return  # argparse takes an empty positional for one that is left out
    line = refuse(command, name, names=())
    assert line.isprintable()


def test_an_empty_id_names_no_run(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunStore().start_run(override(tiny("t.txt"), {}), "the only one", {}):
        pass
    for words in (["remedy", ""], ["train", "--resume", " "], ["generate", " "]):
        assert main(words) == 2
        assert "empty" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["/proc/x.png", "curves.xyz", ".", "", "x" * 400 + ".png"])
def test_a_picture_that_cannot_be_written_is_one_line(workplace: Path, refuse: Refuse, output: str) -> None:
    with RunStore().start_run(tiny("t.txt"), "a", {}) as a, RunStore().start_run(tiny("t.txt"), "b", {}) as b:
        pass
    refuse("compare", a.id, b.id, "--output", output, names=("--output",))


def test_a_deleted_experiment_leaves_nothing_behind(
    workplace: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore()
    store.client.delete_experiment(store.experiment_id())
    Path("text.txt").write_text(make_text(1500))
    assert main(["train", "--corpus.name", "text.txt", "--data.sequence_length", "8", "--trainer.max_steps", "2"]) == 2
    assert not list(Path().glob("mlruns/outbox/*"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the address space is limited as Linux does it")
def test_a_model_too_large_for_the_memory_is_one_line_with_what_to_lower(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "text.txt").write_text(make_text(2000))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, before[1]))
    try:
        code = main(["train", "--corpus.name", "text.txt", "--model.hidden_size", "9000"])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert code == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "elman: not enough memory (" in error.splitlines()[-1]
    assert "model.hidden_size" in error.splitlines()[-1]
