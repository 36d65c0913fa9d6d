"""Models in MLflow: logged to a run, and fetched again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from elman.errors import ModelError
from elman.tracking.store import RunStore


def send_pyfunc(
    store: RunStore,
    run_id: str,
    place: Path,
    *,
    loader_module: str,
    package: str,
    example: str,
    parameters: Mapping[str, int | float],
    requirements: Sequence[str],
) -> str:
    """Log a text-to-text model that MLflow can load anywhere, unless the run has it; returns its URI.

    MLflow's own torch formats serve neither: torch.export freezes the sequence length of
    an LSTM, and the other is a pickle.

    Args:
        store: Where to.
        run_id: Whose model it is.
        place: Folder with ``files``, weights and JSON, and with the package's code.
        loader_module: Has _load_pyfunc(path of the files).
        package: Folder that holds loader_module, to be packed with them.
        example: A prompt.
        parameters: Of predict, with their defaults.
        requirements: Packages that it needs, pinned to the installed versions.
    """
    import mlflow.pyfunc
    from mlflow.entities import LoggedModelStatus
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    experiment_id = store.client.get_run(run_id).info.experiment_id
    for earlier in store.client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'"):
        if earlier.status == LoggedModelStatus.READY:
            return str(earlier.model_uri)
        store.client.delete_logged_model(earlier.model_id)  # somebody was killed over it
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
    with store.as_mlflows_own():
        # A model goes to the active experiment, whatever its run's is.
        mlflow.set_experiment(experiment_id=experiment_id)
        info = Model.log(
            artifact_path=None,
            name="model",
            flavor=mlflow.pyfunc,
            run_id=run_id,
            loader_module=loader_module,
            data_path=str(place / "files"),
            code_paths=[str(place / package)],
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
