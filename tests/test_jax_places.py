"""What is told from the names that Orbax gives directories."""

from __future__ import annotations

import pytest
from etils import epath

from asymcheck_jax.places import Place

TMP = ".orbax-checkpoint-tmp"


@pytest.mark.parametrize(
    ("path", "url", "root", "item", "number", "is_certain"),
    [
        (f"/r/7{TMP}/default{TMP}", f"/r/7{TMP}/default{TMP}", "/r", "default", 7, True),
        (f"/r/gpt2_7{TMP}/a{TMP}", f"/r/gpt2_7{TMP}/a{TMP}", "/r", "a", 7, True),
        (f"/r/one{TMP}", f"/r/one{TMP}", "/r", "", None, True),
        (f"/r/one-5{TMP}", f"/r/one-5{TMP}", "/r", "", 5, True),
        ("/r/7/default", "/r/7/default", "/r", "default", 7, False),
        ("gs://b/r/7/default", "gs://b/r/7/default", "gs://b/r", "default", 7, False),
        ("gs://b/my r/7/state", "gs://b/my%20r/7/state", "gs://b/my%20r", "state", 7, False),
        ("gs://b/r?/7", "gs://b/r%3F/7", "gs://b/r%3F", "", 7, False),
        ("gs://b/r/one", "gs://b/r/one", "gs://b/r", "", None, False),
        (f"s3://b/7{TMP}/state{TMP}", f"s3://b/7{TMP}/state{TMP}", "s3://b", "state", 7, True),
    ],
)
def test_places(
    path: str, url: str, root: str, item: str, number: int | None, is_certain: bool
) -> None:
    place = Place.of(epath.Path(path))
    assert (place.url, place.root, place.item) == (url, root, item)
    assert (place.number, place.is_certain) == (number, is_certain)
    assert place.is_local == path.startswith("/")
