"""The model as MLflow serves it: prompts in, continuations out.

MLflow calls ``_load_pyfunc`` of this module ("loader module"), which is packed with the
model beside the few others that it needs: no pickle, and no installed elman.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from elman.config.schema import GenerationConfig
from elman.models.language_model import LanguageModel
from elman.tasks.generation import TextGenerator
from elman.text.tokenizer import Tokenizer

DEFAULTS: dict[str, int | float] = {"length": 200, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 1}
"""Parameters of predict; top_k 0 keeps every token, since MLflow's parameters have no null."""


class Continuations:
    """Continues prompts of any length.

    Args:
        generator: Model and tokenizer.
    """

    def __init__(self, generator: TextGenerator) -> None:
        self._generator = generator

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """One continuation per prompt, the prompt not repeated.

        Args:
            model_input: A frame with the prompts in its first column, as MLflow makes of lists and arrays.
            params: See DEFAULTS. Characters that the model never saw are skipped.

        Raises:
            ConfigError: A parameter is out of range.
        """
        known = {declared.name for declared in fields(GenerationConfig)}
        given = DEFAULTS | {key: value for key, value in (params or {}).items() if key in known}
        config = GenerationConfig(
            length=int(given["length"]),
            temperature=float(given["temperature"]),
            top_k=int(given["top_k"]) or None,
            top_p=float(given["top_p"]),
            seed=int(given["seed"]),
        )
        prompts = model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input
        return [self._generator.complete(str(prompt), config, "skip")[0] for prompt in prompts]


def load_files(folder: Path) -> tuple[LanguageModel, Tokenizer]:
    """The model in weights.safetensors and architecture.json, and its tokenizer.json.

    Raises:
        ModelError: The weights are another architecture's.
    """
    from safetensors.torch import load_model

    model = LanguageModel.from_architecture(json.loads((folder / "architecture.json").read_text("utf-8")))
    load_model(model, folder / "weights.safetensors")
    return model.eval(), Tokenizer.load(folder / "tokenizer.json")


def _load_pyfunc(data_path: str) -> Continuations:
    """MLflow's entry point."""
    return Continuations(TextGenerator(*load_files(Path(data_path))))
