"""Interleavings: what several processes do to one upload, in thousands of orders.

A run is drawn from a seed: one to three stores over one folder (a store is a process
here), on a disk as POSIX, file systems without links or Windows have them, and up to
70 steps: a body begins, goes on, is recorded, is cut, has too many bytes or too few; a
test, a DELETE, a sweep, a jump of the clock; a store is closed and opened again, or
killed, also in the middle of a call, at which half of a block may be written.  Another
store's step may come inside a call, wherever that holds no lock.  All is done by one
thread, so that a seed always means the same; a wait for a lock would be one for ever,
and fails.

Checked after each step, from the files alone:

- what has a name below upload_dir is one version, whole, and stays as it is;
- whatever the ledger says that somebody has sent is in the data file as they sent it;
- what was acknowledged is in a finished file, or recorded for the one who sent it;
- what a test, a status or the answer to a last chunk says is so.

And when all bodies have ended:

- no descriptor is open but those of ledgers and of the process's token, no lock is held
  but the token's, and no ledger has users or claims;
- of one version, if every byte was acknowledged: exactly the file, without a sweep
  where one process is enough and nobody died, else after one; and on_complete was
  called for it, once unless somebody died;
- a client that begins once more is not refused and gets the file; with two versions,
  when what is stale is swept;
- after that the temp folder is empty, and no process has anything open.

What the model allows.  One version: no refusal at all, except that a body is told that
its upload was cancelled where there are DELETEs or receipts that end, and (Windows)
that another process has a file open.  Two versions: refusals, files that stay
unfinished, and that what a sender alone has stored is forgotten when the same sender
sends other bytes, or two have differed and then were quiet for two minutes; never a
mixed file.  For that, clients do what clients do: of two people each sends one version,
its chunks in order, up to three at a time, and begins anew when it is refused; one
person who changes the file does so when it is finished, over two minutes after what was
sent last.  KNOWN lists what else the model keeps clear of, until it is mended.

FLOWSERVER_INTERLEAVINGS is the number of runs of each test, FLOWSERVER_SEED the first
seed.  FLOWSERVER_FILE names another flowserver.py, to see this fail on a broken one.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import random
import shutil
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from attack import flowserver, quick_folder

RUNS = int(os.environ.get("FLOWSERVER_INTERLEAVINGS") or 1200)
FIRST_SEED = int(os.environ.get("FLOWSERVER_SEED") or 1)

# What flowserver can't know or does not do; the model keeps clear of it.  To see one of
# them fail, FLOWSERVER_KNOWN lists the numbers, from 0 on, of the others.
IS_CUT = "two people both break off a chunk before it differs, and never come back"
ODD = "a range is overtaken by one that begins elsewhere: it is to be sent again"
DELETED = "who cancels an upload goes on with it in the middle"
ALL_KNOWN = (IS_CUT, ODD, DELETED)
MIXING = frozenset((IS_CUT, DELETED))  # where two chunks differ
KNOWN = frozenset(
    ALL_KNOWN[int(word)] for word in os.environ.get("FLOWSERVER_KNOWN", "0 1 2").split()
)

CHUNK = 10
BLOCK = 8  # as BLOCK_SIZE: so small that a chunk is several
GIVES_NAME = ("publish", "replace")
POLICIES = ("rename", "rename", "rename", "replace", "refuse")
FOREVER = 1e9
START = 1.7e9
QUIET = 120
PAUSE = 200  # longer than a note is trusted, and than the store calls quiet
WAITED_FOR = (".ledger", ".busy", "names.lock")  # locks that others wait for


class Killed(BaseException):
    """The process is dead: nothing of it happens any more."""


class Plan(NamedTuple):
    """What a run is like."""

    size: int
    people: int
    versions: int
    sites: int
    system: str  # posix, one name, windows
    sync: bool
    policy: str  # on_conflict
    announces: bool
    deletes: bool
    expires: bool  # receipts end
    deaths: bool
    inside: float  # how often something happens inside a call
    steps: int

    @property
    def is_in_turn(self) -> bool:
        """Whether one person sends one version after the other."""
        return self.people == 1 and self.versions == 2

    @property
    def is_contest(self) -> bool:
        """Whether two people send different files."""
        return self.people == 2 and self.versions == 2

    @property
    def may_cancel(self) -> bool:
        """Whether a body may find that its upload does not go on."""
        return self.deletes or self.expires


def draw_plan(rng: random.Random, people: int, versions: int) -> Plan:
    system = rng.choice(("posix", "posix", "posix", "one name", "windows"))
    sites, expires = rng.choice((1, 2, 2, 3, 3)), rng.random() < 0.15
    is_contest = people == versions == 2
    if is_contest and system == "windows":
        sites = 1  # without shared locks no process knows of another's bodies
    if is_contest:
        expires = False  # what is remembered of two versions ends with the receipt
    return Plan(
        size=rng.choice((10, 20, 20, 30, 30, 47)),
        people=people,
        versions=versions,
        sites=sites,
        system=system,
        sync=rng.random() < 0.5,
        policy="rename" if expires else rng.choice(POLICIES),
        announces=rng.random() < 0.5,
        deletes=rng.random() < 0.3,
        expires=expires,
        deaths=rng.random() < 0.3,
        inside=rng.choice((0, 0.2, 0.5)),
        steps=rng.randrange(10, 70),
    )


class Client:
    """A sender with a version of the file."""

    def __init__(self, name: str, version: int) -> None:
        self.name = name
        self.version = version
        self.left: list[tuple[int, int]] = []  # what is still to be sent, in order
        self.is_in_call = False


class Ack(NamedTuple):
    """A range that was answered 200."""

    client: Client
    version: int
    start: int
    end: int


class Body:
    """A body under way."""

    def __init__(self, number: int, site: Site, client: Client, span: Any) -> None:
        self.number = number
        self.site = site
        self.client = client
        self.version = client.version
        self.start, self.end = span
        self.position = self.start
        self.is_recorded = False
        self.is_given_up = False  # by a client that was refused
        self.receiving: Any = None


class Site:
    """A process: a store and what it has open."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.is_in_call = False
        self.disk: Any = None
        self.store: Any = None


class ModelDisk(flowserver.Disk):  # type: ignore[name-defined, misc]
    """A disk whose files have the model's time, that knows who has what open.

    Before each call the process may die, or another process may do something.
    """

    def __init__(self, world: World, system: str) -> None:
        super().__init__(sync=world.plan.sync)
        self.world = world
        self.opened: dict[int, str] = {}
        self.folders: set[int] = set()
        self.locks: dict[int, str] = {}
        self.is_dead = False
        self.previous = ""  # the call that was made last
        if system != "posix":
            self.links = False
        if system == "windows":
            self.unlinks_open = self.shares_locks = False
            self._positioned = self._relative = False

    # Life and death

    def before(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.is_dead:
            raise Killed
        if self.world.dies_now(self):
            if name == "write":  # half a line, half a block
                fd, block, offset = arguments
                super().write(fd, block[: len(block) // 2], offset)
                self._touch(fd)
            self.die()
            raise Killed
        self.previous = name
        self.world.before_call(name)

    def die(self) -> None:
        """Close what is open, as the system does; locks go with it."""
        self.is_dead = True
        for fd in [*self.opened, *self.folders]:
            os.close(fd)
        self.opened, self.folders, self.locks = {}, set(), {}

    @property
    def waited_for(self) -> list[str]:
        """The locks that it has and others may wait for."""
        return [path for path in self.locks.values() if path.endswith(WAITED_FOR)]

    # Files

    def open(self, path: str, flags: int) -> int:
        is_new = flags & os.O_CREAT and not os.path.exists(path)
        fd: int = super().open(path, flags)
        self.opened[fd] = path
        if is_new:
            self._touch(fd)
        return fd

    def close(self, fd: int) -> None:
        del self.opened[fd]
        self.locks.pop(fd, None)
        super().close(fd)

    def write(self, fd: int, block: bytes | memoryview, offset: int) -> None:
        super().write(fd, block, offset)
        self._touch(fd)

    def truncate(self, fd: int, size: int) -> None:
        super().truncate(fd, size)
        self._touch(fd)

    def _touch(self, fd: int) -> None:
        os.utime(fd, (self.world.now, self.world.now))

    def flush(self, fd: int) -> None:
        assert fd in self.opened, "flushes what is not open"

    def list(self, path: str) -> list[str]:
        return sorted(super().list(path))

    # Folders

    def open_folder(self, path: str) -> Any:
        folder = super().open_folder(path)
        if folder.fd is not None:
            self.folders.add(folder.fd)
        return folder

    def close_folder(self, folder: Any) -> None:
        self.folders.discard(folder.fd)
        super().close_folder(folder)

    def flush_folder(self, folder: Any) -> None:
        pass

    # Names

    def _require_closed(self, path: str) -> None:
        if not self.unlinks_open:
            for site in self.world.sites:
                if path in site.disk.opened.values():
                    raise PermissionError(errno.EACCES, "is open", path)

    def unlink(self, path: str) -> None:
        self._require_closed(path)
        super().unlink(path)

    def rename(self, source: str, target: str) -> None:
        self._require_closed(source)
        self._require_closed(target)
        super().rename(source, target)

    def publish(self, source: str, folder: Any, name: str) -> bool:
        self._require_closed(source)
        target = os.path.join(folder.path, name)
        if not self.unlinks_open and os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "exists", target)
        is_left: bool = super().publish(source, folder, name)
        return is_left

    def replace(self, source: str, folder: Any, name: str) -> None:
        self._require_closed(source)
        super().replace(source, folder, name)

    # Locks: whoever had to wait would wait for this very thread

    def lock(self, fd: int) -> None:
        assert self.try_lock(fd), f"waits for ever for {self.opened[fd]}"

    def try_lock(self, fd: int) -> bool:
        if not super().try_lock(fd):
            return False
        self.locks[fd] = self.opened[fd]
        return True

    def unlock(self, fd: int) -> None:
        self.locks.pop(fd, None)
        super().unlock(fd)

    def share_lock(self, fd: int) -> None:
        import fcntl

        self.locks.pop(fd, None)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _watched(name: str) -> Callable[..., object]:
    original = getattr(ModelDisk, name)

    def call(disk: ModelDisk, *arguments: Any) -> object:
        disk.before(name, arguments)
        return original(disk, *arguments)

    return call


for _name in dir(flowserver.Disk):
    if not _name.startswith("_") and callable(getattr(flowserver.Disk, _name)):
        setattr(ModelDisk, _name, _watched(_name))


class State(NamedTuple):
    """What the files say of the upload, as a process that starts now would read it."""

    ledger: Any  # None where there is none
    data: bytes | None  # of an unfinished upload
    published: dict[str, bytes]


class World:
    """One run: the folder, the processes, the clients, and what they may rely on."""

    def __init__(self, plan: Plan, rng: random.Random, folder: Path) -> None:
        self.plan = plan
        self.rng = rng
        self.folder = folder
        self.now = START
        self.log: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.depth = 0  # of calls inside of calls
        self.calls_to_pause = 0  # until another process does something
        self.calls_to_death = 0
        self.dies_after: tuple[str, ...] = ()
        self.written = START  # when the ledger was, last
        self.doomed: ModelDisk | None = None
        self.bodies: list[Body] = []
        self.number = 0
        self.acks: list[Ack] = []  # those that may still be lost
        self.covered = flowserver.Ranges()  # what was ever acknowledged
        self.announced: list[str] = []
        self.kept: dict[str, bytes] = {}  # the finished files so far
        self.has_died = False
        self.is_over = False
        self.is_odd = rng.random() < 0.5 and not plan.is_contest
        self.losses = 0  # how often something acknowledged may have gone
        first = rng.randbytes(plan.size).replace(b"\0", b"\1")
        self.versions = [first, self.changed(first)][: plan.versions]
        self.known = KNOWN if self.can_be_mixed() else KNOWN - MIXING
        self.upload = self.upload_of(first)
        self.state_dir = folder / ".flowserver" / "v1"
        self.clients = [
            Client(name, number if plan.is_contest else 0)
            for number, name in enumerate(("anna", "bert")[: plan.people])
        ]
        self.is_doubtful = False  # one of several people's bodies broke off
        self.sites: list[Site] = [Site(number) for number in range(plan.sites)]
        for site in self.sites:
            site.disk = ModelDisk(self, plan.system)
        for site in self.sites:
            self.start(site)

    def changed(self, data: bytes) -> bytes:
        """Return another version: one byte or several are different."""
        other = bytearray(data)
        for place in self.rng.sample(range(len(data)), self.rng.choice((1, 1, 2, 5))):
            other[place] ^= 0x80
        return bytes(other)

    def can_be_mixed(self) -> bool:
        """Whether there are files of chunks of both versions that are neither."""
        chunks = [
            {version[low:high] for version in self.versions}
            for low, high in spans(self.plan.size)
        ]
        return sum(len(contents) > 1 for contents in chunks) > 1

    def upload_of(self, data: bytes) -> Any:
        key = flowserver.upload_key("", "id", "a.bin", len(data))
        return flowserver.Upload(key, "a.bin", len(data), "", "id", "a.bin")

    # Processes

    def start(self, site: Site) -> None:
        if self.plan.system == "windows":
            self.calls_to_pause = 0  # a token that another looks at can't be removed
        site.disk = ModelDisk(self, self.plan.system)
        site.store = flowserver.Store(
            str(self.folder),
            on_conflict=self.plan.policy,
            disk=site.disk,
            announce=self.announce if self.plan.announces else None,
            clock=lambda: self.now,
        )

    def announce(self, done: Any) -> None:
        held = [path for site in self.sites for path in site.disk.waited_for]
        assert not held, f"on_complete is called under locks: {held}"
        self.announced.append(done.id)
        self.require_right(Path(done.path).read_bytes(), done.path)

    def call(self, site: Site, work: Callable[[], Any]) -> Any:
        """Let a process do something; None when it dies of it."""
        self.depth += 1
        site.is_in_call = True
        if self.depth == 1:
            self.draw_pause()
        try:
            return work()
        except Killed:
            self.note("it dies")
            self.bury(site)
            return None
        finally:
            site.is_in_call = False
            self.depth -= 1

    def request(self, site: Site, work: Callable[[], Any]) -> Any:
        """Let a process do something that has no body; it is not refused."""
        try:
            return self.call(site, work)
        except flowserver.FlowError as error:
            self.note(f"refused: {error}")
            is_shut = self.plan.system == "windows" and self.plan.sites > 1
            assert is_shut and "may not write" in str(error), repr(error)
            return False

    def draw_pause(self) -> None:
        is_paused = not self.is_over and self.rng.random() < self.plan.inside
        self.calls_to_pause = self.rng.randrange(1, 25) if is_paused else 0

    def before_call(self, name: str) -> None:
        """Let another process do something inside of this one's call."""
        if self.depth != 1 or not self.calls_to_pause:
            return
        self.calls_to_pause -= 1
        if self.calls_to_pause:
            return
        if any(site.disk.waited_for for site in self.sites):
            self.calls_to_pause = 1
            return
        self.note(f"before {name}:")
        self.counts["inside a call"] += 1
        self.step()
        self.draw_pause()

    def dies_now(self, disk: ModelDisk) -> bool:
        if disk is not self.doomed:
            return False
        self.calls_to_death -= 1
        return self.calls_to_death <= 0 or disk.previous in self.dies_after

    def bury(self, site: Site) -> None:
        """A process is dead, and its bodies with it; another takes its place."""
        self.doomed = None
        self.has_died = True
        self.bodies = [body for body in self.bodies if body.site is not site]
        site.disk.is_dead = True
        self.start(site)

    # Steps

    def note(self, text: str) -> None:
        self.log.append("  " * self.depth + text)

    def free_sites(self) -> list[Site]:
        return [site for site in self.sites if not site.is_in_call]

    def free_bodies(self, is_given_up: bool = False) -> list[Body]:
        """Those that another process may go on with, or close."""
        bodies = [
            body
            for body in self.bodies
            if not body.site.is_in_call and body.is_given_up == is_given_up
        ]
        return bodies

    def step(self) -> None:
        """Let something happen."""
        plan, sites, bodies = self.plan, self.free_sites(), self.free_bodies()
        if not sites:
            return
        site = self.rng.choice(sites)
        weights: dict[Callable[[Site], None], float] = {
            self.begin: 25 if len(self.bodies) < 6 else 0,
            self.go_on: 50 if bodies else 0,
            self.cut: 6 if bodies else 0,
            self.overdo: 1 if bodies and not plan.is_contest else 0,
            self.ask: 5,
            self.jump: 5,
            self.sweep: 10 if self.depth else 3,
            self.expire: 3 if plan.expires else 0,
            self.forget: 4 if plan.deletes and self.may_delete() else 0,
            self.restart: 3,
            self.kill: 2 if plan.deaths else 0,
            self.doom: 3 if plan.deaths and not self.depth else 0,
            self.change: 10 if plan.is_in_turn else 0,
        }
        (act,) = self.rng.choices(list(weights), list(weights.values()))
        self.counts[act.__name__] += 1
        act(site)
        self.close_given_up()

    def begin(self, site: Site) -> None:
        clients = [client for client in self.clients if not client.is_in_call]
        if not clients:
            return
        client = self.rng.choice(clients)
        span = self.next_span(client)
        if span is None:
            return
        self.number += 1
        body = Body(self.number, site, client, span)
        self.note(
            f"{site.number}: {client.name} begins #{body.number}"
            f" [{body.start}, {body.end}) of version {body.version}"
        )

        def work() -> None:
            body.receiving = site.store.receive(self.upload, *span, client.name)
            self.bodies.append(body)

        self.attempt(body, work)

    def next_span(self, client: Client) -> tuple[int, int] | None:
        if self.plan.is_contest:
            return self.next_in_order(client)
        size, rng = self.plan.size, self.rng
        chance = rng.random() if self.is_odd else rng.random() * 0.8
        grid = spans(size)
        if chance < 0.55:
            grid = [span for span in grid if self.covered.gaps(*span)] or grid
        if chance < 0.80:
            return rng.choice(grid)
        low, high = sorted(rng.sample(range(size + 1), 2))
        if chance < 0.93:
            return low, high
        return (0, size) if chance < 0.97 else (low, low)

    def next_in_order(self, client: Client) -> tuple[int, int] | None:
        """Three at a time; from the beginning when all is sent, or refused."""
        own = [body for body in self.bodies if body.client is client]
        if len(own) >= 3:
            return None
        if not client.left:
            if own:
                return None
            client.left = spans(self.plan.size)
        return client.left.pop(0)

    def go_on(self, _: Site) -> None:
        body = self.rng.choice(self.free_bodies())
        self.go_on_with(body, self.rng.choice((1, 3, 5, 10, 20)))

    def go_on_with(self, body: Body, size: int) -> None:
        if body.is_recorded:
            self.close(body)
        elif body.position < body.end:
            self.write(body, min(body.end, body.position + size))
        else:
            self.commit(body)

    def write(self, body: Body, end: int) -> None:
        self.note(f"{body.site.number}: #{body.number} is written to {end}")
        block = self.versions[body.version][body.position : end]

        def work() -> None:
            body.receiving.write(block)
            body.position = end

        self.attempt(body, work)

    def commit(self, body: Body) -> None:
        self.note(f"{body.site.number}: #{body.number} is recorded")

        losses = self.losses

        def work() -> None:
            progress = body.receiving.commit()
            body.is_recorded = True
            self.counts["acknowledged"] += 1
            if losses == self.losses:
                self.acknowledge(body, progress.done)
            if progress.done is not None:
                self.check_answer(body, progress)

        self.attempt(body, work)
        if body in self.bodies and body.is_recorded and self.rng.random() < 0.7:
            self.close(body)

    def acknowledge(self, body: Body, done: Any) -> None:
        """From now on the bytes must not be lost."""
        self.covered.add(body.start, body.end)
        ack = Ack(body.client, body.version, body.start, body.end)
        is_known = ack in self.acks
        if not is_known and (done is None or self.plan.policy != "replace"):
            self.acks.append(ack)

    def lose(self) -> None:
        """What is in no finished file may be gone."""
        self.losses += 1
        self.covered = flowserver.Ranges()
        self.acks = [ack for ack in self.acks if self.is_finished(ack)]

    def check_answer(self, body: Body, progress: Any) -> None:
        """The file that a client is told of has the bytes that it sent."""
        self.counts["complete"] += 1
        mine = self.versions[body.version][body.start : body.end]
        if self.plan.policy == "replace" or self.plan.expires:
            return  # may have been replaced meanwhile
        theirs = Path(progress.done.path).read_bytes()[body.start : body.end]
        assert mine == theirs, f"#{body.number} is answered with another version"

    def attempt(self, body: Body, work: Callable[[], None]) -> None:
        """Do something with a body; a refusal is its end."""
        body.client.is_in_call = True
        try:
            self.call(body.site, work)
        except flowserver.FlowError as error:
            self.note(f"refused: {error}")
            self.check_refusal(body, error)
            self.drop(body)
        finally:
            body.client.is_in_call = False

    def check_refusal(self, body: Body, error: Any) -> None:
        """See whether it is one that the model allows; forget what it takes away."""
        text = str(error)
        self.counts[text] += 1
        assert type(error) in (flowserver.Conflict, flowserver.Trouble), repr(error)
        if "cancelled" in text:
            assert self.plan.may_cancel or self.plan.versions > 1, "not cancelled"
            return
        if "There is a file" in text:
            assert self.plan.policy == "refuse", "the name is not taken"
            self.lose()
            return
        if self.plan.system == "windows" and "may not write" in text:
            assert self.plan.sites > 1, "no other process has it open"
            return
        is_known = text.startswith(("Other bytes", "Another"))
        if self.is_odd and ODD in self.known and is_known:
            return
        is_right = self.plan.versions > 1 and is_known
        assert is_right, f"is refused without a reason: {error!r}"
        current = [ack for ack in self.acks if not self.is_finished(ack)]
        others = [ack for ack in current if ack.client is not body.client]
        if not others or self.written < self.now - QUIET:
            self.lose()

    def drop(self, body: Body) -> None:
        """A body has been refused; in a contest the client gives up all of its."""
        body.is_given_up = True
        if self.plan.is_contest:
            body.client.left = []
        self.close_given_up()

    def close_given_up(self) -> None:
        while gone := self.free_bodies(is_given_up=True):
            self.close(gone[0])

    def close(self, body: Body) -> None:
        self.note(f"{body.site.number}: #{body.number} is closed")
        self.bodies.remove(body)
        self.is_doubtful |= self.plan.people > 1 and not body.is_recorded
        self.call(body.site, body.receiving.close)

    def cut(self, _: Site) -> None:
        body = self.rng.choice(self.free_bodies())
        if self.may_cut(body):
            if self.plan.is_contest and not body.is_recorded:
                body.client.left.insert(0, (body.start, body.end))
            self.close(body)

    def may_cut(self, body: Body) -> bool:
        """Whether nobody must hear what the body would have said."""
        span = slice(body.start, body.end)
        is_told = len({version[span] for version in self.versions}) == 1
        is_harmless = is_told or body.is_recorded or IS_CUT not in self.known
        return is_harmless or not self.plan.is_contest

    def overdo(self, _: Site) -> None:
        """A body that is too short is recorded, or one byte too much is written."""
        body = self.rng.choice(self.free_bodies())
        if body.is_recorded:
            return
        is_short = body.position < body.end
        self.note(
            f"{body.site.number}: #{body.number} is too {short_or_long(is_short)}"
        )

        def work() -> None:
            if is_short:
                body.receiving.commit()
            else:
                body.receiving.write(b"!")
            raise AssertionError("is not refused")

        with contextlib.suppress(flowserver.Truncated, flowserver.Malformed):
            self.call(body.site, work)
        if body in self.bodies:
            self.close(body)

    def ask(self, site: Site) -> None:
        """Test a range; whoever need not send it has sent it."""
        client, span = (
            self.rng.choice(self.clients),
            self.rng.choice(spans(self.plan.size)),
        )
        self.note(f"{site.number}: {client.name} tests {span}")
        is_here = self.request(
            site, lambda: site.store.has(self.upload, *span, client.name)
        )
        if is_here and not self.depth:
            (low, high), mine = span, self.versions[client.version]
            state = self.look()  # it may have been finished inside of the call
            for data in (
                [*state.published.values()] if state.data is None else [state.data]
            ):
                if data[low:high] == mine[low:high]:
                    return
            raise AssertionError("what is here is another version, or nothing")

    def jump(self, _: Site) -> None:
        seconds = self.rng.choice((0, 1, 7, PAUSE))
        self.note(f"{seconds} seconds later")
        self.now += seconds

    def sweep(self, site: Site) -> None:
        self.note(f"{site.number}: sweeps")
        self.request(site, lambda: site.store.sweep(FOREVER, FOREVER))

    def expire(self, site: Site) -> None:
        self.note(f"{site.number}: sweeps receipts")
        self.request(site, lambda: site.store.sweep(FOREVER, -1))

    def forget(self, site: Site) -> None:
        client = self.rng.choice(self.clients)
        self.note(f"{site.number}: {client.name} deletes")
        is_gone = self.request(
            site, lambda: site.store.forget(self.upload, client.name)
        )
        if is_gone or is_gone is None:
            self.lose()

    def may_delete(self) -> bool:
        return not self.plan.is_contest or DELETED not in self.known

    def restart(self, site: Site) -> None:
        is_read = self.depth and self.plan.system == "windows"  # its token, maybe
        if is_read or any(body.site is site for body in self.bodies):
            return
        self.note(f"{site.number}: is closed and opened again")

        def work() -> None:
            site.store.close()
            self.require_nothing_open(site)
            self.start(site)

        self.request(site, work)

    def kill(self, site: Site) -> None:
        if not self.may_die(site):
            return
        self.note(f"{site.number}: is killed")
        site.disk.die()
        self.bury(site)

    def doom(self, site: Site) -> None:
        """One of the next calls of a process is its last."""
        if self.may_die(site) and not self.plan.is_contest:
            self.doomed, self.calls_to_death = site.disk, self.rng.randrange(1, 60)
            self.dies_after = self.rng.choice(((), GIVES_NAME, ("rename",)))
            if self.dies_after:
                self.calls_to_death = 1000
            self.note(
                f"{site.number}: will die at its call {self.calls_to_death},"
                f" or after {self.dies_after}"
            )

    def may_die(self, site: Site) -> bool:
        return all(self.may_cut(body) for body in self.bodies if body.site is site)

    def change(self, _: Site) -> None:
        """The file is changed, long after it was finished."""
        (client,) = self.clients
        ledger = self.look().ledger if not self.depth else None
        is_over = ledger is None or ledger.finished
        is_sent = self.covered.total == self.plan.size
        if self.bodies or self.depth or not is_over or not is_sent:
            return
        client.version = 1 - client.version
        self.now += PAUSE
        self.acks, self.covered = [], flowserver.Ranges()
        self.note(f"{PAUSE} seconds later the file is version {client.version}")

    # What must be so

    def look(self) -> State:
        """Read the files, without the store's help, locks or memory."""
        published = {
            name: (self.folder / name).read_bytes()
            for name in os.listdir(self.folder)
            if name != ".flowserver"
        }
        try:
            text = (self.state_dir / f"{self.upload.key}.ledger").read_bytes()
        except FileNotFoundError:
            return State(None, None, published)
        ledger = flowserver._Ledger(self.upload.key, -1)
        ledger.read_lines(text)
        if not ledger.generation:
            return State(None, None, published)
        if ledger.finished:
            return State(ledger, None, published)
        path = self.state_dir / f"{ledger.key}-{ledger.generation}.data"
        data = path.read_bytes() if path.exists() else b""
        return State(ledger, data, published)

    def check(self) -> None:
        state = self.look()
        if state.ledger is not None:
            path = self.state_dir / f"{self.upload.key}.ledger"
            self.written = path.stat().st_mtime
        self.check_published(state)
        if state.data is not None and not self.is_taken_over(state):
            self.check_recorded(state)
        for ack in self.acks:
            assert self.holds(state, ack), (
                f"[{ack.start}, {ack.end}) of {ack.client.name} was acknowledged,"
                " and is lost"
            )
        if self.plan.policy == "replace":  # by another version, from now on
            self.acks = [ack for ack in self.acks if not self.is_finished(ack, state)]

    def check_published(self, state: State) -> None:
        for name, data in state.published.items():
            self.require_right(data, name)
        if self.plan.policy != "replace":
            for name, data in self.kept.items():
                assert state.published.get(name) == data, f"{name} is not what it was"
        self.kept = state.published
        if self.plan.versions == 1:
            assert len(state.published) < 2, "there is a second copy"

    def require_right(self, data: bytes, name: str) -> None:
        if data not in self.versions:
            origin = [
                "".join(str(n) for n, v in enumerate(self.versions) if v[i] == byte)
                for i, byte in enumerate(data[: self.plan.size])
            ]
            raise AssertionError(f"{name} is wrong: {len(data)} bytes of {origin}")

    def is_taken_over(self, state: State) -> bool:
        """Whether a process died when the file had its name, and no receipt yet."""
        names = [path for path, *_ in state.ledger.intents]
        return state.data == b"" and any(name in state.published for name in names)

    def check_recorded(self, state: State) -> None:
        """The data file has what each sender has sent, as it was sent."""
        for client in self.clients:
            mine = self.versions[client.version]
            for low, high in state.ledger.sent.get(hash_of(client), ()):
                assert state.data is not None
                assert state.data[low:high] == mine[low:high], (
                    f"[{low}, {high}) is not what {client.name} sent"
                )

    def is_finished(self, ack: Ack, state: State | None = None) -> bool:
        """Whether a finished file has the bytes."""
        mine = self.versions[ack.version][ack.start : ack.end]
        published = (state or self.look()).published.values()
        return any(data[ack.start : ack.end] == mine for data in published)

    def holds(self, state: State, ack: Ack) -> bool:
        if self.is_finished(ack, state) or ack.start == ack.end:
            return True
        if state.ledger is None or state.ledger.finished:
            return False
        sent = state.ledger.sent.get(hash_of(ack.client), flowserver.Ranges())
        return not sent.gaps(ack.start, ack.end)

    def require_nothing_open(self, site: Site) -> None:
        assert not site.disk.opened, f"stays open: {site.disk.opened}"
        assert not site.disk.folders, "a folder stays open"

    # A run

    def run(self) -> None:
        for _ in range(self.plan.steps):
            self.step()
            self.check()
        self.doomed, self.is_over = None, True
        self.end_bodies()
        self.check_rest()
        if self.plan.versions == 1:
            self.check_end()
            if self.plan.policy != "refuse" or not self.kept:
                self.send_all(self.rng.choice(self.clients))
        self.close_all()
        if self.plan.announces and self.plan.versions == 1:
            self.check_announcements()

    def end_bodies(self) -> None:
        self.note("all bodies end")
        while self.bodies:
            body = self.rng.choice(self.bodies)
            if body.is_given_up or (self.may_cut(body) and self.rng.random() < 0.5):
                self.close(body)
            else:
                self.go_on_with(body, 20)
            self.check()

    def check_rest(self) -> None:
        """Nobody has what only those need who have bodies under way."""
        for site in self.sites:
            names = {os.path.basename(path) for path in site.disk.opened.values()}
            extra = {n for n in names if not n.endswith((".ledger", ".live"))}
            assert not extra, f"{site.number} keeps open: {extra}"
            locks = [p for p in site.disk.locks.values() if not p.endswith(".live")]
            assert not locks, f"{site.number} keeps locked: {locks}"
            assert not site.disk.folders, "a folder stays open"
            for ledger in site.store._ledgers.values():
                assert not ledger.users, f"{site.number} still uses the ledger"
                assert not ledger.attempts, f"{site.number} still claims ranges"

    def check_end(self) -> None:
        """Of one version, all that was acknowledged is a file in the end."""
        if self.has_died or self.plan.system == "windows":
            self.now += PAUSE
            self.note(f"{PAUSE} seconds later")
            self.sweep(self.rng.choice(self.sites))
        if self.covered.total < self.plan.size or self.is_doubtful:
            return  # what broke off must come again before several people's file ends
        self.counts["ends"] += 1
        assert list(self.look().published.values()) == self.versions, "not finished"

    def send_all(self, client: Client) -> None:
        """A client that begins once more is not refused, and gets its file."""
        self.note(f"{client.name} sends all of version {client.version}")
        done = None
        for low, high in spans(self.plan.size):
            store, data = (
                self.rng.choice(self.sites).store,
                self.versions[client.version],
            )
            with store.receive(self.upload, low, high, client.name) as body:
                body.write(data[low:high])
                done = body.commit().done
            self.acks.append(Ack(client, client.version, low, high))
            self.check()
        assert done is not None, "the last chunk does not complete the file"
        assert Path(done.path).read_bytes() == data, "the file is another version"

    def close_all(self) -> None:
        """Nothing is left when all is over."""
        self.note("all is over")
        for site in self.sites:
            site.store.close()
            self.require_nothing_open(site)
        del self.sites[1:]
        (site,) = self.sites
        self.start(site)
        self.now += PAUSE
        site.store.sweep(FOREVER, FOREVER)
        self.check()
        for _ in range(2):
            site.store.sweep(-1, -1)
        left = {p.name for p in self.state_dir.iterdir() if p.suffix != ".live"}
        left.discard("names.lock")
        assert not left, f"is left over: {left}"
        assert site.store.open_uploads == 0, "counts an upload that is gone"
        self.acks = []
        if self.plan.versions > 1:
            self.send_all_if_free()
        site.store.close()
        self.require_nothing_open(site)
        left = {path.name for path in self.state_dir.iterdir()}
        assert not [name for name in left if name.endswith(".live")], "is left over"

    def send_all_if_free(self) -> None:
        client = self.rng.choice(self.clients)
        if self.plan.policy != "refuse":
            self.send_all(client)

    def check_announcements(self) -> None:
        is_simple = not self.plan.deletes and not self.plan.expires
        times = collections.Counter(self.announced)
        if not self.has_died:
            assert set(times.values()) <= {1}, f"announced twice: {times}"
        if is_simple:
            assert len(times) == 1, f"announced: {times}"


def short_or_long(is_short: bool) -> str:
    return "short" if is_short else "long"


def spans(size: int) -> list[tuple[int, int]]:
    """Return the chunks of a file."""
    return [(low, min(low + CHUNK, size)) for low in range(0, size, CHUNK)]


def hash_of(client: Client) -> str:
    return str(flowserver._sender_hash(client.name))


@contextlib.contextmanager
def repeatable(rng: random.Random) -> Iterator[None]:
    """Let names be drawn from the seed, and blocks be small."""

    def token_hex(size: int) -> str:
        return rng.randbytes(size).hex()

    with (
        mock.patch.object(flowserver.secrets, "token_hex", token_hex),
        mock.patch.object(flowserver, "BLOCK_SIZE", BLOCK),
    ):
        yield


class InterleavingsTest(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = quick_folder("interleavings-")
        self.addCleanup(shutil.rmtree, self.folder)
        self.counts: collections.Counter[str] = collections.Counter()

    def run_seed(self, seed: int, people: int, versions: int) -> None:
        rng = random.Random(f"{seed} {people} {versions}")
        plan = draw_plan(rng, people, versions)
        folder = self.folder / str(seed)
        folder.mkdir()
        with repeatable(random.Random(seed)):
            world = None
            try:
                world = World(plan, rng, folder)
                world.run()
            except Exception as error:
                steps = "\n".join(world.log) if world else ""
                raise AssertionError(
                    f"seed {seed}: {error!r}\n{plan}\n{steps}\n-> {error!r}"
                ) from error
        self.counts += world.counts
        shutil.rmtree(folder)

    def run_all(self, people: int, versions: int) -> None:
        for seed in range(FIRST_SEED, FIRST_SEED + RUNS):
            self.run_seed(seed, people, versions)
        counts = ", ".join(f"{n} {what}" for what, n in self.counts.most_common())
        print(f"\n{RUNS} runs: {counts}", flush=True)

    def test_one_person(self) -> None:
        self.run_all(1, 1)

    def test_two_people_with_one_version(self) -> None:
        self.run_all(2, 1)

    def test_two_people_with_two_versions(self) -> None:
        self.run_all(2, 2)

    def test_one_person_who_changes_the_file(self) -> None:
        self.run_all(1, 2)


if __name__ == "__main__":
    unittest.main()
