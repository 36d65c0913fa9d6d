"""Kill trainings, resume them, and compare what comes of it to a training that was never killed.

    python tests/torture.py [KILLS] [SEED]

Every case is trained once in peace. Then it is trained again and again, each time killed with
SIGKILL at random moments until it ends, and once at every place where a kill is nastiest. Weights,
optimizer, generators, samples and every row of every metric must be the same, to the bit.

A process that has loaded the libraries and has no threads forks the trainings: a kill costs a
second, not ten.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

COMMON: dict[str, Any] = {
    "model__num_layers": 2,
    "model__dropout": 0.2,
    "model__embedding_dropout": 0.1,
    "data__variable_length": True,
    "trainer__max_steps": None,
    "trainer__max_epochs": 3,
    "trainer__accumulate_windows": 2,
    "trainer__log_every_steps": 3,
    "trainer__checkpoint_every_steps": 4,
}
ASGD: dict[str, Any] = {
    "optimizer__name": "nt_asgd",
    "optimizer__lr": 20.0,
    "optimizer__max_grad_norm": None,
    "optimizer__schedule": "constant",
    "optimizer__nonmonotone_interval": 1,
    "trainer__validate_every_steps": 3,
}
CASES: dict[str, dict[str, Any]] = {
    "lstm": {**COMMON, **ASGD, "model__cell": "lstm", "model__weight_dropout": 0.3,
             "model__variational": ["embedding", "input", "layer", "output"], "trainer__patience": 6},
    "rnn": {**COMMON, "model__cell": "rnn", "optimizer__schedule": "plateau", "model__weight_dropout": 0.2,
            "trainer__validate_every_steps": 5},
    "gru": {**COMMON, "model__cell": "gru", "model__variational": ["layer", "output"], "optimizer__name": "adamw",
            "optimizer__schedule": "cosine"},
    "transformer": {**COMMON, "model__cell": "transformer", "model__num_heads": 2, "model__embedding_dropout": 0.0,
                    "optimizer__schedule": "one_cycle", "data__variable_length": False},
    "patient": {**COMMON, "model__cell": "gru", "optimizer__name": "sgd", "optimizer__lr": 1e-9,
                "trainer__max_epochs": 30, "trainer__patience": 3, "trainer__validate_every_steps": 4,
                "trainer__sample_length": 0},
    "streamed": {"corpus__streaming": True, "corpus__streaming_sample": 2000, "model__dropout": 0.2,
                 "trainer__max_steps": 30, "trainer__validate_every_steps": 7, "trainer__checkpoint_every_steps": 4,
                 "trainer__accumulate_windows": 2, "trainer__log_every_steps": 3},
}  # fmt: skip

STEP = "elman.tasks.language_modeling:LanguageModeling.training_step"
EPOCH = "elman.tasks.language_modeling:LanguageModeling.on_train_epoch_start"
VALIDATION = "elman.tasks.language_modeling:LanguageModeling.validation_step"
VALIDATED = "elman.tasks.language_modeling:LanguageModeling.on_validation_end"
WRITE = "elman.training.checkpoint:_Hashing.write"
SYNC = "elman.training.checkpoint:sync_folder"
DELIVER = "elman.tracking.outbox:Outbox.flush"
SAMPLE = "elman.training.callbacks:Samples.on_validation_end"
HAND_OVER = "elman.tracking.run:Run.log_file"
DELIVERED = "elman.tracking.outbox:Outbox.mark"
CONCLUDE = "elman.training.experiment:log_model"
CREATE = "elman.tracking.store:RunStore.create_run"
LOCK = "elman.training.lock:FolderLock.__enter__"

Kill = tuple[str, int, str]
"""Place, which of its calls, before or after."""

NASTY: list[Kill] = [
    (STEP, 1, "before"), (STEP, 14, "after"), (EPOCH, 2, "before"), (EPOCH, 3, "after"), (VALIDATION, 3, "after"),
    (VALIDATED, 2, "before"), (VALIDATED, 1, "after"), (WRITE, 5, "before"), (WRITE, 60, "after"), (SYNC, 2, "before"),
    (SYNC, 5, "after"), (SYNC, 9, "before"), (DELIVER, 2, "after"), (SAMPLE, 2, "after"), (HAND_OVER, 1, "after"),
    (DELIVERED, 6, "before"), (DELIVERED, 9, "after"),
    (CONCLUDE, 1, "before"), (CONCLUDE, 1, "after"), (CREATE, 1, "before"), (CREATE, 1, "after"), (LOCK, 1, "before"),
]  # fmt: skip

IGNORED = ("throughput/", "training/seconds", "training/tokens_per_second", "system/")
"""Metrics that tell the time."""


# In the forked process -------------------------------------------------------------------


def _resolve(place: str) -> tuple[Any, str]:
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def patch(place: str, around: Callable[..., Any]) -> None:
    """Replace ``module:Class.method`` by ``around(original, *arguments)``."""
    owner, name = _resolve(place)
    original = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: around(original, *a, **k))


def _act_at(place: str, call: int, when: str, act: Callable[[], None]) -> None:
    count = 0

    def around(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        mine = count == call
        if mine and when == "before":
            act()
        result = original(*arguments, **named)
        if mine and when == "after":
            act()
        return result

    patch(place, around)


def _train(job: dict[str, Any]) -> None:
    """One training, fresh or resumed; whatever is to go wrong with it is arranged first."""
    from elman.config.load import from_flat
    from elman.tracking import outbox, sender
    from elman.tracking.store import RunStore
    from elman.training.experiment import resume_experiment, run_experiment
    from elman.training.progress import PlainReporter

    os.environ["ELMAN_CACHE"] = job["cache"]
    outbox.WRITE_SECONDS = sender.SEND_SECONDS = 0.05
    number = getattr(signal, job.get("signal", "SIGKILL"))
    for place, call, when in job.get("kills", []):
        _act_at(place, call, when, lambda: os.kill(os.getpid(), number))
    for path in job.get("forget", []):

        def forgetting(original: Any, *arguments: Any, keys: str = path) -> Any:
            found = original(*arguments)
            *parents, leaf = keys.split(".")
            inner = found
            for parent in parents:
                inner = inner[parent]
            inner[leaf] = job["instead"].get(keys)
            return found

        patch("elman.training.checkpoint:read_checkpoint", forgetting)
    patch("elman.tracking.run:Run.log_figure", lambda original, *arguments: None)  # it only takes time
    if job.get("no_random"):
        patch("elman.training.keeper:restore_random_state", lambda original, state: None)
    if job.get("full") is not None:
        first, last = job["full"]
        count = 0

        def full(original: Any, path: Path, write: Any) -> str:
            nonlocal count
            count += 1
            if first <= count <= last:
                raise OSError(28, "No space left on device")
            return original(path, write)

        patch("elman.training.checkpoint:write_whole", full)
    if job.get("resume"):
        resume_experiment(job["resume"], job.get("changes"), RunStore(), PlainReporter())
    else:
        run_experiment(from_flat(job["config"]), RunStore(), PlainReporter(), go_on=True)


def _child(job: dict[str, Any]) -> int:
    os.chdir(job["work"])
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        _train(job)
    except Exception as error:
        if type(error).__name__ == "StoppedError":
            return 143
        traceback.print_exc()
        return 2
    return 0


def _zygote() -> None:
    """Load everything by training once, then fork a training for each line of standard input."""
    import gc

    jobs = os.fdopen(os.dup(0), "r")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        from support import make_text, tiny

        Path("text.txt").write_text(make_text(300), encoding="utf-8")
        from elman.tracking.store import RunStore
        from elman.training.experiment import run_experiment

        os.environ["ELMAN_CACHE"] = str(Path(name) / "cache")
        run_experiment(tiny(Path("text.txt").absolute(), trainer__max_steps=2), RunStore())
        os.chdir("/")
    gc.freeze()
    print("ready", file=answers, flush=True)
    for line in jobs:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_child(job))
        status, deadline = None, None
        if job.get("seconds") is not None:
            deadline = time.monotonic() + job["seconds"]
        while status is None:
            done, code = os.waitpid(child, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(code)
            elif deadline is not None and time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                deadline = None
            else:
                time.sleep(0.002)
        print(json.dumps({"status": status}), file=answers, flush=True)


# In the process that looks on ------------------------------------------------------------


class Bench:
    """Trains in forked processes, each training in a folder of its own.

    Args:
        folder: For the folders, the text and the corpus cache.
        database: An MLflow database with its tables made.
    """

    def __init__(self, folder: Path, database: Path) -> None:
        from support import make_text

        self.folder, self._database = folder, database
        self.text = folder / "text.txt"
        self.text.write_text(make_text(560, seed=3), encoding="utf-8")
        self._count = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with (folder / "zygote.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--zygote"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=environment, cwd=folder, stderr=log,
            )  # fmt: skip
        assert self._process.stdout is not None
        ready = self._process.stdout.readline()
        assert ready == "ready\n", (folder / "zygote.log").read_text()

    def close(self) -> None:
        """End the process that forks."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def place(self) -> Path:
        """A new working directory with an empty store."""
        from support import put_store

        self._count += 1
        work = self.folder / f"work-{self._count}"
        put_store(work, self._database)
        return work

    def run(self, work: Path, case: str | dict[str, Any], **job: Any) -> int:
        """Train in ``work`` until the end or until it is killed: go on with what is there, or begin.

        Returns:
            The exit status; minus the signal's number where a signal ended it.
        """
        from elman.config.tree import flatten
        from support import tiny

        settings = CASES[case] if isinstance(case, str) else case
        config = flatten(tiny(self.text, **settings))
        config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
        job |= {"work": str(work), "cache": str(self.folder / "cache"), "config": config}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(json.loads(self._process.stdout.readline())["status"])

    def finish(self, work: Path, case: str | dict[str, Any], **job: Any) -> dict[str, Any]:
        """Train to the end, and return the outcome."""
        status = self.run(work, case, **job)
        assert status == 0, (work / "log").read_text()[-3000:]
        return outcome(work)


def _database(work: Path) -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(work / "mlruns" / "mlflow.db"))


def begun_run(work: Path) -> str | None:
    """The only run in a store; None where there is none yet."""
    with _database(work) as database:
        found = [row[0] for row in database.execute("SELECT run_uuid FROM runs")]
    assert len(found) <= 1, "a second run"
    return found[0] if found else None


def outcome(work: Path) -> dict[str, Any]:
    """Everything that a finished run came to, but for what tells the time."""
    import torch

    with _database(work) as database:
        rows = list(database.execute("SELECT key, step, value, is_nan FROM metrics ORDER BY key, step"))
        statuses = [row[0] for row in database.execute("SELECT status FROM runs")]
    assert statuses == ["FINISHED"], statuses
    places = [(key, step) for key, step, _, _ in rows]
    twice = sorted({place for place in places if places.count(place) > 1})
    assert not twice, f"recorded twice: {twice[:5]}"
    [folder] = (work / "mlruns" / "artifacts").glob("*/*/artifacts")
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    del last["callbacks"]["Limits"]["seconds"], last["callbacks"]["Recorder"]["seconds"]
    loops = last["loops"]["fit_loop"]
    parts = ("state_dict", "optimizer_states", "carry", "schedule", "progress", "averaged", "callbacks", "resume",
             "epoch", "global_step")  # fmt: skip
    return {
        "rows": [(key, step, value) for key, step, value, _ in rows if not key.startswith(IGNORED)],
        "places": places,
        "last": {part: last[part] for part in parts},
        "loops": {key: loops[key] for key in ("epoch_loop.batch_progress", "epoch_progress")},
        "best": {part: best[part] for part in ("state_dict", "averaged", "global_step", "schedule")},
        "samples": [path.read_text(encoding="utf-8") for path in folder.glob("samples.txt")],
    }


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two outcomes differ."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [path]
    if type(one) is not type(other):
        return [f"{path}: {one!r:.60} / {other!r:.60}"]
    if isinstance(one, dict):
        if set(one) != set(other):
            return [f"{path}: {sorted(map(str, set(one) ^ set(other)))[:5]}"]
        return [found for key in one for found in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            odd = [x for x in one if x not in other][:3] + [x for x in other if x not in one][:3] if path else []
            return [f"{path}: {len(one)} / {len(other)} {odd}"]
        return [found for i, (a, b) in enumerate(zip(one, other, strict=True))
                for found in differences(a, b, f"{path}[{i}]")]  # fmt: skip
    return [] if one == other or (one != one and other != other) else [f"{path}: {one!r:.80} / {other!r:.80}"]


def torture(bench: Bench, case: str, kills: int, draw: random.Random) -> tuple[int, int, list[str]]:
    """Kill a case at random until so many kills were survived.

    Returns:
        Kills, trainings that were brought to their end, and what differed.
    """
    peace = bench.finish(bench.place(), case)
    begun = time.monotonic()
    survived, ended, wrong = 0, 0, differences(peace, bench.finish(bench.place(), case))
    length = time.monotonic() - begun
    nasty = [*NASTY]
    while survived < kills:
        work = bench.place()
        mine = 0
        if nasty:
            mine += bench.run(work, case, kills=[nasty.pop(0)]) == -signal.SIGKILL
        for _ in range(draw.randrange(0 if mine else 1, 5)):
            if is_finished(work):
                break
            begun = time.monotonic()
            status = bench.run(work, case, seconds=draw.uniform(0.02, length))
            if status == 0:  # the machine is less busy than it was
                length = max(0.5, min(length, time.monotonic() - begun))
            assert status in (0, -signal.SIGKILL), (work / "log").read_text()[-3000:]
            mine += status != 0
        try:
            found = outcome(work) if is_finished(work) else bench.finish(work, case)
            wrong += [f"{case} {work.name} {difference}" for difference in differences(peace, found)[:5]]
        except AssertionError as error:
            wrong.append(f"{case} {work.name} {error}")
        survived, ended = survived + mine, ended + 1
    return survived, ended, wrong


def is_finished(work: Path) -> bool:
    """Whether the run is; a kill may come when all is done."""
    return begun_run(work) is not None and status_of(work) == "FINISHED"


def status_of(work: Path) -> str:
    """The only run's status."""
    with _database(work) as database:
        [[status]] = database.execute("SELECT status FROM runs")
    return str(status)


def make_database(folder: Path) -> Path:
    """An MLflow database with its tables made."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        from elman.tracking.store import RunStore

        RunStore()
    finally:
        os.chdir(before)
    return folder / "mlruns" / "mlflow.db"


def main() -> int:
    """Torture every case."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1000)
    print(f"{kills} kills, seed {seed}")
    draw, every = random.Random(seed), 0
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), make_database(Path(name)))
        try:
            for case in CASES:
                survived, ended, found = torture(bench, case, -(-kills // len(CASES)), draw)
                every += survived
                wrong += found
                print(f"{case}: {survived} kills in {ended} trainings, {len(found)} differences", flush=True)
                for line in found[:20]:
                    print(f"  {line}", flush=True)
        finally:
            bench.close()
    print(f"{every} kills, {len(wrong)} differences")
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--zygote"]:
        _zygote()
    else:
        sys.exit(main())
