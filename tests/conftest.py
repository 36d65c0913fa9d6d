"""Shared fixtures: a tiny text, a tracking store in a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elman.config.schema import TrackingConfig
from support import Refuse, files, make_text, put_store


@pytest.fixture(scope="session", autouse=True)
def corpus_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The suite never touches the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELMAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of about 20 kB."""
    path = tmp_path / "text.txt"
    path.write_text(make_text(4000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables made: making them takes seconds."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        from elman.tracking.store import RunStore

        RunStore(TrackingConfig())
    return folder / "mlruns" / "mlflow.db"


@pytest.fixture
def workplace(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an empty local store."""
    folder = tmp_path / "work"
    put_store(folder, empty_database)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Runs a command that has to be refused in one line, naming this and that, and leave nothing behind."""
    if Path.cwd() != tmp_path / "work":  # the fixture ``workplace`` may have made it
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def run(*arguments: str, names: tuple[str, ...]) -> str:
        from elman.cli import main

        before = files(tmp_path)
        code = main(list(arguments))
        told = capsys.readouterr()
        lines = [line for line in told.err.splitlines() if line != "loading libraries"]
        assert code == 2, told.err
        assert len(lines) == 1, told.err
        assert told.out == ""
        for name in names:
            assert name in lines[0]
        assert files(tmp_path) == before
        return lines[0]

    return run
