"""Races: thousands of uploads over 16 connections, with everything that goes wrong.

Chunks are shuffled; 15 % come twice, during the upload or after it; 5 % of the bodies
are cut; some are overtaken by a second attempt; last chunks are released by a barrier,
so that their last bytes arrive at once. Against one process, and against four over one
folder: no file is wrong, none is there twice, on_complete is called once for each.

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
    was_answered: bool


class Race:
    """Uploads, sent by as many threads as there are connections."""

    def __init__(self, ports: list[int], uploads: int, seed: int) -> None:
        self.ports = ports
        self.rng = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.refused: list[str] = []
        self.spans: dict[str, list[Span]] = {}
        self.lock = threading.Lock()
        self.barrier = threading.Barrier(CONNECTIONS, timeout=PATIENCE)
        self.turn = threading.Barrier(CONNECTIONS, self.next_group, timeout=PATIENCE)
        self.files = [self.make_file(index) for index in range(uploads)]
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
        chunk_size = self.rng.choice((700, 3000, 9000))
        count = self.rng.randint(1, 6)
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
                clients = [stack.enter_context(Client(port)) for port in self.ports]
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

    def work_on_group(self, index: int, clients: list[Client]) -> None:
        rng = random.Random(index)
        while True:
            with self.lock:
                task = self.left.pop() if self.left else None
            if task is None:
                break
            self.act(task, rng.choice(clients))
        # Two connections for each end, eight ends at one time.
        for low in range(0, 2 * GROUP, CONNECTIONS):
            self.end_together(low + index, rng.choice(self.ports))

    def act(self, task: Task, client: Client) -> None:
        file, number, kind = task
        if kind == "cut":
            self.counts["cut"] += 1
            HalfSent(client.port, file, number, len(file.body(number)) // 2 + 1).close()
            return
        first = None
        if kind == "retry":
            self.counts["overtaken"] += 1
            begin = time.perf_counter()
            first = HalfSent(client.port, file, number, len(file.body(number)) // 3 + 1)
        self.post(client, file, number)
        if first is not None:
            first.finish()
            self.heard(file, number, begin, first.answer())

    def post(self, client: Client, file: File, number: int) -> None:
        begin = time.perf_counter()
        self.heard(file, number, begin, client.post(file, number))

    def heard(self, file: File, number: int, begin: float, answer: Any) -> None:
        end = time.perf_counter()
        good = answer is not None and answer.status == 200
        with self.lock:
            self.spans.setdefault(file.path, []).append(Span(number, begin, end, good))
            if not good:
                self.refused.append(f"{file.path} chunk {number}: {answer}")

    def end_together(self, place: int, port: int) -> None:
        """Send all of a last chunk but a byte; that when everybody is so far."""
        half, begin = None, time.perf_counter()
        if place < len(self.ends):
            file, number = self.ends[place]
            half = HalfSent(port, file, number, 1)
        self.barrier.wait()
        if half is not None:
            half.finish()
            released = time.perf_counter()
            self.heard(file, number, begin, half.answer())
            answered = time.perf_counter()
            with self.lock:
                self.spans[file.path].append(Span(-number, released, answered, True))

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
        wanted = {file.path: file.data for file in race.files}
        wrong = [
            f"{path} is wrong"
            for path in found
            if path in wanted and found[path] != wanted[path]
        ]
        wrong += [f"{path} is one copy more" for path in found if path not in wanted]
        wrong += [f"{path} is missing" for path in wanted if path not in found]
        wrong += [f"{name} is left over" for name in leftovers(self.folder)]
        told = collections.Counter(path for _, path in announcements(self.done_log))
        wrong += [
            f"{path} was announced {told[path]} times"
            for path in wanted
            if told[path] != 1
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


class RaceTest(RaceCase):
    def test_one_process(self) -> None:
        self.check(1)

    def test_four_processes_over_one_folder(self) -> None:
        self.check(4)

    def test_without_the_lock_the_race_is_lost(self) -> None:
        def unlock() -> None:
            @contextlib.contextmanager
            def locked(store: Any, ledger: Any) -> Iterator[None]:
                store.refresh(ledger)
                yield

            flowserver.Store.locked = locked

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
