"""Text that every Python installation carries: documentation topics, docstrings and source of the standard library, and
the names of Unicode's characters.

Ours, and the diet of the seedling. Modules named in `skip` are left out whole, so that there is text the model has not
seen; a share of the other documents is kept apart by a hash of its name, the same on every machine with the same Python.
"""

import ast
import hashlib
import inspect
import json
import sys
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from modelwright.core.errors import UserError
from modelwright.core.knobs import knob

# Tables, tests, and what some distributions leave out.
_NEVER = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "encodings",
    "tkinter",
    "turtledemo",
    "distutils",
    "ensurepip",
    "pydoc_data",
    "__pycache__",
    "lib-dynload",
}

_BY_RULE = ("CJK", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN", "VARIATION", "EGYPTIAN HIEROGLYPH", "ANATOLIAN HIEROGLYPH")
_BLOCK = 64


@dataclass(frozen=True)
class Knobs:
    parts: list[str] = knob(["topics", "docstrings", "source"], "which kinds of text; also: unicode")
    skip: list[str] = knob([], "packages or modules left out whole")
    only: list[str] = knob([], "take only these packages or modules; empty: all")
    share: Literal["train", "heldout", "all"] = knob("all", "the training documents, the ones kept apart, or both")
    heldout: float = knob(0.05, "share of the documents kept apart", low=0, high=1)
    characters: int | None = knob(None, "stop after this many characters per kind", low=1)


def stdlib(knobs: Knobs, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Write `dataset.jsonl` (columns text, kind, name) into `folder`; returns counts per kind."""
    facts: dict[str, Any] = {}
    with open(folder / "dataset.jsonl", "w", encoding="utf-8") as out:
        for kind in knobs.parts:
            if kind not in _KINDS:
                raise UserError(f"parts has '{kind}'", f"known are {', '.join(_KINDS)}")
            documents, characters = 0, 0
            for name, make in _KINDS[kind](knobs):
                apart = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 < knobs.heldout
                if knobs.share != "all" and apart != (knobs.share == "heldout") or not (text := make()):
                    continue
                if knobs.characters and characters >= knobs.characters:
                    break
                out.write(json.dumps({"text": text, "kind": kind, "name": name}) + "\n")
                documents, characters = documents + 1, characters + len(text)
            facts[kind] = {"documents": documents, "characters": characters}
    if not sum(f["documents"] for f in facts.values()):
        raise UserError("no text was found", "skip, only and share leave nothing", "loosen them")
    return facts


Documents = Iterator[tuple[str, Callable[[], str]]]  # a name, and how to make the text if it is wanted


def _topics(knobs: Knobs) -> Documents:
    if not knobs.only:
        from pydoc_data.topics import topics

        yield from ((f"topic:{k}", partial(inspect.cleandoc, v)) for k, v in sorted(topics.items()))


def _files(knobs: Knobs) -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if (
            not _NEVER & set(parts)
            and parts[0] not in knobs.skip
            and (not knobs.only or parts[0] in knobs.only)
            and not parts[0].startswith("config-")
        ):
            yield ".".join(parts), file


def _read(file: Path) -> str:
    text = file.read_text(encoding="utf-8", errors="replace")
    return text if text.strip() else ""


def _source(knobs: Knobs) -> Documents:
    yield from ((f"source:{name}", partial(_read, file)) for name, file in _files(knobs))


def _words(file: Path) -> str:
    try:
        tree = ast.parse(_read(file))
    except SyntaxError:
        return ""
    found = [
        ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    words = "\n\n".join(d for d in found if d)
    return words if len(words) > 40 else ""


def _docstrings(knobs: Knobs) -> Documents:
    yield from ((f"docstrings:{name}", partial(_words, file)) for name, file in _files(knobs))


def _names(start: int) -> str:
    names = [(code, unicodedata.name(chr(code), "")) for code in range(start, start + _BLOCK)]
    return "".join(f"U+{code:04X} {name}\n" for code, name in names if name and not name.startswith(_BY_RULE))


def _unicode(knobs: Knobs) -> Documents:
    """One document per 64 code points; names that are made by rule (CJK, Hangul) are left out."""
    yield from ((f"unicode:{start:x}", partial(_names, start)) for start in range(0, sys.maxunicode + 1, _BLOCK))


_KINDS = {"topics": _topics, "docstrings": _docstrings, "source": _source, "unicode": _unicode}


METHOD = stdlib
