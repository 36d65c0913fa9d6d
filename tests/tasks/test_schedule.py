from __future__ import annotations

from typing import Any

import pytest

from elman.config.schema import OptimizerConfig
from elman.tasks.schedule import Schedule


def factors(points: list[float], **settings: Any) -> list[float]:
    schedule = Schedule(OptimizerConfig(**settings))
    return [schedule.factor(step=1000, progress=p, epoch=0) for p in points]


def test_constant_stays() -> None:
    assert factors([0, 0.5, 1], schedule="constant") == [1, 1, 1]


def test_cosine_falls_from_one_to_the_final_fraction() -> None:
    assert factors([0, 0.5, 1, 2], schedule="cosine", final_lr_fraction=0.1) == pytest.approx([1, 0.55, 0.1, 0.1])


def test_linear_falls_evenly_to_its_last_fraction() -> None:
    assert factors([0, 0.25, 0.5, 1], schedule="linear", final_lr_fraction=0.2) == pytest.approx([1, 0.8, 0.6, 0.2])


def test_one_cycle_rises_for_three_tenths_and_falls_after() -> None:
    low, mid, peak, later, end = factors([0, 0.15, 0.3, 0.65, 1], schedule="one_cycle", final_lr_fraction=0.0)
    assert (low, mid, peak, later, end) == pytest.approx((0.04, 0.52, 1, 0.5, 0))


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "one_cycle", "step", "plateau"])
def test_every_schedule_can_warm_up(kind: Any) -> None:
    schedule = Schedule(OptimizerConfig(schedule=kind, warmup_steps=10))
    cold = Schedule(OptimizerConfig(schedule=kind))
    for step in (0, 4, 9, 50):
        expected = cold.factor(step=step, progress=0.2, epoch=0) * min(1, (step + 1) / 10)
        assert schedule.factor(step=step, progress=0.2, epoch=0) == pytest.approx(expected)


def test_step_holds_the_rate_and_then_divides_it_every_epoch_as_zaremba_does() -> None:
    schedule = Schedule(OptimizerConfig(schedule="step", decay_start_epoch=6, decay_factor=1 / 1.2))
    rates = [schedule.factor(step=0, progress=0, epoch=e) for e in range(9)]
    assert rates == pytest.approx([1] * 6 + [1.2**-1, 1.2**-2, 1.2**-3])


def test_plateau_decays_after_its_patience_and_not_below_its_floor() -> None:
    config = OptimizerConfig(schedule="plateau", decay_patience=1, decay_factor=0.5, final_lr_fraction=0.3)
    schedule, rates = Schedule(config), []
    for loss in (3.0, 2.0, 2.1, 2.2, 1.9, 2.0, 2.0, 2.0, 2.0):
        schedule.validated(loss)
        rates.append(schedule.factor(step=0, progress=0, epoch=0))
    assert rates == [1, 1, 1, 0.5, 0.5, 0.5, 0.3, 0.3, 0.3]


def test_plateau_remembers_through_a_checkpoint() -> None:
    config = OptimizerConfig(schedule="plateau")
    first, second = Schedule(config), Schedule(config)
    first.validated(1.0)
    first.validated(2.0)
    second.load_state_dict(first.state_dict())
    assert second.factor(step=0, progress=0, epoch=0) == first.factor(step=0, progress=0, epoch=0) == 0.5
