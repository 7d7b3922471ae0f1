"""Libraries that a plain install does not have."""

from __future__ import annotations

import importlib
from typing import Any

from asymcheck.errors import AsymCheckError


class MissingLibraryError(AsymCheckError):
    """An optional library is not installed."""


def load_optional(module: str, extra: str, purpose: str) -> Any:
    """Import a module that the extra `asymcheck[extra]` brings.

    Raises:
        MissingLibraryError: it cannot be imported; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise MissingLibraryError(
            f"{purpose}, {library} is needed ({error})",
            hint=f"pip install 'asymcheck[{extra}]'",
        ) from error
