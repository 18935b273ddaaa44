"""The page of runs that are training: a small server on the loopback address, which writes the page anew when a run has written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from scripts.command import UsageError
from training.log import METRICS_FILE

ADDRESS = "127.0.0.1"


class Live:
    """The newest page of some places. `page` makes it; a browser asks for `stamp` and loads the page again if it has changed."""

    def __init__(self, places: Sequence[str], page: Callable[[], str]) -> None:
        self._places, self._page = places, page
        self._lock = Lock()
        self._made: tuple[str, bytes] | None = None

    def stamp(self) -> str:
        """Text that changes when a run writes or a new one begins."""
        total, newest, size = 0, 0, 0
        for place in self._places:
            for path in Path(place).rglob(METRICS_FILE):
                stat = path.stat()
                total, newest, size = total + 1, max(newest, stat.st_mtime_ns), size + stat.st_size
        return f"{total} {newest} {size}"

    def page(self) -> bytes:
        """The page as it is now, in UTF-8."""
        with self._lock:
            stamp = self.stamp()
            if self._made is None or self._made[0] != stamp:
                text = self._page().replace("<body ", f'<body data-stamp="{stamp}" ', 1)
                self._made = stamp, text.encode()
            return self._made[1]


class Handler(BaseHTTPRequestHandler):
    """Answers `/` with the page and `/stamp` with its stamp, for this machine only."""

    def __init__(self, live: Live, *arguments: object) -> None:
        self.live = live
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Answer one request."""
        # A foreign site could name this address by a domain of its own; its requests then carry that name.
        if (self.headers.get("Host") or "").rpartition(":")[0] not in (ADDRESS, "localhost"):
            return self._answer(403, "text/plain", b"ask for 127.0.0.1")
        try:
            if self.path == "/":
                return self._answer(200, "text/html", self.live.page())
            if self.path == "/stamp":
                return self._answer(200, "text/plain", self.live.stamp().encode())
        except (UsageError, OSError) as error:  # a run was moved, or its first record is being written
            return self._answer(503, "text/plain", str(error).encode())
        return self._answer(404, "text/plain", b"there is / only")

    def _answer(self, code: int, kind: str, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        if code == 503:
            self.send_header("Refresh", "5")  # seconds until the browser asks again
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing: a line for every request would hide the rest."""


def server(places: Sequence[str], page: Callable[[], str], port: int) -> ThreadingHTTPServer:
    """A server of the page on the loopback address, not yet started; port 0 is any free one.

    Raises:
        UsageError: the port is not free, or is none.
    """
    try:
        return ThreadingHTTPServer((ADDRESS, port), partial(Handler, Live(places, page)))
    except (OSError, OverflowError) as error:
        raise UsageError(f"port={port} cannot be used ({error}); name another, or port=0 for any") from error


def serve(places: Sequence[str], page: Callable[[], str], port: int) -> None:
    """Serve the page until interrupted."""
    with server(places, page, port) as running:
        print(f"http://{ADDRESS}:{running.server_address[1]}/  (Ctrl-C ends it)", flush=True)
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)
