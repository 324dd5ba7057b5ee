"""Docstrings and tables as Markdown."""

import re
from typing import Any

_OURS = r"Ours\b"
_OFFICIAL = r"(?:Official|(?:The|No) (?:official|released|published)) code\b"
_FOR = r"(?:What for:|When to use it:|Use it )"
_MARKERS = {"ours": _OURS, "official": _OFFICIAL, "what for": _FOR}
_SPLIT = re.compile(rf"(?<=[.:)]\s)(?={_OURS}|{_OFFICIAL}|{_FOR})")
_ITEM = re.compile(r"(- |\d+\. )")


def docstring(doc: str) -> dict[str, list[str]]:
    """The lines of a docstring by section: intro (its first sentence), what for, method, official, ours.

    A paragraph, or a sentence within one, that begins with a marker (Ours, The official code, What for) opens its section.
    Lists and equations stay with the text that they follow without an empty line; others belong to the method.
    """
    parts: dict[str, list[str]] = {k: [] for k in ("intro", "what for", "method", "official", "ours")}
    section = "intro"
    for n, (kind, lines, apart) in enumerate(_blocks(doc)):
        if apart:
            section = "method"
        if kind == "text":
            for piece in filter(None, (p.strip() for p in _SPLIT.split("\n".join(lines)))):
                marked = next((name for name, marker in _MARKERS.items() if re.match(marker, piece)), None)
                section = marked or ("intro" if n == 0 else "method")
                parts[section] += [*_escape(piece).split("\n"), ""]
        elif kind == "items":
            parts[section] += [*map(_escape, lines), ""]
        else:
            parts[section if section != "intro" else "method"] += ["```text", *lines, "```", ""]
    return parts


def _blocks(doc: str) -> list[tuple[str, list[str], bool]]:
    """Paragraphs of text, lists and indented lines (equations), in order, and whether an empty line stands before each."""
    found: list[tuple[str, list[str], bool]] = []
    last = ""
    for line in doc.strip().split("\n"):
        kind = _kind(line, last)
        if kind and kind == last:
            found[-1][1].append(line)
        elif kind:
            found.append((kind, [line], not last))
        last = kind
    return [(kind, _dedented(lines) if kind == "code" else lines, apart) for kind, lines, apart in found]


def _kind(line: str, last: str) -> str:
    if not line.strip():
        return ""
    if _ITEM.match(line) or (last == "items" and line.startswith("  ")):
        return "items"
    return "code" if line.startswith("    ") else "text"


def _dedented(lines: list[str]) -> list[str]:
    least = min(len(line) - len(line.lstrip()) for line in lines)
    return [line[least:] for line in lines]


def _escape(text: str) -> str:
    """Text whose <, * and _ are themselves; what stands in backticks is left alone."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"(?<![\w\\])_(?=\w)|(?<=\w)_(?!\w)", r"\\_", p.replace("<", "&lt;").replace("*", "\\*")) for p in parts[::2]]
    return "`".join(parts)


def cell(value: Any) -> str:
    """A value in a table or a list: four digits, and no character that would end the cell."""
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return text.replace("|", "\\|").replace("<", "&lt;")


def table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(map(cell, columns)) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
