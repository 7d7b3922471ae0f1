"""The errors of Google Cloud Storage's JSON API that the stand-in can answer with."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(eq=False)
class Refusal(Exception):
    """An answer that is no success, with the status and the reason that Google documents.

    Attributes:
        violation: what a correct client would never have sent; empty if a correct one may see this.
    """

    status: int
    reason: str
    message: str
    violation: str = ""

    def body(self) -> bytes:
        """The JSON document that describes the error; none where Google documents none."""
        if self.status in (304, 308, 499):
            return b""
        error = {
            "message": self.message,
            "domain": _DOMAINS.get(self.reason, "global"),
            "reason": self.reason,
        }
        if self.reason in _LOCATIONS:
            error |= {"locationType": "header", "location": _LOCATIONS[self.reason]}
        document = {"error": {"code": self.status, "message": self.message, "errors": [error]}}
        return json.dumps(document, indent=1).encode()


_DOMAINS = {"rateLimitExceeded": "usageLimits", "quotaExceeded": "usageLimits"}
_LOCATIONS = {
    "authError": "Authorization",
    "required": "Authorization",
    "conditionNotMet": "If-Match",
    "requestedRangeNotSatisfiable": "Range",
}

_ON_DEMAND = {
    "authError": (401, "Invalid Credentials"),
    "forbidden": (403, "Caller does not have permission"),
    "quotaExceeded": (403, "The requested operation requires more resources than the quota allows"),
    "uploadBrokenConnection": (408, "Request timed out"),
    "rateLimitExceeded": (429, "The rate of requests exceeds the limit"),
    "internalError": (500, "Internal Error"),
    "backendError": (503, "Backend Error"),
}


def on_demand(reason: str) -> Refusal:
    """The error of that reason; `KeyError` for one that nobody may ask for."""
    status, message = _ON_DEMAND[reason]
    return Refusal(status, reason, message)


def malformed(what: str, reason: str = "invalid", status: int = 400) -> Refusal:
    """The refusal of a request that no correct client sends."""
    return Refusal(status, reason, what, violation=what)


def not_found(what: str) -> Refusal:
    """404 for an object or a bucket."""
    return Refusal(404, "notFound", what)


def condition_not_met() -> Refusal:
    """412."""
    message = "At least one of the pre-conditions you specified did not hold."
    return Refusal(412, "conditionNotMet", message)


def not_modified() -> Refusal:
    """304: an `if...NotMatch` does not hold."""
    return Refusal(304, "notModified", "")
