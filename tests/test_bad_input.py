"""Bad input: one line that names field and value, exit code 2, and nothing written."""

from __future__ import annotations

import gzip
import io
import json
import math
import pickle
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elman.config.load import load_config, read_settings, read_yaml
from elman.config.plan import load_plan
from elman.config.schema import ExperimentConfig, GenerationConfig
from elman.config.search import SearchConfig
from elman.config.tournament import TournamentSettings, load_tournament
from elman.config.tree import build
from elman.config.tree import settings as settings_of
from elman.errors import ConfigError, ElmanError
from elman.text.readers import read_file
from elman.training.loading import from_checkpoint
from support import Refuse, files, make_text

SIZES = ("--data.batch_size", "4", "--data.sequence_length", "8", "--trainer.max_steps", "2")


def gzip_cut_short() -> bytes:
    return gzip.compress(make_text(4000).encode())[:-200]


def rows(*lines: str) -> bytes:
    return "\n".join(lines).encode()


GOOD = make_text(400).encode()
CORPORA: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty": ("t.txt", b"", ("t.txt", "empty")),
    "blank": ("t.txt", b" \n\t\r\n" * 500, ("t.txt", "white space")),
    "shorter than a window": ("t.txt", b"Call me Ishmael.", ("t.txt", "data.batch_size", "data.sequence_length")),
    "one repeated character": ("t.txt", b"a" * 9000, ("t.txt", "'a'")),
    "invalid UTF-8": ("t.txt", GOOD + b"\xff" + GOOD, ("t.txt", f"byte {len(GOOD)}", "corpus.encoding_errors")),
    "NUL": ("t.txt", GOOD + b"\0" + GOOD, ("t.txt", f"byte {len(GOOD)}", "NUL")),
    "UTF-16": ("t.txt", make_text(400).encode("utf-16"), ("t.txt", "UTF-16")),
    "truncated gzip": ("t.txt.gz", gzip_cut_short(), ("t.txt.gz", "gzip")),
    "no gzip": ("t.txt.gz", GOOD, ("t.txt.gz", "gzip")),
    "malformed jsonl": ("t.jsonl", rows('{"text": "fine"}', '{"text": ', '{"text": "fine"}'), ("t.jsonl:2", "JSON")),
    "jsonl without the column": ("t.jsonl", rows('{"text": "x"}', '{"txt": "x"}'), ("t.jsonl:2", "'text'", "txt")),
    "jsonl of numbers": ("t.jsonl", rows('{"text": 5}'), ("t.jsonl:1", "int")),
    "jsonl of a list": ("t.jsonl", rows("[1, 2]"), ("t.jsonl:1", "list")),
    "no parquet": ("t.parquet", GOOD, ("t.parquet",)),
}


@pytest.mark.parametrize("kind", CORPORA)
def test_a_corpus_that_cannot_be_used_is_one_line(tmp_path: Path, refuse: Refuse, kind: str) -> None:
    name, content, names = CORPORA[kind]
    (tmp_path / name).write_bytes(content)
    refuse("train", "--corpus.name", str(tmp_path / name), *SIZES, names=names)


def test_a_validation_split_that_would_be_empty_is_one_line(tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "t.txt").write_bytes(GOOD)
    refuse("train", "--corpus.name", str(tmp_path / "t.txt"), "--corpus.validation_fraction", "1e-9", *SIZES,
           names=("validation",))  # fmt: skip


def test_a_parquet_without_a_text_column_names_those_it_has(tmp_path: Path, refuse: Refuse) -> None:
    pyarrow.parquet.write_table(pa.table({"words": ["a b c"] * 50}), tmp_path / "t.parquet")
    refuse("train", "--corpus.name", str(tmp_path / "t.parquet"), names=("'text'", "words", "corpus.column"))


def test_a_directory_without_text_and_a_path_that_is_none_are_one_line(tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG\0\xff")
    refuse("train", "--corpus.name", str(tmp_path / "pictures"), names=("pictures", "no text"))
    refuse("train", "--corpus.name", str(tmp_path / "novel.txt"), names=("corpus.name", "novel.txt"))


def test_the_hub_out_of_reach_is_one_line(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refuse("train", "--corpus.name", "hub:nobody/nothing", names=("hub:nobody/nothing", "hub", "bible-asv"))


TREES = {"train": ExperimentConfig, "generate": GenerationConfig, "search": SearchConfig, "compare": TournamentSettings}
LEAVES = [(tree, setting) for tree in TREES.values() for setting in settings_of(tree).values()]


def kinds(hint: Any) -> set[Any]:
    """The plain types that a setting takes."""
    if get_origin(hint) in (Union, types.UnionType):
        return set().union(*map(kinds, get_args(hint)))
    return {str} if get_origin(hint) is Literal else {get_origin(hint) or hint}


def misfits(hint: Any) -> Iterator[Any]:
    """Values that no setting of this type takes."""
    taken = kinds(hint)
    if taken & {int, float}:
        yield from (math.nan, math.inf, -math.inf)
    if bool not in taken:
        yield True
    if str not in taken:
        yield from ("12", "true", "")
    if type(None) not in taken:
        yield None
    if tuple not in taken:
        yield [1, 2]
    yield {"a": 1}


@pytest.mark.parametrize(("tree", "setting"), LEAVES, ids=[f"{t.__name__}-{s.name}" for t, s in LEAVES])
def test_every_setting_refuses_what_is_no_value_of_its(tree: type, setting: Any) -> None:
    for value in misfits(setting.type):
        with pytest.raises(ConfigError) as refusal:
            build(tree, {setting.name: value})
        message = str(refusal.value)
        assert setting.name in message
        assert repr(value) in message or repr(float(value)) in message
        assert "\n" not in message


@pytest.mark.parametrize("value", ["nan", ".inf", "'12'", "true", "[1]", "-5"])
def test_a_value_in_a_file_or_a_flag_is_refused_before_anything_is_done(
    tmp_path: Path, refuse: Refuse, value: str
) -> None:
    for name in ("optimizer.lr", "model.hidden_size"):
        section, leaf = name.split(".")
        (tmp_path / "c.yaml").write_text(f"{section}: {{{leaf}: {value}}}\n")
        refuse("train", "--config", str(tmp_path / "c.yaml"), names=("c.yaml", name))
        refuse("train", f"--{name}={value}", names=(name,))


def test_unknown_and_contradicting_settings_are_one_line(tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "c.yaml").write_text("model: {hiden_size: 3}\n")
    refuse("train", "--config", str(tmp_path / "c.yaml"), names=("c.yaml", "model.hiden_size", "model.hidden_size"))
    refuse("train", "--model.hiden_size", "3", names=("model.hiden_size", "model.hidden_size"))
    refuse("train", "--trainer.max_epochs", "null", names=("trainer.max_epochs", "trainer.max_steps"))


def zipped() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("hello.txt", "hello")
    return held.getvalue()


def saved(content: object) -> bytes:
    held = io.BytesIO()
    torch.save(content, held)
    return held.getvalue()


FOREIGN = {
    "a pickle": pickle.dumps({"a": 1}), "a zip": zipped(), "a text": b"hello", "nothing": b"",
    "another program's": saved({"state_dict": {"w": torch.zeros(2)}}), "a tensor": saved(torch.zeros(3)),
    "cut short": saved({"elman": {}, "w": torch.zeros(500)})[:-300],
    "empty of ours": saved({"elman": {}}), "ours by name": saved({"elman": {"architecture": 3}, "state_dict": []}),
    "of another shape": saved({"elman": {"architecture": {"cell": "lstm"}}, "state_dict": {"model.w": 3}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_file_that_is_no_checkpoint_of_ours_is_one_line(
    tmp_path: Path, refuse: Refuse, command: str, kind: str
) -> None:
    (tmp_path / "m.ckpt").write_bytes(FOREIGN[kind])
    refuse(command, str(tmp_path / "m.ckpt"), names=("m.ckpt",))


def test_a_model_that_does_not_exist_is_one_line(tmp_path: Path, refuse: Refuse) -> None:
    for command in ("generate", "evaluate"):
        refuse(command, str(tmp_path / "none.ckpt"), names=("none.ckpt", "does not exist"))


def test_a_process_of_its_own_says_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "elman.cli", "train", "--optimizer.lr", "nan"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "optimizer.lr" in done.stderr
    assert files(tmp_path) == {}


ARBITRARY = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
WORDS = st.sampled_from(
    ["base", "study", "space", "settings", "contest", "contestants", "model", "model.hidden_size", "low", "high",
     "name", "enqueue", "optimizer.lr", "when", "step", "log"]
)  # fmt: skip
TREE = st.dictionaries(WORDS, PLAIN | st.dictionaries(WORDS, PLAIN, max_size=3), max_size=4)


@ARBITRARY
@given(st.text(max_size=200).map(str.encode) | st.binary(max_size=200) | TREE.map(lambda t: yaml.dump(t).encode()))
def test_any_file_is_a_configuration_or_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    for load in (
        read_yaml, load_plan, load_tournament, lambda p: load_config(ExperimentConfig, p),
        lambda p: read_settings(ExperimentConfig, p),
    ):  # fmt: skip
        with suppress(ElmanError):
            load(path)


@ARBITRARY
@given(st.binary(max_size=300), st.sampled_from(["t.txt", "t.txt.gz", "t.jsonl", "t.jsonl.gz"]), st.booleans())
def test_any_bytes_are_a_text_or_an_error_of_ours(tmp_path: Path, content: bytes, name: str, compressed: bool) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content) if compressed else content)
    with suppress(ElmanError):
        for batch in read_file(tmp_path / name, "text", None, "strict"):
            assert all("\0" not in text for text, _ in batch)


@ARBITRARY
@given(st.binary(max_size=300) | PLAIN.map(lambda value: saved({"elman": value, "state_dict": value})))
def test_any_bytes_are_a_checkpoint_or_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.ckpt").write_bytes(content)
    with pytest.raises(ElmanError):
        from_checkpoint(tmp_path / "m.ckpt")


@ARBITRARY
@given(PLAIN)
def test_any_row_of_json_is_a_text_or_an_error_of_ours(tmp_path: Path, row: object) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": row}) + "\n" + json.dumps(row))
    with suppress(ElmanError):
        list(read_file(tmp_path / "t.jsonl", "text", None, "strict"))
