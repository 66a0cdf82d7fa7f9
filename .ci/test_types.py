"""What a type checker says of programs that use flowserver.py.

An editor completes from the same knowledge. FLOWSERVER_FILE names another
flowserver.py, to see these tests fail on a broken one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVER = Path(os.environ.get("FLOWSERVER_FILE") or HERE.parent / "flowserver.py")

RIGHT = """
import pathlib
from flowserver import *

def arrived(done: Done) -> None:
    print(done.path)

try:
    settings = Settings(upload_dir="x", sync=False, port=8000, max_file_size="8M",
        trusted_proxies=["10.0.0.0/8"])
    settings = Settings(upload_dir=pathlib.Path("x"), port="8000", temp_dir=None)
    UploadApp(settings, on_complete=arrived)
except (SettingsError, Trouble) as error:
    print(error)
port: int = settings.port
sync: bool = settings.sync
names: tuple[str, ...] = settings.allow_hosts
"""
WRONG = {
    'Settings(upload_dri="x")': "upload_dri",
    'Settings("x")': "positional",
    "Settings(port=1.5)": "port",
    'UploadApp("uploads")': '"UploadApp" has incompatible type',
    "text: str = Settings().port": "Incompatible types in assignment",
    "Settings().prot": "prot",
    "Settings().port = 80": "read-only",
}


class CheckerTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="flowserver-ci-")
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        shutil.copy(SERVER, self.folder / "flowserver.py")

    def complaints(self, program: str) -> list[str]:
        """Return what mypy says of a program beside flowserver.py."""
        (self.folder / "program.py").write_text(program)
        command = [sys.executable, "-m", "mypy", "--strict", "program.py"]
        command += ["--python-version", "3.9", "--cache-dir", str(self.folder / "kept")]
        ended = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        self.assertEqual(ended.stderr, "")
        return re.findall("(?m)^.* error: .*$", ended.stdout)

    def test_what_the_documentation_allows_is_right(self) -> None:
        self.assertEqual(self.complaints(RIGHT), [])

    def test_each_mistake_is_found(self) -> None:
        head = "from flowserver import Settings, UploadApp\n"
        found = self.complaints(head + "\n".join(WRONG))
        self.assertEqual(len(found), len(WRONG), found)
        for line, (mistake, words) in zip(found, WRONG.items(), strict=True):
            self.assertIn(words, line, mistake)


if __name__ == "__main__":
    unittest.main()
