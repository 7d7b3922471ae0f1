"""A real HDFS on loopback: a NameNode and DataNodes that live as long as the tests.

    with HdfsCluster(tmp_path, datanodes=2) as cluster:
        open_store(f"{cluster.rpc_url}/runs/a")

`hdfs_install.py` brings the jars.
"""

from __future__ import annotations

import getpass
import json
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import urlopen

from servers.hdfs_install import class_path, missing
from servers.processes import Starter
from servers.sockets import free_ports

SERVERS = "org.apache.hadoop.hdfs.server"
NAMENODE = f"{SERVERS}.namenode.NameNode"
DATANODE = f"{SERVERS}.datanode.DataNode"
LONGEST_START_S = 120.0
METRICS_AGE_S = 2.5  # they are collected every second

LOG_PROPERTIES = """
log4j.rootLogger=WARN,A
log4j.appender.A=org.apache.log4j.ConsoleAppender
log4j.appender.A.target=System.err
log4j.appender.A.layout=org.apache.log4j.PatternLayout
log4j.appender.A.layout.ConversionPattern=%d{ISO8601} %p %c{1}: %m%n
"""


class HdfsCluster:
    """One NameNode and some DataNodes in a directory; permissions are checked.

    The user who starts it is the superuser. Each server is its own JVM, which the kernel kills
    when this process ends, by whatever cause.

    Args:
        directory: for configuration, data and logs; must be empty.
        datanodes: how many; every file has as many replicas, at most 3.
        settings: more of hdfs-site.xml.
    """

    def __init__(
        self, directory: Path, datanodes: int = 1, settings: Mapping[str, str] | None = None
    ) -> None:
        if lacking := missing():
            raise RuntimeError(lacking)
        self._directory = directory.resolve()
        self._n_datanodes = datanodes
        self._rpc_port, self._http_port = free_ports(2)
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        self._starter = Starter()
        (self._directory / "log").mkdir(parents=True)
        self._configure("namenode", settings or {})
        for index in range(datanodes):
            self._configure(f"datanode{index}", settings or {})

    @property
    def rpc_url(self) -> str:
        """`hdfs://127.0.0.1:PORT`."""
        return f"hdfs://127.0.0.1:{self._rpc_port}"

    @property
    def webhdfs_url(self) -> str:
        """`webhdfs://127.0.0.1:PORT`."""
        return f"webhdfs://127.0.0.1:{self._http_port}"

    @property
    def process_ids(self) -> list[int]:
        """Of the servers."""
        return [server.pid for server in self._servers.values()]

    @property
    def rpc_port(self) -> int:
        """Of the NameNode, for a proxy in between."""
        return self._rpc_port

    @property
    def http_port(self) -> int:
        """Of the NameNode's WebHDFS."""
        return self._http_port

    def start(self) -> None:
        """Format, start all servers and wait until files can be written."""
        format_log = (self._directory / "log" / "format").open("wb")
        command = self._command("namenode", NAMENODE, "-format", "-force", "-nonInteractive")
        subprocess.run(command, stdout=format_log, stderr=format_log, check=True)
        self.start_namenode(wait=False)
        for index in range(self._n_datanodes):
            self.start_datanode(index, wait=False)
        self.wait_until_ready()

    def stop(self) -> None:
        """End all servers."""
        for name in list(self._servers):
            self._kill(name)
        self._starter.close()

    def start_namenode(self, wait: bool = True) -> None:
        """Start it; with `wait`, until it has left safe mode."""
        self._start("namenode", NAMENODE)
        if wait:
            self.wait_until_ready()

    def kill_namenode(self) -> None:
        """Kill -9."""
        self._kill("namenode")

    def restart_namenode(self) -> None:
        """Kill it, start it again, and wait until it has left safe mode."""
        self.kill_namenode()
        self.start_namenode()

    def suspend_namenode(self) -> None:
        """Stop it in its tracks: it accepts connections and says nothing."""
        self._servers["namenode"].send_signal(signal.SIGSTOP)

    def resume_namenode(self) -> None:
        """Let it go on."""
        self._servers["namenode"].send_signal(signal.SIGCONT)

    def start_datanode(self, index: int, wait: bool = True) -> None:
        """Start it; with `wait`, until the NameNode uses it."""
        self._start(f"datanode{index}", DATANODE)
        if wait:
            self.wait_until_ready()

    def kill_datanode(self, index: int) -> None:
        """Kill -9."""
        self._kill(f"datanode{index}")

    def suspend_datanode(self, index: int) -> None:
        """Stop it in its tracks: it accepts connections and says nothing."""
        self._servers[f"datanode{index}"].send_signal(signal.SIGSTOP)

    def resume_datanode(self, index: int) -> None:
        """Let it go on."""
        self._servers[f"datanode{index}"].send_signal(signal.SIGCONT)

    def heal(self) -> None:
        """Let go on what was suspended, start what was killed, and wait until all is ready."""
        for server in self._servers.values():
            server.send_signal(signal.SIGCONT)
        if "namenode" not in self._servers:
            self.start_namenode(wait=False)
        for index in range(self._n_datanodes):
            if f"datanode{index}" not in self._servers:
                self.start_datanode(index, wait=False)
        self.wait_until_ready()

    def admin(self, *arguments: str) -> str:
        """What `hdfs dfsadmin ARGUMENTS` prints; `CalledProcessError` if it fails."""
        command = self._command("namenode", "org.apache.hadoop.hdfs.tools.DFSAdmin", *arguments)
        return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout

    def namenode_metrics(self, name: str) -> dict[str, Any]:
        """A JMX bean of the NameNode."""
        return _bean(self._http_port, f"Hadoop:service=NameNode,name={name}")

    def n_syncs(self) -> int:
        """How often the DataNodes have synced a file since they started. Takes seconds."""
        time.sleep(METRICS_AGE_S)
        return sum(metrics["FsyncCount"] for metrics in self.datanode_metrics())

    def datanode_metrics(self) -> list[dict[str, Any]]:
        """The activity beans of the live DataNodes."""
        return [
            _bean(port, "Hadoop:service=DataNode,name=DataNodeActivity*")
            for port in self._datanode_http_ports()
        ]

    def wait_until_ready(self) -> None:
        """Until the NameNode has left safe mode and knows every running DataNode as live."""
        running = sum(name.startswith("datanode") for name in self._servers)
        deadline = time.monotonic() + LONGEST_START_S
        while not self._is_ready(running):
            for name, server in self._servers.items():
                if server.poll() is not None:
                    raise RuntimeError(f"{name} ended by itself:\n{self._log(name)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"HDFS is not ready:\n{self._log('namenode')}")
            time.sleep(0.1)

    def _is_ready(self, datanodes: int) -> bool:
        try:
            in_safe_mode = self.namenode_metrics("NameNodeInfo")["Safemode"]
            # One that died is among the live for a while; it answers nothing.
            return not in_safe_mode and len(self.datanode_metrics()) >= datanodes
        except (OSError, IndexError):
            return False

    def _datanode_http_ports(self) -> list[int]:
        live = json.loads(self.namenode_metrics("NameNodeInfo")["LiveNodes"])
        return [int(node["infoAddr"].rpartition(":")[2]) for node in live.values()]

    def _configure(self, name: str, settings: Mapping[str, str]) -> None:
        configuration = self._directory / "conf" / name
        configuration.mkdir(parents=True)
        (configuration / "log4j.properties").write_text(LOG_PROPERTIES)
        (configuration / "hadoop-metrics2.properties").write_text("*.period=1\n")
        _write_site(
            configuration / "core-site.xml",
            {
                "fs.defaultFS": self.rpc_url,
                "hadoop.tmp.dir": str(self._directory / name),
                "hadoop.http.staticuser.user": getpass.getuser(),
            },
        )
        _write_site(
            configuration / "hdfs-site.xml",
            {
                "dfs.replication": str(min(self._n_datanodes, 3)),
                "dfs.namenode.rpc-address": f"127.0.0.1:{self._rpc_port}",
                "dfs.namenode.http-address": f"127.0.0.1:{self._http_port}",
                "dfs.namenode.datanode.registration.ip-hostname-check": "false",
                "dfs.namenode.safemode.extension": "0",
                "dfs.datanode.address": "127.0.0.1:0",
                "dfs.datanode.http.address": "127.0.0.1:0",
                "dfs.datanode.ipc.address": "127.0.0.1:0",
                "dfs.datanode.hostname": "127.0.0.1",
                "dfs.heartbeat.interval": "1",  # and yet one that died is believed in for minutes
                **settings,
            },
        )

    def _command(self, name: str, main_class: str, *arguments: str) -> list[str]:
        return [
            "java",
            "-Xmx384m",
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            f"-Dhadoop.log.dir={self._directory / 'log'}",
            "--add-opens=java.base/java.lang=ALL-UNNAMED",
            "-cp",
            class_path(self._directory / "conf" / name),
            main_class,
            *arguments,
        ]

    def _start(self, name: str, main_class: str) -> None:
        log = self._directory / "log" / name
        self._servers[name] = self._starter.start(self._command(name, main_class), log)

    def _kill(self, name: str) -> None:
        server = self._servers.pop(name)
        server.kill()
        server.wait()

    def _log(self, name: str) -> str:
        return (self._directory / "log" / name).read_text(errors="replace")[-4000:]

    def __enter__(self) -> HdfsCluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def _write_site(path: Path, properties: Mapping[str, str]) -> None:
    lines = [
        f"<property><name>{name}</name><value>{value}</value></property>"
        for name, value in properties.items()
    ]
    path.write_text("\n".join(["<configuration>", *lines, "</configuration>"]))


def _bean(port: int, query: str) -> dict[str, Any]:
    with urlopen(f"http://127.0.0.1:{port}/jmx?qry={query}", timeout=10) as response:
        return json.load(response)["beans"][0]
