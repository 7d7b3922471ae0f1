"""`asymcheck diff`: what changed between two steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from asymcheck import tree
from asymcheck.inspection.progress import Progress
from asymcheck.inspection.text import shape, shortened, table
from asymcheck.inspection.values import as_numbers, pieces
from asymcheck.reader import Checkpoint, LazyArray
from asymcheck.state import LeafSpec


@dataclass(frozen=True)
class LeafChange:
    """How a leaf of the same dtype and shape differs.

    An element counts as changed if its bits did: NaN is equal to the same NaN, -0.0 not to 0.0.
    `max_abs` and `rms` are of the differences of all elements that are finite in both steps
    (magnitudes for complex numbers), in float64, the greatest of integers exact; None if there
    are none. `nonfinite` counts the changed elements that are NaN or infinite in one step.
    """

    path: str
    dtype: str
    shape: list[int]
    elements: int
    changed: int
    nonfinite: int
    max_abs: float | None
    rms: float | None

    @property
    def fraction(self) -> float:
        """Share of the elements that changed."""
        return self.changed / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class Retyped:
    """A leaf whose dtype or shape is not the same."""

    path: str
    dtypes: tuple[str, str]
    shapes: tuple[list[int], list[int]]


@dataclass(frozen=True)
class ValueChange:
    """A number, string, truth value or `None` of the state, as Python writes it; None: absent."""

    path: str
    first: str | None
    second: str | None


@dataclass(frozen=True)
class Comparison:
    """All differences between two steps; metadata are not compared.

    `structure_changed` says that the containers, their order or which leaves are tied differ.
    """

    first: str
    second: str
    compared: int
    changed: list[LeafChange]
    retyped: list[Retyped]
    added: list[str]
    removed: list[str]
    values: list[ValueChange]
    structure_changed: bool
    totals: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def same(self) -> bool:
        """Whether both steps hold the same state, bit for bit."""
        lists = (self.changed, self.retyped, self.added, self.removed, self.values)
        return not any(lists) and not self.structure_changed

    def text(self) -> Iterator[str]:
        """Tables of the changed leaves and values, then a summary."""
        yield f"from {self.first} to {self.second}"
        heads = ("LEAF", "DTYPE", "SHAPE", "CHANGED", "MAX ABS", "RMS", "NAN/INF")
        yield from table(heads, [_row(leaf) for leaf in self.changed], "LEAF DTYPE")
        for leaf in self.retyped:
            sides = (f"{d}{shape(s)}" for d, s in zip(leaf.dtypes, leaf.shapes, strict=True))
            yield f"retyped  {leaf.path}: {' -> '.join(sides)}"
        yield from (f"added    {path}" for path in self.added)
        yield from (f"removed  {path}" for path in self.removed)
        for value in self.values:
            yield f"value    {value.path}: {_shown(value.first)} -> {_shown(value.second)}"
        if self.structure_changed:
            yield "the containers, their order or the tied leaves differ"
        yield (
            f"{len(self.changed)} of {self.compared} leaves changed, "
            f"{self.totals['changed']} of {self.totals['elements']} elements"
        )


def compare(first: Checkpoint, second: Checkpoint, progress: bool | None = None) -> Comparison:
    """Compare two open steps, of any runs, leaf by leaf in pieces.

    Raises:
        CorruptionError: stored bytes are missing or wrong.
        StoreError: a store cannot be read.
    """
    common = [path for path in first.leaves if path in second.leaves]
    alike = [path for path in common if first.leaves[path] == second.leaves[path]]
    nbytes = sum(first.leaves[path].nbytes for path in alike)
    with Progress("comparing", nbytes, progress) as done:
        leaves = [compare_leaf(first[path], second[path], path, done) for path in alike]
    changed = [leaf for leaf in leaves if leaf.changed]
    values = _value_changes(first.structure, second.structure)
    leaves_differ = set(first.leaves) != set(second.leaves)
    return Comparison(
        first=_name(first),
        second=_name(second),
        compared=len(alike),
        changed=changed,
        retyped=[
            _retyped(first.leaves[path], second.leaves[path])
            for path in common
            if first.leaves[path] != second.leaves[path]
        ],
        added=[path for path in second.leaves if path not in first.leaves],
        removed=[path for path in first.leaves if path not in second.leaves],
        values=values,
        structure_changed=first.aliases != second.aliases
        or (first.structure != second.structure and not values and not leaves_differ),
        totals={
            "elements": sum(leaf.elements for leaf in leaves),
            "changed": sum(leaf.changed for leaf in leaves),
        },
    )


def compare_leaf(
    first: LazyArray, second: LazyArray, path: str, done: Progress | None = None
) -> LeafChange:
    """Compare two arrays of the same dtype and shape."""
    tally = _Tally()
    for piece in pieces(first.shape):
        a, b = np.asarray(first[piece]), np.asarray(second[piece])
        tally.add(a.reshape(-1), b.reshape(-1))
        if done is not None:
            done.add(a.nbytes)
    rms = (tally.squares / tally.finite) ** 0.5 if tally.finite else None
    return LeafChange(
        path,
        first.dtype.name,
        list(first.shape),
        tally.elements,
        tally.changed,
        tally.nonfinite,
        tally.max_abs if tally.finite else None,
        rms,
    )


@dataclass
class _Tally:
    elements: int = 0
    changed: int = 0
    nonfinite: int = 0
    finite: int = 0
    max_abs: float = 0
    squares: float = 0.0

    def add(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        self.elements += a.size
        changed = _bits_differ(a, b)
        count = int(np.count_nonzero(changed))
        self.changed += count
        x, y = as_numbers(a), as_numbers(b)
        finite = np.isfinite(x) & np.isfinite(y)
        self.finite += int(np.count_nonzero(finite))
        if not count:
            return
        self.nonfinite += int(np.count_nonzero(changed & ~finite))
        both = changed & finite
        if both.any():
            sizes = _distances(a[both], b[both], x[both], y[both])
            self.max_abs = max(self.max_abs, sizes.max().item())
            with np.errstate(over="ignore"):
                self.squares += float(np.square(sizes.astype(np.float64)).sum())


def _bits_differ(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    width = min(a.itemsize, 8)
    bits = [x.view(f"u{width}").reshape(x.size, -1) for x in (a, b)]
    return (bits[0] != bits[1]).any(axis=1)


def _distances(a: NDArray[Any], b: NDArray[Any], x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """|a - b|, exactly for integers; x and y are a and b as floats."""
    if a.dtype.kind not in "iu":
        with np.errstate(over="ignore"):
            return np.abs(x - y)
    word = f"u{a.itemsize}"
    return np.where(a >= b, a.view(word) - b.view(word), b.view(word) - a.view(word))


def _name(checkpoint: Checkpoint) -> str:
    return f"step {checkpoint.step}"


def _retyped(first: LeafSpec, second: LeafSpec) -> Retyped:
    return Retyped(first.path, (first.dtype, second.dtype), (list(first.shape), list(second.shape)))


def _value_changes(first: tree.Node, second: tree.Node) -> list[ValueChange]:
    if first == second:
        return []
    a, b = inline_values(first), inline_values(second)
    return [
        ValueChange(path, a.get(path), b.get(path))
        for path in dict.fromkeys([*a, *b])
        if a.get(path) != b.get(path)
    ]


def inline_values(structure: tree.Node) -> dict[str, str]:
    """What a structure holds besides leaves: path -> the value, as Python writes it."""
    values: dict[str, str] = {}

    def walk(path: str, value: object) -> None:
        if isinstance(value, Mapping):
            for key, item in cast("Mapping[str | int, object]", value).items():
                walk(tree.join_path(path, key), item)
        elif isinstance(value, list | tuple):
            for i, item in enumerate(cast("list[object]", value)):
                walk(tree.join_path(path, i), item)
        elif not isinstance(value, np.ndarray | np.generic | bytes):  # those were leaves
            values[path or tree.ROOT_PATH] = repr(value)

    walk("", tree.unflatten(structure, lambda _: np.zeros((), np.uint8)))
    return values


def _shown(value: str | None) -> str:
    return "-" if value is None else shortened(value, 60)


def _row(leaf: LeafChange) -> tuple[str, ...]:
    return (
        leaf.path,
        leaf.dtype,
        shape(leaf.shape),
        f"{100 * leaf.fraction:.4g} %",
        "-" if leaf.max_abs is None else f"{leaf.max_abs:.4g}",
        "-" if leaf.rms is None else f"{leaf.rms:.4g}",
        str(leaf.nonfinite),
    )
