"""Formats that adapters bring, which the core finds by name and does not import.

A package announces them as entry points, of the groups

- `asymcheck.exporters`: an `Exporter`, which writes a directory;
- `asymcheck.importers`: an `Importer`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from asymcheck import tree
from asymcheck.inspection.optional import load_optional
from asymcheck.reader import Checkpoint

Exporter = Callable[[Checkpoint, Path, Callable[[int], None]], None]
"""Writes a checkpoint to a directory that does not exist yet, and reports bytes as they are read.

When it fails it may leave parts of it behind, there or beside it. Raises `UnsupportedStateError`
for what the format cannot hold, `StoreError` if it cannot write.
"""
Importer = Callable[[Path], Any]
"""Reads a file or directory as a state that `Checkpointer.save` takes.

Raises `SourceError` if it is not of the format; whatever it holds, none of it is executed.
"""
Kind = Literal["exporters", "importers"]


def names(kind: Kind) -> list[str]:
    """The formats that installed packages bring."""
    return sorted({entry.name for entry in entry_points(group=f"asymcheck.{kind}")})


def load(kind: Kind, name: str) -> Any:
    """The `Exporter` or `Importer` of a format.

    Raises:
        ValueError: there is no such format.
        MissingLibraryError: the format's library is not installed.
    """
    found = next(iter(entry_points(group=f"asymcheck.{kind}", name=name)), None)
    if found is None:
        raise ValueError(f"no format {name!r} among the {kind}; one of {', '.join(names(kind))}")
    extra = found.module.partition(".")[0].removeprefix("asymcheck_")
    return getattr(load_optional(found.module, extra, f"for the format {name}"), found.attr)


def read_state(checkpoint: Checkpoint, done: Callable[[int], None]) -> Any:
    """The whole state as it was saved, with NumPy arrays, read leaf by leaf."""
    arrays: dict[str, NDArray[Any]] = {}
    for path, leaf in checkpoint.items():
        arrays[path] = np.asarray(leaf[...])
        done(arrays[path].nbytes)
    return tree.unflatten(checkpoint.structure, arrays.__getitem__)
