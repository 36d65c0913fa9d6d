"""Hub data sets: what is told when the hub is away, guarded or lacks the set. No test asks the real hub."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pytest

from elman.config.schema import CorpusConfig
from elman.errors import DataError
from elman.text.corpus import open_corpus
from elman.text.presets import PRESETS

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(BaseHTTPRequestHandler):
    """Answers like the hub for an absent, a gated and an open data set."""

    def do_GET(self) -> None:
        path = self.path.removeprefix("/api/datasets/")
        if path.startswith("me/absent"):
            self.answer(401, {"error": "Invalid"}, "RepoNotFound")
        elif path.startswith("me/open/revision"):
            self.answer(404, {"error": "Invalid rev id"}, "RevisionNotFound")
        elif path == "me/gated/auth-check":
            self.answer(403, {"error": "gated"}, "GatedRepo")
        else:
            gated = "manual" if path.startswith("me/gated") else False
            self.answer(200, {"id": path, "sha": COMMIT, "gated": gated, "private": False, "tags": []})

    def answer(self, status: int, body: dict, error: str | None = None) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_out_of_reach_is_told_within_seconds(monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"hub:Salesforce/wikitext: the hub is out of reach .* bible-asv, python-docs"):
        open_corpus(CorpusConfig(name="wikitext-2"))
    assert time.monotonic() - began < 6


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("hub:me/absent", {}, "hub:me/absent: the hub has no such public data set"),
        ("hub:me/gated", {}, "hub:me/gated: is gated: accept its terms at https://huggingface.co/datasets/me/gated"),
        ("hub:me/open", {"revision": "v9"}, r"hub:me/open: has no revision 'v9': check corpus\.revision"),
        ("hub:", {}, "write hub:OWNER/NAME"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_told_in_one_line(hub, name, settings, told) -> None:
    with pytest.raises(DataError, match=told) as error:
        open_corpus(CorpusConfig(name=name, **settings))
    assert "\n" not in str(error.value)


def test_the_digest_pins_the_commit(hub) -> None:
    newest = open_corpus(CorpusConfig(name="hub:me/open"))
    assert COMMIT in newest.source
    assert newest.digest == open_corpus(CorpusConfig(name="hub:me/open", revision=COMMIT)).digest
    assert newest.digest != open_corpus(CorpusConfig(name="hub:me/open", config="other")).digest


def stored(monkeypatch, **splits: list[str]) -> list[dict]:
    """Put rows in the hub's place; returns what was asked of it."""
    asked: list[dict] = []

    def load(path: str, *, split: str, streaming: bool, **arguments):
        asked.append({"path": path, "split": split, "streaming": streaming, **arguments})
        rows = datasets.Dataset.from_dict({"text": splits[split], "id": list(range(len(splits[split])))})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: list(splits))
    return asked


def text_of(stream) -> str:
    return "".join(text for batch in stream.batches() for text, _ in batch)


@pytest.mark.parametrize("streaming", [False, True])
def test_official_splits_and_columns_of_the_hub_are_taken(hub, monkeypatch, streaming) -> None:
    asked = stored(monkeypatch, train=["one", "two"], valid=["three"], test=["four\n"])
    corpus = open_corpus(CorpusConfig(name="hub:me/open", config="small", streaming=streaming))
    assert {split: text_of(stream) for split, stream in corpus.splits.items()} == {
        "train": "one\ntwo\n",
        "validation": "three\n",
        "test": "four\n",
    }
    assert asked[0] == {
        "path": "me/open", "split": "train", "streaming": streaming, "name": "small", "revision": COMMIT,
    }  # fmt: skip


def test_a_split_or_column_that_is_not_there_is_told(hub, monkeypatch) -> None:
    stored(monkeypatch, train=["one"], validation=["two"])
    with pytest.raises(DataError, match=r"has no split 'all': set corpus\.split to one of train, validation"):
        _ = open_corpus(CorpusConfig(name="hub:me/open", split="all")).splits
    corpus = open_corpus(CorpusConfig(name="hub:me/open", column="body"))
    with pytest.raises(DataError, match=r"has no column 'body': set corpus\.column to one of text, id"):
        text_of(corpus.splits["train"])


def test_what_the_library_raises_becomes_one_line(hub, monkeypatch) -> None:
    def load(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"Salesforce/wikitext: cannot be read: ConnectionError: no network.*bible-asv"):
        text_of(open_corpus(CorpusConfig(name="wikitext-2")).splits["train"])


def test_enwik8_is_cut_at_its_customary_bytes(hub, monkeypatch) -> None:
    text = "é" * 30 + "x" * 40
    stored(monkeypatch, train=[text])
    monkeypatch.setitem(PRESETS, "enwik8", PRESETS["enwik8"].__class__(
        repository="me/open", citation="", licence="", splits=("train",), byte_ranges=(61, 81)))  # fmt: skip
    splits = open_corpus(CorpusConfig(name="enwik8")).splits
    assert [len(text_of(stream).encode()) for stream in splits.values()] == [61, 20, 20]


def test_every_preset_cites_its_source_and_licence() -> None:
    for preset in PRESETS.values():
        assert preset.citation
        assert preset.licence
        assert "/" in preset.repository
