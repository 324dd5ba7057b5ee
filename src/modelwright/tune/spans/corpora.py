"""Monolingual texts as chunks to be corrupted, and parallel texts as pairs in both directions; both are mixed by language."""

import gzip
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from modelwright.core.data.make import in_vocabulary, tokenize
from modelwright.core.data.read import iter_rows, read
from modelwright.core.data.rows import IGNORE, Rows, TokenRows
from modelwright.core.data.store import mixed
from modelwright.core.errors import UserError
from modelwright.core.knobs import Data
from modelwright.tune.spans.whitespace import Spaces, write

NAMES = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "cs": "Czech",
    "es": "Spanish",
    "ja": "Japanese",
    "ru": "Russian",
    "zh": "Chinese",
}


def name_of(language: str, names: dict[str, str]) -> str:
    """The word for a language in a prompt: `names`, else the usual one, else with a capital."""
    return names.get(language) or NAMES.get(language) or language[:1].upper() + language[1:]


def chunks(data: Data, tokenizer: Any, vocab: int, length: int, spaces: Spaces) -> Rows:
    """Texts one after the other, in rows of `length` tokens of which nothing is marked as learnt: they are corrupted later."""
    texts = [write(t, spaces) for t in read(data) if isinstance(t, str)]
    if not texts:
        raise UserError(f"{data.path} holds no text", "a monolingual source is plain text", "give a text file, or a column of texts")
    rows = tokenize(texts, tokenizer, vocab, length)
    return replace(rows, labels=torch.full_like(rows.labels, IGNORE))


def read_pairs(data: Data, a: str, b: str) -> list[tuple[str, str]]:
    """Pairs of texts: a table with a column for each language, or files that are parallel line by line, `{lang}` in their path."""
    if "{lang}" in str(data.path):
        sides = [_lines(Path(str(data.path).replace("{lang}", one)).expanduser()) for one in (a, b)]
        if len(sides[0]) != len(sides[1]):
            counts = f"{len(sides[0])} lines of {a} and {len(sides[1])} of {b}"
            raise UserError(f"{data.path} has {counts}", "a line must mean the same in both", "align the files")
        pairs = list(zip(*sides, strict=True))[: data.limit]
    else:
        rows = list(iter_rows(data))
        if rows and not {a, b} <= rows[0].keys():
            raise UserError(
                f"{data.path} has no columns {a} and {b}", f"it has {', '.join(rows[0])}", "name them, or give {lang} in the path"
            )
        pairs = [(str(r.get(a) or ""), str(r.get(b) or "")) for r in rows]
    kept = [p for p in pairs if p[0].strip() and p[1].strip()]
    if not kept:
        raise UserError(f"{data.path} has no pair of {a} and {b}", "one side of each is empty", "check the columns")
    return kept


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise UserError(f"no file at {file}", "the path has {lang} in it, once for each language", "check both files")
    try:
        text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode("utf-8-sig")
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{file} cannot be read", str(error)) from None
    return re.split(r"\r?\n", text.removesuffix("\n"))


def pair_rows(
    pairs: list[tuple[str, str]],
    languages: tuple[str, str],
    tokenizer: Any,
    vocab: int,
    context: int,
    *,
    names: dict[str, str],
    form: str,
    spaces: Spaces,
) -> Rows:
    """Both directions of each pair. prefix: the source behind "translate A to B: \\n" is given and the target learnt. concatenated: source,
    end token and target are one text, to be corrupted. A text longer than the context is left out and counted."""
    end = int(tokenizer.eos_token_id)
    words = [name_of(one, names) for one in languages]
    heads = [f"translate {words[k]} to {words[1 - k]}: \n" if form == "prefix" else "" for k in (0, 1)]
    sides = [[write(p[k], spaces) for p in pairs] for k in (0, 1)]
    bare = [tokenizer(side, add_special_tokens=False)["input_ids"] for side in sides]
    given = [tokenizer([heads[k] + t for t in sides[k]], add_special_tokens=False)["input_ids"] if heads[k] else bare[k] for k in (0, 1)]
    made = [([*given[k][i], end], [*bare[1 - k][i], end]) for i in range(len(pairs)) for k in (0, 1)]
    if form == "prefix":  # the encoder's end token is put there when a batch is made
        kept = [(a[:-1], b) for a, b in made if max(len(a), len(b)) <= context]
    else:
        kept = [([*a, *b[:-1]], []) for a, b in made if len(a) + len(b) <= context]
    if not kept:
        raise UserError(f"no pair of {'-'.join(languages)} fits a context of {context}", "each is left out", "raise train.context")
    width = max(len(a) + len(b) for a, b in kept)
    ids = torch.zeros(len(kept), width, dtype=torch.int32)
    labels, lengths = torch.full((len(kept), width), IGNORE, dtype=torch.int32), torch.tensor([len(a) + len(b) for a, b in kept])
    for i, (a, b) in enumerate(kept):
        ids[i, : len(a) + len(b)] = torch.tensor([*a, *b])
        labels[i, len(a) : len(a) + len(b)] = torch.tensor(b, dtype=torch.int32)
    in_vocabulary(int(ids.min()), int(ids.max()), vocab)
    facts = {"rows": len(kept), "left out: longer than the context": len(made) - len(kept)}
    sizes = {f"tokens of {one}": sum(map(len, side)) for one, side in zip(languages, bare, strict=True)}
    return Rows(ids, labels, lengths, facts=facts | sizes)


def together(parts: dict[str, Rows], shares: dict[str, float], seed: int) -> tuple[TokenRows, dict[str, float]]:
    """The parts in these shares of tokens, and how often each is passed through in one epoch of the whole."""
    weights = {k: shares[k] * len(rows) / max(rows.tokens, 1) for k, rows in parts.items()}
    made = mixed(list(parts.values()), [weights[k] for k in parts], seed)
    total = sum(weights.values())
    return made, {k: weights[k] / total * len(made) / len(rows) for k, rows in parts.items()}
