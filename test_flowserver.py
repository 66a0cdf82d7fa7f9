#!/usr/bin/env python3
"""Proof of flowserver, with nothing installed:

    python test_flowserver.py

One class for each room of flowserver.py, in its order.  What needs a browser, root or
minutes lives in .ci/; FLOWSERVER_LONG=1 adds here what takes more than some seconds.
"""

from __future__ import annotations

import ast
import base64
import collections
import contextlib
import dis
import errno
import functools
import gc
import hashlib
import http.client
import http.server
import inspect
import io
import itertools
import json
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import socketserver
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
import warnings
import wsgiref.util
import wsgiref.validate
from typing import (
    Any,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)
from unittest import mock

try:
    import ssl
except ImportError:  # some systems build Python without it
    ssl = None  # type: ignore[assignment]

import flowserver
from flowserver import (
    FlowServer,
    MultipartParser,
    Part,
    Request,
    Settings,
    Store,
    UploadApp,
)

FILE = os.path.abspath(flowserver.__file__)
HOME = os.path.dirname(os.path.abspath(__file__))
KIB, MIB = 1 << 10, 1 << 20
PATIENCE = (
    30  # seconds until a test gives up waiting; none waits so long when all is well
)
BOUNDARY = "----WebKitFormBoundary7MA4YWxkTrZu0gW"
SECRET = "flowserver-" + "0f" * 16 + "-1"  # an identifier that nobody can guess


def setUpModule() -> None:
    """What is logged is not printed, unless a test asks for it."""
    logging.getLogger("flowserver").addHandler(logging.NullHandler())


# What a client sends


def noise(size: int, seed: int = 1) -> bytes:
    """Return bytes that are the same in each run and at no two places alike."""
    bits = random.Random(seed).getrandbits(8 * size) if size else 0
    return bits.to_bytes(size, "big")


def chunk_range(
    size: int, number: int, chunk_size: int, forced: bool = False
) -> Tuple[int, int]:
    """Return start and end of a chunk; unless `forced`, the last one is longer."""
    start = (number - 1) * chunk_size
    is_last = number == chunk_count(size, chunk_size, forced)
    return start, size if is_last else start + chunk_size


def chunk_count(size: int, chunk_size: int, forced: bool = False) -> int:
    """Return how many chunks flow.js and resumable.js make of a file."""
    return max(-(-size // chunk_size) if forced else size // chunk_size, 1)


def flow_parameters(
    name: str,
    data: bytes,
    number: int = 1,
    chunk_size: int = MIB,
    forced: bool = False,
    prefix: str = "flow",
    **changes: object,
) -> Dict[str, str]:
    """Return the parameters of flow.js; ``TotalSize=7`` changes one, None drops it."""
    start, end = chunk_range(len(data), number, chunk_size, forced)
    values: Dict[str, object] = {
        "ChunkNumber": number,
        "ChunkSize": chunk_size,
        "CurrentChunkSize": end - start,
        "TotalSize": len(data),
        "Identifier": f"{len(data)}-{re.sub('[^0-9A-Za-z_-]', '', name)}",
        "Filename": name.rpartition("/")[2],
        "RelativePath": name,
        "TotalChunks": chunk_count(len(data), chunk_size, forced),
    }
    values.update(changes)
    return {prefix + k: str(v) for k, v in values.items() if v is not None}


def multipart(
    fields: Mapping[str, str], body: Optional[bytes], boundary: str = BOUNDARY
) -> bytes:
    """Return the form of a browser: its fields, and the file unless it is None."""
    form = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        f"{value}\r\n".encode()
        for name, value in fields.items()
    )
    if body is not None:
        form += (
            (
                f"--{boundary}\r\n"
                'Content-Disposition: form-data; name="file"; filename="blob"\r\n'
                "Content-Type: application/octet-stream\r\n\r\n"
            ).encode()
            + body
            + b"\r\n"
        )
    return form + f"--{boundary}--\r\n".encode()


class Message(NamedTuple):
    """What send() sends after its first argument: ``send(server, *message)``."""

    method: str
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = {}


def browser(
    name: str,
    data: bytes,
    number: int = 1,
    chunk_size: int = MIB,
    mode: str = "multipart",
    method: str = "POST",
    path: str = "/upload",
    forced: bool = False,
    prefix: str = "flow",
    sent: Optional[bytes] = None,
    **changes: object,
) -> Message:
    """Return one chunk as flow.js sends it; `mode` is multipart, octet or test.

    `sent` are other bytes than those that the parameters speak of.
    """
    parameters = flow_parameters(
        name, data, number, chunk_size, forced, prefix, **changes
    )
    query = (
        path + "?" + urllib.parse.urlencode(parameters, quote_via=urllib.parse.quote)
    )
    start, end = chunk_range(len(data), number, chunk_size, forced)
    body = data[start:end] if sent is None else sent
    if mode == "multipart":
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        return Message(method, path, multipart(parameters, body), kind)
    if mode == "octet":
        return Message(method, query, body, {"Content-Type": "text/plain"})
    return Message("GET" if method == "POST" else method, query)


def prepared(message: Message, read: Any) -> Request:
    """Return the request of a message, as an application gets it."""
    headers = {name.lower(): value for name, value in message.headers.items()}
    path, _, query = message.path.partition("?")
    return Request(message.method, path, query, headers, len(message.body), read, "::1")


# What comes back


class Answer(NamedTuple):
    """An answer; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Dict[str, Any]:
        """What a JSON answer says."""
        values: Dict[str, Any] = json.loads(self.body)
        return values


def send(
    where: Any,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] = {},
    client: str = "127.0.0.1",
) -> Answer:
    """Send a request over HTTP to a server, or without a socket to an application."""
    if isinstance(where, UploadApp):
        return _ask(where, method, path, body, headers, client)
    host, port = where.server_address[:2]
    connection = http.client.HTTPConnection(str(host), port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, path, body or None, dict(headers))
        response = connection.getresponse()
        lower = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, lower, response.read())


def _ask(
    app: UploadApp,
    method: str,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    client: str,
) -> Answer:
    lower = {name.lower(): value for name, value in headers.items()}
    path, _, query = path.partition("?")
    read = io.BytesIO(body).read
    request = Request(method, path, query, lower, len(body), read, client)
    response = app.handle(request)
    given = {name.lower(): value for name, value in response.headers}
    return Answer(response.status, given, response.body)


def send_file(where: Any, name: str, data: bytes, **how: Any) -> List[Answer]:
    """Send all chunks of a file in order, as browser() makes them."""
    count = chunk_count(len(data), how.get("chunk_size", MIB), how.get("forced", False))
    return [
        send(where, *browser(name, data, number, **how))
        for number in range(1, count + 1)
    ]


UUID = "0f1e2d3c-4b5a-4678-8796-a5b4c3d2e1f0"


def form(
    fields: Mapping[str, str],
    *files: Tuple[str, str, bytes],
    path: str = "/upload",
    headers: Mapping[str, str] = {},
) -> Message:
    """Return what a browser posts: fields, then files, each (field, file name, bytes).

    As browsers write it, only a quote is escaped.
    """
    parts = [
        f'; name="{name}"; filename="{filename}"\r\n'.encode()
        + b"Content-Type: application/octet-stream\r\n\r\n"
        + data
        for name, filename, data in files
    ]
    begin = f"--{BOUNDARY}\r\nContent-Disposition: form-data".encode()
    body = multipart(fields, None)[: -len(BOUNDARY) - 6]
    body += b"".join(begin + part + b"\r\n" for part in parts)
    kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    body += f"--{BOUNDARY}--\r\n".encode()
    return Message("POST", path, body, {**kind, **headers})


def parameters_of(
    library: str, name: str, data: bytes, index: int, size: int
) -> Dict[str, object]:
    """Return what a library says of a chunk; what has a dash goes into the head."""
    start = index * size
    end, count = min(start + size, len(data)), max(-(-len(data) // size), 1)
    flow = flow_parameters(name, data, index + 1, size, True, "")
    folder, _, filename = name.rpartition("/")
    said: Dict[str, Dict[str, object]] = {
        "flow.js": {"flow" + word: text for word, text in flow.items()},
        "resumable.js": {"resumable" + word: text for word, text in flow.items()},
        "simple-uploader.js": {w[0].lower() + w[1:]: text for w, text in flow.items()},
        "Dropzone": {
            "dzuuid": hashlib.sha1(name.encode()).hexdigest()[:32],
            "dzchunkindex": index,
            "dztotalfilesize": len(data),
            "dzchunksize": size,
            "dztotalchunkcount": count,
            "dzchunkbyteoffset": start,
        },
        "Fine Uploader": {
            "qqpartindex": index,
            "qqpartbyteoffset": start,
            "qqchunksize": end - start,
            "qqtotalparts": count,
            "qqtotalfilesize": len(data),
            "qqfilename": filename,
            "qquuid": UUID,
            "qqpath": folder + "/" if folder else None,
        },
        "Plupload": {"name": name, "offset": start, "total": len(data)},
        "Content-Range": {
            "Content-Range": f"bytes {start}-{end - 1}/{len(data)}",
            "Content-Disposition": f'attachment; filename="{encoded(name)}"',
        },
    }
    return said[library]


def encoded(text: str) -> str:
    """Return what encodeURI() makes of it."""
    return urllib.parse.quote(text, safe=";,/?:@&=+$-_.!~*'()#")


def chunk_of(
    library: str,
    name: str,
    data: bytes,
    index: int = 0,
    size: int = 10,
    mode: str = "multipart",
    sent: Optional[bytes] = None,
    **changes: object,
) -> Message:
    """Return a chunk as a library sends it; None drops one of the things it says.

    `mode` is multipart, address (parameters there, the chunk in a form) or raw; `sent`
    are other bytes than those that the parameters speak of.
    """
    said = {**parameters_of(library, name, data, index, size), **changes}
    texts = {word: str(text) for word, text in said.items() if text is not None}
    fields = {word: text for word, text in texts.items() if "-" not in word}
    headers = {word: text for word, text in texts.items() if "-" in word}
    body = data[index * size : (index + 1) * size] if sent is None else sent
    blob = "blob" if library in ("Fine Uploader", "Plupload") else name
    path = "/upload"
    if mode != "multipart":
        path, fields = path + "?" + urllib.parse.urlencode(fields), {}
    if mode == "raw":
        kind = {"Content-Type": "application/octet-stream"}
        return Message("POST", path, body, {**kind, **headers})
    return form(fields, ("file", blob, body), path=path, headers=headers)


class RawClient:
    """A client that says exactly what it is told, byte for byte."""

    def __init__(self, server: Any) -> None:
        self.socket = socket.create_connection(server.server_address[:2], PATIENCE)
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()
        self.socket.close()

    def send(self, *blocks: Union[bytes, str]) -> RawClient:
        """Send text, with CRLF for its line ends, or bytes as they are."""
        for block in blocks:
            if isinstance(block, str):
                block = block.replace("\n", "\r\n").encode("latin-1")
            self.socket.sendall(block)
        return self

    def answer(self, method: str = "GET") -> Optional[Answer]:
        """Read one answer; None when the connection ended instead."""
        try:
            line = self.file.readline()
            if not line:
                return None
            headers = http.client.parse_headers(self.file)
        except ConnectionError:
            return None
        size = 0 if method == "HEAD" else int(headers.get("Content-Length", "0"))
        lower = {name.lower(): value for name, value in headers.items()}
        return Answer(int(line.split()[1]), lower, self.file.read(size))

    def is_closed(self) -> bool:
        """Read on; return whether the end comes without another byte before it."""
        try:
            return self.file.read(1) == b""
        except ConnectionError:
            return True


# Where it goes


@contextlib.contextmanager
def temporary_folder() -> Iterator[str]:
    """Yield the real path of a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="flowserver") as folder:
        yield os.path.realpath(folder)


@contextlib.contextmanager
def temporary_store(**arguments: Any) -> Iterator[Store]:
    """Yield a Store in a folder of its own; arguments as Store takes them."""
    with temporary_folder() as folder:
        store = Store(**{"upload_dir": os.path.join(folder, "uploads"), **arguments})
        yield store


@contextlib.contextmanager
def application(**arguments: Any) -> Iterator[UploadApp]:
    """Yield an UploadApp in a folder of its own; settings, or what UploadApp takes."""
    names = inspect.signature(UploadApp).parameters
    own = {name: arguments.pop(name) for name in list(arguments) if name in names}
    with temporary_folder() as folder:
        values = {"upload_dir": os.path.join(folder, "uploads"), "min_free_space": 0}
        values["sync"] = False  # others prove what a power cut leaves
        app = UploadApp(Settings(**{**values, **arguments}), **own)
        yield app


class QuickServer(FlowServer):
    """A server that notices at once that it shall stop."""

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Look for the end every 10 ms."""
        super().serve_forever(0.01)


@contextlib.contextmanager
def closing_server(app: UploadApp) -> Iterator[FlowServer]:
    """Yield a server that was not started."""
    server = FlowServer(app)
    try:
        yield server
    finally:
        server.server_close()


@contextlib.contextmanager
def serving(**arguments: Any) -> Iterator[FlowServer]:
    """Yield a running server over application(...) on a free port of this machine."""
    with application(**{"port": 0, **arguments}) as app:
        with QuickServer(app) as server:
            yield server


Place = Union[FlowServer, UploadApp, Store, str]


def folders_of(where: Place) -> Tuple[str, str]:
    """Return upload_dir and temp_dir of a server, an application, a store, a path."""
    if isinstance(where, str):
        return where, os.path.join(where, ".flowserver")
    if isinstance(where, FlowServer):
        where = where.app
    store = where.store if isinstance(where, UploadApp) else where
    return store.upload_dir, store.temp_dir


def finished_files(where: Place) -> Dict[str, bytes]:
    """Return the bytes of each file below upload_dir, the temp folder left out."""
    upload_dir, temp_dir = folders_of(where)
    found = {}
    for folder, folders, names in os.walk(upload_dir):
        folders[:] = [
            name for name in folders if os.path.join(folder, name) != temp_dir
        ]
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                relative = os.path.relpath(path, upload_dir).replace(os.sep, "/")
                found[relative] = file.read()
    return found


def leftovers(where: Place) -> Dict[str, int]:
    """Return name and size of the files in the temp folder with bytes of clients."""
    found = {}
    for folder, _, names in os.walk(folders_of(where)[1]):
        for name in names:
            if name.endswith((".data", ".part")):
                with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                    found[name] = os.path.getsize(os.path.join(folder, name))
    return found


# In how many ways


def split_every_way(body: bytes) -> Iterator[List[bytes]]:
    """Yield the blocks of a body: whole, byte by byte, and cut at each place."""
    yield [body]
    yield [body[i : i + 1] for i in range(len(body))]
    for place in range(1, len(body)):
        yield [body[:place], body[place:]]


def until(condition: Any, what: str = "it") -> None:
    """Wait until a condition holds; a test that waits in vain fails."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not happen")
        time.sleep(0.005)


# ---- house ---------------------------------------------------------------------------

ROOMS = (
    "front door",
    "errors",
    "settings",
    "multipart",
    "dialects",
    "upload",
    "disk",
    "ledgers",
    "publication",
    "beginnings and ends",
    "bodies",
    "store",
    "page",
    "requests",
    "access",
    "intake",
    "chunks and forms",
    "tus",
    "FilePond",
    "application",
    "HTTP server",
    "command line",
)
PURE_ROOMS = ("errors", "multipart", "dialects", "upload", "page")
IMPURE_NAMES = frozenset(
    "open os io socket http time tempfile threading shutil print".split()
)
PUBLIC_NAMES = frozenset(
    "Body Conflict Disk Done FlowError FlowHandler FlowHandlerMixin FlowServer"
    " Forbidden Incoming Malformed MultipartParser Part Progress Request Response"
    " Settings SettingsError Status Store TooLarge Trouble Truncated Unauthorized"
    " Upload UploadApp Whole boundary_of create_app find_config load_settings main"
    " safe_path upload_key wsgi_request".split()
)
CHANGERS = frozenset(
    "add append clear extend insert pop remove setdefault update".split()
)
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def source_of(path: str) -> str:
    """Return the text of a file."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def rooms_of(source: str) -> Dict[str, List[ast.stmt]]:
    """Return the statements of each room, which is what stands between two banners."""
    banners = {1: "front door"}
    for number, line in enumerate(source.splitlines(), 1):
        match = re.fullmatch("# ---- (.+) -+", line)
        if match:
            banners[number] = match[1]
    rooms: Dict[str, List[ast.stmt]] = {name: [] for name in banners.values()}
    for statement in ast.parse(source).body:
        above = max(number for number in banners if number <= statement.lineno)
        rooms[banners[above]].append(statement)
    return rooms


def names_defined(statements: Sequence[ast.stmt]) -> Iterator[str]:
    """Yield the names that statements give something to."""
    for statement in statements:
        if isinstance(statement, Function + (ast.ClassDef,)):
            yield statement.name
        elif not isinstance(statement, (ast.Import, ast.ImportFrom, ast.If)):
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id


def names_used(statements: Sequence[ast.stmt]) -> Iterator[str]:
    """Yield the global names that statements load; annotations are never evaluated."""
    module = ast.Module(body=list(statements), type_ignores=[])
    flags = annotations.compiler_flag
    codes = [compile(module, "room", "exec", flags, dont_inherit=True)]
    for code in codes:
        codes += [const for const in code.co_consts if inspect.iscode(const)]
        for step in dis.get_instructions(code):
            if step.opname.startswith(("LOAD_NAME", "LOAD_GLOBAL", "LOAD_FROM_DICT")):
                yield str(step.argval)


def code_size(function: ast.AST, lines: Sequence[str]) -> int:
    """Return a function's lines, without its docstring, comments and empty lines."""
    assert isinstance(function, Function)
    counted = set(range(function.lineno, (function.end_lineno or 0) + 1))
    if ast.get_docstring(function):
        first = function.body[0]
        counted -= set(range(first.lineno, (first.end_lineno or 0) + 1))
    return sum(bool(lines[n - 1].strip().strip("#")[:1]) for n in counted) - sum(
        lines[n - 1].lstrip().startswith("#") for n in counted
    )


class HouseTest(unittest.TestCase):
    """The order of the rooms, and what the file says about itself."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.source = source_of(FILE)
        cls.tree = ast.parse(cls.source)
        cls.rooms = rooms_of(cls.source)

    def test_rooms_stand_in_their_order_and_each_opens_with_its_law(self) -> None:
        self.assertEqual(tuple(self.rooms), ROOMS)
        banners = re.findall("^# ---- (.+) -+\n# Law: ", self.source, re.MULTILINE)
        self.assertEqual(tuple(banners), ROOMS[1:])

    def test_a_room_uses_only_names_of_rooms_above(self) -> None:
        later = {name for room in self.rooms.values() for name in names_defined(room)}
        for title, room in self.rooms.items():
            later -= set(names_defined(room))
            with self.subTest(title):
                self.assertEqual(sorted(later & set(names_used(room))), [])

    def test_pure_rooms_name_nothing_that_touches_the_world(self) -> None:
        for title in PURE_ROOMS:
            with self.subTest(title):
                used = set(names_used(self.rooms[title]))
                self.assertEqual(sorted(used & IMPURE_NAMES), [])

    def test_all_holds_the_public_names_each_defined_here_and_documented(self) -> None:
        self.assertEqual(frozenset(flowserver.__all__), PUBLIC_NAMES)
        for name in flowserver.__all__:
            with self.subTest(name):
                thing = getattr(flowserver, name)
                self.assertEqual(thing.__module__, "flowserver")
                self.assertTrue(ast.get_docstring(self.definition(name)))

    def test_what_public_functions_return_is_public(self) -> None:
        classes = {s.name for s in self.tree.body if isinstance(s, ast.ClassDef)}
        returned = set()
        for thing in map(self.definition, flowserver.__all__):
            for one in ast.walk(thing):
                if isinstance(one, Function) and not one.name.startswith("_"):
                    parts = ast.walk(one.returns or one)
                    returned |= {p.id for p in parts if isinstance(p, ast.Name)}
        self.assertLessEqual({"Body", "Progress", "Response"}, returned)
        self.assertEqual(returned & classes - set(flowserver.__all__), set())

    def definition(self, name: str) -> Any:
        found = [s for s in self.tree.body if getattr(s, "name", "") == name]
        self.assertEqual(len(found), 1)
        return found[0]

    def test_what_has_a_public_name_has_a_docstring(self) -> None:
        shelves = [self.tree] + [
            c
            for c in self.tree.body
            if isinstance(c, ast.ClassDef) and c.name[0] != "_"
        ]
        bare = [
            thing.name
            for shelf in shelves
            for thing in shelf.body
            if isinstance(thing, Function + (ast.ClassDef,))
            and not thing.name.startswith("_")
            and not ast.get_docstring(thing)
        ]
        self.assertEqual(bare, [])

    def test_functions_are_short(self) -> None:
        lines = self.source.splitlines()
        sizes = {
            f"{node.name} in line {node.lineno}": code_size(node, lines)
            for node in ast.walk(self.tree)
            if isinstance(node, Function)
        }
        self.assertEqual({name: n for name, n in sizes.items() if n > 40}, {})
        self.assertLessEqual(statistics.median(sizes.values()), 8)

    def test_no_function_changes_what_belongs_to_the_module(self) -> None:
        own = {name for room in self.rooms.values() for name in names_defined(room)}
        changed = []
        for node in ast.walk(self.tree):
            target = None
            if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                target = node.value
            if isinstance(node, ast.Attribute) and node.attr in CHANGERS:
                target = node.value
            if isinstance(target, ast.Name) and target.id in own and node.col_offset:
                changed.append(f"{target.id} in line {node.lineno}")
            self.assertNotIsInstance(node, ast.Global)
        self.assertEqual(changed, [])

    def test_only_the_standard_library_is_imported(self) -> None:
        names = set()
        nodes = list(ast.walk(self.tree))
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                for statement in node.body:  # which is never run
                    nodes.remove(statement)
        for node in nodes:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                self.assertEqual(node.level, 0)
                names.add(str(node.module))
        names -= {"fcntl", "msvcrt"}  # each on one of the systems only
        result = python("-I", "-S", "-c", "import " + ", ".join(sorted(names)))
        self.assertEqual((result.returncode, result.stderr), (0, ""))

    def test_importing_has_no_side_effects(self) -> None:
        with temporary_folder() as folder:
            result = python("-I", "-B", "-c", IMPORT_WATCHED, FILE, cwd=folder)
            self.assertEqual((result.stdout, result.stderr), ("[]\n1\n[]\n", ""))
            self.assertEqual(os.listdir(folder), [])

    def test_licence_and_version_travel_inside_the_file(self) -> None:
        self.assertRegex(flowserver.__version__, r"\A[0-9]+\.[0-9]+\.[0-9]+\Z")
        for words in (
            "Permission is hereby granted, free of charge",
            'PROVIDED "AS IS"',
        ):
            self.assertIn(words, self.source)


IMPORT_WATCHED = """
import sys
sys.path.insert(0, sys.argv[1].rpartition("flowserver.py")[0])
import argparse, base64, configparser, hmac, http.server, ipaddress, logging.handlers
import secrets, signal, threading, unicodedata, urllib.parse, zlib, typing
seen = []
def watch(event, arguments):
    writes = event == "open" and str(arguments[1])[:1] in "wax+"
    acts = event.startswith(("socket.", "subprocess.", "os.", "shutil.", "tempfile."))
    if writes or acts and event not in ("os.listdir", "os.scandir"):
        seen.append(event)
sys.addaudithook(watch)
import flowserver
print(seen)
print(threading.active_count())
print(logging.getLogger("flowserver").handlers + logging.getLogger().handlers)
"""


def python(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run this Python; return what came of it, as text."""
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=PATIENCE, **how
    )


def conf_ini() -> str:
    """Return the text of a conf.ini with every key, its default and its sentence."""
    lines = ["# flowserver's settings: the defaults, but log_file has none."]
    lines += ["# Paths are relative to this file.  Sizes: 8M, 10G.  Times: 30s, 2d."]
    section = ""
    for name, setting in flowserver.settings_table().items():
        if setting.section != section:
            section = setting.section
            lines += ["", f"[{section}]"]
        lines += [f"# {setting.sentence}", f"{name} = {setting.default}".rstrip()]
    return "\n".join(lines) + "\n"


def settings_markdown() -> str:
    """Return the README's table of settings."""
    rows = ["| section | key | default | meaning |", "|---|---|---|---|"]
    for name, setting in flowserver.settings_table().items():
        default = f"`{setting.default}`" if setting.default else ""
        rows += [f"| {setting.section} | `{name}` | {default} | {setting.sentence} |"]
    return "\n".join(rows) + "\n"


IS_ALONE = not os.path.exists(os.path.join(HOME, "README.md")) and not os.path.exists(
    os.path.join(HOME, "conf.ini")
)


@unittest.skipIf(IS_ALONE, "the file was taken without its README and conf.ini")
class ReadmeTest(unittest.TestCase):
    """README and conf.ini say what the file says."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.readme = source_of(os.path.join(HOME, "README.md"))

    def test_readme_has_the_table_of_settings(self) -> None:
        self.assertIn(settings_markdown(), self.readme)

    def test_readme_has_the_commands_to_run_and_to_test(self) -> None:
        for command in ("python flowserver.py", "python test_flowserver.py"):
            with self.subTest(command):
                self.assertRegex(self.readme, rf"(?m)^[ $]*{re.escape(command)}$")

    def test_what_its_commands_make_is_no_part_of_the_project(self) -> None:
        ignored = source_of(os.path.join(HOME, ".gitignore")).splitlines()
        for name in ("/uploads/", "/users", "*.log"):
            self.assertIn(name, ignored)

    def test_changelog_names_this_version(self) -> None:
        changelog = re.split("(?i)#.*changelog", self.readme)[-1]
        self.assertIn(flowserver.__version__, changelog)

    def test_examples_of_the_readme_use_public_names(self) -> None:
        imports = re.findall(r"(?m)^ *from flowserver import ([\w, ]+)", self.readme)
        self.assertTrue(imports)
        for name in re.findall(r"\w+", " ".join(imports)):
            self.assertIn(name, flowserver.__all__)


class ConfIniTest(unittest.TestCase):
    """The conf.ini that is shipped."""

    @unittest.skipIf(IS_ALONE, "the file was taken without its README and conf.ini")
    def test_shipped_file_is_the_generated_one_with_a_log_file(self) -> None:
        generated = conf_ini()
        self.assertEqual(generated.count("\nlog_file =\n"), 1)
        self.assertEqual(
            source_of(os.path.join(HOME, "conf.ini")),
            generated.replace("\nlog_file =\n", "\nlog_file = flowserver.log\n"),
        )

    def test_generated_file_says_the_defaults(self) -> None:
        with temporary_folder() as folder:
            read = flowserver.load_settings(conf_file(folder, conf_ini()), {})
        for name in flowserver.settings_table():
            with self.subTest(name):
                value, default = getattr(read, name), getattr(Settings(), name)
                is_path = name.endswith("_dir") and default
                self.assertEqual(
                    value, os.path.join(folder, default) if is_path else default
                )

    def test_generated_file_has_one_sentence_for_each_key(self) -> None:
        entries = re.findall(r"(?m)^# (.+\.)\n([a-z_]+) =", conf_ini())
        self.assertEqual([key for _, key in entries], list(flowserver.settings_table()))


# ---- settings ------------------------------------------------------------------------


def conf_file(folder: str, text: str, encoding: str = "utf-8") -> str:
    """Write a conf.ini and return its path."""
    path = os.path.join(folder, "conf.ini")
    with open(path, "w", encoding=encoding) as file:
        file.write(text)
    return path


class SettingsTest(unittest.TestCase):
    """The table of settings, and every way to set one."""

    def test_text_is_read_as_its_setting_means_it(self) -> None:
        cases = {
            ("port", "0"): 0,
            ("port", "65535"): 65535,
            ("max_chunk_size", "1048576"): MIB,
            ("max_chunk_size", "8M"): 8 * MIB,
            ("max_chunk_size", "8m"): 8 * MIB,
            ("max_chunk_size", "10 G"): 10 << 30,
            ("max_file_size", "2T"): 2 << 40,
            ("max_file_size", "1.5G"): 3 << 29,
            ("max_file_size", "100 MB"): 100 * MIB,
            ("max_file_size", "0.5 kib"): 512,
            ("max_file_size", "999999999999999"): 10**15 - 1,
            ("log_max_size", "64K"): 64 * KIB,
            ("timeout", "90"): 90,
            ("timeout", "30s"): 30,
            ("timeout", "5m"): 300,
            ("stale_after", "12h"): 43200,
            ("stale_after", "2d"): 172800,
            ("sync", "yes"): True,
            ("sync", "OFF"): False,
            ("on_conflict", "refuse"): "refuse",
            ("allow_origins", "https://a.example, http://b.example:8080"): (
                "https://a.example",
                "http://b.example:8080",
            ),
            ("log_level", "debug"): "debug",
            ("host", "  0.0.0.0 "): "0.0.0.0",
        }
        for (name, text), value in cases.items():
            with self.subTest(name=name, text=text):
                self.assertEqual(getattr(Settings(**{name: text}), name), value)

    def test_text_that_is_no_value_is_refused_in_one_sentence(self) -> None:
        cases = {
            "port": ("65536", "-1", "+1", "8_0", "8000.0", "http", "", "\u0663"),
            "max_chunk_size": ("8X", "-1", "1.5", "M", "1e3", "\u0663", "9" * 16, "")
            + ("1,5G", "1.G", ".5G", "8Mi", "MB", "8MBB"),
            "timeout": ("1w", "soon", "-5s", "1.5", "0x10"),
            "max_uploads": ("many", "1K", "-1", "1_000", "9" * 10),
            "sync": ("maybe", "", "2"),
            "on_conflict": ("overwrite", "", "Rename"),
            "log_level": ("loud", "INFO"),
            "trusted_proxies": ("10.0.0.0/33", "proxy.example"),
            "host": ("", "127.0.0.1 # this machine"),
            "upload_path": ("", "upload", "/up load", "/upload?")
            + ("/", "/health", "/sample/", "/sample/x"),  # which are taken
            "chunk_size": ("0", "0M"),  # of which no file could ever be made
            "allow_origins": ("example.com", "https://example.com/"),
            "allow_hosts": ("https://example.com", "example.com/", "::1"),
        }
        for name, texts in cases.items():
            for text in texts:
                with self.subTest(name=name, text=text):
                    with self.assertRaises(flowserver.SettingsError) as caught:
                        Settings(**{name: text})
                    message = str(caught.exception)
                    self.assertTrue(message.startswith(f'{name}: "{text}" '), message)
                    self.assertRegex(message, r"\A[^\n]+\.\Z")

    def test_python_values_are_taken_as_they_are(self) -> None:
        settings = Settings(port=0, sync=False, allow_hosts=["a", "b"], temp_dir=None)
        self.assertIs(settings.sync, False)
        self.assertEqual(settings.allow_hosts, ("a", "b"))
        self.assertEqual((settings.port, settings.temp_dir), (0, ""))
        self.assertIn("allow_hosts=('a', 'b')", repr(settings))

    def test_unknown_setting_is_refused(self) -> None:
        with self.assertRaisesRegex(flowserver.SettingsError, 'no setting "colour"'):
            Settings(colour="red")

    def test_environment_variable_that_is_not_set_is_named(self) -> None:
        for text in ("$FLOW_NONE/in", "~/${FLOW_NONE}"):
            with self.assertRaisesRegex(flowserver.SettingsError, "FLOW_NONE"):
                Settings(upload_dir=text)
        self.assertEqual(Settings(upload_dir="in$/a$.b").upload_dir, "in$/a$.b")

    def test_networks_take_addresses_and_ranges(self) -> None:
        networks = Settings(trusted_proxies="10.0.0.1/8 ::1").trusted_proxies
        self.assertEqual([str(n) for n in networks], ["10.0.0.0/8", "::1/128"])

    def test_design_fixes_sections_and_defaults(self) -> None:
        self.assertEqual(
            [(s.section, k, s.default) for k, s in flowserver.settings_table().items()],
            [tuple(row.split(" ", 2)) for row in DESIGNED_SETTINGS.strip().split("\n")],
        )


DESIGNED_SETTINGS = """
server host 127.0.0.1
server port 8000
server upload_path /upload
server sample_dir sample
server certificate {e}
server private_key {e}
server max_connections 1000
server timeout 60s
server trusted_proxies {e}
storage upload_dir uploads
storage temp_dir {e}
storage sync on
storage on_conflict rename
storage stale_after 7d
storage keep_receipts 1h
storage min_free_space 100M
limits max_file_size 0
limits max_chunk_size 0
limits max_uploads 10000
client chunk_size 1M
client parameter_prefix {e}
access users_file {e}
access allow_origins {e}
access allow_hosts {e}
log log_file {e}
log log_level info
log log_max_size 10M
log log_backups 5
""".format(e="")


class LoadSettingsTest(unittest.TestCase):
    """conf.ini and flags."""

    def setUp(self) -> None:
        self.folder = self.enterContext(temporary_folder())

    def enterContext(self, context: Any) -> Any:
        """As unittest's own, which Python 3.11 brought."""
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    def load(self, text: str, **flags: str) -> Settings:
        return flowserver.load_settings(conf_file(self.folder, text), flags)

    def refusal(self, text: str, **flags: str) -> str:
        with self.assertRaises(flowserver.SettingsError) as caught:
            self.load(text, **flags)
        return str(caught.exception)

    def test_flags_win_over_the_file_which_wins_over_the_defaults(self) -> None:
        settings = self.load("[server]\nport = 81\nhost = ::1\n", port="82")
        self.assertEqual((settings.port, settings.host), (82, "::1"))
        self.assertEqual(settings.upload_path, "/upload")

    def test_without_a_file_the_defaults_hold(self) -> None:
        self.assertEqual(repr(flowserver.load_settings("", {})), repr(Settings()))

    def test_paths_in_the_file_are_relative_to_the_file(self) -> None:
        settings = self.load("[storage]\nupload_dir = in\n[log]\nlog_file = a/b.log\n")
        self.assertEqual(settings.upload_dir, os.path.join(self.folder, "in"))
        self.assertEqual(settings.log_file, os.path.join(self.folder, "a/b.log"))

    def test_paths_of_flags_are_relative_to_the_current_folder(self) -> None:
        settings = self.load("", upload_dir="in", log_file="")
        self.assertEqual(settings.upload_dir, os.path.join(os.getcwd(), "in"))
        self.assertEqual(settings.log_file, "")

    def test_home_and_environment_are_expanded(self) -> None:
        with mock.patch.dict(os.environ, {"FLOW_TEST": os.path.join(self.folder, "x")}):
            settings = self.load("[storage]\nupload_dir=$FLOW_TEST/y\ntemp_dir = ~/z\n")
        self.assertEqual(settings.upload_dir, os.path.join(self.folder, "x") + "/y")
        self.assertEqual(settings.temp_dir, os.path.expanduser("~/z"))

    def test_folder_of_the_file_is_taken_as_it_is_named(self) -> None:
        folder = os.path.join(self.folder, "$FLOW_TEST")
        os.mkdir(folder)
        path = conf_file(folder, "[storage]\nupload_dir = in\n")
        with mock.patch.dict(os.environ, {"FLOW_TEST": "elsewhere"}):
            settings = flowserver.load_settings(path, {})
        self.assertEqual(settings.upload_dir, os.path.join(folder, "in"))

    def test_an_indented_key_is_a_key(self) -> None:
        """Else `users_file` would be a host name, and nobody asked for a password."""
        text = "[access]\n  allow_hosts = a\n\n    users_file = users\n"
        settings = self.load(text)
        self.assertEqual(settings.allow_hosts, ("a",))
        self.assertEqual(settings.users_file, os.path.join(self.folder, "users"))

    def test_percent_signs_mean_themselves(self) -> None:
        settings = self.load("[storage]\nupload_dir = 100%(host)s%%\n")
        self.assertEqual(
            settings.upload_dir, os.path.join(self.folder, "100%(host)s%%")
        )

    def test_file_of_windows_is_read(self) -> None:
        text = "[server]\r\nport = 81\r\n[storage]\r\nupload_dir = Gr\u00fc\u00dfe\r\n"
        path = conf_file(self.folder, text, encoding="utf-8-sig")
        settings = flowserver.load_settings(path, {})
        self.assertEqual(settings.port, 81)
        self.assertEqual(
            settings.upload_dir, os.path.join(self.folder, "Gr\u00fc\u00dfe")
        )

    def test_a_mistake_is_named_with_file_section_key_and_value(self) -> None:
        cases = {
            "[server]\nport = many\n": ("[server]", "port", '"many"'),
            "[server]\nprot = 80\n": ("[server]", "prot", '"80"'),
            "[storage]\nport = 80\n": ("[storage]", "port", '"80"'),
            "[servers]\nport = 80\n": ("[servers]",),
            "[empty]\n": ("[empty]",),
            "[DEFAULT]\nport = 80\n": ("[DEFAULT]",),
            "port = 80\n": ("port",),
            "[server]\nport = 80\nport = 81\n": ("port",),
            "[server]\nport\n": ("port",),
        }
        for text, words in cases.items():
            with self.subTest(text):
                message = self.refusal(text)
                self.assertRegex(message, r"\A[^\n]+\.\Z")
                for word in (os.path.join(self.folder, "conf.ini"),) + words:
                    self.assertIn(word, message)

    def test_a_comment_behind_a_value_is_refused_with_the_reason(self) -> None:
        for section, entry in (
            ("server", "port = 8000 ; the usual one"),
            ("storage", "upload_dir = uploads # of clients"),
            ("storage", "temp_dir = ; beside them"),
        ):
            message = self.refusal(f"[{section}]\n; a comment\n # another\n{entry}\n")
            self.assertIn("a comment needs a line of its own", message)
        settings = self.load("[storage]\nupload_dir = a;b#c\n")
        self.assertEqual(settings.upload_dir, os.path.join(self.folder, "a;b#c"))

    def test_folder_of_samples_may_be_missing_where_nobody_has_chosen_it(self) -> None:
        for text in ("", "[server]\nsample_dir = sample\n"):
            flowserver._require_apart(self.load(text))
        for text in ("[server]\nsample_dir = samples\n", "[server]\nsample_dir = /x\n"):
            with self.assertRaisesRegex(flowserver.SettingsError, "sample_dir"):
                flowserver._require_apart(self.load(text))

    def test_a_mistake_in_a_flag_is_named(self) -> None:
        message = self.refusal("", max_chunk_size="big")
        self.assertTrue(message.startswith('--max-chunk-size: "big" '), message)

    def test_a_file_that_is_missing_or_no_text_is_named(self) -> None:
        missing = os.path.join(self.folder, "missing.ini")
        with self.assertRaisesRegex(
            flowserver.SettingsError, "missing.ini can't be read"
        ):
            flowserver.load_settings(missing, {})
        path = conf_file(self.folder, "[server]\nhost = \xff\n", encoding="latin-1")
        with self.assertRaisesRegex(flowserver.SettingsError, "conf.ini can't be read"):
            flowserver.load_settings(path, {})

    def test_config_is_named_by_argument_then_environment_then_place(self) -> None:
        beside = os.path.join(os.path.dirname(FILE), "conf.ini")
        beside = beside if os.path.exists(beside) else ""
        with mock.patch.dict(os.environ, {"FLOWSERVER_CONFIG": "env.ini"}):
            self.assertEqual(flowserver.find_config("arg.ini"), "arg.ini")
            self.assertEqual(flowserver.find_config(""), "")
            self.assertEqual(flowserver.find_config(None), "env.ini")
            del os.environ["FLOWSERVER_CONFIG"]
            self.assertEqual(flowserver.find_config(None), beside)


# ---- multipart -----------------------------------------------------------------------

Parsed = List[Tuple[str, Optional[str], str, bytes]]


def parse(blocks: Sequence[bytes], boundary: str = "B", **limits: int) -> Parsed:
    """Return name, filename, type and bytes of each part; check what feed() gives."""
    parser = MultipartParser(boundary.encode(), **limits)
    parts: Parsed = []
    is_open = False
    for block in blocks:
        for event in parser.feed(block):
            assert is_open != isinstance(event, Part), "a part within a part, or none"
            if isinstance(event, Part):
                parts.append(tuple(event) + (b"",))  # type: ignore[arg-type]
            elif event is not None:
                assert len(event) > 0, "an empty block"
                parts[-1] = parts[-1][:3] + (parts[-1][3] + bytes(event),)
            is_open = event is not None
    parser.close()
    assert not is_open
    return parts


def lines(*texts: str) -> bytes:
    """Return lines as they stand in a form."""
    return b"".join(text.encode() + b"\r\n" for text in texts)


FIELD = 'Content-Disposition: form-data; name="a"'
UPLOADED = 'Content-Disposition: form-data; name="f"; filename="x.bin"'

# What is sent, and what it is.
FORMS: Dict[str, Tuple[bytes, Parsed]] = {
    "no part": (b"--B--\r\n", []),
    "no line end at the end": (b"--B--", []),
    "one field": (lines("--B", FIELD, "", "1", "--B--"), [("a", None, "", b"1")]),
    "empty field": (lines("--B", FIELD, "", "", "--B--"), [("a", None, "", b"")]),
    "empty file": (lines("--B", UPLOADED, "", "", "--B--"), [("f", "x.bin", "", b"")]),
    "type of a file": (
        lines("--B", UPLOADED, "Content-Type: a/b", "", "1", "--B--"),
        [("f", "x.bin", "a/b", b"1")],
    ),
    "empty filename is a file": (
        lines("--B", FIELD + '; filename=""', "", "1", "--B--"),
        [("a", "", "", b"1")],
    ),
    "fields and a file": (
        lines("--B", FIELD, "", "1", "--B", UPLOADED, "", "23", "--B--"),
        [("a", None, "", b"1"), ("f", "x.bin", "", b"23")],
    ),
    "field after the file": (
        lines("--B", UPLOADED, "", "23", "--B", FIELD, "", "1", "--B--"),
        [("f", "x.bin", "", b"23"), ("a", None, "", b"1")],
    ),
    "preamble and epilogue": (
        lines("hello", "--b", "--B", FIELD, "", "1", "--B--", "--B", "bye"),
        [("a", None, "", b"1")],
    ),
    "line end before the first boundary": (
        lines("", "--B", FIELD, "", "1", "--B--"),
        [("a", None, "", b"1")],
    ),
    "transport padding": (
        lines("--B \t ", FIELD, "", "1", "--B-- \t"),
        [("a", None, "", b"1")],
    ),
    "line ends at both ends of the data": (
        lines("--B", UPLOADED, "", "\r\n1\r\n", "--B--"),
        [("f", "x.bin", "", b"\r\n1\r\n")],
    ),
    "data of nothing but CR": (
        lines("--B", UPLOADED, "", "\r\r\r", "--B--"),
        [("f", "x.bin", "", b"\r\r\r")],
    ),
    "almost boundaries": (
        lines("--B", UPLOADED, "", "--B\r\n--A\r\n-B\n--B\r--B\r\n--", "--B--"),
        [("f", "x.bin", "", b"--B\r\n--A\r\n-B\n--B\r--B\r\n--")],
    ),
    "a boundary begins within a boundary": (
        lines("--B", UPLOADED, "", "\r\n-\r\n-\r\r\n-", "--B--"),
        [("f", "x.bin", "", b"\r\n-\r\n-\r\r\n-")],
    ),
    "names of headers in any case": (
        lines("--B", "content-DISPOSITION:form-data;NAME=a", "", "1", "--B--"),
        [("a", None, "", b"1")],
    ),
    "UTF-8 names": (
        lines("--B", 'Content-Disposition: form-data; name="日"', "", "本", "--B--"),
        [("日", None, "", "本".encode())],
    ),
    "harmless encoding": (
        lines("--B", FIELD, "Content-Transfer-Encoding: Binary", "", "1", "--B--"),
        [("a", None, "", b"1")],
    ),
}

# What is sent, and the word that its refusal must hold.
BROKEN_FORMS: Dict[str, Tuple[bytes, str]] = {
    "nothing": (b"", "ended"),
    "another boundary": (lines("--C", FIELD, "", "1", "--C--"), "ended"),
    "cut in the header": (lines("--B", FIELD), "ended"),
    "cut in the data": (lines("--B", FIELD, "", "123"), "ended"),
    "cut before the last dash": (lines("--B", FIELD, "", "1") + b"--B-", "ended"),
    "cut after a boundary": (lines("--B", FIELD, "", "1") + b"--B\r\n", "ended"),
    "text behind a boundary": (lines("--Bx", FIELD, "", "1", "--B--"), "other text"),
    "longer boundary": (lines("--BB", FIELD, "", "1", "--BB--"), "other text"),
    "bare LF": (lines("--B\n" + FIELD, "", "1", "--B--"), "other text"),
    "endless padding": (b"--B" + b" " * 100 + b"\r\n", "other text"),
    "no headers": (lines("--B", "", "1", "", "--B--"), "can't be read"),
    "no colon": (lines("--B", "Content", "", "1", "--B--"), "can't be read"),
    "blank before colon": (
        lines("--B", FIELD, "A : b", "", "1", "--B--"),
        "can't be read",
    ),
    "folded header": (lines("--B", FIELD, " more", "", "1", "--B--"), "can't be read"),
    "NUL in a header": (
        lines("--B", FIELD, "A: \0", "", "1", "--B--"),
        "can't be read",
    ),
    "header twice": (lines("--B", FIELD, FIELD, "", "1", "--B--"), "can't be read"),
    "not UTF-8": (lines("--B", FIELD) + b"A: \xff\r\n\r\n1\r\n--B--", "UTF-8"),
    "no name": (
        lines("--B", "Content-Disposition: form-data", "", "", "--B--"),
        "no name",
    ),
    "no disposition": (lines("--B", "Content-Type: a/b", "", "", "--B--"), "no name"),
    "attachment": (
        lines("--B", 'Content-Disposition: attachment; name="a"', "", "", "--B--"),
        "no name",
    ),
    "name in star form only": (
        lines("--B", "Content-Disposition: form-data; name*=a", "", "", "--B--"),
        "no name",
    ),
    "encoded part": (
        lines("--B", FIELD, "Content-Transfer-Encoding: base64", "", "MQ", "--B--"),
        "encoded",
    ),
    "name twice": (lines("--B", FIELD + "; name=b", "", "", "--B--"), "twice"),
}


class MultipartTest(unittest.TestCase):
    """Bytes in, parts out; however the bytes were cut."""

    def test_parts_are_the_same_however_the_body_is_cut(self) -> None:
        for name, (body, parts) in FORMS.items():
            for blocks in split_every_way(body):
                with self.subTest(name, blocks=len(blocks), first=len(blocks[0])):
                    self.assertEqual(parse(blocks), parts)

    def test_broken_forms_are_refused_however_they_are_cut(self) -> None:
        for name, (body, words) in BROKEN_FORMS.items():
            for blocks in split_every_way(body):
                with self.subTest(name, blocks=len(blocks)):
                    with self.assertRaisesRegex(flowserver.Malformed, words):
                        parse(blocks)

    def test_truncation_anywhere_is_noticed(self) -> None:
        body, _ = FORMS["fields and a file"]
        for size in range(len(body) - 2):  # the very last line end is not needed
            with self.subTest(size):
                with self.assertRaises(flowserver.Truncated):
                    parse([body[:size]])

    def test_buffer_that_is_used_again_changes_nothing(self) -> None:
        body, parts = FORMS["almost boundaries"]
        buffer, parser, data = bytearray(7), MultipartParser(b"B"), b""
        for start in range(0, len(body), 5):
            size = len(body[start : start + 5])
            buffer[:size] = body[start : start + 5]
            events = parser.feed(buffer, size)
            data += b"".join(bytes(e) for e in events if isinstance(e, memoryview))
            buffer[:] = b"--B\r\nX"
        parser.close()
        self.assertEqual(data, parts[0][3])

    def test_long_block_is_not_copied(self) -> None:
        parser = MultipartParser(b"B" * 70)
        list(parser.feed(lines("--" + "B" * 70, UPLOADED, "")))
        block = bytearray(noise(64 * KIB).replace(b"\r", b"."))
        block[-60:-58] = b"\r\n"  # begins no boundary
        (event,) = parser.feed(block)
        block[0] ^= 1
        self.assertEqual(event, block)

    def data_of(self, blocks: Sequence[bytes], expected: int) -> bytes:
        """Return the data of a form's only part, of which a size is expected."""
        parser, data = flowserver.MultipartParser(b"B"), b""
        for block in blocks:
            for event in parser.feed(block):
                if isinstance(event, flowserver.Part):
                    parser.expect(expected)
                elif event is not None:
                    data += event
        parser.close()
        return data

    def test_expected_data_may_hold_the_boundary(self) -> None:
        data = b"one\r\n--B\r\ntwo\r\n--B--\r\nthree"
        form = lines("--B", UPLOADED, "", data.decode(), "--B--")
        for blocks in split_every_way(form):
            self.assertEqual(self.data_of(blocks, len(data)), data)

    def test_data_of_another_size_than_expected_ends_at_the_boundary(self) -> None:
        form = lines("--B", UPLOADED, "", "12345", "--B--")
        for expected in (0, 1, 4, 5, 6):
            self.assertEqual(self.data_of([form], expected), b"12345")
        for blocks in split_every_way(form):
            with contextlib.suppress(flowserver.Truncated):
                # Taken for data by half, it is no form any more: never a short file.
                self.assertEqual(self.data_of(blocks, 99), b"12345")
            self.assertEqual(self.data_of(blocks, 3), b"12345")

    def test_junk_outside_of_the_parts_is_bounded(self) -> None:
        body, parts = FORMS["one field"]  # its last line end is junk, too
        cases = {
            (0, 98): True,
            (50, 48): True,
            (98, 0): True,
            (0, 99): False,
            (50, 49): False,
            (99, 0): False,
            (9999, 0): False,
            (0, 9999): False,
        }
        for (before, after), is_good in cases.items():
            form = (b"." * before + b"\r\n" if before else b"") + body + b"." * after
            expected = parts if is_good else "Malformed: The form has too many bytes"
            for blocks in ([form], [form[:30], form[30:]], [form[:-1], form[-1:]]):
                with self.subTest(before=before, after=after, blocks=len(blocks)):
                    found = outcome(blocks, max_junk_size=100)
                    self.assertEqual(found[: len(expected)], expected)

    def test_number_of_parts_is_bounded(self) -> None:
        body = lines(*["--B", FIELD, "", "1"] * 3, "--B--")
        self.assertEqual(len(parse([body], max_parts=3)), 3)
        for blocks in split_every_way(body):
            with self.assertRaisesRegex(flowserver.Malformed, "too many parts"):
                parse(blocks, max_parts=2)

    def test_header_of_a_part_is_bounded(self) -> None:
        body = lines("--B", FIELD, "A: " + "b" * 50, "", "1", "--B--")
        size = len(FIELD) + 2 + 53 + 4
        self.assertEqual(len(parse([body], max_header_size=size)), 1)
        for blocks in split_every_way(body):
            with self.assertRaisesRegex(flowserver.Malformed, "too long"):
                parse(blocks, max_header_size=size - 1)

    def test_first_error_is_the_last_word(self) -> None:
        parser = MultipartParser(b"B")
        for block in (b"--B?\r\n", b"--B--"):
            with self.assertRaisesRegex(flowserver.Malformed, "other text"):
                list(parser.feed(block))
        with self.assertRaisesRegex(flowserver.Malformed, "other text"):
            parser.close()

    def test_what_could_begin_a_boundary_is_all_that_is_held_back(self) -> None:
        """CVE-2023-46136: data that begins with a line end and has no other."""
        for data in (b"\r\n" + b"." * 5000, b"\r" * 5000, b"\r\n--" * 1250):
            parser, seen = MultipartParser(b"B" * 70), 0
            list(parser.feed(lines("--" + "B" * 70, UPLOADED, "")))
            for sent in range(0, 5000, 50):
                events = parser.feed(data[sent : sent + 50])
                seen += sum(len(e) for e in events if isinstance(e, memoryview))
                self.assertGreater(seen, sent + 50 - 74)

    def test_damaged_forms_are_parsed_or_refused_alike_however_cut(self) -> None:
        """Whatever arrives, we succeed or raise Malformed, never anything else."""
        chance, good = random.Random(7), FORMS["fields and a file"][0]
        for number in range(400):
            body = damaged(good, chance)
            cut = chance.randrange(len(body) + 1)
            whole = outcome([body])
            with self.subTest(number, body=body):
                self.assertEqual(outcome([body[:cut], body[cut:]]), whole)
                self.assertEqual(
                    outcome([body[i : i + 1] for i in range(len(body))]), whole
                )


def damaged(body: bytes, chance: random.Random) -> bytes:
    """Return a body with some of its bytes lost, doubled, or others."""
    for _ in range(chance.randrange(1, 5)):
        place = chance.randrange(len(body))
        piece = chance.choice(
            [b"", b"\r\n", b"--B", b"-", b'"', b"\xff", b"\0", b";", b"B"]
        )
        body = body[:place] + piece + body[place + chance.randrange(4) :]
    return body


def outcome(blocks: Sequence[bytes], **limits: int) -> Union[Parsed, str]:
    """Return the parts, or how the form was refused."""
    try:
        return parse(blocks, **limits)
    except flowserver.Malformed as error:
        return f"{type(error).__name__}: {error}"


class OptionsTest(unittest.TestCase):
    """Content-Type and Content-Disposition."""

    def test_options_are_read_as_browsers_write_them(self) -> None:
        cases = {
            "form-data": {},
            "form-data; name=a": {"name": "a"},
            'FORM-DATA ;\tname="a" ; filename=b': {"name": "a", "filename": "b"},
            'form-data; name=""': {"name": ""},
            "form-data; name=\"a;b='c'\"": {"name": "a;b='c'"},
            'form-data; name="a%22b"': {"name": "a%22b"},
            'form-data; name="a\\"b"': {"name": 'a"b'},
            'form-data; name="C:\\dir\\x"': {"name": "C:\\dir\\x"},
            'form-data; filename="a\\"; name=b': {"filename": "a\\", "name": "b"},
            "form-data; name=a; filename*=UTF-8''b": {"name": "a"},
            'form-data; name="日本"': {"name": "日本"},
        }
        for text, options in cases.items():
            with self.subTest(text):
                self.assertEqual(flowserver.parse_options(text), ("form-data", options))

    def test_options_that_are_not_written_so_are_refused(self) -> None:
        cases = (
            "a; b",
            "a; b=",
            "a; b c=d",
            'a; b="c',
            'a; b="c"d',
            "a;",
            "a; ;b=c",
            "a; b=c; B=d",
            "a; b=c, d=e",
            "a; =c",
            'a; b="c" d',
            "a; b*=1; b*=2",
        )
        for text in cases:
            with self.subTest(text):
                with self.assertRaises(flowserver.Malformed):
                    flowserver.parse_options(text)

    def test_hostile_options_are_read_in_linear_time(self) -> None:
        """CVE-2024-24762, CVE-2025-67726: a quadratic one would take minutes here."""
        for piece in ('\\"', '"', "; a", ' "', "\\", "; ", ' ;\t"a\\"', "="):
            with self.assertRaises(flowserver.Malformed):
                flowserver.parse_options('a; b="' + piece * 200_000 + "\0")

    def test_boundary_is_found_or_refused(self) -> None:
        boundary = flowserver.boundary_of
        self.assertEqual(boundary("multipart/form-data; boundary=a"), b"a")
        self.assertEqual(boundary(' Multipart/Form-Data;BOUNDARY="a b"'), b"a b")
        self.assertEqual(
            boundary("multipart/form-data; boundary=" + "a" * 70), b"a" * 70
        )
        for text in ("", "text/plain", "application/octet-stream; boundary=a"):
            self.assertIsNone(boundary(text))
        for text in (
            "multipart/form-data",
            "multipart/mixed; boundary=a",
            "multipart/form-data; boundary=",
            'multipart/form-data; boundary="a "',
            "multipart/form-data; boundary=" + "a" * 71,
            "multipart/",
            'multipart/form-data; boundary="a\r"',
            "multipart/form-data; boundary=ä",
            "multipart/form-data; boundary=a; boundary=b",
        ):
            with self.subTest(text):
                with self.assertRaises(flowserver.Malformed):
                    boundary(text)


# ---- dialects ------------------------------------------------------------------------

DIALECTS = {dialect.name: dialect for dialect in flowserver.DIALECTS}
# The statuses after which each client does not try again, as its source says.
GIVES_UP = {
    "flow.js": {404, 413, 415, 500, 501},
    "resumable.js": {400, 404, 415, 500, 501},
    "simple-uploader.js": {404, 415, 500, 501},
}
NO_INTEGERS = (
    "+1",
    "-1",
    "1_0",
    "\u0663",
    "\u00b2",
    "1e3",
    "0x1",
    " 1",
    "1 ",
    "1.0",
    "",
    "9" * 16,
    "9" * 30,
    "NaN",
    "null",
    "1\n",
    "\uff11",
)


def meaning(parameters: Mapping[str, str]) -> flowserver.Chunk:
    """Return what parameters mean, in the dialect that they are in."""
    dialect = flowserver.recognise(parameters)
    assert dialect is not None
    return flowserver.parse_chunk(dialect, parameters)


class DialectTest(unittest.TestCase):
    """What parameters mean, and which status a client obeys."""

    def test_chunks_lie_where_the_client_cut_them(self) -> None:
        cases = {  # size, number, chunk size, forced: start, length
            (0, 1, 10, False): (0, 0),
            (0, 1, 10, True): (0, 0),
            (1, 1, 10, False): (0, 1),
            (9, 1, 10, False): (0, 9),
            (10, 1, 10, True): (0, 10),
            (19, 1, 10, False): (0, 19),
            (19, 2, 10, True): (10, 9),
            (20, 2, 10, False): (10, 10),
            (25, 1, 10, False): (0, 10),
            (25, 2, 10, False): (10, 15),
            (25, 3, 10, True): (20, 5),
            (29, 2, 10, False): (10, 19),
        }
        for case, (start, length) in cases.items():
            for prefix in ("flow", "resumable"):
                with self.subTest(case, prefix=prefix):
                    size, number, chunk_size, forced = case
                    sent = flow_parameters(
                        "a", bytes(size), number, chunk_size, forced, prefix
                    )
                    chunk = meaning(sent)
                    self.assertEqual((chunk.start, chunk.length), (start, length))

    def test_anything_but_ascii_digits_is_no_integer(self) -> None:
        for name in ("ChunkNumber", "ChunkSize", "CurrentChunkSize", "TotalSize"):
            for text in NO_INTEGERS:
                if (name, text) == ("ChunkNumber", ""):
                    continue  # asks for the whole upload
                with self.subTest(name, text=text):
                    sent = flow_parameters("a", bytes(25), **{name: text})
                    with self.assertRaisesRegex(flowserver.Malformed, name + " is "):
                        meaning(sent)

    def test_count_that_is_no_integer_is_refused(self) -> None:
        for text in NO_INTEGERS:
            if text:
                with self.subTest(text):
                    with self.assertRaisesRegex(
                        flowserver.Malformed, "TotalChunks is "
                    ):
                        meaning(flow_parameters("a", bytes(25), TotalChunks=text))

    def test_parameters_that_contradict_each_other_are_refused(self) -> None:
        cases = {
            "number 0": {"ChunkNumber": 0},
            "chunk size 0": {"ChunkSize": 0},
            "behind the end": {"ChunkNumber": 3},
            "longer than the file": {"CurrentChunkSize": 26},
            "one byte behind the end": {
                "ChunkSize": 26,
                "CurrentChunkSize": 26,
                "TotalChunks": None,
            },
            "first chunk is short": {"CurrentChunkSize": 9},
            "first chunk is long": {"CurrentChunkSize": 11},
            "last chunk is twice as long": {"ChunkSize": 12, "CurrentChunkSize": 25},
            "last chunk is exactly twice as long": {
                "TotalSize": 20,
                "CurrentChunkSize": 20,
                "TotalChunks": None,
            },
            "empty chunk of a file": {
                "ChunkNumber": 26,
                "ChunkSize": 1,
                "CurrentChunkSize": 0,
            },
            "count too small": {"TotalChunks": 1},
            "count too large": {"TotalChunks": 4},
            "count 0": {"TotalChunks": 0},
            "number above count": {
                "ChunkNumber": 3,
                "CurrentChunkSize": 5,
                "TotalChunks": 2,
            },
            "no identifier": {"Identifier": ""},
            "no name": {"Filename": None, "RelativePath": None},
            "name is the text null": {"Filename": "", "RelativePath": "null"},
        }
        for name, changes in cases.items():
            with self.subTest(name):
                sent = flow_parameters("a", bytes(25), 1, 10, **changes)  # type: ignore
                with self.assertRaises(flowserver.Malformed):
                    meaning(sent)

    def test_count_is_floor_or_ceil_and_not_needed(self) -> None:
        for count in ("2", "3", "", None):
            with self.subTest(count):
                sent = flow_parameters("a", bytes(25), 1, 10, TotalChunks=count)
                self.assertEqual(meaning(sent).length, 10)

    def test_wrong_count_of_resumable_is_not_believed(self) -> None:
        """resumable.js 1.1.0 sends however many chunks it has made so far."""
        for count in ("1", "18", "nonsense"):
            sent = flow_parameters(
                "a", bytes(25), 2, 10, prefix="resumable", TotalChunks=count
            )
            self.assertEqual(meaning(sent).length, 15)

    def test_without_a_number_the_whole_upload_is_meant(self) -> None:
        for number in (None, ""):
            sent = flow_parameters("a", bytes(25), ChunkNumber=number)
            self.assertEqual((meaning(sent).length, meaning(sent).size), (-1, 25))

    def test_path_is_the_filename_when_there_is_none(self) -> None:
        for path in (None, "", "null", "undefined", "false"):
            with self.subTest(path):
                chunk = meaning(flow_parameters("a", b"1", RelativePath=path))
                self.assertEqual((chunk.path, chunk.filename), ("a", "a"))

    def test_filename_is_the_path_when_there_is_none(self) -> None:
        chunk = meaning(flow_parameters("d/a", b"1", Filename=None))
        self.assertEqual((chunk.path, chunk.filename), ("d/a", "d/a"))

    def test_dialects_are_told_apart_by_their_identifier(self) -> None:
        for prefix in ("flow", "resumable"):
            names = dict.fromkeys(("x", prefix + "Identifier", "y"), "")
            self.assertIs(flowserver.recognise(names), DIALECTS[prefix + ".js"])
        names = dict.fromkeys(("flowidentifier", "identifier", "name"), "")
        self.assertIsNone(flowserver.recognise(names))

    def test_prefix_of_ones_own_is_known_beside_the_others(self) -> None:
        rows = flowserver.dialects_with("up_")
        for prefix in ("up_resumable", "up_", "flow"):
            sent = flow_parameters("a", bytes(25), 1, 10, prefix=prefix)
            with self.subTest(prefix):
                dialect = flowserver.recognise(sent, rows)
                self.assertEqual(flowserver.parse_chunk(dialect, sent).length, 10)
                is_known = flowserver.recognise(sent) is not None
                self.assertEqual(is_known, prefix == "flow")
        bare = flow_parameters("a", bytes(25), 1, 10, prefix="")
        for known in (flowserver.dialects_with(""), rows):
            self.assertIsNone(flowserver.recognise(bare, known))

    def test_only_random_identifiers_of_ours_are_secret(self) -> None:
        cases = {
            "flowserver-" + "0a" * 16 + "-1700000000000": True,
            "flowserver-" + "0a" * 15 + "-1700000000000": False,
            "flowserver-" + "0A" * 16 + "-1": False,
            "x-flowserver-" + "0a" * 16 + "-1": False,
            "25-a": False,
        }
        for identifier, is_secret in cases.items():
            with self.subTest(identifier):
                chunk = meaning(flow_parameters("a", b"1", Identifier=identifier))
                self.assertIs(chunk.is_secret, is_secret)

    def test_refusal_for_good_ends_the_upload_in_each_client(self) -> None:
        kinds = (
            flowserver.Malformed,
            flowserver.TooLarge,
            flowserver.Conflict,
            flowserver.Forbidden,
        )
        for name, statuses in GIVES_UP.items():
            for kind in kinds:
                with self.subTest(name, kind=kind.__name__):
                    status = DIALECTS[name].status_of(kind())
                    self.assertIn(status, statuses & set(range(400, 500)))

    def test_truncated_body_may_be_sent_again(self) -> None:
        """It broke off on the way; that is a client's error, but none for good."""
        for name, statuses in GIVES_UP.items():
            status = DIALECTS[name].status_of(flowserver.Truncated())
            self.assertIn(status, set(range(400, 500)) - statuses)

    def test_passing_trouble_is_tried_again_by_each_client(self) -> None:
        for dialect in flowserver.DIALECTS:
            self.assertEqual(dialect.status_of(flowserver.Trouble()), 503)

    def test_every_error_has_a_status_without_a_dialect(self) -> None:
        cases = {
            "Malformed": 400,
            "TooLarge": 413,
            "Conflict": 409,
            "Forbidden": 403,
            "Unauthorized": 401,
            "Missing": 404,
            "BadMethod": 405,
            "Trouble": 503,
        }
        for name, status in cases.items():
            with self.subTest(name):
                self.assertEqual(getattr(flowserver, name).status, status)


LIBRARIES = tuple(DIALECTS)[:-1] + ("Plupload",)


def understood(
    library: str, index: int = 0, name: str = "d/a.bin", size: int = 10, **changes: Any
) -> Tuple[str, Any]:
    """Return whose parameters a library's are, and what they mean of 25 bytes."""
    data = noise(25)
    said = {**parameters_of(library, name, data, index, size), **changes}
    texts = {word: str(text) for word, text in said.items() if text is not None}
    heads = {word.lower(): text for word, text in texts.items()}
    texts.update(flowserver.range_parameters(heads))
    row = flowserver.recognise(texts)
    assert row is not None
    rest = len(data[index * size : (index + 1) * size])
    return row.name, flowserver.parse_chunk(row, texts, name, rest)


class LibraryTest(unittest.TestCase):
    """The row of each library that is not like flow.js's."""

    def test_chunk_of_each_library_lies_where_it_was_cut(self) -> None:
        for library, index in itertools.product(LIBRARIES, range(3)):
            with self.subTest(library, index=index):
                name, chunk = understood(library, index)
                self.assertEqual(name, library)
                lies = (chunk.start, chunk.length, chunk.size)
                self.assertEqual(lies, (10 * index, 5 if index == 2 else 10, 25))
                self.assertIn(chunk.path, ("d/a.bin", "d//a.bin"))

    def test_first_row_wins_whose_marks_are_there(self) -> None:
        said = {name: parameters_of(name, "a", bytes(9), 0, 9) for name in LIBRARIES}
        for first, second in itertools.combinations(LIBRARIES, 2):
            with self.subTest(first, second=second):
                row = flowserver.recognise({**said[second], **said[first]})
                self.assertEqual(row and row.name, first)

    def test_words_that_any_form_may_have_are_no_marks(self) -> None:
        words = "name identifier filename relativePath total totalSize file chunk"
        for word in words.split():
            self.assertIsNone(flowserver.recognise({word: "1"}))

    def test_identifier_that_a_library_drew_is_a_secret(self) -> None:
        drawn = ("Dropzone", "Fine Uploader")
        for library in LIBRARIES:
            chunk = understood(library)[1]
            self.assertIs(chunk.is_secret, library in drawn, library)
            self.assertIs(chunk.is_random, library in drawn, library)

    def test_identifier_that_a_program_gave_in_its_place_is_none(self) -> None:
        """dzuuid=1 may be anybody's."""
        for identifier in ("1", "17-a.bin", "x" * 40):
            chunk = understood("Dropzone", dzuuid=identifier)[1]
            self.assertIs(chunk.is_secret, False, identifier)

    def test_image_that_dropzone_made_smaller_has_the_size_that_came(self) -> None:
        said = {"dztotalfilesize": 2500, "dztotalchunkcount": 1, "dzchunksize": 100}
        chunk = understood("Dropzone", size=100, **said)[1]
        self.assertEqual((chunk.start, chunk.length, chunk.size), (0, 25, 25))

    def test_image_that_dropzone_made_smaller_in_chunks_is_refused(self) -> None:
        """Else each chunk would be taken, and the file would never be complete."""
        for total in (26, 29, 30, 39):
            with self.assertRaises(flowserver.Malformed):
                understood("Dropzone", 2, dztotalfilesize=total)
        said = {"dztotalfilesize": 25, "dztotalchunkcount": 2}  # of 20 bytes
        understood("Dropzone", 0, **said)
        with self.assertRaisesRegex(flowserver.Malformed, "Chunk 2 of 2"):
            understood("Dropzone", 1, **said)

    def test_fine_uploader_without_an_index_sends_all_of_a_file(self) -> None:
        parts = ("qqpartindex", "qqpartbyteoffset", "qqchunksize", "qqtotalparts")
        whole: Dict[str, None] = dict.fromkeys(parts)
        chunk = understood("Fine Uploader", **whole)[1]
        self.assertEqual((chunk.length, chunk.size, chunk.path), (-1, 25, "d//a.bin"))
        raw = understood("Fine Uploader", qqtotalfilesize=None, **whole)[1]
        self.assertEqual((raw.length, raw.size), (-1, -1))

    def test_chunk_that_lost_its_index_is_not_all_of_a_file(self) -> None:
        for library, index in (
            ("Dropzone", "dzchunkindex"),
            ("Fine Uploader", "qqpartindex"),
        ):
            for text in (None, ""):
                with self.assertRaisesRegex(flowserver.Malformed, index):
                    understood(library, 1, **{index: text})
        said: Dict[str, None] = dict.fromkeys(DIALECTS["Dropzone"].names[3:])
        with self.assertRaises(flowserver.Malformed):  # it marks nothing else
            understood("Dropzone", **said)

    def test_plupload_with_chunk_numbers_is_told_what_to_set(self) -> None:
        for chunk, chunks in (("0", "3"), ("1", "3"), ("0", "x"), ("1", "1")):
            said = {"name": "a", "chunk": chunk, "chunks": chunks}
            with self.assertRaisesRegex(flowserver.Malformed, "send_chunk_number"):
                meaning(said)
        for chunks in ("0", "1"):  # all of the file
            said = {"name": "a", "chunk": "0", "chunks": chunks}
            self.assertEqual(meaning(said).length, -1)

    def test_chunk_whose_mark_is_missing_is_known_by_its_other_names(self) -> None:
        marks = {
            **{name: min(DIALECTS[name].marks) for name in LIBRARIES[:4]},
            "simple-uploader.js": "chunkNumber",
        }
        for library, mark in marks.items():
            said = parameters_of(library, "a", bytes(9), 0, 9)
            del said[mark]
            with self.subTest(library), self.assertRaisesRegex(
                flowserver.Malformed, f"of {library}, but {mark} is missing"
            ):
                flowserver.require_marks(said, flowserver.DIALECTS)
        for word in ("chunk", "chunks", "offset"):
            with self.assertRaisesRegex(flowserver.Malformed, "of Plupload"):
                flowserver.require_marks([word, "name"], flowserver.DIALECTS)
        plain = ("name", "identifier", "filename", "relativePath", "total", "file")
        flowserver.require_marks(plain, flowserver.DIALECTS)

    def test_content_range_is_read_strictly(self) -> None:
        for text in (
            "bytes 0-9/*",
            "bytes */25",
            "bytes=0-9/25",
            "items 0-9/25",
            "bytes 0-9",
            "bytes 0-9/25, bytes 10-19/25",
            "bytes -9/25",
            "bytes 0 - 9/25",
            "bytes +0-9/25",
            "bytes 0-9/" + "1" * 16,
            "bytes 0-\u0669/25",
            "bytes  0-9/25",
            "",
        ):
            with self.subTest(text), self.assertRaises(flowserver.Malformed):
                flowserver.range_parameters({"content-range": text})

    def test_parameter_without_a_name_is_nobodys(self) -> None:
        """ "" stands in a row for what a library does not say."""
        for library in ("Dropzone", "Plupload", "Content-Range"):
            self.assertEqual(understood(library, **{"": "x"})[1].path, "d/a.bin")

    def test_name_in_the_head_is_read_as_blueimp_writes_it(self) -> None:
        for text, name in (
            ('attachment; filename="a%20b%C3%A4%25;.bin"', "a b\u00e4%;.bin"),
            ('attachment; filename="d/a.bin"', "d/a.bin"),
            ("attachment", ""),
            ("inline; filename=a.bin", "a.bin"),
        ):
            head = {"content-disposition": text}
            self.assertEqual(flowserver.disposition_name(head), name)
        self.assertEqual(flowserver.disposition_name({}), "")


class NameTest(unittest.TestCase):
    """Names of clients, made harmless on every system."""

    def test_names_become_safe_ones(self) -> None:
        cases = {
            "a.txt": "a.txt",
            "日本.txt": "日本.txt",
            "e\u0301.txt": "\u00e9.txt",
            "a/b/c.txt": "a/b/c.txt",
            "a\\b\\c.txt": "a/b/c.txt",
            "/a//./b.txt": "a/b.txt",
            "C:\\x": "C_/x",
            "\\\\server\\share\\x": "server/share/x",
            "file:stream": "file_stream",
            "a\0b": "a_b",
            "a\nb\x7f\x85": "a_b__",
            '<>:"|?*': "_______",
            "CON": "_CON",
            "con.txt": "_con.txt",
            "nul .tar.gz": "_nul .tar.gz",
            "COM1": "_COM1",
            "lpt\u00b9.x": "_lpt\u00b9.x",
            "CONIN$": "_CONIN$",
            "console": "console",
            "com10": "com10",
            "aux/prn/nul": "_aux/_prn/_nul",
            "a. . ": "a_",
            "a.": "a_",
            "...": "_",
            "  a": "a",
            "-rf": "-rf",
            ".htaccess": ".htaccess",
            ".flowserver": "_.flowserver",
            ".FLOWSERVER/v1/x.ledger": "_.FLOWSERVER/v1/x.ledger",
            "x/.flowserver": "x/_.flowserver",
            "\u202egpj.exe": "_gpj.exe",
            "a\u2066b\u2069\ufeff": "a_b__",
            "\u200fa\u2028": "_a_",
            "a\udcff\ud800": "a__",  # of place(): no file system takes the second one
        }
        for name, safe in cases.items():
            with self.subTest(ascii(name)):
                self.assertEqual(flowserver.safe_path(name), safe)
                self.assertEqual(flowserver.safe_path(safe), safe)

    def test_names_that_lead_outside_or_nowhere_are_refused(self) -> None:
        cases = (
            "../../x",
            "..",
            "a/../b",
            "a\\..\\b",
            "a/.. /b",
            "a/ ../b",
            "",
            "/",
            ".",
            "./",
            "a/",
            "a\\",
            "/".join("a" * 41),
            "/".join(["a" * 250] * 9),
        )
        for name in cases:
            with self.subTest(name[:20]):
                with self.assertRaises(flowserver.Malformed):
                    flowserver.safe_path(name)

    def test_long_names_keep_their_suffix_and_whole_characters(self) -> None:
        cases = {
            "a" * 300 + ".pdf": "a" * 251 + ".pdf",
            "日" * 100 + ".pdf": "日" * 83 + ".pdf",
            "a" * 300 + ".tar.gz": "a" * 248 + ".tar.gz",
            "a" * 300: "a" * 255,
            "a." + "b" * 300: "a." + "b" * 253,
            "." + "b" * 300: "." + "b" * 254,
        }
        for name, safe in cases.items():
            with self.subTest(name[-8:]):
                self.assertEqual(flowserver.safe_path(name), safe)

    def test_numbers_stand_before_the_suffix(self) -> None:
        cases = {
            ("report.pdf", 1): "report (1).pdf",
            ("report.tar.gz", 2): "report (2).tar.gz",
            ("report", 3): "report (3)",
            (".profile", 4): ".profile (4)",
            ("a.b.c", 5): "a.b (5).c",
            ("a" * 255, 10): "a" * 250 + " (10)",
            ("日" * 85, 6): "日" * 83 + " (6)",
        }
        for (name, number), result in cases.items():
            with self.subTest(name[:20]):
                self.assertEqual(flowserver.numbered(name, number), result)

    def test_no_name_at_all_gets_out(self) -> None:
        """Whatever is accepted lies below the folder and is legal on Windows, too."""
        chance, accepted = random.Random(3), 0
        pieces = [
            "..",
            ".",
            "/",
            "\\",
            " ",
            "a",
            "CON",
            "nul",
            ":",
            "\0",
            "\u202e",
            "日",
            "x.txt",
            ".flowserver",
            "~",
            "%2e",
            "COM1",
            "$",
            "\ufeff",
            "e\u0301",
            "." * 9,
        ]
        for _ in range(3000):
            name = "".join(chance.choice(pieces) for _ in range(chance.randrange(1, 9)))
            with contextlib.suppress(flowserver.Malformed):
                words = flowserver.safe_path(name).split("/")
                accepted += 1
                for word in words:
                    self.assertNotIn(word, ("", ".", "..", ".flowserver"))
                    self.assertIsNone(
                        re.search(r'[\0-\x1f<>:"|?*\\]|[. ]\Z', word), name
                    )
                    self.assertNotIn(word.split(".")[0].upper(), ("CON", "NUL", "COM1"))
        self.assertGreater(accepted, 1000)

    def test_deceiving_text_is_escaped_in_messages(self) -> None:
        cases = {
            "a": "a",
            "a\nb": r"a\nb",
            "\x1b[31m": r"\x1b[31m",
            "\u202e": r"\u202e",
            "日": "日",
            "\ud800": r"\ud800",
        }
        for text, shown in cases.items():
            self.assertEqual(flowserver.escaped(text), shown)
            self.assertEqual(flowserver.quoted(text), f'"{shown}"')


# ---- upload --------------------------------------------------------------------------


def upload_of(data: bytes, path: str = "a.bin", identifier: str = "id") -> Any:
    """Return the upload that a file belongs to; "flowserver-..." is a secret."""
    key = flowserver.upload_key("", "browser", identifier, path, len(data))
    is_secret = identifier.startswith("flowserver-")
    return flowserver.Upload(key, path, len(data), "", identifier, is_secret)


def thirds(size: int) -> List[Tuple[int, int]]:
    """Return the three ranges of a file."""
    cut = [0, size // 3, 2 * size // 3, size]
    return list(zip(cut, cut[1:]))


def changed(data: bytes, place: int) -> bytes:
    """Return another version, of the same size, with one byte changed."""
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def state_of(*lines: Sequence[Any], secret: bool = False) -> Any:
    """Return the state of an upload of 900 bytes that these lines tell."""
    upload = flowserver.Upload("key", "a.bin", 900, "", "id", secret, {})
    state = flowserver._State().after("upload", upload, "g1", "g0")
    for line in lines:
        state = state.after(*line)
    return state


def told(state: Any) -> List[Tuple[int, int]]:
    """Return the ranges that need not be sent."""
    return list(state.ranges.within(*state.told))


FINISHED = [("range", 0, 900), ("finished", "a.bin", 7, {}, 99)]


class RangesTest(unittest.TestCase):
    def test_ranges_are_a_set_of_bytes(self) -> None:
        chance = random.Random(1)
        for _ in range(500):
            ranges, model = flowserver.Ranges(), set()
            for _ in range(chance.randrange(12)):
                start = chance.randrange(40)
                end = start + chance.randrange(9)
                ranges.add(start, end)
                model |= set(range(start, end))
            low = chance.randrange(40)
            high = low + chance.randrange(20)
            inside, outside = ranges.within(low, high), ranges.gaps(low, high)
            self.assertEqual(ranges.total, len(model))
            self.assertEqual({i for a, b in ranges for i in range(a, b)}, model)
            window = set(range(low, high))
            found = {i for a, b in inside for i in range(a, b)}
            self.assertEqual(found, window & model)
            self.assertEqual(
                {i for a, b in outside for i in range(a, b)}, window - model
            )
            self.assertEqual(ranges.end, max(model, default=-1) + 1)

    def test_neighbours_become_one(self) -> None:
        ranges = flowserver.Ranges([(0, 5), (9, 12), (5, 9)])
        self.assertEqual(list(ranges), [(0, 12)])


class UploadRulesTest(unittest.TestCase):
    """Section 4 of the design, cell by cell, without a disk."""

    def test_unknown_upload_is_asked_for_and_has_nothing(self) -> None:
        state = flowserver._State()
        self.assertFalse(state.may_skip(0, 300))
        self.assertFalse(state.is_sample(0, 300))
        self.assertEqual((told(state), state.is_unfinished), ([], False))

    def test_recorded_range_need_not_be_sent_unless_it_is_a_sample(self) -> None:
        state = state_of(("range", 0, 300), ("range", 300, 600))
        for start, end, may_skip, is_sample in (
            (0, 300, False, True),  # the beginning
            (100, 300, True, False),
            (300, 599, True, False),
            (300, 600, False, True),  # the end of what is stored
            (300, 601, False, False),  # not all of it is recorded
            (600, 900, False, False),
            (200, 200, False, False),
        ):
            with self.subTest(start=start, end=end):
                self.assertEqual(state.may_skip(start, end), may_skip)
                self.assertEqual(state.is_sample(start, end), is_sample)
        self.assertEqual(told(state), [(1, 599)])

    def test_who_knows_a_secret_sends_no_samples(self) -> None:
        state = state_of(("range", 0, 300), ("range", 600, 900), secret=True)
        self.assertTrue(state.may_skip(0, 300) and state.may_skip(600, 900))
        self.assertFalse(state.is_sample(0, 300))
        self.assertEqual(told(state), [(0, 300), (600, 900)])

    def test_complete_upload_is_asked_for_so_that_a_chunk_finishes_it(self) -> None:
        for is_secret in (False, True):
            state = state_of(("range", 0, 900), secret=is_secret)
            self.assertTrue(state.is_complete and state.is_unfinished)
            self.assertFalse(state.may_skip(300, 600) or state.is_sample(300, 600))

    def test_finished_upload_is_asked_for(self) -> None:
        state = state_of(*FINISHED)
        self.assertFalse(state.may_skip(300, 600) or state.is_sample(0, 300))
        self.assertFalse(state.is_unfinished)

    def test_other_bytes_mean_a_changed_file_unless_two_attempts_met(self) -> None:
        state = state_of(("range", 0, 600))
        for missing, has_changed in (
            ([], True),
            ([(600, 900)], True),
            ([(0, 300)], False),
            ([(250, 310)], False),
        ):
            with self.subTest(missing=missing):
                self.assertEqual(state.has_changed(100, 300, missing), has_changed)
        self.assertFalse(state_of(*FINISHED).has_changed(0, 300, []))

    def test_published_file_is_known_by_size_inode_and_time(self) -> None:
        state = state_of(*FINISHED)

        def status(size: int, inode: int, modified: int) -> Any:
            return mock.Mock(st_size=size, st_ino=inode, st_mtime_ns=modified)

        self.assertTrue(state.is_intact(status(900, 7, 99)))
        for other in (status(901, 7, 99), status(900, 8, 99), status(900, 7, 98)):
            self.assertFalse(state.is_intact(other))
        self.assertFalse(state.is_intact(None))

    def test_last_claim_of_a_range_ends_those_of_other_processes(self) -> None:
        state = state_of(("claim", "p-1", 0, 300), ("claim", "p-2", 300, 600))
        state.after("claim", "q-1", 250, 300)
        self.assertEqual((state.claims["p-1"], len(state.claims)), ((0, 0), 3))
        state.after("claim", "q-2", 250, 300)  # these know of each other
        self.assertEqual(state.claims["q-1"], state.claims["q-2"])
        state.after("claim", "p-1", 0, 0)
        state.after("claim", "q-2", 0, 0)
        self.assertEqual(set(state.claims), {"p-2", "q-1"})

    def test_receipt_says_the_same_as_all_lines(self) -> None:
        for more in ([], [("announced",)], [("announced",), ("again",)]):
            state = state_of(("claim", "p-1", 0, 900), *FINISHED, *more)
            receipt = flowserver._State()
            for line in state.receipt():
                receipt = receipt.after(*json.loads(json.dumps(line)))
            for name in ("generation", "finished", "is_announced", "came_again"):
                self.assertEqual(getattr(receipt, name), getattr(state, name), name)
            self.assertEqual(tuple(receipt.upload), tuple(state.upload))
            self.assertTrue(receipt.is_complete)

    def test_new_upload_forgets_the_one_before(self) -> None:
        old = state_of(*FINISHED, ("again",))
        new = old.after("upload", old.upload, "g2")
        self.assertIsNot(new, old)
        self.assertEqual((new.ranges.total, new.came_again), (0, False))


# ---- disk, ledgers and publication ---------------------------------------------------


class Killed(BaseException):
    """The process is dead: nothing of it happens any more."""


class TestDisk(flowserver.Disk):
    """A disk that counts its calls, and can fail or die at one of them."""

    FREE = ("stat", "stat_path", "list", "boot_id", "free_space")  # only look

    def __init__(self, sync: bool = False) -> None:
        super().__init__(sync)
        self.calls: List[str] = []
        self.at = 0  # the call to fail at, counted from 1
        self.fault: Optional[BaseException] = None
        self.is_after = False  # whether the call is done before it fails
        self.opened: Set[int] = set()
        self.is_dead = False

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "close" and super().__getattribute__("is_dead"):
            return lambda fd: None  # done already
        if name.startswith("_") or name in TestDisk.FREE or not callable(value):
            return value
        return functools.partial(self._call, name, value)

    def _call(self, name: str, call: Any, *arguments: Any) -> Any:
        if self.is_dead:
            raise Killed()
        self.calls.append(name)
        is_here = self.fault is not None and len(self.calls) == self.at
        if is_here and not self.is_after:
            self._fail()
        try:
            result = call(*arguments)
        except OSError:
            if is_here:
                self._fail()
            raise
        if name == "open":
            self.opened.add(result)
        if name == "close":
            self.opened.discard(arguments[0])
        if is_here:
            self._fail()
        return result

    def _fail(self) -> None:
        assert self.fault is not None
        if isinstance(self.fault, Killed):
            self.is_dead = True
            for fd in self.opened:  # as the system does; locks go with them
                os.close(fd)
        raise self.fault


class WindowsLike(flowserver.Disk):
    """A disk as Windows has them: what is open can be neither unlinked nor renamed.

    There is no os.pwrite, no name in two places, no flush of what is read only.
    """

    def __init__(self, sync: bool = False) -> None:
        super().__init__(sync)
        self.links = self.unlinks_open = self._positioned = False
        self.names: Dict[int, str] = {}
        self.read_only: Set[int] = set()

    def open(self, path: str, flags: int) -> int:
        fd = super().open(path, flags)
        self.names[fd] = path
        if not flags & os.O_RDWR:
            self.read_only.add(fd)
        return fd

    def close(self, fd: int) -> None:  # type: ignore[override]
        os.close(fd)
        self.names.pop(fd, None)
        self.read_only.discard(fd)

    def flush(self, fd: int) -> None:
        if fd in self.read_only:
            raise OSError(errno.EBADF, "Bad file descriptor")

    def _require_closed(self, *paths: str) -> None:
        for path in paths:
            if path in self.names.values():
                raise PermissionError(13, "is open", path)

    def unlink(self, path: str) -> None:
        self._require_closed(path)
        super().unlink(path)

    def rename(self, source: str, target: str) -> None:
        self._require_closed(source, target)
        super().rename(source, target)

    def publish(self, source: str, target: str) -> None:
        self._require_closed(source)
        if os.path.lexists(target):
            raise FileExistsError(17, "exists", target)
        os.rename(source, target)


class DiskTest(unittest.TestCase):
    def test_what_the_system_reports_becomes_a_sentence(self) -> None:
        for number, kind in (
            (errno.ENOSPC, flowserver.Trouble),
            (errno.EFBIG, flowserver.TooLarge),
            (errno.ENOTCONN, flowserver.Trouble),
        ):
            with self.assertRaises(kind), flowserver.explained():
                raise OSError(number, "something")

    def test_bytes_are_written_and_read_whole_in_small_portions(self) -> None:
        """As a signal, a pipe or a network file system may have it."""
        disk = flowserver.Disk()
        with temporary_folder() as folder:
            fd = disk.open(os.path.join(folder, "a"), os.O_RDWR | os.O_CREAT)
            self.addCleanup(os.close, fd)
            for name in ("pwrite", "write"):
                real = getattr(os, name)
                few = mock.Mock(side_effect=lambda f, b, *at, c=real: c(f, b[:7], *at))
                disk._positioned = name == "pwrite"
                with mock.patch.object(os, name, few):
                    disk.write(fd, noise(100), 5)
                self.assertEqual(disk.read(fd, 1000, 5), noise(100))


def put(
    store: Store,
    data: bytes,
    start: int = 0,
    end: Optional[int] = None,
    path: str = "a.bin",
) -> Any:
    """Store a range of a file; return the progress."""
    end = len(data) if end is None else end
    with store.receive(upload_of(data, path), start, end) as body:
        for low in range(start, end, 100):
            body.write(data[low : min(low + 100, end)])
        return body.commit()


def asked(store: Store, upload: Any) -> Tuple[List[Tuple[int, int]], Any]:
    """Return what need not be sent of an upload, and its end if any."""
    status = store.status(upload.key)
    if status and status.done:
        return status.stored, status.done
    return (status.told if status else []), None


def quickly() -> Any:
    """Let nobody wait long for what may still differ."""
    return mock.patch.object(flowserver, "_WAIT_SECONDS", 0.05)


class StoreCase(unittest.TestCase):
    """A folder, stores over it (each is a process), and a clock that stands."""

    def setUp(self) -> None:
        self.folder = self.enter(temporary_folder())
        self.now = 1e9
        self.store = self.open()
        self.data = noise(900)

    def enter(self, context: Any) -> Any:
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    def open(self, **arguments: Any) -> Store:
        arguments.setdefault("disk", flowserver.Disk(sync=False))
        return Store(self.folder, clock=lambda: self.now, **arguments)

    def files(self) -> Dict[str, bytes]:
        return finished_files(self.folder)

    def state(self, suffix: str = "") -> List[str]:
        """Return the paths of the files of unfinished uploads, and of receipts."""
        folder = self.store.state_dir
        names = [name for name in os.listdir(folder) if name.endswith(suffix)]
        return [os.path.join(folder, name) for name in sorted(names)]

    def sizes(self, suffix: str) -> List[int]:
        """Return the sizes of those that are not empty."""
        return list(filter(None, map(os.path.getsize, self.state(suffix))))

    def grow_old(self, seconds: float) -> None:
        """Let all files of uploads be that old, by the store's clock."""
        for path in self.state():
            os.utime(path, (self.now - seconds, self.now - seconds))


class LedgerTest(StoreCase):
    """What is on the disk, and how it is read."""

    def test_torn_line_does_not_count(self) -> None:
        put(self.store, self.data, 0, 300)
        put(self.store, self.data, 300, 600)
        (path,) = self.state(".ledger")
        with open(path, "rb") as file:
            whole = file.read()
        for cut in range(whole.index(b"\n") + 1, len(whole)):
            with open(path, "wb") as file:
                file.write(whole[:cut])
            store = self.open()
            ranges, _ = asked(store, upload_of(self.data))
            stored = 300 * whole[:cut].count(b'"range",')
            if not whole[:cut].endswith(b"\n") and b'"range"' in whole[:cut][-30:]:
                stored -= 300 * (whole[:cut].rpartition(b"\n")[2].count(b'"range",'))
            self.assertEqual(ranges, [(1, stored - 1)] if stored else [])
        store = self.open()
        for low, high in thirds(900):
            put(store, self.data, low, high)
        self.assertEqual(self.files(), {"a.bin": self.data})

    def test_line_counts_only_after_the_one_before_it(self) -> None:
        """A ledger that was dropped and begun anew is not mixed with the old one."""
        put(self.store, self.data, 0, 300)
        (path,) = self.state(".ledger")
        with open(path, "rb") as file:
            lines = file.read().splitlines(keepends=True)
        with open(path, "wb") as file:
            file.write(b"".join(lines[:1] + lines[2:]))  # the claim is missing
        self.assertEqual(asked(self.open(), upload_of(self.data)), ([], None))

    def test_ledger_that_others_dropped_and_began_anew_is_read_anew(self) -> None:
        other, upload = self.open(), upload_of(self.data)
        put(self.store, self.data, 0, 300)
        put(other, self.data, 300, 600)
        self.assertTrue(self.store.forget(upload.key))
        put(self.store, self.data, 0, 300)
        self.assertEqual(asked(other, upload), ([(1, 299)], None))
        self.assertEqual(put(other, self.data, 300, 600).received, 600)

    def test_folder_that_somebody_clears_is_begun_anew(self) -> None:
        put(self.store, self.data, 0, 300)
        for path in self.state():
            os.unlink(path)
        self.assertEqual(put(self.store, self.data, 300, 600).received, 300)

    def test_receipt_of_many_chunks_is_short(self) -> None:
        for is_announced in (False, True):
            store = self.open(announce=(lambda done: None) if is_announced else None)
            path = f"{is_announced}.bin"
            for low in range(0, 900, 5):
                done = put(store, self.data, low, low + 5, path=path).done
            self.assertLess(max(self.sizes(".ledger")), 1000)
            for again in (store, self.open()):
                self.assertEqual(put(again, self.data, 895, 900, path=path).done, done)

    def test_long_line_is_read_as_others_are(self) -> None:
        """The fields of a form may have 64 KiB; they stand in the ledger, too."""
        store, other = (self.open(announce=lambda done: None) for _ in "12")
        fields = {"note": "x" * 60000}
        for low, high in thirds(900):
            with store.receive(upload_of(self.data), low, high) as body:
                body.write(self.data[low:high])
                done = body.commit(fields).done
        self.assertEqual(done.fields, fields)
        for again in (store, other, self.open()):
            self.assertEqual(put(again, self.data, 600, 900).done, done)

    def test_nothing_stays_open_between_chunks(self) -> None:
        disk = TestDisk()
        store = self.open(disk=disk)
        put(store, self.data, 0, 300)
        self.assertEqual(disk.opened, set())
        put(store, self.data, 300, 900)
        self.assertEqual(disk.opened, set())

    def test_unflushed_uploads_are_not_trusted_after_a_reboot(self) -> None:
        for is_same, left in ((True, 1), (False, 0)):
            put(self.store, self.data, 0, 300)
            disk = flowserver.Disk(sync=False)
            boot = self.store.disk.boot_id() if is_same else "another"
            with mock.patch.object(disk, "boot_id", return_value=boot):
                store = self.open(disk=disk)
                store.sweep(1e9, 1e9)
            self.assertEqual(store.open_uploads, left)

    def test_data_that_went_is_asked_for_again(self) -> None:
        put(self.store, self.data, 0, 300)
        os.remove(self.state(".data")[0])
        store = self.open()
        store.sweep(1e9, 1e9)
        self.assertEqual(asked(store, upload_of(self.data)), ([], None))


class PublicationTest(StoreCase):
    """Names below upload_dir."""

    def test_policies(self) -> None:
        for policy in ("rename", "replace", "refuse"):
            for ranges in ([(0, 900)], thirds(900)):
                folder = self.enter(temporary_folder())
                store = Store(folder, on_conflict=policy, disk=flowserver.Disk(False))
                put(store, noise(900, 5))
                outcome = {"a.bin": noise(900, 5), "a (1).bin": self.data}
                if policy == "replace":
                    outcome = {"a.bin": self.data}
                if policy == "refuse":
                    outcome = {"a.bin": noise(900, 5)}
                    with self.assertRaises(flowserver.Conflict):
                        put(store, self.data, *ranges[0])
                else:
                    for low, high in ranges:
                        put(store, self.data, low, high)
                self.assertEqual(finished_files(folder), outcome)
                self.assertEqual(leftovers(folder), {})
                self.assertEqual(store.open_uploads, 0)

    def test_the_same_bytes_under_a_taken_name_are_no_second_copy(self) -> None:
        put(self.store, self.data)
        for low, high in thirds(900):
            done = put(self.store, self.data, low, high).done
        self.assertEqual(done.filename, "a.bin")
        self.assertEqual(self.files(), {"a.bin": self.data})

    def test_one_chunk_again_finds_the_name_that_it_got(self) -> None:
        put(self.store, noise(900, 2))
        put(self.store, noise(900, 3))
        for store in (self.store, self.store, self.open()):
            self.assertEqual(put(store, self.data).done.filename, "a (2).bin")
        self.assertEqual(len(self.files()), 3)

    def test_last_chunk_again_gets_the_same_answer(self) -> None:
        put(self.store, noise(900, 2))  # takes the name
        for low, high in thirds(900):
            first = put(self.store, self.data, low, high)
        for store in (self.store, self.open(), self.open()):
            again = put(store, self.data, 600, 900)
            self.assertEqual(again.done, first.done)
            self.assertFalse(again.is_new)
        files = {"a.bin": noise(900, 2), "a (1).bin": self.data}
        self.assertEqual(self.files(), files)

    def test_name_of_a_file_that_may_not_be_read_is_taken(self) -> None:
        disk, other = self.store.disk, noise(900, 2)
        really_open = disk.open

        def open_others(path: str, flags: int) -> int:
            if os.path.basename(path) == "a.bin":
                raise PermissionError(errno.EACCES, "not yours", path)
            return really_open(path, flags)

        put(self.store, self.data)
        with mock.patch.object(disk, "open", open_others):
            put(self.store, other)
            for low, high in thirds(900):
                put(self.store, changed(other, 1), low, high)
        files = {"a.bin": self.data, "a (1).bin": other}
        self.assertEqual(self.files(), {**files, "a (2).bin": changed(other, 1)})

    def test_ten_thousand_files_of_one_name_need_few_looks(self) -> None:
        looks: List[str] = []
        taken = {"a.bin"} | {f"a ({i}).bin" for i in range(1, 10000)}
        real = self.store.disk.stat_path

        def stat_path(path: str) -> Any:
            looks.append(path)
            is_taken = os.path.basename(path) in taken
            return os.stat(self.folder) if is_taken else real(path)

        def publish(source: str, target: str) -> None:
            if os.path.basename(target) in taken:
                raise FileExistsError(errno.EEXIST, "exists", target)
            os.link(source, target)

        with mock.patch.object(self.store.disk, "stat_path", stat_path):
            with mock.patch.object(self.store.disk, "publish", publish):
                progress = put(self.store, self.data)
        self.assertEqual(progress.done.filename, "a (10000).bin")
        self.assertLess(len(looks), 40)

    def test_folders_in_the_way_and_links_are_refused(self) -> None:
        os.mkdir(os.path.join(self.folder, "real"))
        with open(os.path.join(self.folder, "file"), "wb"):
            pass
        paths = ["file/a.bin"]
        if hasattr(os, "symlink") and os.name == "posix":
            outside = self.enter(temporary_folder())
            os.symlink(outside, os.path.join(self.folder, "link"))
            paths += ["link/a.bin", "link/b/a.bin"]
        for path in paths:
            with self.subTest(path):
                with self.assertRaises(flowserver.Conflict):
                    put(self.store, self.data, path=path)
                with self.assertRaises(flowserver.Conflict):  # before it has travelled
                    put(self.store, self.data, 0, 100, path=path)
        put(self.store, self.data, path="real/new/a.bin")
        self.assertEqual(self.files()["real/new/a.bin"], self.data)
        self.assertEqual((leftovers(self.folder), self.state(".ledger")), ({}, []))

    @unittest.skipUnless(hasattr(os, "symlink") and os.name == "posix", "needs POSIX")
    def test_folders_of_ours_may_be_links(self) -> None:
        root = self.enter(temporary_folder())
        for name in ("disk", "disk/uploads", "disk/temp"):
            os.mkdir(os.path.join(root, name))
        os.symlink("disk", os.path.join(root, "link"))
        os.symlink("disk/uploads", os.path.join(root, "uploads"))
        os.symlink("disk/temp", os.path.join(root, "temp"))
        for temp in ("", "temp", "link/t", "temp/"):
            temp_dir = temp and os.path.join(root, temp)
            upload_dir = os.path.join(root, "uploads" + "/" * temp.endswith("/"))
            with temporary_store(upload_dir=upload_dir, temp_dir=temp_dir) as store:
                for low, high in thirds(900):
                    put(store, self.data, low, high, path="a.bin")
                put(store, noise(9), path="new/a.bin")
            files = {"a.bin": self.data, "new/a.bin": noise(9)}
            self.assertEqual(finished_files(os.path.join(root, "disk/uploads")), files)

    def test_system_without_links_is_told_of(self) -> None:
        disk, told = flowserver.Disk(sync=False), []
        with mock.patch.object(os, "link", side_effect=OSError(errno.EPERM, "no")):
            self.open(disk=disk, warn=told.append)
        self.assertEqual((disk.links, len(told)), (False, 1))


# ---- beginnings, ends and bodies -----------------------------------------------------


class StoreTest(StoreCase):
    """Sections 3 and 4 of the design, without a socket."""

    def test_a_range_that_is_not_of_the_file_is_refused(self) -> None:
        upload, size = upload_of(self.data), len(self.data)
        for start, end in ((-5, 5), (5, 2), (size - 1, size + 1), (size, size + 5)):
            with self.subTest(start=start, end=end):
                with self.assertRaises(flowserver.Malformed):
                    self.store.receive(upload, start, end)
        for start, end in ((5, 15), (5, 5)):
            with self.assertRaises(flowserver.Malformed):
                self.store.receive(upload._replace(size=10), start, end)
        self.assertEqual(asked(self.store, upload), ([], None))

    def test_every_order_of_five_chunks_makes_the_file(self) -> None:
        for count, order in enumerate(itertools.permutations(range(5))):
            path = f"{count}.bin"
            for index in order:
                progress = put(
                    self.store, self.data, index * 180, index * 180 + 180, path=path
                )
            self.assertEqual(progress.done.relative_path, path)
            self.assertEqual(self.files()[path], self.data)
        self.assertEqual(leftovers(self.folder), {})

    def test_chunk_size_may_change_on_the_way(self) -> None:
        put(self.store, self.data, 0, 300)
        put(self.store, self.data, 600, 700)
        put(self.store, self.data, 200, 650)
        self.assertEqual(put(self.store, self.data, 0, 900).done.size, 900)
        self.assertEqual(self.files(), {"a.bin": self.data})

    def test_empty_file_is_a_file(self) -> None:
        for path in ("a.bin", "new/a.bin"):
            self.assertEqual(put(self.store, b"", path=path).done.relative_path, path)
        self.assertEqual(self.files(), {"a.bin": b"", "new/a.bin": b""})

    # Unfinished

    def test_changed_file_is_refused_once_and_what_is_stored_is_dropped(self) -> None:
        for place, chunk in ((7, (0, 300)), (299, (0, 600)), (450, (300, 600))):
            with self.subTest(place=place, chunk=chunk):
                path, other = f"{place}.bin", changed(self.data, place)
                put(self.store, self.data, 0, 300, path)
                put(self.store, self.data, 300, 550, path)
                with self.assertRaises(flowserver.Conflict):
                    put(self.store, other, *chunk, path=path)
                self.assertEqual(leftovers(self.folder), {})
                self.assertEqual(self.store.open_uploads, 0)
                for low, high in thirds(900):
                    put(self.store, other, low, high, path)
                self.assertEqual(self.files()[path], other)

    def test_bodies_of_an_upload_that_was_dropped_are_refused(self) -> None:
        put(self.store, self.data, 0, 300)
        with self.store.receive(upload_of(self.data), 300, 600) as late:
            late.write(self.data[300:400])
            with self.assertRaises(flowserver.Conflict):
                put(self.store, changed(self.data, 7), 0, 300)
            with self.assertRaises(flowserver.Conflict):
                late.write(self.data[400:600])
        self.assertEqual(self.state(".data"), [])

    def test_second_attempt_and_the_first_are_both_answered(self) -> None:
        for slow, fast in ((0, 1), (1, 0)):
            path = f"{slow}.bin"
            upload = upload_of(self.data, path)
            bodies = [self.store.receive(upload, 0, 600) for _ in "12"]
            bodies[0].write(self.data[:200])
            bodies[1].write(self.data[:300])
            bodies[fast].write(self.data[bodies[fast].position : 600])
            self.assertEqual(bodies[fast].commit().received, 600)
            bodies[slow].write(self.data[bodies[slow].position : 600])
            self.assertEqual(bodies[slow].commit().received, 600)
            for body in bodies:
                body.close()
            put(self.store, self.data, 600, 900, path)
            self.assertEqual(self.files()[path], self.data)

    def test_attempts_that_differ_are_never_mixed(self) -> None:
        """What was answered is what is stored; one of the two is told to try again."""
        versions = (noise(1000, 1), noise(1000, 2))
        for order in sorted(set(itertools.permutations((0, 0, 0, 1, 1, 1)))):
            path, outcomes = f"{order}.bin", {}
            upload = upload_of(versions[0], path)
            bodies = [self.store.receive(upload, 0, 900) for _ in versions]
            for index in order:
                body = bodies[index]
                try:
                    if index not in outcomes:
                        body.write(versions[index][body.position : body.position + 300])
                    if body.position == 900:
                        outcomes[index] = body.commit().received
                except flowserver.FlowError as error:
                    outcomes[index] = error
            for body in bodies:
                body.close()
            answered = [index for index in (0, 1) if outcomes[index] == 900]
            kinds = {type(outcomes[index]) for index in (0, 1)} - {int}
            with self.subTest(order):
                if kinds == {flowserver.Conflict}:  # it came later: a changed file
                    self.assertIn(order, ((0, 0, 0, 1, 1, 1), (1, 1, 1, 0, 0, 0)))
                    continue
                self.assertEqual((len(answered), kinds), (1, {flowserver.Trouble}))
                data = versions[answered[0]]
                self.assertIsNotNone(put(self.store, data, 900, 1000, path).done)
                self.assertEqual(self.files()[path], data)

    def test_later_body_of_another_process_takes_the_place_of_the_earlier(self) -> None:
        other = self.open()
        with self.store.receive(upload_of(self.data), 0, 600) as first:
            first.write(noise(200, 2))
            with other.receive(upload_of(self.data), 0, 600) as second:
                second.write(self.data[:300])
                with self.assertRaises(flowserver.Trouble):
                    first.write(self.data[200:300])
                second.write(self.data[300:600])
                self.assertEqual(second.commit().received, 600)
        self.assertIsNotNone(put(self.store, self.data, 600, 900).done)
        self.assertEqual(self.files(), {"a.bin": self.data})

    def test_later_body_that_breaks_off_does_not_drop_what_the_earlier_began(
        self,
    ) -> None:
        with self.store.receive(upload_of(self.data), 0, 600) as first:
            with self.open().receive(upload_of(self.data), 0, 600):
                pass
            with self.assertRaises(flowserver.Trouble):  # no Conflict: sent again
                first.write(self.data[:600])
        self.assertEqual(leftovers(self.store), {})

    def test_body_that_was_overtaken_unseen_is_not_recorded(self) -> None:
        """All of it was sent, overwritten and recorded by others, before it looks."""
        other = self.open()
        put(self.store, self.data, 0, 300)
        with self.store.receive(upload_of(self.data), 300, 600) as first:
            first.write(noise(300, 2))
            put(other, self.data, 300, 600)
            with self.assertRaises(flowserver.Trouble):
                first.commit()
        put(self.store, self.data, 600, 900)
        self.assertEqual(self.files(), {"a.bin": self.data})

    def test_processes_write_one_upload_side_by_side(self) -> None:
        other = self.open()
        with self.store.receive(upload_of(self.data), 0, 300) as mine:
            mine.write(self.data[:100])
            put(other, self.data, 600, 900)
            mine.write(self.data[100:300])
            mine.commit()
        self.assertIsNotNone(put(other, self.data, 300, 600).done)
        self.assertEqual(self.files(), {"a.bin": self.data})

    def test_body_that_broke_off_leaves_nothing(self) -> None:
        for size in (0, 200):
            with self.store.receive(upload_of(self.data), 0, 300) as body:
                body.write(self.data[:size])
        with self.store.receive(upload_of(self.data), 0, 900) as body:
            body.write(self.data[:200])
        self.assertEqual(self.sizes(""), [])
        self.assertEqual(self.store.open_uploads, 0)

    def test_body_that_may_not_begin_leaves_nothing(self) -> None:
        store = self.open(min_free_space=1, max_uploads=1)
        with self.assertRaises(flowserver.Conflict):  # what comes before is missing
            store.receive(upload_of(self.data), 300, 600, is_in_order=True)
        with mock.patch.object(store.disk, "free_space", return_value=800):
            with self.assertRaises(flowserver.TooLarge):
                store.receive(upload_of(self.data), 0, 300)
        self.assertEqual((self.state(".data"), self.sizes("")), ([], []))
        self.assertEqual(store.open_uploads, 0)

    def test_body_that_broke_off_costs_the_others_nothing(self) -> None:
        bodies = [
            self.store.receive(upload_of(self.data), a, b) for a, b in thirds(900)
        ]
        for body in bodies:
            body.write(self.data[body.start : body.start + 100])
        bodies[0].close()
        for body in bodies[1:]:
            body.write(self.data[body.start + 100 : body.end])
            body.commit()
            body.close()
        self.assertIsNotNone(put(self.store, self.data, 0, 300).done)

    def test_chunk_after_a_cancel_in_another_process_begins_anew(self) -> None:
        """What this process remembers of the upload is nothing any more."""
        put(self.store, self.data, 0, 300)
        self.assertTrue(self.open().forget(upload_of(self.data).key))
        self.assertEqual(put(self.store, self.data, 300, 600).received, 300)

    def test_cancelled_upload_is_forgotten_also_by_bodies_under_way(self) -> None:
        upload = upload_of(self.data)
        put(self.store, self.data, 0, 300)
        with self.store.receive(upload, 300, 600) as body:
            body.write(self.data[300:400])
            self.assertTrue(self.store.forget(upload.key))
            with self.assertRaises(flowserver.Conflict):
                body.write(self.data[400:600])
        self.assertEqual(leftovers(self.folder), {})
        self.assertFalse(self.store.forget(upload.key))

    # The end

    def test_end_waits_for_bodies_that_may_differ(self) -> None:
        other = changed(self.data, 250)
        for late in (self.data, other):
            put(self.store, self.data, 0, 600)
            with self.store.receive(upload_of(self.data), 0, 300) as body:
                body.write(late[:200])
                with Finishing(self.store, self.data, 600, 900) as finishing:
                    time.sleep(0.05)
                    self.assertEqual(self.files(), {})
                    if late is self.data:
                        body.write(late[200:300])
                        body.commit()
                    else:
                        with self.assertRaises(flowserver.Conflict):
                            body.write(late[200:300])
                    body.close()
            if late is self.data:
                self.assertIsNotNone(finishing.result().done)
                os.unlink(os.path.join(self.folder, "a.bin"))
                self.store.sweep(0, -1e10)
            else:
                with self.assertRaises(flowserver.Conflict):
                    finishing.result()
        self.assertEqual((self.files(), leftovers(self.folder)), ({}, {}))

    def test_end_waits_for_samples_that_were_asked_for(self) -> None:
        upload = upload_of(self.data)
        put(self.store, self.data, 0, 600)
        self.assertFalse(self.store.has(upload, 0, 300))
        with Finishing(self.store, self.data, 600, 900) as finishing:
            time.sleep(0.05)
            self.assertEqual(self.files(), {})
            with self.assertRaises(flowserver.Conflict):
                put(self.store, changed(self.data, 5), 0, 300)
        with self.assertRaises(flowserver.Conflict):
            finishing.result()

    def test_end_waits_a_while_and_no_longer(self) -> None:
        upload = upload_of(self.data)
        put(self.store, self.data, 0, 600)
        with quickly():
            self.assertFalse(self.store.has(upload, 300, 600))  # will never come
            with self.store.receive(upload, 0, 300) as late:  # will not end
                late.write(self.data[:100])
                self.assertIsNotNone(put(self.store, self.data, 600, 900).done)
                if self.store.disk.unlinks_open:
                    late.write(self.data[100:300])
                    self.assertIsNotNone(late.commit().done)

    def test_whole_file_in_one_chunk_waits_for_nobody(self) -> None:
        put(self.store, self.data, 0, 300)
        with self.store.receive(upload_of(self.data), 0, 300):
            self.assertIsNotNone(put(self.store, self.data).done)

    def test_sweep_does_not_end_what_waits(self) -> None:
        put(self.store, self.data, 0, 600)
        late = self.store.receive(upload_of(self.data), 0, 300)
        with Finishing(self.store, self.data, 600, 900) as finishing:
            time.sleep(0.05)
            self.store.sweep(1e9, 1e9)
            self.assertEqual(self.files(), {})
            late.close()
        self.assertIsNotNone(finishing.result().done)

    def test_crash_before_the_name_is_mended_by_the_next_chunk_or_start(self) -> None:
        for word, is_start in itertools.product(("publish", "finished"), (0, 1)):
            path = f"{word}{is_start}.bin"
            store = self.open()
            put(store, self.data, 0, 600, path)
            with killed_before(word), self.assertRaises(Killed):
                put(store, self.data, 600, 900, path)
            store = self.open()
            if is_start:
                store.sweep(1e9, 1e9)
                self.assertEqual(self.files()[path], self.data)
            self.assertIsNotNone(put(store, self.data, 600, 900, path).done)
            self.assertEqual(self.files()[path], self.data)
        self.assertEqual(leftovers(self.folder), {})

    def test_crash_between_name_and_line_is_not_undone_by_a_cancel(self) -> None:
        store = self.open()
        put(store, self.data, 0, 600)
        with killed_before("finished"), self.assertRaises(Killed):
            put(store, self.data, 600, 900)
        self.assertFalse(self.open().forget(upload_of(self.data).key))

    def test_on_complete_is_called_once_while_processes_live(self) -> None:
        told: List[Any] = []
        inside, go_on = threading.Event(), threading.Event()

        def announce(done: Any) -> None:
            told.append(done)
            inside.set()
            go_on.wait(PATIENCE)

        store, other = self.open(announce=announce), self.open(announce=told.append)
        put(store, self.data, 0, 600)
        with Finishing(store, self.data, 600, 900) as finishing:
            self.assertTrue(inside.wait(PATIENCE))
            other.sweep(1e9, 1e9)
            self.assertIsNotNone(put(other, self.data, 600, 900).done)
            with self.assertRaises(flowserver.Trouble):  # its receipt is needed
                put(other, changed(self.data, 700), 600, 900)
            go_on.set()
        self.assertTrue(finishing.result().is_new)
        other.sweep(1e9, 1e9)
        self.assertEqual(len(told), 1)
        self.assertEqual(self.state(".call") if store.disk.unlinks_open else [], [])

    def test_on_complete_is_called_again_after_a_crash_inside(self) -> None:
        told: List[Any] = []
        store = self.open(announce=mock.Mock(side_effect=Killed))
        put(store, self.data, 0, 600)
        with self.assertRaises(Killed):
            put(store, self.data, 600, 900)
        gc.collect()
        for _ in "123":
            self.open(announce=told.append).sweep(1e9, 1e9)
        self.assertEqual([done.relative_path for done in told], ["a.bin"])

    # After the end

    def test_finished_file_can_not_be_cancelled(self) -> None:
        for low, high in thirds(900):
            put(self.store, self.data, low, high)
        self.assertFalse(self.store.forget(upload_of(self.data).key))
        self.assertEqual(self.files(), {"a.bin": self.data})

    def test_other_version_after_the_end_is_a_new_upload(self) -> None:
        other = noise(900, 2)
        for data in (self.data, other):
            for low, high in thirds(900):
                done = put(self.store, data, low, high).done
            self.assertEqual(self.files()[done.relative_path], data)
        self.assertEqual(set(self.files()), {"a.bin", "a (1).bin"})

    def test_after_something_came_again_another_version_is_refused_once(self) -> None:
        for place in (7, 450, 890):
            for repeats in (1, 2):
                path, other = f"{place}-{repeats}.bin", changed(self.data, place)
                for _ in range(1 + repeats):
                    for low, high in thirds(900):
                        put(self.store, self.data, low, high, path)
                with self.assertRaises(flowserver.Conflict):
                    for low, high in thirds(900):
                        put(self.store, other, low, high, path)
                for low, high in thirds(900):
                    done = put(self.store, other, low, high, path).done
                files = self.files()
                self.assertEqual(files[path], self.data)
                self.assertEqual(files[done.relative_path], other)

    def test_chunks_beside_the_first_difference_follow_it(self) -> None:
        other = changed(self.data, 450)
        for low, high in thirds(900):
            put(self.store, self.data, low, high)
        bodies = [self.store.receive(upload_of(other), a, b) for a, b in thirds(900)]
        for body in bodies:
            body.write(other[body.start : body.end])
        for index in (1, 0, 2):  # the middle one differs
            progress = bodies[index].commit()
            bodies[index].close()
        self.assertIsNotNone(progress.done)
        self.assertEqual(self.files(), {"a.bin": self.data, "a (1).bin": other})

    def test_chunk_from_before_a_refusal_is_no_part_of_what_comes_next(self) -> None:
        other = noise(900, 2)
        for low, high in thirds(900) * 2:
            put(self.store, self.data, low, high)
        with self.store.receive(upload_of(other), 300, 600) as late:
            late.write(self.data[300:600])
            with self.assertRaises(flowserver.Conflict):
                put(self.store, other, 0, 300)
            put(self.store, other, 0, 300)
            with self.assertRaises(flowserver.Conflict):
                late.commit()
        for low, high in thirds(900)[1:]:
            put(self.store, other, low, high)
        self.assertEqual(self.files(), {"a.bin": self.data, "a (1).bin": other})

    def test_file_in_one_chunk_is_always_taken(self) -> None:
        for low, high in thirds(900) * 2:
            put(self.store, self.data, low, high)
        other = changed(self.data, 5)
        self.assertEqual(put(self.store, other).done.filename, "a (1).bin")
        self.assertEqual(put(self.store, self.data).done.filename, "a.bin")
        self.assertEqual(self.files(), {"a.bin": self.data, "a (1).bin": other})

    def test_file_that_was_moved_or_edited_is_a_new_upload(self) -> None:
        for is_moved, repeats in itertools.product((False, True), (0, 1)):
            path = f"{is_moved}-{repeats}.bin"
            for low, high in thirds(900) * (1 + repeats):
                progress = put(self.store, self.data, low, high, path=path)
            if is_moved:
                os.remove(progress.done.path)
            else:
                with open(progress.done.path, "ab") as file:
                    file.write(b"edited")
            if repeats:
                with self.assertRaises(flowserver.Conflict):
                    put(self.store, self.data, 600, 900, path=path)
            self.assertIsNone(put(self.store, self.data, 600, 900, path=path).done)
            self.assertEqual(put(self.store, self.data, 0, 600, path).done.size, 900)

    def test_file_edited_while_it_is_compared_is_not_the_same(self) -> None:
        for low, high in thirds(900):
            done = put(self.store, self.data, low, high).done
        with self.store.receive(upload_of(self.data), 0, 300) as body:
            body.write(self.data[:200])
            with open(done.path, "r+b") as file:
                file.write(b"edited")
            body.write(self.data[200:300])
            with self.assertRaises(flowserver.Trouble):
                body.commit()
        self.assertIsNone(put(self.store, self.data, 0, 300).done)

    def test_without_a_receipt_the_same_file_is_no_second_copy(self) -> None:
        for _ in "12":
            for low, high in thirds(900):
                done = put(self.store, self.data, low, high).done
            self.now = time.time() + 100
            self.store.sweep(1e9, 10)
            self.assertEqual(self.sizes(".ledger"), [])
        self.assertEqual((done.filename, len(self.files())), ("a.bin", 1))

    def test_late_body_from_before_the_end_changes_nothing(self) -> None:
        for late_data in (self.data, noise(900, 2)):
            path = f"{late_data is self.data}.bin"
            put(self.store, self.data, 0, 600, path)
            with self.store.receive(upload_of(self.data, path), 600, 900) as late:
                late.write(late_data[600:700])
                with quickly():
                    try:
                        put(self.store, self.data, 600, 900, path)
                    except flowserver.Trouble:  # the two attempts differ
                        self.assertIsNot(late_data, self.data)
                        put(self.store, self.data, 600, 900, path)
                with contextlib.suppress(flowserver.FlowError):
                    late.write(late_data[700:900])
                    late.commit()
            self.assertEqual(self.files()[path], self.data)

    # Opened before the first byte

    def test_upload_may_be_opened_before_its_first_byte(self) -> None:
        upload = upload_of(self.data, identifier="flowserver-x")
        for _ in "12":
            self.assertEqual(self.store.open(upload).received, 0)
        with self.store.receive(upload, 0, 900) as body:
            body.write(self.data[:300])  # and breaks off
        self.assertEqual(self.store.open_uploads, 1)
        with self.store.receive(upload, 0, 900) as body:
            body.write(self.data[:500])
            body.checkpoint()
            body.write(self.data[500:600])
        self.assertEqual(asked(self.open(), upload), ([(0, 500)], None))
        with self.store.receive(upload, 500, 900) as body:
            body.write(self.data[500:900])
            self.assertEqual(body.commit().done.path, self.store.upload_dir + "/a.bin")
        self.assertEqual(self.files(), {"a.bin": self.data})

    def test_opened_upload_is_counted_before_its_first_byte(self) -> None:
        store = self.open(max_uploads=1)
        store.open(upload_of(self.data))
        store.count()
        with self.assertRaises(flowserver.TooLarge):
            store.open(upload_of(self.data, "b.bin"))
        store.forget(upload_of(self.data).key)
        store.count()
        self.assertEqual((store.open_uploads, self.sizes("")), (0, []))

    def test_room_is_what_bodies_under_way_have_left(self) -> None:
        disk = FallingDisk(1100)
        store = self.open(disk=disk, min_free_space=100)
        with store.receive(upload_of(self.data), 0, 600) as body:
            body.write(self.data[:500])
            with store.receive_whole(300) as whole:
                whole.write(noise(200))
                store.receive_whole(100).close()
                with self.assertRaises(flowserver.TooLarge):
                    store.receive_whole(101)
            store.receive_whole(200).close()
            body.write(self.data[500:600])
            body.commit()
        disk.room = 400  # what is here already takes none
        store.receive(upload_of(self.data), 300, 900).close()

    def test_dropped_receipt_was_no_unfinished_upload(self) -> None:
        put(self.store, self.data, 0, 300, "b.bin")
        for low, high in 2 * thirds(900):
            put(self.store, self.data, low, high)
        with self.assertRaises(flowserver.Conflict):
            put(self.store, changed(self.data, 7), 0, 300)
        self.assertEqual(self.store.open_uploads, 1)

    def test_looking_at_a_body_that_ends_disturbs_no_other(self) -> None:
        """A failed flush would be taken for lost bytes of all that are under way."""
        upload, there = upload_of(self.data), self.store._uploads.expected
        body = self.store.receive(upload, 0, 300, is_kept=True)
        other = self.store.receive(upload_of(self.data, "b.bin"), 0, 300)
        with mock.patch.object(there, "bodies", return_value=[body]):
            body.close()
            self.store.status(upload.key)
        other.write(self.data[:300])
        self.assertEqual(other.commit().received, 300)
        other.close()

    def test_count_is_right_while_uploads_begin(self) -> None:
        for sweeps in (True, False):
            limit = 20 + 20 * sweeps
            store = self.open(max_uploads=limit)
            names = iter([f"{sweeps}{n}" for n in range(200)])

            def begin(names: Any = names, store: Any = store) -> None:
                for name in names:
                    with contextlib.suppress(flowserver.TooLarge):
                        put(store, self.data, 0, 300, name)

            threads = [threading.Thread(target=begin) for _ in "123"]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                store.sweep(1e9, 1e9) if sweeps else store.count()
            self.assertEqual(store.open_uploads, limit)
            self.assertEqual(len(self.state(".data")), limit)
            shutil.rmtree(store.state_dir)

    def test_opened_upload_of_no_bytes_leaves_a_receipt(self) -> None:
        self.store.open(upload_of(b""))
        status = self.store.status(upload_of(b"").key)
        self.assertTrue(status and status.is_finished)

    def test_opened_upload_of_no_bytes_is_finished(self) -> None:
        progress = self.store.open(upload_of(b"", identifier="flowserver-x"))
        self.assertEqual(progress.done.size, 0)
        self.assertEqual(self.files(), {"a.bin": b""})

    # In order

    def test_stale_uploads_go_and_live_ones_stay(self) -> None:
        put(self.store, self.data, 0, 300)
        self.grow_old(-50)  # of the future, hence not stale
        self.store.sweep(10, 10)
        self.assertEqual(self.store.open_uploads, 1)
        with self.store.receive(upload_of(self.data), 300, 600) as body:
            body.write(self.data[300:400])
            self.grow_old(100)
            self.store.sweep(10, 10)
            self.assertEqual(self.store.open_uploads, 1)
            self.now = time.time()
            body.write(self.data[400:500])  # elsewhere only this tells of it
            (path,) = self.state(".ledger")
            os.utime(path, (self.now - 100, self.now - 100))
            self.open().sweep(10, 10)
            self.assertEqual(self.sizes(".ledger") and self.state(".data") != [], True)
        self.grow_old(100)
        self.store.sweep(10, 10)
        self.assertEqual((self.sizes(""), self.store.open_uploads), ([], 0))

    def test_sweep_of_a_damaged_folder_brings_the_rest_in_order(self) -> None:
        told: List[str] = []
        store = self.open(warn=told.append)
        put(store, self.data, 0, 300)
        for name in ("0-1.part", "key-gone.data", "key.ledger", "key-gone.call"):
            with open(os.path.join(store.state_dir, name), "wb"):
                pass
        self.grow_old(7200)
        real = store.disk.unlink

        def refuse(path: str) -> None:
            if path.endswith("0-1.part"):
                raise PermissionError(errno.EACCES, "is open", path)
            real(path)

        with mock.patch.object(store.disk, "unlink", refuse):
            store.sweep(1e9, 1e9)
        kept = [path for path in self.state() if "0-1.part" in path]
        self.assertEqual(len(kept), 1)
        store.sweep(1e9, 1e9)
        names = [os.path.basename(path) for path in self.state()]
        self.assertEqual([n for n in names if n.startswith(("key", "0-1"))], [])
        with mock.patch.object(store.disk, "lock", side_effect=OSError(5, "bad")):
            store.sweep(1e9, 1e9)
        self.assertEqual((len(told), store.open_uploads), (1, 1))

    def test_receipts_end_and_files_stay(self) -> None:
        for low, high in thirds(900):
            done = put(self.store, self.data, low, high).done
        upload = upload_of(self.data)
        self.now = time.time() + 100
        self.store.sweep(10, 1000)
        self.assertEqual(asked(self.store, upload), ([(0, 900)], done))
        self.store.sweep(10, 10)
        self.assertEqual(asked(self.store, upload), ([], None))
        self.assertEqual(self.files(), {"a.bin": self.data})

    def test_what_comes_again_keeps_the_receipt_and_hardly_lengthens_it(self) -> None:
        for low, high in thirds(900):
            put(self.store, self.data, low, high)
        (size,) = self.sizes(".ledger")
        for _ in range(5):
            self.grow_old(0)
            self.now = time.time()
            for low, high in thirds(900):
                put(self.store, self.data, low, high)
            self.now += 50
            self.store.sweep(10, 100)
        (now,) = self.sizes(".ledger")
        self.assertLess(now - size, 30)

    def test_looking_at_a_folder_that_is_gone_is_trouble(self) -> None:
        os.rename(self.store.state_dir, self.store.state_dir + "-away")
        for call in (self.store.has, self.store.receive):
            with self.assertRaises(flowserver.Trouble):
                answer = call(upload_of(self.data), 0, 300)
                answer.write(self.data[:300])
        os.rename(self.store.state_dir + "-away", self.store.state_dir)


class Finishing:
    """Puts a last range in a thread of its own; result() is what came of it."""

    def __init__(self, store: Store, data: bytes, start: int, end: int) -> None:
        self.arguments = (store, data, start, end)
        self.outcome: Any = None
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.outcome = put(*self.arguments)
        except Exception as error:  # told by result()
            self.outcome = error

    def __enter__(self) -> Finishing:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.thread.join(PATIENCE)

    def result(self) -> Any:
        """Return the progress, or raise what was raised."""
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def killed_before(word: str) -> Any:
    """Let the process die before a line with this word is written."""
    original = flowserver._Ledger.append

    def append(ledger: Any, *lines: Any) -> None:
        if any(line[0] == word for line in lines):
            raise Killed
        original(ledger, *lines)

    return mock.patch.object(flowserver._Ledger, "append", append)


class OtherSystemsTest(StoreTest):
    """The same where files have one name only."""

    def open(self, **arguments: Any) -> Store:
        disk = arguments.setdefault("disk", flowserver.Disk(sync=False))
        disk.links = False
        return super().open(**arguments)


class WindowsLikeTest(StoreTest):
    """The same where an open file can be neither unlinked nor renamed."""

    def open(self, **arguments: Any) -> Store:
        arguments.setdefault("disk", WindowsLike())
        return super().open(**arguments)


class AnyCallTest(unittest.TestCase):
    """The store stopped at each of its calls to the operating system."""

    def scenario(self, store: Store, data: bytes) -> None:
        """A file in three chunks whose name is taken, in a folder that is new."""
        for low, high in thirds(len(data)):
            put(store, data, low, high, path="new/a.bin")

    def play(self, disk: TestDisk, check: Any) -> bool:
        """Run until the fault, then go on as a client would; return if it came."""
        data, done = noise(900, 7), []
        with temporary_folder() as folder:
            os.mkdir(os.path.join(folder, "new"))
            with open(os.path.join(folder, "new", "a.bin"), "wb") as file:
                file.write(b"somebody else's")
            store, came = None, False
            try:
                store = Store(folder, disk=disk, announce=done.append)
                store.sweep(1e9, 1e9)
                self.scenario(store, data)
            except (Killed, OSError, flowserver.FlowError):
                came = True
            check(folder, disk)
            disk.fault = None
            if store is None or disk.is_dead:
                store = Store(folder, disk=flowserver.Disk(False), announce=done.append)
                store.sweep(1e9, 1e9)
            self.scenario(store, data)
            store.sweep(1e9, 1e9)
            self.end_of_parts(folder)
            files = {"new/a.bin": b"somebody else's", "new/a (1).bin": data}
            self.assertEqual(finished_files(folder), files)
            self.assertEqual(leftovers(folder), {})
            ids = {one.id for one in done}
            self.assertEqual(len(ids), 1)
            if not disk.is_dead:
                self.assertEqual(len(done), 1)
        return came

    def end_of_parts(self, folder: str) -> None:
        """An hour later nothing is left of what was private."""
        later = Store(folder, clock=lambda: time.time() + 4000)
        later.sweep(1e9, 1e9)

    def every_call(self, make: Any) -> None:
        at, came = 0, True
        while came and at < 300:
            at += 1
            disk = make()
            disk.at = at
            with self.subTest(call=at):
                came = self.play(disk, self.nothing_wrong_is_visible)
        self.assertFalse(came)
        self.assertGreater(at, 40)

    def nothing_wrong_is_visible(self, folder: str, disk: TestDisk) -> None:
        for name, data in finished_files(folder).items():
            self.assertIn(data, (b"somebody else's", noise(900, 7)), name)

    def test_death_before_any_call_loses_nothing(self) -> None:
        def make() -> TestDisk:
            disk = TestDisk()
            disk.fault = Killed()
            return disk

        self.every_call(make)

    def test_death_after_any_call_loses_nothing(self) -> None:
        def make() -> TestDisk:
            disk = TestDisk()
            disk.fault, disk.is_after = Killed(), True
            return disk

        self.every_call(make)

    def test_full_disk_at_any_call_is_a_passing_trouble(self) -> None:
        def make() -> TestDisk:
            disk = TestDisk(sync=True)
            disk.fault = OSError(errno.ENOSPC, "no space")
            return disk

        # Looking, closing and unlocking need no space.
        free = ("close", "unlock", "lock", "try_lock", "read", "read_once", "unlink")
        with mock.patch.object(TestDisk, "FREE", free + TestDisk.FREE):
            self.every_call(make)


class FlushTest(unittest.TestCase):
    """Acknowledged is stored: what a failing flush covered is not acknowledged."""

    class Failing(flowserver.Disk):
        """The next flush fails, and is not told of again."""

        failures = 0

        def flush(self, fd: int) -> None:
            super().flush(fd)
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EIO, "I/O error")

    def setUp(self) -> None:
        self.disk = self.Failing()
        context = temporary_store(disk=self.disk)
        self.store = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        self.data = noise(900)
        self.upload = upload_of(self.data, identifier="flowserver-x")

    def put(self, start: int, end: int) -> Any:
        with self.store.receive(self.upload, start, end) as body:
            body.write(self.data[start:end])
            return body.commit()

    def test_chunk_is_not_recorded_when_its_flush_failed(self) -> None:
        self.put(0, 300)
        self.disk.failures = 1
        with self.assertRaises(flowserver.Trouble):
            self.put(300, 600)
        self.assertFalse(self.store.has(self.upload, 300, 600))
        self.put(300, 600)
        self.assertTrue(self.store.has(self.upload, 300, 600))

    def test_lines_are_written_again_when_their_flush_failed(self) -> None:
        self.put(0, 300)
        with self.store.receive(self.upload, 300, 600) as body:
            body.write(self.data[300:600])
            failing = [None, OSError(errno.EIO, "I/O error")]  # not that of the data
            flush = mock.patch.object(self.disk, "flush", side_effect=failing)
            write = mock.patch.object(self.disk, "write", wraps=self.disk.write)
            with flush, write as written, self.assertRaises(flowserver.Trouble):
                body.commit()
        names = os.listdir(self.store.state_dir)
        (name,) = [name for name in names if name.endswith(".ledger")]
        with open(os.path.join(self.store.state_dir, name), "rb") as file:
            self.assertEqual(written.call_args[0][1], file.read())

    def test_nobody_trusts_bytes_that_another_flush_lost(self) -> None:
        self.put(0, 300)
        bodies = [self.store.receive(self.upload, a, a + 300) for a in (300, 600)]
        for body in bodies:
            body.write(self.data[body.start : body.end])
        self.disk.failures = 1
        for body in bodies:
            with self.assertRaises(flowserver.Trouble):
                body.commit()
            body.close()
        self.assertFalse(self.store.has(self.upload, 300, 600))


class RaceTest(unittest.TestCase):
    """12 connections, 200 files, repeated and aborted chunks, all at once."""

    FILES, CHUNK, THREADS = 200, 600, 12

    def run_race(self) -> Tuple[collections.Counter[str], List[str]]:
        """Return what happened, counted, and what went wrong."""
        race = Race(self.FILES, self.CHUNK, random.Random(11))
        with serving(on_complete=race.done.append, sync=False) as server:
            threads = [
                threading.Thread(target=race.work, args=(server, seed))
                for seed in range(self.THREADS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE)
            race.repeat_after_the_end(server)
            race.judge(server)
        return race.counts, race.problems

    def test_no_file_is_wrong_and_none_is_there_twice(self) -> None:
        counts, problems = self.run_race()
        self.assertEqual(problems, [])
        self.assertGreaterEqual(counts["overlapping"], 200)
        self.assertGreaterEqual(counts["repeated during"], 20)
        self.assertGreaterEqual(counts["repeated after"], 20)
        self.assertGreaterEqual(counts["aborted"], 20)

    def test_race_is_lost_without_the_lock(self) -> None:
        @contextlib.contextmanager
        def unlocked(disk: Any, fd: int, waits: bool = True) -> Iterator[bool]:
            time.sleep(0.0005)  # the others get on meanwhile
            yield True

        problems: List[str] = []
        with mock.patch.object(flowserver, "locked", unlocked):
            for _ in range(20):  # many a race is won by luck
                problems = problems or self.run_race()[1]
        self.assertNotEqual(problems, [])


class Race:
    """The work of a race, shared by its threads."""

    def __init__(self, files: int, chunk_size: int, chance: random.Random) -> None:
        self.chunk_size = chunk_size
        self.lock = threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self.problems: List[str] = []
        self.done: List[Any] = []
        self.under_way: collections.Counter[Any] = collections.Counter()
        self.files = {
            f"{seed}.bin": noise(chunk_size * chance.randint(1, 6) + seed % 7, seed)
            for seed in range(files)
        }
        self.left: List[Tuple[str, int, bool]] = []
        names = list(self.files)
        for group in range(0, files, 6):  # so that chunks of one file meet
            tasks = []
            for name in names[group : group + 6]:
                count = chunk_count(len(self.files[name]), chunk_size)
                for number in range(1, count + 1):
                    tasks += [(name, number, False)] * chance.choice((1, 1, 2))
                    tasks += [(name, number, True)] * (chance.random() < 0.1)
            chance.shuffle(tasks)
            self.left += tasks
        self.left.reverse()

    def work(self, server: Any, seed: int) -> None:
        """Send what is left, until nothing is."""
        while True:
            with self.lock:
                if not self.left:
                    return
                name, number, is_aborted = self.left.pop()
                self.counts["overlapping"] += self.under_way[name] > 0
                self.counts["repeated during"] += self.under_way[name, number] > 0
                self.under_way[name] += 1
                self.under_way[name, number] += 1
            try:
                self.send(server, name, number, is_aborted)
            except Exception as error:  # a thread that dies would hide it
                self.problems.append(f"{name} {number}: {error!r}")
            with self.lock:
                self.under_way[name] -= 1
                self.under_way[name, number] -= 1

    def send(self, server: Any, name: str, number: int, is_aborted: bool) -> None:
        """Send one chunk; an aborted one ends half-way."""
        message = browser(name, self.files[name], number, self.chunk_size)
        if is_aborted:
            self.counts["aborted"] += 1
            with RawClient(server) as client:
                client.send(head_of(message), message.body[: len(message.body) // 2])
            return
        answer = send(server, *message)
        if answer.status != 200:
            self.problems.append(f"{name} {number}: {answer.status} {answer.body!r}")

    def repeat_after_the_end(self, server: Any) -> None:
        """Send chunks of finished files once more."""
        for name in list(self.files)[:40]:
            self.counts["repeated after"] += 1
            self.send(server, name, 1, False)

    def judge(self, server: Any) -> None:
        """Hold what is on disk against what was sent."""
        found = finished_files(server)
        for name in sorted(set(found) | set(self.files)):
            if found.get(name) != self.files.get(name):
                self.problems.append(f"{name} is wrong, missing or too much")
        ends = collections.Counter(one.relative_path for one in self.done)
        if set(ends) != set(self.files) or max(ends.values(), default=0) > 1:
            self.problems.append(f"{len(self.done)} ends of {len(self.files)} files")
        if leftovers(server):
            self.problems.append(f"left: {leftovers(server)}")


# ---- chunks and forms ----------------------------------------------------------------

MODES = {
    name: ("multipart",) if name == "Dropzone" else ("multipart", "address", "raw")
    for name in LIBRARIES
}
DONE = {
    "urlencoded": ("application/x-www-form-urlencoded", urllib.parse.urlencode),
    "JSON": ("application/json; charset=utf-8", json.dumps),
}
NO_NUMBERS = ("-1", "+1", "1e3", "9" * 16, "\u0663", "x", "1.0", " 1")


def hostile_numbers(library: str) -> Iterator[Dict[str, Any]]:
    """Yield what a chunk from 20 to 25 of 25 bytes may say wrongly of them."""
    said = parameters_of(library, "a", noise(25), 2, 10)
    is_head = library == "Content-Range"
    row = flowserver.recognise({**said, "Content-Range": ""} if is_head else said)
    assert row is not None
    wrong: Dict[str, Tuple[object, ...]] = {
        row.number: (0, 1, row.first + 1, row.first + 3, 9, None, ""),
        row.total: (0, 9, 24, 26, 100, None, ""),
        row.start: (0, None) * bool(row.number) + (21, 25, 10**14, ""),
        row.nominal: (0, 9, 11, 1000, None, ""),
        row.length: (0, 4, 6, None, ""),
        row.chunks: (0, 1, 2, 4, 100),
    }
    for name in filter(None, wrong):
        if not is_head:
            yield from ({name: text} for text in wrong[name] + NO_NUMBERS)
    for text in ("20-24/24", "20-23/25", "24-20/25", "20-25/25", "20-24/*", "*/25"):
        if is_head:
            yield {"Content-Range": "bytes " + text}
    for size in (0, 4, 6, 300 * KIB):
        if size != 4 or library != "Plupload":  # which does not say how many
            yield {"sent": noise(size)}


class EveryLibraryTest(unittest.TestCase):
    """Chunks of all libraries: taken as they are sent, or refused and forgotten."""

    def test_file_arrives_in_every_mode(self) -> None:
        for library in LIBRARIES:
            for mode in MODES[library]:
                with self.subTest(library, mode=mode), application() as app:
                    name, data = "d/a b+\u00fc%.bin", noise(25)
                    for index in (0, 1, 2):
                        sent = chunk_of(library, name, data, index, mode=mode)
                        answer = send(app, *sent)
                        self.assertEqual(answer.status, 200, answer.body)
                        again = send(app, *sent)  # the first answer was lost
                        self.assertEqual(again.json, answer.json)
                    self.assertEqual(answer.json["status"], "complete")
                    self.assertEqual(finished_files(app), {name: data})
                    self.assertEqual(leftovers(app), {})

    def test_file_of_one_chunk_and_of_none_arrives(self) -> None:
        for library, size in itertools.product(LIBRARIES, (0, 1, 10)):
            if size or library not in ("Fine Uploader", "Content-Range"):
                with self.subTest(library, size=size), application() as app:
                    answer = send(app, *chunk_of(library, "a", noise(size)))
                    self.assertEqual(answer.json.get("status"), "complete")
                    self.assertEqual(finished_files(app), {"a": noise(size)})

    def test_chunks_of_a_library_that_says_where_they_lie_come_in_any_order(
        self,
    ) -> None:
        for library in LIBRARIES:
            is_in_order = library in ("Plupload", "Content-Range")
            with self.subTest(library), application() as app:
                sent = [chunk_of(library, "a", noise(25), n) for n in (2, 0, 1)]
                statuses = [send(app, *message).status for message in sent]
                self.assertEqual(statuses[0], 409 if is_in_order else 200)
                self.assertEqual("a" in finished_files(app), not is_in_order)

    def test_chunk_that_contradicts_itself_leaves_nothing(self) -> None:
        for library in LIBRARIES:
            with self.subTest(library), application() as app:
                for index in (0, 1):
                    send(app, *chunk_of(library, "a", noise(25), index))
                before = set(leftovers(app))
                for wrong in hostile_numbers(library):
                    for mode in MODES[library]:
                        message = chunk_of(
                            library, "a", noise(25), 2, 10, mode, **wrong
                        )
                        self.check_refused(app, message, (mode, wrong))
                        self.assertEqual(set(leftovers(app)), before, (mode, wrong))
                answer = send(app, *chunk_of(library, "a", noise(25), 2))
                self.assertEqual(answer.json["status"], "complete")
                self.assertEqual(finished_files(app), {"a": noise(25)})

    def check_refused(self, app: UploadApp, message: Message, what: Any) -> None:
        answer = send(app, *message)
        self.assertIn(answer.status, range(400, 500), what)
        self.assertRegex(answer.json["error"], r"\A[^\n]+\.\Z", what)

    def test_name_that_leads_outside_or_nowhere_is_refused(self) -> None:
        wrong = ("", "..", "../a", "d/../../a", "d\\..\\..\\a", ".", "d/", "a/..")
        for library in LIBRARIES:
            with application() as app:
                for name, mode in itertools.product(wrong, MODES[library]):
                    with self.subTest(library, name=name, mode=mode):
                        message = chunk_of(library, name, noise(25), mode=mode)
                        self.check_refused(app, message, mode)
                self.assertEqual((finished_files(app), leftovers(app)), ({}, {}))

    def test_parameter_with_two_values_is_refused(self) -> None:
        for library in set(LIBRARIES) - {"Content-Range"}:
            with application() as app:
                for name in parameters_of(library, "d/a", noise(25), 0, 10):
                    with self.subTest(library, name=name):
                        path = chunk_of(library, "d/a", noise(25), mode="address").path
                        twice = form({name: "1x"}, ("file", "a", noise(10)), path=path)
                        self.check_refused(app, twice, name)
                self.assertEqual(leftovers(app), {})

    def test_form_of_a_chunk_has_one_file_and_it_is_the_last(self) -> None:
        file, more = ("file", "a", noise(10)), ("file", "b", b"x")
        for library in LIBRARIES:
            path = chunk_of(library, "a", noise(25), mode="address").path
            said = parameters_of(library, "a", noise(25), 0, 10)
            heads = {word: str(text) for word, text in said.items() if "-" in word}
            with self.subTest(library), application() as app:
                for files in ((), (file, more), (more, file)):
                    message = form({}, *files, path=path, headers=heads)
                    self.check_refused(app, message, files)
                self.assertEqual((finished_files(app), leftovers(app)), ({}, {}))

    def test_chunk_of_a_known_library_is_never_taken_for_a_file(self) -> None:
        for library in set(LIBRARIES) - {"Content-Range", "Plupload"}:
            marks = DIALECTS[library].marks
            for mark, mode in itertools.product(marks, MODES[library]):
                message = chunk_of(library, "a", noise(25), 1, 10, mode, **{mark: None})
                with self.subTest(library, mark=mark), application() as app:
                    self.check_refused(app, message, mode)
                    self.assertEqual((finished_files(app), leftovers(app)), ({}, {}))
        for said in ({"chunk": "1"}, {"chunks": "3"}, {"offset": "10"}):
            message = form({"name": "a", **said}, ("file", "blob", noise(10)))
            with self.subTest(said), application() as app:
                self.check_refused(app, message, said)
                self.assertEqual(finished_files(app), {})

    def test_part_of_another_protocol_is_never_taken_for_a_file(self) -> None:
        """A tus client whose Tus-Resumable a proxy has removed, say."""
        for method, name in itertools.product(("POST", "PUT", "PATCH"), ("", "/abc")):
            head = {
                "Upload-Offset": "5",
                "Content-Type": "application/offset+octet-stream",
            }
            with self.subTest(method), application() as app:
                message = Message(method, "/upload" + name, noise(10), head)
                self.check_refused(app, message, name)
                self.assertEqual(finished_files(app), {})

    def test_curl_goes_on_with_a_name_behind_the_address(self) -> None:
        """``curl -T a.bin -C 10 .../upload/d/a.bin``"""
        with application() as app:
            for where in ("0-9/25", "10-24/25"):
                low, high = map(int, re.findall("[0-9]+", where)[:2])
                head = {"Content-Range": "bytes " + where}
                sent = noise(25)[low : high + 1]
                answer = send(app, "PUT", "/upload/d/a.bin", sent, head)
                self.assertEqual(answer.status, 200, answer.body)
            self.assertEqual(finished_files(app), {"d/a.bin": noise(25)})

    def test_resized_image_in_one_chunk_arrives(self) -> None:
        said = {"dztotalfilesize": 900, "dztotalchunkcount": 1}
        with application() as app:
            message = chunk_of("Dropzone", "a", noise(25), 0, 100, **said)
            self.assertEqual(send(app, *message).json["size"], 25)
            self.assertEqual(finished_files(app), {"a": noise(25)})

    def test_strangers_with_an_identifier_that_a_program_set_do_not_meet(self) -> None:
        with application() as app:
            for index, seed in itertools.product((0, 1, 2), (1, 2)):
                data, client = noise(25, seed), f"10.0.0.{seed}"
                message = chunk_of("Dropzone", "a", data, index, dzuuid="1")
                self.assertEqual(send(app, *message, client=client).status, 200)
            self.assertEqual(
                finished_files(app), {"a": noise(25, 1), "a (1)": noise(25, 2)}
            )

    def test_who_knows_a_drawn_identifier_goes_on_from_any_address(self) -> None:
        for library in ("Dropzone", "Fine Uploader"):
            with application() as app:
                for index in (0, 1, 2):
                    message = chunk_of(library, "a", noise(25), index)
                    send(app, *message, client=f"10.0.0.{index}")
                self.assertEqual(finished_files(app), {"a": noise(25)})

    def test_refusal_is_told_with_the_status_that_ends_it(self) -> None:
        for library in LIBRARIES:
            with self.subTest(library), application(max_file_size=24) as app:
                status = send(app, *chunk_of(library, "a", noise(25))).status
                self.assertIn(status, GIVES_UP.get(library, range(400, 600)))


class FineUploaderTest(unittest.TestCase):
    """What Fine Uploader asks beside sending chunks."""

    def setUp(self) -> None:
        context = application()
        self.app = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)

    def give(self, *indexes: int, **how: Any) -> Answer:
        for index in indexes:
            answer = send(
                self.app, *chunk_of("Fine Uploader", "a", noise(25), index, **how)
            )
        return answer

    def end(self, kind: str = "JSON", **changes: object) -> Answer:
        said = {"qquuid": UUID, "qqfilename": "a", "qqtotalfilesize": 25}
        said.update({"qqtotalparts": 3, **changes})
        head, write = DONE[kind]
        return send(
            self.app, "POST", "/upload", write(said).encode(), {"Content-Type": head}
        )

    def test_end_of_a_complete_file_is_a_success(self) -> None:
        for kind in DONE:
            self.give(2, 1, 0)
            for _ in "12":
                answer = self.end(kind, other=[1, {"a": None}])
                self.assertEqual(answer.status, 200)
                self.assertEqual(answer.json["path"], "a")
            self.assertIs(answer.json["success"], True)

    def test_end_of_a_file_that_is_not_complete_is_an_error(self) -> None:
        for kind in DONE:
            self.assertEqual(self.end(kind).status, 409)
            self.give(0, 2)
            self.assertEqual(self.end(kind).status, 409)
        self.assertEqual(finished_files(self.app), {})

    def test_end_of_a_file_in_one_chunk_is_a_success(self) -> None:
        """Its chunk was answered as complete; it leaves no receipt."""
        self.give(0, size=25)
        self.assertEqual(self.end(qqtotalparts=1).status, 200)

    def test_end_is_all_that_is_sent_of_an_empty_file(self) -> None:
        for kind in DONE:
            for _ in "12":
                answer = self.end(kind, qqtotalparts=0, qqtotalfilesize=0, qqpath="d/")
                self.assertEqual(answer.json["path"], "d/a")
        self.assertEqual(finished_files(self.app), {"d/a": b""})

    def test_end_that_makes_no_sense_is_refused(self) -> None:
        for changes in (
            {"qqtotalparts": 0, "qqtotalfilesize": 25},
            {"qqtotalparts": 0, "qqfilename": "../a"},
            {"qqtotalparts": 0, "qqfilename": ""},
            {"qquuid": ""},
            {"qqtotalfilesize": "x"},
        ):
            with self.subTest(changes):
                self.assertEqual(
                    self.end(**{"qqtotalfilesize": 0, **changes}).status, 400
                )
        self.assertEqual(finished_files(self.app), {})

    def test_body_that_holds_no_parameters_is_refused(self) -> None:
        for kind, body in (
            ("application/json", b"[" * 60000),
            ("application/json", b"[]"),
            ("application/json", b"7"),
            ("application/json", b"{"),
            ("application/json", b"\xff"),
            ("application/json", b"{}"),
            ("application/json", b" " * 70000 + b"{}"),
            ("application/x-www-form-urlencoded", b"a=1&a=2"),
            ("application/x-www-form-urlencoded", b"a=%ff"),
            ("application/x-www-form-urlencoded", b"a=1"),
        ):
            with self.subTest(kind, body=body[:9]):
                answer = send(self.app, "POST", "/upload", body, {"Content-Type": kind})
                self.assertEqual(answer.status, 400)
        self.assertEqual(finished_files(self.app), {})

    def test_resumed_upload_that_is_unknown_begins_anew(self) -> None:
        for mode in MODES["Fine Uploader"]:
            answer = self.give(1, mode=mode, qqresume="true")
            self.assertEqual((answer.status, answer.json["success"]), (200, False))
            self.assertIs(answer.json["reset"], True)
            self.assertIn("try again", answer.json["error"])
            self.assertEqual(leftovers(self.app), {})
        self.give(0)
        self.assertIs(self.give(1, qqresume="true").json["success"], True)

    def test_all_of_a_file_in_one_form_arrives(self) -> None:
        said = {"qquuid": UUID, "qqfilename": "b", "qqtotalfilesize": "25"}
        answer = send(self.app, *form(said, ("qqfile", "a", noise(25))))
        self.assertEqual((answer.status, answer.json["path"]), (200, "b"))
        query = urllib.parse.urlencode(
            {"qquuid": UUID, "qqfilename": "c d", "qqfile": "c d"}
        )
        kind = {"Content-Type": "application/octet-stream"}
        send(self.app, "POST", "/upload?" + query, noise(25), kind)
        self.assertEqual(set(finished_files(self.app)), {"b", "c d"})

    def test_file_of_another_size_than_it_says_is_refused(self) -> None:
        for size in ("24", "26", "x"):
            said = {"qquuid": UUID, "qqfilename": "b", "qqtotalfilesize": size}
            answer = send(self.app, *form(said, ("qqfile", "a", noise(25))))
            self.assertEqual(answer.status, 400)
        self.assertEqual((finished_files(self.app), leftovers(self.app)), ({}, {}))

    def delete(self, how: str) -> int:
        if how == "DELETE":
            return send(self.app, "DELETE", f"/upload/{UUID}?more=1").status
        said = urllib.parse.urlencode({"_method": "DELETE", "qquuid": UUID}).encode()
        return send(
            self.app, "POST", "/upload", said, {"Content-Type": DONE[how][0]}
        ).status

    def test_unfinished_upload_is_forgotten_and_a_file_stays(self) -> None:
        for how in ("DELETE", "urlencoded"):
            self.assertEqual(self.delete(how), 403)
            self.give(0)
            self.assertEqual((self.delete(how), leftovers(self.app)), (204, {}))
            self.give(0, 1, 2)
            self.assertEqual(self.delete(how), 403)
            self.assertEqual(finished_files(self.app), {"a": noise(25)})
            self.app.sweep()
            os.unlink(os.path.join(self.app.store.upload_dir, "a"))
            shutil.rmtree(self.app.store.state_dir)
            os.mkdir(self.app.store.state_dir)

    def test_file_that_is_not_known_any_more_is_not_told_to_be_gone(self) -> None:
        """Fine Uploader asks for it when a file is stored, and would show it gone."""
        self.give(0, size=25)
        for how in ("DELETE", "urlencoded"):
            self.assertIn(self.delete(how), range(400, 500))
        self.assertEqual(list(finished_files(self.app)), ["a"])


def cut(message: Message, size: int, client: str = "::1") -> Request:
    """Return the request of a message whose body breaks off."""
    return prepared(message, io.BytesIO(message.body[:size]).read)


class WholeFileTest(unittest.TestCase):
    """Forms and PUT: each file is stored whole, or nothing of it."""

    PAGE = {"Accept": "text/html,application/xhtml+xml", "Sec-Fetch-Mode": "navigate"}

    def test_files_of_a_form_are_stored_under_their_names(self) -> None:
        files = {"a": noise(25), "d/e.txt": b"", "\u65e5 \u00fc%20.bin": noise(3)}
        with application() as app:
            sent = (("files[]", name, data) for name, data in files.items())
            answer = send(app, *form({}, *sent))
            self.assertEqual((answer.status, answer.json["success"]), (200, True))
            self.assertEqual([f["path"] for f in answer.json["files"]], list(files))
            self.assertEqual(finished_files(app), files)

    def test_answer_for_one_file_has_the_usual_keys(self) -> None:
        with application() as app:
            answer = send(app, *form({}, ("f", "a", b"x"))).json
            one = {"name": "a", "filename": "a", "path": "a", "size": 1}
            whole = {"success": True, "status": "complete", "files": [one]}
            self.assertEqual(answer, {**one, **whole})

    def test_field_for_files_that_was_left_empty_is_no_file(self) -> None:
        empty = ("f", "", b"")
        with application() as app:
            answer = send(app, *form({"a": "b"}, empty, ("f", "a", b"x"), empty))
            self.assertEqual([f["name"] for f in answer.json["files"]], ["a"])
            for message in (form({"a": "b"}, empty, empty), form({"a": "b"}), form({})):
                answer = send(app, *message)
                self.assertEqual(answer.status, 400)
                self.assertIn("no file", answer.json["error"])

    def test_refused_file_costs_the_others_nothing(self) -> None:
        files = [("f", f"{n}", noise(n)) for n in range(100)]
        wrong = {
            "name": ("f", "../x", noise(60), 400),
            "no name": ("f", "", noise(60), 400),
            "size": ("f", "x", noise(101), 413),
            "empty and wrong": ("f", "..", b"", 400),
            "folder": ("f", "7/x", noise(60), 409),
        }
        for place, (what, (*one, status)) in zip((50, 0, 99, 100, 8), wrong.items()):
            sent = files[:place] + [tuple(one)] + files[place:]
            with self.subTest(what, place=place), application(max_file_size=100) as app:
                answer = send(app, *form({}, *sent))
                self.assertEqual(answer.status, status)
                said = answer.json["files"]
                self.assertEqual([f["name"] for f in said], [f[1] for f in sent])
                self.assertEqual(
                    [n for n, f in enumerate(said) if "error" in f], [place]
                )
                self.assertEqual(answer.json["error"], said[place]["error"])
                kept = {name: data for _, name, data in files}
                self.assertEqual(finished_files(app), kept)
                self.assertEqual(leftovers(app), {})

    def test_two_refusals_have_the_status_of_the_first(self) -> None:
        with application(max_file_size=5) as app:
            for names, status in ((("x", ".."), 413), (("..", "x"), 400)):
                sent = (("f", name, noise(6)) for name in names)
                answer = send(app, *form({}, *sent, ("f", "a", b"y")))
                self.assertEqual(answer.status, status)
                self.assertEqual(len(answer.json["files"]), 3)
            self.assertEqual(finished_files(app), {"a": b"y"})

    def test_file_is_refused_while_it_comes_and_is_not_read_on_for_ever(self) -> None:
        size = 1 << 40
        start = form({}, ("f", "a", b""))
        body = start.body[: -len(BOUNDARY) - 8]
        blocks, read = itertools.chain([body], itertools.repeat(bytes(MIB))), []

        def endless(most: int) -> bytes:
            read.append(next(blocks)[:most])
            return read[-1]

        with application(max_file_size=3 * MIB, max_chunk_size=MIB) as app:
            request = prepared(start, endless)._replace(length=size)
            self.assertEqual(app.handle(request).status, 413)
            self.assertLess(len(read), 9)
            self.assertEqual((finished_files(app), leftovers(app)), ({}, {}))

    def test_size_of_a_raw_file_is_what_its_length_says(self) -> None:
        for length, status in ((-1, 411), (26, 408), (24, 200), (101, 413)):
            with self.subTest(length), application(max_file_size=100) as app:
                message = Message("PUT", "/upload/a", noise(25))
                read = mock.Mock(side_effect=io.BytesIO(message.body).read)
                request = prepared(message, read)._replace(length=length)
                self.assertEqual(app.handle(request).status, status)
                is_read = status in (200, 408)
                self.assertEqual(read.called, is_read)
                there = {"a": noise(25)[:24]} if status == 200 else {}
                self.assertEqual((finished_files(app), leftovers(app)), (there, {}))

    def test_file_has_the_path_behind_the_address(self) -> None:
        paths = {
            "d/e/a.bin": "d/e/a.bin",
            "d%2Fa%20b+c%25.bin": "d/a b+c%.bin",
            "%E6%97%A5.bin": "\u65e5.bin",
            "./b//c": "b/c",
        }
        with serving() as server:
            for path, name in paths.items():
                for method in ("PUT", "POST"):
                    with self.subTest(path, method=method):
                        answer = send(server, method, "/upload/" + path, noise(25))
                        self.assertEqual(answer.json["path"], name)
            for path in (
                "..",
                "%2e%2e/a",
                "d/..%2f..%2fa",
                "a%5C..%5C..%5Cb",
                "d/",
                "",
            ):
                for method in ("PUT", "POST"):
                    with self.subTest(path, method=method):
                        answer = send(server, method, "/upload/" + path, noise(25))
                        self.assertEqual(answer.status, 400)
            self.assertEqual(set(finished_files(server)), set(paths.values()))

    def test_raw_file_may_be_named_in_the_head(self) -> None:
        """As blueimp does it with multipart: false, and of any type."""
        for kind in (
            "image/png",
            "application/json",
            "application/x-www-form-urlencoded",
        ):
            head = {"Content-Type": kind, "Content-Disposition": 'a; filename="%c3%a4"'}
            with self.subTest(kind), application() as app:
                for method, path in (("POST", "/upload"), ("PUT", "/upload/b")):
                    answer = send(app, method, path, b'{"a":1}', head)
                    self.assertEqual(answer.status, 200, answer.body)
                self.assertEqual(set(finished_files(app)), {"\u00e4", "b"})
        with application() as app:
            answer = send(app, "POST", "/upload", b"x", {"Content-Type": "image/png"})
            self.assertIn("has no name", answer.json["error"])

    def test_parameters_after_the_file_make_no_file_of_each_chunk(self) -> None:
        end = f"--{BOUNDARY}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        fields = flow_parameters("a", noise(25), 1, 10, False, "flow")
        body = multipart({}, noise(10))[: -len(end)] + multipart(fields, None)
        with application() as app:
            answer = send(app, "POST", "/upload", body, kind)
            self.assertEqual(answer.status, 400, answer.body)
            self.assertIn("before the file", answer.json["error"])
            self.assertEqual((finished_files(app), leftovers(app)), ({}, {}))

    def test_blueimp_can_list_the_file_after_its_last_chunk(self) -> None:
        head = {"Content-Disposition": 'attachment; filename="a"'}
        with application() as app:
            for start in (0, 3):
                head["Content-Range"] = f"bytes {start}-{start + 2}/6"
                body = noise(6)[start : start + 3]
                answer = send(app, "POST", "/upload", body, head)
            listed = [{"name": "a", "filename": "a", "path": "a", "size": 6}]
            self.assertEqual(answer.json["files"], listed)

    def test_body_that_is_cut_keeps_nothing_of_that_file(self) -> None:
        files = {"a": noise(25, 1), "b": noise(25, 2), "c": b""}
        message = form({"x": "1"}, *(("f", n, data) for n, data in files.items()))
        with application() as app:
            for size in range(0, len(message.body), 7):
                status = app.handle(cut(message, size)).status
                self.assertEqual(status, 408 if size else 400)
                for name, data in finished_files(app).items():
                    self.assertEqual(data, files[name])
                self.assertEqual(leftovers(app), {})
            raw = Message("PUT", "/upload/d", noise(25))
            for size in range(25):
                self.assertIn(app.handle(cut(raw, size)).status, (400, 408))
            self.assertNotIn("d", finished_files(app))

    def test_browser_that_navigates_gets_a_page(self) -> None:
        name = "<b>&'x"
        with application(max_file_size=9) as app:
            for size, status in ((9, 200), (10, 413)):
                files = ("f", name, noise(size)), ("f", "b", b"y")
                answer = send(app, *form({}, *files, headers=self.PAGE))
                self.assertEqual(answer.status, status)
                self.assertIn("text/html", answer.headers["content-type"])
                self.assertNotIn(b"<b>", answer.body)
                shown = (
                    b"_b_&amp;&#x27;x" if status == 200 else b"&lt;b&gt;&amp;&#x27;x"
                )
                self.assertIn(b"<li>" + shown, answer.body)
                self.assertIn(b"stored", answer.body)
                self.assertNotIn(b"href", answer.body)  # here is nothing to see
            nothing = send(app, *form({}, headers=self.PAGE))
            self.assertIn(b"<li>: There is no file in the form.", nothing.body)
            refused = dict(self.PAGE, Origin="http://evil.example")
            answer = send(app, *form({}, ("f", "a", b"x"), headers=refused))
            self.assertIn("text/html", answer.headers["content-type"])

    def test_script_gets_json(self) -> None:
        for head in (
            {"Accept": "*/*"},
            {"Accept": "application/json"},
            {**self.PAGE, "Sec-Fetch-Mode": "cors"},
            {**self.PAGE, "X-Requested-With": "XMLHttpRequest"},
        ):
            with application() as app:
                answer = send(app, *form({}, ("f", "a", b"x"), headers=head))
                self.assertIs(answer.json["success"], True)

    def test_page_of_a_refusal_is_one_line_of_the_log(self) -> None:
        message = form({}, ("f", "../\u2028\u0085\u202ex", b"x"), headers=self.PAGE)
        with application() as app, self.assertLogs("flowserver", "INFO") as logs:
            self.assertEqual(send(app, *message).status, 400)
        self.assertTrue(all(line.isprintable() for line in logs.output), logs.output)

    def test_fields_before_a_file_reach_the_functions_of_the_program(self) -> None:
        done: List[Any] = []
        place = mock.Mock(side_effect=lambda one: "p/" + one.relative_path)
        fields = {"a": "1", "name": "x", "_charset_": "\u00e4"}
        with application(on_complete=done.append, place=place) as app:
            files = ("f", "d/b", noise(25)), ("f", "c", b"")
            send(app, *form(fields, *files, path="/upload?q=2"))
        for one, asked, size in zip(done, place.mock_calls, (25, 0)):
            self.assertEqual(one.fields, {**fields, "q": "2"})
            self.assertEqual(asked.args[0].fields, one.fields)
            self.assertEqual((one.size, asked.args[0].size), (size, size))
        self.assertEqual([one.relative_path for one in done], ["p/d/b", "p/c"])

    def test_file_of_another_size_has_another_identity(self) -> None:
        done: List[Any] = []
        with application(on_complete=done.append) as app:
            for _ in "12":
                send(app, "PUT", "/upload/a", b"x")
        self.assertEqual(len({one.id for one in done}), len(done))

    def test_methods_that_store_nothing_are_refused(self) -> None:
        with application() as app:
            for method in ("MOVE", "TRACE", "get"):
                self.assertEqual(send(app, method, "/upload/a", b"x").status, 405)
            self.assertEqual(send(app, "GET", "/upload/a").status, 404)


class SequentialTest(unittest.TestCase):
    """Libraries that give no identifier: never two files in one."""

    LIBRARIES = ("Plupload", "Content-Range")
    ORDERS = sorted(set(itertools.permutations("AAABBB")))

    def run_order(
        self, app: UploadApp, name: str, library: str, order: Any, files: Any, then: str
    ) -> List[str]:
        """Let two clients send in this order; return who heard of no error.

        After an error a client stops, sends the chunk again ("retry"), or all ("all").
        """
        index, tries = {"A": 0, "B": 0}, {"A": 3, "B": 3}
        for who in order:
            if index[who] < 3 and tries[who]:
                message = chunk_of(library, name, files[who], index[who])
                if send(app, *message).status == 200:
                    index[who] += 1
                else:
                    tries[who] = 0 if then == "stop" else tries[who] - 1
                    index[who] *= then == "retry"
        return [who for who in files if index[who] == 3]

    def happy(self, orders: Sequence[Any], at: int, then: str = "stop") -> List[int]:
        """Try orders of files that differ `at` a place; return how many were happy."""
        files, counts = {"A": noise(25), "B": noise(25)}, []
        files["B"] = changed(files["B"], at) if at >= 0 else files["B"]
        for library in self.LIBRARIES:
            with application() as app:
                whos = [
                    self.run_order(app, f"{n}", library, order, files, then)
                    for n, order in enumerate(orders)
                ]
                found = finished_files(app)
                self.assertLessEqual(set(found.values()), set(files.values()), "mixed")
                for n, order in enumerate(orders):
                    mine = (found.get(f"{n}"), found.get(f"{n} (1)"))
                    for who in whos[n]:
                        self.assertIn(files[who], mine, f"{who} was lost of {order}")
                counts += map(len, whos)
        return counts

    def test_two_at_once_get_their_own_files_or_hear_an_error(self) -> None:
        happy = [self.happy(self.ORDERS, at) for at in (0, 12, 24)]
        self.assertEqual(set(sum(happy, [])), {1, 2})

    def test_two_that_try_again_get_their_own_files_or_hear_an_error(self) -> None:
        chance = random.Random(3)
        orders = [chance.choices("AB", k=25) for _ in range(8)]
        for at, then in itertools.product((0, 12, 24), ("retry", "all")):
            self.assertNotIn(0, self.happy(orders, at, then))

    def test_two_at_once_with_one_content_are_both_served(self) -> None:
        self.assertEqual(set(self.happy(self.ORDERS, -1)), {2})

    def test_file_that_was_left_in_the_middle_may_be_sent_changed(self) -> None:
        for library in self.LIBRARIES:
            with application() as app:
                send(app, *chunk_of(library, "a", noise(25, 1)))
                for name in leftovers(app):
                    os.utime(os.path.join(app.store.state_dir, name), (1, 1))
                sent = [chunk_of(library, "a", noise(25, 2), n) for n in (0, 0, 1, 2)]
                statuses = [send(app, *message).status for message in sent]
                self.assertEqual(statuses, [409, 200, 200, 200])
                self.assertEqual(finished_files(app), {"a": noise(25, 2)})

    def test_who_goes_on_in_the_middle_of_nothing_is_refused(self) -> None:
        for library, index in itertools.product(self.LIBRARIES, (1, 2)):
            with application() as app:
                answer = send(app, *chunk_of(library, "a", noise(25), index))
                self.assertEqual((answer.status, leftovers(app)), (409, {}))
                self.assertEqual(app.store.open_uploads, 0)
                self.assertIn("beginning", answer.json["error"])

    def test_strangers_do_not_meet(self) -> None:
        for library in self.LIBRARIES:
            with application() as app:
                for index, seed in itertools.product((0, 1, 2), (1, 2)):
                    message = chunk_of(library, "a", noise(25, seed), index)
                    answer = send(app, *message, client=f"10.0.0.{seed}")
                    self.assertEqual(answer.status, 200)
                found = sorted(finished_files(app).values())
                self.assertEqual(found, sorted((noise(25, 1), noise(25, 2))))

    def test_names_and_sizes_keep_uploads_apart(self) -> None:
        files = {"a": noise(25), "b": noise(25, 2), "c": noise(24)}
        with application() as app:
            for library, index in itertools.product(self.LIBRARIES, (0, 1, 2)):
                for name, data in files.items():
                    send(app, *chunk_of(library, name, data, index))
            self.assertEqual(finished_files(app), files)


# ---- tus -----------------------------------------------------------------------------

PATCH_TYPE = "application/offset+octet-stream"


def base64_of(data: Union[str, bytes]) -> str:
    """Return it as tus writes metadata and checksums."""
    data = data.encode() if isinstance(data, str) else data
    return base64.b64encode(data).decode()


class TusClient:
    """One upload of a client that speaks tus 1.0; words of headers are joined by _."""

    def __init__(self, where: Any, data: bytes = noise(250), **headers: str) -> None:
        self.where = where
        self.data = data
        self.headers = headers
        self.place = ""  # where the upload lives

    def message(
        self, method: str, path: str, body: bytes = b"", **headers: Any
    ) -> Message:
        said = {"Tus_Resumable": "1.0.0", **self.headers, **headers}
        names = {name.replace("_", "-"): text for name, text in said.items()}
        given = {name: str(text) for name, text in names.items() if text is not None}
        return Message(method, path, body, given)

    def ask(self, method: str, body: bytes = b"", **headers: Any) -> Answer:
        """Send a request to the upload."""
        return send(self.where, *self.message(method, self.place, body, **headers))

    def create(self, body: bytes = b"", **headers: Any) -> Answer:
        said = {"Upload_Length": len(self.data), "Upload_Metadata": "filename YQ=="}
        message = self.message("POST", "/upload", body, **{**said, **headers})
        answer = send(self.where, *message)
        place = answer.headers.get("location", "")
        self.place = urllib.parse.urljoin("/upload", place)
        return answer

    def piece(self, start: int, end: int, **headers: Any) -> Message:
        said = {"Upload_Offset": start, "Content_Type": PATCH_TYPE, **headers}
        return self.message("PATCH", self.place, self.data[start:end], **said)

    def patch(self, start: int, end: int, **headers: Any) -> Answer:
        return send(self.where, *self.piece(start, end, **headers))

    def offset(self) -> int:
        return int(self.ask("HEAD").headers["upload-offset"])


class Stalled:
    """A request in a thread of its own whose body comes up to `size` and then hangs."""

    def __init__(self, app: UploadApp, message: Message, size: int) -> None:
        self.app = app
        self.message = message
        self.size = size
        self.given = 0
        self.status = 0
        self._is_here, self._may_go_on = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.status = self.app.handle(prepared(self.message, self._read)).status

    def _read(self, most: int) -> bytes:
        if self.given == self.size:
            self._is_here.set()
            self._may_go_on.wait(PATIENCE)
        end = min(self.given + most, self.size)
        block, self.given = self.message.body[self.given : end], end
        return block

    def __enter__(self) -> Stalled:
        self._thread.start()
        assert self._is_here.wait(PATIENCE)
        return self

    def end(self, is_cut: bool = False) -> int:
        """Let the rest come, or none of it; return the status of the answer."""
        self.size = self.size if is_cut else len(self.message.body)
        self._may_go_on.set()
        self._thread.join(PATIENCE)
        return self.status

    def __exit__(self, *exception: object) -> None:
        self.end(is_cut=True)


class TusTest(unittest.TestCase):
    """The tus protocol, as its specification has it."""

    def setUp(self) -> None:
        self.app = self.enter(application())
        self.client = TusClient(self.app)

    def enter(self, context: Any) -> Any:
        value = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return value

    def test_what_is_spoken_is_told(self) -> None:
        answer = send(self.app, "OPTIONS", "/upload")
        self.assertEqual((answer.status, answer.body), (204, b""))
        self.assertEqual(answer.headers["tus-version"], "1.0.0")
        self.assertEqual(answer.headers["tus-checksum-algorithm"], "sha1,sha256")
        self.assertNotIn("tus-max-size", answer.headers)
        extensions = answer.headers["tus-extension"].split(",")
        self.assertIn("creation-with-upload", extensions)
        with application(max_file_size=9) as app:
            answer = send(app, "OPTIONS", "/upload/x")
            self.assertEqual(answer.headers["tus-max-size"], "9")

    def test_file_arrives_in_one_piece_or_many(self) -> None:
        for size in (250, 100, 125, 1):
            created = self.client.create(
                Upload_Metadata="filename " + base64_of(f"{size}")
            )
            self.assertEqual((created.status, created.body), (201, b""))
            for start in range(0, 250, size):
                self.assertEqual(self.client.offset(), start)
                answer = self.client.patch(start, start + size)
                self.assertEqual((answer.status, answer.body), (204, b""))
                end = min(start + size, 250)
                self.assertEqual(answer.headers["upload-offset"], str(end))
            self.assertEqual(finished_files(self.app)[f"{size}"], self.client.data)
            self.assertEqual(leftovers(self.app), {})

    def test_file_may_come_with_its_creation(self) -> None:
        for size in (1, 100, 250):
            answer = self.client.create(
                self.client.data[:size],
                Content_Type=PATCH_TYPE,
                Upload_Metadata="filename " + base64_of(f"{size}"),
            )
            self.assertEqual(answer.status, 201)
            self.assertEqual(answer.headers["upload-offset"], str(size))
            self.assertEqual(self.client.patch(size, 250).status, 204)
            self.assertEqual(finished_files(self.app)[f"{size}"], self.client.data)

    def test_creation_with_bytes_that_are_refused_leaves_nothing(self) -> None:
        """Nobody was told where it lives."""
        wrong = "sha1 " + base64_of(hashlib.sha1(b"x").digest())
        for headers, status in (
            ({"Upload_Length": 99}, 413),
            ({"Upload_Checksum": wrong}, 460),
            ({"Upload_Checksum": "md5 x"}, 400),
        ):
            body, kind = self.client.data, {"Content_Type": PATCH_TYPE}
            self.assertEqual(self.client.create(body, **kind, **headers).status, status)
        message = self.client.message(
            "POST", "/upload", body, Upload_Length=250, **kind
        )
        self.assertEqual(self.app.handle(cut(message, 100)).status, 408)
        self.assertEqual((leftovers(self.app), self.app.store.open_uploads), ({}, 0))

    def test_empty_file_is_finished_when_it_is_created(self) -> None:
        for kind in (None, PATCH_TYPE):
            client = TusClient(self.app, b"")
            self.assertEqual(client.create(Content_Type=kind).status, 201)
            self.assertEqual(client.offset(), 0)
            self.assertEqual(client.patch(0, 0).status, 204)
        self.assertEqual(finished_files(self.app), {"a": b""})

    def test_name_is_found_in_the_metadata(self) -> None:
        names = {
            "filename": "\u65e5 a,b.bin",
            "name": "n",
            "relativePath": "d/e/p",
            "filetype": "text/plain",
        }
        pairs = {name: f"{name} {base64_of(text)}" for name, text in names.items()}
        cases = {
            ",".join(pairs.values()): "d/e/p",
            f"{pairs['filename']} , {pairs['name']}": "\u65e5 a,b.bin",
            f"is_secret,{pairs['name']}": "n",
            f"relativePath {base64_of('null')},{pairs['name']}": "n",
            f"filename ,{pairs['name']}": "n",
        }
        for text, path in cases.items():
            with self.subTest(text):
                self.client.create(
                    self.client.data, Content_Type=PATCH_TYPE, Upload_Metadata=text
                )
                self.assertIn(path, finished_files(self.app))
        before = set(finished_files(self.app))
        for text in (None, "", pairs["filetype"], "filename"):
            self.client.create(
                self.client.data, Content_Type=PATCH_TYPE, Upload_Metadata=text
            )
        for name in set(finished_files(self.app)) - before:
            self.assertRegex(name, r"\A[0-9a-f]{32}\Z")

    def test_creation_that_can_not_be_read_is_refused(self) -> None:
        leads_outside = "filename " + base64_of("../x")
        for headers in (
            *({"Upload_Length": text} for text in (None, "", *NO_NUMBERS)),
            *(
                {"Upload_Metadata": f"filename {text}"}
                for text in ("YQ", "\u00fc", "/w==")
            ),
            {"Upload_Metadata": "filename YQ==,filename Yg=="},
            {"Upload_Metadata": "f\u00fc YQ=="},
            {"Upload_Metadata": leads_outside},
            {"Upload_Concat": "partial"},
            {"Upload_Defer_Length": "1", "Upload_Length": None},
        ):
            with self.subTest(headers):
                answer = self.client.create(**headers)
                self.assertEqual(answer.status, 400)
                self.assertNotIn("location", answer.headers)
        self.assertEqual((os.listdir(self.app.store.state_dir)), [])

    def test_metadata_comes_back(self) -> None:
        text = "filename YQ==,x ,y " + base64_of("\u00fc")
        self.client.create(Upload_Metadata=text)
        self.assertEqual(self.client.ask("HEAD").headers["upload-metadata"], text)
        self.client.create(Upload_Metadata=None)
        self.assertNotIn("upload-metadata", self.client.ask("HEAD").headers)

    def test_patch_that_does_not_go_on_where_it_should_is_refused(self) -> None:
        self.client.create()
        self.client.patch(0, 100)
        for offset, status in (
            (0, 409), (99, 409), (101, 409), (250, 409), (10**14, 409),
            *((text, 400) for text in (None, "", *NO_NUMBERS)),
        ):  # fmt: skip
            answer = self.client.patch(100, 150, Upload_Offset=offset)
            self.assertEqual(answer.status, status, offset)
        self.client.data += b"more"
        self.assertEqual(self.client.patch(100, 254).status, 413)
        self.assertEqual(self.client.offset(), 100)
        self.assertEqual(self.client.patch(100, 250).status, 204)
        self.assertEqual(self.client.patch(250, 254).status, 413)
        self.assertEqual(finished_files(self.app), {"a": noise(250)})

    def test_patch_of_another_kind_is_refused(self) -> None:
        self.client.create()
        for kind in (
            None,
            "application/octet-stream",
            "multipart/form-data; boundary=x",
        ):
            self.assertEqual(self.client.patch(0, 9, Content_Type=kind).status, 415)
        for version in ("0.2.2", "1.0", "", "1.0.0, 1.0.0"):
            answer = self.client.patch(0, 9, Tus_Resumable=version)
            self.assertEqual(answer.status, 412)
            self.assertEqual(answer.headers["tus-version"], "1.0.0")
        self.assertEqual(self.client.offset(), 0)

    def test_bytes_are_held_against_their_checksum(self) -> None:
        self.client.create()
        one, two = self.client.data[:100], self.client.data[100:200]
        sums = (
            "sha1 " + base64_of(hashlib.sha1(one).digest()),
            "sha256 " + base64_of(hashlib.sha256(two).digest()),
        )
        for start, text, status in (
            (0, sums[1], 460),
            (0, "sha1 nonsense", 460),
            (0, "sha1", 460),
            (0, "md5 " + sums[0][5:], 400),
            (0, "sha512 x", 400),
            (0, sums[0], 204),
            (100, sums[0], 460),
            (100, sums[1], 204),
        ):
            answer = self.client.patch(start, start + 100, Upload_Checksum=text)
            self.assertEqual(answer.status, status, text)
            is_new = status == 204
            self.assertEqual(self.client.offset(), start + 100 * is_new)
        self.client.patch(200, 250)
        self.assertEqual(finished_files(self.app), {"a": self.client.data})

    def test_broken_patch_with_a_checksum_leaves_nothing(self) -> None:
        self.client.create()
        text = "sha1 " + base64_of(hashlib.sha1(self.client.data).digest())
        message = self.client.piece(0, 250, Upload_Checksum=text)
        self.assertEqual(self.app.handle(cut(message, 100)).status, 408)
        self.assertEqual(self.client.offset(), 0)

    def test_what_came_before_a_patch_broke_off_is_kept(self) -> None:
        self.client.create()
        offset = 0
        for size in (0, 1, 99, 50):
            message = self.client.piece(offset, 250)
            self.assertIn(self.app.handle(cut(message, size)).status, (400, 408))
            offset += size
            self.assertEqual(self.client.offset(), offset)
        self.assertEqual(self.client.patch(offset, 250).status, 204)
        self.assertEqual(finished_files(self.app), {"a": self.client.data})

    def test_patch_that_hangs_is_told_of_and_gives_way(self) -> None:
        self.client.create()
        for start, hanging_at in ((0, 100), (100, 50)):
            with Stalled(
                self.app, self.client.piece(start, 250), hanging_at
            ) as stalled:
                self.assertEqual(self.client.offset(), start + hanging_at)
                if start:
                    self.client.data = self.client.data[:150] + noise(100, 9)
                    self.assertEqual(self.client.patch(150, 250).status, 204)
                    self.assertGreaterEqual(stalled.end(), 400)
                else:
                    self.assertEqual(stalled.end(is_cut=True), 408)
        self.assertEqual(finished_files(self.app), {"a": self.client.data})

    def test_next_patch_ends_the_one_that_hangs(self) -> None:
        """Whichever process it comes to; nobody has asked for the offset."""
        other = UploadApp(self.app.settings)
        for where in (self.app, other):
            self.client.create(
                Upload_Metadata=f"filename {base64_of('b' * (where is other))}"
            )
            with Stalled(self.app, self.client.piece(0, 250), 100) as stalled:
                there = TusClient(where)
                there.place = self.client.place
                self.assertEqual(there.patch(there.offset(), 200).status, 204)
                self.assertEqual(stalled.end(), 503)
            self.assertEqual(self.client.patch(200, 250).status, 204)
        self.assertEqual(set(finished_files(self.app).values()), {self.client.data})

    def test_two_patches_at_once_do_not_spoil_each_other(self) -> None:
        for turn in range(20):
            client = TusClient(self.app, noise(40 * KIB, turn))
            client.create(Upload_Metadata=f"filename {base64_of(f'{turn}')}")

            def work(client: TusClient = client) -> None:
                for _ in range(20):
                    start = client.offset()
                    if start == len(client.data):
                        return
                    message = client.piece(start, start + 9000)
                    self.app.handle(cut(message, 7000 if start % 2 else 9000))

            threads = [threading.Thread(target=work) for _ in "123"]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE)
            self.assertEqual(finished_files(self.app)[f"{turn}"], client.data)
        self.assertEqual(leftovers(self.app), {})

    def test_offset_never_falls_while_bytes_come(self) -> None:
        client = TusClient(self.app, noise(3 * MIB))
        client.create()
        offsets, message = [], client.piece(0, 3 * MIB)
        body = io.BytesIO(message.body)
        request = prepared(message, lambda most: body.read(min(most, 4096)))
        answers: List[Any] = []
        thread = threading.Thread(
            target=lambda: answers.append(self.app.handle(request))
        )
        thread.start()
        while thread.is_alive():
            offsets.append((client.offset(), body.tell()))
        thread.join()
        self.assertEqual(answers[0].status, 204)
        self.assertEqual(offsets, sorted(offsets))
        self.assertTrue(all(told <= sent for told, sent in offsets))
        self.assertTrue(finished_files(self.app) == {"a": client.data})

    def test_upload_is_cancelled_until_it_is_finished(self) -> None:
        self.client.create()
        with Stalled(self.app, self.client.piece(0, 250), 100) as stalled:
            self.assertEqual(self.client.ask("DELETE").status, 204)
            self.assertGreaterEqual(stalled.end(), 400)
        self.assertEqual((leftovers(self.app), self.app.store.open_uploads), ({}, 0))
        for method in ("HEAD", "DELETE"):
            self.assertEqual(self.client.ask(method).status, 404)
        self.assertEqual(self.client.patch(0, 250).status, 404)
        self.client.create(self.client.data, Content_Type=PATCH_TYPE)
        self.assertEqual(self.client.ask("DELETE").status, 403)
        self.assertEqual(self.client.offset(), 250)
        self.assertEqual(finished_files(self.app), {"a": self.client.data})

    def test_upload_that_nobody_knows_is_missing(self) -> None:
        self.client.create()
        known = self.client.place
        for name in (
            "0" * 32,
            "",
            "../x",
            known[8:] + "0",
            known[8:].upper(),
            "x" * 999,
        ):
            self.client.place = "/upload/" + name
            for method in ("HEAD", "DELETE", "GET"):
                self.assertEqual(self.client.ask(method).status, 404, name)
            self.assertEqual(self.client.patch(0, 9).status, 404)
        self.client.place = known
        self.assertEqual(self.client.ask("PUT").status, 405)
        self.assertEqual(finished_files(self.app), {})

    def test_method_may_stand_in_a_header(self) -> None:
        self.client.create()
        for method, status in (
            ("HEAD", 200),
            ("PATCH", 204),
            ("DELETE", 204),
            ("x", 404),
        ):
            kind = {"Content_Type": PATCH_TYPE, "Upload_Offset": "0"}
            how = {"X_HTTP_Method_Override": method, **kind}
            answer = self.client.ask("POST", self.client.data[:9], **how)
            self.assertEqual(answer.status, status)

    def test_end_of_an_unfinished_upload_is_told(self) -> None:
        answers = [
            self.client.create(),
            self.client.ask("HEAD"),
            self.client.patch(0, 9),
        ]
        for answer in answers:
            ends = answer.headers["upload-expires"]
            self.assertRegex(ends, r"\A\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\Z")
        with application(stale_after=0) as app:
            self.assertNotIn("upload-expires", TusClient(app).create().headers)

    def test_every_answer_names_the_protocol(self) -> None:
        answers = [
            self.client.create(),
            self.client.ask("HEAD"),
            self.client.create(Upload_Length="x"),
        ]
        answers += [
            self.client.patch(5, 9),
            self.client.patch(0, 9),
            self.client.ask("PUT"),
        ]
        answers += [self.client.ask("DELETE"), self.client.ask("HEAD")]
        answers += [
            self.client.ask("HEAD", Origin="http://evil.example", Tus_Resumable="2")
        ]
        with application(authorize=lambda request: "No.") as app:
            answers.append(TusClient(app).create())
        foreign = TusClient(self.app, Origin="http://evil.example")
        answers.append(foreign.create())
        for answer in answers:
            self.assertEqual(answer.headers["tus-resumable"], "1.0.0")
        self.assertEqual([a.status for a in answers[-3:]], [412, 403, 403])

    def test_other_origins_may_read_what_they_must(self) -> None:
        page = {"Origin": "https://page.example"}
        for allowed in (page["Origin"], "*"):
            with application(allow_origins=allowed) as app:
                client = TusClient(app, **page)
                for answer in (client.create(), client.ask("HEAD"), client.patch(9, 9)):
                    text = answer.headers["access-control-expose-headers"].lower()
                    exposed = set(text.split(", "))
                    said = {
                        name for name in answer.headers if name[:3] in ("upl", "tus")
                    }
                    self.assertLessEqual(said | {"location"}, exposed)
        self.assertNotIn(
            "access-control-expose-headers",
            TusClient(self.app, **page).create().headers,
        )

    def test_every_process_goes_on_with_an_upload(self) -> None:
        apps = [self.app, UploadApp(self.app.settings)]
        self.client.create()
        for number in range(10):
            self.client.where = apps[number % 2]
            self.assertEqual(self.client.offset(), number * 25)
            self.client.where = apps[number // 2 % 2]
            self.client.patch(number * 25, number * 25 + 25)
        self.assertEqual(finished_files(self.app), {"a": self.client.data})

    def test_killed_server_loses_no_more_than_since_a_checkpoint(self) -> None:
        for constant, value, offset in (("SIZE", 50, 120), ("SECONDS", 0.0, 160)):
            disk = TestDisk()
            store = Store(self.app.store.upload_dir, disk=disk)
            self.client.where = UploadApp(self.app.settings, store=store)
            self.client.create()
            message = self.client.piece(0, 250)
            blocks = iter(message.body[n : n + 20] for n in range(0, 160, 20))

            def read(most: int, blocks: Any = blocks, disk: Any = disk) -> bytes:
                for block in blocks:
                    return bytes(block)
                disk.is_dead = True
                raise Killed

            with mock.patch.object(flowserver, "_CHECKPOINT_" + constant, value):
                with self.assertRaises(Killed):
                    self.client.where.handle(prepared(message, read))
            self.client.where = self.app
            self.assertEqual(self.client.offset(), offset)
            self.assertEqual(self.client.patch(offset, 250).status, 204)
            self.assertEqual(finished_files(self.app)["a"], self.client.data)

    def test_metadata_reaches_the_functions_of_the_program(self) -> None:
        fields = {"filename": "a", "draft": "", "x": "\u00fc"}
        text = ",".join(f"{name} {base64_of(value)}" for name, value in fields.items())
        for size in (0, 250):
            done: List[Any] = []
            place = mock.Mock(side_effect=lambda one: "p/" + one.filename)
            with application(on_complete=done.append, place=place) as app:
                client = TusClient(app, noise(size))
                client.create(Upload_Metadata=text)
                client.patch(0, 100)
                client.patch(100, 250)
            ((asked,), _) = place.call_args
            self.assertEqual((asked.fields, asked.size), (fields, size))
            self.assertEqual(
                [(d.fields, d.relative_path) for d in done], [(fields, "p/a")]
            )
            place.assert_called_once()

    def test_metadata_outlives_a_crash(self) -> None:
        for word in ("publish", "finished", "announced"):
            done: List[Any] = []
            with application(on_complete=done.append) as app:
                client = TusClient(app)
                client.create()
                with killed_before(word), self.assertRaises(Killed):
                    client.patch(0, 250)
                done.clear()
                again = UploadApp(app.settings, on_complete=done.append)
                self.assertEqual(done, [])
                again.tidy()
                self.assertEqual([d.fields for d in done], [{"filename": "a"}])
                client.where = again
                self.assertEqual(client.offset(), 250)
                self.assertEqual(finished_files(app), {"a": client.data})

    def test_what_a_crash_left_without_a_name_is_not_told_to_be_complete(self) -> None:
        """The client would not come again, and the file wait for the next sweep."""
        client, pond = self.client, FilePondClient(self.app, noise(25), "b")
        client.create(), pond.begin()
        for give, end in ((client.patch, 250), (pond.patch, 25)):
            with killed_before("publish"), self.assertRaises(Killed):
                give(0, end)
        client.where = pond.where = UploadApp(self.app.settings)
        with mock.patch.object(client.where, "tidy"):
            self.assertEqual((client.offset(), pond.offset()), (249, 0))
            self.assertEqual(client.patch(249, 250).status, 204)
            self.assertEqual(pond.patch(0, 25).status, 200)
            self.assertEqual((client.offset(), pond.offset()), (250, 25))
        files = {"a": client.data, "b": pond.data}
        self.assertEqual(finished_files(self.app), files)

    def test_limits_hold_at_the_creation(self) -> None:
        with application(max_file_size=249) as app:
            self.assertEqual(TusClient(app).create().status, 413)
        with application(max_uploads=2) as app:
            statuses = []
            for _ in range(4):
                statuses.append(TusClient(app).create().status)
                app.store.count()
            self.assertEqual(statuses, [201, 201, 413, 413])
        with application(min_free_space="1K") as app:
            for free, status in ((1024 + 249, 413), (1024 + 250, 201)):
                with mock.patch.object(app.store.disk, "free_space", return_value=free):
                    self.assertEqual(TusClient(app).create().status, status)

    def test_taken_name_is_what_the_policy_says(self) -> None:
        for policy, status, paths in (
            ("rename", 201, {"a", "a (1)"}),
            ("replace", 201, {"a"}),
            ("refuse", 403, {"a"}),  # after a 409 tus-js-client would try again
        ):
            with self.subTest(policy), application(on_conflict=policy) as app:
                send(app, "PUT", "/upload/a", b"x")
                client = TusClient(app)
                self.assertEqual(client.create().status, status)
                if status == 201:
                    client.patch(0, 250)
                self.assertEqual(set(finished_files(app)), paths)

    def test_upload_of_another_owner_is_missing(self) -> None:
        def owner(request: Request) -> str:
            return request.headers["x-user"]

        with application(owner=owner) as app:
            anna = TusClient(app, X_User="anna")
            anna.create()
            bert = TusClient(app, X_User="bert")
            bert.place = anna.place
            answers = [bert.ask("HEAD"), bert.patch(0, 9), bert.ask("DELETE")]
            self.assertEqual([answer.status for answer in answers], [404] * 3)
            self.assertEqual(anna.patch(0, 250).status, 204)

    def test_upload_lives_where_it_is_told_to(self) -> None:
        for path in ("/upload", "/upload/", "/a/%62"):
            where = urllib.parse.unquote(path.rstrip("/"))
            with self.subTest(path), serving(upload_path=where) as server:
                size = {"Tus-Resumable": "1.0.0", "Upload-Length": "9"}
                answer = send(server, "POST", path, b"", size)
                place = answer.headers["location"]
                self.assertNotRegex(place, r"\A/|:")
                there = urllib.parse.urljoin(path, place)
                self.assertEqual(send(server, "HEAD", there, b"", size).status, 200)


# ---- FilePond ------------------------------------------------------------------------


class FilePondClient:
    """One upload of FilePond in chunks; words of headers are joined by _."""

    def __init__(self, where: Any, data: bytes = noise(25), name: str = "a") -> None:
        self.where = where
        self.data = data
        self.name = name
        self.id = ""

    def begin(self, path: str = "/upload", **headers: Any) -> Answer:
        said = {"Upload-Length": str(len(self.data)), **headers}
        given = {name.replace("_", "-"): str(text) for name, text in said.items()}
        message = form({"filepond": "{}"}, path=path, headers=given)
        answer = send(self.where, *message)
        self.id = answer.body.decode()
        return answer

    def piece(self, start: int, end: int, **headers: Any) -> Message:
        said = {
            "Content_Type": PATCH_TYPE,
            "Upload_Offset": start,
            "Upload_Length": len(self.data),
            "Upload_Name": self.name.encode().decode("latin-1"),
            **headers,
        }
        names = {name.replace("_", "-"): text for name, text in said.items()}
        given = {name: str(text) for name, text in names.items() if text is not None}
        path = f"/upload?patch={self.id}"
        return Message("PATCH", path, self.data[start:end], given)

    def patch(self, start: int, end: int, **headers: Any) -> Answer:
        return send(self.where, *self.piece(start, end, **headers))

    def offset(self) -> int:
        answer = send(self.where, "HEAD", f"/upload?patch={self.id}")
        return int(answer.headers["upload-offset"])

    def delete(self, identifier: Optional[str] = None) -> Answer:
        text = (self.id if identifier is None else identifier).encode()
        kind = {"Content-Type": "text/plain;charset=UTF-8"}
        return send(self.where, "DELETE", "/upload", text, kind)


class FilePondTest(unittest.TestCase):
    """FilePond's own protocol."""

    def setUp(self) -> None:
        context = application()
        self.app = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        self.pond = FilePondClient(self.app)

    def test_file_arrives_in_chunks(self) -> None:
        answer = self.pond.begin()
        self.assertEqual(answer.status, 201)
        self.assertIn("text/plain", answer.headers["content-type"])
        self.assertRegex(self.pond.id, r"\A[0-9a-z-]+\Z")  # is pasted into the address
        for start in (0, 10, 20):
            self.assertEqual(self.pond.offset(), start)
            self.assertEqual(self.pond.patch(start, start + 10).status, 200)
        self.assertEqual(self.pond.offset(), 25)
        self.assertEqual(finished_files(self.app), {"a": noise(25)})
        self.assertEqual(leftovers(self.app), {})

    def test_beginning_keeps_nothing(self) -> None:
        ids = {self.pond.begin().body for _ in "123"}
        self.assertEqual(len(ids), 3)
        self.assertEqual(os.listdir(self.app.store.state_dir), [])
        self.assertEqual(self.pond.offset(), 0)

    def test_empty_patch_follows_the_last_full_one(self) -> None:
        for size in (10, 30, 0):
            pond = FilePondClient(self.app, noise(size), f"{size}")
            pond.begin()
            for start in range(0, size + 1, 10):
                for _ in "12":  # the first answer was lost
                    self.assertEqual(pond.patch(start, start + 10).status, 200)
            self.assertEqual(finished_files(self.app)[f"{size}"], noise(size))

    def test_empty_patch_after_less_than_all_is_refused(self) -> None:
        self.pond.begin()
        self.assertEqual(self.pond.patch(25, 25).status, 409)
        self.pond.patch(0, 10)
        self.assertEqual(self.pond.patch(25, 25).status, 409)
        self.assertEqual(self.pond.patch(10, 10).status, 400)

    def test_broken_patch_counts_for_nothing(self) -> None:
        """Each chunk that begins below the offset is taken for stored."""
        self.pond.begin()
        for start in (0, 10):
            for size in (0, 3, 9):
                request = cut(self.pond.piece(start, start + 10), size)
                self.assertIn(self.app.handle(request).status, (400, 408))
                self.assertEqual(self.pond.offset(), start)
            self.pond.patch(start, start + 10)
        with Stalled(self.app, self.pond.piece(20, 25), 2):
            self.assertEqual(self.pond.offset(), 20)
        self.pond.patch(20, 25)
        self.assertEqual(finished_files(self.app), {"a": noise(25)})

    def test_name_comes_as_bytes_of_utf_8(self) -> None:
        self.pond.name = "\u65e5 \u00fc%20.bin"
        self.pond.begin()
        self.pond.patch(0, 25)
        self.assertEqual(list(finished_files(self.app)), [self.pond.name])

    def test_patch_that_makes_no_sense_is_refused(self) -> None:
        self.pond.begin()
        wrong: List[Tuple[int, Dict[str, Any]]] = [
            *((400, {"Upload_Offset": text}) for text in (None, "", *NO_NUMBERS)),
            *((400, {"Upload_Offset": start}) for start in (16, 25, 10**14)),
            *((409, {"Upload_Offset": start}) for start in (1, 10, 15)),
            *((400, {"Upload_Length": text}) for text in ("24", "26", "x")),
            (400, {"Upload_Name": None}),
            (400, {"Upload_Name": "../a"}),
            (400, {"Upload_Name": "\xff"}),
            (400, {"Upload_Name": "\u65e5"}),
        ]
        for status, headers in wrong:
            with self.subTest(headers):
                answer = self.pond.patch(0, 10, **headers)
                self.assertEqual(answer.status, status)
        self.assertEqual(self.pond.patch(0, 0).status, 400)
        self.pond.id = self.pond.id[:-2] + "9"
        self.assertEqual(self.pond.patch(0, 10, Upload_Length=9).status, 400)
        self.assertEqual((finished_files(self.app), leftovers(self.app)), ({}, {}))
        self.assertEqual(self.app.store.open_uploads, 0)
        request = self.pond.piece(0, 9, Upload_Length=9)
        self.assertEqual(
            self.app.handle(cut(request, 9)._replace(length=-1)).status, 411
        )

    def test_body_of_unknown_length_is_not_read(self) -> None:
        """A program's read() may return all of it for -1."""
        form = {
            "upload-length": "25",
            "content-type": "multipart/form-data; boundary=x",
        }
        for method, headers in (
            ("POST", form),
            ("DELETE", {"content-type": "text/plain"}),
        ):
            read = mock.Mock()
            request = Request(method, "/upload", "", headers, -1, read)
            self.assertEqual(self.app.handle(request).status, 411)
            read.assert_not_called()

    def test_identifier_that_we_did_not_draw_is_missing(self) -> None:
        self.pond.begin()
        drawn = self.pond.id
        for wrong in (
            "",
            "x",
            "../x",
            drawn.upper(),
            drawn + "0" * 16,
            drawn[1:],
            "0" * 32,
        ):
            with self.subTest(wrong):
                self.pond.id = urllib.parse.quote(wrong)
                self.assertEqual(self.pond.patch(0, 9).status, 404)
                where = f"/upload?patch={self.pond.id}"
                self.assertEqual(send(self.app, "HEAD", where).status, 404)
                self.assertEqual(self.pond.delete(wrong).status, 404)
        self.assertEqual(finished_files(self.app), {})

    def test_forged_size_is_held_to_the_limits(self) -> None:
        with application(max_file_size=24) as app:
            pond = FilePondClient(app)
            self.assertEqual(pond.begin().status, 413)
            pond.id = "0" * 32 + "-25"
            self.assertEqual(pond.patch(0, 10).status, 413)
        with application(max_chunk_size=9, max_uploads=1) as app:
            pond = FilePondClient(app)
            pond.begin()
            self.assertEqual(pond.patch(0, 10).status, 413)
            self.assertEqual(pond.patch(0, 9).status, 200)
            pond.begin()
            self.assertEqual(pond.patch(0, 9).status, 413)

    def test_unfinished_upload_is_forgotten_and_a_file_stays(self) -> None:
        self.pond.begin()
        self.assertEqual(self.pond.delete().status, 403)  # nothing is known of it
        self.pond.patch(0, 10)
        self.assertEqual(self.pond.delete().status, 204)
        self.assertEqual((leftovers(self.app), self.app.store.open_uploads), ({}, 0))
        for pieces in (((0, 25),), ((0, 10), (10, 25))):
            self.pond.begin()
            for start, end in pieces:
                self.assertEqual(self.pond.patch(start, end).status, 200)
            self.assertEqual(self.pond.delete().status, 403)
        self.assertEqual(finished_files(self.app), {"a": noise(25)})

    def test_body_that_is_no_identifier_is_not_read(self) -> None:
        read = mock.Mock()
        kind = {"content-type": "text/plain"}
        request = Request("DELETE", "/upload", "", kind, 1 << 40, read)
        self.assertEqual(self.app.handle(request).status, 404)
        read.assert_not_called()

    def test_whole_file_is_answered_with_an_identifier(self) -> None:
        files = ("filepond", "a", noise(25))
        answer = send(self.app, *form({"filepond": "{}"}, files))
        self.assertEqual(answer.status, 200)
        self.assertIn("text/plain", answer.headers["content-type"])
        self.assertRegex(answer.body, rb"\A[0-9a-z-]+\Z")
        self.assertEqual(self.pond.delete(answer.body.decode()).status, 403)
        self.assertEqual(finished_files(self.app), {"a": noise(25)})
        wrong = ("filepond", "..", noise(25))
        answer = send(self.app, *form({"filepond": "{}"}, wrong))
        self.assertEqual((answer.status, answer.json["success"]), (400, False))

    def test_nothing_is_fetched_loaded_or_restored(self) -> None:
        """That would let strangers make this server call others."""
        for word in ("fetch", "load", "restore"):
            for method in ("GET", "HEAD", "POST", "PUT", "PATCH"):
                path = f"/upload?{word}=http://127.0.0.1/"
                self.assertEqual(send(self.app, method, path).status, 404)
            message = form({}, ("f", "a", b"x"), path=path)
            self.assertEqual(send(self.app, *message).status, 404)
        self.assertEqual(finished_files(self.app), {})

    def test_each_method_has_its_place(self) -> None:
        self.pond.begin()
        for method in ("GET", "POST", "PUT"):
            answer = send(self.app, method, f"/upload?patch={self.pond.id}")
            self.assertEqual(answer.status, 405)
        message = form({"filepond": "{}"}, ("filepond", "a", b"x"))
        head = {**message.headers, "Upload-Length": "1"}
        answer = send(self.app, *message._replace(headers=head))
        self.assertEqual((answer.status, finished_files(self.app)), (400, {}))

    def test_identifier_of_another_owner_leads_to_nothing_of_theirs(self) -> None:
        users = ["anna"]
        with application(owner=lambda request: users[0]) as app:
            pond = FilePondClient(app)
            pond.begin()
            pond.patch(0, 10)
            users[0] = "bert"
            self.assertEqual((pond.offset(), pond.delete().status), (0, 403))
            self.assertEqual(pond.patch(10, 25).status, 409)
            users[0] = "anna"
            self.assertEqual(pond.patch(10, 25).status, 200)
            self.assertEqual(finished_files(app), {"a": noise(25)})

    def test_every_process_goes_on_with_an_upload(self) -> None:
        apps = [self.app, UploadApp(self.app.settings)]
        self.pond.begin()
        for number in range(5):
            self.pond.where = apps[number % 2]
            self.assertEqual(self.pond.offset(), number * 5)
            self.pond.patch(number * 5, number * 5 + 5)
        self.assertEqual(finished_files(self.app), {"a": noise(25)})

    def test_fields_reach_the_functions_of_the_program(self) -> None:
        done: List[Any] = []
        for size in (0, 10, 25):
            with application(on_complete=done.append, place=lambda one: "p/a") as app:
                pond = FilePondClient(app, noise(size))
                pond.begin()
                for start in range(0, size + 1, 10):
                    message = pond.piece(start, start + 10)
                    send(app, *message._replace(path=message.path + "&x=1"))
        self.assertEqual([one.fields["x"] for one in done], ["1"] * 3)
        self.assertEqual([one.relative_path for one in done], ["p/a"] * 3)


# ---- application ---------------------------------------------------------------------


# What holds whatever a file comes with


def in_chunks(
    library: str, size: int, where: Any, name: str, data: bytes, **head: str
) -> Answer:
    """Send a file as a library does, up to the first error; return the last answer."""
    for index in range(max(1, -(-len(data) // size))):
        message = chunk_of(library, name, data, index, size)
        headers = {**message.headers, **head}
        answer = send(where, *message._replace(headers=headers))
        if answer.status != 200:
            break
    return answer


def by_tus(size: int, where: Any, name: str, data: bytes, **head: str) -> Answer:
    client = TusClient(where, data, **head)
    answer = client.create(Upload_Metadata=f"filename {base64_of(name)}")
    for start in range(0, len(data), size):
        if answer.status < 300:
            answer = client.patch(start, start + size)
    return answer


def by_tus_at_once(where: Any, name: str, data: bytes, **head: str) -> Answer:
    metadata = f"filename {base64_of(name)}"
    client = TusClient(where, data, **head)
    return client.create(data, Content_Type=PATCH_TYPE, Upload_Metadata=metadata)


def by_filepond(size: int, where: Any, name: str, data: bytes, **head: str) -> Answer:
    pond = FilePondClient(where, data, name)
    answer = pond.begin(**head)
    for start in range(0, len(data), size):
        if answer.status < 300:
            answer = pond.patch(start, start + size, **head)
    return answer


def by_form(fields: Any, where: Any, name: str, data: bytes, **head: str) -> Answer:
    return send(where, *form(fields, ("filepond", name, data), headers=head))


def by_put(where: Any, name: str, data: bytes, **head: str) -> Answer:
    return send(where, "PUT", "/upload/" + name, data, head)


WAYS: Dict[str, Any] = {
    "flow.js": functools.partial(in_chunks, "flow.js", 10),
    "flow.js, one chunk": functools.partial(in_chunks, "flow.js", 100),
    "Dropzone": functools.partial(in_chunks, "Dropzone", 10),
    "Plupload": functools.partial(in_chunks, "Plupload", 10),
    "form": functools.partial(by_form, {}),
    "PUT": by_put,
    "tus": functools.partial(by_tus, 10),
    "tus, one PATCH": functools.partial(by_tus, 100),
    "tus with creation": by_tus_at_once,
    "FilePond": functools.partial(by_filepond, 10),
    "FilePond, one PATCH": functools.partial(by_filepond, 100),
    "FilePond's form": functools.partial(by_form, {"filepond": "{}"}),
}


class EveryWayTest(unittest.TestCase):
    """Rules that hold for a file whatever protocol it comes by."""

    DATA = noise(25)

    def in_every_way(self, check: Any, **arguments: Any) -> None:
        """Call ``check(app, give)``, with a cleared folder each time.

        ``give(name, data)`` sends a file, and returns the last answer.
        """
        with application(**arguments) as app:
            for name, way in WAYS.items():
                with self.subTest(name):
                    check(app, functools.partial(way, app))
                for folder, _, names in os.walk(app.store.upload_dir):
                    for file in set(names) - {"key"}:
                        os.unlink(os.path.join(folder, file))
                app.store.count()

    def check_nothing(self, app: UploadApp) -> None:
        self.assertEqual((finished_files(app), leftovers(app)), ({}, {}))
        self.assertEqual(app.store.open_uploads, 0)

    def test_file_arrives_and_the_same_again_is_no_second_copy(self) -> None:
        def check(app: UploadApp, give: Any) -> None:
            for _ in "12":
                self.assertLess(give("d.bin", self.DATA).status, 300)
            self.assertEqual(finished_files(app), {"d.bin": self.DATA})
            self.assertEqual((leftovers(app), app.store.open_uploads), ({}, 0))

        self.in_every_way(check)

    def test_foreign_pages_may_not_send(self) -> None:
        def check(app: UploadApp, give: Any) -> None:
            answer = give("a", self.DATA, Origin="http://evil.example")
            self.assertIn(answer.status, (403, 415))
            self.check_nothing(app)

        self.in_every_way(check)

    def test_authorize_is_asked(self) -> None:
        for refusal, word in (("Bring a key.", "Bring a key."), (False, "may not")):

            def check(app: UploadApp, give: Any, word: str = word) -> None:
                answer = give("a", self.DATA)
                self.assertIn(answer.status, (403, 415))
                self.assertIn(word, answer.json["error"])
                self.check_nothing(app)

            self.in_every_way(check, authorize=lambda _, no=refusal: no)

    def test_login_is_needed(self) -> None:
        def check(app: UploadApp, give: Any) -> None:
            answer = give("a", self.DATA)
            self.assertEqual(answer.status, 401)
            self.assertIn("www-authenticate", answer.headers)
            self.check_nothing(app)

        with temporary_folder() as folder:
            line = "anna:" + flowserver.hash_password("x", rounds=1)
            self.in_every_way(check, users_file=conf_file(folder, line))

    def test_owner_is_told_with_the_file(self) -> None:
        done: List[Any] = []

        def check(app: UploadApp, give: Any) -> None:
            give("a", self.DATA)
            self.assertEqual(done.pop().owner, "anna")

        self.in_every_way(check, owner=lambda _: "anna", on_complete=done.append)

    def test_place_is_asked_and_held_to_the_rules(self) -> None:
        place = mock.Mock()

        def check(app: UploadApp, give: Any) -> None:
            for path in ("../a", "", ".", "a/..", "a/"):
                place.return_value = path
                self.assertIn(give("a", self.DATA).status, (400, 415))
                self.check_nothing(app)
            place.return_value = "p/b"
            self.assertLess(give("a", self.DATA).status, 300)
            self.assertEqual(list(finished_files(app)), ["p/b"])

        self.in_every_way(check, place=place)

    def test_size_and_space_are_limited(self) -> None:
        def check(app: UploadApp, give: Any) -> None:
            with mock.patch.object(app.store.disk, "free_space", return_value=1048):
                self.assertEqual(give("a", self.DATA).status, 413)
                self.check_nothing(app)

        self.in_every_way(check, max_file_size=24)
        self.in_every_way(check, min_free_space="1K")

    def test_number_of_unfinished_uploads_is_limited(self) -> None:
        def check(app: UploadApp, give: Any) -> None:
            send(app, *browser("other", self.DATA, 1, 10))
            self.assertEqual(give("a", self.DATA).status, 413)
            self.assertEqual(app.store.open_uploads, 1)

        self.in_every_way(check, max_uploads=1)

    def test_taken_name_is_what_the_policy_says(self) -> None:
        for policy, statuses, files in (
            ("rename", (200, 201, 204), {"a": b"other", "a (1)": self.DATA}),
            ("replace", (200, 201, 204), {"a": self.DATA}),
            ("refuse", (403, 409, 415), {"a": b"other"}),
        ):

            def check(
                app: Any, give: Any, is_in: Any = statuses, there: Any = files
            ) -> None:
                send(app, "PUT", "/upload/a", b"other")
                self.assertIn(give("a", self.DATA).status, is_in)
                self.assertEqual(finished_files(app), there)
                self.assertEqual((leftovers(app), app.store.open_uploads), ({}, 0))

            self.in_every_way(check, on_conflict=policy)

    def test_completion_is_told_once(self) -> None:
        done: List[Any] = []

        def check(app: UploadApp, give: Any) -> None:
            give("a", self.DATA)
            app.sweep()
            one = done.pop()
            self.assertEqual((one.relative_path, one.size, done), ("a", 25, []))

        self.in_every_way(check, on_complete=done.append)

    def test_completion_is_told_again_after_a_crash(self) -> None:
        done: List[Any] = []
        for word, before in (("publish", 0), ("finished", 0), ("announced", 1)):

            def check(
                app: Any, give: Any, word: str = word, before: int = before
            ) -> None:
                done.clear()
                with killed_before(word), self.assertRaises(Killed):
                    give("a", self.DATA)
                again = UploadApp(app.settings, on_complete=done.append)
                self.assertEqual(len(done), before)
                again.tidy()
                again.sweep()
                self.assertEqual(len(done), before + 1)
                self.assertEqual(len({one.id for one in done}), 1)
                self.assertEqual(finished_files(app), {"a": self.DATA})

            self.in_every_way(check, on_complete=done.append)

    def test_function_that_wants_to_end_the_program_does_not(self) -> None:
        for name in ("authorize", "owner", "place", "on_complete"):

            def check(
                app: Any, give: Any, is_late: bool = name == "on_complete"
            ) -> None:
                with self.assertLogs("flowserver", "ERROR"):
                    status = give("a", self.DATA).status
                self.assertIs(status == 503, not is_late)
                self.assertIs("a" in finished_files(app), is_late)

            self.in_every_way(check, **{name: mock.Mock(side_effect=SystemExit(1))})

    def test_vanished_folder_is_503(self) -> None:
        def check(app: UploadApp, give: Any) -> None:
            folder = app.store.upload_dir
            os.rename(folder, folder + " gone")
            self.assertEqual(give("a", self.DATA).status, 503)
            os.rename(folder + " gone", folder)

        self.in_every_way(check)

    def test_full_disk_is_503_and_a_later_try_succeeds(self) -> None:
        full = OSError(errno.ENOSPC, "No space left on device")

        def check(app: UploadApp, give: Any) -> None:
            with mock.patch.object(app.store.disk, "write", side_effect=full):
                self.assertEqual(give("a", self.DATA).status, 503)
            self.assertLess(give("a", self.DATA).status, 300)
            self.assertEqual(finished_files(app), {"a": self.DATA})

        self.in_every_way(check)

    def test_hostile_names_stay_inside_or_are_refused(self) -> None:
        good = {"CON": "_CON", "a:b": "a_b", ".flowserver/v2/x": "_.flowserver/v2/x"}

        def check(app: UploadApp, give: Any) -> None:
            for name in ("../../x", "a/../../x", "..", "a\\..\\..\\x"):
                self.assertIn(give(name, self.DATA).status, (400, 415))
                self.check_nothing(app)
            for name in good:
                self.assertLess(give(name, self.DATA).status, 300)
            self.assertEqual(set(finished_files(app)), set(good.values()))

        self.in_every_way(check)


class FallingDisk(flowserver.Disk):
    """A disk of so much room, of which the bytes of clients take some."""

    def __init__(self, room: int) -> None:
        super().__init__(sync=False)
        self.room = self.least = room
        self.of_clients: Set[int] = set()
        self.mutex = threading.Lock()

    def open(self, path: str, flags: int) -> int:
        fd = super().open(path, flags)
        (self.of_clients.discard, self.of_clients.add)[
            path.endswith((".data", ".part"))
        ](fd)
        return fd

    def write(self, fd: int, block: Any, offset: int) -> None:
        with self.mutex:
            self.room -= len(block) * (fd in self.of_clients)
            self.least = min(self.least, self.room)
        time.sleep(0.001)
        super().write(fd, block, offset)

    def free_space(self, path: str) -> int:
        return self.room


def all_at_once(tasks: Sequence[Any]) -> List[Any]:
    """Run functions in a thread each; return what they returned, in no order."""
    start, found = threading.Barrier(len(tasks)), []

    def run(task: Any) -> None:
        start.wait(PATIENCE)
        found.append(task())

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return found


class CrowdTest(unittest.TestCase):
    """Limits, functions and answers when many come at once."""

    def test_no_more_uploads_begin_than_may(self) -> None:
        for library in ("flow.js", "Dropzone", "Plupload"):
            with self.subTest(library), application(max_uploads=5) as app:
                tasks = []
                for n in range(60):
                    own = {"dzuuid": f"{n:032x}"} if library == "Dropzone" else {}
                    message = chunk_of(library, f"{n}", noise(25), **own)
                    tasks.append(lambda m=message: send(app, *m).status)
                statuses = collections.Counter(all_at_once(tasks))
                self.assertEqual(statuses, {200: 5, 413: 55})
                self.assertEqual((app.store.open_uploads, len(leftovers(app))), (5, 5))

    def test_new_version_of_a_finished_file_is_an_upload_too(self) -> None:
        with application(max_uploads=2) as app:
            for name in "abc":
                in_chunks("flow.js", 10, app, name, noise(25, 1))
            again = [chunk_of("flow.js", name, noise(25, 2)) for name in "abc"]
            statuses = [send(app, *message).status for message in again]
            self.assertEqual((statuses, app.store.open_uploads), ([200, 200, 413], 2))

    def test_free_space_never_falls_below_the_floor(self) -> None:
        for way in ("flow.js", "form", "PUT", "tus", "FilePond, one PATCH", "Plupload"):
            disk = FallingDisk(10_000)
            with temporary_folder() as folder:
                store = Store(folder, disk=disk, min_free_space=9_000)
                with self.subTest(way), application(store=store) as app:
                    tasks = [
                        functools.partial(WAYS[way], app, f"{n}", noise(95))
                        for n in range(40)
                    ]
                    statuses = collections.Counter(a.status for a in all_at_once(tasks))
                    self.assertGreaterEqual(disk.least, 9_000)
                    self.assertLessEqual(set(statuses), {200, 204, 413, 503})
                    stored = statuses[200] + statuses[204]
                    self.assertEqual(len(finished_files(app)), stored)

    def test_functions_of_the_program_wait_until_it_is_made(self) -> None:
        """What a crash left is told by the first tidy(), to one process at a time."""
        with application(on_complete=mock.Mock(side_effect=Killed)) as app:
            for name in "ab":
                with self.assertRaises(Killed):
                    in_chunks("flow.js", 10, app, name, noise(25))
            gc.collect()
            told: List[str] = []

            def complete(done: Any) -> None:
                time.sleep(0.02)
                told.append(done.relative_path)

            apps = [UploadApp(app.settings, on_complete=complete) for _ in "123"]
            self.assertEqual(told, [])
            all_at_once([one.tidy for one in apps])
            for one in apps:
                one.sweep()
            self.assertEqual(sorted(told), ["a", "b"])

    def test_chunk_that_completes_a_file_is_answered_last(self) -> None:
        """flow.js hands on the last answer that it sees, which should name the file."""
        order, hold = [], threading.Event()
        commit = flowserver.Body.commit

        def slowly(body: Any, *rest: Any) -> Any:
            progress = commit(body, *rest)
            if body.start == 0:
                hold.set()
                time.sleep(0.1)
            return progress

        def give(index: int) -> None:
            answer = send(app, *chunk_of("flow.js", "a", noise(25), index))
            order.append(answer.json["status"])

        with application() as app, mock.patch.object(flowserver.Body, "commit", slowly):
            give(1)
            first = threading.Thread(target=give, args=(0,))
            first.start()
            hold.wait(PATIENCE)
            give(2)
            first.join(PATIENCE)
        self.assertEqual(order, ["partial", "partial", "complete"])


def lies_inside(where: Union[FlowServer, UploadApp], folder: str) -> None:
    """Check that nothing was made in `folder` outside of the upload folder."""
    upload_dir = os.path.relpath(folders_of(where)[0], folder).split(os.sep)[0]
    made = set(os.listdir(folder)) - {upload_dir}
    assert not made, f"{made} lies outside of the upload folder"


class ArrivalTest(unittest.TestCase):
    """What clients send arrives whole, in each of their modes."""

    def test_file_arrives_in_every_mode(self) -> None:
        data = noise(25)
        for mode, method, prefix, forced in itertools.product(
            ("multipart", "octet"),
            ("POST", "PUT", "PATCH"),
            ("flow", "resumable"),
            (False, True),
        ):
            how = {"mode": mode, "method": method, "prefix": prefix, "forced": forced}
            with self.subTest(**how), application() as app:
                answers = send_file(app, "a.bin", data, chunk_size=10, **how)
                self.assertEqual({answer.status for answer in answers}, {200})
                self.assertEqual(answers[-1].json["status"], "complete")
                self.assertEqual(finished_files(app), {"a.bin": data})
                self.assertEqual(leftovers(app), {})

    def test_sizes_round_the_chunk_size_arrive(self) -> None:
        with application() as app:
            for size, forced in itertools.product(
                (0, 1, 9, 10, 11, 19, 20, 21), (0, 1)
            ):
                name, data = f"{size}-{forced}", noise(size, seed=forced)
                answers = send_file(app, name, data, chunk_size=10, forced=forced)
                with self.subTest(name):
                    self.assertEqual({answer.status for answer in answers}, {200})
                    self.assertEqual(finished_files(app)[name], data)

    def test_parameters_come_in_address_and_form_at_once(self) -> None:
        """As resumable.js sends them."""
        with application() as app:
            for number in (1, 2):
                octet = browser("a", noise(25), number, 10, "octet", prefix="resumable")
                form = browser("a", noise(25), number, 10, prefix="resumable")
                answer = send(app, *form._replace(path=octet.path))
                self.assertEqual(answer.status, 200)
            self.assertEqual(finished_files(app), {"a": noise(25)})

    def test_parameters_that_differ_between_address_and_form_are_refused(self) -> None:
        octet = browser("a", noise(25), 1, 10, "octet", prefix="resumable")
        form = browser("a", noise(25), 2, 10, prefix="resumable")
        with application() as app:
            answer = send(app, *form._replace(path=octet.path))
            self.assertEqual(answer.status, 400)
            self.assertIn('"resumableChunkNumber" has two values', answer.json["error"])
            self.assertEqual(leftovers(app), {})

    def test_fields_of_other_names_may_stand_before_and_after(self) -> None:
        done: List[Any] = []
        before = {"token": "1", "null": "null", "ä": "\r\nü"}
        fields = {**before, **flow_parameters("a", b"x")}
        late = 'Content-Disposition: form-data; name="late"'
        body = multipart(fields, b"x")[: -len(BOUNDARY) - 6]
        body += lines("--" + BOUNDARY, late, "", "2", f"--{BOUNDARY}--")
        message = browser("a", b"x")._replace(body=body, path="/upload?asked=3")
        with application(on_complete=done.append) as app:
            self.assertEqual(send(app, *message).status, 200)
        self.assertEqual(done[0].fields, {**before, "asked": "3", "late": "2"})

    def test_folders_are_kept(self) -> None:
        with application() as app:
            for name in ("d/e/a.txt", "d/a.txt", "a.txt", "d/e.txt"):
                send_file(app, name, name.encode())
            self.assertEqual(
                finished_files(app),
                {n: n.encode() for n in ("d/e/a.txt", "d/a.txt", "a.txt", "d/e.txt")},
            )

    def test_names_that_flow_gives_one_identifier_both_arrive(self) -> None:
        files = {
            "日本.txt": noise(25, 1),
            "中国.txt": noise(25, 2),
            "a/b": noise(25, 3),
            "ab": noise(25, 4),
        }
        with application() as app:
            for number in (2, 1):
                for name, data in files.items():
                    message = browser(name, data, number, 10, Identifier="25-txt")
                    self.assertEqual(send(app, *message).status, 200)
            self.assertEqual(finished_files(app), files)

    def test_chunk_size_may_change_on_the_way(self) -> None:
        with application() as app:
            send(app, *browser("a", noise(40), 1, 10))
            answer = send(app, *browser("a", noise(40), 2, 20))
            self.assertEqual(answer.json["received"], 30)
            answer = send(app, *browser("a", noise(40), 1, 20))
            self.assertEqual(answer.json["status"], "complete")
            self.assertEqual(finished_files(app), {"a": noise(40)})

    def test_prefix_of_the_settings_is_understood(self) -> None:
        with application(parameter_prefix="up_") as app:
            for prefix in ("up_resumable", "up_", "flow"):
                answers = send_file(
                    app, prefix, noise(25), chunk_size=10, prefix=prefix
                )
                self.assertEqual([answer.status for answer in answers], [200, 200])

    def test_answers_say_what_is_stored(self) -> None:
        with application() as app:
            first, last = send_file(app, "d/a.txt", noise(25), chunk_size=10)
            again = send(app, *browser("d/a.txt", noise(25), 2, 10))
        self.assertEqual(
            first.json,
            {"success": True, "status": "partial", "received": 10, "size": 25},
        )
        complete = {
            "success": True,
            "status": "complete",
            "filename": "a.txt",
            "path": "d/a.txt",
            "size": 25,
        }
        self.assertEqual((last.json, again.json), (complete, complete))
        self.assertEqual(last.headers["content-type"], "application/json")

    def test_taken_name_gets_a_number(self) -> None:
        with application() as app:
            for seed in (1, 2, 3):
                send_file(app, "a.txt", noise(5, seed), client=f"10.0.0.{seed}")
            self.assertEqual(
                sorted(finished_files(app).values()),
                sorted(noise(5, seed) for seed in (1, 2, 3)),
            )
            self.assertEqual(
                sorted(finished_files(app)), ["a (1).txt", "a (2).txt", "a.txt"]
            )

    def test_same_file_again_makes_no_second_copy(self) -> None:
        with application(keep_receipts=0) as app:
            for size in (5, 25):
                for _ in range(3):
                    answers = send_file(app, f"{size}", noise(size), chunk_size=10)
                    app.sweep()
                    self.assertEqual(answers[-1].json["path"], f"{size}")
            self.assertEqual(sorted(finished_files(app)), ["25", "5"])

    def test_taken_name_is_refused_before_the_bytes_travel(self) -> None:
        with application(on_conflict="refuse") as app:
            send_file(app, "a.txt", noise(25))
            answer = send(app, *browser("a.txt", noise(26), 1, 10))
            self.assertEqual(answer.status, 415)
            self.assertIn('There is a file "a.txt" already', answer.json["error"])
            self.assertEqual(leftovers(app), {})

    def test_taken_name_is_replaced(self) -> None:
        with application(on_conflict="replace") as app:
            for size in (25, 26, 5, 6):
                send_file(app, "a.txt", noise(size), chunk_size=10)
                self.assertEqual(finished_files(app), {"a.txt": noise(size)})


# Point 4 of the issue that began this: nothing of these is stored.
WRONG_CHUNKS: Dict[str, Dict[str, Any]] = {
    **{
        f"{name} is {ascii(text)}": {name: text}
        for name in ("ChunkNumber", "ChunkSize", "CurrentChunkSize", "TotalSize")
        for text in ("+1", "1_0", "\u0663", "1e3", "-1", "1" * 30)
    },
    "one byte too few": {"sent": noise(25)[:9]},
    "one byte too many": {"sent": noise(25)[:11]},
    "no byte": {"sent": b""},
    "wrong length": {"CurrentChunkSize": 9},
    "wrong total": {"TotalSize": 9},
    "number 0": {"ChunkNumber": 0},
    "number too large": {"ChunkNumber": 4},
    "count too large": {"TotalChunks": 30},
    "no identifier": {"Identifier": None},
    "empty identifier": {"Identifier": ""},
    "no name": {"Filename": None, "RelativePath": None},
    "name leads outside": {"RelativePath": "../a"},
    "no number": {"ChunkNumber": None},
}


class RefusalTest(unittest.TestCase):
    """A refused chunk leaves nothing, and the right one afterwards is taken."""

    def check_nothing_stored(self, app: UploadApp, wrong: Message) -> Answer:
        """Send a wrong first chunk between the second and the right first one."""
        self.assertIn(send(app, *wrong).status, range(400, 500))
        self.assertEqual((leftovers(app), app.store.open_uploads), ({}, 0))
        self.assertEqual(send(app, *browser("a", noise(25), 2, 10)).status, 200)
        before = (leftovers(app), self.ranges(app))
        answer = send(app, *wrong)
        self.assertIn(answer.status, range(400, 500))
        self.assertIs(answer.json["success"], False)
        self.assertRegex(answer.json["error"], r"\A[^\n]+\.\Z")
        self.assertEqual((leftovers(app), self.ranges(app)), before)
        answers = send_file(app, "a", noise(25), chunk_size=10)
        self.assertEqual({a.status for a in answers}, {200})
        self.assertEqual(finished_files(app), {"a": noise(25)})
        return answer

    def ranges(self, app: UploadApp) -> Any:
        message = browser("a", noise(25), mode="test", ChunkNumber=None)
        return send(app, *message).json["ranges"]

    def test_wrong_chunk_leaves_nothing_behind(self) -> None:
        for mode, (name, how) in itertools.product(
            ("multipart", "octet"), WRONG_CHUNKS.items()
        ):
            with self.subTest(name, mode=mode), application() as app:
                wrong = browser("a", noise(25), 1, 10, mode, **how)
                self.check_nothing_stored(app, wrong)

    def test_size_that_disagrees_is_told_with_both_numbers(self) -> None:
        for mode, sent in itertools.product(("multipart", "octet"), (9, 11)):
            with self.subTest(mode, sent=sent), application() as app:
                wrong = browser("a", noise(25), 1, 10, mode, sent=noise(sent))
                words = self.check_nothing_stored(app, wrong).json["error"].split()
                self.assertIn(str(sent), words)
                self.assertTrue({"10", "10."} & set(words), words)

    def test_file_that_came_as_text_is_told_how_to_come(self) -> None:
        """resumable.js with chunkFormat: 'base64'."""
        for size in (10, 90_000):
            fields = flow_parameters("a", noise(size))
            fields["file"] = "data:a/b;base64," + "A" * size
            message = browser("a", noise(size))._replace(body=multipart(fields, None))
            with self.subTest(size), application() as app:
                answer = send(app, *message)
                self.assertIn("chunkFormat", answer.json["error"])
                self.assertEqual((answer.status, leftovers(app)), (415, {}))

    def test_body_that_is_much_too_long_is_refused_before_it_is_read(self) -> None:
        with application() as app:
            wrong = browser("a", noise(25), 1, 10, sent=noise(300 * KIB))
            error = self.check_nothing_stored(app, wrong).json["error"]
            self.assertIn(f"{len(wrong.body)} bytes, but its parameters say 10", error)

    def test_body_that_is_cut_anywhere_is_refused(self) -> None:
        for mode, number, other in itertools.product(
            ("multipart", "octet"), (1, 2), (False, True)
        ):
            message = browser("a", noise(25), number, 10, mode)
            for size in range(0, len(message.body), 1 + len(message.body) // 20):
                with self.subTest(mode, number=number, other=other, size=size):
                    self.check_cut(message, size, 3 - number if other else None)

    def check_cut(self, message: Message, size: int, other: Optional[int]) -> None:
        """Cut a chunk's body, when nothing or one `other` chunk is stored."""
        with application() as app:
            if other:
                send(app, *browser("a", noise(25), other, 10))
            before = (leftovers(app), self.ranges(app), app.store.open_uploads)
            self.assertIn(self.send_cut(app, message, size), range(400, 500))
            after = (leftovers(app), self.ranges(app), app.store.open_uploads)
            self.assertEqual(after, before)
            self.assertEqual(send(app, *message).status, 200)

    def send_cut(self, app: UploadApp, message: Message, size: int) -> int:
        path, _, query = message.path.partition("?")
        kind = {"content-type": message.headers["Content-Type"]}
        read = io.BytesIO(message.body[:size]).read
        request = Request("POST", path, query, kind, len(message.body), read)
        return app.handle(request).status

    def test_forms_that_are_no_forms_are_refused(self) -> None:
        good = browser("a", b"x")
        early = flow_parameters("a", b"x", RelativePath=None)
        cases = {
            "no file": good._replace(body=multipart(flow_parameters("a", b"x"), None)),
            "file is a text field": good._replace(
                body=multipart({**flow_parameters("a", b"x"), "file": "eA=="}, None)
            ),
            "two files": good._replace(
                body=good.body[: -len(BOUNDARY) - 6]
                + multipart({}, b"").replace(b'"file"', b'"more"')
            ),
            "parameter after the file": good._replace(
                body=multipart(early, b"x")[: -len(BOUNDARY) - 6]
                + multipart({"flowRelativePath": "b"}, None)
            ),
            "field that is not UTF-8": good._replace(
                body=multipart({"x": "?"}, None)[: -len(BOUNDARY) - 6].replace(
                    b"?", b"\xff"
                )
                + good.body
            ),
            "long fields": good._replace(
                body=multipart({**early, "x": "." * 70000}, b"x")
            ),
            "no boundary": good._replace(
                headers={"Content-Type": "multipart/form-data"}
            ),
            "other multipart": good._replace(
                headers={"Content-Type": "multipart/mixed; boundary=x"}
            ),
            "wrong boundary": good._replace(
                headers={"Content-Type": "multipart/form-data; boundary=x"}
            ),
            "nothing known": Message("POST", "/upload?a=1", b"x"),
            "not UTF-8": browser("a", b"x", mode="octet")._replace(
                path="/upload?flowIdentifier=%ff"
            ),
            "too many parameters": Message("POST", "/upload?" + "a=1&" * 300, b"x"),
        }
        for name, message in cases.items():
            with self.subTest(name), application() as app:
                answer = send(app, *message)
                self.assertIn(answer.status, (400, 415))
                self.assertRegex(answer.json["error"], r"\A[^\n]+\.\Z")
                self.assertEqual((finished_files(app), leftovers(app)), ({}, {}))

    def test_semicolon_separates_no_parameters(self) -> None:
        """GHSA-6jv3-5f52-599m; and a plus is a blank, as Fine Uploader means it."""
        done: List[Any] = []
        message = browser("a", b"x", mode="octet")
        more = "&a=1;b=2&c&d=%2B+%C3%A4&d=%2b+%c3%a4"
        with application(on_complete=done.append) as app:
            send(app, *message._replace(path=message.path + more))
        self.assertEqual(done[0].fields, {"a": "1;b=2", "c": "", "d": "+ ä"})

    def test_filename_of_the_part_reaches_no_disk(self) -> None:
        """CVE-2026-24486; the name is a parameter, and that is made safe."""
        message = browser("a", b"x")
        with application() as app:
            for name in (b"../../e", b"/e", b"C:\\e", b"%22", b""):
                body = message.body.replace(b'filename="blob"', b'filename="%s"' % name)
                self.assertEqual(send(app, *message._replace(body=body)).status, 200)
            self.assertEqual(finished_files(app), {"a": b"x"})

    def test_names_on_disk_are_hashes_and_private(self) -> None:
        with application() as app:
            for identifier in (
                "../../x",
                "/etc/passwd",
                "a\0b",
                "x" * 5000,
                "ä/ö",
                ".",
                "~",
            ):
                message = browser("a", noise(25), 1, 10, Identifier=identifier)
                self.assertEqual(send(app, *message).status, 200)
            names = list(leftovers(app))
            self.assertEqual(len(names), 7)
            for name in names:
                self.assertRegex(name, r"\A[0-9a-f]{40}-[0-9a-f]{16}\.data\Z")
            if os.name == "posix":
                self.assertEqual(os.stat(app.store.temp_dir).st_mode & 0o777, 0o700)

    @unittest.skipUnless(os.name == "posix", "needs a umask")
    def test_files_get_the_mode_that_the_umask_leaves(self) -> None:
        for umask in (0o022, 0o077, 0o002):
            self.addCleanup(os.umask, os.umask(umask))
            with self.subTest(oct(umask)), application() as app:
                for size in (5, 25):
                    send_file(app, f"{size}", noise(size), chunk_size=10)
                    path = os.path.join(app.store.upload_dir, f"{size}")
                    self.assertEqual(os.stat(path).st_mode & 0o777, 0o666 & ~umask)

    def test_hostile_names_stay_inside_or_are_refused(self) -> None:
        names = (
            "../../x",
            "..\\..\\x",
            "/etc/x",
            "C:\\x",
            "C:x",
            "CON",
            "a\0b",
            "a" * 300,
            "日" * 300,
            ".flowserver/v1/x.ledger",
            ".FLOWSERVER",
            "a/../../../x",
            "x/.",
            "\u202etxt.exe",
            "~/x",
            "$HOME/x",
            "%2e%2e/x",
            "a:b",
            "..",
            "-x",
            "\ud7ff",
        )
        for name in names:
            with self.subTest(ascii(name)), temporary_folder() as folder:
                store = Store(os.path.join(folder, "up"))
                with application(store=store) as app:
                    answer = send(app, *browser(name, b"x", mode="octet"))
                    self.assertIn(answer.status, (200, 415))
                    files = finished_files(app)
                    self.assertEqual(
                        list(files.values()), [b"x"] * (answer.status == 200)
                    )
                    for path in files:
                        self.assertEqual(flowserver.safe_path(path), path)
                    lies_inside(app, folder)

    def test_temp_folder_of_any_name_takes_no_file(self) -> None:
        with temporary_folder() as folder:
            upload_dir, temp_dir = f"{folder}/up", f"{folder}/up/deep/state"
            os.makedirs(os.path.dirname(temp_dir))
            with application(upload_dir=upload_dir, temp_dir=temp_dir) as app:
                for name in (
                    "deep/state/v2/x.ledger",
                    "deep/STATE/v2/x",
                    "deep/state/x",
                ):
                    self.assertEqual(send(app, *browser(name, b"x")).status, 200)
                made = {name for _, _, names in os.walk(temp_dir) for name in names}
                self.assertEqual({n for n in made if n.startswith("x")}, set())
                self.assertEqual(sorted(os.listdir(temp_dir)), ["key", "v2"])

    @unittest.skipUnless(hasattr(os, "symlink") and os.name == "posix", "needs POSIX")
    def test_temp_folder_takes_no_file_however_it_is_written(self) -> None:
        """Its name is that of the folder on disk: a forged ledger leads anywhere."""
        for written in ("up/state/", "up/state/.", "link", "link/"):
            with self.subTest(written), temporary_folder() as folder:
                os.makedirs(folder + "/up/state")
                os.symlink("up/state", folder + "/link")
                temp_dir = os.path.join(folder, written)
                with application(upload_dir=folder + "/up", temp_dir=temp_dir) as app:
                    answer = send(app, *browser("state/v2/x.ledger", b"x"))
                    self.assertEqual(answer.json["path"], "_state/v2/x.ledger")

    def test_temp_folder_of_letters_in_two_parts_takes_no_file(self) -> None:
        """macOS takes both ways of writing them for one name."""
        with temporary_folder() as folder:
            temp_dir = folder + "/up/e\u0301"
            os.mkdir(folder + "/up")
            with application(upload_dir=folder + "/up", temp_dir=temp_dir) as app:
                answer = send(app, *browser("e\u0301/v2/x.ledger", b"x"))
                self.assertEqual(answer.json["path"], "_\u00e9/v2/x.ledger")

    def test_temp_folder_is_not_the_upload_folder(self) -> None:
        with temporary_folder() as folder:
            for upload_dir in (folder, os.path.join(folder, "v2")):
                os.makedirs(upload_dir, exist_ok=True)
                with self.assertRaisesRegex(flowserver.Trouble, "temp_dir"):
                    UploadApp(Settings(upload_dir=upload_dir, temp_dir=folder))

    def test_files_of_ours_do_not_lie_where_clients_put_theirs(self) -> None:
        for name in (
            "users_file",
            "log_file",
            "certificate",
            "private_key",
            "sample_dir",
        ):
            with self.subTest(name), temporary_folder() as folder:
                inside = os.path.join(folder, "up", "ours")
                os.makedirs(inside)
                settings = Settings(upload_dir=folder + "/up", **{name: inside})
                with mock.patch.object(flowserver, "Users"):
                    with self.assertRaisesRegex(flowserver.SettingsError, name):
                        UploadApp(settings)
        with self.assertRaisesRegex(flowserver.SettingsError, "flowserver.py"):
            UploadApp(Settings(upload_dir=os.path.dirname(FILE)))

    def test_files_of_clients_do_not_lie_where_pages_are_served_from(self) -> None:
        with temporary_folder() as folder:
            with self.assertRaisesRegex(flowserver.SettingsError, "sample_dir"):
                UploadApp(Settings(upload_dir=folder + "/up", sample_dir=folder))

    @unittest.skipUnless(hasattr(os, "symlink") and os.name == "posix", "needs POSIX")
    def test_links_in_the_upload_folder_are_not_followed(self) -> None:
        with temporary_folder() as folder, application() as app:
            os.symlink(folder, os.path.join(app.store.upload_dir, "d"))
            os.symlink(folder + "/x", os.path.join(app.store.upload_dir, "a"))
            answer = send(app, *browser("d/x", b"x"))
            self.assertEqual(answer.status, 415)
            self.assertIn('"d" is not a folder', answer.json["error"])
            self.assertEqual(send(app, *browser("a", b"x")).json["path"], "a (1)")
            self.assertEqual(os.listdir(folder), [])


class ProtocolTest(unittest.TestCase):
    """Tests, status, cancelling: what is told to whom."""

    def setUp(self) -> None:
        context = application()
        self.app = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)

    def ask(self, number: Optional[int] = 1, method: str = "GET", **how: Any) -> Answer:
        client = how.pop("client", "127.0.0.1")
        size = how.pop("chunk_size", 10)
        how.setdefault("ChunkNumber", number)
        message = browser("a", noise(25), number or 1, size, "test", method, **how)
        return send(self.app, *message, client=client)

    def give(self, number: int, **how: Any) -> Answer:
        client = how.pop("client", "127.0.0.1")
        size = how.pop("chunk_size", 10)
        message = browser("a", noise(25), number, size, **how)
        return send(self.app, *message, client=client)

    def test_absent_chunk_is_204_never_404(self) -> None:
        for method in ("GET", "HEAD"):
            answer = self.ask(method=method)
            self.assertEqual((answer.status, answer.body), (204, b""))
            self.assertEqual(answer.headers["cache-control"], "no-store")

    def test_chunk_is_present_while_the_upload_is_unfinished(self) -> None:
        self.give(1, Identifier=SECRET)
        second = {"CurrentChunkSize": 15, "Identifier": SECRET}
        for method in ("GET", "HEAD"):
            self.assertEqual(self.ask(method=method, Identifier=SECRET).status, 200)
            self.assertEqual(self.ask(2, method, **second).status, 204)
        self.assertEqual(self.ask(Identifier=SECRET).json["status"], "partial")
        self.give(2, Identifier=SECRET)
        statuses = (self.ask(Identifier=SECRET).status, self.ask(2, **second).status)
        self.assertEqual(statuses, (204, 204))

    def test_first_chunk_and_the_last_one_stored_are_asked_for_again(self) -> None:
        """Samples: they show whether the file is still the same."""
        for number in (1, 2, 3):
            self.give(number, chunk_size=5)
        asked = [self.ask(n, chunk_size=5).status for n in (1, 2, 3, 4)]
        self.assertEqual(asked, [204, 200, 204, 204])

    def test_part_of_a_chunk_is_not_the_chunk(self) -> None:
        self.give(1, Identifier=SECRET)
        bigger = {"ChunkSize": 20, "CurrentChunkSize": 25, "TotalChunks": 1}
        self.assertEqual(self.ask(1, Identifier=SECRET, **bigger).status, 204)

    def test_only_who_sent_it_is_told(self) -> None:
        for number in (1, 2, 3):
            self.give(number, chunk_size=5)
        self.assertEqual(self.ask(2, chunk_size=5).status, 200)
        stranger = {"client": "10.0.0.9", "chunk_size": 5}
        self.assertEqual(self.ask(2, **stranger).status, 204)
        self.assertEqual(self.ask(None, **stranger).json["status"], "unknown")
        self.assertEqual(self.ask(None, **stranger).json["ranges"], [])

    def test_who_knows_a_secret_identifier_is_told_at_any_address(self) -> None:
        self.give(1, Identifier=SECRET)
        answer = self.ask(client="10.0.0.9", Identifier=SECRET)
        self.assertEqual(answer.status, 200)

    def test_without_parameters_nothing_is_there(self) -> None:
        for path in ("/upload", "/upload?", "/upload?a=b"):
            for method in ("GET", "HEAD"):
                self.assertEqual(send(self.app, method, path).status, 204)

    def test_test_that_makes_no_sense_is_refused(self) -> None:
        self.assertEqual(self.ask(1, ChunkNumber="+1").status, 415)
        self.assertEqual(self.ask(1, RelativePath="../a").status, 415)

    def test_test_changes_nothing_on_disk(self) -> None:
        before = sorted(os.walk(self.app.store.upload_dir))
        for number in (1, None):
            self.ask(number)
        self.assertEqual(sorted(os.walk(self.app.store.upload_dir)), before)

    def test_status_tells_all_ranges_in_one_question(self) -> None:
        self.assertEqual(self.ask(None).json["status"], "unknown")
        self.give(2)
        answer = self.ask(None).json
        self.assertEqual((answer["status"], answer["ranges"]), ("partial", [[10, 24]]))
        self.give(1)
        answer = self.ask(None).json
        self.assertEqual((answer["status"], answer["ranges"]), ("complete", [[0, 25]]))
        self.assertEqual((answer["path"], answer["size"]), ("a", 25))

    def test_status_of_a_finished_file_that_was_taken_away_or_changed(self) -> None:
        """Nothing of it need not be sent: the next chunk begins a new upload."""
        path = os.path.join(self.app.store.upload_dir, "a")
        for spoil in (os.unlink, lambda path: os.utime(path, (1, 1))):
            self.give(1)
            self.give(2)
            spoil(path)
            answer = self.ask(None).json
            self.assertEqual((answer["status"], answer["ranges"]), ("unknown", []))

    def test_restart_forgets_nothing(self) -> None:
        self.give(1)
        self.app = UploadApp(self.app.settings)
        self.assertEqual(self.ask(None).json["ranges"], [[1, 9]])
        self.assertEqual(self.give(2).json["status"], "complete")
        self.assertEqual(finished_files(self.app), {"a": noise(25)})

    def test_cancelled_upload_leaves_nothing(self) -> None:
        self.give(1)
        self.assertEqual(self.app.store.open_uploads, 1)
        self.assertEqual(self.ask(None, "DELETE").status, 204)
        self.assertEqual((leftovers(self.app), self.app.store.open_uploads), ({}, 0))
        self.assertEqual(self.ask().status, 204)
        self.assertEqual(send_file(self.app, "a", noise(25))[-1].status, 200)

    def test_strangers_cancel_nothing(self) -> None:
        self.give(1)
        self.assertEqual(self.ask(None, "DELETE", client="10.0.0.9").status, 204)
        self.assertEqual(self.ask(None).json["status"], "partial")

    def test_finished_file_can_not_be_cancelled(self) -> None:
        self.give(1), self.give(2)
        self.assertEqual(self.ask(None, "DELETE").status, 204)
        self.assertEqual(finished_files(self.app), {"a": noise(25)})

    def test_cancelling_nothing_in_particular_is_refused(self) -> None:
        self.assertEqual(send(self.app, "DELETE", "/upload").status, 400)

    def test_two_people_with_one_identifier_do_not_meet(self) -> None:
        other = [browser("a", noise(25, 2), number, 10) for number in (1, 2)]
        for number in (1, 2):
            self.give(number)
            answer = send(self.app, *other[number - 1], client="10.0.0.9")
        self.assertEqual(answer.json["path"], "a (1)")
        files = {"a": noise(25), "a (1)": noise(25, 2)}
        self.assertEqual(finished_files(self.app), files)

    def test_changed_file_begins_afresh_on_the_next_try(self) -> None:
        self.give(1)
        changed = [browser("a", noise(25, 2), number, 10) for number in (1, 2)]
        self.assertEqual(send(self.app, *changed[0]).status, 415)
        self.assertEqual([send(self.app, *c).status for c in changed], [200, 200])
        self.assertEqual(finished_files(self.app), {"a": noise(25, 2)})

    def test_each_method_has_its_place(self) -> None:
        cases = {
            ("POST", "/"): 405,
            ("DELETE", "/health"): 405,
            ("TRACE", "/upload"): 405,
            ("GET", "/nowhere"): 404,
            ("POST", "/nowhere"): 404,
            ("GET", "/upload/"): 204,
            ("GET", "/upload/x"): 404,
            ("GET", "/uploads"): 404,
            ("GET", "/sample"): 404,
            ("OPTIONS", "/upload"): 204,
            ("HEAD", "/health"): 200,
            ("GET", "/"): 200,
            ("GET", browser("a", b"x", mode="test", path="/").path): 404,
        }
        for (method, path), status in cases.items():
            with self.subTest(method, path=path):
                answer = send(self.app, method, path)
                self.assertEqual(answer.status, status)
                self.assertEqual(
                    "allow" in answer.headers, status == 405 or method == "OPTIONS"
                )
        allowed = [
            send(self.app, "TRACE", p).headers["allow"] for p in ("/", "/upload")
        ]
        self.assertEqual(
            [text.partition(", P")[0] for text in allowed], ["GET, HEAD"] * 2
        )
        self.assertEqual(["POST" in text for text in allowed], [False, True])

    def test_only_what_is_final_says_that_it_is(self) -> None:
        message = browser("a", noise(25), 1, 10)
        cut = io.BytesIO(message.body[:-20])
        junk = io.BytesIO(b"x" * len(message.body))
        for body, is_final in ((junk, True), (cut, False)):
            request = prepared(message, body.read)
            answer = json.loads(self.app.handle(request).body)
            self.assertIs("preventRetry" in answer, is_final, answer)

    def test_connection_that_breaks_is_no_mistake_of_ours(self) -> None:
        """As the streams of http.server, wsgiref and others say it."""

        def read(size: int) -> bytes:
            raise ConnectionResetError(104, "reset by peer")

        for message in (browser("a", b"1"), Message("POST", "/nowhere", b"1")):
            body = flowserver.CountingReader(read, len(message.body))
            with self.assertLogs("flowserver") as logs:
                answer = self.app.handle(prepared(message, body))
            self.assertIn(answer.status, (404, 408))
            self.assertNotIn("bug", "".join(logs.output))


class SenderTest(unittest.TestCase):
    """Who sends, when nobody says so: the browser, as it was first seen."""

    def setUp(self) -> None:
        context = application(trusted_proxies="192.0.2.1")
        self.app = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        self.data = noise(40)

    def give(
        self, number: int, client: str = "10.0.0.1", cookie: str = "", **headers: str
    ) -> Answer:
        """Send a chunk of four; `agent` is the browser."""
        message = browser("a", self.data, number, 10)
        headers = {**message.headers, "Cookie": cookie, **headers}
        return send(self.app, *message._replace(headers=headers), client=client)

    def cookie(self, answer: Answer) -> str:
        """Return what a browser sends back of Set-Cookie, "" when there was none."""
        return answer.headers.get("set-cookie", "").partition(";")[0]

    def received(self, answer: Answer) -> int:
        return int(answer.json.get("received", 40))

    def test_browser_that_changes_its_address_goes_on_by_its_cookie(self) -> None:
        cookie = self.cookie(self.give(1))
        self.assertRegex(cookie, r"\Aflowserver-[0-9a-f]{32}=[0-9a-f]{32}\Z")
        for number, client in ((2, "10.0.0.2"), (3, "2001:db8::1")):
            answer = self.give(number, client, "theme=dark; " + cookie)
            self.assertEqual(self.received(answer), number * 10)
            self.assertEqual(self.cookie(answer), "")
        self.assertEqual(self.give(4, cookie=cookie).json["status"], "complete")

    def test_without_a_cookie_another_address_is_somebody_else(self) -> None:
        self.give(1)
        self.assertEqual(self.received(self.give(2, "10.0.0.2")), 10)
        self.assertEqual(self.received(self.give(2)), 20)

    def test_another_browser_at_one_address_is_somebody_else(self) -> None:
        self.give(1, **{"User-Agent": "Firefox"})
        chrome = self.give(2, **{"User-Agent": "Chrome"})
        self.assertEqual(self.received(chrome), 10)

    def test_household_is_known_by_the_first_half_of_its_address(self) -> None:
        self.give(1, "2001:db8:0:1::1")
        self.assertEqual(self.received(self.give(2, "2001:db8:0:1:ffff::2")), 20)
        self.assertEqual(self.received(self.give(2, "2001:db8:0:2::1")), 10)

    def test_first_of_several_cookies_counts(self) -> None:
        """Three requests of the beginning may come from two addresses."""
        first, second = (self.cookie(self.give(1, f"10.0.0.{n}")) for n in (1, 2))
        answer = self.give(2, "10.0.0.3", f"{first}; {second}")
        self.assertEqual(self.received(answer), 20)
        for number, client in ((3, "10.0.0.1"), (4, "10.0.0.2")):
            answer = self.give(number, client, f"{first}; {second}")
        self.assertEqual(answer.json["status"], "complete")

    def test_cookie_that_we_did_not_sign_says_nothing(self) -> None:
        cookie = self.cookie(self.give(1))
        forged = cookie[:-1] + ("0" if cookie[-1] != "0" else "1")
        for bad in (
            forged,
            "flowserver-=",
            cookie.replace("=", ""),
            "flowserver-x=\xff",
        ):
            answer = self.give(2, "10.0.0.2", bad)
            self.assertEqual(self.received(answer), 10)
            self.assertNotEqual(self.cookie(answer), "")
        self.assertEqual(
            self.received(self.give(2, "10.0.0.9", f"{forged}; {cookie}")), 20
        )

    def test_cookie_is_for_this_server_alone_and_secure_under_https(self) -> None:
        answer = self.give(1)
        words = answer.headers["set-cookie"].split("; ")[1:]
        self.assertEqual(words, ["Max-Age=34560000", "HttpOnly", "SameSite=Lax"])
        proxied = {"X-Forwarded-For": "10.0.0.7", "X-Forwarded-Proto": "https"}
        answer = self.give(1, "192.0.2.1", **proxied)
        self.assertIn("; Secure", answer.headers["set-cookie"])

    def test_cookies_outlive_the_process_and_serve_others_over_the_folder(self) -> None:
        cookie = self.cookie(self.give(1))
        other = UploadApp(self.app.settings)
        self.app = other
        self.assertEqual(self.received(self.give(2, "10.0.0.2", cookie)), 20)

    def test_every_answer_at_the_upload_address_but_a_preflight_has_one(self) -> None:
        for message in (
            browser("a", self.data, 1, 10, "test"),
            Message("POST", "/upload", b"x"),
            Message("GET", "/upload"),
        ):
            self.assertNotEqual(self.cookie(send(self.app, *message)), "")
        for message in (Message("OPTIONS", "/upload"), Message("GET", "/health")):
            self.assertEqual(self.cookie(send(self.app, *message)), "")

    def test_our_cookie_is_no_login_for_pages_of_any_origin(self) -> None:
        with application(allow_origins="*") as app:
            message, origin = browser("a", b"x"), {"Origin": "http://a.example"}
            for cookie, status in (("flowserver-0=1", 200), ("session=1", 415)):
                headers = {**message.headers, **origin, "Cookie": cookie}
                answer = send(app, *message._replace(headers=headers))
                self.assertEqual(answer.status, status)


class SequenceTest(unittest.TestCase):
    """Plain sequences of what people do: again, changed, back, another name.

    The worst defect of 1.0.0 was found by sending a file three times, with no fault.
    """

    SIZE, CHUNK = 40, 10

    def versions(self, place: int) -> List[bytes]:
        first = noise(self.SIZE, 3)
        return [first, changed(first, place)]

    def send(self, data: bytes, tests: bool, connections: int) -> bool:
        """Send a file as flow.js does; return whether all was answered 200."""
        numbers = iter(range(1, self.SIZE // self.CHUNK + 1))
        failed: List[int] = []
        lock = threading.Lock()

        def work() -> None:
            while not failed:
                with lock:
                    number = next(numbers, 0)
                if not number:
                    return
                test = browser("five.bin", data, number, self.CHUNK, "test")
                if tests and send(self.app, *test).status == 200:
                    continue
                message = browser("five.bin", data, number, self.CHUNK)
                if send(self.app, *message).status != 200:
                    failed.append(number)

        threads = [threading.Thread(target=work) for _ in range(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        return not failed

    def upload(self, data: bytes, tests: bool, connections: int) -> int:
        """Send a file until it is taken; return how often it was refused."""
        for refusals in range(4):
            if self.send(data, tests, connections):
                return refusals
        raise AssertionError("refused for ever")

    def check(self, order: Sequence[int], place: int, policy: str, *how: Any) -> None:
        with application(on_conflict=policy) as self.app:
            versions = self.versions(place)
            for index, version in enumerate(order):
                is_changed = index and version != order[index - 1]
                refusals = self.upload(versions[version], *how)
                self.assertLessEqual(refusals, 1 if is_changed else 0)
                files = finished_files(self.app)
                self.assertLessEqual(set(files.values()), set(versions), "mixed")
                self.assertIn(versions[version], files.values(), "lost")
            if policy == "replace":
                self.assertEqual(files, {"five.bin": versions[order[-1]]})
            else:
                self.assertEqual(len(files), len(set(order)))
            self.assertEqual(leftovers(self.app), {})

    def test_no_sequence_of_versions_is_mixed_or_silently_lost(self) -> None:
        orders = (
            (0, 0, 1),
            (0, 0, 0, 1),
            (0, 1),
            (0, 1, 0),
            (0, 0, 1, 1, 0),
            (0, 1, 1, 0),
        )
        ways = list(
            itertools.product((5, 15, 35), ("rename", "replace"), (True, False))
        )
        for order, (place, policy, tests) in itertools.product(orders, ways):
            for connections in (1, 3):
                how = (place, policy, tests, connections)
                with self.subTest(order, how=how):
                    self.check(order, *how)

    def test_refused_name_is_refused_in_every_sequence(self) -> None:
        for place, connections in itertools.product((5, 35), (1, 3)):
            with application(on_conflict="refuse") as self.app:
                old, new = self.versions(place)
                self.upload(old, True, connections)
                self.upload(old, True, connections)
                for _ in range(3):
                    self.assertFalse(self.send(new, True, connections))
                self.assertEqual(finished_files(self.app), {"five.bin": old})

    def test_changed_file_after_an_interruption(self) -> None:
        """The samples show a change at either end of what is stored."""
        for stored, tests in itertools.product((1, 2, 3), (True, False)):
            for place in range(5, self.SIZE, 10):
                with self.subTest(stored=stored, place=place, tests=tests):
                    with application() as self.app:
                        old, new = self.versions(place)
                        for number in range(1, stored + 1):
                            message = browser("five.bin", old, number, self.CHUNK)
                            self.assertEqual(send(self.app, *message).status, 200)
                        refusals = self.upload(new, tests, 1)
                        files = finished_files(self.app)
                        if tests and stored == 3 and place == 15:
                            continue  # neither sample: README, "what it can't know"
                        self.assertEqual(files, {"five.bin": new})
                        self.assertEqual(refusals, int(place < stored * self.CHUNK))


class LimitTest(unittest.TestCase):
    """What is too much is refused for good, and says which limit it was."""

    def check_refused(self, message: Message, word: str, **settings: Any) -> None:
        with application(**settings) as app:
            answer = send(app, *message)
            self.assertEqual(answer.status, 413)
            self.assertIn(word, answer.json["error"])
            self.assertIs(answer.json["preventRetry"], True)
            self.assertEqual((finished_files(app), leftovers(app)), ({}, {}))

    def test_chunk_that_is_too_large(self) -> None:
        for mode in ("multipart", "octet"):
            message = browser("a", noise(25), 1, 10, mode)
            self.check_refused(message, "max_chunk_size", max_chunk_size=9)
            with application(max_chunk_size=10) as app:
                self.assertEqual(send(app, *message).status, 200)

    def test_chunk_that_is_much_too_large_is_refused_by_its_head(self) -> None:
        read = mock.Mock()
        with application(max_chunk_size=MIB) as app:
            message = browser("a", bytes(3 * MIB), 1, 3 * MIB, "octet")
            query = message.path.partition("?")[2]
            response = app.handle(Request("POST", "/upload", query, {}, 3 * MIB, read))
        self.assertEqual(response.status, 413)
        read.assert_not_called()

    def test_file_that_is_too_large(self) -> None:
        message = browser("a", noise(25), 1, 10)
        self.check_refused(message, "max_file_size", max_file_size=24)
        with application(max_file_size=25) as app:
            self.assertEqual(send(app, *message).status, 200)

    def test_too_many_uploads(self) -> None:
        with application(max_uploads=2) as app:
            for name in ("a", "b"):
                self.assertEqual(
                    send(app, *browser(name, noise(25), 1, 10)).status, 200
                )
            refused = send(app, *browser("c", noise(25), 1, 10))
            self.assertEqual(refused.status, 413)
            self.assertIn("max_uploads", refused.json["error"])
            for name in ("a", "b"):  # those that are begun go on
                self.assertEqual(
                    send(app, *browser(name, noise(25), 2, 10)).status, 200
                )
            self.assertEqual(send(app, *browser("c", noise(25), 1, 10)).status, 200)

    def test_uploads_of_other_processes_are_counted_too(self) -> None:
        now = [0.0]
        with application(max_uploads=2) as other:
            settings = other.settings
            app = UploadApp(settings, clock=lambda: now[0])
            for name in ("a", "b"):
                send(other, *browser(name, noise(25), 1, 10))
            now[0] += 11
            app.tidy()
            refused = send(app, *browser("c", noise(25), 1, 10))
            self.assertEqual(refused.status, 413)

    def test_too_little_space(self) -> None:
        with application(min_free_space="1K") as app:
            with mock.patch.object(app.store.disk, "free_space", return_value=1048):
                self.assertEqual(send(app, *browser("a", noise(24), 1, 10)).status, 200)
                refused = send(app, *browser("b", noise(25), 1, 10))
                self.assertEqual(refused.status, 413)
                self.assertIn("no room for 25 bytes", refused.json["error"])
                app.store.disk.free_space.return_value = 1033
                going_on = send(app, *browser("a", noise(24), 2, 10))
                self.assertEqual(going_on.status, 503)  # another time it may have room
                self.assertEqual(send(app, *browser("c", noise(10))).status, 413)
                app.store.disk.free_space.return_value = 1048
                self.assertEqual(send(app, *browser("a", noise(24), 2, 10)).status, 200)


class TroubleTest(unittest.TestCase):
    """Passing trouble of this machine is 503, a sentence, and never a wrong file."""

    def test_vanished_upload_folder_is_503_for_the_first_upload_too(self) -> None:
        with application(min_free_space="1K") as app:
            shutil.rmtree(app.store.upload_dir)
            for message in (browser("a", b"x"), Message("GET", "/health")):
                answer = send(app, *message)
                self.assertEqual(answer.status, 503)
                self.assertIn("upload folder is gone", answer.json["error"])

    def test_vanished_upload_folder_is_503_and_not_made_again(self) -> None:
        with application() as app:
            send(app, *browser("b", noise(25), 1, 10))
            shutil.rmtree(app.store.upload_dir)
            for message in (
                browser("a", b"x"),
                browser("b", noise(25), 2, 10),
                browser("a", noise(25), 1, 10, "test"),
                browser("c", noise(25), 1, 10),
            ):
                answer = send(app, *message)
                self.assertEqual(answer.status, 503)
                self.assertIn("upload folder is gone", answer.json["error"])
                self.assertIn("retry-after", answer.headers)
            self.assertFalse(os.path.exists(app.store.upload_dir))

    def test_full_disk_is_503_and_what_is_stored_stays(self) -> None:
        with application() as app:
            send(app, *browser("a", noise(25), 1, 10))
            full = OSError(errno.ENOSPC, "No space left on device")
            with mock.patch.object(app.store.disk, "write", side_effect=full):
                answer = send(app, *browser("a", noise(25), 2, 10))
            self.assertEqual(answer.status, 503)
            self.assertIn("The disk is full", answer.json["error"])
            self.assertEqual(send(app, *browser("a", noise(25), 2, 10)).status, 200)
            self.assertEqual(finished_files(app), {"a": noise(25)})

    def test_tidying_that_fails_is_a_warning(self) -> None:
        now = [0.0]
        with application(clock=lambda: now[0]) as app:
            shutil.rmtree(app.store.upload_dir)
            for seconds in (11, 400):
                now[0] += seconds
                with self.assertLogs("flowserver", "WARNING") as logs:
                    app.tidy()
                self.assertIn("can't clean up", logs.output[0])

    def test_file_system_without_links_is_a_warning(self) -> None:
        refused = OSError(errno.EPERM, "Operation not permitted")
        with mock.patch.object(flowserver.Disk, "publish", side_effect=refused):
            with self.assertLogs("flowserver", "WARNING") as logs, application() as app:
                self.assertFalse(app.store.disk.links or os.name == "nt")
        self.assertIn("no hard links", logs.output[0])

    def test_mistake_of_ours_is_logged_and_is_not_500(self) -> None:
        with application() as app, self.assertLogs("flowserver", "ERROR") as logs:
            with mock.patch.object(app.store, "receive", side_effect=ZeroDivisionError):
                answer = send(app, *browser("a", b"x"))
        self.assertEqual(answer.status, 503)
        self.assertNotIn("ZeroDivision", answer.json["error"])
        self.assertIn("ZeroDivisionError", logs.output[0])


class HookLaterTest(unittest.TestCase):
    def test_program_is_not_told_of_what_came_before_it_had_a_function(self) -> None:
        told: List[object] = []
        with temporary_folder() as folder:
            settings = Settings(upload_dir=folder)
            for number in (1, 2, 3):
                send(UploadApp(settings), *browser("a", noise(25), number, 10))
            UploadApp(settings, on_complete=told.append).sweep()
        self.assertEqual(told, [])


class EmbeddingTest(unittest.TestCase):
    """The functions that a program may give."""

    def test_completion_is_told_once_and_before_the_answer(self) -> None:
        done: List[Any] = []
        with application(on_complete=done.append) as app:
            for name, size in (("d/a", 25), ("b", 5)):
                done.clear()
                answers = send_file(app, name, noise(size), chunk_size=10, query="1")
                send(app, *browser(name, noise(size), len(answers), 10))
                (arrived,) = done
                self.assertEqual(arrived.relative_path, name)
                self.assertEqual(arrived.filename, name[-1])
                self.assertEqual((arrived.size, arrived.owner), (size, ""))
                self.assertEqual(arrived.fields, {"flowquery": "1"})
                with open(arrived.path, "rb") as file:
                    self.assertEqual(file.read(), noise(size))

    def test_mistake_in_on_complete_leaves_the_file(self) -> None:
        mistake = mock.Mock(side_effect=RuntimeError("boom"))
        with application(on_complete=mistake) as app:
            with self.assertLogs("flowserver", "ERROR") as logs:
                answers = send_file(app, "a", noise(25), chunk_size=10)
            self.assertEqual(answers[-1].json["status"], "complete")
            self.assertEqual(finished_files(app), {"a": noise(25)})
        self.assertIn('on_complete failed for "a"', logs.output[0])
        mistake.assert_called_once()

    def test_mistake_in_another_function_is_told_as_its_own(self) -> None:
        def boom(_: Any) -> Any:
            raise KeyError("x-user")

        for name in ("authorize", "owner", "place"):
            with self.subTest(name), application(**{name: boom}) as app:
                with self.assertLogs("flowserver", "ERROR") as logs:
                    answer = send(app, *browser("a", b"1"))
                self.assertEqual((answer.status, leftovers(app)), (503, {}))
                self.assertIn(f"{name}() of this program failed", logs.output[0])

    def test_what_is_no_text_is_a_mistake_of_the_function_that_returned_it(
        self,
    ) -> None:
        wrong: Dict[str, Tuple[Any, ...]] = {
            "authorize": (403, 0, 1, b"No."),
            "owner": (7, 0, True, False, b"ann", ["ann"]),
            "place": (None, False, pathlib.PurePath("a"), b"a"),
        }
        for name, answers in wrong.items():
            for answer in answers:
                with self.subTest(name, answer=answer):
                    with application(**{name: lambda _, a=answer: a}) as app:
                        with self.assertLogs("flowserver", "ERROR") as logs:
                            status = send(app, *browser("a", b"1")).status
                        self.assertEqual((status, finished_files(app)), (503, {}))
                    sentence = f"{name}() returned {answer!r}, which is no str"
                    self.assertIn(sentence, logs.output[0])

    def test_nobody_and_nothing_to_refuse_may_be_said_in_several_ways(self) -> None:
        for answer in (None, True, ""):
            done: List[Any] = []
            functions = {"authorize": lambda _, a=answer: a, "on_complete": done.append}
            with application(owner=lambda _: None, **functions) as app:
                self.assertEqual(send(app, *browser("a", b"1")).status, 200)
            self.assertEqual(done[0].owner, "")

    def test_false_refuses(self) -> None:
        for mode in ("multipart", "octet"):
            with application(authorize=lambda _: False) as app:
                refused = send(app, *browser("a", b"1", mode=mode))
            self.assertEqual(refused.status, 415)  # flow.js gives up
            self.assertIn("may not upload", refused.json["error"])

    def test_fields_are_those_that_the_library_did_not_make(self) -> None:
        for prefix in ("flow", "resumable"):
            done: List[Any] = []
            with application(on_complete=done.append) as app:
                more = {"Type": "a/b"} if prefix == "resumable" else {}
                fields = flow_parameters("a", b"1", prefix=prefix, **more)
                fields["project"] = "7"
                message = browser("a", b"1")._replace(body=multipart(fields, b"1"))
                self.assertEqual(send(app, *message).status, 200)
            self.assertEqual(done[0].fields, {"project": "7"})

    def test_authorize_refuses_with_its_sentence(self) -> None:
        def authorize(request: Request) -> Optional[str]:
            return None if request.headers.get("x-key") == "k" else "Bring a key."

        with application(authorize=authorize) as app:
            for message in (
                Message("GET", "/"),
                browser("a", b"x"),
                Message("GET", "/health"),
                browser("a", b"x", mode="test"),
                browser("a", b"x", mode="octet"),
                browser("a", b"x", mode="test", method="DELETE"),
            ):
                answer = send(app, *message)
                self.assertIn(answer.status, (403, 415))
                self.assertEqual(answer.json["error"], "Bring a key.")
            keyed = {**browser("a", b"x").headers, "X-Key": "k"}
            self.assertEqual(
                send(app, *browser("a", b"x")._replace(headers=keyed)).status, 200
            )

    def test_owners_do_not_meet(self) -> None:
        def owner(request: Request) -> str:
            return request.headers["x-user"]

        with application(owner=owner) as app:

            def give(user: str, seed: int, *rest: Any) -> Answer:
                message = browser("a", noise(25, seed), *rest, Identifier=SECRET)
                headers = {**message.headers, "X-User": user}
                answer = send(app, *message._replace(headers=headers), client=user)
                self.assertNotIn("set-cookie", answer.headers)
                return answer

            give("anna", 1, 1, 10)
            self.assertEqual(give("bert", 2, 1, 10).status, 200)
            self.assertEqual(give("anna", 1, 1, 10, "test").status, 200)
            self.assertEqual(give("carl", 1, 1, 10, "test").status, 204)
            self.assertEqual(give("carl", 1, 1, 10, "test", "DELETE").status, 204)
            give("anna", 1, 2, 10), give("bert", 2, 2, 10)
            self.assertEqual(
                finished_files(app), {"a": noise(25, 1), "a (1)": noise(25, 2)}
            )

    def test_place_says_where_and_is_held_to_the_rules(self) -> None:
        def place(incoming: Any) -> str:
            return f"{incoming.fields['flowfolder']}/{incoming.filename}"

        with application(place=place) as app:
            answers = send_file(app, "d/a", noise(25), chunk_size=10, folder="x/y")
            self.assertEqual(answers[-1].json["path"], "x/y/a")
            self.assertEqual(send(app, *browser("a", b"x", folder="../x")).status, 415)
            self.assertEqual(list(finished_files(app)), ["x/y/a"])

    def test_mistake_in_a_call_is_a_type_error_that_names_it(self) -> None:
        cases: Dict[str, Any] = {
            "UploadApp() takes Settings, not str": lambda: UploadApp("uploads"),
            "FlowServer() takes UploadApp, not Settings": lambda: FlowServer(
                Settings()
            ),
        }
        for words, call in cases.items():
            with self.assertRaisesRegex(TypeError, re.escape(words)):
                call()
        with application() as app:
            with self.assertRaisesRegex(
                TypeError, r"handle\(\) takes Request, not dict"
            ):
                app.handle({"REQUEST_METHOD": "GET"})

    def test_what_can_not_be_called_is_refused_at_once(self) -> None:
        for name in ("on_complete", "authorize", "owner", "place"):
            with self.assertRaisesRegex(TypeError, "functions, not 'print'"):
                with application(**{name: "print"}):
                    pass

    def test_request_without_a_length_or_a_body_is_refused(self) -> None:
        """Which is no bug of ours, and nothing that the log should say is one."""
        message = browser("a", b"x", mode="octet")
        with application() as app, self.assertLogs("flowserver", "INFO") as logs:
            request = prepared(message, io.BytesIO(b"x").read)
            for changes in ({"length": None}, {"read": None}):
                response = app.handle(request._replace(**changes))
                self.assertEqual(response.status, 415)  # 400, for flow.js
            test = prepared(browser("a", b"x", mode="test"), None)
            self.assertEqual(app.handle(test._replace(length=None)).status, 204)
        self.assertNotIn("bug", str(logs.output))

    def test_create_app_reads_the_conf_ini_of_the_environment(self) -> None:
        with temporary_folder() as folder:
            path = conf_file(
                folder, "[storage]\nupload_dir = in\n[client]\nchunk_size=2M\n"
            )
            with mock.patch.dict(os.environ, {"FLOWSERVER_CONFIG": path}):
                app = flowserver.create_app()
            self.assertEqual(app.store.upload_dir, os.path.join(folder, "in"))
            self.assertEqual(app.settings.chunk_size, 2 * MIB)

    def test_create_app_keeps_its_conf_ini_from_clients(self) -> None:
        with temporary_folder() as folder:
            path = conf_file(folder, "[storage]\nupload_dir = .\n")
            with self.assertRaisesRegex(flowserver.SettingsError, "conf.ini"):
                flowserver.create_app(path)


class PasswordTest(unittest.TestCase):
    """What stands in users_file."""

    def test_password_is_kept_as_a_salted_slow_hash(self) -> None:
        one, two = flowserver.hash_password("x"), flowserver.hash_password("x")
        self.assertNotEqual(one, two)
        kind, rounds, salt, digest = one.split("$")
        self.assertEqual(kind, "pbkdf2_sha256")
        self.assertGreaterEqual(int(rounds), 100_000)
        known = hashlib.pbkdf2_hmac("sha256", b"x", salt.encode(), int(rounds)).hex()
        self.assertEqual(digest, known)


HOME_PAGE = Message("GET", "/")


def basic(name: str, password: str) -> str:
    """Return the Authorization header of a user."""
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


class LoginTest(unittest.TestCase):
    """users_file: who may come in, and what they are told."""

    def setUp(self) -> None:
        context = temporary_folder()
        self.folder = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        self.path = os.path.join(self.folder, "users")
        quick = mock.patch.object(flowserver.hash_password, "__defaults__", ("", 2))
        self.addCleanup(quick.__exit__, None, None, None)
        quick.__enter__()
        self.write(anna="secret:with colon", bär="pässwörd")
        self.app = UploadApp(
            Settings(
                upload_dir=os.path.join(self.folder, "up"),
                users_file=self.path,
                min_free_space=0,
            )
        )

    def write(self, **users: str) -> None:
        hashes = {n: flowserver.hash_password(p) for n, p in users.items()}
        with open(self.path, "w", encoding="utf-8") as file:
            file.write("".join(f"{name}:{text}\n" for name, text in hashes.items()))

    def login(
        self, name: str, password: str, message: Message = HOME_PAGE, **how: str
    ) -> Answer:
        headers = {**message.headers, "Authorization": basic(name, password)}
        return send(self.app, *message._replace(headers=headers), **how)

    def test_right_password_comes_in(self) -> None:
        for _ in range(2):
            self.assertEqual(self.login("anna", "secret:with colon").status, 200)
            self.assertEqual(self.login("bär", "pässwörd").status, 200)

    def test_wrong_name_and_wrong_password_hear_the_same(self) -> None:
        answers = [
            self.login("anna", "wrong"),
            self.login("nobody", "wrong"),
            self.login("nobody", ""),
            self.login("", ""),
        ]
        self.assertEqual(
            {(a.status, a.body) for a in answers}, {(401, answers[0].body)}
        )
        self.assertIn("needed", send(self.app, "GET", "/").json["error"])
        self.assertTrue(
            answers[0].headers["www-authenticate"].startswith("Basic realm=")
        )

    def test_header_that_is_no_login_is_refused(self) -> None:
        for header in (
            "Basic",
            "Basic ",
            "Basic ???",
            "Basic /w==",
            "Bearer abc",
            "basic \xff",
            "Basic " + base64.b64encode(b"anna").decode(),
        ):
            with self.subTest(header):
                answer = send(self.app, "GET", "/", headers={"Authorization": header})
                self.assertEqual(answer.status, 401)

    def test_everything_needs_the_login_but_a_preflight(self) -> None:
        for message in (
            Message("GET", "/health"),
            browser("a", b"x"),
            Message("GET", "/upload"),
            browser("a", b"x", mode="test"),
            Message("GET", "/sample/"),
            browser("a", b"x", mode="test", method="DELETE"),
            Message("HEAD", "/"),
        ):
            self.assertEqual(send(self.app, *message).status, 401)
        self.assertEqual(send(self.app, "OPTIONS", "/upload").status, 204)
        self.assertEqual(finished_files(self.app), {})

    def test_uploads_belong_to_users_not_to_addresses(self) -> None:
        first = browser("a", noise(25), 1, 10, Identifier=SECRET)
        answer = self.login("anna", "secret:with colon", first)
        self.assertNotIn("set-cookie", answer.headers)
        test = browser("a", noise(25), 1, 10, "test", Identifier=SECRET)
        self.assertEqual(self.login("anna", "secret:with colon", test).status, 200)
        self.assertEqual(self.login("bär", "pässwörd", test).status, 204)

    def test_file_is_read_again_when_it_changes(self) -> None:
        self.login("anna", "secret:with colon")
        self.write(anna="another one")
        self.assertEqual(self.login("anna", "secret:with colon").status, 401)
        self.assertEqual(self.login("anna", "another one").status, 200)

    def test_password_is_hashed_once_and_not_for_everybody(self) -> None:
        slow = mock.Mock(side_effect=flowserver.hash_password)
        barrier = threading.Barrier(4)

        def work() -> None:
            barrier.wait()
            statuses.append(self.login("anna", "secret:with colon").status)

        statuses: List[int] = []
        with mock.patch.object(flowserver, "hash_password", slow):
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual((statuses, slow.call_count), ([200] * 4, 1))
            send(self.app, "GET", "/")  # no password, no work
            self.assertEqual(slow.call_count, 1)

    def test_changed_file_does_not_let_the_old_password_in_again(self) -> None:
        def change(*arguments: Any) -> str:
            with open(self.path, "w") as file:
                file.write("anna:" + other)
            send(self.app, "GET", "/")  # somebody else makes it read the file again
            return hash_password(*arguments)

        hash_password, other = flowserver.hash_password, flowserver.hash_password("new")
        with mock.patch.object(flowserver, "hash_password", change):
            self.assertEqual(self.login("anna", "secret:with colon").status, 200)
        self.assertEqual(self.login("anna", "secret:with colon").status, 401)
        self.assertEqual(self.login("anna", "new").status, 200)

    def test_file_that_can_not_be_read_lets_nobody_in(self) -> None:
        right = f"anna:{flowserver.hash_password('plain')}\n"
        absurd = right.replace("$2$", "$10000001$")
        for text in ("anna:plain\n", "", "# anna\n", absurd, right + "bär:plain\n"):
            with self.subTest(text):
                with open(self.path, "w", encoding="utf-8") as file:
                    file.write(text)
                self.assertEqual(self.login("anna", "plain").status, 503)
                with self.assertRaisesRegex(flowserver.SettingsError, "users_file"):
                    flowserver.Users(self.path)
        os.unlink(self.path)
        self.assertEqual(self.login("anna", "plain").status, 503)

    def test_file_of_an_editor_is_read(self) -> None:
        """With a byte order mark, and comments."""
        line = f"anna:{flowserver.hash_password('x')}\n"
        with open(self.path, "w", encoding="utf-8-sig") as file:
            file.write(line + "\n# carl: gone\n" + line.replace("anna", "#anna"))
        self.assertEqual(self.login("anna", "x").status, 200)
        self.assertEqual(self.login("#anna", "x").status, 401)

    def test_guesses_hold_up_nobody_at_another_address(self) -> None:
        def slow(*arguments: Any) -> str:
            began.append(arguments[0])
            time.sleep(0.03)
            return hash_password(*arguments)

        def guess(number: int) -> None:
            client = f"2001:db8::{number}"  # which are those of one household
            self.login("anna", f"guess {number}", client=client)

        began: List[str] = []
        hash_password = flowserver.hash_password
        with mock.patch.object(flowserver, "hash_password", slow):
            threads = [threading.Thread(target=guess, args=(n,)) for n in range(40)]
            for thread in threads:
                thread.start()
            until(lambda: began)
            time.sleep(0.05)
            before = len(began)
            answer = self.login("bär", "pässwörd", client="198.51.100.7")
            self.assertEqual(answer.status, 200)
            self.assertLess(began.index("pässwörd"), before + 10)
            for thread in threads:
                thread.join()
        self.assertEqual(len(began), 41)

    def test_guess_of_a_client_that_has_gone_is_not_looked_at(self) -> None:
        users = flowserver.Users(self.path)
        first, may_end = threading.Event(), threading.Event()

        def slow(*arguments: Any) -> str:
            first.set()
            may_end.wait(PATIENCE)
            return hash_password(*arguments)

        def guess(password: str, has_gone: Any = bool) -> None:
            with contextlib.suppress(flowserver.FlowError):
                users.authenticate(basic("anna", password), "::1", has_gone)

        hash_password = flowserver.hash_password
        counted = mock.Mock(side_effect=slow)
        with mock.patch.object(flowserver, "hash_password", counted):
            with mock.patch.object(flowserver, "_PATIENT_SECONDS", 0):
                threads = [threading.Thread(target=guess, args=("one",))]
                threads[0].start()
                first.wait(PATIENCE)
                has_gone = mock.Mock(return_value=True)
                threads.append(threading.Thread(target=guess, args=("two", has_gone)))
                threads[1].start()
                may_end.set()
                for thread in threads:
                    thread.join()
        has_gone.assert_called_once()
        self.assertEqual(counted.call_count, 1)


class OriginTest(unittest.TestCase):
    """Hosts, origins and proxies: who may ask for what."""

    def post(self, app: UploadApp, **headers: str) -> Answer:
        message = browser("a", b"x")
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return send(app, *message._replace(headers={**message.headers, **given}))

    def test_foreign_pages_may_not_upload(self) -> None:
        with application() as app:
            for origin in (
                "http://evil.example",
                "null",
                "http://a.example:81",
                "https://a.example",
                "http://a.example.evil",
            ):
                with self.subTest(origin):
                    answer = self.post(app, Origin=origin, Host="a.example")
                    self.assertIn(answer.status, (403, 415))
                    self.assertIn("allow_origins", answer.json["error"])
                    self.assertNotIn("access-control-allow-origin", answer.headers)
            self.assertEqual(finished_files(app), {})

    def test_foreign_origin_is_logged_once(self) -> None:
        """All that its page shows is a failed preflight."""
        asked = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
        with application() as app, self.assertLogs("flowserver", "WARNING") as logs:
            for _ in "12":
                send(app, "OPTIONS", "/upload", headers=asked)
                self.post(app, Origin="http://a.example")
        self.assertEqual(str(logs.output).count("http://a.example"), 1)

    def test_foreign_pages_may_not_cancel(self) -> None:
        with application() as app:
            send(app, *browser("a", noise(25), 1, 10))
            message = browser("a", noise(25), 1, 10, "test", "DELETE")
            send(app, *message._replace(headers={"Origin": "http://evil.example"}))
            self.assertEqual(app.store.open_uploads, 1)

    def test_own_pages_and_programs_may_upload(self) -> None:
        with application() as app:
            for headers in (
                {"Origin": "http://a.example", "Host": "a.example"},
                {},
                {"Origin": "http://a.example:81", "Host": "A.example:81"},
            ):
                self.assertEqual(self.post(app, **headers).status, 200)

    def test_allowed_origins_may_upload_and_read_the_answer(self) -> None:
        for origin in ("https://Page.example", "file://", "null"):
            with application(allow_origins=[origin]) as app:
                answer = self.post(app, Origin=origin, Host="a.example")
                self.assertEqual(answer.status, 200)
                self.assertEqual(answer.headers["access-control-allow-origin"], origin)
        origin = "https://page.example"
        with application(allow_origins=[origin]) as app:
            answer = self.post(app, Origin=origin, Host="a.example")
            self.assertEqual(answer.status, 200)
            self.assertEqual(answer.headers["access-control-allow-origin"], origin)
            self.assertEqual(answer.headers["vary"], "Origin")
            refused = self.post(app, Origin="https://page.example.evil")
            self.assertIn(refused.status, (403, 415))
            self.assertNotIn("access-control-allow-origin", refused.headers)
            self.assertEqual(refused.headers["vary"], "Origin")

    def test_refusals_can_be_read_by_allowed_pages(self) -> None:
        origin = "https://page.example"
        with application(allow_origins=[origin], max_file_size=1) as app:
            message = browser("a", b"xy")
            headers = {**message.headers, "Origin": origin}
            answer = send(app, *message._replace(headers=headers))
        self.assertEqual(answer.status, 413)
        self.assertEqual(answer.headers["access-control-allow-origin"], origin)

    def test_any_origin_never_with_credentials(self) -> None:
        with application(allow_origins="*") as app:
            for header in ("Authorization", "Cookie"):
                headers = {"Origin": "https://page.example", header: "x"}
                self.assertIn(self.post(app, **headers).status, (403, 415))
            self.assertEqual(finished_files(app), {})
            answer = self.post(app, Origin="https://page.example")
            self.assertEqual(answer.status, 200)
            self.assertEqual(answer.headers["access-control-allow-origin"], "*")
            self.assertNotIn("access-control-allow-credentials", answer.headers)

    def test_preflight_allows_what_clients_send(self) -> None:
        asked = {
            "Origin": "https://page.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "x-own, content-type",
        }
        with application(allow_origins="https://page.example") as app:
            answer = send(app, "OPTIONS", "/upload", headers=asked)
            self.assertEqual((answer.status, answer.body), (204, b""))
            for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
                self.assertIn(method, answer.headers["access-control-allow-methods"])
            allowed = answer.headers["access-control-allow-headers"].split(", ")
            self.assertEqual(set(allowed), {"content-type", "x-own"})
            asked["Access-Control-Request-Headers"] = "a\r\nb: c"
            again = send(app, "OPTIONS", "/upload", headers=asked)
            self.assertNotIn("access-control-allow-headers", again.headers)

    def test_unknown_hosts_are_refused(self) -> None:
        with application(allow_hosts=["files.example", "b.example:8000"]) as app:
            cases = {
                "files.example": 200,
                "FILES.example:8000": 200,
                "b.example": 200,
                "evil.example": 403,
                "": 403,
                "127.0.0.1": 403,
                "files.example.evil": 403,
            }
            for host, status in cases.items():
                with self.subTest(host):
                    answer = send(app, "GET", "/health", headers={"Host": host})
                    self.assertEqual(answer.status, status)

    def test_on_a_loopback_address_only_loopback_names_are_known(self) -> None:
        """DNS rebinding: a foreign name that suddenly means 127.0.0.1."""
        cases = {
            "localhost:8000": 200,
            "127.0.0.1": 200,
            "[::1]:8000": 200,
            "": 200,
            "a.localhost": 200,
            "127.1.2.3:1": 200,
            "evil.example": 403,
            "10.0.0.1": 403,
            "127.0.0.1.evil.example": 403,
            "[::2]": 403,
            "localhost.evil.example": 403,
        }
        with application() as app:
            for host, status in cases.items():
                with self.subTest(host):
                    request = Request(
                        "GET", "/health", headers={"host": host}, is_loopback=True
                    )
                    self.assertEqual(app.handle(request).status, status)

    def test_proxies_are_believed_only_when_they_are_trusted(self) -> None:
        forwarded = {
            "X-Forwarded-For": "6.6.6.6, 1.2.3.4, 10.0.0.2",
            "X-Forwarded-Proto": "https",
        }
        cases = {
            "10.0.0.1": ("1.2.3.4", "https"),
            "9.9.9.9": ("9.9.9.9", "http"),
            "::ffff:10.0.0.1": ("1.2.3.4", "https"),
            "": ("1.2.3.4", "https"),
            "nonsense": ("nonsense", "http"),
        }
        for client, expected in cases.items():
            with self.subTest(client):
                self.assertEqual(self.seen(forwarded, client), expected)

    def test_what_proxies_say_of_addresses_is_read_from_the_end(self) -> None:
        cases = {
            "1.2.3.4": "1.2.3.4",
            "1.2.3.4:5678": "1.2.3.4",
            "[::5]:80": "::5",
            "::5": "::5",
            "10.0.0.2": "10.0.0.2",
            "": "10.0.0.1",
            "unknown": "10.0.0.1",
            "5.5.5.5, unknown, 10.0.0.2": "10.0.0.2",
            "5.5.5.5 GET /x 200": "10.0.0.1",
        }
        for text, client in cases.items():
            with self.subTest(text):
                self.assertEqual(
                    self.seen({"X-Forwarded-For": text}, "10.0.0.1")[0], client
                )

    def test_proxy_that_is_not_trusted_is_told_once(self) -> None:
        headers = {"X-Forwarded-For": "1.2.3.4"}
        with application() as app, self.assertLogs("flowserver", "WARNING") as logs:
            for _ in range(3):
                send(app, "GET", "/health", headers=headers)
        self.assertEqual(len(logs.output), 1)
        self.assertIn("trusted_proxies", logs.output[0])

    def test_scheme_is_what_the_first_proxy_saw(self) -> None:
        for text, scheme in (
            ("https", "https"),
            ("https, http", "https"),
            ("ftp", "http"),
            ("HTTP", "http"),
        ):
            headers = {"X-Forwarded-Proto": text}
            self.assertEqual(self.seen(headers, "10.0.0.1")[1], scheme)

    def seen(self, headers: Mapping[str, str], client: str) -> Tuple[str, str]:
        """Return which client and scheme the application takes a request to have."""
        found = []

        def authorize(request: Request) -> None:
            found.append((request.client, request.scheme))

        with application(trusted_proxies="10.0.0.0/8", authorize=authorize) as app:
            send(app, "GET", "/health", headers=headers, client=client)
        return found[0]

    def test_origin_is_compared_with_what_the_proxy_saw(self) -> None:
        headers = {
            "X-Forwarded-For": "1.2.3.4",
            "X-Forwarded-Host": "files.example",
            "X-Forwarded-Proto": "https",
            "Host": "backend:8000",
        }
        with application(trusted_proxies="127.0.0.1") as app:
            message = browser("a", b"x")
            for origin, status in (
                ("https://files.example", {200}),
                ("http://files.example", {403, 415}),
                ("http://backend:8000", {403, 415}),
            ):
                given = {**message.headers, **headers, "Origin": origin}
                answer = send(app, *message._replace(headers=given))
                self.assertIn(answer.status, status)


class PageTest(unittest.TestCase):
    """The built-in page, the samples and /health."""

    def test_page_runs_nothing_that_its_policy_does_not_name(self) -> None:
        with application() as app:
            first, second = send(app, "GET", "/"), send(app, "GET", "/")
        policy, text = first.headers["content-security-policy"], first.body.decode()
        (nonce,) = set(re.findall("'nonce-([^']+)'", policy))
        self.assertTrue(policy.startswith("default-src 'none';"))
        self.assertNotIn("unsafe", policy)
        self.assertEqual(first.headers["content-type"], "text/html; charset=utf-8")
        self.assertNotIn(nonce, second.body.decode())
        for tag in re.findall("<(?:script|style)[^>]*>", text):
            self.assertIn(f'nonce="{nonce}"', tag)
        self.assertEqual(first.headers["x-content-type-options"], "nosniff")

    def test_page_needs_no_other_file_and_no_other_host(self) -> None:
        text = re.sub("http://www.w3.org/2000/svg", "", flowserver.PAGE)
        self.assertNotRegex(text, r"https?://|//[a-z]+\.[a-z]|@import|<script[^>]* src")
        self.assertNotRegex(text, r"(?i)<[^>]* on[a-z]+=|javascript:|<[^>]* style=")
        self.assertNotRegex(text, r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(")

    def test_settings_can_not_leave_their_script(self) -> None:
        settings = {"uploadPath": "up", "x": "</script><script>alert(1)</script>"}
        text = flowserver.page(settings, "N")
        self.assertNotIn("</script><script>alert", text)
        self.assertIn("\\u003c/script>", text)
        self.assertNotIn("__", re.sub("__proto__", "", text.split("<style")[0]))

    def test_page_is_told_where_and_how_to_send(self) -> None:
        with application(upload_path="/in", chunk_size="4M") as app:
            text = send(app, "GET", "/").body.decode()
        settings = json.loads(re.search(r'(?s)id="settings"[^>]*>(.*?)</', text)[1])
        self.assertEqual(
            (settings["uploadPath"], settings["chunkSize"]), ("in", 4 * MIB)
        )

    def test_health_tells_version_space_and_uploads(self) -> None:
        with application() as app:
            send(app, *browser("a", noise(25), 1, 10))
            health = send(app, "GET", "/health").json
        self.assertEqual(
            (health["ok"], health["version"], health["uploads"]),
            (True, flowserver.__version__, 1),
        )
        self.assertGreater(health["free"], 0)

    def test_samples_are_served_by_known_suffixes_only(self) -> None:
        with temporary_folder() as folder:
            for name in (
                "a.html",
                "b.js",
                "upload.py",
                ".hidden.html",
                "c.exe",
                "<b>.html",
            ):
                with contextlib.suppress(OSError):  # Windows refuses the last one
                    with open(os.path.join(folder, name), "w") as file:
                        file.write(name)
            os.mkdir(os.path.join(folder, "d.html"))
            with application(sample_dir=folder) as app:
                page = send(app, "GET", "/sample/a.html")
                self.assertEqual((page.status, page.body), (200, b"a.html"))
                self.assertEqual(page.headers["x-content-type-options"], "nosniff")
                script = send(app, "GET", "/sample/b.js")
                self.assertTrue(
                    script.headers["content-type"].startswith("text/javascript")
                )
                for path in (
                    "upload.py",
                    ".hidden.html",
                    "c.exe",
                    "missing.html",
                    "d.html",
                    "../a.html",
                    "x/../a.html",
                    "//a.html",
                    "node_modules/",
                    "./a.html",
                    "..\\a.html",
                    "a.html/",
                    "a.html\0.js",
                ):
                    with self.subTest(path):
                        self.assertEqual(
                            send(app, "GET", "/sample/" + path).status, 404
                        )
                listing = send(app, "GET", "/sample/")
                self.assertIn(b'"a.html"', listing.body)
                self.assertNotIn(b"<b>", listing.body)

    @unittest.skipUnless(os.name == "posix", "needs POSIX")
    def test_samples_follow_no_links(self) -> None:
        with temporary_folder() as folder, application(sample_dir=folder) as app:
            os.symlink(os.path.join(HOME, "README.md"), os.path.join(folder, "a.md"))
            self.assertEqual(send(app, "GET", "/sample/a.md").status, 404)

    def test_samples_can_be_turned_off_or_missing(self) -> None:
        with temporary_folder() as folder:
            for sample_dir in ("", os.path.join(folder, "samples")):
                os.makedirs(sample_dir or folder, exist_ok=True)
                with application(sample_dir=sample_dir) as app:
                    shutil.rmtree(sample_dir, ignore_errors=True)
                    self.assertEqual(send(app, "GET", "/sample/").status, 404)


class LogTest(unittest.TestCase):
    """One line for each request and each finished file, that nobody can forge."""

    def test_request_has_one_line_which_says_what_it_has_finished(self) -> None:
        with application() as app, self.assertLogs("flowserver", "INFO") as logs:
            send_file(app, "d/a.txt", noise(25), chunk_size=10)
        texts = [record.getMessage() for record in logs.records]
        request = r"^127\.0\.0\.1 POST /upload 200 [0-9]+ bytes [0-9.]+ s"
        self.assertRegex(texts[0], request + "$")
        finished = r'finished "d/a\.txt", 25 bytes in [0-9.]+ s, [0-9.]+ MiB/s$'
        self.assertRegex(texts[1], f"{request} {finished}")
        self.assertEqual(len(texts), 2)

    def test_seconds_of_a_file_count_from_its_first_chunk(self) -> None:
        with application() as app, self.assertLogs("flowserver", "INFO") as logs:
            send(app, *browser("a", noise(25), 1, 10))
            time.sleep(0.1)
            send(app, *browser("a", noise(25), 2, 10))
        seconds = re.search(r"25 bytes in ([0-9.]+) s", str(logs.output))[1]
        self.assertGreater(float(seconds), 0.09)

    def test_text_of_clients_is_escaped(self) -> None:
        with application() as app, self.assertLogs("flowserver", "INFO") as logs:
            send(app, *browser("a\u202eb", b"x"))
            send(app, "GET", "/x\r\n\x1b[31m\u202e")
            send(app, *browser("../\r\nforged", b"x"))
            send(app, "X\nY", "/upload")
        for record in logs.records:
            self.assertTrue(record.getMessage().isprintable(), record.getMessage())

    def test_logged_in_user_stands_beside_the_address(self) -> None:
        request = Request("GET", "/", client="10.0.0.1", user="ann")
        self.assertEqual(request.who, "10.0.0.1 ann")

    def test_text_of_an_exception_forges_no_line(self) -> None:
        formatter = flowserver._LineFormatter("%(message)s")
        try:
            raise ValueError("a\n2026-01-01 INFO forged")
        except ValueError:
            record = logging.LogRecord("", 0, "", 0, "failed", (), sys.exc_info())
        lines = formatter.format(record).splitlines()
        self.assertEqual([line for line in lines if line[:2].strip()], ["failed"])

    def test_identifiers_and_passwords_are_not_logged(self) -> None:
        with application() as app, self.assertLogs("flowserver", "DEBUG") as logs:
            for mode in ("test", "octet"):
                message = browser("a", b"x", mode=mode, Identifier="flowserver-5ecre7")
                send(app, *message._replace(headers={"Authorization": "Basic 5ecre7"}))
        self.assertNotIn("5ecre7", str(logs.output))


class WsgiTest(unittest.TestCase):
    """The application as WSGI, under the eyes of wsgiref.validate."""

    def call(self, app: UploadApp, message: Message, **changes: Any) -> Answer:
        path, _, query = message.path.partition("?")
        environ: Dict[str, Any] = {
            "REQUEST_METHOD": message.method,
            "SCRIPT_NAME": "",
            "PATH_INFO": path.encode().decode("latin-1"),
            "QUERY_STRING": query,
            "CONTENT_LENGTH": str(len(message.body)),
            "REMOTE_ADDR": "127.0.0.1",
            "wsgi.input": io.BytesIO(message.body),
        }
        for name, value in message.headers.items():
            key = name.upper().replace("-", "_")
            environ[key if key == "CONTENT_TYPE" else "HTTP_" + key] = value
        environ.update(changes)
        environ = {name: value for name, value in environ.items() if value is not None}
        wsgiref.util.setup_testing_defaults(environ)
        started: List[Any] = []

        def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
            started.append((int(status[:3]), {k.lower(): v for k, v in headers}))
            return lambda data: None

        result = wsgiref.validate.validator(app)(environ, start_response)
        with contextlib.closing(result):
            body = b"".join(result)
        return Answer(*started[0], body)

    def test_file_arrives_through_wsgi(self) -> None:
        with application() as app:
            for mode, name in (("multipart", "a"), ("octet", "b")):
                for number in (1, 2):
                    message = browser(name, noise(25), number, 10, mode)
                    self.assertEqual(self.call(app, message).status, 200)
            self.assertEqual(finished_files(app), {"a": noise(25), "b": noise(25)})

    def test_every_way_in_is_valid(self) -> None:
        def through(where: Any, *words: Any, **rest: Any) -> Answer:
            return self.call(where, Message(*words))

        with application() as app, mock.patch.dict(globals(), send=through):
            for name, way in WAYS.items():
                with self.subTest(name):
                    self.assertLess(way(app, name, noise(25)).status, 300)
            pond, tus = FilePondClient(app), TusClient(app)
            pond.begin(), tus.create()
            self.assertEqual((pond.offset(), tus.offset()), (0, 0))
            pond.patch(0, 10)
            self.assertEqual(
                (pond.delete().status, tus.ask("DELETE").status), (204, 204)
            )
            self.assertEqual(set(finished_files(app)), set(WAYS))

    def test_every_kind_of_answer_is_valid(self) -> None:
        with application() as app:
            for message, status in (
                (Message("GET", "/"), 200),
                (Message("HEAD", "/"), 200),
                (Message("GET", "/upload"), 204),
                (Message("HEAD", "/upload"), 204),
                (Message("GET", "/sample/none.js"), 404),
                (Message("PUT", "/health"), 405),
                (Message("OPTIONS", "/upload"), 204),
                (Message("POST", "/upload"), 400),
            ):
                with self.subTest(message.path, method=message.method):
                    answer = self.call(app, message)
                    self.assertEqual(answer.status, status)
                    self.assertEqual("content-length" in answer.headers, status != 204)
                    self.assertEqual(
                        answer.body == b"", message.method == "HEAD" or status == 204
                    )

    def test_it_may_be_mounted_anywhere(self) -> None:
        with application() as app:
            message = browser("a", b"x", path="/chunks")
            answer = self.call(app, message, SCRIPT_NAME="/files")
            self.assertEqual(answer.status, 200)
            place = {"SCRIPT_NAME": "/fil\xc3\xa4es", "PATH_INFO": ""}
            for slash, link in (("", "fil%C3%A4es/upload"), ("/", "upload")):
                asked = {**place, "PATH_INFO": slash}
                page = self.call(app, Message("GET", slash), **asked)
                self.assertIn(f'"uploadPath": "{link}"'.encode(), page.body)
            posted = self.call(app, browser("a", b"x", path=""), **place)
            self.assertEqual(posted.json["path"], "a")
            self.assertEqual(self.call(app, Message("GET", "/other")).status, 204)

    def test_chunks_go_to_any_address_and_are_cancelled_below_it(self) -> None:
        """A 404 to its test would be the end of flow.js's upload."""
        with application() as app:
            for mount, path in itertools.product(("", "/m"), ("/upload", "/x", "/x/y")):
                with self.subTest(mount, path=path):
                    where = {"SCRIPT_NAME": mount}
                    for method in ("GET", "DELETE"):
                        asked = browser("a", noise(25), 1, 10, "test", method, path)
                        self.assertEqual(self.call(app, asked, **where).status, 204)
                    chunk = chunk_of("Fine Uploader", "a", noise(25))
                    self.call(app, chunk._replace(path=path), **where)
                    gone = self.call(app, Message("DELETE", f"{path}/{UUID}"), **where)
                    self.assertEqual((gone.status, leftovers(app)), (204, {}))

    def test_whole_files_have_paths_below_the_mount(self) -> None:
        with application() as app:
            for path in ("/upload/d/a", "/d/b"):
                message = Message("PUT", path, b"x")
                answer = self.call(app, message, SCRIPT_NAME="/m")
                self.assertEqual(answer.status, 200)
            self.assertEqual(set(finished_files(app)), {"d/a", "d/b"})

    def test_upload_of_tus_lives_where_it_is_told_to(self) -> None:
        head = {"Tus-Resumable": "1.0.0", "Upload-Length": "9"}
        paths = (
            "/upload",
            "/upload/",
            "/x",
            "/x/y/",
            "",
            "/",
            "/\u65e5",
            "/a:b",
            "/a\r\nb",
        )
        with application() as app:
            for mount, path in itertools.product(("", "/m", "/fil\xc3\xa4es"), paths):
                with self.subTest(mount, path=path):
                    where = {"SCRIPT_NAME": mount}
                    made = self.call(app, Message("POST", path, b"", head), **where)
                    self.assertEqual(made.status, 201)
                    seen = urllib.parse.quote(mount, encoding="latin-1")
                    place = urllib.parse.urljoin(
                        f"http://h{seen}{urllib.parse.quote(path) or ''}",
                        made.headers["location"],
                    )
                    there = urllib.parse.unquote(place[8 + len(seen) :])
                    asked = self.call(app, Message("HEAD", there, b"", head), **where)
                    self.assertEqual(asked.headers["upload-offset"], "0")

    def test_paths_count_when_the_mount_is_all_there_is(self) -> None:
        with application(any_path=False) as app:
            for path, status in (("/other", 404), ("/upload", 204), ("/", 200)):
                self.assertEqual(self.call(app, Message("GET", path)).status, status)

    def test_refused_body_is_read_to_its_end_where_that_can_not_block(self) -> None:
        """A client that writes all before it reads would else see a reset."""
        chunk = browser("a", bytes(3 * MIB), 1, 3 * MIB)
        with application(max_file_size=1) as app:
            for message, is_buffered in itertools.product(
                (chunk, Message("PUT", "/health", b"x")), (False, True)
            ):
                body = io.BytesIO(message.body + b"next")
                more = {"waitress.client_disconnected": bool} if is_buffered else {}
                answer = self.call(app, message, **{"wsgi.input": body, **more})
                self.assertGreaterEqual(answer.status, 400)
                rest = body.read()
                self.assertEqual(rest == b"next", is_buffered, len(rest))

    def test_ends_of_requests_are_used_to_tidy(self) -> None:
        now = [0.0]
        for stale_after, left in (("1d", 0), (0, 1)):  # 0: nothing is ever stale
            now[0] = 0.0
            with application(clock=lambda: now[0], stale_after=stale_after) as app:
                send(app, *browser("a", noise(25), 1, 10))
                for name in os.listdir(app.store.state_dir):
                    os.utime(os.path.join(app.store.state_dir, name), (1, 1))
                for seconds, uploads in ((1, 1), (400, left)):
                    now[0] += seconds
                    self.call(app, Message("GET", "/health"))
                    self.assertEqual(app.store.open_uploads, uploads)

    def test_length_that_is_no_length_is_refused(self) -> None:
        for length in ("-1", "+1", "1_0", "\u0661", "x", "9" * 5000):
            with self.subTest(length[:9]), application() as app:
                with mock.patch.object(wsgiref.validate, "check_environ"):
                    answer = self.call(app, browser("a", b"x"), CONTENT_LENGTH=length)
                self.assertIn(answer.status, (411, 413, 415))
                self.assertEqual(leftovers(app), {})

    def test_form_that_was_read_already_is_told(self) -> None:
        with application() as app:
            message = browser("a", b"x")
            answer = self.call(app, message, **{"wsgi.input": io.BytesIO()})
        self.assertIn(answer.status, (400, 415))
        self.assertIn("read already", answer.json["error"])

    def test_body_of_unknown_length_is_not_an_empty_one(self) -> None:
        """gunicorn hands it on with Transfer-Encoding and without a length."""
        with application() as app:
            answer = self.call(
                app,
                browser("a", b"", mode="octet"),
                CONTENT_LENGTH=None,
                HTTP_TRANSFER_ENCODING="chunked",
                **{"wsgi.input": io.BytesIO(b"bytes")},
            )
            self.assertEqual(answer.status, 415)
            self.assertIn("how long", answer.json["error"])
            self.assertEqual(finished_files(app), {})

    def test_coding_that_nobody_decoded_is_refused(self) -> None:
        """Some servers hand on the frames of a chunked body as its bytes."""
        message, frames = Message("PUT", "/upload/a"), b"5\r\nbytes\r\n0\r\n\r\n"
        how = {"HTTP_TRANSFER_ENCODING": "chunked", "CONTENT_LENGTH": "5"}
        with application() as app:
            for body, more in (
                (frames, {}),
                (b"bytes", {"wsgi.input_terminated": True}),
            ):
                environ = {**how, **more, "wsgi.input": io.BytesIO(body)}
                answer = self.call(app, message, **environ)
                self.assertEqual(answer.status, 200 if more else 411)
            self.assertEqual(finished_files(app), {"a": b"bytes"})

    def test_view_of_a_framework_answers_whatever_the_path(self) -> None:
        with application(any_path=False) as app:
            for path in ("/", "/health", "/upload", "/a/b", "/sample/x"):
                for method, body, status in (("GET", b"", 204), ("POST", b"x", 400)):
                    environ = {
                        "REQUEST_METHOD": method,
                        "PATH_INFO": path,
                        "CONTENT_LENGTH": str(len(body)),
                        "wsgi.input": io.BytesIO(body),
                    }
                    wsgiref.util.setup_testing_defaults(environ)
                    self.assertEqual(app.answer(environ).status, status, path)

    def test_missing_length_is_an_empty_body(self) -> None:
        with application() as app:
            answer = self.call(
                app, browser("a", b"", mode="octet"), CONTENT_LENGTH=None
            )
            self.assertEqual(answer.status, 200)
            self.assertEqual(finished_files(app), {"a": b""})


# ---- HTTP server ---------------------------------------------------------------------

HEAD = "GET /health HTTP/1.1\nHost: localhost\n\n"
SMUGGLED = b"GET /health?smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"

# Heads that are refused, each with the status; RFC 9112, cpython#150499 and #150751.
BAD_HEADS: Dict[str, Tuple[str, int]] = {
    "two lengths": ("Content-Length: 0\nContent-Length: 51", 400),
    "two equal lengths": ("Content-Length: 51\nContent-Length: 51", 400),
    "list of lengths": ("Content-Length: 0, 51", 400),
    "sign": ("Content-Length: +5", 400),
    "minus": ("Content-Length: -1", 400),
    "underscore": ("Content-Length: 1_0", 400),
    "no digits": ("Content-Length: ", 400),
    "hexadecimal": ("Content-Length: 0x5", 400),
    "blank in the number": ("Content-Length: 1 0", 400),
    "digits of another script": ("Content-Length: \u00b2", 400),
    "long number": ("Content-Length: " + "1" * 30, 400),
    "chunked": ("Transfer-Encoding: chunked", 411),
    "any encoding": ("Transfer-Encoding: identity", 411),
    "hidden encoding": ("Transfer-Encoding: \x0bchunked", 400),
    "encoding and length": ("Transfer-Encoding: chunked\nContent-Length: 5", 411),
    "length and encoding": ("Content-Length: 5\nTransfer-Encoding: chunked", 411),
    "folded line": ("A: b\n c: d", 400),
    "folded length": ("Content-Length:\n 5", 400),
    "blank before the colon": ("Content-Length : 5", 400),
    "blank in a name": ("A B: c", 400),
    "no name": (": c", 400),
    "no colon": ("Content-Length", 400),
    "NUL": ("A: b\0c", 400),
    "bare CR": ("A: b\rContent-Length: 5", 400),
    "two hosts": ("Host: localhost", 400),
    "many headers": ("\n".join(f"A{n}: b" for n in range(101)), 431),
    "many equal headers": ("\n".join(["A: b"] * 101), 431),
}
BAD_LINES: Dict[str, Tuple[str, int]] = {
    "no version": ("GET /health", 400),
    "HTTP/0.9": ("GET /health HTTP/0.9", 400),
    "HTTP/2": ("PRI * HTTP/2.0", 400),
    "small letters": ("get /health HTTP/1.1", 400),
    "two blanks": ("GET  /health HTTP/1.1", 400),
    "blank at the end": ("GET /health HTTP/1.1 ", 400),
    "no path": ("GET health HTTP/1.1", 400),
    "CONNECT": ("CONNECT localhost:80 HTTP/1.1", 400),
    "star": ("GET * HTTP/1.1", 400),
    "ftp": ("GET ftp://localhost/ HTTP/1.1", 400),
    "not ASCII": ("GET /h\xe4 HTTP/1.1", 400),
    "long address": ("GET /" + "a" * 70000 + " HTTP/1.1", 431),
}


def head_of(message: Message, *lines: str) -> str:
    """Return the head of a message as text, with further header lines."""
    headers = [f"{name}: {value}" for name, value in message.headers.items()]
    first = f"{message.method} {message.path} HTTP/1.1"
    length = f"Content-Length: {len(message.body)}"
    return "\n".join([first, "Host: localhost", length, *headers, *lines]) + "\n\n"


class FramingTest(unittest.TestCase):
    """Where a request begins and ends; no byte of a body is ever a request."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.context = serving()
        cls.server = cls.context.__enter__()

    @classmethod
    def tearDownClass(cls) -> None:
        cls.context.__exit__(None, None, None)

    def check_refused(self, head: str, status: int) -> None:
        """The request is refused, and what follows it is not looked at."""
        with RawClient(self.server) as client:
            client.send(head.encode("latin-1").replace(b"\n", b"\r\n"), SMUGGLED)
            client.socket.shutdown(socket.SHUT_WR)
            answer = client.answer()
            assert answer is not None
            self.assertEqual(answer.status, status, answer)
            self.assertEqual(answer.headers["connection"], "close")
            self.assertIs(answer.json["success"], False)
            self.assertTrue(client.is_closed())

    def test_headers_that_could_be_read_in_two_ways_are_refused(self) -> None:
        for name, (lines, status) in BAD_HEADS.items():
            for method in ("GET", "POST"):
                with self.subTest(name, method=method):
                    first = f"{method} /upload HTTP/1.1\nHost: localhost\n"
                    self.check_refused(f"{first}{lines}\n\n", status)

    def test_first_lines_that_are_none_are_refused(self) -> None:
        for name, (line, status) in BAD_LINES.items():
            with self.subTest(name):
                self.check_refused(f"{line}\nHost: localhost\n\n", status)

    def test_host_is_needed_in_http_1_1(self) -> None:
        self.check_refused("GET /health HTTP/1.1\nA: b\n\n", 400)

    def test_line_feed_alone_ends_no_line(self) -> None:
        with RawClient(self.server) as client:
            client.send(b"GET / HTTP/1.1\nHost: localhost\nA: b\r\n\r\n", SMUGGLED)
            client.socket.shutdown(socket.SHUT_WR)
            answer = client.answer()
            self.assertEqual(answer and answer.status, 400)
            self.assertTrue(client.is_closed())

    def test_what_can_not_become_http_is_refused_at_once(self) -> None:
        for junk in (b"\x16\x03\x01\x02\x00\x01", b"\0", b" GET / HTTP/1.1", b"\n"):
            with self.subTest(junk), RawClient(self.server) as client:
                answer = client.send(junk).answer()
                self.assertEqual(answer and answer.status, 400)

    def test_endless_head_is_refused(self) -> None:
        with RawClient(self.server) as client:
            client.send("GET / HTTP/1.1\n", b"A: " + b"b" * 70000)
            client.socket.shutdown(socket.SHUT_WR)
            answer = client.answer()
            self.assertEqual(answer and answer.status, 431)

    def test_body_that_was_not_read_is_not_the_next_request(self) -> None:
        for message in (
            Message("POST", "/nowhere", SMUGGLED),
            Message("GET", "/", SMUGGLED),
            Message("GET", "/health", SMUGGLED),
            Message("DELETE", "/upload", SMUGGLED),
            Message("OPTIONS", "/upload", SMUGGLED),
            Message("POST", "/upload", SMUGGLED),
            browser("a", noise(25), sent=SMUGGLED, mode="octet", TotalSize="x"),
        ):
            with self.subTest(message.method, path=message.path[:9]):
                with RawClient(self.server) as client:
                    client.send(head_of(message), message.body)
                    client.socket.shutdown(socket.SHUT_WR)
                    answer = client.answer()
                    assert answer is not None
                    self.assertEqual(answer.headers["connection"], "close")
                    self.assertTrue(client.is_closed())

    def test_connection_serves_one_request_after_the_other(self) -> None:
        with RawClient(self.server) as client:
            for name in ("k1", "k2"):
                for mode in ("multipart", "octet", "test"):
                    message = browser(name, noise(5), 1, 10, mode)
                    answer = client.send(head_of(message), message.body).answer()
                    assert answer is not None
                    self.assertNotIn("connection", answer.headers)
                    self.assertEqual(answer.status, 204 if mode == "test" else 200)
        self.assertEqual(finished_files(self.server)["k2"], noise(5))

    def test_requests_may_come_before_the_answers(self) -> None:
        message = browser("pipe", noise(5))
        both = head_of(message).replace("\n", "\r\n").encode() + message.body
        with RawClient(self.server) as client:
            client.send(b"\r\n" + both + b"\r\n" + SMUGGLED + both)
            answers = [client.answer() for _ in range(3)]
        self.assertEqual([answer and answer.status for answer in answers], [200] * 3)
        self.assertEqual(
            ["path" in answer.json for answer in answers if answer], [True, False, True]
        )

    def test_a_head_may_come_byte_by_byte(self) -> None:
        with RawClient(self.server) as client:
            for byte in HEAD.replace("\n", "\r\n").encode():
                client.send(bytes([byte]))
            answer = client.answer()
            self.assertEqual(answer and answer.status, 200)

    def test_connection_ends_when_the_client_wants_it(self) -> None:
        for head in (
            HEAD.replace("1.1", "1.0"),
            HEAD[:-1] + "Connection: Close\n\n",
            "GET /health HTTP/1.0\n\n",
        ):
            with self.subTest(head), RawClient(self.server) as client:
                answer = client.send(head, SMUGGLED).answer()
                assert answer is not None
                self.assertEqual(
                    (answer.status, answer.headers["connection"]), (200, "close")
                )
                self.assertTrue(client.is_closed())

    def test_answers_end_where_they_say(self) -> None:
        with RawClient(self.server) as client:
            for method, path in (
                ("HEAD", "/"),
                ("GET", "/upload"),
                ("HEAD", "/upload"),
                ("HEAD", "/nowhere"),
                ("OPTIONS", "/upload"),
                ("GET", "/"),
            ):
                with self.subTest(method, path=path):
                    client.send(f"{method} {path} HTTP/1.1\nHost: localhost\n\n")
                    answer = client.answer(method)
                    assert answer is not None
                    self.assertEqual(
                        "content-length" in answer.headers, answer.status != 204
                    )

    def test_address_may_be_absolute_or_escaped(self) -> None:
        for target, status in (
            ("http://localhost/health", 200),
            ("HTTP://a?b", 400),
            ("http://localhost", 200),
            ("/%68ealth", 200),
            ("/health?x", 200),
            ("/%2e%2e/health", 404),
            ("/health%3fx", 404),
            ("//health", 404),
        ):
            with self.subTest(target), RawClient(self.server) as client:
                client.send(f"GET {target} HTTP/1.1\nHost: localhost\n\n")
                client.socket.shutdown(socket.SHUT_WR)
                answer = client.answer()
                self.assertEqual(answer and answer.status, status)
        with RawClient(self.server) as client:
            answer = client.send("OPTIONS * HTTP/1.1\nHost: localhost\n\n").answer()
            self.assertEqual(answer and answer.status, 204)

    def test_size_of_a_head_is_bounded(self) -> None:
        for count, status in ((60, None), (70, 431)):
            head = "GET / HTTP/1.1\r\nHost: x\r\n"
            head += f"A: {'b' * 1000}\r\n" * count + "\r\n"
            with self.subTest(count):
                try:
                    flowserver.parse_head(head.encode())
                    found = None
                except flowserver.Malformed as error:
                    found = error.status
                self.assertEqual(found, status)

    def test_hostile_heads_are_judged_in_linear_time(self) -> None:
        """CVE-2024-24762 in a head: a quadratic search takes minutes here."""
        for junk in (" " * 60000, "\t" * 60000, "a" * 60000, "a:" * 30000):
            with self.assertRaises(flowserver.Malformed):
                for _ in range(200):
                    flowserver.parse_head(
                        f"GET / HTTP/1.1\r\nHost: x\r\nA:{junk}\0\r\n\r\n".encode()
                    )


class ContinueTest(unittest.TestCase):
    """Expect: 100-continue is answered after the decision, not before."""

    def setUp(self) -> None:
        context = serving(max_file_size=100)
        self.server = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)

    def test_good_request_is_told_to_go_on(self) -> None:
        message = browser("a", noise(25))
        with RawClient(self.server) as client:
            client.send(head_of(message, "Expect: 100-continue"))
            answer = client.answer()
            self.assertEqual(answer and answer.status, 100)
            answer = client.send(message.body).answer()
            self.assertEqual(answer and answer.json["status"], "complete")

    def test_refused_request_is_told_so_at_once(self) -> None:
        message = browser("a", noise(101), mode="octet")
        with RawClient(self.server) as client:
            answer = client.send(head_of(message, "Expect: 100-continue")).answer()
            self.assertEqual(answer and answer.status, 413)

    def test_client_of_http_1_0_is_not_told(self) -> None:
        message = browser("a", noise(25))
        head = head_of(message, "Expect: 100-continue").replace("HTTP/1.1", "HTTP/1.0")
        with RawClient(self.server) as client:
            answer = client.send(head, message.body).answer()
            self.assertEqual(answer and answer.status, 200)


class RefusalIsSeenTest(unittest.TestCase):
    """A client that sends all before it reads sees the refusal, not a reset."""

    def check_seen(self, status: int, message: Message, **settings: Any) -> None:
        with serving(**settings) as server:
            for _ in range(3):
                with RawClient(server) as client:
                    client.send(head_of(message), message.body)
                    answer = client.answer()
                    self.assertEqual(answer and answer.status, status)
            self.assertEqual((finished_files(server), leftovers(server)), ({}, {}))

    def test_too_large_chunk_of_20_mb(self) -> None:
        body = bytes(20 * MIB)
        message = browser("a", body, mode="octet", chunk_size=len(body))
        self.check_seen(413, message, max_chunk_size=16 * MIB)

    def test_too_large_file_of_20_mb_in_one_form(self) -> None:
        body = bytes(20 * MIB)
        message = browser("a", body, chunk_size=len(body))
        self.check_seen(413, message, max_file_size=MIB)

    def test_20_mb_for_nobody(self) -> None:
        message = Message("POST", "/nowhere", bytes(20 * MIB))
        self.check_seen(404, message)

    def test_20_mb_after_a_head_that_is_refused(self) -> None:
        message = Message(
            "POST", "/upload", bytes(20 * MIB), {"Transfer-Encoding": "x"}
        )
        self.check_seen(411, message)


class PatienceTest(unittest.TestCase):
    """Every wait has an end, and many waits cost nobody else."""

    def test_slow_heads_and_idle_connections_are_cut(self) -> None:
        with serving(timeout=2) as server, contextlib.ExitStack() as clients:
            idle = clients.enter_context(RawClient(server))
            answer = idle.send(HEAD).answer()
            self.assertEqual(answer and answer.status, 200)
            silent = clients.enter_context(RawClient(server))
            half = clients.enter_context(RawClient(server)).send("GET / HTTP/1.1\nA: b")
            slow = clients.enter_context(RawClient(server))
            slow.socket.settimeout(0.1)
            with self.assertRaises(OSError):  # a byte now and then buys no time
                for _ in range(10 * PATIENCE):
                    slow.send(b"G")
                    with contextlib.suppress(socket.timeout):
                        if not slow.socket.recv(1):
                            raise ConnectionResetError
            for client in (silent, half, idle):
                self.assertTrue(client.is_closed())

    def test_slow_body_is_refused_and_leaves_nothing(self) -> None:
        message = browser("a", noise(5000), 1, 5000)
        with serving(timeout=2) as server, contextlib.ExitStack() as clients:
            stalled = clients.enter_context(RawClient(server))
            stalled.send(head_of(message), message.body[:3000])
            slow = clients.enter_context(RawClient(server))
            slow.send(head_of(message._replace(path="/upload?x")))
            for place in range(len(message.body)):
                slow.send(message.body[place : place + 1])
                slow.socket.settimeout(0.1)
                with contextlib.suppress(socket.timeout):
                    if slow.socket.recv(1, socket.MSG_PEEK):
                        break
            for client in (stalled, slow):
                client.socket.settimeout(PATIENCE)
                answer = client.answer()
                assert answer is not None
                self.assertEqual(answer.status, 408)
                self.assertIn("too slowly", answer.json["error"])
            self.assertEqual((finished_files(server), leftovers(server)), ({}, {}))

    def test_body_may_take_longer_than_any_of_its_waits(self) -> None:
        message = browser("a", bytes(100 * KIB))
        piece = len(message.body) // 11
        with serving(timeout=3) as server, RawClient(server) as client:
            client.send(head_of(message))
            began = time.monotonic()
            for place in range(0, len(message.body), piece):
                client.send(message.body[place : place + piece])
                time.sleep(0.3)
            self.assertGreater(time.monotonic() - began, 3)
            answer = client.answer()
            self.assertEqual(answer and answer.status, 200)

    def test_refused_body_that_dribbles_is_not_waited_for(self) -> None:
        limits = {"_LINGER_SECONDS": 0.5, "_MIN_DRAIN_RATE": 1 << 40}
        with mock.patch.multiple(flowserver, **limits), serving() as server:
            with RawClient(server) as client:
                client.send(head_of(Message("PUT", "/nowhere", bytes(10 * MIB))))
                answer = client.answer()
                self.assertEqual(answer and answer.status, 404)
                with self.assertRaises(OSError):
                    for _ in range(100 * PATIENCE):
                        client.send(b".")
                        time.sleep(0.01)

    def test_server_that_can_accept_no_more_makes_room(self) -> None:
        accept, failures = (
            FlowServer.get_request,
            [OSError(errno.EMFILE, "Too many")] * 2,
        )

        def fail_twice(listener: Any) -> Any:
            if failures:
                raise failures.pop()
            return accept_really(listener)

        accept_really = http.server.ThreadingHTTPServer.get_request
        self.assertIsNot(accept, accept_really)
        with serving() as server, RawClient(server) as idle:
            answer = idle.send(HEAD).answer()
            self.assertEqual(answer and answer.status, 200)
            until(lambda: server._waiting)
            with mock.patch.object(
                http.server.ThreadingHTTPServer, "get_request", fail_twice
            ):
                self.assertEqual(send(server, "GET", "/health").status, 200)
            self.assertTrue(idle.is_closed())

    def test_client_that_goes_away_leaves_nothing(self) -> None:
        message = browser("a", noise(5000), 1, 2000)
        with serving() as server:
            for size, reset in ((0, 0), (500, 0), (1500, 0), (500, 1), (1500, 1)):
                with RawClient(server) as client:
                    client.send(head_of(message), message.body[:size])
                    linger = struct.pack("ii", reset, 0)
                    client.socket.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, linger
                    )
            send(server, "GET", "/health")  # those before it were accepted, too
            until(lambda: not server._connections)
            self.assertEqual(
                (server.app.store.open_uploads, leftovers(server)), (0, {})
            )
            self.assertEqual(send(server, *message).status, 200)

    def test_idlest_connection_gives_way(self) -> None:
        with serving(max_connections=2) as server, RawClient(server) as first:
            self.serve_once(server, first)
            with RawClient(server) as second:
                self.serve_once(server, second)
                self.serve_once(server, first)
                self.assertEqual(send(server, "GET", "/health").status, 200)
                self.assertTrue(second.is_closed())
                self.serve_once(server, first)

    def serve_once(self, server: FlowServer, client: RawClient) -> None:
        """Get one answer, and see the connection waiting for its next request."""
        answer = client.send(HEAD).answer()
        self.assertEqual(answer and answer.status, 200)
        until(lambda: self.last_waiting(server) == client.socket.getsockname())

    def last_waiting(self, server: FlowServer) -> Any:
        with server._lock, contextlib.suppress(OSError):
            waiting = list(server._waiting.values())
            return waiting[-1].getpeername() if waiting else None
        return None

    def test_running_requests_do_not_give_way(self) -> None:
        message = browser("a", noise(500))
        with serving(max_connections=1) as server, RawClient(server) as client:
            client.send(head_of(message, "Expect: 100-continue"))
            answer = client.answer()
            self.assertEqual(answer and answer.status, 100)
            refused = send(server, "GET", "/health")
            self.assertEqual(refused.status, 503)
            self.assertIn("too many connections", refused.json["error"])
            answer = client.send(message.body).answer()
            self.assertEqual(answer and answer.status, 200)

    def test_zero_means_no_limit(self) -> None:
        with serving(max_connections=0, timeout=0, max_uploads=0) as server:
            with RawClient(server) as client:
                for _ in range(2):
                    answer = client.send(HEAD).answer()
                    self.assertEqual(answer and answer.status, 200)
            answers = send_file(server, "a", noise(25), chunk_size=10)
            self.assertEqual([answer.status for answer in answers], [200, 200])

    def test_threads_and_connections_end_with_their_clients(self) -> None:
        with serving() as server:
            has_list = os.path.isdir("/proc/self/fd")
            before = threading.active_count()
            opened = len(os.listdir("/proc/self/fd")) if has_list else 0
            for _ in range(30):
                with RawClient(server) as client:
                    client.send("GET /heal")
                send(server, "GET", "/health")  # the one before it was accepted, too
            until(lambda: not server._connections)
            until(lambda: threading.active_count() <= before)
            if has_list:
                until(lambda: len(os.listdir("/proc/self/fd")) < opened + 15)


class StopTest(unittest.TestCase):
    """The end: no new requests, those running are finished, idle ones are closed."""

    def test_running_request_is_finished(self) -> None:
        message = browser("a", noise(25))
        with serving() as server, RawClient(server) as idle, RawClient(
            server
        ) as client:
            answer = idle.send(HEAD).answer()
            client.send(head_of(message, "Expect: 100-continue"))
            answer = client.answer()
            self.assertEqual(answer and answer.status, 100)
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            self.assertTrue(idle.is_closed())
            answer = client.send(message.body).answer()
            assert answer is not None
            self.assertEqual(answer.json["status"], "complete")
            self.assertEqual(answer.headers["connection"], "close")
            stopping.join(PATIENCE)
            self.assertFalse(stopping.is_alive())
            with self.assertRaises(OSError):
                RawClient(server)
            self.assertEqual(finished_files(server), {"a": noise(25)})

    def test_client_that_does_not_end_is_not_waited_for(self) -> None:
        message = browser("a", noise(25))
        with mock.patch.object(flowserver, "_GRACE_SECONDS", 0.1), serving() as server:
            with RawClient(server) as client:
                client.send(head_of(message, "Expect: 100-continue"))
                answer = client.answer()
                self.assertEqual(answer and answer.status, 100)
                server.stop()
            self.assertEqual(finished_files(server), {})

    def test_accepted_connection_keeps_its_place_in_the_queue(self) -> None:
        """Whichever thread begins first: the one that came first gives way first."""
        with application(port=0) as app, closing_server(app) as server:
            first, second = socket.socketpair()
            server._waiting = {first: first, second: second}
            with server.idle(second, second), server.idle(first, first):
                self.assertEqual(list(server._waiting), [first, second])
            first.close()
            second.close()

    def test_system_of_32_bits_limits_waits_without_the_kernel(self) -> None:
        """Its SO_RCVTIMEO may want 16 bytes (musl, time64): EINVAL for 8."""
        one, other = socket.socketpair()
        with one, other, mock.patch.object(sys, "maxsize", 2**31 - 1):
            self.assertFalse(flowserver._limit_by_kernel(one, 1.0))

    def test_large_buffers_are_few_and_have_an_end(self) -> None:
        with application(port=0) as app, closing_server(app) as server:
            taken = [server.take_buffer() for _ in range(50)]
            self.assertEqual(max(map(len, taken)), 1024 * KIB)
            self.assertLessEqual(sum(map(len, taken[:32])), 32 * 1024 * KIB)
            self.assertEqual(len(taken[32]), 256 * KIB)

    def test_client_that_sends_next_to_nothing_holds_next_to_nothing(self) -> None:
        """A thousand of them held 256 MiB."""
        with serving() as server, contextlib.ExitStack() as stack:
            message = browser("a", bytes(MIB), mode="octet")
            clients = [stack.enter_context(RawClient(server)) for _ in range(20)]
            for client in clients:
                client.send(head_of(message), b"x")
            until(lambda: under_way(server) == 20)
            self.assertEqual(server._large_buffers, 0)

    def test_slowest_body_gives_way_when_all_connections_are_taken(self) -> None:
        """A thousand clients of one byte each shut all others out for a minute."""
        message = browser("a", bytes(MIB), mode="octet")
        with serving(max_connections=2) as server, contextlib.ExitStack() as stack:
            clients = [stack.enter_context(RawClient(server)) for _ in range(2)]
            head = head_of(message).replace("\n", "\r\n").encode()
            for client, size in zip(clients, (40 * KIB, 1)):
                client.send(head + message.body[:size])
            until(lambda: under_way(server) == 2)
            wires = server._connections.values()
            until(lambda: min(w.remaining for w in wires) <= MIB - 16 * KIB)
            until(lambda: max(w.remaining for w in wires) == MIB - 1)
            with mock.patch.object(flowserver, "_LINGER_SECONDS", 0):
                until(lambda: min(w.rate() for w in wires) < 9)
                with mock.patch.object(flowserver, "_MIN_DRAIN_RATE", 10):
                    self.assertEqual(send(server, "GET", "/health").status, 200)
            self.assertTrue(clients[1].is_closed())
            last = clients[0].send(message.body[40 * KIB :]).answer()
            self.assertEqual(last and last.status, 200)

    def test_answer_has_an_end(self) -> None:
        """A reader that took 60 bytes a second held a thread for good."""
        rate = mock.patch.object(flowserver, "_MIN_BODY_RATE", 1e9)
        page = mock.patch.object(flowserver, "page", return_value="x" * (32 * MIB))
        with rate, page, serving(timeout="1s") as server:
            with RawClient(server) as client:
                client.send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                client.socket.recv(1)
                until(lambda: self.dribbles(client, server))

    def dribbles(self, client: RawClient, server: FlowServer) -> bool:
        client.socket.recv(64 * KIB)
        return not server._connections

    def test_server_that_was_never_started_can_be_stopped(self) -> None:
        with application(port=0) as app:
            FlowServer(app).stop()


def under_way(server: FlowServer) -> int:
    """Return how many bodies a server is taking in."""
    return len(server.app.store._uploads.expected._bodies)


class RaceOfAttemptsTest(unittest.TestCase):
    """Two attempts at one range over real connections."""

    def test_first_attempt_stalls_and_the_second_completes_the_file(self) -> None:
        """The second does not wait for the first, and is not mixed with it."""
        for mode, number in itertools.product(("multipart", "octet"), (1, 2)):
            with self.subTest(mode, number=number), serving() as server:
                send(server, *browser("a", noise(2000, 2), 3 - number, 1000))
                stalled = browser("a", noise(2000, 1), number, 1000, mode)
                with RawClient(server) as client:
                    self.send_half(client, stalled)
                    second = browser("a", noise(2000, 2), number, 1000, mode)
                    answer = send(server, *second)
                    self.assertEqual(answer.json["status"], "complete")
                    late = client.send(stalled.body[-500:]).answer()
                    self.assertEqual(late and late.status, 503)
                self.assertEqual(finished_files(server), {"a": noise(2000, 2)})
                self.assertEqual(leftovers(server), {})

    def send_half(self, client: RawClient, message: Message) -> None:
        """Send a body but for its last 500 bytes, and see the store take it."""
        written = []

        def write(body: Any, block: Any) -> None:
            original(body, block)
            written.append(len(block))

        original = flowserver.Body.write
        with mock.patch.object(flowserver.Body, "write", write):
            with mock.patch.multiple(flowserver, _FIRST_SIZE=100, BLOCK_SIZE=100):
                client.send(head_of(message), message.body[:-500])
                until(lambda: sum(written) > 0)

    def test_form_is_under_way_from_its_first_bytes(self) -> None:
        """Its difference is still to come: the end of the file must wait for it."""
        mine, theirs = noise(2000, 1), noise(2000, 2)
        theirs = mine[:999] + theirs[999:]
        with serving() as server:
            send(server, *browser("a", mine, 1, 1000))
            slow = browser("a", theirs, 1, 1000)
            with RawClient(server) as client, RawClient(server) as last:
                client.send(head_of(slow), slow.body[:-500])
                until(lambda: under_way(server))
                message = browser("a", theirs, 2, 1000)
                last.send(head_of(message), message.body)
                until(lambda: under_way(server) == 1 and self.is_complete(server))
                for one in (client.send(slow.body[-500:]), last):
                    answer = one.answer()
                    self.assertEqual(answer and answer.status, 415)
            self.assertEqual(finished_files(server), {})

    def is_complete(self, server: FlowServer) -> bool:
        folder = server.app.store.state_dir
        names = [name for name in os.listdir(folder) if name.endswith(".ledger")]
        text = "".join(source_of(os.path.join(folder, name)) for name in names)
        return text.count('"range"') == 2

    def test_form_under_way_is_cancelled_with_its_upload(self) -> None:
        data = noise(2000)
        with serving() as server, RawClient(server) as client:
            first = browser("a", data, 1, 1000)
            send(server, *first)
            message = browser("a", data, 2, 1000)
            client.send(head_of(message), message.body[:-500])
            until(lambda: under_way(server))
            query = browser("a", data, 1, 1000, "octet").path.partition("?")[2]
            self.assertEqual(send(server, "DELETE", "/upload?" + query).status, 204)
            late = client.send(message.body[-500:]).answer()
            self.assertEqual(late and late.status, 415)
            self.assertEqual(leftovers(server), {})

    def test_many_connections_with_repeated_chunks_make_one_file(self) -> None:
        data, done = noise(20 * 500, 3), []
        with serving(on_complete=done.append) as server:
            chance = random.Random(5)
            numbers = list(range(1, 21)) * 3
            chance.shuffle(numbers)

            def work() -> None:
                with contextlib.suppress(IndexError):  # nothing is left
                    while True:
                        answer = send(server, *browser("a", data, numbers.pop(), 500))
                        statuses.append(answer.status)

            statuses: List[int] = []
            threads = [threading.Thread(target=work) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(statuses, [200] * 60)
            self.assertEqual(finished_files(server), {"a": data})
            self.assertEqual((len(done), leftovers(server)), (1, {}))


class ServerTest(unittest.TestCase):
    """Addresses, TLS, and the handler in a server of one's own."""

    def test_loopback_is_known_by_the_bound_address(self) -> None:
        hosts = ["127.0.0.1", "localhost", "0.0.0.0"]
        hosts += ["127.1"] if os.name == "posix" else []
        for host in hosts:
            with self.subTest(host), serving(host=host) as server:
                self.assertIs(server.is_loopback, host != "0.0.0.0")
                foreign = {"Host": "evil.example"}
                status = send(server, "GET", "/health", headers=foreign).status
                self.assertEqual(status, 403 if server.is_loopback else 200)

    def test_url_is_one_that_a_browser_here_can_open(self) -> None:
        with serving(host="0.0.0.0") as server:
            self.assertEqual(server.url, f"http://127.0.0.1:{server.server_port}")

    @unittest.skipUnless(socket.has_ipv6, "needs IPv6")
    def test_ipv6_is_served(self) -> None:
        try:
            context = serving(host="::1")
            server = context.__enter__()
        except OSError:
            self.skipTest("this machine has no IPv6")
        with contextlib.closing(socket.socket()):
            self.assertEqual(server.url, f"http://[::1]:{server.server_port}")
            self.assertEqual(send(server, "GET", "/health").status, 200)
        context.__exit__(None, None, None)

    @unittest.skipUnless(hasattr(socket, "TCP_INFO"), "this system does not tell")
    def test_client_that_has_gone_is_seen_although_bytes_of_it_wait(self) -> None:
        seen: List[bool] = []
        is_sent = threading.Event()

        def look(request: Request) -> str:
            is_sent.wait(PATIENCE)
            seen.append(request.has_gone())
            client.socket.shutdown(socket.SHUT_WR)
            until(request.has_gone, "the end")
            return "No."

        with serving(authorize=look) as server, RawClient(server) as client:
            message = browser("a", b"x")
            client.send(head_of(message), message.body)
            is_sent.set()
            answer = client.answer()
            self.assertEqual(answer and answer.status, 415)
        self.assertEqual(seen, [False])

    def test_bug_in_a_connection_is_logged_and_the_server_goes_on(self) -> None:
        # the server is stopped first: a client sees the end before the log has it
        with self.assertLogs("flowserver", "ERROR") as logs, serving() as server:
            with mock.patch.object(server.app, "handle", side_effect=ZeroDivisionError):
                with RawClient(server) as client:
                    self.assertIsNone(client.send(HEAD).answer())
            self.assertEqual(send(server, "GET", "/health").status, 200)
        self.assertIn("ZeroDivisionError", logs.output[0])

    def test_handler_of_ones_own_can_take_uploads(self) -> None:
        class Handler(flowserver.FlowHandlerMixin, http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.handle_upload()

            do_GET = do_POST

            def log_message(self, *arguments: Any) -> None:
                pass

        with application() as app:
            Handler.uploads = app
            with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
                thread = threading.Thread(target=server.serve_forever, args=(0.01,))
                thread.start()
                try:
                    self.check_own_server(server, app)
                finally:
                    server.shutdown()
                    thread.join()

    @unittest.skipUnless(hasattr(socketserver, "UnixStreamServer"), "no Unix sockets")
    def test_handler_of_ones_own_on_a_unix_socket(self) -> None:
        """Where a client has no address."""

        class Handler(flowserver.FlowHandlerMixin, http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.handle_upload()

            def log_message(self, *arguments: Any) -> None:
                pass

        with application() as app, temporary_folder() as folder:
            Handler.uploads = app
            place = os.path.join(folder, "socket")
            with socketserver.UnixStreamServer(place, Handler) as server:
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(place)
                    client.sendall(b"GET /upload HTTP/1.0\r\n\r\n")
                    server.handle_request()
                    self.assertIn(b" 204 ", client.recv(1000))

    def check_own_server(self, server: Any, app: UploadApp) -> None:
        for number in (1, 2):
            message = browser("a", noise(25), number, 10, path="/any/where")
            self.assertEqual(send(server, *message).status, 200)
        self.assertEqual(finished_files(app), {"a": noise(25)})
        test = browser("b", noise(25), mode="test", path="/any/where")
        self.assertEqual(send(server, *test).status, 204)
        bad = {"Transfer-Encoding": "chunked", "Content-Length": "5"}
        refused = send(server, "POST", "/x", b"12345", bad)
        self.assertIn(refused.status, range(400, 500))
        self.assertEqual(refused.headers["connection"], "close")


# A certificate for localhost and its key: made for this file, known to everybody.
CERTIFICATE = """
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIURDVvevb47eBe0543l1IaybzPdVkwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMDExMTc1NFoYDzIxMjYxMDI3
MTExNzU0WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAR7hu5MTJHYSVqCQkU7xlNNuhKCI0O+xXVdqcq0fkMqC9zTR//hXxfH
8wAF1si9EwqKpHbrkzZXbmNLZmNHa2tTo28wbTAdBgNVHQ4EFgQUapTR8XFFy+zD
vWaiRjhM2p6gwcswHwYDVR0jBBgwFoAUapTR8XFFy+zDvWaiRjhM2p6gwcswDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSAAwRQIhAJ6nwdCqOiSPNfedRLCRG4PAEAQfYQVnFN+VJD2BUUToAiBA
wsByFXmlkU32oOEpqNbY9BeVWvB6EfLiBH/fih3xhQ==
-----END CERTIFICATE-----
"""
PRIVATE_KEY = """
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg3W+MkLeMp9wojZnj
hUG+lPQ5y0dUl2VSimEY4VNLB36hRANCAAR7hu5MTJHYSVqCQkU7xlNNuhKCI0O+
xXVdqcq0fkMqC9zTR//hXxfH8wAF1si9EwqKpHbrkzZXbmNLZmNHa2tT
-----END PRIVATE KEY-----
"""


@unittest.skipUnless(ssl, "this Python has no ssl")
class TlsTest(unittest.TestCase):
    """TLS, when certificate and private_key are set."""

    def setUp(self) -> None:
        context = temporary_folder()
        self.folder = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        self.certificate, self.private_key = (
            self.write(n, t) for n, t in (("c", CERTIFICATE), ("k", PRIVATE_KEY))
        )

    def write(self, name: str, text: str) -> str:
        path = os.path.join(self.folder, name)
        with open(path, "w") as file:
            file.write(text)
        return path

    def client(self, server: FlowServer) -> http.client.HTTPSConnection:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        host, port = server.server_address[:2]
        return http.client.HTTPSConnection(
            str(host), port, timeout=PATIENCE, context=context
        )

    def test_file_arrives_through_tls(self) -> None:
        message = browser("a", noise(300 * KIB), chunk_size=MIB)
        origin = {}
        with serving(
            certificate=self.certificate, private_key=self.private_key
        ) as server:
            self.assertTrue(server.url.startswith("https://127.0.0.1:"))
            origin["Origin"] = server.url
            with contextlib.closing(self.client(server)) as client:
                for _ in range(2):
                    headers = {**message.headers, **origin}
                    client.request("POST", "/upload", message.body, headers)
                    response = client.getresponse()
                    self.assertEqual(
                        (response.status, len(response.read()) > 0), (200, True)
                    )
            self.assertEqual(finished_files(server), {"a": noise(300 * KIB)})

    def test_body_of_a_connection_that_is_shut_stays_decrypted(self) -> None:
        """stop() may shut a connection whose thread has just received a head."""
        read_head = flowserver._Wire.read_head
        message = browser("a", noise(999), mode="octet")
        was_sent = threading.Event()

        def read_and_shut(wire: Any) -> bytes:
            head = read_head(wire)
            was_sent.wait(PATIENCE)
            flowserver._shut(wire.connection)
            return head

        with mock.patch.object(flowserver._Wire, "read_head", read_and_shut):
            with serving(
                certificate=self.certificate, private_key=self.private_key
            ) as server:
                with contextlib.closing(self.client(server)) as client:
                    client.request(*message)
                    was_sent.set()
                    with self.assertRaises(OSError):
                        client.getresponse()
                until(lambda: not server._connections)
                self.assertLessEqual(set(finished_files(server).values()), {noise(999)})

    def test_clients_that_speak_no_tls_disturb_nobody(self) -> None:
        with serving(
            certificate=self.certificate,
            private_key=self.private_key,
            max_connections=2,
        ) as server:
            with RawClient(server) as silent, RawClient(server) as wrong:
                wrong.send(HEAD)
                self.assertTrue(wrong.answer() is None or wrong.is_closed())
                with RawClient(server), contextlib.closing(
                    self.client(server)
                ) as client:
                    client.request("GET", "/health")
                    self.assertEqual(client.getresponse().read()[:6], b'{"ok":')
                self.assertTrue(silent.is_closed())

    def test_handshake_that_fails_leaves_no_socket_open(self) -> None:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", ResourceWarning)
            with serving(
                certificate=self.certificate, private_key=self.private_key
            ) as server:
                with RawClient(server) as wrong:
                    wrong.send(HEAD)
                    self.assertTrue(wrong.answer() is None or wrong.is_closed())
                until(lambda: not server._connections)
            gc.collect()
        unclosed = [str(warning.message) for warning in seen]
        self.assertEqual([text for text in unclosed if "SSLSocket" in text], [])

    def test_certificate_that_is_none_is_a_wrong_setting(self) -> None:
        for paths in (
            (self.certificate, self.folder + "/missing"),
            (self.private_key,) * 2,
        ):
            with application(certificate=paths[0], private_key=paths[1], port=0) as app:
                with self.assertRaisesRegex(
                    flowserver.SettingsError, "TLS can't be set up"
                ):
                    FlowServer(app)


# ---- command line --------------------------------------------------------------------


class Running:
    """flowserver.py in a process of its own, as users start it."""

    def __init__(
        self,
        *arguments: str,
        flags: Sequence[str] = (),
        file: str = FILE,
        patience: float = PATIENCE,
        **how: Any,
    ) -> None:
        self.log = tempfile.TemporaryFile()
        command = [sys.executable, *(flags or ("-I", "-W", "error")), file, *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, encoding="utf-8", **how
        )
        self.watchdog = threading.Timer(patience, self.process.kill)
        self.watchdog.start()
        self.lines: List[str] = []
        match = None
        while not match:
            self.lines.append(self.out.readline())
            if not self.lines[-1]:
                self.end()
                raise AssertionError(f"no address; {self.lines} {self.errors}")
            match = re.search(r"http://([0-9.]+):([0-9]+)/", self.lines[0])
        self.server_address = (match[1], int(match[2]))
        self.lines.append(self.out.readline())

    @property
    def out(self) -> Any:
        return self.process.stdout

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.end()

    def stop(self, number: int) -> int:
        """End the process by a signal; return its exit status."""
        self.process.send_signal(number)
        self.end()
        return self.process.returncode

    def end(self) -> None:
        """Wait for the process, and read what it had to say."""
        if self.watchdog.is_alive():
            self.process.wait()
            self.watchdog.cancel()
            self.watchdog.join()
            self.lines += self.out.readlines()
            self.out.close()
            self.log.seek(0)
            self.errors = self.log.read().decode("utf-8", "replace")
            self.log.close()


@contextlib.contextmanager
def undone_log() -> Iterator[None]:
    """Take back what main() does to the log of this process."""
    log = logging.getLogger("flowserver")
    kept = (log.handlers[:], log.level, log.propagate)
    try:
        yield
    finally:
        for handler in set(log.handlers) - set(kept[0]):
            handler.close()
        log.handlers[:], log.propagate = kept[0], kept[2]
        log.setLevel(kept[1])


def run_main(*arguments: str) -> Tuple[int, str, str]:
    """Call main(); return the exit status and what was said, out and err."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), undone_log():
        try:
            status = flowserver.main(["--config", "", *arguments])
        except SystemExit as exit:
            status = int(exit.code or 0)
    return status, out.getvalue(), err.getvalue()


class InFolder(unittest.TestCase):
    """A test with a folder of its own, and flags to use nothing else."""

    def setUp(self) -> None:
        context = temporary_folder()
        self.folder = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        self.uploads = os.path.join(self.folder, "up")
        self.flags = [
            "--port",
            "0",
            "--upload-dir",
            self.uploads,
            "--min-free-space",
            "0",
        ]

    def path(self, name: str, text: Optional[str] = None) -> str:
        """Return the path of a name in the folder, written when there is a text."""
        path = os.path.join(self.folder, name)
        if text is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        return path


class CommandLineTest(InFolder):
    """A user's mistake is one sentence and an exit status, never a traceback."""

    def test_help_names_every_flag(self) -> None:
        status, out, _ = run_main("--help")
        self.assertEqual(status, 0)
        for name in flowserver.settings_table():
            self.assertIn("--" + name.replace("_", "-") + " VALUE", out)
        self.assertRegex(out, r"\.flowserver inside\s+upload_dir\.")

    def test_version_is_told(self) -> None:
        result = python(FILE, "--version")
        self.assertEqual(
            (result.returncode, result.stdout, result.stderr),
            (0, flowserver.__version__ + "\n", ""),
        )

    def test_wrong_setting_is_one_sentence_and_status_2(self) -> None:
        wrong_file = self.path("wrong.ini", "[server]\nport = many\n")
        cases: Dict[Tuple[str, ...], str] = {
            ("--port", "many"): '--port: "many"',
            ("--max-chunk-size", "8X"): "--max-chunk-size",
            ("--sample-dir", self.path("none")): "sample_dir",
            ("--timeout", "soon"): "--timeout",
            ("--config", wrong_file): f"{wrong_file}, section [server], key port",
            ("--config", self.path("no.ini")): "no.ini can't be read",
            ("--certificate", wrong_file, "--private-key", wrong_file): "TLS",
            ("--log-file", os.path.join(self.uploads, "x.log")): "log_file",
            ("--upload-dir", os.path.dirname(FILE)): "flowserver.py",
            ("--upload-dir", ""): "upload",
            ("--add-user", "anna"): "users_file",
            ("--add-user", "a:b", "--users-file", self.path("u")): '"a:b"',
            ("--add-user", "#a", "--users-file", self.path("u")): '"#a"',
            ("--users-file", self.path("none")): "users_file",
        }
        for arguments, words in cases.items():
            with self.subTest(arguments):
                status, out, err = run_main(*self.flags, *arguments)
                self.assertEqual((status, out), (2, ""))
                self.assertRegex(err, r"\Aflowserver: [^\n]+\.\n\Z")
                self.assertIn(words, err)

    def test_unknown_or_shortened_flag_has_status_2(self) -> None:
        for flag in ("--colour", "--por"):
            status, _, err = run_main(flag, "80")
            self.assertEqual(status, 2)
            self.assertIn(flag, err)
            self.assertNotIn("Traceback", err)

    def test_what_this_machine_can_not_do_is_one_sentence_and_status_1(self) -> None:
        busy = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(busy.close)
        port = str(busy.getsockname()[1])
        file = self.path("file", "")
        cases: Dict[Tuple[str, ...], str] = {
            ("--upload-dir", self.path("disk/up")): "disk is missing",
            ("--temp-dir", self.path("disk/temp")): "disk is missing",
            ("--port", port): f"127.0.0.1, port {port}",
            ("--host", "192.0.2.1"): "192.0.2.1",
            ("--host", "\u00fc..example"): "\u00fc..example",
            ("--upload-dir", os.path.join(file, "up")): os.path.join(file, "up"),
            ("--temp-dir", os.path.join(file, "temp")): "temp",
            ("--log-file", os.path.join(file, "log")): "log",
        }
        for arguments, words in cases.items():
            with self.subTest(arguments):
                with mock.patch.object(flowserver, "_serve", return_value=0):
                    status, out, err = run_main(*self.flags, *arguments)
                self.assertEqual((status, out), (1, ""))
                self.assertRegex(err, r"\Aflowserver: [^\n]+\n\Z")
                self.assertIn(words, err)
        self.assertFalse(os.path.exists(self.path("disk")))  # a disk may come there

    @unittest.skipUnless(os.path.isdir("/dev/shm"), "needs a second file system")
    def test_temp_folder_on_another_file_system_has_status_1(self) -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
            if os.stat(other).st_dev == os.stat(self.folder).st_dev:
                self.skipTest("needs a second file system")
            status, _, err = run_main(*self.flags, "--temp-dir", other)
        self.assertEqual(status, 1)
        self.assertIn("not on the same file system", err)

    @unittest.skipIf(not hasattr(os, "geteuid") or os.geteuid() == 0, "root may write")
    def test_unwritable_folder_has_status_1(self) -> None:
        os.mkdir(self.uploads, 0o500)
        status, _, err = run_main(*self.flags)
        self.assertEqual(status, 1)
        self.assertIn(self.uploads, err)

    def test_mistake_in_a_real_process_shows_no_traceback(self) -> None:
        result = python("-I", "-W", "error", FILE, "--config", "", "--port", "many")
        self.assertEqual((result.returncode, result.stdout), (2, ""))
        self.assertRegex(result.stderr, r'\Aflowserver: --port: "many" [^\n]+\n\Z')

    def test_user_is_added_and_may_log_in(self) -> None:
        users = self.path("users")
        for name, password, words in (
            ("anna", "gehe:im", "anna is added"),
            ("b\u00e4r", "x", "b\u00e4r is added"),
            ("anna", "new:one", "anna's password is changed"),
        ):
            self.assertIn(words, self.add_user(users, name, password))
        text = source_of(users)
        self.assertEqual(re.findall("(?m)^[^:]+", text), ["b\u00e4r", "anna"])
        self.assertNotIn("gehe", text)
        if os.name == "posix":
            self.assertEqual(os.stat(users).st_mode & 0o777, 0o600)
        header = basic("anna", "new:one")
        self.assertEqual(flowserver.Users(users).authenticate(header), "anna")
        self.assertEqual(sorted(os.listdir(self.folder)), ["users"])

    def add_user(self, users: str, name: str, password: str) -> str:
        with mock.patch.object(sys, "stdin", io.StringIO(password + "\n")):
            status, out, err = run_main("--users-file", users, "--add-user", name)
        self.assertEqual((status, err), (0, ""))
        return out

    def test_what_else_stands_in_the_file_of_users_stays(self) -> None:
        users = self.path("users", "\ufeff# comment\nanna:old\ncarl:hash")
        self.assertIn("changed", self.add_user(users, "anna", "x"))
        lines = source_of(users).splitlines()
        self.assertEqual(lines[:2], ["# comment", "carl:hash"])
        self.assertEqual(len(lines), 3)

    @unittest.skipUnless(os.name == "posix", "needs links, modes and owners of POSIX")
    def test_file_of_users_stays_a_link_and_whose_it_is(self) -> None:
        users = self.path("users", "")
        os.mkdir(self.path("etc"))
        os.rename(users, self.path("etc/real"))
        os.symlink("etc/real", users)
        os.chmod(users, 0o640)
        owner = 12345 if os.geteuid() == 0 else os.geteuid()
        os.chown(users, owner, os.getegid())
        self.add_user(users, "anna", "x")
        self.assertTrue(os.path.islink(users))
        status = os.stat(self.path("etc/real"))
        self.assertEqual((status.st_mode & 0o777, status.st_uid), (0o640, owner))
        self.assertGreater(status.st_size, 50)
        self.assertEqual(os.listdir(self.path("etc")), ["real"])

    def test_users_added_at_one_time_are_all_kept(self) -> None:
        users = self.path("users")
        flags = ("-I", FILE, "--config", "", "--users-file", users, "--add-user")
        names = [f"user{n}" for n in range(6)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
        commands = [[sys.executable, *flags, name] for name in names]
        processes = [subprocess.Popen(command, **pipes) for command in commands]
        for process in processes:
            process.stdin.write(b"x\n")
            process.stdin.close()
        self.assertEqual([process.wait() for process in processes], [0] * 6)
        found = re.findall("(?m)^[^:]+", source_of(users))
        self.assertEqual(sorted(found), names)

    def test_user_without_a_password_is_not_added(self) -> None:
        with mock.patch.object(sys, "stdin", io.StringIO("\n")):
            status, _, err = run_main("--users-file", self.path("u"), "--add-user", "a")
        self.assertEqual((status, err), (2, "flowserver: The password is empty.\n"))
        self.assertFalse(os.path.exists(self.path("u")))

    def test_end_at_the_question_for_a_password_is_a_sentence(self) -> None:
        terminal = mock.Mock()
        for end in (EOFError, KeyboardInterrupt):
            with mock.patch.object(sys, "stdin", terminal):
                with mock.patch.object(flowserver.getpass, "getpass", side_effect=end):
                    flags = ("--users-file", self.path("u"), "--add-user", "a")
                    self.assertEqual(run_main(*flags)[0], 2)

    def test_stdin_that_is_closed_or_no_text_is_a_sentence(self) -> None:
        junk = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8")
        for stdin in (None, junk):
            with mock.patch.object(sys, "stdin", stdin):
                flags = ("--users-file", self.path("u"), "--add-user", "a")
                status, _, err = run_main(*flags)
            self.assertEqual((status, err), (2, "flowserver: The password is empty.\n"))

    def test_password_is_asked_for_twice_at_a_terminal(self) -> None:
        terminal = mock.Mock()
        terminal.isatty.return_value = True
        flags = ("--users-file", self.path("u"), "--add-user", "a")
        for answers, expected in ((["x", "x"], 0), (["x", "y"], 2)):
            asked = mock.Mock(side_effect=answers)
            with mock.patch.object(sys, "stdin", terminal):
                with mock.patch.object(flowserver.getpass, "getpass", asked):
                    status, _, err = run_main(*flags)
            self.assertEqual((status, asked.call_count), (expected, 2))
        self.assertEqual(err, "flowserver: The two passwords differ.\n")

    def test_check_tells_what_holds(self) -> None:
        status, out, _ = run_main(*self.flags, "--check")
        self.assertEqual((status, "FAILED" in out), (0, False), out)
        for words in (self.uploads, "locks hold", "MiB are free"):
            self.assertIn(words, out)

    def test_check_leaves_nothing_behind(self) -> None:
        _, out, _ = run_main(*self.flags, "--check")
        self.assertIn(f"{self.uploads} is missing", out)
        self.assertEqual(os.listdir(self.folder), [])
        os.mkdir(self.uploads)
        _, out, _ = run_main(*self.flags, "--check", "--temp-dir", self.path("temp"))
        self.assertNotIn("is missing", out)
        self.assertEqual(os.listdir(self.folder), ["up"])
        run_main(*self.flags, "--check", "--temp-dir", "/proc/temp")
        self.assertEqual(os.listdir(self.uploads), [])

    def test_check_touches_no_folder_of_a_server(self) -> None:
        app = UploadApp(Settings(upload_dir=self.uploads))
        self.assertEqual(run_main(*self.flags, "--check")[0], 0)
        self.assertEqual(send(app, *browser("a", b"x")).status, 200)

    def test_path_that_stdout_has_no_letters_for_is_told_all_the_same(self) -> None:
        flags = ("--config", "", "--check", "--upload-dir", self.path("\u65e5"))
        environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "1"}
        result = python(FILE, *flags, env=environment)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertIn(r"\u65e5", result.stdout)

    def test_file_of_users_that_cannot_be_used_is_a_sentence(self) -> None:
        junk = self.path("junk")
        with open(junk, "wb") as file:
            file.write(b"\xff\xfe:")
        for path in (junk, os.path.join(self.path("none"), "users")):
            with mock.patch.object(sys, "stdin", io.StringIO("secret\n")):
                status, _, err = run_main("--users-file", path, "--add-user", "a")
            self.assertEqual(status, 1)
            self.assertRegex(err, r"\Aflowserver: The file of users [^\n]+\n\Z")

    def test_check_tells_what_does_not_hold(self) -> None:
        flags = [*self.flags, "--check", "--min-free-space", "999999T"]
        status, out, _ = run_main(*flags)
        self.assertEqual((status, out.count("FAILED")), (1, 1))
        status, out, _ = run_main(*flags, "--upload-dir", self.path("file", "") + "/x")
        self.assertEqual((status, out[:6]), (1, "FAILED"))


@unittest.skipUnless(os.name == "posix", "needs signals of POSIX")
class InProcessTest(InFolder):
    """main() from start to end, in this very process."""

    def run_server(self, action: Any, *arguments: str) -> Tuple[int, str, str]:
        """Run main(); when it serves, call action(server) in another thread, end it."""
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        main_thread = threading.get_ident()

        def started(server: FlowServer) -> None:
            FlowServer.start(server)
            thread = threading.Thread(target=act, args=(server,))
            thread.start()
            threads.append(thread)

        def act(server: FlowServer) -> None:
            try:
                action(server)
            finally:
                signal.pthread_kill(main_thread, signal.SIGTERM)

        threads: List[threading.Thread] = []
        try:
            with mock.patch.object(QuickServer, "start", started):
                with mock.patch.object(flowserver, "FlowServer", QuickServer):
                    return run_main(*self.flags, *arguments)
        finally:
            for thread in threads:
                thread.join()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def test_server_says_where_it_is_and_where_files_go(self) -> None:
        status, out, _ = self.run_server(
            lambda server: send_file(server, "a", noise(5))
        )
        self.assertEqual(status, 0)
        first, second = out.splitlines()
        self.assertRegex(
            first, r"^flowserver [0-9.]+: open http://127\.0\.0\.1:[0-9]+/ in"
        )
        self.assertEqual(second, f"files go to {self.uploads}")
        self.assertEqual(finished_files(self.uploads), {"a": noise(5)})

    def test_signal_ends_it_wherever_it_comes(self) -> None:
        """threading.Event would wait for ever when one comes while it has its lock."""
        program = """if True:
            import signal, sys, flowserver
            def trace(*_):
                global left
                left -= 1
                if left == 0:
                    signal.raise_signal(signal.SIGTERM)
                return trace
            def warned(server):  # the last that is done before the wait
                sys.settrace(trace)
                sys._getframe(1).f_trace = trace
            left = int(sys.argv[1])
            flowserver._warn_if_open = warned
            sys.exit(flowserver.main(sys.argv[2:]))
            """
        for moment in (5, 8, 11):
            how = {"cwd": os.path.dirname(FILE), "check": True}
            flags = ("--config", "", *self.flags)
            python("-c", program, str(moment), *flags, **how)

    def reachable(self, *hosts: str) -> Tuple[List[str], str]:
        """Return the addresses that are told where the machine's name has `hosts`."""
        entries = [(0, 0, 0, "", (host, 0)) for host in hosts]
        with mock.patch.object(socket, "getaddrinfo", return_value=entries):
            _, out, _ = self.run_server(lambda server: None, "--host", "0.0.0.0")
        return re.findall("also reachable as http://(.+):[0-9]+/\n", out), out

    def test_every_address_is_told_and_a_public_one_is_warned_of(self) -> None:
        told, out = self.reachable("192.0.2.7", "192.0.2.7", "::2", "127.0.0.1")
        self.assertEqual([host for host in told if host == "192.0.2.7"], told[-1:])
        self.assertNotIn("::2", out)
        self.assertIn("users_file", out)

    def test_address_that_a_phone_can_use_is_told_first(self) -> None:
        """Debian gives a machine's name 127.0.1.1, and no other address."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            try:
                route.connect(("192.0.2.1", 9))
            except OSError:
                self.skipTest("this machine has no network")
            own = route.getsockname()[0]
        told, _ = self.reachable("127.0.1.1", "169.254.1.1", "192.0.2.7", own)
        self.assertEqual(told, [own, "192.0.2.7"])

    def test_log_goes_to_a_file_and_is_escaped(self) -> None:
        log = self.path("x.log")
        _, _, err = self.run_server(self.send_hostile, "--log-file", log)
        text = source_of(log)
        self.assertEqual(text, err)
        lines = text.splitlines()
        self.assertEqual(len(lines), 4)
        words = f"flowserver {flowserver.__version__} serves http://127.0.0.1:"
        self.assertRegex(lines[0], f"INFO {words}[0-9]+, files go to .*{self.uploads}")
        self.assertIn("INFO flowserver ends", lines[-1])
        self.assertIn(r'finished "a\u202eb', text.replace("_", r"\u202e"))
        self.assertTrue(text.replace("\n", "").isprintable())

    def send_hostile(self, server: FlowServer) -> None:
        send_file(server, "a\u202eb", b"x")
        send(server, "GET", "/%0d%0aforged%1b%5b31m")

    def test_log_is_rotated(self) -> None:
        def chatter(server: FlowServer) -> None:
            for _ in range(50):
                send(server, "GET", "/health")

        sizes = ("--log-max-size", "1K", "--log-backups", "2")
        self.run_server(chatter, "--log-file", self.path("x.log"), *sizes)
        names = sorted(name for name in os.listdir(self.folder) if name != "up")
        self.assertEqual(names, ["x.log", "x.log.1", "x.log.2"])
        self.assertLessEqual(os.path.getsize(self.path("x.log.1")), KIB)

    def test_log_without_backups_begins_anew(self) -> None:
        def chatter(server: FlowServer) -> None:
            for _ in range(50):
                send(server, "GET", "/health")

        sizes = ("--log-max-size", "1K", "--log-backups", "0")
        self.run_server(chatter, "--log-file", self.path("x.log"), *sizes)
        self.assertLessEqual(os.path.getsize(self.path("x.log")), KIB)

    def test_log_level_is_obeyed(self) -> None:
        def ask(server: FlowServer) -> None:
            send(server, "GET", "/health")

        _, _, err = self.run_server(ask, "--log-level", "warning")
        self.assertEqual(err, "")


class ProcessTest(InFolder):
    """The file as users start it: alone, anywhere, and until they end it."""

    def setUp(self) -> None:
        super().setUp()
        # Who was started in the background would start programs that hear no Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGINT, before)

    def alone(self) -> str:
        """Return the path of a copy in an empty folder."""
        os.mkdir(self.path("empty"))
        return shutil.copy(FILE, self.path("empty/flowserver.py"))

    def check_works(self, server: Running) -> None:
        answers = send_file(server, "d/a", noise(25), chunk_size=10)
        self.assertEqual([answer.status for answer in answers], [200, 200])

    def test_file_alone_runs_in_an_empty_folder(self) -> None:
        with Running(
            "--port", "0", file=self.alone(), cwd=self.path("empty")
        ) as server:
            self.check_works(server)
            if os.name == "posix":
                self.assertEqual(server.stop(signal.SIGTERM), 0)
                self.assertNotIn("Warning", server.errors)
        names = sorted(os.listdir(self.path("empty")))
        self.assertEqual(names, ["flowserver.py", "uploads"])
        self.assertEqual(finished_files(self.path("empty/uploads")), {"d/a": noise(25)})

    def test_file_alone_writes_nothing_beside_itself(self) -> None:
        file = self.alone()
        os.chmod(self.path("empty"), 0o500)
        self.addCleanup(os.chmod, self.path("empty"), 0o700)
        with Running(*self.flags, file=file, cwd=self.folder) as server:
            self.check_works(server)
        self.assertEqual(os.listdir(self.path("empty")), ["flowserver.py"])
        self.assertEqual(finished_files(self.uploads), {"d/a": noise(25)})

    def test_it_runs_where_ssl_can_not_be_imported(self) -> None:
        program = (
            "import runpy, sys; sys.modules['ssl'] = None; sys.argv = sys.argv[1:];"
            "runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        flags = ("-I", "-W", "error", "-c", program)
        with Running("--config", "", *self.flags, flags=flags) as server:
            self.check_works(server)
        wrong = ("--certificate", FILE, "--private-key", FILE)
        result = python(*flags, FILE, "--config", "", *self.flags, *wrong)
        self.assertEqual(result.returncode, 2)
        self.assertRegex(result.stderr, r"\Aflowserver: TLS can't be set up[^\n]+\n\Z")

    def test_conf_ini_beside_the_file_is_read(self) -> None:
        file = self.alone()
        self.path(
            "empty/conf.ini", "[server]\nport = 0\n[storage]\nupload_dir = ../in\n"
        )
        with Running(file=file, cwd=self.folder) as server:
            self.check_works(server)
            self.assertEqual(server.lines[1], f"files go to {self.path('in')}\n")

    @unittest.skipUnless(hasattr(os, "mkfifo"), "needs pipes with a name")
    def test_ctrl_c_during_the_start_is_no_traceback(self) -> None:
        config = self.path("pipe")
        os.mkfifo(config)
        command = [sys.executable, "-I", FILE, "--config", config]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8")
        with open(config, "w"):  # until the start waits for settings to come
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=PATIENCE)
        self.assertEqual((process.returncode, err), (130, ""))

    @unittest.skipUnless(os.name == "posix", "needs signals of POSIX")
    def test_ended_in_the_middle_of_an_upload_it_resumes_after_the_start(self) -> None:
        data = noise(25)
        flags = ("--config", "", *self.flags)
        for number in (signal.SIGTERM, signal.SIGINT):
            with Running(*flags) as server, RawClient(server) as client:
                self.assertEqual(send(server, *browser("a", data, 1, 10)).status, 200)
                message = browser("a", data, 2, 10)
                client.send(head_of(message, "Expect: 100-continue"))
                answer = client.answer()
                self.assertEqual(answer and answer.status, 100)
                client.send(message.body[:-40])
                server.process.send_signal(number)
                client.socket.shutdown(socket.SHUT_WR)
                server.end()
                self.assertEqual(server.process.returncode, 0)
                self.assertNotIn("Traceback", server.errors)
        with Running(*flags) as server:
            test = browser("a", data, 1, 10, "test", ChunkNumber=None)
            self.assertEqual(send(server, *test).json["ranges"], [[1, 9]])
            answer = send(server, *browser("a", data, 2, 10))
            self.assertEqual(answer.json["status"], "complete")
        self.assertEqual(finished_files(self.uploads), {"a": data})
        self.assertEqual(leftovers(self.uploads), {})


@unittest.skipUnless(os.path.exists("/proc/self/status"), "needs Linux")
class MemoryTest(InFolder):
    """Peak resident memory of the server; it depends on neither chunk nor file size."""

    PATIENCE = 8 * PATIENCE  # 1.5 GiB are to be written, and flushed

    def peak(self, server: Running) -> int:
        text = source_of(f"/proc/{server.process.pid}/status")
        return int(re.search(r"VmHWM:\s+([0-9]+) kB", text)[1]) * KIB

    def send_zeros(self, server: Running, name: str, size: int, mode: str) -> None:
        """Send the first of two chunks of `size`, without having it in memory."""
        changes = {
            "CurrentChunkSize": size,
            "TotalSize": 2 * size,
            "TotalChunks": 2,
            "RelativePath": name,
        }
        message = browser("a", b"", 1, size, mode, sent=b"", **changes)
        place = len(message.body) - len(BOUNDARY) - 8 if mode == "multipart" else 0
        head = head_of(message).replace(
            f"Content-Length: {len(message.body)}",
            f"Content-Length: {len(message.body) + size}",
        )
        block = bytes(MIB)
        with RawClient(server) as client:
            client.socket.settimeout(self.PATIENCE)
            client.send(head, message.body[:place])
            for _ in range(size // MIB):
                client.socket.sendall(block)
            answer = client.send(message.body[place:]).answer()
        self.assertEqual(answer and answer.json.get("received"), size)

    def check_peak(self, size: int, mode: str, at_once: int) -> None:
        flags = ("--config", "", *self.flags, "--timeout", f"{self.PATIENCE}")
        with Running(*flags, patience=self.PATIENCE) as server:
            threads = [
                threading.Thread(
                    target=self.send_zeros, args=(server, f"{n}", size, mode)
                )
                for n in range(at_once)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            stored = leftovers(self.uploads)
            self.assertEqual(list(stored.values()), [size] * at_once)
            self.assertLess(self.peak(server), 60 * MIB)
        shutil.rmtree(self.uploads)

    def test_peak_is_small_after_a_chunk_of_96_mib(self) -> None:
        for mode in ("multipart", "octet"):
            with self.subTest(mode):
                self.check_peak(96 * MIB, mode, 1)

    @unittest.skipUnless(os.environ.get("FLOWSERVER_LONG"), "needs FLOWSERVER_LONG=1")
    def test_peak_is_small_after_chunks_of_192_mib_one_and_eight_at_once(self) -> None:
        for mode, at_once in itertools.product(("multipart", "octet"), (1, 8)):
            with self.subTest(mode, at_once=at_once):
                self.check_peak(192 * MIB, mode, at_once)


if __name__ == "__main__":
    unittest.main()
