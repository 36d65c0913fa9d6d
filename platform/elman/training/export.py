"""A trained model as files, and as an MLflow model that stands alone."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import elman
from elman.config.schema import ExperimentConfig
from elman.config.tree import flatten
from elman.models.language_model import LanguageModel
from elman.text.tokenizer import Tokenizer
from elman.tracking.store import Run

PACKED = (
    "__init__.py", "errors.py", "config/__init__.py", "config/schema.py", "models", "text/__init__.py",
    "text/tokenizer.py", "tasks/__init__.py", "tasks/generation.py",
)  # fmt: skip
"""What a model needs of elman to run without it."""

REQUIREMENTS = ("torch", "tokenizers", "safetensors", "numpy")


def save_model(folder: Path, model: LanguageModel, tokenizer: Tokenizer, config: ExperimentConfig) -> None:
    """Write weights.safetensors, architecture.json, tokenizer.json and config.json into ``folder``."""
    from safetensors.torch import save_model as save_safetensors

    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(model, str(folder / "weights.safetensors"))
    _write_json(folder / "architecture.json", model.architecture)
    _write_json(folder / "config.json", flatten(config))
    tokenizer.save(folder / "tokenizer.json")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _pack_code(into: Path) -> Path:
    source, target = Path(elman.__file__).parent, into / "elman"
    for name in PACKED:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source / name, target / name)
    return target


def log_model(run: Run, model: LanguageModel, tokenizer: Tokenizer, config: ExperimentConfig) -> str:
    """Log the model to its run as an MLflow pyfunc; returns its URI.

    MLflow's own torch formats serve neither: torch.export freezes the sequence length of
    an LSTM, and the other is a pickle.
    """
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    import mlflow.pyfunc

    # That it checks the example is no news.
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    example = tokenizer.decode(_example_ids(tokenizer))
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [
                ParamSpec("length", DataType.long, 200),
                ParamSpec("temperature", DataType.double, 0.8),
                ParamSpec("top_k", DataType.long, 0),
                ParamSpec("top_p", DataType.double, 1.0),
                ParamSpec("seed", DataType.long, 1),
            ]
        ),
    )
    with tempfile.TemporaryDirectory() as name:
        staging = Path(name)
        save_model(staging / "files", model, tokenizer, config)
        info = Model.log(
            artifact_path=None,
            name="model",
            flavor=mlflow.pyfunc,
            run_id=run.id,
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"files": str(staging / "files")},
            code_paths=[str(_pack_code(staging))],
            signature=signature,
            input_example={"prompt": [example]},
            # Left to itself MLflow runs the model to guess these.
            pip_requirements=[f"{package}=={metadata.version(package).split('+')[0]}" for package in REQUIREMENTS],
        )
    return str(info.model_uri)


def _example_ids(tokenizer: Tokenizer) -> list[int]:
    """Two frequent symbols that can be written."""
    return [i for i in range(tokenizer.vocabulary_size) if i != tokenizer.unknown_id][-2:]
