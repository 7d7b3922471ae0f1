"""`replay`: exact whatever happens, small where the update is the one that is replayed."""

from __future__ import annotations

import functools
import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import replay_by_the_book as by_the_book
from codec_columns import KINDS, changed, content
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_columns import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    NUMBERS,
    Block,
    block_of,
    codec_for,
    gradients,
    trained,
)

from asymcheck.codecs import (
    Column,
    DeltaCodec,
    ReplayCodec,
    _replayed,
    codec_from_manifest,
    plane_payload,
    replay,
)
from asymcheck.codecs._grid import Grid, constants_of, find_grid, scaled_decayed
from asymcheck.codecs._kernels_numpy import NumpyKernels
from asymcheck.codecs._replay_choice import Choice
from asymcheck.codecs.base import max_payload_nbytes
from asymcheck.codecs.rules import RULES, Rule
from asymcheck.codecs.rules.captured import captured
from asymcheck.errors import CodecError, FormatError

ALL_RULES = sorted(RULES)
SIZES = (0, 1, 5, 700, 4096, 70_001)
PRECISIONS = (FLOAT32, BFLOAT16, FLOAT16)
GOLDEN = Path(__file__).parent / "golden_payloads"


def is_exact(block: Block) -> None:
    payloads = block.encode()
    for in_place in (False, True):
        for column, found in zip(
            block.columns, block.decode(payloads, in_place=in_place), strict=True
        ):
            assert found.tobytes() == column.new.tobytes()


# -- exactness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("kept", [*PRECISIONS, {"first": BFLOAT16}, {"second": FLOAT16}], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_a_step_comes_back(rule, captured, kept, n):
    is_exact(trained(rule, n, captured=captured, kept=kept))


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("new_kind", KINDS)
@pytest.mark.parametrize("old_kind", KINDS)
@pytest.mark.parametrize("dtype", [None, *PRECISIONS], ids=str)
def test_states_that_no_rule_made_come_back(rule, new_kind, old_kind, dtype):
    """With a captured gradient, too, if `dtype` is one."""
    codec = codec_for(rule, "copy", "other", *[] if dtype is None else ["captured"])
    dtypes = [*[dtype or FLOAT32] * len(RULES[rule].roles), BFLOAT16, np.dtype(np.int64)]
    dtypes += [dtype] if dtype is not None else []
    olds = [content(old_kind, t, 5003, i).view(t) for i, t in enumerate(dtypes)]
    news = [content(new_kind, t, 5003, 10 + i).view(t) for i, t in enumerate(dtypes)]
    is_exact(block_of(codec, olds, news))


NUMBER = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.9, 0.999, 1e-8, 1e30, -1e300, 5e-324, 1e-40, 2.0**1000]),
    st.floats(-(2.0**1000), 2.0**1000),
    st.integers(0, 1 << 53).map(float),
)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), rule=st.sampled_from(ALL_RULES), n=st.integers(0, 60))
def test_arbitrary_bytes_and_numbers_come_back(data, rule, n):
    numbers = {name: data.draw(NUMBER) for name in RULES[rule].numbers}
    more = data.draw(st.sampled_from([(), ("captured",)]))
    roles = data.draw(st.permutations([*RULES[rule].roles, "copy", "other", *more]))
    dtypes = {role: data.draw(st.sampled_from(PRECISIONS)) for role in roles}
    dtypes |= {"copy": data.draw(st.sampled_from([BFLOAT16, FLOAT16])), "other": np.dtype("u1")}
    codec = ReplayCodec(rule, tuple(roles), numbers)
    columns = []
    for role in roles:
        dtype = dtypes[role]
        exact = st.binary(min_size=n * dtype.itemsize, max_size=n * dtype.itemsize)
        new, old = (np.frombuffer(data.draw(exact), np.uint8) for _ in range(2))
        columns.append(Column(role, dtype, new, old))
    is_exact(Block(codec, columns))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rule=st.sampled_from(ALL_RULES), seed=st.integers(0, 99))
def test_wrong_hyperparameters_cost_bytes_only(data, rule, seed):
    block = trained(rule, 3000, seed=seed)
    numbers = {name: data.draw(NUMBER) for name in RULES[rule].numbers}
    is_exact(Block(ReplayCodec(rule, block.codec.roles, numbers), block.columns))


def test_first_step_and_states_begun_anew_come_back():
    for rule in ALL_RULES:
        block = trained(rule, 3000)
        for zeroed in range(len(block.columns)):
            for side in ("old", "new"):
                columns = [
                    Column(
                        c.kind,
                        c.dtype,
                        np.zeros_like(c.new) if (i, side) == (zeroed, "new") else c.new,
                        np.zeros_like(c.new) if (i, side) == (zeroed, "old") else c.old,
                    )
                    for i, c in enumerate(block.columns)
                ]
                is_exact(Block(block.codec, columns))


@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_skipped_step_comes_back_and_costs_next_to_nothing(rule):
    block = trained(rule, 20_000)
    skipped = Block(
        block.codec,
        [Column(c.kind, c.dtype, c.old, c.old) for c in block.columns if c.old is not None],
    )
    is_exact(skipped)
    assert sum(map(len, skipped.encode())) < 0.01 * skipped.nbytes


def test_columns_need_no_alignment_and_are_not_written():
    block = trained("adam", 999)

    def moved(data):
        memory = np.empty(data.size + 1, np.uint8)
        memory[1:] = data
        memory.flags.writeable = False
        return memory[1:]

    columns = [Column(c.kind, c.dtype, moved(c.new), moved(c.old)) for c in block.columns]
    shifted = Block(block.codec, columns)
    assert shifted.encode() == block.encode()
    is_exact(shifted)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_subnormal_gradients_among_others_come_back(rule):
    block = trained(rule, 20_000)
    rng = np.random.default_rng(3)
    few = np.flatnonzero(rng.random(20_000) < 0.1)
    first = RULES[rule].roles.index(RULES[rule].moment)
    columns = list(block.columns)
    c = columns[first]
    new, old = c.new.view("f4").copy(), np.array(c.old).view("f4")
    old[few] = 0  # so that the moment is a part of the gradient
    new[few] = rng.normal(0, 1e-40, few.size).astype(np.float32)
    columns[first] = Column(c.kind, c.dtype, new.view(np.uint8), old.view(np.uint8))
    changed_block = Block(block.codec, columns)
    assert changed_block.encode()[first][0] == 2
    is_exact(changed_block)


def test_every_float16_has_one_float32():
    """NaN, too, of which processors make other ones."""
    words = np.arange(1 << 16, dtype="<u2")
    found = _replayed.widened(words, FLOAT16)
    numbers = ~np.isnan(words.view(FLOAT16))
    assert np.array_equal(found[numbers], words.view(FLOAT16)[numbers].astype(np.float32))
    expected = [
        (int(word) & 0x8000) << 16 | 0x7F800000 | (int(word) & 0x3FF) << 13
        for word in words[~numbers]
    ]
    assert len(expected) == 2 * 1023
    assert found.view("<u4")[~numbers].tolist() == expected


# -- how small ---------------------------------------------------------------------------------


def bytes_per_parameter(block: Block, payloads=None) -> float:
    n = block.columns[0].new.size // 4
    return sum(map(len, payloads or block.encode())) / n


LOW = [(rule, dtype) for rule in ALL_RULES for dtype in (BFLOAT16, FLOAT16)]
# A hundredth of the gradient in the moment, or in the weight, is too little for that.
LOW = [low for low in LOW if low not in (("lion", FLOAT16), ("descent", FLOAT16))]


@pytest.mark.parametrize("scale", [1.0, 0.37, 1 / 3, 7.7])
@pytest.mark.parametrize(("rule", "dtype"), LOW, ids=str)
def test_gradients_of_low_precision_are_found(rule, dtype, scale):
    block = trained(rule, 50_000, dtype=dtype, scale=scale)
    payloads = block.encode()
    assert payloads[0][0] == 2  # the gradient is stored, not the moment
    limit = {"bfloat16": 2.5, "float16": 2.9}[dtype.name]
    assert bytes_per_parameter(block, payloads) < limit


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("captured", [False, True])
def test_coupled_decay_is_taken_off(rule, captured):
    assert bytes_per_parameter(trained(rule, 50_000, l2=0.01, captured=captured)) < 2.5


@pytest.mark.parametrize("scale", [1.0, 0.37, 7.7])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("rule", ALL_RULES)
def test_of_a_captured_gradient_everything_follows(rule, dtype, scale):
    block = trained(rule, 50_000, dtype=dtype, scale=scale, captured=True)
    payloads = block.encode()
    assert payloads[-1][0] == 2
    assert bytes_per_parameter(block, payloads) < {"bfloat16": 2.5, "float16": 2.9}[dtype.name]


@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_captured_gradient_of_full_precision_costs_what_a_float_does(rule):
    block = trained(rule, 50_000, dtype=np.float32, captured=True)
    payloads = block.encode()
    assert len(payloads[-1]) < 3.6 * 50_000
    assert bytes_per_parameter(block, payloads) < 4.6


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_moments_of_low_precision_follow_from_a_captured_gradient(rule):
    """They themselves show too little of it."""
    found, given = (
        trained(rule, 50_000, kept=BFLOAT16, captured=captured) for captured in (False, True)
    )
    assert bytes_per_parameter(given) < 0.9 * bytes_per_parameter(found)
    large, small = found.encode(), given.encode()
    weight = given.codec.roles.index("weight")
    assert len(small[weight]) < 0.15 * len(large[weight])  # computed before moments are rounded
    assert len(small[0]) < 0.01 * len(large[0])


@pytest.mark.parametrize("rule", ["adam", "amsgrad"])
def test_gradients_of_full_precision_cost_the_first_moment(rule):
    block = trained(rule, 50_000, dtype=np.float32)
    delta = bytes_per_parameter(block, DeltaCodec().encode(block.columns))
    assert bytes_per_parameter(block) < min(4.6, 0.6 * delta)


def test_where_the_rule_is_wrong_it_costs_about_what_differences_do():
    block = trained("adam", 50_000)
    columns = [
        Column(c.kind, c.dtype, c.new, changed(c.new, c.dtype, seed=i))
        for i, c in enumerate(block.columns[:3])
    ]
    codec = codec_for("adam", beta1=0.5, lr=7.0)
    delta = sum(map(len, DeltaCodec().encode(columns)))
    assert sum(map(len, codec.encode(columns))) < 1.02 * delta


def test_a_rounded_copy_of_the_weight_takes_no_bytes():
    block = trained("adam", 50_000)
    assert len(block.encode()[-1]) < 50


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_no_payload_is_longer_than_readers_allow(dtype):
    """Where the sample shows gradients on a grid, and nothing else is on it."""
    n = 32 * 40_000
    sampled = (np.arange(32)[:, None] * 40_000 + np.arange(128)).ravel()
    block = trained("adam", n, captured=True, dtype=FLOAT16, scale=1 / 3)
    olds = [np.array(c.old).view(c.dtype) for c in block.columns]
    news = [np.array(c.new).view(c.dtype) for c in block.columns]
    gradient = content("random", dtype, n, 0).view(dtype)
    gradient[sampled] = news[-1][sampled].astype(dtype)
    block = block_of(block.codec, [*olds[:-1], gradient[::-1].copy()], [*news[:-1], gradient])
    payloads = block.encode()
    for payload, column in zip(payloads, block.columns, strict=True):
        assert len(payload) <= max_payload_nbytes(column.new.nbytes)
    is_exact(block)


@pytest.mark.parametrize("captured", [False, True])
def test_a_gradient_that_takes_too_much_is_not_stored(captured, monkeypatch):
    block = trained("adam", 5000, captured=captured)
    monkeypatch.setattr(replay, "max_payload_nbytes", lambda nbytes: nbytes // 8)
    role = block.codec.roles.index("captured" if captured else "first")
    assert block.encode()[role][0] == 0
    is_exact(block)


# -- the grid ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.37, 1.9999, 1e-6, 777.0])
@pytest.mark.parametrize(("dtype", "bits"), [(BFLOAT16, 8), (FLOAT16, 11)])
def test_a_grid_is_found_to_within_a_unit_in_the_last_place(dtype, bits, scale):
    g = gradients(4096, 5, dtype, scale)
    if dtype == FLOAT16:
        g = g[np.abs(g) > 6.2e-5 * scale]  # others have fewer bits, and lie on the grid as well
    grid = find_grid(g, g)
    assert grid is not None and grid.bits == bits
    ratio = np.float64(np.float32(scale)) / grid.scale
    exponent = np.log2(ratio)
    assert abs(exponent - round(exponent)) < 2.0**-22


def test_gradients_on_no_grid():
    rng = np.random.default_rng(1)
    for values in (
        rng.normal(0, 1, 4096),
        np.zeros(4096),
        np.full(4096, np.nan),
        np.full(4096, 1e-42),
        rng.normal(0, 1, 10),
    ):
        values = values.astype(np.float32)
        assert find_grid(values, np.ones_like(values)) is None


# -- the same bytes everywhere -----------------------------------------------------------------


@pytest.fixture
def with_numpy(monkeypatch):
    pytest.importorskip("numba")

    def use() -> None:
        monkeypatch.setattr(_replayed, "kernels", NumpyKernels)
        monkeypatch.setattr(plane_payload, "kernels", NumpyKernels)

    return use


@pytest.mark.parametrize("rule", ALL_RULES)
def test_numba_and_numpy_give_the_same_bytes(rule, with_numpy):
    blocks = [
        trained(rule, 70_001),
        trained(rule, 3001, dtype=np.float32, l2=0.01),
        trained(rule, 3001, captured=True, l2=0.01),
        trained(rule, 3001, captured=True, dtype=np.float32, kept=BFLOAT16),
    ]
    for kind in KINDS:
        codec = codec_for(rule)
        olds = [content(kind, FLOAT32, 3001, i).view("f4") for i in range(len(codec.roles))]
        news = [content(kind, FLOAT32, 3001, 9 + i).view("f4") for i in range(len(codec.roles))]
        blocks.append(block_of(codec, olds, news))
    payloads = [block.encode() for block in blocks]
    with_numpy()
    assert [block.encode() for block in blocks] == payloads
    for block, stored in zip(blocks, payloads, strict=True):
        for column, found in zip(block.columns, block.decode(stored), strict=True):
            assert found.tobytes() == column.new.tobytes()


def formulas():
    for rule in (*RULES.values(), *map(captured, RULES.values())):
        numbers = NUMBERS[rule.id]
        for form in rule.moments:
            yield form.forward, form.constants_of(numbers), 2
            yield form.inverse, form.constants_of(numbers), 2
        for form in (*sum(rule.forms.values(), ()), rule.reference):
            yield form.compute, form.constants_of(numbers), len(form.inputs)
    yield scaled_decayed, constants_of(Grid(8, 0.37), 0.01), 2


@pytest.mark.parametrize("kind", ["special", "random", "real"])
def test_every_formula_is_the_same_in_numba(kind):
    kernels = pytest.importorskip("asymcheck.codecs._kernels_numba", exc_type=ImportError)
    found = 0
    for formula, constants, arity in formulas():
        inputs = [content(kind, FLOAT32, 4099, i).view("<f4") for i in range(arity)]
        otherwise = content("random", FLOAT32, 4099, 99).view("<u4")
        results = []
        for each in (NumpyKernels(), kernels.NumbaKernels()):
            words = np.empty(4099, "<u4")
            each.compute(formula, constants, inputs, otherwise, words)
            results.append(words.tobytes())
        assert results[0] == results[1], formula
        found += 1
    assert found >= 20


def test_the_state_of_the_processor_does_not_matter():
    torch = pytest.importorskip("torch")
    olds = [content("special", FLOAT32, 5000, i).view("<f4") for i in range(3)]
    news = [content("special", FLOAT32, 5000, 5 + i).view("<f4") for i in range(3)]
    tiny = np.float32(1e-39)
    block = block_of(codec_for("adam"), [o * tiny for o in olds], [n * tiny for n in news])
    expected = block.encode()
    found = []

    def flushed() -> None:
        assert torch.set_flush_denormal(True)
        assert not np.any(np.full(8, 1e-38, np.float32) * np.float32(0.01))
        found.append(block.encode())
        found.append([part.tobytes() for part in block.decode(expected)])
        assert not np.any(np.full(8, 1e-38, np.float32) * np.float32(0.01))  # as it was

    thread = threading.Thread(target=flushed)
    thread.start()
    thread.join()
    assert found == [expected, [column.new.tobytes() for column in block.columns]]


@functools.cache
def golden_block(name: str) -> Block:
    """Of a rule, or with `-captured` after it of one with the gradient.

    A step whose old state and gradient come from integers: the same on every machine."""
    x = np.arange(1, 3 * 2003 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(29)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    uniform = (x >> np.uint64(40)).astype(np.float64) / 2**24 - 0.5
    rule, _, captured_too = name.partition("-")
    w, m, g = (part.astype(np.float32) for part in uniform.reshape(3, 2003))
    g = (g.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) * np.float32(0.3)
    one, tenth = np.float32(1), np.float32(0.125)
    m1 = (one - tenth) * m + tenth * g
    v = m * m
    v1 = (one - tenth) * v + tenth * g * g
    state = {"weight": w, "first": m, "second": v, "largest": v, "captured": m}
    new = {"weight": w - np.float32(2**-10) * m1, "first": m1, "second": v1, "captured": g}
    new["largest"] = np.maximum(v, v1)
    if rule == "lion":
        u = np.sign((one - tenth) * m + tenth * g) + np.float32(0.1) * w
        new["weight"] = w - np.float32(2**-10) * u
    if rule == "descent":
        new["weight"] = w - np.float32(2**-10) * g
    decays = {n: 0.875 for n in ("beta1", "beta2", "momentum") if n in RULES[rule].numbers}
    more = [captured_too] if captured_too else []
    codec = codec_for(rule, *more, **decays | {"lr": 2.0**-10})
    return block_of(codec, [state[r] for r in codec.roles], [new[r] for r in codec.roles])


GOLDEN_NAMES = [*ALL_RULES, "adam-captured", "lion-captured"]


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_old_payloads_still_decode(name):
    block = golden_block(name)
    lengths = np.frombuffer((GOLDEN / f"replay-{name}").read_bytes()[:16], "<u4")
    stored = (GOLDEN / f"replay-{name}").read_bytes()[16:]
    ends = np.cumsum(lengths[: len(block.columns)])
    payloads = [stored[end - n : end] for n, end in zip(lengths, ends, strict=False)]
    assert payloads[-1 if "captured" in name else 0][0] == 2  # with a gradient, and predictions
    assert len(payloads) == 1 or any(p[0] == 1 for p in payloads)
    for column, found in zip(block.columns, block.decode(payloads), strict=True):
        assert found.tobytes() == column.new.tobytes()


def write_golden() -> None:
    """Only for a new version of the format: what is there must keep decoding."""
    for name in GOLDEN_NAMES:
        payloads = golden_block(name).encode()
        lengths = np.array([*map(len, payloads), *[0] * (4 - len(payloads))], "<u4")
        (GOLDEN / f"replay-{name}").write_bytes(lengths.tobytes() + b"".join(payloads))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"l2": 0.01},
        {"dtype": np.float32},
        {"dtype": FLOAT16, "scale": 1.0},
        {"corrects_bias": 0.0, "lr": 0.5},
        {"decay": 0.0, "step": 1000},
        {"captured": True},
        {"captured": True, "l2": 0.01, "dtype": np.float32},
        {"captured": True, "kept": BFLOAT16},
        {"captured": True, "kept": {"first": BFLOAT16}},
        {"kept": FLOAT16},
    ],
    ids=repr,
)
@pytest.mark.parametrize("rule", ALL_RULES)
def test_the_specification_is_enough_to_decode(rule, how):
    known = (*RULES[rule].numbers, "captured", "dtype", "kept", "scale")
    decodes_by_the_book(trained(rule, 10_000, **{k: v for k, v in how.items() if k in known}))


ODD = (0x7F810001, 0x7C010000, 0xFFC00000, 0x7F800000, 0xFC000000, 0x80000000, 1 << 16, 1)
"""NaN of both kinds, infinities, -0 and subnormal numbers, also of the upper half alone."""


@settings(max_examples=200, deadline=None)
@given(data=st.data(), rule=st.sampled_from(ALL_RULES), seed=st.integers(0, 99))
def test_the_specification_is_enough_for_any_bits(data, rule, seed):
    """Of any precision, some of them odd, in any order, stored in any way that there is."""
    block = trained(
        rule,
        300,
        seed=seed,
        captured=data.draw(st.booleans()),
        dtype=data.draw(st.sampled_from(PRECISIONS)),
        l2=data.draw(st.sampled_from([0.0, 0.01])),
    )
    odd = st.lists(st.tuples(st.integers(0, 299), st.sampled_from(ODD)), max_size=20)
    columns = []
    for role, column in zip(block.codec.roles, block.columns, strict=True):
        low = (BFLOAT16, FLOAT16) if role == "copy" else PRECISIONS
        dtype = data.draw(st.sampled_from(low))
        sides = []
        for side in (column.new, column.old):
            values = np.array(side).view(column.dtype).astype(dtype)
            for index, word in data.draw(odd):
                values.view(f"<u{dtype.itemsize}")[index] = word >> (32 - 8 * dtype.itemsize)
            sides.append(values.view(np.uint8))
        columns.append(Column(role, dtype, *sides))
    order = data.draw(st.permutations(range(len(columns))))
    codec = ReplayCodec(rule, tuple(block.codec.roles[i] for i in order), block.codec.numbers)
    with mock.patch.object(replay, "Chooser", lambda rule, *_: AnyChoice(data, rule)):
        decodes_by_the_book(Block(codec, [columns[i] for i in order]))


@dataclass(frozen=True)
class AnyChoice:
    """Instead of what takes the fewest bits."""

    data: Any
    rule: Rule

    def choices(self) -> dict[str, Choice]:
        draw, rule = self.data.draw, self.rule
        found = {
            role: Choice(draw(st.sampled_from([0, 1])), draw(st.integers(0, len(forms) - 1)))
            for role, forms in rule.forms.items()
        }
        bits = draw(st.sampled_from([8, 11, *[24] * (rule.moment == "captured")]))
        grid = draw(st.sampled_from([None, Grid(bits, draw(st.sampled_from([1.0, 0.37, -3e30])))]))
        form = draw(st.integers(0, len(rule.moments) - 1))
        found[rule.moment] = Choice(0 if grid is None else 2, form, grid)
        return found


def decodes_by_the_book(block: Block) -> None:
    roles = block.codec.roles
    payloads = dict(zip(roles, block.encode(), strict=True))
    old = {r: np.array(c.old).view(c.dtype) for r, c in zip(roles, block.columns, strict=True)}
    found = by_the_book.decode(block.codec.rule, payloads, old, block.codec.numbers)
    for role, column in zip(roles, block.columns, strict=True):
        assert found[role].tobytes() == column.new.tobytes(), role


# -- hostile payloads and arguments ------------------------------------------------------------


def refuses_or_decodes(block: Block, payloads: list[bytes]) -> None:
    try:
        block.decode(payloads)
    except CodecError as error:
        assert str(error)


@settings(max_examples=400, deadline=None)
@given(
    data=st.data(),
    rule=st.sampled_from(ALL_RULES),
    grid=st.booleans(),
    captured=st.booleans(),
    kept=st.sampled_from(PRECISIONS),
)
def test_damaged_payloads(data, rule, grid, captured, kept):
    dtype = BFLOAT16 if grid else np.float32
    block = trained(rule, 300, dtype=dtype, captured=captured, kept=kept)
    payloads = block.encode()
    victim = data.draw(st.integers(0, len(payloads) - 1))
    damaged = bytearray(payloads[victim])
    head = st.integers(0, min(8 * len(damaged) - 1, 160))
    for bit in data.draw(st.lists(head | st.integers(0, 8 * len(damaged) - 1), max_size=4)):
        damaged[bit // 8] ^= 1 << bit % 8
    damaged = damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))]
    payloads[victim] = bytes(damaged)
    refuses_or_decodes(block, payloads)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), rule=st.sampled_from(ALL_RULES), captured=st.booleans())
def test_truncated_payloads_are_refused(data, rule, captured):
    block = trained(rule, 300, captured=captured)
    payloads = block.encode()
    victim = data.draw(st.integers(0, len(payloads) - 1))
    payloads[victim] = payloads[victim][: data.draw(st.integers(0, len(payloads[victim]) - 1))]
    with pytest.raises(CodecError):
        block.decode(payloads)


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"\x02",
        b"\x01\x00",  # a first moment has no plain prediction
        b"\x03\x00",
        b"\x00\x09",  # no such form
        b"\x02\x00\x08\x00\x00\x80\x3f" + (1 << 60).to_bytes(8, "little") + bytes(40),
        b"\x02\x00\x08\x00\x00\x80\x7f" + bytes(48),  # an infinite scale
        b"\x02\x00\x08\x00\x00\x00\x00" + bytes(48),  # none
        b"\x02\x00\x18\x00\x00\x80\x3f" + bytes(48),  # 24 bits
    ],
)
def test_absurd_first_moments_are_refused(first):
    block = trained("adam", 100)
    with pytest.raises(CodecError):
        block.decode([first, *block.encode()[1:]])


def test_columns_that_do_not_fit_are_refused():
    block = trained("adam", 100)
    short = [Column(c.kind, c.dtype, c.new[:80], c.old[:80]) for c in block.columns[:1]]
    double = Column("first", np.dtype(np.float64), np.zeros(800, np.uint8), np.zeros(800, np.uint8))
    for columns in (
        block.columns[:2],
        [*short, *block.columns[1:]],
        [double, *block.columns[1:]],
    ):
        with pytest.raises(CodecError):
            block.codec.encode(columns)
    with pytest.raises(CodecError, match="predecessor"):
        block.codec.encode([Column(c.kind, c.dtype, c.new) for c in block.columns])


@pytest.mark.parametrize(
    "wrong",
    [
        {"rule": "adagrad"},
        {"roles": ["first", "second"]},
        {"roles": ["first", "second", "weight", "weight"]},
        {"roles": ["first", "second", "weight", "unheard"]},
        {"roles": ["first", "second", "weight", "captured", "captured"]},
        {"roles": ["captured", "second", "weight"]},
        {"roles": "first"},
        {"roles": None},
        {"roles": [1, 2, 3]},
        {"numbers": {}},
        {"numbers": None},
        {"numbers": NUMBERS["adam"] | {"lr": float("nan")}},
        {"numbers": NUMBERS["adam"] | {"lr": float("inf")}},
        {"numbers": NUMBERS["adam"] | {"lr": "1"}},
        {"numbers": NUMBERS["adam"] | {"lr": True}},
        {"numbers": NUMBERS["adam"] | {"more": 1}},
    ],
    ids=repr,
)
def test_wrong_parameters_are_refused(wrong):
    params = dict(codec_for("adam").params) | wrong
    with pytest.raises(CodecError):
        codec_from_manifest("replay", params)


def test_manifest_round_trip():
    for rule in ALL_RULES:
        for codec in (codec_for(rule, "copy", "other"), codec_for(rule, "captured")):
            assert codec_from_manifest("replay", codec.params) == codec
    with pytest.raises(FormatError):
        codec_from_manifest("replay", {"rule": "adam"})


def test_payloads_are_the_same_each_time():
    digests = {hashlib.sha256(b"".join(trained("adam", 9000).encode())).digest() for _ in range(3)}
    assert len(digests) == 1


if __name__ == "__main__":
    write_golden()
