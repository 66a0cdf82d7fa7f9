#!/usr/bin/env python3
"""flowserver: the server half of chunked, resumable browser uploads, in one file.

Run it, open the address that it prints, drop files on the page:

    python flowserver.py

Point flow.js or resumable.js at it (``target: "http://127.0.0.1:8000/upload"``), or
call it from your own program, with or without a web framework:

    from flowserver import Settings, UploadApp
    uploads = UploadApp(Settings(upload_dir="uploads"), on_complete=print)
    uploads.handle(request)     # Request -> Response, no socket needed
    application = uploads       # the same thing as a WSGI application

What was answered 200 is on disk, whole, once.  Chunks are written in place while they
arrive, in any order and any number at a time; a file appears under its name at once
and whole, or not at all.  Nothing but the standard library is imported.

It does not list or hand out uploaded files, unpack archives, or speak tus.

Glossary.  A *chunk* is a range of bytes of an upload; a *part* is a piece of a
multipart body; a *block* is bytes as they came off the wire; a *range* is [start, end)
in bytes; an *index* counts from 0, a *number* from 1; an *owner* is whose upload it is,
a *sender* who sent a range of it.
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

__version__ = "1.0.0"
__all__ = [
    "Disk",
    "Done",
    "FlowError",
    "FlowHandler",
    "FlowHandlerMixin",
    "FlowServer",
    "Incoming",
    "MultipartParser",
    "Part",
    "Request",
    "Response",
    "Settings",
    "Store",
    "Upload",
    "UploadApp",
    "boundary_of",
    "create_app",
    "main",
    "safe_path",
    "upload_key",
    "wsgi_request",
]

import argparse
import base64
import binascii
import bisect
import collections
import configparser
import contextlib
import errno
import getpass
import hashlib
import hmac
import html
import http.client
import http.server
import ipaddress
import json
import logging
import logging.handlers
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
    Any,
    Callable,
    Deque,
    Dict,
    Generic,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    TypeVar,
    Union,
)

A = TypeVar("A")
T = TypeVar("T")

# ---- errors --------------------------------------------------------------------------
# Law: the class says what kind of trouble it is, the message is one sentence that may
# be shown to anybody, the cause is for the log.  Which status it becomes is decided by
# the dialect, because each client library gives up on other numbers.


class FlowError(Exception):
    """The base of every error that flowserver raises on purpose."""


class Malformed(FlowError):
    """The request contradicts itself or its protocol; sending it again won't help."""


class Truncated(Malformed):
    """The body ended before it was whole; sent again, it may be."""


class TooLarge(FlowError):
    """A limit of ours is exceeded for good."""


class Conflict(FlowError):
    """Two versions under one identifier, or a name that is taken: refused for good."""


class Forbidden(FlowError):
    """This client may not do this here."""


class Foreign(Forbidden):
    """Another site's page, or a host name that is not ours."""


class Unauthorized(FlowError):
    """Nobody, or a wrong name or password, where a login is required."""


class Missing(FlowError):
    """There is nothing at this address."""


class BadMethod(FlowError):
    """The address is right, the method is not."""


class Trouble(FlowError):
    """A passing trouble of this machine, such as a full disk: trying later may help."""


class SettingsError(FlowError):
    """A setting that can't be understood; the sentence names where it stands."""


# ---- settings ------------------------------------------------------------------------
# Law: each setting stands once, in the class below, with its section, reader, default
# and sentence.  The flags and --help are made from it; the tests make the shipped
# conf.ini and the README's table from it, and compare.

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_TIMES = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_FLAGS = {
    **dict.fromkeys(("on", "yes", "true", "1"), True),
    **dict.fromkeys(("off", "no", "false", "0"), False),
}


def _text(value: str) -> str:
    return value


def _like(pattern: str, example: str) -> Callable[[str], str]:
    def read(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"is not {example}")
        return value

    return read


def _choice(*choices: str) -> Callable[[str], str]:
    return _like("|".join(choices), "one of " + ", ".join(choices))


def _path(value: str) -> str:
    return os.path.expanduser(os.path.expandvars(value))


def _required_path(value: str) -> str:
    if not value:
        raise ValueError("is empty, but a folder is needed")
    return _path(value)


def _number(value: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", value):
        raise ValueError("is not a whole number such as 1000")
    return int(value)


def _port(value: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", value) or int(value) > 65535:
        raise ValueError("is not a port from 0 to 65535")
    return int(value)


def _measure(value: str, units: Mapping[str, int], complaint: str) -> int:
    match = re.fullmatch("([0-9]{1,15}) ?([A-Za-z]?)", value)
    if not match or match[2] not in units:
        raise ValueError(complaint)
    return int(match[1]) * units[match[2]]


def _size(value: str) -> int:
    return _measure(value.upper(), _UNITS, "is not a size such as 1048576, 8M or 10G")


def _seconds(value: str) -> int:
    return _measure(
        value.lower(), _TIMES, "is not a time such as 90, 30s, 5m, 12h or 2d"
    )


def _chunk_size(value: str) -> int:
    size = _size(value)
    if not size:
        raise ValueError("is too small: a chunk has at least 1 byte")
    return size


def _flag(value: str) -> bool:
    if value.lower() not in _FLAGS:
        raise ValueError("is neither on nor off")
    return _FLAGS[value.lower()]


def _names(value: str) -> Tuple[str, ...]:
    return tuple(name for name in re.split(r"[\s,]+", value) if name)


def _networks(value: str) -> Tuple[Any, ...]:
    try:
        return tuple(ipaddress.ip_network(name, strict=False) for name in _names(value))
    except ValueError as error:
        raise ValueError("is no list such as 127.0.0.1, 10.0.0.0/8") from error


def _list_of(pattern: str, example: str) -> Callable[[str], Tuple[str, ...]]:
    def read(value: str) -> Tuple[str, ...]:
        names = _names(value.lower())
        if not all(re.fullmatch(pattern, name) for name in names):
            raise ValueError(f"is no list of {example}")
        return names

    return read


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

    def parse(self, text: str, where: str) -> T:
        """Return the value of `text`; raise SettingsError, naming `where` it stood."""
        try:
            return self.read(text.strip())
        except ValueError as error:
            raise SettingsError(f'{where}: "{text}" {error}.') from error

    def parse_in(self, folder: str, text: str, where: str) -> Any:
        """Do as parse() does; a path is relative to `folder`."""
        value: Any = self.parse(text, where)
        is_path = value and self.read in (_path, _required_path)
        return os.path.join(folder, value) if is_path else value


class Settings:
    """Everything that can be set, checked: ``Settings(upload_dir="in", sync=False)``.

    Keyword arguments are the keys of conf.ini; values are text as written there ("8M"),
    or plain numbers, booleans and lists.  Raises SettingsError.
    """

    # fmt: off
    host = Setting("server", _like(r"\S+", "an address such as 0.0.0.0"), "127.0.0.1",
        "Address to listen on; 0.0.0.0 means every address of this machine.")
    port = Setting("server", _port, "8000",
        "Port to listen on; 0 means any free one.")
    upload_path = Setting("server", _like(r"/[^\s?#%]*", "a path such as /upload"),
        "/upload", "Path of the address that chunks are sent to.")
    sample_dir = Setting("server", _path, "sample",
        "Folder of sample pages, served under /sample/; empty turns it off.")
    certificate = Setting("server", _path, "",
        "PEM file with the certificate chain; TLS is on when private_key is set too.")
    private_key = Setting("server", _path, "",
        "PEM file with the private key of the certificate.")
    max_connections = Setting("server", _number, "1000",
        "Connections at one time; the one that has been idle longest gives way.")
    timeout = Setting("server", _seconds, "60s",
        "Longest wait for a request's head, for its next block, and between requests.")
    trusted_proxies = Setting("server", _networks, "",
        "Addresses or networks whose X-Forwarded-For, -Host and -Proto are believed.")

    upload_dir = Setting("storage", _required_path, "uploads",
        "Folder for finished files.")
    temp_dir = Setting("storage", _path, "",
        "Folder for unfinished uploads, on the same file system; empty means"
        " .flowserver inside upload_dir.")
    sync = Setting("storage", _flag, "on",
        "Flush to the disk before answering, so that a power cut loses nothing.")
    on_conflict = Setting("storage", _choice("rename", "replace", "refuse"), "rename",
        "What to do when the name is taken: rename, replace or refuse.")
    stale_after = Setting("storage", _seconds, "2d",
        "Unfinished uploads without activity for this long are removed; 0: never.")
    keep_receipts = Setting("storage", _seconds, "1d",
        "How long a finished upload is remembered, to answer repeated chunks.")
    min_free_space = Setting("storage", _size, "100M",
        "New uploads are refused when they would leave less free space than this.")

    max_file_size = Setting("limits", _size, "0",
        "Largest file in bytes; 0 means no limit.")
    max_chunk_size = Setting("limits", _size, "0",
        "Largest chunk in bytes; 0 means no limit.")
    max_uploads = Setting("limits", _number, "10000",
        "Unfinished uploads at one time; 0 means no limit.")

    chunk_size = Setting("client", _chunk_size, "1M",
        "Chunk size that the built-in page uses.")
    parameter_prefix = Setting("client", _text, "",
        "Prefix of the parameters (resumable.js: parameterNamespace), beside the known"
        " names.")

    users_file = Setting("access", _path, "",
        "File of name:hash lines made by --add-user; empty means no login.")
    allow_origins = Setting("access", _origins, "",
        "Other origins whose pages may upload, such as https://example.com.")
    allow_hosts = Setting("access", _hosts, "",
        "Host names that requests may ask for; empty means any, but only loopback"
        " names when host is a loopback address.")

    log_file = Setting("log", _path, "",
        "File for the log, beside stderr; empty means stderr alone.")
    log_level = Setting("log", _choice("debug", "info", "warning", "error"), "info",
        "Least serious events to log: debug, info, warning or error.")
    log_max_size = Setting("log", _size, "10M",
        "Size at which the log file is rotated.")
    log_backups = Setting("log", _number, "5",
        "Rotated log files to keep.")
    # fmt: on
    config = ""  # the conf.ini that they come from

    def __init__(self, **values: object) -> None:
        table = settings_table()
        for name in values:
            if name not in table:
                raise SettingsError(f'There is no setting "{name}".')
        for name, setting in table.items():
            text = _as_text(values.get(name, setting.default))
            vars(self)[name] = setting.parse(text, name)

    def __repr__(self) -> str:
        pairs = (f"{name}={getattr(self, name)!r}" for name in settings_table())
        return f"Settings({', '.join(pairs)})"


def _as_text(value: object) -> str:
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def settings_table() -> Dict[str, Setting[Any]]:
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
        vars(settings)[name] = table[name].parse_in(os.getcwd(), text, flag)
    settings.config = config
    return settings


def _read_config(path: str) -> Dict[str, object]:
    parser = configparser.ConfigParser(interpolation=None, default_section="\0")
    try:
        with open(path, encoding="utf-8-sig") as file:
            # An indented line is a line of its own, not more of the value before it.
            parser.read_file((line.lstrip() for line in file), path)
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise SettingsError(f"{path} can't be read: {reason}.") from error
    sections = {setting.section for setting in settings_table().values()}
    values: Dict[str, object] = {}
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
    return setting.parse_in(os.path.dirname(os.path.abspath(path)), text, where)


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
_LONGEST_DELIMITER = 140  # with the blanks that may follow it
# What browsers write, letter for letter; anything else is read by the rules.  It halves
# what the fields of a chunk cost.
_BROWSER_PART = re.compile(
    r'Content-Disposition: form-data; name="([^"\\\x00-\x1f\x7f]*)"'
    r'(?:; filename="([^"\\\x00-\x1f\x7f]*)")?'
    r"(?:\r\nContent-Type: ([!-~]*))?"
)


def parse_options(value: str) -> Tuple[str, Dict[str, str]]:
    """Split ``form-data; name="a"`` into its first word, lower case, and its options.

    Raises Malformed for anything that is not written like that, and for an option that
    is given twice.  ``name*`` and the like are left out (RFC 7578 4.2).
    """
    word, _, _ = value.partition(";")
    options: Dict[str, str] = {}
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


def boundary_of(content_type: str) -> Optional[bytes]:
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
    filename: Optional[str]
    content_type: str


Event = Union[Part, memoryview, None]


class MultipartParser:
    """A push parser for multipart/form-data::

        parser = MultipartParser(boundary)      # of boundary_of(content_type)
        for event in parser.feed(block): ...
        parser.close()

    `max_parts` counts all parts; `max_header_size` is in bytes and for one part.
    """

    def __init__(
        self,
        boundary: bytes,
        max_parts: int = 200,
        max_header_size: int = 8192,
        max_junk_size: int = 8192,  # before the first and after the last boundary
    ) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._held = b""
        self._parts_left = max_parts
        self._max_header_size = max_header_size
        self._junk_left = max_junk_size
        self._step = self._start
        self._error: Optional[FlowError] = None
        self._is_new_part = False  # a Part was the last event
        self._expected = 0  # bytes that are known to be data

    def feed(self, block: Union[bytes, bytearray], size: int = -1) -> List[Event]:
        """Take the first `size` bytes of `block` (all by default), return the events.

        A Part begins a part, non-empty memoryviews are its bytes, None ends it.  The
        views may look into `block`: use them before it is filled again.  Raises
        Malformed, and again the same when it is called after that.
        """
        return list(self.scan(block, size))

    def scan(self, block: Union[bytes, bytearray], size: int = -1) -> Iterator[Event]:
        """Do as feed() does, one event at a time; expect() may be called in between."""
        if self._error:
            raise self._error
        size = len(block) if size < 0 else size
        position = 0
        some, end = self._joined(block, size)
        joined_size = end - len(self._held)  # bytes of the block in it
        events: List[Event] = []
        while True:
            kept = position
            while position >= 0 and kept < end:
                try:
                    position = self._step(some, position, end, events)
                except FlowError as error:
                    self._error = error
                    raise
                if position > kept:
                    kept = position
                if self._is_new_part:
                    self._is_new_part = False
                    yield from events
                    events.clear()
            yield from events
            left = end - kept
            if some is block or left > joined_size:
                self._held = bytes(memoryview(some)[kept:end]) if left else b""
                return
            events.clear()
            some, position, end = block, joined_size - left, size

    def _joined(self, block: Any, size: int) -> Tuple[Any, int]:
        """Return what to look at, and where it ends.

        What was held is joined with as much of the block as it takes to come past it,
        not with all of it: that would be copied.
        """
        if not self._held:
            return block, size
        size = min(size, self._max_header_size + _LONGEST_DELIMITER)
        joined = self._held + bytes(memoryview(block)[:size])
        return joined, len(joined)

    def expect(self, size: int) -> None:
        """Say that the next bytes are data of this part: they need not be searched.

        To be called when a Part was returned, by who knows its size from elsewhere.
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

    def _start(self, block: Any, position: int, end: int, events: List[Event]) -> int:
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
        self, block: Any, position: int, end: int, events: List[Event]
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
        self, block: Any, position: int, end: int, events: List[Event]
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

    def _header(self, block: Any, position: int, end: int, events: List[Event]) -> int:
        limit = position + self._max_header_size
        found = block.find(b"\r\n\r\n", position, min(end, limit))
        if found < 0:
            if end > limit:
                raise Malformed("The header of a part of the form is too long.")
            return -1
        events.append(_parse_part(bytes(block[position:found])))
        self._step, self._is_new_part = self._data, True
        return int(found) + 4

    def _data(self, block: Any, position: int, end: int, events: List[Event]) -> int:
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
        self, block: Any, position: int, end: int, events: List[Event]
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
    fields: Dict[str, str] = {}
    for line in text.split("\r\n")[:17]:
        match = _PART_HEADER.fullmatch(line)
        if not match or match[1].lower() in fields or len(fields) == 16:
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
# What each client does with each status is in its source; retries follow 5xx and
# others.

Statuses = Mapping[Type[FlowError], int]

_COMMON_STATUSES: Statuses = {
    Malformed: 400,
    Truncated: 408,
    TooLarge: 413,
    Conflict: 409,
    Forbidden: 403,
    Foreign: 403,
    Unauthorized: 401,
    Missing: 404,
    BadMethod: 405,
    FlowError: 503,
}


class Dialect(NamedTuple):
    """How one client library names the parameters of a chunk."""

    name: str
    identifier: str
    number: str
    chunk_size: str
    length: str
    total_size: str
    filename: str
    relative_path: str
    total_chunks: (
        str  # the parameter with the number of chunks; "" where it can't be trusted
    )
    statuses: Statuses  # those that differ from the common ones
    unused: Tuple[str, ...] = ()  # parameters that nobody here needs

    @property
    def names(self) -> Tuple[str, ...]:
        """The names of the parameters that count."""
        where = (self.identifier, self.filename, self.relative_path, self.number)
        return where + (
            self.chunk_size,
            self.length,
            self.total_size,
            self.total_chunks,
        )


def _family(name: str, prefix: str, statuses: Statuses, count: bool) -> Dialect:
    """Return the row of a library that names its parameters as flow.js does."""
    return Dialect(
        name,
        identifier=prefix + "Identifier",
        number=prefix + "ChunkNumber",
        chunk_size=prefix + "ChunkSize",
        length=prefix + "CurrentChunkSize",
        total_size=prefix + "TotalSize",
        filename=prefix + "Filename",
        relative_path=prefix + "RelativePath",
        total_chunks=prefix + "TotalChunks" if count else "",
        statuses=statuses,
        unused=(prefix + "TotalChunks", prefix + "Type"),
    )


DIALECTS = (
    # flow.js gives up on 404 413 415 500 501, and by default on anything but 200-202.
    _family(
        "flow.js",
        "flow",
        {Malformed: 415, Conflict: 415, Forbidden: 415},
        count=True,
    ),
    # resumable.js 1.1.0 gives up on 400 404 415 500 501 and repeats all else 100 times
    # without a pause, 413, 401 and 403 among them.  Its count of chunks is wrong at
    # times.
    _family(
        "resumable.js",
        "resumable",
        {TooLarge: 415, Conflict: 415, Forbidden: 415},
        count=False,
    ),
    # What remains of ``upIdentifier`` when the setting parameter_prefix is "up".
    _family(
        "custom prefix",
        "",
        {Malformed: 415, TooLarge: 415, Conflict: 415, Forbidden: 415},
        count=False,
    ),
)

# A name of our own clients: 128 random bits of a browser, and the time of modification.
_SECRET_IDENTIFIER = re.compile("flowserver-[0-9a-f]{32}-")
_ABSENT = ("", "null", "undefined", "false")


class Chunk(NamedTuple):
    """What the parameters of a request say; `length` is -1 when no chunk is meant."""

    identifier: str
    filename: str
    relative_path: str  # as the client wrote it; the filename when there was none
    size: int  # of the whole file, in bytes
    start: int
    length: int

    @property
    def is_secret(self) -> bool:
        """Whether knowing the identifier is proof enough of being its owner."""
        return bool(_SECRET_IDENTIFIER.match(self.identifier))


def add_parameter(parameters: Dict[str, str], name: str, value: str) -> None:
    """Set a parameter; raises Malformed when it has another value already."""
    if parameters.setdefault(name, value) != value:
        raise Malformed(f"The parameter {printable(name[:80])} has two values.")


def unprefixed(parameters: Mapping[str, str], prefix: str) -> Dict[str, str]:
    """Return the parameters with `prefix` taken off where it stands; raises Malformed.

    ``up_resumableIdentifier`` becomes resumable.js's own name (its parameterNamespace).
    """
    if not prefix:
        return dict(parameters)
    plain: Dict[str, str] = {}
    for name, value in parameters.items():
        add_parameter(plain, without_prefix(name, prefix), value)
    return plain


def without_prefix(name: str, prefix: str) -> str:
    """Return a parameter's name without the prefix of the settings."""
    return name[len(prefix) :] if prefix and name.startswith(prefix) else name


def recognise(names: Iterable[str]) -> Optional[Dialect]:
    """Return the dialect that names its identifier among these parameters, or None."""
    present = set(names)
    for dialect in DIALECTS:
        if dialect.identifier in present:
            return dialect
    return None


def parse_integer(text: str, name: str) -> int:
    """Return a whole number of at most 15 ASCII digits; raises Malformed.

    int() alone takes ``+1``, ``1_0`` and digits of other scripts.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise Malformed(f'{name} is "{text[:40]}", which is not a whole number.')
    return int(text)


def parse_chunk(dialect: Dialect, parameters: Mapping[str, str]) -> Chunk:
    """Return what the parameters mean; raises Malformed when they can't be true."""

    def integer(name: str) -> int:
        return parse_integer(parameters.get(name, ""), name)

    identifier = parameters.get(dialect.identifier, "")
    filename = parameters.get(dialect.filename, "")
    path = parameters.get(dialect.relative_path, "")
    path = filename if path in _ABSENT else path
    if not identifier or not path:
        raise Malformed("The upload has no identifier or no file name.")
    upload = Chunk(
        identifier, filename or path, path, integer(dialect.total_size), 0, -1
    )
    if parameters.get(dialect.number, "") == "":
        return upload
    number, nominal = integer(dialect.number), integer(dialect.chunk_size)
    chunk = upload._replace(
        start=(number - 1) * nominal, length=integer(dialect.length)
    )
    _check_chunk(chunk, number, nominal)
    if dialect.total_chunks and parameters.get(dialect.total_chunks):
        _check_count(integer(dialect.total_chunks), number, nominal, chunk.size)
    return chunk


def _check_chunk(chunk: Chunk, number: int, nominal: int) -> None:
    """Hold a chunk against the rules of flow.js and its family."""
    end = chunk.start + chunk.length
    if number < 1 or nominal < 1:
        raise Malformed("Chunk numbers and chunk sizes begin at 1.")
    if end > chunk.size:
        raise Malformed(
            f"The chunk ends at byte {end}, but the file has only {chunk.size} bytes."
        )
    if end < chunk.size and chunk.length != nominal:
        raise Malformed(
            f"The chunk has {chunk.length} bytes, but all chunks except the last have"
            f" {nominal}."
        )
    # The last chunk takes the remainder, unless forceChunkSize gives it one of its own.
    if chunk.length >= 2 * nominal or (chunk.length == 0 and chunk.size > 0):
        raise Malformed(
            f"The last chunk has {chunk.length} bytes, which does not go with chunks of"
            f" {nominal}."
        )


def _check_count(count: int, number: int, nominal: int, size: int) -> None:
    fewest, most = max(size // nominal, 1), max(-(-size // nominal), 1)
    if not fewest <= count <= most or number > count:
        raise Malformed(
            f"Chunk {number} of {count} does not go with {size} bytes in chunks of"
            f" {nominal}."
        )


def status_of(error: FlowError, dialect: Optional[Dialect]) -> int:
    """Return the status that makes this client do what the error means."""
    statuses = {**_COMMON_STATUSES, **(dialect.statuses if dialect else {})}
    return next(statuses[kind] for kind in type(error).__mro__ if kind in statuses)


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
        raise Malformed(
            f"The name {printable(path)} leads outside of the upload folder."
        )
    if not words or path[-1:] in "/\\":
        raise Malformed(f"The name {printable(path)} names no file.")
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


def printable(text: str) -> str:
    """Return `text` in quotes on one line, with what could deceive a reader escaped."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return f'"{text}"'


# ---- store ---------------------------------------------------------------------------
# Law: recorded bytes are never rewritten, nothing is written after publication, and a
# file appears under its name whole or not at all.  All state is on disk, under locks
# that hold between threads and processes; what this process remembers is only what it
# read.
#
# An unfinished upload is <key>-<generation>.data, written in place, and <key>.ledger,
# an append-only text of which a line counts when it is whole and its checksum is right.
# When the file is published the ledger stays as the receipt.  A body that can't be
# written in place (the whole file in one chunk, or a second attempt at a range that is
# being written) goes to a private <token>-<n>.part first; <token>.live is locked by the
# process whose parts those are, so that whoever starts later knows the dead ones, and a
# share of <key>.busy by each process that has bodies of an upload under way.

BLOCK_SIZE = 256 * 1024
_IDLE_LEDGERS = 64  # kept open between the chunks of their uploads
_NOTE_SECONDS = 120  # what comes again after this long is no retry: a new sending
_OUT_OF_ORDER_SECONDS = 10  # chunks of one sending may overtake the first one by this
_LONG_RECEIPT_SIZE = 4 << 20  # bytes beside those of the upload itself: not kept long
_LONG_RECEIPT_SECONDS = 3600
_QUIET_SECONDS = 120  # after this long whoever had another version has given up


class Folder(NamedTuple):
    """An open folder; `fd` is None where files can't be named relative to one."""

    fd: Optional[int]
    path: str


class Disk:
    """Every call of the store to the operating system, so that a test can stop at each.

    With `sync` off, flush() and flush_folder() do nothing.
    """

    def __init__(self, sync: bool = True) -> None:
        self.sync = sync
        self.unlinks_open = os.name != "nt"  # and renames: files that are open
        self.shares_locks = os.name != "nt"
        self.links = hasattr(os, "link") and self.unlinks_open
        self._relative = os.open in os.supports_dir_fd and os.link in os.supports_dir_fd
        self._flock = _find_file_lock()
        self._positioned = hasattr(os, "pwrite")

    # Files

    def open(self, path: str, flags: int) -> int:
        """Return a descriptor; files are made with the mode that the umask leaves."""
        return os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def read(self, fd: int, size: int, offset: int) -> bytes:
        """Return up to `size` bytes from `offset`; fewer only at the file's end."""
        blocks = []
        while size > 0:
            block = self._read_once(fd, min(size, 1 << 24), offset)
            if not block:
                break
            blocks.append(block)
            size -= len(block)
            offset += len(block)
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def _read_once(self, fd: int, size: int, offset: int) -> bytes:
        if self._positioned:
            return os.pread(fd, size, offset)
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, size)

    def write(self, fd: int, block: Union[bytes, memoryview], offset: int) -> None:
        """Write all of `block` at `offset`."""
        view = memoryview(block)
        while view:
            written = self._write_once(fd, view, offset)
            view = view[written:]
            offset += written

    def _write_once(self, fd: int, view: memoryview, offset: int) -> int:
        if self._positioned:
            return os.pwrite(fd, view, offset)
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, view)

    def truncate(self, fd: int, size: int) -> None:
        """Cut the file to `size` bytes."""
        os.ftruncate(fd, size)

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

    def stat(self, fd: int) -> os.stat_result:
        """Return what is known of an open file."""
        return os.fstat(fd)

    def stat_path(self, path: str) -> Optional[os.stat_result]:
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
        """Give a file of ours another name of ours."""
        _patiently(os.replace, source, target)

    # Folders

    def make_folder(self, path: str, mode: int = 0o777) -> bool:
        """Make a folder; return False when there was something of that name."""
        try:
            os.mkdir(path, mode)
        except FileExistsError:
            return False
        return True

    def open_folder(self, path: str) -> Folder:
        """Open a folder that must exist and not be a symbolic link.

        Raises NotADirectoryError, also for a link.
        """
        if not self._relative:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "not a folder", path)
            return Folder(None, path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise NotADirectoryError(errno.ENOTDIR, "not a folder", path) from error
            raise
        return Folder(fd, path)

    def close_folder(self, folder: Folder) -> None:
        """Close what open_folder() opened."""
        if folder.fd is not None:
            os.close(folder.fd)

    def flush_folder(self, folder: Folder) -> None:
        """Return when the names in the folder are on the disk."""
        if self.sync and folder.fd is not None:
            os.fsync(folder.fd)

    def list(self, path: str) -> List[str]:
        """Return the names in a folder."""
        return os.listdir(path)

    # Publication

    def publish(self, source: str, folder: Folder, name: str) -> bool:
        """Give a file its final name; raises FileExistsError, never overwrites.

        Returns whether the old name is still there, too.
        """
        target = os.path.join(folder.path, name)
        if self.links:
            os.link(source, target if folder.fd is None else name, dst_dir_fd=folder.fd)
            return True
        if self.unlinks_open and os.path.lexists(target):
            # Only under the lock of names: this system has no rename that refuses.
            raise FileExistsError(errno.EEXIST, "exists", target)
        _patiently(os.rename, source, target)
        return False

    def replace(self, source: str, folder: Folder, name: str) -> None:
        """Give a file its final name in place of the file that may have it."""
        _patiently(os.replace, source, os.path.join(folder.path, name))

    def named(self, folder: Folder, name: str) -> Optional[os.stat_result]:
        """Return what is known of the file of this name, None when there is none."""
        try:
            if folder.fd is not None:
                return os.stat(name, dir_fd=folder.fd, follow_symlinks=False)
            return os.lstat(os.path.join(folder.path, name))
        except FileNotFoundError:
            return None

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

    def share_lock(self, fd: int) -> None:
        """Wait for a share of the lock of an open file; needs `shares_locks`."""
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_SH)


def _find_file_lock() -> Callable[[int, bool, bool], bool]:
    """Return ``lock(fd, take, wait) -> taken`` of this system."""
    try:
        import fcntl
    except ImportError:
        return _windows_lock()

    def lock(fd: int, take: bool, wait: bool) -> bool:
        mode = fcntl.LOCK_EX if take else fcntl.LOCK_UN
        try:
            fcntl.flock(fd, mode if wait or not take else mode | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    return lock


def _windows_lock() -> Callable[[int, bool, bool], bool]:
    import msvcrt

    # Locks of Windows keep others from reading: take one byte that no file has.
    place = 1 << 62
    locking: Callable[[int, int, int], None] = getattr(msvcrt, "locking")
    take_mode, free_mode = getattr(msvcrt, "LK_NBLCK"), getattr(msvcrt, "LK_UNLCK")

    def lock(fd: int, take: bool, wait: bool) -> bool:
        while True:
            os.lseek(fd, place, os.SEEK_SET)
            try:
                locking(fd, take_mode if take else free_mode, 1)
                return True
            except OSError:
                if not take or not wait:
                    return False
                time.sleep(0.002)

    return lock


def _patiently(call: Callable[..., None], *arguments: str) -> None:
    """Call, and again for two seconds where an open file can't be moved (Windows)."""
    for _ in range(100 if os.name == "nt" else 0):
        try:
            return call(*arguments)
        except PermissionError:
            time.sleep(0.02)
    return call(*arguments)


class Ranges:
    """Disjoint ranges of bytes, sorted; neighbours are merged."""

    def __init__(self, ranges: Iterable[Sequence[int]] = ()) -> None:
        self._starts: List[int] = []
        self._ends: List[int] = []
        self.total = 0
        for start, end in ranges:
            self.add(start, end)

    def __iter__(self) -> Iterator[Tuple[int, int]]:
        return iter(zip(self._starts, self._ends))

    @property
    def end(self) -> int:
        """Where the last range ends."""
        return self._ends[-1] if self._ends else 0

    def add(self, start: int, end: int) -> None:
        """Add what is not there yet of [start, end)."""
        if start >= end:
            return
        first = bisect.bisect_left(self._ends, start)
        last = bisect.bisect_right(self._starts, end)
        if first < last:  # touches or overlaps these: they become one
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        joined = range(first, last)
        self.total += end - start - sum(self._ends[i] - self._starts[i] for i in joined)
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def within(self, start: int, end: int) -> List[Tuple[int, int]]:
        """Return what is there of [start, end), cut to it."""
        found = []
        index = bisect.bisect_right(self._ends, start)
        while index < len(self._starts) and self._starts[index] < end:
            low, high = max(self._starts[index], start), min(self._ends[index], end)
            found.append((low, high))
            index += 1
        return found

    def gaps(self, start: int, end: int) -> List[Tuple[int, int]]:
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
    size: int
    owner: str = ""
    identifier: str = ""
    relative_path: str = ""  # as the client wrote it


def upload_key(owner: str, identifier: str, relative_path: str, size: int) -> str:
    """Return the name on disk of an upload: a hash, nothing that a client wrote."""
    text = json.dumps([owner, identifier, relative_path, size])
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
    done: Optional[Done] = None
    is_new: bool = False  # whether this very request finished it
    began: float = 0.0  # the clock when its first byte came; 0 if with this request


class _Finished(NamedTuple):
    """What a receipt says: where the file went, and how to know it again."""

    path: str  # below upload_dir
    size: int
    inode: int
    modified: int  # nanoseconds
    token: str  # of the process that finished it, when its end must be announced
    last: Tuple[int, int, str]  # the range that made it complete, and its sender
    fields: Mapping[str, str]


class _Note(NamedTuple):
    """A range that came again after the end, and was equal to the file's."""

    start: int
    end: int
    sender: str
    time: float
    is_retry: bool  # the last chunk, maybe because its answer was lost


class _Ledger:
    """One upload as this process has read it; valid under the store's lock."""

    def __init__(self, key: str, fd: int) -> None:
        self.key = key
        self.fd = fd
        self.mutex = threading.Lock()
        self.flushing = threading.Lock()
        self.users = 0
        self.data_fd: Optional[int] = None
        self.retired_fds: List[int] = []
        self.is_home = False  # this process holds the lock of the data file
        self.attempts: List[_InPlace] = []
        self.head = b""  # how the file begins, where a dead one can't be unlinked
        self.offset = 0  # bytes of whole lines read
        self.flushed = 0  # bytes of them known to be on the disk
        self.writes = 0  # to the data file, by this process
        self.flushed_writes = 0
        self.failed_flushes = 0  # of the data file
        self.is_suspect = False  # a flush of the lines failed
        self.is_named = False  # its name is known to be on the disk
        self.is_torn = False  # what follows `offset` is no line
        self.is_dead = False  # forgotten; whoever wants this upload opens it anew
        self.begin({})

    def begin(self, values: Mapping[str, Any]) -> None:
        """A new upload begins, with `ranges` taken over from the finished one."""
        self.retire_data()
        self.begun, self.own_size = self.offset, 0  # of its lines until it is finished
        self.published_fd: Optional[int] = None  # of the finished file, if it is open
        self.upload = Upload(*values.get("upload", [self.key, "", -1]))
        self.generation: str = values.get("generation", "")
        self.opener: str = values.get("sender", "")
        self.boot: str = values.get("boot", "")
        self.began: float = values.get("time", 0.0)
        self.ranges = Ranges(values.get("ranges", ()))  # recorded
        self.sent: Dict[str, Ranges] = {}  # recorded or compared equal, by sender
        # Senders of another version, and where in the ledger that is said.
        self.refused = dict.fromkeys(values.get("refused", ()), self.offset)
        # Whose bytes were forgotten with another's; they must begin once more.
        self.forgotten = set(values.get("forgotten", ()))
        self.cuts: Dict[str, Ranges] = {}  # of bodies that broke off, by sender
        self.went_on: Set[str] = set()  # who stored bytes after that
        self.intents: List[Tuple[str, int, Dict[str, str]]] = []
        self.finished: Optional[_Finished] = None
        self.is_announced = False
        self.notes: Dict[str, List[_Note]] = {}  # by sender
        self.noted: Dict[str, Ranges] = {}  # the ranges of these

    @property
    def is_complete(self) -> bool:
        """Whether every byte is recorded."""
        return self.ranges.total == self.upload.size

    def is_sent_again(self, since: float) -> bool:
        """Whether somebody is in the middle of sending the finished file once more."""
        return any(
            notes[-1].time > since and self.noted[sender].total < self.upload.size
            for sender, notes in self.notes.items()
        )

    @property
    def is_one_version(self) -> bool:
        """Whether somebody has sent every byte, so that nothing can be mixed."""
        size = self.upload.size
        return size == 0 or any(sent.total == size for sent in self.sent.values())

    @property
    def is_contested(self) -> bool:
        """Whether a sender of another version has stored bytes, too."""
        return any(sender in self.sent for sender in self.refused)

    @property
    def doubtful(self) -> Set[str]:
        """Who stored bytes, and had a body break off that might have differed."""
        return {
            sender
            for sender, cut in self.cuts.items()
            if sender in self.sent and any(self.sent[sender].gaps(*one) for one in cut)
        }

    def retire_data(self) -> None:
        """Let another data file be opened; who still reads this one may go on."""
        if self.data_fd is not None:
            self.retired_fds.append(self.data_fd)
        self.data_fd, self.is_home = None, False

    def read_lines(self, text: bytes) -> None:
        """Take the lines that follow `offset`, up to the first that is not whole."""
        for line in text.splitlines(keepends=True):
            values = _parse_line(line)
            if values is None:
                return
            self.offset += len(line)
            _LINES[values[0]](self, *values[1:])

    def add_range(self, start: int, end: int, sender: str) -> None:
        """A range is stored."""
        self.ranges.add(start, end)
        self.add_sent(start, end, sender)
        if sender in self.cuts:
            self.went_on.add(sender)

    def add_sent(self, start: int, end: int, sender: str) -> None:
        """A sender has sent a range, and it is what is stored."""
        self.sent.setdefault(sender, Ranges()).add(start, end)
        if start == 0:
            self.forgotten.discard(sender)

    def add_merge(self, start: int, end: int) -> None:
        """Bytes that were not recorded are about to be overwritten."""
        for attempt in self.attempts:
            attempt.overtaken(start, end)

    def add_refused(self, sender: str) -> None:
        """A sender has another version."""
        self.refused[sender] = self.offset

    def add_cut(self, start: int, end: int, sender: str) -> None:
        """A body broke off: nobody knows whether it was of this version."""
        self.cuts.setdefault(sender, Ranges()).add(start, end)

    def add_intent(self, path: str, inode: int, fields: Dict[str, str]) -> None:
        """The data file, which is this inode, is about to get this name."""
        self.intents.append((path, inode, fields))

    def finish(self, values: Mapping[str, Any]) -> None:
        """The file has its name."""
        self.finished = _Finished(**dict(values, last=tuple(values["last"])))
        self.is_announced = not self.finished.token
        self.own_size = self.offset - self.begun
        self.published_fd = self.data_fd
        self.retire_data()  # nobody may take it for what can be written to

    def announce(self) -> None:
        """on_complete has returned."""
        self.is_announced = True

    def add_note(self, *values: Any) -> None:
        """A range came again and was equal."""
        note = _Note(*values)
        self.notes.setdefault(note.sender, []).append(note)
        self.noted.setdefault(note.sender, Ranges()).add(note.start, note.end)

    def drop_notes(self, sender: str) -> None:
        """This sender has begun to send the file once more."""
        self.notes.pop(sender, None)
        self.noted.pop(sender, None)


_LINES: Mapping[str, Callable[..., None]] = {
    "upload": _Ledger.begin,
    "range": _Ledger.add_range,
    "sent": _Ledger.add_sent,
    "merge": _Ledger.add_merge,
    "refused": _Ledger.add_refused,
    "cut": _Ledger.add_cut,
    "publish": _Ledger.add_intent,
    "finished": _Ledger.finish,
    "announced": _Ledger.announce,
    "note": _Ledger.add_note,
    "afresh": _Ledger.drop_notes,
}


_compact_json = json.JSONEncoder(separators=(",", ":")).encode


def _ledger_line(*values: Any) -> bytes:
    text = _compact_json(values).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse_line(line: bytes) -> Optional[List[Any]]:
    """Return the values of a line, None when it is torn or not one of ours."""
    if not line.endswith(b"\n") or b"%08x" % zlib.crc32(line[9:-1]) != line[:8]:
        return None
    values: List[Any] = json.loads(line[9:])
    return values


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn an error of the operating system into a sentence for people."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise TooLarge(
                "The file is larger than this disk's files can be."
            ) from error
        sentence = _SENTENCES.get(error.errno or 0)
        raise Trouble(sentence or f"The disk reports: {error.strerror}.") from error


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


class _Process:
    """This process among those of one temp folder: its locked token, its parts."""

    def __init__(self, disk: Disk, folder: str) -> None:
        self._disk = disk
        self._folder = folder
        self._mutex = threading.Lock()
        self._pid = os.getpid()
        self._token = ""
        self._fd = -1
        self._count = 0
        self._parts: Set[str] = set()  # those that somebody uses

    def token(self) -> str:
        """Return this process's token, whose file is locked as long as it lives."""
        with self._mutex:
            if self._pid != os.getpid():  # a forked child is a process itself
                self._pid, self._token, self._parts = os.getpid(), "", set()
            while not self._token:
                token = secrets.token_hex(8)
                path = self._path(token + ".live")
                fd = self._disk.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                self._disk.lock(fd)
                if self._disk.stat_path(path) is None:  # buried before it was locked
                    self._disk.close(fd)
                    continue
                self._token, self._fd = token, fd
            return self._token

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def is_alive(self, token: str) -> bool:
        """Return whether the process of a token lives; bury it when it does not."""
        if token == self.token():
            return True
        path = self._path(token + ".live")
        try:
            fd = self._disk.open(path, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            if not self._disk.try_lock(fd):
                return True
            if self._disk.unlinks_open:  # under the lock: it may be just beginning
                self._disk.unlink(path)
        finally:
            self._disk.close(fd)
        return False

    def new_part(self) -> Tuple[str, int]:
        """Make a private file; return its path and descriptor."""
        token = self.token()
        with self._mutex:
            self._count += 1
            name = f"{token}-{self._count}.part"
            self._parts.add(name)
        path = self._path(name)
        try:
            return path, self._disk.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except OSError:
            self.drop_part(path)
            raise

    def drop_part(self, path: str) -> None:
        """Remove a private file; what can't be removed now is swept later."""
        with self._mutex:
            self._parts.discard(os.path.basename(path))
        with contextlib.suppress(OSError):
            self._disk.unlink(path)

    def sweep(self, names: Sequence[str]) -> None:
        """Remove what dead processes left, and parts of ours that nobody uses."""
        alive: Dict[str, bool] = {}
        for name in names:
            if name.endswith((".live", ".part")) and name not in self._parts:
                token = re.split("[-.]", name)[0]
                with contextlib.suppress(OSError):  # the next sweep tries again
                    if token not in alive:
                        alive[token] = self.is_alive(token)
                    is_left = token == self._token and name.endswith(".part")
                    if is_left or not alive[token]:
                        self._disk.unlink(self._path(name))

    def close(self) -> None:
        """Give the token back."""
        with self._mutex:
            if self._token and self._pid == os.getpid():
                self._disk.close(self._fd)
                self._disk.unlink(self._path(self._token + ".live"))
                self._token = ""


class _Publisher:
    """Names below upload_dir: given without a race, and never over another file."""

    def __init__(self, disk: Disk, upload_dir: str, policy: str, lock: str) -> None:
        self.disk = disk
        self.upload_dir = upload_dir
        self.policy = policy  # on_conflict
        self._lock = lock  # a file to lock where names can't be taken atomically
        self._flushed: Set[str] = set()  # folders whose names are on the disk

    def path(self, relative: str) -> str:
        """Return the absolute path of a path below upload_dir."""
        return os.path.join(self.upload_dir, *relative.split("/"))

    def stat(self, relative: str) -> Optional[os.stat_result]:
        """Return what is known of a file below upload_dir, or None."""
        return self.disk.stat_path(self.path(relative))

    @contextlib.contextmanager
    def opened(self, path: str) -> Iterator[Folder]:
        """Open a folder for a while."""
        folder = self.disk.open_folder(path)
        try:
            yield folder
        finally:
            self.disk.close_folder(folder)

    def flush_folder(self, path: str) -> None:
        """Return when the names in a folder are on the disk."""
        if self.disk.sync:
            with self.opened(path) as folder:
                self.disk.flush_folder(folder)

    @contextlib.contextmanager
    def folder_of(self, relative: str) -> Iterator[Folder]:
        """Open the folder of a file below upload_dir, made where it is missing."""
        parent = self.upload_dir
        for word in relative.split("/")[:-1]:
            folder = os.path.join(parent, word)
            is_new = self.disk.make_folder(folder)
            status = self.disk.stat_path(folder)
            if status is None or not stat.S_ISDIR(status.st_mode):
                raise _no_folder(word)
            if is_new or folder not in self._flushed:
                self.flush_folder(parent)
                if len(self._flushed) > 10000:
                    self._flushed.clear()
                self._flushed.add(folder)
            parent = folder
        if parent == self.upload_dir and not self.disk.sync:
            yield Folder(None, parent)  # no client named it: a path will do
            return
        with self.opened(parent) as last:
            yield last

    def refuse_early(self, upload: Upload, is_whole: bool) -> None:
        """Raise Conflict for what can be known before the bytes have travelled.

        A whole file of the size of the one that has its name may be the same again.
        """
        words = upload.path.split("/")
        for count in range(1, len(words)):
            status = self.stat("/".join(words[:count]))
            if status and not stat.S_ISDIR(status.st_mode):
                raise _no_folder(words[count - 1])
        if self.policy == "refuse":
            status = self.stat(upload.path)
            if status and not (is_whole and status.st_size == upload.size):
                raise _taken(words[-1])

    def choose(
        self,
        folder: Folder,
        name: str,
        descriptor: Callable[[], int],
        give: Callable[[str], None],
    ) -> str:
        """Find a name as the policy says and `give` it; return the one it became.

        A file of that name with the same bytes is as good as ours: no second copy.
        """
        candidate = name
        while True:
            existing = self.disk.named(folder, candidate)
            if existing and self.is_same(descriptor(), folder, candidate, existing):
                self.disk.flush_folder(folder)
                return candidate
            if existing is None or self.policy == "replace":
                with contextlib.suppress(FileExistsError):
                    give(candidate)
                    self.disk.flush_folder(folder)
                    return candidate
            elif self.policy == "refuse":
                raise _taken(name)
            else:
                candidate = self._free_number(folder, name)

    def is_same(
        self, fd: int, folder: Folder, name: str, existing: os.stat_result
    ) -> bool:
        """Return whether a file of that name is this one, or has its bytes."""
        mine = self.disk.stat(fd)
        if (mine.st_ino, mine.st_dev) == (existing.st_ino, existing.st_dev):
            return True
        if mine.st_size != existing.st_size or not stat.S_ISREG(existing.st_mode):
            return False
        # Windows flushes only what may be written.
        flags = os.O_RDONLY if self.disk.unlinks_open else os.O_RDWR
        try:
            other = self.disk.open(os.path.join(folder.path, name), flags)
        except (FileNotFoundError, PermissionError):  # gone by now, or not ours
            return False
        try:
            if not _are_equal(self.disk, fd, other, 0, mine.st_size):
                return False
            self.disk.flush(other)  # nobody else may have done so
            return True
        finally:
            self.disk.close(other)

    def _free_number(self, folder: Folder, name: str) -> str:
        """Return a free numbered name in a logarithmic number of looks.

        Not from 1 each time: 10,000 files of one name would make the next one slow.
        """
        low, high = 0, 1
        while self.disk.named(folder, numbered(name, high)):
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            if self.disk.named(folder, numbered(name, middle)):
                low = middle
            else:
                high = middle
        return numbered(name, high)

    def give(self, source: str, folder: Folder, name: str) -> None:
        """Give a file of ours this name; raises FileExistsError unless we replace."""
        if self.policy == "replace":
            try:
                self.disk.replace(source, folder, name)
            except (IsADirectoryError, NotADirectoryError) as error:
                raise _taken(name) from error
        elif self.disk.links or not self.disk.unlinks_open:
            self.disk.publish(source, folder, name)
        else:
            fd = self.disk.open(self._lock, os.O_RDWR | os.O_CREAT)
            try:
                self.disk.lock(fd)
                self.disk.publish(source, folder, name)
            finally:
                self.disk.unlock(fd)
                self.disk.close(fd)


def _are_equal(disk: Disk, fd: int, other: int, start: int, end: int) -> bool:
    """Compare [start, end) of two open files."""
    for low in range(start, end, BLOCK_SIZE):
        size = min(BLOCK_SIZE, end - low)
        if disk.read(fd, size, low) != disk.read(other, size, low):
            return False
    return True


class Store:
    """Uploads on disk::

        with store.receive(upload, start, end, sender) as body:
            body.write(block)       # as often as it takes, in order
            progress = body.commit()

    `sender` is who sends: an address, a user, or one word for all who know the secret.
    `announce` is called with each Done, once while the process lives and after a crash
    at least once.  Raises Trouble when `upload_dir` can't be used; starts no thread.
    """

    def __init__(
        self,
        upload_dir: str,
        temp_dir: str = "",
        on_conflict: str = "rename",
        disk: Optional[Disk] = None,
        announce: Optional[Callable[[Done], None]] = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.upload_dir = _followed(upload_dir)
        temp_dir = temp_dir or os.path.join(self.upload_dir, ".flowserver")
        self.temp_dir = _followed(temp_dir)
        self.disk = disk or Disk()
        self.announce = announce
        self.clock = clock
        self.open_uploads = 0
        self.warnings: Deque[str] = collections.deque(maxlen=1000)  # for the log
        self.state_dir = os.path.join(self.temp_dir, "v1")
        self.process = _Process(self.disk, self.state_dir)
        self.publisher = _Publisher(
            self.disk, self.upload_dir, on_conflict, self._path("names.lock")
        )
        self._mutex = threading.Lock()
        self._pid = os.getpid()
        self._ledgers: Dict[str, _Ledger] = {}
        self._idle: collections.OrderedDict[str, _Ledger] = collections.OrderedDict()
        self._bodies: Dict[str, List[Receiving]] = {}  # under way, by key
        self._busy_fds: Dict[str, int] = {}  # tells other processes of them, by key
        self._deferred: Dict[str, Mapping[str, str]] = {}  # complete, by key: fields
        self._announcing: Set[str] = set()  # generations
        try:
            with _explained():
                self._make_folders()
        except Trouble as error:
            raise Trouble(f"{error} ({self.upload_dir})") from error.__cause__

    # What the application calls

    def receive(self, upload: Upload, start: int, end: int, sender: str) -> Receiving:
        """Begin to take the bytes [start, end) of an upload.

        Raises Malformed when they are not bytes of it, and Conflict when the name is
        taken and on_conflict is "refuse".
        """
        if not 0 <= start <= end <= upload.size:
            raise Malformed(
                f"Bytes {start} to {end} are not all in a file of {upload.size}."
            )
        with _explained():
            return Receiving(self, upload, start, end, _sender_hash(sender))

    def has(self, upload: Upload, start: int, end: int, sender: str) -> bool:
        """Return whether this sender need not send [start, end); changes nothing.

        False as soon as nothing is missing, so that a last chunk comes and finishes.
        """
        with _explained(), self.entered(upload) as ledger:
            if ledger is None or ledger.finished or ledger.is_complete:
                return False
            sent = ledger.sent.get(_sender_hash(sender))
            if start >= end or sent is None or sent.gaps(start, end):
                return False
            self.flush_ledger(ledger)
            return True

    def knows(self, upload: Upload) -> bool:
        """Return whether the upload was begun, or finished a while ago."""
        with _explained():
            status = self.disk.stat_path(self._path(upload.key + ".ledger"))
        return status is not None and status.st_size > 0

    def status(
        self, upload: Upload, sender: str
    ) -> Tuple[List[Tuple[int, int]], Optional[Done]]:
        """Return the ranges that this sender need not send, and the end if any."""
        with _explained(), self.entered(upload) as ledger:
            if ledger is None:
                return [], None
            ranges = list(ledger.sent.get(_sender_hash(sender), ()))
            if ledger.finished:
                if not ranges or not self.is_intact(ledger):  # a chunk begins anew
                    return [], None
                return ranges, self._done(ledger)
            self.flush_ledger(ledger)
            return ranges, None

    def forget(self, upload: Upload, sender: str) -> bool:
        """Drop an unfinished upload that `sender` began or sent bytes of."""
        who = _sender_hash(sender)
        with _explained(), self.entered(upload) as ledger:
            if ledger is None or ledger.finished:
                return False
            if who != ledger.opener and who not in ledger.sent:
                return False
            self._forget_all(ledger, who)
            return True

    def sweep(self, stale_after: float, keep_receipts: float) -> None:
        """Finish what a crash left, remove what nobody wants; times in seconds.

        Meant for the start and now and then; safe beside other processes.
        """
        with _explained():
            names = self.disk.list(self.state_dir)
            self.process.sweep(names)
            for name in names:
                if name.endswith(".busy"):  # of a process that was killed, maybe
                    self._unlink_busy(name[:-5])
        datas: Dict[str, List[str]] = {}
        for name in names:
            if name.endswith(".ledger"):
                datas.setdefault(name[:-7], [])
            elif name.endswith(".data"):
                datas.setdefault(name.partition("-")[0], []).append(name)
        unfinished = 0
        for key, files in datas.items():
            try:
                unfinished += self._sweep_upload(key, files, stale_after, keep_receipts)
            except (FlowError, OSError) as error:  # the others want their turn
                self.warnings.append(f"upload {key} can't be brought in order: {error}")
        self.open_uploads = unfinished

    def count(self) -> None:
        """Count the unfinished uploads of all processes anew."""
        with _explained():
            names = self.disk.list(self.state_dir)
        self.open_uploads = sum(name.endswith(".data") for name in names)

    def close(self) -> None:
        """Give back what is kept open; a later call opens it again."""
        with self._mutex:
            self._notice_fork()
            while self._idle:
                key, ledger = self._idle.popitem()
                self.disk.close(self._ledgers.pop(key).fd)
        self.process.close()

    # Folders

    def _path(self, name: str) -> str:
        return os.path.join(self.state_dir, name)

    def data_path(self, ledger: _Ledger) -> str:
        """Return where the bytes of an unfinished upload are."""
        return self._path(f"{ledger.key}-{ledger.generation}.data")

    def _make_folders(self) -> None:
        os.makedirs(self.upload_dir, exist_ok=True)
        for path in (self.temp_dir, self.state_dir):
            if os.path.exists(path) and os.path.samefile(path, self.upload_dir):
                raise Trouble("Clients could replace what is in temp_dir.")
            try:
                self.disk.make_folder(path, 0o700)
            except OSError as error:
                raise Trouble(f"{path} can't be made: {error.strerror}.") from error
        if os.stat(self.upload_dir).st_dev != os.stat(self.state_dir).st_dev:
            raise Trouble(
                f"temp_dir {self.temp_dir} is not on the same file system as upload_dir"
                f" {self.upload_dir}."
            )
        parent = os.path.realpath(os.path.dirname(self.temp_dir))
        for path in (self.upload_dir, parent, self.temp_dir):
            self.publisher.flush_folder(path)
        self._try_links()

    def _try_links(self) -> None:
        """Find out whether files can have two names here; publication relies on it."""
        if not self.disk.links:
            return
        part, fd = self.process.new_part()
        try:
            with self.publisher.opened(self.state_dir) as folder:
                self.disk.publish(part, folder, os.path.basename(part) + ".part")
            self.disk.unlink(part + ".part")
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self.disk.links = False
            self.warnings.append(
                "This file system has no hard links: names are checked under a lock,"
                " and another program may take one in between."
            )
        finally:
            self.disk.close(fd)
            self.process.drop_part(part)

    # Ledgers: found, kept, locked

    def acquire(self, key: str, create: bool) -> Optional[_Ledger]:
        """Return the ledger of an upload, to be released; None when there is none."""
        with self._mutex:
            self._notice_fork()
            ledger = self._ledgers.get(key)
            if ledger is None:
                flags = os.O_RDWR | (os.O_CREAT if create else 0)
                try:
                    fd = self.disk.open(self._path(key + ".ledger"), flags)
                except FileNotFoundError:
                    os.stat(self.state_dir)  # says so when the folder itself is gone
                    return None
                ledger = self._ledgers[key] = _Ledger(key, fd)
            self._idle.pop(key, None)
            ledger.users += 1
            return ledger

    def recall(self, key: str) -> Optional[_Ledger]:
        """Return the ledger of an upload that goes on, if nothing of it is news.

        To be released, as that of acquire().
        """
        with self._mutex:
            self._notice_fork()
            ledger = self._ledgers.get(key)
            if ledger is None or ledger.finished or not ledger.ranges.total:
                return None
            if ledger.is_complete:  # a crash may have left it
                return None
            status = self.disk.stat(ledger.fd)
            is_known = status.st_nlink and status.st_size == ledger.offset
            if ledger.is_dead or not is_known or not self.disk.unlinks_open:
                return None
            self._idle.pop(key, None)
            ledger.users += 1
            return ledger

    def keep(self, ledger: _Ledger) -> None:
        """Count one more user; each ends with release()."""
        with self._mutex:
            ledger.users += 1

    def release(self, ledger: _Ledger) -> None:
        """Count one user less; the last one closes what need not stay open."""
        with self._mutex:
            ledger.users -= 1
            if ledger.is_dead and self._ledgers.get(ledger.key) is ledger:
                del self._ledgers[ledger.key]
            if ledger.users == 0:
                self._close_data(ledger)
                if ledger.is_dead:
                    self.disk.close(ledger.fd)
                else:
                    self._rest(ledger)

    def _rest(self, ledger: _Ledger) -> None:
        """Keep a ledger open between chunks, where an open file can be removed."""
        self._idle[ledger.key] = ledger
        while len(self._idle) > (_IDLE_LEDGERS if self.disk.unlinks_open else 0):
            key, oldest = self._idle.popitem(last=False)
            del self._ledgers[key]
            self.disk.close(oldest.fd)

    def _notice_fork(self) -> None:
        """Begin anew in a forked child: the descriptors are its parent's."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            for kept in (self._ledgers, self._idle, self._bodies, self._deferred):
                kept.clear()
            self._announcing.clear()
            self._busy_fds.clear()

    def _close_data(self, ledger: _Ledger) -> None:
        ledger.retire_data()
        ledger.published_fd = None
        while ledger.retired_fds:
            self.disk.close(ledger.retired_fds.pop())

    @contextlib.contextmanager
    def locked(self, ledger: _Ledger) -> Iterator[None]:
        """Hold the upload's lock, between threads and processes, and know its state."""
        with ledger.mutex:
            self.disk.lock(ledger.fd)
            try:
                self.refresh(ledger)
                yield
            finally:
                self.disk.unlock(ledger.fd)

    def refresh(self, ledger: _Ledger) -> None:
        """Read what other processes have written; to be called under the lock."""
        status = self.disk.stat(ledger.fd)
        if status.st_nlink == 0 or status.st_size < ledger.offset:
            ledger.is_dead = True
        elif ledger.head != self.disk.read(ledger.fd, len(ledger.head), 0):
            ledger.is_dead = True
        elif status.st_size > ledger.offset:
            size = status.st_size - ledger.offset
            ledger.read_lines(self.disk.read(ledger.fd, size, ledger.offset))
            ledger.is_torn = status.st_size > ledger.offset
            self._know_head(ledger)

    @contextlib.contextmanager
    def entered(
        self, upload: Upload, opener: Optional[str] = None
    ) -> Iterator[Optional[_Ledger]]:
        """Yield the upload's ledger, locked; opened by `opener` when there is none."""
        while True:
            ledger = self.acquire(upload.key, opener is not None)
            if ledger is None:
                yield None
                return
            try:
                with self.locked(ledger):
                    if not ledger.is_dead:
                        if opener is not None and not ledger.generation:
                            self._open_upload(ledger, upload, opener)
                        yield ledger if ledger.generation else None
                        return
            finally:
                self.release(ledger)

    # Ledgers: written

    def append(self, ledger: _Ledger, lines: bytes) -> None:
        """Write lines and take them as read; a half-written line is cut off later."""
        if ledger.is_torn:
            self.disk.truncate(ledger.fd, ledger.offset)
        ledger.is_torn = True
        self.disk.write(ledger.fd, lines, ledger.offset)
        ledger.is_torn = False
        ledger.read_lines(lines)
        self._know_head(ledger)

    def _know_head(self, ledger: _Ledger) -> None:
        """Where a dropped ledger can't be unlinked, know it by how it begins."""
        if not self.disk.unlinks_open and len(ledger.head) < 64:
            ledger.head = self.disk.read(ledger.fd, min(64, ledger.offset), 0)

    def flush_ledger(self, ledger: _Ledger) -> None:
        """Return when the lines so far are on the disk; threads share a flush."""
        wanted = ledger.offset
        with ledger.flushing:
            if ledger.flushed >= wanted:
                return
            reached = ledger.offset
            if ledger.is_suspect:  # lines may have been given up: write them again
                self.disk.write(ledger.fd, self.disk.read(ledger.fd, reached, 0), 0)
            ledger.is_suspect = True
            self.disk.flush(ledger.fd)
            if not ledger.is_named:
                self.publisher.flush_folder(self.state_dir)
                ledger.is_named = True
            ledger.flushed, ledger.is_suspect = reached, False

    def _open_upload(
        self,
        ledger: _Ledger,
        upload: Upload,
        sender: str,
        ranges: Sequence[Tuple[int, int]] = (),
        generation: str = "",
        refused: Iterable[str] = (),
        forgotten: Iterable[str] = (),
    ) -> None:
        values = {
            "version": 1,
            "generation": generation or secrets.token_hex(8),
            "upload": upload,
            "sender": sender,
            "boot": "" if self.disk.sync else self.disk.boot_id(),
            "time": self.clock(),
            "ranges": ranges,
            "refused": sorted(refused),
            "forgotten": sorted(forgotten),
        }
        self.append(ledger, _ledger_line("upload", values))
        self._count_change(1)

    def _count_change(self, change: int) -> None:
        with self._mutex:
            self.open_uploads = max(0, self.open_uploads + change)

    def begin_afresh(
        self,
        ledger: _Ledger,
        upload: Upload,
        sender: str,
        ranges: Sequence[Tuple[int, int]],
    ) -> None:
        """Open a new upload in a finished one's ledger, with `ranges` of its file."""
        generation = secrets.token_hex(8)
        if ranges:
            published = self.data(ledger)
            path = self._path(f"{ledger.key}-{generation}.data")
            fd = self.disk.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            try:
                for start, end in ranges:
                    self._copy(published, fd, start, end)
                self.disk.flush(fd)
                self.publisher.flush_folder(self.state_dir)
                if not self.is_intact(ledger):  # edited meanwhile
                    raise _unsure()
            except (OSError, FlowError):
                self._discard(path)
                raise
            finally:
                self.disk.close(fd)
        # Whoever sent the finished file may still be at it: that is another version.
        others = set(ledger.notes)
        if not self._is_quiet(ledger):
            others |= {*ledger.refused, *ledger.sent}
        self._open_upload(ledger, upload, sender, ranges, generation, others - {sender})

    def _copy(self, source: int, target: int, start: int, end: int) -> None:
        for low in range(start, end, BLOCK_SIZE):
            block = self.disk.read(source, min(BLOCK_SIZE, end - low), low)
            self.disk.write(target, block, low)

    # The data file

    def data(self, ledger: _Ledger) -> int:
        """Return a descriptor of the upload's bytes; never makes the file."""
        if ledger.data_fd is None:
            if ledger.finished and ledger.published_fd is not None:
                return ledger.published_fd
            if ledger.finished:
                path = self.publisher.path(ledger.finished.path)
                try:
                    ledger.data_fd = self.disk.open(path, os.O_RDONLY)
                except FileNotFoundError as error:
                    sentence = "The finished file is gone; send this chunk once more."
                    raise Trouble(sentence) from error
            else:
                ledger.data_fd = self.disk.open(self.data_path(ledger), os.O_RDWR)
        return ledger.data_fd

    def make_home(self, ledger: _Ledger) -> bool:
        """Be the one process that writes this upload in place, if no other is."""
        if not ledger.is_home:
            ledger.is_home = self.disk.try_lock(self.data(ledger))
        return ledger.is_home

    def leave_home(self, ledger: _Ledger) -> None:
        """Let another process write in place when nobody here does."""
        if ledger.is_home and not ledger.attempts and ledger.data_fd is not None:
            self.disk.unlock(ledger.data_fd)
            ledger.is_home = False

    def flush_data(self, ledger: _Ledger) -> None:
        """Return when the bytes so far are on the disk; threads share a flush."""
        wanted = ledger.writes
        with ledger.flushing:
            if ledger.flushed_writes >= wanted:
                return
            reached, fd = ledger.writes, ledger.data_fd
            if fd is None or ledger.finished:  # by others, who have flushed it
                return
            try:
                self.disk.flush(fd)
            except OSError:
                # A failed flush is told once: nobody may trust what it covered.
                ledger.failed_flushes += 1
                raise
            ledger.flushed_writes = reached

    def require_flushed(self, ledger: _Ledger, failed_before: int) -> None:
        """Raise Trouble when a flush failed that may have covered somebody's bytes."""
        if ledger.failed_flushes != failed_before:
            raise Trouble("The disk could not store the chunk; please try again.")

    def merge(self, ledger: _Ledger, part: int, start: int, end: int) -> None:
        """Copy [start, end), which is not recorded, from a part into the data file."""
        data, is_same = self.data(ledger), True
        for low in range(start, end, BLOCK_SIZE):
            mine = self.disk.read(part, min(BLOCK_SIZE, end - low), low)
            theirs = self.disk.read(data, len(mine), low) if is_same else mine
            if mine != theirs:
                is_same = False
                # Whoever has written there, in whatever process, must not record it.
                first = low + _first_difference(mine, theirs)
                self.append(ledger, _ledger_line("merge", first, end))
            # Also what is the same: a flush of it may have failed.
            self.disk.write(data, mine, low)
        ledger.writes += 1

    def adopt(self, ledger: _Ledger, part: str) -> bool:
        """Make a private file the data file, if there is none yet."""
        path = self.data_path(ledger)
        if ledger.ranges.total or ledger.finished or self.disk.stat_path(path):
            return False
        self.disk.rename(part, path)
        # Before a line says that its bytes are there.
        self.publisher.flush_folder(self.state_dir)
        ledger.is_named = True
        return True

    # Two versions under one identifier

    def require_sure_notes(
        self, ledger: _Ledger, body: Receiving, is_sure: bool = True
    ) -> None:
        """Raise Conflict when what came again may be of an earlier sending.

        Then a new upload must not begin with it, nor may it be missing there: the
        client begins once more, with nothing noted.
        """
        now = self.clock()
        mine = ledger.notes.get(body.sender, [])
        if mine and mine[-1].time < now - _NOTE_SECONDS:
            is_sure = False
        # A sending begins with the first chunk, or nearly: what came long before that
        # was one chunk again, whose answer had been lost.
        began = min((note.time for note in mine if note.start == 0), default=now)
        if any(note.time < began - _OUT_OF_ORDER_SECONDS for note in mine):
            is_sure = False
        if mine and not (is_sure and not any(note.is_retry for note in mine)):
            self.append(ledger, _ledger_line("afresh", body.sender))
            raise _unsure()

    def refuse_difference(
        self, ledger: _Ledger, body: Receiving, is_late: bool
    ) -> None:
        """Raise Conflict: other bytes are recorded in the body's range.

        What this sender alone had sent is forgotten, so that the next try starts
        afresh, unless it came while this body was under way (`is_late`).  Beside bytes
        of others nothing more of this sender is taken, and what both have stored is
        finished only when somebody has sent all of it.
        """
        others = set(ledger.sent) - {body.sender}
        if not others and not ledger.finished and not is_late:
            self.drop(ledger)
        elif others and ledger.finished:
            self.append(ledger, _ledger_line("refused", body.sender))
        elif others and ledger.is_contested and self._is_quiet(ledger):
            self._forget_all(ledger, body.sender)
        elif others:
            self.note_refused(ledger, body.sender)
        raise _different()

    def note_refused(self, ledger: _Ledger, sender: str) -> None:
        """Write down that a sender has another version."""
        if sender not in ledger.refused:
            self.append(ledger, _ledger_line("refused", sender))

    def _forget_all(self, ledger: _Ledger, sender: str) -> None:
        """Drop an upload for one of its senders.

        Chunks of the others must not become part of what comes next: they have to begin
        once more.
        """
        others = {*ledger.sent, *ledger.forgotten} - {sender}
        if not others:
            self.drop(ledger)
            return
        data = self.data_path(ledger)
        self._open_upload(ledger, ledger.upload, sender, forgotten=others)
        self._discard(data)
        self._count_change(-1)

    def require_welcome(self, ledger: _Ledger, body: Receiving) -> None:
        """Raise Conflict when the sender has another version of an unfinished file."""
        if body.sender in ledger.forgotten and body.start > 0 and not body.is_whole:
            raise _cancelled()
        if body.sender in ledger.refused and not body.is_whole and not ledger.finished:
            self.refuse_difference(ledger, body, is_late=True)
        if body.generation not in ("", ledger.generation):
            if body.sender != ledger.opener and not body.is_whole:
                raise _cancelled()  # it began before somebody sent a new version

    def _is_quiet(self, ledger: _Ledger) -> bool:
        """Whether nobody has stored anything for so long that all have given up."""
        return self.clock() - self.disk.stat(ledger.fd).st_mtime > _QUIET_SECONDS

    def note_cut(self, body: Receiving) -> None:
        """Write down that a body broke off, once for each range and sender.

        Only its bytes might have shown that its sender has another version.
        """
        if body.is_whole:
            return
        try:
            with self.entered(body.upload) as ledger:
                if ledger is None or ledger.finished or body.sender in ledger.refused:
                    return
                if ledger.cuts.get(body.sender, Ranges()).gaps(body.start, body.end):
                    line = _ledger_line("cut", body.start, body.end, body.sender)
                    self.append(ledger, line)
        except OSError as error:  # the body's own trouble is what the client is told
            name = body.upload.path
            self.warnings.append(f"{name}: can't note what broke off: {error}")

    def join(self, body: Receiving) -> None:
        """Count a body as under way, and let other processes know."""
        key = body.upload.key
        with self._mutex:
            self._notice_fork()
            if not body.is_whole and self.disk.shares_locks:
                if key not in self._busy_fds:
                    self._busy_fds[key] = self._share_busy(key)
            self._bodies.setdefault(key, []).append(body)

    def _share_busy(self, key: str) -> int:
        """Lock <key>.busy together with all who have bodies of an upload under way."""
        path = self._path(key + ".busy")
        while True:
            fd = self.disk.open(path, os.O_RDWR | os.O_CREAT)
            with contextlib.ExitStack() as undo:
                undo.callback(self.disk.close, fd)
                self.disk.share_lock(fd)
                if self.disk.stat(fd).st_nlink:  # not removed before it was ours
                    undo.pop_all()
                    return fd

    def _unlink_busy(self, key: str) -> None:
        """Remove <key>.busy unless a process has bodies of the upload under way.

        Not after every chunk: ext4 looks for a free inode past all those that were
        removed in the last five seconds, up to a millisecond for each chunk.
        """
        with contextlib.suppress(OSError):  # not there, or the sweep tries again
            fd = self.disk.open(self._path(key + ".busy"), os.O_RDWR)
            try:
                if self.disk.try_lock(fd) and self.disk.stat(fd).st_nlink:
                    self.disk.unlink(self._path(key + ".busy"))  # this one, no newer
            finally:
                self.disk.close(fd)

    def _is_busy_elsewhere(self, key: str) -> bool:
        """Whether another process has bodies of an upload under way."""
        own = self._busy_fds.get(key)
        if own is not None:
            is_alone = self.disk.try_lock(own)
            self.disk.share_lock(own)
            if not self.disk.stat(own).st_nlink:  # unlinked while it was nobody's
                self._busy_fds[key] = self._share_busy(key)
                self.disk.close(own)
            return not is_alone
        try:
            fd = self.disk.open(self._path(key + ".busy"), os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            return not self.disk.try_lock(fd)
        finally:
            self.disk.unlock(fd)
            self.disk.close(fd)

    def leave(self, body: Receiving) -> None:
        """Count a body as ended; the last one finishes what had to wait for it."""
        key = body.upload.key
        with self._mutex:
            bodies = self._bodies.get(key, [])
            if body in bodies:
                bodies.remove(body)
            if bodies:
                return
            self._bodies.pop(key, None)
            fields = self._deferred.pop(key, None)
            fd = self._busy_fds.pop(key, None)
            ledger = self._ledgers.get(key)
            is_open = ledger is None or not (ledger.finished or ledger.is_dead)
            is_mixed = len(ledger.sent) > 1 if ledger else fd is not None
        if fd is not None:
            self.disk.unlock(fd)
            self.disk.close(fd)
            if not is_open:
                self._unlink_busy(key)
        if fields is not None or (is_mixed and is_open):
            self._finish_deferred(body.upload, fields or {})

    def _finish_deferred(self, upload: Upload, fields: Mapping[str, str]) -> None:
        try:
            with self.entered(upload) as ledger:
                if ledger is None or ledger.finished or not ledger.is_complete:
                    return
                progress = self.settle(ledger, None, fields)
                self.keep(ledger)
            try:
                self.conclude(ledger, progress)
            finally:
                self.release(ledger)
        except (FlowError, OSError) as error:  # the next chunk, or the sweep, tries
            self.warnings.append(f"{upload.path} can't be finished yet: {error}")

    def _may_finish(
        self, ledger: _Ledger, body: Optional[Receiving], fields: Mapping[str, str]
    ) -> bool:
        """Whether a complete upload is one version, as far as can be known.

        Two people may send different files under one identifier.  As clients begin
        their chunks in order, whoever has a difference to tell is still at it when the
        last byte comes: then the end waits for all bodies under way, in all processes.
        """
        if ledger.is_one_version:
            return True
        if ledger.is_contested or not self._is_beyond_doubt(ledger):
            return False
        with self._mutex:
            bodies = self._bodies.get(ledger.key, ())
            is_alone = all(one is body for one in bodies)
            is_alone = is_alone and not self._is_busy_elsewhere(ledger.key)
            if bodies and not is_alone:
                self._deferred.setdefault(ledger.key, fields)
        return is_alone

    def _is_beyond_doubt(self, ledger: _Ledger) -> bool:
        """Whether what broke off does not speak against one version.

        Somebody whose network changed in the middle of a chunk goes on from another
        address, and from the old one nothing more comes.
        """
        doubtful = ledger.doubtful
        if not doubtful:
            return True
        is_handed_over = len(doubtful) == 1 and not doubtful & ledger.went_on
        return is_handed_over and self._is_quiet(ledger)

    # The end

    def settle(
        self, ledger: _Ledger, body: Optional[Receiving], fields: Mapping[str, str]
    ) -> Progress:
        """Say how far the upload is; finish it when nothing is missing."""
        is_open = ledger.is_complete and not ledger.finished
        is_new = is_open and self._may_finish(ledger, body, fields)
        if is_new:
            self._finish(ledger, body, fields)
        done = self._done(ledger) if ledger.finished else None
        is_new = is_new or bool(done and self.announce and not ledger.is_announced)
        sizes = (ledger.ranges.total, ledger.upload.size)
        return Progress(*sizes, done, is_new, ledger.began)

    def conclude(self, ledger: _Ledger, progress: Progress) -> Progress:
        """Make a commit durable and announce the end; to be called without the lock."""
        self.flush_ledger(ledger)
        if progress.is_new and self.announce:
            return progress._replace(is_new=self._announce_end(ledger))
        if progress.done is None and ledger.finished:
            # The end came while this waited; flow.js hands the answer that it gets last
            # to the page, so the later one should know, too.
            with self.locked(ledger):
                if ledger.finished and not ledger.is_dead:
                    self.flush_ledger(ledger)
                    progress = progress._replace(done=self._done(ledger))
        return progress

    def _announce_end(self, ledger: _Ledger) -> bool:
        """Call on_complete outside of all locks, if nobody has or is about to."""
        assert self.announce is not None
        with self.locked(ledger):
            finished, generation = ledger.finished, ledger.generation
            if finished is None or ledger.is_announced or ledger.is_dead:
                return False
            is_other = finished.token != self.process.token()
            if is_other and self.process.is_alive(finished.token):
                return False
            with self._mutex:
                if generation in self._announcing:
                    return False
                self._announcing.add(generation)
            done = self._done(ledger)
        self.announce(done)
        with contextlib.suppress(OSError), self.locked(ledger):
            if not ledger.is_dead and ledger.generation == generation:
                self.append(ledger, _ledger_line("announced"))
            with self._mutex:
                self._announcing.remove(generation)
        return True

    def _done(self, ledger: _Ledger) -> Done:
        finished, upload = ledger.finished, ledger.upload
        assert finished is not None
        return Done(
            id=f"{ledger.key}-{ledger.generation}",
            path=self.publisher.path(finished.path),
            relative_path=finished.path,
            filename=finished.path.rpartition("/")[2],
            size=upload.size,
            owner=upload.owner,
            identifier=upload.identifier,
            fields=finished.fields,
        )

    def _finish(
        self, ledger: _Ledger, body: Optional[Receiving], fields: Mapping[str, str]
    ) -> None:
        """Publish a complete upload and turn its ledger into the receipt.

        The lines are on the disk before the name is, so that after a power cut nobody
        takes the published file for an unfinished one and writes into it.
        """
        given = dict(fields) if self.announce else {}
        path = self._published(ledger) or self._publish_or_drop(ledger, given)
        kept = [fields for name, _, fields in ledger.intents if name == path]
        status = self.publisher.stat(path)
        finished = _Finished(
            path=path,
            size=ledger.upload.size,
            inode=status.st_ino if status else 0,
            modified=status.st_mtime_ns if status else 0,
            token=self.process.token() if self.announce else "",
            last=(body.start, body.end, body.sender) if body else (0, 0, ""),
            fields=kept[-1] if kept else given,
        )
        data = self.data_path(ledger)
        self.append(ledger, _ledger_line("finished", finished._asdict()))
        self.flush_ledger(ledger)
        self._discard(data)
        self._unlink_busy(ledger.key)
        self._count_change(-1)

    def finish_published(self, ledger: _Ledger) -> None:
        """Finish what a crash left under its name already."""
        if ledger.is_complete and not ledger.finished and self._published(ledger):
            self._finish(ledger, None, {})

    def _published(self, ledger: _Ledger) -> str:
        """Return the name that a crash left the data file under, or ""."""
        size = ledger.upload.size
        for path, inode, _ in reversed(ledger.intents):
            status = self.publisher.stat(path)
            if status and (status.st_ino, status.st_size) == (inode, size):
                with self.publisher.folder_of(path) as folder:
                    self.disk.flush_folder(folder)
                return path
        return ""

    def _publish_or_drop(self, ledger: _Ledger, fields: Dict[str, str]) -> str:
        """Publish; drop the upload when it can never be published."""
        if self.disk.stat(self.data(ledger)).st_size != ledger.upload.size:
            self.drop(ledger)  # a power cut without sync: the ledger outlived the data
            raise Trouble("Stored bytes of this file were lost; please send it again.")
        try:
            return self._publish(ledger, fields)
        except Conflict:
            self.drop(ledger)
            raise

    def _publish(self, ledger: _Ledger, fields: Dict[str, str]) -> str:
        """Give the data file its name; return the path below upload_dir."""
        parent, slash, name = ledger.upload.path.rpartition("/")
        inode = self.disk.stat(self.data(ledger)).st_ino

        def give(candidate: str) -> None:
            path = parent + slash + candidate
            self.append(ledger, _ledger_line("publish", path, inode, fields))
            self.flush_ledger(ledger)
            if not self.disk.unlinks_open:  # nor renames
                self._close_data(ledger)
            self.publisher.give(self.data_path(ledger), folder, candidate)

        with self.publisher.folder_of(ledger.upload.path) as folder:
            found = self.publisher.choose(folder, name, lambda: self.data(ledger), give)
        return parent + slash + found

    def is_intact(self, ledger: _Ledger) -> bool:
        """Return whether it is finished, and its file still there as published."""
        finished = ledger.finished
        status = self.publisher.stat(finished.path) if finished else None
        if status is None or finished is None:
            return False
        now = (status.st_size, status.st_ino, status.st_mtime_ns)
        return now == (finished.size, finished.inode, finished.modified)

    # Cleaning

    def drop(self, ledger: _Ledger) -> None:
        """Forget an upload; to be called under the lock.  Needs no free space.

        The ledger goes first: without its name it is dead for whoever has it open.
        """
        data, path = self.data_path(ledger), self._path(ledger.key + ".ledger")
        if ledger.generation and not ledger.finished:
            self._count_change(-1)
        if self.disk.unlinks_open:
            self.disk.unlink(path)
        else:
            self._close_data(ledger)
            self.disk.truncate(ledger.fd, 0)
        ledger.is_dead = True
        self._discard(data)
        self._unlink_busy(ledger.key)

    def _discard(self, path: str) -> None:
        """Remove a file that nobody needs; what can't be removed now is swept later."""
        with contextlib.suppress(OSError):
            self.disk.unlink(path)

    def _sweep_upload(
        self, key: str, datas: Sequence[str], stale_after: float, keep_receipts: float
    ) -> bool:
        """Bring one upload in order; return whether it goes on."""
        ledger = self.acquire(key, False)
        if ledger is None:
            self._discard_all(datas)
            return False
        try:
            with self.locked(ledger):
                if not ledger.is_dead:
                    current = os.path.basename(self.data_path(ledger))
                    self._discard_all([name for name in datas if name != current])
                    self._sweep_ledger(ledger, stale_after, keep_receipts)
                is_over = ledger.is_dead or ledger.finished
                goes_on = bool(ledger.generation and not is_over)
            if self.announce and ledger.finished and not ledger.is_announced:
                self._announce_end(ledger)
            return goes_on
        finally:
            self.release(ledger)
            if not self.disk.unlinks_open:
                self._unlink_empty(key)

    def _unlink_empty(self, key: str) -> None:
        """Remove a dropped ledger that could not be removed while it was open."""
        path = self._path(key + ".ledger")
        with self._mutex:
            status = self.disk.stat_path(path)
            if status and not status.st_size and key not in self._ledgers:
                self._discard(path)

    def _sweep_ledger(
        self, ledger: _Ledger, stale_after: float, keep_receipts: float
    ) -> None:
        """Do what a ledger needs."""
        status = self.disk.stat(ledger.fd)
        age = self.clock() - status.st_mtime
        if ledger.finished:
            self._discard(self.data_path(ledger))
            # A file that is sent again every night would lengthen its ledger for ever.
            if status.st_size - ledger.own_size > _LONG_RECEIPT_SIZE:
                if not ledger.is_sent_again(self.clock() - keep_receipts):
                    keep_receipts = min(keep_receipts, _LONG_RECEIPT_SECONDS)
            if age > keep_receipts and ledger.users == 1:
                if ledger.is_announced or not self.announce:
                    self.drop(ledger)
        elif not ledger.generation:
            if self.disk.unlinks_open:
                self.drop(ledger)
        elif self._has_lost_data(ledger) and not self._published(ledger):
            self.drop(ledger)
        elif self._is_stale(ledger, age, stale_after):
            self.drop(ledger)
        elif ledger.is_complete and (ledger.is_one_version or age > _QUIET_SECONDS):
            if self._may_finish(ledger, None, {}):
                self._finish(ledger, None, {})

    def _has_lost_data(self, ledger: _Ledger) -> bool:
        """Whether recorded bytes may be missing: the power was cut with sync off."""
        if ledger.boot and ledger.boot != self.disk.boot_id():
            return True
        status = self.disk.stat_path(self.data_path(ledger))
        if status is None:  # cancelled by one sender: the others must be told
            return bool(ledger.ranges.total) or not ledger.forgotten
        return ledger.ranges.end > status.st_size

    def _is_stale(self, ledger: _Ledger, age: float, stale_after: float) -> bool:
        if age <= stale_after or ledger.users > 1:
            return False
        with self._mutex:
            if self._is_busy_elsewhere(ledger.key):
                return False
        status = self.disk.stat_path(self.data_path(ledger))
        if status is None:
            return True
        # Whoever writes in place holds the lock, in whatever process.
        is_free = self.make_home(ledger)
        self.leave_home(ledger)
        return is_free and self.clock() - status.st_mtime > stale_after

    def _discard_all(self, names: Iterable[str]) -> None:
        for name in names:
            self._discard(self._path(name))


_NO_LINKS = (
    errno.EPERM,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    getattr(errno, "ENOTSUP", errno.EOPNOTSUPP),
    errno.EMLINK,
)


def _followed(path: str) -> str:
    """Return the absolute path; what is a link itself is where it leads to."""
    path = os.path.abspath(path)  # without the "/" after a link, which would hide it
    return os.path.realpath(path) if os.path.islink(path) else path


def _sender_hash(sender: str) -> str:
    """Return what stands in ledgers for a sender: addresses are not kept."""
    return hashlib.sha256(sender.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _first_difference(mine: bytes, theirs: bytes) -> int:
    """Return how many bytes two blocks have in common from the beginning."""
    low, high = 0, min(len(mine), len(theirs))
    while low < high:
        middle = (low + high + 1) // 2
        if mine[:middle] == theirs[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _no_folder(word: str) -> Conflict:
    return Conflict(f"{printable(word)} is not a folder on the server.")


def _taken(name: str) -> Conflict:
    return Conflict(f"There is a file {printable(name)} already.")


def _cancelled() -> Conflict:
    return Conflict("This upload was cancelled while the chunk was under way.")


def _different() -> Conflict:
    return Conflict(
        "Other bytes are stored under this identifier: two versions of a file, or two"
        " files, would be mixed."
    )


class Receiving:
    """One body on its way into the store; write() in order, commit() once, close()."""

    def __init__(
        self, store: Store, upload: Upload, start: int, end: int, sender: str
    ) -> None:
        self.store = store
        self.upload = upload
        self.start = start
        self.end = end
        self.sender = sender
        self.generation = ""  # that it began with
        self.offset = 0  # of the ledger's lines that there were then
        self._is_committed = False
        with contextlib.ExitStack() as undo:
            store.join(self)
            undo.callback(store.leave, self)
            self._way = self._remembered_way() or self._find_way()
            undo.pop_all()
        if self._way.ledger_or_none:
            self.generation = self._way.generation
            self.offset = self._way.ledger.offset

    def __enter__(self) -> Receiving:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the file."""
        return self.end - self.start == self.upload.size

    def _remembered_way(self) -> Optional[_Way]:
        """Choose what suits most chunks; the first block shows whether it does."""
        ledger = self.store.recall(self.upload.key)
        if ledger is None:
            return None
        try:
            return _InPlace(self, ledger)
        finally:
            self.store.release(ledger)

    def _find_way(self) -> _Way:
        """Choose how the bytes get where they belong."""
        with self.store.entered(self.upload) as ledger:
            if ledger is not None:
                self.store.finish_published(ledger)
                if self.store.is_intact(ledger):
                    return _Repeated(self, ledger)
                if ledger.ranges.total and not ledger.finished:
                    way = _InPlace(self, ledger)
                    try:
                        return way if way.claim() else _Aside(self, ledger)
                    finally:
                        if not way.has_claimed:
                            self.store.release(ledger)
        self.store.publisher.refuse_early(self.upload, self.is_whole)
        return _Aside(self, None)

    def write(self, block: Union[bytes, memoryview]) -> None:
        """Take the next bytes.

        Raises Conflict when other bytes are recorded there, Trouble, or Malformed when
        there are more than [start, end).
        """
        view = memoryview(block)
        if self._way.position + len(view) > self.end:
            raise Malformed(
                f"The chunk has more bytes than the {self.end - self.start} that its"
                " parameters say."
            )
        with _explained():
            if not self._way.write(view):
                self._change_way()
                self.write(view)

    def _change_way(self) -> None:
        """Find another way, and take it with the bytes that came so far."""
        old = self._way
        try:
            self._way = old.successor() or self._find_way()
            for low in range(self.start, old.position, BLOCK_SIZE):
                self.write(old.taken(low, min(BLOCK_SIZE, old.position - low)))
        finally:
            if self._way is not old:
                old.close()

    def commit(self, fields: Optional[Mapping[str, str]] = None) -> Progress:
        """Record the bytes; raises Truncated, Conflict or Trouble, having done nothing.

        When it returns, they survive a power cut (with sync).
        """
        if self._way.position != self.end:
            raise Truncated(
                f"The chunk has {self._way.position - self.start} bytes, but its"
                f" parameters say {self.end - self.start}."
            )
        with _explained():
            progress = self._way.commit(fields or {})
            if progress is None:
                self._change_way()
                return self.commit(fields)
            self._is_committed = True
            return progress

    def close(self) -> None:
        """Let go; without a commit() nothing of it is left."""
        try:
            self._way.close()
            if not self._is_committed:
                self.store.note_cut(self)
        finally:
            self.store.leave(self)


class _Way:
    """How the bytes of one body get where they belong."""

    fd = -1  # of a file of its own, while it is open

    def __init__(self, body: Receiving, ledger: Optional[_Ledger]) -> None:
        self.body = body
        self.store = body.store
        self.disk = body.store.disk
        self.ledger_or_none = ledger
        self.position = body.start
        self.generation = ledger.generation if ledger else ""
        if ledger:
            self.store.keep(ledger)

    @property
    def ledger(self) -> _Ledger:
        """The ledger of the upload that this body began with."""
        assert self.ledger_or_none is not None
        return self.ledger_or_none

    def write(self, block: memoryview) -> bool:
        """Take a block; False when another way must be found for it."""
        raise NotImplementedError

    def commit(self, fields: Mapping[str, str]) -> Optional[Progress]:
        """Record the bytes; None when another way must be found for them."""
        raise NotImplementedError

    def successor(self) -> Optional[_Way]:
        """Return the way that must be taken then; None when it is to be found."""
        return None

    def taken(self, position: int, size: int) -> bytes:
        """Return bytes that were taken so far."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go."""
        self.close_file()
        if self.ledger_or_none is not None:
            self.store.release(self.ledger_or_none)
            self.ledger_or_none = None

    def close_file(self) -> None:
        """Close the file of its own, if it is open."""
        if self.fd >= 0:
            self.disk.close(self.fd)
            self.fd = -1

    def is_current(self) -> bool:
        """Whether the upload is still the one that this body began with."""
        return not self.ledger.is_dead and self.ledger.generation == self.generation

    def require_current(self) -> None:
        """Raise Conflict when that upload was dropped meanwhile."""
        if not self.is_current():
            raise _cancelled()

    def record(self, ledger: _Ledger, gaps: Sequence[Tuple[int, int]]) -> None:
        """Write down what this sender has sent: what was there already, and `gaps`."""
        body, news = self.body, []
        if not ledger.finished:
            sent = ledger.sent.get(body.sender) or Ranges()
            for low, high in ledger.ranges.within(body.start, body.end):
                news += [("sent", *gap) for gap in sent.gaps(low, high)]
        news += [("range", *gap) for gap in gaps]
        if news:
            lines = (_ledger_line(*line, body.sender) for line in news)
            self.store.append(ledger, b"".join(lines))


class _InPlace(_Way):
    """Straight into the data file: what is missing is written, the rest compared.

    The lock is taken with the first block: then somebody else may be writing there.
    """

    def __init__(self, body: Receiving, ledger: _Ledger) -> None:
        super().__init__(body, ledger)
        self.claims: List[Tuple[int, int]] = []
        self.failed_flushes = 0
        self.has_claimed = False
        self.is_overtaken = False  # somebody else wrote where we had written
        self.is_different = False  # and other bytes, once: those that are stored now

    def claim(self) -> bool:
        """Claim what is missing of the range; False when somebody else writes there."""
        ledger, body = self.ledger, self.body
        gaps = ledger.ranges.gaps(body.start, body.end)
        rivals = [o for o in ledger.attempts if o.generation == ledger.generation]
        taken = [claim for rival in rivals for claim in rival.claims]
        if any(a < d and c < b for a, b in gaps for c, d in taken):
            return False
        if gaps:
            self.store.require_welcome(ledger, body)
            if not self.store.make_home(ledger):
                return False
            ledger.attempts.append(self)
        self.claims, self.failed_flushes = gaps, ledger.failed_flushes
        self.has_claimed = True
        return True

    def overtaken(self, start: int, end: int) -> None:
        """Others write [start, end), which is not recorded; at `start` other bytes."""
        end = min(end, self.position)
        if any(max(low, start) < min(high, end) for low, high in self.claims):
            is_ours = any(low <= start < high for low, high in self.claims)
            self.is_different = is_ours and not self.is_overtaken
            self.is_overtaken = True

    def is_other_version(self) -> bool:
        """Whether bytes that were written here differ from what others have stored."""
        ledger, body = self.ledger, self.body
        mine = ledger.sent.get(body.sender) or Ranges()
        is_stored = not ledger.ranges.gaps(body.start, body.end)
        return self.is_different and is_stored and bool(mine.gaps(body.start, body.end))

    def write(self, block: memoryview) -> bool:
        start, end = self.position, self.position + len(block)
        gaps: List[Tuple[int, int]] = []
        if self.claims or not self.has_claimed:
            with self.store.locked(self.ledger):
                self.require_current()
                if not self.has_claimed and not self.claim():
                    return False
                gaps = self.ledger.ranges.gaps(start, end)
                for low, high in gaps:
                    data = self.store.data(self.ledger)
                    self.disk.write(data, block[low - start : high - start], low)
                    self.ledger.writes += 1
                self.position = end
        recorded = start
        for low, high in gaps + [(end, end)]:
            self._compare(block[recorded - start : low - start], recorded)
            recorded = high
        self.position = end
        return True

    def _compare(self, block: memoryview, offset: int) -> None:
        """Hold bytes against recorded ones; raises Conflict when they differ."""
        if not block:
            return
        end = offset + len(block)
        with self.ledger.mutex:
            self.require_current()
            with contextlib.suppress(FileNotFoundError):  # others ended the upload
                if self._is_equal(block, offset):
                    return
        with self.store.locked(self.ledger):
            self.require_current()
            self.store.finish_published(self.ledger)
            if self._is_equal(block, offset):
                return
            is_late = any(a < end and offset < b for a, b in self.claims)
            self.store.refuse_difference(self.ledger, self.body, is_late)

    def _is_equal(self, block: memoryview, offset: int) -> bool:
        data = self.store.data(self.ledger)
        return self.disk.read(data, len(block), offset) == block

    def commit(self, fields: Mapping[str, str]) -> Optional[Progress]:
        ledger, body = self.ledger, self.body
        if not self.has_claimed:  # not a byte came
            return None
        if self.claims:
            self.store.flush_data(ledger)
        with self.store.locked(ledger):
            self.require_current()
            self.store.require_flushed(ledger, self.failed_flushes)
            gaps = ledger.ranges.gaps(body.start, body.end)
            if gaps:
                self.store.require_welcome(ledger, body)
            if self.is_overtaken and self.is_other_version():
                self.store.refuse_difference(ledger, body, is_late=True)
            if self.is_overtaken:  # sent again, it is compared
                raise _undone()
            self.record(ledger, gaps)
            self._drop_claims()
            progress = self.store.settle(ledger, body, fields)
        return self.store.conclude(ledger, progress)

    def _drop_claims(self) -> None:
        self.claims = []
        if self in self.ledger.attempts:
            self.ledger.attempts.remove(self)

    def close(self) -> None:
        """Let go; what was written and not recorded is cut off where it can be."""
        if self.ledger_or_none is not None:
            if self.claims:
                with contextlib.suppress(OSError), self.store.locked(self.ledger):
                    self._drop_claims()
                    if self.is_current() and not self.ledger.is_complete:
                        self._cut_off()
                    if self.is_current() and self.is_other_version():
                        self.store.note_refused(self.ledger, self.body.sender)
            with self.ledger.mutex:
                self._drop_claims()
                self.store.leave_home(self.ledger)
        super().close()

    def _cut_off(self) -> None:
        ledger = self.ledger
        claims = [claim for other in ledger.attempts for claim in other.claims]
        used = max([ledger.ranges.end] + [end for _, end in claims])
        data = self.store.data(ledger)
        if ledger.is_home and self.disk.stat(data).st_size > used:
            self.disk.truncate(data, used)


class _Aside(_Way):
    """Into a private file first, at the offset that the bytes will have in the end.

    So come the first chunk of an upload (a whole file, or what becomes the data file)
    and a second attempt at a range that is being written.
    """

    def __init__(
        self, body: Receiving, ledger: Optional[_Ledger], supersedes: str = ""
    ) -> None:
        self.path, self.fd = body.store.process.new_part()
        self.supersedes = supersedes  # a finished generation that has other bytes
        super().__init__(body, ledger)

    def write(self, block: memoryview) -> bool:
        self.disk.write(self.fd, block, self.position)
        self.position += len(block)
        return True

    def commit(self, fields: Mapping[str, str]) -> Optional[Progress]:
        body, store = self.body, self.store
        if self.ledger_or_none is None:
            self.disk.flush(self.fd)
            progress = self._publish_at_once() if body.is_whole else None
            if progress:
                return progress
        opener = None if self.ledger_or_none else body.sender
        with store.entered(body.upload, opener) as ledger:
            if ledger is None or self.generation not in ("", ledger.generation):
                raise _cancelled()
            store.finish_published(ledger)
            self._bring_in(ledger)
            progress = store.settle(ledger, body, fields)
            store.keep(ledger)
        try:
            return store.conclude(ledger, progress)
        finally:
            store.release(ledger)

    def _bring_in(self, ledger: _Ledger) -> None:
        """Bring the bytes into the upload; under the lock."""
        body, store = self.body, self.store
        if ledger.finished and self._is_new_version(ledger):
            if ledger.refused.get(body.sender, -1) > body.offset and not body.is_whole:
                raise _different()  # its other chunks were refused meanwhile
            if not store.is_intact(ledger):
                store.require_sure_notes(ledger, body, is_sure=False)
            store.begin_afresh(ledger, body.upload, body.sender, _noted(body, ledger))
            if self.ledger_or_none:  # so commit() has not flushed what is adopted now
                self.disk.flush(self._open())
        for low, high in ledger.ranges.within(body.start, body.end):
            if not _are_equal(self.disk, store.data(ledger), self.fd, low, high):
                store.refuse_difference(ledger, body, is_late=True)
        gaps = ledger.ranges.gaps(body.start, body.end)
        if gaps:
            store.require_welcome(ledger, body)
        self._close_for_rename()
        if not store.adopt(ledger, self.path):
            failed_flushes = ledger.failed_flushes
            for low, high in gaps:
                store.merge(ledger, self._open(), low, high)
            if gaps:
                store.flush_data(ledger)
            store.require_flushed(ledger, failed_flushes)
        self.record(ledger, gaps)

    def _is_new_version(self, ledger: _Ledger) -> bool:
        """Whether this can't be the file that was finished."""
        if self.supersedes == ledger.generation or not self.store.is_intact(ledger):
            return True
        end = self.body.upload.size
        return self.body.is_whole and not _are_equal(
            self.disk, self.store.data(ledger), self._open(), 0, end
        )

    def _publish_at_once(self) -> Optional[Progress]:
        """Finish a file that came as one chunk: a link, and no ledger.

        None when it needs a ledger: to be announced whatever happens, or to get another
        name than its own, so that the same chunk sent again finds the same name.
        """
        upload, store = self.body.upload, self.store
        if store.announce or store.knows(upload):
            return None
        name = upload.path.rpartition("/")[2]
        with store.publisher.folder_of(upload.path) as folder:
            is_new = self._name_part(folder, name)
            if is_new is None:
                return None
            self.disk.flush_folder(folder)
        generation = f"{upload.key}-{secrets.token_hex(8)}"
        path, size = store.publisher.path(upload.path), upload.size
        who = (upload.owner, upload.identifier)
        done = Done(generation, path, upload.path, name, size, *who, {})
        return Progress(size, size, done, is_new)

    def _name_part(self, folder: Folder, name: str) -> Optional[bool]:
        """Return True when the name was given, False when it had these very bytes."""
        publisher = self.store.publisher
        if publisher.policy == "replace" and self._is_there(folder, name):
            return False
        with contextlib.suppress(FileExistsError):
            self._close_for_rename()
            publisher.give(self.path, folder, name)
            return True
        if self._is_there(folder, name):
            return False
        if publisher.policy == "refuse":
            raise _taken(name)
        return None

    def _is_there(self, folder: Folder, name: str) -> bool:
        existing = self.disk.named(folder, name)
        return existing is not None and self.store.publisher.is_same(
            self._open(), folder, name, existing
        )

    def _close_for_rename(self) -> None:
        if not self.disk.unlinks_open:
            self.close_file()

    def _open(self) -> int:
        if self.fd < 0:
            self.fd = self.disk.open(self.path, os.O_RDWR)
        return self.fd

    def close(self) -> None:
        """Let go; the private file is removed."""
        self.close_file()
        self.store.process.drop_part(self.path)
        super().close()


class _Repeated(_Way):
    """Compared with the finished file: the old answer, or a new upload."""

    def __init__(self, body: Receiving, ledger: _Ledger) -> None:
        assert ledger.finished is not None
        path = body.store.publisher.path(ledger.finished.path)
        self.modified = ledger.finished.modified
        self.fd = body.store.disk.open(path, os.O_RDONLY)
        super().__init__(body, ledger)

    def write(self, block: memoryview) -> bool:
        if self.disk.read(self.fd, len(block), self.position) != block:
            return False
        self.position += len(block)
        return True

    def taken(self, position: int, size: int) -> bytes:
        block = self.disk.read(self.fd, size, position)
        if self.disk.stat(self.fd).st_mtime_ns != self.modified:  # edited meanwhile
            raise _unsure()
        return block

    def successor(self) -> Optional[_Way]:
        """Return the way of a new version's bytes, None when it was begun already."""
        with self.store.locked(self.ledger):
            if not self.is_current():
                return None
            self.store.require_sure_notes(self.ledger, self.body)
        self.store.publisher.refuse_early(self.body.upload, self.body.is_whole)
        return _Aside(self.body, None, supersedes=self.generation)

    def commit(self, fields: Mapping[str, str]) -> Optional[Progress]:
        ledger, store = self.ledger, self.store
        with store.locked(ledger):
            if not self.is_current():
                return None
            self._note(ledger)
            progress = store.settle(ledger, self.body, fields)
        return store.conclude(ledger, progress)

    def _note(self, ledger: _Ledger) -> None:
        """Write down that these bytes came again and were equal.

        Notes start afresh when they cover the file, when one comes again after two
        minutes, and after two minutes of silence: the client sends the file once more.
        """
        body, now = self.body, self.store.clock()
        mine = ledger.notes.get(body.sender, [])
        noted = ledger.noted.get(body.sender) or Ranges()
        limit = now - _NOTE_SECONDS
        is_again = bool(noted.within(body.start, body.end)) and any(
            one.start < body.end and body.start < one.end and one.time < limit
            for one in mine
        )
        is_over = bool(mine) and mine[-1].time < limit
        lines = b""
        if is_again or is_over or (mine and noted.total == ledger.upload.size):
            lines, mine = _ledger_line("afresh", body.sender), []
        assert ledger.finished is not None
        me = (body.start, body.end, body.sender)
        is_retry = not mine and body.start > 0 and ledger.finished.last == me
        note = _Note(body.start, body.end, body.sender, now, is_retry)
        self.store.append(ledger, lines + _ledger_line("note", *note))


def _noted(body: Receiving, ledger: _Ledger) -> List[Tuple[int, int]]:
    """Return what this sender sent again of the finished file, but for this body's."""
    mine = ledger.notes.get(body.sender, [])
    noted = Ranges((note.start, note.end) for note in mine if not note.is_retry)
    return noted.within(0, body.start) + noted.within(body.end, body.upload.size)


def _unsure() -> Conflict:
    return Conflict(
        "Another version of this file was sent a while ago; please send this one again"
        " from its beginning."
    )


def _undone() -> Trouble:
    return Trouble("Another attempt at this chunk failed; please send it again.")


# ---- page ----------------------------------------------------------------------------
# Law: one string, complete in itself: no other file, no other host, nothing inline that
# the policy would have to allow, and every name from outside is shown as text.


def page(settings: Mapping[str, object], nonce: str) -> str:
    """Return the upload page with its settings, for a policy with this nonce."""
    text = json.dumps(settings).replace("<", "\\u003c")
    return PAGE.replace("__NONCE__", nonce).replace("__SETTINGS__", text)


PAGE = r"""<!DOCTYPE html>
<html lang="en"><head>
<meta charset="utf-8"><title>Upload – flowserver</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9 9
' stroke='%232b7a9b' fill='none'%3E%3Cpath d='M4.5 6V1M2 3l2.5-2L7 3M1 6v2h7V6'/%3E%3C/svg%3E">
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
main, footer { max-width: 46rem; margin: 0 auto; } footer { margin-top: 2rem; text-align: center; }
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
progress::-webkit-progress-value { background: var(--bar, var(--accent)); transition: width .25s; }
progress::-moz-progress-bar { background: var(--bar, var(--accent)); }
.soft, .numbers, footer { color: var(--soft); font-size: .9rem; }
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
@media (prefers-reduced-motion: reduce) { progress::-webkit-progress-value { transition: none; } }
@media (forced-colors: active) { progress { border: 1px solid; --rail: Canvas; --bar: Highlight; } }
</style></head>
<body><main>
  <h1>Upload files</h1>
  <noscript><p>This page needs JavaScript.</p></noscript>
  <section id="drop" aria-label="Add files">
    <svg viewBox="0 0 16 16"><path d="M8 10.5V2M4.5 5.5L8 2l3.5 3.5M2 10v3.5h12V10"/></svg>
    <p>Drop files or folders anywhere</p>
    <p id="limit" class="soft"></p>
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
</main><footer id="version"></footer>
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
// A chunk is a range of bytes of a file. An index counts from 0, a number from 1.
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
$('#version').textContent = `flowserver ${settings.version}`;
</script></body></html>"""  # noqa: E501


# ---- application ---------------------------------------------------------------------
# Law: the whole product without a socket.  A Request comes in, a Response goes out, and
# whatever happens in between becomes a status that this client obeys and one sentence.

_CHUNK_METHODS = ("POST", "PUT", "PATCH")
_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
_FILE_AS_TEXT = "The file came as text: set chunkFormat to 'blob' (resumable.js)."
_MAX_FIELD_SIZE = 64 * 1024  # all text fields of a form together, in bytes
_MAX_FIELDS = 200
_MIN_DRAIN_RATE = 16 * 1024  # bytes/s of a body that is refused
_DRAIN_SIZE = 64 * 1024 * 1024  # where max_chunk_size sets no other limit
_LINGER_SECONDS = 2.0
_MULTIPART_ALLOWANCE = 256 * 1024  # what a form may have beside the chunk, in bytes
_FIGURE_SECONDS = 10  # how old free space and open uploads may be
_SWEEP_SECONDS = 300
_ALLOWED_HEADERS = (
    "content-type, x-requested-with, cache-control, accept, authorization, x-mime-type,"
    " content-range, content-disposition, upload-length, upload-offset, upload-name"
)
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
_LOOPBACK_NAME = re.compile(
    r"([a-z0-9-]+\.)*localhost|127(\.[0-9]{1,3}){3}|\[::1\]"  # in lower case
)


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
    read: Optional[Callable[[int], bytes]] = None
    client: str = ""  # the address of whoever is connected
    scheme: str = "http"
    is_loopback: bool = False  # the server can be reached from this machine only
    is_proxied: bool = False  # came through a trusted proxy, whose word is believed
    fill: Optional[Callable[[bool], Tuple[Union[bytes, bytearray], int]]] = None


class Response(NamedTuple):
    """One answer, complete; a body for HEAD is left out by whoever sends it."""

    status: int
    headers: Tuple[Tuple[str, str], ...]
    body: bytes


def _mismatch(what: str, actual: int, said: int) -> Malformed:
    return Malformed(f"The {what} has {actual} bytes, but its parameters say {said}.")


def _json(status: int, values: Mapping[str, object]) -> Response:
    headers = _JSON_HEADERS + _REFUSAL_HEADERS.get(status, ())
    return Response(status, headers, _compact_json(values).encode())


_JSON_HEADERS = (
    ("Content-Type", "application/json"),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
)
_NO_CONTENT = Response(204, _JSON_HEADERS[1:], b"")
_REFUSAL_HEADERS = {
    401: (("WWW-Authenticate", 'Basic realm="flowserver", charset="UTF-8"'),),
    503: (("Retry-After", "5"),),
}


def _success(status: str, **values: object) -> Response:
    return _json(200, {"success": True, "status": status, **values})


def _complete(done: Done, **values: object) -> Response:
    names = {"filename": done.filename, "path": done.relative_path}
    return _success("complete", **names, size=done.size, **values)


def parse_query(
    text: str, parameters: Optional[Dict[str, str]] = None
) -> Dict[str, str]:
    """Return the parameters of a query string, added to those given; raises Malformed.

    ";" separates nothing, and a name given twice must have one value.
    """
    found = {} if parameters is None else parameters
    pairs = text.split("&") if text else []
    clash = ""
    for pair in pairs[:_MAX_FIELDS]:  # to the end: the names tell whose they are
        name, _, value = pair.partition("=")
        try:
            add_parameter(found, _unquoted(name), _unquoted(value))
        except UnicodeDecodeError:
            clash = clash or "The address is not UTF-8."
        except Malformed as error:
            clash = clash or str(error)
    if len(pairs) > _MAX_FIELDS:
        clash = "The address has too many parameters."
    if clash:
        raise Malformed(clash)
    return found


def _unquoted(text: str) -> str:
    if "%" not in text and "+" not in text:  # most words of most addresses
        return text
    return urllib.parse.unquote_plus(text, errors="strict")


class Incoming(NamedTuple):
    """An upload whose place is asked for; `fields` are what else the form held."""

    owner: str
    identifier: str
    filename: str
    relative_path: str  # safe already
    size: int  # in bytes
    fields: Mapping[str, str]


_HASH_ROUNDS = 200_000  # about a tenth of a second, and one is computed at a time


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
        self._hashing = threading.Lock()
        self._stamp: Tuple[int, ...] = ()
        self._hashes: Dict[str, str] = {}
        self._verified: Dict[bytes, str] = {}
        self._key = secrets.token_bytes(32)
        self._nobody = hash_password("")
        try:
            self._load()
        except Trouble as error:
            cause = error.__cause__
            raise SettingsError(f"users_file can't be read: {cause}.") from cause

    def _load(self) -> None:
        try:
            status = os.stat(self._path)
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp == self._stamp:
                return
            with open(self._path, encoding="utf-8") as file:
                lines = [line.strip().partition(":") for line in file if ":" in line]
        except (OSError, UnicodeDecodeError) as error:
            raise Trouble("The file of users can't be read.") from error
        self._hashes = {name: text for name, _, text in lines}
        self._verified.clear()
        self._stamp = stamp

    def authenticate(self, header: str) -> str:
        """Return the user of an Authorization header (Basic, RFC 7617).

        Raises Unauthorized, with the same words and after the same time for a wrong
        name as for a wrong password.
        """
        digest = hashlib.blake2b(header.encode("latin-1", "replace"), key=self._key)
        with self._lock:
            self._load()
            user = self._verified.get(digest.digest())
            stamp, hashes = self._stamp, self._hashes
        if user is not None:
            return user
        name, password = _credentials(header)
        with self._hashing:  # one at a time: guessing must not take every core
            if self._verified.get(digest.digest()) == name:
                return name  # verified while this one waited
            self._verify(name, password, hashes)
            with self._lock:
                if stamp == self._stamp:  # else the password may have been changed
                    if len(self._verified) > 1000:
                        self._verified.clear()
                    self._verified[digest.digest()] = name
        return name

    def _verify(self, name: str, password: str, hashes: Mapping[str, str]) -> None:
        kept = hashes.get(name, self._nobody)
        try:
            _, rounds, salt, _ = kept.split("$")
            given = hash_password(password, salt, int(rounds))
        except ValueError as error:
            raise Trouble("The file of users has a line that can't be read.") from error
        is_right = hmac.compare_digest(given.encode(), kept.encode())
        if not is_right or name not in hashes:
            raise _login_required()


def _login_required() -> Unauthorized:
    return Unauthorized("A name and a password are needed here.")


def _credentials(header: str) -> Tuple[str, str]:
    scheme, _, text = header.partition(" ")
    if scheme.lower() != "basic":
        raise _login_required()
    try:
        decoded = base64.b64decode(text.strip(), validate=True).decode("utf-8")
    except (binascii.Error, ValueError) as error:
        raise _login_required() from error
    if "\0" in decoded:  # HMAC takes a key and the same key with zeros for one
        raise _login_required()
    name, _, password = decoded.partition(":")
    return name, password


class UploadApp:
    """Takes uploads: ``handle(Request) -> Response``, or as a WSGI application.

    `on_complete(done)` is called when a file is in place, before the answer; when it
    raises, the log says so and the file stays.  `authorize(request)` returns a sentence
    to refuse the request with, or nothing.  `owner(request)` returns whose upload it
    is; no one else sees, continues or cancels it.  `place(incoming)` returns the path
    below upload_dir for a file, the same each time it is asked for the same upload; it
    is checked like a client's.  As a WSGI application it takes what is no other address
    of ours for the upload address, unless `any_path` is off: a framework has chosen the
    path already.  Starts no thread; raises SettingsError and Trouble.
    """

    def __init__(
        self,
        settings: Optional[Settings] = None,
        on_complete: Optional[Callable[[Done], object]] = None,
        authorize: Optional[Callable[[Request], Optional[str]]] = None,
        owner: Optional[Callable[[Request], str]] = None,
        place: Optional[Callable[[Incoming], str]] = None,
        any_path: bool = True,
        store: Optional[Store] = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings or Settings()
        self.log = logging.getLogger("flowserver")
        self._on_complete = on_complete
        self._authorize = authorize
        self._owner = owner
        self._place = place
        self._any_path = any_path
        self._users = (
            Users(self.settings.users_file) if self.settings.users_file else None
        )
        self._has_warned_of_proxy = False
        self._clock = clock
        _require_apart(self.settings)
        self._free_space = (0, -1e9)  # bytes, and when they were counted
        self.store = store or Store(
            self.settings.upload_dir,
            self.settings.temp_dir,
            self.settings.on_conflict,
            Disk(self.settings.sync),
            self._completed if on_complete else None,
        )
        name = os.path.basename(self.store.temp_dir)
        self._avoided = unicodedata.normalize("NFC", name)  # as those of clients are
        self.sweep()

    def sweep(self) -> None:
        """Finish what a crash left and remove what is stale; tidy() does it in time."""
        self._swept = self._counted = self._clock()
        stale_after = self.settings.stale_after or float("inf")
        self.store.sweep(stale_after, self.settings.keep_receipts)
        with contextlib.suppress(IndexError):  # that was the last one
            while True:
                self.log.warning("%s", self.store.warnings.popleft())

    def tidy(self) -> None:
        """Sweep and count what is due; to be called every ten seconds or so.

        FlowServer does, and so does the end of a request under WSGI or http.server.
        """
        try:
            if self._clock() - self._swept > _SWEEP_SECONDS:
                self.sweep()
            elif self._clock() - self._counted > _FIGURE_SECONDS:
                self._counted = self._clock()
                self.store.count()
        except FlowError as error:
            self.log.warning("can't clean up: %s", error)

    def close(self) -> None:
        """Give back what is kept open."""
        self.store.close()

    # The way of a request

    def handle(self, request: Request) -> Response:
        """Answer a request; the outermost door: nothing is raised."""
        started = self._clock()
        try:
            request = self._seen_through_proxies(request)
            response = self._answer(request)
        except FlowError as error:
            response = self._refusal(error, None)
        except Exception:  # a mistake of ours: nobody else may suffer from it
            self.log.exception("this is a bug of flowserver's, please report it")
            response = self._refusal(Trouble("The server made a mistake."), None)
        self._log_request(request, response, self._clock() - started)
        self._drain(request)
        if self._clock() - self._swept > 2 * _SWEEP_SECONDS:  # nobody else does it
            self.tidy()
        return response

    def _answer(self, request: Request) -> Response:
        self._check_host(request)
        if request.path == self.settings.upload_path:
            return self._with_cors(request, self._upload_endpoint(request))
        is_sample = request.path.startswith("/sample/") and self.settings.sample_dir
        is_here = is_sample or request.path in ("/", "/health")
        if is_here and request.method not in ("GET", "HEAD"):
            raise BadMethod(f"There is nothing to {printable(request.method)} here.")
        self._check_authorized(request)
        if request.path == "/":
            form = _Form(request, self.settings.parameter_prefix)
            form.read_query()
            if form.dialect:  # a 200 would tell flow.js that the chunk is here
                raise Missing(f"Chunks go to {self.settings.upload_path}.")
            return self._page()
        if request.path == "/health":
            return self._health()
        if is_sample:
            return self._sample(request.path[len("/sample/") :])
        raise Missing("There is nothing at this address.")

    def _refusal(
        self, error: FlowError, dialect: Optional[Dialect], methods: str = "GET, HEAD"
    ) -> Response:
        status = status_of(error, dialect)
        if error.__cause__ is not None:
            self.log.warning("%s (%s)", error, printable(str(error.__cause__)))
        values = {"success": False, "error": str(error)}
        if status < 500 and status not in (401, 408):
            values["preventRetry"] = True  # Fine Uploader
        response = _json(status, values)
        if status == 405:
            headers = response.headers + (("Allow", methods),)
            response = response._replace(headers=headers)
        return response

    def _drain(self, request: Request) -> None:
        """Read on what was refused, so that the client comes to read the answer.

        A client that writes all before it reads would else see a reset connection.
        """
        if not isinstance(request.read, CountingReader):
            return
        limit = (self.settings.max_chunk_size or _DRAIN_SIZE) + _MULTIPART_ALLOWANCE
        began, drained = self._clock(), 0
        while request.read.left > 0:
            try:
                block = request.read(1 << 16)
            except OSError:  # nobody is there to see the answer
                break
            drained += len(block)
            elapsed = self._clock() - began
            is_over = drained >= limit and elapsed > _LINGER_SECONDS
            if not block or is_over or drained < _drain_floor(elapsed):
                break

    def _log_request(
        self, request: Request, response: Response, seconds: float
    ) -> None:
        if self.log.isEnabledFor(logging.INFO):
            self.log.info(
                "%s %s %s %d %d bytes %.3f s%s",
                printable(request.client or "-")[1:-1],
                printable(request.method)[1:-1],
                printable(request.path)[1:-1],
                response.status,
                max(request.length, 0),
                seconds,
                " " + response.body.decode() if response.status >= 400 else "",
            )

    # Who may do what

    def _seen_through_proxies(self, request: Request) -> Request:
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
        # Each proxy adds whom it saw at the end; whoever stands before the last one
        # that is not trusted may be anybody's invention.
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

    def _check_host(self, request: Request) -> None:
        """Refuse a Host that is not ours: a foreign name that resolves to us.

        On a loopback bind every page in a local browser could reach us so (DNS
        rebinding), and could invent X-Forwarded-Host as well.
        """
        allowed = set(map(_host_name, self.settings.allow_hosts))
        host = _host_name(request.headers.get("host", ""))
        is_local = not host or _LOOPBACK_NAME.fullmatch(host)
        if request.is_loopback and not is_local and host not in allowed:
            raise _unknown_host(host)
        if allowed:
            seen = _host_name(_seen_host(request))
            if seen not in allowed:
                raise _unknown_host(seen)

    def _check_origin(self, request: Request) -> None:
        """Refuse what a page of another site makes a visitor's browser send."""
        origin, named = request.headers.get("origin", ""), self.settings.allow_origins
        own = f"{request.scheme}://{_seen_host(request)}"
        if not origin or origin.lower() in (own.lower(), *named):
            return
        # Whom "*" lets in must not come with the password that a browser remembers.
        headers = request.headers
        has_credentials = "authorization" in headers or "cookie" in headers
        if has_credentials or "*" not in named:
            raise Foreign(
                f"Pages of {printable(origin)} may not upload here; the setting"
                " allow_origins names those that may."
            )

    def _check_authorized(self, request: Request) -> None:
        if self._users:
            self._user(request)
        refusal = self._authorize and self._ask("authorize", self._authorize, request)
        if refusal:
            raise Forbidden(refusal)

    def _ask(self, name: str, hook: Callable[[A], Optional[str]], argument: A) -> str:
        """Call what the program has given us; its mistakes are told as its own."""
        try:
            answer = hook(argument)
            if isinstance(answer, str):
                return answer
            if (answer is None or answer is False) and name != "place":
                return ""  # as of `request.headers.get(...)`, or of `is_bad and "No."`
            raise TypeError(f"{name}() returned {answer!r}, which is no str")
        except FlowError:
            raise
        except Exception:  # whatever a stranger's function may raise
            self.log.exception("%s() of this program failed", name)
            raise Trouble("The server made a mistake.") from None

    def _user(self, request: Request) -> str:
        """Return who is logged in; raises Unauthorized."""
        assert self._users is not None
        return self._users.authenticate(request.headers.get("authorization", ""))

    def _with_cors(self, request: Request, response: Response) -> Response:
        """Let the pages of allowed origins read the answer; those named may log in."""
        if not self.settings.allow_origins:
            return response
        headers = response.headers + (("Vary", "Origin"),)
        origin = request.headers.get("origin", "")
        if origin.lower() in self.settings.allow_origins:
            headers += (("Access-Control-Allow-Origin", origin),)
            headers += (("Access-Control-Allow-Credentials", "true"),)
        elif origin and "*" in self.settings.allow_origins:
            headers += (("Access-Control-Allow-Origin", "*"),)
        return response._replace(headers=headers)

    def _preflight(self, request: Request) -> Response:
        """Answer what a browser asks before a page of another origin may upload."""
        asked = request.headers.get("access-control-request-headers", "")
        if not re.fullmatch(r"[0-9A-Za-z, _-]*", asked):
            asked = ""
        allowed = ", ".join(filter(None, (_ALLOWED_HEADERS, asked)))
        headers = (
            ("Allow", _METHODS),
            ("Access-Control-Allow-Methods", _METHODS),
            ("Access-Control-Allow-Headers", allowed),
            ("Access-Control-Max-Age", "7200"),
        )
        return Response(204, headers, b"")

    # The upload address

    def _upload_endpoint(self, request: Request) -> Response:
        """Answer at upload_path; what is refused is refused in the client's dialect."""
        if request.method == "OPTIONS":
            return self._preflight(request)
        form = _Form(request, self.settings.parameter_prefix)
        try:
            form.read_query()
            self._check_authorized(request)
            if request.method in ("GET", "HEAD"):
                return self._test(request, form)
            self._check_origin(request)
            if request.method == "DELETE":
                return self._delete(request, form)
            if request.method not in _CHUNK_METHODS:
                raise BadMethod("Chunks are sent with POST, PUT or PATCH.")
            return self._store_chunk(request, form)
        except FlowError as error:
            form.find_dialect()
            return self._refusal(error, form.dialect, _METHODS)

    def _test(self, request: Request, form: _Form) -> Response:
        """Is this chunk, or what of this upload, here?  Changes nothing."""
        if form.dialect is None:
            return _NO_CONTENT
        chunk = form.chunk()
        upload, sender = self._upload_of(request, chunk)
        if chunk.length < 0:
            return self._status(upload, sender)
        end = chunk.start + chunk.length
        if not self.store.has(upload, chunk.start, end, sender):
            return _NO_CONTENT
        return _success("partial", size=upload.size)

    def _status(self, upload: Upload, sender: str) -> Response:
        ranges, done = self.store.status(upload, sender)
        if done:
            return _complete(done, ranges=[[0, upload.size]])
        status = "partial" if ranges else "unknown"
        return _success(status, size=upload.size, ranges=ranges)

    def _delete(self, request: Request, form: _Form) -> Response:
        if form.dialect is None:
            raise Malformed("The upload to cancel is not named.")
        upload, sender = self._upload_of(request, form.chunk())
        if self.store.forget(upload, sender):
            self.log.info("%s cancelled %s", request.client, printable(upload.path))
        return _NO_CONTENT

    def _store_chunk(self, request: Request, form: _Form) -> Response:
        started = self._clock()
        self._check_length(request)
        chunk, blocks = form.open_chunk()
        self._check_size(chunk)
        if not 0 <= request.length - chunk.length <= _MULTIPART_ALLOWANCE:
            raise _mismatch("body", request.length, chunk.length)
        upload, sender = self._upload_of(request, chunk)
        upload = self._placed(upload, form)
        self._check_room(upload)
        end, received = chunk.start + chunk.length, 0
        with self.store.receive(upload, chunk.start, end, sender) as body:
            for block in blocks:
                received += len(block)
                if received <= chunk.length:
                    body.write(block)
            if received != chunk.length:
                raise _mismatch("chunk", received, chunk.length)
            progress = body.commit(form.other_fields() if self._on_complete else {})
        if progress.done is None:
            return _success("partial", received=progress.received, size=progress.size)
        if progress.is_new:
            seconds = time.time() - progress.began if progress.began else 0.0
            self._log_done(request, progress.done, seconds or self._clock() - started)
        return _complete(progress.done)

    def _log_done(self, request: Request, done: Done, seconds: float) -> None:
        rate = done.size / max(seconds, 1e-3) / (1 << 20)
        self.log.info(
            "%s finished %s, %d bytes in %.3f s, %.1f MiB/s",
            request.client or "-",
            printable(done.relative_path),
            done.size,
            seconds,
            rate,
        )

    def _completed(self, done: Done) -> None:
        """Call on_complete; a mistake in it does not undo the file."""
        assert self._on_complete is not None
        try:
            self._on_complete(done)
        except Exception:  # whatever a stranger's function may raise
            name = printable(done.relative_path)
            self.log.exception("on_complete failed for %s; the file stays", name)

    def _upload_of(self, request: Request, chunk: Chunk) -> Tuple[Upload, str]:
        """Return the upload that a chunk belongs to, and who sends it."""
        owner = ""
        if self._users:
            owner = self._user(request)
        elif self._owner:
            owner = self._ask("owner", self._owner, request)
        names = (owner, chunk.identifier, chunk.relative_path)
        path = safe_path(chunk.relative_path, self._avoided)
        key = upload_key(*names, chunk.size)
        upload = Upload(key, path, chunk.size, *names)
        if owner:
            return upload, "owner " + owner
        return upload, "secret" if chunk.is_secret else "address " + request.client

    def _placed(self, upload: Upload, form: _Form) -> Upload:
        """Return the upload with the path that place() wants for it."""
        if self._place is None:
            return upload
        name = upload.path.rpartition("/")[2]
        who = (upload.owner, upload.identifier)
        fields = form.other_fields()
        incoming = Incoming(*who, name, upload.path, upload.size, fields)
        path = self._ask("place", self._place, incoming)
        return upload._replace(path=safe_path(path, self._avoided))

    # Limits

    def _check_length(self, request: Request) -> None:
        """Refuse by the head alone what is too long, before a byte has travelled."""
        limit = self.settings.max_chunk_size
        if request.length < 0:
            raise Malformed("The request must say how long its body is.")
        if limit and request.length > limit + _MULTIPART_ALLOWANCE:
            raise TooLarge(
                f"The chunk has about {request.length} bytes; this server takes at most"
                f" {limit} at a time (max_chunk_size)."
            )

    def _check_size(self, chunk: Chunk) -> None:
        if chunk.length < 0:
            raise Malformed("The number of the chunk is missing.")
        limits = (
            ("chunk", chunk.length, self.settings.max_chunk_size, "max_chunk_size"),
            ("file", chunk.size, self.settings.max_file_size, "max_file_size"),
        )
        for what, size, limit, name in limits:
            if limit and size > limit:
                raise TooLarge(
                    f"The {what} has {size} bytes; this server takes at most {limit}"
                    f" ({name})."
                )

    def _check_room(self, upload: Upload) -> None:
        """Refuse a new upload that the disk or the limits have no room for."""
        most, floor = self.settings.max_uploads, self.settings.min_free_space
        lack = ""
        if most and self.store.open_uploads >= most:
            lack = f"The server has {most} unfinished uploads already (max_uploads)."
        elif floor and self._free() - upload.size < floor:
            lack = f"The disk has no room for {upload.size} bytes at the moment."
        if lack and not self.store.knows(upload):
            raise TooLarge(lack)

    def _free(self) -> int:
        """Return the free bytes of the disk, from a figure that is at most 10 s old."""
        free, counted = self._free_space
        if self._clock() - counted > _FIGURE_SECONDS:
            with _explained():
                free = self.store.disk.free_space(self.store.upload_dir)
            self._free_space = (free, self._clock())
        return free

    # The other addresses

    def _page(self) -> Response:
        nonce = secrets.token_urlsafe(16)
        settings = {
            "uploadPath": self.settings.upload_path.lstrip("/"),
            "chunkSize": self.settings.chunk_size,
            "maxFileSize": self.settings.max_file_size,
            "maxChunkSize": self.settings.max_chunk_size,
            "timeout": self.settings.timeout,
            "version": __version__,
        }
        body = page(settings, nonce).encode()
        policy = (
            f"default-src 'none'; style-src 'nonce-{nonce}';"
            f" script-src 'nonce-{nonce}';"
            " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
            " frame-ancestors 'none'"
        )
        return Response(200, _html_headers(policy), body)

    def _health(self) -> Response:
        figures = {"free": self._free(), "uploads": self.store.open_uploads}
        return _json(200, {"ok": True, "version": __version__, **figures})

    def _sample(self, path: str) -> Response:
        """Serve a sample file of a known type; nothing hidden, no listing."""
        folder = os.path.join(_home_folder(), self.settings.sample_dir)
        if not path:
            return self._sample_list(folder)
        words = path.split("/")
        kind = _SAMPLE_TYPES.get(os.path.splitext(path)[1].lower())
        if kind is None or not all(map(_SAMPLE_WORD.fullmatch, words)):
            raise Missing("There is no such sample.")
        file = os.path.join(os.path.realpath(folder), *words)
        if os.path.realpath(file) != file:  # there is a link in it
            raise Missing("There is no such sample.")
        try:
            with open(file, "rb") as sample:
                body = sample.read()
        except OSError:
            raise Missing("There is no such sample.") from None
        return Response(200, (("Content-Type", kind),) + _PAGE_HEADERS, body)

    def _sample_list(self, folder: str) -> Response:
        try:
            names = map(html.escape, sorted(os.listdir(folder)))
        except OSError:
            raise Missing("There is no folder of samples.") from None
        links = (f'<li><a href="{n}">{n}</a>' for n in names if n.endswith(".html"))
        body = f"<!doctype html><title>Samples</title><ul>{''.join(links)}</ul>"
        return Response(200, _html_headers("default-src 'none'"), body.encode())

    # WSGI

    def _is_other_address(self, request: Request) -> bool:
        """Whether a path is one of ours beside the upload address."""
        if request.path == "/":
            return request.method in ("GET", "HEAD") and not request.query
        return request.path == "/health" or request.path.startswith("/sample/")

    def __call__(
        self, environ: Dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answer as a WSGI application (PEP 3333), mounted anywhere."""
        mount = environ.get("SCRIPT_NAME", "")
        request = wsgi_request(environ)
        if mount and not environ.get("PATH_INFO") and not request.query:
            if request.method in ("GET", "HEAD"):  # the page's links are relative
                place = urllib.parse.quote(mount + "/", encoding="latin-1")
                kind = ("Content-Type", "text/plain")
                start_response("308 Permanent Redirect", [("Location", place), kind])
                return []
        if self._any_path and not self._is_other_address(request):
            request = request._replace(path=self.settings.upload_path)
        response = self.handle(request)
        phrase = http.client.responses[response.status]
        headers = list(response.headers)
        if response.status != 204:
            headers.append(("Content-Length", str(len(response.body))))
        start_response(f"{response.status} {phrase}", headers)
        body = b"" if request.method == "HEAD" else response.body
        return _WsgiBody(body, self.tidy)


class _WsgiBody(List[bytes]):
    """An answer's body; when it has been sent, the server calls close()."""

    def __init__(self, block: bytes, close: Callable[[], None]) -> None:
        super().__init__([block])
        self.close = close


_SAMPLE_WORD = re.compile(r"[0-9A-Za-z@_-][0-9A-Za-z@._-]*")
_PAGE_HEADERS = (
    ("Cache-Control", "no-cache"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Frame-Options", "DENY"),
)


def _html_headers(policy: str) -> Tuple[Tuple[str, str], ...]:
    kind = ("Content-Type", "text/html; charset=utf-8")
    return (kind, ("Content-Security-Policy", policy)) + _PAGE_HEADERS


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
    if settings.sample_dir and folder.startswith(samples):
        raise SettingsError(
            f"sample_dir {samples} holds upload_dir, whose pages and scripts would then"
            " be served; give uploads a folder of their own."
        )


def _home_folder() -> str:
    return os.path.dirname(os.path.abspath(__file__))


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


_PORT = re.compile(":[0-9]*$")


def _host_name(host: str) -> str:
    """Return a Host header without its port, in lower case."""
    return _PORT.sub("", host).lower()


def _seen_host(request: Request) -> str:
    """Return the host that the browser asked for, as far as the proxy is believed."""
    host = request.headers.get("host", "")
    if request.is_proxied:
        return request.headers.get("x-forwarded-host", "").split(",")[0].strip() or host
    return host


def _unknown_host(host: str) -> Foreign:
    return Foreign(
        f"This server is not known as {printable(host)}; the setting allow_hosts names"
        " those that it answers to."
    )


def parse_length(text: str) -> int:
    """Return a Content-Length of digits alone, -1 for anything else."""
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else -1


class CountingReader:
    """``read(n)`` of a body that knows how many bytes are `left`."""

    def __init__(self, read: Callable[[int], bytes], length: int) -> None:
        self._read = read
        self.left = max(length, 0)

    def __call__(self, size: int) -> bytes:
        """Return up to `size` bytes, b"" at the end."""
        block = self._read(min(size, self.left)) if self.left else b""
        self.left -= len(block)
        return block


def _drain_floor(seconds: float) -> float:
    """Return the least bytes that a refused body must have brought by now."""
    return (seconds - _LINGER_SECONDS) * _MIN_DRAIN_RATE


def wsgi_request(environ: Mapping[str, Any]) -> Request:
    """Return the Request of a WSGI environment (PEP 3333)."""
    headers = {
        name[5:].replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_")
    }
    headers["content-type"] = environ.get("CONTENT_TYPE") or ""
    # gunicorn hands a body of unknown length on without a word, but for this header.
    unknown = "-1" if "transfer-encoding" in headers else "0"
    length = parse_length(environ.get("CONTENT_LENGTH") or unknown)
    path = environ.get("PATH_INFO", "").encode("latin-1").decode("utf-8", "replace")
    # Flask's own server would wait for ever for what Flask has read already.
    is_read = "stream" in getattr(environ.get("werkzeug.request"), "__dict__", ())
    return Request(
        method=environ["REQUEST_METHOD"],
        path=path or "/",
        query=environ.get("QUERY_STRING", ""),
        headers=headers,
        length=length,
        read=CountingReader(environ["wsgi.input"].read, 0 if is_read else length),
        client=environ.get("REMOTE_ADDR", ""),
        scheme=environ.get("wsgi.url_scheme", "http"),
    )


class _Form:
    """The parameters of one request, from address and body, and the file in it."""

    def __init__(self, request: Request, prefix: str) -> None:
        self.request = request
        self.prefix = prefix
        self.given: Dict[str, str] = {}  # as the client named them
        self.dialect: Optional[Dialect] = None
        self._field_size = 0
        self._is_known = False  # which chunk comes

    def read_query(self) -> None:
        """Take the parameters of the address, and find out whose they are."""
        parse_query(self.request.query, self.given)
        self.find_dialect()

    def find_dialect(self) -> None:
        """Find out whose parameters they are, whether they make sense or not."""
        names = (without_prefix(name, self.prefix) for name in self.given)
        self.dialect = recognise(names)

    def open_chunk(self) -> Tuple[Chunk, Iterator[Union[bytes, memoryview]]]:
        """Read up to the file; return what the chunk is and an iterator of its blocks.

        The iterator ends when the body has been whole and well-formed to its last byte;
        else it raises.  Its views hold until the next one is asked for.
        """
        boundary = boundary_of(self.request.headers.get("content-type", ""))
        if boundary is None:
            chunk = self.chunk()
            if chunk.length not in (-1, self.request.length):
                raise _mismatch("body", self.request.length, chunk.length)
            return chunk, (memoryview(block)[:size] for block, size in self._buffers())
        parser = MultipartParser(boundary)
        blocks = self._form_blocks(parser)
        next(blocks)  # up to the beginning of the file: the fields before it are known
        chunk = self.chunk()
        # No need to search for the boundary where it must not be.  Were it there, then
        # the sizes would contradict each other, or it is what the file holds there.
        parser.expect(chunk.length)
        return chunk, blocks

    def chunk(self) -> Chunk:
        """Return what the parameters say so far; raises Malformed."""
        if self.dialect is None:
            raise Malformed("The parameters are not those of an uploader known here.")
        self._is_known = True
        return parse_chunk(self.dialect, unprefixed(self.given, self.prefix))

    def _buffers(self) -> Iterator[Tuple[Union[bytes, bytearray], int]]:
        """Yield the body as it comes: a buffer, and how many bytes of it count.

        A form's beginning is wanted at once: it says whose bytes are under way.
        """
        request, left = self.request, self.request.length
        while left:
            if request.fill:
                buffer, size = request.fill(not self._is_known)
            else:
                assert request.read is not None
                try:
                    buffer = request.read(min(BLOCK_SIZE, left))
                except OSError as error:
                    raise Truncated("The connection broke.") from error
                size = len(buffer)
            if not size and left == request.length and not request.fill:
                raise Malformed(
                    "The form was read already: give the request to flowserver before"
                    " anything touches request.form or request.POST."
                )
            if not size:
                raise Truncated(f"The body ended {left} bytes before its end.")
            left -= size
            yield buffer, size

    def _form_blocks(
        self, parser: MultipartParser
    ) -> Iterator[Union[bytes, memoryview]]:
        """Yield b"" when the file begins, then its blocks; take fields on the way."""
        name, value = "", bytearray()
        is_file = seen_file = False
        for buffer, size in self._buffers():
            for event in parser.scan(buffer, size):
                if isinstance(event, Part):
                    is_file = event.filename is not None
                    if is_file and seen_file:
                        raise Malformed("The form has more than one file.")
                    name, value = event.name, bytearray()
                    if is_file:
                        seen_file = True
                        self.find_dialect()
                        yield b""
                elif is_file:
                    if event is not None:
                        yield event
                elif event is None:
                    self._add_field(name, value, seen_file)
                else:
                    self._field_size += len(event)
                    value += event
                    if self._field_size > _MAX_FIELD_SIZE:
                        is_text = value.startswith(b"data:")
                        complaint = "The text fields of the form are too long."
                        raise Malformed(_FILE_AS_TEXT if is_text else complaint)
        try:
            parser.close()
        except Truncated as error:  # although every byte of it came
            raise Malformed(str(error)) from error
        if not seen_file:
            is_text = any(text.startswith("data:") for text in self.given.values())
            complaint = "There is no file in the form."
            raise Malformed(_FILE_AS_TEXT if is_text else complaint)

    def _add_field(self, name: str, value: bytearray, is_late: bool) -> None:
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Malformed("A text field of the form is not UTF-8.") from error
        known = self.dialect.names if is_late and self.dialect else ()
        if name not in self.given and without_prefix(name, self.prefix) in known:
            raise Malformed("The parameters must come before the file.")
        add_parameter(self.given, name, text)

    def other_fields(self) -> Dict[str, str]:
        """Return what the client sent beside the parameters of its library."""
        known = self.dialect.names + self.dialect.unused if self.dialect else ()
        return {
            name: value
            for name, value in self.given.items()
            if without_prefix(name, self.prefix) not in known
        }


def create_app(config: Optional[str] = None) -> UploadApp:
    """Return the application that conf.ini describes, for ``gunicorn``.

    Reads `config`, else what FLOWSERVER_CONFIG names, else conf.ini beside this file.
    """
    return UploadApp(load_settings(find_config(config), {}), any_path=False)


def find_config(named: Optional[str]) -> str:
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

_SMALL_BODY_SIZE = 64 * 1024
_HEAD_BLOCK_SIZE = 8 * 1024  # what follows a head is copied
_MAX_HEAD_SIZE = 64 * 1024  # flow.js writes names and paths into the address, encoded
_MAX_LINE_SIZE = 32 * 1024
_MAX_HEADERS = 100
_MIN_BODY_RATE = 1024  # bytes/s on the average, once a body has taken `timeout`
_NO_TIMEOUT_SECONDS = 86400.0  # for timeout = 0
_GRACE_SECONDS = 5.0  # for running requests when the server stops

_REQUEST_LINE = re.compile(r"([A-Z]{1,20}) ([!-~]+) HTTP/1\.([01])")
# Blanks round the value are stripped later: matched here, they cost quadratic time.
_HEADER_LINE = re.compile(
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)\r\n"
)


class _BadHead(Exception):
    """A head that is refused; the connection is closed after the answer."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Head(NamedTuple):
    """The head of a request; header names are in lower case."""

    method: str
    target: str
    minor: int  # of the version: HTTP/1.<minor>
    headers: Dict[str, str]
    length: int  # of the body, in bytes


def parse_head(head: bytes) -> Head:
    """Return what a head says, which ends with an empty line; raises _BadHead.

    RFC 9112 in its strictest reading: no bare CR or LF, no folded lines, no blank
    before the colon, one Content-Length of digits alone, no Transfer-Encoding.
    """
    if len(head) > _MAX_HEAD_SIZE:
        raise _BadHead(431, "The head of the request is too long.")
    line, _, rest = head.decode("latin-1").partition("\r\n")
    if len(line) > _MAX_LINE_SIZE:
        raise _BadHead(414, "The address is too long.")
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise _BadHead(400, "The first line of the request can't be read.")
    headers = _parse_headers(rest)
    if "host" not in headers and match[3] == "1":
        raise _BadHead(400, "The request names no host.")
    return Head(match[1], match[2], int(match[3]), headers, _body_length(headers))


def _parse_headers(text: str) -> Dict[str, str]:
    headers: Dict[str, str] = {}
    position, end, count = 0, len(text) - 2, 0
    while position < end:
        match = _HEADER_LINE.match(text, position)
        if not match:
            raise _BadHead(400, "A header of the request can't be read.")
        name, value = match[1].lower(), match[2].strip(" \t")
        if name in headers:
            if name in _SINGLE_HEADERS:
                raise _BadHead(400, f"The request has two headers {name}.")
            value = f"{headers[name]}, {value}"
        headers[name] = value
        position = match.end()
        count += 1
        if count > _MAX_HEADERS:
            raise _BadHead(431, "The request has too many headers.")
    return headers


_SINGLE_HEADERS = frozenset(
    ("content-length", "content-type", "host", "transfer-encoding", "authorization")
    + ("origin", "expect")
)


def _body_length(headers: Mapping[str, str]) -> int:
    if "transfer-encoding" in headers:
        if "content-length" in headers:
            raise _BadHead(400, "Content-Length and Transfer-Encoding contradict.")
        raise _BadHead(411, "Bodies must come with a Content-Length.")
    length = parse_length(headers.get("content-length", "0"))
    if length < 0:
        raise _BadHead(400, "The Content-Length is not a number.")
    return length


class _Wire:
    """The bytes of one connection, in: heads, then bodies, with an end to each wait."""

    def __init__(self, connection: socket.socket, server: FlowServer) -> None:
        self.connection = connection
        self.server = server
        self.pending = b""  # came with a head, belongs to what follows it
        self.timeout = server.timeout_seconds
        self.remaining = 0  # bytes of the body that were not read yet
        self._buffer: Optional[bytearray] = None
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
                raise _BadHead(400, "This is not HTTP.")
            if searched > _MAX_HEAD_SIZE:
                raise _BadHead(431, "The head of the request is too long.")
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

    def fill(self, at_once: bool = False) -> Tuple[Union[bytes, bytearray], int]:
        """Return a buffer with the next bytes of the body and how many they are.

        It is full, or the body is whole, unless what is there is wanted `at_once`.
        """
        if self._wants_100:  # judged by its head and not refused: let it come
            self._wants_100 = False
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._buffer is None:
            self._buffer = self.server.take_buffer(self.remaining)
        wanted = min(self.remaining, len(self._buffer))
        size = min(wanted, len(self.pending))
        self._buffer[:size] = self.pending[:size]
        self.pending = self.pending[size:]
        self.remaining -= size
        with memoryview(self._buffer) as view:
            while size < wanted and not (at_once and size):
                flag = 0 if at_once else self._wait_flag
                received = self._receive(view[size:wanted], flag)
                if not received:
                    break
                size += received
        return self._buffer, size

    def _receive(self, view: memoryview, flag: int) -> int:
        try:
            received = self.connection.recv_into(view, len(view), flag)
        except (socket.timeout, BlockingIOError) as error:
            raise Truncated("The body came too slowly.") from error
        except OSError as error:
            raise Truncated("The connection broke.") from error
        self.remaining -= received
        elapsed = time.monotonic() - self._body_began
        if elapsed > self.timeout:
            if self._body_size - self.remaining < elapsed * _MIN_BODY_RATE:
                raise Truncated("The body came too slowly.")
        return received

    def end_body(self) -> None:
        """Give the buffer back for the next body of whatever connection."""
        if self._buffer is not None:
            self.server.give_buffer(self._buffer)
            self._buffer = None

    def drain(self, limit: int) -> None:
        """Read on what is refused, so that the client comes to read the answer.

        A client that writes all before it reads would else see a reset connection.
        """
        began, drained = time.monotonic(), len(self.pending)
        left = min(self.remaining - drained, limit)
        buffer = bytearray(64 * 1024)
        with contextlib.suppress(OSError):
            while left > 0:
                elapsed = time.monotonic() - began
                if drained < _drain_floor(elapsed):
                    break
                self.limit_waits(_LINGER_SECONDS)
                size = self.connection.recv_into(buffer, min(left, len(buffer)))
                if not size:
                    return
                left -= size
                drained += size
            self._linger(buffer)

    def _linger(self, buffer: bytearray) -> None:
        """Say that nothing follows, and give the other side a moment to see it."""
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
                with self.server.waiting(self.raw, self.connection):
                    self.connection.do_handshake()
            except OSError:
                self.connection.close()
                raise
        self.wire = _Wire(self.connection, self.server)
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
            with self.server.waiting(self.raw, self.connection):
                head = self.wire.read_head()
            if not head:
                return False
            parsed = parse_head(head)
            request = self._request(parsed)
        except _BadHead as error:
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
                raise _BadHead(400, "The address of the request can't be read.")
            target = match[1] or "/" if match else self.server.app.settings.upload_path
        path, _, query = target.partition("?")
        return Request(
            method=head.method,
            path=urllib.parse.unquote(path, errors="replace"),
            query=query,
            headers=head.headers,
            length=head.length,
            client=self.client,
            scheme="https" if self.server.tls is not None else "http",
            is_loopback=self.server.is_loopback,
            fill=self.wire.fill,
        )

    def _refuse(self, error: _BadHead) -> None:
        log = self.server.app.log
        log.info("%s refused: %s (%d)", self.client, error, error.status)
        self.wire.remaining = 1 << 62  # unknown: what follows is not read as a request
        response = _json(error.status, {"success": False, "error": str(error)})
        self._send(Head("", "", 0, {}, 0), response)

    def _send(self, head: Head, response: Response) -> bool:
        """Send a response in one write; return whether the connection goes on."""
        options = head.headers.get("connection", "").lower()
        keeps = head.minor == 1 and "close" not in options
        keeps = keeps and not self.wire.remaining and not self.server.is_stopping
        self.wire.limit_waits(self.wire.timeout)
        self.connection.sendall(_response_bytes(head.method, response, keeps))
        if self.wire.remaining:
            limit = self.server.app.settings.max_chunk_size or _DRAIN_SIZE
            self.wire.drain(limit + _MULTIPART_ALLOWANCE)
        return keeps


def _response_bytes(method: str, response: Response, keeps: bool) -> bytes:
    lines = [f"HTTP/1.1 {response.status} {http.client.responses[response.status]}"]
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
        body = CountingReader(self.rfile.read, length)
        request = Request(
            method=self.command,
            path=self.uploads.settings.upload_path,
            query=self.path.partition("?")[2],
            headers=headers,
            length=length,
            read=body,
            client=self.client_address[0] if self.client_address else "",  # Unix socket
            scheme="https" if hasattr(self.connection, "getpeercert") else "http",
        )
        response = self.uploads.handle(request)
        if body.left or length < 0:
            self.close_connection = True
        data = _response_bytes(self.command, response, not self.close_connection)
        self.wfile.write(data)
        self.uploads.tidy()


class FlowServer(http.server.ThreadingHTTPServer):
    """The application behind a socket::

        with FlowServer(UploadApp(settings)) as server:
            print(server.url)

    A thread accepts connections and one serves each.  Port 0 takes any free one; raises
    OSError when the port is taken.
    """

    request_queue_size = 256

    def __init__(
        self, app: UploadApp, handler: Optional[Callable[..., FlowHandler]] = None
    ) -> None:
        settings = app.settings
        self.app = app
        self.is_stopping = False
        most = settings.max_connections or sys.maxsize
        self.max_connections = min(most, _descriptor_room())
        self.timeout_seconds = float(settings.timeout) or _NO_TIMEOUT_SECONDS
        self.tls = _tls_context(settings)
        self.is_loopback = False
        self._connections: Set[socket.socket] = set()
        # Accepted sockets without a whole head, the longest waiting one first, and what
        # they became (TLS wraps them).
        self._waiting: Dict[socket.socket, socket.socket] = {}
        self._lock = threading.Lock()
        self._buffers: List[bytearray] = []
        self._stopped = threading.Event()
        self._workers: List[threading.Thread] = []
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
        self.app.close()

    def _keep_tidy(self) -> None:
        while not self._stopped.wait(_FIGURE_SECONDS):
            self.app.tidy()

    # Connections

    def get_request(self) -> Any:
        """Accept a connection; make room and pause when there is no descriptor."""
        try:
            return super().get_request()
        except OSError:
            with self._lock:
                self._shut_idlest()
            time.sleep(0.05)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a new connection in a thread; at the limit the idlest gives way."""
        with self._lock:
            is_full = len(self._connections) >= self.max_connections
            has_room = not is_full or self._shut_idlest()
            if has_room:
                self._connections.add(request)
                self._waiting[request] = request
        if has_room:
            super().process_request(request, client_address)
        else:
            self._turn_away(request)

    def _shut_idlest(self) -> bool:
        """Close what has waited longest; under the lock.  False when all are busy."""
        if not self._waiting:
            return False
        _shut(self._waiting.pop(next(iter(self._waiting))))
        return True

    def _turn_away(self, request: socket.socket) -> None:
        values = {"success": False, "error": "The server has too many connections."}
        with contextlib.suppress(OSError):
            request.settimeout(0)
            if self.tls is None:
                request.send(_response_bytes("", _json(503, values), False))
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection that has ended."""
        with self._lock:
            self._connections.discard(request)
            self._waiting.pop(request, None)
        with contextlib.suppress(OSError):
            request.close()

    def server_close(self) -> None:
        """Stop listening; the threads of connections are waited for in stop()."""
        self.socket.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a connection's thread died of; a client's fault gets one line."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self.app.log.info("%s connection failed: %s", client_address[0], error)
        else:
            self.app.log.exception("a connection ended with a bug of flowserver's")

    @contextlib.contextmanager
    def waiting(self, raw: socket.socket, connection: socket.socket) -> Iterator[None]:
        """Count an accepted socket as idle while it has no whole head."""
        with self._lock:
            self._waiting[raw] = connection  # an accepted one keeps its place
        try:
            yield
        finally:
            with self._lock:
                self._waiting.pop(raw, None)

    def take_buffer(self, size: int) -> bytearray:
        """Return a buffer for a body of `size` bytes; give_buffer() takes it back."""
        if size <= _SMALL_BODY_SIZE:
            return bytearray(size)
        with self._lock:
            if self._buffers:
                return self._buffers.pop()
        return bytearray(BLOCK_SIZE)

    def give_buffer(self, buffer: bytearray) -> None:
        """Lend a buffer to the next body, of whatever connection."""
        with self._lock:
            if len(buffer) == BLOCK_SIZE and len(self._buffers) < 16:
                self._buffers.append(buffer)


def _descriptor_room() -> int:
    """Return how many connections the limit of descriptors has room for.

    A body under way needs its ledger and its data file beside the socket.
    """
    try:
        import resource
    except ImportError:
        return sys.maxsize
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(8, (soft - 64) // 2)


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


def main(argv: Optional[Sequence[str]] = None) -> int:
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
        _require_apart(settings)
    except SettingsError as error:
        return _fail(2, str(error))
    try:
        _start_log(settings)
    except OSError as error:
        return _fail(1, f"The log can't be written: {error}.")
    try:
        _raise_descriptor_limit()
        server = FlowServer(UploadApp(settings))
    except SettingsError as error:
        return _fail(2, str(error))
    except FlowError as error:
        return _fail(1, str(error))
    except (OSError, TypeError) as error:  # TypeError: a host that IDNA can't encode
        where = f"{settings.host}, port {settings.port}"
        return _fail(1, f"The server can't listen on {where}: {error}.")
    return _serve(server)


def _argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowserver.py",
        description="Take chunked, resumable uploads of browsers.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="Settings file (else FLOWSERVER_CONFIG, else conf.ini beside this file).",
    )
    parser.add_argument(
        "--add-user",
        metavar="NAME",
        help="Ask for a password, put the user into users_file, and exit.",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="Try what the store needs of the configured folders, and exit.",
    )
    for name, setting in settings_table().items():
        default = f" [{setting.default}]" if setting.default else ""
        parser.add_argument(
            "--" + name.replace("_", "-"),
            metavar="VALUE",
            help=(setting.sentence + default).replace("%", "%%"),
        )
    return parser


def _fail(status: int, sentence: str) -> int:
    print(f"flowserver: {sentence}", file=sys.stderr)
    return status


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

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        kept = record.__dict__
        if "line" not in kept:
            kept["line"] = super().format(record)
        return str(kept["line"])


def _start_log(settings: Settings) -> None:
    """Log to stderr, and to a file that is rotated when there is one."""
    handlers: List[logging.Handler] = [logging.StreamHandler()]
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
    path = settings.users_file
    if not path:
        raise SettingsError(
            "Say where users are kept: set users_file in conf.ini first."
        )
    is_plain = name.isprintable() and name == name.strip() and ":" not in name
    if not name or not is_plain:
        raise SettingsError(f"{printable(name)} can't be the name of a user.")
    password = ""
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # thought better of it
        if sys.stdin.isatty():
            password = getpass.getpass(f"Password for {name}: ")
        else:
            password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise SettingsError("The password is empty.")
    if "\0" in password:
        raise SettingsError("The password holds a character that can't be typed.")
    lines = []
    try:
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                lines = [one.rstrip("\n") for one in file]
        lines = [one for one in lines if one.partition(":")[0].strip() != name]
        lines += [f"{name}:{hash_password(password)}", ""]
        _write_privately(path, "\n".join(lines))
    except (OSError, UnicodeDecodeError) as error:
        return _fail(1, f"The file of users {path} can't be changed: {error}.")
    print(f"{name} may log in now ({path}).")
    return 0


def _write_privately(path: str, text: str) -> None:
    part = f"{path}.{secrets.token_hex(4)}"
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _check(settings: Settings) -> int:
    """Try what the store needs, one line each; 1 when something does not hold."""
    try:
        disk = Disk(settings.sync)
        store = Store(settings.upload_dir, settings.temp_dir, disk=disk)
        path, fd = store.process.new_part()
        try:
            results = list(_trials(store, settings, path, fd))
        finally:
            disk.close(fd)
            store.process.drop_part(path)
            store.close()
    except (FlowError, OSError) as error:
        print(f"FAILED  {error}")
        return 1
    for is_good, sentence in results:
        print(("ok      " if is_good else "FAILED  ") + sentence)
    return 0 if all(is_good for is_good, _ in results) else 1


def _trials(
    store: Store, settings: Settings, path: str, fd: int
) -> Iterator[Tuple[bool, str]]:
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
    milliseconds = _flush_seconds(store.disk, fd) * 1000
    state = "on" if settings.sync else "off"
    yield True, f"a flush takes {milliseconds:.2f} ms (sync is {state})"
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


def _flush_seconds(disk: Disk, fd: int) -> float:
    began = time.perf_counter()
    for number in range(10):
        disk.write(fd, b"flowserver", number * 4096)
        os.fsync(fd)
    return (time.perf_counter() - began) / 10


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
    print(f"flowserver {__version__}: open {server.url}/ in a browser", flush=True)
    for address in _other_addresses(server):
        print(f"also reachable as {address}/", flush=True)
    print(f"files go to {server.app.store.upload_dir}", flush=True)
    _warn_if_open(server)
    is_ended = False
    while not is_ended:  # no signal ends a wait that it came just before, or on Windows
        with contextlib.suppress(queue.Empty):
            is_ended = signals.get(timeout=0.5) > 0
    server.stop()
    return 0


def _other_addresses(server: FlowServer) -> List[str]:
    """Return the addresses of this machine, when it listens on all of them."""
    if server.server_name not in ("0.0.0.0", "::"):
        return []
    found = []
    with contextlib.suppress(OSError):
        for entry in socket.getaddrinfo(socket.gethostname(), None):
            host = str(entry[4][0]).partition("%")[0]
            url = server.url_of(host)
            is_possible = server.server_name == "::" or ":" not in host
            if is_possible and url != server.url and url not in found:
                found.append(url)
    return found


if __name__ == "__main__":
    sys.exit(main())
