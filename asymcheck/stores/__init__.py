"""Stores: the places where bytes are kept, and how a URL names one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from urllib.parse import unquote

from asymcheck.errors import StoreError
from asymcheck.stores.base import Store
from asymcheck.stores.local import LocalStore
from asymcheck.stores.options import StoreOptions

__all__ = ["LocalStore", "Store", "StoreOptions", "open_store"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://(.*)", re.DOTALL)


def open_store(url: str | os.PathLike[str], options: StoreOptions | None = None) -> Store:
    """The store that `url` names; nothing is created or read yet.

    Args:
        url: a path, or `file:///PATH` (percent-encoded): `LocalStore`. `memory://NAME`: objects
            in this process, shared by all who open that NAME. `tensorstore+file:///PATH`: files
            written by TensorStore's driver. `gs://BUCKET/PREFIX`, `s3://BUCKET/PREFIX`: an object
            store; options may follow as a query, `?region=eu-west-1&retries=3`, and go before
            those in `options`. `hdfs://HOST:PORT/PATH`, `webhdfs://HOST:PORT/PATH`: a directory in
            HDFS (`asymcheck[hdfs]`). docs/stores.md tells all of it.
        options: for remote stores; others have none.

    Raises:
        StoreError: the scheme or an option is unknown, the URL names no place, or it holds
            credentials (which are not shown).
    """
    options = options or StoreOptions()
    parsed = _URL.fullmatch(url) if isinstance(url, str) else None
    if parsed is None:
        return _open_path("file", _required(os.fspath(url), "a path"), options)
    scheme, location = parsed[1].lower(), parsed[2]
    if scheme not in _OPENERS:
        raise StoreError(
            f"unknown kind of store {scheme!r}",
            expected=f"a path, or a URL starting with {', '.join(f'{s}://' for s in _OPENERS)}",
        )
    return _OPENERS[scheme](scheme, location, options)


def _open_path(scheme: str, path: str, options: StoreOptions) -> Store:
    _refuse_options(scheme, options)
    return LocalStore(path)


def _open_file(scheme: str, location: str, options: StoreOptions) -> Store:
    return _open_path(scheme, _absolute_path(scheme, location), options)


# TensorStore takes long to import: only who asks for it waits for it.


def _open_memory(scheme: str, name: str, options: StoreOptions) -> Store:
    from asymcheck.stores.drivers import memory_driver
    from asymcheck.stores.tensorstore import KeyValueStore

    _refuse_options(scheme, options)
    return KeyValueStore(memory_driver(_required(name, f"{scheme}://NAME")))


def _open_tensorstore_file(scheme: str, location: str, options: StoreOptions) -> Store:
    from asymcheck.stores.drivers import file_driver
    from asymcheck.stores.tensorstore import KeyValueStore

    _refuse_options(scheme, options)
    return KeyValueStore(file_driver(_absolute_path(scheme, location)))


def _open_object_store(scheme: str, location: str, options: StoreOptions) -> Store:
    from asymcheck.stores.drivers import gcs_driver, s3_driver
    from asymcheck.stores.tensorstore import KeyValueStore
    from asymcheck.stores.urls import remote_place

    place = remote_place(scheme, location, options)
    return KeyValueStore(gcs_driver(place) if scheme == "gs" else s3_driver(place))


def _open_hdfs(scheme: str, location: str, options: StoreOptions) -> Store:
    from asymcheck.stores.hdfs import open_hdfs
    from asymcheck.stores.urls import remote_place

    return open_hdfs(remote_place(scheme, location, options))


_OPENERS: dict[str, Callable[[str, str, StoreOptions], Store]] = {
    "file": _open_file,
    "memory": _open_memory,
    "tensorstore+file": _open_tensorstore_file,
    "gs": _open_object_store,
    "s3": _open_object_store,
    "hdfs": _open_hdfs,
    "webhdfs": _open_hdfs,
}
"""What opens the rest of a URL of each scheme."""


def _absolute_path(scheme: str, location: str) -> str:
    path = unquote(location.removeprefix("localhost"))
    if not path.startswith("/"):
        raise StoreError(
            f"the {scheme}:// URL names no absolute path", expected=f"{scheme}:///ABSOLUTE/PATH"
        )
    return path


def _required(place: str, expected: str) -> str:
    if not place:
        raise StoreError("the name of a store is empty", expected=expected)
    return place


def _refuse_options(scheme: str, options: StoreOptions) -> None:
    if options.given():
        raise StoreError(
            f"a store of {scheme}:// has no options",
            expected="options for remote stores only",
            found=", ".join(options.given()),
        )
