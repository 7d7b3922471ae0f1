import json
import math
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asymcheck.cost import CostModel
from asymcheck.errors import FormatError
from asymcheck.linear import Line, LinearCost

PRIOR = Line(1e-3, 1 / 0.95e9)
MIB = 1 << 20
SIZES_NBYTES = [1, 4096, 64 << 10, MIB, 4 * MIB, 16 * MIB, 64 * MIB]


def fitted(truth: Line, sizes_nbytes: list[int], noise: random.Random | None = None) -> LinearCost:
    cost = LinearCost(PRIOR)
    for nbytes in sizes_nbytes:
        factor = noise.lognormvariate(0, 0.3) if noise else 1.0
        cost.observe(nbytes, truth.seconds(nbytes) * factor)
    return cost


TRUTHS = [
    Line(1e-3, 1e-9),
    Line(50e-3, 1 / 80e6),
    Line(0.3e-3, 1 / 1.3e9),
    Line(0.0, 1e-9),
    Line(5e-3, 0.0),
    Line(20e-6, 1 / 8e9),
]


@pytest.mark.parametrize("truth", TRUTHS)
def test_exact_samples_give_the_exact_line(truth: Line) -> None:
    line = fitted(truth, SIZES_NBYTES * 20).line
    for nbytes in SIZES_NBYTES:
        assert line.seconds(nbytes) == pytest.approx(truth.seconds(nbytes), rel=0.01, abs=1e-8)


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("seed", range(3))
def test_noisy_samples_give_about_the_line(truth: Line, seed: int) -> None:
    line = fitted(truth, SIZES_NBYTES * 20, random.Random(seed)).line
    for nbytes in SIZES_NBYTES[2:]:
        assert line.seconds(nbytes) == pytest.approx(truth.seconds(nbytes), rel=0.35)


@given(
    st.lists(
        st.tuples(st.integers(0, 10**13), st.one_of(st.just(0.0), st.floats(0, 1e6))), max_size=60
    )
)
def test_coefficients_are_never_negative_whatever_is_measured(
    samples: list[tuple[int, float]],
) -> None:
    cost = LinearCost(PRIOR)
    for nbytes, seconds in samples:
        cost.observe(nbytes, seconds)
        assert cost.line.alpha_s >= 0
        assert cost.line.beta_s_per_byte >= 0
        assert math.isfinite(cost.line.seconds(10**13))


def test_samples_that_fall_with_size_do_not_give_a_negative_slope() -> None:
    cost = LinearCost(PRIOR)
    for nbytes, seconds in [(1, 0.010), (MIB, 0.008), (16 * MIB, 0.006)] * 10:
        cost.observe(nbytes, seconds)
    assert cost.line.beta_s_per_byte == 0
    assert 0.006 < cost.line.alpha_s < 0.010


def test_samples_through_a_negative_intercept_give_none() -> None:
    cost = LinearCost(PRIOR)
    for nbytes, seconds in [(MIB, 0.0001), (2 * MIB, 0.010), (3 * MIB, 0.020)] * 10:
        cost.observe(nbytes, seconds)
    assert cost.line.alpha_s == 0
    assert cost.line.seconds(2 * MIB) == pytest.approx(0.010, rel=0.5)


def test_before_the_first_sample_the_prior_stands() -> None:
    assert LinearCost(PRIOR).line == PRIOR


@pytest.mark.parametrize("nbytes", [0, 1, 4096, MIB, 10**12])
def test_one_sample_sets_the_level_and_keeps_the_shape(nbytes: int) -> None:
    cost = LinearCost(PRIOR)
    cost.observe(nbytes, 3 * PRIOR.seconds(nbytes))
    assert cost.line.alpha_s == pytest.approx(3 * PRIOR.alpha_s)
    assert cost.line.beta_s_per_byte == pytest.approx(3 * PRIOR.beta_s_per_byte)


@pytest.mark.parametrize("seed", range(3))
def test_samples_of_nearly_one_size_do_not_make_up_a_shape(seed: int) -> None:
    rng = random.Random(seed)
    sizes_nbytes = [int(64 * MIB * rng.uniform(0.98, 1.02)) for _ in range(300)]
    line = fitted(PRIOR, sizes_nbytes, rng).line
    assert line.seconds(64 * MIB) == pytest.approx(PRIOR.seconds(64 * MIB), rel=0.25)
    assert line.alpha_s == pytest.approx(PRIOR.alpha_s, rel=0.25)


def test_the_shape_of_a_probe_outlives_many_samples_of_one_size() -> None:
    truth = Line(50e-3, 1 / 80e6)
    line = fitted(truth, [64 << 10, 16 * MIB] * 3 + [8 * MIB] * 500).line
    assert line.alpha_s == pytest.approx(truth.alpha_s, rel=0.05)
    assert line.beta_s_per_byte == pytest.approx(truth.beta_s_per_byte, rel=0.05)


def test_an_outlier_hardly_moves_the_fit() -> None:
    truth = Line(1e-3, 1e-9)
    cost = fitted(truth, SIZES_NBYTES * 10)
    cost.observe(4 * MIB, 1000 * truth.seconds(4 * MIB))
    for nbytes in SIZES_NBYTES:
        assert cost.line.seconds(nbytes) == pytest.approx(truth.seconds(nbytes), rel=0.25)


def test_outliers_on_both_sides_are_no_change() -> None:
    truth = Line(1e-3, 1e-9)
    cost = fitted(truth, SIZES_NBYTES * 10)
    for _ in range(10):
        cost.observe(MIB, 10 * truth.seconds(MIB))
        cost.observe(MIB, 0.1 * truth.seconds(MIB))
    assert cost.line.seconds(MIB) == pytest.approx(truth.seconds(MIB), rel=1.0)


def test_outliers_must_be_on_one_side_in_a_row_to_be_a_change() -> None:
    truth = Line(1e-3, 1e-9)
    cost = fitted(truth, SIZES_NBYTES * 10)
    for factor in (100, 100, 0.01, 100, 100, 1, 100, 100):
        cost.observe(MIB, factor * truth.seconds(MIB))
    assert cost.line.seconds(MIB) < 3 * truth.seconds(MIB)


@pytest.mark.parametrize("factor", [0.05, 0.5, 2.0, 20.0])
def test_a_lasting_change_is_followed(factor: float) -> None:
    cost = fitted(Line(1e-3, 1e-9), SIZES_NBYTES * 30)
    changed = Line(1e-3 * factor, 1e-9 * factor)
    for nbytes in SIZES_NBYTES * 20:
        cost.observe(nbytes, changed.seconds(nbytes))
    for nbytes in SIZES_NBYTES:
        assert cost.line.seconds(nbytes) == pytest.approx(changed.seconds(nbytes), rel=0.15)


def test_a_large_change_is_followed_at_once() -> None:
    cost = fitted(Line(1e-3, 1e-9), SIZES_NBYTES * 30)
    for _ in range(3):
        cost.observe(16 * MIB, 2.0)
    assert cost.line.seconds(16 * MIB) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize(
    ("nbytes", "seconds"), [(-1, 1.0), (1, -1e-9), (1, math.nan), (1, math.inf)]
)
def test_impossible_samples_are_refused(nbytes: int, seconds: float) -> None:
    cost = LinearCost(PRIOR)
    with pytest.raises(ValueError, match="measured cost"):
        cost.observe(nbytes, seconds)
    assert cost.line == PRIOR


# -- the model --------------------------------------------------------------------------------


def test_a_shared_link_costs_the_same_however_many_puts_share_it() -> None:
    link_s_per_byte = 1e-9
    model = CostModel()
    for i in range(200):
        in_flight, nbytes = (1, 2, 4, 8)[i % 4], SIZES_NBYTES[2 + i % 5]
        model.observe_write(nbytes, in_flight * link_s_per_byte * nbytes, in_flight)
    assert model.line("write").beta_s_per_byte == pytest.approx(link_s_per_byte, rel=0.05)
    assert model.line("put").beta_s_per_byte == pytest.approx(link_s_per_byte, rel=0.05)
    assert model.streams == 1


def test_streams_of_their_own_multiply_the_throughput() -> None:
    stream = Line(50e-3, 1 / 80e6)
    model = CostModel()
    for i in range(200):
        nbytes = SIZES_NBYTES[i % 7]
        model.observe_write(nbytes, stream.seconds(nbytes), 8)
    assert model.line("put").seconds(MIB) == pytest.approx(stream.seconds(MIB), rel=0.02)
    assert model.seconds("write", MIB) == pytest.approx(stream.seconds(MIB) / 8, rel=0.02)
    assert model.streams == 32


def test_one_put_at_a_time_is_the_whole_sink() -> None:
    model = CostModel()
    model.observe("write", MIB, 0.5)
    assert model.line("put") == model.line("write")
    assert model.seconds("write", MIB) == pytest.approx(0.5)


def test_costs_do_not_mix() -> None:
    model = CostModel()
    before_s = model.seconds("encode:delta", MIB)
    model.observe("encode:plane", MIB, 0.5)
    assert model.seconds("encode:plane", MIB) == pytest.approx(0.5)
    assert model.seconds("encode:delta", MIB) == before_s


def test_ratios_follow_the_measurements_of_their_class() -> None:
    model = CostModel()
    for _ in range(5):
        model.observe_ratio("delta", "params", "float32", 4 * MIB, MIB)
    assert model.ratio("delta", "params", "float32") == pytest.approx(0.25, rel=0.02)
    assert model.ratio("delta", "exp_avg", "float32") == 0.821
    for _ in range(200):
        model.observe_ratio("delta", "params", "float32", 4 * MIB, 2 * MIB)
    assert model.ratio("delta", "params", "float32") == pytest.approx(0.5, rel=0.02)


def test_an_empty_extent_says_nothing_about_the_ratio() -> None:
    model = CostModel()
    model.observe_ratio("plane", "params", "float32", 0, 12)
    assert model.ratio("plane", "params", "float32") == 0.832


def test_what_is_unknown_is_not_expected_to_shrink() -> None:
    model = CostModel()
    assert model.ratio("plane", "data", "int64") == 1.0
    assert model.ratio("unheard-of", "params", "float32") == 1.0
    assert model.ratio("raw", "params", "float32") == 1.0


def test_unknown_keys_are_refused() -> None:
    model = CostModel()
    with pytest.raises(ValueError, match="fly"):
        model.seconds("fly", 1)
    with pytest.raises(ValueError, match="fly"):
        model.observe("fly", 1, 1.0)


@pytest.mark.parametrize("in_flight", [0, 0.5, -1, math.nan, math.inf])
def test_a_put_is_in_flight_itself(in_flight: float) -> None:
    with pytest.raises(ValueError, match="in flight"):
        CostModel().observe_write(1, 1.0, in_flight)


def test_negative_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="ratio"):
        CostModel().observe_ratio("plane", "params", "float32", -1, 1)
    with pytest.raises(ValueError, match="ratio"):
        CostModel().observe_ratio("plane", "params", "float32", 1, -1)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["copy", "put", "write", "encode:plane", "encode:x"]),
            st.integers(0, 10**12),
            st.floats(0, 1e4),
        ),
        max_size=30,
    ),
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 10**9), st.integers(0, 10**9))),
)
def test_what_was_learned_survives_json(
    costs: list[tuple[str, int, float]], ratios: list[tuple[str, int, int]]
) -> None:
    model = CostModel()
    for key, nbytes, seconds in costs:
        model.observe(key, nbytes, seconds)
    for kind, raw_nbytes, stored_nbytes in ratios:
        model.observe_ratio("plane", kind, "float32", raw_nbytes, stored_nbytes)
    loaded = CostModel.from_json(json.loads(json.dumps(model.to_json(), allow_nan=False)))
    for key in ("copy", "put", "write", "encode:plane", "encode:x", "encode:delta"):
        assert loaded.line(key) == model.line(key)
    for kind in "ab":
        expected = model.ratio("plane", kind, "float32")
        assert loaded.ratio("plane", kind, "float32") == pytest.approx(expected)


def test_a_loaded_model_goes_on_learning() -> None:
    model = CostModel()
    model.observe("encode:plane", MIB, 1.0)
    loaded = CostModel.from_json(model.to_json())
    for _ in range(5):
        loaded.observe("encode:plane", MIB, 2.0)
    assert loaded.seconds("encode:plane", MIB) == pytest.approx(2.0)


def test_copying_is_as_fast_as_it_was_at_its_best_lately() -> None:
    model = CostModel()
    prior_s = model.seconds("copy", MIB)
    model.observe("copy", 0, 1.0)
    model.observe("copy", 100 * MIB, 3.0)  # fresh memory
    assert model.seconds("copy", MIB) == prior_s
    for seconds in (0.2, 0.2, 9.0, 0.1, 0.2, 0.2, 0.2):
        model.observe("copy", 100 * MIB, seconds)
    assert model.seconds("copy", MIB) == pytest.approx(0.001)
    for _ in range(8):
        model.observe("copy", 100 * MIB, 0.3)
    assert model.seconds("copy", MIB) == pytest.approx(0.003)


@pytest.mark.parametrize("streams", [1, 4, 16])
def test_streams_survive_json_and_may_be_left_out(streams: int) -> None:
    model = CostModel()
    for in_flight in (1, 32, 4, 16) * 50:
        model.observe_write(8 * MIB, 0.1 * max(1.0, in_flight / streams), in_flight)
    assert model.streams == streams
    document = model.to_json()
    loaded = CostModel.from_json(json.loads(json.dumps(document)))
    assert (loaded.streams, loaded.line("put")) == (streams, model.line("put"))
    del document["streams"]
    assert CostModel.from_json(document).streams == CostModel().streams == 32


LINE: dict[str, object] = {"alpha_s": 1e-3, "beta_s_per_byte": 1e-9}
RATIO: dict[str, object] = {"codec": "plane", "kind": "params", "dtype": "float32", "ratio": 0.5}


def with_cost(**changes: object) -> dict[str, object]:
    return {"costs": {"write": LINE | changes}, "ratios": []}


def with_ratio(**changes: object) -> dict[str, object]:
    return {"costs": {}, "ratios": [RATIO | changes]}


def test_well_formed_documents_are_accepted() -> None:
    assert CostModel.from_json(with_cost()).line("write") == Line(1e-3, 1e-9)
    assert CostModel.from_json(with_ratio()).ratio("plane", "params", "float32") == 0.5


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"costs": {}},
        {"costs": {}, "ratios": [], "more": 1},
        {"costs": {"fly": LINE}, "ratios": []},
        {"costs": {"copy": {"alpha_s": 1.0}}, "ratios": []},
        with_cost(alpha_s=math.nan),
        with_cost(alpha_s=-1e-9),
        with_cost(beta_s_per_byte=math.inf),
        with_cost(beta_s_per_byte="1"),
        with_cost(beta_s_per_byte=True),
        with_cost(beta_s_per_byte=10**400),
        with_cost(gamma=1.0),
        with_ratio(ratio=math.nan),
        with_ratio(ratio=-0.5),
        with_ratio(ratio=None),
        with_ratio(kind=3),
        with_ratio(kind="k" * 1000),
        with_ratio(extra=1),
        {"costs": {}, "ratios": [RATIO, RATIO]},
        {"costs": {}, "ratios": [], "streams": 5},
        {"costs": {}, "ratios": [], "streams": 2.5},
        {"costs": {}, "ratios": [], "streams": None},
    ],
)
def test_malformed_documents_are_refused(document: object) -> None:
    with pytest.raises(FormatError, match="malformed cost model"):
        CostModel.from_json(document)


def test_threads_may_share_a_model() -> None:
    model = CostModel()

    def work(kind: str) -> None:
        for _ in range(300):
            model.observe("copy", MIB, 0.01)
            model.observe_ratio("plane", kind, "float32", MIB, MIB // 2)
            model.to_json()

    threads = [threading.Thread(target=work, args=(kind,)) for kind in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.seconds("copy", MIB) == pytest.approx(0.01, rel=0.01)
    assert [round(model.ratio("plane", k, "float32"), 2) for k in "abcd"] == [0.5] * 4
