from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from elman.cli import COMMANDS, main, table
from support import make_text

TINY = [
    "--trainer.max_steps", "6", "--trainer.validate_every_steps", "3", "--trainer.threads", "1",
    "--model.embedding_size", "8", "--model.hidden_size", "16",
    "--data.batch_size", "8", "--data.sequence_length", "16",
    "--corpus.validation_fraction", "0.1", "--corpus.test_fraction", "0.1", "--tracking.system_metrics", "false",
]  # fmt: skip


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def trained(workplace: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    code, out, _ = run("train", "--json", "--corpus.name", str(text_file), *TINY, capsys=capsys)
    assert code == 0
    return dict(json.loads(out))


def test_a_training_ends_with_a_table_a_sample_and_the_next_commands(
    workplace: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run("train", "--corpus.name", str(text_file), *TINY, capsys=capsys)
    assert code == 0
    for word in ("validation", "test", "perplexity", "bits/byte", "parameters", "tokens/s", "elman generate",
                 "elman ui", "400 characters"):  # fmt: skip
        assert word in out
    sample = out.split("own ───\n")[1].split("\n───\n")[0]
    assert len(sample) == 400
    assert "validation loss" in err
    assert "in fp32" in err or "in bf16" in err


def test_json_is_exactly_one_object_for_every_command(
    trained: dict[str, Any], text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = dict(json.loads(run("train", "--json", "--corpus.name", str(text_file), "--seed", "2", *TINY,
                                capsys=capsys)[1]))  # fmt: skip
    for arguments, key in [
        (["generate", trained["run_id"], "--prompt", "ba", "--length", "5"], "samples"),
        (["generate", trained["run_id"], "--beams", "2", "--length", "5"], "log_probabilities"),
        (["evaluate", trained["run_id"]], "metrics"),
        (["runs"], "runs"),
        (["compare", trained["run_id"], other["run_id"]], "settings"),
        (["corpus", str(text_file)], "splits"),
        (["settings"], "model.hidden_size"),
    ]:
        code, out, _ = run(*arguments, "--json", capsys=capsys)
        assert code == 0
        assert key in json.loads(out)
        assert out.count("\n") == 1


def test_evaluate_reports_what_training_reported(trained: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run("evaluate", trained["run_id"], "--split", "validation", "--json", capsys=capsys)
    assert json.loads(out)["metrics"]["loss"] == pytest.approx(trained["metrics"]["val/loss"], rel=1e-6)


def test_generate_repeats_the_prompt_streams_and_ends_with_a_line(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", trained["run_id"], "--prompt", "ba do", "--length", "30", "--seed", "4"]
    code, out, _ = run(*arguments, capsys=capsys)
    assert code == 0
    assert out.startswith("ba do")
    assert len(out) == 36
    assert run(*arguments, capsys=capsys)[1] == out
    code, out, err = run("generate", trained["run_id"], "--prompt", "ba#X", capsys=capsys)
    assert (code, out) == (2, "")
    assert "'#' 'X'" in err
    assert run("generate", trained["run_id"], "--prompt", "ba#X", "--on-unknown", "skip", capsys=capsys)[0] == 0


def test_compare_shows_what_differs_and_draws(
    trained: dict[str, Any], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run("train", "--json", "--corpus.name", str(text_file), *TINY, "--model.cell", "gru", capsys=capsys)
    picture = tmp_path / "curves.png"
    code, out, _ = run("compare", trained["run_id"], json.loads(out)["run_id"], "--output", str(picture), capsys=capsys)
    assert code == 0
    assert '"' not in out.split("model.cell")[1].splitlines()[0]
    assert "test/bits_per_byte" in out
    assert "model.hidden_size" not in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "Did you mean train?"),
        (["train", "--model.hiden_size", "3"], "Did you mean --model.hidden_size?"),
        (["train", "--model.dropout", "1.0"], "model.dropout must be at least 0 and below 1, got 1.0."),
        (["train", "--model.hidden_size", "0"], "model.hidden_size must be at least 1"),
        (["train", "--config", "missing.yaml"], "missing.yaml cannot be read"),
        (["train", "--config", "unknown.yaml"], "unknown.yaml: model.size is not a setting."),
        (["train", "--corpus.name", "missing.txt"], "missing.txt"),
        (["train", "--corpus.name", "empty.txt"], "empty.txt"),
        (["train", "--corpus.name", "short.txt"], "fewer than one window"),
        (["train", "--corpus.name", "latin1.txt"], "byte 1"),
        (["generate", "nobody"], "There is no run 'nobody'"),
        (["generate", "missing.ckpt"], "missing.ckpt does not exist"),
        (["generate", "empty.txt", "--temperature", "-1"], "--temperature"),
        (["evaluate"], "model"),
        (["compare", "one"], "two or more runs"),
        (["corpus", "hub:"], "hub:OWNER/NAME"),
        (["corpus", "pipe"], "neither a file nor a directory"),
        (["runs", "--limit", "0"], "--limit must be from 1"),
        (["ui", "--port", "0"], "--port"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_nothing(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    Path("empty.txt").write_text("")
    os.mkfifo("pipe")
    Path("short.txt").write_text("a short text\n" * 3)
    Path("latin1.txt").write_bytes(b"a\xe9t\xe9 " * 100)
    Path("unknown.yaml").write_text("model: {size: 3}")
    before = {p for p in workplace.rglob("*") if "mlruns" not in p.parts}
    code, out, err = run(*arguments, capsys=capsys)
    assert (code, out) == (2, "")
    assert words in err
    message = [line for line in err.splitlines() if line != "loading libraries"]
    assert len(message) == 1
    assert message[0].startswith("elman: ")
    assert {p for p in workplace.rglob("*") if "mlruns" not in p.parts} == before
    assert not list((workplace / "mlruns").rglob("*.ckpt"))
    assert json.loads(run("runs", "--json", capsys=capsys)[1]) == {"runs": []}


def test_help_lists_every_command_and_setting(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("--help", capsys=capsys)
    assert code == 0
    for name, command in COMMANDS.items():
        assert name in out
        assert (command.__doc__ or "") in out
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    assert "--model.hidden_size" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--model.dropout", "1.0"], ["nonsense"]])
def test_help_and_mistakes_import_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys; from elman.cli import main; main(sys.argv[1:])\n"
        "heavy = {'torch', 'lightning', 'mlflow', 'optuna', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_with_its_code_and_a_checkpoint(
    workplace: Path, tmp_path: Path, number: int, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(make_text(3000))
    command = [sys.executable, "-m", "elman.cli", "train", "--corpus.name", str(text), *TINY, "--trainer.max_steps",
               "1000000", "--trainer.max_epochs", "null"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as training:
        assert training.stderr is not None
        for line in training.stderr:
            if "validation loss" in line:
                break
        training.send_signal(number)
        rest = training.stderr.read()
        assert training.wait(timeout=60) == expected
    assert "Traceback" not in rest
    [found] = json.loads(run("runs", "--json", capsys=capsys)[1])["runs"]
    assert found["status"] == "KILLED"
    assert run("generate", found["id"], "--length", "5", capsys=capsys)[0] == 0


def test_ctrl_c_while_libraries_are_loaded_is_no_failure(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "elman.training.experiment", Interrupted("elman.training.experiment"))
    code, _, err = run("train", capsys=capsys)
    assert code == 130
    assert err.splitlines()[-1] == "elman: stopped."
    assert "Traceback" not in err


def test_a_reader_that_has_seen_enough_is_no_error(workplace: Path) -> None:
    command = f"{sys.executable} -m elman.cli settings | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("| setting")
    assert done.stderr == ""


def test_sorting_by_a_metric_that_no_run_has_is_refused(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("runs", "--sort", "test/bits_per_byte", capsys=capsys)[0] == 0
    code, _, err = run("runs", "--sort", "test/bits_per_bite", capsys=capsys)
    assert code == 2
    assert "Did you mean test/bits_per_byte?" in err


def test_a_table_is_aligned() -> None:
    assert table([["a", "b"], ["long", "1"]]) == "a     b\n────  ─\nlong  1"


def test_a_failure_of_ours_has_its_traceback_and_exit_code_1(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(arguments: Any) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setitem(COMMANDS, "runs", broken)
    code, _, err = run("runs", capsys=capsys)
    assert code == 1
    assert "Traceback" in err
