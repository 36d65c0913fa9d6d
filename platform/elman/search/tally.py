"""Trials counted and ranked, and a study without an answer explained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from elman.errors import SearchFailedError, SearchSpaceError

KILLED = "its worker was killed"
"""The reason that a trial failed for, where it is not its own."""


@dataclass
class Tally:
    """Trials by what came of them."""

    complete: int = 0
    pruned: int = 0
    failed: int = 0
    lost: int = 0

    @property
    def spent(self) -> int:
        """Trials that the budget counts: those whose worker was killed are not among them."""
        return self.complete + self.pruned + self.failed


def tally(trials: list[FrozenTrial]) -> Tally:
    """Count trials by what came of them."""
    states = Counter(trial.state for trial in trials)
    failed = sum(bool(trial.user_attrs.get("counts")) for trial in trials if trial.state == TrialState.FAIL)
    return Tally(
        complete=states[TrialState.COMPLETE],
        pruned=states[TrialState.PRUNED],
        failed=failed,
        lost=sum(t.user_attrs.get("reason") == KILLED for t in trials if t.state == TrialState.FAIL),
    )


def ranking(study: Study) -> list[FrozenTrial]:
    """Completed trials, the best first by the first metric; equal ones by their number."""
    sign = 1 if study.directions[0] == StudyDirection.MINIMIZE else -1
    complete = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    return sorted(complete, key=lambda t: (sign * t.values[0], t.number))


def refuse_empty(study: Study) -> None:
    """Say, once, why a study has no answer.

    Raises:
        SearchSpaceError: Every trial failed by the user's mistake.
        SearchFailedError: Every trial failed or was pruned.
    """
    trials = study.get_trials(deepcopy=False)
    if any(trial.state == TrialState.COMPLETE for trial in trials):
        return
    reasons = Counter(trial.user_attrs["reason"] for trial in trials if "reason" in trial.user_attrs)
    if not reasons:
        raise SearchFailedError("no trial ended within the study's budget: give it more minutes.")
    reason, times = reasons.most_common(1)[0]
    message = f"no trial completed; {times} of {sum(reasons.values())} ended so: {reason}"
    if all(trial.user_attrs.get("is_users") for trial in trials if trial.user_attrs.get("reason") == reason):
        raise SearchSpaceError(message)
    raise SearchFailedError(message)


