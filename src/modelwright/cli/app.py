"""The command line. --help, list, show and check import neither torch nor transformers nor numpy nor pyarrow."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from modelwright import __version__, registry
from modelwright.cli import use
from modelwright.cli.commands import HELP, Group, family_group
from modelwright.cli.output import Json, note, print_error, print_json, run_and_print, say
from modelwright.core.errors import UserError, did_you_mean, shown

Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override, as in steps.1.train.lr=3e-4; steps count from 0.")
]


class _Top(Group):
    """The fixed commands, and one group per family whose commands are read off the registry when asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *registry.families()]

    def get_command(self, ctx: Any, name: str) -> Any:
        if found := super().get_command(ctx, name):
            return found
        if name in registry.families():
            return family_group(name)
        if ctx.resilient_parsing:  # the shell asks what could follow
            return None
        raise UserError(f"unknown command {shown(name)}", how=registry.hint(name) or did_you_mean(name, self.list_commands(ctx)))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        fixed = [(n, self.get_command(ctx, n)) for n in super().list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(n, c.get_short_help_str(limit=90)) for n, c in fixed])
        with formatter.section("Methods, by family"):
            formatter.write_dl([(f, registry.FAMILIES[f]) for f in registry.families()])


app = typer.Typer(
    cls=_Top,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=HELP,
    help="A workshop for language models: reshape, tune, align, serve and inspect checkpoints, with a proof printed for every step.",
)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a ready one.")],
    sets: Sets = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Processes that train together, started with torchrun.")] = 1,
    as_json: Json = False,
) -> None:
    """Run a recipe. A stopped run continues where it was."""
    from modelwright.runner import recipe as recipes

    run_and_print(recipes.read(recipe, sets or []), as_json, nproc=nproc)


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a ready one.")],
    sets: Sets = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also load configs and data: sizes, memory, first rows.")] = False,
    as_json: Json = False,
) -> None:
    """Check a recipe without running it (no torch)."""
    from modelwright.runner import recipe as recipes

    found = recipes.read(recipe, sets or [])
    remarks = recipes.check(found)
    facts: list[dict[str, Any]] = []
    if deep:
        from modelwright.runner.preview import preview

        facts = preview(found)
    if as_json:
        print_json({"ok": True, "recipe": found.plain(), "remarks": remarks, "deep": facts})
        return
    for line in remarks:
        say(f"note: {line}")
    for fact in facts:
        say("\n".join(f"{k}: {v}" for k, v in fact.items()) + "\n")
    say(f"{recipe} is fine: " + " -> ".join(s.entry.name for s in found.steps))


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List all methods and ready recipes."""
    from modelwright.cli.methods import print_list

    print_list(as_json)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A method, such as reshape.upcycle, or a ready recipe.")], as_json: Json = False) -> None:
    """Show a method: paper, differences, knobs; or a ready recipe."""
    from modelwright.cli.methods import print_one

    print_one(name, as_json)


@app.command()
def new(
    family: Annotated[str | None, typer.Argument(help="Family, such as reshape or tune.")] = None,
    name: Annotated[str | None, typer.Argument(help="Name of the method, in snake_case.")] = None,
    package: Annotated[str | None, typer.Option("--package", metavar="NAME", help="Write an installable package with the method.")] = None,
    as_json: Json = False,
) -> None:
    """Write the stubs of a new method, into this checkout or as a package of your own."""
    from modelwright.cli import new as stubs

    if package:
        files = stubs.scaffold_package(package, family or "tune", name or "first", Path.cwd())
    elif family and name:
        files = stubs.scaffold(family, name, Path.cwd())
    else:
        raise UserError("a family and a name are needed", how="write `modelwright new tune my_method`, or `new --package my_methods`")
    if as_json:
        print_json({"files": [str(f) for f in files]})
    else:
        say("\n".join(f"wrote {f}" for f in files))


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


use.register(app)


def _dashes(argument: str) -> str:
    """--top_k as --top-k, so that the names of the recipe work here too."""
    name, eq, value = argument.partition("=")
    return name.replace("_", "-") + eq + value if argument.startswith("--") else argument


def _message(error: Any) -> str:
    """What is wrong with the flags; --lr finds --train.lr, the flag that ends in the same word."""
    word, ctx = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if word and ctx is not None:
        flags = [o for p in ctx.command.params for o in p.opts]
        if near := [o for o in flags if o.split(".")[-1] == word.lstrip("-") and o != word]:
            return f"{error.message}; did you mean {near[0]}?"
    return str(error.format_message())


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
    as_json = "--json" in argv
    try:
        if "_MODELWRIGHT_COMPLETE" not in os.environ:
            for problem in registry.problems():
                note(problem)
        sys.exit(app(argv, standalone_mode=False, prog_name="modelwright") or 0)
    except UserError as error:
        print_error(error.what, error.why, error.how, str(error), as_json)
        sys.exit(2)
    except Exception as error:
        if not (hasattr(error, "show") and hasattr(error, "format_message")):  # the command line's own: a misspelt option
            raise
        message = _message(error)
        print_error(message, "", "", message, as_json)
        sys.exit(2)


if __name__ == "__main__":
    main()
