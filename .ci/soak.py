"""Fifty connections for ten minutes, half of it broken: does anything pile up?

    soak.py [--seconds 600] [--first 60] [--connections 50] [--rate 150] [--tls]
            [--arenas]

Runs the server as a process of its own, attacks it, and looks at its threads,
descriptors and memory when `first` seconds have passed and at the end, each time after
all connections were closed. The number of requests is bounded by `rate` a second, the
number of files by their names. Exit status 1 when the server has a thread, a
descriptor or a megabyte more at the end, has died, or has logged a mistake of its own.

The server gets one arena of memory, so that its size shows what it holds. With --arenas
glibc spreads what is free over many, as it does for every program with threads: that
was 3 MiB more after ten minutes, flat at the end of them.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import hostile_cases as cases

HERE = Path(__file__).resolve().parent
SERVER = Path(os.environ.get("FLOWSERVER_FILE", HERE.parent / "flowserver.py"))
KIB = 1024
NAMES = 200
ALWAYS = 3  # threads: one waits for the end, one for connections, one tidies


class Figures(NamedTuple):
    """What a process holds."""

    threads: int
    descriptors: int
    memory: float  # resident, in MiB

    def __str__(self) -> str:
        return (
            f"{self.threads} threads, {self.descriptors} descriptors,"
            f" {self.memory:.1f} MiB"
        )


def figures(pid: int) -> Figures:
    """Return what /proc says of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    threads = re.search(r"Threads:\s+(\d+)", status)
    memory = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert threads and memory
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return Figures(int(threads[1]), descriptors, int(memory[1]) / 1024)


class Attacker:
    """One of many: a connection at a time, a request after the other."""

    def __init__(self, port: int, seed: int, context: ssl.SSLContext | None) -> None:
        self.port = port
        self.dice = random.Random(seed)
        self.context = context
        self.socket: socket.socket | None = None
        self.answers: collections.Counter[str] = collections.Counter()

    def run(self, wait: Callable[[], bool]) -> None:
        """Attack as long as `wait` says so; then let go."""
        while wait():
            try:
                word = self.good() if self.dice.random() < 0.5 else self.bad()
            except OSError:
                word = "cut"
                self.close()
            self.answers[word] += 1
        self.close()

    def close(self, rudely: bool = False) -> None:
        if self.socket is not None:
            if rudely:  # a reset instead of an end
                linger = struct.pack("ii", 1, 0)
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.socket.close()
            self.socket = None

    def connect(self) -> socket.socket:
        if self.socket is None:
            plain = socket.create_connection(("127.0.0.1", self.port), timeout=20)
            self.socket = plain
            if self.context is not None:
                self.socket = self.context.wrap_socket(plain)
        return self.socket

    def ask(self, data: bytes) -> str:
        """Send a request, return the status of its answer."""
        connection = self.connect()
        connection.sendall(data)
        held = b""
        while b"\r\n\r\n" not in held:
            held += self.received(connection)
        head, _, body = held.partition(b"\r\n\r\n")
        found = re.search(rb"(?i)content-length: (\d+)", head)
        size = int(found[1]) if found and not data.startswith(b"HEAD") else 0
        while len(body) < size:
            body += self.received(connection)
        if b"connection: close" in head.lower():
            self.close()
        return head.split(b" ")[1].decode()

    def received(self, connection: socket.socket) -> bytes:
        block = connection.recv(65536)
        if not block:
            raise ConnectionError("closed")
        return block

    # Half of it is what clients do.

    def good(self) -> str:
        name = f"{self.dice.randrange(NAMES)}.bin"
        match self.dice.randrange(6):
            case 0:
                return self.ask(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            case 1:
                return self.ask(b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            case 2 | 3:
                return self.ask(self.chunk(name, 1, 1, form=self.dice.random() < 0.5))
            case 4:
                words = [self.ask(self.chunk(name, n, 3)) for n in (2, 1, 3)]
                return words[-1]
            case _:
                self.ask(self.chunk(name, 1, 3))
                target = f"/upload?{self.query(name, 1, 3)}"
                self.ask(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                return self.ask(
                    f"DELETE {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
                )

    def query(self, name: str, number: int, count: int, size: int = 20 * KIB) -> str:
        # Who finishes an upload leaves a receipt: there are to be as many after the
        # first minute as at the end, so the names of uploads are few and shared.
        once = f"-{self.dice.random()}" if count == 1 else ""
        return urllib.parse.urlencode(
            {
                "flowChunkNumber": number,
                "flowChunkSize": size,
                "flowCurrentChunkSize": size,
                "flowTotalSize": size * count,
                "flowIdentifier": name + once,
                "flowFilename": name,
                "flowRelativePath": f"{number % 3}/{name}" if count == 1 else name,
                "flowTotalChunks": count,
            }
        )

    def chunk(self, name: str, number: int, count: int, form: bool = False) -> bytes:
        body = bytes([number]) * 20 * KIB
        query, kind = "?" + self.query(name, number, count), ""
        if form:
            pairs = urllib.parse.parse_qsl(query[1:])
            parts = [
                cases.part(f'form-data; name="{k}"'.encode(), v.encode())
                for k, v in pairs
            ]
            body = cases.form(
                *parts, cases.part(b"form-data; name=f; filename=f", body)
            )
            query, kind = "", "Content-Type: multipart/form-data; boundary=boundary\r\n"
        head = f"POST /upload{query} HTTP/1.1\r\nHost: localhost\r\n{kind}"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    # Half of it is what they do not.

    def bad(self) -> str:
        name = f"{self.dice.randrange(NAMES)}.bin"
        data = self.chunk(name, 1, 3, form=self.dice.random() < 0.5)
        match self.dice.randrange(10):
            case 0:
                return self.ask(self.dice.choice(cases.HEADS).head + b"\r\n\r\n")
            case 1:
                return self.broken_form()
            case 2:  # gone in the middle of the body
                self.connect().sendall(data[: self.dice.randrange(len(data))])
                self.close(rudely=self.dice.random() < 0.5)
            case 3:  # gone in the middle of the head
                self.connect().sendall(data[: self.dice.randrange(1, 100)])
                self.close(rudely=self.dice.random() < 0.5)
            case 4:  # gone before the answer
                self.connect().sendall(data)
                self.close(rudely=True)
            case 5:
                return self.ask(
                    data.replace(b"\r\n", b"\r\nOrigin: http://evil\r\n", 1)
                )
            case 6:
                return self.ask(data.replace(b"localhost", b"evil.example", 1))
            case 7:
                return self.ask(
                    data.replace(b"flowChunkNumber=1", b"flowChunkNumber=+1")
                )
            case 8:  # slower than the server's patience
                self.connect().sendall(data[: len(data) // 2])
                time.sleep(self.dice.choice((0.1, 1.5)))
                self.connect().sendall(data[len(data) // 2 :])
                self.close()
            case _:  # too large, and written to the end
                body = bytes(300 * KIB)
                query = self.query(name, 1, 1, len(body))
                head = f"POST /upload?{query} HTTP/1.1\r\nHost: localhost\r\n"
                head += f"Content-Length: {len(body)}\r\n\r\n"
                return self.ask(head.encode() + body)
        return "gone"

    def broken_form(self) -> str:
        bad = [body for body in cases.BODIES if body.parts is None]
        body = self.dice.choice(bad)
        kind = b"multipart/form-data; boundary=" + body.boundary
        return self.ask(
            b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Type: %b\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (kind, len(body.body), body.body)
        )


class Crowd:
    """The attackers of one phase, bounded in their number of requests."""

    def __init__(self, attackers: list[Attacker], rate: float) -> None:
        self.attackers = attackers
        self.rate = rate

    def attack(self, seconds: float) -> None:
        """Let all of them attack for a while; return when they have let go."""
        end, began, lock = (
            time.monotonic() + seconds,
            time.monotonic(),
            threading.Lock(),
        )
        left = [int(seconds * self.rate)]
        stop = threading.Event()

        def wait() -> bool:
            """Pass one request on when it is due; False when it is over."""
            with lock:
                left[0] -= 1
                number = seconds * self.rate - left[0]
            pause = began + number / self.rate - time.monotonic()
            return (
                left[0] >= 0
                and not stop.wait(max(0.0, min(pause, end - time.monotonic())))
                and time.monotonic() < end
            )

        threads = [threading.Thread(target=a.run, args=(wait,)) for a in self.attackers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def answers(self) -> collections.Counter[str]:
        return sum((a.answers for a in self.attackers), collections.Counter())


@contextlib.contextmanager
def running(
    tls: bool, arenas: bool = False
) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """Run the server in a folder of its own; yield it, its port and its log."""
    folder = Path(tempfile.mkdtemp())
    flags = ["--port", "0", "--upload-dir", str(folder / "uploads"), "--timeout", "1"]
    flags += ["--on-conflict", "replace", "--max-file-size", "200K", "--sync", "off"]
    flags += ["--keep-receipts", "10s", "--stale-after", "20s", "--min-free-space", "0"]
    if tls:
        flags += make_certificate(folder)
    log = open(folder / "log", "wb")
    output = open(folder / "output", "wb")
    process = subprocess.Popen(
        [sys.executable, str(SERVER), "--config", "", *flags],
        stdout=output,
        stderr=log,
        env=os.environ if arenas else {**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    try:
        yield process, port_of(process, folder / "output"), folder / "log"
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            log.close()
            output.close()
            shutil.rmtree(folder, ignore_errors=True)


def make_certificate(folder: Path) -> list[str]:
    chain, key = str(folder / "certificate.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj"]
    command += ["/CN=localhost", "-keyout", key, "-out", chain]
    subprocess.run(command, check=True, capture_output=True)
    return ["--certificate", chain, "--private-key", key]


def port_of(process: subprocess.Popen[bytes], output: Path) -> int:
    for _ in range(400):
        found = re.search(r"https?://[^:/]+:(\d+)/", output.read_text())
        if found:
            return int(found[1])
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise SystemExit("the server did not start")


def at_rest(pid: int) -> Figures:
    """Return the figures when all that waited for an end (1 s, then 2 s) has ended."""
    time.sleep(5)
    found = figures(pid)
    for _ in range(50):  # a busy machine takes its time
        if found.threads <= ALWAYS:
            break
        time.sleep(0.1)
        found = figures(pid)
    return found


@contextlib.contextmanager
def watching(pid: int, first: float) -> Iterator[None]:
    """Say each minute what is held in the middle of it, to see what grows and when."""
    over = threading.Event()

    def watch() -> None:
        minutes = 0
        while not over.wait(60):
            minutes += 1
            print(f"  {first + 60 * minutes:g} s, attacked: {figures(pid)}", flush=True)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def soak(
    seconds: float,
    first: float,
    connections: int,
    rate: float,
    tls: bool = False,
    arenas: bool = False,
) -> tuple[Figures, Figures, collections.Counter[str], str]:
    """Return the figures after `first` seconds and after all, the answers, the log."""
    context = ssl._create_unverified_context() if tls else None
    with running(tls, arenas) as (process, port, log):
        attackers = [Attacker(port, seed, context) for seed in range(connections)]
        crowd = Crowd(attackers, rate)
        crowd.attack(first)
        early = at_rest(process.pid)
        print(f"after {first:g} s: {early}", flush=True)
        with watching(process.pid, first):
            crowd.attack(seconds - first)
        late = at_rest(process.pid)
        print(f"after {seconds:g} s: {late}", flush=True)
        if process.poll() is not None:
            raise SystemExit("the server has died")
        return early, late, crowd.answers(), log.read_text(errors="replace")


def complaints(early: Figures, late: Figures, log: str) -> list[str]:
    """Return what is wrong."""
    wrong = []
    if late.threads > early.threads:
        wrong.append(f"{late.threads - early.threads} threads more")
    if late.descriptors > early.descriptors:
        wrong.append(f"{late.descriptors - early.descriptors} descriptors more")
    if late.memory >= early.memory + 1:
        wrong.append(f"{late.memory - early.memory:.1f} MiB more")
    wrong += re.findall(r".*(?:Traceback|bug of flowserver).*", log)[:5]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--first", type=float, default=60)
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--rate", type=float, default=150)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--arenas", action="store_true")
    given: Any = parser.parse_args()
    early, late, answers, log = soak(**vars(given))
    print(f"{answers.total()} requests:", end=" ")
    print(", ".join(f"{word} {count}" for word, count in sorted(answers.items())))
    wrong = complaints(early, late, log)
    for complaint in wrong:
        print("WRONG:", complaint)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
