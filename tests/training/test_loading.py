from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from elman.config.schema import GenerationConfig
from elman.config.tree import override
from elman.errors import ConfigError, ModelError, TrackingError
from elman.tasks.generation import TextGenerator
from elman.tracking.models import download_model
from elman.tracking.store import RunStore
from elman.training.evaluation import evaluate_model
from elman.training.experiment import RunResult, run_experiment
from elman.training.loading import load_model, read_checkpoint
from elman.training.progress import Silence
from support import make_text, tiny


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, empty_database: Path
) -> Iterator[tuple[RunResult, RunStore, Path]]:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "mlruns").mkdir()
    shutil.copy(empty_database, folder / "mlruns" / "mlflow.db")
    text = folder / "text.txt"
    text.write_text(make_text(3000))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        store = RunStore()
        result = run_experiment(tiny(text, corpus__level="word", corpus__min_count=40, trainer__max_steps=10), store)
        yield result, store, store.download(result.run_id, "checkpoints/best.ckpt", folder)


def test_run_checkpoint_and_logged_model_are_the_same_model(trained: tuple[RunResult, RunStore, Path]) -> None:
    result, store, checkpoint = trained
    config = GenerationConfig(length=20)
    texts = []
    for reference in (result.run_id, result.run_id[:12], str(checkpoint), result.model_uri):
        loaded = load_model(reference, store)
        texts.append(TextGenerator(loaded.model, loaded.tokenizer).complete("", config))
        assert loaded.spelling is not None
    assert all(text == texts[0] for text in texts)


def test_the_logged_model_stands_alone_in_another_process(
    trained: tuple[RunResult, RunStore, Path], tmp_path: Path
) -> None:
    result, store, _ = trained
    code = (
        "import sys, mlflow, pandas as pd\n"
        "assert 'elman' not in sys.modules\n"
        f"model = mlflow.pyfunc.load_model({result.model_uri!r})\n"
        "assert 'artifacts' in sys.modules['elman'].__file__, sys.modules['elman'].__file__\n"
        "one = model.predict(['do ba', ''], params={'length': 9, 'seed': 3})\n"
        "assert one == model.predict(pd.DataFrame({'p': ['do ba', '']}), params={'length': 9, 'seed': 3})\n"
        "assert one != model.predict(['do ba', ''], params={'length': 9, 'seed': 4})\n"
        "greedy = {'length': 5, 'temperature': 0.0, 'top_k': 3, 'top_p': 0.9}\n"
        "assert len(model.predict('do ' * 500, params=greedy)) == 1\n"
        "print(one)\n"
    )
    # -S leaves out the .pth file that an editable install of elman lives by.
    site = [p for p in sys.path if p.endswith("site-packages")]
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path += {site!r}\n{code}"],
        capture_output=True, text=True, cwd=tmp_path, env={"MLFLOW_TRACKING_URI": store.uri, "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = load_model(result.run_id, store)
    config = GenerationConfig(length=9, seed=3)
    expected = [TextGenerator(loaded.model, loaded.tokenizer).complete(p, config)[0] for p in ("do ba", "")]
    assert done.stdout.strip() == str(expected)


def test_no_file_of_the_logged_model_is_a_pickle(trained: tuple[RunResult, RunStore, Path], tmp_path: Path) -> None:
    result, store, _ = trained
    root = download_model(store, result.model_uri, tmp_path)
    files = [p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".py", ".yaml", ".txt", ".cpp", ".h", ""}
    assert {p.name for p in files if not p.suffix} <= {"MLmodel", "registered_model_meta"}


def test_a_model_scores_its_own_corpus_as_training_did(trained: tuple[RunResult, RunStore, Path]) -> None:
    result, store, _ = trained
    loaded = load_model(result.run_id, store)
    for split, prefix in (("validation", "val"), ("test", "test")):
        metrics, tokens = evaluate_model(loaded, loaded.config, split, Silence())
        assert tokens > 100
        for name, value in metrics.items():
            assert value == pytest.approx(result.metrics[f"{prefix}/{name}"], rel=1e-6), name


def test_a_model_scores_any_text_and_pays_for_the_words_it_lacks(
    trained: tuple[RunResult, RunStore, Path], tmp_path: Path
) -> None:
    result, store, _ = trained
    loaded = load_model(result.run_id, store)
    scores = []
    for name, word in (("short", "xy"), ("long", "extraordinarily")):
        other = tmp_path / f"{name}.txt"
        other.write_text(f"{word} ba do {word}\n" * 400)
        config = override(loaded.config, {"corpus.name": str(other)})
        metrics, _ = evaluate_model(loaded, config, "test", Silence())
        scores.append(metrics)
    short, long = scores
    assert short["loss"] == pytest.approx(long["loss"], rel=0.05)  # the same tokens, but for where the cut falls
    assert short["bits_per_byte"] > short["loss"]
    with pytest.raises(ConfigError, match=r"corpus\.level must be word"):
        evaluate_model(loaded, override(loaded.config, {"corpus.level": "character"}), "test", Silence())
    with pytest.raises(ConfigError, match="--split nonsense does not exist"):
        evaluate_model(loaded, loaded.config, "nonsense", Silence())


def test_damaged_truncated_empty_and_foreign_checkpoints_are_refused(
    trained: tuple[RunResult, RunStore, Path], tmp_path: Path
) -> None:
    whole = trained[2].read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x40
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    (tmp_path / "flipped.ckpt").write_bytes(bytes(flipped))
    (tmp_path / "truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as archive:
        archive.writestr("a.txt", "a")
    for name in ("foreign", "flipped", "truncated", "empty", "text", "zip"):
        with pytest.raises(ModelError, match=f"{name}.ckpt") as refusal:
            load_model(str(tmp_path / f"{name}.ckpt"))
        assert "\n" not in str(refusal.value)


def test_a_checkpoint_never_runs_code(tmp_path: Path) -> None:
    victim = tmp_path / "victim"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (victim,))  # type: ignore[return-value]

    torch.save({"elman": {}, "x": Payload()}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Payload()))
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(ModelError):
            read_checkpoint(tmp_path / name)
    assert not victim.exists()


def test_a_checkpoint_with_the_vocabulary_of_another_is_refused(
    trained: tuple[RunResult, RunStore, Path], tmp_path: Path
) -> None:
    checkpoint = torch.load(trained[2], weights_only=True)
    checkpoint["elman"]["architecture"]["vocabulary_size"] += 1
    checkpoint["elman"]["architecture"]["num_inputs"] += 1
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ModelError, match="does not hold the model it describes"):
        load_model(str(tmp_path / "other.ckpt"))


@pytest.mark.parametrize(
    "reference", ["models:/nobody@champion", "models:/nobody/3", "0" * 32, "nobody", "no/such.ckpt"]
)
def test_a_model_that_does_not_exist_is_one_clear_line(
    trained: tuple[RunResult, RunStore, Path], reference: str
) -> None:
    with pytest.raises((ModelError, TrackingError)) as refusal:
        load_model(reference, trained[1])
    assert reference in str(refusal.value)
    assert "\n" not in str(refusal.value)
