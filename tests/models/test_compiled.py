"""Kernels are built once, whole, and their absence is no failure."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elman.models import compiled

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compiled.COMPILERS)), reason="no C++ compiler is installed"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELMAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def written(folder: Path, answer: int) -> Path:
    source = folder / "answer.cpp"
    source.write_text(f'extern "C" int answer() {{ return {answer}; }}', encoding="utf-8")
    return source


@needs_compiler
def test_a_library_is_built_once_and_again_when_its_source_changes(tmp_path: Path, cache: Path) -> None:
    first = compiled.build(written(tmp_path, 1))
    stamp = first.stat().st_mtime_ns
    assert compiled.build(written(tmp_path, 1)) == first
    assert first.stat().st_mtime_ns == stamp
    second = compiled.build(written(tmp_path, 2))
    assert second != first
    assert compiled.build(written(tmp_path, 2), portable=True) not in (first, second)
    library = compiled.load_library(tmp_path / "answer.cpp")
    assert library is not None
    assert library.answer() == 2


@needs_compiler
def test_processes_that_build_at_once_leave_one_library_and_no_scraps(tmp_path: Path, cache: Path) -> None:
    source = written(tmp_path, 3)
    code = (
        "import sys; from pathlib import Path; from elman.models import compiled;"
        "print(compiled.load_library(Path(sys.argv[1])).answer())"
    )
    command = [sys.executable, "-c", code, str(source)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in processes] == ["3"] * 3
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".so"]


@needs_compiler
def test_a_source_that_does_not_compile_is_one_debug_line(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("int main( {", encoding="utf-8")
    with caplog.at_level(logging.DEBUG):
        assert compiled.load_library(source) is None
    [record] = caplog.records
    assert record.levelno == logging.DEBUG
    assert "broken.cpp" in record.getMessage()


def test_no_compiler_is_one_debug_line(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.DEBUG):
        assert compiled.load_library(written(tmp_path, 4)) is None
    assert "no C++ compiler is installed" in caplog.text


def test_a_cache_that_cannot_be_written_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    monkeypatch.setenv("ELMAN_CACHE", str(tmp_path / "cache"))
    assert compiled.load_library(written(tmp_path, 5)) is None
