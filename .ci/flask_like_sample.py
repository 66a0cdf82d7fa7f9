"""An upload server that does what the usual Flask sample does, to see what that costs.

A chunk is a file in a temp folder; whoever sees the files of all chunks there puts them
together under the real name and removes them. There is no lock, a chunk counts as soon
as its file exists, and nothing is compared. Nobody may ever use this to receive a file.

    python flask_like_sample.py FOLDER      prints its port
"""

from __future__ import annotations

import http.server
import os
import sys
import urllib.parse
from pathlib import Path


class Sample(http.server.BaseHTTPRequestHandler):
    """GET asks for a chunk, POST stores one; the parameters are flow.js's."""

    protocol_version = "HTTP/1.1"
    folder = Path()

    def parameters(self) -> dict[str, str]:
        return dict(urllib.parse.parse_qsl(self.path.partition("?")[2]))

    def chunk_path(self, values: dict[str, str], number: int) -> Path:
        name = values["flowFilename"]
        return (
            self.folder / ".flowserver" / values["flowIdentifier"] / f"{name}_{number}"
        )

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        values = self.parameters()
        path = self.chunk_path(values, int(values["flowChunkNumber"]))
        self.answer(200 if path.is_file() else 204)

    def do_POST(self) -> None:
        values = self.parameters()
        path = self.chunk_path(values, int(values["flowChunkNumber"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            left = int(self.headers["Content-Length"])
            while left:
                block = self.rfile.read(min(left, 16384))
                if not block:
                    break
                file.write(block)
                left -= len(block)
        count = int(values["flowTotalChunks"])
        paths = [self.chunk_path(values, number) for number in range(1, count + 1)]
        if all(path.exists() for path in paths):
            target = self.folder / values["flowFilename"]
            with open(target, "ab") as whole:
                for path in paths:
                    with open(path, "rb") as part:
                        whole.write(part.read())
                    path.unlink()
            path.parent.rmdir()
        self.answer(200)

    def log_message(self, *arguments: object) -> None:
        pass


class SampleServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """A request that fails gets no answer; the sample would say 500."""


def serve(folder: str, port: int = -1) -> None:
    """Serve a folder for ever; tell the port to a descriptor, or print it."""
    Sample.folder = Path(folder)
    with SampleServer(("127.0.0.1", 0), Sample) as server:
        line = b"%d\n" % server.server_address[1]
        os.write(port if port >= 0 else sys.stdout.fileno(), line)
        server.serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1])
