"""`asymcheck diff`: differences of every dtype, counted and measured."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from sample_run import state_at, write_run

import asymcheck
from asymcheck.cli import main
from asymcheck.inspection.comparison import Comparison, compare, inline_values
from asymcheck.state import DTYPES, dtype_of
from asymcheck.tree import flatten


@pytest.fixture
def compared(tmp_path: Path) -> Any:
    """Save two states as steps 1 and 2 and compare them."""

    def compared(first: object, second: object) -> Comparison:
        root = tempfile.mkdtemp(dir=tmp_path)
        with asymcheck.Checkpointer(root) as checkpointer:
            checkpointer.save(1, first)
            checkpointer.save(2, second)
        with asymcheck.open_checkpoint(root, 1) as a, asymcheck.open_checkpoint(root, 2) as b:
            return compare(a, b, progress=False)

    return compared


@pytest.mark.parametrize("name", DTYPES)
def test_one_changed_element_of_every_dtype(compared: Any, name: str) -> None:
    first = np.ones(8).astype(dtype_of(name))
    second = first.copy()
    second[5] = 0 if name == "bool" else 4
    result = compared({"x": first, "y": first}, {"x": second, "y": first.copy()})
    assert not result.same
    (leaf,) = result.changed
    size = 1 if name == "bool" else 3
    assert (leaf.path, leaf.dtype, leaf.elements, leaf.changed) == ("x", name, 8, 1)
    assert leaf.max_abs == size
    assert leaf.rms == pytest.approx(size / 8**0.5)
    assert leaf.nonfinite == 0


@pytest.mark.parametrize("name", ["float16", "float32", "float64", "bfloat16", "float8_e5m2"])
def test_nan_and_infinity(compared: Any, name: str) -> None:
    first = np.array([np.nan, np.nan, np.inf, np.inf, 1, 2]).astype(dtype_of(name))
    second = np.array([np.nan, 1, np.inf, -np.inf, np.nan, 4]).astype(dtype_of(name))
    (leaf,) = compared({"x": first}, {"x": second}).changed
    assert (leaf.changed, leaf.nonfinite) == (4, 3)
    assert leaf.max_abs == 2
    assert leaf.rms == 2


def test_all_nan(compared: Any) -> None:
    first = np.full(4, np.nan)
    assert compared({"x": first}, {"x": first.copy()}).same
    (leaf,) = compared({"x": np.zeros(4)}, {"x": first}).changed
    assert (leaf.nonfinite, leaf.max_abs, leaf.rms) == (4, None, None)


def test_the_sign_of_zero_counts(compared: Any) -> None:
    (leaf,) = compared({"x": np.zeros(3)}, {"x": -np.zeros(3)}).changed
    assert (leaf.changed, leaf.max_abs) == (3, 0)


@pytest.mark.parametrize(
    ("dtype", "a", "b"),
    [
        ("int64", -(2**63), 2**63 - 1),
        ("int64", 2**62 + 1, 2**62),
        ("uint64", 0, 2**64 - 1),
        ("uint8", 255, 1),
        ("int8", -128, 127),
    ],
)
def test_integers_are_exact(compared: Any, dtype: str, a: int, b: int) -> None:
    (leaf,) = compared({"x": np.array([a], dtype)}, {"x": np.array([b], dtype)}).changed
    assert leaf.max_abs == abs(a - b)


def test_complex_magnitudes(compared: Any) -> None:
    first, second = np.array([1 + 1j, 5], "complex64"), np.array([4 + 5j, 5], "complex64")
    (leaf,) = compared({"x": first}, {"x": second}).changed
    assert (leaf.changed, leaf.max_abs) == (1, 5)


def test_empty_and_0d_leaves(compared: Any) -> None:
    first = {"e": np.zeros((0, 3)), "s": np.float32(1)}
    second = {"e": np.zeros((0, 3)), "s": np.float32(2)}
    result = compared(first, second)
    assert [leaf.path for leaf in result.changed] == ["s"]
    assert compared(first, first).same


def test_leaves_added_removed_and_retyped(compared: Any) -> None:
    first = {"a": np.ones(3), "b": np.ones(3), "c": np.ones((2, 3), np.float32)}
    second = {"b": np.ones(3, ml_dtypes.bfloat16), "c": np.ones((3, 2), np.float32), "d": first}
    result = compared(first, second)
    assert result.added == ["d/a", "d/b", "d/c"]
    assert result.removed == ["a"]
    assert [(leaf.path, leaf.dtypes) for leaf in result.retyped] == [
        ("b", ("float64", "bfloat16")),
        ("c", ("float32", "float32")),
    ]
    assert result.retyped[1].shapes == ([2, 3], [3, 2])
    text = "\n".join(result.text())
    assert "retyped  b: float64[3] -> bfloat16[3]" in text
    assert "added    d/a" in text
    assert "removed  a" in text


def test_numbers_and_strings_in_the_structure(compared: Any) -> None:
    first = {"step": 1, "same": 2, "name": "adam", "gone": None, "list": [1.5, True]}
    second = {"step": 2, "same": 2, "name": "sgd", "new": 0, "list": [1.5, False]}
    result = compared(first, second)
    changes = {value.path: (value.first, value.second) for value in result.values}
    assert changes == {
        "step": ("1", "2"),
        "name": ("'adam'", "'sgd'"),
        "gone": ("None", None),
        "new": (None, "0"),
        "list/1": ("True", "False"),
    }


@pytest.mark.parametrize(
    ("first", "second"),
    [({"x": [1]}, {"x": (1,)}), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ({"a": []}, {"a": {}})],
)
def test_containers_count(compared: Any, first: object, second: object) -> None:
    result = compared(first, second)
    assert result.structure_changed
    assert not result.same


def test_tied_leaves_count(compared: Any) -> None:
    tied = np.ones(3)
    result = compared({"a": tied, "b": tied}, {"a": tied, "b": np.ones(3)})
    assert result.structure_changed
    assert result.added == ["b"]


def test_inline_values_skip_leaves() -> None:
    state = {"a": np.ones(2), "b": b"x", "c": np.float32(3), "d": {"e~/": 1j, "": "s"}}
    structure = flatten(state, lambda value: isinstance(value, np.ndarray)).structure
    assert inline_values(structure) == {"d/e~0~1": "1j", "d/~2": "'s'"}


def test_large_leaves_go_in_pieces(compared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asymcheck.inspection.values.MAX_PIECE_SIZE", 100)
    rng = np.random.default_rng(0)
    first = rng.standard_normal((37, 41)).astype(np.float32)
    second = first.copy()
    second[rng.integers(0, 37, 50), rng.integers(0, 41, 50)] += 1
    (leaf,) = compared({"x": first}, {"x": second}).changed
    difference = second.astype(float) - first.astype(float)
    assert leaf.elements == first.size
    assert leaf.changed == np.count_nonzero(difference)
    assert leaf.max_abs == np.abs(difference).max()
    assert leaf.rms == pytest.approx(np.sqrt(np.square(difference).mean()))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = str(tmp_path / "run"), str(tmp_path / "other")
    write_run(run)
    write_run(other, (30,))
    assert main(["asymcheck", "diff", run, "30", "30", f"--other={other}"]) == 0
    assert "0 of 9 leaves changed" in capsys.readouterr().out
    assert main(["asymcheck", "diff", run, "10", "40"]) == 1
    out = capsys.readouterr().out
    assert "from step 10 to step 40" in out
    assert "value    optimizer/step: 10 -> 40" in out
    assert main(["asymcheck", "diff", run, "10", "40", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (bias,) = (leaf for leaf in report["changed"] if leaf["path"] == "params/bias")
    assert (bias["changed"], bias["max_abs"]) == (1, 30)
    a, b = (state_at(step)["params"]["weight"].astype(float) for step in (10, 40))
    (weight,) = (leaf for leaf in report["changed"] if leaf["path"] == "params/weight")
    assert weight["rms"] == pytest.approx(np.sqrt(np.square(a - b).mean()))
    assert main(["asymcheck", "diff", run, "10", "11"]) == 2
    assert main(["asymcheck", "diff", run, "10", "10", f"--other={tmp_path}/no"]) == 2
