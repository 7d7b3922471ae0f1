"""`asymcheck import`: a checkpoint of another library as a step of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from asymcheck.checkpointer import Checkpointer
from asymcheck.errors import StepExistsError
from asymcheck.inspection import plugins
from asymcheck.inspection.text import size
from asymcheck.state import numpy_view


@dataclass(frozen=True)
class Imported:
    """The step that was written."""

    source: str
    format: str
    run: str
    step: int
    leaves: int
    nbytes: int

    def text(self) -> list[str]:
        """What was read, and where it is now."""
        leaves = f"{self.leaves} leaves, {size(self.nbytes)}"
        return [f"{self.source}: {leaves}, now step {self.step} of {self.run}"]


def formats() -> list[str]:
    """The formats that can be imported."""
    return plugins.names("importers")


def import_checkpoint(
    source: str | os.PathLike[str], format: str, url: str | os.PathLike[str], step: int
) -> Imported:
    """Read a checkpoint of another library and commit it as a step; its state is held in memory.

    Returns when the step is durable. Nothing that the source holds is executed.

    Raises:
        ValueError: there is no such format.
        MissingLibraryError: the format's library is not installed.
        StepExistsError: the step is committed already; the source was not read.
        SourceError: the source is not of the format, is damaged, or would run code.
        UnsupportedStateError: it holds something that no checkpoint of ours can.
        StoreError, SaveFailedError: the store failed.
    """
    read: plugins.Importer = plugins.load("importers", format)
    with Checkpointer(url) as checkpointer:
        if step in checkpointer.steps():
            raise StepExistsError("the run has this step already", step=step, hint="Name another")
        state = read(Path(source))
        leaves = [held.leaf for held in numpy_view(state).sources]
        checkpointer.save(step, state).wait()
    nbytes = sum(leaf.nbytes for leaf in leaves)
    return Imported(os.fspath(source), format, os.fspath(url), step, len(leaves), nbytes)
