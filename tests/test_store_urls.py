"""How URLs and options name remote stores; nothing is asked of any server."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asymcheck.errors import AsymCheckError, StoreError
from asymcheck.stores import LocalStore, StoreOptions, open_store
from asymcheck.stores.options import options_of
from asymcheck.stores.urls import MAX_PREFIX_NBYTES, RemotePlace, remote_place

SECRET = "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY"

names = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=20).filter(
    lambda name: "/" not in name and name not in (".", "..")
)
options = st.builds(
    StoreOptions,
    endpoint=st.sampled_from([None, "http://127.0.0.1:9000", "https://s3.example.org/minio"]),
    region=st.sampled_from([None, "eu-west-1"]),
    credentials=st.sampled_from([None, "environment", "profile:a b&c=d"]),
    retries=st.integers(0, 100),
    timeout_s=st.floats(1e-3, 1e6),
    concurrency=st.integers(1, 1000),
)


@given(st.lists(names, max_size=5), options)
def test_the_shown_url_opens_the_same_place(path: list[str], options: StoreOptions) -> None:
    place = RemotePlace("s3", "bucket", "/".join(path), options)
    _, _, location = place.url.partition("://")
    assert remote_place("s3", location, StoreOptions()) == place


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket", "s3://bucket"),
        ("S3://bucket/", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("gs://bucket/a%20b/lr=0.1", "gs://bucket/a%20b/lr=0.1"),
        ("gs://bucket/a?retries=8&timeout_s=120&concurrency=32", "gs://bucket/a"),
        (
            "s3://bucket/a?region=us-east-1&endpoint=http%3A%2F%2F127.0.0.1%3A9000",
            "s3://bucket/a?endpoint=http://127.0.0.1:9000&region=us-east-1",
        ),
    ],
)
def test_urls_are_shown_with_options_that_are_no_defaults(url: str, shown: str) -> None:
    store = open_store(url)
    assert store.url == shown
    assert open_store(store.url).url == shown


def test_the_query_goes_before_the_object() -> None:
    given = StoreOptions(region="eu-west-1", retries=2)
    assert open_store("s3://bucket/a?retries=3", given).url == (
        "s3://bucket/a?region=eu-west-1&retries=3"
    )


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///a",
        "s3://b/a",
        "s3://bucket//a",
        "s3://bucket/a//b",
        "s3://bucket/../a",
        "gs://bucket/a/./b",
        "gs://bucket/a%0Ab",
        "gs://bucket/" + "a" * (MAX_PREFIX_NBYTES + 1),
        "gs://bucket/a#b",
        "gs://bucket:80/a",
        "s3://bucket/a?nonsense=1",
        "s3://bucket/a?retries=1&retries=2",
        "s3://bucket/a?retries=many",
        "s3://bucket/a?retries=-1",
        "s3://bucket/a?timeout_s=0",
        "s3://bucket/a?timeout_s=inf",
        "s3://bucket/a?timeout_s=nan",
        "s3://bucket/a?concurrency=0",
        "s3://bucket/a?region=",
        "s3://bucket/a?endpoint=localhost:9000",
        "s3://bucket/a?endpoint=ftp://localhost",
        "s3://bucket/a?credentials=profile:",
        "s3://bucket/a?credentials=environment:x",
        "gs://bucket/a?endpoint=http://localhost",
        "gs://bucket/a?region=eu",
        "gs://bucket/a?credentials=environment",
    ],
)
def test_refuses_what_names_no_store(url: str) -> None:
    with pytest.raises(StoreError) as raised:
        open_store(url)
    assert "expected" in str(raised.value) or raised.value.hint


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@bucket/a",
        f"gs://{SECRET}@bucket/a",
        f"s3://key:{SECRET}/a",
        f"nonsense://key:{SECRET}@bucket/a",
        f"file://key:{SECRET}@host/a",
        f"s3://bucket/a?secret_access_key={SECRET}",
        f"s3://bucket/a?X-Amz-Security-Token={SECRET}",
        f"s3://bucket/a?{SECRET}",
        f"s3://bucket/a?credentials={SECRET}",
        f"gs://bucket/a?credentials={SECRET}",
        f"s3://bucket/a?region={SECRET}/",
        f"s3://bucket/a?retries={SECRET}",
        f"s3://bucket/a?endpoint=http://key:{SECRET}@host",
        f"s3://bucket/a?endpoint=http://host?X-Amz-Signature={SECRET}",
    ],
)
def test_secrets_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(AsymCheckError) as raised:
        open_store(url)
    shown = "".join(traceback.format_exception(raised.value)) + repr(vars(raised.value))
    # The test's own lines name the URL's variable only, so the secret is from the error if there.
    assert SECRET not in shown


def test_names_the_option_that_is_meant() -> None:
    with pytest.raises(StoreError, match=r"'region_'.*endpoint, region, credentials"):
        options_of("retries=3&region_=x", StoreOptions())


def test_gcs_tells_how_its_endpoint_is_set() -> None:
    with pytest.raises(StoreError, match="TENSORSTORE_GCS_HTTP_URL"):
        open_store("gs://bucket/a?endpoint=http://localhost:9000")


def test_paths_and_file_urls_have_no_query(tmp_path: Path) -> None:
    for name in (str(tmp_path / "a?retries=3"), f"file://{tmp_path}/a?retries=3"):
        store = open_store(name)
        assert isinstance(store, LocalStore)
        store.put("k", memoryview(b"v"))
    assert (tmp_path / "a?retries=3" / "k").read_bytes() == b"v"


@pytest.mark.parametrize("url", ["/a", "file:///a", "memory://a", "tensorstore+file:///a"])
def test_local_stores_have_no_options(url: str) -> None:
    open_store(url, StoreOptions())
    with pytest.raises(StoreError, match="retries"):
        open_store(url, StoreOptions(retries=3))
