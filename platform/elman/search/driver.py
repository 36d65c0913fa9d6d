"""The driver: asks for trials, hands them to workers, and tells what came of them.

One process owns a study. It alone asks and tells, so that the trials that end are exactly
as many as were wanted; its workers only train. Everything that it must know after a crash
stands in the study's storage: a trial that was running when its worker, or the driver
itself, was killed is failed and run again, once.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from elman.config.search import SearchConfig
from elman.config.tree import override
from elman.errors import ElmanError, SearchFailedError, TrackingError
from elman.search.agents import Agents, RemoteSeat
from elman.search.pool import LAST_WORDS_SECONDS, Pool, Seat
from elman.search.samplers import build_sampler
from elman.search.space import Point, Space
from elman.search.tally import KILLED, ranking, tally
from elman.search.trial import Job, Outcome, outcome_from, trial_configs
from elman.tracking.store import RunStore, StoppedError
from elman.training.callbacks import StopSignals

BEAT_SECONDS = 10.0
"""Between two signs of life that the driver leaves in the storage."""

DEAD_SECONDS = 60.0
"""Without a sign of life, after which a driver counts as dead."""

TICK_SECONDS = 0.5

AnySeat = Seat | RemoteSeat
CountParameters = Callable[[Any], int]


@dataclass
class _Live:
    trial: Trial
    seat: AnySeat
    point: Point
    told: bool = False
    run_id: str | None = None


class Driver:
    """Runs one study to its end.

    Args:
        study: Optuna's.
        space: What to vary.
        config: Budget, folds, ceilings.
        store: Where trials are recorded.
        parent: Id of the study's run.
        pool: This machine's workers.
        count_parameters: Parameters of an experiment's model, for the ceiling on them.
        progress: Told after every event: the tally, trials running, the best value, the budget's share done.
        note: Takes a line worth reading once.
    """

    def __init__(
        self,
        study: Study,
        space: Space,
        config: SearchConfig,
        store: RunStore,
        parent: str,
        pool: Pool,
        count_parameters: CountParameters,
        progress: Callable[[Driver], None],
        note: Callable[[str], None],
    ) -> None:
        self.study, self.space, self.config = study, space, config
        self._store, self._parent, self._pool = store, parent, pool
        self._count_parameters, self._progress, self._note = count_parameters, progress, note
        self._agents = Agents(study, note)
        self._live: dict[int, _Live] = {}
        self._grid: list[Point] = []
        if config.study.sampler == "grid":
            points = space.grid()
            known = [point for point in space.enqueued if point in points]
            self._grid = [*known, *(point for point in points if point not in known)]
        self.begun = time.time()
        minutes = config.study.minutes
        self.deadline = None if minutes is None else self.begun + 60 * minutes
        self._beat = 0.0
        self.spent_before = 0
        self._cleared: set[int] = set()

    @property
    def wanted(self) -> int | None:
        """Trials that end the study; None where only its minutes do."""
        if self._grid:
            return min(len(self._grid), self.config.study.trials or len(self._grid))
        return self.config.study.trials

    @property
    def running(self) -> int:
        """Trials that workers have in hand."""
        return sum(not live.told for live in self._live.values())

    # The loop ----------------------------------------------------------------------------

    def run(self, signals: StopSignals) -> None:
        """Run trials until the budget is spent.

        Raises:
            StoppedError: The user stopped it; the trials that ran are to be run again.
            TrackingError: Somebody else drives this study, or its storage is gone for good.
            SearchFailedError: Workers are killed again and again.
        """
        self._claim()
        try:
            self._recover()
            self.spent_before = tally(self._trials()).spent
            signals.at_once = False
            while True:
                self._fill()
                self._progress(self)
                if not self._live and not self._wants_more():
                    self.clear_checkpoints(thoroughly=True)
                    return
                self._listen()
                self._sign_of_life()
                if signals.received is not None:
                    raise StoppedError(signals.received)
        except StoppedError:
            self._stop()
            raise
        finally:
            signals.at_once = True
            self._pool.close()
            self._release()

    def _fill(self) -> None:
        """Give every free worker a trial, while the budget has some."""
        seats: list[AnySeat] = [*self._pool.seats, *self._agents.seats()]
        for seat in seats:
            while seat.ready and seat.job is None and self._wants_more():
                if self._give(seat):
                    break

    def _wants_more(self) -> bool:
        if self.deadline is not None and time.time() >= self.deadline:
            return False
        trials = self._trials()
        if not self._within(trials):
            return False
        waits = any(trial.state == TrialState.WAITING for trial in trials)
        return waits or not self._grid or self._next_of_grid(trials) is not None

    def _within(self, trials: list[FrozenTrial]) -> bool:
        wanted = self.config.study.trials
        return wanted is None or tally(trials).spent + self.running < wanted

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _next_of_grid(self, trials: list[FrozenTrial]) -> int | None:
        """The first point of the grid that no trial has, is running, or waits with."""
        taken = {t.user_attrs.get("grid") for t in trials if t.state != TrialState.FAIL or t.user_attrs.get("counts")}
        given_up = {t.user_attrs.get("grid") for t in trials if t.user_attrs.get("given_up")}
        return next((i for i in range(len(self._grid)) if i not in taken | given_up), None)

    def _give(self, seat: AnySeat) -> bool:
        """Ask for a trial and give it to a worker; False where it ended before it began."""
        trials = self._trials()
        if self._grid and not any(t.state == TrialState.WAITING for t in trials):
            index = self._next_of_grid(trials)
            assert index is not None
            self.study.enqueue_trial(self.space.stored(self._grid[index]), user_attrs={"grid": index})
        self.study.sampler = build_sampler(self.config.study, len(trials))
        trial = self.study.ask()
        point = self.space.suggest(trial)
        try:
            experiment = override(self.space.experiment(point), self._own_settings(trial.number))
            excess = self._excess(trial, experiment)
        except ElmanError as error:
            self._tell(trial.number, Outcome("failed", reason=" ".join(str(error).split()), is_users=True))
            return False
        if excess is not None:
            self._tell(trial.number, Outcome("pruned", reason=excess))
            return False
        study = self.config.study
        report = None if study.pruner == "none" else "folds" if study.folds else "validations"
        job = Job(
            number=trial.number,
            study=study.name,
            parent=self._parent,
            configs=trial_configs(experiment, study.folds),
            metrics=list(study.metrics),
            report=report,
            running_mean=study.pruner != "wilcoxon",
            deadline=self.deadline,
            max_minutes=self.config.constraints.minutes,
        )
        self._live[trial.number] = _Live(trial, seat, point)
        seat.send(job)
        return True

    def _own_settings(self, number: int) -> dict[str, Any]:
        return {
            "name": f"{self.config.study.name}-{number}",
            "trainer.threads": self._pool.threads,
            "trainer.sample_length": 0,
            "tracking.register": None,
            "tracking.system_metrics": False,
        }

    def _excess(self, trial: Trial, experiment: Any) -> str | None:
        ceiling = self.config.constraints.parameters
        if ceiling is None:
            return None
        parameters = self._count_parameters(experiment)
        _constrain(trial, "parameters", parameters / ceiling - 1)
        if parameters > ceiling:
            return f"{parameters:,} parameters are beyond constraints.parameters {ceiling:,}"
        return None

    # What workers say ----------------------------------------------------------------------

    def _listen(self) -> None:
        said: list[tuple[AnySeat, tuple[str, Any] | None]] = [*self._pool.messages(TICK_SECONDS)]
        said.extend(self._agents.messages())
        for seat, message in said:
            if message is None:
                self._lost(seat)
                continue
            kind, content = message
            if kind == "ready":
                seat.ready = True
            elif kind == "report":
                assert seat.job is not None
                seat.answer(self._report(self._live[seat.job.number], *content))
            elif kind == "outcome":
                assert seat.job is not None
                live = self._live[seat.job.number]
                live.told, live.run_id = True, content.run_id
                seat.answer(self._tell(seat.job.number, content))
            elif kind == "free":
                assert seat.job is not None
                del self._live[seat.job.number]
                seat.job = None

    def _report(self, live: _Live, step: int, value: float) -> bool:
        live.trial.report(value, step)
        return live.trial.should_prune()

    def _tell(self, number: int, outcome: Outcome) -> bool:
        """Tell Optuna what came of a trial; returns whether its checkpoint is worth keeping."""
        trial = self._trials()[number]
        if outcome.state == "stopped":
            self._fail(number, outcome.reason, again=True, counts_as_attempt=False)
            return False
        live = self._live.get(number)
        minutes = self.config.constraints.minutes
        if live is not None and minutes is not None:
            _constrain(live.trial, "minutes", 1.0 if "constraints.minutes" in outcome.reason else -1.0)
        if outcome.state == "failed":
            self._set(trial, "counts", True)
            self._set(trial, "is_users", outcome.is_users)
        if outcome.reason:
            self._set(trial, "reason", outcome.reason)
        # A driver that dies between this and the next line finishes the trial when it comes back.
        self._set(trial, "outcome", outcome.to_json())
        state = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[outcome.state]
        self._finish(number, state, outcome.values or None)
        if outcome.state == "failed":
            self._note(f"trial {number} failed: {outcome.reason}")
        return outcome.state == "complete" and self._among_the_best(number)

    def _finish(self, number: int, state: TrialState, values: list[float] | None = None) -> None:
        try:
            self.study.tell(number, values, state=state)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            # The storage had done it, and its answer was lost.
            if self._trials()[number].state != state:
                raise

    def _set(self, trial: FrozenTrial, key: str, value: Any) -> None:
        self.study._storage.set_trial_user_attr(trial._trial_id, key, value)

    def _among_the_best(self, number: int) -> bool:
        """Whether a trial is among the best few; the one that it displaces loses its checkpoint."""
        keep = self.config.search.keep_checkpoints
        if keep == 0 or self.config.study.folds is not None:
            return False
        ranked = ranking(self.study)
        if number not in [trial.number for trial in ranked[:keep]]:
            return False
        self.clear_checkpoints()
        return True

    def clear_checkpoints(self, *, thoroughly: bool = False) -> None:
        """Take their checkpoints from the trials that are not among the best few (any more).

        Args:
            thoroughly: Look again at those that had none: a worker may have delivered one late, or a
                driver that was killed have left it.
        """
        if self.config.study.folds is not None:
            return
        for trial in ranking(self.study)[self.config.search.keep_checkpoints :]:
            run_id = trial.user_attrs["outcome"]["run_id"]
            if run_id is not None and (thoroughly or trial.number not in self._cleared):
                self._store.delete_artifact(run_id, "checkpoints")
            self._cleared.add(trial.number)

    # Deaths --------------------------------------------------------------------------------

    def _lost(self, seat: AnySeat) -> None:
        """A worker is gone: fail its trial, have it run again once, and put a new worker in its place."""
        if seat.job is not None:
            number = seat.job.number
            live = self._live.pop(number)
            if live.told:  # killed while it recorded the end of a trial that counts already
                if live.run_id is not None:
                    self._end_run(live.run_id)
            else:
                self._fail(number, KILLED, again=True)
                self._note(f"trial {number}: its worker was killed; it is run again")
        deaths = tally(self._trials()).lost
        limit = 10 + (self.config.study.trials or len(self._grid))
        if deaths > limit:
            raise SearchFailedError(
                f"{deaths} workers were killed in this study: is there too little memory for search.workers "
                f"{len(self._pool.seats)}?"
            )
        if isinstance(seat, Seat):
            self._pool.replace(seat)
        else:
            self._agents.forget(seat)

    def _end_run(self, run_id: str) -> None:
        """Give the run of a finished trial the status that its worker could not give any more."""
        self._store.client.set_terminated(run_id, status="FINISHED")

    def _fail(self, number: int, reason: str, *, again: bool, counts_as_attempt: bool = True) -> None:
        trial = self._trials()[number]
        attempt = int(trial.user_attrs.get("attempt", 0))
        point = trial.system_attrs.get("fixed_params", trial.params)
        again = again and bool(point) and (attempt == 0 or not counts_as_attempt)
        self._set(trial, "reason", reason)
        if not again and bool(point):
            self._set(trial, "given_up", True)
        if again:
            kept = {key: trial.user_attrs[key] for key in ("grid",) if key in trial.user_attrs}
            attrs = {**kept, "attempt": attempt + int(counts_as_attempt), "retry_of": number}
            if not any(t.user_attrs.get("retry_of") == number for t in self._trials()):
                self.study.enqueue_trial(trial.params or point, user_attrs=attrs)
        self._finish(number, TrialState.FAIL)
        for run in self._store.children(self._parent, running=True):
            if run.tags.get("trial.number") == str(number):
                self._store.abandon(run.id, reason)

    def _recover(self) -> None:
        """Put in order what a driver that was killed left behind."""
        for trial in self._trials():
            if trial.state != TrialState.RUNNING:
                continue
            if "outcome" in trial.user_attrs:
                self._tell(trial.number, outcome_from(trial.user_attrs["outcome"]))
            else:
                self._fail(trial.number, "the search was killed", again=True, counts_as_attempt=False)
        states = {str(trial.number): trial.state for trial in self._trials()}
        for run in self._store.children(self._parent, running=True):
            state = states.get(run.tags.get("trial.number", ""))
            if state in (TrialState.COMPLETE, TrialState.PRUNED):
                self._end_run(run.id)
            else:
                self._store.abandon(run.id, "the search was killed")

    def _stop(self) -> None:
        """End the trials that run; the same command runs them again."""
        self._pool.stop()
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while any(isinstance(live.seat, Seat) for live in self._live.values()) and time.monotonic() < deadline:
            for seat, message in self._pool.messages(TICK_SECONDS):
                number = None if seat.job is None else seat.job.number
                if number is None or number not in self._live:
                    continue
                if message is None or message[0] == "free":
                    live = self._live.pop(number)
                    if message is None and not live.told:
                        self._fail(number, "the search was stopped", again=True, counts_as_attempt=False)
                    seat.job = None if message else seat.job
                elif message[0] == "report":
                    seat.answer(False)
                elif message[0] == "outcome":
                    self._live[number].told = True
                    seat.answer(self._tell(number, message[1]))
        for number, live in self._live.items():
            if not live.told:
                self._fail(number, "the search was stopped", again=True, counts_as_attempt=False)

    # Who drives ------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Refuse a study that somebody else drives."""
        held = self.study.user_attrs.get("driver")
        here = socket.gethostname()
        if held and not held["released"]:
            alive = _alive(held["pid"]) if held["host"] == here else time.time() - held["beat"] < DEAD_SECONDS
            if alive and (held["host"], held["pid"]) != (here, os.getpid()):
                raise TrackingError(
                    f"study.name {self.config.study.name} is run by process {held['pid']} on {held['host']}: "
                    "wait for it, add workers to it with --join, or choose another name."
                )
        self._sign_of_life(force=True)

    def _sign_of_life(self, *, force: bool = False, released: bool = False) -> None:
        if force or time.monotonic() - self._beat > BEAT_SECONDS:
            self._beat = time.monotonic()
            sign = {"host": socket.gethostname(), "pid": os.getpid(), "beat": time.time(), "released": released}
            self.study.set_user_attr("driver", sign)

    def _release(self) -> None:
        self._sign_of_life(force=True, released=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _constrain(trial: Trial, name: str, violation: float) -> None:
    """Tell the sampler how far beyond a ceiling a trial is; zero or less is within."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        trial.set_constraint(name, violation)
