"""Peak resident memory of preparing and of training, on a large corpus against a small one.

    python tests/benchmarks/memory.py --levels byte character word

Each figure is VmHWM of a process of its own: one prepares the corpus, the next trains some steps on what that left
in the cache, as `elman train` does. The large corpus is the small one repeated, so that the vocabulary is the same and
what grows is working memory. "line" has no line end in it at all. Without room on the disk: one line, exit 2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from enlarge import write_enlarged
from harness import environment, parser, write_json

LEVELS = ("byte", "character", "word", "bpe")
GOAL = 100  # megabytes
CHILD = """
import re, sys
from pathlib import Path
from elman import cli
from elman.config.schema import CorpusConfig
from elman.text.prepare import prepare

name, level, what, *settings = sys.argv[1:]
if what == "prepare":
    prepare(CorpusConfig(name=name, level=level, validation_fraction=2e-4, test_fraction=2e-4))
elif cli.main(["train", "--corpus.name", name, "--corpus.level", level, *settings]):
    sys.exit(1)
status = Path("/proc/self/status").read_text()
print("peak", int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024 / 1e6, file=sys.stderr)
"""
TRAIN = [
    "--corpus.validation_fraction", "2e-4", "--corpus.test_fraction", "2e-4", "--trainer.sample_length", "0",
    "--trainer.max_steps", "20", "--model.hidden_size", "64", "--model.embedding_size", "64",
    "--tracking.system_metrics", "false", "--data.batch_size", "32", "--data.sequence_length", "32",
]  # fmt: skip


def peak(path: Path, level: str, what: str, folder: Path) -> float:
    """Megabytes that the process held at most."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), level, what, *TRAIN], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "ELMAN_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hub")},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stderr.rpartition("peak ")[2])


def repeated(source: Path, target: Path, megabytes: float) -> Path:
    """The source over and over."""
    block = source.read_bytes()
    with target.open("wb") as file:
        while file.tell() < megabytes * 1e6:
            file.write(block)
    return target


def main() -> int:
    arguments = parser(__doc__)
    arguments.set_defaults(turns=1)
    arguments.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS[:3]), help="levels to measure")
    arguments.add_argument("--small", type=float, default=10, help="megabytes of the small corpus")
    arguments.add_argument("--large", type=float, default=1000, help="megabytes of the large corpus")
    arguments.add_argument("--line", type=float, default=200, help="megabytes of the single line; 0 leaves it out")
    arguments.add_argument("--folder", type=Path, default=tempfile.gettempdir(), help="where there is room")
    options = arguments.parse_args()
    needed = (options.small + 5 * options.large + options.line) * 1e6  # an id takes 4 bytes at most
    if (free := shutil.disk_usage(options.folder).free) < needed:
        print(f"memory needs {needed / 1e9:.1f} GB in {options.folder}, and {free / 1e9:.1f} are free: name another "
              "--folder, or a smaller --large.", file=sys.stderr)  # fmt: skip
        return 2
    print(environment())
    print(f"{'level':9} {'corpus':>8} {'prepare':>10} {'train':>10}   growth, megabytes (goal: below {GOAL})")
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        small = write_enlarged(folder / "small.txt", options.small)
        corpora = {"small": small, "large": repeated(small, folder / "large.txt", options.large)}
        if options.line:
            line = write_enlarged(folder / "first.txt", options.small, line_ends=False)
            corpora["line"] = repeated(line, folder / "line.txt", options.line)
        for level in options.levels:
            least: dict[str, float] = {}
            for kind, path in corpora.items():
                peaks = {what: peak(path, level, what, folder) for what in ("prepare", "train")}
                shutil.rmtree(folder / "cache")
                least = least or peaks
                growth = {} if kind == "small" else {what: peaks[what] - least[what] for what in peaks}
                results.append({"level": level, "corpus": kind, "megabytes": path.stat().st_size / 1e6, "peak": peaks,
                                "growth": growth})  # fmt: skip
                print(f"{level:9} {kind:>8} {peaks['prepare']:7.0f} MB {peaks['train']:7.0f} MB   "
                      + " ".join(f"{what} {more:+.0f}" for what, more in growth.items()), flush=True)  # fmt: skip
    write_json(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
