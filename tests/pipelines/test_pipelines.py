from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from elman.config.load import load_config, read_yaml
from elman.config.plan import load_plan
from elman.config.schema import ExperimentConfig, GenerationConfig
from elman.config.tournament import load_tournament
from elman.config.tree import flatten, flatten_mapping, override, settings
from elman.models.count import count_parameters
from elman.models.language_model import build_model
from elman.search.space import Space
from elman.tasks.generation import TextGenerator
from elman.tracking.store import RunStore
from elman.training.experiment import run_experiment
from elman.training.loading import load_model

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "pipelines" / "experiments").glob("*.yaml"))


def built(name: str, vocabulary_size: int) -> Any:
    config = load_config(ExperimentConfig, ROOT / "pipelines" / "experiments" / f"{name}.yaml")
    return build_model(
        config.model, vocabulary_size=vocabulary_size, num_inputs=vocabulary_size, start_id=1,
        context_length=config.data.sequence_length,
    )  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_experiment_loads_says_what_it_is_and_restates_no_default(path: Path) -> None:
    config = load_config(ExperimentConfig, path)
    assert config.name == path.stem
    assert path.read_text("utf-8").startswith("# ")
    known = settings(ExperimentConfig)
    said = flatten_mapping(ExperimentConfig, read_yaml(path))
    restated = [name for name, value in said.items() if known[name].default == value and name != "name"]
    assert restated == []


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines" / "searches").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_search_loads_and_its_space_is_sound(path: Path) -> None:
    plan = load_plan(path)
    assert path.read_text("utf-8").startswith("# ")
    space = Space(plan)
    assert space.dimensions
    assert len(space.enqueued) == len(plan.enqueue)
    if path.stem == "hidden-units":
        assert len(space.grid()) * (plan.config.study.folds or 0) == 18


@pytest.mark.parametrize(
    "path", sorted((ROOT / "pipelines" / "tournaments").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_tournament_loads_and_its_contestants_are_of_one_size(path: Path) -> None:
    plan = load_tournament(path)
    assert path.read_text("utf-8").startswith("# ")
    totals = []
    for config in plan.contestants.values():
        model = build_model(
            config.model, vocabulary_size=71, num_inputs=71, start_id=1, context_length=config.data.sequence_length
        )
        totals.append(count_parameters(model)["total"])
    assert min(totals) > 0.94 * max(totals)


def test_the_three_shakespeares_differ_in_their_cell_and_agree_in_size() -> None:
    totals = {cell: count_parameters(built(f"tiny-shakespeare-{cell}", 66))["total"] for cell in ("rnn", "lstm", "gru")}
    assert max(totals.values()) <= 800_000
    assert min(totals.values()) > 0.99 * 800_000
    rnn, *others = [flatten(load_config(ExperimentConfig, p)) for p in FILES if p.stem.startswith("tiny-shakespeare")]
    for other in others:
        assert {name for name in rnn if rnn[name] != other[name]} == {"name", "model.cell"}


def test_awd_lstm_has_the_papers_33_million_parameters() -> None:
    assert count_parameters(built("wikitext-2-awd-lstm", 33_278))["total"] == pytest.approx(33.5e6, rel=0.01)


def test_the_smoke_experiment_trains_records_reloads_and_generates(workplace: Path) -> None:
    config = load_config(ExperimentConfig, ROOT / "pipelines" / "experiments" / "smoke.yaml")
    store = RunStore()
    result = run_experiment(override(config, {"trainer.threads": 1}), store)
    assert store.find_run(result.run_id).status == "FINISHED"
    assert result.metrics["test/bits_per_byte"] < 5
    loaded = load_model(result.run_id, store)
    assert len(TextGenerator(loaded.model, loaded.tokenizer).complete("And ", GenerationConfig(length=50))[0]) == 50


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)


def test_make_knows_every_experiment_and_refuses_others() -> None:
    for path in FILES:
        done = make("--dry-run", f"train-{path.stem}")
        assert done.returncode == 0, done.stderr
        assert f"--config pipelines/experiments/{path.name}" in done.stdout
    refused = make("--dry-run", "train-nonsense")
    assert refused.returncode == 2
    assert "No rule to make target" in refused.stderr


def test_make_help_lists_every_target() -> None:
    listed = set(re.findall(r"^  make ([\w%-]+)", make("help").stdout, re.MULTILINE))
    wanted = {"setup", "train", "train-NAME", "evaluate", "generate", "compare", "ui", "test", "check", "clean"}
    assert wanted <= listed
