#!/usr/bin/env python3
"""Measure flowserver.py beside the limit of this machine, and beside nginx.

    python sample/benchmark.py [--quick] [--folder DIR] [--rounds N] [--sync on|off]

Every server is a process of its own, started as users start it, with its log in a file.
This process is the load: one thread that keeps connections alive and sends with
sendfile.  The servers take turns within each round, so that what else the machine does
hits all of them; figures are medians of the rounds, ratios the medians of the ratios
within each round.

*limit* is a bare loop in Python, threads with 256 KiB buffers: it receives the same
bytes, writes chunks one behind the other into one file, makes, writes and links a file
for each small one, and flushes what flowserver flushes.  It checks and remembers
nothing.  *nginx* (DAV PUT, one file per chunk), the same *tuned* (with body buffers of
1 MiB) and *copyparty* (PUT of small files) are measured when they are installed; none
of them ever flushes.

A trap of ext4: it passes over the inodes of files deleted in the last minutes, so that
making files is up to ten times slower after many were deleted.  Therefore nothing is
deleted while this runs: files are emptied, names are new in each round, and each server
gets the folder, of some in different places of the disk, where files are made fastest.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import secrets
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from typing import (
    Any,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Type,
)

MIB = 1 << 20
BLOCK_SIZE = 256 * 1024
SOURCE_SIZE = 16 * MIB
STALLED_SECONDS = 60.0
HERE = os.path.dirname(os.path.abspath(__file__))


class Row(NamedTuple):
    """One kind of load; with --quick there are `few` requests instead of `requests`."""

    title: str
    kind: str  # "chunk": of one upload; "file": each an upload; "test": a question
    size: int  # of the body's file, in bytes
    requests: int
    few: int
    is_form: bool = False  # multipart/form-data, else the bytes alone
    connections: int = 3


ROWS = (
    Row("1 MiB chunks, octet", "chunk", MIB, 256, 32),
    Row("1 MiB chunks, multipart", "chunk", MIB, 256, 32, is_form=True),
    Row("16 MiB chunks, octet", "chunk", 16 * MIB, 24, 3),
    Row("16 MiB chunks, multipart", "chunk", 16 * MIB, 24, 3, is_form=True),
    Row("8 MiB chunks, multipart, 64 connections", "chunk", 8 * MIB, 128, 64, True, 64),
    Row("4 KiB files, octet", "file", 4096, 2000, 150),
    Row("4 KiB files, multipart", "file", 4096, 2000, 150, is_form=True),
    Row("test requests", "test", 0, 5000, 300),
)


class Order(NamedTuple):
    """One request: its head, a range of the source file, and what follows that."""

    head: bytes
    offset: int
    size: int
    tail: bytes


class Figures(NamedTuple):
    """What one row cost one server in one round."""

    seconds: float
    cpu_seconds: float
    peak_mib: float
    median_ms: float
    slow_ms: float  # the 99th percentile


class Target(NamedTuple):
    """What the README promises: our rate, or our CPU seconds, beside another's."""

    sync: str
    title: str  # how the titles of its rows begin
    rival: str
    ratio: float  # at least; of the CPU seconds at most
    figure: str = "rate"


TARGETS = (
    Target("off", "1 MiB chunks, octet", "nginx tuned", 1.2),
    Target("off", "1 MiB chunks, octet", "nginx tuned", 1.5, "cpu"),
    Target("off", "16 MiB chunks, octet", "nginx tuned", 1.0),
    Target("off", "16 MiB chunks, multipart", "nginx tuned", 0.8),
    Target("off", "8 MiB chunks, multipart, 64 connections", "nginx", 1.0),
    Target("off", "1 MiB chunks, octet", "limit", 0.8),
    Target("off", "1 MiB chunks, multipart", "limit", 0.7),
    Target("off", "16 MiB chunks, octet", "limit", 0.8),
    Target("off", "16 MiB chunks, multipart", "limit", 0.7),
    Target("off", "4 KiB files, octet", "limit", 0.5),
    Target("off", "4 KiB files, octet", "copyparty", 1.0),
    Target("on", "1 MiB chunks, octet", "limit", 0.8),
    Target("on", "16 MiB chunks, octet", "limit", 0.8),
    Target("on", "4 KiB files, octet", "limit", 0.8),
)
TESTS_PER_SECOND = 5000


# ---- the load ------------------------------------------------------------------------


class Connection:
    """One kept-alive connection that sends order after order and waits for answers."""

    def __init__(self, address: Tuple[str, int], source: int) -> None:
        self.socket = socket.create_connection(address, STALLED_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.socket.setblocking(False)
        self.source = source
        self.steps: List[Tuple[Any, int, int]] = []  # what is still to be sent
        self.answer = b""
        self.began = 0.0

    def begin(self, order: Order) -> None:
        """Take an order; small ones go out in one piece."""
        self.began, self.answer = time.perf_counter(), b""
        if 0 < order.size <= 65536:
            body = os.pread(self.source, order.size, order.offset)
            self.steps = [(order.head + body + order.tail, 0, 0)]
        else:
            self.steps = [(order.tail, 0, 0)] if order.tail else []
            if order.size:
                self.steps.append((None, order.offset, order.size))
            self.steps.append((order.head, 0, 0))

    def send(self) -> bool:
        """Send what the system takes; return whether all of the order is sent."""
        with contextlib.suppress(BlockingIOError):
            while self.steps:
                text, offset, size = self.steps[-1]
                if text is None:
                    sent = os.sendfile(self.socket.fileno(), self.source, offset, size)
                    rest = (None, offset + sent, size - sent)
                    is_done = sent == size
                else:
                    sent = self.socket.send(text)
                    rest = (text[sent:], 0, 0)
                    is_done = sent == len(text)
                self.steps[-1:] = [] if is_done else [rest]
        return not self.steps

    def receive(self) -> bool:
        """Take what came; return whether the answer is whole; only 2xx will do."""
        block = self.socket.recv(65536)
        self.answer += block
        head, found, body = self.answer.partition(b"\r\n\r\n")
        if not block or (found and head[9:10] != b"2"):
            raise SystemExit(f"A server answered: {self.answer[:500]!r}")
        length = re.search(rb"\r\ncontent-length: *([0-9]+)", head, re.IGNORECASE)
        return bool(found) and len(body) >= (int(length[1]) if length else 0)


def run_load(
    address: Tuple[str, int], source: int, orders: Iterator[Order], connections: int
) -> List[float]:
    """Send all orders over so many connections; return the seconds that each took."""
    latencies: List[float] = []
    with selectors.DefaultSelector() as selector:
        for _, order in zip(range(connections), orders):
            connection = Connection(address, source)
            connection.begin(order)
            selector.register(connection.socket, selectors.EVENT_WRITE, connection)
        while selector.get_map():
            ready = selector.select(STALLED_SECONDS)
            if not ready:
                raise SystemExit(f"A server has stalled for {STALLED_SECONDS:.0f} s.")
            for key, events in ready:
                connection = key.data
                if events & selectors.EVENT_READ:
                    if not connection.receive():
                        continue
                    latencies.append(time.perf_counter() - connection.began)
                    following = next(orders, None)
                    if following is None:
                        selector.unregister(connection.socket)
                        connection.socket.close()
                        continue
                    connection.begin(following)
                is_sent = connection.send()
                wanted = selectors.EVENT_READ if is_sent else selectors.EVENT_WRITE
                if wanted != key.events:
                    selector.modify(connection.socket, wanted, connection)
    return latencies


# ---- the servers ---------------------------------------------------------------------


class Server:
    """A server under load; `can` says which kinds of rows it takes."""

    name = ""
    can: Tuple[str, ...] = ("chunk", "file", "test")

    def __init__(self, folder: str, sync: str) -> None:
        self.folder = quick_folder(folder)
        self.uploads = os.path.join(self.folder, "uploads")
        self.sync = sync
        os.makedirs(self.uploads)
        self.port = 0  # any; the server prints which
        self.address = ("127.0.0.1", 0)
        self.process: Any = None

    def start(self) -> None:
        """Start the process and wait until it answers."""
        output = os.path.join(self.folder, "output")
        with open(output, "wb") as file:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            )
        deadline = time.monotonic() + STALLED_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with open(output, encoding="utf-8", errors="replace") as printed:
                match = re.search(r"http://127\.0\.0\.1:([0-9]+)/", printed.read())
            self.address = ("127.0.0.1", self.port or int(match[1] if match else 0))
            with contextlib.suppress(OSError):
                socket.create_connection(self.address, 1).close()
                return
            time.sleep(0.02)
        raise SystemExit(f"{self.name} did not start.")

    def command(self) -> List[str]:
        """Return what a user would type."""
        raise NotImplementedError

    def orders(self, row: Row, tag: str) -> Iterator[Order]:
        """Yield the requests of a row; `tag` is new each time."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the process, and what it started, without a word."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def empty(self) -> None:
        """Give back the room of large files; see the trap in this file's docstring."""
        for folder, _, names in os.walk(self.uploads):
            for name in names:
                path = os.path.join(folder, name)
                if os.path.getsize(path) > 65536:
                    os.truncate(path, 0)


class Flowserver(Server):
    """The server that all of this is about."""

    name = "flowserver"
    program = os.path.join(os.path.dirname(HERE), "flowserver.py")

    def command(self) -> List[str]:
        settings = {"config": "", "port": "0", "upload-dir": self.uploads}
        settings.update({"sync": self.sync, "log-file": "flowserver.log"})
        flags = [word for k, v in settings.items() for word in ("--" + k, v)]
        return [sys.executable, os.path.abspath(self.program)] + flags

    def orders(self, row: Row, tag: str) -> Iterator[Order]:
        if row.kind == "test":
            yield from self.test_orders(row, tag)
            return
        for number in range(1, row.requests + 1):
            yield _post(row, number, tag, "/upload")

    def test_orders(self, row: Row, tag: str) -> Iterator[Order]:
        """Ask in turn for a chunk that is there and for one that is not."""
        chunk = row._replace(kind="chunk", size=1000, requests=2)
        head, offset, size, _ = _post(chunk, 1, tag, "/upload")
        connection = socket.create_connection(self.address, STALLED_SECONDS)
        connection.sendall(head + bytes(size))
        assert b" 200 " in connection.recv(65536)
        connection.close()
        for number in range(row.requests):
            query = urllib.parse.urlencode(_parameters(chunk, number % 2 + 1, tag))
            yield Order(_head("GET", "/upload?" + query, 0), 0, 0, b"")


class OtherFlowserver(Flowserver):
    """Another version of flowserver.py, to compare with (--against FILE)."""

    name = "against"


class Limit(Flowserver):
    """The bare loop at the end of this file."""

    name = "limit"

    def command(self) -> List[str]:
        me = os.path.abspath(__file__)
        return [sys.executable, me, "--bare-loop", self.uploads, "--sync", self.sync]

    def test_orders(self, row: Row, tag: str) -> Iterator[Order]:
        chunk = row._replace(size=1000, requests=2)
        for number in range(row.requests):
            query = urllib.parse.urlencode(_parameters(chunk, number % 2 + 1, tag))
            yield Order(_head("GET", "/upload?" + query, 0), 0, 0, b"")


class Nginx(Server):
    """nginx's own upload: DAV PUT, one file per chunk, and a log, as users have it."""

    name = "nginx"
    can: Tuple[str, ...] = ("chunk", "file")
    tuning = ""

    def command(self) -> List[str]:
        self.port = _free_port()
        config = os.path.join(self.folder, "nginx.conf")
        with open(config, "w", encoding="utf-8") as file:
            file.write(
                NGINX.format(
                    port=self.port,
                    folder=self.folder,
                    user=_nginx_user(),
                    tuning=self.tuning,
                )
            )
        return [_nginx_program(), "-c", config, "-p", self.folder]

    def orders(self, row: Row, tag: str) -> Iterator[Order]:
        for number in range(1, row.requests + 1):
            yield _put(row, number, f"/{tag}-{number}")


class TunedNginx(Nginx):
    """The same as people set it who take uploads; the default buffer has 16 KiB."""

    name = "nginx tuned"
    can = ("chunk",)
    tuning = "client_body_buffer_size 1m;"


class Copyparty(Server):
    """copyparty's PUT of small files; its chunks have a protocol of their own."""

    name = "copyparty"
    can = ("file",)

    def command(self) -> List[str]:
        self.port = _free_port()
        place = f"{self.uploads}::rw"
        options = ["-i", "127.0.0.1", "-p", str(self.port), "-v", place]
        return [sys.executable, "-m", "copyparty"] + options

    def orders(self, row: Row, tag: str) -> Iterator[Order]:
        for number in range(1, row.requests + 1):
            yield _put(row, number, f"/{tag}-{number}.bin")


NGINX = """{user}
daemon off;
worker_processes auto;
pid {folder}/nginx.pid;
error_log {folder}/errors.log;
events {{ worker_connections 1024; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 0;
    {tuning}
    keepalive_requests 1000000;
    server {{
        listen 127.0.0.1:{port};
        root {folder}/uploads;
        location / {{ dav_methods PUT; }}
    }}
}}
"""


def _nginx_program() -> str:
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin") or ""


def _nginx_user() -> str:
    """Return the line that lets nginx's workers write here when root starts them."""
    return "user root;" if hasattr(os, "getuid") and os.getuid() == 0 else ""


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _parameters(row: Row, number: int, tag: str) -> Dict[str, object]:
    """Return what flow.js would send with a chunk, or with a file of one chunk."""
    is_file = row.kind == "file"
    size = row.size if is_file else row.size * row.requests
    name = f"{tag}-{number}.bin" if is_file else f"{tag}.bin"
    return {
        "flowChunkNumber": 1 if is_file else number,
        "flowChunkSize": row.size,
        "flowCurrentChunkSize": row.size,
        "flowTotalSize": size,
        "flowIdentifier": f"{size}-{name.replace('.', '')}",
        "flowFilename": name,
        "flowRelativePath": name,
        "flowTotalChunks": 1 if is_file else row.requests,
    }


def _head(method: str, target: str, length: int, kind: str = "") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost"]
    lines += ["User-Agent: flowserver-benchmark", "Accept: */*"]
    lines += [f"Content-Length: {length}"] if method != "GET" else []
    lines += [f"Content-Type: {kind}"] if kind else []
    return "\r\n".join(lines + ["", ""]).encode()


def _post(row: Row, number: int, tag: str, path: str) -> Order:
    """Return a chunk as flow.js sends it."""
    parameters = _parameters(row, number, tag)
    if not row.is_form:
        target = path + "?" + urllib.parse.urlencode(parameters)
        return _put(row, number, target, "POST")
    word = "----flowserverBenchmark7MA4YWxk"
    part = f"--{word}\r\nContent-Disposition: form-data; name="
    fields = [f'{part}"{name}"\r\n\r\n{text}\r\n' for name, text in parameters.items()]
    begin = "".join(fields) + f'{part}"file"; filename="blob"\r\n'
    begin += "Content-Type: application/octet-stream\r\n\r\n"
    end = f"\r\n--{word}--\r\n"
    length = len(begin) + row.size + len(end)
    head = _head("POST", path, length, "multipart/form-data; boundary=" + word)
    offset = number * row.size % SOURCE_SIZE
    return Order(head + begin.encode(), offset, row.size, end.encode())


def _put(row: Row, number: int, target: str, method: str = "PUT") -> Order:
    head = _head(method, target, row.size, "application/octet-stream")
    return Order(head, number * row.size % SOURCE_SIZE, row.size, b"")


# ---- what the system says of processes and disks -------------------------------------


def _family(pid: int) -> List[int]:
    """Return a process and its children, where the system has /proc."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as file:
        return [pid] + [int(word) for word in file.read().split()]
    return [pid]


def cpu_seconds(pid: int) -> float:
    """Return what a process and its children have used so far; 0 where nobody knows."""
    total = 0.0
    for member in _family(pid):
        # clock_getcpuclockid(3) of Linux: the clock of all threads, dead ones too.
        with contextlib.suppress(OSError, AttributeError):
            total += time.clock_gettime(~member << 3 | 2)
    return total


def forget_peak(pid: int) -> None:
    """Let the peak of memory begin at what is in use now."""
    for member in _family(pid):
        with contextlib.suppress(OSError):
            with open(f"/proc/{member}/clear_refs", "w") as file:
                file.write("5")


def peak_mib(pid: int) -> float:
    """Return the peak of memory of a process and its children; 0 without /proc."""
    kib = 0
    for member in _family(pid):
        with contextlib.suppress(OSError), open(f"/proc/{member}/status") as file:
            kib += int(re.search(r"VmHWM:\s*([0-9]+)", file.read())[1])  # type: ignore
    return kib / 1024


def file_system(path: str) -> str:
    """Return the type of the file system of a folder, "unknown" without /proc."""
    best, found = "", "unknown"
    with contextlib.suppress(OSError), open("/proc/self/mounts") as file:
        for line in file:
            _, place, kind = line.split()[:3]
            place = place.replace("\\040", " ")
            inside = os.path.join(os.path.realpath(path), "").startswith(
                os.path.join(place, "")
            )
            if inside and len(place) >= len(best):
                best, found = place, kind
    return found


def flush_ms(folder: str) -> float:
    """Return what a flush of 4 KiB added to a file costs, the median of 20."""
    flush, times = getattr(os, "fdatasync", os.fsync), []
    with open(os.path.join(folder, "flushed"), "wb", buffering=0) as file:
        for _ in range(20):
            file.write(secrets.token_bytes(4096))
            began = time.perf_counter()
            flush(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def mark_as_top(folder: str) -> None:
    """Ask ext4 to spread the folders in this one over the disk (chattr +T)."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fd = os.open(folder, os.O_RDONLY)
        try:
            get_flags, set_flags, top_folder = 0x80086601, 0x40086602, 0x00020000
            flags = bytearray(8)
            fcntl.ioctl(fd, get_flags, flags)
            value = int.from_bytes(flags, sys.byteorder) | top_folder
            fcntl.ioctl(fd, set_flags, value.to_bytes(8, sys.byteorder))
        finally:
            os.close(fd)


def quick_folder(parent: str) -> str:
    """Make the folder, of some, in which files are made fastest; see the trap above.

    Where ext4 puts a folder of a top one depends on its name alone.
    """
    folders: Dict[str, float] = {}
    for _ in range(8):
        folder = os.path.join(parent, secrets.token_hex(8))
        os.mkdir(folder)
        began = time.perf_counter()
        for number in range(100):
            os.close(os.open(os.path.join(folder, str(number)), os.O_CREAT | os.O_EXCL))
        folders[folder] = time.perf_counter() - began
    return min(folders, key=folders.__getitem__)


def machine() -> str:
    """Return one line about this machine."""
    model = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        match = re.search(r"model name\s*: (.*)", file.read())
        model = f", {match[1]}" if match else ""
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{os.cpu_count()} cores{model}, Python {python}, {sys.platform}"


# ---- the measurement -----------------------------------------------------------------


Key = Tuple[str, Row, str]  # sync, load, name of the server


class Benchmark:
    """All rows, server beside server, round after round."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.options = options
        self.folder = folder
        self.deadline = time.monotonic() + options.limit
        self.results: Dict[Key, List[Figures]] = {}
        source = os.path.join(folder, "source")
        with open(source, "wb") as file:
            file.write(secrets.token_bytes(SOURCE_SIZE) * 2)
        self.source = os.open(source, os.O_RDONLY)

    def run(self) -> None:
        """Measure with each value of sync."""
        rows = wanted_rows(self.options)
        for sync in self.options.sync:
            kinds = contenders(self.options, sync)
            servers: List[Server] = [kind(self.folder, sync) for kind in kinds]
            try:
                for server in servers:
                    server.start()
                for row in rows:
                    self.run_row(sync, row, servers)
            finally:
                for server in servers:
                    server.stop()
        progress("")

    def run_row(self, sync: str, row: Row, servers: Sequence[Server]) -> None:
        """Measure one row, each server once in each round, in a changing order."""
        if self.options.quick:
            row = row._replace(requests=row.few)
        elif hasattr(os, "sync"):  # what came before is not to be written out meanwhile
            progress("waiting for the disk")
            os.sync()
        able = [server for server in servers if row.kind in server.can]
        for number in range(self.options.rounds):
            if number and time.monotonic() > self.deadline:
                return
            for turn in range(len(able)):
                server = able[(number + turn) % len(able)]
                progress(f"sync {sync}, {row.title}, round {number + 1}: {server.name}")
                figures = self.measure(server, row, f"{secrets.token_hex(4)}")
                self.results.setdefault((sync, row, server.name), []).append(figures)
                server.empty()

    def measure(self, server: Server, row: Row, tag: str) -> Figures:
        """Put one server under one load."""
        orders, pid = server.orders(row, tag), server.process.pid
        forget_peak(pid)
        cpu, began = cpu_seconds(pid), time.perf_counter()
        latencies = run_load(server.address, self.source, orders, row.connections)
        seconds = time.perf_counter() - began
        cpu = cpu_seconds(pid) - cpu
        latencies.sort()
        slow = latencies[min(len(latencies) - 1, len(latencies) * 99 // 100)]
        median = statistics.median(latencies)
        return Figures(seconds, cpu, peak_mib(pid), median * 1000, slow * 1000)

    def ratio(self, key: Key, other: str, figure: str = "rate") -> Optional[float]:
        """Return the median of the ratios within each round; None without figures."""
        mine, theirs = self.results[key], self.results.get(key[:2] + (other,), ())
        if not theirs or not all(figures.cpu_seconds for figures in theirs):
            return None
        if figure == "cpu":
            pairs = [(a.cpu_seconds, b.cpu_seconds) for a, b in zip(mine, theirs)]
        else:
            pairs = [(b.seconds, a.seconds) for a, b in zip(mine, theirs)]
        return statistics.median(a / b for a, b in pairs)


def wanted_rows(options: argparse.Namespace) -> List[Row]:
    """Return the rows that --rows names; all without it."""
    return [row for row in ROWS if re.search(options.rows, row.title)]


def contenders(options: argparse.Namespace, sync: str) -> List[Type[Server]]:
    """Return the kinds of servers that can be measured here."""
    kinds: List[Type[Server]] = [Flowserver, Limit]
    if options.against:
        OtherFlowserver.program = options.against
        kinds.append(OtherFlowserver)
    if _nginx_program() and not options.alone:
        kinds += [Nginx, TunedNginx]
    if importlib.util.find_spec("copyparty") and not options.alone and sync == "off":
        kinds.append(Copyparty)
    return kinds


def progress(text: str) -> None:
    """Show what is under way, on a terminal in one line."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text[:79]:<79}" + ("" if text else "\r"))
    elif text:
        sys.stderr.write(text + "\n")
    sys.stderr.flush()


# ---- the report ----------------------------------------------------------------------

COLUMNS = (
    "load",
    "server",
    "MiB/s",
    "requests/s",
    "best",
    "CPU s",
    "peak MiB",
    "median ms",
    "99 % ms",
) + ("of limit", "of nginx", "of tuned")


def report(benchmark: Benchmark) -> None:
    """Print one table for each value of sync, and what became of the targets."""
    print(f"\n{machine()}\n{benchmark.options.place}")
    for sync in benchmark.options.sync:
        print(f"\n## sync {sync}\n\n| {' | '.join(COLUMNS)} |")
        print("|---|---" + "|---:" * (len(COLUMNS) - 2) + "|")
        for key in benchmark.results:
            if key[0] == sync:
                print("| " + " | ".join(table_row(benchmark, key)) + " |")
    few = benchmark.options.rounds < 5
    print(f"\n## targets{' (from too few rounds to judge by)' if few else ''}\n")
    for line in target_lines(benchmark):
        print(line)


def table_row(benchmark: Benchmark, key: Key) -> List[str]:
    """Return the cells of one server and row."""
    _, row, name = key
    rounds = benchmark.results[key]
    seconds, cpu, peak, median, slow = map(statistics.median, zip(*rounds))
    rate = f"{row.size * row.requests / MIB / seconds:,.0f}" if row.size >= MIB else ""
    times = f"{row.requests:,} x {len(rounds)} rounds"
    cells = [f"{row.title} ({times})" if name == "flowserver" else "", name, rate]
    best = min(one[0] for one in rounds)  # what disturbs only ever slows
    cells += [f"{row.requests / each:,.0f}" for each in (seconds, best)]
    cells += [f"{cpu:.2f}", f"{peak:.0f}"]
    cells += [f"{median:.2f}", f"{slow:.2f}"]
    for other in ("limit", "nginx", "nginx tuned"):
        ratio = benchmark.ratio(key, other)
        cells.append(f"{ratio:.2f}" if ratio and name != other else "")
    return cells


def target_lines(benchmark: Benchmark) -> Iterator[str]:
    """Yield a line for each target that could be measured."""
    for key in benchmark.results:
        sync, row, name = key
        if name != "flowserver":
            continue
        for target in TARGETS:
            if (target.sync, target.title) != (sync, row.title):
                continue
            ratio = benchmark.ratio(key, target.rival, target.figure)
            if ratio is not None:
                yield target_line(target, ratio)
        if row.kind == "test":
            rounds = benchmark.results[key]
            rate = row.requests / statistics.median(one.seconds for one in rounds)
            word = "met   " if rate >= TESTS_PER_SECOND else "missed"
            yield f"{word} sync {sync}, {row.title}: {rate:,.0f}/s, at least 5,000/s"


def target_line(target: Target, ratio: float) -> str:
    """Say whether a target is met."""
    load = f"sync {target.sync}, {target.title}"
    if target.figure == "cpu":
        word = "met   " if ratio <= target.ratio else "missed"
        what = f"{ratio:.2f} of the CPU seconds of {target.rival}, at most"
    else:
        word = "met   " if ratio >= target.ratio else "missed"
        what = f"{ratio:.2f} of the rate of {target.rival}, at least"
    return f"{word} {load}: {what} {target.ratio}"


# ---- the limit: a bare loop ----------------------------------------------------------


class BareLoop:
    """Receives, writes, flushes and answers; believes everything."""

    def __init__(self, folder: str, is_synced: bool) -> None:
        self.folder = folder
        self.folder_fd = os.open(folder, os.O_RDONLY)
        self.flush = getattr(os, "fdatasync", os.fsync) if is_synced else None
        flags = os.O_RDWR | os.O_CREAT
        self.data = os.open(os.path.join(folder, "data"), flags)
        self.ledger = os.open(os.path.join(folder, "ledger"), flags | os.O_APPEND)
        self.lock = threading.Lock()
        self.end = 0
        self.count = 0

    def serve(self) -> None:
        """Accept for ever."""
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(256)
        print(f"http://127.0.0.1:{listener.getsockname()[1]}/", flush=True)
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            thread = threading.Thread(target=self.answer, args=(connection,))
            thread.daemon = True
            thread.start()

    def answer(self, connection: socket.socket) -> None:
        """Take request after request of one connection."""
        buffer = memoryview(bytearray(BLOCK_SIZE))
        with contextlib.suppress(ConnectionError), connection:
            while True:
                size = connection.recv_into(buffer)
                if not size:
                    return
                text = bytes(buffer[:size])
                head, _, body = text.partition(b"\r\n\r\n")
                number = head.partition(b"Content-Length: ")[2]
                length = int(number.partition(b"\r")[0] or 0)
                if head.startswith(b"GET"):
                    pass
                elif length < 65536:
                    self.take_file(connection, buffer, body, length)
                else:
                    self.take_chunk(connection, buffer, body, length)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    def take_chunk(
        self, connection: socket.socket, buffer: memoryview, body: bytes, length: int
    ) -> None:
        """Write a chunk behind the others, then a line that says so."""
        with self.lock:
            offset, self.end = self.end, self.end + length
        os.pwrite(self.data, body, offset)
        offset, left = offset + len(body), length - len(body)
        while left:
            size = connection.recv_into(buffer, min(left, BLOCK_SIZE))
            os.pwrite(self.data, buffer[:size], offset)
            offset, left = offset + size, left - size
        if self.flush:
            self.flush(self.data)
        os.write(self.ledger, b"%d %d\n" % (offset - length, offset))
        if self.flush:
            self.flush(self.ledger)

    def take_file(
        self, connection: socket.socket, buffer: memoryview, body: bytes, length: int
    ) -> None:
        """Make, write and link a file."""
        while len(body) < length:
            body += connection.recv(length - len(body))
        with self.lock:
            self.count += 1
            name = os.path.join(self.folder, str(self.count))
        fd = os.open(name + ".part", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.pwrite(fd, body, 0)
        if self.flush:
            self.flush(fd)
        os.link(name + ".part", name)
        if self.flush:
            os.fsync(self.folder_fd)
        os.close(fd)
        os.unlink(name + ".part")


# ---- command line --------------------------------------------------------------------


def parse_options(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Return what the command line says, checked."""
    parser = argparse.ArgumentParser(description="Measure flowserver.py.")
    add = parser.add_argument
    add("--quick", action="store_true", help="one round of a few requests, under 20 s")
    add("--folder", default=".", help="where to write: the disk to measure [.]")
    add("--rounds", type=int, default=0, help="how many [5; with --quick 1]")
    add("--sync", choices=("on", "off"), help="only with this setting")
    add("--rows", default="", metavar="REGEX", help="only loads whose title matches")
    add(
        "--limit",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="begin no further round after this time [900]",
    )
    add("--against", metavar="FILE", help="another flowserver.py, to compare with")
    add("--alone", action="store_true", help="without nginx and copyparty")
    add("--bare-loop", metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.folder = os.path.abspath(options.folder)
    return options


def mistake(options: argparse.Namespace) -> str:
    """Return what is wrong with the command line, in one sentence; "" for nothing."""
    if not hasattr(os, "sendfile"):
        return "this system has no sendfile; measure on Linux or macOS"
    if options.rounds < 0:
        return "--rounds can't be less than 1"
    if not os.path.isdir(options.folder) or not os.access(options.folder, os.W_OK):
        return f"--folder {options.folder} is no folder that can be written to"
    if options.against and not os.path.isfile(options.against):
        return f"--against {options.against} is no file"
    try:
        rows = wanted_rows(options)
    except re.error as error:
        return f'--rows "{options.rows}" is no regular expression: {error}'
    if not rows:
        titles = ", ".join(row.title for row in ROWS)
        return f'--rows "{options.rows}" is in none of the loads: {titles}'
    kind = file_system(options.folder)
    if kind in ("tmpfs", "ramfs") and options.sync != "off":
        return (
            f"{options.folder} is a {kind}, where a flush means nothing; name another"
            " --folder, or --sync off"
        )
    return ""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure and report; return the exit status."""
    options = parse_options(argv)
    if options.bare_loop:
        BareLoop(options.bare_loop, options.sync == "on").serve()
    sentence = mistake(options)
    if sentence:
        print(f"benchmark: {sentence}.", file=sys.stderr)
        return 2
    options.sync = [options.sync] if options.sync else ["off", "on"]
    folder = tempfile.mkdtemp(prefix="benchmark-", dir=options.folder)
    try:
        mark_as_top(folder)
        kind = file_system(folder)
        options.place = f"{kind}; a flush of 4 KiB takes {flush_ms(folder):.2f} ms"
        benchmark = Benchmark(options, folder)
        benchmark.run()
        report(benchmark)
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
