"""The chunk uploaders and forms, each real, in a real browser against the real server.

Each row of MODES is one way to use a library. What lies on the disk afterwards is
compared byte for byte; beside it nothing may be left but receipts.

FLOWSERVER_FILE names another flowserver.py, to see these tests fail on a broken one.
"""

from __future__ import annotations

import json
import re
import subprocess
import unittest
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from clients import (
    BIG,
    CHUNK,
    FILES,
    MIB,
    WHOLE,
    ClientCase,
    Mode,
    Server,
    noise,
    set_up,
)

SIMPLE = {"chunkSize": CHUNK}
CEIL = (13, 2, 1, 1)
FLOOR = (12, 2, 1, 1)
NO_EMPTY = (13, 2, 1, 0)
FINE = {"enabled": True, "partSize": CHUNK}
CONCURRENT = {
    **FINE,
    "mandatory": True,
    "concurrent": {"enabled": True},
    "success": {"endpoint": "/upload"},
}
AUTO = {"enableAuto": True, "autoAttemptDelay": 0.01}
RAW = {"forceMultipart": False, "paramsInBody": False}
EMPTY_TOO = {"validation": {"allowEmpty": True}}
PLUPLOAD = {"chunk_size": CHUNK, "send_chunk_number": False}
DROPZONE = {"chunking": True, "chunkSize": CHUNK}

MODES = [
    Mode("simple", "default", SIMPLE, FLOOR, at_once=True),
    Mode("simple", "octet", {**SIMPLE, "method": "octet"}, FLOOR, "raw", True),
    Mode("fine", "chunked", {"chunking": FINE, **EMPTY_TOO}, CEIL),
    Mode(
        "fine",
        "concurrent, with a request at the end",
        {"chunking": CONCURRENT, **EMPTY_TOO},
        NO_EMPTY,
        at_once=True,
    ),
    Mode("fine", "raw", {"chunking": FINE, "request": RAW, **EMPTY_TOO}, CEIL, "raw"),
    Mode("fine", "whole", EMPTY_TOO),
    Mode(
        "plupload", "chunked", {**PLUPLOAD, "filters": {"prevent_empty": False}}, CEIL
    ),
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
    set_up()


class WholeTest(ClientCase):
    def test_every_mode_uploads_every_file_whole(self) -> None:
        with self.served() as server:
            for number, mode in enumerate(MODES):
                with self.subTest(str(mode)), self.emptied(server):
                    names = {f"{number} {name}": FILES[name] for name in FILES}
                    self.check_mode(server, mode, names)

    def check_mode(self, server: Server, mode: Mode, files: dict[str, bytes]) -> None:
        if mode.library == "dropzone5" and mode.options.get("forceChunking"):
            del files[next(name for name in files if not files[name])]  # never sent
        self.open(server.url, mode.library, mode.options)
        self.choose(*self.write(files))
        self.wait_for_ends(len(files))
        self.assertEqual(self.told("failed"), [])
        told = sorted(one["name"] for one in self.told("finished"))
        self.assertEqual(told, sorted(files))
        self.assert_mode_was_real(mode, len(files))
        self.assert_stored(server, files)

    def assert_mode_was_real(self, mode: Mode, count: int) -> None:
        sent = self.sent()
        self.assertEqual({one["status"] for one in sent}, {200})
        self.assertEqual({one["kind"] for one in sent}, {mode.kind})
        is_bundled = mode.options.get("bundle")
        requests = 1 if is_bundled else sum(mode.chunks[:count])
        self.assertEqual(len(sent), requests)
        # Of chunks that are sent at once, another answer may be the last one.
        if not mode.at_once:
            for one in self.told("finished"):
                self.assertIn('"path"', one["answer"])


class ListTest(ClientCase):
    """blueimp's build with a list shows what the server says of each file."""

    def test_the_files_are_listed(self) -> None:
        with self.served() as server:
            for number, options in enumerate(({}, {"maxChunkSize": CHUNK})):
                files = {f"{number} {name}": FILES[name] for name in FILES}
                with self.subTest(**options), self.emptied(server):
                    self.open(server.url, "blueimpui", options)
                    self.choose(*self.write(files))
                    self.wait_for_ends(len(files))
                    self.assert_stored(server, files)
                    listed = self.browser.find("#drop").text().splitlines()
                    self.assertEqual(sorted(filter(None, listed)), sorted(files))


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
        modes = [
            Mode("simple", "retries", {"maxChunkRetries": 100, "chunkSize": 4 * MIB}),
            Mode("fine", "retries", {"retry": AUTO, "chunking": FINE}),
            Mode("fine", "whole, retries", {"retry": AUTO}),
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
            "client.cancel();requests.length = finished.length = failed.length = 0"
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


RETRIES = [
    Mode(
        "simple",
        "retries",
        {
            **SIMPLE,
            "forceChunkSize": True,
            "maxChunkRetries": 5,
            "chunkRetryInterval": 10,
        },
    ),
    Mode("dropzone", "retries", {**DROPZONE, "retryChunks": True}),
    Mode("dropzone5", "retries", {**DROPZONE, "retryChunks": True}),
    Mode(
        "dropzone",
        "retries in parallel",
        {**DROPZONE, "retryChunks": True, "parallelChunkUploads": True},
    ),
    Mode("fine", "retries", {"chunking": FINE, "retry": AUTO}),
    Mode("fine", "retries of several", {"chunking": CONCURRENT, "retry": AUTO}),
    Mode("plupload", "retries", {**PLUPLOAD, "max_retries": 3}),
    Mode("uploady", "retries", {"chunked": True, "chunkSize": CHUNK, "retries": 4}),
]
WHOLE_RETRIES = [
    Mode("fine", "whole", {"retry": AUTO}),
    Mode("plupload", "whole", {"max_retries": 3}),
    Mode("uppy", "one file each"),
    Mode("uppy", "bundled", {"bundle": True}),
]


class TroubleTest(ClientCase):
    """The network fails in the middle, or the user stops; the file is right."""

    def test_chunks_are_cut_off_unanswered_repeated_and_put_off(self) -> None:
        # Three are tried again, so the 16th is the last of 13.
        faults = {2: "cut", 5: "lost", 8: "twice", 10: 503, 16: "lost"}
        self.check_faults(RETRIES, faults)

    def test_whole_files_are_cut_off_unanswered_repeated(self) -> None:
        self.check_faults(WHOLE_RETRIES, {1: "cut", 2: "lost", 3: "twice"})

    def test_the_user_sends_again_what_had_arrived(self) -> None:
        with self.served() as server:
            for number, mode in enumerate(modes_of(UNREPEATED)):
                files = {f"again {number}.bin": FILES[BIG]}
                faults = {mode.chunks[0]: "lost"}
                with (
                    self.subTest(str(mode)),
                    self.emptied(server),
                    self.wired(server, faults) as wire,
                ):
                    self.open(wire.url, mode.library, mode.options)
                    [path] = self.write(files)
                    self.choose(path)
                    self.wait_for_ends(1)
                    self.assert_stored(server, files)
                    self.browser.run("client.cancel(); failed.length = 0")
                    self.browser.run("finished.length = 0")
                    self.choose(path)
                    self.wait_for_ends(1)
                    self.assertEqual(self.told("failed"), [])
                    self.assert_stored(server, files)

    def check_faults(
        self, modes: Sequence[Mode], faults: Mapping[int, str | int]
    ) -> None:
        with self.served() as server:
            for number, mode in enumerate(modes):
                files = {f"troubled {number}.bin": FILES[BIG]}
                with (
                    self.subTest(str(mode)),
                    self.emptied(server),
                    self.wired(server, faults) as wire,
                ):
                    self.open(wire.url, mode.library, mode.options)
                    self.choose(*self.write(files))
                    self.wait_for_ends(1)
                    self.assertEqual(self.told("failed"), [])
                    self.assert_stored(server, files)


# Ways through the server that differ: what is stopped in the middle takes a second.
STOPPED = """
simple, default / fine, chunked / plupload, chunked / plupload, raw
blueimp, chunked / blueimp, raw / uploady, chunked / uppy, one file each
dropzone, chunked / dropzone, chunks in parallel
"""
UNREPEATED = """
simple, octet / fine, chunked / plupload, chunked / blueimp, chunked / blueimp, raw
uploady, chunked / dropzone, chunked
"""
PAUSED = "simple, default / simple, octet / fine, chunked / plupload, chunked"
RESUMED = "simple, default / simple, octet"


def modes_of(names: str) -> list[Mode]:
    wanted = re.split(r" / |\n *", names.strip())
    chosen = [mode for mode in MODES if str(mode) in wanted]
    assert len(chosen) == len(wanted)
    return chosen


class MiddleTest(ClientCase):
    """The user stops, goes on, leaves and comes back."""

    def assert_ends(self, server: Server, files: Mapping[str, bytes]) -> None:
        self.wait_for_ends(1)
        self.assertEqual(self.told("failed"), [])
        self.assert_stored(server, files)

    def test_a_cancelled_upload_is_made_anew(self) -> None:
        modes = modes_of(STOPPED)
        with self.served() as server:
            for number, mode in enumerate(modes):
                files = {f"cancelled {number}.bin": FILES[BIG]}
                with self.subTest(str(mode)), self.emptied(server):
                    [path] = self.write(files)
                    with self.under_way(server, mode, path):
                        self.browser.run("client.cancel()")
                    self.browser.run("requests.length = failed.length = 0")
                    self.choose(path)
                    self.wait_for_ends(1)
                    self.assertEqual(self.told("failed"), [])
                    self.assertTrue(server.finished_files() == files)
            # A new upload of these has an identifier of its own: what the first one
            # brought stays until it is stale.
            random = [m for m in modes if m.library in RANDOM and m.chunks != WHOLE]
            left = [path for path in self.kept(server) if path.suffix == ".data"]
            self.assertEqual(len(left), len(random))

    def test_a_paused_upload_goes_on(self) -> None:
        with self.served() as server:
            for number, mode in enumerate(modes_of(PAUSED)):
                files = {f"paused {number}.bin": FILES[BIG]}
                with self.subTest(str(mode)), self.emptied(server):
                    with self.under_way(server, mode, *self.write(files)):
                        self.browser.run("client.pause()")
                    self.browser.run("client.resume()")
                    self.assert_ends(server, files)

    def test_simple_uploader_resumes_after_a_reload(self) -> None:
        with self.served() as server:
            for number, mode in enumerate(modes_of(RESUMED)):
                files = {f"resumed {number}.bin": FILES[BIG]}
                with self.subTest(str(mode)), self.emptied(server):
                    [path] = self.write(files)
                    with self.under_way(server, mode, path):
                        self.browser.reload()
                    self.open(server.url, mode.library, mode.options)
                    self.choose(path)
                    self.assert_ends(server, files)
                    # Of three or more, the first and the last one are sent again.
                    self.assertLessEqual(len(self.sent()), mode.chunks[0] - 1)

    # Fine Uploader

    RESUMING = Mode(
        "fine",
        "resumes",
        {
            "chunking": FINE,
            "resume": {"enabled": True},
            "retry": AUTO,
            "deleteFile": {"enabled": True, "endpoint": "/upload"},
        },
        CEIL,
    )

    def test_fine_uploader_resumes_after_a_reload(self) -> None:
        files = {"resumed.bin": FILES[BIG]}
        [path] = self.write(files)
        with self.served() as server:
            with self.under_way(server, self.RESUMING, path):
                self.browser.reload()
            self.open(server.url, self.RESUMING.library, self.RESUMING.options)
            self.assertEqual(len(self.told("client.resumable()")), 1)
            self.choose(path)
            self.assert_ends(server, files)
            self.assertLessEqual(len(self.sent()), 13 - 3)
            self.assertEqual(self.sent()[0]["fields"]["qqresume"], "true")

    def test_fine_uploader_begins_anew_when_the_server_has_forgotten(self) -> None:
        files = {"forgotten.bin": FILES[BIG]}
        [path] = self.write(files)
        with self.served() as server:
            with self.under_way(server, self.RESUMING, path):
                self.browser.reload()
            for left in self.kept(server):
                left.unlink()
            self.open(server.url, self.RESUMING.library, self.RESUMING.options)
            self.choose(path)
            self.assert_ends(server, files)
            answers = [json.loads(one["answer"]) for one in self.sent()]
            self.assertIs(answers[0]["reset"], True)
            self.assertEqual(len(answers), 1 + 13)

    def test_fine_uploader_deletes_what_is_unfinished_only(self) -> None:
        files = {"deleted.bin": FILES[BIG]}
        [path] = self.write(files)
        options = {**self.RESUMING.options, "resume": {}}
        with self.served() as server:
            with self.under_way(server, Mode("fine", "", options, CEIL), path):
                self.browser.run("client.pause(); client.remove(0)")
                self.browser.wait_for("return client.deleted.length")
            self.assertEqual(
                self.told("client.deleted"), [{"status": 204, "isError": False}]
            )
            self.assert_stored(server, {})
            self.choose(path)
            self.assert_ends(server, files)
            self.browser.run("client.remove(1)")
            self.browser.wait_for("return client.deleted.length === 2")
            self.assertEqual(
                self.told("client.deleted")[1], {"status": 403, "isError": True}
            )
            self.assert_stored(server, files)


RANDOM = ("fine", "dropzone", "dropzone5")


class PictureTest(ClientCase):
    """Dropzone makes pictures smaller, but announces the size that they had."""

    def test_a_resized_picture_arrives(self) -> None:
        [path] = self.write({"picture.png": picture(600, 400)})
        resize = {"resizeWidth": 60, "resizeMimeType": "image/jpeg"}
        options = [
            {"chunking": True, "forceChunking": True},
            {"chunking": True},
            {},
        ]
        modes = [(lib, own) for lib in ("dropzone", "dropzone5") for own in options]
        with self.served() as server:
            for library, own in modes:
                with self.subTest(library, **own), self.emptied(server):
                    self.open(server.url, library, {**own, **resize})
                    self.choose(path)
                    self.wait_for_ends(1)
                    self.assertEqual(self.told("failed"), [])
                    [content] = server.finished_files().values()
                    self.assertTrue(content.startswith(b"\xff\xd8\xff"), "a JPEG")
                    self.assertTrue(content.endswith(b"\xff\xd9"), "a whole one")
                    [sent] = self.sent()
                    self.assertEqual(sent["files"][0]["size"], len(content))
                    if "forceChunking" in own:
                        said = int(sent["fields"]["dztotalfilesize"])
                        self.assertEqual(said, path.stat().st_size)
                    self.assert_only_receipts(server)

    def test_a_resized_picture_of_several_chunks_is_refused(self) -> None:
        [path] = self.write({"picture.png": picture(600, 400)})
        chunks = {"chunking": True, "chunkSize": 10_000, "resizeWidth": 300}
        with self.served() as server:
            for library in ("dropzone", "dropzone5"):
                with self.subTest(library):
                    self.open(server.url, library, chunks)
                    self.choose(path)
                    self.wait_for_ends(1)
                    self.assertEqual(self.told("finished"), [])
                    [failed] = self.told("failed")
                    self.assertIn("of 720683", failed["message"])
            self.assert_stored(server, {})


def picture(width: int, height: int) -> bytes:
    """A PNG of noise."""

    def part(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        check = zlib.crc32(checked).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + checked + check

    rows = noise(width * height * 3, seed=6)
    lines = b"".join(
        b"\0" + rows[start : start + width * 3]
        for start in range(0, len(rows), width * 3)
    )
    sizes = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", sizes + b"\x08\x02\0\0\0")
        + part(b"IDAT", zlib.compress(lines, 1))
        + part(b"IEND", b"")
    )


class FormTest(ClientCase):
    """A form without a script, and curl."""

    def send_form(self, server: Server, *paths: Path) -> str:
        """Press the button; return what the page says that comes instead."""
        self.browser.open(f"{server.url}sample/form.html")
        if paths:
            self.browser.set_files("#files", paths)
        self.browser.find("button").click()
        self.browser.wait_for("return document.title === 'Upload'")
        return self.browser.find("body").text()

    def test_a_form_stores_each_of_its_files(self) -> None:
        with self.served() as server:
            text = self.send_form(server, *self.write(FILES))
            for name in FILES:
                self.assertIn(f"{name}: stored", text)
            self.assert_stored(server, FILES)

    def test_a_form_says_which_file_is_refused(self) -> None:
        files = {"large.bin": noise(2 * MIB, 7), "small.bin": noise(1500, 8)}
        with self.served("--max-file-size", "1M") as server:
            text = self.send_form(server, *self.write(files))
            self.assertIn("large.bin: The file is larger than 1 MiB", text)
            self.assertIn("small.bin: stored", text)
            del files["large.bin"]
            self.assert_stored(server, files)
            self.assertIn("There is no file in the form", self.send_form(server))

    def curl(self, *arguments: object) -> tuple[int, str]:
        """Run curl; return the status of the answer, and its body."""
        command = ["curl", "--silent", "--show-error", "--noproxy", "*"]
        found = subprocess.run(
            [*command, "--write-out", "\n%{http_code}", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.assertEqual((found.returncode, found.stderr), (0, ""))
        body, _, status = found.stdout.rpartition("\n")
        return int(status), body

    def test_curl_sends_a_form_of_several_files(self) -> None:
        with self.served() as server:
            paths = self.write(FILES)
            forms = [word for path in paths for word in ("-F", f'file=@"{path}"')]
            status, body = self.curl("-F", "comment=x", *forms, f"{server.url}upload")
            self.assertEqual(status, 200)
            stored = [one["path"] for one in json.loads(body)["files"]]
            self.assertEqual(sorted(stored), sorted(FILES))
            self.assert_stored(server, FILES)

    def test_curl_sends_single_files_to_their_paths(self) -> None:
        with self.served() as server:
            for path in self.write(FILES):
                status, body = self.curl("-T", path, f"{server.url}upload/")
                self.assertEqual((status, json.loads(body)["path"]), (200, path.name))
            status, _ = self.curl("-T", path, f"{server.url}upload/a%20b/new.txt")
            self.assertEqual(status, 200)
            self.assert_stored(server, {**FILES, "a b/new.txt": FILES[path.name]})

    def test_curl_sends_a_file_in_pieces(self) -> None:
        content = noise(100_000, seed=9)
        [path] = self.write({"piece": content[:60_000]})
        [rest] = self.write({"rest": content[60_000:]})
        names = ("-H", 'Content-Disposition: attachment; filename="pieces.bin"')
        with self.served() as server:
            for piece, where in ((path, "0-59999"), (rest, "60000-99999")):
                place = f"Content-Range: bytes {where}/100000"
                data = ("--data-binary", f"@{piece}", f"{server.url}upload")
                kind = "Content-Type: application/octet-stream"
                status, _ = self.curl(*names, "-H", place, "-H", kind, *data)
                self.assertEqual(status, 200)
            self.assert_stored(server, {"pieces.bin": content})

    def test_curl_is_told_what_is_refused(self) -> None:
        [large] = self.write({"large.bin": noise(20 * MIB, 7)})
        flags = ("--max-file-size", "1M", "--on-conflict", "refuse")
        with self.served(*flags) as server:
            (server.upload_dir / "taken.bin").write_bytes(b"old")
            [taken] = self.write({"taken.bin": b"new"})
            url = f"{server.url}upload"
            refused = {
                "larger than 1 MiB": (413, "-F", f"file=@{large}", url),
                "larger than 1 MiB ": (413, "-T", large, f"{url}/"),
                "There is a file": (409, "-F", f"file=@{taken}", url),
                "There is a file ": (409, "-T", taken, f"{url}/"),
                "outside": (400, "-F", f"file=@{taken};filename=../outside.bin", url),
                "outside ": (400, "--path-as-is", "-T", taken, f"{url}/../outside.bin"),
                "no name": (
                    400,
                    "-X",
                    "POST",
                    "--data-binary",
                    f"@{taken}",
                    "-H",
                    "Content-Type: a/b",
                    url,
                ),
                "Content-Length": (
                    411,
                    "-H",
                    "Transfer-Encoding: chunked",
                    "-T",
                    taken,
                    f"{url}/",
                ),
            }
            for sentence, (status, *arguments) in refused.items():
                with self.subTest(sentence):
                    answer = self.curl(*arguments)
                    self.assertEqual(answer[0], status, answer)
                    self.assertIn(sentence.strip(), answer[1])
            self.assert_stored(server, {"taken.bin": b"old"})


class OriginTest(ClientCase):
    """The page comes from another server."""

    def test_allowed_pages_of_another_origin_upload(self) -> None:
        modes = modes_of(
            """simple, octet / fine, chunked / fine, raw / plupload, raw / blueimp, raw
            uploady, chunked / uppy, one file each / dropzone, chunked"""
        )
        with self.served() as pages:
            origin = pages.url.rstrip("/")
            with self.served("--allow-origins", origin) as server:
                for number, mode in enumerate(modes):
                    files = {f"{number} {name}": FILES[name] for name in FILES}
                    target = f"{server.url}upload"
                    with self.subTest(str(mode)), self.emptied(server):
                        self.open(pages.url, mode.library, mode.options, target)
                        self.choose(*self.write(files))
                        self.wait_for_ends(len(files))
                        self.assertEqual(self.told("failed"), [])
                        self.assert_stored(server, files)


if __name__ == "__main__":
    unittest.main()
