"""URLs of runs on the servers of the tests."""

from __future__ import annotations

from servers.gcs import GcsServer
from servers.s3 import S3Server
from servers.seaweed import SeaweedServer


def s3_url(server: S3Server | SeaweedServer, prefix: str = "runs/a", **options: object) -> str:
    """`endpoint` may be given, for a proxy in front of the server."""
    options = {"endpoint": server.url, "region": server.region} | options
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return f"s3://{server.bucket}/{prefix}?{query}"


def gs_url(server: GcsServer, prefix: str = "runs/a", **options: object) -> str:
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return f"gs://{server.bucket}/{prefix}?{query}"


def address(url: str) -> tuple[str, int]:
    """Where a server listens."""
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)
