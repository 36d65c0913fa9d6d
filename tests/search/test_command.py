"""The commands that search, compare and mend, as a user sees them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import elman.search.study
from elman.cli import main
from elman.config.load import dump_yaml, load_config
from elman.config.schema import ExperimentConfig
from support import free_port, tiny


@pytest.fixture
def search_file(workplace: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, thread_pool: Any) -> Path:
    whole = elman.search.study.run_search
    monkeypatch.setattr(elman.search.study, "run_search", partial(whole, make_pool=thread_pool))
    (workplace / "base.yaml").write_text(dump_yaml(tiny(text_file)), encoding="utf-8")
    path = workplace / "widths.yaml"
    path.write_text("base: base.yaml\nstudy: {sampler: grid}\nspace: {model.hidden_size: [4, 8]}\n", encoding="utf-8")
    return path


def test_a_search_ends_with_its_answer_and_the_next_commands(
    search_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", "--config", str(search_file), "--trainer.max_steps", "10"]) == 0
    out, err = capsys.readouterr()
    for words in ("trial 1: val/bits_per_byte", "model.hidden_size: 8", "trained again", "test bits/byte",
                  "2 complete; 2 trainings", "elman train --config mlruns/searches/widths.yaml",
                  "elman dashboard"):  # fmt: skip
        assert words in out
    assert "study widths: run" in err
    best = load_config(ExperimentConfig, Path("mlruns/searches/widths.yaml"))
    assert (best.model.hidden_size, best.trainer.max_steps) == (8, 10)
    assert main(["search", "--config", str(search_file), "--trainer.max_steps", "10", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["point"] == {"model.hidden_size": 8}
    assert result["retrained"][0]["registered"] is None or "widths" in result["retrained"][0]["registered"]
    assert main(["runs"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("widths") == 1
    assert main(["runs", "--all"]) == 0
    assert capsys.readouterr().out.count("widths") == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["search"], "needs --config FILE"),
        (["search", "--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["search", "--join", "s"], "--join needs --storage"),
        (["search", "--config", "x.yaml", "--workers", "two"], "--workers must be an integer"),
        (["search", "--config", "x.yaml", "--study.samplr", "tpe"], "Did you mean --study.sampler?"),
        (["compare", "--tournament", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["compare", "abc", "def", "--model.cell", "gru"], "--model.cell belongs to --tournament"),
        (["compare", "abc", "--tournament", "x.yaml"], "not both"),
        (["remedy", "nowhere"], "There is no run 'nowhere'"),
        (["dashboard", "--port", "0"], "--port must be from 1 to 65535"),
        (["dashboard", "--storage", "grpc://localhost:1"], "is a proxy"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    [line] = [line for line in err.splitlines() if line.startswith("elman:")]
    assert said in line
    assert "Traceback" not in err


@pytest.mark.slow
def test_the_dashboard_answers_on_this_machine_alone(workplace: Path) -> None:
    port = str(free_port())
    server = subprocess.Popen(
        [sys.executable, "-m", "elman.cli", "dashboard", "--port", port], stdout=subprocess.PIPE, text=True,
        env=dict(os.environ),
    )  # fmt: skip
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=10) as answer:
            assert json.loads(answer.read())["study_summaries"] == []
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)
