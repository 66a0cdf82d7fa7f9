#!/usr/bin/env python3
"""Send files and folders to a flowserver, from a machine without a browser.

    python upload.py http://host:8000 FILE-OR-FOLDER...
    python upload.py https://user:password@host/prefix/ photos report.pdf

Needs Python 3.8 or later and nothing else.  Files travel in chunks, several at a time.
Interrupt it and start it again: what has arrived is not sent a second time.  While the
server can't be reached it tries again, for ever or for as long as --give-up says.

Exit status: 0 all files are there; 1 some are not; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import http.client
import itertools
import json
import os
import re
import secrets
import shutil
import ssl
import stat
import sys
import tempfile
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple
from urllib.parse import quote, unquote, urlsplit

MIB = 1024 * 1024
BLOCK_SIZE = 256 * 1024
MAX_WAIT_SECONDS = 60
MAX_RETRY_AFTER_SECONDS = 600  # whatever the server asks for
TIMEOUT_SECONDS = 90  # more than the server itself waits for a silent connection
STOP_SECONDS = 2  # for requests under way, after Ctrl-C
JOURNAL_SECONDS = 24 * 3600
TOLD_EVERY_SECONDS = 0.2
# What OpenSSL calls an answer that is no TLS, in its several versions.
NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")


class Refused(Exception):
    """The server will not take this, or the file can't be sent: no retry helps."""


class Trouble(Exception):
    """Something that may pass; `wait_seconds` is what the server asked for."""

    def __init__(self, words: str, wait_seconds: int = 0) -> None:
        super().__init__(words)
        self.wait_seconds = wait_seconds


class Stopped(Exception):
    """Ctrl-C was pressed."""


# ---- what is shown


def size_in_words(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def printable(words: str) -> str:
    """Return words of others on one line, unable to command a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


class Progress:
    """One line on a terminal, rewritten; where there is no terminal, news only."""

    def __init__(self, total_size: int) -> None:
        self._total = total_size
        self._sent = 0
        self._moved = 0
        self._began = time.monotonic()
        self._told = 0.0
        self._news = ""
        self._lock = threading.Lock()
        self._has_terminal = sys.stderr.isatty()

    def move(self, size: int) -> None:
        """Count bytes that travelled; a negative size takes back what was lost."""
        with self._lock:
            self._moved += size
        self.skip(size)

    def skip(self, size: int) -> None:
        """Count bytes that need not travel."""
        with self._lock:
            self._sent += size
            now = time.monotonic()
            if self._has_terminal and now - self._told >= TOLD_EVERY_SECONDS:
                self._told = now
                self._rewrite(self._line(now))

    def wait(self, words: str) -> None:
        """Say once why nothing moves."""
        words = printable(words)
        with self._lock:
            if self._has_terminal:
                self._rewrite(words)
            elif words != self._news:
                print(words, file=sys.stderr, flush=True)
            self._news = words

    def say(self, words: str) -> None:
        with self._lock:
            self._rewrite("")
            print(printable(words), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        share = self._sent / self._total if self._total else 1.0
        speed = self._moved / max(now - self._began, 0.001)
        words = f"{size_in_words(self._sent)} of {size_in_words(self._total)}"
        left = (self._total - self._sent) / speed if speed > 0 else 0
        bar = "#" * int(20 * share)
        return (
            f"[{bar:<20}] {100 * share:3.0f} %  {words}"
            f"  {size_in_words(speed)}/s  {left:.0f} s left"
        )

    def _rewrite(self, line: str) -> None:
        if self._has_terminal:
            width = shutil.get_terminal_size().columns - 1
            line = line[:width].ljust(width)
            print(f"\r{line}\r", end="", file=sys.stderr, flush=True)


# ---- the server


class Server:
    """Asks and sends; waits out what may pass, and raises Refused for the rest."""

    def __init__(self, url: str, options: argparse.Namespace, progress: Progress):
        parts = urlsplit(url)
        self._parts = parts
        path = f"{parts.path.rstrip('/')}/{options.upload_path.strip('/')}"
        self._path = quote(path, "/%:@!$&'()*+,;=~", errors="surrogateescape")
        self._headers = {"User-Agent": "flowserver-upload.py"}
        if parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            raw = user.encode("utf-8", "surrogateescape")
            token = base64.b64encode(raw).decode()
            self._headers["Authorization"] = f"Basic {token}"
        self._tls = None
        if parts.scheme == "https":
            self._tls = ssl.create_default_context(cafile=options.certificate)
        self._give_up = options.give_up
        self._last_answer = time.monotonic()
        self._own = threading.local()  # each worker keeps a connection of its own
        self._progress = progress
        self.stop = threading.Event()

    def request(
        self, method: str, query: str, chunk: Optional[Chunk] = None
    ) -> Dict[str, Any]:
        """Return the answer, however long it takes; raises Refused and Stopped."""
        for failures in itertools.count(1):
            try:
                answer = self._request_once(method, query, chunk)
            except Trouble as trouble:
                self._wait(trouble, failures)
            else:
                self._last_answer = time.monotonic()
                return answer
        raise AssertionError("not reached")

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Close what this thread has opened, at its end."""
        try:
            yield
        finally:
            kept = self._own.__dict__.pop("connection", None)
            if kept is not None:
                kept.close()

    def _wait(self, trouble: Trouble, failures: int) -> None:
        silence = time.monotonic() - self._last_answer
        if self._give_up is not None and silence > self._give_up:
            raise Refused(f"{trouble}; given up after {silence:.0f} s")
        growing = min(MAX_WAIT_SECONDS, 2 ** min(failures - 1, 10))
        seconds = trouble.wait_seconds or growing
        self._progress.wait(f"{trouble}, trying again in {seconds} s")
        if self.stop.wait(seconds):
            raise Stopped

    def _request_once(
        self, method: str, query: str, chunk: Optional[Chunk]
    ) -> Dict[str, Any]:
        if self.stop.is_set():
            raise Stopped
        # A kept connection may have been closed meanwhile: that is no trouble yet.
        for connection in self._connections():
            try:
                response = self._exchange(connection, method, query, chunk)
            except ssl.SSLCertVerificationError as error:
                raise Refused(f"the certificate is not trusted: {error}") from error
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if getattr(error, "reason", "") in NOT_TLS:
                    raise Refused("the server does not speak https here") from error
                lost = error
            else:
                self._own.connection = connection
                return self._judge(*response)
        raise Trouble(f"connection lost ({str(lost) or type(lost).__name__})") from lost

    def _connections(self) -> Iterator[http.client.HTTPConnection]:
        kept = self._own.__dict__.pop("connection", None)
        if kept is not None:
            yield kept
        host, port = self._parts.hostname or "", self._parts.port
        if self._tls is None:
            yield http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
        else:
            yield http.client.HTTPSConnection(
                host, port, timeout=TIMEOUT_SECONDS, context=self._tls
            )

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        query: str,
        chunk: Optional[Chunk],
    ) -> Tuple[http.client.HTTPResponse, bytes]:
        headers = dict(self._headers)
        moved = 0
        try:
            connection.putrequest(method, f"{self._path}?{query}")
            if chunk is not None:
                headers["Content-Type"] = "application/octet-stream"
                headers["Content-Length"] = str(chunk.size)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            # A refusal may come, and the connection end, while the body is on its way.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for block in chunk.blocks() if chunk is not None else ():
                    if self.stop.is_set():
                        raise Stopped
                    connection.send(block)
                    moved += len(block)
                    self._progress.move(len(block))
            response = connection.getresponse()
            data = response.read()
        except BaseException:
            self._progress.move(-moved)
            connection.close()
            raise
        if response.status != 200:
            self._progress.move(-moved)
        return response, data

    def _judge(self, response: http.client.HTTPResponse, data: bytes) -> Dict[str, Any]:
        try:
            answer = json.loads(data)
        except ValueError:
            answer = {}
        status = response.status
        if not isinstance(answer, dict):
            answer = {}
        if status == 200 and "status" in answer:
            return answer
        if 300 <= status < 400:
            raise Refused(f"the server is elsewhere: {response.headers['Location']}")
        words = str(answer.get("error") or f"the server answered with status {status}")
        if status == 404:
            words = f"{words.rstrip('.')} ({self._path})"
        if 400 <= status < 500 and status not in (408, 429):
            raise Refused(words)
        if status == 200:
            words = "this answer is not from flowserver"
        wait = response.headers.get("Retry-After", "")
        is_clear = re.fullmatch("[0-9]{1,9}", wait)
        seconds = min(int(wait), MAX_RETRY_AFTER_SECONDS) if is_clear else 0
        raise Trouble(words.rstrip("."), seconds)


# ---- files


class Chunk(NamedTuple):
    """A range of bytes of a file; the number counts from 1."""

    upload: Upload
    number: int
    start: int
    size: int

    def blocks(self) -> Iterator[bytes]:
        """Read the chunk; raises Refused where the file is no longer what it was."""
        left = self.size
        try:
            with open(self.upload.path, "rb") as file:
                number = file.fileno()
                self.upload.check(os.fstat(number))
                file.seek(self.start)
                while left > 0:
                    block = file.read(min(left, BLOCK_SIZE))
                    if not block:
                        raise Refused("the file became shorter while it was sent")
                    left -= len(block)
                    if not left:  # without its last block, the chunk is not stored
                        self.upload.check(os.fstat(number))
                    yield block
        except OSError as error:
            raise Refused(f"can't be read: {error.strerror}") from error


class Upload:
    """One file on its way."""

    def __init__(self, path: str, name: str, secret: str, chunk_size: int) -> None:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "is no file", path)
        self.path = path
        self.name = name
        self.size = found.st_size
        self._modified = found.st_mtime_ns
        self._chunk_size = chunk_size
        # Nobody can guess it; another file of this name, or a changed one, has another.
        where = secret + os.path.abspath(path)
        digest = hashlib.sha256(where.encode("utf-8", "surrogateescape")).hexdigest()
        version = max(0, self._modified // 1_000_000)
        self._identifier = f"flowserver-{digest[:32]}-{version}"
        self.chunk_count = max(1, -(-self.size // chunk_size))
        self.left = 0  # chunks that are not answered yet
        self.saved_as = ""
        self.error = ""

    @property
    def key(self) -> str:
        return json.dumps([self._identifier, self.size, self.name])

    def check(self, found: os.stat_result) -> None:
        if (found.st_size, found.st_mtime_ns) != (self.size, self._modified):
            raise Refused("the file was changed while it was sent")

    def query(self, chunk: Optional[Chunk] = None) -> str:
        parameters: Dict[str, object] = {
            "flowIdentifier": self._identifier,
            "flowFilename": self.name.rpartition("/")[2],
            "flowRelativePath": self.name,
            "flowTotalSize": self.size,
            "flowTotalChunks": self.chunk_count,
        }
        if chunk is not None:
            parameters["flowChunkNumber"] = chunk.number
            parameters["flowChunkSize"] = self._chunk_size
            parameters["flowCurrentChunkSize"] = chunk.size
        return "&".join(
            f"{name}={quote(str(value), safe='', errors='replace')}"
            for name, value in parameters.items()
        )

    def chunks(self) -> Iterator[Chunk]:
        for number in range(1, self.chunk_count + 1):
            start = (number - 1) * self._chunk_size
            yield Chunk(self, number, start, min(self._chunk_size, self.size - start))

    def missing(self, ranges: List[List[int]]) -> List[Chunk]:
        """Return the chunks that no range (they are sorted and merged) holds whole."""
        missing = []
        at = 0
        for chunk in self.chunks():
            while at < len(ranges) and ranges[at][1] < chunk.start + chunk.size:
                at += 1
            if at == len(ranges) or ranges[at][0] > chunk.start:
                missing.append(chunk)
        return missing


def named_files(
    arguments: List[str], complain: Callable[[OSError], None]
) -> Iterator[Tuple[str, str]]:
    """Give the path of every file and the name it shall have at the server."""
    for argument in arguments:
        base = os.path.basename(os.path.abspath(argument))
        if not os.path.isdir(argument):
            yield argument, base
            continue
        for folder, folders, files in os.walk(argument, onerror=complain):
            folders.sort()
            for link in filter(
                os.path.islink, (os.path.join(folder, n) for n in folders)
            ):
                complain(OSError(0, "is a link to a folder, name that itself", link))
            inside = os.path.relpath(folder, argument)
            parts = [base] + ([] if inside == os.curdir else inside.split(os.sep))
            for file in sorted(files):
                yield os.path.join(folder, file), "/".join(filter(None, [*parts, file]))


# ---- what is remembered between two runs


def state_folder() -> str:
    if os.name == "nt":
        base = os.environ.get("APPDATA") or os.path.expanduser("~")
    else:
        base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(base, "flowserver")


def read_secret(path: str) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        with open(path, encoding="ascii") as file:
            kept = file.read().strip()
        if re.fullmatch("[0-9a-f]{32}", kept):
            return kept
    return ""


def secret_of_this_user(folder: str) -> str:
    """Return 128 random bits, the same in every run."""
    path = os.path.join(folder, "secret")
    kept = read_secret(path)
    if kept:
        return kept
    # Never seen half: not by another run that begins now, nor after a crash.
    fresh = secrets.token_hex(16)
    with contextlib.suppress(OSError):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        number, own = tempfile.mkstemp(dir=folder)  # for this user's eyes only
        with open(number, "w", encoding="ascii") as file:
            file.write(fresh)
        os.replace(own, path)
    kept = read_secret(path)
    if kept:
        return kept
    print(f"no secret can be kept in {folder}: no resume later", file=sys.stderr)
    return fresh


class Journal:
    """The one-chunk files that an interrupted run has sent; of larger ones the server
    itself knows.  It is forgotten once a run has sent everything, and after a day."""

    def __init__(self, folder: str, command: List[str]) -> None:
        name = hashlib.sha256("\0".join(command).encode("utf-8", "surrogateescape"))
        self._path = os.path.join(folder, f"unfinished-{name.hexdigest()[:16]}")
        self._lock = threading.Lock()
        self.keys = set(self._read())

    def _read(self) -> List[str]:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if time.time() - os.stat(self._path).st_mtime > JOURNAL_SECONDS:
                os.unlink(self._path)
            with open(self._path, encoding="ascii") as file:
                return file.read().splitlines()
        return []

    def add(self, key: str) -> None:
        with self._lock, contextlib.suppress(OSError):
            with open(self._path, "a", encoding="ascii") as file:
                file.write(key + "\n")

    def forget(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._path)


# ---- sending


class Sender:
    """Several workers that take the next chunk of all files, until none is left."""

    def __init__(
        self,
        server: Server,
        uploads: List[Upload],
        journal: Journal,
        progress: Progress,
    ) -> None:
        self._server = server
        self._journal = journal
        self._progress = progress
        self._lock = threading.Lock()  # for the books of all uploads
        self._taking = threading.Lock()
        self._chunks = self._all_chunks(uploads)

    def run(self, workers: int) -> None:
        """Send everything; raises KeyboardInterrupt when that comes."""
        threads = [
            threading.Thread(target=self._work, daemon=True) for _ in range(workers)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # without a timeout, Windows hears no Ctrl-C
        except KeyboardInterrupt:
            self._server.stop.set()
            end = time.monotonic() + STOP_SECONDS  # for all of them together
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
            raise

    def _work(self) -> None:
        with self._server.connected(), contextlib.suppress(Stopped):
            while True:
                with self._taking:
                    chunk = next(self._chunks, None)
                if chunk is None:
                    return
                with self._failing(chunk.upload):
                    self._send(chunk)

    @contextlib.contextmanager
    def _failing(self, upload: Upload) -> Iterator[None]:
        """A refusal ends the file, not the run."""
        try:
            yield
        except Refused as error:
            with self._lock:
                is_first = not upload.error
                upload.error = str(error)
            if is_first:
                self._progress.say(f"{upload.name}: {error}")

    def _all_chunks(self, uploads: List[Upload]) -> Iterator[Chunk]:
        for upload in uploads:
            missing: List[Chunk] = []
            with self._failing(upload):
                missing = self._plan(upload)
            for chunk in missing:
                if not upload.error:
                    yield chunk

    def _plan(self, upload: Upload) -> List[Chunk]:
        """Find out what is to be sent; a single chunk is sent without a question."""
        missing = list(upload.chunks())
        if upload.chunk_count > 1:
            missing = self._ask(upload)
        elif upload.key in self._journal.keys:
            upload.saved_as = upload.name
            missing = []
        upload.left = len(missing)
        self._progress.skip(upload.size - sum(chunk.size for chunk in missing))
        return missing

    def _ask(self, upload: Upload) -> List[Chunk]:
        """Return what the server has not got; nothing when the file is there."""
        answer = self._server.request("GET", upload.query())
        if answer["status"] == "complete":
            self._finish(upload, answer)
            return []
        # All there but not yet a file (a crash): any chunk, repeated, ends that.
        return upload.missing(answer.get("ranges") or []) or [*upload.chunks()][-1:]

    def _send(self, chunk: Chunk) -> None:
        upload = chunk.upload
        if upload.error:
            return
        answer = self._server.request("POST", upload.query(chunk), chunk)
        if answer["status"] == "complete":
            self._finish(upload, answer)
        with self._lock:
            upload.left -= 1
            is_last = upload.left == 0
        if is_last:
            self._settle(upload)

    def _settle(self, upload: Upload) -> None:
        """Believe that the file is there only when the server has said so."""
        for rounds in itertools.count():
            if upload.saved_as or upload.error:
                return
            if rounds and self._server.stop.wait(min(MAX_WAIT_SECONDS, 2**rounds)):
                raise Stopped
            for chunk in self._ask(upload):
                self._progress.skip(-chunk.size)
                answer = self._server.request("POST", upload.query(chunk), chunk)
                if answer["status"] == "complete":
                    self._finish(upload, answer)

    def _finish(self, upload: Upload, answer: Dict[str, Any]) -> None:
        with self._lock:
            is_first = not upload.saved_as
            upload.saved_as = str(answer.get("path") or upload.name)
        if not is_first:
            return
        if upload.chunk_count == 1:
            self._journal.add(upload.key)
        if upload.saved_as != upload.name:
            self._progress.say(f"{upload.name}: saved as {upload.saved_as}")


# ---- command line


def size_argument(text: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]{0,8})([KMG]?)", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 512K or 8M")
    return int(match[1]) << 10 * " KMG".index(match[2].upper() or " ")


def url_argument(text: str) -> str:
    with contextlib.suppress(ValueError):  # of a port that is no number
        parts = urlsplit(text)
        host = parts.hostname or ""
        host.encode("idna")  # raises what would be raised when it is looked up
        is_host = host and not re.search(r"[\s\x00-\x20\x7f]", host)
        if parts.scheme in ("http", "https") and is_host and parts.port != 0:
            return text
    raise argparse.ArgumentTypeError(f"{text!r} is not like http://host:8000")


def parse_arguments(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Send files and folders to a flowserver; what is there already is"
        " not sent again.",
        epilog="Exit status: 0 all files are there; 1 some are not; 2 wrong usage;"
        " 130 interrupted.",
    )
    parser.add_argument("url", type=url_argument, help="http://[user:pass@]host:port")
    parser.add_argument("paths", nargs="+", metavar="FILE-OR-FOLDER")
    parser.add_argument(
        "--chunk-size",
        type=size_argument,
        default=MIB,
        metavar="SIZE",
        help="as 512K or 8M; larger is faster [1M]",
    )
    parser.add_argument(
        "--parallel", type=int, default=3, metavar="N", help="chunks at a time [3]"
    )
    parser.add_argument(
        "--upload-path",
        default="/upload",
        metavar="PATH",
        help="what the server's setting upload_path says [/upload]",
    )
    parser.add_argument(
        "--certificate", metavar="FILE", help="trust this certificate (PEM), for https"
    )
    parser.add_argument(
        "--give-up",
        type=float,
        metavar="SECONDS",
        help="of a server that can't be reached for so long; else it tries for ever",
    )
    options = parser.parse_args(argv)
    if not 1 <= options.parallel <= 64:
        parser.error("--parallel must be 1 to 64")
    return options


def collect(options: argparse.Namespace, secret: str) -> Tuple[List[Upload], int]:
    """Return what is to be sent, and how much of it can't be read."""
    uploads: List[Upload] = []
    complaints: List[str] = []

    def complain(error: OSError) -> None:
        complaints.append(printable(f"{error.filename}: {error.strerror}"))
        print(complaints[-1], file=sys.stderr)

    for path, name in named_files(options.paths, complain):
        try:
            upload = Upload(path, name, secret, options.chunk_size)
        except OSError as error:
            complain(error)
        else:
            uploads.append(upload)
    return uploads, len(complaints)


def run(options: argparse.Namespace) -> int:
    folder = state_folder()
    uploads, failed = collect(options, secret_of_this_user(folder))
    target = [options.url, options.upload_path]
    journal = Journal(folder, target + [os.path.abspath(one) for one in options.paths])
    progress = Progress(sum(upload.size for upload in uploads))
    server = Server(options.url, options, progress)
    Sender(server, uploads, journal, progress).run(options.parallel)
    sent = sum(bool(upload.saved_as) for upload in uploads)
    failed += len(uploads) - sent
    if not failed:
        journal.forget()
    progress.say(f"{sent} of {sent + failed} files are there")
    return 1 if failed else 0


def main(argv: Optional[List[str]] = None) -> int:
    options = parse_arguments(argv)
    if sys.stderr is None:  # closed by whoever has started it (2>&-)
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    try:
        return run(options)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command sends the rest", file=sys.stderr)
        return 130
    except OSError as error:  # only the certificate is still read unguarded
        print(f"{options.certificate}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
