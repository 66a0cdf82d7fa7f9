"""Nothing gets dearer with the number of chunks, uploads, files or connections.

Counted are the calls to the operating system and the bytes that they move, and compared
is what is early with what is late; seconds are compared only with each other, as CPU
time of this thread, the best of several stretches: this machine may have other work.

FLOWSERVER_FILE names another flowserver.py, to see these tests fail on a broken one.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from attack import HERE, SERVER, disk_calls, flowserver, quick_folder

BENCHMARK = HERE.parent / "sample" / "benchmark.py"

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# Calls beside those that are compared: another look at a name, a file opened again.
FEW = 4
# Beside the names of the operations, what they moved.
BYTES, NAMES = "bytes read and written", "names listed"


class MeteredDisk(flowserver.Disk):
    """Counts the bytes and names that go through it."""

    def __init__(self) -> None:
        super().__init__(sync=False)
        self.calls: collections.Counter[str] = collections.Counter()

    def read_once(self, fd: int, size: int, offset: int) -> bytes:
        block: bytes = super().read_once(fd, size, offset)
        self.calls[BYTES] += len(block)
        return block

    def write(self, fd: int, block: bytes | memoryview, offset: int) -> None:
        self.calls[BYTES] += len(block)
        super().write(fd, block, offset)

    def list(self, path: str) -> list[str]:
        names = os.listdir(path)
        self.calls[NAMES] += len(names)
        return names


class CountingDisk(MeteredDisk):
    """Counts the calls of each kind as well."""


def _counted(name: str) -> Callable[..., object]:
    def call(disk: CountingDisk, *arguments: object) -> object:
        disk.calls[name] += 1
        return getattr(super(CountingDisk, disk), name)(*arguments)

    return call


for kind in disk_calls():
    setattr(CountingDisk, kind, _counted(kind))


class SparseDisk(CountingDisk):
    """Makes a hole where ZEROS are to be written: 20 GiB of them take no room."""

    ZEROS = memoryview(bytes(MIB))

    def write(self, fd: int, block: bytes | memoryview, offset: int) -> None:
        if isinstance(block, memoryview) and block.obj is self.ZEROS.obj:
            self.calls[BYTES] += len(block)
            os.truncate(fd, max(offset + len(block), os.fstat(fd).st_size))
        else:
            super().write(fd, block, offset)


class GrowthTest(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="growth-")
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def store(self, disk: CountingDisk) -> Any:
        return flowserver.Store(os.path.join(self.folder, "uploads"), disk=disk)

    def assert_no_dearer(self, late: Any, early: Any, factor: float = 1.5) -> None:
        """Compare counted calls: each kind may have grown by a factor and a few."""
        for what in late | early:
            with self.subTest(what):
                room = FEW * KIB if what == BYTES else FEW
                self.assertLessEqual(late[what], early[what] * factor + room)


def upload_of(name: str, size: int) -> Any:
    key = flowserver.upload_key("", "", name, name, size)
    return flowserver.Upload(key, name, size, "", name)


def put(store: Any, upload: Any, start: int, block: bytes | memoryview) -> Any:
    """Store one chunk that comes in one block."""
    with store.receive(upload, start, start + len(block)) as body:
        body.write(block)
        return body.commit()


class Cost(NamedTuple):
    """CPU time of this thread, and what was asked of the operating system."""

    seconds: float
    calls: Any


def cost_of(disk: CountingDisk, work: Callable[[], object]) -> Cost:
    """Return what `work` costs."""
    before, began = disk.calls.copy(), time.thread_time()
    work()
    seconds = time.thread_time() - began
    return Cost(seconds, disk.calls - before)


def calls_of(disk: CountingDisk, work: Callable[[], object]) -> Any:
    """Return what `work` asks of the operating system."""
    return cost_of(disk, work).calls


def number_of(calls: Any) -> int:
    """Return how many calls there were."""
    return sum(count for what, count in calls.items() if what not in (BYTES, NAMES))


def best_seconds(costs: Iterable[Cost]) -> float:
    """Return the CPU time of the cheapest of some pieces of work alike."""
    return min(cost.seconds for cost in costs)


class ChunksTest(GrowthTest):
    CHUNK = b"16 bytes of data"
    COUNT = 100_800

    def put_all(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            put(self.uploads, self.upload, number * len(self.CHUNK), self.CHUNK)

    def compare(self, order: list[int]) -> None:
        """Store chunks in this order; compare the last ones with the first of others.

        Old and young upload take turns: other work on this machine costs both.
        """
        disk = CountingDisk()
        self.uploads = self.store(disk)
        turns, stretch = 40, 20  # a quiet machine needs ten turns
        old, size = order[: -turns * stretch], (self.COUNT + 1) * len(self.CHUNK)
        self.upload = upload_of("old.bin", size)
        self.put_all(old)
        early: list[Cost] = []
        late: list[Cost] = []
        for turn in range(turns):
            at = turn * stretch
            self.upload = upload_of("old.bin", size)
            late.append(self.cost(disk, order[len(old) :][at : at + stretch]))
            self.upload = upload_of(f"young {turn}.bin", size)
            self.put_all(order[:10])
            early.append(self.cost(disk, order[10 : 10 + stretch]))
            if turn >= 9 and best_seconds(late) <= 1.5 * best_seconds(early):
                break
        self.assert_no_dearer(late[-1].calls, early[-1].calls)
        self.assertLessEqual(best_seconds(late), 1.5 * best_seconds(early))

    def cost(self, disk: CountingDisk, numbers: list[int]) -> Cost:
        return cost_of(disk, lambda: self.put_all(numbers))

    def test_chunk_100000_costs_what_chunk_10_costs(self) -> None:
        self.compare(list(range(self.COUNT)))

    def test_chunk_costs_the_same_among_50000_gaps(self) -> None:
        """Every other chunk: no range has a neighbour to be joined with."""
        self.compare(list(range(0, self.COUNT, 2)))

    def test_chunk_that_comes_again_costs_the_same_after_10000(self) -> None:
        # In memory: ext4 takes now and then ten times as long for a new file.
        self.folder = str(quick_folder("growth-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        disk, count = CountingDisk(), 10_000
        self.uploads = self.store(disk)
        for number in range(3):
            self.upload = upload_of(f"again{number}.bin", count * len(self.CHUNK))
            self.put_all(range(count))
            costs = [
                self.cost(disk, list(range(low, low + 100)))
                for low in range(0, count, 100)
            ]
            ratio = best_seconds(costs[-10:]) / best_seconds(costs[:10])
            if ratio <= 2:
                return
        self.fail(f"the last chunks cost {ratio:.1f} times what the first ones did")


class LastChunkTest(GrowthTest):
    SIZE = 20 * GIB
    CHUNK = 64 * MIB

    def put_chunk(self, store: Any, upload: Any, start: int) -> None:
        with store.receive(upload, start, start + self.CHUNK) as body:
            for _ in range(0, self.CHUNK, len(SparseDisk.ZEROS)):
                body.write(SparseDisk.ZEROS)
            self.progress = body.commit()

    def costs(self, name: str) -> list[Cost]:
        """Store one file; return what its chunks cost."""
        disk = SparseDisk()
        store, upload = self.store(disk), upload_of(name, self.SIZE)
        costs = [
            cost_of(disk, lambda start=start: self.put_chunk(store, upload, start))  # type: ignore
            for start in range(0, self.SIZE, self.CHUNK)
        ]
        self.assertIsNotNone(self.progress.done)
        self.assertEqual(os.path.getsize(self.progress.done.path), self.SIZE)
        return costs

    def test_last_chunk_of_20_gib_costs_at_most_two_middle_ones(self) -> None:
        """Finishing must not copy, read or count what is stored already."""
        lasts: list[Cost] = []
        middles: list[Cost] = []
        for number in range(9):  # a quiet machine needs three files
            costs = self.costs(f"{number}.bin")
            lasts.append(costs[-1])
            middles.append(costs[len(costs) // 2])
            last, middle = lasts[-1].calls, middles[-1].calls
            self.assertLessEqual(last[BYTES], middle[BYTES] + FEW * KIB)
            self.assertLessEqual(number_of(last), 2 * number_of(middle))
            if number >= 2 and best_seconds(lasts) <= 2 * best_seconds(middles):
                break
        self.assertLessEqual(best_seconds(lasts), 2 * best_seconds(middles))


class OpenUploadsTest(GrowthTest):
    COUNT = 10_000

    def test_10000_open_uploads_slow_nothing_but_start_up(self) -> None:
        disk = CountingDisk()
        store = self.store(disk)
        files = [
            lambda n=n: put(store, upload_of(f"{n}.bin", 9), 0, b"all of it")
            for n in range(20)
        ]
        chunks = [
            lambda n=n: put(store, upload_of(f"{n}.dat", 10**6), 0, b"first")
            for n in range(20)
        ]
        early = [calls_of(disk, work) for work in files[:10] + chunks[:10]]
        for number in range(self.COUNT):
            put(store, upload_of(f"open {number}", 10**6), 0, b"the beginning")
        late = [calls_of(disk, work) for work in files[10:] + chunks[10:]]
        for before, after in zip(
            early[-10:] + early[:10], late[-10:] + late[:10], strict=True
        ):
            self.assert_no_dearer(after, before, factor=1)
        self.check_start_up()

    def check_start_up(self) -> None:
        """See it take a bounded number of calls for each upload; print its seconds."""
        disk = CountingDisk()

        def start() -> None:
            store = self.store(disk)
            store.sweep(stale_after=86400, keep_receipts=86400)
            self.assertGreaterEqual(store.open_uploads, self.COUNT)

        costs = [cost_of(disk, start) for _ in range(3)]
        self.assertLess(number_of(disk.calls), 3 * 20 * self.COUNT)
        print(f"{best_seconds(costs):.2f} s to start with {self.COUNT:,} open uploads")

    def test_chunk_40_costs_what_chunk_10_costs_in_1000_uploads_by_turns(self) -> None:
        """As many as max_connections: what is known of each must not be read anew."""
        disk = CountingDisk()
        store = self.store(disk)
        uploads = [upload_of(f"{number}.bin", 10**6) for number in range(1000)]

        def put_each(number: int) -> None:
            for upload in uploads:
                put(store, upload, number * 10, b"ten bytes.")

        calls = [calls_of(disk, lambda n=n: put_each(n)) for n in range(41)]
        self.assert_no_dearer(calls[40], calls[10])


class NamesTest(GrowthTest):
    COUNT = 10_000

    def test_10000_files_of_one_name_do_not_slow_the_next(self) -> None:
        """Free numbers are not looked for from 1 on."""
        disk = CountingDisk()
        store = self.store(disk)

        def one_more(text: bytes) -> Any:
            upload = upload_of("a.bin", len(text))
            return calls_of(disk, lambda: put(store, upload, 0, text))

        one_more(b"first")
        few = one_more(b"the second")
        for number in range(2, self.COUNT):
            path = os.path.join(self.folder, "uploads", f"a ({number}).bin")
            with open(path, "wb") as file:
                file.write(b"x" * 50)
        many = one_more(b"one of ten thousand")
        names = os.listdir(os.path.join(self.folder, "uploads"))
        self.assertIn(f"a ({self.COUNT}).bin", names)
        looks = 2 * self.COUNT.bit_length()  # doubling up, then halving
        self.assertLessEqual(number_of(many), number_of(few) + looks + FEW)
        self.assertLessEqual(many[BYTES], few[BYTES] + FEW * KIB)


class MemoryTest(GrowthTest):
    CONNECTIONS = 64
    CHUNK = 8 * MIB

    @contextlib.contextmanager
    def serving(self) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
        command = [sys.executable, str(SERVER), "--config", "", "--port", "0"]
        command += ["--upload-dir", os.path.join(self.folder, "uploads")]
        command += ["--sync", "off", "--log-level", "warning"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout
                line = process.stdout.readline().decode()
                port = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
                assert port, line
                yield process, int(port[1])
            finally:
                process.terminate()
                process.wait(20)

    def send(
        self, port: int, number: int, half: threading.Barrier, last: bytes
    ) -> None:
        """Send a chunk; wait in its middle until all others are there as well."""
        with socket.create_connection(("127.0.0.1", port), 60) as connection:
            head, body = self.message(number, last)
            connection.sendall(head + body[: self.CHUNK // 2])
            half.wait(60)
            connection.sendall(body[self.CHUNK // 2 :])
            self.answers.append(connection.recv(4096)[:12])

    def message(self, number: int, last: bytes) -> tuple[bytes, bytes]:
        """Return a chunk of zeros and a last byte as flow.js sends it, as a form."""
        fields = {
            "flowChunkNumber": number,
            "flowChunkSize": self.CHUNK,
            "flowCurrentChunkSize": self.CHUNK,
            "flowTotalSize": self.CHUNK * (self.CONNECTIONS + 1),
            "flowIdentifier": "memory",
            "flowFilename": "memory.bin",
            "flowRelativePath": "memory.bin",
            "flowTotalChunks": self.CONNECTIONS + 1,
        }
        part = '--xyz\r\nContent-Disposition: form-data; name="'
        text = "".join(f'{part}{k}"\r\n\r\n{v}\r\n' for k, v in fields.items())
        text += f'{part}file"; filename="blob"\r\n\r\n'
        form = text.encode() + bytes(self.CHUNK - 1) + last + b"\r\n--xyz--\r\n"
        head = "POST /upload HTTP/1.1\r\nHost: localhost\r\n"
        head += "Content-Type: multipart/form-data; boundary=xyz\r\n"
        return f"{head}Content-Length: {len(form)}\r\n\r\n".encode(), form

    @unittest.skipUnless(os.path.exists("/proc/self/status"), "needs /proc")
    def test_64_connections_of_8_mib_chunks_need_less_than_32_mib(self) -> None:
        """Whether they are new, come again, or differ from a file in their last byte"""
        with self.serving() as (process, port):
            before = self.peak(process)
            self.send_all(port, self.CONNECTIONS, b"\0")
            self.send_all(port, self.CONNECTIONS, b"\0")
            self.send_all(port, 1, b"\0", self.CONNECTIONS + 1)  # the file is finished
            self.send_all(port, self.CONNECTIONS, b"\1")
            self.assertLess(self.peak(process) - before, 32 * KIB)

    def send_all(self, port: int, count: int, last: bytes, first: int = 1) -> None:
        self.answers: list[bytes] = []
        half = threading.Barrier(count)
        threads = [
            threading.Thread(target=self.send, args=(port, number, half, last))
            for number in range(first, first + count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        self.assertEqual(self.answers, [b"HTTP/1.1 200"] * count)

    def peak(self, process: subprocess.Popen[bytes]) -> int:
        """Return the most memory that it has ever had, in KiB."""
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s*(\d+)", status)
        assert found
        return int(found[1])


class BenchmarkTest(GrowthTest):
    def test_quick_benchmark_prints_all_rows_and_leaves_nothing(self) -> None:
        command = [sys.executable, str(BENCHMARK), "--quick", "--folder", self.folder]
        run = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if "where a flush means nothing" in run.stdout:
            self.assertEqual(run.returncode, 2)
            command += ["--sync", "off"]
            run = subprocess.run(command, capture_output=True, text=True, timeout=600)
        self.assertEqual(run.returncode, 0, run.stdout + run.stderr)
        for title in ("1 MiB chunks", "16 MiB chunks", "4 KiB files", "test requests"):
            self.assertRegex(run.stdout, rf"\| {title}.*\| flowserver \|")
        self.assertIn("64 connections", run.stdout)
        self.assertRegex(run.stdout, r"(met|missed) +sync off, 1 MiB chunks, octet")
        self.assertEqual(os.listdir(self.folder), [])


if __name__ == "__main__":
    unittest.main()
