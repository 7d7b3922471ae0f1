"""Fixtures of HDFS, for `conftest.py` to import."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from servers.hdfs import HdfsCluster
from servers.hdfs_install import missing

BLOCK_NBYTES = 32 << 20

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def hdfs_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HdfsCluster]:
    """A NameNode and two DataNodes, every file on both, in blocks of `BLOCK_NBYTES`."""
    if lacking := missing():
        pytest.skip(lacking)
    settings = {"dfs.blocksize": str(BLOCK_NBYTES)}
    with HdfsCluster(tmp_path_factory.mktemp("hdfs"), 2, settings) as cluster:
        yield cluster


@pytest.fixture
def frail_cluster(hdfs_cluster: HdfsCluster) -> Iterator[HdfsCluster]:
    """The cluster, for a test that kills or suspends its servers; made whole again after it."""
    yield hdfs_cluster
    hdfs_cluster.heal()


@pytest.fixture
def hdfs_path() -> str:
    """The path of a directory that no other test uses; nothing is there."""
    return f"/tests/{next(_numbers)}"
