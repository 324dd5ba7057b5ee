"""`modelwright list` and `modelwright show`: the methods, from the registry alone."""

from dataclasses import MISSING

import typer

from modelwright import registry
from modelwright.cli.output import print_json, say
from modelwright.core.knobs import Tune, default_of, flat, type_name


def print_list(as_json: bool) -> None:
    """Every method by family, and the ready recipes."""
    from modelwright.runner.recipe import ready_recipes

    entries, recipes = registry.entries(), list(ready_recipes())
    if as_json:
        rows = [
            {"name": e.name, "line": e.line, "paper": e.paper, "takes": e.takes, "gives": e.gives, "loads_in": e.loads_in} for e in entries
        ]
        print_json({"steps": rows, "recipes": recipes})
        return
    width = max(len(e.name) for e in entries)
    for family in registry.families():
        typer.secho(f"{family}: {registry.FAMILIES[family]}", bold=True)
        for e in entries:
            if e.family == family:
                say(f"  {e.name:{width}}  {e.line} ({e.paper})")
    typer.secho("ready recipes", bold=True)
    say("  " + ", ".join(recipes))


def print_one(name: str, as_json: bool) -> None:
    """A ready recipe as its file says, or a method: paper, docstring, knobs."""
    from modelwright.runner.recipe import read, ready_recipes

    if ready := ready_recipes().get(name):
        if as_json:
            print_json(read(name).plain())
        else:
            say(ready.read_text(encoding="utf-8"))
        return
    e = registry.entry(name)
    leaves = flat(registry.knobs(e))
    leaves.sort(key=lambda row: row[0].split(".")[0] in Tune.__dataclass_fields__)  # the method's before the shared ones
    rows = [(n, None if default_of(f) is MISSING else default_of(f), type_name(f.type), f.metadata.get("help", "")) for n, f in leaves]
    if as_json:
        knobs = [dict(zip(("name", "default", "type", "meaning"), row, strict=True)) for row in rows]
        print_json({"name": e.name, "paper": e.paper, "doc": registry.doc(e), "loads_in": e.loads_in, "knobs": knobs})
        return
    loads = f"; the result loads in {e.loads_in}" if e.loads_in else ""
    typer.secho(f"{e.name}  ({e.paper}){loads}", bold=True)
    say(registry.doc(e).strip() + "\n")
    width = max((len(r[0]) for r in rows), default=0)
    for n, default, kind, meaning in rows:
        say(f"  {n:{width}}  {'' if default is None else default!s:10}  {meaning} ({kind})")
