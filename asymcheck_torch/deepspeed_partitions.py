"""What DeepSpeed's ranks wrote of their optimizers, put together again by parameter.

ZeRO lays the parameters of a group end to end in a flat tensor. Stages 1 and 2 give every rank a
stretch of it, and the file says where in that the pieces of parameters are; stage 3 cuts each
parameter by itself into equal pieces, the last of them padded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asymcheck.errors import SourceError
from asymcheck.state import dtype_of
from asymcheck_torch.deepspeed_archive import Archive, Tensor
from asymcheck_torch.optimizers import kind_of

Shapes = Mapping[str, tuple[int, ...]]
"""{parameter name: shape}, in the order in which they lie in a flat tensor."""


@dataclass(frozen=True)
class Partition:
    """One rank's part.

    Attributes:
        archive: the file.
        masters: the master weights, a flat tensor for each group.
        states: what the optimizer keeps for each of these.
        pieces: {parameter name: (start, count)} of each.
        groups: the parameter groups: options, and `params`, numbers of flat tensors.
        loss_scaler: a record, or None.
    """

    archive: Archive
    masters: list[Tensor]
    states: list[dict[str, Any]]
    pieces: list[dict[str, tuple[int, int]]]
    groups: list[dict[str, Any]]
    loss_scaler: Any

    @classmethod
    def of(cls, archive: Archive, shapes: Sequence[Shapes], rank: int, ranks: int) -> Partition:
        """The part of a rank.

        Raises:
            SourceError: it is of another number of ranks, or laid out in a way that is not known.
        """
        state = archive.state["optimizer_state_dict"]
        by_parameter = "fp32_flat_groups" in state
        base = state["optimizer_state_dict" if by_parameter else "base_optimizer_state"]
        masters = state["fp32_flat_groups" if by_parameter else "single_partition_of_fp32_groups"]
        if isinstance(base, list) or state.get("ds_zero_partition_groups") is not None:
            raise SourceError(
                "elastic checkpoints and AutoEP are not known", object=str(archive.path)
            )
        counts = state["partition_count"]
        if {ranks} != set(counts if isinstance(counts, list) else [counts]):
            raise SourceError(
                "the state is cut into another number of parts than there are ranks",
                object=str(archive.path),
                expected=ranks,
                found=str(counts)[:80],
            )
        if by_parameter:
            pieces = [_cut_by_parameter(each, rank, ranks) for each in shapes]
        else:
            pieces = [
                {name: (piece["start"], piece["numel"]) for name, piece in mapping.items()}
                for mapping in state["param_slice_mappings"]
            ]
        if not len(shapes) == len(masters) == len(pieces):
            raise SourceError("there are parameters of another optimizer", object=str(archive.path))
        states = [base["state"].get(number, {}) for number in range(len(masters))]
        scaler = state.get("loss_scaler")
        return cls(archive, masters, states, pieces, base["param_groups"], scaler)


def _cut_by_parameter(shapes: Shapes, rank: int, ranks: int) -> dict[str, tuple[int, int]]:
    pieces: dict[str, tuple[int, int]] = {}
    start = 0
    for name, shape in shapes.items():
        count = -(-math.prod(shape) // ranks)
        pieces[name] = start, max(0, min(count, math.prod(shape) - rank * count))
        start += count
    return pieces


@dataclass
class Optimized:
    """Parameters that are trained and what the optimizer keeps for them.

    Attributes:
        params: {name: master weights}.
        kinds: {kind: {name: array}}, as `asymcheck_torch.state.TrainingState` has them.
        other: {name: {key: number}}, what is no array.
    """

    params: dict[str, NDArray[Any]] = field(default_factory=dict[str, NDArray[Any]])
    kinds: dict[str, dict[str, NDArray[Any]]] = field(
        default_factory=dict[str, dict[str, NDArray[Any]]]
    )
    other: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    def keep(self, name: str, key: str, value: Any) -> None:
        """Note what the optimizer keeps for a parameter; `step` is an array as torch's AdamW's."""
        if key == "step" and type(value) in (int, float) and float(np.float32(value)) == value:
            value = np.array(value, np.float32)
        if isinstance(value, np.ndarray):
            self.kinds.setdefault(kind_of(0, key), {})[name] = value
        elif value is None or type(value) in (int, float, bool, str):
            self.other.setdefault(name, {})[key] = value
        else:
            raise SourceError("the optimizer keeps what is not known", leaf=name, found=key)


def join_partitions(partitions: Sequence[Partition], shapes: Sequence[Shapes]) -> Optimized:
    """All parameters in their global shapes, from the parts of all ranks, in order.

    Raises:
        SourceError: the parts do not make up the parameters, or contradict each other.
    """
    found = Optimized()
    for number, group in enumerate(shapes):
        found.params |= _join(partitions, number, group, lambda p, n=number: p.masters[n])
        for key in _keys(partitions, number):
            values = [partition.states[number][key] for partition in partitions]
            if isinstance(values[0], Tensor) and len(values[0].shape) == 1:
                arrays = _join(partitions, number, group, lambda p, n=number, k=key: p.states[n][k])
            else:
                arrays = dict.fromkeys(group, _common(partitions, values, key))
            for name, value in arrays.items():
                found.keep(name, key, value.copy() if isinstance(value, np.ndarray) else value)
    return found


def _keys(partitions: Sequence[Partition], number: int) -> list[str]:
    """What the optimizer keeps for a flat tensor, on every rank."""
    keys = list(partitions[0].states[number])
    for partition in partitions:
        if partition.states[number].keys() != set(keys):
            raise SourceError("ranks keep other state", object=str(partition.archive.path))
    return keys


def _join(
    partitions: Sequence[Partition],
    number: int,
    shapes: Shapes,
    tensor_of: Callable[[Partition], Tensor],
) -> dict[str, NDArray[Any]]:
    """The parameters of a flat tensor of which each rank has a part."""
    parts = [(p, tensor_of(p), p.pieces[number]) for p in partitions]
    _check_cover(parts, shapes)
    dtype = dtype_of(parts[0][1].dtype)
    arrays = {name: np.empty(shape, dtype) for name, shape in shapes.items()}
    filled = dict.fromkeys(shapes, 0)
    for partition, tensor, pieces in parts:
        elements = partition.archive.view(tensor)
        for name, (start, count) in pieces.items():
            done = filled[name]
            arrays[name].reshape(-1)[done : done + count] = elements[start : start + count]
            filled[name] += count
    return arrays


def _check_cover(
    parts: Sequence[tuple[Partition, Tensor, dict[str, tuple[int, int]]]], shapes: Shapes
) -> None:
    """Refuse pieces that lie outside of their tensors or do not make up the parameters."""
    found = dict.fromkeys(shapes, 0)
    for partition, tensor, pieces in parts:
        length, place = partition.archive.length(tensor), str(partition.archive.path)
        for name, (start, count) in pieces.items():
            if name not in found or not 0 <= start <= start + count <= length:
                raise SourceError("a piece of a parameter is none", leaf=name, object=place)
            found[name] += count
        if any(start < end for start, end in _neighbours(pieces)):
            raise SourceError("pieces of parameters overlap", object=place)
        if tensor.dtype != parts[0][1].dtype:
            raise SourceError("ranks have other dtypes", object=place, found=tensor.dtype)
    for name, shape in shapes.items():
        if found[name] != math.prod(shape):
            raise SourceError(
                "the pieces do not make up the parameter",
                leaf=name,
                expected=f"{math.prod(shape)} elements",
                found=found[name],
            )


def _neighbours(pieces: Mapping[str, tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(where a piece starts, where the one before it ends)."""
    ordered = sorted(pieces.values())
    for (before, count), (start, _) in itertools.pairwise(ordered):
        yield start, before + count


def _common(partitions: Sequence[Partition], values: list[Any], key: str) -> Any:
    """What all ranks keep alike: a number, or a tensor of no dimensions."""
    plain = [
        p.archive.array(value) if isinstance(value, Tensor) else value
        for p, value in zip(partitions, values, strict=True)
    ]
    if any(isinstance(value, np.ndarray) and value.ndim for value in plain):
        raise SourceError("the optimizer keeps what belongs to no parameter", found=key)
    if any(type(value) is not type(plain[0]) or value != plain[0] for value in plain):
        raise SourceError("ranks contradict each other", expected=f"one {key}", found=plain[:8])
    return plain[0]
