"""Workers on other machines: they and the driver speak through the study's storage.

An agent leaves a sign of life among the study's attributes; the driver writes each trial
that it gives away, and its answers, among the trial's. One writer a key, so that nothing
needs a lock:

- study: ``agent:ID`` {beat, seats, host, gone}, by the agent; ``finished``, by the driver
- trial: ``seat`` and ``job``, then ``answer`` {number, value}, by the driver;
  ``message`` {number, kind, content}, by the agent
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from elman.search.pool import LAST_WORDS_SECONDS, Pool, Seat
from elman.search.trial import Job, outcome_from
from elman.tracking.store import StoppedError
from elman.training.callbacks import StopSignals

POLL_SECONDS = 1.0

SILENT_SECONDS = 60.0
"""Without a sign of life, after which an agent counts as dead."""


@dataclass
class RemoteSeat:
    """A worker of an agent, as the driver sees it.

    Attributes:
        job: What it trains now.
        ready: Always; an agent offers a seat once its worker is up.
    """

    study: Study
    name: str
    job: Job | None = None
    ready: bool = True
    _trial_id: int = -1
    _heard: int = 0

    def send(self, job: Job) -> None:
        """Give it a trial."""
        self.job, self._heard = job, 0
        self._trial_id = self.study.get_trials(deepcopy=False)[job.number]._trial_id
        self._write("job", job.to_json())
        self._write("seat", self.name)

    def answer(self, value: Any) -> None:
        """Answer what it asked."""
        self._write("answer", {"number": self._heard, "value": value})

    def message(self) -> tuple[str, Any] | None:
        """What it said since the last time, if anything."""
        said = self.study._storage.get_trial(self._trial_id).user_attrs.get("message")
        if said is None or said["number"] <= self._heard:
            return None
        self._heard = said["number"]
        content = said["content"]
        return said["kind"], outcome_from(content) if said["kind"] == "outcome" else content

    def _write(self, key: str, value: Any) -> None:
        trial = self.study._storage.get_trial(self._trial_id)
        if not trial.state.is_finished():
            self.study._storage.set_trial_user_attr(self._trial_id, key, value)


@dataclass
class _Agent:
    beat: int
    changed: float
    seats: list[RemoteSeat] = field(default_factory=list)


class Agents:
    """The agents that the driver knows of."""

    def __init__(self, study: Study, note: Callable[[str], None]) -> None:
        self._study, self._note = study, note
        self._agents: dict[str, _Agent] = {}
        self._forgotten: set[str] = set()
        self._polled = 0.0

    def seats(self) -> list[RemoteSeat]:
        """Every worker of theirs."""
        return [seat for agent in self._agents.values() for seat in agent.seats]

    def forget(self, seat: RemoteSeat) -> None:
        """A seat that is gone gets no more trials until its agent shows itself again."""
        for agent in self._agents.values():
            agent.seats = [other for other in agent.seats if other is not seat]

    def messages(self) -> list[tuple[RemoteSeat, tuple[str, Any] | None]]:
        """What their workers say; None from one whose agent is gone."""
        if time.monotonic() - self._polled < POLL_SECONDS:
            return []
        self._polled = time.monotonic()
        said: list[tuple[RemoteSeat, tuple[str, Any] | None]] = []
        for seat in self.seats():
            if seat.job is None:
                continue
            message = seat.message()
            if message is None:
                continue
            if message[0] == "lost":
                said.append((seat, None))
                continue
            said.append((seat, message))
            if message[0] == "outcome":  # its trial is finished then, and can carry no further word
                said.append((seat, ("free", None)))
        spoken = {id(seat) for seat, _ in said}
        for name, sign in self._study.user_attrs.items():
            if name.startswith("agent:"):
                said.extend(entry for entry in self._watch(name, sign) if id(entry[0]) not in spoken)
        return said

    def _watch(self, name: str, sign: dict[str, Any]) -> list[tuple[RemoteSeat, None]]:
        agent = self._agents.get(name)
        if sign["gone"] or name in self._forgotten:
            return [] if agent is None else self._bury(name)
        if agent is None:
            if sign["beat"] == 0:
                return []
            agent = self._agents[name] = _Agent(sign["beat"] - 1, time.monotonic())
            self._note(f"{sign['seats']} workers of {sign['host']} joined")
        if sign["beat"] != agent.beat:  # its clock may differ from ours; that it moves is enough
            agent.beat, agent.changed = sign["beat"], time.monotonic()
            there = {seat.name for seat in agent.seats}
            names = [f"{name}/{i}" for i in range(sign["seats"])]
            agent.seats.extend(RemoteSeat(self._study, n) for n in names if n not in there)
        elif time.monotonic() - agent.changed > SILENT_SECONDS:
            return self._bury(name)
        return []

    def _bury(self, name: str) -> list[tuple[RemoteSeat, None]]:
        agent = self._agents.pop(name)
        self._forgotten.add(name)
        self._note(f"the workers of {name} are gone")
        return [(seat, None) for seat in agent.seats if seat.job is not None]


class Agent:
    """This machine's workers, in the service of a study that another machine drives.

    Args:
        study: Optuna's.
        pool: The workers.
        note: Takes a line worth reading once.
    """

    def __init__(self, study: Study, pool: Pool, note: Callable[[str], None]) -> None:
        self._study, self._pool, self._note = study, pool, note
        self._name = f"agent:{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        self._beat, self._beaten = 0, 0.0
        self._trials: dict[int, FrozenTrial] = {}
        """Seat's index → what it trains."""
        self._said: dict[int, int] = {}
        self._asked: set[int] = set()
        self._taken: set[int] = set()
        self.done = 0

    def run(self, signals: StopSignals) -> None:
        """Serve until the study is finished.

        Raises:
            StoppedError: The user stopped it; the driver has its trials run again.
        """
        signals.at_once = False
        polled = 0.0
        try:
            while not self._study.user_attrs.get("finished"):
                self._listen()
                self._sign_of_life()
                if time.monotonic() - polled > POLL_SECONDS:
                    polled = time.monotonic()
                    self._take()
                    self._answers()
                if signals.received is not None:
                    raise StoppedError(signals.received)
        except StoppedError:
            self._pool.stop()
            deadline = time.monotonic() + LAST_WORDS_SECONDS
            while self._trials and time.monotonic() < deadline:
                self._listen(stopping=True)
            raise
        finally:
            signals.at_once = True
            self._sign_of_life(gone=True)
            self._pool.close()

    def _sign_of_life(self, *, gone: bool = False) -> None:
        ready = sum(seat.ready for seat in self._pool.seats)
        if gone or (ready == len(self._pool.seats) and time.monotonic() - self._beaten > 5):
            self._beat, self._beaten = self._beat + 1, time.monotonic()
            sign = {"beat": self._beat, "seats": ready, "host": socket.gethostname(), "gone": gone}
            self._study.set_user_attr(self._name, sign)

    def _take(self) -> None:
        """Train what the driver gave to our seats."""
        seats = {f"{self._name}/{seat.index}": seat for seat in self._pool.seats}
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            seat = seats.get(trial.user_attrs.get("seat", ""))
            if seat is None or trial.number in self._taken or seat.job is not None or not seat.ready:
                continue
            self._taken.add(trial.number)
            self._trials[seat.index], self._said[seat.index] = trial, 0
            seat.send(Job(**(trial.user_attrs["job"] | self._own_part(trial))))

    def _own_part(self, trial: FrozenTrial) -> dict[str, Any]:
        """The threads are this machine's to choose."""
        configs = [{**config, "trainer.threads": self._pool.threads} for config in trial.user_attrs["job"]["configs"]]
        return {"configs": configs}

    def _say(self, seat: Seat, kind: str, content: Any) -> None:
        trial = self._trials[seat.index]
        self._said[seat.index] += 1
        message = {"number": self._said[seat.index], "kind": kind, "content": content}
        if not self._study._storage.get_trial(trial._trial_id).state.is_finished():
            self._study._storage.set_trial_user_attr(trial._trial_id, "message", message)

    def _listen(self, *, stopping: bool = False) -> None:
        for seat, message in self._pool.messages(POLL_SECONDS / 2):
            if message is None:
                if seat.index in self._trials:
                    self._say(seat, "lost", None)
                    self._trials.pop(seat.index)
                self._pool.replace(seat)
                continue
            kind, content = message
            if kind == "ready":
                seat.ready = True
            elif kind == "free":
                self._trials.pop(seat.index, None)
                self.done += 1
                seat.job = None
            else:
                self._say(seat, kind, content.to_json() if kind == "outcome" else list(content))
                self._asked.add(seat.index)
                if stopping:
                    seat.answer(False)

    def _answers(self) -> None:
        """Hand the driver's answers on."""
        for seat in self._pool.seats:
            if seat.index not in self._asked:
                continue
            trial = self._study._storage.get_trial(self._trials[seat.index]._trial_id)
            answer = trial.user_attrs.get("answer")
            if answer is not None and answer["number"] == self._said[seat.index]:
                self._asked.discard(seat.index)
                seat.answer(answer["value"])
            elif trial.state.is_finished():  # told before it could be answered: it counts, and nothing is kept
                self._asked.discard(seat.index)
                seat.answer(False)
