"""moto's S3 server, in a process of its own."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

_START_S = 60.0
_STOP_S = 10.0


class MissingServerError(Exception):
    """The software of a server is not installed."""


class S3Server:
    """moto's server (PyPI: moto[server]) for S3: not Amazon's, and it checks no signatures.

        with S3Server() as server:
            os.environ |= server.environment

    It ends with the block, or shortly after the process that started it has died.

    Attributes:
        url: where it listens, on 127.0.0.1.
        bucket: the name of a bucket that exists.
        region: of the bucket.
        page_size: the most keys on a page of a listing.
    """

    region = "us-east-1"

    def __init__(self, *, page_size: int = 1000) -> None:
        self.page_size = page_size
        self.url = ""
        self.bucket = ""
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if not all(importlib.util.find_spec(name) for name in ("moto", "flask")):
            raise MissingServerError("moto is missing: pip install 'moto[server]'")
        with tempfile.TemporaryFile("w+") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("s3_process.py")), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"MOTO_S3_DEFAULT_MAX_KEYS": str(self.page_size)},
                text=True,
            )
            assert self._process.stdout
            port = self._process.stdout.readline().strip()
            if not port:
                self._stop()
                log.seek(0)
                raise RuntimeError(f"moto's server did not start:\n{log.read()}")
        self.url = f"http://127.0.0.1:{port}"
        self.bucket = self.create_bucket()
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
        """Credentials; any would do."""
        return {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests"}

    def create_bucket(self) -> str:
        """Another, empty bucket; its name."""
        bucket = f"bucket-of-tests-{next(self._numbers)}"
        request = urllib.request.Request(f"{self.url}/{bucket}", method="PUT")
        with urllib.request.urlopen(request, timeout=_START_S):
            return bucket

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait(_STOP_S)
        assert self._process.stdout
        self._process.stdout.close()
