"""Upload servers as they are usually written, to see each attack succeed against them.

`PlainServer` is a BaseHTTPRequestHandler that trusts what it is sent; `HandMade` reads
requests from its socket by itself, with even fewer checks; `NaiveParser`, `naive_path`
and `naive_options` are the multipart parser and the path rule that go with them. They
are full of holes on purpose: nothing here may ever be used to receive a file.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import re
import socket
import socketserver
import ssl
import threading
import urllib.parse
from typing import Any, NamedTuple


class NaivePart(NamedTuple):
    name: str
    filename: str | None
    content_type: str
    body: bytes


def naive_options(value: str) -> tuple[str, dict[str, str]]:
    """Split a header like `form-data; name="a"`, with a pattern that backtracks."""
    word = value.split(";")[0].strip().lower()
    if not re.match(
        r"^([^;]*)((\s*;\s*[^=;]+\s*=\s*(\"[^\"]*\"|[^;]*)\s*)*)\s*$", value
    ):
        return word, {}
    options = {}
    for name, text in re.findall(r';\s*([^=;]+?)\s*=\s*("[^"]*"|[^;]*)', value):
        text = text.strip().strip('"')
        if "''" in text and name.endswith("*"):
            text = urllib.parse.unquote(text.split("''", 1)[1])
        options[name.lower().rstrip("*")] = text
    return word, options


class NaiveParser:
    """No limit, no strictness, no end; keeps all that may still become a boundary."""

    def __init__(self, boundary: bytes) -> None:
        self.boundary = boundary
        self.blocks: list[bytes] = []
        self.held = b""

    def feed(self, block: bytes) -> None:
        """Take a block; from its first line break or dash on it is looked at again.

        That is what Werkzeug did before CVE-2023-46136.
        """
        self.blocks.append(block)
        self.held += block
        begins = [self.held.find(byte) for byte in (b"\r", b"\n", b"-")]
        found = [begin for begin in begins if begin >= 0]
        if not found or self.boundary in self.held:
            self.held = b""
        else:
            self.held = self.held[min(found) :]

    def parts(self) -> list[NaivePart]:
        pieces = b"".join(self.blocks).split(b"--" + self.boundary)[1:]
        return [self._part(piece) for piece in pieces if not piece.startswith(b"--")]

    def _part(self, piece: bytes) -> NaivePart:
        head, _, body = piece.lstrip(b"\r\n").replace(b"\r\n", b"\n").partition(b"\n\n")
        headers = {}
        for line in head.decode("utf-8", "replace").split("\n"):
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        _, options = naive_options(headers.get("content-disposition", ""))
        kind = headers.get("content-type", "")
        body = body[:-1] if body.endswith(b"\n") else body
        return NaivePart(options.get("name", ""), options.get("filename"), kind, body)


def naive_path(folder: str, path: str) -> str:
    return os.path.join(folder, path)


class _PlainHandler(http.server.BaseHTTPRequestHandler):
    """What a weekend's work gives: it takes files, and whatever else it is sent."""

    protocol_version = "HTTP/1.1"
    server: PlainServer

    def log_message(self, format: str, *arguments: Any) -> None:
        path = urllib.parse.unquote(self.path) if hasattr(self, "path") else ""
        client = self.headers.get("X-Forwarded-For") if hasattr(self, "headers") else ""
        self.server.log.append(f"{client or self.client_address[0]} {path}")

    def answer(self, status: int, **values: Any) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        origin = self.headers.get("Origin")
        if origin:
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Access-Control-Allow-Credentials", "true")
        if status == 401:
            self.send_header("WWW-Authenticate", "Basic")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def refusal(self) -> tuple[int, str]:
        users = self.server.users
        if users:
            header = self.headers.get("Authorization", "")
            if not header:
                return 401, "no login"
            name, password = base64.b64decode(header[6:]).decode().split(":")
            if name not in users:
                return 401, f"there is no user {name}"
            if users[name] != _slow_hash(password):
                return 401, "wrong password"
        limit = self.server.limit
        if limit and int(self.headers.get("Content-Length", 0)) > limit:
            return 413, "too large"
        return 0, ""

    def do_GET(self) -> None:
        status, sentence = self.refusal()
        if status:
            return self.answer(status, error=sentence)
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        name = query.get("flowRelativePath") or query.get("flowFilename", "")
        if name and os.path.exists(naive_path(self.server.upload_dir, name)):
            return self.answer(200, success=True, status="complete")
        return self.answer(200, ok=True)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        status, sentence = self.refusal()
        if status:
            return self.answer(status, error=sentence)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        query = urllib.parse.urlsplit(self.path).query.replace(";", "&")
        fields = dict(urllib.parse.parse_qsl(query, errors="replace"))
        kind = self.headers.get("Content-Type", "")
        if kind.startswith("multipart/"):
            boundary = kind.partition("boundary=")[2].strip('"').encode()
            parser = NaiveParser(boundary)
            parser.feed(body)
            body = b""
            for part in parser.parts():
                if part.filename is None:
                    fields[part.name] = part.body.decode("utf-8", "replace")
                else:
                    fields.setdefault("flowFilename", part.filename)
                    body = part.body
        name = fields.get("flowRelativePath") or fields.get("flowFilename", "unnamed")
        path = naive_path(self.server.upload_dir, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "ab") as file:
            file.write(body)
        self.answer(200, success=True, status="complete", path=name, filename=name)

    do_PUT = do_PATCH = do_POST

    def do_DELETE(self) -> None:
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        name = query.get("flowRelativePath") or query.get("flowFilename", "")
        os.remove(naive_path(self.server.upload_dir, name))
        self.answer(204)

    def do_OPTIONS(self) -> None:
        self.answer(200)


def _slow_hash(password: str) -> str:
    return hashlib.pbkdf2_hmac("sha256", password.encode(), b"salt", 20_000).hex()


class PlainServer(http.server.ThreadingHTTPServer):
    """`with PlainServer(folder) as server`: in a thread, on any free port."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self,
        upload_dir: str,
        limit: int = 0,
        users: dict[str, str] | None = None,
        tls: tuple[str, str] | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _PlainHandler)
        self.upload_dir = upload_dir
        self.limit = limit
        self.users = {name: _slow_hash(text) for name, text in (users or {}).items()}
        self.log: list[str] = []
        if tls:  # as the usual recipe has it: the handshake keeps all others waiting
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self.socket = context.wrap_socket(self.socket, server_side=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: the tests look at what the client sees."""

    def __enter__(self) -> PlainServer:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.socket.close()


class _HandMadeHandler(socketserver.BaseRequestHandler):
    """Splits at the empty line, takes each header at its word, answers 200."""

    request: socket.socket

    def handle(self) -> None:
        held = b""
        try:
            while True:
                while not re.search(rb"\r?\n\r?\n", held):
                    block = self.request.recv(65536)
                    if not block:
                        return
                    held += block
                head, held = re.split(rb"\r?\n\r?\n", held, maxsplit=1)
                found = re.search(rb"(?i)content-length[ \t]*:\s*(\d+)", head)
                held = held[int(found[1]) if found else 0 :]
                self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        except OSError:
            pass


class HandMade(socketserver.ThreadingTCPServer):
    """The same with a socket alone."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HandMadeHandler)

    def __enter__(self) -> HandMade:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.socket.close()
