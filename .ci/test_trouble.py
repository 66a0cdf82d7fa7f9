"""Trouble of the machine: a sentence, the state as before, and on it goes afterwards.

Real where that can be had: a disk that is full, read-only or gone (a file system of its
own, as root), descriptors that run out, a mount below the upload folder, a folder taken
away. Beside them a disk that fails from any call on, and a faked Windows.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attack import (
    SERVER,
    AttackCase,
    Client,
    File,
    HalfSent,
    Server,
    disk_calls,
    eventually,
    finished_files,
    flowserver,
    leftovers,
    let_an_hour_pass,
    noise,
    quick_folder,
)

IS_ROOT_ON_LINUX = sys.platform.startswith("linux") and os.geteuid() == 0
DATA = noise(3 * 100_000 + 17, seed=1)
FILE = File("a/report.bin", DATA, 100_000, f"flowserver-{0:032}-1")


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


def put(store: Any, file: File, number: int) -> Any:
    """Store one chunk, as the application does."""
    size, identifier = len(file.data), file.identifier or file.path
    key = flowserver.upload_key("", "", identifier, file.path, size)
    upload = flowserver.Upload(key, file.path, size, "", identifier)
    with store.receive(upload, *file.edges(number)) as body:
        body.write(file.body(number))
        return body.commit()


class TroubleCase(AttackCase):
    def setUp(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="flowserver-trouble"))
        self.addCleanup(shutil.rmtree, self.home)
        self.folder = self.home / "uploads"
        self.folder.mkdir()

    @contextlib.contextmanager
    def own_disk(self, size: str) -> Iterator[None]:
        """The upload folder is a file system of its own meanwhile."""
        options = ("-t", "tmpfs", "-o", f"size={size}", "none", str(self.folder))
        if not mount(*options):
            self.skipTest("can't mount here")
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)

    def assert_trouble(self, answer: Any, *words: str) -> None:
        """One sentence, and a status that no client takes for the end."""
        self.assertEqual(answer.status, 503, answer)
        sentence = answer.json["error"]
        self.assertTrue(any(word in sentence for word in words), sentence)
        self.assertNotIn("Traceback", sentence)

    def assert_goes_on(self, client: Client, first: int = 1) -> None:
        answers = client.send(FILE, "tests", range(first, FILE.count + 1))
        self.assertTrue(answers[-1].is_complete, answers)
        self.assert_stored_once(self.folder, [DATA])


@unittest.skipUnless(IS_ROOT_ON_LINUX, "needs root and Linux")
class RealTroubleTest(TroubleCase):
    def test_full_disk(self) -> None:
        with (
            self.own_disk("1m"),
            Server(self.folder) as server,
            server.client() as client,
        ):
            self.assertEqual(client.send(FILE, "tests", [1])[0].status, 200)
            filler = self.folder / "filler"
            with contextlib.suppress(OSError), open(filler, "wb", 0) as file:
                while True:
                    file.write(bytes(4096))
            for number in (2, 3, 2):
                answer = client.post(FILE, number)
                self.assert_trouble(answer, "The disk is full")
            self.assertEqual(client.test(FILE, 1).status, 200)
            self.assertEqual(client.test(FILE, 2).status, 204)
            self.assertEqual(
                [n for n in leftovers(self.folder) if n.endswith(".part")], []
            )
            filler.unlink()
            self.assert_goes_on(client)

    def test_permission_that_is_lost(self) -> None:
        """Root may write anywhere, but not into a folder that is immutable."""
        with Server(self.folder) as server, server.client() as client:
            state = str(self.folder / ".flowserver" / "v2")
            if subprocess.run(["chattr", "+i", state], capture_output=True).returncode:
                self.skipTest("no immutable folders here")
            try:
                self.assert_trouble(client.post(FILE, 1), "may not write")
            finally:
                subprocess.run(["chattr", "-i", state], check=True)
            self.assert_goes_on(client)

    def test_mount_below_the_upload_folder(self) -> None:
        """What can't be named there is kept, told, and finished when it can be."""
        below = self.folder / "a"
        below.mkdir()
        with Server(self.folder) as server, server.client() as client:
            self.assertTrue(mount("-t", "tmpfs", "none", str(below)))
            try:
                answers = client.send(FILE, "tests")
                self.assert_trouble(answers[-1], "another file system")
                server.kill()
                with Server(self.folder) as again, again.client() as other:
                    self.assert_trouble(other.post(FILE, 3), "another file system")
                self.assertEqual(finished_files(self.folder), {})
            finally:
                subprocess.run(["umount", "-l", str(below)], check=True)
        with Server(self.folder) as server, server.client() as client:
            client.post(FILE, 3)
        self.assert_stored_once(self.folder, [DATA])


class SickDisk(flowserver.Disk):
    """A disk that fails in one way as long as a file of that name is there."""

    symptoms: Path

    def open(self, path: str, flags: int) -> int:
        if flags & os.O_CREAT and (self.symptoms / "read-only").exists():
            raise OSError(errno.EROFS, "read-only", path)
        fd: int = super().open(path, flags)
        return fd

    def write(self, fd: int, block: Any, offset: int) -> None:
        if (self.symptoms / "read-only").exists():
            raise OSError(errno.EROFS, "read-only")
        super().write(fd, block, offset)

    def flush(self, fd: int) -> None:
        super().flush(fd)
        if (self.symptoms / "no flush").exists():
            raise OSError(errno.EIO, "input/output error")

    def flush_names(self, path: str) -> None:
        super().flush_names(path)
        if (self.symptoms / "no flush of names").exists():
            raise OSError(errno.EIO, "input/output error")


class TroubleTest(TroubleCase):
    def test_sick_disk_and_its_recovery(self) -> None:
        """At each chunk, of one version and with every symptom, then healthy again."""
        SickDisk.symptoms = self.home
        for symptom, word in (
            ("read-only", "read-only"),
            ("no flush", "error"),
            ("no flush of names", "error"),
        ):
            for sick in (1, 2, 3):
                # Names are flushed at beginnings and ends only.
                if symptom == "no flush of names" and sick == 2:
                    continue
                with self.subTest(symptom, chunk=sick):
                    self.check_sickness(symptom, word, sick)

    def check_sickness(self, symptom: str, word: str, sick: int) -> None:
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        with Server(self.folder, SickDisk) as server, server.client() as client:
            for number in range(1, sick):
                self.assertEqual(client.post(FILE, number).status, 200)
            (self.home / symptom).touch()
            try:
                self.assert_trouble(client.post(FILE, sick), word)
                self.assert_trouble(client.post(FILE, sick), word)
            finally:
                (self.home / symptom).unlink()
            for number in range(1, sick):
                self.assertIn(client.test(FILE, number).status, (200, 204))
            self.assert_goes_on(client, first=sick)

    def test_folder_that_goes_and_comes_back(self) -> None:
        with Server(self.folder) as server, server.client() as client:
            client.post(FILE, 1)
            away = self.home / "away"
            self.folder.rename(away)
            self.assert_trouble(client.post(FILE, 2), "gone")
            self.assert_trouble(client.post(File("b.txt", b"whole"), 1), "gone")
            self.assertFalse(self.folder.exists())
            away.rename(self.folder)
            self.assert_goes_on(client)

    def test_descriptors_that_run_out(self) -> None:
        def few() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

        with Server(self.folder, before=few) as server, server.client() as client:
            client.post(FILE, 1)
            files = [File(f"{index}.bin", DATA, 100_000) for index in range(60)]
            stalled = []
            for file in files:
                with contextlib.suppress(OSError):
                    stalled.append(HalfSent(server.port, file, 1, held_back=1))
            time.sleep(0.2)
            for half in stalled:
                half.close()
            answer = None
            end = time.monotonic() + 30
            while (answer is None or answer.status != 200) and time.monotonic() < end:
                answer = client.post(FILE, 2)
            files = f"/proc/{server.pid}/fd"
            eventually(lambda: len(os.listdir(files)) < 16, "the end of the others")
            rest = client.send(FILE, "tests", range(2, FILE.count + 1))
            self.assertTrue(rest[-1].is_complete, rest)
        # Whoever found no descriptor to drop an upload with left that to the sweep.
        flowserver.Store(str(self.folder), clock=lambda: time.time() + 9).sweep(8, 8)
        self.assert_stored_once(self.folder, [DATA])

    def test_clock_set_back_and_forth(self) -> None:
        now = [1e9]
        store = flowserver.Store(
            str(self.folder), disk=flowserver.Disk(False), clock=lambda: now[0]
        )
        for number in (1, 2, 3):
            put(store, FILE, number)
            now[0] -= 1e8  # what is from the future is not stale
            store.sweep(1, 1)
        self.assert_stored_once(self.folder, [DATA])


class FailingDisk(flowserver.Disk):
    """From a certain call on every call fails, until the disk is healthy again."""

    left = 1 << 60  # calls until then
    error = 0
    was_sick = False


def _failing(name: str) -> Callable[..., Any]:
    def call(disk: FailingDisk, *arguments: Any) -> Any:
        disk.left -= 1
        if disk.left < 0:
            raise OSError(disk.error, os.strerror(disk.error))
        return getattr(super(FailingDisk, disk), name)(*arguments)

    return call


for _name in disk_calls():
    if _name not in ("close", "unlock", "boot_id"):
        setattr(FailingDisk, _name, _failing(_name))


class AnyCallTest(TroubleCase):
    """The machine fails from any call on, and is healthy for the next attempt"""

    TAKEN = File("a/b.bin", noise(3017, seed=2))
    PLAIN = File("a/b.bin", noise(3017, seed=3), identifier="another")
    CHANGED = File("a/b.bin", noise(3017, seed=4))
    WHOLE = File("a/b.bin", noise(700, seed=5))

    def setUp(self) -> None:
        self.folder = quick_folder("flowserver-trouble")
        self.addCleanup(shutil.rmtree, self.folder)

    def send_all(self, disk: FailingDisk, healthy_calls: int) -> bool:
        """Send chunks, each until it is stored; return whether there was trouble."""
        self.done: list[Any] = []
        store = self.store(disk)
        disk.left = healthy_calls
        self.send(store, self.TAKEN, 1, 2, 3)
        self.send(store, self.PLAIN, 3, 1, 2, 2)
        try:
            self.send(store, self.CHANGED, 2, 1, 3)
        except flowserver.Conflict:  # something had come again, after some trouble
            self.send(store, self.CHANGED, 2, 1, 3)
        self.send(store, self.WHOLE, 1)
        self.assertEqual((len(self.done), len(self.ids())), (4, 4))
        return disk.was_sick

    def store(self, disk: Any = None) -> Any:
        return flowserver.Store(str(self.folder), disk=disk, announce=self.done.append)

    def ids(self) -> set[tuple[str, str]]:
        return {(one.id, one.relative_path) for one in self.done}

    def send(self, store: Any, file: File, *numbers: int) -> None:
        for number in numbers:
            try:
                put(store, file, number)
            except flowserver.Trouble:
                self.assertFalse(store.disk.was_sick, "it is healthy again")
                store.disk.left, store.disk.was_sick = 1 << 60, True
                put(store, file, number)

    def test_every_call(self) -> None:
        files = (self.TAKEN, self.PLAIN, self.CHANGED, self.WHOLE)
        calls = 0
        for error in (errno.ENOSPC, errno.EIO, errno.EMFILE):
            for healthy in range(10_000):
                with self.subTest(os.strerror(error), call=healthy):
                    shutil.rmtree(self.folder)
                    disk = FailingDisk(sync=True)
                    disk.error = error
                    if not self.send_all(disk, healthy):
                        break
                    calls += 1
                    let_an_hour_pass(self.folder)
                    self.store().sweep(1e9, 1e9)
                    self.assertEqual(len(self.ids()), 4)  # it may have told one again
                    self.assert_stored_once(self.folder, [one.data for one in files])
        print(f"\n{calls} calls failed, and all that followed", flush=True)
        self.assertGreater(calls, 3 * 100)


FAKE = """
import os, sys, types, fcntl, importlib.util, subprocess, logging.handlers, http.server
# No fcntl: the locks of Windows, made of those that we have.
seek, places = os.lseek, {}
def lseek(fd, place, whence):  # ext4 has no such place, NTFS has
    places[fd] = place
    return place if place >= 1 << 60 else seek(fd, place, whence)
os.lseek = lseek
def locking(fd, mode, size):
    assert places[fd] > 1 << 45 and size == 1
    free = mode == 0
    fcntl.flock(fd, fcntl.LOCK_UN if free else fcntl.LOCK_EX | fcntl.LOCK_NB)
fake = types.ModuleType("msvcrt")
fake.LK_UNLCK, fake.LK_NBLCK, fake.locking = 0, 2, locking
sys.modules["fcntl"], sys.modules["msvcrt"] = None, fake
for name in ("pread", "pwrite", "link", "fdatasync"):
    delattr(os, name)
os.supports_dir_fd.clear()
spec = importlib.util.spec_from_file_location("flowserver", sys.argv[1])
flowserver = importlib.util.module_from_spec(spec)
sys.modules["flowserver"] = flowserver
spec.loader.exec_module(flowserver)
"""

ON_A_FAKED_SYSTEM = """
import random, threading
# An open file can be neither renamed nor removed, and virus scanners come by.
open_paths, count, scanned = {}, [0], set()
names = ("open", "close", "unlink", "replace", "rename")
real = {name: getattr(os, name) for name in names}
def opened(path, *rest, **named):
    fd = real["open"](path, *rest, **named)
    open_paths[fd] = os.fspath(path)
    return fd
def closed(fd):
    open_paths.pop(fd, None)
    real["close"](fd)
def guarded(name):
    def call(*paths, **named):
        count[0] += 1
        if any(path in open_paths.values() for path in paths):
            raise PermissionError(13, "open", paths[0])
        if count[0] % 3 == 0 and paths not in scanned:
            scanned.add(paths)  # once for a moment
            raise PermissionError(13, "scanned", paths[0])
        if name == "rename" and os.path.lexists(paths[1]):
            raise FileExistsError(17, "exists", paths[1])
        return real[name](*paths, **named)
    return call
os.open, flowserver.Disk.close = opened, staticmethod(closed)
for name in ("unlink", "replace", "rename"):
    setattr(os, name, guarded(name))
os.name = "nt"
root = sys.argv[2]
store = flowserver.Store(root)
files = {f"d/{i}.bin": random.Random(i).randbytes(900 + i) for i in range(24)}
files.update({f"small{i}": bytes([i]) * i for i in range(6)})
def upload_of(path):
    size = len(files[path])
    key = flowserver.upload_key("", "", "x", path, size)
    return flowserver.Upload(key, path, size, "", "x")
def send(path, low, high):
    with store.receive(upload_of(path), low, high) as body:
        body.write(files[path][low:high])
        return body.commit()
work = []
for path, data in files.items():
    third = len(data) // 3
    edges = (0, third, 2 * third, len(data)) if path[0] == "d" else (0, len(data))
    work += [(path, *pair) for pair in zip(edges, edges[1:])]
random.Random(1).shuffle(work)
errors = []
def run():
    while True:
        try:
            one = work.pop()
        except IndexError:
            return
        try:
            send(*one)
        except Exception as error:
            errors.append(repr(error))
threads = [threading.Thread(target=run) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
last = "d/3.bin"
again = send(last, 2 * (len(files[last]) // 3), len(files[last]))
assert again.done and again.done.relative_path == last, again
store.sweep(1e9, 1e9)
os.name = "posix"
for path, data in files.items():
    with open(os.path.join(root, path), "rb") as file:
        assert file.read() == data, path
found = sum(len(n) for f, _, n in os.walk(root) if ".flowserver" not in f)
assert found == len(files), found
left = [n for n in os.listdir(os.path.join(root, ".flowserver", "v2"))
    if n.endswith((".data", ".part"))]
assert not left, left
assert not errors, errors
print("whole")
"""


class OtherSystemTest(TroubleCase):
    """Faked in a process of its own; nothing here has seen a real Windows"""

    def test_windows_as_far_as_it_can_be_faked(self) -> None:
        program = textwrap.dedent(FAKE) + textwrap.dedent(ON_A_FAKED_SYSTEM)
        done = subprocess.run(
            [sys.executable, "-c", program, str(SERVER), str(self.folder)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        self.assertEqual(done.stdout.strip(), "whole", done.stderr[-1500:])

    def test_a_stolen_file_is_noticed(self) -> None:
        """The judge of this file fails where it should."""
        with Server(self.folder) as server, server.client() as client:
            client.send(FILE, "tests")
        (self.folder / "a/report.bin").write_bytes(DATA[:-1])
        with self.assertRaises(AssertionError):
            self.assert_stored_once(self.folder, [DATA])


if __name__ == "__main__":
    unittest.main()
