"""SIGKILL at every call of the store to the operating system; then the client goes on.

For each scenario the server is killed just before and just after each call k of the
calls with which it serves the request, started again, and the client goes on as flow.js
does: with tests, everything once more, or what was not answered. Whatever k was, every
file is whole and there once, nothing wrong is ever visible, and no data is left behind.
A start that has to bring much in order is killed at each of its calls as well.

Then the same from outside: strace kills `python flowserver.py` at the k-th of each kind
of system call. FLOWSERVER_CRASHES=all tries each of those, and each way to do a
scenario, instead of some.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import functools
import http.client
import itertools
import mmap
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
import unittest
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from attack import (
    PATIENCE,
    AttackCase,
    Client,
    CommandServer,
    File,
    HalfSent,
    KillingDisk,
    Server,
    Watcher,
    _Calls,
    announcements,
    disk_calls,
    eventually,
    finished_files,
    flowserver,
    let_an_hour_pass,
    noise,
    quick_folder,
    without_collector,
)

TRY_ALL = os.environ.get("FLOWSERVER_CRASHES") == "all"
OLD = noise(3017, seed=1)
NEW = OLD[:1500] + noise(500, seed=2) + OLD[2000:]  # a block of chunk 2 is as before
OTHER = noise(3017, seed=3)
SMALL = noise(700, seed=4)
SMALL_TOO = noise(700, seed=5)
PLAIN = File("a/b/report.bin", OLD)


class Way(NamedTuple):
    """How it is done; each way comes by every state between two calls."""

    when: int  # kill before (0) or after (1) a call
    has_on_complete: bool
    going_on: str = ""  # how the client goes on; "": by turns


GOING_ON = ("tests", "sends all", "remembers")
ALL_WAYS = (
    Way(0, True, "tests"),
    Way(1, True, "sends all"),
    Way(0, True, "remembers"),
    Way(1, False, "tests"),
    Way(0, False, "sends all"),
    Way(1, False, "remembers"),
)


class Scenario(NamedTuple):
    """What comes before the kill, what is under way then, and what must come of it."""

    name: str
    attack: Callable[[Client], None]
    prepare: Callable[[Client], None] = lambda client: None
    goes_on: tuple[File, ...] = (PLAIN,)  # one that is there twice may be refused once
    versions: tuple[bytes, ...] = (OLD,)
    before: Mapping[str, bytes] = {}  # files that are there, all of which stay
    replaced: Mapping[str, bytes] = {}  # files that are there until they are replaced
    settings: Mapping[str, Any] = {}
    disk: type[KillingDisk] = _Calls
    stalls: tuple[File, int] | None = None  # a chunk that is half sent all the while
    ways: tuple[Way, ...] = (Way(0, True),)


def sends(file: File, *numbers: int) -> Callable[[Client], None]:
    def send(client: Client) -> None:
        for number in numbers or range(1, file.count + 1):
            client.post(file, number)

    return send


def each(*steps: Callable[[Client], None]) -> Callable[[Client], None]:
    def run(client: Client) -> None:
        for step in steps:
            step(client)

    return run


class NoLinksDisk(_Calls):
    """As on a file system where a file has one name."""

    def __init__(self, memory: mmap.mmap) -> None:
        super().__init__(memory)
        self.links = False


def dies_after(name: str) -> type[KillingDisk]:
    """A disk that dies after its first call of this name, once it is armed."""

    def call(disk: KillingDisk, *arguments: Any) -> None:
        getattr(KillingDisk, name)(disk, *arguments)
        disk.die_at(disk.counted(), 1)

    return type("DiesAfter", (KillingDisk,), {name: call})


ONE = File("a/one.bin", SMALL)
ANOTHER_ONE = File("a/one.bin", SMALL_TOO, identifier="another")
TWIN = File("a/b/report.bin", OTHER, identifier="twin")
CHANGED = File("a/b/report.bin", NEW)
LONG = noise(3000, seed=6)
MANY = File("a/many.bin", LONG, 60)  # its ledger is cut down at the end
assert PLAIN.parameters(1)["flowIdentifier"] == CHANGED.parameters(1)["flowIdentifier"]


def some(ways: tuple[Way, ...]) -> tuple[Way, ...]:
    """Two of all: before and after a call, with on_complete and without."""
    return ways[:: max(len(ways) // 2, 1)]


TWO_WAYS = (Way(0, True), Way(1, False))  # on_complete changes how one chunk is stored

# The five that every change must pass come first.
SCENARIOS = (
    Scenario("first chunk", sends(PLAIN, 1), ways=ALL_WAYS),
    Scenario("middle chunk", sends(PLAIN, 2), sends(PLAIN, 1), ways=ALL_WAYS),
    Scenario("last chunk", sends(PLAIN, 3), sends(PLAIN, 2, 1), ways=ALL_WAYS),
    Scenario(
        "duplicates after the finish", sends(PLAIN, 3, 1), sends(PLAIN), ways=ALL_WAYS
    ),
    Scenario(
        "a new folder with a name conflict",
        each(sends(PLAIN, 3), sends(TWIN, 3)),
        each(sends(PLAIN, 1, 2), sends(TWIN, 1, 2)),
        goes_on=(PLAIN, TWIN),
        versions=(OLD, OTHER),
        ways=ALL_WAYS,
    ),
    Scenario(
        "a file of one chunk",
        sends(ONE),
        goes_on=(ONE,),
        versions=(SMALL,),
        ways=TWO_WAYS,
    ),
    Scenario(
        "a file of one chunk whose name is taken",
        sends(ANOTHER_ONE),
        sends(ONE),
        goes_on=(ANOTHER_ONE, ONE),
        versions=(SMALL, SMALL_TOO),
        ways=TWO_WAYS,
    ),
    Scenario(
        "a file of no bytes",
        sends(File("empty", b"")),
        goes_on=(File("empty", b""),),
        versions=(b"",),
        ways=TWO_WAYS,
    ),
    Scenario(
        "a second attempt, while the first stalls",
        sends(PLAIN, 3),
        sends(PLAIN, 1, 2),
        stalls=(PLAIN, 3),
    ),
    Scenario(
        "a changed file after the finish",
        sends(CHANGED, 2),
        sends(PLAIN),
        goes_on=(CHANGED, CHANGED),
        versions=(OLD, NEW),
        ways=ALL_WAYS,
    ),
    Scenario(
        "a changed file after something has come again",
        sends(CHANGED, 2),
        each(sends(PLAIN), sends(CHANGED, 1)),
        goes_on=(CHANGED, CHANGED),
        versions=(OLD, NEW),
        # Who "remembers" has lost the first chunk, with the refusal that was not heard:
        # a file that was changed without changing its size (the end of DESIGN.md's
        # section 4).
        ways=(Way(0, True, "tests"), Way(1, False, "sends all")),
    ),
    Scenario(
        "a changed file's last chunk",
        sends(CHANGED, 3),
        each(sends(PLAIN), sends(CHANGED, 2, 1)),
        goes_on=(CHANGED,),
        versions=(OLD, NEW),
    ),
    Scenario(
        "the last of many chunks",
        sends(MANY, MANY.count),
        sends(MANY, *range(1, MANY.count)),
        goes_on=(MANY,),
        versions=(LONG,),
        ways=TWO_WAYS,
    ),
    Scenario(
        "the very file is there",
        sends(PLAIN, 3),
        sends(PLAIN, 1, 2),
        before={"a/b/report.bin": OLD},
    ),
    Scenario(
        "a cancelled upload",
        lambda client: void(client.cancel(PLAIN)),
        sends(PLAIN, 1, 2),
    ),
    Scenario(
        "another version sent by the same client",
        sends(CHANGED, 2),
        sends(PLAIN, 1, 2),
        goes_on=(CHANGED, CHANGED),
        versions=(NEW,),
    ),
    Scenario(
        "an old file is replaced",
        sends(PLAIN, 3),
        sends(PLAIN, 1, 2),
        replaced={"a/b/report.bin": OTHER},
        settings={"on_conflict": "replace"},
    ),
    Scenario(
        "no hard links",
        sends(PLAIN, 3),
        sends(PLAIN, 1, 2),
        disk=NoLinksDisk,
        goes_on=(PLAIN,),
        versions=(OLD, OTHER),
        before={"a/b/report.bin": OTHER},
    ),
    Scenario(
        "no hard links, one chunk",
        sends(ONE),
        disk=NoLinksDisk,
        goes_on=(ONE,),
        versions=(SMALL,),
    ),
)


# What a start finds: two unfinished uploads, one with a long ledger; a file that has
# its name, but no line says so; and a finished one of which on_complete was not told.
START = Scenario(
    "a start",
    sends(ONE),
    each(sends(PLAIN, 1, 2), sends(MANY, *range(1, MANY.count)), sends(TWIN, 1, 2)),
    goes_on=(MANY, TWIN, ONE, PLAIN),
    versions=(OLD, OTHER, SMALL, LONG),
)


def void(_: object) -> None:
    pass


def wait_little() -> None:
    """The end of the file does not wait long for the attempt that stalls."""
    flowserver._WAIT_SECONDS = 0.02


class CrashCase(AttackCase):
    """One kill in a fresh folder, and all that must hold after it."""

    def setUp(self) -> None:
        self.home = quick_folder("flowserver-crash")
        self.addCleanup(shutil.rmtree, self.home)
        self.trials = 0
        self.looks = 0
        self.stored: dict[File, set[int]] = {}  # what the client remembers

    def client(self, server: Server | CommandServer) -> Client:
        client = server.client()
        client.stored = self.stored
        return client

    def folder_for(self, scenario: Scenario) -> Path:
        self.trials += 1
        self.stored = {}
        folder = self.home / str(self.trials)
        for path, data in {**scenario.before, **scenario.replaced}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        folder.mkdir(exist_ok=True)
        return folder

    def check_recovery(
        self,
        scenario: Scenario,
        folder: Path,
        way: str,
        start: Callable[[Path], Any],
        done_log: Path | None = None,
    ) -> None:
        """Start again, go on, and look all the while."""
        before = (*scenario.before.values(), *scenario.replaced.values())
        let_an_hour_pass(folder)
        with Watcher(folder, (*scenario.versions, *before)) as watcher:
            with start(folder) as server, self.client(server) as client:
                for place, file in enumerate(scenario.goes_on, 1):
                    may_be_refused = file in scenario.goes_on[place:]
                    self.check_going_on(client, file, way, may_be_refused)
        self.looks += watcher.looks
        self.assertEqual(watcher.wrong, {}, "wrong files were visible")
        self.assert_stored_once(folder, scenario.versions)
        if done_log is not None:
            told = announcements(done_log)
            self.assertEqual(len({path for _, path in told}), len(set(told)), told)
            self.assertGreaterEqual(
                {path for _, path in told},
                set(finished_files(folder)) - set(scenario.before),
            )

    def check_going_on(
        self, client: Client, file: File, way: str, may_be_refused: bool
    ) -> None:
        answers = client.send(file, way)
        if may_be_refused and answers[-1].status != 200:
            return  # two versions: the next try, which is on the list, starts afresh
        self.assertLessEqual({answer.status for answer in answers}, {200}, answers)
        if answers:
            self.assertTrue(any(answer.is_complete for answer in answers), answers)


class CrashTest(CrashCase):
    """A call of Disk after the other"""

    def kill_at(self, scenario: Scenario, way: Way, call: int) -> bool:
        """Return whether the server came so far; then everything has been checked."""
        folder = self.folder_for(scenario)
        memory = mmap.mmap(-1, mmap.PAGESIZE)
        log = folder.with_suffix(".log") if way.has_on_complete else None
        going_on = way.going_on or GOING_ON[call % len(GOING_ON)]
        stalled = None
        try:
            server = self.attacked(scenario, folder, memory, log)
            with server, self.client(server) as client:
                scenario.prepare(client)
                if scenario.stalls:
                    stalled = self.stalled(server, scenario, folder)
                KillingDisk.LAYOUT.pack_into(memory, 0, call, way.when, 0)
                scenario.attack(client)
                _, _, made = KillingDisk.LAYOUT.unpack_from(memory)
                if made < call:
                    return False
                self.assertEqual(server.wait(), -signal.SIGKILL)
        finally:
            memory.close()
            if stalled is not None:
                stalled.close()
        start = self.restart(scenario, log)
        self.check_recovery(scenario, folder, going_on, start, log)
        shutil.rmtree(folder)
        return True

    def attacked(
        self, scenario: Scenario, folder: Path, memory: mmap.mmap, log: Path | None
    ) -> Server:
        return Server(
            folder,
            lambda: scenario.disk(memory),
            log,
            wait_little if scenario.stalls else None,
            **scenario.settings,
        )

    def restart(
        self, scenario: Scenario, done_log: Path | None
    ) -> Callable[[Path], Server]:
        def start(folder: Path) -> Server:
            return Server(folder, done_log=done_log, sync=False, **scenario.settings)

        return start

    def stalled(self, server: Server, scenario: Scenario, folder: Path) -> HalfSent:
        """Begin to send a chunk, so that it is under way when the kill comes."""
        assert scenario.stalls is not None
        file, number = scenario.stalls
        started = file.edges(number)[0]
        stalled = HalfSent(server.port, file, number, held_back=100)

        def has_begun() -> bool:
            return any(
                path.stat().st_size > started
                for path in folder.glob(".flowserver/**/*.data")
            )

        eventually(has_begun, "the first attempt")
        return stalled

    def check(self, scenario: Scenario, way: Way) -> int:
        """Kill at each call, until the request ends before it; return how many."""
        call = 0
        while self.kill_at(scenario, way, call + 1):
            call += 1
        return call

    def test_every_call_before_and_after(self) -> None:
        total = 0
        with without_collector():
            for scenario in SCENARIOS:
                for way in scenario.ways if TRY_ALL else some(scenario.ways):
                    with self.subTest(scenario.name, way=way):
                        kills = self.check(scenario, way)
                        # As many as there were when nothing was killed.
                        self.assertEqual(kills, self.count_calls(scenario, way))
                        self.assertGreater(kills, 5)
                        total += kills
        self.assertGreater(total, 1000 if TRY_ALL else 500)
        print(
            f"\n{total} crashes in {len(SCENARIOS)} scenarios, "
            f"{self.looks} looks at the folder",
            flush=True,
        )

    def count_calls(self, scenario: Scenario, way: Way) -> int:
        """With how many calls a server that is not killed serves the request."""
        folder = self.folder_for(scenario)
        memory = mmap.mmap(-1, mmap.PAGESIZE)
        log = folder.with_suffix(".log") if way.has_on_complete else None
        server = self.attacked(scenario, folder, memory, log)
        with server, server.client() as client:
            scenario.prepare(client)
            stalled = (
                self.stalled(server, scenario, folder) if scenario.stalls else None
            )
            KillingDisk.LAYOUT.pack_into(memory, 0, 1 << 30, 0, 0)
            scenario.attack(client)
            made: int = KillingDisk.LAYOUT.unpack_from(memory)[2]
            if stalled is not None:
                stalled.close()
        memory.close()
        return made

    def kill_start_at(self, call: int, when: int) -> bool:
        """Return whether the start came so far; then everything has been checked."""
        folder, memory = self.folder_for(START), mmap.mmap(-1, mmap.PAGESIZE)
        log = folder.with_suffix(".log")
        for name, file in (("publish", TWIN), ("unlink", ONE)):
            KillingDisk.LAYOUT.pack_into(memory, 0, 0, 0, 0)
            disk = functools.partial(dies_after(name), memory)
            with Server(folder, disk, log) as server, self.client(server) as client:
                if file is TWIN:
                    START.prepare(client)
                KillingDisk.LAYOUT.pack_into(memory, 0, 1, 1, 0)
                client.post(file, file.count)
                self.assertEqual(server.wait(), -signal.SIGKILL)
        KillingDisk.LAYOUT.pack_into(memory, 0, call, when, 0)
        try:
            Server(folder, lambda: _Calls(memory), log).kill()
            was_killed = False
        except AssertionError:
            was_killed = True
        made = KillingDisk.LAYOUT.unpack_from(memory)[2]
        self.assertEqual(was_killed, made >= call)
        memory.close()
        way = GOING_ON[call % len(GOING_ON)]
        self.check_recovery(START, folder, way, self.restart(START, log), log)
        shutil.rmtree(folder)
        return was_killed

    def test_every_call_of_a_start(self) -> None:
        kills = 0
        with without_collector():
            for when in (0, 1):
                call = 1
                while self.kill_start_at(call, when):
                    call += 1
                    kills += 1
        self.assertGreater(kills, 100)
        print(f"\n{kills} crashes of a start", flush=True)

    def test_the_disk_is_the_only_way_to_the_system(self) -> None:
        """What the store calls past Disk would never be tried here."""
        self.assertGreater(len(disk_calls()), 20)
        source = Path(flowserver.__file__).read_text(encoding="utf-8")
        rooms = source[
            source.index("\n# ---- ledgers -") : source.index("\n# ---- page -")
        ]
        calls = re.findall(r"\bos\.(?!path\b|O_|name\b|getpid\b)\w+", rooms)
        calls += re.findall(r"\bshutil\b|(?<!\.)(?<!def )\bopen\(", rooms)
        # The start makes the folders, before there is anything to lose.
        allowed = {"os.makedirs", "os.stat", "os.stat_result"}
        self.assertLessEqual(set(calls), allowed)


class RecoveryIsProvenTest(CrashCase):
    """These tests fail where they should"""

    def test_a_store_that_forgets_is_caught(self) -> None:
        scenario = SCENARIOS[2]
        folder = self.folder_for(scenario)
        (folder / "a/b").mkdir(parents=True)
        (folder / "a/b/report.bin").write_bytes(OLD[:-1] + b"x")
        with self.assertRaises(AssertionError):
            self.check_recovery(scenario, folder, "sends all", Server)

    def test_a_second_copy_is_caught(self) -> None:
        scenario = SCENARIOS[2]
        folder = self.folder_for(scenario)
        (folder / "copy.bin").write_bytes(OLD)
        with self.assertRaises(AssertionError):
            self.check_recovery(scenario, folder, "sends all", Server)


# What changes something; the names of one kernel and those of another.
SYSTEM_CALLS = (
    "open,openat,pwrite64,ftruncate,fdatasync,fsync,link,linkat,rename,renameat,renameat2,"
    "unlink,unlinkat,mkdir,mkdirat,flock,close"
)


class TusClient:
    """One upload of tus, and the largest offset that its client was ever told."""

    def __init__(self) -> None:
        self.path = ""  # once it is told
        self.offset = 0
        self.hanging: socket.socket | None = None

    def ask(
        self, port: int, method: str, path: str, body: bytes = b"", **headers: object
    ) -> http.client.HTTPResponse | None:
        """Send a request; the answer, None when the server was killed meanwhile."""
        connection = http.client.HTTPConnection("127.0.0.1", port, PATIENCE)
        names = {key.replace("_", "-"): str(value) for key, value in headers.items()}
        try:
            connection.request(method, path, body, {"Tus-Resumable": "1.0.0", **names})
            answer = connection.getresponse()
            said = answer.read().decode()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        if answer.status not in (200, 201, 204):
            raise AssertionError(f"{method} is answered {answer.status}: {said}")
        told = answer.headers["Upload-Offset"]
        if told:
            self.offset = max(self.offset, int(told))
        return answer

    def create(self, port: int) -> bool:
        metadata = "filename " + base64.b64encode(b"a/tus.bin").decode()
        names = {"Upload_Length": len(OLD), "Upload_Metadata": metadata}
        answer = self.ask(port, "POST", "/upload", **names)
        if answer is not None:
            self.path = urllib.parse.urljoin("/upload", answer.headers["Location"])
        return answer is not None

    def patch(self, port: int, end: int) -> bool:
        kind = "application/offset+octet-stream"
        names = {"Content_Type": kind, "Upload_Offset": self.offset}
        body = OLD[self.offset : end]
        answer = self.ask(port, "PATCH", self.path, body, **names)
        return answer is not None

    def hang(self, port: int) -> bool:
        """Send most of a PATCH, and leave it there."""
        self.hanging = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.hanging.sendall(
            f"PATCH {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Tus-Resumable: 1.0.0\r\nUpload-Offset: {self.offset}\r\n"
            "Content-Type: application/offset+octet-stream\r\n"
            f"Content-Length: {len(OLD) - self.offset}\r\n\r\n".encode()
            + OLD[self.offset : self.offset + 1400]
        )
        time.sleep(0.02)
        return True

    def look(self, port: int) -> bool:
        return self.ask(port, "HEAD", self.path) is not None

    def upload(self, port: int) -> None:
        """All that can happen to one, until the server is killed."""
        steps = (
            self.create,
            lambda port: self.patch(port, 1000),
            self.hang,
            self.look,
            lambda port: self.patch(port, 2000 + self.offset % 7),
            lambda port: self.patch(port, len(OLD)),
        )
        try:
            all(step(port) for step in steps)
        finally:
            if self.hanging is not None:
                self.hanging.close()


class TusTest(AttackCase):
    """Every offset that was ever answered is on the disk, wherever the kill comes."""

    def kill_at(self, call: int, when: int, folder: Path) -> bool:
        memory, log = mmap.mmap(-1, mmap.PAGESIZE), folder.with_suffix(".log")
        client = TusClient()
        with Server(folder, lambda: _Calls(memory), log) as server:
            KillingDisk.LAYOUT.pack_into(memory, 0, call, when, 0)
            client.upload(server.port)
            if KillingDisk.LAYOUT.unpack_from(memory)[2] < call:
                return False
            self.assertEqual(server.wait(), -signal.SIGKILL)
        with Server(folder, done_log=log) as server:
            self.go_on(client, server.port)
        self.assertEqual(list(finished_files(folder).values()), [OLD])
        self.assertEqual({path for _, path in announcements(log)}, {"a/tus.bin"})
        return True

    def go_on(self, client: TusClient, port: int) -> None:
        """As after a restart; what was never told is begun anew."""
        told = client.offset
        if client.path:
            answer = client.ask(port, "HEAD", client.path)
            assert answer is not None
            self.assertEqual(answer.status, 200)
            client.offset = int(answer.headers["Upload-Offset"])
            self.assertGreaterEqual(client.offset, told)
        else:
            self.assertTrue(client.create(port))
        if client.offset < len(OLD):
            self.assertTrue(client.patch(port, len(OLD)))
        self.assertEqual(client.offset, len(OLD))

    def test_every_call_before_and_after(self) -> None:
        home = quick_folder("flowserver-crash")
        self.addCleanup(shutil.rmtree, home)
        kills = 0
        with without_collector():
            for when in (0, 1):
                for call in itertools.count(1):
                    folder = home / f"{when}-{call}"
                    folder.mkdir()
                    if not self.kill_at(call, when, folder):
                        break
                    kills += 1
        self.assertGreater(kills, 60)
        print(f"\n{kills} crashes of an upload of tus", flush=True)


@unittest.skipUnless(shutil.which("strace"), "strace is missing")
class StraceTest(CrashCase):
    """From outside, `python flowserver.py` as it is started"""

    def attach(self, server: CommandServer, *arguments: str) -> subprocess.Popen[bytes]:
        tracer = subprocess.Popen(
            ["strace", "-f", "-qq", "-p", str(server.pid), *arguments],
            stderr=subprocess.DEVNULL,
        )
        status = Path(f"/proc/{server.pid}/status")

        def is_attached() -> bool:
            threads = Path(f"/proc/{server.pid}/task").iterdir()
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                return all(
                    "TracerPid:\t0" not in (thread / "status").read_text()
                    for thread in threads
                )
            return False  # one has just ended: look again

        eventually(is_attached, f"strace of {status}")
        return tracer

    def prepared(self, scenario: Scenario, folder: Path) -> CommandServer:
        flags = [
            part
            for name, value in scenario.settings.items()
            for part in ("--" + name.replace("_", "-"), str(value))
        ]
        server = CommandServer(folder, *flags)
        with self.client(server) as client:
            scenario.prepare(client)
        return server

    def count_calls(self, scenario: Scenario) -> collections.Counter[str]:
        """How often the thread that serves the request makes each system call."""
        folder = self.folder_for(scenario)
        trace = folder.with_suffix(".trace")
        with self.prepared(scenario, folder) as server:
            tracer = self.attach(
                server, "-e", "trace=" + SYSTEM_CALLS, "-o", str(trace)
            )
            with server.client() as client:
                scenario.attack(client)
        tracer.wait(PATIENCE)
        calls: dict[str, collections.Counter[str]] = {}
        for line in trace.read_text().splitlines():
            match = re.match(r"(\d+) +(\w+)\(", line)
            if match:
                thread = calls.setdefault(match[1], collections.Counter())
                thread[match[2]] += 1
        return max(calls.values(), key=lambda counter: counter.total())

    def kill_at(self, scenario: Scenario, name: str, count: int) -> bool:
        """Kill at the count-th call of a name in one thread; check what comes then."""
        folder = self.folder_for(scenario)
        with self.prepared(scenario, folder) as server:
            tracer = self.attach(
                server,
                "-e",
                "trace=" + name,
                "-e",
                f"inject={name}:signal=KILL:when={count}",
                "-o",
                os.devnull,
            )
            with self.client(server) as client:
                scenario.attack(client)
                was_killed = client.failures > 0
            if not was_killed:  # it came with, or behind, the last answer
                server.kill()
            status = server.wait()
        tracer.wait(PATIENCE)
        self.assertEqual(status, -signal.SIGKILL)
        self.check_recovery(
            scenario,
            folder,
            GOING_ON[count % len(GOING_ON)],
            lambda folder: Server(folder, sync=False, **scenario.settings),
        )
        shutil.rmtree(folder)
        return was_killed

    def test_system_calls(self) -> None:
        rng = random.Random(3)
        kills = tried = possible = 0
        for scenario in SCENARIOS[:5]:
            calls = self.count_calls(scenario)
            moments = [
                (name, count)
                for name, made in calls.items()
                for count in range(1, made + 1)
            ]
            possible += len(moments)
            if not TRY_ALL:
                moments = rng.sample(moments, min(len(moments), 12))
            for name, count in moments:
                with self.subTest(scenario.name, call=name, count=count):
                    kills += self.kill_at(scenario, name, count)
                    tried += 1
        print(
            f"\n{kills} of {tried} kills from outside came while a request was served"
            f" ({possible} system calls are possible)",
            flush=True,
        )
        self.assertGreaterEqual(kills, tried * 3 // 4)


if __name__ == "__main__":
    unittest.main()
