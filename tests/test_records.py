"""Sealed records: read back exactly, or refused before anything is parsed."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta
from states import TEXT

from asymcheck import records
from asymcheck.errors import AsymCheckError, CorruptionError, FormatError, UnsupportedVersionError
from asymcheck.manifest import Record
from asymcheck.records import FORMAT_VERSION, header, seal, unseal


class Example(Record):
    name: str
    count: Annotated[int, Meta(ge=0)]
    extra: dict[str, Any] = {}  # noqa: RUF012 (msgspec copies it)


def sealed_text(text: str, kind: str = "example", version: int = FORMAT_VERSION) -> bytes:
    body = text.encode()
    return header(kind, version, body) + body


def opened(data: bytes) -> Example:
    return unseal(data, "example", Example, object="some/key")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**100), 2**100)
    | TEXT
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda c: st.lists(c, max_size=3) | st.dictionaries(TEXT, c, max_size=3),
    max_leaves=8,
)


@given(TEXT, st.integers(0, 2**62), st.dictionaries(TEXT, JSON, max_size=3))
def test_round_trip(name: str, count: int, extra: dict[str, Any]) -> None:
    record = Example(name, count, extra)
    data = seal("example", record)
    back = opened(data)
    assert (back.name, back.count, back.extra) == (name, count, extra)
    assert seal("example", back) == data
    assert data.isascii()


@given(st.data())
def test_every_changed_bit_is_noticed(data: st.DataObject) -> None:
    good = bytearray(seal("example", Example("abc", 7)))
    position = data.draw(st.integers(0, len(good) - 1))
    good[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises((CorruptionError, UnsupportedVersionError)) as raised:
        opened(bytes(good))
    assert raised.value.object == "some/key"


@given(st.integers(0, 200))
def test_every_truncation_is_noticed(length: int) -> None:
    good = seal("example", Example("abc", 7))
    for torn in (good[: min(length, len(good) - 1)], good + b"x" * (length + 1)):
        with pytest.raises(CorruptionError):
            opened(torn)


@given(st.binary(max_size=300))
def test_other_bytes_are_no_record(data: bytes) -> None:
    with pytest.raises(CorruptionError, match="no sealed example"):
        opened(data)


def test_a_record_of_another_kind_is_refused() -> None:
    with pytest.raises(CorruptionError, match="no sealed manifest"):
        unseal(seal("example", Example("a", 1)), "manifest", Example, object="k")


def test_another_version_is_refused_by_number() -> None:
    with pytest.raises(UnsupportedVersionError, match="another format version") as raised:
        opened(sealed_text("{}", version=FORMAT_VERSION + 1))
    assert (raised.value.expected, raised.value.found) == (FORMAT_VERSION, FORMAT_VERSION + 1)


MALFORMED = [
    "",
    "null",
    "[]",
    "{",
    '{"name":"a"}',
    '{"name":"a","count":-1}',
    '{"name":"a","count":1.0}',
    '{"name":"a","count":"1"}',
    '{"name":1,"count":1}',
    '{"name":"a","count":1,"more":2}',
    '{"name":"a","name":"b","count":1}',
    '{"name":"a","count":1,"extra":{"a":1,"a":1}}',
    '{"name":"a","count":NaN}',
    '{"name":"a","count":1,"extra":{"a":Infinity}}',
    '{"name":"a","count":1,"extra":{"a":-Infinity}}',
    '{"name":"a","count":' + "9" * 5000 + "}",
    '{"name":"a","count":1,"extra":{"a":' + "[" * 100_000 + "]" * 100_000 + "}}",
    '{"name":"\\ud800',
]


@pytest.mark.parametrize("text", MALFORMED, ids=[m[:50] for m in MALFORMED])
def test_malformed_bodies_are_refused(text: str) -> None:
    with pytest.raises(FormatError, match="malformed record") as raised:
        opened(sealed_text(text))
    assert raised.value.object == "some/key"
    assert len(str(raised.value)) < 1000


@given(JSON)
def test_any_json_is_read_or_refused(value: Any) -> None:
    try:
        record = opened(sealed_text(json.dumps(value)))
    except AsymCheckError:
        return
    assert isinstance(record, Example)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_seals_only_json_numbers(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        seal("example", Example("a", 1, {"x": value}))


class Bulky(Record):
    rows: list[tuple[str, int]]
    extra: dict[str, Any] = {}  # noqa: RUF012 (msgspec copies it)


ROWS = st.lists(st.tuples(TEXT | st.text(max_size=4), st.integers(0, 2**60)), max_size=5)


@given(ROWS, st.dictionaries(TEXT, JSON, max_size=3))
def test_bulk_is_written_as_everything_else(rows: Any, extra: dict[str, Any]) -> None:
    record = Bulky(rows, extra)
    data = seal("bulky", record)
    assert seal("bulky", record, ["rows"]) == data
    for bulk in ([], ["rows"]):
        back = unseal(data, "bulky", Bulky, bulk, object="k")
        assert (back.rows, back.extra) == (rows, extra)


def test_what_seal_has_written_is_parsed_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many leaves would take ten times as long otherwise."""
    figures = {"a": 4.7e-05, "b": 1e22, "c": -0.0, "d": 123456789.125, "e": [1, None, True, "ü"]}
    data = seal("bulky", Bulky([("w", 1)], figures), ["rows"])
    monkeypatch.setattr(records, "_parse", None)
    assert unseal(data, "bulky", Bulky, ["rows"], object="k").extra == figures


@pytest.mark.parametrize(
    "body",
    [
        '{"rows": [["w", 1]],"extra":{}}',
        '{"extra":{},"rows":[["w",1]]}',
        '{"rows":[["\\u0077",1]]}',
        '{"rows":[["w",1]],"extra":{"a":1E2}}',
    ],
)
def test_other_ways_to_write_it_are_read_too(body: str) -> None:
    back = unseal(sealed_text(body, "bulky"), "bulky", Bulky, ["rows"], object="k")
    assert back.rows == [("w", 1)]


@pytest.mark.parametrize(
    "body",
    [
        '{"rows":[],"rows":[],"extra":{}}',
        '{"rows":[],"extra":{"a":1,"a":1}}',
        '{"rows":[],"extra":{},"more":1}',
        '{"rows":[["w",1.0]],"extra":{}}',
        '{"rows":[["w",-1e999]],"extra":{}}',
        '{"rows":[],"extra":{"a":NaN}}',
        '{"rows":[["ü",1]],"extra":{}}',
    ],
)
def test_the_fast_way_refuses_nothing_less(body: str) -> None:
    with pytest.raises(FormatError):
        unseal(sealed_text(body, "bulky"), "bulky", Bulky, ["rows"], object="k")
