"""The MLflow model: prompts in, continuations out.

MLflow loads this file as code ("models from code"), with the modules of elman that it
needs packed beside it, so that no pickle and no installed elman is required.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Continuations(PythonModel):  # type: ignore[misc]  # mlflow ships no types for it
    """Continues prompts.

    The input is a column, list or array of texts; the output is a list of texts, one
    per prompt, the prompt not repeated.
    """

    def load_context(self, context: Any) -> None:
        """Read weights, architecture and tokenizer from the model's own files."""
        from safetensors.torch import load_file

        from elman.models.language_model import LanguageModel
        from elman.tasks.generation import TextGenerator
        from elman.text.tokenizer import Tokenizer

        folder = Path(context.artifacts["files"])
        model = LanguageModel.from_architecture(json.loads((folder / "architecture.json").read_text("utf-8")))
        # Tied tensors are stored once.
        model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
        tokenizer = Tokenizer.from_json((folder / "tokenizer.json").read_text("utf-8"))
        self._generator = TextGenerator(model.eval(), tokenizer)

    # Without type hints: MLflow would take them for the signature, which is given when the model is logged.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Continuations of prompts.

        Args:
            context: MLflow's, unused.
            model_input: Prompts: a DataFrame's first column, a list, an array, or one text.
            params: Settings of GenerationConfig; top_k 0 and top_p 1.0 mean none.
        """
        from elman.config.schema import GenerationConfig

        known = {declared.name for declared in fields(GenerationConfig)}
        given = {key: value for key, value in (params or {}).items() if key in known}
        given["top_k"] = int(given.get("top_k") or 0) or None
        config = GenerationConfig(**{**given, "length": int(given.get("length", 200)), "seed": int(given.get("seed", 1))})
        return [self._generator.complete(prompt, config, "skip")[0] for prompt in _prompts(model_input)]


def _prompts(model_input: Any) -> list[str]:
    if isinstance(model_input, str):
        return [model_input]
    if hasattr(model_input, "iloc"):
        model_input = model_input.iloc[:, 0].tolist() if model_input.ndim == 2 else model_input.tolist()
    elif hasattr(model_input, "ravel"):
        model_input = model_input.ravel().tolist()
    return ["" if prompt is None else str(prompt) for prompt in model_input]


set_model(Continuations())
