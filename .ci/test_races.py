"""Races: thousands of uploads over 16 connections, with everything that goes wrong.

Chunks are shuffled; 15 % come twice, during the upload or after it; 5 % of the bodies
are cut; some are overtaken by a second attempt; last chunks are released by a barrier,
so that their last bytes arrive at once. Some files have a twin: another one of that
name, size and identifier, which somebody else sends meanwhile. Against one process, and
against four over one folder: no file is wrong, none is there twice, on_complete is
called once for each; nobody is told to send a chunk again that was sent only once.

FLOWSERVER_RACES is the number of uploads; unset, a number that CI has time for.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import shutil
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flask_like_sample
from attack import (
    PATIENCE,
    Answer,
    AttackCase,
    Client,
    File,
    HalfSent,
    Server,
    announcements,
    finished_files,
    flowserver,
    leftovers,
    noise,
    without_collector,
)

UPLOADS = int(os.environ.get("FLOWSERVER_RACES") or 1000)
CONNECTIONS = 16
GROUP = 40  # uploads that are under way at one time


class Task(NamedTuple):
    """One thing for a connection to do with a chunk."""

    file: File
    number: int
    kind: str  # post, cut or retry


class Span(NamedTuple):
    """When a body was under way."""

    number: int
    begin: float
    end: float


class Race:
    """Uploads, sent by as many threads as there are connections."""

    def __init__(self, ports: list[int], uploads: int, seed: int) -> None:
        self.ports = ports
        self.rng = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.refused: list[str] = []
        self.spans: dict[File, list[Span]] = {}
        self.attempts: collections.Counter[tuple[File, int]] = collections.Counter()
        self.lock = threading.Lock()
        self.barrier = threading.Barrier(CONNECTIONS, timeout=PATIENCE)
        self.turn = threading.Barrier(CONNECTIONS, self.next_group, timeout=PATIENCE)
        self.files: list[File] = []
        for index in range(uploads):
            self.files.append(self.make_file(index))
        self.left: list[Task] = []
        self.ends: list[tuple[File, int]] = []
        self.finished: list[File] = []
        self.groups = iter(
            [self.files[low : low + GROUP] for low in range(0, uploads, GROUP)]
        )
        self.group: list[File] | None = None
        self.is_over = False
        self.failure: BaseException | None = None

    def make_file(self, index: int) -> File:
        if index % 10 == 9:  # a twin of the one before it
            twin = self.files[-1]
            data = noise(len(twin.data), index)
            return twin._replace(data=data, address="127.0.0.2")
        chunk_size = self.rng.choice((700, 3000, 9000))
        count = self.rng.randint(1, 6)
        if index % 50 == 0:  # its ledger is cut down at the end
            chunk_size, count = 200, 60
        size = count * chunk_size + self.rng.randrange(chunk_size)
        return File(f"folder {index % 7}/{index}.bin", noise(size, index), chunk_size)

    # What is to be done

    def next_group(self) -> None:
        """Lay out the work for the next uploads; one thread does it for all."""
        again = [
            Task(file, self.rng.randint(1, file.count), "post")
            for file in self.finished
            if self.rng.random() < 0.3
        ]
        self.counts["repeated after the end"] += len(again)
        self.finished = self.group or []
        self.group = next(self.groups, None)
        self.left, self.ends = again, []
        for file in self.group or []:
            numbers = list(range(1, file.count + 1))
            self.rng.shuffle(numbers)
            held = self.rng.randint(1, min(2, file.count))  # for the barrier
            for number in numbers[held:]:
                self.left += self.tasks(file, number)
            self.ends += [(file, number) for number in numbers[:held] * (3 - held)]
        self.rng.shuffle(self.left)
        self.is_over = self.group is None and not self.left

    def tasks(self, file: File, number: int) -> Iterator[Task]:
        chance = self.rng.random()
        if chance < 0.05:
            yield Task(file, number, "cut")
        if 0.05 <= chance < 0.20:
            yield Task(file, number, "post")
            self.counts["repeated"] += 1
        yield Task(file, number, "retry" if chance > 0.95 else "post")

    # How it is done

    def run(self) -> None:
        threads = [
            threading.Thread(target=self.work, args=(index,), daemon=True)
            for index in range(CONNECTIONS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def work(self, index: int) -> None:
        try:
            with contextlib.ExitStack() as stack:
                clients = {
                    (port, address): stack.enter_context(Client(port, address))
                    for port in self.ports
                    for address in ("127.0.0.1", "127.0.0.2")
                }
                self.turn.wait()
                while not self.is_over:
                    self.work_on_group(index, clients)
                    self.turn.wait()
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            self.failure = error
            self.turn.abort()
            self.barrier.abort()

    def work_on_group(self, index: int, clients: dict[tuple[int, str], Client]) -> None:
        rng = random.Random(index)
        while True:
            with self.lock:
                task = self.left.pop() if self.left else None
            if task is None:
                break
            self.act(task, clients[rng.choice(self.ports), task.file.address])
        # Two connections for each end, eight ends at one time.
        for low in range(0, 2 * GROUP, CONNECTIONS):
            file, number = None, 0
            if low + index < len(self.ends):
                file, number = self.ends[low + index]
            address = file.address if file else "127.0.0.1"
            self.end_together(file, number, clients[rng.choice(self.ports), address])

    def act(self, task: Task, client: Client) -> None:
        file, number, kind = task
        if kind == "cut":
            self.counts["cut"] += 1
            self.send_half(
                client, file, number, len(file.body(number)) // 2 + 1
            ).close()
            return
        first = None
        if kind == "retry":
            self.counts["overtaken"] += 1
            begin = time.perf_counter()
            held_back = len(file.body(number)) // 3 + 1
            first = self.send_half(client, file, number, held_back)
        self.post(client, file, number)
        if first is not None:
            first.finish()
            self.heard(client, file, number, begin, first.answer())

    def send_half(
        self, client: Client, file: File, number: int, held_back: int
    ) -> HalfSent:
        with self.lock:
            self.attempts[file, number] += 1
        return HalfSent(client.port, file, number, held_back)

    def post(self, client: Client, file: File, number: int) -> None:
        with self.lock:
            self.attempts[file, number] += 1
        begin = time.perf_counter()
        self.heard(client, file, number, begin, client.post(file, number))

    def heard(
        self,
        client: Client,
        file: File,
        number: int,
        begin: float,
        answer: Answer | None,
    ) -> None:
        """Remember how it went; send again what another attempt has overtaken."""
        span = Span(number, begin, time.perf_counter())
        is_again = answer is not None and answer.was_overtaken
        with self.lock:
            self.spans.setdefault(file, []).append(span)
            if is_again and self.attempts[file, number] > 1:
                self.counts["sent again"] += 1
            elif answer is None or answer.status != 200:
                self.refused.append(f"{file.path} chunk {number}: {answer}")
                is_again = False
        if is_again:
            self.post(client, file, number)

    def end_together(self, file: File | None, number: int, client: Client) -> None:
        """Send all of a last chunk but a byte; that when everybody is so far."""
        half, begin = None, time.perf_counter()
        if file is not None:
            half = self.send_half(client, file, number, 1)
        self.barrier.wait()
        if file is not None and half is not None:
            half.finish()
            released = time.perf_counter()
            answer = half.answer()
            answered = time.perf_counter()
            self.heard(client, file, number, begin, answer)
            with self.lock:
                self.spans[file].append(Span(-number, released, answered))

    # What has happened

    def count_overlaps(self) -> None:
        """Count bodies of one upload that were under way at one time."""
        for spans in self.spans.values():
            spans.sort(key=lambda span: span.begin)
            bodies = [span for span in spans if span.number > 0]
            ends = [span for span in spans if span.number < 0]
            self.counts["requests"] += len(bodies)
            self.counts["overlapping"] += self.meeting(bodies)
            self.counts["ends that met"] += self.meeting(ends) > 0

    def meeting(self, spans: list[Span]) -> int:
        latest, met = -1.0, 0
        for span in spans:
            met += span.begin < latest
            latest = max(latest, span.end)
        return met


class RaceCase(AttackCase):
    def setUp(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="flowserver-race"))
        self.addCleanup(shutil.rmtree, self.home)
        self.folder = self.home / "uploads"
        self.folder.mkdir()
        self.done_log = self.home / "done.log"

    def race(
        self, processes: int, uploads: int, before: Callable[[], None] | None = None
    ) -> Race:
        with contextlib.ExitStack() as stack, without_collector():
            servers = [
                stack.enter_context(
                    Server(
                        self.folder,
                        done_log=self.done_log,
                        before=before,
                        sync=False,
                        max_uploads=0,
                    )
                )
                for _ in range(processes)
            ]
            race = Race([server.port for server in servers], uploads, seed=processes)
            race.run()
        race.count_overlaps()
        return race

    def problems(self, race: Race) -> list[str]:
        found = finished_files(self.folder)
        places: dict[bytes, list[str]] = {}
        for path, data in found.items():
            places.setdefault(data, []).append(path)
        wrong = []
        for file in race.files:
            copies = places.pop(file.data, [])
            names = {file.path, file.path.replace(".bin", " (1).bin")}
            if len(copies) != 1 or not names.issuperset(copies):
                wrong.append(f"{file.path} is at {copies}")
        wrong += [f"{paths} are wrong" for paths in places.values()]
        wrong += [f"{name} is left over" for name in leftovers(self.folder)]
        told = collections.Counter(path for _, path in announcements(self.done_log))
        wrong += [
            f"{path} was announced {told[path]} times"
            for path in set(found) | set(told)
            if told[path] != 1 or path not in found
        ]
        return wrong + race.refused

    def check(self, processes: int) -> None:
        began = time.monotonic()
        race = self.race(processes, UPLOADS)
        self.assertEqual(self.problems(race), [])
        counts = race.counts
        print(
            f"\n{UPLOADS} uploads against {processes} process(es),"
            f" {time.monotonic() - began:.0f} s: 0 wrong; {dict(counts)}",
            flush=True,
        )
        requests = counts["requests"]
        self.assertGreater(counts["overlapping"], requests // 4)
        self.assertGreater(counts["ends that met"], UPLOADS // 2)
        self.assertGreater(counts["repeated"], UPLOADS // 10)
        self.assertGreater(counts["repeated after the end"], UPLOADS // 10)
        self.assertGreater(counts["overtaken"], UPLOADS // 50)
        self.assertGreater(counts["cut"], UPLOADS // 50)
        if processes == 1:
            self.assertEqual(counts["sent again"], 0)


class RaceTest(RaceCase):
    def test_one_process(self) -> None:
        self.check(1)

    def test_four_processes_over_one_folder(self) -> None:
        self.check(4)

    def test_without_the_lock_the_race_is_lost(self) -> None:
        def unlock() -> None:
            @contextlib.contextmanager
            def locked(disk: Any, fd: int, waits: bool = True) -> Iterator[bool]:
                time.sleep(0)
                yield True

            flowserver.locked = locked

        race = self.race(1, min(UPLOADS, 600), unlock)
        self.assertNotEqual(self.problems(race), [])


class SampleServerProcess(Server):
    """The Flask-like sample in a process of its own."""

    def __init__(self, folder: Path) -> None:
        reader, writer = os.pipe()
        self.status = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                flask_like_sample.serve(str(folder), writer)
            finally:
                os._exit(1)
        os.close(writer)
        with open(reader, "rb") as pipe:
            self.port = int(pipe.readline())


class FlaskLikeSampleTest(RaceCase):
    """What the same clients get from what the usual sample does"""

    def test_three_connections_spoil_files(self) -> None:
        """As flow.js does by default: nothing repeated, nothing cut."""
        files = [
            File(f"{index}.bin", noise(6 * 262144 + 17, index), 262144)
            for index in range(40)
        ]
        wrong = {"sample": 0}
        tries = [(f"sample {number}", SampleServerProcess) for number in range(3)]
        for place, start in (*tries, ("flowserver", Server)):
            name = place.partition(" ")[0]
            if wrong.get(name):
                continue  # it has spoiled some already; by luck it may spoil none
            folder = self.home / place
            folder.mkdir()
            with start(folder) as server:
                for file in files:
                    self.send_three_at_a_time(server, file)
            found = finished_files(folder)
            wrong[name] = sum(found.get(file.path) != file.data for file in files)
        print(
            f"\nof {len(files)} files, 3 connections: wrong or missing {wrong}",
            flush=True,
        )
        self.assertEqual(wrong["flowserver"], 0)
        self.assertGreater(wrong["sample"], 0)

    def send_three_at_a_time(self, server: Server, file: File) -> None:
        left = list(range(file.count, 0, -1))

        def work() -> None:
            with server.client() as client, contextlib.suppress(IndexError):
                while True:
                    client.post(file, left.pop())

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    unittest.main()
