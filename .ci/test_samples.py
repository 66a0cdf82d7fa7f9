"""The samples: upload.py as a process, the two pages in a real Chromium.

All against the real server. FLOWSERVER_FILE names another flowserver.py, and
FLOWSERVER_SAMPLES another folder of samples, to see these tests fail on broken ones.
"""

from __future__ import annotations

import ast
import hashlib
import http.client
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import test_page
from test_page import MIB, Server, answer, doubtful_server, noise, write_files

HERE = Path(__file__).resolve().parent
SAMPLES = Path(os.environ.get("FLOWSERVER_SAMPLES") or HERE.parent / "sample")
MODULES = HERE / ".tools" / "node_modules"
LIBRARIES = {
    "flowjs.html": "@flowjs/flow.js/dist/flow.min.js",
    "resumablejs.html": "resumablejs/resumable.js",
    "dropzone.html": "dropzone/dist/dropzone-min.js",
    "uppy.html": "uppy/dist/uppy.min.js",
}


def setUpModule() -> None:
    test_page.setUpModule()


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ClientCase(unittest.TestCase):
    """upload.py, started as a person starts it."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="flowserver-ci-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.source = self.folder / "source"
        self.home = self.folder / "alone"
        for one in (self.source, self.home):
            one.mkdir()
        config = str(self.folder / "config")
        self.environment = {**os.environ, "XDG_CONFIG_HOME": config}

    def serve(self, *flags: str) -> None:
        self.server = Server(self.home, *flags)
        self.addCleanup(self.server.place.close)
        self.addCleanup(self.stop_server)

    def stop_server(self) -> None:
        if self.server.process.poll() is None:
            self.server.stop()
        self.assertNotIn("Traceback", self.server.log_text())

    def command(self, *arguments: object, url: str = "") -> list[str]:
        words = [url or self.server.url, *map(str, arguments)]
        return [sys.executable, "-W", "error", str(SAMPLES / "upload.py"), *words]

    def begin(self, *arguments: object, url: str = "") -> subprocess.Popen[str]:
        client = subprocess.Popen(
            self.command(*arguments, url=url),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(client.wait)
        self.addCleanup(client.kill)
        return client

    def end(self, client: subprocess.Popen[str], status: int) -> str:
        """Wait for its end; return what it said to the person."""
        output, said = client.communicate(timeout=120)
        self.assertEqual((client.returncode, output), (status, ""), said)
        self.assertNotIn("Traceback", said)
        return said

    def send(self, *arguments: object, status: int = 0, url: str = "") -> str:
        return self.end(self.begin(*arguments, url=url), status)

    def wait_for(self, claim: Callable[[], Any], what: str) -> None:
        test_page.BROWSER.wait_for(claim, what=what)

    def accepted(self) -> int:
        return self.server.log_text().count(" POST /upload 200 ")

    def assert_on_disk(self, files: Mapping[str, bytes]) -> None:
        found = self.server.finished_files()
        self.assertEqual(sorted(found), sorted(files))
        for name, content in files.items():
            self.assertTrue(found[name] == content, f"{name} has other bytes")
        self.assertEqual(self.server.unfinished_data(), [])


class ClientTest(ClientCase):
    def test_files_and_folders_arrive_whole_whatever_they_are_called(self) -> None:
        files = {
            "album/2026/Süden 日本 🎈.bin": noise(2 * MIB + 5, 1),
            "album/a+b & c=d; 100%25 #.bin": noise(2 * MIB, 2),
            "album/empty.txt": b"",
            "album/small.txt": b"small",
        }
        write_files(self.source, {**files, "single.bin": noise(MIB + 1, 3)})
        self.serve()
        said = self.send(self.source / "album", self.source / "single.bin")
        self.assert_on_disk({**files, "single.bin": noise(MIB + 1, 3)})
        self.assertEqual(said, "5 of 5 files are there\n")

    def test_500_files_interrupted_and_started_again(self) -> None:
        files = {f"many/{n:03}.bin": noise(2000 + n, n) for n in range(500)}
        write_files(self.source, files)
        self.serve()
        client = self.begin("--parallel", 2, self.source / "many")
        self.wait_for(lambda: self.accepted() >= 30, "some files to arrive")
        client.send_signal(signal.SIGINT)
        said = self.end(client, 130)
        self.assertIn("the same command sends the rest", said)
        before = self.accepted()
        self.assertLess(before, 500, "interrupted in the middle")
        self.send("--parallel", 2, self.source / "many")
        self.assert_on_disk(files)
        again = self.accepted() - 500
        self.assertLessEqual(again, 2, "only what was on its way is sent once more")

    def test_300_mib_interrupted_and_started_again(self) -> None:
        path = self.source / "large.bin"
        block = noise(MIB, 1)
        with open(path, "wb") as file:
            for number in range(300):
                file.write(number.to_bytes(8, "big") + block[8:])
        self.serve()
        client = self.begin(path)
        self.wait_for(lambda: self.accepted() >= 30, "some chunks to arrive")
        client.send_signal(signal.SIGINT)
        self.end(client, 130)
        self.assertLess(self.accepted(), 300, "interrupted in the middle")
        self.assertEqual(list(self.server.finished_files()), [])
        self.send(path)
        self.assertLessEqual(self.accepted(), 303, "only the rest, and what was lost")
        self.assertEqual(digest(self.server.upload_dir / "large.bin"), digest(path))
        self.assertEqual(self.server.unfinished_data(), [])

    def test_what_is_there_is_not_sent_again_but_what_changed_is(self) -> None:
        (path,) = write_files(self.source, {"file.bin": noise(3 * MIB, 1)})
        self.serve()
        self.send(path)
        self.assertEqual(self.accepted(), 3)
        self.send(path)
        self.assertEqual(self.accepted(), 3)
        path.write_bytes(noise(3 * MIB, 2))
        os.utime(path, (1_700_000_000, 1_700_000_000))
        said = self.send(path)
        self.assertEqual(self.accepted(), 6)
        self.assertIn("file.bin: saved as file (1).bin\n", said)
        files = {"file.bin": noise(3 * MIB, 1), "file (1).bin": noise(3 * MIB, 2)}
        self.assert_on_disk(files)

    def test_two_files_of_one_name_size_and_time_both_arrive(self) -> None:
        first, second = noise(2 * MIB, 1), noise(2 * MIB, 2)
        paths = write_files(self.source, {"a/same.bin": first, "b/same.bin": second})
        for path in paths:
            os.utime(path, (1_700_000_000, 1_700_000_000))
        self.serve()
        self.send(*paths)
        found = set(self.server.finished_files().values())
        self.assertTrue(found == {first, second}, "other bytes")

    def test_a_killed_server_is_awaited_and_found_again(self) -> None:
        content = noise(40 * MIB, 1)
        (path,) = write_files(self.source, {"file.bin": content})
        self.serve()
        client = self.begin("--chunk-size", "64K", path)
        self.wait_for(lambda: self.accepted() >= 10, "some chunks to arrive")
        self.server.kill()
        self.assertIsNone(client.poll())
        self.server.start()
        said = self.end(client, 0)
        self.assertRegex(said, r"connection lost \(.+\), trying again in 1 s\n")
        self.assert_on_disk({"file.bin": content})

    def test_a_server_that_says_nothing_is_left_at_once(self) -> None:
        paths = write_files(self.source, {f"{n}.bin": b"x" for n in range(16)})
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            client = self.begin("--parallel", 16, *paths, url=url)
            for _ in paths:
                connection, _ = silent.accept()
                self.addCleanup(connection.close)
                connection.recv(1)
            time.sleep(0.5)  # it waits for its workers by now
            began = time.monotonic()
            client.send_signal(signal.SIGINT)
            self.end(client, 130)
            self.assertLess(time.monotonic() - began, 10)

    def test_a_server_that_is_not_there_may_be_given_up(self) -> None:
        self.serve()
        self.server.kill()
        (path,) = write_files(self.source, {"file.bin": b"x"})
        said = self.send("--give-up", "0.1", path, status=1)
        self.assertRegex(said, r"file\.bin: connection lost .+; given up after \d+ s")
        self.assertIn("0 of 1 files are there", said)

    def test_a_refusal_is_told_and_the_others_go_on(self) -> None:
        self.serve("--max-file-size", "1M")
        paths = write_files(
            self.source, {"large.bin": noise(MIB + 1, 1), "right.bin": noise(MIB, 2)}
        )
        said = self.send(*paths, self.source / "missing.bin", status=1)
        self.assertIn("missing.bin: No such file or directory\n", said)
        self.assertRegex(said, r"(?m)^large\.bin: .*1 MiB, .*max_file_size")
        self.assertIn("1 of 3 files are there\n", said)
        self.assert_on_disk({"right.bin": noise(MIB, 2)})

    def test_a_name_and_a_password_in_the_address(self) -> None:
        users = self.folder / "users"
        hashed = test_page.load_server().hash_password("pass:word@")
        users.write_text(f"anna:{hashed}\n")
        self.serve("--users-file", str(users))
        (path,) = write_files(self.source, {"file.bin": noise(2 * MIB, 1)})
        address = self.server.url.replace("://", "://anna:pass%3Aword%40@")
        self.send(path, url=address)
        self.assert_on_disk({"file.bin": noise(2 * MIB, 1)})
        said = self.send(path, url=address.replace("word", "zebra"), status=1)
        self.assertIn("file.bin: The name or the password is wrong.", said)
        self.assertNotIn("zebra", said)

    def test_https_with_a_certificate_of_ones_own(self) -> None:
        self.make_certificate()
        pair = (self.folder / "own.pem", self.folder / "own.key")
        flags = [f"--certificate={pair[0]}", f"--private-key={pair[1]}"]
        self.serve(*flags)
        self.assertTrue(self.server.url.startswith("https://"))
        (path,) = write_files(self.source, {"file.bin": noise(2 * MIB, 1)})
        self.send("--certificate", pair[0], path)
        self.assert_on_disk({"file.bin": noise(2 * MIB, 1)})
        said = self.send(path, status=1)
        self.assertIn("the certificate is not trusted", said)

    def test_https_to_a_server_that_speaks_http_is_given_up(self) -> None:
        self.serve()
        (path,) = write_files(self.source, {"file.bin": b"x"})
        url = self.server.url.replace("http:", "https:")
        said = self.send(path, status=1, url=url)
        self.assertIn("file.bin: the server does not speak https", said)

    def make_certificate(self) -> None:
        command = (
            "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
            " -addext subjectAltName=IP:127.0.0.1 -keyout own.key -out own.pem"
        )
        subprocess.run(
            command.split(), cwd=self.folder, check=True, capture_output=True
        )

    def test_a_secret_that_a_crash_left_empty_is_made_anew(self) -> None:
        (path,) = write_files(self.source, {"file.bin": b"x"})
        (secret,) = write_files(self.folder, {"config/flowserver/secret": b""})
        self.serve()
        self.assertEqual(self.send(path), "1 of 1 files are there\n")
        kept = secret.read_text()
        self.assertRegex(kept, "^[0-9a-f]{32}$")
        self.assertEqual(secret.stat().st_mode & 0o777, 0o600)
        self.send(path)
        self.assertEqual(secret.read_text(), kept)
        self.assertEqual(list(secret.parent.iterdir()), [secret])

    def test_without_any_output_it_sends_all_the_same(self) -> None:
        (path,) = write_files(self.source, {"file.bin": b"x"})
        self.serve()
        closed = ["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", *self.command(path)]
        subprocess.run(closed, env=self.environment, check=True, timeout=60)
        self.assert_on_disk({"file.bin": b"x"})

    def test_a_terminal_gets_a_bar_and_nobody_else_does(self) -> None:
        (path,) = write_files(self.source, {"file.bin": noise(64 * MIB, 1)})
        self.serve()
        shown, status = self.on_a_terminal(self.command(path))
        self.assertEqual(status, 0, shown)
        self.assertRegex(
            shown, r"\[#* *\] +\d+ %  [\d.]+ \w+ of 64\.0 MiB  [\d.]+ \w+/s  \d+ s left"
        )
        self.assertIn("1 of 1 files are there", shown)

    def on_a_terminal(self, command: list[str]) -> tuple[str, int]:
        master, terminal = pty.openpty()
        client = subprocess.Popen(
            command,
            env=self.environment,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        )
        os.close(terminal)
        shown = b""
        try:
            while True:
                try:
                    block = os.read(master, 65536)
                except OSError:  # how Linux tells the end of a terminal
                    break
                shown += block
        finally:
            os.close(master)
            status = client.wait(timeout=60)
        return shown.decode(), status

    def test_the_wrong_address_is_a_wrong_usage(self) -> None:
        strange = ("http://a..b:1", "http://.:1", "http://host :1")
        for url in ("localhost:8000", "ftp://host", "http://host:port", *strange):
            said = self.send("file", url=url, status=2)
            self.assertIn("is not like http://host:8000", said)

    def test_a_path_that_is_none_of_the_server_s_is_named(self) -> None:
        (path,) = write_files(self.source, {"file.bin": b"x"})
        self.serve()
        for wrong, named in (("uploads", "uploads"), ("Süd é/", "S%C3%BCd%20%C3%A9")):
            said = self.send(path, url=f"{self.server.url}{wrong}", status=1)
            sentence = f"There is nothing at this address (/{named}/upload)"
            self.assertIn(f"file.bin: {sentence}\n", said)

    def test_a_link_to_a_folder_is_told_and_a_link_to_a_file_sent(self) -> None:
        (path,) = write_files(self.source, {"album/file.bin": b"x"})
        (path.parent / "link.bin").symlink_to("file.bin")
        (path.parent / "loop").symlink_to(".", target_is_directory=True)
        self.serve()
        said = self.send(path.parent, status=1)
        self.assertIn("loop: is a link to a folder, name that itself\n", said)
        self.assertIn("2 of 3 files are there\n", said)
        self.assert_on_disk({"album/file.bin": b"x", "album/link.bin": b"x"})

    def test_a_name_commands_no_terminal(self) -> None:
        (path,) = write_files(self.source, {"red\x1b[31m\nline.bin": b"x"})
        self.serve()
        said = self.send(path, self.source / "\x1b[2J", status=1)
        self.assertEqual(len(said.splitlines()), 3, said)
        self.assertIn("red\\x1b[31m\\nline.bin: saved as red_", said)

    def test_it_speaks_python_3_8_and_needs_the_standard_library_alone(self) -> None:
        tree = ast.parse((SAMPLES / "upload.py").read_text(), feature_version=(3, 8))
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules.update(one.name.partition(".")[0] for one in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.partition(".")[0])
        self.assertIn("http", modules)
        self.assertLessEqual(modules, set(sys.stdlib_module_names))


class BenchmarkTest(unittest.TestCase):
    def test_a_mistake_on_its_command_line_is_one_sentence(self) -> None:
        for flags, words in (
            (("--folder", "/none"), "/none"),
            (("--folder", __file__), "test_samples.py"),
            (("--rows", "("), '"("'),
            (("--rows", "no such load"), '"no such load"'),
            (("--against", "/none.py"), "/none.py"),
            (("--rounds", "-1"), "--rounds"),
        ):
            with self.subTest(flags):
                command = [sys.executable, str(SAMPLES / "benchmark.py"), *flags]
                ended = subprocess.run(command, capture_output=True, text=True)
                self.assertEqual((ended.returncode, ended.stdout), (2, ""))
                self.assertRegex(ended.stderr, r"\Abenchmark: [^\n]+\.\n\Z")
                self.assertIn(words, ended.stderr)


class DoubtfulServerTest(ClientCase):
    """A server, or a proxy before it, that does not say what it should."""

    def upload(self, instead: test_page.Instead, size: int = MIB) -> str:
        content = noise(size, 1)
        (path,) = write_files(self.source, {"file.bin": content})
        with doubtful_server(self.home, instead) as url:
            said = self.send("--chunk-size", "256K", path, url=url)
        self.assertTrue((self.home / "file.bin").read_bytes() == content)
        return said

    def test_a_chunk_that_was_answered_but_not_kept_is_sent_again(self) -> None:
        self.assertEqual(self.posts_when_one_is_forgotten(MIB), 4 + 1)

    def test_a_small_file_that_was_answered_but_not_kept_is_sent_again(self) -> None:
        self.assertEqual(self.posts_when_one_is_forgotten(100), 1 + 1)

    def posts_when_one_is_forgotten(self, size: int) -> int:
        posts = []

        def forget_one(request: Any, call: int, really: Any) -> Any:
            if request.method == "POST":
                posts.append(request)
            if posts != [request]:
                return really()
            return answer(request, 200, {"success": True, "status": "partial"})

        self.upload(forget_one, size)
        return len(posts)

    def test_a_file_that_is_changed_while_its_last_chunk_travels(self) -> None:
        (path,) = write_files(self.source, {"file.bin": bytes(32 * MIB)})

        def change_it(request: Any, call: int, really: Any) -> Any:
            with open(path, "r+b") as file:  # the client is far from the end of it
                file.seek(31 * MIB)
                file.write(b"another version")
            return really()

        with doubtful_server(self.home, change_it) as url:
            said = self.send("--chunk-size", "32M", path, url=url, status=1)
        self.assertIn("file.bin: the file was changed while it was sent\n", said)
        self.assertFalse((self.home / "file.bin").exists(), "a mixed file")

    def test_a_small_file_is_remembered_by_its_name_there_and_its_server(self) -> None:
        """Sent in its folder and alone, and to another address: all arrive."""
        (path,) = write_files(self.source, {"album/file.bin": b"one"})
        arguments = ("--parallel", 1, path.parent, path)
        error = {"success": False, "error": "No."}

        def refuse_the_second(request: Any, call: int, really: Any) -> Any:
            return answer(request, 413, error) if call == 2 else really()

        with doubtful_server(self.home, refuse_the_second) as url:
            self.send(*arguments, url=url, status=1)
            elsewhere = ("--upload-path", "elsewhere", *arguments)
            said = self.send(*elsewhere, url=url, status=1)
            self.assertIn("0 of 2 files are there\n", said)
            self.send(*arguments, url=url)
        self.assertEqual((self.home / "album" / "file.bin").read_bytes(), b"one")
        self.assertEqual((self.home / "file.bin").read_bytes(), b"one")

    def test_without_the_word_complete_the_server_is_asked(self) -> None:
        methods = []

        def hide_the_end(request: Any, call: int, really: Any) -> Any:
            methods.append(request.method)
            response = really()
            if request.method != "POST":
                return response
            body = response.body.replace(b'"complete"', b'"partial"')
            return response._replace(body=body)

        self.upload(hide_the_end)
        self.assertEqual(methods, ["GET"] + ["POST"] * 4 + ["GET"])

    def test_passing_trouble_is_told_and_waited_out(self) -> None:
        error = {"success": False, "error": "The disk is away for a moment."}

        def unwell(request: Any, call: int, really: Any) -> Any:
            if call == 1:
                return answer(request, 200, b"<!doctype html>Log in")
            if call == 3:
                return answer(request, 503, error, retry_after="2")
            if call == 4:
                return answer(request, 503, error, retry_after="9" * 5000)
            return really()

        said = self.upload(unwell)
        self.assertIn("this answer is not from flowserver, trying again in 1 s\n", said)
        self.assertIn("The disk is away for a moment, trying again in 2 s\n", said)


class SamplePageCase(test_page.PageCase):
    """What both pages must do; the names below them say how each library is told."""

    page = ""

    def serve_sample(self, *flags: str, with_library: bool = True) -> None:
        sample = self.home / "sample"
        sample.mkdir()
        shutil.copy(SAMPLES / self.page, sample / self.page)
        if with_library:
            library = sample / "node_modules" / LIBRARIES[self.page]
            source = MODULES / LIBRARIES[self.page]
            shutil.copytree(source.parent, library.parent)  # with its styles
        self.serve(*flags)
        self.open(f"{self.server.url}sample/{self.page}")

    def slow(self) -> None:
        test_page.BROWSER.network(upload_bytes_per_second=2 * MIB)

    def choose(self, *paths: Path) -> None:
        test_page.BROWSER.set_files("#browse", paths)

    def choose_folder(self, path: Path) -> None:
        test_page.BROWSER.set_files("#browse-folder", [path])

    def rows(self) -> list[tuple[str, str]]:
        script = (
            "return [...document.querySelectorAll('#files li')].map(row => ["
            "row.querySelector('div').textContent,"
            "row.querySelector('span').textContent])"
        )
        return [(name, words) for name, words in test_page.BROWSER.run(script)]

    def press(self, action: str, path: str) -> None:
        for button in test_page.BROWSER.find_all("#files button"):
            if button.attribute("aria-label") == f"{action} {path}":
                return button.click()
        self.fail(f"no button «{action} {path}»: {self.rows()}")

    def wait_until_finished(self, count: int) -> None:
        def is_finished() -> bool:
            rows = self.rows()
            said = [words.startswith("Finished") for _, words in rows]
            return len(said) == count and all(said)

        self.wait(is_finished, f"{count} finished files")


class SamplePages:
    class Test(SamplePageCase):
        def test_files_arrive_whole_whatever_they_are_called(self) -> None:
            files = {
                "three chunks.bin": noise(3 * MIB + 17, 1),
                "two.bin": noise(2 * MIB, 2),
                "a+b & c=d; 100%25 #.bin": noise(5, 3),
                "empty.txt": b"",
                "日本.txt": b"one",
                "中国.txt": b"two",
            }
            self.serve_sample()
            self.choose(*self.files(files))
            self.wait_until_finished(len(files))
            self.assert_on_disk(files)
            self.assert_nothing_travelled_twice()
            self.assert_quiet()

        def test_files_of_one_time_are_different_files(self) -> None:
            """Both libraries drop a file whose identifier they have already seen."""
            files = {f"{n}.txt": b"%d" % n for n in range(5)}
            paths = self.files(files)
            for path in paths:
                os.utime(path, (1_700_000_000, 1_700_000_000))
            self.serve_sample()
            self.choose(*paths[:3])
            self.choose(*paths[3:])
            self.wait_until_finished(5)
            self.assert_on_disk(files)

        def test_a_folder_keeps_its_shape_chosen_and_dropped(self) -> None:
            files = {"album/cover.bin": noise(70_000, 1), "album/2026/a.txt": b"a"}
            self.files(files)
            dropped = {"box/one.txt": b"one", "box/two/three.txt": b"three"}
            self.files(dropped)
            self.serve_sample()
            self.choose_folder(self.source / "album")
            self.wait_until_finished(2)
            self.drop(self.source / "box")
            self.wait_until_finished(4)
            self.assert_on_disk({**files, **dropped})

        def drop(self, *paths: Path) -> None:
            box = test_page.BROWSER.run(
                "const box = document.querySelector('#drop').getBoundingClientRect();"
                "window.over = 0; ondragover = () => over++; return [box.x, box.y]"
            )
            data = {"items": [], "files": [str(one) for one in paths]}
            data["dragOperationsMask"] = 1  # type: ignore[assignment]

            def drag(kind: str) -> bool:
                test_page.BROWSER.devtools(
                    "Input.dispatchDragEvent",
                    type=kind,
                    x=box[0] + 9,
                    y=box[1] + 9,
                    data=data,
                )
                return bool(test_page.BROWSER.run("return over > 1"))

            drag("dragEnter")
            self.wait(lambda: drag("dragOver"), "a drag that is seen")
            drag("drop")

        def test_pause_stops_and_resume_sends_the_rest(self) -> None:
            files = {"long.bin": noise(8 * MIB + 3, 1)}
            self.serve_sample()
            self.slow()
            self.choose(*self.files(files))
            self.wait_for_accepted(2)
            self.press("Pause", "long.bin")
            self.assertEqual(self.words("long.bin"), "Paused")
            self.wait(
                lambda: all(r.status is not None for r in self.requests()), "silence"
            )
            before = len(self.requests())
            test_page.BROWSER.run("return new Promise(done => setTimeout(done, 1500))")
            self.assertEqual(len(self.requests()), before)
            self.assertEqual(list(self.server.finished_files()), [])
            test_page.BROWSER.network()
            self.press("Resume", "long.bin")
            self.wait_until_finished(1)
            self.assert_on_disk(files)
            self.assert_nothing_travelled_twice()

        def test_pause_all_and_resume_all(self) -> None:
            files = {f"{n}.bin": noise(4 * MIB, n) for n in range(2)}
            self.serve_sample()
            self.slow()
            self.choose(*self.files(files))
            self.wait_for_accepted(1)
            test_page.BROWSER.find("#pause").click()
            self.assertEqual({words for _, words in self.rows()}, {"Paused"})
            test_page.BROWSER.network()
            test_page.BROWSER.find("#resume").click()
            self.wait_until_finished(2)
            self.assert_on_disk(files)

        def test_cancel_leaves_nothing_in_the_temp_folder(self) -> None:
            self.serve_sample()
            self.slow()
            self.choose(*self.files({"gone.bin": noise(8 * MIB, 1)}))
            self.wait_for_accepted(2)
            self.assertNotEqual(self.server.unfinished_data(), [])
            self.press("Cancel", "gone.bin")
            self.assertEqual(self.rows(), [])
            self.wait(lambda: not self.server.unfinished_data(), "an empty temp folder")
            self.assert_on_disk({})

        def test_a_refusal_is_told_and_retry_works(self) -> None:
            self.serve_sample("--on-conflict", "refuse")
            taken = self.server.upload_dir / "report.bin"
            taken.write_bytes(b"somebody's")
            content = noise(2 * MIB + 5, 1)
            self.choose(*self.files({"report.bin": content}))
            self.wait_for_words("report.bin", r".*\.")
            self.assertEqual(taken.read_bytes(), b"somebody's")
            taken.unlink()
            self.press("Retry", "report.bin")
            self.wait_until_finished(1)
            self.assert_on_disk({"report.bin": content})

        def test_after_a_reload_only_the_rest_is_sent(self) -> None:
            content = noise(8 * MIB + 3, 1)
            (path,) = self.files({"long.bin": content})
            self.serve_sample()
            self.slow()
            self.choose(path)
            self.wait_for_accepted(3)
            test_page.BROWSER.reload()
            test_page.BROWSER.network()
            self.choose(path)
            self.wait_until_finished(1)
            self.assert_on_disk({"long.bin": content})
            self.assert_nothing_travelled_twice()

        def test_a_killed_server_is_awaited_and_found_again(self) -> None:
            content = noise(8 * MIB + 3, 1)
            self.serve_sample()
            self.slow()
            self.choose(*self.files({"long.bin": content}))
            self.wait_for_accepted(2)
            self.server.kill()
            self.wait_for_words("long.bin", "Connection lost, trying again every 3 s")
            test_page.BROWSER.network()
            self.server.start()
            self.wait_until_finished(1)
            self.assert_on_disk({"long.bin": content})

        def test_a_name_that_is_taken_and_one_that_is_markup(self) -> None:
            name = "<img src=x onerror=alert(1)>.txt"
            self.serve_sample()
            (self.server.upload_dir / "report.txt").write_bytes(b"another")
            self.choose(*self.files({name: b"x", "report.txt": b"y"}))
            self.wait_until_finished(2)
            said = "Finished, saved as report (1).txt"
            self.assertEqual(self.words("report.txt"), said)
            self.assertEqual(self.rows()[0][0], name)
            self.assertEqual(test_page.BROWSER.find_all("img"), [])

        def test_without_the_library_the_page_says_how_to_get_it(self) -> None:
            self.serve_sample(with_library=False)
            missing = test_page.BROWSER.find("#missing")
            self.assertTrue(missing.displayed())
            self.assertIn("npm install", missing.text())
            self.assertFalse(test_page.BROWSER.find("#ready").displayed())


class FlowTest(SamplePages.Test):
    page = "flowjs.html"


class ResumableTest(SamplePages.Test):
    page = "resumablejs.html"


class OwnInterfaceTest(SamplePageCase):
    """The pages whose libraries draw what is seen."""

    FILES = {"long.bin": noise(5 * MIB + 3, 1), "a+b & c=d #.txt": b"one"}

    def test_dropzone(self) -> None:
        self.page = "dropzone.html"
        self.serve_sample()
        test_page.BROWSER.set_files(".dz-hidden-input", self.files(self.FILES))
        said = "return [...document.querySelectorAll('#done li')].map(e => e.innerText)"
        names = sorted(self.FILES)
        self.wait(lambda: sorted(test_page.BROWSER.run(said)) == names, "both")
        self.assert_on_disk(self.FILES)

    def test_uppy(self) -> None:
        self.page = "uppy.html"
        self.serve_sample()
        test_page.BROWSER.set_files(".uppy-Dashboard-input", self.files(self.FILES))
        test_page.BROWSER.find(".uppy-StatusBar-actionBtn--upload").click()
        said = "return document.querySelector('.uppy-Dashboard').innerText"
        self.wait(lambda: "Complete" in test_page.BROWSER.run(said), "Complete")
        self.assert_on_disk(self.FILES)

    def test_without_the_library_they_say_how_to_get_it(self) -> None:
        for self.page in ("dropzone.html", "uppy.html"):
            with self.subTest(self.page):
                self.serve_sample(with_library=False)
                missing = test_page.BROWSER.find("#missing")
                self.assertTrue(missing.displayed())
                self.assertIn("npm install", missing.text())
                self.server.kill()
                shutil.rmtree(self.home / "sample")


class FolderTest(test_page.PageCase):
    def test_the_pins_are_those_that_are_tested(self) -> None:
        pins = json.loads((SAMPLES / "package.json").read_text())["dependencies"]
        names = ["@flowjs/flow.js", "dropzone", "resumablejs", "uppy"]
        self.assertEqual(sorted(pins), names)
        for name, version in pins.items():
            manifest = json.loads((MODULES / name / "package.json").read_text())
            self.assertEqual(manifest["version"], version)

    def test_the_readme_names_every_file_and_no_other(self) -> None:
        text = (SAMPLES / "README.md").read_text()
        named = set(re.findall(r"(?m)^\| `([^`]+)` \|", text))
        there = {one.name for one in SAMPLES.iterdir() if one.is_file()}
        self.assertEqual(named, {name for name in there if name != "README.md"})

    def test_scripts_of_ours_are_not_served(self) -> None:
        (self.home / "sample").mkdir()
        for name in ("upload.py", "flowjs.html"):
            shutil.copy(SAMPLES / name, self.home / "sample")
        self.serve()
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port)
        self.addCleanup(connection.close)
        for name, status in (("flowjs.html", 200), ("upload.py", 404)):
            connection.request("GET", f"/sample/{name}")
            response = connection.getresponse()
            response.read()
            self.assertEqual(response.status, status, name)


if __name__ == "__main__":
    unittest.main()
