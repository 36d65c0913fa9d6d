"""Hostile input: it is refused in a line, and nothing in it runs."""

from __future__ import annotations

import gzip
import pickle
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from elman.cli import main
from elman.config.load import read_yaml
from elman.errors import ConfigError
from elman.text.readers import BLOCK, read_file
from support import Payload


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that is there once a payload has run."""
    return tmp_path / "canary"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command refuses."""
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line != "loading libraries"]
    assert len(lines) == 1, lines
    return lines[0]


def test_the_payload_runs_where_something_unpickles_it(canary: Path) -> None:
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists()


def plant(place: Path, kind: str, canary: Path) -> Path:
    """A model that is an attack: its path."""
    if kind == "pickle":
        place.write_bytes(pickle.dumps(Payload(canary)))
    elif kind == "checkpoint":
        torch.save({"elman": {"architecture": Payload(canary)}, "state_dict": {}}, place)
    elif kind == "class path":  # what Lightning itself would import and call
        call = {"_class_path": "pathlib.Path.touch", "_instantiator": "lightning.pytorch.cli.instantiate_module"}
        torch.save({"elman": {}, "state_dict": {}, "hyper_parameters": call, "_instantiator": "os.system"}, place)
    else:
        place.mkdir()
        (place / "MLmodel").write_text(
            "flavors:\n  python_function:\n    loader_module: evil\n    code: code\n    python_model: evil.pkl\n"
        )
        (place / "evil.pkl").write_bytes(pickle.dumps(Payload(canary)))
        (place / "evil.py").write_text(f"import pathlib; pathlib.Path({str(canary)!r}).touch()\n")
    return place


@pytest.mark.parametrize("kind", ["pickle", "checkpoint", "class path", "mlflow model"])
@pytest.mark.parametrize("command", ["generate", "evaluate", "doctor"])
def test_a_model_that_is_an_attack_is_refused_and_not_run(
    workplace: Path, canary: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    attack = plant(workplace / "model.ckpt", kind, canary)
    assert "model.ckpt" in refused(capsys, command, str(attack))
    assert not canary.exists()


TAGS = ("!!python/object/apply:pathlib.Path.touch [{canary}]", "!!python/name:os.system", "!!python/object/new:os.abc")


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("command", ["train --config", "search --config", "compare --tournament", "doctor --config"])
def test_a_yaml_tag_is_refused_and_not_run_by_any_command(
    workplace: Path, canary: Path, capsys: pytest.CaptureFixture[str], command: str, tag: str
) -> None:
    (workplace / "c.yaml").write_text(f"name: {tag.format(canary=canary)}\n")
    assert "c.yaml" in refused(capsys, *command.split(), "c.yaml")
    assert not canary.exists()


BOMBS = {
    "aliases": "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}, *{p}]\n" for p, c in pairwise("abcdefghi")),
    "depth": "[" * 100_000,
    "mappings": "{a: " * 50_000,
    "merges": "a: &a {x: 1}\nb: {<<: *a}\n", "length": "a: [" + "1," * 40_000 + "1]",
    "base 60": "a: " + ":".join(["59"] * 30_000), "digits": "a: " + "1" * 60_000,
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_a_yaml_bomb_is_refused_within_100_megabytes(tmp_path: Path, kind: str) -> None:
    (tmp_path / "c.yaml").write_text(BOMBS[kind])
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=r"c\.yaml"):
            read_yaml(tmp_path / "c.yaml")
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


NAMES = ["../x", "a/../../b", "a\0b", "a" * 10_000, "run\u202etxt", "\u200bx", "..", "", "a\nb", "-rf"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.parametrize(
    ("command", "setting"),
    [("train", "name"), ("train", "tracking.experiment"), ("train", "tracking.register"), ("search", "study.name"),
     ("search", "search.register"), ("compare", "contest.name")],
)  # fmt: skip
def test_a_name_is_of_plain_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, setting: str,
    name: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    file = {"search": "--config", "compare": "--tournament"}.get(command)
    (tmp_path / "c.yaml").write_text("space: {model.hidden_size: [8, 16]}\n" if command == "search" else "{}\n")
    line = refused(capsys, command, *([file, "c.yaml"] if file else []), f"--{setting}={name}")
    assert setting in line
    assert {path.name for path in tmp_path.iterdir()} == {"c.yaml"}


def test_a_gzip_bomb_passes_in_blocks_of_bounded_size(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "bomb.txt.gz", "wb") as file:
        for _ in range(200):
            file.write(b"a" * BLOCK)
    tracemalloc.start()
    try:
        batches = read_file(tmp_path / "bomb.txt.gz", "text", None, "strict")
        assert sum(len(text) for batch in batches for text, _ in batch) == 200 * BLOCK
        assert tracemalloc.get_traced_memory()[1] < 20 * BLOCK
    finally:
        tracemalloc.stop()
