"""Compiled kernels in each of their builds, and layers of random weights to hold them to."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

from elman.config.schema import ModelConfig
from elman.models import compiled
from elman.models.cells import CellWeights
from elman.models.recurrent import RecurrentLayer

BUILDS = ("native", "portable")
PRODUCTS = ("tiles", "vectors", "portable")
"""Kinds of product that a bfloat16 kernel has."""


def library_of(source: Path, build: str) -> ctypes.CDLL:
    """One of a kernel's ``BUILDS``; without a compiler the test is skipped."""
    if not any(map(shutil.which, compiled.COMPILERS)):
        pytest.skip("no C++ compiler is installed")
    library = compiled.load_library(source, portable=build == "portable")
    assert library is not None
    return library


def use_product(monkeypatch: pytest.MonkeyPatch, module: ModuleType, product: str) -> None:
    """Have a module's kernel multiply with one of ``PRODUCTS``; skipped where the processor has none such."""
    native = product != "portable"
    if native and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("the processor has no AVX512-BF16")
    library = library_of(module.SOURCE, "native" if native else "portable")
    if product == "tiles" and not library.elman_has_tiles():
        pytest.skip("the processor has no matrix tiles")
    monkeypatch.setattr(module, "_kernels", lambda: library)
    monkeypatch.setattr(module, "_has_tiles", lambda: product == "tiles")


def random_layer(kind: str, input_size: int, hidden_size: int, **settings: object) -> RecurrentLayer:
    """A layer of this kind in double precision, no weight of it zero."""
    torch.manual_seed(0)
    cell, _, nonlinearity = kind.partition("_") if kind.startswith("rnn") else (kind, "", "tanh")
    config = ModelConfig(cell=cell, nonlinearity=nonlinearity, **settings)  # type: ignore[arg-type]
    layer = RecurrentLayer(config, input_size, hidden_size).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return layer


def weights_of(layer: RecurrentLayer) -> CellWeights:
    """Its weights, as the written-out cells take them."""
    holder = layer.weights
    return CellWeights(holder.weight_ih_l0, holder.weight_hh_l0, holder.bias_ih_l0, holder.bias_hh_l0)
