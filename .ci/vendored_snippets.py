"""The README's code, as a reader copies it.

Each fenced block that follows a comment like ``<!-- snippet: flask -->`` has that name.
"""

from __future__ import annotations

import re
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"^<!-- snippet: ([a-z0-9-]+) -->\n```[a-z]*\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
MOST_LINES = 15


def readme() -> str:
    return (HOME / "README.md").read_text(encoding="utf-8")


def snippets() -> dict[str, str]:
    found: dict[str, str] = {}
    for name, code in BLOCK.findall(readme()):
        if found.setdefault(name, code) != code:
            raise AssertionError(f"two snippets are called {name}")
    return found


def snippet(name: str) -> str:
    return snippets()[name]


def lines_of_code(code: str) -> list[str]:
    """What is neither blank nor a comment alone."""
    lines = [line.strip() for line in code.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]
