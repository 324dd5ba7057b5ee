"""Commands that use a checkpoint as it is: generate, chat, eval, push, try. Signatures only; the work is in the files beside."""

from typing import Annotated

import typer

from modelwright.cli.output import Json

Base = Annotated[str, typer.Option("--base", metavar="PATH", help="Checkpoint folder, hub id, or seedling (embedded).")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Tokens to write, at most.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, metavar="X", help="0: greedy; above: sampling.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, metavar="X", help="Sample from the likeliest tokens of this mass.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, metavar="N", help="Sample from so many tokens; 0: all.")]
System = Annotated[str | None, typer.Option("--system", help="System message of the chat.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random draw.")]
Evict = Annotated[str | None, typer.Option("--evict", metavar="METHOD", help="Evict the prompt's cache: nacl, snapkv, h2o, ...")]
Keep = Annotated[float, typer.Option("--keep", min=0.0, max=1.0, metavar="X", help="Share of the prompt that stays, with --evict.")]


def generate(
    base: Base,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="Texts to continue; - reads standard input.")] = None,
    file: Annotated[str | None, typer.Option("--file", help="More prompts: a text file is one, a table or jsonl one per row.")] = None,
    column: Annotated[str | None, typer.Option("--column", help="Column of the prompts in --file.")] = None,
    chat: Annotated[str | None, typer.Option("--chat", help="Chats to answer: jsonl or json with messages of role and content.")] = None,
    template: Annotated[bool, typer.Option("--template", help="Put each prompt into the tokenizer's chat template.")] = False,
    system: System = None,
    max_new_tokens: NewTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    samples: Annotated[int, typer.Option("--samples", min=1, metavar="N", help="Answers per prompt; more than one needs sampling.")] = 1,
    evict: Evict = None,
    keep: Keep = 0.5,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Continue prompts, or answer chats."""
    from modelwright.cli.talk import Sampling, generate

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    generate(base, prompts or [], file, column, chat, template, system, sampling, samples, evict, keep, as_json)


def chat(
    base: Base,
    system: System = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Talk to a checkpoint in the terminal; one line is one turn, also through a pipe."""
    from modelwright.cli.chat import chat
    from modelwright.cli.talk import Sampling

    chat(base, system, Sampling(max_new_tokens, temperature, top_p, top_k, seed), as_json)


def evaluate(
    base: Base,
    data: Annotated[
        list[str] | None, typer.Argument(metavar="FILE...", help="Texts, tables of text or chats, or tasks with choices.")
    ] = None,
    column: Annotated[str | None, typer.Option("--column", help="Column that holds the text.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Use at most this many rows.")] = None,
    context: Annotated[int, typer.Option("--context", min=2, metavar="N", help="Tokens per row of text.")] = 256,
    batch: Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Rows per forward pass.")] = 8,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Tasks of lm-eval, with commas; needs the extra `eval`.")] = None,
    shots: Annotated[int | None, typer.Option("--shots", min=0, metavar="N", help="Examples shown before each item of --tasks.")] = None,
    as_json: Json = False,
) -> None:
    """Bits per byte and accuracy on texts and tasks."""
    from modelwright.cli.score import evaluate

    evaluate(base, data or [], column, limit, context, batch, tasks, shots, as_json)


def push(
    folder: Annotated[str, typer.Argument(help="Folder of a result.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hugging Face hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public; it is private otherwise.")] = False,
    message: Annotated[str, typer.Option("--message", help="Message of the commit.")] = "Upload with modelwright",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, list what would be sent, send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a result to the Hugging Face hub, private by default."""
    from modelwright.cli.push import push

    push(folder, repo, public, message, dry_run, as_json)


def try_(
    name: Annotated[str, typer.Argument(metavar="METHOD", help="A method, such as tune.hft.")],
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as in train.tokens=100k.")
    ] = None,
    to: Annotated[str | None, typer.Option("--to", help="Folder of data and result; default: out/try/METHOD.")] = None,
    look: Annotated[bool, typer.Option("--open/--no-open", help="Open the report in the browser where there is a desktop.")] = True,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run a method on the embedded model and made data, within two minutes."""
    from modelwright.cli.tries import try_method

    try_method(name, sets or [], to, look, seed, as_json)


def register(app: typer.Typer) -> None:
    """Add the commands, in this order."""
    for name, command in (("try", try_), ("generate", generate), ("chat", chat), ("eval", evaluate), ("push", push)):
        app.command(name)(command)
