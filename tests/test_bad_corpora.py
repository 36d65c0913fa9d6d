"""Corpora that cannot be read, or that are no text: one line, exit code 2, and nothing written."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elman.cli import main
from elman.config.schema import CorpusConfig
from elman.errors import DataError, ElmanError
from elman.text import encode, readers
from elman.text.files import find_files
from elman.text.prepare import prepare
from elman.text.readers import read_file
from support import Refuse, files, make_text

GOOD = make_text(400)


def test_a_file_whose_reading_fails_is_one_line_also_for_root(tmp_path: Path, refuse: Refuse) -> None:
    refuse("train", "--corpus.name", "/proc/self/mem", names=("/proc/self/mem", "Input/output error"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "novel.txt").symlink_to("/proc/self/mem")
    refuse("train", "--corpus.name", str(tmp_path / "folder"), names=("novel.txt", "Input/output error"))
    refuse("corpus", "/proc/self/mem", names=("Input/output error",))


def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    """In a process of its own, which gives root's rights up where it has them."""
    tmp_path.chmod(0o755)
    text = tmp_path / "novel.txt"
    text.write_text(GOOD)
    text.chmod(0)
    code = (
        "import os, sys\n"
        "from elman.text.files import find_files\n"
        "from elman.errors import DataError\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: find_files(sys.argv[1], 'corpus.name')\n"
        "except DataError as error: print(error)\n"
    )
    # The folders above may be root's alone: the file is named from inside its own.
    done = subprocess.run([sys.executable, "-c", code, "novel.txt"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "novel.txt: cannot be read: Permission denied.\n", done.stderr


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "dead link": lambda path: path.symlink_to("nowhere"),
    "circular link": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused_and_never_waited_for(
    tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")  # a socket's address is short
    SPECIAL[kind](tmp_path / "folder" / "novel.txt")
    refuse("train", "--corpus.name", "novel.txt", names=("novel.txt",))
    refuse("train", "--corpus.name", ".", names=(".",))


def test_links_in_circles_are_walked_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "novel.txt").write_text(GOOD)
    for name in ("up", "again", "and-again"):  # followed, they would be paths without number
        (tmp_path / "a" / "b" / name).symlink_to(tmp_path)
    assert find_files(str(tmp_path), "corpus.name")[0] == [tmp_path / "a" / "novel.txt"]
    for pattern in ("**/*.txt", "**", "a/**/novel.*", "**/novel.txt", "*/novel.txt"):
        assert find_files(str(tmp_path / pattern), "corpus.name")[0] == [tmp_path / "a" / "novel.txt"]


def test_a_glob_takes_what_it_says_and_no_hidden_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.py", "x/b.py", "x/y/c.py", "x/.hidden/d.py", "x/.e.py", "x/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    for pattern, wanted in {
        "**/*.py": ["a.py", "x/b.py", "x/y/c.py"], "x/**/*.py": ["x/b.py", "x/y/c.py"], "*/*.py": ["x/b.py"],
        "x/**": ["x/b.py", "x/f.txt", "x/y/c.py"], "**/y/*": ["x/y/c.py"], "**/.e.py": ["x/.e.py"],
    }.items():  # fmt: skip
        assert [str(path) for path in find_files(pattern, "corpus.name")[0]] == wanted


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 3000, "a\0b", "~nobody-of-this-name/x", "a\nb", "\x1b[31mred"])
def test_a_path_that_can_be_none_is_one_plain_line(refuse: Refuse, name: str) -> None:
    line = refuse("train", "--corpus.name", name, names=("corpus.name",))
    assert line.isprintable()
    assert len(line) < 1200


def zipped(name: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr(name, GOOD)
    return held.getvalue()


def tarred(name: str, mode: str) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode=mode) as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        member = tarfile.TarInfo(name)
        member.size = len(GOOD)
        archive.addfile(member, io.BytesIO(GOOD.encode()))
    return held.getvalue()


ARCHIVES = {
    "a.zip": (zipped("../escaped.txt"), "zip archive"), "a.tar": (tarred("../escaped.txt", "w"), "tar archive"),
    "a.tar.gz": (tarred("../../escaped.txt", "w:gz"), "tar archive"),
    "a.tgz": (tarred("/tmp/escaped.txt", "w:gz"), "gzip file"),
    "a.txt.bz2": (bz2.compress(GOOD.encode()), "bzip2 file"), "a.txt.xz": (lzma.compress(GOOD.encode()), "xz file"),
    "twice.txt.gz": (gzip.compress(gzip.compress(GOOD.encode())), "gzip file"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_is_named_as_one_and_nothing_comes_out_of_it(tmp_path: Path, refuse: Refuse, name: str) -> None:
    content, kind = ARCHIVES[name]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / name).write_bytes(content)
    refuse("train", "--corpus.name", str(tmp_path / "corpus" / name), names=(name, kind))
    refuse("train", "--corpus.name", str(tmp_path / "corpus"), names=("corpus",))
    assert not list(tmp_path.rglob("escaped*"))


ODD_ROWS = {
    "an integer of 6,000 digits": '{"text": ' + "1" * 6000 + "}", "brackets without end": "[" * 100_000,
    "no number": '{"text": NaN}', "nothing": '{"text": null}', "a NUL": '{"text": "a\\u0000b"}',
    "a lone surrogate": '{"text": "a\\ud800b"}', "mere empty texts": '{"text": ""}\n' * 300,
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD_ROWS)
def test_a_row_that_is_no_text_is_one_line(tmp_path: Path, refuse: Refuse, kind: str) -> None:
    (tmp_path / "t.jsonl").write_text(ODD_ROWS[kind])
    refuse("train", "--corpus.name", str(tmp_path / "t.jsonl"), names=("t.jsonl",))


def test_a_row_longer_than_memory_should_hold_is_refused_by_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LARGEST_ROW", 1000)
    rows = [json.dumps({"text": "a" * length}) for length in (10, 900, 2000)]
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as file:
        file.write("\n".join(rows))
    with pytest.raises(DataError, match=r"t\.jsonl\.gz:3: is longer than 1,000 bytes"):
        list(read_file(tmp_path / "t.jsonl.gz", "text", None, "strict"))


PARQUET = {
    "numbers": [1, 2, 3], "lists": [["a"], ["b"]], "bytes": [b"\xff", b"\xfe"], "no rows": pa.array([], pa.string()),
    "NULs": ["a\0b"] * 9, "nothing": pa.array([None, None], pa.string()), "empty texts": [""] * 90,
}  # fmt: skip


@pytest.mark.parametrize("kind", PARQUET)
def test_a_column_that_holds_no_text_is_one_line(tmp_path: Path, refuse: Refuse, kind: str) -> None:
    pyarrow.parquet.write_table(pa.table({"text": PARQUET[kind]}), tmp_path / "t.parquet")
    refuse("train", "--corpus.name", str(tmp_path / "t.parquet"), names=("t.parquet",))


@pytest.mark.parametrize("name", ["hub:", "hub:../x", "hub:a/b/c", "hub:./x", "hub:a b", "hub:" + "x" * 500])
def test_a_name_that_no_hub_data_set_can_have_is_one_line(refuse: Refuse, name: str) -> None:
    refuse("train", "--corpus.name", name, names=("corpus.name", "hub:OWNER/NAME"))


class AbsentHub(BaseHTTPRequestHandler):
    """A hub that has no data set at all."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_a_data_set_that_the_hub_does_not_have_and_a_hub_out_of_reach_are_one_line(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HTTPServer(("127.0.0.1", 0), AbsentHub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        for command in (["corpus"], ["train", "--corpus.name"]):
            refuse(*command, "hub:nobody/nothing", names=("hub:nobody/nothing", "no such public data set"))
        server.shutdown()
        thread.join()
    for command in (["corpus"], ["train", "--corpus.name"]):
        refuse(*command, "hub:nobody/nothing", names=("hub:nobody/nothing", "out of reach", "bible-asv"))


MARKED = GOOD.encode() + b"\xff\xfe" + GOOD.encode()


@pytest.mark.parametrize("level", ["byte", "character", "word", "bpe"])
@pytest.mark.parametrize(("handling", "size"), [("replace", len(MARKED) + 4), ("ignore", len(MARKED) - 2)])
def test_what_invalid_utf8_does_is_chosen_by_a_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], level: str, handling: str, size: int
) -> None:
    (tmp_path / "t.txt").write_bytes(MARKED)
    command = ["corpus", str(tmp_path / "t.txt"), "--json", "--corpus.level", level, "--corpus.encoding_errors"]
    assert main([*command, "strict"]) == 2
    assert f"byte {len(GOOD)}" in capsys.readouterr().err
    assert main([*command, handling]) == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    if level in ("byte", "character", "bpe"):  # words are counted with one separator between any two
        assert sum(split["bytes"] for split in splits.values()) == size


def test_a_mark_and_crlf_are_handled_as_documented(tmp_path: Path) -> None:
    text = GOOD.replace("\n", "\r\n")
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    whole = prepare(CorpusConfig(name=str(tmp_path / "t.txt")))
    back = "".join(whole.tokenizer.decode(split.open().tolist()) for split in whole.splits.values())  # type: ignore[union-attr]
    assert back == text


ANYTHING = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@ANYTHING
@given(
    st.text(max_size=120), st.integers(1, 60), st.sampled_from(["byte", "character", "word", "bpe"]),
    st.sampled_from(["strict", "replace"]), st.sampled_from([None, "\n", "a", " "]),
)  # fmt: skip
def test_any_text_is_prepared_to_the_character_or_refused(
    tmp_path: Path, piece: str, times: int, level: str, handling: str, separator: str | None
) -> None:
    text = piece * times
    (tmp_path / "t.txt").write_bytes(text.encode("utf-8", "surrogatepass"))
    config = CorpusConfig(
        name=str(tmp_path / "t.txt"), level=level, encoding_errors=handling, document_separator=separator,  # type: ignore[arg-type]
        validation_fraction=0.2, test_fraction=0.2,
    )  # fmt: skip
    try:
        whole = prepare(config)
    except ElmanError:
        return
    if level != "word":
        back = "".join(whole.tokenizer.decode(split.open().tolist()) for split in whole.splits.values())  # type: ignore[union-attr]
        assert level != "bpe" or back == text.removeprefix("\ufeff")
        assert sum(split.characters for split in whole.splits.values()) == len(text.removeprefix("\ufeff"))  # type: ignore[union-attr]


def test_nothing_of_a_refused_corpus_stays_in_the_cache(
    tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELMAN_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "t.txt"
    for content in (MARKED, b" \n" * 900, b"a" * 9000, GOOD.encode() + b"\0"):
        text.write_bytes(content)
        refuse("corpus", str(text), names=("t.txt",))
    assert files(tmp_path / "cache") == {}
    text.write_text(GOOD)
    short = ("train", "--corpus.name", str(text), "--data.batch_size", "9999")
    refuse(*short, names=("data.batch_size", "9999"))
    assert files(tmp_path / "cache") == {}
    prepare(CorpusConfig(name=str(text)))
    kept = files(tmp_path / "cache")
    refuse(*short, names=("data.batch_size", "9999"))
    assert files(tmp_path / "cache") == kept != {}  # it is of use to other settings


def test_a_text_without_white_space_has_no_words_and_is_refused_before_it_fills_the_memory(
    tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_MOST_IN_LONG_WORDS", 1 << 14)
    (tmp_path / "t.txt").write_text(GOOD + GOOD.replace(" ", "").replace("\n", "") * 300)
    refuse("train", "--corpus.name", str(tmp_path / "t.txt"), "--corpus.level", "word",
           names=("t.txt", "no words", "corpus.level"))  # fmt: skip


def test_byte_pairs_are_learned_in_short_runs_of_a_text_without_white_space(tmp_path: Path) -> None:
    """In one piece, a word of 200,000 characters takes a minute, and one of a million half an hour."""
    (tmp_path / "t.txt").write_text(GOOD + "".join(f"{number:x}"[::-1] for number in range(60_000)))
    whole = prepare(CorpusConfig(name=str(tmp_path / "t.txt"), level="bpe", vocabulary_size=400))
    back = "".join(whole.tokenizer.decode(split.open().tolist()) for split in whole.splits.values())  # type: ignore[union-attr]
    assert back == (tmp_path / "t.txt").read_text()
    assert whole.tokenizer.vocabulary_size == 400


PEAK = """
import resource, sys
from elman.config.schema import CorpusConfig
from elman.text.prepare import prepare
def peak(path):
    prepare(CorpusConfig(name=path, level="word"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak(sys.argv[1])
print(peak(sys.argv[2]) - before)
"""


def test_memory_does_not_grow_with_a_line(tmp_path: Path) -> None:
    """A line of 16 MB takes less than half its size more than one of 3 MB: it is held in blocks."""
    paths = [tmp_path / "small.txt", tmp_path / "large.txt"]
    for path, megabytes in zip(paths, (3, 16), strict=True):
        path.write_bytes((b"to be or not to be " * 55_200)[:1_000_000] * megabytes)
    done = subprocess.run([sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8


def test_a_streamed_text_of_one_symbol_is_refused_by_its_validation_split(tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "t.txt").write_text("a" * 50_000)
    streamed = ("--corpus.streaming", "true", "--corpus.streaming_sample", "10000")
    refuse("corpus", str(tmp_path / "t.txt"), *streamed, names=("validation split is nothing but 'a'",))
