"""Any bytes at all: a parse or our error, never anything else, and alike at each split.

Seeded, so that a failure comes again; the message holds the seed of the one body. The
number of bodies is 100,000, or what the environment's FUZZ_BODIES says. Well-formed
bodies are compared with two judges whom nobody here wrote: defnull's multipart and
Python's email package.
"""

from __future__ import annotations

import email.parser
import email.policy
import json
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import unittest
import urllib.parse
from pathlib import Path
from typing import Any, Iterator

import hostile_cases as cases
import multipart

HERE = Path(__file__).resolve().parent
SERVER = Path(os.environ.get("FLOWSERVER_FILE", HERE.parent / "flowserver.py"))
sys.path.insert(0, str(SERVER.parent))

import flowserver  # noqa: E402

BODIES = int(os.environ.get("FUZZ_BODIES", "100000"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))

LETTERS = b"0123456789abcdefXYZ'()+_,-./:=?"
PIECES = [
    b"\r",
    b"\n",
    b"\r\n",
    b"-",
    b"--",
    b"\r\n--",
    b"\r\n\r\n",
    b" ",
    b"\t",
    b"\0",
]
PIECES += [
    b";",
    b'"',
    b"\\",
    b'\\"',
    b"=",
    b":",
    b"name",
    b"filename",
    b"form-data",
    b"*",
]
PIECES += [
    b"Content-Disposition",
    b"Content-Type",
    b"\xff",
    b"\xc3",
    "é".encode(),
    b"%22",
]
PIECES += [
    b"Content-Transfer-Encoding: base64\r\n",
    b"filename*=UTF-8''x",
    b"\x7f",
    b"",
]
NAMES = [
    "a",
    "file",
    "flowChunkNumber",
    "ünï",
    "",
    "a b",
    "a=b",
    "a;b",
    "日本",
    "x" * 99,
]


class Form:
    """A well-formed form: its bytes, its boundary, and what they must be read as."""

    def __init__(self, dice: random.Random) -> None:
        size = dice.choice((1, 2, 5, 38, 70))
        self.boundary = bytes(dice.choices(LETTERS, k=size))
        self.parts: list[tuple[str, str | None, bytes]] = []
        blocks = []
        for _ in range(dice.choice((0, 1, 1, 2, 3, 9))):
            name, content = dice.choice(NAMES), self.content(dice)
            filename = dice.choice((None, None, *NAMES))
            self.parts.append((name, filename, content))
            option = "" if filename is None else f'; filename="{filename}"'
            more = dice.choice((b"", b"Content-Type: text/plain\r\n", b"X: y\r\n"))
            disposition = f'form-data; name="{name}"{option}'.encode()
            blocks.append(cases.part(disposition, content, more))
        self.bytes = cases.form(*blocks, boundary=self.boundary)
        if not blocks:
            self.bytes = b"--" + self.boundary + b"--\r\n"

    def content(self, dice: random.Random) -> bytes:
        """Return bytes that look like the end of a part, and are not."""
        near = [b"\r\n--" + self.boundary[:-1], b"\r\n-" + self.boundary, b"--"]
        near += [
            self.boundary,
            b"\n--" + self.boundary,
            b"\r--" + self.boundary,
            b"\r\n",
        ]
        pieces = dice.choices(near + PIECES, k=dice.randint(0, 6))
        content = b"".join(pieces) + dice.randbytes(dice.choice((0, 0, 3, 99)))
        return content.replace(b"\r\n--" + self.boundary, b"")


def mutated(body: bytes, boundary: bytes, dice: random.Random) -> bytes:
    """Return the body with one to four wounds."""
    for _ in range(dice.randint(1, 4)):
        at, to = sorted((dice.randint(0, len(body)), dice.randint(0, len(body))))
        piece = dice.choice([*PIECES, b"\r\n--" + boundary, boundary + b"--"])
        if dice.random() < 0.01:  # about as long as the header of a part may be
            piece = b"X: " + b"x" * dice.choice((8000, 8100, 8180, 9000)) + b"\r\n"
        match dice.randrange(8):
            case 0:
                body = body[:at] + piece + body[at:]
            case 1:
                body = body[:at] + piece + body[at + len(piece) :]
            case 2:
                body = body[:at] + body[min(to, at + 9) :]
            case 3:
                body = body[:at] + body[at:to] * 2 + body[to:]
            case 4:
                body = body[:to]
            case 5:
                body = body[:at] + bytes([dice.randrange(256)]) + body[at + 1 :]
            case 6:
                body = body[at:to] + body[:at] + body[to:]
            case 7:
                body = body.replace(*dice.sample(PIECES[:-1], 2), 1)
    return body


def split(body: bytes, dice: random.Random) -> list[bytes]:
    """Cut anywhere; now and then into single bytes."""
    if dice.random() < 0.1:
        return [body[i : i + 1] for i in range(len(body))]
    cuts = sorted(dice.randint(0, len(body)) for _ in range(dice.randint(1, 5)))
    ends = [0, *cuts, len(body)]
    return [body[a:b] for a, b in zip(ends, ends[1:], strict=False) if a < b]


def read(boundary: bytes, blocks: list[bytes], buffer: bytearray | None = None) -> Any:
    """Return the parts, or the word for our error; anything else is raised.

    With `buffer` the blocks come in one buffer that is filled again each time, as the
    server does it: a view that is looked at too late would show.
    """
    parser = flowserver.MultipartParser(boundary)
    parts: list[Any] = []
    try:
        for block in blocks:
            if buffer is None:
                events = parser.feed(block)
            else:
                buffer[: len(block)] = block
                events = parser.feed(buffer, len(block))
            for event in events:
                if isinstance(event, flowserver.Part):
                    parts.append((event.name, event.filename, bytearray()))
                elif event is not None:
                    parts[-1][2].extend(event)
        parser.close()
    except flowserver.FlowError as error:
        return type(error).__name__
    return [(name, filename, bytes(content)) for name, filename, content in parts]


class FuzzTest(unittest.TestCase):
    def bodies(self, count: int) -> Iterator[tuple[int, Form, bytes, random.Random]]:
        for seed in range(SEED, SEED + count):
            dice = random.Random(seed)
            form = Form(dice)
            yield seed, form, mutated(form.bytes, form.boundary, dice), dice

    def test_a_parse_or_our_error_and_the_same_at_every_split(self) -> None:
        """h11's sentence for its fuzzer; here for a hundred thousand bodies."""
        buffer, results = bytearray(1 << 20), {"parsed": 0, "refused": 0}
        for seed, form, body, dice in self.bodies(BODIES):
            try:
                whole = read(form.boundary, [body])
                pieces = read(form.boundary, split(body, dice), buffer)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {error!r} for {body!r}") from error
            self.assertEqual(whole, pieces, f"seed {seed}: {body!r}")
            results["refused" if isinstance(whole, str) else "parsed"] += 1
        # Else the mutator has gone blind on one eye.
        self.assertGreater(min(results.values()), BODIES // 20, results)

    def test_well_formed_bodies_are_read_as_they_were_written(self) -> None:
        for seed, form, _, dice in self.bodies(BODIES // 10):
            self.assertEqual(read(form.boundary, [form.bytes]), form.parts, seed)
            self.assertEqual(
                read(form.boundary, split(form.bytes, dice)), form.parts, seed
            )

    def test_well_formed_bodies_are_read_as_multipart_reads_them(self) -> None:
        for seed, form, _, _ in self.bodies(BODIES // 20):
            judge = multipart.PushMultipartParser(form.boundary, max_header_count=16)
            theirs: list[Any] = []
            for event in judge.parse(form.bytes):
                if isinstance(event, multipart.MultipartSegment):
                    theirs.append((event.name, event.filename, bytearray()))
                elif event:
                    theirs[-1][2].extend(event)
            judge.close()
            ours = read(form.boundary, [form.bytes])
            self.assertEqual(ours, [(n, f, bytes(c)) for n, f, c in theirs], seed)

    def test_what_both_take_is_the_same(self) -> None:
        """Of broken bodies, too: two readers that differ are a way to smuggle."""
        agreed = 0
        for seed, form, body, _ in self.bodies(BODIES // 10):
            theirs = self.judged(form.boundary, body)
            ours = read(form.boundary, [body])
            if theirs is None or isinstance(ours, str):
                continue
            agreed += 1
            self.assertEqual(ours, theirs, f"seed {seed}: {body!r}")
        self.assertGreater(agreed, BODIES // 200)

    def test_what_the_judge_refuses_is_refused(self) -> None:
        """Nothing is taken that a lenient judge can't read, for these reasons but two:

        a header's name may have more signs (RFC 9110 5.6.2), and blanks may follow a
        boundary (RFC 2046 5.1.1).
        """
        legal = ("Invalid segment header name", "Unexpected byte after first boundary")
        legal += ("Unexpected bytes after boundary",)
        refused = 0
        for seed, form, body, _ in self.bodies(BODIES // 4):
            judge = multipart.PushMultipartParser(
                form.boundary, max_header_count=16, max_header_size=8192
            )
            try:
                for _ in judge.parse(body):
                    pass
                judge.close()
            except multipart.MultipartError as error:
                refused += 1
                ours = read(form.boundary, [body])
                excused = str(error).startswith(legal) and _is_excused(form, body)
                if not isinstance(ours, str) and not excused:
                    self.fail(f"seed {seed}: {error}, but {ours!r} from {body!r}")
        self.assertGreater(refused, BODIES // 50)

    def judged(self, boundary: bytes, body: bytes) -> Any:
        """Return what the strict judge reads, None when it refuses, or may differ.

        It decodes %22 and takes folded paths off file names, which nobody else does
        to a name that is only shown.
        """
        parts: list[Any] = []
        try:
            judge = multipart.PushMultipartParser(boundary, strict=True)
            for event in judge.parse(body):
                if isinstance(event, multipart.MultipartSegment):
                    line = str(event.header("Content-Disposition"))
                    if any(c in line for c in '%\\*"":' if line.count('"') % 2) or (
                        "%" in line or "\\" in line or "*" in line
                    ):
                        return None
                    parts.append((event.name, event.filename, bytearray()))
                elif event:
                    parts[-1][2].extend(event)
            judge.close()
        except multipart.MultipartError:
            return None
        return [(name, filename, bytes(content)) for name, filename, content in parts]

    def test_well_formed_bodies_are_read_as_the_email_package_reads_them(self) -> None:
        """It goes by lines: contents are kept to those that no line end confuses."""
        read_mail = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes
        for seed in range(SEED, SEED + BODIES // 100):
            dice = random.Random(seed)
            boundary = bytes(dice.choices(LETTERS[:19], k=20))
            parts = []
            for number in range(dice.randint(1, 5)):
                pieces = [b"\r\n", b"-", boundary[:9], b"\xff\0", b"x", b"--", b" "]
                content = b"a" + b"".join(dice.choices(pieces, k=dice.randint(0, 12)))
                parts.append((f"n{number}", dice.choice((None, "f.txt")), content))
            blocks = [
                cases.part(
                    f'form-data; name="{name}"'.encode()
                    + (b"" if filename is None else b'; filename="f.txt"'),
                    content,
                    b"Content-Type: application/octet-stream\r\n"
                    b"Content-Transfer-Encoding: binary\r\n",
                )
                for name, filename, content in parts
            ]
            body = cases.form(*blocks, boundary=boundary)
            head = b"Content-Type: multipart/form-data; boundary=" + boundary
            mail = read_mail(head + b"\r\n\r\n" + body)
            theirs = [
                (
                    part.get_param("name", header="content-disposition"),
                    part.get_filename(),
                    part.get_payload(decode=True),
                )
                for part in mail.iter_parts()
            ]
            self.assertEqual(theirs, parts, f"seed {seed}: the judge errs")
            self.assertEqual(read(boundary, [body]), parts, seed)


def _is_excused(form: Form, body: bytes) -> bool:
    padded = any(form.boundary + blank in body for blank in (b" ", b"\t"))
    return padded or bool(re.search(rb"\r\n[^:\r\n]*[!#$%&'*+.^`|~][^:\r\n]*:", body))


HEAD = (
    b"POST /upload?flowChunkNumber=1&a=%C3%A9 HTTP/1.1\r\nHost: localhost:8000\r\n"
    b"Content-Length: 11\r\nContent-Type: multipart/form-data; boundary=abc\r\n"
    b"Origin: http://localhost\r\nExpect: 100-continue\r\nX: y\r\n\r\n"
)
HEAD_PIECES = [b"Transfer-Encoding: chunked\r\n", b"Content-Length: 7\r\n", b"+", b"_"]
HEAD_PIECES += [
    b" HTTP/1.1",
    b"?",
    b"/",
    b"http://",
    b"*",
    b"POST",
    b"Host: x\r\n",
    b"\v",
]


class HeadFuzzTest(unittest.TestCase):
    def test_a_head_is_read_or_refused(self) -> None:
        results = {"read": 0, "refused": 0}
        for seed in range(SEED, SEED + BODIES // 4):
            dice = random.Random(seed)
            head = mutated(HEAD[:-4], dice.choice(HEAD_PIECES), dice) + b"\r\n\r\n"
            head = head[: head.index(b"\r\n\r\n") + 4]  # what the wire would give
            try:
                parsed = flowserver.parse_head(head)
            except flowserver.Malformed as error:
                self.assertIn(error.status, (400, 411, 414, 431, 501, 505))
                results["refused"] += 1
                continue
            except Exception as error:
                raise AssertionError(f"seed {seed}: {error!r} for {head!r}") from error
            results["read"] += 1
            self.check(head, parsed, seed)
        self.assertGreater(min(results.values()), BODIES // 100, results)

    def check(self, head: bytes, parsed: Any, seed: int) -> None:
        """What was read is unambiguous: one length, digits alone, whole lines."""
        lines = head[:-4].split(b"\r\n")
        names = [line.partition(b":")[0].lower() for line in lines[1:]]
        self.assertLessEqual(names.count(b"content-length"), 1, seed)
        self.assertNotIn(b"transfer-encoding", names, seed)
        self.assertNotRegex(b"\n".join(lines), rb"[\0\r]|\n[ \t]", seed)
        self.assertEqual(head.count(b"\n"), head.count(b"\r\n"), seed)
        if b"content-length" in names:
            said = lines[1 + names.index(b"content-length")].partition(b":")[2]
            self.assertEqual(b"%d" % parsed.length, said.strip().lstrip(b"0") or b"0")


class AppFuzzTest(unittest.TestCase):
    """The whole application, without a socket: an answer, and nothing left behind."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        values = flowserver.Settings(
            upload_dir=self.folder, sync=False, min_free_space=0, max_file_size="1M"
        )
        self.app = flowserver.UploadApp(values)

    def test_every_request_has_an_answer_and_a_reason(self) -> None:
        log = logging.getLogger("flowserver")
        seen = {}
        with self.assertNoLogs(log, logging.ERROR):
            for seed in range(SEED, SEED + BODIES // 20):
                dice = random.Random(seed)
                status, body = self.ask(dice)
                seen[status] = seen.get(status, 0) + 1
                self.assertIn(status, (200, 204, 400, 405, 408, 409, 413, 415), seed)
                if status >= 400:
                    self.assertGreater(len(json.loads(body)["error"]), 10)
        self.assertGreater(seen.get(200, 0), BODIES // 1000, seen)
        self.assertGreater(seen.get(415, 0), BODIES // 1000, seen)
        parts = list((self.folder / ".flowserver").rglob("*.part"))
        self.assertEqual(parts, [])

    def ask(self, dice: random.Random) -> tuple[int, bytes]:
        size = dice.randint(0, 20)
        fields = {
            "flowChunkNumber": "1",
            "flowChunkSize": "20",
            "flowCurrentChunkSize": str(size),
            "flowTotalSize": str(size),
            "flowIdentifier": f"{dice.randrange(50)}",
            "flowFilename": dice.choice(cases.NAMES),
        }
        if dice.random() < 0.5:
            junk = [
                "0",
                "2",
                "",
                "-1",
                "9" * 15,
                "\0",
                "é",
                "9" * 5000,
                *cases.NAMES[:30],
            ]
            fields[dice.choice(list(fields))] = dice.choice(junk)
        content, query = dice.randbytes(size), ""
        parts = [
            cases.part(f'form-data; name="{name}"'.encode(), text.encode())
            for name, text in fields.items()
        ]
        parts.append(cases.part(b"form-data; name=file; filename=x", content))
        body = cases.form(*parts)
        if dice.random() < 0.3:
            body = mutated(body, b"boundary", dice)
        headers = {"host": "localhost"}
        if dice.random() < 0.7:
            headers["content-type"] = "multipart/form-data; boundary=boundary"
        else:
            query, body = urllib.parse.urlencode(fields), content
        if dice.random() < 0.2:
            query = mutated(query.encode(), b"&", dice).decode("latin-1")
        blocks = split(body, dice)
        length = len(body) + dice.choice((0, 0, 0, 0, 0, 0, -1, 1, 9))
        method = dice.choice(("POST", "POST", "POST", "PUT", "PATCH", "GET", "DELETE"))
        response = self.app.handle(
            flowserver.Request(
                method,
                "/upload",
                query,
                headers,
                max(length, 0),
                lambda n: self.next_block(blocks, n),
                "127.0.0.1",
            )
        )
        return response.status, response.body

    def next_block(self, blocks: list[bytes], size: int) -> bytes:
        """Return no more than was asked for, as a file would."""
        if not blocks:
            return b""
        block = blocks.pop(0)
        if len(block) > size:
            blocks.insert(0, block[size:])
        return block[:size]


if __name__ == "__main__":
    unittest.main()
