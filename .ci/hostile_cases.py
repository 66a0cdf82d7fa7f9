"""Bad requests and bad bodies, as data.

The situations are those that the public tests of h11, of defnull's multipart and of
Werkzeug try, told in our own words and bytes, and those of the advisories that each row
names. What they expect of their own library is not always what a server that
keeps files must do; where we are stricter the row says what we answer.
"""

from __future__ import annotations

import urllib.parse
from typing import NamedTuple


class Head(NamedTuple):
    """A head that must be refused with one of `statuses`, and then closed."""

    name: str
    source: str
    head: bytes
    statuses: frozenset[int]


def _heads(statuses: str, *rows: tuple[str, str, bytes]) -> list[Head]:
    allowed = frozenset(map(int, statuses.split()))
    return [Head(name, source, head, allowed) for name, source, head in rows]


def _length(value: bytes) -> bytes:
    return (
        b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length:%s\r\n\r\n" % value
    )


def _with(lines: bytes) -> bytes:
    return b"POST /upload HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n"


_TWO = b"Content-Length: %b\r\nContent-Length: %b\r\n"
_CHUNKED = b"Transfer-Encoding: chunked\r\n"
_INT = "cpython int(), GHSA-v9pg-7xvm-68hf"
_TE = "h11 CVE-2025-43859"
_STD = "cpython#150499"

HEADS = [
    # Lengths. int() takes signs, underscores, blanks and digits of any script.
    *_heads(
        "400",
        ("two_lengths_that_differ", _STD, _with(_TWO % (b"0", b"28"))),
        ("two_lengths_the_other_way", _STD, _with(_TWO % (b"28", b"0"))),
        ("two_lengths_that_agree", "h11 test_headers", _with(_TWO % (b"0", b"0"))),
        (
            "three_lengths",
            "h11 test_headers",
            _with(_TWO % (b"1", b"1") + b"Content-Length: 2\r\n"),
        ),
        ("length_list_that_agrees", _STD, _length(b" 0, 0")),
        ("length_list_that_differs", _STD, _length(b" 0, 28")),
        ("length_with_plus", _INT, _length(b" +0")),
        ("length_with_minus", _INT, _length(b" -1")),
        ("length_of_minus_zero", _INT, _length(b" -0")),
        ("length_with_underscore", _INT, _length(b" 0_0")),
        ("length_with_blank_inside", _INT, _length(b" 0 0")),
        ("length_with_tab_inside", _INT, _length(b" 0\t0")),
        ("length_with_vertical_tab", _INT, _length(b" \x0b0")),
        ("length_with_no_break_space", _INT, _length(b" \xa00")),
        ("length_empty", "h11 test_headers", _length(b"")),
        ("length_of_words", "h11 test_headers", _length(b" asdf")),
        ("length_with_letter", "h11 test_headers", _length(b" 0x")),
        ("length_hexadecimal", _INT, _length(b" 0x0")),
        ("length_with_point", _INT, _length(b" 0.0")),
        ("length_with_exponent", _INT, _length(b" 0e0")),
        ("length_with_comma_before", _INT, _length(b" ,0")),
        ("length_in_quotes", _INT, _length(b' "0"')),
        ("length_superscript", _INT, _length(b" \xb2")),
        ("length_arabic_digit", _INT, _length(" ٤".encode())),
        ("length_of_400_digits", _INT, _length(b" " + b"9" * 400)),
        ("length_of_5000_digits", "CVE-2020-10735", _length(b" " + b"9" * 5000)),
        ("length_folded", _STD, _length(b"\r\n 0")),
    ),
    # Transfer-Encoding is never decoded.
    *_heads(
        "411",
        ("chunked", _TE, _with(_CHUNKED)),
        ("chunked_in_capitals", _TE, _with(b"TRANSFER-ENCODING: CHUNKED\r\n")),
        (
            "chunked_and_gzip",
            "h11 test_headers",
            _with(b"Transfer-Encoding: gzip, chunked\r\n"),
        ),
        ("gzip_alone", "h11 test_headers", _with(b"Transfer-Encoding: gzip\r\n")),
        ("identity", "Go CVE-2025-22871", _with(b"Transfer-Encoding: identity\r\n")),
        (
            "unknown_encoding",
            "Go CVE-2025-22871",
            _with(b"Transfer-Encoding: xchunked\r\n"),
        ),
        ("chunked_after_tab", _TE, _with(b"Transfer-Encoding:\tchunked\r\n")),
        ("length_and_encoding", _STD, _with(b"Content-Length: 0\r\n" + _CHUNKED)),
        ("encoding_and_length", _STD, _with(_CHUNKED + b"Content-Length: 0\r\n")),
        ("chunked_in_1_0", _TE, b"POST /upload HTTP/1.0\r\n" + _CHUNKED + b"\r\n"),
        (
            "chunked_get",
            _TE,
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + _CHUNKED + b"\r\n",
        ),
    ),
    *_heads(
        "400 411",
        ("encoding_empty", _TE, _with(b"Transfer-Encoding:\r\n")),
        (
            "two_encodings",
            "h11 test_headers",
            _with(_CHUNKED + b"Transfer-Encoding: gzip\r\n"),
        ),
    ),
    *_heads(
        "400",
        (
            "encoding_with_blank_before_colon",
            _STD,
            _with(b"Transfer-Encoding : chunked\r\n"),
        ),
        (
            "encoding_with_vertical_tab",
            _STD,
            _with(b"Transfer-Encoding\x0b: chunked\r\n"),
        ),
        (
            "encoding_behind_bare_lf",
            _STD,
            _with(b"X: y\nTransfer-Encoding: chunked\r\n"),
        ),
        (
            "encoding_behind_bare_cr",
            _STD,
            _with(b"X: y\rTransfer-Encoding: chunked\r\n"),
        ),
        ("encoding_behind_nul", _STD, _with(b"X: y\0Transfer-Encoding: chunked\r\n")),
        ("length_behind_bare_lf", _STD, _with(b"X: y\nContent-Length: 28\r\n")),
        ("length_with_blank_before_colon", _STD, _with(b"Content-Length : 28\r\n")),
    ),
    # Lines that readers understand in different ways.
    *_heads(
        "400",
        ("folded_with_blank", "h11 test_io", _with(b"X: a\r\n b\r\n")),
        ("folded_with_tab", "h11 test_io", _with(b"X: a\r\n\tb\r\n")),
        (
            "folded_first_line",
            "h11 test_io",
            b"GET / HTTP/1.1\r\n X: a\r\nHost: x\r\n\r\n",
        ),
        ("blank_before_colon", "h11 test_io", _with(b"foo  : line\r\n")),
        ("tab_before_colon", "h11 test_io", _with(b"foo\t: line\r\n")),
        ("empty_name", "h11 test_io", _with(b": line\r\n")),
        ("no_colon", "h11 test_io", _with(b"nothing\r\n")),
        ("blank_in_name", "h11 test_headers", _with(b"foo bar: baz\r\n")),
        ("nul_in_name", "h11 test_headers", _with(b"foo\0bar: baz\r\n")),
        ("control_in_name", "h11 test_headers", _with(b"foo\x01bar: baz\r\n")),
        ("eight_bits_in_name", "h11 test_headers", _with(b"foo\xffbar: baz\r\n")),
        ("bracket_in_name", "RFC 9110 5.6.2", _with(b"foo(bar): baz\r\n")),
        ("nul_in_value", "h11 test_io", _with(b"X: foo\0bar\r\n")),
        ("bare_cr_in_value", "h11 test_headers", _with(b"X: foo\rbar\r\n")),
        ("bare_lf_in_value", "h11 test_headers", _with(b"X: foo\nbar: baz\r\n")),
        ("bare_cr_at_the_end", _STD, _with(b"X: foo\r\r\n")),
        ("delete_in_value", "RFC 9110 5.5", _with(b"X: foo\x7fbar\r\n")),
        (
            "lines_end_with_lf",
            "h11 test_io",
            b"GET /health HTTP/1.1\nHost: localhost\n\n",
        ),
        (
            "first_line_ends_with_lf",
            _STD,
            b"GET /health HTTP/1.1\nHost: localhost\r\n\r\n",
        ),
        (
            "first_line_ends_with_cr",
            _STD,
            b"GET /health HTTP/1.1\rX: y\r\nHost: x\r\n\r\n",
        ),
        ("no_host", "RFC 9112 3.2", b"GET /health HTTP/1.1\r\nX: y\r\n\r\n"),
        ("two_hosts", "RFC 9112 3.2", _with(b"Host: example.com\r\n")),
        (
            "two_content_types",
            "parser differential",
            _with(b"Content-Type: a/b\r\n" * 2),
        ),
        (
            "two_logins",
            "parser differential",
            _with(b"Authorization: Basic YTph\r\n" * 2),
        ),
        ("two_origins", "parser differential", _with(b"Origin: null\r\n" * 2)),
    ),
    # First lines.
    *_heads(
        "400 405 414 431 501 505",
        ("no_version", "HTTP/0.9", b"GET /health\r\nHost: localhost\r\n\r\n"),
        (
            "garbage_after_version",
            "h11 test_io",
            b"GET /health HTTP/1.1 xx\r\nHost: x\r\n\r\n",
        ),
        ("version_in_small_letters", "h11", b"GET /health http/1.1\r\nHost: x\r\n\r\n"),
        (
            "version_with_three_numbers",
            "h11",
            b"GET /health HTTP/1.1.1\r\nHost: x\r\n\r\n",
        ),
        (
            "version_1_10",
            "cpython http.server",
            b"GET /health HTTP/1.10\r\nHost: x\r\n\r\n",
        ),
        (
            "version_with_sign",
            "cpython http.server",
            b"GET /health HTTP/+1.1\r\nHost: x\r\n\r\n",
        ),
        ("version_2", "RFC 9113 3.4", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        ("two_blanks", "RFC 9112 3", b"GET  /health HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("tabs_for_blanks", "RFC 9112 3", b"GET\t/health\tHTTP/1.1\r\nHost: x\r\n\r\n"),
        (
            "blank_first",
            "h11 early detection",
            b" GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
        ),
        ("no_method", "RFC 9112 3", b"/health HTTP/1.1\r\nHost: x\r\n\r\n"),
        (
            "method_with_bracket",
            "RFC 9110 9.1",
            b"G(T /health HTTP/1.1\r\nHost: x\r\n\r\n",
        ),
        (
            "method_in_small_letters",
            "RFC 9110 9.1",
            b"get /health HTTP/1.1\r\nHost: x\r\n\r\n",
        ),
        (
            "method_of_4000_letters",
            "RFC 9112 3",
            b"A" * 4000 + b" / HTTP/1.1\r\nHost: x\r\n\r\n",
        ),
        ("nul_in_target", "h11 test_io", b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("blank_in_target", "h11 test_io", b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("delete_in_target", "h11 test_io", b"GET /\x7f HTTP/1.1\r\nHost: x\r\n\r\n"),
        (
            "eight_bits_in_target",
            "h11 test_io",
            b"GET /\xee HTTP/1.1\r\nHost: x\r\n\r\n",
        ),
        ("bare_cr_in_target", "h11 test_io", b"GET /\rX HTTP/1.1\r\nHost: x\r\n\r\n"),
        (
            "target_without_slash",
            "RFC 9112 3.2",
            b"GET health HTTP/1.1\r\nHost: x\r\n\r\n",
        ),
        ("target_is_a_star", "RFC 9112 3.2.4", b"GET * HTTP/1.1\r\nHost: x\r\n\r\n"),
        (
            "target_of_another_scheme",
            "RFC 9112 3.2",
            b"GET file:///etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
        ),
        ("connect", "open proxy", b"CONNECT localhost:22 HTTP/1.1\r\nHost: x\r\n\r\n"),
    ),
    # Too much of it.
    *_heads(
        "400 414 431",
        (
            "target_of_70000_letters",
            "RFC 9112 3",
            b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 70000),
        ),
        (
            "header_of_70000_letters",
            "h11 max_incomplete_event_size",
            _with(b"X: %b\r\n" % (b"a" * 70000)),
        ),
        (
            "300_headers",
            "GHSA-pp6c-gr5w-3c5g",
            _with(b"".join(b"X%d: y\r\n" % n for n in range(300))),
        ),
        ("one_header_300_times", "GHSA-pp6c-gr5w-3c5g", _with(b"X: y\r\n" * 300)),
        (
            "no_end_in_200000_bytes",
            "h11 max_incomplete_event_size",
            b"GET / HTTP/1.1\r\nX: " + b"a" * 200000,
        ),
        ("no_line_in_200000_bytes", "h11 max_incomplete_event_size", b"A" * 200000),
    ),
]

# Not even the beginning of a request: refused before a line has ended (h11: "early
# detection of an invalid request").
EARLY = {
    "nul": b"\0",
    "blank": b" ",
    "tls_hello": b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03",
}

# What must be accepted: strictness that refuses these would be a fault, too.
_HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
GOOD_HEADS = {
    "nothing_but_a_line_in_1_0": b"GET /health HTTP/1.0\r\n\r\n",
    "a_header_in_1_0": b"GET /health HTTP/1.0\r\nSome: header\r\n\r\n",
    "empty_value": _HEALTH + b"X:\r\n\r\n",
    "value_of_blanks": _HEALTH + b"X: \t \t \r\n\r\n",
    "blanks_in_value": _HEALTH + b"X: a a a \r\n\r\n",
    "latin_1_in_value": _HEALTH + b"X: caf\xe9\r\n\r\n",
    "names_in_capitals": b"GET /health HTTP/1.1\r\nHOST: localhost\r\n\r\n",
    "no_blank_after_colon": b"GET /health HTTP/1.1\r\nHost:localhost\r\n\r\n",
    "absolute_target": _HEALTH.replace(b"/", b"http://localhost/", 1) + b"\r\n",
    "empty_lines_first": b"\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "length_of_zeros": _HEALTH + b"Content-Length: 00\r\n\r\n",
    "query": b"GET /health?a=b;c=d&%C3%A9 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "ninety_headers": _HEALTH
    + b"%b\r\n" % b"".join(b"X%d: y\r\n" % n for n in range(90)),
}


class Body(NamedTuple):
    """A form; `parts` are (name, filename, content), None when it must be refused."""

    name: str
    source: str
    body: bytes
    parts: list[tuple[str, str | None, bytes]] | None
    boundary: bytes = b"boundary"


def part(disposition: bytes, content: bytes = b"abc", more: bytes = b"") -> bytes:
    return b"Content-Disposition: " + disposition + b"\r\n" + more + b"\r\n" + content


def form(*parts: bytes, boundary: bytes = b"boundary") -> bytes:
    line = b"\r\n--" + boundary
    return b"".join([line + b"\r\n" + one for one in parts] + [line + b"--\r\n"])[2:]


_FILE = b'form-data; name="file1"; filename="random.png"'
_TEXT = b'form-data; name="text"'
_WERKZEUG = "werkzeug test_formparser"
_SANSIO = "werkzeug sansio"
_PUSH = "multipart test_push_parser"
_HELL = "test \\ \\\\ ; ö %22 = ;"

BODIES = [
    Body("one_file", _PUSH, form(part(_FILE)), [("file1", "random.png", b"abc")]),
    Body(
        "a_field_and_a_file",
        _SANSIO,
        form(
            part(b'form-data; name="fname"', "ß∑œß∂ƒå∂".encode()),
            part(b'form-data; name="lname"; filename="bob"', b"asdasd"),
        ),
        [("fname", None, "ß∑œß∂ƒå∂".encode()), ("lname", "bob", b"asdasd")],
    ),
    Body(
        "boundary_with_dashes",
        _SANSIO,
        form(part(_TEXT, b"longer than it\r\n--"), boundary=b"--boundary"),
        [("text", None, b"longer than it\r\n--")],
        b"--boundary",
    ),
    Body(
        "empty_field",
        _SANSIO,
        form(
            part(_TEXT, b"Some Text", b'Content-Type: text/plain; charset="UTF-8"\r\n'),
            part(_TEXT, b""),
        ),
        [("text", None, b"Some Text"), ("text", None, b"")],
    ),
    Body("no_parts_at_all", _WERKZEUG, b"--boundary--", []),
    Body(
        "no_line_end_after_the_end",
        _PUSH,
        form(part(_TEXT))[:-2],
        [("text", None, b"abc")],
    ),
    Body(
        "empty_lines_before",
        _WERKZEUG,
        b"\r\n\r\n" + form(part(_TEXT)),
        [("text", None, b"abc")],
    ),
    Body(
        "preamble",
        _PUSH,
        b"Lots of junk\r\n" + form(part(_TEXT)),
        [("text", None, b"abc")],
    ),
    Body("epilogue", _PUSH, form(part(_TEXT)) + b"junk", [("text", None, b"abc")]),
    Body(
        "lookalikes_of_boundaries",
        "werkzeug firefox3-2pnglongtext",
        form(part(_TEXT, b"--long text\r\n--with boundary\r\n--lookalikes--")),
        [("text", None, b"--long text\r\n--with boundary\r\n--lookalikes--")],
    ),
    Body(
        "boundary_without_line_end_before",
        _PUSH,
        form(part(_FILE, b"abc--boundary\r\nabc")),
        [("file1", "random.png", b"abc--boundary\r\nabc")],
    ),
    Body(
        "content_is_a_line_end",
        _PUSH,
        form(part(_TEXT, b"\r\n")),
        [("text", None, b"\r\n")],
    ),
    Body("content_is_a_cr", _PUSH, form(part(_TEXT, b"\r")), [("text", None, b"\r")]),
    Body(
        "content_is_half_a_boundary",
        _PUSH,
        form(part(_TEXT, b"\r\n--bound\r\n--boundar\r\n-")),
        [("text", None, b"\r\n--bound\r\n--boundar\r\n-")],
    ),
    Body(
        "every_byte",
        _PUSH,
        form(part(_FILE, bytes(range(256)) * 3)),
        [("file1", "random.png", bytes(range(256)) * 3)],
    ),
    Body(
        "names_from_hell",
        _PUSH,
        form(part(f'form-data; name="{_HELL}"; filename="{_HELL}"'.encode())),
        [(_HELL, _HELL, b"abc")],
    ),
    Body(
        "options_without_quotes",
        _PUSH,
        form(part(b"form-data; name=foo; filename=bar.txt")),
        [("foo", "bar.txt", b"abc")],
    ),
    Body(
        "capital_letters",
        "multipart test_header_utils",
        form(part(b'Form-Data; Name="a"; FileName="b"')),
        [("a", "b", b"abc")],
    ),
    Body(
        "blanks_everywhere",
        "multipart test_header_utils",
        form(part(b'form-data ; name="a" ; filename="b" ')),
        [("a", "b", b"abc")],
    ),
    Body(
        "empty_filename",
        _WERKZEUG,
        form(part(b'form-data; name="f"; filename=""', b"")),
        [("f", "", b"")],
    ),
    Body(
        "quote_in_name",
        "multipart test_header_utils",
        form(part(b'form-data; name="a\\"b"')),
        [('a"b', None, b"abc")],
    ),
    Body(
        "path_as_filename",
        "werkzeug ie7_full_path",
        form(part(b'form-data; name="a"; filename="C:\\x\\y.doc"')),
        [("a", "C:\\x\\y.doc", b"abc")],
    ),
    Body(
        "backslash_before_the_quote",
        "WHATWG HTML",
        form(part(b'form-data; name="a"; filename="C:\\"')),
        [("a", "C:\\", b"abc")],
    ),
    Body(
        "encoded_filename_is_no_filename",
        "GHSA-vffw-93wf-4j4q",
        form(part(b"form-data; name=a; filename*=UTF-8''b")),
        [("a", None, b"abc")],
    ),
    Body(
        "encoded_filename_loses",
        "GHSA-vffw-93wf-4j4q",
        form(part(b"form-data; name=a; filename=c; filename*=UTF-8''b")),
        [("a", "c", b"abc")],
    ),
    Body(
        "continued_filename_is_no_filename",
        "werkzeug rfc2231",
        form(part(b"form-data; name=a; filename*0=b; filename*1=c")),
        [("a", None, b"abc")],
    ),
    Body(
        "other_headers",
        _WERKZEUG,
        form(
            part(
                _FILE, b"abc", b"X-Custom-Header: blah\r\nContent-Type: text/plain\r\n"
            )
        ),
        [("file1", "random.png", b"abc")],
    ),
    Body(
        "disposition_last",
        _PUSH,
        form(b"Content-Type: image/png\r\n" + part(_FILE)),
        [("file1", "random.png", b"abc")],
    ),
    Body(
        "blanks_after_the_boundary",
        "RFC 2046 5.1.1",
        b"--boundary \t\r\n" + part(_TEXT) + b"\r\n--boundary--",
        [("text", None, b"abc")],
    ),
    Body(
        "one_letter_boundary",
        "RFC 2046 5.1.1",
        form(part(_TEXT, b"b--b\r\n-b"), boundary=b"b"),
        [("text", None, b"b--b\r\n-b")],
        b"b",
    ),
    Body(
        "boundary_of_70",
        "CVE-2016-3092",
        form(part(_TEXT), boundary=b"b" * 70),
        [("text", None, b"abc")],
        b"b" * 70,
    ),
    Body(
        "two_hundred_parts",
        "CVE-2023-25577",
        form(*[part(_TEXT, b"")] * 200),
        [("text", None, b"")] * 200,
    ),
    # What must be refused.
    Body("nothing", _WERKZEUG, b"", None),
    Body("no_form", _PUSH, b"Not a multipart message", None),
    Body("another_boundary", _PUSH, form(part(_TEXT), boundary=b"nonsense"), None),
    Body(
        "ends_in_the_content",
        "uploadserver M3, " + _WERKZEUG,
        form(part(_FILE))[:-14],
        None,
    ),
    Body("ends_in_the_boundary", _PUSH, form(part(_FILE))[:-6], None),
    Body("ends_before_the_dashes", _PUSH, form(part(_FILE))[:-4], None),
    Body("ends_between_the_dashes", _PUSH, form(part(_FILE))[:-3], None),
    Body("ends_after_a_boundary_line", _PUSH, b"--boundary\r\n", None),
    Body("ends_in_a_header", _PUSH, b"--boundary\r\nHeader: value", None),
    Body(
        "boundary_in_a_header",
        _PUSH,
        b"--boundary\r\nHeader: value\r\n--boundary--",
        None,
    ),
    Body(
        "boundary_after_a_header",
        _PUSH,
        b"--boundary\r\nHeader: value\r\n\r\n--boundary--",
        None,
    ),
    Body("part_without_anything", _PUSH, b"--boundary\r\n--boundary--", None),
    Body(
        "part_without_headers",
        _WERKZEUG,
        b"--boundary\r\n\r\nHello World\r\n--boundary--",
        None,
    ),
    Body(
        "no_end_after_the_content",
        _PUSH,
        form(part(_FILE))[:-16] + b"--boundary--",
        None,
    ),
    Body(
        "lines_end_with_lf", _WERKZEUG, form(part(_TEXT)).replace(b"\r\n", b"\n"), None
    ),
    Body(
        "lines_end_with_cr", _WERKZEUG, form(part(_TEXT)).replace(b"\r\n", b"\r"), None
    ),
    Body(
        "lf_after_the_boundary",
        _PUSH,
        b"--boundary\n" + part(_TEXT) + b"\r\n--boundary--",
        None,
    ),
    Body("lf_in_a_header", _PUSH, form(b"foo: bar\nbar: baz\r\n" + part(_TEXT)), None),
    Body("cr_in_a_header", _PUSH, form(b"foo: bar\rbar: baz\r\n" + part(_TEXT)), None),
    Body("nul_in_a_header", _PUSH, form(b"foo: bar\0\r\n" + part(_TEXT)), None),
    Body(
        "boundary_inside_the_preamble",
        _PUSH,
        b"Preamble\n" + form(part(_FILE), part(_TEXT)),
        None,
    ),
    Body(
        "text_after_the_boundary", _PUSH, b"--boundaryy\r\n" + form(part(_TEXT)), None
    ),
    Body(
        "text_after_an_inner_boundary",
        _PUSH,
        form(part(_TEXT, b"a\r\n--boundaryX\r\nb")),
        None,
    ),
    Body("header_without_colon", _PUSH, form(b"Bad header\r\n" + part(_TEXT)), None),
    Body("header_without_name", _PUSH, form(b":empty-name\r\n" + part(_TEXT)), None),
    Body(
        "blank_in_header_name",
        _PUSH,
        form(b"Bad header: value\r\n" + part(_TEXT)),
        None,
    ),
    Body(
        "nul_in_header_name", _PUSH, form(b"Bad\0header: value\r\n" + part(_TEXT)), None
    ),
    Body(
        "umlaut_in_header_name",
        _PUSH,
        form("Bäd: value\r\n".encode() + part(_TEXT)),
        None,
    ),
    Body("blank_before_colon", _PUSH, form(b"Header : value\r\n" + part(_TEXT)), None),
    Body(
        "bad_utf_8_in_header",
        _PUSH,
        form(b"X: bad\xc3\x28value\r\n" + part(_TEXT)),
        None,
    ),
    Body(
        "bad_utf_8_in_filename",
        _PUSH,
        form(part(b'form-data; name="a"; filename="\xff"')),
        None,
    ),
    Body("folded_header", _PUSH, form(part(b'form-data;\r\n\tname="foo"')), None),
    Body("folded_first_header", _PUSH, form(b"\tbad: header\r\n" + part(_TEXT)), None),
    Body(
        "folded_rfc2231",
        "werkzeug rfc2231",
        form(
            part(b"form-data; name=a;\r\n\tfilename*0*=ascii''a%20b;\r\n\tfilename*1=c")
        ),
        None,
    ),
    Body(
        "header_of_9000_bytes",
        "GHSA-pp6c-gr5w-3c5g",
        form(b"X: " + b"x" * 9000 + b"\r\n" + part(_TEXT)),
        None,
    ),
    Body(
        "header_without_end",
        "GHSA-pp6c-gr5w-3c5g",
        b"--boundary\r\nX: " + b"x" * 40000,
        None,
    ),
    Body(
        "headers_2000",
        "GHSA-pp6c-gr5w-3c5g",
        form(b"".join(b"X%d: y\r\n" % n for n in range(2000)) + part(_TEXT)),
        None,
    ),
    Body(
        "two_dispositions",
        "parser differential",
        form(b"Content-Disposition: form-data; name=b\r\n" + part(_TEXT)),
        None,
    ),
    Body("no_disposition", _PUSH, form(b"Content-Type: image/png\r\n\r\nabc"), None),
    Body("other_disposition", _PUSH, form(part(b'mixed; name="a"')), None),
    Body(
        "form_field_disposition", _WERKZEUG, form(part(b'form-field; name="a"')), None
    ),
    Body(
        "attachment_disposition",
        "RFC 6266",
        form(part(b'attachment; filename="a"')),
        None,
    ),
    Body("disposition_without_name", _PUSH, form(part(b"form-data")), None),
    Body("disposition_with_semicolon_alone", _PUSH, form(part(b"form-data;")), None),
    Body("name_without_value", _PUSH, form(part(b"form-data; name")), None),
    Body(
        "name_twice",
        "CVE-2024-53981 class",
        form(part(b'form-data; name="a"; name="b"')),
        None,
    ),
    Body(
        "filename_twice",
        "parser differential",
        form(part(b'form-data; name="a"; filename="b"; filename="c"')),
        None,
    ),
    Body(
        "quote_without_end", "CVE-2026-28356", form(part(b'form-data; name="a')), None
    ),
    Body(
        "text_after_the_quote",
        "CVE-2026-28356",
        form(part(b'form-data; name="a"b')),
        None,
    ),
    Body(
        "comma_for_semicolon",
        "parser differential",
        form(part(b'form-data, name="a"')),
        None,
    ),
    Body(
        "base64",
        _WERKZEUG,
        form(part(_FILE, b"YWJj", b"Content-Transfer-Encoding: base64\r\n")),
        None,
    ),
    Body(
        "quoted_printable",
        _WERKZEUG,
        form(part(_FILE, b"a=62c", b"Content-Transfer-Encoding: quoted-printable\r\n")),
        None,
    ),
    Body(
        "two_hundred_and_one_parts",
        "CVE-2023-25577",
        form(*[part(_TEXT, b"")] * 201),
        None,
    ),
    Body(
        "preamble_of_10000",
        "CVE-2024-53981",
        b"x" * 10000 + b"\r\n" + form(part(_TEXT)),
        None,
    ),
    Body("epilogue_of_10000", "CVE-2026-40347", form(part(_TEXT)) + b"x" * 10000, None),
    Body(
        "line_ends_before_10000",
        "CVE-2024-53981",
        b"\r\n" * 5000 + form(part(_TEXT)),
        None,
    ),
]

# Values of Content-Type that hold no boundary that may be used.
BAD_BOUNDARIES = {
    "missing": "multipart/form-data",
    "empty": "multipart/form-data; boundary=",
    "empty_in_quotes": 'multipart/form-data; boundary=""',
    "of_71": "multipart/form-data; boundary=" + "b" * 71,
    "of_70000": "multipart/form-data; boundary=" + "b" * 70000,
    "ends_in_blank": 'multipart/form-data; boundary="b "',
    "with_at": 'multipart/form-data; boundary="b@b"',
    "with_star": "multipart/form-data; boundary=b*b",
    "with_line_end": 'multipart/form-data; boundary="b\r\nb"',
    "with_umlaut": 'multipart/form-data; boundary="ö"',
    "twice": "multipart/form-data; boundary=a; boundary=b",
    "without_end": 'multipart/form-data; boundary="b',
    "of_mixed": "multipart/mixed; boundary=b",
    "of_fantasy": "multipart/fantasy; boundary=b",
    "encoded": "multipart/form-data; boundary*=UTF-8''b",
}

# Names that clients may send for a file: it is refused, or stored below the upload
# folder under a name that every system can hold.
NAMES = [
    *("../x", "..", "a/../../x", "a/..", "./../x", ".. /x", " ../x", "../ x", "...//x"),
    *("..\\x", "a\\..\\..\\x", "a/..\\../x", "....//x", "..%2fx", "..\0/x", "\0../x"),
    *("/etc/passwd", "//etc/passwd", "\\etc\\passwd", "~/x", "~root/x", "$HOME/x"),
    *("C:\\x", "C:x", "C:/x", "c:", "\\\\server\\share\\x", "\\\\?\\C:\\x", "//./COM1"),
    *("", ".", "/", "\\", "a/", "a\\", "a//b", "./a", "a/./b", " ", "  /x", "a/ /b"),
    *("con", "CON", "Con.txt", "nul", "nul.tar.gz", "NUL .txt", "aux.", "prn ", "com1"),
    *("COM1.txt", "com¹", "COM².log", "lpt³.a.b", "LPT9", "com0", "conin$", "CONOUT$"),
    *(
        "clock$",
        "a/nul/b",
        "nul/b",
        "a/com1.d/b",
        "aux:x",
        "con\u0301",
        "ＣＯＮ",
        "nul\0",
    ),
    *("x.", "x..", "x ", "x. .", "...", ". .", "x./y", "x /y", "x.\u00a0", ".x", "..x"),
    *("a:b", "a.txt:stream", "a.txt::$DATA", ":", "a|b", "a<b>", "a*b", "a?b", 'a"b'),
    *("a\0b", "a\nb", "a\rb", "a\r\nb", "\n", "a\tb", "a\x1bb", "a\x7fb", "a\x85b"),
    *("a\u202etxt.exe", "a\u2066b", "a\u200eb", "a\u2028b", "a\ufeffb", "a\u00adb"),
    *(".flowserver", ".flowserver/x", ".flowserver/v2/x", ".FLOWSERVER/x"),
    *(".flowserver./x", ".flowserver /x", " .flowserver/x", "./.flowserver/x"),
    *(".flow\u200cserver/x", ".flow\u206aserver/x", ".flow\ufeffserver/x"),
    *(".flow\u017ferver/x", "FLOWSE~1/x", "flowse~2/v2/x", "a/../.flowserver/x"),
    *(
        "e\u0301",
        "é",
        "\u1100\u1161",
        "日本語.txt",
        "👩\u200d👩\u200d👧.png",
        "a" * 300,
    ),
    *(
        "é" * 200,
        "a" * 254 + " b",
        "a" * 254 + ".b",
        "a" * 250 + ".tar.gz",
        "." + "a" * 300,
    ),
    *(
        "a" * 253 + ". .x",
        "x." + "y" * 300,
        "/".join("a" * 41),
        "/".join(["a" * 200] * 20),
    ),
    *(
        "a/" * 5000 + "b",
        "a" * 60000,
        "." * 60000,
        "." * 60000 + "x",
        " " * 60000 + "x",
    ),
    *(
        "x" + "." * 60000,
        "\u0301\u0323" * 8000,
        "/" * 60000 + "x",
        "a" * 248 + " (1).pdf",
    ),
    *("-rf", "--help", "a;rm -rf .", "$(id)", "`id`", "%00", "%2e%2e%2fx", "<script>"),
    *("con.", "nul .", "com1 .x", "lpt1\u00a0", "CLOCK$.txt", "conin$.txt", "a/b/../c"),
]


def other_ways(*lines: str) -> list[bytes]:
    """Return requests that store a file, or try to, without parameters of a chunk."""
    more = "".join(f"{line}\r\n" for line in lines).encode("latin-1")
    body = form(part(b"form-data; name=f; filename=other.txt", b"hello"))
    kind = b"Content-Type: multipart/form-data; boundary=boundary\r\n"

    def written(first: bytes, head: bytes = b"", body: bytes = b"hello") -> bytes:
        length = b"Content-Length: %d\r\n\r\n" % len(body)
        first += b" HTTP/1.1\r\nHost: localhost\r\n"
        return first + more + head + length + body

    tus = b"Tus-Resumable: 1.0.0\r\n"
    return [
        written(b"POST /upload", kind, body),
        written(b"PUT /upload/other.txt"),
        written(b"POST /upload", b"Content-Disposition: form-data; filename=other\r\n"),
        written(
            b"POST /upload",
            b"Content-Range: bytes 0-4/5\r\n"
            b"Content-Disposition: attachment; filename=other\r\n",
        ),
        written(b"POST /upload", tus + b"Upload-Length: 5\r\n", b""),
        written(
            b"POST /upload",
            tus
            + b"Upload-Length: 5\r\nContent-Type: application/offset+octet-stream\r\n",
        ),
        written(
            b"POST /upload",
            kind + b"Upload-Length: 5\r\n",
            form(part(b"form-data; name=filepond", b"{}")),
        ),
        written(
            b"PATCH /upload?patch=%b-5" % (b"0" * 32),
            b"Upload-Offset: 0\r\nUpload-Length: 5\r\nUpload-Name: other\r\n",
        ),
        written(
            b"POST /upload?dzuuid=%b&dzchunkindex=0&dzchunksize=5&dztotalfilesize=5"
            b"&dztotalchunkcount=1&dzchunkbyteoffset=0" % (b"0" * 32),
            kind,
            body,
        ),
        written(
            b"POST /upload?qquuid=%b&qqfilename=other&qqtotalfilesize=5" % (b"0" * 32)
        ),
    ]


def _words(prefix: str) -> dict[str, tuple[str, str]]:
    """Return what flow.js and those after it send, by what it means."""
    values = {
        "number": ("ChunkNumber", "1"),
        "nominal": ("ChunkSize", "5"),
        "length": ("CurrentChunkSize", "5"),
        "total": ("TotalSize", "10"),
        "identifier": ("Identifier", "10-x"),
        "name": ("Filename", "x"),
        "path": ("RelativePath", "x"),
        "count": ("TotalChunks", "2"),
    }
    return {
        role: (prefix + word if prefix else word[0].lower() + word[1:], value)
        for role, (word, value) in values.items()
    }


_UUID = "0f8fad5b-d9cb-469f-a165-70867728950e"
# The first of two chunks of 5 bytes each, in the words of each library.
CHUNKS = {
    "flow": _words("flow"),
    "resumable": _words("resumable"),
    "simple": _words(""),
    "Dropzone": {
        "identifier": ("dzuuid", _UUID),
        "number": ("dzchunkindex", "0"),
        "total": ("dztotalfilesize", "10"),
        "nominal": ("dzchunksize", "5"),
        "count": ("dztotalchunkcount", "2"),
        "start": ("dzchunkbyteoffset", "0"),
    },
    "Fine Uploader": {
        "number": ("qqpartindex", "0"),
        "start": ("qqpartbyteoffset", "0"),
        "length": ("qqchunksize", "5"),
        "count": ("qqtotalparts", "2"),
        "total": ("qqtotalfilesize", "10"),
        "name": ("qqfilename", "x"),
        "folder": ("qqpath", "a"),
        "identifier": ("qquuid", _UUID),
    },
    "Plupload": {
        "name": ("name", "x"),
        "start": ("offset", "0"),
        "total": ("total", "10"),
    },
}


def first_chunk(library: str, **changes: str | None) -> str:
    """Return the query of a library's first chunk, with other values, or without."""
    pairs = [
        (name, changes.get(role, value))
        for role, (name, value) in CHUNKS[library].items()
    ]
    return urllib.parse.urlencode([pair for pair in pairs if pair[1] is not None])


# Of a body of 5 bytes.
BAD_RANGES = [
    *("", "bytes", "bytes 0-4", "bytes 0-4/*", "bytes */10", "0-4/10", "items 0-4/10"),
    *("bytes 0-3/10", "bytes 0-5/10", "bytes 4-0/10", "bytes 0-4/4", "bytes 6-10/10"),
    *("bytes 10-14/10", "bytes -1-3/10", "bytes 0--4/10", "bytes +0-4/10"),
    *("bytes 0-4/10, 5-9/10", "bytes 0-4/10;", "bytes  0-4/10", "bytes 0-4/0x10"),
    "bytes 0-4/" + "9" * 16,
    f"bytes {10**14}-{10**14 + 4}/{10**14}",
]
