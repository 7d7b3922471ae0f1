"""What can be told to a store, as an object or in the query of its URL."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

from asymcheck.errors import StoreError

_ENDPOINT = re.compile(
    r"https?://([\w.\-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[\w.~\-]+)*/?", re.ASCII
)
_REGION = re.compile(r"[A-Za-z0-9\-]{1,64}")
_NUMBERS = {"retries": int, "timeout_s": float, "concurrency": int}
_LOOKS_LIKE_A_NAME = re.compile(r"[a-z][a-z_]{0,30}")


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Options of remote stores; as the query of a URL, `s3://bucket/run?region=eu-west-1&retries=3`.

    None leaves a choice to the client of the store. Secrets are no options: they come from where
    `credentials` says, and are never in a URL.

    Attributes:
        endpoint: `http://HOST:PORT` or `https://...` of a server that speaks the same protocol.
        region: of the bucket.
        credentials: where they come from; see docs/stores.md for what each store knows.
        retries: how often a request that failed in passing is sent again.
        timeout_s: how long one operation may take, its retries included.
        concurrency: requests at a time.

    Raises:
        StoreError: an option cannot be one. Its value is not shown, since it may be a secret.
    """

    endpoint: str | None = None
    region: str | None = None
    credentials: str | None = None
    retries: int = 8
    timeout_s: float = 120.0
    concurrency: int = 32

    def __post_init__(self) -> None:
        if self.retries < 0 or self.concurrency < 1 or not 0 < self.timeout_s < float("inf"):
            raise StoreError(
                "store options are out of range",
                expected="retries >= 0, timeout_s > 0, concurrency >= 1",
                found=f"{self.retries}, {self.timeout_s}, {self.concurrency}",
            )
        if self.endpoint is not None and _ENDPOINT.fullmatch(self.endpoint) is None:
            raise StoreError(
                "the option endpoint is no address of a server",
                expected="http://HOST:PORT or https://HOST, without user info and query",
            )
        if self.region is not None and _REGION.fullmatch(self.region) is None:
            raise StoreError("the option region is no name of one", expected="like eu-west-1")

    def given(self) -> dict[str, str | int | float]:
        """Those that differ from the defaults."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: v for name, v in values.items() if v != getattr(_DEFAULTS, name)}

    def query(self) -> str:
        """Those that differ from the defaults, as `options_of` reads them."""
        return urlencode(self.given(), safe=":/")


_DEFAULTS = StoreOptions()


def options_of(query: str, defaults: StoreOptions) -> StoreOptions:
    """`defaults`, changed by the query of a URL.

    Raises:
        StoreError: an option is unknown, given twice, or no number where one is needed. What was
            given is not shown, since it may be a secret.
    """
    names = [field.name for field in dataclasses.fields(StoreOptions)]
    given: dict[str, str | int | float] = {}
    for position, (name, value) in enumerate(parse_qsl(query, keep_blank_values=True), 1):
        if name not in names or name in given:
            shown = repr(name) if _LOOKS_LIKE_A_NAME.fullmatch(name) else f"number {position}"
            raise StoreError(
                f"the option {shown} in the query of a store's URL is unknown or given twice",
                expected=f"each at most once of {', '.join(names)}",
                hint="Secrets are no options: see 'Credentials' in docs/stores.md",
            )
        try:
            given[name] = _NUMBERS[name](value) if name in _NUMBERS else value
        except ValueError:
            raise StoreError(
                f"the option {name!r} in the query of a store's URL is no number",
                expected=f"{name}=NUMBER",
            ) from None
    return dataclasses.replace(defaults, **given)  # pyright: ignore[reportArgumentType]
