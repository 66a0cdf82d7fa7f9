"""tus and FilePond, with the real clients: tus-js-client in Chromium and in Node, Uppy,
tuspy and FilePond, against the real server.

FLOWSERVER_FILE names another flowserver.py, to see these tests fail on a broken one.
"""

from __future__ import annotations

import json
import os
import subprocess
import unittest
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tusclient.client
from clients import (
    BIG,
    CHUNK,
    FILES,
    HERE,
    MIB,
    MODULES,
    ClientCase,
    Mode,
    Server,
    noise,
    set_up,
)
from tusclient.exceptions import TusCommunicationError

WHOLE = (1, 1, 1, 0)  # an empty file needs no PATCH
CHUNKED = (13, 2, 1, 0)
AT_ONCE = {"uploadDataDuringCreation": True}
PATIENT = {"retryDelays": [10, 20, 30, 40]}
CREATION_TOO = {"chunkSize": CHUNK, **AT_ONCE}
FILEPOND = {
    "chunkUploads": True,
    "chunkForce": True,
    "chunkSize": CHUNK,
    "chunkRetryDelays": [10, 20, 30],
}

TUS_MODES = [
    Mode("tus", "default", PATIENT, WHOLE, "raw"),
    Mode("tus", "chunks", {"chunkSize": CHUNK, **PATIENT}, CHUNKED, "raw"),
    Mode("tus", "data with the creation", {**AT_ONCE, **PATIENT}, (1, 1, 1, 1), "raw"),
    Mode(
        "tus",
        "chunks, the first with the creation",
        {**CREATION_TOO, **PATIENT},
        (13, 2, 1, 1),
        "raw",
    ),
    Mode(
        "tus",
        "POST in place of PATCH",
        {"chunkSize": CHUNK, "overridePatchMethod": True, **PATIENT},
        CHUNKED,
        "raw",
    ),
    Mode("uppy", "tus", {"tus": PATIENT}, WHOLE, "raw"),
    Mode(
        "uppy", "tus, chunks", {"tus": {"chunkSize": CHUNK, **PATIENT}}, CHUNKED, "raw"
    ),
]
# An exact multiple of the chunk size ends with an empty PATCH.
FILEPOND_MODES = [
    Mode("filepond", "chunked", FILEPOND, (13, 3, 1, 1), "raw"),
    Mode("filepond", "plain", {}, (1, 1, 1, 1)),
]


def setUpModule() -> None:
    set_up()


class WholeTest(ClientCase):
    def test_every_mode_uploads_every_file_whole(self) -> None:
        with self.served() as server:
            for number, mode in enumerate(TUS_MODES + FILEPOND_MODES):
                files = {f"{number} {name}": FILES[name] for name in FILES}
                with self.subTest(str(mode)), self.emptied(server):
                    self.open(server.url, mode.library, mode.options)
                    self.choose(*self.write(files))
                    self.wait_for_ends(len(files))
                    self.assertEqual(self.told("failed"), [])
                    told = sorted(one["name"] for one in self.told("finished"))
                    self.assertEqual(told, sorted(files))
                    sent = [one for one in self.sent() if one["kind"] == mode.kind]
                    self.assertEqual(len(sent), sum(mode.chunks))
                    self.assertLessEqual(
                        {one["status"] for one in sent}, {200, 201, 204}
                    )
                    self.assert_stored(server, files)


class RefusalTest(ClientCase):
    """What is refused is asked for once, and the user is told why."""

    def test_in_every_mode_the_user_is_told_why(self) -> None:
        large, taken = self.write({"large.bin": noise(3 * MIB, 4), "taken.bin": b"new"})
        flags = ("--max-file-size", "1M", "--on-conflict", "refuse")
        with self.served(*flags) as server:
            (server.upload_dir / "taken.bin").write_bytes(b"old")
            for mode in TUS_MODES + FILEPOND_MODES:
                with self.subTest(str(mode)):
                    self.open(server.url, mode.library, mode.options)
                    self.choose(large)
                    self.assert_refused(mode, "larger than 1 MiB")
                    self.choose(taken)
                    self.assert_refused(mode, "There is a file")
                    self.browser.run("addNamed('../outside.bin', 1500)")
                    self.assert_refused(mode, "outside of the upload folder")
            self.assert_stored(server, {"taken.bin": b"old"})

    def assert_refused(self, mode: Mode, sentence: str) -> None:
        self.wait_for_ends(1)
        self.assertEqual(self.told("finished"), [])
        [failed] = self.told("failed")
        self.assertIn(sentence, failed["message"])
        # FilePond retries each PATCH, and learns the name of the file with the first.
        is_patient = str(mode) == "filepond, chunked"
        self.assertLessEqual(len(self.told("requests")), 5 if is_patient else 1)
        if mode.library == "filepond":
            shown = sentence in self.browser.find("#drop, .filepond--root").text()
            self.assertTrue(shown, "seen on the page")
        self.browser.run(
            "client.cancel(); requests.length = finished.length = failed.length = 0"
        )

    def test_parallel_uploads_are_refused_with_the_setting_to_change(self) -> None:
        [large] = self.write({"large.bin": noise(3 * MIB, 4)})
        mode = Mode("tus", "parallel", {"parallelUploads": 2, **PATIENT})
        with self.served() as server:
            self.open(server.url, mode.library, mode.options)
            self.choose(large)
            self.wait_for_ends(1)
            self.assertIn("parallelUploads: 1", self.told("failed")[0]["message"])
            self.assert_stored(server, {})


class TroubleTest(ClientCase):
    """The network fails in the middle; the file is right."""

    def test_requests_are_cut_off_unanswered_repeated_and_put_off(self) -> None:
        whole = {2: "cut", 3: "lost"}
        chunked = {3: "cut", 5: "lost", 7: "twice", 9: 503}
        with self.served() as server:
            for number, mode in enumerate(TUS_MODES + FILEPOND_MODES[:1]):
                faults = chunked if mode.chunks[0] > 1 else whole
                if str(mode) == "tus, data with the creation":
                    faults = {1: "lost"}
                files = {f"troubled {number}.bin": FILES[BIG]}
                with self.subTest(str(mode)), self.emptied(server):
                    self.check_faults(server, mode, files, faults)

    def check_faults(
        self,
        server: Server,
        mode: Mode,
        files: Mapping[str, bytes],
        faults: Mapping[int, str | int],
    ) -> None:
        with self.wired(server, faults) as wire:
            self.open(wire.url, mode.library, mode.options)
            self.choose(*self.write(files))
            self.wait_for_ends(1)
            self.assertEqual(self.told("failed"), [])
            self.assert_stored(server, files)

    def test_a_cut_request_is_gone_on_with_where_it_was_cut(self) -> None:
        files = {"cut.bin": FILES[BIG]}
        with self.served() as server:
            self.check_faults(server, TUS_MODES[0], files, {2: "ended"})
            patches = [one for one in self.sent() if one["method"] == "PATCH"]
            self.assertEqual(len(patches), 2)
            offset = int(patches[1]["headers"]["upload-offset"])
            self.assertGreater(offset, MIB)

    def test_the_answer_to_the_creation_is_lost(self) -> None:
        files = {"created.bin": FILES[BIG]}
        with self.served() as server, self.wired(server, {1: "lost"}) as wire:
            self.open(wire.url, "tus", TUS_MODES[0].options)
            self.choose(*self.write(files))
            self.wait_for_ends(1)
            self.assertEqual(self.told("failed"), [])
            self.assertTrue(server.finished_files() == files)

    def test_filepond_is_not_told_the_end_of_its_last_chunks(self) -> None:
        files = {"exact.bin": FILES["two chunks.bin"]}
        with self.served() as server:
            faults = {3: "lost", 5: "lost", 6: "twice"}
            self.check_faults(server, FILEPOND_MODES[0], files, faults)

    def test_filepond_goes_on_when_the_user_tries_again(self) -> None:
        files = {"again.bin": FILES[BIG]}
        options = {**FILEPOND, "chunkRetryDelays": []}
        with self.served() as server, self.wired(server, {5: "cut"}) as wire:
            self.open(wire.url, "filepond", options)
            self.choose(*self.write(files))
            self.wait_for_ends(1)
            self.assertEqual(len(self.told("failed")), 1)
            self.browser.run("failed.length = 0; client.retry()")
            self.wait_for_ends(1)
            self.assertEqual(self.told("failed"), [])
            heads = [one for one in self.told("requests") if one["method"] == "HEAD"]
            self.assertEqual([one["status"] for one in heads], [200])
            self.assertEqual(len(self.sent()), 13 + 1)
            self.assert_stored(server, files)

    def test_the_server_is_killed_in_the_middle(self) -> None:
        delays = [50] * 100
        modes = [
            Mode("tus", "whole", {"retryDelays": delays}, WHOLE),
            Mode("tus", "chunks", {"chunkSize": CHUNK, "retryDelays": delays}, CHUNKED),
            Mode(
                "uppy",
                "tus",
                {"tus": {"chunkSize": CHUNK, "retryDelays": delays}},
                CHUNKED,
            ),
            Mode(
                "filepond", "chunked", {**FILEPOND, "chunkRetryDelays": delays}, CHUNKED
            ),
        ]
        with self.served() as server:
            for number, mode in enumerate(modes):
                files = {f"killed {number}.bin": FILES[BIG]}
                with self.subTest(str(mode)), self.emptied(server):
                    with self.under_way(server, mode, *self.write(files)):
                        server.kill()
                    server.start()
                    self.wait_for_ends(1)
                    self.assertEqual(self.told("failed"), [])
                    self.assert_stored(server, files)


class MiddleTest(ClientCase):
    """The user stops, goes on, leaves and comes back."""

    def test_a_paused_upload_goes_on(self) -> None:
        modes = [TUS_MODES[0], TUS_MODES[1], TUS_MODES[3], TUS_MODES[5], TUS_MODES[6]]
        with self.served() as server:
            for number, mode in enumerate(modes):
                files = {f"paused {number}.bin": FILES[BIG]}
                with self.subTest(str(mode)), self.emptied(server):
                    with self.under_way(server, mode, *self.write(files)):
                        self.browser.run("client.pause()")
                    self.browser.run("client.resume()")
                    self.wait_for_ends(1)
                    self.assertEqual(self.told("failed"), [])
                    last = self.sent()[-1]["headers"]["upload-offset"]
                    self.assertGreater(int(last), 0)
                    self.assert_stored(server, files)

    def test_an_upload_goes_on_after_a_reload(self) -> None:
        modes = [
            Mode("tus", "resumes", {**TUS_MODES[1].options, "resumes": True}, CHUNKED),
            TUS_MODES[6],
        ]
        with self.served() as server:
            for number, mode in enumerate(modes):
                files = {f"resumed {number}.bin": FILES[BIG]}
                [path] = self.write(files)
                with self.subTest(str(mode)), self.emptied(server):
                    with self.under_way(server, mode, path):
                        self.browser.reload()
                    self.open(server.url, mode.library, mode.options)
                    self.choose(path)
                    self.wait_for_ends(1)
                    self.assertEqual(self.told("failed"), [])
                    methods = [one["method"] for one in self.told("requests")]
                    self.assertEqual(methods[0], "HEAD")
                    self.assertLessEqual(methods.count("PATCH"), 13 - 3)
                    self.assert_stored(server, files)

    def test_what_is_unfinished_can_be_removed_and_nothing_else(self) -> None:
        remove = "return client.cancel().then(() => 'removed', error => error.message)"
        files = {"kept.bin": FILES[BIG]}
        [path] = self.write(files)
        with self.served() as server:
            with self.under_way(server, TUS_MODES[1], path):
                self.assertEqual(self.browser.run(remove), "removed")
            self.assert_stored(server, {})
            self.open(server.url, "tus", TUS_MODES[1].options)
            self.choose(path)
            self.wait_for_ends(1)
            self.assertIn(
                "Only an unfinished upload can be removed", self.browser.run(remove)
            )
            self.assert_stored(server, files)

    def test_uppy_cancels(self) -> None:
        [path] = self.write({"cancelled.bin": FILES[BIG]})
        with self.served() as server, self.under_way(server, TUS_MODES[6], path):
            self.browser.run("client.cancel()")
            self.browser.wait_for(lambda: not self.kept(server), what="the removal")

    def test_filepond_cancels_and_reverts(self) -> None:
        files = {"kept.bin": FILES[BIG]}
        [path] = self.write(files)
        with self.served() as server:
            with self.under_way(server, FILEPOND_MODES[0], path):
                self.browser.run("client.abort()")
                self.browser.wait_for(lambda: not self.kept(server), what="the removal")
            for mode in FILEPOND_MODES:
                with self.subTest(str(mode)), self.emptied(server):
                    self.open(server.url, mode.library, mode.options)
                    self.choose(path)
                    self.wait_for_ends(1)
                    self.browser.run("client.cancel()")
                    # It says "Upload cancelled", whatever is answered: allowRevert.
                    self.browser.wait_for("return requests.at(-1).status === 403")
                    self.assert_stored(server, files)


class OriginTest(ClientCase):
    """The page comes from another server, and must be let read the headers."""

    def test_allowed_pages_of_another_origin_upload(self) -> None:
        with self.served() as pages:
            origin = pages.url.rstrip("/")
            with self.served("--allow-origins", origin) as server:
                modes = [TUS_MODES[3], TUS_MODES[6], *FILEPOND_MODES]
                for number, mode in enumerate(modes):
                    files = {f"{number} {name}": FILES[name] for name in FILES}
                    target = f"{server.url}upload"
                    with self.subTest(str(mode)), self.emptied(server):
                        self.open(pages.url, mode.library, mode.options, target)
                        self.choose(*self.write(files))
                        self.wait_for_ends(len(files))
                        self.assertEqual(self.told("failed"), [])
                        self.assert_stored(server, files)

    def test_offsets_can_be_read(self) -> None:
        mode = TUS_MODES[1]
        files = {"paused.bin": FILES[BIG]}
        with self.served() as pages:
            origin = pages.url.rstrip("/")
            with self.served("--allow-origins", origin) as server:
                with self.under_way(server, mode, *self.write(files), pages=pages):
                    self.browser.run("client.pause()")
                self.browser.run("client.resume()")
                self.wait_for_ends(1)
                self.assertEqual(self.told("failed"), [])
                self.assert_stored(server, files)


class NodeTest(ClientCase):
    """tus-js-client in Node."""

    def node(
        self, server: Server, path: Path, what: str, **options: object
    ) -> list[dict[str, Any]]:
        """Run tus_node.js; return what it said."""
        command = ["node", str(HERE / "tus_node.js"), f"{server.url}upload", str(path)]
        found = subprocess.run(
            [*command, json.dumps({**PATIENT, **options}), what],
            env={**os.environ, "NODE_PATH": str(MODULES)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.assertEqual((found.returncode, found.stderr), (0, ""))
        return [json.loads(line) for line in found.stdout.splitlines()]

    def test_every_mode_uploads_every_file_whole(self) -> None:
        modes = [{}, {"chunkSize": CHUNK}, AT_ONCE, CREATION_TOO]
        with self.served() as server:
            for mode in modes:
                # With the creation it can't read an empty file.
                files = {
                    n: c
                    for n, c in FILES.items()
                    if c or not AT_ONCE.items() <= mode.items()
                }
                with self.subTest(**mode), self.emptied(server):
                    for path in self.write(files):
                        said = self.node(server, path, "send", **mode)
                        self.assertEqual(said[-1]["event"], "success")
                    self.assert_stored(server, files)

    def test_an_aborted_upload_goes_on(self) -> None:
        files = {"resumed.bin": FILES[BIG]}
        [path] = self.write(files)
        with self.served() as server:
            said = self.node(server, path, "resume", chunkSize=CHUNK)
            events = [one["event"] for one in said]
            self.assertEqual(events[-1], "success")
            self.assertEqual(events.count("HEAD"), 1)
            self.assertEqual(events.count("POST"), 1)
            self.assert_stored(server, files)

    def test_another_process_goes_on(self) -> None:
        files = {"resumed.bin": FILES[BIG]}
        [path] = self.write(files)
        options = {"chunkSize": CHUNK, "stored": str(self.folder / "stored")}
        with self.served() as server:
            self.node(server, path, "leave", **options)
            said = self.node(server, path, "send", **options)
            self.assertEqual(said[0]["event"], "HEAD")
            self.assertEqual(said[-1]["event"], "success")
            self.assert_stored(server, files)

    def test_the_server_is_killed_in_the_middle(self) -> None:
        files = {"killed.bin": FILES[BIG]}
        [path] = self.write(files)
        options = {"chunkSize": CHUNK, "stored": str(self.folder / "stored")}
        with self.served() as server:
            self.node(server, path, "leave", **options)
            server.kill()
            server.start()
            said = self.node(server, path, "send", **options)
            self.assertEqual(said[-1]["event"], "success")
            self.assert_stored(server, files)

    def test_an_upload_is_removed(self) -> None:
        [path] = self.write({"removed.bin": FILES[BIG]})
        with self.served() as server:
            said = self.node(server, path, "remove", chunkSize=CHUNK)
            self.assertEqual(said[-1]["event"], "stopped")
            self.assert_stored(server, {})

    def test_what_is_not_spoken_is_refused_with_the_setting_to_change(self) -> None:
        [path] = self.write({"refused.bin": FILES[BIG]})
        with self.served() as server:
            said = self.node(server, path, "send", parallelUploads=2)
            self.assertIn("parallelUploads: 1", said[-1]["value"])
            said = self.node(server, path, "send", uploadLengthDeferred=True)
            self.assertIn("length of the file must be known", said[-1]["value"])
            self.assert_stored(server, {})


class TuspyTest(ClientCase):
    """tuspy, the client of the tus project for Python."""

    def uploader(self, server: str, path: Path, **options: Any) -> Any:
        client = tusclient.client.TusClient(f"{server}upload")
        metadata = {"filename": path.name}
        return client.uploader(str(path), metadata=metadata, **options)

    def test_every_mode_uploads_every_file_whole(self) -> None:
        modes = [
            {},
            {"chunk_size": CHUNK},
            {"chunk_size": CHUNK, "upload_checksum": True},
        ]
        paths = self.write(FILES)
        with self.served() as server:
            for mode in modes:
                with self.subTest(**mode), self.emptied(server):
                    for path in paths:
                        self.uploader(server.url, path, **mode).upload()
                    self.assert_stored(server, FILES)

    def test_another_uploader_goes_on(self) -> None:
        files = {"resumed.bin": FILES[BIG]}
        [path] = self.write(files)
        with self.served() as server:
            first = self.uploader(server.url, path, chunk_size=CHUNK)
            first.upload(stop_at=3 * CHUNK)
            self.assertEqual(server.finished_files(), {})
            second = self.uploader(server.url, path, chunk_size=CHUNK, url=first.url)
            self.assertEqual(second.offset, 3 * CHUNK)
            second.upload()
            self.assert_stored(server, files)

    def test_requests_are_cut_off_unanswered_and_put_off(self) -> None:
        files = {"troubled.bin": FILES[BIG]}
        [path] = self.write(files)
        faults = {3: "cut", 5: "lost", 7: 503}
        with self.served() as server, self.wired(server, faults) as wire:
            options = {"chunk_size": CHUNK, "retries": 3, "retry_delay": 0.01}
            self.uploader(wire.url, path, **options).upload()
            self.assert_stored(server, files)

    def test_the_user_is_told_why(self) -> None:
        [path] = self.write({"large.bin": noise(2 * MIB, 4)})
        with self.served("--max-file-size", "1M") as server:
            with self.assertRaises(TusCommunicationError) as caught:
                self.uploader(server.url, path).upload()
            self.assertIn(b"larger than 1 MiB", caught.exception.response_content)
            self.assert_stored(server, {})


if __name__ == "__main__":
    unittest.main()
