"""The real nginx with sample/nginx.conf, in the foreground, as a child of the test."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from vendored_children import HERE, is_open, wait_for

SAMPLE = HERE.parent / "sample" / "nginx.conf"
HOST = "files.example.com"

# What Debian's nginx.conf does, without its paths; the sample is what it includes.
AROUND = """\
daemon off;
user root;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log info;
events {{}}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""


def replaced(text: str, old: str, new: str) -> str:
    if old not in text:
        raise AssertionError(f"sample/nginx.conf does not hold {old!r}")
    return text.replace(old, new)


def without(text: str, start: str) -> str:
    """The conf without the lines that begin so."""
    kept, count = re.subn(rf"(?m)^ *{re.escape(start)}.*;\n", "", text)
    if count == 0:
        raise AssertionError(f"sample/nginx.conf has no line {start!r}")
    return kept


def below_a_path(text: str) -> str:
    """The conf with its alternative: the commented location in place of the other."""
    inner = re.search(r"( +# location /files/ \{\n(?: +#.*\n)+)", text)
    if inner is None:
        raise AssertionError("sample/nginx.conf shows no sub-path")
    alternative = inner[0].replace("# ", "")
    root = "    location / {\n        proxy_pass http://flowserver;\n    }\n"
    return replaced(text, inner[0], alternative).replace(root, "")


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for HOST, and its key, made now."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), False)
        .sign(key, hashes.SHA256())
    )
    pem, secret = folder / "site.pem", folder / "site.key"
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return pem, secret


class Nginx:
    """nginx in front of flowserver processes at these ports."""

    def __init__(self, folder: Path, ports: Sequence[int], conf: str = "") -> None:
        folder.mkdir()
        self.folder = folder
        pem, key = certificate(folder)
        self.tls = ssl.create_default_context(cafile=str(pem))
        # It inherits the listening socket, so that no port is guessed.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
            self._write(conf or SAMPLE.read_text(encoding="utf-8"), ports, pem, key)
            self.process = self._start(listener)
        self.url = f"https://{HOST}:{self.port}"
        wait_for(self._is_up, "nginx")

    def _write(self, text: str, ports: Sequence[int], pem: Path, key: Path) -> None:
        text = replaced(text, "listen 443 ssl;", f"listen 127.0.0.1:{self.port} ssl;")
        text = replaced(text, "/etc/ssl/files.example.com.pem", str(pem))
        text = replaced(text, "/etc/ssl/files.example.com.key", str(key))
        for number, port in enumerate(ports, 8001):
            text = replaced(text, f"127.0.0.1:{number}", f"127.0.0.1:{port}")
        (self.folder / "site.conf").write_text(text)
        (self.folder / "nginx.conf").write_text(AROUND.format(folder=self.folder))

    def _start(self, listener: socket.socket) -> subprocess.Popen[bytes]:
        program = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
        if program is None:
            raise AssertionError("nginx is not installed: run .ci/run, which does it")
        return subprocess.Popen(
            [program, "-p", str(self.folder), "-c", "nginx.conf"],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            env={**os.environ, "NGINX": f"{listener.fileno()};"},
            start_new_session=True,
        )

    def _is_up(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"nginx ended: {self.text()}")
        return (self.folder / "pid").exists() and is_open(self.port)

    def text(self, name: str = "error.log") -> str:
        path = self.folder / name
        return path.read_text(errors="replace") if path.exists() else ""

    def __enter__(self) -> Nginx:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=30)
        if kind is not None:
            print("nginx:", self.text()[-3000:], file=sys.stderr)
