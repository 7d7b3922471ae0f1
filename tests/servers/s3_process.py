"""The process of `servers.s3.S3Server`: moto's server, with one request at a time."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

_PARENT_CHECK_S = 0.2


class OneAtATime:
    """Reads the whole body of a request, then lets it in when no other is in.

    moto looks whether a key exists and writes it in two steps, so that several of concurrent
    `If-None-Match: *` may win (seen in 8 of 300 races of 8 writers, when threads were switched
    often), and fails to read what is overwritten meanwhile.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = threading.Lock()

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        if "HTTP_TRANSFER_ENCODING" in environ:
            start_response("411 Length Required", [("Content-Length", "0")])
            return []
        # If the client leaves before the end, moto misses the rest and refuses the request.
        environ["wsgi.input"] = io.BytesIO(
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        )
        with self._lock:
            answer = self._application(environ, start_response)
            try:
                return list(answer)
            finally:
                if hasattr(answer, "close"):
                    answer.close()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)


def main() -> None:
    """Serve on a free port, which is printed, until the parent (its id is given) is gone."""
    threading.Thread(target=_leave_with, args=(int(sys.argv[1]),), daemon=True).start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = OneAtATime(DomainDispatcherApplication(create_backend_app))
    server = make_server(
        "127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler
    )
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
