"""Settings out of range or against each other, by file and by flag: one line, exit code 2, nothing written."""

from __future__ import annotations

import ast
import inspect
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elman.config import schema, search, tournament
from elman.config.load import Flags, load_config
from elman.config.schema import ExperimentConfig, GenerationConfig, ModelConfig
from elman.config.search import SearchConfig
from elman.config.tournament import TournamentSettings
from elman.config.tree import LARGEST_INTEGER, build, coerce
from elman.config.tree import settings as settings_of
from elman.errors import ConfigError, ElmanError
from elman.models.language_model import build_model
from support import Refuse
from test_bad_input import LEAVES, TREES, kinds

INTEGERS = [(tree, setting) for tree, setting in LEAVES if int in kinds(setting.type)]
ZERO_IS_MEANT = {
    "corpus.fold", "corpus.fold_gap", "optimizer.warmup_steps", "optimizer.decay_start_epoch",
    "optimizer.decay_patience", "trainer.sample_length", "search.seeds", "search.keep_checkpoints", "contest.trials",
    "seed", "study.seed", "contest.seed", "model.cutoffs",
}  # fmt: skip
MEMORY_IS_AT_STAKE = {
    "model.embedding_size", "model.hidden_size", "model.last_hidden_size", "model.num_layers", "model.num_heads",
    "model.max_sequence_length", "model.parameter_budget", "trainer.threads", "trainer.sample_length", "search.workers",
    "search.seeds", "contest.seeds", "length", "beams", "samples",
}  # fmt: skip


@pytest.mark.parametrize(("tree", "setting"), INTEGERS, ids=[f"{t.__name__}-{s.name}" for t, s in INTEGERS])
def test_every_integer_has_a_least_and_a_largest_value(tree: type, setting: Any) -> None:
    def refusal(value: int) -> str:
        with pytest.raises(ConfigError) as error:
            build(tree, {setting.name: value})
        assert setting.name in str(error.value)
        return str(error.value)

    assert "-1" in refusal(-1)
    refusal(-(2**70))
    if setting.name not in ZERO_IS_MEANT:
        assert "got 0" in refusal(0)
    assert str(LARGEST_INTEGER) in refusal(10**30)
    assert len(refusal(10**4000)) < 200
    if setting.name in MEMORY_IS_AT_STAKE:
        assert "at most" in refusal(10**15) or "from" in refusal(10**15)
    else:
        with suppress(ConfigError):  # it contradicts another setting, or it is merely large
            assert build(tree, {setting.name: 10**15}) is not None


def test_a_model_that_no_memory_holds_is_refused_before_it_is_made() -> None:
    for sizes in ({"hidden_size": 10**6}, {"embedding_size": 10**6, "hidden_size": 10**5}, {"parameter_budget": 10**12},
                  {"hidden_size": 30_000, "num_layers": 3}):  # fmt: skip
        with pytest.raises(ConfigError, match=r"model\.hidden_size \d+, .* GB"):
            build_model(ModelConfig(**sizes), vocabulary_size=30, num_inputs=31, start_id=30, context_length=16)  # type: ignore[arg-type]


AGAINST_EACH_OTHER: list[tuple[type, dict[str, Any]]] = [
    (ExperimentConfig, flat)
    for flat in (
        {"corpus.validation_fraction": 0.6, "corpus.test_fraction": 0.5},
        {"corpus.training_fraction": 0.5, "corpus.streaming": True, "trainer.max_steps": 3},
        {"corpus.fold": 1}, {"corpus.folds": 3, "corpus.fold": 3}, {"corpus.folds": 1},
        {"corpus.folds": 3, "corpus.streaming": True, "trainer.max_steps": 3},
        {"corpus.folds": 3, "corpus.validation_file": "x"},
        {"corpus.level": "byte", "corpus.vocabulary_size": 300}, {"corpus.level": "bpe", "corpus.vocabulary_size": 256},
        {"corpus.level": "bpe", "corpus.vocabulary_size": 10**9}, {"corpus.level": "word", "corpus.vocabulary_size": 2},
        {"corpus.level": "bpe", "corpus.min_count": 2}, {"corpus.level": "byte", "corpus.min_count": 2},
        {"corpus.streaming": True}, {"corpus.document_separator": ""}, {"corpus.column": ""}, {"corpus.name": " "},
        {"model.nonlinearity": "relu"}, {"model.cell": "gru", "model.forget_bias": 2.0},
        {"model.layer_dropout": 0.5}, {"model.variational": ["input", "input"]},
        {"model.cell": "transformer", "model.hidden_size": 250}, {"model.cell": "transformer", "model.num_heads": 3},
        {"model.cell": "transformer", "model.last_hidden_size": 128},
        {"model.cell": "transformer", "model.initial_state": "learned"},
        {"model.cell": "transformer", "model.weight_dropout": 0.1},
        {"model.softmax": "adaptive"}, {"model.softmax": "adaptive", "corpus.level": "word", "model.tie_weights": True},
        {"model.softmax": "adaptive", "corpus.level": "word", "model.cutoffs": [9, 3]}, {"model.cutoffs": [3]},
        {"data.reset_at_documents": True, "model.head": "last_step"},
        {"optimizer.momentum": 0.9}, {"optimizer.nesterov": True},
        {"optimizer.name": "sgd", "optimizer.nesterov": True}, {"model.cell": "mingru", "model.weight_dropout": 0.5},
        {"optimizer.betas": [0.9, 1.0]}, {"optimizer.decay_factor": 1.0}, {"optimizer.final_lr_fraction": 1.5},
        {"trainer.max_epochs": None}, {"tracking.uri": "databricks"}, {"tracking.uri": "file:///x"},
        {"tracking.uri": "./mlruns"},
    )
] + [
    (SearchConfig, flat)
    for flat in (
        {"study.metric": ["val/loss", "val/loss"]}, {"study.metric": []}, {"study.metric": "val/los"},
        {"study.metric": ["val/loss", "model/parameters"], "study.direction": ["minimize"]},
        {"study.metric": ["val/loss", "model/parameters"], "study.pruner": "median"},
        {"study.metric": "model/parameters", "study.pruner": "median"}, {"study.pruner": "wilcoxon"},
        {"study.folds": 3, "study.pruner": "hyperband"}, {"study.folds": 3, "study.pruner": "patience"},
        {"study.choose": "one_standard_error"}, {"study.folds": 1}, {"study.minutes": 0.0},
        {"study.folds": 3, "study.choose": "one_standard_error", "study.metric": ["val/loss", "model/parameters"]},
    )
] + [
    (TournamentSettings, {"contest.parameters": None}), (TournamentSettings, {"contest.minutes": -1.0}),
    (GenerationConfig, {"beams": 2, "samples": 3}), (GenerationConfig, {"samples": 10_000, "length": 10**6}),
    (GenerationConfig, {"stop": ""}), (GenerationConfig, {"top_p": 0.0}), (GenerationConfig, {"min_p": 1.5}),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "flat"), AGAINST_EACH_OTHER, ids=lambda value: str(value)[:60])
def test_settings_that_contradict_each_other_are_one_line_that_names_one_and_the_remedy(
    tree: type, flat: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as error:
        build(tree, flat)
    message = str(error.value)
    assert any(name in message for name in flat)
    assert "\n" not in message


def test_every_check_of_a_setting_is_met_by_a_case() -> None:
    """Each ``require`` and ``raise`` in the dataclasses refuses something in these tests."""
    lines: dict[Any, set[int]] = {}
    for module in (schema, search, tournament):
        tree = ast.parse(inspect.getsource(module))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        methods = [node for one in classes for node in one.body if isinstance(node, ast.FunctionDef)]
        lines[module.__file__] = {
            node.lineno for method in methods for node in ast.walk(method)
            if (isinstance(node, ast.Call) and getattr(node.func, "id", "") in
                ("require", "_count", "_positive", "_probability", "_not_negative", "check_name", "check_store"))
            or isinstance(node, ast.Raise)
        }  # fmt: skip
    met: dict[Any, set[int]] = {file: set() for file in lines}

    def watch(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in met:
            return None
        if event == "exception" and issubclass(argument[0], ConfigError):
            met[frame.f_code.co_filename].add(frame.f_lineno)
        return watch

    cases = [*AGAINST_EACH_OTHER]
    for tree_, setting in LEAVES:
        numbers = (-1, 0, 10**15, -1.0, 2.0, float("nan"), float("inf"), 0.0, "", "../x", [2.0, 2.0], [-1, 0])
        cases += [(tree_, {setting.name: value}) for value in numbers]
        cases += [(tree_, {setting.name: value, "corpus.level": "word"}) for value in (2,) if tree_ is ExperimentConfig]
    sys.settrace(watch)
    try:
        for tree_, flat in cases:
            with suppress(ConfigError):
                build(tree_, flat)
    finally:
        sys.settrace(None)
    for file, wanted in lines.items():
        assert not wanted - met[file], f"{file}: nothing refuses at lines {sorted(wanted - met[file])}"


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 3), st.floats(), st.text(max_size=6),
    st.lists(st.floats() | st.integers(-2, 9) | st.sampled_from(["input", "x"]), max_size=3),
    st.sampled_from(["lstm", "transformer", "word", "bpe", "adaptive", "sgd", "val/loss", "wilcoxon"]),
    st.sampled_from([10**400, -(10**400), 10**30]),
)  # fmt: skip
ANY = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@ANY
@given(st.data())
def test_arbitrary_settings_are_a_configuration_or_an_error_of_ours(tmp_path: Path, data: st.DataObject) -> None:
    command = data.draw(st.sampled_from(sorted(TREES)))
    tree = TREES[command]
    names = st.sampled_from(sorted(settings_of(tree)))
    flat = data.draw(st.dictionaries(names, VALUES, max_size=6))
    with suppress(ElmanError):
        built = build(tree, flat)
        assert all(coerce(settings_of(tree)[name], value) is not ... for name, value in flat.items())
        assert built == build(tree, flat)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(flat))
    with suppress(ElmanError):
        load_config(tree, tmp_path / "c.yaml")
    flags = Flags("train", "")
    flags.add_settings(tree)
    words = [f"--{name}={value}" for name, value in flat.items()]
    with suppress(ElmanError):
        _, given_ = flags.parse(words)
        build(tree, given_)


@ANY
@given(st.lists(st.text(max_size=12) | st.sampled_from(["--seed", "--seed=3", "--json", "--", "-h="]), max_size=4))
def test_arbitrary_words_on_the_command_line_are_flags_or_an_error_of_ours(words: list[str]) -> None:
    flags = Flags("train", "")
    flags.add_option("json", bool, "")
    flags.add_settings(ExperimentConfig)
    with suppress(ElmanError, SystemExit):  # -h shows the help
        flags.parse(words)


def test_an_address_of_a_store_is_refused_without_its_password(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("postgres://me:s3cr3t@host/db", "s3://me:s3cr3t@x", "mssql://me:s3cr@3t@host/db"):
        line = refuse("train", "--tracking.uri", uri, names=("tracking.uri", "sqlite:///PATH"))
        assert "s3cr" not in line
        assert "3t@" not in line
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ftp://me:s3cr3t@host")
    assert "s3cr3t" not in refuse("generate", "abc", names=("MLFLOW_TRACKING_URI",))


@pytest.mark.parametrize("device", ["/dev/zero", "/proc/self/mem", ".", "a\0b", "x" * 5000])
def test_a_configuration_that_has_no_end_or_is_no_file_is_one_line(refuse: Refuse, device: str) -> None:
    for command in ("train --config", "search --config", "compare --tournament", "doctor --config"):
        refuse(*command.split(), device, names=())
