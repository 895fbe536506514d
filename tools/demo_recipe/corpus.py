"""Text of CPython's standard library and its documentation, with whole modules held out."""

from __future__ import annotations

import hashlib
import json
import re
import tokenize
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

# Held out: never read by the tokenizer's or the model's training.  So are their tests and pages.
HELD_OUT = (
    "bisect", "cmd", "colorsys", "contextlib", "copy", "csv", "filecmp", "fnmatch",
    "fractions", "getopt", "graphlib", "gzip", "hmac", "mailcap", "netrc", "queue",
    "sched", "shelve", "shlex", "string", "textwrap", "timeit", "zipapp",
)  # fmt: skip
# Watched during training (learning curves, choices of the recipe); also kept out of it.
VALIDATION = ("cgitb", "fileinput", "glob", "heapq", "pprint", "poplib", "selectors", "uuid")
# Tables and generated text teach nothing about code.
SKIPPED_FOLDERS = ("site-packages", "pydoc_data", "__pycache__", "config-3", "lib-dynload")
TEST_BYTES = 6_000_000
TEST_FILE_LIMIT = 150_000
NEAR_DUPLICATE = 0.5  # share of a file's distinct lines that another file already has
CONTAMINATED = 0.25  # the same against a held-out file, counted on the smaller of both


@dataclass(frozen=True)
class Text:
    """One file: ``source`` is "lib", "test" or "doc", ``name`` its path inside the source."""

    source: str
    name: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def lines_of(text: str) -> set[int]:
    """Hashes of the normalised lines that carry content (at least 12 characters)."""
    squeezed = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return {hash(line) for line in squeezed if len(line) >= 12}


def normalise(text: str) -> str:
    """Unix line ends, no blanks before them, no more than two empty lines, one final newline."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x0c", "")
    text = re.sub(r"[ \t]+\n", "\n", text).expandtabs(8)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"


def read_source(path: Path) -> str | None:
    """A Python file by its declared encoding; None where it cannot be read (tests of that)."""
    try:
        with tokenize.open(path) as file:
            return normalise(file.read())
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None


def is_table(text: str) -> bool:
    """Mostly digits, escapes and punctuation: character maps, data embedded in code."""
    letters = sum(map(str.isalpha, text))
    return "decoding_table" in text or "decoding_map" in text or letters < 0.4 * len(text)


def _module(name: str) -> str:
    """The module a library file, test or page is about: "bisect" of "test/test_bisect.py"."""
    stem = re.sub(r"\.(py|rst\.txt)$", "", name)
    return re.sub(r"^(test/|library/|test_)+", "", stem).split("/")[0]


def _about(name: str, modules: tuple[str, ...]) -> bool:
    module = _module(name)
    return module in modules or re.sub(r"_.*", "", module) in modules


def read_library(lib: Path) -> list[Text]:
    texts = []
    for path in sorted(lib.rglob("*.py")):
        name = path.relative_to(lib).as_posix()
        if any(name.startswith(s) or f"/{s}" in name for s in SKIPPED_FOLDERS):
            continue
        if name.startswith("_sysconfigdata"):
            continue
        text = read_source(path)
        if text is None or len(text) < 200:
            continue
        source = "test" if name.startswith("test/") or "/tests/" in f"/{name}" else "lib"
        if not is_table(text) and (source == "lib" or len(text) <= TEST_FILE_LIMIT):
            texts.append(Text(source, name, text))
    return texts


def read_documentation(sources: Path) -> list[Text]:
    texts = []
    for path in sorted(sources.rglob("*.rst.txt")):
        name = path.relative_to(sources).as_posix()
        texts.append(Text("doc", name, normalise(path.read_text(encoding="utf-8"))))
    return [t for t in texts if len(t.text) >= 200 and not t.name.startswith("whatsnew/changelog")]


class Corpus:
    """The split: ``train``, ``validation``, ``held_out`` and what was dropped, why."""

    def __init__(self, lib: Path, documentation: Path | None) -> None:
        texts = read_library(lib)
        if documentation is not None:
            texts += read_documentation(documentation)
        self.dropped: Counter[str] = Counter()
        self.held_out = self._split(texts, HELD_OUT)
        self.validation = self._split(texts, VALIDATION)
        kept = [t for t in texts if not _about(t.name, HELD_OUT + VALIDATION)]
        self.dropped["about a module kept out"] = (
            len(texts) - len(kept) - len(self.held_out) - len(self.validation)
        )
        self.train = self._limit_tests(self._distinct(kept))

    @staticmethod
    def _split(texts: list[Text], modules: tuple[str, ...]) -> list[Text]:
        found = [t for t in texts if t.source == "lib" and t.name in {f"{m}.py" for m in modules}]
        if len(found) != len(modules):
            raise SystemExit(f"found {len(found)} of the {len(modules)} modules {modules}")
        return found

    def _distinct(self, texts: list[Text]) -> list[Text]:
        """Drop copies, near copies of earlier files, and files that share text with kept-out ones.

        Library first, so that of a library file and its copy in the tests the former stays.
        """
        order = {"lib": 0, "doc": 1, "test": 2}
        owners: defaultdict[int, list[int]] = defaultdict(list)
        guarded = [lines_of(t.text) for t in self.held_out + self.validation]
        kept: list[Text] = []
        digests: set[str] = set()
        for text in sorted(texts, key=lambda t: (order[t.source], t.name)):
            lines = lines_of(text.text)
            shared = Counter(o for line in lines for o in owners[line])
            if text.digest in digests:
                self.dropped["copy"] += 1
            elif shared and max(shared.values()) > NEAR_DUPLICATE * len(lines):
                self.dropped["near copy"] += 1
            elif any(
                len(lines & g) > CONTAMINATED * max(1, min(len(g), len(lines))) for g in guarded
            ):
                self.dropped["shares text with a module kept out"] += 1
            else:
                digests.add(text.digest)
                for line in lines:
                    owners[line].append(len(kept))
                kept.append(text)
        return kept

    def _limit_tests(self, texts: list[Text]) -> list[Text]:
        """Tests up to TEST_BYTES, in an order that depends on nothing but their names."""
        tests = [t for t in texts if t.source == "test"]
        tests.sort(key=lambda t: hashlib.sha256(t.name.encode()).digest())
        taken, total = set(), 0
        for text in tests:
            total += len(text.text)
            if total <= TEST_BYTES:
                taken.add(text.name)
        self.dropped["tests over their share"] = len(tests) - len(taken)
        return [t for t in texts if t.source != "test" or t.name in taken]

    def summary(self) -> dict[str, object]:
        """Counts by part and source, and the kept-out files with their digests."""
        counts: dict[str, dict[str, int]] = {}
        for source in ("lib", "doc", "test"):
            mine = [t for t in self.train if t.source == source]
            counts[source] = {
                "files": len(mine),
                "bytes": sum(len(t.text.encode()) for t in mine),
            }
        kept_out = {
            part: {t.name: {"sha256": t.digest, "bytes": len(t.text.encode())} for t in texts}
            for part, texts in (("held_out", self.held_out), ("validation", self.validation))
        }
        return {"train": counts, "dropped": dict(self.dropped), **kept_out}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for part in ("train", "validation", "held_out"):
            rows = [
                {"source": t.source, "name": t.name, "text": t.text} for t in getattr(self, part)
            ]
            (folder / f"{part}.json").write_text(json.dumps(rows))
        (folder / "summary.json").write_text(json.dumps(self.summary(), indent=1))


def load_part(folder: Path, part: str) -> list[Text]:
    return [Text(**row) for row in json.loads((folder / f"{part}.json").read_text())]
