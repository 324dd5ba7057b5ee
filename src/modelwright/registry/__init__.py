"""Every method by name: one line each. Nothing is imported until used.

Other packages add methods by an entry point of the group `modelwright.methods` that names a list of `method(...)` lines:

    [project.entry-points."modelwright.methods"]
    my_methods = "my_methods:METHODS"
"""

import ast
import dataclasses
import typing
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from modelwright.core.errors import UserError, did_you_mean, short, shown
from modelwright.core.knobs import Tune, build, knob
from modelwright.registry.entry import (
    ALIGNS,
    CREATES,
    CURATES,
    GATHERS,
    INSPECTS,
    JUDGES,
    MEASURES,
    OURS,
    PROBES,
    REFINES,
    RESHAPES,
    REWARDS,
    SCORES,
    SERVES,
    STOCK,
    TEACHES,
    TUNES,
    WRITES,
    Entry,
    Shape,
    method,
)
from modelwright.registry.plugins import installed
from modelwright.registry.table import ALIASES, FAMILIES, METHODS

__all__ = [
    "ALIGNS", "REWARDS",
    "ALIASES", "CREATES", "CURATES", "FAMILIES", "GATHERS", "INSPECTS", "JUDGES", "MEASURES", "METHODS", "OURS", "PROBES", "REFINES",
    "RESHAPES", "SCORES", "SERVES", "STOCK", "TEACHES", "TUNES", "WRITES", "Entry", "Shape", "doc", "entries", "entry", "families",
    "hint", "knobs", "load", "method", "mixed", "problems", "techniques", "techniques_named", "tuning",
]  # fmt: skip


def entries() -> tuple[Entry, ...]:
    """All methods, those of installed packages included."""
    return installed()[0]


def problems() -> tuple[str, ...]:
    """A sentence for each installed package whose methods could not be read."""
    return installed()[1]


def families() -> list[str]:
    """The families that have methods, in order."""
    return [f for f in FAMILIES if any(e.family == f for e in entries())]


def entry(name: str) -> Entry:
    """The entry called `name`; UserError with the nearest name otherwise."""
    for e in entries():
        if e.name == name:
            return e
    raise UserError(f"unknown step {shown(name)}", "; ".join(problems()), hint(name) or did_you_mean(name, [e.name for e in entries()]))


def hint(name: str) -> str:
    """What a word that names no method and no command is called here, or an empty text."""
    word = name.split(".")[-1].lower().replace("-", "_")
    known = {e.name: e for e in entries()}
    found = [n for n in (*ALIASES.get(word, ()), *(f"{f}.{word}" for f in FAMILIES)) if n in known or " " in n]
    if not found:
        return f"no method for {word} is here yet" if word in ALIASES else ""
    return f"{word} is {' or '.join(dict.fromkeys(found))} here"


def tuning(name: str) -> Entry:
    """The way to tune called `name`, with or without its family."""
    e = entry(name if "." in name else f"tune.{name}")
    if e.shape.driver != "tune":
        ways = ", ".join(one.name.removeprefix("tune.") for one in entries() if one.shape.driver == "tune")
        raise UserError(f"{e.name} is no way to tune", "it does not train", f"choose one of {ways}")
    return e


def load(e: Entry) -> Any:
    """Import the method itself (this may import torch)."""
    return import_module(e.module).METHOD


def mixed(mix: Any) -> list[tuple[Entry, Any]]:
    """The methods that tune.mix puts together, each with its knobs; data and training are shared."""
    shared = {f.name: getattr(mix, f.name) for f in dataclasses.fields(Tune)}
    found = []
    if not mix.methods:
        raise UserError("tune.mix has no methods", how="write tune: [hft, migu]")
    for item in mix.methods:
        name, own = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, {})
        if not isinstance(name, str) or name in ("mix", "tune.mix"):
            raise UserError(
                f"methods has {shown(item)}", "each is a way to tune, or one with its settings", "write methods: [hft, lora: {r: 4}]"
            )
        e = tuning(name)
        if extra := set(own or {}) & shared.keys():
            raise UserError(f"methods.{name} has {', '.join(sorted(extra))}", "data and training are shared", "give it beside methods")
        found.append((e, dataclasses.replace(build(knobs(e), own or {}, f"methods.{name}"), **shared)))
    return found


def techniques(e: Entry, settings: Any) -> list[Any]:
    """The technique of a tuning step, or the techniques of a mix; imports them."""
    return [load(one)(k) for one, k in (mixed(settings) if e.name == "tune.mix" else [(e, settings)])]


def techniques_named(name: str, values: dict[str, Any]) -> list[Any]:
    """The same from a name, with or without its family, and plain settings."""
    return techniques(e := tuning(name), build(knobs(e), values, e.name))


@cache
def _light(path: Path) -> dict[str, Any]:
    # The knobs stand at the head of a file that also imports torch. Running only the head's dataclasses
    # keeps one file per method and lets `check` and `--help` answer in a fraction of a second.
    tree = ast.parse(path.read_text(encoding="utf-8"))
    keep: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in ("dataclasses", "typing", "modelwright.core.knobs"):
            keep.append(node)
        if isinstance(node, ast.ClassDef) and node.name == "Knobs":
            keep.append(node)
    space: dict[str, Any] = {"__name__": f"modelwright.light.{path.stem}", "knob": knob, "dataclass": dataclass, "typing": typing}
    exec(compile(ast.Module(keep, []), str(path), "exec"), space)  # noqa: S102 - a method's own source file
    space["__doc__"] = ast.get_docstring(tree) or ""
    return space


def _head(e: Entry) -> dict[str, Any]:
    """What stands at the head of a method's file; UserError where it cannot be read so."""
    try:
        head = _light(e.file)
        if not dataclasses.is_dataclass(head.get("Knobs")):
            raise TypeError("it has no dataclass named Knobs")
    except UserError:
        raise
    except Exception as error:  # a plug-in's file may hold anything
        why = f"{type(error).__name__}: {short(error)}"
        how = "its Knobs may use the names of dataclasses, typing and modelwright.core.knobs alone"
        raise UserError(f"the settings of {e.name} cannot be read from {e.file}", why, how) from None
    return head


def knobs(e: Entry) -> Any:
    """The method's Knobs dataclass, without importing the method."""
    return _head(e)["Knobs"]


def doc(e: Entry) -> str:
    """The method's docstring, without importing the method."""
    return str(_head(e)["__doc__"])
