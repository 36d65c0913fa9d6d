"""The hub: which commit a data set's revision stands for, asked before anything is fetched.

A library that finds no network tries for long; one short question tells at once whether the hub
is there, and whether it has the data set.
"""

from __future__ import annotations

import os
import re

from elman.errors import DataError

OFFLINE_CHOICES = "Offline there are corpus.name bible-asv, python-docs, or the path of a text file."

_HUB_SECONDS = 5.0
_COMMIT = re.compile("[0-9a-f]{40}")


def resolve_commit(repository: str, revision: str | None) -> str:
    """Commit that a revision stands for, asked of the hub within a few seconds.

    Raises:
        DataError: If the hub is out of reach, or has no such data set or revision, or guards it.
    """
    if revision and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    described = f"hub:{repository}"
    gated = (
        f"{described}: is gated: accept its terms at https://huggingface.co/datasets/{repository}, then set HF_TOKEN "
        "or log in with `hf auth login`."
    )
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        info = hub.dataset_info(repository, revision=revision, timeout=_HUB_SECONDS)
        if info.gated:
            hub.auth_check(repository, repo_type="dataset")
    except GatedRepoError:
        raise DataError(gated) from None
    except RepositoryNotFoundError:
        raise DataError(
            f"{described}: the hub has no such public data set: check the name, or set HF_TOKEN if it is private."
        ) from None
    except RevisionNotFoundError:
        raise DataError(f"{described}: has no revision {revision!r}: check corpus.revision.") from None
    except HFValidationError:
        raise DataError(f"corpus.name: {described} names no data set: write hub:OWNER/NAME.") from None
    except OfflineModeIsEnabled:
        raise DataError(f"{described}: HF_HUB_OFFLINE is set, so the hub is not asked. {OFFLINE_CHOICES}") from None
    except HfHubHTTPError as error:
        raise DataError(f"{described}: the hub refuses: {str(error).splitlines()[0]}") from None
    except Exception as error:  # the HTTP client's own errors have no base of their own
        raise DataError(
            f"{described}: the hub is out of reach ({type(error).__name__}: {' '.join(str(error).split())[:120]}). "
            f"{OFFLINE_CHOICES}"
        ) from None
    return info.sha or revision or "main"
