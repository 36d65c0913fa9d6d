"""From a MODEL argument to a model and its tokenizer.

A MODEL is a run id, ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, or a path: of a
checkpoint, or of a folder with weights.safetensors, architecture.json, tokenizer.json and provenance.json.
Nothing loaded here can run code: checkpoints load with weights_only, weights are
safetensors, the rest is JSON.
"""

from __future__ import annotations

import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from elman.config.load import from_flat
from elman.config.schema import ExperimentConfig, TrackingConfig
from elman.config.tree import flatten
from elman.errors import ElmanError, ModelError, TrackingError, without_password
from elman.models.count import count_parameters
from elman.models.language_model import LanguageModel
from elman.tasks.pyfunc import load_files
from elman.text.prepared import PreparedCorpus
from elman.text.spelling import SpellingModel
from elman.text.tokenizer import Tokenizer
from elman.tracking.models import download_model
from elman.tracking.store import RunStore, open_to_read

FORMAT = 1

_MISSHAPEN = (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, MemoryError, RuntimeError)
"""What comes of plain values that are not those we wrote: they are only data, but of any shape."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to use, and what it was trained on.

    Attributes:
        spelling: What symbols outside its vocabulary cost, from its training text.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    config: ExperimentConfig
    corpus_digest: str
    spelling: SpellingModel | None


def provenance(config: ExperimentConfig, corpus: PreparedCorpus) -> dict[str, Any]:
    """What a model needs to remember of its training, as plain values; no password, for models are passed on."""
    flat = flatten(config)
    if config.tracking.uri is not None:
        flat["tracking.uri"] = without_password(config.tracking.uri)
    return {
        "format": FORMAT,
        "config": {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()},
        "corpus_digest": corpus.digest,
        "spelling": None if corpus.spelling is None else corpus.spelling.bits_of_sign.tolist(),
    }


def _loaded(model: LanguageModel, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> LoadedModel:
    spelling = None if facts["spelling"] is None else SpellingModel.from_bits(facts["spelling"])
    return LoadedModel(model.eval(), tokenizer, from_flat(facts["config"]), str(facts["corpus_digest"]), spelling)


def model_weights(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights to use: averaged ones where the optimizer averages, else the newest."""
    if checkpoint.get("averaged") is not None:
        return dict(checkpoint["averaged"])
    return {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items() if k.startswith("model.")}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours.

    Raises:
        ModelError: It is missing, truncated, damaged, or not one of ours.
    """
    if path.exists() and not path.is_file():  # a device has no end, and a pipe is waited for
        raise ModelError(f"{path} is no file: give a .ckpt that elman wrote.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself would load a flipped bit without a word
        if damaged:
            raise ModelError(f"{path} is damaged (at {damaged}): use another checkpoint.")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}).") from None
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError):
        raise ModelError(f"{path} is no checkpoint, or a damaged one: give a .ckpt that elman wrote.") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("elman"), dict):
        raise ModelError(f"{path} is not a checkpoint of elman: give a .ckpt that elman wrote.")
    return checkpoint


def _refuse_inflation(architecture: dict[str, Any], numbers: int) -> None:
    """A few bytes that describe a huge model must not fill the memory before its weights are missed."""
    with torch.device("meta"):  # shapes without storage
        described = count_parameters(LanguageModel.from_architecture(architecture))["total"]
    if described > numbers:
        raise ModelError(f"it has {numbers:,} weights, and describes {described:,}")


def from_checkpoint(path: Path) -> LoadedModel:
    """The model in a checkpoint.

    Raises:
        ModelError: See read_checkpoint.
    """
    checkpoint = read_checkpoint(path)
    extra = checkpoint["elman"]
    try:
        weights = model_weights(checkpoint)
        _refuse_inflation(extra["architecture"], sum(weight.numel() for weight in weights.values()))
        model = LanguageModel.from_architecture(extra["architecture"])
        model.load_state_dict(weights)
        return _loaded(model, Tokenizer.from_json(extra["tokenizer"]), extra["provenance"])
    except (*_MISSHAPEN, ElmanError) as error:
        raise ModelError(f"{path} does not hold the model it describes ({str(error).splitlines()[0]}).") from None


def from_folder(folder: Path) -> LoadedModel:
    """The model in a folder of weights.safetensors, architecture.json, tokenizer.json and provenance.json.

    Raises:
        ModelError: A file is missing or damaged.
    """
    try:
        size = (folder / "weights.safetensors").stat().st_size
        _refuse_inflation(json.loads((folder / "architecture.json").read_text("utf-8")), size)
        return _loaded(*load_files(folder), json.loads((folder / "provenance.json").read_text("utf-8")))
    except OSError as error:
        raise ModelError(f"{folder} is no saved model ({error.strerror}: {error.filename}).") from None
    except (*_MISSHAPEN, SafetensorError, ElmanError) as error:
        raise ModelError(f"{folder} holds a damaged model ({str(error).splitlines()[0]}).") from None


def load_model(reference: str, store: RunStore | None = None) -> LoadedModel:
    """The model that a MODEL argument names.

    Args:
        reference: See the module's docstring.
        store: Where to look for runs and registered models; None opens the default one when it is needed.

    Raises:
        ModelError: There is none, or it does not load.
        TrackingError: There is no such run.
    """
    path = Path(reference)
    if not reference:
        raise ModelError("MODEL is empty: give a run id, models:/NAME@ALIAS, or a checkpoint's path.")
    if not reference.startswith("models:/") and os.path.exists(path):  # noqa: PTH110 - long paths make the other raise
        return from_folder(path) if path.is_dir() else from_checkpoint(path)
    if ("/" in reference and not reference.startswith("models:/")) or path.suffix == ".ckpt":
        raise ModelError(f"{reference} does not exist: give a run id, models:/NAME@ALIAS, or a checkpoint's path.")
    store = store or open_to_read(TrackingConfig())
    with tempfile.TemporaryDirectory() as folder:
        if reference.startswith("models:/"):
            root = download_model(store, reference, Path(folder))
            found = next(root.rglob("weights.safetensors"), None)
            if found is None:
                raise ModelError(f"{reference} is not a model of elman.")
            return from_folder(found.parent)
        run = store.find_run(reference)
        return from_checkpoint(_run_checkpoint(store, run.id, Path(folder)))


def needs_store(reference: str) -> bool:
    """Whether a MODEL argument is looked up in the tracking store, not on the disk."""
    there = os.path.exists(reference)  # noqa: PTH110 - long paths make the other raise
    return reference.startswith("models:/") or not (there or "/" in reference)


def _run_checkpoint(store: RunStore, run_id: str, into: Path) -> Path:
    """A run's best checkpoint; of one that was stopped before its first validation, the newest."""
    try:
        return store.download(run_id, "checkpoints/best.ckpt", into)
    except TrackingError:
        try:
            return store.download(run_id, "checkpoints/last.ckpt", into)
        except TrackingError:
            raise ModelError(f"Run {run_id} holds no checkpoint: it ended before its first validation.") from None
