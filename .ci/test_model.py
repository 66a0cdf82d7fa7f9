"""A model of clients: what browsers do to the real store, in thousands of orders.

A run is drawn from a seed.  Browsers (model.py) send files to one to three UploadApps
over one folder, each of which is a process.  Requests go on in any order and get into
trouble; people pause, reload, open tabs, move, send again; processes die and sweep; the
clock jumps; files are moved away, edited, replaced.

Two runs of three have one version of each file, and in them is judged:

- what is visible below upload_dir is what somebody sent, whole, and stays as it is;
- whoever saw each chunk answered ok, and no error, has got the file in the end;
- what was answered 200 is in a finished file, or recorded for that sender;
- errors come only where section 4 of the design has them, and sending again ends well;
- on_complete is called for each file, once unless a process died;
- nothing stays in the temp folder, and nothing open.

In the third run a file changes and keeps its size.  Then a finished file may be a mix,
but only as far as nobody can know: nothing in it contradicts what was answered 200, the
samples were asked for, and what was under way was waited for.  What else gets lost then
is counted.  How often the samples show a change, `print_figures` tells.

FLOWSERVER_MODEL is the number of runs, FLOWSERVER_SEED the first seed, FLOWSERVER_FILE
another flowserver.py, to see this fail on a broken one.  ``test_model.py 7`` replays
seed 7 with all that it does, ``test_model.py figures`` prints the figures.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import itertools
import json
import logging
import os
import random
import shutil
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import model
from attack import flowserver, quick_folder
from model import FOREVER, Exchange, Page, Person, Process, Task, Turns, Wrong

RUNS = int(os.environ.get("FLOWSERVER_MODEL") or 800)
FIRST_SEED = int(os.environ.get("FLOWSERVER_SEED") or 1)
HOUR, DAY = 3600, 86400
WAIT = 10 - 1  # as the store's for what may still differ, and a little less

CHANGED, UNDONE = flowserver._CHANGED, flowserver._UNDONE
CANCELLED = flowserver._CANCELLED


class Plan(NamedTuple):
    """What a run is like."""

    changes: bool  # a file changes, and keeps its size
    size: int
    chunk_sizes: tuple[int, ...]
    people: int
    processes: int
    identity: str  # browser, owner, secret
    cookies: bool
    moves: str  # never, changes, alternates
    policy: str  # on_conflict
    announces: bool
    removes: str  # what the application does with files: nothing, at once, later, edits
    deletes: bool
    dies: bool
    ages: bool  # receipts end, what is unfinished gets stale
    trouble: float  # how many requests have it
    links: bool  # a file can have two names
    rate: float  # how often a call to the disk lets others go on
    steps: int


def draw_plan(rng: random.Random, changes: bool) -> Plan:
    identities = ["browser", "browser", "owner"] + ["secret"] * (not changes)
    identity, cookies = rng.choice(identities), rng.random() < 0.7
    is_known = cookies or identity != "browser"  # wherever they are
    return Plan(
        changes=changes,
        size=rng.choice((0, 7, 17, 20, 30, 30, 45, 45, 58, 70)),
        chunk_sizes=rng.choice(((10,), (10,), (10,), (10, 5, 20))),
        people=rng.choice((1, 1, 2)),
        processes=rng.choice((1, 1, 2, 3)),
        identity=identity,
        cookies=cookies,
        moves=rng.choice(("never", "changes", "alternates")) if is_known else "never",
        policy=rng.choice(("rename", "rename", "rename", "replace", "refuse")),
        announces=rng.random() < 0.5,
        removes=rng.choice(("nothing", "nothing", "at once", "later", "edits")),
        deletes=rng.random() < 0.15,
        dies=rng.random() < 0.3,
        ages=rng.random() < 0.25,
        trouble=rng.choice((0, 0.1, 0.3)),
        links=rng.random() < 0.8,
        rate=rng.choice((0, 0.1, 0.5)),
        steps=rng.randrange(40, 400),
    )


class Ack(NamedTuple):
    """Bytes that were answered 200."""

    key: str
    content: bytes
    start: int
    end: int
    began: float
    is_partial: bool  # the file was not finished then


class Finished:
    """A file that was seen below upload_dir."""

    def __init__(self, content: bytes, since: float) -> None:
        self.content, self.since = content, since
        self.until = FOREVER  # when it was removed, edited or replaced


def made_of(content: bytes, versions: list[bytes]) -> bool:
    """Whether each byte is that of a version."""
    return all(byte in column for byte, *column in zip(content, *versions, strict=True))


# ---- the world -----------------------------------------------------------------------


class World:
    """One run."""

    def __init__(
        self, plan: Plan, rng: random.Random, folder: Path, is_verbose: bool
    ) -> None:
        self.plan, self.rng, self.folder = plan, rng, folder
        self.turns = Turns(rng, plan.rate)
        self.state_dir = folder / ".flowserver" / "v2"
        self.is_verbose = is_verbose
        self.is_calm = False  # nothing goes wrong any more,
        self.calm_since = FOREVER  # and since when
        self.has_died = self.is_disturbed = False  # a process; a finished file
        self.notes: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.locks: dict[int, tuple[Process, int]] = {}  # of descriptors, by inode
        self.files: dict[str, Finished] = {}  # that are there
        self.finished: list[Finished] = []  # that ever were
        self.published: list[str] = []  # their paths
        self.published_inodes: set[int] = set()
        self.owners: dict[str, Person] = {}  # of uploads, by key
        self.named: dict[str, float] = {}  # when an upload's file got its name, last
        self.dropped: dict[str, float] = {}  # when an upload was dropped, last
        self.mixed = self.taken = 0.0  # when a mix was published, a file taken, last
        self.told: list[tuple[str, str, float]] = []  # id, path, time of on_complete
        self.acks: list[Ack] = []  # that must not be lost
        self.skipped: list[Page] = []  # that needed not send all of it
        self.exchanges: list[Exchange] = []
        self.arrivals: list[tuple[Exchange, Any]] = []  # answers, None for errors
        self.numbers = itertools.count()
        self.people: list[Person] = []
        self.processes = [self.new_process() for _ in range(plan.processes)]
        for number in range(plan.people):
            self.people.append(Person(self, number, rng.randbytes(plan.size)))

    def new_process(self) -> Process:
        return Process(self, next(self.numbers))

    def note(self, text: str) -> None:
        self.notes.append(f"{self.turns.now - model.START:10.2f} {text}")

    def hear_warning(self, sentence: str) -> None:
        # What died was named, and then edited by the application, in this moment.
        was_edited = self.has_died and self.is_disturbed
        is_taken = self.plan.policy == "refuse" and "There is a file" in sentence
        if not (was_edited or is_taken):
            raise Wrong(f"warns: {sentence}")

    # Steps

    def step(self) -> None:
        """Let something happen."""
        self.turns.now += 0.01
        choices = (
            (60 * bool(self.turns.ready()), self.go_on),
            (30 * bool(self.arrivals), self.deliver),
            (4, self.use),
            (2, self.operate),
            (2, self.pass_time),
        )
        weights, acts = zip(*choices, strict=True)
        self.rng.choices(acts, weights)[0]()

    def go_on(self) -> None:
        self.turns.resume(self.rng.choice(self.turns.ready()))

    def deliver(self) -> None:
        """An answer arrives, or an error does."""
        place = self.rng.randrange(len(self.arrivals))
        exchange, response = self.arrivals.pop(place)
        if response:
            set_cookie = dict(response.headers).get("Set-Cookie", "")
            name, _, value = set_cookie.partition(";")[0].partition("=")
            if name and self.plan.cookies:
                exchange.person.cookies[name] = value
        exchange.page.hear(exchange, response.status if response else 0)

    def use(self) -> None:
        """A person does something."""
        person = self.rng.choice(self.people)
        pages = person.open_pages()
        if not pages:
            if self.plan.changes and person.pages and self.rng.random() < 0.6:
                self.change(person, self.rng.choice(("all", "one", "one", "few")))
            person.open()
            return
        page = self.rng.choice(pages)
        acts = ["pause", "reload", "leave", "tab", "move", "cancel"] + ["wait"] * 3
        act = self.rng.choice(acts + ["leave"] * 3 * self.plan.changes)
        if page.is_paused:
            page.upload()
        elif act == "pause":
            page.stop("paused")
        elif act in ("reload", "leave"):
            page.stop("left")
            if act == "reload":
                person.open()
        elif act == "tab" and len(pages) < 2:
            person.open()
        elif act == "move" and self.plan.moves == "changes":
            person.moves += 1
            self.note(f"{page} moves to {person.address()}")
        elif act == "cancel" and self.plan.deletes:
            for each in pages:
                each.stop("left")
            Exchange(page, None, "DELETE")

    def change(self, person: Person, kind: str) -> None:
        """The file changes, and keeps its size."""
        old = person.versions[-1]
        new, places = bytearray(old), range(len(old))
        count = {"all": len(old), "few": len(old) // 4}.get(kind, min(1, len(old)))
        if kind == "first chunk":
            places = places[:10]
        elif kind == "last chunk":
            places = places[-13:]
        for place in self.rng.sample(places, count):
            new[place] ^= self.rng.randrange(1, 256)
        if bytes(new) not in person.versions:
            person.versions.append(bytes(new))
            where = [place for place in places if new[place] != old[place]]
            self.note(f"a file changes at {where}")

    def operate(self) -> None:
        """The server's side does something."""
        process, plan = self.rng.choice(self.processes), self.plan
        act = self.rng.choice(("sweep", "sweep", "die", "doom", "remove"))
        if act == "sweep":
            self.sweep()
        elif act == "die" and plan.dies:
            process.die("at once")
        elif act == "doom" and plan.dies:
            process.calls_to_death = self.rng.randrange(1, 80)
            process.dies_at = self.rng.choice(("", "", "publish", "rename", "unlink"))
        elif act == "remove" and self.files and plan.removes in ("later", "edits"):
            self.remove(self.rng.choice(sorted(self.files)))

    def remove(self, path: str) -> None:
        """The application moves a file away, or edits it."""
        file = self.files.get(path)
        if file is None or file.until < FOREVER:
            return
        self.note(f"the application takes {path}")
        file.until, self.is_disturbed = self.turns.now, True
        self.taken = self.turns.now
        if self.plan.removes == "edits":
            place, content = self.rng.randint(0, self.plan.size), file.content + b"!"
            with open(self.folder / path, "rb+") as edited:
                edited.seek(place)
                edited.write(bytes([content[place] ^ 1]))
            os.utime(self.folder / path, (self.turns.now, self.turns.now))
        else:
            os.unlink(self.folder / path)
            del self.files[path]

    def pass_time(self) -> None:
        """Seconds, or hours, or a week."""
        is_up = self.plan.ages and all(process.app for process in self.processes)
        jumps = [1, 5, 11, 61] + [4000, 4000, 8 * DAY] * is_up
        self.jump(self.rng.choice(jumps))

    def jump(self, seconds: float) -> None:
        self.note(f"{seconds} s pass")
        self.turns.now += seconds
        if seconds > 7 * DAY:
            self.sweep()

    def sweep(self) -> None:
        process = self.rng.choice(self.processes)
        Task(self.turns, process, process.sweep)

    def settle(self) -> None:
        """All that is under way ends, without new trouble."""
        self.is_calm, self.calm_since = True, min(self.calm_since, self.turns.now)
        for process in self.processes:
            process.calls_to_death, process.dies_at = 0, ""
        for person in self.people:
            for page in person.open_pages():
                if page.is_paused:
                    page.upload()
        for _ in range(20000):
            if not self.go_on_or_deliver():
                return
        raise Wrong("never ends")

    def go_on_or_deliver(self) -> bool:
        """Let what is under way go on, and pass the time until something may."""
        self.turns.now += 0.01
        acts = [self.go_on] * bool(self.turns.ready())
        acts += [self.deliver] * bool(self.arrivals)
        if acts:
            self.rng.choice(acts)()
        elif self.turns.tasks:
            self.turns.now = min(task.until for task in self.turns.tasks)
            if self.turns.now == FOREVER:
                raise Wrong("a deadlock")
        return bool(acts or self.turns.tasks)

    # What is known of uploads

    def exchange(self) -> Exchange | None:
        """Return the request that is being handled."""
        tasks = (e for e in self.exchanges if e.task is self.turns.current)
        return next(tasks, None)

    def meet(self, key: str) -> None:
        """The request that is being handled is about this upload, of one person."""
        exchange = self.exchange()
        assert exchange is not None
        exchange.key, person = key, exchange.person
        person.keys.add(key)
        if self.owners.setdefault(key, person) is not person:
            raise Wrong("two people have one upload")

    def look(self, key: str) -> Any:
        """Return what the ledger says, read without the store's help."""
        state, path = flowserver._State(), self.state_dir / f"{key}.ledger"
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_bytes().splitlines(True):
                if line.endswith(b"\n"):
                    state = state.after(*json.loads(line[9:]))
        return state

    def claims(self, key: str) -> set[str]:
        """Return the bodies that have said no end, as the ledger's lines say it."""
        names: set[str] = set()
        for line in (self.state_dir / f"{key}.ledger").read_bytes().splitlines(True):
            if line.endswith(b"\n"):
                kind, *values = json.loads(line[9:])
                if kind == "upload":
                    names = set()
                elif kind == "claim":
                    name, *span = values
                    (names.add if any(span) else names.discard)(name)
        return names

    def has(self, content: bytes, since: float) -> bool:
        """Say whether a file was there after a time."""
        return any(f.content == content and f.until >= since for f in self.finished)

    # Judges of files

    def see(self, process: Process, source: str, target: str) -> None:
        """A file got its name: it is what somebody sent, or a mix."""
        if ".flowserver" in target:
            return
        path, key = os.path.relpath(target, self.folder), os.path.basename(source)[:40]
        with open(target, "rb") as file:
            content = file.read()
            self.published_inodes.add(os.fstat(file.fileno()).st_ino)
        self.note(f"{path} is published")
        if path in self.files:
            if self.plan.policy == "rename":
                raise Wrong(f"{path} is overwritten")
            self.files[path].until, self.is_disturbed = self.turns.now, True
        self.files[path] = Finished(content, self.turns.now)
        self.finished.append(self.files[path])
        self.published.append(path)
        if not any(content in person.versions for person in self.people):
            self.judge_mix(key, content)
        self.judge_wait(process, key)
        self.named[key] = self.turns.now

    def judge_mix(self, key: str, content: bytes) -> None:
        """Nobody could know: nothing contradicts it."""
        people = [p for p in self.people if made_of(content, p.versions)]
        if not (self.plan.changes and people):
            raise Wrong("a wrong file is visible")
        # Equal bytes under the name that was taken are not published again.
        since = max(self.named.get(key, 0.0), self.look(key).begun.time)
        for ack in self.acks:
            is_other = content[ack.start : ack.end] != ack.content[ack.start : ack.end]
            is_stored = ack.key == key and ack.began > since and ack.is_partial
            if is_stored and is_other:
                raise Wrong(f"a mix: [{ack.start}, {ack.end}) was answered 200")
        where = "one process" if self.plan.processes == 1 else "several"
        self.counts[f"a mix that nobody can know of ({where})"] += 1
        self.mixed = self.turns.now

    def coming(self, process: Process, key: str) -> list[Exchange]:
        """Return what still brings bytes of an upload, which nobody may have ended."""
        here = [e for e in self.exchanges if e.process is process and e.key == key]
        begun = self.look(key).begun.time
        coming = (e for e in here if e.is_coming and e.joined > begun)
        return [e for e in coming if not self.is_contradicted(e)]

    def judge_wait(self, process: Process, key: str) -> None:
        """A file gets its name: what may still differ was waited for."""
        end, awaited = self.exchange(), self.coming(process, key)
        if end and not end.is_sweeping:
            is_whole = len(end.body) == self.plan.size
            if self.turns.now - end.arrived > WAIT:
                self.judge_delay(process, end, is_whole)
                return
            if is_whole:
                return
            awaited = [e for e in awaited if e.joined < end.arrived]
            awaited += [e for e in self.asked(process, key) if e.ended < end.arrived]
        if awaited:
            raise Wrong(f"nobody waits for {awaited}")

    def judge_delay(self, process: Process, end: Exchange, is_whole: bool) -> None:
        """It has waited to the last: for something, if nothing else takes time."""
        here = [e for e in self.exchanges if e.process is process and e.key == end.key]
        late = [e for e in here if e is not end and e.ended > end.arrived + WAIT / 2]
        asked = [e for e in here if e.method == "GET" and e.ended > end.arrived - 2]
        came = [e for e in here if e.body and e.joined <= self.turns.now]
        for one in asked:
            if not any(e.overlaps(one) and e.began > one.ended for e in came):
                late.append(one)
        if self.calm_since < end.arrived and (is_whole or not late):
            raise Wrong(f"{end} waits for nothing")

    def is_contradicted(self, exchange: Exchange) -> bool:
        """Others bring other bytes to its place: it may have been ended."""
        rivals = (other for other in self.exchanges if other.overlaps(exchange))
        return any(other.differs(exchange) for other in rivals)

    def asked(self, process: Process, key: str) -> list[Exchange]:
        """Return the tests that asked for a sample which has not come."""
        here = [e for e in self.exchanges if e.process is process and e.key == key]
        asked = (e for e in here if e.was_sample and self.turns.now - e.began < WAIT)
        return [e for e in asked if not any(o.replaces(e) for o in here)]

    def judge_files(self) -> None:
        there = {path.name for path in self.folder.iterdir()} - {".flowserver"}
        if there != set(self.files):
            raise Wrong(f"there are {there}")
        for path, file in self.files.items():
            content = (self.folder / path).read_bytes()
            if file.until == FOREVER and content != file.content:
                raise Wrong(f"{path} has changed")
        contents = {file.content for file in self.files.values()}
        is_still = not (self.plan.changes or self.is_disturbed)
        if is_still and len(contents) < len(self.files):
            raise Wrong("there are two copies of one file")

    def judge_temp(self, kept: tuple[str, ...]) -> None:
        kept += (".part", ".call") if self.has_died else ()
        for path in self.state_dir.iterdir():
            is_kept = path.suffix in kept or path.name == "names.lock"
            key = path.name[:40]
            state = self.look(key)
            if path.suffix == ".data":
                has_bytes = state.ranges.total or self.has_died
                is_mine = path.stem == f"{key}-{state.generation}"
                is_kept = is_kept and is_mine and state.is_unfinished and has_bytes
            elif path.suffix == ".ledger":
                is_kept = is_kept and bool(state.generation or self.has_died)
                if state.claims and not self.has_died:
                    raise Wrong(f"{path.name} has claims of what is over")
            if state.is_unfinished and state.is_complete:
                raise Wrong(f"{path.name} is complete, and never finished")
            if not is_kept:
                raise Wrong(f"{path.name} is left over")

    def judge_told(self) -> None:
        """on_complete was called for each file; once, unless a process died."""
        for path, file in self.files.items():
            told = [when for _, name, when in self.told if name == path]
            if file.until == FOREVER and max(told, default=0) < file.since:
                raise Wrong(f"on_complete was not called for {path}")
        if not self.has_died:
            times = collections.Counter(path for _, path, _ in self.told)
            if collections.Counter(self.published) - times:
                raise Wrong(f"on_complete was called only for {times}")
            if len({key for key, _, _ in self.told}) < len(self.told):
                raise Wrong("on_complete was called twice for one upload")

    # Judges of answers

    def judge_answer(self, exchange: Exchange, response: Any) -> None:
        status, key = exchange.status, exchange.key
        self.note(f"{exchange} ends with {status} {response.body.decode()[:200]}")
        if status >= 400:
            exchange.error = json.loads(response.body)["error"]
            self.judge_error(exchange, key)
        elif exchange.method == "POST":
            exchange.page.keys.add(key)
            is_partial = json.loads(response.body)["status"] == "partial"
            place = (exchange.start, exchange.end, exchange.began, is_partial)
            if self.dropped.get(key, 0) < exchange.began:
                self.acks.append(Ack(key, exchange.page.content, *place))
            if is_partial:
                self.judge_version(exchange, self.look(key))
        elif self.is_quiet(key, exchange.began):
            self.judge_test(exchange, self.look(key))

    def is_quiet(self, key: str, since: float) -> bool:
        """Say whether a ledger has not been written to since then."""
        path = self.state_dir / f"{key}.ledger"
        return path.exists() and path.stat().st_mtime < since

    def judge_test(self, exchange: Exchange, state: Any) -> None:
        """What was told, or cancelled, is so."""
        if exchange.method == "DELETE":
            if state.is_unfinished:
                raise Wrong(f"{exchange} has not cancelled anything")
            return
        is_edge = exchange.start == 0 or exchange.end == state.ranges.end
        is_edge = is_edge and self.plan.identity != "secret"
        is_open = state.is_unfinished and not state.is_complete
        is_here = is_open and not state.ranges.gaps(exchange.start, exchange.end)
        exchange.was_sample = is_here and is_edge
        if (exchange.status == 200) != (is_here and not is_edge):
            raise Wrong(f"{exchange} is told so of {list(state.ranges)}")
        if exchange.status == 200 and self.plan.changes:
            self.skipped.append(exchange.page)

    def judge_version(self, exchange: Exchange, state: Any) -> None:
        """It went on in the upload that it was begun in, or in the one after that."""
        versions = (state.generation, state.begun.supersedes)
        is_old = state.begun.time < exchange.arrived  # nothing has come in between
        if is_old and exchange.found.generation not in versions and state.is_unfinished:
            raise Wrong(f"{exchange} goes on in another version")

    def judge_receipt(self, path: str, before: Any) -> None:
        """What is cut down says all that must be known."""
        now = self.look(os.path.basename(path)[:40])
        before.claims = {name: one for name, one in before.claims.items() if any(one)}
        for name in ("begun", "finished", "claims", "is_announced", "came_again"):
            if getattr(before, name) != getattr(now, name):
                raise Wrong(f"a receipt is cut down, and loses {name}")

    def judge_error(self, exchange: Exchange, key: str) -> None:
        """Errors come only where section 4 of the design has them."""
        error, is_right, began = exchange.error, False, exchange.began
        is_changed = self.plan.changes or self.is_disturbed
        has_ended = max(self.named.values(), default=0.0) >= began
        if exchange.status == 408:
            is_right = exchange.rest != "goes on"
        elif error == CHANGED:
            is_right = exchange.has_dropped
        elif error == UNDONE:
            rivals = [other for other in self.exchanges if other.overlaps(exchange)]
            met = [o for o in rivals if o.ended >= began]
            elsewhere = [o for o in met if o.process is not exchange.process]
            is_right = bool(elsewhere or is_changed and (met or has_ended))
            is_right |= self.taken >= began
        elif error == CANCELLED:
            begun, found = self.look(key).begun, exchange.found
            may_follow = found and found.finished and found.begun != begun
            may_follow = may_follow and begun.supersedes == found.generation
            is_right = begun.time >= began and not may_follow
            is_right |= self.dropped.get(key, 0) >= began
        elif "is gone" in error:  # a private file is swept after an hour of silence;
            was_edited = self.has_died and self.is_disturbed  # named, died, edited
            is_late = exchange.ended - began > HOUR
            is_right = was_edited or is_late or self.taken >= began
        elif "There is a file" in error:
            is_right = self.plan.policy == "refuse" and bool(self.published)
        elif "handed on" in error:
            is_right = is_changed and self.plan.announces
        if not is_right:
            raise Wrong(f"{exchange} is refused without a reason: {error}")

    def judge_drop(self, process: Process, path: str) -> None:
        """A ledger is about to go: only for a reason that section 4 has."""
        key, state = os.path.basename(path)[:40], self.look(os.path.basename(path)[:40])
        if not state.generation:  # it was made for nothing
            return
        reason = self.reason_to_drop(process, key, state)
        self.note(f"{key[:4]} is dropped, being {reason}")
        self.dropped[key] = self.turns.now
        exchange, person = self.exchange(), self.owners.get(key)
        if exchange:
            exchange.has_dropped = True
        if state.is_unfinished:
            self.acks = [ack for ack in self.acks if ack.key != key]
        if person and reason == "refused":
            person.refused = self.turns.now
        elif person and state.is_unfinished and reason != "empty":
            for page in person.open_pages():
                page.excuse = reason

    def reason_to_drop(self, process: Process, key: str, state: Any) -> str:
        exchange, is_refusing = self.exchange(), self.plan.policy == "refuse"
        if is_refusing and state.is_unfinished and state.is_complete and self.published:
            return "refused"
        if exchange is None or exchange.is_sweeping:
            return self.reason_to_sweep(process, key, state)
        if exchange.method == "DELETE" and state.is_unfinished:
            return "cancelled"
        is_part = exchange.method == "POST" and len(exchange.body) < self.plan.size
        if state.finished and state.came_again and is_part:
            return "refused"
        if state.is_unfinished and exchange.method == "POST":
            if not (state.ranges.total or self.claims(key)):
                return "empty"
            if self.is_refuted(exchange, state.begun.time):
                return "refused"
        raise Wrong(f"{exchange} drops an upload without a reason")

    def is_refuted(self, exchange: Exchange, begun: float) -> bool:
        """Other bytes of its place had come before it, or before it left for this."""
        joined = exchange.joined if begun < exchange.joined else self.turns.now
        rivals = (other for other in self.exchanges if other.overlaps(exchange))
        return any(o.arrived <= joined and o.differs(exchange) for o in rivals)

    def reason_to_sweep(self, process: Process, key: str, state: Any) -> str:
        ours = [e for e in self.exchanges if e.process is process and e.key == key]
        files = [self.state_dir / f"{key}.ledger"]
        files += self.state_dir.glob(f"{key}-{state.generation}.data")
        age = self.turns.now - max(file.stat().st_mtime for file in files)
        is_told = state.is_announced or not self.plan.announces
        is_old = age > 7 * DAY
        if state.finished:
            is_old = is_told and age > HOUR
        came = [e for e in ours if e.status == 200 and e.method == "POST"]
        was_here = state.finished and any(self.turns.now - e.began < HOUR for e in came)
        if state.is_unfinished and len(files) == 1 and self.has_died:
            return "lost"  # killed once it had its name, which another file has got
        if not is_old or was_here or self.coming(process, key):
            raise Wrong(f"{process} sweeps {key}, which is wanted")
        return "stale"

    def count_error(self, exchange: Exchange, status: int) -> None:
        """A page shows an error: how often, where one version is all there is?"""
        if status and not (self.plan.changes or self.is_disturbed):
            self.counts[f"shown: {exchange.error}"] += 1

    def judge_page(self, page: Page) -> None:
        """Who saw each chunk answered ok, and no error, has got the file."""
        if not page.is_complete or self.has(page.content, page.began):
            return
        if len(page.keys) > 1:
            tests = "with tests" if page.person.tests else "without tests"
            page.excuse = f"its first requests came from two addresses, {tests}"
        elif self.plan.changes and self.mixed > page.began:
            page.excuse = "a mix"
        elif self.plan.changes and max(self.named.values(), default=0) > page.began:
            page.excuse = "the version before ended meanwhile"
        elif self.plan.changes and page.person.refused > page.began:
            page.excuse = "another request was told of the change"
        elif self.plan.policy == "refuse" and page.person.refused > page.began:
            page.excuse = "another request was told that there is a file already"
        elif page in self.skipped:
            page.excuse = "what was here was of the version before"
        if not page.excuse:
            raise Wrong(f"{page} saw each chunk answered ok, and has no file")
        self.counts[f"silent loss: {page.excuse}"] += 1

    def judge_ack(self, ack: Ack) -> None:
        """What was acknowledged is in a file, or recorded."""
        span, state = slice(ack.start, ack.end), self.look(ack.key)
        files = (f.content for f in self.finished if f.until >= ack.began)
        if any(content[span] == ack.content[span] for content in files):
            return
        if self.plan.removes == "edits":  # at once, say; it is compared as it is there
            there = (self.folder / path for path in self.files)
            if any(one.read_bytes()[span] == ack.content[span] for one in there):
                return
        path = self.state_dir / f"{ack.key}-{state.generation}.data"
        is_here = state.is_unfinished and not state.ranges.gaps(ack.start, ack.end)
        if not is_here or path.read_bytes()[span] != ack.content[span]:
            raise Wrong(f"[{ack.start}, {ack.end}) was answered 200, and is lost")

    # A run

    def run(self) -> None:
        for _ in range(self.plan.steps):
            self.step()
        self.settle()
        self.sweep()
        self.settle()
        for person in self.people:
            for page in person.pages:
                self.judge_page(page)
        for ack in self.acks:
            self.judge_ack(ack)
        for _ in range(2):
            if self.plan.announces:
                self.judge_told()
            for person in self.people:
                self.send_again(person)
        self.judge_files()
        self.judge_temp((".ledger", ".data"))
        self.end()

    def send_again(self, person: Person) -> None:
        """Who sends the file once more gets it, and is refused once at most."""
        self.note("once more, without trouble")
        # In another process the end does not wait for what differs: once more, then.
        for _ in range(1 + len(person.keys) + self.plan.changes):
            page = person.open()
            self.settle()
            if not page.has_failed:
                break
        if not page.is_complete:
            if self.plan.policy == "refuse" and self.files:
                return
            raise Wrong(f"{page} is refused again")
        self.judge_page(page)

    def end(self) -> None:
        """Nothing is open, and a week later nothing is left."""
        gc.collect()  # TODO: without this
        if any(process.disk.opened for process in self.processes):
            raise Wrong("a descriptor stays open")
        for _ in range(2):
            self.jump(8 * DAY)
            self.settle()
        self.has_died = False
        self.judge_temp(())

    def close(self) -> None:
        """End all threads."""
        for process in self.processes:
            process.is_dead = True
            for fd in list(process.disk.opened):
                model.Files.close(process.disk, fd)
        while self.turns.tasks:
            self.turns.resume(self.turns.tasks[0])


# ---- runs ----------------------------------------------------------------------------


class Complaints(logging.Handler):
    """What the log calls a bug is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            raise Wrong(f"{record.getMessage()}: {record.exc_info[1]!r}")


@contextlib.contextmanager
def arranged(turns: Turns, rng: random.Random) -> Iterator[None]:
    """Give the module the model's threads, time and random names, and small blocks."""

    def now() -> float:
        return turns.now

    def token_hex(size: int) -> str:
        return rng.randbytes(size).hex()

    locks = rng.choice((1, 1000))  # how many ledgers have one lock in a process
    names = {"token_hex": token_hex, "token_bytes": rng.randbytes}
    threads = {
        "Lock": lambda: model.Lock(turns),
        "Condition": lambda: model.Condition(turns),
    }
    with mock.patch.multiple(
        flowserver,
        create=True,
        hash=lambda key: int(key, 16) % locks,
        threading=types.SimpleNamespace(**threads),
        time=types.SimpleNamespace(time=now, monotonic=now),
        secrets=types.SimpleNamespace(**names),
        BLOCK_SIZE=4,
        _PAGE_SIZE=rng.choice((100, 400, 4096)),
        _RECENT_LEDGERS=rng.choice((1, 64)),
    ):
        yield


def play(
    seed: str, plan: Plan, work: Callable[[World], None], is_verbose: bool = False
) -> World:
    """Let a world have its run; raises AssertionError with all that happened in it."""
    folder = quick_folder("model-")
    world = World(plan, random.Random(seed), folder, is_verbose)
    gc.disable()  # else what nobody refers to any more is closed at any time
    try:
        with arranged(world.turns, random.Random(seed + " names")):
            try:
                work(world)
            finally:
                world.close()
    except (Exception, Wrong) as error:
        trace = "\n".join(world.notes)
        message = f"seed {seed}: {plan}\n{trace}\n-> {error!r}"
        raise AssertionError(message) from error
    finally:
        gc.enable()
        shutil.rmtree(folder)
    return world


def run_seed(seed: int, is_verbose: bool = False) -> World:
    plan = draw_plan(random.Random(f"plan {seed}"), changes=seed % 3 == 0)
    return play(str(seed), plan, World.run, is_verbose)


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """Handing over between threads is 15 times as fast so."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {random.choice(sorted(cores))})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Hear the log, and let collections of garbage pass over what is here already."""
    handler, log = Complaints(), logging.getLogger("flowserver")
    log.addHandler(handler)
    gc.freeze()
    try:
        with on_one_core():
            yield
    finally:
        gc.unfreeze()
        log.removeHandler(handler)


class ModelTest(unittest.TestCase):
    def test_no_run_goes_wrong(self) -> None:
        counts: collections.Counter[str] = collections.Counter()
        with listening():
            for seed in range(FIRST_SEED, FIRST_SEED + RUNS):
                counts += run_seed(seed).counts
        told = "\n".join(f"{count:9} {what}" for what, count in counts.most_common())
        print(f"\n{RUNS} runs:\n{told}", flush=True)


# ---- figures -------------------------------------------------------------------------

CHANGES = ("all", "one", "first chunk", "last chunk")
OUTCOMES = ("noticed", "right all the same", "the old file", "a mix")


def resume_changed(world: World, kind: str) -> None:
    """Send a file, stop somewhere, change it, send it again; count what comes of it."""
    (person,) = world.people
    person.library, person.retries, person.tests = model.FLOW, 0, True
    world.is_calm = True
    page = person.open()
    stop = world.rng.randrange(1, len(page.chunks))
    while sum(chunk.is_done for chunk in page.chunks) < stop:
        world.go_on_or_deliver()
    page.stop("left")
    world.settle()
    if world.files:  # what was under way has completed it
        return
    world.change(person, kind)
    page = person.open()
    world.settle()
    (content,) = [file.content for file in world.finished] or [b""]
    if page.has_failed:
        world.counts["noticed"] += 1
    elif content == page.content:
        world.counts["right all the same"] += 1
    else:
        is_old = content == person.versions[0]
        world.counts["the old file" if is_old else "a mix"] += 1


def print_figures(runs: int = 200) -> None:
    """How often the samples show that a file was changed between two halves of it."""
    for processes, count, kind in itertools.product((1, 3), (4, 20, 100), CHANGES):
        counts: collections.Counter[str] = collections.Counter()
        for number in range(runs):
            seed = f"{number} {processes} {count} {kind}"
            plan = draw_plan(random.Random(seed), True)._replace(
                size=count * 10 + 3,
                chunk_sizes=(10,),
                people=1,
                processes=processes,
                identity="browser",
                moves="never",
                removes="nothing",
                rate=0,
            )
            counts += play(seed, plan, lambda w, k=kind: resume_changed(w, k)).counts
        told = sum(counts[outcome] for outcome in OUTCOMES)
        shares = (f"{100 * counts[each] / told:3.0f} % {each}" for each in OUTCOMES)
        where = f"{processes} processes, {count:3} chunks, {kind:11}"
        print(f"{where}: {', '.join(shares)} (of {told})", flush=True)


def main(argument: str) -> None:
    with listening():
        if argument == "figures":
            print_figures()
        else:
            print("\n".join(run_seed(int(argument), is_verbose=True).notes))


if __name__ == "__main__":
    if len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        main(sys.argv[1])
    else:
        unittest.main()
