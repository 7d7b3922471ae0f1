"""Stores: the places where bytes are kept, and how a URL names one."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from asymcheck.errors import StoreError
from asymcheck.stores.base import Store
from asymcheck.stores.local import LocalStore

__all__ = ["LocalStore", "Store", "open_store"]

SCHEMES = ("file", "memory", "tensorstore+file")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://(.*)", re.DOTALL)


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store that `url` names; nothing is created or read yet.

    Args:
        url: a path, or `file:///PATH` (percent-encoded): `LocalStore`. `memory://NAME`: objects
            in this process, shared by all who open that NAME. `tensorstore+file:///PATH`: files
            written by TensorStore's driver.

    Raises:
        StoreError: the scheme is unknown, or the URL names no place.
    """
    parsed = _URL.fullmatch(url) if isinstance(url, str) else None
    if parsed is None:
        return LocalStore(_required(os.fspath(url), url))
    scheme, location = parsed[1].lower(), parsed[2]
    if scheme not in SCHEMES:
        raise StoreError(
            f"unknown kind of store {scheme!r} in {url!r}",
            expected=f"a path, or a URL starting with {', '.join(f'{s}://' for s in SCHEMES)}",
        )
    if scheme != "memory":
        location = _absolute_path(location, url)
    if scheme == "file":
        return LocalStore(location)
    # TensorStore takes long to import: only who asks for it waits for it.
    from asymcheck.stores.tensorstore import KeyValueStore

    return KeyValueStore(scheme, _required(location, url))


def _absolute_path(location: str, url: object) -> str:
    path = unquote(location.removeprefix("localhost"))
    if not path.startswith("/"):
        raise StoreError(f"{url!r} names no absolute path", expected="SCHEME:///ABSOLUTE/PATH")
    return path


def _required(location: str, url: object) -> str:
    if not location:
        raise StoreError(f"{url!r} names no place", expected="a path, or a name after ://")
    return location
