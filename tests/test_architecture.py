"""The layers and doors of the package, and what the repository may hold."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "platform" / "elman"
TOP_LEVEL = {"pyproject.toml", "README.md", "Makefile", "platform", "pipelines", "tests", "mlruns"}

DOORS = {
    "mlflow": ("tracking/",),
    "optuna": ("search/",),
    "datasets": ("text/corpus.py",),
    "jsonargparse": ("config/load.py",),
    "lightning": ("tasks/", "data/", "tracking/logger.py", "training/", "search/"),
}


def test_imports_point_rightward_only() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--config", ROOT / "pyproject.toml"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_one_door(library: str) -> None:
    pattern = re.compile(rf"^\s*(?:import|from) {library}\b", re.MULTILINE)
    users = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if pattern.search(p.read_text("utf-8"))}
    assert not {user for user in users if not user.startswith(DOORS[library])}


def test_only_the_command_line_prints() -> None:
    printing = re.compile(r"^\s*print\(", re.MULTILINE)
    users = [p.name for p in PACKAGE.rglob("*.py") if printing.search(p.read_text("utf-8"))]
    assert users == ["cli.py"]


def test_the_source_root_is_no_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_the_top_level_holds_what_it_should_and_nothing_else() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False)
    if listed.returncode != 0:
        pytest.skip("this is no git checkout: what belongs to the repository is not known")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL
