"""What becomes of TensorStore's messages; see also tests/test_object_stores.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asymcheck.errors import (
    ObjectNotFoundError,
    ShortReadError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreUnavailableError,
)
from asymcheck.stores.tensorstore_errors import store_error

BODY = '[http_response_body=\'{\\"error\\": {\\"reason\\": \\"%s\\", secret}\']'


def remote(message: str) -> StoreError:
    return store_error("read in", "gs://bucket", message, remote=True, object="k")


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("NOT_FOUND: The specified bucket does not exist.", StoreError),
        ("OUT_OF_RANGE: the storage is full of expired credentials", ShortReadError),
        ("ABORTED: All 3 retry attempts failed: Backend Error", StoreUnavailableError),
        ("DEADLINE_EXCEEDED: CURL error Timeout was reached", StoreUnavailableError),
        ("UNKNOWN: CURL error SSL peer certificate is not OK", StoreUnavailableError),
        ("UNAUTHENTICATED: who?", StorePermissionError),
        ("Bad Request [http_response_code='400'] " + BODY % "invalid_grant", StorePermissionError),
        ("PERMISSION_DENIED: no [http_response_code='403'] " + BODY % "forbidden",
         StorePermissionError),
        ("PERMISSION_DENIED: no [http_response_code='403'] " + BODY % "quotaExceeded",
         StoreFullError),
        (BODY % "forbidden", StoreError),
        ("Something else", StoreError),
        ("", StoreError),
    ],
)  # fmt: skip
def test_kinds_of_remote_stores(message: str, kind: type[StoreError]) -> None:
    assert type(remote(message)) is kind


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("NOT_FOUND: no such file", ObjectNotFoundError),
        ("RESOURCE_EXHAUSTED: no space", StoreFullError),
        ("PERMISSION_DENIED: no", StorePermissionError),
        ("UNKNOWN: CURL error", StoreError),
    ],
)
def test_kinds_of_local_stores(message: str, kind: type[StoreError]) -> None:
    error = store_error("read in", "memory://a", message, remote=False, object="k")
    assert type(error) is kind


@pytest.mark.parametrize(
    "payloads",
    [
        "[http_response_body='secret'] [http_response_code='403']",
        "[http_response_code='403'] [x-amzn-requestid='secret'] [http_response_body='secret",
        "[source locations='a.cc:1'] [http_response_body='secret\n'] [http_response_code='403']",
    ],
)
def test_only_the_code_is_taken_from_an_answer(payloads: str) -> None:
    error = remote(f"PERMISSION_DENIED: Forbidden {payloads}")
    assert str(error).startswith("cannot read in gs://bucket: Forbidden (HTTP 403) [object k]. ")
    assert "secret" not in str(error)
    assert "source" not in str(error)


@given(st.text(), st.sampled_from(["", "NOT_FOUND: ", "ABORTED: All 1 retry attempts failed: "]))
def test_any_text_is_one_short_line(text: str, status: str) -> None:
    message = str(remote(status + text))
    assert len(message.splitlines()) == 1
    assert len(message) < 800
