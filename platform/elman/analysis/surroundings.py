"""What a training stands on: packages, hardware, the tracking store, the disk, the hub."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from elman.analysis.finding import Finding, Outcome, check, failure, ok, warning
from elman.config.schema import TrackingConfig, TrainerConfig
from elman.errors import TrackingError, without_password
from elman.models import fused
from elman.models.compiled import build, load_library
from elman.tasks.hardware import cores, multiplies_bf16, resolve_device, resolve_precision
from elman.text.prepare import default_cache
from elman.tracking.absence import in_short, within
from elman.tracking.environment import environment
from elman.tracking.local import local_root
from elman.tracking.store import RunStore, tracking_uri, warm

GUARDED = {
    "lightning": "older ones run code from a checkpoint (CVE-2026-58659), and 2.6.2 and 2.6.3 were malicious releases",
    "torch": "older ones run code from a checkpoint in spite of weights_only (CVE-2026-24747)",
    "mlflow": "older ones have holes in their server",
}
"""Why the floor of a package is what it is; the floors themselves are declared in pyproject.toml."""

STORE_SECONDS = 5.0
HUB_SECONDS = 3.0
HUB = "https://huggingface.co"
LEAST_BYTES = 100 * 10**6
"""Free space below which the next checkpoint or corpus will not fit."""

FEW_BYTES = 2 * 10**9
GIGA = 10**9


# Packages ---------------------------------------------------------------------------------


def requirements() -> list[Requirement]:
    """What elman itself requires, as it was installed."""
    return [
        requirement
        for requirement in map(Requirement, metadata.requires("elman") or [])
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]


def installed_version(package: str) -> str | None:
    """Version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def packages(
    required: Sequence[Requirement] | None = None, installed: Callable[[str], str | None] = installed_version
) -> Iterator[Finding]:
    """A finding for every package whose version matters to safety or is wrong, and one for the rest."""
    fine = 0
    for requirement in requirements() if required is None else required:
        finding = version(requirement.name, requirement.specifier, installed(requirement.name))
        if requirement.name in GUARDED or finding.status != "ok":
            yield finding
        else:
            fine += 1
    yield Finding("other packages", "ok", f"{fine} within what elman requires")


@check("{0}")
def version(package: str, wanted: SpecifierSet, found: str | None) -> Outcome:
    """Whether a package is installed, not below its floor, and not beyond what elman is tested with."""
    told = _told(wanted)
    install = f'pip install "{package}{told}", or `make setup`.'
    if found is None:
        return failure(f"is not installed, and elman needs {told}", install)
    floor = SpecifierSet(",".join(str(part) for part in wanted if not part.operator.startswith("<")))
    if not floor.contains(found, prereleases=True):
        why = f": {GUARDED[package]}" if package in GUARDED else ""
        return failure(f"{found} is not {_told(floor)}{why}", install)
    if not wanted.contains(found, prereleases=True):
        return warning(f"{found} is beyond {told}, which elman is tested with", install)
    return ok(f"{found}, of {told}")


def _told(wanted: SpecifierSet) -> str:
    """The floor first, as people write it."""
    return ",".join(sorted(map(str, wanted), key=lambda part: part.startswith("<")))


@check("python")
def python() -> Outcome:
    """Whether this Python is one that elman supports."""
    wanted = SpecifierSet(metadata.metadata("elman")["Requires-Python"])
    found = platform.python_version()
    if not wanted.contains(found, prereleases=True):
        return failure(f"{found} is not {_told(wanted)}", "remove .venv and `make setup PYTHON=…`.")
    return ok(f"{found}, of {_told(wanted)}")


# Hardware ---------------------------------------------------------------------------------


@check("processor")
def processor(trainer: TrainerConfig) -> Outcome:
    """The processor, its threads, and whether it multiplies in bfloat16."""
    facts = environment()
    has_bf16 = multiplies_bf16(torch.device("cpu"))
    threads = trainer.threads or cores()
    arithmetic = "multiplies bf16" if has_bf16 else "no bf16"
    line = f"{facts['cpu']}, {cores()} of {facts['cores']} cores, {threads} threads, {arithmetic}"
    if threads > cores():
        return warning(line, "lower trainer.threads: more threads than cores are ten times slower.")
    if trainer.precision == "bf16" and not has_bf16 and not torch.cuda.is_available():
        return warning(line, "set trainer.precision auto: bf16 is emulated here, and slower than fp32.")
    return ok(f"{line}: auto is {resolve_precision('auto', torch.device('cpu'))}")


@check("gpu")
def gpu(trainer: TrainerConfig) -> Outcome:
    """The GPUs that torch sees."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if names:
        return ok(f"{', '.join(names)}: auto is {resolve_precision('auto', resolve_device('cuda'))}")
    if trainer.device == "cuda":
        return failure("none that torch sees, and trainer.device is cuda", "set trainer.device auto or cpu.")
    if torch.version.cuda is not None and shutil.which("nvidia-smi"):
        return warning("torch is built for CUDA and sees no GPU", "compare the driver with `nvidia-smi`.")
    return ok("none: trainings run on the processor")


@check("compiled kernel")
def kernel() -> Outcome:
    """Whether the kernel of fused.cpp can be built and loaded here, and if not, why."""
    if not torch.cpu._is_avx512_bf16_supported():  # as in models/compiled.py
        return ok("not for this processor, which lacks AVX512-BF16: torch's kernels serve")
    try:
        library = build(fused.SOURCE)
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or str(error)
        last = (said.strip().splitlines() or [""])[-1][:150]
        return warning(f"the compiler failed: {last}", "set CXX to another; bf16 trains more slowly without it.")
    except OSError as error:
        return warning(f"not available: {error}", "install g++, or set CXX; bf16 trains more slowly without it.")
    if load_library(fused.SOURCE) is None:
        return warning(f"{library} does not load", f"remove {library}; bf16 trains more slowly without it.")
    return ok(f"available: {library}")


# Store, disk, hub -------------------------------------------------------------------------


@check("tracking store")
def store(tracking: TrackingConfig) -> Outcome:
    """Whether the store answers within seconds and can be written: a tag is set, read and removed."""
    uri = tracking_uri(tracking)
    shown = without_password(uri)
    if is_unmade(tracking):
        return ok(f"{shown}: not there yet; the first run makes it")
    warm()
    remedy = "start its server, or set tracking.uri or MLFLOW_TRACKING_URI to another."
    try:
        within(STORE_SECONDS, lambda: _write_and_remove(tracking))
    except TimeoutError as error:
        return failure(f"{shown}: {error}", remedy)
    except TrackingError as error:
        line, _, _ = str(error).partition("): ")
        return failure(f"{line})" if line != str(error) else line, remedy)
    except Exception as error:  # of MLflow or its databases' drivers
        return failure(f"{shown}: cannot be written ({in_short(error)})", "make it writable, or set another.")
    return ok(f"{shown}: written and read")


def is_unmade(tracking: TrackingConfig) -> bool:
    """Whether the store is a database file that nobody has made yet."""
    uri = tracking_uri(tracking)
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return uri.startswith("sqlite:///") and not path.startswith("file:") and not Path(path).exists()


def _write_and_remove(tracking: TrackingConfig) -> None:
    client = RunStore(tracking).client
    found = client.get_experiment_by_name(tracking.experiment)
    experiment_id = "0" if found is None else found.experiment_id
    tag = f"elman.doctor.{uuid.uuid4().hex}"
    client.set_experiment_tag(experiment_id, tag, "written")
    try:
        if client.get_experiment(experiment_id).tags.get(tag) != "written":
            raise TrackingError("The tracking store loses what it is given.")
    finally:
        client.delete_experiment_tag(experiment_id, tag)


def disk() -> Iterator[Finding]:
    """The places that a training writes to."""
    yield space("mlruns", local_root(), "start where there is room")
    yield space("corpus cache", default_cache(), "set ELMAN_CACHE to a folder with room")
    yield space("temporary files", Path(tempfile.gettempdir()), "set TMPDIR to a folder with room")


@check("{0}")
def space(name: str, folder: Path, remedy: str) -> Outcome:
    """Whether a folder (or the one that it will be made in) takes a file, and how much room there is."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return failure(f"{folder}: cannot be written ({error.strerror})", f"{remedy} and where you may write.")
    free = shutil.disk_usage(there).free
    line = f"{folder}: {free / GIGA:,.1f} GB free" if free >= GIGA else f"{folder}: {free / 10**6:,.0f} MB free"
    if free < LEAST_BYTES:
        return failure(line, f"{remedy}, or free some.")
    if free < FEW_BYTES:
        return warning(line, f"{remedy}, or free some: corpora and checkpoints may not fit.")
    return ok(line)


@check("hub")
def hub() -> Outcome:
    """Whether the hub answers; to be without it is a normal way to work."""
    address = os.environ.get("HF_ENDPOINT") or HUB
    remedy = "only corpora on the hub need it; bible-asv, python-docs and files do not."
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return warning("HF_HUB_OFFLINE is set: not asked", remedy)
    try:
        within(HUB_SECONDS, lambda: _knock(address))  # a name that is looked up knows no time limit of its own
    except urllib.error.HTTPError as error:
        error.close()
        return warning(f"{address} answers {error.code} {error.reason}", remedy)
    except (OSError, ValueError) as error:  # TimeoutError is one of them
        reason = getattr(error, "reason", error)
        return warning(f"{address} is out of reach ({str(reason)[:100]})", remedy)
    return ok(f"{address} answers")


def _knock(address: str) -> None:
    request = urllib.request.Request(address, method="HEAD")
    with urllib.request.urlopen(request, timeout=HUB_SECONDS):
        return
