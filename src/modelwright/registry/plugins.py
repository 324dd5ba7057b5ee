"""Methods that installed packages add, by an entry point of the group `modelwright.methods`."""

import ast
import os
import sys
import typing
from functools import cache
from typing import Any

from modelwright.core.errors import short
from modelwright.registry.entry import Entry, source_of
from modelwright.registry.table import FAMILIES, METHODS

GROUP = "modelwright.methods"


def _declared() -> bool:
    """Whether an installed package declares the group at all. Looking is ten times cheaper than importing importlib.metadata."""
    for folder in dict.fromkeys(sys.path):
        try:
            names = [n for n in os.listdir(folder or ".") if n.endswith((".dist-info", ".egg-info"))]
        except OSError:
            continue
        for name in names:
            try:
                with open(os.path.join(folder, name, "entry_points.txt"), "rb") as file:
                    if GROUP.encode() in file.read():
                        return True
            except OSError:
                continue
    return False


@cache
def installed() -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """Our methods and those of installed packages, and a sentence for each package that could not be read."""
    found = {e.name: e for e in METHODS}
    problems: list[str] = []
    if not _declared():
        return tuple(found.values()), ()
    from importlib import metadata

    for point in metadata.entry_points(group=GROUP):
        try:
            added = _table(point)
            for e in added:
                if not isinstance(e, Entry) or e.family not in FAMILIES or not e.name.split(".", 1)[-1].isidentifier():
                    raise TypeError(f"{e!r} is no method of a family ({', '.join(FAMILIES)})")
                if e.name in found:
                    raise ValueError(f"{e.name} exists already")
                if not e.file.is_file():
                    raise FileNotFoundError(f"{e.name} has no file {e.file}")
        except Exception as error:  # whatever another package does must not take the command line away
            problems.append(f"the methods of {point.value} are left out: {type(error).__name__}: {short(error)}")
        else:
            found |= {e.name: e for e in added}
    return tuple(found.values()), tuple(problems)


def _table(point: typing.Any) -> list[Entry]:
    """The list that an entry point names: its statement alone is run, so that `list` does not import the package.

    Where the statement needs more than this module's names, the package is imported."""
    file = source_of(point.module)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "modelwright.registry" and not n.level]
    named = [n for n in tree.body if isinstance(n, ast.Assign) and [getattr(t, "id", "") for t in n.targets] == [point.attr]]
    space: dict[str, Any] = {}
    try:
        exec(compile(ast.Module([*imports, *named], []), str(file), "exec"), space)  # noqa: S102 - an installed package
        return list(space[point.attr])
    except (NameError, KeyError):
        return list(point.load())
