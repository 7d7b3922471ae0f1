"""Sealed JSON: how manifests and commit records lie in the store.

One header line, `asymcheck <kind> <version> <sha256> <length of the body>\\n`, then the body, a
JSON object in ASCII. The digest covers `asymcheck <kind> <version> ` and the body. The header is
checked before anything is parsed, so that another version is told from a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection
from typing import Any, TypeVar

import msgspec

from asymcheck.errors import CorruptionError, FormatError, UnsupportedVersionError

FORMAT_VERSION = 1
_HEADER = re.compile(rb"asymcheck ([a-z]{1,20}) ([0-9]{1,6}) ([0-9a-f]{64}) ([0-9]{1,12})\n")
_MAX_HEADER_LENGTH = 128

T = TypeVar("T")


def seal(kind: str, body: Any, bulk: Collection[str] = ()) -> bytes:
    """The stored form of a record; the same body gives the same bytes.

    `bulk` names members of a `msgspec.Struct` that hold no other numbers than integers: they are
    written faster, in the same form.
    """
    text = _text(body, bulk)
    return header(kind, FORMAT_VERSION, text) + text


def header(kind: str, version: int, body: bytes) -> bytes:
    """The header line of a record; its digest covers kind and version as well as the body."""
    start = f"asymcheck {kind} {version} ".encode("ascii")
    return start + f"{sha256(start + body)} {len(body)}\n".encode("ascii")


def unseal(
    data: bytes, kind: str, as_type: type[T], bulk: Collection[str] = (), *, object: str
) -> T:
    """Check and parse a stored record; `bulk` as for `seal`.

    Raises:
        CorruptionError: the body is not what the header says (a torn or damaged object).
        UnsupportedVersionError: written in a version that this reader does not know.
        FormatError: the body is not JSON (duplicate members, NaN, absurd nesting and numbers
            included) or not of the declared type.
    """
    match = _HEADER.match(data[:_MAX_HEADER_LENGTH])
    if match is None or match[1] != kind.encode():
        raise CorruptionError(
            f"the object is no sealed {kind} record", object=object, found=repr(data[:24])
        )
    body = data[match.end() :]
    expected = header(kind, int(match[2]), body)
    if match[0] != expected:
        raise CorruptionError(
            f"the {kind} record is not the one that was sealed",
            object=object,
            expected=f"the header {match[0].decode()!r}",
            found=f"content of the header {expected.decode()!r}",
        )
    if int(match[2]) != FORMAT_VERSION:
        raise UnsupportedVersionError(
            f"the {kind} record is of another format version",
            object=object,
            expected=FORMAT_VERSION,
            found=int(match[2]),
            hint="Read it with the AsymCheck version that wrote it, or a later one",
        )
    record = _parse_own(body, as_type, bulk)
    return _parse(body, as_type, object) if record is None else record


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def _text(body: Any, bulk: Collection[str]) -> bytes:
    """JSON in ASCII."""
    if not bulk:
        return _plain_text(body)
    members = (
        f'"{name}":'.encode() + (_bulk_text if name in bulk else _plain_text)(getattr(body, name))
        for name in body.__struct_fields__
    )
    return b"{" + b",".join(members) + b"}"


def _plain_text(value: Any) -> bytes:
    # Structs become dictionaries one at a time: thousands at once wake the garbage collector.
    return json.dumps(
        value, separators=(",", ":"), allow_nan=False, default=msgspec.structs.asdict
    ).encode("ascii")


def _bulk_text(value: Any) -> bytes:
    try:
        text = msgspec.json.encode(value)
    except UnicodeEncodeError:  # a lone surrogate
        return _plain_text(value)
    same = text.isascii() and b"\x7f" not in text  # of ASCII, only DEL is written otherwise
    return text if same else _plain_text(value)


def _parse_own(body: bytes, as_type: type[T], bulk: Collection[str]) -> T | None:
    """The record, if `seal` would write it as it stands: found out much faster than by `_parse`.

    Then no member is there twice and none is unknown, and every number is what it reads like.
    Else `_parse` tells what is wrong, or that it is only written in another way.
    """
    try:
        record = msgspec.json.decode(body, type=as_type)
        return record if _text(record, bulk) == body else None
    except (ValueError, RecursionError):
        return None


def _parse(body: bytes, as_type: type[T], object: str) -> T:
    try:
        plain = json.loads(
            body.decode("ascii"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        return msgspec.convert(plain, as_type, strict=True)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"malformed record: {str(error)[:200]}", object=object) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object has the same member twice")
    return members


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large for a float64")
    return number


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
