"""Small studies: their trials train for a second."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elman.config.plan import SearchPlan
from elman.config.search import SearchConfig
from elman.config.tree import build
from elman.search.answer import SearchResult
from elman.search.pool import Pool, Seat
from elman.search.study import run_search
from elman.search.worker import serve
from outage_support import postgres_server
from support import tiny


class ThreadPool(Pool):
    """Workers that are threads of this process: what is tested of the driver is the same, without the imports."""

    def _spawn(self, index: int) -> Seat:
        here, there = self._context.Pipe()
        thread = threading.Thread(target=serve, args=(there, self._tracking), daemon=True)
        thread.start()
        return Seat(_AsProcess(thread), here, index)


class _AsProcess:
    pid = None

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread
        self.join = thread.join

    def is_alive(self) -> bool:
        return False


MakePlan = Callable[..., SearchPlan]


@pytest.fixture
def make_plan(workplace: Path, text_file: Path) -> MakePlan:
    """A plan around a tiny experiment; ``study``, ``search`` and ``constraints`` take dotted settings' last parts."""

    def make(
        space: dict[str, Any],
        *,
        study: dict[str, Any],
        search: dict[str, Any] | None = None,
        constraints: dict[str, Any] | None = None,
        enqueue: tuple[dict[str, Any], ...] = (),
        **settings: Any,
    ) -> SearchPlan:
        flat = {f"study.{key}": value for key, value in ({"name": "s"} | study).items()}
        flat |= {f"search.{key}": value for key, value in ({"seeds": 0} | (search or {})).items()}
        flat |= {f"constraints.{key}": value for key, value in (constraints or {}).items()}
        if "trials" not in study and "minutes" not in study and study.get("sampler") != "grid":
            flat["study.trials"] = 3
        base = tiny(text_file, **({"trainer__log_every_steps": 10} | settings))
        return SearchPlan("test.yaml", base, build(SearchConfig, flat), space, enqueue)

    return make


@pytest.fixture
def search(workplace: Path) -> Callable[[SearchPlan], SearchResult]:
    """Run a search with threads for workers."""
    return lambda plan: run_search(plan, make_pool=ThreadPool)


@pytest.fixture
def postgres() -> Iterator[Any]:
    """A real PostgreSQL server, empty, that the test may stop and start."""
    with postgres_server() as server:
        yield server


@pytest.fixture
def thread_pool() -> type[Pool]:
    """What starts workers that are threads."""
    return ThreadPool


@pytest.fixture(autouse=True)
def plots_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a study takes seconds: one test looks at the plots, the others leave them out."""
    if "test_a_grid_over_folds" not in request.node.name:
        monkeypatch.setattr("elman.search.report._plots", lambda *given: None)
