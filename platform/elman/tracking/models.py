"""Models in MLflow: logged to a run, and fetched again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from elman.errors import ModelError
from elman.tracking.store import Run, RunStore


def log_pyfunc(
    run: Run,
    *,
    loader_module: str,
    files: Path,
    code: Path,
    example: str,
    parameters: Mapping[str, int | float],
    requirements: Sequence[str],
) -> str:
    """Log a text-to-text model that MLflow can load anywhere; returns its URI.

    MLflow's own torch formats serve neither: torch.export freezes the sequence length of
    an LSTM, and the other is a pickle.

    Args:
        run: Whose model it is.
        loader_module: Has _load_pyfunc(path of ``files``).
        files: Weights and JSON.
        code: Package folder that holds loader_module, to be packed with them.
        example: A prompt.
        parameters: Of predict, with their defaults.
        requirements: Packages that it needs, pinned to the installed versions.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    # That it checks the example is no news.
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    specs = [
        ParamSpec(name, DataType.long if isinstance(default, int) else DataType.double, default)
        for name, default in parameters.items()
    ]
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(specs),
    )
    with run.store.as_mlflows_own():
        # A model goes to the active experiment, whatever its run's is.
        mlflow.set_experiment(experiment_id=run.experiment_id)
        info = Model.log(
            artifact_path=None,
            name="model",
            flavor=mlflow.pyfunc,
            run_id=run.id,
            loader_module=loader_module,
            data_path=str(files),
            code_paths=[str(code)],
            signature=signature,
            input_example=[example],
            # Left to itself MLflow runs the model to guess these.
            pip_requirements=[f"{name}=={metadata.version(name).split('+')[0]}" for name in requirements],
        )
    return str(info.model_uri)


def download_model(store: RunStore, reference: str, into: Path) -> Path:
    """A local copy of ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

    Raises:
        ModelError: There is no such model.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        with store.as_mlflows_own():
            return Path(mlflow.artifacts.download_artifacts(reference, dst_path=str(into)))
    except (MlflowException, OSError) as error:
        raise ModelError(
            f"There is no model {reference} ({str(error).splitlines()[0][:150]}): "
            "--tracking.register NAME registers one when it is trained."
        ) from None
