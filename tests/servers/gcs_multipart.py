"""Uploads of metadata and content in one request, `multipart/related` (RFC 2387)."""

from __future__ import annotations

import re

from servers.gcs_errors import malformed


def parts_of(content_type: str, body: bytearray) -> tuple[bytearray, str, bytearray]:
    """The metadata (JSON), and the type and the bytes of the content.

    Lines of headers may end in a bare line feed, as Google admits.
    """
    boundary = re.fullmatch(r'multipart/related; *boundary="?([^"; ]{1,70})"?', content_type)
    if boundary is None:
        raise malformed(f"Content-Type {content_type[:80]!r} is no multipart/related")
    delimiter = re.escape(b"--" + boundary[1].encode())
    layout = re.compile(
        rb"(?:\r?\n)?%b\r?\n(?P<first>.*?)\r?\n\r?\n(?P<metadata>.*?)"
        rb"\r?\n%b\r?\n(?P<second>.*?)\r?\n\r?\n(?P<content>.*)\r?\n%b--(?:\r?\n)?"
        % (delimiter, delimiter, delimiter),
        re.DOTALL,
    )
    found = layout.fullmatch(body)
    if found is None:
        raise malformed("The body is not metadata and content between boundaries")
    if not _type(found["first"]).startswith("application/json"):
        raise malformed("The first part is no JSON")
    return bytearray(found["metadata"]), _type(found["second"]), bytearray(found["content"])


def _type(headers: bytes) -> str:
    found = re.search(rb"(?im)^content-type: *([^\r\n]+)", headers)
    return found[1].decode("ascii", "replace") if found else "application/octet-stream"
