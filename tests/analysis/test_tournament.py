from __future__ import annotations

import json
from pathlib import Path

import pytest

from elman.analysis.tournament import run_tournament, standings
from elman.config.load import dump_yaml
from elman.config.tournament import load_tournament
from elman.errors import ConfigError, ElmanError
from elman.tracking.store import RunStore
from support import tiny


def write(folder: Path, text_file: Path, contest: str, contestants: str, more: str = "") -> Path:
    base = tiny(text_file, trainer__max_steps=40, trainer__sample_length=0, optimizer__lr=1e-2)
    (folder / "base.yaml").write_text(dump_yaml(base), encoding="utf-8")
    path = folder / "cells.yaml"
    path.write_text(f"base: base.yaml\ncontest: {contest}\ncontestants: {contestants}\n{more}", encoding="utf-8")
    return path


def test_contestants_of_equal_size_are_trained_with_the_same_seeds_and_judged(
    workplace: Path, text_file: Path, tmp_path: Path
) -> None:
    contestants = "{gru: {model.cell: gru}, hopeless: {model.cell: gru, optimizer.lr: 1.0e-9}}"
    plan = load_tournament(write(workplace, text_file, "{parameters: 3000, seeds: 2, trials: 0}", contestants))
    result = run_tournament(plan)
    rows = standings(result.contestants)
    assert [row["contestant"] for row in rows] == ["gru", "hopeless"]
    assert all(2700 < row["parameters"] <= 3000 for row in rows)
    [verdict] = result.verdicts
    assert str(verdict).startswith("gru is better than hopeless by ")
    assert verdict.difference == pytest.approx(rows[1]["test_bits_per_byte"] - rows[0]["test_bits_per_byte"], rel=0.03)
    store = RunStore()
    parent = store.find_run(result.run_id)
    assert (parent.status, parent.tags["winner"]) == ("FINISHED", "gru")
    children = store.children(parent.id)
    assert sorted((c.tags["contestant"], c.params["seed"]) for c in children) == [
        ("gru", "1"), ("gru", "2"), ("hopeless", "1"), ("hopeless", "2")
    ]  # fmt: skip
    recorded = json.loads(store.download(parent.id, "results.json", tmp_path).read_text())
    assert recorded["verdicts"][0]["verdict"] == str(verdict)
    assert "curves.png" in {a.path for a in store.client.list_artifacts(parent.id)}


@pytest.mark.parametrize(
    ("contest", "contestants", "said"),
    [
        ("{seeds: 2}", "{a: {}, b: {}}", "contest.parameters and contest.minutes are both null"),
        ("{parameters: 3000}", "{a: {}}", "two or more"),
        ("{parameters: 3000}", "{a: {model.cell: lsmt}, b: {}}", "contestants.a: model.cell must be one of"),
        ("{parameters: 3000}", "{a: {model.cel: lstm}, b: {}}", "Did you mean model.cell?"),
        ("{parameters: 3000}", "{a: 3, b: {}}", "contestants.a must be a mapping"),
        ("{parameters: 3000, seed: -1}", "{a: {}, b: {}}", "contest.seed"),
        ("{parametres: 3000}", "{a: {}, b: {}}", "Did you mean contest.parameters?"),
    ],
)
def test_a_wrong_tournament_is_refused_in_one_line(
    tmp_path: Path, text_file: Path, contest: str, contestants: str, said: str
) -> None:
    path = write(tmp_path, text_file, contest, contestants)
    with pytest.raises(ElmanError) as caught:
        load_tournament(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_contestants_on_different_texts_are_refused(workplace: Path, text_file: Path) -> None:
    plan = load_tournament(write(workplace, text_file, "{parameters: 3000}", "{a: {corpus.level: byte}, b: {}}"))
    with pytest.raises(ConfigError, match="must share their corpus"):
        run_tournament(plan)
    assert RunStore().runs() == []
