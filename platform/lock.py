"""Writes the lock: every package of an installation, at one version, with the digests of its files.

``make lock`` runs it. PyTorch's build for the CPU alone, which is outside the index, is in
cpu.txt: where pip is shown a place that has it, it is taken. What the index's own build
needs beside the rest is in cuda.txt; pip has no marker that tells the two apart. The
versions that the lock has stay where pyproject.toml lets them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LOCK, CUDA, CPU = HERE / "constraints.txt", HERE / "cuda.txt", HERE / "cpu.txt"
HEADS = {
    LOCK: "# Every package of an installation, at the versions that the tests passed with. `make lock` writes it.",
    CUDA: "# What PyTorch's CUDA build needs beside them. `make lock` writes it.",
}


def pinned() -> str:
    """What uv makes of pyproject.toml, for every platform, near the present lock."""
    before = "".join(file.read_text() for file in HEADS if file.exists())
    old = HERE / "lock.tmp"
    old.write_text("\n".join(re.findall(r"^[\w.-]+==\S+", before, re.MULTILINE)))
    command = [
        sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11",
        "--generate-hashes", "--no-annotate", "--no-header", "--no-emit-package", "elman", "--extra", "dev",
        "--constraint", str(old), str(HERE.parent / "pyproject.toml"),
    ]  # fmt: skip
    try:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    finally:
        old.unlink()


def cpu_build(version: str) -> str | None:
    """The requirement that takes PyTorch's CPU build; None where pip is shown none."""
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps",
        "--report", "-", f"torch=={version}+cpu",
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return None
    digest = json.loads(done.stdout)["install"][0]["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"torch=={version}+cpu --hash=sha256:{digest}\n"


def main() -> None:
    """Write the files."""
    texts = dict.fromkeys(HEADS, "")
    for entry in re.findall(r"^\S.*(?:\n\s+--hash.*)+", pinned(), re.MULTILINE):
        [name] = re.findall(r"^[\w.-]+", entry)
        texts[CUDA if re.match("nvidia-|cuda-|triton$", name) else LOCK] += f"{entry}\n"
        if name == "torch" and (build := cpu_build(entry.split()[0].partition("==")[2])):
            CPU.write_text(f"# PyTorch's build for the CPU alone, where there is one. `make lock` writes it.\n{build}")
    for file, text in texts.items():
        file.write_text(f"{HEADS[file]}\n{text}")


if __name__ == "__main__":
    main()
