"""Limits and doors, attacked from outside: real processes, real connections.

What 1.0.0 let through: 40 files in a second filled a disk that should have kept 50 MiB,
60 parallel chunks passed a limit of 5 uploads, on_complete ran in four processes at
once after a crash, four bodies of one byte stopped gunicorn, a thousand clients of one
byte shut all others out, and 150 wrong passwords stood before one right one.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import test_power_cuts
from attack import HERE, Client, CommandServer, File, eventually, flowserver, noise

MIB = 1 << 20
FLOWSERVER = Path(flowserver.__file__)


def in_parallel(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What work(0), work(1), ... return, all begun at once."""
    results: list[Any] = [None] * count
    begin = threading.Barrier(count)

    def run(number: int) -> None:
        begin.wait()
        results[number] = work(number)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class LimitCase(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="flowserver-ci-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def serve(self, *flags: str, folder: Path | None = None) -> CommandServer:
        server = CommandServer(folder or self.folder / "uploads", *flags)
        self.addCleanup(server.kill)
        return server


class SpaceTest(LimitCase):
    """min_free_space is a promise to everyone else on that disk"""

    FLOOR = 50 * MIB

    def test_forty_files_at_once_leave_the_floor_alone(self) -> None:
        self.assertTrue(test_power_cuts.can_mount(), "needs root and mkfs.ext4")
        for way in ("whole", "chunks"):
            with self.subTest(way), self.disk() as place:
                server = self.serve("--min-free-space", "50M", folder=place / "up")
                lowest = [1 << 60]
                ended = threading.Event()
                watcher = threading.Thread(
                    target=self.watch, args=(place, lowest, ended)
                )
                watcher.start()
                send = self.send_whole if way == "whole" else self.send_chunks
                answers = in_parallel(40, lambda n, s=server, f=send: f(s, n))
                ended.set()
                watcher.join()
                server.kill()
                # The file system's own records of the files are not ours to foresee.
                self.assertGreater(lowest[0], self.FLOOR - 2 * MIB)
                self.assertLess(lowest[0], self.FLOOR + 40 * MIB, "little came in")
                if way == "whole":  # chunks may all stop in the middle of their files
                    self.assertIn(200, answers)
                self.assertLessEqual(set(answers), {200, 413, 503})
                self.assertNotEqual(set(answers), {200}, "the disk was large enough")

    @contextlib.contextmanager
    def disk(self) -> Iterator[Path]:
        place, image = self.folder / "mount", self.folder / "image"
        place.mkdir(exist_ok=True)
        with open(image, "wb") as file:
            file.truncate(180 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)

    def watch(self, place: Path, lowest: list[int], ended: threading.Event) -> None:
        while not ended.wait(0.001):
            lowest[0] = min(lowest[0], shutil.disk_usage(place).free)

    def send_whole(self, server: CommandServer, number: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("PUT", f"/upload/{number}.bin", noise(5 * MIB, number))
            return connection.getresponse().status

    def send_chunks(self, server: CommandServer, number: int) -> int:
        file = File(f"{number}.bin", noise(5 * MIB, number), MIB)
        with server.client() as client:
            for chunk in range(1, file.count + 1):
                answer = client.post(file, chunk)
                assert answer is not None
                if answer.status != 200:
                    return answer.status
        return 200


class UploadsTest(LimitCase):
    """max_uploads holds, whatever comes in parallel"""

    def test_sixty_first_chunks_at_once_pass_no_limit_of_five(self) -> None:
        server = self.serve("--max-uploads", "5")

        def begin(number: int) -> int:
            file = File(f"{number}.bin", noise(30, number), 10)
            with server.client() as client:
                answer = client.post(file, 1)
                return answer.status if answer else 0

        statuses = in_parallel(60, begin)
        self.assertEqual((statuses.count(200), statuses.count(413)), (5, 55))
        self.assertEqual(len(list(self.folder.rglob("*.data"))), 5)


PROGRAM = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import flowserver

def arrived(done):
    fd = os.open(sys.argv[3], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (WORDS[0] + " " + done.id + "\\n").encode())
    time.sleep(float(sys.argv[4]))
    os.write(fd, (WORDS[1] + " " + done.id + "\\n").encode())

settings = flowserver.Settings(upload_dir=sys.argv[2], port=0, min_free_space=0)
uploads = flowserver.UploadApp(settings, on_complete=arrived)
server = flowserver.FlowServer(uploads)
WORDS = ["begins", "ends"]  # the constructor calls no function of the program
server.start()
print(server.server_port, flush=True)
time.sleep(1000)
"""


class OnCompleteTest(LimitCase):
    """After a crash it runs again: once at a time, and not in the constructor"""

    def begin(self, seconds: float) -> subprocess.Popen[str]:
        log = self.folder / "log"
        words = [FLOWSERVER.parent, self.folder / "uploads", log, seconds]
        program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(program.communicate)
        self.addCleanup(program.kill)
        return program

    def lines(self) -> list[str]:
        log = self.folder / "log"
        return log.read_text().splitlines() if log.exists() else []

    def test_four_processes_after_a_crash_call_it_once(self) -> None:
        first = self.begin(1000)
        assert first.stdout is not None
        port = int(first.stdout.readline())
        for number in range(3):
            file = File(f"{number}.bin", noise(30, number), 10)
            threading.Thread(target=self.send, args=(port, file), daemon=True).start()
        eventually(lambda: len(self.lines()) == 3, "three calls")
        first.send_signal(signal.SIGKILL)
        first.wait()
        programs = [self.begin(0.5) for _ in range(4)]
        eventually(lambda: sum(s.startswith("ends") for s in self.lines()) == 3, "ends")
        time.sleep(1.5)  # nobody begins once more
        for program in programs:
            program.kill()
            self.assertNotIn("Traceback", program.communicate()[1])
        lines = self.lines()[3:]
        self.assertEqual(len(lines), 6, lines)
        self.assertEqual(len(set(lines)), 6, lines)

    def send(self, port: int, file: File) -> None:
        with contextlib.suppress(AssertionError), Client(port) as client:  # it dies
            client.send(file, "octet")


class SlowClientsTest(LimitCase):
    """Who sends next to nothing does not shut others out"""

    def dribble(self, port: int) -> socket.socket:
        """Send the head of a chunk, and one byte of it."""
        connection = socket.create_connection(("127.0.0.1", port))
        self.addCleanup(connection.close)
        file = File("slow.bin", bytes(MIB), MIB)
        head = f"POST /upload?{file.query(1)} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        connection.sendall(f"{head}Content-Length: {MIB}\r\n\r\nx".encode())
        return connection

    def test_a_thousand_clients_of_one_byte_shut_nobody_out(self) -> None:
        server = self.serve()
        for _ in range(1000):
            self.dribble(server.port)
        time.sleep(3)  # their rate is known then
        for _ in range(5):
            with server.client() as client:
                answer = client.send(File("a.bin", noise(30, 1), 10), "octet")[-1]
                self.assertTrue(answer.is_complete)
        memory = Path(f"/proc/{server.process.pid}/status").read_text()
        (resident,) = [s for s in memory.splitlines() if s.startswith("VmRSS")]
        self.assertLess(int(resident.split()[1]), 120 * 1024, "KiB")

    def test_four_bodies_of_one_byte_do_not_stop_gunicorn(self) -> None:
        config = self.folder / "conf.ini"
        config.write_text("[server]\ntimeout = 2s\n[storage]\nupload_dir = up\n")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [str(HERE / ".tools/venv/bin/gunicorn"), "--threads", "2"]
        command += ["--bind", f"127.0.0.1:{port}", "flowserver:create_app()"]
        place = {"FLOWSERVER_CONFIG": str(config), "PYTHONPATH": str(FLOWSERVER.parent)}
        program = subprocess.Popen(
            command, env={**os.environ, **place}, stderr=subprocess.DEVNULL
        )
        self.addCleanup(program.wait)
        self.addCleanup(program.terminate)

        def is_up() -> bool:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                return True
            return False

        eventually(is_up, "gunicorn")
        slow = [self.dribble(port) for _ in range(4)]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.addCleanup(connection.close)
        connection.request("GET", "/health")  # they have not hung up
        self.assertEqual(connection.getresponse().status, 200)
        self.assertEqual(len(slow), 4)


class PasswordsTest(LimitCase):
    """Guessing keeps nobody from logging in"""

    def test_honest_login_does_not_wait_for_all_the_wrong_ones(self) -> None:
        users = self.folder / "users"
        users.write_text(f"ann:{flowserver.hash_password('right')}\n")
        proxy = ("--trusted-proxies", "127.0.0.1")
        server = self.serve("--users-file", str(users), *proxy)
        wrong: list[int] = []

        def ask(password: str, address: str) -> int:
            client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
            text = base64.b64encode(f"ann:{password}".encode()).decode()
            headers = {"Authorization": f"Basic {text}", "X-Forwarded-For": address}
            with contextlib.closing(client):
                client.request("GET", "/health", headers=headers)
                return client.getresponse().status

        def guess(number: int) -> None:
            wrong.append(ask(f"wrong {number}", "10.0.0.66"))

        guesses = [threading.Thread(target=guess, args=(n,)) for n in range(150)]
        for thread in guesses:
            thread.start()
        eventually(lambda: len(wrong) > 2, "guesses")
        before = len(wrong)
        self.assertEqual(ask("right", "10.0.0.1"), 200)
        self.assertLess(len(wrong) - before, 50)
        for thread in guesses:
            thread.join()
        self.assertEqual(set(wrong), {401})


if __name__ == "__main__":
    unittest.main()
