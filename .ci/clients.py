"""What the tests of real client libraries share: their pages, and a network that fails.

The libraries are those that .ci/run installs from package.json. What is written for
bundlers is bundled by esbuild when the tests begin, into a temporary folder.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import unittest
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from browser import Browser
from test_page import KIB, MIB, Server, noise, write_files

HERE = Path(__file__).resolve().parent
MODULES = HERE / ".tools" / "node_modules"

CHUNK = 256 * KIB
BIG = "three MiB + 17; 100%25.bin"
FILES = {
    BIG: noise(3 * MIB + 17, seed=1),
    "two chunks.bin": noise(2 * CHUNK, seed=2),
    "Grüße 日本 🎈.txt": noise(1500, seed=3),
    "empty.txt": b"",
}

# The scripts of each library's page, as its README has them.
SCRIPTS = {
    "simple": ("simple-uploader.js/dist/uploader.js",),
    "dropzone": ("dropzone/dist/dropzone-min.js",),
    "dropzone5": ("dropzone5/dist/dropzone.js",),
    "fine": ("fine-uploader/fine-uploader/fine-uploader.core.js",),
    "plupload": ("plupload/js/plupload.full.min.js",),
    "blueimp": (
        "jquery/dist/jquery.js",
        "blueimp-file-upload/js/vendor/jquery.ui.widget.js",
        "blueimp-file-upload/js/jquery.iframe-transport.js",
        "blueimp-file-upload/js/jquery.fileupload.js",
    ),
    "blueimpui": (
        "jquery/dist/jquery.js",
        "blueimp-file-upload/js/vendor/jquery.ui.widget.js",
        "blueimp-file-upload/js/jquery.iframe-transport.js",
        "blueimp-file-upload/js/jquery.fileupload.js",
        "blueimp-file-upload/js/jquery.fileupload-process.js",
        "blueimp-file-upload/js/jquery.fileupload-validate.js",
        "blueimp-file-upload/js/jquery.fileupload-ui.js",
    ),
    "uploady": ("bundle.js",),
    "uppy": ("bundle.js",),
    "filepond": ("filepond/dist/filepond.js",),
    "tus": ("tus-js-client/dist/tus.js",),
}

# What comes as modules alone.
BUNDLE = """
export {default as Uppy} from '@uppy/core';
export {default as XHRUpload} from '@uppy/xhr-upload';
export {default as Tus} from '@uppy/tus';
export * as React from 'react';
export {flushSync} from 'react-dom';
export {createRoot} from 'react-dom/client';
export {default as ChunkedUploady} from '@rpldy/chunked-uploady';
export {useUploady, useItemFinishListener, useItemErrorListener} from '@rpldy/uploady';
"""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{library}</title>
<input id="files" type="file" multiple>
<div id="drop"></div>
{scripts}
<script src="clients.js"></script>
"""

FORM = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>form</title>
<form method="post" action="/upload" enctype="multipart/form-data">
<input name="comment" value="Grüße">
<input id="files" name="files" type="file" multiple>
<input name="empty" type="file">
<input name="late" value="after the files">
<button>Send</button>
</form>
"""


def make_pages(folder: Path) -> None:
    """Write a page for each library, and all that it needs."""
    made = folder / "bundle.js"
    command = [
        "--bundle",
        "--format=iife",
        "--global-name=bundled",
        f"--outfile={made}",
    ]
    esbuild = str(MODULES / ".bin" / "esbuild")
    if not shutil.which(esbuild):
        raise AssertionError("the libraries are not installed: run .ci/run, it does it")
    subprocess.run(
        [esbuild, *command, "--log-level=error"],
        input=BUNDLE,
        text=True,
        cwd=MODULES.parent,
        check=True,
    )
    shutil.copy(HERE / "clients.js", folder)
    for library, sources in SCRIPTS.items():
        tags = []
        for source in sources:
            script = made if source == made.name else MODULES / source
            if script != made:
                shutil.copy(script, folder)
            tags.append(f'<script src="{script.name}"></script>')
        page = PAGE.format(library=library, scripts="\n".join(tags))
        (folder / f"{library}.html").write_text(page)
    (folder / "form.html").write_text(FORM)


class Wire(http.server.ThreadingHTTPServer):
    """Between client and server, a network that spoils some requests with a body.

    `faults` says which, counted from 1, and how: "cut" ends the connection in the
    middle of the body, "ended" tells nobody before the server has noticed that, "lost"
    ends it after the answer, "twice" hands the same on two times, a number is answered
    as a status instead of the server.
    """

    daemon_threads = True

    def __init__(self, server: Server, faults: Mapping[int, str | int]) -> None:
        super().__init__(("127.0.0.1", 0), _Hop)
        self.target = urlsplit(server.url).netloc
        self.faults = dict(faults)
        self.count = 0
        self.mutex = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"

    def next_fault(self) -> str | int:
        with self.mutex:
            self.count += 1
            return self.faults.pop(self.count, "")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error."""


class _Hop(http.server.BaseHTTPRequestHandler):
    server: Wire
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_upload = self.path.startswith("/upload") and self.command in (
            "POST",
            "PUT",
            "PATCH",
        )
        fault = self.server.next_fault() if is_upload else ""
        # A connection that is used once, so that the browser does not repeat by itself.
        self.close_connection = True
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()
            return
        if fault in ("cut", "ended"):
            self.hand_on(body, len(body) // 2, waits=fault == "ended")
            return
        if fault == "twice":
            self.hand_on(body, len(body))
        status, headers, content = self.hand_on(body, len(body))
        if fault == "lost":
            return
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "keep-alive"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    def hand_on(
        self, body: bytes, size: int, waits: bool = False
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Send the request, of its body `size` bytes; return what comes back."""
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() != "connection":
                    connection.putheader(name, value)
            connection.endheaders()
            connection.send(body[:size])
            if waits:
                connection.sock.shutdown(socket.SHUT_WR)
                while connection.sock.recv(KIB):
                    pass
            if size < len(body):
                return 0, [], b""
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


WHOLE = (1, 1, 1, 1)


class Mode(NamedTuple):
    """One way to use a library, and how its requests then look."""

    library: str
    name: str
    options: Mapping[str, Any] = {}
    chunks: tuple[int, ...] = WHOLE  # requests for each file
    kind: str = "form"
    at_once: bool = False  # chunks of one file

    def __str__(self) -> str:
        return f"{self.library}, {self.name}"


def set_up() -> None:
    """One browser for all tests. Without it everything fails, nothing is skipped."""
    pages = tempfile.TemporaryDirectory(prefix="flowserver-ci-")
    unittest.addModuleCleanup(pages.cleanup)
    ClientCase.pages = Path(pages.name)
    make_pages(ClientCase.pages)
    ClientCase.browser = Browser()
    unittest.addModuleCleanup(ClientCase.browser.close)


class ClientCase(unittest.TestCase):
    """A server of its own for each test, and one browser for all."""

    browser: Browser
    pages: Path

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="flowserver-ci-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    @contextlib.contextmanager
    def served(self, *flags: str) -> Iterator[Server]:
        """Start a server, alone in a new folder; see that it ends well."""
        home = Path(tempfile.mkdtemp(dir=self.folder))
        server = Server(home, "--sample-dir", str(self.pages), *flags)
        try:
            yield server
        except BaseException:
            self.tell(server)
            raise
        else:
            self.assertEqual(server.stop(), 0)
            self.assertNotIn("Traceback", server.log_text())
        finally:
            server.process.kill()
            server.process.wait()
            server.place.close()

    @contextlib.contextmanager
    def emptied(self, server: Server) -> Iterator[None]:
        """Take the finished files away at the end, for others to come."""
        try:
            yield
        except BaseException:
            self.tell(server)
            raise
        finally:
            for name in server.finished_files():
                (server.upload_dir / name).unlink()

    @contextlib.contextmanager
    def wired(self, server: Server, faults: Mapping[int, str | int]) -> Iterator[Wire]:
        with Wire(server, faults) as wire:
            thread = threading.Thread(target=wire.serve_forever, args=(0.02,))
            thread.start()
            try:
                yield wire
                self.assertEqual(wire.faults, {}, "every fault has happened")
            finally:
                wire.shutdown()
                thread.join()

    def tell(self, server: Server) -> None:
        """On a failure, what page, browser and server had to say."""
        with contextlib.suppress(Exception):
            for line in self.browser.console():
                print("console:", line, file=sys.stderr)
            for name in ("requests", "finished", "failed"):
                told = json.dumps(self.browser.run(f"return {name}"))
                print(name, told[:3000], file=sys.stderr)
        print("server's log:", server.log_text()[-3000:], sep="\n", file=sys.stderr)

    # The page

    def open(
        self,
        url: str,
        library: str,
        options: Mapping[str, Any],
        target: str = "/upload",
    ) -> None:
        """Open the page of a library and begin it."""
        self.browser.open(f"{url}sample/{library}.html")
        adapter = re.sub(r"\d|ui$", "", library)
        self.browser.run(
            "begin(arguments[0], arguments[1], arguments[2])",
            adapter,
            target,
            dict(options),
        )

    def choose(self, *paths: Path) -> None:
        self.browser.set_files("#files", paths)

    def wait_for_ends(self, count: int) -> None:
        """Every file has either been finished or been given up."""
        self.browser.wait_for(
            f"return finished.length + failed.length >= {count}",
            what=f"the end of {count} uploads",
        )

    def wait_for_answers(self, count: int) -> None:
        """Chunks have been answered 200, and the upload is under way."""
        self.browser.wait_for(
            "return requests.filter(r => r.files.length && r.status >= 200"
            " && r.status < 300).length"
            f" >= {count}",
            what=f"{count} answers",
        )

    @contextlib.contextmanager
    def slowly(self) -> Iterator[None]:
        """Let the browser send so slowly that there is a middle."""
        self.browser.network(upload_bytes_per_second=MIB)
        try:
            yield
        finally:
            self.browser.network()

    @contextlib.contextmanager
    def under_way(
        self, server: Server, mode: Mode, path: Path, pages: Server | None = None
    ) -> Iterator[None]:
        """Begin an upload, slowly; what was sent is stored, and more is on its way."""
        with self.slowly():
            if pages:
                target = f"{server.url}upload"
                self.open(pages.url, mode.library, mode.options, target)
            else:
                self.open(server.url, mode.library, mode.options)
            self.choose(path)
            if max(mode.chunks) == 1:
                self.browser.wait_for(
                    lambda: any(
                        one.stat().st_size > 64 * KIB for one in self.kept(server)
                    ),
                    what="a body to come",
                )
            else:
                self.wait_for_answers(3)
            self.assertEqual(server.finished_files(), {})
            yield

    def sent(self) -> list[dict[str, Any]]:
        """The requests that brought a file or a part of one."""
        return [one for one in self.browser.run("return requests") if one["files"]]

    def told(self, name: str) -> Any:
        return self.browser.run(f"return {name}")

    # The disk

    def write(self, files: Mapping[str, bytes]) -> list[Path]:
        return write_files(self.folder / "files", files)

    def assert_stored(self, server: Server, files: Mapping[str, bytes]) -> None:
        """These files, whole, and nothing but receipts in the temp folder."""
        stored = server.finished_files()
        self.assertEqual(sorted(stored), sorted(files))
        for name, content in files.items():
            self.assertTrue(stored[name] == content, f"{name} has other bytes")
        self.assert_only_receipts(server)

    def kept(self, server: Server) -> list[Path]:
        """What lies in the temp folder."""
        return list((server.upload_dir / ".flowserver" / "v2").iterdir())

    def assert_only_receipts(self, server: Server) -> None:
        # What was cut off may still be noticed.
        self.browser.wait_for(
            lambda: all(path.suffix == ".ledger" for path in self.kept(server)),
            what="an end of all but receipts",
        )
        for path in self.kept(server):
            self.assertRegex(path.name, r"^[0-9a-f]+\.ledger$")
            self.assertLess(path.stat().st_size, 4 * KIB)
