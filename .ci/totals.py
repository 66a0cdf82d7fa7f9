"""Sum up what several runs of unittest said: `N passed, N failed[, N skipped]`.

    totals.py FOLDER

FOLDER holds, for each run, NAME.log (what it printed) and NAME.status (its exit
status); NAME says the version of Python. A run that broke off before unittest's
summary counts as one failed test.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

SUMMARY = re.compile(
    r"^Ran (\d+) tests? in .*\n\n(?:OK|FAILED|NO TESTS RAN)(.*)$", re.M
)
# The name of a test, or of what prepares a class or module, without its subtest.
FAILURE = re.compile(
    r"^={70}\n(?:FAIL|ERROR|UNEXPECTED SUCCESS): (\S+ \([^)\n]*\))", re.M
)
PREPARATION = re.compile(r"(setUp|tearDown)(Class|Module) ")
# Python 3.12.1 alone leaves skipped tests out of "Ran N tests" (gh-113267).
LEAVES_SKIPPED_OUT = re.compile(r" 3\.12\.1\b")


class Totals(NamedTuple):
    passed: int
    failed: int
    skipped: int


def totals(name: str, log: str, status: int) -> Totals:
    """One run. A test with three failing subtests is one failed test."""
    found = list(SUMMARY.finditer(log))
    if not found:
        return Totals(0, 1, 0)
    ran, notes = int(found[-1][1]), found[-1][2]
    skips = re.search(r"skipped=(\d+)", notes)
    skipped = int(skips[1]) if skips else 0
    if LEAVES_SKIPPED_OUT.search(name):
        ran += skipped
    bad = set(FAILURE.findall(log))
    tests = [one for one in bad if not PREPARATION.match(one)]
    passed = max(ran - skipped - len(tests), 0)
    broken = bool(status) and not bad
    return Totals(passed, len(bad) + broken, skipped)


def main(folder: Path) -> int:
    runs = [Totals(0, 0, 0)]
    for log in sorted(folder.glob("*.log")):
        status = log.with_suffix(".status")
        code = int(status.read_text()) if status.is_file() else 1
        runs.append(totals(log.stem, log.read_text(errors="replace"), code))
        print("{:24} {} passed, {} failed, {} skipped".format(log.stem, *runs[-1]))
    passed, failed, skipped = (sum(column) for column in zip(*runs, strict=True))
    line = f"{passed} passed, {failed} failed"
    print(f"{line}, {skipped} skipped" if skipped else line)
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
