"""A run that is being written. What it logs goes to its outbox; nothing here waits for the store."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elman.tracking.outbox import Outbox
from elman.tracking.sender import Sender, as_dataset

if TYPE_CHECKING:
    from elman.tracking.store import RunStore

LONGEST_TAG = 5000


class Run:
    """A run that is being written.

    Attributes:
        id: Its id in the store; its mark, by which ``find_run`` knows it too, where the store was away
            when it began.
        metrics: Takes its metrics.
        answers: What the store said to the model and its registration, once the run has ended.
    """

    def __init__(self, store: RunStore, run_id: str, name: str, outbox: Outbox, sender: Sender) -> None:
        self.store, self.id, self.name = store, run_id, name
        self.metrics, self.sender = outbox, sender
        self.answers: dict[str, Any] = {}

    def flush(self) -> None:
        """Deliver all that waits, as far as the store takes it."""
        self.sender.drain(self.store.patience)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Tags; the same name again replaces one."""
        for name, value in tags.items():
            self.metrics.put("tag", name, str(value)[:LONGEST_TAG])

    def set_params(self, params: Mapping[str, str]) -> None:
        """Settings, each once."""
        for name, value in params.items():
            self.metrics.put("param", name, value)

    def describe(self, markdown: str) -> None:
        """What the UI shows as the run's description."""
        self.set_tags({"mlflow.note.content": markdown})

    def log_text(self, name: str, text: str) -> None:
        """A text artifact; the same name again replaces it."""
        self.metrics.put("file", name, None, text.encode("utf-8"))

    def log_json(self, name: str, value: object) -> None:
        """A JSON artifact."""
        self.log_text(name, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n")

    def log_file(self, path: Path, folder: str | None = None) -> bool:
        """A file as artifact, under its own name; returns whether the file itself may go now."""
        return self.metrics.put_file(path, folder)

    def log_figure(self, name: str, figure: Any) -> None:
        """A matplotlib figure as PNG; its name may have a folder."""
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120, bbox_inches="tight")
        self.metrics.put("file", name, None, picture.getvalue())

    def log_dataset(self, *, name: str, digest: str, source: str, splits: Mapping[str, Mapping[str, object]]) -> None:
        """The corpus as MLflow inputs: one per split, with its sizes as profile."""
        inputs = [
            as_dataset(name=name, digest=digest, source=source, split=split, profile=dict(profile))
            for split, profile in splits.items()
        ]
        self.metrics.put("dataset", name, inputs)

    def log_model(self, content: Mapping[str, Any], fill: Callable[[Path], object]) -> None:
        """The trained model: what ``send_pyfunc`` needs, and its files, which ``fill`` writes into a folder."""
        self.metrics.put_tree("model", "model", content, fill)

    def register(self, name: str, *, bits_per_byte: float, digest: str) -> None:
        """Register the model that was logged under a name."""
        self.metrics.put("register", name, {"bits_per_byte": bits_per_byte, "digest": digest})

    def history(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, by step."""
        return self.metrics.history(metric)
