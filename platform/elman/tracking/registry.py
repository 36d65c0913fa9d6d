"""Registered models: versions of a name, the best of which is the champion."""

from __future__ import annotations

import logging

from elman.errors import TrackingError
from elman.tracking.sender import is_refusal
from elman.tracking.store import RunStore

log = logging.getLogger(__name__)

CHAMPION = "champion"


def register(
    store: RunStore, run_id: str, model_uri: str, name: str, *, bits_per_byte: float, digest: str
) -> tuple[str, bool]:
    """Register a run's model, and make it champion where it is the best of its name.

    Versions compare by the bits per byte of the test split (of the validation split
    where there is none), and only on one and the same corpus.

    Returns:
        The new version, and whether it is the champion now.

    Raises:
        TrackingError: MLflow refuses the name.
    """
    from mlflow.exceptions import MlflowException

    client = store.client
    try:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        earlier = client.search_model_versions(f"name='{name}' and run_id='{run_id}'")
        if earlier:  # a run that was killed after this, and went on
            version = earlier[0]
        else:
            with store.as_mlflows_own():  # it looks the logged model up on its own account
                tags = {"bits_per_byte": repr(bits_per_byte), "corpus.digest": digest}
                version = client.create_model_version(
                    name, model_uri, run_id=run_id, tags=tags,
                    model_id=model_uri.removeprefix("models:/") if model_uri.startswith("models:/m-") else None,
                )  # fmt: skip
        holder = client.get_registered_model(name).aliases.get(CHAMPION)
        if holder is not None:
            champion = client.get_model_version(name, holder)
            if champion.tags.get("corpus.digest") != digest:
                log.warning(
                    "%s version %s keeps the alias %s: it was judged on another corpus, and the two do not compare.",
                    name, holder, CHAMPION,
                )  # fmt: skip
                return str(version.version), False
            if float(champion.tags["bits_per_byte"]) <= bits_per_byte:
                return str(version.version), False
        client.set_registered_model_alias(name, CHAMPION, version.version)
    except MlflowException as error:
        if not is_refusal(error):
            raise
        raise TrackingError(f"tracking.register {name}: MLflow refuses it ({str(error).splitlines()[0]}).") from None
    return str(version.version), True
