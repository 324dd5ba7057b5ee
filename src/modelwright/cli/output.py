"""What every command prints, and how: json on request, notes and errors on standard error, text exactly as it is."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelwright.core.files import finite

if TYPE_CHECKING:
    from modelwright.runner.recipe import Recipe

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")]


def print_json(value: Any) -> None:
    """The value as indented JSON on standard output; what is not finite is null."""
    typer.echo(json.dumps(finite(value), indent=1, default=str))


def visible(text: str) -> str:
    """The text on one line, with line breaks and invisible characters written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def writable(text: str, stream: Any = None) -> str:
    """The text as the stream can show it: what its encoding lacks is written as an escape."""
    encoding = getattr(stream or sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str) -> None:
    """Text from a person or a model on standard output, unaltered; nothing in it is markup."""
    typer.echo(writable(text))


def note(text: str) -> None:
    """A remark on standard error, where it disturbs neither results nor json."""
    typer.secho(writable(f"note: {visible(text)}", sys.stderr), err=True)


def print_error(what: str, why: str, how: str, text: str, as_json: bool) -> None:
    """An error as one sentence on standard error, and as an object on standard output where json was asked for."""
    if as_json:
        print_json({"error": {"what": what, "why": why, "how": how}})
    typer.secho(writable(f"error: {visible(text)}", sys.stderr), fg="red", err=True)


def free_folder(folder: Path) -> Path:
    """The folder itself, or the first of folder-2, folder-3, ... that is not there."""
    n, found = 2, folder
    while found.exists():
        found, n = folder.with_name(f"{folder.name}-{n}"), n + 1
    return found


@contextmanager
def resumable(keep: bool = True) -> Iterator[None]:
    """Ctrl-C is exit code 130 and a sentence."""
    try:
        yield
    except KeyboardInterrupt:
        typer.secho("stopped; the same command continues where it was" if keep else "stopped; nothing was kept", err=True)
        raise typer.Exit(130) from None


def run_and_print(recipe: "Recipe", as_json: bool, keep: bool = True, nproc: int = 1) -> Any:
    """Check and run a recipe, then print its report, or its numbers as json. Returns the result."""
    from modelwright.core.report.progress import choose
    from modelwright.runner.recipe import check
    from modelwright.runner.run import run_recipe

    check(recipe)
    with resumable(keep):
        result = run_recipe(recipe, choose(as_json), keep, nproc)
    if as_json:
        print_json(result.plain())
    else:
        result.report.print()
        if result.to:
            typer.echo(f"\nresult  {result.to}\nreport  {result.to / 'report.html'}")
    return result
