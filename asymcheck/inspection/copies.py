"""`asymcheck copy`: steps of a run, with all that they decode from, in another store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from asymcheck.commit import committed_steps
from asymcheck.copying import CopiedStep, StepCopier
from asymcheck.errors import (
    AsymCheckError,
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    UnsupportedVersionError,
)
from asymcheck.inspection.progress import Progress
from asymcheck.inspection.progress import steps as count
from asymcheck.inspection.text import size
from asymcheck.inspection.verification import Damage, damage_of
from asymcheck.stores.base import Store
from asymcheck.tiers import Tiers


@dataclass(frozen=True)
class Uncopied:
    """A step that is not copied, and why: damage of it or of a step that it decodes from."""

    step: int
    damage: Damage

    def __str__(self) -> str:
        of = "" if self.damage.step == self.step else f" of step {self.damage.step}"
        return f"step {self.step}: NOT COPIED, damage{of}: {self.damage}"


@dataclass(frozen=True)
class Copies:
    """The steps that the target has now; those kept out by damage; those removed meanwhile."""

    source: str
    target: str
    steps: list[CopiedStep] = field(default_factory=list[CopiedStep])
    uncopied: list[Uncopied] = field(default_factory=list[Uncopied])
    removed_steps: list[int] = field(default_factory=list[int])

    @property
    def good(self) -> bool:
        """Whether nothing was damaged."""
        return not self.uncopied

    def text(self) -> Iterator[str]:
        """A line for each step, and a summary."""
        for copied in self.steps:
            sent = f"{size(copied.sent_nbytes)} in {copied.sent_objects} objects"
            yield f"step {copied.step}: " + (sent if copied.copied else "there already")
        yield from map(str, self.uncopied)
        yield from (f"step {step}: removed meanwhile" for step in self.removed_steps)
        copied = [step for step in self.steps if step.copied]
        sent_nbytes = sum(step.sent_nbytes for step in copied)
        yield f"copied {count(len(copied))}, {size(sent_nbytes)}, to {self.target}"


def copy_step(source: Store, target: Store, step: int, progress: bool | None = None) -> Copies:
    """Copy a step and its chain; see `StepCopier.copy` for the errors."""
    with _copier(source, target, progress) as copier:
        return Copies(source.url, target.url, copier.copy(step))


def copy_newest(source: Store, target: Store, progress: bool | None = None) -> Copies:
    """Copy the newest step that is not damaged; newer ones, which are, are listed.

    Raises:
        CheckpointNotFoundError: the source has no step.
        StepExistsError, CommitError, StoreError: see `StepCopier.copy`.
    """
    copies = Copies(source.url, target.url)
    with _copier(source, target, progress) as copier:
        try:
            copied = Tiers(source).read_newest(
                lambda _, step: copier.copy(step),
                lambda _, step, error: copies.uncopied.append(_uncopied(step, error)),
            )
            copies.steps.extend(copied)
        except CheckpointNotFoundError:
            if copies.good:
                raise
    return copies


def copy_all(source: Store, target: Store, progress: bool | None = None) -> Copies:
    """Copy every step that is not damaged, nor decodes from one that is.

    Raises:
        StepExistsError, CommitError, StoreError: see `StepCopier.copy`.
    """
    copies = Copies(source.url, target.url)
    with _copier(source, target, progress) as copier:
        for step in committed_steps(source):
            try:
                copies.steps.append(copier.copy(step)[-1])
            except UnsupportedVersionError:
                raise
            except (CorruptionError, FormatError) as error:
                copies.uncopied.append(_uncopied(step, error))
            except CheckpointNotFoundError:
                copies.removed_steps.append(step)
    return copies


def _uncopied(step: int, error: AsymCheckError) -> Uncopied:
    return Uncopied(step, damage_of(error, step))


def _copier(source: Store, target: Store, progress: bool | None) -> StepCopier:
    return StepCopier(
        source,
        target,
        watch=lambda step, nbytes: Progress(f"copying step {step}", nbytes, progress),
    )
