"""Whole runs in HDFS: their writers are killed, and so are the servers under them."""

from __future__ import annotations

import pytest
from kill_writer import known_state, restored
from reading_in_place import check_that_only_what_is_asked_for_is_read
from servers.hdfs import HdfsCluster
from test_hdfs import SCHEMES, url_of
from test_kill import finish, kill_again_and_again

from asymcheck import AsymCheck, Checkpointer, CostModel, open_checkpoint


@pytest.mark.parametrize("scheme", SCHEMES)
def test_writers_killed_at_any_moment(
    hdfs_cluster: HdfsCluster, hdfs_path: str, scheme: str
) -> None:
    url = url_of(hdfs_cluster, scheme, hdfs_path)
    acknowledged = kill_again_and_again(url, seed=0, kills=3, strategy="asymcheck")
    finish(url, acknowledged, 3, "asymcheck")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_writers_killed_at_any_moment_for_long(hdfs_cluster: HdfsCluster, hdfs_path: str) -> None:
    url = url_of(hdfs_cluster, "hdfs", hdfs_path)
    acknowledged = kill_again_and_again(url, seed=1, kills=30, strategy="delta")
    finish(url, acknowledged, 30, "delta")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_what_is_asked_for_is_read(
    hdfs_cluster: HdfsCluster, hdfs_path: str, scheme: str
) -> None:
    check_that_only_what_is_asked_for_is_read(url_of(hdfs_cluster, scheme, hdfs_path))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_outlives_its_servers(
    frail_cluster: HdfsCluster, hdfs_path: str, scheme: str
) -> None:
    url = url_of(frail_cluster, scheme, hdfs_path)
    events = {2: lambda: frail_cluster.kill_datanode(0), 4: frail_cluster.restart_namenode}
    with Checkpointer(url, strategy=AsymCheck(), cost_model=CostModel()) as checkpointer:
        saves = []
        for step in range(6):
            saves.append(checkpointer.save(step, known_state(step, 0)))
            events.get(step, lambda: None)()
        for save in saves:
            save.wait()
        assert restored(checkpointer.restore()) == (5, 0)
    frail_cluster.kill_datanode(1)
    frail_cluster.heal()  # and another one with it
    with open_checkpoint(url) as checkpoint:
        assert checkpoint.step == 5
        checkpoint.verify()
