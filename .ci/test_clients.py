"""The chunk uploaders and forms, each real, in a real browser against the real server.

Each row of MODES is one way to use a library. What lies on the disk afterwards is
compared byte for byte; beside it nothing may be left but receipts.

FLOWSERVER_FILE names another flowserver.py, to see these tests fail on a broken one.
"""

from __future__ import annotations

import tempfile
import unittest
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from browser import Browser
from clients import KIB, MIB, ClientCase, make_pages, noise

CHUNK = 256 * KIB
BIG = "three MiB + 17; 100%25.bin"
FILES = {
    BIG: noise(3 * MIB + 17, seed=1),
    "two chunks.bin": noise(2 * CHUNK, seed=2),
    "Grüße 日本 🎈.txt": noise(1500, seed=3),
    "empty.txt": b"",
}


class Mode(NamedTuple):
    """One way to use a library, and how its requests then look."""

    library: str
    name: str
    options: Mapping[str, Any] = {}
    chunks: tuple[int, int, int, int] = (1, 1, 1, 1)  # of each of FILES
    kind: str = "form"
    at_once: bool = False  # chunks of one file

    def __str__(self) -> str:
        return f"{self.library}, {self.name}"


CEIL = (13, 2, 1, 1)
FLOOR = (12, 2, 1, 1)
NO_EMPTY = (13, 2, 1, 0)
FINE = {"enabled": True, "partSize": CHUNK}
RAW = {"forceMultipart": False, "paramsInBody": False}
EMPTY_TOO = {"validation": {"allowEmpty": True}}
PLUPLOAD = {"chunk_size": CHUNK, "send_chunk_number": False}
DROPZONE = {"chunking": True, "chunkSize": CHUNK}

MODES = [
    Mode("simple", "default", {"chunkSize": CHUNK}, FLOOR, at_once=True),
    Mode(
        "simple", "octet", {"chunkSize": CHUNK, "method": "octet"}, FLOOR, "raw", True
    ),
    Mode("fine", "chunked", {"chunking": FINE, **EMPTY_TOO}, CEIL),
    Mode(
        "fine",
        "concurrent, with a request at the end",
        {
            "chunking": {
                **FINE,
                "mandatory": True,
                "concurrent": {"enabled": True},
                "success": {"endpoint": "/upload"},
            },
            **EMPTY_TOO,
        },
        NO_EMPTY,
        at_once=True,
    ),
    Mode(
        "fine", "raw", {"chunking": FINE, "request": RAW, **EMPTY_TOO}, CEIL, "raw"
    ),
    Mode("fine", "whole", EMPTY_TOO),
    Mode("plupload", "chunked", {**PLUPLOAD, "filters": {"prevent_empty": False}}, CEIL),
    Mode(
        "plupload",
        "raw",
        {**PLUPLOAD, "filters": {"prevent_empty": False}, "multipart": False},
        CEIL,
        "raw",
    ),
    Mode("plupload", "whole", {"filters": {"prevent_empty": False}}),
    Mode("blueimp", "chunked", {"maxChunkSize": CHUNK}, CEIL),
    Mode("blueimp", "raw", {"maxChunkSize": CHUNK, "multipart": False}, CEIL, "raw"),
    Mode("blueimp", "whole"),
    Mode("uploady", "chunked", {"chunked": True, "chunkSize": CHUNK}, CEIL),
    Mode("uppy", "one file each"),
    Mode("uppy", "bundled", {"bundle": True}),
]
for library in ("dropzone", "dropzone5"):
    MODES += [
        Mode(library, "chunked", DROPZONE, CEIL),
        Mode(
            library,
            "chunks in parallel",
            {**DROPZONE, "parallelChunkUploads": True},
            CEIL,
            at_once=True,
        ),
        Mode(
            library,
            "every file chunked",
            {**DROPZONE, "forceChunking": True},
            CEIL if library == "dropzone" else NO_EMPTY,
        ),
        Mode(library, "whole"),
    ]


def setUpModule() -> None:
    """One browser for all tests. Without it everything fails, nothing is skipped."""
    pages = tempfile.TemporaryDirectory(prefix="flowserver-ci-")
    unittest.addModuleCleanup(pages.cleanup)
    ClientCase.pages = Path(pages.name)
    make_pages(ClientCase.pages)
    ClientCase.browser = Browser()
    unittest.addModuleCleanup(ClientCase.browser.close)


class WholeTest(ClientCase):
    def test_every_mode_uploads_every_file_whole(self) -> None:
        for mode in MODES:
            with self.subTest(str(mode)):
                self.check_mode(mode)

    def check_mode(self, mode: Mode) -> None:
        files = {name: content for name, content in FILES.items()}
        if mode.library == "dropzone5" and mode.options.get("forceChunking"):
            del files["empty.txt"]  # it never sends anything
        paths = self.write(files)
        with self.served() as server:
            self.open(server.url, mode.library, mode.options)
            self.choose(*paths)
            bundled = mode.options.get("bundle")
            self.wait_for_ends(len(files))
            self.assertEqual(self.told("failed"), [])
            self.assertEqual(
                sorted(one["name"] for one in self.told("finished")), sorted(files)
            )
            sent = self.sent()
            self.assertEqual({one["status"] for one in sent}, {200})
            self.assertEqual({one["kind"] for one in sent}, {mode.kind})
            if not bundled:
                self.assertEqual(len(sent), sum(mode.chunks[: len(files)]))
            else:
                self.assertEqual(len(sent), 1)
            self.assert_stored(server, files)


class RefusalTest(ClientCase):
    """What is refused is sent once, and the user is told why."""

    def test_in_every_mode_the_user_is_told_why(self) -> None:
        large, taken = self.write({"large.bin": noise(3 * MIB, 4), "taken.bin": b"new"})
        flags = ("--max-file-size", "1M", "--on-conflict", "refuse")
        with self.served(*flags) as server:
            (server.upload_dir / "taken.bin").write_bytes(b"old")
            for mode in MODES:
                with self.subTest(str(mode)):
                    self.open(server.url, mode.library, mode.options)
                    self.choose(large)
                    self.assert_refused(mode, "larger than 1 MiB")
                    self.choose(taken)
                    self.assert_refused(mode, "There is a file")
                    # Plupload calls the file by what is behind the last slash.
                    if mode.library != "plupload":
                        self.browser.run("addNamed('../outside.bin', 1500)")
                        self.assert_refused(mode, "outside of the upload folder")
            self.assert_stored(server, {"taken.bin": b"old"})

    def test_retries_end_where_the_client_knows_that_they_are_in_vain(self) -> None:
        [large] = self.write({"large.bin": noise(3 * MIB, 4)})
        retry = {"enableAuto": True, "autoAttemptDelay": 0.01}
        modes = [
            Mode("simple", "retries", {"maxChunkRetries": 100, "chunkSize": 4 * MIB}),
            Mode("fine", "retries", {"retry": retry, "chunking": FINE}),
            Mode("fine", "whole, retries", {"retry": retry}),
        ]
        with self.served("--max-file-size", "1M") as server:
            for mode in modes:
                with self.subTest(str(mode)):
                    self.open(server.url, mode.library, mode.options)
                    self.choose(large)
                    self.assert_refused(mode, "larger than 1 MiB")
            self.assert_stored(server, {})

    def test_plupload_is_told_which_setting_it_needs(self) -> None:
        [large] = self.write({"large.bin": noise(3 * MIB, 4)})
        mode = Mode("plupload", "chunk numbers", {"chunk_size": CHUNK})
        with self.served() as server:
            self.open(server.url, mode.library, mode.options)
            self.choose(large)
            self.assert_refused(mode, "send_chunk_number: false")
            self.assert_stored(server, {})

    def assert_refused(self, mode: Mode, sentence: str) -> None:
        self.wait_for_ends(1)
        self.assertEqual(self.told("finished"), [])
        for one in self.told("failed"):
            self.assertIn(sentence, one["message"])
        if mode.library.startswith("dropzone"):
            self.assertIn(sentence, self.browser.find("#drop").text())
        self.assertLessEqual(len(self.sent()), MOST.get(str(mode), 1))
        self.browser.run(
            "client.cancel();"
            "requests.length = finished.length = failed.length = 0"
        )


# Requests of one refused file, where that is more than one: chunks that are sent at
# once, and Uppy's own three retries.
MOST = {
    "simple, default": 3,
    "simple, octet": 3,
    "fine, concurrent, with a request at the end": 3,
    "dropzone, chunks in parallel": 2,
    "dropzone5, chunks in parallel": 12,
    "uppy, one file each": 4,
    "uppy, bundled": 4,
}


if __name__ == "__main__":
    unittest.main()
