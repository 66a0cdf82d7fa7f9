"""What the attacks on the store have in common: a server to kill, a client, a judge.

A server here is a process of its own with a real socket, forked from the test, so that
it is there in milliseconds; `CommandServer` is `python flowserver.py` as users have it.

FLOWSERVER_FILE names another flowserver.py, to see these tests fail on a broken one.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import importlib.util
import json
import logging
import mmap
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
SERVER = Path(os.environ.get("FLOWSERVER_FILE") or HERE.parent / "flowserver.py")
PATIENCE = (
    60  # seconds until a test gives up waiting; none waits so long when all is well
)
NO_CONFIG = {k: v for k, v in os.environ.items() if k != "FLOWSERVER_CONFIG"}


def load_flowserver() -> ModuleType:
    """Import the file that is to be attacked, once, under its usual name."""
    loaded = sys.modules.get("flowserver")
    if loaded is not None and Path(loaded.__file__ or "").resolve() == SERVER.resolve():
        return loaded
    specification = importlib.util.spec_from_file_location("flowserver", SERVER)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["flowserver"] = module
    specification.loader.exec_module(module)
    logging.getLogger("flowserver").addHandler(logging.NullHandler())
    return module


flowserver = load_flowserver()


def quick_folder(prefix: str) -> Path:
    """A new folder in memory where there is one, for what makes very many files."""
    memory = "/dev/shm"
    usable = os.path.isdir(memory) and os.access(memory, os.W_OK)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=memory if usable else None))


def noise(size: int, seed: int) -> bytes:
    """Bytes that are the same in each run and at no two places alike."""
    return random.Random(seed).randbytes(size)


def eventually(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not happen")
        time.sleep(0.002)


# ---- files and their chunks ----------------------------------------------------------


class File(NamedTuple):
    """What somebody uploads, in chunks, the last of which takes the remainder."""

    path: str
    data: bytes
    chunk_size: int = 1000
    identifier: str = ""
    address: str = "127.0.0.1"  # where the client sits: 127.0.0.2 is another sender

    @property
    def count(self) -> int:
        return max(len(self.data) // self.chunk_size, 1)

    def edges(self, number: int) -> tuple[int, int]:
        start = (number - 1) * self.chunk_size
        is_last = number == self.count
        return start, len(self.data) if is_last else start + self.chunk_size

    def body(self, number: int) -> bytes:
        start, end = self.edges(number)
        return self.data[start:end]

    def parameters(self, number: int) -> dict[str, str]:
        start, end = self.edges(number)
        return {
            "flowChunkNumber": str(number),
            "flowChunkSize": str(self.chunk_size),
            "flowCurrentChunkSize": str(end - start),
            "flowTotalSize": str(len(self.data)),
            "flowIdentifier": self.identifier or f"{len(self.data)}-{self.path}",
            "flowFilename": self.path.rpartition("/")[2],
            "flowRelativePath": self.path,
            "flowTotalChunks": str(self.count),
        }

    def query(self, number: int) -> str:
        return "/upload?" + urllib.parse.urlencode(self.parameters(number))

    def question(self) -> str:
        """The address that asks for, or deletes, the whole upload."""
        parameters = self.parameters(1)
        for name in ("ChunkNumber", "ChunkSize", "CurrentChunkSize"):
            del parameters["flow" + name]
        return "/upload?" + urllib.parse.urlencode(parameters)


# ---- a client ------------------------------------------------------------------------


class Answer(NamedTuple):
    status: int
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self.body or b"{}")
        return values

    @property
    def is_complete(self) -> bool:
        return self.status == 200 and self.json.get("status") == "complete"

    @property
    def was_overtaken(self) -> bool:
        """Whether another attempt at this chunk took its place: it is sent again."""
        return self.status == 503 and "Another attempt" in self.json["error"]


class Client:
    """One connection, which is opened again when the server has gone away."""

    def __init__(self, port: int, address: str = "127.0.0.1") -> None:
        self.port = port
        self.address = address
        self.connection: http.client.HTTPConnection | None = None
        self.failures = 0  # requests without an answer
        self.stored: dict[File, set[int]] = {}  # what it was told so of

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] = {},
    ) -> Answer | None:
        """Return the answer; None when there was none: the server was killed."""
        try:
            if self.connection is None:
                self.connection = http.client.HTTPConnection(
                    "127.0.0.1", self.port, PATIENCE, (self.address, 0)
                )
                self.connection.connect()
                self.connection.sock.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
                )
            self.connection.request(method, path, body, dict(headers))
            response = self.connection.getresponse()
            return Answer(response.status, response.read())
        except (OSError, http.client.HTTPException):
            self.failures += 1
            self.close()
            return None

    def test(self, file: File, number: int) -> Answer | None:
        return self.ask("GET", file.query(number))

    def post(self, file: File, number: int) -> Answer | None:
        answer = self.ask("POST", file.query(number), file.body(number))
        if answer is not None and answer.status == 200:
            self.stored.setdefault(file, set()).add(number)
        elif answer is not None and answer.status != 503:
            self.stored.pop(file, None)
        return answer

    def cancel(self, file: File) -> Answer | None:
        self.stored.pop(file, None)
        return self.ask("DELETE", file.question())

    def send(self, file: File, way: str, numbers: Iterable[int] = ()) -> list[Answer]:
        """Send a file, or chunks of it, as flow.js does, up to the first refusal.

        A client "tests" first, or "sends all"; a page that lives on "remembers".
        """
        answers = []
        for number in numbers or range(1, file.count + 1):
            if way == "remembers" and number in self.stored.get(file, ()):
                continue
            found = self.test(file, number) if way == "tests" else None
            if found is not None and found.status == 200:
                continue
            answer = self.post(file, number)
            assert answer is not None, "no answer"
            answers.append(answer)
            if answer.status != 200:
                break
        return answers


class HalfSent:
    """A chunk of which only the first bytes have been sent so far."""

    def __init__(self, port: int, file: File, number: int, held_back: int) -> None:
        body = file.body(number)
        head = (
            f"POST {file.query(number)} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        self.rest = body[len(body) - held_back :]
        self.socket = socket.create_connection(
            ("127.0.0.1", port), PATIENCE, (file.address, 0)
        )
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(head + body[: len(body) - held_back])

    def finish(self) -> None:
        self.socket.sendall(self.rest)

    def answer(self) -> Answer | None:
        try:
            response = http.client.HTTPResponse(self.socket)
            response.begin()
            return Answer(response.status, response.read())
        except (OSError, http.client.HTTPException):
            return None
        finally:
            self.close()

    def close(self) -> None:
        self.socket.close()


# ---- servers -------------------------------------------------------------------------


class KillingDisk(flowserver.Disk):
    """Counts the store's calls of the operating system, and dies at the one it is told.

    What is counted lies in memory that the test shares. The kill comes just before
    (`when` 0) or just after (1) the call. Nothing is flushed: a kill loses no page.
    """

    LAYOUT = struct.Struct("iii")  # calls to go, when, calls made since armed

    def __init__(self, memory: mmap.mmap) -> None:
        super().__init__(sync=True)
        self.memory = memory

    def flush(self, fd: int) -> None:
        os.fstat(fd)

    def flush_names(self, path: str) -> None:
        os.stat(path)

    def counted(self) -> int:
        """Count one more call when that is wanted; return its number."""
        target, moment, made = self.LAYOUT.unpack_from(self.memory)
        if not target:
            return -1
        self.LAYOUT.pack_into(self.memory, 0, target, moment, made + 1)
        return int(made) + 1

    def die_at(self, number: int, when: int) -> None:
        if self.LAYOUT.unpack_from(self.memory)[:2] == (number, when):
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(PATIENCE)


def _stopping_at(name: str) -> Callable[..., Any]:
    def call(self: KillingDisk, *arguments: Any, **named: Any) -> Any:
        number = self.counted()
        self.die_at(number, 0)
        try:
            return getattr(super(_Calls, self), name)(*arguments, **named)
        finally:
            self.die_at(number, 1)

    return call


def disk_calls() -> list[str]:
    """Every public method of Disk."""
    return [
        name
        for name, value in vars(flowserver.Disk).items()
        if callable(value) and not name.startswith("_")
    ]


class _Calls(KillingDisk):
    """KillingDisk with every call counted."""


for _name in disk_calls():
    setattr(_Calls, _name, _stopping_at(_name))


class Server:
    """A server process over a folder; made again, it is a restart."""

    def __init__(
        self,
        folder: Path,
        disk: Callable[[], Any] | None = None,
        done_log: Path | None = None,
        before: Callable[[], None] | None = None,
        **settings: Any,
    ) -> None:
        self.folder = folder
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(reader)
                _die_with_parent()
                if before is not None:
                    before()
                _serve(folder, disk, done_log, writer, settings)
            except BaseException as error:
                os.write(writer, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(1)
        os.close(writer)
        with open(reader, "rb") as pipe:
            said = pipe.readline().decode()
        if not said.strip().isdigit():
            os.waitpid(self.pid, 0)
            raise AssertionError(f"the server did not start: {said or 'it died'}")
        self.port = int(said)
        self.status: int | None = None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def client(self) -> Client:
        return Client(self.port)

    def kill(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> int:
        """Wait for the end of the process; return its status, negative for a signal."""
        end = time.monotonic() + PATIENCE
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise AssertionError("the server lives on")
            else:
                time.sleep(0.001)
        return self.status


def _die_with_parent() -> None:
    """A test that is interrupted leaves no servers behind (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class PiecewiseServer(flowserver.FlowServer):
    """Takes bodies of 1000 bytes in pieces, as it takes large ones."""

    def take_buffer(self) -> bytearray:
        return bytearray(450)


def _serve(
    folder: Path,
    disk: Callable[[], Any] | None,
    done_log: Path | None,
    port: int,
    settings: Mapping[str, Any],
) -> None:
    """Be the server until somebody kills it; `port` is where its port is told."""
    values = {"upload_dir": str(folder), "port": 0, "min_free_space": 0, **settings}
    chosen = flowserver.Settings(**values)

    def announce(done: Any) -> None:
        line = json.dumps([done.id, done.relative_path, done.size]) + "\n"
        fd = os.open(done_log or "", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, line.encode())
        os.close(fd)

    store = flowserver.Store(
        chosen.upload_dir,
        chosen.temp_dir,
        chosen.on_conflict,
        disk() if disk else flowserver.Disk(chosen.sync),
        announce if done_log else None,
    )
    app = flowserver.UploadApp(chosen, store=store)
    app.tidy()
    app.tidy = lambda: None  # a thread of the server would make calls at any time
    flowserver._FIRST_SIZE = 300
    with PiecewiseServer(app) as server:
        os.write(port, b"%d\n" % server.server_address[1])
        os.close(port)
        while True:
            signal.pause()


class CommandServer:
    """`python flowserver.py`, as it is started by its users."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                str(SERVER),
                "--config",
                "",
                "--port",
                "0",
                "--upload-dir",
                str(folder),
                "--min-free-space",
                "0",
                "--log-level",
                "error",
                *flags,
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=NO_CONFIG,
        )
        self.pid = self.process.pid
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
            if found:
                self.port = int(found[1])
                return
        raise AssertionError(f"the server ended with {self.process.wait()}")

    def __enter__(self) -> CommandServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def client(self) -> Client:
        return Client(self.port)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()

    def wait(self) -> int:
        status = self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


# ---- the judge -----------------------------------------------------------------------


def finished_files(folder: Path) -> dict[str, bytes]:
    """The bytes of each file in an upload folder, the temp folder left out."""
    found = {}
    for parent, folders, names in os.walk(folder):
        if ".flowserver" in folders:
            folders.remove(".flowserver")
        for name in names:
            path = Path(parent, name)
            with contextlib.suppress(FileNotFoundError):
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def leftovers(folder: Path) -> list[str]:
    """What holds bytes of clients in the temp folder."""
    return sorted(
        path.name
        for path in folder.glob(".flowserver/**/*")
        if path.suffix in (".data", ".part")
    )


def let_an_hour_pass(folder: Path) -> None:
    """Private files of a process that was killed are swept from now on."""
    for part in folder.glob(".flowserver/**/*.part"):
        os.utime(part, (0, 0))


def announcements(done_log: Path) -> list[tuple[str, str]]:
    """Id and path of each file that on_complete was told of, in order."""
    if not done_log.exists():
        return []
    lines = done_log.read_text().splitlines()
    return [(line[0], line[1]) for line in map(json.loads, lines)]


class Watcher(threading.Thread):
    """Looks at every visible file, again and again; what is not a version is wrong."""

    def __init__(self, folder: Path, versions: Iterable[bytes]) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.versions = frozenset(versions)
        self.wrong: dict[str, int] = {}
        self.looks = 0
        self._ending = threading.Event()

    def __enter__(self) -> Watcher:
        self.look()
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        self.join()
        self.look()

    def look(self) -> None:
        for path, data in finished_files(self.folder).items():
            if data not in self.versions:
                self.wrong[path] = len(data)
        self.looks += 1

    def run(self) -> None:
        while not self._ending.wait(0.001):
            self.look()


class AttackCase(unittest.TestCase):
    """Asserts what must be true whatever has happened."""

    def assert_stored_once(self, folder: Path, versions: Iterable[bytes]) -> None:
        """Every version is there whole, in one copy, and nothing besides."""
        found = finished_files(folder)
        names = {data: name for name, data in found.items()}
        wanted = list(versions)
        wrong = [name for name, data in found.items() if data not in wanted]
        self.assertEqual(wrong, [], "wrong files")
        missing = [index for index, data in enumerate(wanted) if data not in names]
        self.assertEqual(
            missing, [], f"versions that are missing; there is {list(found)}"
        )
        self.assertEqual(len(found), len(wanted), f"copies: {sorted(found)}")
        self.assertEqual(leftovers(folder), [], "left in the temp folder")


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Fork cheaply: the child's collector must not touch, and copy, every page."""
    import gc

    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
