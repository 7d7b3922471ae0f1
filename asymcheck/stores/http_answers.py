"""What HTTP servers have answered to TensorStore, counted for the whole process.

TensorStore's `gcs` driver takes a refused page of a listing (401, 403, 404 and others that are not
sent again) for the last one: what it lists then ends early, or is empty, without an error. Whoever
collects what nobody names would delete everything. The counts give a refusal away, whatever else
the process asks for meanwhile.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import tensorstore

ts: Any = tensorstore  # it ships no types

_COUNTS = "/tensorstore/http/response_codes"
_BUCKET_MISSING = Counter({"404": 1})
# No answers to a listing, but to reads and conditional writes of other threads, in good order:
# not modified, no such object, condition not met, past the end.
_OF_OTHERS = {"304", "404", "412", "416"}
_SENT_AGAIN = {"408", "429"}


def answers() -> Counter[str]:
    """How many answers there were of each status code; those that are rare have the code ''."""
    counts: Counter[str] = Counter()
    for metric in ts.experimental_collect_matching_metrics(_COUNTS):
        counts.update({str(v["code"]): int(v["value"]) for v in metric["values"]})
    return counts


def refusal_since(before: Counter[str]) -> str | None:
    """The status code of a refusal of a listing that lies between `before` and now, if any.

    None is certain, but for a missing bucket (404) while other requests are under way. A code may
    also be another request's. It is '' if it is a rare one, or nothing was counted.
    """
    since = answers() - before
    if not since:
        return ""
    if since == _BUCKET_MISSING:
        return "404"
    passing = _OF_OTHERS | _SENT_AGAIN
    refused = (code for code in since if code[:1] not in ("1", "2", "5") and code not in passing)
    return next(refused, None)
