"""The drivers of TensorStore: one entry for each kind of place."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asymcheck.errors import StoreError
from asymcheck.stores.base import Guarantees
from asymcheck.stores.options import StoreOptions
from asymcheck.stores.urls import RemotePlace

FIRST_RETRY_DELAY_S = 0.5
LONGEST_RETRY_DELAY_S = 16.0
"""The delay doubles from retry to retry, up to this: the 8 of the default take about a minute."""

_AWS_KEYS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{1,220}[A-Za-z0-9]")


@dataclass(frozen=True, slots=True)
class Driver:
    """How TensorStore reaches a place, and what is to be known about it.

    Attributes:
        url: of the place, as it is shown.
        spec: TensorStore's name for it.
        guarantees: what it promises.
        timeout_s: for one operation; None for a place in this process or machine.
        remote: whether it is an object store behind a network: an error "not found" then means
            the bucket, and a removal need not ask first whether the object is there.
        hides_missing_bucket: whether a conditional put into a missing bucket looks like one that
            lost.
        may_cut_wrongly: whether what was published must be checked for its length.
        hides_refused_listings: whether what it lists must be checked against what was answered.
    """

    url: str
    spec: dict[str, Any]
    guarantees: Guarantees
    timeout_s: float | None = None
    remote: bool = False
    hides_missing_bucket: bool = False
    may_cut_wrongly: bool = False
    hides_refused_listings: bool = False


def memory_driver(name: str) -> Driver:
    """Objects in this process, shared by all who name them so."""
    return Driver(
        f"memory://{name}",
        {"driver": "memory", "path": f"{name}/"},
        Guarantees("a lock", "a lock", False, True, False),
    )


def file_driver(path: str) -> Driver:
    """Files, written by TensorStore: not durable, since new directories are not synced."""
    return Driver(
        f"tensorstore+file://{path}",
        {"driver": "file", "path": f"{Path(path).resolve()}/"},
        Guarantees("temporary name, rename", "a lock file", False, True, True),
        # A killed writer's `KEY.__lock` is not cut by the next: old bytes may follow the new.
        may_cut_wrongly=True,
    )


def gcs_driver(place: RemotePlace) -> Driver:
    """Google Cloud Storage, by its JSON API.

    Raises:
        StoreError: an option that TensorStore cannot pass on.
    """
    if place.options.endpoint is not None:
        raise StoreError(
            "gs:// has no option endpoint",
            hint="Set TENSORSTORE_GCS_HTTP_URL in the environment: it holds for the process",
        )
    if place.options.region is not None:
        raise StoreError("gs:// has no option region", hint="Buckets are found by name alone")
    if place.options.credentials not in (None, "default"):
        raise StoreError(
            "gs:// does not know this source of credentials, which is not shown here",
            expected="default: the application default credentials; without them, anonymous",
            hint="Set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login",
        )
    return Driver(
        place.url,
        {"driver": "gcs", "bucket": _bucket(place), **_spec_of(place, "gcs")},
        _uploads("ifGenerationMatch=0", place),
        place.options.timeout_s,
        remote=True,
        hides_refused_listings=True,
    )


def s3_driver(place: RemotePlace) -> Driver:
    """Amazon S3, or a server that speaks its protocol.

    Raises:
        StoreError: an unknown source of credentials.
    """
    spec = {
        "driver": "s3",
        "bucket": _bucket(place),
        "aws_credentials": _aws_credentials(place.options),
        # The condition goes with the upload. Otherwise TensorStore looks first and uploads then,
        # and relies on the condition for some hosts only.
        "use_conditional_write": True,
        **_spec_of(place, "s3"),
    }
    if place.options.endpoint is not None:
        spec["endpoint"] = place.options.endpoint.rstrip("/")
    if place.options.region is not None:
        spec["aws_region"] = place.options.region
    return Driver(
        place.url,
        spec,
        _uploads("If-None-Match: *", place),
        place.options.timeout_s,
        remote=True,
        hides_missing_bucket=True,
    )


def _uploads(condition: str, place: RemotePlace) -> Guarantees:
    return Guarantees(
        "an upload of known length",
        condition,
        durable=True,
        consistent_list=True,
        rename=False,
        tried_first=True,
        concurrency=place.options.concurrency,
    )


def _spec_of(place: RemotePlace, prefix: str) -> dict[str, Any]:
    """What object stores have in common."""
    return {
        "path": f"{place.prefix}/" if place.prefix else "",
        f"{prefix}_request_retries": {
            "max_retries": place.options.retries,
            "initial_delay": f"{FIRST_RETRY_DELAY_S}s",
            "max_delay": f"{LONGEST_RETRY_DELAY_S}s",
        },
        f"{prefix}_request_concurrency": {"limit": place.options.concurrency},
    }


def _bucket(place: RemotePlace) -> str:
    if _BUCKET.fullmatch(place.authority) is None:
        raise StoreError(
            f"the {place.scheme}:// URL names no bucket, but something that is not shown here",
            expected=f"{place.scheme}://BUCKET/PREFIX, with 3 to 222 of [A-Za-z0-9._-]",
        )
    return place.authority


def _aws_credentials(options: StoreOptions) -> dict[str, Any]:
    if options.credentials is None and os.environ.keys() >= _AWS_KEYS:
        # The default chain looks there first, too, but complains of files that are not there.
        return {"type": "environment"}
    source, _, name = (options.credentials or "default").partition(":")
    if source == "profile" and name:
        return {"type": "profile", "profile": name}
    if source in ("default", "environment", "anonymous") and not name:
        return {"type": source}
    raise StoreError(
        "s3:// does not know this source of credentials, which is not shown here",
        expected="default, environment, anonymous or profile:NAME",
    )
