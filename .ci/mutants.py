"""Does the model find each rule of the store that is broken on purpose, one at a time?

``mutants.py`` breaks what mutants.txt says in a copy of flowserver.py, lets the model
run on it, and prints how soon it fails; ``mutants.py WORD...`` takes those rules only
whose name has one of the words.  FLOWSERVER_MODEL is the number of runs after which one
counts as not found.  What no client of the model does is for the test of
test_flowserver.py that its block names.  No part of the tests: it takes an hour.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = (HERE.parent / "flowserver.py").read_text(encoding="utf-8")


def mutants() -> Iterator[tuple[str, str, str, str]]:
    """Yield what is broken, the lines as they are, the broken ones, and a test."""
    for block in (HERE / "mutants.txt").read_text(encoding="utf-8").split("\n# ")[1:]:
        what, *lines = block.splitlines()
        right, wrong, test = (
            "".join(f"{line[1:]}\n" for line in lines if line.startswith(sign))
            for sign in "-+="
        )
        yield what, right, wrong, test.strip()


def outcome(folder: Path, right: str, wrong: str, test: str) -> str:
    """Say how soon the model finds what is broken, or whether that test does."""
    if SOURCE.count(right) != 1:
        return f"these lines stand there {SOURCE.count(right)} times"
    broken = folder / "flowserver.py"
    broken.write_text(SOURCE.replace(right, wrong), encoding="utf-8")
    script = HERE / "test_model.py"
    if test:  # it takes the flowserver.py beside it
        script = Path(shutil.copy(HERE.parent / "test_flowserver.py", folder))
    command = [sys.executable, "-B", str(script), *filter(None, [test])]
    environment = {**os.environ, "FLOWSERVER_FILE": str(broken)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode == 0:
        return "NOT FOUND"
    if test:
        is_test = re.search(r"^(FAIL|ERROR): \w+ \(__main__", run.stderr, re.M)
        return test if is_test else run.stderr[-300:]
    found = re.search(r"AssertionError: seed (\d+)(?:.*\n)*?-> (.*)", run.stderr)
    return f"{found[1]:>5} {found[2][:120]}" if found else run.stderr[-300:]


def main(words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for what, *block in mutants():
            if not words or any(word in what for word in words):
                print(f"{what:65}{outcome(Path(folder), *block)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
