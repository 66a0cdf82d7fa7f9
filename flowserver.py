#!/usr/bin/env python3
"""flowserver: the server half of chunked, resumable browser uploads, in one file.

Run it, open the address that it prints, drop files on the page:

    python flowserver.py

Point an uploader at it (flow.js: ``target: "http://127.0.0.1:8000/upload"``), or call
it from your own program, with or without a web framework:

    from flowserver import Settings, UploadApp
    uploads = UploadApp(Settings(upload_dir="uploads"), on_complete=print)
    uploads.handle(request)     # Request -> Response, no socket needed
    application = uploads       # the same thing as a WSGI application

What was answered 200 is on disk, whole, once.  Chunks are written in place while they
arrive, in any order and any number at a time; a file appears under its name at once
and whole, or not at all.  Nothing but the standard library is imported.

It speaks what flow.js, resumable.js, simple-uploader.js, Dropzone, Fine Uploader,
Plupload, blueimp, react-uploady, Uppy, tus and FilePond send, forms, and PUT.  It does
not list or hand out uploaded files, remove them, unpack archives, or speak S3.

Glossary.  A *chunk* is a range of bytes of an upload; a *part* is a piece of a
multipart body; a *block* is bytes as they came off the wire; a *range* is [start, end)
in bytes; an *index* counts from 0, a *number* from 1; an *owner* is whose upload it is,
a *sender* who sends it when nobody owns it.
"""

# Copyright (c) 2026 the flowserver founders
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this
# software and associated documentation files (the "Software"), to deal in the Software
# without restriction, including without limitation the rights to use, copy, modify,
# merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
# permit persons to whom the Software is furnished to do so, subject to the following
# conditions: The above copyright notice and this permission notice shall be included in
# all copies or substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,
# INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A
# PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT
# HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
# CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE
# OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

from __future__ import annotations

__version__ = "1.1.0"
# fmt: off
__all__ = [
    "Body", "Conflict", "Disk", "Done", "FlowError", "FlowHandler", "FlowHandlerMixin",
    "FlowServer", "Forbidden", "Incoming", "Malformed", "MultipartParser", "Part",
    "Progress", "Request", "Response", "Settings", "SettingsError", "Status", "Store",
    "TooLarge", "Trouble", "Truncated", "Unauthorized", "Upload", "UploadApp", "Whole",
    "boundary_of", "create_app", "find_config", "load_settings", "main", "safe_path",
    "upload_key", "wsgi_request",
]
# fmt: on

import argparse
import base64
import bisect
import configparser
import contextlib
import email.utils
import errno
import functools
import getpass
import hashlib
import hmac
import html
import http.client
import http.server
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import os
import queue
import re
import secrets
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import types
import unicodedata
import urllib.parse
import zlib
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Collection,
    Generic,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Sequence,
    TypeVar,
    Union,
)

A = TypeVar("A")
T = TypeVar("T")

# ---- errors --------------------------------------------------------------------------
# Law: the class says what kind of trouble it is and with which status it is answered,
# the message is one sentence that may be shown to anybody, the cause is for the log.


class FlowError(Exception):
    """The base of every error that flowserver raises on purpose."""

    status = 503
    is_final = True  # sending the same again won't help


class Malformed(FlowError):
    """The request contradicts itself or its protocol."""

    status = 400


class Truncated(Malformed):
    """The body ended before it was whole; sent again, it may be."""

    status = 408
    is_final = False


class LengthRequired(Malformed):
    """The request does not say how long its body is."""

    status = 411


class HeadTooLong(Malformed):
    """The head of the request is longer than we take."""

    status = 431


class TooLarge(FlowError):
    """A limit of ours is exceeded for good."""

    status = 413


class Conflict(FlowError):
    """Two versions under one identifier, or a name that is taken: refused for good."""

    status = 409


class Forbidden(FlowError):
    """This client may not do this here."""

    status = 403


class Unauthorized(FlowError):
    """Nobody, or a wrong name or password, where a login is required."""

    status = 401
    is_final = False


class Missing(FlowError):
    """There is nothing at this address."""

    status = 404


class BadMethod(FlowError):
    """The address is right, the method is not."""

    status = 405


class Trouble(FlowError):
    """A passing trouble of this machine, such as a full disk: trying later may help."""

    is_final = False


class SettingsError(FlowError):
    """A setting that can't be understood; the sentence names where it stands."""


def reason_of(error: BaseException | None) -> str:
    """Return in one line what is wrong: of the system's errors their words alone."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())


class explained:
    """Within it an error of the operating system becomes a sentence for people."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno == errno.EFBIG:
            sentence = "The file is larger than this disk's files can be."
            raise TooLarge(sentence) from error
        words = _SENTENCES.get(error.errno or 0)
        raise Trouble(words or f"The disk reports: {error.strerror}.") from error


_SENTENCES = {
    errno.ENOSPC: "The disk is full; what is stored so far is kept.",
    getattr(errno, "EDQUOT", -1): "The disk quota is used up; what is stored is kept.",
    errno.EROFS: "The upload folder is read-only at the moment.",
    errno.EACCES: "The server may not write to the upload folder.",
    errno.EPERM: "The server may not write to the upload folder.",
    errno.EEXIST: "A file is where a folder should be.",
    errno.ENOTDIR: "A file is where a folder should be.",
    errno.ENOENT: "The upload folder is gone (is its disk mounted?).",
    errno.EMFILE: "The server has too many open files at the moment.",
    errno.ENFILE: "The machine has too many open files at the moment.",
    errno.EIO: "The disk reports an error.",
    errno.EXDEV: "The file's folder is on another file system than the upload folder.",
}


# ---- settings ------------------------------------------------------------------------
# Law: each setting stands once, in the class below, with its section, reader, default
# and sentence.  The flags and --help are made from it; the tests make the shipped
# conf.ini and the README's table from it, and compare.

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_TIMES = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_FLAGS = configparser.ConfigParser.BOOLEAN_STATES  # on, yes, true, 1 and so on


def _matched(pattern: str, value: str, example: str) -> re.Match[str]:
    match = re.fullmatch(pattern, value)
    if not match:
        raise ValueError(f"is not {example}")
    return match


def _like(pattern: str, example: str) -> Callable[[str], str]:
    return lambda value: _matched(pattern, value, example)[0]


def _choice(*choices: str) -> Callable[[str], str]:
    return _like("|".join(choices), "one of " + ", ".join(choices))


def _path(value: str) -> str:
    path = os.path.expanduser(os.path.expandvars(value))
    unset = re.search(r"\$\{?\w+\}?" + r"|%\w+%" * (os.name == "nt"), path)
    if unset:
        raise ValueError(f"names {unset[0]}, which is not set")
    return path


def _required_path(value: str) -> str:
    return _path(_matched(".+", value, "a folder")[0])


def _number(value: str) -> int:
    return int(_matched("[0-9]{1,9}", value, "a whole number such as 1000")[0])


def _port(value: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", value) or int(value) > 65535:
        raise ValueError("is not a port from 0 to 65535")
    return int(value)


def _size(value: str) -> int:
    number = r"[0-9]{1,15}|[0-9]{1,9}\.[0-9]{1,3}(?= ?[KMGT])"
    pattern, example = f"({number}) ?([KMGT]?)(?:I?B)?", "a size such as 64000 or 1.5G"
    match = _matched(pattern, value.upper(), example)
    return int(float(match[1]) * _UNITS[match[2]])


def _chunk_size(value: str) -> int:
    return _size(_matched(".*[1-9].*", value, "a size of 1 byte or more")[0])


def _seconds(value: str) -> int:
    pattern, example = "([0-9]{1,15}) ?([smhd]?)", "a time such as 90, 30s, 12h or 2d"
    match = _matched(pattern, value.lower(), example)
    return int(match[1]) * _TIMES[match[2]]


def _flag(value: str) -> bool:
    return _FLAGS[_matched("|".join(_FLAGS), value.lower(), "on or off")[0]]


def _names(value: str) -> tuple[str, ...]:
    return tuple(name for name in re.split(r"[\s,]+", value) if name)


def _networks(value: str) -> tuple[Any, ...]:
    try:
        return tuple(ipaddress.ip_network(name, strict=False) for name in _names(value))
    except ValueError as error:
        raise ValueError("is not a list such as 127.0.0.1, 10.0.0.0/8") from error


def _list_of(pattern: str, example: str) -> Callable[[str], tuple[str, ...]]:
    read = _like(pattern, f"a list of {example}")
    return lambda value: tuple(map(read, _names(value.lower())))


# Pages of applications come from file://.
_origin = r"\*|null|file://|[^:/]+://[^/]+"
_origins = _list_of(_origin, "origins such as https://example.com")
_hosts = _list_of(r"([^:/]+|\[[^/]+\])(:[0-9]+)?", "host names such as example.com")


class Setting(Generic[T]):
    """One row of the table: read from text, typed where it is used."""

    def __init__(
        self, section: str, read: Callable[[str], T], default: str, sentence: str
    ) -> None:
        self.section = section
        self.read = read
        self.default = default
        self.sentence = sentence

    def __get__(self, instance: Any, owner: Any = None) -> T:
        """Say what type it has; the value itself is an attribute of the instance."""
        raise AttributeError("Only a Settings() has values.")

    if TYPE_CHECKING:

        def __set__(
            self, _: Any, value: T | str | Iterable[str] | os.PathLike[str] | None
        ) -> None:
            """Say what a Settings() may be given; nothing is set later."""

    def parse(self, text: str, where: str, folder: str = "") -> Any:
        """Return the value of `text`, a path relative to `folder`.

        Raises SettingsError, naming `where` it stood.
        """
        try:
            value: Any = self.read(text.strip())
        except ValueError as error:
            raise SettingsError(f'{where}: "{text}" {error}.') from error
        is_path = value and self.read in (_path, _required_path)
        return os.path.join(folder, value) if is_path else value


if TYPE_CHECKING:  # checkers and editors have it; it makes rows parameters (PEP 681)
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_):
        return lambda thing: thing


@dataclass_transform(kw_only_default=True, frozen_default=True)
class _Checked:
    def __init__(self, **values: object) -> None:
        table = settings_table()
        for name in values:
            if name not in table:
                raise SettingsError(f'There is no setting "{name}".')
        for name, setting in table.items():
            text = _as_text(values.get(name, setting.default))
            vars(self)[name] = setting.parse(text, name)


class Settings(_Checked):
    """Everything that can be set, checked: ``Settings(upload_dir="in", sync=False)``.

    Keyword arguments are the keys of conf.ini; values are text as written there ("8M"),
    or plain numbers, booleans and lists.  Raises SettingsError.
    """

    # fmt: off
    host: Setting[str] = Setting("server",
        _like(r"\S+", "an address such as 0.0.0.0"), "127.0.0.1",
        "Address to listen on; 0.0.0.0 means every address of this machine.")
    port: Setting[int] = Setting("server", _port, "8000",
        "Port to listen on; 0 means any free one.")
    upload_path: Setting[str] = Setting("server",
        _like(r"/(?!\Z|health\Z|sample/)[^\s?#%]+", "a free path such as /upload"),
        "/upload", "Path of the address that chunks are sent to.")
    sample_dir: Setting[str] = Setting("server", _path, "sample",
        "Folder of sample pages, served under /sample/; empty turns it off.")
    certificate: Setting[str] = Setting("server", _path, "",
        "PEM file with the certificate chain; TLS is on when private_key is set too.")
    private_key: Setting[str] = Setting("server", _path, "",
        "PEM file with the private key of the certificate.")
    max_connections: Setting[int] = Setting("server", _number, "1000",
        "Connections at one time, 0: no limit; the longest idle one gives way.")
    timeout: Setting[int] = Setting("server", _seconds, "60s",
        "Longest wait for a request's head, for its next block, and between requests.")
    trusted_proxies: Setting[tuple[Any, ...]] = Setting("server", _networks, "",
        "Addresses or networks whose X-Forwarded-For, -Host and -Proto are believed.")

    upload_dir: Setting[str] = Setting("storage", _required_path, "uploads",
        "Folder for finished files.")
    temp_dir: Setting[str] = Setting("storage", _path, "",
        "Folder for unfinished uploads, on the same file system; empty means"
        " .flowserver inside upload_dir.")
    sync: Setting[bool] = Setting("storage", _flag, "on",
        "Flush to the disk before answering, so that a power cut loses nothing.")
    on_conflict: Setting[str] = Setting("storage",
        _choice("rename", "replace", "refuse"), "rename",
        "What to do when the name is taken: rename, replace or refuse.")
    stale_after: Setting[int] = Setting("storage", _seconds, "7d",
        "Unfinished uploads without activity for this long are removed; 0: never.")
    keep_receipts: Setting[int] = Setting("storage", _seconds, "1h",
        "How long a finished upload is remembered, to answer repeated chunks.")
    min_free_space: Setting[int] = Setting("storage", _size, "100M",
        "New uploads are refused when they would leave less free space than this.")

    max_file_size: Setting[int] = Setting("limits", _size, "0",
        "Largest file in bytes; 0 means no limit.")
    max_chunk_size: Setting[int] = Setting("limits", _size, "0",
        "Largest chunk in bytes; 0 means no limit.")
    max_uploads: Setting[int] = Setting("limits", _number, "10000",
        "Unfinished uploads at one time; 0 means no limit.")

    chunk_size: Setting[int] = Setting("client", _chunk_size, "1M",
        "Chunk size that the built-in page uses.")
    parameter_prefix: Setting[str] = Setting("client", str, "",
        "Prefix of the parameters (resumable.js: parameterNamespace), beside the known"
        " names.")

    users_file: Setting[str] = Setting("access", _path, "",
        "File of name:hash lines made by --add-user; empty means no login.")
    allow_origins: Setting[tuple[str, ...]] = Setting("access", _origins, "",
        "Other origins whose pages may upload, such as https://example.com.")
    allow_hosts: Setting[tuple[str, ...]] = Setting("access", _hosts, "",
        "Host names that requests may ask for; empty means any, but only loopback"
        " names when host is a loopback address.")

    log_file: Setting[str] = Setting("log", _path, "",
        "File for the log, beside stderr; empty means stderr alone.")
    log_level: Setting[str] = Setting("log",
        _choice("debug", "info", "warning", "error"), "info",
        "Least serious events to log: debug, info, warning or error.")
    log_max_size: Setting[int] = Setting("log", _size, "10M",
        "Size at which the log file is rotated.")
    log_backups: Setting[int] = Setting("log", _number, "5",
        "Rotated log files to keep.")
    # fmt: on
    config = ""  # the conf.ini that they come from

    def __repr__(self) -> str:
        pairs = (f"{name}={getattr(self, name)!r}" for name in settings_table())
        return f"Settings({', '.join(pairs)})"


def _as_text(value: object) -> str:
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def settings_table() -> dict[str, Setting[Any]]:
    """Return the rows of the table by name, in the order in which they are written."""
    return {k: v for k, v in vars(Settings).items() if isinstance(v, Setting)}


def load_settings(config: str, flags: Mapping[str, str]) -> Settings:
    """Return the settings of a conf.ini (none when `config` is "") and of flags.

    Flags win.  Paths in the file are relative to the file, those of flags to the
    current folder.  Raises SettingsError naming file, section, key and value.
    """
    settings, table = Settings(), settings_table()
    if config:
        vars(settings).update(_read_config(config))
    for name, text in flags.items():
        flag = "--" + name.replace("_", "-")
        vars(settings)[name] = table[name].parse(text, flag, os.getcwd())
    vars(settings)["config"] = config
    return settings


def _read_config(path: str) -> dict[str, object]:
    parser = configparser.ConfigParser(interpolation=None, default_section="\0")
    try:
        with open(path, encoding="utf-8-sig") as file:
            # An indented line is a line of its own, not more of the value before it.
            parser.read_file((line.lstrip() for line in file), path)
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise SettingsError(f"{path} can't be read: {reason_of(error)}.") from error
    sections = {setting.section for setting in settings_table().values()}
    values: dict[str, object] = {}
    for section in parser.sections():
        if section not in sections:
            raise SettingsError(f"{path}: there is no section [{section}].")
        for key, text in parser.items(section):
            values[key] = _checked_entry(section, key, text, path)
    return values


def _checked_entry(section: str, key: str, text: str, path: str) -> object:
    where = f"{path}, section [{section}], key {key}"
    setting = settings_table().get(key)
    if setting is None or setting.section != section:
        raise SettingsError(f'{where}: there is no such key (its value is "{text}").')
    if re.search(r"(^|\s)[;#]", text):
        raise SettingsError(f'{where}: "{text}": a comment needs a line of its own.')
    return setting.parse(text, where, os.path.dirname(os.path.abspath(path)))


# ---- multipart -----------------------------------------------------------------------
# Law: sans-IO.  Bytes go in as they come, events come out; nothing here reads, writes
# or knows what a chunk is.  Every size is bounded, every search is linear, and the
# first error is the last word (RFC 7578, RFC 2046 5.1).

_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(
    # A quote ends the string unless it is escaped; a browser never escapes, so a
    # backslash just before the closing quote is taken literally (WHATWG, FormData).
    rf'[ \t]*;[ \t]*({_TOKEN})=(?:"((?:\\"|[^"])*)"|({_TOKEN}))[ \t]*(?=;|$)'
)
_PART_HEADER = re.compile(rf"({_TOKEN}):([^\x00-\x08\x0a-\x1f\x7f]*)")
_IDENTITIES = ("", "binary", "8bit", "7bit")
# What browsers write, letter for letter; anything else is read by the rules.  It halves
# what the fields of a chunk cost.
_BROWSER_PART = re.compile(
    r'Content-Disposition: form-data; name="([^"\\\x00-\x1f\x7f]*)"'
    r'(?:; filename="([^"\\\x00-\x1f\x7f]*)")?'
    r"(?:\r\nContent-Type: ([!-~]*))?"
)


def parse_options(value: str) -> tuple[str, dict[str, str]]:
    """Split ``form-data; name="a"`` into its first word, lower case, and its options.

    Raises Malformed for anything that is not written like that, and for an option that
    is given twice.  ``name*`` and the like are left out (RFC 7578 4.2).
    """
    word, _, _ = value.partition(";")
    options: dict[str, str] = {}
    position = len(word)
    while position < len(value):
        match = _PARAMETER.match(value, position)
        if not match:
            raise Malformed("A header of the form can't be read.")
        name = match[1].lower()
        if name in options:
            raise Malformed(f'A header of the form gives "{name}" twice.')
        options[name] = match[3] or (match[2] or "").replace('\\"', '"')
        position = match.end()
    plain = {name: text for name, text in options.items() if "*" not in name}
    return word.strip().lower(), plain


def boundary_of(content_type: str) -> bytes | None:
    """Return the boundary of a multipart/form-data type, None for any other type.

    Raises Malformed when the boundary is missing or illegal (RFC 2046 5.1.1).
    """
    if not content_type.lower().lstrip().startswith("multipart/"):
        return None
    word, options = parse_options(content_type)
    if word != "multipart/form-data":
        raise Malformed(
            "Only multipart/form-data is understood of the multipart types."
        )
    if not _BOUNDARY.fullmatch(options.get("boundary", "")):
        raise Malformed("The boundary of the form is missing or illegal.")
    return options["boundary"].encode("ascii")


class Part(NamedTuple):
    """The beginning of a part: a file when it has a filename, else a text field."""

    name: str
    filename: str | None
    content_type: str


Event = Union[Part, memoryview, None]


class MultipartParser:
    """A push parser for multipart/form-data::

        parser = MultipartParser(boundary)      # of boundary_of(content_type)
        for event in parser.feed(block): ...
        parser.close()

    `max_parts` counts all parts; `max_header_size` is in bytes and for one part;
    `max_junk_size` for all before the first and after the last boundary.
    """

    def __init__(
        self,
        boundary: bytes,
        max_parts: int = 200,
        max_header_size: int = 8192,
        max_junk_size: int = 8192,
    ) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._held = b""  # the end of the last block, which a step needs again
        self._parts_left = max_parts
        self._max_header_size = max_header_size
        self._junk_left = max_junk_size
        self._step = self._start
        self._error: FlowError | None = None
        self._expected = 0  # bytes that are known to be data
        self._is_new_part = False  # the last event begins a file
        self.unread = 0  # bytes of the block that come after the beginning of a file

    def feed(self, block: bytes | bytearray, size: int = -1) -> Iterator[Event]:
        """Take the first `size` bytes of `block` (all by default), yield the events.

        A Part begins a part, non-empty memoryviews are its bytes, None ends it.  The
        views may look into `block`: use them before it is filled again.  To be iterated
        to its end; raises Malformed, and again the same when it is called after that.
        """
        if self._error:
            raise self._error
        data, end = block, len(block) if size < 0 else size
        if self._held:
            data = self._held + memoryview(block)[:end]
            end = len(data)
        events: list[Event] = []
        position = kept = 0
        while 0 <= position < end:
            kept = position
            try:
                position = self._step(data, position, end, events)
            except FlowError as error:
                self._error = error
                raise
            if self._is_new_part:  # expect() may be called now
                self._is_new_part, self.unread = False, end - position
                yield from events
                events.clear()
        self._held = bytes(memoryview(data)[kept:end]) if position < 0 else b""
        yield from events

    def expect(self, size: int) -> None:
        """Say that the next bytes are data of this part: they need not be searched.

        To be called when a file's Part was yielded, by who knows its size.
        Searching costs 0.2 ms a MiB, a seventh of all that a chunk of a form takes.
        """
        self._expected = size

    def close(self) -> None:
        """Say that the body has ended; raises Truncated when it was not whole."""
        if self._error:
            raise self._error
        if self._step != self._epilogue:
            raise Truncated("The form ended before its last boundary.")

    # Each step takes the bytes from `position` to `end` and returns where it stopped,
    # or -1 when it needs more and the bytes from `position` on must be kept.

    def _start(self, block: Any, position: int, end: int, events: list[Event]) -> int:
        """A body may begin with its boundary, without the line end before it."""
        dashes = self._delimiter[2:]
        if block.startswith(dashes, position, end):
            self._step = self._delimited
            return position + len(dashes)
        if end - position < len(dashes) and dashes.startswith(block[position:end]):
            return -1
        self._step = self._preamble
        return position

    def _preamble(
        self, block: Any, position: int, end: int, events: list[Event]
    ) -> int:
        found: int = block.find(self._delimiter, position, end)
        limit = end if found < 0 else found
        if block.find(self._delimiter[2:], position, limit) >= 0:
            raise Malformed("The first boundary of the form does not begin a line.")
        if found < 0:
            found = max(position, end - len(self._delimiter) + 1)
            self._spend_junk(found - position)
            return found if found > position else -1
        self._spend_junk(found - position)
        self._step = self._delimited
        return found + len(self._delimiter)

    def _delimited(
        self, block: Any, position: int, end: int, events: list[Event]
    ) -> int:
        """Look at what follows a delimiter: a new part, or the end."""
        line_end: int = block.find(b"\r\n", position, min(end, position + 66))
        if end - position >= 2 and block[position : position + 2] == b"--":
            self._step = self._epilogue
            return position + 2
        if line_end < 0:
            if end - position >= 66:
                raise Malformed("A boundary of the form is followed by other text.")
            return -1
        # Blanks may stand there (RFC 2046 5.1.1, transport padding), nothing else.
        if block[position:line_end].strip(b" \t"):
            raise Malformed("A boundary of the form is followed by other text.")
        self._parts_left -= 1
        if self._parts_left < 0:
            raise Malformed("The form has too many parts.")
        self._step = self._header
        return line_end + 2

    def _header(self, block: Any, position: int, end: int, events: list[Event]) -> int:
        limit = position + self._max_header_size
        found = block.find(b"\r\n\r\n", position, min(end, limit))
        if found < 0:
            if end > limit:
                raise Malformed("The header of a part of the form is too long.")
            return -1
        part = _parse_part(bytes(block[position:found]))
        events.append(part)
        self._step, self._is_new_part = self._data, part.filename is not None
        return int(found) + 4

    def _data(self, block: Any, position: int, end: int, events: list[Event]) -> int:
        known = self._expected and self._known(block, position, end)
        if known:
            self._expected -= known
            events.append(memoryview(block)[position : position + known])
            return position + known
        found: int = block.find(self._delimiter, position, end)
        if found >= 0:
            if found > position:
                events.append(memoryview(block)[position:found])
            events.append(None)
            self._step = self._delimited
            return found + len(self._delimiter)
        tail = self._tail(block, position, end)
        if tail > position:
            events.append(memoryview(block)[position:tail])
            return tail
        return -1

    def _known(self, block: Any, position: int, end: int) -> int:
        """Return how many of the bytes that are there are the expected ones."""
        known = min(end, position + self._expected)
        if end - known < len(self._delimiter):
            return known - position
        if not block.startswith(self._delimiter, known):  # there are more, or less
            self._expected = 0
        return self._expected

    def _tail(self, block: Any, position: int, end: int) -> int:
        """Return where the longest beginning of a delimiter at the end begins."""
        earliest = max(position, end - len(self._delimiter) + 1)
        start: int = block.rfind(b"\r\n", earliest, end)  # which it holds only once
        if start >= 0 and self._delimiter.startswith(block[start:end]):
            return start
        return end - 1 if block.endswith(b"\r", position, end) else end

    def _epilogue(
        self, block: Any, position: int, end: int, events: list[Event]
    ) -> int:
        self._spend_junk(end - position)
        return end

    def _spend_junk(self, size: int) -> None:
        self._junk_left -= size
        if self._junk_left < 0:
            raise Malformed("The form has too many bytes outside of its parts.")


def _parse_part(header: bytes) -> Part:
    """Return the Part of a header block; raises Malformed."""
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed("A part's header is not UTF-8.") from error
    match = _BROWSER_PART.fullmatch(text)
    if match:
        return Part(match[1], match[2], match[3] or "")
    fields: dict[str, str] = {}
    for line in text.split("\r\n"):
        match = _PART_HEADER.fullmatch(line)
        if not match or match[1].lower() in fields:
            raise Malformed("A part of the form has a header that can't be read.")
        fields[match[1].lower()] = match[2].strip()
    word, options = parse_options(fields.get("content-disposition", ""))
    if word != "form-data" or "name" not in options:
        raise Malformed("A part of the form has no name.")
    if fields.get("content-transfer-encoding", "").lower() not in _IDENTITIES:
        raise Malformed("An encoded part can't be taken; send its bytes as they are.")
    return Part(
        options["name"], options.get("filename"), fields.get("content-type", "")
    )


# ---- dialects ------------------------------------------------------------------------
# Law: one row per client library: its names for things, and the statuses that it obeys.
# Text of a client becomes a Chunk here, or an error; no other room knows a parameter.


class Chunk(NamedTuple):
    """What the parameters of a request say; `length` is -1 when no chunk is meant."""

    identifier: str
    filename: str
    path: str  # as the client wrote it; the filename when there was none
    size: int  # of the whole file, in bytes; -1 when only its end tells
    start: int
    length: int
    is_random: bool = False  # the library has drawn the identifier
    is_in_order: bool = False  # what comes before it was sent before it

    @property
    def is_secret(self) -> bool:
        """Whether knowing the identifier is proof enough of being its owner."""
        is_drawn = self.is_random and _DRAWN_IDENTIFIER.fullmatch(self.identifier)
        return bool(is_drawn or _SECRET_IDENTIFIER.match(self.identifier))


class Dialect(NamedTuple):
    """How one client library names the parameters of a chunk, and what it obeys.

    A name that is "" has no parameter: the file's name is then that of the part, the
    length that of the part, the beginning follows from the number.
    """

    name: str
    marks: frozenset[str]  # parameters by which it is recognised
    identifier: str = ""
    filename: str = ""
    path: str = ""  # with the folders that the file is in
    folder: str = ""  # or only these
    total: str = ""  # bytes of the whole file
    number: str = ""  # of the chunk
    first: int = 0  # number of the first one
    nominal: str = ""  # bytes of every chunk but the last
    start: str = ""  # where it begins, in bytes
    length: str = ""  # bytes of this chunk
    chunks: str = ""  # how many; "" where it can't be trusted
    is_random: bool = False  # 122 bits or more of the identifier are random
    is_in_order: bool = False  # one chunk after the other, and no identifier
    has_tests: bool = False  # asks by GET; without a number for all of the upload
    gives_up_on: tuple[int, ...] = ()  # () means all; the first stands for others
    unused: tuple[str, ...] = ()  # parameters that nobody here needs
    amend: Callable[[Chunk, Mapping[str, str]], Chunk] = lambda chunk, parameters: chunk

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters that count."""
        return tuple(getattr(self, field) for field in _PARAMETERS)

    @property
    def own(self) -> frozenset[str]:
        """Names that no form without chunks would use."""
        return self.marks.union(self.names) - _COMMON_WORDS

    def status_of(self, error: FlowError) -> int:
        """Return the status that makes this client do what the error means."""
        heard = self.gives_up_on
        if not error.is_final or not heard or error.status in heard:
            return error.status
        return heard[0]


_PARAMETERS = ("identifier", "filename", "path", "folder", "total", "number") + (
    ("nominal", "start", "length", "chunks")
)


def _family(
    name: str, prefix: str, gives_up_on: tuple[int, ...], trusts_count: bool = True
) -> Dialect:
    """Return the row of a library that names its parameters as flow.js does."""

    def named(word: str) -> str:
        return prefix + word if prefix else word[0].lower() + word[1:]

    marks = ("Identifier",) if prefix else ("Identifier", "ChunkNumber")
    return Dialect(
        name,
        marks=frozenset(map(named, marks)),
        identifier=named("Identifier"),
        filename=named("Filename"),
        path=named("RelativePath"),
        total=named("TotalSize"),
        number=named("ChunkNumber"),
        first=1,
        nominal=named("ChunkSize"),
        length=named("CurrentChunkSize"),
        chunks=named("TotalChunks") if trusts_count else "",
        has_tests=True,
        gives_up_on=gives_up_on,
        unused=(named("TotalChunks"), named("Type")),
    )


def _as_sent(chunk: Chunk, parameters: Mapping[str, str]) -> Chunk:
    """Dropzone announces the size that an image had before it was resized."""
    if parameters.get("dztotalchunkcount") == "1":
        return chunk._replace(size=chunk.length)
    return chunk


def _only_whole(chunk: Chunk, parameters: Mapping[str, str]) -> Chunk:
    """Plupload's chunk numbers tell neither where a chunk begins nor how many bytes."""
    if parameters.get("chunk") == "0" and parameters.get("chunks") in ("0", "1"):
        return chunk
    raise Malformed(
        "Plupload's chunk numbers do not say where a chunk belongs; set"
        " send_chunk_number: false."
    )


# One row for each library; the first whose marks are there is it.
DIALECTS = (
    _family("flow.js", "flow", (415, 404, 413, 500, 501)),
    # 1.1.0 repeats all other statuses 100 times without a pause, 401, 403 and 413 among
    # them.  Its count of chunks is wrong at times.
    _family("resumable.js", "resumable", (415, 400, 404, 500, 501), trusts_count=False),
    Dialect(
        "Dropzone",
        marks=frozenset(("dzuuid",)),
        identifier="dzuuid",
        total="dztotalfilesize",
        number="dzchunkindex",
        nominal="dzchunksize",
        start="dzchunkbyteoffset",
        chunks="dztotalchunkcount",
        is_random=True,
        amend=_as_sent,
    ),
    Dialect(
        "Fine Uploader",
        marks=frozenset(("qquuid",)),
        identifier="qquuid",
        filename="qqfilename",
        folder="qqpath",
        total="qqtotalfilesize",
        number="qqpartindex",
        start="qqpartbyteoffset",
        length="qqchunksize",
        chunks="qqtotalparts",
        is_random=True,
        unused=("qqresume", "qqfile"),
    ),
    # blueimp, react-uploady, curl; its parameters are made of its header.
    Dialect(
        "Content-Range",
        marks=frozenset(("Content-Range",)),
        total="Content-Range total",
        start="Content-Range",
        length="Content-Range length",
        is_in_order=True,
    ),
    _family("simple-uploader.js", "", (415, 404, 500, 501)),
    Dialect(
        "Plupload",
        marks=frozenset(("offset", "total")),
        filename="name",
        total="total",
        start="offset",
        is_in_order=True,
    ),
    Dialect(
        "Plupload",
        marks=frozenset(("chunk", "chunks")),
        filename="name",
        amend=_only_whole,
    ),
)


def dialects_with(prefix: str) -> tuple[Dialect, ...]:
    """Return the rows, and those that the setting parameter_prefix adds.

    With "up_" that is ``up_resumableIdentifier`` (resumable.js's parameterNamespace)
    and the like, and ``up_Identifier``.
    """
    if not prefix:
        return DIALECTS
    heard = DIALECTS[1].gives_up_on
    return (
        *DIALECTS,
        _family("custom prefix", prefix, (415, 404, 500, 501), trusts_count=False),
        _family("resumable.js", prefix + "resumable", heard, trusts_count=False),
    )


# A name of our own clients: 128 random bits of a browser, and the time of modification.
_SECRET_IDENTIFIER = re.compile("flowserver-[0-9a-f]{32}")
_DRAWN_IDENTIFIER = re.compile("[0-9A-Fa-f-]{32,52}")  # not what a program set instead
_ABSENT = ("", "null", "undefined", "false")


def add_parameter(parameters: dict[str, str], name: str, value: str) -> None:
    """Set a parameter; raises Malformed when it has another value already."""
    if parameters.setdefault(name, value) != value:
        raise Malformed(f"The parameter {quoted(name[:80])} has two values.")


def recognise(
    parameters: Mapping[str, str], dialects: Iterable[Dialect] = DIALECTS
) -> Dialect | None:
    """Return the first dialect whose marks are among these parameters, or None."""
    names = parameters.keys()
    return next((row for row in dialects if row.marks <= names), None)


def require_marks(names: Collection[str], dialects: Iterable[Dialect]) -> None:
    """Raise Malformed when parameters are a library's, but not all that mark them."""
    for row in dialects:
        if not row.own.isdisjoint(names):
            missing = min(mark for mark in row.marks if mark not in names)
            raise Malformed(
                f"These are parameters of {row.name}, but {missing} is missing."
            )


_COMMON_WORDS = frozenset(
    ("", "name", "identifier", "filename", "relativePath", "total")
)


def range_parameters(headers: Mapping[str, str]) -> dict[str, str]:
    """Return what Content-Range (RFC 9110 14.4) says, as parameters of that dialect."""
    if "content-range" not in headers:
        return {}
    match = re.fullmatch(
        "bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})", headers["content-range"]
    )
    if not match:
        raise Malformed("The Content-Range is not like bytes 0-1023/4096.")
    start, last, total = map(int, match.groups())
    return {
        "Content-Range": str(start),
        "Content-Range length": str(max(last - start + 1, 0)),
        "Content-Range total": str(total),
    }


def disposition_name(headers: Mapping[str, str]) -> str:
    """Return the file name of a Content-Disposition header, "" without one.

    blueimp writes it as encodeURI() does.
    """
    _, options = parse_options(headers.get("content-disposition", ""))
    return urllib.parse.unquote(options.get("filename", ""))


def parse_integer(text: str, name: str) -> int:
    """Return a whole number of at most 15 ASCII digits; raises Malformed.

    int() alone takes ``+1``, ``1_0`` and digits of other scripts.
    """
    if not text:
        raise Malformed(f"{name} is missing.")
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise Malformed(f"{name} is {quoted(text[:40])}, which is not a whole number.")
    return int(text)


def parse_chunk(
    row: Dialect, parameters: Mapping[str, str], filename: str = "", length: int = -1
) -> Chunk:
    """Return what the parameters mean; raises Malformed when they can't be true.

    `filename` and `length` are those of the part, for rows that have no parameter.
    """

    parameters = {**parameters, "": ""}  # so that "" names none

    def integer(name: str) -> int:
        return parse_integer(parameters.get(name, ""), name)

    identifier = parameters.get(row.identifier, "")
    filename = parameters.get(row.filename, "") if row.filename else filename
    path = parameters.get(row.path, "")
    folder = parameters.get(row.folder, "")
    if path in _ABSENT:
        path = filename if folder in _ABSENT else f"{folder}/{filename}"
    if not path or (row.identifier and not identifier):
        raise Malformed("The upload has no identifier or no file name.")
    names = (identifier, filename or path, path)
    ways = (row.is_random, row.is_in_order)
    if not parameters.get(row.number or row.start):  # the whole file, or no chunk
        places = (row.start, row.length)
        is_piece = row.nominal or any(parameters.get(name) for name in places)
        if is_piece and not row.has_tests:
            raise Malformed(f"The chunk has no {row.number}.")
        is_said = row.has_tests or parameters.get(row.total)
        size = integer(row.total) if is_said else -1
        return row.amend(Chunk(*names, size, 0, -1, *ways), parameters)
    number = integer(row.number) - row.first if row.number else 0
    nominal = integer(row.nominal) if row.nominal else None
    count = integer(row.chunks) if parameters.get(row.chunks) else None
    size = integer(row.total)
    start = integer(row.start) if row.start else number * (nominal or 0)
    length = integer(row.length) if row.length else length
    chunk = row.amend(Chunk(*names, size, start, length, *ways), parameters)
    _check_chunk(chunk)
    _check_place(chunk, number, nominal, count)
    return chunk


def _check_chunk(chunk: Chunk) -> None:
    end = chunk.start + chunk.length
    if end > chunk.size:
        raise Malformed(
            f"The chunk ends at byte {end}, but the file has only {chunk.size} bytes."
        )
    if chunk.length < 0 or (chunk.length == 0 and chunk.size > 0):
        raise Malformed("The chunk is empty, but the file is not.")


def _check_place(
    chunk: Chunk, number: int, nominal: int | None, count: int | None
) -> None:
    """Hold a chunk against its number, which is from 0, and what all of them have.

    Were the last one not the end, then all would be taken and the file never complete.
    """
    size, end = chunk.size, chunk.start + chunk.length
    fits, is_last = number >= 0, end == size
    if nominal is not None:
        # flow.js's last one takes the rest, unless forceChunkSize gives it its own.
        is_usual = chunk.length < 2 * nominal if is_last else chunk.length == nominal
        fits = fits and is_usual and chunk.start == number * nominal
    if count is not None:
        is_among = number < count and (number > 0) == (chunk.start > 0)
        fits = fits and is_among and (number == count - 1) == is_last
    if fits and nominal and count is not None:
        fits = count in (max(size // nominal, 1), max(-(-size // nominal), 1))
    if not fits:
        of_all = "" if count is None else f" of {count}"
        raise Malformed(
            f"Chunk {number + 1}{of_all} does not go with bytes {chunk.start} to {end}"
            f" of {size}."
        )


# Names.  The rules of all systems hold on every system, so that a folder can move.
_UNSAFE = re.compile(
    '[\x00-\x1f\x7f-\x9f<>:"|?*\ud800-\udfff'
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb]"
)
_RESERVED = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|clock\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])"
    r"[ ]*(\..*)?",
    re.IGNORECASE | re.DOTALL,
)
_INVISIBLE = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
_MAX_NAME_SIZE = 255  # bytes, on ext4, XFS, APFS and NTFS alike
_MAX_PATH_SIZE = 2048  # bytes; PATH_MAX is 4096 and upload_dir comes before it
_MAX_DEPTH = 40


def safe_path(path: str, avoid: str = ".flowserver") -> str:
    """Return a relative path under which a file may be stored on every system.

    Separators of both kinds count; `avoid` is the name of a folder of ours.  Raises
    Malformed for a path that leads outside, is empty, too long or too deep.
    """
    if len(path) > _MAX_PATH_SIZE:  # first: what follows is not for megabytes
        raise Malformed("The path of the file is too long.")
    words = [word for word in re.split(r"[/\\]", path) if word not in ("", ".")]
    if ".." in (word.strip(" ") for word in words):
        raise Malformed(f"The name {quoted(path)} leads outside of the upload folder.")
    if not words or path[-1:] in "/\\":
        raise Malformed(f"The name {quoted(path)} names no file.")
    safe = "/".join(safe_name(word, avoid) for word in words)
    if len(words) > _MAX_DEPTH or len(safe.encode()) > _MAX_PATH_SIZE:
        raise Malformed("The path of the file is too long or too deep.")
    return safe


def safe_name(name: str, avoid: str = ".flowserver") -> str:
    """Return a name for a file or folder that is harmless on every system."""
    name = _UNSAFE.sub("_", unicodedata.normalize("NFC", name)).lstrip(" ")
    if _RESERVED.fullmatch(name) or _is_ours(name, avoid):
        name = "_" + name
    name = _shortened(name, "") or "_"
    stripped = name.rstrip(". ")  # which Windows would do by itself
    return name if name == stripped else stripped + "_"


def _is_ours(name: str, avoid: str) -> bool:
    """Whether some system takes a name for our folder's.

    HFS+ passes over characters of no width (CVE-2014-9390), and Windows knows a folder
    by a name of eight letters as well.
    """
    seen = _INVISIBLE.sub("", name).casefold().rstrip(". ")
    if "~" not in seen:
        return seen == avoid.casefold()
    short = re.escape(avoid.casefold().replace(".", "")[:6])
    return bool(re.match(short + "~[0-9]", seen))


def numbered(name: str, number: int) -> str:
    """Return ``report (1).pdf`` for ``report.pdf`` and 1."""
    return _shortened(name, f" ({number})")


def _shortened(name: str, insert: str) -> str:
    """Put `insert` before the suffix, and cut the stem until the name fits."""
    stem, dot, suffix = name.rpartition(".")
    if not stem or len(suffix.encode()) > 32:
        stem, dot, suffix = name, "", ""
    if stem.lower().endswith(".tar"):
        stem, dot, suffix = stem[:-4], ".", f"{stem[-3:]}.{suffix}"
    room = _MAX_NAME_SIZE - len((insert + dot + suffix).encode())
    return stem.encode()[:room].decode("utf-8", "ignore") + insert + dot + suffix


def in_units(size: int) -> str:
    """Return ``57.2 MiB`` for 60000000 bytes."""
    amount, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.3g} {unit}" if amount < 1000 else f"{amount:.0f} {unit}"


def escaped(text: str) -> str:
    """Return `text` on one line, with what could deceive a reader escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def quoted(text: str) -> str:
    """Return `text` in quotes, as escaped() does."""
    return f'"{escaped(text)}"'


# ---- upload --------------------------------------------------------------------------
# Law: pure.  What the lines of a ledger say of one sender's upload, and what may be
# done with it: lines in, answers out.  Nothing here reads, writes, waits or asks the
# time.
#
# | the upload is          | a test asks   | a chunk comes                  | DELETE   |
# |------------------------|---------------|--------------------------------|----------|
# | unknown                | send it       | opens it                       | -        |
# | unfinished             | may_skip(),   | what is missing is stored, the | drops it |
# |                        | is_sample()   | rest compared: has_changed()   |          |
# | complete, not named    | send it       | the same, and finishes it      | drops it |
# | finished               | send it       | compared; other bytes open a   | -        |
# |                        |               | new one unless it came_again   |          |
# | finished, file changed | send it       | opens a new one, likewise      | -        |
# | finished, no receipt   | send it       | opens it: it is unknown        | -        |


class Ranges:
    """Disjoint ranges of bytes, sorted; neighbours are merged."""

    def __init__(self, ranges: Iterable[Sequence[int]] = ()) -> None:
        self._edges: list[int] = []  # a start, its end, the next start, ...
        self.total = 0
        for start, end in ranges:
            self.add(start, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.within(0, self.end))

    @property
    def end(self) -> int:
        """Where the last range ends."""
        return self._edges[-1] if self._edges else 0

    def add(self, start: int, end: int) -> None:
        """Add what is not there yet of [start, end)."""
        if start >= end:
            return
        self.total += sum(high - low for low, high in self.gaps(start, end))
        first = bisect.bisect_left(self._edges, start)
        last = bisect.bisect_right(self._edges, end)
        # An odd place is inside of a range, or at its end: that range goes on.
        self._edges[first:last] = [start][first % 2 :] + [end][last % 2 :]

    def within(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return what is there of [start, end), cut to it."""
        first = bisect.bisect_right(self._edges, start) // 2 * 2
        last = bisect.bisect_left(self._edges, end)
        edges = self._edges[first : last + last % 2]
        pairs = zip(edges[::2], edges[1::2])
        return [(max(low, start), min(high, end)) for low, high in pairs]

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return what is missing of [start, end)."""
        missing = []
        for low, high in self.within(start, end):
            if start < low:
                missing.append((start, low))
            start = high
        return missing + [(start, end)] if start < end else missing


class Upload(NamedTuple):
    """What names an upload; `path` is relative to upload_dir and safe already."""

    key: str
    path: str
    size: int  # of the whole file, in bytes
    owner: str = ""
    identifier: str = ""
    is_secret: bool = False  # nobody else can know the identifier
    fields: Mapping[str, str] = types.MappingProxyType({})  # said before its first byte


def upload_key(
    owner: str, sender: str, identifier: str, relative_path: str, size: int
) -> str:
    """Return the name on disk of an upload: a hash, nothing that a client wrote."""
    text = json.dumps([owner, sender, identifier, relative_path, size])
    return hashlib.sha256(text.encode()).hexdigest()[:40]


class Done(NamedTuple):
    """A finished file; `path` is absolute, `id` the same if it is announced twice."""

    id: str
    path: str
    relative_path: str  # below upload_dir, with "/"
    filename: str
    size: int
    owner: str
    identifier: str
    fields: Mapping[str, str]  # what else the client sent with the last chunk


class Progress(NamedTuple):
    """What is stored of an upload, in bytes; `done` when it is finished."""

    received: int
    size: int
    done: Done | None = None
    is_new: bool = False  # whether this very request finished it
    began: float = 0.0  # the clock when its first chunk came; 0 if with this one


class Status(NamedTuple):
    """What is known of an upload; ranges are [start, end) in bytes."""

    upload: Upload
    stored: list[tuple[int, int]]
    told: list[tuple[int, int]]  # those that need not be sent
    is_finished: bool
    done: Done | None  # while the file is where it was put


class _Place(NamedTuple):
    """Where a file goes, or went, and how to know it again."""

    path: str  # below upload_dir
    inode: int
    fields: Mapping[str, str]
    modified: int = 0  # nanoseconds, when it is there


class _Beginning(NamedTuple):
    """What the first line of a ledger says."""

    upload: Sequence[Any]
    generation: str  # names this version of the file on the disk
    supersedes: str = ""  # the generation that was finished under this key before
    is_kept: bool = False  # also without a byte
    boot: str = ""  # of the machine, if nothing is flushed
    time: float = 0.0


class _State:
    """One version of a file on its way, as its lines tell it."""

    def __init__(self, *beginning: Any) -> None:
        self.begun = _Beginning(*beginning or (("", "", -1), ""))
        self.upload = Upload(*self.begun.upload)
        self.generation = self.begun.generation  # "" when it is unknown
        self.ranges = Ranges()  # recorded
        self.claims: dict[str, tuple[int, int]] = {}  # by body: its process, a number
        self.intents: list[_Place] = []
        self.finished: _Place | None = None
        self.is_announced = False
        self.came_again = False

    def after(self, kind: str, *values: Any) -> _State:
        """Return the state after one more line: this one, or that of a new upload."""
        if kind == "upload":
            return _State(*values)
        _LINES[kind](self, *values)
        return self

    def set_claim(self, body: str, start: int, end: int) -> None:
        """A body is about to write there; an empty range ends that.

        It takes the place of bodies of other processes: the last attempt is the one
        that its client still waits for.  They keep an empty claim: they are there.
        """
        process = body.partition("-")[0]
        for other, (low, high) in self.claims.items():
            if not other.startswith(process) and low < end and start < high:
                self.claims[other] = (0, 0)
        if start < end:
            self.claims[body] = (start, end)
        else:
            self.claims.pop(body, None)

    def receipt(self) -> list[tuple[Any, ...]]:
        """Return the lines that say what must be known of a finished upload."""
        assert self.finished is not None
        lines: list[tuple[Any, ...]] = [("upload", *self.begun)]
        lines += [("range", 0, self.upload.size), ("finished", *self.finished)]
        claims = self.claims.items()
        lines += [("claim", body, *claim) for body, claim in claims if any(claim)]
        lines += [("announced",)] * self.is_announced
        return lines + [("again",)] * self.came_again

    @property
    def is_complete(self) -> bool:
        """Whether every byte is recorded."""
        return self.ranges.total == self.upload.size

    @property
    def is_unfinished(self) -> bool:
        """Whether it was begun and has no end yet."""
        return bool(self.generation) and self.finished is None

    def is_intact(self, status: os.stat_result | None) -> bool:
        """Say whether the file of its name is still the one that was published."""
        if status is None or self.finished is None:
            return False
        was = (self.upload.size, self.finished.inode, self.finished.modified)
        return was == (status.st_size, status.st_ino, status.st_mtime_ns)

    @property
    def told(self) -> tuple[int, int]:
        """Where recorded bytes need not be sent: a range, empty when it is complete.

        Unless the identifier is secret, the first byte and the last one stored are
        asked for again: samples, which show whether the file is still the same.
        """
        if not self.is_unfinished or self.is_complete:
            return (0, 0)  # a chunk must come all the same, and finish
        margin = 0 if self.upload.is_secret else 1
        return (margin, self.ranges.end - margin)

    def may_skip(self, start: int, end: int) -> bool:
        """Say whether [start, end) need not be sent."""
        low, high = self.told
        return low <= start < end <= high and not self.ranges.gaps(start, end)

    def is_sample(self, start: int, end: int) -> bool:
        """Say whether recorded bytes are asked for again."""
        is_open = self.is_unfinished and not self.is_complete
        is_here = start < end and not self.ranges.gaps(start, end)
        return is_open and is_here and not self.may_skip(start, end)

    def has_changed(
        self, start: int, end: int, missing: Iterable[Sequence[int]]
    ) -> bool:
        """Say whether other bytes at [start, end) mean that the file has changed.

        What was `missing` when the body began came from two attempts at one time: which
        one is right shows when it is sent again, and compared.
        """
        return not (self.finished or Ranges(missing).within(start, end))


_LINES: Mapping[str, Callable[..., None]] = {
    # These bytes are on the disk, and will never be written again.
    "range": lambda state, start, end: state.ranges.add(start, end),
    "claim": _State.set_claim,
    # The data file is about to get this name.
    "publish": lambda state, *place: state.intents.append(_Place(*place)),
    # It has its name, and is never written again.
    "finished": lambda state, *place: setattr(state, "finished", _Place(*place)),
    # on_complete has returned.  The random letters tell this last line from those of
    # other ledgers that take this one's place.
    "announced": lambda state, *random: setattr(state, "is_announced", True),
    # Something came once more after the end, and was equal.
    "again": lambda state, *random: setattr(state, "came_again", True),
}

_CHANGED = "This file has changed since it was sent last; please send it once more."
_UNDONE = "Another attempt at this chunk was under way; please send it again."
_CANCELLED = "This upload was cancelled while the chunk was under way."
_ANOTHER_FILE = "Another file of this name and size is just being sent."
_OTHER_SIZE = "A file of another size was begun under this identifier."
_NO_BEGINNING = "The beginning of this file is not here; please send all of it again."


# ---- disk ----------------------------------------------------------------------------
# Law: every call of the store to the operating system, one method each, so that a test
# can stop at each one; and what it may report, in sentences.  Nothing here knows what
# an upload is.

BLOCK_SIZE = 1024 * 1024  # bytes of a body that are taken at one time
COMPARED_SIZE = 64 * 1024  # bytes that are read beside them, to compare or to copy


class Disk:
    """The operating system, as the store needs it.

    With `sync` off, flush() and flush_names() do nothing.  Store turns `links` off
    where the file system has none.
    """

    close = staticmethod(os.close)
    truncate = staticmethod(os.ftruncate)
    stat = staticmethod(os.fstat)
    list = staticmethod(os.listdir)
    touch = staticmethod(os.utime)

    def __init__(self, sync: bool = True) -> None:
        self.sync = sync
        self.unlinks_open = os.name != "nt"  # and renames: files that are open
        self.links = hasattr(os, "link") and self.unlinks_open  # a file has two names
        self._flock = _windows_lock if os.name == "nt" else _posix_lock
        self._positioned = hasattr(os, "pwrite")

    # Files

    def open(self, path: str, flags: int) -> int:
        """Return a descriptor; files are made with the mode that the umask leaves."""
        return os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)

    def read(self, fd: int, size: int, offset: int) -> bytes:
        """Return `size` bytes from `offset`; fewer only at the file's end."""
        found = b""
        while len(found) < size:
            wanted = min(size - len(found), 1 << 24)
            block = self.read_once(fd, wanted, offset + len(found))
            if not block:
                break
            found += block
        return found

    def read_once(self, fd: int, size: int, offset: int) -> bytes:
        """Return what one call reads from `offset`: at most `size` bytes."""
        if self._positioned:
            return os.pread(fd, size, offset)
        os.lseek(fd, offset, os.SEEK_SET)  # a descriptor has one user at a time
        return os.read(fd, size)

    def write(self, fd: int, block: bytes | memoryview, offset: int) -> None:
        """Write all of `block` at `offset`."""
        view = memoryview(block)
        while view:
            if self._positioned:
                written = os.pwrite(fd, view, offset)
            else:
                os.lseek(fd, offset, os.SEEK_SET)
                written = os.write(fd, view)
            view = view[written:]
            offset += written

    def flush(self, fd: int) -> None:
        """Return when the file's bytes are on the disk, whatever the power does."""
        if not self.sync:
            return
        if sys.platform == "darwin":  # fsync leaves the bytes in the drive's cache
            import fcntl

            with contextlib.suppress(OSError):  # not every file system has it
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
                return
        (getattr(os, "fdatasync", None) or os.fsync)(fd)

    # Names

    def stat_path(self, path: str) -> os.stat_result | None:
        """Return what is known of a file, or None; links are not followed."""
        try:
            return os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def unlink(self, path: str) -> None:
        """Remove a name; that it is missing already is no error."""
        with contextlib.suppress(FileNotFoundError):
            _patiently(os.unlink, path)

    def rename(self, source: str, target: str) -> None:
        """Give a file another name, in place of the file that may have it."""
        _patiently(os.replace, source, target)

    def publish(self, source: str, target: str) -> None:
        """Give a file its final name; raises FileExistsError, never overwrites.

        Where files can have two names it keeps its old one, too.
        """
        if self.links:
            os.link(source, target)
        elif self.unlinks_open and os.path.lexists(target):
            # Only under the lock of names: this system has no rename that refuses.
            raise FileExistsError(errno.EEXIST, "exists", target)
        else:
            _patiently(os.rename, source, target)

    def make_folder(self, path: str, mode: int = 0o777) -> bool:
        """Make a folder; return False when there was something of that name."""
        try:
            os.mkdir(path, mode)
        except FileExistsError:
            return False
        return True

    def flush_names(self, path: str) -> None:
        """Return when the names in a folder are on the disk; Windows can't be asked."""
        if self.sync and self.unlinks_open:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    # The machine

    def free_space(self, path: str) -> int:
        """Return the bytes that can still be written."""
        return shutil.disk_usage(path).free

    def boot_id(self) -> str:
        """Return a name of this run of the machine, "" where it has none."""
        with contextlib.suppress(OSError):
            with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
                return file.read().strip()
        return ""

    # Locks of open files: between processes, and between descriptors of one process

    def lock(self, fd: int) -> None:
        """Wait for the lock of an open file."""
        self._flock(fd, True, True)

    def try_lock(self, fd: int) -> bool:
        """Take the lock of an open file if it is free."""
        return self._flock(fd, True, False)

    def unlock(self, fd: int) -> None:
        """Give a lock back; close() does not while a forked child has the file, too."""
        self._flock(fd, False, False)


def _posix_lock(fd: int, take: bool, wait: bool) -> bool:
    import fcntl

    mode = fcntl.LOCK_EX if take else fcntl.LOCK_UN
    try:
        fcntl.flock(fd, mode if wait else mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _windows_lock(fd: int, take: bool, wait: bool) -> bool:
    import msvcrt

    mode = getattr(msvcrt, "LK_NBLCK" if take else "LK_UNLCK")
    # Locks of Windows keep others from reading: take one byte that no file has.
    os.lseek(fd, 1 << 62, os.SEEK_SET)
    while True:
        try:
            getattr(msvcrt, "locking")(fd, mode, 1)
            return True
        except OSError:
            if not (take and wait):
                return False
            time.sleep(0.002)


def _patiently(call: Callable[..., None], *arguments: str) -> None:
    """Call, and again for two seconds where an open file can't be moved (Windows)."""
    for _ in range(100 if os.name == "nt" else 0):
        try:
            return call(*arguments)
        except PermissionError:
            time.sleep(0.02)
    return call(*arguments)


@contextlib.contextmanager
def locked(disk: Disk, fd: int, waits: bool = True) -> Iterator[bool]:
    """Hold the lock of an open file; yield whether it could be had."""
    try:
        if waits:
            disk.lock(fd)
        yield waits or disk.try_lock(fd)
    finally:
        disk.unlock(fd)


@contextlib.contextmanager
def lock_of(disk: Disk, path: str, waits: bool = True) -> Iterator[int]:
    """Hold the lock of a file, made where it is missing.

    Yields its descriptor, -1 when somebody else has the lock and nobody `waits`.
    """
    fd = disk.open(path, os.O_RDWR | os.O_CREAT)
    try:
        with locked(disk, fd, waits) as is_mine:
            yield fd if is_mine else -1
    finally:
        disk.close(fd)


def discard(disk: Disk, path: str) -> None:
    """Remove a file that nobody needs; what can't be removed now is swept later."""
    with contextlib.suppress(OSError):
        disk.unlink(path)


# ---- ledgers -------------------------------------------------------------------------
# Law: what is known of an upload is in its ledger, and changes only under the lock of
# that file, which holds between threads and processes; what is remembered here is only
# what was read there.  Bytes are flushed before the line that says that they are there.
# A line counts when it is whole and its checksum, which goes on from that of the line
# before, is right.  An upload whose data file is missing is nothing.
#
# The state folder holds <key>.ledger, an append-only text; <key>-<generation>.data, the
# bytes of an unfinished upload, each at its place; and private files, <random>.part.

_RECENT_LEDGERS = 1024  # are remembered between the chunks of their uploads
_PAGE_SIZE = 4096  # a ledger takes no less on most disks; few read more of it at a time


class _File:
    """An open file of ours; Windows renames and removes it only while it is closed."""

    def __init__(self, disk: Disk, path: str, flags: int = os.O_RDWR) -> None:
        self.disk = disk
        self.path = path
        self.fd = -1  # while it is closed
        self.fd = disk.open(path, flags)

    def opened(self) -> int:
        """Return its descriptor; it is opened again when it was closed."""
        if self.fd < 0:
            self.fd = self.disk.open(self.path, os.O_RDWR)
        return self.fd

    def close(self) -> None:
        """Close it, for good or until it is asked for again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self.disk.close(fd)

    __del__ = close


class _Ledger:
    """One upload as this process has read it; valid under the lock."""

    def __init__(self, disk: Disk, path: str) -> None:
        self.disk = disk
        self.path = path
        self.state = _State()
        self.fd = -1  # of whoever has the lock
        self._state_named = self.state  # whose names are on the disk
        self._size = 0  # bytes of whole lines read
        self._last = b""  # the last line
        self._check = 0  # its checksum
        self._flushed = 0  # bytes that are on the disk
        self._flushing = threading.Lock()

    @property
    def data_path(self) -> str:
        """Where the bytes of the present generation are."""
        return self.path.replace(".ledger", f"-{self.state.generation}.data")

    def read(self, fd: int) -> bool:
        """Read what others have written since; return False when they have dropped it.

        One call tells both: the last line that is known must stand where it stood.
        """
        self.fd, known = fd, len(self._last)
        text = self.disk.read_once(fd, known + _PAGE_SIZE, self._size - known)
        if not text.startswith(self._last):
            return False
        if len(text) == known + _PAGE_SIZE:
            text += self.disk.read(fd, sys.maxsize, self._size + _PAGE_SIZE)
        self._take(text[known:])
        return True

    def _take(self, text: bytes) -> None:
        """Take the lines that follow, up to the first that does not count."""
        for line in text.splitlines(keepends=True):
            check = zlib.crc32(line[9:-1], self._check)
            if not line.endswith(b"\n") or line[:8] != b"%08x" % check:
                return
            self._go_on(line, check, json.loads(line[9:]))

    def _go_on(self, line: bytes, check: int, values: Sequence[Any]) -> None:
        self.state = self.state.after(*values)
        self._last, self._check = line, check
        self._size += len(line)

    def append(self, *lines: Sequence[Any]) -> None:
        """Write lines, over what does not count, and take them as read."""
        text, check, taken = b"", self._check, []
        for values in lines:
            line = _compact_json(values).encode()
            check = zlib.crc32(line, check)
            line = b"%08x %s\n" % (check, line)
            taken.append((line, check, values))
            text += line
        self.disk.write(self.fd, text, self._size)
        for one in taken:
            self._go_on(*one)

    def flush(self, fd: int) -> None:
        """Return when lines are on the disk, and the names of ledger and data.

        Threads share a flush.
        """
        wanted = self._size
        with self._flushing:
            if self._flushed < wanted:
                reached = self._size
                try:
                    self.disk.flush(fd)
                except OSError:  # what is lost by that must be written again
                    self.disk.write(fd, self.disk.read(fd, reached, 0), 0)
                    raise
                self._flushed = reached
        state = self.state
        if self._state_named is not state:
            self.disk.flush_names(os.path.dirname(self.path))
            self._state_named = state

    def empty(self) -> None:
        """Drop the upload: whoever waits for the lock will see that it is over."""
        if self.disk.unlinks_open:
            self.disk.unlink(self.path)
        elif self._size:
            self.disk.truncate(self.fd, 0)

    def cut_down(self) -> None:
        """Keep of a finished upload what a receipt needs, when that is much less.

        Nothing may be appended after that.
        """
        if self._size > _PAGE_SIZE and self.disk.unlinks_open:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
            with contextlib.suppress(OSError):  # it may as well stay as it is
                file = _File(self.disk, self.path.replace(".ledger", ".part"), flags)
                short = _Ledger(self.disk, file.path)
                short.fd = file.fd
                short.append(*self.state.receipt())
                self.disk.flush(file.fd)
                self.disk.rename(file.path, self.path)


_compact_json = json.JSONEncoder(separators=(",", ":")).encode


class _Ledgers:
    """The way to the ledgers; the last ones are remembered."""

    def __init__(
        self, disk: Disk, folder: str, mend: Callable[[_Ledger], None]
    ) -> None:
        self.disk = disk
        self.folder = folder
        self._mend = mend  # what a crash left
        # One thread at a time asks the system, which wakes all that wait for a lock.
        self._turns = [threading.Lock() for _ in range(64)]
        self._mutex = threading.Lock()
        self._remembered: dict[str, _Ledger] = {}  # the last ones used stand last

    @contextlib.contextmanager
    def entered(
        self, key: str, create: bool = False, flushes: bool = False, mends: bool = True
    ) -> Iterator[_Ledger | None]:
        """Yield the ledger of an upload, locked; None when there is none.

        What is appended is on the disk afterwards if it `flushes`.
        """
        path = os.path.join(self.folder, key + ".ledger")
        flags = os.O_RDWR | (os.O_CREAT if create else 0)
        while True:
            try:
                fd = self.disk.open(path, flags)
            except FileNotFoundError:
                yield None
                return
            try:
                with self._turns[hash(key) % len(self._turns)], locked(self.disk, fd):
                    if not self.disk.stat(fd).st_nlink:  # removed meanwhile
                        continue
                    ledger = self._read(path, fd)
                    try:
                        if mends:
                            self._mend(ledger)
                        yield ledger
                    finally:
                        if not ledger.state.generation:  # it was made for nothing
                            ledger.empty()
                if flushes:
                    ledger.flush(fd)
                return
            finally:
                self.disk.close(fd)

    def _read(self, path: str, fd: int) -> _Ledger:
        """Return what is in a ledger, with what is remembered of it."""
        with self._mutex:
            ledger = self._remembered.pop(path, None)
        if ledger is None or not ledger.read(fd):
            ledger = _Ledger(self.disk, path)
            ledger.read(fd)
        with self._mutex:
            self._remembered[path] = ledger
            if len(self._remembered) > _RECENT_LEDGERS:
                del self._remembered[next(iter(self._remembered))]
        return ledger


# ---- publication ---------------------------------------------------------------------
# Law: a file gets its name below upload_dir at once and whole, without a race, and in
# place of another file only if on_conflict says so.  Folders are entered one by one,
# and no link is followed.


class _Part(_File):
    """A private file for one body; what still has this name at the end is removed."""

    def __init__(self, disk: Disk, folder: str) -> None:
        self.name = secrets.token_hex(8)
        path = os.path.join(folder, self.name + ".part")
        super().__init__(disk, path, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def remove(self) -> None:
        """Let go of it."""
        self.close()
        discard(self.disk, self.path)


class _Publisher:
    """Names below upload_dir: given without a race, and never over another file."""

    def __init__(self, disk: Disk, upload_dir: str, policy: str, lock: str) -> None:
        self.disk = disk
        self.upload_dir = upload_dir
        self.policy = policy  # on_conflict
        self._lock = lock  # a file to lock where names can't be taken atomically
        self._flushed: set[str] = set()  # folders whose names are on the disk

    def path(self, relative: str) -> str:
        """Return the absolute path of a path below upload_dir."""
        return os.path.join(self.upload_dir, *relative.split("/"))

    def refuse_early(self, upload: Upload, is_whole: bool) -> None:
        """Raise Conflict for what can be known before the bytes have travelled.

        A whole file of the size of the one that has its name may be the same again.
        """
        self._folder(upload.path.rpartition("/")[0], makes=False)
        if self.policy == "refuse":
            status = self.disk.stat_path(self.path(upload.path))
            if status and not (is_whole and status.st_size == upload.size):
                raise _taken(upload.path)

    def place(
        self, file: _File, wanted: str, intend: Callable[[str], None]
    ) -> tuple[str, bool]:
        """Name a file as the policy says; return the path, and whether that is new.

        `intend` is told of each path before it is tried.  A file there with the same
        bytes is as good as ours: no second copy.
        """
        parent, slash, name = wanted.rpartition("/")
        folder, candidate, number = self._folder(parent), name, 0
        while True:
            path, target = parent + slash + candidate, os.path.join(folder, candidate)
            intend(path)
            is_new = self._give(file, target)
            if is_new or self._is_same(file, target):
                self.disk.flush_names(folder)
                return path, is_new
            if self.policy == "refuse":
                raise _taken(wanted)
            # The last one may be the same file, whose answer was lost.
            number = number + 1 if number else max(1, self._last_number(folder, name))
            candidate = numbered(name, number)

    def _folder(self, relative: str, makes: bool = True) -> str:
        """Return the absolute path of a folder, made where it is missing."""
        parent = self.upload_dir
        for word in filter(None, relative.split("/")):
            folder = os.path.join(parent, word)
            is_new = makes and self.disk.make_folder(folder)
            status = self.disk.stat_path(folder)
            if not status and not makes:
                break
            if not status or not stat.S_ISDIR(status.st_mode):
                raise _no_folder(word)
            if makes and (is_new or folder not in self._flushed):
                self.disk.flush_names(parent)
                if len(self._flushed) > 10000:
                    self._flushed.clear()
                self._flushed.add(folder)
            parent = folder
        return parent

    def _is_same(self, file: _File, target: str) -> bool:
        """Return whether the file of a name is this one, or has its bytes."""
        existing, mine = self.disk.stat_path(target), self.disk.stat(file.opened())
        if existing is None:
            return False
        if (mine.st_ino, mine.st_dev) == (existing.st_ino, existing.st_dev):
            return True
        if mine.st_size != existing.st_size or not stat.S_ISREG(existing.st_mode):
            return False
        # Windows flushes only what may be written.
        flags = os.O_RDONLY if self.disk.unlinks_open else os.O_RDWR
        try:
            other = self.disk.open(target, flags)
        except (FileNotFoundError, PermissionError):  # gone by now, or not ours
            return False
        try:
            for start in range(0, mine.st_size, COMPARED_SIZE):
                block = self.disk.read(file.fd, COMPARED_SIZE, start)
                if block != self.disk.read(other, COMPARED_SIZE, start):
                    return False
            self.disk.flush(other)  # nobody else may have done so
            return True
        finally:
            self.disk.close(other)

    def _last_number(self, folder: str, name: str) -> int:
        """Return the last number that is taken, in a logarithmic number of looks.

        Not from 1 each time: 10,000 files of one name would make the next one slow.
        """

        def is_taken(number: int) -> bool:
            path = os.path.join(folder, numbered(name, number))
            return self.disk.stat_path(path) is not None

        low, high = 0, 1
        while is_taken(high):
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if is_taken(middle) else (low, middle)
        return low

    def _give(self, file: _File, target: str) -> bool:
        """Give a file of ours this name, unless it is taken and we do not replace."""
        if not self.disk.unlinks_open:  # nor renames
            file.close()
        try:
            if self.policy == "replace":
                self.disk.rename(file.path, target)
            elif self.disk.links or not self.disk.unlinks_open:
                self.disk.publish(file.path, target)
            else:
                with lock_of(self.disk, self._lock):
                    self.disk.publish(file.path, target)
        except FileExistsError:
            return False
        except (IsADirectoryError, NotADirectoryError) as error:
            raise _taken(os.path.basename(target)) from error
        return True


def _no_folder(word: str) -> Conflict:
    return Conflict(f"{quoted(word)} is not a folder on the server.")


def _taken(path: str) -> Conflict:
    name = path.rpartition("/")[2]
    return Conflict(f"There is a file {quoted(name)} already.")


# ---- beginnings and ends -------------------------------------------------------------
# Law: exactly one finish.  Whoever holds the lock of a complete upload names its file
# and writes down that it has; only then is it announced, and answered.  What dies in
# between is finished by the next chunk or sweep, which know the file by its inode.
# <key>-<generation>.call is locked by whoever is inside of on_complete.

_WAIT_SECONDS = 10.0  # for what may still differ, before a file gets its name
_BUSY_SECONDS = 60.0  # between the chunks of a client that sends one after the other


class _Sample(NamedTuple):
    """Recorded bytes that a test was told to send again, and may until then."""

    key: str
    is_first: bool
    start: int
    end: int
    until: float


class _Expected:
    """What may still show that a file was changed: bodies, and samples asked for."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._bodies: list[Any] = []  # under way; replaced, never changed
        self._samples: list[_Sample] = []

    def ask(self, key: str, start: int, end: int) -> None:
        """A test was told to send these recorded bytes again, as a sample."""
        now, which = time.monotonic(), (key, start < 1)
        with self._change:
            rest = [o for o in self._samples if now < o.until and o[:2] != which]
            self._samples = [*rest, _Sample(*which, start, end, now + _WAIT_SECONDS)]

    def begin(self, body: Body | Whole) -> None:
        """A body is under way, and with it the samples of its range."""
        key, start, end = body.key, body.start, body.end
        with self._change:
            self._bodies = [*self._bodies, body]
            self._samples = [
                one
                for one in self._samples
                if one.key != key or one.end <= start or end <= one.start
            ]

    def end(self, body: Body | Whole) -> None:
        """Nothing of a body can differ any more."""
        with self._change:
            self._bodies = [one for one in self._bodies if one is not body]
            self._change.notify_all()

    def bodies(self, key: str) -> list[Body]:
        """Return the bodies of an upload that are under way."""
        return [one for one in self._bodies if one.key == key]

    def left(self) -> int:
        """Return how many bytes may still come, of all uploads."""
        return sum(one.left for one in self._bodies)

    def wait(self, key: str) -> None:
        """Return when nothing is expected any more, or after a while."""
        last = time.monotonic() + _WAIT_SECONDS
        with self._change:
            while True:
                ends = [one.until for one in self._samples if one.key == key]
                ends += [last] * bool(self.bodies(key))
                left = min(max(ends, default=0.0), last) - time.monotonic()
                if left <= 0:
                    return
                self._change.wait(left)


class _Uploads:
    """The beginnings and ends of uploads; most is to be called under their locks."""

    def __init__(
        self,
        publisher: _Publisher,
        folder: str,
        announce: Callable[[Done], None] | None,
        clock: Callable[[], float],
        max_uploads: int,
        min_free_space: int,
    ) -> None:
        self.publisher = publisher
        self.disk = publisher.disk
        self.folder = folder
        self.announce = announce
        self.clock = clock
        self.max_uploads = max_uploads
        self.min_free_space = min_free_space
        self._random = secrets.token_hex(4)
        self.entered = _Ledgers(self.disk, folder, self._mend).entered
        self.expected = _Expected()
        self.count = 0  # of unfinished uploads, in all processes, as far as is known
        self.failures = 0  # of flushes: what was written until then may be lost
        self._announced: set[str] = set()  # generations of which no line could say so
        self.mutex = threading.Lock()

    @property
    def process(self) -> str:
        """A name of this process, also when it was forked with the store."""
        return f"{self._random}{os.getpid():08x}"

    def _mend(self, ledger: _Ledger) -> None:
        """Finish what a crash left with a name."""
        if ledger.state.is_unfinished and self._named(ledger.state):
            self.finish(ledger, {})

    # Beginnings

    def require_room(self) -> None:
        """Raise TooLarge when there are as many unfinished uploads as may be."""
        if 0 < self.max_uploads <= self.count:
            raise TooLarge(
                f"There are {self.max_uploads} unfinished uploads already"
                " (max_uploads)."
            )

    def require_space(self, whole: int, size: int = 0, left: int = 0) -> None:
        """Raise TooLarge when a new file of `whole` bytes has no room.

        Raises Trouble when a body that has `left` bytes has none for `size` of them.
        What other bodies have left is as good as written.
        """
        if not self.min_free_space:
            return
        free = self.disk.free_space(self.folder) - self.min_free_space
        free -= self.expected.left() - left
        if whole > free:
            raise TooLarge(
                f"The disk has no room for {in_units(whole)} (min_free_space)."
            )
        if size > free:
            raise Trouble("The disk has no room at the moment (min_free_space).")

    def begin(
        self, ledger: _Ledger, upload: Upload, is_whole: bool, is_kept: bool = False
    ) -> None:
        """Open an upload, or a new version of a finished one.

        The second is refused once, and the receipt dropped, after something had come
        again: nobody can tell which version that belongs to.
        """
        if ledger.state.finished and not self.is_told(ledger.state):
            raise Trouble("The finished file is still being handed on; try again.")
        if ledger.state.came_again and not is_whole:
            self.drop(ledger)
            raise Conflict(_CHANGED)
        boot = "" if self.disk.sync else self.disk.boot_id()
        more = (ledger.state.generation, is_kept, boot, self.clock())
        upload = upload._replace(fields=dict(upload.fields))  # which JSON knows
        self.publisher.refuse_early(upload, is_whole)
        generation = secrets.token_hex(8)
        with self.mutex:
            self.require_room()
            # It is counted by its data file.
            path = ledger.path.replace(".ledger", f"-{generation}.data")
            _File(self.disk, path, os.O_RDWR | os.O_CREAT).close()
            ledger.append(("upload", upload, generation, *more))
            self.count += 1

    def drop(self, ledger: _Ledger) -> None:
        """Forget an upload, or a receipt; needs no free space."""
        ledger.empty()
        if ledger.state.is_unfinished:
            self._discard_data(ledger)

    def _discard_data(self, ledger: _Ledger) -> None:
        with self.mutex:
            self.count = max(0, self.count - 1)
        discard(self.disk, ledger.data_path)

    # Ends

    def conclude(
        self, state: _State, fields: Mapping[str, str], body: Body | None = None
    ) -> Progress:
        """Finish and announce what is complete by now, and recorded durably.

        Called without the lock; a `body` waits for what may still differ.
        """
        key, is_new = state.upload.key, False
        if state.is_complete and not state.finished:
            if body:
                self.expected.end(body)
                self.expected.wait(key)
            with self.entered(key) as ledger:
                if ledger is None or ledger.state.generation != state.generation:
                    raise Conflict(_CANCELLED)
                state, is_new = ledger.state, not ledger.state.finished
                if is_new:
                    self.finish(ledger, fields)
        is_new = self.announce_end(state, waits=is_new) or is_new
        done, began = self.done(state) if state.finished else None, state.begun.time
        return Progress(state.ranges.total, state.upload.size, done, is_new, began)

    def name_at_once(self, part: _Part, upload: Upload) -> Progress:
        """Finish a file that came in one piece: a link, and no ledger."""
        path, is_new = self.publisher.place(part, upload.path, lambda path: None)
        state = _State(upload, part.name)
        state.finished = _Place(path, 0, {})
        return Progress(upload.size, upload.size, self.done(state), is_new)

    def done(self, state: _State) -> Done:
        """Return what is told of a finished upload."""
        place, upload = state.finished, state.upload
        assert place is not None
        return Done(
            id=f"{upload.key}-{state.generation}",
            path=self.publisher.path(place.path),
            relative_path=place.path,
            filename=place.path.rpartition("/")[2],
            size=upload.size,
            owner=upload.owner,
            identifier=upload.identifier,
            fields=place.fields,
        )

    def finish(self, ledger: _Ledger, fields: Mapping[str, str]) -> None:
        """Name a complete upload's file, and turn its ledger into the receipt.

        That it is about to be named is on the disk before its name is, so that after a
        power cut nobody writes into the published file.
        """
        state = ledger.state
        fields = fields or state.upload.fields
        place = self._named(state) or self._name(ledger, fields)
        status = self.disk.stat_path(self.publisher.path(place.path))
        if status:
            place = place._replace(inode=status.st_ino, modified=status.st_mtime_ns)
        lines: list[tuple[Any, ...]] = [("finished", *place)]
        if not self.announce:  # nor is it announced to who comes later
            lines.append(("announced", secrets.token_hex(2)))
        ledger.append(*lines)
        ledger.flush(ledger.fd)
        self._discard_data(ledger)
        if not self.announce:
            ledger.cut_down()

    def _named(self, state: _State) -> _Place | None:
        """Return where a crash left the data file of an unfinished upload."""
        for place in reversed(state.intents):
            path, size = self.publisher.path(place.path), state.upload.size
            status = self.disk.stat_path(path)
            if status and (status.st_ino, status.st_size) == (place.inode, size):
                self.disk.flush_names(os.path.dirname(path))
                return place
        return None

    def _name(self, ledger: _Ledger, fields: Mapping[str, str]) -> _Place:
        """Give the data file its name; drop the upload when it can never have one."""
        upload, data = ledger.state.upload, _File(self.disk, ledger.data_path)
        status = self.disk.stat(data.fd)
        if status.st_size != upload.size:
            self.drop(ledger)  # a power cut without sync: the ledger outlived the data
            raise Trouble("Stored bytes of this file were lost; please send it again.")

        def intend(path: str) -> None:
            ledger.append(("publish", path, status.st_ino, fields))
            ledger.flush(ledger.fd)

        try:
            path, _ = self.publisher.place(data, upload.path, intend)
        except Conflict:
            self.drop(ledger)
            raise
        finally:
            data.close()
        return _Place(path, status.st_ino, fields)

    def announce_end(self, state: _State, waits: bool) -> bool:
        """Call on_complete unless that was done; return whether it was done here.

        Outside of the upload's lock.  Whoever is inside of the call holds a lock that
        ends with its process; `waits` for that one.
        """
        if self.announce is None or not state.finished or state.is_announced:
            return False
        name = f"{state.upload.key}-{state.generation}.call"
        path = os.path.join(self.folder, name)
        with lock_of(self.disk, path, waits) as fd:
            is_mine = fd >= 0 and self._announce(state)
            if fd >= 0 and self.disk.unlinks_open:
                discard(self.disk, path)
            return is_mine

    def _announce(self, state: _State) -> bool:
        assert self.announce is not None
        key, generation = state.upload.key, state.generation
        with self.entered(key) as ledger:
            if ledger is None or ledger.state.generation != generation:
                return False
            if self.is_told(ledger.state):
                return False
        self.announce(self.done(state))
        try:
            with self.entered(key) as ledger:
                if ledger and ledger.state.generation == generation:
                    ledger.append(("announced", secrets.token_hex(2)))
                    ledger.cut_down()
        except OSError:  # then once while this process lives will do
            self._announced.add(generation)
        return True

    def is_told(self, state: _State) -> bool:
        """Whether on_complete has returned, as far as this process knows."""
        is_known = state.generation in self._announced  # no line could say so
        return not self.announce or state.is_announced or is_known


# ---- bodies --------------------------------------------------------------------------
# Law: bytes go to their place in the data file while they come.  Each block asks under
# the lock what is still missing: that is written, what is recorded is compared.  A body
# that others have overwritten with other bytes records nothing.  What comes after the
# end is compared with the finished file, and goes on in a new upload where it differs.
# A file in one chunk goes to a private file, which is then named.


class Whole:
    """A file that comes in one piece; its size may show at its end.

    write() in order, commit() once, close().
    """

    key, start, end = "", 0, 0  # of no upload yet

    def __init__(self, uploads: _Uploads, at_most: int) -> None:
        uploads.require_room()
        self.size = 0  # bytes so far
        self.left = at_most
        self._uploads = uploads
        self._part = _Part(uploads.disk, uploads.folder)
        uploads.expected.begin(self)
        try:
            uploads.require_space(at_most, left=at_most)
        except FlowError:
            self.close()
            raise

    def __enter__(self) -> Whole:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, block: bytes | memoryview) -> None:
        """Take the next bytes."""
        with explained():
            self._uploads.disk.write(self._part.fd, block, self.size)
        self.size += len(block)
        self.left -= len(block)

    def commit(
        self, upload: Upload, fields: Mapping[str, str] | None = None
    ) -> Progress:
        """Name the file; of `upload` the size is what came.  Raises as Body does."""
        uploads = self._uploads
        if upload.size != self.size:
            upload = upload._replace(size=self.size)
        with explained():
            uploads.disk.flush(self._part.fd)
            if not uploads.announce:
                return uploads.name_at_once(self._part, upload)
            with uploads.entered(upload.key, create=True) as ledger:
                assert ledger is not None and not ledger.state.generation
                uploads.begin(ledger, upload, is_whole=True)
                state = ledger.state
                try:
                    self._part.close()
                    uploads.disk.rename(self._part.path, ledger.data_path)
                    ledger.append(("range", 0, upload.size))
                except OSError:
                    uploads.drop(ledger)
                    raise
            return uploads.conclude(state, fields or {})

    def close(self) -> None:
        """Let go; a file that was not named is removed."""
        self._part.remove()
        self._uploads.expected.end(self)


class Body:
    """One body on its way into the store; write() in order, commit() once, close()."""

    def __init__(
        self,
        uploads: _Uploads,
        upload: Upload,
        start: int,
        end: int,
        is_in_order: bool,
        is_kept: bool,
    ) -> None:
        self.upload = upload
        self.key = upload.key
        self.start = start
        self.end = end
        self.is_in_order = is_in_order  # what comes before it must be stored
        self.is_kept = is_kept  # what has come of it may be recorded before its end
        self.position = start  # in place, changed under the lock: others look at it
        self._uploads = uploads
        self._disk = uploads.disk
        self.name = ""  # of its claims
        self._whole: Whole | None = None  # aside,
        self._data: _File | None = None  # or in place,
        self._published: _State | None = None  # or there is a finished file instead
        self._generation = ""  # what it belongs to
        self._missing: list[tuple[int, int]] = []  # of its range, when it began
        self._failures = 0  # of flushes, until then
        self._closing = threading.Lock()

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the file."""
        return self.end - self.start == self.upload.size

    @property
    def left(self) -> int:
        """How many bytes may still come."""
        return self.end - self.position

    # Beginnings

    def begin(self) -> None:
        """Find out where the bytes go."""
        uploads = self._uploads
        is_aside = self.is_whole and not (uploads.announce or self.is_kept)
        with uploads.entered(self.key, create=not is_aside) as ledger:
            if ledger is None or is_aside and not ledger.state.generation:
                uploads.publisher.refuse_early(self.upload, is_whole=True)
                self._whole = Whole(uploads, self.upload.size)
                return
            state = ledger.state
            if state.upload.size not in (-1, self.upload.size):
                raise Conflict(_OTHER_SIZE)
            uploads.expected.begin(self)
            if state.finished:
                path = uploads.publisher.path(state.finished.path)
                if state.is_intact(self._disk.stat_path(path)):
                    self._data = _File(self._disk, path, os.O_RDONLY)
                    self._published, self._generation = state, state.generation
                    return
            if not state.is_unfinished:
                uploads.begin(ledger, self.upload, self.is_whole)
            self._join(ledger)

    def _join(self, ledger: _Ledger) -> None:
        """Go on in place, in the upload that the ledger has now."""
        self._generation, self._published = ledger.state.generation, None
        self._failures = self._uploads.failures
        self._missing = ledger.state.ranges.gaps(self.start, self.end)
        if self.is_in_order and ledger.state.ranges.gaps(0, self.start):
            raise Conflict(_NO_BEGINNING)
        if self.is_kept:  # a hanging request gives way
            self._end_others(ledger, memoryview(b""), 0)
        is_new = not ledger.state.ranges.total  # it has no bytes that could be lost
        size = sum(high - low for low, high in self._missing)
        self._uploads.require_space(is_new * self.upload.size, size, self.left)
        self._data = _File(self._disk, ledger.data_path)
        with self._opened():
            if self._missing:
                self.name = f"{self._uploads.process}-{secrets.token_hex(4)}"
                ledger.append(("claim", self.name, self.start, self.end))

    # Bytes

    def write(self, block: bytes | memoryview) -> None:
        """Take the next bytes.

        Raises Conflict when other bytes are recorded there, Trouble, or Malformed when
        there are more than [start, end).
        """
        view, end = memoryview(block), self.position + len(block)
        if end > self.end:
            raise Malformed(f"The chunk has more than {self.end - self.start} bytes.")
        with explained():
            if self._whole:
                self._whole.write(view)
            else:
                if self._published and not self._is_stored(view, self.position):
                    self._leave_published()
                if not self._published:
                    self._write_in_place(view)
        self.position = end

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """Yield the descriptor; Windows renames a file only while nobody has one."""
        assert self._data is not None
        try:
            yield self._data.opened()
        finally:
            if not self._disk.unlinks_open:
                self._data.close()

    def _is_stored(self, block: memoryview, start: int) -> bool:
        with self._opened() as fd:
            for low in range(0, len(block), COMPARED_SIZE):
                piece = block[low : low + COMPARED_SIZE]
                if self._disk.read(fd, len(piece), start + low) != piece:
                    return False
        return True

    def _write_in_place(self, block: memoryview) -> None:
        """Write what is missing, compare the rest, which nobody changes any more."""
        start, end = self.position, self.position + len(block)
        gaps: list[tuple[int, int]] = []
        if self._missing:
            with self._uploads.entered(self.key) as found:
                ledger = self._require_current(found)
                gaps = ledger.state.ranges.gaps(start, end)
                for low, high in gaps:
                    piece = block[low - start : high - start]
                    self._end_others(ledger, piece, low)
                    with self._opened() as fd:
                        self._disk.write(fd, piece, low)
                self.position = end
        for low, high in Ranges(gaps).gaps(start, end):
            if not self._is_stored(block[low - start : high - start], low):
                self._refuse(low, high)
        self.position = end

    def _end_others(self, ledger: _Ledger, block: memoryview, start: int) -> None:
        """End the claims of bodies of this process that wrote other bytes here."""
        for other in self._uploads.expected.bodies(self.key):
            if other is self:
                continue
            if self.is_kept or self._differs(other, block, start):
                ledger.append(("claim", other.name, 0, 0))
                self._uploads.expected.end(other)

    def _differs(self, other: Body, block: memoryview, start: int) -> bool:
        low, high = max(start, other.start), min(start + len(block), other.position)
        piece = block[low - start : high - start]
        return low < high and not self._is_stored(piece, low)

    def _require_current(self, ledger: _Ledger | None) -> _Ledger:
        """Raise Conflict when the upload is over, Trouble when the claim is."""
        if ledger is None or ledger.state.generation != self._generation:
            raise Conflict(_CANCELLED)
        if self._missing and not any(ledger.state.claims.get(self.name, ())):
            raise Trouble(_UNDONE)
        return ledger

    def _refuse(self, start: int, end: int) -> None:
        """Raise what these bytes deserve: they are not those recorded."""
        with self._uploads.entered(self.key) as found:
            ledger = self._require_current(found)
            if not ledger.state.has_changed(start, end, self._missing):
                raise Trouble(_UNDONE)
            # Without an identifier the chunks of another file, which go on, could not
            # be told from those of this one, once it began in that one's place.
            data = self._disk.stat_path(ledger.data_path)
            age = self._uploads.clock() - data.st_mtime if data else math.inf
            if self.is_in_order and not self.upload.is_secret and age < _BUSY_SECONDS:
                raise Conflict(_ANOTHER_FILE)
            self._uploads.drop(ledger)
            raise Conflict(_CHANGED)

    def _leave_published(self) -> None:
        """Go on in a new upload: this is not what the finished file has."""
        uploads, published, file = self._uploads, self._published, self._data
        assert published is not None and file is not None
        with uploads.entered(self.key) as ledger:
            state = ledger.state if ledger else _State()
            if ledger and state.generation == self._generation:
                uploads.begin(ledger, self.upload, self.is_whole)
            elif not ledger or state.begun.supersedes != self._generation:
                raise Conflict(_CANCELLED)
            elif state.finished:
                raise Trouble(_UNDONE)
            self._join(ledger)
        end, self.position = self.position, self.start
        for low in range(self.start, end, COMPARED_SIZE):
            size = min(COMPARED_SIZE, end - low)
            self._write_in_place(memoryview(self._disk.read(file.opened(), size, low)))
        _require_intact(published, file)

    # Ends

    def checkpoint(self) -> None:
        """Record what has come so far, durably, and go on; only in place.

        Others may ask for this; a file that is gone by then is no failure of the disk.
        """
        with self._closing:
            if self._data and not self._published:
                with explained():
                    self._record(is_end=False)

    def commit(self, fields: Mapping[str, str] | None = None) -> Progress:
        """Record the bytes; raises Truncated, Conflict or Trouble, having done nothing.

        When it returns, they survive a power cut (with sync).
        """
        size, wanted = self.position - self.start, self.end - self.start
        if size != wanted:
            raise Truncated(f"The chunk has {size} of {wanted} bytes.")
        with explained():
            if self._whole:
                return self._whole.commit(self.upload)
            try:
                state = self._record(is_end=True)
            except Conflict:
                if not self._published:
                    raise
                self._leave_published()
                state = self._record(is_end=True)
            self._generation = ""  # there is nothing to give back
            body = None if self.is_whole else self
            return self._uploads.conclude(state, fields or {}, body)

    def _record(self, is_end: bool) -> _State:
        """Write down that what has come so far is there, or that it came again."""
        reached = self.position  # others may ask for this while the body goes on
        if self._missing:
            try:
                with self._opened() as fd:
                    self._disk.flush(fd)
            except OSError:
                self._uploads.failures += 1
                raise
        with self._uploads.entered(self.key, flushes=True) as found:
            ledger = self._require_current(found)
            if self._missing and self._failures != self._uploads.failures:
                raise Trouble("The disk could not store the chunk; please try again.")
            gaps = ledger.state.ranges.gaps(self.start, reached)
            lines: list[tuple[Any, ...]] = [("range", *gap) for gap in gaps]
            if is_end and self._missing:
                lines.append(("claim", self.name, 0, 0))
            if lines:
                ledger.append(*lines)
            if is_end and ledger.state.finished:
                if self._published and self._data:
                    _require_intact(self._published, self._data)
                if ledger.state.came_again:  # its receipt is kept longer
                    self._disk.touch(ledger.path)
                else:
                    ledger.append(("again", secrets.token_hex(2)))
            return ledger.state

    def close(self) -> None:
        """Let go; of what was not recorded nothing counts."""
        if self._whole:
            return self._whole.close()
        with self._closing, contextlib.suppress(OSError):  # the rest must be done
            data, self._data = self._data, None
            if data:  # before it may be removed
                data.close()
        if self._generation and not self._published:
            with contextlib.suppress(FlowError, OSError):
                with self._uploads.entered(self.key) as ledger:
                    self._give_back(ledger)
        self._uploads.expected.end(self)

    def _give_back(self, ledger: _Ledger | None) -> None:
        """End a claim; an upload that nobody has stored anything of is dropped."""
        if ledger is None or ledger.state.generation != self._generation:
            return
        state = ledger.state
        if self.name in state.claims:
            ledger.append(("claim", self.name, 0, 0))
        is_empty = not (state.ranges.total or state.claims or state.begun.is_kept)
        if is_empty and not state.finished:
            self._uploads.drop(ledger)


def _require_intact(published: _State, file: _File) -> None:
    """Raise Trouble when somebody has edited a finished file meanwhile."""
    if not published.is_intact(file.disk.stat(file.opened())):
        raise Trouble(_UNDONE)


# ---- store ---------------------------------------------------------------------------
# Law: ranges of bytes of an upload, in any order, from any number of threads and
# processes, become a file below upload_dir: whole, once, and after a crash as well.
# This is what the application calls, and all that it may call.

_LEFTOVER_SECONDS = 3600  # nobody works that long on a file that no ledger names


class Store:
    """Uploads on disk::

        with store.receive(upload, start, end) as body:
            body.write(block)       # as often as it takes, in order
            progress = body.commit()

    `announce` is called with each Done, once while the process lives and after a crash
    at least once; `warn` with what the log should say.  New uploads are refused beyond
    `max_uploads` unfinished ones, and bytes that would leave less than `min_free_space`
    free (0: no limit).  Raises Trouble when `upload_dir` can't be used; starts no
    thread.
    """

    def __init__(
        self,
        upload_dir: str,
        temp_dir: str = "",
        on_conflict: str = "rename",
        disk: Disk | None = None,
        announce: Callable[[Done], None] | None = None,
        warn: Callable[[str], None] = lambda sentence: None,
        clock: Callable[[], float] = time.time,
        max_uploads: int = 0,
        min_free_space: int = 0,
    ) -> None:
        self.upload_dir = _followed(upload_dir)
        temp_dir = temp_dir or os.path.join(self.upload_dir, ".flowserver")
        self.temp_dir = _followed(temp_dir)
        self.state_dir = os.path.join(self.temp_dir, "v2")
        self.disk = disk or Disk()
        self._warn = warn
        self._clock = clock
        lock = os.path.join(self.state_dir, "names.lock")
        publisher = _Publisher(self.disk, self.upload_dir, on_conflict, lock)
        limits = (max_uploads, min_free_space)
        self._uploads = _Uploads(publisher, self.state_dir, announce, clock, *limits)
        try:
            with explained():
                self._make_folders()
                self._try_links()
        except Trouble as error:
            raise Trouble(f"{error} ({self.upload_dir})") from error.__cause__

    @property
    def open_uploads(self) -> int:
        """Unfinished uploads, of all processes, as far as is known."""
        return self._uploads.count

    def receive(
        self,
        upload: Upload,
        start: int,
        end: int,
        is_in_order: bool = False,
        is_kept: bool = False,
    ) -> Body:
        """Begin to take the bytes [start, end) of an upload.

        With `is_in_order` what comes before them must be stored.  With `is_kept` this
        body takes the place of others, and status() records what has come so far.
        Raises Malformed when they are not bytes of it, Conflict when the name is taken
        and on_conflict is "refuse", TooLarge, or Trouble.
        """
        is_empty = start == end and upload.size > 0
        if not 0 <= start <= end <= upload.size or is_empty:
            raise Malformed(
                f"Bytes {start} to {end} are not all in a file of {upload.size}."
            )
        body = Body(self._uploads, upload, start, end, is_in_order, is_kept)
        try:
            with explained():
                body.begin()
        except FlowError:
            body.close()
            raise
        return body

    def receive_whole(self, at_most: int) -> Whole:
        """Begin to take a file that comes in one piece, of `at_most` so many bytes."""
        with explained():
            return Whole(self._uploads, at_most)

    def open(self, upload: Upload) -> Progress:
        """Make an upload before its first byte comes; one of 0 bytes is finished."""
        if not upload.size:
            with self.receive(upload, 0, 0, is_kept=True) as body:
                return body.commit()
        uploads, key = self._uploads, upload.key
        with explained(), uploads.entered(key, create=True, flushes=True) as ledger:
            assert ledger is not None
            if not ledger.state.generation:
                uploads.require_space(upload.size)
                uploads.begin(ledger, upload, is_whole=False, is_kept=True)
            return Progress(ledger.state.ranges.total, upload.size)

    def has(self, upload: Upload, start: int, end: int) -> bool:
        """Return whether [start, end) need not be sent; changes nothing on the disk."""
        with explained(), self._look(upload.key) as state:
            if state.is_sample(start, end):
                self._uploads.expected.ask(upload.key, start, end)
            return state.may_skip(start, end)

    def status(self, key: str) -> Status | None:
        """Return what is known of an upload; None when that is nothing.

        What bodies under way have brought is recorded first, where they are kept.
        """
        for body in self._uploads.expected.bodies(key):
            if body.is_kept and self.disk.unlinks_open:
                with contextlib.suppress(FlowError):  # it is over, or told itself
                    body.checkpoint()
        with explained(), self._look(key) as state:
            if not state.generation:
                return None
            place = state.finished
            path = self._uploads.publisher.path(place.path) if place else ""
            is_there = place and state.is_intact(self.disk.stat_path(path))
            done = self._uploads.done(state) if is_there else None
            told = state.ranges.within(*state.told)
            is_finished = place is not None
            return Status(state.upload, list(state.ranges), told, is_finished, done)

    def forget(self, key: str) -> bool:
        """Drop an unfinished upload; a finished file is never touched."""
        with explained(), self._uploads.entered(key) as ledger:
            if ledger is None or not ledger.state.is_unfinished:
                return False
            self._uploads.drop(ledger)
            return True

    @contextlib.contextmanager
    def _look(self, key: str) -> Iterator[_State]:
        """Yield what is known of an upload, and see that it is on the disk."""
        with self._uploads.entered(key, flushes=True, mends=False) as ledger:
            if ledger is None and self.disk.stat_path(self.state_dir) is None:
                # Nobody knows what was there.
                raise FileNotFoundError(errno.ENOENT, "is gone", self.state_dir)
            yield ledger.state if ledger else _State()

    # In order

    def count(self) -> None:
        """Count the unfinished uploads of all processes anew."""
        with explained(), self._uploads.mutex:  # none of ours begins now
            names = self.disk.list(self.state_dir)
            self._uploads.count = sum(name.endswith(".data") for name in names)

    def sweep(self, stale_after: float, keep_receipts: float) -> None:
        """Finish what a crash left, remove what nobody wants; times in seconds.

        Meant for the start and now and then; safe beside other processes.
        """
        with explained():
            names = self.disk.list(self.state_dir)
        uploads: dict[str, list[str]] = {}
        for name in names:
            if name.endswith(".part"):
                self._unlink_old(name)
            elif name.endswith((".ledger", ".data", ".call")):
                uploads.setdefault(re.split("[-.]", name)[0], []).append(name)
        for key, files in uploads.items():
            try:
                state = self._sweep_upload(key, stale_after, keep_receipts)
                self._unlink_others(key, state, files)
            except (FlowError, OSError) as error:  # the others want their turn
                self._warn(f"upload {key} can't be brought in order: {error}")
        self.count()

    def _sweep_upload(
        self, key: str, stale_after: float, keep_receipts: float
    ) -> _State:
        """Bring one upload in order; return the state that goes on."""
        uploads = self._uploads
        with uploads.entered(key) as ledger:
            if ledger is None or not ledger.state.generation:
                return _State()
            state, data = ledger.state, self.disk.stat_path(ledger.data_path)
            files = filter(None, (self.disk.stat(ledger.fd), data))
            age = self._clock() - max(file.st_mtime for file in files)
            if state.finished:
                is_over = age > keep_receipts and uploads.is_told(state)
            else:
                is_over = age > stale_after
            is_free = not uploads.expected.bodies(key)
            if is_free and is_over or self._is_lost(state, data):
                uploads.drop(ledger)
                return _State()
            if is_free and state.is_unfinished and state.is_complete:
                uploads.finish(ledger, {})
        uploads.announce_end(state, waits=False)
        return state

    def _is_lost(self, state: _State, data: os.stat_result | None) -> bool:
        """Whether recorded bytes may be missing.

        That is when the power was cut with sync off, or somebody has removed them.
        """
        is_short = data is None or data.st_size < state.ranges.end
        is_old = state.begun.boot not in ("", self.disk.boot_id())
        return state.is_unfinished and (is_short or is_old)

    def _unlink_others(self, key: str, state: _State, names: Iterable[str]) -> None:
        """Remove what a ledger does not name: it is older than what the ledger says."""
        kept = f"{key}-{state.generation}" + (".call" if state.finished else ".data")
        for name in names:
            if name.endswith(".ledger"):
                # Emptied, which is all that Windows can do.  Elsewhere a request may
                # have made it just now.
                if not (state.generation or self.disk.unlinks_open):
                    self._unlink_old(name)
            elif name != kept:
                discard(self.disk, os.path.join(self.state_dir, name))

    def _unlink_old(self, name: str) -> None:
        """Remove a file of ours that nobody has written to for long."""
        path = os.path.join(self.state_dir, name)
        status = self.disk.stat_path(path)
        if status and self._clock() - status.st_mtime > _LEFTOVER_SECONDS:
            discard(self.disk, path)

    # Folders

    def _make_folders(self) -> None:
        self._make_folder(self.upload_dir, 0o777)
        for path in (self.temp_dir, self.state_dir):
            if os.path.exists(path) and os.path.samefile(path, self.upload_dir):
                raise Trouble("Clients could replace what is in temp_dir.")
            self._make_folder(path, 0o700)
        if os.stat(self.upload_dir).st_dev != os.stat(self.state_dir).st_dev:
            raise Trouble(
                f"temp_dir {self.temp_dir} is not on the same file system as upload_dir"
                f" {self.upload_dir}."
            )
        parent = os.path.realpath(os.path.dirname(self.temp_dir))
        for path in (self.upload_dir, parent, self.temp_dir):
            self.disk.flush_names(path)

    def _make_folder(self, path: str, mode: int) -> None:
        """Make a folder where it is missing, but none above it."""
        try:
            self.disk.make_folder(path, mode)
        except FileNotFoundError as error:
            parent = os.path.dirname(path)
            raise Trouble(
                f"{path} can't be made: {parent} is missing (is its disk mounted?)."
            ) from error
        except OSError as error:
            raise Trouble(f"{path} can't be made: {error.strerror}.") from error

    def _try_links(self) -> None:
        """Find out whether files can have two names here; publication relies on it."""
        if not self.disk.links:
            return
        part = _Part(self.disk, self.state_dir)
        try:
            self.disk.publish(part.path, part.path + ".part")
            self.disk.unlink(part.path + ".part")
        except OSError as error:
            if errno.errorcode.get(error.errno or 0) not in _NO_LINKS:
                raise
            self.disk.links = False
            self._warn(
                "This file system has no hard links: names are checked under a lock,"
                " and another program may take one in between."
            )
        finally:
            part.remove()


_NO_LINKS = ("EPERM", "ENOSYS", "EOPNOTSUPP", "ENOTSUP", "EMLINK")


def _followed(path: str) -> str:
    """Return the absolute path; what is a link itself is where it leads to."""
    path = os.path.abspath(path)  # without the "/" after a link, which would hide it
    return os.path.realpath(path) if os.path.islink(path) else path


# ---- page ----------------------------------------------------------------------------
# Law: one string, complete in itself: no other file, no other host, nothing inline that
# the policy would have to allow, and every name from outside is shown as text.


def page(settings: Mapping[str, object], nonce: str) -> str:
    """Return the upload page with its settings, for a policy with this nonce."""
    text = json.dumps(settings).replace("<", "\\u003c")
    words = PAGE.replace("__NONCE__", nonce).replace("__SETTINGS__", text)
    return words.replace("__PATH__", html.escape(str(settings["uploadPath"])))


PAGE = r"""<!DOCTYPE html>
<html lang="en"><head>
<meta charset="utf-8"><title>Upload – flowserver</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style nonce="__NONCE__">
:root { color-scheme: light dark; scrollbar-gutter: stable;
  --page: #f3f5f7; --card: #fff; --ink: #1d2733; --soft: #556170; --line: #d9e0e6; --rail: #e4e9ee;
  --accent: #1c6482; --strong: #154f68; --on-accent: #fff; --good: #24724a; --bad: #a8322b; }
@media (prefers-color-scheme: dark) { :root { --page: #12171c; --card: #1a2127; --ink: #e6ebf0;
  --soft: #9eabb8; --line: #303b45; --rail: #2a343d; --accent: #74bcdb; --strong: #9bd2ea;
  --on-accent: #0c1a22; --good: #74cd9c; --bad: #f2938a; } }
* { box-sizing: border-box; margin: 0; padding: 0; } [hidden], ul:empty { display: none !important }
body { padding: clamp(1rem, 4vw, 3rem) 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 46rem; margin: 0 auto; }
h1 { font-size: 1.6rem; font-weight: 650; letter-spacing: -.01em; }
h2, .name { flex: 1; font-size: inherit; font-weight: 600; }
section, ul { margin-top: 1.25rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .8rem; list-style: none; } section { padding: 1.25rem; }
button { min-height: 2.5rem; padding: .4rem 1rem; border: 1px solid var(--line); cursor: pointer;
  border-radius: .6rem; background: none; color: var(--accent); font: inherit; }
button:hover:enabled { border-color: var(--accent); color: var(--strong); }
button:disabled { color: var(--soft); opacity: .55; cursor: default; }
button.primary:enabled { background: var(--accent); color: var(--on-accent); }
button.primary:hover { background: var(--strong); }
button.icon { width: 2.5rem; padding: 0; border-color: transparent; color: var(--soft); }
button.link { min-height: 0; padding: 0 .5rem; border: 0; text-decoration: underline; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
svg { width: 1.1rem; height: 1.1rem; vertical-align: -.2em; fill: none; stroke: currentColor;
  stroke-width: 1.75; stroke-linecap: round; stroke-linejoin: round; }
progress { appearance: none; display: block; width: 100%; height: .4rem; border: 0;
  border-radius: .3rem; background: var(--rail); overflow: hidden; }
progress::-webkit-progress-bar { background: var(--rail); }
progress::-webkit-progress-value { background: var(--bar, var(--accent)); }
progress::-moz-progress-bar { background: var(--bar, var(--accent)); }
.soft, .numbers { color: var(--soft); font-size: .9rem; }
.row, .words, .buttons { display: flex; gap: .75rem; justify-content: space-between; }
.words { flex-wrap: wrap; gap: 0 1rem; margin-top: .5rem; font-size: .9rem; }
.words > * { min-width: 6em; min-height: 1.5em; overflow-wrap: anywhere; }
.numbers { flex: auto; text-align: end; } #share { min-width: 4em; text-align: end; }
.buttons { flex-wrap: wrap; justify-content: flex-start; margin-top: 1rem; }
#drop { padding: 2rem 1.25rem; border: 1.5px dashed #8593a1; text-align: center; }
#drop .buttons { justify-content: center; } #drop > svg { width: 2.4rem; height: 2.4rem;
  stroke-width: 1; color: var(--accent); }
.dropping::after { content: ""; position: fixed; inset: 0; border: .5rem solid var(--accent); }
li { padding: .6rem 1.25rem 1rem; content-visibility: auto; contain-intrinsic-size: auto 6.3rem; }
li + li { border-top: 1px solid var(--line); } #all progress { height: .6rem; margin-top: .75rem; }
li .row { gap: 0; margin-right: -.75rem; }
.name { min-width: 0; padding: .45rem 0; overflow-wrap: anywhere; }
.paused, .failed { --bar: var(--soft); } .done { --bar: var(--good); }
li.done .state { color: var(--good); } .failed .state, .lost .state { color: var(--bad); }
.done .toggle, #all:not(.lost) #try-now { visibility: hidden; } li.failed { --bar: var(--bad); }
#news { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (max-width: 34rem) { .words, #drop .buttons { flex-direction: column; }
  .numbers { text-align: start; } #all .buttons button { flex: 1 1 8rem; } }
@media (forced-colors: active) { progress { border: 1px solid; --rail: Canvas; --bar: Highlight; } }
</style></head>
<body><main>
  <h1>Upload files</h1>
  <noscript><style nonce="__NONCE__">#drop { display: none; }</style>
    <section><form method="post" enctype="multipart/form-data" action="__PATH__">
      <input type="file" name="file" multiple required> <button>Upload</button>
    </form></section></noscript>
  <section id="drop" aria-label="Add files">
    <svg viewBox="0 0 16 16"><path d="M8 10.5V2M4.5 5.5L8 2l3.5 3.5M2 10v3.5h12V10"/></svg>
    <p>Drop files or folders anywhere</p>
    <p id="limit" class="soft"></p>
    <p class="soft">An interrupted upload goes on when you choose the file again.</p>
    <div class="buttons">
      <button id="choose-files" class="primary">Choose files</button>
      <button id="choose-folder">Choose a folder</button>
    </div>
    <input type="file" id="files" multiple hidden>
    <input type="file" id="folder" multiple webkitdirectory hidden>
  </section>
  <section id="all" aria-labelledby="all-title" hidden><div class="row">
      <h2 id="all-title">All files</h2><button id="try-now" class="link">Try now</button>
      <p id="share"></p>
    </div>
    <progress aria-labelledby="all-title"></progress>
    <div class="words"><p class="state"></p><p class="numbers"></p></div>
    <div class="buttons">
      <button id="pause-all">Pause all</button>
      <button id="clear-finished">Clear finished</button>
      <button id="retry-failed">Retry failed</button>
    </div>
  </section>
  <ul id="list" role="list" aria-label="Files"></ul><p id="news" role="status"></p>
</main>
<template><li><div class="row">
    <p class="name"><bdi></bdi></p>
    <button class="icon toggle"><svg viewBox="0 0 16 16"><path/></svg></button>
    <button class="icon remove"><svg viewBox="0 0 16 16"><path/></svg></button>
  </div>
  <progress></progress><div class="words"><p class="state"></p><p class="numbers"></p></div>
</li></template>
<script type="application/json" nonce="__NONCE__" id="settings">__SETTINGS__</script>
<script nonce="__NONCE__">
'use strict';
const $ = (selector, within = document) => within.querySelector(selector);
const settings = JSON.parse($('#settings').textContent);
const chunkSize = Math.min(settings.chunkSize, settings.maxChunkSize || Infinity);
const maxRequests = 3, maxWaitSeconds = 60;
let stallSeconds = Math.max(90, 1.5 * settings.timeout);    // longer than the server waits
const limit = `Files may have up to ${sizeInWords(settings.maxFileSize)}.`;
const uploads = new Set();  // in their turns
const total = {moved: 0, speed: 0};     // bytes since the last second, bytes a second
let requestsUnderWay = 0, gate = {opensAt: 0};    // shut while the server is out of reach

// ---- Words ----
function sizeInWords(bytes) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let unit = 0;
  for (; bytes >= 1024 && unit < units.length - 1; unit++) bytes /= 1024;
  return `${unit && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[unit]}`;
}

function timeInWords(seconds) {
  if (seconds < 100) return `${Math.max(1, Math.ceil(seconds))} s`;
  return seconds < 6000 ? `${Math.ceil(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function progressInWords({sent, size, speed}) {
  const words = `${sizeInWords(sent)} of ${sizeInWords(size)}`;
  if (speed < 1) return words;
  return `${words} · ${sizeInWords(speed)}/s · ${timeInWords((size - sent) / speed)} left`;
}

const countdown = ({words, opensAt}) =>
  `${words}, trying again in ${timeInWords((opensAt - performance.now()) / 1000)}`;
function setText(element, text) { if (element.textContent !== text) element.textContent = text; }

const news = [];            // for screen readers; many at once are told as one sum
function announce(words) {
  if (news.push(words) === 1) setTimeout(() => {
    const told = news.splice(0);
    $('#news').textContent = told.length < 4 ? told.join('. ') : $('#all .state').textContent;
  }, 500);
}

// ---- Requests ----
function openRequest(method, query, body, onMoved) {
  const xhr = new XMLHttpRequest(), began = performance.now(), stall = stallSeconds;
  xhr.open(method, `${settings.uploadPath}?${query}`);
  Object.assign(xhr, {responseType: 'json', timeout: 1000 * stall, loaded: 0});
  xhr.ontimeout = () => { if (stall < 500) stallSeconds = 2 * stall; };    // a slow tunnel?
  xhr.upload.onprogress = ({loaded}) => {
    onMoved(loaded - xhr.loaded);
    xhr.loaded = loaded;
    xhr.timeout = performance.now() - began + 1000 * stall;
  };
  xhr.ended = new Promise(resolve => { xhr.onloadend = resolve; });
  if (body) xhr.setRequestHeader('Content-Type', 'application/octet-stream');
  xhr.send(body);
  return xhr;
}

const isRefusal = status => status >= 400 && status < 500 && status !== 408 && status !== 429;
function troubleInWords(status, answer) {
  if (status === 0) return 'Connection lost';
  if (status === 200) return 'This answer is not from flowserver';  // a proxy's, a login page
  return String(answer.error || `The server answered with status ${status}`).replace(/\.$/, '');
}

// Some requests at a time over all files; a file waits for those before it.
function pump() {
  for (const upload of uploads)
    while (requestsUnderWay < maxRequests && performance.now() >= gate.opensAt && upload.begin());
  show();
}

// ---- One upload and its row ----
class Upload {
  constructor(file, path, identifier, error) {
    Object.assign(this, {file, path, identifier, error, size: file.size, stored: 0, moved: 0});
    this.flights = new Set();             // its requests under way
    this.chunkCount = Math.max(1, Math.ceil(file.size / chunkSize));
    this.row = $('template').content.firstElementChild.cloneNode(true);
    $('.toggle', this.row).style.visibility = error ? 'hidden' : '';
    $('bdi', this.row).textContent = path;
    $('progress', this.row).setAttribute('aria-label', `Progress of ${path}`);
    this.startOver();
  }

  startOver() {
    this.failures = this.opensAt = 0;
    this.forgetMissing();
    this.become('waiting'); // then running, paused, done, failed, cancelled
    if (this.error) this.end('failed', this.error);
  }

  forgetMissing() {
    this.mustAsk = this.chunkCount > 1;   // one chunk is sent unasked: the server compares it
    this.missing = this.mustAsk ? [] : [0];
  }

  get isActive() { return this.state === 'waiting' || this.state === 'running'; }
  get isUnfinished() { return this.isActive || this.state === 'paused'; }
  get sent() {
    let sent = this.state === 'done' ? this.size : this.stored;
    for (const flight of this.flights) sent += flight.loaded;
    return Math.min(sent, this.size);
  }

  begin() {                 // a request, when there is one to make
    const hasChunk = !this.mustAsk && this.missing.length > 0;
    if (!this.isActive || performance.now() < this.opensAt) return false;
    if (!hasChunk && this.flights.size) return false;   // it asks when all chunks are answered
    this.state = 'running';
    if (hasChunk) this.sendChunk(this.missing.pop()); else this.ask();
    return true;
  }

  async ask() {
    const isAllSent = !this.mustAsk;
    const answer = await this.request('GET', this.query());
    if (answer?.status === 'complete') this.finish(answer);
    else if (answer && isAllSent) this.loseTouch('The server has not got all of it');
    else if (answer) this.plan(answer.ranges || []);
    pump();
  }

  async sendChunk(index) {
    const [start, end] = this.bytesOf(index);
    const answer = await this.request('POST', this.query({
      flowChunkNumber: index + 1, flowChunkSize: chunkSize, flowCurrentChunkSize: end - start,
    }), this.bytes(start, end));
    if (answer) Object.assign(this, {stored: this.stored + end - start, failures: 0});
    if (answer?.status === 'complete') this.finish(answer);
    pump();
  }

  // Of an empty file all is sent: an empty slice would hide that it is not empty any more.
  bytes(start, end) { return this.size ? this.file.slice(start, end) : this.file; }
  bytesOf(index) { return [index * chunkSize, Math.min((index + 1) * chunkSize, this.size)]; }

  // Send the chunks that no range (they are sorted and merged) holds whole, the lowest first.
  plan(ranges) {
    let at = 0;
    Object.assign(this, {mustAsk: false, missing: [], stored: this.size});
    for (let index = 0; index < this.chunkCount; index++) {
      const [start, end] = this.bytesOf(index);
      while (at < ranges.length && ranges[at][1] < end) at++;
      if (at < ranges.length && ranges[at][0] <= start) continue;
      this.missing.push(index);
      this.stored -= end - start;
    }
    this.missing.reverse();
    // All there but not yet a file (a crash): any chunk, repeated, makes the server finish it.
    if (!this.missing.length) this.missing = [this.chunkCount - 1];
  }

  query(parameters) {
    return new URLSearchParams({
      ...parameters, flowTotalSize: this.size, flowIdentifier: this.identifier,
      flowFilename: this.file.name, flowRelativePath: this.path, flowTotalChunks: this.chunkCount,
    }).toString().replaceAll('+', '%20');
  }

  // The answer, or null where it was no good or nobody waits for it any more.
  async request(method, query, body) {
    const flight = openRequest(method, query, body, bytes => {
      for (const one of [this, total]) one.moved += bytes;
      show();
    });
    this.flights.add(flight);
    requestsUnderWay++;
    await flight.ended;
    requestsUnderWay--;
    const {status} = flight, answer = flight.response || {};
    // A file that changed after it was chosen fails like a lost connection; only reading it tells.
    const isGone = !status && await this.bytes(0, 1).text().then(() => false, () => true);
    if (!this.flights.delete(flight)) return null;
    if (status === 200 && answer.status) {
      if (gate.opensAt) announce('Connected again');
      gate = {opensAt: 0};
      return answer;
    }
    if (isGone) gone.add(this);
    if (isGone) this.end('failed', 'This file has changed or is gone: choose it again.');
    else if (isRefusal(status)) each(one => one === this || (status === 401 && one.isActive),
      one => one.end('failed', answer.error || `Refused: status ${status}.`));
    else this.loseTouch(troubleInWords(status, answer), flight.getResponseHeader('Retry-After'));
    return null;
  }

  loseTouch(words, retryAfter) {
    if (performance.now() >= this.opensAt) this.failures++;    // what fails together is one failure
    const wait = Number(retryAfter) || Math.min(maxWaitSeconds, 2 ** (this.failures - 1));
    Object.assign(this, {words, opensAt: performance.now() + 1000 * wait});
    this.speed = total.speed = 0;
    if (retryAfter) uploads.delete(this), uploads.add(this);  // the others' turn
    this.forgetMissing();
    if (!gate.opensAt) announce(`${words}, trying again`);
    gate = {words, opensAt: this.opensAt};
  }

  become(state) {           // and stop what is under way
    Object.assign(this, {state, speed: 0});
    const flights = [...this.flights];
    this.flights.clear();
    for (const flight of flights) flight.abort();
    this.draw();
  }

  end(state, words) {
    this.words = words;
    this.become(state);
    announce(`${this.path}: ${words}`);
  }

  finish({path = this.path}) {
    this.end('done', path === this.path ? 'Finished' : `Finished, saved as ${path}`);
  }
  toggle() { if (this.isActive) this.become('paused'); else this.startOver(); }

  remove() {
    const isDone = this.state === 'done' || this.error, hadFlights = this.flights.size;
    const next = this.row.nextElementSibling || this.row.previousElementSibling;
    if (this.row.contains(document.activeElement))
      (next ? $('.remove', next) : $('#choose-files')).focus();
    this.become('cancelled');
    this.row.remove();
    uploads.delete(this);
    if (isDone) return;
    const isBack = () => identifiers.has(this.identifier + this.path);
    identifiers.delete(this.identifier + this.path);
    openRequest('DELETE', this.query());
    // A body that was on its way may be taken in after that.
    if (hadFlights) setTimeout(() => isBack() || openRequest('DELETE', this.query()), 3000);
  }

  draw() {
    const {row, state, sent, size, isUnfinished} = this;
    if (row.className !== state) this.drawButtons();
    $('progress', row).value = size ? sent / size : Number(state === 'done');
    setText($('.state', row), this.stateInWords());
    setText($('.numbers', row), sent && isUnfinished ? progressInWords(this) : sizeInWords(size));
  }

  drawButtons() {
    const {row, state, path} = this, toggle = $('.toggle', row), remove = $('.remove', row);
    row.className = state;
    setAction(toggle, {paused: 'Resume', failed: 'Retry'}[state] || 'Pause', path);
    setAction(remove, this.isUnfinished ? 'Cancel' : 'Remove', path);
    if (state === 'done' && document.activeElement === toggle) remove.focus();
  }

  stateInWords() {
    const {state, words} = this, wait = [this, gate].find(one => one.opensAt > performance.now());
    if (state !== 'running') return {waiting: 'Waiting', paused: 'Paused'}[state] || words;
    if (wait && !this.flights.size) return countdown(wait);
    return this.size && this.sent === this.size ? 'Finishing' : 'Uploading';
  }
}

const icons = {             // what a button can say, drawn
  Pause: 'M5.5 3.5v9M10.5 3.5v9', Resume: 'M5 3l8 5-8 5z', Cancel: 'M4 4l8 8M12 4l-8 8',
  Retry: 'M13 8a5 5 0 1 1-1.5-3.5L13 6M13 2.5V6H9.5', Remove: 'M4 4l8 8M12 4l-8 8',
};
function setAction(button, action, path) {
  button.title = action;
  button.setAttribute('aria-label', `${action} ${path}`);
  $('path', button).setAttribute('d', icons[action]);
}

// ---- All uploads ----
let drawing = 0;
function show() { drawing ||= setTimeout(drawAll, 120); }
function drawAll() {
  drawing = 0;
  const count = {waiting: 0, running: 0, paused: 0, done: 0, failed: 0};
  const sum = {sent: 0, size: 0, speed: requestsUnderWay && total.speed};
  for (const upload of uploads) {
    count[upload.state]++;
    if (upload.state === 'running') upload.draw();
    if (upload.state !== 'failed') sum.sent += upload.sent, sum.size += upload.size;
  }
  const isActive = count.waiting + count.running > 0, isUnfinished = isActive || count.paused > 0;
  const state = isActive ? 'running' : isUnfinished ? 'paused' : count.failed ? 'failed' : 'done';
  const share = sum.size ? sum.sent / sum.size : Number(!isUnfinished);
  const title = {failed: 'Failed', done: 'Done'}[state] || `${Math.floor(share * 100)} %`;
  const words = `${count.done} of ${uploads.size} files finished`;
  const isLost = isActive && performance.now() < gate.opensAt;
  $('#all').hidden = !uploads.size;
  $('#all').className = isLost ? 'lost' : state;
  $('#all progress').value = share;
  setText($('#share'), title);
  setText($('#all .state'), isLost ? countdown(gate)
    : count.failed ? `${words}, ${count.failed} failed` : words);
  setText($('#all .numbers'), isUnfinished ? progressInWords(sum) : sizeInWords(sum.size));
  setText($('#pause-all'), state === 'paused' ? 'Resume all' : 'Pause all');
  enable($('#pause-all'), isUnfinished);
  enable($('#clear-finished'), count.done);
  enable($('#retry-failed'), [...uploads].some(isWorthRetry));
  document.title = uploads.size ? `${title} – Upload` : 'Upload – flowserver';
}

const isWorthRetry = one => one.state === 'failed' && !one.error;
function enable(button, isUseful) {
  if (!isUseful && document.activeElement === button) $('#choose-files').focus();
  button.disabled = !isUseful;
}
function each(wanted, act) {
  for (const upload of [...uploads].filter(wanted)) act(upload);
  pump();
}
$('#pause-all').onclick = event => {
  const isResume = event.target.textContent === 'Resume all';
  each(one => isResume ? one.state === 'paused' : one.isActive, one => one.toggle());
};
$('#clear-finished').onclick = () => each(one => one.state === 'done', one => one.remove());
$('#retry-failed').onclick = () => each(isWorthRetry, one => one.toggle());
$('#try-now').onclick = window.ononline = () => {
  gate.opensAt = Math.min(gate.opensAt, performance.now());
  each(one => one.isActive, one => { one.opensAt = 0; });
};
$('#list').onclick = ({target}) => {
  const action = target.closest('.toggle') ? 'toggle' : target.closest('.remove') && 'remove';
  each(one => action && one.row.contains(target), one => one[action]());
};
window.onbeforeunload = event => {
  if ([...uploads].some(one => one.isUnfinished)) event.preventDefault();
};
setInterval(() => {
  for (const one of [total, ...uploads])
    Object.assign(one, {speed: one.speed ? .6 * one.speed + .4 * one.moved : one.moved, moved: 0});
  pump();
}, 1000);

// ---- Adding files ----
const inHex = byte => byte.toString(16).padStart(2, '0');
const randomBits = () => [...crypto.getRandomValues(new Uint8Array(16))].map(inHex).join('');
let browserBits = randomBits();
try { browserBits = localStorage.flowserver ||= browserBits; } catch { /* till the next reload */ }

// A second file of one name and time may be another file: it must not pass for the first.
const identifiers = new Set(), gone = new Set();    // and uploads whose file was gone
function identifierOf(file, path) {
  const version = Math.max(0, file.lastModified);
  const usual = `flowserver-${browserBits}-${version}`;
  if (identifiers.has(usual + path)) return `flowserver-${randomBits()}-${version}`;
  identifiers.add(usual + path);
  return usual;
}

async function add(files) {
  for await (const {file, path, trouble} of files) {
    const isTooLarge = settings.maxFileSize && file.size > settings.maxFileSize;
    const error = trouble || (isTooLarge ? `This one is too large. ${limit}` : '');
    const old = [...gone].find(one => one.state === 'failed' && one.path === path
      && one.size === file.size && one.file.lastModified === file.lastModified);
    if (old) { Object.assign(old, {file}).startOver(); continue; }  // chosen again
    const upload = new Upload(file, path, identifierOf(file, path), error);
    uploads.add(upload);
    $('#list').append(upload.row);
    announce(`${path} added`);
    if (uploads.size % 100 === 0) await new Promise(resolve => setTimeout(resolve));
  }
  pump();
}

const called = (entry, method) => new Promise((done, failed) => entry[method](done, failed));
async function* filesOf(entries) {
  for (const entry of entries) try {
    if (entry instanceof File) yield {file: entry, path: entry.name};
    else if (entry.isFile) yield {file: await called(entry, 'file'), path: entry.fullPath.slice(1)};
    else {
      const reader = entry.createReader();  // it hands out a hundred at a time
      for (let some; (some = await called(reader, 'readEntries')).length;) yield* filesOf(some);
    }
  } catch {
    const file = new File([], entry.name), trouble = 'This can’t be read.';
    yield {file, path: entry.fullPath.slice(1), trouble};
  }
}

for (const input of [$('#files'), $('#folder')]) {
  $(`#choose-${input.id}`).onclick = () => input.click();
  input.onchange = () => {
    add([...input.files].map(file => ({file, path: file.webkitRelativePath || file.name})));
    input.value = '';
  };
}
let dragEnd;                // while files are dragged over the page, this event comes again
window.ondragover = event => {
  if (!event.dataTransfer.types.includes('Files')) return;
  event.preventDefault();
  document.body.className = 'dropping';
  clearTimeout(dragEnd);
  dragEnd = setTimeout(() => { document.body.className = ''; }, 400);
};
window.ondrop = event => {
  event.preventDefault();
  const items = [...event.dataTransfer.items].filter(item => item.kind === 'file');
  add(filesOf(items.map(item => item.webkitGetAsEntry() || item.getAsFile()).filter(Boolean)));
};
$('#limit').textContent = settings.maxFileSize ? limit : '';
</script></body></html>"""  # noqa: E501


# ---- requests ------------------------------------------------------------------------
# Law: what came, as parameters and blocks, and what goes back.  Nothing here decides
# whether it may come, or what becomes of it.

_MAX_FIELD_SIZE = 64 * 1024  # bytes of all text fields of a form; Starlette: 1 MiB each
_FILE_AS_TEXT = "The file came as text: set chunkFormat to 'blob' (resumable.js)."


class Request(NamedTuple):
    """One request; header names are in lower case, `length` is -1 when unknown.

    `read(n)` returns up to n bytes of the body, b"" at its end.  A server that has its
    own buffer gives `fill(at_once)` instead: it returns the buffer and how many bytes
    count, as many as there is room for, or those that are there already.
    """

    method: str
    path: str
    query: str = ""
    headers: Mapping[str, str] = types.MappingProxyType({})
    length: int = 0
    read: Callable[[int], bytes] | None = None
    client: str = ""  # the address of whoever is connected
    scheme: str = "http"
    is_loopback: bool = False  # the server can be reached from this machine only
    is_proxied: bool = False  # came through a trusted proxy, whose word is believed
    fill: Callable[[bool], tuple[bytes | bytearray, int]] | None = None
    user: str = ""  # who is logged in
    mount: str = ""  # where a WSGI application is mounted
    base: str | None = None  # the last word of the address, encoded; else that of path
    has_gone: Callable[[], bool] = bool  # whether the client is seen to have hung up

    @property
    def who(self) -> str:
        """Address and name of whoever asks, for the log."""
        return escaped(" ".join(filter(None, (self.client or "-", self.user))))

    def below(self, path: str) -> str:
        """Return a relative address: that of what lies at `path` below this one."""
        base = self.base
        if base is None:
            base = urllib.parse.quote(self.path.rpartition("/")[2])
        return f"{base}/{path}" if base else path

    @property
    def is_navigation(self) -> bool:
        """Whether a browser wants a page, and no script an answer."""
        headers = self.headers
        is_page = headers.get("sec-fetch-mode", "navigate") == "navigate"
        is_script = "x-requested-with" in headers or not is_page
        return "text/html" in headers.get("accept", "") and not is_script


class Response(NamedTuple):
    """One answer, complete; a body for HEAD is left out by whoever sends it."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    note: str = ""  # for the log

    def with_headers(self, *headers: tuple[str, str]) -> Response:
        """Return this answer with more headers."""
        return self._replace(headers=self.headers + headers) if headers else self


def json_response(
    status: int, values: Mapping[str, object], note: str = ""
) -> Response:
    """Return an answer in JSON."""
    headers = _JSON_HEADERS + _STATUS_HEADERS.get(status, ())
    return Response(status, headers, _compact_json(values).encode(), note)


def refusal(error: FlowError, status: int = 0) -> Response:
    """Return what is told of an error, with its status unless one is given."""
    values = {"success": False, "error": str(error)}
    if error.is_final:
        values["preventRetry"] = True  # Fine Uploader
    return json_response(status or error.status, values)


_JSON = "application/json"
_JSON_HEADERS = (
    ("Content-Type", _JSON),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
)
_STATUS_HEADERS = {
    401: (("WWW-Authenticate", 'Basic realm="flowserver", charset="UTF-8"'),),
    503: (("Retry-After", "5"),),
}
_NO_CONTENT = Response(204, _JSON_HEADERS[1:], b"")
_PAGE_HEADERS = (
    ("Cache-Control", "no-cache"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "same-origin"),  # with none a form's Origin would be null
    ("X-Frame-Options", "DENY"),
)


def html_response(status: int, body: str, policy: str) -> Response:
    """Return a page, under a Content-Security-Policy."""
    headers = (
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Security-Policy", policy),
    )
    return Response(status, headers + _PAGE_HEADERS, body.encode())


def text_response(status: int, text: str) -> Response:
    """Return an answer in plain text."""
    headers = (("Content-Type", "text/plain; charset=utf-8"), *_JSON_HEADERS[1:])
    return Response(status, headers, text.encode())


def files_page(status: int, files: Iterable[Mapping[str, object]]) -> Response:
    """Return the page that a form without a script gets."""
    rows = "".join(
        f"<li>{html.escape(str(file.get('path', file['name'])))}:"
        f" {html.escape(str(file.get('error', 'stored')))}"
        for file in files
    )
    body = (
        "<!doctype html><meta name=viewport content='width=device-width'>"
        f"<title>Upload</title><ul>{rows}</ul>"
    )
    return html_response(status, body, "default-src 'none'")


def phrase_of(status: int) -> str:
    """Return the reason phrase of a status."""
    return http.client.responses.get(status, "Refused")


def parse_query(text: str, parameters: dict[str, str] | None = None) -> dict[str, str]:
    """Return the parameters of a query string, added to those given; raises Malformed.

    ";" separates nothing, and a name given twice must have one value.
    """
    found = {} if parameters is None else parameters
    clash: Malformed | None = None
    for pair in text.split("&") if text else ():
        name, _, value = pair.partition("=")
        try:
            add_parameter(found, _unquoted(name), _unquoted(value))
        except Malformed as error:  # and go on: the names tell whose they are
            clash = clash or error
    if clash:
        raise clash
    return found


def _unquoted(text: str) -> str:
    # Most words need nothing: a quarter of the time of a test request.
    if "%" not in text and "+" not in text:
        return text
    try:
        return urllib.parse.unquote_plus(text, errors="strict")
    except UnicodeDecodeError:
        raise Malformed("The address is not UTF-8.") from None


def parse_length(text: str) -> int:
    """Return a Content-Length of digits alone, -1 for anything else."""
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else -1


class CountingReader:
    """``read(n)`` of a body that knows how many bytes are `left`.

    Reading it ends some day when its `connection` is known, or it `is_buffered`.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        length: int,
        connection: socket.socket | None = None,
        is_buffered: bool = False,
    ) -> None:
        self._read = read
        self._connection = connection
        self.left = max(length, 0)
        self.ends = is_buffered or connection is not None

    def __call__(self, size: int) -> bytes:
        """Return up to `size` bytes, b"" at the end."""
        block = self._read(min(size, self.left)) if self.left else b""
        self.left -= len(block)
        return block

    @contextlib.contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        """Let no call wait longer."""
        if self._connection is None:
            yield
            return
        before = self._connection.gettimeout()
        self._connection.settimeout(seconds or None)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # it is closed
                self._connection.settimeout(before)


def wsgi_request(environ: Mapping[str, Any]) -> Request:
    """Return the Request of a WSGI environment (PEP 3333)."""
    headers = {
        name[5:].replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_")
    }
    headers["content-type"] = environ.get("CONTENT_TYPE") or ""
    is_decoded = environ.get("wsgi.input_terminated", False)
    is_chunked = "transfer-encoding" in headers  # of which some hand on the framing
    said = environ.get("CONTENT_LENGTH") or ("-1" if is_chunked else "0")
    length = parse_length(said) if is_decoded or not is_chunked else -1
    path, mount = environ.get("PATH_INFO", ""), environ.get("SCRIPT_NAME", "")
    address = mount + path
    path = path.encode("latin-1").decode("utf-8", "replace")
    # Flask's own server would wait for ever for what Flask has read already.
    is_read = "stream" in getattr(environ.get("werkzeug.request"), "__dict__", ())
    return Request(
        method=environ["REQUEST_METHOD"],
        path=path or "/",
        query=environ.get("QUERY_STRING", ""),
        headers=headers,
        length=length,
        read=CountingReader(
            environ["wsgi.input"].read,
            0 if is_read else length,
            environ.get("gunicorn.socket"),
            "waitress.client_disconnected" in environ,  # it has all of the body
        ),
        client=environ.get("REMOTE_ADDR", ""),
        scheme=environ.get("wsgi.url_scheme", "http"),
        mount=mount,
        base=urllib.parse.quote(address.rpartition("/")[2], encoding="latin-1"),
    )


_MIN_DRAIN_RATE = 16 * 1024  # bytes/s of a body that is refused
_LINGER_SECONDS = 2.0


def drain(receive: Callable[[int], int], size: int, limit: int) -> None:
    """Read on what is refused, so that the client comes to read the answer.

    A client that writes all before it reads would else see a reset connection.  Of
    `size` bytes up to `limit` are read, and whatever comes in the first two seconds.
    `receive(n)` reads up to n bytes and returns how many, 0 at the end.
    """
    began, drained = time.monotonic(), 0
    while drained < size:
        seconds = time.monotonic() - began - _LINGER_SECONDS
        if seconds > 0 and not seconds * _MIN_DRAIN_RATE <= drained < limit:
            return
        received = receive(min(size - drained, 1 << 16))
        if not received:
            return
        drained += received


_END = object()  # after the last event


class Content:
    """What a request carries: parameters of the address and the form, and files."""

    def __init__(self, request: Request, dialects: Iterable[Dialect]) -> None:
        self.request = request
        self.given: dict[str, str] = {}  # parameters, as the client named them
        self.dialect: Dialect | None = None
        self._dialects = tuple(dialects)
        self._events: Iterator[Event] = iter(())
        self._parser: MultipartParser | None = None
        self._ending_size = 0  # of a form that ends after this file
        self._left = request.length  # bytes of the body that are not read yet
        self._field_size = 0
        self._files = 0
        self._is_in_file = False
        self._following: Part | None = None  # was looked for already
        self.is_read = False  # its body held parameters, and nothing else

    @property
    def is_form(self) -> bool:
        """Whether the body is a form."""
        kind = self.request.headers.get("content-type", "").lower().lstrip()
        return kind.startswith("multipart/")

    @property
    def is_unread_form(self) -> bool:
        """Whether the body is a form whose fields are not known yet."""
        return self.is_form and not self._files

    def read_head(self) -> None:
        """Take the parameters of address and headers, and find out whose they are."""
        parse_query(self.request.query, self.given)
        self.given.update(range_parameters(self.request.headers))
        self.find_dialect()

    def find_dialect(self) -> None:
        """Find out whose parameters they are, whether they make sense or not."""
        self.dialect = recognise(self.given, self._dialects)

    def require_marks(self) -> None:
        """Raise Malformed when this could be a chunk of a library, badly written."""
        headers = self.request.headers
        if "upload-offset" in headers or headers.get("upload-complete") == "?0":
            raise Malformed("A part of a file came without Tus-Resumable or ?patch.")
        require_marks(self.given, self._dialects)

    def chunk(self, part: Part | None = None) -> Chunk:
        """Return what the parameters say so far; raises Malformed."""
        if self.dialect is None:
            raise Malformed("The parameters are not those of an uploader known here.")
        if part is None:
            return parse_chunk(self.dialect, self.given)
        return parse_chunk(self.dialect, self.given, part.filename or "", self.rest)

    def other_fields(self) -> dict[str, str]:
        """Return what the client sent beside the parameters of its library."""
        known = self.dialect.names + self.dialect.unused if self.dialect else ()
        return {name: text for name, text in self.given.items() if name not in known}

    # The body

    @property
    def rest(self) -> int:
        """Bytes of the file that begins here, if the body holds nothing after it."""
        unread = self._parser.unread if self._parser else 0
        return self._left + unread - self._ending_size

    def next_file(self) -> Part | None:
        """Return the next file of the body, None at its end; raises Malformed.

        The fields before it are known then; its bytes are those of blocks().  What was
        not read of the file before is passed over.
        """
        part, self._following = self._following, None
        if part:
            return part
        if not self._files and not self._begin():
            self._files, self._is_in_file = 1, True
            return Part("", disposition_name(self.request.headers), "")
        for _ in self.blocks():
            pass
        name, value = "", bytearray()
        for event in self._events:
            if isinstance(event, Part) and event.filename is not None:
                self._files, self._is_in_file = self._files + 1, True
                self.find_dialect()
                return event
            if isinstance(event, Part):
                name, value = event.name, bytearray()
            elif event is None:
                self._add_field(name, value)
            else:
                self._field_size += len(event)
                value += event
                if self._field_size > _MAX_FIELD_SIZE:
                    is_text = value.startswith(b"data:")
                    complaint = "The text fields of the form are too long."
                    raise Malformed(_FILE_AS_TEXT if is_text else complaint)
        self._close_form()
        return None

    def _begin(self) -> bool:
        """Begin to read the body; return whether it is a form."""
        boundary = boundary_of(self.request.headers.get("content-type", ""))
        if boundary is None:
            self._events = (memoryview(data)[:size] for data, size in self._buffers())
            return False
        self._ending_size = len(boundary) + 8  # CR LF -- boundary -- CR LF
        self._parser = MultipartParser(boundary)
        feed = self._parser.feed
        events = (feed(data, size) for data, size in self._buffers())
        self._events = itertools.chain.from_iterable(events)
        return True

    def blocks(self, size: int = 0) -> Iterator[memoryview]:
        """Yield the bytes of the file, of which `size` are announced.

        Each view holds until the next one is asked for.  No need to search for the
        boundary where it must not be: were it there, then the sizes would contradict
        each other, or it is what the file holds there.
        """
        if self._parser:
            self._parser.expect(size)
        while self._is_in_file:
            event: Any = next(self._events, _END)
            if isinstance(event, memoryview):
                yield event
                continue
            self._is_in_file = False
            if event is _END:
                self._close_form()

    def look_ahead(self) -> None:
        """Read the fields that follow a file, before it counts; raises Malformed."""
        if self._parser:
            self._following = self.next_file()

    def end(self) -> None:
        """Raise Malformed when more files follow, or the body is not whole."""
        if self.next_file():
            raise Malformed("The form has more than one file.")

    def _buffers(self) -> Iterator[tuple[bytes | bytearray, int]]:
        """Yield the body as it comes: a buffer, and how many bytes of it count.

        A form's beginning is wanted at once: it says whose bytes are under way.
        """
        request = self.request
        while self._left:
            if request.fill:
                buffer, size = request.fill(not self._files)
            else:
                if request.read is None:
                    raise Malformed("The request has a length, but nothing to read.")
                try:
                    buffer = request.read(min(BLOCK_SIZE, self._left))
                except OSError as error:
                    raise Truncated("The connection broke.") from error
                size = len(buffer)
            if not size and self._left == request.length and not request.fill:
                raise Malformed(
                    "The form was read already: give the request to flowserver before"
                    " anything touches request.form or request.POST."
                )
            if not size:
                raise Truncated(f"The body ended {self._left} bytes before its end.")
            self._left -= size
            yield buffer, size

    def _close_form(self) -> None:
        """Raise Malformed when the form is not whole, although all of it came."""
        if self._parser:
            try:
                self._parser.close()
            except Truncated as error:
                raise Malformed(str(error)) from error

    def read_fields(self) -> None:
        """Take the parameters of a body that holds nothing else.

        That is Fine Uploader's request after the last chunk; with a name it is a file.
        """
        headers = self.request.headers
        kind = headers.get("content-type", "").partition(";")[0].lower()
        is_file = self.dialect or "content-disposition" in headers
        if is_file or kind not in ("application/x-www-form-urlencoded", _JSON):
            return
        if self.request.length > _MAX_FIELD_SIZE:
            raise Malformed(
                "A body of fields is no file; send a form, or put /NAME behind the"
                " address."
            )
        text = b"".join(bytes(data[:size]) for data, size in self._buffers())
        try:
            if kind == _JSON:
                values = json.loads(text)
                self.given.update((str(name), str(values[name])) for name in values)
            else:
                parse_query(text.decode("utf-8"), self.given)
        except (ValueError, TypeError, RecursionError) as error:
            raise Malformed("The fields of the request can't be read.") from error
        self._files, self.is_read = 1, True
        self.find_dialect()

    def no_file(self) -> Malformed:
        """Return the complaint that nothing came."""
        is_text = any(text.startswith("data:") for text in self.given.values())
        return Malformed(_FILE_AS_TEXT if is_text else "There is no file in the form.")

    def _add_field(self, name: str, value: bytearray) -> None:
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Malformed("A text field of the form is not UTF-8.") from error
        if self._files and name not in self.given:
            row = self.dialect
            if name in row.names if row else any(name in r.own for r in self._dialects):
                raise Malformed("The parameters must come before the file.")
        add_parameter(self.given, name, text)


# ---- access --------------------------------------------------------------------------
# Law: who asks, and may they.  It is told by the head of a request alone; the store is
# never asked.

_HASH_ROUNDS = 200_000  # about a tenth of a second, and one is computed at a time
_USER_LINE = re.compile(  # with rounds for five seconds at most
    r"([^#:][^:]*):(pbkdf2_sha256\$[1-9][0-9]{0,6}\$[^$]+\$[0-9a-f]{64})"
)
_PATIENT_SECONDS = 1.0  # so long nobody gives up who waits for a login
_LOGIN_REQUIRED = "A name and a password are needed here."
_LOGIN_WRONG = "The name or the password is wrong."


def hash_password(password: str, salt: str = "", rounds: int = _HASH_ROUNDS) -> str:
    """Return what stands in users_file for a password (PBKDF2, RFC 8018)."""
    salt = salt or secrets.token_hex(16)
    secret = password.encode("utf-8", "surrogatepass")
    digest = hashlib.pbkdf2_hmac("sha256", secret, salt.encode(), rounds)
    return f"pbkdf2_sha256${rounds}${salt}${digest.hex()}"


class Users:
    """The users of a file of name:hash lines, which is read again when it changes."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        # One hash at a time: guessing must not take every core.  Of those who wait for
        # it each household is one, so that its guesses hold up nobody else.
        self._hashing = threading.Lock()
        self._doors = [threading.Lock() for _ in range(256)]
        self._stamp: tuple[int, ...] = ()
        self._hashes: dict[str, str] = {}
        self._verified: dict[bytes, str] = {}
        self._key = secrets.token_bytes(32)
        self._nobody = hash_password("")
        try:
            self._load()
        except Trouble as error:
            cause, reason = error.__cause__, reason_of(error.__cause__)
            raise SettingsError(f"users_file {path}: {reason}.") from cause

    def _load(self) -> None:
        try:
            status = os.stat(self._path)
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp == self._stamp:
                return
            with open(self._path, encoding="utf-8-sig") as file:
                self._hashes = _parse_users(file)
        except (OSError, ValueError) as error:
            raise Trouble("The file of users can't be read.") from error
        self._verified.clear()
        self._stamp = stamp

    def authenticate(
        self, header: str, client: str = "", has_gone: Callable[[], bool] = bool
    ) -> str:
        """Return the user of an Authorization header (Basic, RFC 7617).

        Raises Unauthorized, with the same words and after the same time for a wrong
        name as for a wrong password; Truncated when the client has gone meanwhile.
        """
        known = hashlib.blake2b(header.encode("latin-1", "replace"), key=self._key)
        digest, began = known.digest(), time.monotonic()
        with self._lock:
            self._load()
            user = self._verified.get(digest)
            stamp, hashes = self._stamp, self._hashes
        if user is not None:
            return user
        name, password = _credentials(header)
        door = self._doors[hash(_household(client)) % len(self._doors)]
        with door, self._hashing:
            if self._verified.get(digest) == name:
                return name  # verified while this one waited
            if time.monotonic() - began > _PATIENT_SECONDS and has_gone():
                raise Truncated("The client has gone.")
            kept = hashes.get(name, self._nobody)
            _, rounds, salt, _ = kept.split("$")
            given = hash_password(password, salt, int(rounds))
            is_right = hmac.compare_digest(given.encode(), kept.encode())
            if not is_right or name not in hashes:
                raise Unauthorized(_LOGIN_WRONG)
            with self._lock:
                if stamp == self._stamp:  # else the password may have been changed
                    if len(self._verified) > 1000:
                        self._verified.clear()
                    self._verified[digest] = name
        return name


def _parse_users(lines: Iterable[str]) -> dict[str, str]:
    """Return the hash of each user; raises ValueError."""
    hashes = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        match = _USER_LINE.fullmatch(line)
        if match:
            hashes[match[1]] = match[2]
        elif line and not line.startswith("#"):
            raise ValueError(f"line {number} is not name:hash as --add-user writes it")
    if not hashes:
        raise ValueError("it names nobody; --add-user does")
    return hashes


def _credentials(header: str) -> tuple[str, str]:
    scheme, _, text = header.partition(" ")
    decoded = "\0"
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            decoded = base64.b64decode(text.strip(), validate=True).decode("utf-8")
    if "\0" in decoded:  # HMAC takes a key and the same key with zeros for one
        raise Unauthorized(_LOGIN_REQUIRED)
    name, _, password = decoded.partition(":")
    return name, password


_FORWARDED = ("x-forwarded-for", "x-forwarded-host", "x-forwarded-proto")


def _parse_address(text: str) -> Any:
    """Return an IP address, None when it is none; some proxies add the port."""
    text = text.strip()
    match = re.fullmatch(r"\[(.+)\](?::[0-9]+)?|([0-9.]+):[0-9]+", text)
    try:
        address = ipaddress.ip_address((match[1] or match[2]) if match else text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _household(client: str) -> str:
    """Return whose address it is: of IPv6 a household has the last 64 bits."""
    address = _parse_address(client)
    if address and address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return client


def _host_name(host: str) -> str:
    """Return a Host header without its port, in lower case."""
    return re.sub(":[0-9]*$", "", host).lower()


def _seen_host(request: Request) -> str:
    """Return the host that the browser asked for, as far as the proxy is believed."""
    host = request.headers.get("host", "")
    if request.is_proxied:
        return request.headers.get("x-forwarded-host", "").split(",")[0].strip() or host
    return host


_COOKIE = "flowserver-"
_COOKIE_SECONDS = 400 * 86400  # the longest that browsers keep one


class _Senders:
    """Who sends when nobody says so: a browser, as it was first seen.

    That is a hash of its address and User-Agent.  A signed cookie remembers it when the
    address changes.  It is in the cookie's name: a second one, from a second address at
    the very beginning, does not replace the first, which browsers list first.
    """

    def __init__(self, folder: str) -> None:
        self._key = _shared_key(os.path.join(folder, "key"))
        # Without this a test request takes a quarter longer.
        self._seen = functools.lru_cache(maxsize=4096)(self._look)

    def sender(self, request: Request) -> str:
        """Return who sends: whom a valid cookie names, else what is seen now."""
        return self._remembered(request) or self._now(request)[0]

    def cookie(self, request: Request) -> tuple[tuple[str, str], ...]:
        """Return the header that sets a cookie, where there is no valid one."""
        if self._remembered(request):
            return ()
        secure = "; Secure" if request.scheme == "https" else ""
        return (("Set-Cookie", self._now(request)[1] + secure),)

    def _now(self, request: Request) -> tuple[str, str]:
        return self._seen(request.client, request.headers.get("user-agent", ""))

    def _remembered(self, request: Request) -> str:
        if "cookie" not in request.headers:
            return ""
        for name, signature in _cookies(request):
            sender = name[len(_COOKIE) :]
            if name.startswith(_COOKIE) and hmac.compare_digest(
                signature.encode(), self._hash("cookie", sender).encode()
            ):
                return sender
        return ""

    def _look(self, client: str, agent: str) -> tuple[str, str]:
        """Return who that is, and the cookie for it."""
        sender = self._hash("sender", _household(client), agent)
        cookie = f"{_COOKIE}{sender}={self._hash('cookie', sender)}"
        return sender, cookie + f"; Max-Age={_COOKIE_SECONDS}; HttpOnly; SameSite=Lax"

    def _hash(self, *words: str) -> str:
        text = json.dumps(words).encode()
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()[:32]


def _cookies(request: Request) -> Iterator[tuple[str, str]]:
    """Yield name and value of each cookie, as they are listed (RFC 6265 4.2)."""
    for pair in request.headers.get("cookie", "").split(";"):
        name, _, value = pair.strip().partition("=")
        if name:
            yield name, value


def _shared_key(path: str) -> bytes:
    """Return the random bytes of a file, made by the first of all processes."""
    disk = Disk()
    with explained(), lock_of(disk, path) as fd:
        key = disk.read(fd, 32, 0)
        if len(key) < 32:
            key = secrets.token_bytes(32)
            disk.write(fd, key, 0)
            disk.flush(fd)
            disk.flush_names(os.path.dirname(path))
        return key


def ask_program(
    log: logging.Logger,
    name: str,
    hook: Callable[[A], str | bool | None],
    argument: A,
    meanings: Mapping[Any, str] = types.MappingProxyType({}),
) -> str:
    """Return what a function of the program answers, or what that means.

    Its mistakes are told as its own.
    """
    try:
        answer = hook(argument)
        if isinstance(answer, str):
            return answer
        if (answer is None or isinstance(answer, bool)) and answer in meanings:
            return meanings[answer]
        raise TypeError(f"{name}() returned {answer!r}, which is no str")
    except FlowError:
        raise
    except (Exception, SystemExit):  # whatever a stranger's function may raise
        log.exception("%s() of this program failed", name)
        raise Trouble("The server made a mistake.") from None


_LOOPBACK_NAME = re.compile(
    r"([a-z0-9-]+\.)*localhost|127(\.[0-9]{1,3}){3}|\[::1\]"  # in lower case
)


_AUTHORIZED = {None: "", True: "", False: "You may not upload here."}


class Access:
    """Judges requests by their heads; says whose they are and who sends them."""

    def __init__(
        self,
        settings: Settings,
        log: logging.Logger,
        folder: str,
        authorize: Callable[[Request], str | bool | None] | None,
        owner: Callable[[Request], str] | None,
    ) -> None:
        self.settings = settings
        self.log = log
        self._authorize = authorize
        self._owner = owner
        self._users = Users(settings.users_file) if settings.users_file else None
        self._senders = _Senders(folder)
        self._allowed_hosts = frozenset(map(_host_name, settings.allow_hosts))
        self._has_warned_of_proxy = False
        self._told: set[str] = set()  # origins that the log knows

    # Where it comes from

    def seen_through_proxies(self, request: Request) -> Request:
        """Return the request as the first trusted proxy saw it."""
        headers = request.headers
        if not any(name in headers for name in _FORWARDED):
            return request
        if not self._is_trusted(request.client):
            if not self._has_warned_of_proxy:
                self._has_warned_of_proxy = True
                self.log.warning(
                    "%s sends X-Forwarded- headers, but is not among trusted_proxies",
                    request.client,
                )
            return request
        # Each proxy adds whom it saw at the end.  What stands left of the last one that
        # is not trusted may be forged.
        addresses = headers.get("x-forwarded-for", "").split(",")
        client = request.client
        while addresses and self._is_trusted(client):
            address = _parse_address(addresses.pop())
            if address is None:
                break
            client = str(address)
        scheme = headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
        if scheme not in ("http", "https"):
            scheme = request.scheme
        return request._replace(client=client, scheme=scheme, is_proxied=True)

    def _is_trusted(self, address: str) -> bool:
        networks = self.settings.trusted_proxies
        if not address:  # a proxy on a Unix socket, which has no address
            return bool(networks)
        parsed = _parse_address(address)
        return parsed is not None and any(parsed in network for network in networks)

    def check_host(self, request: Request) -> None:
        """Refuse a Host that is not ours: a foreign name that resolves to us.

        On a loopback bind every page in a local browser could reach us so (DNS
        rebinding), and could invent X-Forwarded-Host as well.
        """
        host = _host_name(request.headers.get("host", ""))
        is_local = not host or _LOOPBACK_NAME.fullmatch(host)
        asked = [host] if request.is_loopback and not is_local else []
        if self._allowed_hosts:
            asked.append(_host_name(_seen_host(request)))
        for host in asked:
            if host not in self._allowed_hosts:
                raise Forbidden(
                    f"This server is not known as {quoted(host)}; the setting"
                    " allow_hosts names those that it answers to."
                )

    def check_origin(self, request: Request) -> None:
        """Refuse what a page of another site makes a visitor's browser send."""
        origin, named = request.headers.get("origin", ""), self.settings.allow_origins
        own = f"{request.scheme}://{_seen_host(request)}"
        if not origin or origin.lower() in (own.lower(), *named):
            return
        # Whom "*" lets in must not come with the password that a browser remembers.
        is_ours = all(name.startswith(_COOKIE) for name, _ in _cookies(request))
        has_credentials = "authorization" in request.headers or not is_ours
        if has_credentials or "*" not in named:
            sentence = (
                f"Pages of {quoted(origin)} may not upload here; the setting"
                " allow_origins names those that may."
            )
            if origin not in self._told and len(self._told) < 100:
                self._told.add(origin)  # its browser sees a preflight without headers
                self.log.warning("%s", sentence)
            raise Forbidden(sentence)

    # Who it is

    def admit(self, request: Request) -> Request:
        """Return a request with who is logged in; raises Unauthorized and Forbidden."""
        if self._users:
            header = request.headers.get("authorization", "")
            who = self._users.authenticate(header, request.client, request.has_gone)
            request = request._replace(user=who)
        if self._authorize:
            refusal = ask_program(
                self.log, "authorize", self._authorize, request, _AUTHORIZED
            )
            if refusal:
                raise Forbidden(refusal)
        return request

    def owner(self, request: Request) -> str:
        """Return whose an upload is, "" for nobody's."""
        if self._owner and not self._users:
            # None is nobody, as of `request.headers.get(...)`.
            return ask_program(self.log, "owner", self._owner, request, {None: ""})
        return request.user

    def sender(self, request: Request) -> str:
        """Return who sends what has no owner."""
        return self._senders.sender(request)

    # What a browser must be told

    def with_cookie(self, request: Request, response: Response) -> Response:
        """Let the browser remember who it is, where it matters."""
        if self._users or self._owner:
            return response
        return response.with_headers(*self._senders.cookie(request))

    def with_cors(self, request: Request, response: Response) -> Response:
        """Let the pages of allowed origins read the answer; those named may log in."""
        if not self.settings.allow_origins:
            return response
        origin, headers = request.headers.get("origin", ""), [("Vary", "Origin")]
        if origin.lower() in self.settings.allow_origins:
            headers.append(("Access-Control-Allow-Origin", origin))
            headers.append(("Access-Control-Allow-Credentials", "true"))
        elif origin and "*" in self.settings.allow_origins:
            headers.append(("Access-Control-Allow-Origin", "*"))
        if len(headers) > 1:
            headers.append(("Access-Control-Expose-Headers", _EXPOSED_HEADERS))
        return response.with_headers(*headers)


_EXPOSED_HEADERS = (  # what tus and FilePond must read
    "Location, Upload-Offset, Upload-Length, Upload-Metadata, Upload-Expires,"
    " Tus-Resumable, Tus-Version, Tus-Extension, Tus-Max-Size, Tus-Checksum-Algorithm"
)


# ---- intake --------------------------------------------------------------------------
# Law: whatever the protocol, a file comes in by this door: whose it is, where it goes,
# how large it may be and what the log says of it are the same for all.

_FORM_ALLOWANCE = 256 * 1024  # bytes that a form may have beside the chunk
_DRAIN_SIZE = 64 * 1024 * 1024  # bytes, where max_chunk_size sets no other limit
_STAYS = "Only an unfinished upload can be removed here."


class Incoming(NamedTuple):
    """An upload whose place is asked for; `fields` are what else the client said."""

    owner: str
    identifier: str
    filename: str
    relative_path: str  # safe already
    size: int  # in bytes; -1 when only its end tells
    fields: Mapping[str, str]


class Intake:
    """What all protocols need of store, settings and program."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        access: Access,
        log: logging.Logger,
        place: Callable[[Incoming], str] | None,
        tells: bool,
    ) -> None:
        self.settings = settings
        self.store = store
        self.log = log
        self.tells = tells or place is not None  # the program asks for fields
        self._access = access
        self._place = place
        name = os.path.basename(store.temp_dir)
        self._avoided = unicodedata.normalize("NFC", name)  # as those of clients are

    def upload(self, request: Request, chunk: Chunk) -> Upload:
        """Return the upload that a chunk belongs to: that of its one sender.

        An identifier that a library has drawn names it alone: some of its requests
        say nothing else.
        """
        owner, sender = self._access.owner(request), ""
        if not owner and not chunk.is_secret:
            sender = self._access.sender(request)
        names = ("", 0) if chunk.is_random else (chunk.path, chunk.size)
        key = upload_key(owner, sender, chunk.identifier, *names)
        who = (owner, chunk.identifier, chunk.is_secret)
        path = safe_path(chunk.path, self._avoided) if chunk.path else ""
        return Upload(key, path, chunk.size, *who)

    def drawn(
        self, request: Request, identifier: str, name: str = "", size: int = -1
    ) -> Upload:
        """Return the upload that an identifier names which was drawn at random."""
        chunk = Chunk(identifier, name, name, size, 0, -1, is_random=True)
        return self.upload(request, chunk)

    def placed(self, upload: Upload, fields: Mapping[str, str]) -> Upload:
        """Return the upload with the path that place() wants for it."""
        if self._place is None:
            return upload
        name = upload.path.rpartition("/")[2]
        who = (upload.owner, upload.identifier)
        incoming = Incoming(*who, name, upload.path, upload.size, fields)
        path = ask_program(self.log, "place", self._place, incoming)
        return upload._replace(path=safe_path(path, self._avoided))

    def check_size(self, what: str, size: int) -> None:
        """Raise TooLarge when a "chunk" or "file" has more bytes than it may have."""
        name = f"max_{what}_size"
        limit = getattr(self.settings, name)
        if limit and size > limit:
            raise TooLarge(
                f"The {what} is larger than {in_units(limit)}, which is the most that"
                f" this server takes ({name})."
            )

    @property
    def drain_size(self) -> int:
        """How much of a refused body is read on at most, in bytes."""
        return (self.settings.max_chunk_size or _DRAIN_SIZE) + _FORM_ALLOWANCE

    def note(self, progress: Progress, seconds: float) -> str:
        """Return what the log says of a file that this request has finished.

        `seconds` is how long the request took: longer, when there were others.
        """
        done = progress.done
        if done is None or not progress.is_new:
            return ""
        if progress.began:
            seconds = time.time() - progress.began
        rate = done.size / max(seconds, 1e-3) / (1 << 20)
        name, size = quoted(done.relative_path), done.size
        return f"finished {name}, {size} bytes in {seconds:.3f} s, {rate:.1f} MiB/s"

    def cancelled(self, request: Request, key: str) -> bool:
        """Forget an unfinished upload; return whether there was one."""
        is_gone = self.store.forget(key)
        if is_gone:
            self.log.info("%s cancelled the upload %s", request.who, key)
        return is_gone


class Protocol:
    """A way of uploading; the first one that speaks() a request will respond()."""

    headers: tuple[tuple[str, str], ...] = ()  # of each answer

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._store = intake.store

    def speaks(self, request: Request, content: Content) -> bool:
        """Whether a request is of this protocol."""
        return True


def _require_name(name: str) -> None:
    if not name:
        raise Malformed("The file has no name; put /NAME behind the address.")


def _require_length(what: str, actual: int, said: int, beside: int = 0) -> None:
    if not 0 <= actual - said <= beside:
        raise Malformed(
            f"The {what} has {actual} bytes, but its parameters say {said}."
        )


# ---- chunks and forms ----------------------------------------------------------------
# Law: a request without a protocol of its own is a chunk, where a dialect knows its
# parameters; else each file of a form, or the body, is stored whole.

_CHUNK_METHODS = ("POST", "PUT", "PATCH")


def _success(status: str, **values: object) -> Response:
    return json_response(200, {"success": True, "status": status, **values})


def _file_values(done: Done) -> dict[str, object]:
    names = {"filename": done.filename, "path": done.relative_path}
    return {**names, "size": done.size}


class Chunks(Protocol):
    """The chunk uploaders, and whole files: forms and PUT; what is of no other one."""

    def respond(self, request: Request, below: str, content: Content) -> Response:
        """Answer a request at the upload address, or `below` it."""
        if request.method in ("GET", "HEAD"):
            if below:
                raise Missing("There is nothing at this address.")
            return self._test(request, content)
        if request.method == "DELETE":
            return self._delete(request, below, content)
        if request.method not in _CHUNK_METHODS:
            raise BadMethod("Chunks are sent with POST, PUT or PATCH.")
        if not below:
            content.read_fields()
        if content.given.get("_method") == "DELETE":  # Fine Uploader
            return self._delete(request, below, content)
        if content.is_read:
            return self._after_last_chunk(request, content)
        return self._receive(request, below, content)

    def _test(self, request: Request, content: Content) -> Response:
        """Is this chunk, or what of this upload, here?  Changes nothing."""
        if content.dialect is None:
            return _NO_CONTENT
        chunk = content.chunk()
        upload = self._intake.upload(request, chunk)
        if chunk.length < 0:
            return self._status(upload)
        if not self._store.has(upload, chunk.start, chunk.start + chunk.length):
            return _NO_CONTENT
        return _success("partial", size=upload.size)

    def _status(self, upload: Upload) -> Response:
        status = self._store.status(upload.key)
        if status and status.done:
            everything = [(0, upload.size)]
            return _success("complete", **_file_values(status.done), ranges=everything)
        ranges = status.told if status else []
        word = "partial" if ranges else "unknown"
        return _success(word, size=upload.size, ranges=ranges)

    def _delete(self, request: Request, below: str, content: Content) -> Response:
        row = content.dialect
        if row and not row.is_random:
            upload = self._intake.upload(request, content.chunk())
        elif row or below:  # Fine Uploader puts the identifier behind the address
            identifier = content.given[row.identifier] if row else below
            upload = self._intake.drawn(request, identifier)
        else:
            raise Malformed("The upload to cancel is not named.")
        is_gone = self._intake.cancelled(request, upload.key)
        if not is_gone and (row is None or row.is_random):
            raise Forbidden(_STAYS)  # a button of the page says "remove"
        return _NO_CONTENT

    def _after_last_chunk(self, request: Request, content: Content) -> Response:
        """Answer Fine Uploader's request after the last chunk of a file.

        An empty file has no other one.
        """
        chunk = content.chunk()
        upload = self._intake.upload(request, chunk)
        if content.given.get("qqtotalparts") == "0":
            return self._receive_files(request, content, Part("", "", ""), chunk)
        status = self._store.status(upload.key)
        # A file in one chunk leaves no receipt: it was answered as complete.
        is_one = content.given.get("qqtotalparts") == "1"
        if not (status.is_finished if status else is_one):
            raise Conflict("This file is not complete; please send it again.")
        done = status.done if status else None
        return _success("complete", **_file_values(done) if done else {})

    # Chunks

    def _receive(self, request: Request, below: str, content: Content) -> Response:
        part = content.next_file()
        if part is None:
            raise content.no_file()
        if below and not content.is_form:
            part = part._replace(filename=below)
        if content.dialect is None:
            content.require_marks()
            return self._receive_files(request, content, part)
        chunk = content.chunk(part)
        if chunk.length < 0 and content.dialect.has_tests:
            raise Malformed("The number of the chunk is missing.")
        if chunk.length < 0:
            return self._receive_files(request, content, part, chunk)
        return self._receive_chunk(request, content, chunk)

    def _receive_chunk(
        self, request: Request, content: Content, chunk: Chunk
    ) -> Response:
        began = time.monotonic()
        self._intake.check_size("chunk", chunk.length)
        self._intake.check_size("file", chunk.size)
        beside = _FORM_ALLOWANCE if content.is_form else 0
        _require_length("body", request.length, chunk.length, beside)
        upload = self._intake.upload(request, chunk)
        if content.given.get("qqresume") == "true" and not self._store.status(
            upload.key
        ):
            complaint = "This upload is not known any more; please try again."
            values = {"success": False, "reset": True, "error": complaint}
            return json_response(200, values)
        fields = content.other_fields() if self._intake.tells else {}
        upload = self._intake.placed(upload, fields)
        end, received = chunk.start + chunk.length, 0
        with self._store.receive(upload, chunk.start, end, chunk.is_in_order) as body:
            for block in content.blocks(chunk.length):
                received += len(block)
                if received <= chunk.length:
                    body.write(block)
            content.end()
            _require_length("chunk", received, chunk.length)
            if self._intake.tells:
                fields = content.other_fields()
            progress = body.commit(fields)
        if not progress.done:
            values = {"received": progress.received, "size": progress.size}
            return _success("partial", **values)
        note = self._intake.note(progress, time.monotonic() - began)
        values = _file_values(progress.done)
        if chunk.is_in_order:  # blueimp lists them
            values["files"] = [{"name": progress.done.filename, **values}]
        values.update(success=True, status="complete")
        return json_response(200, values, note)

    # Whole files

    def _receive_files(
        self,
        request: Request,
        content: Content,
        part: Part | None,
        said: Chunk | None = None,
    ) -> Response:
        """Store each file of a body; what is refused does not cost the others.

        Where a library has `said` its name and size, these hold.
        """
        files: list[dict[str, object]] = []
        notes: list[str] = []
        refusal: FlowError | None = None
        while part:
            name, began = said.path if said else part.filename or "", time.monotonic()
            try:
                progress = self._receive_file(request, content, name, said)
                if progress and progress.done:
                    files.append({"name": name, **_file_values(progress.done)})
                    notes.append(self._intake.note(progress, time.monotonic() - began))
            except FlowError as error:
                if isinstance(error, Truncated) or not content.is_form:
                    raise
                refusal = refusal or error
                files.append({"name": name, "error": str(error)})
                if content.rest > self._intake.drain_size:  # too much to read on
                    break
            part = content.next_file()
        if not files:
            raise content.no_file()
        response = self._answer_files(request, content, files, refusal)
        return response._replace(note="; ".join(filter(None, notes)))

    def _receive_file(
        self, request: Request, content: Content, name: str, said: Chunk | None
    ) -> Progress | None:
        """Store one file; None when a form's field for files was left empty."""
        fields = content.other_fields() if self._intake.tells else {}
        at_most = max(content.rest, 0)
        if not content.is_form:
            self._intake.check_size("file", at_most)
            _require_name(name)
        upload = self._intake.drawn(request, secrets.token_hex(16), name)
        with self._store.receive_whole(at_most) as body:
            for block in content.blocks():
                self._intake.check_size("file", body.size + len(block))
                body.write(block)
            if not name and not body.size:
                return None
            _require_name(name)
            content.look_ahead()
            if said and said.size >= 0:
                _require_length("file", body.size, said.size)
            upload = self._intake.placed(upload._replace(size=body.size), fields)
            return body.commit(upload, fields)

    def _answer_files(
        self,
        request: Request,
        content: Content,
        files: list[dict[str, object]],
        refusal: FlowError | None,
    ) -> Response:
        """Say what became of each file; the status is that of the first refusal."""
        if "filepond" in content.given and not refusal:  # wants an id, and no JSON
            return text_response(200, f"{secrets.token_hex(16)}-0")
        status = refusal.status if refusal else 200
        if request.is_navigation:
            return files_page(status, files)
        values: dict[str, object] = {"success": not refusal}
        if refusal:
            values["error"] = str(refusal)
            if refusal.is_final:
                values["preventRetry"] = True  # Fine Uploader
        elif len(files) == 1:
            values.update(files[0], status="complete")
        return json_response(status, {**values, "files": files})


# ---- tus -----------------------------------------------------------------------------
# Law: tus 1.0 (tus.io): creation, creation-with-upload, termination, expiration and
# checksum.  What a PATCH has brought is kept however it ends; an offset that was ever
# answered is on the disk.

_TUS_VERSION = "1.0.0"
_TUS_BODY = "application/offset+octet-stream"
_TUS_ALGORITHMS = ("sha1", "sha256")
_CHECKPOINT_SIZE = 64 * 1024 * 1024  # bytes
_CHECKPOINT_SECONDS = 5.0


class WrongVersion(Malformed):
    """A version of tus that is not spoken here."""

    status = 412


class WrongChecksum(Malformed):
    """The bytes are not those that were sent."""

    status = 460


class WrongType(Malformed):
    """The body is of a type that has no meaning here."""

    status = 415


def tus_options(settings: Settings) -> tuple[tuple[str, str], ...]:
    """Return the headers that tell what of tus is spoken."""
    extensions = "creation,creation-with-upload,termination,expiration,checksum"
    limit = settings.max_file_size
    return (
        *Tus.headers,
        ("Tus-Extension", extensions),
        ("Tus-Checksum-Algorithm", ",".join(_TUS_ALGORITHMS)),
        *((("Tus-Max-Size", str(limit)),) if limit else ()),
    )


class Tus(Protocol):
    """The tus protocol; an upload lives at ``<upload_path>/<id>``."""

    headers = (("Tus-Resumable", _TUS_VERSION), ("Tus-Version", _TUS_VERSION))

    def speaks(self, request: Request, content: Content) -> bool:
        """Whether a request is of this protocol."""
        return "tus-resumable" in request.headers

    def respond(self, request: Request, below: str, content: Content) -> Response:
        """Answer a request at the upload address, or `below` it."""
        if request.headers["tus-resumable"] != _TUS_VERSION:
            raise WrongVersion(f"This server speaks tus {_TUS_VERSION}.")
        method = request.method
        if method == "POST":
            method = request.headers.get("x-http-method-override", "POST").upper()
        if method == "POST":
            return self._create(request, content)
        upload = self._intake.drawn(request, below)
        status = self._store.status(upload.key)
        if status is None:
            raise Missing("There is no such upload (any more).")
        if method == "HEAD":
            return self._head(status)
        if method == "PATCH":
            return self._patch(request, status, content)
        if method == "DELETE" and not status.is_finished:
            self._intake.cancelled(request, upload.key)
            return Response(204, (), b"")
        if method == "DELETE":
            raise Forbidden(_STAYS)
        raise BadMethod("An upload is sent with PATCH.")

    def _create(self, request: Request, content: Content) -> Response:
        headers = request.headers
        if "upload-concat" in headers:
            raise Malformed("Uploads can't be joined here; set parallelUploads: 1.")
        if "upload-defer-length" in headers:
            raise Malformed("The length of the file must be known when it is begun.")
        size = parse_integer(headers.get("upload-length", ""), "Upload-Length")
        self._intake.check_size("file", size)
        fields = parse_metadata(headers.get("upload-metadata", ""))
        identifier = secrets.token_hex(16)
        names = (fields.get(n, "") for n in ("relativePath", "filename", "name"))
        name = next((one for one in names if one not in _ABSENT), identifier)
        upload = self._intake.drawn(request, identifier, name, size)
        upload = self._intake.placed(upload, fields)._replace(fields=fields)
        try:
            note = self._intake.note(self._store.open(upload), 0.0)
        except Conflict as error:  # tus-js-client would try again after a 409
            raise Forbidden(str(error)) from None
        answer = (("Location", request.below(identifier)), *self._expires())
        if headers.get("content-type") == _TUS_BODY and request.length > 0:
            try:
                offset, note = self._receive(request, upload, 0, content)
            except FlowError:  # nobody will be told where it lives
                self._store.forget(upload.key)
                raise
            answer += (("Upload-Offset", str(offset)),)
        return text_response(201, "").with_headers(*answer)._replace(note=note)

    def _head(self, status: Status) -> Response:
        offset, upload = _offset_of(status), status.upload
        numbers = (("Upload-Offset", str(offset)), ("Upload-Length", str(upload.size)))
        metadata = (("Upload-Metadata", format_metadata(upload.fields)),)
        headers = (*numbers, *(metadata if upload.fields else ()), *self._expires())
        return text_response(200, "").with_headers(*headers)

    def _patch(self, request: Request, status: Status, content: Content) -> Response:
        if request.headers.get("content-type") != _TUS_BODY:
            raise WrongType(f"The body must be {_TUS_BODY}.")
        said = parse_integer(request.headers.get("upload-offset", ""), "Upload-Offset")
        offset = _offset_of(status)
        if said != offset:
            raise Conflict(f"The upload goes on at {offset}, not at {said}.")
        offset, note = self._receive(request, status.upload, offset, content)
        headers = (("Upload-Offset", str(offset)), *self._expires())
        return Response(204, headers, b"", note)

    def _receive(
        self, request: Request, upload: Upload, start: int, content: Content
    ) -> tuple[int, str]:
        """Store what a request brings; return where the next one begins, and a note."""
        end, began = start + request.length, time.monotonic()
        if end > upload.size:
            raise TooLarge(f"The file has {upload.size} bytes, but these end at {end}.")
        check = _Checksum(request.headers.get("upload-checksum", ""))
        if start == end:
            return end, ""
        with self._store.receive(upload, start, end, is_kept=check.is_absent) as body:
            try:
                self._write(body, content, check)
            except FlowError:
                if check.is_absent:
                    body.checkpoint()
                raise
            check.verify()
            progress = body.commit(upload.fields)
        return end, self._intake.note(progress, time.monotonic() - began)

    def _write(self, body: Body, content: Content, check: _Checksum) -> None:
        recorded, then = body.position, time.monotonic()
        content.next_file()
        for block in content.blocks():
            body.write(block)
            check.update(block)
            is_far = body.position - recorded >= _CHECKPOINT_SIZE
            is_long_ago = time.monotonic() - then >= _CHECKPOINT_SECONDS
            if check.is_absent and (is_far or is_long_ago):
                body.checkpoint()
                recorded, then = body.position, time.monotonic()

    def _expires(self) -> tuple[tuple[str, str], ...]:
        seconds = self._intake.settings.stale_after
        when = email.utils.formatdate(time.time() + seconds, usegmt=True)
        return (("Upload-Expires", when),) if seconds else ()


def _offset_of(status: Status, last: int = 1) -> int:
    """Return the bytes that are stored from the beginning on.

    After a crash all may be there and the file have no name yet: of that the `last`
    bytes are asked for again, so that a request comes, which finishes it.
    """
    size = status.upload.size
    if status.is_finished:
        return size
    start, end = status.stored[0] if status.stored else (0, 0)
    if start == 0 and end == size:
        return max(size - last, 0)
    return 0 if start else end


class _Checksum:
    """What Upload-Checksum says that a body must have."""

    def __init__(self, header: str) -> None:
        self.is_absent = not header
        algorithm, _, text = header.partition(" ")
        if header and algorithm not in _TUS_ALGORITHMS:
            raise Malformed(f"Checksums are {' or '.join(_TUS_ALGORITHMS)} here.")
        self._digest = hashlib.new(algorithm) if header else None
        self._said = text

    def update(self, block: memoryview) -> None:
        """Take the next bytes."""
        if self._digest:
            self._digest.update(block)

    def verify(self) -> None:
        """Raise WrongChecksum when the bytes are others."""
        digest = self._digest.digest() if self._digest else b""
        if self._digest and base64.b64encode(digest).decode() != self._said:
            raise WrongChecksum("The bytes are not those that were sent.")


def parse_metadata(text: str) -> dict[str, str]:
    """Return what Upload-Metadata says: ``filename d29ybGQ=,is_draft``."""
    fields: dict[str, str] = {}
    for pair in filter(None, map(str.strip, text.split(","))):
        name, _, value = pair.partition(" ")
        try:
            name.encode("ascii")
            value = base64.b64decode(value, validate=True).decode("utf-8")
        except ValueError as error:
            raise Malformed(
                f"The metadata {quoted(name[:80])} can't be read."
            ) from error
        add_parameter(fields, name, value)
    return fields


def format_metadata(fields: Mapping[str, str]) -> str:
    """Return what parse_metadata() reads."""
    pairs = ((name, base64.b64encode(fields[name].encode())) for name in fields)
    return ",".join(f"{name} {text.decode()}" for name, text in pairs)


# ---- FilePond ------------------------------------------------------------------------
# Law: FilePond's chunks.  The id is drawn here and holds the size, so that nothing is
# kept before the first byte; a PATCH counts as a whole or not at all.

_FILEPOND_ID = re.compile("[0-9a-f]{32}-([0-9]{1,15})")


class FilePond(Protocol):
    """FilePond's protocol of POST, PATCH and HEAD ``?patch=<id>``, and DELETE."""

    def speaks(self, request: Request, content: Content) -> bool:
        """Whether a request is of this protocol."""
        is_begun = request.method == "POST" and "upload-length" in request.headers
        kind = request.headers.get("content-type", "")
        is_end = request.method == "DELETE" and kind.startswith("text/plain")
        asks = not {"patch", "load", "fetch", "restore"}.isdisjoint(content.given)
        return content.dialect is None and (is_begun or is_end or asks)

    def respond(self, request: Request, below: str, content: Content) -> Response:
        """Answer a request at the upload address."""
        if request.method == "POST" and "upload-length" in request.headers:
            return self._begin(request, content)
        if request.method == "DELETE":
            return self._delete(request, content)
        if "patch" not in content.given:
            raise Missing("Files are not fetched, loaded or restored here.")
        if request.method == "PATCH":
            return self._patch(request, content)
        if request.method != "HEAD":
            raise BadMethod("Chunks are sent with PATCH.")
        status = self._store.status(self._upload(request, content.given["patch"]).key)
        offset = _offset_of(status, status.upload.size) if status else 0
        return text_response(200, "").with_headers(("Upload-Offset", str(offset)))

    def _upload(self, request: Request, identifier: str, name: str = "") -> Upload:
        match = _FILEPOND_ID.fullmatch(identifier)
        if not match:
            raise Missing("There is no such upload.")
        return self._intake.drawn(request, identifier, name, int(match[1]))

    def _begin(self, request: Request, content: Content) -> Response:
        size = parse_integer(request.headers["upload-length"], "Upload-Length")
        self._intake.check_size("file", size)
        if content.next_file():
            raise Malformed("The file comes after its beginning, with PATCH.")
        return text_response(201, f"{secrets.token_hex(16)}-{size}")

    def _patch(self, request: Request, content: Content) -> Response:
        name = request.headers.get("upload-name", "")
        try:
            name = name.encode("latin-1").decode("utf-8")
        except ValueError as error:
            raise Malformed("Upload-Name is not UTF-8.") from error
        _require_name(name)
        began, headers = time.monotonic(), request.headers
        upload = self._upload(request, content.given["patch"], name)
        start = parse_integer(headers.get("upload-offset", ""), "Upload-Offset")
        end = start + request.length
        self._check(request, upload)
        if start == end == upload.size > 0:  # after the last chunk comes an empty one
            status = self._store.status(upload.key)
            if status is None or not status.is_finished:
                raise Conflict("This file is not complete; please send it again.")
            return text_response(200, str(end))
        fields = content.other_fields()
        upload = self._intake.placed(upload, fields)._replace(fields=fields)
        note = ""
        if start == 0 and min(1, upload.size) <= end <= upload.size:
            # So that a file in one piece leaves a receipt, too: DELETE asks for it.
            note = self._intake.note(self._store.open(upload), 0.0)
        content.next_file()
        with self._store.receive(upload, start, end, is_in_order=True) as body:
            for block in content.blocks():
                body.write(block)
            progress = body.commit(fields)
        note = note or self._intake.note(progress, time.monotonic() - began)
        return text_response(200, str(end))._replace(note=note)

    def _check(self, request: Request, upload: Upload) -> None:
        said = request.headers.get("upload-length", str(upload.size))
        if said != str(upload.size):
            raise Malformed(f"The file has {upload.size} bytes, not {said[:40]}.")
        self._intake.check_size("chunk", request.length)
        self._intake.check_size("file", upload.size)

    def _delete(self, request: Request, content: Content) -> Response:
        if request.length > 200:
            raise Missing("There is no such upload.")
        content.next_file()
        text = b"".join(bytes(block) for block in content.blocks())
        upload = self._upload(request, text.decode("ascii", "replace"))
        if not self._intake.cancelled(request, upload.key):
            raise Forbidden(_STAYS)
        return _NO_CONTENT


# ---- application ---------------------------------------------------------------------
# Law: the whole product without a socket.  A request that may come in becomes a
# response, and whatever happens on the way a status that this client obeys and one
# sentence.

_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
_FIGURE_SECONDS = 10  # how old the count of open uploads may be
_SWEEP_SECONDS = 300


def _require_type(caller: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{caller} takes {kind.__name__}, not {type(value).__name__}")


class UploadApp:
    """Takes uploads: ``handle(Request) -> Response``, or as a WSGI application.

    `on_complete(done)` is called when a file is in place, before the answer; when it
    raises, the log says so and the file stays.  `authorize(request)` returns a sentence
    to refuse the request with, or False; None and True let it in.  `owner(request)`
    returns whose upload it is; no one else sees, continues or cancels it.
    `place(incoming)` returns the path below upload_dir for a file, the same each time
    it is asked for the same upload; it is checked like a client's, and Forbidden("a
    sentence") refuses the file, in every protocol.  As a WSGI
    application it takes what is no other address of ours for the upload address, unless
    `any_path` is off: a framework has chosen the path already.  Starts no thread, and
    calls nothing yet; raises SettingsError and Trouble.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        on_complete: Callable[[Done], object] | None = None,
        authorize: Callable[[Request], str | bool | None] | None = None,
        owner: Callable[[Request], str] | None = None,
        place: Callable[[Incoming], str] | None = None,
        any_path: bool = True,
        store: Store | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = Settings() if settings is None else settings
        _require_type("UploadApp()", self.settings, Settings)
        self.log = logging.getLogger("flowserver")
        for hook in (on_complete, authorize, owner, place):
            if not (hook is None or callable(hook)):
                raise TypeError(f"UploadApp() takes functions, not {hook!r}")
        self._on_complete = on_complete
        self._any_path = any_path
        self._clock = clock
        self._dialects = dialects_with(self.settings.parameter_prefix)
        _require_apart(self.settings)
        self.store = store or self._open_store()
        folder = self.store.temp_dir
        self._access = Access(self.settings, self.log, folder, authorize, owner)
        hooks = (place, on_complete is not None)
        self._intake = Intake(self.settings, self.store, self._access, self.log, *hooks)
        self._protocols = [kind(self._intake) for kind in (Tus, FilePond, Chunks)]
        self.drain_size = self._intake.drain_size
        self._swept = self._counted = -float("inf")
        self.store.count()

    def _open_store(self) -> Store:
        settings = self.settings
        return Store(
            settings.upload_dir,
            settings.temp_dir,
            settings.on_conflict,
            Disk(settings.sync),
            self._completed if self._on_complete else None,
            lambda sentence: self.log.warning("%s", sentence),
            max_uploads=settings.max_uploads,
            min_free_space=settings.min_free_space,
        )

    def sweep(self) -> None:
        """Finish what a crash left and remove what is stale; tidy() does it in time."""
        self._swept = self._counted = self._clock()
        stale_after = self.settings.stale_after or float("inf")
        self.store.sweep(stale_after, self.settings.keep_receipts)

    def tidy(self) -> None:
        """Sweep and count what is due; FlowServer calls it, else each request does."""
        try:
            if self._clock() - self._swept > _SWEEP_SECONDS:
                self.sweep()
            else:
                self._counted = self._clock()
                self.store.count()
        except FlowError as error:
            self.log.warning("can't clean up: %s", error)

    # The way of a request

    def handle(self, request: Request) -> Response:
        """Answer a request; the outermost door: nothing is raised."""
        _require_type("handle()", request, Request)
        if not isinstance(request.length, int):  # None, say, of a framework
            request = request._replace(length=-1)
        read = request.read
        if isinstance(read, CountingReader):
            with read.waiting(self.settings.timeout):
                response = self._handle(request)
                if read.ends:
                    with contextlib.suppress(OSError):  # nobody is there to see it
                        drain(lambda n: len(read(n)), read.left, self.drain_size)
        else:
            response = self._handle(request)
        if self._clock() - self._counted > 2 * _FIGURE_SECONDS:  # nobody else does it
            self.tidy()
        return response

    def _handle(self, request: Request) -> Response:
        started = self._clock()
        try:
            request = self._access.seen_through_proxies(request)
            response = self._answer(request)
        except FlowError as error:
            response = self._refusal(request, error)
        except Exception:  # a mistake of ours: nobody else may suffer from it
            self.log.exception("this is a bug of flowserver's, please report it")
            response = self._refusal(request, Trouble("The server made a mistake."))
        self._log_request(request, response, self._clock() - started)
        return response

    def _answer(self, request: Request) -> Response:
        self._access.check_host(request)
        address = self.settings.upload_path
        if request.path == address or request.path.startswith(address + "/"):
            below = request.path[len(address) + 1 :]
            response = self._at_upload_path(request, below)
            return self._access.with_cors(request, response)
        is_sample = request.path.startswith("/sample/") and self.settings.sample_dir
        is_here = is_sample or request.path in ("/", "/health")
        if is_here and request.method not in ("GET", "HEAD"):
            raise BadMethod(f"There is nothing to {quoted(request.method)} here.")
        self._access.admit(request)
        if request.path == "/":
            content = Content(request, self._dialects)
            content.read_head()
            if content.dialect:  # a 200 would tell flow.js that the chunk is here
                raise Missing(f"Chunks go to {self.settings.upload_path}.")
            return _page_response(request, self.settings)
        if request.path == "/health":
            with explained():
                free = self.store.disk.free_space(self.store.upload_dir)
            figures = {"free": free, "uploads": self.store.open_uploads}
            return json_response(200, {"ok": True, "version": __version__, **figures})
        if is_sample:
            return _sample(self.settings.sample_dir, request.path[len("/sample/") :])
        raise Missing("There is nothing at this address.")

    def _at_upload_path(self, request: Request, below: str) -> Response:
        """Answer at upload_path; what is refused is refused in the client's dialect."""
        if request.method == "OPTIONS":
            with contextlib.suppress(Forbidden):  # its browser refuses; the log knows
                self._access.check_origin(request)
            return _preflight(request, self.settings)
        content = Content(request, self._dialects)
        protocol: Tus | FilePond | Chunks = self._protocols[-1]
        try:
            content.read_head()
            protocol = next(p for p in self._protocols if p.speaks(request, content))
            request = self._access.admit(request)
            if request.method not in ("GET", "HEAD"):
                self._access.check_origin(request)
                if request.length < 0:
                    raise LengthRequired("The request must say how long its body is.")
            response = protocol.respond(request, below, content)
        except FlowError as error:
            if isinstance(error, Forbidden) and content.is_unread_form:
                with contextlib.suppress(FlowError):  # its fields say whose it is
                    content.next_file()
            content.find_dialect()
            response = self._refusal(request, error, content.dialect, _METHODS)
        response = response.with_headers(*protocol.headers)
        return self._access.with_cookie(request, response)

    def _refusal(
        self,
        request: Request,
        error: FlowError,
        dialect: Dialect | None = None,
        methods: str = "GET, HEAD",
    ) -> Response:
        status = dialect.status_of(error) if dialect else error.status
        if error.__cause__ is not None:
            self.log.warning("%s (%s)", error, quoted(str(error.__cause__)))
        response = refusal(error, status)
        if request.is_navigation and request.method == "POST":
            response = files_page(status, [{"name": "", "error": str(error)}])
        return response.with_headers(("Allow", methods)) if status == 405 else response

    def _log_request(
        self, request: Request, response: Response, seconds: float
    ) -> None:
        if self.log.isEnabledFor(logging.INFO):
            told = escaped(response.body.decode()) if response.status >= 400 else ""
            words = filter(None, (response.note, told))
            self.log.info(
                "%s %s %s %d %d bytes %.3f s%s",
                escaped(request.client or "-"),
                escaped(request.method),
                escaped(request.path),
                response.status,
                max(request.length, 0),
                seconds,
                "".join(f" {word}" for word in words),
            )

    def _completed(self, done: Done) -> None:
        """Call on_complete; a mistake in it does not undo the file."""
        assert self._on_complete is not None
        try:
            self._on_complete(done)
        except (Exception, SystemExit):  # whatever a stranger's function may raise
            name = quoted(done.relative_path)
            self.log.exception("on_complete failed for %s; the file stays", name)

    # WSGI

    def answer(self, environ: dict[str, Any]) -> Response:
        """Answer the upload address, whatever path a WSGI environment has.

        For views of Django and the like, which have chosen the path.
        """
        return self.handle(self.at_our_address(wsgi_request(environ)))

    def at_our_address(self, request: Request) -> Request:
        """Return a request of a program's own address as one of the upload address."""
        address = self.settings.upload_path
        if request.path.startswith(address + "/"):
            return request
        last = request.path.rpartition("/")[2]
        below = "/" + last if re.fullmatch("[0-9a-f-]{32,36}", last) else ""
        if request.mount and request.method == "PUT":
            below = request.path
        return request._replace(path=address + below)

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answer as a WSGI application (PEP 3333), mounted anywhere."""
        request = wsgi_request(environ)
        if self._any_path and not _is_other_address(request):
            request = self.at_our_address(request)
        response = self.handle(request)
        headers = list(response.headers)
        if response.status != 204:
            headers.append(("Content-Length", str(len(response.body))))
        start_response(f"{response.status} {phrase_of(response.status)}", headers)
        return [b"" if request.method == "HEAD" else response.body]


def _is_other_address(request: Request) -> bool:
    """Whether a path is one of ours beside the upload address."""
    if request.path == "/":
        return request.method in ("GET", "HEAD") and not request.query
    return request.path == "/health" or request.path.startswith("/sample/")


def _preflight(request: Request, settings: Settings) -> Response:
    """Answer what a browser asks before a page of another origin may upload."""
    asked = request.headers.get("access-control-request-headers", "")
    response = Response(
        204,
        (
            ("Allow", _METHODS),
            ("Access-Control-Allow-Methods", _METHODS),
            ("Access-Control-Max-Age", "7200"),
        ),
        b"",
    )
    if re.fullmatch(r"[0-9A-Za-z, _-]+", asked):
        response = response.with_headers(("Access-Control-Allow-Headers", asked))
    return response.with_headers(*tus_options(settings))


# The page and the samples


def _page_response(request: Request, settings: Settings) -> Response:
    nonce = secrets.token_urlsafe(16)
    values = {
        "uploadPath": request.below(settings.upload_path[1:]),
        "chunkSize": settings.chunk_size,
        "maxFileSize": settings.max_file_size,
        "maxChunkSize": settings.max_chunk_size,
        "timeout": settings.timeout,
    }
    policy = (
        f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}';"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'self';"
        " frame-ancestors 'none'"
    )
    return html_response(200, page(values, nonce), policy)


_SAMPLE_WORD = re.compile(r"[0-9A-Za-z@_-][0-9A-Za-z@._-]*")
# The types of Python's mimetypes are those of the machine: a script would not run where
# its registry says so (Windows).
_SAMPLE_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".map": "application/json",
    ".txt": "text/plain; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
    ".png": "image/png",
    ".ico": "image/x-icon",
}


def _sample(sample_dir: str, path: str) -> Response:
    """Serve a sample file of a known type; nothing hidden, no listing."""
    folder = os.path.realpath(os.path.join(_home_folder(), sample_dir))
    if not path:
        return _sample_list(folder)
    words = path.split("/")
    kind = _SAMPLE_TYPES.get(os.path.splitext(path)[1].lower())
    file = os.path.join(folder, *words)
    is_plain = all(map(_SAMPLE_WORD.fullmatch, words))
    if kind is None or not is_plain or os.path.realpath(file) != file:  # a link in it
        raise Missing("There is no such sample.")
    try:
        with open(file, "rb") as sample:
            return Response(
                200, (("Content-Type", kind),) + _PAGE_HEADERS, sample.read()
            )
    except OSError:
        raise Missing("There is no such sample.") from None


def _sample_list(folder: str) -> Response:
    try:
        names = filter(_SAMPLE_WORD.fullmatch, sorted(os.listdir(folder)))
    except OSError:
        raise Missing("There is no folder of samples.") from None
    links = (f'<li><a href="{n}">{n}</a>' for n in names if n.endswith(".html"))
    body = f"<!doctype html><title>Samples</title><ul>{''.join(links)}</ul>"
    return html_response(200, body, "default-src 'none'")


def _require_apart(settings: Settings) -> None:
    """Raise SettingsError when files of ours lie where clients may put theirs."""
    ours = {
        "flowserver.py": os.path.abspath(__file__),
        "conf.ini": settings.config,
        "sample_dir": os.path.join(_home_folder(), settings.sample_dir or "."),
        "users_file": settings.users_file,
        "log_file": settings.log_file,
        "certificate": settings.certificate,
        "private_key": settings.private_key,
    }
    folder = os.path.join(os.path.realpath(settings.upload_dir), "")
    for name, path in ours.items():
        if path and os.path.join(os.path.realpath(path), "").startswith(folder):
            raise SettingsError(
                f"upload_dir {folder} holds {name} ({path}), which clients could then"
                " replace; give uploads a folder of their own."
            )
    samples = os.path.join(os.path.realpath(ours["sample_dir"]), "")
    beside = os.path.join(os.path.dirname(os.path.abspath(settings.config)), "sample")
    is_usual = settings.sample_dir in ("", "sample", settings.config and beside)
    if not is_usual and not os.path.isdir(samples):
        raise SettingsError(f"sample_dir {samples} is no folder.")
    if settings.sample_dir and folder.startswith(samples):
        raise SettingsError(
            f"sample_dir {samples} holds upload_dir, whose pages and scripts would then"
            " be served; give uploads a folder of their own."
        )


def _home_folder() -> str:
    return os.path.dirname(os.path.abspath(__file__))


def create_app(config: str | None = None) -> UploadApp:
    """Return the application that conf.ini describes, for ``gunicorn``.

    Reads `config`, else what FLOWSERVER_CONFIG names, else conf.ini beside this file.
    """
    return UploadApp(load_settings(find_config(config), {}), any_path=False)


def find_config(named: str | None) -> str:
    """Return the path of the conf.ini to read, "" when there is none."""
    if named is not None:
        return named
    if os.environ.get("FLOWSERVER_CONFIG"):
        return os.environ["FLOWSERVER_CONFIG"]
    beside = os.path.join(_home_folder(), "conf.ini")
    return beside if os.path.exists(beside) else ""


# ---- HTTP server ---------------------------------------------------------------------
# Law: a strict shell round the application.  A request is what RFC 9112 says or it is
# refused and the connection closed; a body that was not read is never taken for the
# next request; every wait has an end.

_FIRST_SIZE = 16 * 1024  # bytes of a body that come before it gets a large buffer
_MAX_LARGE_BUFFERS = 8  # with 56 small ones 22 MiB
_HEAD_BLOCK_SIZE = 8 * 1024  # what follows a head is copied
_MAX_HEAD_SIZE = 64 * 1024  # flow.js writes names and paths into the address, encoded
_MAX_HEADERS = 100
_MIN_BODY_RATE = 1024  # bytes/s on the average, once a body has taken `timeout`
_NO_TIMEOUT_SECONDS = 86400.0  # for timeout = 0
_GRACE_SECONDS = 5.0  # for running requests when the server stops

_REQUEST_LINE = re.compile(r"([A-Z]{1,20}) ([!-~]+) HTTP/1\.([01])")
# Blanks round the value are stripped later: matched here, they cost quadratic time.
_HEADER_LINE = re.compile(
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)\r\n"
)


class Head(NamedTuple):
    """The head of a request; header names are in lower case."""

    method: str
    target: str
    minor: int  # of the version: HTTP/1.<minor>
    headers: dict[str, str]
    length: int  # of the body, in bytes


def parse_head(head: bytes) -> Head:
    """Return what a head says, which ends with an empty line; raises Malformed.

    RFC 9112 in its strictest reading: no bare CR or LF, no folded lines, no blank
    before the colon, one Content-Length of digits alone, no Transfer-Encoding.
    """
    if len(head) > _MAX_HEAD_SIZE:
        raise HeadTooLong("The head of the request is too long.")
    line, _, rest = head.decode("latin-1").partition("\r\n")
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise Malformed("The first line of the request can't be read.")
    headers = _parse_headers(rest)
    if "host" not in headers and match[3] == "1":
        raise Malformed("The request names no host.")
    if "transfer-encoding" in headers:
        raise LengthRequired("Bodies must come with a Content-Length.")
    length = parse_length(headers.get("content-length", "0"))
    if length < 0:
        raise Malformed("The Content-Length is not a number.")
    return Head(match[1], match[2], int(match[3]), headers, length)


def _parse_headers(text: str) -> dict[str, str]:
    headers: dict[str, str] = {}
    position, end, count = 0, len(text) - 2, 0
    while position < end:
        match = _HEADER_LINE.match(text, position)
        if not match:
            raise Malformed("A header of the request can't be read.")
        name, value = match[1].lower(), match[2].strip(" \t")
        if name in headers:
            if name in _SINGLE_HEADERS:
                raise Malformed(f"The request has two headers {name}.")
            value = f"{headers[name]}, {value}"
        headers[name] = value
        position = match.end()
        count += 1
        if count > _MAX_HEADERS:
            raise HeadTooLong("The request has too many headers.")
    return headers


_SINGLE_HEADERS = frozenset(
    ("content-length", "content-type", "host", "transfer-encoding", "authorization")
    + ("origin", "expect")
)


class _Wire:
    """The bytes of one connection, in: heads, then bodies, with an end to each wait."""

    def __init__(self, connection: socket.socket, server: FlowServer) -> None:
        self.connection = connection
        self.server = server
        self.pending = b""  # came with a head, belongs to what follows it
        self.timeout = server.timeout_seconds
        self.remaining = 0  # bytes of the body that were not read yet
        self._buffer: bytearray | None = None
        self._wants_100 = False
        self._body_began = 0.0
        self._body_size = 0
        self._longest_wait = -1.0
        self._wait_flag = 0

    def limit_waits(self, seconds: float) -> None:
        """Let no receive or send wait longer."""
        if seconds != self._longest_wait:
            self._longest_wait = seconds
            if _limit_by_kernel(self.connection, seconds):
                self._wait_flag = socket.MSG_WAITALL
            else:
                self.connection.settimeout(seconds)

    def read_head(self) -> bytes:
        """Return the bytes up to the empty line; b"" when the client went away."""
        deadline = time.monotonic() + self.timeout
        searched = empty_lines = 0
        while True:
            # Some clients send an empty line before a request (RFC 9112 2.2).
            while empty_lines < 4 and self.pending.startswith(b"\r\n"):
                self.pending, searched = self.pending[2:], 0
                empty_lines += 1
            found = self.pending.find(b"\r\n\r\n", max(0, searched - 3))
            if found >= 0:
                head = self.pending[: found + 4]
                self.pending = self.pending[found + 4 :]
                return head
            searched = len(self.pending)
            is_http = self.pending in (b"", b"\r") or self.pending[:1].isalpha()
            if not is_http:  # TLS, say: no need to wait
                raise Malformed("This is not HTTP.")
            if searched > _MAX_HEAD_SIZE:
                raise HeadTooLong("The head of the request is too long.")
            left = deadline - time.monotonic()
            if left <= 0:
                raise socket.timeout()
            self.limit_waits(left if self.pending else self.timeout)
            block = self.connection.recv(_HEAD_BLOCK_SIZE)
            if not block:
                return b""
            self.pending += block

    def begin_body(self, head: Head) -> None:
        """The next bytes are the body of this request."""
        self.remaining = self._body_size = head.length
        expected = head.headers.get("expect", "").lower()
        self._wants_100 = expected == "100-continue" and head.minor == 1
        self._body_began = time.monotonic()
        self.limit_waits(self.timeout)

    def fill(self, at_once: bool = False) -> tuple[bytes | bytearray, int]:
        """Return a buffer with the next bytes of the body and how many they are.

        It is full, or the body is whole, unless what is there is wanted `at_once`.
        A large buffer is taken when more has come than fits into a small one, so that
        clients that send next to nothing hold next to nothing.
        """
        if self._wants_100:  # judged by its head and not refused: let it come
            self._wants_100 = False
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        first, size = bytearray(), 0
        if self.remaining == self._body_size:  # nothing has come yet
            first = bytearray(min(self.remaining, _FIRST_SIZE))
            size = self._receive(first, 0, at_once)
            if at_once or size < len(first) or not self.remaining:
                return first, size
        if self._buffer is None:
            self._buffer = self.server.take_buffer()
            self._buffer[:size] = first
        return self._buffer, self._receive(self._buffer, size, at_once)

    def _receive(self, buffer: bytearray, size: int, at_once: bool) -> int:
        """Add bytes of the body to the `size` that are there; return how many then."""
        wanted = min(size + self.remaining, len(buffer))
        taken = min(wanted - size, len(self.pending))
        buffer[size : size + taken] = self.pending[:taken]
        self.pending = self.pending[taken:]
        self.remaining -= taken
        size += taken
        with memoryview(buffer) as view:
            while size < wanted and not (at_once and size):
                received = self._receive_into(view[size:wanted], at_once)
                if not received:
                    break
                size += received
        return size

    def _receive_into(self, view: memoryview, at_once: bool) -> int:
        try:
            flag = 0 if at_once else self._wait_flag
            received = self.connection.recv_into(view, len(view), flag)
        except (socket.timeout, BlockingIOError) as error:
            raise Truncated("The body came too slowly.") from error
        except OSError as error:
            raise Truncated("The connection broke.") from error
        self.remaining -= received
        elapsed = time.monotonic() - self._body_began
        if elapsed > self.timeout and self.rate() < _MIN_BODY_RATE:
            raise Truncated("The body came too slowly.")
        return received

    def rate(self) -> float:
        """Return how fast a body comes, in bytes/s; infinite while nobody knows."""
        elapsed = time.monotonic() - self._body_began
        if not self.remaining or elapsed < _LINGER_SECONDS:
            return math.inf
        return (self._body_size - self.remaining) / elapsed

    def send(self, data: bytes) -> None:
        """Send an answer; a reader may take its time, and no longer than a body may."""
        view, seconds = memoryview(data), self.timeout
        end = time.monotonic() + seconds + len(data) / _MIN_BODY_RATE
        while view:
            if seconds <= 0:
                raise socket.timeout("The answer was taken too slowly.")
            self.limit_waits(min(seconds, self.timeout))
            view = view[self.connection.send(view) :]
            seconds = end - time.monotonic()

    def end_body(self) -> None:
        """Give the buffer back for the next body of whatever connection."""
        if self._buffer is not None:
            self.server.give_buffer(self._buffer)
            self._buffer = None

    def drain(self, limit: int) -> None:
        """Read on what is refused, then say that nothing follows."""
        buffer = bytearray(64 * 1024)

        def receive(size: int) -> int:
            self.limit_waits(_LINGER_SECONDS)
            return self.connection.recv_into(buffer, size)

        with contextlib.suppress(OSError):
            drain(receive, self.remaining - len(self.pending), limit)
            self._linger(buffer)

    def _linger(self, buffer: bytearray) -> None:
        """Close our side, and give the other one a moment to see it."""
        self.connection.shutdown(socket.SHUT_WR)
        end = time.monotonic() + _LINGER_SECONDS
        while time.monotonic() < end:
            self.limit_waits(_LINGER_SECONDS)
            if not self.connection.recv_into(buffer):
                return


def _limit_by_kernel(connection: socket.socket, seconds: float) -> bool:
    """Limit waits without settimeout(); return False where only that will do.

    With settimeout() Python asks poll() before each call, a system call and a hand-over
    of the interpreter's lock more, and MSG_WAITALL has no effect: when 20 MiB/s come in
    pieces of 16 KiB, filling the buffer in the kernel takes a third of the time off.
    """
    is_linux_64 = sys.platform == "linux" and sys.maxsize > 1 << 32
    if not is_linux_64 or type(connection) is not socket.socket:
        return False  # with 32 bits, how time is laid out depends on the C library
    wait = struct.pack("ll", int(seconds), max(1, int(seconds % 1 * 1e6)))
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
    return True


class FlowHandler(http.server.BaseHTTPRequestHandler):
    """One connection: requests one after the other until one of us wants to close."""

    server: FlowServer
    wire: _Wire

    def setup(self) -> None:
        """Prepare the connection; the handshake of TLS happens here, in its thread."""
        self.raw: socket.socket = self.request
        self.connection = self.raw
        self.raw.settimeout(self.server.timeout_seconds)
        with contextlib.suppress(OSError):
            self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        if self.server.tls is not None:
            self.connection = self.server.tls.wrap_socket(
                self.raw, server_side=True, do_handshake_on_connect=False
            )
            try:
                with self.server.idle(self.raw, self.connection):
                    self.connection.do_handshake()
            except OSError:
                self.connection.close()
                raise
        self.wire = _Wire(self.connection, self.server)
        self.server.know(self.raw, self.wire)
        address = self.client_address[0]
        self.client = str(_parse_address(address) or address)

    def handle(self) -> None:
        """Answer requests until the connection ends."""
        with contextlib.suppress(OSError):  # the client went away, or was too slow
            while self._handle_one():
                pass

    def finish(self) -> None:
        """Close the connection; nothing is buffered here."""
        with contextlib.suppress(OSError):
            self.connection.close()

    def _handle_one(self) -> bool:
        """Answer one request; return whether another one may follow."""
        try:
            with self.server.idle(self.raw, self.connection):
                head = self.wire.read_head()
            if not head:
                return False
            parsed = parse_head(head)
            request = self._request(parsed)
        except Malformed as error:
            self._refuse(error)
            return False
        self.wire.begin_body(parsed)
        try:
            response = self.server.app.handle(request)
        finally:
            self.wire.end_body()
        return self._send(parsed, response)

    def _request(self, head: Head) -> Request:
        target = head.target
        if not target.startswith("/"):
            match = re.fullmatch("https?://[^/?#]+(/.*)?", target, re.IGNORECASE)
            if not match and not (target == "*" and head.method == "OPTIONS"):
                raise Malformed("The address of the request can't be read.")
            target = match[1] or "/" if match else self.server.app.settings.upload_path
        path, _, query = target.partition("?")
        return Request(
            method=head.method,
            path=urllib.parse.unquote(path, errors="replace"),
            base=path.rpartition("/")[2],
            query=query,
            headers=head.headers,
            length=head.length,
            client=self.client,
            scheme="https" if self.server.tls is not None else "http",
            is_loopback=self.server.is_loopback,
            fill=self.wire.fill,
            has_gone=self._has_gone,
        )

    def _has_gone(self) -> bool:  # although bytes of it may wait; Linux alone says so
        tcp, info = socket.IPPROTO_TCP, getattr(socket, "TCP_INFO", 0)
        state = self.connection.getsockopt(tcp, info, 1)[0] if info else 0
        return state in (7, 8)  # TCP_CLOSE, TCP_CLOSE_WAIT

    def _refuse(self, error: Malformed) -> None:
        log = self.server.app.log
        log.info("%s refused: %s (%d)", self.client, error, error.status)
        self.wire.remaining = 1 << 62  # unknown: what follows is not read as a request
        self._send(Head("", "", 0, {}, 0), refusal(error))

    def _send(self, head: Head, response: Response) -> bool:
        """Send a response in one write; return whether the connection goes on."""
        options = head.headers.get("connection", "").lower()
        keeps = head.minor == 1 and "close" not in options
        keeps = keeps and not self.wire.remaining and not self.server.is_stopping
        self.wire.send(_response_bytes(head.method, response, keeps))
        if self.wire.remaining:
            self.wire.drain(self.server.app.drain_size)
        return keeps


def _response_bytes(method: str, response: Response, keeps: bool) -> bytes:
    lines = [f"HTTP/1.1 {response.status} {phrase_of(response.status)}"]
    lines += [f"{name}: {value}" for name, value in response.headers]
    if response.status != 204:
        lines.append(f"Content-Length: {len(response.body)}")
    if not keeps:
        lines.append("Connection: close")
    head = "\r\n".join(lines) + "\r\n\r\n"
    return head.encode("latin-1") + (b"" if method == "HEAD" else response.body)


class FlowHandlerMixin:
    """Uploads for your own BaseHTTPRequestHandler::

        class Handler(FlowHandlerMixin, BaseHTTPRequestHandler):
            uploads = UploadApp(settings)
            def do_POST(self):
                self.handle_upload()

    Heads are then as strict as http.server is.
    """

    uploads: UploadApp

    def handle_upload(self: Any) -> None:
        """Answer this request as the upload address, whatever its path is."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        lengths = self.headers.get_all("content-length", ["0"])
        is_clear = len(lengths) == 1 and "transfer-encoding" not in headers
        length = parse_length(lengths[0]) if is_clear else -1
        body = CountingReader(self.rfile.read, length, self.connection)
        path, _, query = self.path.partition("?")
        request = Request(
            method=self.command,
            path=urllib.parse.unquote(path, errors="replace"),
            base=path.rpartition("/")[2],
            query=query,
            headers=headers,
            length=length,
            read=body,
            client=self.client_address[0] if self.client_address else "",  # Unix socket
            scheme="https" if hasattr(self.connection, "getpeercert") else "http",
        )
        response = self.uploads.handle(self.uploads.at_our_address(request))
        if body.left or length < 0:
            self.close_connection = True
        data = _response_bytes(self.command, response, not self.close_connection)
        self.wfile.write(data)


class FlowServer(http.server.ThreadingHTTPServer):
    """The application behind a socket::

        with FlowServer(UploadApp(settings)) as server:
            print(server.url)

    A thread accepts connections and one serves each.  Port 0 takes any free one; raises
    OSError when the port is taken.
    """

    request_queue_size = 256

    def __init__(
        self, app: UploadApp, handler: Callable[..., FlowHandler] | None = None
    ) -> None:
        _require_type("FlowServer()", app, UploadApp)
        settings = app.settings
        self.app = app
        self.is_stopping = False
        most = _descriptors() * 3 // 4  # bodies need some for their files
        self.max_connections = min(settings.max_connections or most, most)
        self.timeout_seconds = float(settings.timeout) or _NO_TIMEOUT_SECONDS
        self.tls = _tls_context(settings)
        self.is_loopback = False
        self._connections: dict[socket.socket, _Wire | None] = {}
        # Accepted sockets without a whole head, the longest waiting one first, and what
        # they became (TLS wraps them).
        self._waiting: dict[socket.socket, socket.socket] = {}
        self._lock = threading.Lock()
        self._buffers: list[bytearray] = []  # to spare
        self._large_buffers = 0  # these, and those that bodies have
        self._stopped = threading.Event()
        self._workers: list[threading.Thread] = []
        if ":" in settings.host:
            self.address_family = socket.AF_INET6
        super().__init__((settings.host, settings.port), handler or FlowHandler)

    def server_bind(self) -> None:
        """Bind without asking the DNS for a name, as http.server would."""
        self.socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix"
        )
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        address = _parse_address(self.server_name)
        self.is_loopback = address is not None and address.is_loopback

    @property
    def url(self) -> str:
        """The address of this server for a browser on this machine."""
        own = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        return self.url_of(own.get(self.server_name, self.server_name))

    def url_of(self, host: str) -> str:
        """Return the address of this server under another name of this machine."""
        scheme = "https" if self.tls is not None else "http"
        host = f"[{host}]" if ":" in host else host
        return f"{scheme}://{host}:{self.server_port}"

    def __enter__(self) -> FlowServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serve in threads of its own, until stop()."""
        for work in (self.serve_forever, self._keep_tidy):
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            self._workers.append(thread)

    def stop(self) -> None:
        """Take no new requests, give those running a few seconds, and end."""
        self.is_stopping = True
        self._stopped.set()
        if self._workers:
            self.shutdown()
        self.server_close()
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            with self._lock:
                for connection in self._waiting.values():
                    _shut(connection)
                if not self._connections:
                    break
            time.sleep(0.02)

    def _keep_tidy(self) -> None:
        self.app.tidy()  # finishes what a crash left
        while not self._stopped.wait(_FIGURE_SECONDS):
            self.app.tidy()

    # Connections

    def get_request(self) -> Any:
        """Accept a connection; make room and pause when there is no descriptor."""
        try:
            return super().get_request()
        except OSError:
            with self._lock:
                self._make_room()
            time.sleep(0.05)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a new connection in a thread; at the limit the idlest gives way."""
        with self._lock:
            is_full = len(self._connections) >= self.max_connections
            has_room = not is_full or self._make_room()
            if has_room:
                self._connections[request] = None
                self._waiting[request] = request
        if has_room:
            super().process_request(request, client_address)
        else:
            self._turn_away(request)

    def _make_room(self) -> bool:
        """Close what has waited longest for a request, else the slowest body.

        Under the lock.  Returns False when all are busy, at 16 KiB/s or more.
        """
        if self._waiting:
            _shut(self._waiting.pop(next(iter(self._waiting))))
            return True
        wires = [wire for wire in self._connections.values() if wire]
        slowest = min(wires, key=_Wire.rate, default=None)
        if slowest is None or slowest.rate() >= _MIN_DRAIN_RATE:
            return False
        _shut(slowest.connection)
        return True

    def _turn_away(self, request: socket.socket) -> None:
        response = refusal(Trouble("The server has too many connections."))
        with contextlib.suppress(OSError):
            request.settimeout(0)
            if self.tls is None:
                request.send(_response_bytes("", response, False))
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection that has ended."""
        with self._lock:
            self._connections.pop(request, None)
            self._waiting.pop(request, None)
        with contextlib.suppress(OSError):
            request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a connection's thread died of; a client's fault gets one line."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self.app.log.info("%s connection failed: %s", client_address[0], error)
        else:
            self.app.log.exception("a connection ended with a bug of flowserver's")

    def know(self, raw: socket.socket, wire: _Wire) -> None:
        """Remember what an accepted connection brings; a slow one may be closed."""
        with self._lock:
            self._connections[raw] = wire

    @contextlib.contextmanager
    def idle(self, raw: socket.socket, connection: socket.socket) -> Iterator[None]:
        """Count an accepted socket as idle while it has no whole head."""
        with self._lock:
            self._waiting[raw] = connection  # an accepted one keeps its place
        try:
            yield
        finally:
            with self._lock:
                self._waiting.pop(raw, None)

    def take_buffer(self) -> bytearray:
        """Return a large buffer for a body; give_buffer() takes it back."""
        with self._lock:
            if self._buffers:
                return self._buffers.pop()
            self._large_buffers += 1
            is_rare = self._large_buffers <= _MAX_LARGE_BUFFERS
        return bytearray(BLOCK_SIZE if is_rare else BLOCK_SIZE // 4)

    def give_buffer(self, buffer: bytearray) -> None:
        """Lend a buffer to the next body, of whatever connection."""
        with self._lock:
            if len(buffer) == BLOCK_SIZE:
                self._buffers.append(buffer)
            else:
                self._large_buffers -= 1


def _descriptors() -> int:
    """Return how many files and sockets this process may have at one time."""
    with contextlib.suppress(ImportError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return sys.maxsize if soft == resource.RLIM_INFINITY else soft
    return sys.maxsize


def _shut(connection: socket.socket) -> None:
    """Wake whoever waits for a connection; its thread closes it.

    SSLSocket.shutdown() would also end the decryption: a thread that has just got a
    head would then take the encrypted bytes that are there already for the body.
    """
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _tls_context(settings: Settings) -> Any:
    """Return the TLS context of the settings, None without; raises SettingsError."""
    if bool(settings.certificate) != bool(settings.private_key):
        raise SettingsError("TLS needs both, certificate and private_key.")
    if not settings.certificate:
        return None
    try:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(settings.certificate, settings.private_key)
    except (ImportError, OSError) as error:
        files = (
            f"certificate {settings.certificate}, private_key {settings.private_key}"
        )
        raise SettingsError(f"TLS can't be set up: {error} ({files}).") from error
    return context


# ---- command line --------------------------------------------------------------------
# Law: a user's mistake is one sentence and an exit status, never a traceback.  2 means
# that a setting is wrong, 1 that this machine can't do it now.


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until Ctrl-C or SIGTERM; return the exit status."""
    if hasattr(sys.stdout, "reconfigure"):  # it may not know the letters of a path
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = vars(_argument_parser().parse_args(argv))
    config, user = arguments.pop("config"), arguments.pop("add_user")
    is_check = arguments.pop("check")
    flags = {name: text for name, text in arguments.items() if text is not None}
    try:
        settings = load_settings(find_config(config), flags)
        if user is not None:
            return _add_user(settings, user)
        if is_check:
            return _check(settings)
        server = _prepared(settings)
    except FlowError as error:
        print(f"flowserver: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    return _serve(server)


def _prepared(settings: Settings) -> FlowServer:
    """Return a server that is not started; raises SettingsError and Trouble."""
    _require_apart(settings)
    try:
        _start_log(settings)
    except OSError as error:
        raise Trouble(f"The log can't be written: {error}.") from error
    _raise_descriptor_limit()
    try:
        return FlowServer(UploadApp(settings))
    except (OSError, TypeError) as error:  # TypeError: a host that IDNA can't encode
        where = f"{settings.host}, port {settings.port}"
        raise Trouble(f"The server can't listen on {where}: {error}.") from error


def _argument_parser() -> argparse.ArgumentParser:
    about = "Take chunked, resumable uploads of browsers."
    parser = argparse.ArgumentParser("flowserver.py", None, about, allow_abbrev=False)
    add = parser.add_argument
    add("--version", action="version", version=__version__)
    text = "Settings file (else FLOWSERVER_CONFIG, else conf.ini beside this file)."
    add("--config", metavar="FILE", help=text)
    text = "Ask for a password, put the user into users_file, and exit."
    add("--add-user", metavar="NAME", help=text)
    text = "Try what the store needs of the configured folders, and exit."
    add("--check", action="store_true", help=text)
    for name, setting in settings_table().items():
        default = f" [{setting.default}]" if setting.default else ""
        text = (setting.sentence + default).replace("%", "%%")
        add("--" + name.replace("_", "-"), metavar="VALUE", help=text)
    return parser


class _LogFile(logging.handlers.RotatingFileHandler):
    """A log file that knows its size.

    The parent class asks the disk for name, type and size of the file before each line,
    and formats it once more.
    """

    held_size = -1

    def shouldRollover(self, record: logging.LogRecord) -> Any:
        """Say whether the line of a record has no room in the file."""
        if self.held_size < 0:
            self.held_size = os.path.getsize(self.baseFilename)
        line_size = len(self.format(record).encode("utf-8", "replace")) + 1
        is_full = 0 < self.maxBytes < self.held_size + line_size
        self.held_size = line_size + (0 if is_full else self.held_size)
        return is_full


class _LineFormatter(logging.Formatter):
    """Makes the line of a record once, for all handlers."""

    def formatException(self, ei: Any) -> str:
        """Indent a traceback: its text may be a client's, and look like a line."""
        return "  " + super().formatException(ei).replace("\n", "\n  ")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        kept = record.__dict__
        if "line" not in kept:
            kept["line"] = super().format(record)
        return str(kept["line"])


def _start_log(settings: Settings) -> None:
    """Log to stderr, and to a file that is rotated when there is one."""
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if settings.log_file:
        size, backups = settings.log_max_size, settings.log_backups
        file = _LogFile(settings.log_file, "a", size, backups, "utf-8")
        if not backups:  # doRollover() opens it again, and would add to it
            file.mode = "w"
        handlers.append(file)
    log = logging.getLogger("flowserver")
    log.setLevel(settings.log_level.upper())
    log.propagate = False
    formatter = _LineFormatter("%(asctime)s %(levelname)s %(message)s")
    for handler in handlers:
        handler.setFormatter(formatter)
        log.addHandler(handler)


def _add_user(settings: Settings, name: str) -> int:
    """Put a user into users_file, or give one another password."""
    if not settings.users_file:
        raise SettingsError("Say where users are kept: set users_file first.")
    if not name.isprintable() or not re.fullmatch(r"[^\s#:]([^:]*[^\s:])?", name):
        raise SettingsError(f"{quoted(name)} can't be the name of a user.")
    line = f"{name}:{hash_password(_ask_password(name))}"
    path, disk = settings.users_file, Disk()
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # a new one is private
        with lock_of(disk, path) as fd:
            with open(path, encoding="utf-8-sig") as file:
                lines = [one.rstrip("\n") for one in file]
            others = [one for one in lines if one.partition(":")[0].strip() != name]
            is_new = len(others) == len(lines)
            data = "".join(f"{one}\n" for one in (*others, line)).encode("utf-8")
            disk.write(fd, data, 0)
            disk.truncate(fd, len(data))
            disk.flush(fd)
    except (OSError, UnicodeDecodeError) as error:
        raise Trouble(f"The file of users can't be changed: {error}.") from error
    what = f"{name} is added" if is_new else f"{name}'s password is changed"
    print(f"{what} ({path}).")
    return 0


def _ask_password(name: str) -> str:
    password = ""
    with contextlib.suppress(EOFError, KeyboardInterrupt, ValueError):  # or no text
        if sys.stdin and sys.stdin.isatty():
            password = getpass.getpass(f"Password for {name}: ")
            if password and getpass.getpass("The same password again: ") != password:
                raise SettingsError("The two passwords differ.")
        elif sys.stdin:
            password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise SettingsError("The password is empty.")
    if "\0" in password:
        raise SettingsError("The password holds a character that can't be typed.")
    return password


def _check(settings: Settings) -> int:
    """Try what the store needs, one line each; 1 when something does not hold."""
    temp_dir = settings.temp_dir or os.path.join(settings.upload_dir, ".flowserver")
    folders = (settings.upload_dir, temp_dir, os.path.join(temp_dir, "v2"))
    missing = [path for path in folders if not os.path.exists(path)]
    try:
        disk = Disk(settings.sync)
        store = Store(settings.upload_dir, settings.temp_dir, disk=disk)
        part = _Part(disk, store.state_dir)
        try:
            results = list(_trials(store, settings, part.path, part.fd))
        finally:
            part.remove()
    except (FlowError, OSError) as error:
        print(f"FAILED  {error}")
        return 1
    finally:
        for path in reversed(missing):
            with contextlib.suppress(OSError):
                os.rmdir(path)
    if settings.upload_dir in missing:
        print(f"ok      {settings.upload_dir} is missing; the start makes it")
    for is_good, sentence in results:
        print(("ok      " if is_good else "FAILED  ") + sentence)
    return 0 if all(is_good for is_good, _ in results) else 1


def _trials(
    store: Store, settings: Settings, path: str, fd: int
) -> Iterator[tuple[bool, str]]:
    """Say what holds and what does not, by a private file; the lock on it is kept."""
    yield True, f"files go to {store.upload_dir}"
    yield True, f"unfinished uploads to {store.temp_dir}, on the same file system"
    yield _locks_hold(store.disk, path, fd), "locks hold between processes"
    if store.disk.links:
        yield True, "files can be published by a hard link"
    elif os.name == "nt":
        yield True, "a rename never overwrites"
    else:
        yield True, "no hard links: names are checked under a lock (see README)"
    free, floor = store.disk.free_space(store.upload_dir), settings.min_free_space
    space = f"{free >> 20} MiB are free, min_free_space is {floor >> 20} MiB"
    yield free > floor, space
    is_steady = abs(store.disk.stat(fd).st_mtime - time.time()) < 60
    yield is_steady, "the clock of the file system agrees with ours"


def _locks_hold(disk: Disk, path: str, fd: int) -> bool:
    """Whether another process is kept out of a file that this one has locked."""
    program = (
        "import os, runpy, sys; disk = runpy.run_path(sys.argv[1])['Disk']();"
        "sys.exit(5 if disk.try_lock(os.open(sys.argv[2], os.O_RDWR)) else 6)"
    )
    disk.lock(fd)
    command = [sys.executable, "-I", "-c", program, os.path.abspath(__file__), path]
    return subprocess.run(command, check=False).returncode == 6


def _warn_if_open(server: FlowServer) -> None:
    """Say what it means to listen on a public address without a login."""
    if server.is_loopback or server.app.settings.users_file:
        return
    print("Anybody who can reach this machine can now fill its disk with files.")
    print("Set users_file (--add-user NAME) or listen on 127.0.0.1.", flush=True)


def _raise_descriptor_limit() -> None:
    """Ask for as many open files as this process may have; the usual 1024 are few."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _serve(server: FlowServer) -> int:
    # An Event would wait for ever when the signal comes while wait() holds its lock.
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: signals.put(number))
    server.start()
    log, folder = server.app.log, server.app.store.upload_dir
    words = "flowserver %s serves %s, files go to %s"
    log.info(words, __version__, server.url, escaped(folder))
    print(f"flowserver {__version__}: open {server.url}/ in a browser", flush=True)
    for address in _other_addresses(server):
        print(f"also reachable as {address}/", flush=True)
    print(f"files go to {folder}", flush=True)
    _warn_if_open(server)
    is_ended = False
    while not is_ended:  # no signal ends a wait that it came just before, or on Windows
        with contextlib.suppress(queue.Empty):
            is_ended = signals.get(timeout=0.5) > 0
    server.stop()
    log.info("flowserver ends")
    return 0


def _other_addresses(server: FlowServer) -> list[str]:
    """Return the addresses for other machines, that of the way outside first."""
    if server.server_name not in ("0.0.0.0", "::"):
        return []
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        with contextlib.suppress(OSError):
            route.connect(("192.0.2.1", 9))  # sends nothing; RFC 5737: nobody's
            found.append(route.getsockname()[0])
    with contextlib.suppress(OSError, UnicodeError):
        entries = socket.getaddrinfo(socket.gethostname(), None)
        found += [str(entry[4][0]).partition("%")[0] for entry in entries]
    urls = []
    for address in map(_parse_address, found):
        is_served = address and (address.version == 4 or server.server_name == "::")
        if is_served and not address.is_loopback and not address.is_link_local:
            urls.append(server.url_of(str(address)))
    return list(dict.fromkeys(urls))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # during the start
        sys.exit(130)
