import re
import threading

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from asymcheck.codecs import _CODECS, codec_by_name
from asymcheck.cost import CostModel
from asymcheck.errors import CodecError
from asymcheck.policy import Always, CompressionPolicy, Never, PolicyRequest, Selective
from asymcheck.strategies import STRATEGIES

MIB = 1 << 20
GB = 1e9

# Ratio of the full and of the differenced coding of every class that was measured.
CLASSES = [
    ("params", "bfloat16"),
    ("params", "float32"),
    ("exp_avg", "float32"),
    ("exp_avg_sq", "float32"),
]


def model(
    write_bytes_per_s: float,
    *,
    put_alpha_s: float = 1e-3,
    encode: dict[str, tuple[float, float]] | None = None,
    ratio: dict[str, float] | None = None,
) -> CostModel:
    """Costs as told: `encode` by codec (alpha_s, bytes per second), `ratio` for params float32."""
    costs = {f"encode:{c}": _line(a, b) for c, (a, b) in (encode or {}).items()}
    costs["write"] = _line(put_alpha_s, write_bytes_per_s)
    ratios = [
        {"codec": codec, "kind": "params", "dtype": "float32", "ratio": value}
        for codec, value in (ratio or {}).items()
    ]
    return CostModel.from_json({"costs": costs, "ratios": ratios})


def _line(alpha_s: float, bytes_per_s: float) -> dict[str, float]:
    return {"alpha_s": alpha_s, "beta_s_per_byte": 1 / bytes_per_s}


def request(
    cost: CostModel,
    nbytes: int = 16 * MIB,
    kind: str = "params",
    dtype: str = "float32",
    *,
    has_base: bool = True,
) -> PolicyRequest:
    return PolicyRequest(nbytes, kind, dtype, has_base, cost)


def chosen(policy: CompressionPolicy, request: PolicyRequest) -> str:
    return policy.decide(request).codec


# -- the rule ---------------------------------------------------------------------------------


@given(
    st.integers(0, 10**12),
    st.floats(1e6, 1e11),
    st.floats(0, 1e-2),
    st.floats(1e6, 1e11),
    st.floats(0, 2),
    st.floats(0, 1),
)
def test_compressed_iff_encoding_and_writing_less_is_faster(
    nbytes: int,
    write_bytes_per_s: float,
    encode_alpha_s: float,
    encode_bytes_per_s: float,
    ratio: float,
    put_alpha_s: float,
) -> None:
    cost = model(
        write_bytes_per_s,
        put_alpha_s=put_alpha_s,
        encode={"plane": (encode_alpha_s, encode_bytes_per_s)},
        ratio={"plane": ratio},
    )
    raw_s = put_alpha_s + nbytes / write_bytes_per_s
    coded_s = (
        encode_alpha_s
        + nbytes / encode_bytes_per_s
        + put_alpha_s
        + ratio * nbytes / write_bytes_per_s
    )
    assume(abs(coded_s - raw_s) > 1e-9 * raw_s)
    policy = Selective(("plane",), explore_every=0)
    assert chosen(policy, request(cost, nbytes)) == ("plane" if coded_s < raw_s else "raw")


def test_the_fastest_candidate_wins() -> None:
    encode = {"plane": (0.0, 2 * GB), "delta": (0.0, 1 * GB)}
    policy = Selective(explore_every=0)
    much_smaller = model(0.1 * GB, encode=encode, ratio={"plane": 0.8, "delta": 0.2})
    hardly_smaller = model(0.1 * GB, encode=encode, ratio={"plane": 0.8, "delta": 0.79})
    assert chosen(policy, request(much_smaller)) == "delta"
    assert chosen(policy, request(hardly_smaller)) == "plane"


def test_equals_go_to_the_first_candidate_and_to_raw_above_all() -> None:
    same = {"plane": (0.0, 1 * GB), "delta": (0.0, 1 * GB)}
    cost = model(0.1 * GB, encode=same, ratio={"plane": 0.5, "delta": 0.5})
    assert chosen(Selective(("delta", "plane"), explore_every=0), request(cost)) == "delta"
    assert chosen(Selective(("plane", "delta"), explore_every=0), request(cost)) == "plane"
    no_gain = model(0.5 * GB, encode=same, ratio={"plane": 0.5, "delta": 0.5})
    assert chosen(Selective(explore_every=0), request(no_gain)) == "raw"


def test_a_difference_needs_a_base() -> None:
    cost = model(0.05 * GB)
    policy = Selective(explore_every=0)
    assert chosen(policy, request(cost, has_base=True)) == "delta"
    assert chosen(policy, request(cost, has_base=False)) == "plane"
    only_delta = Selective(("delta",), explore_every=0).decide(request(cost, has_base=False))
    assert only_delta.codec == "raw"
    assert "without a predecessor" in only_delta.reason


@pytest.mark.parametrize(("kind", "dtype"), CLASSES)
@pytest.mark.parametrize("has_base", [False, True])
def test_every_class_is_compressed_for_a_slow_sink(kind: str, dtype: str, has_base: bool) -> None:
    cost = model(0.1 * GB)
    for overlapped in (False, True):
        policy = Selective(overlapped=overlapped, explore_every=0)
        assert chosen(policy, request(cost, 16 * MIB, kind, dtype, has_base=has_base)) != "raw"


@pytest.mark.parametrize(("kind", "dtype"), CLASSES)
@pytest.mark.parametrize("overlapped", [False, True])
def test_raw_wins_where_the_sink_is_faster_than_the_codec(
    kind: str, dtype: str, overlapped: bool
) -> None:
    policy = Selective(overlapped=overlapped, explore_every=0)
    assert chosen(policy, request(model(5 * GB), 16 * MIB, kind, dtype)) == "raw"


@pytest.mark.parametrize(("kind", "dtype"), CLASSES)
def test_encoding_on_cores_of_its_own_pays_up_to_the_speed_of_the_codec(
    kind: str, dtype: str
) -> None:
    policy = Selective(overlapped=True, explore_every=0)
    for gigabytes_per_s in (0.1, 0.5, 1.0):
        cost = model(gigabytes_per_s * GB)
        assert chosen(policy, request(cost, 16 * MIB, kind, dtype)) != "raw"
    # Between the speed of delta (1.45 GB/s) and that of plane (2.3 GB/s).
    assert chosen(policy, request(model(2 * GB), 16 * MIB, kind, dtype)) == "plane"


def test_on_shared_cores_only_what_shrinks_most_pays_at_one_gigabyte_per_second() -> None:
    policy = Selective(explore_every=0)
    cost = model(1 * GB)
    codecs = {c: chosen(policy, request(cost, 16 * MIB, *c)) for c in CLASSES}
    assert codecs.pop(("params", "bfloat16")) == "delta"
    assert set(codecs.values()) == {"raw"}


@pytest.mark.parametrize("overlapped", [False, True])
def test_tiny_partitions_stay_raw(overlapped: bool) -> None:
    policy = Selective(overlapped=overlapped, explore_every=0)
    cost = model(0.1 * GB, put_alpha_s=50e-3)
    for nbytes in (0, 1, 100, 2000):
        assert chosen(policy, request(cost, nbytes)) == "raw"
    assert chosen(policy, request(cost, 256 << 10)) == "delta"


def test_measured_costs_never_compress_the_small_and_leave_the_large_raw() -> None:
    # A fit whose intercept may fall below zero does exactly that: here a line through the
    # samples would have alpha of about -5 ms for encoding, which makes small ones look free.
    cost = CostModel()
    for nbytes, seconds in [(1 * MIB, 0.1e-3), (8 * MIB, 25e-3), (16 * MIB, 60e-3)] * 10:
        cost.observe("encode:plane", nbytes, seconds)
    for nbytes in [64 << 10, 1 * MIB, 16 * MIB] * 10:
        cost.observe("write", nbytes, nbytes / (0.1 * GB))
    for _ in range(50):
        cost.observe_ratio("plane", "params", "float32", MIB, MIB // 5)
    policy = Selective(("plane",), explore_every=0)
    compressed = [chosen(policy, request(cost, 1 << i)) != "raw" for i in range(10, 31)]
    assert compressed == sorted(compressed)
    assert compressed[-1]


@given(
    st.integers(0, 10**11),
    st.integers(0, 10**11),
    st.floats(1e6, 1e11),
    st.booleans(),
    st.booleans(),
    st.sampled_from(CLASSES),
)
def test_what_pays_for_a_small_partition_pays_for_a_large_one(
    a_nbytes: int,
    b_nbytes: int,
    write_bytes_per_s: float,
    overlapped: bool,
    has_base: bool,
    leaf_class: tuple[str, str],
) -> None:
    cost = model(write_bytes_per_s)
    policy = Selective(overlapped=overlapped, explore_every=0)
    small, large = sorted((a_nbytes, b_nbytes))
    if chosen(policy, request(cost, small, *leaf_class, has_base=has_base)) != "raw":
        assert chosen(policy, request(cost, large, *leaf_class, has_base=has_base)) != "raw"


@given(
    st.integers(0, 10**11),
    st.floats(1e6, 1e11),
    st.floats(1.001, 1e4),
    st.booleans(),
    st.booleans(),
    st.sampled_from(CLASSES),
)
def test_what_pays_for_a_fast_sink_pays_for_a_slow_one(
    nbytes: int,
    write_bytes_per_s: float,
    slower: float,
    overlapped: bool,
    has_base: bool,
    leaf_class: tuple[str, str],
) -> None:
    policy = Selective(overlapped=overlapped, explore_every=0)
    fast, slow = model(write_bytes_per_s), model(write_bytes_per_s / slower)
    if chosen(policy, request(fast, nbytes, *leaf_class, has_base=has_base)) != "raw":
        assert chosen(policy, request(slow, nbytes, *leaf_class, has_base=has_base)) != "raw"


@given(st.integers(0, 10**12), st.floats(1e6, 1e11), st.booleans())
def test_the_figures_of_the_reason_support_the_decision(
    nbytes: int, write_bytes_per_s: float, has_base: bool
) -> None:
    decision = Selective(explore_every=0).decide(
        request(model(write_bytes_per_s), nbytes, has_base=has_base)
    )
    encode_s, write_s = re.findall(r"encode (\S+) ms \+ write (\S+) ms", decision.reason)[0]
    (raw_s,) = re.findall(r"write raw (\S+) ms", decision.reason)
    coded_s = float(encode_s) + float(write_s)
    if decision.codec == "raw":
        assert " <= " in decision.reason
        assert float(raw_s) <= coded_s * 1.1 + 0.1
    else:
        assert " < " in decision.reason
        assert coded_s <= float(raw_s) * 1.1 + 0.1


def test_reasons_read_well() -> None:
    cost = model(0.1 * GB, encode={"plane": (0.0, 1 * GB)}, ratio={"plane": 0.5})
    decision = Selective(("plane",)).decide(request(cost, 10_000_000))
    assert decision.reason == "encode 10.0 ms + write 50.0 ms < write raw 100.0 ms"
    decision = Selective(("plane",), overlapped=True).decide(request(cost, 10_000_000))
    assert decision.reason == "max(encode 10.0 ms, write 50.0 ms) < write raw 100.0 ms"
    fast = model(10 * GB, encode={"plane": (0.0, 1 * GB)}, ratio={"plane": 0.5})
    decision = Selective(("plane",)).decide(request(fast, 10_000_000))
    assert decision.reason == "write raw 1.0 ms <= plane: encode 10.0 ms + write 0.5 ms"


# -- exploration ------------------------------------------------------------------------------


def test_every_nth_decision_of_a_class_measures_a_candidate_again() -> None:
    policy = Selective(explore_every=4)
    fast = model(50 * GB)
    decisions = [policy.decide(request(fast)) for _ in range(16)]
    codecs = [d.codec for d in decisions]
    assert codecs == ["raw"] * 3 + ["plane"] + ["raw"] * 3 + ["delta"] + codecs[:8]
    assert decisions[3].reason == "to measure it again: decision 4 of params float32"


def test_classes_explore_by_themselves() -> None:
    policy = Selective(explore_every=4)
    fast = model(50 * GB)
    codecs = [chosen(policy, request(fast, 16 * MIB, *CLASSES[i % 4])) for i in range(16)]
    assert codecs == ["raw"] * 12 + ["plane"] * 4


def test_exploration_takes_no_difference_without_a_base_and_spares_the_tiny() -> None:
    policy = Selective(explore_every=2)
    fast = model(50 * GB)
    codecs = {chosen(policy, request(fast, has_base=False)) for _ in range(20)}
    assert codecs == {"raw", "plane"}
    assert {chosen(policy, request(fast, 60_000)) for _ in range(20)} == {"raw"}
    none = Selective(("delta",), explore_every=1)
    assert chosen(none, request(fast, has_base=False)) == "raw"


def test_exploration_finds_out_that_an_unknown_class_shrinks() -> None:
    policy = Selective(("plane",), explore_every=8)
    cost = model(0.1 * GB)
    codecs: list[str] = []
    for _ in range(24):
        codecs.append(chosen(policy, request(cost, MIB, "tables", "int64")))
        if codecs[-1] == "plane":
            cost.observe_ratio("plane", "tables", "int64", MIB, MIB // 10)
    assert codecs == ["raw"] * 7 + ["plane"] * 17


def test_threads_share_the_turns() -> None:
    policy = Selective(("plane",), explore_every=10)
    fast = model(50 * GB)
    codecs: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: codecs.extend(chosen(policy, request(fast)) for _ in range(100))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codecs.count("plane") == 40


# -- holding the predecessor ------------------------------------------------------------------

STATE = {("params", "float32"): 10**9, ("exp_avg", "float32"): 10**9}


def test_a_base_is_wanted_where_a_difference_pays() -> None:
    policy = Selective(explore_every=1)
    assert policy.wants_base(STATE, {}, model(0.1 * GB))
    assert not policy.wants_base(STATE, {}, model(5 * GB))
    assert not policy.wants_base({}, {}, model(0.1 * GB))
    assert not policy.wants_base({("params", "float32"): 100}, {}, model(0.1 * GB))
    assert not Selective(("plane",)).wants_base(STATE, {}, model(0.1 * GB))


def test_one_class_is_enough_to_want_a_base() -> None:
    state = {("exp_avg", "float32"): 10**9, ("params", "bfloat16"): 10**9}
    assert Selective().wants_base(state, {}, model(1 * GB))


# -- the others -------------------------------------------------------------------------------


def test_always_and_never() -> None:
    cost = model(50 * GB)
    assert chosen(Always(), request(cost, 1, has_base=True)) == "delta"
    fallback = Always().decide(request(cost, 1, has_base=False))
    assert fallback.codec == "plane"
    assert "no predecessor" in fallback.reason
    assert chosen(Always("zstd"), request(cost, 1, has_base=False)) == "zstd"
    assert chosen(Never(), request(model(1e3), 10**9)) == "raw"


def test_always_wants_the_base_that_its_codec_needs() -> None:
    assert Always().wants_base(STATE, {}, model(50 * GB))
    assert not Always("plane").wants_base(STATE, {}, model(1e3))
    assert not Never().wants_base(STATE, {}, model(1e3))


@pytest.mark.parametrize(
    "make", [lambda: Selective(("plain",)), lambda: Always("plain"), lambda: Always("delta", "x")]
)
def test_unknown_codecs_are_refused_at_once(make: object) -> None:
    assert callable(make)
    with pytest.raises(CodecError, match="no codec"):
        make()


def test_a_fallback_may_not_need_a_base() -> None:
    with pytest.raises(CodecError, match="without a predecessor"):
        Always("delta", "delta")


def test_policies_are_values() -> None:
    policy = Selective()
    chosen(policy, request(model(GB)))
    assert policy == Selective()
    assert hash(policy) == hash(Selective())
    assert policy != Selective(("plane",))
    assert repr(Never()) == "Never()"


# -- lossy ------------------------------------------------------------------------------------

LOSSY = [id for id in _CODECS if codec_by_name(id).lossy]


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize(
    "policy",
    [*(strategy().policy for strategy in STRATEGIES.values()), Selective(), Always(), Never()],
    ids=repr,
)
def test_no_default_is_lossy_however_cheap(policy: CompressionPolicy, has_base: bool) -> None:
    free = dict.fromkeys(LOSSY, (0.0, 1e15))
    cost = model(1e6, encode=free, ratio=dict.fromkeys(LOSSY, 1e-6))
    asked = [request(cost, kind=k, dtype=d, has_base=has_base) for k, d in CLASSES] * 600
    codecs = {chosen(policy, each) for each in asked}  # also those that explore
    assert codecs.isdisjoint(LOSSY)


@pytest.mark.parametrize("codec", LOSSY)
def test_lossy_codecs_are_chosen_by_name(codec: str) -> None:
    assert chosen(Always(codec), request(model(1e9))) == codec
    free = model(1e6, encode={codec: (0.0, 1e15)}, ratio={codec: 1e-6})
    assert chosen(Selective(candidates=(codec,)), request(free)) == codec
