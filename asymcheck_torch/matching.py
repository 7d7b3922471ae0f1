"""Stored leaves matched with tensors that exist: compared first, then read in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from asymcheck.errors import StateMismatchError
from asymcheck.reader import Checkpoint, Destination
from asymcheck.reshard import boxes_of_range
from asymcheck.state import LeafSpec
from asymcheck_torch.parts import Part, part_of, whole
from asymcheck_torch.sharding_types import is_dtensor
from asymcheck_torch.tensors import byte_view, identity, torch_dtype

_MAX_BOUNCE_NBYTES = 256 << 20

Held = torch.Tensor | Part


@dataclass
class Matching:
    """Which leaf goes into which tensor, and everything that is wrong with that.

    Attributes:
        checkpoint: where the leaves are.
        problems: what does not fit, in words.
        targets: leaf path -> the tensor, or the part of one, that it is read into.
    """

    checkpoint: Checkpoint
    problems: list[str] = field(default_factory=list[str])
    targets: dict[str, Held] = field(default_factory=dict[str, Held])

    def spec(self, path: str) -> LeafSpec:
        """The leaf of a path, which may be an alias."""
        primary = self.checkpoint.aliases.get(path, path)
        return self.checkpoint.leaves[primary]

    def names(self, what: str, expected: Iterable[str], found: Iterable[str]) -> None:
        """Both have the same names, in any order."""
        expected, found = list(expected), list(found)
        missing, unexpected = set(expected) - set(found), set(found) - set(expected)
        self.problems += [
            f"{what} {name!r} is missing in it" for name in expected if name in missing
        ]
        self.problems += [f"{what} {name!r} is only in it" for name in found if name in unexpected]

    def tensors(self, kind: str, expected: Mapping[str, Held], paths: Mapping[str, str]) -> None:
        """Existing tensors, to be filled by the leaves of the same names."""
        self.names(kind, expected, paths)
        for name in expected.keys() & paths.keys():
            self.tensor(f"{kind} {name!r}", expected[name], paths[name])
        self._check_ties(kind, expected, paths)

    def tensor(self, what: str, tensor: Held, path: str) -> None:
        """A tensor to be filled by a leaf."""
        spec = self.spec(path)
        if tuple(tensor.shape) != spec.shape:
            self.problems.append(f"{what} has shape {list(tensor.shape)}, in it {list(spec.shape)}")
        elif tensor.dtype != torch_dtype(spec.dtype, spec.path):
            self.problems.append(f"{what} is {tensor.dtype}, in it {spec.dtype}")
        else:
            self.targets[path] = tensor

    def _check_ties(
        self, kind: str, expected: Mapping[str, Held], paths: Mapping[str, str]
    ) -> None:
        """What is one tensor here must be one leaf there, or one would overwrite the other."""
        first: dict[Any, str] = {}
        for name, tensor in expected.items():
            other = first.setdefault(identity(tensor), name)
            if {name, other} <= paths.keys() and self.spec(paths[name]) != self.spec(paths[other]):
                self.problems.append(f"{kind}s {other!r} and {name!r} are tied, in it they are two")

    def raise_problems(self) -> None:
        """`StateMismatchError` listing all of them, if there are any."""
        if self.problems:
            raise StateMismatchError(
                f"the checkpoint does not fit, in {len(self.problems)} place(s); nothing was "
                "changed:\n  " + "\n  ".join(self.problems),
                step=self.checkpoint.step,
            )

    def read(self) -> None:
        """Fill all targets: contiguous CPU memory directly, the rest by way of bounded buffers.

        What is tied is filled once: blocks are decoded in place, at the same time.
        """
        once = {identity(tensor): path for path, tensor in self.targets.items()}
        parts = {path: _part_of(path, self.targets[path]) for path in once.values()}
        direct = {path: part for path, part in parts.items() if _is_direct(part.tensor)}
        self.checkpoint.read_into(
            destination
            for path, part in direct.items()
            for destination in _destinations(path, part, part.tensor)
        )
        for batch in _batches([item for item in parts.items() if item[0] not in direct]):
            self._read_bounced(batch)

    def _read_bounced(self, batch: list[tuple[str, Part]]) -> None:
        beside = {
            path: torch.empty(part.tensor.shape, dtype=part.dtype, pin_memory=part.tensor.is_cuda)
            for path, part in batch
        }
        self.checkpoint.read_into(
            destination
            for path, part in batch
            for destination in _destinations(path, part, beside[path])
        )
        for path, part in batch:
            part.tensor.detach().copy_(beside[path])


def _part_of(path: str, tensor: Held) -> Part:
    if isinstance(tensor, Part):
        return tensor
    if is_dtensor(tensor):
        return part_of(tensor, path)
    return whole(tensor, 0, 1, path)


def _is_direct(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def _destinations(path: str, part: Part, memory: torch.Tensor) -> Iterator[Destination]:
    """The boxes of the leaf that lie one after the other in a part's memory."""
    out, itemsize = byte_view(memory), memory.element_size()
    for box in boxes_of_range(part.shard, part.start, memory.numel()):
        nbytes = box.size * itemsize
        yield Destination(path, box, out[:nbytes])
        out = out[nbytes:]


def _batches(items: list[tuple[str, Part]]) -> Iterator[list[tuple[str, Part]]]:
    batch: list[tuple[str, Part]] = []
    nbytes = 0
    for path, part in items:
        if batch and nbytes + part.tensor.nbytes > _MAX_BOUNCE_NBYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append((path, part))
        nbytes += part.tensor.nbytes
    if batch:
        yield batch
