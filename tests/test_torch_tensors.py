"""Tensors as leaves: bytes of any range, any layout, any dtype; identity; copies."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch_runs import raw  # noqa: E402

from asymcheck.errors import UnsupportedStateError  # noqa: E402
from asymcheck.state import dtype_of  # noqa: E402
from asymcheck_torch.parts import whole  # noqa: E402
from asymcheck_torch.tensors import (  # noqa: E402
    TORCH_DTYPES,
    DeviceClocks,
    SteadyCopies,
    check_storable,
    identity,
    tensor_of,
    tensor_source,
)

CLOCKS = DeviceClocks()


@st.composite
def layouts(draw):
    """A tensor of random bits in some dtype and some strided layout."""
    dtype = draw(st.sampled_from(sorted(TORCH_DTYPES)))
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 100)))
    whole = [2 * n for n in shape]
    itemsize = torch.empty((), dtype=TORCH_DTYPES[dtype]).element_size()
    high = 2 if dtype == "bool" else 256
    data = rng.integers(0, high, int(np.prod(whole, dtype=int)) * itemsize, dtype=np.uint8)
    tensor = torch.from_numpy(data).view(TORCH_DTYPES[dtype]).view(whole)
    if draw(st.booleans()):
        tensor = tensor[tuple(slice(draw(st.integers(0, 1)), None, 2) for _ in shape)]
    else:
        tensor = tensor[tuple(slice(0, n) for n in shape)].contiguous()
    return tensor.permute(draw(st.permutations(range(len(shape)))))


@settings(max_examples=300, deadline=None)
@given(tensor=layouts(), data=st.data())
def test_any_range_of_any_layout_is_read_in_row_major_order(tensor, data):
    start = data.draw(st.integers(0, tensor.numel()))
    count = data.draw(st.integers(0, tensor.numel() - start))
    source = tensor_source("x", whole(tensor, 0, 1, None), "x", (0, tensor.numel()), CLOCKS)
    itemsize = tensor.element_size()
    out = np.zeros(count * itemsize, np.uint8)
    source.read_into(start, count, out)
    assert out.tobytes() == raw(tensor)[start * itemsize : (start + count) * itemsize]


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
def test_dtypes_there_and_back(name):
    tensor = torch.arange(6).to(torch.uint8).view(2, 3).to(TORCH_DTYPES[name])
    source = tensor_source("x", whole(tensor, 0, 1, None), "x", (0, 6), CLOCKS)
    assert source.leaf.dtype == name
    array = np.empty((2, 3), dtype_of(name))
    source.read_into(0, 6, array.reshape(-1).view(np.uint8))
    back = tensor_of(array)
    assert back.dtype == tensor.dtype
    assert raw(back) == raw(tensor)


def test_identity_is_memory_and_layout():
    weight = torch.randn(4, 4)
    assert identity(weight) == identity(weight.view(4, 4))
    assert identity(weight) != identity(weight.t())
    assert identity(weight) != identity(weight.clone())
    assert identity(weight) != identity(weight.view(torch.int32))
    assert identity(weight) != identity(weight[0])
    assert identity(torch.zeros(0)) != identity(torch.zeros(0, 1))
    empty = torch.zeros(0)
    assert identity(empty) == identity(empty)


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.zeros(2, dtype=torch.complex32), "complex32"),
        (torch.eye(2).to_sparse(), "sparse_coo"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.nn.LazyLinear(2).weight, "lazy"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "qint8"),
    ],
)
def test_what_cannot_be_stored_is_named(tensor, problem):
    with pytest.raises(UnsupportedStateError, match=problem) as caught:
        check_storable(tensor, "params/x")
    assert caught.value.leaf == "params/x"


def test_copies_are_private_and_their_memory_is_reused():
    copies = SteadyCopies()
    tensor = torch.arange(6.0)
    copies.restart()
    first = copies(tensor)
    assert copies(tensor) is first
    tensor += 1
    assert torch.equal(first, torch.arange(6.0))
    copies.restart()
    second = copies(tensor)
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, tensor)


def test_a_copy_is_row_major():
    tensor = torch.randn(3, 4).t()
    copies = SteadyCopies()
    assert copies(tensor).is_contiguous()
    assert torch.equal(copies(tensor), tensor)
