"""What flow.js sends, sent without a browser: three chunks at a time, as forms."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import random
import socket
import ssl
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

KIB = 1024
MIB = 1024 * KIB
CHUNK_SIZE = 300 * KIB  # more than flowserver's buffer, so that one block is not a body
AT_ONCE = 3
BOUNDARY = "----flowserver"
PATIENCE = 60  # seconds


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def told(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self.body)
        return values


class Chunk(NamedTuple):
    """One chunk of a file, with the parameters that flow.js gives it."""

    name: str
    content: bytes
    number: int = 1
    size: int = CHUNK_SIZE
    identifier: str = ""

    @property
    def total(self) -> int:
        return max(len(self.content) // self.size, 1)

    @property
    def data(self) -> bytes:
        start = (self.number - 1) * self.size
        is_last = self.number == self.total
        return self.content[start:] if is_last else self.content[start:][: self.size]

    @property
    def parameters(self) -> dict[str, str]:
        values = {
            "ChunkNumber": self.number,
            "ChunkSize": self.size,
            "CurrentChunkSize": len(self.data),
            "TotalSize": len(self.content),
            "Identifier": self.identifier or f"{len(self.content)}-{self.name}",
            "Filename": self.name.rpartition("/")[2],
            "RelativePath": self.name,
            "TotalChunks": self.total,
        }
        return {f"flow{name}": str(value) for name, value in values.items()}

    @property
    def query(self) -> str:
        return urllib.parse.urlencode(self.parameters)


def chunks(name: str, content: bytes, size: int = CHUNK_SIZE) -> Iterator[Chunk]:
    first = Chunk(name, content, size=size)
    for number in range(1, first.total + 1):
        yield first._replace(number=number)


def form(chunk: Chunk, fields: Mapping[str, str]) -> bytes:
    """The chunk as multipart/form-data; `fields` are the page's own and come first."""
    lines = []
    for name, value in {**fields, **chunk.parameters}.items():
        lines += [f"--{BOUNDARY}", f'Content-Disposition: form-data; name="{name}"']
        lines += ["", value]
    lines += [
        f"--{BOUNDARY}",
        'Content-Disposition: form-data; name="file"; filename="blob"',
        "Content-Type: application/octet-stream",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + chunk.data + f"\r\n--{BOUNDARY}--\r\n".encode()


def connect_here(address: tuple[str, int], *rest: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", address[1]), *rest)


class Client:
    """A browser of few words; `address` is the local address that it comes from."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        address: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.url = urllib.parse.urlsplit(url)
        self.headers = dict(headers or {})
        self.address = address
        self.tls = tls

    def connect(self) -> http.client.HTTPConnection:
        """Whatever name is asked for, it is a port of this machine."""
        where: Any = {"timeout": PATIENCE, "source_address": (self.address, 0)}
        host, port = self.url.hostname or "", self.url.port
        if self.tls is None:
            return http.client.HTTPConnection("127.0.0.1", port, **where)
        connection = http.client.HTTPSConnection(host, port, context=self.tls, **where)
        connection._create_connection = connect_here  # type: ignore[attr-defined]
        return connection

    def ask(self, method: str, target: str = "", body: bytes | None = None) -> Answer:
        """`target` is a path or a query; without one it is the url's own path."""
        target = target if target.startswith("/") else self.url.path + target
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        headers = {"Content-Type": kind} if body is not None else {}
        connection = self.connect()
        try:
            connection.request(method, target, body, {**headers, **self.headers})
            answer = connection.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, names, answer.read())
        finally:
            connection.close()

    def send(self, chunk: Chunk, fields: Mapping[str, str] | None = None) -> Answer:
        return self.ask("POST", body=form(chunk, fields or {}))

    def test(self, chunk: Chunk) -> Answer:
        return self.ask("GET", "?" + chunk.query)

    def upload(
        self,
        name: str,
        content: bytes,
        fields: Mapping[str, str] | None = None,
        size: int = CHUNK_SIZE,
    ) -> dict[str, Any]:
        """Send a file as flow.js does; what the request that completed it was told.

        A request whose chunk is stored while another one finishes the file is told of
        the end, too: flow.js hands the answer that it gets last to the page.
        """
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
            sending = [
                threads.submit(self.send_if_missing, chunk, fields)
                for chunk in chunks(name, content, size)
            ]
        answers = [one.result() for one in sending]
        complete = [one.told for one in answers if one.told["status"] == "complete"]
        if not complete or any(told != complete[0] for told in complete):
            raise AssertionError(f"told of no end, or of several: {answers}")
        return complete[0]

    def send_if_missing(self, chunk: Chunk, fields: Mapping[str, str] | None) -> Answer:
        found = self.test(chunk)
        if found.status != 204:
            raise AssertionError(f"a new chunk is there already: {found}")
        answer = self.send(chunk, fields)
        if answer.status != 200:
            raise AssertionError(f"not stored: {answer}")
        return answer
