"""Errors of TensorStore as errors of a store, without what nobody may read.

TensorStore's messages quote answers of servers, which may quote what was sent: the raw message is
never shown, nor chained. A service's own text is, in short and without what looks like a secret.
"""

from __future__ import annotations

import os
import re
from http import HTTPStatus

from asymcheck.errors import (
    ObjectNotFoundError,
    ShortReadError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreUnavailableError,
)

_MAX_TEXT = 300
_PARTS = re.compile(r"(?:([A-Z_]+): )?(.*?)((?:\s*\[[\w \-]+='.*)?)", re.DOTALL)
_HTTP_CODE = re.compile(r"\[http_response_code='(\d+)'\]")
_REASON = re.compile(r"""(?:reason|error)\\?"\s*:\s*\\?"(\w{1,40})""")

_SECRET_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING",
)
_CODE_OF_SERVICE = re.compile(r"[A-Za-z]{1,60}(?:: |\Z)")
_NAMES_OF_SECRETS = "signature|credential|token|secret|password|key"
_LOOKS_SECRET = re.compile(
    r"(?i:authorization\s*:.*|bearer\s+\S+|x-[\w\-]+\s*:\s*\S+)"
    rf"|(?i:(?:{_NAMES_OF_SECRETS})[\w\-]*[\"']?\s*[=:]\s*\S+)"
    r"|//[^/\s@]+@"
    r"|A[A-Z]IA[A-Z0-9]{12,}"
    r"|(?=[A-Za-z+/=_\-]*[0-9])[A-Za-z0-9+/=_\-]{30,}"
)

_LATER = "What was stored before is intact; the same can be tried again later"
_BUCKET = "Create the bucket, or check its name and the options endpoint and region"
_RIGHTS = "Whoever the credentials stand for (nobody, if none were found) may not do this"
_LOGIN = "Credentials are missing, wrong or expired: renew them, or check the option credentials"

# Of "STATUS HTTP_CODE text", with "-" for what is not there: the first that matches counts.
_REMOTE = [
    (r"OUT_OF_RANGE", ShortReadError, None),
    (r"\S+ 429 ", StoreUnavailableError, f"Lower the option concurrency, or wait. {_LATER}"),
    (
        r"\S+ 507 |.*(?:quota|storage|space)\W?(?:limit)?(?:is)?\W?(?:exceeded|full)"
        r"|.*more resources than the quota",
        StoreFullError,
        "Free space (or raise the quota); what was stored before is intact",
    ),
    (r"\S+ (?:408|5\d\d) ", StoreUnavailableError, _LATER),
    (
        r".*CURL error",
        StoreUnavailableError,
        f"Check the network, the proxy and the option endpoint. {_LATER}",
    ),
    (r".*(?:expired|TokenRefreshRequired|invalid_grant)", StorePermissionError, _LOGIN),
    (r".*(?:InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken)", StorePermissionError, _LOGIN),
    (r".*credentials", StorePermissionError, _LOGIN),
    (r"\S+ 401 |UNAUTHENTICATED", StorePermissionError, _LOGIN),
    (r"\S+ 403 |PERMISSION_DENIED", StorePermissionError, _RIGHTS),
    (r"NOT_FOUND|\S+ 404 ", StoreError, _BUCKET),
    (
        r"\S+ 30\d |.*(?:aws_region|AuthorizationHeaderMalformed|IllegalLocation)",
        StoreError,
        "Set the option region to the bucket's own",
    ),
    (r"UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|CANCELLED", StoreUnavailableError, _LATER),
    (
        r"FAILED_PRECONDITION - Requested byte range",
        StoreError,
        "Something between here and the store changes what it stores (Content-Encoding)",
    ),
]
_LOCAL = [
    (r"NOT_FOUND", ObjectNotFoundError, None),
    (r"OUT_OF_RANGE", ShortReadError, None),
    (
        r"RESOURCE_EXHAUSTED",
        StoreFullError,
        "Free space (or raise the quota); what was stored before is intact",
    ),
    (r"PERMISSION_DENIED", StorePermissionError, "Check owner, mode and mount options"),
]


def store_error(
    action: str,
    url: str,
    message: str,
    *,
    remote: bool,
    object: str | None,
) -> StoreError:
    """The error that a message of TensorStore stands for.

    Args:
        action: what cannot be done, before the URL in the message: "read in".
        remote: whether the store is behind a network, where "not found" means the bucket.
        object: the key or the prefix concerned.
    """
    parts = _PARTS.fullmatch(message)
    assert parts is not None  # it takes anything
    status, text, payloads = parts[1] or "-", parts[2], parts[3]
    found = _HTTP_CODE.search(payloads)
    code = found[1] if found else "-"
    kind, hint = _kind(f"{status} {code} {text} {_reason(payloads)}", remote)
    shown = without_secrets(" ".join(text.split()))[:_MAX_TEXT]
    if found:
        shown = f"{_phrase(int(code)) if text == 'Unknown' else shown} (HTTP {code})"
    return kind(f"cannot {action} {url}: {shown}", object=object, hint=hint)


def without_secrets(text: str) -> str:
    """The text without the secrets in the environment, and without what may be another one."""
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 8:
            text = text.replace(value, "...")
    code = _CODE_OF_SERVICE.match(text)
    begin = code.end() if code else 0
    return text[:begin] + _LOOKS_SECRET.sub("...", text[begin:])


def _phrase(code: int) -> str:
    return HTTPStatus(code).phrase if code in set(HTTPStatus) else "no reason given"


def _reason(payloads: str) -> str:
    """The word in an answer of Google's that tells most; no other part of an answer is used."""
    found = _REASON.search(payloads)
    return found[1] if found else ""


def _kind(found: str, remote: bool) -> tuple[type[StoreError], str | None]:
    for pattern, kind, hint in _REMOTE if remote else _LOCAL:
        if re.match(pattern, found, re.DOTALL | re.IGNORECASE):
            return kind, hint
    return StoreError, None
