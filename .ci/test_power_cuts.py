"""Power cuts: what was answered is there, whatever the disk had not written yet.

Simulated: the store's writes, flushes, links and renames are recorded. For every prefix
of that trace states of the disk are made that have everything flushed so far, and of
the rest a subset: lost writes, torn writes (512 bytes or pages), names lost one by one.
On each state the store is started and the client goes on; promises 1 to 3 are asserted
for all that had been answered. Then each single flush of the store is left out in turn:
every time these tests must fail.

Real (root, Linux): ext4 on a loop device; the server is stopped at a random moment, the
image copied, mounted and examined.

FLOWSERVER_CUTS is the number of real cuts, and 20 times that many simulated states are
tried for each scenario; unset, 50 cuts and a thousand states.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from attack import (
    AttackCase,
    Client,
    File,
    Server,
    eventually,
    finished_files,
    flowserver,
    leftovers,
    let_an_hour_pass,
    noise,
    quick_folder,
)

CUTS = int(os.environ.get("FLOWSERVER_CUTS") or 50)
STATES = 12 * CUTS  # of one scenario
Store = flowserver.Store
Site = tuple[str, int]

# ---- what is recorded ----------------------------------------------------------------


class Trace:
    """All that happened to a folder, in order, by however many stores over it."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.events: list[tuple[Any, ...]] = []
        self.lock = threading.RLock()
        self.known: dict[int, int] = {}  # inode number -> our number of the file
        self.inodes: list[int] = []  # our number -> inode number
        self._held: list[int] = []

    def add(self, *event: Any) -> None:
        self.events.append(event)

    def split(self, path: str) -> tuple[str, str]:
        """Folder and name of a path, the folder relative to the root."""
        folder, name = os.path.split(os.path.relpath(path, self.root))
        return folder, name

    def new_file(self, fd: int, path: str) -> None:
        # No inode number is given twice while we hold it.  (A dup would share locks.)
        self._held.append(os.open(path, os.O_RDONLY))
        status = os.fstat(fd)
        self.known[status.st_ino] = number = len(self.inodes)
        self.inodes.append(status.st_ino)
        self.add("create", *self.split(path), number, status.st_mtime_ns)

    def number(self, fd: int) -> int:
        return self.known[os.fstat(fd).st_ino]

    def close(self) -> None:
        for fd in self._held:
            os.close(fd)

    # What other programs do beside the store; they do not flush.

    def copy_in(self, path: str, data: bytes) -> None:
        full = os.path.join(self.root, path)
        fd = os.open(full, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self.new_file(fd, full)
        os.pwrite(fd, data, 0)
        self.add("write", self.number(fd), 0, data, os.fstat(fd).st_mtime_ns)
        os.close(fd)

    def take(self, path: str) -> None:
        """Take a finished file away; and this program does flush."""
        self.add("taking", path)
        os.unlink(os.path.join(self.root, path))
        self.add("unlink", *os.path.split(path))
        self.add("flush names", os.path.dirname(path))
        self.add("taken", path)

    def remove_folder(self, path: str) -> None:
        shutil.rmtree(os.path.join(self.root, path))
        self.add("removed", path)
        self.add("unlink", *os.path.split(path))


class RecordingDisk(flowserver.Disk):
    """Does what Disk does, except for waiting for the disk, and tells the trace."""

    def __init__(self, trace: Trace, skipped: Site | None = None) -> None:
        super().__init__(sync=True)
        self.trace = trace
        self.skipped = skipped
        self.exercised: set[Site] = set()
        self.before_flush: Callable[[int], None] = lambda fd: None
        self.dies_after = ""  # the call after which the process is killed,
        self.calls_left = 0  # when it was made so often
        self.is_dead = False
        self.opened: set[int] = set()

    @contextlib.contextmanager
    def acting(self, name: str) -> Iterator[None]:
        """Do one call that changes something, unless the process is dead."""
        with self.trace.lock:
            self.require_alive()
            yield
        self.calls_left -= name == self.dies_after
        if self.dies_after and not self.calls_left:
            self.is_dead = True
            for fd in self.opened:  # as the system does; locks go with them
                os.close(fd)
            raise Killed

    def require_alive(self) -> None:
        if self.is_dead:
            raise Killed

    def open(self, path: str, flags: int) -> int:
        with self.acting("open"):
            is_new = not os.path.lexists(path)
            fd: int = super().open(path, flags)
            self.opened.add(fd)
            if is_new:
                self.trace.new_file(fd, path)
            return fd

    def close(self, fd: int) -> None:
        if not self.is_dead:
            self.opened.discard(fd)
            os.close(fd)

    def unlock(self, fd: int) -> None:
        if not self.is_dead:
            super().unlock(fd)

    def write(self, fd: int, block: Any, offset: int) -> None:
        with self.acting("write"):
            super().write(fd, block, offset)
            modified = os.fstat(fd).st_mtime_ns
            number = self.trace.number(fd)
            self.trace.add("write", number, offset, bytes(block), modified)

    def truncate(self, fd: int, size: int) -> None:
        with self.acting("truncate"):
            os.ftruncate(fd, size)
            modified = os.fstat(fd).st_mtime_ns
            self.trace.add("truncate", self.trace.number(fd), size, modified)

    def flush(self, fd: int) -> None:
        if not self.is_skipped(sys._getframe(1)):
            self.before_flush(fd)
            self.trace.add("flush", self.trace.number(fd))

    def flush_names(self, path: str) -> None:
        if not self.is_skipped(sys._getframe(1)):
            relative = os.path.relpath(path, self.trace.root)
            self.trace.add("flush names", "" if relative == "." else relative)

    def is_skipped(self, caller: Any) -> bool:
        self.require_alive()
        if caller.f_code is ENTERED:  # which flushes for those who have entered
            caller = caller.f_back
            while caller.f_code.co_filename != ENTERED.co_filename:
                caller = caller.f_back
        site = (caller.f_code.co_name, caller.f_lineno)
        self.exercised.add(site)
        return site == self.skipped

    def unlink(self, path: str) -> None:
        with self.acting("unlink"):
            if os.path.lexists(path):
                self.trace.add("unlink", *self.trace.split(path))
            super().unlink(path)

    def rename(self, source: str, target: str) -> None:
        with self.acting("rename"):
            super().rename(source, target)
            self._tell_rename(source, target)

    def publish(self, source: str, target: str) -> None:
        with self.acting("publish"):
            number = self.trace.known[os.stat(source).st_ino]
            super().publish(source, target)
            if self.links:
                self.trace.add("link", number, *self.trace.split(target))
            else:
                self._tell_rename(source, target)

    def _tell_rename(self, source: str, target: str) -> None:
        self.trace.add("rename", *self.trace.split(source), *self.trace.split(target))

    def make_folder(self, path: str, mode: int = 0o777) -> bool:
        with self.acting("make folder"):
            is_new: bool = super().make_folder(path, mode)
            if is_new:
                self.trace.add("make folder", *self.trace.split(path))
            return is_new


ENTERED = inspect.unwrap(flowserver._Ledgers.entered).__code__


class Killed(BaseException):
    """SIGKILL, for a store that shares its process with the test."""


# ---- what a disk may hold ------------------------------------------------------------


class Inode:
    """A file's bytes: those that are on the disk, and what may still be lost."""

    def __init__(self, modified: int) -> None:
        self.safe = bytearray()
        self.pending: list[tuple[Any, ...]] = []
        self.modified = modified

    def flush(self) -> None:
        self.safe = self.after_cut(lambda event: [(0, 1 << 60)])
        self.pending = []

    def after_cut(
        self, kept: Callable[[tuple[Any, ...]], list[tuple[int, int]]]
    ) -> bytearray:
        """The bytes when of each pending event only the `kept` places have survived."""
        data = bytearray(self.safe)
        for event in self.pending:
            places = kept(event)
            if event[0] == "truncate":
                if places:
                    del data[event[2] :]
                    data.extend(bytes(event[2] - len(data)))
                continue
            _, _, offset, block, _ = event
            for low, high in places:
                low, high = max(low, offset), min(high, offset + len(block))
                if low < high:
                    data.extend(bytes(max(0, high - len(data))))
                    data[low:high] = block[low - offset : high - offset]
        return data


class Names:
    """A folder: the names that are on the disk, and what may still be lost."""

    def __init__(self) -> None:
        self.safe: dict[str, Any] = {}
        self.pending: list[Change] = []


class Change:
    """One operation on names: it takes names away, and gives some, all or nothing."""

    def __init__(
        self, taken: list[tuple[Names, str]], given: list[tuple[Names, str, Any]]
    ) -> None:
        self.taken = taken
        self.given = given
        for names in {id(one[0]): one[0] for one in [*taken, *given]}.values():
            names.pending.append(self)

    def apply(self, names: Names, table: dict[str, Any]) -> None:
        for where, name in self.taken:
            if where is names:
                table.pop(name, None)
        for where, name, node in self.given:
            if where is names:
                table[name] = node


class Model:
    """What the recorded events have done to the disk, so far."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.root = Names()
        self.files: dict[int, Inode] = {}
        self.now: dict[
            tuple[int, str], Any
        ] = {}  # (id of Names, name): as programs see it

    def folder(self, path: str) -> Names:
        names = self.root
        for word in path.split("/") if path else []:
            names = self.now[id(names), word]
        return names

    def apply(self, event: tuple[Any, ...]) -> None:
        kind, *rest = event
        if kind in ("write", "truncate"):
            self.files[rest[0]].pending.append(event)
            self.files[rest[0]].modified = rest[-1]
        elif kind == "flush":
            self.files[rest[0]].flush()
        elif kind == "create":
            folder, name, number, modified = rest
            self.files[number] = Inode(modified)
            self._change([], [(self.folder(folder), name, self.files[number])])
        elif kind == "make folder":
            self._change([], [(self.folder(rest[0]), rest[1], Names())])
        elif kind == "link":
            number, folder, name = rest
            self._change([], [(self.folder(folder), name, self.files[number])])
        elif kind == "unlink":
            self._change([(self.folder(rest[0]), rest[1])], [])
        elif kind == "rename":
            source, target = self.folder(rest[0]), self.folder(rest[2])
            node = self.now[id(source), rest[1]]
            self._change([(source, rest[1])], [(target, rest[3], node)])
        elif kind == "flush names":
            self._flush_names(self.folder(rest[0]))

    def _change(
        self, taken: list[tuple[Names, str]], given: list[tuple[Names, str, Any]]
    ) -> None:
        Change(taken, given)
        for names, name in taken:
            self.now.pop((id(names), name), None)
        for names, name, node in given:
            self.now[id(names), name] = node

    def _flush_names(self, names: Names) -> None:
        """All changes of this folder are safe.

        That a file's old name elsewhere is gone is not: only that folder's flush, or
        luck, does that. The other way round a journal writes all of a rename.
        """
        for change in names.pending:
            change.apply(names, names.safe)
            if not any(where is names for where, _ in change.taken):
                continue
            for where, _, _ in change.given:
                if where is not names and change in where.pending:
                    change.apply(where, where.safe)
                    where.pending.remove(change)
        names.pending = []


class Cut:
    """One state of the disk after a power cut, chosen by a seed."""

    def __init__(self, model: Model, mood: str, rng: random.Random) -> None:
        self.model = model
        self.mood = mood
        self.rng = rng
        self.decided: dict[int, bool] = {}
        self.where: dict[int, str] = {}  # file that was made -> its path
        self.modified: dict[str, int] = {}

    def keeps_change(self, change: Change) -> bool:
        if id(change) not in self.decided:
            chance = {"nothing": 0.0, "bytes": 0.0, "all": 1.0, "names": 1.0}
            self.decided[id(change)] = self.rng.random() < chance.get(self.mood, 0.5)
        return self.decided[id(change)]

    def keeps_bytes(self, event: tuple[Any, ...]) -> list[tuple[int, int]]:
        """The places of a write that have survived."""
        everything = [(0, 1 << 60)]
        if self.mood in ("nothing", "names"):
            return []
        if self.mood in ("all", "bytes"):
            return everything
        if event[0] == "truncate" or self.mood in ("whole", "gaps"):
            lost = 0.2 if self.mood == "gaps" else 0.5  # gaps: most of what is behind
            return everything if self.rng.random() > lost else []
        unit = self.rng.choice((512, 4096))
        start, end = event[2], event[2] + len(event[3])
        return [
            (low, low + unit)
            for low in range(start - start % unit, end, unit)
            if self.rng.random() < 0.5
        ]

    def make(self, target: Path) -> None:
        self._make_folder(self.model.root, str(target))
        for path, modified in self.modified.items():
            os.utime(path, ns=(modified, modified))

    def _make_folder(self, names: Names, path: str) -> None:
        os.mkdir(path)
        table = dict(names.safe)
        for change in names.pending:
            if self.keeps_change(change):
                change.apply(names, table)
        for name, node in table.items():
            if isinstance(node, Names):
                self._make_folder(node, os.path.join(path, name))
            else:
                self._make_file(node, os.path.join(path, name))

    def _make_file(self, node: Inode, path: str) -> None:
        if id(node) in self.where:
            os.link(self.where[id(node)], path)
            return
        self.where[id(node)] = path
        with open(path, "wb") as file:
            file.write(node.after_cut(self.keeps_bytes))
        self.modified[path] = node.modified


class AfterCutDisk(flowserver.Disk):
    """The disk after the cut: its files have the inode numbers that they had."""

    def __init__(self, cut: Cut) -> None:
        super().__init__(sync=True)
        trace = cut.model.trace
        numbers = {id(node): number for number, node in cut.model.files.items()}
        self.inodes = {
            os.stat(path).st_ino: trace.inodes[numbers[node]]
            for node, path in cut.where.items()
        }

    def _known(self, status: Any) -> Any:
        if status is None:
            return None
        values = {
            name: getattr(status, name)
            for name in dir(status)
            if name.startswith("st_")
        }
        # What is made from now on gets numbers that no file had before.
        real = values["st_ino"]
        values["st_ino"] = self.inodes.get(real, real + (1 << 40))
        return types.SimpleNamespace(**values)

    def flush(self, fd: int) -> None:
        pass

    def flush_names(self, path: str) -> None:
        pass

    def stat(self, fd: int) -> Any:
        return self._known(super().stat(fd))

    def stat_path(self, path: str) -> Any:
        return self._known(super().stat_path(path))


# ---- what happens before the cut -----------------------------------------------------

CHUNK = 1300
OLD = noise(3 * CHUNK + 17, seed=1)
NEW = OLD[: CHUNK + 650] + noise(CHUNK + 667, seed=2)  # a chunk and a half: the same
OTHER = noise(3 * CHUNK + 17, seed=3)
LONG = noise(3 * 5000 + 99, seed=4)
SMALL = noise(5300, seed=5)
SMALL_TOO = noise(5300, seed=6)

PLAIN = File("a/b/report.bin", OLD, CHUNK)
CHANGED = File("a/b/report.bin", NEW, CHUNK)
TWIN = File("a/b/report.bin", OTHER, CHUNK, identifier="twin")
BESIDE = File("a/b/other.bin", OTHER, CHUNK)
SECRET = File("a/secret.bin", OLD, CHUNK, identifier=f"flowserver-{0:032}-1")
BIG = File("big.bin", LONG, 5000)
MANY = File("many.bin", SMALL, 100)
ONE = File("c/one.bin", SMALL, 1 << 20)
ANOTHER_ONE = File("c/one.bin", SMALL_TOO, 1 << 20, identifier="another")
EMPTY = File("c/empty", b"", CHUNK)


def upload_of(file: File) -> Any:
    identifier = file.identifier or f"{len(file.data)}-{file.path}"
    key = flowserver.upload_key("", "", identifier, file.path, len(file.data))
    names = (file.path, len(file.data), "", identifier)
    return flowserver.Upload(key, *names, file is SECRET)


class Life:
    """Stores over one folder, recorded, and clients that remember what was said."""

    def __init__(self, root: Path, skipped: Site | None = None) -> None:
        self.trace = Trace(root)
        self.skipped = skipped
        self.disks: list[RecordingDisk] = []
        self.settings: dict[str, Any] = {}
        self.fields: dict[str, str] = {}  # of the last chunk's form
        self.with_announce = True
        self.takes = False  # on_complete takes the file away
        self.has_links = True
        root.mkdir()

    def store(self) -> Any:
        """Start one more store, as another process would."""
        disk = RecordingDisk(self.trace, self.skipped)
        disk.links = self.has_links
        self.disks.append(disk)
        announce = self.announce if self.with_announce else None
        store = Store(self.trace.root, disk=disk, announce=announce, **self.settings)
        store.sweep(1e6, 1e6)
        return store

    def announce(self, done: Any) -> None:
        self.trace.add("announced", done.relative_path, done.id)
        if self.takes:
            self.trace.take(done.relative_path)

    def begin(self, store: Any, file: File, number: int) -> Any:
        return store.receive(upload_of(file), *file.edges(number))

    def end(self, body: Any, file: File, number: int) -> None:
        """Commit; from now on the client knows that the chunk is stored."""
        done = body.commit(self.fields).done
        body.close()
        self.answered(file, number, done.relative_path if done else "")

    def answered(self, file: File, number: int, path: str = "") -> None:
        self.trace.add("answered", file, number, path)

    def chunk(self, store: Any, file: File, number: int) -> None:
        with self.begin(store, file, number) as body:
            data = file.body(number)
            body.write(data[: len(data) // 2])
            body.write(data[len(data) // 2 :])
            self.end(body, file, number)

    def whole(self, store: Any, file: File) -> None:
        """Send a file of one chunk as a form that does not say how large it is."""
        upload = upload_of(file)
        with store.receive_whole(2 * upload.size) as whole:
            whole.write(file.body(1))
            done = whole.commit(upload, self.fields).done
        self.answered(file, 1, done.relative_path)

    def send(self, store: Any, *files: File) -> None:
        for file in files:
            for number in range(1, file.count + 1):
                self.chunk(store, file, number)

    def killed(
        self, store: Any, after: str, file: File, number: int, count: int = 1
    ) -> None:
        """Send a chunk, and be killed after so many more calls of this name."""
        store.disk.dies_after, store.disk.calls_left = after, count
        with contextlib.suppress(Killed):
            self.chunk(store, file, number)
        assert store.disk.is_dead

    def before_lines_are_flushed(self, act: Callable[[], None]) -> None:
        """Do something else when the first store is about to flush a ledger."""

        def meanwhile(fd: int) -> None:
            if os.readlink(f"/proc/self/fd/{fd}").endswith(".ledger"):
                act()

        self.disks[0].before_flush = meanwhile


def life_of_a_file(life: Life) -> None:
    store = life.store()
    life.send(store, PLAIN, BESIDE)


def life_of_a_big_file(life: Life) -> None:
    store = life.store()
    for number in (3, 1, 2):
        life.chunk(store, BIG, number)


def life_of_many_chunks(life: Life) -> None:
    """At the end the ledger is cut down."""
    store = life.store()
    life.send(store, MANY)
    life.chunk(store, MANY, MANY.count)


def life_of_long_lines(life: Life) -> None:
    """Lines that are longer than a sector come to the disk in pieces.

    At the end the ledger is cut down, as nobody is to be told.
    """
    life.with_announce = False
    life.fields = {"note": 3000 * "x"}
    store = life.store()
    life.send(store, PLAIN, BESIDE, BIG, TWIN)


def life_of_small_files(life: Life) -> None:
    life.with_announce = False
    store = life.store()
    life.send(store, ONE, EMPTY, ANOTHER_ONE)


def life_of_announced_small_files(life: Life) -> None:
    store = life.store()
    life.send(store, ONE, EMPTY, ANOTHER_ONE)


def life_of_files_that_are_taken(life: Life) -> None:
    """They must not come back."""
    life.takes = True
    store = life.store()
    life.send(store, PLAIN, BESIDE)


def life_of_twins(life: Life) -> None:
    store = life.store()
    for number in (1, 2, 3):
        life.chunk(store, PLAIN, number)
        life.chunk(store, TWIN, number)


def life_of_two_attempts(life: Life) -> None:
    """The second attempt at a chunk is the one that is stored."""
    store = life.store()
    life.chunk(store, PLAIN, 1)
    first = life.begin(store, PLAIN, 2)
    first.write(PLAIN.body(2)[:700])
    life.chunk(store, PLAIN, 2)
    first.write(PLAIN.body(2)[700:])
    life.end(first, PLAIN, 2)
    life.chunk(store, PLAIN, 3)


def life_of_attempts_in_two_processes(life: Life) -> None:
    """The later one takes the place of the first."""
    store, other = life.store(), life.store()
    life.chunk(store, PLAIN, 1)
    data = PLAIN.body(2)
    first, second = life.begin(store, PLAIN, 2), life.begin(other, PLAIN, 2)
    with first, second:
        second.write(data[:700])
        with contextlib.suppress(flowserver.Trouble):
            first.write(bytes(CHUNK))
            life.end(first, PLAIN, 2)
        second.write(data[700:])
        life.end(second, PLAIN, 2)
    life.chunk(store, PLAIN, 3)


def life_of_a_changed_file(life: Life) -> None:
    """Its first difference comes first."""
    store = life.store()
    life.send(store, PLAIN)
    for number in (2, 1, 3):
        life.chunk(store, CHANGED, number)


def life_of_a_refused_file(life: Life) -> None:
    """Its first chunk is answered because it is in the finished file.

    Who goes on after a refusal that was never heard has lost the first chunk: a file
    that was changed without changing its size (the end of DESIGN.md's section 4).
    """
    store = life.store()
    life.send(store, PLAIN)
    life.chunk(store, CHANGED, 1)
    life.trace.add("refused", CHANGED)
    with contextlib.suppress(flowserver.Conflict):
        life.chunk(store, CHANGED, 2)
    life.send(store, CHANGED)


def life_of_a_lost_answer(life: Life) -> None:
    store = life.store()
    life.send(store, PLAIN)
    life.chunk(store, PLAIN, 3)


def life_of_one_long_body(life: Life) -> None:
    """It is opened before its first byte, and breaks off after a checkpoint."""
    store, upload = life.store(), upload_of(SECRET)
    store.open(upload)
    life.answered(SECRET, 0)
    with store.receive(upload, 0, upload.size) as body:
        for number in (1, 2):
            body.write(SECRET.body(number))
            body.checkpoint()
            life.answered(SECRET, number)
        body.write(SECRET.body(3)[:500])
    life.chunk(store, SECRET, 3)


def life_of_forms(life: Life) -> None:
    store = life.store()
    for file in (ONE, ANOTHER_ONE):
        life.whole(store, file)


def life_of_forms_for_nobody(life: Life) -> None:
    life.with_announce = False
    life_of_forms(life)


def life_beside_a_copy(life: Life) -> None:
    """Another program has just put the very bytes there, and flushed nothing."""
    life.with_announce = False
    store = life.store()
    life.send(store, ONE)
    life.trace.copy_in("c/two.bin", SMALL)
    life.send(store, File("c/two.bin", SMALL, 1 << 20))
    life.trace.copy_in("c/three.bin", OLD)
    life.send(store, File("c/three.bin", OLD, CHUNK))


def life_with_a_folder_removed(life: Life) -> None:
    """One file is sent again as it was; that begins with a chunk after the end."""
    store, first = life.store(), File("d/first.bin", OLD, CHUNK)
    life.send(store, first)
    life.trace.remove_folder("d")
    life.send(store, File("d/second.bin", OTHER, CHUNK), first)


def life_with_replacement(life: Life) -> None:
    life.settings = {"on_conflict": "replace"}
    store = life.store()
    life.send(store, ONE, PLAIN)
    life.send(store, ANOTHER_ONE, TWIN)


def life_without_links(life: Life) -> None:
    life.has_links = False
    store = life.store()
    life.send(store, PLAIN, TWIN, ONE)


def life_of_deaths_at_the_beginning(life: Life) -> None:
    """SIGKILL after lines, bytes and names that were not flushed; others go on."""
    for file, call, count in (
        (PLAIN, "open", 2),  # the data file is there, and no claim
        (TWIN, "write", 3),  # two lines, and half of the bytes
        (BESIDE, "write", 5),  # the line that says that all are there
    ):
        life.killed(life.store(), call, file, 1, count)
        life.send(life.store(), file)


def life_of_deaths_at_the_end(life: Life) -> None:
    """SIGKILL around the file's name; then the power goes, too."""
    for file, call, count in (
        (PLAIN, "write", 5),  # its line: about to be named
        (TWIN, "publish", 1),  # it has it
        (BESIDE, "unlink", 1),  # finished, and not announced
    ):
        store = life.store()
        for number in range(1, file.count):
            life.chunk(store, file, number)
        life.killed(store, call, file, file.count, count)
        life.chunk(life.store(), file, file.count)


def life_with_a_test_in_between(life: Life) -> None:
    """Another process is asked for a chunk whose line is not flushed yet."""
    store, other = life.store(), life.store()
    life.chunk(store, SECRET, 1)

    def ask() -> None:
        if other.has(upload_of(SECRET), *SECRET.edges(2)):
            life.answered(SECRET, 2)

    life.before_lines_are_flushed(ask)
    life.chunk(store, SECRET, 2)


def life_with_a_status_in_between(life: Life) -> None:
    store, other = life.store(), life.store()
    life.chunk(store, SECRET, 1)

    def ask() -> None:
        status = other.status(upload_of(SECRET).key)
        if status.stored == [(0, 2 * CHUNK)]:
            life.answered(SECRET, 2)

    life.before_lines_are_flushed(ask)
    life.chunk(store, SECRET, 2)


def life_with_an_attempt_in_between(life: Life) -> None:
    store, other = life.store(), life.store()
    life.chunk(store, PLAIN, 1)
    life.before_lines_are_flushed(lambda: life.chunk(other, PLAIN, 2))
    life.chunk(store, PLAIN, 2)


def life_in_two_processes(life: Life) -> None:
    store, other = life.store(), life.store()
    for number in (1, 2, 3):
        life.chunk(store if number % 2 else other, PLAIN, number)
        life.chunk(other if number % 2 else store, BESIDE, number)


LIVES: tuple[Callable[[Life], None], ...] = (
    life_of_a_file,
    life_of_a_big_file,
    life_of_many_chunks,
    life_of_long_lines,
    life_of_small_files,
    life_of_announced_small_files,
    life_of_files_that_are_taken,
    life_of_twins,
    life_of_two_attempts,
    life_of_attempts_in_two_processes,
    life_of_a_changed_file,
    life_of_a_refused_file,
    life_of_a_lost_answer,
    life_of_one_long_body,
    life_of_forms,
    life_of_forms_for_nobody,
    life_beside_a_copy,
    life_with_a_folder_removed,
    life_with_replacement,
    life_without_links,
    life_of_deaths_at_the_beginning,
    life_of_deaths_at_the_end,
    life_with_a_test_in_between,
    life_with_a_status_in_between,
    life_with_an_attempt_in_between,
    life_in_two_processes,
)
MOODS = ("nothing", "names", "bytes", "all", "whole", "torn", "gaps")


# ---- what must be true after it ------------------------------------------------------


class Violation(AssertionError):
    """A promise that was not kept."""


class Aftermath:
    """The store starts on what is left; clients go on; the promises are asked."""

    def __init__(
        self, root: Path, cut: Cut, said: list[tuple[Any, ...]], life: Life
    ) -> None:
        self.root = root
        self.life = life
        self.answered: dict[File, set[int]] = {}
        self.complete: dict[File, str] = {}
        self.removed: set[str] = set()
        self.taking: set[str] = set()  # paths that on_complete takes away
        self.taken: set[str] = set()  # and has
        self.announced: dict[str, set[str]] = {}  # ids, by path
        self.disk = AfterCutDisk(cut)
        self.disk.links = life.has_links
        for event in said:
            self._hear(*event)

    def _hear(self, kind: str, *rest: Any) -> None:
        if kind == "answered":
            file, number, path = rest
            if self.complete.get(file) in self.removed:  # it is sent once more
                self._forget(file)
            told = self.answered.setdefault(file, set())
            told.add(number)
            # A changed file's first chunks get the answer of the finished one.
            if path and told >= set(range(1, file.count + 1)):
                self.complete[file] = path
                self.removed.discard(path)
        elif kind == "refused":
            self._forget(rest[0])
        elif kind in ("taking", "taken"):
            getattr(self, kind).add(rest[0])
        elif kind == "announced":
            self.announced.setdefault(rest[0], set()).add(rest[1])
        elif kind == "removed":
            self.removed |= {
                path
                for path in self.complete.values()
                if path.startswith(rest[0] + "/")
            }

    def _forget(self, file: File) -> None:
        self.answered.pop(file, None)
        self.complete.pop(file, None)

    def require(self, condition: object, sentence: str) -> None:
        if not condition:
            raise Violation(sentence)

    def check(self, files: list[File], way: str) -> None:
        store = Store(
            str(self.root),
            disk=self.disk,
            announce=self._announce if self.life.with_announce else None,
            clock=lambda: time.time() + 2 * 3600,  # then private files are swept
            **self.life.settings,
        )
        store.sweep(1e6, 1e6)
        versions = {file.data for file in LIFE_FILES}
        files = [file for file in files if file.path not in self.taking]
        at_start = finished_files(self.root)
        self._check_visible(at_start, versions)
        self._check_complete(at_start)
        for file in files:
            self._go_on(store, file, way, CHANGED in files)
        store.sweep(1e6, 1e6)
        self._check_end(files, at_start, versions)

    def _announce(self, done: Any) -> None:
        self.announced.setdefault(done.relative_path, set()).add(done.id)

    def _check_visible(self, found: dict[str, bytes], versions: set[bytes]) -> None:
        self.require(not self.taken & set(found), f"{self.taken} are back")
        foreign = {"c/two.bin", "c/three.bin"} - set(self.complete.values())
        for path, data in found.items():
            self.require(data in versions or path in foreign, f"{path} is wrong")

    def _check_complete(self, found: dict[str, bytes]) -> None:
        """What was called complete is there, under the name that was told."""
        for file, path in self.complete.items():
            if path in self.removed | self.taking:
                continue
            wanted = {one.data for one, name in self.complete.items() if name == path}
            if self.life.settings:  # replaced; the new one need not have been told yet
                wanted |= {one.data for one in LIFE_FILES if one.path == file.path}
            else:
                self.require(len(wanted) == 1, f"two files were called {path}")
            self.require(found.get(path) in wanted, f"{path} was answered and is lost")

    def _go_on(self, store: Any, file: File, way: str, has_changed: bool) -> None:
        """As a client that has lived through it, or whose page was loaded anew."""
        if 0 in self.answered.get(file, ()):
            with store._look(upload_of(file).key) as state:
                self.require(state.generation, "opened, and is lost")
        numbers = self._numbers(file, way, has_changed)
        try:
            last = self._send(store, file, numbers, way)
        except flowserver.Conflict:
            # After something has come again it can't be told what is of which version:
            # then the changed file is refused once, and taken from its beginning.
            self.require(file is CHANGED, "refused")
            numbers = set(range(1, file.count + 1))
            last = self._send(store, file, numbers, "sends all")
        if numbers:
            self.require(
                last is not None and last.done, f"{file.path} is never finished"
            )
            old = self.complete.get(file)
            new = last.done.relative_path
            self.require(old in (None, new), f"{old} was called {new} when sent again")

    def _numbers(self, file: File, way: str, has_changed: bool) -> set[int]:
        """The chunks that this client sends."""
        if file not in self.complete:
            told = self.answered.get(file, set()) if way == "remembers" else set()
            return set(range(1, file.count + 1)) - told
        if self.complete[file] in self.removed:  # it is sent once more
            return set(range(1, file.count + 1))
        is_over = self.life.settings or has_changed  # another one follows
        return {file.count} if way == "repeats" and not is_over else set()

    def _send(self, store: Any, file: File, numbers: set[int], way: str) -> Any:
        last = None
        for number in sorted(numbers):
            start, end = file.edges(number)
            if way == "tests" and store.has(upload_of(file), start, end):
                continue
            with store.receive(upload_of(file), start, end) as body:
                body.write(file.body(number))
                last = body.commit()
        return last

    def _check_end(
        self, files: list[File], at_start: dict[str, bytes], versions: set[bytes]
    ) -> None:
        found = finished_files(self.root)
        self._check_visible(found, versions)
        if not self.life.settings:
            for path, data in at_start.items():
                self.require(
                    found.get(path) == data, f"{path} was changed after its end"
                )
        for file in files:
            copies = [path for path, data in found.items() if data == file.data]
            same = {one.path for one in files if one.data == file.data}
            rivals = {one for one in files if one.path == file.path}
            if self.life.settings and len(rivals) > 1:
                self.require(len(copies) <= 1, f"copies: {copies}")
                continue
            self.require(0 < len(copies) <= len(same), f"{file.path}: copies {copies}")
        self.require(not leftovers(self.root), f"left over: {leftovers(self.root)}")
        if self.life.with_announce:
            self._check_announced(found)

    def _check_announced(self, found: dict[str, bytes]) -> None:
        for path in found:
            ids = self.announced.get(path, set())
            self.require(ids or path in self.removed, f"{path} is not announced")
            is_one = len(ids) == 1 or self.life.settings or path.startswith("d/")
            self.require(is_one, f"{path} is announced as {ids}")


LIFE_FILES = (PLAIN, CHANGED, TWIN, BESIDE, BIG, MANY, ONE, ANOTHER_ONE, EMPTY)
WAYS = ("remembers", "tests", "sends all", "repeats")


def told(event: tuple[Any, ...]) -> str:
    """An event in few words."""
    words = [one.path if isinstance(one, File) else one for one in event]
    return " ".join(str(word) for word in words if not isinstance(word, bytes))


class PowerCutCase(AttackCase):
    def setUp(self) -> None:
        self.home = quick_folder("flowserver-cut")
        self.addCleanup(shutil.rmtree, self.home)
        self.states = 0

    @contextlib.contextmanager
    def lived(
        self, what: Callable[[Life], None], skipped: Site | None = None
    ) -> Iterator[Life]:
        root = self.home / "live"
        shutil.rmtree(root, ignore_errors=True)
        life = Life(root, skipped)
        with without_flushes_at(life):
            what(life)
        try:
            yield life
        finally:
            life.trace.close()

    def cut_everywhere(self, life: Life, seed: int, states: int) -> None:
        """Cut after each event, in every mood, and look at `states` or so."""
        events = life.trace.events
        changes = [
            index
            for index, event in enumerate(events)
            if event[0] not in ("flush", "flush names", "announced")
        ]
        moods = MOODS * max(1, states // (len(changes) * len(MOODS)))
        moments = [
            (index + 1, mood, number)
            for index in changes
            for number, mood in enumerate(moods)
        ]
        rng = random.Random(seed)
        if len(moments) > states:
            moments = sorted(rng.sample(moments, states))
        model, done = Model(life.trace), 0
        for end, mood, number in moments:
            for event in events[done:end]:
                model.apply(event)
            done = end
            # Who remembers all that was said is the hardest to please.
            way = WAYS[(end + number) % len(WAYS) if mood != "nothing" else 0]
            cut = Cut(model, mood, random.Random(f"{seed} {end} {number}"))
            self.check_cut(life, cut, events[:end], way)

    def check_cut(
        self, life: Life, cut: Cut, past: list[tuple[Any, ...]], way: str
    ) -> None:
        root = self.home / "cut"
        shutil.rmtree(root, ignore_errors=True)
        cut.make(root)
        self.states += 1
        files = list(
            dict.fromkeys(
                event[1] for event in life.trace.events if event[0] == "answered"
            )
        )
        try:
            Aftermath(root, cut, past, life).check(files, way)
        except Exception as error:
            raise Violation(
                f"cut after event {len(past)} ({told(past[-1])}), {cut.mood}, client"
                f" {way}: {type(error).__name__}: {error}"
            ) from error


@contextlib.contextmanager
def without_flushes_at(life: Life) -> Iterator[None]:
    """Leave out the flush that a Life is to do without, wherever it is asked for."""

    def skipping(function: Callable[..., None]) -> Callable[..., None]:
        def flush(self: Any, *arguments: Any) -> None:
            disk = self.disk
            if not disk.is_skipped(sys._getframe(1)):
                function(self, *arguments)

        return flush

    with contextlib.ExitStack() as stack:
        for owner, name in FLUSHING:
            function = getattr(owner, name)
            stack.enter_context(mock.patch.object(owner, name, skipping(function)))
        yield


FLUSHING = [
    (flowserver._Ledger, name)
    for name in ("flush", "flush_names")
    if hasattr(flowserver._Ledger, name)
]


class SimulatedCutTest(PowerCutCase):
    """States that a disk may hold, made from what was recorded"""

    def test_what_was_answered_survives(self) -> None:
        for seed, what in enumerate(LIVES, 1):
            with self.subTest(what.__name__), self.lived(what) as life:
                self.cut_everywhere(life, seed, STATES)
        print(f"\n{self.states} simulated power cuts", flush=True)
        self.assertGreater(self.states, len(LIVES) * 100)


def flush_sites() -> set[Site]:
    """Function and line of every place where the store asks for a flush."""
    source = Path(flowserver.__file__).read_text(encoding="utf-8")
    rooms = source.index("\n# ---- ledgers -"), source.index("\n# ---- page -")
    first, last = (source.count("\n", 0, place) for place in rooms)
    return {
        (function.name, call.lineno)
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef)
        and first < function.lineno < last
        and function.name != "entered"
        for call in own_nodes(function)
        if isinstance(call, ast.Call) and asks_for_flush(call)
    }


def asks_for_flush(call: ast.Call) -> bool:
    is_flush = re.search(r"\.flush(_names)?$", ast.unparse(call.func))
    return bool(is_flush) or "flushes" in (word.arg for word in call.keywords)


def own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """What a function is made of, without the functions inside of it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef):
            yield node
            yield from own_nodes(node)  # type: ignore[arg-type]


class EveryFlushTest(PowerCutCase):
    """No flush can be left out"""

    def sites(self) -> dict[Site, list[Callable[[Life], None]]]:
        """Each place that asks for a flush, and the lives that come by it."""
        seen = []
        for what in LIVES:
            with self.lived(what) as life:
                sites = set().union(*(disk.exercised for disk in life.disks))
                seen.append((len(life.trace.events), what, sites))
        places: dict[Site, list[Callable[[Life], None]]] = {}
        for _, what, sites in sorted(seen, key=lambda one: one[0]):  # short ones first
            for site in sites:
                places.setdefault(site, []).append(what)
        return places

    def fails_without(self, site: Site, lives: list[Callable[[Life], None]]) -> str:
        for seed in range(1, 4):
            for what in lives:
                try:
                    with self.lived(what, skipped=site) as life:
                        self.cut_everywhere(life, seed, STATES)
                except Violation as violation:
                    return f"{what.__name__}: {violation}"
        return ""

    def test_without_any_one_flush_these_tests_fail(self) -> None:
        places = self.sites()
        self.assertEqual(flush_sites(), set(places), "never exercised")
        for site, lives in sorted(places.items()):
            with self.subTest(site):
                self.assertTrue(
                    self.fails_without(site, lives), f"{site} is not needed"
                )
        print(
            f"\n{len(places)} flushes left out one by one: each was missed", flush=True
        )


# ---- a real one ----------------------------------------------------------------------


def can_mount() -> bool:
    """Whether a file can be mounted as a disk here."""
    tools = ("mkfs.ext4", "mount", "umount")
    if (
        not sys.platform.startswith("linux")
        or os.geteuid()
        or not all(shutil.which(tool, path=PATH) for tool in tools)
    ):
        return False
    with tempfile.TemporaryDirectory() as home, contextlib.suppress(OSError):
        return Disk(Path(home, "image")).mounted(Path(home, "mount"), try_only=True)
    return False


PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class Disk:
    """An image of an ext4 file system, in a file."""

    def __init__(self, image: Path) -> None:
        self.image = image
        if not image.exists():
            with open(image, "wb") as file:
                file.truncate(24 << 20)
            self.call("mkfs.ext4", "-q", "-F", "-J", "size=4", str(image))

    def call(self, *command: str) -> None:
        subprocess.run(
            command, check=True, capture_output=True, env={**os.environ, "PATH": PATH}
        )

    def mounted(self, where: Path, try_only: bool = False) -> bool:
        where.mkdir(exist_ok=True)
        try:
            # Nothing is written by the clock: what the store has not asked for is lost.
            self.call("mount", "-o", "loop,commit=600", str(self.image), str(where))
        except subprocess.CalledProcessError:
            if not try_only:
                raise
            return False
        if try_only:
            self.call("umount", str(where))
        return True

    def unmount(self, where: Path) -> None:
        self.call("umount", str(where))

    def bytes_of_one_moment(self) -> bytes:
        """Return the image as it was at one moment, as the kernel goes on writing.

        A copy that is torn by that may have the emptied journal, and not yet what was
        in it: things that a real disk has.  What two readings agree on was there when
        the second one began.
        """
        image = self.image.read_bytes()
        while True:
            again = self.image.read_bytes()
            if again == image:
                return image
            image = again


def has_stopped(pid: int) -> bool:
    """Whether no thread of a process is in the middle of a call any more."""
    states = [
        stat.read_text().rpartition(")")[2].split()[0]
        for stat in Path(f"/proc/{pid}/task").glob("*/stat")
    ]
    return set(states) == {"T"}


class Visitor(threading.Thread):
    """Uploads file after file until the server is gone; knows what was said."""

    def __init__(self, port: int, name: str) -> None:
        super().__init__(daemon=True)
        self.client = Client(port)
        self.answered = self.client.stored
        self.label = name
        self.complete: dict[File, str] = {}

    def run(self) -> None:
        with self.client:
            for index in range(10_000):
                seed = int.from_bytes(f"{self.label}{index}".encode())  # no other's
                data = noise(30_000 + index, seed)
                file = File(f"{self.label}/{index % 3}/{index}.bin", data, 10_000)
                self.answered[file] = set()
                for number in range(1, file.count + 1):
                    answer = self.client.post(file, number)
                    if answer is None or answer.status != 200:
                        return
                    if answer.is_complete:
                        self.complete[file] = answer.json["path"]

    def count_answers(self) -> int:
        return sum(len(told) for told in list(self.answered.values()))


@unittest.skipUnless(can_mount(), "needs root, Linux and a loop device")
class RealCutTest(AttackCase):
    """ext4 on a loop device, stopped in the middle of its work"""

    def setUp(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="flowserver-ext4"))
        self.addCleanup(shutil.rmtree, self.home)
        self.disk = Disk(self.home / "image")
        self.mount = self.home / "mount"
        self.disk.mounted(self.mount)
        self.addCleanup(self.disk.unmount, self.mount)

    def cut(self, rng: random.Random) -> tuple[list[Visitor], Path]:
        """Upload, stop the server, take the disk as it is then."""
        copy = self.home / "copy"
        shutil.rmtree(self.mount / "uploads", ignore_errors=True)
        with Server(self.mount / "uploads") as server:
            visitors = [Visitor(server.port, name) for name in ("a", "b", "c")]
            for visitor in visitors:
                visitor.start()
            time.sleep(rng.uniform(0.02, 0.25))
            # On a slow machine or disk that may be too soon to have lost anything.
            few = rng.randrange(20)
            eventually(
                lambda: sum(one.count_answers() for one in visitors) >= few,
                f"{few} answers",
            )
            os.kill(server.pid, signal.SIGSTOP)
            eventually(lambda: has_stopped(server.pid), "the stop")
            copy.write_bytes(self.disk.bytes_of_one_moment())
        for visitor in visitors:
            visitor.join()
        return visitors, copy

    def test_what_was_answered_is_on_the_disk(self) -> None:
        rng = random.Random(7)
        answers = files = 0
        for number in range(CUTS):
            visitors, copy = self.cut(rng)
            where = self.home / "after"
            disk = Disk(copy)
            disk.mounted(where)
            try:
                with self.subTest(cut=number):
                    for visitor in visitors:
                        answers += visitor.count_answers()
                        files += len(visitor.complete)
                    self.examine(where / "uploads", visitors)
            finally:
                disk.unmount(where)
        print(
            f"\n{CUTS} real power cuts, {answers} chunks answered before them,"
            f" {files} files complete",
            flush=True,
        )
        self.assertGreater(answers, 5 * CUTS)

    def examine(self, folder: Path, visitors: list[Visitor]) -> None:
        known = {file.data for visitor in visitors for file in visitor.answered}
        let_an_hour_pass(folder)
        with Server(folder, sync=False) as server, server.client() as client:
            found = finished_files(folder)
            self.assertLessEqual(set(found.values()), known, "wrong files")
            for visitor in visitors:
                client.stored = visitor.answered
                for file, path in visitor.complete.items():
                    self.assertEqual(found.get(path), file.data, f"{path} is lost")
                    again = client.post(file, file.count)
                    self.assertEqual(again and again.json.get("path"), path)
                for file in set(visitor.answered) - set(visitor.complete):
                    answers = client.send(file, "remembers")
                    self.assertTrue(answers[-1].is_complete, f"{file.path}: {answers}")
        self.assert_stored_once(folder, known)


if __name__ == "__main__":
    unittest.main()
