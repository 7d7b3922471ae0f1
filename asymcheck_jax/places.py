"""What the path that Orbax gives for a save says."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from urllib.parse import quote

from asymcheck.manifest import MAX_STEP

_TEMPORARY = ".orbax-checkpoint-tmp"
_NUMBER = re.compile("[0-9]+")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a save goes, and what can be told from the names.

    Attributes:
        url: as `open_store` takes it: an absolute path, or a URL.
        root: where all steps lie; a path or a URL, too.
        item: the item's name; empty for a checkpointer without a manager.
        number: the step's number, as far as its directory's name has one.
        is_local: it is a directory of a file system.
        is_certain: `item` is no guess. Where Orbax names directories for good at once (in object
            stores) names alone tell: an item's has no number, and its step's has.
    """

    url: str
    root: str
    item: str
    number: int | None
    is_local: bool
    is_certain: bool

    @classmethod
    def of(cls, directory: os.PathLike[str]) -> Place:
        """Taken apart."""
        text = os.fspath(directory)
        scheme, separator, rest = text.partition("://")
        path = PurePosixPath(rest) if separator else Path(text).absolute()
        is_certain = _TEMPORARY in path.parent.name or _TEMPORARY in path.name
        if is_certain:
            managed = _TEMPORARY in path.parent.name
        else:
            managed = not _NUMBER.search(path.name) and bool(_NUMBER.search(path.parent.name))
        step = path.parent if managed else path

        def url(path: PurePath) -> str:
            return f"{scheme}://{quote(str(path))}" if separator else str(path)

        return cls(
            url(path),
            url(step.parent),
            _named(path) if managed else "",
            _number(_named(step)),
            is_local=not separator,
            is_certain=is_certain,
        )


def _named(path: PurePath) -> str:
    """The name that Orbax will give the directory."""
    return path.name.split(_TEMPORARY)[0]


def _number(name: str) -> int | None:
    numbers = [int(digits) for digits in _NUMBER.findall(name)]
    return numbers[-1] if numbers and numbers[-1] <= MAX_STEP else None
