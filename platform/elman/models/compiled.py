"""Build a C++ source of this package once per machine, keep the library in the cache, load it.

Nothing is compiled at import or at installation: a wheel fits every processor, and who trains
in single precision or on a GPU never waits for a compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

log = logging.getLogger(__name__)

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
COMPILERS = ("c++", "g++", "clang++")
TIME_LIMIT = 120
"""Seconds after which a compiler is given up."""


@functools.cache
def load_library(source: Path, *, portable: bool = False) -> ctypes.CDLL | None:
    """The library of ``source``, built where the cache has none; None where that cannot be done.

    Args:
        source: A C++ file with a C interface.
        portable: Whether to leave out instructions beyond the processor's baseline, with macro ELMAN_PORTABLE.
    """
    try:
        return ctypes.CDLL(str(build(source, portable=portable)))
    except (OSError, subprocess.SubprocessError) as error:
        # The same is computed without it, only slower: nothing that a user must act on.
        log.debug("No compiled kernels from %s: %s", source.name, getattr(error, "stderr", None) or error)
        return None


@functools.cache
def load_bf16_library(source: Path) -> ctypes.CDLL | None:
    """The same, of kernels that pay only where the processor multiplies bfloat16; None elsewhere."""
    # torch has no public question for this.
    return load_library(source) if torch.cpu._is_avx512_bf16_supported() else None


@functools.cache
def has_tiles(library: ctypes.CDLL | None) -> bool:
    """Whether such a library multiplies in the processor's matrix tiles, and this process may use them."""
    return library is not None and bool(library.elman_has_tiles())


def build(source: Path, *, portable: bool = False) -> Path:
    """Compile ``source`` into the cache unless it is there; returns the library.

    Raises:
        OSError: There is no compiler, or the cache cannot be written.
        subprocess.SubprocessError: The compiler failed.
    """
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), *COMPILERS)))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler is installed")
    flags = [flag for flag in FLAGS if not (portable and flag == "-march=native")]
    flags += ["-DELMAN_PORTABLE"] if portable else []
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=TIME_LIMIT)
    key = hashlib.sha256(source.read_bytes())
    for header in sorted(source.parent.glob("*.h")):
        key.update(header.read_bytes())
    key.update(repr((compiler, version.stdout, flags, _processor())).encode())
    folder = _cache() / "kernels"
    library = folder / f"{source.stem}-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / f"{library.stem}.lock"):
        if not library.exists():  # another process may have built it meanwhile
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / library.name
                command = [compiler, *flags, str(source), "-o", str(made)]
                subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIME_LIMIT)
                made.replace(library)  # so that none ever loads half of it
    return library


def _cache() -> Path:
    """$ELMAN_CACHE, else $XDG_CACHE_HOME/elman, else ~/.cache/elman."""
    own, users = os.environ.get("ELMAN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(users) if users else Path.home() / ".cache") / "elman"


def _processor() -> str:
    """What ``-march=native`` looks at: homes are shared between machines of different kinds."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.machine()} {platform.processor()}"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold ``path`` alone among processes."""
    try:
        import fcntl
    except ImportError:  # Windows: two processes may both compile, and the later one's file stays
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
