from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from elman.analysis.remedy import Gap, RemedyResult, Trial, _judge, run_remedies
from elman.config.schema import ExperimentConfig
from elman.errors import ElmanError
from elman.tracking.store import RunStore
from elman.training.experiment import run_experiment
from support import make_text, tiny


def random_text(path: Path) -> Path:
    """Noise: all that can be learnt of it is learnt by heart."""
    draw = random.Random(3)
    path.write_text("".join(draw.choices("abcdefgh", k=1500)), encoding="utf-8")
    return path


def overfitting(text: Path, **settings: Any) -> ExperimentConfig:
    return tiny(
        text, model__cell="gru", model__hidden_size=48, data__batch_size=4, trainer__max_steps=200,
        trainer__validate_every_steps=50, optimizer__lr=1e-2, trainer__sample_length=0, corpus__test_fraction=0.0,
        corpus__validation_fraction=0.3, **settings,
    )  # fmt: skip


def test_a_run_that_overfits_is_told_so_and_every_remedy_is_tried_from_its_settings(
    workplace: Path, tmp_path: Path
) -> None:
    config = overfitting(random_text(tmp_path / "noise.txt"))
    store = RunStore()
    subject = run_experiment(config, store)
    result = run_remedies(subject.run_id, store)
    assert result.gap.overfits
    assert result.gap.validation == pytest.approx(subject.metrics["val/bits_per_byte"], rel=0.03)
    assert {trial.remedy for trial in result.trials} == {"fewer hidden units", "weight decay", "dropout", "more data"}
    for trial in result.trials:
        assert trial.run_id is not None, trial.reason
        run = store.find_run(trial.run_id)
        assert run.params["seed"] == "1"
        assert run.params["trainer.max_steps"] == "200"
        changed = {k for k, v in trial.changes.items() if v is not None}
        for name in {"model.hidden_size", "model.dropout", "optimizer.weight_decay", "corpus.training_fraction"}:
            value = store.find_run(subject.run_id).params[name]
            assert (run.params[name] != value) == (name in changed), (trial.remedy, name)
        assert trial.gain == pytest.approx(result.baseline_bits - run.metrics["best/bits_per_byte"], abs=1e-6)
    assert result.recommendation.split(":")[0] in ("Use fewer hidden units", "Use weight decay", "Use dropout") or (
        "Get more text" in result.recommendation or "None of the remedies" in result.recommendation
    )
    parent = store.find_run(result.run_id)
    assert (parent.status, parent.tags["kind"]) == ("FINISHED", "remedy")
    assert len(store.children(parent.id)) == len(result.trials)
    recorded = json.loads(store.download(parent.id, "remedies.json", tmp_path).read_text())
    assert recorded["recommendation"] == result.recommendation


def test_a_run_that_does_not_overfit_is_left_alone(workplace: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(make_text(6000), encoding="utf-8")
    store = RunStore()
    subject = run_experiment(tiny(path, trainer__max_steps=30), store)
    result = run_remedies(subject.run_id, store)
    assert not result.gap.overfits
    assert result.trials == []
    assert "Nothing to mend" in result.recommendation


def judged(gains: dict[str, float], curve: tuple[float, float], baseline: float = 2.0) -> RemedyResult:
    gap = Gap(train=1.0, validation=baseline, error=0.01, risen=0.0)
    result = RemedyResult("r", "s", gap, baseline, 1.0)
    result.trials = [Trial(name, {"model.dropout": 0.2}, baseline - gain, gain) for name, gain in gains.items()]
    result.trials += [Trial("more data", {"corpus.training_fraction": f}, bits, baseline - bits)
                      for f, bits in zip((0.25, 0.5), curve, strict=True)]  # fmt: skip
    _judge(result)
    return result


def test_the_remedy_that_bought_most_is_recommended() -> None:
    result = judged({"dropout": 0.08, "weight decay": 0.03, "fewer hidden units": -0.1}, (2.05, 2.02))
    assert result.best is not None
    assert result.best.remedy == "dropout"
    assert result.recommendation.startswith("Use dropout: 0.080 bits per byte better")
    assert "--model.dropout 0.2" in result.recommendation


def test_more_text_is_recommended_where_the_learning_curve_still_falls() -> None:
    result = judged({"dropout": 0.01}, (2.9, 2.4))
    assert result.next_doubling == pytest.approx(0.4 * 0.4 / 0.5)
    assert result.recommendation.startswith("Get more text")


def test_nothing_is_recommended_where_nothing_helped() -> None:
    result = judged({"dropout": -0.01, "weight decay": 0.001}, (2.0, 2.0))
    assert result.best is None
    assert "None of the remedies" in result.recommendation


def test_a_run_that_is_no_training_is_refused(workplace: Path) -> None:
    store = RunStore()
    with store.open_run("s", {}, {"kind": "search"}) as run:
        pass
    with pytest.raises(ElmanError, match="is a search, not a training"):
        run_remedies(run.id, store)
    with pytest.raises(ElmanError, match="There is no run"):
        run_remedies("0" * 32, store)
