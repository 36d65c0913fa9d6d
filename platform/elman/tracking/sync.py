"""Delivering what waits in the outboxes of runs whose processes are gone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from elman.config.schema import TrackingConfig
from elman.errors import TrackingError, without_password
from elman.tracking.absence import StoreAwayError
from elman.tracking.local import local_uri, opened, outboxes
from elman.tracking.outbox import Outbox
from elman.tracking.sender import Sender
from elman.tracking.store import RunStore, tracking_uri


@dataclass
class SyncResult:
    """What came of it.

    Attributes:
        delivered: Run (its id in the store, where that is known) → records that the store took.
        waiting: Run → records that wait still.
        refused: Run → records that the store does not want.
        busy: Outboxes that another process has open, as their folders are called.
        reasons: Why records wait still, each once.
    """

    delivered: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    busy: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def stranded() -> int:
    """Runs with records that wait, and no process to deliver them."""
    count = 0
    for folder in outboxes():
        with opened(folder) as outbox:
            if outbox is not None:
                count += outbox.waiting() > 0
    return count


def sync(config: TrackingConfig) -> SyncResult:
    """Deliver what waits.

    Args:
        config: Its URI counts for runs that were to go there; their passwords are not kept with them.

    Raises:
        TrackingError: A store can be named by no URI that is known, or cannot be used at all.
    """
    result = SyncResult()
    stores: dict[tuple[str, str], RunStore | str] = {}
    for folder in outboxes():
        with opened(folder, tidy=True) as outbox:
            if outbox is None:
                result.busy.append(folder.name)
                continue
            before = outbox.waiting()
            if before:
                store = _store(outbox, config, stores)
                if isinstance(store, RunStore):
                    sender = Sender(outbox, store)
                    sender.start()
                    sender.drain(hurried=False)
                    sender.stop()
                    reason = sender.verdict
                else:
                    reason = store
                if reason is not None and reason not in result.reasons:
                    result.reasons.append(reason)
            run, after = str(outbox.fact("run") or folder.name), outbox.waiting()
            if before > after:
                result.delivered[run] = before - after
            if after:
                result.waiting[run] = after
            if outbox.refused():
                result.refused[run] = outbox.refused()
    return result


def _store(
    outbox: Outbox, config: TrackingConfig, stores: dict[tuple[str, str], RunStore | str]
) -> RunStore | str:
    """The store that a run is to be recorded in, or why it cannot be used now."""
    meant = outbox.fact("store")
    uri = None if meant["is_local"] else meant["uri"]
    given = tracking_uri(config)
    if uri is not None and without_password(given) == uri:
        uri = given
    elif uri is not None and "***@" in uri:
        raise TrackingError(
            f"{outbox.folder}: its store {uri} wants a password, which is not kept: give the whole address as "
            "--tracking.uri or MLFLOW_TRACKING_URI."
        )
    key = (uri or "", meant["experiment"])
    if key not in stores:
        # The local one is where it always is, whatever the environment says.
        place = replace(config, uri=uri or local_uri(), experiment=meant["experiment"])
        try:
            stores[key] = RunStore(place)
        except StoreAwayError as error:
            stores[key] = f"{without_password(place.uri or '')}: {error.reason}"
    return stores[key]
