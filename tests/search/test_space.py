from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from elman.config.plan import load_plan
from elman.errors import ElmanError
from elman.search.space import Space

STUDY = "study: {name: s, trials: 5}\n"


def space_of(tmp_path: Path, text: str, **flags: Any) -> Space:
    path = tmp_path / "search.yaml"
    path.write_text(text, encoding="utf-8")
    return Space(load_plan(path, {name.replace("__", "."): value for name, value in flags.items()}))


def test_the_schema_gives_the_distribution_and_the_file_only_the_bounds(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        STUDY + "space:\n  model.hidden_size: {low: 32, high: 100, step: 32}\n"
        "  optimizer.lr: {low: 1e-4, high: 1e-1, log: true}\n  model.cell: [lstm, gru]\n"
        "  model.variational: [[], [input, output]]\n  optimizer.max_grad_norm: [0.25, null]\n",
    )
    distributions = {d.name: d.distribution for d in space.dimensions}
    assert distributions["model.hidden_size"] == optuna.distributions.IntDistribution(32, 96, step=32)
    assert distributions["optimizer.lr"] == optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)
    assert isinstance(distributions["model.cell"], optuna.distributions.CategoricalDistribution)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    seen = set()
    for _ in range(30):
        trial = study.ask()
        point = space.suggest(trial)
        assert space.restored(trial.params) == point
        experiment = space.experiment(point)
        seen.add(experiment.model.variational)
        assert experiment.model.hidden_size in (32, 64, 96)
        study.tell(trial, 1.0)
    assert seen == {(), ("input", "output")}


def test_a_conditional_setting_is_searched_only_where_its_condition_holds(tmp_path: Path) -> None:
    text = (
        "study: {name: s, sampler: grid}\nspace:\n"
        "  model.layer_dropout: {choices: [0.1, 0.2], when: {model.num_layers: [2, 3]}}\n"
        "  model.num_layers: [1, 2, 3]\n"
    )
    points = space_of(tmp_path, text).grid()
    assert [tuple(p.values()) for p in points] == [(1,), (2, 0.1), (2, 0.2), (3, 0.1), (3, 0.2)]
    assert all(next(iter(p)) == "model.num_layers" for p in points)


def test_a_grid_has_every_point_once(tmp_path: Path) -> None:
    text = (
        "study: {name: s, sampler: grid}\nspace:\n  model.hidden_size: {low: 8, high: 24, step: 8}\n"
        "  model.dropout: {low: 0.0, high: 0.3, step: 0.1}\n"
    )
    points = [tuple(p.values()) for p in space_of(tmp_path, text).grid()]
    assert len(points) == len(set(points)) == 12
    assert {d for _, d in points} == {0.0, 0.1, 0.2, 0.3}


def test_known_points_take_the_base_s_values_where_they_say_nothing(tmp_path: Path) -> None:
    text = STUDY + (
        "settings: {model.dropout: 0.2}\nenqueue: [{model.hidden_size: 64}, other.yaml]\n"
        "space:\n  model.hidden_size: {low: 8, high: 256}\n  model.dropout: {low: 0.0, high: 0.5}\n"
    )
    (tmp_path / "other.yaml").write_text("model: {hidden_size: 128, dropout: 0.5}\ndata: {batch_size: 3}\n")
    assert space_of(tmp_path, text).enqueued == [
        {"model.hidden_size": 64, "model.dropout": 0.2},
        {"model.hidden_size": 128, "model.dropout": 0.5},
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("space: {model.hiden_size: [1]}", "space.model.hiden_size is not a setting. Did you mean model.hidden_size?"),
        ("space: {}", "space must map settings"),
        ("spaces: {model.hidden_size: [1]}", "spaces is not part of a search file. Did you mean space?"),
        ("space: {model.hidden_size: []}", "at least one choice"),
        ("space: {model.hidden_size: [8, 8]}", "the choice 8 twice"),
        ("space: {model.hidden_size: ['8']}", "space.model.hidden_size must be an integer, got '8'"),
        ("space: {model.hidden_size: [true]}", "must be an integer, got True"),
        ("space: {model.hidden_size: {low: 8}}", "has no high"),
        ("space: {model.hidden_size: {low: 8.5, high: 9}}", "low must be an integer, got 8.5"),
        ("space: {model.hidden_size: {low: 9, high: 8}}", "low 9 is above high 8"),
        ("space: {model.hidden_size: {low: 0, high: 8}}", "model.hidden_size must be at least 1, got 0"),
        ("space: {model.dropout: {low: 0.0, high: 1.0}}", "at least 0 and below 1"),
        ("space: {model.dropout: {low: 0.0, high: .inf}}", "high must be a number, got inf"),
        ("space: {model.dropout: {low: 0.0, high: 0.5, log: true}}", "log needs a positive low"),
        ("space: {model.dropout: {low: 0.0, high: 0.5, step: 0}}", "step must be positive"),
        ("space: {model.cell: {low: 0, high: 1}}", "is not a number: give a list of choices"),
        ("space: {model.cell: [lstm, lsmt]}", "got 'lsmt'"),
        ("space: {model.hidden_size: {lo: 1, high: 2}}", "has lo"),
        ("space: {model.cell: [lstm, gru], model.forget_bias: [0.0, 1.0]}", "which the schema refuses"),
        ("space: {model.cell: [transformer], model.hidden_size: {low: 8, high: 64, step: 4}}", "a multiple of"),
        ("space: {trainer.threads: [1]}", "cannot be searched"),
        ("space: {model.dropout: {choices: [0.1], when: {model.layers: 2}}}", "model.layers is not a setting"),
        ("space: {model.dropout: {choices: [0.1], when: {model.num_layers: two}}}", "must be an integer, got 'two'"),
        ("space: {model.dropout: [0.1]}\nenqueue: [{model.dropout: 0.2}]", "outside its bounds"),
        ("space: {model.dropout: [0.1]}\nenqueue: [{model.cell: gru}]", "is not in the space"),
        ("space: {model.dropout: [0.1]}\nbase: missing.yaml", "missing.yaml cannot be read"),
        ("space: {model.dropout: [0.1]}\nsettings: {model.cel: gru}", "Did you mean model.cell?"),
    ],
)
def test_a_wrong_space_is_refused_in_one_line_that_names_file_field_and_value(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(ElmanError) as caught:
        space_of(tmp_path, STUDY + text + "\n")
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert str(tmp_path) in message


def test_conditions_that_go_round_in_a_circle_are_refused(tmp_path: Path) -> None:
    text = STUDY + (
        "space:\n  model.num_layers: {choices: [1, 2], when: {model.dropout: 0.1}}\n"
        "  model.dropout: {choices: [0.1, 0.2], when: {model.num_layers: 2}}\n"
    )
    with pytest.raises(ElmanError, match="round in a circle"):
        space_of(tmp_path, text)


@pytest.mark.parametrize(
    ("study", "said"),
    [
        ("{metric: val/bits}", "study.metric must be one of"),
        ("{metric: [val/loss, val/loss]}", "study.metric"),
        ("{metric: [val/loss, model/parameters], pruner: median}", "none with two metrics"),
        ("{metric: model/parameters, pruner: median}", "not known before a training ends"),
        ("{pruner: wilcoxon}", "another where study.folds is null"),
        ("{pruner: hyperband, folds: 3}", "cut one training short"),
        ("{choose: one_standard_error}", "best where study.folds is null"),
        ("{folds: 1}", "study.folds must be at least 2"),
        ("{trials: 0}", "study.trials must be at least 1"),
        ("{minutes: -1}", "study.minutes must be a positive number"),
        ("{sampler: tpee}", "got 'tpee'"),
        ("{name: ../x}", "study.name"),
        ("{seed: -1}", "study.seed"),
        ("{samplr: tpe}", "Did you mean study.sampler?"),
        ("[1]", "study must be a mapping"),
    ],
)
def test_a_wrong_study_is_refused(tmp_path: Path, study: str, said: str) -> None:
    with pytest.raises(ElmanError) as caught:
        space_of(tmp_path, f"study: {study}\nspace: {{model.dropout: [0.1]}}\n")
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(STUDY + "settings: {model.cell: gru}\nspace: {model.dropout: [0.1]}\n", encoding="utf-8")
    plan = load_plan(path, {"study.trials": 2, "model.cell": "rnn", "search.workers": 3})
    assert (plan.config.study.trials, plan.base.model.cell, plan.config.search.workers) == (2, "rnn", 3)
    assert plan.config.study.name == "s"
