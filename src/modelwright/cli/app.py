"""The command line. --help, list, show and check import neither torch nor transformers."""

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperGroup

from modelwright import __version__, registry
from modelwright.core.errors import UserError, did_you_mean
from modelwright.core.knobs import Tune, default_of, flat, type_name
from modelwright.runner import recipe as recipes

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override, as in steps.1.train.lr=3e-4; steps count from 0.")
]


class _Group(TyperGroup):
    """The fixed commands, and one group per family whose commands are read off the registry when asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_families()]

    def get_command(self, ctx: Any, name: str) -> Any:
        known = [*super().list_commands(ctx), *_families()]
        if name not in known:
            raise UserError(f"unknown command '{name}'", how=did_you_mean(name, known))
        return super().get_command(ctx, name) or _family(name)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A workshop for language models: reshape, tune, align, serve and inspect checkpoints, with a proof printed for every step.",
)


def _families() -> list[str]:
    return registry.families()


def _family(family: str) -> Any:
    group = typer.Typer(add_completion=False, no_args_is_help=True, help=registry.FAMILIES[family], rich_markup_mode=None)

    class Steps(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return [e.name.split(".")[1] for e in registry.entries() if e.family == family]

        def get_command(self, ctx: Any, name: str) -> Any:
            name = name.replace("-", "_")
            entry = registry.entry(f"{family}.{name}")
            single = typer.Typer(rich_markup_mode=None, add_completion=False)
            single.command(name, help=f"{entry.line}. {entry.paper}.")(_step_command(entry))
            return typer.main.get_command(single)

    group.info.cls = Steps
    command = typer.main.get_group(group)
    command.name = family
    return command


def _step_command(e: registry.Entry) -> Callable[..., None]:
    """A function whose signature is the method's knobs."""
    P = inspect.Parameter
    params = []
    if "checkpoint" in (*e.takes, *e.may_take):
        base = typer.Option("--base", metavar="PATH", help="Checkpoint folder or hub id.")
        optional = {"default": None} if "checkpoint" in e.may_take else {}
        params.append(P("base", P.KEYWORD_ONLY, annotation=Annotated[str | None if optional else str, base], **optional))
    remark = "must not exist yet." if e.gives else "empty: print only."
    to = typer.Option("--to", metavar="PATH", help=f"Folder of the result; {remark}")
    optional = {} if e.gives else {"default": None}
    params.append(P("to", P.KEYWORD_ONLY, annotation=Annotated[str if e.gives else str | None, to], **optional))
    leaves = flat(registry.knobs(e))
    for name, f in leaves:
        flag = name.replace("_", "-")
        names = [f"--{flag}"] if not name.endswith(".path") else [f"--{flag.removesuffix('.path')}", f"--{flag}"]
        default = default_of(f)
        meaning = f.metadata.get("help", "") + ("" if default in (None, MISSING, [], {}) else f" [{default}]") + f" ({type_name(f.type)})"
        kind = list[str] if get_origin(f.type) is list else bool if f.type is bool else str
        if f.metadata.get("argument"):
            required = {} if default is MISSING else {"default": None}
            shape = typer.Argument(help=meaning, show_default=False, metavar=name.upper())
            params.append(P(name, P.KEYWORD_ONLY, annotation=Annotated[kind | None if required else kind, shape], **required))
            continue
        flags = [f"--{flag}/--no-{flag}"] if f.type is bool else names
        of = get_args(f.type)[0] if get_origin(f.type) is list else f.type
        shape = "YAML" if get_origin(of) is dict or of is Any else {int: "N", float: "X", bool: None}.get(of, "TEXT")
        params.append(
            P(
                name.replace(".", "__"),
                P.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, typer.Option(*flags, help=meaning, show_default=False, metavar=shape)],
            )
        )
    for name, kind, option, default in (
        ("seed", int, typer.Option("--seed", help="Seed of every random draw."), 0),
        ("save", list[str] | None, typer.Option("--save", metavar="KEY=VALUE", help="shard_size, certificate, force."), None),
        *([("nproc", int, typer.Option("--nproc", min=1, help="Processes that train together."), 1)] if e.family == "tune" else []),
        ("as_json", bool, typer.Option("--json", help="Machine-readable output on standard output."), False),
    ):
        params.append(P(name, P.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]))
    kinds = {name: f.type for name, f in leaves}

    def command(**given: Any) -> None:
        raw: dict[str, Any] = {
            "name": e.name,
            "seed": given["seed"],
            "base": given.get("base"),
            "steps": [{e.name: {}}],
            "save": {"to": given["to"]},
        }
        knobs = raw["steps"][0][e.name]
        for name, f in leaves:
            if default_of(f) is MISSING and given[name.replace(".", "__")] is None:
                flag = name.upper() if f.metadata.get("argument") else "--" + name.replace("_", "-").removesuffix(".path")
                raise UserError(f"{flag} is missing", f.metadata.get("help", ""), f"give {flag}")
        for name, kind in kinds.items():
            value = given[name.replace(".", "__")]
            if value is not None:
                *path, last = name.split(".")
                at = knobs
                for part in path:
                    at = at.setdefault(part, {})
                at[last] = _value(kind, value, name)
        for assignment in given["save"] or []:
            recipes.override(raw, f"save.{assignment}")
        _run(recipes.parse(raw, Path.cwd(), e.name), given["as_json"], bool(e.gives or given["to"]), given.get("nproc", 1))

    command.__signature__ = inspect.Signature(params)  # type: ignore[attr-defined]
    return command


def _value(kind: Any, value: Any, name: str) -> Any:
    plain_kinds = {str, int, float, bool}
    if get_origin(kind) is list:
        return [v if get_args(kind)[0] in plain_kinds else recipes.read_yaml(v, f"--{name}") for v in value]
    return recipes.read_yaml(value, f"--{name}") if get_origin(kind) is dict else value


def _run(recipe: recipes.Recipe, as_json: bool, keep: bool = True, nproc: int = 1) -> None:
    recipes.check(recipe)
    from modelwright.core.report.progress import choose
    from modelwright.runner.run import run_recipe

    with _resumable(keep):
        result = run_recipe(recipe, choose(as_json), keep, nproc)
    if as_json:
        _print_json(result.plain())
    else:
        result.report.print()
        if result.to:
            typer.echo(f"\nresult  {result.to}\nreport  {result.to / 'report.html'}")


@contextmanager
def _resumable(keep: bool) -> Iterator[None]:
    """Ctrl-C is exit code 130 and a sentence."""
    try:
        yield
    except KeyboardInterrupt:
        typer.secho("stopped; the same command continues where it was" if keep else "stopped; nothing was kept", err=True)
        raise typer.Exit(130) from None


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, default=str))


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a ready one.")],
    sets: Sets = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Processes that train together, started with torchrun.")] = 1,
    as_json: Json = False,
) -> None:
    """Run a recipe. A stopped run continues where it was."""
    _run(recipes.read(recipe, sets or []), as_json, nproc=nproc)


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a ready one.")],
    sets: Sets = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also load configs and data: sizes, memory, first rows.")] = False,
    as_json: Json = False,
) -> None:
    """Check a recipe without running it (no torch)."""
    found = recipes.read(recipe, sets or [])
    remarks = recipes.check(found)
    facts: list[dict[str, Any]] = []
    if deep:
        from modelwright.runner.preview import preview

        facts = preview(found)
    if as_json:
        _print_json({"ok": True, "recipe": found.plain(), "remarks": remarks, "deep": facts})
        return
    for line in remarks:
        typer.echo(f"note: {line}")
    for fact in facts:
        typer.echo("\n".join(f"{k}: {v}" for k, v in fact.items()) + "\n")
    typer.echo(f"{recipe} is fine: " + " -> ".join(s.entry.name for s in found.steps))


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List all methods and ready recipes."""
    if as_json:
        _print_json(
            {
                "steps": [
                    {"name": e.name, "line": e.line, "paper": e.paper, "takes": e.takes, "gives": e.gives, "loads_in": e.loads_in}
                    for e in registry.entries()
                ],
                "recipes": list(recipes.ready_recipes()),
            }
        )
        return
    width = max(len(e.name) for e in registry.entries())
    for family in _families():
        typer.secho(f"{family}: {registry.FAMILIES[family]}", bold=True)
        for e in registry.entries():
            if e.family == family:
                typer.echo(f"  {e.name:{width}}  {e.line} ({e.paper})")
    typer.secho("ready recipes", bold=True)
    typer.echo("  " + ", ".join(recipes.ready_recipes()))


@app.command()
def show(name: Annotated[str, typer.Argument(help="A method, such as reshape.upcycle, or a ready recipe.")], as_json: Json = False) -> None:
    """Show a method: paper, differences, knobs; or a ready recipe."""
    if ready := recipes.ready_recipes().get(name):
        if as_json:
            _print_json(recipes.read(name).plain())
        else:
            typer.echo(ready.read_text())
        return
    e = registry.entry(name)
    knobs = registry.knobs(e)
    own = sorted(flat(knobs), key=lambda row: row[0].split(".")[0] in Tune.__dataclass_fields__)  # the method's before the shared ones
    rows = [(n, None if default_of(f) is MISSING else default_of(f), type_name(f.type), f.metadata.get("help", "")) for n, f in own]
    if as_json:
        _print_json(
            {
                "name": e.name,
                "paper": e.paper,
                "doc": registry.doc(e),
                "loads_in": e.loads_in,
                "knobs": [dict(zip(("name", "default", "type", "meaning"), row, strict=True)) for row in rows],
            }
        )
        return
    loads = f"; the result loads in {e.loads_in}" if e.loads_in else ""
    typer.secho(f"{e.name}  ({e.paper}){loads}", bold=True)
    typer.echo(registry.doc(e).strip() + "\n")
    width = max(len(r[0]) for r in rows)
    for n, default, kind, meaning in rows:
        typer.echo(f"  {n:{width}}  {'' if default is None else default!s:10}  {meaning} ({kind})")


@app.command()
def new(
    family: Annotated[str, typer.Argument(help="Family, such as reshape or tune.")],
    name: Annotated[str, typer.Argument(help="Name of the method, in snake_case.")],
    as_json: Json = False,
) -> None:
    """Write the stubs of a new method into this checkout: file, registry line, recipe, test."""
    from modelwright.cli.new import scaffold

    files = scaffold(family, name, Path.cwd())
    if as_json:
        _print_json({"files": [str(f) for f in files]})
    else:
        typer.echo("\n".join(f"wrote {f}" for f in files))


@app.command()
def demo(
    base: Annotated[str, typer.Option("--base", help="Dense checkpoint; default: the embedded seedling.")] = "seedling",
    data: Annotated[str | None, typer.Option("--data", help="Text to learn; default: the names of Unicode's characters.")] = None,
    to: Annotated[str, typer.Option("--to", help="Folder for the result and the report.")] = "out/demo",
    tokens: Annotated[str, typer.Option("--tokens", help="Training tokens per arm.")] = "300k",
    seed: Annotated[int, typer.Option("--seed")] = 0,
    as_json: Json = False,
) -> None:
    """Dense to mixture of experts and back to a report, in about two minutes."""
    from modelwright.cli.demo import run_demo

    run_demo(base=base, data=data, to=to, tokens=tokens, seed=seed, as_json=as_json)


def _dashes(argument: str) -> str:
    """--top_k as --top-k, so that the names of the recipe work here too."""
    name, eq, value = argument.partition("=")
    return name.replace("_", "-") + eq + value if argument.startswith("--") else argument


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _top(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


def main(argv: list[str] | None = None) -> None:
    """Entry point. A UserError is one sentence and exit code 2; Ctrl-C is 130 and leaves a resumable state."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    argv = [_dashes(a) for a in (sys.argv[1:] if argv is None else argv)]
    try:
        sys.exit(app(argv, standalone_mode=False) or 0)
    except UserError as error:
        if "--json" in argv:
            _print_json({"error": {"what": error.what, "why": error.why, "how": error.how}})
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    except Exception as error:
        if not (hasattr(error, "show") and hasattr(error, "format_message")):  # the command line's own: a misspelt option
            raise
        if "--json" in argv:
            _print_json({"error": {"what": error.format_message(), "why": "", "how": ""}})
        typer.secho(f"error: {error.format_message()}", fg="red", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
