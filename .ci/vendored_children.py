"""Programs of which flowserver.py is a part, each a process in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from vendored_client import PATIENCE, Client

T = TypeVar("T")

HERE = Path(__file__).resolve().parent
# Another flowserver.py, to see these tests fail on a broken one.
SERVER = Path(os.environ.get("FLOWSERVER_FILE") or HERE.parent / "flowserver.py")


def wait_for(ask: Callable[[], T], what: str) -> T:
    """Ask again and again until the answer is true."""
    end = time.monotonic() + PATIENCE
    while True:
        found = ask()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"not within {PATIENCE} s: {what}")
        time.sleep(0.02)


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        return True
    return False


class Child:
    """A program, with its own process group; it ends with the test."""

    def __init__(
        self, command: Sequence[str] | str, folder: Path, **surroundings: str
    ) -> None:
        self.folder = folder
        self.command = command
        apart = Path(tempfile.mkdtemp(prefix="child-", dir=folder))
        self.log, self.ports, hook = apart / "log", apart / "ports", apart / "hook"
        hook.mkdir()
        shutil.copy(HERE / "vendored_sitecustomize.py", hook / "sitecustomize.py")
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                shell=isinstance(command, str),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._environment(hook, surroundings),
            )

    def _environment(self, hook: Path, surroundings: dict[str, str]) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if k != "FLOWSERVER_CONFIG"}
        ours = {
            "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join((str(hook), str(self.folder))),
            "HOME": str(self.folder),  # gunicorn writes there
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "FLOWSERVER_PORTS": str(self.ports),
        }
        return {**inherited, **ours, **surroundings}

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.stop()
        if kind is not None:
            print(f"{self.command}:", self.text()[-3000:], file=sys.stderr)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def port(self) -> int:
        """The port it was given in place of 8000, once somebody listens there."""
        port = int(self._awaited(lambda: self._first_line(self.ports)))
        self._awaited(lambda: is_open(port))
        return port

    def told(self, pattern: str) -> str:
        """What the first group of a pattern matches in its output."""
        found = self._awaited(lambda: re.search(pattern, self.text()))
        return found[1]

    def _first_line(self, path: Path) -> str:
        text = path.read_text() if path.exists() else ""
        return text.partition("\n")[0] if "\n" in text else ""

    def _awaited(self, ask: Callable[[], T | None]) -> T:
        def ask_while_it_lives() -> T | None:
            found = ask()
            if not found and self.process.poll() is not None:
                raise AssertionError(f"it ended: {self.text()[-3000:]}")
            return found

        found = wait_for(ask_while_it_lives, f"{self.command} listens")
        assert found is not None
        return found

    def stop(self, how: int = signal.SIGTERM) -> int:
        """End it, in the way that its user would; what does not obey is killed."""
        if self.process.poll() is None:
            self.process.send_signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


class Project:
    """Somebody's program: its folder holds a copy of flowserver.py and their code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.upload_dir = folder / "uploads"
        shutil.copy(SERVER, folder / "flowserver.py")

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def run(self, command: Sequence[str] | str, **surroundings: str) -> Child:
        return Child(command, self.folder, **surroundings)

    def client(self, child: Child, path: str = "/upload") -> Client:
        return Client(f"http://127.0.0.1:{child.port}{path}")

    def finished(self) -> dict[str, bytes]:
        """All files of the upload folder, except what the server keeps for itself."""
        found = {}
        for path in self.upload_dir.rglob("*"):
            if path.is_file() and ".flowserver" not in path.parts:
                with contextlib.suppress(FileNotFoundError):  # taken away just now
                    name = path.relative_to(self.upload_dir).as_posix()
                    found[name] = path.read_bytes()
        return found

    def unfinished(self) -> list[str]:
        """Data in the temp folder: none is left of a finished upload."""
        kept = self.upload_dir.glob(".flowserver/**/*")
        return [path.name for path in kept if path.suffix in (".data", ".part")]


@contextlib.contextmanager
def project() -> Iterator[Project]:
    with tempfile.TemporaryDirectory(prefix="flowserver-vendored-") as name:
        yield Project(Path(name))
