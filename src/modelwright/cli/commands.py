"""Commands made from knobs: one group per family, one command per method. Its flags are read off the method's dataclass."""

import inspect
import types
from collections.abc import Callable
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from modelwright import registry
from modelwright.cli.output import Json, note, run_and_print
from modelwright.core.errors import UserError
from modelwright.core.knobs import default_of, flat, type_name

HELP = {"help_option_names": ["-h", "--help"]}


class Group(TyperGroup):
    """A group that prints its help, with exit code 0, when it is called alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)


def family_group(family: str) -> Any:
    """The group of a family: its methods as commands, each made when it is asked for."""

    class Methods(Group):
        def list_commands(self, ctx: Any) -> list[str]:
            return [e.name.split(".")[1] for e in registry.entries() if e.family == family]

        def get_command(self, ctx: Any, name: str) -> Any:
            name = name.replace("-", "_")
            if ctx.resilient_parsing and name not in self.list_commands(ctx):
                return None
            entry = registry.entry(f"{family}.{name}")
            single = typer.Typer(rich_markup_mode=None, add_completion=False, context_settings=HELP)
            single.command(name, cls=Named, help=f"{entry.line}. {entry.paper}.")(step_command(entry))
            return typer.main.get_command(single)

        def format_commands(self, ctx: Any, formatter: Any) -> None:  # from the table: no method's file is read
            with formatter.section("Commands"):
                formatter.write_dl([(e.name.split(".")[1], e.line) for e in registry.entries() if e.family == family])

    group = typer.Typer(add_completion=False, help=registry.FAMILIES[family], rich_markup_mode=None, context_settings=HELP)
    group.info.cls = Methods
    command = typer.main.get_group(group)
    command.name = family
    return command


class Named(TyperCommand):
    """A command whose arguments may be given by their names too: `judge select --chains FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for p in self.params:
            flag = f"--{(p.name or '').replace('_', '-')}"
            if p.param_type_name == "argument" and flag in args[:-1]:
                at = args.index(flag)
                args = [*args[:at], *args[at + 2 :], args[at + 1]]
        return super().parse_args(ctx, args)


def step_command(e: registry.Entry) -> Callable[..., None]:
    """A function whose signature is the method's knobs."""
    leaves = flat(registry.knobs(e))

    def command(**given: Any) -> None:
        from modelwright.runner import recipe as recipes

        raw = _raw_recipe(e, leaves, given)
        _save(raw, given["save"] or [], e)
        recipe = recipes.parse(raw, Path.cwd(), e.name)
        run_and_print(recipe, given["as_json"], bool(e.gives or given["to"]), given.get("nproc", 1))

    parameters = [*_places(e), *(_knob(name, f) for name, f in leaves), *_common(e)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _parameter(name: str, kind: Any, option: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _places(e: registry.Entry) -> list[inspect.Parameter]:
    """--base where the method takes a checkpoint, and --to."""
    found = []
    base = typer.Option("--base", metavar="PATH", help="Checkpoint folder, hub id, or seedling (embedded).")
    if "checkpoint" in e.takes:
        found.append(_parameter("base", str, base))
    elif "checkpoint" in e.may_take:
        found.append(_parameter("base", str | None, base, None))
    demanded = bool(e.gives) and not e.shape.may_only_measure
    remark = "must not exist yet." if demanded else f"empty: out/{e.name}." if e.gives else "empty: print only."
    to = typer.Option("--to", metavar="PATH", help=f"Folder of the result; {remark}")
    found.append(_parameter("to", str, to) if demanded else _parameter("to", str | None, to, None))
    return found


def _common(e: registry.Entry) -> list[inspect.Parameter]:
    """What every method's command takes beside its knobs."""
    save = (
        "How the result is saved: shard_size=BYTES per weight file at most; certificate=auto, full or structure; "
        "force=true saves a result whose certificate failed."
    )
    found = [
        _parameter("seed", int, typer.Option("--seed", help="Seed of every random draw."), 0),
        _parameter("save", list[str] | None, typer.Option("--save", metavar="KEY=VALUE", help=save), None),
    ]
    if e.shape.driver == "tune":
        found.append(_parameter("nproc", int, typer.Option("--nproc", min=1, help="Processes that train together."), 1))
    return [*found, inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)]


def _knob(name: str, f: Field) -> inspect.Parameter:
    """One knob as an option, or as an argument where the knob says so."""
    default, kind = default_of(f), _bare(f.type)
    shown = "" if default in (None, MISSING, [], {}) else f" [{default}]"
    meaning = f"{f.metadata.get('help', '')}{shown} ({type_name(f.type)})"
    taken = list[str] if get_origin(kind) is list else bool if kind is bool else str
    if f.metadata.get("argument"):
        argument = typer.Argument(help=meaning, show_default=False, metavar=name.upper())
        return _parameter(name, taken, argument) if default is MISSING else _parameter(name, taken | None, argument, None)
    item = get_args(kind)[0] if get_origin(kind) is list else kind
    shape = "YAML" if get_origin(item) is dict or item is Any else {int: "N", float: "X", bool: None}.get(item, "TEXT")
    option = typer.Option(*flags(name, f), help=meaning, show_default=False, metavar=shape)
    return _parameter(name.replace(".", "__"), taken | None, option, None)


def flags(name: str, f: Field) -> list[str]:
    """How a knob is written on the command line: its name, the short name of a path, and its aliases."""
    prefix = name[: name.rfind(".") + 1]
    aliases = f.metadata.get("alias") or ()
    names = [name, *(prefix + a for a in ([aliases] if isinstance(aliases, str) else aliases))]
    if name.endswith(".path"):
        names.insert(0, name.removesuffix(".path"))
    dashed = ["--" + n.replace("_", "-") for n in names]
    return [f"{n}/--no-{n[2:]}" for n in dashed] if _bare(f.type) is bool else dashed


def _bare(kind: Any) -> Any:
    """The type without `| None`."""
    arms = [a for a in get_args(kind) if a is not type(None)] if get_origin(kind) in (Union, types.UnionType) else []
    return arms[0] if len(arms) == 1 else kind


def _raw_recipe(e: registry.Entry, leaves: list[tuple[str, Field]], given: dict[str, Any]) -> dict[str, Any]:
    """The recipe of one step from the flags that were given."""
    settings: dict[str, Any] = {}
    for name, f in leaves:
        value = given[name.replace(".", "__")]
        if value is None:
            if default_of(f) is MISSING:
                flag = name.upper() if f.metadata.get("argument") else flags(name, f)[0]
                raise UserError(f"{flag} is missing", f.metadata.get("help", ""), f"give {flag}")
            continue
        *path, last = name.split(".")
        at = settings
        for part in path:
            at = at.setdefault(part, {})
        at[last] = _value(_bare(f.type), value, name)
    return {"name": e.name, "seed": given["seed"], "base": given.get("base"), "steps": [{e.name: settings}], "save": {"to": given["to"]}}


def _value(kind: Any, value: Any, name: str) -> Any:
    """What was typed, read as YAML where the knob takes more than a plain value."""
    from modelwright.runner.recipe import read_yaml

    if get_origin(kind) is list:
        return [v if get_args(kind)[0] in (str, int, float, bool) else read_yaml(v, f"--{name}") for v in value]
    return read_yaml(value, f"--{name}") if get_origin(kind) is dict else value


def _save(raw: dict[str, Any], assignments: list[str], e: registry.Entry) -> None:
    """Apply --save KEY=VALUE; each key is explained where it is written wrongly or has no effect."""
    from modelwright.runner import recipe as recipes

    meanings = {f: field.metadata["help"] for f, field in recipes.Save.__dataclass_fields__.items()}
    for assignment in assignments:
        key, eq, value = assignment.partition("=")
        if not eq:
            known = meanings.get(key, "")
            raise UserError(
                f"--save {assignment} has no '='", known and f"{key} is a setting: {known}", f"write --save {key or 'KEY'}=VALUE"
            )
        recipes.override(raw, f"save.{assignment}")
        if key == "force" and not isinstance(raw["save"]["force"], bool):
            raise UserError(f"--save {assignment} does not fit", f"force is true or false: {meanings['force']}", "write --save force=true")
        if key == "force" and raw["save"]["force"] and e.family != "reshape":
            note(f"force=true changes nothing for {e.name}: it is there to {meanings['force']}, and only a reshape step's can fail")
