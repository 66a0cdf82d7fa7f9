"""What the model is made of: turns, a disk, processes, clients and their requests.

test_model.py lets them loose and judges what comes of it.  Of many threads one runs at
a time; a seed says which goes on at each block of a body, at each call to the disk and
at each lock.  The time is virtual, so that a seed always means the same.

Clients do what PROTOCOLS.md says of flow.js and resumable.js: up to three requests at
once over the chunks of a file in order, a test (GET) before each or none, and what each
status means to them.  The network loses answers, lets bodies hang and brings them late.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from attack import flowserver

if TYPE_CHECKING:
    from test_model import World

START = 1e6  # of the virtual clock, in seconds
FOREVER = 1e12


class Killed(BaseException):
    """The process is dead: nothing of it happens any more."""


class Wrong(BaseException):
    """What must not be; no `except Exception` of the store's may hide it."""


# ---- turns ---------------------------------------------------------------------------


class Task:
    """A thread of a process; it runs when it has the baton."""

    def __init__(self, turns: Turns, process: Process, work: Callable[[], None]):
        self.turns, self.process, self.work = turns, process, work
        self.ready: Callable[[], bool] | None = None  # what it waits for,
        self.until = FOREVER  # and how long
        self.error: BaseException | None = None
        self.baton = threading.Lock()
        self.baton.acquire()
        turns.tasks.append(self)
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def is_ready(self) -> bool:
        is_over = self.process.is_dead or self.turns.now >= self.until
        return is_over or self.ready is None or self.ready()

    def _run(self) -> None:
        self.baton.acquire()
        try:
            if not self.process.is_dead:
                self.work()
        except Killed:
            pass
        except BaseException as error:  # told by resume()
            self.error = error
        self.turns.tasks.remove(self)
        self.turns.main.release()


class Turns:
    """Who goes on, and when it is."""

    def __init__(self, rng: random.Random, rate: float) -> None:
        self.rng = rng
        self.rate = rate  # how often a call to the disk lets others go on
        self.now = START
        self.tasks: list[Task] = []
        self.current: Task | None = None
        self.main = threading.Lock()
        self.main.acquire()

    def ready(self) -> list[Task]:
        return [task for task in self.tasks if task.is_ready]

    def pause(
        self, ready: Callable[[], bool] | None = None, until: float = FOREVER
    ) -> None:
        """Let others go on, and wait for `ready()`; the model itself never waits."""
        task = self.current
        if task is None:
            return
        task.ready, task.until = ready, until
        self.main.release()
        task.baton.acquire()
        if task.process.is_dead:
            raise Killed

    def sleep(self, seconds: float) -> None:
        self.pause(lambda: False, self.now + seconds)

    def may_switch(self) -> None:
        """Let others go on here, or not."""
        if self.rng.random() < self.rate:
            self.pause()

    def resume(self, task: Task) -> None:
        """Let a task go on until it pauses or ends."""
        self.current = task
        task.baton.release()
        self.main.acquire()
        self.current = None
        if task.error:
            raise task.error


class Lock:
    """A threading.Lock under which others have their turns."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.is_held = False

    def __enter__(self) -> None:
        self.turns.may_switch()
        if self.is_held:
            self.turns.pause(lambda: not self.is_held)
        self.is_held = True

    def __exit__(self, *exception: object) -> None:
        self.is_held = False


class Condition(Lock):
    """A threading.Condition of the virtual time."""

    news = 0

    def notify_all(self) -> None:
        self.news += 1

    def wait(self, seconds: float) -> None:
        seen, self.is_held = self.news, False
        self.turns.pause(lambda: self.news != seen, self.turns.now + seconds)
        self.__enter__()


# ---- disk ----------------------------------------------------------------------------


class Files(flowserver.Disk):  # type: ignore[name-defined, misc]
    """The folder as a process sees it: with the model's time, locks and descriptors."""

    def __init__(self, world: World, process: Process) -> None:
        super().__init__()
        self.world, self.process = world, process
        self.links = world.plan.links
        self.opened: dict[int, int] = {}  # inodes, by descriptor

    def open(self, path: str, flags: int) -> int:
        is_new = flags & os.O_CREAT and not os.path.exists(path)
        fd: int = super().open(path, flags)
        self.opened[fd] = os.fstat(fd).st_ino
        if is_new:
            self.stamp(fd)
        return fd

    def close(self, fd: int) -> None:
        self.unlock(fd)
        if self.opened.pop(fd, None):
            os.close(fd)

    def write(self, fd: int, block: Any, offset: int) -> None:
        if self.opened[fd] in self.world.published_inodes:
            raise Wrong("writes into a published file")
        super().write(fd, block, offset)
        self.stamp(fd)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)
        self.stamp(fd)

    def touch(self, path: str) -> None:
        self.stamp(path)

    def stamp(self, file: Any) -> None:
        now = int(self.world.turns.now * 1e9)
        os.utime(file, ns=(now, now))

    def list(self, path: str) -> list[str]:
        return sorted(os.listdir(path))

    def flush(self, fd: int) -> None:
        assert fd in self.opened, "flushes what is not open"

    def flush_names(self, path: str) -> None:
        pass

    def publish(self, source: str, target: str) -> None:
        if not self.links and not os.path.exists(target):
            self.world.turns.may_switch()  # the other thread has no lock of names?
        super().publish(source, target)
        self.world.see(self.process, source, target)

    def rename(self, source: str, target: str) -> None:
        before = self.world.look(os.path.basename(target)[:40])
        super().rename(source, target)
        if target.endswith(".ledger"):
            self.world.judge_receipt(target, before)
        else:
            self.world.see(self.process, source, target)

    def unlink(self, path: str) -> None:
        if path.endswith(".ledger"):
            self.world.judge_drop(self.process, path)
        super().unlink(path)

    def lock(self, fd: int) -> None:
        while not Files.try_lock(self, fd):
            self.world.turns.pause(lambda: self.opened[fd] not in self.world.locks)

    def try_lock(self, fd: int) -> bool:
        mine = (self.process, fd)
        return self.world.locks.setdefault(self.opened[fd], mine) == mine

    def unlock(self, fd: int) -> None:
        if self.world.locks.get(self.opened.get(fd, 0)) == (self.process, fd):
            del self.world.locks[self.opened[fd]]


class ModelDisk(Files):
    """Before each call others may have their turn, and the process may die of it."""

    LAST = ("close", "unlock")  # also what is dead does these

    def call(self, name: str, *arguments: Any) -> Any:
        world, process, work = self.world, self.process, getattr(super(), name)
        if name in self.LAST:
            return work(*arguments)
        if process.is_dead:
            raise Killed
        if world.is_verbose:
            world.note(f"    {process}: {name} {arguments}")
        world.turns.may_switch()
        process.calls_to_death -= 1
        if process.calls_to_death and name != process.dies_at:
            return work(*arguments)
        fate = world.rng.choice(("before", "after", "half"))
        if fate == "half" and name == "write":
            fd, block, offset = arguments
            work(fd, memoryview(block)[: len(block) // 2], offset)
        elif fate == "after":
            work(*arguments)
        process.die(f"{fate} {name}")
        raise Killed


def _watched(name: str) -> Callable[..., Any]:
    return lambda disk, *arguments: disk.call(name, *arguments)


for _name in (
    "open close read_once write truncate stat list touch flush stat_path unlink rename"
    " publish make_folder flush_names lock try_lock unlock"
).split():
    setattr(ModelDisk, _name, _watched(_name))


# ---- processes -----------------------------------------------------------------------


class ModelStore(flowserver.Store):  # type: ignore[name-defined, misc]
    """The real store; the world hears whose upload a request is about."""

    def __init__(self, world: World, *arguments: Any, **options: Any) -> None:
        self.world = world
        super().__init__(*arguments, **options)

    def receive(self, upload: Any, start: int, end: int, *kind: bool) -> Any:
        self.world.meet(upload.key)
        body = super().receive(upload, start, end, *kind)
        exchange, close = self.world.exchange(), body.close

        def let_go() -> None:
            exchange.is_taken = False
            close()

        exchange.is_taken, body.close = True, let_go
        return body

    def has(self, upload: Any, start: int, end: int) -> Any:
        self.world.meet(upload.key)
        return super().has(upload, start, end)

    def forget(self, key: str) -> Any:
        self.world.meet(key)
        return super().forget(key)

    def sweep(self, *seconds: float) -> None:
        exchange = self.world.exchange()
        if exchange:  # it has ended, and tidies up
            exchange.is_sweeping = True
        super().sweep(*seconds)


class Process:
    """One UploadApp over the folder, and the application that it is part of."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.is_dead = False
        self.calls_to_death = 0  # counted down from there
        self.dies_at = ""  # a call
        self.disk = ModelDisk(world, self)
        self.app: Any = None  # while it starts
        Task(world.turns, self, self.start)

    def __repr__(self) -> str:
        return f"process {self.number}"

    def start(self) -> None:
        world, plan = self.world, self.world.plan

        def clock() -> float:
            return world.turns.now

        announce = self.announce if plan.announces else None
        store = ModelStore(
            world,
            str(world.folder),
            on_conflict=plan.policy,
            disk=self.disk,
            announce=announce,
            warn=world.hear_warning,
            clock=clock,
        )
        self.app = flowserver.UploadApp(
            flowserver.Settings(upload_dir=str(world.folder), min_free_space=0),
            on_complete=announce,
            owner=self.owner if plan.identity == "owner" else None,
            store=store,
            clock=clock,
        )

    def owner(self, request: Any) -> str:
        return str(request.headers["x-user"])

    def announce(self, done: Any) -> None:
        """The application takes the file: it may move it away at once."""
        world = self.world
        world.note(f"{self}: on_complete {done.relative_path}")
        world.turns.sleep(0 if world.is_calm else world.rng.choice((0, 0, 0, 5, 30)))
        world.told.append((done.id, done.relative_path, world.turns.now))
        if world.plan.removes == "at once" and world.rng.random() < 0.5:
            world.remove(done.relative_path)
        world.turns.pause()

    def sweep(self) -> None:
        if self.app:
            self.world.note(f"{self} sweeps")
            self.app.sweep()

    def die(self, how: str) -> None:
        """All that it has open is closed, and another takes its place."""
        world = self.world
        world.note(f"{self} dies {how}")
        self.app, self.is_dead, world.has_died = None, True, True
        for fd in list(self.disk.opened):
            Files.close(self.disk, fd)
        for exchange in world.exchanges:
            if exchange.process is self and not exchange.is_over:
                exchange.is_over, exchange.ended = True, world.turns.now
                world.arrivals.append((exchange, None))
        world.processes[world.processes.index(self)] = world.new_process()


# ---- clients -------------------------------------------------------------------------


class Library(NamedTuple):
    """What a client library makes of a status; any other means to send it (again)."""

    prefix: str
    accepted: tuple[int, ...]
    fatal_tests: tuple[int, ...]
    fatal: tuple[int, ...]
    retries: tuple[int, ...]  # maxChunkRetries, as people set it


_FATAL = (404, 413, 415, 500, 501)
FLOW = Library("flow", (200, 201, 202), _FATAL, _FATAL, (0, 0, 1, 3))
RESUMABLE = Library("resumable", (200, 201), (), (400, 404, 415, 500, 501), (100,))


class Person:
    """A browser: its addresses, its cookies, its pages and the file at hand."""

    def __init__(self, world: World, number: int, content: bytes) -> None:
        rng = world.rng
        self.world, self.number = world, number
        self.versions = [content]  # of the file, the last one is at hand
        self.library = rng.choice((FLOW, RESUMABLE))
        self.retries = rng.choice(self.library.retries)
        self.tests = rng.random() < 0.6
        self.forces, self.is_two_ended = rng.random() < 0.2, rng.random() < 0.2
        self.pages: list[Page] = []
        self.cookies: dict[str, str] = {}  # the oldest first
        self.moves = 0
        self.keys: set[str] = set()  # of their uploads
        self.refused = 0.0  # when something of theirs was dropped by that, last
        is_secret = world.plan.identity == "secret"
        word = f"flowserver-{number:032x}-" if is_secret else f"{len(content)}-"
        self.identifier = word + "abin"

    def address(self) -> str:
        if self.world.plan.moves == "alternates":
            self.moves = self.world.rng.randrange(2)
        return f"10.0.{self.number}.{self.moves}"

    def open(self) -> Page:
        """Choose the file, on a new page or on one that has been loaded again."""
        page = Page(self)
        self.pages.append(page)
        self.world.counts["pages"] += 1
        self.world.note(f"{page} opens: {self.library.prefix}, tests {self.tests}")
        page.upload()
        return page

    def open_pages(self) -> list[Page]:
        return [page for page in self.pages if page.is_open]


class Chunk:
    """A chunk in the eyes of its page."""

    def __init__(self, number: int, start: int, end: int) -> None:
        self.number, self.start, self.end = number, start, end
        self.is_tested = self.is_done = False
        self.retries = 0
        self.exchange: Exchange | None = None  # under way


class Page:
    """A file that is being sent: from its choice to its end, an error or a reload."""

    def __init__(self, person: Person) -> None:
        self.person, self.world = person, person.world
        self.content = person.versions[-1]
        self.began = self.world.turns.now
        self.is_paused = self.has_failed = self.is_left = False
        self.keys: set[str] = set()  # of the uploads that have its chunks
        self.excuse = ""  # why it may have lost what was acknowledged
        self.chunk_size = size = self.world.rng.choice(self.world.plan.chunk_sizes)
        more = (size - 1) * person.forces  # forceChunkSize: the last one is small
        count = max((len(self.content) + more) // size, 1)
        edges = [*range(0, count * size, size), len(self.content)]
        self.chunks = [Chunk(n + 1, edges[n], edges[n + 1]) for n in range(count)]
        if person.is_two_ended and count > 2:  # prioritizeFirstAndLastChunk
            self.chunks.insert(1, self.chunks.pop())

    def __repr__(self) -> str:
        number = self.person.pages.index(self)
        version = self.person.versions.index(self.content)
        return f"{'ab'[self.person.number]}{number}v{version}"

    @property
    def is_complete(self) -> bool:
        return all(chunk.is_done for chunk in self.chunks)

    @property
    def is_open(self) -> bool:
        return not (self.is_complete or self.has_failed or self.is_left)

    def upload(self) -> None:
        """Begin, or go on after a pause."""
        self.is_paused = False
        for _ in range(3):
            self.next_chunk()

    def next_chunk(self) -> None:
        waiting = (c for c in self.chunks if not (c.is_done or c.exchange))
        chunk = next(waiting, None)
        if chunk and self.is_open and not self.is_paused:
            self.send(chunk)

    def send(self, chunk: Chunk) -> None:
        is_test = self.person.tests and not chunk.is_tested
        chunk.exchange = Exchange(self, chunk, "GET" if is_test else "POST")

    def hear(self, exchange: Exchange, status: int) -> None:
        """An answer arrives; 0 is an error of the network."""
        chunk, library = exchange.chunk, self.person.library
        if chunk is None or chunk.exchange is not exchange:
            return  # it was aborted: nobody listens
        self.world.note(f"{exchange} is answered {status or 'by an error'}")
        chunk.exchange, chunk.is_tested = None, True
        if status in library.accepted:
            chunk.is_done = True
            self.next_chunk()
        elif exchange.method == "GET":
            self.stop("failed") if status in library.fatal_tests else self.send(chunk)
        elif status in library.fatal or chunk.retries >= self.person.retries:
            self.world.count_error(exchange, status)
            self.stop("failed")
        else:
            chunk.retries += 1
            self.send(chunk)

    def stop(self, how: str) -> None:
        """Fail, pause or be left; what is under way is aborted."""
        self.world.note(f"{self} is {how}")
        self.has_failed |= how == "failed"
        self.is_paused |= how == "paused"
        self.is_left |= how == "left"
        for chunk in self.chunks:
            if chunk.exchange:
                chunk.exchange.abort()
                chunk.exchange = None


class Exchange:
    """One request, on its way through the network and in a process."""

    def __init__(self, page: Page, chunk: Chunk | None, method: str) -> None:
        self.page, self.chunk, self.method = page, chunk, method
        self.person, self.world, self.turns = page.person, page.world, page.world.turns
        self.start, self.end = (chunk.start, chunk.end) if chunk else (0, 0)
        self.body = page.content[self.start : self.end] if method == "POST" else b""
        self.position = 0  # what the process has read
        self.late = 0.0  # when it reaches the process, in seconds
        self.cut = -1  # where the body hangs,
        self.delay, self.rest = 0.0, "goes on"  # how long, and then?
        self.is_lost = False  # nobody hears the answer
        self.is_taken = False  # by the store, which has not refused it
        self.is_over = self.is_sweeping = False
        self.was_sample = self.has_dropped = False
        self.key = ""  # of its upload, as soon as the store knows
        self.found: Any = None  # of that, when it was begun
        self.status, self.error = 0, ""  # of the answer
        # When it was begun, may bring bytes, brings no more of them, and is answered.
        self.began = self.joined = self.arrived = self.ended = FOREVER
        self.process: Process = self.world.rng.choice(self.world.processes)
        self.client = self.person.address()
        self.cookie = "; ".join(f"{n}={v}" for n, v in self.person.cookies.items())
        self.number = len(self.world.exchanges)
        self.world.exchanges.append(self)
        if not self.world.is_calm and self.world.rng.random() < self.world.plan.trouble:
            self.draw_trouble()
        self.world.note(f"{self} goes to {self.process}{self.trouble}")
        self.task = Task(self.turns, self.process, self.serve)

    def __repr__(self) -> str:
        number = self.chunk.number if self.chunk else "all"
        return f"#{self.number} ({self.page} {self.method} {number})"

    @property
    def trouble(self) -> str:
        hangs = f", hangs at {self.cut} for {self.delay} s and {self.rest}"
        late = f", {self.late} s late" if self.late else ""
        return late + hangs * (self.cut >= 0) + ", unheard" * self.is_lost

    def draw_trouble(self) -> None:
        """The answer gets lost, the body hangs, or all of it comes late."""
        kind = self.world.rng.choice(("lost", "hangs", "hangs", "late"))
        self.is_lost = True
        if kind == "late":
            self.late = self.draw_delay()
        elif kind == "hangs":
            self.hang(self.world.rng.randint(0, len(self.body)))
        if kind != "lost":
            self.world.arrivals.append((self, None))

    def draw_delay(self) -> float:
        delays = (0.1, 0.5, 3, 9, 11, 30, 300) + (4000, 9000) * self.world.plan.ages
        return self.world.rng.choice(delays)

    def hang(self, cut: int) -> None:
        self.cut, self.delay = cut, self.draw_delay()
        self.rest = self.world.rng.choice(("goes on", "goes on", "ends", "breaks"))

    def abort(self) -> None:
        """The client lets go of it; what is under way may still come, or late."""
        self.is_lost = True
        if self.cut < 0 and self.position < len(self.body):
            self.hang(self.world.rng.randint(self.position, len(self.body)))
            self.world.note(f"{self} is aborted{self.trouble}")

    def serve(self) -> None:
        """Be handled; this is the thread of a request."""
        if self.late:
            self.turns.sleep(self.late)
        self.turns.pause(lambda: self.process.app is not None)
        self.began = self.turns.now
        user = str(self.person.number)
        request = flowserver.Request(
            self.method,
            "/upload",
            self.query(),
            {"cookie": self.cookie, "user-agent": "m", "x-user": user},
            len(self.body),
            client=self.client,
            fill=self.fill,
        )
        response = self.process.app.handle(request)
        self.is_over, self.ended, self.status = True, self.turns.now, response.status
        self.world.judge_answer(self, response)
        self.world.arrivals.append((self, None if self.is_lost else response))

    def query(self) -> str:
        page, size = self.page, len(self.page.content)
        fields = [("Identifier", self.person.identifier), ("TotalSize", size)]
        fields += [("Filename", "a.bin"), ("RelativePath", "a.bin")]
        if self.chunk:
            fields += [("ChunkNumber", self.chunk.number)]
            fields += [("ChunkSize", page.chunk_size)]
            fields += [("CurrentChunkSize", self.end - self.start)]
            fields += [("TotalChunks", len(page.chunks))]
        prefix = self.person.library.prefix
        return "&".join(f"{prefix}{name}={value}" for name, value in fields)

    def fill(self, at_once: bool) -> tuple[bytes, int]:
        """Return the next block, when it comes, and its size."""
        if self.joined == FOREVER:
            self.joined = self.turns.now
            self.found = self.world.look(self.key)
        self.turns.pause()
        if self.position == self.cut:
            self.turns.sleep(self.delay)
            if self.rest != "goes on":
                self.arrived = self.turns.now
            if self.rest == "breaks":
                raise flowserver.Truncated("The connection broke.")
            if self.rest == "ends":
                return b"", 0
            self.cut = -1
        end = self.cut if self.cut >= 0 else len(self.body)
        end = min(end, self.position + self.world.rng.randint(1, 6))
        block = self.body[self.position : end]
        self.position = end
        if end == len(self.body):
            self.arrived = self.turns.now
        return block, len(block)

    @property
    def is_coming(self) -> bool:
        """Whether the store still waits for bytes of it."""
        is_begun = self.joined <= self.turns.now < self.arrived
        return is_begun and self.is_taken and not (self.is_over or self.is_sweeping)

    def overlaps(self, other: Exchange) -> bool:
        """Whether both are of one person and mean bytes of one place."""
        is_near = self.start < other.end and other.start < self.end
        return is_near and self.person is other.person and self is not other

    def differs(self, other: Exchange) -> bool:
        """Whether this one brings other bytes to that place."""
        span = slice(max(self.start, other.start), min(self.end, other.end))
        return bool(self.body) and self.page.content[span] != other.page.content[span]

    def replaces(self, asked: Exchange) -> bool:
        """Whether this brings a sample that was asked for, or asks for another."""
        is_later = self.ended >= asked.began and self is not asked
        is_other = self.method == "GET" and self.end != asked.end
        is_other = is_other and (self.start < 1) == (asked.start < 1)
        return is_later and (is_other or bool(self.body) and self.overlaps(asked))
