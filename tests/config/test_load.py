from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from elman.config.load import Flags, dump_yaml, load_config, read_yaml
from elman.config.schema import ExperimentConfig, GenerationConfig
from elman.config.tree import override
from elman.errors import ConfigError, ElmanError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_override_the_file_and_the_file_overrides_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 5\nmodel: {hidden_size: 7, num_layers: 2}\n")
    config = load_config(ExperimentConfig, path, {"model.hidden_size": 9})
    assert (config.seed, config.model.hidden_size, config.model.num_layers) == (5, 9, 2)
    assert config.model.embedding_size == ExperimentConfig().model.embedding_size


def test_a_dumped_configuration_reads_back_equal(tmp_path: Path) -> None:
    changes = {"model.variational": ["input"], "corpus.name": "día: #1", "optimizer.lr": 1e-5, "trainer.patience": 3}
    config = override(ExperimentConfig(), changes)
    assert load_config(ExperimentConfig, write(tmp_path, dump_yaml(config))) == config


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    assert load_config(ExperimentConfig, write(tmp_path, "optimizer: {lr: 1e-3}")).optimizer.lr == 1e-3


@pytest.mark.parametrize(
    "text",
    [
        "model: {hiden_size: 1}", "model: 3", "[1, 2]", "seed: : 1", "a: 1\na: 2", "model: {dropout: 1.0}",
        "model: {hidden_size: '12'}", "a: &x [1]\nb: *x", "!!python/object/apply:os.system ['true']", "? [1]\n: 2",
        "seed: .nan", "- \t-", "seed: 2023-01-01", "model: {dropout: .inf}", "\x00", "seed: !!binary aGk=",
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as refusal:
        load_config(ExperimentConfig, path)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


def test_a_python_tag_runs_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    with pytest.raises(ConfigError):
        read_yaml(write(tmp_path, f"!!python/object/apply:pathlib.Path.touch [{victim}]"))
    assert not victim.exists()


def test_a_missing_file_a_folder_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    huge = write(tmp_path, "#" * 1_000_001)
    for path in (tmp_path / "none.yaml", tmp_path, huge):
        with pytest.raises(ConfigError, match=str(path)):
            read_yaml(path)


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60) | st.text(alphabet="{}[]:,-&*!?'\"#|> \n\tab1.", max_size=60))
def test_arbitrary_text_is_a_configuration_or_an_error_of_ours(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_config(ExperimentConfig, path)
    except ElmanError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 - or none is raised


@pytest.fixture
def flags() -> Flags:
    made = Flags("train", "Train.")
    made.add_option("json", bool, "JSON.")
    made.add_settings(ExperimentConfig)
    return made


def test_only_the_flags_that_were_given_are_reported(flags: Flags) -> None:
    values, given_flags = flags.parse(["--model.hidden_size", "12", "--json", "--optimizer.lr=1e-3"])
    assert given_flags == {"model.hidden_size": 12, "json": True, "optimizer.lr": 0.001}
    assert values["seed"] == ExperimentConfig().seed


def test_flags_take_null_lists_and_truth_values(flags: Flags) -> None:
    arguments = ["--trainer.max_epochs", "null", "--model.variational", "[input]", "--model.tie_weights", "true"]
    _, given_flags = flags.parse(arguments)
    assert given_flags == {"trainer.max_epochs": None, "model.variational": ("input",), "model.tie_weights": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.hiden_size", "3"], "Did you mean --model.hidden_size"),
        (["--hidden_size", "3"], "Did you mean --model.hidden_size"),
        (["--model.hidden_size", "abc"], "--model.hidden_size must be an integer, got abc."),
        (["--trainer.max_epochs", "x"], "--trainer.max_epochs must be an integer or null, got x."),
        (["--model.cell", "foo"], "--model.cell must be one of rnn, lstm, gru"),
        (["extra"], "unrecognized arguments: extra"),
        (["--name"], "expected one argument"),
        (["--seed", "3", "--optimizer.lr", "1" * 400, "--name", "x"], "--optimizer.lr must be at most 1.8e+308"),
        (["--name", "x", f"--optimizer.lr={'1' * 400}"], "--optimizer.lr must be at most 1.8e+308"),
        (["--optimizer.betas", f"[0.9, {'1' * 400}]"], "--optimizer.betas must be"),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(flags: Flags, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        flags.parse(arguments)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_dataclass_is_built_from_its_own_flags_alone() -> None:
    made = Flags("generate", "Generate.")
    made.add_settings(GenerationConfig)
    _, given_flags = made.parse(["--top_k", "5", "--temperature", "0"])
    assert made.build(GenerationConfig, given_flags) == GenerationConfig(top_k=5, temperature=0.0)
