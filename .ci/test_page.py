"""The built-in page, pressed by a real Chromium, against the real server.

What can be pressed is pressed, and what follows is read from the page, from what
travelled, and from the disk.

FLOWSERVER_FILE names another flowserver.py, to see these tests fail on a broken one.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from browser import Browser

HERE = Path(__file__).resolve().parent
SERVER = Path(os.environ.get("FLOWSERVER_FILE") or HERE.parent / "flowserver.py")
AXE = HERE / ".tools" / "node_modules" / "axe-core" / "axe.min.js"

KIB = 1024
MIB = 1024 * KIB
TAB, ENTER, SPACE = "\ue004", "\ue007", " "

# Slow enough to act in the middle of six MiB, quick enough for a test.
SLOW = 1536 * KIB

# Written before the page's own script runs, and kept over a reload: every request, in
# order, its answer, and how many requests had been sent when the answer came.
RECORDER = """
(() => {
  let requests = [];
  try { requests = JSON.parse(sessionStorage.requests || '[]'); } catch { return; }
  window.requests = requests;
  addEventListener('pagehide', () => {
    sessionStorage.requests = JSON.stringify(requests);
  });
  const {open, send} = XMLHttpRequest.prototype;
  XMLHttpRequest.prototype.open = function (method, url) {
    this.told = {method, url: new URL(url, location.href).href, status: null};
    return open.apply(this, arguments);
  };
  XMLHttpRequest.prototype.send = function (body) {
    const told = this.told;
    requests.push(Object.assign(told, {size: body ? body.size : 0}));
    this.addEventListener('readystatechange', () => {
      if (this.readyState !== 4) return;
      Object.assign(told, {status: this.status, answered: requests.length});
    });
    return send.apply(this, arguments);
  };
})();
"""

# Everything that moves without a key or a click to explain it.
SHIFT_WATCH = """
window.shifts = [];
new PerformanceObserver(list => {
  for (const shift of list.getEntries())
    for (const {node} of shift.hadRecentInput ? [] : shift.sources)
      shifts.push(node ? node.nodeName + ' ' + node.textContent : 'something gone');
}).observe({type: 'layout-shift'});
"""

BROWSER: Browser


def setUpModule() -> None:
    """One browser for all tests. Without it everything fails, nothing is skipped."""
    global BROWSER
    if not AXE.is_file():
        raise AssertionError("axe-core is not installed: run .ci/run, which does it")
    BROWSER = Browser()
    unittest.addModuleCleanup(BROWSER.close)
    BROWSER.devtools("Page.addScriptToEvaluateOnNewDocument", source=RECORDER)


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def write_files(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    paths = []
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        paths.append(path)
    return paths


def load_server() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flowserver_under_test", SERVER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Server:
    """flowserver.py alone in a folder, started, killed and started again."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.upload_dir = folder / "uploads"
        self.flags = flags
        # Bound here, too, all the while: nobody else gets it when the server is down.
        self.place = socket.socket()
        self.place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.place.bind(("127.0.0.1", 0))
        self.port = self.place.getsockname()[1]
        if not (folder / "flowserver.py").exists():
            shutil.copy(SERVER, folder / "flowserver.py")
        self.start()

    def start(self) -> None:
        """Start, each time at the same address."""
        command = [sys.executable, "flowserver.py", "--port", str(self.port)]
        environment = dict(os.environ)
        environment.pop("FLOWSERVER_CONFIG", None)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.flags],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.url = self._announced_url()

    def _announced_url(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = re.search(r"https?://127\.0\.0\.1:\d+/", line)
            if found:
                return found[0]
        self.process.wait()
        raise AssertionError(f"the server did not start: {self.log_text()}")

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        return self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        try:
            return self.process.wait(timeout=30)
        finally:
            self.process.kill()
            self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()

    def finished_files(self) -> dict[str, bytes]:
        """All files of the upload folder, except what the server keeps for itself."""
        return {
            path.relative_to(self.upload_dir).as_posix(): path.read_bytes()
            for path in self.upload_dir.rglob("*")
            if path.is_file() and ".flowserver" not in path.parts
        }

    def unfinished_data(self) -> list[str]:
        temp = self.upload_dir / ".flowserver"
        return [one.name for kind in ("*.data", "*.part") for one in temp.rglob(kind)]


# Given a request to /upload, its number, and a function that really answers it.
Instead = Callable[[Any, int, Callable[[], Any]], Any]


@contextlib.contextmanager
def doubtful_server(upload_dir: Path, instead: Instead) -> Iterator[str]:
    """The real application, but `instead` says what becomes of /upload."""
    module = load_server()
    calls = itertools.count(1)

    class Doubtful(module.UploadApp):  # type: ignore[name-defined, misc]
        def handle(self, request: Any) -> Any:
            really = functools.partial(super().handle, request)
            if request.path != "/upload":
                return really()
            return instead(request, next(calls), really)

    settings = module.Settings(
        upload_dir=str(upload_dir), host="127.0.0.1", port=0, chunk_size=256 * KIB
    )
    with module.FlowServer(Doubtful(settings)) as server:
        yield server.url + "/"


def answer(request: Any, status: int, body: object, retry_after: str = "") -> Any:
    """Read the request away and answer it without the application."""
    left = request.length
    while left > 0:
        left -= request.fill()[1]
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = [("Content-Type", "application/json")]
    if retry_after:
        headers.append(("Retry-After", retry_after))
    return sys.modules["flowserver_under_test"].Response(status, tuple(headers), data)


class Request:
    """One request that the page has sent."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        self.method = told["method"]
        self.status = told["status"]
        self.answered = told.get("answered")
        self.size = told["size"]
        self.parameters = {
            name: values[0]
            for name, values in parse_qs(urlsplit(told["url"]).query).items()
        }

    @property
    def chunk(self) -> tuple[str, str, int] | None:
        """Which chunk of which file it brought, in any library's words."""
        if self.method != "POST":
            return None
        plain = {
            re.sub("^(flow|resumable)", "", name): value
            for name, value in self.parameters.items()
        }
        return plain["Identifier"], plain["RelativePath"], int(plain["ChunkNumber"])


class PageCase(unittest.TestCase):
    """What a person does with the page, and what is then to be seen."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="flowserver-ci-")
        self.addCleanup(folder.cleanup)
        self.source = Path(folder.name, "source")
        self.source.mkdir()
        self.home = Path(folder.name, "alone")
        self.home.mkdir()
        self.addCleanup(BROWSER.network)

    def serve(self, *flags: str) -> None:
        self.server = Server(self.home, *flags)
        self.addCleanup(self.server.place.close)
        self.addCleanup(self.stop_server)
        self.open(self.server.url)

    def open(self, url: str) -> None:
        BROWSER.open("about:blank")  # what the page of the test before says of that
        BROWSER.console()
        BROWSER.open(url)
        BROWSER.run("sessionStorage.clear(); requests.length = 0")

    def stop_server(self) -> None:
        if self.server.process.poll() is None:
            self.server.stop()
        log = self.server.log_text()
        self.assertNotIn("Traceback", log)

    # Doing

    def files(self, files: Mapping[str, bytes]) -> list[Path]:
        return write_files(self.source, files)

    def choose(self, *paths: Path) -> None:
        BROWSER.set_files("#files", paths)

    def choose_folder(self, path: Path) -> None:
        BROWSER.set_files("#folder", [path])

    def drop(self, *paths: Path) -> None:
        data = {"items": [], "files": [str(path) for path in paths]}

        def drag(kind: str) -> bool:
            BROWSER.devtools(
                "Input.dispatchDragEvent",
                type=kind,
                x=200,
                y=20,
                data={**data, "dragOperationsMask": 1},
            )
            return bool(BROWSER.run("return document.body.className === 'dropping'"))

        drag("dragEnter")
        BROWSER.wait_for(lambda: drag("dragOver"), what="the sign that files may drop")
        drag("drop")

    def press(self, action: str, path: str) -> None:
        """Click the button of a row by the name that a screen reader tells."""
        for button in BROWSER.find_all("#list button"):
            if button.attribute("aria-label") == f"{action} {path}":
                return button.click()
        self.fail(f"no button «{action} {path}»: {self.rows()}")

    def press_all(self, name: str) -> None:
        button = BROWSER.find(f"#{name}")
        self.wait(lambda: button.displayed() and not button.property("disabled"), name)
        button.click()

    # Seeing

    def rows(self) -> list[tuple[str, str]]:
        """Name and words of every file."""
        return [
            (name, state)
            for name, state in BROWSER.run(
                "return [...document.querySelectorAll('#list li')].map(row => ["
                "row.querySelector('.name').textContent,"
                "row.querySelector('.state').textContent])"
            )
        ]

    def words(self, path: str) -> str:
        return dict(self.rows())[path]

    def all_words(self) -> str:
        return str(
            BROWSER.run("return document.querySelector('#all .state').textContent")
        )

    def news(self) -> str:
        return str(BROWSER.run("return document.querySelector('#news').textContent"))

    def wait(self, claim: Callable[[], Any], what: str) -> None:
        BROWSER.wait_for(claim, what=f"{what}; rows: {self.rows()[:9]}")

    def wait_for_words(self, path: str, pattern: str) -> None:
        def found() -> bool:
            words = dict(self.rows()).get(path, "")
            return re.fullmatch(pattern, words) is not None

        self.wait(found, f"«{pattern}» at {path}")

    def wait_for_title(self, title: str) -> None:
        self.wait(lambda: BROWSER.title() == title, f"the title «{title}»")

    def wait_until_done(self) -> None:
        def is_done() -> bool:
            return all(words.startswith("Finished") for _, words in self.rows())

        self.wait(is_done, "the end of all files")
        self.wait_for_title("Done – Upload")

    def requests(self) -> list[Request]:
        return [Request(told) for told in BROWSER.run("return requests")]

    def accepted(self) -> int:
        return sum(r.method == "POST" and r.status == 200 for r in self.requests())

    def wait_for_accepted(self, count: int) -> None:
        self.wait(lambda: self.accepted() >= count, f"{count} accepted chunks")

    def assert_nothing_travelled_twice(self) -> None:
        """No chunk is sent again once it was answered 200."""
        stored: dict[Any, int] = {}
        for index, request in enumerate(self.requests()):
            if request.chunk is None:
                continue
            known = stored.get(request.chunk, index)
            self.assertGreaterEqual(known, index, f"{request.chunk} was sent again")
            if request.status == 200:
                stored[request.chunk] = request.answered

    def assert_on_disk(
        self, files: Mapping[str, bytes], others_unfinished: bool = False
    ) -> None:
        found = self.server.finished_files()
        self.assertEqual(sorted(found), sorted(files))
        for name, content in files.items():
            self.assertTrue(found[name] == content, f"{name} has other bytes")
        if not others_unfinished:
            self.assertEqual(self.server.unfinished_data(), [])

    def assert_quiet(self) -> None:
        """The console is empty and nobody else was asked for anything."""
        self.assertEqual(BROWSER.console(), [])
        asked = BROWSER.run(
            "return performance.getEntriesByType('resource').map(one => one.name)"
        )
        self.assertTrue(asked)
        for url in asked:
            self.assertTrue(url.startswith(self.server.url), url)


class UploadTest(PageCase):
    def test_chosen_files_arrive_whole_whatever_they_are_called(self) -> None:
        files = {
            "three chunks.bin": noise(3 * MIB + 17, 1),
            "two.bin": noise(2 * MIB, 2),
            "a+b & c=d; 100%25 #.bin": noise(5, 3),
            "Grüße 日本 🎈.txt": noise(1500, 4),
            "empty.txt": b"",
        }
        self.serve()
        self.choose(*self.files(files))
        self.wait_until_done()
        self.assertEqual(self.rows(), [(name, "Finished") for name in files])
        self.assertEqual(self.all_words(), "5 of 5 files finished")
        self.assert_on_disk(files)
        self.assert_nothing_travelled_twice()
        self.assert_quiet()

    def test_a_name_that_is_markup_is_shown_as_text(self) -> None:
        name = "<img src=x onerror=alert(1)>&amp;.txt"
        self.serve()
        self.choose(*self.files({name: b"text"}))
        self.wait_until_done()
        self.assertEqual(BROWSER.find(".name").text(), name)
        self.assertEqual(BROWSER.find_all("img"), [])
        self.assertEqual(list(self.server.finished_files().values()), [b"text"])
        self.assert_quiet()

    def test_a_chosen_folder_keeps_its_shape(self) -> None:
        files = {
            "album/cover.bin": noise(70_000, 1),
            "album/2026/Süden/long.bin": noise(MIB + 5, 2),
            "album/2026/cover.bin": noise(70_000, 3),
            "album/2026/empty.txt": b"",
        }
        self.files(files)
        self.serve()
        self.choose_folder(self.source / "album")
        self.wait_until_done()
        self.assert_on_disk(files)
        self.assertEqual(sorted(name for name, _ in self.rows()), sorted(files))
        self.assert_quiet()

    def test_dropped_files_and_folders_arrive_all(self) -> None:
        """A browser hands out the entries of a folder a hundred at a time."""
        many = {f"box/{n:03}/{n}.txt": b"%d" % n for n in range(130)}
        flat = {f"flat/{n}.txt": b"%d" % n for n in range(230)}
        files = {**many, **flat, "single.bin": noise(MIB + 1, 1)}
        self.files(files)
        self.serve()
        self.drop(*(self.source / name for name in ("box", "single.bin", "flat")))
        self.wait(lambda: len(self.rows()) == len(files), f"{len(files)} rows")
        self.wait_until_done()
        self.assert_on_disk(files)
        self.assert_quiet()

    def test_both_buttons_open_the_file_dialogs(self) -> None:
        self.serve()
        BROWSER.devtools("Page.setInterceptFileChooserDialog", enabled=True)
        self.addCleanup(
            BROWSER.devtools, "Page.setInterceptFileChooserDialog", enabled=False
        )
        BROWSER.run(
            "window.opened = []; for (const id of ['files', 'folder'])"
            "document.getElementById(id).onclick = () => opened.push(id)"
        )
        BROWSER.find("#choose-files").click()
        BROWSER.find("#choose-folder").click()
        self.assertEqual(BROWSER.run("return opened"), ["files", "folder"])
        self.assertTrue(BROWSER.run("return document.getElementById('files').multiple"))

    def test_two_files_of_one_name_size_and_time_both_arrive(self) -> None:
        first, second = noise(MIB + 9, 1), noise(MIB + 9, 2)
        paths = self.files({"a/same.bin": first, "b/same.bin": second})
        for path in paths:
            os.utime(path, (1_700_000_000, 1_700_000_000))
        self.serve()
        self.choose(paths[0])
        self.choose(paths[1])
        self.wait_until_done()
        found = self.server.finished_files()
        self.assertEqual(sorted(found), ["same (1).bin", "same.bin"])
        self.assertTrue({first, second} == set(found.values()), "other bytes")
        said = sorted(words for _, words in self.rows())
        self.assertEqual(said, ["Finished", "Finished, saved as same (1).bin"])

    def test_the_same_file_chosen_again_makes_no_second_copy(self) -> None:
        (path,) = self.files({"once.bin": noise(MIB + 9, 1)})
        self.serve()
        self.choose(path)
        self.wait_until_done()
        sent = sum(request.method == "POST" for request in self.requests())
        BROWSER.reload()
        self.choose(path)
        self.wait_until_done()
        self.assert_on_disk({"once.bin": path.read_bytes()})
        self.assertEqual(self.rows(), [("once.bin", "Finished")])
        again = sum(request.method == "POST" for request in self.requests())
        self.assertEqual(again, sent, "the second time nothing is sent")

    def test_three_chunks_at_a_time_over_all_files(self) -> None:
        self.serve("--chunk-size", "64k")
        BROWSER.run(
            "window.most = 0; let now = 0; const {send} = XMLHttpRequest.prototype;"
            "XMLHttpRequest.prototype.send = function () {"
            "  most = Math.max(most, ++now);"
            "  this.addEventListener('readystatechange',"
            "    () => { if (this.readyState === 4) now--; });"
            "  return send.apply(this, arguments); };"
        )
        self.choose(*self.files({f"{n}.bin": noise(MIB, n) for n in range(3)}))
        self.wait_until_done()
        self.assertEqual(BROWSER.run("return most"), 3)

    def test_a_thousand_files_wait_without_being_redrawn(self) -> None:
        files = {f"many/{n:04}.txt": b"%d" % n for n in range(1000)}
        self.files(files)
        self.serve()
        self.choose_folder(self.source / "many")
        BROWSER.wait_for("return document.querySelectorAll('#list li').length === 1000")
        self.press_all("pause-all")
        self.wait(lambda: BROWSER.find("#pause-all").text() == "Resume all", "a pause")
        BROWSER.run(
            "window.drawn = 0; new MutationObserver(list => { drawn += list.length; })"
            ".observe(document.querySelector('#list'), {subtree: true, childList: true,"
            " attributes: true, characterData: true})"
        )
        self.press_all("pause-all")
        self.wait_until_done()
        self.assert_on_disk(files)
        # A row begins to wait, may be drawn as it goes, and ends: no more than that.
        self.assertLess(BROWSER.run("return drawn"), 1000 * 25)
        self.assert_quiet()


class ControlTest(PageCase):
    def serve_slowly(self, *flags: str) -> None:
        self.serve("--chunk-size", "256k", *flags)
        BROWSER.network(upload_bytes_per_second=SLOW)

    def test_pause_stops_and_resume_sends_the_rest(self) -> None:
        files = {"long.bin": noise(6 * MIB + 3, 1)}
        self.serve_slowly()
        self.choose(*self.files(files))
        self.wait_for_accepted(4)
        self.press("Pause", "long.bin")
        self.assertEqual(self.words("long.bin"), "Paused")
        self.wait(lambda: all(r.status is not None for r in self.requests()), "silence")
        before = len(self.requests())
        BROWSER.run("return new Promise(done => setTimeout(done, 1500))")
        self.assertEqual(len(self.requests()), before, "a paused file sends nothing")
        self.assertEqual(list(self.server.finished_files()), [])
        BROWSER.network()
        self.press("Resume", "long.bin")
        self.wait_until_done()
        self.assert_on_disk(files)
        self.assert_nothing_travelled_twice()
        self.assert_quiet()

    def test_pause_all_and_resume_all(self) -> None:
        files = {f"{n}.bin": noise(2 * MIB, n) for n in range(4)}
        self.serve_slowly()
        self.choose(*self.files(files))
        self.wait_for_accepted(2)
        self.press_all("pause-all")
        self.wait(lambda: BROWSER.find("#pause-all").text() == "Resume all", "a pause")
        self.assertEqual({words for _, words in self.rows()}, {"Paused"})
        BROWSER.network()
        self.press_all("pause-all")
        self.wait_until_done()
        self.assert_on_disk(files)
        self.assert_nothing_travelled_twice()
        self.assertTrue(BROWSER.find("#pause-all").property("disabled"))

    def test_a_pause_of_all_has_no_speed(self) -> None:
        self.serve_slowly()
        self.choose(*self.files({"long.bin": noise(6 * MIB, 1)}))
        numbers = BROWSER.find("#all .numbers")
        self.wait(lambda: "left" in numbers.text(), "speed and time left")
        self.press_all("pause-all")
        self.wait(lambda: BROWSER.find("#pause-all").text() == "Resume all", "a pause")
        self.assertRegex(numbers.text(), r"\A[\d.]+ [KM]iB of 6.0 MiB\Z")

    def test_a_paused_file_lets_the_next_one_go_on(self) -> None:
        files = {"first.bin": noise(4 * MIB, 1), "second.bin": noise(MIB, 2)}
        self.serve_slowly()
        self.choose(*self.files(files))
        self.wait_for_accepted(1)
        self.press("Pause", "first.bin")
        BROWSER.network()
        self.wait_for_words("second.bin", "Finished")
        self.assertEqual(self.words("first.bin"), "Paused")

    def test_cancel_leaves_nothing_in_the_temp_folder(self) -> None:
        self.serve_slowly()
        self.choose(*self.files({"gone.bin": noise(6 * MIB, 1), "kept.bin": b"kept"}))
        self.wait_for_accepted(4)
        self.assertNotEqual(self.server.unfinished_data(), [])
        self.press("Cancel", "gone.bin")
        self.assertEqual([name for name, _ in self.rows()], ["kept.bin"])
        self.wait_until_done()
        self.wait(lambda: not self.server.unfinished_data(), "an empty temp folder")
        self.wait(
            lambda: self.answered_deletes() > 1,
            "the second word, for bodies that were on their way",
        )
        self.assert_on_disk({"kept.bin": b"kept"})
        self.assert_quiet()

    def answered_deletes(self) -> int:
        return sum(r.method == "DELETE" and bool(r.status) for r in self.requests())

    def test_a_cancelled_file_can_be_chosen_again(self) -> None:
        files = {"again.bin": noise(4 * MIB, 1)}
        self.serve_slowly()
        (path,) = self.files(files)
        self.choose(path)
        self.wait_for_accepted(3)
        self.press("Cancel", "again.bin")
        BROWSER.network()
        self.choose(path)
        self.wait_until_done()
        self.assert_on_disk(files)

    def test_clear_finished_keeps_the_others(self) -> None:
        self.serve_slowly()
        self.choose(*self.files({"small.txt": b"x", "long.bin": noise(6 * MIB, 1)}))
        self.wait_for_words("small.txt", "Finished")
        self.press_all("clear-finished")
        self.assertEqual([name for name, _ in self.rows()], ["long.bin"])
        BROWSER.network()
        self.wait_until_done()
        self.press("Remove", "long.bin")
        self.assertEqual(self.rows(), [])
        self.assertEqual(
            sorted(self.server.finished_files()), ["long.bin", "small.txt"]
        )

    def test_numbers_and_title_follow_the_bytes(self) -> None:
        self.serve_slowly()
        self.choose(*self.files({"long.bin": noise(6 * MIB, 1)}))
        pattern = r"\d\.\d MiB of 6\.0 MiB · [\d.]+ [KM]iB/s · \d+ s left"

        def numbers() -> str:
            return BROWSER.find("#list .numbers").text()

        self.wait(lambda: re.fullmatch(pattern, numbers()), "speed and time left")
        self.wait(
            lambda: re.fullmatch(r"[1-9]\d? % – Upload", BROWSER.title()), "a title"
        )
        share = BROWSER.run("return document.querySelector('#list progress').value")
        self.assertTrue(0 < share < 1, share)
        self.assertEqual(self.words("long.bin"), "Uploading")
        BROWSER.network()
        self.wait_until_done()
        self.assertEqual(numbers(), "6.0 MiB")

    def test_leaving_asks_first_while_files_are_unfinished(self) -> None:
        self.serve_slowly()
        self.assertFalse(self.leaving_asks(), "nothing is lost yet")
        (path,) = self.files({"long.bin": noise(4 * MIB, 1)})
        self.choose(path)
        self.wait_for_accepted(1)
        self.assertTrue(self.leaving_asks())
        self.press("Pause", "long.bin")
        self.assertTrue(self.leaving_asks())
        BROWSER.network()
        self.press("Resume", "long.bin")
        self.wait_until_done()
        self.assertFalse(self.leaving_asks())

    def leaving_asks(self) -> bool:
        """Would it? The question itself is answered by chromedriver, unseen."""
        script = (
            "const leave = new Event('beforeunload', {cancelable: true});"
            "window.dispatchEvent(leave); return leave.defaultPrevented"
        )
        return bool(BROWSER.run(script))


class RefusalTest(PageCase):
    def test_a_too_large_file_is_refused_before_it_is_sent(self) -> None:
        self.serve("--max-file-size", "2M")
        self.assertEqual(BROWSER.find("#limit").text(), "Files may have up to 2.0 MiB.")
        large, right = self.files(
            {"large.bin": noise(2 * MIB + 1, 1), "right.bin": noise(2 * MIB, 2)}
        )
        self.choose(large, right)
        self.wait_for_words("right.bin", "Finished")
        self.assertRegex(self.words("large.bin"), "too large.*2.0 MiB")
        sent = {r.parameters["flowFilename"] for r in self.requests()}
        self.assertEqual(sent, {"right.bin"})
        self.wait_for_title("Failed – Upload")
        self.assertFalse(BROWSER.find("#list .toggle").displayed(), "no vain Retry")
        self.assertTrue(BROWSER.find("#retry-failed").property("disabled"))
        self.press("Remove", "large.bin")
        self.wait_until_done()

    def test_a_refusal_stops_and_retry_works_once_the_cause_is_gone(self) -> None:
        self.serve("--on-conflict", "refuse")
        taken = self.server.upload_dir / "report.bin"
        taken.write_bytes(b"somebody's")
        content = noise(2 * MIB + 5, 1)
        self.choose(*self.files({"report.bin": content}))
        self.wait_for_words("report.bin", r"(?!Uploading|Waiting|Finishing).*\.")
        self.wait_for_title("Failed – Upload")
        self.assertIn(self.words("report.bin"), self.server_sentences())
        self.assertEqual(taken.read_bytes(), b"somebody's")
        taken.unlink()
        self.press("Retry", "report.bin")
        self.wait_until_done()
        self.assert_on_disk({"report.bin": content})

    def server_sentences(self) -> list[str]:
        """What the server says when it is asked for the same once more."""
        refused = [r for r in self.requests() if r.status and r.status >= 400]
        self.assertEqual(len(refused), 1, "a refusal is not tried again by itself")
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port)
        with contextlib.closing(connection):
            query = "&".join(f"{k}={v}" for k, v in refused[0].parameters.items())
            size = int(refused[0].parameters["flowCurrentChunkSize"])
            start = (int(refused[0].parameters["flowChunkNumber"]) - 1) * MIB
            body = noise(2 * MIB + 5, 1)[start : start + size]
            connection.request("POST", f"/upload?{query}", body)
            return [json.loads(connection.getresponse().read())["error"]]

    def test_retry_failed_tries_them_all(self) -> None:
        self.serve("--on-conflict", "refuse")
        files = {f"{n}.txt": b"new" for n in range(3)}
        taken = write_files(self.server.upload_dir, dict.fromkeys(files, b"old"))
        self.choose(*self.files(files))
        self.wait(lambda: "3 failed" in self.all_words(), "three failures")
        for path in taken:
            path.unlink()
        self.press_all("retry-failed")
        self.wait_until_done()
        self.assert_on_disk(files)

    def test_chunks_obey_the_settings_of_the_server(self) -> None:
        self.serve("--chunk-size", "1M", "--max-chunk-size", "300000")
        self.choose(*self.files({"cut.bin": noise(MIB, 1)}))
        self.wait_until_done()
        sizes = [r.size for r in self.requests() if r.method == "POST"]
        self.assertEqual(sorted(sizes), sorted([300_000] * 3 + [MIB - 900_000]))

    def test_a_file_that_changed_after_it_was_chosen_fails_in_words(self) -> None:
        self.serve("--chunk-size", "256k")
        (path,) = self.files({"moving.bin": noise(4 * MIB, 1)})
        BROWSER.network(upload_bytes_per_second=SLOW)
        self.choose(path)
        self.wait_for_accepted(2)
        path.write_bytes(noise(4 * MIB, 2))
        os.utime(path, (1_700_000_000, 1_700_000_000))
        BROWSER.network()
        self.wait_for_words("moving.bin", "This file has changed or is gone.*")
        self.assertEqual(list(self.server.finished_files()), [])

    def test_an_empty_file_that_is_not_empty_any_more_is_not_sent_as_such(self) -> None:
        self.serve("--chunk-size", "256k")
        BROWSER.network(upload_bytes_per_second=SLOW)
        first = {"long.bin": noise(6 * MIB, 1)}
        empty = {"filled.txt": b"", "gone.txt": b"", "page.mhtml": b""}
        long, filled, gone, page = self.files({**first, **empty})
        self.choose(long)
        self.wait_for_accepted(1)  # all three requests are taken
        self.choose(filled, gone, page)
        self.press_all("pause-all")
        self.wait(lambda: BROWSER.find("#pause-all").text() == "Resume all", "a pause")
        filled.write_bytes(b"now it has text")
        os.utime(filled, (1_700_000_000, 1_700_000_000))
        gone.unlink()
        BROWSER.network()
        self.press_all("pause-all")
        for name in ("filled.txt", "gone.txt"):
            self.wait_for_words(name, "This file has changed or is gone.*")
        self.wait_for_words("long.bin", "Finished")
        self.wait_for_words("page.mhtml", "Finished")
        self.assert_on_disk({**first, "page.mhtml": b""})

    def test_a_file_that_comes_back_and_is_chosen_again_goes_on(self) -> None:
        """The stick was pulled out."""
        content = noise(6 * MIB + 3, 1)
        self.serve("--chunk-size", "256k")
        BROWSER.network(upload_bytes_per_second=SLOW)
        (path,) = self.files({"stick.bin": content})
        self.choose(path)
        self.wait_for_accepted(5)
        away = path.rename(path.with_suffix(".away"))
        self.wait_for_words("stick.bin", "This file has changed or is gone.*")
        away.rename(path)
        BROWSER.network()
        self.choose(path)
        self.wait_until_done()
        self.assertEqual(self.rows(), [("stick.bin", "Finished")])
        self.assert_on_disk({"stick.bin": content})
        self.assert_nothing_travelled_twice()

    def test_what_can_not_be_had_of_a_drop_does_not_lose_the_rest(self) -> None:
        self.serve()
        BROWSER.run(
            "const item = file => ({kind: 'file', webkitGetAsEntry: () => null,"
            "  getAsFile: () => file});"
            "const items = [item(null), item(new File(['x'], 'x.txt'))];"
            "window.ondrop({preventDefault() {}, dataTransfer: {items}})"
        )
        self.wait_for_words("x.txt", "Finished")


class ResumeTest(PageCase):
    def reload(self) -> None:
        """Reload as a person who means it."""
        BROWSER.find("h1").click()
        BROWSER.run("window.onbeforeunload = null")
        BROWSER.reload()

    def begin(self, content: bytes) -> Path:
        self.serve("--chunk-size", "256k")
        BROWSER.network(upload_bytes_per_second=SLOW)
        (path,) = self.files({"long.bin": content})
        self.choose(path)
        self.wait_for_accepted(5)
        return path

    def test_after_a_reload_only_the_rest_is_sent(self) -> None:
        content = noise(6 * MIB + 3, 1)
        path = self.begin(content)
        self.reload()
        BROWSER.network()
        before = len(self.requests())
        self.choose(path)
        self.wait_until_done()
        self.assert_on_disk({"long.bin": content})
        self.assert_nothing_travelled_twice()
        again = self.requests()[before:]
        self.assertEqual(again[0].method, "GET")
        self.assertEqual([r.method for r in again].count("GET"), 1, "one question")
        self.assertLessEqual(len(again), 25 + 1 - 5)
        self.assert_quiet()

    def test_a_killed_server_is_awaited_in_words_and_found_again(self) -> None:
        content = noise(6 * MIB + 3, 1)
        self.begin(content)
        self.server.kill()
        self.wait_for_words("long.bin", r"Connection lost, trying again in \d+ s")
        self.wait(lambda: "trying again in" in self.all_words(), "words for all")
        self.wait(lambda: "Connection lost" in self.news(), "words for screen readers")
        BROWSER.network()
        self.server.start()
        self.wait_until_done()
        self.assert_on_disk({"long.bin": content})
        self.assert_nothing_travelled_twice()

    def test_waits_grow_and_try_now_ends_them(self) -> None:
        content = noise(6 * MIB + 3, 1)
        self.begin(content)
        self.server.kill()
        self.wait_for_words("long.bin", r".*trying again in [5-8] s")
        self.assertTrue(BROWSER.find("#try-now").displayed())
        self.server.start()
        soon = BROWSER.run(
            "document.querySelector('#try-now').click();"
            "return new Promise(done => setTimeout(() =>"
            " done(document.querySelector('#list .state').textContent), 500))"
        )
        self.assertEqual(soon, "Uploading", "it does not wait for the countdown")
        BROWSER.network()
        self.wait_until_done()
        self.assert_on_disk({"long.bin": content})
        self.assert_nothing_travelled_twice()

    def test_who_waits_says_so_in_every_row(self) -> None:
        files = {f"{n}.bin": noise(2 * MIB, n) for n in range(3)}
        self.serve("--chunk-size", "256k")
        BROWSER.network(upload_bytes_per_second=SLOW)
        self.choose(*self.files(files))
        self.wait_for_accepted(3)
        self.server.kill()
        self.wait(lambda: "trying again" in self.all_words(), "trouble")
        BROWSER.run(
            "window.wrong = []; setInterval(() => {"
            "  const words = [...document.querySelectorAll('.state')]"
            "    .map(one => one.textContent);"
            "  if (/again in [2-9] s/.test(words[0]) && words.includes('Uploading'))"
            "    wrong.push(words.join()); }, 50)"
        )
        BROWSER.run("return new Promise(done => setTimeout(done, 9000))")
        self.assertEqual(BROWSER.run("return wrong"), [])

    def test_a_clock_that_is_set_back_prolongs_no_wait(self) -> None:
        content = noise(6 * MIB + 3, 1)
        self.begin(content)
        self.server.kill()
        self.wait_for_words("long.bin", r".*trying again in [2-4] s")
        BROWSER.run("const {now} = Date; Date.now = () => now() - 3_600_000")
        BROWSER.network()
        self.server.start()
        self.wait_until_done()
        self.assert_on_disk({"long.bin": content})

    def test_a_server_that_lost_its_disk_gets_everything_again(self) -> None:
        content = noise(6 * MIB + 3, 1)
        self.begin(content)
        self.server.kill()
        shutil.rmtree(self.server.upload_dir)
        BROWSER.network()
        self.server.start()
        self.wait_until_done()
        self.assert_on_disk({"long.bin": content})

    def test_a_changed_file_is_not_taken_for_the_old_one(self) -> None:
        path = self.begin(noise(6 * MIB + 3, 1))
        content = noise(6 * MIB + 3, 2)
        path.write_bytes(content)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        self.reload()
        BROWSER.network()
        self.choose(path)
        self.wait_until_done()
        self.assert_on_disk({"long.bin": content}, others_unfinished=True)

    def test_another_browser_does_not_resume_this_ones_file(self) -> None:
        self.begin(noise(6 * MIB + 3, 1))
        identifiers = {r.parameters["flowIdentifier"] for r in self.requests()}
        self.assertEqual(len(identifiers), 1)
        ours = identifiers.pop()
        self.assertRegex(ours, r"\Aflowserver-[0-9a-f]{32}-\d+\Z")
        BROWSER.run("localStorage.clear()")
        self.reload()
        BROWSER.network()
        before = len(self.requests())
        self.choose(self.source / "long.bin")
        self.wait_until_done()
        theirs = self.requests()[before].parameters["flowIdentifier"]
        self.assertNotEqual(ours, theirs)
        self.assertEqual(ours.split("-")[2], theirs.split("-")[2])


class DoubtfulServerTest(PageCase):
    """A server, or a proxy before it, that does not say what it should."""

    @contextlib.contextmanager
    def answering(self, instead: Instead) -> Iterator[None]:
        with doubtful_server(self.home, instead) as url:
            self.open(url)
            yield

    def upload(self, words_before: str = "", size: int = MIB) -> list[str]:
        """Send a file until the page says that it is there; give back the methods."""
        content = noise(size, 1)
        self.choose(*self.files({"file.bin": content}))
        if words_before:
            self.wait_for_words("file.bin", words_before)
        self.wait_until_done()
        self.assertTrue((self.home / "file.bin").read_bytes() == content)
        return [r.method for r in self.requests()]

    def test_a_chunk_that_was_answered_but_not_kept_is_sent_again(self) -> None:
        def forget_one(request: Any, call: int, really: Any) -> Any:
            if call != 3:
                return really()
            said = {"success": True, "status": "partial", "received": 1, "size": MIB}
            return answer(request, 200, said)

        with self.answering(forget_one):
            methods = self.upload()
        self.assertEqual(methods.count("POST"), 5)
        self.assertGreaterEqual(methods.count("GET"), 2, "it asked before it believed")

    def test_without_the_word_complete_the_server_is_asked(self) -> None:
        def hide_the_end(request: Any, call: int, really: Any) -> Any:
            response = really()
            body = response.body.replace(b'"complete"', b'"partial"')
            return (
                response._replace(body=body) if request.method == "POST" else response
            )

        with self.answering(hide_the_end):
            methods = self.upload()
        self.assertEqual(methods, ["GET"] + ["POST"] * 4 + ["GET"])

    def test_a_passing_503_is_told_with_its_sentence_and_tried_again(self) -> None:
        error = {"success": False, "error": "The disk is away for a moment."}

        def unwell(request: Any, call: int, really: Any) -> Any:
            if call not in (2, 3, 4):
                return really()
            return answer(request, 503, error, retry_after="4")

        with self.answering(unwell):
            self.upload(r"The disk is away for a moment, trying again in [34] s")

    def test_a_login_page_is_not_taken_for_an_answer(self) -> None:
        def proxy(request: Any, call: int, really: Any) -> Any:
            if call > 2:
                return really()
            return answer(request, 200, b"<!doctype html>Log in")

        with self.answering(proxy):
            self.upload(r"This answer is not from flowserver, trying again in \d s")

    def test_who_must_log_in_again_is_not_asked_for_each_file(self) -> None:
        error = {"success": False, "error": "A name and a password are needed here."}
        logged_in = threading.Event()

        def closed(request: Any, call: int, really: Any) -> Any:
            return really() if logged_in.is_set() else answer(request, 401, error)

        with self.answering(closed):
            files = {f"{n:02}.txt": b"%d" % n for n in range(40)}
            self.choose(*self.files(files))
            self.wait(lambda: "40 failed" in self.all_words(), "the end of all")
            self.assertEqual({words for _, words in self.rows()}, {error["error"]})
            self.assertLessEqual(len(self.requests()), 3)
            logged_in.set()
            self.press_all("retry-failed")
            self.wait_until_done()

    def test_a_link_that_swallows_a_chunk_and_takes_its_time_gets_it(self) -> None:
        """A tunnel: all is gone from the browser at once, the answer comes late."""

        def late(request: Any, call: int, really: Any) -> Any:
            if request.method == "POST":
                time.sleep(2)
            return really()

        with self.answering(late):
            BROWSER.run(  # a minute and a half is a second and a half
                "const {set} = Object.getOwnPropertyDescriptor("
                "  XMLHttpRequest.prototype, 'timeout');"
                "Object.defineProperty(XMLHttpRequest.prototype, 'timeout',"
                "  {set(value) { set.call(this, value / 60); }})"
            )
            self.upload()
            self.assertGreaterEqual(self.accepted(), 1, "an answer was waited for")

    def test_many_files_in_trouble_do_not_hold_up_the_others(self) -> None:
        """Their folder may not be written to, say; the server itself is well."""

        def sick_of_some(request: Any, call: int, really: Any) -> Any:
            if "sick" not in request.query:
                return really()
            error = {"success": False, "error": "Not now."}
            return answer(request, 503, error, retry_after="2")

        with self.answering(sick_of_some):
            names = [f"sick {n}.bin" for n in range(4)] + ["well.bin"]
            self.choose(*self.files({name: noise(KIB, 1) for name in names}))
            self.wait_for_words("well.bin", "Finished")
            self.assertLess(len(self.requests()), 12)

    def test_one_file_in_trouble_does_not_hold_up_the_others(self) -> None:
        well = threading.Event()

        def sick_of_one(request: Any, call: int, really: Any) -> Any:
            if "sick.bin" not in request.query or well.is_set():
                return really()
            return answer(request, 503, {"success": False, "error": "Not now."})

        with self.answering(sick_of_one):
            names = ["sick.bin", "one.bin", "two.bin", "three.bin"]
            self.choose(*self.files({name: noise(MIB, 1) for name in names}))
            for name in names[1:]:
                self.wait_for_words(name, "Finished")
            self.assertNotEqual(self.words("sick.bin"), "Finished")
            well.set()
            self.wait_until_done()


class AccessibilityTest(PageCase):
    def tearDown(self) -> None:
        BROWSER.devtools("Emulation.clearDeviceMetricsOverride")
        BROWSER.devtools("Emulation.setEmulatedMedia", features=[])

    def show(self, width: int, scheme: str) -> None:
        BROWSER.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
        BROWSER.devtools("Emulation.setEmulatedMedia", features=[scheme_feature])

    def assert_accessible(self, state: str) -> None:
        for width in (1280, 390):
            for scheme in ("light", "dark"):
                with self.subTest(state, width=width, scheme=scheme):
                    self.show(width, scheme)
                    self.assertEqual(self.violations(), [])

    def violations(self) -> list[str]:
        if not BROWSER.run("return typeof axe === 'object'"):
            BROWSER.run(AXE.read_text() + "; window.axe = axe;")
        found = BROWSER.run("return axe.run(document)")
        self.assertGreater(len(found["passes"]), 15, "axe has looked at the page")
        return [
            f"{one['id']}: {node['html']}"
            for one in found["violations"]
            for node in one["nodes"]
        ]

    def test_axe_finds_nothing_in_any_state(self) -> None:
        self.serve("--chunk-size", "256k", "--max-file-size", "8M")
        self.assert_accessible("idle")
        BROWSER.network(upload_bytes_per_second=256 * KIB)
        files = {"small.txt": b"x", "long.bin": noise(6 * MIB, 1), "next.bin": b"y"}
        self.choose(*self.files({**files, "large.bin": noise(9 * MIB, 1)}))
        self.wait_for_accepted(2)
        self.assert_accessible("running")
        self.press("Pause", "long.bin")
        self.assert_accessible("paused")
        BROWSER.network()
        self.press("Resume", "long.bin")
        self.wait_for_words("long.bin", "Finished")
        self.assert_accessible("finished and failed")
        BROWSER.network(upload_bytes_per_second=SLOW)  # else it may be there by then
        self.choose(*self.files({"other.bin": noise(8 * MIB, 2)}))
        self.server.kill()
        self.wait(lambda: "trying again" in self.all_words(), "trouble")
        self.assert_accessible("lost")

    def test_no_width_and_no_zoom_makes_it_scroll_sideways(self) -> None:
        self.serve()
        name = "averylongnamewithoutanyblank" * 6 + ".bin"
        self.choose(*self.files({name: b"x", "Grüße mit vielen Worten.txt": b"y"}))
        self.wait_until_done()
        # 640 and 320 are 1280 and 640 at a zoom of 200 %.
        for width in (1280, 640, 390, 320):
            self.show(width, "light")
            cut = BROWSER.run(
                "const parts = [...document.querySelectorAll('html, #list p, #all p')];"
                "return parts.filter(one => one.scrollWidth > one.clientWidth)"
                ".map(one => one.textContent)"
            )
            self.assertEqual(cut, [], width)

    def test_nothing_moves_while_the_bars_do(self) -> None:
        self.assert_nothing_moves(1280)

    def test_nothing_moves_on_a_phone_either(self) -> None:
        self.assert_nothing_moves(390)

    def assert_nothing_moves(self, width: int) -> None:
        self.serve("--chunk-size", "256k")
        self.show(width, "light")
        BROWSER.network(upload_bytes_per_second=SLOW)
        files = {"long.bin": noise(3 * MIB, 1), "next.bin": noise(2 * MIB, 2)}
        self.choose(*self.files(files))
        self.wait_for_accepted(1)
        self.wait(BROWSER.find("#pause-all").displayed, "the panel of all files")
        BROWSER.run(SHIFT_WATCH)
        self.wait_for_words("long.bin", "Finished")
        self.assertEqual(BROWSER.run("return shifts"), [])
        BROWSER.network()
        self.wait_until_done()

    def test_the_keyboard_is_enough(self) -> None:
        self.serve("--chunk-size", "256k")
        BROWSER.press(TAB)
        self.assertEqual(self.focused(), "Choose files")
        BROWSER.press(TAB)
        self.assertEqual(self.focused(), "Choose a folder")
        BROWSER.network(upload_bytes_per_second=SLOW)
        self.choose(*self.files({"long.bin": noise(16 * MIB, 1), "next.bin": b"x"}))
        self.wait_for_accepted(1)
        self.wait(BROWSER.find("#pause-all").displayed, "the panel of all files")
        BROWSER.run("document.querySelector('#choose-folder').focus()")
        BROWSER.press(TAB)
        self.assertEqual(self.focused(), "Pause all")
        for _ in range(4):
            if self.focused() == "Pause long.bin":
                break
            BROWSER.press(TAB)
        BROWSER.press(ENTER)
        self.assertEqual(self.words("long.bin"), "Paused")
        self.assertEqual(self.focused(), "Resume long.bin", "the focus stays")
        BROWSER.press(SPACE)
        self.assertNotEqual(self.words("long.bin"), "Paused")
        BROWSER.network()
        self.wait_until_done()
        self.assertEqual(self.focused(), "Remove long.bin", "never on a hidden button")
        BROWSER.press(ENTER)
        self.assertEqual(self.focused(), "Remove next.bin")
        BROWSER.press(ENTER)
        self.assertEqual(self.focused(), "Choose files")

    def focused(self) -> str:
        return str(
            BROWSER.run(
                "const one = document.activeElement;"
                "return one.getAttribute('aria-label') || one.textContent"
            )
        )

    def test_screen_readers_are_told_names_roles_and_news(self) -> None:
        self.serve()
        self.choose(*self.files({"one.txt": b"x"}))
        self.wait_until_done()
        self.assertEqual(BROWSER.find("#news").role(), "status")
        self.wait(lambda: self.news() == "one.txt added. one.txt: Finished", "the news")
        bar = BROWSER.find("#list progress")
        self.assertEqual(
            (bar.role(), bar.label()), ("progressbar", "Progress of one.txt")
        )
        self.assertEqual(BROWSER.find("#all progress").label(), "All files")
        self.assertEqual(BROWSER.find("#list").role(), "list")
        self.assertEqual(BROWSER.find("#list li").role(), "listitem")


class PageTextTest(PageCase):
    def test_the_page_is_one_strict_file(self) -> None:
        self.serve()
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port)
        with contextlib.closing(connection):
            connection.request("GET", "/")
            response = connection.getresponse()
            text = response.read().decode()
        policy = response.headers["Content-Security-Policy"]
        nonces = set(re.findall(r'nonce="([^"]+)"', text))
        self.assertEqual(len(nonces), 1)
        self.assertIn(f"script-src 'nonce-{nonces.pop()}'", policy)
        self.assertIn("default-src 'none'", policy)
        self.assertNotIn("unsafe", policy)
        self.assertEqual(response.headers["X-Content-Type-Options"], "nosniff")
        self.assertEqual(response.headers["Referrer-Policy"], "same-origin")
        self.assertIn("frame-ancestors 'none'", policy)
        self.assertNotRegex(text, r"<[^>]+ on\w+=")
        self.assertNotRegex(text, r"<[^>]+ style=")
        self.assertLessEqual(len(text.splitlines()), 500)

    def test_it_works_where_nothing_may_be_stored(self) -> None:
        self.serve()
        identifier = BROWSER.devtools(
            "Page.addScriptToEvaluateOnNewDocument",
            source="Object.defineProperty(window, 'localStorage',"
            " {get() { throw new DOMException('denied', 'SecurityError'); }});",
        )["identifier"]
        self.addCleanup(
            BROWSER.devtools,
            "Page.removeScriptToEvaluateOnNewDocument",
            identifier=identifier,
        )
        BROWSER.reload()
        content = noise(MIB + 1, 1)
        self.choose(*self.files({"private.bin": content}))
        self.wait_until_done()
        self.assert_on_disk({"private.bin": content})


if __name__ == "__main__":
    unittest.main()
