"""Text that every Python installation carries: documentation topics, docstrings and source of the standard library.

Ours, and the diet of the seedling. Modules named in `skip` are left out whole, so that there is text the model has not
seen; a share of the other documents is kept apart by a hash of its name, the same on every machine with the same Python.
"""

import ast
import hashlib
import inspect
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modelwright.core.errors import UserError
from modelwright.core.knobs import knob

# Tables, tests, and what some distributions leave out.
_NEVER = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "tkinter", "turtledemo", "distutils",
          "ensurepip", "pydoc_data", "__pycache__", "lib-dynload"}


@dataclass(frozen=True)
class Knobs:
    parts: list[str] = knob(["topics", "docstrings", "source"], "which kinds of text")
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
            for name, text in _KINDS[kind](knobs):
                apart = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 < knobs.heldout
                if knobs.share != "all" and apart != (knobs.share == "heldout"):
                    continue
                if knobs.characters and characters >= knobs.characters:
                    break
                out.write(json.dumps({"text": text, "kind": kind, "name": name}) + "\n")
                documents, characters = documents + 1, characters + len(text)
            facts[kind] = {"documents": documents, "characters": characters}
    if not sum(f["documents"] for f in facts.values()):
        raise UserError("no text was found", "skip, only and share leave nothing", "loosen them")
    return facts


def _topics(knobs: Knobs) -> Iterator[tuple[str, str]]:
    if not knobs.only:
        from pydoc_data.topics import topics

        yield from ((f"topic:{k}", inspect.cleandoc(v)) for k, v in sorted(topics.items()))


def _files(knobs: Knobs) -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if not _NEVER & set(parts) and parts[0] not in knobs.skip and (not knobs.only or parts[0] in knobs.only) and not parts[0].startswith("config-"):
            yield ".".join(parts), file.read_text(encoding="utf-8", errors="replace")


def _source(knobs: Knobs) -> Iterator[tuple[str, str]]:
    for name, text in _files(knobs):
        if text.strip():
            yield f"source:{name}", text


def _docstrings(knobs: Knobs) -> Iterator[tuple[str, str]]:
    for name, text in _files(knobs):
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        found = [ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
        words = "\n\n".join(d for d in found if d)
        if len(words) > 40:
            yield f"docstrings:{name}", words


_KINDS = {"topics": _topics, "docstrings": _docstrings, "source": _source}
