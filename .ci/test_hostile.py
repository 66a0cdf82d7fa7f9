"""Hostile input: the HTTP front, the parser, the names and the doors, attacked.

Each test is named after what it tries, and says whose hole it was. A class marked
`@seen_to_fail` has a twin in which every one of its tests runs against the servers of
naive_server.py and must fail there: a test that cannot fail proves nothing.

Of the checklist (its numbers), these lines have no test here:

| line | why not |
|---|---|
| 3.2 rolling to disk blocks others | CVE-2025-54121: nothing is rolled; bytes go to \
their place on the disk from the first one, in the thread of their own connection |
| 8 last-chunk rules, 9 later chunks | how clients count is the matter of the tests of \
the dialects and of the store; here is what a client could smuggle by it |
| 11 isolation by address | the store's own tests; `OwnerTest` has that by login |
| 16 modes of results | the umask is honoured: the store's own tests |
| 17 zip slip | no archive is ever unpacked |
| 21 secrets in query strings | there are none; the login is a header: `LogTest` |
| 22 rights at publication | every request carries its login, the last one too |
| 24 names escaped in the page | the page's own tests, in a browser |
| 25 many ranges | CVE-2025-62727: Range is not understood, nothing is handed out |
| 26 rate of warnings | one line per refused request, and the log file is rotated |
| 27 connections per address | behind a proxy many have one: the limit is for all |
| 28 hooks | on_complete is a Python function: no shell, no environment |
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import gc
import json
import logging
import os
import random
import re
import shutil
import socket
import socketserver
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import unittest
import urllib.parse
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple
from unittest import mock

import hostile_cases as cases
import naive_server as naive

HERE = Path(__file__).resolve().parent
SERVER = Path(os.environ.get("FLOWSERVER_FILE", HERE.parent / "flowserver.py"))
sys.path.insert(0, str(SERVER.parent))

import flowserver  # noqa: E402
from flowserver import FlowServer, Request, Settings, UploadApp  # noqa: E402

MIB = 1 << 20
SMUGGLED = b"GET /health?smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
HOST = b"Host: localhost\r\n"
folder: Path  # for everything that is made here
certificate: tuple[str, str]
tls_client: ssl.SSLContext
log_lines: list[str] = []


class _Recorder(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log_lines.append(self.format(record))


def setUpModule() -> None:
    global folder, certificate, tls_client
    folder = Path(tempfile.mkdtemp())
    unittest.addModuleCleanup(shutil.rmtree, folder, ignore_errors=True)
    certificate = make_certificate(folder)
    tls_client = ssl.create_default_context(cafile=certificate[0])
    log = logging.getLogger("flowserver")
    recorder = _Recorder()
    log.addHandler(recorder)
    unittest.addModuleCleanup(log.removeHandler, recorder)
    for attribute, value in (("propagate", False), ("level", logging.INFO)):
        patch = mock.patch.object(log, attribute, value)
        patch.start()
        unittest.addModuleCleanup(patch.stop)
    _allow_many_files()


def _allow_many_files() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096 <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))


def make_certificate(where: Path) -> tuple[str, str]:
    """Return the paths of a certificate for localhost and of its key."""
    chain, key = str(where / "certificate.pem"), str(where / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        + ["-keyout", key, "-out", chain],
        check=True,
        capture_output=True,
    )
    return chain, key


# ---- what an attacker needs


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self.body)
        return values


class Client:
    """A raw connection: bytes out, answers in; no wait is without an end."""

    def __init__(self, server: Any, tls: bool = False, wait: float = 20) -> None:
        address = server.server_address[:2]
        self.socket: socket.socket = socket.create_connection(address, timeout=wait)
        self.held = b""
        if tls:
            self.socket = tls_client.wrap_socket(
                self.socket, server_hostname="localhost"
            )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Write all; that the other side is gone shows when the answer is read."""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            self.socket.sendall(data)

    def receive(self) -> bool:
        """Take what comes; False at the end."""
        try:
            block = self.socket.recv(65536)
        except TimeoutError:
            raise AssertionError("the server says nothing and does not close") from None
        except (ConnectionError, ssl.SSLError):
            return False
        self.held += block
        return bool(block)

    def answer(self, method: str = "POST") -> Answer:
        """Return the next answer; AssertionError when the connection ends before it."""
        while b"\r\n\r\n" not in self.held:
            if not self.receive():
                raise AssertionError(f"closed without an answer, after {self.held!r}")
        head, _, self.held = self.held.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        status = int(lines[0].split()[1])
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        size = int(headers.get("content-length", 0))
        size = 0 if method == "HEAD" or status < 200 else size
        while len(self.held) < size:
            if not self.receive():
                raise AssertionError("closed in the middle of an answer")
        body, self.held = self.held[:size], self.held[size:]
        return Answer(status, headers, body)

    def rest(self) -> bytes:
        """Say that nothing follows; return all up to the server's end."""
        with contextlib.suppress(OSError):
            # Below TLS: SSLSocket.shutdown() would end the reading, too.
            socket.socket.shutdown(self.socket, socket.SHUT_WR)
        while self.receive():
            pass
        return self.held


def chunk_query(name: str, size: int = 5, **changes: object) -> str:
    """Return the parameters of a file in one chunk, as flow.js would send them."""
    values: dict[str, object] = {
        "flowChunkNumber": 1,
        "flowChunkSize": max(size, 1),
        "flowCurrentChunkSize": size,
        "flowTotalSize": size,
        "flowIdentifier": f"{size}-{name}"[:100],
        "flowFilename": name.rpartition("/")[2] or name,
        "flowRelativePath": name,
        "flowTotalChunks": 1,
    }
    values.update(changes)
    return urllib.parse.urlencode({k: v for k, v in values.items() if v is not None})


def resumable_query(name: str, size: int = 5, **changes: object) -> str:
    query = chunk_query(name, size).replace("flow", "resumable")
    return query + "".join(f"&{key}={value}" for key, value in changes.items())


def request(
    method: str, target: str, *lines: str, body: bytes = b"", host: str = "localhost"
) -> bytes:
    """Return the bytes of a request; Content-Length is added when there is a body."""
    head = [f"{method} {target} HTTP/1.1", f"Host: {host}", *lines]
    if body or method in ("POST", "PUT", "PATCH"):
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


def post(name: str, body: bytes = b"hello", *lines: str, **changes: object) -> bytes:
    """Return the request that uploads a file in one chunk."""
    query = chunk_query(name, len(body), **changes)
    return request("POST", f"/upload?{query}", *lines, body=body)


def post_form(fields: dict[str, str], body: bytes = b"hello") -> bytes:
    """Return the same as a form."""
    parts = [
        cases.part(b'form-data; name="%b"' % k.encode(), v.encode())
        for k, v in fields.items()
    ]
    parts.append(cases.part(b'form-data; name="file"; filename="blob"', body))
    data = cases.form(*parts)
    return request(
        "POST",
        "/upload",
        "Content-Type: multipart/form-data; boundary=boundary",
        body=data,
    )


def stored(upload_dir: Path | str) -> dict[str, bytes]:
    """Return the finished files below a folder, by path."""
    root = Path(upload_dir)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".flowserver" not in path.relative_to(root).parts
    }


def left_over(upload_dir: Path | str) -> list[str]:
    """Return what there is of unfinished bodies."""
    root = Path(upload_dir) / ".flowserver"
    return [p.name for p in root.rglob("*") if p.suffix in (".data", ".part")]


class Attack(unittest.TestCase):
    """The base of all: a server for the class, and a vocabulary."""

    settings: dict[str, object] = {}
    tls = False
    wait = 20.0  # the longest that an attacker waits for an answer, in seconds
    upload_dir: Path
    server: Any

    @classmethod
    def setUpClass(cls) -> None:
        cls.upload_dir = Path(tempfile.mkdtemp(dir=folder))
        cls.server = cls.enterClassContext(cls.serve(cls.upload_dir, **cls.settings))

    @classmethod
    def serve(cls, upload_dir: Path, **settings: object) -> FlowServer:
        values: dict[str, object] = {"port": 0, "upload_dir": upload_dir}
        values.update(sync=False, min_free_space=0)
        if cls.tls:
            values.update(certificate=certificate[0], private_key=certificate[1])
        values.update(settings)
        server = FlowServer(UploadApp(Settings(**values)))
        # It ends when it looks whether it should: here more often than twice a second.
        server.serve_forever = functools.partial(server.serve_forever, 0.02)
        return server

    def setUp(self) -> None:
        """Begin when the connections of the test before have ended."""
        if isinstance(self.server, FlowServer):
            self.wait_until(lambda server: not server._connections)

    def wait_until(
        self, condition: Callable[[FlowServer], object], server: Any = None
    ) -> None:
        """Wait until our server is so far; one that we can't ask gets a moment."""
        server = server or self.server
        if not isinstance(server, FlowServer):
            return time.sleep(0.05)
        end = time.monotonic() + self.wait
        while not condition(server):
            self.assertLess(time.monotonic(), end, "the server does not come so far")
            time.sleep(0.005)

    def wait_until_idle(self, client: Client, server: Any = None) -> None:
        """Wait until the server waits for a head of this client, and of it last."""
        own = client.socket.getsockname()

        def is_last(server: FlowServer) -> bool:
            with server._lock:
                waiting = list(server._waiting.values())[-1:]
            with contextlib.suppress(OSError):  # it is closed just now
                return [one.getpeername() for one in waiting] == [own]
            return False

        self.wait_until(is_last, server)

    def serve_here(self, **settings: object) -> Any:
        """Return a server of this test alone, with settings of its own."""
        self.upload_dir = Path(tempfile.mkdtemp(dir=folder))
        return self.enterContext(self.serve(self.upload_dir, **settings))

    def client(self, server: Any = None) -> Client:
        client = Client(server or self.server, self.tls, self.wait)
        self.addCleanup(client.close)
        return client

    def ask(self, data: bytes, server: Any = None) -> Answer:
        """Send one request on a connection of its own, return the answer."""
        with Client(server or self.server, self.tls, self.wait) as client:
            client.send(data)
            return client.answer(data.split(b" ")[0].decode("latin-1"))

    def only_answer(self, data: bytes) -> Answer:
        """Return the answer, proven to be the only one and the last word."""
        with Client(self.server, self.tls, self.wait) as client:
            client.send(data)
            answer = client.answer(data.split(b" ")[0].decode("latin-1"))
            self.assertEqual(client.rest(), b"", "more than one answer")
            return answer

    def assert_stored(self, answer: Answer) -> None:
        self.assertEqual(answer.status, 200, answer.body)
        self.assertEqual(answer.json["status"], "complete", answer.body)

    def assert_refused(self, answer: Answer, *statuses: int) -> None:
        self.assertIn(answer.status, statuses or range(400, 500), answer.body)
        self.assertIn("error", answer.json)


def seen_to_fail(attack: type[Attack]) -> type[Attack]:
    """Make the twin of a class, in which every test must fail on a naive server."""
    members: dict[str, Any] = {
        name: _must_fail(getattr(attack, name))
        for name in dir(attack)
        if name.startswith("test_")
    }

    def set_up(cls: type[Attack]) -> None:
        cls.upload_dir = Path(tempfile.mkdtemp(dir=folder)) / "uploads"
        cls.upload_dir.mkdir()
        cls.server = cls.enterClassContext(cls.serve(cls.upload_dir, **cls.settings))
        cls.hand_made = cls.enterClassContext(naive.HandMade())  # type: ignore

    def serve(cls: type[Attack], upload_dir: Path, **settings: Any) -> Any:
        limits = [settings.get(k) for k in ("max_chunk_size", "max_file_size")]
        limit = min(filter(None, limits), default=0)
        tls = certificate if cls.tls else None
        return naive.PlainServer(
            str(upload_dir),
            limit,
            {"ann": "secret"} if "users_file" in settings else None,
            tls,
        )

    members["setUpClass"] = classmethod(set_up)
    members["serve"] = classmethod(serve)
    members["wait"] = 1.0
    name = attack.__name__ + "Twin"
    twin = type(name, (attack,), {**members, "__module__": attack.__module__})
    sys.modules[attack.__module__].__dict__[name] = twin
    return attack


def _must_fail(test: Callable[[Any], None]) -> Callable[[Any], None]:
    """Against the plain server, or if that one does it right, the hand-made one."""

    @functools.wraps(test)
    def twin(self: Any) -> None:
        for server in (self.server, self.hand_made):
            self.server = server
            try:
                test(self)
            except (AssertionError, json.JSONDecodeError):
                return
        self.fail("the naive servers pass this test, too")

    return twin


# ---- framing: one request is one request


def _a_bad_head(head: cases.Head) -> Callable[[Any], None]:
    def test(self: Attack) -> None:
        answer = self.only_answer(head.head + SMUGGLED)
        self.assert_refused(answer, *head.statuses)
        self.assertEqual(answer.headers.get("connection"), "close")

    test.__doc__ = head.source
    return test


def _an_early_end(beginning: bytes) -> Callable[[Any], None]:
    def test(self: Attack) -> None:
        client = self.client()
        client.send(beginning)
        self.assert_refused(client.answer(), 400)

    return test


class _Framing(Attack):
    """The cases of hostile_cases, each followed by a request that must not run."""


for _head in cases.HEADS:
    setattr(_Framing, f"test_refused_{_head.name}", _a_bad_head(_head))


@seen_to_fail
class FramingTest(_Framing):
    """cpython#150499, and everything that two readers could understand differently."""


class FramingInTlsTest(_Framing):
    tls = True


del _Framing


class _Early(Attack):
    pass


for _name, _bytes in cases.EARLY.items():
    setattr(_Early, f"test_refused_at_once_{_name}", _an_early_end(_bytes))


@seen_to_fail
class EarlyTest(_Early):
    """What can't begin a request is not waited for (h11: early detection)."""


del _Early


class GoodHeadTest(Attack):
    """Strictness has an end: these are requests like any others."""

    def test_accepted(self) -> None:
        for name, head in cases.GOOD_HEADS.items():
            with self.subTest(name):
                self.assertEqual(self.ask(head).status, 200)

    def test_accepted_in_two_pieces_wherever_they_are_cut(self) -> None:
        head = cases.GOOD_HEADS["empty_lines_first"]
        for cut in range(1, len(head)):
            with Client(self.server) as client:
                client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
                client.send(head[:cut])
                time.sleep(0.005)  # so that it is two segments
                client.send(head[cut:])
                self.assertEqual(client.answer().status, 200, head[:cut])

    def test_requests_that_follow_each_other_are_answered_in_order(self) -> None:
        client = self.client()
        client.send(post("a.txt", b"aaaaa") + post("b.txt", b"bb") + SMUGGLED)
        self.assertEqual(client.answer().json["path"], "a.txt")
        self.assertEqual(client.answer().json["path"], "b.txt")
        self.assertTrue(client.answer().json["ok"])

    def test_an_empty_line_after_a_body_is_no_request(self) -> None:
        """RFC 9112 2.2: old browsers added one to a POST."""
        client = self.client()
        client.send(post("c.txt") + b"\r\n" + SMUGGLED)
        self.assert_stored(client.answer())
        self.assertEqual(client.answer().status, 200)

    def test_empty_lines_have_an_end(self) -> None:
        client = self.client()
        client.send(b"\r\n" * 100_000)
        with contextlib.suppress(AssertionError):  # a word of farewell is welcome
            self.assert_refused(client.answer(), 400, 431)
        self.assertEqual(client.rest(), b"")


@seen_to_fail
class SmuggleTest(Attack):
    """M5b: an unread body must never be run as the next request."""

    settings = {"max_chunk_size": MIB, "max_file_size": 10 * MIB, "sample_dir": ""}

    def refuse(self, data: bytes, *statuses: int) -> None:
        answer = self.only_answer(data)
        self.assertIn(answer.status, statuses)
        self.assertEqual(answer.headers.get("connection"), "close")

    def test_body_of_a_get(self) -> None:
        self.refuse(request("GET", "/health", body=SMUGGLED), 200)

    def test_body_of_a_head(self) -> None:
        self.refuse(request("HEAD", "/health", body=SMUGGLED), 200)

    def test_body_of_a_test_request(self) -> None:
        query = chunk_query("nothing.bin")
        self.refuse(request("GET", f"/upload?{query}", body=SMUGGLED), 204)

    def test_body_of_an_options(self) -> None:
        self.refuse(request("OPTIONS", "/upload", body=SMUGGLED), 200, 204)

    def test_body_of_a_delete(self) -> None:
        query = chunk_query("nothing.bin")
        self.refuse(request("DELETE", f"/upload?{query}", body=SMUGGLED), 204)

    def test_body_to_an_address_that_takes_none(self) -> None:
        self.refuse(request("POST", "/health", body=SMUGGLED), 405)

    def test_body_of_a_method_that_nobody_knows(self) -> None:
        self.refuse(request("BREW", "/upload", body=SMUGGLED), 405)

    def test_body_from_a_foreign_origin(self) -> None:
        origin = "Origin: http://evil.example"
        self.refuse(post("x", SMUGGLED, origin), 415)
        self.refuse(request("PUT", "/upload/x", origin, body=SMUGGLED), 403)

    def test_body_to_a_foreign_host(self) -> None:
        data = request("POST", "/upload", host="evil.example", body=SMUGGLED)
        self.refuse(data, 403)

    def test_body_that_is_too_large(self) -> None:
        data = request("POST", f"/upload?{chunk_query('x', 9 * MIB)}")
        head = data.replace(b"Content-Length: 0", b"Content-Length: %d" % (9 * MIB))
        self.refuse(head + SMUGGLED, 413)

    def test_body_of_a_file_that_is_too_large(self) -> None:
        query = chunk_query("x", 64, flowTotalSize=1 << 40, flowChunkSize=64)
        query = query.replace("flowTotalChunks=1", f"flowTotalChunks={1 << 34}")
        body = SMUGGLED + b" " * (64 - len(SMUGGLED))
        self.refuse(request("POST", f"/upload?{query}", body=body), 413)

    def test_body_without_parameters(self) -> None:
        self.refuse(request("POST", "/upload", body=SMUGGLED), 400, 415)

    def test_body_with_parameters_that_contradict(self) -> None:
        self.refuse(post("x", SMUGGLED, flowChunkNumber=7), 415)

    def test_form_without_boundary(self) -> None:
        kind = "Content-Type: multipart/form-data"
        self.refuse(request("POST", "/upload", kind, body=SMUGGLED), 400, 415)

    def test_form_that_breaks_in_the_middle(self) -> None:
        kind = "Content-Type: multipart/form-data; boundary=b"
        body = b"--b\r\nBad header\r\n\r\n" + b"x" * (9 * MIB // 8) + SMUGGLED
        self.refuse(request("POST", "/upload", kind, body=body), 400, 415)


class ExpectTest(Attack):
    """3.1.7: 100 Continue is a promise, given only after the head has been judged."""

    settings = {"max_chunk_size": MIB}
    line = "Expect: 100-continue"

    def first_word(self, data: bytes) -> int:
        return self.ask(data.partition(b"\r\n\r\n")[0] + b"\r\n\r\n").status

    def test_no_100_for_what_is_too_large(self) -> None:
        self.assertEqual(self.first_word(post("x", b"x" * 3 * MIB, self.line)), 413)

    def test_no_100_for_a_foreign_origin(self) -> None:
        lines = (self.line, "Origin: http://evil.example")
        self.assertEqual(self.first_word(post("x", b"x", *lines)), 415)
        data = request("PUT", "/upload/x", *lines, body=b"x")
        self.assertEqual(self.first_word(data), 403)

    def test_no_100_for_a_foreign_host(self) -> None:
        data = request("POST", "/upload", self.line, body=b"x", host="evil.example")
        self.assertEqual(self.first_word(data), 403)

    def test_no_100_for_a_transfer_encoding(self) -> None:
        data = request("GET", "/upload", self.line, "Transfer-Encoding: chunked")
        self.assertEqual(self.first_word(data), 411)

    def test_no_100_for_parameters_that_contradict(self) -> None:
        data = post("x", b"hello", self.line, flowChunkNumber=9)
        self.assertEqual(self.first_word(data), 415)

    def test_no_100_without_a_login(self) -> None:
        with users_file({"ann": "secret"}) as path:
            server = self.serve_here(users_file=path)
            head = post("x", b"hello", self.line)[:-5]
            self.assertEqual(self.ask(head, server).status, 401)

    def test_no_100_for_http_1_0(self) -> None:
        """RFC 9110 10.1.1, h11 test_has_100_continue."""
        data = post("old.txt", b"hello", self.line).replace(b"HTTP/1.1", b"HTTP/1.0")
        self.assert_stored(self.ask(data))

    def test_100_and_then_the_answer(self) -> None:
        head = post("new.txt", b"hello", self.line)[:-5]
        client = self.client()
        client.send(head)
        self.assertEqual(client.answer().status, 100)
        client.send(b"hello")
        self.assert_stored(client.answer())


# ---- refusals are seen


class _Refusals(Attack):
    """M6: a client that writes all of its body before it reads must see the answer."""

    settings = {"max_chunk_size": 64 * MIB, "max_file_size": 1000}
    body = bytes(20 * MIB)
    tries = 20

    def count_seen(self, data: bytes, status: int, pace: float = 0) -> int:
        """Return how many of 20 clients saw the status and its sentence."""
        at_once = self.tries if pace else 2
        with ThreadPoolExecutor(at_once) as pool:
            return sum(
                pool.map(lambda _: self.sees(data, status, pace), range(self.tries))
            )

    def sees(self, data: bytes, status: int, pace: float) -> bool:
        """Write everything, `pace` seconds for each eighth of a megabit, then read."""
        with Client(self.server, self.tls, self.wait) as client:
            step = 12_500 if pace else len(data)
            try:
                for low in range(0, len(data), step):
                    client.socket.sendall(data[low : low + step])
                    time.sleep(pace)
                answer = client.answer()
            except (AssertionError, OSError):
                return False
            return answer.status == status and len(answer.json["error"]) > 10

    def test_20_of_20_see_that_20_megabytes_are_too_large(self) -> None:
        data = post("big.bin", self.body)
        self.assertEqual(self.count_seen(data, 413), 20)

    def test_20_of_20_see_it_at_1_megabit_a_second(self) -> None:
        data = post("slow.bin", self.body[:300_000])
        self.assertEqual(self.count_seen(data, 413, 0.1), 20)

    def test_20_of_20_see_that_a_form_is_broken(self) -> None:
        kind = "Content-Type: multipart/form-data; boundary=b"
        body = b"--b\r\nBad header\r\n\r\n" + self.body
        data = request("POST", f"/upload?{chunk_query('x')}", kind, body=body)
        self.assertEqual(self.count_seen(data, 415), 20)

    def test_20_of_20_see_that_the_origin_is_foreign(self) -> None:
        data = post("big.bin", self.body, "Origin: http://evil.example")
        self.assertEqual(self.count_seen(data, 415), 20)

    def test_20_of_20_see_that_the_form_of_a_foreign_page_is_refused(self) -> None:
        """Its fields are read, since they say whose statuses count; its file is not."""
        fields = dict(urllib.parse.parse_qsl(chunk_query("x", len(self.body))))
        lines = HOST + b"Origin: http://evil.example\r\n"
        data = post_form(fields, self.body).replace(HOST, lines, 1)
        self.assertEqual(self.count_seen(data, 415), 20)


@seen_to_fail
class RefusalsTest(_Refusals):
    pass


@seen_to_fail
class RefusalsInTlsTest(_Refusals):
    tls = True


del _Refusals


@seen_to_fail
class BadHeadsAreToldTest(Attack):
    """The same for what is refused by its head alone."""

    def test_20_of_20_see_that_chunks_are_not_taken(self) -> None:
        data = request("PUT", "/upload", "Transfer-Encoding: chunked")
        data = data.replace(b"Content-Length: 0\r\n", b"")
        data += b"100000\r\n" + bytes(MIB) + b"\r\n0\r\n\r\n"
        for _ in range(20):
            self.assert_refused(self.ask(data), 411)

    def test_20_of_20_see_that_the_head_is_bad(self) -> None:
        data = request("POST", "/upload", "Content-Length: 7", body=bytes(20 * MIB))
        for _ in range(20):
            self.assert_refused(self.ask(data), 400)


class DrainTest(Attack):
    """A refused client is listened to for as long as that can help, and no longer."""

    settings = {"max_file_size": 1000, "max_connections": 3, "timeout": 2}

    def refused(self) -> Client:
        client = self.client()
        client.send(post("big.bin", bytes(10 * MIB))[:1000])
        self.assert_refused(client.answer(), 413)
        return client

    def test_a_refused_client_that_trickles_is_cut(self) -> None:
        client = self.refused()
        with self.assertRaises(OSError):
            for _ in range(300):
                client.socket.sendall(b"x")
                time.sleep(0.05)

    def test_a_refused_client_that_says_nothing_is_cut(self) -> None:
        client = self.refused()
        while client.receive():
            pass

    def test_drains_count_as_connections(self) -> None:
        clients = [self.refused() for _ in range(3)]
        with ThreadPoolExecutor(3) as pool:
            stop = threading.Event()
            for client in clients:
                pool.submit(self.keep_sending, client, stop)
            with self.assertRaises((AssertionError, OSError)):
                answer = self.ask(request("GET", "/health"))
                self.assertEqual(answer.status, 200)
            stop.set()

    def keep_sending(self, client: Client, stop: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.05):
                client.socket.sendall(bytes(8000))


# ---- slow ones, and many of them


@seen_to_fail
class SlowTest(Attack):
    """hermes-webui#194, copyparty --s-tbody: dead and slow clients hold threads."""

    settings = {"timeout": 1}

    def assert_cut(self, client: Client, drop: bytes = b"") -> None:
        """The server ends it, while one byte comes each 0.1 s, or nothing at all."""
        client.socket.settimeout(0.1 if drop else self.wait)
        for _ in range(int(self.wait / 0.1)):
            try:
                if drop:
                    client.socket.sendall(drop)
                if not client.socket.recv(65536):
                    return
            except TimeoutError:
                if not drop:
                    break
            except OSError:
                return
        self.fail("the connection lives on")

    def test_a_connection_that_says_nothing_is_cut(self) -> None:
        self.assert_cut(self.client())

    def test_half_a_head_is_cut(self) -> None:
        client = self.client()
        client.send(b"POST /upload HTTP/1.1\r\nHost: loc")
        self.assert_cut(client)

    def test_a_head_that_trickles_is_cut(self) -> None:
        client = self.client()
        client.send(b"GET /health HTTP/1.1\r\nX: ")
        self.assert_cut(client, b"x")

    def test_an_idle_connection_is_cut(self) -> None:
        client = self.client()
        client.send(request("GET", "/health"))
        self.assertEqual(client.answer().status, 200)
        self.assert_cut(client)

    def test_half_a_body_is_cut_and_leaves_nothing(self) -> None:
        client = self.client()
        client.send(post("half.bin", bytes(100_000))[:50_000])
        self.assert_cut(client)
        self.assertEqual(left_over(self.upload_dir), [])
        self.assertNotIn("half.bin", stored(self.upload_dir))

    def test_a_client_that_asks_and_never_reads_is_cut(self) -> None:
        """Of 1,000 pages it gets those that fit into the buffers."""
        before = set(threading.enumerate())
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(self.wait)
            client.connect(self.server.server_address[:2])
            client.sendall(request("GET", "/") * 1000)
            for _ in range(1000):  # a busy machine takes its time to begin the thread
                its_thread = set(threading.enumerate()) - before
                if its_thread:
                    break
                time.sleep(0.02)
            self.assertTrue(its_thread)
            for _ in range(int(self.wait / 0.2)):
                time.sleep(0.2)
                if not any(thread.is_alive() for thread in its_thread):
                    break
            answers, tail = 0, b""
            with contextlib.suppress(ConnectionError):
                while block := self.received(client):
                    answers += (tail + block).count(b"HTTP/1.1 200 OK")
                    tail = block[-14:]
        self.assertLess(answers, 1000)

    def received(self, client: socket.socket) -> bytes:
        try:
            return client.recv(65536)
        except TimeoutError:
            raise AssertionError("the connection lives on") from None

    def test_a_body_that_trickles_is_cut(self) -> None:
        client = self.client()
        client.send(post("drip.bin", bytes(100_000))[:500])
        self.assert_cut(client, b"x")
        self.assertEqual(left_over(self.upload_dir), [])


@seen_to_fail
class SlowHandshakeTest(Attack):
    """The handshake of TLS happens in the worker, and has an end."""

    tls = True
    settings = {"timeout": 2, "max_connections": 40}

    def silent(self, count: int) -> list[socket.socket]:
        silent = []
        for _ in range(count):
            address = self.server.server_address[:2]
            silent.append(socket.create_connection(address, timeout=self.wait))
            self.addCleanup(silent[-1].close)
        return silent

    def healthy(self) -> bool:
        try:
            return self.ask(request("GET", "/health")).status == 200
        except OSError:  # no handshake in time
            return False

    def test_silent_clients_keep_nobody_waiting(self) -> None:
        self.silent(30)
        self.assertTrue(self.healthy())

    def test_silent_clients_give_way_at_the_limit(self) -> None:
        self.silent(60)
        self.assertTrue(self.healthy())

    def test_a_silent_client_is_cut(self) -> None:
        (one,) = self.silent(1)
        try:
            self.assertEqual(one.recv(100), b"")
        except TimeoutError:
            self.fail("the connection lives on")

    def test_junk_for_a_handshake_is_cut(self) -> None:
        (one,) = self.silent(1)
        one.sendall(b"GET / HTTP/1.1\r\n\r\n")
        try:
            while one.recv(100):
                pass
        except TimeoutError:
            self.fail("the connection lives on")
        except OSError:
            pass
        self.assertTrue(self.healthy())


class TlsTest(Attack):
    tls = True

    def version(self, version: ssl.TLSVersion) -> str | None:
        """Return what the two agree on when the client knows this version alone."""
        context = ssl._create_unverified_context()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = version
        context.set_ciphers("ALL:@SECLEVEL=0")
        address = self.server.server_address[:2]
        with socket.create_connection(address, timeout=self.wait) as plain:
            with context.wrap_socket(plain) as client:
                return client.version()

    def test_old_versions_are_not_spoken(self) -> None:
        self.assertEqual(self.version(ssl.TLSVersion.TLSv1_2), "TLSv1.2")
        self.assertEqual(self.version(ssl.TLSVersion.TLSv1_3), "TLSv1.3")
        for old in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
            with self.assertRaises((ssl.SSLError, ConnectionError)):
                self.version(old)
        self.assertEqual(self.server.tls.minimum_version, ssl.TLSVersion.TLSv1_2)

    def test_a_file_arrives(self) -> None:
        self.assert_stored(self.ask(post("tls.txt", b"x" * MIB)))

    def test_half_of_a_certificate_is_no_certificate(self) -> None:
        """It must not mean that all goes on in the clear."""
        for number, flag in enumerate(("--certificate", "--private-key")):
            with self.subTest(flag), self.assertRaises(AssertionError):
                with run_server(
                    [sys.executable, str(SERVER)],
                    folder / "never",
                    flag,
                    certificate[number],
                ):
                    pass

    def test_descriptors_of_broken_handshakes_are_given_back(self) -> None:
        """Whatever breaks, its socket is closed by us and not by the collector."""
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        before = len(os.listdir("/proc/self/fd"))
        for junk in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x16\x03\x01\x00\xa5\x01",
            b"\0" * 99,
        ):
            for _ in range(10):
                address = self.server.server_address[:2]
                with socket.create_connection(address, timeout=self.wait) as plain:
                    plain.sendall(junk)
        for _ in range(10):
            self.ask(request("GET", "/health"))
            self.assert_refused(self.ask(b"JUNK\r\n\r\n"), 400)
        for _ in range(100):
            if len(os.listdir("/proc/self/fd")) <= before:
                return
            time.sleep(0.1)
        self.fail(f"{len(os.listdir('/proc/self/fd')) - before} descriptors are left")


class _Crowd(Attack):
    """At max_connections whoever has waited longest without a whole head gives way."""

    settings = {"max_connections": 6}

    def half_sent(self) -> Client:
        client = self.client()
        client.send(b"GET /health HTTP/1.1\r\n")
        self.wait_until_idle(client)
        if self.tls:
            time.sleep(0.05)  # it waits twice: for the handshake, then for a head
        return client

    def is_open(self, client: Client) -> bool:
        """Whether the server would still answer this half-sent request."""
        client.send(b"Host: localhost\r\n\r\n")
        try:
            return client.answer().status == 200
        except AssertionError:
            return False

    def test_the_oldest_half_sent_request_gives_way(self) -> None:
        half = [self.half_sent() for _ in range(6)]
        self.assertEqual(self.ask(request("GET", "/health")).status, 200)
        self.assertEqual([self.is_open(one) for one in half], [False] + [True] * 5)

    def test_an_idle_connection_gives_way(self) -> None:
        idle = self.client()
        idle.send(request("GET", "/health"))
        self.assertEqual(idle.answer().status, 200)
        self.wait_until_idle(idle)
        half = [self.half_sent() for _ in range(5)]
        self.assertEqual(self.ask(request("GET", "/health")).status, 200)
        self.assertFalse(idle.receive())
        self.assertEqual([self.is_open(one) for one in half], [True] * 5)

    def test_a_body_under_way_does_not_give_way(self) -> None:
        busy = self.client()
        data = post("busy.bin", bytes(100_000))
        busy.send(data[:5000])
        self.wait_until(lambda server: server._connections and not server._waiting)
        half = [self.half_sent() for _ in range(20)]
        busy.send(data[5000:])
        self.assert_stored(busy.answer())
        self.assertFalse(self.is_open(half[0]))


@seen_to_fail
class CrowdTest(_Crowd):
    pass


class CrowdInTlsTest(_Crowd):
    tls = True


del _Crowd


class LimitTest(Attack):
    settings = {"max_connections": 4}

    def test_connections_that_are_all_busy_are_not_exceeded(self) -> None:
        before = threading.active_count()
        data = post("busy.bin", bytes(100_000))
        busy = [self.client() for _ in range(4)]
        for client in busy:
            client.send(data[:5000])
        self.wait_until(lambda server: len(server._connections) == 4)
        self.wait_until(lambda server: not server._waiting)
        more = [self.client() for _ in range(20)]
        for client in more:
            client.send(data[:5000])
        self.assertTrue(all(one.rest() is not None for one in more))
        self.assertLessEqual(threading.active_count(), before + 4)
        for client in busy:
            client.send(data[5000:])
        self.assertIn(200, {client.answer().status for client in busy})

    def test_a_server_short_of_descriptors_goes_on(self) -> None:
        """The default limit of many systems is 1024; max_connections is 1000."""
        upload_dir = Path(tempfile.mkdtemp(dir=folder))
        command = f"ulimit -n 64; exec {sys.executable} {SERVER}"
        with run_server(["bash", "-c", f'{command} "$@"', "-"], upload_dir) as server:
            idle = [Client(server) for _ in range(100)]
            for client in idle:
                self.addCleanup(client.close)
                client.send(b"GET ")
            began = _cpu_seconds(server.process.pid)
            time.sleep(1)
            self.assertLess(_cpu_seconds(server.process.pid) - began, 0.5)
            self.assert_stored(self.ask(post("last.txt"), server))
        self.assertEqual(stored(upload_dir), {"last.txt": b"hello"})

    def test_without_a_descriptor_the_idlest_gives_way(self) -> None:
        """accept() fails again and again: somebody has to go, and time to pass."""
        server = self.serve_here()
        idle = self.client(server)
        idle.send(b"GET ")
        self.wait_until_idle(idle, server)
        calls, accept = [], socketserver.TCPServer.get_request

        def without(self: Any) -> Any:
            calls.append(time.monotonic())
            if len(calls) < 5:
                raise OSError(errno.EMFILE, "Too many open files")
            return accept(self)

        with mock.patch.object(socketserver.TCPServer, "get_request", without):
            self.assert_stored(self.ask(post("x"), server))
        self.assertFalse(idle.receive())
        self.assertGreater(calls[4] - calls[0], 0.05)


def _cpu_seconds(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


class LorisTest(Attack):
    def best_upload(self) -> float:
        """Return the least time of five, for 32 files one after the other."""
        times = []
        for _ in range(5):
            began = time.perf_counter()
            with Client(self.server) as client:
                for _ in range(32):
                    client.send(post(f"{random.random()}", bytes(MIB // 4)))
                    self.assert_stored(client.answer())
            times.append(time.perf_counter() - began)
        return min(times)

    def test_400_half_sent_requests_do_not_slow_an_upload(self) -> None:
        """Slow loris. Best of five, within twice; a busy machine gets three rounds."""
        half = [self.client() for _ in range(400)]
        for client in half:
            client.send(b"POST /upload HTTP/1.1\r\nHost: localhost\r\nX: ")
        ratios = []
        for _ in range(3):
            crowded = self.best_upload()
            for client in half:
                client.close()
            ratios.append(crowded / self.best_upload())
            if ratios[-1] < 2:
                return
            half = [self.client() for _ in range(400)]
            for client in half:
                client.send(b"POST /upload HTTP/1.1\r\nHost: localhost\r\nX: ")
        self.fail(f"with 400 half-sent requests it takes {ratios} times as long")


class RunningServer(NamedTuple):
    process: subprocess.Popen[str]
    server_address: tuple[str, int]


@contextlib.contextmanager
def run_server(command: list[str], upload_dir: Path, *flags: str) -> Iterator[Any]:
    """Run the server as a process of its own, and stop it."""
    arguments = ["--config", "", "--port", "0", "--upload-dir", str(upload_dir)]
    log = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(
        [*command, *arguments, "--sync", "off", "--min-free-space", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"https?://([^:/]+):(\d+)/", line)
        if not found:
            log.seek(0)
            raise AssertionError(f"it did not start: {line!r} {log.read()}")
        yield RunningServer(process, ("127.0.0.1", int(found[2])))
    finally:
        process.terminate()
        try:
            process.wait(15)
        finally:
            process.kill()
            process.stdout.close()
            log.close()


# ---- the parser


Parts = "list[tuple[str, str | None, bytes]]"


def parse_ours(boundary: bytes, blocks: Iterator[bytes] | list[bytes]) -> Any:
    """Return the parts, or None when the form was refused; anything else is raised."""
    parser = flowserver.MultipartParser(boundary)
    parts: list[Any] = []
    try:
        for block in blocks:
            for event in parser.feed(block):
                if isinstance(event, flowserver.Part):
                    parts.append([event.name, event.filename, b"", False])
                elif event is None:
                    parts[-1][3] = True
                else:
                    parts[-1][2] += bytes(event)
        parser.close()
    except flowserver.FlowError:
        return None
    assert all(part[3] for part in parts), "a part without an end"
    return [tuple(part[:3]) for part in parts]


def parse_naively(boundary: bytes, blocks: Iterator[bytes] | list[bytes]) -> Any:
    parser = naive.NaiveParser(boundary)
    for block in blocks:
        parser.feed(block)
    return [(p.name, p.filename, p.body) for p in parser.parts()]


def splits_of(body: bytes) -> Iterator[list[bytes]]:
    """Whole, a byte at a time, and in two at many places (h11's way to try a row)."""
    yield [body]
    yield [body[i : i + 1] for i in range(min(len(body), 12_000))] + [body[12_000:]]
    step = max(1, len(body) // 300)
    for cut in range(1, len(body), step):
        yield [body[:cut], body[cut:]]


def _a_body(body: cases.Body, parse: Callable[..., Any]) -> Callable[[Any], None]:
    def test(self: unittest.TestCase) -> None:
        for blocks in splits_of(body.body):
            self.assertEqual(parse(body.boundary, [b for b in blocks if b]), body.parts)

    test.__doc__ = body.source
    return test


class BodyTest(unittest.TestCase):
    """The cases of hostile_cases, at every split."""


class BodyOnNaiveTest(unittest.TestCase):
    """What must be refused is taken by a naive parser: so these rows can fail."""


def _is_taken(body: cases.Body) -> Callable[[Any], None]:
    def test(self: unittest.TestCase) -> None:
        self.assertIsNotNone(parse_naively(body.boundary, [body.body]))

    return test


for _body in cases.BODIES:
    _word = "taken" if _body.parts is not None else "refused"
    setattr(BodyTest, f"test_{_word}_{_body.name}", _a_body(_body, parse_ours))
    if _body.parts is None:
        setattr(BodyOnNaiveTest, f"test_taken_{_body.name}", _is_taken(_body))


class ParserTest(unittest.TestCase):
    def test_boundaries_that_are_not_legal_are_refused(self) -> None:
        """RFC 2046 5.1.1, CVE-2016-3092."""
        for name, value in cases.BAD_BOUNDARIES.items():
            with self.subTest(name), self.assertRaises(flowserver.FlowError):
                flowserver.boundary_of(value)

    def test_the_first_error_is_the_last_word(self) -> None:
        """CVE-2025-47287: Tornado warned, and went on."""
        parser = flowserver.MultipartParser(b"b")
        with self.assertRaises(flowserver.FlowError) as first:
            list(parser.feed(b"--b\r\nBad header\r\n\r\n"))
        good = cases.form(cases.part(b"form-data; name=a"), boundary=b"b")
        for again in (lambda: list(parser.feed(good)), parser.close):
            with self.assertRaises(flowserver.FlowError) as second:
                again()
            self.assertIs(second.exception, first.exception)

    def test_what_is_held_back_is_bounded(self) -> None:
        """CVE-2023-46136: nothing but the tail that may be a boundary is kept."""
        parser = flowserver.MultipartParser(b"b" * 70)
        head = cases.part(b"form-data; name=a", b"")
        self.assertEqual(len(list(parser.feed(b"--" + b"b" * 70 + b"\r\n" + head))), 1)
        taken = given = 0
        for fill in (b"\r" * 65536, b"\r\n" * 9999, b"\r\n--" + b"b" * 69, b"-" * 999):
            taken += len(fill)
            given += sum(map(len, filter(None, parser.feed(fill))))
            self.assertLess(taken - given, 75)
            self.assertLess(len(parser._held), 75)

    def test_after_the_end_nothing_is_a_part(self) -> None:
        parts = parse_ours(b"b", [cases.form(boundary=b"b"), b"\r\n--b\r\n"])
        self.assertEqual(parts, [])


class FormTest(Attack):
    """The limits of a form, through the front."""

    def setUp(self) -> None:
        super().setUp()
        for name in stored(self.upload_dir):  # what a test before should have refused
            (self.upload_dir / name).unlink()

    def send(self, *parts: bytes, then: bytes = b"") -> Answer:
        kind = "Content-Type: multipart/form-data; boundary=boundary"
        body = cases.form(*parts) + then
        return self.ask(request("POST", "/upload", kind, body=body))

    def refused(self, *parts: bytes, then: bytes = b"") -> None:
        self.assert_refused(self.send(*parts, then=then))
        self.assertEqual(stored(self.upload_dir), {})
        self.assertEqual(left_over(self.upload_dir), [])

    def fields(self, name: str = "x", size: int = 5) -> list[bytes]:
        pairs = urllib.parse.parse_qsl(chunk_query(name, size))
        return [
            cases.part(b"form-data; name=%b" % k.encode(), v.encode()) for k, v in pairs
        ]

    file = cases.part(b"form-data; name=file; filename=x", b"hello")

    def test_a_text_field_of_a_megabyte(self) -> None:
        """CVE-2024-47874 (Starlette)."""
        field = cases.part(b"form-data; name=a", bytes(MIB))
        self.refused(field, *self.fields(), self.file)

    def test_text_fields_of_a_megabyte_together(self) -> None:
        field = cases.part(b"form-data; name=a", bytes(10_000))
        self.refused(*[field] * 100, *self.fields(), self.file)

    def test_text_fields_of_100_000_bytes_together(self) -> None:
        """Less than what a form may have beside its file: it is the fields' limit."""
        field = cases.part(b"form-data; name=a", bytes(10_000))
        self.refused(*[field] * 10, *self.fields(), self.file)

    def test_a_megabyte_of_text_after_the_file(self) -> None:
        field = cases.part(b"form-data; name=a", bytes(MIB))
        self.refused(*self.fields(), self.file, field)

    def test_a_thousand_fields(self) -> None:
        """CVE-2023-25577 (Werkzeug), CVE-2023-30798, CVE-2026-31958, CVE-2023-0662."""
        fields = [cases.part(b"form-data; name=f%d" % n, b"") for n in range(1000)]
        self.refused(*fields, *self.fields(), self.file)

    def test_a_chunk_and_another_file(self) -> None:
        self.refused(*self.fields(), self.file, self.file)
        empty = cases.part(b"form-data; name=file; filename=y", b"")
        self.refused(*self.fields(), self.file, empty)
        self.refused(*self.fields(), empty, self.file)

    def test_no_file(self) -> None:
        self.refused(*self.fields())

    def test_a_file_before_its_parameters(self) -> None:
        """`curl -F file=@x -F flowIdentifier=...`: each chunk became a file."""
        self.refused(self.file, *self.fields())
        for query in map(cases.first_chunk, cases.CHUNKS):
            pairs = urllib.parse.parse_qsl(query)
            fields = [
                cases.part(b"form-data; name=%b" % name.encode(), value.encode())
                for name, value in pairs
            ]
            self.refused(self.file, *fields)
            self.refused(self.file, fields[1], self.file, *fields)

    def test_a_parameter_after_the_file(self) -> None:
        """Neither another value nor the first one: other readers would take it."""
        name = b"form-data; name=flowRelativePath"
        for late in (cases.part(name, b"other"), cases.part(name, b"x")):
            fields = [part for part in self.fields() if b"RelativePath" not in part]
            self.refused(*fields, self.file, late)
        self.refused(*self.fields(), self.file, cases.part(name, b"other"))

    def test_whole_files_have_the_same_limits(self) -> None:
        """Each file is stored, but not after fields that are wrong."""
        many = [cases.part(b"form-data; name=f%d" % n, b"") for n in range(1000)]
        long = cases.part(b"form-data; name=a", bytes(100_000))
        junk = cases.part(b"form-data; name=a", b"\xff")
        for fields in (many, [long], [junk]):
            self.refused(*fields, self.file)
        self.refused(cases.part(b"form-data; name=a", b"text"))
        self.refused()

    def test_a_whole_file_that_is_refused_does_not_cost_the_others(self) -> None:
        other = cases.part(b'form-data; name=g; filename="../y"', b"other")
        for parts in ((self.file, other), (other, self.file)):
            answer = self.send(*parts)
            self.assert_refused(answer, 400)
            told = [file.get("path", "refused") for file in answer.json["files"]]
            self.assertEqual(sorted(told), ["refused", "x"])
            self.assertEqual(stored(self.upload_dir), {"x": b"hello"})
            self.assertEqual(left_over(self.upload_dir), [])
            (self.upload_dir / "x").unlink()

    def test_a_form_that_breaks_after_a_whole_file_leaves_no_half_of_one(self) -> None:
        long = cases.part(b"form-data; name=a", bytes(100_000))
        bad = b"Bad header\r\n" + self.file
        for after, then in ((long, b""), (bad, b""), (self.file, b"x" * 20_000)):
            self.assert_refused(self.send(self.file, after, self.file, then=then))
            self.assertLessEqual(set(stored(self.upload_dir).values()), {b"hello"})
            self.assertEqual(left_over(self.upload_dir), [])

    def test_a_field_that_is_not_utf_8(self) -> None:
        self.refused(
            cases.part(b"form-data; name=a", b"\xff"), *self.fields(), self.file
        )

    def test_a_file_that_is_longer_than_it_says(self) -> None:
        self.refused(*self.fields(size=4), self.file)

    def test_a_file_that_is_shorter_than_it_says(self) -> None:
        self.refused(*self.fields(size=6), self.file)

    def test_a_boundary_inside_of_the_file(self) -> None:
        """Bytes that are announced are not searched: so many count, or none."""
        inside = b"hello\r\n--boundary\r\n"
        inside += cases.part(b"form-data; name=flowRelativePath", b"other")
        inside += b"\r\n--boundary\r\n"
        inside += cases.part(b"form-data; name=file; filename=other", b"hello")
        file = cases.part(b"form-data; name=file; filename=x", inside)
        for size in range(1, len(inside) + 40):
            if size != len(inside):
                self.refused(*self.fields(size=size), file)
        self.assert_stored(self.send(*self.fields(size=len(inside)), file))
        self.assertEqual(stored(self.upload_dir), {"x": inside})

    def test_a_megabyte_of_junk_after_the_end(self) -> None:
        """CVE-2024-53981, CVE-2026-40347: and one line in the log at most."""
        before = len(log_lines)
        self.refused(*self.fields(), self.file, then=b"x" * 200_000)
        time.sleep(0.1)
        self.assertLessEqual(len(log_lines) - before, 2)

    def test_a_body_that_ends_early_is_no_file(self) -> None:
        """M3: uploadserver kept 400 kB of a declared megabyte and said 204."""
        whole = post_form(dict(urllib.parse.parse_qsl(chunk_query("early.bin"))))
        for cut in (1, 3, 10, 15, 20):
            client = self.client()
            client.send(whole[:-cut])
            client.rest()
        self.assertEqual(stored(self.upload_dir), {})
        self.assertEqual(left_over(self.upload_dir), [])

    def test_the_name_of_the_part_never_reaches_the_disk(self) -> None:
        """CVE-2026-24486: os.path.join with an absolute name."""
        target = folder / "absolute.txt"
        name = f'form-data; name="file"; filename="{target}"'.encode()
        kind = "Content-Type: multipart/form-data; boundary=boundary"
        server = self.serve_here()
        body = cases.form(*self.fields(), cases.part(name, b"hello"))
        self.assert_stored(
            self.ask(request("POST", "/upload", kind, body=body), server)
        )
        self.assertFalse(target.exists())
        self.assertEqual(stored(self.upload_dir), {"x": b"hello"})


# ---- time grows with the size, and no faster


def best_of_five(call: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def _seconds(call: Callable[[Any], object], value: Any) -> float:
    """Return the least time of a call; what takes long is not repeated."""
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 0.003 and len(times) < 50):
        began = time.perf_counter()
        with contextlib.suppress(flowserver.FlowError):
            call(value)
        times.append(time.perf_counter() - began)
        if sum(times) > 0.5:
            break
    return min(times)


def growth(
    call: Callable[[Any], object], make: Callable[[int], Any], size: int
) -> float:
    """Return how much longer four times the size takes: 4 is linear, 16 is not.

    Five microseconds are added to both: what is over by then has no time to grow.
    """
    small, large = make(size), make(4 * size)
    return (_seconds(call, large) + 5e-6) / (_seconds(call, small) + 5e-6)


def _head_of(value: bytes) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: x\r\nX:" + value + b"\r\n\r\n"


def _parse_header(header: bytes) -> None:
    parser = flowserver.MultipartParser(b"b", max_header_size=1 << 20)
    list(parser.feed(b"--b\r\n" + header + b"\r\n\r\n"))


class LinearTest(unittest.TestCase):
    """CVE-2024-24762, CVE-2026-28356, CVE-2025-67726, CVE-2023-46136: no detours."""

    def assert_linear(
        self, call: Callable[[Any], object], make: Callable[[int], Any], size: int
    ) -> None:
        seen = []
        for _ in range(4):  # a busy machine gets another try, a bad pattern fails all
            seen.append(growth(call, make, size))
            if seen[-1] < 8:
                return
        self.fail(f"four times the size takes {seen} times as long")

    def test_the_measure_knows_a_pattern_that_backtracks(self) -> None:
        pattern = re.compile(r"[ \t]*([\t -~]*)\r\n")
        with self.assertRaises(AssertionError):
            self.assert_linear(pattern.match, lambda n: " " * n, 1000)

    def test_values_of_a_head(self) -> None:
        for name, value in {
            "blanks": b" ",
            "tabs": b"\t",
            "blanks and letters": b" x",
            "colons": b":",
            "latin-1": b"\xff",
        }.items():
            with self.subTest(name):
                for tail in (b"", b"\0"):
                    self.assert_linear(
                        flowserver.parse_head,
                        lambda n, v=value, t=tail: _head_of(v * n + t),  # type: ignore
                        4000,
                    )

    def test_lines_of_a_head(self) -> None:
        for name, line in {
            "one name": b"X: y\r\n",
            "empty values": b"X:\r\n",
            "junk": b"X\r\n",
        }.items():
            with self.subTest(name):
                self.assert_linear(
                    flowserver.parse_head,
                    lambda n, line=line: _head_of(b"\r\n" + line * n),  # type: ignore
                    1000,
                )

    def test_first_lines(self) -> None:
        for name, letter in {"letters": b"A", "blanks": b" ", "slashes": b"/"}.items():
            with self.subTest(name):
                self.assert_linear(
                    flowserver.parse_head,
                    lambda n, letter=letter: letter * n + b"\r\n\r\n",  # type: ignore
                    8000,
                )

    def test_headers_of_a_part(self) -> None:
        for name, value in {
            "blanks": b"X:%b\0",
            "semicolons": b"Content-Disposition: form-data%b",
            "quoted": b'Content-Disposition: form-data; name="%b',
            "names": b"Content-Disposition: form-data; %b",
            "before the colon": b"%b",
        }.items():
            for letters in (b" ", b"\t", b"a", b";", b'"', b'\\"', b"; ", b';a="\\"'):
                with self.subTest(name, letters=letters):
                    self.assert_linear(
                        _parse_header,
                        lambda n, v=value, x=letters: v % (x * n),  # type: ignore
                        1500,
                    )

    def test_content_types(self) -> None:
        for letters in (" ", ";", "; ", "a=", ';a="', '\\"', ";a=b", "\t;", "="):
            with self.subTest(letters):
                self.assert_linear(
                    flowserver.boundary_of,
                    lambda n, x=letters: "multipart/form-data" + x * n,  # type: ignore
                    4000,
                )

    def test_names_of_files(self) -> None:
        """Dots and blanks at the end, and marks that Unicode wants in order."""
        for letters in (
            ".",
            " ",
            ". ",
            ".x",
            "/",
            "a/",
            "\u0301\u0323",
            "_",
            "\\",
            "é",
        ):
            for tail in ("", "x"):
                with self.subTest(ascii(letters), tail=tail):
                    self.assert_linear(
                        flowserver.safe_path,
                        lambda n, x=letters, t=tail: x * n + t,  # type: ignore
                        4000,
                    )

    def test_addresses(self) -> None:
        for letters in ("&", "a&", "=", "%", "%41", "+", "a=b&", ";"):
            with self.subTest(letters):
                self.assert_linear(
                    flowserver.parse_query,
                    lambda n, x=letters: x * n,  # type: ignore
                    2000,
                )


class ThroughputTest(unittest.TestCase):
    """16 MiB of anything at most twice the time of plain bytes, best of five.

    Plain are letters that the boundary has: past all others bytes.find() may leap, so
    that random bytes cost less than looking at each of them once.
    """

    boundary = b"----WebKitFormBoundary7MA4YWxkTrZu0gW"

    def seconds(self, fill: bytes, parser_class: Any, size: int) -> float:
        data = (fill * (size // len(fill) + 1))[:size]
        head = b"--" + self.boundary + b"\r\n" + cases.part(b"form-data; name=a", b"")

        def parse() -> None:
            parser = parser_class(self.boundary)
            for block in (head, *(data[i : i + 65536] for i in range(0, size, 65536))):
                for _ in parser.feed(block) or ():
                    pass

        return best_of_five(parse)

    def slowest(self, parser_class: Any, size: int) -> float:
        plain = self.seconds(b"x", parser_class, size)
        return max(
            self.seconds(fill, parser_class, size) / plain
            for fill in (
                b"\r",
                b"\n",
                b"\r\n",
                b"-",
                b"--",
                b"\r\n--",
                b"\r\n--" + self.boundary[:-1],
                b"\r\n--" + self.boundary[:-1] + b"!",
                b"\r\n--" + self.boundary[1:],
                b"\r" + b"x" * 65535,
                self.boundary,
            )
        )

    def test_line_ends_dashes_and_near_boundaries(self) -> None:
        seen = []
        for _ in range(4):
            seen.append(self.slowest(flowserver.MultipartParser, 16 * MIB))
            if seen[-1] <= 2:
                return
        self.fail(f"the worst takes {seen} times as long as plain bytes")

    def test_a_naive_parser_takes_much_longer(self) -> None:
        self.assertGreater(self.slowest(naive.NaiveParser, MIB), 2)


# ---- parameters


# What each library takes as final; all else is sent again (PROTOCOLS 1 to 3).
PERMANENT = {
    "flow": (404, 413, 415, 500, 501),
    "resumable": (400, 404, 415, 500, 501),
}
NOT_NUMBERS = [
    *("+1", " 1", "1 ", "1_0", "-1", "-0", "0x1", "1.0", "1e0", "1,0", "0b1", "1\n"),
    *("\u0664", "\uff11", "\u00b2", "\u2460", "NaN", "null", "undefined", "[]", "'1'"),
    *("9" * 16, "9" * 400, "9" * 5000, "1" + "0" * 308, "\0" + "1", "1;2", "true"),
]
# Of these a header can hold; blanks round a value are none of it.
NO_LENGTHS = ["", "10, 10", *(n for n in NOT_NUMBERS if n == n.strip() and n < "\xff")]


@seen_to_fail
class ParameterTest(Attack):
    """SECURITY 3.3: a chunk is what its parameters say, or it is refused for good."""

    def assert_for_good(self, data: bytes, library: str = "flow") -> None:
        answer = self.ask(data)
        self.assert_refused(answer, *PERMANENT[library])
        self.assertEqual(stored(self.upload_dir), {})
        self.assertEqual(left_over(self.upload_dir), [])

    def refuse_values(self, parameter: str, *values: object) -> None:
        """Each value, in the address and in a form, of flow.js and of resumable.js."""
        for value in values:
            self.assert_for_good(post("x", b"hello", **{parameter: value}))
            query = chunk_query("x", **{parameter: value})
            fields = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
            self.assert_for_good(post_form(fields))
            query = query.replace("flow", "resumable")
            if parameter != "flowTotalChunks":  # resumable.js can't count (issue 567)
                data = request("POST", f"/upload?{query}", body=b"hello")
                self.assert_for_good(data, "resumable")

    def test_chunk_number_that_is_no_number(self) -> None:
        self.refuse_values("flowChunkNumber", *NOT_NUMBERS, "")

    def test_chunk_size_that_is_no_number(self) -> None:
        self.refuse_values("flowChunkSize", *NOT_NUMBERS, "")

    def test_length_that_is_no_number(self) -> None:
        self.refuse_values("flowCurrentChunkSize", *NOT_NUMBERS, "")

    def test_size_that_is_no_number(self) -> None:
        self.refuse_values("flowTotalSize", *NOT_NUMBERS, "")

    def test_count_that_is_no_number(self) -> None:
        self.refuse_values("flowTotalChunks", *NOT_NUMBERS)

    def test_numbers_out_of_bounds(self) -> None:
        self.refuse_values("flowChunkNumber", 0, 2, 3, 10**14)
        self.refuse_values("flowChunkSize", 0, 1, 2, 10**15)
        self.refuse_values("flowCurrentChunkSize", 0, 1, 4, 6, 10**14)
        self.refuse_values("flowTotalSize", 0, 1, 4)
        for size in (11, 10**14):  # resumable.js may begin a file of this size
            self.assert_for_good(post("x", b"hello", flowTotalSize=size))

    def test_a_count_that_only_a_loop_would_believe(self) -> None:
        """flow-php and the Node samples loop over what the client says."""
        self.refuse_values("flowTotalChunks", 0, 2, 10**12, 10**14)

    def test_parameters_that_are_missing(self) -> None:
        names = ["Identifier", "ChunkNumber", "ChunkSize", "CurrentChunkSize"]
        for name in [*names[1:], "TotalSize"]:
            self.refuse_values("flow" + name, None)
        self.refuse_values("flowIdentifier", "")
        for value in (None, ""):
            query = chunk_query("x", flowFilename=value, flowRelativePath=value)
            self.assert_for_good(request("POST", f"/upload?{query}", body=b"hello"))

    def test_a_parameter_given_twice(self) -> None:
        query = chunk_query("x")
        for name, value in urllib.parse.parse_qsl(query):
            for twice in (f"{query}&{name}={value}x", f"{name}=&{query}"):
                self.assert_for_good(request("POST", f"/upload?{twice}", body=b"hello"))

    def test_address_and_form_that_differ(self) -> None:
        """resumable.js sends both; a gateway may look at one of them only."""
        fields = dict(urllib.parse.parse_qsl(chunk_query("x")))
        form = post_form(fields)
        for name in fields:
            query = chunk_query("x", **{name: "1" if fields[name] != "1" else "2"})
            data = form.replace(b"/upload", b"/upload?" + query.encode(), 1)
            self.assert_for_good(data)

    def test_a_form_with_a_field_given_twice(self) -> None:
        fields = urllib.parse.parse_qsl(chunk_query("x"))
        for name, value in fields:
            parts = [
                cases.part(b"form-data; name=" + k.encode(), v.encode())
                for k, v in [*fields, (name, value + "0")]
            ]
            body = cases.form(*parts, FormTest.file)
            kind = "Content-Type: multipart/form-data; boundary=boundary"
            self.assert_for_good(request("POST", "/upload", kind, body=body))

    def test_a_semicolon_separates_nothing(self) -> None:
        """GHSA-6jv3-5f52-599m, GHSA-5rvq-cxj2-64vf."""
        query = chunk_query("x").replace("&", ";")
        data = request("POST", f"/upload?{query}", body=b"hello")
        self.assert_refused(self.ask(data))
        self.assertEqual(stored(self.upload_dir), {})

    def test_an_address_that_is_not_utf_8(self) -> None:
        for junk in ("%ff", "%c0%af", "%ed%a0%80", "%f8%88%80%80%80"):
            query = chunk_query("x").replace("=x", "=" + junk)
            self.assert_for_good(request("POST", f"/upload?{query}", body=b"hello"))

    def test_a_body_that_is_not_as_long_as_it_says(self) -> None:
        for size in (4, 6):
            query = chunk_query("x", size)
            self.assert_for_good(request("POST", f"/upload?{query}", body=b"hello"))


@seen_to_fail
class LibraryTest(Attack):
    """The first of two chunks in each library's words, with one thing wrong in it."""

    def requests_of(
        self, library: str, query: str, body: bytes = b"hello"
    ) -> Iterator[bytes]:
        """Yield a chunk as a form, and as a body alone where it has its own name."""
        fields = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        yield post_form(fields, body)
        if library != "Dropzone":
            yield request("POST", f"/upload?{query}", body=body)

    def refuse(self, library: str, *requests: bytes) -> None:
        for data in requests:
            answer = self.ask(data)
            statuses = PERMANENT.get(library, range(400, 416))
            self.assertIn(answer.status, statuses, (library, data, answer.body))
            self.assertRegex(answer.json["error"], r"^\S[^\n]{10,}\.$")
            self.assertEqual(stored(self.upload_dir), {}, (library, data))
            self.assertEqual(left_over(self.upload_dir), [], (library, data))

    def refuse_values(
        self, role: str, *values: object, but: tuple[str, ...] = ()
    ) -> None:
        for library in cases.CHUNKS.keys() - set(but):
            for value in values if role in cases.CHUNKS[library] else ():
                query = cases.first_chunk(library, **{role: str(value)})
                self.refuse(library, *self.requests_of(library, query))

    def test_numbers_that_are_none(self) -> None:
        for role in ("number", "nominal", "length", "total", "start"):
            self.refuse_values(role, *NOT_NUMBERS)
        self.refuse_values("count", *NOT_NUMBERS, but=("resumable",))

    def test_numbers_that_contradict(self) -> None:
        self.refuse_values("number", 3, 10**14)
        self.refuse_values("nominal", 0, 1, 2, 4, 6, 10**14)
        self.refuse_values("length", 0, 1, 4, 6, 10**14)
        self.refuse_values("total", 0, 1, 4)
        self.refuse_values("start", 1, 6, 10, 10**14)
        # Dropzone's size counts for nothing with 1 (a resized image).  Fine Uploader
        # does not say how long the other chunks are.
        self.refuse_values("count", 1, but=("resumable", "Dropzone"))
        self.refuse_values("count", 3, 10**14, but=("resumable", "Fine Uploader"))

    def test_bodies_of_other_lengths(self) -> None:
        for library in cases.CHUNKS.keys() - {"Plupload"}:  # does not say it
            for body in (b"", b"hell", b"hello!", b"hello" * 3):
                query = cases.first_chunk(library)
                self.refuse(library, *self.requests_of(library, query, body))

    def test_values_given_twice(self) -> None:
        for library, chunk in cases.CHUNKS.items():
            query = cases.first_chunk(library)
            for role, (name, value) in chunk.items():
                twice = (f"{query}&{name}={value}0", f"{name}=&{query}")
                for text in twice:
                    data = request("POST", f"/upload?{text}", body=b"hello")
                    self.refuse(library, data)
                other = cases.first_chunk(library, **{role: value + "0"})
                data = post_form(dict(urllib.parse.parse_qsl(query)))
                data = data.replace(b"/upload", b"/upload?" + other.encode(), 1)
                self.refuse(library, data)

    def test_values_that_are_missing(self) -> None:
        optional = {("Dropzone", "count"), ("Fine Uploader", "count")}
        optional |= {("resumable", "count"), ("flow", "count"), ("simple", "count")}
        optional |= {
            ("Plupload", "start"),
            ("Plupload", "total"),
        }  # marks, common words
        for library, chunk in cases.CHUNKS.items():
            for role in chunk:
                if role in ("path", "folder") or (library, role) in optional:
                    continue
                changes = {role: None, **({"path": None} if role == "name" else {})}
                query = cases.first_chunk(library, **changes)
                for data in self.requests_of(library, query):
                    # Without its marks nobody knows whose statuses count.
                    self.refuse("" if role == "identifier" else library, data)

    def test_names_that_lead_outside(self) -> None:
        for library, chunk in cases.CHUNKS.items():
            for path in ("../x", "a/../../x", "..\\x", "..", "/", "a/..", "x" * 5000):
                for role in {"path", "folder", "name"} & chunk.keys():
                    if role == "folder" and path == "/":
                        continue  # the upload folder itself
                    changes = {"path": None} if role == "name" else {}
                    changes = {**changes, role: path}
                    if "path" not in chunk:
                        changes.pop("path", None)
                    query = cases.first_chunk(library, **changes)
                    self.refuse(library, *self.requests_of(library, query))
        query = cases.first_chunk("Dropzone")
        data = next(self.requests_of("Dropzone", query))
        for name in (b"../x", b"..", b"/"):
            length = b"Content-Length: %d" % (len(data.partition(b"\r\n\r\n")[2]))
            other = data.replace(b'"blob"', b'"%b"' % name)
            size = len(other.partition(b"\r\n\r\n")[2])
            other = other.replace(length, b"Content-Length: %d" % size, 1)
            self.refuse("Dropzone", other)

    def test_content_ranges(self) -> None:
        for value in cases.BAD_RANGES:
            lines = (
                f"Content-Range: {value}",
                "Content-Disposition: attachment; filename=x",
            )
            self.refuse("", request("POST", "/upload", *lines, body=b"hello"))
        lines = ("Content-Range: bytes 0-4/10",) * 2
        self.refuse("", request("POST", "/upload", *lines, body=b"hello"))
        for name in ("../x", "..", "a/../../x", "..%2Fx"):
            lines = (
                "Content-Range: bytes 0-4/10",
                f"Content-Disposition: attachment; filename={name}".replace("/", "%2F"),
            )
            self.refuse("", request("POST", "/upload", *lines, body=b"hello"))


class LibraryGoesOnTest(Attack):
    """What LibraryTest changes one thing of is right: else its tests prove nothing."""

    def test_the_first_chunk_of_each_library_is_taken(self) -> None:
        for library in cases.CHUNKS:
            query = cases.first_chunk(library)
            fields = dict(urllib.parse.parse_qsl(query))
            requests = [post_form(fields)]
            if library != "Dropzone":
                requests.append(request("POST", f"/upload?{query}", body=b"hello"))
            for data in requests:
                answer = self.ask(data)
                self.assertEqual(answer.status, 200, (library, answer.body))
                self.assertEqual(answer.json["status"], "partial", library)
        lines = ("Content-Range: bytes 0-4/10", "Content-Disposition: a; filename=x")
        answer = self.ask(request("POST", "/upload", *lines, body=b"hello"))
        self.assertEqual(answer.json["status"], "partial")

    def test_two_libraries_in_one_request_are_not_mixed(self) -> None:
        """In the order of PROTOCOLS 11.1, wherever they stand."""
        queries = [
            cases.first_chunk(library).replace("=x", f"={number}")
            for number, library in enumerate(cases.CHUNKS)
            if library != "Dropzone"
        ]
        upload = "flowChunkSize=5&flowTotalSize=5&flowTotalChunks=1"
        first = queries[0].replace("flowTotalSize=10", "flowTotalSize=5")
        first = first.replace("flowTotalChunks=2", "flowTotalChunks=1")
        self.assertLess(
            set(upload.split("&")), set(first.split("&")), "a file in one chunk"
        )
        for query in ("&".join([first, *queries[1:]]), "&".join([*queries[1:], first])):
            answer = self.ask(request("POST", f"/upload?{query}", body=b"hello"))
            self.assert_stored(answer)
            self.assertEqual(answer.json["path"][0], "0")


class TusTest(Attack):
    """tus and FilePond: what their headers say is judged as parameters are."""

    settings = {"max_file_size": 1000}
    tus = "Tus-Resumable: 1.0.0"
    offsets = "Content-Type: application/offset+octet-stream"

    def begin(self, *lines: str, size: object = 10) -> Answer:
        length = f"Upload-Length: {size}"
        return self.ask(request("POST", "/upload", self.tus, length, *lines))

    def patch(self, where: str, offset: object, body: bytes, *lines: str) -> Answer:
        head = (self.tus, self.offsets, f"Upload-Offset: {offset}", *lines)
        return self.ask(request("PATCH", f"/{where}", *head, body=body))

    def named(self, text: str) -> str:
        return "Upload-Metadata: filename " + base64.b64encode(text.encode()).decode()

    def assert_nothing(self, answer: Answer, *statuses: int) -> None:
        self.assert_refused(answer, *statuses)
        self.assertEqual(stored(self.upload_dir), {})

    def test_lengths(self) -> None:
        for value in (*NO_LENGTHS, 1001, 10**14):
            self.assert_nothing(self.begin(self.named("x"), size=value))
        self.assertEqual(left_over(self.upload_dir), [])

    def test_names(self) -> None:
        for name in ("../x", "..", "a/../../x", "..\\x", "/"):
            self.assert_nothing(self.begin(self.named(name)))
        for line in (
            "Upload-Metadata: filename !!!",
            "Upload-Metadata: filename " + base64.b64encode(b"\xff").decode(),
            self.named("x") + ",filename eQ==",
        ):
            self.assert_nothing(self.begin(line))
        self.assertEqual(left_over(self.upload_dir), [])

    def test_offsets(self) -> None:
        answer = self.begin(self.named("x"))
        self.assertEqual(answer.status, 201)
        where = answer.headers["location"]
        for offset in (*NO_LENGTHS, 1, 5, 10, 11, 10**14):
            self.assert_nothing(self.patch(where, offset, b"hello"))
        self.assert_nothing(self.patch(where, 0, b"hello" * 3), 413)
        self.assert_nothing(
            self.patch(where, 0, b"hello", "Upload-Checksum: sha1 AAAA"), 460
        )
        self.assertEqual(self.patch(where, 0, b"hello").status, 204)
        for offset in (0, 4, 6):
            self.assert_nothing(self.patch(where, offset, b"hello"), 409)
        self.assertEqual(self.patch(where, 5, b"world").status, 204)
        self.assertEqual(stored(self.upload_dir), {"x": b"helloworld"})
        for method in ("DELETE", "PATCH"):
            data = request(method, f"/{where}", self.tus)
            self.assert_refused(self.ask(data))
        self.assertEqual(stored(self.upload_dir), {"x": b"helloworld"})
        (self.upload_dir / "x").unlink()

    def test_addresses(self) -> None:
        for path in (
            "../x",
            "..%2fx",
            "x",
            "0" * 32,
            "%00",
            ".flowserver/v2",
            "x" * 999,
        ):
            for method in ("HEAD", "PATCH", "DELETE"):
                data = request(
                    method,
                    f"/upload/{path}",
                    self.tus,
                    self.offsets,
                    "Upload-Offset: 0",
                )
                self.assertIn(self.ask(data).status, (400, 404, 410), (method, path))
        self.assertEqual(stored(self.upload_dir), {})

    def test_filepond(self) -> None:
        for value in (*NO_LENGTHS, 1001, 10**14):
            self.assert_nothing(self.begin_filepond(value))
        begun = self.begin_filepond(10)
        self.assertEqual(begun.status, 201)
        identifier = begun.body.decode()
        for offset, name, size, place in (
            ("0", "../x", 10, identifier),
            ("0", "", 10, identifier),
            ("0", "x", 11, identifier),
            ("0", "x", 10, identifier.replace("-10", "-1001")),
            ("0", "x", 10, identifier + "0" * 15),
            ("0", "x", 10, "../x"),
            ("1", "x", 10, identifier),
            ("-1", "x", 10, identifier),
            ("6", "x", 10, identifier),
            (str(10**14), "x", 10, identifier),
        ):
            self.assert_nothing(self.patch_filepond(offset, name, size, place))
        self.assertEqual(left_over(self.upload_dir), [])
        for number in range(2):
            answer = self.patch_filepond(f"{number * 5}", "x", 10, identifier)
            self.assertEqual(answer.status, 200, answer.body)
        data = request("DELETE", "/upload", "Content-Type: text/plain")
        data = data[:-2] + b"Content-Length: %d\r\n\r\n" % len(identifier)
        self.assert_refused(self.ask(data + identifier.encode()))
        self.assertEqual(stored(self.upload_dir), {"x": b"hellohello"})
        (self.upload_dir / "x").unlink()

    def begin_filepond(self, size: object) -> Answer:
        kind = "Content-Type: multipart/form-data; boundary=boundary"
        body = cases.form(cases.part(b"form-data; name=filepond", b"{}"))
        line = f"Upload-Length: {size}"
        return self.ask(request("POST", "/upload", kind, line, body=body))

    def patch_filepond(self, offset: str, name: str, size: int, place: str) -> Answer:
        return self.ask(
            request(
                "PATCH",
                f"/upload?patch={place}",
                f"Upload-Offset: {offset}",
                f"Upload-Length: {size}",
                f"Upload-Name: {name}",
                body=b"hello",
            )
        )


class PrefixTest(Attack):
    settings = {"parameter_prefix": "up"}

    def test_a_prefix_smuggles_no_second_value(self) -> None:
        """Parameters of two libraries: one of them counts, and it alone.

        Which one never depends on what they say, nor on where they stand.
        """
        good, other = chunk_query("a.txt"), chunk_query("../b.txt", 7)
        other = other.replace("flow", "up")
        for number, pairs in enumerate(
            (
                good + "&upRelativePath=b.txt",
                good + "&upIdentifier=b",
                "upRelativePath=b.txt&" + good,
                f"{good}&{other}",
                f"{other}&{good}",
            )
        ):
            query = pairs.replace("a.txt", f"{number}.txt")
            data = request("POST", f"/upload?{query}", body=b"hello")
            answer = self.ask(data)
            self.assert_stored(answer)
            self.assertEqual(answer.json["path"], f"{number}.txt")
        self.assertEqual(set(stored(self.upload_dir).values()), {b"hello"})
        self.assertEqual(len(stored(self.upload_dir)), 5)

    def test_what_has_the_prefix_is_judged_as_all_else(self) -> None:
        before = stored(self.upload_dir)
        good = chunk_query("c.txt").replace("flow", "up")
        for query in (
            good + "&upRelativePath=d",
            good + "&upChunkNumber=2",
            good.replace("c.txt", "../c.txt"),
            good.replace("upTotalSize=5", "upTotalSize=4"),
            good.replace("upTotalSize=5", "flowTotalSize=5"),
            good.replace("upIdentifier=", "flowChunkNumber="),
        ):
            data = request("POST", f"/upload?{query}", body=b"hello")
            self.assert_refused(self.ask(data))
        self.assertEqual(stored(self.upload_dir), before)
        self.assertEqual(left_over(self.upload_dir), [])
        data = request("POST", f"/upload?{good}", body=b"hello")
        self.assert_stored(self.ask(data))


# ---- names and paths


RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", "CLOCK$"}
RESERVED |= {
    f"{name}{n}" for name in ("COM", "LPT") for n in "0123456789\u00b9\u00b2\u00b3"
}


def unsafe(path: str) -> str:
    """Say what is wrong with a path on some system, by rules of our own; or ""."""
    words = path.split("/")
    if len(words) > 64 or len(path.encode()) > 3000:
        return "too long"
    return next(filter(None, map(_unsafe_word, words)), "")


def _unsafe_word(word: str) -> str:
    if not word or len(word.encode()) > 255:
        return "empty or too long"
    if word[0] == " " or word[-1] in " .":
        return "Windows leaves blanks and dots out"
    if any(unicodedata.category(c) == "Cc" or c in '<>:"|?*\\/' for c in word):
        return "a character that is special somewhere"
    if any(unicodedata.bidirectional(c) in _TURNS for c in word):
        return "text that turns round"
    if word.split(".")[0].rstrip(" ").upper() in RESERVED:
        return "a device"
    if unicodedata.normalize("NFC", word) != word:
        return "two spellings of one name"
    seen = "".join(c for c in word if unicodedata.category(c) != "Cf").casefold()
    if seen == ".flowserver" or re.fullmatch(r"flowse~\d+(\..*)?", seen):
        return "our own folder"
    return ""


_TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


@seen_to_fail
class PathTest(Attack):
    """SECURITY 3.4, rows 9, 21 and 22 of NEEDS: a name gets nowhere else."""

    @classmethod
    def serve(cls, upload_dir: Path, **settings: object) -> Any:
        box = upload_dir / "box" / "uploads"
        box.mkdir(parents=True)
        (upload_dir / "box" / "secret.txt").write_text("secret")
        cls.upload_dir = box
        return super().serve(box, **settings)

    def complaints(self, names: list[str], replies: Iterator[Answer]) -> list[str]:
        """Return what is wrong: a name that is unsafe, or a file that is elsewhere."""
        wrong = []
        for number, (name, answer) in enumerate(zip(names, replies, strict=True)):
            if answer.status in (400, 413, 415):
                continue
            path = answer.json.get("path", "")
            file = self.upload_dir / path
            if answer.status != 200 or unsafe(path):
                wrong.append(f"{name[:50]!a} {answer.status} {unsafe(path)}")
            elif not file.resolve().is_relative_to(self.upload_dir.resolve()):
                wrong.append(f"{name[:50]!a} went to {path[:50]!a}")
            elif not file.is_file() or file.read_bytes() != b"%d" % number:
                wrong.append(f"{name[:50]!a} is not at {path[:50]!a}")
            elif answer.json["filename"] != path.rpartition("/")[2]:
                wrong.append(f"{name[:50]!a} is not called {path[:50]!a}")
        return wrong

    def upload_all(self, names: list[str]) -> Iterator[Answer]:
        client = self.client()
        for number, name in enumerate(names):
            body = b"%d" % number
            query = chunk_query(name[-100:], len(body))
            fields = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
            fields.update(flowRelativePath=name, flowFilename=name)
            client.send(post_form(fields, body))
            answer = client.answer()
            yield answer
            if answer.headers.get("connection") == "close":
                client = self.client()

    def assert_nothing_outside(self) -> None:
        outside = [
            str(p)
            for p in self.upload_dir.parent.parent.rglob("*")
            if not p.is_relative_to(self.upload_dir)
        ]
        box = self.upload_dir.parent
        known = [box, self.upload_dir, box / "secret.txt"]
        self.assertLessEqual(set(outside), set(map(str, known)))
        self.assertEqual((box / "secret.txt").read_text(), "secret")

    def test_names_of_the_table(self) -> None:
        answers = self.upload_all(cases.NAMES)
        self.assertEqual(self.complaints(cases.NAMES, answers), [])
        self.assert_nothing_outside()

    def test_names_made_of_bad_pieces(self) -> None:
        """A property, over 1,000 names: refused, or stored safely where it says."""
        dice = random.Random(4)
        pieces = [
            "..",
            ".",
            "/",
            "\\",
            "C:",
            "nul",
            "COM1",
            " ",
            "a",
            "\u202e",
            "\0",
            "~",
        ]
        pieces += [
            ".flowserver",
            "v2",
            "\u0301",
            "\u200c",
            "x" * 250,
            "é" * 99,
            ".txt",
            "//",
        ]
        names = [
            "".join(dice.choices(pieces, k=dice.randint(1, 9))) for _ in range(1000)
        ]
        self.assertEqual(self.complaints(names, self.upload_all(names)), [])
        self.assert_nothing_outside()

    def test_a_test_request_is_no_oracle(self) -> None:
        """discourse#42098: 200 for what exists outside, 404 for what does not."""
        answers = set()
        for name in ("../secret.txt", "../missing.txt", "../../box/secret.txt"):
            query = chunk_query(name, 6)
            for method in ("GET", "HEAD"):
                answer = self.ask(request(method, f"/upload?{query}"))
                answers.add(answer.status)
            query = chunk_query(name, 6, flowChunkNumber=None)
            answers.add(self.ask(request("GET", f"/upload?{query}")).status)
        self.assertEqual(len(answers & {200, 204}), 0, answers)
        self.assertEqual(len(answers), 1)

    def test_delete_reaches_no_finished_file(self) -> None:
        """filebrowser CVE-2026-29188: DELETE of tus removed real files."""
        self.ask(post("keep.txt"))
        for name in ("keep.txt", "../secret.txt", "./keep.txt", ".flowserver"):
            query = chunk_query(name, 5)
            self.ask(request("DELETE", f"/upload?{query}"))
        self.assertEqual((self.upload_dir / "keep.txt").read_bytes(), b"hello")
        self.assert_nothing_outside()

    def test_a_taken_name_is_not_overwritten(self) -> None:
        for body in (b"first", b"secnd", b"third"):
            self.assert_stored(self.ask(post("one.txt", body)))
        files = stored(self.upload_dir)
        self.assertEqual(files["one.txt"], b"first")
        self.assertIn(b"third", files.values())

    def link(self, name: str, target: Path) -> None:
        (self.upload_dir / name).symlink_to(target)

    def test_a_linked_folder_is_not_followed(self) -> None:
        """filebrowser CVE-2026-54094: neither the last component nor one before it."""
        outside = self.upload_dir.parent / "outside"
        outside.mkdir(exist_ok=True)
        self.addCleanup(shutil.rmtree, outside)
        (self.upload_dir / "real").mkdir(exist_ok=True)
        self.link("linked", outside)
        self.link("real/linked", outside)
        for name in ("linked/x", "linked/deep/x", "real/linked/x", "real/linked/y/z"):
            self.assert_refused(self.ask(post(name)), *PERMANENT["flow"])
        self.assertEqual(list(outside.iterdir()), [])

    def test_a_folder_that_becomes_a_link_meanwhile_is_not_followed(self) -> None:
        outside = self.upload_dir.parent / "outside"
        outside.mkdir(exist_ok=True)
        self.addCleanup(shutil.rmtree, outside)
        for name in ("later/x", "late/deep/x"):
            half = {"flowTotalSize": 10, "flowTotalChunks": 2}
            self.assertEqual(self.ask(post(name, b"hello", **half)).status, 200)
            shutil.rmtree(self.upload_dir / name.partition("/")[0], ignore_errors=True)
            self.link(name.partition("/")[0], outside)
            answer = self.ask(post(name, b"world", flowChunkNumber=2, **half))
            self.assertNotEqual(answer.status, 200)
        self.assertEqual(list(outside.iterdir()), [])

    def test_a_linked_name_is_not_followed(self) -> None:
        secret = self.upload_dir.parent / "secret.txt"
        self.link("alias.txt", secret)
        self.link("dangling.txt", self.upload_dir.parent / "made.txt")
        for name in ("alias.txt", "dangling.txt"):
            self.ask(post(name, b"other!"))
        self.assert_nothing_outside()


class OwnFilesTest(Attack):
    """Rule 15: no client gets at the files that the server lives by."""

    def test_a_temp_folder_of_another_name_is_out_of_reach(self) -> None:
        upload_dir = Path(tempfile.mkdtemp(dir=folder))
        temp = upload_dir / "work"
        with self.serve(upload_dir, temp_dir=str(temp)) as server:
            for name in ("work/v2/x", "WORK/v2/x", "work./x", "work/x", "./work/x"):
                self.ask(post(name), server)
            found = [p.name for p in temp.rglob("*") if p.name == "x"]
        self.assertEqual(found, [])

    def test_a_temp_folder_deep_inside_is_out_of_reach(self) -> None:
        upload_dir = Path(tempfile.mkdtemp(dir=folder))
        temp = upload_dir / "a" / "work"
        temp.parent.mkdir()
        with self.serve(upload_dir, temp_dir=str(temp)) as server:
            for name in ("a/work/v2/x", "A/WORK/v2/x", "a/./work/x"):
                self.ask(post(name), server)
            found = [p.name for p in temp.rglob("*") if p.name == "x"]
        self.assertEqual(found, [])

    def test_state_is_private(self) -> None:
        server = self.serve_here()
        self.ask(post("x", b"hello", flowTotalSize=10, flowTotalChunks=2), server)
        mode = stat.S_IMODE((self.upload_dir / ".flowserver").stat().st_mode)
        self.assertEqual(mode, 0o700)

    def refuses_to_start(self, upload_dir: Path, *flags: str) -> bool:
        """Whether it says so in one sentence; it may also start, and guard the file."""
        try:
            with run_server([sys.executable, str(SERVER)], upload_dir, *flags):
                return False
        except AssertionError as error:
            self.assertEqual(str(error).count("\n"), 1, error)
            return True

    def test_files_of_ours_in_the_upload_folder(self) -> None:
        """users_file, log_file, the certificate, conf.ini, flowserver.py itself."""
        upload_dir = Path(tempfile.mkdtemp(dir=folder))
        add_user(str(upload_dir / "users"), "ann", "secret")
        shutil.copy(SERVER, upload_dir / "flowserver.py")
        (upload_dir / "conf.ini").write_text("[storage]\non_conflict = replace\n")
        key = upload_dir / "key.pem"
        shutil.copy(certificate[1], key)
        for flags in (
            ("--users-file", str(upload_dir / "users")),
            ("--log-file", str(upload_dir / "flowserver.log")),
            ("--certificate", certificate[0], "--private-key", str(key)),
            ("--sample-dir", str(upload_dir / "sample")),
        ):
            with self.subTest(flags[0]):
                self.assertTrue(self.refuses_to_start(upload_dir, *flags))
        with self.subTest("conf.ini"):
            config = ("--config", str(upload_dir / "conf.ini"))
            self.assertTrue(self.refuses_to_start(upload_dir, *config))
        mine = [sys.executable, str(upload_dir / "flowserver.py")]
        with self.subTest("flowserver.py"), self.assertRaises(AssertionError):
            with run_server(mine, upload_dir):
                pass

    def test_nothing_is_handed_out_but_samples(self) -> None:
        """copyparty CVE-2023-37474: its side door served the whole disk."""
        server = self.serve_here()
        self.ask(post("private.txt"), server)
        for path in (
            *("/private.txt", "/uploads/private.txt", "/.flowserver", "/conf.ini"),
            *("/sample/../flowserver.py", "/sample/%2e%2e/flowserver.py", "/sample//"),
            *("/sample/..%2fflowserver.py", "/sample/..%5cflowserver.py", "/..%2f"),
            *("/sample/%2e%2e%2f%2e%2e%2fetc/passwd", "/sample/.hidden.html"),
            *("/sample//etc/passwd", "/sample/con.html", "/sample/x.html%00.txt"),
            *("//etc/passwd", "/%00", "/sample/a.py", "/sample/x.html::$DATA"),
        ):
            answer = self.ask(request("GET", path), server)
            self.assertEqual(answer.status, 404, path)


# ---- doors


def add_user(path: str, name: str, password: str) -> subprocess.CompletedProcess[str]:
    """Do as the README says; the password comes as one line of stdin."""
    command = [sys.executable, str(SERVER), "--config", "", "--users-file", path]
    return subprocess.run(
        [*command, "--add-user", name],
        input=password + "\n",
        capture_output=True,
        text=True,
    )


@contextlib.contextmanager
def users_file(users: dict[str, str]) -> Iterator[str]:
    """Yield the path of a file with these users and the usual hashes."""
    path = Path(tempfile.mkdtemp(dir=folder)) / "users"
    lines = [f"{name}:{_hashed(password)}\n" for name, password in users.items()]
    path.write_text("".join(lines), encoding="utf-8")
    yield str(path)


@functools.lru_cache
def _hashed(password: str) -> str:
    return flowserver.hash_password(password)


def basic(name: str, password: str) -> str:
    pair = base64.b64encode(f"{name}:{password}".encode()).decode()
    return f"Authorization: Basic {pair}"


class _WithUsers(Attack):
    users = {"ann": "secret", "bob": "pass:word: with colons ", "ünä": "Pässwörd"}

    @classmethod
    def setUpClass(cls) -> None:
        path = cls.enterClassContext(users_file(cls.users))
        cls.settings = {**cls.settings, "users_file": path}
        super().setUpClass()


@seen_to_fail
class LoginTest(_WithUsers):
    """uploadserver#53: a colon, bad base64 or bad UTF-8 broke it; clocks told names."""

    def test_nothing_without_a_login(self) -> None:
        """The test GET too: discourse#42098."""
        query = chunk_query("x")
        for data in (
            request("GET", "/"),
            request("HEAD", "/"),
            request("GET", "/health"),
            request("GET", "/sample/"),
            request("GET", f"/upload?{query}"),
            request("HEAD", f"/upload?{query}"),
            request("GET", "/upload"),
            request("DELETE", f"/upload?{query}"),
            post("x"),
            post("x").replace(b"POST", b"PUT"),
            post_form(dict(urllib.parse.parse_qsl(query))),
        ):
            answer = self.ask(data)
            self.assertEqual(answer.status, 401, data[:40])
            self.assertTrue(
                answer.headers["www-authenticate"].startswith("Basic realm")
            )
        self.assertNotIn("x", stored(self.upload_dir))

    def test_one_answer_for_all_that_is_wrong(self) -> None:
        wrong = [basic("ann", "wrong"), basic("nobody", "secret"), basic("", "secret")]
        wrong += [basic("ann", ""), basic("ann", "secret "), basic("ANN", "secret")]
        pairs = [b"ann", b"\xff:\xfe", b":", b"", b"ann:secret\0", b"ann\0:secret"]
        wrong += ["Authorization: Basic " + base64.b64encode(p).decode() for p in pairs]
        wrong += [
            "Authorization: " + text
            for text in (
                "Basic",
                "Basic ",
                "Basic !!!",
                "Basic YW5uOnNlY3JldA",
                "Bearer x",
                "",
                "Digest username=ann",
                "Basic \xe4",
                "YW5uOnNlY3JldA==",
                "Basic " + "A" * 9000,
            )
        ]
        answers = {self.ask(post("x", b"hello", line))[::2] for line in wrong}
        self.assertEqual({status for status, _ in answers}, {401}, answers)
        said = {json.loads(body)["error"] for _, body in answers}
        needed = "A name and a password are needed here."  # there were none
        self.assertEqual(said, {needed, "The name or the password is wrong."})

    def test_a_password_with_colons(self) -> None:
        answer = self.ask(post("b.txt", b"hello", basic("bob", self.users["bob"])))
        self.assert_stored(answer)


class AccountTest(_WithUsers):
    def login(self, name: str, password: str, server: Any = None) -> int:
        line = basic(name, password)
        return self.ask(request("GET", "/health", line), server).status

    def counted(self) -> Any:
        hashed = mock.Mock(side_effect=flowserver.hash_password)
        patch = mock.patch.object(flowserver, "hash_password", hashed)
        self.enterContext(patch)
        return hashed

    def test_every_user_may_log_in(self) -> None:
        for name, password in self.users.items():
            self.assertEqual(self.login(name, password), 200, name)

    def test_the_scheme_is_written_as_one_likes(self) -> None:
        """RFC 9110 11.1: its name has no case."""
        for scheme in ("basic", "BASIC"):
            line = basic("ann", "secret").replace("Basic", scheme)
            self.assertEqual(self.ask(request("GET", "/health", line)).status, 200)

    def test_a_thousand_requests_cost_one_hash(self) -> None:
        server = self.serve_here(**self.settings)
        hashed = self.counted()
        client = self.client(server)
        for _ in range(1000):
            client.send(request("GET", "/health", basic("ann", "secret")))
            self.assertEqual(client.answer().status, 200)
        self.assertEqual(hashed.call_count, 1)

    def test_requests_at_one_time_cost_one_hash(self) -> None:
        server = self.serve_here(**self.settings)
        hashed = self.counted()
        with ThreadPoolExecutor(20) as pool:
            all_of_them = pool.map(
                lambda _: self.login("ann", "secret", server), range(20)
            )
            self.assertEqual(set(all_of_them), {200})
        self.assertEqual(hashed.call_count, 1)

    def test_a_wrong_name_costs_what_a_wrong_password_costs(self) -> None:
        server = self.serve_here(**self.settings)
        hashed = self.counted()
        self.assertEqual(self.login("ann", "wrong", server), 401)
        for_password = [call.args[2:] for call in hashed.call_args_list]
        hashed.reset_mock()
        self.assertEqual(self.login("nobody", "wrong", server), 401)
        for_name = [call.args[2:] for call in hashed.call_args_list]
        self.assertEqual(for_name, for_password)
        self.assertEqual(len(for_name), 1)

    def test_hashes_are_compared_in_constant_time(self) -> None:
        server = self.serve_here(**self.settings)
        import hmac

        with mock.patch.object(hmac, "compare_digest", wraps=hmac.compare_digest) as it:
            self.login("ann", "wrong", server)
            self.login("nobody", "wrong", server)
        self.assertEqual(it.call_count, 2)

    def test_one_hash_at_a_time_and_nobody_else_waits_for_it(self) -> None:
        server = self.serve_here(**self.settings)
        self.assertEqual(self.login("bob", self.users["bob"], server), 200)
        begun, end, lock = threading.Event(), threading.Event(), threading.Lock()
        overlaps = []

        def slow(*arguments: Any) -> str:
            overlaps.append(not lock.acquire(blocking=False))
            begun.set()
            end.wait(10)
            if not overlaps[-1]:
                lock.release()
            return flowserver.hash_password.__wrapped__(*arguments)  # type: ignore

        slow.__wrapped__ = flowserver.hash_password  # type: ignore
        with mock.patch.object(flowserver, "hash_password", slow):
            with ThreadPoolExecutor(8) as pool:
                guesses = [
                    pool.submit(self.login, "ann", f"guess {n}", server)
                    for n in range(8)
                ]
                begun.wait(10)
                self.assertEqual(self.ask(request("GET", "/"), server).status, 401)
                self.assertEqual(self.login("bob", self.users["bob"], server), 200)
                end.set()
                self.assertEqual({g.result() for g in guesses}, {401})
        self.assertEqual(set(overlaps), {False})

    def test_a_changed_password_counts_at_once(self) -> None:
        with users_file({"ann": "old", "bob": "stays"}) as path:
            server = self.serve_here(users_file=path)
            self.assertEqual(self.login("ann", "old", server), 200)
            self.assertEqual(add_user(path, "ann", "new").returncode, 0)
            self.assertEqual(self.login("ann", "old", server), 401)
            self.assertEqual(self.login("ann", "new", server), 200)
            self.assertEqual(self.login("bob", "stays", server), 200)

    def test_a_user_who_is_removed_is_out(self) -> None:
        with users_file({"ann": "secret", "bob": "stays"}) as path:
            server = self.serve_here(users_file=path)
            self.assertEqual(self.login("ann", "secret", server), 200)
            lines = Path(path).read_text().splitlines(keepends=True)
            Path(path).write_text("".join(x for x in lines if "ann" not in x))
            self.assertEqual(self.login("ann", "secret", server), 401)

    def test_a_file_that_is_gone_lets_nobody_in(self) -> None:
        with users_file({"ann": "secret"}) as path:
            server = self.serve_here(users_file=path)
            self.assertEqual(self.login("ann", "secret", server), 200)
            os.remove(path)
            self.assertIn(self.login("ann", "secret", server), (401, 503))
            self.assertIn(self.ask(request("GET", "/"), server).status, (401, 503))

    def test_a_file_that_is_junk_lets_nobody_in(self) -> None:
        with users_file({"ann": "secret"}) as path:
            server = self.serve_here(users_file=path)
            for text in (
                "",
                "ann",
                "ann:",
                "ann:secret",
                "ann:$$$",
                "ann:a$b$c$d",
                "ann:pbkdf2_sha256$0$x$",
                "#ann:x\n:\n",
            ):
                Path(path).write_text(text)
                self.assertIn(self.login("ann", "secret", server), (401, 503), text)
                self.assertIn(self.login("ann", "", server), (401, 503), text)

    def test_a_file_that_is_missing_stops_the_start(self) -> None:
        with self.assertRaises(AssertionError) as caught:
            with run_server(
                [sys.executable, str(SERVER)],
                folder / "never",
                "--users-file",
                str(folder / "missing"),
            ):
                pass
        self.assertIn("users", str(caught.exception))
        self.assertNotIn("Traceback", str(caught.exception))

    def test_the_file_is_private_and_holds_no_password(self) -> None:
        with users_file({}) as path:
            os.remove(path)
            for name in ("ann", "bob"):
                self.assertEqual(add_user(path, name, "secret").returncode, 0)
            text = Path(path).read_text()
            self.assertRegex(
                text, r"\Aann:pbkdf2_sha256\$\d{6,}\$[^:\n]+\nbob:[^:\n]+\n\Z"
            )
            self.assertNotIn("secret", text)
            one, two = (line.partition(":")[2] for line in text.splitlines())
            self.assertNotEqual(one, two, "no salt")
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
            os.chmod(path, 0o640)
            add_user(path, "ann", "other")
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o640)
            self.assertEqual(len(Path(path).read_text().splitlines()), 2)
            self.assertEqual(os.listdir(Path(path).parent), ["users"])

    def test_names_that_would_break_the_file_are_refused(self) -> None:
        with users_file({"ann": "secret"}) as path:
            before = Path(path).read_text()
            for name in ("", "a:b", "a\nroot", "a\rb", "\x1b", ":", " ", "#x"):
                result = add_user(path, name, "password")
                if result.returncode == 0:  # then it must be a user like others
                    server = self.serve_here(users_file=path)
                    self.assertEqual(self.login(name, "password", server), 200, name)
                    Path(path).write_text(before)
                self.assertNotIn("Traceback", result.stderr)
                self.assertEqual(Path(path).read_text(), before, repr(name))
            self.assertNotEqual(add_user(path, "carl", "").returncode, 0)

    def test_the_password_is_asked_for_and_not_shown(self) -> None:
        import pty

        path = str(folder / "typed")
        leader, follower = pty.openpty()
        command = [sys.executable, str(SERVER), "--config", "", "--users-file", path]
        process = subprocess.Popen(
            [*command, "--add-user", "ann"],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
        )
        os.close(follower)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal is an error
            while b"assword" not in shown:
                shown += os.read(leader, 1000)
            time.sleep(0.2)  # until the echo is off
            os.write(leader, b"tip-top\n")
            while more := os.read(leader, 1000):
                shown += more
                if b"assword" in more:  # asked again, to be sure
                    time.sleep(0.2)
                    os.write(leader, b"tip-top\n")
        os.close(leader)
        self.assertEqual(process.wait(10), 0, shown)
        self.assertNotIn(b"tip-top", shown)
        server = self.serve_here(users_file=path)
        self.assertEqual(self.login("ann", "tip-top", server), 200)

    def test_listening_in_public_without_login_is_warned_of(self) -> None:
        """SECURITY 19: two lines, and only then."""
        path = str(self.settings["users_file"])
        for flags, lines in (
            (("--host", "0.0.0.0"), 2),
            (("--host", "0.0.0.0", "--users-file", path), 0),
            (("--host", "127.0.0.1"), 0),
        ):
            text = self.start_and_stop(*flags)
            found = [x for x in text.splitlines() if "nybody" in x or "users_file" in x]
            self.assertEqual(len(found), lines, text)

    def start_and_stop(self, *flags: str) -> str:
        said = Path(tempfile.mkdtemp(dir=folder)) / "said"
        with open(said, "w") as output:
            process = subprocess.Popen(
                [sys.executable, str(SERVER), "--config", "", "--port", "0", *flags]
                + ["--upload-dir", tempfile.mkdtemp(dir=folder)],
                stdout=output,
                stderr=output,
            )
        for _ in range(600):
            if "files go to" in said.read_text():
                break
            time.sleep(0.05)
        time.sleep(0.2)  # what is printed after that line
        process.terminate()
        process.wait(15)
        return said.read_text()


@seen_to_fail
class OwnerTest(_WithUsers):
    """Row 25: who logged in owns an upload; nobody else sees, joins or ends it.

    Not even who knows its secret identifier.
    """

    SECRET = f"flowserver-{0:032}-1"

    def part_of(
        self, user: str, number: int, body: bytes, method: str = "POST"
    ) -> Answer:
        query = chunk_query(
            "same.bin",
            10,
            flowChunkSize=5,
            flowChunkNumber=number,
            flowCurrentChunkSize=5,
            flowTotalChunks=2,
            flowIdentifier=self.SECRET,
        )
        line = basic(user, self.users[user])
        return self.ask(request(method, f"/upload?{query}", line, body=body))

    def status(self, user: str) -> str:
        query = chunk_query(
            "same.bin", 10, flowChunkNumber=None, flowIdentifier=self.SECRET
        )
        line = basic(user, self.users[user])
        answer = self.ask(request("GET", f"/upload?{query}", line))
        return str(answer.json["status"])

    def test_two_users_and_one_identifier(self) -> None:
        self.assertEqual(self.part_of("ann", 1, b"aaaaa").json["status"], "partial")
        self.assertEqual(self.part_of("ann", 1, b"", "GET").status, 200)
        self.assertEqual(self.part_of("bob", 1, b"", "GET").status, 204)
        self.assertEqual(
            (self.status("ann"), self.status("bob")), ("partial", "unknown")
        )
        self.assertEqual(self.part_of("bob", 1, b"", "DELETE").status, 204)
        self.assertEqual(self.part_of("bob", 2, b"bbbbb").json["status"], "partial")
        self.assertEqual(self.part_of("bob", 1, b"bbbbb").json["status"], "complete")
        self.assertEqual(self.part_of("ann", 2, b"", "GET").status, 204)
        self.assertEqual(self.part_of("ann", 2, b"aaaaa").json["status"], "complete")
        files = stored(self.upload_dir)
        self.assertEqual(sorted(files.values()), [b"a" * 10, b"b" * 10])
        self.assertEqual((self.status("ann"), self.status("bob")), ("complete",) * 2)

    def test_what_one_has_finished_is_no_news_for_the_other(self) -> None:
        for user in ("ann", "bob"):
            line = basic(user, self.users[user])
            self.assert_stored(self.ask(post("done.txt", user.encode(), line)))
        names = [n for n, text in stored(self.upload_dir).items() if text == b"ann"]
        self.assertEqual(len(names), 1)


del _WithUsers


# ---- other sites, other names, proxies


FOREIGN = [
    *(
        "http://evil.example",
        "https://localhost",
        "null",
        "http://localhost.evil.example",
    ),
    *("http://localhost:1", "http://127.0.0.1", "http://evil.example:80", "file://"),
    *("http://localhost@evil.example", "chrome-extension://abc", "http://[::1]", "x"),
]


@seen_to_fail
class OriginTest(Attack):
    """CSRF: copyparty 1.13.8, insightforge#29, the "0.0.0.0 day"."""

    def test_a_foreign_page_changes_nothing(self) -> None:
        for origin in FOREIGN:
            line = f"Origin: {origin}"
            query = chunk_query("x")
            for data in (
                post("x", b"hello", line),
                post("x", b"hello", line).replace(b"POST", b"PUT", 1),
                post("x", b"hello", line).replace(b"POST", b"PATCH", 1),
                request("DELETE", f"/upload?{query}", line),
                post_form(dict(urllib.parse.parse_qsl(query))).replace(
                    HOST, HOST + line.encode() + b"\r\n"
                ),
            ):
                answer = self.ask(data)
                self.assertEqual(answer.status, 415, (origin, data[:30]))
                self.assertIn("allow_origins", answer.json["error"])
        self.assertEqual(stored(self.upload_dir), {})

    def test_a_foreign_page_changes_nothing_in_any_other_way(self) -> None:
        """A form without parameters is what every page can send without asking."""
        for origin in FOREIGN:
            line = f"Origin: {origin}"
            for data in cases.other_ways(line):
                answer = self.ask(data)
                self.assertEqual(answer.status, 403, (origin, data[:30]))
                self.assertIn("allow_origins", answer.json["error"])
        self.assertEqual(stored(self.upload_dir), {})
        self.assertEqual(left_over(self.upload_dir), [])

    def test_a_foreign_page_reads_nothing(self) -> None:
        """CORS: nothing is said that lets a browser hand an answer on."""
        for origin in FOREIGN:
            for data in (
                request("GET", "/health", f"Origin: {origin}"),
                request("GET", f"/upload?{chunk_query('x')}", f"Origin: {origin}"),
                request("OPTIONS", "/upload", f"Origin: {origin}"),
                post("x", b"hello", f"Origin: {origin}"),
            ):
                headers = self.ask(data).headers
                self.assertNotIn("access-control-allow-origin", headers)
                self.assertNotIn("access-control-allow-credentials", headers)


class CorsTest(Attack):
    settings = {"allow_origins": "https://a.example http://b.example:81"}

    def test_our_own_page_may_upload(self) -> None:
        port = self.server.server_address[1]
        for host in (f"localhost:{port}", f"127.0.0.1:{port}", "localhost"):
            data = post("own.txt", b"hello", f"Origin: http://{host}")
            data = data.replace(b"Host: localhost", b"Host: " + host.encode(), 1)
            self.assert_stored(self.ask(data))

    def test_programs_without_origin_may_upload(self) -> None:
        self.assert_stored(self.ask(post("curl.txt")))
        answers = [self.ask(data) for data in cases.other_ways()]
        self.assertTrue(all(200 <= answer.status < 300 for answer in answers), answers)

    def test_an_allowed_origin_may_upload_and_read(self) -> None:
        for origin in ("https://a.example", "http://b.example:81"):
            answer = self.ask(post(f"{origin}.txt", b"hello", f"Origin: {origin}"))
            self.assert_stored(answer)
            self.assertEqual(answer.headers["access-control-allow-origin"], origin)
            self.assertEqual(answer.headers["access-control-allow-credentials"], "true")
            self.assertIn("Origin", answer.headers["vary"])

    def test_an_origin_is_allowed_exactly(self) -> None:
        for origin in (
            "http://a.example",
            "https://a.example:8443",
            "https://A.example.evil",
            "https://b.example:81",
            "https://xa.example",
            "null",
        ):
            answer = self.ask(post("x", b"hello", f"Origin: {origin}"))
            self.assertEqual(answer.status, 415, origin)
            self.assertNotIn("access-control-allow-origin", answer.headers)

    def test_an_allowed_page_may_read_refusals(self) -> None:
        line = "Origin: https://a.example"
        answer = self.ask(post("x", b"hello", line, flowChunkNumber=9))
        self.assert_refused(answer, 415)
        self.assertEqual(answer.headers["access-control-allow-origin"], line[8:])

    def test_answers_are_not_cached_for_another_origin(self) -> None:
        self.assertIn("Origin", self.ask(post("vary.txt")).headers["vary"])

    def preflight(self, server: Any = None, *lines: str) -> Answer:
        return self.ask(
            request(
                "OPTIONS", "/upload", "Access-Control-Request-Method: POST", *lines
            ),
            server,
        )

    def test_a_preflight_needs_no_login(self) -> None:
        with users_file({"ann": "secret"}) as path:
            server = self.serve_here(users_file=path, **self.settings)
            asked = "authorization,content-type,x-my-header"
            answer = self.preflight(
                server,
                "Origin: https://a.example",
                f"Access-Control-Request-Headers: {asked}",
            )
        self.assertEqual(answer.status, 204)
        self.assertEqual(
            answer.headers["access-control-allow-origin"], "https://a.example"
        )
        allowed = re.split(
            r"[, ]+", answer.headers["access-control-allow-headers"].lower()
        )
        self.assertLessEqual(
            {"authorization", "x-my-header", "content-type"}, set(allowed)
        )
        methods = re.split(r"[, ]+", answer.headers["access-control-allow-methods"])
        self.assertLessEqual(
            {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"}, set(methods)
        )
        self.assertGreater(int(answer.headers["access-control-max-age"]), 0)
        self.assertEqual(answer.body, b"")

    def test_a_preflight_echoes_names_and_nothing_else(self) -> None:
        for junk in ("x\ty", "x;y", "x\xffy", "<script>", "x:y", 'x"y'):
            line = "Access-Control-Request-Headers: " + junk
            answer = self.preflight(None, "Origin: https://a.example", line)
            self.assertEqual(answer.status, 204)
            self.assertNotIn("access-control-allow-headers", answer.headers)

    def test_a_preflight_of_a_stranger_is_not_allowed(self) -> None:
        answer = self.preflight(None, "Origin: https://evil.example")
        self.assertNotIn("access-control-allow-origin", answer.headers)

    def test_any_origin_never_with_credentials(self) -> None:
        server = self.serve_here(allow_origins="*")
        line = "Origin: https://any.example"
        answer = self.ask(post("x", b"hello", line), server)
        self.assert_stored(answer)
        self.assertEqual(answer.headers["access-control-allow-origin"], "*")
        self.assertNotIn("access-control-allow-credentials", answer.headers)

    def test_any_origin_is_no_way_round_a_login(self) -> None:
        """A form of any site would come with the password that the browser keeps."""
        with users_file({"ann": "secret"}) as path:
            server = self.serve_here(users_file=path, allow_origins="*")
            lines = ("Origin: https://any.example", basic("ann", "secret"))
            self.assert_refused(self.ask(post("x", b"hello", *lines), server), 415)
            self.assertEqual(stored(self.upload_dir), {})


@seen_to_fail
class HostTest(Attack):
    """DNS rebinding: on a loopback address a foreign name is a foreign page."""

    def test_a_foreign_host_is_refused(self) -> None:
        for host in (
            *("evil.example", "evil.example:80", "localhost.evil.example", "0.0.0.0"),
            *("127.0.0.1.evil.example", "evil.localhost.example", "[::]", "10.0.0.1"),
            *(
                "localhost:x",
                "127.0.0.1@evil.example",
                "127.0.0.256.example",
                "x" * 999,
            ),
            *(
                "local host",
                "localhost/",
                "localhost#",
                "[::1].evil.example",
                "1270001",
            ),
        ):
            for method, path in (
                ("GET", "/"),
                ("GET", "/health"),
                ("GET", "/upload"),
                ("POST", "/upload"),
                ("DELETE", "/upload"),
            ):
                answer = self.ask(request(method, path, host=host))
                self.assertEqual(answer.status, 403, (host, path))
                self.assertIn("allow_hosts", answer.json["error"])


class OwnHostTest(Attack):
    def test_our_own_names_are_accepted(self) -> None:
        for host in (
            "localhost",
            "LOCALHOST:81",
            "127.0.0.1",
            "127.9.9.9:1",
            "[::1]",
            "[::1]:8000",
            "app.localhost",
            "",
        ):
            answer = self.ask(request("GET", "/health", host=host))
            self.assertEqual(answer.status, 200, host)

    def test_names_that_are_set_are_accepted(self) -> None:
        server = self.serve_here(allow_hosts="files.example, other.example")
        for host, status in (
            *(
                ("files.example", 200),
                ("FILES.example:443", 200),
                ("other.example", 200),
            ),
            *(
                ("evil.example", 403),
                ("files.example.evil", 403),
                ("xfiles.example", 403),
            ),
        ):
            answer = self.ask(request("GET", "/health", host=host), server)
            self.assertEqual(answer.status, status, host)

    def test_what_a_stranger_says_was_the_host_does_not_count(self) -> None:
        server = self.serve_here(allow_hosts="files.example")
        line = "X-Forwarded-Host: files.example"
        answer = self.ask(request("GET", "/health", line, host="evil.example"), server)
        self.assertEqual(answer.status, 403)


class PublicHostTest(unittest.TestCase):
    """The same where the address is not a loopback one."""

    def test_names_that_are_set_are_the_only_ones(self) -> None:
        upload_dir = Path(tempfile.mkdtemp(dir=folder))
        app = UploadApp(Settings(upload_dir=upload_dir, allow_hosts="files.example"))
        for host, status in (
            ("files.example:8000", 200),
            ("evil.example", 403),
            ("localhost", 403),
            ("", 403),
        ):
            answer = app.handle(Request("GET", "/health", headers={"host": host}))
            self.assertEqual(answer.status, status, host)


class ProxyTest(unittest.TestCase):
    """Only trusted proxies are believed about who, which host and which way."""

    def setUp(self) -> None:
        self.upload_dir = Path(tempfile.mkdtemp(dir=folder))

    def app(self, trusted: str = "", **settings: object) -> UploadApp:
        app = UploadApp(
            Settings(
                upload_dir=self.upload_dir,
                sync=False,
                trusted_proxies=trusted,
                min_free_space=0,
                **settings,
            )
        )
        return app

    def ask(
        self,
        app: UploadApp,
        client: str,
        method: str = "GET",
        **headers: str,
    ) -> int:
        """Send the first of two chunks, or ask for a byte of it; return the status."""
        # Its first byte and its last one are asked for again.
        size, number = (5, 1) if method == "POST" else (1, 3)
        query = chunk_query(
            "p.bin",
            10,
            flowChunkSize=size,
            flowCurrentChunkSize=size,
            flowChunkNumber=number,
            flowTotalChunks=10 // size,
        )
        body = b"hello" if method == "POST" else b""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return app.handle(
            Request(
                method,
                "/upload",
                query,
                {"host": "localhost", **named},
                len(body),
                lambda n: body,
                client,
            )
        ).status

    def test_whom_a_stranger_names_is_not_believed(self) -> None:
        app = self.app()
        self.ask(app, "10.0.0.9", "POST", x_forwarded_for="1.1.1.1")
        self.assertEqual(self.ask(app, "1.1.1.1"), 204)
        self.assertEqual(self.ask(app, "10.0.0.9", x_forwarded_for="2.2.2.2"), 200)

    def test_a_stranger_is_warned_of_once(self) -> None:
        app = self.app("10.0.0.1")
        before = len(log_lines)
        for _ in range(50):
            self.ask(
                app, "10.0.0.9", x_forwarded_for="1.1.1.1", x_forwarded_proto="https"
            )
        lines = [x for x in log_lines[before:] if "trusted_proxies" in x]
        self.assertEqual(len(lines), 1)

    def test_whom_a_trusted_proxy_names_is_believed(self) -> None:
        app = self.app("10.0.0.0/24, ::1")
        self.ask(app, "10.0.0.7", "POST", x_forwarded_for="1.1.1.1")
        self.assertEqual(self.ask(app, "1.1.1.1"), 200)
        self.assertEqual(self.ask(app, "::1", x_forwarded_for="1.1.1.1"), 200)
        self.assertEqual(self.ask(app, "10.0.0.7", x_forwarded_for="2.2.2.2"), 204)

    def test_what_the_client_wrote_before_the_proxy_does_not_count(self) -> None:
        app = self.app("10.0.0.1")
        self.ask(app, "10.0.0.1", "POST", x_forwarded_for="9.9.9.9, 1.1.1.1")
        self.assertEqual(self.ask(app, "1.1.1.1"), 200)
        self.assertEqual(self.ask(app, "9.9.9.9"), 204)

    def test_a_chain_of_trusted_proxies_is_gone_through(self) -> None:
        app = self.app("10.0.0.1 10.0.0.2")
        self.ask(app, "10.0.0.1", "POST", x_forwarded_for="9.9.9.9, 1.1.1.1, 10.0.0.2")
        self.assertEqual(self.ask(app, "1.1.1.1"), 200)
        self.assertEqual(self.ask(app, "9.9.9.9"), 204)

    def test_a_port_beside_the_address_makes_no_stranger(self) -> None:
        """Some gateways write 1.1.1.1:5678, another port each time."""
        app = self.app("10.0.0.1")
        self.ask(app, "10.0.0.1", "POST", x_forwarded_for="1.1.1.1:5678")
        self.assertEqual(self.ask(app, "10.0.0.1", x_forwarded_for="1.1.1.1:999"), 200)

    def test_what_is_no_address_is_nobody(self) -> None:
        app = self.app("10.0.0.1")
        before = len(log_lines)
        for junk in (
            "x",
            "1.1.1.1 GET /forged 200",
            "10.0.0.1, x",
            "",
            ",",
            "\x85",
            "-" * 999,
            "1.1.1.1\tforged",
            "[::1",
            "'; DROP",
            "10.0.0.1," * 500,
        ):
            self.ask(app, "10.0.0.1", x_forwarded_for=junk)
        for line in log_lines[before:]:
            self.assertRegex(line, r"^10\.0\.0\.1 ")

    def test_an_ipv4_address_in_ipv6_clothes_is_the_same(self) -> None:
        app = self.app("10.0.0.0/24")
        self.ask(app, "::ffff:10.0.0.7", "POST", x_forwarded_for="1.1.1.1")
        self.assertEqual(self.ask(app, "1.1.1.1"), 200)

    def test_origins_behind_a_proxy_that_passes_host_on(self) -> None:
        app = self.app("10.0.0.1", allow_hosts="files.example")
        headers = {"host": "files.example", "origin": "https://files.example"}
        ours = dict(headers, x_forwarded_proto="https", x_forwarded_for="1.1.1.1")
        self.assertEqual(self.ask(app, "10.0.0.1", "POST", **ours), 200)
        self.assertEqual(
            self.ask(app, "10.0.0.1", "POST", x_forwarded_proto="https", **headers), 200
        )
        self.assertEqual(self.ask(app, "10.0.0.2", "POST", **ours), 415)
        evil = dict(ours, origin="https://evil.example")
        self.assertEqual(self.ask(app, "10.0.0.1", "POST", **evil), 415)

    def test_origins_behind_a_proxy_that_does_not_pass_host_on(self) -> None:
        app = self.app("10.0.0.1")
        ours = {"host": "127.0.0.1:8000", "x_forwarded_host": "files.example"}
        ours.update(x_forwarded_proto="https", origin="https://files.example")
        self.assertEqual(self.ask(app, "10.0.0.1", "POST", **ours), 200)
        self.assertEqual(self.ask(app, "10.0.0.2", "POST", **ours), 415)
        ours.update(x_forwarded_proto="https, http")
        self.assertEqual(self.ask(app, "10.0.0.1", "POST", **ours), 200)
        ours.update(x_forwarded_proto="javascript")
        self.assertEqual(self.ask(app, "10.0.0.1", "POST", **ours), 415)


NGINX = """
daemon off; pid {box}/pid; error_log stderr; worker_processes 1;
events {{ worker_connections 64; }}
http {{
    access_log off; client_body_temp_path {box}/body; proxy_temp_path {box}/proxy;
    fastcgi_temp_path {box}/f; uwsgi_temp_path {box}/u; scgi_temp_path {box}/s;
    server {{
        listen 127.0.0.1:{port} ssl; server_name files.example;
        ssl_certificate {chain}; ssl_certificate_key {key};
        client_max_body_size 0;
        location / {{
            proxy_pass http://127.0.0.1:{upstream}; proxy_request_buffering off;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto $scheme;
            {host}
        }}
    }}
}}
"""


@unittest.skipUnless(shutil.which("nginx"), "nginx is not here")
class NginxTest(Attack):
    """The two usual ways to stand behind nginx, as a browser at https:// sees them."""

    def upload_through(self, host_line: str, **settings: object) -> None:
        server = self.serve_here(trusted_proxies="127.0.0.1", **settings)
        with self.nginx(host_line, server) as front:
            with Client(front) as client:
                context = ssl._create_unverified_context()
                client.socket = context.wrap_socket(client.socket)
                origin = f"https://files.example:{front.server_address[1]}"
                for line, status in ((origin, 200), ("https://evil.example", 415)):
                    data = post("n.txt", b"hello", f"Origin: {line}")
                    data = data.replace(b"localhost", origin[8:].encode(), 1)
                    client.send(data)
                    self.assertEqual(client.answer().status, status, host_line)
        self.assertEqual(stored(self.upload_dir), {"n.txt": b"hello"})

    @contextlib.contextmanager
    def nginx(self, host_line: str, server: Any) -> Iterator[RunningServer]:
        box = Path(tempfile.mkdtemp(dir=folder))
        # It inherits the listening socket: nobody else gets the port in between.
        listener = self.enterContext(socket.create_server(("127.0.0.1", 0)))
        port = listener.getsockname()[1]
        text = NGINX.format(
            box=box,
            port=port,
            chain=certificate[0],
            key=certificate[1],
            upstream=server.server_address[1],
            host=host_line,
        )
        (box / "nginx.conf").write_text(text)
        log = tempfile.TemporaryFile("w+")
        process = subprocess.Popen(
            [
                "nginx",
                "-p",
                str(box),
                "-c",
                str(box / "nginx.conf"),
                "-g",
                "user root;",
            ],
            stderr=log,
            pass_fds=[listener.fileno()],
            env={**os.environ, "NGINX": f"{listener.fileno()};"},
        )
        listener.close()
        try:
            self.wait_for(port, process, log)
            yield RunningServer(process, ("127.0.0.1", port))  # type: ignore
        finally:
            process.terminate()
            process.wait(15)
            log.close()

    def wait_for(self, port: int, process: Any, log: Any) -> None:
        for _ in range(200):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            time.sleep(0.05)
        log.seek(0)
        self.fail(f"nginx did not start: {log.read()}")

    def test_host_is_passed_on(self) -> None:
        line = "proxy_set_header Host $http_host;"
        self.upload_through(line, allow_hosts="files.example")

    def test_host_is_not_passed_on(self) -> None:
        self.upload_through("proxy_set_header X-Forwarded-Host $http_host;")


# ---- resources


class ResourceTest(Attack):
    """Rows 10 and 27: limits hold, and say so in the client's own language."""

    def refused(self, server: Any, *, size: int, length: int, number: int = 1) -> None:
        """One chunk of a file, refused for good to each library."""
        for library in ("flow", "resumable"):
            query = chunk_query(
                f"{size}.bin",
                size,
                flowChunkSize=length,
                flowCurrentChunkSize=length,
                flowChunkNumber=number,
                flowTotalChunks=size // length,
            )
            query = query.replace("flow", library)
            data = request("POST", f"/upload?{query}", body=bytes(length))
            answer = self.ask(data, server)
            self.assert_refused(answer, *PERMANENT[library])
            self.assertRegex(answer.json["error"], r"^[A-Z][^\n]{10,}\.$")
        self.assertEqual(left_over(self.upload_dir), [])

    def test_max_file_size(self) -> None:
        server = self.serve_here(max_file_size=1000)
        self.assert_stored(self.ask(post("ok.bin", bytes(1000)), server))
        self.refused(server, size=1001, length=1001)
        self.refused(server, size=2000, length=500)
        self.refused(server, size=10**14, length=500)

    def test_max_chunk_size(self) -> None:
        server = self.serve_here(max_chunk_size=1000)
        self.assert_stored(self.ask(post("ok.bin", bytes(1000)), server))
        self.refused(server, size=1001, length=1001)
        self.refused(server, size=10 * MIB, length=5 * MIB)

    def begin(self, server: Any, name: str, number: int = 1) -> Answer:
        query = chunk_query(
            name,
            10,
            flowChunkSize=5,
            flowCurrentChunkSize=5,
            flowChunkNumber=number,
            flowTotalChunks=2,
        )
        return self.ask(request("POST", f"/upload?{query}", body=b"hello"), server)

    def test_max_uploads(self) -> None:
        server = self.serve_here(max_uploads=3)
        for name in "abc":
            self.assertEqual(self.begin(server, name).json["status"], "partial")
        self.assert_refused(self.begin(server, "d"), *PERMANENT["flow"])
        self.assertEqual(self.begin(server, "a").status, 200, "its own chunk again")
        self.assert_stored(self.begin(server, "a", 2))
        self.assertEqual(self.begin(server, "d").status, 200, "there is room again")
        query = chunk_query("b", 10, flowChunkNumber=None)
        self.ask(request("DELETE", f"/upload?{query}"), server)
        self.assertEqual(self.begin(server, "e").status, 200, "there is room again")
        self.assert_refused(self.begin(server, "f"), *PERMANENT["flow"])

    def app(self, disk: flowserver.Disk | None = None, **settings: object) -> Any:
        self.upload_dir = Path(tempfile.mkdtemp(dir=folder))
        self.now = 0.0
        store = disk and flowserver.Store(str(self.upload_dir), disk=disk)
        values = Settings(upload_dir=self.upload_dir, sync=False, **settings)
        return UploadApp(values, store=store, clock=lambda: self.now)

    def send(
        self,
        app: UploadApp,
        name: str,
        number: int = 1,
        method: str = "POST",
        read: Callable[[], bytes] = lambda: b"hello",
    ) -> Any:
        """Send one of two chunks of 5 bytes, or ask for it, or cancel them."""
        query = chunk_query(
            name,
            10,
            flowChunkSize=5,
            flowCurrentChunkSize=5,
            flowChunkNumber=number,
            flowTotalChunks=2,
        )
        return app.handle(
            Request(
                method,
                "/upload",
                query,
                {"host": "localhost"},
                5 if method == "POST" else 0,
                lambda n: read(),
                "10.0.0.1",
            )
        )

    def test_min_free_space_holds_at_each_chunk(self) -> None:
        """A figure that is some seconds old let 40 files in a second fill the disk."""
        app = self.app(min_free_space="1M")
        free = MIB + 99
        with mock.patch.object(app.store.disk, "free_space", lambda path: free):
            for number in range(20):
                self.assertEqual(self.send(app, f"{number}").status, 200)
            free = MIB + 9  # it is 10 bytes, of which 5 come now
            answer = self.send(app, "more")
            self.assertIn(answer.status, PERMANENT["flow"])
            self.assertEqual(self.send(app, "7", number=2).status, 200, "it goes on")
            free = MIB + 4
            answer = self.send(app, "8", number=2)
            self.assertEqual(answer.status, 503, "one that goes on")
            self.assertIn("no room", json.loads(answer.body)["error"])
            free = MIB + 5
            self.assertEqual(self.send(app, "8", number=2).status, 200, "afterwards")
        names = {f"{number}" for number in (7, 8)}
        self.assertEqual(stored(self.upload_dir).keys(), names)

    def test_min_free_space_holds_for_all_at_one_time(self) -> None:
        """Bodies under way have their room: together they do not go below either."""
        app = self.app(min_free_space="1M")
        begun, end = threading.Semaphore(0), threading.Event()

        def slowly() -> bytes:
            begun.release()
            end.wait(10)
            return b"hello"

        # Each is 10 bytes, of which 5 come now: two leave 9.
        with mock.patch.object(app.store.disk, "free_space", return_value=MIB + 19):
            with ThreadPoolExecutor(2) as pool:
                under_way = [
                    pool.submit(self.send, app, f"{number}", read=slowly)
                    for number in range(2)
                ]
                for _ in under_way:
                    self.assertTrue(begun.acquire(timeout=10))
                answer = self.send(app, "more")
                end.set()
                self.assertEqual([one.result().status for one in under_way], [200] * 2)
            self.assertIn(answer.status, PERMANENT["flow"])
            self.assertEqual(self.send(app, "more").status, 200, "afterwards")

    def test_no_request_scans_a_folder(self) -> None:
        """Only time makes it do so: for the first one, and then each 20 s."""
        app = self.app(max_uploads=5, min_free_space=1)
        self.send(app, "0")  # brings in order what a crash may have left
        disk = app.store.disk
        with mock.patch.object(disk, "list", side_effect=disk.list) as listed:
            for number in range(100):
                expected = 200 if number < 5 else 413
                self.assertEqual(self.send(app, f"{number}").status, expected)
                self.send(app, f"{number}", method="GET")
                self.send(app, f"{number + 90}", method="DELETE")
                self.now += 0.19
            self.assertEqual(listed.call_count, 0)
            self.now += 2
            for number in range(5):
                self.assertEqual(self.send(app, f"{number}").status, 200)
            self.assertEqual(listed.call_count, 1)

    def test_a_full_disk_is_a_sentence_and_a_passing_trouble(self) -> None:
        class Full(flowserver.Disk):
            error = 0

            def write(self, fd: int, block: Any, offset: int) -> None:
                if self.error and len(block) == 5:
                    raise OSError(self.error, os.strerror(self.error))
                super().write(fd, block, offset)

        for error, statuses in (
            (errno.ENOSPC, (503,)),
            (errno.EDQUOT, (503,)),
            (errno.EIO, (503,)),
            (errno.EROFS, (503,)),
            (errno.EFBIG, PERMANENT["flow"]),
        ):
            disk = Full(False)
            app = self.app(disk)
            disk.error = error
            with self.assertNoLogs("flowserver", logging.ERROR):
                answer = self.send(app, "x")
            self.assertIn(answer.status, statuses, answer.body)
            self.assertNotIn("mistake", json.loads(answer.body)["error"])
            disk.error = 0
            self.assertEqual(self.send(app, "x").status, 200, "afterwards")

    def test_a_limit_of_the_file_system_is_final(self) -> None:
        """As FAT's 4 GiB: here 100 KiB, by the limits of the process."""
        upload_dir = self.upload_dir = Path(tempfile.mkdtemp(dir=folder))
        command = f'ulimit -f 100; exec {sys.executable} {SERVER} "$@"'
        with run_server(["bash", "-c", command, "-"], upload_dir) as server:
            self.assert_stored(self.ask(post("ok.bin", bytes(100 * 1024)), server))
            self.refused(server, size=300_000, length=300_000)
            self.refused(server, size=300_000, length=100_000, number=3)


# ---- the log


class LogTest(Attack):
    """cpython#100001, twisted#11535: one event one line, and no secret in it."""

    def setUp(self) -> None:
        super().setUp()
        self.before = len(log_lines)

    def lines(self) -> list[str]:
        time.sleep(0.05)  # a line is written after the answer
        return log_lines[self.before :]

    def assert_clean(self) -> None:
        for line in self.lines():
            self.assertTrue(line.isprintable(), ascii(line))
            self.assertNotIn("FORGED", line.partition(" ")[0])

    def test_names_forge_no_line(self) -> None:
        for name in (
            "a\nFORGED",
            "a\r\nFORGED",
            "a\x1b[2JFORGED",
            "a\u2028FORGED",
            "a\x85FORGED",
            "a\u202eFORGED",
            "a\x9b31mFORGED",
            "a\0FORGED",
            "a\u00adFORGED",
        ):
            for number in (1, 9):  # one is stored, the other refused
                query = chunk_query(name, flowChunkNumber=number)
                self.ask(request("POST", f"/upload?{query}", body=b"hello"))
                self.ask(request("DELETE", f"/upload?{query}"))
            self.ask(request("GET", "/" + urllib.parse.quote(name)))
            self.ask(post("x", b"hello", **{"flow" + name: "1"}))
            self.ask(post("x", b"hello", flowChunkSize=name))
        self.assert_clean()

    def test_headers_forge_no_line(self) -> None:
        for value in ("x\x85FORGED", "\tFORGED", "x\xa0FORGED", "x FORGED"):
            for header in (
                "Origin",
                "Host",
                "X-Forwarded-For",
                "User-Agent",
                "Referer",
            ):
                data = request("POST", "/upload", f"{header}: {value}", body=b"x")
                if header == "Host":
                    data = data.replace(b"Host: localhost\r\n", b"", 1)
                self.ask(data)
        self.assert_clean()

    def test_bad_heads_forge_no_line(self) -> None:
        for head in cases.HEADS:
            self.ask(head.head + SMUGGLED)
        self.assert_clean()

    def test_a_request_is_one_line_or_two(self) -> None:
        for _ in range(20):
            self.ask(post(f"{random.random()}"))
        self.assertLessEqual(len(self.lines()), 40)

    def test_a_bad_request_is_one_line_or_two(self) -> None:
        self.ask(cases.HEADS[0].head)
        self.ask(post("../x"))
        self.ask(post("x", b"hello", flowChunkNumber="\n" * 1000))
        self.assertLessEqual(len(self.lines()), 6)
        self.assertLess(max(map(len, self.lines())), 2000)

    def test_no_password_is_in_the_log(self) -> None:
        with users_file({"ann": "open sesame"}) as path:
            server = self.serve_here(users_file=path)
            secret = basic("ann", "open sesame")
            for line in (secret, basic("ann", "wrong sesame"), "Authorization: sesame"):
                self.ask(post("x", b"hello", line), server)
                self.ask(request("GET", "/", line), server)
        text = "\n".join(self.lines())
        self.assertNotIn("sesame", text)
        self.assertNotIn(secret.rpartition(" ")[2], text)

    def test_what_the_log_file_gets_is_the_same(self) -> None:
        upload_dir = Path(tempfile.mkdtemp(dir=folder))
        log = folder / "server.log"
        command = [sys.executable, str(SERVER)]
        with run_server(command, upload_dir, "--log-file", str(log)) as server:
            self.ask(post("a\nb\u2028c\x85d.txt"), server)
            self.ask(request("GET", "/%0d%0a%e2%80%a8%c2%85forged"), server)
        lines = log.read_bytes().decode("utf-8").splitlines()
        self.assertTrue(lines)
        for line in lines:
            self.assertRegex(line, r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ")
            self.assertTrue(line.isprintable(), ascii(line))


@seen_to_fail
class PlainLogTest(Attack):
    """The same, seen to fail: a log that takes names as they come."""

    def test_a_path_forges_no_line(self) -> None:
        before = len(log_lines)
        self.ask(request("GET", "/upload%0aFORGED"))
        time.sleep(0.05)
        lines = getattr(self.server, "log", None) or log_lines[before:]
        self.assertTrue(lines)
        self.assertTrue(all(line.isprintable() for line in lines))


# ---- and all of it together, for a while


class SoakTest(unittest.TestCase):
    """A few seconds of soak.py: threads and descriptors; memory needs the long run."""

    def test_nothing_piles_up(self) -> None:
        import soak

        with contextlib.redirect_stdout(None):
            early, late, answers, log = soak.soak(6, 3, 30, 150, tls=False)
        late = late._replace(memory=early.memory)
        self.assertEqual(soak.complaints(early, late, log), [])
        self.assertGreater(answers["200"], 50, answers)
        self.assertGreater(answers["400"], 20, answers)


if __name__ == "__main__":
    unittest.main()
