"""Payloads planted in a store, and secrets planted around a training: none runs, and none is recorded."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import datasets
import mlflow
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from elman.cli import main
from elman.text.prepare import default_cache
from elman.tracking import environment
from elman.tracking.environment import without_secrets
from elman.tracking.store import RunStore
from elman.training.experiment import run_experiment
from support import Payload, Refuse, files, make_text, put_store, tiny

CANARY = "s3cr3t-canary"
SHORT = ("--trainer.max_steps", "2", "--trainer.max_epochs", "null", "--data.batch_size", "8",
         "--data.sequence_length", "16", "--model.hidden_size", "8", "--tracking.system_metrics", "false")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> tuple[Path, str]:
    """A folder with a store, and the id of a run in it."""
    folder = tmp_path_factory.mktemp("trained")
    put_store(folder, empty_database)
    (folder / "text.txt").write_text(make_text(1500))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, run_experiment(tiny(folder / "text.txt", trainer__max_steps=4), RunStore()).run_id


@pytest.fixture
def artifacts(trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The run's artifacts, for a payload to be planted in; restored afterwards, and the folder is the current one."""
    folder, run_id = trained
    monkeypatch.chdir(folder)
    place = Path(RunStore().client.get_run(run_id).info.artifact_uri)
    kept = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    yield place
    for path, content in kept.items():
        path.write_bytes(content)


def as_pickle(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(canary)))


def as_checkpoint(path: Path, canary: Path) -> None:
    torch.save({"elman": {"architecture": Payload(canary)}, "state_dict": {}, "global_step": Payload(canary)}, path)


def as_checkpoint_of_ours(path: Path, canary: Path) -> None:
    torch.save(torch.load(path, weights_only=True) | {"resume": Payload(canary), "callbacks": Payload(canary)}, path)


def as_legacy_checkpoint(path: Path, canary: Path) -> None:
    torch.save({"elman": {}, "x": Payload(canary)}, path, _use_new_zipfile_serialization=False)


ATTACKS: dict[str, Callable[[Path, Path], None]] = {
    "pickle": as_pickle, "checkpoint": as_checkpoint, "checkpoint of ours": as_checkpoint_of_ours,
    "old format": as_legacy_checkpoint,
}  # fmt: skip
COMMANDS = {
    "generate": ("generate", "{run}"), "evaluate": ("evaluate", "{run}"), "doctor": ("doctor", "{run}"),
    "resume": ("train", "--resume", "{run}", "--trainer.max_steps", "8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_in_the_store_that_is_an_attack_is_refused_and_not_run(
    trained: tuple[Path, str], artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str,
    kind: str,
) -> None:  # fmt: skip
    canary = tmp_path / "canary"
    for name in ("best.ckpt", "last.ckpt"):
        ATTACKS[kind](artifacts / "checkpoints" / name, canary)
    before = files(trained[0])
    assert main([word.format(run=trained[1]) for word in COMMANDS[command]]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line != "loading libraries"]
    assert len(lines) == 1, lines
    assert ".ckpt" in lines[0]
    assert not canary.exists()
    assert {path for path in files(trained[0]) if path not in before} == set()


def test_a_state_on_this_machine_that_is_an_attack_is_refused_and_not_run(
    trained: tuple[Path, str], artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even with a list of sums that fits."""
    import hashlib

    folder = Path("mlruns") / "checkpoints" / RunStore().find_run(trained[1]).mark / "000001"
    folder.mkdir(parents=True)
    try:
        as_checkpoint(folder / "state.ckpt", tmp_path / "canary")
        digest = hashlib.sha256((folder / "state.ckpt").read_bytes()).hexdigest()
        (folder / "SHA256SUMS").write_text(f"{digest}  state.ckpt\n")
        assert main(["train", "--resume", trained[1], "--trainer.max_steps", "8"]) == 2
        assert "state.ckpt" in capsys.readouterr().err
        assert not (tmp_path / "canary").exists()
    finally:
        shutil.rmtree(folder.parent)


@pytest.mark.parametrize("command", ["remedy", "train --resume"])
def test_a_configuration_in_the_store_that_is_an_attack_is_refused_and_not_run(
    trained: tuple[Path, str], artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    canary = tmp_path / "canary"
    shutil.rmtree(artifacts / "checkpoints")
    (artifacts / "checkpoints").mkdir()  # with none, a run begins again as its configuration says
    (artifacts / "config.yaml").write_text(f"name: !!python/object/apply:pathlib.Path.touch [{canary}]\n")
    as_pickle(artifacts / "tokenizer.json", canary)
    more = ["--force"] if command == "remedy" else ["--trainer.max_steps", "8"]
    code = main([*command.split(), trained[1], *more])
    assert "Traceback" not in capsys.readouterr().err
    assert code in (0, 2)  # remedy reads the run's params, which are text, and nothing else
    assert not canary.exists()


def registered(folder: Path, name: str) -> None:
    """Make a folder version 1 of a registered model."""
    client = RunStore().client
    client.create_registered_model(name)
    client.create_model_version(name, source=str(folder))


@pytest.mark.parametrize("kind", ["python_model", "loader_module", "torch", "ours with a pickle for weights"])
@pytest.mark.parametrize("command", ["generate", "evaluate", "doctor"])
def test_a_registered_model_that_is_an_attack_is_refused_and_not_run(
    workplace: Path, tmp_path: Path, refuse: Refuse, command: str, kind: str
) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "model"
    (folder / "data").mkdir(parents=True)
    (folder / "code").mkdir()
    (folder / "code" / "evil.py").write_text(f"import pathlib; pathlib.Path({str(canary)!r}).touch()\n")
    as_pickle(folder / "python_model.pkl", canary)
    as_pickle(folder / "data" / "model.pth", canary)
    as_pickle(folder / "data" / "pickle_module_info.txt", canary)
    flavors = {
        "python_model": "python_function: {python_model: python_model.pkl, loader_module: mlflow.pyfunc.model}",
        "loader_module": "python_function: {loader_module: evil, code: code}",
        "torch": "pytorch: {model_data: data, pytorch_version: 2.13.0, code: code}",
        "ours with a pickle for weights": "python_function: {loader_module: elman.tasks.pyfunc, data: data}",
    }
    (folder / "MLmodel").write_text(f"flavors:\n  {flavors[kind]}\n")
    if kind.startswith("ours"):
        as_pickle(folder / "data" / "weights.safetensors", canary)
        for name in ("architecture.json", "tokenizer.json", "provenance.json"):
            (folder / "data" / name).write_text("{}")
    registered(folder, "evil")
    refuse(command, "models:/evil/1", names=())
    assert not canary.exists()


def test_the_same_models_do_run_where_mlflow_loads_them(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "model" / "code").mkdir(parents=True)
    (tmp_path / "model" / "code" / "evil.py").write_text(f"import pathlib; pathlib.Path('{tmp_path}/canary').touch()\n")
    (tmp_path / "model" / "MLmodel").write_text(
        "flavors:\n  python_function: {loader_module: evil, code: code, env: {}}\n"
    )
    with suppress(Exception):  # it is no model, but its code has run by then
        mlflow.pyfunc.load_model(str(tmp_path / "model"))
    assert (tmp_path / "canary").exists()


def test_a_small_folder_that_describes_a_huge_model_fills_no_memory(
    trained: tuple[Path, str], artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(artifacts / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["elman"]["architecture"]["config"] |= {"hidden_size": 30_000, "num_layers": 4}  # 100 GB
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.zeros(3)}, str(folder / "weights.safetensors"))
    (folder / "architecture.json").write_text(json.dumps(checkpoint["elman"]["architecture"]))
    (folder / "tokenizer.json").write_text(checkpoint["elman"]["tokenizer"])
    (folder / "provenance.json").write_text(json.dumps(checkpoint["elman"]["provenance"]))
    torch.save(checkpoint, tmp_path / "m.ckpt")
    for path in (tmp_path / "m.ckpt", folder):
        assert main(["generate", str(path)]) == 2
        assert "describes" in capsys.readouterr().err


# Corpora -----------------------------------------------------------------------------------------


def test_a_loading_script_beside_a_corpus_is_text_or_nothing(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = f"import pathlib\npathlib.Path('{tmp_path}/canary').touch()\n"
    folder = Path("novel")
    folder.mkdir()
    for name in ("novel.py", "dataset.py", "__init__.py", "setup.py", "conftest.py"):
        (folder / name).write_text(script)
    (folder / "dataset_infos.json").write_text("{}")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: '*.py'\n---\n")
    (folder / "part.jsonl").write_text(json.dumps({"text": make_text(900)}) + "\n")
    for name in ("novel", "novel/novel.py", "novel/*.py", "hub:novel"):
        main(["corpus", name])
        assert not (tmp_path / "canary").exists()
    capsys.readouterr()
    assert main(["corpus", "hub:novel", "--corpus.revision", "0" * 40]) == 2
    assert "would be read in its place" in capsys.readouterr().err


def test_no_data_set_is_asked_for_with_leave_to_run_its_code(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, object]] = []

    def load(path: str, **arguments: object) -> datasets.Dataset:
        asked.append(arguments)
        return datasets.Dataset.from_dict({"text": [make_text(2000)]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train"])
    assert main(["corpus", "hub:me/it", "--corpus.revision", "0" * 40]) == 0
    assert asked
    assert not any(name.startswith("trust") for arguments in asked for name in arguments)


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.parquet", "t.txt.gz", "t.npy", "t.pkl", "t.arrow"])
def test_a_corpus_that_is_a_pickle_is_refused_and_not_run(tmp_path: Path, refuse: Refuse, name: str) -> None:
    if name == "t.npy":
        np.save(tmp_path / name, np.array([Payload(tmp_path / "canary")], dtype=object), allow_pickle=True)
    else:
        as_pickle(tmp_path / name, tmp_path / "canary")
    for command in (["corpus"], ["train", "--corpus.name"]):
        refuse(*command, str(tmp_path / name), names=(name,))
    assert not (tmp_path / "canary").exists()


def test_an_array_in_the_cache_that_is_a_pickle_is_not_run(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ELMAN_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text(make_text(1500))
    assert main(["corpus", "text.txt"]) == 0
    [facts] = (default_cache() / "corpora").glob("*/corpus.json")
    place = facts.parent / "train.documents.npy"
    np.save(place, np.array([Payload(tmp_path / "canary")], dtype=object), allow_pickle=True)
    known = json.loads(facts.read_text())
    known["files"][place.name] = place.stat().st_size
    facts.write_text(json.dumps(known))
    main(["corpus", "text.txt"])
    assert not (tmp_path / "canary").exists()


# Secrets -----------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that passes for this code's own, full of secrets: in its remote, and uncommitted."""
    folder = tmp_path / "checkout"
    folder.mkdir()

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@y", *words], cwd=folder, check=True,
                       capture_output=True)  # fmt: skip

    git("init", "-q")
    (folder / "environment.py").write_text("# code\n")
    (folder / "deploy.yaml").write_text("a: 1\n")
    git("add", ".")
    git("commit", "-qm", "x")
    git("remote", "add", "origin", f"https://me:{CANARY}-remote@github.com/me/it.git")
    git("config", "diff.external", f"touch {tmp_path}/ran; cat")
    (folder / "environment.py").write_text(
        f'# code, changed\nurl = "postgresql://me:{CANARY}-url@host/db"\ntoken = "{CANARY}-quoted"\n'
        f"x = hf_{CANARY.replace('-', '')}abcdefghijkl\ny = '{CANARY}-HF_TOKEN'\n"
    )
    (folder / "deploy.yaml").write_text(
        f"a: 1\npassword: {CANARY}-yaml\nAWS_SECRET_ACCESS_KEY={CANARY}-env\nmirror: https://{CANARY}-user@host/x\n"
        f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}-key\n-----END RSA PRIVATE KEY-----\nkept: as it was\n"
    )
    monkeypatch.setattr(environment, "__file__", str(folder / "environment.py"))
    return folder


def holding(folder: Path, word: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]


def test_the_saved_diff_is_the_diff_without_its_secrets(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{CANARY}-HF_TOKEN")
    commit, diff = environment.code_state()
    assert commit is not None
    assert "+# code, changed" in diff
    assert "+kept: as it was" in diff
    assert CANARY not in diff
    assert CANARY.replace("-", "") not in diff
    assert not (tmp_path / "ran").exists()  # what a checkout's own configuration names is not run


def test_code_that_only_speaks_of_tokens_stays_as_it_is() -> None:
    code = (
        "+    token: int\n+tokens = 5000\n+def f(token: Tensor) -> None:\n+    self.password = config.password\n"
        "+token = tokens[0]\n+git@github.com:me/it\n+x = a // b  # https://host/x\n+secret = read(path, 3)\n"
    )
    assert without_secrets(code) == code


PLACES = {
    "a store that answers": None, "a database that is away": f"postgresql+psycopg://me:{CANARY}@127.0.0.1:9/nothing",
    "a server that is away": f"http://me:{CANARY}@127.0.0.1:9",
    "a server that is away, with an @": f"http://me:{CANARY}@{CANARY}@127.0.0.1:9",
}  # fmt: skip


@pytest.mark.parametrize("by", ["flag", "environment"])
@pytest.mark.parametrize("place", PLACES)
def test_no_secret_reaches_the_store_the_artifacts_or_the_output(
    workplace: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], place: str,
    by: str,
) -> None:  # fmt: skip
    uri = PLACES[place]
    if uri is None and by == "environment":
        return
    for name in ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    Path("text.txt").write_text(make_text(1500))
    where: list[str] = []
    if uri is not None and by == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    elif uri is not None:
        where = ["--tracking.uri", uri]
    assert main(["train", "--corpus.name", "text.txt", *SHORT, *where]) == 0
    for words in (["runs"], ["sync"], ["generate", "abc"], ["evaluate", "abc"], ["train", "--resume", "abc"]):
        main([*words, *where])
    told = capfd.readouterr()
    assert CANARY not in told.out + told.err
    assert holding(workplace, CANARY) == []
    diffs = [path for path in files(workplace) if b"+# code, changed" in path.read_bytes()]
    assert diffs  # in the artifacts or the outbox: the search does see what is saved
    assert holding(checkout, CANARY)


def test_the_environment_of_a_process_is_not_what_environment_json_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    assert CANARY not in json.dumps(environment.environment())
    assert os.environ["HF_TOKEN"] == CANARY


@pytest.mark.parametrize("terminal", [True, False])
def test_control_characters_of_a_text_reach_files_but_no_terminal(
    terminal: bool, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model learns them, so that what it generates could move the cursor or name the window."""
    (workplace / "text.txt").write_text("one\ttwo\x1b]0;owned\x07three\x9b2Jfour\r\n" * 200)
    run_id = run_experiment(tiny(workplace / "text.txt", trainer__max_steps=1), RunStore()).run_id
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    capsys.readouterr()
    for command in (
        ("corpus", "text.txt"),
        *(("generate", run_id, "--length", "99", *way) for way in ((), ("--samples", "2"), ("--beams", "2"))),
    ):
        assert main([*command]) == 0
    told = capsys.readouterr().out
    assert any(sign in told for sign in "\x1b\x07\x9b\r") is not terminal
    assert any(sign in told for sign in "␛␇\ufffd") is terminal
    assert "\n" in told
