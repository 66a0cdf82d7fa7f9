"""Real flow.js and real resumable.js in a real browser against the real server.

Each row of MODES is one way an integrator may configure the library. For each, the
server is started as its user starts it, the files are chosen in an <input>, and what
lies on the disk afterwards is compared byte for byte.

FLOWSERVER_FILE names another flowserver.py, to see these tests fail on a broken one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from browser import Browser

HERE = Path(__file__).resolve().parent
SERVER = Path(os.environ.get("FLOWSERVER_FILE") or HERE.parent / "flowserver.py")
MODULES = HERE / ".tools" / "node_modules"
LIBRARIES = {
    "flow": MODULES / "@flowjs" / "flow.js" / "dist" / "flow.js",
    "resumable": MODULES / "resumablejs" / "resumable.js",
}
VERSIONS = {
    "flow": (MODULES / "@flowjs" / "flow.js" / "package.json", "2.14.1"),
    "resumable": (MODULES / "resumablejs" / "package.json", "1.1.0"),
}

KIB = 1024
MIB = 1024 * KIB

# What both libraries call their default.
CHUNK_SIZE = MIB


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


# One name holds what a careless decoder of queries or of multipart headers breaks on.
FILES = {
    "three chunks.bin": noise(3 * MIB + 17, seed=1),
    "a+b & c=d; 100%25.bin": noise(2 * MIB, seed=2),
    "Grüße 日本 🎈.txt": noise(1500, seed=3),
    "empty.txt": b"",
}

FOLDER = {
    "album/cover.bin": noise(70_000, seed=4),
    "album/2026/Süden/long.bin": noise(2 * MIB + 5, seed=5),
    "album/2026/cover.bin": noise(70_000, seed=6),
    "album/2026/empty.txt": b"",
}

# Text fields of the page's own; some bear the names that other libraries use.
QUERY = {"token": "ä+b&c=d", "name": "x.bin", "chunk": "7", "identifier": "q", "n": 3}


class Mode(NamedTuple):
    """One way to configure a library, and how its requests then look."""

    name: str
    options: Mapping[str, Any] = {}
    server_flags: tuple[str, ...] = ()
    method: str = "POST"
    test_method: str | None = "GET"
    multipart: bool = True
    forced_size: bool = False
    prefix: str = ""

    @property
    def chunk_size(self) -> int:
        return int(self.options.get("chunkSize", CHUNK_SIZE))

    @property
    def one_by_one(self) -> bool:
        return self.options.get("simultaneousUploads") == 1


# What both libraries understand.
COMMON_MODES = [
    Mode("octet", {"method": "octet"}, multipart=False),
    Mode("put", {"uploadMethod": "PUT"}, method="PUT"),
    Mode("patch", {"uploadMethod": "PATCH"}, method="PATCH"),
    Mode(
        "octet put",
        {"method": "octet", "uploadMethod": "PUT"},
        method="PUT",
        multipart=False,
    ),
    Mode("no tests", {"testChunks": False}, test_method=None),
    Mode(
        "octet, no tests",
        {"method": "octet", "testChunks": False},
        test_method=None,
        multipart=False,
    ),
    # Multipart flow.js puts a HEAD's parameters into a body, which browsers drop: the
    # server is asked without any parameter.
    Mode("test by head", {"testMethod": "HEAD"}, test_method="HEAD"),
    Mode("forced chunk size", {"forceChunkSize": True}, forced_size=True),
    Mode(
        "octet, forced chunk size",
        {"method": "octet", "forceChunkSize": True},
        multipart=False,
        forced_size=True,
    ),
    Mode("one chunk at a time", {"simultaneousUploads": 1}),
    Mode("small chunks, six at once", {"simultaneousUploads": 6, "chunkSize": 100_000}),
    Mode("chunks larger than the files", {"chunkSize": 16 * MIB}),
    Mode("query", {"query": QUERY}),
    Mode("query, octet", {"query": QUERY, "method": "octet"}, multipart=False),
    Mode("another file field", {"fileParameterName": "data"}),
    Mode("first and last chunk first", {"prioritizeFirstAndLastChunk": True}),
    Mode(
        "everything at once",
        {
            "method": "octet",
            "uploadMethod": "PUT",
            "testChunks": False,
            "forceChunkSize": True,
            "simultaneousUploads": 5,
            "chunkSize": 300_001,
            "query": QUERY,
        },
        method="PUT",
        test_method=None,
        multipart=False,
        forced_size=True,
    ),
]

FLOW_MODES = [Mode("defaults"), *COMMON_MODES]

# resumable.js refuses empty files unless it is told otherwise.
EMPTY_TOO = {"minFileSize": 0}
NAMESPACE = "my-"
NAMESPACE_FLAGS = ("--parameter-prefix", NAMESPACE)
RESUMABLE_MODES = [
    Mode("defaults"),
    Mode("defaults and empty files", EMPTY_TOO),
    *(mode._replace(options={**mode.options, **EMPTY_TOO}) for mode in COMMON_MODES),
    Mode(
        "namespace",
        {"parameterNamespace": NAMESPACE, **EMPTY_TOO},
        NAMESPACE_FLAGS,
        prefix=NAMESPACE,
    ),
    Mode(
        "namespace, octet, query",
        {
            "parameterNamespace": NAMESPACE,
            "method": "octet",
            "query": QUERY,
            **EMPTY_TOO,
        },
        NAMESPACE_FLAGS,
        multipart=False,
        prefix=NAMESPACE,
    ),
    Mode("type of the file", {"setChunkTypeFromFile": True, **EMPTY_TOO}),
]

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>test page</title>
<input id="files" type="file" multiple>
<input id="folder" type="file" webkitdirectory>
<input id="plain" type="file" multiple>
<script src="flow.js"></script>
<script src="resumable.js"></script>
<script src="page.js"></script>
"""

# The page writes down every request as it begins and as it ends, and every event that
# the library tells its user.
PAGE_SCRIPT = """'use strict';
var requests = [], finished = [], failed = [], uploader;

function parameter(entries, ending) {
  var found = entries.filter(function (one) { return one[0].endsWith(ending); });
  return found.length ? found[0][1] : null;
}

function watch(proto) {
  var open = proto.open, send = proto.send;
  proto.open = function (method, url) {
    this.told = {method: method, url: url, status: null, answer: null};
    return open.apply(this, arguments);
  };
  proto.send = function (body) {
    var told = this.told, form = body instanceof FormData;
    var entries = Array.from(new URL(told.url, location.href).searchParams);
    told.multipart = form;
    told.size = body instanceof Blob ? body.size : null;
    if (form) {
      Array.from(body).forEach(function (one) {
        if (one[1] instanceof Blob) {
          told.field = one[0];
          told.size = one[1].size;
        } else {
          entries.push(one);
        }
      });
    }
    told.names = entries.map(function (one) { return one[0]; });
    told.file = parameter(entries, 'RelativePath');
    told.number = Number(parameter(entries, 'ChunkNumber'));
    told.total = Number(parameter(entries, 'TotalChunks'));
    requests.push(told);
    // Before 'load': there resumable.js calls abort(), which wipes the answer.
    this.addEventListener('readystatechange', function () {
      if (this.readyState !== 4) return;
      told.status = this.status;
      told.answer = this.responseText;
    });
    return send.apply(this, arguments);
  };
}
watch(XMLHttpRequest.prototype);

function begin(library, options, input) {
  options.target = '/upload';
  var own = library === 'flow' ? new Flow(options) : new Resumable(options);
  own.assignBrowse(document.getElementById(input));
  own.assignBrowse(document.getElementById('folder'), true);
  own.on(library === 'flow' ? 'filesSubmitted' : 'filesAdded', function () {
    own.upload();
  });
  own.on('fileSuccess', function (file, message) {
    finished.push({file: file.relativePath, message: message});
  });
  own.on('fileError', function (file, message) {
    failed.push({file: file.relativePath, message: message});
  });
  uploader = own;
}

function pauseAndGoOn() {
  uploader.pause();
  // resumable.js has no resume().
  uploader.resume ? uploader.resume() : uploader.upload();
}

// resumable.js makes each chunk of a file in a timer. Here a second file comes while
// the first is under way, and the page is so busy that one timer runs for each answer.
function addSecondFileLate() {
  var file = document.getElementById('plain').files[0], added = false, waiting = [];
  function later(call) {
    waiting.push(call);
  }
  function runOne() {
    var call = waiting.shift();
    if (call) call();
  }
  uploader.on('fileProgress', function () {
    if (added) return;
    added = true;
    var real = window.setTimeout, send = XMLHttpRequest.prototype.send;
    window.setTimeout = function (call, delay) {
      return delay ? real(call, delay) : later(call);
    };
    XMLHttpRequest.prototype.send = function () {
      this.addEventListener('readystatechange', function () {
        if (this.readyState === 4) runOne();
      });
      return send.apply(this, arguments);
    };
    uploader.addFile(file);
    // When no answer is awaited any more, nothing else would run the rest.
    window.setInterval(function () {
      var busy = requests.some(function (one) { return one.status === null; });
      while (!busy && waiting.length) runOne();
    }, 20);
  });
}

// As a page does that walks through a dropped folder by itself.
function addWithPath(path) {
  var file = document.getElementById('plain').files[0];
  file.relativePath = path;
  uploader.addFile(file);
}
"""

BROWSER: Browser


def setUpModule() -> None:
    """One browser for all tests. Without it everything fails, nothing is skipped."""
    global BROWSER
    check_the_libraries()
    BROWSER = Browser()
    unittest.addModuleCleanup(BROWSER.close)


def check_the_libraries() -> None:
    for name, (manifest, version) in VERSIONS.items():
        if not manifest.is_file():
            raise AssertionError(f"{name} is not installed: run .ci/run, which does it")
        if json.loads(manifest.read_text())["version"] != version:
            raise AssertionError(f"{name} is not version {version}")


class Server:
    """flowserver.py, copied alone into an empty folder and started there."""

    def __init__(self, folder: Path, pages: Path, flags: tuple[str, ...]) -> None:
        self.folder = folder
        self.log = folder.with_name("log")
        self.upload_dir = folder / "uploads"
        shutil.copy(SERVER, folder / "flowserver.py")
        self._start(pages, flags)

    def _start(self, pages: Path, flags: tuple[str, ...]) -> None:
        command = [sys.executable, "flowserver.py", "--port", "0"]
        environment = dict(os.environ)
        environment.pop("FLOWSERVER_CONFIG", None)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*command, "--sample-dir", str(pages), *flags],
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
            found = re.search(r"http://127\.0\.0\.1:\d+/", line)
            if found:
                return found[0]
        self.process.wait()
        raise AssertionError(f"the server did not start: {self.log_text()}")

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
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

    def kept_for_itself(self) -> list[Path]:
        return list(self.upload_dir.glob(".flowserver/**/*"))


def write_files(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    paths = []
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        paths.append(path)
    return paths


def chunk_sizes(size: int, mode: Mode) -> list[int]:
    """The sizes that the library's documentation promises, worked out anew."""
    if mode.forced_size:
        count = max(-(-size // mode.chunk_size), 1)
    else:
        count = max(size // mode.chunk_size, 1)
    return [mode.chunk_size] * (count - 1) + [size - mode.chunk_size * (count - 1)]


class LibraryCase(unittest.TestCase):
    """What the tests of both libraries need."""

    @contextlib.contextmanager
    def served(self, *flags: str) -> Iterator[Server]:
        with tempfile.TemporaryDirectory(prefix="flowserver-ci-") as name:
            pages, folder = Path(name, "pages"), Path(name, "alone")
            pages.mkdir()
            folder.mkdir()
            (pages / "page.html").write_text(PAGE)
            (pages / "page.js").write_text(PAGE_SCRIPT)
            for library, source in LIBRARIES.items():
                shutil.copy(source, pages / f"{library}.js")
            server = Server(folder, pages, flags)
            try:
                yield server
            except BaseException:
                self.tell(server)
                server.stop()
                raise
            self.assertEqual(server.stop(), 0, "SIGTERM ends the server with exit 0")
            self.assertNotIn("Traceback", server.log_text())

    def tell(self, server: Server) -> None:
        """On a failure, what page, browser and server had to say."""
        with contextlib.suppress(Exception):
            for line in BROWSER.console():
                print("console:", line, file=sys.stderr)
            print("failed:", BROWSER.run("return failed"), file=sys.stderr)
        print("server's log:", server.log_text()[-2000:], sep="\n", file=sys.stderr)

    def begin(self, server: Server, library: str, options: Mapping[str, Any]) -> None:
        BROWSER.open(server.url + "sample/page.html")
        self.begin_another(library, options, "files")

    def begin_another(
        self, library: str, options: Mapping[str, Any], choose_with: str
    ) -> None:
        script = "begin(arguments[0], arguments[1], arguments[2])"
        BROWSER.run(script, library, dict(options), choose_with)

    def wait_until_ended(self, count: int) -> None:
        """Every file has either been finished or been given up."""
        BROWSER.wait_for(
            f"return finished.length + failed.length >= {count}",
            seconds=120,
            what=f"the end of {count} uploads",
        )
        self.assertEqual(BROWSER.run("return failed"), [])

    def upload(self, paths: list[Path]) -> None:
        BROWSER.set_files("#files", paths)
        self.wait_until_ended(len(paths))

    def assert_uploaded(self, server: Server, files: Mapping[str, bytes]) -> None:
        """These files, whole, and nothing else anywhere."""
        stored = server.finished_files()
        self.assertEqual(sorted(stored), sorted(files))
        for name, content in files.items():
            self.assertTrue(stored[name] == content, f"{name} differs")
        self.assert_no_data_left(server)
        self.assertEqual(
            sorted(os.listdir(server.folder)), ["flowserver.py", "uploads"]
        )

    def assert_no_data_left(self, server: Server) -> None:
        kept = [path for path in server.kept_for_itself() if path.is_file()]
        data = [path.name for path in kept if path.suffix in (".data", ".part")]
        self.assertEqual(data, [])
        # Whatever it is called: receipts are a few lines, an upload is not.
        self.assertLess(sum(path.stat().st_size for path in kept), 64 * KIB)

    def assert_told(self, files: Mapping[str, bytes], mode: Mode) -> None:
        """fileSuccess came once for each file, with the server's JSON."""
        told = BROWSER.run("return finished")
        self.assertEqual(sorted(one["file"] for one in told), sorted(files))
        for one in told:
            answer = json.loads(one["message"])
            self.assertIs(answer["success"], True)
            chunks = len(chunk_sizes(len(files[one["file"]]), mode))
            # Of several answers under way at once, the one that completed the file
            # need not be the last one to reach the page.
            if mode.one_by_one or chunks == 1:
                self.assertEqual(answer["status"], "complete")
        self.assert_completions(files)

    def assert_completions(self, files: Mapping[str, bytes]) -> None:
        """Each file was called complete, and always under the same name."""
        completed = set()
        for one in BROWSER.run("return requests"):
            answer = json.loads(one["answer"] or "{}")
            if one["size"] is not None and answer.get("status") == "complete":
                completed.add(one["file"])
                self.assertEqual(answer["path"], one["file"])
                self.assertEqual(answer["filename"], one["file"].rpartition("/")[2])
                self.assertEqual(answer["size"], len(files[one["file"]]))
        self.assertEqual(completed, set(files))

    def assert_mode_was_real(self, files: Mapping[str, bytes], mode: Mode) -> None:
        """The requests were the ones this mode is meant to make, and no others."""
        requests = BROWSER.run("return requests")
        chunks = [one for one in requests if one["size"] is not None]
        tests = [one for one in requests if one["size"] is None]
        expected = sorted(
            (name, number, size)
            for name, content in files.items()
            for number, size in enumerate(chunk_sizes(len(content), mode), 1)
        )
        travelled = [(one["file"], one["number"], one["size"]) for one in chunks]
        self.assertEqual(sorted(travelled), expected)
        self.assertEqual({one["status"] for one in chunks}, {200})
        self.assertEqual({one["method"] for one in chunks}, {mode.method})
        self.assertEqual({one["multipart"] for one in chunks}, {mode.multipart})
        self.assertEqual(len(tests), len(chunks) if mode.test_method else 0)
        self.assertLessEqual({one["method"] for one in tests}, {mode.test_method})
        self.assertLessEqual({one["status"] for one in tests}, {204})
        self.assert_fields(chunks, mode)

    def assert_fields(self, chunks: list[dict[str, Any]], mode: Mode) -> None:
        field = mode.prefix + str(mode.options.get("fileParameterName", "file"))
        for one in chunks:
            self.assertEqual(one.get("field"), field if mode.multipart else None)
            for name in mode.options.get("query", {}):
                self.assertIn(mode.prefix + name, one["names"])
            if mode.prefix:
                self.assertTrue(all(n.startswith(mode.prefix) for n in one["names"]))

    def check_mode(self, library: str, mode: Mode, files: Mapping[str, bytes]) -> None:
        with self.served(*mode.server_flags) as server:
            paths = write_files(server.folder.with_name("files"), files)
            self.begin(server, library, mode.options)
            self.upload(paths)
            self.assert_mode_was_real(files, mode)
            self.assert_told(files, mode)
            self.assert_uploaded(server, files)

    def check_folder(self, library: str, options: Mapping[str, Any]) -> None:
        with self.served() as server:
            source = server.folder.with_name("files")
            write_files(source, FOLDER)
            self.begin(server, library, options)
            BROWSER.set_files("#folder", [source / "album"])
            self.wait_until_ended(len(FOLDER))
            self.assert_told(FOLDER, Mode("folder", options))
            self.assert_uploaded(server, FOLDER)

    def check_added_file(self, library: str, options: Mapping[str, Any]) -> None:
        path, content = "dropped/deep/Näme.bin", noise(2 * MIB + 99, seed=7)
        with self.served() as server:
            [source] = write_files(server.folder.with_name("files"), {"x": content})
            self.begin(server, library, options)
            BROWSER.set_files("#plain", [source])
            # The path's last component is what the server calls the file.
            BROWSER.run("addWithPath(arguments[0])", path)
            self.wait_until_ended(1)
            self.assertEqual(BROWSER.run("return finished")[0]["file"], path)
            self.assert_uploaded(server, {path: content})

    # Resuming

    def interrupt(self, server: Server, library: str, source: Path) -> set[int]:
        """Begin an upload and leave the page while bodies are on their way.

        The numbers of the chunks that were answered 200 are returned.
        """
        self.begin(server, library, {})
        BROWSER.network(upload_bytes_per_second=MIB)
        try:
            BROWSER.set_files("#files", [source])
            BROWSER.wait_for(
                "return requests.filter(r => r.size && r.status === 200).length >= 3"
            )
            stored = BROWSER.run(
                "return requests.filter(r => r.size && r.status === 200)"
                ".map(r => r.number)"
            )
            BROWSER.reload()
        finally:
            BROWSER.network()
        return set(stored)

    def check_resume(
        self, begun_with: str, ended_with: str, options: Mapping[str, Any]
    ) -> None:
        name, content = "long film.bin", noise(9 * MIB + 17, seed=8)
        with self.served() as server:
            [source] = write_files(server.folder.with_name("files"), {name: content})
            stored = self.interrupt(server, begun_with, source)
            self.assertEqual(server.finished_files(), {}, "nothing before the end")
            self.begin(server, ended_with, options)
            self.upload([source])
            self.assert_resumed(stored, chunks=9)
            self.assert_uploaded(server, {name: content})

    def assert_resumed(self, stored: set[int], chunks: int) -> None:
        """What was acknowledged is known again, and only the rest travelled.

        The first chunk and the last one stored are asked for once more, as samples.
        """
        requests = BROWSER.run("return requests")
        tests = [one for one in requests if one["size"] is None]
        self.assertEqual({one["status"] for one in tests}, {200, 204})
        known = {one["number"] for one in tests if one["status"] == 200}
        travelled = [one["number"] for one in requests if one["size"] is not None]
        self.assertLessEqual(stored - {1, max(stored)}, known)
        self.assertNotIn(1, known)
        self.assertEqual(sorted(travelled), sorted(set(range(1, chunks + 1)) - known))

    def check_late_answer(self, library: str) -> None:
        """All chunks one by one: what completes the file is what the page is told."""
        files = {"x.bin": noise(4 * MIB, seed=9)}
        self.check_mode(library, Mode("late", {"simultaneousUploads": 1}), files)

    def check_pauses(self, library: str) -> None:
        """A pause cuts the bodies under way; the same chunks are sent once more."""
        name, content = "paused.bin", noise(9 * MIB + 3, seed=17)
        with self.served() as server:
            [source] = write_files(server.folder.with_name("files"), {name: content})
            self.begin(server, library, {})
            BROWSER.network(upload_bytes_per_second=MIB)
            try:
                BROWSER.set_files("#files", [source])
                for answered in range(1, 4):
                    BROWSER.wait_for(
                        "return requests.filter(r => r.size && r.status === 200)"
                        f".length >= {answered}"
                    )
                    BROWSER.run("pauseAndGoOn()")
            finally:
                BROWSER.network()
            self.wait_until_ended(1)
            cut = "return requests.filter(r => r.size && r.status !== 200).length"
            self.assertGreater(BROWSER.run(cut), 0, "no body was cut")
            self.assert_uploaded(server, {name: content})

    # The same name again

    def check_twice_at_once(self, library: str) -> None:
        name, content = "twice.bin", noise(5 * MIB + 3, seed=18)
        with self.served() as server:
            [source] = write_files(server.folder.with_name("files"), {name: content})
            self.begin(server, library, {})
            self.begin_another(library, {}, "plain")
            BROWSER.set_files("#files", [source])
            BROWSER.set_files("#plain", [source])
            self.wait_until_ended(2)
            self.assert_uploaded(server, {name: content})

    def check_again(self, library: str, first: bytes, second: bytes) -> list[bytes]:
        """Upload two versions under one name from two visits; what is stored then."""
        with self.served() as server:
            source = server.folder.with_name("files") / "same.bin"
            for content in (first, second):
                write_files(source.parent, {source.name: content})
                self.begin(server, library, {})
                self.upload([source])
            stored = server.finished_files()
            self.assertTrue(stored.pop("same.bin") == first, "the first is untouched")
            self.assert_no_data_left(server)
            return list(stored.values())

    def check_both_names(self, library: str) -> None:
        """The libraries' own identifier is the same for both names."""
        files = {"日本.txt": noise(MIB, seed=10), "中国.txt": noise(MIB, seed=11)}
        with self.served() as server:
            paths = write_files(server.folder.with_name("files"), files)
            for path in paths:
                self.begin(server, library, {})
                self.upload([path])
            self.assert_uploaded(server, files)


class FlowTest(LibraryCase):
    """flow.js 2.14.1"""

    def test_every_mode_uploads_every_file_whole(self) -> None:
        for mode in FLOW_MODES:
            with self.subTest(mode.name):
                self.check_mode("flow", mode, FILES)

    def test_the_page_is_told_that_the_file_is_complete(self) -> None:
        self.check_late_answer("flow")

    def test_a_chosen_folder_keeps_its_paths(self) -> None:
        self.check_folder("flow", {})

    def test_a_file_added_with_a_path_keeps_it(self) -> None:
        for method in ("multipart", "octet"):
            with self.subTest(method):
                self.check_added_file("flow", {"method": method})

    def test_a_reloaded_page_resumes(self) -> None:
        self.check_resume("flow", "flow", {})

    def test_an_upload_begun_by_resumable_is_finished_by_flow(self) -> None:
        self.check_resume("resumable", "flow", {"method": "octet"})

    def test_the_same_file_again_makes_no_second_copy(self) -> None:
        content = noise(3 * MIB, seed=12)
        self.assertTrue(self.check_again("flow", content, content) == [])

    def test_a_changed_file_of_the_same_name_and_size_is_kept_beside(self) -> None:
        first, second = noise(3 * MIB, seed=13), noise(3 * MIB, seed=14)
        self.assertTrue(self.check_again("flow", first, second) == [second])

    def test_two_names_with_one_identifier_both_arrive(self) -> None:
        self.check_both_names("flow")

    def test_a_paused_upload_goes_on(self) -> None:
        self.check_pauses("flow")

    def test_one_file_sent_twice_at_once_is_stored_once(self) -> None:
        self.check_twice_at_once("flow")


class ResumableTest(LibraryCase):
    """resumable.js 1.1.0"""

    def test_every_mode_uploads_every_file_whole(self) -> None:
        for mode in RESUMABLE_MODES:
            with self.subTest(mode.name):
                refuses = mode.options.get("minFileSize") is None
                files = {n: c for n, c in FILES.items() if c or not refuses}
                self.check_mode("resumable", mode, files)

    def test_the_page_is_told_that_the_file_is_complete(self) -> None:
        self.check_late_answer("resumable")

    def test_a_chosen_folder_keeps_its_paths(self) -> None:
        self.check_folder("resumable", EMPTY_TOO)

    def test_a_file_added_with_a_path_keeps_it(self) -> None:
        for method in ("multipart", "octet"):
            with self.subTest(method):
                self.check_added_file("resumable", {"method": method})

    def test_a_reloaded_page_resumes(self) -> None:
        self.check_resume("resumable", "resumable", {})

    def test_an_upload_begun_by_flow_is_finished_by_resumable(self) -> None:
        self.check_resume("flow", "resumable", {"method": "octet"})

    def test_the_same_file_again_makes_no_second_copy(self) -> None:
        content = noise(3 * MIB, seed=12)
        self.assertTrue(self.check_again("resumable", content, content) == [])

    def test_a_changed_file_of_the_same_name_and_size_is_kept_beside(self) -> None:
        first, second = noise(3 * MIB, seed=13), noise(3 * MIB, seed=14)
        self.assertTrue(self.check_again("resumable", first, second) == [second])

    def test_two_names_with_one_identifier_both_arrive(self) -> None:
        self.check_both_names("resumable")

    def test_a_paused_upload_goes_on(self) -> None:
        self.check_pauses("resumable")

    def test_one_file_sent_twice_at_once_is_stored_once(self) -> None:
        self.check_twice_at_once("resumable")

    def test_a_wrong_count_of_chunks_does_no_harm(self) -> None:
        # It announces as many chunks as it has made until then, and calls the file
        # finished when those have been sent: so ask the requests, not the events.
        files = {"a.bin": noise(100_000, seed=15), "b.bin": noise(600_000, seed=16)}
        mode = Mode("late", {"chunkSize": 10_000})
        with self.served() as server:
            first, second = write_files(server.folder.with_name("files"), files)
            self.begin(server, "resumable", mode.options)
            BROWSER.set_files("#plain", [second])
            BROWSER.run("addSecondFileLate()")
            BROWSER.set_files("#files", [first])
            BROWSER.wait_for(
                "return requests.filter(r => r.size && r.status === 200).length === 70"
            )
            self.assertEqual(BROWSER.run("return failed"), [])
            self.assert_counts_were_wrong()
            self.assert_mode_was_real(files, mode)
            self.assert_uploaded(server, files)

    def assert_counts_were_wrong(self) -> None:
        sent = [r for r in BROWSER.run("return requests") if r["size"] is not None]
        totals = {one["total"] for one in sent if one["file"] == "b.bin"}
        self.assertGreater(len(totals), 1, f"one count only: {totals}")


if __name__ == "__main__":
    unittest.main()
