"""A real Chromium, driven over W3C WebDriver with the standard library alone.

    with Browser() as browser:
        browser.open("http://127.0.0.1:8000/")
        browser.set_files("input[type=file]", ["/path/to/a", "/path/to/b"])
        browser.wait_for("return document.title === 'done'")
        browser.screenshot("done.png")

A missing browser raises BrowserMissing. It is never a reason to skip a test.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# Debian's names first, then those of other systems.
DRIVERS = ("chromedriver", "/usr/lib/chromium/chromedriver")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

STARTS = 5

# No request may leave the machine, and a container's root must be able to run it.
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-default-browser-check",
    "--no-first-run",
    "--no-proxy-server",
    "--window-size=1280,900",
)

# The key under which W3C WebDriver wraps the id of an element.
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class BrowserMissing(RuntimeError):
    """chromedriver or Chromium is not installed, or does not start."""


class WebDriverError(RuntimeError):
    """The driver refused a command; `kind` is the W3C error code."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Waited(AssertionError):
    """What a test waited for did not come."""


def installed(names: Iterable[str], what: str) -> str:
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise BrowserMissing(f"{what} is not installed: run .ci/run, which installs it")


class Driver:
    """One chromedriver process in a process group and temporary folder of its own."""

    def __init__(self) -> None:
        program = installed(DRIVERS, "chromedriver")
        self.folder = tempfile.mkdtemp(prefix="flowserver-browser-")
        said = ""
        for _ in range(STARTS):
            self.process = self._started(program)
            self.port, said = self._announced_port()
            if self.port:
                return
            self._end_process()
        shutil.rmtree(self.folder, ignore_errors=True)
        raise BrowserMissing(f"chromedriver does not start: {said.strip()}")

    def _started(self, program: str) -> subprocess.Popen[str]:
        # In the locale C the browser cannot open a file whose name is not ASCII.
        own = {"TMPDIR": self.folder, "HOME": self.folder, "LC_ALL": "C.UTF-8"}
        # Left alone it takes one that is free for IPv6, and ends if IPv4's is taken.
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
        return subprocess.Popen(
            [program, f"--port={port}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env={**os.environ, **own},
        )

    def _announced_port(self) -> tuple[int, str]:
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            found = re.search(r"started successfully on port (\d+)", line)
            if found:
                return int(found[1]), said
        return 0, said

    def call(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            data = None if method != "POST" else json.dumps(body or {}).encode()
            connection.request(method, path, data, {"Content-Type": "application/json"})
            value = json.loads(connection.getresponse().read())["value"]
        if isinstance(value, dict) and "error" in value:
            raise WebDriverError(value["error"], value["message"])
        return value

    def _end_process(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def stop(self) -> None:
        """End the driver and every browser process that it left behind."""
        self._end_process()
        # A dying browser may still write into its profile: a second look is enough.
        for _ in range(20):
            shutil.rmtree(self.folder, ignore_errors=True)
            if not os.path.exists(self.folder):
                return
            time.sleep(0.1)


class Element:
    """An element of the page that is open."""

    def __init__(self, browser: Browser, key: str) -> None:
        self.browser = browser
        self.key = key

    def _call(self, method: str, path: str, body: object = None) -> Any:
        return self.browser.call(method, f"/element/{self.key}{path}", body)

    def click(self) -> None:
        self._call("POST", "/click")

    def clear(self) -> None:
        self._call("POST", "/clear")

    def send_keys(self, text: str) -> None:
        self._call("POST", "/value", {"text": text})

    def text(self) -> str:
        return str(self._call("GET", "/text"))

    def displayed(self) -> bool:
        return bool(self._call("GET", "/displayed"))

    def attribute(self, name: str) -> str | None:
        found: str | None = self._call("GET", f"/attribute/{name}")
        return found

    def property(self, name: str) -> Any:
        return self._call("GET", f"/property/{name}")

    def role(self) -> str:
        """The role that assistive technology is told."""
        return str(self._call("GET", "/computedrole"))

    def label(self) -> str:
        """The name that assistive technology is told."""
        return str(self._call("GET", "/computedlabel"))


class Browser:
    """One window of one fresh profile: no cache, no storage of an earlier run."""

    def __init__(self, arguments: Iterable[str] = ()) -> None:
        program = installed(BROWSERS, "Chromium")
        self.driver = Driver()
        try:
            self.session = self._new_session(program, [*ARGUMENTS, *arguments])
        except BaseException as error:
            self.driver.stop()
            if isinstance(error, WebDriverError):
                raise BrowserMissing(f"Chromium does not start: {error}") from error
            raise

    def _new_session(self, program: str, arguments: list[str]) -> str:
        profile = os.path.join(self.driver.folder, "profile")
        chrome = {
            "binary": program,
            "args": [*arguments, f"--user-data-dir={profile}"],
        }
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": chrome,
            "goog:loggingPrefs": {"browser": "ALL"},
            # A dialog nobody expects must fail the test, not hang it.
            "unhandledPromptBehavior": "dismiss and notify",
        }
        capabilities = {"capabilities": {"alwaysMatch": wanted}}
        answer = self.driver.call("POST", "/session", capabilities)
        return str(answer["sessionId"])

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        try:
            with contextlib.suppress(WebDriverError, OSError):
                self.call("DELETE", "")
        finally:
            self.driver.stop()

    def call(self, method: str, path: str, body: object = None) -> Any:
        return self.driver.call(method, f"/session/{self.session}{path}", body)

    # Pages

    def open(self, url: str) -> None:
        self.call("POST", "/url", {"url": url})

    def reload(self) -> None:
        self.call("POST", "/refresh")

    def title(self) -> str:
        return str(self.call("GET", "/title"))

    def resize(self, width: int, height: int) -> None:
        self.call("POST", "/window/rect", {"width": width, "height": height})

    def screenshot(self, path: str | os.PathLike[str]) -> None:
        Path(path).write_bytes(base64.b64decode(self.call("GET", "/screenshot")))

    @contextlib.contextmanager
    def new_tab(self) -> Iterator[None]:
        """Work in a second tab of the same profile; it is closed at the end."""
        first = self.call("GET", "/window")
        second = self.call("POST", "/window/new", {"type": "tab"})["handle"]
        self.call("POST", "/window", {"handle": second})
        try:
            yield
        finally:
            self.call("DELETE", "/window")
            self.call("POST", "/window", {"handle": first})

    # What the page holds

    def run(self, script: str, *arguments: object) -> Any:
        """Run the body of a function in the page; what it returns comes back."""
        body = {"script": script, "args": list(arguments)}
        return self.call("POST", "/execute/sync", body)

    def find(self, selector: str) -> Element:
        body = {"using": "css selector", "value": selector}
        return Element(self, self.call("POST", "/element", body)[ELEMENT])

    def find_all(self, selector: str) -> list[Element]:
        body = {"using": "css selector", "value": selector}
        found = self.call("POST", "/elements", body)
        return [Element(self, one[ELEMENT]) for one in found]

    def set_files(self, selector: str, paths: Iterable[str | os.PathLike[str]]) -> None:
        """Choose files of the disk (or a folder) in an <input type=file>."""
        names = [os.path.abspath(path) for path in paths]
        self.find(selector).send_keys("\n".join(names))

    def wait_for(
        self, wanted: str | Callable[[], Any], seconds: float = 60, what: str = ""
    ) -> Any:
        """Ask again and again, a script or a function, until the answer is true."""

        def ask() -> Any:
            return self.run(wanted) if isinstance(wanted, str) else wanted()

        end = time.monotonic() + seconds
        while True:
            found = ask()
            if found:
                return found
            if time.monotonic() > end:
                raise Waited(f"not within {seconds} s: {what or wanted}")
            time.sleep(0.02)

    def console(self) -> list[str]:
        """What the browser's console said since the last question."""
        entries = self.call("POST", "/se/log", {"type": "browser"})
        return [f"{entry['level']} {entry['message']}" for entry in entries]

    # Keys, the network, and the DevTools protocol

    def press(self, *keys: str) -> None:
        """Press and release keys at what has the focus (WebDriver's code points)."""
        actions = [
            {"type": kind, "value": key}
            for key in keys
            for kind in ("keyDown", "keyUp")
        ]
        keyboard = {"type": "key", "id": "keyboard", "actions": actions}
        self.call("POST", "/actions", {"actions": [keyboard]})

    def devtools(self, command: str, **parameters: object) -> Any:
        body = {"cmd": command, "params": parameters}
        return self.call("POST", "/goog/cdp/execute", body)

    def network(
        self, upload_bytes_per_second: int | None = None, offline: bool = False
    ) -> None:
        """Make the network slow or dead; without arguments make it fast again."""
        self.devtools("Network.enable")
        self.devtools(
            "Network.emulateNetworkConditions",
            offline=offline,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=upload_bytes_per_second or -1,
        )
