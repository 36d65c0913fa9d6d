"""What the benchmarks share: the record of the machine, and the pictures."""

import json
from pathlib import Path

import pytest

from benchmarks.enlarge import write_enlarged
from benchmarks.harness import elsewhere, parser, provenance, speedup, write_json
from benchmarks.plots import MET, MISSED, PLAIN, draw, panels_of


def gain(cell: str, layers: int, median: float) -> dict[str, object]:
    return {"cell": cell, "layers": layers, "speedup": {"median": median, "low": median - 0.5, "high": median + 0.5}}


def test_figures_are_kept_with_hardware_versions_commit_and_date(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", [{"a": 1.0}])
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["results"] == [{"a": 1.0}]
    assert {"processor", "cores", "threads", "flags", "memory_bytes", "python", "torch", "commit", "date"} <= set(
        report["environment"]
    )
    assert report["environment"]["packages"]["elman"]
    json.dumps(provenance())


def test_figures_are_kept_where_they_were_asked_for_though_trainings_work_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = parser("").parse_args(["--json", "x.json"])
    with elsewhere() as folder:
        assert Path.cwd() == folder.resolve()
        write_json(options.json, [])
    assert Path.cwd() == tmp_path
    assert (tmp_path / "x.json").exists()
    assert not folder.exists()


def test_one_turn_has_a_median_and_more_have_quartiles() -> None:
    assert speedup([2.0], [6.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert speedup([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == {"median": 2.0, "low": 1.5, "high": 2.5}


def test_a_figure_below_its_goal_is_marked() -> None:
    rows = panels_of("training_speed", [gain("lstm", 1, 3.1), gain("gru", 1, 4.9), gain("mingru", 1, 9.0)])["speedup"]
    assert [(row.label, row.colour) for row in rows] == [("lstm", MET), ("gru", MISSED), ("mingru", PLAIN)]
    [startup] = panels_of("startup", [{"help": [0.3, 0.5, 0.6]}])["help"]
    assert (startup.median, startup.low, startup.high) == pytest.approx((0.5, 0.4, 0.55))
    assert startup.colour == MISSED


def test_a_picture_is_drawn_beside_the_figures(tmp_path: Path) -> None:
    write_json(tmp_path / "training_speed.json", [gain("lstm", 1, 3.1), gain("gru", 2, 4.9)])
    curve = [[10.0, 2.0], [20.0, 1.5]]
    write_json(tmp_path / "recipe.json", [{"corpus": "tiny-shakespeare", "best": 1.5, "curve": curve}])
    for name in ("training_speed", "recipe"):
        target = draw(tmp_path / f"{name}.json")
        assert target == tmp_path / f"{name}.png"
        assert target.read_bytes().startswith(b"\x89PNG")
    write_json(tmp_path / "words.json", [{"name": "nothing measured"}])
    assert draw(tmp_path / "words.json") is None


@pytest.mark.parametrize("line_ends", [True, False])
def test_an_enlarged_text_has_its_size_and_may_be_one_line(tmp_path: Path, line_ends: bool) -> None:
    raw = write_enlarged(tmp_path / "text.txt", 5, line_ends=line_ends).read_bytes()
    assert 5e6 - 4 < len(raw) <= 5e6
    assert (b"\n" in raw) == line_ends
    assert raw.decode("utf-8")
