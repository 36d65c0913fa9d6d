"""A trained model as files, and as an MLflow model that stands alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import elman
from elman.models.language_model import LanguageModel
from elman.tasks.pyfunc import DEFAULTS
from elman.text.tokenizer import Tokenizer
from elman.tracking.run import Run

PACKED = (
    "__init__.py", "errors.py", "config/__init__.py", "config/schema.py", "models", "text/__init__.py",
    "text/tokenizer.py", "tasks/__init__.py", "tasks/generation.py", "tasks/pyfunc.py",
)  # fmt: skip
"""What a model needs of elman to run without it."""

REQUIREMENTS = ("torch", "tokenizers", "safetensors", "numpy")


def save_model(folder: Path, model: LanguageModel, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> None:
    """Write weights.safetensors, architecture.json, tokenizer.json and provenance.json into ``folder``."""
    from safetensors.torch import save_model as save_safetensors

    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(model, str(folder / "weights.safetensors"))
    _write_json(folder / "architecture.json", model.architecture)
    _write_json(folder / "provenance.json", facts)
    tokenizer.save(folder / "tokenizer.json")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _pack_code(into: Path) -> None:
    source, target = Path(elman.__file__).parent, into / "elman"
    for name in PACKED:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source / name, target / name)


def log_model(
    run: Run, model: LanguageModel, tokenizer: Tokenizer, facts: Mapping[str, Any], example: str
) -> None:
    """Log the model to its run as an MLflow pyfunc, with its provenance and a prompt as example."""

    def fill(place: Path) -> None:
        save_model(place / "files", model, tokenizer, facts)
        _pack_code(place)

    what = {"loader_module": "elman.tasks.pyfunc", "package": "elman", "example": example,
            "parameters": DEFAULTS, "requirements": REQUIREMENTS}  # fmt: skip
    run.log_model(what, fill)
