"""What the URL of a remote store names, without secrets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from asymcheck.errors import StoreError
from asymcheck.stores.options import StoreOptions, options_of

MAX_PREFIX_NBYTES = 500
"""So that the longest key below it fits into the 1024 bytes that object stores allow."""

_LOCATION = re.compile(r"([^/?#]*)(?:/([^?#]*))?(?:\?([^#]*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class RemotePlace:
    """`SCHEME://AUTHORITY/PREFIX` and the options for whoever goes there.

    Attributes:
        authority: a bucket, or a host and port.
        prefix: of all keys, decoded, without a slash at either end; empty for the whole place.
    """

    scheme: str
    authority: str
    prefix: str
    options: StoreOptions

    @property
    def url(self) -> str:
        """The URL, with the options that are not the defaults; opens the same place again."""
        url = f"{self.scheme}://{self.authority}"
        if self.prefix:
            url += "/" + quote(self.prefix, safe="/!$&'()*+,;=:@~")
        query = self.options.query()
        return f"{url}?{query}" if query else url


def remote_place(scheme: str, location: str, options: StoreOptions) -> RemotePlace:
    """Read what follows `SCHEME://`; its query goes before `options`.

    Raises:
        StoreError: user info (which is not shown), no authority, an unknown option, a fragment,
            or a prefix that is no path of names.
    """
    match = _LOCATION.fullmatch(location)
    if match is None:
        raise StoreError(f"the {scheme}:// URL has a fragment", hint="A '#' in a path is %23")
    authority, path, query = match[1], match[2] or "", match[3] or ""
    if "@" in authority:
        raise StoreError(
            f"the {scheme}:// URL has user info, which is not shown here",
            expected=f"{scheme}://AUTHORITY/PREFIX",
            hint="Secrets do not belong into URLs: see 'Credentials' in docs/stores.md",
        )
    if not authority:
        raise StoreError(f"the {scheme}:// URL names no place", expected=f"{scheme}://NAME/PREFIX")
    return RemotePlace(scheme, authority, _prefix(scheme, path), options_of(query, options))


def _prefix(scheme: str, path: str) -> str:
    prefix = unquote(path).removesuffix("/")
    bad_name = any(name in ("", ".", "..") for name in prefix.split("/")) and prefix
    if bad_name or not prefix.isprintable() or len(prefix.encode()) > MAX_PREFIX_NBYTES:
        raise StoreError(
            f"the path of the {scheme}:// URL is no prefix for objects",
            expected=f"names between single slashes, at most {MAX_PREFIX_NBYTES} bytes",
        )
    return prefix
