"""Does the model find every rule of the store that is broken on purpose, one at a time?

``mutants.py`` breaks each in a copy of flowserver.py and lets test_model.py run on it;
``mutants.py WORD...`` does so with the rules whose description has one of the words.
FLOWSERVER_MODEL is the number of runs after which a broken rule counts as not found.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "flowserver.py"

# What is broken, the text that stands in flowserver.py, once, and the wrong one.
MUTANTS = (
    # What may be told of an upload
    (
        "the beginning is no sample",
        "        return (margin, self.ranges.end - margin)",
        "        return (0, self.ranges.end - margin)",
    ),
    (
        "the end is no sample",
        "        return (margin, self.ranges.end - margin)",
        "        return (margin, self.ranges.end)",
    ),
    (
        "tests of a complete upload say that all is here",
        "if not self.is_unfinished or self.is_complete:",
        "if not self.is_unfinished:",
    ),
    (
        "tests of a finished upload say that all is here",
        "if not self.is_unfinished or self.is_complete:",
        "if self.is_complete and not self.finished:",
    ),
    (
        "tests say of what is missing that it is here",
        "low <= start < end <= high and not self.ranges.gaps(start, end)",
        "low <= start < end <= high",
    ),
    (
        "nobody waits for samples",
        "            if state.is_sample(start, end):\n",
        "            if False:\n",
    ),
    (
        "a difference never drops the upload",
        "return Trouble(_UNDONE) if is_late or self.finished else Conflict(_CHANGED)",
        "return Trouble(_UNDONE)",
    ),
    (
        "a difference between two attempts drops the upload",
        "return Trouble(_UNDONE) if is_late or self.finished else Conflict(_CHANGED)",
        "return Trouble(_UNDONE) if self.finished else Conflict(_CHANGED)",
    ),
    (
        "after something came again a new version begins all the same",
        "        if self.came_again and not is_whole:\n",
        "        if False:\n",
    ),
    (
        "a new version is always refused",
        "        if self.came_again and not is_whole:\n",
        "        if not is_whole:\n",
    ),
    (
        "a whole file is refused like a chunk",
        "        if self.came_again and not is_whole:\n",
        "        if self.came_again:\n",
    ),
    (
        "a finished file that was edited counts as intact",
        "return was == (status.st_size, status.st_ino, status.st_mtime_ns)",
        "return was[1] == status.st_ino",
    ),
    (
        "another file of its name counts as intact",
        "return was == (status.st_size, status.st_ino, status.st_mtime_ns)",
        "return was[0] == status.st_size",
    ),
    (
        "a finished file is never intact",
        "return was == (status.st_size, status.st_ino, status.st_mtime_ns)",
        "return False",
    ),
    (
        "a receipt forgets that something came again",
        '        return lines + [("again",)] * self.came_again',
        "        return lines",
    ),
    (
        "a receipt forgets that on_complete has returned",
        '        lines += [("announced",)] * self.is_announced\n',
        "",
    ),
    (
        "a receipt forgets the bodies under way",
        '        lines += [("claim", body, *claim) for body, claim in self.claims.items()]',
        "        pass",
    ),
    (
        "a body takes no place of those of other processes",
        "if other == body or (is_elsewhere and low < end and start < high):",
        "if other == body:",
    ),
    (
        "a body takes the place of all that overlap",
        "if other == body or (is_elsewhere and low < end and start < high):",
        "if other == body or (low < end and start < high):",
    ),
    (
        "every upload is the new version of what was finished",
        "        return self.begun.supersedes == generation",
        "        return True",
    ),
    (
        "no upload is the new version of what was finished",
        "        return self.begun.supersedes == generation",
        "        return False",
    ),
    (
        "two senders have one upload",
        "json.dumps([owner, sender, identifier,",
        "json.dumps([owner, identifier,",
    ),
    (
        "two owners have one upload",
        "json.dumps([owner, sender, identifier,",
        "json.dumps([sender, identifier,",
    ),
    # Ledgers
    (
        "a removed ledger is used",
        "is_here = self.disk.stat(fd).st_nlink > 0",
        "is_here = True",
    ),
    (
        "what is remembered of a ledger is not compared",
        "        if not text.startswith(self._last):\n            return False\n",
        "",
    ),
    (
        "half a line counts",
        '            if not line.endswith(b"\\n") or line[:8] != b"%08x" % check:\n',
        '            if not line.endswith(b"]\\n") and not line.endswith(b"]"):\n',
    ),
    (
        "what others wrote is not read",
        "        if ledger is None or not ledger.read(fd):",
        "        if ledger is None or (setattr(ledger, 'fd', fd)):",
    ),
    (
        "lines are written after half a line, not over it",
        "        self.disk.write(self.fd, text, self._size)\n",
        "        self.disk.write(self.fd, text, self.disk.stat(self.fd).st_size)\n",
    ),
    (
        "no lock between processes",
        "        if waits:\n            disk.lock(fd)\n        yield waits or disk",
        "        yield waits or disk",
    ),
    (
        "a dropped upload's ledger stays",
        "            self.disk.unlink(self.path)\n        elif self._size:",
        "            pass\n        elif self._size:",
    ),
    (
        "what a crash left is not mended",
        "if ledger.state.is_unfinished and self._named(ledger.state):",
        "if False:",
    ),
    (
        "a ledger that was made for nothing stays",
        "if not ledger.state.generation:  # it was made for nothing",
        "if False:",
    ),
    (
        "a ledger is cut down before on_complete has returned",
        "        if not self.announce:\n            ledger.cut_down()",
        "        ledger.cut_down()",
    ),
    # Names
    (
        "a file is overwritten",
        '            if self.policy == "replace":',
        '            if self.policy != "refuse":',
    ),
    (
        "identical bytes make a second copy",
        "if is_new or self._is_same(file, target):",
        "if is_new:",
    ),
    (
        "another file of the name counts as this one",
        "if is_new or self._is_same(file, target):",
        'if is_new or self.policy == "rename":',
    ),
    (
        "names are taken without the lock",
        "                with lock_of(self.disk, self._lock):\n",
        "                if True:\n",
    ),
    (
        "a link in place of the rename is not known again",
        "if (mine.st_ino, mine.st_dev) == (existing.st_ino, existing.st_dev):",
        "if False:",
    ),
    # Beginnings and ends
    (
        "the end waits for nobody",
        "                self.expected.wait(key)\n",
        "                pass\n",
    ),
    (
        "the end waits for samples, not for bodies",
        "ends = [one.until for one in self._all if one.key == key]",
        "ends = [one.until for one in self._all if one.key == key and not one.body]",
    ),
    (
        "the end waits for other uploads, not for this one",
        "ends = [one.until for one in self._all if one.key == key]",
        "ends = [one.until for one in self._all if one.key != key]",
    ),
    (
        "a sample that was asked for is no more expected when another is",
        "(one.key, one.start < 1) != (key, is_first)",
        "one.key != key",
    ),
    (
        "a body under way does not end the wait for its sample",
        "if one.body or one.key != key or one.end <= start or end <= one.start",
        "if True",
    ),
    (
        "any body ends the wait for all samples",
        "if one.body or one.key != key or one.end <= start or end <= one.start",
        "if one.body or one.key != key",
    ),
    (
        "nobody hears of the end of a body",
        "            self._change.notify_all()\n",
        "            pass\n",
    ),
    (
        "whichever version is there is finished",
        "                if ledger is None or ledger.state.generation != state.generation:\n"
        "                    raise Conflict(_CANCELLED)\n"
        "                state, is_new",
        "                assert ledger\n                state, is_new",
    ),
    (
        "an upload is finished twice",
        "                state, is_new = ledger.state, not ledger.state.finished",
        "                state, is_new = ledger.state, True",
    ),
    (
        "what a crash has named is named again",
        "place = self._named(state) or self._name(ledger, fields)",
        "place = self._name(ledger, fields)",
    ),
    (
        "no line says that a name is about to be given",
        '            ledger.append(("publish", path, status.st_ino, fields))\n',
        "",
    ),
    (
        "a crash is known again by the name alone",
        "(status.st_ino, status.st_size) == (place.inode, size)",
        "status.st_size == size",
    ),
    (
        "the old name of a finished file stays",
        "        discard(self.disk, ledger.data_path)\n        self._change_count(-1)\n"
        "        if not",
        "        self._change_count(-1)\n        if not",
    ),
    (
        "a receipt is not written",
        '        ledger.append(("finished", *place))\n',
        "        ledger.empty()\n",
    ),
    (
        "the time of a finished file is not written down",
        "inode=status.st_ino, modified=status.st_mtime_ns)",
        "inode=status.st_ino)",
    ),
    (
        "on_complete is called without a lock",
        "        with lock_of(self.disk, path, waits) as fd:\n",
        "        for fd in (0,):\n",
    ),
    (
        "on_complete is called again after it has returned",
        "if ledger.state.is_announced or generation in self._announced:",
        "if generation in self._announced:",
    ),
    (
        "no line says that on_complete has returned",
        '                    ledger.append(("announced",))\n',
        "",
    ),
    (
        "nobody waits for on_complete",
        "is_new = self.announce_end(state, waits=is_new) or is_new",
        "is_new = is_new",
    ),
    (
        "a new version begins while on_complete runs",
        "        if self.announce and not ledger.state.is_announced:\n",
        "        if False:\n",
    ),
    (
        "a receipt stays after the refusal",
        "        except Conflict:\n            self.drop(ledger)\n            raise\n"
        "        self.begin",
        "        except Conflict:\n            raise\n        self.begin",
    ),
    (
        "no line says that something came again",
        '            ledger.append(("again",))\n',
        "            pass\n",
    ),
    (
        "what comes again does not keep the receipt",
        "            self.disk.touch(ledger.path)\n",
        "            pass\n",
    ),
    (
        "the data of a dropped upload stays",
        "        ledger.empty()\n        discard(self.disk, ledger.data_path)\n",
        "        ledger.empty()\n",
    ),
    # Bodies
    (
        "recorded bytes are rewritten",
        "                gaps = ledger.state.ranges.gaps(start, end)\n",
        "                gaps = [(start, end)]\n",
    ),
    (
        "what was missing at the beginning is written, whoever was faster",
        "                gaps = ledger.state.ranges.gaps(start, end)\n",
        "                gaps = Ranges(self._missing).within(start, end)\n",
    ),
    (
        "a body goes on in another version",
        "        if ledger is None or ledger.state.generation != self._generation:\n"
        "            raise Conflict(_CANCELLED)\n        if self._missing",
        "        if ledger is None:\n"
        "            raise Conflict(_CANCELLED)\n        if self._missing",
    ),
    (
        "a body goes on without a claim",
        "        if self._missing and self.name not in ledger.state.claims:\n",
        "        if False:\n",
    ),
    (
        "recorded bytes are not compared",
        "        for low, high in Ranges(gaps).gaps(start, end):\n",
        "        for low, high in ():\n",
    ),
    (
        "what is refused stays",
        "            if isinstance(error, Conflict):\n                self._uploads.drop",
        "            if False:\n                self._uploads.drop",
    ),
    (
        "a body does not end those whose bytes it overwrites",
        '                ledger.append(("claim", other.name, 0, 0))\n'
        "                self._uploads",
        "                self._uploads",
    ),
    (
        "a body ends those whose bytes it brings once more",
        "if other is not self and low < high and not self._is_stored(piece, low):",
        "if other is not self and low < high:",
    ),
    (
        "the equal beginning does not follow into the new version",
        "        end, self.position = self.position, self.start\n",
        "        end = self.start\n",
    ),
    (
        "the equal beginning is not looked at again",
        "        _require_intact(published, file)\n\n    # Ends",
        "\n    # Ends",
    ),
    (
        "a chunk leaves for any version that is there",
        "            if not ledger or not (is_first or state.follows(self._generation)):",
        "            if not ledger:",
    ),
    (
        "a chunk leaves for a version that is finished",
        "            elif state.finished:\n                raise Trouble(_UNDONE)\n",
        "",
    ),
    (
        "what came again is not looked at again",
        "                _require_intact(published, file)\n"
        "                self._uploads.note",
        "                self._uploads.note",
    ),
    (
        "what came again counts although the version is over",
        "            if ledger and ledger.state.generation == self._generation:\n"
        "                _require",
        "            if ledger:\n                _require",
    ),
    (
        "half a chunk is recorded as a whole one",
        "gaps = ledger.state.ranges.gaps(self.start, self.position)",
        "gaps = ledger.state.ranges.gaps(self.start, self.end)",
    ),
    (
        "a short body counts",
        "        if size != wanted:\n            raise Truncated(",
        "        if False:\n            raise Truncated(",
    ),
    (
        "what is recorded at the end is not written down as again",
        "            if is_end and ledger.state.finished:\n"
        "                self._uploads.note_again(ledger)\n            return",
        "            return",
    ),
    (
        "a body is expected no more before it is recorded",
        "            state = self._came_again() or self._record(is_end=True)\n",
        "            self._uploads.expected.end(self)\n"
        "            state = self._came_again() or self._record(is_end=True)\n",
    ),
    (
        "a broken body keeps its claim",
        '        if self._missing:\n            ledger.append(("claim", self.name, 0, 0))'
        "\n        state = ledger.state",
        "        state = ledger.state",
    ),
    (
        "an upload of no bytes stays",
        "        if is_empty and not state.finished:\n            self._uploads.drop(ledger)",
        "        pass",
    ),
    (
        "a broken body drops the upload",
        "        if is_empty and not state.finished:\n            self._uploads.drop(ledger)",
        "        self._uploads.drop(ledger)",
    ),
    (
        "a broken body drops the upload while others send",
        "is_empty = not (state.ranges.total or state.claims or state.begun.is_kept)",
        "is_empty = not state.ranges.total",
    ),
    (
        "a broken body's part stays",
        "        if self._part:\n            self._part.remove()\n",
        "",
    ),
    (
        "a data file stays open",
        "        if self._data:\n            self._data.close()\n        self._uploads",
        "        self._uploads.leaked = [*getattr(self._uploads, 'leaked', ()), self]\n"
        "        self._uploads",
    ),
    (
        "a whole file passes by an upload that is there",
        "            elif ledger and (ledger.state.generation or not is_aside):",
        "            elif ledger and not is_aside:",
    ),
    (
        "a finished file that is gone is compared all the same",
        "        if ledger.state.is_intact(self._disk.stat_path(path)):",
        "        if self._disk.stat_path(path):",
    ),
    (
        "what is sent again after the end is a new upload",
        "            if ledger and ledger.state.finished:\n"
        "                self._begin_after_end(ledger, ledger.state.finished)\n",
        "            if ledger and ledger.state.finished:\n"
        "                uploads.supersede(ledger, self.upload, self.is_whole)\n"
        "                self._join(ledger)\n",
    ),
    (
        "what was missing is not asked when a body begins",
        "        self._missing = ledger.state.ranges.gaps(self.start, self.end)\n",
        "        self._missing = [(self.start, self.end)]\n",
    ),
    # The store
    (
        "a finished upload can be cancelled",
        "            if ledger is None or not ledger.state.is_unfinished:\n"
        "                return False",
        "            if ledger is None:\n                return False",
    ),
    (
        "a cancel does nothing",
        "            if ledger is None or not ledger.state.is_unfinished:\n"
        "                return False",
        "            return False",
    ),
    (
        "a sweep takes what is being sent",
        "is_over = is_lost or is_free and age > stale_after",
        "is_over = is_lost or age > stale_after",
    ),
    (
        "a sweep takes what is unfinished after an hour",
        "is_over = is_lost or is_free and age > stale_after",
        "is_over = is_lost or is_free and age > keep_receipts",
    ),
    (
        "stale uploads stay",
        "is_over = is_lost or is_free and age > stale_after",
        "is_over = is_lost",
    ),
    (
        "a sweep takes receipts at once",
        "is_over = is_free and is_told and age > keep_receipts",
        "is_over = is_free and is_told",
    ),
    (
        "a sweep takes receipts that were not announced",
        "is_over = is_free and is_told and age > keep_receipts",
        "is_over = is_free and age > keep_receipts",
    ),
    (
        "a sweep takes receipts that are being compared",
        "is_over = is_free and is_told and age > keep_receipts",
        "is_over = is_told and age > keep_receipts",
    ),
    (
        "receipts stay",
        "is_over = is_free and is_told and age > keep_receipts",
        "is_over = False",
    ),
    (
        "a sweep does not finish what a crash left",
        "                if is_free and state.is_unfinished and state.is_complete:\n",
        "                if False:\n",
    ),
    (
        "a sweep finishes what others wait for",
        "                if is_free and state.is_unfinished and state.is_complete:\n",
        "                if state.is_unfinished and state.is_complete:\n",
    ),
    (
        "a sweep announces nothing",
        "        uploads.announce_end(state, waits=False)\n        return state",
        "        return state",
    ),
    (
        "a sweep looks at the ledger's age alone",
        "files = filter(None, (self.disk.stat(ledger.fd), data))",
        "files = filter(None, (self.disk.stat(ledger.fd),))",
    ),
    (
        "a sweep takes the data of the present version",
        "            elif name != kept:\n",
        "            elif name != kept or not state.finished:\n",
    ),
    (
        "a sweep leaves the data of earlier versions",
        "            elif name != kept:\n",
        "            elif False:\n",
    ),
    (
        "private files stay",
        '            if name.endswith(".part"):\n',
        "            if False:\n",
    ),
    (
        "a sweep takes private files at once",
        "                self._unlink_old(name, _LEFTOVER_SECONDS)\n",
        "                self._unlink_old(name, 0)\n",
    ),
    # Senders
    (
        "a cookie is not believed",
        "return self._remembered(request) or self._seen(",
        "return self._seen(",
    ),
    (
        "the last cookie counts",
        "        for name, signature in _cookies(request):\n            sender",
        "        for name, signature in reversed(list(_cookies(request))):\n"
        "            sender",
    ),
    (
        "each process has a key of its own",
        "        key = disk.read(fd, 32, 0)\n",
        '        key = b""\n',
    ),
    (
        "the address says nothing",
        'self._hash("sender", where, agent)',
        'self._hash("sender", agent)',
    ),
)


def outcome(folder: Path, old: str, new: str) -> str:
    """Say how soon the model finds what is broken."""
    source = SOURCE.read_text(encoding="utf-8")
    if source.count(old) != 1:
        return f"STANDS THERE {source.count(old)} TIMES"
    broken = folder / "flowserver.py"
    broken.write_text(source.replace(old, new), encoding="utf-8")
    command = [sys.executable, "-B", str(HERE / "test_model.py")]
    environment = {**os.environ, "FLOWSERVER_FILE": str(broken)}
    try:
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=600
        )
    except subprocess.TimeoutExpired:
        return "it hangs"
    if run.returncode == 0:
        return "NOT FOUND"
    found = re.search(r"AssertionError: seed (\d+)(?:.*\n)*?-> (.*)", run.stderr)
    return f"seed {found[1]:>4}: {found[2][:100]}" if found else run.stderr[-300:]


def main(words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for what, old, new in MUTANTS:
            if not words or any(word in what for word in words):
                print(f"{what:66} {outcome(Path(folder), old, new)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
